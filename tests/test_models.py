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


def test_the_whitened_nets_are_of_the_size_that_their_docstrings_say():
    whitened, pairs = 24, (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) * 9
    scales_and_biases = 2 * 2 * (64 + 256 + 256)
    assert parameters(common.fastnet((3, 32, 32), 10)) == whitened * (12 + 1) + pairs + scales_and_biases + 2560
    pairs = (32 * 24 + 24 * 24 + 24 * 48 + 48 * 48) * 9
    assert parameters(common.patchnet((1, 28, 28), 10)) == 32 * 16 + pairs + 2 * 2 * (24 + 48) + 480
    for name in ("fastnet", "patchnet"):
        assert common.MODELS[name]((3, 32, 32), 10)(torch.rand(2, 3, 20, 20)).shape == (2, 10)
        with pytest.raises(common.UsageError, match=f"{name} needs images of at least"):
            common.MODELS[name]((3, 6, 32), 10)


def test_whitened_patches_are_uncorrelated_and_the_layer_learns_a_bias_at_first_and_nothing_after():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(300, 3, 16, 16, generator=random).cumsum(3) + torch.rand(300, 3, 1, 1, generator=random)
    layer = common.Whitening(3, 2, 1, 0, bias=True)
    layer.learn(images, smallest=0)
    outputs = layer(images).transpose(0, 1).flatten(1)
    half = len(outputs) // 2
    assert torch.allclose(outputs[:half], -outputs[half:])
    covariance = outputs[:half] @ outputs[:half].T / outputs.shape[1]
    assert torch.allclose(covariance, torch.eye(half), atol=0.01)
    layer.begin_epoch(3)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer.begin_epoch(4)
    assert not any(p.requires_grad for p in layer.parameters())
    flat = torch.ones(10, 3, 16, 16)  # patches that do not vary at all but in their mean
    layer.learn(flat)
    assert layer(flat).abs().max() < 1.01 and layer.weight.isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 8, 8),
        (2, 8, 7, 15),
        (1, 3, 3, 3),
        (5, 2, 1, 18),
        (700, 4, 4, 4),
        (3, 4, 2, 2),
        (2, 3, 5, 10),
        (300, 4, 6, 12),
    ],
)
def test_winograds_convolution_and_its_gradients_equal_the_definition(shape):
    random = torch.Generator().manual_seed(0)
    images, weight = torch.randn(shape, generator=random), torch.randn(6, shape[1], 3, 3, generator=random)
    gradient = torch.randn(shape[0], 6, *shape[2:], generator=random)
    exact = [x.double().requires_grad_() for x in (images, weight)]
    expected = nn.functional.conv2d(*exact, padding=1)
    expected = expected, *torch.autograd.grad(expected, exact, gradient.double())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours = [x.contiguous(memory_format=memory_format).requires_grad_() for x in (images, weight)]
        found = common.WinogradConvolution.apply(*ours)
        found = found, *torch.autograd.grad(found, ours, gradient.contiguous(memory_format=memory_format))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and ((a - b).norm() / b.norm()).item() < 2e-5


def test_winograds_method_is_used_in_float32_with_many_channels_and_without_avx512_alone(monkeypatch):
    calls, apply = [], common.WinogradConvolution.apply
    monkeypatch.setattr(common.WinogradConvolution, "apply", lambda *x: calls.append(1) or apply(*x))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    common.Convolution(64, 256)(torch.rand(1, 64, 8, 8))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    common.Convolution(64, 64)(torch.rand(1, 64, 8, 8))
    many = common.Convolution(64, 256)
    with torch.autocast("cpu", torch.bfloat16):
        many(torch.rand(1, 64, 8, 8))
    many.double()(torch.rand(1, 64, 8, 8).double())
    torch.export.export(many.float(), (torch.rand(1, 64, 8, 8),))
    assert not calls
    images = torch.rand(1, 64, 8, 8)
    assert torch.allclose(many(images), nn.functional.conv2d(images, many.weight, padding=1), atol=1e-5) and calls


@pytest.mark.parametrize("channels", [(8, 8), (8, 12), (12, 8)])
def test_an_identity_convolution_hands_its_inputs_on(channels):
    images, shared = torch.rand(2, channels[0], 6, 6), min(channels)
    assert torch.allclose(common.identity_convolution(*channels)(images)[:, :shared], images[:, :shared])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 5, 5)])
def test_orthogonalize_keeps_the_directions_and_levels_the_singular_values(shape, dtype, error):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ common.orthogonalize(matrices, dtype) @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < error
    assert (values[s > s.amax() / 10] > 0.5).all() and values.max() < 1.3


def test_muon_turns_filters_by_orthogonal_steps_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    twin = copy.deepcopy(net)
    ours = common.Muon(net.parameters(), lr=0.1, aux_lr=0.02, momentum=0.6, weight_decay=0.1)
    others = [twin[0].bias, *twin[2].parameters()]
    theirs = torch.optim.AdamW(others, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    momentum = 0
    for _ in range(3):
        images, before = torch.randn(5, 3, 6, 6), net[0].weight.detach().clone()
        for model in (net, twin):
            model.zero_grad()
            model(images).square().mean().backward()
        gradient = net[0].weight.grad.clone()
        ours.step()
        theirs.step()
        momentum = 0.6 * momentum + gradient
        u, _, v = torch.linalg.svd((gradient + 0.6 * momentum).flatten(1), full_matrices=False)
        moved = (before * 8**0.5 / before.norm() - net[0].weight.detach()).flatten(1) / 0.1
        assert torch.linalg.svdvals(moved).max() < 1.3
        assert torch.nn.functional.cosine_similarity(moved.flatten(), (u @ v).flatten(), 0) > 0.9
        for mine, other in zip([net[0].bias, *net[2].parameters()], others, strict=True):
            assert torch.allclose(mine, other, atol=1e-6)
        with torch.no_grad():
            twin[0].weight.copy_(net[0].weight)


def test_muon_continues_from_its_state():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3)
    second = copy.deepcopy(first)
    options = {"lr": 0.1, "aux_lr": 0.02, "momentum": 0.6, "weight_decay": 0.1}
    a, b = common.Muon(first.parameters(), **options), common.Muon(second.parameters(), **options)
    for step in range(4):
        if step == 2:
            state, b = b.state_dict(), common.Muon(second.parameters(), **options)
            b.load_state_dict(state)
        images = torch.randn(5, 3, 6, 6)
        for model, optimizer in ((first, a), (second, b)):
            model.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


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


def test_the_linear_schedule_falls_from_one_to_nothing():
    assert [common.SCHEDULES["linear"](progress) for progress in (0, 0.25, 1)] == [1, 0.75, 0]


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
