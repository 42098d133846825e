"""What does sweep.py add to the training of a trial, and what does it save against a loop of a shell?

    python benchmarks/sweep_overhead.py               # some minutes
    python benchmarks/sweep_overhead.py --beside DIR  # the sweep.py of another checkout too, as `grid beside`

The trial is short: `train_mnist.py --model dense` on 2,000 images, one epoch, without the test. `alone` calls the
script's main() again and again in one process, the data loaded once; `grid` and `bayes` are `sweep.py --jobs 1` over
the same script. Each prints a line a trial; a trial takes the time from one line to the next, and the median of these
times tells the overhead. `loop` is one `python train_mnist.py` a trial, whole; it is compared with a whole `sweep.py
--jobs 2`, its report included. All alternate. Results are appended to benchmarks/results/sweep_overhead.jsonl.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine, write_result

# isort: split
import common

FLAGS = ["--model", "dense", "--epochs", "1", "--limit-train", "2000"]

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


def run(name, trials, jobs, data_dir, root=ROOT):
    """Run so many trials: the seconds in all, and those of each trial but the first."""
    rates = [f"{1e-4 * (1 + number):.4f}" for number in range(trials)]
    flags = [*FLAGS, "--data-dir", str(data_dir)]
    runs = ["--runs-dir", "runs"]
    quiet = ["--no-test", "--quiet", *runs]
    commands = [["-c", ALONE, ",".join(rates), *flags, *quiet]]
    if name == "loop":
        commands = [[str(ROOT / "train_mnist.py"), *flags, *quiet, "--lr", rate] for rate in rates]
    elif name != "alone":
        space = "lr=log:1e-4..1e-2" if name == "bayes" else f"lr={','.join(rates)}"
        search = [
            "--method",
            name,
            "--script",
            "train_mnist.py",
            "--param",
            space,
            "--jobs",
            str(jobs),
        ]
        search += ["--count", str(trials), "--engine", "local", "--name", "s", *runs]
        commands = [[str(root / "sweep.py"), *search, "--", *flags]]
    began, times = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as here:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=here, stdout=subprocess.PIPE, text=True
            )
            times += [time.perf_counter() for line in process.stdout if line.startswith("trial")][
                :trials
            ]
            if process.wait():
                raise SystemExit(f"{name} failed")
        seconds = time.perf_counter() - began
    return seconds, [after - before for before, after in itertools.pairwise(times)]


def main():
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=common.number(int, 2), default=16)
    parser.add_argument(
        "--pairs", type=common.number(int, 1), default=3, help="measurements of each"
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument(
        "--beside", type=Path, metavar="DIR", help="another checkout of this repository"
    )
    args = parser.parse_args()
    names, where = ["alone", "grid", "bayes", "loop", "sweep"], args.data_dir.resolve()
    names += ["grid beside", "bayes beside"] if args.beside else []
    a_trial, in_all = {name: [] for name in names}, {name: [] for name in names}
    for pair in range(args.pairs):
        for name in names if pair % 2 == 0 else reversed(names):
            kind, root = name.split()[0], args.beside.resolve() if "beside" in name else ROOT
            jobs = 2 if name == "sweep" else 1
            seconds, times = run(
                "grid" if name == "sweep" else kind, args.trials, jobs, where, root
            )
            in_all[name].append(seconds)
            a_trial[name] += times
            print(f"{name}: {seconds:.1f} s for {args.trials} trials", file=sys.stderr)
    write_result(
        "sweep_overhead",
        {"trials": args.trials, "seconds_a_trial": a_trial, "seconds_in_all": in_all},
    )
    print(f"{args.trials} trials, {args.pairs} times, {machine()}")
    print(f"{'':14}{'s a trial':>10}{'overhead':>10}{'s in all':>10}")
    alone = statistics.median(a_trial["alone"])
    for name in names:
        whole = f"{statistics.median(in_all[name]):10.1f}"
        median = statistics.median(a_trial[name]) if name not in ("loop", "sweep") else None
        print(
            f"{name:14}"
            + (f"{median:10.3f}{median - alone:10.3f}" if median else f"{'':20}")
            + whole
        )
    ratio = statistics.median(a / b for a, b in zip(in_all["loop"], in_all["sweep"], strict=True))
    print(f"a shell's loop takes {ratio:.1f} times as long as sweep.py --jobs 2")


if __name__ == "__main__":
    main()
