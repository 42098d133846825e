"""What the scripts share, in the order in which data flows: options, data, augmentation and batches, models,
optimisers, train and test of one epoch, early stopping, the run directory, fit.

A training script adds its recipes and its synthetic images; its `main` shows how the parts are put together.
"""

import os
import signal

# Importing torch takes seconds. Until it is there, Ctrl-C ends the program in one line.
interrupt_handler = signal.signal(
    signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130))
)

import argparse
import contextlib
import ctypes
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, do not resume one run from two processes.
    fcntl = None

signal.signal(signal.SIGINT, interrupt_handler)

HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """A request that cannot be met as it was asked: one line, exit status 2."""


class RunError(Exception):
    """A failure that the user can cause and mend (data, disk, checkpoint): one line, exit status 1."""


class NotFinite(Exception):
    """A loss is infinite or not a number: the training has diverged."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; the argument is its name. Like KeyboardInterrupt, no error to be caught as one."""


# ------------------------ Options ------------------------
class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and ends the help of each flag with its default."""

    def _get_help_string(self, action):
        unset = action.default in (None, False, [], argparse.SUPPRESS)
        return (action.help or "") + ("" if unset else " (%(default)s)")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line per error, a suggestion for a mistyped flag, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        """Exit with status 2."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
        message += f" (did you mean {close[0]}?)" if close else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def number(kind: type, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf) -> Callable:
    """An argparse `type`: a finite int or float from `low` to `high`, more than `above` and less than `below`."""
    bounds = (("at least", low), ("at most", high), ("above", above), ("below", below))
    limits = " and ".join(f"{word} {bound}" for word, bound in bounds if math.isfinite(bound))

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and above < value < below and math.isfinite(value):
                return value
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {wanted} {limits}, not {text!r}")

    return parse


def run_name(text: str) -> str:
    """An argparse `type`: the name of a directory, without a path."""
    if text in ("", ".", "..") or not {"/", os.sep, "\0"}.isdisjoint(text):
        raise argparse.ArgumentTypeError(f"expected a name without slashes, not {text!r}")
    return text


def absolute_path(text: str) -> Path:
    """An argparse `type`: a run names the same places wherever it is continued from."""
    return Path(os.path.expanduser(text)).absolute()


def add_options(parser: argparse.ArgumentParser, recipes: dict) -> None:
    """Add the flags of a training script. A recipe, {flag: default}, sets those that have no default here."""
    count, share, probability = number(int, 1), number(float, 0, below=1), number(float, 0, 1)
    switch = argparse.BooleanOptionalAction

    flag = parser.add_argument_group("used most").add_argument
    text = f"{', '.join(DATASETS)}, or a folder of images: PATH/<class>/*, or PATH/train/<class>/* and PATH/test/..."
    flag("--dataset", metavar="NAME|PATH", help=text)
    flag(
        "--recipe",
        choices=tuple(recipes),
        default="default",
        help="a set of defaults; --recipe NAME --help shows it",
    )
    flag("--model", choices=tuple(MODELS), help="architecture")
    flag("--epochs", type=count, metavar="N", help="passes over the training images, at most")
    flag("--batch-size", type=count, metavar="IMAGES", help="images in one step")
    flag(
        "--lr",
        type=number(float, above=0),
        metavar="RATE",
        help="learning rate, the peak of the schedule",
    )
    flag(
        "--augment", action=switch, help="change each training image at random, in every epoch anew"
    )
    flag(
        "--seed",
        type=number(int, 0),
        default=42,
        metavar="N",
        help="of split, weights, order, augmentation, dropout",
    )
    flag(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: a GPU where there is one",
    )
    flag(
        "--run-name",
        type=run_name,
        metavar="NAME",
        help="of the run's directory (script, time, random characters)",
    )
    flag("--resume", type=absolute_path, metavar="RUN", help="go on with the run in this directory")
    flag(
        "--wandb",
        choices=("disabled", "offline", "online"),
        default="disabled",
        help="log to Weights & Biases too",
    )
    flag("--quiet", action="store_true", help="print only errors")

    flag = parser.add_argument_group(
        "model: in brackets, which models have the option, and its default"
    ).add_argument
    flag(
        "--c1",
        type=count,
        metavar="CHANNELS",
        help="first filters (cnn 32, confignet 48, fastnet 64, patchnet 24)",
    )
    flag(
        "--c2",
        type=count,
        metavar="CHANNELS",
        help="later filters (cnn 64, confignet 96, fastnet 256, patchnet 48)",
    )
    flag("--c3", type=count, metavar="CHANNELS", help="last filters (fastnet 256)")
    flag(
        "--l1",
        type=count,
        metavar="UNITS",
        help="hidden dense layer (dense 128, cnn 512, confignet 256)",
    )
    flag("--d1", type=share, metavar="PROBABILITY", help="dropout (dense 0.5, confignet 0.1)")
    flag(
        "--kernel-size",
        type=count,
        metavar="PIXELS",
        help="side of the filters (convnet 3, confignet 3)",
    )
    text = "order the layers as the tutorials do (dense, convnet, confignet)"
    flag("--tutorial-layers", action=switch, default=False, help=text)

    flag = parser.add_argument_group("data").add_argument
    flag(
        "--data-dir",
        type=absolute_path,
        default=HERE / "data",
        metavar="DIR",
        help="where the datasets are",
    )
    flag(
        "--image-size",
        type=count,
        metavar="PIXELS",
        help="images of a folder are resized to this square",
    )
    flag("--grey", action=switch, help="images of a folder are read without their colours")
    flag(
        "--val-size",
        type=share,
        default=0.1,
        metavar="PART",
        help="of the training images; 0: use the test set",
    )
    flag("--limit-train", type=count, metavar="IMAGES", help="train on so many only")
    flag(
        "--normalize",
        choices=("half", "dataset"),
        default="half",
        help="mean and std: 0.5, or the training images'",
    )

    flag = parser.add_argument_group(
        "augmentation: each image by its own random amount"
    ).add_argument
    flag(
        "--rotation",
        type=number(float, 0, 180),
        metavar="DEGREES",
        help="turn by up to so many, either way",
    )
    flag(
        "--brightness",
        type=probability,
        metavar="PART",
        help="make brighter or darker by up to this part",
    )
    flag(
        "--hue",
        type=number(float, 0, 0.5),
        metavar="TURNS",
        help="turn the hue by up to so much, 1 all round",
    )
    flag("--flip", type=probability, metavar="PROBABILITY", help="mirror left to right")
    flag(
        "--alternate-flip",
        action=switch,
        default=False,
        help="draw the flips once, and invert them every epoch",
    )
    flag(
        "--shift",
        type=number(int, 0),
        default=0,
        metavar="PIXELS",
        help="move by up to so many along each axis",
    )

    flag = parser.add_argument_group("training").add_argument
    flag("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="sgd has Nesterov momentum")
    flag(
        "--schedule",
        choices=tuple(SCHEDULES),
        default="constant",
        help="course of the learning rate",
    )
    flag(
        "--aux-lr",
        type=number(float, above=0),
        default=0.03,
        metavar="RATE",
        help="of what muon leaves to AdamW",
    )
    flag("--momentum", type=share, default=0.9, metavar="FACTOR", help="of sgd and muon")
    flag(
        "--weight-decay",
        type=number(float, 0),
        default=0.0,
        metavar="FACTOR",
        help="decoupled in adamw and muon",
    )
    flag(
        "--class-weights",
        choices=("balanced",),
        help="weigh each class in the loss by how rare it is",
    )
    flag(
        "--label-smoothing",
        type=share,
        default=0.0,
        metavar="PART",
        help="of the target, spread over all classes",
    )
    text = "sides of the training images, over equal parts of the run"
    flag(
        "--sizes",
        type=lambda text: [*map(number(int, 4), text.split(","))],
        metavar="PIXELS,...",
        help=text,
    )
    flag(
        "--tolerance",
        type=number(int, 0),
        metavar="EPOCHS",
        help="stop after so many without a new best; 0: never",
    )
    flag("--test", action=switch, default=True, help="read the test set, once, at the end")
    flag(
        "--tta", choices=TTA, help="average views of the test images that the model is not sure of"
    )

    flag = parser.add_argument_group("machine and run").add_argument
    flag(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: what the hardware computes fast",
    )
    flag(
        "--compile",
        action=switch,
        default=False,
        help="torch.compile: a slow start, faster steps on a GPU",
    )
    flag(
        "--runs-dir",
        type=absolute_path,
        default=HERE / "runs",
        metavar="DIR",
        help="where run directories are made",
    )
    flag(
        "--stop-after", type=count, metavar="N", help="leave after epoch N, to go on with --resume"
    )
    flag(
        "--wandb-project",
        default="image-classifiers",
        metavar="NAME",
        help="where W&B files the run",
    )


# What may differ when a run goes on: where it runs, how it reports, and how long; never what it computes.
CHANGEABLE_ON_RESUME = {
    "resume",
    "epochs",
    "tolerance",
    "stop_after",
    "data_dir",
    "device",
    "quiet",
    "wandb",
    "wandb_project",
}


def parse_arguments(
    script: str, description: str, recipes: dict, argv: list | None = None
) -> argparse.Namespace:
    """`argv` (None: the command line) of the training script at the path `script`; exits with 2 on a bad argument.

    The defaults are those of --recipe, or the arguments of the run that --resume names.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(
        prog=Path(script).name, usage="%(prog)s [flags]", description=description
    )
    add_options(parser, recipes)

    # First what the defaults depend on.
    first = ArgumentParser(prog=parser.prog, add_help=False)
    for name in ("--recipe", "--resume", "--optimizer"):
        first.add_argument(name)
    first, _ = first.parse_known_args(argv)
    parser.set_defaults(**{**recipes["default"], **recipes.get(first.recipe, {})})
    if first.optimizer == "muon" and parser.get_default("optimizer") != "muon":
        parser.set_defaults(**MUON_DEFAULTS)
    try:
        record = read_record(Path(first.resume)) if first.resume else None
        parser.set_defaults(**(record["args"] if record else {}))
        args = parser.parse_args(argv)

        if record:
            check_resumed(args, parser.parse_args(["--resume", first.resume]), record["epochs"])
        elif args.dataset not in DATASETS:
            args.dataset = str(absolute_path(args.dataset))
            if not Path(args.dataset).is_dir():
                raise UsageError(
                    f"--dataset {args.dataset}: neither a folder nor one of {', '.join(DATASETS)}"
                )
        if not args.val_size and not args.test:
            raise UsageError(
                "--val-size 0 chooses the epoch on the test set, which --no-test forbids to read"
            )
        args.device, args.precision = choose_device(args.device, args.precision)
        check_wandb(args)
    except (UsageError, RunError) as error:
        parser.error(str(error))
    args.script, args.argv = Path(script).stem, argv
    return args


def check_resumed(args: argparse.Namespace, recorded: argparse.Namespace, epochs: int) -> None:
    """UsageError where `args` would change what a run computes that has so many epochs and the arguments `recorded`."""
    changed = {name for name, value in vars(args).items() if value != getattr(recorded, name)}
    for name in sorted(changed - CHANGEABLE_ON_RESUME):
        raise UsageError(f"--{name.replace('_', '-')} cannot change when a run is resumed")
    if args.epochs < epochs:
        raise UsageError(f"--epochs {args.epochs}: the run already has {epochs} epochs")
    if "epochs" in changed and (args.schedule != "constant" or args.sizes):
        cause = "--sizes" if args.sizes else f"--schedule {args.schedule}"
        raise UsageError(
            f"--epochs cannot change under {cause}, which is planned for the whole run"
        )


# The type that autocast computes in; None leaves all to torch's defaults for float32 (on CUDA, TF32 convolutions).
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str, precision: str) -> tuple[str, str]:
    """What `auto` means on this machine. UsageError where it lacks the device."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise UsageError(
            f"--device {device}: this machine or this build of torch has none; use --device cpu or auto"
        )
    if precision == "auto" and device == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        # Without AVX-512's bf16 instructions a CPU emulates it, many times slower than fp32.
        precision = "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
    if (device, precision) == ("cpu", "fp16"):
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32")
    # Two runs of one seed are to give the same bytes; cuDNN's fastest kernels do not.
    torch.backends.cudnn.deterministic = True
    if device == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # Have glibc keep the gigabytes that each step frees: to get them anew took a third of ConfigNet's step.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    return device, precision


def autocast_to(device: str, precision: str) -> Callable:
    """A function that makes the context of a forward pass in `precision`."""
    return functools.partial(
        torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32"
    )


def command_line(main: Callable) -> int:
    """Run `main(argv) -> dict` as a program: print a user's mistake as one line, and return the exit status."""

    def fail(status, message):
        with contextlib.suppress(OSError):  # nobody reads it; the exit status tells as well
            print(
                f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}",
                file=sys.stderr,
            )
        return status

    signal.signal(signal.SIGTERM, interrupt)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a file opened later would take its place, and what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 (tqdm wants one)
    if (
        sys.stdout is not None
    ):  # the name of a class or a file may have characters that the terminal's encoding lacks
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
        if not re.search(
            r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE
        ):
            raise
        return fail(1, f"{str(error).splitlines()[0]}; try a smaller --batch-size or model")
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except Interrupted as name:
        return fail(128 + signal.Signals[str(name)], f"interrupted by {name}")
    if record.get("status") == "diverged":
        return fail(
            1,
            f"{record['error']}; try a lower --lr. The epochs before are in {shown(record['directory'])}",
        )
    if record.get("status") == "interrupted" and record["error"]:
        go_on = record.get("go_on") or shlex.join(
            ["python", sys.argv[0], "--resume", shown(record["directory"])]
        )
        return fail(
            128 + signal.Signals[record["error"]],
            f"interrupted by {record['error']}; go on with: {go_on}",
        )
    return 0


def say(line: str, quiet: bool = False) -> None:
    """Print a line for a person, unless `quiet`. A reader that went away (`| head -1`) does not end a run."""
    try:
        if not quiet:
            with tqdm.external_write_mode():  # no bar on the same line
                print(line, flush=True)
    except BrokenPipeError:
        # As Python's documentation has it: its last flush must find a file that is open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(path: Path | str) -> str:
    """A path as a person writes it: relative where it lies below the current directory."""
    return (
        str(Path(path).relative_to(Path.cwd()))
        if Path(path).is_relative_to(Path.cwd())
        else str(path)
    )


def random_seed(*parts) -> int:
    """A seed below 2**63 that follows from `parts` alone, so that each use of --seed draws numbers of its own."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator with the seed `random_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(random_seed(*parts))


# ------------------------ Data ------------------------
@dataclass
class ImageSet:
    """A whole split in memory: `images` uint8 [N, C, H, W], `labels` int64 [N], the names of the classes, and of a
    folder the `files`.

    The colours of a pixel lie side by side (channels_last), and so they do in a batch, which is an index.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    files: list[Path] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: torch.Tensor) -> "ImageSet":
        """The images at `indices`, or where a mask is true."""
        files = self.files and [
            self.files[index] for index in torch.arange(len(self))[indices].tolist()
        ]
        return ImageSet(self.images[indices], self.labels[indices], self.classes, files)

    def to(self, device: str) -> "ImageSet":
        """The same images on `device`; no copy of those that are there."""
        images = self.images.to(device, memory_format=torch.channels_last)
        return ImageSet(images, self.labels.to(device), self.classes, self.files)

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of images and labels."""
        digest = hashlib.sha256(self.images.cpu().permute(0, 2, 3, 1).contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def class_weights(self) -> torch.Tensor:
        """For the loss, [K]: so much that all classes count the same together, and an image 1 on average."""
        counts = self.labels.bincount(minlength=len(self.classes))
        return len(self) / (len(self.classes) * counts.clamp(min=1))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per channel, of the values in [0, 1], from a histogram of the 256 levels."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack(
            [torch.bincount(c.flatten(), minlength=256) for c in self.images.cpu().unbind(1)]
        )
        mean = counts.double() @ levels / counts.sum(1)
        std = ((counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1)).sqrt()
        return mean.tolist(), std.clamp(
            min=1 / 255
        ).tolist()  # a channel may be the same in all images


def stratified_sample(labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `size` of the images with `labels` [N], each class in its own proportion to within one: a mask [N]."""
    counts = torch.bincount(labels)
    quota = counts.double() * size / len(labels)
    take = quota.floor().long()
    order = torch.randperm(len(labels), generator=generator)
    # What rounding down has left over goes to the classes that lost most by it, among equals by lot.
    classes = torch.randperm(len(counts), generator=generator)
    classes = classes[(take - quota)[classes].argsort(stable=True)]
    take[classes[: size - int(take.sum())]] += 1
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(take.tolist()):
        mask[order[labels[order] == label][:count]] = True
    return mask


# The names of --dataset, and torchvision's for them.
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
DATASETS = (*TORCHVISION, "synthetic")

# A process that trains many times sets this to a dictionary: then every part of a dataset is loaded once.
loaded_images: dict | None = None


def load_images(args: argparse.Namespace, part: str, synthetic: Callable) -> ImageSet | None:
    """The images of --dataset: its `part` train, test or, None where it has no such folder, val.

    `synthetic(train)` draws those of that name. RunError says what is missing or damaged.
    """
    key = args.script, args.dataset, args.data_dir, args.image_size, args.grey, part
    if loaded_images and key in loaded_images:
        return loaded_images[key]
    if args.dataset not in DATASETS:
        images = read_folder(Path(args.dataset), part, args.image_size, args.grey, args.quiet)
    elif part == "val":
        images = None
    elif args.dataset == "synthetic":
        images = synthetic(part == "train")
    else:
        images = read_torchvision(args.dataset, args.data_dir, part == "train", args.quiet)
    if loaded_images is not None:
        loaded_images[key] = images
    return images


def load_training_images(
    args: argparse.Namespace, synthetic: Callable
) -> tuple[ImageSet, ImageSet]:
    """The training and the validation images of --dataset, on --device. RunError.

    A part of the training images validates, drawn with the seed; at --val-size 0 the test set does.
    """
    train_set = load_images(args, "train", synthetic)
    val_set = load_images(args, "val" if args.val_size else "test", synthetic)
    if not args.val_size:
        say(
            "--val-size 0: the test set chooses the epoch, as in the tutorials; its accuracy is flattered",
            args.quiet,
        )
    if val_set is None:
        size = round(len(train_set) * args.val_size)
        if not size:
            raise RunError(
                f"--val-size {args.val_size} of {len(train_set)} images leaves none for validation"
            )
        chosen = stratified_sample(train_set.labels, size, generator_for(args.seed, "validation"))
        train_set, val_set = train_set.select(~chosen), train_set.select(chosen)
    if args.limit_train:
        if args.limit_train > len(train_set):
            raise RunError(
                f"--limit-train {args.limit_train}: there are only {len(train_set)} training images"
            )
        chosen = stratified_sample(
            train_set.labels, args.limit_train, generator_for(args.seed, "limit")
        )
        train_set = train_set.select(chosen)
    if len(train_set) < 2:
        raise RunError(f"{args.dataset}: {len(train_set)} training images are too few")
    if args.batch_size >= len(train_set):
        text = "--batch-size {}: the {} training images are one step an epoch, so little is learnt; try --batch-size {}"
        say(text.format(args.batch_size, len(train_set), max(2, len(train_set) // 20)), args.quiet)
    return train_set.to(args.device), val_set.to(args.device)


def read_torchvision(name: str, data_dir: Path, train: bool, quiet: bool) -> ImageSet:
    """A part of a torchvision dataset in `data_dir`, downloaded where it is missing. RunError.

    torchvision checks the MD5 of what it downloads, of an archive that lies there already, and of CIFAR's files.
    """
    from torchvision import datasets

    dataset_class = getattr(datasets, TORCHVISION[name])
    folder = data_dir / getattr(dataset_class, "base_folder", f"{dataset_class.__name__}/raw")
    data_dir.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(60)  # a server that falls silent does not hold a run for ever
    silent = (
        contextlib.redirect_stderr(io.StringIO())
        if quiet or not sys.stderr.isatty()
        else contextlib.nullcontext()
    )
    try:
        with locked(data_dir / ".download.lock", wait=True), silent:
            dataset = dataset_class(data_dir, train=train, download=True)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        raise RunError(
            f"{shown(folder)} is missing or damaged, and {dataset_class.__name__} could not be downloaded ({error}); "
            "see README, Data, for slow networks, or try --dataset synthetic"
        ) from error
    for file in folder.glob(
        "*-ubyte"
    ):  # of MNIST and its like, the test's too: not after hours of training
        with open(file, "rb") as opened:
            magic = opened.read(4)
            sides = (
                [int.from_bytes(opened.read(4)) for _ in range(magic[3])]
                if magic[:3] == b"\0\0\x08"
                else [-1]
            )
        if file.stat().st_size != 4 + 4 * len(sides) + math.prod(sides):
            raise RunError(
                f"{shown(file)} is damaged; remove it, and the next training downloads it anew"
            )
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(dataset.classes):
        raise RunError(
            f"{shown(folder)}: its labels do not fit its images; remove it, and it is downloaded anew"
        )
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return ImageSet(images, labels, [str(name) for name in dataset.classes])


def read_image(path: Path, side: int, grey: bool) -> torch.Tensor:
    """An image file of any size and mode as uint8 [C, side, side], what is transparent on white. RunError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255
                image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel, of no known range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if grey else "RGB").resize(
                (side, side), Image.Resampling.BILINEAR
            )
            return (
                torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                .view(side, side, -1)
                .permute(2, 0, 1)
            )
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        if isinstance(error, OSError) and error.errno:
            raise RunError(f"{shown(path)}: {error.strerror}") from error
        raise RunError(
            f"{shown(path)} is not a readable image ({error}); remove or replace it"
        ) from error


def image_files(folder: Path) -> list[Path]:
    """The files in and below `folder` that have the ending of an image; hidden ones and all others are skipped."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS)
    return [
        path for path in files if not any(name[0] == "." for name in path.relative_to(folder).parts)
    ]


def read_folder(root: Path, part: str, side: int, grey: bool, quiet: bool) -> ImageSet | None:
    """The `part` train, test or val (None where there is none) of a folder of images, each resized to a square.

    Without PATH/test a tenth of each class is the test set, always the same. RunError.
    """

    def folders(path):
        return sorted(below for below in path.iterdir() if below.is_dir() and below.name[0] != ".")

    parts = {path.name: path for path in folders(root)}
    is_split = "train" in parts and folders(
        parts["train"]
    )  # else it is a class that is called train
    if is_split and "test" not in parts:
        raise RunError(
            f"{shown(root)} has a folder train but no folder test; it needs both, or just the classes"
        )
    if part == "val" and not (is_split and "val" in parts):
        return None
    classes = folders(parts[part] if is_split else root)
    names = [path.name for path in classes]
    if is_split and names != [path.name for path in folders(parts["train"])]:
        raise RunError(f"{shown(root)}: train and {part} do not have the same classes")
    files = [(file, label) for label, path in enumerate(classes) for file in image_files(path)]
    labels = torch.tensor([label for _, label in files], dtype=torch.long)
    if len(names) < 2 or len(labels.unique()) < len(names):
        raise RunError(
            f"{shown(root)}: expected at least two classes, PATH/<class>/*, with images in each"
        )
    if not is_split:
        if len(files) < 10:
            raise RunError(
                f"{shown(root)}: {len(files)} images are too few to set a tenth aside as the test set"
            )
        chosen = stratified_sample(labels, len(files) // 10, generator_for("folder")) == (
            part == "test"
        )
        files, labels = (
            [file for file, wanted in zip(files, chosen, strict=True) if wanted],
            labels[chosen],
        )

    # Twice the pixels: the training images are cut in two once, for validation.
    channels = 1 if grey else 3
    needed, meminfo = 2 * len(files) * side * side * channels, Path("/proc/meminfo")
    free = (
        1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1])
        if meminfo.exists()
        else math.inf
    )
    if needed > free:
        text = f"{len(files)} images of {side}x{side} pixels take {needed / 1e9:.1f} GB; {free / 1e9:.1f} are free"
        raise RunError(f"{shown(root)}: {text}; give a smaller --image-size")
    pixels = torch.empty(len(files), side, side, channels, dtype=torch.uint8).permute(0, 3, 1, 2)

    def read(index):  # into its place: images that wait for it would take as much memory again
        pixels[index] = read_image(files[index][0], side, grey)

    with ThreadPoolExecutor() as pool:
        done = pool.map(read, range(len(files)))
        try:
            for _ in tqdm(
                done, f"reading {part} images", len(files), leave=False, disable=quiet or None
            ):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # do not read on what nobody will see
            raise
    return ImageSet(pixels, labels, names, [file for file, _ in files])


# ------------------------ Augmentation and batches ------------------------
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

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
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
            drawn["shift"] = torch.randint(
                -most, most + 1, size, generator=generator, device=generator.device
            )
        return drawn

    def apply(self, images, angle, brightness, hue, flip, shift=None) -> torch.Tensor:
        """`images` float [N, C, H, W] in [0, 1], with parameters as from `draw`; a change that is off costs nothing."""
        if self.rotation or self.flip:
            images = rotate_and_flip(images, angle, flip)
        if self.shift:
            images = shift_images(images, shift[0], shift[1], self.shift)
        if self.brightness:
            images = (images * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
        if self.hue and images.shape[1] == 3:  # grey has no hue
            images = shift_hue(images, hue)
        return images


def rotate_and_flip(images: torch.Tensor, angle: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """`images` [N, C, H, W] turned counter-clockwise by `angle` [N] degrees, then mirrored where `flip` [N] is true."""
    height, width = images.shape[-2:]
    radians = angle.deg2rad()
    cos, sin, mirror, zero = (
        radians.cos(),
        radians.sin(),
        1 - 2 * flip.float(),
        torch.zeros_like(radians),
    )
    # From where in the source each pixel comes, in coordinates that run from -1 to 1 along each axis.
    rows = (cos * mirror, -sin * height / width, zero, sin * width / height * mirror, cos, zero)
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def shift_images(
    images: torch.Tensor, down: torch.Tensor, right: torch.Tensor, most: int
) -> torch.Tensor:
    """`images` [N, C, H, W] moved by `down` and `right` [N] pixels, at `most` so many, the border mirrored."""
    height, width = images.shape[-2:]
    windows = F.pad(images, (most,) * 4, "reflect").unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, most - down, most - right]


def shift_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
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
    k = torch.remainder(
        sixths[:, None] + torch.arange(5, 0, -2, device=images.device).view(-1, 1, 1), 6
    )
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


class Loader:
    """Batches of an `ImageSet` that lies on the device: indexed, augmented and normalised there.

    With `seed` it shuffles, and the order and the augmentation of epoch k follow from `seed` and k alone;
    without, it keeps the order. A last batch of a single image is left out of training: batch norm needs two.
    """

    def __init__(self, image_set, batch_size, mean, std, augmentation=None, seed=None):
        self.image_set, self.batch_size, self.augmentation, self.seed = (
            image_set,
            batch_size,
            augmentation,
            seed,
        )
        device = image_set.images.device
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(len(self.image_set), self.batch_size)
        return full + (rest > (self.seed is not None and self.batch_size > 1))

    def batches(
        self, epoch: int = 0, side: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (`images` float [B, C, H, W], `labels` int64 [B]); `side` resizes them to so many pixels square."""
        images, labels = self.image_set.images, self.image_set.labels
        if self.seed is not None:
            random = generator_for(self.seed, "order", epoch, device=images.device)
            order = torch.randperm(len(labels), generator=random, device=images.device)
        alternate = self.augmentation and self.augmentation.alternate and self.augmentation.flip
        if alternate:
            first = generator_for(self.seed, "flip", device=images.device)
            flipped = (
                torch.rand(len(labels), generator=first, device=images.device)
                < self.augmentation.flip
            )
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
                pixels = F.interpolate(
                    pixels, (side, side), mode="bilinear", antialias=True, align_corners=False
                )
            yield (
                pixels.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last),
                labels[batch],
            )


def evaluation_loader(image_set: ImageSet, batch_size: int, config: dict) -> Loader:
    """A Loader for validation and test: batches of 1,000 images of 32x32 pixels, or of as many pixels of larger ones,
    but at least as large as those in training."""
    pixels = math.prod(image_set.images.shape[2:])
    return Loader(
        image_set,
        max(batch_size, min(1000, 1000 * 32 * 32 // pixels)),
        config["mean"],
        config["std"],
    )


# ------------------------ Models ------------------------
class Dropout(nn.Dropout):
    """nn.Dropout that draws 16 random bits an element on a CPU, where torch's own takes a fifth of ConfigNet's step.

    The probability is rounded to 1/65536, and the scale is that of the rounded one.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        threshold = min(round(self.p * 65536), 65535)
        bits = (
            torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)
        )
        # In the order that x has in memory, so that the product runs over both in one sweep.
        kept = bits.as_strided(x.shape, torch.empty_like(x).stride()) >= threshold - 32768
        return (x * kept).mul_(65536 / (65536 - threshold))


class Dense(nn.Module):
    """A dense net: one hidden layer of `l1` units with dropout `d1`, over standardised images.

    Without the standardisation, as in the tutorial, the hundreds of pixels that are black in every digit come in as -1:
    they all act as the bias does, and every step moves the hidden units by hundreds of times the learning rate.
    """

    def __init__(self, image_shape, classes, l1=128, d1=0.5, tutorial_layers=False, **_):
        super().__init__()
        pixels = math.prod(image_shape)
        self.standardize = (
            nn.Identity() if tutorial_layers else nn.LayerNorm(pixels, elementwise_affine=False)
        )
        self.fc1 = nn.Linear(pixels, l1)
        self.dropout = Dropout(d1)
        self.fc2 = nn.Linear(l1, classes)

    def forward(self, x):
        x = self.standardize(x.flatten(1))
        x = self.dropout(F.relu(self.fc1(x)))
        return self.fc2(x)


class CNN(nn.Module):
    """Two blocks of a padded 3x3 convolution, batch norm, 2x2 max pooling and ReLU, then two dense layers.

    The tutorial has ReLU before the pooling. The result is the same; after it, ReLU is a quarter of the work.
    """

    def __init__(self, image_shape, classes, c1=32, c2=64, l1=512, **_):
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = nn.Conv2d(channels, c1, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(c2)
        self.fc1 = nn.Linear(c2 * (height // 4) * (width // 4), l1)
        self.fc2 = nn.Linear(l1, classes)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.norm1(self.conv1(x)), 2), inplace=True)
        x = F.relu(F.max_pool2d(self.norm2(self.conv2(x)), 2), inplace=True)
        x = F.relu(self.fc1(x.flatten(1)), inplace=True)
        return self.fc2(x)


class ConfigNet(nn.Module):
    """The CIFAR-10 tutorial's ConfigNet: four unpadded convolutions, the last of stride 2, and two dense layers.

    Batch norm comes before ReLU and dropout. In the tutorial it follows them (`tutorial_layers`): most of its inputs
    are zero there, a variance over a batch says little about an input that is seldom anything else, and what it does at
    evaluation is far from what it did in training. (X. Li et al., "Understanding the disharmony between dropout and
    batch normalization by variance shift", 2019.) There `kernel_size` is that of the first convolution alone.
    """

    def __init__(
        self,
        image_shape,
        classes,
        c1=48,
        c2=96,
        l1=256,
        d1=0.1,
        kernel_size=3,
        tutorial_layers=False,
        **_,
    ):
        super().__init__()
        self.tutorial_layers = tutorial_layers
        channels, height, width = image_shape
        later_size = 3 if tutorial_layers else kernel_size
        self.conv1 = nn.Conv2d(channels, c1, kernel_size)
        self.conv2 = nn.Conv2d(c1, c1, later_size)
        self.conv3 = nn.Conv2d(c1, c2, later_size)
        self.conv4 = nn.Conv2d(c2, c2, later_size, stride=2)
        # Each convolution takes its size less one from a side; the last halves what it leaves.
        lost = kernel_size - 1 + 3 * (later_size - 1)
        features = c2 * ((height - lost + 1) // 2) * ((width - lost + 1) // 2)
        self.batch_norm = nn.BatchNorm1d(features)
        self.fc1 = nn.Linear(features, l1)
        self.fc2 = nn.Linear(l1, classes)
        self.dropout1, self.dropout2 = Dropout(d1), Dropout(0.5)

    def forward(self, x):
        x = F.relu(self.conv1(x), inplace=True)
        x = self.dropout1(F.relu(self.conv2(x), inplace=True))
        x = F.relu(self.conv3(x), inplace=True)
        x = self.conv4(x)
        if self.tutorial_layers:
            x = self.dropout2(F.relu(x, inplace=True))
            x = F.relu(self.batch_norm(x.flatten(1)), inplace=True)
        else:
            x = self.batch_norm(x.flatten(1))
            x = self.dropout2(F.relu(x, inplace=True))
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(x)


class Whitening(nn.Conv2d):
    """A convolution with fixed filters whose outputs, over patches of the training images, are uncorrelated and of
    variance 1.

    The filters are the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue, and their
    negatives, so that an activation that cuts one off lets the other pass. From hlb-CIFAR10 (tysam-code, 2022), after
    D. Page, "How to train your ResNet" (2018).
    """

    def __init__(self, channels, patch, stride, padding, bias):
        super().__init__(channels, 2 * channels * patch**2, patch, stride, padding, bias=bias)
        self.weight.requires_grad_(False)
        if bias:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def learn(self, images: torch.Tensor, smallest: float = 5e-4) -> None:
        """Take the filters from `images` [N, C, H, W], normalised as in training. `smallest` is added to each
        eigenvalue, so that directions in which the patches hardly vary are not blown up."""
        covariance, patches = 0, 0
        for part in images.split(500):
            part = F.unfold(part, self.kernel_size).transpose(1, 2).flatten(0, 1)
            covariance, patches = covariance + part.T @ part, patches + len(part)
        eigenvalues, eigenvectors = torch.linalg.eigh((covariance / patches).cpu().double())
        filters = (eigenvectors / (eigenvalues + smallest).sqrt()).T.reshape(
            -1, *self.weight.shape[1:]
        )
        self.weight.copy_(torch.cat([filters, -filters]))


def identity_convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that at first hands its inputs on: S. Zagoruyko and N. Komodakis, "DiracNets" (2017)."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[: min(channels_in, channels_out)])
    return convolution


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm without a learnt scale, whose statistics for evaluation are those of the last few batches."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class WhitenedNet(nn.Sequential):
    """Whitened patches, pairs of convolutions of each of `widths`, the first halving the sides, and a dense layer over
    the maximum of each channel, so that images of any size do."""

    def __init__(self, image_shape, classes, patch, stride, padding, bias, widths):
        whitening = Whitening(image_shape[0], patch, stride, padding, bias)
        layers, channels = [whitening, nn.GELU()], whitening.out_channels
        for width in widths:
            layers += [
                identity_convolution(channels, width),
                nn.MaxPool2d(2),
                batch_norm(width),
                nn.GELU(),
                identity_convolution(width, width),
                batch_norm(width),
                nn.GELU(),
            ]
            channels = width
        head = nn.Linear(channels, classes, bias=False)
        nn.init.normal_(head.weight, std=1 / channels)
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)


class FastNet(WhitenedNet):
    """The net of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), as in his airbench94_muon.

    But its patches begin one pixel outside the image: so 32 pixels become 16, 8 and 4, of which nothing is cut off.
    """

    def __init__(self, image_shape, classes, c1=64, c2=256, c3=256, **_):
        super().__init__(image_shape, classes, 2, 1, 1, True, (c1, c2, c3))


class PatchNet(WhitenedNet):
    """A FastNet for images with less in them: larger patches, a quarter of them, and one pair of convolutions less."""

    def __init__(self, image_shape, classes, c1=24, c2=48, **_):
        super().__init__(image_shape, classes, 4, 2, 0, False, (c1, c2))


# A new model is one class `(image_shape [C, H, W], number of classes, options, **_)` and one line here. Its options are
# flags of `add_options`; those of other models go into **_.
MODELS = {
    "dense": Dense,
    "cnn": CNN,
    "convnet": ConfigNet,  # the tutorial's ConvNet is its ConfigNet at the defaults
    "confignet": ConfigNet,
    "fastnet": FastNet,
    "patchnet": PatchNet,
}
MODEL_OPTIONS = ("c1", "c2", "c3", "l1", "d1", "kernel_size", "tutorial_layers")


def build_model(config: dict) -> nn.Module:
    """The model that `config`, as in best.pt, describes, with random weights. UsageError where it cannot be."""
    options = {name: config[name] for name in MODEL_OPTIONS if config[name] is not None}
    make = functools.partial(
        MODELS[config["model"]], config["image_shape"], len(config["classes"]), **options
    )
    channels, *size = config["image_shape"]
    for height, width in (size, *([side, side] for side in config["sizes"] or ())):
        try:  # without memory or arithmetic
            with torch.device("meta"):
                make()(torch.empty(min(2, config["batch_size"]), channels, height, width))
        except (RuntimeError, ValueError, OverflowError, TypeError) as error:
            reason = str(error).splitlines()[0]
            text = f"--model {config['model']} with these options does not take images of {height}x{width} pixels"
            raise UsageError(f"{text}, {config['batch_size']} in a batch ({reason})") from error
    model = make().to(memory_format=torch.channels_last)
    model.config = config
    return model


def new_model(args: argparse.Namespace, train_set: ImageSet) -> nn.Module:
    """The model of --model for such images, with the random weights of --seed, on --device. UsageError."""
    channels = train_set.images.shape[1]
    half = [0.5] * channels, [0.5] * channels
    mean, std = train_set.mean_and_std() if args.normalize == "dataset" else half
    about = {
        "image_shape": list(train_set.images.shape[1:]),
        "classes": train_set.classes,
        "mean": mean,
        "std": std,
    }
    torch.manual_seed(random_seed(args.seed, "weights"))
    chosen = {
        name: getattr(args, name) for name in ("model", *MODEL_OPTIONS, "sizes", "batch_size")
    }
    model = build_model({**about, **chosen, "temperature": 1.0}).to(args.device)
    if args.optimizer == "muon" and not any(
        isinstance(layer, nn.BatchNorm2d) for layer in model.modules()
    ):
        raise UsageError(
            "--optimizer muon is for convolutions with batch norm: --model cnn, fastnet or patchnet"
        )
    return model


# ------------------------ Optimisers ------------------------
def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
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
    """Steps of orthogonal momentum for the filters of convolutions. (torch.optim.Muon takes matrices only.)

    A bank of filters [out, in, height, width] is a matrix [out, in * height * width] here. Its Nesterov momentum is
    made orthogonal before it is a step, and its norm is held at sqrt(out) instead of decaying, as in K. Jordan's
    airbench94_muon: what follows is taken to be batch norm, to which the scale does not matter. Steps are made
    orthogonal in `dtype`: bfloat16 does, as only their directions count.
    """

    def __init__(self, filters, lr, momentum, dtype=torch.float32):
        super().__init__(filters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Move all filters that have a gradient, those of one shape together."""
        (group,) = self.param_groups
        by_shape = {}
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].mul_(group["momentum"]).add_(p.grad)
            nesterov = p.grad.add(state["momentum"], alpha=group["momentum"])
            by_shape.setdefault(p.shape, []).append((p, nesterov.flatten(1)))
        for shape, pairs in by_shape.items():
            steps = orthogonalize(torch.stack([step for _, step in pairs]), self.dtype)
            for (p, _), step in zip(pairs, steps, strict=True):
                p.mul_(len(p) ** 0.5 / p.norm())
                p.sub_(step.view(shape), alpha=group["lr"])


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "muon": Muon,
}

# For --optimizer muon where the recipe is for another.
MUON_DEFAULTS = {"lr": 0.12, "aux_lr": 0.015, "momentum": 0.6, "schedule": "linear"}


def make_optimizers(args: argparse.Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizer of --optimizer over what `model` learns; of muon two, the other AdamW for all but filters."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "fused": args.device in ("cpu", "cuda"),
    }
    if args.optimizer == "muon":
        filters, others = [p for p in learnt if p.ndim == 4], [p for p in learnt if p.ndim != 4]
        muon = Muon(
            filters,
            args.lr,
            args.momentum,
            torch.float32 if args.precision == "fp32" else torch.bfloat16,
        )
        optimizers = [
            muon,
            torch.optim.AdamW(others, **{**settings, "lr": args.aux_lr}, betas=(0.8, 0.95)),
        ]
    else:
        if args.optimizer == "sgd":
            settings.update(momentum=args.momentum, nesterov=args.momentum > 0)
        optimizers = [OPTIMIZERS[args.optimizer](learnt, **settings)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # torch's own name for it
    return optimizers


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


# The learning rate as a multiple of --lr, from the part of the training that is behind. A function of that alone
# has no state to save, and an interrupted run goes on along the same course.
SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": cosine,
    # L. N. Smith and N. Topin, "Super-convergence" (2018), with the phases of torch's OneCycleLR.
    "onecycle": lambda progress: (
        1 + (1 / 25 - 1) * cosine(progress / 0.3)
        if progress < 0.3
        else 1 / 25e4 + (1 - 1 / 25e4) * cosine((progress - 0.3) / 0.7)
    ),
}


# ------------------------ Train and test of one epoch ------------------------
def finite(loss: torch.Tensor) -> float:
    """The value of a loss. Raises NotFinite."""
    if not math.isfinite(loss.item()):
        raise NotFinite(f"the loss became {loss.item()}")
    return loss.item()


class AverageMeter:
    """Loss and accuracy of the images seen so far; the sums stay on the device, reading them waits for it."""

    def __init__(self, device: str):
        self.loss_sum, self.correct = torch.zeros((), device=device), torch.zeros((), device=device)
        self.images = 0

    def update(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take up a batch: the sum of its losses, `logits` [B, K], `labels` [B]."""
        self.loss_sum += loss_sum
        self.correct += (logits.argmax(1) == labels).sum()
        self.images += len(labels)

    @property
    def loss(self) -> float:
        """Mean per image. Raises NotFinite."""
        return finite(self.loss_sum) / self.images

    @property
    def accuracy(self) -> float:
        """Part of the images that are classified as labelled."""
        return self.correct.item() / self.images


def train(args, model, loader, epoch, criterion, optimizers, scaler, autocast, bar) -> AverageMeter:
    """Train `model` on every batch once; loss and accuracy are as seen in training. Raises NotFinite."""
    model.train()
    meter = AverageMeter(args.device)
    # --sizes is counted from the end, so that however few the epochs are, the last has the last size.
    side = (
        args.sizes[-1 - (args.epochs - epoch) * len(args.sizes) // args.epochs]
        if args.sizes
        else None
    )
    bar.set_description(f"epoch {epoch}/{args.epochs}", refresh=False)
    for step, (images, labels) in enumerate(loader.batches(epoch, side)):
        # Set the learning rate, by the part of the whole training that is behind.
        progress = (epoch - 1 + step / len(loader)) / args.epochs
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * SCHEDULES[args.schedule](progress)

        # Forward pass: a logit for each class, and the loss.
        with autocast():
            logits = model(images)
            loss = criterion(logits, labels)
        if (
            args.device == "cpu"
        ):  # a GPU would have to be waited for: there the epoch's mean tells as surely
            finite(loss)

        # Backward pass: the gradients.
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss).backward()

        # Update the weights.
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

        meter.update(loss.detach() * len(labels), logits.detach(), labels)
        if (
            bar.update()
        ):  # it has just been drawn anew; not for every batch, as the loss is read from the device
            bar.set_postfix(loss=f"{meter.loss:.4f}", refresh=False)
    return meter


@torch.inference_mode()
def test(model, loader, autocast, criterion, tta=None) -> tuple[AverageMeter, torch.Tensor]:
    """Loss and accuracy over all batches, with dropout and batch norm at rest, and the logits [N, K], float32. Raises
    NotFinite when the loss is read.

    A net that is trained with smoothed labels is to be validated with them too: their loss falls as it learns, while
    the plain one mostly says how far the net keeps from certainty, and may rise.
    """
    model.eval()
    meter, outputs = AverageMeter(loader.image_set.images.device), []
    for images, labels in loader.batches():
        with autocast():
            logits = predict(model, images, tta)
        meter.update(criterion(logits, labels, reduction="sum"), logits, labels)
        outputs.append(logits)
    return meter, torch.cat(outputs)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The number by which to divide `logits` [N, K], so that their softmax gives the `labels` [N] the highest
    likelihood: C. Guo et al., "On calibration of modern neural networks" (2017). Without a mistake among them the
    images cannot tell, and it is 1."""
    logits, labels = logits.cpu().double(), labels.cpu()
    if bool((logits.argmax(1) == labels).all()):
        return 1.0
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(loss)
    return (
        log_temperature.clamp(-3, 3).exp().item()
    )  # a net that has learnt nothing would have an endless one


TTA = ("mirror", "shift", "mirror+shift")
UNSURE = 0.75


def predict(model: nn.Module, images: torch.Tensor, tta: str | None = None) -> torch.Tensor:
    """Logits [B, K], float32, of `images` [B, C, H, W]. With `tta` those of which the model is not sure, with no class
    above a probability of UNSURE, are averaged over `views`: of the others hardly one would change its class."""
    logits = model(images).float()
    unsure = logits.softmax(1).amax(1) <= UNSURE
    if tta and unsure.any():
        (own_weight, _), *others = views(images[unsure], tta)
        logits[unsure] = own_weight * logits[unsure] + sum(
            weight * model(view).float() for weight, view in others
        )
    return logits


def views(images: torch.Tensor, tta: str) -> list[tuple[float, torch.Tensor]]:
    """Views of `images` [N, C, H, W] with their weights, the images themselves first: moved by a pixel down and right,
    and up and left, and mirrored. K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024)."""
    one, found = torch.ones(len(images), dtype=torch.long, device=images.device), [(1.0, images)]
    if "shift" in tta:
        moved = (shift_images(images, direction, direction, 1) for direction in (one, -one))
        found = [(0.5, images), *((0.25, view) for view in moved)]
    if "mirror" in tta:
        found = [(weight / 2, view) for weight, image in found for view in (image, image.flip(3))]
    return found


# ------------------------ Early stopping ------------------------
class EarlyStopping:
    """Keeps the weights of the epoch with the lowest validation loss, and says when to stop: after `tolerance` epochs
    in a row without a lower one (0: never)."""

    def __init__(self, tolerance: int):
        self.tolerance = tolerance
        self.best_loss, self.epochs_without_improvement = math.inf, 0
        self.best_weights: dict | None = None

    def step(self, val_loss: float, model: nn.Module) -> bool:
        """Take note of an epoch; return whether it is the best so far."""
        improved = val_loss < self.best_loss
        if improved:
            self.best_loss, self.epochs_without_improvement = val_loss, 0
            self.best_weights = {
                name: tensor.detach().clone() for name, tensor in model.state_dict().items()
            }
        else:
            self.epochs_without_improvement += 1
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the tolerance is used up."""
        return 0 < self.tolerance <= self.epochs_without_improvement

    def state_dict(self) -> dict:
        """All but the tolerance, which may change when a run goes on."""
        return {name: value for name, value in vars(self).items() if name != "tolerance"}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`."""
        vars(self).update(state)


# ------------------------ Run directory ------------------------

FORMAT = 2  # of run.json and the checkpoints: raised when what is in them changes


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush and rename: a reader sees the old file or the new one, whole. RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{shown(path)} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON for people to read, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path, lines: bool = False) -> Any:
    """Read a file of JSON, or of JSON `lines`. RunError where it is damaged."""
    try:
        return (
            [json.loads(line) for line in path.read_text().splitlines()]
            if lines
            else json.loads(path.read_text())
        )
    except (ValueError, RecursionError) as error:
        raise RunError(f"{shown(path)} is damaged: {error}") from error


def save_checkpoint(path: Path, state: dict) -> None:
    """Save tensors and plain values, atomically, to be read with `load_checkpoint`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU; never runs code from it. RunError where it is not that, to the bit.

    torch does not check what it loads; but a checkpoint is a zip file, which has a checksum of each of its parts.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"{shown(path)} is missing: the run has not got so far, or the file was removed"
        ) from None
    except Exception as error:  # zipfile and torch.load raise whatever they stumble over
        raise RunError(
            f"{shown(path)} is damaged, or is not a checkpoint ({type(error).__name__})"
        ) from error
    if damaged:
        raise RunError(f"{shown(path)} is damaged: the checksum of {damaged} is not right")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{shown(path)} is not of this version of the scripts")
    return state


def read_record(directory: Path) -> dict:
    """run.json of a run directory. RunError where there is none, or one that is not of this version."""
    path = directory / "run.json"
    if not path.is_file():
        raise RunError(f"{shown(directory)} is not a run directory: there is no run.json")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunError(f"{shown(path)} is not of this version of the scripts")
    return record


def read_log(directory: Path) -> list[dict]:
    """The rows of log.jsonl. RunError, OSError."""
    return read_json(directory / "log.jsonl", lines=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which ends with the process at the latest. RunError where another
    process holds it, unless `wait`."""
    with open(path, "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise RunError(f"{shown(path.parent)} is in use by another process") from None
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock on the file `path`."""
    try:
        with locked(path) if path.exists() else contextlib.nullcontext():
            return False
    except RunError:
        return True


def interrupt(signum, frame) -> None:
    """Raise Interrupted: a handler of signals."""
    raise Interrupted(signal.Signals(signum).name)


@contextlib.contextmanager
def interruptible(handler: Callable = interrupt) -> Iterator[None]:
    """Let `handler` answer SIGINT and SIGTERM."""
    # Python lets only the main thread set handlers; in another thread whoever started it does the stopping.
    main = threading.current_thread() is threading.main_thread()
    before = (
        {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        if main
        else {}
    )
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Run:
    """A run directory: `record` is run.json, `history` the rows of log.jsonl; each save is whole or not at all."""

    def __init__(self, directory: Path, record: dict):
        self.directory, self.record, self.history, self.wandb = directory, record, [], None
        self.status, self.over, self.stopped_early = "failed", False, False
        self.began = time.perf_counter() - record["seconds"]

    def write_record(self, **changes) -> None:
        """Write run.json with these changes."""
        self.record.update(changes, seconds=time.perf_counter() - self.began)
        write_json(self.directory / "run.json", self.record)

    def end(self, status: str, error: str | None) -> None:
        """Write down how the run ended."""
        self.write_record(status=status, error=error, ended=utc_now())

    def save(self, parts: dict) -> None:
        """Write last.pt, from which a run goes on: the history, and the state of each of `parts`. Then the others."""
        states = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(
            self.directory / "last.pt",
            {"run": self.record["name"], "history": self.history, **states},
        )
        self.write_results(parts)

    def write_results(self, parts: dict) -> None:
        """Write best.pt where there is a new best, log.jsonl and run.json: all of them follow from last.pt."""
        best = None
        if self.history:
            row = min(self.history, key=lambda row: row["val_loss"])
            best = {name: row[name] for name in ("epoch", "val_loss", "val_acc")}
            best["temperature"] = parts["model"].config["temperature"]
        if best != self.record["best"]:
            content = {
                **parts["model"].config,
                **best,
                "weights": parts["early_stopping"].best_weights,
            }
            save_checkpoint(self.directory / "best.pt", content)
        log = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomically(self.directory / "log.jsonl", log.encode())
        self.write_record(epochs=len(self.history), best=best)

    def restore(self, parts: dict) -> int:
        """Give `parts` the state in last.pt, and make the other files agree with it: a kill may have left them behind.
        Returns the epochs that are done, 0 where none was saved. RunError."""
        for leftover in self.directory.glob(
            ".*.tmp"
        ):  # of a process that was killed in the middle of a save
            leftover.unlink()
        path = self.directory / "last.pt"
        if path.exists() or self.record["epochs"]:
            state = load_checkpoint(path)
            if state["run"] != self.record["name"]:
                raise RunError(f"{shown(path)} is of another run, {state['run']}")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.history = state["history"]
        self.write_results(parts)
        return len(self.history)

    def result(self) -> dict:
        """The content of run.json, with the run's `directory`."""
        return {**self.record, "directory": str(self.directory)}


def utc_now() -> str:
    """The time, as in 2026-01-31T23:59:59Z."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def environment() -> dict:
    """Where a run is computed: the part of run.json that a continuation writes anew."""
    command = [
        "git",
        "-C",
        str(HERE),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        git = None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    return {
        "versions": {"python": sys.version.split()[0], **versions},
        "host": socket.gethostname(),
        "git": git,
    }


def new_record(
    name: str, args: argparse.Namespace, model: nn.Module, train_set: ImageSet, val_set: ImageSet
) -> dict:
    """run.json of a run that begins."""
    unrecorded = ("script", "argv", "resume", "quiet", "stop_after")
    plain = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(args).items()
        if k not in unrecorded
    }
    data = {
        "name": args.dataset,
        "train": len(train_set),
        "val": len(val_set),
        "test": None,
        "selection": "validation split" if args.val_size else "test set",
        "checksum": train_set.checksum,
        "test_checksum": None,
    }
    return {
        "format": FORMAT,
        "name": name,
        "script": args.script,
        "argv": args.argv,
        "args": plain,
        "status": "running",
        "error": None,
        "started": utc_now(),
        "ended": None,
        "seconds": 0.0,
        "seed": args.seed,
        "device": args.device,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        **environment(),
        "data": data,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": 0,
        "best": None,
        "test": None,
    }


@contextlib.contextmanager
def open_run(
    args: argparse.Namespace, model: nn.Module, train_set: ImageSet, val_set: ImageSet
) -> Iterator[Run]:
    """Make the run's directory, or open that of --resume, and hold its lock; at the end write down how the run ended.

    A signal, and a loss that is not finite, end the `with` block early and are no exceptions to the caller: they are
    the `status` in run.json. UsageError, RunError.
    """
    own_name = f"{args.script}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    directory = args.resume or args.runs_dir / (args.run_name or own_name)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / ".lock"):
        if not args.resume:
            if any(path.name[0] != "." for path in directory.iterdir()):
                raise UsageError(f"--run-name {args.run_name}: {shown(directory)} exists already")
            write_json(
                directory / "run.json", new_record(directory.name, args, model, train_set, val_set)
            )
        run = Run(directory, read_record(directory))
        record = run.record
        if record["data"]["checksum"] != train_set.checksum:
            raise RunError(
                f"{args.dataset} is not what {shown(directory)} was trained on: the checksums differ"
            )
        if record["status"] == "diverged":
            raise RunError(
                f"{shown(directory)}: {record['error']}, and would again; start anew with a lower --lr"
            )
        torch.set_num_threads(record["threads"])  # another number of threads rounds otherwise
        before = record["args"]
        more = args.epochs > before["epochs"] or args.tolerance != before["tolerance"]
        last = min(args.epochs, args.stop_after or args.epochs)
        run.stopped_early = record["status"] == "stopped_early"
        finished = record["status"] == "finished" and record["epochs"] >= last
        run.over = finished or (run.stopped_early and not more)
        if run.over:
            text = f"{shown(directory)}: {record['status'].replace('_', ' ')} after {record['epochs']} epochs"
            say(f"{text}, nothing to do", args.quiet)
            yield run
            return
        before.update(epochs=args.epochs, tolerance=args.tolerance)
        record["data"].update(test=None, test_checksum=None)
        about = (
            f"{args.model}, {record['parameters']:,} parameters; {args.device}, {args.precision}"
        )
        say(f"{record['name']}: {about}", args.quiet)
        status, error = "failed", None
        try:
            with interruptible():
                here = {"device": args.device, "precision": args.precision, **environment()}
                run.write_record(**here, status="running", error=None, ended=None, test=None)
                run.wandb = start_wandb(args, run)
                yield run
            status = run.status
        except Interrupted as interruption:
            status, error = "interrupted", str(interruption)
        except NotFinite as reason:
            status, error = "diverged", f"{reason} in epoch {len(run.history) + 1}"
        except BaseException as exception:
            error = f"{type(exception).__name__}: {exception}"
            with contextlib.suppress(
                RunError
            ):  # the disk may have failed: the first error is the one to tell
                run.end(status, error)
            raise
        finally:
            finish_wandb(run, exit_code=int(error is not None))
        run.end(status, error)
    if record["best"]:
        text = "best epoch {epoch}: validation loss {val_loss:.4f}, accuracy {val_acc:.2%}"
        say(text.format(**record["best"]), args.quiet)
    if record["test"]:
        say("test loss {loss:.4f}, accuracy {acc:.2%}".format(**record["test"]), args.quiet)
    say(f"{status.replace('_', ' ')}: {shown(directory)}", args.quiet)


def check_wandb(args: argparse.Namespace) -> None:
    """What can be known of --wandb before anything is loaded. UsageError."""
    if args.wandb != "disabled" and not importlib.util.find_spec("wandb"):
        raise UsageError(f"--wandb {args.wandb} needs the package wandb: pip install wandb")
    if args.wandb == "online" and not has_wandb_key(args.quiet):
        raise UsageError(
            "--wandb online needs an API key: `wandb login`, WANDB_API_KEY, or use --wandb offline"
        )


def has_wandb_key(quiet: bool) -> bool:
    """Whether W&B has an API key. UsageError where it has something else in its place."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=quiet))
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        raise UsageError(f"Weights & Biases: {error}") from error


def start_wandb(args: argparse.Namespace, run: Run):
    """The W&B run of --wandb, None where it is disabled. RunError."""
    if args.wandb == "disabled":
        return None
    import wandb

    # A run that goes on does so in its W&B run, which no run of the same name elsewhere shares. In a W&B sweep the
    # agent has named it.
    identity = f"{run.record['name']}-{re.sub('[^0-9]', '', run.record['started'])}"[-128:]
    named = {} if "WANDB_SWEEP_ID" in os.environ else {"id": identity, "resume": "allow"}
    try:
        return wandb.init(
            project=args.wandb_project,
            name=run.record["name"],
            **named,
            config=run.record["args"],
            dir=run.directory,
            mode=args.wandb,
            settings=wandb.Settings(silent=args.quiet, console="off"),
        )
    except wandb.errors.Error as error:
        raise RunError(f"--wandb {args.wandb}: {error}") from error


@contextlib.contextmanager
def wandb_failures_told(run: Run) -> Iterator[None]:
    """Tell what goes wrong with W&B, and go on without it: it does not end a training."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception:  # so W&B's agent stops a run of a sweep
            raise
        print(f"W&B failed ({type(error).__name__}: {error}): going on without it", file=sys.stderr)
        run.wandb = None


def finish_wandb(run: Run, exit_code: int) -> None:
    """End the W&B run, if there is one, with the best epoch's results as its summary."""
    if run.wandb:
        with wandb_failures_told(run):
            tested = {f"test_{name}": value for name, value in (run.record["test"] or {}).items()}
            run.wandb.summary.update({**(run.record["best"] or {}), **tested})
            run.wandb.finish(exit_code=exit_code)


# ------------------------ Fit ------------------------
def fit(
    args: argparse.Namespace,
    model: nn.Module,
    train_set: ImageSet,
    val_set: ImageSet,
    run: Run,
    on_epoch: Callable[[dict], bool] | None = None,
) -> bool:
    """Train `model` until --epochs, --stop-after or early stopping, and leave it with the weights of its best epoch.

    `on_epoch(row)` is called with each row of log.jsonl; a true answer ends the run as `pruned`. Returns whether the
    training has come to its own end, so that the test may follow. Raises NotFinite.
    """
    if run.over:
        return False
    normalization = model.config["mean"], model.config["std"]
    changes = args.rotation, args.brightness, args.hue, args.flip, args.alternate_flip, args.shift
    augmentation = Augmentation(*changes) if args.augment else None
    loader = Loader(train_set, args.batch_size, *normalization, augmentation, args.seed)
    val_loader = evaluation_loader(val_set, args.batch_size, model.config)
    optimizers = make_optimizers(args, model)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    autocast = autocast_to(args.device, args.precision)
    weights = train_set.class_weights() if args.class_weights else None
    criterion = functools.partial(
        F.cross_entropy, weight=weights, label_smoothing=args.label_smoothing
    )
    early_stopping = EarlyStopping(args.tolerance)

    # The whole state of a training: the random numbers of epoch k follow from --seed and k, the rate from the step.
    parts = {"model": model, "scaler": scaler, "early_stopping": early_stopping}
    parts |= {f"optimizer_{index}": optimizer for index, optimizer in enumerate(optimizers)}
    done = run.restore(parts)
    if (
        run.stopped_early and early_stopping.should_stop
    ):  # it is asked to go on: as many epochs again without a best
        early_stopping.epochs_without_improvement = 0
    whitening = model[0] if isinstance(model, WhitenedNet) else None
    if whitening and not done:
        random = generator_for(args.seed, "whitening")
        sample = train_set.select(torch.randperm(len(train_set), generator=random)[:5000])
        images, _ = next(Loader(sample, len(sample), *normalization).batches())
        whitening.learn(images)
    compiled = torch.compile(model, dynamic=False) if args.compile else model
    torch.compiler.config.recompile_limit = (
        64  # each size of images, and the smaller last batch, has code of its own
    )

    counts = train_set.labels.bincount(minlength=len(train_set.classes))
    few, many = (
        f"{int(counts[which]):,} ({train_set.classes[which]})"
        for which in (counts.argmin(), counts.argmax())
    )
    say(
        f"{args.dataset}: {len(train_set):,} training and {len(val_set):,} validation images; {len(counts)} classes, "
        f"the smallest {few}, the largest {many}; {len(loader)} steps an epoch",
        args.quiet,
    )

    # A bar of the whole run, with the time that is left of it.
    last = min(args.epochs, args.stop_after or args.epochs)
    steps = {"total": last * len(loader), "initial": done * len(loader)}
    with tqdm(**steps, smoothing=0, leave=False, disable=args.quiet or None) as bar:
        for epoch in range(done + 1, last + 1):
            if early_stopping.should_stop:
                break
            began = time.perf_counter()
            torch.manual_seed(random_seed(args.seed, "dropout", epoch))
            if whitening and whitening.bias is not None:
                # As in airbench: it is learnt for three epochs. Its gradient takes time, and brings little later.
                whitening.bias.requires_grad_(epoch <= 3)

            # Train on every batch once, then validate.
            training = train(
                args, compiled, loader, epoch, criterion, optimizers, scaler, autocast, bar
            )
            train_loss, train_seconds = training.loss, time.perf_counter() - began
            validation, _ = test(compiled, val_loader, autocast, criterion)
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_acc": training.accuracy,
                "val_loss": validation.loss,
                "val_acc": validation.accuracy,
                "lr": optimizers[0].param_groups[0]["lr"],
                "seconds": time.perf_counter() - began,
                "images_per_second": len(train_set) / train_seconds,
            }

            # Early stopping looks at the validation loss, and keeps the weights when it is the best.
            is_best = early_stopping.step(row["val_loss"], model)

            # Log the row, save, report.
            run.history.append(row)
            run.save(parts)
            with wandb_failures_told(run):
                if run.wandb:  # the best so far is what a W&B sweep compares
                    best = {f"best_{name}": value for name, value in run.record["best"].items()}
                    run.wandb.log(row | best, step=epoch, commit=True)
            text = (
                "epoch {epoch:2}/{epochs}  train loss {train_loss:.4f} accuracy {train_acc:.2%}  validation loss "
                "{val_loss:.4f} accuracy {val_acc:.2%}  {seconds:.1f} s{best}"
            )
            say(text.format(**row, epochs=args.epochs, best="  best" * is_best), args.quiet)
            if on_epoch and on_epoch(row):
                run.status = "pruned"
                return False

    model.load_state_dict(early_stopping.best_weights)
    if early_stopping.should_stop:
        run.status = "stopped_early"
    else:
        run.status = "finished" if len(run.history) == args.epochs else "interrupted"
    if run.status == "interrupted":
        return False

    # Fit the temperature that makes the probabilities true on the validation images, and save it with the weights.
    _, logits = test(compiled, val_loader, autocast, F.cross_entropy)
    model.config["temperature"] = fit_temperature(logits, val_set.labels)
    run.write_results(parts)
    return True


def final_test(args: argparse.Namespace, model: nn.Module, test_set: ImageSet, run: Run) -> None:
    """Test the model, with the weights of its best epoch, and put the result into run.json."""
    test_set = test_set.to(args.device)
    loader = evaluation_loader(test_set, args.batch_size, model.config)
    autocast = autocast_to(args.device, args.precision)
    result, _ = test(model, loader, autocast, F.cross_entropy, args.tta)
    run.record["data"].update(test=len(test_set), test_checksum=test_set.checksum)
    run.record["test"] = {"loss": result.loss, "acc": result.accuracy}
