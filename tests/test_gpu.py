"""What only a GPU can tell."""

import os

import train_cifar

import pytest
import torch
from conftest import check_same, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("recipe", ["default", "fast"])
def test_a_training_is_deterministic_and_goes_on_exactly(few_images, monkeypatch, recipe):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    argv = ["--recipe", recipe, "--dataset", "synthetic", "--epochs", 2, "--device", "cuda"]
    argv += ["--batch-size", 64, "--quiet"]
    torch.use_deterministic_algorithms(True)  # what is not deterministic raises
    try:
        whole, _, _ = run(train_cifar, *argv)
        cut, _, _ = run(train_cifar, *argv, "--stop-after", 1)
        run(train_cifar, "--resume", cut, "--quiet")
    finally:
        torch.use_deterministic_algorithms(False)
    check_same(whole, cut)
