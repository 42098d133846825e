"""The real MNIST and CIFAR-10, where their files are in data/."""

from pathlib import Path

import pytest

import common
import train_cifar
import train_mnist

DATA = Path(__file__).resolve().parent.parent / "data"

needs_mnist = pytest.mark.skipif(not (DATA / "MNIST").is_dir(), reason=f"no MNIST in {DATA}")
needs_cifar = pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason=f"no CIFAR-10 in {DATA}")
pytestmark = pytest.mark.real_data


def run(script, tmp_path, *argv):
    where = ["--data-dir", str(DATA), "--runs-dir", str(tmp_path)]
    return script.main([*where, *argv])


@needs_mnist
def test_one_epoch_of_mnist_reaches_98_percent(tmp_path):
    record = run(train_mnist, tmp_path, "--epochs", "1")
    assert record["data"]["train"] == 54_000 and record["data"]["test"] == 10_000
    assert record["test"]["acc"] >= 0.98


@needs_cifar
def test_one_epoch_of_confignet_on_10000_images_beats_35_percent(tmp_path):
    record = run(train_cifar, tmp_path, "--epochs", "1", "--limit-train", "10000", "--batch-size", "128")
    assert record["data"]["train"] == 10_000 and record["test"]["acc"] > 0.35


@needs_cifar
def test_cifar_10_has_its_own_mean_and_std():
    args = common.parse_arguments(train_cifar.build_parser(), ["--data-dir", str(DATA)])
    images, _ = common.load_dataset(args, train_cifar.synthetic)
    mean, std = images.mean_and_std()
    assert len(images) == 50_000 and images.classes[0] == "airplane"
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert std == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
