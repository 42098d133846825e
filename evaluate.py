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

There are three steps. `measure` computes everything once, `draw` makes pictures from it, and
`write` puts it into files, on one page and on the screen. A figure that is added to `measure` is
shown in all three.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import functools
import importlib.util
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import warnings
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
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
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:  # pandas takes a second to import, so it waits until it is needed
    from matplotlib.figure import Figure
    from pandas import DataFrame


# ------------------------ Options ------------------------
def given_path(text: str) -> Path:
    """An argparse `type`: a path as it is given, but not an empty word."""
    if not text:
        raise ArgumentTypeError("expected a path, not an empty word")
    return Path(text)


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """The flags of this script. Exits with status 2 on a bad one."""
    parser = common.ArgumentParser(prog="evaluate.py", description=__doc__)
    index, count = common.number(int, 0), common.number(int, 1)
    flag = parser.add_argument
    flag("runs", nargs="+", type=given_path, metavar="RUN", help="run directory; several: compare")
    flag("--quiet", action="store_true", help="print only errors")

    flag = parser.add_argument_group("what is evaluated").add_argument
    flag(
        "--split",
        choices=("test", "val", "train"),
        default="test",
        help="which images; of several runs, which predictions",
    )
    flag(
        "--data-dir",
        type=common.absolute_path,
        metavar="DIR",
        help="where the data are now (as in training)",
    )
    flag(
        "--tta",
        choices=common.TTA,
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
        type=given_path,
        metavar="DIR",
        help="directory for the files (the run's; of several runs the one above)",
    )
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--csv", action="store_true", help="print CSV: classes, runs or predictions")
    flag("--json", action="store_true", help="print JSON: metrics, runs or predictions")

    group = parser.add_argument_group("pictures")
    flag = group.add_argument
    flag("--sample", type=count, default=40, metavar="N", help="images in predictions.png")
    flag("--layer", metavar="NAME", help="convolution of filters and feature maps (the first)")
    flag("--image", type=index, default=0, metavar="K", help="image of the feature maps")
    flag = group.add_mutually_exclusive_group().add_argument
    flag(
        "--channel",
        type=index,
        metavar="K",
        help="input channel of the filters (0; RGB in colour)",
    )
    flag("--all-kernels", action="store_true", help="filters of every input channel")

    group = parser.add_argument_group("instead of evaluating")
    group.add_argument(
        "--top",
        type=count,
        metavar="K",
        help="with --predict: the K likeliest classes of each image (1)",
    )
    flag = group.add_mutually_exclusive_group().add_argument
    flag(
        "--predict",
        type=given_path,
        nargs="+",
        metavar="PATH",
        help="classify image files, and those in folders",
    )
    flag(
        "--export",
        choices=tuple(EXPORTS),
        help="write the model, preprocessing included, as model.onnx or model.pt2",
    )

    args = parser.parse_args(argv)
    if args.top and not args.predict:
        parser.error("--top goes with --predict")
    if len(args.runs) > 1 and (args.predict or args.export):
        parser.error(f"--predict and --export take one run, not {len(args.runs)}")
    return args


def note(text: str, quiet: bool) -> None:
    """Print a remark on stderr, so that it does not get into a table that a program reads."""
    if not quiet:
        print(f"evaluate.py: {text}", file=sys.stderr)


# ------------------------ A trained model ------------------------
@dataclass
class Trained:
    """A run with the model of its best epoch.

    `record` is its run.json, `config` what best.pt holds beside the weights.
    """

    directory: Path
    record: dict
    config: dict
    model: nn.Module
    device: str
    autocast: Callable

    def test(self, images: ImageSet, tta: str | None = None) -> tuple[common.AverageMeter, Tensor]:
        """Loss and accuracy of the images, and the logits [N, K], float32, on the CPU."""
        images, config = images.to(self.device), self.config
        loader = common.evaluation_loader(images, config["batch_size"], config)
        meter, logits = common.evaluate(self.model, loader, self.autocast, common.plain_loss, tta)
        return meter, logits.cpu()

    def probabilities(self, logits: Tensor) -> Tensor:
        """The softmax [N, K] of the logits [N, K] at the run's temperature."""
        return (logits.double() / self.config["temperature"]).softmax(1)

    def read_image(self, file: Path) -> Tensor:
        """An image file as uint8 [C, side, side], with the pixels of training. RunError."""
        channels, side, _ = self.config["image_shape"]
        resize = self.config.get("resize", "stretch")  # older runs have none
        return common.read_image(file, side, channels == 1, resize)

    def as_images(self, pixels: list[Tensor]) -> ImageSet:
        """Images of unknown classes, each uint8 [C, H, W]."""
        labels = torch.zeros(len(pixels), dtype=torch.long)
        return ImageSet(torch.stack(pixels), labels, self.config["classes"])


def read_run(directory: Path) -> dict:
    """run.json, with the arguments that an older run lacks, and the status as it is now.

    A run whose process has died holds no lock: it was killed. UsageError where there is no run,
    RunError where run.json is damaged.
    """
    record = records.read_record(directory)
    lacking = {"name", "selection", "train", "val", "checksum"}.difference(record["data"])
    if lacking:
        names = ", ".join(sorted(lacking))
        raise RunError(f"{shown(directory / 'run.json')} is damaged: data has no {names}")
    record["args"] = common.recorded_arguments(record)
    if record["status"] == "running" and not records.is_locked(directory / ".lock"):
        record["status"] = "killed"
    return record


def load_trained(directory: Path, device: str, quiet: bool = True) -> Trained:
    """The best model of a run.

    RunError where there is none, or the run still goes on; UsageError for the device.
    """
    # Is there one?
    record = read_run(directory)
    if record["status"] == "running":
        raise RunError(f"{shown(directory)} is still being trained; evaluate it when it has ended")

    # Compute as the training did; another number of threads rounds otherwise.
    device, _ = common.choose_device(device, "fp32")
    precision = record["precision"]
    if (device, precision) == ("cpu", "fp16"):
        precision = "fp32"
        note("fp16 needs a GPU: computed in fp32, the figures may differ from run.json's", quiet)
    torch.set_num_threads(record["threads"])

    # Build the model around its weights; older runs have no temperature.
    path = directory / "best.pt"
    config = {"temperature": 1.0, **records.load_checkpoint(path)}
    try:
        weights = config.pop("weights")
        model = common.build_model(config)
        model.load_state_dict(weights)
    except (LookupError, RuntimeError) as error:
        raise RunError(
            f"{shown(path)} does not fit the models of common.py ({type(error).__name__}: {error})"
        ) from error
    autocast = common.autocast_to(device, precision)
    return Trained(directory, record, config, model.to(device).eval(), device, autocast)


def load_images(trained: Trained, split: str, data_dir: Path | None, quiet: bool) -> ImageSet:
    """A split of the images that the run was trained on, on the CPU.

    RunError where they are missing, or are others.
    """
    # What the run says of them.
    record, where = trained.record, shown(trained.directory)
    args = Namespace(**record["args"])
    args.script, args.typed, args.quiet = record["script"], set(), quiet
    args.directory = args.resume = trained.directory
    args.test, args.device, args.data_dir = True, trained.device, data_dir or Path(args.data_dir)
    args.listing = common.listing_of(trained.directory, record)
    if split == "val" and not args.val_size:
        raise RunError(f"{where} was trained with --val-size 0, without a validation split")

    # Where they are: drawn by a script, in torchvision's files, or in a folder.
    place = synthetic = None
    if args.dataset == "synthetic":
        if not importlib.util.find_spec(args.script):
            text = f"are drawn by {args.script}.py, which does not lie beside evaluate.py"
            raise RunError(f"the images of {where} {text}")
        synthetic = importlib.import_module(args.script).synthetic
    elif args.dataset in common.TORCHVISION:
        from torchvision import datasets

        name = common.TORCHVISION[args.dataset]
        place = args.data_dir / getattr(getattr(datasets, name), "base_folder", f"{name}/raw")
    else:
        args.dataset = str(data_dir or args.dataset)
        place = common.folder_of(args.dataset)
    if place and not place.is_dir():
        raise RunError(f"the images of {where} are not in {place}; say where with --data-dir DIR")

    # Read them. They must be those that the run had.
    wanted = ("test",) if split == "test" else ("train", "val")
    with contextlib.redirect_stdout(sys.stderr):  # remarks do not get into tables for programs
        data = common.load_data(args, synthetic, wanted)
    for part in wanted:
        images = getattr(data, part)
        expected = record["data"].get("checksum" if part == "train" else f"{part}_checksum")
        differs = images and expected not in (None, images.checksum)
        if differs or (images and images.classes != trained.config["classes"]):
            use = "tested" if part == "test" else "trained"
            text = f"is not what {where} was {use} on: the checksums differ"
            raise RunError(f"{place or args.dataset} {text}")
    images = getattr(data, split)
    if not images:
        raise RunError(f"{where} has no {split} images")
    return images.to("cpu")


def find_convolution(model: nn.Module, args: Namespace) -> tuple[str | None, nn.Conv2d | None]:
    """Name and layer of --layer, or of the first convolution, if there is one. UsageError."""
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
IMAGES_AT_A_TIME = 8  # whose gradients are in memory


class Gallery(NamedTuple):
    """Images [N, C, H, W] that are shown together, with words on each, and whether it is taken for
    another class."""

    title: str
    pixels: Tensor
    captions: list[str]
    is_wrong: list[bool]


@dataclass
class Evaluation:
    """What is measured of a run.

    `metrics` is the content of metrics.json, `answers` that of predictions.csv, a row an image, and
    `suspects` the rows that may have a wrong label. `galleries` are pictures of images by name.
    """

    trained: Trained
    images: ImageSet
    metrics: dict
    answers: DataFrame
    suspects: DataFrame
    galleries: dict[str, Gallery]


def measure(trained: Trained, images: ImageSet, args: Namespace) -> Evaluation:
    """Compute everything that is shown of a run."""
    # What the model answers, image by image.
    meter, logits = trained.test(images)
    probabilities, labels = trained.probabilities(logits), images.labels
    answers = answer_table(images, probabilities)
    predicted = probabilities.argmax(1)
    correct, size = predicted == labels, len(images.classes)
    confusion = torch.bincount(labels * size + predicted, minlength=size**2).view(size, size)

    # The figures. Each number gets a line in the table of results.
    classes = class_metrics(confusion.numpy(), images.classes)
    metrics = {
        "run": trained.record["name"],
        "dataset": trained.record["data"]["name"],
        "split": args.split,
        "epoch": trained.config["epoch"],
        "images": len(images),
        "checksum": images.checksum,
        **meter_metrics(meter),
        "macro_f1": classes.f1.mean(),
        "weighted_f1": np.average(classes.f1.fillna(0), weights=classes.support),
        "temperature": trained.config["temperature"],
    }
    plain = logits.double().softmax(1)
    for name, after in (("", probabilities), ("_before", plain)):  # and before the temperature
        bins, error = calibration(after.amax(1), correct)
        metrics[f"expected_calibration_error{name}"] = error
        metrics[f"calibration{name}"] = as_rows(bins)
    if size > 10:
        among_five = (logits.topk(5).indices == labels[:, None]).any(1)
        metrics["top5_accuracy"] = among_five.double().mean().item()

    # With averaged views, if the run or the user wants it.
    views = args.tta or trained.record["args"]["tta"]
    if views:
        metrics["tta"] = {"views": views, **meter_metrics(trained.test(images, views)[0])}
    metrics["classes"], metrics["confusion_matrix"] = as_rows(classes), confusion.tolist()

    # The images that are shown, and where the model looked when it was wrong.
    wrong, suspects = answers[~correct.numpy()], find_suspects(answers)
    worst = wrong.nlargest(SHOWN_IMAGES, "predicted_probability")
    drawn = torch.randperm(len(images), generator=common.generator_for("predictions"))
    sample = answers.iloc[drawn[: args.sample].numpy()]
    title = f"All {len(wrong)} mistakes, the most confident first"
    if len(wrong) > len(worst):
        title = f"The {len(worst)} most confident of {len(wrong):,} mistakes"
    galleries = {
        "predictions": gallery("A random sample: class and confidence", images, sample),
        "mistakes": gallery(title, images, worst),
    }
    chosen = torch.tensor(worst.index, dtype=torch.long)
    seen = grad_cam(trained, images.select(chosen), predicted[chosen])
    if seen is not None:
        title = "Grad-CAM: where the model saw what it took them for"
        galleries["gradcam"] = galleries["mistakes"]._replace(title=title, pixels=seen)
    if images.files:
        title = suspicion(args.split)
        galleries["suspects"] = gallery(title, images, suspects.head(SHOWN_IMAGES), as_suspect)
    return Evaluation(trained, images, metrics, answers, suspects, galleries)


def answer_table(images: ImageSet, probabilities: Tensor) -> DataFrame:
    """A row for each image: its `file` as in data.csv, or its index, its `class` and the
    `probability` of that, the `predicted` class and its probability, from `probabilities` [N, K].
    """
    from pandas import DataFrame, options

    # PyArrow, where it is installed, would refuse a name with bytes that are no characters.
    options.mode.string_storage = "python"
    names, labels = np.array(images.classes), images.labels
    confidence, predicted = probabilities.max(1)
    files = [file.name for file in images.files or ()]
    return DataFrame(
        {
            "file": files or range(len(images)),
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
    images. Both are None where there are no images."""
    from scipy.stats import binomtest

    if not count:
        return [None, None]
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def class_metrics(confusion: np.ndarray, names: list[str]) -> DataFrame:
    """A row for each class, from counts [K, K] with a row for each actual class, a column for each
    predicted one.

    What would divide by zero is NaN; so a class without images counts in no mean.
    """
    from pandas import DataFrame

    correct, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    classes = DataFrame({"name": names, "support": support, "predicted": predicted})
    images = classes.support.replace(0, np.nan)
    classes["accuracy"] = classes["recall"] = correct / images
    classes["accuracy_interval"] = list(map(wilson_interval, correct.tolist(), support.tolist()))
    classes["precision"] = correct / classes.predicted.replace(0, np.nan)
    classes["f1"] = 2 * correct / (images + predicted)
    return classes


def calibration(confidence: Tensor, correct: Tensor) -> tuple[DataFrame, float]:
    """Images, mean confidence and accuracy in each of 15 bins of equal width, from `confidence` and
    `correct` [N]; and the expected calibration error.

    C. Guo et al., "On calibration of modern neural networks" (2017).
    """
    from pandas import DataFrame, cut

    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
    answers = DataFrame({"confidence": confidence, "accuracy": correct.double()})
    groups = answers.groupby(cut(answers.confidence, edges), observed=False)
    bins = groups.mean().assign(low=edges[:-1], high=edges[1:], images=groups.size())
    gaps = (bins.confidence - bins.accuracy).abs()
    return bins, float((gaps * bins["images"]).sum() / len(answers))


def find_suspects(answers: DataFrame) -> DataFrame:
    """The images whose class is least likely, of those that the model takes for another.

    At most a tenth of all: three times the wrong labels that C. G. Northcutt, A. Athalye and J.
    Mueller found on average, "Pervasive label errors in test sets destabilize machine learning
    benchmarks" (2021).
    """
    wrong = answers[answers["class"] != answers.predicted]
    return wrong.nsmallest(math.ceil(len(answers) / 10), "probability")


def suspicion(split: str) -> str:
    """What suspects are."""
    seen = "; the model was trained on these labels" if split == "train" else ""
    return f"Suspects: the given class is unlikely{seen}"


def caption(answer: dict) -> str:
    """Two lines about an image: its class, and what is predicted how surely."""
    name, other = shorten(answer["class"], 20), shorten(answer["predicted"], 20)
    confidence = f"({answer['predicted_probability']:.0%})"
    if answer["class"] == answer["predicted"]:
        return f"{name}\n{confidence}"
    return f"{name}, taken for\n{other} {confidence}"


def as_suspect(answer: dict) -> str:
    """Three lines about an image: how likely its class is, what is likelier, and the file."""
    name, other = shorten(answer["class"], 20), shorten(answer["predicted"], 20)
    likelier = f"{other}? ({answer['predicted_probability']:.0%})"
    return f"{name} ({answer['probability']:.1%})\n{likelier}\n{Path(answer['file']).name}"


def gallery(
    title: str, images: ImageSet, answers: DataFrame, describe: Callable[[dict], str] = caption
) -> Gallery:
    """The images of some answers."""
    rows = answers.to_dict("records")
    is_wrong = [row["class"] != row["predicted"] for row in rows]
    chosen = torch.tensor(answers.index, dtype=torch.long)
    return Gallery(title, images.select(chosen).images, list(map(describe, rows)), is_wrong)


def grad_cam(trained: Trained, images: ImageSet, classes: Tensor) -> Tensor | None:
    """Where in each image the model saw what speaks for a class of `classes` [N]: the images under
    a heatmap, uint8 [N, 3, H, W].

    The heatmap is the output of the last convolution, each channel weighted by its mean gradient:
    R. Selvaraju et al., "Grad-CAM" (2017). None without images, or where that is no map of them.
    """
    # Catch what the convolutions put out. What follows gets copies, as a ReLU may work in place.
    caught: list[Tensor] = []

    def catch(layer, inputs, output):
        caught.append(output)
        return output.clone()

    layers = [layer for layer in trained.model.modules() if isinstance(layer, nn.Conv2d)]
    if not len(images) or not layers:
        return None
    loader = common.Loader(images.to(trained.device), IMAGES_AT_A_TIME, trained.config)
    heatmaps = []
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(catch))
        batches = zip(loader.batches(), classes.split(IMAGES_AT_A_TIME), strict=True)
        for (pixels, _), some in batches:
            caught.clear()
            logits = trained.model(pixels.requires_grad_())

            # Take the last map. The only one of a transformer cuts the image into patches.
            maps = [output for output in caught if min(output.shape[2:]) > 1]
            if not maps or (len(layers) == 1 and layers[0].kernel_size == layers[0].stride):
                return None
            scores = logits.gather(1, some.to(trained.device)[:, None])
            (gradients,) = torch.autograd.grad(scores.sum(), maps[-1])
            weights = gradients.mean((2, 3), keepdim=True)
            heat = (weights * maps[-1].detach()).sum(1, keepdim=True).relu()
            heatmaps.append(F.interpolate(heat, pixels.shape[2:], mode="bilinear")[:, 0].cpu())

    # Lay them over the images in colours, from nothing to the most of each image.
    heat = torch.cat(heatmaps)
    heat /= heat.amax((1, 2), keepdim=True).clamp(min=1e-12)
    colours = torch.from_numpy(colormap("inferno")(heat.numpy())[..., :3]).permute(0, 3, 1, 2)
    return (images.images * 0.45 + colours * 255 * 0.55).byte()


# ------------------------ Draw ------------------------
# Two of the colours of M. Okabe and K. Ito, told apart by the colour-blind; line styles and marks
# say the same in grey.
BLUE, ORANGE = "#0072B2", "#D55E00"
FEW_EPOCHS = 40  # each has a mark on the curves
CAPTIONS = {
    "curves": "Loss and accuracy after each epoch. The star is the epoch that is evaluated.",
    "per_class": "The accuracy of each class, with its 95% interval.",
    "confusion": "Which class is taken for which: images, percent of the row, of the column.",
    "predictions": "A random sample: the class of each image, and how sure the model is.",
    "calibration": "How often the model is right where it is so sure.",
    "filters": "The filters of a convolution.",
    "activations": "What the filters of a convolution find in one image.",
}


def draw(found: Evaluation, args: Namespace) -> dict[str, Figure]:
    """The pictures of an evaluation by the names of their files."""
    trained, metrics, images = found.trained, found.metrics, found.images
    title = f"{shorten(metrics['run'], 50)}, epoch {metrics['epoch']}\n{what_images(metrics)}"
    figures = {
        "curves": draw_history(trained),
        "per_class": draw_classes(metrics, title),
        "confusion": draw_confusion(metrics, title),
        "calibration": draw_calibration(metrics, title),
    }
    for name, shown_images in found.galleries.items():
        figures[name] = draw_gallery(shown_images, title)
    name, layer = find_convolution(trained.model, args)
    if layer:
        figures["filters"] = draw_filters(name, layer, args)
        figures["activations"] = draw_activations(trained, name, layer, images, args.image)
    return figures


def what_images(metrics: dict) -> str:
    """Which images were evaluated, in a few words."""
    dataset = shorten(Path(metrics["dataset"]).name, 30)
    split = {"val": "validation", "train": "training"}.get(metrics["split"], "test")
    return f"{metrics['images']:,} {split} images of {dataset}"


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches, without pyplot, which has a global state and wants a display."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x$
    matplotlib.rcParams["font.family"] = fonts()
    figure = Figure((width, height), dpi=100, layout="constrained")
    figure.suptitle(title)
    return figure


@functools.cache
def fonts() -> list[str]:
    """Matplotlib's own font, and those on this machine that have the characters which it lacks."""
    from matplotlib.font_manager import get_font_names

    wider = re.compile("Noto Sans (CJK|Arabic)|WenQuanYi|Arial Unicode|Microsoft YaHei|PingFang")
    return ["DejaVu Sans", *filter(wider.match, sorted(get_font_names()))]


def render(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file; a character that no font has is a box in it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def colormap(name: str, missing: str = "lightgrey"):
    """A colour map with the colour `missing` for NaN."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=missing)


def percent_axis(axis) -> None:
    """Label an axis of shares with percentages, and end it at 100%."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=None))
    low, high = axis.get_view_interval()
    if high > 1:
        axis.axes.set(**{f"{axis.axis_name}lim": (low, 1)})


def shorten(name: str, length: int) -> str:
    """A name for a picture: cut to `length`, and without bytes that are no characters, at which
    matplotlib fails."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= length else f"{name[: length - 1]}…"


def curves_axes(figure):
    """Two axes, of loss and of accuracy, over epochs."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(1, 2)
    for axis, label in zip(axes, ("loss per image", "accuracy"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    percent_axis(axes[1].yaxis)
    return axes


def plot_history(axes, directory: Path, part: str, **look) -> int:
    """Draw loss and accuracy of the `part` train or val of a run. Returns its epochs."""
    rows = records.read_log(directory) if (directory / "log.jsonl").exists() else []
    epochs, marker = [row["epoch"] for row in rows], "." if len(rows) < FEW_EPOCHS else None
    for axis, name in zip(axes, ("loss", "acc"), strict=True):
        axis.plot(epochs, [row[f"{part}_{name}"] for row in rows], marker=marker, **look)
    percent_axis(axes[1].yaxis)
    return len(rows)


def draw_history(trained: Trained) -> Figure:
    """Loss and accuracy of training and validation, epoch by epoch."""
    record, best, directory = trained.record, trained.config, trained.directory
    dataset = shorten(Path(record["data"]["name"]).name, 30)
    title = f"{shorten(record['name'], 60)}: {record['args']['model']} on {dataset}"
    figure = new_figure(11, 4.2, title)
    axes = curves_axes(figure)
    plot_history(axes, directory, "train", color=ORANGE, linestyle="--", label="training")
    selection = record["data"]["selection"]
    epochs = plot_history(axes, directory, "val", color=BLUE, label=selection)
    for axis, name in zip(axes, ("val_loss", "val_acc"), strict=True):
        # best.pt's figures, not run.json's: they are of these weights, also after a kill.
        label = f"best: {best['epoch']}"
        axis.plot(best["epoch"], best[name], "k*", markersize=13, label=label)
        if record["status"] == "stopped_early":
            axis.axvline(epochs, color="black", linestyle=":", label=f"early stop: {epochs}")
        axis.legend()
    return figure


def draw_classes(metrics: dict, title: str) -> Figure:
    """Accuracy of each class that has images, highest first, with its 95% interval."""
    from pandas import DataFrame

    classes = DataFrame(metrics["classes"]).query("support > 0")
    classes = classes.sort_values("accuracy", kind="stable")
    places, few = range(len(classes)), len(classes) <= 30
    figure = new_figure(8, 1.6 + len(classes) * (0.32 if few else 0.16), title)
    axis = figure.subplots()
    axis.barh(places, classes.accuracy, color=BLUE)
    axis.hlines(places, *zip(*classes.accuracy_interval, strict=True), color="black")
    everything = f"all images: {metrics['accuracy']:.2%}"
    axis.axvline(metrics["accuracy"], color="black", linestyle="--", label=everything)
    rows = zip(classes["name"], classes.accuracy, strict=True)
    labels = [f"{shorten(name, 24)}  {accuracy:.1%}" for name, accuracy in rows]
    axis.set_yticks(places, labels, fontsize=10 if few else 8)
    axis.set(xlabel="accuracy within the class (recall), with 95% interval", xlim=(0, 1))
    axis.margins(y=0.01)
    percent_axis(axis.xaxis)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def draw_confusion(metrics: dict, title: str) -> Figure:
    """Heatmaps of counts, recall (each row sums to 100%) and precision (each column does), with
    numbers where there is room for them."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    # The three matrices; what would divide by zero is NaN.
    counts = torch.tensor(metrics["confusion_matrix"])
    panels = {
        "counts": counts,
        "recall: percent of the actual class": 100 * counts / counts.sum(1, keepdim=True),
        "precision: percent of the predicted class": 100 * counts / counts.sum(0),
    }

    # Inches for names and numbers. Of more than 150 classes the names would run into one another.
    names = [shorten(row["name"], 24) for row in metrics["classes"]]
    few = len(names) <= 20
    side = min(max(2.6, len(names) * (0.46 if few else 0.13)), 20)
    figure = new_figure(3 * side + 7, side + 3, title)
    ticks = range(0, len(names), math.ceil(len(names) / 150))
    labels, size = [names[tick] for tick in ticks], 10 if few else 6

    # Draw each. The square root shows the errors beside a diagonal that is many times larger.
    for axis, heading in zip(figure.subplots(1, 3), panels, strict=True):
        values = panels[heading]
        top = max(1, counts.max().item()) if values is counts else 100
        image = axis.imshow(values.numpy(), cmap=colormap("Blues"), norm=PowerNorm(0.5, 0, top))
        whole = MaxNLocator(6, integer=True)
        figure.colorbar(image, ax=axis, fraction=0.046, format="{x:,.0f}", ticks=whole)
        axis.set_xticks(ticks, labels, rotation=90, fontsize=size)
        axis.set_yticks(ticks, labels, fontsize=size)
        axis.set(title=heading, xlabel="predicted class", ylabel="actual class")
        for row, column in (~values.isnan()).nonzero().tolist() if few else ():
            value = values[row, column].item()
            text = f"{value:.1f}" if value and values is not counts else f"{value:.0f}"
            colour = "white" if value / top > 0.35 else "black" if value else "silver"
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    return figure


def draw_gallery(images: Gallery, title: str) -> Figure:
    """Images as they were before normalisation, framed where the model is wrong."""
    from matplotlib.patches import Rectangle

    columns, height = 8, 1.3  # of a cell of width 1
    rows = max(1, math.ceil(len(images.captions) / columns))
    figure = new_figure(11.6, 1.9 * rows + 0.9, f"{title}\n{images.title}")
    axis = figure.subplots()  # one for all: forty take seconds
    for place, text in enumerate(images.captions):
        left, top = place % columns + 0.05, place // columns * height + 0.35
        colour = "black"
        if images.is_wrong[place]:
            colour, look = ORANGE, {"fill": False, "color": ORANGE, "linewidth": 3}
            axis.add_patch(Rectangle((left, top), 0.9, 0.9, **look))
        draw_image(axis, images.pixels[place], extent=(left, left + 0.9, top + 0.9, top))
        lines = "\n".join(shorten(line, 24) for line in text.splitlines())
        axis.text(left + 0.45, top - 0.04, lines, ha="center", fontsize=8, color=colour)
    if not images.captions:
        axis.text(columns / 2, height / 2, "none", ha="center")
    axis.set(xlim=(0, columns), ylim=(rows * height, 0))
    axis.set_axis_off()
    return figure


def draw_image(axis, pixels: Tensor, **options):
    """An image [1 or 3, H, W] on an axis, pixel by pixel."""
    look = {"cmap": "gray", "interpolation": "nearest", "vmin": 0, "vmax": 255, **options}
    return axis.imshow(pixels.permute(1, 2, 0).squeeze(2).numpy(), **look)


def draw_calibration(metrics: dict, title: str) -> Figure:
    """Accuracy against confidence, and how often each confidence occurs."""
    from pandas import DataFrame

    # Accuracy, and where it was before the temperature.
    figure = new_figure(6, 6.5, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = DataFrame(metrics["calibration"]).dropna()
    look = {"width": 1 / CALIBRATION_BINS, "align": "edge", "color": BLUE, "edgecolor": "white"}
    above.bar(bins.low, bins.accuracy, label="accuracy", **look)
    above.plot(bins.confidence, bins.accuracy, "k.")
    heading = f"expected calibration error {metrics['expected_calibration_error']:.2%}"
    if metrics["temperature"] != 1:
        heading += f" (before: {metrics['expected_calibration_error_before']:.2%})"
        before = DataFrame(metrics["calibration_before"]).dropna()
        look_before = {"markerfacecolor": "white", "label": "before the temperature"}
        above.plot(before.confidence, before.accuracy, "kD", **look_before)
    above.plot([0, 1], [0, 1], "--", color=ORANGE, label="perfectly calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=heading)
    above.legend()
    percent_axis(above.yaxis)

    # How many images there are.
    below.bar(bins.low, bins["images"], **look)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    below.set(yscale="log", ylim=(0.5, None))
    below.yaxis.set_major_formatter("{x:,.0f}")
    percent_axis(below.xaxis)
    return figure


def draw_tiles(axis, tiles: Tensor, columns: int, label: str, **scale) -> None:
    """`tiles` [N, 1 or 3, H, W] in rows of `columns`: in colour, or with a scale beside them."""
    from torchvision.utils import make_grid

    channels = tiles.shape[1]
    sheet = make_grid(tiles, columns, padding=1, pad_value=1 if channels == 3 else math.nan)
    image = draw_image(axis, sheet[:channels], **scale)
    if channels == 1:
        axis.figure.colorbar(image, ax=axis, label=label, fraction=0.04)
    axis.set_axis_off()


def draw_filters(name: str, layer: nn.Conv2d, args: Namespace) -> Figure:
    """The kernels of a convolution: in RGB, of one input channel, or of each, a row a filter."""
    # The tiles; of one channel or in colour, eight in a row.
    weight = layer.weight.detach().float().cpu()
    filters, channels, height, width = weight.shape
    extreme = weight.abs().max().item() or 1.0
    columns, inches = 8, 0.55
    if args.all_kernels:
        tiles, columns = weight.reshape(-1, 1, height, width), channels
        about = "a row a filter, a column a channel"
        inches = max(0.04 * max(height, width), min(0.55, 20 / max(filters, channels)))
    elif args.channel is None and channels == 3:
        tiles = weight / (2 * extreme) + 0.5
        about = f"as colours: grey is 0, full brightness {extreme:.2g}"
    else:
        channel = args.channel or 0
        tiles, about = weight[:, [channel]], f"input channel {channel}"

    # The picture.
    rows = math.ceil(len(tiles) / columns)
    title = f"layer {name}: {filters} filters of {channels}x{height}x{width}\n{about}"
    figure = new_figure(max(6.5, columns * inches + 1.5), rows * inches * height / width + 1, title)
    scale = {"cmap": colormap("gray", "white"), "vmin": -extreme, "vmax": extreme}
    draw_tiles(figure.subplots(), tiles, columns, "weight", **scale)
    return figure


def draw_activations(
    trained: Trained, name: str, layer: nn.Conv2d, images: ImageSet, index: int
) -> Figure:
    """The feature maps of a convolution for the image `index`, before what follows it."""
    # A ReLU in place would otherwise change what was caught.
    maps: list[Tensor] = []
    one = images.select(torch.tensor([index]))
    with layer.register_forward_hook(lambda *call: maps.append(call[2].clone())):
        _, logits = trained.test(one)
    tiles = maps[0][0][:, None].float().cpu()
    actual, answer = (shorten(one.classes[k], 24) for k in (one.labels[0], logits.argmax()))
    about = f"feature maps of image {index}: {actual}, classified as {answer}"
    height = max(3.5, math.ceil(len(tiles) / 8) * 0.95 + 1)
    figure = new_figure(11, height, f"layer {name}, {len(tiles)} {about}")
    left, right = figure.subplots(1, 2, width_ratios=(1, 4))
    draw_image(left, one.images[0])
    left.set(title="the image", xticks=[], yticks=[])
    scale = {"cmap": colormap("cividis", "white"), "vmin": None, "vmax": None}
    draw_tiles(right, tiles, 8, "output of the convolution", **scale)
    return figure


# ------------------------ Write ------------------------
# How a number is written, by the first of these patterns that is found in its name.
FORMATS = {
    "mid_p": ".3g",
    "difference|pair_low": "+.2%",
    "loss|f1|temperature": ".4f",
    "seconds": ".0f",
    "share": ".1%",
    "": ".2%",
}
WORDS = {"acc": "accuracy", "val": "validation", "f1": "F1", "support": "images", "name": "class"}
WORDS |= {"before": "before the temperature", "sd": "deviation", "low": "95% interval"}


def as_text(value: Any, name: str) -> str:
    """A value for a person, by the name that it has in a table or in a file."""
    if value is None or value != value:
        return "-"
    if isinstance(value, list):
        return "-" if None in value else " to ".join(as_text(each, name) for each in value)
    if isinstance(value, float):
        return format(value, next(FORMATS[words] for words in FORMATS if re.search(words, name)))
    return f"{value:,}" if type(value) is int else str(value)


def in_words(name: str) -> str:
    """A name from a file as a person would write it."""
    words = re.sub("^(pair|seed|fold)_", "", name).split("_")
    return " ".join(WORDS.get(word, word) for word in words)


def for_people(rows: list[dict], *names: str) -> DataFrame:
    """A table of texts with these columns, or all, and headings in plain words. The two ends of an
    interval are one column."""
    from pandas import DataFrame

    table = []
    for row in rows:
        texts = {}
        for name in names or row:
            value = row[name]
            if name.endswith("_low"):
                value = [value, row[f"{name.removesuffix('low')}high"]]
            texts[in_words(name)] = as_text(value, name)
        table.append(texts)
    return DataFrame(table)


def as_lines(tables: dict[str, DataFrame]) -> list[str]:
    """Tables of texts for the screen: the first column to the left, the others to the right."""
    lines = []
    for table in tables.values():
        first = table.columns[0]
        table = table.set_index(first).rename_axis(index=None, columns=first)
        lines += [*table.to_string().splitlines(), ""]
    return lines


def as_rows(table: DataFrame) -> list[dict]:
    """The rows of a table as plain values, with None where there is none."""
    return table.astype(object).replace({np.nan: None}).to_dict("records")


def as_csv(rows: list[dict] | DataFrame, heading: bool = True) -> str:
    """Rows as CSV."""
    from pandas import DataFrame

    return DataFrame(rows, dtype=object).to_csv(index=False, header=heading, lineterminator="\n")


def as_page(title: str, remarks: list[str], tables: dict, pictures: dict, **more) -> bytes:
    """The page report.html.jinja, which needs no other file. `tables` are {heading: texts},
    `pictures` {caption: bytes of a PNG}."""
    import jinja2

    source = (records.HERE / "report.html.jinja").read_text()
    page = jinja2.Template(source, autoescape=True, trim_blocks=True)
    content = {"title": title, "remarks": remarks, "tables": tables, "pictures": pictures, **more}
    return as_bytes(page.render(content, b64encode=base64.b64encode), "replace")


def as_bytes(text: str, errors: str = "surrogateescape") -> bytes:
    """A text as the content of a file; a name in it may have bytes that are no characters."""
    return text.encode(errors=errors)


def as_png(pixels: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as the bytes of a PNG file."""
    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(pixels).save(buffer, "png")
    return buffer.getvalue()


def as_pngs(*galleries: Gallery) -> list[tuple]:
    """The images of galleries, side by side: captions and PNGs."""
    pngs = zip(*(map(as_png, each.pixels) for each in galleries), strict=True)
    return list(zip(galleries[0].captions, pngs, strict=True))


def write_files(out: Path, files: dict[str, bytes]) -> None:
    """Write the files, {name: content}, into a directory, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        records.write_atomically(out / name, content)


def print_result(args: Namespace, content: Any, rows: list[dict], lines: list[str]) -> None:
    """Print the content as JSON or the rows as CSV for a program, or the lines for a person."""
    if args.json:
        say(json.dumps(content, indent=2))
    elif args.csv:
        say(as_csv(rows).rstrip("\n"))
    else:
        say("\n".join(lines), args.quiet)


def place_of(run: Path, split: str) -> Path:
    """The directory of what is made of a split of a run."""
    return run if split == "test" else run / split


def write(found: Evaluation, figures: dict[str, Figure], args: Namespace) -> None:
    """Put an evaluation into files, on one page and on the screen."""
    # The tables, and what there is to say.
    trained, metrics = found.trained, found.metrics
    title = f"{metrics['run']}, epoch {metrics['epoch']}: {what_images(metrics)}"
    classes = for_people(metrics["classes"], "name", "support", "accuracy", "precision", "f1")
    tables = {
        "Results": for_people(results_of(metrics)),
        "Classes": classes,
    }
    confused = most_confused(found.answers)
    if confused:
        tables["Most confused"] = for_people(confused)
    remarks = remarks_on(trained, args)

    # The pictures. Beside each mistake is what the model looked at.
    files = {f"{name}.png": render(figure) for name, figure in figures.items()}
    pictures = {text: files[f"{name}.png"] for name, text in CAPTIONS.items() if name in figures}
    beside = [found.galleries[name] for name in ("mistakes", "gradcam") if name in found.galleries]
    galleries = {beside[0].title: as_pngs(*beside)}
    files["predictions.csv"] = as_bytes(as_csv(found.answers))
    if found.images.files:
        images, suspects = found.galleries["suspects"], found.suspects
        paths = [str(found.images.files[place].path) for place in suspects.index]
        files["suspects.csv"] = as_bytes(as_csv(suspects.assign(file=paths)))
        galleries[images.title] = as_pngs(images)
        remarks.append(f"{images.title}: {len(paths):,} images in suspects.csv")

    # The page, and last metrics.json, which says of what the other files are.
    best = metrics.get("tta", metrics)
    accuracy, interval = (as_text(best[name], "") for name in ("accuracy", "accuracy_interval"))
    files["report.html"] = as_page(
        title,
        remarks,
        tables,
        pictures,
        headline=f"{accuracy} of the images are classified correctly (95% interval {interval}).",
        galleries=galleries,
        details={"The run, and all its settings": for_people(settings_of(trained.record))},
    )
    files["metrics.json"] = as_bytes(f"{json.dumps(metrics, indent=2)}\n")
    out = args.out or place_of(trained.directory, args.split)
    write_files(out, files)

    # The screen.
    lines = [title, "", *as_lines(tables), f"{shown(out)}: {', '.join(files)}", *remarks]
    print_result(args, metrics, metrics["classes"], lines)


def results_of(metrics: dict) -> list[dict]:
    """The numbers among the metrics, and the intervals that they have. Those of averaged views come
    first, as the test's accuracy in run.json is theirs."""
    rows, averaged = [], metrics.get("tta", {})
    views = f" with test-time augmentation, {averaged.get('views')}"
    is_fitted = metrics["temperature"] != 1  # else all is as before the temperature
    for figures, more in ((averaged, views), (metrics, "")):
        for name, value in figures.items():
            is_shown = is_fitted or not re.search("temperature|before", name)
            if isinstance(value, float) and is_shown:
                interval = as_text(figures.get(f"{name}_interval", ""), name)
                row = {"result": in_words(name) + more, "value": as_text(value, name)}
                rows.append({**row, "95% interval": interval})
    return rows


def most_confused(answers: DataFrame) -> list[dict]:
    """The ten most frequent mistakes."""
    wrong = answers[answers["class"] != answers.predicted]
    table = wrong.value_counts(["class", "predicted"]).head(10).reset_index(name="images")
    supports = answers["class"].value_counts()
    return as_rows(table.assign(share_of_class=table["images"] / table["class"].map(supports)))


def remarks_on(trained: Trained, args: Namespace) -> list[str]:
    """What is to be known before the figures of a run are believed."""
    record, where, remarks = trained.record, shown(trained.directory), []
    if record["status"] not in ENDED:
        remarks.append(f"{where}: {record['status']} after {record['epochs']} epochs")
    if record["data"]["selection"] == "test set":
        remarks.append("the test set chose the epoch (--val-size 0), which flatters its accuracy")
    if not find_convolution(trained.model, args)[1]:
        remarks.append("no convolution, so no filters.png")
    for split in {"test", "val", "train"} - {args.split}:
        path = place_of(trained.directory, split) / "metrics.json"
        if path.exists() and records.read_json(path)["epoch"] != trained.config["epoch"]:
            text = f"of another epoch; --split {split} makes it anew"
            remarks.append(f"{shown(path.with_name('report.html'))} is {text}")
    return remarks


def settings_of(record: dict) -> list[dict]:
    """What a run is, for the end of its page."""
    data = record["data"]
    is_cut = data["selection"] != "test set"  # else the test's images chose the epoch
    values = {
        "command": shlex.join(["python", f"{record['script']}.py", *record.get("argv", [])]),
        "training images": data["train"],
        "validation images": data["val"] if is_cut else 0,
    }
    names = ["status", "epochs", "seconds", "parameters", "started", "host", "device"]
    for name in (*names, "precision", "threads", "versions", "git"):
        values[name] = record.get(name)
    values |= {common.as_flag(name): str(value) for name, value in record["args"].items()}
    return [{"setting": name, "value": as_text(values[name], name)} for name in values]


# ------------------------ Compare runs ------------------------
ENDED = ("finished", "stopped_early")
# What two runs may differ in, and still be equal but for the seed, or for the fold.
ELSEWHERE = {"threads", "run_name", "runs_dir", "data_dir", "wandb", "wandb_project", "device"}
RUN = ["run", "rank", "dataset", "model", "parameters", "epochs", "val_loss", "val_acc"]
RUN += ["test_acc", "averaged_views", "selection", "seconds", "status"]
PAIR = ["pair_with", "pair_images", "pair_only_this_right", "pair_only_other_right"]
PAIR += ["pair_difference", "pair_low", "pair_high", "pair_mid_p"]
MEANS = ["val_acc_mean", "val_acc_sd", "val_acc_low", "val_acc_high"]
MEANS += ["test_acc_mean", "test_acc_sd", "test_acc_low", "test_acc_high"]


def compare(args: Namespace) -> dict:
    """Compare runs by what their directories say.

    Only for folds images are read, and those of a test never. UsageError, RunError.
    """
    # Measure.
    rows = measure_runs(args)
    remarks = rank_runs(rows)
    add_pairs(rows, args.split)
    pairs = [row for row in rows if row["pair_with"]]
    seeds, folds = equal_runs(rows, "seed"), equal_runs(rows, "fold")
    tables = {
        "Runs": for_people(rows, *RUN),
        f"Image by image, {args.split} images": for_people(pairs, "run", *PAIR[:-2], "pair_mid_p"),
        "Equal but for the seed": add_means(seeds, "seed"),
        "Equal but for the fold": add_means(folds, "fold"),
    }
    tables = {heading: table for heading, table in tables.items() if len(table)}
    remarks += reasons_of(rows, "not_ranked", "not ranked with the others")
    remarks += reasons_of(rows, "not_paired", "not compared image by image")
    if len(pairs) > 1:
        remarks.append("of twenty pairs of equally good models one has a mid-p below 0.05")

    # Draw, and of the first folds that are complete, find what may have a wrong label.
    files, galleries = {"compare.png": render(draw_comparison(rows))}, {}
    pictures = {"Validation, run by run.": files["compare.png"]}
    for group in folds:
        record = group[0]["record"]
        parts = int(record["args"]["fold"].partition("/")[2])
        if len(group) < parts:
            remarks.append(f"{len(group)} of {parts} folds: with all, wrong labels are looked for")
        elif record["data"]["files"] and not galleries:
            suspects, images = judge_out_of_fold(group, args)
            files["suspects.csv"] = as_bytes(as_csv(suspects))
            files["suspects.png"] = render(draw_gallery(images, f"{parts} folds"))
            galleries[images.title] = as_pngs(images)
            remarks.append(f"{images.title}: {len(suspects):,} images in suspects.csv")

    # Write.
    for row in rows:
        del row["record"]
    title, out = f"{len(rows)} runs", args.out or args.runs[0].parent
    files["compare.html"] = as_page(title, remarks, tables, pictures, galleries=galleries)
    write_files(out, files)
    lines = [*as_lines(tables), *remarks, f"{shown(out)}: {', '.join(files)}"]
    print_result(args, rows, rows, lines)
    return {"runs": rows}


def measure_runs(args: Namespace) -> list[dict]:
    """A row for each run: its `record`, run.json, what is compared, and places for what follows
    from the others. UsageError, RunError where there is none."""
    rows = []
    for directory in args.runs:
        if directory.is_file():
            continue  # `runs/*` names pictures and pages, too
        try:
            record = read_run(directory)
        except (UsageError, RunError) as error:
            if not directory.exists():
                raise
            note(f"skipped: {error}", args.quiet)  # it names searches, too
            continue
        best, test, data = record["best"] or {}, record["test"] or {}, record["data"]
        dataset = data["name"]
        if dataset == "synthetic":  # each script draws its own
            dataset = f"synthetic ({record['script']})"
        row = {
            "record": record,
            "run": str(directory),
            "rank": None,
            "dataset": dataset,
            "selection": data["selection"],
            "model": record["args"]["model"],
            "parameters": record["parameters"],
            "epochs": record["epochs"],
            "best_epoch": best.get("epoch"),
            "val_loss": best.get("val_loss"),
            "val_acc": best.get("val_acc"),
            "test_acc": test.get("acc"),
            "averaged_views": record["args"]["tta"],
            "plain_test_acc": test.get("plain_acc", test.get("acc")),
            "seconds": record["seconds"],
            "status": record["status"],
        }
        names = "not_ranked", "not_paired", *PAIR, *mean_names("seed"), *mean_names("fold")
        rows.append(row | dict.fromkeys(names))
    if not rows:
        raise RunError("none of these is a run directory")
    return rows


def rank_runs(rows: list[dict]) -> list[str]:
    """Sort the rows, and number those that can be compared, best first. Returns remarks."""
    # Put together what was validated on the same images; of each dataset the most runs first.
    groups: list[list[dict]] = []
    for row in rows:
        for group in groups:
            same = row["dataset"] == group[0]["dataset"]
            if same and not why_not_comparable(row, group[0], "val_acc"):
                group.append(row)
                break
        else:
            groups.append([row])
    groups.sort(key=lambda group: (group[0]["dataset"], -len(group)))

    # Rank by the losses, or by the accuracies where the losses are of different things.
    remarks, leaders = [], {}
    for group in groups:
        first = group[0]
        leader = leaders.setdefault(first["dataset"], first)
        reasons = [why_not_comparable(row, first, "val_loss") for row in group]
        reason = next(filter(None, reasons), "")
        name, sign = ("val_acc", -1) if reason else ("val_loss", 1)
        group.sort(key=lambda row: math.inf if row[name] is None else sign * row[name])
        if reason and leader is first:
            text = f"{first['dataset']}: {reason}"
            remarks.append(f"{text}, so they are ranked by validation accuracy")
        for place, row in enumerate(group, 1):
            row["not_ranked"] = why_not_comparable(row, leader, "val_acc") or None
            row["rank"] = None if row["not_ranked"] or row[name] is None else place
    rows[:] = [row for group in groups for row in group]
    return remarks


def why_not_comparable(row: dict, other: dict, figure: str) -> str:
    """Why a figure of two rows cannot be compared, "" where it can."""
    return common.why_not_comparable(row["record"], other["record"], figure)


def reasons_of(rows: list[dict], name: str, what: str) -> list[str]:
    """Remarks on the rows with a reason under this name, one for each reason."""
    remarks = []
    for reason in dict.fromkeys(row[name] for row in rows if row[name]):
        runs = [row["run"] for row in rows if row[name] == reason]
        text = ", ".join(runs) if len(runs) <= 5 else f"{len(runs)} runs"
        remarks.append(f"{what}, as {reason}: {text}")
    return remarks


def add_pairs(rows: list[dict], split: str) -> None:
    """Put into the ranked rows how each does, image by image, against the best of its dataset that
    was evaluated; without averaged views."""
    bests: dict[str, tuple] = {}
    for row in rows:
        try:
            checksum, right = read_evaluation(row, split)
            best = bests.setdefault(row["dataset"], (row["run"], checksum, right))
            if checksum != best[1] or right.keys() != best[2].keys():
                raise RunError(f"evaluated on other {split} images than {best[0]}")
        except RunError as error:
            row["not_paired"] = str(error)
            continue
        if best[0] != row["run"]:
            images, one = len(right), sum(right[file] > best[2][file] for file in right)
            other = sum(right[file] < best[2][file] for file in right)
            interval = difference_interval(one, other, images)
            values = best[0], images, one, other, (one - other) / images, *interval
            row.update(zip(PAIR, (*values, mcnemar_mid_p(one, other)), strict=True))


def read_evaluation(row: dict, split: str) -> tuple[str, dict[str, bool]]:
    """Checksum of the images that a run was evaluated on, and of each file whether it was right.
    RunError says why they are of no use."""
    # Was it evaluated with the weights that it has now?
    directory = place_of(Path(row["run"]), split)
    path = directory / "predictions.csv"
    if not path.exists() or not (directory / "metrics.json").exists():
        raise RunError(f"not evaluated on the {split} images")
    metrics = records.read_json(directory / "metrics.json")
    if metrics.get("epoch") != row["best_epoch"]:
        raise RunError("trained on since the evaluation")

    # Read it.
    try:
        with open(path, newline="", errors="surrogateescape") as file:
            answers = list(csv.DictReader(file))
        right = {answer["file"]: answer["class"] == answer["predicted"] for answer in answers}
    except (csv.Error, KeyError):
        right = {}
    if len(right) != metrics.get("images"):
        raise RunError(f"{shown(path)} is damaged")
    return metrics.get("checksum"), right


def mcnemar_mid_p(one: int, other: int) -> float:
    """Two-sided mid-p of McNemar's test that two models are equally good, where `one` and `other`
    images are right with the one or the other only.

    M. W. Fagerland, S. Lydersen and P. Laake, "The McNemar test for binary matched-pairs data:
    mid-p and asymptotic are better than exact conditional" (2013).
    """
    from scipy.stats import binom

    fewer, images = min(one, other), one + other
    return float(2 * binom.cdf(fewer, images, 0.5) - binom.pmf(fewer, images, 0.5))


def difference_interval(one: int, other: int, images: int) -> tuple[float, float]:
    """The 95% interval of the difference of two accuracies on the same `images`, of which `one` and
    `other` are right with the one or the other model only.

    D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data" (2012).
    """
    p, q = (one + 1) / (images + 2), (other + 1) / (images + 2)
    half = statistics.NormalDist().inv_cdf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (images + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def equal_runs(rows: list[dict], argument: str) -> list[list[dict]]:
    """The runs that came to their end and are equal but for an argument; each of its values counts
    once."""
    groups: dict[str, dict] = {}
    for row in rows:
        record = row["record"]
        same = {name: value for name, value in record["args"].items() if name not in ELSEWHERE}
        value = same.pop(argument)
        if row["status"] in ENDED and value is not None:
            images = record["data"]["train"] + record["data"]["val"]
            key = json.dumps([record["script"], row["dataset"], images, same], default=str)
            groups.setdefault(key, {}).setdefault(value, row)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def add_means(groups: list[list[dict]], argument: str) -> DataFrame:
    """Put into the rows of runs that are equal but for an argument what their accuracies are
    together. Returns the table of that."""
    names = mean_names(argument)
    for group in groups:
        parts = [mean_interval([row[name] for row in group]) for name in ("val_acc", "test_acc")]
        values = len(group), ", ".join(row["run"] for row in group), *parts[0], *parts[1]
        for row in group:
            row.update(zip(names, values, strict=True))
    columns = [name for name in names[2:] if not name.endswith("_high")]
    firsts = [group[0] for group in groups]
    return for_people(firsts, names[1], "model", names[0], *columns)


def mean_names(argument: str) -> list[str]:
    """The names of what runs have together that are equal but for an argument."""
    start = "" if argument == "seed" else f"{argument}_"
    return [f"{argument}s", f"{argument}_runs", *(start + name for name in MEANS)]


def mean_interval(values: list) -> list:
    """Mean and standard deviation of two values or more, each from 0 to 1, and low and high of
    Student's 95% interval of the mean, from three values on. None is what is not known."""
    from scipy.stats import t

    if None in values:
        return [None] * 4
    mean, deviation, count = statistics.mean(values), statistics.stdev(values), len(values)
    if count < 3:
        return [mean, deviation, None, None]
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return [mean, deviation, max(0.0, mean - half), min(1.0, mean + half)]


def judge_out_of_fold(group: list[dict], args: Namespace) -> tuple[DataFrame, Gallery]:
    """The suspects among all images of a folder, each judged by the one run of all folds that was
    not trained on it; and the first of them as a gallery."""
    from pandas import concat

    parts = []
    for row in group:
        trained = load_trained(Path(row["run"]), args.device, args.quiet)
        images = load_images(trained, "val", args.data_dir, args.quiet)
        answers = answer_table(images, trained.probabilities(trained.test(images)[1]))
        parts.append(answers.assign(file=[str(file.path) for file in images.files]))
    suspects = find_suspects(concat(parts)).reset_index(drop=True)

    # Read the images that are shown once more.
    first = suspects.head(SHOWN_IMAGES)
    pixels = [trained.read_image(Path(file)) for file in first.file]
    title = "Suspects: unlikely classes, judged by the run that was not trained on the image"
    return suspects, gallery(title, trained.as_images(pixels), first, as_suspect)


def draw_comparison(rows: list[dict]) -> Figure:
    """Validation loss and accuracy of the runs of each dataset on a pair of axes; a legend for the
    ten best."""
    datasets = dict.fromkeys(row["dataset"] for row in rows)
    figure = new_figure(13, 4.8 * len(datasets), "validation, run by run")
    parts = figure.subfigures(len(datasets), squeeze=False).flat
    for part, dataset in zip(parts, datasets, strict=True):
        part.suptitle(shorten(Path(dataset).name, 60))
        axes = curves_axes(part)
        for place, row in enumerate(row for row in rows if row["dataset"] == dataset):
            look = {"color": "lightgrey", "zorder": 1}
            if place < 10:
                look = {"color": f"C{place}", "label": shorten(row["run"][-40:], 40)}
            plot_history(axes, Path(row["run"]), "val", **look)
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


# ------------------------ Predict ------------------------
FILES_AT_A_TIME = 256  # that are read and classified together


def classify(args: Namespace) -> dict:
    """Print file, class and probability of the user's own images, in the order given.

    UsageError for --top, RunError where a file cannot be read, after the others.
    """
    # Which files.
    trained = load_trained(args.runs[0], args.device, args.quiet)
    top, most = args.top or 1, len(trained.config["classes"])
    if top > most:
        raise UsageError(f"--top {top}: the model has {most} classes")
    files, skipped = [], Counter()
    for path in args.predict:
        files += common.image_files(path, skipped) if path.is_dir() else [path]
    if skipped:
        note(common.as_skipped(skipped), args.quiet)
    if not files:
        raise RunError("no image files there")

    # Classify them, some at a time, and print the answers.
    predictions, unreadable = [], 0
    with tqdm(total=len(files), leave=False, disable=args.quiet or None) as bar:
        for count, images in read_in_threads(trained, files):
            rows = likeliest_classes(trained, images, top) if images else []
            print_predictions(rows, args, heading=not predictions)
            predictions += rows
            unreadable += count - len(images)
            bar.update(count)
    if unreadable:
        raise RunError(f"{unreadable} of {len(files)} files could not be read")
    return {"predictions": predictions}


def read_in_threads(trained: Trained, files: list[Path]) -> Iterator[tuple[int, list[tuple]]]:
    """Yield how many files were tried, and those that could be read with their images, some at a
    time; they are read in as many threads as there are cores. The others are named on stderr."""

    def read(file):
        try:
            return trained.read_image(file)
        except RunError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), FILES_AT_A_TIME):
            some, images = files[start : start + FILES_AT_A_TIME], []
            for file, content in zip(some, pool.map(read, some), strict=True):
                if isinstance(content, RunError):
                    print(f"evaluate.py: error: {content}", file=sys.stderr)
                else:
                    images.append((file, content))
            yield len(some), images


def likeliest_classes(trained: Trained, images: list[tuple], top: int) -> list[dict]:
    """The `top` likeliest classes of each file with its image, likeliest first."""
    _, logits = trained.test(trained.as_images([image for _, image in images]))
    best, rows = trained.probabilities(logits).topk(top), []
    for (file, _), values, labels in zip(images, *map(Tensor.tolist, best), strict=True):
        for probability, label in zip(values, labels, strict=True):
            name = trained.config["classes"][label]
            rows.append({"file": str(file), "class": name, "probability": probability})
    return rows


def print_predictions(rows: list[dict], args: Namespace, heading: bool) -> None:
    """Print predictions in the form that is asked for."""
    lines = [f"{row['file']}\t{row['class']}\t{row['probability']:.4f}" for row in rows]
    if args.json:
        lines = [json.dumps(row) for row in rows]
    elif args.csv:
        lines = [as_csv(rows, heading).rstrip("\n")]
    if rows:
        say("\n".join(lines))


# ------------------------ Export ------------------------
class WithPreprocessing(nn.Module):
    """uint8 images [N, C, H, W] to probabilities [N, K]."""

    def __init__(self, trained: Trained):
        super().__init__()
        self.model = trained.model.to(memory_format=torch.contiguous_format)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(trained.config[name]).view(-1, 1, 1))
        self.temperature = trained.config["temperature"]

    def forward(self, images):
        logits = self.model((images.float() / 255 - self.mean) / self.std)
        return (logits / self.temperature).softmax(1)


def to_torch_export(program, metadata: dict) -> tuple[bytes, Callable]:
    """The bytes of model.pt2, with the metadata as metadata.json inside, and what they compute."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def to_onnx(program, metadata: dict) -> tuple[bytes, Callable]:
    """The bytes of model.onnx, with each value of the metadata as JSON in it, and what they
    compute."""
    import onnxruntime

    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    shapes = ({0: "batch"},)
    exported = torch.onnx.export(program, **names, dynamic_shapes=shapes, verbose=False)
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    exported.model.metadata_props.update(texts)
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def compute(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return content, compute


CHECKED_IMAGES = 200  # of the run, beside the noise
# Kind: the file, what writes it, and the packages that this needs.
EXPORTS: dict[str, tuple] = {
    "torch.export": ("model.pt2", to_torch_export, ()),
    "onnx": ("model.onnx", to_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def export(args: Namespace) -> dict:
    """Write the model with its preprocessing as a file of another kind.

    The reference is the model in float32; RunError where the file answers otherwise.
    """
    # What it takes.
    name, convert, packages = EXPORTS[args.export]
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if missing:
        text = f"needs more packages: pip install {' '.join(missing)}"
        raise RunError(f"--export {args.export} {text}")
    trained = load_trained(args.runs[0], "cpu", args.quiet)
    config, random = trained.config, common.generator_for("export")
    model, shape = WithPreprocessing(trained).eval(), config["image_shape"]

    # What the file leaves to its user: as common.read_image does it.
    metadata = {
        "classes": config["classes"],
        "image_shape": shape,
        "mode": "L" if shape[0] == 1 else "RGB",
        "resize": "bilinear, antialiased, as Pillow's Image.resize",
        "square": config.get("resize", "stretch"),
        "transparent pixels": "on white",
    }

    # Images to check it with: noise of rising contrast, and some that the model was trained on.
    noise = torch.rand(5, *shape, generator=random) * torch.linspace(0, 255, 5).view(-1, 1, 1, 1)
    images, photos = noise.byte(), None
    try:
        photos = load_images(trained, "train", args.data_dir, args.quiet)
    except RunError as error:
        note(f"the export is checked with noise alone, as {error}", args.quiet)
    if photos:
        photos = photos.select(torch.randperm(len(photos), generator=random)[:CHECKED_IMAGES])
        images = torch.cat([images, photos.images])

    # Export it, and have the result answer: to a batch, and to one image.
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
    content, exported = convert(program, metadata)
    with torch.inference_mode():
        expected = model(images)
        answers = torch.cat([exported(images), exported(images[:1])])
        difference = (answers - torch.cat([expected, expected[:1]])).abs().max().item()
    if not difference < 1e-4:
        text = f"differ from the model's by {difference:.2g}: not kept"
        raise RunError(f"the exported model's probabilities {text}")
    out = args.out or trained.directory
    write_files(out, {name: content})

    # Say what it takes, and how it differs from what --predict says in the run's own precision.
    takes = f"uint8 images [N, {', '.join(map(str, shape))}] to probabilities [N, K]"
    say(f"{shown(out / name)}: {takes}, within {difference:.1g} of the model in fp32", args.quiet)
    if photos:
        _, logits = trained.test(photos)
        own = trained.probabilities(logits)
        changed = (own.argmax(1) != expected[5:].argmax(1)).sum().item()
        furthest = (own - expected[5:]).abs().max().item()
        text = f"{changed} of {len(photos)} training images get another class than by --predict"
        precision = trained.record["precision"]
        say(
            f"{text}, which computes in {precision}; probabilities differ by up to {furthest:.2g}",
            args.quiet,
        )
    return {"file": str(out / name)}


# ------------------------ Main ------------------------
def evaluate_run(args: Namespace) -> dict:
    """Evaluate one run; returns what metrics.json holds. UsageError, RunError."""
    trained = load_trained(args.runs[0], args.device, args.quiet)
    find_convolution(trained.model, args)  # --layer and --channel are looked at before the work
    images = load_images(trained, args.split, args.data_dir, args.quiet)
    if args.image >= len(images):
        raise UsageError(f"--image {args.image}: the split has {len(images)} images, from 0")
    found = measure(trained, images, args)
    figures = draw(found, args)
    write(found, figures, args)
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
    return evaluate_run(args) if len(args.runs) == 1 else compare(args)


if __name__ == "__main__":
    sys.exit(common.command_line(main))
