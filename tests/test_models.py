"""Models, dropout, Muon, schedules: against torch's own, and by definition."""

import itertools
from pathlib import Path

import common
import records
import train_cifar

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from torch import nn
from torch.optim import lr_scheduler


def build(shape, *argv, classes=10):
    """The net of a training script, for images of this shape [C, H, W]."""
    args = train_cifar.parse_arguments([str(argument) for argument in argv])
    images, names = torch.zeros(2, *shape, dtype=torch.uint8), list(map(str, range(classes)))
    return common.new_model(args, common.ImageSet(images, torch.zeros(2), names))


@pytest.mark.parametrize("name", common.MODELS)
def test_every_model_takes_any_size_channels_and_classes_and_its_dropout_rests_at_evaluation(name):
    for shape, classes in itertools.product([(1, 28, 28), (3, 32, 32), (3, 40, 24)], (10, 100)):
        model, images = build(shape, "--model", name, classes=classes), torch.rand(2, *shape)
        assert model(images).shape == (2, classes)
        assert torch.equal(model.eval()(images), model(images))


def test_parameter_counts_and_names_are_the_tutorials():
    convolutions = (3 * 48 + 48 * 48 + 48 * 96 + 96 * 96) * 9 + 48 + 48 + 96 + 96
    confignet = convolutions + 2 * 96 * 144 + 96 * 144 * 256 + 256 + 256 * 10 + 10
    cnn = 32 * 9 + 32 + 64 + 32 * 64 * 9 + 64 + 128 + 64 * 49 * 512 + 512 + 512 * 10 + 10
    for name, shape, count in [
        ("convnet", (3, 32, 32), confignet),
        ("confignet", (3, 32, 32), confignet),
        ("cnn", (1, 28, 28), cnn),
        ("dense", (1, 28, 28), 784 * 128 + 128 + 128 * 10 + 10),
    ]:
        assert sum(p.numel() for p in build(shape, "--model", name).parameters()) == count
    names = dict(build((3, 32, 32)).named_children()).keys()
    assert names >= {"conv1", "conv2", "conv3", "conv4", "fc1", "fc2"}


HEAD = "Conv2d relu Conv2d relu Dropout then Conv2d relu"
ORDERS = {
    (
        "confignet",
        "tutorial",
        5,
        3,
    ): f"{HEAD} Conv2d relu Dropout flat BatchNorm1d relu Linear relu Linear",
    (
        "confignet",
        "default",
        5,
        5,
    ): f"{HEAD} Conv2d flat BatchNorm1d relu Dropout then Linear relu Linear",
    ("dense", "tutorial"): "Identity then Linear relu Dropout then Linear",
    ("dense", "default"): "LayerNorm then Linear relu Dropout then Linear",
}


@pytest.mark.parametrize("which", ORDERS, ids=str)
def test_a_batch_passes_the_layers_in_this_order(which):
    (model, recipe, *kernels), order, passed = which, ORDERS[which].split(), []
    argv = ["--model", model, "--recipe", recipe, "--d1", 0.3]
    net = build((3, 32, 32), *argv, *(["--kernel-size", 5] if kernels else []))
    for layer in net.children():
        layer.register_forward_hook(
            lambda layer, x, y: passed.append((type(layer).__name__, x[0].clone(), y.clone()))
        )
    net.train()(torch.rand(64, 3, 32, 32))
    assert [name for name, _, _ in passed] == order[::2]
    functions = {"relu": F.relu, "flat": lambda x: x.flatten(1), "then": lambda x: x}
    for word, ((_, _, left), (_, came, _)) in zip(
        order[1::2], itertools.pairwise(passed), strict=True
    ):
        assert torch.equal(functions[word](left), came)
    dropped = [
        ((y == 0) & (x > 0)).sum() / (x > 0).sum() for name, x, y in passed if name == "Dropout"
    ]
    assert dropped == pytest.approx([0.3, 0.5][: len(dropped)], abs=0.05)
    sizes = [layer.kernel_size[0] for layer in net.children() if isinstance(layer, nn.Conv2d)]
    assert sizes == kernels[:1] + 3 * kernels[1:]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_images_and_batches_that_a_model_does_not_take_are_refused():
    for shape, argv, size in [
        ((3, 32, 32), ["confignet", "--kernel-size", 13], "32x32"),
        ((1, 3, 28), ["cnn"], "3x28"),
        ((3, 6, 32), ["fastnet"], "6x32"),
        ((3, 6, 32), ["patchnet"], "6x32"),
        ((3, 32, 32), ["confignet", "--batch-size", 1], "32x32"),
        ((3, 32, 32), ["convnet", "--sizes", "1/4,1"], "8x8"),
    ]:
        with pytest.raises(
            records.UsageError, match=f"^--model {argv[0]} .* does not take images of {size} pixels"
        ):
            build(shape, "--model", *argv)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_keeps_the_expectation_and_repeats_with_the_seed(p, memory_format):
    layer, x = (
        common.Dropout(p).train(),
        torch.ones(64, 16, 20, 20).contiguous(memory_format=memory_format),
    )
    torch.manual_seed(0)
    y, other = layer(x.requires_grad_()), layer(x)
    torch.manual_seed(0)
    assert torch.equal(y, layer(x)) and not torch.equal(y, other)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(
        p, abs=0.005
    ) and y.mean().item() == pytest.approx(1, abs=0.005)
    for dimension in range(4):  # no image, channel, row or column is favoured
        assert (dropped.mean([d for d in range(4) if d != dimension]) - p).abs().max() < 0.05
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_whitened_patches_are_uncorrelated_and_an_identity_convolution_hands_its_inputs_on():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(300, 3, 16, 16, generator=random).cumsum(3) + torch.rand(
        300, 3, 1, 1, generator=random
    )
    layer = common.Whitening(3, 2, 1, 0, bias=True)
    layer.learn(images, smallest=0)
    outputs, negatives = layer(images).transpose(0, 1).flatten(1).chunk(2)
    assert torch.allclose(outputs, -negatives)
    assert torch.allclose(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=0.01)
    flat = torch.ones(10, 3, 16, 16)  # patches that do not vary at all but in their mean
    layer.learn(flat)
    assert layer(flat).abs().max() < 1.01 and layer.weight.isfinite().all()
    for channels in (2, 3, 5):
        shared = min(channels, 3)
        assert torch.allclose(
            common.identity_convolution(3, channels)(images)[:, :shared], images[:, :shared]
        )


def test_the_whitenings_bias_is_learnt_for_three_epochs_and_muon_learns_filters_and_adamw_the_rest(
    few_images,
):
    saved = []
    argv = [
        "--recipe",
        "fast",
        "--dataset",
        "synthetic",
        "--epochs",
        5,
        "--batch-size",
        50,
        "--sizes",
        0.5,
        "--quiet",
    ]
    argv += ["--c1", 8, "--c2", 16, "--c3", 16, "--run-name", "a"]
    run(
        train_cifar,
        *argv,
        on_epoch=lambda row: saved.append(records.load_checkpoint(Path("runs/a/last.pt"))),
    )
    states = [state["model"] for state in saved]
    changed = {
        name: [not torch.equal(a[name], b[name]) for a, b in itertools.pairwise(states)]
        for name in states[0]
    }
    assert (
        not any(changed["0.weight"])
        and changed["0.bias"] == [True, True, False, False]
        and all(changed["2.weight"])
    )
    muon, adamw = saved[0]["optimizer_0"], saved[0]["optimizer_1"]
    assert [state["momentum"].ndim for state in muon["state"].values()] == [4] * 6
    assert sorted(state["exp_avg"].ndim for state in adamw["state"].values()) == [1] * 7 + [2]
    assert adamw["param_groups"][0].items() >= {"initial_lr": 0.015, "weight_decay": 0.1}.items()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(8, 4, 5, 1), (20, 2, 2, 2), (5, 5, 1, 1)])
def test_muons_steps_are_orthogonal_nesterov_momentum_and_continue_from_its_state(
    shape, dtype, error
):
    random = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=random))
    optimizer, momentum = common.Muon([p], lr=0.1, momentum=0.6, dtype=dtype), 0
    for step in range(4):
        if step == 2:
            state, optimizer = (
                optimizer.state_dict(),
                common.Muon([p], lr=0.5, momentum=0.1, dtype=dtype),
            )
            optimizer.load_state_dict(state)
        before, p.grad = p.detach().clone(), torch.randn(shape, generator=random)
        optimizer.step()
        momentum = 0.6 * momentum + p.grad
        moved = (
            before * len(p) ** 0.5 / before.norm() - p.detach()
        ) / 0.1  # the norm is held at its number's root
        u, s, v = torch.linalg.svd((p.grad + 0.6 * momentum).flatten(1), full_matrices=False)
        inner = u.T @ moved.flatten(1) @ v.T
        values = inner.diagonal()
        assert (inner - torch.diag(values)).abs().max() < error
        assert (values[s > s[0] / 10] > 0.5).all() and values.max() < 1.3


def test_schedules_equal_torchs():
    schedulers = {
        "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1),
        "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1, 0, 100),
        "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 100),
        # OneCycleLR counts its last step as the end, and turns at step 0.3 * total - 1.
        "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, 1, total_steps=101, pct_start=31 / 101
        ),
    }
    for name, schedule in common.SCHEDULES.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1)
        scheduler = schedulers[name](optimizer)
        for step in range(100):
            assert schedule(step / 100) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-6
            ), name
            optimizer.step()
            scheduler.step()
