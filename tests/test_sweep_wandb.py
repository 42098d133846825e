"""A search that W&B drives: the real package over HTTP, against a stand-in for its server."""

import json
import os

import pytest
import yaml
from wandb_server import WandbServer

import common
import sweep

pytest.importorskip("wandb", reason="wandb is not installed")

FLAGS = ["--dataset", "synthetic", "--limit-train", "300", "--model", "dense"]
SEARCH = ["--method", "random", "--script", "train_mnist.py", "--engine", "wandb", "--name", "s", "--count", "4"]
SEARCH += ["--param", "lr=log:1e-4..1e-1", "--param", "epochs=2,5000"]


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`serve(trials, stop)` starts the stand-in and points the package, with a dummy key, at it."""
    import wandb
    from wandb.agents.pyagent import Agent

    servers = []

    def start(trials, stop=None):
        servers.append(WandbServer(trials, stop))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        return servers[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Agent, "HEARTBEAT_SLEEP_SECONDS", 0.2)
    for name, value in {"WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield start
    wandb.teardown()
    for server in servers:
        server.close()
    for name in ("WANDB_DIR", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        os.environ.pop(name, None)


def test_trials_that_finish_fail_and_are_told_to_stop(serve, capfd):
    given = [(0.001, 2), (-1, 2), (0.01, 2), (0.003, 5000)]
    server = serve([{"lr": lr, "epochs": epochs} for lr, epochs in given], stop=3)
    sweep.main([*SEARCH, "--", *FLAGS])
    rows = sweep.read_lines(common.Path("runs/s/trials.jsonl"))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished", "pruned"]
    assert [row["params"]["lr"] for row in rows] == [0.001, -1, 0.01, 0.003]
    assert 0 < rows[3]["epochs"] < 5000
    config = yaml.safe_load(server.sweeps[0])
    assert config["parameters"]["lr"] == {"min": 1e-4, "max": 0.1, "distribution": "log_uniform_values"}
    assert config["metric"] == {"name": "val_loss", "goal": "minimize"}
    history = [row for row in server.history["run0"] if "val_loss" in row]
    logged = common.read_log(common.Path("runs/s/trial-0000"))
    assert [row["val_loss"] for row in history] == [row["val_loss"] for row in logged]
    assert {"UpsertSweep", "CreateAgent", "Heartbeat", "UpsertBucket"} <= set(server.operations)


def test_a_sweep_is_joined_and_one_where_all_fail_is_a_failure(serve):
    server = serve([{"lr": -1}, {"lr": -2}])
    with pytest.raises(common.RunError, match="all 2 trials failed"):
        sweep.main(["--script", "train_mnist.py", "--name", "s", "--count", "2", "--sweep-id", "sweep1", "--", *FLAGS])
    assert not server.sweeps
    assert sweep.Sweep.open(common.Path("runs/s")).search.space == [sweep.Parameter("lr", (-2, -1))]


def test_without_a_server_there_is_one_clear_line(serve, monkeypatch):
    serve([]).close()
    with pytest.raises(common.RunError, match=r"cannot be reached .* --engine local does without"):
        sweep.main([*SEARCH, "--", *FLAGS])


def test_auto_says_which_engine_drives_a_bayesian_search_and_why(serve, monkeypatch, capsys):
    for mode, key, expected in (
        ("online", "0" * 40, "wandb"),
        ("offline", "0" * 40, "local"),
        ("online", None, "local"),
    ):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY")
        import wandb

        wandb.teardown()
        args = sweep.build_parser().parse_args(["--method", "bayes"])
        assert sweep.choose_engine(args, sweep.search_from(args, []), common.Screen()) == expected
        assert json.dumps(capsys.readouterr().out).startswith('"engine: ')
