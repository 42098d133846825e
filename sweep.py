"""Search hyperparameters by grid, at random, or by Bayesian optimisation, with no account and no database.

    python sweep.py --method grid --dry-run                          # the CIFAR-10 tutorial's search: 8 trials
    python sweep.py --method bayes --jobs 2                          # learning rate and batch size on MNIST, 20 trials
    python sweep.py --method random --param lr=log:1e-4..1e-1 --param l1=int:64..512 --count 30 -- --epochs 5
    python sweep.py --config sweep.yaml --name mine                  # a file in the schema of W&B's sweeps
    python sweep.py --resume runs/mine                               # go on where the search was stopped

A parameter is a flag of the training script; flags after -- go to every trial. A trial never reads the test set.
Optuna keeps the search: in the file study.journal, or with --storage in a database that many machines share.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import common
import evaluate
import records
from records import RunError, UsageError

import optuna
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import (
    ExperimentalWarning,
    StorageInternalError,
    TrialPruned,
    UpdateFinishedTrialError,
)
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", ExperimentalWarning)

METRICS = {"val_loss": "minimize", "val_acc": "maximize"}

# The tutorials' own searches: script, parameters, flags.
CIFAR_SEARCH = (
    "train_cifar.py",
    ["c1=48,96", "c2=96,192", "l1=256,512"],
    [
        "--model",
        "confignet",
        "--epochs",
        "10",
        "--lr",
        "0.001",
        "--batch-size",
        "512",
        "--tolerance",
        "3",
    ],
)
MNIST_SEARCH = ("train_mnist.py", ["lr=log:1e-4..1e-1", "batch_size=32,64,128,256"], [])
DEFAULT_SEARCH = {"grid": CIFAR_SEARCH, "random": MNIST_SEARCH, "bayes": MNIST_SEARCH}


# ------------------------ Options ------------------------
def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = common.ArgumentParser(
        prog="sweep.py", description=__doc__, usage="sweep.py [flags] [-- FLAGS]"
    )
    count = common.number(int, 1)
    switch: dict = {"action": "store_true"}

    flag = parser.add_argument_group("the search").add_argument
    flag(
        "--method",
        choices=tuple(DEFAULT_SEARCH),
        help="grid: all combinations; bayes: Optuna proposes",
    )
    flag(
        "--script",
        metavar="FILE",
        help="training script: one with main(argv, on_epoch), as train_mnist.py has",
    )
    text = "48,96 or 0.0..0.5 or int:64..512 or log:1e-4..1e-1; as often as there are parameters"
    flag("--param", action="append", default=[], metavar="NAME=SPEC", help=text)
    flag(
        "--config",
        type=Path,
        metavar="FILE",
        help="the search from a YAML or JSON file in W&B's sweep schema",
    )
    flag(
        "--metric",
        choices=tuple(METRICS),
        default="val_loss",
        help="compares the trials, each in its best epoch",
    )
    flag(
        "--count",
        type=count,
        metavar="N",
        help="trials in all (a grid: every combination; else 20)",
    )
    text = "of the parameters that are drawn, and of every training"
    flag("--seed", type=common.number(int, 0), default=42, metavar="N", help=text)
    flag(
        "--seeds",
        type=count,
        default=1,
        metavar="K",
        help="run each configuration with K seeds; their mean decides",
    )
    text = "stop bad trials early: after a ninth and a third of their epochs only the best third goes on (see --eta)"
    flag("--prune", **switch, help=text)
    flag(
        "--eta",
        type=common.number(int, 2),
        default=3,
        metavar="N",
        help="with --prune: one trial in N goes on",
    )

    flag = parser.add_argument_group("running it").add_argument
    flag(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="trials at a time, each in a process of its own",
    )
    text = "CPU threads of a trial (cores / --jobs); another number changes the last digits"
    flag("--threads", type=count, metavar="N", help=text)
    flag(
        "--max-failures",
        type=count,
        default=3,
        metavar="N",
        help="stop after so many failed trials in a row",
    )
    runs = records.HERE / "runs"
    flag(
        "--runs-dir",
        type=common.absolute_path,
        default=runs,
        metavar="DIR",
        help="where the sweep's directory is",
    )
    flag(
        "--name",
        type=common.run_name,
        metavar="NAME",
        help="of the sweep; one that exists is continued",
    )
    text = "continue the sweep in this directory, or make its report anew; no other flag is needed"
    flag("--resume", type=common.absolute_path, metavar="SWEEP", help=text)
    flag("--retry-failed", **switch, help="also run the trials again that failed")
    flag("--dry-run", **switch, help="print the trials, run none")
    flag("--quiet", **switch, help="print only errors")

    flag = parser.add_argument_group("many machines, and Weights & Biases").add_argument
    text = "share the search --name with other machines: postgresql://user@host/database"
    flag("--storage", metavar="URL", help=text)
    text = "with --storage: a machine that is silent for so long is taken for dead, and another runs its trial"
    flag("--grace", type=common.number(int, 5), default=120, metavar="SECONDS", help=text)
    text = "auto: W&B for bayes where an API key is configured"
    flag("--engine", choices=("auto", "local", "wandb"), default="auto", help=text)
    flag(
        "--sweep-id",
        metavar="ID",
        help="take trials from this W&B sweep, with its script and its flags",
    )
    flag(
        "--wandb-project",
        default="image-classifiers",
        metavar="NAME",
        help="where W&B files the sweep",
    )
    return parser


# What `Objective` gives to every trial.
SET_BY_SWEEP = {
    "--runs-dir",
    "--run-name",
    "--resume",
    "--stop-after",
    "--quiet",
    "--no-quiet",
    "--test",
    "--no-test",
    "--seed",
}


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, "Search | None"]:
    """The flags, and the Search that they ask for; None with --resume, where the study holds it. UsageError."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if args.resume:
        may_change = {
            "resume",
            "count",
            "jobs",
            "threads",
            "max_failures",
            "retry_failed",
            "quiet",
            "storage",
            "grace",
        }
        defaults = vars(parser.parse_args([]))
        given = [
            name for name in defaults.keys() - may_change if getattr(args, name) != defaults[name]
        ]
        if given or flags:
            what = f"--{given[0].replace('_', '-')}" if given else "the flags after --"
            raise UsageError(f"--resume takes the search from the directory: leave out {what}")
        return args, None
    parameters, rule = [], None
    if args.config or args.sweep_id:
        try:
            config = load_yaml(args.config) if args.config else wandb_config(args)
            from_config, parameters = read_config(config)
            flags = [*flags_of_command(config.get("command", [])), *flags]
            rule = config.get("early_terminate")
            bands(rule)
        except UsageError as error:
            raise UsageError(f"{args.config or f'--sweep-id {args.sweep_id}'}: {error}") from error
        args = parser.parse_args([*from_config, *argv[:cut]])
    search = search_from(args, [*parameters, *map(parse_parameter, args.param)], rule, flags)
    if args.storage and not args.name:
        raise UsageError("--storage needs --name NAME: the machines find the search by it")
    return args, search


def search_from(
    args: argparse.Namespace, parameters: list, rule: dict | None, flags: list[str]
) -> "Search":
    """The Search that is asked for: `parameters` as from `parse_parameter`, `rule` as W&B's early_terminate, and
    `flags` for each trial. UsageError."""
    if not args.method:
        raise UsageError("--method grid, random or bayes is needed")
    default_script, default_space, default_flags = DEFAULT_SEARCH[args.method]
    path = find_script(args.script or default_script)
    script = path.name if path.parent == records.HERE else str(path)
    if not parameters:
        if script != default_script:
            raise UsageError(
                f"--script {script} needs its own search: --param NAME=SPEC or --config FILE"
            )
        parameters, flags = list(map(parse_parameter, default_space)), [*default_flags, *flags]
    space = dict(parameters)
    if len(space) < len(parameters):
        raise UsageError("a parameter is there twice")
    for word in [*flags, *(f"--{name}" for name in space)]:
        if word.split("=")[0].replace("_", "-") in SET_BY_SWEEP:
            raise UsageError(
                f"{word} is set by the sweep for every trial; --seed and --seeds of sweep.py choose seeds"
            )
    threads = args.threads or max(1, torch.get_num_threads() // args.jobs)
    search = Search(
        script, args.method, space, flags, args.metric, 20, args.seed, args.seeds, rule, threads
    )
    for parameter in search.parameters:
        if parameter.size() == math.inf and args.method == "grid":
            raise UsageError(f"{parameter.name}: a grid needs a list of values, not a range")
        changes_loss = args.metric == "val_loss" and parameter.name in (
            "label_smoothing",
            "val_size",
            "dataset",
        )
        if changes_loss and parameter.size() > 1:
            raise UsageError(
                f"{parameter.name} changes what val_loss means: choose by --metric val_acc"
            )
    search.count = int(
        min(search.size(), args.count or (math.inf if args.method == "grid" else 20))
    )
    epochs = check_trials(search)
    search.epochs = search.seeds * max(epochs)
    if args.prune:
        if rule or len(epochs) > 1 or max(epochs) < args.eta:
            why = (
                "the config's early_terminate"
                if rule
                else f"--epochs {', '.join(map(str, sorted(epochs)))}"
            )
            need = f"it needs one number of epochs, at least --eta {args.eta}"
            raise UsageError(f"--prune does not go with {why}: {need}")
        search.early_terminate = {
            "type": "hyperband",
            "max_iter": max(epochs),
            "s": 12,
            "eta": args.eta,
        }
    if search.early_terminate and search.seeds > 1:
        raise UsageError("pruning and --seeds: one at a time")
    return search


def load_yaml(path: Path):
    """The content of a YAML or JSON file. UsageError."""
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except (
        OSError,
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:
        raise UsageError(f"it cannot be read: {error}") from error  # PyYAML lets its own errors out


CONFIG_KEYS = {
    "program",
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "run_cap",
    "name",
    "command",
    "description",
    "project",
    "entity",
}


def read_config(config: dict) -> tuple[list[str], list[tuple[str, dict]]]:
    """A configuration in the schema of W&B's sweeps as flags of this script, and its parameters. UsageError."""
    if not isinstance(config, dict):
        raise UsageError("expected keys and values, as in W&B's sweep configuration")
    for key in config.keys() - CONFIG_KEYS:
        raise UsageError(f"unknown key {key} (known: {', '.join(sorted(CONFIG_KEYS))})")
    flags = {"method": "--method", "run_cap": "--count", "name": "--name", "program": "--script"}
    argv = [f"{flag}={config[key]}" for key, flag in flags.items() if key in config]
    if "metric" in config:
        metric = config["metric"]
        if not isinstance(metric, dict) or metric.keys() - {"name", "goal"} or "name" not in metric:
            raise UsageError("metric has a name and a goal, and nothing else here")
        name = str(metric["name"]).removeprefix("best_")  # the best epoch decides in any case
        if metric.get("goal", METRICS.get(name)) != METRICS.get(name):
            raise UsageError(f"metric {name} is not known with the goal {metric['goal']}")
        argv.append(f"--metric={name}")
    found = []

    def walk(parameters):
        if not isinstance(parameters, dict) or not parameters:
            raise UsageError("parameters must have at least one entry")
        for name, content in parameters.items():
            if isinstance(content, dict) and "parameters" in content:
                walk(
                    content["parameters"]
                )  # a group: W&B nests its parameters, a flag is known by its own name
            else:
                if isinstance(content, dict):
                    content = {key: scalar(value) for key, value in content.items()}
                make_parameter(str(name), content)
                found.append((str(name).replace("-", "_"), content))

    walk(config.get("parameters"))
    return argv, found


def flags_of_command(command: list) -> list[str]:
    """The flags that a config's `command` adds to those of the parameters. UsageError names an unknown macro."""
    if not isinstance(command, list):
        raise UsageError("command must be a list")
    words = []
    for word in map(str, command):
        variable = re.fullmatch(r"\$\{envvar:(\w+)\}", word)
        if variable and variable[1] in os.environ:
            words.append(os.environ[variable[1]])
        elif word.startswith("${") and word not in (
            "${env}",
            "${interpreter}",
            "${program}",
            "${args}",
        ):
            raise UsageError(f"command: {word} is not supported, or not set")
        elif not word.startswith("${") and word not in ("python", "python3"):
            words.append(word)
    return words


def bands(rule: dict | None) -> list[int]:
    """The epochs at which W&B's early_terminate compares the trials; none without a rule. UsageError."""
    if rule is None:
        return []
    if not isinstance(rule, dict) or rule.get("type") != "hyperband":
        raise UsageError("early_terminate: the only type is hyperband")
    for key, value in rule.items():
        least = {"type": 0, "min_iter": 1, "max_iter": 1, "s": 1, "eta": 2}.get(key)
        if least is None or (key != "type" and (type(value) is not int or value < least)):
            raise UsageError(f"early_terminate: {key}: {value} is not supported")
    eta = rule.get("eta", 3)
    if "min_iter" in rule:
        return [rule["min_iter"] * eta**power for power in range(12)]
    if "max_iter" in rule and "s" in rule:
        return sorted(
            {rule["max_iter"] // eta**power for power in range(1, min(rule["s"], 64) + 1)} - {0}
        )
    raise UsageError("early_terminate: give min_iter, or max_iter with s")


# ------------------------ The space ------------------------
@dataclass(frozen=True)
class Parameter:
    """A flag to be searched, and Optuna's distribution of its values. A logarithmic one has no
    steps: then `step` is here, and the values are rounded to its multiples."""

    name: str
    distribution: BaseDistribution
    step: float | None = None

    def size(self) -> float:
        """How many values there are."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return len(d.choices)
        step = self.step or d.step
        return round((d.high - d.low) / step) + 1 if step else math.inf

    def values(self) -> list:
        """All values of a range that is not continuous."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return list(d.choices)
        return [
            self.rounded(d.low + index * (self.step or d.step)) for index in range(int(self.size()))
        ]

    def ends(self) -> list:
        """All words, or the bounds of a range: what the script refuses lies there."""
        d = self.distribution
        return (
            self.values()
            if isinstance(d, CategoricalDistribution)
            else [self.rounded(x) for x in (d.low, d.high)]
        )

    def rounded(self, value):
        """A value as it is shown and used: six digits are enough, and can be read and copied."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution | IntDistribution):
            return value
        if self.step:
            value = round(value / self.step) * self.step
        return (
            value
            if isinstance(value, int)
            else min(max(float(f"{value:.{12 if d.step else 6}g}"), d.low), d.high)
        )

    def suggest(self, trial: Trial):
        """The value of a trial."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return trial.suggest_categorical(self.name, d.choices)
        kind = trial.suggest_int if isinstance(d, IntDistribution) else trial.suggest_float
        return self.rounded(kind(self.name, d.low, d.high, step=d.step, log=d.log))


def scalar(text):
    """A value, or a list of them, as a user writes it: 3, 1e-4, true, or a word. YAML takes 1e-4 for a word."""
    if isinstance(text, list):
        return [scalar(value) for value in text]
    if isinstance(text, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


def parse_parameter(text: str) -> tuple[str, dict]:
    """`c1=48,96`, `d1=0.0..0.5`, `l1=int:64..512` or `lr=log:1e-4..1e-1` as a name and W&B's entry. UsageError."""
    found = re.fullmatch(r"([A-Za-z][\w-]*)=(?:(int|log):)?(.*)", text, re.DOTALL)
    if not found:
        raise UsageError(
            f"--param {text}: expected NAME=VALUE,VALUE or NAME=LOW..HIGH, with int: or log: before LOW"
        )
    name, kind, values = found[1].replace("-", "_"), found[2], found[3].split(",")
    bounds = [scalar(bound) for bound in found[3].split("..")]
    if len(bounds) == 2:
        distribution = {"int": "int_uniform", "log": "log_uniform_values"}.get(kind, "uniform")
        content = {"distribution": distribution, "min": bounds[0], "max": bounds[1]}
    elif kind or "" in values or len(bounds) > 2:
        reason = "a value is empty" if "" in values else "expected two numbers, LOW..HIGH"
        raise UsageError(f"--param {text}: {reason}")
    else:
        content = {"values": scalar(values)}
    make_parameter(name, content)
    return name, content


# W&B's distributions, and the keys of each.
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


def make_parameter(name: str, content: dict) -> Parameter:
    """A Parameter from an entry of `parameters` in W&B's schema. UsageError says what is wrong or not supported."""

    def refuse(text):
        raise UsageError(f"parameter {name}: {text}")

    if not isinstance(content, dict):
        refuse(f"expected value, values, or min and max, not {content!r}")
    content = dict(content)
    whole = all(isinstance(content.get(bound), int) for bound in ("min", "max"))
    inferred = "constant" if "value" in content else "categorical" if "values" in content else None
    kind = content.pop("distribution", inferred or ("int_uniform" if whole else "uniform"))
    if kind not in DISTRIBUTIONS:
        refuse(f"the distribution {kind} is not supported (only {', '.join(DISTRIBUTIONS)})")
    if kind.startswith("q_"):
        content.setdefault("q", 1)
    if content.keys() != set(DISTRIBUTIONS[kind].split()):
        refuse(f"{kind} has {DISTRIBUTIONS[kind]}, not {' '.join(map(str, content)) or 'nothing'}")
    if kind in ("constant", "categorical"):
        values = content["values"] if kind == "categorical" else [content["value"]]
        is_list = isinstance(values, list) and values
        if not is_list or not all(isinstance(value, bool | int | float | str) for value in values):
            refuse("values must be a list of numbers and words")
        for index, value in enumerate(values):
            if value in values[:index]:
                refuse(f"{value!r} is there twice")
        return Parameter(name, CategoricalDistribution(values))

    if any(
        isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < 1e15
        for x in content.values()
    ):
        refuse("the bounds and the step must be finite numbers")
    low, high, step, log = content["min"], content["max"], content.get("q"), "log" in kind
    if kind == "log_uniform":  # there the bounds are exponents of e
        low, high = math.exp(min(low, 300)), math.exp(min(high, 300))
    if low >= high:
        refuse(f"the lower bound {low} is not below the upper bound {high}")
    if log and low <= 0:
        refuse(f"a logarithmic range needs a lower bound above 0, not {low}")
    if kind == "int_uniform":
        step = 1 if whole else refuse("int needs whole numbers")
    if step is None and high - low < 1e-3 * max(abs(low), abs(high)):
        refuse("the range is too narrow for values of six digits")
    if step is None:
        return Parameter(name, FloatDistribution(low, high, log=log))
    if step <= 0 or (high - low) / step > 1e9:
        refuse(f"a step of {step} is too small for these bounds")
    # The multiples of the step that lie in the range; steps such as 0.1 have no exact sum.
    low, high = math.ceil(low / step - 1e-9) * step, math.floor(high / step + 1e-9) * step
    low, high = (x if isinstance(x, int) else float(f"{x:.12g}") for x in (low, high))
    if low > high or (log and low <= 0):
        refuse(f"there is no multiple of {step} within the bounds")
    if log:
        return Parameter(name, FloatDistribution(low, high, log=True), step)
    distribution = (
        IntDistribution if isinstance(low, int) and isinstance(step, int) else FloatDistribution
    )
    return Parameter(name, distribution(low, high, step=step))


@dataclass
class Search:
    """What is searched. It is kept in the study; only `count` and `threads` may change when the search goes on."""

    script: str
    method: str
    space: dict[str, dict]  # in W&B's schema
    flags: list[str]
    metric: str
    count: int
    seed: int
    seeds: int
    early_terminate: dict | None
    threads: int
    epochs: int = 0  # of a trial, at most; 0: unknown

    @functools.cached_property
    def parameters(self) -> list[Parameter]:
        """The space as Optuna knows it."""
        return [make_parameter(name, content) for name, content in self.space.items()]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Those of the parameters."""
        return {parameter.name: parameter.distribution for parameter in self.parameters}

    def params(self, drawn: dict) -> dict:
        """What Optuna has drawn, as it is used."""
        return {
            parameter.name: parameter.rounded(drawn[parameter.name])
            for parameter in self.parameters
        }

    def size(self) -> float:
        """How many configurations there are."""
        return math.prod(parameter.size() for parameter in self.parameters)

    def combinations(self) -> Iterator[dict]:
        """All configurations, in order."""
        return (
            dict(zip(self.space, values, strict=True))
            for values in itertools.product(*(parameter.values() for parameter in self.parameters))
        )

    @property
    def sign(self) -> int:
        """1 where the lowest metric is the best, -1 where the highest is."""
        return 1 if METRICS[self.metric] == "minimize" else -1

    @property
    def colours(self) -> str:
        """The colour map of the metric, in which the best is bright."""
        return "viridis_r" if self.sign > 0 else "viridis"

    def loss(self, line: dict) -> float:
        """The metric of a line of trials.jsonl, so that the lowest is the best."""
        return self.sign * line[self.metric]

    def configurations(self) -> list[dict]:
        """Those of a grid or a random search, in order; [{}, {}, ...] of bayes, where each is proposed in its turn."""
        if self.method == "grid":
            return list(itertools.islice(self.combinations(), self.count))
        if self.method == "bayes":
            return [{}] * self.count
        chosen, study = (
            [],
            optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.seed)),
        )
        while len(chosen) < self.count:
            chosen.append(self.propose(study, chosen))
        return chosen

    def propose(self, study: optuna.Study, known: list[dict]) -> dict:
        """Parameters from the sampler of `study`, that are not among the `known` ones."""
        for attempt in range(100):
            if attempt == 10:
                study.sampler = optuna.samplers.RandomSampler(seed=len(known))
            params = self.params(study.ask(self.distributions).params)
            if params not in known:
                return params
        return next(
            params for params in self.combinations() if params not in known
        )  # the last of a small space


# ------------------------ The script ------------------------
def find_script(script: str) -> Path:
    """The path of a training script, here or beside this file. UsageError where there is none."""
    for path in (Path(script), records.HERE / script):
        if path.is_file() and path.suffix == ".py":
            return path.resolve()
    raise UsageError(f"--script {script}: there is no such Python file")


@functools.cache
def load_script(path: Path):
    """The module of a training script. UsageError where it is not one."""
    try:
        if path.parent == records.HERE:
            module = importlib.import_module(path.stem)
        else:
            sys.path.insert(0, str(path.parent))
            spec = importlib.util.spec_from_file_location(str(path), path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        where = (
            error
            if isinstance(error, SyntaxError)
            else traceback.extract_tb(error.__traceback__)[-1]
        )
        text = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}"
        raise UsageError(f"--script {where.filename}, line {where.lineno}: {text}") from error
    if not hasattr(module, "main"):
        raise UsageError(f"--script {path}: it has no function main(argv, on_epoch=None)")
    return module


def check_trials(search: Search) -> set[int]:
    """The numbers of epochs of the trials, {0} where they are not known. Ends with the script's own message where it
    refuses a trial."""
    module, configurations = load_script(find_script(search.script)), search.configurations()
    if not hasattr(module, "parse_arguments"):
        return {0}
    if search.method == "bayes":  # its corners
        ends = {parameter.name: parameter.ends() for parameter in search.parameters}
        first = {name: values[0] for name, values in ends.items()}
        configurations = [
            {**first, name: value} for name, values in ends.items() for value in values
        ]
    words = (
        [*trial_words(search, params, search.seed), "--no-test", "--quiet"]
        for params in configurations
    )
    return {getattr(module.parse_arguments(argv), "epochs", 0) for argv in words}


def check_data(search: Search, directory: Path, quiet: bool) -> bytes | None:
    """UsageError where the trials would lack their data; once, and not trial by trial.

    Of images from files, the content of the data.csv that all trials read.
    """
    module = load_script(find_script(search.script))
    if not hasattr(module, "parse_arguments") or not hasattr(module, "synthetic"):
        return None
    values = [value for p in search.parameters if p.name == "dataset" for value in p.values()]
    for choice in [{"dataset": value} for value in values] or [{}]:
        args = module.parse_arguments(trial_words(search, choice, search.seed))
        args.directory, args.quiet = directory, quiet
        try:
            if args.dataset in common.TORCHVISION:
                common.load_data(args, module.synthetic, ("train", "val"))
            elif args.dataset not in common.DATASETS and not (directory / "data.csv").exists():
                common.search_directory = None if values else directory
                listing = common.listing_of_search(args)
                if not values:
                    return listing
        except RunError as error:
            raise UsageError(str(error)) from error
        finally:
            common.search_directory = None
            common.images_read.clear()
    return None


def check_listing(study: optuna.Study, directory: Path) -> None:
    """RunError where the search's data.csv is not the one that it began with."""
    path = directory / "data.csv"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    if "files_checksum" not in study.user_attrs:
        study.set_user_attr("files_checksum", checksum)
    elif study.user_attrs["files_checksum"] != checksum:
        raise RunError(f"{records.shown(path)} is not the one that the search began with")


def trial_words(search: Search, params: dict, seed: int) -> list[str]:
    """The command line of a configuration."""
    words = list(search.flags)
    for name, value in params.items():
        flag = f"--{name}".replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag}={value}")
    return [*words, "--seed", str(seed)]


def as_command(search: Search, params: dict, seed: int) -> str:
    """The command line of a configuration, to be copied."""
    return shlex.join(
        ["python", records.shown(find_script(search.script)), *trial_words(search, params, seed)]
    )


# ------------------------ The study ------------------------
class NothingWaits(Exception):
    """No trial waits to be taken."""


class Journal(JournalStorage):
    """The study of one machine: a file in the sweep's directory. Trials are taken from its queue, in their order."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Queue `template_trial`. NothingWaits where Optuna would invent one."""
        if template_trial is None:
            raise NothingWaits
        return super().create_new_trial(study_id, template_trial)


class Database(RDBStorage):
    """The same for many machines. The database may be away for a while: each call is tried again for two minutes."""

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ):  # Optuna's cache calls it
        if template_trial is None:
            raise NothingWaits
        return super()._create_new_trial(study_id, template_trial)


class JournalLock:
    """The lock of study.journal. Optuna's own lock stays when its process is killed, and the others wait for 30 s."""

    def __init__(self, journal: Path):
        self.journal, self.stack = journal, contextlib.ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock, and cut off a last line that a crash has torn: Optuna would append to it."""
        self.stack.enter_context(records.locked(self.journal.with_name(".study.lock"), wait=True))
        with open(self.journal, "rb+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        self.stack.close()


PATIENCE = 120  # seconds


def patient(method: Callable) -> Callable:
    """Let a method of a storage try again where its database does not answer."""

    @functools.wraps(method)
    def attempts(*args, **kwargs):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return method(*args, **kwargs)
            except StorageInternalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    return attempts


# What a study, its cache and its heartbeat call.
for name in (
    *optuna.storages.BaseStorage.__abstractmethods__,
    "_get_trials",
    "_create_new_trial",
    "_set_trial_param",
    "record_heartbeat",
    "_get_stale_trial_ids",
):
    setattr(Database, name, patient(getattr(Database, name)))


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"(//[^:/@]*:).*@", r"\1***@", url)


def open_storage(directory: Path, url: str | None, grace: int) -> optuna.storages.BaseStorage:
    """The storage of the study in `directory`, or at `url`. UsageError, RunError."""
    if not url:
        journal = directory / "study.journal"
        return Journal(JournalFileBackend(str(journal), JournalLock(journal)))
    from sqlalchemy import exc

    # A network that is gone must not hold up a machine for as long as the system would wait.
    arguments = (
        {"connect_timeout": 10, "tcp_user_timeout": 30_000} if url.startswith("postgresql") else {}
    )
    engine = {"pool_pre_ping": True, "connect_args": arguments}
    heart = {"heartbeat_interval": max(1, grace // 8), "grace_period": grace}
    for attempt in itertools.count():
        try:
            return Database(url, engine, **heart, heartbeat_stale_trial_callback=queue_again)
        except (exc.ArgumentError, ImportError) as error:
            reason = str(error.__cause__ or error)
            if isinstance(error, ImportError) and url.startswith("postgresql"):
                reason = f'{reason}; pip install "sqlalchemy>=2.1" "psycopg[binary]"'
            raise UsageError(f"--storage {without_password(url)}: {reason}") from error
        except exc.SQLAlchemyError as error:
            # Another machine may make the tables at this moment.
            if attempt == 60 or not re.search(
                "already exists|duplicate|unique", str(error), re.IGNORECASE
            ):
                reason = str(error.__cause__ or error).splitlines()[0]
                raise RunError(f"--storage {without_password(url)}: {reason}") from error
            time.sleep(1)


def number_of(trial: FrozenTrial | Trial) -> int:
    """The number of a trial of the search. Where it is run again, Optuna has several trials for it."""
    return trial.user_attrs.get("trial", trial.number)


def latest(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The last attempt at each trial of the search."""
    trials = study.get_trials(deepcopy=False)
    return {number_of(trial): trial for trial in trials if "superfluous" not in trial.user_attrs}


def lines(study: optuna.Study, machine: str) -> list[dict]:
    """The lines of trials.jsonl: what the trials gave, in the order in which they ended. `run` is a directory beside
    that file, with the machine before it where that is not this one."""
    found = []
    for trial in sorted(
        latest(study).values(), key=lambda trial: trial.datetime_complete or datetime.max
    ):
        if trial.state.is_finished():
            line = trial.user_attrs.get("line") or new_line(trial, {}, "it ended without a result")
            where = trial.user_attrs.get("worker", [machine])[0]
            found.append(line if where == machine else {**line, "run": f"{where}/{line['run']}"})
    return found


def new_line(trial: FrozenTrial | Trial, params: dict, error: str | None = None) -> dict:
    """The line of a trial that has no result."""
    return {
        "trial": number_of(trial),
        "run": f"trial-{number_of(trial):04}",
        "status": "failed",
        "val_loss": None,
        "val_acc": None,
        "epochs": 0,
        "seconds": 0.0,
        "params": params,
        "error": error,
    }


def write_lines(study: optuna.Study, directory: Path, machine: str) -> list[dict]:
    """Write trials.jsonl where it does not have all the lines; return them."""
    ended, path = lines(study, machine), directory / "trials.jsonl"
    content = "".join(f"{json.dumps(line)}\n" for line in ended).encode()
    if not path.exists() or path.read_bytes() != content:
        records.write_atomically(path, content)
    return ended


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial that has ended once more, with the parameters that it had."""
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"trial": number_of(trial)},
            system_attrs=trial.system_attrs,
        )
    )


def set_waiting(study: optuna.Study, trial: FrozenTrial) -> None:
    """Let a trial wait again whose process has gone. It keeps its parameters and what it has reported."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def give_back(study: optuna.Study, machine: str) -> None:
    """Let the trials of this machine wait that it was running when it stopped; of a study in a file all of them."""
    for trial in study.get_trials(deepcopy=False):
        owner = trial.user_attrs.get("worker", [""])[0]
        if trial.state == TrialState.RUNNING and owner == machine:
            with contextlib.suppress(UpdateFinishedTrialError):  # another machine has taken it over
                set_waiting(study, trial)


class Proposer(optuna.samplers.RandomSampler):
    """Proposes what follows from the seed, the number of the trial and the results so far, and nothing twice. A trial
    that was pruned counts as far as it came, one that diverged as the worst."""

    def __init__(self, search: Search):
        super().__init__()
        self.search = search

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict:
        """The whole space."""
        return self.search.distributions

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict) -> dict:
        """The parameters of `trial`; {} where it has them already."""
        search = self.search
        if search.method != "bayes" or trial.params.keys() == search_space.keys():
            return {}
        others = [
            other for number, other in sorted(latest(study).items()) if number != number_of(trial)
        ]
        others = [other for other in others if other.params.keys() == search_space.keys()]
        results = {other.number: other.user_attrs.get("line", {}) for other in others}
        values = [
            line[search.metric]
            for line in results.values()
            if line.get("status") in ("finished", "pruned")
        ]
        # A Gaussian process with few random trials before it finds better points sooner; its cost grows with the cube
        # of the trials, and past some two hundred the tree-structured estimator takes over.
        seed = common.random_seed(search.seed, "proposals", number_of(trial)) % 2**32
        gaussian = functools.partial(optuna.samplers.GPSampler, n_startup_trials=5)
        sampler = (gaussian if len(values) <= 200 else optuna.samplers.TPESampler)(seed=seed)
        told = optuna.create_study(sampler=sampler, direction=METRICS[search.metric])
        for other in others:
            value, status = (
                results[other.number].get(search.metric),
                results[other.number].get("status"),
            )
            if status == "diverged" and values:
                value = max(values, key=lambda value: search.sign * value)
            if value is not None or other.state == TrialState.RUNNING:
                state = TrialState.RUNNING if value is None else TrialState.COMPLETE
                given = {"params": other.params, "distributions": other.distributions}
                told.add_trial(optuna.create_trial(state=state, value=value, **given))
        return search.propose(told, [search.params(other.params) for other in others])


class Bands(optuna.pruners.BasePruner):
    """W&B's early_terminate: a trial goes on at a band if it is in the best 1/eta, rounded up, of the trials that have
    reached that band. What counts is the best report of each by then."""

    def __init__(self, search: Search):
        # At its last epoch a trial has finished.
        self.bands = [
            band for band in bands(search.early_terminate) if band < (search.epochs or math.inf)
        ]
        self.eta = (search.early_terminate or {}).get("eta", 3)
        self.sign = search.sign

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether `trial` is to end after its last report."""
        band = trial.last_step
        if band not in self.bands:
            return False

        def best(reports):
            return min(self.sign * value for epoch, value in reports.items() if epoch <= band)

        reached = [other.intermediate_values for other in latest(study).values()]
        ranked = sorted(best(reports) for reports in reached if band in reports)
        return best(trial.intermediate_values) > ranked[math.ceil(len(ranked) / self.eta) - 1]


# ------------------------ A trial ------------------------
class Interrupted(BaseException):
    """A signal stopped a trial, which is to go on. (Optuna takes a KeyboardInterrupt for a failure.)"""


class TrialFailed(Exception):
    """A trial has ended without a result; the message is its error."""


# The statuses of a run that has ended, and what they are in a sweep.
ENDED = {
    "finished": "finished",
    "stopped_early": "finished",
    "diverged": "diverged",
    "pruned": "pruned",
}


class Objective:
    """What Optuna calls for each trial: parameters -> command line -> main(argv, on_epoch) -> value."""

    def __init__(self, search: Search, directory: Path, machine: str, *more_flags: str):
        self.search, self.directory, self.machine, self.more_flags = (
            search,
            directory,
            machine,
            more_flags,
        )
        self.stopped = []  # W&B's agent: the signal that stopped it
        self.main = load_script(find_script(search.script)).main

    def __call__(self, trial: Trial) -> float:
        """Run a trial. Its line of trials.jsonl becomes an attribute of it. TrialPruned, TrialFailed, Interrupted."""
        search = self.search
        trial.set_user_attr("worker", [self.machine, os.getpid()])
        params = {parameter.name: parameter.suggest(trial) for parameter in search.parameters}
        if not self.more_flags:  # W&B may give out the same twice
            self.check_alone(trial, params)
        line = new_line(trial, params)
        name, ended = line["run"], []
        try:
            for seed in range(search.seed, search.seed + search.seeds):
                line["run"] = name if search.seeds == 1 else f"{name}-seed-{seed}"
                ended.append(self.train(trial, params, seed, self.directory / line["run"], ended))
                if ENDED[ended[-1]["status"]] != "finished":
                    break
            line.update(self.outcome(ended))
        except UpdateFinishedTrialError:
            raise  # this machine was silent for so long that another has taken the trial over
        except StorageInternalError as error:
            raise SystemExit(
                f"the database is away: {error}"
            ) from error  # and the trial stays as it is
        except SystemExit as error:
            line["error"] = f"the script ended with exit status {error.code}"
        except Exception as error:
            if self.stopped:
                raise Interrupted(self.stopped[0]) from error
            by_agent = type(error) is Exception and self.more_flags  # so W&B's agent stops a run
            if by_agent and (record := read_record(self.directory / line["run"])):
                line.update(self.outcome([{**record, "status": "pruned", "error": None}]))
            else:
                line["error"] = f"{type(error).__name__}: {error}"[:1000]
                if not isinstance(error, UsageError | RunError | TrialFailed):
                    traceback.print_exc()
        trial.set_user_attr("line", line)
        if line["status"] == "finished":
            return line[search.metric]
        raise TrialPruned if line["status"] == "pruned" else TrialFailed(line["error"])

    def check_alone(self, trial: Trial, params: dict) -> None:
        """TrialFailed where the same trial was queued twice, or another was proposed the same at the same moment."""
        for other in trial.study.get_trials(deepcopy=False):
            if other.number == trial.number or "superfluous" in other.user_attrs:
                continue
            same = number_of(other) == number_of(trial)
            whole = self.search.distributions.keys() == other.params.keys()
            twin = not same and whole and params == self.search.params(other.params)
            if twin or (same and other.number < trial.number and other.state != TrialState.FAIL):
                trial.set_user_attr("superfluous", True)
                if twin:
                    trial.study.enqueue_trial({}, user_attrs={"trial": number_of(trial)})
                raise TrialFailed("superfluous")

    def train(
        self, trial: Trial, params: dict, seed: int, directory: Path, before: list[dict]
    ) -> dict:
        """The record of one run, from the start or from where it was interrupted. Its epochs are reported to Optuna
        after those of the runs `before`. What `main` raises, TrialFailed, Interrupted."""
        record = read_record(directory)
        if record.get("status") in ENDED:  # the sweep was killed before it could take note
            return record
        reported = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        epochs = sum(other["epochs"] for other in before)

        def report(row):
            step = epochs + row["epoch"]
            if step < max(reported, default=0):
                return False  # it was judged before it was interrupted
            if step not in reported:
                trial.report(row[self.search.metric], step)
            return bool(self.search.early_terminate) and trial.should_prune()

        if record and (directory / "last.pt").exists():
            argv = ["--resume", str(directory), "--quiet", *self.more_flags]
            rows = records.read_log(directory) if (directory / "log.jsonl").exists() else []
            if any(map(report, rows)):  # an epoch was saved, but not reported
                return {**record, "status": "pruned"}
        else:
            if directory.exists():  # it was killed before it could be continued
                shutil.rmtree(directory)
            argv = [
                *trial_words(self.search, params, seed),
                "--no-test",
                "--quiet",
                *self.more_flags,
            ]
            argv += ["--runs-dir", str(directory.parent), "--run-name", directory.name]
        try:
            record = self.main(argv, report)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "SIGINT") from error
        if not isinstance(record, dict) or record.get("status") not in (*ENDED, "interrupted"):
            raise TrialFailed(
                f"main(argv, on_epoch) returned no record with a status of {', '.join(ENDED)}"
            )
        if record["status"] == "interrupted":
            raise Interrupted(record.get("error") or "SIGTERM")
        metric = (record.get("best") or {}).get(self.search.metric)
        if record["status"] != "diverged" and not (
            isinstance(metric, int | float) and math.isfinite(metric)
        ):
            raise TrialFailed(f"its record has no best {self.search.metric} that is a number")
        return {**BLANK_RECORD, **record, "run": directory.name}

    def outcome(self, records: list[dict]) -> dict:
        """What the runs of a trial, one for each seed, mean for its line."""
        bests = [record["best"] or {} for record in records]
        outcome = {
            "status": ENDED[records[-1]["status"]],
            "error": records[-1]["error"],
            "epochs": max(record["epochs"] for record in records),
            "seconds": sum(record["seconds"] for record in records),
        }
        for name in METRICS:
            values = [best.get(name) for best in bests]
            outcome[name] = statistics.fmean(values) if None not in values else None
        if len(records) > 1 and outcome["status"] == "finished":
            outcome["std"] = statistics.stdev(best[self.search.metric] for best in bests)
            outcome["run"] = min(records, key=lambda record: self.search.loss(record["best"]))[
                "run"
            ]
        return outcome


# What a script may leave out of its record.
BLANK_RECORD = {"epochs": 0, "seconds": 0.0, "best": None, "error": None}


def read_record(directory: Path) -> dict:
    """run.json of a trial, and the name of its directory; {} where there is none."""
    path = directory / "run.json"
    return (
        {**BLANK_RECORD, **records.read_json(path), "run": directory.name} if path.exists() else {}
    )


# ------------------------ Workers ------------------------
def open_study(storage: optuna.storages.BaseStorage, name: str) -> tuple[optuna.Study, Search]:
    """The study of this name, and the Search that it holds, which proposes and prunes."""
    study = optuna.load_study(study_name=name, storage=storage)
    search = Search(**study.user_attrs["search"])
    study.sampler, study.pruner = Proposer(search), Bands(search)
    return study, search


def work(
    connection, directory: Path, machine: str, url: str | None, grace: int, name: str, threads: int
) -> None:
    """A worker process: run trials while any waits. It keeps torch and the images from one to the next."""

    def end_with_parent():
        with contextlib.suppress(EOFError, OSError):
            connection.recv()
        os._exit(1)

    def stop(number, frame):
        raise Interrupted(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which passes it on
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own is shared by processes, and stays when one is killed
    alive = open(directory / ".workers.lock", "a")  # noqa: SIM115 (as long as this process lives)
    records.fcntl.flock(alive, records.fcntl.LOCK_SH)
    try:
        with open(directory / "workers.log", "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        common.search_directory = directory
        study, search = open_study(open_storage(directory, url, grace), name)
        torch.set_num_threads(threads)
        objective = Objective(search, directory, machine)
        while True:
            with contextlib.suppress(
                UpdateFinishedTrialError, ValueError
            ):  # another machine has taken it over
                study.optimize(objective, n_trials=1, catch=Exception)
            connection.send("a trial has ended")
    except NothingWaits:
        os._exit(0)
    except Interrupted:
        os._exit(1)  # its trial is to go on


class Workers:
    """Processes that take trials from the study: {process: our end of its pipe}."""

    def __init__(self, *arguments):
        # They are forked from a process that has imported torch and done nothing else.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch._dynamo", "optuna"])
        self.arguments, self.running, self.sent = arguments, {}, None

    def start(self) -> None:
        """One more."""
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, *self.arguments))
        # A process that is started while SIGINT is blocked never gets it; starting the tracker would unblock it.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.running[process] = mine
        if self.sent:  # while this one was being started
            self.signal(self.sent)

    def wait(self, seconds: float) -> list[multiprocessing.Process]:
        """Wait until one says that a trial has ended, or ends itself; the processes that have ended."""
        ends = [*self.running.values(), *(process.sentinel for process in self.running)]
        if not ends:
            time.sleep(seconds)
        ready = multiprocessing.connection.wait(ends, seconds)
        for connection in self.running.values():
            if connection in ready:
                with contextlib.suppress(EOFError, OSError):
                    connection.recv()
        ended = [process for process in self.running if not process.is_alive()]
        for process in ended:
            self.running.pop(process).close()
        return ended

    def close(self) -> None:
        """Kill those that are left."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send all of them a signal, and those that are being started."""
        self.sent = number
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def run_trials(
    study: optuna.Study, search: Search, directory: Path, machine: str, args: argparse.Namespace
) -> str | None:
    """Run what waits in the study, --jobs trials at a time, until all trials have ended, on whatever machine.

    Returns the name of the signal that stopped it, or None. RunError after --max-failures failed trials in a row.
    """
    stopped, lost, failure, first_seen = [], 0, None, {}

    def stop(number, frame):
        workers.signal(signal.SIGKILL if stopped else signal.SIGTERM)
        stopped.append(signal.Signals(number).name)

    workers = Workers(
        directory, machine, args.storage, args.grace, study.study_name, search.threads
    )
    told = {line["trial"] for line in lines(study, machine)}
    before = len(told)
    bar = TrialBar(search, len(latest(study)), args.quiet)
    with bar, contextlib.closing(workers), records.interruptible(stop):
        while True:
            # Write down what has ended, here or on another machine.
            trials, ended = latest(study).values(), write_lines(study, directory, machine)
            for line in ended:
                if line["trial"] not in told:
                    told.add(line["trial"])
                    lost = 0
                    if bar.disable:
                        records.say(line_as_text(line, search), args.quiet)
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            here = [
                trial for trial in running if trial.user_attrs.get("worker", [""])[0] == machine
            ]
            bar.show(len(ended), len(trials), here, ended)

            # Start workers for what waits, or stop.
            last = ended[before:][-args.max_failures :]
            failed = len(last) == args.max_failures and all(
                line["status"] == "failed" for line in last
            )
            if not failure and (failed or lost >= args.max_failures):
                failure = f"the processes of {lost} trials in a row died before they began"
                if failed:
                    error = f"trial {last[-1]['trial']}, with: {last[-1]['error']}"
                    failure = f"{args.max_failures} trials in a row failed, the last, {error}"
                workers.signal(signal.SIGTERM)
            if stopped or failure or all(trial.state.is_finished() for trial in trials):
                if not workers.running:
                    break
            else:
                waiting = sum(trial.state == TrialState.WAITING for trial in trials)
                while not stopped and len(workers.running) < min(args.jobs, waiting + len(here)):
                    workers.start()
            if args.storage:
                take_over(study, running, first_seen, args.grace)

            for process in workers.wait(1):
                if process.exitcode != 0 and not stopped and not failure:
                    lost = (
                        0
                        if worker_died(study, search, [machine, process.pid], process.exitcode)
                        else lost + 1
                    )
        give_back(study, machine)
    if failure:
        raise RunError(
            f"{failure}; see {records.shown(directory / 'workers.log')}; when that is mended, go on with: "
            f"{how_to_go_on(directory, args)}, with --retry-failed for the failed ones"
        )
    return stopped[0] if stopped else None


def worker_died(study: optuna.Study, search: Search, worker: list, exit_code: int) -> bool:
    """Let the trial wait again whose worker has died, and end it where its worker had died before, and it has come no
    further since. Returns whether the worker had a trial."""
    for trial in latest(study).values():
        if trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker:
            epochs, storage = trial.last_step or 0, study._storage
            if trial.user_attrs.get("died_after") != epochs:
                storage.set_trial_user_attr(trial._trial_id, "died_after", epochs)
                set_waiting(study, trial)
            else:
                error = f"its process died twice (exit code {exit_code})"
                params = (
                    search.params(trial.params)
                    if trial.params.keys() == search.space.keys()
                    else {}
                )
                storage.set_trial_user_attr(trial._trial_id, "line", new_line(trial, params, error))
                study.tell(trial.number, state=TrialState.FAIL)
            return True
    return False


def take_over(
    study: optuna.Study, running: list[FrozenTrial], first_seen: dict, grace: int
) -> None:
    """Queue the trials again of machines that have died. Optuna hears of them by their heartbeats, but not of one that
    died before the first; such a trial has no `worker` yet."""
    optuna.storages.fail_stale_trials(study)
    for trial in running:
        since = first_seen.setdefault(trial.number, time.monotonic())
        if "worker" not in trial.user_attrs and time.monotonic() - since > grace:
            with contextlib.suppress(
                UpdateFinishedTrialError, ValueError
            ):  # by another machine, at the same moment
                study.tell(trial.number, state=TrialState.FAIL)
                queue_again(study, trial)


class TrialBar(tqdm):
    """A bar over the trials, which also moves while they run."""

    def __init__(self, search: Search, total: int, quiet: bool):
        form = "{desc} |{bar}| {elapsed}<{remaining}{postfix}"
        super().__init__(
            total=total, bar_format=form, smoothing=0, leave=False, disable=quiet or None
        )
        self.search, self.known = search, False

    def show(self, ended: int, total: int, running: list[FrozenTrial], lines: list[dict]) -> None:
        """So many of `total` trials have ended, with these lines, and these are running here."""
        epochs = [trial.last_step or 0 for trial in running]
        self.n = ended + (sum(epochs) / self.search.epochs if self.search.epochs else 0)
        if not self.known:  # the time left follows from what is done in this session
            self.initial, self.known = self.n, True
        self.set_description_str(f"{ended} of {total} trials", refresh=False)
        parts = (
            [f"epoch {' and '.join(map(str, epochs))} of {self.search.epochs or '?'}"]
            if epochs
            else []
        )
        finished = [line for line in lines if line["status"] == "finished"]
        if finished:
            best = min(finished, key=self.search.loss)
            parts.append(f"best {as_text(self.search.metric, best[self.search.metric])}")
        self.set_postfix_str(", ".join(parts))


def how_to_go_on(directory: Path, args: argparse.Namespace) -> str:
    """The command that continues a sweep."""
    storage = ["--storage", without_password(args.storage)] if args.storage else []
    return shlex.join(
        ["python", records.shown(__file__), "--resume", records.shown(directory), *storage]
    )


def as_text(name: str, value) -> str:
    """A value for the screen, with accuracies as percentages."""
    if isinstance(value, float):
        return f"{value:{ {'val_acc': '.2%', 'val_loss': '.4f', 'std': '.4f', 'seconds': '.1f'}.get(name, '.4g') }}"
    return "-" if value is None else str(value)


def line_as_text(line: dict, search: Search) -> str:
    """A line of trials.jsonl for the screen."""
    params = " ".join(f"{name}={value}" for name, value in line["params"].items())
    end = f"{line['status']} after {line['epochs']} epoch{'s' * (line['epochs'] != 1)}"
    value = f"{search.metric} {as_text(search.metric, line[search.metric])}"
    return f"trial {line['trial']}  {end}  {value}  {params}  {line['error'] or ''}".rstrip()


# ------------------------ Weights & Biases as the engine ------------------------
def choose_engine(args: argparse.Namespace, search: Search) -> str:
    """W&B drives the search if this is `wandb`, else Optuna. Where `auto` chooses, it is printed why. UsageError,
    RunError."""
    engine = "wandb" if args.sweep_id else args.engine
    if engine == "auto" and search.method == "bayes" and not args.storage:
        online = os.environ.get("WANDB_MODE", "online") == "online"
        key = online and importlib.util.find_spec("wandb") and records.has_wandb_key(quiet=True)
        engine = "wandb" if key else "local"
        reason = (
            f"{'an' if key else 'no'} API key is configured"
            if online
            else "WANDB_MODE is not online"
        )
        records.say(
            f"engine: {'W&B' if key else 'local, Optuna'} ({reason}; --engine chooses)", args.quiet
        )
    if engine == "wandb":
        reach_wandb(args)
        if args.storage or search.seeds > 1:
            raise UsageError("--storage and --seeds go with --engine local")
    return engine


def reach_wandb(args: argparse.Namespace) -> None:
    """UsageError without a key, RunError where W&B's server does not answer soon: its client would try for minutes."""
    records.check_wandb("online", args.quiet)
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


def wandb_config(args: argparse.Namespace) -> dict:
    """The configuration of the sweep --sweep-id. UsageError, RunError."""
    reach_wandb(args)
    import wandb

    path = args.sweep_id if "/" in args.sweep_id else f"{args.wandb_project}/{args.sweep_id}"
    try:
        return wandb.Api().sweep(path).config
    except (ValueError, wandb.errors.Error) as error:
        raise UsageError(str(error)) from error


def run_wandb(
    study: optuna.Study, search: Search, directory: Path, args: argparse.Namespace
) -> str | None:
    """Run the trials that a W&B sweep gives out, in this process; each becomes a trial of the study as well.

    Returns the name of the signal that stopped it, or None. RunError where all trials failed.
    """
    import wandb
    import yaml

    project = args.wandb_project
    common.search_directory = directory
    os.environ.setdefault("WANDB_DIR", str(directory))
    for given in study.get_trials(deepcopy=False):  # interrupted; W&B gives no trial out twice
        if not given.state.is_finished():
            study._storage.set_trial_user_attr(given._trial_id, "superfluous", True)
            study.tell(given.number, state=TrialState.FAIL)
    sweep_id = args.sweep_id or study.user_attrs.get("sweep_id")
    if not sweep_id:
        # The best so far is what W&B is to compare: `fit` logs it.
        config = {
            "program": search.script,
            "method": search.method,
            "run_cap": search.count,
            "parameters": search.space,
            "metric": {"name": f"best_{search.metric}", "goal": METRICS[search.metric]},
            "command": ["${env}", "${interpreter}", "${program}", *search.flags, "${args}"],
        }
        if search.early_terminate:
            config["early_terminate"] = search.early_terminate
        sweep_id = wandb.sweep(config, project=project)
    study.set_user_attr("sweep_id", sweep_id)
    records.say(
        f"W&B sweep {sweep_id}; another machine joins with --sweep-id {sweep_id}", args.quiet
    )
    flags = "--wandb", "online", "--wandb-project", project
    objective = Objective(replace(search, early_terminate=None), directory, "", *flags)
    stopped = objective.stopped

    def trial():
        # The agent leaves the parameters of the run in this file.
        content = yaml.safe_load(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text())
        params = {
            name: entry["value"] for name, entry in content.items() if isinstance(entry, dict)
        }
        study.enqueue_trial(params, user_attrs={"trial": len(study.get_trials(deepcopy=False))})
        try:
            with contextlib.suppress(Interrupted):
                study.optimize(objective, n_trials=1)
        finally:
            for line in write_lines(study, directory, "")[-1:] if not stopped else ():
                records.say(line_as_text(line, search), args.quiet)

    def stop(number, frame):
        stopped.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    left = search.count - len(latest(study))
    if left > 0:
        with contextlib.suppress(KeyboardInterrupt), records.interruptible(stop):
            wandb.agent(sweep_id, function=trial, project=project, count=left)
    ended = write_lines(study, directory, "")
    if ended and all(line["status"] == "failed" for line in ended):
        raise RunError(f"all {len(ended)} trials failed, the last with: {ended[-1]['error']}")
    return stopped[0] if stopped else None


# ------------------------ The report ------------------------
def report(
    study: optuna.Study, search: Search, directory: Path, machine: str, complete: bool, quiet: bool
) -> dict:
    """Print and write the leaderboard, the pictures and the best configuration; test the winner of a complete sweep."""

    def place(line):
        rank = {"finished": 0, "pruned": 1}.get(line["status"], 2)
        survived = -line["epochs"] if rank == 1 else 0
        return rank, survived, search.loss(line) if line[search.metric] is not None else math.inf

    import pandas

    # Best first; then the pruned ones, by the epochs that they survived; then those without a result.
    ended = sorted(write_lines(study, directory, machine), key=place)
    result = {"directory": str(directory), "trials": ended, "best": None}
    if not ended:
        return result
    columns = [
        "trial",
        "run",
        "status",
        "val_loss",
        "val_acc",
        *["std"] * (search.seeds > 1),
        "epochs",
        "seconds",
    ]
    names = {name: name if name not in columns else f"--{name}" for name in search.space}
    rows = []
    for line in ended:
        params = {names[name]: line["params"].get(name) for name in names}
        rows.append({column: line.get(column) for column in columns} | params)
    cells = [[as_text(name, value) for name, value in row.items()] for row in rows]
    tables = {"Trials, best first": pandas.DataFrame(cells, columns=list(rows[0]))}
    records.say("\n".join(evaluate.as_lines(tables)).rstrip("\n"), quiet)
    records.write_atomically(directory / "leaderboard.csv", evaluate.as_csv(rows).encode())
    pictures = draw_sweep(study, search, ended, directory)
    for name, picture in pictures.items():
        records.write_atomically(directory / f"{name}.png", picture)
    title = f"{directory.name}: {len(ended)} trials"
    about = f"{search.method} search of {search.script}; {search.metric} decides"
    content = evaluate.as_page(title, [about], tables, pictures)
    records.write_atomically(directory / "report.html", content)
    winner, link = ended[0], directory / "best"
    link.unlink(missing_ok=True)
    if winner["status"] != "finished":
        return result
    text = as_text(search.metric, winner[search.metric])
    command = as_command(
        search, winner["params"], int(winner["run"].partition("-seed-")[2] or search.seed)
    )
    records.say(f"best: {winner['run']}, {search.metric} {text}\n  {command}", quiet)
    if (directory / winner["run"]).is_dir():
        link.symlink_to(winner["run"])
        if complete and (link / "best.pt").exists():
            test_winner(directory, winner["run"], quiet)
    return {**result, "best": winner}


def test_winner(directory: Path, run: str, quiet: bool) -> None:
    """Test the weights of the winner's best epoch, and say for which trials the test set has been read."""
    metrics = {
        path.parent.name: records.read_json(path)
        for path in sorted(directory.glob("trial-*/metrics.json"))
    }
    before = [name for name, content in metrics.items() if content["split"] == "test"]
    if run not in before:
        try:
            evaluate.main([str(directory / run), "--quiet"])
        except (UsageError, RunError) as error:
            records.say(f"  not tested: {error}", quiet)
            return
    content = records.read_json(directory / run / "metrics.json")
    accuracy = content["tta"]["accuracy"] if content.get("tta") else content["accuracy"]
    others = ", ".join(name for name in before if name != run)
    often = f"which was read before, for {others}" if others else "read once, for this trial alone"
    records.say(f"  accuracy {accuracy:.2%} on the test set, {often}", quiet)


def draw_sweep(study: optuna.Study, search: Search, ended: list[dict], directory: Path) -> dict:
    """The pictures of a sweep, {name: PNG}: Optuna's, but for parallel coordinates, curves and a grid of two."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as optunas

    shown = [line for line in ended if line["status"] in ("finished", "pruned")]
    finished = [line for line in shown if line["status"] == "finished"]
    varied = [
        name for name in search.space if len({str(line["params"][name]) for line in finished}) > 1
    ]
    pictures = {"curves": evaluate.render(draw_curves(search, ended, directory))}
    if shown:
        pictures["parallel"] = evaluate.render(draw_parallel(search, shown))
    if shown and search.method == "grid" and len(search.space) == 2:
        pictures["grid"] = evaluate.render(draw_grid(search, shown))
    drawings = {"timeline": lambda: optunas.plot_timeline(study)}
    if finished:
        drawings["history"] = lambda: optunas.plot_optimization_history(
            study, target_name=search.metric
        )
    if varied:
        drawings["slices"] = lambda: optunas.plot_slice(study, varied, target_name=search.metric)
    if len(varied) > 1 and len(finished) >= 8:
        # PED-ANOVA (S. Watanabe et al., 2023), the best quarter against all: the default tenth is a trial or two.
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=0.25, region_quantile=1.0
        )
        drawings["importance"] = lambda: optunas.plot_param_importances(
            study, evaluator=evaluator, params=varied
        )
    for name, draw in drawings.items():
        # They set a style, and write powers of ten.
        with matplotlib.rc_context({"text.parse_math": True, "savefig.bbox": "tight"}):
            draw()
            pictures[name] = evaluate.render(pyplot.gcf())
            pyplot.close()
    return pictures


# The ground of a number that stands on lines or colours.
LABEL = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}


def draw_parallel(search: Search, shown: list[dict]):
    """Parallel coordinates: a line a trial, through its parameters to its metric, which gives the colour."""
    import matplotlib

    values, last = [line[search.metric] for line in shown], len(search.space)
    scale, colours = (
        matplotlib.colors.Normalize(min(values), max(values)),
        evaluate.colormap(search.colours),
    )
    figure = evaluate.new_figure(3 + 2 * last, 5.5, f"{len(shown)} trials; the best is thick")
    axis, places = figure.subplots(), {line["trial"]: [] for line in shown}
    for index, parameter in enumerate(search.parameters):
        ticks, height = scale_of(parameter.distribution)
        axis.axvline(index, color="black", linewidth=1)
        for tick in ticks:
            text = f"{tick:.3g}" if isinstance(tick, float) else str(tick)
            axis.annotate(
                text,
                (index, height(tick)),
                (4, 0),
                textcoords="offset points",
                va="center",
                bbox=LABEL,
            )
        for line in shown:
            places[line["trial"]].append(height(line["params"][parameter.name]))
    for line in reversed(shown):
        look = (
            {"linewidth": 4, "zorder": 2.5} if line is shown[0] else {"linewidth": 1, "alpha": 0.7}
        )
        end = scale(line[search.metric])
        axis.plot([*places[line["trial"]], end], color=colours(end), **look)
    names = [
        f"{p.name} (log)" if getattr(p.distribution, "log", False) else p.name
        for p in search.parameters
    ]
    axis.set(
        xticks=range(last + 1), xticklabels=[*names, search.metric], yticks=[], xlim=(-0.15, last)
    )
    axis.spines[:].set_visible(False)
    figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, colours), ax=axis, label=search.metric, pad=0
    )
    return figure


def scale_of(d: BaseDistribution) -> tuple[list, Callable]:
    """The ticks of an axis for the values of a distribution, and a function from a value to its place, 0 to 1."""
    if isinstance(d, CategoricalDistribution):
        return d.choices, lambda value: d.choices.index(value) / max(1, len(d.choices) - 1)
    low, high, quarters = float(d.low), float(d.high), (0, 0.25, 0.5, 0.75, 1)
    if d.log:
        return [
            low * (high / low) ** q for q in quarters
        ], lambda value: math.log(value / low) / math.log(high / low)
    return [
        low + (high - low) * q for q in quarters
    ], lambda value: (value - low) / ((high - low) or 1)


def draw_grid(search: Search, shown: list[dict]):
    """A grid of two parameters as a heatmap."""
    down, across = (parameter.values() for parameter in search.parameters)
    cells = torch.full((len(down), len(across)), math.nan)
    figure = evaluate.new_figure(2.5 + len(across), 2 + 0.7 * len(down), search.metric)
    axis = figure.subplots()
    for line in shown:
        (row, column), value = line["params"].values(), line[search.metric]
        row, column = down.index(row), across.index(column)
        cells[row, column] = value
        axis.text(column, row, as_text(search.metric, value), ha="center", va="center", bbox=LABEL)
    image = axis.imshow(cells.numpy(), cmap=evaluate.colormap(search.colours), aspect="auto")
    figure.colorbar(image, ax=axis, label=search.metric)
    axis.set_xticks(range(len(across)), map(str, across))
    axis.set_yticks(range(len(down)), map(str, down))
    axis.set(ylabel=search.parameters[0].name, xlabel=search.parameters[1].name)
    return figure


def draw_curves(search: Search, ended: list[dict], directory: Path):
    """Validation loss and accuracy of all trials, epoch by epoch; the end of a pruned or diverged one is marked."""
    figure = evaluate.new_figure(11, 4.4, "all trials; the best in colour")
    axes = evaluate.curves_axes(figure)
    for index, line in enumerate(ended):
        path = directory / line["run"] / "log.jsonl"
        history = (
            records.read_log(path.parent) if path.exists() else []
        )  # it may be on another machine
        look = {"color": "silver", "linewidth": 1}
        if index == 0 and line["status"] == "finished":
            look = {"color": evaluate.ORANGE, "linewidth": 2.5, "zorder": 3}
            figure.suptitle(f"all trials; {line['run']}, the best, in colour")
        for axis, name in zip(axes, METRICS, strict=True):
            axis.plot([row["epoch"] for row in history], [row[name] for row in history], **look)
            if line["status"] != "finished" and history:
                axis.plot(history[-1]["epoch"], history[-1][name], "x", color="black", markersize=5)
    return figure


# ------------------------ Main ------------------------
def main(argv: list[str] | None = None) -> dict:
    """Run or continue a search, and report; return its directory, the lines of trials.jsonl and that of the best."""
    if not records.fcntl:
        raise UsageError(
            "sweep.py needs the file locks of Linux or macOS; on Windows it runs in WSL"
        )
    args, search = parse_arguments(sys.argv[1:] if argv is None else list(argv))
    if args.dry_run:
        dry_run(search, args.quiet)
        return {}
    engine = choose_engine(args, search) if search else None
    own_name = f"sweep-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    directory = args.resume or args.runs_dir / (args.name or own_name)
    check_directory(directory, args)
    machine = f"{socket.gethostname()}:{directory}" if args.storage else ""
    storage = open_storage(directory, args.storage, args.grace) if args.storage else None
    listing = check_data(search, directory, args.quiet) if search else None
    directory.mkdir(parents=True, exist_ok=True)
    with records.locked(directory / ".lock"):
        if listing:
            records.write_atomically(directory / "data.csv", listing)
        with records.locked(directory / ".workers.lock", wait=True):
            pass  # the workers of a sweep that was killed have ended
        storage = storage or open_storage(directory, None, args.grace)
        study, search = open_search(storage, directory, search, args)
        check_listing(study, directory)
        try:
            if engine == "wandb" or "sweep_id" in study.user_attrs:
                stopped = run_wandb(study, search, directory, args)
                complete = not stopped
            else:
                queue(study, search, machine, args)
                stopped = run_trials(study, search, directory, machine, args)
                complete = all(trial.state.is_finished() for trial in latest(study).values())
            result = report(study, search, directory, machine, complete, args.quiet)
        except StorageInternalError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            go_on = how_to_go_on(directory, args)
            raise RunError(
                f"--storage {without_password(args.storage)}: {reason}; go on with: {go_on}"
            ) from error
    records.say(
        f"{records.shown(directory)}: {len(result['trials'])} trials have ended", args.quiet
    )
    for path in directory.glob(".pixels-*"):
        path.unlink()
    if complete and not result["best"]:
        where = records.shown(directory / "trials.jsonl")
        raise RunError(f"{records.shown(directory)}: no trial finished; the errors are in {where}")
    status = "interrupted" if stopped else "finished"
    return {**result, "status": status, "error": stopped, "go_on": how_to_go_on(directory, args)}


def check_directory(directory: Path, args: argparse.Namespace) -> None:
    """UsageError where `directory` is not one for this sweep."""
    shown = records.shown(directory)
    if args.resume and not directory.is_dir():
        raise UsageError(f"--resume {shown}: there is no such directory")
    if (directory / "sweep.json").exists():
        raise UsageError(f"{shown} is a sweep of the first version, which this one cannot continue")
    if not args.storage and not (directory / "study.journal").exists():
        if args.resume:
            raise UsageError(
                f"--resume {shown}: it has no study.journal; for a shared sweep give its --storage again"
            )
        if any(directory.glob("[!.]*")):
            raise UsageError(
                f"--name {args.name}: {shown} exists and is not a sweep of one machine"
            )


def open_search(
    storage, directory: Path, search: Search | None, args: argparse.Namespace
) -> tuple[optuna.Study, Search]:
    """The study in `storage`, made where it is not there, and the Search that it holds. UsageError where that is not
    the one that is asked for."""
    shown, names = records.shown(directory), optuna.get_all_study_names(storage)
    name = directory.name if args.storage else next(iter(names), directory.name)
    if search:
        with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
            if name not in names and any(directory.glob("trial-*")):
                raise UsageError(f"{shown} has trials of another search; take another --name")
            optuna.create_study(storage=storage, study_name=name, direction=METRICS[search.metric])
    study = optuna.load_study(study_name=name, storage=storage) if search or name in names else None
    if search and "search" not in study.user_attrs:
        study.set_user_attr("search", asdict(search))
    if not study or "search" not in study.user_attrs:
        raise UsageError(
            f"--resume {shown}: it was stopped before it began; start it again with --name {name}"
        )
    before = study.user_attrs["search"]
    for key, value in asdict(search).items() if search else ():
        if key not in ("count", "threads") and value != before[key]:
            raise UsageError(
                f"{shown} is another search: its {key} is {before[key]}; take another --name"
            )
    stored = Search(**before)
    stored.count = int(
        min(max(stored.count, search.count if search else args.count or 0), stored.size())
    )
    if args.threads or args.storage:
        stored.threads = args.threads or max(1, torch.get_num_threads() // args.jobs)
    study.set_user_attr("search", asdict(stored))
    return open_study(storage, name)


def queue(study: optuna.Study, search: Search, machine: str, args: argparse.Namespace) -> None:
    """Let what was interrupted here wait again, and queue the trials that are not in the study: all of a new one."""
    give_back(study, machine)
    deadline = time.monotonic() + args.grace
    if "maker" not in study.user_attrs:
        study.set_user_attr("maker", machine)
    while (
        "queued" not in study.user_attrs
        and study.user_attrs["maker"] != machine
        and time.monotonic() < deadline
    ):
        time.sleep(1)  # the machine that made the study is at it
    known = latest(study)
    for number, params in enumerate(search.configurations()):
        if number not in known:
            study.enqueue_trial(params, user_attrs={"trial": number})
    study.set_user_attr("queued", True)
    if args.retry_failed:
        for trial in latest(study).values():
            if (
                trial.state == TrialState.FAIL
                and trial.user_attrs.get("line", {}).get("status") != "diverged"
            ):
                queue_again(study, trial)


def dry_run(search: Search, quiet: bool) -> None:
    """Print the command line of each trial; of a Bayesian search the space, since each trial follows from the last."""
    if search.method == "bayes":
        records.say(
            f"{search.count} trials of {search.script}, proposed one after the other from", quiet
        )
        for name, content in search.space.items():
            records.say(
                f"  {name}: {', '.join(f'{key} {value}' for key, value in content.items())}", quiet
            )
        return
    for number, params in enumerate(search.configurations()):
        for seed in range(search.seed, search.seed + search.seeds):
            records.say(f"trial {number:4}  {as_command(search, params, seed)}", quiet)


if __name__ == "__main__":
    sys.exit(common.command_line(main))
