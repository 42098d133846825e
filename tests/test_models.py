"""Models, dropout, Muon, schedules: against torch's own, and by definition."""

from pathlib import Path

import common
import records
import train_cifar

import pytest
import torch
from conftest import run
from torch import nn
from torch.optim import lr_scheduler


def build(shape, *argv, classes=10):
    """The net of a training script, for images of this shape [C, H, W]."""
    args = train_cifar.parse_arguments([str(argument) for argument in argv])
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    names = list(map(str, range(classes)))
    return common.new_model(args, common.ImageSet(images, torch.zeros(2), names))


@pytest.mark.parametrize("name", common.MODELS)
def test_every_model_takes_any_size_channels_and_classes_and_its_dropout_rests_at_evaluation(name):
    for shape, classes in (((1, 28, 28), 100), ((3, 40, 24), 10)):
        model = build(shape, "--model", name, classes=classes)
        images = torch.rand(2, *shape)
        assert model(images).shape == (2, classes)
        assert torch.equal(model.eval()(images), model(images))


def test_parameter_counts_are_the_tutorials_and_weights_follow_from_the_seed():
    for shape, argv, count in (
        ((3, 32, 32), "confignet", 3_716_154),
        ((3, 32, 32), "confignet --kernel-size 5", 1_995_066),
        ((3, 32, 32), "confignet --kernel-size 5 --recipe tutorial", 3_148_794),
        ((1, 28, 28), "cnn", 1_630_282),
        ((1, 28, 28), "dense", 101_770),
    ):
        argv = ["--model", *argv.split(), "--seed"]
        nets = [build(shape, *argv, seed).parameters() for seed in (1, 1, 2)]
        one, same, other = (torch.cat([p.flatten() for p in net]) for net in nets)
        assert len(one) == count
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_images_and_batches_that_a_model_does_not_take_are_refused():
    for shape, argv, size in (
        ((3, 32, 32), "confignet --kernel-size 13", "32x32"),
        ((1, 3, 28), "cnn", "3x28"),
        ((3, 6, 32), "fastnet", "6x32"),
        ((3, 32, 32), "confignet --batch-size 1", "32x32"),
        ((3, 32, 32), "convnet --sizes 1/4,1", "8x8"),
    ):
        with pytest.raises(records.UsageError, match=f"does not take images of {size} pixels"):
            build(shape, "--model", *argv.split())
    with pytest.raises(records.UsageError, match="--optimizer muon is for convolutions"):
        build((1, 28, 28), "--model", "dense", "--optimizer", "muon")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_its_share_keeps_the_expectation_and_repeats_with_the_seed(memory_format):
    layer = build((3, 32, 32), "--d1", 0.3).dropout1.train()
    x = torch.ones(64, 16, 20, 20, requires_grad=True)
    outputs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        outputs.append(layer(x.contiguous(memory_format=memory_format)))
    y, other, same = outputs
    assert torch.equal(y, same)
    assert not torch.equal(y, other)
    assert y.mean().item() == pytest.approx(1, abs=0.005)
    for dimension in range(4):  # no image, channel, row or column is favoured
        shares = (y == 0).float().transpose(0, dimension).flatten(1).mean(1)
        assert shares.tolist() == pytest.approx([0.3] * len(shares), abs=0.05)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_whitened_patches_are_uncorrelated():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(300, 3, 16, 16, generator=random).cumsum(3)
    images += torch.rand(300, 3, 1, 1, generator=random)
    layer = common.Whitening(3, 2, 1, 0, bias=True)
    layer.learn(images, smallest=0)
    outputs, negatives = layer(images).transpose(0, 1).flatten(1).chunk(2)
    assert torch.allclose(outputs, -negatives)
    assert torch.allclose(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=0.01)
    flat = torch.ones(10, 3, 16, 16)  # patches that do not vary at all but in their mean
    layer.learn(flat)
    assert layer(flat).abs().max() < 1.01
    assert layer.weight.isfinite().all()


def test_the_whitening_is_fixed_and_its_bias_is_learnt_for_three_epochs(few_images):
    def look(row):
        state = records.load_checkpoint(Path(row["directory"], "last.pt"))["model"]
        for name in changes:
            changes[name].append(state[name].norm().item())

    changes = {"0.weight": [], "0.bias": [], "2.weight": []}
    argv = ["--recipe", "fast", "--dataset", "synthetic", "--epochs", 5, "--sizes", 0.5, "--quiet"]
    argv += ["--batch-size", 50, "--c1", 8, "--c2", 16, "--c3", 16]
    run(train_cifar, *argv, on_epoch=look)
    assert [len({*norms}) for norms in changes.values()] == [1, 3, 5]


@pytest.mark.parametrize("shape", [(8, 4, 5, 1), (20, 2, 2, 2), (5, 5, 1, 1)])
def test_muons_steps_are_orthogonal_nesterov_momentum(shape):
    random = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=random))
    optimizer = common.Muon([p], lr=0.1, momentum=0.6)
    momentum = 0
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(shape, generator=random)
        optimizer.step()
        momentum = 0.6 * momentum + p.grad
        held = before * len(p) ** 0.5 / before.norm()  # the norm is held at its number's root
        moved = (held - p.detach()).flatten(1) / 0.1
        u, s, v = torch.linalg.svd((p.grad + 0.6 * momentum).flatten(1), full_matrices=False)
        inner = u.T @ moved @ v.T
        values = inner.diagonal()
        assert torch.allclose(inner, values.diag(), atol=1e-4)
        assert (values[s > s[0] / 10] > 0.5).all()
        assert values.max() < 1.3


def test_schedules_equal_torchs():
    for name, scheduler, *options in (
        ("constant", lr_scheduler.ConstantLR, 1),
        ("linear", lr_scheduler.LinearLR, 1, 0, 100),
        ("cosine", lr_scheduler.CosineAnnealingLR, 100),
        # It counts its last step as the end, and turns at step 0.3 * total - 1.
        ("onecycle", lr_scheduler.OneCycleLR, 1, 101, None, None, 31 / 101),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1)
        scheduler = scheduler(optimizer, *options)
        for step in range(100):
            rate = optimizer.param_groups[0]["lr"]
            assert common.SCHEDULES[name](step / 100) == pytest.approx(rate, rel=1e-6), name
            optimizer.step()
            scheduler.step()
