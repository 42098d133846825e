"""Show what a model has learnt: tables, pictures, a comparison of runs, predictions, exports.

    python evaluate.py runs/<run>                            # tables, pictures, report.html
    python evaluate.py runs/<run> --split val                # of validation images, in <run>/val
    python evaluate.py runs/a runs/b                         # compare runs, evaluated before
    python evaluate.py runs/fold-*                           # all folds: the mean, wrong labels
    python evaluate.py runs/<run> --predict photo.png album  # class and probability of images
    python evaluate.py runs/<run> --export onnx              # a file that takes uint8 images

A run directory is all it needs: best.pt holds the model and its preprocessing. It computes as the
run did, in the same precision, batches and number of threads. So on the same machine its figures
are those of run.json.

There are three steps, for one run as for a comparison: measure, draw, and write. A figure that is
added to `measure` is in the files, on the page and on the screen. A figure that is missing is NaN
or None until it is written: then it is nothing in CSV, null in JSON, and a dash for people.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import re
import shlex
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import records
from common import ImageSet
from records import RunError, UsageError, say, shown

import numpy as np
import torch
from pandas import DataFrame, Series, concat, crosstab, cut, json_normalize, read_csv
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:  # matplotlib takes long to import, so it waits until something is drawn
    from matplotlib.figure import Figure


# ------------------------ Options ------------------------
def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """The flags of this script. Exits with status 2 on a bad one."""
    parser = common.ArgumentParser(prog="evaluate.py", description=__doc__)
    path = common.given_path
    index = common.number(int, 0)
    count = common.number(int, 1)
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="run directory; several: compare"
    )

    def flag(usage, kind, text, **more):
        common.add_flag(group, usage, kind, text, **more)

    group = parser.add_argument_group("what is evaluated")
    flag(
        "--split",
        ("test", "val", "train"),
        "which images; of several runs, which predictions",
        default="test",
    )
    flag("--data-dir DIR", common.absolute_path, "where the data are now (as in training)")
    flag("--tta", common.TTA, "test-time augmentation, beside the plain figures (the run's own)")
    flag(
        "--device",
        ("auto", "cpu", "cuda", "mps"),
        "auto: a GPU where there is one",
        default="auto",
    )

    group = parser.add_argument_group("what comes out")
    flag("--out DIR", path, "directory for the files (the run's; of several runs the one above)")
    flag("--quiet", bool, "print only errors")
    group = group.add_mutually_exclusive_group()
    flag("--csv", bool, "print CSV: classes, runs or predictions")
    flag("--json", bool, "print JSON: metrics, runs or predictions")

    group = parser.add_argument_group("pictures")
    flag("--sample N", count, "images in predictions.png", default=40)
    flag("--layer NAME", str, "convolution of filters and feature maps (the first)")
    flag("--image K", index, "image of the feature maps", default=0)
    group = group.add_mutually_exclusive_group()
    flag("--channel K", index, "input channel of the filters (0; RGB in colour)")
    flag("--all-kernels", bool, "filters of every input channel")

    group = parser.add_argument_group("instead of evaluating")
    flag("--top K", count, "with --predict: the K likeliest classes of each image (1)")
    group = group.add_mutually_exclusive_group()
    flag("--predict PATH", path, "classify image files, and those in folders", nargs="+")
    flag(
        "--export",
        tuple(EXPORTS),
        "write the model, preprocessing included, as model.onnx or model.pt2",
    )

    args = parser.parse_args(argv)
    if args.top and not args.predict:
        parser.error("--top goes with --predict")
    if len(args.runs) > 1 and (args.predict or args.export):
        parser.error(f"--predict and --export take one run, not {len(args.runs)}")
    return args


def note(text: str, args: Namespace) -> None:
    """Print a remark on stderr, so that it does not get into a table that a program reads."""
    if not args.quiet:
        print(f"evaluate.py: {text}", file=sys.stderr)


# ------------------------ A trained model ------------------------
@dataclass
class Trained:
    """A run with the model of the epoch that it has kept.

    `record` is its run.json, `config` what best.pt holds beside the weights.
    """

    directory: Path
    record: dict
    config: dict
    model: nn.Module
    device: str
    autocast: Callable

    def evaluate(
        self, images: ImageSet, tta: str | None = None
    ) -> tuple[common.AverageMeter, Tensor]:
        """Loss and accuracy of the images, and the logits [N, K], float32, on the CPU."""
        images = images.to(self.device)
        loader = common.evaluation_loader(images, self.config["batch_size"], self.config)
        meter, logits = common.evaluate(
            self.model, loader, self.autocast, common.plain_criterion, tta
        )
        return meter, logits.cpu()

    def probabilities(self, logits: Tensor) -> Tensor:
        """The softmax [N, K] of the logits [N, K] at the run's temperature."""
        return (logits.double() / self.config["temperature"]).softmax(1)

    def as_images(self, pixels: Tensor) -> ImageSet:
        """Images, uint8 [N, C, H, W], of which nobody has said the classes."""
        return ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.long), self.config["classes"])


def read_run(directory: Path) -> dict:
    """run.json, with the arguments that an older run lacks, and the status as it is now.

    A run whose process has died holds no lock: it was killed. UsageError where there is no run,
    RunError where run.json is damaged.
    """
    record = records.read_record(directory)
    record["args"] = common.recorded_arguments(record)
    if record["status"] == "running" and not records.is_locked(directory / ".lock"):
        record["status"] = "killed"
    return record


def load_trained(directory: Path, args: Namespace) -> Trained:
    """The best model of a run.

    RunError where there is none, or the run still goes on; UsageError for --device.
    """
    # Is there one?
    record = read_run(directory)
    if record["status"] == "running":
        raise RunError(f"{shown(directory)} is still being trained; evaluate it when it has ended")

    # Compute as the training did; another number of threads rounds otherwise.
    device, _ = common.choose_device_and_precision(args.device, "fp32")
    precision = record["precision"]
    if device == "cpu" and precision == "fp16":
        precision = "fp32"
        note("fp16 needs a GPU: computed in fp32, the figures may differ from run.json's", args)
    torch.set_num_threads(record["threads"])
    common.keep_freed_memory(device)
    autocast = common.make_autocast(device, precision)

    # Build the model around its weights. Older runs lack the first two.
    path = directory / "best.pt"
    config = {"temperature": 1.0, "resize": "stretch", **records.load_checkpoint(path)}
    try:
        weights = config.pop("weights")
        model = common.build_model(config)
        model.load_state_dict(weights)
    except (LookupError, RuntimeError) as error:
        raise RunError(
            f"{shown(path)} does not fit the models of common.py ({type(error).__name__}: {error})"
        ) from error
    return Trained(directory, record, config, model.to(device).eval(), device, autocast)


def load_images(trained: Trained, split: str, asked: Namespace) -> ImageSet:
    """A split of the images that the run was trained on, on the CPU; `asked` is what the user asks
    for.

    RunError where they are missing, or are others.
    """
    # What the run says of them, and where they are now.
    directory = trained.directory
    record = trained.record
    where = shown(directory)
    args = Namespace(**record["args"])
    args.script = record["script"]
    args.typed = set()
    args.quiet = asked.quiet
    args.directory = directory
    args.listing = common.listing_of(directory, record)
    args.test = True
    args.device = "cpu"
    args.data_dir = asked.data_dir or Path(args.data_dir)
    if asked.data_dir and args.dataset not in common.DATASETS:
        args.dataset = str(asked.data_dir)

    # Are they there? Those of a dataset with a name would be downloaded.
    synthetic = None
    place = common.place_of_images(args)
    if place and not place.is_dir():
        raise RunError(f"the images of {where} are not in {place}; say where with --data-dir DIR")
    if args.dataset == "synthetic":
        if not importlib.util.find_spec(args.script):
            raise RunError(
                f"the images of {where} are drawn by {args.script}.py, which does not lie beside "
                "evaluate.py"
            )
        synthetic = importlib.import_module(args.script).synthetic

    # Read them. They must be those that the run had.
    wanted = ("test",) if split == "test" else ("train", "val")
    with contextlib.redirect_stdout(sys.stderr):  # remarks do not get into tables for programs
        data = common.load_data(args, synthetic, wanted)
    images = getattr(data, split)
    if not images:
        raise RunError(f"{where} has no {split} images of its own; try another --split")
    data.check(record["data"], place or args.dataset, directory)
    return images


def find_convolution(model: nn.Module, args: Namespace) -> tuple[str | None, nn.Conv2d | None]:
    """Name and layer of --layer, or of the first convolution; None, None if there is none.
    UsageError."""
    layers = model.named_modules()
    convolutions = {name: layer for name, layer in layers if isinstance(layer, nn.Conv2d)}
    name = args.layer or next(iter(convolutions), None)
    layer = convolutions.get(name)
    if args.layer and not layer:
        names = ", ".join(convolutions) or "none"
        raise UsageError(f"--layer {name}: the convolutions of this model are {names}")
    channels = layer.weight.shape[1] if layer else math.inf
    if (args.channel or 0) >= channels:
        raise UsageError(f"--channel {args.channel}: layer {name} has {channels}, from 0")
    return name, layer


# ------------------------ Measure ------------------------
CALIBRATION_BINS = 15
SHOWN_IMAGES = 40


class Gallery(NamedTuple):
    """Images that are shown together: `pixels` [N, C, H, W], the first of some `answers`, and what
    to write on each."""

    title: str
    pixels: Tensor
    answers: DataFrame
    captions: list[str]


@dataclass
class Evaluation:
    """What is measured of a run.

    `metrics` is the content of metrics.json, `answers` that of predictions.csv, a row an image.
    `galleries` are pictures of images by name.
    """

    trained: Trained
    images: ImageSet
    title: str
    metrics: dict
    answers: DataFrame
    galleries: dict[str, Gallery]


def measure(trained: Trained, images: ImageSet, args: Namespace) -> Evaluation:
    """Compute everything that is shown of a run."""
    # What the model answers, image by image.
    meter, logits = trained.evaluate(images)
    answers = answer_table(trained, images, logits)
    confidence = answers.predicted_probability
    correct = answers["class"] == answers.predicted

    # The figures. Each float gets a line in the table of results.
    names = images.classes
    confusion = confusion_of(answers, names)
    classes = class_metrics(confusion)
    metrics = {
        "run": trained.record["name"],
        "dataset": trained.record["data"]["name"],
        "split": args.split,
        "epoch": trained.config["epoch"],
        "images": len(images),
        "checksum": images.checksum,
        **meter_metrics(meter),
        "macro_f1": classes.f1.mean(),
        "weighted_f1": (classes.f1 * classes.support).sum() / len(images),
        "temperature": trained.config["temperature"],
        **calibration(confidence, correct),
        **calibration(logits.double().softmax(1).amax(1), correct, "_before"),
        "classes": classes,
        "confusion_matrix": confusion.to_numpy().tolist(),
    }
    if len(names) > 10:
        among_five = (logits.topk(5).indices == images.labels[:, None]).any(1)
        metrics["top5_accuracy"] = among_five.double().mean().item()

    # With averaged views, if the run or the user wants it.
    views = args.tta
    if args.split == "test":
        views = views or trained.record["args"]["tta"]
    if views:
        metrics["tta"] = {"views": views, **meter_metrics(trained.evaluate(images, views)[0])}

    # The images that are shown, and where the model looked when it was wrong.
    sample = answers.sample(min(args.sample, len(answers)), random_state=0)
    wrong = answers[~correct]
    worst = wrong.nlargest(SHOWN_IMAGES, "predicted_probability")
    heading = f"All {len(wrong)} mistakes, the most confident first"
    if len(wrong) > len(worst):
        heading = f"The {len(worst)} most confident of {len(wrong):,} mistakes"
    mistakes = gallery(heading, images, worst)
    galleries = {
        "predictions": gallery("A random sample: class and confidence", images, sample),
        "mistakes": mistakes,
    }
    seen = grad_cam(trained, mistakes.pixels, logits.argmax(1)[list(worst.index)])
    if seen is not None:
        heading = "Grad-CAM: where the model saw what it took them for"
        galleries["gradcam"] = mistakes._replace(title=heading, pixels=seen)
    if images.files:
        verdict = "the model finds unlikely"
        if args.split == "train":
            verdict += "; the model was trained on these labels"
        galleries["suspects"] = find_suspects(answers, images, verdict)
    dataset = shorten(Path(metrics["dataset"]).name, 30)
    title = (
        f"{shorten(metrics['run'], 60)}, epoch {metrics['epoch']}:\n"
        f"{len(images):,} {in_words(args.split)} images of {dataset}"
    )
    return Evaluation(trained, images, title, metrics, answers, galleries)


def answer_table(trained: Trained, images: ImageSet, logits: Tensor) -> DataFrame:
    """A row for each image: its `file` as in data.csv, or its index, its `class` and the
    `probability` of that, the `predicted` class and its probability."""
    names = np.array(images.classes)
    labels = images.labels
    probabilities = trained.probabilities(logits)
    confidence, predicted = probabilities.max(1)
    return DataFrame(
        {
            "file": [file.name for file in images.files or ()] or range(len(images)),
            "class": names[labels],
            "probability": probabilities[range(len(labels)), labels],
            "predicted": names[predicted],
            "predicted_probability": confidence,
        }
    )


def meter_metrics(meter: common.AverageMeter) -> dict:
    """Accuracy, the interval of that, and loss."""
    return {
        "accuracy": meter.accuracy,
        "accuracy_interval": wilson_interval(int(meter.correct), meter.images),
        "loss": meter.loss,
    }


def wilson_interval(correct: int, count: int) -> list[float]:
    """The 95% interval [low, high] of a share, E. B. Wilson's: sound near 0 and 1, and for few
    images. Without images, the share may be anything."""
    from scipy.stats import binomtest

    if not count:
        return [0.0, 1.0]
    return list(map(float, binomtest(correct, count).proportion_ci(method="wilson")))


def confusion_of(answers: DataFrame, names: list[str]) -> DataFrame:
    """How many images there are of each class, a row, that are taken for each, a column."""
    confusion = crosstab(answers["class"], answers.predicted)
    return confusion.reindex(index=names, columns=names, fill_value=0)


def class_metrics(confusion: DataFrame) -> DataFrame:
    """A row for each class, from counts with a row for each actual class, a column for each
    predicted one.

    What would divide by zero is NaN; so a class without images counts in no mean.
    """
    correct = np.diag(confusion)
    support = confusion.sum(axis=1)
    predicted = confusion.sum()
    recall = correct / support
    return DataFrame(
        {
            "support": support,
            "predicted": predicted,
            "accuracy": recall,
            "recall": recall,
            "accuracy_interval": list(map(wilson_interval, correct, support)),
            "precision": correct / predicted,
            "f1": (2 * correct / (support + predicted)).where(support > 0),
        }
    ).reset_index(names="name")


def calibration(confidence: Any, correct: Series, when: str = "") -> dict:
    """Images, mean confidence and accuracy in each of 15 bins of equal width, from `confidence` and
    `correct` [N]; and the expected calibration error. Their names end in `when`.

    C. Guo et al., "On calibration of modern neural networks" (2017).
    """
    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
    answers = DataFrame({"confidence": confidence, "accuracy": correct})
    groups = answers.groupby(cut(answers.confidence, edges), observed=False)
    bins = groups.mean().assign(low=edges[:-1], high=edges[1:], images=groups.size())
    gaps = (bins.confidence - bins.accuracy).abs() * bins["images"] / len(answers)
    return {f"expected_calibration_error{when}": gaps.sum(), f"calibration{when}": bins}


def find_suspects(answers: DataFrame, images: ImageSet, verdict: str) -> Gallery:
    """The images that may have a wrong label: of those that are taken for another class, the ones
    whose own class is least likely. `verdict` is who finds it unlikely, for the title.

    At most a tenth of all: three times the wrong labels that C. G. Northcutt, A. Athalye and J.
    Mueller found on average, "Pervasive label errors in test sets destabilize machine learning
    benchmarks" (2021).
    """
    answers = answers.assign(file=[str(file.path) for file in images.files])
    wrong = answers[answers["class"] != answers.predicted]
    suspects = wrong.nsmallest(math.ceil(len(answers) / 10), "probability")
    title = f"Suspects: {len(suspects):,} of {len(answers):,} images, whose class {verdict}"
    shown_ones = gallery(title, images, suspects.head(SHOWN_IMAGES), is_suspect=True)
    return shown_ones._replace(answers=suspects)  # all of them, for suspects.csv


def gallery(title: str, images: ImageSet, answers: DataFrame, is_suspect: bool = False) -> Gallery:
    """The images of some answers."""
    chosen = images.select(torch.tensor(answers.index, dtype=torch.long))
    captions = [caption(answer, is_suspect) for answer in answers.to_dict("records")]
    return Gallery(title, chosen.images, answers, captions)


def caption(answer: dict, is_suspect: bool) -> str:
    """Lines about an image: its class, and what is predicted how surely; of a suspect also how
    likely its class is, and the file."""
    name = shorten(answer["class"], 12)
    other = shorten(answer["predicted"], 12)
    confidence = f"({answer['predicted_probability']:.0%})"
    if is_suspect:
        file = Path(answer["file"]).name
        return f"{name} ({answer['probability']:.1%})\n{other}? {confidence}\n{file}"
    if answer["class"] == answer["predicted"]:
        return f"{name}\n{confidence}"
    return f"{name}, taken for\n{other} {confidence}"


def grad_cam(trained: Trained, images: Tensor, classes: Tensor) -> Tensor | None:
    """Where in each of the `images` [N, C, H, W] the model saw what speaks for its class of
    `classes` [N]: the images under a heatmap, uint8 [N, 3, H, W].

    The heatmap is the output of the last convolution, each channel weighted by its mean gradient:
    R. Selvaraju et al., "Grad-CAM" (2017). None without images, or where that is no map of them.
    """
    # Catch the output of each convolution, of which the last is taken.
    maps, heatmaps = [], []

    def catch(layer, inputs, output):
        # A convolution that cuts the image into patches, as a transformer's does, gives no map.
        # What follows gets a copy, as a ReLU may work in place.
        if isinstance(layer, nn.Conv2d) and min(output.shape[2:]) > 1:
            cuts_patches = layer.stride == layer.kernel_size != (1, 1)
            if not cuts_patches:
                maps.append(output)
                return output.clone()

    # Weigh it, eight images at a time, as the gradients of all take much memory.
    image_set = ImageSet(images, classes, trained.config["classes"]).to(trained.device)
    with nn.modules.module.register_module_forward_hook(catch):
        for pixels, labels in common.Loader(image_set, 8, trained.config).batches():
            maps.clear()
            scores = trained.model(pixels.requires_grad_()).gather(1, labels[:, None])
            if maps:
                (gradients,) = torch.autograd.grad(scores.sum(), maps[-1])
                weights = gradients.mean((2, 3), keepdim=True)
                heatmaps.append((weights * maps[-1].detach()).sum(1, keepdim=True).relu().cpu())
    if not heatmaps:
        return None

    # Lay them over the images in colours, from nothing to the most of each image.
    heat = nn.functional.interpolate(torch.cat(heatmaps), images.shape[2:], mode="bilinear")[:, 0]
    heat /= heat.amax((1, 2), keepdim=True).clamp(min=1e-12)
    colours = torch.from_numpy(colormap("inferno")(heat.numpy())[..., :3]).permute(0, 3, 1, 2)
    return (images * 0.45 + colours * 255 * 0.55).byte()


# ------------------------ Draw ------------------------
# Two of the colours of M. Okabe and K. Ito, told apart by the colour-blind; line styles and marks
# say the same in grey.
BLUE, ORANGE = "#0072B2", "#D55E00"
BEFORE = "before the temperature"


def draw(
    found: Evaluation, name: str | None, layer: nn.Conv2d | None, args: Namespace
) -> dict[str, Figure]:
    """The pictures of an evaluation by the names of their files, but for its galleries; the
    convolution `layer` is shown where there is one."""
    metrics, title = found.metrics, found.title
    figures = {
        "curves": draw_history(found.trained),
        "per_class": draw_classes(metrics, title),
        "confusion": draw_confusion(metrics, title),
        "calibration": draw_calibration(metrics, title),
    }
    if layer:
        figures["filters"] = draw_filters(name, layer, args)
        figures["activations"] = draw_activations(found, name, layer, args.image)
    return figures


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches, without pyplot, which has a global state and wants a display."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    # A class may be called $x$, or have a name whose characters matplotlib's own font lacks.
    wider = re.compile("Noto Sans (CJK|Arabic)|WenQuanYi|Arial Unicode|Microsoft YaHei|PingFang")
    fonts = ["DejaVu Sans", *filter(wider.match, sorted(get_font_names()))]
    matplotlib.rcParams.update(
        {
            "text.parse_math": False,
            "font.family": fonts,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )
    figure = Figure((width, height), dpi=100, layout="constrained")
    figure.suptitle(title)
    return figure


def render(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file; a character that no font has is a box in it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer)
    return buffer.getvalue()


def colormap(name: str):
    """A colour map that shows NaN in grey."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad="lightgrey")


def shorten(name: str, length: int = 24) -> str:
    """A name for a picture: cut to `length`, and without bytes that are no characters, at which
    matplotlib fails."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= length else f"{name[: length - 1]}…"


def label_epochs(ax, label: str) -> None:
    """Prepare the axes of curves of `label` over epochs."""
    ax.set(xlabel="epoch", ylabel=label)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    ax.grid(alpha=0.3)


def curves_axes(figure):
    """Two axes, of loss and of accuracy, over epochs."""
    from matplotlib.ticker import PercentFormatter

    axes = figure.subplots(1, 2)
    losses, accuracies = axes
    label_epochs(losses, "loss per image")
    label_epochs(accuracies, "accuracy")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))  # decimals as the ticks need them
    return axes


def plot_history(axes, directory: Path, part: str, **look) -> None:
    """Draw loss and accuracy of the `part` train or val of a run."""
    rows = records.read_log(directory) if (directory / "log.jsonl").exists() else []
    epochs = [row["epoch"] for row in rows]
    for ax, name in zip(axes, ("loss", "acc"), strict=True):
        (line,) = ax.plot(epochs, [row[f"{part}_{name}"] for row in rows], marker=".", **look)
    # The last line is that of the accuracies, whose axis ends at 100%.
    line.sticky_edges.y.append(1)


def draw_history(trained: Trained) -> Figure:
    """Loss and accuracy of training and validation, epoch by epoch."""
    record = trained.record
    best = trained.config
    about = f"{record['args']['model']} on {shorten(Path(record['data']['name']).name, 30)}"
    figure = new_figure(11, 4.2, f"{shorten(record['name'], 60)}: {about}")
    axes = curves_axes(figure)
    plot_history(axes, trained.directory, "train", color=ORANGE, linestyle="--", label="training")
    plot_history(axes, trained.directory, "val", color=BLUE, label=record["data"]["selection"])
    for ax, name in zip(axes, ("val_loss", "val_acc"), strict=True):
        # best.pt's figures, not run.json's: they are of these weights, also after a kill.
        label = f"{record['args']['keep']}: {best['epoch']}"
        ax.plot(best["epoch"], best[name], "k*", markersize=13, label=label)
        if record["status"] == "stopped_early":
            last = record["epochs"]
            ax.axvline(last, color="black", linestyle=":", label=f"early stop: {last}")
        ax.legend()
    return figure


def draw_classes(metrics: dict, title: str) -> Figure:
    """Accuracy of each class that has images, highest first, with its 95% interval."""
    # A bar for each class with its interval, and a line for all of them.
    classes = metrics["classes"].query("support > 0").sort_values("accuracy", kind="stable")
    places = range(len(classes))
    figure = new_figure(8, 2 + 0.2 * len(classes), title)
    ax = figure.subplots()
    ax.barh(places, classes.accuracy, color=BLUE)
    ax.hlines(places, *zip(*classes.accuracy_interval, strict=True), color="black")
    everything = f"all images: {metrics['accuracy']:.2%}"
    ax.axvline(metrics["accuracy"], color="black", linestyle="--", label=everything)

    # Names and percentages.
    accuracies = classes.accuracy.map("  {:.1%}".format)
    ax.set_yticks(places, classes["name"].map(shorten) + accuracies, fontsize=8)
    ax.set(xlabel="accuracy within the class (recall), with 95% interval", xlim=(0, 1))
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def draw_confusion(metrics: dict, title: str) -> Figure:
    """Heatmaps of counts, recall (each row sums to 100%) and precision (each column does), with
    numbers where there is room for them."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    # The three matrices; what would divide by zero is NaN.
    counts = DataFrame(metrics["confusion_matrix"])
    panels = {
        "counts": counts,
        "recall:\npercent of the actual class": 100 * counts.div(counts.sum(axis=1), axis=0),
        "precision:\npercent of the predicted class": 100 * counts / counts.sum(),
    }

    # Inches for names and numbers. The more classes there are, the smaller are their names.
    names = metrics["classes"]["name"].map(shorten)
    places = range(len(counts))
    side = min(2 + 0.25 * len(names), 13)
    look = {"labels": names, "fontsize": min(10, 60 * side / len(names))}
    figure = new_figure(3 * side + 7, side + 3, title)

    # Draw each. The square root shows the errors beside a diagonal that is many times larger.
    for ax, (heading, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        norm = PowerNorm(0.5, 0, None if values is counts else 100)
        image = ax.imshow(values, cmap=colormap("Blues"), norm=norm)
        bar = figure.colorbar(image, ax=ax, fraction=0.046, format="{x:,.0f}")
        bar.locator = MaxNLocator(6, integer=True)
        ax.set_xticks(places, rotation=90, **look)
        ax.set_yticks(places, **look)
        ax.set(title=heading, xlabel="predicted class", ylabel="actual class")
        if len(names) <= 20:
            for (row, column), value in values.stack().dropna().items():
                text = f"{value:.1f}".removesuffix(".0")
                colour = "white" if norm(value) > 0.6 else "black" if value else "silver"
                ax.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    return figure


def draw_gallery(images: Gallery, title: str) -> Figure:
    """Images as they were before normalisation, framed where the model is wrong."""
    columns = 8
    height = 1.3  # of a cell of width 1
    rows = math.ceil(len(images.captions) / columns) or 1
    figure = new_figure(11.6, 1.9 * rows + 0.9, f"{title}\n{images.title}")
    ax = figure.subplots()  # one for all: forty take seconds
    ax.set_axis_off()
    are_wrong = images.answers["class"] != images.answers.predicted
    shown_ones = zip(images.pixels, images.captions, are_wrong, strict=False)  # not all suspects
    for place, (pixels, words, is_wrong) in enumerate(shown_ones):
        # The image, and a frame around it.
        left = place % columns + 0.05
        top = place // columns * height + 0.35
        draw_image(ax, pixels, extent=(left, left + 0.9, top + 0.9, top))
        colour = ORANGE if is_wrong else "black"
        if is_wrong:
            ax.bar(left, 0.9, 0.9, top, align="edge", fill=False, edgecolor=colour, linewidth=3)

        # The words above it; the names of files differ at their ends.
        lines = "\n".join(shorten(line[-23:]) for line in words.splitlines())
        ax.text(left + 0.45, top - 0.04, lines, ha="center", fontsize=7, color=colour)
    ax.set(xlim=(0, columns), ylim=(rows * height, 0))
    return figure


def draw_image(ax, pixels: Tensor, vmin: float = 0, vmax: float = 255, **options):
    """An image [1 or 3, H, W] on an axis, pixel by pixel; NaN is white."""
    ax.set_axis_off()
    return ax.imshow(pixels.permute(1, 2, 0).numpy(), vmin=vmin, vmax=vmax, **options)


def draw_calibration(metrics: dict, title: str) -> Figure:
    """Accuracy against confidence, and how often each confidence occurs."""
    # Accuracy, and where it was before the temperature.
    figure = new_figure(8, 6.5, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = metrics["calibration"].dropna()
    before = metrics["calibration_before"].dropna()
    look = {"width": 1 / CALIBRATION_BINS, "align": "edge", "color": BLUE, "edgecolor": "white"}
    above.bar(bins.low, bins.accuracy, label="accuracy", **look)
    above.plot(bins.confidence, bins.accuracy, "k.")
    heading = f"expected calibration error {metrics['expected_calibration_error']:.2%}"
    if metrics["temperature"] != 1:
        heading += f" (before: {metrics['expected_calibration_error_before']:.2%})"
        above.plot(before.confidence, before.accuracy, "kD", mfc="white", label=BEFORE)
    above.plot([0, 1], [0, 1], "--", color=ORANGE, label="perfectly calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=heading)
    above.yaxis.set_major_formatter("{x:.0%}")
    above.legend()

    # How many images there are.
    below.bar(bins.low, bins["images"], **look)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    below.set(yscale="log", ylim=(0.5, None))
    below.minorticks_off()
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.xaxis.set_major_formatter("{x:.0%}")
    return figure


def draw_tiles(ax, tiles: Tensor, columns: int, label: str, **scale) -> None:
    """`tiles` [N, 1 or 3, H, W] in rows of `columns`: in colour, or with a scale beside them."""
    from torchvision.utils import make_grid

    channels = tiles.shape[1]
    sheet = make_grid(tiles, columns, padding=1, pad_value=1 if channels == 3 else math.nan)
    image = draw_image(ax, sheet[:channels], **scale)
    if channels == 1:
        ax.figure.colorbar(image, ax=ax, label=label, fraction=0.04)


def draw_filters(name: str, layer: nn.Conv2d, args: Namespace) -> Figure:
    """The kernels of a convolution: in RGB, of one input channel, or of each, a row a filter."""
    # The tiles; of one channel or in colour, eight in a row.
    weight = layer.weight.detach().float().cpu()
    filters, channels, height, width = weight.shape
    extreme = weight.abs().max().item() or 1.0
    channel = args.channel or 0
    columns = 8
    tiles = weight[:, [channel]]
    about = f"input channel {channel}"
    if args.all_kernels:
        columns = channels
        tiles = weight.reshape(-1, 1, height, width)
        about = "a row a filter, a column a channel"
    elif args.channel is None and channels == 3:
        tiles = weight / (2 * extreme) + 0.5
        about = f"as colours: black is {-extreme:.2g}, grey 0, white {extreme:.2g}"

    # The picture, in which a tile has half an inch, or what there is room for.
    inches = max(0.04 * width, min(0.55, 20 / columns))
    rows = math.ceil(len(tiles) / columns) * height / width
    title = f"layer {name}: {filters} filters of {channels}x{height}x{width}\n{about}"
    figure = new_figure(max(6.5, columns * inches + 1.5), rows * inches + 1, title)
    draw_tiles(figure.subplots(), tiles, columns, "weight", vmin=-extreme, vmax=extreme)
    return figure


def draw_activations(found: Evaluation, name: str, layer: nn.Conv2d, index: int) -> Figure:
    """The feature maps of a convolution for the image `index`, before what follows it."""
    # A ReLU in place would otherwise change what was caught.
    maps = []
    one = found.images.select(torch.tensor([index]))
    with layer.register_forward_hook(lambda layer, inputs, output: maps.append(output.clone())):
        found.trained.evaluate(one)
    tiles = maps[0][0][:, None].float().cpu()

    # The image, and the maps beside it.
    answer = found.answers.loc[index]
    title = (
        f"layer {name}, {len(tiles)} feature maps of image {index}: {shorten(answer['class'])}, "
        f"classified as {shorten(answer.predicted)}"
    )
    figure = new_figure(11, max(3.5, math.ceil(len(tiles) / 8) * 0.95 + 1), title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 4))
    draw_image(left, one.images[0])
    draw_tiles(right, tiles, 8, "output of the convolution", cmap="cividis", vmin=None, vmax=None)
    return figure


# ------------------------ Write ------------------------
CLASS_COLUMNS = ["name", "support", "accuracy", "precision", "f1"]

# How a number is written, by the first of these patterns that is found in its name.
FORMATS = {
    "mid_p": ".3g",
    "difference|pair_low|pair_high": "+.2%",
    "loss|f1|temperature": ".4f",
    "seconds": ".0f",
    "share": ".1%",
    "": ".2%",
}
WORDS = {
    "acc": "accuracy",
    "val": "validation",
    "train": "training",
    "f1": "F1",
    "support": "images",
    "name": "class",
    "before": BEFORE,
    "sd": "deviation",
    "low": "95% interval",
}


def as_text(value: Any, name: str) -> str:
    """A value for a person, by the name that it has in a table or in a file."""
    if isinstance(value, float):
        return format(value, next(FORMATS[words] for words in FORMATS if re.search(words, name)))
    return f"{value:,}" if type(value) is int else str(value)


def in_words(name: str) -> str:
    """A name from a file as a person would write it."""
    words = re.sub("^(pair|seed|fold)_", "", name).split("_")
    return " ".join(WORDS.get(word, word) for word in words)


def for_people(table: DataFrame) -> DataFrame:
    """A table as texts, with headings in plain words, and a dash for what is missing. The two ends
    of an interval, NAME_low and NAME_high, are one column."""
    texts = DataFrame()
    for name, values in table.items():
        write = functools.partial(as_text, name=name)
        texts[name] = values.map(write, na_action="ignore").astype(object)
        if name.endswith("_high"):
            texts[name.replace("_high", "_low")] += " to " + texts.pop(name)
    return texts.fillna("-").rename(columns=in_words)


def as_lines(tables: dict[str, DataFrame]) -> list[str]:
    """Tables of texts for the screen: the first column to the left, the others to the right."""
    lines = []
    for table in filter(len, tables.values()):
        first = table.columns[0]
        table = table.set_index(first).rename_axis(index=None, columns=first)
        lines += [*table.to_string().splitlines(), ""]
    return lines


def as_rows(table: DataFrame) -> list[dict]:
    """The rows of a table as plain values, with None where there is none."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def as_json(content: Any) -> str:
    """JSON of plain values and of tables."""
    return json.dumps(content, indent=2, default=as_rows)


def as_csv(rows: list[dict] | DataFrame, heading: bool = True) -> str:
    """Rows as CSV."""
    return DataFrame(rows, dtype=object).to_csv(index=False, header=heading, lineterminator="\n")


def as_png(pixels: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as the bytes of a PNG file."""
    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(pixels).save(buffer, "png")
    return buffer.getvalue()


def as_page(title: str, remarks: list[str], tables: dict, pictures: dict, **more) -> bytes:
    """The page report.html.jinja, which needs no other file. `tables` are {heading: texts},
    `pictures` {name: bytes of a PNG}."""
    import jinja2

    source = (records.HERE / "report.html.jinja").read_text()
    page = jinja2.Template(source, autoescape=True, trim_blocks=True)
    page.globals.update(as_png=as_png, as_text=as_text, b64encode=base64.b64encode)
    text = page.render(title=title, remarks=remarks, tables=tables, pictures=pictures, **more)
    return text.encode(errors="replace")


def write_files(out: Path, files: dict[str, bytes]) -> None:
    """Write the files, {name: content}, into a directory, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        records.write_atomically(out / name, content)


def publish(args: Namespace, page: Path, figures: dict, files: dict, content: dict) -> None:
    """Write the page, with the `content` of as_page, and into its directory the figures, the
    galleries and the other files. Print for a person what is on the page."""
    # The pictures, and what may have a wrong label.
    title = content["title"]
    remarks = content["remarks"]
    galleries = content["galleries"]
    figures |= {name: draw_gallery(images, title) for name, images in galleries.items()}
    pictures = {name: render(figure) for name, figure in figures.items()}
    if "suspects" in galleries:
        files = {"suspects.csv": as_csv(galleries["suspects"].answers), **files}
        remarks.append(galleries["suspects"].title)

    # The files; a name in them may have bytes that are no characters.
    written = {f"{name}.png": png for name, png in pictures.items()}
    written[page.name] = as_page(pictures=pictures, **content)
    for name, text in files.items():
        written[name] = text.encode(errors="surrogateescape")
    write_files(page.parent, written)

    # The screen.
    lines = [*as_lines(content["tables"]), title, *remarks]
    lines.append(f"{shown(page.parent)}: {', '.join(written)}")
    say("\n".join(lines), args.quiet or args.csv or args.json)


def directory_of(run: Path, split: str) -> Path:
    """The directory of what is made of a split of a run."""
    return run if split == "test" else run / split


def write(found: Evaluation, figures: dict[str, Figure], args: Namespace) -> None:
    """Put an evaluation into files, on one page and on the screen."""
    trained = found.trained
    metrics = found.metrics
    record = trained.record
    content = {
        "title": found.title,
        "remarks": remarks_on(trained, figures),
        "tables": {
            "Results": results_of(metrics),
            "Classes": for_people(metrics["classes"][CLASS_COLUMNS]),
            "Most confused": for_people(most_confused(found.answers)),
        },
        "galleries": found.galleries,
        "record": record,
        "command": shlex.join(["python", f"{record['script']}.py", *record.get("argv", [])]),
    }
    # Last comes metrics.json, which says of what the other files are.
    files = {"predictions.csv": as_csv(found.answers), "metrics.json": f"{as_json(metrics)}\n"}
    out = args.out or directory_of(trained.directory, args.split)
    publish(args, out / "report.html", figures, files, content)


def results_of(metrics: dict) -> DataFrame:
    """The numbers among the metrics, and the intervals that they have. Those of averaged views come
    first, as the test's accuracy in run.json is theirs."""
    rows = []
    averaged = metrics.get("tta", {})
    views = f" with test-time augmentation, {averaged.get('views')}"
    unfitted = "temperature|before" if metrics["temperature"] == 1 else "^$"
    for figures, more in ((averaged, views), (metrics, "")):
        for name, value in figures.items():
            if isinstance(value, float) and not re.search(unfitted, name):
                ends = [as_text(end, name) for end in figures.get(f"{name}_interval", [])]
                rows.append([in_words(name) + more, as_text(value, name), " to ".join(ends)])
    return DataFrame(rows, columns=["result", "value", "95% interval"])


def most_confused(answers: DataFrame) -> DataFrame:
    """The ten most frequent mistakes."""
    table = answers.value_counts(["class", "predicted"]).reset_index(name="images")
    supports = table.groupby("class")["images"].transform("sum")
    table["share_of_class"] = table["images"] / supports
    return table[table["class"] != table.predicted].head(10)


FLATTERED = "the test set validated (--val-size 0), which flatters its figures"


def remarks_on(trained: Trained, figures: dict) -> list[str]:
    """What is to be known before the figures of a run are believed."""
    record = trained.record
    remarks = []
    if record["status"] not in COMPLETED:
        where = shown(trained.directory)
        remarks.append(f"{where}: {record['status']} after {record['epochs']} epochs")
    if record["data"]["selection"] == "test set":
        remarks.append(FLATTERED)
    if "filters" not in figures:
        remarks.append("no convolution, so no filters.png")
    return remarks


# ------------------------ Compare runs ------------------------
COMPLETED = ("finished", "stopped_early")
# What two runs may differ in, and still be equal but for the seed and the fold.
ELSEWHERE = {"threads", "device", "run_name", "runs_dir", "data_dir", "wandb", "wandb_project"}
ELSEWHERE |= {"mean", "std"}
# What is compared: its place in run.json, and its name. The table of runs ends with the status.
COMPARED = {
    "run": "run",
    "rank": "rank",
    "data.name": "dataset",
    "args.model": "model",
    "parameters": "parameters",
    "epochs": "epochs",
    "best.val_loss": "val_loss",
    "best.val_acc": "val_acc",
    "test.acc": "test_acc",
    "args.tta": "test_time_augmentation",
    "data.selection": "validated_on",
    "seconds": "seconds",
    "status": "status",
    "script": "script",
    "args.fold": "fold",
    "seed": "seed",
    "best.epoch": "best_epoch",
    "test.plain_acc": "plain_test_acc",
    "data.val_checksum": "val_images",
}
PAIR_COLUMNS = [
    "pair_with",
    "pair_images",
    "pair_only_this_right",
    "pair_only_other_right",
    "pair_difference",
    "pair_low",
    "pair_high",
    "pair_mid_p",
]


def compare(args: Namespace) -> DataFrame:
    """Compare runs by what their directories say: a row for each.

    Only for folds images are read, and those of a test never. UsageError, RunError.
    """
    # Measure.
    runs, remarks = rank_and_pair(measure_runs(args), args.split)
    once = runs[runs.status.isin(COMPLETED)].drop_duplicates(["equal", "seed", "fold"])
    paired = runs.dropna(subset="pair_with")
    tables = {
        "Runs": for_people(runs.loc[:, :"status"]),
        "Where they differ": different_flags(runs),
        f"Image by image, {args.split} images": for_people(paired[["run", *PAIR_COLUMNS]]),
    }
    folds = once[once.fold != ""]
    parts = folds.fold.str.split("/").str[1]  # a third and a fifth overlap
    for argument, groups in (
        ("seed", once.groupby(["equal", "fold"])),
        ("fold", folds.groupby(["equal", "seed", parts])),
    ):
        means = average(groups, argument)
        table = means.drop_duplicates(f"{argument}_runs")
        tables[f"Equal but for the {argument}"] = for_people(table)
        runs = runs.join(means.drop(columns="model"))

    # What cannot be compared, and why.
    for column, what in (
        ("not_ranked", "not ranked with the others"),
        ("not_paired", "not compared image by image"),
    ):
        for reason, names in runs.groupby(column).run:
            text = ", ".join(names) if len(names) <= 5 else f"{len(names)} runs"
            remarks.append(f"{what}, as {reason}: {text}")
    flattered = ", ".join(runs[runs.validated_on == "test set"].run)
    if flattered:
        remarks.append(f"{FLATTERED}: {flattered}")
    if len(paired):
        remarks.append("one in twenty pairs of equally good models has a mid-p below 0.05")

    # Of the first folds that are complete, how each class does, and what may have a wrong label.
    galleries = {}
    for _, group in runs.groupby("fold_runs"):
        parts = int(group.fold.iloc[0].split("/")[1])
        if len(group) < parts:
            remarks.append(f"{len(group)} of {parts} folds: with all, wrong labels are looked for")
        elif group.record.iloc[0]["data"].get("files") and not galleries:
            try:
                answers, images = judge_out_of_fold(group, args)
            except RunError as error:  # the other runs can be compared without images
                remarks.append(f"wrong labels are not looked for: {error}")
                continue
            classes = class_metrics(confusion_of(answers, images.classes))
            tables["Classes, over all folds"] = for_people(classes[CLASS_COLUMNS])
            verdict = "a run that was not trained on them finds unlikely"
            galleries["suspects"] = find_suspects(answers, images, verdict)

    # Draw, and write.
    content = {
        "title": f"{len(runs)} runs",
        "remarks": remarks,
        "tables": tables,
        "galleries": galleries,
    }
    out = args.out or args.runs[0].absolute().parent
    figures = {"compare": draw_comparison(runs)}
    publish(args, out / "compare.html", figures, {}, content)
    return runs.drop(columns=["record", "equal", "val_images"])


def measure_runs(args: Namespace) -> DataFrame:
    """A row for each run: its `record`, run.json, what is `equal` in runs that differ in seed or
    fold alone, and what is compared. UsageError, RunError where there is none."""
    # Read them, each once: the `best` of a search is one of its trials.
    found = []
    for directory in {path.resolve(): path for path in args.runs}.values():
        if directory.is_file():
            continue  # `runs/*` names pictures and pages, too
        try:
            found.append({"run": str(directory), **read_run(directory)})
        except (UsageError, RunError) as error:
            if not directory.exists():
                raise
            note(f"skipped: {error}", args)  # it names searches, too
    if not found:
        raise RunError("none of these is a run directory")

    # Take out of each what is compared.
    table = json_normalize(found, max_level=1).reindex(columns=list(COMPARED))
    runs = table.rename(columns=COMPARED).assign(
        record=found, equal=list(map(configuration, found))
    )
    runs["plain_test_acc"] = runs.plain_test_acc.fillna(runs.test_acc)
    return runs.fillna({"fold": ""}).astype({"best_epoch": "Int64"})


def different_flags(runs: DataFrame) -> DataFrame:
    """The flags that are not the same in all runs; empty where there are none."""
    table = DataFrame([run["args"] for run in runs.record], dtype=object).fillna("-").map(str)
    names = [name for name in table if table[name].nunique() > 1 and name not in ELSEWHERE]
    flags = table[names].rename(columns=common.as_flag)
    flags.insert(0, "run", list(runs.run))
    return flags if names else DataFrame()


def configuration(record: dict) -> int:
    """A number that runs have in common that are equal but for the seed and the fold."""
    ignored = ELSEWHERE | {"seed", "fold"}
    args = {name: value for name, value in record["args"].items() if name not in ignored}

    # The same images, however they are divided. With --limit-train, folds may differ by one.
    images = record["data"]["train"]
    if not args["limit_train"]:
        images += record["data"]["val"]
    with contextlib.suppress(RunError):  # a data.csv that was changed says nothing
        listing = common.listing_of(Path(record["run"]), record)
        if listing:
            files = common.read_csv(listing, Path())
            images = sorted((f.name, f.label, f.sha256, f.part == "test") for f in files)
            del args["dataset"]  # wherever they are
    return common.random_seed(record["script"], images, sorted(args.items()))


def rank_and_pair(runs: DataFrame, split: str) -> tuple[DataFrame, list[str]]:
    """Sort the runs of each dataset, and of each fold of it, number those that can be compared,
    best first, and compare them with the best image by image. Also returns remarks."""
    parts, remarks = [], []
    for (dataset, _), part in runs.groupby(["dataset", "fold"]):
        # Compare with a run that was validated on the same images as most. One without an epoch
        # has nothing to compare.
        counts = part.val_images.map(part.val_images.value_counts(dropna=False))
        reference = counts.where(part.val_loss.notna(), 0).idxmax()
        why_not = functools.partial(common.why_not_comparable, part.record[reference])
        part["not_ranked"] = [why_not(run, "val_acc") or None for run in part.record]
        ranked = part[part.not_ranked.isna() & part.val_loss.notna()]

        # Rank by the losses, or by the accuracies where the losses are of different things.
        figures = ranked.val_loss
        reason = max((why_not(run, "val_loss") for run in ranked.record), default="")
        if reason:
            figures = -ranked.val_acc
            remarks.append(f"{dataset}: {reason}, so they are ranked by validation accuracy")
        part["rank"] = figures.rank(method="first").astype("Int64")
        part = part.sort_values("rank", kind="stable")
        parts.append(part.join(measure_pairs(part, split)))
    return concat(parts), list(dict.fromkeys(remarks))


def average(groups: Any, argument: str) -> DataFrame:
    """A row for each run of a group, whose runs differ in `argument` alone: mean and standard
    deviation of the group's accuracies, and Student's 95% interval of the mean, from three runs
    on."""
    from scipy.stats import t

    count = groups.run.transform("size")
    names = groups.run.transform(", ".join)
    model = groups.model.transform("first")
    table = DataFrame({f"{argument}_runs": names, "model": model, f"{argument}s": count})
    start = "" if argument == "seed" else f"{argument}_"
    for name in ("val_acc", "test_acc"):
        mean, deviation = (groups[name].transform(how, skipna=False) for how in ("mean", "std"))
        half = t.ppf(0.975, (count - 1).where(count > 2)) * deviation / count**0.5
        figures = {"mean": mean, "sd": deviation, "low": mean - half, "high": mean + half}
        table = table.join(DataFrame(figures).clip(0, 1).add_prefix(f"{start}{name}_"))
    return table[count > 1].astype({f"{argument}s": "Int64"})


def measure_pairs(runs: DataFrame, split: str) -> DataFrame:
    """How each run does, image by image, against the first that was evaluated, which is the best;
    without averaged views. A row for each run with a pair, or with a reason why there is none."""
    rows: dict[int, dict] = {}
    best = None
    for run in runs.itertuples():
        # It has to have been evaluated on the same images.
        try:
            right = read_evaluation(run, split)
            best = best or (run.run, right)
            best_run, best_right = best
            if not right.index.equals(best_right.index):
                raise RunError(f"evaluated on other {split} images than {best_run}")
        except RunError as error:
            if not (run.fold and split == "test"):  # a fold has no test images
                rows[run.Index] = {"not_paired": str(error)}
            continue

        # How often is the one right where the other is wrong?
        if best_run != run.run:
            one = int((right > best_right).sum())
            other = int((right < best_right).sum())
            figures = paired_difference(one, other, len(right))
            values = best_run, len(right), one, other, *figures
            rows[run.Index] = dict(zip(PAIR_COLUMNS, values, strict=True))
    columns = [*PAIR_COLUMNS, "not_paired"]
    return DataFrame(list(rows.values()), list(rows), columns, object)  # counts stay whole numbers


def read_evaluation(run: Any, split: str) -> Series:
    """Whether the run was right about each image that it was evaluated on. The index is the image's
    file with the checksum of all images. RunError where the evaluation is of no use."""
    # Was it evaluated with the weights that it has now?
    directory = directory_of(Path(run.run), split)
    if not (directory / "metrics.json").exists():
        raise RunError(f"not evaluated on the {split} images")
    metrics = records.read_json(directory / "metrics.json")
    if metrics.get("epoch") != (run.record["best"] or {}).get("epoch"):
        raise RunError("trained on since the evaluation")

    # Read it. A class may be called NA.
    path = directory / "predictions.csv"
    columns = ["file", "class", "predicted"]
    plain = {"dtype": str, "keep_default_na": False, "encoding_errors": "surrogateescape"}
    try:
        answers = read_csv(path, usecols=columns, **plain)
        if len(answers) != metrics["images"]:
            raise ValueError("another number of images")
        answers = answers.set_index(answers.file + metrics["checksum"]).sort_index()
    except (ValueError, LookupError, OSError) as error:
        raise RunError(f"{shown(path)} is damaged") from error
    return answers["class"] == answers.predicted


def paired_difference(one: int, other: int, images: int) -> tuple[float, float, float, float]:
    """The difference of two models' accuracies on the same `images`, its 95% interval, and the
    two-sided mid-p of McNemar's test that they are equally good. About `one` of the images only the
    one model is right, about `other` only the other.

    D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data" (2012). M. W. Fagerland, S. Lydersen and P. Laake, "The
    McNemar test for binary matched-pairs data: mid-p and asymptotic are better than exact
    conditional" (2013).
    """
    from scipy.stats import binom, norm

    # The interval.
    p = (one + 1) / (images + 2)
    q = (other + 1) / (images + 2)
    half = norm.ppf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (images + 2))
    low = max(-1.0, p - q - half)
    high = min(1.0, p - q + half)

    # The test.
    fewer = binom(one + other, 0.5)
    mid_p = 2 * fewer.cdf(min(one, other)) - fewer.pmf(min(one, other))
    return (one - other) / images, low, high, float(mid_p)


def judge_out_of_fold(group: DataFrame, args: Namespace) -> tuple[DataFrame, ImageSet]:
    """What the folds answer for all images of a folder, each by the run that was not trained on it,
    and these images."""
    # Each run answers for the images that validated it.
    parts, answers = [], []
    for directory in group.run:
        trained = load_trained(Path(directory), args)
        images = load_images(trained, "val", args)
        parts.append(images)
        answers.append(answer_table(trained, images, trained.evaluate(images)[1]))

    # Put the folds together.
    whole = trained.as_images(torch.cat([part.images for part in parts]))
    whole.files = [file for part in parts for file in part.files]
    return concat(answers, ignore_index=True), whole


def draw_comparison(runs: DataFrame) -> Figure:
    """Validation loss and accuracy of the runs of each dataset on a pair of axes; a legend for the
    ten best."""
    groups = runs.groupby("dataset").run
    figure = new_figure(13, 4.8 * len(groups), "validation, run by run")
    parts = figure.subfigures(len(groups), squeeze=False).flat
    for part, (dataset, names) in zip(parts, groups, strict=True):
        part.suptitle(shorten(Path(dataset).name, 60))
        axes = curves_axes(part)
        for place, name in enumerate(names):
            look = {"color": "lightgrey", "zorder": 1}
            if place < 10:
                look = {"color": f"C{place}", "label": shorten(name[-40:], 40)}
            plot_history(axes, Path(name), "val", **look)
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


# ------------------------ Predict ------------------------
FILES_AT_A_TIME = 256  # that are read and classified together


def classify(args: Namespace) -> dict:
    """Print file, class and probability of the user's own images, in the order given.

    UsageError for --top, RunError where a file cannot be read, after the others.
    """
    # What is to be classified.
    trained = load_trained(args.runs[0], args)
    most = len(trained.config["classes"])
    if args.top and args.top > most:
        raise UsageError(f"--top {args.top}: the model has {most} classes")
    files = []
    skipped = Counter()
    unreadable = Counter()
    for path in args.predict:
        files += common.image_files(path, skipped) if path.is_dir() else [path]

    # Read them, some at a time, classify those, and print.
    predictions = []
    starts = range(0, len(files), FILES_AT_A_TIME)
    for start in tqdm(starts, leave=False, disable=args.quiet or None):
        some = files[start : start + FILES_AT_A_TIME]
        rows = likeliest_classes(trained, some, args, unreadable)
        if rows:
            print_predictions(rows, args, heading=not predictions)
            predictions += rows

    # Say what is left out.
    if skipped:
        note(common.skipped_in_words(skipped), args)
    if not files:
        raise RunError("no image files there")
    if unreadable:
        kinds = common.endings_in_words(unreadable)
        raise RunError(f"{unreadable.total()} of {len(files)} files could not be read: {kinds}")
    return {"predictions": predictions}


def likeliest_classes(
    trained: Trained, files: list[Path], args: Namespace, unreadable: Counter
) -> list[dict]:
    """The --top likeliest classes of each file, likeliest first. Those that cannot be read are
    named on stderr, and `unreadable` counts their endings."""
    # Decode as many at a time as there are cores, to the pixels of training.
    channels, side, _ = trained.config["image_shape"]
    resize = trained.config["resize"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = [
            pool.submit(common.read_image, file, side, channels == 1, resize) for file in files
        ]

    # Leave out what cannot be read.
    readable, pixels = [], []
    for file, image in zip(files, decoded, strict=True):
        try:
            pixels.append(image.result())
            readable.append(str(file))
        except RunError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            unreadable[file.suffix.lower() or "without ending"] += 1
    if not readable:
        return []

    # Classify the others.
    _, logits = trained.evaluate(trained.as_images(torch.stack(pixels)), args.tta)
    # Of equally likely classes the first comes first, as in predictions.csv.
    ordered = trained.probabilities(logits).sort(dim=1, descending=True, stable=True)
    likeliest = [part[:, : args.top or 1] for part in ordered]
    classes = trained.config["classes"]
    return [
        {"file": file, "class": classes[label], "probability": probability.item()}
        for file, probabilities, labels in zip(readable, *likeliest, strict=True)
        for probability, label in zip(probabilities, labels, strict=True)
    ]


def print_predictions(rows: list[dict], args: Namespace, heading: bool) -> None:
    """Print predictions in the form that is asked for."""
    lines = [f"{row['file']}\t{row['class']}\t{row['probability']:.4f}" for row in rows]
    if args.json:
        lines = [json.dumps(row) for row in rows]
    elif args.csv:
        lines = [as_csv(rows, heading).rstrip("\n")]
    say("\n".join(lines), needed=True)


# ------------------------ Export ------------------------
EXPORTS = {"torch.export": "model.pt2", "onnx": "model.onnx"}
CHECKED_IMAGES = 40


def export(args: Namespace) -> dict:
    """Write the model with its preprocessing as a file of another kind: uint8 images [N, C, H, W]
    to probabilities [N, K].

    The reference is the model in float32; RunError where the file answers otherwise.
    """
    from torchvision.transforms import v2

    # The model, as others compute it: nothing is dropped.
    args.device = "cpu"
    trained = load_trained(args.runs[0], args)
    config = trained.config
    shape = config["image_shape"]
    net = common.build_model(config | {"always_dropout": False})
    net.load_state_dict(trained.model.state_dict())
    model = nn.Sequential(
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config["mean"], config["std"]),
        net.to(memory_format=torch.contiguous_format),
        v2.Lambda(lambda logits: logits / config["temperature"]),
        nn.Softmax(dim=1),
    ).eval()

    # What the file leaves to its user: as common.read_image does it.
    *_, kernel = common.way_of(config["resize"])
    metadata = {
        "classes": config["classes"],
        "image_shape": shape,
        "mode": "L" if shape[0] == 1 else "RGB",
        "resize": f"{kernel}, antialiased, as Pillow's Image.resize",
        "square": config["resize"],
        "transparent pixels": "on white",
    }

    # Export it, and have the result answer: to one image, and to a batch. The images are noise,
    # from faint to strong: of strong noise a model may be so sure that no difference would show.
    contrast = torch.linspace(0, 255, CHECKED_IMAGES).view(-1, 1, 1, 1)
    noise = torch.rand(CHECKED_IMAGES, *shape, generator=common.generator_for("export"))
    images = (noise * contrast).byte()
    content, exported = convert(model, images, metadata, args.export)
    with torch.inference_mode():
        answers = torch.cat([exported(images[:1]), exported(images[1:])])
        difference = (answers - model(images)).abs().max().item()
    if not difference < 1e-4:
        raise RunError(
            "the exported model's probabilities differ from the model's by "
            f"{difference:.2g}: not kept"
        )

    # Write it.
    out = args.out or trained.directory
    name = EXPORTS[args.export]
    write_files(out, {name: content})
    say(
        f"{shown(out / name)}: uint8 images [N, {', '.join(map(str, shape))}] to probabilities "
        f"[N, K], within {difference:.1g} of the model in fp32",
        args.quiet,
    )
    return {"file": str(out / name)}


def convert(model: nn.Module, images: Tensor, metadata: dict, kind: str) -> tuple[bytes, Callable]:
    """The bytes of a file of this kind, with each value of the metadata as JSON in it, and what the
    file computes."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    if kind == "torch.export":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
        buffer.seek(0)
        return buffer.getvalue(), torch.export.load(buffer).module()
    exported = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    for name, value in metadata.items():
        exported.model.metadata_props[name] = json.dumps(value)
    return exported.model_proto.SerializeToString(), lambda images: exported(images)[0]


# ------------------------ Main ------------------------
def evaluate_run(args: Namespace) -> dict:
    """Evaluate one run; return its metrics. UsageError, RunError."""
    # --layer, --channel and --image are looked at before the work.
    trained = load_trained(args.runs[0], args)
    convolution = find_convolution(trained.model, args)
    images = load_images(trained, args.split, args)
    if args.image >= len(images):
        raise UsageError(f"--image {args.image}: the split has {len(images)} images, from 0")

    # Measure, draw and write.
    found = measure(trained, images, args)
    write(found, draw(found, *convolution, args), args)
    return found.metrics


def main(argv: list[str] | None = None) -> dict:
    """Do what `argv` says; return what metrics.json, the comparison or the predictions hold.

    UsageError, RunError.
    """
    args = parse_arguments(argv)
    if args.predict:
        return classify(args)
    if args.export:
        return export(args)

    # What people are to see is printed and written by now; a program gets the figures alone.
    are_several = len(args.runs) > 1
    result = compare(args) if are_several else evaluate_run(args)
    text = as_json(result)
    content = json.loads(text)
    if args.csv:
        text = as_csv(result if are_several else result["classes"]).rstrip("\n")
    if args.csv or args.json:
        say(text, needed=True)
    return {"runs": content} if are_several else content


if __name__ == "__main__":
    sys.exit(common.command_line(main))
