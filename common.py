"""What the scripts share: options, data, augmentation, models, the training loop and its run directory.

The sections follow the data: options -> data -> augmentation -> models -> one epoch -> early stopping
-> run directory -> fit. A script supplies its flags' defaults and calls `run_job(parse_arguments(...))`.
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: there, do not resume one run from two processes.
    fcntl = None


class UsageError(Exception):
    """A request that cannot be met as it was asked: one line, exit status 2."""


class RunError(Exception):
    """A failure that the user can cause and mend (data, disk, checkpoint): one line, exit status 1."""


# ---------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and ends the help of each flag with its default."""

    def _get_help_string(self, action):
        unset = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return f"{action.help or ''}{'' if unset else ' (%(default)s)'}".strip()


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line per error, a suggestion for a mistyped flag, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            close = difflib.get_close_matches(unknown[1], flags, n=1)
            message += f" (did you mean {close[0]}?)" if close else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")

    def add_recipes(self, recipes):
        """Have --recipe NAME set the defaults of the other flags to those of `recipes[NAME]`, {flag: value}.

        What a recipe does not name is as in the first, which counts where none is asked for.
        """
        first = next(iter(recipes))
        named = {name: self.get_default(name) for recipe in recipes.values() for name in recipe}
        defaults = {name: {**named, **recipes[first], **recipe} for name, recipe in recipes.items()}

        class Recipe(argparse.Action):
            def __call__(self, parser, namespace, name, option=None):
                parser.set_defaults(**defaults[name])
                setattr(namespace, self.dest, name)

        text = "defaults of all other flags; --recipe NAME --help shows them"
        self.add_argument("--recipe", choices=tuple(recipes), action=Recipe, help=text)
        self.set_defaults(recipe=first, **defaults[first])


def number(kind, low=-math.inf, high=math.inf, above=None, below=None):
    """An argparse `type`: a finite `kind` (int or float), at least `low` or above `above`, up to `high` or `below`."""
    bounds = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
    bounds += [f"above {above}"] * (above is not None) + [f"below {below}"] * (below is not None)
    wanted = f"{'a whole number' if kind is int else 'a number'} {' and '.join(bounds)}"

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            inside = low <= value <= high and (above is None or above < value) and (below is None or value < below)
            if inside and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {wanted}, not {text!r}")

    return parse


def odd_number(text):
    value = number(int, 1)(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f"expected an odd number, not {text!r}")
    return value


def sizes(text):
    return [number(int, 4)(side) for side in text.split(",")]


def run_name(text):
    if text in ("", ".", "..") or not {"/", os.sep, "\0"}.isdisjoint(text):
        raise argparse.ArgumentTypeError(f"expected the name of a directory without separators, not {text!r}")
    return text


def add_options(parser, datasets):
    """The flags that every training script has; a script sets their defaults with `parser.add_recipes`."""
    count, share, probability = number(int, 1), number(float, 0, below=1), number(float, 0, 1)
    switch = argparse.BooleanOptionalAction

    flag = parser.add_argument_group("data").add_argument
    names = f"{', '.join(datasets)}, synthetic, or a folder of images"
    flag("--dataset", metavar="NAME|PATH", help=f"{names}: PATH/<class>/*, or PATH/train/<class>/* and PATH/test/...")
    flag("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where the datasets lie, or are put")
    flag("--data-url", metavar="URL|PATH", help="another place of CIFAR's archive, or of MNIST's folder of .gz files")
    flag("--image-size", type=count, metavar="PIXELS", help="images from a folder are resized to this square")
    flag("--val-size", type=share, default=0.1, metavar="PART", help="of the training images; 0: use the test set")
    flag("--limit-train", type=count, metavar="IMAGES", help="train on so many only")
    flag("--normalize", choices=("half", "dataset"), default="half", help="mean and std: 0.5, or the training images'")

    flag = parser.add_argument_group("augmentation of the training images, each with its own parameters").add_argument
    flag("--augment", action=switch, help="change each training image at random, every epoch anew")
    flag("--rotation", type=number(float, 0, 180), metavar="DEGREES", help="turn by up to so many, either way")
    flag("--brightness", type=probability, metavar="PART", help="make brighter or darker by up to this part")
    flag("--hue", type=number(float, 0, 0.5), metavar="TURNS", help="turn the hue by up to so much, 1 all round")
    flag("--flip", type=probability, metavar="PROBABILITY", help="mirror left to right")
    flag("--alternate-flip", action=switch, default=False, help="draw the flips once, and invert them every epoch")
    flag("--shift", type=number(int, 0), default=0, metavar="PIXELS", help="move by up to so many along each axis")

    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=tuple(MODELS), help="architecture")
    for name, kind, metavar, text in (
        ("c1", count, "CHANNELS", "channels of the first convolutions"),
        ("c2", count, "CHANNELS", "channels of the later convolutions"),
        ("c3", count, "CHANNELS", "channels of the last convolutions"),
        ("l1", count, "UNITS", "units of the hidden dense layer"),
        ("d1", share, "PROBABILITY", "dropout"),
        ("kernel_size", odd_number, "PIXELS", "side of the convolution kernels, odd"),
    ):
        options = {model: options[name] for model, options in model_options().items() if name in options}
        defaults = ", ".join(f"{model} {default}" for model, default in options.items())
        flag(f"--{name}".replace("_", "-"), type=kind, metavar=metavar, help=f"{text} ({defaults})")

    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=count, metavar="N", help="passes over the training images, at most")
    flag("--batch-size", type=count, metavar="IMAGES", help="images in one step")
    flag("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="sgd has Nesterov momentum")
    flag("--lr", type=number(float, above=0), metavar="RATE", help="learning rate, the peak of the schedule")
    flag("--schedule", choices=tuple(SCHEDULES), default="constant", help="course of the learning rate")
    flag("--aux-lr", type=number(float, above=0), default=0.03, metavar="RATE", help="of what muon leaves to AdamW")
    flag("--momentum", type=share, default=0.9, metavar="FACTOR", help="momentum of sgd and muon")
    flag("--weight-decay", type=number(float, 0), default=0.0, metavar="FACTOR", help="decoupled in adamw, muon")
    flag("--sizes", type=sizes, metavar="PIXELS,...", help="sides of the training images, over equal parts of the run")
    text = "of the target, in training and validation, spread over all classes"
    flag("--label-smoothing", type=share, default=0.0, metavar="PART", help=text)
    flag("--tolerance", type=number(int, 0), metavar="EPOCHS", help="stop after so many without a new best; 0: never")
    flag("--seed", type=number(int, 0), default=42, metavar="N", help="of split, weights, order, augmentation, dropout")

    flag = parser.add_argument_group("machine").add_argument
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: a GPU where there is one")
    flag("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: what the hardware computes fast")
    flag("--compile", action=switch, default=False, help="torch.compile: a slow start, faster steps on a GPU")

    flag = parser.add_argument_group("run").add_argument
    flag("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where the run's directory is made")
    flag("--run-name", type=run_name, metavar="NAME", help="name of the new directory (script-time-four characters)")
    flag("--resume", type=Path, metavar="RUN", help="continue the run in this directory; --epochs may be raised")
    flag("--stop-after", type=count, metavar="N", help="leave after epoch N, to be continued with --resume")
    text = "save after an epoch if the last save was so long ago, and at the end (0: after every epoch)"
    flag("--save-interval", type=number(float, 0), default=0.0, metavar="SECONDS", help=text)
    flag("--test", action=switch, default=True, help="read the test set, once, at the end")
    flag("--tta", choices=tuple(TTA), help="test-time augmentation: views of a test image to be averaged")
    text = "average views only of images that by themselves give no class more than this"
    flag("--tta-below", type=probability, default=1.0, metavar="PROBABILITY", help=text)
    flag("--quiet", action="store_true", help="print only errors")
    flag("--wandb", choices=("disabled", "offline", "online"), default="disabled", help="log to Weights & Biases too")
    flag("--wandb-project", default="image-classifiers", metavar="NAME", help="where W&B files the run")


# What may differ when a run continues: where it runs and how it reports, and how long, never what it computes.
CHANGEABLE_ON_RESUME = {
    "resume", "epochs", "stop_after", "save_interval", "data_dir", "data_url", "device", "quiet", "wandb",
    "wandb_project",
}  # fmt: skip


def parse_arguments(parser, argv=None):
    """`argv` to a Namespace; with --resume, the recorded run's own arguments. Exits with 2 on a bad argument."""
    argv = sys.argv[1:] if argv is None else list(argv)
    unset = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset)))
    given = {name: value for name, value in vars(given).items() if value is not unset}
    defaults = vars(parser.parse_args([]))  # only now: --recipe has set them
    args = argparse.Namespace(**{**defaults, **given}, script=Path(parser.prog).stem, argv=argv)
    try:
        if args.resume:
            return resumed_arguments(args, given)
        check_data_options(args, given)
        args.model_options = choose_model_options(args, given)
        check_model(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def resumed_arguments(args, given):
    """The arguments of the run in args.resume, changed as far as `given` may change them."""
    for name in given.keys() - CHANGEABLE_ON_RESUME:
        raise UsageError(f"--{name.replace('_', '-')} cannot change when a run is resumed")
    if not (args.resume / "run.json").is_file():
        raise UsageError(f"--resume {args.resume}: no run.json there, so it is not a run directory")
    record = read_record(args.resume)
    recorded = recorded_arguments(record)
    if recorded.script != args.script:
        raise UsageError(f"--resume {args.resume}: that run was made by {recorded.script}.py")
    # What `auto` meant then, so that another machine does not go on in another arithmetic.
    resolved = {"device": record["device"], "precision": record["precision"], "quiet": False, "stop_after": None}
    args = argparse.Namespace(**{**vars(args), **vars(recorded), **resolved, **given})
    if args.epochs < record["epochs"]:
        raise UsageError(f"--epochs {args.epochs}: the run already has {record['epochs']} epochs")
    for fixed, flag in ((args.schedule != "constant", f"--schedule {args.schedule}"), (args.sizes, "--sizes")):
        if args.epochs != recorded.epochs and fixed:
            raise UsageError(f"--epochs cannot change under {flag}, which ends with the last epoch")
    return args


def recorded_arguments(record):
    """The Namespace of a run's own arguments, from its run.json. RunError where they are not of this version."""
    known = record["args"] if isinstance(record["args"], dict) else {}
    needed = {"dataset", "data_dir", "runs_dir", "image_size", "val_size", "limit_train", "seed", "epochs"}
    missing = ", ".join(sorted(needed - known.keys()))
    if missing:
        raise RunError(f"run.json of {record['name']} is not of this version of the scripts: its args lack {missing}")
    paths = {name: Path(known[name]) for name in ("data_dir", "runs_dir")}
    return argparse.Namespace(**{**known, **paths}, script=record["script"])


def check_data_options(args, given):
    """Refuse a dataset that does not exist, and flags that would do nothing."""
    if args.dataset not in DATASETS and not Path(args.dataset).is_dir():
        raise UsageError(f"--dataset {args.dataset}: neither a folder nor one of {', '.join(DATASETS)}")
    if not args.val_size and not args.test:
        raise UsageError("--val-size 0 selects on the test set, which --no-test forbids to read")
    for names, applies, condition in (
        (("rotation", "brightness", "hue", "flip", "alternate_flip", "shift"), args.augment, "--augment"),
        (("alternate_flip",), args.flip, "a --flip above 0"),
        (("image_size",), args.dataset not in DATASETS, "a folder as --dataset"),
        (("data_url",), args.dataset in TORCHVISION_DATASETS, "a --dataset that is downloaded"),
        (("momentum",), args.optimizer in ("sgd", "muon"), "--optimizer sgd or muon"),
        (("aux_lr",), args.optimizer == "muon", "--optimizer muon"),
        (("tta_below",), args.tta, "--tta"),
        (("wandb_project",), args.wandb != "disabled", "--wandb offline or online"),
    ):
        for name in names:
            if name in given and not applies:
                raise UsageError(f"--{name.replace('_', '-')} needs {condition}")


def choose_model_options(args, given):
    """The keyword arguments of the chosen model: its own defaults, and the flags that the user or a recipe has set."""
    options = model_options()[args.model]
    for name in (name for each in model_options().values() for name in each):
        if name in given and name not in options:
            takes = ", ".join(f"--{option}".replace("_", "-") for option in options) or "none of these"
            raise UsageError(f"--{name.replace('_', '-')} does not apply to --model {args.model} (it takes {takes})")
    chosen = {name: getattr(args, name) for name in options}
    return {name: default if chosen[name] is None else chosen[name] for name, default in options.items()}


def check_model(args):
    """Refuse what the model or the augmentation cannot do with images of the dataset's shape."""
    shape = image_shape(args)
    try:
        with torch.device("meta"):
            model = MODELS[args.model](shape, 2, **args.model_options)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--model {args.model} cannot be built with these options ({reason})") from error
    for side in args.sizes or ():
        try:
            model(torch.empty(2, shape[0], side, side, device="meta"))
        except RuntimeError as error:
            raise UsageError(f"--sizes {side}: --model {args.model} does not take images of that size") from error
    if args.sizes and args.sizes[-1] != max(shape[1:]):
        given = ",".join(map(str, args.sizes))
        raise UsageError(f"--sizes {given}: the last has to be that of the images in the test, {max(shape[1:])}")
    if args.batch_size == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise UsageError(f"--batch-size 1: --model {args.model} has batch norm, which needs at least 2 images")
    if args.optimizer == "muon" and not any(p.ndim == 4 and p.requires_grad for p in model.parameters()):
        raise UsageError(f"--optimizer muon is for convolutions, and --model {args.model} has none")
    if args.augment and args.shift >= min(shape[1:]):
        raise UsageError(f"--shift {args.shift}: the images have only {min(shape[1:])} pixels a side")
    if args.augment and args.hue and shape[0] != 3:
        raise UsageError(f"--augment: {args.dataset} has grey images; add --hue 0")


def choose_device(args):
    """The torch.device and the name of the precision that --device and --precision mean on this machine."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = args.device
    if name == "auto":
        name = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[name]:
        raise UsageError(f"--device {name}: this machine or this build of torch has none; use --device cpu or auto")
    precision = args.precision
    if precision == "auto" and name == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        # Without AVX-512's bf16 instructions a CPU emulates it, many times slower than fp32.
        native = name == "cpu" and torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    if precision == "fp16" and name == "cpu":
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32")
    # Two runs of one seed are to give the same bytes; cuDNN's fastest kernels do not.
    torch.backends.cudnn.deterministic = True
    return torch.device(name), precision


def keep_freed_memory():
    """Have glibc reuse the memory that a step frees instead of returning it to the kernel after every tensor.

    Each step takes and frees the same gigabytes, and page by page the kernel clears them anew: on a CPU that was
    a third of ConfigNet's step. Elsewhere (no glibc) this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


# The type that autocast computes in; None leaves all to torch's defaults for float32 (on CUDA, TF32 convolutions).
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def command_line(main):
    """Run `main(argv) -> dict` as a program: print a user's mistake as one line, return the exit status."""
    program = Path(sys.argv[0]).name

    def fail(status, message):
        if sys.stderr is not None:
            with contextlib.suppress(OSError):  # nobody reads it; the exit status tells as well
                print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
        return status

    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a file opened later would take its place, and what is printed
            os.open(os.devnull, os.O_RDWR)

    def terminate(signum, frame):
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, terminate)
    if sys.stdout is not None:
        # The name of a class or a file may have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        record = main(sys.argv[1:])
    except UsageError as error:
        return fail(2, error)
    except (RunError, OSError, MemoryError) as error:
        return fail(1, error)
    except ModuleNotFoundError as error:
        return fail(1, f"the package {error.name} is missing: pip install {error.name}")
    except RuntimeError as error:
        # What each backend says when it has no more memory has no type in common.
        if not re.search(r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE):
            raise
        return fail(1, f"{str(error).splitlines()[0]}; try a smaller --batch-size or model")
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except Interrupted as name:
        return fail(128 + signal.Signals[str(name)], f"interrupted by {name}")
    if record.get("status") == "diverged":
        return fail(1, f"{record['error']}; try a lower --lr. The epochs before are in {record['directory']}")
    if record.get("status") == "interrupted" and record["error"]:
        go_on = record.get("go_on") or shlex.join(["python", program, "--resume", record["directory"]])
        return fail(128 + signal.Signals[record["error"]], f"interrupted by {record['error']}; continue with: {go_on}")
    return 0


def check_runs_dir(args):
    """What can be known of --runs-dir, --run-name and --resume before anything is loaded."""
    directory = args.resume or args.runs_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--runs-dir {directory} cannot be made ({error.strerror})") from error
    if not os.access(directory, os.W_OK):
        raise UsageError(f"{directory} is not writable")
    if args.run_name and not args.resume and (directory / args.run_name).exists():
        raise UsageError(f"--run-name {args.run_name}: {directory / args.run_name} exists already")


class Screen:
    """Lines for a person: nothing with --quiet; a reader that went away (`| head -1`) does not end a run."""

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.bars = not quiet and sys.stderr is not None and sys.stderr.isatty()

    def say(self, line, result=False):
        """Print a line. OSError only where it is the `result` of the program, and not because a reader went away."""
        if self.quiet:
            return
        try:
            print(line, flush=True)
        except OSError as error:
            # A run does not end because nobody reads. The interpreter's own last flush must find an open file.
            self.quiet = True
            with open(os.devnull, "w") as devnull:
                os.dup2(devnull.fileno(), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return
            if result:
                raise
            with contextlib.suppress(OSError):
                print(f"standard output failed ({error.strerror}): going on without it", file=sys.stderr)

    def bar(self, total, description, unit="batch", initial=0):
        return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False, disable=not self.bars)


def random_seed(*parts):
    """A seed below 2**63 that follows from `parts` alone, so that each use of --seed draws numbers of its own."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*parts, device="cpu"):
    return torch.Generator(device=device).manual_seed(random_seed(*parts))


# ---------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """A whole split in memory: `images` uint8 [N, C, H, W], `labels` int64 [N], the names of the classes."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list

    def __len__(self):
        return len(self.labels)

    def select(self, indices):
        return ImageSet(self.images[indices], self.labels[indices], self.classes)

    def to(self, device):
        """On `device`, in channels_last order, so that a batch, which is an index, is in that order too."""
        images = self.images.to(device).contiguous(memory_format=torch.channels_last)
        return ImageSet(images, self.labels.to(device), self.classes)

    @functools.cached_property
    def checksum(self):
        """SHA-256 of images and labels."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()

    def mean_and_std(self):
        """Per channel, of the values in [0, 1], from a histogram of the 256 levels. RunError where a std is 0."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.images.unbind(1)]).double()
        share = counts / counts.sum(1, keepdim=True)
        mean = (share * levels).sum(1)
        std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
        if not std.all():
            raise RunError("--normalize dataset: a channel is the same in all images; use --normalize half")
        return mean.tolist(), std.tolist()


def stratified_sample(labels, size, generator):
    """`size` indices into `labels` [N], random, each class in its own proportion to within one image; sorted."""
    counts = torch.bincount(labels)
    quota = counts.double() * size / len(labels)
    take = quota.floor().long()
    # The images that rounding down left over go to the classes that lost most by it.
    take[(take - quota).argsort(stable=True)[: size - int(take.sum())]] += 1
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == c][:n] for c, n in enumerate(take.tolist())]).sort().values


# A process that trains many times sets this to a dictionary, and every dataset is loaded once.
loaded_datasets = None


def load_dataset(args, synthetic):
    """The training images of --dataset as an `ImageSet`, and a function that gives the test images likewise.

    `synthetic(train)` draws those of that name. RunError says what is missing or damaged, in the test images too
    as far as that can be seen without reading them, so that nobody learns of it after hours of training.
    """
    key = (args.script, args.dataset, args.data_dir.absolute(), args.image_size)
    if loaded_datasets and key in loaded_datasets:
        return loaded_datasets[key]
    if args.dataset == "synthetic":
        load = synthetic
    elif args.dataset in TORCHVISION_DATASETS:
        load = find_torchvision(args)
    else:
        load = read_folder(Path(args.dataset), image_shape(args))

    def checked(train):
        image_set = load(train)
        if len(image_set.images) != len(image_set):
            raise RunError(f"{args.dataset}: {len(image_set.images)} images have {len(image_set)} labels")
        if image_set.labels.min() < 0 or image_set.labels.max() >= len(image_set.classes):
            raise RunError(f"{args.dataset}: a label is outside 0..{len(image_set.classes) - 1}; the files are damaged")
        return image_set

    # Read when it is asked for, and once: at --val-size 0 both validation and the test at the end ask for it.
    parts = checked(True), functools.cache(lambda: checked(False))
    if loaded_datasets is not None:
        loaded_datasets[key] = parts
    return parts


def image_shape(args):
    """(C, H, W) of the images of --dataset, known without loading them: those of a folder are made so."""
    if args.dataset in TORCHVISION_DATASETS:
        return TORCHVISION_DATASETS[args.dataset][2]
    channels, size = {"train_mnist": (1, 28), "train_cifar": (3, 32)}[args.script]
    if args.dataset != "synthetic":
        size = args.image_size
    return channels, size, size


def split_off_validation(args, images, load_test):
    """The training and the validation part of the training images; at --val-size 0 the test set validates."""
    if args.val_size:
        size = round(len(images) * args.val_size)
        if not size:
            raise RunError(f"--val-size {args.val_size} of {len(images)} images leaves none for validation")
        chosen = torch.zeros(len(images), dtype=torch.bool)
        chosen[stratified_sample(images.labels, size, generator_for(args.seed, "validation"))] = True
        train_set, val_set = images.select(~chosen), images.select(chosen)
    else:
        train_set, val_set = images, load_test()
    if args.limit_train:
        if args.limit_train > len(train_set):
            raise RunError(f"--limit-train {args.limit_train}: there are only {len(train_set)} training images")
        train_set = train_set.select(
            stratified_sample(train_set.labels, args.limit_train, generator_for(args.seed, "limit"))
        )
    if len(train_set) < 2:
        raise RunError(f"{args.dataset}: {len(train_set)} training images are too few")
    return train_set, val_set


# The name of torchvision's class, the folder that it keeps below --data-dir, and the shape of the images.
TORCHVISION_DATASETS = {
    "mnist": ("MNIST", "MNIST", (1, 28, 28)),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST", (1, 28, 28)),
    "kmnist": ("KMNIST", "KMNIST", (1, 28, 28)),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", (3, 32, 32)),
    "cifar100": ("CIFAR100", "cifar-100-python", (3, 32, 32)),
}
DATASETS = ("synthetic", *TORCHVISION_DATASETS)


def find_torchvision(args):
    """Find a torchvision dataset in --data-dir, downloaded first where it is missing, and check its files.

    Returns a function of `train` that reads one of its two parts.
    """
    from torchvision import datasets

    name, folder, _ = TORCHVISION_DATASETS[args.dataset]
    dataset_class, target = getattr(datasets, name), args.data_dir / folder
    if not target.exists():
        download(dataset_class, target, args)
    for path, md5 in dataset_files(dataset_class, args.data_dir):
        if not path.is_file():
            raise RunError(f"{path} is missing; remove {target}, and the next training downloads it anew")
        if not is_whole(path, md5):
            raise RunError(f"{path} is damaged; remove {target}, and the next training downloads it anew")

    def load(train):
        try:
            dataset = dataset_class(args.data_dir, train=train)
            images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        except (RuntimeError, ValueError, KeyError, EOFError, AssertionError) as error:
            raise RunError(f"{target} cannot be read ({error}); remove it, and training downloads it anew") from error
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return ImageSet(images.contiguous(), labels.long(), [str(c) for c in dataset.classes])

    return load


def dataset_files(dataset_class, root):
    """The files that torchvision reads, each with its MD5, or None where torchvision has none."""
    if hasattr(dataset_class, "train_list"):
        folder = root / dataset_class.base_folder
        return [(folder / file, md5) for file, md5 in dataset_class.train_list + dataset_class.test_list]
    folder = root / dataset_class.__name__ / "raw"
    return [(folder / Path(file).stem, None) for file, _ in dataset_class.resources]


def is_whole(path, md5):
    """Whether a dataset file has its MD5 or, for an IDX file, the size that its header announces."""
    with open(path, "rb") as file:
        if md5:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5
        magic = file.read(4)
        dimensions = magic[3] if len(magic) == 4 else 0
        header = file.read(4 * dimensions)
    if magic[:3] != b"\0\0\x08" or len(header) != 4 * dimensions:
        return False
    sizes = [int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)]
    return path.stat().st_size == 4 + len(header) + math.prod(sizes)


def download(dataset_class, target, args):
    """Download beside `target` and move into place when whole: what a failure leaves is never taken for data."""
    name, url = dataset_class.__name__, args.data_url
    if hasattr(dataset_class, "tgz_md5"):
        archives, folder = [(dataset_class.filename, dataset_class.tgz_md5)], ""
    else:
        archives, folder = dataset_class.resources, f"{name}/raw"
    # torchvision reads the address from the class, and finds its files by the class's name.
    overrides = {"url": url, "mirrors": [f"{url.rstrip('/')}/"]} if url else {}
    source = type(name, (dataset_class,), overrides)
    scheme = urlsplit(url or "http:").scheme
    local = {"file": lambda: Path(url2pathname(urlsplit(url).path)), "": lambda: Path(url)}.get(scheme, lambda: None)()
    screen = Screen(args.quiet)
    args.data_dir.mkdir(parents=True, exist_ok=True)
    with locked(args.data_dir / ".download.lock", wait=True):
        if target.exists():  # another run has downloaded it while this one waited
            return
        for stale in args.data_dir.glob(".download-*/"):  # of a process that was killed: this one holds the lock
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=args.data_dir) as temporary:
            screen.say(f"downloading {name} to {target}")
            if local:
                # torchvision downloads nothing that lies there whole, so a local copy only has to be put there.
                (Path(temporary) / folder).mkdir(parents=True, exist_ok=True)
                for file, md5 in archives:
                    path = local / file if local.is_dir() else local
                    if not (path.is_file() and is_whole(path, md5)):
                        raise RunError(
                            f"--data-url {url}: {path} is not torchvision's {file} (missing, or another MD5)"
                        )
                    shutil.copy(path, Path(temporary) / folder / file)
            try:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    if not screen.bars:
                        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                    stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
                    socket.setdefaulttimeout(60)
                    source(temporary, download=True)
            except (RuntimeError, OSError, EOFError, ValueError, HTTPException) as error:
                raise RunError(
                    f"{name} is not in {target} and could not be downloaded ({error}); "
                    "give --data-url a mirror or a local copy, or try --dataset synthetic"
                ) from error
            (Path(temporary) / target.name).rename(target)


def read_image(path, shape):
    """An image file of any size and mode as uint8 [C, H, W] = `shape`. RunError names one that cannot be read."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255
                image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
            if image.mode in ("I", "F"):
                raise RunError(f"{path} has 32 bits a pixel, of no known range; save it with 8 or 16")
            image = image.convert("L" if channels == 1 else "RGB")
            pixels = image.resize((width, height), Image.Resampling.BILINEAR).tobytes()
    except RunError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        if isinstance(error, OSError) and error.errno:
            raise RunError(f"{path}: {error.strerror}") from error
        raise RunError(f"{path} is not a readable image ({type(error).__name__}); remove or replace it") from error
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1)


def read_folder(root, shape):
    """Read a folder of images, each as [C, H, W] = `shape`; without PATH/test a tenth of each class is the test set.

    Returns a function of `train` that gives one of its two parts. RunError names a file that is not an image.
    """
    from torchvision.datasets import ImageFolder

    class VisibleFolder(ImageFolder):
        def find_classes(self, directory):
            names = sorted(path.name for path in Path(directory).iterdir() if path.is_dir() and path.name[0] != ".")
            if len(names) < 2:
                raise RunError(
                    f"{directory}: expected a folder of images for each of at least two classes, PATH/<class>/*"
                )
            return names, {name: index for index, name in enumerate(names)}

    def read_classes(path):
        try:
            found = VisibleFolder(
                path, loader=lambda file: read_image(file, shape), is_valid_file=lambda file: Path(file).name[0] != "."
            )
        except FileNotFoundError as error:  # a class without a file
            raise RunError(f"{path}: {error}") from error
        pixels = torch.stack([image for image, _ in found])
        return ImageSet(pixels, torch.tensor(found.targets), found.classes)

    parts = {part: (root / part).is_dir() for part in ("train", "test")}
    if parts["train"] != parts["test"]:
        raise RunError(f"{root} has only one of the folders train and test; it needs both, or the classes themselves")
    if parts["train"]:
        train_set, test_set = read_classes(root / "train"), read_classes(root / "test")
        if train_set.classes != test_set.classes:
            raise RunError(f"{root}: train and test do not have the same classes")
    else:
        everything = read_classes(root)
        if len(everything) < 10:
            raise RunError(f"{root}: {len(everything)} images are too few to set a tenth aside as the test set")
        test = torch.zeros(len(everything), dtype=torch.bool)
        test[stratified_sample(everything.labels, len(everything) // 10, generator_for("folder"))] = True
        train_set, test_set = everything.select(~test), everything.select(test)
    return lambda train: train_set if train else test_set


# ---------------------------------------------------------------------------------------------------
# Augmentation and batches
# ---------------------------------------------------------------------------------------------------


@dataclass
class Augmentation:
    """What each training image undergoes, with parameters of its own: as torchvision's RandomRotation (nearest
    neighbour, black corners), ColorJitter (brightness, then hue) and RandomHorizontalFlip, but a batch at a time."""

    rotation: float  # up to so many degrees either way
    brightness: float  # factor from 1 - brightness to 1 + brightness
    hue: float  # turn from -hue to hue
    flip: float  # probability
    alternate: bool = False  # the flips alternate from epoch to epoch, and are drawn but once
    shift: int = 0  # up to so many pixels along each axis, the border mirrored

    def draw(self, count, generator):
        """Random parameters, each [count]: `angle` in degrees, `brightness` factor, `hue` in turns, `flip` boolean,
        and `shift` [2, count] in pixels, down and right, where there is one."""
        uniform = torch.rand(4, count, generator=generator, device=generator.device)
        drawn = {
            "angle": (uniform[0] * 2 - 1) * self.rotation,
            "brightness": 1 + (uniform[1] * 2 - 1) * self.brightness,
            "hue": (uniform[2] * 2 - 1) * self.hue,
            "flip": uniform[3] < self.flip,
        }
        if self.shift:
            size, most = (2, count), self.shift
            drawn["shift"] = torch.randint(-most, most + 1, size, generator=generator, device=generator.device)
        return drawn

    def apply(self, images, angle, brightness, hue, flip, shift=None):
        """`images` float [N, C, H, W] in [0, 1], with parameters as from `draw`; a change that is off costs nothing."""
        if self.rotation or self.flip:
            images = rotate_and_flip(images, angle, flip)
        if self.shift:
            images = shift_images(images, *shift, self.shift)
        if self.brightness:
            images = (images * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
        if self.hue:
            images = shift_hue(images, hue)
        return images


def rotate_and_flip(images, angle, flip):
    """`images` [N, C, H, W] turned counter-clockwise by `angle` [N] degrees, then mirrored where `flip` [N] is true."""
    height, width = images.shape[-2:]
    radians = angle.deg2rad()
    cos, sin, mirror, zero = radians.cos(), radians.sin(), 1 - 2 * flip.float(), torch.zeros_like(radians)
    # From where in the source each pixel comes, in coordinates that run from -1 to 1 along each axis.
    rows = (cos * mirror, -sin * height / width, zero, sin * width / height * mirror, cos, zero)
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def shift_images(images, down, right, most):
    """`images` [N, C, H, W] moved by `down` and `right` [N] pixels, at `most` so many, the border mirrored."""
    height, width = images.shape[-2:]
    windows = F.pad(images, (most,) * 4, "reflect").unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, most - down, most - right]


def shift_hue(images, turns):
    """`images` [N, 3, H, W] in [0, 1] with the hue turned by `turns` [N], saturation and value kept.

    HSV as in A. R. Smith, "Color gamut transform pairs" (1978); back by f(n) = v - c max(0, min(k, 4 - k, 1)),
    k = (n + 6 h) mod 6, n = 5, 3, 1 for red, green, blue, with value v and chroma c.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = chroma.clamp(min=1e-12)
    sixths = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixths = torch.where(value == red, (green - blue) / safe, sixths) + 6 * turns.view(-1, 1, 1)
    k = torch.remainder(sixths[:, None] + torch.arange(5, 0, -2, device=images.device).view(-1, 1, 1), 6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


class Loader:
    """Batches of an `ImageSet` that lies on the device: indexed, augmented and normalised there.

    With `seed` it shuffles, and the order and the augmentation of epoch k follow from `seed` and k alone;
    without, it keeps the order. A last batch of a single image is left out of training: batch norm needs two.
    """

    def __init__(self, image_set, batch_size, mean, std, augmentation=None, seed=None):
        self.image_set, self.batch_size, self.augmentation, self.seed = image_set, batch_size, augmentation, seed
        device = image_set.images.device
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __len__(self):
        """Batches an epoch."""
        full, rest = divmod(len(self.image_set), self.batch_size)
        return full + (rest > (self.seed is not None and self.batch_size > 1))

    def batches(self, epoch=0, side=None):
        """Yield (`images` float [B, C, H, W], `labels` int64 [B]); `side` resizes them to so many pixels square."""
        images, labels = self.image_set.images, self.image_set.labels
        if self.seed is not None:
            random = generator_for(self.seed, "order", epoch, device=images.device)
            order = torch.randperm(len(labels), generator=random, device=images.device)
        alternate = self.augmentation and self.augmentation.alternate and self.augmentation.flip
        if alternate:
            first = generator_for(self.seed, "flip", device=images.device)
            flipped = torch.rand(len(labels), generator=first, device=images.device) < self.augmentation.flip
            flipped ^= epoch % 2 == 0
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = slice(start, start + self.batch_size)
            batch = batch if self.seed is None else order[batch]
            pixels = images[batch].float().div_(255)
            if self.augmentation:
                changes = self.augmentation.draw(len(pixels), random)
                if alternate:
                    changes["flip"] = flipped[batch]
                pixels = self.augmentation.apply(pixels, **changes)
            if side and side != pixels.shape[-1]:
                pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
            yield pixels.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last), labels[batch]


# ---------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------


class Dropout(nn.Dropout):
    """nn.Dropout that draws 16 random bits an element on a CPU, where torch's own takes a fifth of ConfigNet's step.

    The probability is rounded to 1/65536, and the scale is that of the rounded one.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        threshold = min(round(self.p * 65536), 65535)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        # In the order that x has in memory, so that the product runs over both in one sweep.
        kept = bits.as_strided(x.shape, torch.empty_like(x).stride()) >= threshold - 32768
        return (x * kept).mul_(65536 / (65536 - threshold))


def dense(image_shape, classes, l1=128, d1=0.5):
    """A dense net: one hidden layer of `l1` units with dropout `d1`, over standardised images.

    Without the standardisation, which has no parameters, the hundreds of pixels that are black in every digit come in
    as -1: they all act as the bias does, and every step moves the hidden units by hundreds of times the learning rate.
    """
    pixels = math.prod(image_shape)
    return nn.Sequential(
        nn.Flatten(), nn.LayerNorm(pixels, elementwise_affine=False),
        nn.Linear(pixels, l1), nn.ReLU(), Dropout(d1), nn.Linear(l1, classes),
    )  # fmt: skip


def cnn(image_shape, classes, c1=32, c2=64, l1=512):
    """Two blocks of a padded 3x3 convolution, batch norm, ReLU and 2x2 max pooling, then two dense layers."""
    channels, height, width = image_shape
    if min(height, width) < 4:
        raise UsageError(f"--model cnn needs images of at least 4x4 pixels, not {height}x{width}")
    return nn.Sequential(
        nn.Conv2d(channels, c1, 3, padding=1), nn.BatchNorm2d(c1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(c1, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(c2 * (height // 4) * (width // 4), l1), nn.ReLU(inplace=True), nn.Linear(l1, classes),
    )  # fmt: skip


def confignet(image_shape, classes, c1=48, c2=96, l1=256, d1=0.1, kernel_size=3):
    """The tutorial's ConfigNet: four unpadded convolutions, the last of stride 2, and two dense layers.

    Its dropout layers are modules, so that they rest at evaluation, and batch norm comes before ReLU and dropout,
    not after them: there most of its inputs are zero, a variance over a batch says little about an input that
    is seldom anything else, and what it then does at evaluation is far from what it did in training. (X. Li et al.,
    "Understanding the disharmony between dropout and batch normalization by variance shift", 2019.)
    """
    channels, *sides = image_shape
    for stride in (1, 1, 1, 2):
        sides = [(side - kernel_size) // stride + 1 if side >= kernel_size else 0 for side in sides]
    if min(sides) < 1:
        size = "x".join(map(str, image_shape[1:]))
        raise UsageError(f"--kernel-size {kernel_size} leaves nothing of images of {size} pixels")
    features = c2 * math.prod(sides)
    return nn.Sequential(
        nn.Conv2d(channels, c1, kernel_size), nn.ReLU(inplace=True),
        nn.Conv2d(c1, c1, kernel_size), nn.ReLU(inplace=True), Dropout(d1),
        nn.Conv2d(c1, c2, kernel_size), nn.ReLU(inplace=True),
        nn.Conv2d(c2, c2, kernel_size, stride=2),
        nn.Flatten(), nn.BatchNorm1d(features), nn.ReLU(inplace=True), Dropout(0.5),
        nn.Linear(features, l1), nn.ReLU(inplace=True), nn.Linear(l1, classes),
    )  # fmt: skip


def convnet(image_shape, classes, kernel_size=3):
    """The tutorial's ConvNet: ConfigNet at 48 and 96 channels and 256 units."""
    return confignet(image_shape, classes, kernel_size=kernel_size)


class Whitening(nn.Conv2d):
    """A convolution with fixed filters whose outputs, over patches of the training images, are uncorrelated and of
    variance 1.

    The filters are the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue, and their
    negatives, so that an activation that cuts one off lets the other pass. From hlb-CIFAR10 (tysam-code, 2022), after
    D. Page, "How to train your ResNet" (2018). A bias is learnt, as in K. Jordan's airbench, for three epochs: its
    gradient takes time, and brings little later.
    """

    def __init__(self, channels, patch, stride, padding, bias):
        super().__init__(channels, 2 * channels * patch**2, patch, stride, padding, bias=bias)
        self.weight.requires_grad_(False)
        if bias:
            nn.init.zeros_(self.bias)

    def begin_epoch(self, epoch):
        """Let the bias, if there is one, be learnt in this epoch, counted from 1, or not."""
        if self.bias is not None:
            self.bias.requires_grad_(epoch <= 3)

    @torch.no_grad()
    def learn(self, images, smallest=5e-4):
        """Take the filters from `images` [N, C, H, W], normalised as in training. `smallest` is added to each
        eigenvalue, so that directions in which the patches hardly vary are not blown up."""
        covariance, patches = 0, 0
        for part in images.split(500):
            part = F.unfold(part, self.kernel_size).transpose(1, 2).flatten(0, 1)
            covariance, patches = covariance + part.T @ part, patches + len(part)
        eigenvalues, eigenvectors = torch.linalg.eigh((covariance / patches).cpu().double())
        filters = (eigenvectors / (eigenvalues + smallest).sqrt()).T.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))


@functools.cache
def winograd(block):
    """A. Lavin and S. Gray's F(block x block, 3x3), "Fast algorithms for convolutional neural networks" (2016): what
    takes tiles of (block + 2)^2 pixels, and 3x3 weights, to where a convolution is one product a place, and the
    products to block x block outputs. Both are polynomials there, known by their values at a few points; the last
    point is infinity. The matrices, float32, are for both axes at once: a tile is a column."""

    def product(roots):
        coefficients = torch.ones(1, dtype=torch.float64)
        for root in roots:
            coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
        return coefficients

    points = torch.tensor([0, 1, -1, 2, -2, 1 / 2, -1 / 2], dtype=torch.float64)[: block + 1]
    others = [points[points != point] for point in points]
    scales = torch.stack([(point - rest).prod() for point, rest in zip(points, others, strict=True)])
    pixels = torch.stack([*(F.pad(product(rest), (0, 1)) for rest in others), product(points)])
    weights = torch.cat([points[:, None] ** torch.arange(3) / scales[:, None], torch.eye(3)[-1:]])
    outputs = torch.cat([points ** torch.arange(block)[:, None], torch.eye(block)[:, -1:]], 1)
    return tuple(torch.kron(matrix, matrix).float() for matrix in (pixels, weights, outputs))


def winograd_tiles(height, width):
    """(side of the blocks of outputs, blocks down, blocks right) with which an image takes the fewest products."""

    def products(block):
        return math.prod(math.ceil(side / block) * (block + 2) for side in (height, width))

    block = min(range(2, 7), key=products)
    return block, math.ceil(height / block), math.ceil(width / block)


class WinogradConvolution(torch.autograd.Function):
    """A padded 3x3 convolution of `images` [N, C, H, W] with `weight` [K, C, 3, 3], both float32 on a CPU.

    It multiplies two to five times less often than the definition says, and equals it to about 1e-5. The images are cut
    into blocks, and taken a `part` of the batch at a time, so that what one step leaves is still in the cache for the
    next. Inside, colours and channels come last, and the `places` of a tile first.
    """

    @staticmethod
    def forward(ctx, images, weight):
        (count, channels, height, width), outputs = images.shape, len(weight)
        block, down, right = winograd_tiles(height, width)
        side = block + 2
        places = side**2
        to_pixels, to_weights, to_outputs = winograd(block)
        border = (0, 0, 1, block * right + 1 - width, 1, block * down + 1 - height)
        part = max(1, max(9216, outputs * channels) // (places * down * right))
        weights = (to_weights @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(places, channels, outputs)
        # One piece of memory for all parts: many small ones that live so long leave holes between them.
        all_pixels = images.new_empty(count, places * down * right * channels)
        result = images.new_empty(count, height, width, outputs)
        parts = images.permute(0, 2, 3, 1).split(part), all_pixels.split(part), result.split(part)
        for some, pixels, made in zip(*parts, strict=True):
            tiles = F.pad(some, border).unfold(1, side, block).unfold(2, side, block).permute(4, 5, 0, 1, 2, 3)
            torch.mm(to_pixels, tiles.reshape(places, -1), out=pixels.view(places, -1))
            products = torch.bmm(pixels.view(places, -1, channels), weights)
            blocks = (to_outputs @ products.view(places, -1)).view(block, block, -1, down, right, outputs)
            blocks = blocks.permute(2, 3, 0, 4, 1, 5).reshape(-1, block * down, block * right, outputs)
            made.copy_(blocks[:, :height, :width])
        ctx.part = part
        ctx.save_for_backward(weights, all_pixels)
        return result.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        weights, all_pixels = ctx.saved_tensors
        (places, channels, _), (count, outputs, height, width) = weights.shape, gradient.shape
        block, down, right = winograd_tiles(height, width)
        side = block + 2
        to_pixels, to_weights, to_outputs = winograd(block)
        border = (0, 0, 0, block * right - width, 0, block * down - height)
        of_images, of_weights = gradient.new_empty(count, height, width, channels), torch.zeros_like(weights)
        parts = gradient.permute(0, 2, 3, 1).split(ctx.part), all_pixels.split(ctx.part), of_images.split(ctx.part)
        for some, pixels, made in zip(*parts, strict=True):
            blocks = F.pad(some, border).reshape(-1, down, block, right, block, outputs).permute(2, 4, 0, 1, 3, 5)
            products = (to_outputs.T @ blocks.reshape(block**2, -1)).view(places, -1, outputs)
            of_weights.baddbmm_(pixels.view(places, -1, channels).mT, products)
            tiles = to_pixels.T @ torch.bmm(products, weights.mT).view(places, -1)
            padded = some.new_zeros(len(some), block * down + 2, block * right + 2, channels)
            for place, tile in enumerate(tiles.view(places, len(some), down, right, channels)):
                y, x = divmod(place, side)
                # Not +=, which would copy the sum onto itself.
                padded[:, y::block, x::block][:, :down, :right].add_(tile)
            made.copy_(padded[:, 1 : height + 1, 1 : width + 1])
        of_weights = (to_weights.T @ of_weights.view(places, -1)).view(3, 3, channels, outputs)
        return of_images.permute(0, 3, 1, 2), of_weights.permute(3, 2, 0, 1)


class Convolution(nn.Conv2d):
    """A padded 3x3 convolution without a bias: where that is faster, by Winograd's method, else by torch."""

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)

    def forward(self, x):
        # With few channels, moving pixels about takes more time than the multiplications that are spared; with AVX-512,
        # torch's own convolution multiplies twice as fast as its matrix product.
        many = self.in_channels * self.out_channels >= 64 * 256
        if (
            many and x.device.type == "cpu" and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
            and torch.backends.cpu.get_cpu_capability() != "AVX512"
        ):  # fmt: skip
            return WinogradConvolution.apply(x, self.weight)
        return super().forward(x)


def identity_convolution(channels_in, channels_out):
    """A 3x3 convolution that at first hands its inputs on: S. Zagoruyko and N. Komodakis, "DiracNets" (2017)."""
    convolution = Convolution(channels_in, channels_out)
    nn.init.dirac_(convolution.weight[: min(channels_in, channels_out)])
    return convolution


def batch_norm(channels):
    """Batch norm without a learnt scale, whose statistics for evaluation are those of the last few batches."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def whitened_net(image_shape, classes, patch, stride, padding, bias, widths):
    """Whitened patches, pairs of convolutions of each of `widths`, the first halving the sides, and a dense layer over
    the maximum of each channel, so that images of any size do."""
    whitening = Whitening(image_shape[0], patch, stride, padding, bias)
    layers, channels = [whitening, nn.GELU()], whitening.out_channels
    for width in widths:
        layers += [
            identity_convolution(channels, width), nn.MaxPool2d(2), batch_norm(width), nn.GELU(),
            identity_convolution(width, width), batch_norm(width), nn.GELU(),
        ]  # fmt: skip
        channels = width
    head = nn.Linear(channels, classes, bias=False)
    nn.init.normal_(head.weight, std=1 / channels)
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)


def fastnet(image_shape, classes, c1=64, c2=256, c3=256):
    """The net of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), as in his airbench94_muon.

    But its patches begin one pixel outside the image: so 32 pixels become 16, 8 and 4, of which nothing is cut off.
    """
    if min(image_shape[1:]) < 7:
        raise UsageError("--model fastnet needs images of at least 7x7 pixels, not {1}x{2}".format(*image_shape))
    return whitened_net(image_shape, classes, 2, 1, 1, True, (c1, c2, c3))


def patchnet(image_shape, classes, c1=24, c2=48):
    """A fastnet for images with less in them: larger patches, a quarter of them, and one pair of convolutions less."""
    if min(image_shape[1:]) < 10:
        raise UsageError("--model patchnet needs images of at least 10x10 pixels, not {1}x{2}".format(*image_shape))
    return whitened_net(image_shape, classes, 4, 2, 0, False, (c1, c2))


# A new model is one function `(image_shape [C, H, W], number of classes, options) -> nn.Module` and one line here;
# an option is a keyword with a default, and a flag of `add_options`.
MODELS = {
    "dense": dense,
    "cnn": cnn,
    "convnet": convnet,
    "confignet": confignet,
    "fastnet": fastnet,
    "patchnet": patchnet,
}


def build_model(blueprint):
    """The model that `blueprint`, as in best.pt, describes, with weights still random."""
    model = MODELS[blueprint["model"]](
        blueprint["image_shape"], len(blueprint["classes"]), **blueprint["model_options"]
    )
    return model.to(memory_format=torch.channels_last)


def model_options():
    """The options of each model with their defaults, as in its signature."""
    signatures = {name: inspect.signature(function).parameters.values() for name, function in MODELS.items()}
    return {
        name: {option.name: option.default for option in options if option.default is not option.empty}
        for name, options in signatures.items()
    }


# ---------------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------------


def orthogonalize(matrices, dtype=torch.float32):
    """`matrices` [B, M, N] with their singular values made about 1, but for those far below the largest, by three
    steps of a Newton-Schulz iteration in `dtype`: K. Jordan et al., "Muon: an optimizer for hidden layers" (2024)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(3):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of orthogonal momentum for the filters of convolutions, at `lr`, and AdamW for all else, at `aux_lr`.

    A bank of filters [out, in, height, width] is a matrix [out, in * height * width] here. Its Nesterov momentum is
    made orthogonal before it is a step, and its norm is held at sqrt(out) instead of decaying, as in K. Jordan's
    airbench94_muon: what follows is taken to be batch norm, to which the scale does not matter. Steps are made
    orthogonal in `dtype`: bfloat16 does, as only their directions count.
    """

    def __init__(self, parameters, lr, aux_lr, momentum, weight_decay, dtype=torch.float32):
        self.dtype = dtype
        parameters = list(parameters)
        filters, others = [p for p in parameters if p.ndim == 4], [p for p in parameters if p.ndim != 4]
        groups = [
            {"params": filters, "lr": lr, "momentum": momentum},
            {"params": others, "lr": aux_lr, "betas": (0.8, 0.95), "weight_decay": weight_decay},
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        filters, others = self.param_groups
        self.step_filters([p for p in filters["params"] if p.grad is not None], filters["lr"], filters["momentum"])
        for p in others["params"]:
            if p.grad is not None:
                self.step_adamw(p, others["lr"], *others["betas"], others["weight_decay"])

    def step_filters(self, filters, lr, momentum):
        by_shape = {}
        for p in filters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average = self.state[p]["momentum"]
            average.mul_(momentum).add_(p.grad)
            by_shape.setdefault(p.shape, []).append((p, p.grad.add(average, alpha=momentum).flatten(1)))
        for shape, pairs in by_shape.items():
            steps = orthogonalize(torch.stack([step for _, step in pairs]), self.dtype)
            for (p, _), step in zip(pairs, steps, strict=True):
                p.mul_(len(p) ** 0.5 / p.norm())
                p.sub_(step.view(shape), alpha=lr)

    def step_adamw(self, p, lr, beta1, beta2, weight_decay):
        """One step of I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019)."""
        state = self.state[p]
        if not state:
            state.update(steps=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["steps"] += 1
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].lerp_(p.grad.square(), 1 - beta2)
        deviation = (state["square"] / (1 - beta2 ** state["steps"])).sqrt_().add_(1e-8)
        p.mul_(1 - lr * weight_decay)
        p.addcdiv_(state["mean"], deviation, value=-lr / (1 - beta1 ** state["steps"]))


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "muon": Muon}


def make_optimizer(args, model, precision):
    """The optimizer of --optimizer with its flags, over what `model` learns in `precision`."""
    learnt, optimizer = [p for p in model.parameters() if p.requires_grad], OPTIMIZERS[args.optimizer]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    if optimizer is Muon:
        settings["dtype"] = torch.float32 if precision == "fp32" else torch.bfloat16
        return Muon(learnt, **settings, aux_lr=args.aux_lr, momentum=args.momentum)
    if optimizer is torch.optim.SGD:
        settings.update(momentum=args.momentum, nesterov=args.momentum > 0)
    return optimizer(learnt, **settings, fused=learnt[0].device.type in ("cpu", "cuda"))


def cosine(start, end, progress):
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def onecycle(progress):
    """L. N. Smith and N. Topin, "Super-convergence" (2018), with the phases of torch's OneCycleLR."""
    if progress < 0.3:
        return cosine(1 / 25, 1, progress / 0.3)
    return cosine(1, 1 / 25e4, (progress - 0.3) / 0.7)


# The learning rate as a multiple of --lr, from the part of the training that is behind. A function of that alone
# has no state to save, and an interrupted run continues on the same course.
SCHEDULES = {
    "constant": lambda progress: 1.0, "cosine": lambda progress: cosine(1, 0, progress), "onecycle": onecycle,
    "linear": lambda progress: 1 - progress,
}  # fmt: skip


class NotFinite(Exception):
    """A loss is not a number, or infinite: the training has diverged."""


class Totals:
    """Sums over the images seen so far, kept on the device: reading `loss` and `accuracy` waits for it."""

    def __init__(self, device):
        self.loss_sum, self.correct = torch.zeros((), device=device), torch.zeros((), device=device)
        self.images = 0

    def add(self, loss_sum, logits, labels):
        self.loss_sum += loss_sum
        self.correct += (logits.argmax(1) == labels).sum()
        self.images += len(labels)

    @property
    def loss(self):
        """Mean per image. Raises NotFinite."""
        loss = self.loss_sum.item() / self.images
        if not math.isfinite(loss):
            raise NotFinite(f"the loss became {loss}")
        return loss

    @property
    def accuracy(self):
        return self.correct.item() / self.images


def train_epoch(model, batches, optimizer, scaler, autocast, label_smoothing, totals):
    """Train on every batch (`images` [B, C, H, W], `labels` [B]) once; `totals` takes up loss and accuracy as seen
    in training. Raises NotFinite."""
    model.train()
    for images, labels in batches:
        with autocast():
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        # On a CPU reading the loss is free. A GPU would wait for it; there the epoch's mean tells as surely.
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise NotFinite(f"the loss became {loss.item()}")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        totals.add(loss.detach() * len(labels), logits.detach(), labels)


def compile_ahead(model, batches, autocast):
    """Run `model`, which torch.compile made, on each of `batches`, pairs of images and whether it trains: so that its
    compilation is in no epoch. The weights stay as they were. Returns the seconds."""
    began = time.perf_counter()
    before, known = {name: tensor.clone() for name, tensor in model.state_dict().items()}, set()
    for images, training in batches:
        kind = images.shape, training, *(parameter.requires_grad for parameter in model.parameters())
        if kind in known:
            continue
        known.add(kind)
        model.train(training)
        with autocast(), torch.inference_mode(not training):
            logits = model(images)
        if training:
            logits.sum().backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    return time.perf_counter() - began


def shifted_by_one(images, towards):
    """`images` [N, C, H, W] moved by one pixel, down and right for `towards` 1, up and left for -1; border mirrored."""
    pixels = torch.full((len(images),), towards, device=images.device)
    return shift_images(images, pixels, pixels, 1)


def mirrored(images):
    return [(0.5, images), (0.5, images.flip(3))]


def moved(images):
    return [(0.5, images), (0.25, shifted_by_one(images, 1)), (0.25, shifted_by_one(images, -1))]


# Views of a batch with their weights, the batch itself first. Their logits are averaged: K. Jordan, "94% on CIFAR-10 in
# 3.29 seconds" (2024).
TTA = {
    "mirror": mirrored, "shift": moved,
    "mirror+shift": lambda images: [(a * b, view) for a, each in moved(images) for b, view in mirrored(each)],
}  # fmt: skip


def predict(model, images, tta=None, tta_below=1.0):
    """Logits [B, K], float32, of `images` [B, C, H, W], averaged over the views of `TTA[tta]` for images that by
    themselves give no class a probability above `tta_below`: of the others hardly one would change its class."""
    logits = model(images).float()
    unsure = logits.softmax(1).amax(1) <= tta_below
    if tta and unsure.any():
        (own_weight, _), *views = TTA[tta](images[unsure])
        logits[unsure] = own_weight * logits[unsure] + sum(weight * model(view).float() for weight, view in views)
    return logits


@torch.inference_mode()
def evaluate_epoch(model, batches, autocast, totals, label_smoothing=0.0, tta=None, tta_below=1.0):
    """`totals` takes up the loss and the accuracy of all batches, with dropout and batch norm at rest.

    A net that is trained with smoothed labels is to be validated with them too: their loss falls as it learns, while
    the plain one mostly says how far the net keeps from certainty, and may rise.
    """
    model.eval()
    for images, labels in batches:
        with autocast():
            logits = predict(model, images, tta, tta_below)
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        totals.add(loss, logits, labels)


# ---------------------------------------------------------------------------------------------------
# Early stopping
# ---------------------------------------------------------------------------------------------------


class EarlyStopping:
    """Keeps the best weights of the model it is given, and says when to stop.

    The best epoch is that of the lowest validation loss; `should_stop` turns true after `tolerance` epochs in a
    row without a lower one (0: never).
    """

    def __init__(self, tolerance):
        self.tolerance = tolerance
        self.best_loss, self.best_epoch, self.best_weights, self.epochs_without_improvement = math.inf, 0, None, 0

    def step(self, epoch, val_loss, model):
        """Take note of an epoch; return whether it is the best so far."""
        improved = val_loss < self.best_loss
        if improved:
            self.best_loss, self.best_epoch, self.epochs_without_improvement = val_loss, epoch, 0
            self.best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        else:
            self.epochs_without_improvement += 1
        return improved

    @property
    def should_stop(self):
        return 0 < self.tolerance <= self.epochs_without_improvement

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "tolerance"}

    def load_state_dict(self, state):
        vars(self).update(state)


# ---------------------------------------------------------------------------------------------------
# Run directory
# ---------------------------------------------------------------------------------------------------


def write_atomically(path, content):
    """Write bytes beside `path`, flush and rename: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def save_checkpoint(path, state):
    """Save tensors and plain values, to be read with `load_checkpoint`.

    torch does not check what it loads. A checkpoint is a zip file, which ends with the length of its comment and the
    comment: here that is the SHA-256 of all before it.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()[:-2]
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, content + len(digest).to_bytes(2, "little") + digest)


def load_checkpoint(path):
    """What `save_checkpoint` wrote, on the CPU; never runs code from it. RunError where it is not that, to the bit."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run has not got so far, or the file was removed") from None
    digest = hashlib.sha256(content[:-66]).hexdigest().encode()
    if content[-66:] != len(digest).to_bytes(2, "little") + digest:
        raise RunError(f"{path} is damaged, or is not a checkpoint of this project: its checksum is not right")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(f"{path} is not a checkpoint of this project ({type(error).__name__})") from error


FORMAT = 1  # of the checkpoints: raised when what is in them changes

# What every run.json has.
RECORD_KEYS = {
    "name", "script", "args", "status", "started", "seconds", "device", "precision", "data", "parameters", "epochs",
    "best", "test",
}  # fmt: skip


def read_record(directory):
    """run.json of a run directory. RunError where there is none, or one that is not of this version."""
    path = directory / "run.json"
    if not path.is_file():
        raise RunError(f"{directory} is not a run directory: there is no run.json")
    record = read_json(path)
    missing = RECORD_KEYS - record.keys() if isinstance(record, dict) else RECORD_KEYS
    if missing:
        raise RunError(f"{path} is not of this version of the scripts: it lacks {', '.join(sorted(missing))}")
    return record


def read_log(directory):
    """The rows of log.jsonl."""
    path = directory / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is missing or damaged ({error})") from error


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold an exclusive lock on the file `path`, which ends with the process at the latest."""
    with open(path, "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise RunError(f"{path.parent} is in use by another process") from None
        yield


def is_locked(path):
    """Whether another process holds the lock on the file `path`; nothing is written."""
    if not fcntl or not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def utc_now():
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def environment(device, precision):
    """Where and with what a run is computed: the part of run.json that a continuation writes anew."""

    def git(*command):
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        state = {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        state = None
    # Not by importing it: that takes a second, and a run on synthetic images does without it.
    torchvision = importlib.metadata.version("torchvision")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision}
    return {
        "device": device.type, "precision": precision, "versions": versions, "host": platform.node(), "git": state,
    }  # fmt: skip


def make_directory(parent, name, prefix, fill=lambda directory: None):
    """Make parent/name, or with no name one of its own from `prefix` and the time, with what `fill(directory)` writes
    in it, all at once. UsageError where it exists."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        directory = parent / (name or f"{prefix}-{stamp}-{secrets.token_hex(2)}")
        with tempfile.TemporaryDirectory(prefix=".new-", dir=parent) as temporary:
            new = Path(temporary, directory.name)
            new.mkdir()
            fill(new)
            try:
                return new.rename(directory)
            except OSError:
                if not directory.exists():
                    raise
        if name:
            raise UsageError(f"{directory} exists already")


class Run:
    """A run directory: `record` is run.json, `history` the rows of log.jsonl; each save is whole or not at all."""

    def __init__(self, directory, record):
        """A run whose directory exists; `record` is its run.json."""
        self.directory, self.record, self.history = directory, record, []
        self.began, self.earlier_seconds = time.perf_counter(), record["seconds"]

    @classmethod
    def create(cls, args, record):
        """Make runs/<name>/, which must not exist, with a run.json of status `running`; both appear at once."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        for key in ("script", "argv", "resume"):
            del plain[key]
        record = {
            "name": None, "script": args.script, "argv": args.argv, "args": plain, "status": "running",
            "error": None, "started": utc_now(), "ended": None, "seconds": 0.0, "compile_seconds": 0.0,
            "seed": args.seed, **record, "epochs": 0, "best": None, "test": None,
        }  # fmt: skip

        def run_in(directory):
            return cls(directory, {**record, "name": directory.name})

        return run_in(make_directory(args.runs_dir, args.run_name, args.script, lambda new: run_in(new).write_record()))

    def remove_leftovers(self):
        """Remove what a process that was killed in the middle of a save has left beside the files."""
        for name in ("best.pt", "last.pt", "log.jsonl", "run.json"):
            for path in self.directory.glob(f".{name}.*.tmp"):
                path.unlink()

    def last_state(self):
        """What last.pt holds, or None of a run that was killed before its first save. RunError."""
        path = self.directory / "last.pt"
        if not path.exists() and not self.record["epochs"]:
            return None
        state = load_checkpoint(path)
        if not isinstance(state, dict) or (state.get("format"), state.get("run")) != (FORMAT, self.record["name"]):
            raise RunError(f"{path} is of another run, or not of this version of the scripts")
        return state

    def write_record(self, **changes):
        seconds = self.earlier_seconds + time.perf_counter() - self.began
        self.record.update(changes, seconds=seconds)
        write_json(self.directory / "run.json", self.record)

    def save_last(self, epoch, parts):
        """Write last.pt: the history, and the state of each of `parts`."""
        states = {name: part.state_dict() for name, part in parts.items()}
        about = {"format": FORMAT, "run": self.record["name"], "epoch": epoch, "history": self.history}
        save_checkpoint(self.directory / "last.pt", {**about, **states})

    def save_best(self, row, blueprint, weights):
        """Write best.pt: the weights of the epoch of `row`, and the `blueprint` of the model around them."""
        self.record["best"] = {name: row[name] for name in ("epoch", "val_loss", "val_acc")}
        save_checkpoint(self.directory / "best.pt", {**blueprint, **self.record["best"], "weights": weights})

    def write_log(self):
        write_atomically(self.directory / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.history).encode())


@contextlib.contextmanager
def weights_and_biases(args, run):
    """Yield a function that logs a row to Weights & Biases, or to nowhere; the W&B run is finished in any case."""
    if args.wandb == "disabled":
        yield lambda row: None
        return
    import wandb

    # A run that continues goes on in its W&B run, which no run of the same name elsewhere shares. In a W&B sweep the
    # agent has named it.
    identity = f"{run.record['name']}-{re.sub('[^0-9]', '', run.record['started'])}"[-128:]
    named = {} if "WANDB_SWEEP_ID" in os.environ else {"id": identity, "resume": "allow"}
    try:
        tracked = wandb.init(
            project=args.wandb_project, name=run.record["name"], **named,
            config=run.record["args"], dir=run.directory.absolute(), mode=args.wandb,
            settings=wandb.Settings(silent=args.quiet, console="off"),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise RunError(f"--wandb {args.wandb}: {error}") from error
    exit_code = 1
    try:
        yield tracked.log
        exit_code = 0
    finally:
        try:
            for part in ("best", "test"):
                tracked.summary.update({f"{part}_{key}": value for key, value in (run.record[part] or {}).items()})
        finally:
            tracked.finish(exit_code=exit_code)


def has_wandb_key(quiet):
    """Whether W&B has an API key. UsageError where it has something else in its place."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=quiet))
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        raise UsageError(f"Weights & Biases: {error}") from error


def check_wandb(args):
    """What can be known of --wandb before anything is loaded."""
    if args.wandb == "disabled":
        return
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise UsageError(f"--wandb {args.wandb} needs the package wandb: pip install wandb") from None
    if args.wandb == "online" and not has_wandb_key(args.quiet):
        raise UsageError("--wandb online needs an API key: `wandb login`, WANDB_API_KEY, or use --wandb offline")


# ---------------------------------------------------------------------------------------------------
# Fit
# ---------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; the argument is its name. Like KeyboardInterrupt, it is no error to be caught as one."""


class GracefulStop:
    """While active, the first SIGINT or SIGTERM sets `signal` for `watch` to see; a second one ends at once.

    Once `deaf`, none does anything: all that is left is to write down how the run has ended.
    """

    signal, deaf = None, False

    def __enter__(self):
        # Python lets only the main thread set handlers; in another thread whoever started it does the stopping.
        main = threading.current_thread() is threading.main_thread()
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if self.deaf:
            return
        if self.signal:
            raise Interrupted(signal.Signals(signum).name)
        self.signal = signal.Signals(signum).name

    def watch(self, batches):
        """Yield the batches; raise Interrupted between two of them when a signal has come."""
        for batch in batches:
            self.check()
            yield batch

    def check(self):
        if self.signal:
            raise Interrupted(self.signal)


EVALUATION_BATCH = 1000
WHITENING_IMAGES = 5000


def autocast_to(device, precision):
    """Return a function that makes the context of a forward pass in `precision`."""
    dtype = PRECISIONS[precision]
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)


class Trainer:
    """Trains `model` on `train_set`, validates it on `val_set`, and keeps what becomes of it in `run`.

    `blueprint` is what best.pt says of the model beside its weights; `stop` a GracefulStop, `screen` a Screen. Every
    random number of epoch k follows from --seed and k, and the learning rate from the step, so that the weights, the
    optimiser, the early stopping and the history are the whole state.
    """

    def __init__(self, args, model, train_set, val_set, blueprint, precision, run, stop, screen):
        self.args, self.model, self.train_set, self.blueprint = args, model, train_set, blueprint
        self.run, self.stop, self.screen = run, stop, screen
        self.device = train_set.images.device
        self.autocast = autocast_to(self.device, precision)
        augmentation = None
        if args.augment:
            changes = args.rotation, args.brightness, args.hue, args.flip, args.alternate_flip, args.shift
            augmentation = Augmentation(*changes)
        self.normalization = blueprint["mean"], blueprint["std"]
        self.loader = Loader(train_set, args.batch_size, *self.normalization, augmentation, args.seed)
        self.val_loader = Loader(val_set, EVALUATION_BATCH, *self.normalization)
        self.optimizer = make_optimizer(args, model, precision)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.early_stopping = EarlyStopping(args.tolerance)
        self.parts = {
            "model": model, "optimizer": self.optimizer, "scaler": self.scaler, "early_stopping": self.early_stopping
        }  # fmt: skip
        self.step_model = model
        if args.compile:
            # Each size of images, and the smaller batch at the end of an epoch, gets its own code, however many.
            torch.compiler.config.recompile_limit = 64
            self.step_model = torch.compile(model, dynamic=False)
        self.whitenings = [layer for layer in model.modules() if isinstance(layer, Whitening)]
        self.done, self.unsaved_best = 0, None

    def begin(self):
        """Learn the whitening from training images, and save what the first epoch starts from."""
        if self.whitenings:
            random = generator_for(self.args.seed, "whitening")
            sample = self.train_set.select(torch.randperm(len(self.train_set), generator=random)[:WHITENING_IMAGES])
            images, _ = next(Loader(sample, WHITENING_IMAGES, *self.normalization).batches())
            for layer in self.whitenings:
                layer.learn(images)
        self.run.write_log()
        self.run.save_last(0, self.parts)

    def restore(self, state):
        """Go on from `state`, what last.pt holds. Raises RunError."""
        run = self.run
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.done, run.history = state["epoch"], state["history"]
            best = run.history[self.early_stopping.best_epoch - 1] if self.early_stopping.best_epoch else None
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{run.directory}/last.pt is not of this version of the scripts ({error})") from error
        run.record.update(epochs=self.done, best=None)
        run.write_log()
        if best:
            run.save_best(best, self.blueprint, self.early_stopping.best_weights)
        else:  # it may have been killed between best.pt and last.pt
            (run.directory / "best.pt").unlink(missing_ok=True)

    def batches(self, epoch):
        """The batches of an epoch, for which the model is made ready."""
        for layer in self.whitenings:
            layer.begin_epoch(epoch)
        # Counted from the end, so that however few the epochs are, the last is of the images' own size.
        sizes, epochs = self.args.sizes, self.args.epochs
        side = sizes[-1 - (epochs - epoch) * len(sizes) // epochs] if sizes else None
        return self.stop.watch(self.loader.batches(epoch, side))

    def batches_to_compile(self, epochs):
        """For each of `epochs` the sizes of batches that it trains on, and those that it validates on."""
        with torch.inference_mode():
            validation = {len(images): images for images, _ in self.val_loader.batches()}.values()
        for epoch in epochs:
            images, _ = next(self.batches(epoch))
            yield images, True
            yield images[: len(self.train_set) - (len(self.loader) - 1) * self.args.batch_size], True
            yield from ((images, False) for images in validation)

    def steps(self, epoch, totals):
        """The batches of an epoch: each sets its learning rate, and the bar follows."""
        with self.screen.bar(len(self.loader), f"epoch {epoch}/{self.args.epochs}") as bar:
            for index, batch in enumerate(self.batches(epoch)):
                factor = SCHEDULES[self.args.schedule]((epoch - 1 + index / len(self.loader)) / self.args.epochs)
                for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                    group["lr"] = peak * factor
                yield batch
                # The bar reads the loss from the device when it redraws itself, not for every batch.
                if bar.update():
                    bar.set_postfix(loss=f"{totals.loss:.4f}", refresh=False)

    def train_and_validate(self, epoch):
        """One epoch; return its row of log.jsonl, which is in the history now."""
        started = time.perf_counter()
        torch.manual_seed(random_seed(self.args.seed, "dropout", epoch))
        train, val = Totals(self.device), Totals(self.device)
        batches, smoothing = self.steps(epoch, train), self.args.label_smoothing
        train_epoch(self.step_model, batches, self.optimizer, self.scaler, self.autocast, smoothing, train)
        train_loss, trained = train.loss, time.perf_counter()
        evaluate_epoch(self.step_model, self.stop.watch(self.val_loader.batches()), self.autocast, val, smoothing)
        row = {
            "epoch": epoch, "train_loss": train_loss, "train_acc": train.accuracy, "val_loss": val.loss,
            "val_acc": val.accuracy, "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            "images_per_second": len(self.train_set) / (trained - started),
        }  # fmt: skip
        self.run.history.append(row)
        if self.early_stopping.step(epoch, row["val_loss"], self.model):
            self.unsaved_best = row
        return row

    def save_results(self):
        if self.unsaved_best:
            self.run.save_best(self.unsaved_best, self.blueprint, self.early_stopping.best_weights)
            self.unsaved_best = None
        self.run.write_log()
        self.run.write_record(epochs=len(self.run.history))

    def fit(self, log_row):
        """Train until --epochs, --stop-after or early stopping, and leave the model with the weights of its best epoch.

        After each epoch, or the first after --save-interval, `run` holds best.pt, log.jsonl, run.json and last.pt,
        written in that order: last.pt, from which a run continues, is never ahead of the others. `log_row` is called
        with each row. Returns the final status; raises NotFinite and Interrupted.
        """
        args, early_stopping = self.args, self.early_stopping
        last = min(args.epochs, args.stop_after or args.epochs)
        epochs = range(self.done + 1, last + 1)
        if args.compile:
            seconds = compile_ahead(self.step_model, self.batches_to_compile(epochs), self.autocast)
            self.run.record["compile_seconds"] = self.run.record.get("compile_seconds", 0.0) + seconds
        saved = time.perf_counter()
        try:
            for epoch in epochs:
                if early_stopping.should_stop:
                    break
                row = self.train_and_validate(epoch)
                if epoch == last or early_stopping.should_stop or time.perf_counter() - saved >= args.save_interval:
                    self.save_results()
                    self.run.save_last(epoch, self.parts)
                    saved = time.perf_counter()
                log_row(row)
                self.screen.say(
                    "epoch {epoch:2}/{epochs}  train loss {train_loss:.4f} accuracy {train_acc:.2%}  validation loss "
                    "{val_loss:.4f} accuracy {val_acc:.2%}  {seconds:.1f} s{best}".format(
                        **row, epochs=args.epochs, best="  best" * (early_stopping.best_epoch == epoch)
                    )
                )
                self.stop.check()
        except (NotFinite, Interrupted):
            self.save_results()
            raise
        self.model.load_state_dict(early_stopping.best_weights)
        if early_stopping.should_stop:
            return "stopped_early"
        return "finished" if self.run.record["epochs"] == args.epochs else "interrupted"


def run_job(args, synthetic):
    """Train and test as `args` from `parse_arguments` say; return run.json's object with its `directory` added.

    `synthetic(train)` draws the images of --dataset synthetic. Raises UsageError and RunError. A loss that is not
    finite and a signal are no exceptions to the caller: they are the record's `status`. The seeds are torch's global
    ones: one run at a time in a process.
    """
    screen = Screen(args.quiet)
    device, precision = choose_device(args)
    check_wandb(args)
    check_runs_dir(args)
    if device.type == "cpu":
        keep_freed_memory()

    images, load_test = load_dataset(args, synthetic)
    checksum, classes, channels = images.checksum, images.classes, images.images.shape[1]
    train_set, val_set = split_off_validation(args, images, load_test)
    del images
    mean, std = ([0.5] * channels, [0.5] * channels) if args.normalize == "half" else train_set.mean_and_std()
    train_set, val_set = train_set.to(device), val_set.to(device)

    blueprint = {
        "format": FORMAT, "script": args.script, "model": args.model, "model_options": args.model_options,
        "image_shape": list(image_shape(args)), "classes": classes, "mean": mean, "std": std, "dataset": args.dataset,
    }  # fmt: skip
    torch.manual_seed(random_seed(args.seed, "weights"))
    model = build_model(blueprint).to(device)

    surroundings = environment(device, precision)
    if not args.resume:
        data = {
            "name": args.dataset, "train": len(train_set), "val": len(val_set), "test": None,
            "selection": "validation split" if args.val_size else "test set", "checksum": checksum,
            "test_checksum": None,
        }  # fmt: skip
        parameters = sum(p.numel() for p in model.parameters())
        run = Run.create(args, {**surroundings, "data": data, "parameters": parameters})
    directory = args.resume or run.directory
    with locked(directory / ".lock"), GracefulStop() as stop:
        if args.resume:
            run = Run(directory, read_record(directory))
            run.remove_leftovers()
        record = run.record
        if record["data"]["checksum"] != checksum:
            raise RunError(f"{args.dataset} is not what {directory} was trained on: the checksums differ")
        if record["status"] == "diverged":
            raise RunError(f"{directory}: {record['error']}, and would again; start anew with a lower --lr")
        if record["status"] == "stopped_early" or (record["status"], record["epochs"]) == ("finished", args.epochs):
            ended = record["status"].replace("_", " ")
            screen.say(f"{directory}: {ended} after {record['epochs']} epochs, nothing to do")
            return {**record, "directory": str(directory)}
        state = run.last_state() if args.resume else None
        record["args"]["epochs"] = args.epochs
        record["data"].update(test=None, test_checksum=None)
        screen.say(
            f"{record['name']}: {args.model}, {record['parameters']:,} parameters; {args.dataset}, "
            f"{len(train_set):,} training and {len(val_set):,} validation images; {device.type}, {precision}"
        )
        if not args.val_size:
            screen.say("--val-size 0: the test set selects the epoch, as in the tutorials; its accuracy is flattered")
        error = None
        try:
            run.write_record(**surroundings, status="running", error=None, ended=None, test=None)
            with weights_and_biases(args, run) as log_row:
                trainer = Trainer(args, model, train_set, val_set, blueprint, precision, run, stop, screen)
                if state:
                    trainer.restore(state)
                else:
                    trainer.begin()
                status = trainer.fit(log_row)
                if args.test and status != "interrupted":
                    test_set = load_test()
                    test_sum, test_set = test_set.checksum, test_set.to(device)
                    batches, totals = Loader(test_set, EVALUATION_BATCH, mean, std).batches(), Totals(device)
                    views = {"tta": args.tta, "tta_below": args.tta_below}
                    evaluate_epoch(model, stop.watch(batches), trainer.autocast, totals, **views)
                    record["data"].update(test=len(test_set), test_checksum=test_sum)
                    record["test"] = {"loss": totals.loss, "acc": totals.accuracy}
        except Interrupted as interruption:
            status, error = "interrupted", str(interruption)
        except NotFinite as reason:
            status, error = "diverged", f"{reason} in epoch {len(run.history) + 1}"
        except BaseException as exception:
            stop.deaf = True
            with contextlib.suppress(OSError):  # it may be the disk that has failed: the first error is the one to tell
                run.write_record(status="failed", error=f"{type(exception).__name__}: {exception}", ended=utc_now())
            raise
        stop.deaf = True
        run.write_record(status=status, error=error, ended=utc_now())
    if record["best"]:
        text = "best epoch {epoch}: validation loss {val_loss:.4f}, accuracy {val_acc:.2%}"
        screen.say(text.format(**record["best"]))
    if record["test"]:
        screen.say("test loss {loss:.4f}, accuracy {acc:.2%}".format(**record["test"]))
    screen.say(f"{status.replace('_', ' ')}: {directory}")
    return {**record, "directory": str(directory)}
