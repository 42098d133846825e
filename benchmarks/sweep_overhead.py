"""What does sweep.py add to the training of a trial, and what does it save against a loop?

    python benchmarks/sweep_overhead.py                            # 1, 16 and 101 trials: minutes
    python benchmarks/sweep_overhead.py --beside DIR --pairs 5     # and those of another checkout
    python benchmarks/sweep_overhead.py --ways loop "grid, 2 jobs" --trials 16

The trial is short: `train_mnist.py --model dense` on 2,000 images, one epoch, without the test.
`alone` calls the script's main() again and again in one process, the data loaded once; `grid` and
`bayes` are sweep.py over the same script, with one job; `loop` is `python train_mnist.py` for each
trial. A trial takes the time from one printed line to the next (sweep.py looks every fifth of a
second), the whole from the command to its end, with sweep.py's report. All ways alternate. Results
are appended to benchmarks/results/sweep_overhead.jsonl.
"""

import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, alternately, machine, ratio_as_text, write_result

# isort: split
import common

FLAGS = ["--model", "dense", "--epochs", "1", "--limit-train", "2000"]
FLAGS += ["--data-dir", str(ROOT / "data")]  # which another checkout may not have
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


def commands_of(way: str, trials: int, root: Path) -> list[list[str]]:
    """The command lines of Python that run so many trials."""
    rates = [f"{1e-4 * (1 + number):.4f}" for number in range(trials)]
    quiet = ["--no-test", "--quiet", "--runs-dir", "runs"]
    if way == "alone":
        return [["-c", ALONE, ",".join(rates), *FLAGS, *quiet]]
    if way == "loop":
        return [[str(root / "train_mnist.py"), *FLAGS, *quiet, "--lr", rate] for rate in rates]
    method, jobs = SWEEPS[way]
    space = "lr=log:1e-4..1e-2" if method == "bayes" else f"lr={','.join(rates)}"
    search = f"--method {method} --script train_mnist.py --param {space} --jobs {jobs} --name s"
    search += f" --count {trials} --engine local --runs-dir runs"
    return [[str(root / "sweep.py"), *search.split(), "--", *FLAGS]]


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


def main() -> int:
    """Measure all ways in turn, and print a table for each number of trials."""
    parser = common.ArgumentParser(description=__doc__)
    ways = ["alone", "loop", *SWEEPS]
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 16, 101])
    parser.add_argument("--ways", nargs="+", choices=ways, default=["alone", *SWEEPS])
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout")
    args = parser.parse_args()
    roots = {way: (way, ROOT) for way in args.ways}
    if args.beside:
        sweeps = [way for way in args.ways if way in SWEEPS]
        roots |= {f"{way}, beside": (way, args.beside.resolve()) for way in sweeps}

    def measure(name, _):
        way, root = roots[name]
        return run(commands_of(way, trials, root))

    print(machine())
    for trials in args.trials:
        # Measure, and keep it.
        found = alternately(roots, args.pairs, measure)
        whole = {name: [seconds for seconds, _ in pairs] for name, pairs in found.items()}
        single = {
            name: [each for _, times in pairs for each in times] for name, pairs in found.items()
        }
        row = {"trials": trials, "seconds_a_trial": single, "seconds_in_all": whole}
        write_result("sweep_overhead", row)

        # The table.
        print(f"{trials} trials, medians of {args.pairs}: seconds in all, and of a trial")
        for name, seconds in whole.items():
            text = f"{name:24}{statistics.median(seconds):8.1f}"
            if single[name] and "2 jobs" not in name:
                text += f"{statistics.median(single[name]):8.3f}"
            print(text)
            if f"{name}, beside" in whole:
                ratio = ratio_as_text(seconds, whole[f"{name}, beside"])
                print(f"    in all, of that beside: {ratio}")
        if {"grid", "grid, 2 jobs"} <= whole.keys():
            print(f"    2 jobs, of 1: {ratio_as_text(whole['grid, 2 jobs'], whole['grid'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
