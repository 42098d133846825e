"""A search that W&B drives: the real package over HTTP, against a stand-in for its server."""

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
import forked, train_mnist
from wandb.agents import pyagent
from train_mnist import parse_arguments

train_mnist.synthetic = forked.few_digits

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
FLAGS = "--model dense --schedule constant --dataset=synthetic"
COMMAND = f"${{env}} ${{interpreter}} ${{program}} {FLAGS} ${{args}}"
SEARCH = "--method random --script mine.py --engine wandb --name s --runs-dir runs --count 4"
SEARCH += f" --param lr=log:1e-4..1e-1 --param epochs=2,20,5000 --bands=[9,3,0] -- {FLAGS}"

# A dummy key and that server, and no pictures.
PREPARE = """
import undrawn
undrawn.nothing_is_drawn()
for name in [name for name in os.environ if name.startswith("WANDB")]:
    del os.environ[name]
os.environ.update(WANDB_BASE_URL="{url}", HOME="{home}", no_proxy="127.0.0.1", {more})
"""
KEY = f"WANDB_API_KEY='{40 * '0'}'"


def start(url, argv, more=KEY):
    """sweep.py in a process of its own, with W&B's server at `url`."""
    Path("mine.py").write_text(MINE)
    prepare = PREPARE.format(url=url, home=Path.cwd(), more=more)
    return Forked("sweep", *argv.split(), before=prepare)


def drive(server, argv):
    """Run sweep.py: the rows of trials.jsonl. It fails where the last of them has failed."""
    assert start(server.url, argv).finish()[0] == 0, Path("err").read_text()
    return records.read_json(Path("runs/s/trials.jsonl"), lines=True)


def test_trials_that_finish_fail_and_are_told_to_stop():
    """W&B gets the space, the flags and the epochs, and the trials get what it says."""
    given = [(0.03, 20), (0.02, 2), (0.01, 2), (0.003, 5000)]
    server = WandbServer([{"lr": lr, "epochs": epochs} for lr, epochs in given], stop=3)
    rows = drive(server, SEARCH)
    assert [row["status"] for row in rows] == ["finished", "failed", "finished", "pruned"]
    assert [tuple(row["params"].values()) for row in rows] == given
    assert 0 < rows[3]["epochs"] < 5000
    config = yaml.safe_load(server.sweeps[0])
    space = {"min": 1e-4, "max": 0.1, "distribution": "log_uniform_values"}
    assert config["parameters"]["lr"] == space
    assert " ".join(config["command"]) == COMMAND
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 3, "eta": 3}

    # W&B compares the best so far.
    assert config["metric"] == {"name": "best_val_loss", "goal": "minimize"}
    losses = [row["val_loss"] for row in records.read_log(Path("runs/s/trial-0000"))]
    history = [row for row in server.history["run0"] if "val_loss" in row]
    assert [row["val_loss"] for row in history] == losses
    best = [min(losses[:count]) for count in range(1, 21)]
    assert [row["best_val_loss"] for row in history] == best != losses


def test_a_trial_that_was_running_at_ctrl_c_is_no_result():
    """It has no line, and the program ends without a traceback."""
    server = WandbServer([{"lr": 0.001, "epochs": 5000}])
    process = start(server.url, SEARCH)
    end = time.monotonic() + 300
    while not server.history.get("run0"):
        assert time.monotonic() < end and process.process.is_alive()
        time.sleep(0.05)
    os.kill(process.process.pid, signal.SIGINT)
    status, error = process.finish()
    assert status == 130, error
    assert "Traceback" not in error
    assert Path("runs/s/trials.jsonl").read_text() == ""


def test_a_search_that_goes_on_takes_no_more_than_its_count():
    given = [{"lr": 0.001 * number, "epochs": 2} for number in range(1, 9)]
    first = SEARCH.replace("--count 4", "--count 2 --wandb-project mine")
    assert len(drive(WandbServer(given[:1]), first)) == 1
    rows = drive(WandbServer(given[1:]), "--resume runs/s --count 4")
    assert [row["params"] for row in rows] == given[:4]
    assert not Path("runs/s/trial-0004").exists()
    projects = [records.read_record(path) for path in Path("runs/s").glob("trial-*")]
    assert {project["args"]["wandb_project"] for project in projects} == {"mine"}


JOIN = "--name s --runs-dir runs --sweep-id nobody/project/sweep1"


def test_a_sweep_is_joined_with_the_script_and_the_flags_of_the_one_who_made_it():
    server = WandbServer(
        [{"net.l1": 8, "batch-size": 50}, {"net.l1": 16, "batch-size": 50}],
        config="""{program: mine.py, method: random, run_cap: 2,
            parameters: {net.l1: {values: [8, 16]}, batch-size: {value: 50}},
            metric: {name: best_val_acc, goal: maximize}, command: ["${env}", "${interpreter}",
            "${program}", --dataset=synthetic, --model=dense, --epochs, 1, "${args}"]}""",
    )
    rows = drive(server, JOIN)
    assert not server.sweeps
    assert [row["params"] for row in rows] == [{"l1": l1, "batch_size": 50} for l1 in (8, 16)]
    record = records.read_record(Path("runs/s/trial-0001"))
    assert (record["args"]["dataset"], record["args"]["l1"]) == ("synthetic", 16)
    assert record["epochs"] == 1
    best = max(rows, key=lambda row: row["val_acc"])
    board = Path("runs/s/leaderboard.csv").read_text().splitlines()
    assert board[1].startswith(f"{best['trial']},")


@pytest.mark.parametrize(
    ("trials", "argv", "expected"),
    [
        ([{"lr": 0.02, "epochs": 2}] * 2, SEARCH, "the script ended with exit status 2"),
        ([], JOIN, "--sweep-id nobody/project/sweep1: Could not find sweep"),
    ],
)
def test_one_where_all_trials_fail_and_one_that_is_not_there_are_failures(trials, argv, expected):
    """The exit status tells, and the last line says why."""
    status, error = start(WandbServer(trials).url, argv).finish()
    assert status
    assert expected in error.splitlines()[-1]


OFFLINE = f"WANDB_MODE='offline', {KEY}"


@pytest.mark.parametrize(
    ("more", "flags", "engine", "status", "expected"),
    [
        (KEY, "", "engine: W&B", 1, "cannot be reached"),
        (KEY, "--seeds 2", "", 2, "runs/s exists"),  # its sweeps know no seeds
        (OFFLINE, "", "engine: local", 2, "runs/s exists"),
        ("WANDB_MODE='online'", "", "engine: local", 2, "runs/s exists"),
        (f"WANDB_MODE='of', {KEY}", "", "", 2, "Weights & Biases: "),
    ],
)
def test_wandb_drives_a_bayesian_search_where_it_can(more, flags, engine, status, expected):
    """Where it has a key and is not offline; where it might, it is said which engine does."""
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/taken").touch()  # so nothing is run
    argv = f"--method bayes {flags} --name s --runs-dir runs -- --dataset synthetic"
    found, error = start("http://127.0.0.1:1", argv, more).finish()  # which does not answer
    assert Path("out").read_text().startswith(engine)
    *before, last = error.splitlines()
    assert all(line.startswith("wandb: ") for line in before)
    assert found == status
    assert expected in last
