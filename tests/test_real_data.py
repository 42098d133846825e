"""The real MNIST and CIFAR-10, where their files are in data/."""

import common
import train_cifar
import train_mnist

import pytest
from conftest import ROOT, run

DATA = ROOT / "data"
missing = not all((DATA / name).is_dir() for name in ("MNIST", "cifar-10-batches-py"))
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(missing, reason=f"no MNIST or CIFAR-10 in {DATA}"),
]


@pytest.mark.parametrize(
    ("script", "flags", "least"),
    [
        (train_mnist, "", 0.9),
        (train_cifar, "--batch-size 128 --c1 48", 0.28),
        (train_cifar, "--batch-size 128 --c1 48 --recipe tutorial", 0.25),
    ],
)
def test_one_epoch_learns(script, flags, least):
    """A tenth of the images, seen once, is enough for that."""
    flags += f" --data-dir {DATA} --limit-train 5000 --epochs 1"
    _, record, _ = run(script, *flags.split())
    assert record["data"]["train"] == 5_000
    assert record["data"]["test"] == 10_000
    assert record["test"]["acc"] > least


def test_cifar_10_has_its_own_mean_and_std():
    """They are those that are known of its 50,000 training images."""
    args = train_cifar.parse_arguments(["--data-dir", str(DATA), "--val-size", "0"])
    data = common.load_data(args, train_cifar.synthetic, ("train", "val"))
    assert len(data.train) == 50_000
    assert data.train.classes[0] == "airplane"
    mean, std = data.train.mean_and_std()
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert std == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
