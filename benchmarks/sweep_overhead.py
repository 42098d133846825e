"""What does sweep.py add to the training of a trial, and what does it save against a loop of a shell?

    python benchmarks/sweep_overhead.py                            # 1, 16 and 101 trials: minutes
    python benchmarks/sweep_overhead.py --beside DIR --pairs 5     # and those of another checkout
    python benchmarks/sweep_overhead.py --ways loop "grid, 2 jobs" --trials 16

The trial is short: `train_mnist.py --model dense` on 2,000 images, one epoch, without the test.
`alone` calls the script's main() again and again in one process, the data loaded once; `grid` and
`bayes` are sweep.py over the same script, with one job; `loop` is `python train_mnist.py` for each
trial. A trial takes the time from one printed line to the next, the whole from the command to its
end, with sweep.py's report. All ways alternate. Results are appended to
benchmarks/results/sweep_overhead.jsonl.
"""

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine, ratio_of_pairs, write_result

FLAGS = ["--model", "dense", "--epochs", "1", "--limit-train", "2000"]
SWEEPS = {"grid": ("grid", 1), "bayes": ("bayes", 1), "grid, 2 jobs": ("grid", 2)}

# The same trials in one process that stays, without sweep.py.
ALONE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common, train_mnist
common.search_directory = common.Path(".")
rates, flags = sys.argv[1].split(","), sys.argv[2:]
for number, rate in enumerate(rates):
    train_mnist.main([*flags, "--lr", rate, "--run-name", f"trial-{{number}}"])
    print("trial", number, flush=True)
"""


def commands_of(way: str, trials: int, root: Path, flags: list[str]) -> list[list[str]]:
    """The command lines of Python that run so many trials."""
    rates = [f"{1e-4 * (1 + number):.4f}" for number in range(trials)]
    quiet = ["--no-test", "--quiet", "--runs-dir", "runs"]
    if way == "alone":
        return [["-c", ALONE, ",".join(rates), *flags, *quiet]]
    if way == "loop":
        return [[str(root / "train_mnist.py"), *flags, *quiet, "--lr", rate] for rate in rates]
    method, jobs = SWEEPS[way]
    space = "lr=log:1e-4..1e-2" if method == "bayes" else f"lr={','.join(rates)}"
    search = f"--method {method} --script train_mnist.py --param {space} --jobs {jobs} --name s"
    search += f" --count {trials} --engine local --runs-dir runs"
    return [[str(root / "sweep.py"), *search.split(), "--", *flags]]


def run(commands: list[list[str]]) -> tuple[float, list[float]]:
    """The seconds in all, and those of each trial but the first."""
    began, times = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as here:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=here, stdout=subprocess.PIPE, text=True
            )
            for line in process.stdout:
                if re.match(r"trial +\d", line):  # and not the heading of the table
                    times.append(time.perf_counter())
            if process.wait():
                raise SystemExit(f"failed: {command}")
        seconds = time.perf_counter() - began
    return seconds, [after - before for before, after in itertools.pairwise(times)]


def compare(name: str, ours: list[float], others: list[float]) -> None:
    """Print the ratio of two ways, over the pairs, with its 95% interval."""
    if len(ours) > 1:
        mean, (low, high) = ratio_of_pairs(ours, others)
        print(f"    {name}: {mean:.3f} ({low:.3f} to {high:.3f}, n = {len(ours)})")


def main() -> int:
    """Measure all ways in turn, and print a table for each number of trials."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = ["alone", "loop", *SWEEPS]
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 16, 101])
    parser.add_argument("--ways", nargs="+", choices=ways, default=["alone", *SWEEPS])
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout")
    args = parser.parse_args()
    roots = {way: (way, ROOT) for way in args.ways}
    if args.beside:
        roots |= {
            f"{way}, beside": (way, args.beside.resolve()) for way in args.ways if way in SWEEPS
        }
    flags = [*FLAGS, "--data-dir", str(args.data_dir.resolve())]
    print(machine())
    for trials in args.trials:
        whole: dict = {name: [] for name in roots}
        single: dict = {name: [] for name in roots}
        for pair in range(args.pairs):
            for name in roots if pair % 2 == 0 else reversed(roots):
                way, root = roots[name]
                seconds, times = run(commands_of(way, trials, root, flags))
                whole[name].append(seconds)
                single[name] += times
        write_result(
            "sweep_overhead",
            {"trials": trials, "seconds_a_trial": single, "seconds_in_all": whole},
        )
        print(f"{trials} trials, medians of {args.pairs}: seconds in all, and of a trial")
        for name in roots:
            text = f"{name:24}{statistics.median(whole[name]):8.1f}"
            if single[name] and "2 jobs" not in name:
                text += f"{statistics.median(single[name]):8.3f}"
            print(text)
            if f"{name}, beside" in whole:
                compare("in all, of that beside", whole[name], whole[f"{name}, beside"])
        if {"grid", "grid, 2 jobs"} <= whole.keys():
            compare("2 jobs, of 1 job", whole["grid, 2 jobs"], whole["grid"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
