"""Searches: the space, running, killing, pruning, failures, many machines, and the report."""

import collections
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records
import sweep

import optuna
import pytest
import undrawn
from forked import Forked
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

# A script of the user's own: a metric that follows from its parameters, and ways to fail. It takes so little time that
# what is tested is the sweep. Before each epoch it waits while there is a file hold-<its name> or hold-all beside the
# sweep's directory.
TOY = """
import argparse, json, os, pathlib, signal, time
import common, records

def parse_arguments(argv):
    parser = common.ArgumentParser(prog="toy.py")
    for name, kind, default in (("x", float, 0.0), ("lr", float, 0.1), ("k", int, 1), ("seed", int, 0),
                                ("epochs", int, 8), ("run-name", str, ""), ("fail", str, "")):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("--resume", "--runs-dir"):
        parser.add_argument(name, type=pathlib.Path)
    for name in ("--test", "--quiet", "--flip"):
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
    record = {"args": {key: getattr(args, key) for key in ("x", "k", "lr", "epochs", "seed", "fail")}}
    records.write_json(directory / "run.json", record)
    for epoch in range(before + 1, args.epochs + 1):
        while any((directory.parent.parent / f"hold-{name}").exists() for name in ("all", directory.name)):
            time.sleep(0.01)
        if args.fail == "torn" and args.k == 2:
            (directory / "run.json").write_text("{")
        if args.fail == "all" or args.fail in ("raise", "torn") and args.k == 2:
            raise ValueError(f"k is {args.k}")
        if args.k == 2 and (args.fail == "die" or args.fail.endswith("once") and before == 0 and epoch == 3):
            os.kill(os.getpid(), signal.SIGTERM if args.fail == "stop once" else signal.SIGKILL)
        if args.fail == "diverge" and args.x > 0.5:
            status, error = "diverged", "the loss became nan"
            break
        spike = 1 if args.k == 1 and epoch == 4 else 0
        loss = (args.x - 0.3) ** 2 + args.k / 10 + 1 / epoch - args.seed / 1000 + spike
        rows.append({"epoch": epoch, "val_loss": loss, "val_acc": 1 / (1 + loss), "went_on_from": before})
        log = "".join(json.dumps(row) + chr(10) for row in rows)
        records.write_atomically(directory / "log.jsonl", log.encode())
        (directory / "last.pt").touch()
        if on_epoch(rows[-1]):
            status = "pruned"
            break
    best = min(rows, key=lambda row: row["val_loss"]) if rows else None
    record |= {"status": status, "error": error, "best": best, "epochs": len(rows), "seconds": 0.1}
    records.write_json(directory / "run.json", record)
    return record
"""
GRID = ["--method", "grid", "--param", "x=0.1,0.2,0.3", "--param", "k=1,2"]
BAYES = ["--method", "bayes", "--param", "x=0.0..1.0", "--param", "k=1,2,3"]


@pytest.fixture(autouse=True)
def nothing_is_left_for_the_next_test(monkeypatch):
    monkeypatch.setattr("sys.path", [*os.sys.path])  # a sweep adds the place of its script
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever account this user has


@pytest.fixture
def toy(tmp_path, monkeypatch):
    undrawn.nothing_is_drawn(monkeypatch.setattr)
    (tmp_path / "toy.py").write_text(TOY)
    return ["--script", "toy.py", "--runs-dir", "runs", "--quiet", "--name", "s"]


def lines(directory="runs", name="s"):
    """The lines of trials.jsonl, by trial."""
    rows = [
        json.loads(line) for line in Path(directory, name, "trials.jsonl").read_text().splitlines()
    ]
    assert len({row["trial"] for row in rows}) == len(rows)
    return dict(sorted((row["trial"], row) for row in rows))


def results(name):
    """What the trials of a sweep gave."""
    keys = ("params", "status", "val_loss", "val_acc", "epochs", "error")
    return {trial: [row[key] for key in keys] for trial, row in lines(name=name).items()}


def until(condition):
    """Wait for it, some minutes at most."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def hold(*runs_dirs, trial="all"):
    """Have the trials there wait until the files that are returned are unlinked."""
    files = [Path(path, f"hold-{trial}") for path in runs_dirs]
    for file in files:
        file.parent.mkdir()
        file.touch()
    return files


def start(*argv, name="sweep"):
    """sweep.py in a process of its own, which prints into `name`.out and .err, and draws nothing."""
    undrawn = "import undrawn; undrawn.nothing_is_drawn()"
    return Forked("sweep", *argv, before=undrawn, out=f"{name}.out", err=f"{name}.err")


def refused(capsys, *argv):
    """The one line with which a search is refused before anything is made, or run."""
    dry = [] if "--storage" in argv else ["--dry-run"]
    try:
        sweep.main(["--runs-dir", "refused", *dry, *argv])
        raise AssertionError("it was not refused")
    except records.UsageError as error:
        text = " ".join(str(error).split())  # as the program prints it
    except SystemExit as error:
        text = capsys.readouterr().err.strip()
        assert error.code == 2
    assert len(text.splitlines()) == 1 and not Path("refused").exists()
    return text


# ---------------- The space ----------------


def planned(capsys, *argv):
    """The parameters of the trials that a search would run."""
    sweep.main([*argv, "--dry-run"])
    found = [
        line.split("toy.py ")[1].split(" --seed")[0]
        for line in capsys.readouterr().out.splitlines()
    ]
    return [
        dict((word.lstrip("-") + "=").split("=")[:2] for word in line.split()) for line in found
    ]


def values(capsys, entry, count=1, method="random"):
    """Values that are drawn for the parameter x, with this entry in a W&B config."""
    config = {"program": "toy.py", "method": method, "parameters": {"x": entry}, "run_cap": count}
    Path("sweep.json").write_text(json.dumps(config))
    return [float(params["x"]) for params in planned(capsys, "--config", "sweep.json")]


def test_every_distribution_draws_in_its_range_on_its_steps_and_as_it_should(toy, capsys):
    steps = {"min": 0, "max": 0.3, "q": 0.1, "distribution": "q_uniform"}
    assert (
        values(capsys, steps, 99, "grid") == [0, 0.1, 0.2, 0.3] == sorted(values(capsys, steps, 9))
    )
    assert values(
        capsys, {"min": 1, "max": 60, "q": 8, "distribution": "q_uniform"}, 99, "grid"
    ) == [*range(8, 57, 8)]
    assert values(capsys, {"value": "1e-4"}) == [1e-4]
    assert sorted(values(capsys, {"values": [1, "2e-3"]}, 2)) == [2e-3, 1]
    assert sorted(values(capsys, {"min": 3, "max": 6}, 9)) == [3, 4, 5, 6]
    log = {"min": "1e-4", "max": 0.1, "distribution": "log_uniform_values"}
    for entry in (log, {"min": -9.2103, "max": -2.3026, "distribution": "log_uniform"}):
        drawn = values(capsys, entry, 300)
        assert (
            min(drawn) >= 1e-4
            and max(drawn) <= 0.1
            and abs(sum(value < 1e-3 for value in drawn) - 100) < 30
        )
    drawn = values(
        capsys, {"min": 8, "max": 256, "q": 8, "distribution": "q_log_uniform_values"}, 25
    )
    assert all(value % 8 == 0 for value in drawn) and len(set(drawn)) == 25 and min(drawn) == 8
    flat = values(capsys, {"min": 0, "max": 1.0}, 300)
    assert min(flat) >= 0 and max(flat) <= 1 and abs(sum(value < 0.5 for value in flat) - 150) < 40


def test_parameters_of_the_command_line(toy, capsys):
    argv = ["--method", "random", "--script", "toy.py", "--count", "40"]
    for parameter in ("x=0.0..0.5", "k=int:4..64", "lr=log:1e-4..1e-1", "flip=true,false"):
        argv += ["--param", parameter]
    found = planned(capsys, *argv)
    assert found == planned(capsys, *argv) != planned(capsys, *argv, "--seed", "1")
    assert (
        planned(capsys, *argv, "--count", "5") == found[:5]
        and len({str(params) for params in found}) == 40
    )
    assert all(
        0 <= float(p["x"]) <= 0.5 and 4 <= int(p["k"]) <= 64 and 1e-4 <= float(p["lr"]) <= 0.1
        for p in found
    )
    assert (
        {"flip" in params for params in found}
        == {"no-flip" in params for params in found}
        == {True, False}
    )
    small = planned(capsys, "--method", "random", "--script", "toy.py", "--param", "k=1,2,3")
    assert sorted(params["k"] for params in small) == ["1", "2", "3"]


def test_the_tutorials_searches_are_the_defaults(capsys):
    sweep.main(["--method", "grid", "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 8
        and "--c1=48 --c2=96 --l1=256" in printed[0]
        and "--c1=96 --c2=192 --l1=512" in printed[7]
    )
    assert all("--epochs 10 --lr 0.001 --batch-size 512 --tolerance 3" in line for line in printed)
    sweep.main(["--method", "bayes", "--dry-run"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("20 trials", "train_mnist.py", "lr", "batch_size"))


CONFIG = """
program: train_cifar.py
method: random
name: from-a-file
metric: {name: val_acc, goal: maximize}
run_cap: 4
command: ["${env}", "${interpreter}", "${program}", "--epochs", 3, "${args}"]
parameters:
  lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}
  model: {value: confignet}
  width:
    parameters:
      c1: {values: [24, 48]}
      c2: {min: 48, max: 96}
"""


def test_a_file_in_wandbs_schema_works_unchanged(capsys):
    Path("sweep.yaml").write_text(CONFIG)
    sweep.main(["--config", "sweep.yaml", "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    for line in printed:
        assert all(
            text in line
            for text in ("train_cifar.py --epochs 3 --lr=", "--model=confignet --c1=", "--c2=")
        )


WRONG_CONFIGS = {
    ("method: random", "method: anneal"): "anneal",
    ("run_cap: 4", "run_cups: 4"): "unknown key run_cups",
    ("run_cap: 4", "run_cap: 0"): "--count: expected",
    ("program: train_cifar.py", "program: gone.py"): "gone.py: there is no such Python file",
    ("log_uniform_values", "inv_log_uniform"): "the distribution inv_log_uniform is not supported",
    ("{value: confignet}", "{distribution: normal, mu: 0, sigma: 1}"): "the distribution normal",
    ("name: val_acc, goal: maximize", "name: f1"): "f1",
    ("goal: maximize", "goal: minimize"): "goal minimize",
    ("{name: val_acc, goal: maximize}", "{goal: maximize}"): "a name and a goal",
    ("min: 48", "min: 480"): "not below",
    ("${env}", "${args_json}"): "args_json} is not supported",
    ("c1:", "lr:"): "there twice",
    ("[24, 48]", "[]"): "values must be a list of",
    ("values: [24, 48]", "value: [24"): "sweep.yaml: it cannot be read",
    ("--epochs", "--run-name"): "--run-name is set by the sweep",
    ("run_cap: 4", "early_terminate: {type: median}"): "the only type is hyperband",
    ("run_cap: 4", "early_terminate: {type: hyperband}"): "min_iter, or max_iter with s",
    (
        "run_cap: 4",
        "early_terminate: {type: hyperband, min_iter: 0}",
    ): "min_iter: 0 is not supported",
    (
        "run_cap: 4",
        "early_terminate: {type: hyperband, min_iter: 1, strict: 1}",
    ): "strict: 1 is not supported",
    ("min: 48", "mon: 48"): "has min max, not",
    ("c1:", "depth:"): "--depth",
    ("from-a-file", "a/b"): "slashes",
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_a_config_that_is_wrong_is_refused_in_one_line(change, capsys):
    assert change[0] in CONFIG
    Path("sweep.yaml").write_text(CONFIG.replace(*change))
    assert WRONG_CONFIGS[change] in refused(capsys, "--config", "sweep.yaml")


WRONG_SEARCHES = {
    "": "--method",
    "--method grid --param lr=0.1..0.2": "needs a list of values",
    "--method random --param c1": "NAME=VALUE",
    "--method random --param =3": "NAME=VALUE",
    "--method random --param c1=48,48": "48 is there twice",
    "--method random --param c1=48,": "a value is empty",
    "--method random --param lr=0.1..0.01": "not below",
    "--method random --param lr=log:0..1": "above 0",
    "--method random --param lr=log:1,2": "LOW..HIGH",
    "--method random --param l1=int:1.5..3": "whole numbers",
    "--method random --param lr=a..b": "finite numbers",
    "--method random --param lr=1..2..3": "numbers",
    "--method random --param lr=nan..1": "finite",
    "--method random --param lr=1e-4 --param lr=1": "there twice",
    "--method random --param label_smoothing=0.0..0.2": "--metric val_acc",
    "--method random --param val_size=0.1,0.2": "--metric val_acc",
    "--method grid --script train_mnist.py": "needs its own search",
    "--method grid --prune --seeds 2": "pruning and",
    "--method grid --prune -- --epochs=2": "at least --eta 3",
    "--method grid --prune --param epochs=5,10": "one number of epochs",
    "--method grid --script notes.txt --param c1=1": "no such Python file",
    "--method grid --storage sqlite:///x": "--storage needs --name",
    "--method random --param lr=1.0..1.00001": "too narrow",
    "--method grid --storage nothing://u:p@secret@h/d --name s": "Can't load plugin",
    "--method random --metric f1": "val_loss, val_acc",
    "--method grid --param c9=1,2": "--c9",
    "--method grid --param c1=48,-3": "--c1",
    "--method bayes --param d1=0.5..2": "--d1",
    "--method random -- --no-test": "--no-test is set by the sweep",
}


@pytest.mark.parametrize("argv", WRONG_SEARCHES)
def test_a_search_that_is_wrong_is_refused(argv, capsys):
    text = refused(capsys, *argv.split())
    assert WRONG_SEARCHES[argv].replace("'", "") in text.replace("'", "") and "secret" not in text


def test_a_driver_that_is_not_installed_is_named_with_the_command_that_installs_it(
    capsys, monkeypatch
):
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    text = refused(
        capsys, "--method", "grid", "--name", "s", "--storage", "postgresql://u:secret@h/d"
    )
    assert 'pip install "sqlalchemy>=2.1" "psycopg[binary]"' in text and "secret" not in text


def test_a_script_that_cannot_be_used_and_data_that_are_missing_are_one_line(capsys, monkeypatch):
    argv = ["--method", "grid", "--param", "k=1", "--script"]
    for number, (content, expected) in enumerate(
        (
            ("def main(:", "SyntaxError"),
            ("x = 1\ny = x.z\n", "line 2: AttributeError"),
            ("raise SystemExit(3)", "line 1: SystemExit: 3"),
            ("def run(): ...", "no function main(argv, on_epoch=None)"),
        )
    ):
        Path(f"mine{number}.py").write_text(content)
        text = refused(capsys, *argv, f"mine{number}.py")
        assert expected in text and f"mine{number}.py" in text
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(records.UsageError, match="could not be downloaded"):
        sweep.main(["--method", "random", "--runs-dir", "refused", "--", "--data-dir", "none"])
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    "text", ["2001-99-99", "!!bool x", "!!timestamp x", "0x_", "[" * 5000, "a: &a [*a]"]
)
def test_what_yaml_itself_stumbles_over(text, capsys):
    Path("sweep.yaml").write_text(text)
    assert refused(capsys, "--config", "sweep.yaml")


# ---------------- Running ----------------


def test_a_grid_runs_every_combination_once_whatever_the_number_of_jobs(toy):
    for jobs in ("1", "2"):
        sweep.main([*toy[:-1], jobs, *GRID, "--jobs", jobs])
    assert results("1") == results("2") and list(lines(name="2")) == [*range(6)]
    assert len({str(row["params"]) for row in lines(name="2").values()}) == 6
    assert {(row["status"], row["epochs"]) for row in lines(name="2").values()} == {("finished", 8)}
    best = json.loads(Path("runs/2/best/run.json").read_text())
    assert (best["args"]["x"], best["args"]["k"]) == (0.3, 1)


def test_the_metric_decides_and_orders_the_leaderboard(toy, capsys):
    result = sweep.main(
        [*[word for word in toy if word != "--quiet"], *GRID, "--metric", "val_acc"]
    )
    printed, best = capsys.readouterr().out, result["best"]
    assert best["params"] == {"x": 0.3, "k": 1} and best["val_acc"] == max(
        row["val_acc"] for row in lines().values()
    )
    assert (
        f"best: trial-0004, val_acc {best['val_acc']:.2%}" in printed
        and "toy.py --x=0.3 --k=1 --seed 42" in printed
    )
    board = Path("runs/s/leaderboard.csv").read_text().splitlines()
    assert board[0].startswith("trial,run,status,val_loss,val_acc,epochs,seconds,x,k")
    assert board[1].startswith("4,trial-0004,")
    accuracies = [float(row.split(",")[4]) for row in board[1:]]
    assert accuracies == sorted(accuracies, reverse=True) and len(accuracies) == 6


def test_a_trial_that_fails_is_recorded_and_does_not_end_the_sweep(toy):
    raises = "ValueError: k is 2"
    for way, error in (
        ("raise", raises),
        ("torn", raises),
        ("die", "its process died twice"),
    ):
        name = [*toy[:-1], way]
        sweep.main([*name, *GRID, "--jobs", "2", "--max-failures", "9", "--", "--fail", way])
        rows = lines(name=way)
        assert [rows[trial]["status"] for trial in range(6)] == ["finished", "failed"] * 3
        assert all(
            (error in row["error"]) if trial % 2 else not row["error"]
            for trial, row in rows.items()
        )
    # Nothing is left to do. With --retry-failed the failed ones run once more, and only those.
    before = Path("runs/raise/trials.jsonl").read_bytes()
    sweep.main(["--resume", "runs/raise", "--quiet"])
    assert Path("runs/raise/trials.jsonl").read_bytes() == before
    Path("toy.py").write_text(TOY.replace('args.fail in ("raise", "torn")', "False"))
    sweep.main(["--resume", "runs/raise", "--retry-failed", "--quiet"])
    assert {row["status"] for row in lines(name="raise").values()} == {"finished"}
    assert [row["params"]["k"] for row in lines(name="raise").values()] == [1, 2] * 3
    kept = {line for line in before.decode().splitlines() if '"failed"' not in line}
    assert len(kept) == 3 and kept < set(Path("runs/raise/trials.jsonl").read_text().splitlines())


@pytest.mark.parametrize("way", ["die once", "stop once"])
def test_a_trial_whose_process_dies_or_is_stopped_goes_on_from_where_it_was(toy, way):
    sweep.main([*toy, *GRID, "--", "--fail", way])
    assert {(row["status"], row["epochs"]) for row in lines().values()} == {("finished", 8)}
    went_on = [row["went_on_from"] for row in records.read_log(Path("runs/s/trial-0001"))]
    assert went_on == [0, 0, 2, 2, 2, 2, 2, 2]


def test_a_sweep_stops_after_so_many_failures_in_a_row(toy):
    with pytest.raises(
        records.RunError, match=r"3 trials in a row failed.*ValueError: k is 1.*--resume runs/s"
    ):
        sweep.main([*toy, *GRID, "--", "--fail", "all"])
    assert 3 <= len(lines()) < 6


def test_the_bands_end_what_is_not_among_the_best_by_its_best(toy):
    space = ["--param", "x=0.3,0.5,0.4,0.35", "--param", "k=1"]
    sweep.main([*toy, "--method", "grid", *space, "--prune", "--eta", "2"])
    config = {
        "program": "toy.py",
        "method": "grid",
        "parameters": {"x": {"values": [0.3, 0.5, 0.4, 0.35]}},
    }
    config["early_terminate"] = {"type": "hyperband", "eta": 2, "min_iter": 2}
    Path("sweep.json").write_text(json.dumps(config))
    sweep.main(["--config", "sweep.json", *toy[2:-1], "config"])
    found = {
        name: {
            row["params"]["x"]: (row["status"], row["epochs"]) for row in lines(name=name).values()
        }
        for name in ("s", "config")
    }
    # The first has nobody to fear. 0.5 is the worse of two at the first band. 0.4 is second of three there, of whom two
    # go on, and of two at the next band. 0.35 is second of two at the last band of --prune.
    assert found["s"] == {
        0.3: ("finished", 8),
        0.5: ("pruned", 1),
        0.4: ("pruned", 2),
        0.35: ("pruned", 4),
    }
    assert found["config"] == {
        0.3: ("finished", 8),
        0.5: ("pruned", 2),
        0.4: ("pruned", 4),
        0.35: ("finished", 8),
    }
    board = [
        row.split(",")[:3] for row in Path("runs/s/leaderboard.csv").read_text().splitlines()[1:]
    ]
    assert [row[0] for row in board] == [
        "0",
        "3",
        "2",
        "1",
    ]  # the pruned ones by the epochs that they survived
    # What counts is the best so far: at the band the loss of k = 1 is higher than before, and than the others'.
    config["early_terminate"] = {"type": "hyperband", "eta": 2, "min_iter": 4}
    config["parameters"] = {"x": {"values": [0.9, 0.3]}, "k": {"values": [3, 1]}}
    Path("sweep.json").write_text(json.dumps(config))
    sweep.main(["--config", "sweep.json", *toy[2:-1], "best"])
    assert [row["epochs"] for row in lines(name="best").values()] == [8, 8, 8, 8]


def test_several_seeds_are_averaged(toy, capsys):
    sweep.main([*toy[:4], "--name", "s", "--method", "grid", "--param", "k=1,2", "--seeds", "3"])
    assert "toy.py --k=1 --seed 44" in capsys.readouterr().out  # the run that `best` is
    assert len(list(Path("runs/s").glob("trial-*/run.json"))) == 6
    best = json.loads(Path("runs/s/best/run.json").read_text())["args"]
    assert (best["k"], best["seed"]) == (1, 44)
    sweep.main(
        [
            *toy[:-1],
            "nan",
            "--method",
            "grid",
            "--param",
            "x=0.6,0.1",
            "--seeds",
            "2",
            "--",
            "--fail=diverge",
        ]
    )
    assert all(Path("runs/nan", row["run"]).is_dir() for row in lines(name="nan").values())


ODD = """
from __future__ import annotations
import dataclasses
import other

@dataclasses.dataclass
class Settings:
    x: int

def main(argv, on_epoch):
    return other.ANSWERS[int(argv[0][-1])]
"""


def test_what_a_script_gives_that_is_no_record_is_a_failed_trial(toy):
    Path("odd.py").write_text(ODD)
    answers = [None, {"status": "failed"}, {"status": "finished", "best": None, "epochs": 1}]
    answers.append({"status": "finished", "best": {"val_loss": float("nan")}, "epochs": 1})
    Path("other.py").write_text(f"from math import nan\nANSWERS = {answers!r}")
    with pytest.raises(records.RunError, match="no trial finished"):
        sweep.main(
            [
                "--script",
                "odd.py",
                *toy[2:],
                "--method",
                "grid",
                "--param",
                "k=0,1,2,3",
                "--max-failures",
                "9",
            ]
        )
    errors = [row["error"] for row in lines().values()]
    assert all("returned no record" in error for error in errors[:2]) and all(
        "no best" in e for e in errors[2:]
    )


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


def test_the_script_in_the_docs_can_be_searched(toy):
    example = (
        (records.HERE / "docs" / "searches.md").read_text().split("```python")[1].split("```")[0]
    )
    Path("mine.py").write_text(STUBS + example)
    best = sweep.main(
        ["--script", "mine.py", *toy[2:], "--method", "grid", "--param", "x=0.2,0.1,0.3"]
    )["best"]
    assert best["params"] == {"x": 0.1} and [row["epochs"] for row in lines().values()] == [3, 3, 3]


def test_a_bayesian_search_learns_and_follows_from_its_seed(toy):
    sweep.main([*toy, *BAYES, "--count", "6"])
    sweep.main(["--resume", "runs/s", "--count", "12", "--quiet"])
    sweep.main([*toy[:-1], "twin", *BAYES, "--count", "12", "--metric", "val_acc"])
    sweep.main([*toy[:-1], "other", *BAYES, "--count", "2", "--seed", "1"])
    rows = lines()
    assert list(rows) == [*range(12)] and len({str(row["params"]) for row in rows.values()}) == 12
    # The accuracy falls as the loss rises: minimising one and maximising the other finds the same.
    for name in ("s", "twin"):
        losses = [row["val_loss"] for row in lines(name=name).values()]
        assert sum(loss < 0.28 for loss in losses[5:]) >= 3
    assert lines(name="other")[0]["params"] != rows[0]["params"] == lines(name="twin")[0]["params"]


def test_a_logarithmic_range_is_searched_logarithmically_and_divergence_avoided(toy):
    log = ["--method", "bayes", "--param", "lr=log:1e-6..1e-1", "--count", "5"]
    sweep.main([*toy, *log])
    assert sum(row["params"]["lr"] < 1e-3 for row in lines().values()) >= 2
    sweep.main([*toy[:-1], "diverge", *BAYES, "--count", "14", "--", "--fail", "diverge"])
    statuses = [row["status"] for row in lines(name="diverge").values()]
    assert set(statuses) == {"finished", "diverged"} and statuses[5:].count("diverged") <= 4
    assert {row["error"] for row in lines(name="diverge").values()} == {None, "the loss became nan"}


def test_a_small_space_is_searched_to_its_end(toy):
    sweep.main(
        [
            *toy,
            "--method",
            "bayes",
            "--param",
            "k=1,2,3",
            "--param",
            "x=0.1,0.2",
            "--count",
            "9",
            "--jobs",
            "2",
        ]
    )
    assert len({json.dumps(row["params"]) for row in lines().values()}) == len(lines()) == 6


def test_the_threads_of_the_trials_and_of_those_that_follow(few_images):
    Path("few.py").write_text(
        "import forked, train_mnist\nfrom train_mnist import *\ntrain_mnist.synthetic = forked.few_digits\n"
    )
    flags = ["--dataset=synthetic", "--epochs=1", "--model=dense"]
    argv = [
        "--method",
        "random",
        "--script",
        "few.py",
        "--param",
        "lr=log:0.001..0.1",
        "--count",
        "1",
        "--quiet",
    ]
    sweep.main([*argv, "--threads", "2", "--runs-dir", "runs", "--name", "s", "--", *flags])
    sweep.main(["--resume", "runs/s", "--count", "2", "--jobs", "2", "--quiet"])
    assert [records.read_record(Path(f"runs/s/trial-000{n}"))["threads"] for n in (0, 1)] == [2, 2]


# ---------------- Interruptions ----------------


@pytest.mark.parametrize(
    "search", [[*GRID[:-1], "k=1,2,3,4", "--jobs", "2"], [*BAYES, "--count", "9"]], ids="gb"
)
def test_killed_again_and_again_a_sweep_ends_as_an_undisturbed_one(toy, search):
    sweep.main([*toy[:-1], "whole", *search])
    moments, argv = random.Random(0), [*toy, *search]
    for _ in range(4):
        ended = len(lines()) if Path("runs/s/trials.jsonl").exists() else 0
        process = start(*argv)
        log = Path("runs/s/trials.jsonl")
        while process.process.is_alive() and not (log.exists() and len(lines()) > ended):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.2))
        process.process.kill()
        process.process.join()
        with open("runs/s/study.journal", "a") as file:
            file.write('{"op_code": 5, "wor')
    sweep.main(["--resume", "runs/s", "--quiet"])
    assert results("s") == results("whole") and list(results("s")) == list(
        range(len(results("whole")))
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_trials_and_the_sweep_says_how_to_go_on(toy, number, status):
    (held,) = hold("runs", trial="trial-0001")
    process = start(*GRID, *toy[:4], "--name", "s")
    until(Path("runs/s/trial-0001/run.json").exists)
    until(lambda: Path("sweep.out").read_text().startswith("trial 0  finished"))
    with pytest.raises(records.RunError, match="in use"):
        sweep.main(["--resume", "runs/s", "--quiet"])
    os.kill(process.process.pid, number)
    code, error = process.finish()
    assert code == status and "sweep.py --resume runs/s" in error and len(error.splitlines()) == 1
    assert list(lines()) == [0]
    held.unlink()
    sweep.main(["--resume", "runs/s", "--quiet"])
    assert list(lines()) == [*range(6)]


def test_a_search_that_never_began_and_a_system_without_locks_are_one_line(toy, monkeypatch):
    Path("runs/s").mkdir(parents=True)
    storage = JournalStorage(JournalFileBackend("runs/s/study.journal"))
    optuna.create_study(storage=storage, study_name="s")  # killed here
    with pytest.raises(records.UsageError, match="stopped before it began"):
        sweep.main(["--resume", "runs/s"])
    sweep.main([*toy, "--method", "grid", "--param", "k=1"])
    assert list(lines()) == [0]
    monkeypatch.setattr(records, "fcntl", None)  # as on Windows
    with pytest.raises(records.UsageError, match="WSL"):
        sweep.main(["--resume", "runs/s"])


def test_a_directory_holds_one_search_and_never_another(toy, capsys):
    sweep.main([*toy, "--method", "grid", "--param", "k=1"])
    for argv, expected in (
        ([*toy, *GRID], "runs/s is another search: its "),
        (["--resume", "runs/s", "--param", "x=1,2"], "leave out --param"),
        (["--resume", "runs/s", "--", "--x=1"], "leave out .*--"),
        (["--resume", "runs"], "no study.journal"),
        (["--resume", "none"], "none: there is no such directory"),
    ):
        with pytest.raises(records.UsageError, match=expected):
            sweep.main(argv)
    for name, content in (("old", "sweep.json"), ("run", "run.json")):
        Path("runs", name).mkdir()
        Path("runs", name, content).touch()
        with pytest.raises(records.UsageError, match=f"runs/{name}"):
            sweep.main([*toy[:-1], name, *GRID])
    # A sweep that has moved goes on where it is.
    shutil.move("runs/s", "moved")
    sweep.main(["--resume", "moved", "--quiet"])
    assert lines(".", "moved")[0]["run"] == "trial-0000"


# ---------------- Many machines: each is a process with a runs directory of its own ----------------


@pytest.fixture(scope="session")
def postgresql():
    """pg_ctl(...) of a PostgreSQL server that lives as long as the tests, and its URL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (requirements-dev.txt)")
    places = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))), os.environ["PATH"]]
    program = shutil.which("pg_ctl", path=os.pathsep.join(places))
    if not program:
        pytest.skip("no PostgreSQL server is installed (Debian: postgresql)")
    directory = Path(
        tempfile.mkdtemp(prefix="postgresql-")
    )  # another user can reach it, and a socket's name fits
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    try:
        shutil.chown(directory, user or os.geteuid())
    except LookupError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def pg_ctl(*arguments):
        command = [program, "-D", directory / "data", "-w", *arguments]
        subprocess.run(command, check=True, user=user, cwd=directory, stdout=subprocess.DEVNULL)

    def begin():
        pg_ctl(
            "start",
            "-o",
            f"-p {port} -k {directory} -c listen_addresses=127.0.0.1",
            "-l",
            directory / "log",
        )

    pg_ctl("init", "-o", "--auth=trust --username=sweep")
    begin()
    Server = collections.namedtuple("Server", "url stop start")
    url = f"postgresql://sweep@127.0.0.1:{port}/postgres"
    yield Server(url, lambda: pg_ctl("stop", "-m", "immediate"), begin)
    pg_ctl("stop", "-m", "immediate")
    shutil.rmtree(directory)


def machine(name, url, study, *argv, more=("--grace", "10")):
    """A process that takes trials from a shared search, as a machine would; its runs directory is `name`."""
    shared = [
        "--script",
        "toy.py",
        "--name",
        study,
        "--runs-dir",
        name,
        "--storage",
        url,
        *more,
    ]
    return start(*argv, *shared, name=name)


@pytest.mark.developers
def test_three_machines_share_a_search_and_the_trial_of_a_dead_one_is_run_by_another(
    toy, postgresql
):
    # In so small a space machines are proposed the same at once: still, nothing runs twice.
    study, search = "shared", [*BAYES[:2], *GRID[2:-1], "k=1,2,3,4"]
    held = hold("a", "b", "c")
    a, b, c = (machine(name, postgresql.url, study, *search) for name in "abc")
    until(lambda: all(any(Path(name, study).glob("trial-*/run.json")) for name in "abc"))
    b.process.kill()
    postgresql.stop()  # and the database is away for a while
    for file in held:
        file.unlink()
    time.sleep(3)
    postgresql.start()
    for process, name in ((a, "a"), (c, "c")):
        assert process.finish() == (0, "")
        assert f"{name}/{study}: 12 trials have ended" in Path(f"{name}.out").read_text()
    for first, other in ("ac", "ca"):
        rows = lines(first, study)
        assert (
            list(rows) == list(range(12))
            and len({str(row["params"]) for row in rows.values()}) == 12
        )
        here = {trial for trial, row in rows.items() if row["run"] == f"trial-{trial:04}"}
        assert here and here == {int(path.name[-4:]) for path in Path(first, study).glob("trial-*")}
        assert {row["status"] for row in rows.values()} == {"finished"}
        assert all(f"/{other}/{study}/trial-" in rows[trial]["run"] for trial in rows.keys() - here)
    # A search of that name is there, and is not to be mixed with another.
    with pytest.raises(records.UsageError, match="is another search"):
        sweep.main(
            ["--method", "grid", "--param", "x=0.1", *toy[:-1], study, "--storage", postgresql.url]
        )


@pytest.mark.developers
def test_the_trial_of_a_machine_that_is_told_to_stop_is_run_by_another_and_it_may_join_again(
    toy, postgresql
):
    (held,) = hold("a", trial="trial-0001")
    process = machine("a", postgresql.url, "told", *GRID)
    until(Path("a/told/trial-0001/run.json").exists)
    os.kill(process.process.pid, signal.SIGINT)
    assert process.finish()[0] == 130 and list(lines("a", "told")) == [0]
    held.unlink()
    other = machine("b", postgresql.url, "told", *GRID)
    assert other.finish()[0] == 0
    assert lines("b", "told")[0]["run"].endswith("/a/told/trial-0000") and list(
        lines("b", "told")
    ) == [*range(6)]
    with pytest.raises(records.UsageError, match="give its --storage again"):
        sweep.main(["--resume", "a/told"])
    sweep.main(["--resume", "a/told", "--quiet", "--storage", postgresql.url])
    rows = lines("a", "told")
    assert rows[0]["run"] == "trial-0000" and rows[5]["run"].endswith("/b/told/trial-0005")


@pytest.mark.developers
def test_a_database_that_does_not_answer_is_one_line_without_the_password(toy):
    pytest.importorskip("psycopg", reason="psycopg is not installed (requirements-dev.txt)")
    with pytest.raises(records.RunError, match=r"postgresql://u:\*\*\*@127.0.0.1:1/d: .*refused"):
        sweep.main([*GRID, *toy, "--storage", "postgresql://u:secret@127.0.0.1:1/d"])
    assert not Path("runs").exists()


# ---------------- The report ----------------


def test_a_real_search_with_its_report_reads_the_test_set_for_the_winner_alone(tmp_path, capsys):
    tiny = ["--dataset", "synthetic", "--limit-train", "300", "--model", "dense", "--epochs", "4"]
    space = ["--param", "lr=log:1e-3..1e-1", "--param", "l1=16,64", "--param", "d1=0.0..0.5"]
    argv = [
        "--method",
        "random",
        *space,
        "--count",
        "9",
        "--jobs",
        "2",
        "--name",
        "s",
        "--runs-dir",
        "runs",
    ]
    winner = sweep.main([*argv, "--", *tiny])["best"]
    printed, directory = capsys.readouterr().out, tmp_path / "runs" / "s"
    assert f"best: {winner['run']}" in printed and f"--lr={winner['params']['lr']}" in printed
    assert "on the test set, read once, for this trial alone" in printed
    assert [path.parent.name for path in directory.glob("trial-*/metrics.json")] == [winner["run"]]
    for line in lines().values():
        record = records.read_record(directory / line["run"])
        assert record["test"] is None and record["args"]["runs_dir"] == str(directory)
        assert [record["best"][name] for name in ("val_loss", "val_acc")] == [
            line["val_loss"],
            line["val_acc"],
        ]
    pictures = {path.stem for path in directory.glob("*.png")}
    assert pictures >= {"curves", "parallel", "slices", "importance"}
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert all(line["run"] in page for line in lines().values())
    # Another winner later: the report says that the test set has been read before.
    shutil.move(
        directory / winner["run"] / "metrics.json", directory / "trial-0000" / "metrics.json"
    )
    sweep.main(["--resume", str(directory)])
    often = "which was read before, for trial-0000" if winner["trial"] else "read once"
    assert often in capsys.readouterr().out
    assert sweep.main(
        [
            "--method",
            "grid",
            "--param",
            "l1=8,16",
            "--param",
            "lr=0.1,0.01",
            *argv[-2:],
            "--",
            *tiny,
        ]
    )
    assert (max(Path("runs").glob("sweep-20*")) / "grid.png").exists()
