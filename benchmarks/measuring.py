"""What the benchmarks share: where they are, on what machine, and where their results go."""

import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
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
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
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
    with open(results_file(name), "a") as file:
        file.write(json.dumps({**row, **here()}) + "\n")


def read_results(name: str) -> list[dict]:
    """The rows that were written, on whatever machine."""
    path = results_file(name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find_result(name: str, key: dict) -> dict | None:
    """The last row with all the values of `key`, of this machine and this torch."""
    wanted = {**key, **here()}.items()
    return next((row for row in reversed(read_results(name)) if wanted <= row.items()), None)


def in_a_process(function: Callable, *arguments: Any) -> Any:
    """What a function of a script gives in a new process, which has computed nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alternately(names: Iterable[str], rounds: int, measure: Callable) -> dict[str, list]:
    """What `measure` gives for each name, once a round; every second round runs backwards."""
    results: dict[str, list] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(measure(name, number))
            print(f"{name}: {results[name][-1]}", file=sys.stderr)
    return results


def mean_as_text(values: list[float], form: str) -> str:
    """Mean and standard deviation, and how many values there are."""
    spread = f" +- {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread} (n = {len(values)})"


def ratio_as_text(ours: list[float], theirs: list[float]) -> str:
    """Geometric mean of ours / theirs over pairs, and Student's 95% interval of it."""
    from scipy import stats

    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean = math.exp(statistics.fmean(logs))
    if len(logs) < 2:
        return f"{mean:.2f} (n = 1)"
    low, high = map(math.exp, stats.ttest_1samp(logs, 0).confidence_interval())
    return f"{mean:.2f} (95% interval {low:.2f} to {high:.2f}, n = {len(logs)})"
