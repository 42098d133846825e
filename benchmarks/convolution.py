"""How much faster is Winograd's convolution than torch's own, forward and backward, on this CPU in float32?

    python benchmarks/convolution.py

The layers are fastnet's, on images of 32x32 pixels and, the last two, of 24x24; then come whole passes through fastnet.
Each pair of measurements alternates, and the medians are shown; the results are appended to
benchmarks/results/convolution.jsonl.
"""

import statistics
import sys
import time
from unittest import mock

import torch
import torch.nn.functional as F
from measuring import machine, write_result

import common

LAYERS = [(24, 64, 33), (64, 64, 16), (64, 256, 16), (256, 256, 8), (256, 256, 4), (64, 256, 12), (256, 256, 6)]


def medians(pairs, **ways):
    """The median seconds of each of `ways`, functions that are called in turn; the first calls warm up."""
    times = {name: [] for name in ways}
    for _ in range(pairs + 1):
        for name, compute in ways.items():
            began = time.perf_counter()
            compute()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(some[1:]) for name, some in times.items()}


def random_tensor(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def measure_layer(channels, outputs, side, count, pairs):
    images, weight = random_tensor(count, channels, side, side), random_tensor(outputs, channels, 3, 3)
    gradient = random_tensor(count, outputs, side, side)
    inputs = images.requires_grad_(), weight.requires_grad_()

    def by(convolve):
        return lambda: torch.autograd.grad(convolve(*inputs), inputs, gradient)

    return medians(
        pairs, torch=by(lambda *inputs: F.conv2d(*inputs, padding=1)), winograd=by(common.WinogradConvolution.apply)
    )


def measure_net(side, count, pairs):
    net = common.fastnet((3, 32, 32), 10).to(memory_format=torch.channels_last)
    images, labels = random_tensor(count, 3, side, side), torch.randint(10, (count,))

    def passes(capability):
        with mock.patch.object(torch.backends.cpu, "get_cpu_capability", return_value=capability):
            F.cross_entropy(net(images), labels).backward()

    return medians(pairs, torch=lambda: passes("AVX512"), winograd=lambda: passes("AVX2"))


def main(argv):
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=common.number(int, 1), default=2000, help="in a batch")
    parser.add_argument("--pairs", type=common.number(int, 1), default=5, help="measurements of each")
    args = parser.parse_args(argv)
    common.keep_freed_memory()
    print(f"{args.images} images, {machine()}, torch {torch.__version__}")
    print(f"{'channels':>12}{'pixels':>8}{'torch, s':>10}{'winograd, s':>13}{'ratio':>7}")

    def report(what, side, seconds, **about):
        ratio = seconds["winograd"] / seconds["torch"]
        print(f"{what:>12}{side:8}{seconds['torch']:10.3f}{seconds['winograd']:13.3f}{ratio:7.2f}")
        measured = {f"{name}_seconds": some for name, some in seconds.items()}
        write_result("convolution", {**about, "side": side, "images": args.images, **measured})

    for channels, outputs, side in LAYERS:
        seconds = measure_layer(channels, outputs, side, args.images, args.pairs)
        report(f"{channels} ->{outputs:>4}", side, seconds, channels=channels, outputs=outputs)
    for side in (32, 24):
        report("fastnet", side, measure_net(side, args.images, args.pairs), net="fastnet")
    return {}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
