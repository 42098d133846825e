"""Does the Bayesian search find a lower validation loss than a random one, in as many trials?

    python benchmarks/bayes_against_random.py                  # 5 seeds of 20 trials each

The search is sweep.py's own for MNIST, learning rate from 1e-4 to 1e-1 and batch size 32, 64, 128
or 256, with the dense net on 5,000 images and the 6,000 of the validation split, so that hundreds
of trials take minutes. A seed is that of the proposals and of every training, the same for both
methods. Results are appended to benchmarks/results/bayes_against_random.jsonl.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, alternately, machine, mean_as_text, write_result

# isort: split
import common

from scipy import stats

ABOUT = {"trials": 20, "images": 5000, "epochs": 5}
FLAGS = "--model dense --limit-train {images} --epochs {epochs}"


def search(method: str, seed: int, about: dict) -> list[float]:
    """The validation losses of the trials of one search, in their order; infinity where the
    training diverged."""
    words = f"--method {method} --count {about['trials']} --seed {seed} --engine local --name s"
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, ROOT / "sweep.py", *words.split(), "--quiet"]
        command += ["--runs-dir", runs, "--", *FLAGS.format(**about).split()]
        subprocess.run(command, check=True)
        lines = map(json.loads, Path(runs, "s", "trials.jsonl").read_text().splitlines())
    return [line["val_loss"] if line["status"] == "finished" else math.inf for line in lines]


def main() -> int:
    """Search with each seed by both methods, and compare."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="searches of each method")
    for name, default in ABOUT.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    about = vars(parser.parse_args())
    seeds = about.pop("seeds")

    # Search, and keep what was found.
    found = alternately(
        ("random", "bayes"), seeds, lambda method, seed: search(method, seed, about)
    )
    write_result("bayes_against_random", about | {"val_loss": found})

    # The best of all trials, and of the first half.
    print(", ".join(f"{value} {name}" for name, value in about.items()), machine(), sep=", ")
    best = {method: [min(losses) for losses in searches] for method, searches in found.items()}
    for method, searches in found.items():
        half = [min(losses[: about["trials"] // 2]) for losses in searches]
        print(f"{method}: {mean_as_text(best[method], '.4f')}")
        print(f"{method}, after half of the trials: {mean_as_text(half, '.4f')}")

    # Seed by seed.
    differences = [bayes - random for random, bayes in zip(*best.values(), strict=True)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    print(f"bayes - random: {mean_as_text(differences, '.4f')}")
    print(f"95% interval {low:.4f} to {high:.4f} (paired t)")
    print(f"better with {sum(each < 0 for each in differences)} of {seeds} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
