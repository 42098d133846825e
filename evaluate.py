"""Show what a model has learnt: tables and pictures, a comparison of runs, predictions, exported models.

    python evaluate.py runs/<run>                            # tables and pictures of the test images, report.html
    python evaluate.py runs/<run> --split val                # of the validation images, into runs/<run>/val
    python evaluate.py runs/a runs/b                         # compare runs, or runs/*: in pairs those evaluated before
    python evaluate.py runs/<run> --predict photo.png album  # class and probability of your own images (--top 3)
    python evaluate.py runs/<run> --export onnx              # a file that takes uint8 images

A run directory is all it needs: best.pt holds the model and its preprocessing. It computes as the run did, in the same
precision, batches and number of threads, so on the same machine its figures are those of run.json.
"""

import argparse
import base64
import contextlib
import csv
import html
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import records
from common import ImageSet
from records import RunError, UsageError

import torch
from torch import nn

# ------------------------------------------------ Options ------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this script. Exits with status 2 on a bad one."""
    parser = common.ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory; more than one: compare them",
    )
    parser.add_argument("--quiet", action="store_true", help="print only errors")

    flag = parser.add_argument_group("what is evaluated").add_argument
    text = "which images; of runs compared, which predictions"
    flag("--split", choices=("test", "val", "train"), default="test", help=text)
    flag(
        "--data-dir",
        type=common.absolute_path,
        metavar="DIR",
        help="where the data are now (as in training)",
    )
    flag(
        "--tta",
        choices=tuple(common.TTA),
        help="test-time augmentation, beside the plain figures (the run's own)",
    )
    flag(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: a GPU where there is one",
    )

    group = parser.add_argument_group("what comes out")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for the files (the run; of a comparison its parent)",
    )
    flag = group.add_mutually_exclusive_group().add_argument
    flag(
        "--csv",
        action="store_true",
        help="print CSV: the classes, the runs compared, or the predictions",
    )
    flag(
        "--json",
        action="store_true",
        help="print JSON: metrics.json, the runs compared, or a line a prediction",
    )

    group = parser.add_argument_group("filters.png and activations.png")
    group.add_argument("--layer", metavar="NAME", help="which convolution (the first)")
    group.add_argument(
        "--image",
        type=common.number(int, 0),
        default=0,
        metavar="K",
        help="image of the feature maps",
    )
    flag = group.add_mutually_exclusive_group().add_argument
    flag(
        "--channel",
        type=common.number(int, 0),
        metavar="K",
        help="input channel of the filters (0; RGB in colour)",
    )
    flag("--all-kernels", action="store_true", help="the kernels of every input channel")

    flag = (
        parser.add_argument_group("instead of evaluating")
        .add_mutually_exclusive_group()
        .add_argument
    )
    flag(
        "--predict",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="classify image files and folders of them",
    )
    flag(
        "--export",
        choices=tuple(EXPORTS),
        help="write the model, preprocessing included, as model.onnx or model.pt2",
    )

    group = parser.add_argument_group("predictions")
    group.add_argument(
        "--top",
        type=common.number(int, 1),
        metavar="K",
        help="a line for each of the K likeliest (1)",
    )

    args = parser.parse_args(argv)
    if args.top and not args.predict:
        parser.error("--top goes with --predict")
    if len(args.runs) > 1 and (args.predict or args.export):
        parser.error(f"--predict and --export take one run, not {len(args.runs)}")
    return args


def say(line: str, quiet: bool = False) -> None:
    """Print a line. A reader that has gone away (`| head -1`) is no error; a full disk is one."""
    try:
        if not quiet:
            print(line, flush=True)
    except BrokenPipeError:
        # Python flushes its output once more at the end, and then needs a file that is open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str, quiet: bool) -> None:
    """A remark for a person, on stderr: it does not get into a table that a program reads."""
    if not quiet:
        print(f"evaluate.py: {text}", file=sys.stderr)


# ------------------------------------------------ A trained model ------------------------------------------------


@dataclass
class Trained:
    """A run with the model of its best epoch: `record` is run.json, `config` best.pt but for the weights."""

    directory: Path
    record: dict
    config: dict
    model: nn.Module
    device: str
    autocast: Callable

    def test(
        self, image_set: ImageSet, tta: str | None = None
    ) -> tuple[common.AverageMeter, torch.Tensor]:
        """Loss and accuracy of the images, and the logits [N, K], float32, on the CPU."""
        loader = common.evaluation_loader(
            image_set.to(self.device), self.config["batch_size"], self.config
        )
        meter, logits = common.evaluate(self.model, loader, self.autocast, common.plain_loss, tta)
        return meter, logits.cpu()


def load_trained(directory: Path, device: str, quiet: bool = True) -> Trained:
    """The best model of a run. RunError where there is none, or the run is still going; UsageError for the device."""
    record = records.read_record(directory)
    if status_of(directory, record) == "running":
        raise RunError(
            f"{records.shown(directory)} is still being trained; evaluate it when it has ended"
        )
    device, _ = common.choose_device(device, "fp32")
    precision = record["precision"]
    if (device, precision) == ("cpu", "fp16"):
        precision = "fp32"
        note(
            "the run's precision, fp16, needs a GPU: computed in fp32, the figures may differ from run.json's",
            quiet,
        )
    torch.set_num_threads(record["threads"])  # another number of threads rounds otherwise
    config = {
        "temperature": 1.0,
        **records.load_checkpoint(directory / "best.pt"),
    }  # older runs have none
    try:
        weights = config.pop("weights")
        model = common.build_model(config)
        model.load_state_dict(weights)
    except (LookupError, RuntimeError) as error:
        path = records.shown(directory / "best.pt")
        raise RunError(
            f"{path} does not fit the models of common.py ({type(error).__name__}: {error})"
        ) from error
    return Trained(
        directory,
        record,
        config,
        model.to(device).eval(),
        device,
        common.autocast_to(device, precision),
    )


def status_of(directory: Path, record: dict) -> str:
    """The status of a run; `killed` for one that was `running` when its process died, which holds no lock now."""
    if record["status"] == "running" and not records.is_locked(directory / ".lock"):
        return "killed"
    return record["status"]


def load_images(trained: Trained, split: str, data_dir: Path | None, quiet: bool) -> ImageSet:
    """A split of the images that the run was trained on, on the CPU. RunError where they are missing, or are others."""
    record, where = trained.record, records.shown(trained.directory)
    args = argparse.Namespace(**common.recorded_arguments(record))
    args.script, args.typed, args.test = record["script"], set(), True
    args.directory = args.resume = trained.directory
    args.listing = common.listing_of(trained.directory, record)
    args.device, args.data_dir = trained.device, data_dir or Path(args.data_dir)
    args.quiet = quiet
    if split == "val" and not args.val_size:
        raise RunError(f"{where} was trained with --val-size 0, without a validation split")

    # Where the images are now.
    place = synthetic = None
    if args.dataset in common.TORCHVISION:
        from torchvision import datasets

        dataset_class = getattr(datasets, common.TORCHVISION[args.dataset])
        base_folder = f"{dataset_class.__name__}/raw"
        place = args.data_dir / getattr(dataset_class, "base_folder", base_folder)
    elif args.dataset != "synthetic":
        args.dataset = str(data_dir or args.dataset)
        place = common.folder_of(args.dataset)
    elif importlib.util.find_spec(args.script):
        synthetic = importlib.import_module(args.script).synthetic
    else:
        text = f"are drawn by {args.script}.py, which does not lie beside evaluate.py"
        raise RunError(f"the images of {where} {text}")
    if place and not place.is_dir():
        raise RunError(f"the images of {where} are not in {place}; say where with --data-dir DIR")

    # Those of the split, which must be the ones that the run had.
    wanted = ("test",) if split == "test" else ("train", "val")
    data = common.load_data(args, synthetic, wanted)
    keys = {"train": "checksum", "val": "val_checksum", "test": "test_checksum"}
    for part, key in keys.items():
        images, expected = getattr(data, part), record["data"].get(key)
        if images and (
            expected not in (None, images.checksum) or images.classes != trained.config["classes"]
        ):
            use = "tested" if part == "test" else "trained"
            text = f"is not what {where} was {use} on: the checksums differ"
            raise RunError(f"{place or args.dataset} {text}")
    if not getattr(data, split):
        raise RunError(f"{where} has no {split} images")
    return getattr(data, split).to("cpu")


# ------------------------------------------------ Metrics ------------------------------------------------

CALIBRATION_BINS = 15


def wilson_interval(correct: int, count: int) -> list[float]:
    """The 95% interval [low, high] of a share, E. B. Wilson's: sound near 0 and 1, and for few images."""
    from scipy.stats import binomtest

    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def mcnemar_mid_p(one: int, other: int) -> float:
    """Two-sided mid-p of McNemar's test that two models are equally good, where `one` and `other` images are right with
    the one or the other only. M. W. Fagerland, S. Lydersen and P. Laake, "The McNemar test for binary matched-pairs
    data: mid-p and asymptotic are better than exact conditional" (2013)."""
    from scipy.stats import binom

    fewer, images = min(one, other), one + other
    return float(2 * binom.cdf(fewer, images, 0.5) - binom.pmf(fewer, images, 0.5))


def difference_interval(one: int, other: int, images: int) -> list[float]:
    """The 95% interval [low, high] of the difference of two accuracies on the same `images`, of which `one` and `other`
    are right with the one or the other model only. D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for
    a difference of binomial proportions based on paired data" (2012)."""
    p, q = (one + 1) / (images + 2), (other + 1) / (images + 2)
    half = statistics.NormalDist().inv_cdf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (images + 2))
    return [max(-1.0, p - q - half), min(1.0, p - q + half)]


def mean_interval(values: list[float]) -> tuple[float, float, list[float]]:
    """Mean and standard deviation of two values or more, and Student's 95% interval [low, high] of the mean."""
    from scipy.stats import t

    mean, deviation = statistics.mean(values), statistics.stdev(values)
    low, high = t.interval(0.95, len(values) - 1, mean, deviation / math.sqrt(len(values)))
    return mean, deviation, [float(low), float(high)]


def class_metrics(confusion: torch.Tensor, names: list[str]) -> list[dict]:
    """Per class, from `confusion` int64 [K, K], rows actual, columns predicted. What would divide by zero is 0."""
    correct, support, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    recall, precision, f1 = (
        correct / support,
        correct / predicted,
        2 * correct / (support + predicted),
    )
    keys = "name", "support", "predicted", "accuracy", "precision", "recall", "f1"
    shares = (share.nan_to_num(0).tolist() for share in (recall, precision, recall, f1))
    return [
        dict(zip(keys, row, strict=True))
        for row in zip(names, support.tolist(), predicted.tolist(), *shares, strict=True)
    ]


def calibration(confidence: torch.Tensor, correct: torch.Tensor) -> tuple[list[dict], float]:
    """Images, mean confidence and accuracy in each of 15 bins of equal width (None where a bin is empty), and the
    expected calibration error: C. Guo et al., "On calibration of modern neural networks" (2017)."""
    which = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    images = torch.bincount(which, minlength=CALIBRATION_BINS)
    means = [
        torch.bincount(which, each.double(), CALIBRATION_BINS) / images
        for each in (confidence, correct)
    ]
    error = float((images * (means[0] - means[1]).abs()).nansum() / len(confidence))
    rows = []
    for index, (count, mean, share) in enumerate(
        zip(images.tolist(), *(m.tolist() for m in means), strict=True)
    ):
        low, high = index / CALIBRATION_BINS, (index + 1) / CALIBRATION_BINS
        seen = (
            {"confidence": mean, "accuracy": share}
            if count
            else {"confidence": None, "accuracy": None}
        )
        rows.append({"low": low, "high": high, "images": count, **seen})
    return rows, error


def measure(
    logits: torch.Tensor, temperature: float, labels: torch.Tensor, names: list[str]
) -> dict:
    """All metrics but the loss, as in metrics.json, of `logits` [N, K] for the `labels` [N] of the classes `names`.

    The calibration is that of the probabilities at the `temperature`; `..._before` is without it."""
    confidence, predicted = (logits.double() / temperature).softmax(1).max(1)
    correct, count, classes = predicted == labels, len(labels), len(names)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(
        classes, classes
    )
    rows = class_metrics(confusion, names)
    bins, calibration_error = calibration(confidence, correct)
    bins_before, error_before = calibration(logits.double().softmax(1).amax(1), correct)
    metrics = {
        "accuracy": int(correct.sum()) / count,
        "accuracy_interval": wilson_interval(int(correct.sum()), count),
        "macro_f1": statistics.fmean(row["f1"] for row in rows if row["support"]),
        "weighted_f1": sum(row["f1"] * row["support"] for row in rows) / count,
        "temperature": temperature,
        "expected_calibration_error": calibration_error,
        "expected_calibration_error_before": error_before,
    }
    if classes > 10:
        metrics["top5_accuracy"] = int((logits.topk(5).indices == labels[:, None]).sum()) / count
    bins = {"calibration": bins, "calibration_before": bins_before}
    return {**metrics, "classes": rows, **bins, "confusion_matrix": confusion.tolist()}


# ------------------------------------------------ Pictures ------------------------------------------------

# Two of the colours of M. Okabe and K. Ito, told apart by the colour-blind; line styles and marks say the same in grey.
BLUE, ORANGE = "#0072B2", "#D55E00"
ANNOTATED_CLASSES = 20


def new_figure(width: float, height: float, title: str, layout: str | None = "constrained"):
    """A figure of so many inches, made without pyplot, which needs a global state and wants a display."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x$
    figure = Figure((width, height), dpi=100, layout=layout)
    figure.suptitle(title)
    return figure


def render(figure) -> bytes:
    """A figure as the bytes of a PNG file; a character that the font lacks is a box in it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def colormap(name: str, missing: str = "lightgrey"):
    """A colour map with `missing` for NaN: what lies between tiles, or a class that never occurs."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=missing)


def percent_axis(axis) -> None:
    """Label an axis of shares with percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=None))


def shorten(name: str, length: int = 16) -> str:
    """A name for a picture: cut to `length`, and without bytes that are no characters, at which matplotlib fails."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= length else f"{name[: length - 1]}…"


def curves_axes(figure):
    """Two axes, of loss and of accuracy, over epochs."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(1, 2)
    for axis, label in zip(axes, ("loss per image", "accuracy"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    percent_axis(axes[1].yaxis)
    return axes


def draw_curves(trained: Trained, rows: list[dict]):
    """Loss and accuracy of training and validation, epoch by epoch."""
    record, best = trained.record, trained.config
    about = record["args"]["model"], shorten(Path(record["data"]["name"]).name, 30)
    figure = new_figure(11, 4.2, f"{shorten(record['name'], 60)}: {about[0]} on {about[1]}")
    epochs, marker = [row["epoch"] for row in rows], "." if len(rows) < 40 else None
    for axis, name in zip(curves_axes(figure), ("loss", "acc"), strict=True):
        training, validation = (
            [row[f"{part}_{name}"] for row in rows] for part in ("train", "val")
        )
        axis.plot(epochs, training, "--", color=ORANGE, label="training", marker=marker)
        axis.plot(
            epochs, validation, "-", color=BLUE, label=record["data"]["selection"], marker=marker
        )
        # best.pt's figures, not the record's: they are of these weights, also where a run was killed between the two.
        axis.plot(
            best["epoch"],
            best[f"val_{name}"],
            "*",
            color="black",
            markersize=13,
            label=f"best: {best['epoch']}",
        )
        if record["status"] == "stopped_early":
            axis.axvline(
                epochs[-1], color="black", linestyle=":", label=f"early stop: {epochs[-1]}"
            )
        axis.legend()
    return figure


def draw_per_class(metrics: dict, title: str):
    """Accuracy of each class, highest first, with its 95% interval."""
    rows = sorted(
        (row for row in metrics["classes"] if row["support"]), key=lambda row: row["accuracy"]
    )
    figure = new_figure(8, 1.6 + len(rows) * (0.32 if len(rows) <= 30 else 0.16), title)
    axis = figure.subplots()
    shares = [row["accuracy"] for row in rows]
    intervals = [
        wilson_interval(round(row["accuracy"] * row["support"]), row["support"]) for row in rows
    ]
    errors = (torch.tensor(intervals).T - torch.tensor(shares)).abs().numpy()
    axis.barh(
        range(len(rows)), shares, xerr=errors, color=BLUE, error_kw={"elinewidth": 1, "capsize": 2}
    )
    axis.axvline(
        metrics["accuracy"],
        color="black",
        linestyle="--",
        label=f"all images: {metrics['accuracy']:.2%}",
    )
    labels = [f"{shorten(row['name'], 24)}  {row['accuracy']:.1%}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=10 if len(rows) <= 30 else 8)
    axis.set(
        xlabel="accuracy within the class (recall), with 95% interval",
        xlim=(0, 1),
        ylim=(-0.6, len(rows) - 0.4),
    )
    percent_axis(axis.xaxis)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def draw_confusion(metrics: dict, title: str):
    """Three heatmaps: counts, recall (each row sums to 100%) and precision (each column sums to 100%)."""
    from matplotlib.colors import PowerNorm

    counts = torch.tensor(metrics["confusion_matrix"])
    names = [shorten(row["name"], 24) for row in metrics["classes"]]
    annotated = len(names) <= ANNOTATED_CLASSES
    side = min(
        max(len(names) * (0.46 if annotated else 0.13), 2.6), 20
    )  # inches: at least as the headings need
    below = max(2.2, 1.4 + max(map(len, names)) * (0.08 if annotated else 0.055))
    figure = new_figure(3 * (side + 2.4), side + below, title)
    panels = (
        ("counts", counts, "images"),
        (
            "recall: percent of the actual class",
            100 * counts / counts.sum(1, keepdim=True),
            "% of the row",
        ),
        (
            "precision: percent of the predicted class",
            100 * counts / counts.sum(0, keepdim=True),
            "% of the column",
        ),
    )
    for axis, (heading, values, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        # The square root shows the errors beside a diagonal that is many times larger.
        top = max(1, int(counts.max())) if unit == "images" else 100
        image = axis.imshow(values.numpy(), cmap=colormap("Blues"), norm=PowerNorm(0.5, 0, top))
        figure.colorbar(image, ax=axis, label=unit, fraction=0.046)
        # Of more than 150 classes the names would run into one another.
        ticks, size = range(0, len(names), math.ceil(len(names) / 150)), 9 if annotated else 6
        axis.set_xticks(ticks, [names[index] for index in ticks], rotation=90, fontsize=size)
        axis.set_yticks(ticks, [names[index] for index in ticks], fontsize=size)
        axis.set(title=heading, xlabel="predicted class", ylabel="actual class")
        for row, column in (values == values).nonzero().tolist() if annotated else ():
            value = float(values[row, column])
            text = f"{value:.0f}" if unit == "images" or not value else f"{value:.1f}"
            colour = "white" if value / top > 0.35 else "black" if value else "silver"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return figure


def draw_image(axis, pixels: torch.Tensor, **options) -> None:
    """uint8 [1 or 3, H, W] on an axis, as it is."""
    scale = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"}
    axis.imshow(pixels.permute(1, 2, 0).squeeze(2).numpy(), **scale, **options)


def caption(image_set: ImageSet, index: int, predicted: int, confidence: float) -> str:
    """Two lines about an image: its class, and what was predicted how surely."""
    actual, answer = (
        shorten(image_set.classes[which], 12) for which in (image_set.labels[index], predicted)
    )
    right = predicted == image_set.labels[index]
    return (
        f"{actual}\n({confidence:.0%})"
        if right
        else f"{actual}, taken for\n{answer} ({confidence:.0%})"
    )


def draw_images(image_set: ImageSet, captions: dict[int, str], predicted: torch.Tensor, title: str):
    """The images at the indices of `captions` as they were before normalisation, framed where the model is wrong."""
    from matplotlib.patches import Rectangle

    columns, cell_height = 8, 1.3  # of a cell of width 1
    rows = max(1, math.ceil(len(captions) / columns))
    figure = new_figure(11.6, rows * cell_height * 1.45 + 0.7, title)
    axis = figure.subplots()  # one for all: forty take seconds
    pixels = image_set.select(torch.tensor(list(captions), dtype=torch.long)).images
    for place, (index, text) in enumerate(captions.items()):
        left, top = place % columns + 0.05, place // columns * cell_height + 0.35
        wrong = predicted[index] != image_set.labels[index]
        if wrong:
            axis.add_patch(Rectangle((left, top), 0.9, 0.9, fill=False, color=ORANGE, linewidth=3))
        draw_image(axis, pixels[place], extent=(left, left + 0.9, top + 0.9, top))
        look = {
            "ha": "center",
            "va": "bottom",
            "fontsize": 8,
            "color": ORANGE if wrong else "black",
        }
        axis.text(left + 0.45, top - 0.04, text, **look)
    if not captions:
        axis.text(columns / 2, cell_height / 2, "none", ha="center")
    axis.set(xlim=(0, columns), ylim=(rows * cell_height, 0))
    axis.set_axis_off()
    return figure


def draw_calibration(metrics: dict, title: str):
    """Accuracy against confidence, and how often each confidence occurs."""
    figure = new_figure(6, 6.5, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = [one for one in metrics["calibration"] if one["images"]]
    lows, bars = (
        [one["low"] for one in bins],
        {"width": 1 / CALIBRATION_BINS, "align": "edge", "edgecolor": "white"},
    )
    top.bar(lows, [one["accuracy"] for one in bins], color=BLUE, label="accuracy", **bars)
    top.plot(
        [one["confidence"] for one in bins],
        [one["accuracy"] for one in bins],
        "o",
        color="black",
        markersize=4,
    )
    if metrics["temperature"] != 1:
        before = [one for one in metrics["calibration_before"] if one["images"]]
        text, look = (
            "before the temperature",
            {"color": "white", "markeredgecolor": "black", "markersize": 6},
        )
        top.plot(
            [one["confidence"] for one in before],
            [one["accuracy"] for one in before],
            "D",
            label=text,
            **look,
        )
    top.plot([0, 1], [0, 1], "--", color=ORANGE, label="perfectly calibrated")
    about = "expected calibration error {expected_calibration_error:.2%}"
    about += " (before: {expected_calibration_error_before:.2%})" * (metrics["temperature"] != 1)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=about.format(**metrics))
    top.legend()
    bottom.bar(lows, [one["images"] for one in bins], color=BLUE, **bars)
    bottom.set(
        xlabel="confidence: probability of the predicted class",
        ylabel="images",
        yscale="log",
        ylim=(0.5, None),
    )
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    for axis in (top.xaxis, top.yaxis):
        percent_axis(axis)
    return figure


def draw_tiles(figure, axis, tiles: torch.Tensor, columns: int, label: str, **scale) -> None:
    """`tiles` [N, 1 or 3, H, W] in rows of `columns`: in colour, or with a scale beside them."""
    from torchvision.utils import make_grid

    sheet = make_grid(tiles, columns, padding=1, pad_value=1 if tiles.shape[1] == 3 else math.nan)
    sheet = sheet.permute(1, 2, 0).numpy()
    if tiles.shape[1] == 3:
        axis.imshow(sheet, interpolation="nearest")
    else:
        image = axis.imshow(sheet[..., 0], interpolation="nearest", **scale)
        figure.colorbar(image, ax=axis, label=label, fraction=0.04)
    axis.set_axis_off()


def draw_filters(name: str, convolution: nn.Conv2d, channel: int | None, all_kernels: bool):
    """The kernels of a convolution: in RGB, of one input channel, or (`all_kernels`) of every one, a row a filter."""
    weight = convolution.weight.detach().float().cpu()
    filters, channels, height, width = weight.shape
    extreme = float(weight.abs().max()) or 1.0
    if all_kernels:
        tiles, columns, what = (
            weight.reshape(-1, 1, height, width),
            channels,
            "a row a filter, a column a channel",
        )
    elif channel is None and channels == 3:
        tiles, columns, what = (
            weight / (2 * extreme) + 0.5,
            8,
            f"as colours: grey is 0, full brightness {extreme:.2g}",
        )
    else:
        tiles, columns, what = weight[:, [channel or 0]], 8, f"input channel {channel or 0}"
    # Legible at the size of a screen, and for thousands of kernels at all.
    inches = (
        0.55
        if not all_kernels
        else max(0.04 * max(height, width), min(0.55, 20 / max(filters, channels)))
    )
    rows = math.ceil(len(tiles) / columns)
    title = f"layer {name}: {filters} filters of {channels}x{height}x{width}\n{what}"
    figure = new_figure(max(6.5, columns * inches + 1.5), rows * inches * height / width + 1, title)
    scale = {"cmap": colormap("gray", "white"), "vmin": -extreme, "vmax": extreme}
    draw_tiles(figure, figure.subplots(), tiles, columns, "weight", **scale)
    return figure


def draw_activations(
    trained: Trained, name: str, convolution: nn.Conv2d, image_set: ImageSet, index: int
):
    """The feature maps of a convolution for one image, before what follows it."""
    maps, one = [], image_set.select(torch.tensor([index]))
    # A ReLU in place would otherwise change what was caught.
    with convolution.register_forward_hook(
        lambda module, inputs, output: maps.append(output.clone())
    ):
        _, logits = trained.test(one)
    tiles = maps[0][0][:, None].float().cpu()
    actual, answer = (shorten(one.classes[which], 24) for which in (one.labels[0], logits.argmax()))
    title = f"layer {name}, {len(tiles)} feature maps of image {index}: {actual}, classified as {answer}"
    figure = new_figure(11, max(3.5, math.ceil(len(tiles) / 8) * 0.95 + 1), title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 4))
    draw_image(left, one.images[0])
    left.set(title="the image", xticks=[], yticks=[])
    draw_tiles(
        figure, right, tiles, 8, "output of the convolution", cmap=colormap("cividis", "white")
    )
    return figure


def draw_comparison(groups: list[list[dict]]):
    """Validation loss and accuracy of the runs of each dataset on a pair of axes; a legend for the ten best."""
    figure = new_figure(13, 4.8 * len(groups), "validation, run by run")
    colours = [BLUE, ORANGE, "#009E73", "#CC79A7", "black"]
    for part, rows in zip(figure.subfigures(len(groups), squeeze=False).flat, groups, strict=True):
        part.suptitle(shorten(Path(rows[0]["dataset"]).name, 60))
        axes = curves_axes(part)
        for place, row in enumerate(rows):
            history = records.read_log(Path(row["run"])) if row["epochs"] else []
            look = {"color": "lightgrey", "linewidth": 1, "zorder": 1}
            if place < 10:
                label = shorten(row["run"][-40:], 40)
                look = {
                    "color": colours[place % 5],
                    "linestyle": "-" if place < 5 else "--",
                    "label": label,
                }
            for axis, name in zip(axes, ("val_loss", "val_acc"), strict=True):
                marker = "." if len(history) < 40 else None
                axis.plot(
                    [line["epoch"] for line in history],
                    [line[name] for line in history],
                    marker=marker,
                    **look,
                )
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


# ------------------------------------------------ One page ------------------------------------------------

PAGE_START = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root { color-scheme: light dark; --ground: #fff; --text: #222; --line: #ccc; --head: #f2f2f2 }
@media (prefers-color-scheme: dark) { :root { --ground: #181818; --text: #ddd; --line: #444; --head: #262626 } }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 1rem/1.5 system-ui, sans-serif;
  background: var(--ground); color: var(--text); overflow-wrap: break-word }
section { display: inline-block; vertical-align: top; max-width: 100%; margin-right: 2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top }
td { white-space: nowrap }
td:last-child:not(.right) { white-space: normal }
.right { text-align: right }
th { background: var(--head); padding: 0 }
th button { all: unset; cursor: pointer; padding: .2rem .6rem; font-weight: 600 }
th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
figure { margin: 1rem 0 }
img { max-width: 100%; background: #fff }
.images { display: flex; flex-wrap: wrap; gap: 1rem }
.images figure { margin: 0; width: 8rem; font-size: .85rem; white-space: pre-line }
.images img { width: 100%; image-rendering: pixelated }
</style></head><body><h1>{title}</h1>
"""
PAGE_END = """<script>
for (const table of document.querySelectorAll("table"))
  [...table.tHead.rows[0].cells].forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const text = row => row.cells[column].textContent;
    const number = row => parseFloat(text(row).replaceAll(",", ""));  // of "1,234" and "98.1%"; a word has none
    const compare = (a, b) => isNaN(number(a)) - isNaN(number(b)) ||
      sign * (number(a) - number(b) || text(a).localeCompare(text(b), undefined, {numeric: true}));
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
</script></body></html>
"""


def table_parts(tables: dict[str, tuple]) -> list[tuple]:
    """Parts for `write_report`: tables, {heading: (alignment, headings, rows)}."""
    return [("table", heading, *table) for heading, table in tables.items()]


def write_report(path: Path, title: str, parts: list[tuple]) -> None:
    """Write a page that needs no other file: tables sort on a click on their header. RunError.

    Each of `parts` is ("heading", text), ("text", text), ("table", heading, alignment, headings, rows), see `as_table`,
    ("picture", PNG bytes, caption), or ("images", [(PNG bytes, caption), ...]) for small ones in rows.
    """

    def escape(text):
        return html.escape(
            text.encode(errors="replace").decode()
        )  # a name may have bytes that are no characters

    def figure(png, caption):
        source, words = f"data:image/png;base64,{base64.b64encode(png).decode()}", escape(caption)
        return (
            f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        )

    def cells(tag, alignment, texts):
        classes = {"<": "", ">": ' class="right"'}
        return "".join(
            f"<{tag}{classes[side]}>{text}</{tag}>"
            for side, text in zip(alignment, texts, strict=True)
        )

    page = [PAGE_START.replace("{title}", escape(title))]
    for part in parts:
        match part:
            case "heading", text:
                page.append(f"<h2>{escape(text)}</h2>")
            case "text", text:
                page.append(f"<p>{escape(text)}</p>")
            case "picture", png, caption:
                page.append(figure(png, caption))
            case "images", images:
                page.append(
                    f'<div class="images">{"".join(figure(*image) for image in images)}</div>'
                )
            case "table", heading, alignment, headings, rows:
                head = cells(
                    "th",
                    alignment,
                    [f'<button type="button">{escape(text)}</button>' for text in headings],
                )
                body = "".join(
                    f"<tr>{cells('td', alignment, map(escape, row))}</tr>" for row in rows
                )
                head = f"<thead><tr>{head}</tr></thead>"
                table = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
                page.append(f"<section><h2>{escape(heading)}</h2>{table}</section>")
    write_files(path.parent, {path.name: "\n".join([*page, PAGE_END]).encode()})


# ------------------------------------------------ The commands ------------------------------------------------


def evaluate(args: argparse.Namespace) -> dict:
    """Evaluate one run: the tables on the screen, metrics.json and the pictures in its directory or --out."""
    trained = load_trained(args.runs[0], args.device, args.quiet)
    record, directory = trained.record, trained.directory
    convolutions = {
        name: layer for name, layer in trained.model.named_modules() if isinstance(layer, nn.Conv2d)
    }
    name = args.layer or next(iter(convolutions), None)
    convolution = convolutions.get(name)
    if args.layer and not convolution:
        raise UsageError(
            f"--layer {name}: the convolutions of this model are {', '.join(convolutions) or 'none'}"
        )
    if convolution and args.channel is not None and args.channel >= convolution.weight.shape[1]:
        raise UsageError(
            f"--channel {args.channel}: layer {name} has {convolution.weight.shape[1]}, from 0"
        )
    history = records.read_log(directory) if record["epochs"] else []
    with contextlib.redirect_stdout(sys.stderr):  # remarks do not get into tables for programs
        image_set = load_images(trained, args.split, args.data_dir, args.quiet)
    pixels = image_set.images
    if args.image >= len(image_set):
        raise UsageError(f"--image {args.image}: the split has {len(image_set)} images, from 0")

    # The metrics, of the images as they are, and with test-time augmentation if the run or the user wants it.
    result, logits = trained.test(image_set)
    temperature = trained.config["temperature"]
    metrics = {
        "run": record["name"],
        "dataset": record["data"]["name"],
        "split": args.split,
        "epoch": trained.config["epoch"],
        "images": len(image_set),
        "loss": result.loss,
        **measure(logits, temperature, image_set.labels, image_set.classes),
    }
    tta = args.tta or record["args"].get("tta")
    if tta:
        augmented, _ = trained.test(image_set, tta)
        interval = wilson_interval(int(augmented.correct), len(image_set))
        metrics["tta"] = {
            "views": tta,
            "loss": augmented.loss,
            "accuracy": augmented.accuracy,
            "accuracy_interval": interval,
        }

    # The pictures.
    title = f"{shorten(record['name'], 50)}, epoch {metrics['epoch']}\n{len(image_set):,} {args.split} images of "
    title += shorten(Path(metrics["dataset"]).name, 30)
    probabilities = (logits.double() / temperature).softmax(1)
    confidence, predicted = probabilities.max(1)
    probability = probabilities.gather(
        1, image_set.labels[:, None]
    ).flatten()  # of the class it has
    sample = torch.randperm(len(image_set), generator=common.generator_for("predictions"))[:40]
    wrong = (predicted != image_set.labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:40]
    random, mistakes = (
        {
            index: caption(image_set, index, predicted[index], confidence[index])
            for index in chosen.tolist()
        }
        for chosen in (sample, worst)
    )
    figures = {
        "curves": draw_curves(trained, history),
        "per_class": draw_per_class(metrics, title),
        "confusion": draw_confusion(metrics, title),
        "predictions": draw_images(
            image_set, random, predicted, f"{title}; a random sample: true class and confidence"
        ),
        "mistakes": draw_images(
            image_set, mistakes, predicted, f"{title}; the most confident mistakes"
        ),
        "calibration": draw_calibration(metrics, title),
    }
    if convolution:
        figures["filters"] = draw_filters(name, convolution, args.channel, args.all_kernels)
        figures["activations"] = draw_activations(trained, name, convolution, image_set, args.image)
    files, remarks = {}, []
    galleries = {f"The {len(mistakes)} most confident of {len(wrong):,} mistakes": mistakes}
    if image_set.files:
        # Of a folder, the images that may have a wrong label.
        suspects, captions = find_suspects(image_set, probability, predicted, confidence)
        what = "given class least likely" + (
            "; the model was trained on these labels" * (args.split == "train")
        )
        figures["suspects"] = draw_images(image_set, captions, predicted, f"{title}; {what}")
        files["suspects.csv"] = f"{as_csv(suspects)}\n".encode(errors="surrogateescape")
        galleries[f"Suspects: {what}"] = {
            index: f"{text}\n{image_set.files[index].path.name}" for index, text in captions.items()
        }
        remarks = [f"suspects.csv and suspects.png: {len(suspects):,} images, {what}"]
    files = {f"{file}.png": render(figure) for file, figure in figures.items()} | files
    files["metrics.json"] = f"{json.dumps(metrics, indent=2)}\n".encode()
    out = args.out or place_of(directory, args.split)
    write_files(out, files)
    predictions = {
        "epoch": metrics["epoch"],
        "checksum": image_set.checksum,
        "labels": image_set.labels.short(),
        "predicted": predicted.short(),
        "probability": probability.float(),
    }
    records.save_checkpoint(out / "predictions.pt", predictions)

    status, tables = status_of(directory, record), metrics_tables(metrics)
    flags = {
        f"--{flag.replace('_', '-')}": str(value)
        for flag, value in record["args"].items()
        if value is not None
    }
    parts = [
        ("table", "Run", "<<", ["run", records.shown(directory)], summary(record, status)),
        *table_parts(tables),
    ]
    for heading, captions in galleries.items():
        pictures = [(as_png(pixels[index]), text) for index, text in captions.items()]
        parts += [("heading", heading), ("images", pictures)]
    shown = [
        file for file in figures if file not in ("mistakes", "suspects")
    ]  # those are images of their own
    parts += [
        ("heading", "Pictures"),
        *(("picture", files[f"{file}.png"], file.replace("_", " ")) for file in shown),
    ]
    parts += [("table", "All settings", "<<", ["flag", "value"], [*map(list, flags.items())])]
    write_report(out / "report.html", title.replace("\n", ": "), parts)

    lines = [title, *(line for table in tables.values() for line in ("", *as_table(*table)))]
    lines += ["", f"{records.shown(out)}: {', '.join(['report.html', *files, 'predictions.pt'])}"]
    if status not in ("finished", "stopped_early"):
        lines.insert(0, f"{records.shown(directory)}: {status} after {record['epochs']} epochs")
    if not convolution:
        lines[-1] += " (no convolution, so no filters.png)"
    report(args, metrics, metrics["classes"], lines + remarks)
    return metrics


def find_suspects(
    image_set: ImageSet,
    probability: torch.Tensor,
    predicted: torch.Tensor,
    confidence: torch.Tensor,
) -> tuple[list[dict], dict[int, str]]:
    """The tenth of the images of a folder whose class has the lowest `probability` [N], lowest first: as rows, and the
    first forty with captions, {index: text}. A tenth is three times the wrong labels that C. G. Northcutt, A. Athalye
    and J. Mueller found on average, "Pervasive label errors in test sets destabilize machine learning benchmarks"
    (2021)."""
    rows, captions = [], {}
    for index in probability.argsort(stable=True)[: math.ceil(len(image_set) / 10)].tolist():
        name, other = (
            image_set.classes[image_set.labels[index]],
            image_set.classes[predicted[index]],
        )
        given, best = probability[index].item(), confidence[index].item()
        row = {"file": str(image_set.files[index].path), "class": name, "probability": given}
        rows.append({**row, "predicted": other, "predicted_probability": best})
        if len(captions) < 40:
            captions[index] = (
                f"{shorten(name, 12)} ({given:.1%})\n{shorten(other, 10)}? ({best:.0%})"
            )
    return rows, captions


def place_of(run: Path, split: str) -> Path:
    """The directory of what is made of a split of a run."""
    return run if split == "test" else run / split


def write_files(out: Path, files: dict[str, bytes]) -> None:
    """Write the files, {name: content}, into a directory, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        records.write_atomically(out / name, content)


def report(
    args: argparse.Namespace, content: dict | list, rows: list[dict], lines: list[str]
) -> None:
    """Print a result: its whole content as --json, its rows as --csv, or the lines for a person."""
    if args.json or args.csv:
        say(json.dumps(content, indent=2) if args.json else as_csv(rows))
    else:
        say("\n".join(lines), args.quiet)


def as_csv(rows: list[dict]) -> str:
    """CSV of rows with the same keys, which are its first line; without a newline at the end."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().rstrip("\n")


def as_table(alignment: str, headings: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of columns as wide as their widest cell; `alignment` has `<` or `>` for each."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, alignment, widths, strict=True)
        ).rstrip()
        for row in (headings, *rows)
    ]


def summary(record: dict, status: str) -> list[list[str]]:
    """What a run is, in rows of a name and a value."""
    data, versions = (
        record["data"],
        ", ".join(" ".join(pair) for pair in record["versions"].items()),
    )
    return [
        ["command", shlex.join(["python", f"{record['script']}.py", *record["argv"]])],
        ["model", f"{record['args']['model']}, {record['parameters']:,} parameters"],
        [
            "data",
            f"{data['name']}: {data['train']:,} training and {data['val']:,} validation images",
        ],
        [
            "training",
            f"{record['epochs']} epochs in {record['seconds']:.0f} s, {status.replace('_', ' ')}",
        ],
        [
            "machine",
            f"{record['host']}, {record['device']}, {record['precision']}, {record['threads']} threads",
        ],
        ["begun", record["started"]],
        ["versions", versions],
        ["commit", (record["git"] or "-")[:12]],
    ]


def as_png(pixels: torch.Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as the bytes of a PNG file."""
    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(pixels).save(buffer, "png")
    return buffer.getvalue()


def metrics_tables(metrics: dict) -> dict[str, tuple]:
    """The tables of `metrics` for a person, each under its heading: alignment, headings, rows."""
    rows, tta = metrics["classes"], metrics.get("tta")
    results = [
        [
            "accuracy",
            f"{metrics['accuracy']:.2%}",
            "{:.2%} to {:.2%}".format(*metrics["accuracy_interval"]),
        ],
        ["loss", f"{metrics['loss']:.4f}", ""],
        ["macro F1", f"{metrics['macro_f1']:.4f}", ""],
        ["weighted F1", f"{metrics['weighted_f1']:.4f}", ""],
        ["expected calibration error", f"{metrics['expected_calibration_error']:.2%}", ""],
        [
            f"... before the temperature {metrics['temperature']:.3f}",
            f"{metrics['expected_calibration_error_before']:.2%}",
            "",
        ],
    ]
    if "top5_accuracy" in metrics:
        results.append(["top-5 accuracy", f"{metrics['top5_accuracy']:.2%}", ""])
    if tta:
        interval = "{:.2%} to {:.2%}".format(*tta["accuracy_interval"])
        text = f"with test-time augmentation, {tta['views']}"
        headline = [f"accuracy {text}", f"{tta['accuracy']:.2%}", interval]
        results = [headline, [f"loss {text}", f"{tta['loss']:.4f}", ""], *results]
    classes = []
    for row in rows:
        precision = (
            f"{row['precision']:.2%}" if row["predicted"] else "-"
        )  # no image was taken for one of this class
        classes.append(
            [
                row["name"],
                str(row["support"]),
                f"{row['recall']:.2%}" if row["support"] else "-",
                precision,
                f"{row['f1']:.4f}",
            ]
        )
    errors, confused = torch.tensor(metrics["confusion_matrix"]).fill_diagonal_(0).flatten(), []
    for place in errors.argsort(descending=True, stable=True)[
        : min(10, int(errors.count_nonzero()))
    ].tolist():
        actual, guess = divmod(place, len(rows))
        share = f"{errors[place] / rows[actual]['support']:.1%}"
        confused.append([rows[actual]["name"], rows[guess]["name"], str(int(errors[place])), share])
    return {
        "Results": ("<>>", ["result", "value", "95% interval"], results),
        "Classes": ("<>>>>", ["class", "images", "accuracy = recall", "precision", "F1"], classes),
        "Most confused": (
            "<<>>",
            ["most confused: actual", "predicted", "images", "of the class"],
            confused,
        ),
    }


# What a row of a comparison says of its pair, and of the runs that are equal to it but for the seed.
PAIR = (
    "pair_with",
    "pair_images",
    "pair_only_this_right",
    "pair_only_other_right",
    "pair_difference",
    "pair_low",
    "pair_high",
    "pair_mid_p",
    "not_paired",
)
SEEDS = (
    "seeds",
    "seed_runs",
    *(f"{name}_acc_{what}" for name in ("val", "test") for what in ("mean", "sd", "low", "high")),
)
NOT_OF_THE_CONFIGURATION = {
    "seed",
    "threads",
    "run_name",
    "runs_dir",
    "data_dir",
    "wandb",
    "wandb_project",
}


def compare(args: argparse.Namespace) -> dict:
    """Compare runs by what their directories say: no image is read, so the test set stays as unread as it was."""
    rows, configurations = [], {}
    for directory in args.runs:
        try:
            record = records.read_record(directory)
        except RunError as error:  # `runs/*` names sweeps and pictures too
            note(f"skipped: {error}", args.quiet)
            continue
        best, test, dataset = record["best"] or {}, record["test"] or {}, record["data"]["name"]
        if dataset == "synthetic":  # each script draws its own
            dataset = f"synthetic ({record['script']})"
        rows.append(
            {
                "run": str(directory),
                "dataset": dataset,
                "selection": record["data"]["selection"],
                "model": record["args"]["model"],
                "parameters": record["parameters"],
                "epochs": record["epochs"],
                "best_epoch": best.get("epoch"),
                "val_loss": best.get("val_loss"),
                "val_acc": best.get("val_acc"),
                "test_acc": test.get("acc"),
                "label_smoothing": record["args"].get("label_smoothing", 0.0),
                "seconds": record["seconds"],
                "status": status_of(directory, record),
                **dict.fromkeys((*PAIR, *SEEDS)),
            }
        )
        if rows[-1]["status"] in ("finished", "stopped_early"):
            same = {
                name: value
                for name, value in record["args"].items()
                if name not in NOT_OF_THE_CONFIGURATION
            }
            key = json.dumps([record["script"], dataset, record["data"]["train"], same])
            configurations.setdefault(key, {}).setdefault(
                record["seed"], rows[-1]
            )  # a seed counts once
    if not rows:
        raise RunError("none of these is a run directory")
    rows.sort(key=lambda row: row["dataset"])
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["dataset"])]
    remarks = [remark for remark in map(rank, groups) if remark]
    rows = [row for group in groups for row in group]
    if any(row["selection"] == "test set" for row in rows):
        remarks.append("* measured on the test set, which chose the epoch (--val-size 0)")
    remarks += [
        remark for group in groups if len(group) > 1 for remark in pair_with_best(group, args.split)
    ]
    for seeds in configurations.values():
        add_seeds(list(seeds.values()))
    picture = render(draw_comparison(groups))
    out = args.out or Path(rows[0]["run"]).parent
    write_files(out, {"compare.png": picture})
    tables = comparison_tables(rows, args.split)
    write_report(
        out / "compare.html",
        f"{len(rows)} runs",
        [
            *table_parts(tables),
            *(("text", remark) for remark in remarks),
            ("picture", picture, "validation, run by run"),
        ],
    )
    lines = [line for table in tables.values() for line in (*as_table(*table), "")]
    report(args, rows, rows, [*lines, *remarks, f"{records.shown(out)}: compare.png, compare.html"])
    return {"runs": rows}


def comparison_tables(rows: list[dict], split: str) -> dict[str, tuple]:
    """The tables of a comparison, each under its heading: alignment, headings, rows."""

    def text(form, *values):
        return "-" if None in values else " to ".join(format(value, form) for value in values)

    runs = [
        [
            row["run"],
            row["dataset"],
            row["model"],
            f"{row['parameters']:,}",
            str(row["epochs"]),
            text(".4f", row["val_loss"]) + "*" * (row["selection"] == "test set"),
            text(".2%", row["val_acc"]),
            text(".2%", row["test_acc"]),
            f"{row['seconds']:.0f}",
            row["status"],
        ]
        for row in rows
    ]
    headings = [
        "run",
        "dataset",
        "model",
        "parameters",
        "epochs",
        "val loss",
        "val acc",
        "test acc",
        "seconds",
    ]
    tables = {"Runs": ("<<<>>>>>><", [*headings, "status"], runs)}
    pairs = [
        [
            row["run"],
            row["pair_with"],
            f"{row['pair_images']:,}",
            str(row["pair_only_this_right"]),
            str(row["pair_only_other_right"]),
            f"{row['pair_difference']:+.2%}",
            text("+.2%", row["pair_low"], row["pair_high"]),
            f"{row['pair_mid_p']:.3g}",
        ]
        for row in rows
        if row["pair_with"]
    ]
    if pairs:
        headings = [
            "image by image: run",
            "against",
            f"{split} images",
            "only this right",
            "only that right",
        ]
        headings += ["difference", "95% interval", "McNemar's mid-p"]
        tables["Image by image"] = "<<>>>>>>", headings, pairs
    seeds = [
        [row["seed_runs"], row["model"], str(row["seeds"])]
        + [
            text(".2%", *(row[f"{name}_acc_{what}"] for what in which))
            for name in ("val", "test")
            for which in (("mean",), ("sd",), ("low", "high"))
        ]
        for row in {row["seed_runs"]: row for row in rows if row["seeds"]}.values()
    ]
    if seeds:
        figures = [
            f"{name} acc: {what}"
            for name in ("val", "test")
            for what in ("mean", "sd", "95% interval")
        ]
        tables["Seeds"] = "<<>>>>>>>", ["equal but for the seed", "model", "seeds", *figures], seeds
    return tables


def pair_with_best(rows: list[dict], split: str) -> list[str]:
    """Put into the ranked rows of one dataset how each does, image by image, against the best that was evaluated.

    The predictions are those of `split`, without test-time augmentation. Returns remarks on what is not paired.
    """
    best, others, pairs = None, {}, 0
    for row in rows:
        path = place_of(Path(row["run"]), split) / "predictions.pt"
        kept = records.load_checkpoint(path) if path.exists() else None
        if not kept:
            row["not_paired"] = f"not evaluated on the {split} images"
        elif kept["epoch"] != row["best_epoch"]:
            row["not_paired"] = "trained on since the evaluation"
        elif not best:
            best, right_by_best = row["run"], kept["predicted"] == kept["labels"]
            checksum = kept["checksum"]
        elif kept["checksum"] != checksum:
            row["not_paired"] = f"evaluated on other {split} images than {best}"
        else:
            right, images = kept["predicted"] == kept["labels"], len(kept["labels"])
            counts = int((right & ~right_by_best).sum()), int((right_by_best & ~right).sum())
            difference, interval = (
                (counts[0] - counts[1]) / images,
                difference_interval(*counts, images),
            )
            values = best, images, *counts, difference, *interval, mcnemar_mid_p(*counts), None
            row.update(zip(PAIR, values, strict=True))
            pairs += 1
        if row["not_paired"]:
            others.setdefault(row["not_paired"], []).append(row["run"])
    remarks = [
        f"not compared image by image, as {why}: {', '.join(runs) if len(runs) <= 5 else f'{len(runs)} runs'}"
        for why, runs in others.items()
    ]
    if pairs > 1:
        remarks.append(
            "each mid-p is of one pair: of twenty pairs of equally good models one is below 0.05"
        )
    return remarks


def add_seeds(rows: list[dict]) -> None:
    """Put into the rows of runs that are equal but for the seed what their accuracies are together."""
    for row in rows if len(rows) > 1 else ():
        row.update(seeds=len(rows), seed_runs=", ".join(one["run"] for one in rows))
        for name in ("val_acc", "test_acc"):
            values = [one[name] for one in rows]
            if None not in values:
                mean, deviation, interval = mean_interval(values)
                figures = zip(
                    ("mean", "sd", "low", "high"), (mean, deviation, *interval), strict=True
                )
                row.update({f"{name}_{what}": figure for what, figure in figures})


def rank(rows: list[dict]) -> str:
    """Sort the runs of one dataset, best first; returns what there is to be said about their order, if anything."""
    if len({row["label_smoothing"] for row in rows}) == 1:
        rows.sort(key=lambda row: math.inf if row["val_loss"] is None else row["val_loss"])
        return ""
    rows.sort(key=lambda row: -(row["val_acc"] or 0))
    text = "the runs differ in --label-smoothing, so their losses cannot be compared: ranked by validation accuracy"
    return f"{rows[0]['dataset']}: {text}"


def predict(args: argparse.Namespace) -> dict:
    """Print file, class and probability of the user's own images, in the order given; RunError if one is unreadable."""
    trained = load_trained(args.runs[0], args.device, args.quiet)
    classes, (channels, side, _) = trained.config["classes"], trained.config["image_shape"]
    top = args.top or 1
    if top > len(classes):
        raise UsageError(f"--top {top}: the model has {len(classes)} classes")
    files = [
        file
        for path in args.predict
        for file in (common.image_files(path) if path.is_dir() else [path])
    ]
    predictions, unreadable = [], 0
    for file in files:
        try:
            resize = trained.config.get("resize", "stretch")  # older runs have none
            pixels = common.read_image(file, side, channels == 1, resize)
        except RunError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            unreadable += 1
            continue
        _, logits = trained.test(ImageSet(pixels[None], torch.zeros(1, dtype=torch.long), classes))
        best = (logits[0].double() / trained.config["temperature"]).softmax(0).topk(top)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            one = {"file": str(file), "class": classes[index], "probability": probability}
            if args.csv:
                say(
                    "\n".join(as_csv([one]).split("\n", 1)[bool(predictions) :])
                )  # one header, on the first
            else:
                say(json.dumps(one) if args.json else f"{file}\t{one['class']}\t{probability:.4f}")
            predictions.append(one)
    if unreadable:
        raise RunError(f"{unreadable} of {len(files)} files could not be read")
    if not files:
        raise RunError("no image files there")
    return {"predictions": predictions}


class WithPreprocessing(nn.Module):
    """uint8 images [N, C, H, W] to probabilities [N, K]."""

    def __init__(self, trained):
        super().__init__()
        self.model = trained.model.to(memory_format=torch.contiguous_format)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(trained.config[name]).view(-1, 1, 1))
        self.temperature = trained.config["temperature"]

    def forward(self, images):
        logits = self.model((images.float() / 255 - self.mean) / self.std)
        return (logits / self.temperature).softmax(1)


def to_torch_export(program, metadata: dict) -> tuple[bytes, Callable]:
    """The bytes of model.pt2, with the metadata as metadata.json inside, and what they compute when loaded."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def to_onnx(program, metadata: dict) -> tuple[bytes, Callable]:
    """The bytes of model.onnx, with the metadata in it, each value as JSON, and what they compute when loaded."""
    import onnxruntime

    names = {
        "input_names": ["images"],
        "output_names": ["probabilities"],
        "dynamic_shapes": ({0: "batch"},),
    }
    exported = torch.onnx.export(program, **names, verbose=False)
    exported.model.metadata_props.update(
        {key: json.dumps(value) for key, value in metadata.items()}
    )
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(
        session.run(None, {"images": images.numpy()})[0]
    )


# Kind: the file, what writes it, and the packages that this needs.
EXPORTS = {
    "torch.export": ("model.pt2", to_torch_export, ()),
    "onnx": ("model.onnx", to_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def export(args: argparse.Namespace) -> dict:
    """Write the model with its preprocessing as a file of another kind; kept only if it answers as the model does."""
    file, convert, packages = EXPORTS[args.export]
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise RunError(
            f"--export {args.export} needs more packages: pip install {' '.join(missing)}"
        )
    trained = load_trained(args.runs[0], "cpu")
    model, shape = WithPreprocessing(trained).eval(), trained.config["image_shape"]
    # Noise of rising contrast: at full contrast alone a model can be so sure of itself that nothing is compared.
    noise = torch.rand(5, *shape, generator=common.generator_for("export"))
    images = (noise * torch.linspace(0, 255, 5).view(-1, 1, 1, 1)).byte()
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    # What the file leaves to its user: as common.read_image does it.
    metadata = {
        "classes": trained.config["classes"],
        "image_shape": shape,
        "mode": "L" if shape[0] == 1 else "RGB",
        "resize": "bilinear, antialiased, as Pillow's Image.resize",
        "square": trained.config.get("resize", "stretch"),
        "transparent pixels": "on white",
    }
    content, exported = convert(program, metadata)
    with torch.inference_mode():
        difference = max(
            float((exported(some) - model(some)).abs().max()) for some in (images, images[:1])
        )
    if not difference < 1e-4:
        raise RunError(
            f"the exported model's probabilities differ from the model's by {difference:.2g}: not kept"
        )
    out = args.out or trained.directory
    write_files(out, {file: content})
    takes = f"{records.shown(out / file)}: uint8 images [N, {', '.join(map(str, shape))}] to probabilities [N, K]"
    say(f"{takes}, within {difference:.1g} of the model", args.quiet)
    return {"file": str(out / file)}


def main(argv: list[str] | None = None) -> dict:
    """Do what `argv` says; return what metrics.json, the comparison or the predictions hold. UsageError, RunError."""
    args = parse_arguments(argv)
    if args.predict:
        return predict(args)
    if args.export:
        return export(args)
    return evaluate(args) if len(args.runs) == 1 else compare(args)


if __name__ == "__main__":
    sys.exit(common.command_line(main))
