"""Searches that run: trials, failures, kills, seeds, pruning, many machines, and the report."""

import csv
import ctypes
import functools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records
import sweep

import forked
import pytest
import undrawn
from forked import MEMORY_IN_USE, Forked
from matplotlib.figure import Figure

# A script of the user's own: a metric that follows from its parameters, and ways to fail. It takes
# so little time that what is tested is the sweep. Before each epoch it waits while there is a file
# hold-all, hold-<its name> or hold-<its name>-<epoch> beside the sweep's directory.
TOY = """
import argparse, json, os, pathlib, signal, time
import common, records, torch

def parse_arguments(argv):
    parser = common.ArgumentParser(prog="toy.py")
    parser.add_argument("--x", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--run-name", required="--resume" not in argv)
    parser.add_argument("--fail", default="")
    for name in ("--resume", "--runs-dir"):
        parser.add_argument(name, type=pathlib.Path)
    for name in ("--test", "--quiet"):
        parser.add_argument(name, action=argparse.BooleanOptionalAction)
    return parser.parse_args(argv)

def main(argv, on_epoch=None):
    args, rows = parse_arguments(argv), []
    directory = args.resume or args.runs_dir / args.run_name
    if args.resume:
        rows, old = records.read_log(directory), records.read_json(directory / "run.json")["args"]
        vars(args).update(old)
    directory.mkdir(exist_ok=True)
    before, status, error = len(rows), "finished", None
    kept = "x", "k", "lr", "epochs", "seed", "fail"
    record = {"args": {key: getattr(args, key) for key in kept}}
    records.write_json(directory / "run.json", record)
    pathlib.Path(f"gpu-{os.environ['CUDA_VISIBLE_DEVICES']}-{torch.get_num_threads()}").touch()
    for _ in range(6000):
        if args.fail == "wait" and len([*pathlib.Path().glob("gpu-*")]) < 3:
            time.sleep(0.01)
    for epoch in range(before + 1, int(args.epochs) + 1):
        names = "all", directory.name, f"{directory.name}-{epoch}"
        while any((directory.parent.parent / f"hold-{name}").exists() for name in names):
            time.sleep(0.01)
        if args.fail == "torn" and args.k == 2:
            (directory / "run.json").write_text("{")
        if args.fail == "all" or args.fail in ("raise", "torn") and args.k == 2:
            raise ValueError(f"k is {args.k}")
        dies_once = args.fail.endswith("once") and before == 0 and epoch == 3
        if args.k == 2 and (args.fail == "die" or dies_once):
            os.kill(os.getpid(), signal.SIGTERM if args.fail == "stop-once" else signal.SIGKILL)
        if args.fail == "diverge" and args.x > 0.5:
            status, error = "diverged", "the loss became nan"
            break
        spike = 1 if args.k == 1 and epoch == 4 else 0
        loss = (args.x - 0.3) ** 2 + args.k / 10 + 1 / epoch - args.seed / 1000 + spike
        row = {"epoch": epoch, "val_loss": loss, "val_acc": 1 / (1 + loss)}
        rows.append({**row, "went_on_from": before})
        log = "".join(json.dumps(row) + chr(10) for row in rows)
        records.write_atomically(directory / "log.jsonl", log.encode())
        (directory / "best.pt").touch()
        if args.fail != "forget":
            (directory / "last.pt").touch()
        if on_epoch(rows[-1]):
            status = "pruned"
            break
    best = min(rows, key=lambda row: row["val_loss"]) if rows else None
    record |= {"status": status, "error": error, "best": best, "epochs": len(rows), "seconds": 0.1}
    records.write_json(directory / "run.json", record)
    return record
"""
GRID = "--method grid --param x=0.1,0.2,0.3 --param k=1,2"
BAYES = "--method bayes --param x=0.0..1.0 --param k=1,2,3"
fails = functools.partial(pytest.raises, records.RunError)
refused = functools.partial(pytest.raises, records.UsageError)
FAST = "multiprocessing.util.spawnv_passfds = fork\n"
UNDRAWN = f"import undrawn; undrawn.nothing_is_drawn()\n{FAST}"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


@pytest.fixture(autouse=True)
def toy(request, monkeypatch):
    """toy.py is here; nothing is drawn, unless that is tested."""
    Path("toy.py").write_text(TOY)
    monkeypatch.setattr("sys.path", [*sys.path])  # a sweep adds the place of its script
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever account this user has
    if "drawn" not in request.fixturenames:
        undrawn.nothing_is_drawn(monkeypatch.setattr)
    forked.start_server()


def change(old, new):
    """Change the toy."""
    assert old in TOY
    Path("toy.py").write_text(TOY.replace(old, new))


def asked(argv, name="s", script="toy.py", place="runs"):
    """The command line of a new search."""
    return f"--script {script} --runs-dir {place} --name {name} --quiet {argv}".split()


def search(*argv, **more):
    """Run a search."""
    return sweep.main(asked(*argv, **more))


def start(argv, before=""):
    """Run it in a process of its own, which prints to the files out and err."""
    return Forked("sweep", *asked(argv), before=UNDRAWN + before)


def go_on(argv="", place="runs/s", quiet="--quiet"):
    """Go on with a search."""
    sweep.main(f"--resume {place} {quiet} {argv}".split())


def lines(name="s", directory="runs"):
    """The lines of trials.jsonl, by trial; none where there is no such file."""
    path = Path(directory, name, "trials.jsonl")
    rows = records.read_json(path, lines=True) if path.exists() else []
    numbers = [row["trial"] for row in rows]
    assert len({*numbers}) == len(numbers)
    return sorted(rows, key=lambda row: row["trial"])


def column(key, *place):
    """What the trials have in one place of their lines."""
    return [row[key] for row in lines(*place)]


def results(name):
    """What does not depend on how often a search was stopped."""
    keys = "trial", "params", "status", "val_loss", "val_acc", "epochs", "error"
    return [[row[key] for key in keys] for row in lines(name)]


def board(name="s"):
    """The rows of leaderboard.csv."""
    return list(csv.DictReader(Path("runs", name, "leaderboard.csv").read_text().splitlines()))


def until(condition):
    """Wait for it, some minutes at most."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def hold(runs_dir="runs", trial="all"):
    """Have the trials there wait until the file that is returned is unlinked."""
    file = Path(runs_dir, f"hold-{trial}")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    return file


# ---------------- Trials and their results ----------------
def test_a_grid_runs_every_combination_once_and_the_metric_decides(capsys):
    """Two trials at a time give what one at a time gives."""
    best = search(f"{GRID} --metric val_acc --no-quiet")["best"]
    printed = capsys.readouterr().out
    search(f"{GRID} --jobs 2", "two")
    assert results("s") == results("two")
    assert column("trial") == [*range(6)]
    assert {*column("status")} == {"finished"}
    assert {*column("epochs")} == {8}

    # The best in all places.
    assert best["params"] == {"x": 0.3, "k": 1}
    assert f"best: trial-0004, val_acc {best['val_acc']:.2%}" in printed
    assert "toy.py --x=0.3 --k=1 --seed 42" in printed
    assert Path("runs/s/best").readlink() == Path("trial-0004")
    assert [row["trial"] for row in board()] == [*"420531"]
    assert (board()[0]["x"], board()[0]["k"]) == ("0.3", "1")


@pytest.mark.parametrize(
    ("way", "error"),
    [("raise", "k is 2"), ("torn", "k is 2"), ("die", "its process died twice")],
)
def test_trials_that_fail_end_no_search_and_they_alone_run_again(capsys, way, error):
    """--retry-failed begins them anew, whatever they have left."""
    # Every other trial fails: never two in a row.
    search(f"{GRID} --max-failures 2 --no-quiet -- --fail {way}")
    assert column("status") == ["finished", "failed"] * 3
    assert all(error in text for text in column("error")[1::2])
    printed = capsys.readouterr().out
    assert "trial 1  failed" in printed
    assert "--resume runs/s --retry-failed" in printed
    assert error in Path("runs/s/report.html").read_text()
    path = Path("runs/s/trials.jsonl")
    before = path.read_text()
    go_on()
    assert path.read_text() == before

    # When that is mended.
    change("rows = parse_arguments(argv), []", "rows = parse_arguments(argv), []; args.fail = ''")
    for name in ("run.json", "log.jsonl", "last.pt"):
        Path("runs/s/trial-0001", name).write_text("{")
    go_on("--retry-failed")
    assert {*column("status")} == {"finished"}
    assert [params["k"] for params in column("params")] == [1, 2] * 3
    kept = [line for line in before.splitlines() if '"failed"' not in line]
    assert path.read_text().splitlines()[:3] == kept


def test_words_that_look_like_numbers_are_words():
    """Not a number is not even equal to itself, so it would run for ever."""
    search("--method grid --param fail=nan,inf --count 3")
    assert column("params") == [{"fail": "nan"}, {"fail": "inf"}]


def test_trials_that_diverge_are_results():
    """They are not run again. A journal that is damaged is told."""
    search("--method grid --param x=0.1,0.6,0.2 -- --fail diverge")
    assert column("status") == ["finished", "diverged", "finished"]
    before = Path("runs/s/trials.jsonl").read_text()
    go_on("--retry-failed")
    assert Path("runs/s/trials.jsonl").read_text() == before
    assert Path("runs/s/trial-0001/run.json").exists()
    journal = Path("runs/s/study.journal")
    first, rest = journal.read_text().split("\n", 1)
    journal.write_text(f'{first}\n{{"op_co\n{rest}')
    with fails(match=r"study\.journal is damaged"):
        go_on()


def test_a_search_stops_after_so_many_failures_in_a_row():
    """The line has the last error, and how to go on."""
    with fails(match=r"3 trials in a row failed.*ValueError: k is 1.*--resume runs/s"):
        search(f"{GRID} -- --fail all")
    assert 3 <= len(lines()) < 6
    with fails():
        go_on()  # those of before do not count
    assert len(lines()) == 6

    # What finished before is reported.
    with fails(match="3 trials in a row failed"):
        search("--method grid --param k=1,2 --param x=0.1,0.2,0.3 -- --fail raise", "half")
    assert board("half")[0]["x"] == "0.3"


@pytest.mark.parametrize("way", ["die-once", "stop-once"])
def test_a_trial_whose_process_dies_or_is_stopped_goes_on_from_where_it_was(way):
    search(f"{GRID} -- --fail {way}")
    assert {*column("status")} == {"finished"}
    assert {*column("epochs")} == {8}
    went_on = [row["went_on_from"] for row in records.read_log(Path("runs/s/trial-0001"))]
    assert went_on == [0, 0, 2, 2, 2, 2, 2, 2]


def banded(name, rule, parameters):
    """How the trials of a grid end that W&B's `early_terminate` prunes."""
    config = f"{{method: grid, parameters: {{{parameters}}}, early_terminate: "
    Path("sweep.yaml").write_text(f"{config}{{type: hyperband, eta: 2, {rule}}}}}")
    search("--config sweep.yaml", name)
    return column("epochs", name)


def test_the_bands_end_what_is_not_among_the_best_by_its_best():
    """At a band the best half of those that have come there goes on."""
    # The first has nobody to fear. 0.5 is the worse of two at the first band. 0.4 is second of
    # three there, of whom two go on, and of two at the next band. 0.35 is second of two at the last
    # band of --prune.
    search("--method grid --param x=0.3,0.5,0.4,0.35 --prune --eta 2 --metric val_acc")
    assert column("epochs") == [8, 1, 2, 4]
    assert column("status") == ["finished", "pruned", "pruned", "pruned"]
    assert [row["trial"] for row in board()] == ["0", "3", "2", "1"]  # by what they survived
    rule = "max_iter: 8, s: 2"
    assert banded("config", rule, "x: {values: [0.3, 0.5, 0.4, 0.35]}") == [8, 2, 4, 8]
    search("--config sweep.yaml --no-prune", "all")
    assert column("epochs", "all") == [8, 8, 8, 8]
    # What counts is the best so far: at the band the loss of k = 1 is higher than before.
    both = "x: {values: [0.9, 0.3]}, k: {values: [3, 1]}"
    assert banded("best", "min_iter: 4", both) == [8, 8, 8, 8]


def test_a_trial_that_begins_again_is_not_judged_at_a_band_that_it_has_passed():
    """It is killed where it was the best, and the better ones have come since."""
    # Trial 0 passes band 2 alone, and is killed in epoch 4, when better ones have passed it.
    held, other = hold(trial="trial-0000-4"), hold(trial="trial-0001")
    Path("sweep.yaml").write_text(
        "{method: grid, parameters: {x: {values: [0.9, 0.3, 0.3001]}}, "
        "early_terminate: {type: hyperband, min_iter: 2, eta: 2}}"
    )
    process = start("--config sweep.yaml --jobs 2 -- --fail forget")
    log = Path("runs/s/trial-0000/log.jsonl")
    until(lambda: log.exists() and len(log.read_text().splitlines()) == 3)
    other.unlink()
    until(lambda: len(lines()) == 2)
    process.process.kill()
    process.process.join()
    held.unlink()
    go_on()
    assert lines()[0]["epochs"] == 4  # and not 2: it ends at the next band


def test_several_seeds_have_a_row_and_their_mean_decides(capsys):
    """The row of a configuration has the mean of its seeds, with an interval."""
    # One seed of k = 2 is the best of all.
    change("+ spike", "+ spike - (args.k == 2 and args.seed == 43) / 5")
    search("--method grid --param k=1,2 --seeds 3 --jobs 2 --no-quiet")
    assert "toy.py --k=1 --seed 44" in capsys.readouterr().out  # the run that `best` is
    assert column("seed") == [42, 43, 44] * 2
    first, second = board()
    mean = 0.09 + 0.1 + 1 / 8 - 0.043
    assert (first["k"], second["k"], first["run"]) == ("1", "2", "trial-0002")
    assert float(first["mean"]) == pytest.approx(mean)
    assert float(first["val_loss"]) == pytest.approx(mean - 0.001)  # of the run that is named
    assert float(first["high"]) - mean == pytest.approx(4.3027 * 0.001 / math.sqrt(3), rel=1e-3)
    assert float(first["seconds"]) == pytest.approx(0.3)

    # A configuration one of whose seeds has no result has none.
    change("args.x > 0.5", "args.x == 0.3 and args.seed == 42")
    best = search("--method grid --param x=0.3,0.1 --seeds 2 -- --fail=diverge", "nan")["best"]
    assert best["params"] == {"x": 0.1}
    with fails(match="no configuration with all its seeds finished.*the loss became nan"):
        search("--method grid --param x=0.3 --seeds 2 -- --fail=diverge", "none")
    assert board("none")[0]["mean"] == "inf"


def test_a_bayesian_search_learns_avoids_divergence_and_follows_from_its_seed():
    search(f"{BAYES} --count 6 -- --fail diverge")
    go_on("--count 12")
    search(f"{BAYES} --count 12 --metric val_acc -- --fail diverge", "twin")
    search(f"{BAYES} --count 1 --seed 1", "other")
    assert len({*map(str, column("params"))}) == len(lines()) == 12
    losses = column("val_loss")[5:]
    assert sum(loss is not None and loss < 0.28 for loss in losses) >= 3
    assert losses.count(None) <= 3
    assert "diverged" in column("status")
    # The accuracy falls as the loss rises.
    assert column("params") == column("params", "twin")
    assert column("params", "other")[0] != column("params")[0]


IDLE = """    if "--k=1" in argv and any(word.startswith("--x=") for word in argv):
        parser.error("--x has no effect beside --k 1")
    return parser.parse_args(argv)
"""


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_a_search_whose_configurations_are_used_up_ends_and_draws_them(method, drawn):
    """A parameter without effect in some of them makes them fewer, also where more are asked for
    later."""
    change("    return parser.parse_args(argv)\n", IDLE)
    search(f"--method {method} --param k=1,2 --param x=0.1,0.2 --count 1")
    go_on("--count 4 --jobs 2")
    params = [{"k": 1}, {"k": 2, "x": 0.1}, {"k": 2, "x": 0.2}]
    assert sorted(column("params"), key=str) == params
    if method == "grid":
        *_, cells = (axis.texts for figure in drawn for axis in figure.axes if axis.images)
        assert len(cells) == 6


@pytest.mark.parametrize("method", ["grid", "random"])
def test_values_that_the_script_refuses_together_fail_their_trial_alone(method):
    """Also where another parameter is without effect in some trials, so that the script is asked
    about each before it runs."""
    refusal = """    if {"--k=2", "--x=0.2"} <= {*argv}:
        parser.error("too much")
"""
    change("    return parser.parse_args(argv)\n", refusal + IDLE)
    search(f"--method {method} --param k=1,2 --param x=0.1,0.2 --count 3 --jobs 2")
    assert sorted(column("status")) == ["failed", "finished", "finished"]
    assert "the script ended with exit status 2" in column("error")


def test_a_search_of_another_seed_or_of_more_trials_is_refused_and_more_may_follow():
    argv = "--method bayes --param k=1,2,3 --seed 4294967296"
    search(f"{argv} --count 2")
    with refused(match="--count 1: the search has 2"):
        go_on("--count 1")
    with refused(match="its seed is 4294967296"):
        search("--method bayes --param k=1,2,3 --count 2")
    search(f"{argv} --count 3 --jobs 2")
    assert len(lines()) == 3


@pytest.mark.parametrize("target", ["--target 0.3", "--metric val_acc --target 0.75"])
def test_a_target_ends_the_search(target):
    """No trial begins after one that is good enough."""
    result = search(f"--method grid --param x=0.9,0.3,0.8,0.7,0.6 {target}")
    assert result["status"] == "finished"
    assert lines()[1]["val_loss"] < 0.3
    assert 2 <= len(lines()) < 5


def test_the_gpus_are_dealt_out_in_turn_and_the_threads_divided(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-7")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    search("--method random --param x=0.0..1.0 --count 6 --jobs 4 -- --fail wait")
    expected = {"gpu-0-2", "gpu-1-2", "gpu-GPU-7-2"}
    assert {path.name for path in Path().glob("gpu-*")} == expected
    Path("gpu-0-2").unlink()
    go_on("--count 7")  # with as many threads as before
    assert {path.name for path in Path().glob("gpu-*")} == expected


# ---------------- Scripts of one's own ----------------
ODD = """
from __future__ import annotations
import dataclasses
import optuna
import other

@dataclasses.dataclass
class Settings:
    x: int

def main(argv, on_epoch):
    answer = other.ANSWERS[int(argv[0][-1])]
    if answer == "pruned":
        raise optuna.TrialPruned
    return answer
"""
ANSWERS = """
ANSWERS = [
    None,
    {"status": "failed"},
    "pruned",
    {"status": "finished", "best": None, "epochs": 1},
    {"status": "finished", "best": {"val_loss": float("nan")}, "epochs": 1},
    {"status": "finished", "best": {"val_loss": 1.0}, "epochs": None},
]
"""


def test_what_a_script_gives_that_is_no_record_is_a_failed_trial():
    """A script may import what lies beside it, and its main may return anything."""
    Path("odd.py").write_text(ODD)
    Path("other.py").write_text(ANSWERS)
    search("--method grid --param k=0,1,2,3,4,5 --max-failures 9", script="odd.py")
    assert column("status") == ["failed"] * 5 + ["finished"]
    assert all("record" in error for error in column("error")[:5])
    search("--method grid --param k=5", "one", script="odd.py")
    assert column("epochs", "one") == [0]


STUBS = """
import argparse
def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=float)
    parser.set_defaults(epochs=3)
    return parser.parse_known_args(argv)[0]
def train_and_validate(args):
    return args.x, 1 - args.x
"""


def test_the_script_in_the_docs_can_be_searched():
    docs = (records.HERE / "docs" / "searches.md").read_text()
    Path("mine.py").write_text(STUBS + docs.split("```python")[1].split("```")[0])
    best = search("--method grid --param x=0.2,0.1,0.3", script="mine.py")["best"]
    assert best["params"] == {"x": 0.1}
    assert column("epochs") == [3, 3, 3]


OWN = """
import json, os, pathlib, sys
import numpy as np
import common, evaluate

assert hasattr(common, "ArgumentParser") and hasattr(evaluate, "main")

def main(argv, on_epoch=None):
    flags = dict(word.split("=", 1) for word in argv if "=" in word)
    directory = pathlib.Path(argv[argv.index("--runs-dir") + 1], argv[argv.index("--run-name") + 1])
    directory.mkdir(exist_ok=True)
    x = float(flags["--loss"])
    if x == 0.2 and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        (directory / "run.json").write_text(json.dumps({"status": "finished"}))
        os.kill(os.getpid(), 9)
    for epoch in (1, 2):
        row = {"epoch": np.int64(epoch), "val_accuracy": np.float32(x * epoch)}
        on_epoch(row)
    best = {"val_accuracy": np.float32(x)}
    return {"status": "finished", "best": best, "epochs": np.int64(2), "error": None}
"""


def test_a_script_of_ones_own_with_a_metric_of_its_own(drawn):
    """It imports our common.py, not its neighbour, reports numpy's numbers, and may be killed."""
    for name in ("common.py", "evaluate.py"):
        Path(name).write_text("raise SystemExit(name)")
    Path("own.py").write_text(OWN)
    Path("own.yaml").write_text(
        "{method: grid, metric: {name: val_accuracy, goal: maximize},"
        " parameters: {loss: {values: [0.1, 0.2, 0.3]}, k: {value: 1}}}"
    )
    best = search("--config own.yaml", script="own.py")["best"]
    assert best["params"] == {"loss": 0.3, "k": 1}
    assert Path("killed").exists()
    assert column("status") == ["finished"] * 3
    assert column("val_accuracy") == pytest.approx([0.1, 0.2, 0.3])
    assert "val_accuracy" in board()[0]

    # The curves are what the script has reported.
    (curves,) = (axis for figure in drawn for axis in figure.axes if axis.get_xlabel() == "epoch")
    assert [len(line.get_xdata()) for line in curves.lines] == [2, 2, 2]


# ---------------- Processes that die, and files ----------------
@pytest.mark.parametrize(
    "argv", [f"{GRID},3,4 --jobs 2", f"{BAYES} --count 9"], ids=["grid", "bayes"]
)
def test_killed_again_and_again_a_search_ends_as_an_undisturbed_one(argv):
    search(argv, "whole")
    moments = random.Random(0)
    for _ in range(4):
        ended, process = len(lines()), start(argv)
        until(lambda: not process.process.is_alive() or len(lines()) > ended)  # noqa: B023
        time.sleep(moments.uniform(0, 0.2))
        process.process.kill()
        process.process.join()
        with open("runs/s/study.journal", "a") as file:
            file.write('{"op_code": 5, "wor')
    go_on()
    assert results("s") == results("whole")
    assert column("trial") == [*range(len(lines()))]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_trials_and_the_search_says_how_to_go_on(number, status, capsys):
    held = hold(trial="trial-0001")
    process = start(f"{GRID} --no-quiet")
    until(Path("runs/s/trial-0001/run.json").exists)
    until(lambda: "trial 0  finished" in Path("out").read_text())
    with fails(match="in use"):
        go_on()
    os.kill(process.process.pid, number)
    code, error = process.finish()
    assert code == status
    assert "sweep.py --resume runs/s" in error
    assert error.count("\n") == 1

    # There is a best trial, but no winner to be tested yet.
    assert column("trial") == [0]
    assert Path("runs/s/best").is_symlink()
    assert "tested" not in Path("out").read_text()
    held.unlink()
    go_on(quiet="")
    assert "tested" in capsys.readouterr().out
    assert column("trial") == [*range(6)]


def test_lines_come_in_the_order_of_their_ends_and_the_bar_shows_the_best():
    held = hold(trial="trial-0000")
    terminal = "import sys; sys.stderr.isatty = lambda: True"
    process = start(f"{GRID} --jobs 2 --no-quiet", terminal)
    until(lambda: Path("err").exists() and "5 of 6 trials, epoch 0" in Path("err").read_text())
    best, path = min(column("val_loss")), Path("runs/s/trials.jsonl")
    with path.open() as file:
        held.unlink()
        status, bar = process.finish()
        assert len(file.readlines()) == 5  # the file is replaced, and not written into
    assert status == 0
    assert f"5 of 6 trials, epoch 0 of 8, best {best:.4f}" in bar
    order = [row["trial"] for row in records.read_json(path, lines=True)]
    assert order == [1, 2, 3, 4, 5, 0]


def test_nothing_is_written_to_the_journal_while_another_process_has_its_lock():
    held = hold()
    process = start("--method grid --param k=1")
    until(Path("runs/s/trial-0000/run.json").exists)
    journal = Path("runs/s/study.journal")
    with records.locked(journal, wait=True):
        before = journal.read_bytes()
        held.unlink()
        until(Path("runs/s/trial-0000/log.jsonl").exists)
        time.sleep(1)  # it would be written at once
        assert journal.read_bytes() == before
    assert process.finish() == (0, "")
    assert journal.read_bytes() != before
    assert column("epochs") == [8]


def test_a_search_that_never_began_and_a_system_without_locks_are_one_line(monkeypatch):
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/study.journal").touch()  # killed here
    with refused(match="stopped before it began"):
        go_on()
    search("--method grid --param k=1")
    assert column("trial") == [0]
    monkeypatch.setattr(records, "fcntl", None)  # as on Windows
    with refused(match="WSL"):
        go_on()


def test_a_directory_holds_one_search_and_never_another():
    """What was asked for once is not changed later; a search that has moved goes on there."""
    change("return parser", "parser.add_argument('--dataset'); return parser")
    search("--method grid --param k=1 -- --dataset mnist")
    Path("runs/run").mkdir()
    other = "--dataset cifar10"
    Path("runs/run/run.json").touch()
    new = f"--script toy.py {GRID} --runs-dir runs --name"
    for argv, expected in (
        (f"{new} s", "runs/s is another search: its "),
        (f"{new} run", "runs/run exists, and is no sweep"),
        ("--resume runs/s --param x=1,2", "leave out --param"),
        ("--resume runs/s -- --x=1", "leave out --x=1"),
        ("--resume runs/s -- elsewhere", "leave out elsewhere"),
        (
            f"--script toy.py --method grid --param k=1 --runs-dir runs --name s -- {other}",
            "another search, with",
        ),
        ("--resume runs", "no study.journal"),
        ("--resume none", "none: there is no such directory"),
    ):
        with refused(match=expected):
            sweep.main(argv.split())
    shutil.move("runs/s", "moved")
    go_on(place="moved")
    assert column("run", "moved", ".") == ["trial-0000"]


# ------------------------ Many machines, each a process with its own runs ------------------------
@pytest.fixture(scope="module")
def postgresql():
    """A PostgreSQL server: its URL, and what stops and starts it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (requirements-dev.txt)")
    places = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))), os.environ["PATH"]]
    program = shutil.which("pg_ctl", path=os.pathsep.join(places))
    if not program:
        pytest.skip("no PostgreSQL server is installed (Debian: postgresql)")
    # Another user can reach this directory, and the name of a socket in it is short enough.
    directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    shutil.chown(directory, user or os.geteuid())

    def pg_ctl(*arguments):
        command = [program, "-D", directory / "data", "-w", *arguments]
        subprocess.run(command, check=True, user=user, cwd=directory, stdout=subprocess.DEVNULL)

    options = f"-k {directory} -c listen_addresses="
    begin = "start", "-o", options, "-l", directory / "log"
    stop = "stop", "-m", "immediate"
    pg_ctl("init", "-o", "--auth=trust --username=sweep")
    pg_ctl(*begin)
    yield (
        f"postgresql://sweep@/postgres?host={directory}",
        lambda: pg_ctl(*stop),
        lambda: pg_ctl(*begin),
    )
    pg_ctl(*stop)
    shutil.rmtree(directory)


@pytest.mark.developers
def test_machines_share_a_search_though_some_die_or_are_told_to_stop_and_one_joins_again(
    postgresql,
):
    # In so small a space machines are proposed the same at once: still, nothing runs twice.
    url, stop, begin = postgresql
    space = f"--method bayes --param x=0.1,0.2,0.3 --param k=1,2,3,4 --storage {url} --grace 10"
    held = {name: hold(name) for name in "abc"}
    a, b, c = (
        Forked("sweep", *asked(space, "shared", place=name), before=UNDRAWN, err=f"err-{name}")
        for name in "abc"
    )
    until(lambda: all(any(Path(name, "shared").glob("trial-*/run.json")) for name in "abc"))
    held["c"].unlink()
    until(lambda: lines("shared", "c"))
    os.kill(c.process.pid, signal.SIGINT)
    assert c.finish()[0] == 130
    b.process.kill()
    stop()  # and the database is away for a while
    held["a"].unlink()
    time.sleep(3)
    begin()
    assert a.finish() == (0, "")
    with refused(match="give its --storage again"):
        go_on(place="c/shared")
    go_on(f"--storage {url}", "c/shared")
    for name, other in ("ac", "ca"):
        place = "shared", name
        assert column("trial", *place) == [*range(12)]
        assert len({*map(str, column("params", *place))}) == 12
        assert {*column("status", *place)} == {"finished"}
        for run in column("run", *place):
            is_here = Path(name, "shared", run).exists()
            assert is_here or f"/{other}/shared/trial-" in run

    # A search of that name is there, and is not to be mixed with another.
    with refused(match="is another search"):
        search(f"--method grid --param x=0.1 --storage {url}", "shared")


@pytest.mark.developers
def test_what_is_said_of_a_database_has_no_password(postgresql):
    with fails(match=r"postgresql://u:\*\*\*@127.0.0.1:1/d: .*refused"):
        search(f"{GRID} --storage postgresql://u:secret@127.0.0.1:1/d")
    assert not Path("runs").exists()
    url = postgresql[0].replace("sweep@", "sweep:secret@")
    with fails(match=r"--storage .*sweep:\*\*\*@") as told:
        search(f"{GRID} --storage {url} -- --fail all")
    assert "secret" not in str(told.value)


# ---------------- Real trainings ----------------
FEW = """
import forked, train_mnist
from train_mnist import *
train_mnist.synthetic = synthetic = forked.few_digits
"""
SYNTHETIC = "--dataset=synthetic --model=dense"


def test_a_real_search_with_its_report_reads_the_test_set_for_the_winner_alone(few_images, capsys):
    argv = "--method random --param lr=log:1e-3..1e-1 --param l1=16,64 --param d1=0.0..0.5"
    argv += f" --count 9 --jobs 2 --name s --runs-dir runs -- {SYNTHETIC} --epochs 2"
    process = Forked("sweep", *argv.split(), before=FAST)
    assert process.finish()[0] == 0, Path("err").read_text()
    winner, printed = board()[0], Path("out").read_text()
    assert f"best: {winner['run']}" in printed and "on the test set, read once" in printed
    tested = [path.parent.name for path in Path("runs/s").glob("trial-*/metrics.json")]
    assert tested == [winner["run"]]
    for line in lines():
        record = records.read_record(Path("runs/s", line["run"]))
        assert record["test"] is None and record["best"]["val_loss"] == line["val_loss"]
    drawings = {path.stem for path in Path("runs/s").glob("*.png")}
    assert drawings >= {"curves", "parallel", "slices", "importance"}
    page = Path("runs/s/report.html").read_text()
    assert page.count("data:image/png;base64,") == len(drawings)
    for text in (*column("run"), "lr=log:1e-3..1e-1", "read once", "9 trials", "--model=dense"):
        assert text in page
    assert f">{records.HERE}" not in page  # it goes on when the repository has moved
    assert ">train_mnist.py<" in page
    # Another winner later: the report says that the test set has been read before.
    other = board()[1]["run"]
    shutil.move(f"runs/s/{winner['run']}/metrics.json", f"runs/s/{other}/metrics.json")
    go_on(quiet="")
    assert f"which was read before, for {other}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [GRID, f"{BAYES} --count 10"], ids=["grid", "bayes"])
def test_one_exploded_trial_flattens_no_picture(argv, drawn):
    change("+ 1 / epoch", "+ 1 / epoch + (1e9 if args.x == 0.2 or args.x > 0.9 else 0)")
    search(argv)
    axes = [axis for figure in drawn for axis in figure.axes]
    assert axes and max(column("val_loss")) > 1e8
    assert max(abs(limit) for axis in axes for limit in axis.get_ylim()) < 100
    for axis in axes:
        if axis.images:
            texts = {text.get_position(): text.get_text() for text in axis.texts}
            assert texts[0, 2] == f"{lines()[4]['val_loss']:.4f}"
            assert float(texts[0, 1]) > 1e8  # its colour is cut off, and not its number


DYING = f"""{FEW}
import os, records
write_results = records.Run.write_results
def dying(self, parts):
    is_there = self.record["name"] == "trial-0001" and len(self.history) == 2
    if is_there and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), 9)
    write_results(self, parts)
records.Run.write_results = dying
"""


def test_an_epoch_that_was_saved_but_not_logged_is_judged():
    for name, code in (("whole", FEW), ("dying", DYING)):
        Path(f"{name}.py").write_text(code)
        argv = "--method grid --param lr=0.01,0.0000001 --prune --threads 1 --"
        search(f"{argv} {SYNTHETIC} --l1=8 --epochs=6", name, f"{name}.py")
    assert Path("died").exists() and results("whole") == results("dying")
    assert (column("status", "whole")[1], column("epochs", "whole")[1]) == ("pruned", 2)


TOLD = f"""import ctypes, gc
{MEMORY_IN_USE}{FEW}
def main(argv, on_epoch=None):
    with open("memory", "a") as file:
        print(memory_in_use(), file=file)
    return train_mnist.main(argv, on_epoch)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
def test_the_memory_of_a_worker_does_not_grow():
    Path("told.py").write_text(TOLD)
    argv = "--method random --param lr=log:0.001..0.1 --count 14 --threads 1 --"
    search(f"{argv} {SYNTHETIC} --l1=4 --epochs=1", script="told.py")
    sizes = [int(line) for line in Path("memory").read_text().splitlines()]
    assert len(sizes) == 14 and sizes[-1] - sizes[4] < 1.5e6
