"""Searches: their space, their directory, resuming, pruning, failures, and the report."""

import json
import multiprocessing
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import common
import evaluate
import sweep

# A script of the user's own, with a metric that follows from its parameters, and ways to fail. It leaves a run
# directory as the contract has it, and takes so little time that what is tested is the sweep.
TOY = """
import argparse, json, os, pathlib, signal, sys, time
import common

def build_parser():
    parser = common.ArgumentParser(prog="toy.py")
    for name, kind, default in (("x", float, 0.0), ("k", int, 1), ("epochs", int, 8), ("seed", int, 0)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--resume", type=pathlib.Path)
    parser.add_argument("--runs-dir", type=pathlib.Path)
    parser.add_argument("--run-name")
    parser.add_argument("--fail")
    for flag in ("--test", "--quiet"):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction)
    return parser

def main(argv):
    args = build_parser().parse_args(argv)
    if args.resume:
        record = json.loads((args.resume / "run.json").read_text())
        rows = common.read_log(args.resume)
        directory, old = args.resume, record["args"]
        args = argparse.Namespace(**{**old, "stop_after": args.stop_after})
    else:
        directory, rows = args.runs_dir / args.run_name, []
        directory.mkdir()
        (directory / "last.pt").touch()
        kept = {key: getattr(args, key) for key in ("x", "k", "epochs", "seed", "fail")}
        record = {"name": directory.name, "script": "toy", "args": kept, "status": "running", "started": "",
                  "seconds": 0.0, "device": "cpu", "precision": "fp32", "data": {}, "parameters": 0, "test": None}
    if args.fail == "raise" and args.k == 2:
        raise ValueError("k is 2")
    if args.fail == "die" and args.k == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if args.fail == "all":
        raise ValueError("always")
    last, before = min(args.epochs, args.stop_after or args.epochs), len(rows)
    for epoch in range(len(rows) + 1, last + 1):
        loss = (args.x - 0.3) ** 2 + args.k / 10 + 1 / epoch + args.seed / 1000
        rows.append({"epoch": epoch, "val_loss": loss, "val_acc": 1 / (1 + loss)})
        if args.fail == "slow":
            time.sleep(0.1)
    best = rows[-1]
    record.update(epochs=len(rows), best=best, error=None, seconds=0.5 * len(rows),
                  status="finished" if len(rows) == args.epochs else "interrupted")
    if args.fail == "diverge" and args.k == 2:
        record.update(status="diverged", best=None, error="the loss became nan")
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    (directory / "run.json").write_text(json.dumps(record))
    with open(directory.parent / "started.txt", "a") as file:
        file.write(f"{directory.name} {before} {len(rows)}" + chr(10))
    return {**record, "directory": str(directory)}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "draw_sweep", lambda sweep: {})  # the pictures are another test's
    (tmp_path / "toy.py").write_text(TOY)
    return ["--script", "toy.py", "--quiet", "--name", "s"]


def lines():
    return sweep.read_lines(Path("runs/s/trials.jsonl"))


GRID = ["--method", "grid", "--param", "x=0.1,0.2,0.3", "--param", "k=1,2"]


# ---------------------------------------------------------------------------------------------------
# The space
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c1=48,96", sweep.Parameter("c1", (48, 96))),
        ("lr=log:1e-4..1e-1", sweep.Parameter("lr", (), 1e-4, 0.1, log=True)),
        ("d1=0.0..0.5", sweep.Parameter("d1", (), 0.0, 0.5)),
        ("l1=int:64..512", sweep.Parameter("l1", (), 64, 512, step=1)),
        ("optimizer=adam,sgd", sweep.Parameter("optimizer", ("adam", "sgd"))),
        ("batch-size=32", sweep.Parameter("batch_size", (32,))),
        ("augment=true,false", sweep.Parameter("augment", (True, False))),
        ("weight-decay=1e-4,0", sweep.Parameter("weight_decay", (1e-4, 0))),
    ],
)
def test_a_parameter_on_the_command_line(text, expected):
    assert sweep.parse_parameter(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c1", "NAME=VALUE"),
        ("=3", "NAME=VALUE"),
        ("c1=48,48", "48 is there twice"),
        ("c1=48,", "a value is empty"),
        ("lr=0.1..0.01", "not below"),
        ("lr=log:0..1", "above 0"),
        ("lr=log:1,2", "LOW..HIGH"),
        ("l1=int:1.5..3", "whole numbers"),
        ("lr=a..b", "two numbers"),
        ("lr=1..2..3", "two numbers"),
        ("lr=nan..1", "finite"),
    ],
)
def test_a_parameter_that_is_wrong_is_refused(text, expected):
    with pytest.raises(common.UsageError, match=expected):
        sweep.parse_parameter(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"value": "1e-4"}, sweep.Parameter("p", (1e-4,))),
        ({"values": [1, "2e-3"]}, sweep.Parameter("p", (1, 2e-3))),
        ({"min": 1, "max": 9}, sweep.Parameter("p", (), 1, 9, step=1)),
        ({"min": 0, "max": 1.5}, sweep.Parameter("p", (), 0, 1.5)),
        (
            {"min": "1e-4", "max": "1e-1", "distribution": "log_uniform_values"},
            sweep.Parameter("p", (), 1e-4, 0.1, 0, True),
        ),
        ({"min": 0, "max": 1, "q": 0.25, "distribution": "q_uniform"}, sweep.Parameter("p", (), 0, 1, 0.25)),
        ({"min": 1, "max": 60, "q": 8, "distribution": "q_uniform"}, sweep.Parameter("p", (), 8, 56, 8)),
        (
            {"min": 8, "max": 64, "q": 8, "distribution": "q_log_uniform_values"},
            sweep.Parameter("p", (), 8, 64, 8, True),
        ),
    ],
)
def test_the_distributions_of_a_wandb_config(content, expected):
    assert sweep.parameter_from_config("p", content) == expected


def test_log_uniform_has_exponents_of_e_for_bounds():
    parameter = sweep.parameter_from_config("p", {"min": -2, "max": 0, "distribution": "log_uniform"})
    assert (parameter.low, parameter.high, parameter.log) == (pytest.approx(0.1353352832), 1, True)


def test_draws_lie_in_the_range_and_on_its_steps_and_follow_the_distribution():
    generator = random.Random(0)
    steps = sweep.Parameter("p", (), 0.0, 1.0, 0.25)
    drawn = [steps.draw(generator) for _ in range(4000)]
    assert set(drawn) == {0, 0.25, 0.5, 0.75, 1} and all(abs(drawn.count(v) - 800) < 120 for v in set(drawn))
    assert steps.grid() == (0, 0.25, 0.5, 0.75, 1)
    log = sweep.Parameter("p", (), 1e-4, 1e-1, log=True)
    drawn = [log.draw(generator) for _ in range(3000)]
    assert all(1e-4 <= value <= 1e-1 for value in drawn)
    assert abs(sum(value < 1e-3 for value in drawn) - 1000) < 110
    whole = sweep.Parameter("p", (), 3, 5, 1)
    assert {type(whole.draw(generator)) for _ in range(50)} == {int} and whole.grid() == (3, 4, 5)


def test_a_random_search_follows_from_its_seed_repeats_nothing_and_ends_where_the_space_does():
    def planned(*argv):
        args = sweep.build_parser().parse_args(["--method", "random", *argv])
        return sweep.planned_configurations(sweep.search_from(args, []))

    assert planned() == planned() != planned("--seed", "1")
    assert len(planned()) == 20 and planned("--count", "5") == planned()[:5]
    small = planned("--param", "k=1,2,3", "--count", "10")
    assert sorted(params["k"] for params in small) == [1, 2, 3]


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


def test_a_file_in_wandbs_schema_works_unchanged(tmp_path, capsys):
    pytest.importorskip("yaml")
    path = tmp_path / "sweep.yaml"
    path.write_text(CONFIG)
    sweep.main(["--config", str(path), "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    for line in printed:
        assert (
            "python train_cifar.py --epochs 3 --lr=" in line and "--model=confignet --c1=" in line and "--c2=" in line
        )
    args = sweep.build_parser().parse_args(["--config", str(path)])
    search = sweep.search_from(args, [])
    assert (search.metric, search.sign, search.count, search.script) == ("val_acc", -1, 4, "train_cifar.py")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("method: random", "method: anneal"), "anneal is not supported"),
        (("run_cap: 4", "run_cups: 4"), "unknown key run_cups"),
        (("program: train_cifar.py", "program: gone.py"), "gone.py: there is no such Python file"),
        (("log_uniform_values", "inv_log_uniform"), "the distribution inv_log_uniform is not supported"),
        (("name: val_acc", "name: f1"), "metric f1 is unknown"),
        (("goal: maximize", "goal: minimize"), "the goal is to maximize"),
        (("${env}", "${args_json}"), "args_json} is not supported"),
        (("min: 48", "min: 480"), "not below"),
        (("values: [24, 48]", "values: []"), "values must be a list"),
        (("values: [24, 48]", "value: [24"), "--config"),
        (("c1:", "lr:"), "lr is there twice"),
        (("run_cap: 4", "run_cap: 0"), "at least 1"),
        (("{name: val_acc, goal: maximize}", "{goal: maximize}"), "a name and a goal"),
        (("{value: confignet}", "{distribution: normal, mu: 0, sigma: 1}"), "the distribution normal"),
        (("c1:", "seed:"), "--seed is set by the sweep"),
        (('--epochs", 3', '--run-name", 3'), "--run-name is set by the sweep"),
    ],
)
def test_a_config_that_is_wrong_is_refused_in_one_line(tmp_path, monkeypatch, change, expected):
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sweep.yaml"
    assert change[0] in CONFIG
    path.write_text(CONFIG.replace(*change))
    with pytest.raises(common.UsageError, match=expected):
        sweep.main(["--config", str(path)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--method", "grid", "--param", "c9=1,2"], "--c9"),
        (["--method", "grid", "--param", "c1=48,-3"], "--c1"),
        (["--method", "random", "--param", "d1=0.5..2"], "--d1"),
        (["--method", "bayes", "--script", "train_cifar.py", "--param", "d1=0.5..2"], "--d1"),
    ],
)
def test_what_the_script_would_refuse_is_refused_before_the_first_trial(argv, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = [] if "bayes" in argv else ["--script", "train_cifar.py"]
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*argv, *script, "--count", "4"] if "random" in argv else [*argv, *script])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--method"),
        (["--method", "grid", "--param", "lr=0.1..0.2"], "needs a list of values"),
        (["--method", "bayes", "--prune"], "go with grid and random"),
        (["--method", "grid", "--script", "train_mnist.py"], "needs its own search"),
        (["--method", "grid", "--rungs", "2"], "--rungs needs --prune"),
        (["--resume", "nowhere"], "no sweep.json"),
        (["--method", "grid", "--retry-failed", "--name", "new"], "needs a sweep that exists"),
        (["--method", "random", "--param", "label_smoothing=0.0..0.2"], "choose by --metric val_acc"),
        (["--method", "grid", "--prune", "--seeds", "2"], "pruning and --seeds"),
        (["--method", "grid", "--prune", "--rungs", "10"], "no rung between 0 and 10 epochs"),
        (["--method", "grid", "--prune", "--param", "epochs=5,10"], "the same for all trials"),
        (["--method", "grid", "--script", "notes.txt", "--param", "c1=1"], "no such Python file"),
    ],
)
def test_a_search_that_is_wrong_is_refused(argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UsageError, match=expected):
        sweep.main(argv)
    assert not (tmp_path / "runs").exists()


def test_the_tutorials_searches_are_the_defaults(capsys):
    sweep.main(["--method", "grid", "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and "--c1=48 --c2=96 --l1=256" in printed[0] and "--c1=96 --c2=192 --l1=512" in printed[7]
    assert all("--epochs 10 --lr 0.001 --batch-size 512 --tolerance 3" in line for line in printed)
    sweep.main(["--method", "bayes", "--dry-run"])
    assert "lr: 0.0001 to 0.1, logarithmic" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------


def test_a_grid_runs_every_combination_once_whatever_the_number_of_jobs(toy):
    results = []
    for jobs in ("1", "2"):
        sweep.main([*toy[:-1], f"jobs{jobs}", *GRID, "--jobs", jobs])
        rows = sweep.read_lines(Path(f"runs/jobs{jobs}/trials.jsonl"))
        assert sorted(row["trial"] for row in rows) == list(range(6))
        assert {row["status"] for row in rows} == {"finished"} and {row["epochs"] for row in rows} == {8}
        results.append({row["trial"]: (row["params"], row["metric"]) for row in rows})
    assert results[0] == results[1]
    best = json.loads((Path("runs/jobs2/best") / "run.json").read_text())
    assert (best["args"]["x"], best["args"]["k"]) == (0.3, 1)


def test_a_trial_that_fails_is_recorded_and_does_not_end_the_sweep(toy):
    for way, error in (("raise", "ValueError: k is 2"), ("die", "its process died (exit code -9)")):
        name = [*toy[:-1], way]
        sweep.main([*name, *GRID, "--jobs", "2", "--max-failures", "9", "--", "--fail", way])
        rows = {row["trial"]: row for row in sweep.read_lines(Path(f"runs/{way}/trials.jsonl"))}
        assert [rows[trial]["status"] for trial in range(6)] == ["finished", "failed"] * 3
        assert {row["error"] for row in rows.values()} == {None, error}
    # Again: nothing is left to do. With --retry-failed the failed ones run once more, and only those.
    sweep.main([*name, *GRID, "--max-failures", "9", "--", "--fail", way])
    assert len(sweep.read_lines(Path("runs/die/trials.jsonl"))) == 6
    sweep.main(["--resume", "runs/die", "--retry-failed", "--max-failures", "9", "--quiet"])
    again = sweep.read_lines(Path("runs/die/trials.jsonl"))[6:]
    assert sorted(row["trial"] for row in again) == [1, 3, 5]


def test_a_sweep_stops_after_so_many_failures_in_a_row(toy):
    with pytest.raises(common.RunError, match=r"3 trials in a row failed.*ValueError: always.*--resume runs/s"):
        sweep.main([*toy, *GRID, "--", "--fail", "all"])
    assert len(lines()) == 3


def test_pruning_continues_the_best_from_where_they_were_and_says_where_the_others_ended(toy):
    sweep.main(
        [*toy, "--method", "grid", "--param", "x=0.1,0.3,0.5,0.7,0.9", "--param", "k=1,2", "--prune", "--eta", "2"]
    )
    rows = {row["trial"]: row for row in lines()}
    # Ten trials at epoch 1, the best five at 2, three at 4, two at 8: by x nearest to 0.3, and k 1 before 2.
    assert sorted(row["epochs"] for row in rows.values()) == [1] * 5 + [2] * 2 + [4] + [8] * 2
    finished = sorted((row["params"]["x"], row["params"]["k"]) for row in rows.values() if row["status"] == "finished")
    assert finished == [(0.1, 1), (0.3, 1)] or finished == [(0.3, 1), (0.5, 1)]
    assert {row["status"] for row in rows.values() if row["epochs"] < 8} == {"pruned"}
    started = Path("runs/s/started.txt").read_text().splitlines()
    assert [line for line in started if line.startswith("trial-0002")] == [
        "trial-0002 0 1", "trial-0002 1 2", "trial-0002 2 4", "trial-0002 4 8"
    ]  # fmt: skip


def test_the_band_rule_of_a_wandb_config_ends_what_is_not_among_the_best_at_a_band(toy, tmp_path):
    pytest.importorskip("yaml")
    config = {
        "program": "toy.py", "method": "grid", "parameters": {"x": {"values": [0.3, 0.5, 0.4, 0.35]}},
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},
    }  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(config))
    sweep.main(["--config", "sweep.json", "--quiet", "--name", "s"])
    rows = {row["params"]["x"]: (row["status"], row["epochs"]) for row in lines()}
    # The first at a band has nobody to fear; 0.4 is second of three at epoch 2, of whom two go on, and of two at 4.
    assert rows == {0.3: ("finished", 8), 0.5: ("pruned", 2), 0.4: ("pruned", 4), 0.35: ("finished", 8)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"type": "median"}, "the only type is hyperband"),
        ({"type": "hyperband"}, "min_iter, or max_iter with s"),
        ({"type": "hyperband", "min_iter": 0}, "min_iter must be a whole number above 0"),
        ({"type": "hyperband", "min_iter": 1, "strict": True}, "strict is not supported"),
    ],
)
def test_an_early_terminate_that_is_wrong_is_refused(tmp_path, rule, expected):
    with pytest.raises(common.UsageError, match=expected):
        sweep.bands_of(tmp_path, rule)


def test_the_bands_of_an_early_terminate(tmp_path):
    assert sweep.bands_of(tmp_path, {"type": "hyperband", "min_iter": 3})[0][:3] == [3, 9, 27]
    assert sweep.bands_of(tmp_path, {"type": "hyperband", "max_iter": 27, "s": 2}) == ([3, 9], 3)


def test_several_seeds_are_averaged(toy):
    sweep.main([*toy, "--method", "grid", "--param", "k=1,2", "--seeds", "3"])
    assert [(row["params"]["k"], row["seed"]) for row in lines()] == [(k, s) for k in (1, 2) for s in (42, 43, 44)]
    rows = sweep.leaderboard(sweep.Sweep.open(Path("runs/s")))
    assert [row["k"] for row in rows] == [1, 2] and rows[0]["std"] == pytest.approx(0.001)
    assert rows[0]["val_loss"] == pytest.approx(0.09 + 0.1 + 1 / 8 + 0.043)


def test_what_a_script_gives_that_is_no_record_is_a_failed_trial(toy, tmp_path):
    (tmp_path / "odd.py").write_text("import other\ndef main(argv):\n    return other.ANSWERS[int(argv[0][-1])]\n")
    answers = [None, {"status": "failed"}, {"status": "finished", "best": None, "epochs": 1}]
    answers.append({"status": "finished", "best": {"val_loss": float("nan")}, "epochs": 1})
    (tmp_path / "other.py").write_text(f"from math import nan\nANSWERS = {answers!r}")
    with pytest.raises(common.RunError, match="no trial finished"):
        sweep.main(["--script", "odd.py", *toy[2:], "--method", "grid", "--param", "k=0,1,2,3", "--max-failures", "9"])
    assert {row["status"] for row in lines()} == {"failed"}
    assert [row["error"][:20] for row in lines()] == ["main(argv) gave no r"] * 2 + ["its record has no be"] * 2


def test_a_trial_that_diverged_counts_as_the_worst(toy, monkeypatch):
    pytest.importorskip("optuna")
    told, tell = [], sweep.BayesianProposer.tell

    def recorded(self, params, value):
        told.append((params["k"], value))
        tell(self, params, value)

    monkeypatch.setattr(sweep.BayesianProposer, "tell", recorded)
    space = ["--method", "bayes", "--param", "x=0.0..1.0", "--param", "k=1,2", "--count", "8"]
    sweep.main([*space, *toy, "--", "--fail", "diverge"])
    worst, early = None, 0
    for row in lines():
        if row["status"] == "diverged":
            expected = [(2, worst)]
            early += worst is None
        else:
            worst = max(worst or 0, row["metric"])
            expected = [(1, row["metric"])] + [(2, worst)] * early
            early = 0
        assert [told.pop(0) for _ in expected] == expected
    assert {row["status"] for row in lines()} == {"finished", "diverged"} and not told


def test_a_small_space_is_searched_to_its_end(toy):
    pytest.importorskip("optuna")
    sweep.main([*toy, "--method", "bayes", "--param", "k=1,2,3", "--param", "x=0.1,0.2", "--count", "9"])
    assert len({json.dumps(row["params"]) for row in lines()}) == len(lines()) == 6


def test_a_bayesian_search_learns_is_seeded_and_continues_from_its_lines(toy):
    pytest.importorskip("optuna")
    space = ["--method", "bayes", "--param", "x=0.0..1.0", "--param", "k=1,2,3"]
    sweep.main([*toy, *space, "--count", "6"])
    sweep.main(["--resume", "runs/s", "--count", "12", "--quiet"])
    rows = lines()
    sweep.main([*toy[:-1], "twin", *space, "--count", "6"])
    twin = sweep.read_lines(Path("runs/twin/trials.jsonl"))
    assert [row["params"] for row in twin] == [row["params"] for row in rows[:6]]
    assert [row["trial"] for row in rows] == list(range(12))
    assert len({json.dumps(row["params"]) for row in rows}) == 12
    assert min(row["metric"] for row in rows) < 0.2251 + 0.043
    with pytest.raises(common.UsageError, match="leave out --param"):
        sweep.main(["--resume", "runs/s", "--param", "x=1,2"])
    with pytest.raises(common.UsageError, match="another search: its method is bayes"):
        sweep.main([*toy, *GRID])


REAL = ["--method", "grid", "--script", "train_mnist.py", "--param", "lr=0.001,0.003", "--param", "l1=8,16", "--quiet"]
REAL += ["--jobs", "2", "--threads", "1"]
REAL_FLAGS = ["--dataset", "synthetic", "--limit-train", "1000", "--model", "dense", "--epochs", "4"]


def until(condition):
    """Wait for it, a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_and_continued_a_sweep_ends_as_an_undisturbed_one(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "report", lambda *arguments: {})
    process = cli("sweep.py", *REAL, "--name", "killed", "--", *REAL_FLAGS, start=True)
    killed = tmp_path / "runs" / "killed"
    until(lambda: any(path.stat().st_size for path in killed.glob("trial-*/log.jsonl")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(common.is_locked(path) for path in killed.glob("trial-*/.lock")))
    before = sweep.read_lines(killed / "trials.jsonl")
    assert len(before) < 4
    with open(killed / "trials.jsonl", "a") as file:
        file.write('{"trial": 3, "par')
    sweep.main(["--resume", str(killed), "--jobs", "2", "--quiet"])
    after = sweep.read_lines(killed / "trials.jsonl")
    assert after[: len(before)] == before and sorted(row["trial"] for row in after) == list(range(4))
    sweep.main([*REAL, "--name", "s", "--", *REAL_FLAGS])
    undisturbed = {row["trial"]: (row["params"], row["metric"], row["epochs"]) for row in lines()}
    assert {row["trial"]: (row["params"], row["metric"], row["epochs"]) for row in after} == undisturbed


def test_a_signal_ends_the_sweep_and_says_how_to_go_on(toy, cli, tmp_path):
    arguments = [*GRID, "--script", "toy.py", "--name", "s", "--", "--fail", "slow"]
    process = cli("sweep.py", *arguments, start=True)
    assert process.stdout.readline().startswith("trial-0000  finished")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "sweep.py --resume runs/s" in error and len(error.splitlines()) == 1
    before = lines()
    assert 0 < len(before) < 6 and {row["status"] for row in before} == {"finished"}
    with common.locked(tmp_path / "runs" / "s" / ".lock"), pytest.raises(common.RunError, match="in use"):
        sweep.main(["--resume", "runs/s", "--quiet"])
    sweep.main(["--resume", "runs/s", "--quiet"])
    assert lines()[: len(before)] == before and sorted(row["trial"] for row in lines()) == list(range(6))


# ---------------------------------------------------------------------------------------------------
# Many machines: each is a process with a runs directory of its own
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory):
    """The URL of a PostgreSQL server that lives as long as the tests."""
    pytest.importorskip("psycopg")
    programs = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.get_exec_path())]
    place = next((path for path in programs if (path / "initdb").exists() and (path / "pg_ctl").exists()), None)
    if place is None:
        pytest.skip("no PostgreSQL server is installed (Debian: postgresql)")
    user = None
    directory = Path(
        tempfile.mkdtemp(prefix="postgresql-")
    )  # where another user can reach it, and a socket's name fits
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        shutil.chown(directory, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program, *arguments):
        command = [place / program, "-D", directory / "data", *arguments]
        subprocess.run(command, check=True, user=user, cwd=directory, stdout=subprocess.DEVNULL, timeout=60)

    run("initdb", "--auth=trust", "--username=sweep")
    options = f"-p {port} -k {directory} -c listen_addresses=127.0.0.1"
    run("pg_ctl", "-w", "-o", options, "-l", directory / "log", "start")
    yield f"postgresql://sweep@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-w", "-m", "immediate", "stop")
    shutil.rmtree(directory)


def machine(cli, name, storage, *arguments, flags=("--fail", "slow")):
    """A process that takes trials from a shared search, as a machine of its own would."""
    where = ["--script", "toy.py", "--name", "s", "--runs-dir", name, "--storage", storage, "--grace", "15"]
    return cli("sweep.py", *arguments, *where, "--", *flags, start=True)


def ended(name):
    return {line["trial"]: line for line in sweep.read_lines(Path(name, "s", "trials.jsonl"))}


def test_three_machines_share_a_search_and_the_trial_of_a_dead_one_is_run_by_another(toy, cli, postgresql):
    flags, twelve = ["--fail", "slow", "--epochs", "15"], [*GRID[:-1], "k=1,2,3,4"]
    a, b, c = (machine(cli, name, postgresql, *twelve, flags=flags) for name in "abc")
    until(lambda: any(Path("b/s").glob("trial-*/last.pt")))
    b.send_signal(signal.SIGKILL)
    b.wait()
    lost = {int(path.name[-4:]) for path in Path("b/s").glob("trial-*")} - ended("b").keys()
    assert len(lost) == 1
    for process in (a, c):
        output, error = process.communicate(timeout=100)
        assert process.returncode == 0 and not error and "s: 12 trials have ended" in output
    for first, other in ("ac", "ca"):
        lines = ended(first)
        assert sorted(lines) == list(range(12)) and len({str(line["params"]) for line in lines.values()}) == 12
        here = {trial for trial, line in lines.items() if line["run"] == f"trial-{trial:04}"}
        assert here == {int(path.name[-4:]) for path in Path(first, "s").glob("trial-*")}
        assert {trial: line["metric"] for trial, line in lines.items()} == {
            trial: line["metric"] for trial, line in ended(other).items()
        }
        assert all(
            f"/{other}/s/trial-" in lines[t]["run"] or "/b/s/trial-" in lines[t]["run"] for t in lines.keys() - here
        )
    assert all("/b/" not in ended("a")[trial]["run"] for trial in lost)


def test_a_machine_that_is_told_to_stop_gives_its_trial_up_and_may_join_again(toy, cli, tmp_path):
    storage = str(tmp_path / "journal.log")
    process = machine(cli, "a", storage, *GRID)
    assert process.stdout.readline().startswith("trial-0000  finished")
    until(lambda: (tmp_path / "a" / "s" / "trial-0001").exists())
    process.send_signal(signal.SIGINT)
    process.wait(60)
    began = time.monotonic()
    common_flags = ["--script", "toy.py", "--quiet", "--name", "s", "--storage", storage]
    sweep.main([*GRID, *common_flags, "--runs-dir", "b", "--", "--fail", "slow"])
    assert time.monotonic() - began < 15  # nobody had to be taken for dead
    assert ended("b")[0]["run"].endswith("/a/s/trial-0000") and sorted(ended("b")) == list(range(6))
    with pytest.raises(common.UsageError, match="shared: give its --storage again"):
        sweep.main(["--resume", "a/s"])
    sweep.main(["--resume", "a/s", "--storage", storage, "--quiet"])
    assert ended("a")[0]["run"] == "trial-0000" and ended("a")[5]["run"].endswith("/b/s/trial-0005")


def test_what_a_machine_brings_that_was_taken_for_dead_does_not_count_twice(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "BEAT", 0.05)
    search = sweep.Search("toy.py", "grid", [sweep.parse_parameter("k=1,2")], [], "val_loss", 2, 42, 1, False, 3, [],
                          [], 1, None, True)  # fmt: skip
    slow, quick = (sweep.SharedSearch(str(tmp_path / "j"), "s", search, name, grace=0.5) for name in ("slow", "quick"))
    line = {"trial": 0, "status": "finished", "metric": 0.5, "run": "trial-0000"}
    assert slow.claim() == (0, {"k": 1})
    quick.queue(0, {"k": 1})  # as if it had found it missing at the same moment: the first ticket holds
    quick.give_up_silent()
    time.sleep(1)
    quick.give_up_silent()
    assert quick.claim() == (1, {"k": 2}) and quick.claim() is None  # the other gives signs of life
    slow.closing.set()
    slow.thread.join()
    quick.give_up_silent()
    time.sleep(0.6)
    quick.give_up_silent()
    assert quick.claim() == (0, {"k": 1})
    slow.end(0, {**line, "metric": 0.1}, 0.1)
    assert quick.ended() == {}
    quick.end(0, line, 0.5)
    assert quick.ended() == slow.ended() == {0: ("quick", line)}
    quick.close()
    assert slow.claim() == (1, {"k": 2})  # given up by the one that closed
    slow.close()


def test_a_bayesian_search_is_shared_until_its_space_is_at_an_end(toy, cli, tmp_path):
    pytest.importorskip("optuna")
    search = ["--method", "bayes", "--param", "x=0.1,0.2,0.3", "--param", "k=1,2", "--count", "9"]
    processes = [machine(cli, name, str(tmp_path / "journal.log"), *search) for name in "ab"]
    for process in processes:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0 and "s: 6 trials have ended" in output
    assert len({str(line["params"]) for line in ended("a").values()}) == 6
    assert {line["metric"] for line in ended("a").values()} == {line["metric"] for line in ended("b").values()}


def test_failed_trials_of_a_shared_search_are_run_again_when_asked_for(toy, tmp_path):
    arguments = [*GRID, "--script", "toy.py", "--quiet", "--name", "s", "--storage", str(tmp_path / "j"), "--runs-dir"]
    sweep.main([*arguments, "a", "--", "--fail", "raise"])
    assert [ended("a")[trial]["status"] for trial in range(6)] == ["finished", "failed"] * 3
    text = (tmp_path / "toy.py").read_text()
    (tmp_path / "toy.py").write_text(text.replace('args.fail == "raise"', "False"))
    sweep.main([*arguments, "b", "--retry-failed", "--", "--fail", "raise"])
    assert {line["status"] for line in ended("b").values()} == {"finished"}
    assert sorted(path.name for path in (tmp_path / "b" / "s").glob("trial-*")) == [
        "trial-0001", "trial-0003", "trial-0005",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--storage", "j"], "--storage needs --name"),
        (["--grace", "20"], "--grace means nothing"),
        (["--storage", "no/j", "--name", "s"], "there is no directory no"),
        (["--storage", "nothing://u:secret@h/d", "--name", "s"], "Can't load plugin"),
        (["--storage", "j", "--name", "s", "--prune"], "--storage and --prune do not go together"),
        (["--storage", "j", "--name", "s", "--engine", "wandb"], "--storage and --engine wandb"),
    ],
)
def test_a_shared_search_that_is_wrong_is_refused(toy, tmp_path, argv, expected):
    with pytest.raises(common.UsageError, match=expected) as caught:
        sweep.main([*GRID, "--script", "toy.py", *argv])
    assert "secret" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_a_storage_holds_one_search_of_a_name_and_says_when_nobody_answers(toy, tmp_path, monkeypatch):
    sweep.main([*GRID, *toy, "--storage", "j"])
    with pytest.raises(common.UsageError, match="j holds another search s: its space is"):
        sweep.main(["--method", "grid", "--param", "x=0.1", *toy, "--storage", "j", "--runs-dir", "other"])
    pytest.importorskip("psycopg")
    monkeypatch.setattr(sweep, "PAUSES", ())
    with pytest.raises(common.RunError, match=r"postgresql://u:\*\*\*@127.0.0.1:1/d: .*refused"):
        sweep.main([*GRID, *toy, "--storage", "postgresql://u:secret@127.0.0.1:1/d", "--runs-dir", "other"])
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------
# trials.jsonl, and the report
# ---------------------------------------------------------------------------------------------------


def a_line(trial):
    return dict.fromkeys(sweep.TRIAL_KEYS) | {"trial": trial, "params": {"text": "x" * 500}}


def append_ten(path, number):
    for index in range(10):
        sweep.append_line(path, a_line(10 * number + index))


def test_lines_appended_by_several_processes_at_once_are_all_there(tmp_path):
    context = multiprocessing.get_context("forkserver")
    path = tmp_path / "trials.jsonl"
    path.write_text('{"torn')
    processes = [context.Process(target=append_ten, args=(path, number)) for number in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(row["trial"] for row in sweep.read_lines(path)) == list(range(50))
    for other in ("no json", '{"trial": 1}', "1"):
        path.write_text(f"{json.dumps(a_line(0))}\n{other}\n{json.dumps(a_line(2))}\n")
        with pytest.raises(common.RunError, match="line 2"):
            sweep.read_lines(path)


def test_a_real_search_with_its_report_reads_the_test_set_for_the_winner_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ["--dataset", "synthetic", "--limit-train", "300", "--model", "dense", "--epochs", "4"]
    space = ["--param", "lr=log:1e-3..1e-1", "--param", "l1=16,64", "--param", "d1=0.0..0.5"]
    argv = ["--method", "random", *space, "--count", "9", "--prune", "--jobs", "2", "--name", "s", "--", *tiny]
    result = sweep.main(argv)
    printed = capsys.readouterr().out
    winner = result["best"]
    assert f"best: {winner['run']}" in printed and f"--lr={winner['params']['lr']}" in printed
    directory = tmp_path / "runs" / "s"
    assert [path.parent.name for path in directory.glob("trial-*/metrics.json")] == [winner["run"]]
    for line in lines():
        assert common.read_record(directory / line["run"])["test"] is None
    expected = {"history", "curves", "parallel", "slices"} | ({"importance"} if find_spec("optuna") else set())
    assert {path.stem for path in directory.glob("*.png")} == expected
    board = (directory / "leaderboard.csv").read_text().splitlines()
    assert board[0].startswith("trial,val_loss,accuracy,epochs") and len(board) == 10
    # The report again, by either script, is the same, and does not read the test set.
    monkeypatch.setattr(evaluate, "run_evaluate", None)
    capsys.readouterr()
    evaluate.main([str(directory)])
    by_evaluate = capsys.readouterr().out
    sweep.main(["--report", str(directory)])
    assert capsys.readouterr().out == by_evaluate and by_evaluate.splitlines()[0].split()[:2] == ["trial", "val_loss"]
    # Two workers died with the parent: none is left behind.
    assert not [process for process in multiprocessing.active_children() if process.is_alive()]
