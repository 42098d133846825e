"""A search that W&B drives: the real package over HTTP, against a stand-in for its server."""

import json
import os
import signal
import time
from pathlib import Path

import records

import pytest
import yaml
from forked import Forked
from wandb_server import WandbServer

pytest.importorskip("wandb", reason="wandb is not installed")

# W&B's agent takes this script, in whatever process; its pauses are a tenth of what they are.
MINE = """
import queue, time, types
import train_mnist
from wandb.agents import pyagent
from train_mnist import parse_arguments

def main(argv, on_epoch=None):
    if "--lr=0.02" in argv:
        raise SystemExit(2)
    return train_mnist.main(argv, on_epoch)

class Queue(queue.Queue):
    def get(self, timeout):
        return super().get(timeout=timeout / 10)

pyagent.Agent.HEARTBEAT_SLEEP_SECONDS = 0.2
pyagent.time = types.SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(seconds / 10))
pyagent.queue = types.SimpleNamespace(Queue=Queue, Empty=queue.Empty)
"""
SEARCH = ["--method", "random", "--script", "mine.py", "--engine", "wandb", "--count", "4"]
SEARCH += ["--param", "lr=log:1e-4..1e-1", "--param", "epochs=2,5000"]
FLAGS = ["--dataset", "synthetic", "--model", "dense"]

# A dummy key and that server, and no pictures.
PREPARE = """
import undrawn
undrawn.nothing_is_drawn()
for name in [name for name in os.environ if name.startswith("WANDB")]:
    del os.environ[name]
os.environ.update(WANDB_BASE_URL="{url}", HOME="{home}", no_proxy="127.0.0.1", {more})
"""


KEY = f"WANDB_API_KEY='{40 * '0'}'"


def start(server, *argv, more=KEY):
    """sweep.py in a process of its own."""
    Path("mine.py").write_text(MINE)
    argv = ["--name", "s", "--runs-dir", "runs", *argv]
    prepare = PREPARE.format(url=server.url, home=Path.cwd(), more=more)
    return Forked("sweep", *argv, before=prepare)


def drive(server, *argv):
    """Run sweep.py: its exit status, the lines on stderr, and the rows of trials.jsonl."""
    status, error = start(server, *argv).finish()
    path = Path("runs/s/trials.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return status, error.splitlines(), rows


def test_trials_that_finish_fail_and_are_told_to_stop():
    given = [(0.001, 2), (0.02, 2), (0.01, 2), (0.003, 5000)]
    server = WandbServer([{"lr": lr, "epochs": epochs} for lr, epochs in given], stop=3)
    status, error, rows = drive(server, *SEARCH, "--", *FLAGS)
    assert status == 0, error
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert [row["status"] for row in rows] == ["finished", "failed", "finished", "pruned"]
    assert [row["params"]["lr"] for row in rows] == [0.001, 0.02, 0.01, 0.003]
    assert 0 < rows[3]["epochs"] < 5000
    config = yaml.safe_load(server.sweeps[0])
    assert config["parameters"]["lr"] == {
        "min": 1e-4,
        "max": 0.1,
        "distribution": "log_uniform_values",
    }
    words = ["${env}", "${interpreter}", "${program}", "${args}"]
    assert sorted(" ".join(config["command"]).replace("=", " ").split()) == sorted(words + FLAGS)
    # W&B compares the best so far.
    assert config["metric"] == {"name": "best_val_loss", "goal": "minimize"}
    logged = records.read_log(Path("runs/s/trial-0000"))
    history = [row for row in server.history["run0"] if "val_loss" in row]
    assert [row["val_loss"] for row in history] == [row["val_loss"] for row in logged]
    best = [min(row["val_loss"] for row in logged[: epoch + 1]) for epoch in range(2)]
    assert [row["best_val_loss"] for row in history] == best
    assert {"UpsertSweep", "CreateAgent", "Heartbeat", "UpsertBucket"} <= set(server.operations)
    server.close()


def test_a_trial_that_was_running_at_ctrl_c_is_no_result():
    server = WandbServer([{"lr": 0.001, "epochs": 5000}])
    process = start(server, *SEARCH, "--", *FLAGS)
    end = time.monotonic() + 300
    while not server.history.get("run0"):
        assert time.monotonic() < end and process.process.is_alive()
        time.sleep(0.05)
    os.kill(process.process.pid, signal.SIGINT)
    status, error = process.finish()
    assert status == 130 and "Traceback" not in error, error
    assert Path("runs/s/trials.jsonl").read_text() == ""
    server.close()


def test_a_search_that_goes_on_takes_no_more_than_its_count():
    given = [{"lr": 0.001 * number, "epochs": 2} for number in range(1, 9)]
    server = WandbServer(given[:1])
    status, error, rows = drive(server, *SEARCH, "--", *FLAGS)
    assert (status, len(rows)) == (0, 1), error
    server.close()
    server = WandbServer(given[1:])
    status, error, rows = drive(server, *SEARCH, "--", *FLAGS)
    assert status == 0, error
    assert [row["params"] for row in rows] == given[:4]
    server.close()


def test_a_sweep_is_joined_with_the_script_and_the_flags_of_the_one_who_made_it():
    config = {
        "program": "mine.py",
        "method": "random",
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "command": ["${env}", "${interpreter}", "${program}", *FLAGS, "--epochs", "1", "${args}"],
        "parameters": {"l1": {"values": [8, 16]}},
        "run_cap": 2,
    }
    server = WandbServer([{"l1": 8}, {"l1": 16}], config=yaml.safe_dump(config))
    status, error, rows = drive(server, "--sweep-id", "nobody/project/sweep1")
    assert status == 0, error
    assert not server.sweeps and [row["params"] for row in rows] == [{"l1": 8}, {"l1": 16}]
    record = records.read_record(Path("runs/s/trial-0001"))
    assert (record["args"]["dataset"], record["args"]["l1"], record["epochs"]) == (
        "synthetic",
        16,
        1,
    )
    best = max(rows, key=lambda row: row["val_acc"])
    assert (
        Path("runs/s/leaderboard.csv").read_text().splitlines()[1].startswith(f"{best['trial']},")
    )
    server.close()


LAST = "the script ended with exit status 2"
UNKNOWN = "--sweep-id nobody/project/sweep1: Could not find sweep"


@pytest.mark.parametrize(
    ("trials", "argv", "expected"),
    [
        ([{"lr": 0.02, "epochs": 2}] * 2, SEARCH, LAST),
        ([], ["--sweep-id", "nobody/project/sweep1"], UNKNOWN),
    ],
)
def test_one_where_all_trials_fail_and_one_that_is_not_there_are_failures(trials, argv, expected):
    server = WandbServer(trials)
    status, error, _ = drive(server, *argv, "--", *FLAGS)
    assert status and expected in error[-1]
    server.close()


def test_without_a_server_there_is_one_clear_line():
    server = WandbServer([])
    server.close()
    status, (*before, last), _ = drive(server, *SEARCH, "--", *FLAGS)
    assert status == 1 and all(line.startswith("wandb: ") for line in before)
    assert "cannot be reached" in last and "--engine local does without" in last


@pytest.mark.parametrize(
    ("more", "drives"),
    [(KEY, "W&B"), (f"WANDB_MODE='offline', {KEY}", "local"), ("WANDB_MODE='online'", "local")],
)
def test_auto_says_which_engine_drives_a_bayesian_search_and_why(more, drives):
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/taken").touch()
    server = WandbServer([])
    server.close()
    argv = ["--method", "bayes", "--", "--dataset", "synthetic"]
    status, error = start(server, *argv, more=more).finish()
    assert Path("out").read_text().startswith(f"engine: {drives}")
    assert (status, "cannot be reached" in error) == ((1, True) if drives == "W&B" else (2, False))
