"""Show what a model has learnt: tables and pictures, a comparison of runs, predictions, exported models.

    python evaluate.py runs/<run>                            # tables, metrics.json and pictures, from the test split
    python evaluate.py runs/<run> --split val --out results  # from the validation split, into another directory
    python evaluate.py runs/a runs/b                         # compare runs; reads no images
    python evaluate.py runs/<run> --predict photo.png album  # file, class and probability of images of your own
    python evaluate.py runs/<run> --export onnx              # a file that takes uint8 images

A run directory is all it needs: best.pt holds the model and its preprocessing. Everything is computed in float32.
"""

import csv
import functools
import importlib
import importlib.util
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import RunError, UsageError

# ---------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------

# The flags that have a meaning in only some of the modes.
MODE_FLAGS = {
    "evaluate": {
        "split", "out", "data_dir", "tta", "layer", "channel", "all_kernels", "image", "csv", "json", "device",
        "batch_size",
    },
    "compare": {"out", "csv", "json"},
    "predict": {"predict", "json", "device", "batch_size"},
    "export": {"export", "out"},
    "sweep": set(),
}  # fmt: skip


def build_parser():
    parser = common.ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; more than one: compare them")
    parser.add_argument("--quiet", action="store_true", help="print only errors")

    flag = parser.add_argument_group("what is evaluated").add_argument
    flag("--split", choices=("test", "val", "train"), default="test", help="which images")
    flag("--data-dir", type=Path, metavar="DIR", help="where the data are now (where they were in training)")
    flag("--tta", choices=tuple(common.TTA), help="test-time augmentation, beside the plain figures (the run's own)")

    flag = parser.add_argument_group("what comes out").add_argument
    flag("--out", type=Path, metavar="DIR", help="where the files go (the run directory; of a comparison its parent)")
    table = parser.add_mutually_exclusive_group().add_argument
    table("--csv", action="store_true", help="print the table as CSV: the classes, or the runs compared")
    table("--json", action="store_true", help="print JSON: metrics.json, the runs compared, or a line a prediction")

    flag = parser.add_argument_group("filters.png and activations.png").add_argument
    flag("--layer", metavar="NAME", help="which convolution (the first)")
    flag("--channel", type=common.number(int, 0), metavar="K", help="input channel of the filters (0; RGB in colour)")
    flag("--all-kernels", action="store_true", help="the kernels of every input channel")
    flag("--image", type=common.number(int, 0), default=0, metavar="K", help="image of the split for the feature maps")

    flag = parser.add_argument_group("instead of evaluating").add_argument
    flag("--predict", type=Path, nargs="+", metavar="PATH", help="classify image files and folders of them")
    flag("--export", choices=tuple(EXPORTS), help="write the model, preprocessing included, as model.onnx or model.pt2")

    flag = parser.add_argument_group("machine").add_argument
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: a GPU where there is one")
    flag("--batch-size", type=common.number(int, 1), default=1000, metavar="IMAGES", help="images at a time")
    parser.set_defaults(precision="fp32")
    return parser


def parse_arguments(argv=None):
    """`argv` to a Namespace with its `mode`, a key of MODE_FLAGS. Exits with 2 on a bad argument."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(args.runs) > 1:  # `runs/*` also names what is no run: a comparison's own picture
        args.runs = [path for path in args.runs if not path.is_file()] or args.runs
    modes = [mode for mode in ("predict", "export") if getattr(args, mode)]
    if len(modes) == 2:
        parser.error("--predict and --export: one at a time")
    if modes and len(args.runs) > 1:
        parser.error(f"--{modes[0]} takes one run, not {len(args.runs)}")
    args.mode = modes[0] if modes else "compare" if len(args.runs) > 1 else "evaluate"
    if args.mode == "evaluate" and (args.runs[0] / "sweep.json").is_file():
        args.mode = "sweep"
    for name in sorted(set.union(*MODE_FLAGS.values()) - MODE_FLAGS[args.mode]):
        if getattr(args, name) != parser.get_default(name):
            places = {"compare": "when runs are compared", "sweep": "for the report of a sweep"}
            place = places.get(args.mode, f"with --{args.mode}")
            parser.error(f"--{name.replace('_', '-')} means nothing {place}")
    if args.all_kernels and args.channel is not None:
        parser.error("--all-kernels and --channel: one at a time")
    return args


# ---------------------------------------------------------------------------------------------------
# A trained model and its images
# ---------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A run with the model of its best epoch: `record` is run.json, `blueprint` what best.pt says of the model."""

    directory: Path
    record: dict
    blueprint: dict
    model: nn.Module

    def loader(self, image_set, batch_size):
        return common.Loader(image_set, batch_size, self.blueprint["mean"], self.blueprint["std"])


def load_trained(directory, device):
    """The best model of a run, in evaluation mode. RunError where there is none, or the run is still going."""
    record = common.read_record(directory)
    if status_of(directory, record) == "running":
        raise RunError(f"{directory} is still being trained; evaluate it when it has ended")
    if device.type == "cpu":
        common.keep_freed_memory()
    blueprint = common.load_checkpoint(directory / "best.pt")
    try:
        model = common.build_model(blueprint)
        model.load_state_dict(blueprint.pop("weights"))
        missing = {"mean", "std", "epoch", "val_loss", "val_acc"} - blueprint.keys()
        if blueprint["format"] != common.FORMAT:
            raise ValueError(f"its format is {blueprint['format']}, not {common.FORMAT}")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, UsageError) as error:
        raise RunError(f"{directory}/best.pt does not fit this version of the scripts ({error})") from error
    if missing:
        raise RunError(f"{directory}/best.pt does not fit this version of the scripts (no {', '.join(missing)})")
    return Trained(directory, record, blueprint, model.to(device).eval())


def status_of(directory, record):
    """The status of a run; `killed` for one that was `running` when its process died, which holds no lock now."""
    if record["status"] == "running" and not common.is_locked(directory / ".lock"):
        return "killed"
    return record["status"]


def load_images(trained, split, data_dir):
    """A split of the images that the run was trained on. RunError where they are missing, or are others."""
    args = common.recorded_arguments(trained.record)
    if split == "val" and not args.val_size:
        raise RunError(f"{trained.directory} was trained with --val-size 0, without a validation split")
    if args.dataset in common.TORCHVISION_DATASETS:
        args.data_dir = data_dir or args.data_dir
        place = args.data_dir / common.TORCHVISION_DATASETS[args.dataset][1]
    else:
        place = None if args.dataset == "synthetic" else (data_dir or Path(args.dataset)).absolute()
        args.dataset = str(place or args.dataset)
    if data_dir and not place:
        raise UsageError("--data-dir: synthetic images are drawn, and lie nowhere")
    if place and not place.exists():
        raise RunError(f"the images of {trained.directory} are not in {place}; say where with --data-dir DIR")
    if args.script not in ("train_mnist", "train_cifar"):
        raise RunError(f"{trained.directory} was made by {args.script}.py, whose data this script does not know")
    images, load_test = common.load_dataset(args, importlib.import_module(args.script).synthetic)
    data = trained.record["data"]
    if images.checksum != data["checksum"] or images.classes != trained.blueprint["classes"]:
        raise RunError(f"{place or args.dataset} is not what {trained.directory} was trained on: the checksums differ")
    if split == "test":
        test_set = load_test()
        if data.get("test_checksum") not in (None, test_set.checksum):
            raise RunError(f"{place or args.dataset} has other test images than {trained.directory} was tested on")
        return test_set
    train_set, val_set = common.split_off_validation(args, images, load_test)
    return val_set if split == "val" else train_set


@torch.inference_mode()
def predict(model, batches, tta=None, tta_below=1.0):
    """Logits [N, K] of all batches of (`images`, `labels`), float32, on the CPU."""
    return torch.cat([common.predict(model, images, tta, tta_below).cpu() for images, _ in batches])


# ---------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------

CALIBRATION_BINS = 15


def wilson_interval(correct, count):
    """95% interval of a share, [low, high] (E. B. Wilson, 1927); it is sound near 0 and 1, and for few images."""
    z = 1.959963984540054
    share, shrink = correct / count, 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return [
        max(0.0, (share + z * z / (2 * count) - half) / shrink),
        min(1.0, (share + z * z / (2 * count) + half) / shrink),
    ]


def class_metrics(confusion, names):
    """Per class, from `confusion` int64 [K, K], rows actual, columns predicted. What would divide by zero is 0."""
    rows = []
    for index, name in enumerate(names):
        correct, support = int(confusion[index, index]), int(confusion[index].sum())
        predicted = int(confusion[:, index].sum())
        recall = correct / support if support else 0.0
        rows.append({
            "name": name, "support": support, "predicted": predicted, "accuracy": recall,
            "precision": correct / predicted if predicted else 0.0, "recall": recall,
            "f1": 2 * correct / (support + predicted) if support + predicted else 0.0,
        })  # fmt: skip
    return rows


def calibration(confidence, correct):
    """Images, mean confidence and accuracy in each of 15 bins of equal width (None where a bin is empty), and the
    expected calibration error: C. Guo et al., "On calibration of modern neural networks" (2017)."""
    bins, error = [], 0.0
    which = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    for index in range(CALIBRATION_BINS):
        inside = which == index
        count = int(inside.sum())
        mean = float(confidence[inside].mean()) if count else None
        share = float(correct[inside].double().mean()) if count else None
        error += count / len(confidence) * abs(mean - share) if count else 0
        low, high = index / CALIBRATION_BINS, (index + 1) / CALIBRATION_BINS
        bins.append({"low": low, "high": high, "images": count, "confidence": mean, "accuracy": share})
    return bins, error


def answers(logits):
    """The probability and the index of the predicted class, each [N], of `logits` [N, K]."""
    return logits.double().softmax(1).max(1)


def measure(logits, labels, names):
    """All metrics, as in metrics.json, of `logits` [N, K] for the true `labels` [N] of the classes `names`."""
    log_probabilities = logits.double().log_softmax(1)
    confidence, predicted = answers(logits)
    correct, count, classes = predicted == labels, len(labels), len(names)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    rows = class_metrics(confusion, names)
    bins, calibration_error = calibration(confidence, correct)
    metrics = {
        "images": count,
        "loss": float(F.nll_loss(log_probabilities, labels)),
        "accuracy": int(correct.sum()) / count,
        "accuracy_interval": wilson_interval(int(correct.sum()), count),
        "macro_f1": sum(row["f1"] for row in rows) / classes,
        "weighted_f1": sum(row["f1"] * row["support"] for row in rows) / count,
        "expected_calibration_error": calibration_error,
    }
    if classes > 10:
        top5 = log_probabilities.topk(5).indices
        metrics["top5_accuracy"] = int((top5 == labels[:, None]).sum()) / count
    return {**metrics, "classes": rows, "calibration": bins, "confusion_matrix": confusion.tolist()}


def confused_pairs(metrics, count):
    """The `count` most frequent errors: (images, actual, predicted, share of the actual class)."""
    rows = metrics["classes"]
    pairs = [
        (images, rows[actual]["name"], rows[predicted]["name"], images / rows[actual]["support"])
        for actual, line in enumerate(metrics["confusion_matrix"])
        for predicted, images in enumerate(line)
        if images and actual != predicted
    ]
    return sorted(pairs, key=lambda pair: -pair[0])[:count]


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------

# Two of the colours of M. Okabe and K. Ito, told apart by the colour-blind; line styles and marks say the same in grey.
BLUE, ORANGE = "#0072B2", "#D55E00"
DPI = 100
ANNOTATED_CLASSES = 20


def new_figure(width, height, title, layout="constrained"):
    """A figure of so many inches, made without pyplot, which needs a global state and wants a display."""
    import matplotlib
    from matplotlib.figure import Figure

    # A class may be called $x$.
    matplotlib.rcParams.update({"text.parse_math": False, "font.family": list(fonts())})
    figure = Figure((width, height), dpi=DPI, layout=layout)
    figure.suptitle(legible(title))
    return figure


# Matplotlib's own font, and those of the systems for what it lacks: Chinese, Japanese, Korean.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Zen Hei", "Hiragino Sans",
    "PingFang SC", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip


@functools.cache
def fonts():
    """{name: file} of those of FONTS that are installed."""
    from matplotlib import font_manager

    return {name: font_manager.findfont(name) for name in FONTS if name in font_manager.get_font_names()}


@functools.cache
def drawable():
    """The characters that these fonts have."""
    from matplotlib import font_manager

    return {code for file in fonts().values() for code in font_manager.get_font(file).get_charmap()}


def legible(text):
    r"""The text with characters that no font has as \u732b, where a picture would show empty boxes."""
    known = drawable()
    return "".join(c if c == "\n" or ord(c) in known else c.encode("unicode_escape").decode() for c in text)


def render(figure):
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def colormap(name, missing="lightgrey"):
    """A colour map with `missing` for NaN: what lies between tiles, or a class that never occurs."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=missing)


def percent_axis(axis):
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=None))


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


def draw_curves(trained, rows):
    """Loss and accuracy of training and validation, epoch by epoch."""
    record = trained.record
    figure = new_figure(11, 4.2, f"{record['name']}: {record['args']['model']} on {record['data']['name']}")
    selection = record["data"]["selection"]
    # The blueprint's figures, not the record's: they are of the weights, also where a run was killed between the two.
    epochs, best = [row["epoch"] for row in rows], trained.blueprint
    for axis, name in zip(curves_axes(figure), ("loss", "acc"), strict=True):
        for part, label, style in (("train", "training", "--"), ("val", selection, "-")):
            colour = ORANGE if part == "train" else BLUE
            values = [row[f"{part}_{name}"] for row in rows]
            axis.plot(epochs, values, style, color=colour, label=label, marker="." if len(rows) < 40 else None)
        axis.plot(best["epoch"], best[f"val_{name}"], "*", color="black", markersize=13, label=f"best: {best['epoch']}")
        if record["status"] == "stopped_early":
            axis.axvline(epochs[-1], color="black", linestyle=":", label=f"early stop: {epochs[-1]}")
        axis.legend()
    return figure


def draw_per_class(metrics, title):
    """Accuracy of each class, highest first, with its 95% interval."""
    rows = sorted((row for row in metrics["classes"] if row["support"]), key=lambda row: row["accuracy"])
    figure = new_figure(8, 1.6 + len(rows) * (0.32 if len(rows) <= 30 else 0.16), title)
    axis = figure.subplots()
    shares, places = [row["accuracy"] for row in rows], range(len(rows))
    intervals = [wilson_interval(round(row["accuracy"] * row["support"]), row["support"]) for row in rows]
    errors = [[max(0, s - low) for s, (low, _) in zip(shares, intervals, strict=True)]]
    errors += [[max(0, high - s) for s, (_, high) in zip(shares, intervals, strict=True)]]
    axis.barh(places, shares, xerr=errors, color=BLUE, error_kw={"elinewidth": 1, "capsize": 2})
    axis.axvline(metrics["accuracy"], color="black", linestyle="--", label=f"all images: {metrics['accuracy']:.2%}")
    labels = [f"{legible(shorten(row['name'], 24))}  {row['accuracy']:.1%}" for row in rows]
    axis.set_yticks(places, labels, fontsize=10 if len(rows) <= 30 else 8)
    axis.set(xlabel="accuracy within the class (recall), with 95% interval", xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    percent_axis(axis.xaxis)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def draw_confusion(metrics, title):
    """Three heatmaps: counts, recall (each row sums to 1) and precision (each column sums to 1)."""
    from matplotlib.colors import PowerNorm

    counts = torch.tensor(metrics["confusion_matrix"], dtype=torch.float64)
    names = [legible(shorten(row["name"], 24)) for row in metrics["classes"]]
    annotated = len(names) <= ANNOTATED_CLASSES
    side = min(max(len(names) * (0.46 if annotated else 0.13), 2.6), 20)  # inches: at least as the headings need
    # Of more than 150 classes the names would run into one another.
    labelled = range(0, len(names), math.ceil(len(names) / 150))
    below = max(2.2, 1.4 + max(map(len, names)) * (0.08 if annotated else 0.055))
    figure = new_figure(3 * (side + 2.4), side + below, title)
    panels = (
        ("counts", counts, "images"),
        ("recall: percent of the actual class", 100 * counts / counts.sum(1, keepdim=True), "% of the row"),
        ("precision: percent of the predicted class", 100 * counts / counts.sum(0, keepdim=True), "% of the column"),
    )
    for axis, (heading, values, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        # The square root shows the errors beside a diagonal that is many times larger.
        top = max(1.0, float(counts.max())) if unit == "images" else 100
        shown = axis.imshow(
            values.numpy(), cmap=colormap("Blues"), norm=PowerNorm(0.5, 0, top), interpolation="nearest"
        )
        figure.colorbar(shown, ax=axis, label=unit, fraction=0.046)
        size = 9 if annotated else 6
        axis.set_xticks(labelled, [names[index] for index in labelled], rotation=90, fontsize=size)
        axis.set_yticks(labelled, [names[index] for index in labelled], fontsize=size)
        axis.set(title=heading, xlabel="predicted class", ylabel="actual class")
        for row, column in (values == values).nonzero().tolist() if annotated else ():
            value = float(values[row, column])
            text = f"{value:.0f}" if unit == "images" or not value else f"{value:.1f}"
            colour = "white" if value / top > 0.35 else "black" if value else "silver"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return figure


def draw_image(axis, pixels):
    """uint8 [1 or 3, H, W] on an axis, as it is."""
    axis.imshow(pixels.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def draw_images(image_set, predicted, confidence, chosen, title):
    """The images at the indices `chosen`, as they were before normalisation, with true and predicted class."""
    columns = 8
    rows = max(1, math.ceil(len(chosen) / columns))
    width, height = columns * 1.45, rows * 1.85 + 0.7
    figure = new_figure(width, height, title, layout=None)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 1.05 / height, hspace=0.55, wspace=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, index in zip(axes, chosen, strict=False):
        pixels, label, guess = image_set.images[index], image_set.labels[index], predicted[index]
        draw_image(axis, pixels)
        actual, answer = (legible(shorten(image_set.classes[which], 12)) for which in (label, guess))
        if label == guess:
            axis.set_title(f"{actual}\n({confidence[index]:.0%})", fontsize=8, pad=3)
            continue
        axis.set_title(f"{actual}, taken for\n{answer} ({confidence[index]:.0%})", fontsize=8, pad=3, color=ORANGE)
        axis.set_frame_on(True)
        for spine in axis.spines.values():
            spine.set(color=ORANGE, linewidth=3)
    if not len(chosen):
        figure.text(0.5, 0.4, "none", ha="center")
    return figure


def shorten(name, length=16):
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_calibration(metrics, title):
    """Accuracy against confidence, and how often each confidence occurs."""
    figure = new_figure(6, 6.5, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = [one for one in metrics["calibration"] if one["images"]]
    lows, width = [one["low"] for one in bins], 1 / CALIBRATION_BINS
    bars = {"width": width, "align": "edge", "edgecolor": "white"}
    top.bar(lows, [one["accuracy"] for one in bins], color=BLUE, label="accuracy", **bars)
    top.plot([one["confidence"] for one in bins], [one["accuracy"] for one in bins], "o", color="black", markersize=4)
    top.plot([0, 1], [0, 1], "--", color=ORANGE, label="perfectly calibrated")
    error = metrics["expected_calibration_error"]
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"expected calibration error {error:.2%}")
    top.legend(loc="upper left")
    bottom.bar(lows, [one["images"] for one in bins], color=BLUE, **bars)
    bottom.set(xlabel="confidence: probability of the predicted class", ylabel="images", yscale="log", ylim=(0.5, None))
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    for axis in (top.xaxis, top.yaxis):
        percent_axis(axis)
    return figure


def mosaic(tiles, columns):
    """`tiles` [N, H, W] or [N, H, W, 3] laid out in rows of `columns`, one pixel apart, with NaN between."""
    count, height, width, *colours = tiles.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1, *colours), math.nan)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        y, x = row * (height + 1) + 1, column * (width + 1) + 1
        sheet[y : y + height, x : x + width] = tile
    return sheet


def draw_mosaic(figure, axis, sheet, label, **scale):
    """A sheet of `mosaic` with a scale beside it, or in colour."""
    if sheet.ndim == 3:
        axis.imshow(sheet.nan_to_num(1).numpy(), interpolation="nearest")
    else:
        shown = axis.imshow(sheet.numpy(), interpolation="nearest", **scale)
        figure.colorbar(shown, ax=axis, label=label, fraction=0.04)
    axis.set_axis_off()


def find_convolution(model, name):
    """The name and the module of a convolution, the first where `name` is None; (None, None) where there is none."""
    found = {key: module for key, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if name is None:
        return next(iter(found.items()), (None, None))
    if name not in found:
        raise UsageError(f"--layer {name}: the convolutions of this model are {', '.join(found) or 'none'}")
    return name, found[name]


def draw_filters(name, convolution, channel, all_kernels):
    """The kernels of a convolution: in RGB, of one input channel, or (`all_kernels`) of every one, a row a filter."""
    weight = convolution.weight.detach().float().cpu()
    filters, channels, height, width = weight.shape
    extreme = float(weight.abs().max()) or 1.0
    title = f"layer {name}: {filters} filters of {channels}x{height}x{width}"
    if all_kernels:
        columns, tiles, title = channels, weight.flatten(0, 1), f"{title}; a row a filter, a column an input channel"
    elif channel is None and channels == 3:
        columns, title = 8, f"{title}, as colours (grey is 0, full brightness {extreme:.2g})"
        tiles = (weight / (2 * extreme) + 0.5).permute(0, 2, 3, 1)
    else:
        columns, tiles, title = 8, weight[:, channel or 0], f"{title}; input channel {channel or 0}"
    sheet = mosaic(tiles, columns)
    # Legible at the size of a screen, and for thousands of kernels at all.
    inches = 0.55 if not all_kernels else max(0.04 * max(height, width), min(0.55, 20 / max(filters, channels)))
    rows = math.ceil(len(tiles) / columns)
    figure = new_figure(max(6.5, columns * inches + 1.5), rows * inches * height / width + 1, title)
    draw_mosaic(figure, figure.subplots(), sheet, "weight", cmap=colormap("gray", "white"), vmin=-extreme, vmax=extreme)
    return figure


@torch.inference_mode()
def draw_activations(trained, name, convolution, image_set, index):
    """The feature maps of a convolution for one image, before what follows it."""
    maps = []
    # A ReLU in place would otherwise change what was caught.
    hook = convolution.register_forward_hook(lambda module, inputs, output: maps.append(output.clone()))
    one = image_set.select(torch.tensor([index]))
    try:
        logits = predict(trained.model, trained.loader(one.to(convolution.weight.device), 1).batches())
    finally:
        hook.remove()
    tiles = maps[0][0].float().cpu()
    columns, actual, answer = 8, one.classes[one.labels[0]], one.classes[logits.argmax()]
    title = f"layer {name}, {len(tiles)} feature maps of image {index}: {actual}, taken for {answer}"
    rows = math.ceil(len(tiles) / columns)
    figure = new_figure(11, max(3.5, rows * 0.95 + 1), title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 4))
    draw_image(left, one.images[0])
    left.set(title="the image", xticks=[], yticks=[])
    draw_mosaic(figure, right, mosaic(tiles, columns), "output of the convolution", cmap=colormap("cividis", "white"))
    return figure


def draw_comparison(rows):
    """Validation loss and accuracy of several runs on one pair of axes; a legend for the ten best."""
    figure = new_figure(13, 4.8, "validation, run by run")
    axes = curves_axes(figure)
    colours = [BLUE, ORANGE, "#009E73", "#CC79A7", "black"]
    for place, row in enumerate(rows):
        history = common.read_log(Path(row["run"])) if row["epochs"] else []
        look = {"color": "lightgrey", "linewidth": 1, "zorder": 1}
        if place < 10:
            look = {"color": colours[place % 5], "linestyle": "-" if place < 5 else "--", "label": legible(row["run"])}
        for axis, name in zip(axes, ("val_loss", "val_acc"), strict=True):
            marker = "." if len(history) < 40 else None
            axis.plot([line["epoch"] for line in history], [line[name] for line in history], marker=marker, **look)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------
# Pictures of a sweep
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

    import sweep as sweeps

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=sweeps.METRICS[sweep.search.metric])
    distributions = {p.name: sweeps.optuna_distribution(p) for p in varied}
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
            look = {"color": ORANGE, "linewidth": 2.5, "zorder": 3, "label": legible(line["run"])}
        for axis, name in zip(axes, ("val_loss", "val_acc"), strict=True):
            axis.plot([row["epoch"] for row in history], [row[name] for row in history], **look)
            if line["status"] != "finished":
                axis.plot(history[-1]["epoch"], history[-1][name], "x", color="black", markersize=5)
    if axes[0].get_legend_handles_labels()[1]:  # the best may have run on another machine
        axes[0].legend()
    return figure


# ---------------------------------------------------------------------------------------------------
# What the command does
# ---------------------------------------------------------------------------------------------------


def run_evaluate(args, screen):
    """Evaluate one run: the tables on the screen, metrics.json and the pictures in its directory or --out."""
    device, _ = common.choose_device(args)
    trained = load_trained(args.runs[0], device)
    name, convolution = find_convolution(trained.model, args.layer)
    if not convolution and (args.channel is not None or args.all_kernels):
        raise UsageError("--channel and --all-kernels: this model has no convolution")
    if args.channel is not None and args.channel >= convolution.weight.shape[1]:
        raise UsageError(f"--channel {args.channel}: layer {name} has {convolution.weight.shape[1]}, from 0")
    rows = common.read_log(trained.directory)
    recorded = trained.record["args"]
    tta, tta_below = (args.tta, 1.0) if args.tta else (recorded.get("tta"), recorded.get("tta_below", 1.0))
    if tta not in (None, *common.TTA) or not isinstance(tta_below, float):
        raise RunError(f"run.json of {trained.record['name']} is damaged: it has a tta of {tta!r} below {tta_below!r}")
    image_set = load_images(trained, args.split, args.data_dir)
    if args.image >= len(image_set):
        raise UsageError(f"--image {args.image}: the split has {len(image_set)} images, from 0")

    on_device, labels, names = image_set.to(device), image_set.labels, image_set.classes
    batches = lambda: trained.loader(on_device, args.batch_size).batches()  # noqa: E731
    logits = predict(trained.model, batches())
    confidence, predicted = answers(logits)
    metrics = measure(logits, labels, names)
    about = {"run": trained.record["name"], "dataset": trained.record["data"]["name"], "split": args.split}
    metrics = {**about, "epoch": trained.blueprint["epoch"], **metrics}
    if tta:
        augmented = measure(predict(trained.model, batches(), tta, tta_below), labels, names)
        metrics["tta"] = {
            "views": tta,
            "below": tta_below,
            **{key: augmented[key] for key in ("loss", "accuracy", "accuracy_interval")},
        }

    about["dataset"] = shorten(about["dataset"], 30)
    title = "{run}\n{split} split of {dataset}, {images:,} images, epoch {epoch}".format(**{**metrics, **about})
    sample = torch.randperm(len(labels), generator=common.generator_for("predictions"))[:40].tolist()
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:40].tolist()
    answered = (image_set, predicted.tolist(), confidence.tolist())
    figures = {
        "curves": draw_curves(trained, rows),
        "per_class": draw_per_class(metrics, title),
        "confusion": draw_confusion(metrics, title),
        "predictions": draw_images(*answered, sample, f"{title}; a random sample: true class and confidence"),
        "mistakes": draw_images(*answered, worst, f"{title}; the most confident mistakes"),
        "calibration": draw_calibration(metrics, title),
    }
    if convolution:
        figures["filters"] = draw_filters(name, convolution, args.channel, args.all_kernels)
        figures["activations"] = draw_activations(trained, name, convolution, image_set, args.image)
    text = json.dumps(metrics, indent=2)
    files = {f"{file}.png": render(figure) for file, figure in figures.items()}
    files["metrics.json"] = f"{text}\n".encode()
    out = args.out or trained.directory
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        common.write_atomically(out / file, content)

    if args.json:
        screen.say(text, result=True)
    elif args.csv:
        screen.say(as_csv(metrics["classes"]), result=True)
    else:
        status = status_of(trained.directory, trained.record)
        if status not in ("finished", "stopped_early"):
            screen.say(f"{trained.directory}: {status} after {trained.record['epochs']} epochs")
        screen.say(as_text(metrics, title))
        screen.say(f"{out}: {', '.join(files)}" + ("" if convolution else " (no convolution, so no filters.png)"))
    return metrics


def as_csv(rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().rstrip("\n")


def as_table(alignment, headings, rows):
    """Lines of columns as wide as their widest cell; `alignment` has `<` or `>` for each."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]


def as_text(metrics, title):
    """The tables for a person."""
    low, high = metrics["accuracy_interval"]
    lines = [
        title,
        f"accuracy {metrics['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}), loss {metrics['loss']:.4f}",
        f"macro F1 {metrics['macro_f1']:.4f}, weighted F1 {metrics['weighted_f1']:.4f}, "
        f"expected calibration error {metrics['expected_calibration_error']:.2%}",
    ]
    if "top5_accuracy" in metrics:
        lines.append(f"top-5 accuracy {metrics['top5_accuracy']:.2%}")
    if "tta" in metrics:
        lines.append(
            "with test-time augmentation ({views}): accuracy {accuracy:.2%}, loss {loss:.4f}".format(**metrics["tta"])
        )
    table = [
        [
            row["name"],
            str(row["support"]),
            *(f"{row[key]:.2%}" for key in ("accuracy", "precision")),
            f"{row['f1']:.4f}",
        ]
        for row in metrics["classes"]
    ]
    lines += ["", *as_table("<>>>>", ["class", "images", "accuracy = recall", "precision", "F1"], table)]
    never = [row["name"] for row in metrics["classes"] if not row["predicted"]]
    lines += [f"never predicted, so of precision 0: {', '.join(never)}"] * bool(never)
    pairs = confused_pairs(metrics, 10)
    if pairs:
        table = [[actual, guess, str(images), f"{share:.1%}"] for images, actual, guess, share in pairs]
        lines += ["", *as_table("<<>>", ["most confused: actual", "predicted", "images", "of the class"], table)]
    return "\n".join([*lines, ""])


def run_compare(args, screen):
    """Compare runs by what their directories say: no image is read, so the test set stays as unread as it was."""
    rows = []
    for directory in args.runs:
        record = common.read_record(directory)
        best, test = record["best"] or {}, record["test"] or {}
        rows.append({
            "run": str(directory), "dataset": record["data"]["name"], "selection": record["data"]["selection"],
            "model": record["args"]["model"], "parameters": record["parameters"], "epochs": record["epochs"],
            "best_epoch": best.get("epoch"), "val_loss": best.get("val_loss"), "val_acc": best.get("val_acc"),
            "test_acc": test.get("acc"), "seconds": record["seconds"], "status": status_of(directory, record),
        })  # fmt: skip
    rows.sort(key=lambda row: math.inf if row["val_loss"] is None else row["val_loss"])
    picture = render(draw_comparison(rows))
    out = args.out or args.runs[0].parent
    out.mkdir(parents=True, exist_ok=True)
    common.write_atomically(out / "compare.png", picture)

    if args.json:
        screen.say(json.dumps(rows, indent=2), result=True)
    elif args.csv:
        screen.say(as_csv(rows), result=True)
    else:

        def text(value, form):
            return "-" if value is None else format(value, form)

        table = [
            [
                row["run"], row["dataset"], row["model"], f"{row['parameters']:,}", str(row["epochs"]),
                text(row["val_loss"], ".4f") + "*" * (row["selection"] == "test set"), text(row["val_acc"], ".2%"),
                text(row["test_acc"], ".2%"), f"{row['seconds']:.0f}", row["status"],
            ]
            for row in rows
        ]  # fmt: skip
        headings = ["run", "dataset", "model", "parameters", "epochs", "val loss", "val acc", "test acc", "seconds"]
        lines = as_table("<<<>>>>>><", [*headings, "status"], table)
        if any(row["selection"] == "test set" for row in rows):
            lines.append("* measured on the test set, which chose the epoch (--val-size 0)")
        screen.say("\n".join([*lines, f"{out / 'compare.png'}"]))
    return {"runs": rows}


def run_predict(args, screen):
    """Print file, class and probability of the user's own images, in the order given; RunError if one is unreadable."""
    device, _ = common.choose_device(args)
    trained = load_trained(args.runs[0], device)
    files = []
    for path in args.predict:
        inside = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name[0] != ".")
        files += inside if path.is_dir() else [path]
    classes, failed, predictions = trained.blueprint["classes"], 0, []
    for start in range(0, len(files), args.batch_size):
        pixels, read = [], []
        for file in files[start : start + args.batch_size]:
            try:
                pixels.append(common.read_image(file, trained.blueprint["image_shape"]))
                read.append(file)
            except RunError as error:
                print(f"evaluate.py: error: {error}", file=sys.stderr)
                failed += 1
        if not read:
            continue
        image_set = common.ImageSet(torch.stack(pixels), torch.zeros(len(read), dtype=torch.long), classes).to(device)
        best = answers(predict(trained.model, trained.loader(image_set, len(read)).batches()))
        for file, probability, index in zip(read, *(part.tolist() for part in best), strict=True):
            one = {"file": str(file), "class": classes[index], "probability": probability}
            predictions.append(one)
            text = json.dumps(one) if args.json else f"{one['file']}\t{one['class']}\t{probability:.4f}"
            screen.say(text, result=True)
    if failed or not files:
        raise RunError(f"{failed} of {len(files)} files could not be read" if files else "no image files there")
    return {"predictions": predictions}


class WithPreprocessing(nn.Module):
    """uint8 images [N, C, H, W] to probabilities [N, K]."""

    def __init__(self, trained):
        super().__init__()
        self.model = trained.model.to(memory_format=torch.contiguous_format)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(trained.blueprint[name]).view(-1, 1, 1))

    def forward(self, images):
        return self.model((images.float() / 255 - self.mean) / self.std).softmax(1)


def to_torch_export(program, classes):
    """The bytes of model.pt2, with the class names in classes.json inside, and what they compute when loaded."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"classes.json": json.dumps(classes)})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def to_onnx(program, classes):
    """The bytes of model.onnx, with the class names as metadata, and what they compute when loaded."""
    import onnxruntime

    exported = torch.onnx.export(program, input_names=["images"], output_names=["probabilities"], verbose=False)
    exported.model.metadata_props["classes"] = json.dumps(classes)
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# Kind: the file, what writes it, and the packages that this needs.
EXPORTS = {
    "torch.export": ("model.pt2", to_torch_export, ()),
    "onnx": ("model.onnx", to_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def run_export(args, screen):
    """Write the model with its preprocessing as a file of another kind; kept only if it answers as the model does."""
    file, convert, packages = EXPORTS[args.export]
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise RunError(f"--export {args.export} needs more packages: pip install {' '.join(missing)}")
    trained = load_trained(args.runs[0], torch.device("cpu"))
    model = WithPreprocessing(trained).eval()
    shape = trained.blueprint["image_shape"]
    # Noise of rising contrast: at full contrast alone a model can be so sure of itself that nothing is compared.
    noise = torch.rand(5, *shape, generator=common.generator_for("export"))
    images = (noise * torch.linspace(0, 255, 5).view(-1, 1, 1, 1)).byte()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    content, exported = convert(program, trained.blueprint["classes"])
    with torch.inference_mode():
        difference = max(float((exported(some) - model(some)).abs().max()) for some in (images, images[:1]))
    if not difference < 1e-4:
        raise RunError(f"the exported model's probabilities differ from the model's by {difference:.2g}: not kept")
    out = args.out or trained.directory
    out.mkdir(parents=True, exist_ok=True)
    common.write_atomically(out / file, content)
    takes = f"uint8 images [N, {', '.join(map(str, shape))}]"
    screen.say(f"{out / file}: {takes} to probabilities [N, K], within {difference:.1g} of the model")
    return {"file": str(out / file)}


def main(argv=None):
    """Do what `argv` says; return what metrics.json, the comparison or the predictions hold."""
    args = parse_arguments(argv)
    if args.mode == "sweep":
        import sweep

        return sweep.report(sweep.Sweep.open(args.runs[0]), common.Screen(args.quiet), complete=False)
    # The counts are to be the same for every batch size, on which the rounding to bf16 or TF32 depends.
    torch.backends.cudnn.allow_tf32 = False
    mode = {"evaluate": run_evaluate, "compare": run_compare, "predict": run_predict, "export": run_export}[args.mode]
    return mode(args, common.Screen(args.quiet))


if __name__ == "__main__":
    sys.exit(common.command_line(main))
