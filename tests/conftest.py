"""MNIST in small, and a script that is run in this process; forked.py runs one in its own."""

import os
import re
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from undrawn import nothing_is_drawn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import records  # noqa: E402
import train_cifar  # noqa: E402
import train_mnist  # noqa: E402

import forked  # noqa: E402

# For nets this small one thread is several times faster than two. The second line is for what the
# tests start.
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))

# A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path, monkeypatch):
    """Each test begins in an empty directory, with one thread, and without images of the last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "search_directory", None)
    monkeypatch.setattr(common, "images_read", {})
    for script in (train_mnist, train_cifar):  # a script of a test's own may change it
        monkeypatch.setattr(script, "synthetic", script.synthetic)
    torch.set_num_threads(1)


@pytest.fixture
def few_images(monkeypatch):
    """Draw 300 and 60 synthetic images in this process, rather than 10,000 and 2,000."""
    monkeypatch.setattr(train_mnist, "synthetic", forked.few_digits)
    monkeypatch.setattr(train_cifar, "synthetic", forked.few_shapes)


@pytest.fixture
def undrawn(monkeypatch):
    """Draw no picture: that takes seconds."""
    nothing_is_drawn(monkeypatch.setattr)


@pytest.fixture
def mnist_dir(tmp_path):
    """A data directory with 200 training and 50 test images in MNIST's own files."""
    raw, random = tmp_path / "data" / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 50)):
        images, labels = random.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for name, array in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", labels),
        ):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / name).write_bytes(header + array.astype(np.uint8).tobytes())
    return tmp_path / "data"


# A small ConfigNet with dropout, augmentation, label smoothing, a schedule and early stopping, on
# 150 images.
EVERYTHING_ON = "--dataset synthetic --limit-train 150 --c1 4 --c2 8 --l1 16 --batch-size 64 "
EVERYTHING_ON += "--augment --schedule onecycle --tolerance 5 --label-smoothing 0.1 --quiet"
EVERYTHING_ON = EVERYTHING_ON.split()


def run(script, *argv, on_epoch=None):
    """Run `script`, a module, in this process, with its run in runs/ here.

    Returns the run's directory, its run.json, and the rows of its log.
    """
    argv = [str(argument) for argument in argv]
    record = script.main(argv if "--resume" in argv else ["--runs-dir", "runs", *argv], on_epoch)
    directory = Path(record.pop("directory"))
    return directory, record, read_run(directory)[1]


def read_run(directory):
    """run.json, and the rows of log.jsonl."""
    return records.read_record(directory), records.read_log(directory)


def without_times(rows):
    """The rows of a log without what differs from run to run."""
    times = ("seconds", "images_per_second")
    return [{name: row[name] for name in row if name not in times} for row in rows]


def states_are_equal(a, b):
    """Whether two states of a training are the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_are_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(states_are_equal, a, b))
    return a == b


def check_same(whole, other):
    """Two runs have the same weights, optimiser, history and results, to the bit."""
    (record, rows), (other_record, other_rows) = read_run(whole), read_run(other)
    assert without_times(rows) == without_times(other_rows)
    for key in ("status", "error", "epochs", "best", "test"):
        assert record[key] == other_record[key]
    for name in ("last.pt", "best.pt"):
        a, b = (records.load_checkpoint(directory / name) for directory in (whole, other))
        for state in (a, b):
            state["run"], state["history"] = None, without_times(state.get("history", []))
        assert states_are_equal(a, b), name
    assert not list(other.glob(".*.tmp"))


def exits_with_one_line(capsys, *argv, main=train_mnist.main):
    """The line with which a bad argument ends a program, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in argv])
    out, error = capsys.readouterr()
    assert not out
    assert re.match(r"\w+\.py: error: ", error)
    assert error.count("\n") == 1
    return error


def fails_with_one_line(*argv, main=train_mnist.main, kind=records.RunError):
    """The line with which a run, or `main`, ends."""
    with pytest.raises(kind) as failure:
        main([str(argument) for argument in argv])
    assert "\n" not in str(failure.value)
    return str(failure.value)
