"""Does the Bayesian search find a lower validation loss than a random one, in the same number of trials?

    python benchmarks/bayes_against_random.py                  # 5 seeds of 20 trials each

The search is sweep.py's own for MNIST, learning rate from 1e-4 to 1e-1 and batch size 32, 64, 128 or 256, with the
dense net on 5,000 images and the 6,000 of the validation split, so that hundreds of trials take minutes. A seed is
that of the proposals and of every training, the same for both methods. Results are appended to
benchmarks/results/bayes_against_random.jsonl.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, machine, write_result

# isort: split
import common

from scipy import stats


def losses(method, seed, args):
    """The validation losses of the trials of one search, in their order; infinity where the training diverged."""
    flags = ["--model", "dense", "--limit-train", str(args.images), "--epochs", str(args.epochs)]
    with tempfile.TemporaryDirectory() as runs:
        search = [
            "--method",
            method,
            "--count",
            str(args.trials),
            "--seed",
            str(seed),
            "--engine",
            "local",
        ]
        command = [
            sys.executable,
            str(ROOT / "sweep.py"),
            *search,
            "--runs-dir",
            runs,
            "--name",
            "s",
            "--quiet",
        ]
        subprocess.run(
            [*command, "--", *flags, "--data-dir", str(args.data_dir.resolve())], check=True
        )
        lines = map(json.loads, Path(runs, "s", "trials.jsonl").read_text().splitlines())
    return [line["val_loss"] if line["status"] == "finished" else float("inf") for line in lines]


def main():
    parser = common.ArgumentParser(description=__doc__)
    count = common.number(int, 1)
    parser.add_argument(
        "--seeds", type=common.number(int, 2), default=5, help="searches of each method"
    )
    parser.add_argument("--trials", type=count, default=20)
    parser.add_argument("--images", type=count, default=5000)
    parser.add_argument("--epochs", type=count, default=5)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    found = {"random": [], "bayes": []}
    for seed in range(args.seeds):
        for method, searches in found.items():
            searches.append(losses(method, seed, args))
            print(f"{method}, seed {seed}: {min(searches[-1]):.4f}", file=sys.stderr)
    row = {"trials": args.trials, "images": args.images, "epochs": args.epochs, "val_loss": found}
    write_result("bayes_against_random", row)
    print(
        f"{args.seeds} seeds, {args.trials} trials, {args.images:,} images, {args.epochs} epochs, {machine()}"
    )
    print(f"{'best validation loss':22}{'mean':>10}{'std':>10}{'after half':>12}")
    for method, searches in found.items():
        best = [min(values) for values in searches]
        half = statistics.fmean(min(values[: args.trials // 2]) for values in searches)
        print(
            f"{method:22}{statistics.fmean(best):10.4f}{statistics.stdev(best):10.4f}{half:12.4f}"
        )
    pairs = list(zip(*found.values(), strict=True))
    differences = [min(b) - min(a) for a, b in pairs]
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval()
    print(
        f"bayes - random: {statistics.fmean(differences):.4f}, 95% interval {low:.4f} to {high:.4f} (paired t), ",
        end="",
    )
    print(f"better with {sum(difference < 0 for difference in differences)} of {len(pairs)} seeds")


if __name__ == "__main__":
    main()
