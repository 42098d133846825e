"""How long does a recipe take, and what test accuracy does it reach, over several seeds, beside a reference?

    python benchmarks/time_to_accuracy.py --seeds 10 --target 0.99 train_mnist.py --recipe fast
    python benchmarks/time_to_accuracy.py --seeds 3 --against "python other.py" train_cifar.py --recipe fast

Every run is a process of its own. `training` is what a recipe answers for: whitening, training, validation, the test
with its augmentation, and the files written in between. The rest of the process, `start-up and loading`, is imports,
reading the data, checking it and taking it to the device.

--against takes the command of another implementation, which is run alternately with ours, once a seed, with the seed
as its last argument. The last line that it prints has to be {"accuracy": 0.9401, "seconds": 533.1}, with the seconds
of its own training and test.

Then it judges: is our mean accuracy above --target (one-sided t-test)? Do the two accuracies differ (Welch's test)? And
what part of the other's seconds are ours: geometric mean of the pairs, and Student's 95% interval of its logarithm.

Each run is appended to benchmarks/results/time_to_accuracy.jsonl when it has ended. With --resume those that the file
already has of the same recipe, code, label, machine, torch and threads are shown, and not run again.
"""

import argparse
import hashlib
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, find_result, machine, write_result

# isort: split
import common
import records

import torch
from scipy import stats


def timed(command):
    """What a command prints, and its seconds; the benchmark ends where it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise records.RunError(f"{shlex.join(command)} ended with status {done.returncode}")
    return done.stdout, time.perf_counter() - began


def code_digest(script):
    """Of the files that a recipe is made of: results of different code are not of one table."""
    return hashlib.sha256(
        b"".join(Path(ROOT, name).read_bytes() for name in ("common.py", script))
    ).hexdigest()


def measure_ours(recipe, seed):
    with tempfile.TemporaryDirectory() as runs:
        where = ["--runs-dir", runs, "--run-name", "run", "--quiet"]
        _, wall = timed([sys.executable, *recipe, "--seed", str(seed), *where])
        record = records.read_record(Path(runs, "run"))
    return {
        "accuracy": record["test"]["acc"],
        "seconds": record["seconds"],
        "wall": wall,
        "device": record["device"],
        "precision": record["precision"],
    }


def measure_reference(command, seed):
    printed, wall = timed([*shlex.split(command), str(seed)])
    last = json.loads(printed.strip().splitlines()[-1])
    return {"accuracy": last["accuracy"], "seconds": last["seconds"], "wall": wall}


def mean_and_deviation(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def judge(target, ours, theirs=None):
    """Print what the runs of both prove, pair by pair."""
    accuracies = [[row["accuracy"] for row in rows] for rows in (ours, theirs or ())]
    if target is not None:
        p = stats.ttest_1samp(accuracies[0], target, alternative="greater").pvalue
        print(f"our mean is above {target:.2%}: p = {p:.4f}, one-sided t-test, n = {len(ours)}")
    if theirs:
        p = stats.ttest_ind(*accuracies, equal_var=False).pvalue
        print(f"the accuracies differ: p = {p:.4f}, Welch's test")
        logs = [
            math.log(one["seconds"] / other["seconds"])
            for one, other in zip(ours, theirs, strict=True)
        ]
        mean, error = statistics.mean(logs), stats.sem(logs)
        low, high = stats.t.interval(0.95, len(logs) - 1, mean, error)
        ratio = f"{math.exp(mean):.3f} of the other's seconds, 95% interval {math.exp(low):.3f} to {math.exp(high):.3f}"
        print(f"ours take {ratio}")


def main(argv):
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=common.number(int, 1), default=5, help="runs of each, seeds from 0"
    )
    parser.add_argument(
        "--target", type=common.number(float, 0, 1), help="the accuracy that our mean is to exceed"
    )
    parser.add_argument("--against", metavar="COMMAND", help="of a reference implementation")
    parser.add_argument("--label", help="what to call it")
    parser.add_argument(
        "--resume", action="store_true", help="do not repeat what has been measured"
    )
    parser.add_argument("recipe", nargs=argparse.REMAINDER, help="training script and its flags")
    args = parser.parse_args(argv)
    if not args.recipe:
        parser.error("which training script? for example: train_mnist.py --recipe fast")

    if "--no-test" in args.recipe:
        parser.error("--no-test: the accuracy is that of the test set")

    name, about = "time_to_accuracy", {"recipe": args.recipe, "threads": torch.get_num_threads()}
    measures = {"ours": lambda seed: measure_ours(args.recipe, seed)}
    if args.against:
        label = args.label or args.against
        measures[label] = lambda seed: measure_reference(args.against, seed)
    results = {implementation: [] for implementation in measures}
    for seed in range(args.seeds):
        for implementation in list(measures)[:: 1 if seed % 2 == 0 else -1]:
            code = {"code": code_digest(args.recipe[0])} if implementation == "ours" else {}
            key = {**about, **code, "implementation": implementation, "seed": seed}
            row = args.resume and find_result(name, key)
            if not row:
                row = measures[implementation](seed)
                write_result(name, {**key, **row})
            results[implementation].append(row)
            print(
                "{0}: {accuracy:.2%} in {seconds:.1f} s".format(implementation, **row),
                file=sys.stderr,
            )

    print(f"{shlex.join(args.recipe)}, {args.seeds} seeds, {machine()}, torch {torch.__version__}")
    width = max(map(len, results)) + 2
    print(f"{'':{width}}{'accuracy':>18}{'training, s':>18}{'start-up and loading, s':>25}")
    for implementation, rows in results.items():
        accuracy, deviation = mean_and_deviation([row["accuracy"] for row in rows])
        seconds, spread = mean_and_deviation([row["seconds"] for row in rows])
        rest = statistics.median(row["wall"] - row["seconds"] for row in rows)
        shown = f"{f'{accuracy:.2%} +- {deviation:.2%}':>18}{f'{seconds:.1f} +- {spread:.1f}':>18}"
        print(f"{implementation:{width}}{shown}{rest:25.1f}")
    if args.seeds > 1:
        judge(args.target, *results.values())
    return {}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
