"""What does each mistake of the CIFAR-10 tutorial cost? Its trainings, with some mended.

    python benchmarks/mistakes.py                       # hours; goes on where it was stopped
    python benchmarks/mistakes.py --nets convnet --seeds 42 --threads 1
    python benchmarks/mistakes.py --table               # the table of what was measured so far

ConvNet trains for 10 epochs in batches of 24, without augmentation. `search` is the best trial of
the tutorial's search: ConfigNet 48-96-256, 10 epochs at a learning rate of 0.001. Both keep their
last epoch: so the test set chooses nothing there, and two mistakes are left. Dropout in evaluation
does not change what such a training learns, so its weights are evaluated both ways. `confignet` is
the tutorial's last training, 50 epochs: with all mistakes, with each one mended alone, and with
none. The accuracy is that of the weights that are kept, on the test set. Results are appended to
benchmarks/results/mistakes.jsonl.
"""

import argparse
import sys
from pathlib import Path

from measuring import find_result, mean_as_text, read_results, write_result

# isort: split
import common
import evaluate
import records
import train_cifar

import torch

NETS = {
    "convnet": "--model convnet --batch-size 24 --epochs 10 --no-augment --lr 0.001 --keep last",
    "search": "--model confignet --c1 48 --epochs 10 --lr 0.001 --keep last",
    "confignet": "--model confignet --c1 48 --epochs 50",
}

# What mends each mistake, in place of the flags of --recipe tutorial.
DROPOUT = "dropout in evaluation"
MISTAKES = {
    DROPOUT: ["--no-always-dropout"],
    "batch norm after dropout": ["--no-tutorial-layers"],
    "the test set chooses": ["--val-size", "0.1"],
}
# The mistakes that are mended in each training.
TRAININGS = {
    "convnet": [(), ("batch norm after dropout",)],
    "search": [(), ("batch norm after dropout",)],
    "confignet": [(), *((mistake,) for mistake in MISTAKES), tuple(MISTAKES)],
}


def train(net: str, mended: tuple[str, ...], seed: int, args: argparse.Namespace) -> dict:
    """The record of a training, begun or continued."""
    numbers = [list(MISTAKES).index(mistake) for mistake in mended]
    name = "-".join(map(str, [net, *numbers, seed]))
    directory = args.runs_dir / name
    if (directory / "last.pt").exists():
        return train_cifar.main(["--resume", str(directory), "--quiet"])
    flags = [flag for mistake in mended for flag in MISTAKES[mistake]]
    argv = ["--recipe", "tutorial", *NETS[net].split(), *flags, "--seed", seed, "--quiet"]
    argv += ["--runs-dir", args.runs_dir, "--run-name", name]
    argv += ["--threads", args.threads]
    return train_cifar.main([str(word) for word in argv])


def without_dropout(directory: str) -> float:
    """The accuracy of a run on the test set, with dropout switched off."""
    asked = evaluate.parse_arguments([directory, "--quiet"])
    trained = evaluate.load_trained(Path(directory), asked)
    for layer in (trained.model.dropout1, trained.model.dropout2):
        layer.always = False
    meter, _ = trained.evaluate(evaluate.load_images(trained, "test", asked))
    return meter.accuracy


def measure(net: str, mended: tuple[str, ...], seed: int, args: argparse.Namespace) -> None:
    """Write down what a training reaches."""
    record = train(net, mended, seed, args)
    accuracies = {mended: record["test"]["acc"]}
    if "--keep last" in NETS[net]:
        accuracies[DROPOUT, *mended] = without_dropout(record["directory"])
    for mistakes, accuracy in accuracies.items():
        key = {"net": net, "mended": list(mistakes), "seed": seed}
        write_result("mistakes", key | {"accuracy": accuracy})


def print_table() -> None:
    """A line for each net and set of mended mistakes."""
    groups: dict[tuple, list[float]] = {}
    for row in read_results("mistakes"):
        groups.setdefault((row["net"], *row["mended"]), []).append(row["accuracy"])
    for (net, *mended), accuracies in groups.items():
        text = ", ".join(mended) or "nothing"
        print(f"{net:10} {mean_as_text(accuracies, '.2%')}  mended: {text}")


def main() -> int:
    """Measure what is not measured yet, and print the table."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs-dir", type=Path, default=records.HERE / "runs" / "mistakes")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    args = parser.parse_args()
    for net in () if args.table else args.nets:
        for seed in args.seeds:
            for mended in TRAININGS[net]:
                if not find_result("mistakes", {"net": net, "mended": list(mended), "seed": seed}):
                    measure(net, mended, seed, args)
    print_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
