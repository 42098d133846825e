"""--recipe tutorial: the mistakes of the CIFAR-10 tutorial, in training and in evaluation."""

import evaluate
import train_cifar

import pytest
from conftest import run

pytestmark = pytest.mark.usefixtures("few_images")

TINY = "--recipe tutorial --dataset synthetic --epochs 1 --c1 4 --c2 8 --l1 8"


def train(flags=""):
    return run(train_cifar, *TINY.split(), *flags.split())


def test_dropout_stays_on_in_evaluation_and_an_export_has_none():
    """The figures are those of a net that drops units, the same ones each time."""
    directory, record, rows = train()
    _, mended, mended_rows = train("--no-always-dropout")

    # The training is the same. What it prints is not, and evaluating again gives it again.
    assert rows[0]["train_loss"] == mended_rows[0]["train_loss"]
    loss = pytest.approx(record["test"]["loss"], rel=1e-6)
    assert mended["test"]["loss"] != loss
    for _ in range(2):
        measured = evaluate.main([str(directory), "--quiet"])
        assert measured["loss"] == loss

    # An export that dropped anything would answer otherwise than the model without it.
    evaluate.main([str(directory), "--export", "torch.export", "--quiet"])
    assert (directory / "model.pt2").exists()


def test_the_test_set_chooses_the_epoch_and_that_is_said(capsys):
    """Whoever asks for the tutorial's mistakes is told of this one."""
    _, record, _ = train()
    assert record["best"]["val_loss"] == record["test"]["loss"]
    assert "flattered" in capsys.readouterr().out
