"""What is to be known of a GPU, in one table: the fast recipe, the tutorial's epoch, exact resume.

    python benchmarks/gpu.py --against airbench94_muon="python airbench.py" --seeds 20
    python benchmarks/gpu.py --quick      # a handful of steps of everything, on a CPU too

The fast recipe is compiled once before it is timed. --against takes the command of a reference that
does the same: the number of its runs is the last argument, and the last line that it prints is
{"accuracy": [...], "seconds": [...]}. Results are appended to benchmarks/results/gpu.jsonl.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, machine, write_result

# isort: split
import common
import records
import train_cifar
import train_mnist

import throughput
import torch
from scipy import stats

FEW = ["--dataset", "synthetic", "--limit-train", "640", "--batch-size", "64", "--epochs", "2"]


def run(script, runs, *argv):
    """The record of a run."""
    return script.main([*map(str, argv), "--runs-dir", runs, "--quiet"])


def fast_recipe(args, few, runs):
    """The fast recipe with all seeds, beside each reference."""
    recipe = ["--recipe", "fast", "--compile", *few]
    run(train_cifar, runs, *recipe, "--no-test")
    ours = [run(train_cifar, runs, *recipe, "--seed", seed) for seed in range(args.seeds)]
    accuracies, seconds = [one["test"]["acc"] for one in ours], [one["seconds"] for one in ours]
    yield "fast recipe: accuracy", statistics.mean(accuracies)
    yield "fast recipe: seconds", statistics.mean(seconds)
    if args.seeds > 1:
        above = stats.ttest_1samp(accuracies, 0.94, alternative="greater")
        yield "fast recipe: p of 94.0%", above.pvalue
    for text in args.against:
        name, _, command = text.partition("=")
        command = [*shlex.split(command), str(args.seeds)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        theirs = json.loads(printed.strip().splitlines()[-1])
        yield f"{name}: accuracy", statistics.mean(theirs["accuracy"])
        yield f"{name}: seconds", statistics.mean(theirs["seconds"])


def tutorial_epoch(args, few, runs):
    """An epoch of ConfigNet beside the tutorial's own pipeline, images per second."""
    images = 640 if few else 45_000
    ours = throughput.measure_ours("cifar", images, args.data_dir)["images_per_second"]
    theirs = throughput.measure_tutorial("cifar", images, args.data_dir)["images_per_second"]
    yield "epoch of the tutorial: images/s", ours
    yield "epoch of the tutorial: times as fast as its own pipeline", ours / theirs


def exact_resume(args, few, runs):
    """Whether a run that was stopped ends with the weights of one that was not; 1 for yes."""
    for script, recipe in (
        (train_mnist, "default"),
        (train_cifar, "default"),
        (train_cifar, "fast"),
    ):
        argv = ["--recipe", recipe, *FEW]
        whole, cut = run(script, runs, *argv), run(script, runs, *argv, "--stop-after", 1)
        script.main(["--resume", cut["directory"], "--quiet"])
        one, other = (
            records.load_checkpoint(Path(each["directory"], "best.pt"))["weights"]
            for each in (whole, cut)
        )
        same = all(torch.equal(one[key], other[key]) for key in one)
        yield f"{script.__name__} --recipe {recipe}: exact resume", same


def main() -> int:
    """Measure all, and print the table."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="runs of the fast recipe")
    parser.add_argument("--against", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--quick", action="store_true", help="a handful of steps of each")
    args = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as runs:
        for part in (fast_recipe, tutorial_epoch, exact_resume):
            for name, value in part(args, FEW if args.quick else [], runs):
                print(f"{name:70} {float(value):10.5g}", flush=True)
                if not args.quick:
                    write_result("gpu", {"name": name, "value": float(value), "seeds": args.seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
