"""What a run promises when something goes wrong: kills, signals, failing saves, damaged files, no terminal."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import termios
from pathlib import Path

import records
import train_cifar
import train_mnist

import pytest
import torch
from conftest import EVERYTHING_ON, check_same, read_run, run, states_are_equal
from forked import Forked

R = Path("runs/r")
NAMED = ["--runs-dir", "runs", "--run-name", "r"]
ARGV = ["train_cifar", *EVERYTHING_ON, "--tolerance", 12, "--epochs", 12, *NAMED]
RESUME = ["train_cifar", "--resume", "runs/r", "--quiet"]
DENSE = ["--dataset", "synthetic", "--model", "dense", "--schedule", "constant", *NAMED]
DENSE_RESUME = ["train_mnist", *RESUME[1:]]


def start_or_go_on():
    return RESUME if (R / "run.json").exists() else ARGV


def check_files():
    """All files of the run are whole. Returns its status, None where it has not begun."""
    for path in R.glob("*.pt"):
        records.load_checkpoint(path)
    if (R / "log.jsonl").exists():
        assert all(row["epoch"] == number for number, row in enumerate(records.read_log(R), 1))
    return records.read_record(R)["status"] if (R / "run.json").exists() else None


def check_one_line(done, expected, status=1):
    assert done[0] == status and done[1].count("\n") == 1 and expected in done[1], done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    with contextlib.chdir(tmp_path_factory.mktemp("whole")):
        assert Forked(*ARGV).finish() == (0, "")
        return R.absolute()


MOMENTS = random.Random(0)
DISTURBANCES = {
    "kills at thirty random moments": [{MOMENTS.randrange(40): 9} for _ in range(33)],
    # Each process gets a step further than the one before: a start saves four files in three steps each, and so does an
    # epoch, after three batches.
    "kills at every step of the saves": [{moment: 9} for moment in range(28)],
    # One at a time, or a second one in each step of the save that follows the first.
    "signals": [
        dict.fromkeys((first, first + first % 4), (15, 2)[first % 8 > 3]) for first in range(12, 28)
    ],
}


@pytest.mark.parametrize("disturbances", DISTURBANCES.values(), ids=DISTURBANCES)
def test_after_a_run_ends_as_an_undisturbed_one(whole, disturbances):
    ended = 0
    for signals in disturbances:
        done = Forked(*start_or_go_on(), before=f"signals_at({signals})").finish()
        state = check_files()
        number = next(iter(signals.values()))
        if done[0] == 0:  # the run was finished before that moment
            check_same(whole, R)
            shutil.rmtree(R)
            ended += 1
        elif number == 9:
            # It may be the moment after the last save: then the next process finds it finished, and compares.
            assert done[0] == -9
            assert state in ("running", "finished", None)
            assert state != "finished" or read_run(R)[0]["epochs"] == read_run(whole)[0]["epochs"]
        else:
            name = signal.Signals(number).name
            hint = f"interrupted by {name}; go on with: python train_cifar.py --resume runs/r\n"
            check_one_line(done, "interrupted" if len(signals) > 1 else hint, 128 + number)
            assert len(signals) > 1 or state == "interrupted"
    assert ended <= 3
    assert Forked(*start_or_go_on()).finish() == (0, "")
    check_same(whole, R)


def test_runs_started_together_do_not_mix():
    argv = [*ARGV[:-2], "--epochs", 1, "--seed"]
    processes = [Forked(*argv, seed, err=f"err{seed}") for seed in range(12)]
    assert {process.finish() for process in processes} == {(0, "")}
    found = [read_run(directory)[0] for directory in Path("runs").iterdir()]
    assert sorted(record["seed"] for record in found) == [*range(12)]
    assert {record["status"] for record in found} == {"finished"}


# ------------------------------ Saves that fail ------------------------------


@pytest.fixture
def interrupted(few_images):
    """A run that has two epochs behind it and four before."""
    return run(train_mnist, *DENSE, "--quiet", "--epochs", 6, "--stop-after", 2)[0]


DENIED = "cannot be written: Permission denied"
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
FAILURES = {  # what happens at first, and after each epoch
    "no room for run.json": (LIMIT.format(1000), "", "run.json cannot be written: File too large"),
    "no room for last.pt": (LIMIT.format(10**6), "", "last.pt cannot be written: File too large"),
    "the directory takes no file": ("as_an_ordinary_user(), os.chmod('runs/r', 0o555)", "", DENIED),
    "it takes no more": ("as_an_ordinary_user()", "os.chmod('runs/r', 0o555)", DENIED),
}


@pytest.mark.parametrize(("before", "each_epoch", "message"), FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_is_one_line_and_leaves_what_was_there(
    interrupted, before, each_epoch, message
):
    there = {path: path.read_bytes() for path in R.glob("*.pt")}
    check_one_line(Forked(*DENSE_RESUME, before=before, each_epoch=each_epoch).finish(), message)
    assert all(path.read_bytes() == there[path] for path in there) == (not each_epoch)
    R.chmod(0o755)
    assert check_files()
    assert not list(R.glob(".*.tmp"))
    assert len(run(train_mnist, *DENSE_RESUME[1:])[2]) == 6


def test_a_run_whose_saves_fail_at_every_moment_ends_as_an_undisturbed_one(
    whole, few_images, monkeypatch
):
    def save(descriptor):
        if next(saves) == moment:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    fsync = os.fsync
    moment = -1
    record = {"status": "failed"}
    monkeypatch.setattr(os, "fsync", save)
    while record["status"] == "failed":
        moment = moment + 1
        saves = itertools.count()
        with contextlib.suppress(records.RunError):
            _, record, _ = run(train_cifar, *start_or_go_on()[1:])
        state = check_files()
        assert state in (record["status"], "running", None)
        assert not list(R.glob(".*.tmp"))
        # It is running still only where the last save failed, that of how the run has ended.
        assert state != "running" or read_run(R)[0]["epochs"] == read_run(whole)[0]["epochs"]
    assert moment > 8
    check_same(whole, R)


def test_who_has_opened_a_file_reads_it_whole_when_it_is_saved_anew(few_images):
    def open_all(row):
        for path in R.glob("[!.]*"):
            opened.append((files.enter_context(path.open("rb")), path.read_bytes()))

    with contextlib.ExitStack() as files:
        opened = []
        run(train_mnist, *DENSE, "--quiet", "--epochs", 3, on_epoch=open_all)
        assert len(opened) == 12
        assert all(file.read() == content for file, content in opened)


def test_a_name_is_free_when_its_run_was_killed_before_it_began(few_images):
    R.mkdir(parents=True)
    (R / "data.csv").write_text("a file of the user's")
    with pytest.raises(records.UsageError, match="exists already"):
        run(train_mnist, *DENSE, "--epochs", 1)
    assert (R / "data.csv").read_text() == "a file of the user's"

    # What a run wrote before its run.json; only its lock tells.
    (R / ".lock").touch()
    assert run(train_mnist, *DENSE, "--epochs", 1)[1]["status"] == "finished"


def test_a_diverged_run_is_one_line_and_status_1():
    argv = [*DENSE, "--quiet", "--lr", "1e30", "--optimizer", "sgd"]
    done = Forked("train_mnist", *argv).finish()
    check_one_line(done, "in epoch 1; try a lower --lr. The epochs before are in runs/r")


# ------------------------------ Checkpoints that are not to be trusted ------------------------------


def test_a_checkpoint_of_another_run_or_version_or_half_of_one_is_refused(interrupted):
    other, _, _ = run(train_mnist, *DENSE, "--run-name", "other", "--quiet", "--epochs", 1)
    content = (other / "last.pt").read_bytes()
    state = records.load_checkpoint(other / "last.pt")
    records.save_checkpoint(other / "last.pt", state | {"format": 1})
    for damage, message in (
        (content, "is of another run, other"),
        ((other / "last.pt").read_bytes(), "is not of this version"),
        (content[:1000], "is damaged, or is not a checkpoint"),
        (None, "is missing"),
    ):
        (R / "last.pt").write_bytes(damage) if damage else (R / "last.pt").unlink()
        with pytest.raises(records.RunError, match=f"runs/r/last.pt {message}"):
            run(train_mnist, *DENSE_RESUME[1:])
    records.write_json(R / "run.json", {**records.read_record(R), "format": 1})
    done = Forked(*DENSE_RESUME).finish()
    check_one_line(done, "runs/r/run.json is not of this version", status=2)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "last.pt"
    records.save_checkpoint(path, {"weights": torch.arange(5.0)})
    content = bytearray(path.read_bytes())
    state = records.load_checkpoint(path)
    for position in range(len(content)):
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        content[position] ^= 1 << position % 8
        with contextlib.suppress(records.RunError):
            assert states_are_equal(records.load_checkpoint(path), state)


def test_a_checkpoint_that_would_run_code_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    records.save_checkpoint(tmp_path / "last.pt", {"epoch": Bomb()})
    with pytest.raises(records.RunError, match="not a checkpoint"):
        records.load_checkpoint(tmp_path / "last.pt")
    assert not Path("executed").exists()


# ------------------------------ Terminals, pipes ------------------------------


@pytest.mark.parametrize(
    ("before", "last"),
    [
        ("os.close(1), os.close(2)", ""),
        ("sys.stdout.reconfigure(encoding='ascii')", "finished: runs/\\u732b \\xf1\n"),
    ],
)
def test_outputs_may_be_closed_or_lack_characters(before, last):
    argv = [*DENSE, "--epochs", 2, "--run-name", "猫 ñ"]
    assert Forked("train_mnist", *argv, before=before).finish() == (0, "")
    directory = Path("runs/猫 ñ")
    assert read_run(directory)[0]["status"] == "finished"
    assert Path("out").read_text().endswith(last)
    # What is printed goes into no file that has taken an output's place.
    assert not (directory / ".lock").read_bytes()


def test_a_reader_may_go_away():
    os.mkfifo("pipe")
    process = Forked("train_mnist", *DENSE, "--epochs", 3, out="pipe")
    with open("pipe") as pipe:
        pipe.readline()
    assert process.finish() == (0, "")
    assert read_run(R)[0]["status"] == "finished"
    assert len(read_run(R)[1]) == 3


def test_a_terminal_gets_a_bar():
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    name = os.ttyname(terminal)
    process = Forked("train_mnist", *DENSE, "--epochs", 1, out=name, err=name).process
    process.join(300)
    screen = os.read(controller, 2**16)
    assert process.exitcode == 0
    assert b"\r" in screen
    assert b"epoch 1/1:" in screen
    assert b"finished: runs/r" in screen
