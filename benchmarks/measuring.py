"""What the benchmarks share: where they are, on what machine, and where their results go."""

import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402


def machine():
    """The name of the GPU; or that of the CPU with the number of cores and the widest vectors that torch uses there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}, {torch.backends.cpu.get_cpu_capability()}"


def results_file(name):
    return ROOT / "benchmarks" / "results" / f"{name}.jsonl"


def here():
    return {"machine": machine(), "torch": torch.__version__}


def write_result(name, row):
    """Append a row, with the machine and torch's version, to benchmarks/results/<name>.jsonl."""
    output = results_file(name)
    output.parent.mkdir(exist_ok=True)
    with open(output, "a") as file:
        file.write(json.dumps({**row, **here()}) + "\n")


def find_result(name, key):
    """The last row there with all the values of `key` and of this machine and this torch, or None."""
    rows = results_file(name).read_text().splitlines() if results_file(name).exists() else []
    wanted = {**key, **here()}.items()
    return next((row for row in map(json.loads, reversed(rows)) if wanted <= row.items()), None)


def ratio_of_pairs(ours, theirs):
    """Geometric mean of ours / theirs over pairs, and Student's 95% interval [low, high] of it."""
    from scipy import stats

    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = stats.t.interval(0.95, len(logs) - 1, mean, error)
    return math.exp(mean), [math.exp(low), math.exp(high)]
