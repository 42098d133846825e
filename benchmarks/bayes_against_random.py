"""Does the Bayesian search find a lower validation loss than a random one, in as many trials?

    python benchmarks/bayes_against_random.py                  # 5 seeds of 20 trials each

The search is sweep.py's own for MNIST, learning rate from 1e-4 to 1e-1 and batch size 32, 64, 128
or 256, with the dense net on 5,000 images and the 6,000 of the validation split, so that hundreds
of trials take minutes. A seed is that of the proposals and of every training, the same for both
methods. Results are appended to benchmarks/results/bayes_against_random.jsonl.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, alternately, machine, write_result

# isort: split
import common

from scipy import stats


def search(method: str, seed: int, args: argparse.Namespace) -> list[float]:
    """The validation losses of the trials of one search, in their order; infinity where the
    training diverged."""
    words = f"--method {method} --count {args.trials} --seed {seed} --engine local --name s --quiet"
    flags = f"--model dense --limit-train {args.images} --epochs {args.epochs}"
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, ROOT / "sweep.py", *words.split(), "--runs-dir", runs]
        command += ["--", *flags.split(), "--data-dir", args.data_dir.resolve()]
        subprocess.run(command, check=True)
        lines = map(json.loads, Path(runs, "s", "trials.jsonl").read_text().splitlines())
    return [line["val_loss"] if line["status"] == "finished" else math.inf for line in lines]


def main() -> int:
    """Search with each seed by both methods, and compare."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="searches of each method")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()

    # Search, and keep what was found.
    methods = ("random", "bayes")
    found = alternately(methods, args.seeds, lambda method, seed: search(method, seed, args))
    about = {"trials": args.trials, "images": args.images, "epochs": args.epochs}
    write_result("bayes_against_random", about | {"val_loss": found})

    # A line for each method.
    print(", ".join(f"{value} {name}" for name, value in about.items()), machine(), sep=", ")
    print(f"{'best validation loss':22}{'mean':>10}{'std':>10}{'after half':>12}")
    for method, searches in found.items():
        best = [min(losses) for losses in searches]
        half = statistics.fmean(min(losses[: args.trials // 2]) for losses in searches)
        mean, deviation = statistics.fmean(best), statistics.stdev(best)
        print(f"{method:22}{mean:10.4f}{deviation:10.4f}{half:12.4f}")

    # Seed by seed.
    pairs = zip(*found.values(), strict=True)
    differences = [min(bayes) - min(random) for random, bayes in pairs]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    interval = f"95% interval {low:.4f} to {high:.4f} (paired t)"
    print(f"bayes - random: {statistics.fmean(differences):.4f}, {interval},")
    print(f"better with {sum(each < 0 for each in differences)} of {len(differences)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
