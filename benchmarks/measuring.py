"""What the benchmarks share: where they are, on what machine, and where their results go."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402


def machine() -> str:
    """The name of the GPU; or that of the CPU, with the number of cores and the widest vectors that
    torch uses there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}, {torch.backends.cpu.get_cpu_capability()}"


def here() -> dict:
    """What every result depends on."""
    return {"machine": machine(), "torch": torch.__version__}


def results_file(name: str) -> Path:
    """Where the results of a benchmark are kept, a JSON line each."""
    return ROOT / "benchmarks" / "results" / f"{name}.jsonl"


def write_result(name: str, row: dict) -> None:
    """Append a row, with the machine and torch's version."""
    output = results_file(name)
    output.parent.mkdir(exist_ok=True)
    with open(output, "a") as file:
        file.write(json.dumps({**row, **here()}) + "\n")


def find_result(name: str, key: dict) -> dict | None:
    """The last row with all the values of `key`, of this machine and this torch."""
    path = results_file(name)
    rows = path.read_text().splitlines() if path.exists() else []
    wanted = {**key, **here()}.items()
    return next((row for row in map(json.loads, reversed(rows)) if wanted <= row.items()), None)


def in_a_process(*words: Any, **environment: str) -> dict:
    """Run a Python script with these arguments; the last line that it prints is JSON.

    CalledProcessError where it fails.
    """
    command = [sys.executable, *map(str, words)]
    env = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternately(names: Iterable[str], rounds: int, measure: Callable) -> dict[str, list]:
    """What `measure` gives for each name, once a round; every second round runs backwards."""
    results: dict[str, list] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(measure(name, number))
            print(f"{name}: {results[name][-1]}", file=sys.stderr)
    return results


def ratio_as_text(ours: list[float], theirs: list[float]) -> str:
    """Geometric mean of ours / theirs over pairs, and Student's 95% interval of it."""
    from scipy import stats

    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return f"{math.exp(mean):.2f} (n = 1)"
    ends = stats.t.interval(0.95, len(logs) - 1, mean, stats.sem(logs))
    low, high = map(math.exp, ends)
    return f"{math.exp(mean):.2f} (95% interval {low:.2f} to {high:.2f}, n = {len(logs)})"
