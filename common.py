"""What the scripts share, in the order in which data flow: options, data, augmentation and batches,
models, losses, optimisers, train and evaluate for one epoch, early stopping, fit.

A training script adds its recipes and its synthetic images; its `main` shows how the parts are put
together. MODELS, LOSSES, OPTIMIZERS, SCHEDULES and AUGMENTATIONS are the tables of what there is to
choose from. CONTRIBUTING.md shows how to add something to each.
"""

import signal

# Importing torch takes seconds. Until it is there, Ctrl-C ends the program without a traceback.
interrupt_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import csv
import ctypes
import difflib
import functools
import hashlib
import inspect
import io
import math
import mmap
import os
import re
import secrets
import shlex
import socket
import statistics
import sys
import tempfile
import textwrap
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import records
from records import RunError, UsageError, checksum_of, say, shown

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

signal.signal(signal.SIGINT, interrupt_handler)


# ------------------------ Options ------------------------
class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and ends the help of each flag with its default."""

    def _get_help_string(self, action):
        unset = action.default is False or action.default in (None, [], argparse.SUPPRESS)
        return action.help if unset else f"{action.help} (%(default)s)"


# What others call our flags.
SYNONYMS = {"--bs": "--batch-size", "--learning-rate": "--lr", "--num-epochs": "--epochs"}
SYNONYMS |= {"--dropout": "--d1", "--dropout-rate": "--d1", "--hidden-size": "--l1"}


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line per error, a suggestion for a mistyped flag, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        """Exit with status 2."""
        if message.startswith("unrecognized"):
            for word in re.findall(r"--[\w-]+", message):
                flag = SYNONYMS.get(word.replace("_", "-"), word)
                for close in difflib.get_close_matches(flag, self._option_string_actions, 1, 0.75):
                    message += f" ({word}: did you mean {close}?)"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def number(
    kind: type, low: float = -math.inf, high=math.inf, above=-math.inf, below=math.inf
) -> Callable:
    """An argparse `type`: a finite int or float within these bounds."""
    bounds = {"at least": low, "at most": high, "above": above, "below": below}
    limits = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and above < value < below and math.isfinite(value):
                return value
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {wanted} {' and '.join(limits)}, not {text!r}")

    return parse


def add_flag(group, usage: str, kind: Any, text: str, **more: Any) -> str:
    """Add a flag to a parser or a group of it, and return the argument's name.

    `usage` is the flag and what it takes. `kind` is an argparse `type`, or the choices, or bool for
    a switch.
    """
    name, _, metavar = usage.partition(" ")
    takes = {"type": kind, "metavar": metavar} if callable(kind) else {"choices": kind}
    if kind is bool:
        takes = {"action": argparse.BooleanOptionalAction}
    return group.add_argument(name, help=text, **takes, **more).dest


def run_name(text: str) -> str:
    """An argparse `type`: the name of a directory, without a path."""
    if text in ("", ".", "..") or not {"/", os.sep, "\0"}.isdisjoint(text):
        raise argparse.ArgumentTypeError(f"expected a name without slashes, not {text!r}")
    return text


def new_name(start: str) -> str:
    """The name of a directory that no other has: `start`, the time in UTC, and random letters."""
    return f"{start}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def given_path(text: str) -> Path:
    """An argparse `type`: a path as it is given, but not an empty word."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, not an empty word")
    return Path(text)


def absolute_path(text: str) -> Path:
    """An argparse `type`: an absolute path, as a run may go on from another directory."""
    return Path(os.path.expanduser(given_path(text))).absolute()


def dataset_source(text: str) -> str:
    """An argparse `type`: one of DATASETS, or the path of a folder or a CSV file."""
    if text in DATASETS:
        return text
    path = absolute_path(text)
    if not (path.is_dir() or (path.is_file() and is_csv(path))):
        raise argparse.ArgumentTypeError(
            f"{path} is no folder, no CSV file and none of {', '.join(DATASETS)}"
        )
    return str(path)


def weights_source(text: str) -> str:
    """An argparse `type`: imagenet, or the path of a file or of a run."""
    if text == "imagenet":
        return text
    path = absolute_path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path} is no file and no run; or say imagenet")
    is_of_run = path.name == "best.pt" and path.with_name("run.json").exists()
    return str(path.parent if is_of_run else path)


def resize_way(text: str) -> str:
    """An argparse `type`: a way to make an image square."""
    if not re.fullmatch(r"stretch|pad|crop(:(1|0?\.\d+):(bilinear|bicubic))?", text):
        raise argparse.ArgumentTypeError(
            f"expected stretch, crop, pad, or as in crop:0.875:bicubic, not {text!r}"
        )
    return text


def sizes(text: str) -> list[float]:
    """An argparse `type`: parts of the images' side, as in 5/8,3/4,1."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        parts = [float(Fraction(word)) for word in text.split(",")]
        if all(0 < part <= 1 for part in parts):
            return parts
    raise argparse.ArgumentTypeError(
        f"expected parts of the images' side, as in 5/8,3/4,1, not {text!r}"
    )


def fold(text: str) -> str:
    """An argparse `type`: K/N, the K-th of N parts."""
    with contextlib.suppress(ValueError):
        part, parts = map(int, text.split("/"))
        if 1 <= part <= parts > 1:
            return text
    raise argparse.ArgumentTypeError(f"expected K/N, K from 1 to N, as in 1/5, not {text!r}")


# The arguments that say how a file becomes pixels.
PIXELS = {"image_size", "resize", "grey"}

COUNT = number(int, 1)
POSITIVE = number(float, above=0)
PART = number(float, 0, below=1)

# The help texts of the options of models, losses and optimisers. One that is not here has none.
OPTIONS = {
    "c1": "channels of the first convolutions",
    "c2": "channels of the later convolutions",
    "c3": "channels of the third convolutions",
    "c4": "channels of the fourth convolutions",
    "l1": "units of the hidden dense layer",
    "d1": "probability of dropout",
    "kernel_size": "side of the filters in pixels",
    "norm_momentum": "part of batch norm's statistics that each batch replaces",
    "tutorial_layers": "layers in the order of the tutorials",
    "always_dropout": "dropout in evaluation too: a mistake of the CIFAR-10 tutorial",
    "momentum": "part of a step that the next step repeats",
    "weight_decay": "shrinking of the weights in each step",
    "aux_lr": "learning rate of all weights but convolution filters",
    "label_smoothing": "part of the target that is spread over all classes",
}


def make_parser(  # noqa: PLR0915 (a table of flags)
    script: str, description: str, recipes: dict
) -> tuple[ArgumentParser, dict]:
    """The parser of a training script, which returns what is typed and nothing else.

    Beside it: the defaults of the flags that no recipe sets.
    """
    parser = ArgumentParser(
        prog=script,
        description=description,
        usage="%(prog)s [flags]",
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    defaults = {}

    def flag(usage, kind, text, default=None):
        defaults[add_flag(group, usage, kind, text)] = default

    group = parser.add_argument_group("used most")
    flag(
        "--dataset NAME|PATH",
        dataset_source,
        f"{', '.join(DATASETS)}, a folder of images, or a CSV file",
    )
    flag("--recipe", recipes, "set of defaults; --recipe NAME --help shows it", "default")
    flag("--model", MODELS, "architecture: one of these, or any classifier of torchvision")
    flag("--epochs N", COUNT, "passes over the training images, at most")
    flag("--batch-size IMAGES", COUNT, "images in one step")
    flag("--lr RATE", POSITIVE, "learning rate, at the peak of the schedule")
    flag("--augment", bool, "random changes of each training image, in every epoch anew")
    flag("--seed N", number(int, 0), "seed of split, weights, order, augmentation and dropout", 42)
    flag("--device", ("auto", "cpu", "cuda", "mps"), "auto: a GPU where there is one", "auto")
    flag("--run-name NAME", run_name, "name of the run's directory (script, time, random letters)")
    flag("--resume RUN", absolute_path, "directory of a run that is to go on")
    flag("--wandb", ("disabled", "offline", "online"), "logging to W&B as well", "disabled")
    flag("--quiet", bool, "no output but errors", False)

    group = parser.add_argument_group("data")
    flag("--data-dir DIR", absolute_path, "directory of the named datasets", records.HERE / "data")
    flag("--image-size PIXELS", COUNT, "side of the square to which images of files are resized")
    flag(
        "--resize WAY",
        resize_way,
        "way to the square: stretch the image, pad it with black, or crop its middle; "
        "crop:0.875:bicubic takes this part of the shorter side, with this filter",
        "stretch",
    )
    flag("--grey", bool, "read image files without their colours")
    flag("--val-size PART", PART, "part of the training images that validates; 0: test set", 0.1)
    flag(
        "--fold K/N",
        fold,
        "validate with the K-th of N parts of all images; those of a folder test are left out",
    )
    flag("--limit-train N", COUNT, "use only N training images")
    flag("--normalize", ("half", "dataset"), "mean and std: 0.5, or the training images'", "half")

    group = parser.add_argument_group("pretrained nets")
    flag(
        "--weights WEIGHTS",
        weights_source,
        "weights to begin with: imagenet (torchvision downloads them), a file, or a run; "
        "the last layer is new, unless the run has the same classes",
    )
    flag("--freeze", bool, "train the last layer alone, without augmentation but --flip", False)

    group = parser.add_argument_group(
        "augmentation, switched on by an amount; each image has its own"
    )
    for name, (kind, metavar, text, _) in AUGMENTATIONS.items():
        flag(f"{as_flag(name)} {metavar}", kind, text, 0)
    flag(
        "--alternate-flip",
        bool,
        "mirror each image in every other epoch, from the first or second on",
        False,
    )

    group = parser.add_argument_group("training")
    flag("--optimizer", OPTIMIZERS, "optimiser; sgd has Nesterov momentum", "adam")
    flag("--schedule", SCHEDULES, "course of the learning rate", "constant")
    flag("--loss", LOSSES, "loss, which the training makes small", "cross-entropy")
    flag(
        "--class-weights",
        ("balanced", "margin"),
        "for rare classes: with balanced, all classes count the same in the loss; "
        "with margin, common classes have a head start, but in training only",
    )
    flag(
        "--sizes PART,...",
        sizes,
        "parts of the images' side to train at, over equal parts of the run",
    )
    flag("--tolerance EPOCHS", number(int, 0), "epochs without a new best that end a run; 0: never")
    flag(
        "--keep",
        ("best", "last"),
        "epoch whose weights are kept: that of the lowest validation loss, or the last one",
        "best",
    )
    flag("--test", bool, "test with the weights that are kept, at the end", True)
    flag("--tta", TTA, "average these views of each test image of which the model is unsure")

    group = parser.add_argument_group("machine and run")
    flag("--precision", ("auto", *PRECISIONS), "auto: what the hardware computes fast", "auto")
    flag(
        "--threads N",
        COUNT,
        "CPU threads; another number changes the results' last digits (all cores)",
    )
    flag("--compile", bool, "torch.compile: a slow start, faster steps on a GPU", False)
    flag("--runs-dir DIR", absolute_path, "directory for run directories", records.HERE / "runs")
    flag("--stop-after N", COUNT, "last epoch of this process; --resume goes on")
    flag("--wandb-project NAME", str, "project to which W&B files the run", "image-classifiers")
    group.add_argument("-h", "--help", action="store_true", help="show this text")
    defaults |= {"mean": None, "std": None}  # of pretrained weights; no flags

    # An option has the default of the model, loss or optimiser that it goes with. What it takes
    # follows from that, too: a switch, a number from 1, a part, or a number from 0.
    group = parser.add_argument_group("options of some models, losses or optimisers")
    for name, owners in owners_of_options().items():
        default = next(iter(owners.values()))
        kind = PART if default < 1 else number(float, 0)
        if isinstance(default, int):
            kind = bool if isinstance(default, bool) else COUNT
        chosen = ", ".join(f"{owner.split()[1]} {value}" for owner, value in owners.items())
        flag(f"{as_flag(name)} NUMBER", kind, f"{OPTIONS.get(name, '')} ({chosen})")
    return parser, defaults


def as_flag(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def options_of(entry: Callable) -> dict:
    """The options of an entry of a table, with their defaults: its arguments that are numbers or
    switches."""
    arguments = inspect.signature(entry).parameters.values()
    return {each.name: each.default for each in arguments if isinstance(each.default, int | float)}


def owners_of_options() -> dict[str, dict]:
    """For each option, the entries of TABLES that have it, and their defaults."""
    owners = {}
    for title, table in TABLES.items():
        for entry, function in table.items():
            for name, default in options_of(function).items():
                owners.setdefault(name, {})[f"--{title} {entry}"] = default
    return owners


def build(table: dict, entry: str, values: dict) -> Callable:
    """The entry of a table with its options as they are in `values`."""
    names = options_of(table[entry])
    options = {name: values[name] for name in names if values.get(name) is not None}
    return functools.partial(table[entry], **options)


# What may differ when a run goes on: where it runs, how it reports, and how long. Never what it
# computes.
CHANGEABLE = {"resume", "epochs", "tolerance", "stop_after", "data_dir", "device", "quiet", "wandb"}
CHANGEABLE |= {"wandb_project", "dataset", "listing"}


def parse_arguments(
    script: str, description: str, recipes: dict, argv: list[str] | None = None
) -> Namespace:
    """`argv` (None: the command line) of the training script at the path `script`.

    The defaults are those of --recipe, or the arguments of the run that --resume names. Exits with
    status 2 on a bad argument.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = Path(script).stem
    parser, defaults = make_parser(f"{name}.py", description, recipes)
    typed = vars(parser.parse_args(argv))
    try:
        # What is not typed is as in the run that goes on, or else as in the recipe.
        record = records.read_record(typed["resume"]) if "resume" in typed else None
        if record and record["script"] != name:
            raise UsageError(f"{shown(typed['resume'])} is a run of {record['script']}.py")
        if record:
            listing = listing_of(typed["resume"], record)
            before = recorded_arguments(record)
        else:
            listing = search_directory and search_directory / "data.csv"
            listing = listing if listing and listing.exists() else None
            before = defaults | recipe_for(typed, recipes, listing)
        values = with_options(before | typed)
        if "help" in typed:
            parser.set_defaults(**values | {"help": None})
            parser.print_help()
            parser.exit()
        if "augment" not in typed:  # an amount that is typed switches it on
            values["augment"] |= any(typed.get(name) for name in AUGMENTATIONS)
        refuse_what_has_no_effect(values, typed)

        # Where, and as what, it is computed.
        args = Namespace(**values)
        args.data_dir = Path(args.data_dir)
        args.listing = listing
        args.device, args.precision = choose_device_and_precision(args.device, args.precision)
        args.threads = args.threads or torch.get_num_threads()
        records.check_wandb(args.wandb, args.quiet)
        if record:
            check_resumed(args, before, record)
    except (UsageError, RunError) as error:
        parser.error(str(error))
    args.directory = args.resume or args.runs_dir / (args.run_name or new_name(name))
    args.script = name
    args.argv = argv
    args.typed = {*typed}

    # Say what follows from a folder.
    if callable(recipes[args.recipe]) and not record:
        names = ("model", "image_size", "epochs", "batch_size", "class_weights")
        chosen = ((as_flag(name), getattr(args, name)) for name in names)
        line = " ".join(f"{flag} {value}" for flag, value in chosen if value is not None)
        say(f"--recipe {args.recipe} for this folder: {line}", args.quiet)
    return args


def recipe_for(typed: dict, recipes: dict, listing: Path | None) -> dict:
    """The defaults of a new run, from the recipe, the images and the weights to begin with.

    A recipe is a dict, or a function of what a folder of images holds. UsageError, RunError.
    """
    # The recipe that is named, or else that for images of files.
    source = typed.get("dataset", "synthetic")
    of_files = source not in DATASETS
    name = typed.get("recipe", "photos" if of_files and "photos" in recipes else "default")
    recipe = recipes[name]
    if callable(recipe):
        if not of_files:
            raise UsageError(f"--recipe {name} is for images of your own: give --dataset PATH")
        recipe = recipe(**census(source, listing))
        if typed.get("model", recipe["model"]) != recipe["model"]:
            recipe |= ANY_MODEL_DEFAULTS
    recipe = recipes["default"] | {"recipe": name} | recipe

    # What goes with weights or an optimiser that the recipe is not for.
    if "weights" in typed:
        recipe |= ANY_MODEL_DEFAULTS
        if typed.get("freeze"):
            recipe |= FREEZE_DEFAULTS
        known = preprocessing_of(typed["weights"], typed.get("model", IMAGENET_MODEL))
        if not of_files:  # the pixels are what they are
            known = {name: known[name] for name in known.keys() - PIXELS}
        recipe |= known
    before = recipe.get("optimizer")
    after = typed.get("optimizer")
    if after == "muon" != before:
        recipe |= MUON_DEFAULTS
    elif before == "muon" and after in ("adam", "adamw"):
        recipe |= {"lr": ANY_MODEL_DEFAULTS["lr"]}

    # Where left and right matter, no mirrored view is averaged either.
    if typed.get("flip") == 0 and recipe.get("tta") == "mirror+shift":
        recipe |= {"tta": "shift"}
    return recipe


def with_options(values: dict) -> dict:
    """`values` with the options of the chosen model, loss and optimiser, and no others'."""
    owners = owners_of_options()
    complete = {name: value for name, value in values.items() if name not in owners}
    for title in TABLES:
        for name, default in options_of(TABLES[title][values[title]]).items():
            complete[name] = default if values.get(name) is None else values[name]
    return complete


def recorded_arguments(record: dict) -> dict:
    """The arguments in a run.json. One that an older run lacks has its default. RunError."""
    _, defaults = make_parser("", "", {})
    args = defaults | {"threads": record["threads"]} | record["args"]
    lacking = [f"--{title} {args[title]}" for title in TABLES if args[title] not in TABLES[title]]
    for text in lacking + [as_flag(name) for name in args if name not in defaults]:
        raise RunError(f"the run {record['name']} has {text}, which is not here")
    return with_options(args)


def why_not_comparable(one: dict, other: dict, figure: str) -> str:
    """Why a figure of two runs cannot be compared, "" where it can; each run is its run.json.

    `figure` is val_loss, val_acc, test_loss or test_acc. Losses can be compared where --loss, the
    class weights and the pixels are the same, accuracies where the images are, at whatever size.
    The test's loss is always the plain cross-entropy.
    """
    part, kind = figure.split("_")
    args = [recorded_arguments(run) for run in (one, other)]
    names = PIXELS if kind == "loss" else set()
    if figure == "val_loss":
        names = names | {"loss", "class_weights", *options_of(LOSSES[args[0]["loss"]])}
    reasons = [as_flag(name) for name in sorted(names) if args[0].get(name) != args[1].get(name)]

    # An older run has no checksum of the images that validate; they follow from the others.
    is_known = all(run["data"].get(f"{part}_checksum") for run in (one, other))
    keys = [f"{part}_checksum"] if is_known else ["checksum", part]
    if any(one["data"].get(key) != other["data"].get(key) for key in keys):
        reasons.append(f"{part} images")
    return f"the runs differ in {', '.join(reasons)}" if reasons else ""


def refuse_what_has_no_effect(values, typed):
    """UsageError where what is typed changes nothing."""
    source = values["dataset"]
    augmented = values["augment"]
    # The flags, where they have an effect, and what to say where they have none.
    rules = [
        (PIXELS, source not in DATASETS, f"with --dataset {source}"),
        ({"data_dir"}, source in TORCHVISION, f"with --dataset {source}"),
        ({*AUGMENTATIONS, "alternate_flip"}, augmented, "without --augment"),
        ({"alternate_flip"}, augmented and values["flip"], "without --flip"),
        ({"val_size"}, not values["fold"], "beside --fold"),
        ({"test"}, not (values["fold"] and values["test"]), "beside --fold"),
        ({"tolerance"}, values["keep"] == "best", "with --keep last"),
        ({"wandb_project"}, values["wandb"] != "disabled", "without --wandb"),
        ({"freeze"}, values["weights"], "without --weights"),
        (
            {"sizes", "alternate_flip", *AUGMENTATIONS} - {"flip"},
            not values["freeze"],
            "with --freeze",
        ),
        ({"normalize"}, not values["mean"], "with --weights, which have a mean and std"),
    ]
    for name, owners in owners_of_options().items():
        rules.append(({name}, name in values, f"here, but with {' or '.join(owners)}"))
    for names, has_effect, text in rules:
        for name in sorted(names & typed.keys()):
            if not has_effect:
                raise UsageError(f"{as_flag(name)} has no effect {text}")
    if not values["val_size"] and not values["test"]:
        raise UsageError("--val-size 0 validates on the test set, which --no-test forbids to read")


def check_resumed(args, recorded, record):
    """UsageError where `args` would change what the run of a run.json computes."""
    for name, value in vars(args).items():
        if name not in CHANGEABLE and str(value) != str(recorded.get(name)):
            raise UsageError(f"{as_flag(name)} cannot change when a run is resumed")
    if args.dataset != recorded["dataset"] and {args.dataset, recorded["dataset"]} & {*DATASETS}:
        raise UsageError("--dataset cannot change when a run is resumed, but for files that moved")
    if args.class_weights and "files" not in record["data"] and args.epochs > record["epochs"]:
        raise UsageError(
            "--class-weights weighed the losses otherwise in the version that began this run; "
            "train anew"
        )
    if args.epochs < record["epochs"]:
        raise UsageError(f"--epochs {args.epochs}: the run already has {record['epochs']} epochs")
    if args.epochs != recorded["epochs"] and (args.schedule != "constant" or args.sizes):
        cause = "--sizes" if args.sizes else f"--schedule {args.schedule}"
        raise UsageError(
            f"--epochs cannot change under {cause}, which is planned for the whole run; "
            f"begin a new run with --epochs {args.epochs}"
        )


# The type that autocast computes in. None leaves all to torch's defaults for float32 (on CUDA, TF32
# convolutions).
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device_and_precision(device: str, precision: str) -> tuple[str, str]:
    """What `auto` means on this machine. UsageError where it lacks the device."""
    # The device.
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise UsageError(
            f"--device {device}: this machine or this build of torch has none; "
            "use --device cpu or auto"
        )

    # The precision.
    if precision == "auto" and device == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        # Without AVX-512's bf16 instructions a CPU emulates it, many times slower than fp32.
        has_bf16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if has_bf16 else "fp32"
    if device == "cpu" and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32")

    # Two runs of one seed are to give the same bytes; cuDNN's fastest kernels do not.
    torch.backends.cudnn.deterministic = True
    return device, precision


def keep_freed_memory(device):
    """Have glibc keep the gigabytes that each step on a CPU frees.

    To get them from the system anew took a third of ConfigNet's step.
    """
    if device == "cpu" and sys.platform == "linux":
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-4, 0)  # M_MMAP_MAX
        glibc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def make_autocast(device: str, precision: str) -> Callable:
    """A function that makes the context of a forward pass in `precision`."""
    return functools.partial(
        torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32"
    )


# ------------------------ The program ------------------------
def command_line(main: Callable[[list[str]], dict]) -> int:
    """Run `main(argv)` as a program: print a user's mistake as one line, return the exit status."""

    def fail(status, message):
        with contextlib.suppress(OSError):  # nobody reads it; the exit status tells as well
            print(
                f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}",
                file=sys.stderr,
            )
        return status

    # What goes wrong by a user's mistake or the machine's limits is one line.
    signal.signal(signal.SIGTERM, records.interrupt)
    repair_outputs()
    try:
        record = main(sys.argv[1:])
    except UsageError as error:
        return fail(2, error)
    except ModuleNotFoundError as error:
        return fail(1, f"{error}; pip install {error.name}")
    except (RunError, OSError, MemoryError) as error:
        return fail(1, str(error) or "out of memory; try a smaller --batch-size or model")
    except RuntimeError as error:
        # What each backend says when it has no more memory has no type in common.
        no_memory = "out of memory|can't allocate memory|not enough memory"
        if not re.search(no_memory, str(error), re.IGNORECASE):
            raise
        return fail(1, f"{str(error).splitlines()[0]}; try a smaller --batch-size or model")
    except KeyboardInterrupt as error:
        name = str(error) or "SIGINT"
        return fail(128 + signal.Signals[name], f"interrupted by {name}")

    # A run that did not come to its end says so in its record.
    status = record.get("status")
    error = record.get("error")
    if status == "diverged":
        return fail(
            1,
            f"{error}; try a lower --lr. The epochs before are in {shown(record['directory'])}",
        )
    if status == "interrupted" and error:
        words = ["python", sys.argv[0], "--resume", shown(record["directory"])]
        go_on = record.get("go_on") or shlex.join(words)
        return fail(128 + signal.Signals[error], f"interrupted by {error}; go on with: {go_on}")
    return 0


def repair_outputs():
    """Let a program print whose outputs are closed, or lack the characters of a file's name."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a file opened later would take its place, and what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 (tqdm wants one)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")


def random_seed(*parts) -> int:
    """A seed below 2**63 that follows from `parts` alone: each use of --seed draws its own."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator with the seed `random_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(random_seed(*parts))


# ------------------------ Data ------------------------
@dataclass
class File:
    """A row of data.csv: an image's `name` as seen from the folder, its class, its part, and the
    SHA-256 of its bytes. `path` is where it is."""

    path: Path
    name: str
    label: str
    part: str
    sha256: str = ""


@dataclass
class ImageSet:
    """A part of a dataset in memory: the images at `rows` [N] of `pixels`, uint8 [M, C, H, W].

    `labels` int64 [N] are indices of `classes`; `files` [N] are those of images from files. The
    parts of a dataset may share their pixels. A batch is some rows of `pixels`, and so has their
    order in memory, channels_last: the colours of a pixel lie side by side.
    """

    pixels: Tensor
    labels: Tensor
    classes: list[str]
    files: list[File] | None = None
    rows: Tensor | None = None

    def __post_init__(self):
        if self.rows is None:
            self.rows = torch.arange(len(self.pixels), device=self.pixels.device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """A copy of the part's images, uint8 [N, C, H, W]."""
        return self.pixels[self.rows]

    def select(self, chosen: Tensor) -> "ImageSet":
        """The images at the indices `chosen`, or where a mask is true; no copy of their pixels."""
        places = torch.arange(len(self))[chosen.cpu()].tolist()
        files = self.files and [self.files[place] for place in places]
        return ImageSet(self.pixels, self.labels[places], self.classes, files, self.rows[places])

    def to(self, device: str) -> "ImageSet":
        """The same images on `device`; no copy of those that are there."""
        return ImageSet(
            self.pixels.to(device, memory_format=torch.channels_last),
            self.labels.to(device),
            self.classes,
            self.files,
            self.rows.to(device),
        )

    def chunks(self) -> Iterator[Tensor]:
        """The images on the CPU, a few at a time: uint8 [64, H, W, C]."""
        return (self.pixels[rows].cpu().permute(0, 2, 3, 1) for rows in self.rows.split(64))

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the images and the labels; of images from files, of these and the labels."""
        digest = hashlib.sha256("\n".join(file.sha256 for file in self.files or ()).encode())
        if not self.files:
            for images in self.chunks():
                digest.update(images.contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def class_weights(self) -> Tensor:
        """Weights [K] with which all classes count the same, and an image 1 on average."""
        counts = self.labels.bincount(minlength=len(self.classes))
        return len(self) / (len(self.classes) * counts.clamp(min=1))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per channel, of the values in [0, 1], from exact sums of the bytes."""
        count = math.prod(self.pixels.shape[2:]) * len(self)
        total, squares = torch.zeros(2, self.pixels.shape[1], dtype=torch.int64)
        for images in self.chunks():
            values = images.flatten(0, 2).long()
            total += values.sum(0)
            squares += (values**2).sum(0)
        mean = total.double() / count
        std = (squares.double() / count - mean**2).sqrt()
        # A channel may be the same in all images.
        return (mean / 255).tolist(), (std.clamp(min=1) / 255).tolist()


@dataclass
class Data:
    """The parts of a dataset. `test` is None where there is none, or none is to be read.

    Images from files are those of a data.csv with the content `listing`; it lies at `files` as seen
    from the run's directory.
    """

    train: ImageSet | None
    val: ImageSet | None
    test: ImageSet | None
    files: str | None
    listing: bytes

    def about(self) -> dict:
        """What run.json says of the images."""
        about: dict = {"selection": "test set" if self.val is self.test else "validation split"}
        for part in PARTS:
            images = getattr(self, part)
            about[part] = images and len(images)
            key = "checksum" if part == "train" else f"{part}_checksum"
            about[key] = images and images.checksum
        checksum = self.files and checksum_of(self.listing)
        return about | {"files": self.files, "files_checksum": checksum}

    def check(self, known: dict, source: Path | str, directory: Path) -> None:
        """RunError where the checksums of the images from `source` are not those in `known`, the
        part `data` of the run.json in `directory`."""
        for name, checksum in self.about().items():
            if "checksum" in name and checksum and known.get(name) not in (None, checksum):
                use = "tested" if name == "test_checksum" else "trained"
                raise RunError(
                    f"{source} is not what {shown(directory)} was {use} on: the checksums differ"
                )


# The names of --dataset, and torchvision's for them.
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
DATASETS = (*TORCHVISION, "synthetic")
PARTS = ("train", "val", "test")

# A process that trains many times, for a search, names the search's directory here. Then images
# from files are those of the data.csv in it, and each dataset is read once.
search_directory: Path | None = None
images_read: dict = {}


def load_data(
    args: Namespace, synthetic: Callable[[bool], ImageSet], wanted: tuple[str, ...] = PARTS
) -> Data:
    """The parts of --dataset, on --device; `synthetic(train)` draws those of that name.

    Every image is looked at now, those of the test set too, and not after hours of training. A part
    of the training images validates, unless there are others; at --val-size 0 the test set does.
    `wanted` is all, or ("test",), or ("train", "val"). RunError says what is missing, damaged or
    too little, UsageError what does not go together.
    """
    # Read each part that has images of its own. A fold leaves the test images alone.
    if not search_directory:
        images_read.clear()
    of_files = args.dataset not in DATASETS
    parts = read_files(args, wanted) if of_files else read_named(args, synthetic, wanted)

    # Cut the training images in two.
    if "train" in parts:
        parts |= divide(parts["train"], args, needs_val="val" not in parts)

    # Put the parts together. Of a test set that is not to be read, the files were looked at.
    files = None
    listing = b""
    if of_files:
        files = "../data.csv" if args.listing else "data.csv"
        listing = args.listing.read_bytes() if args.listing else listing_as_csv(parts)
        say_twins(parts, args.quiet)
    stand_in = parts.get("test") if wanted == PARTS and not args.val_size else None
    val = parts.get("val", stand_in)
    test = parts.get("test") if args.test else None
    data = Data(parts.get("train"), val, test, files, listing)
    if wanted == PARTS:
        announce_data(data, args)
    return data


def announce_data(data: Data, args: Namespace) -> None:
    """Say what a training is to know of its images. RunError where they are too few."""
    if not data.val or len(data.train) < 2:
        raise RunError(
            f"{args.dataset}: too few images to train and validate with; see --val-size and --fold"
        )
    classes = data.train.classes
    counts = data.train.labels.bincount()
    rarest = counts.argmin()
    count = len(data.train)
    say(
        f"{args.dataset}: {count:,} training, {len(data.val):,} validation and "
        f"{len(data.test or ()):,} test images; "
        f"{len(classes)} classes, the smallest {counts[rarest]:,} ({classes[rarest]})",
        args.quiet,
    )
    learnt = images_behind(args)
    judging = {
        file.name: file.sha256 in learnt
        for part in (data.val, data.test)
        if part
        for file in part.files or ()
    }
    flattered = sum(judging.values())
    if flattered:
        say(
            f"{flattered} of the {len(judging)} images that validate or test have trained "
            f"{shown(args.weights)}, so the figures are flattered",
            args.quiet,
        )
    if data.val is data.test:
        say(
            "--val-size 0: the test set validates, as in the tutorials; its figures are flattered",
            args.quiet,
        )
    if args.batch_size >= count:
        say(
            f"--batch-size {args.batch_size}: the {count} training images are one step an epoch, "
            f"so little is learnt; try --batch-size {max(2, count // 20)}",
            args.quiet,
        )


def read_named(args, synthetic, wanted):
    """The training and the test images of one of DATASETS, on --device.

    None of them has images of its own to validate with, and a fold leaves the test images alone.
    """
    parts = {}
    for part in wanted:
        if part == "val" or (part == "test" and args.fold):
            continue
        key = args.script, args.dataset, args.data_dir, args.device, part
        if key not in images_read:
            draws = args.dataset == "synthetic"
            train = part == "train"
            images = synthetic(train) if draws else read_torchvision(args, train)
            images_read[key] = images.to(args.device)
        parts[part] = images_read[key]
    return parts


def divide(images: ImageSet, args: Namespace, needs_val: bool) -> dict[str, ImageSet]:
    """Cut `images` into those that train, that validate, and that --limit-train leaves unused; a
    part that would be empty is not there. RunError.

    A fold follows from the names of the images. Without `needs_val`, none of them validates.
    """
    count = len(images)
    labels = images.labels.cpu()
    val = torch.zeros(count, dtype=torch.bool)
    if needs_val and args.fold:
        # Sort the images by class, and within a class by a hash. Then every n-th validates.
        part, parts = map(int, args.fold.split("/"))
        names = [file.name for file in images.files or ()] or map(str, range(count))
        keys = zip(labels.tolist(), map(hash_of, names), range(count), strict=True)
        order = [index for _, _, index in sorted(keys)]
        val[order[part - 1 :: parts]] = True
    elif needs_val:
        random = generator_for(args.seed, "validation")
        val = stratified_sample(labels, round(count * args.val_size), random)

    # Of the others, train with as many as --limit-train says.
    train = ~val
    if args.limit_train:
        places = train.nonzero().flatten()
        if args.limit_train > len(places):
            raise RunError(
                f"--limit-train {args.limit_train}: there are only {len(places)} training images"
            )
        kept = stratified_sample(
            labels[places], args.limit_train, generator_for(args.seed, "limit")
        )
        train[places[~kept]] = False
    masks = {"train": train, "val": val, "unused": ~(train | val)}
    return {part: images.select(mask) for part, mask in masks.items() if mask.any()}


def hash_of(name):
    """A hash that puts names into an order of no meaning, always the same."""
    return checksum_of(os.fsencode(name))


def stratified_sample(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` of the images with `labels` [N], each class in its own proportion to within one.

    Returns a mask [N].
    """
    counts = torch.bincount(labels)
    quota = counts.double() * size / len(labels)
    take = quota.floor().long()
    order = torch.randperm(len(labels), generator=generator)
    # What rounding down leaves goes to the classes that lost most by it, among equals by lot.
    classes = torch.randperm(len(counts), generator=generator)
    lost = (quota - take)[classes]
    classes = classes[lost.argsort(descending=True, stable=True)]
    take[classes[: size - take.sum()]] += 1
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(take.tolist()):
        mask[order[labels[order] == label][:count]] = True
    return mask


def read_torchvision(args, train):
    """The training or test images of a torchvision dataset, downloaded where they are missing.
    RunError.

    torchvision checks the MD5 of what it downloads, of an archive that lies there already, and of
    CIFAR's files.
    """
    from torchvision import datasets

    # Read it, or download it.
    name = TORCHVISION[args.dataset]
    data_dir = args.data_dir
    folder = place_of_images(args)
    read = functools.partial(getattr(datasets, name), data_dir, train=train)
    try:
        try:
            dataset = read()
        except RuntimeError:  # it is not there, or not whole
            data_dir.mkdir(parents=True, exist_ok=True)
            with records.locked(data_dir / ".download.lock", wait=True), downloading(args):
                dataset = read(download=True)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        raise RunError(
            f"{shown(folder)} is missing or damaged, and {name} could not be downloaded ({error}); "
            "see README, Data, for slow networks, or try --dataset synthetic"
        ) from error

    # Look at its labels, and have the axes of the images in torch's order.
    images = torch.as_tensor(dataset.data)
    labels = torch.as_tensor(dataset.targets)
    if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(dataset.classes):
        raise RunError(
            f"{shown(folder)}: its labels do not fit its images; "
            "remove it, and it is downloaded anew"
        )
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return ImageSet(images, labels, [str(name) for name in dataset.classes])


def downloading(args):
    """A context in which torchvision shows the bar of a download only where somebody sees it."""
    socket.setdefaulttimeout(60)  # a server that falls silent does not hold a run for ever
    is_silent = args.quiet or not sys.stderr.isatty()
    return contextlib.redirect_stderr(io.StringIO() if is_silent else sys.stderr)


# ------------------------ Images from files ------------------------
COLUMNS = ("file", "class", "part", "sha256")
# What a folder, or a line of a CSV file, may call each part.
PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def read_files(args: Namespace, wanted: tuple) -> dict[str, ImageSet]:
    """The parts of a folder of images, or of a CSV file, that have images of their own.

    A run that goes on, and a trial of a search, read the files of the data.csv `args.listing`.
    RunError, UsageError.
    """
    root = folder_of(args.dataset)
    if not root.is_dir():
        raise RunError(f"{shown(root)} is not there; say where the images are with --dataset")

    # The files that are written down, whatever has come since; else all that are there.
    files = list_files(args.listing or Path(args.dataset), root, args.quiet)
    if args.fold:
        files = [file for file in files if file.part != "test"]
    classes = sorted({file.label for file in files}, key=in_natural_order)
    if len(classes) < 2:
        raise RunError(
            f"{shown(args.dataset)}: expected at least two classes, PATH/<class>/*, "
            "with images in each"
        )
    if not args.listing:
        settle_parts(files, classes, args)

    # Look at all that are needed, part by part; they share the pixels.
    files = [file for part in PARTS for file in files if file.part == part and part in wanted]
    key = args.dataset, args.image_size, args.grey, args.resize, args.device
    key += tuple(file.name for file in files)
    if key not in images_read:
        pixels = read_pixels(files, args)
        labels = torch.tensor([classes.index(file.label) for file in files], dtype=torch.long)
        images_read[key] = ImageSet(pixels, labels, classes, files).to(args.device)
    masks = {part: torch.tensor([file.part == part for file in files]) for part in PARTS}
    return {part: images_read[key].select(mask) for part, mask in masks.items() if mask.any()}


def is_csv(path):
    """Whether `path` is that of a CSV file, which need not be there."""
    return path.suffix.lower() == ".csv" and not path.is_dir()


def folder_of(source: str) -> Path:
    """The folder from which the paths in a data.csv are seen."""
    path = Path(source)
    return path.parent if is_csv(path) else path


def place_of_images(args: Namespace) -> Path | None:
    """The folder of the images of --dataset, or of torchvision's files; None if they are drawn."""
    if args.dataset in TORCHVISION:
        from torchvision import datasets

        name = TORCHVISION[args.dataset]
        return args.data_dir / getattr(getattr(datasets, name), "base_folder", f"{name}/raw")
    return None if args.dataset == "synthetic" else folder_of(args.dataset)


def listing_of(directory: Path, record: dict) -> Path | None:
    """The data.csv of a run, None where its dataset has a name. RunError where it is not whole."""
    about = record["data"]
    if record["args"]["dataset"] in DATASETS:
        return None
    path = directory / about.get("files", "data.csv")
    if not path.is_file():
        raise RunError(
            f"{shown(path)} is missing: it says which images are those of the run "
            "(an earlier version did not write down its images: train anew)"
        )
    if checksum_of(path.read_bytes()) != about["files_checksum"]:
        raise RunError(f"{shown(path)} has changed since the run began")
    return path


def census(source: str, listing: Path | None) -> dict:
    """What a folder or a CSV file holds to train on: how many `images` of how many `classes`, how
    many of the `rarest`, and `side`, the median of the shorter sides of a hundred images, in
    pixels. The data.csv `listing` says which images, if there is one. RunError.
    """
    from PIL import Image

    files = list_files(listing or Path(source), folder_of(source))
    files = [file for file in files if file.part == "train"]
    counts = Counter(file.label for file in files)
    sides = []
    for file in files[:: math.ceil(len(files) / 100) or 1]:
        with contextlib.suppress(Exception), Image.open(file.path) as image:
            sides.append(min(image.size))  # what cannot be read is told when all are read
    return {
        "images": len(files),
        "classes": len(counts),
        "rarest": min(counts.values(), default=0),
        "side": statistics.median(sides or [0]),
    }


def list_files(source: Path, root: Path, quiet: bool = True) -> list[File]:
    """The files of a folder, or of a CSV file whose paths are seen from `root`. RunError."""
    return read_csv(source, root) if is_csv(source) else list_folder(root, quiet)


def settle_parts(files: list[File], classes: list[str], args: Namespace) -> None:
    """See to it that every class is trained. Where no images test or validate, have a tenth of each
    class test.

    These are the files whose paths have the lowest hashes. So a new file changes one at most.
    RunError where a class is not trained, UsageError where a flag has no effect.
    """
    # What is validated and tested is what was trained.
    if len({name.strip() for name in classes}) < len(classes):
        raise RunError(f"{shown(args.dataset)}: two classes differ in spaces alone")
    for part in PARTS:
        found = {file.label for file in files if file.part == part}
        absent = ", ".join(name for name in classes if name not in found)
        if absent and part == "train":
            raise RunError(f"{args.dataset}: train has no images of {absent}, but another part has")
        if absent and found:
            say(f"{part} has no images of {absent}; its figures are over the others", args.quiet)

    # Does anything validate? Does anything test?
    parts = {file.part for file in files}
    drawn = args.typed & {"fold", "val_size"}
    if "val" in parts and drawn:
        flag = as_flag(min(drawn))
        raise UsageError(f"{flag} has no effect where images of their own validate")
    if parts == {"train"} and not args.fold:
        for name in classes:
            group = [file for file in files if file.label == name]
            count = max(1, round(len(group) / 10)) if len(group) > 2 else 0
            for file in sorted(group, key=lambda file: hash_of(file.name))[:count]:
                file.part = "test"


def read_csv(path: Path, root: Path) -> list[File]:
    """The rows of a data.csv, or of a CSV file as a spreadsheet writes it. RunError."""
    # A spreadsheet may begin the file with a mark of its encoding, and separate with semicolons.
    # Spaces after the commas of the first line are no parts of names, and so in all lines.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    header = text.partition("\n")[0]
    delimiter = ";" if ";" in header else ","
    spaced = f"{delimiter} " in header
    source = io.StringIO(text, newline="")
    lines = csv.DictReader(source, delimiter=delimiter, skipinitialspace=spaced)

    # Two columns have to be there.
    lacking = ", ".join(sorted({"file", "class"}.difference(lines.fieldnames or ())))
    if lacking:
        raise RunError(f"{shown(path)} has no column {lacking} in its first line")

    # Take the lines one by one, with one spelling of each part and path.
    files = {}
    try:
        for line in lines:
            row = [line.get(column) or "" for column in COLUMNS]
            if not any(row):
                continue  # a spreadsheet's empty line
            name, label, part, checksum = row
            part = part.strip().lower() or "train"
            if part != "unused":  # by --limit-train
                part = PART_NAMES.get(part)
            where = f"{shown(path)}, line {lines.line_num}"
            if not (name and label and part):
                raise RunError(
                    f"{where}: expected a file and its class in columns of these names, "
                    "and train, val or test in the column part, if there is one"
                )
            name = os.path.normpath(name)
            if name in files:
                raise RunError(f"{where}: {name} is there twice")
            files[name] = File(root / name, name, label, part, checksum.strip().lower())
    except csv.Error as error:
        raise RunError(f"{shown(path)} is no CSV file: {error}") from error
    return list(files.values())


def listing_as_csv(parts: dict[str, ImageSet]) -> bytes:
    """The content of a data.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part, images in parts.items():
        writer.writerows([file.name, file.label, part, file.sha256] for file in images.files)
    return text.getvalue().encode(errors="surrogateescape")


def list_folder(root: Path, quiet: bool) -> list[File]:
    """The files of PATH/<class>/*, or of PATH/train/<class>/*, PATH/val and PATH/test. RunError."""
    # The folders in it that hold images. They are parts if all of them, or several, are named so.
    skipped = Counter()
    paths = {path.relative_to(root).parts: path for path in image_files(root, skipped)}
    tops = sorted({top for top, *below in paths if below})
    parts = {top: PART_NAMES[top.lower()] for top in tops if top.lower() in PART_NAMES}
    level = 1 if len(parts) > 1 or (parts and len(parts) == len(tops)) else 0  # of the classes

    # Beside a part, a folder of another name is hardly a class. Nor are training_set and test_set.
    form = re.compile(rf"(seg_)?(?P<part>{'|'.join(PART_NAMES)})([_ -]?(set|data|images|\d+))?")
    named = filter(None, (form.fullmatch(top.lower()) for top in tops))
    alike = {PART_NAMES[match["part"]] for match in named}
    nested = parts and all(len(name) > 2 for name in paths if name[0] in parts)
    if not level and (nested or len(alike) > 1):
        raise RunError(
            f"{shown(root)} has the folders {', '.join(tops[:10])}: "
            "call those of the parts train, val and test"
        )

    # What is in no class is left out.
    files = []
    for name, path in paths.items():
        part = parts.get(name[0]) if level else "train"
        if part and len(name) > level + 1:
            files.append(File(path, "/".join(name), name[level], part))
    if skipped:
        say(skipped_in_words(skipped), quiet)
    if len(files) < len(paths):
        say(f"images left out, as they are in no class: {len(paths) - len(files)}", quiet)
    return files


def skipped_in_words(skipped: Counter) -> str:
    """What `image_files` has skipped, by the endings, for a person."""
    return f"{skipped.total()} files skipped: {endings_in_words(skipped)}"


def endings_in_words(counts: Counter) -> str:
    """How many files there are of each ending, for a person, and how to read a phone's photos."""
    hints = dict.fromkeys((".heic", ".heif"), " (pip install pillow-heif)")
    return ", ".join(f"{n} {kind}{hints.get(kind, '')}" for kind, n in counts.most_common())


# Folders that a Mac, a Synology disk station, Windows and Linux make by themselves.
NOT_THE_USERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
NOT_THE_USERS |= {"lost+found"}


def is_visible(name):
    """Whether a file or folder is one of the user's, and not of some program's."""
    return name[0] != "." and name not in NOT_THE_USERS


def in_natural_order(name):
    """A key that sorts as people count: 1, 2, 10."""
    words = re.split(r"(\d+)", name)
    return [int(word) if place % 2 else word for place, word in enumerate(words)], name


def image_files(folder: Path, skipped: Counter) -> list[Path]:
    """The image files in and below `folder`, in natural order. `skipped` counts the endings of the
    other files. OSError."""

    def fail(error):
        raise error

    found = []
    endings = image_endings()
    for here, names, files in os.walk(folder, onerror=fail, followlinks=True):
        # Not into a link to a folder above: its files would be found again and again.
        place = Path(here).absolute()
        above = {path.resolve() for path in (place, *place.parents)}
        names[:] = [
            name for name in filter(is_visible, names) if Path(here, name).resolve() not in above
        ]
        for name in filter(is_visible, files):
            ending = Path(name).suffix.lower()
            if ending in endings:
                found.append(Path(here, name))
            else:
                skipped[ending or "without ending"] += 1
    return sorted(found, key=lambda path: [in_natural_order(part) for part in path.parts])


@functools.cache
def image_endings() -> set[str]:
    """The endings of the files that Pillow can read here."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    endings = Image.registered_extensions()
    kinds = Image.OPEN.keys() - {"MPEG", "HDF5", "BUFR", "GRIB"}  # which it knows, but cannot read
    return {ending for ending, kind in endings.items() if kind in kinds}


def say_twins(parts, quiet):
    """Say where the same file is in two parts."""
    seen = {}
    twins = []
    for part, images in parts.items():
        if part == "unused":
            continue
        for file in images.files:
            other_part, other = seen.setdefault(file.sha256, (part, file.name))
            if other_part != part:
                twins.append(f"{other} ({other_part}) and {file.name} ({part})")
    if twins:
        say(f"the same picture is in two parts, {len(twins)} times: {', '.join(twins[:10])}", quiet)


def read_pixels(files: list[File], args: Namespace) -> Tensor:
    """The images of `files`, uint8 [N, C, side, side]; each file gets the SHA-256 of its bytes.

    Where they do not fit the memory, they are decoded into a file that is mapped. RunError names
    the files that are missing, have changed or cannot be read.
    """
    channels = 1 if args.grey else 3
    side = args.image_size
    problems = {}

    def read(index):  # straight into `pixels`: a list of images would take as much memory again
        file = files[index]
        try:
            content = file.path.read_bytes()
            checksum = checksum_of(content)
            if file.sha256 not in ("", checksum):
                raise ValueError("the file has changed")
            if not decoded:
                pixels[index] = decode(content, side, args.grey, args.resize)
            file.sha256 = checksum
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            problems[file.name] = reason_of(error)

    with room_for((len(files), side, side, channels), files, args) as (room, decoded):
        # Read the files, as many at a time as there are cores.
        pixels = room.permute(0, 3, 1, 2)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(read, range(len(files)))
            list(tqdm(done, "reading images", len(files), leave=False, disable=args.quiet or None))

        # Name the first ten of those that cannot be used.
        if problems:
            names = sorted(problems, key=in_natural_order)
            texts = [f"{name} ({problems[name]})" for name in names]
            more = f", and {len(texts) - 10} more" if len(texts) > 10 else ""
            advice = "put them back" if args.listing else "remove or replace them"
            raise RunError(
                f"{shown(folder_of(args.dataset))}: {len(texts)} of {len(files)} files cannot be "
                f"used: {', '.join(texts[:10])}{more}; {advice}"
            )
    return pixels


@contextlib.contextmanager
def room_for(shape, files, args):
    """An uint8 tensor of this shape, and whether the images of `files` are in it already.

    It lies in memory, or where that is too little in a file without a name, which goes with the
    process. The trials of a search share a file in the search's directory: it is decoded once.
    """
    size = math.prod(shape)
    meminfo = Path("/proc/meminfo")
    free = math.inf
    if meminfo.exists():  # else no file tells
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1])
    if size <= free and not search_directory:
        yield torch.empty(shape, dtype=torch.uint8), False
        return
    directory = search_directory or args.directory
    directory.mkdir(parents=True, exist_ok=True)
    say(
        f"{size / 1e9:.1f} GB of images do not fit the memory: "
        f"they lie in {shown(directory)} meanwhile",
        args.quiet or size <= free,
    )
    if not search_directory:
        with tempfile.TemporaryFile(dir=directory) as file:
            yield mapped(file, shape), False
        return

    # For a search: a file for each choice of images, size and way to the square. Its name is the
    # final one when all are in it.
    with records.locked(directory / ".pixels.lock", wait=True):
        key = random_seed([str(file.path) for file in files], shape, args.resize)
        path = directory / f".pixels-{key:x}"
        decoded = path.exists()
        temporary = path.with_suffix(".tmp")
        with open(path if decoded else temporary, "ab+") as file:
            yield mapped(file, shape), decoded
        if not decoded:
            temporary.rename(path)


def mapped(file, shape):
    """An uint8 tensor of this shape whose memory is the open `file`. OSError where the disk is
    full."""
    # It is filled with zeros first: to touch memory for which there is no room would be a crash.
    size = math.prod(shape)
    piece = 2**24
    for start in range(file.seek(0, os.SEEK_END), size, piece):
        file.write(bytes(min(piece, size - start)))
    file.flush()
    return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8).view(shape)


def reason_of(error):
    """Why a file cannot be used, in a few words."""
    return getattr(error, "strerror", None) or str(error).partition(" <")[0]


def read_image(path: Path, side: int, grey: bool, resize: str = "stretch") -> Tensor:
    """An image file as uint8 [C, side, side]. RunError where it cannot be read."""
    try:
        return decode(path.read_bytes(), side, grey, resize)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise RunError(f"{shown(path)} cannot be used ({reason_of(error)})") from error


def way_of(resize: str) -> tuple[str, float, str]:
    """What --resize says: stretch, pad or crop, the part of the shorter side, and the filter."""
    if ":" not in resize:
        return resize, 1.0, "bilinear"
    way, part, kernel = resize.split(":")
    return way, float(part), kernel


def decode(content: bytes, side: int, grey: bool, resize: str) -> Tensor:
    """The bytes of an image file of any size and mode as uint8 [C, side, side].

    It is turned as the camera says, what is transparent lies on white, and the square is made as
    `resize`, as in --resize, says. Raises what Pillow's decoders raise.
    """
    import numpy
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # phones make photos of 200 megapixels
    with Image.open(io.BytesIO(content)) as image:
        # A JPEG is read in half, a quarter or an eighth of its size, where that is enough.
        image.draft(None, (2 * side, 2 * side))
        # Turn it as its EXIF data say. The rest of them is not kept, as it may be malformed.
        image.getexif()
        image.info.pop("exif", None)
        image = ImageOps.exif_transpose(image)

        # Bring it to 8 bits a channel, without transparency.
        if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255
            image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel, of no known range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")

        # Make it square.
        way, part, name = way_of(resize)
        square = (side, side)
        kernel = Image.Resampling[name.upper()]
        if way == "crop":
            image = ImageOps.fit(image, square, kernel, bleed=(1 - part) / 2)
        elif way == "pad":
            image = ImageOps.pad(image, square, kernel)
        else:
            image = image.resize(square, kernel)
        return torch.from_numpy(numpy.array(image)).view(side, side, -1).permute(2, 0, 1)


# ------------------------ Augmentation and batches ------------------------
def one_each(images: Tensor, random: torch.Generator) -> Tensor:
    """A random number from 0 to 1 for each of `images`: [N, 1, 1, 1]."""
    return torch.rand(len(images), generator=random, device=random.device).view(-1, 1, 1, 1)


def rotate(images: Tensor, degrees: float, random: torch.Generator) -> Tensor:
    """Turn each image by up to `degrees` either way, as torchvision's RandomRotation does: nearest
    neighbour, black corners."""
    height, width = images.shape[-2:]
    angle = ((one_each(images, random).flatten() * 2 - 1) * degrees).deg2rad()
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    # From where in the source each pixel comes; the coordinates run from -1 to 1 along each axis.
    rows = (cos, -sin * height / width, zero, sin * width / height, cos, zero)
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def brighten(images: Tensor, part: float, random: torch.Generator) -> Tensor:
    """Multiply each image by 1 - `part` to 1 + `part`, as torchvision's ColorJitter does."""
    return (images * (1 + (one_each(images, random) * 2 - 1) * part)).clamp(0, 1)


def turn_hue(images: Tensor, part: float, random: torch.Generator) -> Tensor:
    """Turn the hue of each image by up to `part` of a full turn, as torchvision's ColorJitter does.

    Saturation and value are kept; grey has no hue. HSV as in A. R. Smith, "Color gamut transform
    pairs" (1978); back by f(n) = v - c max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, n = 5, 3, 1
    for red, green, blue, with value v and chroma c.
    """
    turns = (one_each(images, random)[:, 0] * 2 - 1) * part
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = chroma.clamp(min=1e-12)
    sixths = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixths = torch.where(value == red, (green - blue) / safe, sixths) + 6 * turns
    n = torch.arange(5, 0, -2, device=images.device).view(-1, 1, 1)
    k = torch.remainder(sixths[:, None] + n, 6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def flip(images: Tensor, probability: float, random: torch.Generator) -> Tensor:
    """Mirror each image left to right with this probability."""
    return flip_where(one_each(images, random) < probability, images)


def flip_where(chosen: Tensor, images: Tensor) -> Tensor:
    """`images` [N, C, H, W], mirrored left to right where `chosen` [N, 1, 1, 1] is true."""
    return torch.where(chosen, images.flip(3), images)


def shift(images: Tensor, pixels: int, random: torch.Generator) -> Tensor:
    """Move each image by up to so many `pixels` along each axis, the border mirrored."""
    down, right = torch.randint(
        -pixels, pixels + 1, (2, len(images)), generator=random, device=random.device
    )
    return shift_by(images, down, right, pixels)


def shift_by(images: Tensor, down: Tensor, right: Tensor, most: int) -> Tensor:
    """`images` [N, C, H, W] moved by `down` and `right` [N] pixels, at `most` so many."""
    height, width = images.shape[-2:]
    windows = F.pad(images, (most,) * 4, "reflect").unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, most - down, most - right]


# What the flag takes, its unit and help, and a function of a batch of training images, float
# [N, C, H, W] in [0, 1], of the amount, and of a random generator. They are applied in this order.
# A new one comes last: so older runs go on with the random numbers that they began with.
AUGMENTATIONS: dict[str, tuple] = {
    "rotation": (number(float, 0, 180), "DEGREES", "turn by up to so much, either way", rotate),
    "brightness": (number(float, 0, 1), "PART", "brighter or darker by up to this part", brighten),
    "hue": (number(float, 0, 0.5), "TURNS", "turn of the hue, 1 all round", turn_hue),
    "flip": (number(float, 0, 1), "PROBABILITY", "mirrored left to right", flip),
    "shift": (number(int, 0), "PIXELS", "move by up to so many along each axis", shift),
}
# Those for which older runs drew numbers, whether they were on or off.
ALWAYS_DRAWN = ("rotation", "brightness", "hue", "flip")


def augment(images: Tensor, amounts: dict, random: torch.Generator) -> Tensor:
    """`images` [N, C, H, W] after all augmentations, each by its amount in `amounts`."""
    for name, (*_, change) in AUGMENTATIONS.items():
        if amounts[name]:
            images = change(images, amounts[name], random)
        elif name in ALWAYS_DRAWN:
            one_each(images, random)
    return images


@dataclass
class Loader:
    """Batches of an `ImageSet` that lies on the device: indexed, augmented and normalised there.

    With `seed` it shuffles, and the order and the augmentation of epoch k follow from `seed` and k
    alone; without, it keeps the order. `amounts` are those of the augmentations. A last batch of a
    single image is left out of training, as batch norm needs two. `config` has the `mean` and `std`
    of each channel.
    """

    image_set: ImageSet
    batch_size: int
    config: dict
    seed: int | None = None
    amounts: dict | None = None
    alternate_flip: bool = False

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(len(self.image_set), self.batch_size)
        smallest = 1 if self.seed is None else 2
        return full + 1 if rest >= smallest else full

    def batches(self, epoch: int = 0, side: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (`images` float [B, C, H, W], `labels` int64 [B]).

        `side` resizes the images to so many pixels square.
        """
        pixels = self.image_set.pixels
        labels = self.image_set.labels
        device = pixels.device
        amounts = self.amounts
        flipped = None
        mean, std = (
            torch.tensor(self.config[name], device=device).view(-1, 1, 1)
            for name in ("mean", "std")
        )

        # The order of the images, and which are mirrored in this epoch where that alternates.
        order = torch.arange(len(labels), device=device)
        if self.seed is not None:
            random = generator_for(self.seed, "order", epoch, device=device)
            order = torch.randperm(len(labels), generator=random, device=device)
        if amounts and amounts["flip"] and self.alternate_flip:
            once = generator_for(self.seed, "flip", device=device)
            in_odd_epochs = torch.rand(len(labels), generator=once, device=device) < amounts["flip"]
            flipped = in_odd_epochs if epoch % 2 == 1 else ~in_odd_epochs
            amounts = amounts | {"flip": 0}

        # Each batch: bytes become numbers from 0 to 1, and are changed, resized and normalised.
        for batch in order.split(self.batch_size)[: len(self)]:
            if pixels.is_floating_point():  # features of a frozen net
                yield pixels[self.image_set.rows[batch]], labels[batch]
                continue
            images = pixels[self.image_set.rows[batch]].float().div_(255)
            if flipped is not None:
                images = flip_where(flipped[batch].view(-1, 1, 1, 1), images)
            if amounts:
                images = augment(images, amounts, random)
            if side and side != images.shape[-1]:
                images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
            images = images.sub(mean).div_(std)
            yield images.contiguous(memory_format=torch.channels_last), labels[batch]


def evaluation_loader(image_set: ImageSet, batch_size: int, config: dict) -> Loader:
    """A Loader for validation and test.

    Batches of 1,000 images of 32x32 pixels, or of as many pixels of larger ones, but at least as
    large as those in training.
    """
    pixels = math.prod(image_set.pixels.shape[2:])
    return Loader(image_set, max(batch_size, min(1000, 1000 * 32 * 32 // pixels)), config)


# ------------------------ Models ------------------------
class Dropout(nn.Dropout):
    """nn.Dropout that draws 16 random bits an element on a CPU; torch's own takes a fifth of
    ConfigNet's step.

    The probability is rounded to 1/65536, and the scale is that of the rounded one.

    With `always` it drops in evaluation too, as in the CIFAR-10 tutorial. Which elements it drops
    follows from the shape of the batch alone, so that evaluating twice gives the same.
    """

    def __init__(self, p, always=False):
        super().__init__(p)
        self.always = always

    def forward(self, x):
        if self.always and not self.training:
            random = generator_for("dropout in evaluation", *x.shape)
            kept = torch.rand(x.shape, generator=random).to(x.device) >= self.p
            return x * kept / (1 - self.p)
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        threshold = min(round(self.p * 65536), 65535)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        # In the order that x has in memory, so that the product runs over both in one sweep.
        bits = bits.view(torch.int16).as_strided(x.shape, torch.empty_like(x).stride())
        kept = bits >= threshold - 32768
        return (x * kept).mul_(65536 / (65536 - threshold))


class Dense(nn.Module):
    """A dense net: one hidden layer of `l1` units with dropout `d1`, over standardised images.

    Without the standardisation, as in the tutorial, the hundreds of pixels that are black in every
    digit come in as -1: they all act as the bias does, and every step moves the hidden units by
    hundreds of times the learning rate.
    """

    def __init__(self, image_shape, classes, l1=128, d1=0.5, tutorial_layers=False):
        super().__init__()
        pixels = math.prod(image_shape)
        self.standardize = nn.LayerNorm(pixels, elementwise_affine=False)
        if tutorial_layers:
            self.standardize = nn.Identity()
        self.fc1 = nn.Linear(pixels, l1)
        self.dropout = Dropout(d1)
        self.fc2 = nn.Linear(l1, classes)

    def forward(self, x):
        x = self.standardize(x.flatten(1))
        x = self.dropout(F.relu(self.fc1(x)))
        return self.fc2(x)


class CNN(nn.Module):
    """Two blocks of a padded 3x3 convolution, batch norm, 2x2 max pooling and ReLU; two dense
    layers.

    The tutorial has ReLU before the pooling. The result is the same; after it, ReLU is a quarter of
    the work.
    """

    def __init__(self, image_shape, classes, c1=32, c2=64, l1=512):
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
    """The CIFAR-10 tutorial's ConfigNet: four unpadded convolutions, the last of stride 2, and two
    dense layers.

    Batch norm comes before ReLU and dropout. In the tutorial it follows them (`tutorial_layers`):
    most of its inputs are zero there, a variance over a batch says little about an input that is
    seldom anything else, and what it does at evaluation is far from what it did in training. (X. Li
    et al., "Understanding the disharmony between dropout and batch normalization by variance
    shift", 2019.) There `kernel_size` is that of the first convolution alone.
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
        always_dropout=False,
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
        cut_off = kernel_size - 1 + 3 * (later_size - 1)
        features = c2 * ((height - cut_off + 1) // 2) * ((width - cut_off + 1) // 2)
        self.batch_norm = nn.BatchNorm1d(features)
        self.fc1 = nn.Linear(features, l1)
        self.fc2 = nn.Linear(l1, classes)
        self.dropout1 = Dropout(d1, always_dropout)
        self.dropout2 = Dropout(0.5, always_dropout)

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
    """A convolution with fixed filters whose outputs, over patches of the training images, are
    uncorrelated and of variance 1.

    The filters are the eigenvectors of the patches' covariance, each divided by the root of its
    eigenvalue, and their negatives, so that an activation that cuts one off lets the other pass.
    From hlb-CIFAR10 (tysam-code, 2022), after D. Page, "How to train your ResNet" (2018).
    """

    def __init__(self, channels, patch, stride, padding, bias):
        super().__init__(channels, 2 * channels * patch**2, patch, stride, padding, bias=bias)
        self.weight.requires_grad_(False)
        if bias:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def learn(self, images: Tensor) -> None:
        """Take the filters from `images` [N, C, H, W], normalised as in training."""
        covariance = 0
        patches = 0
        for some in images.split(500):
            some = F.unfold(some, self.kernel_size).transpose(1, 2).flatten(0, 1)
            covariance += some.T @ some
            patches += len(some)
        eigenvalues, eigenvectors = torch.linalg.eigh((covariance / patches).cpu().double())
        # The constant keeps directions in which the patches hardly vary from being blown up.
        filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T
        filters = filters.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))


def identity_convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that at first hands its inputs on: S. Zagoruyko and N. Komodakis,
    "DiracNets" (2017)."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[: min(channels_in, channels_out)])
    return convolution


def batch_norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    """Batch norm without a learnt scale. Each batch replaces the part `momentum` of the statistics
    that it has for evaluation."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm


class GlobalMaxPool(nn.Module):
    """The maximum of each channel, [N, C, H, W] to [N, C, 1, 1]. nn.AdaptiveMaxPool2d has the same
    values and gradients, but on a GPU it adds the gradients up in no fixed order."""

    def forward(self, x):
        return F.max_pool2d(x, x.shape[2:])


class WhitenedNet(nn.Sequential):
    """Whitened patches, then for each of `widths` a pair of convolutions, the first of which halves
    the sides, then a dense layer over the maximum of each channel: so images of any size do."""

    def __init__(
        self, image_shape, classes, widths, patch=2, stride=1, padding=1, bias=True, momentum=0.4
    ):
        whitening = Whitening(image_shape[0], patch, stride, padding, bias)
        layers = [whitening, nn.GELU()]
        channels = whitening.out_channels
        for width in widths:
            layers += [identity_convolution(channels, width), nn.MaxPool2d(2)]
            layers += [batch_norm(width, momentum), nn.GELU()]
            layers += [identity_convolution(width, width), batch_norm(width, momentum), nn.GELU()]
            channels = width
        head = nn.Linear(channels, classes, bias=False)
        nn.init.normal_(head.weight, std=1 / channels)
        super().__init__(*layers, GlobalMaxPool(), nn.Flatten(), head)

    def start_epoch(self, epoch: int, train_set: ImageSet, seed: int) -> None:
        """Take the whitening's filters from 5,000 training images, before the first epoch."""
        whitening = self[0]
        if epoch == 1:
            random = generator_for(seed, "whitening")
            sample = train_set.select(torch.randperm(len(train_set), generator=random)[:5000])
            images, _ = next(Loader(sample, len(sample), self.config).batches())
            whitening.learn(images)
        if whitening.bias is not None:
            # As in airbench, it is learnt for three epochs. Later it brings little, and takes time.
            whitening.bias.requires_grad_(epoch <= 3)


class FastNet(WhitenedNet):
    """The net of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), as in his
    airbench94_muon.

    But its patches begin one pixel outside the image: so 32 pixels become 16, 8 and 4, of which
    nothing is cut off.
    """

    def __init__(self, image_shape, classes, c1=64, c2=256, c3=256, norm_momentum=0.4):
        super().__init__(image_shape, classes, (c1, c2, c3), momentum=norm_momentum)


class PhotoNet(WhitenedNet):
    """A FastNet for 64 pixels and more: a pair of convolutions more, on fewer channels."""

    def __init__(self, image_shape, classes, c1=32, c2=64, c3=128, c4=256, norm_momentum=0.4):
        super().__init__(image_shape, classes, (c1, c2, c3, c4), momentum=norm_momentum)


class PatchNet(WhitenedNet):
    """A FastNet for images with less in them: larger patches, a quarter of them, and one pair of
    convolutions less."""

    def __init__(self, image_shape, classes, c1=24, c2=48):
        super().__init__(image_shape, classes, (c1, c2), patch=4, stride=2, padding=0, bias=False)


def torchvision_net(name: str, image_shape: list[int], classes: int) -> nn.Module:
    """A classifier of torchvision. Grey images become three equal channels."""
    from torchvision import models

    size = {"image_size": image_shape[1]} if name.startswith("vit_") else {}
    net = models.get_model(name, num_classes=classes, **size)
    net.register_forward_pre_hook(lambda net, inputs: inputs[0].expand(-1, 3, -1, -1))
    if name.startswith("mnasnet"):  # it refuses weights that do not say of which version they are
        net._load_from_state_dict = functools.partial(nn.Module._load_from_state_dict, net)
    return net


class Models(dict):
    """The models of this file; beside them, every classifier of torchvision by its name there."""

    def __contains__(self, name):
        return super().__contains__(name) or is_of_torchvision(name)

    def __missing__(self, name):
        if name not in self:
            raise KeyError(name)
        return functools.partial(torchvision_net, name)


@functools.cache
def is_of_torchvision(name):
    """Whether torchvision has a classifier of this name."""
    from torchvision import models

    return name in models.list_models(models)


# A model is a class of (image_shape [C, H, W], number of classes, options); its options are flags.
# Before each epoch, its method start_epoch(epoch, train_set, seed) is called, where it has one.
MODELS = {
    "dense": Dense,
    "cnn": CNN,
    "convnet": ConfigNet,  # the tutorial's ConvNet is its ConfigNet at the defaults
    "confignet": ConfigNet,
    "fastnet": FastNet,
    "photonet": PhotoNet,
    "patchnet": PatchNet,
}
MODELS = Models(MODELS)  # and every classifier of torchvision


def build_model(config: dict) -> nn.Module:
    """The model that `config`, as in best.pt, describes, with random weights. LookupError."""
    make = build(MODELS, config["model"], config)
    model = make(config["image_shape"], len(config["classes"])).to(
        memory_format=torch.channels_last
    )
    model.config = config
    return model


def new_model(args: Namespace, train_set: ImageSet) -> nn.Module:
    """The model of --model with the random weights of --seed, on --device.

    UsageError where it does not take such images.
    """
    # What best.pt holds beside the weights: the model and its preprocessing.
    channels, *size = train_set.pixels.shape[1:]
    mean = args.mean or [0.5] * channels
    std = args.std or [0.5] * channels
    if args.normalize == "dataset" and not args.mean:
        mean, std = train_set.mean_and_std()
    config: dict = {
        "image_shape": [channels, *size],
        "classes": train_set.classes,
        "mean": mean,
        "std": std,
        "temperature": 1.0,
        "resize": args.resize,
    }
    for name in ("model", "batch_size", *options_of(MODELS[args.model])):
        config[name] = getattr(args, name)

    # Does it take such images?
    try_model(args, config)
    if channels == 1 and args.hue and "hue" in args.typed:
        raise UsageError("--hue has no effect on grey images")
    if args.augment and args.shift >= min(size):
        raise UsageError(f"--shift {args.shift}: the images are too small")

    # Draw the weights, or take them from --weights. A run that goes on has its own.
    torch.manual_seed(random_seed(args.seed, "weights"))
    model = build_model(config).to(args.device)
    has_its_own = (args.directory / "last.pt").exists() or (args.resume and args.freeze)
    if args.weights and not has_its_own:
        take_weights(model, args)
    has_norm = any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    if args.optimizer == "muon" and (args.freeze or not has_norm):
        raise UsageError(
            "--optimizer muon is for convolutions with batch norm, such as those of --model cnn or "
            "fastnet, and not for --freeze"
        )
    return model


def try_model(args: Namespace, config: dict) -> None:
    """Try the model of `config` on its smallest images, without memory or arithmetic. UsageError
    where it does not take them."""
    channels, *smallest = config["image_shape"]
    if args.sizes:
        epochs = range(1, args.epochs + 1)
        smallest = [min(side_in_epoch(args, epoch, smallest[1]) for epoch in epochs)] * 2
    try:
        with torch.device("meta"):
            images = torch.zeros(min(2, args.batch_size), channels, *smallest)
            if not isinstance(build_model(config)(images), Tensor):
                raise ValueError("it has more than one output")
    except NotImplementedError:
        pass  # a RegNet cannot be built without arithmetic
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        shape = "x".join(map(str, smallest))
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--model {args.model} with these options does not take images of {shape} pixels, "
            f"{args.batch_size} in a batch ({reason})"
        ) from error


# ------------------------ Pretrained nets ------------------------
IMAGENET_MODEL = "efficientnet_b0"  # that of --weights imagenet: small, and good features

PRETRAINED_RATE = 0.1  # part of --lr at which pretrained weights learn, beside a new last layer
# Instead of the recipe's, for a net that the recipe is not for.
ANY_MODEL_DEFAULTS = {
    "optimizer": "adamw",
    "lr": 0.001,
    "schedule": "cosine",
    "sizes": None,
    "label_smoothing": 0.0,
    "tolerance": 0,
    "tta": None,
}
FREEZE_DEFAULTS = {"epochs": 50, "batch_size": 64}  # an epoch is a moment
FREEZE_DEFAULTS |= {name: 0 for name in AUGMENTATIONS if name != "flip"}


def preprocessing_of(source: str, model: str) -> dict:
    """The model that goes with --weights, its options, and how its images are resized and
    normalised, as far as the `source` tells. RunError, UsageError."""
    # A run of one's own.
    if Path(source).is_dir():
        config = records.load_checkpoint(Path(source) / "best.pt")
        channels, side, _ = config["image_shape"]
        names = {"model", "mean", "std", "resize", *options_of(MODELS[config["model"]])}
        known = {name: config[name] for name in names & config.keys()}
        return {"image_size": side, "grey": channels == 1, **known}

    # A net of torchvision has that of its weights there; nothing is known of a file for another.
    if is_of_torchvision(model):
        from torchvision import models

        images = models.get_model_weights(model).DEFAULT.transforms()
        side = images.crop_size[0]
        shorter = images.resize_size[0]
        return {
            "model": model,
            "image_size": side,
            "resize": f"crop:{side / shorter:.5g}:{images.interpolation.value}",
            "mean": list(images.mean),
            "std": list(images.std),
        }
    if source == "imagenet":
        raise UsageError(f"--weights imagenet is for a model of torchvision, not {model}")
    return {}


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of the last layer that has as many outputs as there are classes.
    UsageError where there is none."""
    classes = len(model.config["classes"])
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if classes in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    ]
    if not found:
        raise UsageError(f"{model.config['model']} has no last layer of {classes} outputs")
    return found[-1]


def images_behind(args: Namespace) -> set[str]:
    """The SHA-256 of the files that have trained the run --weights, as far as it is known."""
    if args.resume or args.weights in (None, "imagenet") or Path(args.weights).is_file():
        return set()
    directory, files = Path(args.weights), []
    with contextlib.suppress(UsageError, RunError):  # weights alone are enough to begin with
        listing = listing_of(directory, records.read_record(directory))
        files = read_csv(listing, directory) if listing else []
    return {file.sha256 for file in files if file.part == "train"}


def take_weights(model: nn.Module, args: Namespace) -> None:
    """Give `model` the weights of --weights. Its head stays new, unless they are of a run with the
    same classes. RunError."""
    # Read them.
    source = args.weights
    classes = None
    if source == "imagenet":
        weights = imagenet_weights(args)
    elif Path(source).is_dir():
        best = records.load_checkpoint(Path(source) / "best.pt")
        weights, classes = best["weights"], best["classes"]
    else:
        try:
            found = torch.load(source, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model_state_dict", "model", "weights"):
                if isinstance(found.get(key), dict):
                    found = found[key]
            tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
            wrappers = re.compile(r"(module\.|_orig_mod\.)*")  # of DataParallel and torch.compile
            weights = {wrappers.sub("", name, 1): value for name, value in tensors.items()}
        except Exception as error:  # torch.load raises whatever it stumbles over
            reason = type(error).__name__
            raise RunError(f"{shown(source)} is no file of weights ({reason})") from error

    # Take all but the head; torch names the tensors that do not fit.
    if classes != model.config["classes"]:
        name, head = head_of(model)
        new = {f"{name}.{key}": value for key, value in head.state_dict().items()}
        weights = {key: weights[key] for key in weights if not key.startswith(f"{name}.")} | new
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)
        raise RunError(
            f"--weights {shown(source)} does not fit --model {args.model}: {reason}"
        ) from error


def imagenet_weights(args):
    """The weights of torchvision for --model; it downloads them once. RunError."""
    from torchvision import models

    weights = models.get_model_weights(args.model).DEFAULT
    try:
        with downloading(args):
            return models.get_model(args.model, weights=weights).state_dict()
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"the ImageNet weights of {args.model} could not be downloaded "
            f"({getattr(error, 'reason', error)}); "
            f"put {weights.url} into {torch.hub.get_dir()}/checkpoints"
        ) from error


def freeze(args: Namespace, model: nn.Module, data: Data) -> tuple[nn.Module, nn.Module, Data]:
    """What --freeze trains. Returns the net to compute, the part of it that learns, and the images.

    Where the head is a dense layer, it computes on features: what comes before it in evaluation
    mode, for each image once, float [N, F]. With --flip, those of the mirrored training images are
    further examples.
    """
    name, head = head_of(model)
    model.requires_grad_(False)
    head.requires_grad_(True)
    model.config["batch_size"] = 1  # for what is evaluated, not more at a time than fits
    learner = head
    for part in reversed(name.split(".")):  # so its weights have the names that they have in model
        learner = nn.ModuleDict({part: learner})
    learner.config = model.config
    if not isinstance(head, nn.Linear):
        return model, learner, data
    with_mirrored = args.augment and args.flip > 0
    train_set = features(args, model, head, data.train, with_mirrored)
    val_set = features(args, model, head, data.val, with_mirrored=False)
    return head, learner, replace(data, train=train_set, val=val_set)


@torch.no_grad()
def features(args, model, head, image_set, with_mirrored):
    """What comes into `head` for each image: an ImageSet of floats [N, F].

    With `with_mirrored` it has 2 N of them: first the images as they are, then mirrored.
    """
    passes = [False, True] if with_mirrored else [False]  # whether all images are mirrored
    found = []
    hook = head.register_forward_pre_hook(lambda head, inputs: found.append(inputs[0].float()))
    loader = evaluation_loader(image_set, 1, model.config)
    model.eval()
    with tqdm(
        total=len(passes) * len(loader), desc="features", leave=False, disable=args.quiet or None
    ) as bar:
        for mirrored in passes:
            for images, _ in loader.batches():
                with make_autocast(args.device, args.precision)():
                    model(images.flip(3) if mirrored else images)
                bar.update()
    hook.remove()
    return ImageSet(torch.cat(found), image_set.labels.repeat(len(passes)), image_set.classes)


# ------------------------ Losses and optimisers ------------------------
def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each image, [B], with the labels smoothed."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


# A loss is a function of `logits` [B, K], `labels` [B] and options, to the loss of each image [B].
LOSSES = {"cross-entropy": cross_entropy}


def make_criterion(args: Namespace, train_set: ImageSet) -> Callable:
    """The loss of --loss for each image, and the weight that --class-weights gives it.

    A function of `logits` [B, K] and `labels` [B] to losses and weights, each [B]. The margin is
    the log of a class's share, added to its logits: A. K. Menon et al., "Long-tail learning via
    logit adjustment" (2021).
    """
    loss = build(LOSSES, args.loss, vars(args))
    weights = torch.ones(len(train_set.classes), device=args.device)
    margins = 0.0
    if args.class_weights == "balanced":
        weights = train_set.class_weights()
    if args.class_weights == "margin":  # the log of the share, and a constant without effect
        margins = -train_set.class_weights().log()
    return lambda logits, labels: (loss(logits + margins, labels), weights[labels])


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrices` [B, M, N] with their singular values made about 1, but for those far below the
    largest.

    Three steps of a Newton-Schulz iteration in `dtype`: K. Jordan et al., "Muon: an optimizer for
    hidden layers" (2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(3):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of orthogonal momentum for the filters of convolutions. (torch.optim.Muon takes
    matrices only.)

    A bank of filters [out, in, height, width] is a matrix [out, in * height * width] here. Its
    Nesterov momentum is made orthogonal before it is a step, and its norm is held at sqrt(out)
    instead of decaying, as in K. Jordan's airbench94_muon: what follows is taken to be batch norm,
    to which the scale does not matter. Steps are made orthogonal in `dtype`: bfloat16 does, as only
    their directions count.
    """

    def __init__(self, filters, lr, momentum, dtype):
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


# fused: torch computes the whole step of an optimiser in one kernel.
def adam(weights, lr, precision, weight_decay=0.0, kind=torch.optim.Adam):
    """torch's Adam, or another `kind` of it."""
    return [kind(weights, lr, weight_decay=weight_decay, fused=True)]


def sgd(weights, lr, precision, momentum=0.9, weight_decay=0.0):
    """torch's SGD with Nesterov momentum."""
    return [
        torch.optim.SGD(
            weights, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=True
        )
    ]


def muon(weights, lr, precision, momentum=0.6, aux_lr=0.015, weight_decay=0.0):
    """Muon for the filters of convolutions, AdamW for all other weights."""
    filters = [p for p in weights if p.ndim == 4]
    others = [p for p in weights if p.ndim != 4]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    adamw = torch.optim.AdamW(others, aux_lr, (0.8, 0.95), weight_decay=weight_decay, fused=True)
    return [Muon(filters, lr, momentum, dtype), adamw] if filters else [adamw]


# An optimiser is a function of the weights to learn, the learning rate, the precision and options,
# to a list of torch's optimisers.
OPTIMIZERS = {
    "adam": adam,
    "adamw": functools.partial(adam, kind=torch.optim.AdamW),
    "sgd": sgd,
    "muon": muon,
}
MUON_DEFAULTS = {"lr": 0.12, "schedule": "linear"}  # where the recipe is for another optimiser


def make_optimizers(args: Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Those of --optimizer, over what `model` learns: slowly, what is pretrained."""
    make = build(OPTIMIZERS, args.optimizer, vars(args))
    weights = [p for p in model.parameters() if p.requires_grad]
    new = {*(head_of(model)[1] if args.weights else model).parameters()}
    parts = {
        1: [p for p in weights if p in new],
        PRETRAINED_RATE: [p for p in weights if p not in new],
    }
    optimizers = []
    for rate, part in parts.items():
        if not part:
            continue
        for optimizer in make(part, args.lr, args.precision):
            optimizers.append(optimizer)
            for group in optimizer.param_groups:
                group["initial_lr"] = rate * group["lr"]  # torch's own name for it
    return optimizers


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


def onecycle(progress: float) -> float:
    """L. N. Smith and N. Topin, "Super-convergence" (2018), in the phases of torch's OneCycleLR."""
    if progress < 0.3:
        return 1 + (1 / 25 - 1) * cosine(progress / 0.3)
    return 1 / 25e4 + (1 - 1 / 25e4) * cosine((progress - 0.3) / 0.7)


# The learning rate as a multiple of --lr, from the part of the training that is behind. A function
# of that alone has no state to save, and an interrupted run goes on along the same course.
SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": cosine,
    "onecycle": onecycle,
}

# The tables whose entries have options.
TABLES: dict[str, dict] = {"model": MODELS, "loss": LOSSES, "optimizer": OPTIMIZERS}


# ------------------------ Train and evaluate for one epoch ------------------------
def check_finite(loss):
    """The value of a loss. FloatingPointError: the training has diverged."""
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss became {value}")
    return value


class AverageMeter:
    """Loss and accuracy of the images seen so far. The sums stay on the device; reading them waits
    for it."""

    def __init__(self, device: str | torch.device):
        self.loss_sum, self.weight_sum, self.correct = torch.zeros(3, device=device).unbind()
        self.images = 0

    @torch.no_grad()
    def update(self, losses: Tensor, weights: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take up a batch: `losses`, `weights` and `labels` [B], `logits` [B, K]."""
        self.loss_sum += (losses * weights).sum()
        self.weight_sum += weights.sum()
        self.correct += (logits.argmax(1) == labels).sum()
        self.images += len(labels)

    @property
    def loss(self) -> float:
        """The weighted mean per image. FloatingPointError."""
        return check_finite(self.loss_sum) / self.weight_sum.item()

    @property
    def accuracy(self) -> float:
        """Part of the images that are classified as labelled."""
        return self.correct.item() / self.images


def train(args, model, loader, epoch, criterion, optimizers, scaler, bar) -> AverageMeter:
    """Train `model` on every batch once; loss and accuracy are as seen in training.

    FloatingPointError where the loss is not finite.
    """
    model.train(not args.freeze)  # what is frozen computes as in evaluation
    meter = AverageMeter(args.device)
    autocast = make_autocast(args.device, args.precision)
    bar.set_description(f"epoch {epoch}/{args.epochs}", refresh=False)
    side = side_in_epoch(args, epoch, loader.image_set.pixels.shape[-1])
    for step, (images, labels) in enumerate(loader.batches(epoch, side)):
        # Set the learning rate, by the part of the whole training that is behind.
        progress = (epoch - 1 + step / len(loader)) / args.epochs
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * SCHEDULES[args.schedule](progress)

        # Forward pass: a logit for each class, and the weighted mean of the losses.
        with autocast():
            logits = model(images)
            losses, weights = criterion(logits, labels)
        loss = (losses * weights).sum() / weights.sum()
        if args.device == "cpu":  # a GPU would be waited for: there the epoch's mean is checked
            check_finite(loss)

        # Backward pass: the gradients. The scaler does something with fp16 only.
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss).backward()

        # Update the weights.
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

        # Take note of the batch. The loss is shown only when the bar has just been drawn anew, as
        # it has to be read from the device.
        meter.update(losses, weights, logits, labels)
        was_drawn = bar.update()
        if was_drawn:
            bar.set_postfix(loss=f"{meter.loss:.4f}", refresh=False)
    return meter


def side_in_epoch(args, epoch, side):
    """The side in pixels of the training images in an epoch. With three --sizes and 11 epochs, the
    first three epochs have the first size, and four epochs each of the others.

    An older run has pixels in its record.
    """
    sides = [round(size * side) if size <= 1 else size for size in args.sizes or [1]]
    changes_left = (args.epochs - epoch) * len(sides) // args.epochs
    return sides[-1 - changes_left]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    autocast: Callable,
    criterion: Callable,
    tta: str | None = None,
) -> tuple[AverageMeter, Tensor]:
    """Loss and accuracy over all batches, with dropout and batch norm at rest, and the logits
    [N, K], float32. FloatingPointError when the loss is read.

    A net that is trained with smoothed labels is to be validated with them too: their loss falls as
    it learns, while the plain one mostly says how far the net keeps from certainty, and may rise.
    """
    model.eval()
    meter = AverageMeter(loader.image_set.pixels.device)
    outputs = []
    for images, labels in loader.batches():
        with autocast():
            logits = average_views(model, images, tta)
        losses, weights = criterion(logits, labels)
        meter.update(losses, weights, logits, labels)
        outputs.append(logits)
    return meter, torch.cat(outputs)


def plain_criterion(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each image [B], for the test, and weights of 1."""
    losses = cross_entropy(logits, labels)
    return losses, torch.ones_like(losses)


TTA = ("mirror", "shift", "mirror+shift")
UNSURE = 0.75


def average_views(model: nn.Module, images: Tensor, tta: str | None) -> Tensor:
    """Logits [B, K], float32, of `images` [B, C, H, W].

    With `tta`, the images of which the model is not sure are averaged over `views`: those with no
    class above a probability of UNSURE. Of the others hardly one would change its class.
    """
    logits = model(images).float()
    unsure = logits.softmax(1).amax(1) <= UNSURE
    if tta and unsure.any():
        (own_weight, _), *others = views(images[unsure], tta)
        averaged = sum(weight * model(view).float() for weight, view in others)
        logits[unsure] = own_weight * logits[unsure] + averaged
    return logits


def views(images: Tensor, tta: str) -> list[tuple[float, Tensor]]:
    """Views of `images` [N, C, H, W] with their weights, the images themselves first.

    They are moved by a pixel down and right, and up and left, and mirrored. K. Jordan, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU" (2024).
    """
    one = torch.ones(len(images), dtype=torch.long, device=images.device)
    found = [(1.0, images)]
    if "shift" in tta:
        found = [
            (0.5, images),
            (0.25, shift_by(images, one, one, 1)),
            (0.25, shift_by(images, -one, -one, 1)),
        ]
    if "mirror" in tta:
        found = [(weight / 2, view) for weight, image in found for view in (image, image.flip(3))]
    return found


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number by which to divide `logits` [N, K], so that their softmax gives the `labels` [N]
    the highest likelihood: C. Guo et al., "On calibration of modern neural networks" (2017).

    It is 1 where the images cannot tell: fewer than a hundred, or none that is wrong.
    """
    logits, labels = logits.cpu().double(), labels.cpu()
    if len(labels) < 100 or (logits.argmax(1) == labels).all():
        return 1.0
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(loss)
    # A net that has learnt nothing would have an endless one.
    return log_temperature.clamp(-3, 3).exp().item()


# ------------------------ Early stopping ------------------------
class EarlyStopping:
    """Keeps the weights of the epoch with the lowest validation loss, and says when to stop: after
    `tolerance` epochs in a row without a lower one (0: never). Or keeps those of the last epoch."""

    def __init__(self, tolerance: int, keep: str = "best"):
        self.tolerance = tolerance
        self.keep = keep
        self.best_loss = math.inf
        self.epochs_without_improvement = 0
        self.best_weights: dict | None = None

    def step(self, val_loss: float, model: nn.Module) -> bool:
        """Take note of an epoch; return whether its weights are kept."""
        is_kept = val_loss < self.best_loss or self.keep == "last"
        if is_kept:
            self.best_loss = val_loss
            self.epochs_without_improvement = 0
            weights = model.state_dict().items()
            self.best_weights = {name: tensor.clone() for name, tensor in weights}
        else:
            self.epochs_without_improvement += 1
        return is_kept

    @property
    def should_stop(self) -> bool:
        """Whether the tolerance is used up."""
        return 0 < self.tolerance <= self.epochs_without_improvement

    def state_dict(self):
        """What changes from epoch to epoch."""
        return {
            "best_loss": self.best_loss,
            "epochs_without_improvement": self.epochs_without_improvement,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state):
        """Go on from `state_dict()`."""
        vars(self).update(state)


# ------------------------ Fit ------------------------
def fit(
    args: Namespace,
    model: nn.Module,
    data: Data,
    run: records.Run,
    on_epoch: Callable[[dict], bool] | None = None,
) -> bool:
    """Train `model` until --epochs, --stop-after or early stopping, and leave it with the weights
    that are kept.

    `on_epoch(row)` is called with each row of log.jsonl and the run's `directory`; True ends the
    run as `pruned`. Returns whether the training has come to its own end, so that the test may
    follow. FloatingPointError.
    """
    # What a step needs: the net, batches, the loss, the optimisers. `net` computes, `learner` has
    # the weights that are saved; with --freeze, these are parts of `model`.
    torch.set_num_threads(args.threads)
    keep_freed_memory(args.device)
    net = learner = model
    if args.freeze:
        net, learner, data = freeze(args, model, data)
    amounts = {name: getattr(args, name) for name in AUGMENTATIONS} if args.augment else None
    loader = Loader(
        data.train, args.batch_size, model.config, args.seed, amounts, args.alternate_flip
    )
    val_loader = evaluation_loader(data.val, args.batch_size, model.config)
    autocast = make_autocast(args.device, args.precision)
    criterion = make_criterion(args, data.train)
    optimizers = make_optimizers(args, model)

    # The whole state of a training, from the last epoch that was saved. The random numbers of an
    # epoch follow from --seed and its number, the learning rate from the step.
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    early_stopping = EarlyStopping(args.tolerance, args.keep)
    state = {"model": learner, "scaler": scaler, "early_stopping": early_stopping}
    state |= {f"optimizer_{index}": optimizer for index, optimizer in enumerate(optimizers)}
    last = records.last_epoch(args)
    done = run.restore(state)
    if done:
        say(f"goes on after epoch {done}", args.quiet)
    if done == run.record.get("prolonged_after"):  # early stopping had ended it there
        early_stopping.epochs_without_improvement = 0
    compiled = torch.compile(net, dynamic=False) if args.compile else net
    torch.compiler.config.recompile_limit = 64  # each size of images has code of its own

    # Epoch after epoch, with a bar of the whole run and the time that is left of it.
    with tqdm(
        total=last * len(loader),
        initial=done * len(loader),
        smoothing=0,
        leave=False,
        disable=args.quiet or None,
    ) as bar:
        for epoch in range(done + 1, last + 1):
            if early_stopping.should_stop:
                break
            epoch_began = time.perf_counter()

            # What an epoch begins with: random numbers of its own, and what the model wants done,
            # unless that came with its weights.
            torch.manual_seed(random_seed(args.seed, "dropout", epoch))
            if hasattr(model, "start_epoch") and not args.weights:
                model.start_epoch(epoch, data.train, args.seed)

            # Train on every batch once, then validate.
            training = train(args, compiled, loader, epoch, criterion, optimizers, scaler, bar)
            train_loss, train_seconds = training.loss, time.perf_counter() - epoch_began
            validation, _ = evaluate(compiled, val_loader, autocast, criterion)
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_acc": training.accuracy,
                "val_loss": validation.loss,
                "val_acc": validation.accuracy,
                "lr": optimizers[0].param_groups[0]["lr"],
                "seconds": time.perf_counter() - epoch_began,
                "images_per_second": len(data.train) / train_seconds,
            }

            # Early stopping looks at the validation loss, and keeps the weights that --keep names.
            is_kept = early_stopping.step(row["val_loss"], learner)
            best = "  best" if is_kept and args.keep == "best" else ""

            # Save, log, and say it.
            run.history.append(row)
            run.save(state)
            records.log_wandb(run, row)
            say(
                f"epoch {epoch:2}/{args.epochs}  "
                f"train loss {train_loss:.4f} accuracy {row['train_acc']:.2%}  "
                f"validation loss {row['val_loss']:.4f} accuracy {row['val_acc']:.2%}  "
                f"{row['seconds']:.1f} s{best}",
                args.quiet,
            )
            if on_epoch and on_epoch(row | {"directory": str(run.directory)}) is True:
                run.status = "pruned"
                return False

    # Take the weights that are kept.
    learner.load_state_dict(early_stopping.best_weights)
    run.status = "stopped_early" if early_stopping.should_stop else "finished"
    if run.status == "finished" and len(run.history) < args.epochs:  # by --stop-after
        run.status = "interrupted"
        return False

    # Fit the temperature that makes the probabilities true on the validation images.
    _, logits = evaluate(compiled, val_loader, autocast, plain_criterion)
    model.config["temperature"] = fit_temperature(logits, data.val.labels)
    run.write_results(state)
    return True


def final_test(args: Namespace, model: nn.Module, test_set: ImageSet, run: records.Run) -> None:
    """Test the model, with the weights that are kept, and put the result into run.json.

    With --tta, its accuracy is that of averaged views; that of the plain images stands beside it.
    """
    if run.record["test"]:
        return  # nothing has been trained since
    loader = evaluation_loader(test_set, model.config["batch_size"], model.config)
    autocast = make_autocast(args.device, args.precision)
    plain, _ = evaluate(model, loader, autocast, plain_criterion)
    result = {"loss": plain.loss, "acc": plain.accuracy}
    if args.tta:
        averaged, _ = evaluate(model, loader, autocast, plain_criterion, args.tta)
        result = {"loss": averaged.loss, "acc": averaged.accuracy}
        result |= {"plain_loss": plain.loss, "plain_acc": plain.accuracy}
    run.record["test"] = result
