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
import functools
import hashlib
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
import statistics
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import common

# Until the rest is imported, Ctrl-C ends the program without a traceback.
interrupt_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)

import evaluate
import records
from records import RunError, UsageError, say, shown

import optuna
import torch
from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

signal.signal(signal.SIGINT, interrupt_handler)
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", ExperimentalWarning)

METRICS = {"val_loss": "minimize", "val_acc": "maximize"}

# The searches of those who name no parameter: those of the tutorials.
CIFAR_FLAGS = ["--model", "confignet", "--epochs", "10", "--lr", "0.001"]
CIFAR_FLAGS += ["--batch-size", "512", "--tolerance", "3"]
CIFAR = "train_cifar.py", ["c1=48,96", "c2=96,192", "l1=256,512"], CIFAR_FLAGS
MNIST = "train_mnist.py", ["lr=log:1e-4..1e-1", "batch_size=32,64,128,256"], []
DEFAULT_SEARCH = {"grid": CIFAR, "random": MNIST, "bayes": MNIST}


# ------------------------ Options ------------------------
def build_parser() -> common.ArgumentParser:
    """The flags of this script."""
    usage = "sweep.py [flags] [-- FLAGS]"
    parser = common.ArgumentParser(prog="sweep.py", description=__doc__, usage=usage)
    parser.add_argument("--bands", type=json.loads, help=SUPPRESS)  # of a config's early_terminate
    count, whole, path = common.number(int, 1), common.number(int, 0), common.absolute_path

    def flag(usage, kind, text, default=None):
        name, _, metavar = usage.partition(" ")
        takes = {"type": kind, "metavar": metavar} if metavar else {"choices": kind}
        if kind is bool:
            takes, default = {"action": "store_true"}, False
        group.add_argument(name, help=text, default=default, **takes)

    group = parser.add_argument_group("the search")
    flag("--method", DEFAULT_SEARCH, "grid: all combinations; bayes: Optuna proposes")
    flag("--script FILE", str, "training script: one with main(argv, on_epoch)")
    group.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="48,96 or 0.0..0.5 or int:64..512 or log:1e-4..1e-1; once for each parameter",
    )
    flag("--config FILE", Path, "YAML or JSON in the schema of W&B's sweeps")
    flag(
        "--metric NAME", str, "val_loss or val_acc; a trial has that of its best epoch", "val_loss"
    )
    flag("--goal", ("minimize", "maximize"), "for a metric of a script of your own")
    flag("--target VALUE", common.number(float), "end the search when a trial is so good")
    flag("--count N", count, "configurations in all (a grid: every combination; else 20)")
    flag("--seed N", whole, "of the parameters that are drawn, and of every training", 42)
    flag(
        "--seeds K",
        number_of_seeds,
        "train each configuration with K seeds, or with these, as in 50,60; their mean decides",
        1,
    )
    flag(
        "--prune",
        bool,
        "stop bad trials: after a ninth and a third of their epochs the best third goes on",
    )
    flag("--eta N", common.number(int, 2), "with --prune: one trial in N goes on", 3)

    group = parser.add_argument_group("running it")
    flag("--jobs N", count, "trials at a time, each in a process; several GPUs are shared out", 1)
    flag("--threads N", count, "CPU threads of a trial (cores / --jobs): other last digits")
    flag("--max-failures N", count, "stop after so many failed trials in a row", 3)
    flag("--runs-dir DIR", path, "where the sweep's folder is", records.HERE / "runs")
    flag("--name NAME", common.run_name, "of the sweep; one that exists is continued")
    flag("--resume SWEEP", path, "continue the sweep in this folder, or make its report anew")
    flag("--retry-failed", bool, "also run the trials again that failed")
    flag("--dry-run", bool, "print the trials, run none")
    flag("--quiet", bool, "print only errors")

    group = parser.add_argument_group("many machines, and Weights & Biases")
    flag("--storage URL", str, "share the search --name: postgresql://user@host/database")
    flag(
        "--grace SECONDS",
        common.number(int, 5),
        "with --storage: a machine that is silent for so long is taken for dead",
        120,
    )
    engines = "auto", "local", "wandb"
    flag("--engine", engines, "auto: W&B for bayes where an API key is configured", "auto")
    flag("--sweep-id ID", str, "take trials from this W&B sweep, with its script and its flags")
    flag("--wandb-project NAME", str, "where W&B files the sweep", "image-classifiers")
    return parser


def number_of_seeds(text: str) -> int | list[int]:
    """An argparse `type`: how many seeds, or which, as in 50,60."""
    seeds = [common.number(int, 0)(word) for word in text.split(",")]
    return seeds if len(seeds) > 1 else common.number(int, 1)(text)


# What may be given with --resume. What the sweep gives to a trial. What names a place of data.
RUNNING = {"--resume", "--count", "--jobs", "--threads", "--max-failures", "--retry-failed"}
RUNNING |= {"--quiet", "--storage", "--grace"}
RESERVED = {"--runs-dir", "--run-name", "--resume", "--stop-after", "--quiet", "--no-quiet"}
RESERVED |= {"--test", "--no-test", "--seed"}
PLACES = {"--dataset", "--data-dir", "--weights"}


def parse_arguments(argv: list[str]) -> "Search":
    """The search that is asked for; with --resume the study has most of it. UsageError."""
    parser, cut = build_parser(), argv.index("--") if "--" in argv else len(argv)
    typed, flags = argv[:cut], argv[cut + 1 :]
    given = names_of(typed)
    search = parser.parse_args(typed, Search(given=given))
    search.places, search.flags = split_places(flags)
    if "--grace" in given and not search.storage:
        raise UsageError("--grace has no effect without --storage")
    if search.resume:
        for word in given + names_of(flags):
            if word not in RUNNING | PLACES:
                raise UsageError(f"--resume takes the search from its folder: leave out {word}")
        return search

    # A configuration is read as flags; what is on the command line comes after them, and wins.
    if search.config or search.sweep_id:
        source = search.config or f"--sweep-id {search.sweep_id}"
        try:
            config = load_yaml(search.config) if search.config else wandb_config(search)
            words, more_flags = read_config(config, search.config)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
        search = parser.parse_args(words + typed, Search(given=given))
        search.places, search.flags = split_places(more_flags + flags)
    complete(search)
    return search


def names_of(words: list[str]) -> list[str]:
    """The flags among the words of a command line, without their values."""
    return [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]


def split_places(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a trial: those that name a place, as seen from anywhere, and the others."""
    parser = common.ArgumentParser(add_help=False, argument_default=SUPPRESS)
    for name in PLACES:
        parser.add_argument(name, type=place)
    places, others = parser.parse_known_args(flags)
    return [f"{common.as_flag(name)}={value}" for name, value in vars(places).items()], others


def place(text: str) -> str:
    """The absolute path of a file or folder that is here; any other text as it is."""
    path = Path(text).expanduser().absolute()
    return str(path) if text and path.exists() else text


class Search(Namespace):
    """The flags of a search, and what follows from them. The study keeps those in KEPT."""

    SAME = ("script", "method", "param", "flags", "metric", "goal", "target", "seed", "seeds")
    SAME += ("eta", "bands")
    KEPT = (*SAME, "places", "epochs", "has_idle", "count", "threads")
    epochs = 0  # of a trial at most, if the script tells
    has_idle = False  # whether a parameter has no effect in some trials

    @property
    def is_ours(self) -> bool:
        """Whether the script is one of this repository."""
        return Path(self.script).parent == records.HERE

    @functools.cached_property
    def parameters(self) -> dict[str, "Parameter"]:
        """What is searched."""
        return dict(map(parse_parameter, self.param))

    @property
    def distributions(self) -> dict:
        """The same as Optuna knows it."""
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    @property
    def size(self) -> float:
        """How many configurations there are."""
        values = [parameter.values for parameter in self.parameters.values()]
        return math.prod(map(len, values)) if all(values) else math.inf

    @property
    def total(self) -> int:
        """The number of trials."""
        return self.count * len(self.seeds)

    @property
    def sign(self) -> int:
        """1 where the lowest metric is the best, -1 where the highest is."""
        return 1 if self.goal == "minimize" else -1

    def loss(self, line: dict) -> float:
        """What ranks a line of trials.jsonl, the lowest first: the mean of its seeds, if it has
        one, or else its metric."""
        value = line.get("mean", line[self.metric])
        return math.inf if value is None else self.sign * value

    def corners(self) -> list[dict]:
        """Configurations with each end of a range, and each word of a list."""
        first = {name: parameter.ends[0] for name, parameter in self.parameters.items()}
        return [{**first, name: end} for name, p in self.parameters.items() for end in p.ends]

    def combinations(self) -> Iterator[dict]:
        """All configurations, in order; the last parameter changes first."""
        for values in itertools.product(*(p.values or [] for p in self.parameters.values())):
            yield dict(zip(self.parameters, values, strict=True))

    def effective(self, params: dict) -> dict:
        """The parameters without those that have no effect beside the others."""
        return parse_trial(self, params)[1] if self.has_idle else params

    def trial(self, number: int, params: dict) -> FrozenTrial:
        """A trial that is to wait in the study."""
        return optuna.create_trial(
            state=TrialState.WAITING,
            params=params,
            distributions=self.distributions,
            user_attrs={"trial": number, "params": self.effective(params)},
        )

    def propose(self, trials: list[FrozenTrial]) -> dict:
        """The parameters of the trial after these: they follow from --seed and the results."""
        # The same once more, with the next seed; or the next of a grid.
        number = len(trials)
        if number % len(self.seeds):
            return trials[-1].params
        known = [trial.user_attrs["params"] for trial in trials]
        new = (params for params in self.combinations() if self.effective(params) not in known)
        if self.method == "grid":
            return next(new)

        # A Gaussian process with few random trials before it finds better points sooner; its cost
        # grows with the cube of the trials, and past 200 the tree-structured estimator takes over.
        seed = common.random_seed(self.seed, "proposals", number) % 2**32
        study = optuna.create_study(sampler=RandomSampler(seed=seed))
        if self.method == "bayes":
            gaussian = GPSampler(seed=seed, n_startup_trials=5 * len(self.seeds))
            study.sampler = gaussian if number <= 200 else TPESampler(seed=seed)
            study.add_trials(self.results(trials))

        # Nothing runs twice, not even in a small space.
        for _ in range(10):
            drawn = study.ask(self.distributions).params
            params = {name: p.tidy(drawn[name]) for name, p in self.parameters.items()}
            if self.effective(params) not in known:
                return params
        return next(new, params)

    def results(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """What a sampler learns from. The value of a trial is its rank: a loss that has exploded
        would hide the differences of all others."""
        losses = {
            trial.number: self.sign * trial.value for trial in trials if trial.value is not None
        }
        order = sorted(losses.values())
        return [
            optuna.create_trial(
                state=trial.state,
                value=order.index(losses[trial.number]) if trial.number in losses else None,
                params=trial.params,
                distributions=trial.distributions,
            )
            for trial in trials
            if trial.state in (TrialState.COMPLETE, TrialState.RUNNING)
        ]

    def prunes(self, trials: list[FrozenTrial], number: int, epoch: int) -> bool:
        """Whether a trial is to end at this epoch: at a band it goes on if it is in the best 1/eta,
        rounded up, of the trials that have reached that band, each by its best epoch until then."""
        if epoch == self.epochs or epoch not in (self.bands or ()):
            return False

        def best(trial):
            reports = trial.intermediate_values.items()
            return min(self.sign * value for at, value in reports if at <= epoch)

        reached = [trial for trial in trials if epoch in trial.intermediate_values]
        better = sum(best(trial) < best(trials[number]) for trial in reached)
        return better >= math.ceil(len(reached) / self.eta)

    def words(self, params: dict, number: int) -> list[str]:
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
        return shlex.join(["python", shown(self.script), *self.words(params, number)])


def complete(search: Search) -> None:
    """Fill in what was not given, and refuse what makes no sense. UsageError."""
    # The script, and what is searched.
    if not search.method:
        raise UsageError("--method grid, random or bayes is needed")
    default, space, flags = DEFAULT_SEARCH[search.method]
    search.script = str(find_script(search.script or default))
    if not search.param:
        if search.script != str(records.HERE / default):
            needs = "needs its own search: --param NAME=SPEC or --config FILE"
            raise UsageError(f"--script {search.script} {needs}")
        search.param, search.flags = space, flags + search.flags
    for at, text in enumerate(search.param):
        name, _, spec = text.partition("=")
        if common.as_flag(name) in PLACES:
            values = map(str, parse_parameter(text)[1].values)
            search.param[at] = f"{name}={json.dumps({'values': [*map(place, values)]})}"
        if search.is_ours and common.as_flag(name) == "--learning-rate":
            search.param[at] = f"lr={spec}"
            say(f"{name} is read as lr", search.quiet)

    # The seeds, the metric, the trials, and how many there are.
    if not isinstance(search.seeds, list):
        search.seeds = [*range(search.seed, search.seed + search.seeds)]
    check_flags(search)
    check_metric(search)
    check_trials(search)
    grid = search.method == "grid"
    search.count = int(min(search.count or (math.inf if grid else 20), search.size))
    if grid and search.has_idle:
        different = {str(search.effective(params)) for params in search.combinations()}
        search.count = min(search.count, len(different))


def check_flags(search: Search) -> None:
    """UsageError where a flag contradicts another, or has no effect."""
    searched, fixed = (
        [common.as_flag(name) for name in search.parameters],
        names_of([*search.flags, *search.places]),
    )
    for word in searched + fixed:
        if word in RESERVED:
            hint = "--seed and --seeds of sweep.py choose seeds"
            raise UsageError(f"{word} is set by the sweep for every trial; {hint}")
        if word in fixed and word.replace("--no-", "--") in searched:
            raise UsageError(f"{word} is searched: leave it out of the flags after --")
    prunes = search.prune or search.bands
    for is_wrong, text in (
        (len(searched) < len(search.param), "a parameter is there twice"),
        ("--eta" in search.given and not prunes, "--eta has no effect without --prune"),
        (prunes and len(search.seeds) > 1, "pruning and --seeds: one at a time"),
        (search.storage and not search.name, "--storage needs --name NAME, to find the search by"),
        (search.method == "grid" and not search.size < math.inf, "a grid needs a list of values"),
    ):
        if is_wrong:
            raise UsageError(text)


def check_metric(search: Search) -> None:
    """UsageError where it is not known which way the metric is better."""
    metric, asked = search.metric, search.goal
    search.goal = METRICS.get(metric, None if search.is_ours else asked)
    if not search.goal:
        known = "val_loss, val_acc"
        known = f"expected {known}" if search.is_ours else "it needs --goal minimize or maximize"
        raise UsageError(f"--metric {metric}: {known}")
    if asked not in (None, search.goal):
        raise UsageError(f"the metric {metric} is not known with the goal {asked}")


def check_trials(search: Search) -> None:
    """Ask the script about the ends of each parameter, or each of its words. UsageError."""
    # A parameter is left out where it has no effect; somewhere it needs to have one.
    trials, kept = [], set()
    for params in search.corners():
        args, effective = parse_trial(search, params)
        search.has_idle |= effective.keys() != params.keys()
        trials.append(args)
        kept |= effective.keys()
    for name in search.parameters.keys() - kept:
        raise UsageError(f"--{name} has no effect in any trial")
    if search.has_idle:
        say("a parameter is left out of the trials in which it has no effect", search.quiet)

    # Losses are compared where the rule for the comparison of runs allows it.
    for args in trials if search.is_ours and search.metric == "val_loss" else ():
        one, other = as_record(trials[0]), as_record(args)
        reason = common.why_not_comparable(one, other, search.metric)
        if reason:
            raise UsageError(f"{reason}: they have no common val_loss; use --metric val_acc")

    # The epochs at which trials are compared.
    epochs = {args.epochs for args in trials}
    search.epochs = max(epochs)
    if search.prune:
        if search.bands or len(epochs) > 1 or search.epochs < search.eta:
            need = f"one number of epochs, at least --eta {search.eta}, and no early_terminate"
            raise UsageError(f"--prune needs {need}")
        bands = {search.epochs // search.eta**power for power in range(1, 13)}
        search.bands = sorted(bands - {0})


# ------------------------ A configuration in W&B's schema ------------------------
AS_FLAGS = {"program": "--script", "method": "--method", "run_cap": "--count", "name": "--name"}
AS_FLAGS |= {"project": "--wandb-project"}
KEYS = [*AS_FLAGS, "parameters", "metric", "early_terminate", "command", "description", "entity"]


def load_yaml(path: Path) -> Any:
    """The content of a YAML or JSON file. UsageError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, where YAML 1.1 wants a point in it."""

    digits = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("!exponent", digits, list("-+0123456789"))
    Loader.add_constructor("!exponent", lambda loader, node: scalar(node.value))
    try:
        return yaml.load(path.read_text(), Loader)
    except Exception as error:  # PyYAML lets its own errors out
        raise UsageError(f"it cannot be read: {error}") from error


def scalar(word: str) -> Any:
    """A value as a user writes it: 3, 1e-4, true, or a word; 1e2 is 100."""
    with contextlib.suppress(ValueError, OverflowError):
        number = float(word)
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

    # The metric, with the names that others have for ours.
    metric = given.get("metric", {"name": "val_loss"})
    if not isinstance(metric, dict) or not {"name"} <= metric.keys() <= {"name", "goal", "target"}:
        raise UsageError("metric has a name and a goal, perhaps a target, and nothing else here")
    name = str(metric["name"])
    ours = re.fullmatch(r"(best.)?(epoch.)?val(idation)?[_/](loss|acc)(uracy)?", name)
    words.append(f"--metric=val_{ours[4]}" if ours else f"--metric={name}")
    words += [f"--{key}={metric[key]}" for key in ("goal", "target") if key in metric]
    if "early_terminate" in given:
        words += read_early_terminate(given["early_terminate"])
    words += read_parameters(given.get("parameters"))
    return words, read_command(given.get("command", []))


def read_early_terminate(rule: Any) -> list[str]:
    """`early_terminate` as flags: the epochs at which W&B would compare the trials. UsageError."""
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
    """`parameters` as flags. A group is flattened: a flag is known by its own name. UsageError."""
    if not isinstance(parameters, dict) or not parameters:
        raise UsageError("parameters must have at least one entry")
    words = []
    for name, entry in parameters.items():
        if not isinstance(entry, dict):
            raise UsageError(f"parameter {name}: expected value, values, or min and max")
        if "parameters" in entry:
            words += read_parameters(entry["parameters"])
        elif name == "seed":  # no parameter: each seed trains all configurations
            _, seed = parse_parameter(f"seed={json.dumps(entry)}")
            seeds = getattr(seed.distribution, "choices", None)
            if not seeds:
                raise UsageError("parameter seed: expected a value, or a list of values")
            words.append(f"--seed{'s' * (len(seeds) > 1)}={','.join(map(str, seeds))}")
        else:
            text = f"{name}={json.dumps(entry, default=str)}"
            parse_parameter(text)
            words.append(f"--param={text}")
    return words


# The words of `command` that stand for what the sweep does by itself.
UNDERSTOOD = {"${env}", "${interpreter}", "${program}", "${args}", "${args_no_boolean_flags}"}
UNDERSTOOD |= {"python", "python3"}


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
# W&B's distributions as Optuna's, the keys of each, and how Optuna calls them.
DISTRIBUTIONS = {
    "constant": ["value"],
    "categorical": ["values"],
    "int_uniform": ["min", "max"],
    "uniform": ["min", "max"],
    "log_uniform": ["min", "max"],
    "log_uniform_values": ["min", "max"],
    "q_uniform": ["min", "max", "q"],
    "q_log_uniform_values": ["min", "max", "q"],
}
RANGES = {None: "uniform", "int:": "int_uniform", "log:": "log_uniform_values"}


@dataclass(frozen=True)
class Parameter:
    """A flag to be searched: W&B's entry, Optuna's distribution, and the step of its values: on a
    logarithmic scale Optuna has none."""

    entry: dict
    distribution: Any
    step: float | None = None

    @functools.cached_property
    def values(self) -> list:
        """All its values, in order; [] where they are too many for a list."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return list(d.choices)
        count = (d.high - d.low) / self.step if self.step else math.inf
        return (
            [self.tidy(d.low + n * self.step) for n in range(round(count) + 1)]
            if count < 1e5
            else []
        )

    @property
    def ends(self) -> list:
        """The bounds of a range, or all words: what a script refuses lies there."""
        d = self.distribution
        return self.values if isinstance(d, CategoricalDistribution) else [d.low, d.high]

    def tidy(self, value: Any) -> Any:
        """A value that was drawn, as it is used: six digits can be read and copied."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return value
        if self.step:
            value = round(value / self.step) * self.step
        if isinstance(value, float):
            value = float(f"{value:.{12 if self.step else 6}g}")
        return min(max(value, d.low), d.high)


def parse_parameter(text: str) -> tuple[str, Parameter]:
    """`c1=48,96`, `d1=0.0..0.5`, `l1=int:64..512`, `lr=log:1e-4..1e-1`, or an entry of W&B's schema
    in JSON. UsageError."""
    name, _, spec = text.partition("=")
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not spec:
        form = "NAME=VALUE,VALUE or NAME=LOW..HIGH, with int: or log: before LOW"
        raise UsageError(f"--param {text}: expected {form}")
    try:
        entry = json.loads(spec) if spec.startswith("{") else as_entry(spec)
        return name.replace("-", "_"), make_parameter(entry)
    except ValueError as error:
        raise UsageError(f"parameter {name}: {error}") from error


def as_entry(spec: str) -> dict:
    """What follows NAME= as an entry of W&B's schema. ValueError."""
    kind, content = re.fullmatch(r"(int:|log:)?(.*)", spec, re.DOTALL).groups()
    bounds = re.fullmatch(r"([^,/]+)\.\.([^,/]+)", content)
    if bounds and "..." not in content:
        low, high = map(scalar, bounds.groups())
        return {"distribution": RANGES[kind], "min": low, "max": high}
    if kind or bounds:
        raise ValueError("expected two numbers, LOW..HIGH")
    values = content.split(",")
    if "" in values:
        raise ValueError("a value is empty")
    return {"values": [scalar(value) for value in values]}


def make_parameter(entry: dict) -> Parameter:
    """A parameter from an entry of W&B's schema. ValueError."""
    # The distribution, and whether it has its keys and no others.
    given, whole = dict(entry), all(type(value) is int for value in entry.values())
    inferred = {"value": "constant", "values": "categorical"}
    kinds = [inferred[key] for key in given if key in inferred]
    kind = str(given.pop("distribution", [*kinds, "int_uniform" if whole else "uniform"][0]))
    if kind not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"the distribution {kind} is not supported (only {known})")
    if kind.startswith("q_"):
        given.setdefault("q", 1)
    if given.keys() != set(DISTRIBUTIONS[kind]):
        wanted = " ".join(DISTRIBUTIONS[kind])
        raise ValueError(f"{kind} has {wanted}, not {' '.join(given) or 'nothing'}")

    # Words and numbers one by one, or a range.
    if "min" in given:
        return Parameter(entry, *make_range(kind, given))
    values = given.get("values", [given.get("value")])
    scalars = bool, int, float, str, type(None)
    if not (isinstance(values, list) and values and all(isinstance(v, scalars) for v in values)):
        raise ValueError("values must be a list of numbers and words")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{value!r} is there twice")
    return Parameter(entry, CategoricalDistribution(values))


def exponentials(low: float, high: float) -> list[float]:
    """The bounds of W&B's log_uniform, whose entry has exponents of e. ValueError."""
    bounds = [math.exp(min(exponent, 300)) for exponent in (low, high)]
    if 0 < low < 1:
        means = f"log_uniform takes exponents, here of {bounds[0]:.4g} to {bounds[1]:.4g}"
        raise ValueError(f"{means}; log_uniform_values takes the bounds themselves")
    return bounds


def make_range(kind: str, given: dict) -> tuple:
    """Optuna's distribution of a range, and the step of its values. ValueError."""
    # The bounds and the step.
    numbers = [given["min"], given["max"], given.get("q", 1)]
    low, high, step = (scalar(x) if isinstance(x, str) else x for x in numbers)
    for number in (low, high, step):
        if type(number) not in (int, float) or not abs(number) < 1e15:
            raise ValueError("the bounds and the step must be finite numbers")
    if kind == "log_uniform":
        low, high = exponentials(low, high)
    log, whole, steps = "log" in kind, kind == "int_uniform", "q" in given
    narrow = not (whole or steps) and high - low < 1e-3 * abs(high)
    for is_wrong, text in (
        (whole and not (type(low) is type(high) is int), "int needs whole numbers"),
        (low >= high, f"the lower bound {low} is not below the upper bound {high}"),
        (log and low <= 0, f"a logarithmic range needs a lower bound above 0, not {low}"),
        (narrow, "the range is too narrow for values of six digits"),
        (step <= 0 or (high - low) / step > 1e9, f"a step of {step} does not fit these bounds"),
    ):
        if is_wrong:
            raise ValueError(text)

    # The multiples of the step in the range; steps such as 0.1 have no exact sum.
    if not (whole or steps):
        return FloatDistribution(low, high, log), None
    low, high = math.ceil(low / step - 1e-9) * step, math.floor(high / step + 1e-9) * step
    if isinstance(step, float):
        low, high = float(f"{low:.12g}"), float(f"{high:.12g}")
    if low > high or (log and low <= 0):
        raise ValueError(f"there is no multiple of {step} within the bounds")
    if log:
        return FloatDistribution(low, high, log), step
    kind_of_steps = IntDistribution if isinstance(step, int) else FloatDistribution
    return kind_of_steps(low, high, step=step), step


# ------------------------ The script ------------------------
def find_script(script: str) -> Path:
    """The path of a training script, here or beside this file. UsageError where there is none."""
    for path in (Path(script), records.HERE / script):
        if path.is_file() and path.suffix == ".py":
            return path.resolve()
    raise UsageError(f"--script {script}: there is no such Python file")


@functools.cache
def load_script(script: str) -> Any:
    """The module of a training script. UsageError where it is not one."""
    path = Path(script)
    try:
        if path.parent == records.HERE:
            return importlib.import_module(path.stem)
        sys.path.append(str(path.parent))  # last: a common.py there does not hide ours
        spec = importlib.util.spec_from_file_location(script, path)
        module = sys.modules[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, SyntaxError):
            at = error
        text = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        raise UsageError(f"--script {at.filename}, line {at.lineno}: {text}") from error
    if not hasattr(module, "main"):
        raise UsageError(f"--script {script}: it has no function main(argv, on_epoch=None)")
    return module


# What others call our flags.
SYNONYMS = {"bs": "batch-size", "learning-rate": "lr", "dropout": "d1", "num-epochs": "epochs"}


def parse_trial(search: Search, params: dict) -> tuple[Namespace, dict]:
    """What the script makes of a trial's command line, and the parameters that have an effect.

    UsageError with the script's own message where it refuses the trial.
    """
    said = io.StringIO()
    parse = getattr(load_script(search.script), "parse_arguments", lambda argv: Namespace())
    argv = [*search.words(params, 0), "--no-test", "--quiet"]
    argv += ["--runs-dir", str(search.runs_dir), "--run-name", "trial"]
    try:
        with contextlib.redirect_stderr(said):
            args = parse(argv)
        args.epochs = int(getattr(args, "epochs", 0))
        return args, params
    except SystemExit as end:
        if not end.code:  # --help
            raise
        message = said.getvalue().strip() or str(end.code)
    except Exception as error:  # whatever a script of one's own raises
        text = f"parse_arguments raised {type(error).__name__}: {error}"
        raise UsageError(f"--script {shown(search.script)}: {text}") from error

    # Without a parameter that has no effect beside the others it may be accepted.
    idle = re.search(r"--([\w-]+) has no effect", message)
    name = idle and idle[1].replace("-", "_")
    if name in params:
        return parse_trial(search, {key: params[key] for key in params if key != name})
    for word in re.findall(r"--([\w-]+)", message):
        if word in SYNONYMS:
            message += f" (--{word}: did you mean --{SYNONYMS[word]}?)"
    raise UsageError(message)


def as_record(args: Namespace) -> dict:
    """What run.json would say of a trial, as far as it decides what can be compared with it."""
    known = {name: value for name, value in vars(args).items() if name not in records.NOT_RECORDED}
    images = args.dataset, args.val_size, args.fold
    return {"name": "", "threads": 1, "args": known, "data": {"val_checksum": images}}


def check_data(search: Search) -> tuple[str, bytes | None]:
    """Look at the data of all trials, before the first: their checksums, and of images from files
    the content of the data.csv that all trials read. UsageError where something is missing."""
    module, listing, checksums = load_script(search.script), None, []
    if not hasattr(module, "synthetic"):
        return "", None
    trials = [parse_trial(search, params)[0] for params in search.corners()]
    datasets = {args.dataset: args for args in trials}
    directory = search.directory if len(datasets) == 1 else None
    for args in datasets.values():
        args.directory, args.quiet, args.device = search.directory, search.quiet, "cpu"
        try:
            if args.dataset in common.TORCHVISION:
                data = common.load_data(args, module.synthetic, ("train", "val"))
                checksums.append(data.train.checksum)
            elif args.dataset not in common.DATASETS:
                listing = read_listing(args, directory)
                checksums.append(hashlib.sha256(listing).hexdigest())
        except RunError as error:
            raise UsageError(str(error)) from error
    return " ".join(checksums), listing if directory else None


def read_listing(args: Namespace, directory: Path | None) -> bytes:
    """The data.csv of the search in `directory`, where it is there, else a new one. RunError."""
    if directory and (directory / "data.csv").exists():
        return (directory / "data.csv").read_bytes()
    common.search_directory = directory  # where the pixels are kept for the trials
    try:
        return common.listing_of_search(args)
    finally:
        common.search_directory = None
        common.images_read.clear()


# ------------------------ The study ------------------------
class JournalLock:
    """The lock of study.journal. It ends with its process; Optuna's own would stay for 30 s."""

    def __init__(self, journal: Path):
        self.journal, self.stack = journal, contextlib.ExitStack()

    def acquire(self) -> bool:
        """Wait for it, and cut off a last line that a kill has torn: Optuna would append to it."""
        lock = self.journal.with_name(".study.lock")
        self.stack.enter_context(records.locked(lock, wait=True))
        with open(self.journal, "rb+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        self.stack.close()


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
            hint = 'for PostgreSQL: pip install "sqlalchemy>=2.1" "psycopg[binary]"'
            raise UsageError(f"{storage_problem(search, error)}; {hint}") from error
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


def check_directory(search: Search) -> None:
    """UsageError where the sweep's folder is not one for this search."""
    name = shown(search.directory)
    if search.resume and not search.resume.is_dir():
        raise UsageError(f"--resume {name}: there is no such directory")
    if not search.storage and not (search.directory / "study.journal").exists():
        if search.resume:
            hint = "for a shared sweep give its --storage again"
            raise UsageError(f"--resume {name}: it has no study.journal; {hint}")
        if any(search.directory.glob("[!.]*")):
            raise UsageError(f"--name {search.name}: {name} exists, and is no sweep")


def open_study(search: Search) -> Study:
    """The study of a search, made where it is new. What it keeps of the search becomes that of
    `search`, or must be the same. UsageError, RunError."""
    # Open it, or make it. A sweep that has moved keeps the name of its study.
    name = shown(search.directory)
    try:
        storage = open_storage(search)
        names = optuna.get_all_study_names(storage)
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{name}/study.journal is damaged: {error}") from error
    search.study_name = names[0] if names and not search.storage else search.directory.name
    attributes = {}
    if not search.resume or search.study_name in names:
        study = optuna.create_study(
            storage=storage,
            study_name=search.study_name,
            direction=search.goal,
            load_if_exists=True,
        )
        attributes = study.user_attrs
    if search.resume and not attributes.keys() & {"sweep", "search"}:
        raise UsageError(f"--resume {name}: it was stopped before it began; start it again")
    if "search" in attributes:
        raise UsageError(f"{name} is a search of an earlier version, which alone can continue it")

    if "sweep" in attributes:
        take_over(search, attributes["sweep"])
    search.threads = search.threads or max(1, torch.get_num_threads() // search.jobs)
    study.set_user_attr("sweep", {key: getattr(search, key) for key in search.KEPT})
    return study


def take_over(search: Search, held: dict) -> None:
    """Go on with the search that a study holds. UsageError where that is another one."""
    name, count = shown(search.directory), search.count or 0
    for key in () if search.resume else search.SAME:
        if getattr(search, key) != held[key]:
            text = f"{name} is another search: its {key} is {held[key]}"
            raise UsageError(f"{text}; take another --name")
    if "--count" in search.given and count < held["count"]:
        raise UsageError(f"--count {count}: the search has {held['count']} already")
    threads = search.threads or (None if search.storage else held["threads"])
    vars(search).update({**held, "threads": threads, "places": search.places or held["places"]})
    search.count = max(held["count"], int(min(count, search.size)))


def trials_of(study: Study) -> list[FrozenTrial]:
    """The trials of the search, by number. Of several with one number the first counts that has
    not failed: two machines may make the same at once, and one that failed may be run again."""
    found = {}
    for trial in study.get_trials(deepcopy=False):
        number = trial.user_attrs["trial"]
        if number not in found or found[number].state == TrialState.FAIL:
            found[number] = trial
    return [found[number] for number in sorted(found)]


def machine_of(trial: FrozenTrial) -> str:
    """The machine that runs a trial, or has run it."""
    return trial.user_attrs["starts"][-1][0] if "starts" in trial.user_attrs else ""


def write_lines(study: Study, search: Search) -> list[dict]:
    """Write trials.jsonl, and return its lines: what the trials gave, in the order of their ends.
    `run` is a directory beside that file, with the machine before it where that is another."""
    ended = [trial for trial in trials_of(study) if trial.state.is_finished()]
    lines = []
    for trial in sorted(ended, key=lambda trial: trial.datetime_complete):
        line, machine = trial.user_attrs["line"], machine_of(trial)
        run = line["run"] if machine == search.machine else f"{machine}/{line['run']}"
        lines.append({**line, "run": run})
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    path = search.directory / "trials.jsonl"
    if not path.exists() or path.read_bytes() != content:
        records.write_atomically(path, content)
    return lines


# ------------------------ A worker ------------------------
# It may die anywhere, and cleans nothing up: its claim on a trial is a lock that dies with it, and
# the script has saved the epochs of the trial. Whoever takes the trial next goes on there.
ENDED = ("finished", "stopped_early", "diverged", "pruned")
AWAY = 3  # the exit code of a worker whose database does not answer


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
        study = optuna.load_study(study_name=search.study_name, storage=open_storage(search))
        with open(search.directory / ".claims", "a") as search.claims:
            while trial := take(study, search):
                run(study, search, trial)
            if search.sweep_id:
                run_agent(study, search)
    except (StorageInternalError, RunError):
        traceback.print_exc()
        os._exit(AWAY)


def end_with_parent() -> None:
    """Die when sweep.py does, in whatever way."""
    multiprocessing.parent_process().join()
    os._exit(1)


def take(study: Study, search: Search) -> FrozenTrial | None:
    """Take the next trial: one whose process has died, or one that waits, or a new one. Where
    others run the last ones, wait: they may die. None where all have ended, or all fail."""
    silent: dict[int, float] = {}
    while True:
        with records.locked(search.directory / ".queue.lock", wait=True):
            if search.storage:
                release_silent(study, search, silent)
            trials = trials_of(study)
            if failed_in_a_row(search, trials):
                return None
            left = [trial for trial in trials if not trial.state.is_finished()]
            for trial in left:
                if claim(study, search, trial):
                    return trial
            missing = 0 if search.sweep_id else search.total - len(trials)
            if not left and missing <= 0:
                return None

            # Make a new one, unless as many are held as run at once, by processes about to die.
            here = [trial for trial in left if machine_of(trial) == search.machine]
            if missing > 0 and len(here) < search.jobs:
                study.add_trial(search.trial(len(trials), search.propose(trials)))
                continue
        time.sleep(0.5)


def release_silent(study: Study, search: Search, silent: dict[int, float]) -> None:
    """Let the trials wait again of machines that have died. After an outage of the database all
    hearts seem to have stopped: a living machine has a quarter of --grace to be heard."""
    storage, now = study._storage, time.monotonic()
    stale = storage._get_stale_trial_ids(study._study_id)
    for trial_id in silent.keys() - set(stale):
        del silent[trial_id]
    for trial_id in stale:
        if now > silent.setdefault(trial_id, now) + search.grace / 4:
            storage.set_trial_state_values(trial_id, TrialState.WAITING)


def claim(study: Study, search: Search, trial: FrozenTrial) -> bool:
    """Make a trial this process's own: by a lock on this machine, by its state for the others."""
    storage, trial_id = study._storage, trial._trial_id
    waits, exclusive = trial.state == TrialState.WAITING, records.fcntl.LOCK_EX
    if not waits and machine_of(trial) != search.machine:
        return False
    try:
        # No child inherits such a lock. It would be lost if this file were opened and closed again.
        byte = 1, trial.user_attrs["trial"]
        records.fcntl.lockf(search.claims, exclusive | records.fcntl.LOCK_NB, *byte)
    except OSError:
        return False
    if search.storage:  # without a heartbeat it would never be stale
        storage.record_heartbeat(trial_id)
    if waits and not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
        return False  # another machine was quicker
    start = [search.machine, search.session, trial.last_step]
    trial.user_attrs["starts"] = [*trial.user_attrs.get("starts", []), start]
    storage.set_trial_user_attr(trial_id, "starts", trial.user_attrs["starts"])
    return True


def run(study: Study, search: Search, trial: FrozenTrial) -> None:
    """Run a trial, from where it was left. Its line of trials.jsonl is kept with it."""
    storage, trial_id, number = study._storage, trial._trial_id, trial.user_attrs["trial"]
    directory, starts = search.directory / f"trial-{number:04}", trial.user_attrs["starts"]
    try:
        if starts.count(starts[-1]) > 2:
            raise RunError("its process died twice, and came no further")
        with get_heartbeat_thread(trial_id, storage):
            record = train(study, search, trial, directory)
    except OptunaError:
        raise  # the database is away, or another machine has ended the trial
    except (Exception, SystemExit) as error:
        record = failure(search, directory, error)

    # Optuna learns a value from a trial that was pruned or diverged, too.
    status, best = record["status"], record.get("best") or {}
    values = {name: best.get(name) for name in (*METRICS, search.metric)}
    line = {
        "trial": number,
        "run": directory.name,
        "status": "finished" if status == "stopped_early" else status,
        **{name: None if value is None else float(value) for name, value in values.items()},
        "epochs": int(record.get("epochs", 0)),
        "seconds": float(record.get("seconds", 0)),
        "seed": search.seeds[number % len(search.seeds)],
        "params": trial.user_attrs["params"],
        "error": record.get("error") and str(record["error"]),
    }
    storage.set_trial_user_attr(trial_id, "line", line)
    value = search.sign * math.inf if status == "diverged" else line[search.metric]
    state = TrialState.FAIL if status == "failed" else TrialState.COMPLETE
    storage.set_trial_state_values(trial_id, state, None if status == "failed" else [value])


def failure(search: Search, directory: Path, error: BaseException) -> dict:
    """The record of a trial that an error has ended."""
    if type(error) is Exception and search.sweep_id:  # so W&B's agent stops a run
        return {**read_record(directory), "status": "pruned", "error": None}
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, UsageError | RunError):
        text = str(error)
    elif isinstance(error, SystemExit):
        text = f"the script ended with exit status {error.code}"
    else:
        traceback.print_exception(error)
    return {"status": "failed", "error": text[:1000]}


def train(study: Study, search: Search, trial: FrozenTrial, directory: Path) -> dict:
    """The record of the run in `directory`, begun or continued. What the script raises, RunError,
    KeyboardInterrupt."""
    number, reported = trial.user_attrs["trial"], trial.last_step or 0

    def on_epoch(row):
        # What was reported before was judged before; but for the last, as a kill may come between.
        epoch = int(row["epoch"])
        if epoch < reported:
            return False
        value = float(row[search.metric])
        study._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)
        return not search.sweep_id and search.prunes(trials_of(study), number, epoch)

    # It may have ended before its end was written down.
    record, argv = read_record(directory), []
    with contextlib.suppress(RunError):
        return checked(record, search.metric)

    # Go on after the epochs that were saved, and perhaps not reported; or begin.
    if record and (directory / "last.pt").exists():
        rows = saved_rows(directory)
        for done, row in enumerate(rows, 1):
            if on_epoch(row):
                best = min(rows[:done], key=lambda row: row["val_loss"])
                return {**record, "status": "pruned", "best": best, "epochs": done}
        argv = ["--resume", str(directory), "--quiet", *search.places]
    else:
        shutil.rmtree(directory, ignore_errors=True)
        argv = [*search.words(trial.user_attrs["params"], number), "--no-test", "--quiet"]
        argv += ["--runs-dir", str(directory.parent), "--run-name", directory.name]
    if search.sweep_id:
        argv += ["--wandb", "online", "--wandb-project", search.wandb_project]
    record = load_script(search.script).main(argv, on_epoch)
    if isinstance(record, dict) and record.get("status") == "interrupted":
        raise KeyboardInterrupt(record.get("error"))
    return checked(record, search.metric)


def read_record(directory: Path) -> dict:
    """run.json of a trial; {} where there is none. RunError where it is damaged."""
    path = directory / "run.json"
    return records.read_json(path) if path.exists() else {}


def checked(record: Any, metric: str) -> dict:
    """The record of a trial that has ended. RunError where it is none."""
    if not isinstance(record, dict) or record.get("status") not in ENDED:
        wanted = f"a status of {', '.join(ENDED)}"
        raise RunError(f"main(argv, on_epoch) returned no record with {wanted}")
    try:
        value = float(record["best"][metric])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if record["status"] != "diverged" and not math.isfinite(value):
        raise RunError(f"its record has no best {metric} that is a number")
    return record


def saved_rows(directory: Path) -> list[dict]:
    """The rows of the epochs that a run has saved. A kill may come between last.pt, which has them
    first where it is one of ours, and log.jsonl. RunError."""
    try:
        return records.load_checkpoint(directory / "last.pt")["history"]
    except RunError:
        return records.read_log(directory) if (directory / "log.jsonl").exists() else []


# ------------------------ Keeping workers at work ------------------------
PATIENCE = 120  # seconds that a database may be away


def run_trials(study: Study, search: Search) -> str | None:
    """Keep --jobs workers at work until all trials have ended, on whatever machine.

    Returns the name of the signal that stopped it, or None. RunError where nothing comes of it.
    """
    workers, stopped, answered = Workers(search), None, time.monotonic()
    told = {line["trial"] for line in write_lines(study, search)}
    progress, is_last = 0, False
    form = "{desc} |{bar}| {elapsed}<{remaining}"
    hidden = search.quiet or None
    bar = tqdm(total=search.total, initial=len(told), bar_format=form, leave=False, disable=hidden)
    with bar, contextlib.closing(workers), records.interruptible():
        try:
            while not is_last:
                # Tell what has ended, here or elsewhere, and how far the others are.
                have_left = workers.have_left()
                try:
                    trials, lines = trials_of(study), write_lines(study, search)
                    answered = time.monotonic()
                except StorageInternalError:
                    if time.monotonic() > answered + PATIENCE:
                        raise
                    time.sleep(1)
                    continue
                for line in lines:
                    if line["trial"] not in told:
                        told.add(line["trial"])
                        say(line_as_text(line, search), search.quiet)
                show(bar, search, trials, lines)
                reports = len(lines) + sum(trial.last_step or 0 for trial in trials)
                if reports != progress:
                    progress, workers.deaths = reports, 0

                # Have others at work for those that have died, until all is done.
                is_last = have_left or is_complete(search, lines)
                check_failures(search, trials, workers.deaths)
                if not is_last:
                    workers.start(min(search.jobs, search.total - len(lines)))
                    workers.wait()
        except KeyboardInterrupt as interruption:
            stopped = str(interruption) or "SIGINT"
            workers.stop()
    return stopped


def is_complete(search: Search, lines: list[dict]) -> bool:
    """Whether all trials have ended, or one has come to the --target."""
    losses = [search.loss(line) for line in lines if line["status"] == "finished"]
    if search.target is not None and min(losses, default=math.inf) <= search.sign * search.target:
        return True
    return len(lines) >= search.total


def failed_in_a_row(search: Search, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The last --max-failures trials that have ended since the search was started, if all of them
    have failed."""
    ended = [trial for trial in trials if trial.state.is_finished()]
    ended = [trial for trial in ended if trial.datetime_complete > search.began]
    last = sorted(ended, key=lambda trial: trial.datetime_complete)[-search.max_failures :]
    failed = [trial for trial in last if trial.state == TrialState.FAIL]
    return failed if len(failed) == search.max_failures else []


def check_failures(search: Search, trials: list[FrozenTrial], deaths: int) -> None:
    """RunError where too many trials have failed in a row, or workers die and nothing follows."""
    reason = "the workers die, and nothing comes of it" if deaths > 3 * search.jobs else ""
    failed = failed_in_a_row(search, trials)
    if failed:
        error = failed[-1].user_attrs["line"]["error"]
        reason = f"{len(failed)} trials in a row failed, the last with: {error}"
    if reason:
        log = shown(search.directory / "workers.log")
        go_on = f"{how_to_go_on(search)}, with --retry-failed for the failed ones"
        raise RunError(f"{reason}; see {log}; when that is mended, go on with: {go_on}")


class Workers:
    """The processes that run the trials, each with its share of the GPUs."""

    def __init__(self, search: Search):
        # They are forked from a process that has imported what they need, and that Ctrl-C does not
        # reach: it is for this one, which stops them.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", "torch._dynamo", "optuna"])
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
        every = ",".join(map(str, range(torch.cuda.device_count())))
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        self.search, self.running, self.deaths = search, {}, 0

    def start(self, count: int) -> None:
        """Have so many at work."""
        for slot in range(count):
            code = self.running[slot].exitcode if slot in self.running else AWAY
            if code == AWAY:  # no trial is to blame
                self.search.session = secrets.token_hex(4)
            if code:
                self.deaths += code != AWAY
                settings = self.search, self.gpus[slot % len(self.gpus)]
                self.running[slot] = self.context.Process(target=work, args=settings)
                self.running[slot].start()

    def have_left(self) -> bool:
        """Whether all have ended by themselves: there is nothing more to take."""
        return {worker.exitcode for worker in self.running.values()} == {0}

    def wait(self) -> None:
        """Wait for one to end, but not for long."""
        alive = [worker.sentinel for worker in self.running.values() if worker.exitcode is None]
        multiprocessing.connection.wait(alive, 1 if self.search.storage else 0.2)

    def stop(self) -> None:
        """Ask them to stop, and give them two seconds for it."""
        end = time.monotonic() + 2
        for worker in self.running.values():
            worker.terminate()
        for worker in self.running.values():
            worker.join(max(0, end - time.monotonic()))

    def close(self) -> None:
        """Kill those that are left."""
        for worker in self.running.values():
            worker.kill()
            worker.join()


def show(bar: tqdm, search: Search, trials: list[FrozenTrial], lines: list[dict]) -> None:
    """Show how far the search is; the bar also moves while trials run."""
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    epochs = [trial.last_step or 0 for trial in running]
    finished = [line for line in lines if line["status"] == "finished"]
    bar.n = len(lines) + sum(epochs) / (search.epochs or math.inf)
    text = f"{len(lines)} of {search.total} trials"
    if epochs:
        text += f", epoch {' and '.join(map(str, epochs))} of {search.epochs or '?'}"
    if finished:
        best = min(finished, key=search.loss)[search.metric]
        text += f", best {as_text(search.metric, best)}"
    bar.set_description_str(text)


def how_to_go_on(search: Search) -> str:
    """The command that continues a sweep."""
    words = ["python", shown(__file__), "--resume", shown(search.directory)]
    if search.storage:
        words += ["--storage", without_password(search.storage)]
    return shlex.join(words)


def as_text(name: str, value: Any) -> str:
    """A value for the screen, with accuracies as percentages."""
    if isinstance(value, float):
        forms = {"acc": ".2%", "loss": ".4f", "seconds": ".1f"}
        return format(value, next((forms[word] for word in forms if word in name), ".4g"))
    return "-" if value is None else str(value)


def line_as_text(line: dict, search: Search) -> str:
    """A line of trials.jsonl for the screen."""
    params = " ".join(f"{name}={value}" for name, value in line["params"].items())
    end = f"{line['status']} after {counted(line['epochs'], 'epoch')}"
    value = f"{search.metric} {as_text(search.metric, line[search.metric])}"
    return f"trial {line['trial']}  {end}  {value}  {params}  {line['error'] or ''}".rstrip()


def counted(number: int, what: str) -> str:
    """1 trial, 2 trials."""
    return f"{number} {what}{'s' * (number != 1)}"


# ------------------------ Weights & Biases as the engine ------------------------
def wandb_drives(search: Search) -> bool:
    """Whether W&B drives the search, and not Optuna. UsageError, RunError."""
    engine = "wandb" if search.sweep_id else search.engine
    if engine == "auto" and search.method == "bayes" and not search.storage and search.is_ours:
        online = os.environ.get("WANDB_MODE", "online") == "online"
        key = online and importlib.util.find_spec("wandb") and records.has_wandb_key(quiet=True)
        reason = f"{'an' if key else 'no'} API key is configured"
        reason = reason if online else "WANDB_MODE is not online"
        engine, name = ("wandb", "W&B") if key else ("local", "local, Optuna")
        say(f"engine: {name} ({reason}; --engine chooses)", search.quiet)
    if engine == "wandb":
        reach_wandb(search)
        if search.storage or len(search.seeds) > 1:
            raise UsageError("--storage and --seeds go with --engine local")
    return engine == "wandb"


def reach_wandb(search: Search) -> None:
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
        text = f"W&B's server {address} cannot be reached ({error})"
        raise RunError(f"{text}; --engine local does without") from error


def wandb_config(search: Search) -> Any:
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
        rule = {"type": "hyperband", "min_iter": search.bands[0], "eta": search.eta}
        config["early_terminate"] = rule
    return wandb.sweep(config, project=search.wandb_project)


def run_agent(study: Study, search: Search) -> None:
    """Run the trials that a W&B sweep gives out; each becomes a trial of the study as well."""
    import wandb

    def run_given():
        # The agent leaves the parameters of the run in this file.
        given = load_yaml(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]))
        params = {name: given[name]["value"] for name in search.parameters}
        with records.locked(search.directory / ".queue.lock", wait=True):
            number = len(trials_of(study))
            study.add_trial(search.trial(number, params))
            trial = trials_of(study)[number]
            claim(study, search, trial)
        run(study, search, trial)

    os.environ.setdefault("WANDB_DIR", str(search.directory))
    left = search.total - len(trials_of(study))
    if left > 0:
        count = math.ceil(left / search.jobs)
        wandb.agent(search.sweep_id, run_given, project=search.wandb_project, count=count)


# ------------------------ The report ------------------------
def leaderboard(search: Search, lines: list[dict]) -> list[dict]:
    """A row for each configuration, the best first; then the pruned ones, by the epochs that they
    survived; then those without a result. Of several seeds the mean decides."""
    from scipy import stats

    def place(row):
        rank = {"finished": 0, "pruned": 1}.get(row["status"], 2)
        return rank, -row["epochs"] * (rank == 1), search.loss(row)

    configurations = {}
    for line in lines:
        configurations.setdefault(line["trial"] // len(search.seeds), []).append(line)
    rows = []
    for group in configurations.values():
        # The best seed stands for all, unless one of them did not finish.
        row = min(group, key=lambda line: (line["status"] == "finished", search.loss(line)))
        row = dict(row)
        row["seconds"] = sum(line["seconds"] for line in group)
        if len(group) > 1 and row["status"] == "finished":
            values = [line[search.metric] for line in group]
            row["mean"] = statistics.fmean(values)
            interval = stats.t.interval(0.95, len(values) - 1, row["mean"], stats.sem(values))
            row["low"], row["high"] = map(float, interval)
        rows.append(row)
    return sorted(rows, key=place)


def report(study: Study, search: Search, lines: list[dict], complete: bool) -> dict | None:
    """Print and write the leaderboard, the pictures and the best configuration; test the winner of
    a complete sweep. Returns its row, None where no trial has finished."""
    from pandas import DataFrame

    # The table.
    if not lines:
        return None
    rows, directory = leaderboard(search, lines), search.directory
    columns = ["trial", "run", "status", *dict.fromkeys((*METRICS, search.metric))]
    columns += ["mean", "low", "high"] * (len(search.seeds) > 1) + ["epochs", "seconds"]
    table = []
    for row in rows:
        params = {name: row["params"].get(name) for name in search.parameters}
        params = {f"--{name}" if name in columns else name: params[name] for name in params}
        table.append({name: row.get(name) for name in columns} | params | {"error": row["error"]})
    cells = DataFrame([{name: as_text(name, row[name]) for name in row} for row in table])
    tables = {"Trials, best first": cells}
    say("\n".join(evaluate.as_lines(tables)).rstrip(), search.quiet)

    # The winner, and its test.
    best, link, remarks = rows[0], directory / "best", []
    link.unlink(missing_ok=True)
    if best["status"] == "finished":
        command = search.command(best["params"], search.seeds.index(best["seed"]))
        text = as_text(search.metric, best[search.metric])
        remarks = [f"best: {best['run']}, {search.metric} {text}", f"  {command}"]
        if (directory / best["run"]).is_dir():
            link.symlink_to(best["run"])
            if complete and (link / "best.pt").exists():
                remarks.append(f"  {test_winner(directory, best['run'])}")
        say("\n".join(remarks), search.quiet)

    # The files.
    flags = [(key, str(getattr(search, key))) for key in search.KEPT]
    tables["The search"] = DataFrame(flags, columns=["flag", "value"])
    pictures = draw_sweep(study, search, rows)
    title = f"{directory.name}: {counted(len(lines), 'trial')}"
    page = evaluate.as_page(title, remarks, tables, pictures)
    files = {"leaderboard.csv": evaluate.as_csv(table).encode(), "report.html": page}
    files |= {f"{name}.png": picture for name, picture in pictures.items()}
    evaluate.write_files(directory, files)
    return best if best["status"] == "finished" else None


def test_winner(directory: Path, run: str) -> str:
    """Test the weights of the winner's best epoch; say for which trials the test set was read."""
    paths = sorted(directory.glob("trial-*/metrics.json"))
    metrics = {path.parent.name: records.read_json(path) for path in paths}
    before = [name for name, content in metrics.items() if content["split"] == "test"]
    if run not in before:
        try:
            evaluate.main([str(directory / run), "--quiet"])
        except (UsageError, RunError) as error:
            return f"not tested: {error}"
    content = records.read_json(directory / run / "metrics.json")
    accuracy = (content.get("tta") or content)["accuracy"]
    others = ", ".join(name for name in before if name != run)
    often = f"which was read before, for {others}" if others else "read once, for this trial alone"
    return f"accuracy {accuracy:.2%} on the test set, {often}"


# ------------------------ Pictures ------------------------
def cut_off(values: list[float]) -> float:
    """Where values are cut off that would flatten all others: five times as far from the lowest,
    which is the best, as the median is."""
    values = sorted(filter(math.isfinite, values))
    return values[0] + 5 * (values[len(values) // 2] - values[0]) if values else math.inf


def draw_sweep(study: Study, search: Search, rows: list[dict]) -> dict[str, bytes]:
    """The pictures of a sweep, {name: PNG}: curves, a grid of two, and Optuna's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as optunas

    pictures = {"curves": evaluate.render(draw_curves(study, search, rows[0]))}
    rows = [row for row in rows if row["status"] in ("finished", "pruned")]
    limit = cut_off([search.loss(row) for row in rows])
    if rows and search.method == "grid" and len(search.parameters) == 2:
        pictures["grid"] = evaluate.render(draw_grid(search, rows, limit))

    # Optuna draws a study of what is to be seen: no trial so bad that it flattens the others.
    seen = optuna.create_study(direction=search.goal)
    for row in sorted(rows, key=lambda row: row["trial"]):
        params, value = row["params"], search.sign * min(search.loss(row), limit)
        distributions = {name: search.distributions[name] for name in params}
        seen.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
    drawings = {"slices": optunas.plot_slice, "parallel": optunas.plot_parallel_coordinate}
    if len(rows) >= 8:
        # PED-ANOVA (S. Watanabe et al., 2023) with the best quarter: a tenth is a trial or two.
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=0.25, region_quantile=1.0
        )
        importance = functools.partial(optunas.plot_param_importances, evaluator=evaluator)
        drawings |= {"history": optunas.plot_optimization_history, "importance": importance}
    for name, draw in drawings.items() if rows else ():
        # They set a style, and write powers of ten; long words must not reach the next ones.
        with matplotlib.rc_context({"text.parse_math": True, "savefig.bbox": "tight"}):
            draw(seen, target_name=search.metric)
            for axis in pyplot.gcf().axes:
                axis.tick_params(axis="x", rotation=45)
            pictures[name] = evaluate.render(pyplot.gcf())
            pyplot.close()
    return pictures


def draw_curves(study: Study, search: Search, best: dict) -> Any:
    """The metric of all trials, epoch by epoch, as they have reported it."""
    trials = [trial for trial in trials_of(study) if trial.intermediate_values]
    reports = [value for trial in trials for value in trial.intermediate_values.values()]
    limit = cut_off([search.sign * value for value in reports])
    title = f"all trials; {best['run']}, the best, in colour; x: it did not finish"
    figure = evaluate.new_figure(8, 4.5, title)
    axis = figure.subplots()
    axis.set(xlabel="epoch", ylabel=search.metric)
    axis.grid(alpha=0.3)
    for trial in trials:
        epochs, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        values = [search.sign * min(search.sign * value, limit) for value in values]
        line = trial.user_attrs.get("line", {"status": "running"})
        look = {"color": "silver", "linewidth": 1}
        if line["status"] == "finished" and line["run"] == best["run"]:
            look = {"color": evaluate.ORANGE, "linewidth": 2.5, "zorder": 3}
        axis.plot(epochs, values, **look)
        if line["status"] != "finished":
            axis.plot(epochs[-1], values[-1], "x", color="black", markersize=5)
    return figure


def draw_grid(search: Search, rows: list[dict], limit: float) -> Any:
    """A grid of two parameters as a heatmap, the best bright."""
    from pandas import DataFrame

    down, across = search.parameters
    table = DataFrame([{**row["params"], "loss": min(search.loss(row), limit)} for row in rows])
    cells = table.pivot(index=down, columns=across, values="loss")
    height, width = cells.shape
    figure = evaluate.new_figure(2.5 + width, 2 + 0.7 * height, search.metric)
    axis = figure.subplots()
    axis.imshow(cells, cmap=evaluate.colormap("viridis_r"), aspect="auto")
    axis.set_xticks(range(width), cells.columns, rotation=45)
    axis.set_yticks(range(height), cells.index)
    axis.set(xlabel=across, ylabel=down)
    for (row, column), loss in cells.stack().items():
        text = as_text(search.metric, search.sign * loss)
        place = cells.columns.get_loc(column), cells.index.get_loc(row)
        axis.text(*place, text, ha="center", va="center", bbox={"facecolor": "white", "pad": 1.5})
    return figure


# ------------------------ Main ------------------------
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
        dry_run(search)
        return {}
    by_wandb = not search.resume and wandb_drives(search)
    own_name = f"sweep-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    search.directory = directory = search.resume or search.runs_dir / (search.name or own_name)
    search.machine = f"{socket.gethostname()}:{directory}" if search.storage else ""
    check_directory(search)
    if search.storage:
        open_storage(search)  # before anything is made
    data = None if search.resume else check_data(search)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with records.locked(directory / ".lock"):
            study = open_study(search)
            search.sweep_id = find_sweep(study, search, by_wandb)
            if search.retry_failed:
                retry(study, search)

            # Run the trials that are left, and say what came out.
            search.began, stopped = datetime.now(), None
            if not is_complete(search, write_lines(study, search)):
                keep_data(study, search, *(data or check_data(search)))
                stopped = run_trials(study, search)
            if stopped and search.storage:
                give_back(study, search)
            lines = write_lines(study, search)
            best = report(study, search, lines, complete=not stopped)
    except StorageInternalError as error:
        text = storage_problem(search, error)
        raise RunError(f"{text}; go on with: {how_to_go_on(search)}") from error
    for path in directory.glob(".pixels-*"):
        path.unlink()
    say_end(search, lines)
    if not (best or stopped):
        error = lines[-1]["error"] if lines else "W&B gave none out"
        raise RunError(f"{shown(directory)}: no trial finished; the last with: {error}")
    result = {"directory": str(directory), "trials": lines, "best": best, "error": stopped}
    status = "interrupted" if stopped else "finished"
    return {**result, "status": status, "go_on": how_to_go_on(search)}


def find_sweep(study: Study, search: Search, by_wandb: bool) -> str | None:
    """The W&B sweep that gives out the trials, made where there is none; None without W&B."""
    sweep_id = search.sweep_id or study.user_attrs.get("sweep_id")
    if by_wandb and not sweep_id:
        sweep_id = make_sweep(search)
    if sweep_id:
        study.set_user_attr("sweep_id", sweep_id)
        hint = f"another machine joins with --sweep-id {sweep_id}"
        say(f"W&B sweep {sweep_id}; {hint}", search.quiet)
    return sweep_id


def keep_data(study: Study, search: Search, checksums: str, listing: bytes | None) -> None:
    """Keep the data.csv of a new search. RunError where a search that goes on has other data."""
    if checksums != study.user_attrs.get("data", checksums):
        raise RunError(f"{shown(search.directory)}: its data are not those that it began with")
    if listing and not (search.directory / "data.csv").exists():
        records.write_atomically(search.directory / "data.csv", listing)
    study.set_user_attr("data", checksums)


def retry(study: Study, search: Search) -> None:
    """Have the failed trials run again, from nothing: what they left may be damaged."""
    for trial in trials_of(study):
        if trial.state == TrialState.FAIL:
            number = trial.user_attrs["trial"]
            shutil.rmtree(search.directory / f"trial-{number:04}", ignore_errors=True)
            study.add_trial(search.trial(number, trial.params))


def give_back(study: Study, search: Search) -> None:
    """Let the trials wait that were running here: so other machines need not wait for --grace."""
    for trial in trials_of(study):
        if trial.state == TrialState.RUNNING and machine_of(trial) == search.machine:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def say_end(search: Search, lines: list[dict]) -> None:
    """Say how many trials have ended, and how many of them have failed."""
    name = shown(search.directory)
    say(f"{name}: {counted(len(lines), 'trial')} have ended", search.quiet)
    failed = sum(line["status"] == "failed" for line in lines)
    if failed:
        say(f"{failed} failed; {how_to_go_on(search)} --retry-failed runs them again", search.quiet)


def dry_run(search: Search) -> None:
    """Print the command line of each trial; of a Bayesian search the space."""
    if search.method == "bayes":
        text = f"{counted(search.total, 'trial')} of {shown(search.script)}, proposed one by one"
        say("\n  ".join([text, *search.param]), search.quiet)
        return
    trials = []
    for number in range(search.total):
        trials.append(search.trial(number, search.propose(trials)))
        command = search.command(trials[-1].user_attrs["params"], number)
        say(f"trial {number:4}  {command}", search.quiet)


if __name__ == "__main__":
    sys.exit(common.command_line(main))
