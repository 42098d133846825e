"""What does each technique of a fast recipe bring? The recipe again and again, one of them left out at a time.

    python benchmarks/ablation.py --seeds 5 train_mnist.py
    python benchmarks/ablation.py --seeds 3 train_cifar.py --epochs 4

Accuracy and loss are those of the validation split, a tenth of the training images, after the last epoch: no run reads
the test set, and none averages views of an image. Flags after the script go to every run. Results are appended to
benchmarks/results/ablation.jsonl.
"""

import argparse
import contextlib
import importlib
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

from measuring import machine, write_result

# isort: split
import common
import records

import torch
from torch import nn


class RandomPatches(common.Whitening):
    """A first layer of the same shape whose filters stay as torch draws them."""

    def learn(self, images):
        """Nothing."""


def plain_convolution(channels_in, channels_out):
    """A convolution whose filters stay as torch draws them."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)


# What is left out: flags instead of the recipe's, or another definition of a name in common.py. A technique that is a
# setting of some recipes only comes with its name there.
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


def measure(script, flags, left_out, seed):
    """Validation accuracy and loss after the last epoch, and the seconds of the training steps."""
    changed, definitions, *_ = left_out
    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        for name, definition in definitions.items():
            stack.enter_context(mock.patch.object(common, name, definition))
        where = [
            "--val-size",
            "0.1",
            "--no-test",
            "--quiet",
            "--runs-dir",
            runs,
            "--seed",
            str(seed),
        ]
        record = script.main(["--recipe", "fast", *flags, *changed, *where])
        if record["status"] != "finished":
            raise records.RunError(f"{' '.join(changed)}: {record['status']}")
        rows = records.read_log(Path(record["directory"]))
    seconds = sum(record["data"]["train"] / row["images_per_second"] for row in rows)
    return rows[-1]["val_acc"], rows[-1]["val_loss"], seconds


def main(argv):
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=common.number(int, 1), default=3, help="runs of each, seeds from 0"
    )
    parser.add_argument("script", choices=("train_mnist.py", "train_cifar.py"))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of every run")
    args = parser.parse_args(argv)
    script = importlib.import_module(Path(args.script).stem)
    variants = {
        name: how for name, how in LEFT_OUT.items() if script.RECIPES["fast"].keys() >= set(how[2:])
    }

    common.search_directory = Path.cwd()  # the images are read once
    results = {name: [] for name in variants}
    for seed in range(args.seeds):
        for name, left_out in variants.items():
            results[name].append(measure(script, args.flags, left_out, seed))
            print(
                "{}: {:.2%}, loss {:.4f}, {:.1f} s".format(name, *results[name][-1]),
                file=sys.stderr,
            )

    print(
        f"{args.script} --recipe fast, {args.seeds} seeds, {machine()}, torch {torch.__version__}"
    )
    print(f"{'left out':45}{'accuracy':>12}{'change':>10}{'loss':>10}{'training, s':>14}")
    means = {
        name: [statistics.mean(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    for name, (accuracy, loss, seconds) in means.items():
        change = accuracy - means["nothing"][0]
        print(f"{name:45}{accuracy:>12.2%}{change * 100:>+10.2f}{loss:10.4f}{seconds:14.1f}")
    columns = ("val_acc", "val_loss", "seconds")
    rows = {
        name: [dict(zip(columns, row, strict=True)) for row in rows]
        for name, rows in results.items()
    }
    about = {"script": args.script, "flags": args.flags, "threads": torch.get_num_threads()}
    write_result("ablation", {**about, "left_out": rows})
    return {}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
