"""Search hyperparameters by grid, at random, or by Bayesian optimisation, with no account and no database.

    python sweep.py --method grid --dry-run                          # the CIFAR-10 tutorial's search: 8 trials
    python sweep.py --method bayes --jobs 2                          # learning rate and batch size on MNIST, 20 trials
    python sweep.py --method random --param lr=log:1e-4..1e-1 --param l1=int:64..512 --count 30 -- --epochs 5
    python sweep.py --config sweep.yaml --name mine                  # a file in the schema of W&B's sweeps
    python sweep.py --resume runs/mine                               # go on where the search was stopped

A parameter is a flag of the training script; flags after -- go to every trial. A trial never reads the test set.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import random
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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import common
import evaluate
from common import RunError, UsageError
from evaluate import BLUE, ORANGE, colormap, curves_axes, new_figure, percent_axis

import torch
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------
# The search space
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A flag to be searched: one of `values`, or a number from `low` to `high`, in steps of `step` where that is set.

    `log`: the logarithm is uniform, not the number.
    """

    name: str
    values: tuple = ()
    low: float = 0
    high: float = 0
    step: float = 0
    log: bool = False

    def grid(self):
        """All values. UsageError where they cannot be counted."""
        if self.values:
            return self.values
        if not self.step:
            raise UsageError(f"{self.name}: a grid needs a list of values, not the range {self.low}..{self.high}")
        return tuple(self.at(self.low + index * self.step) for index in range(self.steps()))

    def steps(self):
        return math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def at(self, number):
        """`number` as a value of the parameter: on its steps, between its bounds."""
        if not self.step:  # six digits are enough, and can be read and copied
            return min(max(float(f"{number:.6g}"), self.low), self.high)
        number = self.low + min(max(round((number - self.low) / self.step), 0), self.steps() - 1) * self.step
        # Steps such as 0.1 have no exact sum.
        return round(number) if isinstance(self.step, int) else float(f"{number:.12g}")

    def draw(self, generator):
        """A value at random, from a `random.Random`."""
        if self.values:
            return generator.choice(self.values)
        if self.log:
            return self.at(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        if self.step:
            return self.at(self.low + generator.randrange(self.steps()) * self.step)
        return self.at(generator.uniform(self.low, self.high))


def checked(parameter):
    """The parameter, or UsageError where nothing could be drawn from it."""
    name, low, high = parameter.name, parameter.low, parameter.high
    if parameter.values:
        repeated = [value for index, value in enumerate(parameter.values) if value in parameter.values[:index]]
        if repeated:
            raise UsageError(f"{name}: {repeated[0]!r} is there twice")
        return parameter
    if not all(-1e300 < number < 1e300 for number in (low, high, parameter.step)) or parameter.step < 0:
        raise UsageError(f"{name}: the bounds and the step must be finite numbers")
    if low >= high:
        raise UsageError(f"{name}: the lower bound {low} is not below the upper bound {high}")
    if parameter.log and low <= 0:
        raise UsageError(f"{name}: a logarithmic range needs a lower bound above 0, not {low}")
    return parameter


def number_or_text(text):
    """A value as a user writes it: 3, 1e-4, true, or a word."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def parse_parameter(text):
    """`c1=48,96`, `d1=0.0..0.5`, `l1=int:64..512` or `lr=log:1e-4..1e-1` as a Parameter. UsageError."""
    found = re.fullmatch(r"([A-Za-z][\w-]*)=(?:(int|log):)?(.*)", text, re.DOTALL)
    if not found:
        raise UsageError(f"--param {text}: expected NAME=VALUE,VALUE or NAME=LOW..HIGH, with int: or log: before LOW")
    name, kind, rest = found[1].replace("-", "_"), found[2], found[3]
    if ".." not in rest:
        values = tuple(number_or_text(value) for value in rest.split(","))
        if kind or "" in values:
            raise UsageError(f"--param {text}: " + (f"{kind}: needs a range LOW..HIGH" if kind else "a value is empty"))
        return checked(Parameter(name, values))
    bounds = [number_or_text(bound) for bound in rest.split("..")]
    if len(bounds) != 2 or any(isinstance(bound, bool | str) for bound in bounds):
        raise UsageError(f"--param {text}: expected two numbers, LOW..HIGH")
    if kind == "int" and not all(isinstance(bound, int) for bound in bounds):
        raise UsageError(f"--param {text}: int: needs whole numbers")
    return checked(Parameter(name, (), *bounds, step=1 if kind == "int" else 0, log=kind == "log"))


DISTRIBUTIONS = (
    "constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform", "log_uniform_values",
    "q_log_uniform_values",
)  # fmt: skip


def parameter_from_config(name, content):
    """A Parameter from an entry of `parameters` in W&B's schema. UsageError names what is not supported."""
    if not isinstance(content, dict):
        raise UsageError(f"parameters: {name}: expected value, values, or min and max, not {content!r}")
    content = {key: scalar(value) for key, value in content.items()}
    bounds = [content.get("min"), content.get("max")]
    whole = all(isinstance(bound, int) for bound in bounds)
    inferred = "constant" if "value" in content else "categorical" if "values" in content else None
    distribution = content.get("distribution", inferred or ("int_uniform" if whole else "uniform"))
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise UsageError(f"parameters: {name}: the distribution {distribution} is not supported (only {known})")
    unknown = sorted(map(str, content.keys() - {"value", "values", "min", "max", "q", "distribution"}))
    if unknown:
        raise UsageError(f"parameters: {name}: {unknown[0]} is not supported")
    needed = {"constant": ["value"], "categorical": ["values"]}.get(distribution, ["min", "max"])
    missing = [key for key in needed if key not in content]
    if missing:
        raise UsageError(f"parameters: {name}: {distribution} needs {' and '.join(missing)}")
    if distribution == "constant":
        return checked(Parameter(name, (content["value"],)))
    if distribution == "categorical":
        if not isinstance(content["values"], list) or not content["values"]:
            raise UsageError(f"parameters: {name}: values must be a list with something in it")
        return checked(Parameter(name, tuple(scalar(value) for value in content["values"])))
    if any(isinstance(bound, bool) or not isinstance(bound, int | float) for bound in bounds):
        raise UsageError(f"parameters: {name}: min and max must be numbers")
    if distribution == "int_uniform" and not whole:
        raise UsageError(f"parameters: {name}: int_uniform needs whole numbers")
    step = content.get("q", 1) if distribution.startswith("q_") else int(distribution == "int_uniform")
    if distribution.startswith("q_"):
        if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
            raise UsageError(f"parameters: {name}: q must be a number above 0")
        if not all(abs(bound / step) < 1e15 for bound in bounds):
            raise UsageError(f"parameters: {name}: there are too many steps of {step} in these bounds")
        bounds = [math.ceil(bounds[0] / step - 1e-9) * step, math.floor(bounds[1] / step + 1e-9) * step]
    if distribution == "log_uniform":  # there the bounds are exponents of e
        if max(bounds) > 700:
            raise UsageError(f"parameters: {name}: log_uniform takes exponents; e to the {max(bounds)} is too large")
        bounds = [math.exp(bound) for bound in bounds]
    return checked(Parameter(name, (), *bounds, step=step, log="log_uniform" in distribution))


def scalar(value):
    """YAML 1.1 reads 1e-4, without a point, as a string: take it for the number that it is."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


CONFIG_KEYS = {
    "program", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "command", "description",
    "project", "entity",
}  # fmt: skip


def read_config(path):
    """A YAML or JSON file in W&B's sweep schema as a dictionary of this script's options. UsageError."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UsageError("--config needs PyYAML: pip install pyyaml") from None
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error  # PyYAML lets its own errors out
    if not isinstance(config, dict):
        raise UsageError(f"--config {path}: expected keys and values, as in W&B's sweep configuration")
    unknown = sorted(map(str, config.keys() - CONFIG_KEYS))
    if unknown:
        raise UsageError(f"--config {path}: unknown key {unknown[0]} (known: {', '.join(sorted(CONFIG_KEYS))})")
    options = {"space": [], "bands": bands_of(path, config.get("early_terminate"))}

    def walk(parameters):
        if not isinstance(parameters, dict) or not parameters:
            raise UsageError(f"--config {path}: parameters must have at least one entry")
        for name, content in parameters.items():
            if isinstance(content, dict) and "parameters" in content:
                walk(content["parameters"])  # a group: W&B nests its parameters, a flag is known by its own name
            else:
                options["space"].append(parameter_from_config(str(name).replace("-", "_"), content))

    walk(config.get("parameters"))
    metric = config.get("metric", {})
    if not isinstance(metric, dict) or metric.keys() - {"name", "goal"} or (metric and "name" not in metric):
        raise UsageError(f"--config {path}: metric has a name and a goal, and nothing else here")
    for key, option, kind in (
        ("method", "method", str), ("run_cap", "count", int), ("name", "name", str), ("program", "script", str),
    ):  # fmt: skip
        if key in config:
            if not isinstance(config[key], kind) or isinstance(config[key], bool):
                raise UsageError(f"--config {path}: {key} must be a {kind.__name__}")
            options[option] = config[key]
    if options.get("count", 1) < 1:
        raise UsageError(f"--config {path}: run_cap must be at least 1")
    if metric:
        options["metric"] = str(metric["name"])
        goal = METRICS.get(options["metric"], metric.get("goal"))
        if metric.get("goal", goal) != goal:
            raise UsageError(f"--config {path}: metric {metric['name']}: the goal is to {goal} it")
    options["flags"] = flags_of_command(path, config.get("command", []))
    return options


def bands_of(path, rule):
    """The epochs at which a config's early_terminate compares the trials, and its eta: ([], 3) where there is none."""
    if rule is None:
        return [], 3
    where = f"--config {path}: early_terminate"
    if not isinstance(rule, dict) or rule.get("type") != "hyperband":
        raise UsageError(f"{where}: the only type is hyperband")
    unknown = sorted(map(str, rule.keys() - {"type", "min_iter", "max_iter", "s", "eta"}))
    if unknown:
        raise UsageError(f"{where}: {unknown[0]} is not supported")
    for key in rule.keys() - {"type"}:
        if isinstance(rule[key], bool) or not isinstance(rule[key], int) or rule[key] < (2 if key == "eta" else 1):
            raise UsageError(f"{where}: {key} must be a whole number above {1 if key == 'eta' else 0}")
    eta = rule.get("eta", 3)
    if "min_iter" in rule and "max_iter" not in rule:
        return [rule["min_iter"] * eta**power for power in range(12)], eta
    if "max_iter" in rule and "s" in rule and "min_iter" not in rule:
        return sorted({rule["max_iter"] // eta**power for power in range(1, rule["s"] + 1)} - {0}), eta
    raise UsageError(f"{where}: give min_iter, or max_iter with s")


# What may stand in a config's command, and is what the local engine does in any case.
COMMAND_MACROS = {"${env}", "${interpreter}", "${program}", "${args}", "python", "python3"}


def flags_of_command(path, command):
    """The flags that a config's `command` adds to those of the parameters. UsageError names an unknown macro."""
    if not isinstance(command, list):
        raise UsageError(f"--config {path}: command must be a list")
    words = []
    for word in map(str, command):
        variable = re.fullmatch(r"\$\{envvar:(\w+)\}", word)
        if variable:
            if variable[1] not in os.environ:
                raise UsageError(f"--config {path}: command: the environment has no {variable[1]}")
            words.append(os.environ[variable[1]])
        elif word.startswith("${") and word not in COMMAND_MACROS:
            raise UsageError(f"--config {path}: command: {word} is not supported")
        elif word not in COMMAND_MACROS:
            words.append(word)
    return words


# ---------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------

OWN_SCRIPTS = ("train_mnist.py", "train_cifar.py")
METRICS = {"val_loss": "minimize", "val_acc": "maximize"}

# What `trial_words` gives to every trial.
SET_BY_SWEEP = dict.fromkeys(
    ("--runs-dir", "--run-name", "--resume", "--stop-after", "--quiet", "--no-quiet", "--test", "--no-test"), ""
) | {"--seed": "; use --seed or --seeds of sweep.py"}

# The tutorials' own searches: script, space, flags.
CIFAR_SEARCH = (
    "train_cifar.py", ["c1=48,96", "c2=96,192", "l1=256,512"],
    ["--epochs", "10", "--lr", "0.001", "--batch-size", "512", "--tolerance", "3"],
)  # fmt: skip
MNIST_SEARCH = ("train_mnist.py", ["lr=log:1e-4..1e-1", "batch_size=32,64,128,256"], [])
DEFAULT_SEARCH = {"grid": CIFAR_SEARCH, "random": MNIST_SEARCH, "bayes": MNIST_SEARCH}


def build_parser():
    parser = common.ArgumentParser(prog="sweep.py", description=__doc__, usage="sweep.py [options] [-- FLAGS]")
    count = common.number(int, 1)

    flag = parser.add_argument_group("the search").add_argument
    flag("--method", choices=tuple(DEFAULT_SEARCH), help="grid: all combinations; bayes: Optuna proposes")
    flag("--script", metavar="FILE", help="training script: one with main(argv) -> dict, as train_mnist.py has")
    flag(
        "--param", action="append", default=[], metavar="NAME=SPEC", help="48,96 or 0.0..0.5 or int:64..512 or log:..."
    )
    flag("--config", type=Path, metavar="FILE", help="the search from a YAML or JSON file in W&B's sweep schema")
    flag("--metric", choices=tuple(METRICS), help="what decides, of each trial's best epoch (val_loss)")
    flag("--count", type=count, metavar="N", help="trials in all, of random and bayes (20)")
    flag("--seed", type=common.number(int, 0), default=42, metavar="N", help="of the draws, and of every trial")
    flag("--seeds", type=count, default=1, metavar="K", help="run each configuration with K seeds; their mean decides")

    flag = parser.add_argument_group("pruning, for grid and random: an iteration is one epoch").add_argument
    flag("--prune", action="store_true", help="successive halving: at each rung the best continue, the others end")
    flag("--eta", type=common.number(int, 2), default=3, metavar="N", help="one of so many continues")
    flag("--rungs", type=rung_list, metavar="A,B,...", help="epochs at which to prune (--epochs / eta, / eta**2, ...)")

    flag = parser.add_argument_group("who drives it").add_argument
    flag(
        "--engine",
        choices=("auto", "local", "wandb"),
        default="auto",
        help="auto: W&B for bayes with an API key, online",
    )
    flag("--sweep-id", metavar="ID", help="take trials from this W&B sweep, which other machines may share")
    flag("--wandb-project", default="image-classifiers", metavar="NAME", help="where W&B files the sweep")
    flag("--storage", metavar="URL", help="share the search --name with other machines: postgresql://..., mysql://... "
         "or a journal file on a shared disk")  # fmt: skip
    flag("--grace", type=common.number(float, 15), metavar="SECONDS",
         help="with --storage: trials of a machine that is silent for so long are run by another (60)")  # fmt: skip

    flag = parser.add_argument_group("running it").add_argument
    flag("--jobs", type=count, default=1, metavar="N", help="trials at a time, each in a process of its own")
    flag("--threads", type=count, metavar="N", help="of each trial; other numbers round differently (cores / --jobs)")
    flag("--max-failures", type=count, default=3, metavar="N", help="stop after so many failed trials in a row")
    flag("--runs-dir", type=common.absolute_path, default=common.HERE / "runs", metavar="DIR",
         help="where the sweep's directory is made")  # fmt: skip
    flag("--name", type=common.run_name, metavar="NAME", help="of the sweep; one that exists is continued")
    flag("--resume", type=common.absolute_path, metavar="SWEEP",
         help="continue the sweep in this directory; no other flag is needed")  # fmt: skip
    flag("--retry-failed", action="store_true", help="run only the failed trials again")
    flag("--dry-run", action="store_true", help="print the trials, run none")
    flag("--report", type=common.absolute_path, metavar="SWEEP", help="only make the report of this directory anew")
    flag("--quiet", action="store_true", help="print only errors")
    return parser


def rung_list(text):
    rungs = [common.number(int, 1)(part) for part in text.split(",")]
    if rungs != sorted(set(rungs)):
        raise ValueError("rungs must rise")
    return rungs


@dataclass
class Search:
    """What is searched: the part of a sweep that must stay the same when it is continued. It is sweep.json."""

    script: str
    method: str
    space: list
    flags: list
    metric: str
    count: int
    seed: int
    seeds: int
    prune: bool
    eta: int
    rungs: list
    bands: list
    threads: int
    sweep_id: str | None  # of the W&B sweep that drives it
    shared: bool = False  # with other machines, by --storage

    @property
    def sign(self):
        """1 where the metric is minimised, -1 where it is maximised."""
        return 1 if METRICS[self.metric] == "minimize" else -1

    @property
    def size(self):
        """How many configurations there are: infinity where a parameter is continuous."""
        return math.prod(len(p.values) or (p.steps() if p.step else math.inf) for p in self.space)


def as_json(search):
    """A Search as it is after a journey through JSON, where a tuple is a list."""
    return json.loads(json.dumps(asdict(search)))


def search_from(args, flags):
    """The Search that the arguments and the --config ask for. UsageError."""
    config = read_config(args.config) if args.config else {"space": [], "flags": [], "bands": ([], 3)}
    # A sweep that is joined brings its own method and parameters.
    method = args.method or config.get("method") or ("random" if args.sweep_id else None)
    if method not in DEFAULT_SEARCH:
        raise UsageError(
            "--method grid, random or bayes is needed" if not method else f"method {method} is not supported"
        )
    default_script, default_space, default_flags = DEFAULT_SEARCH[method]
    script = args.script or config.get("script", default_script)
    if find_script(script).parent == common.HERE:
        script = Path(script).name
    space = [*config["space"], *(parse_parameter(text) for text in args.param)]
    # The tutorial's own flags belong to its own search.
    flags = [*([] if space or args.sweep_id else default_flags), *config["flags"], *flags]
    if not space and not args.sweep_id:
        if script != default_script:
            raise UsageError(f"--script {script} needs its own search: --param NAME=SPEC or --config FILE")
        space = [parse_parameter(text) for text in default_space]
    for word in [*flags, *(f"--{parameter.name}" for parameter in space)]:
        word = word.split("=")[0].replace("_", "-")
        if word in SET_BY_SWEEP:
            raise UsageError(f"{word} is set by the sweep for every trial{SET_BY_SWEEP[word]}")
    names = [parameter.name for parameter in space]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the parameter {twice[0]} is there twice")
    metric = args.metric or config.get("metric", "val_loss")
    if metric not in METRICS:
        raise UsageError(f"metric {metric} is unknown: it is one of {', '.join(METRICS)}")
    if "label_smoothing" in names and metric == "val_loss":
        raise UsageError("the parameter label_smoothing changes what val_loss means: choose by --metric val_acc")
    count = args.count or config.get("count")
    if method == "grid":
        number = math.prod(len(parameter.grid()) for parameter in space)
        count = min(count or number, number)
    bands, eta = config["bands"]
    if method == "bayes" and (args.prune or bands):
        raise UsageError("--prune and early_terminate go with grid and random")
    if args.prune and bands:
        raise UsageError("--prune and the config's early_terminate: one at a time")
    try:
        args.name = args.name or ("name" in config and common.run_name(config["name"])) or None
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--config {args.config}: name: {error}") from None
    if not args.prune and args.rungs:
        raise UsageError("--rungs needs --prune")
    if (args.prune or bands) and args.seeds > 1:
        raise UsageError("pruning and --seeds: one at a time")
    if args.engine == "wandb" and (args.prune or args.seeds > 1):
        raise UsageError("--prune and --seeds go with --engine local")
    if args.storage:
        for flag, given in (
            ("--engine wandb", args.engine == "wandb"), ("--sweep-id", args.sweep_id), ("--prune", args.prune),
            ("a config's early_terminate", bands),
            ("--seeds with --method bayes", method == "bayes" and args.seeds > 1),
        ):  # fmt: skip
            if given:
                raise UsageError(f"--storage and {flag} do not go together")
        if not args.name:
            raise UsageError("--storage needs --name NAME: the machines find the search by it")
    return Search(
        script, method, space, flags, metric, count or 20, args.seed, args.seeds,
        args.prune, eta if bands else args.eta, args.rungs or [], bands,
        args.threads or max(1, available_cores() // args.jobs), args.sweep_id, bool(args.storage),
    )  # fmt: skip


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_script(script):
    """The path of a training script, here or beside this file. UsageError where there is none."""
    for path in (Path(script), common.HERE / script):
        if path.is_file() and path.suffix == ".py":
            return path.resolve()
    raise UsageError(f"--script {script}: there is no such Python file")


def load_script(script):
    """The module of a training script. UsageError where it is not one."""
    path = find_script(script)
    module = sys.modules.get(path.stem)
    if not module or Path(getattr(module, "__file__", None) or "").resolve() != path:
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        name = str(path) if module else path.stem  # never in the place of another module
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        raise UsageError(f"--script {script}: it has no function main(argv)")
    return module


def flag_words(params):
    """The parameters as words of a command line."""
    words = []
    for name, value in params.items():
        flag = f"--{name}".replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [f"{flag}={value}"]
    return words


def trial_words(search, params, seed):
    """The command line of a configuration, without what a trial is told beside."""
    return [*search.flags, *flag_words(params), "--seed", str(seed)]


def as_command(search, words):
    """The command line with these words, to be copied."""
    script = common.shown(common.HERE / search.script) if search.script in OWN_SCRIPTS else search.script
    return shlex.join(["python", script, *words])


def told_beside(directory, rung):
    """What a trial is told beside its configuration: where it runs, and not to read the test set."""
    stop = [f"--stop-after={rung}"] if rung else []
    return ["--no-test", "--quiet", "--runs-dir", str(directory.parent), "--run-name", directory.name, *stop]


def check_trials(search, configurations):
    """Exit with the script's own message where it refuses a trial; return the rungs of pruning. UsageError."""
    module, epochs = load_script(search.script), set()
    for params in configurations if hasattr(module, "parse_arguments") else ():
        words = [*trial_words(search, params, search.seed), *told_beside(Path("runs/trial-0000"), int(search.prune))]
        epochs.add(getattr(module.parse_arguments(words), "epochs", None))
    if not search.prune:
        return search.bands
    if len(epochs) != 1 or None in epochs:
        raise UsageError("--prune needs a number of epochs that is the same for all trials")
    last = epochs.pop()
    rungs = sorted(r for r in search.rungs or {last // search.eta**power for power in range(1, 20)} if 0 < r < last)
    if not rungs:
        raise UsageError(f"--prune: there is no rung between 0 and {last} epochs; see --rungs and --eta")
    return rungs


def configurations_to_check(search):
    """Configurations that the script is asked about before any starts: all, or the corners of a Bayesian search."""
    if search.method != "bayes":
        return planned_configurations(search)
    ends = [parameter.values or (parameter.low, parameter.high) for parameter in search.space]
    first = {parameter.name: values[0] for parameter, values in zip(search.space, ends, strict=True)}
    return [{**first, parameter.name: v} for parameter, values in zip(search.space, ends, strict=True) for v in values]


# ---------------------------------------------------------------------------------------------------
# Which configurations
# ---------------------------------------------------------------------------------------------------


def combinations(space):
    names = [parameter.name for parameter in space]
    for values in itertools.product(*(parameter.grid() for parameter in space)):
        yield dict(zip(names, values, strict=True))


def planned_configurations(search):
    """All configurations of a grid or a random search, in order: they follow from the search alone."""
    if search.method == "grid":
        return list(itertools.islice(combinations(search.space), search.count))
    generator = random.Random(f"{search.seed}")
    chosen = []
    # A small space runs out: then there are fewer trials than asked for.
    for _ in range(100 * search.count):
        params = {parameter.name: parameter.draw(generator) for parameter in search.space}
        if params not in chosen:
            chosen.append(params)
        if len(chosen) == search.count:
            break
    return chosen


def optuna_distribution(parameter):
    """A Parameter as Optuna knows it; a range that is both logarithmic and in steps is rounded afterwards."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values:
        return CategoricalDistribution(parameter.values)
    if parameter.log or not parameter.step:
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
    kind = IntDistribution if isinstance(parameter.step, int) else FloatDistribution
    return kind(parameter.low, parameter.high, step=parameter.step)


def make_sampler(search, known):
    """Optuna's sampler. `known`: how many configurations there are by now, so that a continued search draws others."""
    import optuna

    # A Gaussian process with few random trials before it finds better points sooner; its cost grows with the
    # cube of the trials, and past some two hundred the tree-structured estimator takes over.
    seed = common.random_seed(search.seed, "proposals", known) % 2**32
    if search.count <= 200:
        # Where another machine takes the trial that waits, Optuna draws one instead, which nobody runs: no warning.
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=5, warn_independent_sampling=False)
    return optuna.samplers.TPESampler(seed=seed)


def params_of(space, trial):
    """The parameters of an Optuna trial: where a range is both logarithmic and in steps, they are rounded here."""
    drawn = trial.params
    return {p.name: drawn[p.name] if p.values else p.at(drawn[p.name]) for p in space}


def draw_another(search, known):
    """Parameters at random that are not among `known`, or None where there are no others."""
    generator = random.Random(f"{search.seed} {len(known)}")
    for _ in range(1000):
        params = {parameter.name: parameter.draw(generator) for parameter in search.space}
        if params not in known:
            return params
    if search.size == math.inf:
        return None
    return next((params for params in combinations(search.space) if params not in known), None)


class BayesianProposer:
    """Optuna's proposals, told what every ended trial gave: rebuilt from trials.jsonl, so nothing else is kept."""

    def __init__(self, search, known):
        """`known`: how many configurations have been proposed before."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.search = optuna, search
        self.distributions = {parameter.name: optuna_distribution(parameter) for parameter in search.space}
        self.study = optuna.create_study(sampler=make_sampler(search, known), direction=METRICS[search.metric])
        self.asked = {}

    def propose(self, known):
        """Parameters that are not among `known`, or None where there seem to be no others."""
        for _ in range(10):
            trial = self.study.ask(self.distributions)
            params = params_of(self.search.space, trial)
            if params not in known:
                self.asked[json.dumps(params)] = trial
                return params
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return draw_another(self.search, known)  # a small space, most of it known

    def tell(self, params, value):
        """What a configuration gave; None for one that failed."""
        state = self.optuna.trial.TrialState
        trial = self.asked.pop(json.dumps(params), None)
        if trial is not None:
            self.study.tell(trial, value, state=None if value is not None else state.FAIL)
        elif value is not None:
            known = self.optuna.trial.create_trial(params=params, distributions=self.distributions, value=value)
            self.study.add_trial(known)


# ---------------------------------------------------------------------------------------------------
# The sweep's directory
# ---------------------------------------------------------------------------------------------------


def append_line(path, row):
    """Append a row to a file of JSON lines, whole, however many processes do so; a line torn by a crash goes first."""
    with common.locked(path.with_name(f".{path.name}.lock"), wait=True), open(path, "ab+") as file:
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path):
    """The rows of trials.jsonl, without a last one that a crash has torn. RunError names another bad line."""
    if not path.exists():
        return []
    lines, rows = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{common.shown(path)}, line {number}: {error}") from error
        if not isinstance(row, dict) or TRIAL_KEYS - row.keys() or not isinstance(row["params"], dict):
            raise RunError(f"{common.shown(path)}, line {number} is not that of a trial")
        rows.append(row)
    return rows


# What every line of trials.jsonl has.
TRIAL_KEYS = {
    "trial", "params", "status", "metric", "val_loss", "val_acc", "epochs", "seconds", "seed", "run", "error",
}  # fmt: skip


class Sweep:
    """A sweep's directory: `search` is sweep.json, `ended` the last line of trials.jsonl of each trial."""

    def __init__(self, directory, search):
        self.directory, self.search = directory, search
        self.path = directory / "trials.jsonl"
        self.lines = read_lines(self.path)

    @classmethod
    def open(cls, directory):
        """RunError where `directory` is not a sweep's."""
        path = directory / "sweep.json"
        if not path.is_file():
            raise RunError(f"{common.shown(directory)} is not a sweep: there is no sweep.json")
        content = common.read_json(path)
        try:
            space = [Parameter(**{**entry, "values": tuple(entry["values"])}) for entry in content["space"]]
            return cls(directory, Search(**{**content, "space": space}))
        except (KeyError, TypeError) as error:
            raise RunError(f"{common.shown(path)} is not of this version of the scripts ({error})") from error

    def write_search(self):
        common.write_json(self.directory / "sweep.json", asdict(self.search))

    @property
    def ended(self):
        """The last line of each trial, in the order of these lines: a trial may have been run again."""
        last = {line["trial"]: number for number, line in enumerate(self.lines)}
        return {self.lines[number]["trial"]: self.lines[number] for number in sorted(last.values())}

    def record(self, trial):
        """A trial's run.json, {} where there is none."""
        path = self.trial_directory(trial) / "run.json"
        return common.read_json(path) if path.exists() else {}

    def log(self, trial):
        """The epochs that a trial has behind it, [] where it keeps no log."""
        directory = self.trial_directory(trial)
        return common.read_log(directory) if (directory / "log.jsonl").exists() else []

    def trial_directory(self, trial):
        return self.directory / f"trial-{trial:04}"

    def seed(self, trial):
        return self.search.seed + trial % self.search.seeds

    def append(self, trial, params, status, record, error=None):
        """End a trial: one line in trials.jsonl. `record` is its run.json, or {} where there is none."""
        best = record.get("best") or {}
        line = {
            "trial": trial, "params": params, "status": status, "metric": best.get(self.search.metric),
            "val_loss": best.get("val_loss"), "val_acc": best.get("val_acc"), "epochs": record.get("epochs", 0),
            "seconds": record.get("seconds", 0.0), "seed": self.seed(trial), "run": self.trial_directory(trial).name,
            "error": error and error[:1000],
        }  # fmt: skip
        return self.add(line)

    def add(self, line):
        append_line(self.path, line)
        self.lines.append(line)
        return line

    def is_here(self, line):
        """Whether the trial of a line ran in this directory, and not on another machine."""
        return line["run"] == self.trial_directory(line["trial"]).name

    def configurations(self):
        """Configurations with an ended trial, in their order: (index, params, lines, mean metric or None)."""
        groups = {}
        for trial, line in sorted(self.ended.items()):
            groups.setdefault(trial // self.search.seeds, []).append(line)
        rows = []
        for index, lines in groups.items():
            values = [line["metric"] for line in lines if line["status"] == "finished"]
            whole = len(lines) == self.search.seeds and len(values) == len(lines)
            rows.append((index, lines[0]["params"], lines, statistics.fmean(values) if whole else None))
        return rows

    def ranked(self):
        """The configurations that ended well, best first."""
        ended = [row for row in self.configurations() if row[3] is not None]
        return sorted(ended, key=lambda row: self.search.sign * row[3])

    def worst(self):
        """The metric of the worst of them, or None."""
        ranked = self.ranked()
        return ranked[-1][3] if ranked else None


def choose_search(args, flags, defaults):
    """The Search that the arguments ask for, and the directory of a sweep to be continued, or None. UsageError."""
    if args.grace and not args.storage:
        raise UsageError("--grace means nothing without --storage")
    if args.resume:
        if not (args.resume / "sweep.json").is_file():
            raise UsageError(f"--resume {common.shown(args.resume)}: no sweep.json there, so it is not a sweep")
        given = [name for name in FIXED_BY_DIRECTORY if getattr(args, name) != getattr(defaults, name)]
        if given or flags:
            what = f"--{given[0].replace('_', '-')}" if given else f"the flags after --, {shlex.join(flags)}"
            raise UsageError(f"--resume takes the search from the directory: leave out {what}")
        search = Sweep.open(args.resume).search
        if search.shared != bool(args.storage):
            what = "give its --storage again" if search.shared else "leave out --storage"
            shared = f"{'' if search.shared else 'not '}shared"
            raise UsageError(f"--resume {common.shown(args.resume)}: this search is {shared}: {what}")
        if args.count and search.method == "grid":
            raise UsageError("--resume of a grid: leave out --count")
        search.count = args.count or search.count
        return search, args.resume
    search = search_from(args, flags)
    directory = args.runs_dir / args.name if args.name else None
    if directory is None or not directory.exists():
        if args.retry_failed and not args.storage:
            raise UsageError("--retry-failed needs a sweep that exists: --resume SWEEP")
        return search, None
    if not (directory / "sweep.json").is_file():
        if any(path.name != ".lock" for path in directory.iterdir()):
            raise UsageError(f"--name {args.name}: {common.shown(directory)} exists and is not a sweep")
        return search, directory  # a sweep that was killed before it was written down
    before, now = as_json(Sweep.open(directory).search), as_json(search)
    other = [key for key in now if key not in ("count", "threads", "sweep_id") and now[key] != before[key]]
    if other:
        what = f"its {other[0]} is {before[other[0]]}"
        raise UsageError(f"{common.shown(directory)} is another search: {what}; take another --name")
    search.threads, search.sweep_id = args.threads or before["threads"], args.sweep_id or before["sweep_id"]
    return search, directory


FIXED_BY_DIRECTORY = (
    "method", "script", "param", "config", "metric", "seed", "seeds", "prune", "eta", "rungs", "name", "runs_dir",
    "threads",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Many machines
# ---------------------------------------------------------------------------------------------------

BEAT = 5  # seconds between a trial's signs of life
POLL = 2  # seconds between two looks at what the other machines do
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before each new attempt when the storage does not answer


def open_storage(url):
    """Optuna's storage in the database at a URL, or in a journal file. UsageError; else what the driver raises."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from sqlalchemy import exc

    if "://" not in url:
        if not Path(url).parent.is_dir():
            raise UsageError(f"--storage {url}: there is no directory {Path(url).parent}")
        return JournalStorage(JournalFileBackend(url, JournalFileOpenLock(url)))
    # A network that is gone must not hold up a machine for as long as the system would wait.
    arguments = {}
    if re.match(r"postgresql(\+psycopg2?)?:", url):
        arguments = {"connect_timeout": 10, "tcp_user_timeout": 30_000}
    elif re.match(r"mysql(\+mysqldb|\+pymysql)?:", url):
        arguments = {"connect_timeout": 10, "read_timeout": 30}
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": arguments})
            except (exc.ProgrammingError, exc.IntegrityError, exc.OperationalError) as error:
                others = re.search("already exists|duplicate|unique", str(error), re.IGNORECASE)
                if not others or time.monotonic() > deadline:
                    raise
                time.sleep(1)  # another machine makes the tables at this moment
    except exc.ArgumentError as error:
        raise UsageError(f"--storage: {error}") from error
    except ImportError as error:
        raise UsageError(f"--storage {shown_url(url)}: {error.__cause__ or error}; install that driver") from error


def shown_url(url):
    """The URL without its password."""
    return re.sub(r"(//[^:/@]*:)[^@]*@", r"\1***@", url)


def failures():
    """What Optuna and the drivers below it raise where a storage does not answer, or holds what it should not."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    return OptunaError, SQLAlchemyError, OSError, RuntimeError, ValueError, KeyError


def persistent(method):
    """Let a method of SharedSearch try again for a minute where the storage does not answer; then RunError."""

    @functools.wraps(method)
    def attempts(self, *arguments):
        for pause in (*PAUSES, None):
            try:
                return method(self, *arguments)
            except failures() as error:
                if pause is None:
                    raise self.error(error) from error
                time.sleep(pause)

    return attempts


class SharedSearch:
    """A search in Optuna's storage, from which any number of machines take trials.

    An Optuna trial is a ticket for one `trial` of the search: queued by whoever finds that there is none, taken by one
    `machine`, and ended with the trial's `line` of trials.jsonl. A ticket that failed without a line has been given
    up, by the machine that stopped, or by another when that one was silent for too long; then there is none for this
    trial, and it is queued again. Where two machines queue the same trial at once, the first ticket holds.
    """

    def __init__(self, url, name, search, machine, grace):
        """`machine`: what the others are to call this one; `grace`: seconds after which a silent one is dead.

        UsageError where the storage holds another search of this name, RunError where it cannot be reached.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.state, self.taken_over = optuna.trial.TrialState, optuna.exceptions.UpdateFinishedTrialError
        self.url, self.search, self.machine, self.grace = url, search, machine, grace
        self.distributions = {parameter.name: optuna_distribution(parameter) for parameter in search.space}
        self.planned = planned_configurations(search) if search.method != "bayes" else []
        self.total = search.seeds * (len(self.planned) or min(search.count, search.size))
        self.mine = {}  # trial: the ticket that this machine has taken
        self.heard = {}  # number of a running ticket: its last sign of life, and when it was first seen here
        # What may differ from machine to machine is left out.
        wanted = {key: value for key, value in as_json(search).items() if key not in ("count", "threads")}
        try:
            storage = open_storage(url)
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
                optuna.create_study(storage=storage, study_name=name, direction=METRICS[search.metric])
            self.study = optuna.load_study(storage=storage, study_name=name)
            if "search" not in self.study.user_attrs:
                self.study.set_user_attr("search", wanted)
            found = self.study.user_attrs["search"]
        except failures() as error:
            raise self.error(error) from error
        other = [key for key in wanted if found.get(key) != wanted[key]]
        if other:
            raise UsageError(f"{shown_url(url)} holds another search {name}: its {other[0]} is {found.get(other[0])}")
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def error(self, error):
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        return RunError(f"--storage {shown_url(self.url)}: {reason}; the same command goes on from here")

    def beat(self):
        while not self.closing.wait(BEAT):
            for ticket in list(self.mine.values()):
                # Taken over by another machine, or the storage is away: the main thread will meet the same.
                with contextlib.suppress(*failures()):
                    ticket.set_user_attr("beat", time.time())

    def tickets(self):
        """{trial: the ticket that holds} and {trial: the last one that a machine has given up}."""
        holding, given_up = {}, {}
        for ticket in sorted(self.study.get_trials(deepcopy=False), key=lambda ticket: ticket.number):
            known = ticket.user_attrs
            if "trial" not in known:
                continue
            if ticket.state == self.state.FAIL and "line" not in known:
                if "machine" in known:
                    given_up[known["trial"]] = ticket
                continue
            before = holding.get(known["trial"])
            if before is None or known["attempt"] > before.user_attrs["attempt"]:
                holding[known["trial"]] = ticket
        return holding, given_up

    def queue(self, trial, params, attempt=1):
        self.study.enqueue_trial(params, user_attrs={"trial": trial, "attempt": attempt})

    def one_waits(self):
        """Whether a trial waits to be taken, where need be the first for which there is no ticket, which is queued."""
        holding, given_up = self.tickets()
        if any(ticket.state == self.state.WAITING for ticket in holding.values()):
            return True
        for trial in sorted({*range(self.total), *given_up}):
            again, held = given_up.get(trial), holding.get(trial)
            if again and (not held or again.user_attrs["attempt"] > held.user_attrs["attempt"]):
                self.queue(trial, again.params, again.user_attrs["attempt"])
                return True
            if not held:
                index = trial // self.search.seeds
                self.queue(trial, self.planned[index] if index < len(self.planned) else {})
                return True
        return False

    @persistent
    def give_up_silent(self):
        """Give up the tickets of machines that have not been heard of for too long."""
        now = time.monotonic()
        own = {ticket.number for ticket in self.mine.values()}
        for ticket in self.tickets()[0].values():
            if ticket.state != self.state.RUNNING or ticket.number in own:
                continue
            sign = ticket.user_attrs.get("beat")
            last, since = self.heard.setdefault(ticket.number, (sign, now))
            if last != sign:
                self.heard[ticket.number] = sign, now
            elif now - since > self.grace:
                line = ticket.user_attrs.get("line")  # it died between the last two things that `end` does
                self.close_ticket(ticket.number, line["metric"] if line and line["status"] == "finished" else None)

    @persistent
    def claim(self):
        """(trial, params) of a trial that is this machine's from now on, or None where there is none to be had."""
        while self.one_waits():
            tickets = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = make_sampler(self.search, f"{self.machine} {tickets}")
            try:
                ticket = self.study.ask(self.distributions)
                trial, (holding, given_up) = ticket.user_attrs.get("trial"), self.tickets()
                if trial not in holding or holding[trial].number != ticket.number:
                    self.close_ticket(ticket.number)  # there is another for this trial
                    continue
                params = params_of(self.search.space, ticket)
                if self.search.method == "bayes":
                    known = [
                        params_of(self.search.space, other) for other in (*holding.values(), *given_up.values())
                        if other.user_attrs["trial"] != trial and "machine" in other.user_attrs
                    ]  # fmt: skip
                    another = draw_another(self.search, known) if params in known else None
                    if another:
                        self.close_ticket(ticket.number)
                        self.queue(trial, another)
                        continue
                ticket.set_user_attr("machine", self.machine)
                self.mine[trial] = ticket
                return trial, params
            except self.taken_over:
                continue  # it took so long that this machine was taken for dead
        return None

    @persistent
    def end(self, trial, line, value):
        """Tell all machines how a trial of this one has ended, if it was not taken over by another.

        `value`: the metric, or what a Bayesian search is to take for it; None for a trial that failed.
        """
        with contextlib.suppress(self.taken_over):
            self.mine[trial].set_user_attr("line", line)
        self.close_ticket(self.mine[trial].number, value)
        del self.mine[trial]

    def close_ticket(self, number, value=None):
        state = self.state.FAIL if value is None else self.state.COMPLETE
        with contextlib.suppress(self.taken_over):  # by another machine, at the same moment
            self.study.tell(number, value, state, skip_if_finished=True)

    @persistent
    def ended(self):
        """{trial: (machine, line)} of what has ended anywhere."""
        return {
            trial: (ticket.user_attrs["machine"], ticket.user_attrs["line"])
            for trial, ticket in self.tickets()[0].items() if ticket.state.is_finished()
        }  # fmt: skip

    @persistent
    def retry_failed(self):
        for trial, ticket in self.tickets()[0].items():
            if ticket.state.is_finished() and ticket.user_attrs["line"]["status"] == "failed":
                self.queue(trial, ticket.params, ticket.user_attrs["attempt"] + 1)

    def close(self):
        """Give up what this machine has taken and not ended."""
        self.closing.set()
        self.thread.join(BEAT)
        try:
            while self.mine:
                self.close_ticket(self.mine.popitem()[1].number)
        except failures() as error:
            raise self.error(error) from error


# ---------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------


def work(connection, script, threads, log, directory):
    """A worker process: run main(argv) for each argv that comes, and answer with (record, None) or (None, error)."""
    os.chdir(directory)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tasks = queue.SimpleQueue()

    def listen():
        # In a thread of its own, so that a worker whose parent was killed ends at once, in the middle of a trial.
        argv = ()
        while argv is not None:
            try:
                argv = connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            tasks.put(argv)

    threading.Thread(target=listen, daemon=True).start()
    torch.set_num_threads(threads)
    common.loaded_images = {}
    main = load_script(script).main
    while (argv := tasks.get()) is not None:
        try:
            record = json.loads(json.dumps(main(argv), default=str))
            connection.send((record, None))
        except SystemExit as error:
            connection.send((None, f"the script ended with exit status {error.code}; see {log.name}"))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def interrupts_held():
    """Hold SIGINT back. A process started meanwhile never gets it: Ctrl-C is for the parent, which passes it on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What workers find imported, where they are forked; optimisers import the second when the first of them is made.
PRELOADED = ["torch", "torch._dynamo"]


class Workers:
    """Processes that keep torch and the data between trials; one that dies is replaced."""

    def __init__(self, jobs, search, directory):
        # Workers are forked from a process that has imported torch and done nothing else, where the system can fork.
        known = multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
        if "forkserver" in known:
            self.context.set_forkserver_preload(PRELOADED)
        self.search, self.directory = search, directory
        self.slots = [None] * jobs  # (process, connection)
        self.busy = {}  # slot: trial

    def idle(self):
        return [slot for slot in range(len(self.slots)) if slot not in self.busy]

    def submit(self, trial, argv):
        """Give a trial to an idle worker."""
        slot = self.idle()[0]
        if not self.slots[slot] or not self.slots[slot][0].is_alive():
            mine, theirs = self.context.Pipe()
            log = (self.directory / f"worker-{slot}.log").absolute()
            arguments = (theirs, self.search.script, self.search.threads, log, os.getcwd())
            process = self.context.Process(target=work, args=arguments)
            with interrupts_held():
                process.start()
            theirs.close()
            self.slots[slot] = process, mine
        self.busy[slot] = trial
        with contextlib.suppress(BrokenPipeError):  # it has just died: `wait` will say so
            self.slots[slot][1].send(argv)

    def wait(self, seconds):
        """Wait for the next workers to answer or die: [(trial, record or None, error or None)]; None: for ever."""
        connections = {self.slots[slot][1]: slot for slot in self.busy}
        answers = []
        for connection in multiprocessing.connection.wait(list(connections), seconds):
            slot = connections[connection]
            trial = self.busy.pop(slot)
            try:
                answers.append((trial, *connection.recv()))
            except (EOFError, OSError):
                process = self.slots[slot][0]
                process.join()
                answers.append((trial, None, f"its process died (exit code {process.exitcode})"))
        return answers

    def signal(self, number):
        for slot in self.busy:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.slots[slot][0].pid, number)

    def close(self):
        for process, connection in filter(None, self.slots):
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
            connection.close()


# ---------------------------------------------------------------------------------------------------
# Running the trials
# ---------------------------------------------------------------------------------------------------


def best_row(log, epochs):
    """The row of the best epoch among the first `epochs`: that of the lowest validation loss, as in training."""
    return min(log[:epochs], key=lambda row: row["val_loss"])


class Conductor:
    """Says which trial comes next, and takes note of what each gave."""

    def __init__(self, sweep, rungs, retry_failed, announce, shared=None):
        """`announce(line)` is told of every trial that ends; `shared`: the SharedSearch to take trials from."""
        self.sweep, self.search, self.rungs, self.announce = sweep, sweep.search, rungs, announce
        self.shared = shared
        self.running = {}  # trial: the epoch that it goes to, None for the end
        self.closed = set(sweep.ended)
        self.bayes, self.configurations, self.diverged_first = None, {}, []
        if shared:
            if retry_failed:
                shared.retry_failed()
            return
        if retry_failed:
            failed = {trial for trial, line in sweep.ended.items() if line["status"] == "failed"}
            self.closed = set(range(self.search.count * self.search.seeds)) - failed
        if self.search.method == "bayes":
            self.configurations = self.configurations_on_disk()
            self.bayes = BayesianProposer(self.search, len(self.configurations))
            for index in list(self.configurations):
                self.tell(index)
        else:
            self.configurations = dict(enumerate(planned_configurations(self.search)))

    def configurations_on_disk(self):
        """What has been proposed so far: the ended trials, and those that a stop has interrupted."""
        known = {}
        for path in sorted(self.sweep.directory.glob("trial-*/run.json")):
            trial = int(path.parent.name.removeprefix("trial-"))
            arguments = self.sweep.record(trial)["args"]
            known[trial // self.search.seeds] = {p.name: arguments[p.name] for p in self.search.space}
        return known | {index: params for index, params, _, _ in self.sweep.configurations()}

    def race(self):
        """Successive halving: {trial: epoch that it may go to, or None for the end}, of those still in the race.

        Where all that are left have reached a rung, the best of them go on and the others end. It follows from the
        logs alone, so that a sweep continued decides as one that was never stopped. (K. Jamieson and A. Talwalkar,
        "Non-stochastic best arm identification and hyperparameter optimization", 2016.)
        """
        field = list(self.configurations)
        logs = {trial: self.sweep.log(trial) for trial in field}
        for rung in self.rungs:
            field = [trial for trial in field if trial not in self.closed or len(logs[trial]) >= rung]
            behind = [trial for trial in field if len(logs[trial]) < rung]
            if behind or any(trial in field for trial, goal in self.running.items() if goal == rung):
                return dict.fromkeys(behind, rung)
            best = {trial: best_row(logs[trial], rung) for trial in field}
            field.sort(key=lambda trial: self.search.sign * best[trial][self.search.metric])
            kept = math.ceil(len(field) / self.search.eta)
            for trial in field[kept:]:
                if trial not in self.closed:
                    self.end_pruned(trial, logs[trial], best[trial])
            field = field[:kept]
        return dict.fromkeys(field)

    def pass_bands(self):
        """The rule of W&B's early_terminate: {trial: epoch that it may go to}, of those that have not ended.

        A trial that reaches a band is compared with all that have reached it by then, and ends where it is not among
        the best of them, one in eta. Nobody waits for the others, so what ends depends on the order.
        """
        open_to, sign, metric = {}, self.search.sign, self.search.metric
        logs = {trial: self.sweep.log(trial) for trial in self.configurations}
        for trial, log in logs.items():
            if trial in self.closed or trial in self.running:
                continue
            if len(log) in self.search.bands:
                reached = [rows for rows in logs.values() if len(rows) >= len(log)]
                values = sorted(sign * best_row(rows, len(log))[metric] for rows in reached)
                best = best_row(log, len(log))
                if sign * best[metric] > values[math.ceil(len(values) / self.search.eta) - 1]:
                    self.end_pruned(trial, log, best)
                    continue
            open_to[trial] = next((band for band in self.search.bands if band > len(log)), None)
        return open_to

    def end_pruned(self, trial, log, best):
        seconds = sum(row.get("seconds", 0.0) for row in log)
        self.end(trial, "pruned", {"best": best, "epochs": len(log), "seconds": seconds})

    def next_shared_trial(self):
        """As `next_trial`, of a search that is shared, after a look at what the other machines have done."""
        self.shared.give_up_silent()
        self.hear()
        while taken := self.shared.claim():
            trial, params = taken
            self.configurations[trial // self.search.seeds] = params
            line = self.sweep.ended.get(trial)
            if line and line["status"] != "failed" and line["params"] == params and self.sweep.is_here(line):
                self.tell_others(line)  # it ended here, when the storage could not be reached
                continue
            self.running[trial] = None
            return trial, None
        return None

    def hear(self):
        """Take note of what the other machines have ended."""
        known = self.sweep.ended
        for trial, (machine, line) in self.shared.ended().items():
            before, there = known.get(trial), {**line, "run": f"{machine}/{line['run']}"}
            if before not in (line, there):
                self.configurations[trial // self.search.seeds] = line["params"]
                self.announce(self.sweep.add(there))

    def tell_others(self, line):
        value = {"finished": line["metric"], "diverged": self.sweep.worst()}.get(line["status"])
        self.shared.end(line["trial"], line, value)

    def all_ended(self):
        """Whether all trials have ended, wherever they ran."""
        planned = min(self.search.count, len(self.configurations)) * self.search.seeds
        return set(range(self.shared.total if self.shared else planned)) <= set(self.sweep.ended)

    def next_trial(self):
        """(trial, epoch to stop after or None), or None where nothing can start now."""
        if self.shared:
            return self.next_shared_trial()
        if self.search.bands:
            open_to = self.pass_bands()
        else:
            open_to = self.race() if self.rungs else dict.fromkeys(range(self.search.count * self.search.seeds))
        for trial, rung in sorted(open_to.items()):
            if trial in self.closed or trial in self.running:
                continue
            record = self.sweep.record(trial)
            if record.get("status") == "diverged":  # the sweep was killed before it could take note
                self.end(trial, "diverged", record, record["error"])
            elif self.params(trial) is None:
                return None
            else:
                self.running[trial] = rung
                return trial, rung
        return None

    def params(self, trial):
        """The parameters of a trial, proposed if need be, or None where the space holds no more."""
        index = trial // self.search.seeds
        if index not in self.configurations and self.bayes:
            params = self.bayes.propose(list(self.configurations.values()))
            if params is not None:
                self.configurations[index] = params
        return self.configurations.get(index)

    def argv(self, trial, rung):
        """The command line of a trial: from the start, or from where it was interrupted."""
        directory = self.sweep.trial_directory(trial)
        params, record = self.params(trial), self.sweep.record(trial)
        goes_on = record and (directory / "last.pt").exists()
        if goes_on and self.shared and self.search.method == "bayes":  # another may have been proposed in its place
            goes_on = params.items() <= record["args"].items()
        if goes_on:
            return [f"--resume={directory}", "--quiet", *([f"--stop-after={rung}"] if rung else [])]
        if directory.exists():  # killed before it could be continued
            shutil.rmtree(directory)
        words = trial_words(self.search, params, self.sweep.seed(trial))
        return [*words, *told_beside(directory, rung)]

    def take(self, trial, record, error):
        """Take note of what a worker answered: a trial that was interrupted has not ended."""
        del self.running[trial]
        known = {"finished": "finished", "stopped_early": "finished", "diverged": "diverged", "interrupted": None}
        if not error:
            status = record.get("status") if isinstance(record, dict) else None
            metric = (record.get("best") or {}).get(self.search.metric) if status in known else None
            if status not in known:
                error = f"main(argv) gave no record of a run with a status of {', '.join(known)}"
            elif known[status] == "finished" and not (isinstance(metric, int | float) and math.isfinite(metric)):
                error = f"its record has no best {self.search.metric} that is a number"
        if error:
            self.end(trial, "failed", self.sweep.record(trial), error)
        elif known[status]:
            self.end(trial, known[status], record, record.get("error"))

    def end(self, trial, status, record, error=None):
        line = self.sweep.append(trial, self.params(trial), status, record, error)
        self.closed.add(trial)
        if self.shared:
            self.tell_others(line)
        if self.bayes:
            self.tell(trial // self.search.seeds)
        self.announce(line)

    def tell(self, index):
        """Tell the Bayesian search what a configuration gave, once all its trials have ended."""
        rows = {row[0]: row for row in self.sweep.configurations()}
        if index not in rows or len(rows[index][2]) < self.search.seeds:
            return
        _, params, lines, value = rows[index]
        # One that diverged counts as the worst so far, so that the search keeps away from there.
        if any(line["status"] == "diverged" for line in lines):
            value = self.sweep.worst()
            self.diverged_first += [index] if value is None else []
        self.bayes.tell(params, value)
        if value is not None:  # now there is a worst
            waiting, self.diverged_first = self.diverged_first, []
            for earlier in waiting:
                self.tell(earlier)


def how_to_go_on(sweep):
    storage = " --storage ..." if sweep.search.shared else ""
    return shlex.join(["python", common.shown(__file__), "--resume", common.shown(sweep.directory)]) + storage


def run_trials(sweep, rungs, args, shared):
    """Run what is left of a sweep, --jobs trials at a time; of a shared one, what no other machine runs.

    Returns the name of the signal that stopped it or None, and whether all its trials have ended. RunError after
    --max-failures failed trials in a row.
    """
    search, stopped, failed = sweep.search, [], []

    def stop(number, frame):
        if stopped:
            workers.signal(signal.SIGKILL)
            raise KeyboardInterrupt
        stopped.append(signal.Signals(number).name)
        workers.signal(signal.SIGTERM)

    def announce(line):
        if sweep.is_here(line):
            failed.append(line) if line["status"] == "failed" else failed.clear()
        best = sweep.ranked()
        bar.update()
        bar.set_postfix({f"best {search.metric}": f"{best[0][3]:.4f}" if best else "-"})
        if bar.disable:
            common.say(line_as_text(line, search), args.quiet)

    workers = Workers(args.jobs, search, sweep.directory)
    total, ended = search.count * search.seeds, len(sweep.ended)
    bar = tqdm(total=total, desc="trials", unit="trial", initial=ended, leave=False, disable=args.quiet or None)
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        conductor = Conductor(sweep, rungs, args.retry_failed, announce, shared)
        while True:
            while not stopped and len(failed) < args.max_failures and workers.idle():
                chosen = conductor.next_trial()
                if chosen is None or stopped:
                    break
                workers.submit(chosen[0], conductor.argv(*chosen))
                if stopped:  # while it was being submitted
                    workers.signal(signal.SIGTERM)
            if not workers.busy:
                # The others' trials may have to be run again here.
                if stopped or len(failed) >= args.max_failures or not shared or conductor.all_ended():
                    break
                time.sleep(POLL)
                continue
            for trial, record, error in workers.wait(POLL if shared else None):
                if stopped and error:
                    continue  # it ended because it was told to; a continued sweep takes it up again
                if isinstance(record, dict) and record.get("status") == "interrupted" and record.get("error"):
                    if stopped:
                        continue
                    error = f"its process was ended by {record['error']}"
                conductor.take(trial, record, error)
    finally:
        workers.close()
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
        if shared:
            shared.close()
    if len(failed) >= args.max_failures:
        raise RunError(
            f"{len(failed)} trials in a row failed, the last, {failed[-1]['run']}, with: {failed[-1]['error']}; when "
            f"that is mended: {how_to_go_on(sweep)}, with --retry-failed for the failed ones"
        )
    return stopped[0] if stopped else None, conductor.all_ended()


# ---------------------------------------------------------------------------------------------------
# Weights & Biases as the engine
# ---------------------------------------------------------------------------------------------------


def choose_engine(args, search):
    """`local` or `wandb`, as --engine says; of `auto` it is printed which, and why. UsageError."""
    engine = "wandb" if search.sweep_id else args.engine
    if search.shared:
        if not importlib.util.find_spec("optuna"):
            raise UsageError("--storage needs Optuna: pip install optuna")
        return "local"
    if engine == "auto" and search.method == "bayes":
        online = os.environ.get("WANDB_MODE", "online") == "online"
        key = online and importlib.util.find_spec("wandb") and common.has_wandb_key(quiet=True)
        engine = "wandb" if key else "local"
        reason = "an API key is configured" if key else "no API key is configured" if online else "W&B is not online"
        common.say(f"engine: {'W&B' if key else 'local, Optuna'} ({reason}; --engine chooses)", args.quiet)
    if engine == "wandb":
        common.check_wandb(argparse.Namespace(wandb="online", quiet=args.quiet))
        return engine
    if search.method == "bayes" and not importlib.util.find_spec("optuna"):
        raise UsageError("--method bayes needs Optuna: pip install optuna")
    return "local"


def reach_wandb():
    """RunError where W&B's server does not answer soon: its own client would try for minutes."""
    import wandb

    address = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(address, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        raise RunError(f"W&B's server {address} cannot be reached ({error}); --engine local does without") from error


def wandb_parameter(parameter):
    """A Parameter in the schema of W&B's sweeps."""
    if parameter.values:
        return {"values": list(parameter.values)}
    bounds = {"min": parameter.low, "max": parameter.high}
    if parameter.log:
        step = {"distribution": "q_log_uniform_values", "q": parameter.step}
        return bounds | (step if parameter.step else {"distribution": "log_uniform_values"})
    if not parameter.step:
        return bounds | {"distribution": "uniform"}
    if isinstance(parameter.step, int) and parameter.step == 1:
        return bounds | {"distribution": "int_uniform"}
    return bounds | {"distribution": "q_uniform", "q": parameter.step}


def observed_space(lines):
    """The parameters of a sweep that others have set up, as far as its trials show them."""
    space = []
    for name in dict.fromkeys(name for line in lines for name in line["params"]):
        values = sorted(
            {line["params"][name] for line in lines if name in line["params"]}, key=lambda v: (str(type(v)), v)
        )
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numbers and len(values) > 6:
            low, high = min(values), max(values)
            space.append(Parameter(name, (), low, high, log=0 < low <= high / 100))
        else:
            space.append(Parameter(name, tuple(values)))
    return space


def run_wandb(sweep, args):
    """Run the trials that a W&B sweep gives out, here in this process; each is written to trials.jsonl as well.

    Returns as `run_trials` does. W&B's agent returns nothing and hides what failed, so each outcome is looked at here.
    """
    import wandb
    import yaml

    search, stopped = sweep.search, []
    main = load_script(search.script).main
    common.loaded_images = {}
    os.environ.setdefault("WANDB_DIR", str(sweep.directory))
    reach_wandb()
    joined = not search.space
    if not search.sweep_id:
        config = {
            "program": search.script, "method": search.method, "run_cap": search.count,
            "metric": {"name": search.metric, "goal": METRICS[search.metric]},
            "parameters": {parameter.name: wandb_parameter(parameter) for parameter in search.space},
        }  # fmt: skip
        search.sweep_id = wandb.sweep(config, project=args.wandb_project)
        sweep.write_search()
    common.say(f"W&B sweep {search.sweep_id}; another machine joins with --sweep-id {search.sweep_id}", args.quiet)

    def trial():
        known = [int(path.name.removeprefix("trial-")) for path in sweep.directory.glob("trial-*")]
        number = max([*known, *sweep.ended], default=-1) + 1
        directory = sweep.trial_directory(number)
        # The agent leaves the parameters of the run in this file.
        content = yaml.safe_load(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text())
        params = {name: entry["value"] for name, entry in content.items() if isinstance(entry, dict)}
        words = [*trial_words(search, params, search.seed), *told_beside(directory, None)]
        status, error, record = "failed", None, {}
        try:
            record = main([*words, "--wandb", "online", "--wandb-project", args.wandb_project])
            status = {"finished": "finished", "stopped_early": "finished"}.get(record["status"], "diverged")
            error = record["error"]
        except SystemExit as failure:
            error = f"the script ended with exit status {failure.code}"
            raise RunError(error) from failure
        except Exception as failure:
            # The agent stops a run by raising a bare Exception in its thread.
            told = type(failure) is Exception and not failure.args
            status, error = ("pruned", None) if told else ("failed", f"{type(failure).__name__}: {failure}")
            raise
        finally:
            if not stopped:
                line = sweep.append(number, params, status, record or sweep.record(number), error)
                common.say(line_as_text(line, search), args.quiet)

    def stop(number, frame):
        stopped.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        left = max(0, search.count - len(sweep.ended))
        if left:
            wandb.agent(search.sweep_id, function=trial, project=args.wandb_project, count=left)
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if joined:
        search.space = observed_space(sweep.lines)
        sweep.write_search()
    if sweep.lines and not any(line["status"] in ("finished", "pruned") for line in sweep.lines):
        raise RunError(f"all {len(sweep.lines)} trials failed, the last with: {sweep.lines[-1]['error']}")
    return stopped[0] if stopped else None, bool(sweep.lines) and not stopped


def line_as_text(line, search):
    value = "-" if line["metric"] is None else f"{line['metric']:.4f}"
    params = " ".join(f"{name}={value}" for name, value in line["params"].items())
    error = f"  {line['error']}" if line["error"] else ""
    return f"{line['run']}  {line['status']} after {line['epochs']} epochs  {search.metric} {value}  {params}{error}"


def dry_run(search, quiet):
    """Print the command line of each trial; of a Bayesian search the space, since each trial follows from the last."""
    if search.method == "bayes":
        common.say(f"{search.count} trials of {search.script}, proposed one after the other from", quiet)
        for parameter in search.space:
            steps = f" in steps of {parameter.step}" if parameter.step else ""
            scale = ", logarithmic" if parameter.log else ""
            text = ", ".join(map(str, parameter.values)) or f"{parameter.low} to {parameter.high}{steps}{scale}"
            common.say(f"  {parameter.name}: {text}", quiet)
        return
    for index, params in enumerate(planned_configurations(search)):
        for repeat in range(search.seeds):
            words = trial_words(search, params, search.seed + repeat)
            common.say(f"trial {index * search.seeds + repeat:4}  {as_command(search, words)}", quiet)


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------


def draw_sweep(sweep):
    """The pictures of a sweep as {name: figure}; those that need results are left out where there are none."""
    lines = [line for line in sweep.ended.values() if line["status"] in ("finished", "pruned")]
    figures = {"history": draw_history(sweep), "curves": draw_trial_curves(sweep)}
    if lines:
        figures["parallel"] = draw_parallel(sweep, lines)
        figures["slices"] = draw_slices(sweep, lines)
    shares = parameter_importance(sweep, lines)
    if shares:
        figures["importance"] = draw_importance(sweep, shares)
    return figures


def best_first(sweep, lines):
    return sorted(lines, key=lambda line: sweep.search.sign * line["metric"])


def sweep_title(sweep, what):
    return f"{sweep.directory.name}\n{what}"


def place_on_axis(parameter, value):
    """Where a value of a parameter lies on its axis, from 0 to 1."""
    if parameter.values:
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    low, high, value = (math.log(x) if parameter.log else x for x in (parameter.low, parameter.high, value))
    return (value - low) / (high - low)


def axis_ticks(parameter):
    """(place, label) of the ticks of a parameter: all values, or some between the bounds, as the scale is divided."""
    if parameter.values:
        return [(place_on_axis(parameter, value), str(value)) for value in parameter.values]
    if parameter.log:
        exponents = range(
            math.ceil(math.log10(parameter.low) - 1e-9), math.floor(math.log10(parameter.high) + 1e-9) + 1
        )
        marks = {parameter.low, parameter.high, *(10.0**exponent for exponent in exponents)}
    else:
        marks = {parameter.low + share * (parameter.high - parameter.low) / 4 for share in range(5)}
    return [(place_on_axis(parameter, mark), f"{mark:.3g}") for mark in sorted(marks)]


def draw_parallel(sweep, lines):
    """Parallel coordinates: a line a trial, through its parameters to its metric, which gives the colour."""
    import matplotlib
    from matplotlib.colors import Normalize

    search, ordered = sweep.search, best_first(sweep, lines)
    values = [line["metric"] for line in lines]
    low, high = min(values), max(values)
    scale = Normalize(low, high if high > low else low + 1)
    colours = matplotlib.colormaps["viridis" if search.sign < 0 else "viridis_r"]
    figure = new_figure(3 + 2 * len(search.space), 5.5, sweep_title(sweep, f"{len(lines)} trials; the best is thick"))
    axis = figure.subplots()
    for line in reversed(ordered):
        places = [place_on_axis(parameter, line["params"][parameter.name]) for parameter in search.space]
        look = {"linewidth": 4, "zorder": 3} if line is ordered[0] else {"linewidth": 1.2, "alpha": 0.8}
        axis.plot([*places, scale(line["metric"])], color=colours(scale(line["metric"])), **look)
    for index, parameter in enumerate(search.space):
        axis.axvline(index, color="black", linewidth=1)
        for place, label in axis_ticks(parameter):
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
            axis.annotate(label, (index, place), (4, 0), textcoords="offset points", va="center", fontsize=9, bbox=box)
    last = len(search.space)
    names = [f"{p.name} (log)" if p.log else p.name for p in search.space]
    axis.set(
        xticks=range(last + 1), xticklabels=[*names, search.metric], yticks=[], xlim=(-0.15, last), ylim=(-0.05, 1.05)
    )
    for side in ("top", "bottom", "left", "right"):
        axis.spines[side].set_visible(False)
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, colours), ax=axis, label=search.metric, pad=0)
    return figure


def parameter_importance(sweep, lines):
    """Share of each parameter in what sets good trials apart, by PED-ANOVA; {} where there is too little to say.

    S. Watanabe et al., "PED-ANOVA: efficiently quantifying hyperparameter importance in arbitrary subspaces" (2023).
    """
    varied = [p for p in sweep.search.space if len({str(line["params"][p.name]) for line in lines}) > 1]
    if len(varied) < 2 or len(lines) < 8 or not importlib.util.find_spec("optuna"):
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=METRICS[sweep.search.metric])
    distributions = {p.name: optuna_distribution(p) for p in varied}
    for line in lines:
        params = {p.name: line["params"][p.name] for p in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=line["metric"]))
    # The quarter of the best against all: the default tenth is a trial or two of a small search.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25, region_quantile=1.0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def draw_importance(sweep, shares):
    rows = sorted(shares.items(), key=lambda row: row[1])
    figure = new_figure(7, 1.8 + 0.45 * len(rows), sweep_title(sweep, "importance of each parameter (PED-ANOVA)"))
    axis = figure.subplots()
    bars = axis.barh([name for name, _ in rows], [share for _, share in rows], color=BLUE)
    axis.bar_label(bars, [f" {share:.0%}" for _, share in rows])
    axis.set(xlabel="share", xlim=(0, 1.1))
    percent_axis(axis.xaxis)
    return figure


def draw_history(sweep):
    """The metric of every trial in the order in which they ended, and the best so far."""
    search = sweep.search
    figure = new_figure(8, 4.5, sweep_title(sweep, "trial by trial"))
    axis = figure.subplots()
    lines = [(place, line) for place, line in enumerate(sweep.ended.values(), 1)]
    for status, marker, colour in (("finished", "o", BLUE), ("pruned", "x", "grey")):
        shown = [(place, line["metric"]) for place, line in lines if line["status"] == status]
        if shown:
            axis.plot(*zip(*shown, strict=True), marker, color=colour, label=status)
    best, steps = None, []
    for place, line in lines:
        if line["status"] == "finished" and (best is None or search.sign * line["metric"] < search.sign * best):
            best = line["metric"]
        if best is not None:
            steps.append((place, best))
    if steps:
        axis.step(*zip(*steps, strict=True), where="post", color=ORANGE, label="best so far")
    for place, line in lines:
        if line["status"] in ("failed", "diverged"):
            axis.axvline(place, color="black", linestyle=":", alpha=0.5)
            where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90, "va": "top"}
            axis.annotate(line["status"], (place, 1), (2, -4), fontsize=8, **where)
    axis.set(xlabel="trials ended", ylabel=search.metric)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return figure


def draw_slices(sweep, lines):
    """The metric against each parameter; a grid of two as a heatmap."""
    search = sweep.search
    if search.method == "grid" and len(search.space) == 2:
        return draw_grid_of_two(sweep)
    columns = min(3, len(search.space))
    rows = math.ceil(len(search.space) / columns)
    figure = new_figure(4 * columns + 0.5, 3.4 * rows + 0.6, sweep_title(sweep, "the metric against each parameter"))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    winner = best_first(sweep, lines)[0]
    for axis, parameter in zip(axes, search.space, strict=False):
        for line in lines:
            place = place_on_axis(parameter, line["params"][parameter.name])
            marker = "x" if line["status"] == "pruned" else "o"
            axis.plot(place, line["metric"], marker, color="grey" if marker == "x" else BLUE, alpha=0.7)
        best = place_on_axis(parameter, winner["params"][parameter.name])
        axis.plot(best, winner["metric"], "*", color=ORANGE, markersize=14)
        places, labels = zip(*axis_ticks(parameter), strict=True)
        axis.set(xlabel=f"{parameter.name} (log)" if parameter.log else parameter.name, xlim=(-0.08, 1.08))
        axis.set_xticks(places, labels)
        axis.grid(alpha=0.3)
    for axis in axes[len(search.space) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel(search.metric)
    return figure


def draw_grid_of_two(sweep):
    down, across = sweep.search.space
    cells = torch.full((len(down.grid()), len(across.grid())), math.nan)
    for _, params, shown, mean in sweep.configurations():
        value = shown[0]["metric"] if mean is None else mean
        if value is not None:
            cells[down.grid().index(params[down.name]), across.grid().index(params[across.name])] = value
    figure = new_figure(2.5 + cells.shape[1], 2 + 0.7 * cells.shape[0], sweep_title(sweep, sweep.search.metric))
    axis = figure.subplots()
    shown = axis.imshow(
        cells.numpy(), cmap=colormap("viridis" if sweep.search.sign < 0 else "viridis_r"), aspect="auto"
    )
    figure.colorbar(shown, ax=axis, label=sweep.search.metric)
    for row, column in (~cells.isnan()).nonzero().tolist():
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 2}
        axis.text(column, row, f"{cells[row, column]:.4f}", ha="center", va="center", bbox=box)
    axis.set_xticks(range(cells.shape[1]), map(str, across.grid()))
    axis.set_yticks(range(cells.shape[0]), map(str, down.grid()))
    axis.set(xlabel=across.name, ylabel=down.name)
    return figure


def draw_trial_curves(sweep):
    """Validation loss and accuracy of all trials, epoch by epoch; the end of a pruned or diverged one is marked."""
    figure = new_figure(11, 4.4, sweep_title(sweep, "all trials; the best in colour"))
    axes = curves_axes(figure)
    lines = sweep.ended
    best = best_first(sweep, [line for line in lines.values() if line["status"] == "finished"])
    for trial, line in lines.items():
        history = sweep.log(trial) if sweep.is_here(line) else []
        if not history:
            continue
        look = {"color": "silver", "linewidth": 1}
        if best and line is best[0]:
            look = {"color": ORANGE, "linewidth": 2.5, "zorder": 3, "label": line["run"]}
        for axis, name in zip(axes, ("val_loss", "val_acc"), strict=True):
            axis.plot([row["epoch"] for row in history], [row[name] for row in history], **look)
            if line["status"] != "finished":
                axis.plot(history[-1]["epoch"], history[-1][name], "x", color="black", markersize=5)
    if axes[0].get_legend_handles_labels()[1]:  # the best may have run on another machine
        axes[0].legend()
    return figure


# ---------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------


def leaderboard(sweep):
    """A row for each configuration, best first, then those without a result, each parameter in a column of its own."""
    search = sweep.search
    place = {row[0]: number for number, row in enumerate(sweep.ranked())}
    rows = []
    for _, params, lines, mean in sorted(sweep.configurations(), key=lambda row: place.get(row[0], math.inf)):
        values = [line["metric"] for line in lines if line["metric"] is not None]
        accuracies = [line["val_acc"] for line in lines if line["val_acc"] is not None]
        rows.append({
            "trial": " ".join(str(line["trial"]) for line in lines),
            search.metric: mean if mean is not None or not values else statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "accuracy": statistics.fmean(accuracies) if accuracies else None,
            "epochs": max(line["epochs"] for line in lines), "seconds": sum(line["seconds"] for line in lines),
            "status": " ".join(sorted({line["status"] for line in lines})),
        })  # fmt: skip
        for name, value in params.items():
            rows[-1][name if name not in rows[-1] else f"--{name}"] = value
        if search.seeds == 1:
            del rows[-1]["std"]
    return rows


def best_trial(sweep):
    """The line of the best trial of the best configuration, or None."""
    ranked = sweep.ranked()
    if not ranked:
        return None
    return min(ranked[0][2], key=lambda line: sweep.search.sign * line["metric"])


def report(sweep, quiet=False, complete=True):
    """Print the table, best first, and the best configuration as a command line; write leaderboard.csv, `best`, and
    the pictures. Where the sweep is complete, the test set is read, once, for the winner alone."""
    say = functools.partial(common.say, quiet=quiet)
    search, rows = sweep.search, leaderboard(sweep)
    if not rows:
        say(f"{common.shown(sweep.directory)}: no trial has ended yet")
        return {"directory": str(sweep.directory), "trials": []}

    def text(value):
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
        return "-" if value is None else str(value)

    cells = [[text(value) for value in row.values()] for row in rows]
    say("\n".join(evaluate.as_table("<" + ">" * (len(rows[0]) - 1), list(rows[0]), cells)))
    common.write_atomically(sweep.directory / "leaderboard.csv", f"{evaluate.as_csv(rows)}\n".encode())
    for file, figure in draw_sweep(sweep).items():
        common.write_atomically(sweep.directory / f"{file}.png", evaluate.render(figure))
    winner = best_trial(sweep)
    if winner:
        command = as_command(search, trial_words(search, winner["params"], winner["seed"]))
        say(f"best: {winner['run']}, {search.metric} {winner['metric']:.4f}\n  {command}")
    link = sweep.directory / "best"
    if not winner or not sweep.is_here(winner):
        link.unlink(missing_ok=True)
    else:
        temporary = link.with_name(f".best.{os.getpid()}.tmp")
        temporary.symlink_to(winner["run"])
        temporary.replace(link)
        if complete and search.script in OWN_SCRIPTS:
            directory = sweep.directory / winner["run"]
            path = directory / "metrics.json"
            if not path.exists() or common.read_json(path)["split"] != "test":
                evaluate.main([str(directory), "--quiet"])
            accuracy = common.read_json(path)["accuracy"]
            say(f"  test accuracy {accuracy:.2%}, read once and for this trial alone")
    return {"directory": str(sweep.directory), "trials": sweep.lines, "best": winner}


def main(argv=None):
    """Run, continue or report a search; return its directory, the lines of trials.jsonl and that of the best trial."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if args.report:
        return report(Sweep.open(args.report), args.quiet, complete=False)
    search, directory = choose_search(args, flags, parser.parse_args([]))
    rungs = check_trials(search, configurations_to_check(search))
    if args.dry_run:
        dry_run(search, args.quiet)
        return {}
    engine = choose_engine(args, search)
    shared = None
    if search.shared:
        place = (directory or args.runs_dir / args.name).resolve()
        machine = f"{socket.gethostname()}:{place}"
        shared = SharedSearch(args.storage, place.name, search, machine, args.grace or 60)
    is_new, own_name = directory is None, f"sweep-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    directory = directory or args.runs_dir / (args.name or own_name)
    directory.mkdir(parents=True, exist_ok=True)
    with common.locked(directory / ".lock"):
        if is_new and (directory / "sweep.json").exists():  # another process has made it at the same moment
            raise UsageError(f"--name {args.name}: {common.shown(directory)} exists already")
        sweep = Sweep(directory, search)
        sweep.write_search()
        if engine == "wandb":
            stopped, complete = run_wandb(sweep, args)
        else:
            stopped, complete = run_trials(sweep, rungs, args, shared)
        result = report(sweep, args.quiet, complete)
    common.say(f"{common.shown(directory)}: {len(sweep.ended)} trials have ended", args.quiet)
    if complete and not sweep.ranked():
        raise RunError(f"{common.shown(directory)}: no trial finished; the errors are in {common.shown(sweep.path)}")
    status = "interrupted" if stopped else "finished"
    return {**result, "status": status, "error": stopped, "go_on": how_to_go_on(sweep)}


if __name__ == "__main__":
    sys.exit(common.command_line(main))
