"""How many times faster is one epoch of training here than in the tutorials' own pipeline?

    python benchmarks/throughput.py cifar                   # 45,000 images, three pairs: an hour
    python benchmarks/throughput.py cifar --images 5120     # the same in minutes
    python benchmarks/throughput.py mnist

`ours` is the training script itself (`train_cifar.py --c1 48` or `train_mnist.py`): the rate that
its log gives. `tutorial` is the same model, optimiser and batch size as the tutorials feed them: a
DataLoader without workers over torchvision's dataset, PIL transforms image by image, float32, NCHW,
torch's own dropout. Both train on the same number of images; loading the dataset and validation are
left out of both. Each measurement is a process of its own, and the two alternate. The arithmetic of
ours is told as a part of what the machine reaches in a 2048x2048 matrix product of the same
precision. Results are appended to benchmarks/results/throughput.jsonl.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measuring import alternately, in_a_process, machine, ratio_as_text, write_result

# isort: split
import common
import records
import train_cifar
import train_mnist

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DATA = records.HERE / "data"
# The script, the shape of its images, its flags, and the images of an epoch.
TASKS = {
    "cifar": (train_cifar, (3, 32, 32), ["--c1", "48"], 45_000),
    "mnist": (train_mnist, (1, 28, 28), [], 54_000),
}


def measure_ours(task: str, images: int) -> tuple[float, str]:
    """Images per second and precision of one epoch of the script."""
    script, _, argv, _ = TASKS[task]
    argv = [*argv, "--limit-train", str(images), "--epochs", "1", "--no-test", "--quiet"]
    with tempfile.TemporaryDirectory() as runs:
        record = script.main([*argv, "--runs-dir", runs])
        (row,) = records.read_log(Path(record["directory"]))
    return row["images_per_second"], record["precision"]


def measure_tutorial(task: str, images: int) -> tuple[float, str]:
    """The same of one epoch of the tutorials' pipeline."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    # Not parse_arguments: that sets the process up for ours, with an allocator that would make the
    # tutorial faster too. torch's own default decides how cuDNN computes.
    script, shape, _, _ = TASKS[task]
    args = argparse.Namespace(**script.RECIPES["default"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = False
    torch.manual_seed(42)

    # The dataset and the model.
    steps = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    if task == "cifar":
        changes = [
            transforms.RandomRotation(args.rotation),
            transforms.ColorJitter(brightness=args.brightness, hue=args.hue),
            transforms.RandomHorizontalFlip(args.flip),
        ]
        dataset = datasets.CIFAR10(DATA, transform=transforms.Compose(changes + steps))
        model = common.ConfigNet(shape, 10)
        model.dropout1, model.dropout2 = nn.Dropout(0.1), nn.Dropout(0.5)
    else:
        dataset = datasets.MNIST(DATA, transform=transforms.Compose(steps))
        model = common.CNN(shape, 10)
    model = model.to(device).train()
    loader = DataLoader(Subset(dataset, range(images)), batch_size=args.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    # One epoch. The MNIST tutorial reads the loss of every batch, the other of every fiftieth.
    began, total = time.perf_counter(), 0.0
    for batch, (pixels, labels) in enumerate(loader):
        pixels, labels = pixels.to(device), labels.to(device)
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if task == "mnist" or batch % 50 == 0:
            total += loss.item()
    loss.item()  # a GPU may still be at work
    return images / (time.perf_counter() - began), "fp32"


def operations_per_image(task: str) -> float:
    """Floating-point operations of the forward and the backward pass."""
    script, shape, argv, _ = TASKS[task]
    model = common.MODELS[script.parse_arguments(argv).model](shape, 10)
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(torch.zeros(8, *shape)), torch.zeros(8, dtype=torch.long))
        loss.backward()
    return counter.get_total_flops() / 8


def matrix_rate(precision: str) -> float:
    """Operations a second of a 2048x2048 matrix product, the median of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(2048, 2048, device=device, dtype=common.PRECISIONS[precision] or torch.float32)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(seconds[2:])


def main() -> int:
    """Measure both in turn, and print a line for each."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--images", type=int, help="of an epoch (all that do not validate)")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each")
    args = parser.parse_args()
    images = args.images or TASKS[args.task][3]

    # Measure.
    functions = {"ours": measure_ours, "tutorial": measure_tutorial}
    results = alternately(
        functions, args.pairs, lambda name, _: in_a_process(functions[name], args.task, images)
    )
    rates = {name: [rate for rate, _ in found] for name, found in results.items()}
    _, precision = results["ours"][0]
    rate = matrix_rate(precision)
    part = operations_per_image(args.task) * statistics.median(rates["ours"]) / rate

    # Say it, and keep it.
    about = {"task": args.task, "images": images, "pairs": args.pairs, "seed": 42}
    about |= {"threads": torch.get_num_threads(), "precision": precision}
    figures = {"matrix_gflops": rate / 1e9, "part_of_matrix_rate": part}
    write_result("throughput", about | {"images_per_second": rates} | figures)
    print(f"{args.task}, {images:,} images, {machine()}, torch {torch.__version__}, {precision}")
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):.0f} images/s")
    print(f"ours: {part:.0%} of the machine's matrix rate, {rate / 1e9:.0f} GFLOP/s;")
    print(f"{ratio_as_text(*rates.values())} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
