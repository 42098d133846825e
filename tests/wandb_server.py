"""A stand-in for W&B's server, on loopback: what a sweep and its agents ask of it."""

import contextlib
import http.server
import json
import threading

# What is answered to the requests that have such words in them.
ANSWERS = {
    "upsertSweep": """{"upsertSweep": {"configValidationWarnings": [], "sweep": {"name": "sweep1",
        "project": {"id": "p", "name": "project", "entity": {"id": "e", "name": "nobody"}}}}}""",
    "GetSweep": """{"project": {"sweep": {"__typename": "Sweep", "id": "x", "name": "sweep1",
        "displayName": "x", "method": "x", "description": "x", "state": "RUNNING", "bestLoss": 0.0,
        "createdAt": "x", "updatedAt": "x", "runCount": 0, "runCountExpected": 0}}}""",
    "createAgent": """{"createAgent": {"agent": {"id": "agent1"}}}""",
    "agentHeartbeat": """{"agentHeartbeat": {"agent": {"id": "agent1"}}}""",
    "upsertBucket": """{"upsertBucket": {"inserted": true, "bucket": {"id": "b", "name": "b",
        "displayName": "b", "description": null, "config": null, "sweepName": "sweep1",
        "historyLineCount": 0,
        "project": {"id": "p", "name": "project", "entity": {"id": "e", "name": "nobody"}}}}}""",
    "createRunFiles": """{"createRunFiles": {"runID": "b", "uploadHeaders": []}}""",
    "viewer": """{"serverInfo": null, "viewer": {"id": "v", "entity": "nobody", "flags": "{}",
        "username": "nobody", "teams": {"edges": []}}}""",
    "": "{}",
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = {}
        with contextlib.suppress(ValueError):  # of telemetry, in several lines
            body = json.loads(content)
        if self.path.endswith("file_stream"):
            self.server.take_stream(self.path.split("/")[-2], body)
        answer = json.dumps({"data": self.server.graphql(body)} if "query" in body else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever asked was killed
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


class WandbServer(http.server.ThreadingHTTPServer):
    """Gives out one run for each entry of `trials` (parameters), then tells the agent to end.

    The run with the number `stop` is told to stop when its first line of history has come. `config`
    is the YAML of the sweep that it knows.
    """

    def __init__(self, trials=(), stop=None, config=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.trials, self.stop, self.config = list(enumerate(trials)), f"run{stop}", config
        self.history, self.sweeps = {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def take_stream(self, run, body):
        lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(map(json.loads, lines))

    def graphql(self, body):
        query, variables = body["query"], body.get("variables") or {}
        kind = next(kind for kind in ANSWERS if kind in query)
        answer = json.loads(ANSWERS[kind])
        match kind:
            case "upsertSweep":
                self.sweeps.append(variables["config"])
            case "GetSweep" if self.config:
                answer["project"]["sweep"]["config"] = self.config
            case "GetSweep":
                answer["project"]["sweep"] = None
            case "agentHeartbeat":
                commands = self.commands(json.loads(variables["runState"]))
                answer[kind]["commands"] = json.dumps(commands)
            case "upsertBucket":
                answer[kind]["bucket"]["name"] = variables.get("name")
            case "createRunFiles":
                files = variables["files"]
                urls = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in files]
                answer[kind]["files"] = urls
        return answer

    def commands(self, running):
        if running.get(self.stop) and self.history.get(self.stop):
            return [{"type": "stop", "run_id": self.stop}]
        if running:
            return []
        if not self.trials:
            return [{"type": "exit"}]
        number, params = self.trials.pop(0)
        args = {name: {"value": value} for name, value in params.items()}
        return [{"type": "run", "run_id": f"run{number}", "args": args}]
