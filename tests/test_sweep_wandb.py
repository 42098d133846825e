"""A search that W&B drives: the real package over HTTP, against a stand-in for its server."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from wandb_server import WandbServer

import common
import sweep

pytest.importorskip("wandb", reason="wandb is not installed")

FLAGS = ["--dataset", "synthetic", "--limit-train", "300", "--model", "dense"]
SEARCH = ["--method", "random", "--script", "train_mnist.py", "--engine", "wandb", "--name", "s", "--count", "4"]
SEARCH += ["--param", "lr=log:1e-4..1e-1", "--param", "epochs=2,5000"]

# The command line, with an agent that asks for work more often than every five seconds.
IMPATIENT = """
import runpy, sys
from wandb.agents.pyagent import Agent
Agent.HEARTBEAT_SLEEP_SECONDS = 0.2
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def drive(tmp_path):
    """`drive(server, ...)` runs sweep.py in an empty directory, with a dummy key and that server."""
    servers = []

    def run(server, *arguments):
        servers.append(server)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        own["no_proxy"] = "127.0.0.1"
        command = [sys.executable, "-c", IMPATIENT, str(ROOT / "sweep.py"), *arguments, "--", *FLAGS]
        return subprocess.run(command, cwd=tmp_path, env=kept | own, capture_output=True, text=True, timeout=120)

    yield run
    for server in servers:
        server.close()


def test_trials_that_finish_fail_and_are_told_to_stop(drive, tmp_path):
    given = [(0.001, 2), (-1, 2), (0.01, 2), (0.003, 5000)]
    server = WandbServer([{"lr": lr, "epochs": epochs} for lr, epochs in given], stop=3)
    done = drive(server, *SEARCH)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "runs" / "s"
    rows = sweep.read_lines(directory / "trials.jsonl")
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert [row["status"] for row in rows] == ["finished", "failed", "finished", "pruned"]
    assert [row["params"]["lr"] for row in rows] == [0.001, -1, 0.01, 0.003]
    assert 0 < rows[3]["epochs"] < 5000
    config = yaml.safe_load(server.sweeps[0])
    assert config["parameters"]["lr"] == {"min": 1e-4, "max": 0.1, "distribution": "log_uniform_values"}
    assert config["metric"] == {"name": "val_loss", "goal": "minimize"}
    history = [row for row in server.history["run0"] if "val_loss" in row]
    logged = common.read_log(directory / "trial-0000")
    assert [row["val_loss"] for row in history] == [row["val_loss"] for row in logged]
    assert {"UpsertSweep", "CreateAgent", "Heartbeat", "UpsertBucket"} <= set(server.operations)


def test_a_sweep_is_joined_and_one_where_all_fail_is_a_failure(drive, tmp_path):
    server = WandbServer([{"lr": -1}, {"lr": -2}])
    done = drive(server, "--script", "train_mnist.py", "--name", "s", "--count", "2", "--sweep-id", "sweep1")
    assert done.returncode == 1 and "all 2 trials failed" in done.stderr.splitlines()[-1]
    assert not server.sweeps
    assert sweep.Sweep.open(tmp_path / "runs" / "s").search.space == [sweep.Parameter("lr", (-2, -1))]


def test_without_a_server_there_is_one_clear_line(drive):
    server = WandbServer([])
    server.close()
    done = drive(server, *SEARCH)
    *before, last = done.stderr.splitlines()
    assert done.returncode == 1 and all(line.startswith("wandb: ") for line in before)
    assert "cannot be reached" in last and "--engine local does without" in last


@pytest.mark.parametrize(
    ("mode", "key", "expected"),
    [("online", True, "wandb"), ("offline", True, "local"), ("online", False, "local")],
)
def test_auto_says_which_engine_drives_a_bayesian_search_and_why(monkeypatch, capsys, mode, key, expected):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(common, "has_wandb_key", lambda quiet: key)
    monkeypatch.setattr(common, "check_wandb", lambda args: None)
    args = sweep.build_parser().parse_args(["--method", "bayes"])
    assert sweep.choose_engine(args, sweep.search_from(args, []), common.Screen()) == expected
    assert capsys.readouterr().out.startswith("engine: ")
