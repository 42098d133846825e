"""What a run promises when something goes wrong: kills, signals, failing saves, damaged files, no
terminal."""

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
from conftest import EVERYTHING_ON, check_same, run, states_are_equal
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
        epochs = [row["epoch"] for row in records.read_log(R)]
        assert epochs == [*range(1, len(epochs) + 1)]
    if (R / "run.json").exists():
        return records.read_record(R)["status"]


def check_one_line(done, expected, status=1):
    """A program that is `done` has ended with this status, and one line in which that is said."""
    assert done[0] == status, done
    assert done[1].count("\n") == 1, done
    assert expected in done[1], done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    with contextlib.chdir(tmp_path_factory.mktemp("whole")):
        assert Forked(*ARGV).finish() == (0, "")
        return R.absolute()


def is_complete(whole):
    """Whether the run has all epochs that an undisturbed one has."""
    return records.read_record(R)["epochs"] == records.read_record(whole)["epochs"]


# ------------------------ Kills and signals ------------------------
MOMENTS = random.Random(0)
DISTURBANCES = {
    "kills at thirty random moments": [{MOMENTS.randrange(40): 9} for _ in range(33)],
    # Each process gets a step further than the one before: a start saves four files in three steps
    # each, and so does an epoch, after three batches.
    "kills at every step of the saves": [{moment: 9} for moment in range(28)],
    # One at a time, or a second one in each step of the save that follows the first.
    "signals": [
        dict.fromkeys((first, first + first % 4), (15, 2)[first % 8 > 3]) for first in range(12, 28)
    ],
}


@pytest.mark.parametrize("disturbances", DISTURBANCES.values(), ids=DISTURBANCES)
def test_after_a_run_ends_as_an_undisturbed_one(whole, disturbances):
    """Whenever a run is killed or interrupted, no file is lost, and it goes on to the bit."""
    ended = 0
    for signals in disturbances:
        done = Forked(*start_or_go_on(), before=f"signals_at({signals})").finish()
        state = check_files()
        number = next(iter(signals.values()))

        # The run was finished before that moment: begin anew.
        if done[0] == 0:
            check_same(whole, R)
            shutil.rmtree(R)
            ended += 1

        # It was killed. At the moment after the last save the next process finds it finished, and
        # compares.
        elif number == 9:
            assert done[0] == -9
            assert state in ("running", "finished", None)
            assert state != "finished" or is_complete(whole)

        # It was interrupted. A second signal may come while the run writes that down.
        else:
            name = signal.Signals(number).name
            hint = f"interrupted by {name}; go on with: python train_cifar.py --resume runs/r\n"
            check_one_line(done, "interrupted" if len(signals) > 1 else hint, 128 + number)
            assert len(signals) > 1 or state == "interrupted"
    assert ended <= 3
    assert Forked(*start_or_go_on()).finish() == (0, "")
    check_same(whole, R)


def test_runs_started_together_do_not_mix():
    """Trainings that begin in the same second have a directory each."""
    argv = [*ARGV[:-2], "--epochs", 1, "--seed"]
    processes = [Forked(*argv, seed, err=f"err{seed}") for seed in range(12)]
    assert {process.finish() for process in processes} == {(0, "")}
    seeds = [records.read_record(directory)["seed"] for directory in Path("runs").iterdir()]
    assert sorted(seeds) == [*range(12)]


def test_a_name_is_free_when_its_run_was_killed_before_it_began(few_images):
    """But a directory with files of somebody else's is not taken."""
    argv = [*DENSE, "--quiet", "--epochs", 1]
    R.mkdir(parents=True)
    theirs = R / "data.csv"
    theirs.write_text("a file of the user's")
    with pytest.raises(records.UsageError, match="exists already"):
        run(train_mnist, *argv)
    assert theirs.read_text() == "a file of the user's"

    # What a run wrote before its run.json; only its lock tells.
    (R / ".lock").touch()
    assert run(train_mnist, *argv)[1]["status"] == "finished"


# ------------------------ Trainings and saves that fail ------------------------
@pytest.mark.parametrize(
    ("flags", "before", "message", "error"),
    [
        (
            ["--lr", "1e30", "--optimizer", "sgd"],
            "",
            "in epoch 1; try a lower --lr. The epochs before are in runs/r",
            "the loss became ",
        ),
        (
            [],
            "register_optimizer_step_post_hook(lambda *_: torch.empty(2**50))",
            "; try a smaller --batch-size or model",
            "RuntimeError: ",
        ),
        (
            [],
            "register_optimizer_step_post_hook(lambda *_: bytearray(2**60))",
            "error: out of memory; try a smaller --batch-size or model",
            "MemoryError: ",
        ),
    ],
    ids=["a loss that is not finite", "too little for torch", "too little for Python"],
)
def test_a_training_that_fails_is_one_line_and_status_1(flags, before, message, error):
    """The line says what to do, and run.json what was the matter."""
    done = Forked("train_mnist", *DENSE, "--quiet", *flags, before=before).finish()
    check_one_line(done, message)
    assert records.read_record(R)["error"].startswith(error)


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
    """On a full disk, or without the right to write, no epoch is lost that was saved."""
    there = {path: path.read_bytes() for path in R.glob("*.pt")}
    check_one_line(Forked(*DENSE_RESUME, before=before, each_epoch=each_epoch).finish(), message)
    is_as_before = all(path.read_bytes() == content for path, content in there.items())
    assert is_as_before == (not each_epoch)

    # Where there is room again, it goes on.
    R.chmod(0o755)
    assert check_files()
    assert not list(R.glob(".*.tmp"))
    assert len(run(train_mnist, *DENSE_RESUME[1:])[2]) == 6


def test_a_run_whose_saves_fail_at_every_moment_ends_as_an_undisturbed_one(
    whole, few_images, monkeypatch
):
    """Whichever save it is that a full disk or memory ends, the run goes on to the bit."""
    failures = [OSError(28, "No space left on device"), MemoryError()]
    fsync = os.fsync

    def save(descriptor):
        if next(saves) == moment:
            raise failures[moment % 2]
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", save)
    moment = -1
    record = {"status": "failed"}
    while record["status"] == "failed":
        moment = moment + 1
        saves = itertools.count()
        with contextlib.suppress(records.RunError, MemoryError):
            _, record, _ = run(train_cifar, *start_or_go_on()[1:])
        state = check_files()
        assert state in (record["status"], "running", None)
        assert not list(R.glob(".*.tmp"))

        # It is running still only where the last save failed, that of how the run has ended.
        assert state != "running" or is_complete(whole)
    assert moment > 8
    check_same(whole, R)


# ------------------------ Checkpoints that are not to be trusted ------------------------
def test_a_checkpoint_of_another_run_or_version_or_half_of_one_is_refused(interrupted):
    """A run does not go on from a file that is not its own last.pt."""

    def refused(message):
        with pytest.raises(records.RunError, match=f"runs/r/last.pt {message}"):
            run(train_mnist, *DENSE_RESUME[1:])

    path = R / "last.pt"
    state = records.load_checkpoint(path)
    records.save_checkpoint(path, state | {"run": "other"})
    refused("is of another run, other")
    records.save_checkpoint(path, state | {"format": 1})
    refused("is not of this version")
    path.write_bytes(path.read_bytes()[:1000])
    refused("is damaged, or is not a checkpoint")
    path.unlink()
    refused("is missing")

    # So it is with run.json.
    record = records.read_record(R)
    for damaged, message in (
        (record | {"format": 1}, "is not of this version"),
        ({"format": 2}, f"is damaged: it has no {', '.join(sorted(records.RECORD))}"),
        (record | {"data": None}, "is damaged: it has no checksum, name, selection, train, val"),
    ):
        records.write_json(R / "run.json", damaged)
        check_one_line(Forked(*DENSE_RESUME).finish(), f"runs/r/run.json {message}", status=2)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing():
    """A disk that errs does not change a weight unnoticed."""
    path = Path("last.pt")
    records.save_checkpoint(path, {"weights": torch.arange(5.0)})
    state = records.load_checkpoint(path)
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with contextlib.suppress(records.RunError):
            assert states_are_equal(records.load_checkpoint(path), state)


def test_a_checkpoint_that_would_run_code_is_not_executed():
    """A checkpoint from somebody else cannot do harm."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    path = Path("last.pt")
    records.save_checkpoint(path, {"epoch": Bomb()})
    with pytest.raises(records.RunError, match="not a checkpoint"):
        records.load_checkpoint(path)
    assert not Path("executed").exists()


# ------------------------ Terminals, pipes ------------------------
FULL = "[os.dup2(os.open('/dev/full', os.O_WRONLY), number) for number in (1, 2)]"


@pytest.mark.parametrize(
    ("before", "last"),
    [
        ("os.close(1), os.close(2)", ""),
        (FULL, ""),
        ("sys.stdout.reconfigure(encoding='ascii')", "finished: runs/\\u732b \\xf1\n"),
    ],
    ids=["closed", "full", "ascii"],
)
def test_outputs_may_be_closed_or_full_or_lack_characters(before, last):
    """A training does not end because nobody can read what it prints."""
    argv = [*DENSE, "--epochs", 2, "--run-name", "猫 ñ"]
    assert Forked("train_mnist", *argv, before=before).finish() == (0, "")
    assert Path("out").read_text().endswith(last)
    directory = Path("runs/猫 ñ")
    assert records.read_record(directory)["status"] == "finished"

    # But figures that were asked for are not lost in silence.
    undrawn = "import undrawn; undrawn.nothing_is_drawn()"
    status, _ = Forked("evaluate", directory, "--csv", before=f"{undrawn}; {before}").finish()
    assert status == (before == FULL)

    # What is printed goes into no file that has taken an output's place.
    assert not (directory / ".lock").read_bytes()


def test_a_reader_may_go_away():
    """`train_mnist.py | head -1` trains to the end."""
    os.mkfifo("pipe")
    process = Forked("train_mnist", *DENSE, "--epochs", 3, out="pipe")
    with open("pipe") as pipe:
        pipe.readline()
    assert process.finish() == (0, "")
    assert records.read_record(R)["status"] == "finished"


def test_a_terminal_gets_a_bar():
    """Who watches sees a bar, a line for each epoch, and last the run's directory."""
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    name = os.ttyname(terminal)
    process = Forked("train_mnist", *DENSE, "--epochs", 1, out=name, err=name).process
    process.join(300)
    assert process.exitcode == 0
    screen = os.read(controller, 2**16)
    for part in (b"\r", b"epoch 1/1:", b"finished: runs/r"):
        assert part in screen
