"""How long does it take to load a folder of photos, and how much memory, beside torchvision's ImageFolder?

    python benchmarks/folders.py                       # 5,000 JPEGs, 100 of them of 4,000x3,000 pixels; five rounds

`ours` is what a training does before its first step: list, read, check and decode all files into one tensor of 64x64
pixels. `torchvision` is one pass over ImageFolder with Resize in a DataLoader with two workers. Each measurement is a
process of its own, and the two alternate. Memory is the peak of ours above what it took before, in parts of the pixels
that are kept. Results are appended to benchmarks/results/folders.jsonl.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import machine, ratio_of_pairs, write_result

# isort: split
import common
import train_cifar

SIDE = 64


def make_folder(root, files, large):
    """JPEGs of two classes, noise over a gradient, of 320x240 pixels, but `large` of them of 4,000x3,000."""
    from PIL import Image

    dice = random.Random(0)
    grains = Image.effect_noise((400, 300), 80)
    for index in range(files):
        size = (4000, 3000) if index % (files // large) == 0 else (320, 240)
        place = root / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        left, top = dice.randrange(200), dice.randrange(150)
        crop = grains.crop((left, top, left + 200, top + 150)).resize(size).convert("RGB")
        crop.save(place / f"{index}.jpg", quality=90)


def memory(kind):
    return 1024 * int(re.search(rf"{kind}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure_ours(root):
    argv = [
        "--dataset",
        str(root),
        "--image-size",
        str(SIDE),
        "--quiet",
        "--runs-dir",
        str(root / "runs"),
    ]
    args = train_cifar.parse_arguments(argv)
    import PIL.Image  # noqa: F401 (imports are in both before the clock starts)
    import torchvision.datasets  # noqa: F401

    before, began = memory("VmRSS"), time.perf_counter()
    data = common.load_data(args, train_cifar.synthetic)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": (memory("VmHWM") - before) / data.train.pixels.nbytes}


def measure_torchvision(root):
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    began = time.perf_counter()
    steps = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.PILToTensor()])
    loader = DataLoader(datasets.ImageFolder(root, steps), batch_size=100, num_workers=2)
    for _ in loader:
        pass
    return {"seconds": time.perf_counter() - began}


def main():
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=common.number(int, 20), default=5000)
    parser.add_argument(
        "--large", type=common.number(int, 1), default=100, help="of 4,000x3,000 pixels"
    )
    parser.add_argument("--rounds", type=common.number(int, 2), default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    measures = {"ours": measure_ours, "torchvision": measure_torchvision}
    if args.measure:
        name, root = args.measure
        print(json.dumps(measures[name](Path(root))))
        return
    results = {name: [] for name in measures}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.files, args.large)
        for index in range(args.rounds):
            for name in list(measures) if index % 2 == 0 else list(measures)[::-1]:
                command = [sys.executable, __file__, "--measure", name, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[name].append(json.loads(done.stdout))
                print(name, results[name][-1], file=sys.stderr)
    seconds = {name: [one["seconds"] for one in values] for name, values in results.items()}
    ratio, interval = ratio_of_pairs(seconds["ours"], seconds["torchvision"])
    peak = max(one["memory"] for one in results["ours"])
    row = {"files": args.files, "large": args.large, "seconds": seconds, "ratio": ratio}
    write_result("folders", {**row, "interval": interval, "memory": peak})
    print(f"{args.files:,} files, {args.large} of 4,000x3,000, {args.rounds} rounds, {machine()}")
    for name, values in seconds.items():
        print(f"{name:12} {statistics.median(values):.1f} s")
    low, high = interval
    print(
        f"ours / torchvision: {ratio:.2f} (95% interval {low:.2f} to {high:.2f}); memory {peak:.2f} of the pixels"
    )


if __name__ == "__main__":
    main()
