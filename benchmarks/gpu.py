"""What is to be known of a GPU, in one table: accuracy and time, speed, the search, exact resume, memory.

    python benchmarks/gpu.py --against airbench94_muon="python airbench.py" --seeds 20
    python benchmarks/gpu.py --quick      # a handful of steps of everything, on a CPU too: does it run?

The fast recipe is compiled once before it is timed, as its references have it: only runs in the same process after the
first count. --against takes the command of a reference: the number of its runs is the last argument, it warms up as it
likes, and the last line that it prints is {"accuracy": [...], "seconds": [...]}. Each row of the table is also appended
to benchmarks/results/gpu.jsonl.
"""

import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine, write_result

# isort: split
import common
import records
import sweep
import train_cifar
import train_mnist

import throughput
import time_to_accuracy
import torch
from PIL import Image
from scipy import stats

FEW = ["--dataset", "synthetic", "--limit-train", "640", "--batch-size", "64"]


def run(script, *argv, on_epoch=None):
    """The record of a run whose directory is deleted, and the rows of its log."""
    with tempfile.TemporaryDirectory() as runs:
        record = script.main([*map(str, argv), "--runs-dir", runs, "--quiet"], on_epoch)
        return record, records.read_log(Path(record["directory"]))


def weights_of(directory):
    return records.load_checkpoint(Path(directory, "best.pt"))["weights"]


def fast(args, few):
    """(a) The fast recipe, n seeds, compiled before; beside each reference."""
    recipe = ["--recipe", "fast", "--compile", *args.flags.split(), *few]
    run(train_cifar, *recipe, "--no-test")
    ours = [run(train_cifar, *recipe, "--seed", seed)[0] for seed in range(args.seeds)]
    accuracies, seconds = [one["test"]["acc"] for one in ours], [one["seconds"] for one in ours]
    yield "fast recipe: accuracy", statistics.mean(accuracies)
    yield "fast recipe: seconds", statistics.mean(seconds)
    if args.seeds > 1:
        yield (
            "fast recipe: p of 94.0%",
            stats.ttest_1samp(accuracies, 0.94, alternative="greater").pvalue,
        )
    for text in args.against:
        name, _, command = text.partition("=")
        printed, _ = time_to_accuracy.timed([*shlex.split(command), str(args.seeds)])
        theirs = json.loads(printed.strip().splitlines()[-1])
        yield f"{name}: accuracy", statistics.mean(theirs["accuracy"])
        yield f"{name}: seconds", statistics.mean(theirs["seconds"])
        yield (
            f"fast recipe: seconds, of {name}'s",
            statistics.mean(seconds) / statistics.mean(theirs["seconds"]),
        )


def tutorial(args, few):
    """(b) An epoch beside the tutorial's own pipeline."""
    images = 640 if few else 45_000
    ours = throughput.measure_ours("cifar", images, args.data_dir)["images_per_second"]
    theirs = throughput.measure_tutorial("cifar", images, args.data_dir)["images_per_second"]
    yield "epoch of the tutorial: images/s, ours", ours
    yield "epoch of the tutorial: images/s, its own pipeline", theirs
    yield "epoch of the tutorial: times faster", ours / theirs


def grid(args, few):
    """(c) The tutorial's search: eight configurations of ten epochs, 49 min 44 s there."""
    with tempfile.TemporaryDirectory() as runs:
        began = time.perf_counter()
        sweep.main(
            [
                "--method",
                "grid",
                "--runs-dir",
                runs,
                "--quiet",
                "--",
                *few,
                *(["--epochs", "1"] if few else []),
            ]
        )
        yield "grid of eight: seconds", time.perf_counter() - began


def exact(args, few):
    """(d) Exact resume, the first epoch in each precision and compiled, beside fp32 on a CPU."""
    few = [*FEW, "--epochs", "3", "--quiet"]
    for script, recipe in (
        (train_mnist, "default"),
        (train_cifar, "default"),
        (train_cifar, "fast"),
    ):
        with tempfile.TemporaryDirectory() as runs:
            argv = ["--recipe", recipe, *few, "--runs-dir", runs]
            whole, cut = (
                script.main(argv)["directory"],
                script.main([*argv, "--stop-after", "1"])["directory"],
            )
            script.main(["--resume", cut, "--quiet"])
            one, other = weights_of(whole), weights_of(cut)
        name = f"{script.__name__} --recipe {recipe}"
        yield f"{name}: exact resume", all(torch.equal(one[key], other[key]) for key in one)
        expected = run(
            script,
            "--recipe",
            recipe,
            *FEW,
            "--epochs",
            1,
            "--device",
            "cpu",
            "--precision",
            "fp32",
        )[1]
        ways = [["--precision", precision] for precision in ("fp32", "bf16", "fp16")] + [
            ["--compile"]
        ]
        for way in ways[:2] + ways[3:] if args.device == "cpu" else ways:
            found = run(script, "--recipe", recipe, *FEW, "--epochs", 1, *way)[1]
            difference = (
                abs(found[0]["train_loss"] - expected[0]["train_loss"]) / expected[0]["train_loss"]
            )
            yield f"{name} {' '.join(way)}: first epoch's loss, relative difference", difference


def memory(args, few):
    """(d) The most memory with a folder of images of 224 pixels, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        for index in range(20 if few else 2000):
            Path(folder, f"class{index % 2}").mkdir(exist_ok=True)
            Image.new("RGB", (224, 224), (index % 256, 0, 0)).save(
                Path(folder, f"class{index % 2}", f"{index}.png")
            )
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run(
            train_cifar,
            "--dataset",
            folder,
            "--image-size",
            224,
            "--batch-size",
            8 if few else 256,
            "--epochs",
            1,
        )
    if args.device == "cuda":
        yield "folder of 224 pixels, batches of 256: GB", torch.cuda.max_memory_allocated() / 1e9


def deterministic(args, few):
    """(e) What cudnn.deterministic, which is on in every training, costs: the second epoch with it and without."""
    rates = {True: [], False: []}
    for pair in range(1 if few else 3):
        for choice in (True, False) if pair % 2 else (False, True):

            def choose(row, choice=choice):
                torch.backends.cudnn.deterministic = choice

            _, rows = run(
                train_cifar, "--c1", 48, "--epochs", 2, "--no-test", *few, on_epoch=choose
            )
            rates[choice].append(rows[1]["images_per_second"])
    yield (
        "cudnn.deterministic: part of the speed without it",
        statistics.median(rates[True]) / statistics.median(rates[False]),
    )


def main(argv):
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=common.number(int, 1), default=20, help="runs of the fast recipe"
    )
    parser.add_argument(
        "--against", action="append", default=[], metavar="NAME=COMMAND", help="a reference"
    )
    parser.add_argument(
        "--flags", default="", help='of the fast recipe, as one word: "--batch-size 2000"'
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument(
        "--only", choices=[part.__name__ for part in PARTS], action="append", help="these parts"
    )
    parser.add_argument("--quick", action="store_true", help="a handful of steps of each")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    few = [*FEW, "--epochs", "2"] if args.quick else []
    rows = []
    for part in PARTS:
        if not args.only or part.__name__ in args.only:
            for name, value in part(args, few):
                rows.append((name, f"{value:.5g}"))
                print(f"{name}: {rows[-1][1]}", file=sys.stderr)
                if not args.quick:
                    write_result("gpu", {"name": name, "value": float(value), "seeds": args.seeds})
    print(f"{machine()}, torch {torch.__version__}")
    for name, value in rows:
        print(f"{name:90} {value:>10}")
    return {}


PARTS = (fast, tutorial, grid, exact, memory, deterministic)

if __name__ == "__main__":
    sys.exit(common.command_line(main))
