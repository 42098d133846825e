"""What does each technique of a fast recipe bring? The recipe again and again, without one.

    python benchmarks/ablation.py --seeds 5 train_mnist.py
    python benchmarks/ablation.py --seeds 3 train_cifar.py --epochs 4

Accuracy and loss are those of the validation split, a tenth of the training images, after the last
epoch: no run reads the test set, and none averages views of an image. Flags after the script go to
every run. Results are appended to benchmarks/results/ablation.jsonl.
"""

import argparse
import contextlib
import importlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from measuring import alternately, machine, write_result

# isort: split
import common
import records

import torch
from torch import nn


class RandomPatches(common.Whitening):
    """A first layer of the same shape whose filters stay as torch draws them."""

    def learn(self, images):
        """Nothing."""


def plain_convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A convolution whose filters stay as torch draws them."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)


# What is left out: flags in place of the recipe's, or another definition of a name in common.py. A
# technique that is a setting of some recipes only comes with its name there.
LEFT_OUT = {
    "nothing": ([], {}),
    "whitening: random filters": ([], {"Whitening": RandomPatches}),
    "identity initialisation": ([], {"identity_convolution": plain_convolution}),
    "batch norm without scale, fast statistics": ([], {"batch_norm": nn.BatchNorm2d}),
    "Muon: AdamW for all": (["--optimizer", "adamw", "--lr", "0.01"], {}),
    "label smoothing": (["--label-smoothing", "0"], {}),
    "linear schedule": (["--schedule", "constant"], {}),
    "alternating flips": (["--no-alternate-flip"], {}, "alternate_flip"),
    "shifts": (["--shift", "0"], {}, "shift"),
    "small images first": (["--sizes", "1"], {}, "sizes"),
}


def measure(script: Any, flags: list[str], left_out: tuple, seed: int) -> dict:
    """Validation accuracy and loss after the last epoch, and the seconds of the training steps."""
    changed, definitions, *_ = left_out
    argv = ["--recipe", "fast", *flags, *changed, "--val-size", "0.1", "--no-test", "--quiet"]
    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        for name, definition in definitions.items():
            stack.enter_context(mock.patch.object(common, name, definition))
        record = script.main([*argv, "--runs-dir", runs, "--seed", str(seed)])
        if record["status"] != "finished":
            raise records.RunError(f"{' '.join(changed)}: {record['status']}")
        rows = records.read_log(Path(record["directory"]))
    seconds = sum(record["data"]["train"] / row["images_per_second"] for row in rows)
    return {"val_acc": rows[-1]["val_acc"], "val_loss": rows[-1]["val_loss"], "seconds": seconds}


def main(argv: list[str]) -> dict:
    """Train all variants with all seeds, and print a line for each."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, seeds from 0")
    parser.add_argument("script", choices=("train_mnist.py", "train_cifar.py"))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of every run")
    args = parser.parse_args(argv)
    script = importlib.import_module(Path(args.script).stem)
    recipe = script.RECIPES["fast"].keys()
    variants = [name for name, left_out in LEFT_OUT.items() if recipe >= set(left_out[2:])]

    # Train, and keep what came out.
    common.search_directory = Path.cwd()  # the images are read once
    found = alternately(
        variants, args.seeds, lambda name, seed: measure(script, args.flags, LEFT_OUT[name], seed)
    )
    about = {"script": args.script, "flags": args.flags, "threads": torch.get_num_threads()}
    write_result("ablation", about | {"left_out": found})

    # A line for each variant.
    print(
        f"{args.script} --recipe fast, {args.seeds} seeds, {machine()}, torch {torch.__version__}"
    )
    print(f"{'left out':45}{'accuracy':>12}{'change':>10}{'loss':>10}{'training, s':>14}")
    whole = statistics.mean(row["val_acc"] for row in found["nothing"])
    for name, rows in found.items():
        accuracy, loss, seconds = (statistics.mean(row[key] for row in rows) for key in rows[0])
        change = 100 * (accuracy - whole)
        print(f"{name:45}{accuracy:12.2%}{change:+10.2f}{loss:10.4f}{seconds:14.1f}")
    return {}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
