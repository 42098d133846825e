"""Models, dropout, Muon, schedules: against torch's own, and by definition."""

import itertools
from functools import partial
from pathlib import Path

import common
import records
import train_cifar

import pytest
import torch
from conftest import run
from torch import nn
from torch.optim import lr_scheduler

GREY = (1, 28, 28)
RGB = (3, 32, 32)


def build(shape, flags, classes=10):
    """The net of a training script, for images of this shape [C, H, W]."""
    args = train_cifar.parse_arguments(flags.split())
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    labels = torch.zeros(2)
    names = [str(label) for label in range(classes)]
    return common.new_model(args, common.ImageSet(images, labels, names))


@pytest.mark.parametrize("name", common.MODELS)
def test_every_model_takes_any_size_channels_and_classes_and_its_dropout_rests_at_evaluation(name):
    """One that is added to MODELS has to do so, too."""
    for shape, classes in ((GREY, 100), ((3, 40, 24), 10)):
        model = build(shape, f"--model {name}", classes)
        images = torch.rand(2, *shape)
        assert model(images).shape == (2, classes)
        model.eval()
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("shape", "flags", "count"),
    [
        (RGB, "--model confignet", 3_716_154),
        (RGB, "--model confignet --kernel-size 5", 1_995_066),
        (RGB, "--model confignet --kernel-size 5 --recipe tutorial", 3_148_794),
        (GREY, "--model cnn", 1_630_282),
        (GREY, "--model dense", 101_770),
    ],
)
def test_parameter_counts_are_the_tutorials_and_weights_follow_from_the_seed(shape, flags, count):
    """The nets are as large as those that the tutorials describe, and each seed begins anew."""
    weights = []
    for seed in (1, 2):
        net = build(shape, f"{flags} --seed {seed}")
        weights.append(torch.cat([p.flatten() for p in net.parameters()]))
    one, other = weights
    assert len(one) == count
    assert not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("shape", "flags", "expected"),
    [
        (RGB, "--model confignet --kernel-size 13", "does not take images of 32x32 pixels"),
        (RGB, "--model confignet --batch-size 1", "does not take images of 32x32 pixels"),
        (RGB, "--model convnet --sizes 1/4,1", "does not take images of 8x8 pixels"),
        (RGB, "--model googlenet", "it has more than one output"),
        ((3, 6, 32), "--model fastnet", "does not take images of 6x32 pixels"),
        ((1, 3, 28), "--model cnn", "does not take images of 3x28 pixels"),
        (GREY, "--model dense --optimizer muon", "--optimizer muon is for convolutions"),
        (GREY, "--model dense --shift 28", "--shift 28: the images are too small"),
        (GREY, "--model dense --hue 0.1", "--hue has no effect on grey images"),
    ],
)
def test_images_and_batches_that_a_model_does_not_take_are_refused(shape, flags, expected):
    """It is told before the training, with the size that is too small."""
    with pytest.raises(records.UsageError, match=expected):
        build(shape, flags)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_its_share_everywhere_and_keeps_the_expectation(memory_format):
    """It does what torch's own does, with fewer random bits."""
    torch.manual_seed(0)
    layer = build(RGB, "--d1 0.3").dropout1
    images = torch.ones(64, 16, 20, 20)
    outputs = layer(images.contiguous(memory_format=memory_format))
    assert outputs.mean().item() == pytest.approx(1, abs=0.005)

    # No image, channel, row or column is favoured.
    is_dropped = (outputs == 0).float()
    for dimensions in itertools.combinations(range(4), 3):
        shares = is_dropped.mean(dimensions)
        assert (shares - 0.3).abs().max() < 0.05


def test_the_whitening_is_fixed_and_its_bias_is_learnt_for_three_epochs(few_images):
    """The filters of the first layer come from the images, and no step changes them."""
    # The filters, their bias, and the first convolution that learns.
    norms = {
        "0.weight": set(),
        "0.bias": set(),
        "2.weight": set(),
    }

    def look(row):
        last = records.load_checkpoint(Path(row["directory"], "last.pt"))
        for name, seen in norms.items():
            seen.add(last["model"][name].norm().item())

    flags = "--recipe fast --dataset synthetic --epochs 5 --batch-size 50 --quiet"
    flags += " --c1 8 --c2 16 --c3 16"
    run(train_cifar, *flags.split(), on_epoch=look)
    assert [len(seen) for seen in norms.values()] == [1, 3, 5]


@pytest.mark.parametrize("shape", [(8, 4, 5, 1), (20, 2, 2, 2), (5, 5, 1, 1)])
def test_muons_steps_are_orthogonal_nesterov_momentum(shape):
    """Along each direction of the momentum it goes about as far, unless that is far weaker."""
    torch.manual_seed(0)
    filters = torch.randn(shape)
    optimizer = common.Muon([filters], lr=0.1, momentum=0.6, dtype=torch.float32)
    momentum = 0
    for _ in range(3):
        # Before a step, the norm is brought to the root of the number of filters.
        before = filters * len(filters) ** 0.5 / filters.norm()
        filters.grad = torch.randn(shape)
        optimizer.step()
        moved = (before - filters).flatten(1) / 0.1

        # As seen from the directions of the momentum, the step is a diagonal matrix.
        momentum = 0.6 * momentum + filters.grad
        nesterov = filters.grad + 0.6 * momentum
        u, s, v = torch.linalg.svd(nesterov.flatten(1), full_matrices=False)
        inner = u.T @ moved @ v.T
        values = inner.diagonal()
        assert torch.allclose(inner, values.diag(), atol=1e-4)
        assert values.max() < 1.3
        assert values[s > s[0] / 10].min() > 0.5


SCHEDULERS = {
    "constant": partial(lr_scheduler.ConstantLR, factor=1),
    "linear": partial(lr_scheduler.LinearLR, start_factor=1, end_factor=0, total_iters=100),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=100),
    # It counts its last step as the end, and turns at step 0.3 * total - 1.
    "onecycle": partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=101, pct_start=31 / 101),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_equal_torchs(name):
    """The learning rate of each of a hundred steps is that of torch's scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1)
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(100):
        (rate,) = scheduler.get_last_lr()
        assert common.SCHEDULES[name](step / 100) == pytest.approx(rate, rel=1e-6)
        optimizer.step()
        scheduler.step()
