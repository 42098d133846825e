"""Small data in the real file formats, and two ways to run a script: in this process, or in one of its own.

The third, in a process forked from one that has imported torch, is in forked.py.
"""

import gzip
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_cifar  # noqa: E402
import train_mnist  # noqa: E402

import forked  # noqa: E402

# For nets this small one thread is several times faster than two. The second line is for what the tests start.
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))

# A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path, monkeypatch):
    """Each test begins in an empty directory, with one thread, and without the images of the one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "loaded_images", None)
    torch.set_num_threads(1)


@pytest.fixture
def few_images(monkeypatch):
    """Draw 300 and 60 synthetic images in this process, rather than 10,000 and 2,000."""
    monkeypatch.setattr(train_mnist, "synthetic", forked.few_digits)
    monkeypatch.setattr(train_cifar, "synthetic", forked.few_shapes)


def idx_bytes(array):
    """An unsigned-byte IDX file, the format of MNIST."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_arrays(seed, count):
    """Learnable 28x28 images: class c is a bright bar in row 2 + 2 c."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = random.integers(0, 60, (count, 28, 28))
    images[np.arange(count), 2 + 2 * labels] = 255
    return images, labels


@pytest.fixture
def mnist_dir(tmp_path):
    """A data directory with 200 training and 50 test images in MNIST's own files."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, seed, count in (("train", 0, 200), ("t10k", 1, 50)):
        images, labels = mnist_arrays(seed, count)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path / "data"


@pytest.fixture
def mnist_gz_dir(mnist_dir, tmp_path):
    """A folder of MNIST's four .gz files, as a mirror serves them, and their MD5s."""
    folder, md5 = tmp_path / "mirror", {}
    folder.mkdir()
    for path in (mnist_dir / "MNIST" / "raw").iterdir():
        content = gzip.compress(path.read_bytes(), mtime=0)
        (folder / f"{path.name}.gz").write_bytes(content)
        md5[f"{path.name}.gz"] = hashlib.md5(content).hexdigest()
    return folder, md5


class TinyCifar:
    """CIFAR-10's archive with 20 images a batch, and the MD5s that torchvision would have for it."""

    def __init__(self, folder):
        self.batches = folder / "cifar-10-batches-py"
        self.batches.mkdir(parents=True)
        self.md5 = {}
        for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            labels = [i % 10 for i in range(20)]
            data = np.random.default_rng(seed).integers(0, 100, (20, 3072), dtype=np.uint8)
            for row, label in enumerate(labels):
                data[row, label * 300 : label * 300 + 300] = 255
            self.write(self.batches / name, {"labels": labels, "data": data})
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        self.write(self.batches / "batches.meta", {"label_names": names})
        self.archive = folder / "cifar-10-python.tar.gz"
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(self.batches, self.batches.name)
        self.md5[self.archive.name] = hashlib.md5(self.archive.read_bytes()).hexdigest()

    def write(self, path, content):
        path.write_bytes(pickle.dumps(content, protocol=2))
        self.md5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny_cifar(tmp_path):
    return TinyCifar(tmp_path / "origin")


@pytest.fixture
def cli(tmp_path):
    """`cli("train_mnist.py", "--epochs", 1, ...)` runs the script in tmp_path, and returns the process that has ended,
    with `start` the one that begins."""
    started = []

    def run(script, *argv, start=False, env=(), **options):
        command = [sys.executable, str(ROOT / script), *map(str, argv)]
        environment = {name: value for name, value in {**os.environ, **dict(env)}.items() if value is not None}
        options = {"cwd": tmp_path, "text": True, "env": environment, **options}
        if not start:
            return subprocess.run(command, capture_output=True, timeout=300, **options)
        started.append(subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


# A small ConfigNet with dropout, augmentation, label smoothing, a schedule and early stopping, on 150 images.
EVERYTHING_ON = [
    "--dataset", "synthetic", "--limit-train", "150", "--c1", "4", "--c2", "8", "--l1", "16", "--augment",
    "--batch-size", "64", "--schedule", "onecycle", "--tolerance", "5", "--label-smoothing", "0.1", "--quiet",
]  # fmt: skip


def run(script, *argv, on_epoch=None):
    """Run `script`, a module, in this process, with its run in runs/ here: the run's directory, run.json, the rows."""
    argv = [str(argument) for argument in argv]
    record = script.main(argv if "--resume" in argv else ["--runs-dir", "runs", *argv], on_epoch)
    directory = Path(record.pop("directory"))
    return directory, record, read_run(directory)[1]


def read_run(directory):
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return json.loads((directory / "run.json").read_text()), rows


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def states_are_equal(a, b):
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
    assert all(record[key] == other_record[key] for key in ("status", "error", "epochs", "best", "test"))
    for name in ("last.pt", "best.pt"):
        a, b = (common.load_checkpoint(directory / name) for directory in (whole, other))
        for state in (a, b):
            state["run"], state["history"] = None, without_times(state.get("history", []))
        assert states_are_equal(a, b), name
    assert not list(other.glob(".*.tmp"))
