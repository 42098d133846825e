"""The real MNIST and CIFAR-10, where their files are in data/."""

import train_cifar
import train_mnist

import pytest
from conftest import ROOT, run

DATA = ["--data-dir", str(ROOT / "data")]
missing = not all((ROOT / "data" / name).is_dir() for name in ("MNIST", "cifar-10-batches-py"))
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(missing, reason=f"no MNIST or CIFAR-10 in {DATA[1]}")]
SOME = ["--limit-train", 10_000, "--batch-size", 128]
EPOCHS = [(train_mnist, [], 0.98), (train_cifar, SOME, 0.35), (train_cifar, [*SOME, "--recipe", "tutorial"], 0.3)]


@pytest.mark.parametrize(("script", "argv", "least"), EPOCHS)
def test_one_epoch_learns(script, argv, least):
    _, record, _ = run(script, *DATA, *argv, "--epochs", 1)
    assert record["data"]["train"] == (10_000 if argv else 54_000) and record["data"]["test"] == 10_000
    assert record["test"]["acc"] > least
