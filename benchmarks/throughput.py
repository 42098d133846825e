"""How many times faster is one epoch of training here than in the tutorials' own pipeline, on this machine?

    python benchmarks/throughput.py cifar                                 # 45,000 images, three pairs: about an hour
    python benchmarks/throughput.py cifar --images 5120                   # the same in minutes
    python benchmarks/throughput.py mnist

`ours` is the training script itself (`train_cifar.py --c1 48` or `train_mnist.py`), the rate that its log gives.
`tutorial` is the same model, optimiser and batch size as the tutorials feed them: a DataLoader without workers over
torchvision's dataset, PIL transforms image by image, float32, NCHW, torch's own dropout. Both train on the same
number of images; loading the dataset and validation are left out of both. Each measurement is a process of its own,
and the two alternate. The last column is the arithmetic of the training as a part of what the machine reaches in a
2048x2048 matrix product of ours' precision. Results are appended to benchmarks/results/throughput.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine, write_result

# isort: split
import common
import train_cifar
import train_mnist

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TASKS = {
    "cifar": {"script": train_cifar, "shape": (3, 32, 32), "argv": ["--c1", "48"]},
    "mnist": {"script": train_mnist, "shape": (1, 28, 28), "argv": []},
}


def measure_ours(task, images, data_dir):
    """Images per second and precision of one epoch of the script."""
    with tempfile.TemporaryDirectory() as runs:
        where = ["--data-dir", str(data_dir), "--runs-dir", runs, "--no-test", "--quiet"]
        argv = [*TASKS[task]["argv"], "--limit-train", str(images), "--epochs", "1", *where]
        record = TASKS[task]["script"].main(argv)
        row = json.loads((Path(record["directory"]) / "log.jsonl").read_text())
    return {"images_per_second": row["images_per_second"], "precision": record["precision"]}


def measure_tutorial(task, images, data_dir):
    """Images per second of one epoch of the tutorials' pipeline."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    # Not parse_arguments: it sets up the process for ours, with an allocator that makes the tutorial faster too.
    args = argparse.Namespace(**TASKS[task]["script"].RECIPES["default"])
    half = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = (
        False  # torch's own default, where ours has been measured before
    )
    torch.manual_seed(42)
    if task == "cifar":
        jitter = transforms.ColorJitter(brightness=args.brightness, hue=args.hue)
        changes = [
            transforms.RandomRotation(args.rotation),
            jitter,
            transforms.RandomHorizontalFlip(args.flip),
        ]
        dataset = datasets.CIFAR10(data_dir, transform=transforms.Compose(changes + half))
        model = common.ConfigNet((3, 32, 32), 10)
        model.dropout1, model.dropout2 = nn.Dropout(0.1), nn.Dropout(0.5)
    else:
        dataset = datasets.MNIST(data_dir, transform=transforms.Compose(half))
        model = common.CNN((1, 28, 28), 10)
    model = model.to(device).train()
    loader = DataLoader(Subset(dataset, range(images)), batch_size=args.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    began, total = time.perf_counter(), 0.0
    for batch, (pixels, labels) in enumerate(loader):
        pixels, labels = pixels.to(device), labels.to(device)
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # The MNIST tutorial reads the loss of every batch, the CIFAR-10 tutorial that of every fiftieth.
        if task == "mnist" or batch % 50 == 0:
            total += loss.item()
    loss.item()  # a GPU may still be at work
    return {"images_per_second": images / (time.perf_counter() - began), "precision": "fp32"}


def flop_per_image(task):
    """Floating-point operations of the forward and the backward pass, an image."""
    model = common.MODELS[TASKS[task]["script"].parse_arguments(TASKS[task]["argv"]).model](
        TASKS[task]["shape"], 10
    )
    images = torch.zeros(8, *TASKS[task]["shape"])
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), torch.zeros(8, dtype=torch.long)).backward()
    return counter.get_total_flops() / 8


def matrix_rate(precision):
    """Operations a second of a 2048x2048 matrix product, the median of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(2048, 2048, device=device, dtype=common.PRECISIONS[precision] or torch.float32)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(seconds[2:])


def main():
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument(
        "--images", type=common.number(int, 1), help="an epoch (all that are not for validation)"
    )
    parser.add_argument(
        "--pairs", type=common.number(int, 1), default=3, help="measurements of each"
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--measure", choices=("ours", "tutorial"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    images = args.images or {"cifar": 45_000, "mnist": 54_000}[args.task]
    if args.measure:
        measure = {"ours": measure_ours, "tutorial": measure_tutorial}[args.measure]
        print(json.dumps(measure(args.task, images, args.data_dir)))
        return

    results = {"ours": [], "tutorial": []}
    command = [
        sys.executable,
        __file__,
        args.task,
        "--images",
        str(images),
        "--data-dir",
        str(args.data_dir),
    ]
    for pair in range(args.pairs):
        for name in ("ours", "tutorial") if pair % 2 == 0 else ("tutorial", "ours"):
            done = subprocess.run(
                [*command, "--measure", name], stdout=subprocess.PIPE, text=True, check=True
            )
            results[name].append(json.loads(done.stdout))
            print(f"{name}: {results[name][-1]['images_per_second']:.0f} images/s", file=sys.stderr)
    precision = results["ours"][0]["precision"]
    rates = {
        name: [one["images_per_second"] for one in measured] for name, measured in results.items()
    }
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    rate, flop = matrix_rate(precision), flop_per_image(args.task)
    row = {
        "task": args.task,
        "images": images,
        "pairs": args.pairs,
        "threads": torch.get_num_threads(),
        "seed": 42,
        "precision": precision,
        "images_per_second": rates,
        "ratio": ratio,
        "matrix_gflops": rate / 1e9,
        "part_of_matrix_rate": flop * median["ours"] / rate,
    }
    write_result("throughput", row)
    print(
        f"{args.task}, {images:,} images, {args.pairs} pairs, {machine()}, torch {torch.__version__}"
    )
    print(
        f"{'':10}{'precision':>10}{'images/s':>10}{'s/epoch':>10}{'ratio':>8}{'of matrix rate':>16}"
    )
    for name in ("tutorial", "ours"):
        part = flop * median[name] / rate
        speed = 1 if name == "tutorial" else ratio
        used = results[name][0]["precision"]
        print(
            f"{name:10}{used:>10}{median[name]:10.0f}{images / median[name]:10.1f}{speed:8.2f}{part:16.0%}"
        )


if __name__ == "__main__":
    main()
