"""What does each mistake of the CIFAR-10 tutorial cost? Its two trainings, with some of them mended.

    python benchmarks/mistakes.py                       # hours; goes on where it was stopped
    python benchmarks/mistakes.py --nets convnet --seeds 42 --threads 1
    python benchmarks/mistakes.py --table               # the table of what has been measured so far

ConvNet trains for 10 epochs in batches of 24, without augmentation: with all mistakes, with each one
mended alone, with all but one mended, and with none. ConfigNet 48-96-256 trains for 50 epochs with all,
with none, and with each one mended alone. `printed` is the accuracy that the tutorial would print: of
ConvNet after the last epoch, of ConfigNet in the epoch of the lowest loss, on the images that choose it.
`test` is that of the weights that are kept, on the test set, read once more at the end. Results are
appended to benchmarks/results/mistakes.jsonl.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from measuring import find_result, results_file, write_result

# isort: split
import records
import train_cifar

import torch

# What mends each mistake, in place of the flags of --recipe tutorial.
MISTAKES = {
    "dropout in evaluation": ["--no-always-dropout"],
    "batch norm after dropout": ["--no-tutorial-layers"],
    "the test set chooses": ["--val-size", "0.1"],
}
NETS = {
    "convnet": "--model convnet --batch-size 24 --epochs 10 --no-augment --lr 0.001 --keep last",
    "confignet": "--model confignet --c1 48 --epochs 50",
}


def cases(net: str) -> list[tuple[str, ...]]:
    """The sets of mistakes that are mended."""
    names = tuple(MISTAKES)
    alone = [(name,) for name in names]
    but_one = [tuple(name for name in names if name != left) for left in names]
    return [(), *alone, *(but_one if net == "convnet" else ()), names]


def measure(net: str, mended: tuple[str, ...], seed: int, args: argparse.Namespace) -> dict:
    """Train once, or go on where that was stopped: the two accuracies."""
    name = f"{net}-{'-'.join(str(list(MISTAKES).index(one)) for one in mended)}-{seed}"
    directory = args.runs_dir / name
    if (directory / "last.pt").exists():
        argv = ["--resume", str(directory)]
    else:
        flags = [flag for mistake in mended for flag in MISTAKES[mistake]]
        argv = ["--recipe", "tutorial", *NETS[net].split(), *flags, "--seed", str(seed)]
        argv += ["--runs-dir", str(args.runs_dir), "--run-name", name]
        argv += ["--data-dir", str(args.data_dir), "--threads", str(args.threads)]
    record = train_cifar.main([*argv, "--quiet"])
    rows = records.read_log(directory)
    printed = rows[-1] if net == "convnet" else rows[record["best"]["epoch"] - 1]
    return {"printed": printed["val_acc"], "test": record["test"]["acc"]}


def print_table() -> None:
    """A line for each net and set of mended mistakes: mean, standard deviation and n."""
    path = results_file("mistakes")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["net"], tuple(row["mended"])), []).append(row)
    for (net, mended), group in groups.items():
        print(f"{net:10} mended: {', '.join(mended) or 'nothing'}")
        for figure in ("printed", "test"):
            values = [row[figure] * 100 for row in group]
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(f"    {figure:8} {statistics.fmean(values):.2f}%{spread} (n = {len(values)})")


def main() -> int:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-dir", type=Path, default=records.HERE / "data")
    parser.add_argument("--runs-dir", type=Path, default=records.HERE / "runs" / "mistakes")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    args = parser.parse_args()
    for net in () if args.table else args.nets:
        for seed in args.seeds:
            for mended in cases(net):
                key = {"net": net, "mended": list(mended), "seed": seed}
                if not find_result("mistakes", key):
                    write_result("mistakes", key | measure(net, mended, seed, args))
    print_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
