"""Searches: running, resuming, pruning, failures, many machines, and the report."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import sweep
import train_mnist

import pytest

# A script of the user's own, with a metric that follows from its parameters, and ways to fail. It leaves what a sweep
# reads of a run, and takes so little time that what is tested is the sweep. A trial waits for as long as there is a
# file hold-<its name> or hold-all beside the sweep's directory.
TOY = """
import argparse, json, os, pathlib, signal, time
import common

def parse_arguments(argv):
    parser = common.ArgumentParser(prog="toy.py")
    for name, kind in ("x", float), ("k", int), ("seed", int), ("stop-after", int), ("run-name", str), ("fail", str):
        parser.add_argument(f"--{name}", type=kind, default={"x": 0.0, "k": 1}.get(name))
    for name in ("--resume", "--runs-dir"):
        parser.add_argument(name, type=pathlib.Path)
    for name in ("--no-test", "--quiet"):
        parser.add_argument(name, action="store_true")
    parser.set_defaults(epochs=8)
    return parser.parse_args(argv)

def main(argv):
    args = parse_arguments(argv)
    if args.resume:
        directory, rows = args.resume, common.read_log(args.resume)
        old = common.read_json(directory / "run.json")["args"]
        args = argparse.Namespace(**{**old, "stop_after": args.stop_after})
    else:
        directory, rows = args.runs_dir / args.run_name, []
        directory.mkdir()
        (directory / "last.pt").touch()
    if args.fail == "all" or args.fail == "raise" and args.k == 2:
        raise ValueError(f"k is {args.k}")
    if args.fail == "die" and args.k == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while any((directory.parent.parent / f"hold-{name}").exists() for name in ("all", directory.name)):
        time.sleep(0.01)
    before = len(rows)
    for epoch in range(before + 1, min(args.epochs, args.stop_after or args.epochs) + 1):
        loss = (args.x - 0.3) ** 2 + args.k / 10 + 1 / epoch + args.seed / 1000
        rows.append({"epoch": epoch, "val_loss": loss, "val_acc": 1 / (1 + loss), "went_on_from": before})
    record = {"args": {key: getattr(args, key) for key in ("x", "k", "epochs", "seed", "fail")}, "epochs": len(rows),
              "status": "finished" if len(rows) == args.epochs else "interrupted", "best": rows[-1], "error": None}
    if args.fail == "diverge" and args.k == 2:
        record.update(status="diverged", best=None, error="the loss became nan")
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    (directory / "run.json").write_text(json.dumps(record))
    return record
"""
GRID = ["--method", "grid", "--param", "x=0.1,0.2,0.3", "--param", "k=1,2"]


@pytest.fixture(autouse=True)
def nothing_is_left_for_the_next_test(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a sweep adds the place of its script
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever account this user has
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "draw_sweep", lambda sweep: {})  # the pictures are another test's
    (tmp_path / "toy.py").write_text(TOY)
    return ["--script", "toy.py", "--runs-dir", "runs", "--quiet", "--name", "s"]


def ended(directory="runs", name="s"):
    """The lines of trials.jsonl of a sweep, which come in no certain order."""
    return {line["trial"]: line for line in lines(directory, name)}


def lines(directory="runs", name="s"):
    return sweep.read_lines(Path(directory, name, "trials.jsonl"))


def results(name):
    """What the trials of a sweep gave, in their order."""
    rows = sorted(lines(name=name), key=lambda row: row["trial"])
    return [[row[key] for key in ("trial", "params", "status", "metric", "epochs")] for row in rows]


def until(condition):
    """Wait for it, some minutes at most."""
    end = time.monotonic() + 600
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


def program(argv, prepare, name):
    for descriptor, path in ((1, f"{name}.out"), (2, f"{name}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sweep.draw_sweep, sys.argv = lambda sweep: {}, ["sweep.py", *argv]
    if prepare:
        prepare()
    sys.exit(common.command_line(sweep.main))


def start(*argv, prepare=None, name="sweep"):
    """sweep.py with these arguments in a process forked from one that has imported torch; it prints into `name`.out
    and .err, and draws nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sweep.PRELOADED)
    process = context.Process(target=program, args=(argv, prepare, name))
    process.start()
    return process


def killed_with_its_first_trial_ended():
    """Have this process die when the line of the first trial is on the disk: the second that it writes there."""
    writes, fsync = itertools.count(1), os.fsync
    os.fsync = lambda file: (fsync(file), next(writes) == 2 and os.kill(os.getpid(), signal.SIGKILL))


# ---------------- Which trials ----------------


def test_a_random_search_follows_from_its_seed_repeats_nothing_and_ends_where_the_space_does(capsys):
    def planned(*argv):
        sweep.main(["--method", "random", "--dry-run", *argv])
        return [line.split("python ")[1] for line in capsys.readouterr().out.splitlines()]

    whole = planned()
    assert whole == planned() != planned("--seed", "1")
    assert len(set(whole)) == 20 and planned("--count", "5") == whole[:5]
    small = planned("--param", "l1=1,2,3", "--count", "10")
    assert sorted(line.split("--l1=")[1][0] for line in small) == ["1", "2", "3"]


def test_the_tutorials_searches_are_the_defaults(capsys):
    sweep.main(["--method", "grid", "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and "--c1=48 --c2=96 --l1=256" in printed[0] and "--c1=96 --c2=192 --l1=512" in printed[7]
    assert all("--epochs 10 --lr 0.001 --batch-size 512 --tolerance 3" in line for line in printed)
    sweep.main(["--method", "bayes", "--dry-run"])
    assert "lr: 0.0001 to 0.1, logarithmic" in capsys.readouterr().out


def test_a_script_is_loaded_as_it_is_imported_and_takes_no_other_modules_place(tmp_path, capsys):
    (tmp_path / "train_mnist.py").write_text("def main(argv): ...")
    for script in (common.HERE / "train_mnist.py", tmp_path / "train_mnist.py"):
        sweep.main(["--method", "grid", "--param", "lr=0.1", "--script", str(script), "--dry-run", "--", "--epochs=3"])
        assert f"python {script} --epochs=3 --lr=0.1" in capsys.readouterr().out
        assert sys.modules["train_mnist"] is train_mnist


# ---------------- Running ----------------


def test_a_grid_runs_every_combination_once_whatever_the_number_of_jobs(toy):
    for jobs in ("1", "2"):
        sweep.main([*toy[:-1], jobs, *GRID, "--jobs", jobs])
        assert [(row["status"], row["epochs"]) for row in lines(name=jobs)] == [("finished", 8)] * 6
    assert results("1") == results("2") and len({str(row["params"]) for row in lines(name="2")}) == 6
    best = json.loads(Path("runs/2/best/run.json").read_text())
    assert (best["args"]["x"], best["args"]["k"]) == (0.3, 1)


def test_a_trial_that_fails_is_recorded_and_does_not_end_the_sweep(toy):
    for way, error in (("raise", "ValueError: k is 2"), ("die", "its process died (exit code -9)")):
        name = [*toy[:-1], way]
        sweep.main([*name, *GRID, "--jobs", "2", "--max-failures", "9", "--", "--fail", way])
        rows = ended(name=way)
        assert [rows[trial]["status"] for trial in range(6)] == ["finished", "failed"] * 3
        assert {row["error"] for row in rows.values()} == {None, error}
    # Nothing is left to do. With --retry-failed the failed ones run once more, and only those.
    sweep.main([*name, *GRID, "--max-failures", "9", "--", "--fail", way])
    assert len(lines(name="die")) == 6
    sweep.main(["--resume", "runs/die", "--retry-failed", "--max-failures", "9", "--quiet"])
    assert sorted(row["trial"] for row in lines(name="die")[6:]) == [1, 3, 5]


def test_a_sweep_stops_after_so_many_failures_in_a_row(toy):
    with pytest.raises(common.RunError, match=r"3 trials in a row failed.*ValueError: k is 1.*--resume runs/s"):
        sweep.main([*toy, *GRID, "--", "--fail", "all"])
    assert len(lines()) == 3


def test_pruning_continues_the_best_from_where_they_were_and_says_where_the_others_ended(toy):
    space = ["--param", "x=0.1,0.3,0.5,0.7,0.9", "--param", "k=1,2"]
    sweep.main([*toy, "--method", "grid", *space, "--prune", "--eta", "2"])
    rows = ended().values()
    # Ten trials at epoch 1, the best five at 2, three at 4, two at 8: by x nearest to 0.3, and k 1 before 2.
    assert sorted(row["epochs"] for row in rows) == [1] * 5 + [2] * 2 + [4] + [8] * 2
    finished = sorted((row["params"]["x"], row["params"]["k"]) for row in rows if row["status"] == "finished")
    assert finished == [(0.1, 1), (0.3, 1)] or finished == [(0.3, 1), (0.5, 1)]
    assert {row["status"] for row in rows if row["epochs"] < 8} == {"pruned"}
    log = common.read_log(Path("runs/s/trial-0002"))
    assert [row["went_on_from"] for row in log] == [0, 1, 2, 2, 4, 4, 4, 4]


def test_the_band_rule_of_a_wandb_config_ends_what_is_not_among_the_best_at_a_band(toy, tmp_path):
    config = {"program": "toy.py", "method": "grid", "parameters": {"x": {"values": [0.3, 0.5, 0.4, 0.35]}}}
    for name, bands in (("s", {"min_iter": 2}), ("t", {"max_iter": 8, "s": 2})):  # 2, 4, 8, ... and 2, 4
        config["early_terminate"] = {"type": "hyperband", "eta": 2, **bands}
        (tmp_path / "sweep.json").write_text(json.dumps(config))
        sweep.main(["--config", "sweep.json", *toy[2:-1], name])
        rows = {row["params"]["x"]: (row["status"], row["epochs"]) for row in lines(name=name)}
        # The first at a band has nobody to fear; 0.4 is second of three at epoch 2, of whom two go on, and of two at 4.
        assert rows == {0.3: ("finished", 8), 0.5: ("pruned", 2), 0.4: ("pruned", 4), 0.35: ("finished", 8)}


def test_several_seeds_are_averaged(toy):
    sweep.main([*toy, "--method", "grid", "--param", "k=1,2", "--seeds", "3"])
    assert [(row["params"]["k"], row["seed"]) for row in lines()] == [(k, s) for k in (1, 2) for s in (42, 43, 44)]
    heading, *rows = (line.split(",") for line in Path("runs/s/leaderboard.csv").read_text().splitlines())
    first, second = (dict(zip(heading, row, strict=True)) for row in rows)
    assert (first["k"], second["k"]) == ("1", "2") and float(first["std"]) == pytest.approx(0.001)
    assert float(first["val_loss"]) == pytest.approx(0.09 + 0.1 + 1 / 8 + 0.043)


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
    sweep.main([*toy, "--method", "bayes", "--param", "k=1,2,3", "--param", "x=0.1,0.2", "--count", "9"])
    assert len({json.dumps(row["params"]) for row in lines()}) == len(lines()) == 6


def test_a_bayesian_search_learns_is_seeded_and_continues_from_its_lines(toy):
    space = ["--method", "bayes", "--param", "x=0.0..1.0", "--param", "k=1,2,3"]
    sweep.main([*toy, *space, "--count", "6"])
    sweep.main(["--resume", "runs/s", "--count", "12", "--quiet"])
    rows = lines()
    sweep.main([*toy[:-1], "twin", *space, "--count", "6"])
    assert [row["params"] for row in lines(name="twin")] == [row["params"] for row in rows[:6]]
    assert [row["trial"] for row in rows] == list(range(12))
    assert len({json.dumps(row["params"]) for row in rows}) == 12
    assert min(row["metric"] for row in rows) < 0.2251 + 0.043
    with pytest.raises(common.UsageError, match="leave out --param"):
        sweep.main(["--resume", "runs/s", "--param", "x=1,2"])
    with pytest.raises(common.UsageError, match="another search: its method is bayes"):
        sweep.main([*toy, *GRID])


REAL = ["--method", "grid", "--script", "few.py", "--param", "lr=0.001,0.003", "--param", "l1=8,16", "--quiet"]
REAL += ["--jobs", "2", "--threads", "1", "--runs-dir", "runs"]
REAL_FLAGS = ["--", "--dataset", "synthetic", "--model", "dense", "--epochs", "8"]
FEW = "import forked, train_mnist\nfrom train_mnist import *\ntrain_mnist.synthetic = forked.few_digits\n"


def test_killed_and_continued_a_sweep_ends_as_an_undisturbed_one(few_images, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "report", lambda *arguments: {})
    Path("few.py").write_text(FEW)
    process = start(*REAL, "--name", "killed", *REAL_FLAGS, prepare=killed_with_its_first_trial_ended)
    process.join(600)
    killed = tmp_path / "runs" / "killed"
    until(lambda: not any(common.is_locked(path) for path in killed.glob("trial-*/.lock")))
    before = lines(name="killed")
    assert process.exitcode == -signal.SIGKILL and len(before) == 1
    with open(killed / "trials.jsonl", "a") as file:
        file.write('{"trial": 3, "par')
    sweep.main(["--resume", str(killed), "--jobs", "2", "--quiet"])
    sweep.main([*REAL, "--name", "undisturbed", *REAL_FLAGS])
    assert lines(name="killed")[:1] == before and results("killed") == results("undisturbed")
    assert [trial for trial, *_ in results("killed")] == list(range(4))


def test_a_signal_ends_the_sweep_and_says_how_to_go_on(toy, cli, tmp_path):
    (held,) = hold("runs", trial="trial-0001")
    process = cli("sweep.py", *GRID, "--script", "toy.py", "--runs-dir", "runs", "--name", "s", start=True)
    assert process.stdout.readline().startswith("trial-0000  finished")
    until((tmp_path / "runs" / "s" / "trial-0001").exists)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and "sweep.py --resume runs/s" in error and len(error.splitlines()) == 1
    before = lines()
    assert [(row["trial"], row["status"]) for row in before] == [(0, "finished")]
    held.unlink()
    with common.locked(tmp_path / "runs" / "s" / ".lock"), pytest.raises(common.RunError, match="in use"):
        sweep.main(["--resume", "runs/s", "--quiet"])
    sweep.main(["--resume", "runs/s", "--quiet"])
    assert lines()[:1] == before and sorted(row["trial"] for row in lines()) == list(range(6))


def test_a_sweep_lies_beside_the_scripts_and_never_over_another(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path / "house")
    argv = ["--method", "grid", "--param", "k=1", "--script", "toy.py", "--quiet"]
    sweep.main(argv)
    (directory,) = (tmp_path / "house" / "runs").glob("sweep-20*")
    assert (directory / "best" / "run.json").exists()
    make = Path.mkdir
    # Another process makes it at the same moment, and has ended.
    monkeypatch.setattr(Path, "mkdir", lambda path, **how: (make(path, **how), (path / "sweep.json").write_text("{}")))
    with pytest.raises(common.UsageError, match="exists already"):
        sweep.main([*argv, "--name", "s"])
    assert (tmp_path / "house" / "runs" / "s" / "sweep.json").read_text() == "{}"


# ---------------- Many machines: each is a process with a runs directory of its own ----------------


@pytest.fixture(scope="session")
def postgresql():
    """The URL of a PostgreSQL server that lives as long as the tests."""
    pytest.importorskip("psycopg")
    places = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))), os.environ["PATH"]]
    program = shutil.which("pg_ctl", path=os.pathsep.join(places))
    if not program:
        pytest.skip("no PostgreSQL server is installed (Debian: postgresql)")
    directory = Path(tempfile.mkdtemp(prefix="postgresql-"))  # another user can reach it, and a socket's name fits
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

    pg_ctl("init", "-o", "--auth=trust --username=sweep")
    pg_ctl("start", "-o", f"-p {port} -k {directory} -c listen_addresses=127.0.0.1", "-l", directory / "log")
    yield f"postgresql://sweep@127.0.0.1:{port}/postgres"
    pg_ctl("stop", "-m", "immediate")
    shutil.rmtree(directory)


def machine(name, storage, *argv):
    """A process that takes trials from a shared search, as a machine would; its runs directory is `name`."""
    shared = ["--script", "toy.py", "--name", "s", "--runs-dir", name, "--storage", storage, "--grace", "15"]
    return start(*argv, *shared, name=name)


def test_three_machines_share_a_search_and_the_trial_of_a_dead_one_is_run_by_another(toy, postgresql):
    held = hold("a", "b", "c")
    a, b, c = (machine(name, postgresql, *GRID[:-1], "k=1,2,3,4") for name in "abc")
    until(lambda: all(any(Path(name, "s").glob("trial-*/last.pt")) for name in "abc"))
    b.kill()
    b.join(600)
    (lost,) = (int(path.name[-4:]) for path in Path("b/s").glob("trial-*"))
    for file in held:
        file.unlink()
    for process, name in ((a, "a"), (c, "c")):
        process.join(600)
        assert process.exitcode == 0 and not Path(f"{name}.err").read_text()
        assert f"{name}/s: 12 trials have ended" in Path(f"{name}.out").read_text()
    for first, other in ("ac", "ca"):
        rows = ended(first)
        assert sorted(rows) == list(range(12)) and len({str(row["params"]) for row in rows.values()}) == 12
        here = {trial for trial, row in rows.items() if row["run"] == f"trial-{trial:04}"}
        assert here and here == {int(path.name[-4:]) for path in Path(first, "s").glob("trial-*")}
        assert [rows[trial]["metric"] for trial in range(12)] == [ended(other)[trial]["metric"] for trial in range(12)]
        assert all(f"/{other}/s/trial-" in rows[trial]["run"] for trial in rows.keys() - here)
    assert lost in ended("a")


def test_a_machine_that_is_told_to_stop_gives_its_trial_up_and_may_join_again(toy, tmp_path):
    storage = str(tmp_path / "journal.log")
    (held,) = hold("a", trial="trial-0001")
    process = machine("a", storage, *GRID)
    until((tmp_path / "a" / "s" / "trial-0001").exists)
    os.kill(process.pid, signal.SIGINT)
    process.join(600)
    assert process.exitcode == 130 and sorted(ended("a")) == [0]
    held.unlink()
    # Nobody has to be taken for dead: that would take a week.
    shared = ["--script", "toy.py", "--quiet", "--name", "s", "--storage", storage, "--grace", "600000"]
    sweep.main([*GRID, *shared, "--runs-dir", "b"])
    assert ended("b")[0]["run"].endswith("/a/s/trial-0000") and sorted(ended("b")) == list(range(6))
    with pytest.raises(common.UsageError, match="shared: give its --storage again"):
        sweep.main(["--resume", "a/s"])
    sweep.main(["--resume", "a/s", "--storage", storage, "--quiet"])
    assert ended("a")[0]["run"] == "trial-0000" and ended("a")[5]["run"].endswith("/b/s/trial-0005")


def test_what_a_machine_brings_that_was_taken_for_dead_does_not_count_twice(toy, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweep, "BEAT", 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    search = sweep.Search("toy.py", "grid", [sweep.parse_parameter("k=1,2")], [], "val_loss", 2, 42, 1, False, 3, [],
                          [], 1, None, True)  # fmt: skip
    slow, quick = (sweep.SharedSearch(str(tmp_path / "j"), "s", search, name, grace=60) for name in ("slow", "quick"))
    line = {"trial": 0, "status": "finished", "metric": 0.5, "run": "trial-0000"}
    assert slow.claim() == (0, {"k": 1})
    quick.queue(0, {"k": 1})  # as if it had found it missing at the same moment: the first ticket holds
    quick.give_up_silent()
    now[0], signs = 100, {None}
    while len(signs) < 3:  # two beats
        signs.add(quick.study.get_trials()[0].user_attrs.get("beat"))
    quick.give_up_silent()
    assert quick.claim() == (1, {"k": 2}) and quick.claim() is None  # the other gives signs of life
    slow.closing.set()
    slow.thread.join()
    for now[0] in (200, 261):
        quick.give_up_silent()
    assert quick.claim() == (0, {"k": 1})
    slow.end(0, {**line, "metric": 0.1}, 0.1)
    assert quick.ended() == {}
    quick.end(0, line, 0.5)
    assert quick.ended() == slow.ended() == {0: ("quick", line)}
    quick.close()
    assert slow.claim() == (1, {"k": 2})  # given up by the one that closed
    slow.close()


def test_a_bayesian_search_is_shared_until_its_space_is_at_an_end(toy, tmp_path):
    search = ["--method", "bayes", "--param", "x=0.1,0.2,0.3", "--param", "k=1,2", "--count", "9"]
    held = hold("a", "b")
    processes = [machine(name, str(tmp_path / "journal.log"), *search) for name in "ab"]
    until(lambda: all(any(Path(name, "s").glob("trial-*")) for name in "ab"))
    for file in held:
        file.unlink()
    for process, name in zip(processes, "ab", strict=True):
        process.join(600)
        assert process.exitcode == 0 and "s: 6 trials have ended" in Path(f"{name}.out").read_text()
    assert len({str(line["params"]) for line in ended("a").values()}) == 6
    assert {line["metric"] for line in ended("a").values()} == {line["metric"] for line in ended("b").values()}


def test_failed_trials_of_a_shared_search_are_run_again_when_asked_for(toy, tmp_path):
    arguments = [*GRID, "--script", "toy.py", "--quiet", "--name", "s", "--storage", str(tmp_path / "j"), "--runs-dir"]
    sweep.main([*arguments, "a", "--", "--fail", "raise"])
    assert [ended("a")[trial]["status"] for trial in range(6)] == ["finished", "failed"] * 3
    (tmp_path / "toy.py").write_text(TOY.replace('args.fail == "raise"', "False"))
    sweep.main([*arguments, "b", "--retry-failed", "--", "--fail", "raise"])
    assert {line["status"] for line in ended("b").values()} == {"finished"}
    assert sorted(path.name for path in Path("b/s").glob("trial-*")) == ["trial-0001", "trial-0003", "trial-0005"]


def test_a_storage_holds_one_search_of_a_name_and_says_when_nobody_answers(toy, tmp_path, monkeypatch):
    sweep.main([*GRID, *toy, "--storage", "j"])
    with pytest.raises(common.UsageError, match="j holds another search s: its space is"):
        sweep.main(["--method", "grid", "--param", "x=0.1", *toy, "--storage", "j", "--runs-dir", "other"])
    pytest.importorskip("psycopg")
    monkeypatch.setattr(sweep, "PAUSES", ())
    with pytest.raises(common.RunError, match=r"postgresql://u:\*\*\*@127.0.0.1:1/d: .*refused"):
        sweep.main([*GRID, *toy, "--storage", "postgresql://u:secret@127.0.0.1:1/d", "--runs-dir", "other"])
    assert not (tmp_path / "other").exists()


# ---------------- trials.jsonl, and the report ----------------


def test_a_line_is_appended_under_a_lock_and_behind_whole_lines(tmp_path, monkeypatch):
    path, locked = tmp_path / "trials.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda file: locked.append(common.is_locked(tmp_path / ".trials.jsonl.lock")))
    path.write_text('{"torn')
    first, second = (dict.fromkeys(sweep.TRIAL_KEYS) | {"trial": trial, "params": {}} for trial in (1, 2))
    for line in (first, second):
        sweep.append_line(path, line)
    assert sweep.read_lines(path) == [first, second] and locked == [True, True]
    for other in ("no json", '{"trial": 1}', "1"):
        path.write_text(f"{json.dumps(first)}\n{other}\n{json.dumps(second)}\n")
        with pytest.raises(common.RunError, match="line 2"):
            sweep.read_lines(path)


def test_a_real_search_with_its_report_reads_the_test_set_for_the_winner_alone(tmp_path, monkeypatch, capsys):
    tiny = ["--dataset", "synthetic", "--limit-train", "300", "--model", "dense", "--epochs", "4"]
    space = ["--param", "lr=log:1e-3..1e-1", "--param", "l1=16,64", "--param", "d1=0.0..0.5"]
    argv = ["--method", "random", *space, "--count", "9", "--prune", "--jobs", "2", "--name", "s", "--runs-dir", "runs"]
    winner = sweep.main([*argv, "--", *tiny])["best"]
    printed = capsys.readouterr().out
    assert f"best: {winner['run']}" in printed and f"--lr={winner['params']['lr']}" in printed
    directory = tmp_path / "runs" / "s"
    assert [path.parent.name for path in directory.glob("trial-*/metrics.json")] == [winner["run"]]
    for line in lines():
        record = common.read_record(directory / line["run"])
        assert record["test"] is None and record["args"]["runs_dir"] == str(directory)
    expected = {"history", "curves", "parallel", "slices", "importance"}
    assert {path.stem for path in directory.glob("*.png")} == expected
    board = (directory / "leaderboard.csv").read_text().splitlines()
    assert board[0].startswith("trial,val_loss,accuracy,epochs") and len(board) == 10
    # The report again is the same, and does not read the test set.
    for path in (*directory.glob("*.png"), directory / "leaderboard.csv", *directory.glob("trial-*/metrics.json")):
        path.unlink()
    sweep.main(["--report", str(directory)])
    again = capsys.readouterr().out
    assert again in printed and again.splitlines()[0].split()[:2] == ["trial", "val_loss"]
    assert {path.stem for path in directory.glob("*.png")} == expected and not [*directory.glob("*/metrics.json")]
    assert (directory / "leaderboard.csv").read_text().splitlines() == board
    # The workers ended with the sweep: none is left behind.
    assert not [process for process in multiprocessing.active_children() if process.is_alive()]
