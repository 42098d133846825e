"""Search hyperparameters by grid, at random, or by Bayesian optimisation, without an account.

    python sweep.py --method grid --dry-run             # the CIFAR-10 tutorial's search: 8 trials
    python sweep.py --method bayes --jobs 2             # learning rate and batch size on MNIST
    python sweep.py --method random --param lr=log:1e-4..1e-1 --param l1=int:64..512 -- --epochs 5
    python sweep.py --config sweep.yaml --name mine     # a file in the schema of W&B's sweeps
    python sweep.py --resume runs/mine                  # go on where the search was stopped

A parameter is a flag of the training script; flags after -- go to every trial. No trial reads the
test set. Optuna keeps the search: in the file study.journal, or with --storage in a database that
many machines share. Any process may die at any moment: what it ran is taken up again.
"""

import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common

# Until the rest is imported, Ctrl-C ends the program without a traceback.
interrupt_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)

import evaluate
import records
from records import RunError, UsageError, say, shown

import optuna
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pandas import DataFrame
from tqdm import tqdm

signal.signal(signal.SIGINT, interrupt_handler)
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", ExperimentalWarning)

METRICS = {"val_loss": "minimize", "val_acc": "maximize"}
# The other names in trials.jsonl and leaderboard.csv: no metric of a script of one's own has them.
TAKEN = {"trial", "run", "status", "epochs", "seconds", "seed", "params", "error"}
TAKEN |= {"configuration", "place", "cost", "mean", "low", "high", "survived"}

# The searches of those who name no parameter: those of the tutorials.
CIFAR_FLAGS = ["--model", "confignet", "--epochs", "10", "--lr", "0.001"]
CIFAR_FLAGS += ["--batch-size", "512", "--tolerance", "3"]
CIFAR = "train_cifar.py", ["c1=48,96", "c2=96,192", "l1=256,512"], CIFAR_FLAGS
MNIST = "train_mnist.py", ["lr=log:1e-4..1e-1", "batch_size=32,64,128,256"], []
DEFAULT_SEARCH = {"grid": CIFAR, "random": MNIST, "bayes": MNIST}


def main(argv: list[str] | None = None) -> dict:
    """Run or continue a search, and report. Returns its directory, the lines of trials.jsonl, and
    the row of the best."""
    # What is to be searched, and where.
    if not records.fcntl:
        raise UsageError(
            "sweep.py needs the file locks of Linux or macOS: on Windows, run it in WSL"
        )
    search = parse_arguments(sys.argv[1:] if argv is None else list(argv))
    if search.dry_run:
        return dry_run(search)
    choose_engine(search)
    find_directory(search)

    # Nothing is made before the database has answered, and the data have been looked at.
    if search.storage:
        open_storage(search)
    data = None if search.resume else check_data(search)
    search.directory.mkdir(parents=True, exist_ok=True)
    try:
        with records.locked(search.directory / ".lock"):
            open_study(search)
            if search.retry_failed:
                retry(search)

            # Run the trials that are left, and say what came out.
            stopped = None
            lines = lines_of(search, trials_of(search))
            records.write_json_lines(search.directory / "trials.jsonl", lines)
            search.ended_before = len(lines)
            has_ended = is_over(search, lines)
            if not has_ended:
                keep_data(search, *(data or check_data(search)))
            keep_search(search)  # with new places, now that the data were found there
            if not has_ended:
                stopped = run_trials(search, lines)
                lines = lines_of(search, trials_of(search))
                records.write_json_lines(search.directory / "trials.jsonl", lines)
            failed = failed_in_a_row(search, lines)
            is_complete = not stopped and (not failed or len(lines) >= search.total)
            best = report(search, lines, is_complete)
            if failed:
                raise RunError(
                    f"{len(failed)} trials in a row failed, the last with: {failed[-1]['error']}; "
                    f"{how_to_mend(search)}"
                )
    except StorageInternalError as error:
        problem = storage_problem(search, error)
        raise RunError(f"{problem}; go on with: {how_to_go_on(search)}") from error
    if not (best or stopped):
        reasons = [
            line["error"] or line["status"] for line in lines if line["status"] != "finished"
        ]
        reason = reasons[-1] if reasons else "W&B gave none out"
        what = "trial" if len(search.seeds) == 1 else "configuration with all its seeds"
        raise RunError(f"{shown(search.directory)}: no {what} finished; the last with: {reason}")
    return {
        "directory": str(search.directory),
        "trials": lines,
        "best": best,
        "error": stopped,
        "status": "interrupted" if stopped else "finished",
        "go_on": how_to_go_on(search),
    }


def dry_run(search: "Search") -> dict:
    """Print the command line of each trial; of a Bayesian search the space. OSError."""
    if search.method == "bayes":
        text = f"{counted(search.total, 'trial')} of {shown(search.script)}, proposed one by one"
        say("\n  ".join([text, *search.param]), search.quiet, needed=True)
        return {}
    trials: list = []
    for number in range(search.total):
        params = propose(search, trials)
        if not params:
            break
        trials.append(search.trial(number, params))
        command = search.command(trials[-1].user_attrs["params"], number)
        say(f"trial {number:4}  {command}", search.quiet, needed=True)
    return {}


# ------------------------ Options ------------------------
def build_parser() -> common.ArgumentParser:
    """The flags of this script."""
    usage = "sweep.py [flags] [-- FLAGS]"
    parser = common.ArgumentParser(prog="sweep.py", description=__doc__, usage=usage)
    parser.add_argument("--bands", type=json.loads, help=SUPPRESS)  # of a config's early_terminate
    count = common.number(int, 1)
    whole = common.number(int, 0)
    path = common.absolute_path

    def flag(usage, kind, text, default=None):
        common.add_flag(group, usage, kind, text, default=default)

    group = parser.add_argument_group("the search")
    flag("--method", DEFAULT_SEARCH, "grid: all combinations; bayes: Optuna proposes")
    flag(
        "--script FILE",
        str,
        "training script, with main(argv, on_epoch) (grid: train_cifar.py, else train_mnist.py)",
    )
    common.add_flag(
        group,
        "--param NAME=SPEC",
        str,
        "48,96 or 0.0..0.5 or int:64..512 or log:1e-4..1e-1; once for each parameter",
        action="append",
        default=[],
    )
    flag("--config FILE", Path, "YAML or JSON in the schema of W&B's sweeps")
    flag(
        "--metric NAME", str, "val_loss or val_acc; a trial has that of its best epoch", "val_loss"
    )
    flag("--goal", ("minimize", "maximize"), "for a metric of a script of your own")
    flag("--target VALUE", common.number(float), "end the search when a trial reaches this")
    flag("--count N", count, "configurations in all (a grid: every combination; else 20)")
    flag("--seed N", whole, "seed of the drawn parameters, and of every training", 42)
    flag(
        "--seeds K",
        seeds_or_count,
        "train each configuration with K seeds, or with these, as in 50,60; their mean decides",
        1,
    )
    flag(
        "--prune",
        bool,
        "stop bad trials: after a ninth and a third of their epochs the best third goes on",
        False,
    )
    flag("--eta N", common.number(int, 2), "with --prune: one trial in N goes on", 3)

    group = parser.add_argument_group("running it")
    flag("--jobs N", count, "trials at a time, each in a process; several GPUs are shared out", 1)
    flag(
        "--threads N", count, "CPU threads of a trial (cores / --jobs); they change the last digits"
    )
    flag("--max-failures N", count, "stop after so many failed trials in a row", 3)
    flag("--runs-dir DIR", path, "where the sweep's folder is", records.HERE / "runs")
    flag("--name NAME", common.run_name, "name of the sweep; one that exists is continued")
    flag("--resume SWEEP", path, "continue the sweep in this folder, or make its report anew")
    flag("--retry-failed", bool, "run failed trials again, too", False)
    flag("--dry-run", bool, "print the trials, run none", False)
    flag("--quiet", bool, "print only errors", False)

    group = parser.add_argument_group("many machines, and Weights & Biases")
    flag("--storage URL", str, "share the search --name: postgresql://user@host/database")
    flag(
        "--grace SECONDS",
        common.number(int, 5),
        "with --storage: a machine that is silent for so long is taken for dead",
        120,
    )
    flag(
        "--engine",
        ("auto", "local", "wandb"),
        "auto: W&B for bayes where an API key is configured",
        "auto",
    )
    flag("--sweep-id ID", str, "take trials from this W&B sweep, with its script and its flags")
    flag("--wandb-project NAME", str, "where W&B files the sweep", "image-classifiers")
    return parser


def seeds_or_count(text: str) -> int | list[int]:
    """An argparse `type`: how many seeds, or which, as in 50,60."""
    seeds = [common.number(int, 0)(word) for word in text.split(",")]
    if len({*seeds}) < len(seeds):
        raise ArgumentTypeError(f"expected seeds that differ, not {text!r}")
    return seeds if len(seeds) > 1 else common.number(int, 1)(text)


# The flags of sweep.py that may be given with --resume.
RUNNING = {"--resume", "--count", "--jobs", "--threads", "--max-failures", "--retry-failed"}
RUNNING |= {"--quiet", "--storage", "--grace"}
# The flags of a trial that the sweep sets.
RESERVED = {"--runs-dir", "--run-name", "--resume", "--stop-after", "--quiet", "--no-quiet"}
RESERVED |= {"--test", "--no-test", "--seed"}
# The flags of a trial that name a place of its data.
PLACES = {"--dataset", "--data-dir", "--weights"}


def parse_arguments(argv: list[str]) -> "Search":
    """The search that is asked for; with --resume the study has most of it. UsageError."""
    parser = build_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    words, flags = argv[:cut], argv[cut + 1 :]
    given = names_of(words)
    search = parser.parse_args(words)
    if "--grace" in given and not search.storage:
        raise UsageError("--grace has no effect without --storage")
    if search.resume:
        for word in given + split_places(flags)[1]:
            if word not in RUNNING:
                raise UsageError(f"--resume takes the search from its folder: leave out {word}")

    # A configuration is read as flags; what is on the command line comes after them, and wins.
    elif search.config or search.sweep_id:
        source = search.config or f"--sweep-id {search.sweep_id}"
        try:
            config = load_yaml(search.config) if search.config else wandb_config(search)
            more_words, more_flags = read_config(config, search.config)
            if "--metric" in given:  # another metric has another goal, too
                more_words = [
                    word for word in more_words if not word.startswith(("--goal=", "--target="))
                ]
            parsed(parser.parse_args, more_words)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
        words, flags = more_words + words, more_flags + flags
    search = parser.parse_args(words, Search(given=given))
    search.places, search.flags = split_places(flags)
    if not search.resume:
        fill_in(search)
    return search


def parsed(parse: Callable, argv: list[str]) -> Namespace:
    """What a function that parses makes of `argv`. UsageError with its message where it refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(argv)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise UsageError(said.getvalue().strip() or str(end.code)) from end


def names_of(words: list[str]) -> list[str]:
    """The flags among the words of a command line, without their values."""
    return [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]


def split_places(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a trial: those that name a place, as seen from anywhere, and the others."""
    parser = common.ArgumentParser(add_help=False, argument_default=SUPPRESS)
    for name in PLACES:
        parser.add_argument(
            name, type=common.absolute_path if name == "--data-dir" else absolute_place
        )
    places, others = parser.parse_known_args(flags)
    return [f"{common.as_flag(name)}={value}" for name, value in vars(places).items()], others


def absolute_place(text: str) -> str:
    """The absolute path of a file or folder that is here; a name, and any other text, as it is."""
    path = Path(text).expanduser().absolute()
    is_name = text in (*common.DATASETS, "imagenet", "")
    return str(path) if path.exists() and not is_name else text


# ------------------------ A configuration in W&B's schema ------------------------
AS_FLAGS = {"program": "--script", "method": "--method", "run_cap": "--count", "name": "--name"}
AS_FLAGS |= {"project": "--wandb-project"}
KEYS = [*AS_FLAGS, "parameters", "metric", "early_terminate", "command", "description", "entity"]


def load_yaml(path: Path) -> Any:
    """The content of a YAML or JSON file. UsageError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, where YAML 1.1 wants a point in it, and refuses what is there
        twice, where PyYAML takes the last."""

        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"{key} is there twice")
            return super().construct_mapping(node, deep)

    digits = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("!exponent", digits, list("-+0123456789"))
    Loader.add_constructor("!exponent", lambda loader, node: scalar(node.value))
    try:
        text = path.read_text()
        if path.suffix.lower() == ".json":  # YAML takes no tabs where JSON does
            text = text.replace("\t", " ")
        return yaml.load(text, Loader)
    except Exception as error:  # PyYAML lets its own errors out
        raise UsageError(f"it cannot be read: {error}") from error


def scalar(word: str) -> Any:
    """A value as a user writes it: 3, 1e-4, true, or a word; 1e2 is 100."""
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError):
        number = float(word)
        if math.isfinite(number):  # else a word: nan is not even equal to itself
            return int(number) if number.is_integer() and "." not in word else number
    return {"true": True, "false": False}.get(word.lower(), word)


def read_config(config: Any, path: Path | None) -> tuple[list[str], list[str]]:
    """A configuration as flags of this script, and flags for each trial. UsageError."""
    # What has one flag each.
    if isinstance(config, dict) and config.keys() == {"sweep"}:
        config = config["sweep"]
    if not isinstance(config, dict):
        raise UsageError("expected keys and values, as in W&B's sweep configuration")
    for key in config.keys() - set(KEYS):
        raise UsageError(f"unknown key {key} (known: {', '.join(KEYS)})")
    given = {key: value for key, value in config.items() if value not in (None, "")}
    if path and (path.parent / str(given.get("program"))).is_file():
        given["program"] = path.parent / given["program"]
    words = [f"{flag}={given[key]}" for key, flag in AS_FLAGS.items() if key in given]

    # The metric.
    metric = given.get("metric", {"name": "val_loss"})
    if not isinstance(metric, dict) or not {"name"} <= metric.keys() <= {"name", "goal", "target"}:
        raise UsageError("metric has a name and a goal, perhaps a target, and nothing else here")
    words += [f"--{key.replace('name', 'metric')}={value}" for key, value in metric.items()]
    words += read_early_terminate(given.get("early_terminate"))
    words += read_parameters(given.get("parameters"))
    return words, read_command(given.get("command", []))


def read_early_terminate(rule: Any) -> list[str]:
    """`early_terminate` as flags: the epochs at which W&B would compare the trials. UsageError."""
    if rule is None:
        return []
    known = {"type", "min_iter", "max_iter", "s", "eta"}
    if not isinstance(rule, dict) or rule.get("type") != "hyperband":
        raise UsageError("early_terminate: the only type is hyperband")
    for key, value in rule.items():
        if key != "type" and (key not in known or type(value) is not int or value < 1):
            raise UsageError(f"early_terminate: {key}: {value} is not supported")
    match {"eta": 3, **rule}:
        case {"min_iter": first, "eta": eta}:
            bands = [first * eta**power for power in range(12)]
        case {"max_iter": last, "s": s, "eta": eta}:
            bands = [last // eta**power for power in range(1, min(s, 64) + 1)]
        case _:
            raise UsageError("early_terminate: give min_iter, or max_iter with s")
    return [f"--eta={eta}", f"--bands={bands}"]


def read_parameters(parameters: Any) -> list[str]:
    """`parameters` as flags. UsageError.

    A flag is known by its own name: a group is flattened, and training.epochs is epochs.
    """
    if not isinstance(parameters, dict) or not parameters:
        raise UsageError("parameters must have at least one entry")
    words = []
    for path, entry in parameters.items():
        name = str(path).rpartition(".")[2]
        text = f"{name}={json.dumps(entry, default=str)}"
        if not isinstance(entry, dict):
            raise UsageError(f"parameter {path}: expected value, values, or min and max")
        if "parameters" in entry:
            words += read_parameters(entry["parameters"])
        elif name == "seed":  # no parameter: each seed trains all configurations
            seeds = parse_parameter(text)[1].values
            if "min" in entry:
                raise UsageError("parameter seed: expected a value, or a list of values")
            words.append(f"--seed{'s' * (len(seeds) > 1)}={','.join(map(str, seeds))}")
        else:
            words.append(f"--param={text}")
    return words


# The words of `command` that stand for what the sweep does by itself.
UNDERSTOOD = {"${env}", "${interpreter}", "${program}", "${args}", "${args_no_boolean_flags}"}
UNDERSTOOD |= {"${args_no_hyphens}", "python", "python3"}


def read_command(command: Any) -> list[str]:
    """The flags that `command` adds to those of the parameters. UsageError."""
    if not isinstance(command, list):
        raise UsageError("command must be a list")
    flags = []
    for word in map(str, command):
        word = re.sub(r"\$\{envvar:(\w+)\}", lambda at: os.environ.get(at[1], at[0]), word)
        if "${" in word and word not in UNDERSTOOD:
            raise UsageError(f"command: {word} is not supported, or not set")
        if word == "${program}":
            flags.clear()  # what is before it runs the program
        elif word not in UNDERSTOOD:
            flags.append(word)
    return flags


# ------------------------ The space ------------------------
# W&B's distributions, with the keys of each; and how a range on the command line begins.
DISTRIBUTIONS = {
    "constant": "value",
    "categorical": "values",
    "int_uniform": "min max",
    "uniform": "min max",
    "log_uniform": "min max",
    "log_uniform_values": "min max",
    "q_uniform": "min max q",
    "q_log_uniform_values": "min max q",
}
RANGES = {None: "uniform", "int:": "int_uniform", "log:": "log_uniform_values"}


class Parameter(NamedTuple):
    """A flag to be searched."""

    entry: dict  # as W&B has it
    distribution: Any  # as Optuna has it
    values: Sequence  # all its values, in order; none where they are not to be counted
    ends: list  # the bounds of a range, or all words: to be tried before the first trial

    def tidy(self, drawn: Any) -> Any:
        """The nearest value to one that was drawn; of six digits, which can be read and copied."""
        if drawn in self.values:
            return drawn
        if self.values:
            return min(self.values, key=lambda value: abs(value - drawn))
        return min(max(float(f"{drawn:.6g}"), self.ends[0]), self.ends[1])


def parse_parameter(text: str) -> tuple[str, Parameter]:
    """`c1=48,96`, `d1=0.0..0.5`, `l1=int:64..512`, `lr=log:1e-4..1e-1`, or an entry of W&B's schema
    in JSON. UsageError."""
    name, _, spec = text.partition("=")
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not spec:
        raise UsageError(
            f"--param {text}: expected NAME=VALUE,VALUE or NAME=LOW..HIGH, "
            "with int: or log: before LOW"
        )
    try:
        entry = json.loads(spec) if spec.startswith("{") else as_entry(spec)
        return name.replace("-", "_"), make_parameter(entry)
    except ValueError as error:
        raise UsageError(f"parameter {name}: {error}") from error


def as_entry(spec: str) -> dict:
    """What follows NAME= as an entry of W&B's schema. ValueError."""
    bounds = re.fullmatch(r"(int:|log:)?([^,/]+?)(?<!\.)\.\.(?!\.)([^,/]+)", spec)
    if bounds:
        kind, low, high = bounds.groups()
        return {"distribution": RANGES[kind], "min": scalar(low), "max": scalar(high)}
    if spec.startswith(("int:", "log:")):
        raise ValueError("expected two numbers, LOW..HIGH")
    return {"values": [scalar(value) for value in spec.split(",")]}


def make_parameter(entry: dict) -> Parameter:
    """A parameter from an entry of W&B's schema. ValueError."""
    # The distribution, and whether it has its keys and no others.
    given = dict(entry)
    whole = all(type(value) is int for value in entry.values())
    keys = {"value": "constant", "values": "categorical"}
    kinds = [keys[key] for key in given if key in keys] or ["int_uniform" if whole else "uniform"]
    kind = str(given.pop("distribution", kinds[0]))
    if kind not in DISTRIBUTIONS:
        raise ValueError(
            f"the distribution {kind} is not supported (only {', '.join(DISTRIBUTIONS)})"
        )
    if kind.startswith("q_"):
        given.setdefault("q", 1)
    if given.keys() != set(DISTRIBUTIONS[kind].split()):
        raise ValueError(f"{kind} has {DISTRIBUTIONS[kind]}, not {' '.join(given) or 'nothing'}")
    if "min" in given:
        return make_range(entry, kind, given)

    # Words and numbers one by one.
    values = given.get("values", [given.get("value")])
    known = int | float | str | None
    if not (isinstance(values, list) and values and all(isinstance(v, known) for v in values)):
        raise ValueError("values must be a list of numbers and words")
    for index, value in enumerate(values):
        if value == "" or value in values[:index]:
            raise ValueError(f"{value!r} is there twice" if value else "a value is empty")
    return Parameter(entry, CategoricalDistribution(values), values, values)


def make_range(entry: dict, kind: str, given: dict) -> Parameter:
    """A range of numbers: all, whole ones, or the multiples of a step. ValueError."""
    # The bounds and the step.
    numbers = [scalar(str(given.get(key, 1))) for key in ("min", "max", "q")]
    if not all(type(number) in (int, float) and abs(number) < 1e15 for number in numbers):
        raise ValueError("the bounds and the step must be finite numbers")
    low, high, step = numbers
    if kind == "log_uniform":
        low = math.exp(min(low, 99))
        high = math.exp(min(high, 99))
    whole = kind == "int_uniform"
    steps = "q" in given
    log = "log" in kind
    narrow = not (whole or steps) and high - low < 1e-3 * abs(high)
    for is_wrong, text in (
        (
            kind == "log_uniform" and 1 < low < math.e,
            "log_uniform takes exponents of e; log_uniform_values takes the bounds themselves",
        ),
        (whole and not (type(low) is type(high) is int), "int needs whole numbers"),
        (low >= high, f"the lower bound {low} is not below the upper bound {high}"),
        (log and low <= 0, f"a logarithmic range needs a lower bound above 0, not {low}"),
        (narrow, "the range is too narrow for values of six digits"),
        (step <= 0 or (steps and (high - low) / step > 1e5), f"a step of {step} does not fit"),
    ):
        if is_wrong:
            raise ValueError(text)

    # Its values; multiples of a step such as 0.1 are not exact.
    multiples = range(math.floor(low / step), math.ceil(high / step) + 1)
    values: Sequence = multiples if whole else []
    if steps:
        rounded = [round(number * step, 12) for number in multiples]
        values = [value for value in rounded if low <= value <= high]
        if not values:
            raise ValueError(f"there is no multiple of {step} within the bounds")
        low, high = values[0], values[-1]
    distribution = IntDistribution if values and type(low) is int else FloatDistribution
    return Parameter(entry, distribution(low, high, log), values, [low, high])


# ------------------------ The search ------------------------
class Search(Namespace):
    """The flags of a search, and what follows from them. The study keeps those in KEPT."""

    SAME = ("script", "method", "param", "flags", "metric", "goal", "target", "seed", "seeds")
    SAME += ("eta", "bands")
    KEPT = (*SAME, "places", "epochs", "has_idle", "count", "threads", "sweep_id", "wandb_project")
    epochs = 0  # of a trial at most, if the script tells
    has_idle = False  # whether a parameter has no effect in some trials

    def __getstate__(self) -> dict:
        """What a worker is given: it opens the study for itself."""
        return vars(self) | {"study": None}

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        """What is searched."""
        return dict(map(parse_parameter, self.param))

    @property
    def distributions(self) -> dict:
        """The same as Optuna knows it."""
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    @property
    def is_ours(self) -> bool:
        """Whether the script is one of this repository, which is kept by its name alone."""
        return self.script == Path(self.script).name

    @property
    def size(self) -> float:
        """How many configurations there are."""
        return math.prod(len(p.values) or math.inf for p in self.parameters.values())

    @property
    def total(self) -> int:
        """The number of trials."""
        return self.count * len(self.seeds)

    @property
    def sign(self) -> int:
        """1 where the lowest metric is the best, -1 where the highest is."""
        return 1 if self.goal == "minimize" else -1

    def best_of(self, lines: list[dict]) -> float | None:
        """The best metric of the lines of trials.jsonl, None where no trial has finished."""
        values = [line[self.metric] for line in lines if line["status"] == "finished"]
        return min(values, key=lambda value: self.sign * value, default=None)

    def corners(self) -> list[dict]:
        """Configurations with each end of a range, and each word of a list."""
        first = {name: parameter.ends[0] for name, parameter in self.parameters.items()}
        return [first | {name: end} for name, p in self.parameters.items() for end in p.ends]

    def combinations(self) -> Iterator[dict]:
        """All configurations, in order; the last parameter changes first."""
        for values in itertools.product(*(p.values for p in self.parameters.values())):
            yield dict(zip(self.parameters, values, strict=True))

    def effective(self, params: dict) -> dict:
        """The parameters without those that have no effect beside the others; all of them where
        the script refuses these values, and so will fail the trial."""
        if self.has_idle:
            with contextlib.suppress(UsageError):
                return parse_trial(self, params)[1]
        return params

    def trial(self, number: int, params: dict) -> FrozenTrial:
        """A trial that is to wait in the study. Its place in the search is its attribute `trial`;
        Optuna's own numbers count twins too. The attribute `params` has only what has an effect."""
        return optuna.create_trial(
            state=TrialState.WAITING,
            params=params,
            distributions=self.distributions,
            user_attrs={"trial": number, "params": self.effective(params)},
        )

    def argv(self, params: dict, number: int) -> list[str]:
        """The command line of a trial."""
        words = [*self.flags, *self.places]
        for name, value in params.items():
            flag = common.as_flag(name)
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif value is not None:
                words.append(f"{flag}={value}")
        return [*words, "--seed", str(self.seeds[number % len(self.seeds)])]

    def command(self, params: dict, number: int) -> str:
        """The same, to be copied."""
        script = shown(records.HERE / self.script)
        return shlex.join(["python", script, *self.argv(params, number)])


# ------------------------ Checks before the first trial ------------------------
def fill_in(search: Search) -> None:
    """Fill in what was not given, and refuse what makes no sense. UsageError."""
    # The script, and what is searched.
    if not search.method:
        raise UsageError("--method grid, random or bayes is needed")
    default, space, flags = DEFAULT_SEARCH[search.method]
    search.script = find_script(search.script or default)
    if not search.param:
        if search.script != default:
            raise UsageError(
                f"--script {search.script} needs its own search: --param NAME=SPEC or --config FILE"
            )
        search.param = space
        search.flags = flags + search.flags
    for at, text in enumerate(search.param):
        name, parameter = parse_parameter(text)
        if common.as_flag(name) in PLACES:
            values = [absolute_place(str(value)) for value in parameter.values]
            search.param[at] = f"{name}={json.dumps({'values': values})}"
        if search.is_ours and name == "learning_rate":
            search.param[at] = f"lr={text.partition('=')[2]}"
            say("learning_rate is read as lr", search.quiet)

    # The seeds, and what is compared; then all flags together.
    search.metric = metric_of(search)
    if not isinstance(search.seeds, list):
        search.seeds = [*range(search.seed, search.seed + search.seeds)]
    check_flags(search)
    check_trials(search)

    # How many trials there are.
    grid = search.method == "grid"
    search.count = int(min(search.count or (math.inf if grid else 20), search.size))
    if grid and search.has_idle:
        different = {str(search.effective(params)) for params in search.combinations()}
        search.count = min(search.count, len(different))


def metric_of(search: Search) -> str:
    """The name of --metric here: others call ours otherwise."""
    asked = search.metric
    if search.sweep_id:  # perhaps one that `make_sweep` has made
        asked = asked.removeprefix("best_")
    known = re.fullmatch(
        r"(best.)?(epoch.)?(val|valid|validation|eval)[_/ .-](epoch.)?(?P<kind>loss|acc)(uracy)?",
        asked,
        re.IGNORECASE,
    )
    return f"val_{known['kind'].lower()}" if known and search.is_ours else asked


def check_flags(search: Search) -> None:
    """UsageError where a flag contradicts another, or has no effect."""
    searched = [common.as_flag(name) for name in search.parameters]
    fixed = names_of([*search.flags, *search.places])
    for word in searched + fixed:
        if word in RESERVED:
            raise UsageError(
                f"{word} is set by the sweep for every trial; "
                "--seed and --seeds of sweep.py choose seeds"
            )
        if word in fixed and word.replace("--no-", "--") in searched:
            raise UsageError(f"{word} is searched: leave it out of the flags after --")
    if "--no-prune" in search.given:
        search.bands = None
    asked = search.goal
    prunes = search.prune or search.bands
    search.goal = METRICS.get(search.metric, None if search.is_ours else asked)
    metric = f"--metric {search.metric}:"
    sizes = [len(parameter.values) for parameter in search.parameters.values()]
    is_listed = 0 < min(sizes) <= max(sizes) < 1e5
    for is_wrong, text in (
        (
            not search.goal,
            f"{metric} expected val_loss, val_acc, or that of a script of your own with its --goal",
        ),
        (search.metric in TAKEN, f"{metric} trials.jsonl has another use for this name"),
        (asked not in (None, search.goal), f"{metric} not known with the goal {asked}"),
        (len(searched) < len(search.param), "a parameter is there twice"),
        ("--eta" in search.given and not prunes, "--eta has no effect without --prune"),
        (prunes and len(search.seeds) > 1, "pruning and --seeds: one at a time"),
        (search.storage and not search.name, "--storage needs --name NAME, to find the search by"),
        (search.method == "grid" and not is_listed, "a grid needs a list of values"),
    ):
        if is_wrong:
            raise UsageError(text)


def check_trials(search: Search) -> None:
    """Ask the script about the ends of each parameter, or each of its words. UsageError."""
    # A parameter is left out where it has no effect; somewhere it needs to have one.
    trials = []
    kept = set()
    for params in search.corners():
        args, effective = parse_trial(search, params)
        search.has_idle |= effective.keys() != params.keys()
        trials.append(args)
        kept |= effective.keys()
    for name in search.parameters.keys() - kept:
        raise UsageError(f"--{name} has no effect in any trial")
    if search.has_idle:
        say("a parameter is left out of the trials in which it has no effect", search.quiet)

    # Losses are compared where the rule for the comparison of runs allows it. It reads run.json.
    if search.is_ours and search.metric == "val_loss":
        runs = []
        for args in trials:
            known = {
                key: value for key, value in vars(args).items() if key not in records.NOT_RECORDED
            }
            images = {"val_checksum": (args.dataset, args.val_size, args.fold)}
            runs.append({"name": "", "threads": 1, "args": known, "data": images})
            reason = common.why_not_comparable(runs[0], runs[-1], search.metric)
            if reason:
                raise UsageError(f"{reason}: they have no common val_loss; use --metric val_acc")

    # The epochs at which trials are compared.
    epochs = {args.epochs for args in trials}
    search.epochs = max(epochs)
    if search.prune:
        if search.bands or len(epochs) > 1 or search.epochs < search.eta:
            raise UsageError(
                f"--prune needs one number of epochs, at least --eta {search.eta}, "
                "and no early_terminate"
            )
        bands = {search.epochs // search.eta**power for power in range(1, 13)}
        search.bands = sorted(bands - {0})


def find_script(script: str) -> str:
    """The path of a training script that is here, or the name of one beside this file. UsageError
    where there is none."""
    for path in (Path(script).resolve(), records.HERE / script):
        if path.is_file() and path.suffix == ".py":
            return path.name if path.parent == records.HERE else str(path)
    raise UsageError(f"--script {script}: there is no such Python file")


@functools.cache
def load_script(script: str) -> Any:
    """The module of a training script. UsageError where it is not one."""
    path = records.HERE / script
    try:
        if path.parent == records.HERE:
            return importlib.import_module(path.stem)
        sys.path.append(str(path.parent))  # last: a common.py there does not hide ours
        spec = importlib.util.spec_from_file_location(script, path)
        module = sys.modules[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # A SyntaxError knows its file and line, as the last entry of a traceback does.
        at: Any = error
        if not isinstance(error, SyntaxError):
            at = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"--script {at.filename}, line {at.lineno}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, "main"):
        raise UsageError(f"--script {script}: it has no function main(argv, on_epoch=None)")
    return module


def parse_trial(search: Search, params: dict) -> tuple[Namespace, dict]:
    """What the script makes of a trial's command line, and the parameters that have an effect.

    UsageError with the script's own message where it refuses the trial.
    """
    parse = getattr(load_script(search.script), "parse_arguments", lambda argv: Namespace())
    argv = [*search.argv(params, 0), "--no-test", "--quiet"]
    argv += ["--runs-dir", str(search.runs_dir), "--run-name", "trial"]
    try:
        args = parsed(parse, argv)
        args.epochs = int(getattr(args, "epochs", 0))
        return args, params
    except UsageError as refusal:
        # Without a parameter that has no effect beside the others it may be accepted.
        idle = re.search(r"--([\w-]+) has no effect", str(refusal))
        name = idle and idle[1].replace("-", "_")
        if name not in params:
            raise
        return parse_trial(search, {key: params[key] for key in params if key != name})
    except Exception as error:  # whatever a script of one's own raises
        raise UsageError(
            f"--script {shown(search.script)}: parse_arguments raised "
            f"{type(error).__name__}: {error}"
        ) from error


def check_data(search: Search) -> tuple[str, bytes | None]:
    """Look at the data before the first trial: their checksum, and of images from files the content
    of the data.csv that all trials read. UsageError where something is missing."""
    module = load_script(search.script)
    known = search.directory / "data.csv"
    args, _ = parse_trial(search, search.corners()[0])
    is_searched = "dataset" in search.parameters  # then each trial looks at its own
    if is_searched or not hasattr(module, "synthetic") or args.dataset == "synthetic":
        return "", None
    common.search_directory = search.directory
    args.directory = search.directory
    args.quiet = search.quiet
    args.device = "cpu"
    try:
        if args.dataset in common.TORCHVISION:
            return common.load_data(args, module.synthetic, ("train", "val")).train.checksum, None
        if known.exists():
            listing = known.read_bytes()
        else:  # each trial cuts the training images in two
            listing = common.listing_as_csv(common.read_files(args, common.PARTS))
        return records.checksum_of(listing), listing
    except RunError as error:
        raise UsageError(str(error)) from error
    finally:
        common.search_directory = None
        common.images_read.clear()


def keep_data(search: Search, checksums: str, listing: bytes | None) -> None:
    """Keep the data.csv of a new search. RunError where a search that goes on has other data."""
    if checksums != search.study.user_attrs.get("data", checksums):
        raise RunError(f"{shown(search.directory)}: its data are not those that it began with")
    if listing and not (search.directory / "data.csv").exists():
        records.write_atomically(search.directory / "data.csv", listing)
    search.study.set_user_attr("data", checksums)


# ------------------------ The study ------------------------
class JournalLock:
    """The lock of study.journal. It ends with its process; Optuna's own would stay for 30 s."""

    def __init__(self, journal: Path):
        self.journal = journal

    def acquire(self) -> bool:
        """Wait for it, and cut off a last line that a kill has torn: Optuna would append to it."""
        self.file = open(self.journal, "rb+")  # noqa: SIM115 (closed by release)
        records.fcntl.flock(self.file, records.fcntl.LOCK_EX)
        size = self.file.seek(0, os.SEEK_END)
        self.file.seek(max(0, size - 1))
        if self.file.read() not in (b"", b"\n"):  # the whole is read only where a line is torn
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        self.file.close()


def open_storage(search: Search) -> Any:
    """The storage of the study: --storage, or a file of this sweep. UsageError, RunError."""
    if not search.storage:
        journal = search.directory / "study.journal"
        return JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))
    from sqlalchemy import exc

    # A network that is gone must not hold up a machine for as long as the system would wait.
    engine: dict = {"pool_pre_ping": True}
    if search.storage.startswith("postgresql"):
        engine["connect_args"] = {"connect_timeout": 10, "tcp_user_timeout": 30_000}
    heart = {"heartbeat_interval": max(1, search.grace // 8), "grace_period": search.grace}
    for attempts_left in reversed(range(5)):
        try:
            return RDBStorage(search.storage, engine, **heart)
        except (exc.ArgumentError, ImportError, ValueError) as error:
            raise UsageError(
                f"{storage_problem(search, error)}; "
                'for PostgreSQL: pip install "sqlalchemy>=2.1" "psycopg[binary]"'
            ) from error
        except exc.SQLAlchemyError as error:
            if not attempts_left:  # until then another machine may be making the tables
                raise RunError(storage_problem(search, error)) from error
            time.sleep(1)


def storage_problem(search: Search, error: Exception) -> str:
    """What is wrong with --storage, without its password."""
    reason = str(error.__cause__ or error).partition("\n")[0]
    return f"--storage {without_password(search.storage)}: {reason}"


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"(//[^:/@]*:).*@", r"\1***@", url, flags=re.DOTALL)


def find_directory(search: Search) -> None:
    """Where the search is kept. UsageError where that folder is not one for it."""
    search.directory = search.resume or search.runs_dir / (search.name or common.new_name("sweep"))
    search.machine = f"{socket.gethostname()}:{search.directory}" if search.storage else ""
    name = shown(search.directory)
    if search.resume and not search.resume.is_dir():
        raise UsageError(f"--resume {name}: there is no such directory")
    if not search.storage and not (search.directory / "study.journal").exists():
        if search.resume:
            raise UsageError(
                f"--resume {name}: it has no study.journal; "
                "for a shared sweep give its --storage again"
            )
        if any(search.directory.glob("[!.]*")):
            raise UsageError(f"--name {search.name}: {name} exists, and is no sweep")


def open_study(search: Search) -> None:
    """Open the study of a search, or make it. What it keeps of the search becomes that of
    `search`, or must be the same. UsageError, RunError."""
    # A sweep that has moved keeps the name of its study.
    name = shown(search.directory)
    held = {}
    try:
        storage = open_storage(search)
        names = optuna.get_all_study_names(storage)
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{name}/study.journal is damaged: {error}") from error
    search.study_name = names[0] if names and not search.storage else search.directory.name
    if not search.resume or search.study_name in names:
        search.study = optuna.create_study(
            storage=storage,
            study_name=search.study_name,
            direction=search.goal,
            load_if_exists=True,
        )
        held = search.study.user_attrs
    if "sweep" in held:
        take_over(search, held["sweep"])
    elif search.resume or held:
        raise UsageError(
            f"{name} cannot go on: it was stopped before it began, or is of an earlier version"
        )

    # W&B makes a sweep of its own. Then the study keeps what is searched, and how.
    if search.engine == "wandb" and not search.sweep_id:
        search.sweep_id = make_sweep(search)
    if search.sweep_id:
        say(
            f"W&B sweep {search.sweep_id}; another machine joins with --sweep-id {search.sweep_id}",
            search.quiet,
        )
    search.threads = search.threads or max(1, torch.get_num_threads() // search.jobs)
    if "sweep" not in held:
        keep_search(search)


def keep_search(search: Search) -> None:
    """Keep in the study what is searched, and how."""
    search.study.set_user_attr("sweep", {key: getattr(search, key) for key in search.KEPT})


def take_over(search: Search, held: dict) -> None:
    """Go on with the search that a study holds. UsageError where that is another one."""
    name = shown(search.directory)
    count = search.count or 0
    for key in search.SAME:
        if not search.resume and getattr(search, key) != held[key]:
            raise UsageError(
                f"{name} is another search: its {key} is {held[key]}; take another --name"
            )
    if "--count" in search.given and count < held["count"]:
        raise UsageError(f"--count {count}: the search has {held['count']} already")
    threads = search.threads or (None if search.storage else held["threads"])
    places, _ = split_places(held["places"] + search.places)  # of one given twice the last counts
    vars(search).update(held | {"threads": threads, "places": places})
    for word in {*places} ^ {*held["places"]}:  # a folder may have moved; a name is other data
        flag, _, value = word.partition("=")
        is_name = value in common.DATASETS if search.is_ours else not Path(value).is_absolute()
        if flag == "--dataset" and is_name:
            kept = " ".join(held["places"]) or "no --dataset"
            raise UsageError(f"{name} is another search, with {kept}; take another --name")
    search.count = max(held["count"], int(min(count, search.size)))


def retry(search: Search) -> None:
    """Have the failed trials run again, from nothing: what they left may be damaged."""
    for trial in trials_of(search):
        if trial.state == TrialState.FAIL:
            number = trial.user_attrs["trial"]
            shutil.rmtree(search.directory / f"trial-{number:04}", ignore_errors=True)
            search.study.add_trial(search.trial(number, trial.params))


def trials_of(search: Search) -> list[FrozenTrial]:
    """The trials of the search, by number. Two machines may make the same at once, and one that
    failed may be run again: of those with one number, the first that has not failed counts."""
    found = {}
    for trial in search.study.get_trials(deepcopy=False):
        number = trial.user_attrs["trial"]
        if number not in found or found[number].state == TrialState.FAIL:
            found[number] = trial
    return [found[number] for number in sorted(found)]


def lines_of(search: Search, trials: list[FrozenTrial]) -> list[dict]:
    """What the trials gave, in the order of their ends: the lines of trials.jsonl. `run` is a
    directory beside that file, with the machine before it where that is another."""
    ended = [trial for trial in trials if trial.state.is_finished()]
    ended.sort(key=lambda trial: trial.datetime_complete)
    lines = [trial.user_attrs["line"] for trial in ended]
    return [line | {"run": line["run"].removeprefix(f"{search.machine}/")} for line in lines]


# ------------------------ Keeping workers at work ------------------------
PATIENCE = 120  # seconds that a database may be away
AWAY = 3  # the exit code of a worker whose database does not answer, or that was told to stop


def run_trials(search: Search, lines: list[dict]) -> str | None:
    """Keep --jobs workers at work until the search is over.

    Returns the name of the signal that stopped it, or None. RunError where a worker fails.
    """
    # Workers are forked from a process that has imported what they need, and that Ctrl-C does not
    # reach: it is for this one, which stops them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch._dynamo", "optuna"])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    workers: dict = {}
    told = {line["trial"] for line in lines}
    codes = set()
    pause = 1 if search.storage else 0.2
    bar = tqdm(
        total=search.total,
        bar_format="{desc} |{bar}| {elapsed}<{remaining}",
        leave=False,
        disable=search.quiet or None,
    )
    try:
        with bar, records.interruptible():
            while codes != {0} and not is_over(search, lines):  # 0: found nothing more to do
                # Have as many at work as there are trials left.
                start_workers(search, context, workers, search.total - len(lines))
                alive = [each.sentinel for each in workers.values() if each.exitcode is None]
                multiprocessing.connection.wait(alive, pause)

                # Tell what has ended, here or elsewhere, and how far the others are.
                codes = {worker.exitcode for worker in workers.values()}
                trials = wait_for_trials(search)
                lines = lines_of(search, trials)
                for line in lines:
                    if line["trial"] not in told:
                        say(line_as_text(line, search), search.quiet)
                        told.add(line["trial"])
                        records.write_json_lines(search.directory / "trials.jsonl", lines)
                show_progress(bar, search, trials, lines)
    except KeyboardInterrupt as interruption:
        # A training that is told to stop writes that down; it has two seconds for it.
        end = time.monotonic() + 2
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join(max(0, end - time.monotonic()))
        return str(interruption) or "SIGINT"
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()
        for path in search.directory.glob(".pixels-*"):  # the images that they have shared
            path.unlink()
    return None


def start_workers(search: Search, context: Any, workers: dict, left: int) -> None:
    """Have a worker for each of --jobs, also in place of those that have died, with its share of
    the GPUs. RunError where one has failed by itself."""
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    for slot in range(min(search.jobs, left)):
        code = workers[slot].exitcode if slot in workers else AWAY
        if code == 1:  # an error outside of a trial
            raise RunError(f"a worker failed; {how_to_mend(search)}")
        if code == AWAY:  # no trial is to blame
            search.session = secrets.token_hex(4)
        if code:
            worker = context.Process(target=work, args=(search, gpus[slot % len(gpus)]))
            worker.start()
            workers[slot] = worker  # not before: Ctrl-C may come while it starts


def wait_for_trials(search: Search) -> list[FrozenTrial]:
    """The trials, as soon as the database answers. StorageInternalError where it does not."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return trials_of(search)
        except StorageInternalError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def is_over(search: Search, lines: list[dict]) -> bool:
    """Whether no trial is to begin any more: all have ended, one has come to the --target, or the
    last ones have failed."""
    best = search.best_of(lines)
    target = search.target
    is_good = None not in (best, target) and search.sign * best <= search.sign * target
    return is_good or len(lines) >= search.total or bool(failed_in_a_row(search, lines))


def failed_in_a_row(search: Search, lines: list[dict]) -> list[dict]:
    """The last --max-failures trials that have ended in this call, if all of them have failed."""
    last = lines[search.ended_before :][-search.max_failures :]
    failed = [line for line in last if line["status"] == "failed"]
    return failed if len(failed) == search.max_failures else []


def show_progress(bar: tqdm, search: Search, trials: list[FrozenTrial], lines: list[dict]) -> None:
    """Show how far the search is; the bar also moves while trials run."""
    epochs = [trial.last_step or 0 for trial in trials if trial.state == TrialState.RUNNING]
    bar.n = len(lines) + sum(epochs) / (search.epochs or math.inf)
    text = f"{len(lines)} of {search.total} trials"
    best = search.best_of(lines)
    if epochs:
        text += f", epoch {' and '.join(map(str, epochs))} of {search.epochs or '?'}"
    if best is not None:
        text += f", best {value_as_text(best, search.metric)}"
    bar.set_description_str(text)


def how_to_go_on(search: Search) -> str:
    """The command that continues a sweep."""
    words = ["python", shown(__file__), "--resume", shown(search.directory)]
    if search.storage:
        words += ["--storage", without_password(search.storage)]
    return shlex.join(words)


def how_to_mend(search: Search) -> str:
    """What to do about trials that fail."""
    log = shown(search.directory / "workers.log")
    go_on = f"{how_to_go_on(search)}, with --retry-failed for the failed ones"
    return f"see {log}; when that is mended, go on with: {go_on}"


def value_as_text(value: Any, name: str) -> str:
    """A value for a person. A parameter, or a metric of one's own, is as it is."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float) and name in (*METRICS, "seconds"):
        return evaluate.as_text(value, name)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def line_as_text(line: dict, search: Search) -> str:
    """A line of trials.jsonl for the screen."""
    params = " ".join(f"{name}={value}" for name, value in line["params"].items())
    end = f"{line['status']} after {counted(line['epochs'], 'epoch')}"
    value = f"{search.metric} {value_as_text(line[search.metric], search.metric)}"
    return f"trial {line['trial']}  {end}  {value}  {params}  {line['error'] or ''}".rstrip()


def counted(number: int, what: str) -> str:
    """1 trial, 2 trials."""
    return f"{number} {what}{'s' * (number != 1)}"


# ------------------------ A worker ------------------------
# The way of a trial: `take` makes it, with the parameters that `propose` gives, or finds one that
# was left, and calls `claim`. `run_trial` has the script train it (`train_trial`) and keeps its
# line in the study.
#
# A worker may die anywhere, and cleans nothing up: its claim on a trial is a lock that dies with
# it, and the script has saved the epochs of the trial. Whoever takes the trial next goes on there.
ENDED = ("finished", "stopped_early", "diverged", "pruned")


def work(search: Search, gpu: str) -> None:
    """A process that runs one trial after the other, until all have ended."""
    # It ends with sweep.py, and has its own GPU, log and images.
    threading.Thread(target=end_with_parent, daemon=True).start()
    if search.storage:  # a heart that stops is a death
        threading.excepthook = lambda problem: os._exit(AWAY)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(search.directory / "workers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    common.search_directory = search.directory
    torch.set_num_threads(search.threads)

    # Run whatever waits or was left; then what W&B gives out.
    try:
        storage = open_storage(search)
        search.study = optuna.load_study(study_name=search.study_name, storage=storage)
        with open(search.directory / ".claims", "a") as search.claims:
            while trial := take(search):
                run_trial(search, trial)
            if search.sweep_id:
                run_agent(search)
    except (OptunaError, RunError, KeyboardInterrupt):
        traceback.print_exc()
        os._exit(AWAY)


def end_with_parent() -> None:
    """Die when sweep.py does, in whatever way."""
    multiprocessing.parent_process().join()
    os._exit(1)


def take(search: Search) -> FrozenTrial | None:
    """Take the next trial: one whose process has died, or one that waits, or a new one. Where
    others run the last ones, wait: they may die. None where there is nothing more to do."""
    silent: dict[int, float] = {}
    while True:
        with records.locked(search.directory / ".queue.lock", wait=True):
            if search.storage:
                release_silent(search, silent)
            trials = trials_of(search)
            left = [trial for trial in trials if not trial.state.is_finished()]
            missing = 0 if search.sweep_id else search.total - len(trials)
            if is_over(search, lines_of(search, trials)) or not (left or missing > 0):
                return None
            for trial in left:
                if claim(search, trial):
                    return trial

            # Make a new one; but not while --jobs trials are claimed, by processes about to die.
            here = [trial for trial in left if machine_of(trial) == search.machine]
            if missing > 0 and len(here) < search.jobs:
                params = propose(search, trials)
                if params:
                    search.study.add_trial(search.trial(len(trials), params))
                    continue
                if not left:
                    return None
        time.sleep(0.5)


def propose(search: Search, trials: list[FrozenTrial]) -> dict | None:
    """The parameters of the trial after these: they follow from --seed and the results. None where
    all configurations are used up."""
    # The same once more, with the next seed; or the next of a grid.
    number = len(trials)
    if number % len(search.seeds):
        return trials[-1].params
    known = [trial.user_attrs["params"] for trial in trials]
    new = (params for params in search.combinations() if search.effective(params) not in known)
    if search.method == "grid":
        return next(new, None)

    # A Gaussian process with few random trials before it finds better points sooner; its cost
    # grows with the cube of the trials, and past 200 the tree-structured estimator takes over.
    seed = common.random_seed(search.seed, "proposals", number) % 2**32
    study = optuna.create_study(sampler=RandomSampler(seed=seed))
    if search.method == "bayes":
        gaussian = GPSampler(seed=seed, n_startup_trials=5 * len(search.seeds))
        study.sampler = gaussian if number <= 200 else TPESampler(seed=seed)

        # They learn from ranks: a loss that has exploded would hide the differences of all
        # others.
        losses = sorted(search.sign * t.value for t in trials if t.value is not None)
        for trial in map(copy.copy, trials):
            if trial.value is not None:
                trial.value = losses.index(search.sign * trial.value)
            if trial.state in (TrialState.COMPLETE, TrialState.RUNNING):
                study.add_trial(trial)

    # Nothing runs twice, not even in a small space. Where the proposals are all known, draw.
    for attempt in range(100):
        if attempt == 10:
            study.sampler = RandomSampler(seed=seed)
        drawn = study.ask(search.distributions).params
        params = {name: p.tidy(drawn[name]) for name, p in search.parameters.items()}
        if search.effective(params) not in known:
            return params
    return next(new, None)


def release_silent(search: Search, silent: dict[int, float]) -> None:
    """Let the trials of machines that have died wait again. After an outage of the database all
    hearts seem to have stopped: a living machine has a quarter of --grace to be heard."""
    storage = search.study._storage
    now = time.monotonic()
    stale = storage._get_stale_trial_ids(search.study._study_id)
    for trial_id in silent.keys() - set(stale):
        del silent[trial_id]
    for trial_id in stale:
        if now > silent.setdefault(trial_id, now) + search.grace / 4:
            storage.set_trial_state_values(trial_id, TrialState.WAITING)


def machine_of(trial: FrozenTrial) -> str:
    """The machine that runs a trial, or has run it."""
    return trial.user_attrs["starts"][-1][0] if "starts" in trial.user_attrs else ""


def claim(search: Search, trial: FrozenTrial) -> bool:
    """Make a trial this process's own: by a lock on this machine, by its state for the others."""
    storage = search.study._storage
    trial_id = trial._trial_id
    waits = trial.state == TrialState.WAITING
    if not waits and machine_of(trial) != search.machine:
        return False
    try:
        # No child inherits such a lock. It would be lost if this file were opened and closed again.
        at_once = records.fcntl.LOCK_EX | records.fcntl.LOCK_NB
        records.fcntl.lockf(search.claims, at_once, 1, trial.user_attrs["trial"])
    except OSError:
        return False
    if search.storage:  # first of all: a trial that runs and has no heartbeat is never given away
        storage.record_heartbeat(trial_id)
    if waits and not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
        return False  # another machine was quicker
    start = [search.machine, search.session, trial.last_step]
    trial.user_attrs["starts"] = [*trial.user_attrs.get("starts", []), start]
    storage.set_trial_user_attr(trial_id, "starts", trial.user_attrs["starts"])
    return True


def run_trial(search: Search, trial: FrozenTrial) -> None:
    """Run a trial, from where it was left. Its line of trials.jsonl is kept with it."""
    storage = search.study._storage
    trial_id = trial._trial_id
    number = trial.user_attrs["trial"]
    starts = trial.user_attrs["starts"]
    directory = search.directory / f"trial-{number:04}"
    try:
        if starts.count(starts[-1]) > 2:  # the third time on this machine, at this epoch
            raise RunError("its process died twice, and came no further")
        with get_heartbeat_thread(trial_id, storage):
            record = train_trial(search, trial, directory)
    except OptunaError:
        raise  # the database is away, or another machine has ended the trial
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        record = failure(search, directory, error)

    # Its line. What a script of one's own returns may be numbers of numpy's, and the like.
    status = record["status"]
    best = record.get("best") or {}
    line = {
        "trial": number,
        "run": f"{search.machine}/{directory.name}".lstrip("/"),
        "status": "finished" if status == "stopped_early" else status,
        **{name: best.get(name) for name in (*METRICS, search.metric)},
        "epochs": record.get("epochs") or 0,
        "seconds": record.get("seconds") or 0.0,
        "seed": search.seeds[number % len(search.seeds)],
        "params": trial.user_attrs["params"],
        "error": record.get("error"),
    }
    plain = json.dumps(
        line, default=lambda each: each.item() if hasattr(each, "item") else f"{each}"
    )
    line = json.loads(plain)
    storage.set_trial_user_attr(trial_id, "line", line)

    # Optuna's value: also of a trial that was pruned, and of one that diverged, which is the worst.
    if status == "failed":
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    else:
        value = search.sign * math.inf if status == "diverged" else line[search.metric]
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])


def failure(search: Search, directory: Path, error: BaseException) -> dict:
    """The record of a trial that an error has ended."""
    if type(error) is Exception and search.sweep_id:  # so W&B's agent stops a run
        return record_of_trial(directory) | {"status": "pruned", "error": None}
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, UsageError | RunError):
        text = str(error)
    elif isinstance(error, SystemExit):
        text = f"the script ended with exit status {error.code}"
    return {"status": "failed", "error": text[:1000]}


def train_trial(search: Search, trial: FrozenTrial, directory: Path) -> dict:
    """The record of a run, begun or continued. What the script raises, RunError, KeyboardInterrupt
    where it was told to stop."""
    number = trial.user_attrs["trial"]
    reported = trial.last_step or 0

    def on_epoch(row):
        # What was reported before was judged before; but for the last, as a kill may come between.
        epoch = int(row["epoch"])
        if epoch < reported:
            return False
        value = float(row[search.metric])
        search.study._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)
        return not search.sweep_id and prunes(search, trials_of(search), number, epoch)

    # It may have ended already, before that was written into the study.
    record = record_of_trial(directory)
    rows = []
    with contextlib.suppress(RunError):
        return checked(record, search.metric)

    # Go on after the epochs that were saved, of which the last was perhaps not reported; or begin.
    if record and (directory / "last.pt").exists():
        with contextlib.suppress(RunError):  # a script of one's own has another one
            rows = records.load_checkpoint(directory / "last.pt")["history"]
        if rows and on_epoch(rows[-1]):
            best = min(rows, key=lambda row: row["val_loss"])
            return record | {"status": "pruned", "best": best, "epochs": len(rows)}
        places = [word for word in search.places if not word.startswith("--weights=")]
        argv = ["--resume", str(directory), "--quiet", *places]
    else:
        shutil.rmtree(directory, ignore_errors=True)
        argv = [*search.argv(trial.user_attrs["params"], number), "--no-test", "--quiet"]
        argv += ["--runs-dir", str(directory.parent), "--run-name", directory.name]
    if search.sweep_id:
        argv += ["--wandb", "online", "--wandb-project", search.wandb_project]
    try:
        record = load_script(search.script).main(argv, on_epoch)
    except optuna.TrialPruned as error:  # not to be taken for a fault of the database
        raise RunError(
            "main raised TrialPruned; it is to return a record: docs/searches.md"
        ) from error
    if isinstance(record, dict) and record.get("status") == "interrupted":
        raise KeyboardInterrupt
    return checked(record, search.metric)


def prunes(search: Search, trials: list[FrozenTrial], number: int, epoch: int) -> bool:
    """Whether a trial is to end at this epoch: at a band it goes on if it is in the best 1/eta,
    rounded up, of the trials that have reached that band, each by its best epoch until then."""
    if epoch == search.epochs or epoch not in (search.bands or ()):
        return False
    best = {}
    for trial in trials:
        if epoch in trial.intermediate_values:
            reports = trial.intermediate_values.items()
            losses = [search.sign * value for at, value in reports if at <= epoch]
            best[trial.user_attrs["trial"]] = min(losses)
    better = sum(loss < best[number] for loss in best.values())
    return better >= math.ceil(len(best) / search.eta)


def record_of_trial(directory: Path) -> dict:
    """run.json of a trial; {} where there is none. RunError where it is damaged."""
    path = directory / "run.json"
    return records.read_json(path) if path.exists() else {}


def checked(record: Any, metric: str) -> dict:
    """The record of a trial that has ended. RunError where it is none."""
    with contextlib.suppress(KeyError, TypeError):
        status = record["status"]
        if status == "diverged" or (status in ENDED and math.isfinite(record["best"][metric])):
            return record
    raise RunError(
        "main(argv, on_epoch) returned no record of a trial that has ended: "
        f"no status of {', '.join(ENDED)}, or no best {metric} that is a number"
    )


# ------------------------ Weights & Biases as the engine ------------------------
def choose_engine(search: Search) -> None:
    """Settle whether W&B drives a new search, or Optuna. UsageError, RunError."""
    if search.resume:
        return
    fits_wandb = not search.storage and len(search.seeds) == 1
    if search.sweep_id:
        search.engine = "wandb"
    elif search.engine == "auto" and search.method == "bayes" and fits_wandb and search.is_ours:
        key = importlib.util.find_spec("wandb") and records.has_wandb_key(quiet=True)
        search.engine = "wandb" if key else "local"
        name = "W&B, with its API key" if key else "local, Optuna, without an API key of W&B"
        say(f"engine: {name} (--engine chooses)", search.quiet)
    if search.engine == "wandb":
        if not fits_wandb:
            raise UsageError("--storage and --seeds go with --engine local")
        if not search.sweep_id:  # else it has answered already
            reach_wandb(search)


def reach_wandb(search: Namespace) -> None:
    """UsageError without a key, RunError where the server does not answer: W&B would try for
    minutes."""
    records.check_wandb("online", search.quiet)
    import wandb

    address = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(address, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        raise RunError(
            f"W&B's server {address} cannot be reached ({error}); --engine local does without"
        ) from error


def wandb_config(search: Namespace) -> Any:
    """The configuration of the sweep --sweep-id. UsageError, RunError."""
    reach_wandb(search)
    import wandb

    path = search.sweep_id
    if "/" not in path:
        path = f"{search.wandb_project}/{path}"
    try:
        return wandb.Api().sweep(path).config
    except (ValueError, wandb.errors.Error) as error:
        raise UsageError(str(error)) from error


def make_sweep(search: Search) -> str:
    """Make a sweep at W&B: its name."""
    import wandb

    config = {
        "program": search.script,
        "method": search.method,
        "run_cap": search.count,
        "parameters": {name: parameter.entry for name, parameter in search.parameters.items()},
        # The best so far is what W&B is to compare: `fit` logs it.
        "metric": {"name": f"best_{search.metric}", "goal": search.goal},
        "command": [
            "${env}",
            "${interpreter}",
            "${program}",
            *search.flags,
            *search.places,
            "${args}",
        ],
    }
    if search.bands:
        config["early_terminate"] = {
            "type": "hyperband",
            "min_iter": min(filter(None, search.bands)),
            "eta": search.eta,
        }
    return wandb.sweep(config, project=search.wandb_project)


def run_agent(search: Search) -> None:
    """Run the trials that a W&B sweep gives out; each becomes a trial of the study as well."""
    import wandb

    def run_given():
        # The agent leaves the parameters of the run in this file, by their names at W&B.
        given = load_yaml(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]))
        given = {path.rpartition(".")[2].replace("-", "_"): given[path] for path in given}
        given.setdefault("lr", given.get("learning_rate"))
        params = {name: given[name]["value"] for name in search.parameters}
        with records.locked(search.directory / ".queue.lock", wait=True):
            number = len(trials_of(search))
            search.study.add_trial(search.trial(number, params))
            trial = trials_of(search)[number]
            claim(search, trial)
        run_trial(search, trial)

    os.environ.setdefault("WANDB_DIR", str(search.directory))
    left = search.total - len(trials_of(search))
    if left > 0:
        count = math.ceil(left / search.jobs)
        wandb.agent(search.sweep_id, run_given, project=search.wandb_project, count=count)


# ------------------------ The report ------------------------
def leaderboard(search: Search, lines: list[dict]) -> DataFrame:
    """A table with a row for each configuration, the best first; then the pruned ones, by the
    epochs that they survived; then those without a result. Of several seeds the mean decides."""
    from scipy.stats import t

    # A row for each trial, with what the seeds of its configuration have together. Its `place` is 0
    # where it finished, 1 where it was pruned, 2 where it has no result.
    table = DataFrame(lines)
    table["configuration"] = table.trial // len(search.seeds)
    table["place"] = table.status.map({"finished": 0, "pruned": 1}).fillna(2)
    losses = search.sign * table[search.metric].astype(float)
    table["cost"] = losses.where(table.status != "diverged", math.inf)
    groups = table.groupby("configuration")
    table["seconds"] = groups.seconds.transform("sum")
    table["mean"] = search.sign * groups.cost.transform("mean")
    half = t.ppf(0.975, groups.cost.transform("count") - 1) * groups.cost.transform("sem")
    table["low"] = table["mean"] - half
    table["high"] = table["mean"] + half

    # The best seed stands for all, unless one of them did not finish.
    table = table.sort_values(["place", "cost"], ascending=[False, True])
    table = table.drop_duplicates("configuration")
    table["cost"] = search.sign * table["mean"]
    table["survived"] = -table.epochs * (table.place == 1)
    return table.sort_values(["place", "survived", "cost"])


def report(search: Search, lines: list[dict], complete: bool) -> dict | None:
    """Print and write the leaderboard, the pictures and the best configuration; test the winner of
    a complete sweep. Returns its row, None where no trial has finished."""
    # How many trials have ended, and how.
    trials = counted(len(lines), "trial")
    directory = search.directory
    remarks = [f"{shown(directory)}: {trials} have ended"]
    failed = sum(line["status"] == "failed" for line in lines)
    if failed:
        remarks.append(f"{failed} failed; {how_to_go_on(search)} --retry-failed runs them again")
    if not lines:
        say(remarks[0], search.quiet)
        return None

    # The table.
    board = leaderboard(search, lines)
    columns = ["trial", "run", "status", *dict.fromkeys((*METRICS, search.metric))]
    if len(search.seeds) > 1:
        columns += ["mean", "low", "high"]
    columns += ["epochs", "seconds"]
    params = DataFrame([*board.params], board.index, search.parameters, dtype=object)
    taken = {*columns, "error"}
    params.columns = [f"{name} (searched)" if name in taken else name for name in params]
    table = board[columns].join(params).join(board.error)
    texts = DataFrame()
    for name in table:
        kind = search.metric if name in ("mean", "low", "high") else name
        texts[name] = [value_as_text(value, kind) for value in table[name]]
    tables = {"Trials, best first": texts}
    say("\n".join(evaluate.as_lines(tables)).rstrip(), search.quiet)

    # The winner, and its test.
    best = evaluate.as_rows(board)[0]
    link = directory / "best"
    if link.is_symlink():
        link.unlink()
    if best["status"] == "finished":
        command = search.command(best["params"], search.seeds.index(best["seed"]))
        text = value_as_text(best[search.metric], search.metric)
        remarks += [f"best: {best['run']}, {search.metric} {text}", f"  {command}"]
        if (directory / best["run"]).is_dir():
            if not link.exists():  # a copy of the search may have made a folder of it
                link.symlink_to(best["run"])
            if complete and (directory / best["run"] / "best.pt").exists():
                remarks.append(f"  {test_winner(search, best['run'])}")
    say("\n".join(remarks), search.quiet)

    # The files.
    flags = [(key, str(getattr(search, key))) for key in search.KEPT]
    tables["The search"] = DataFrame(flags, columns=["flag", "value"])
    pictures = draw_sweep(search, board)
    page = evaluate.as_page(f"{directory.name}: {trials}", remarks, tables, pictures)
    files = {"leaderboard.csv": evaluate.as_csv(table).encode(), "report.html": page}
    files |= {f"{name}.png": picture for name, picture in pictures.items()}
    evaluate.write_files(directory, files)
    return best if best["status"] == "finished" else None


def test_winner(search: Search, run: str) -> str:
    """Test the weights of the winner's best epoch; say for which trials the test set was read."""
    # Where the images are now: they may have moved since it was trained.
    places = [re.sub("^--dataset=/", "--data-dir=/", word) for word in search.places]
    where = [word for word in places if word.startswith("--data-dir=")]

    # Test it, unless that was done before.
    directory = search.directory
    before = sorted(path.parent.name for path in directory.glob("trial-*/metrics.json"))
    try:
        if run not in before:
            evaluate.main([str(directory / run), "--quiet", *where])
    except (UsageError, RunError) as error:
        return f"not tested: {error}"
    content = records.read_json(directory / run / "metrics.json")
    accuracy = (content.get("tta") or content)["accuracy"]
    others = ", ".join(name for name in before if name != run)
    often = f"which was read before, for {others}" if others else "read once, for this trial alone"
    return f"accuracy {accuracy:.2%} on the test set, {often}"


# ------------------------ Pictures ------------------------
def cut_off(search: Search, losses: Any) -> tuple[Any, str]:
    """Losses for a picture, and what its title says where some are cut off.

    These would flatten all others: they are more than three times as far from the lowest loss,
    which is the best, as the median is.
    """
    limit = losses.min() + 3 * (losses.median() - losses.min())
    text = value_as_text(search.sign * limit, search.metric)
    note = f"\nwhat is worse than {text} is drawn at {text}" if losses.max() > limit else ""
    return losses.clip(upper=limit), note


def as_label(value: Any) -> Any:
    """A value as it stands at an axis: a long word without its middle, as paths differ at their
    ends."""
    if not isinstance(value, str):
        return value
    return evaluate.shorten(f"{value[:6]}…{value[-7:]}" if len(value) > 14 else value)


def draw_sweep(search: Search, board: DataFrame) -> dict[str, bytes]:
    """The pictures of a sweep, {name: PNG}: curves, a grid of two, and Optuna's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as optunas

    pictures = {"curves": evaluate.render(draw_curves(search, board))}
    board = board[board.place < 2].sort_values("trial")
    if len(board) and search.method == "grid" and len(search.parameters) == 2:
        pictures["grid"] = evaluate.render(draw_grid(search, board))

    if len(board) < 2:
        return pictures

    # Optuna's pictures, where there are trials to compare.
    losses, note = cut_off(search, board.cost)
    seen = study_to_draw(search, board.params, search.sign * losses)
    drawings = {"slices": optunas.plot_slice, "parallel": optunas.plot_parallel_coordinate}
    if len(board) >= 8:
        # PED-ANOVA (S. Watanabe et al., 2023) with the best quarter: a tenth is a trial or two.
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=0.25, region_quantile=1.0
        )
        importance = functools.partial(optunas.plot_param_importances, evaluator=evaluator)
        drawings |= {"history": optunas.plot_optimization_history, "importance": importance}
    for name, draw in drawings.items():
        # They set a style, write powers of ten, and warn where all trials are alike. What is narrow
        # there gets room.
        look = {"text.parse_math": True, "savefig.bbox": "tight"}
        with matplotlib.rc_context(look), warnings.catch_warnings(action="ignore"):
            draw(seen, target_name=search.metric)
            figure = pyplot.gcf()
            for ax in figure.axes:
                ax.tick_params(axis="x", rotation=90 if name == "slices" else 45)
            if name in ("slices", "parallel"):
                figure.set_size_inches(4 + 2 * len(search.parameters), 5)
            if name != "importance":
                figure.suptitle(f"{name}{note}", y=1, va="bottom")
            pictures[name] = evaluate.render(figure)
            pyplot.close()
    return pictures


def study_to_draw(search: Search, configurations: Any, values: Any) -> optuna.Study:
    """A study of these configurations and their metrics, with short words, and without what is the
    same in all of them."""
    distributions = {}
    for name, parameter in search.parameters.items():
        if len(parameter.values) != 1:
            distributions[name] = parameter.distribution
            if isinstance(parameter.distribution, CategoricalDistribution):
                words = dict.fromkeys(map(as_label, parameter.values))
                distributions[name] = CategoricalDistribution([*words])
    study = optuna.create_study(direction=search.goal)
    for params, value in zip(configurations, values, strict=True):
        known = {name: distributions[name] for name in params if name in distributions}
        params = {name: as_label(params[name]) for name in known}
        study.add_trial(optuna.create_trial(params=params, distributions=known, value=value))
    return study


def draw_curves(search: Search, board: DataFrame) -> Any:
    """The metric of all trials, epoch by epoch, as they have reported it."""
    trials = trials_of(search)
    best = board.iloc[0]
    reports = {trial.user_attrs["trial"]: trial.intermediate_values for trial in trials}
    losses = search.sign * DataFrame(reports).sort_index()
    losses, note = cut_off(search, losses.stack())
    lines = lines_of(search, trials)
    finished = {line["trial"] for line in lines if line["status"] == "finished"}
    title = f"all trials; {best.run}, the best, in colour; x: it did not finish{note}"
    figure = evaluate.new_figure(8, 4.5, title)
    ax = figure.subplots()
    evaluate.label_epochs(ax, search.metric)
    for number, curve in (search.sign * losses).unstack().items():
        curve = curve.dropna()
        if number == best.trial:
            ax.plot(curve, color=evaluate.ORANGE, linewidth=2.5, zorder=3)
        else:
            ax.plot(curve, color="silver", linewidth=1)
        if number not in finished:
            ax.plot(curve[-1:], "x", color="black", markersize=5)
    return figure


def draw_grid(search: Search, board: DataFrame) -> Any:
    """A grid of two parameters as a heatmap, the best bright."""
    from numpy import ndenumerate

    down, across = search.parameters
    table = DataFrame([*board.params], columns=[down, across], dtype=object).fillna("-")
    table[""] = [*board.cost]  # a name that no parameter has
    cells = table.pivot(index=down, columns=across, values="")
    height, width = cells.shape
    figure = evaluate.new_figure(2.5 + width, 2 + 0.7 * height, search.metric)
    ax = figure.subplots()
    worst = cut_off(search, board.cost)[0].max()  # a loss beyond it has its colour
    ax.imshow(cells, evaluate.colormap("viridis_r"), aspect="auto", vmax=worst)
    ax.set_xticks(range(width), cells.columns, rotation=45)
    ax.set_yticks(range(height), cells.index)
    ax.set(xlabel=across, ylabel=down)
    for (row, column), loss in ndenumerate(cells):
        ax.text(
            column,
            row,
            value_as_text(search.sign * loss, search.metric),
            ha="center",
            va="center",
            bbox={"facecolor": "white", "pad": 1.5},
        )
    return figure


if __name__ == "__main__":
    sys.exit(common.command_line(main))
