"""Shapes, sizes, dropout, schedules, early stopping: the parts of a training, without one."""

import copy

import pytest
import torch
from torch import nn

import common


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", common.MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 40, 24)])
@pytest.mark.parametrize("classes", [10, 100])
def test_every_model_takes_any_size_channels_and_classes(name, shape, classes):
    model = common.MODELS[name](shape, classes)
    assert model(torch.rand(2, *shape)).shape == (2, classes)


def test_parameter_counts_are_the_tutorials():
    assert parameters(common.dense((1, 28, 28), 10)) == 784 * 128 + 128 + 128 * 10 + 10
    convolutions = (3 * 48 + 48 * 48 + 48 * 96 + 96 * 96) * 9 + 48 + 48 + 96 + 96
    head = 2 * 96 * 144 + 96 * 144 * 256 + 256 + 256 * 10 + 10
    assert parameters(common.confignet((3, 32, 32), 10)) == convolutions + head
    assert parameters(common.convnet((3, 32, 32), 10)) == convolutions + head
    blocks = 1 * 32 * 9 + 32 + 64 + 32 * 64 * 9 + 64 + 128
    assert parameters(common.cnn((1, 28, 28), 10)) == blocks + 64 * 49 * 512 + 512 + 512 * 10 + 10


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_odd_kernels(kernel_size):
    model = common.convnet((3, 32, 32), 10, kernel_size=kernel_size)
    assert model[0].weight.shape == (48, 3, kernel_size, kernel_size)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_images_too_small_for_a_model_are_refused():
    with pytest.raises(common.UsageError, match="--kernel-size 13"):
        common.confignet((3, 32, 32), 10, kernel_size=13)
    with pytest.raises(common.UsageError, match="4x4"):
        common.cnn((1, 3, 28), 10)


@pytest.mark.parametrize("name", common.MODELS)
def test_dropout_rests_at_evaluation(name):
    model = common.MODELS[name]((3, 32, 32), 10).eval()
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_expectation(p, memory_format):
    layer = common.Dropout(p).train()
    x = torch.ones(64, 16, 20, 20).contiguous(memory_format=memory_format).requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    dropped = (y == 0).float()
    assert abs(dropped.mean().item() - p) < 0.005
    # No image, channel or column is favoured.
    for dimension in range(4):
        others = [d for d in range(4) if d != dimension]
        assert (dropped.mean(others) - p).abs().max() < 0.05
    assert abs(y.mean().item() - 1) < 0.005
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_differs_from_call_to_call_and_repeats_with_the_seed():
    layer, x = common.Dropout(0.5).train(), torch.ones(1001)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x)) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_schedules_equal_torchs(name):
    steps, rate = 100, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)
    if name == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    else:
        # OneCycleLR counts its last step as the end, and turns at step 0.3 * total - 1.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=31 / 101)
    for step in range(steps):
        assert rate * common.SCHEDULES[name](step / steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_early_stopping_keeps_the_best_weights_of_the_model_it_is_given():
    watched, other = nn.Linear(2, 2), nn.Linear(2, 2)
    stopping = common.EarlyStopping(tolerance=2)
    best = None
    for epoch, loss in enumerate([1.0, 0.5, 0.7, 0.5, 0.4], 1):
        with torch.no_grad():
            watched.weight.fill_(epoch)
            other.weight.fill_(-epoch)
        improved = stopping.step(epoch, loss, watched)
        assert improved == (epoch in (1, 2, 5))
        if improved:
            best = copy.deepcopy(watched.state_dict())
        if stopping.should_stop:
            break
    assert epoch == 4, "two epochs without a lower loss: an equal one is not lower"
    assert stopping.best_epoch == 2 and stopping.best_loss == 0.5
    assert torch.equal(stopping.best_weights["weight"], best["weight"])
    assert torch.equal(stopping.best_weights["weight"], torch.full((2, 2), 2.0))


def test_early_stopping_off_and_not_a_number():
    stopping = common.EarlyStopping(tolerance=0)
    for epoch in range(1, 50):
        assert not stopping.step(epoch, float("nan"), nn.Linear(1, 1))
    assert not stopping.should_stop and stopping.best_epoch == 0


def test_evaluation_is_a_mean_over_images_whatever_the_batches():
    images = common.ImageSet(torch.randint(0, 256, (25, 1, 8, 8)).byte(), torch.arange(25) % 10, list("0123456789"))
    model = common.dense((1, 8, 8), 10)
    autocast = common.autocast_to(torch.device("cpu"), "fp32")
    results = []
    for batch_size in (25, 1, 4, 24):
        totals = common.Totals("cpu")
        common.evaluate_epoch(model, common.Loader(images, batch_size, [0.5], [0.5]).batches(), autocast, totals)
        results.append((pytest.approx(totals.loss, rel=1e-5), totals.accuracy))
    assert results == results[:1] * 4


def test_a_last_batch_of_one_image_is_left_out_of_training_only():
    images = common.ImageSet(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(9), list("012345678"))
    training = common.Loader(images, 4, [0.5], [0.5], seed=0)
    assert [len(labels) for _, labels in training.batches(1)] == [4, 4] and len(training) == 2
    evaluation = common.Loader(images, 4, [0.5], [0.5])
    assert [len(labels) for _, labels in evaluation.batches()] == [4, 4, 1] and len(evaluation) == 3
