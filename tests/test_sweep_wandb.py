"""A search that W&B drives: the real package over HTTP, against a stand-in for its server."""

import os
from functools import partial
from pathlib import Path

import common
import sweep
import train_mnist

import forked
import pytest
import yaml
from test_sweep import start
from wandb_server import WandbServer

pytest.importorskip("wandb", reason="wandb is not installed")

SEARCH = ["--method", "random", "--script", "train_mnist.py", "--engine", "wandb", "--count", "4"]
SEARCH += ["--param", "lr=log:1e-4..1e-1", "--param", "epochs=2,5000"]


def against(url, home):
    """Prepare a process with a dummy key and that server, and an agent that asks for work more often than it does."""
    from wandb.agents.pyagent import Agent

    Agent.HEARTBEAT_SLEEP_SECONDS = 0.2
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ.update(WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, HOME=home, no_proxy="127.0.0.1")
    train_mnist.synthetic = forked.few_digits


def drive(server, home, *argv):
    """Run sweep.py: its exit status, and the lines on stderr."""
    argv = [*argv, "--name", "s", "--runs-dir", "runs", "--", "--dataset", "synthetic", "--model", "dense"]
    process = start(*argv, prepare=partial(against, server.url, str(home)))
    process.join(600)
    return process.exitcode, Path("sweep.err").read_text().splitlines()


def test_trials_that_finish_fail_and_are_told_to_stop(tmp_path):
    given = [(0.001, 2), (-1, 2), (0.01, 2), (0.003, 5000)]
    server = WandbServer([{"lr": lr, "epochs": epochs} for lr, epochs in given], stop=3)
    status, error = drive(server, tmp_path, *SEARCH)
    assert status == 0, error
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
    server.close()


def test_a_sweep_is_joined_and_one_where_all_fail_is_a_failure(tmp_path):
    server = WandbServer([{"lr": -1}, {"lr": -2}])
    status, error = drive(server, tmp_path, "--script", "train_mnist.py", "--count", "2", "--sweep-id", "sweep1")
    assert status == 1 and "all 2 trials failed" in error[-1]
    assert not server.sweeps
    assert sweep.Sweep.open(tmp_path / "runs" / "s").search.space == [sweep.Parameter("lr", (-2, -1))]
    server.close()


def test_without_a_server_there_is_one_clear_line(tmp_path):
    server = WandbServer([])
    server.close()
    status, (*before, last) = drive(server, tmp_path, *SEARCH)
    assert status == 1 and all(line.startswith("wandb: ") for line in before)
    assert "cannot be reached" in last and "--engine local does without" in last


@pytest.mark.parametrize(
    ("mode", "key", "drives"), [("online", 1, "W&B"), ("offline", 1, "local"), ("online", 0, "local")]
)
def test_auto_says_which_engine_drives_a_bayesian_search_and_why(monkeypatch, capsys, mode, key, drives):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(common, "has_wandb_key", lambda quiet: key)
    monkeypatch.setattr(common, "check_wandb", lambda args: None)
    args = sweep.build_parser().parse_args(["--method", "bayes"])
    assert sweep.choose_engine(args, sweep.search_from(args, [])) == ("wandb" if drives == "W&B" else "local")
    assert capsys.readouterr().out.startswith(f"engine: {drives}")
