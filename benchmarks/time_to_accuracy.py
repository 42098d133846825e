"""How long does a recipe take, and what test accuracy does it reach, beside a reference?

    python benchmarks/time_to_accuracy.py --seeds 10 --target 0.99 train_mnist.py --recipe fast
    python benchmarks/time_to_accuracy.py --against "python other.py" train_cifar.py --recipe fast

Every run is a process of its own. `training` is what a recipe answers for: whitening, training,
validation, the test with its augmentation, and the files written in between. The rest of the
process, `start-up and loading`, is imports, reading the data, checking it and taking it to the
device.

--against takes the command of another implementation, which is run alternately with ours, once a
seed, with the seed as its last argument. The last line that it prints has to be
{"accuracy": 0.9401, "seconds": 533.1}, with the seconds of its own training and test.

Then it judges: is our mean accuracy above --target (one-sided t-test)? Do the two accuracies differ
(Welch's test)? And what part of the other's seconds are ours: geometric mean of the pairs, and
Student's 95% interval of its logarithm.

Each run is appended to benchmarks/results/time_to_accuracy.jsonl when it has ended. With --resume
those that the file already has, of the same code on the same machine, are not run again.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import (
    ROOT,
    alternately,
    find_result,
    machine,
    mean_as_text,
    ratio_as_text,
    write_result,
)

# isort: split
import common
import records

import torch
from scipy import stats


def timed(command: list[str]) -> tuple[str, float]:
    """What a command prints, and its seconds. RunError where it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise records.RunError(f"{shlex.join(command)} ended with status {done.returncode}")
    return done.stdout, time.perf_counter() - began


def measure_ours(recipe: list[str], seed: int) -> dict:
    """A run of the recipe."""
    with tempfile.TemporaryDirectory() as runs:
        where = ["--runs-dir", runs, "--run-name", "run", "--quiet"]
        _, wall = timed([sys.executable, *recipe, "--seed", str(seed), *where])
        record = records.read_record(Path(runs, "run"))
    about = {name: record[name] for name in ("seconds", "device", "precision")}
    return {"accuracy": record["test"]["acc"], "wall": wall, **about}


def measure_reference(command: str, seed: int) -> dict:
    """A run of the other implementation."""
    printed, wall = timed([*shlex.split(command), str(seed)])
    last = json.loads(printed.strip().splitlines()[-1])
    return {"accuracy": last["accuracy"], "seconds": last["seconds"], "wall": wall}


def judge(target: float | None, results: dict[str, list[dict]]) -> None:
    """Print what the runs of both prove."""
    accuracies = [[row["accuracy"] for row in rows] for rows in results.values()]
    if target is not None:
        p = stats.ttest_1samp(accuracies[0], target, alternative="greater").pvalue
        print(f"our mean is above {target:.2%}: p = {p:.4f}, one-sided t-test")
    if len(results) > 1:
        p = stats.ttest_ind(*accuracies, equal_var=False).pvalue
        print(f"the accuracies differ: p = {p:.4f}, Welch's test")
        seconds = [[row["seconds"] for row in rows] for rows in results.values()]
        print(f"ours take {ratio_as_text(*seconds)} of the other's seconds")


def main(argv: list[str]) -> dict:
    """Run both alternately, and judge."""
    parser = common.ArgumentParser(description=__doc__)
    count, part = common.number(int, 1), common.number(float, 0, 1)
    parser.add_argument("--seeds", type=count, default=5, help="runs of each, seeds from 0")
    parser.add_argument("--target", type=part, help="the accuracy that our mean is to exceed")
    parser.add_argument("--against", metavar="COMMAND", help="of a reference implementation")
    parser.add_argument("--resume", action="store_true", help="repeat nothing that was measured")
    parser.add_argument("recipe", nargs=argparse.REMAINDER, help="training script and its flags")
    args = parser.parse_args(argv)
    if not args.recipe:
        parser.error("which training script? for example: train_mnist.py --recipe fast")
    if "--no-test" in args.recipe:
        parser.error("--no-test: the accuracy is that of the test set")

    # Run both, and keep what came out. Results of different code are not of one table.
    about = {"recipe": args.recipe, "threads": torch.get_num_threads()}
    code = b"".join(Path(ROOT, name).read_bytes() for name in ("common.py", args.recipe[0]))

    def measure(name, seed):
        ours = name == "ours"
        key = about | {"implementation": name, "seed": seed}
        if ours:
            key["code"] = hashlib.sha256(code).hexdigest()
        row = args.resume and find_result("time_to_accuracy", key)
        if not row:
            row = measure_ours(args.recipe, seed) if ours else measure_reference(args.against, seed)
            write_result("time_to_accuracy", key | row)
        return row

    names = ["ours", args.against] if args.against else ["ours"]
    results = alternately(names, args.seeds, measure)

    # Means and standard deviations of each.
    print(f"{shlex.join(args.recipe)}, {machine()}, torch {torch.__version__}")
    for name, rows in results.items():
        print(f"{name}: accuracy {mean_as_text([row['accuracy'] for row in rows], '.2%')}")
        print(f"    training, s: {mean_as_text([row['seconds'] for row in rows], '.1f')}")
        rest = statistics.median(row["wall"] - row["seconds"] for row in rows)
        print(f"    start-up and loading, s: {rest:.1f}")
    if args.seeds > 1:
        judge(args.target, results)
    return {}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
