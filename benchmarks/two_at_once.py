"""What do two trainings at once reach together, beside one alone?

    python benchmarks/two_at_once.py convnet                 # ten rounds, about ten minutes on two cores
    python benchmarks/two_at_once.py cnn --rounds 5

A round measures one training alone, two at once as they come, and two at once with `--threads 1` each, in turn. Each is
one epoch on synthetic images in a process of its own; its images a second are those of its log. Results are appended to
benchmarks/results/two_at_once.jsonl.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, machine, ratio_of_pairs, write_result

# isort: split
import common

TASKS = {
    "convnet": ("train_cifar.py", "--model convnet --batch-size 24 --no-augment", 2_500),
    "confignet": ("train_cifar.py", "--c1 48", 4_000),
    "cnn": ("train_mnist.py", "", 9_000),
}
KINDS = {"alone": (1, []), "two": (2, []), "two, one thread each": (2, ["--threads", "1"])}


def measure(task, kind):
    """Images a second of all processes together."""
    script, flags, images = TASKS[task]
    count, threads = KINDS[kind]
    argv = [
        *flags.split(),
        "--dataset",
        "synthetic",
        "--limit-train",
        str(images),
        "--epochs",
        "1",
        "--no-test",
    ]
    rate = 0
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, ROOT / script, *argv, *threads, "--runs-dir", runs]
        names = [f"r{index}" for index in range(count)]
        processes = [
            subprocess.Popen([*command, "--run-name", name], stdout=subprocess.PIPE, text=True)
            for name in names
        ]
        for process, name in zip(processes, names, strict=True):
            process.communicate()
            rate += json.loads(Path(runs, name, "log.jsonl").read_text())["images_per_second"]
    return rate


def main():
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument(
        "--rounds", type=common.number(int, 2), default=10, help="measurements of each"
    )
    args = parser.parse_args()
    rates = {kind: [] for kind in KINDS}
    for index in range(args.rounds):
        for kind in list(KINDS) if index % 2 == 0 else list(KINDS)[::-1]:
            rates[kind].append(measure(args.task, kind))
            print(f"{kind}: {rates[kind][-1]:.0f} images/s", file=sys.stderr)
    row = {"task": args.task, "rounds": args.rounds, "images_per_second": rates}
    print(f"{args.task}, {args.rounds} rounds, {machine()}; images a second, and beside one alone:")
    for kind, values in rates.items():
        ratio, (low, high) = (
            ratio_of_pairs(values, rates["alone"]) if kind != "alone" else (1, (1, 1))
        )
        row[kind] = [ratio, low, high]
        text = f"{ratio:.2f} (95% interval {low:.2f} to {high:.2f})"
        print(f"{kind:24} {statistics.median(values):6.0f}  {text}")
    write_result("two_at_once", row)


if __name__ == "__main__":
    main()
