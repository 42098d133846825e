"""Details that a change could lose without another test noticing."""

import ctypes
import socket
import time
from pathlib import Path

import common
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERYTHING_ON, run
from forked import Forked
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.datasets import MNIST

DENSE = ["--dataset", "synthetic", "--model", "dense", "--schedule", "constant", "--quiet"]


# ------------------------ Data ------------------------
@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_the_synthetic_test_images_are_not_drawn_as_the_training_images_are(script):
    """The first test images are not the first training images drawn again."""
    train = script.synthetic(True)
    test = script.synthetic(False)
    same = train.labels[: len(test)] == test.labels
    assert same.float().mean() < 0.2


def test_a_download_has_a_time_out(monkeypatch):
    """A server that falls silent does not hold a run for ever."""

    def download(dataset):
        seen.append(socket.getdefaulttimeout())
        raise OSError

    seen = []
    socket.setdefaulttimeout(None)
    monkeypatch.setattr(MNIST, "download", download)
    with pytest.raises(records.RunError):
        run(train_mnist, "--data-dir", "fresh", "--quiet")
    assert 0 < seen[0] <= 600


@pytest.mark.parametrize(
    ("few", "all_colours"),
    [
        ("P", "RGB"),
        ("1", "L"),
    ],
)
def test_an_image_of_few_colours_gets_all_of_them_before_it_is_resized(few, all_colours):
    """A GIF, or a scan in black and white, is smoothed as any other image is."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(few)
    image.save("few.png")
    found = common.read_image(Path("few.png"), 16, all_colours == "L")

    expected = image.convert(all_colours).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(found.permute(1, 2, 0).squeeze(), expected)


def test_images_too_small_for_a_shift_are_told(few_images):
    """A shift by more than there is of an image is refused before anything is made."""
    with pytest.raises(records.UsageError, match="--shift 28: the images are too small"):
        run(train_mnist, *DENSE, "--shift", 28)
    assert not Path("runs").exists()


# ------------------------ Options ------------------------
def test_a_tilde_in_a_path_is_the_home_directory(few_images, tmp_path, monkeypatch):
    """Also where the shell leaves it as it is, as in --resume=~/x."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    argv = [*DENSE, "--runs-dir", "~/x", "--run-name", "r", "--epochs", 1, "--no-test"]
    directory, *_ = run(train_mnist, *argv)
    assert directory == home / "x/r"

    assert train_mnist.main(["--resume=~/x/r", "--epochs", "2", "--quiet"])["epochs"] == 2
    assert train_mnist.parse_arguments(["--data-dir", "~/d"]).data_dir == home / "d"


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_muon_has_rates_and_a_schedule_of_its_own_where_the_recipe_is_for_another(script):
    """Who asks for another optimiser need not know what learning rate it wants."""

    def settings(*argv):
        args = vars(script.parse_arguments([*argv]))
        return [args.get(name) for name in ("lr", "aux_lr", "momentum", "schedule")]

    rate, _, _, schedule = settings()
    assert settings("--optimizer=muon") == [0.12, 0.015, 0.6, "linear"]
    assert settings("--optimizer=muon", "--lr", "0.3") == [0.3, 0.015, 0.6, "linear"]
    assert settings("--optimizer=sgd") == [rate, None, 0.9, schedule]

    # A recipe for Muon keeps its own.
    fast = settings("--recipe=fast")
    assert settings("--recipe=fast", "--optimizer=muon") == fast


# ------------------------ Training ------------------------
MEMORY_IN_USE = """
import gc
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
def memory_in_use():
    gc.collect()
    found = mallinfo()
    return found.uordblks + found.hblkhd
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
def test_memory_does_not_grow_from_epoch_to_epoch():
    """A training of many epochs does not run out of memory: a leak of 70 kB an epoch is noticed."""
    # What is in use, and not what the process holds: glibc keeps what is freed.
    look = "print(memory_in_use(), sys.getallocatedblocks(), flush=True)"
    argv = [*EVERYTHING_ON, "--tolerance", 0, "--epochs", 20, "--runs-dir", "runs"]
    training = Forked("train_cifar", *argv, before=MEMORY_IN_USE, each_epoch=look)
    assert training.finish() == (0, "")

    # Between the fifth epoch and the last.
    table = np.loadtxt("out")
    assert len(table) == 20
    in_use, objects = table[19] - table[4]
    assert in_use < 1e6
    assert objects < 1e4


def test_images_per_second_are_those_of_the_training_without_the_validation(few_images):
    """The figure does not depend on how many images validate."""

    def sleep(module, _):
        if isinstance(module, torch.nn.Linear) and not module.training:
            time.sleep(0.1)

    argv = [*DENSE, "--epochs", 2, "--no-test"]
    handle = register_module_forward_pre_hook(sleep)
    try:
        _, record, rows = run(train_mnist, *argv)
    finally:
        handle.remove()

    # The dense net has two layers, and the validation images are a batch.
    for row in rows:
        training = record["data"]["train"] / row["images_per_second"]
        assert 0 < training < row["seconds"] - 0.19


def test_dropout_draws_other_units_in_each_epoch(monkeypatch):
    """Of equal images, at a rate that moves no weight, only the dropout changes the loss."""

    def equal_images(train):
        images = torch.arange(784).byte().view(1, 1, 28, 28).repeat(160, 1, 1, 1)
        labels = torch.zeros(160, dtype=torch.long)
        return common.ImageSet(images, labels, ["0", "1"])

    monkeypatch.setattr(train_mnist, "synthetic", equal_images)
    argv = [*DENSE, "--lr", 1e-30, "--batch-size", 72, "--epochs", 3, "--precision", "fp32"]
    for dropout, losses in ((0.5, 3), (0, 1)):
        _, _, rows = run(train_mnist, *argv, "--no-test", "--d1", dropout)
        assert len({row["train_loss"] for row in rows}) == losses


def test_the_temperature_is_1_where_no_validation_image_is_wrong(monkeypatch):
    """Images that are all right cannot tell how sure a net should be."""

    def points(train):
        labels = torch.arange(2200) % 10
        images = F.one_hot(labels, 784).byte().view(-1, 1, 28, 28) * 255
        return common.ImageSet(images, labels, list("0123456789"))

    monkeypatch.setattr(train_mnist, "synthetic", points)
    _, record, _ = run(train_mnist, *DENSE, "--epochs", 2, "--no-test")
    assert record["data"]["val"] == 220
    assert record["best"]["val_acc"] == 1
    assert record["best"]["temperature"] == 1
