"""The real MNIST and CIFAR-10, where their files are in data/."""

import common
import train_cifar
import train_mnist

import pytest
from conftest import ROOT, run

DATA = ["--data-dir", str(ROOT / "data")]
missing = not all((ROOT / "data" / name).is_dir() for name in ("MNIST", "cifar-10-batches-py"))
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(missing, reason=f"no MNIST or CIFAR-10 in {DATA[1]}"),
]
SMALL = ["--batch-size", 128, "--c1", 48]
EPOCHS = [
    (train_mnist, [], 0.9),
    (train_cifar, SMALL, 0.28),
    (train_cifar, [*SMALL, "--recipe", "tutorial"], 0.25),
]


@pytest.mark.parametrize(("script", "argv", "least"), EPOCHS)
def test_one_epoch_learns(script, argv, least):
    _, record, _ = run(script, *DATA, *argv, "--limit-train", 5_000, "--epochs", 1)
    assert (record["data"]["train"], record["data"]["test"]) == (5_000, 10_000)
    assert record["test"]["acc"] > least


def test_cifar_10_has_its_own_mean_and_std():
    args = train_cifar.parse_arguments([*DATA, "--val-size", "0"])
    images = common.load_data(args, train_cifar.synthetic, ("train", "val")).train
    mean, std = images.mean_and_std()
    assert len(images) == 50_000 and images.classes[0] == "airplane"
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert std == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
