"""A stand-in for W&B's server, as far as a sweep and its agents need one: GraphQL and the file stream, on loopback."""

import contextlib
import http.server
import json
import re
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = (
            json.loads(body) if body.startswith(b"{") and b"\n{" not in body else {}
        )  # else telemetry
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

    The run with the number `stop` is told to stop when its first line of history has come. `config` is the YAML of the
    sweep that it knows.
    """

    def __init__(self, trials, stop=None, config=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.trials, self.stop, self.config = trials, stop, config
        self.given, self.told, self.history, self.operations, self.sweeps = 0, False, {}, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def take_stream(self, run, body):
        lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(json.loads(line) for line in lines)

    def graphql(self, body):
        query, variables = body["query"], body.get("variables") or {}
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        self.operations.append(name[1] if name else query[:60])
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "nobody"}}
        if "upsertSweep" in query:
            self.sweeps.append(variables["config"])
            return {
                "upsertSweep": {
                    "sweep": {"name": "sweep1", "project": project},
                    "configValidationWarnings": [],
                }
            }
        if "GetSweep" in query:
            known = {"name": variables["name"], "config": self.config, "state": "RUNNING"}
            names = (
                "id",
                "displayName",
                "method",
                "description",
                "bestLoss",
                "createdAt",
                "updatedAt",
            )
            sweep = {
                "__typename": "Sweep",
                "runCount": 0,
                "runCountExpected": 0,
                **dict.fromkeys(names, "x"),
                **known,
            }
            return {"project": {"sweep": {**sweep, "bestLoss": 0.0} if self.config else None}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if "agentHeartbeat" in query:
            running = json.loads(variables["runState"])
            return {
                "agentHeartbeat": {
                    "agent": {"id": "agent1"},
                    "commands": json.dumps(self.commands(running)),
                }
            }
        if "upsertBucket" in query:
            bucket = {
                "id": "b",
                "name": variables.get("name"),
                "displayName": variables.get("name"),
                "description": None,
                "config": None,
                "sweepName": variables.get("sweep"),
                "historyLineCount": 0,
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{file}"}
                for file in variables["files"]
            ]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            viewer = {
                "id": "v",
                "entity": "nobody",
                "username": "nobody",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": viewer, "serverInfo": None}
        return {}

    def commands(self, running):
        run = f"run{self.stop}"
        if self.stop is not None and running.get(run) and self.history.get(run) and not self.told:
            self.told = True
            return [{"type": "stop", "run_id": run}]
        if running:
            return []
        if self.given == len(self.trials):
            return [{"type": "exit"}]
        params = self.trials[self.given]
        self.given += 1
        args = {name: {"value": value} for name, value in params.items()}
        return [{"type": "run", "run_id": f"run{self.given - 1}", "args": args}]
