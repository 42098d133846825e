"""How much faster is Winograd's convolution than torch's own, forward and backward, on this CPU in float32?

    python benchmarks/convolution.py

The layers are fastnet's, on images of 32x32 pixels and, the last two, of 24x24. Each pair of measurements alternates,
and the medians are shown; the results are appended to benchmarks/results/convolution.jsonl.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from measuring import machine, write_result

import common

LAYERS = [(24, 64, 33), (64, 64, 16), (64, 256, 16), (256, 256, 8), (256, 256, 4), (64, 256, 12), (256, 256, 6)]


def seconds(convolve, images, weight, gradient):
    began = time.perf_counter()
    torch.autograd.grad(convolve(images, weight), (images, weight), gradient)
    return time.perf_counter() - began


def main(argv):
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=common.number(int, 1), default=2000, help="in a batch")
    parser.add_argument("--pairs", type=common.number(int, 1), default=5, help="measurements of each")
    args = parser.parse_args(argv)
    common.keep_freed_memory()
    methods = {"torch": lambda x, w: F.conv2d(x, w, padding=1), "winograd": common.WinogradConvolution.apply}
    print(f"{args.images} images, {machine()}, torch {torch.__version__}")
    print(f"{'channels':>12}{'pixels':>8}{'torch, s':>10}{'winograd, s':>13}{'ratio':>7}")
    for channels, outputs, side in LAYERS:
        images = torch.randn(args.images, channels, side, side).contiguous(memory_format=torch.channels_last)
        gradient = torch.randn(args.images, outputs, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        images.requires_grad_(), weight.requires_grad_()
        times = {name: [] for name in methods}
        for _ in range(args.pairs + 1):
            for name, convolve in methods.items():
                times[name].append(seconds(convolve, images, weight, gradient))
        ours, theirs = (statistics.median(times[name][1:]) for name in ("winograd", "torch"))  # the first warms up
        print(f"{channels:>5} ->{outputs:>4}{side:8}{theirs:10.3f}{ours:13.3f}{ours / theirs:7.2f}")
        layer = {"channels": channels, "outputs": outputs, "side": side, "images": args.images}
        write_result("convolution", {**layer, "torch_seconds": theirs, "winograd_seconds": ours})
    return {}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
