"""What does sweep.py add to the training of a trial, and what does it save against a loop of a shell?

    python benchmarks/sweep_overhead.py               # a few minutes

The trial is short: `train_mnist.py --model dense` on 2,000 images, one epoch, without the test. `alone` calls the
script's main() again and again in one process, the data loaded once; `grid` and `bayes` are `sweep.py --jobs 1` over
the same script. Of each, the seconds a trial are (time of a process with --trials trials - time of one with a quarter
of them) / the difference in trials, so that start-up and report are in neither; the overhead is the difference to
`alone`. `loop` is one `python train_mnist.py` a trial, whole; it is compared with a whole `sweep.py --jobs 2`, its
report included. All alternate; medians. Results are appended to benchmarks/results/sweep_overhead.jsonl.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine, write_result

import common

FLAGS = ["--model", "dense", "--epochs", "1", "--limit-train", "2000"]

# The same trials in one process that stays, without sweep.py.
ALONE = """
import sys, common, train_mnist
common.loaded_datasets = {}
for number in range(int(sys.argv[1])):
    train_mnist.main([*sys.argv[2:], "--lr", str(1e-4 * (1 + number)), "--run-name", f"trial-{number}"])
"""


def seconds(commands, runs):
    began = time.perf_counter()
    for command in commands:
        subprocess.run([sys.executable, *command], check=True, cwd=runs, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def rates(trials):
    return [f"{1e-4 * (1 + number):.4f}" for number in range(trials)]


def run(name, trials, jobs, data_dir):
    """Seconds of `trials` trials, with everything around them."""
    flags = [*FLAGS, "--data-dir", str(data_dir)]
    with tempfile.TemporaryDirectory() as runs:
        quiet = ["--no-test", "--quiet", "--runs-dir", "runs"]
        if name == "loop":
            script = str(ROOT / "train_mnist.py")
            return seconds([[script, *flags, *quiet, "--lr", rate] for rate in rates(trials)], runs)
        if name == "alone":
            Path(runs, "alone.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ALONE}")
            return seconds([["alone.py", str(trials), *flags, *quiet]], runs)
        space = f"lr={','.join(rates(trials))}" if name == "grid" else "lr=log:1e-4..1e-2"
        search = ["--method", name, "--script", "train_mnist.py", "--param", space, "--count", str(trials)]
        search += ["--engine", "local", "--jobs", str(jobs), "--quiet", "--name", "s"]
        return seconds([[str(ROOT / "sweep.py"), *search, "--", *flags]], runs)


def main():
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=common.number(int, 4), default=16)
    parser.add_argument("--pairs", type=common.number(int, 1), default=3, help="measurements of each")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    few, where = args.trials // 4, args.data_dir.resolve()
    marginal = {"alone": [], "grid": [], "bayes": []}
    whole = {"loop": [], "sweep": []}
    for pair in range(args.pairs):
        for name in marginal if pair % 2 == 0 else reversed(marginal):
            more, less = run(name, args.trials, 1, where), run(name, few, 1, where)
            marginal[name].append((more - less) / (args.trials - few))
            print(f"{name}: {marginal[name][-1]:.3f} s a trial", file=sys.stderr)
        for name in whole if pair % 2 == 0 else reversed(whole):
            whole[name].append(run("loop" if name == "loop" else "grid", args.trials, 2, where))
            print(f"{name}: {whole[name][-1]:.1f} s for {args.trials} trials", file=sys.stderr)
    write_result("sweep_overhead", {"trials": args.trials, "seconds_a_trial": marginal, "seconds_in_all": whole})
    median = {name: statistics.median(values) for name, values in {**marginal, **whole}.items()}
    ratio = statistics.median(a / b for a, b in zip(whole["loop"], whole["sweep"], strict=True))
    print(f"{args.trials} trials, {args.pairs} pairs, {machine()}")
    print(f"{'':12}{'s a trial':>10}{'overhead':>10}")
    for name in marginal:
        print(f"{name:12}{median[name]:10.3f}{median[name] - median['alone']:10.3f}")
    print(f"whole: a shell's loop {median['loop']:.1f} s, sweep.py --jobs 2 {median['sweep']:.1f} s: {ratio:.1f} times")


if __name__ == "__main__":
    main()
