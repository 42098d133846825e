"""What evaluate.py measures, draws, predicts and exports, by its command line and its files,
against figures worked out here from best.pt. Pictures are looked at as they are saved."""

import base64
import contextlib
import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import common
import evaluate
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import run
from matplotlib.figure import Figure
from pandas import DataFrame
from PIL import Image
from torchvision.transforms import Normalize

PICTURES = [
    "curves",
    "per_class",
    "confusion",
    "predictions",
    "calibration",
    "filters",
    "activations",
]
# The font lacks the first, the second is no UTF-8, the third looks like HTML, two are long.
NAMES = ["0 猫", "1 \udcff $^$", "2 <b>&amp;", "a" * 200, "b " * 50 + "b"]
NAMES += [f"class {index} $x$" for index in range(5, 30)]


# ------------------------ Two runs ------------------------
def draw_digits(train):
    """Synthetic digits. Among those of the test there are no nines."""
    drawn = train_mnist.synthetic_digits(600 if train else 170, int(train))
    return drawn if train else drawn.select(drawn.labels != 9)


def save_noise(path, level, seed, *shape):
    """An image of random pixels, from this level on."""
    random = np.random.default_rng(seed)
    pixels = random.integers(level, level + 60, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the runs `digits`, with averaged views, and `photos`, of thirty classes, in
    bf16."""
    folder = tmp_path_factory.mktemp("evaluate")
    for index in range(150):
        label, number = divmod(index, 5)
        part = "train" if number < 3 else "test"
        path = folder / "images" / part / NAMES[label] / f"{number}.png"
        save_noise(path, label, index, 16, 16, 3)

    both = f"--epochs 3 --quiet --runs-dir {folder} --c1 4 --c2 8 --l1 128 --dataset"
    mnist = "synthetic --run-name digits --precision fp32 --lr 0.005 --batch-size 16 --val-size 0.2"
    mnist += " --normalize dataset --tta mirror+shift --label-smoothing 0.1"
    cifar = f"{folder}/images --run-name photos --precision bf16 --recipe default --image-size 16"
    cifar += " --batch-size 50"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mnist, "synthetic", draw_digits)
        train_mnist.main(f"{both} {mnist}".split())
        train_cifar.main(f"{both} {cifar}".split())
        yield folder


def evaluated(*argv):
    """What evaluate.py returns; several flags may be in one text."""
    return evaluate.main(" ".join(map(str, argv)).split())


def show(directory, *argv):
    """What evaluate.py returns and prints, and the axes of its pictures in `directory`."""
    drawn = {}
    save = Figure.savefig

    def savefig(figure, file):
        save(figure, file)
        drawn[file.getvalue()] = figure.axes

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(action="error"),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        patch.setattr(Figure, "savefig", savefig)
        result = evaluated(*argv)
    axes = {path.stem: drawn[path.read_bytes()] for path in directory.glob("*.png")}
    return SimpleNamespace(result=result, out=out.getvalue(), axes=axes)


def judged(directory, images, labels, flags):
    """A run as evaluate.py shows it, and what its model says of the test images."""
    shown = show(directory, directory, flags)
    shown.directory = directory
    shown.record = records.read_record(directory)

    # The model and its preprocessing are in best.pt.
    state = records.load_checkpoint(directory / "best.pt")
    shown.model = common.build_model(state).eval()
    shown.model.load_state_dict(state["weights"])
    shown.normalize = Normalize(state["mean"], state["std"])

    # What it says, and the forty surest of its mistakes.
    shown.images = images
    shown.labels = labels
    shown.logits = logits_of(shown, images)
    probabilities = shown.logits.softmax(1)
    shown.given = probabilities[range(len(labels)), labels]
    shown.confidence, shown.predicted = probabilities.max(1)
    shown.wrong = (shown.predicted != labels).nonzero().flatten()
    order = shown.confidence[shown.wrong].argsort(descending=True)
    shown.worst = shown.wrong[order[:40]]
    return shown


def logits_of(shown, images):
    """Logits [N, K] of uint8 images, in the run's precision, divided by its temperature."""
    is_bf16 = shown.record["precision"] == "bf16"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, is_bf16):
        logits = shown.model(shown.normalize(images / 255))
    return logits.float() / shown.record["best"]["temperature"]


@pytest.fixture(scope="module")
def digits(runs):
    """The run on digits, with averaged views."""
    test = draw_digits(False)
    flags = "--layer conv2 --channel 3"
    return judged(runs / "digits", test.images, test.labels, flags)


@pytest.fixture(scope="module")
def photos(runs):
    """The run on photos, with the `files` of its test."""
    directory = runs / "photos"
    rows = rows_of(directory / "data.csv")
    files = [runs / "images" / row["file"] for row in rows if row["part"] == "test"]
    images = torch.stack([common.read_image(file, 16, False) for file in files])
    labels = torch.arange(60) // 2
    shown = judged(directory, images, labels, "--image 7")
    shown.files = files
    return shown


def rows_of(path):
    """The rows of a CSV file, in which a name may have bytes that are no characters."""
    text = Path(path).read_bytes().decode(errors="surrogateescape")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def page_of(path):
    """The `tables` of an HTML file as texts, its `images` as bytes, and the `captions`."""

    def inside(tag, text):
        return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)

    def plain(tag, text):
        """The texts in these tags, without the tags in them."""
        return [html.unescape(re.sub("<.*?>", "", part)) for part in inside(tag, text)]

    # It needs no other file.
    content = path.read_text()
    assert not re.search(r"""(src|href)=(?!"data:)|https?:|@import""", content)

    tables = []
    for table in inside("table", content):
        rows = inside("tr", table)
        tables.append([plain("t[dh]", row) for row in rows])
    images = re.findall(r"base64,([^\"]*)", content)
    return SimpleNamespace(
        content=content,
        tables=tables,
        images=[base64.b64decode(image) for image in images],
        captions=plain("figcaption", content),
    )


# ------------------------ A run of forty photos ------------------------
DENSE = "--model dense --l1 8 --tutorial-layers"


def draw_photos(light=120):
    """20 dark and 20 light grey images in p."""
    for index in range(0, 40, 2):
        save_noise(Path(f"p/dark/{index}.png"), 20, index, 8, 8)
        save_noise(Path(f"p/light/{index + 1}.png"), light, index + 1, 8, 8)


def on_photos(flags):
    """The directory of a run on these."""
    argv = f"--dataset p --image-size 8 --epochs 1 --batch-size 8 --quiet {flags}"
    return run(train_mnist, *argv.split())[0]


# ------------------------ Figures ------------------------
def test_the_figures_are_those_of_run_json_to_the_bit(digits, photos, undrawn, capsys):
    """Evaluating a run again says what was said when its training ended."""
    metrics = digits.result
    tta = metrics["tta"]
    assert digits.record["test"] == {
        "loss": tta["loss"],
        "acc": tta["accuracy"],
        "plain_loss": metrics["loss"],
        "plain_acc": metrics["accuracy"],
    }

    # Without averaged views, in bf16.
    bf16 = photos.result
    assert photos.record["test"] == {"loss": bf16["loss"], "acc": bf16["accuracy"]}
    assert "tta" not in bf16
    assert "tta" not in evaluated(digits.directory, "--split val --out=val --quiet")

    # Views that are asked for come before the run's.
    again = evaluated(digits.directory, "--tta=mirror --out=out --json")
    assert json.loads(capsys.readouterr().out) == again
    assert again["tta"]["views"] == "mirror"
    assert again["tta"]["loss"] != tta["loss"]
    assert again | {"tta": tta} == metrics


def test_views_of_an_unsure_image_are_averaged(digits):
    """Of an image that the model is unsure of, six views count: moved by a pixel, and mirrored."""
    temperature = digits.record["best"]["temperature"]
    padded = F.pad(digits.images.float(), [1] * 4, "reflect")
    averaged = 0
    weights = [0.125, 0.25, 0.125]
    for start, weight in enumerate(weights):
        view = padded[..., start : start + 28, start : start + 28]
        for image in (view, view.flip(3)):
            averaged += weight * temperature * logits_of(digits, image)

    # The others keep their plain logits.
    plain = digits.logits * temperature
    unsure = plain.softmax(1).amax(1, keepdim=True) <= 0.75
    assert 0 < unsure.sum() < len(unsure)
    logits = torch.where(unsure, averaged, plain)
    loss = F.cross_entropy(logits, digits.labels).item()
    assert digits.result["tta"]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.developers
def test_metrics_agree_with_scikit_learn(digits, photos):
    """Precision, recall, F1 and the like are what others mean by these words."""
    sklearn = pytest.importorskip("sklearn.metrics")
    metrics = digits.result
    both = (digits.labels, digits.predicted)
    matrix = sklearn.confusion_matrix(*both, labels=range(10))
    assert metrics["confusion_matrix"] == matrix.tolist()

    # There are no nines in the test: they count in no mean.
    *seen, nine = metrics["classes"]
    assert nine["support"] == 0
    assert nine["f1"] is None
    look = {"labels": range(9), "zero_division": 0}
    names = ("precision", "recall", "f1", "support")
    found = [[row[name] or 0 for row in seen] for name in names]
    assert np.allclose(found, sklearn.precision_recall_fscore_support(*both, **look))
    for average in ("macro", "weighted"):
        f1 = sklearn.f1_score(*both, average=average, **look)
        assert metrics[f"{average}_f1"] == pytest.approx(f1)

    top5 = sklearn.top_k_accuracy_score(photos.labels, photos.logits, k=5)
    assert photos.result["top5_accuracy"] == pytest.approx(top5)


def check_interval(interval, share, count):
    """E. B. Wilson's interval: from its ends the share is 1.96 standard deviations away."""
    low, high = interval
    assert low < high
    for end in interval:
        variance = end * (1 - end) / count
        assert (share - end) ** 2 == pytest.approx(1.96**2 * variance, 1e-3, 1e-9)


def test_accuracies_have_an_interval(digits):
    """Those of all images, of averaged views and of each class, in the picture of them, too."""
    metrics = digits.result
    for figures in (metrics, metrics["tta"]):
        check_interval(figures["accuracy_interval"], figures["accuracy"], len(digits.labels))

    # A class without images has no bar.
    (axis,) = digits.axes["per_class"]
    rows = sorted(metrics["classes"][:9], key=lambda row: row["recall"])
    (lines,) = axis.collections
    for row, bar, line in zip(rows, axis.patches, lines.get_segments(), strict=True):
        assert bar.get_width() == row["recall"]
        check_interval(line[:, 0], row["recall"], row["support"])


def test_calibration_is_told_with_and_without_the_temperature(digits):
    """Of the images of which the model is so sure, how many are right, is told and drawn."""
    metrics = digits.result
    assert metrics["temperature"] != 1
    before = (digits.logits * metrics["temperature"]).softmax(1).amax(1)
    right = (digits.predicted == digits.labels).float()
    above, below = digits.axes["calibration"]
    for confidence, name in ((before, "_before"), (digits.confidence, "")):
        # Each of the fifteen bins is open below and closed above.
        places = (confidence * 15).ceil().long() - 1
        images = places.bincount(minlength=15)
        sure = places.bincount(confidence, 15) / images
        share = places.bincount(right, 15) / images
        bins = DataFrame(metrics[f"calibration{name}"])
        found = bins[["images", "confidence", "accuracy"]]
        expected = torch.stack([images, sure, share], 1)
        assert np.allclose(found, expected, equal_nan=True)

        # How far the two are from one another, weighed by the images.
        gaps = (sure - share).abs() * images
        error = gaps.nansum().item() / len(right)
        assert metrics[f"expected_calibration_error{name}"] == pytest.approx(error)
        assert f"{error:.2%}" in digits.out

        # The picture has a point for each bin that has images.
        bins = bins.dropna()
        points = [bins.confidence, bins.accuracy]
        assert any(np.array_equal(points, line.get_data()) for line in above.lines)

    # With the temperature it has bars, too.
    heights = [bar.get_height() for bar in (*above.patches, *below.patches)]
    assert heights == [*bins.accuracy, *bins["images"]]


def test_a_perfect_dense_net_has_no_mistakes_no_filters_and_no_temperature(undrawn, capsys):
    """What there is nothing of is left out, and said."""
    draw_photos()
    directory = on_photos(f"{DENSE} --epochs 40 --lr 0.01 --val-size 0")
    metrics = evaluated(directory)
    out = capsys.readouterr().out
    assert metrics["accuracy"] == metrics["macro_f1"] == metrics["temperature"] == 1
    assert "no convolution" in out
    assert "the test set validated" in out
    assert "temperature" not in out
    assert "Suspects: 0 of" in out
    assert rows_of(directory / "suspects.csv") == []


# ------------------------ Pictures ------------------------
def test_the_curves_are_those_of_the_log(digits):
    """Training and validation, epoch by epoch, with the epoch that is kept."""
    rows = records.read_log(digits.directory)
    names = ("loss", "acc")
    for axis, name in zip(digits.axes["curves"], names, strict=True):
        lines = [[*line.get_ydata()] for line in axis.lines]
        assert lines == [
            [row[f"train_{name}"] for row in rows],
            [row[f"val_{name}"] for row in rows],
            [digits.record["best"][f"val_{name}"]],
        ]


def test_the_confusion_matrix_is_drawn_in_counts_and_in_percent(digits):
    """Of each class, which it is taken for; of each prediction, which class it was."""
    matrix = np.array(digits.result["confusion_matrix"])
    counts, *shares = [axis for axis in digits.axes["confusion"] if axis.images]
    numbers = [int(text.get_text()) for text in counts.texts]
    assert numbers == [*matrix.flat]

    # What would divide by zero is not drawn.
    sums = [matrix.sum(1, keepdims=True), matrix.sum(0)]
    for axis, total in zip(shares, sums, strict=True):
        drawn = axis.images[0].get_array()
        assert np.allclose(drawn.filled(0), 100 * matrix / np.maximum(total, 1))


def test_filters_and_feature_maps_are_those_of_the_layer(digits, photos, tmp_path):
    """They are the weights of a convolution, and what comes out of it for one image."""

    def sheet(shown, name="filters", panel=0):
        """The pixels of a picture, in which there is one between two tiles."""
        return shown.axes[name][panel].images[0].get_array()

    # The second filter of the first layer, as colours.
    layer = photos.model.conv1
    first = layer.weight.detach()
    extreme = first.abs().max()
    colours = first[1].permute(1, 2, 0) / (2 * extreme) + 0.5
    assert np.allclose(sheet(photos)[1:4, 5:8], colours, atol=1e-6)

    # Its map of image 7, before the ReLU in place that follows.
    x = photos.normalize(photos.images / 255)
    output = layer(x)[7, 1].detach()
    assert output.min() < -0.1
    maps = sheet(photos, "activations", 1)
    assert np.allclose(maps[1:15, 16:30], output, atol=0.02)

    # A layer and a channel that are asked for, and all channels.
    second = digits.model.conv2.weight.detach()
    assert np.allclose(sheet(digits)[1:4, 1:4], second[0, 3], atol=1e-6)
    argv = [digits.directory, "--layer conv2 --out", tmp_path]
    again = show(tmp_path, *argv, "--all-kernels")
    assert np.allclose(sheet(again)[5:8, 9:12], second[1, 2], atol=1e-6)

    # The sample of images is the same each time.
    one, other = (path / "predictions.png" for path in (tmp_path, digits.directory))
    assert one.read_bytes() == other.read_bytes()

    # What the model or the split does not have is told.
    for flag in ("--layer 3", "--channel 4", f"--image {len(digits.labels)}"):
        with pytest.raises(records.UsageError, match=r"conv1, conv2$|, from 0$"):
            evaluated(*argv, flag)


def test_grad_cam_weighs_the_last_maps_by_their_mean_gradients(digits):
    """Beside each mistake is where the model saw what it took the image for."""
    # The CNN in two parts: to the output of its second convolution, and on to the logits.
    images = digits.images[digits.worst]
    model = digits.model
    x = model.conv1(digits.normalize(images / 255))
    x = F.relu(F.max_pool2d(model.norm1(x), 2))
    maps = model.conv2(x)
    x = F.relu(F.max_pool2d(model.norm2(maps), 2))
    logits = model.fc2(F.relu(model.fc1(x.flatten(1))))

    # The maps, weighed by how much they speak for the class that each image is taken for.
    score = logits.amax(1).sum()
    (gradients,) = torch.autograd.grad(score, maps)
    weights = gradients.mean((2, 3), keepdim=True)
    heat = (weights * maps.detach()).sum(1, keepdim=True)
    heat = F.interpolate(heat.relu(), (28, 28), mode="bilinear")

    # The more it saw there, the brighter: the colours go from black to yellow.
    (axis,) = digits.axes["gradcam"]
    for drawn, expected, pixels in zip(axis.images, heat, images, strict=True):
        red = drawn.get_array()[..., 0]
        added = red - 0.45 * pixels[0].numpy()
        alike = np.corrcoef(added.flatten(), expected.flatten())[0, 1]
        assert expected.max() == 0 or alike > 0.9


def frozen_net(image_shape, classes):
    """A net of which only the last layers are trained."""
    net = torchvision.models.mobilenet_v3_small(num_classes=classes)
    net.features.requires_grad_(False)
    return net


def transformer(image_shape, classes):
    """A net whose convolution cuts the image into patches."""
    return torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 8, num_classes=classes)


@pytest.mark.parametrize(
    ("net", "has_maps"),
    [
        (frozen_net, True),
        (transformer, False),
    ],
)
def test_grad_cam_is_drawn_where_a_convolution_gives_maps(net, has_maps, monkeypatch, undrawn):
    """Also of a net whose convolutions are frozen, and not of a transformer's patches."""
    monkeypatch.setitem(common.MODELS, "net", net)
    draw_photos(light=20)  # which cannot be told from dark ones
    directory = on_photos("--model net --image-size 64 --no-grey --lr 1e-9")
    metrics = evaluated(directory, "--split train --quiet")
    assert metrics["accuracy"] < 1
    assert (directory / "train" / "gradcam.png").exists() == has_maps


# ------------------------ Files and pages ------------------------
def test_predictions_csv_has_each_image_with_its_class_and_the_prediction(digits):
    """Whatever else one wants to know can be computed from that file."""
    # Classes are digits here, and images have numbers in place of files.
    table = DataFrame(rows_of(digits.directory / "predictions.csv")).astype(float)
    expected = {
        "file": torch.arange(len(digits.labels)),
        "class": digits.labels,
        "probability": digits.given,
        "predicted": digits.predicted,
        "predicted_probability": digits.confidence,
    }
    assert [*table] == [*expected]
    for name, values in expected.items():
        assert np.allclose(table[name], values, atol=1e-5), name


def test_suspects_are_the_images_whose_class_is_least_likely(digits, photos, undrawn):
    """A tenth of all images, of those that are taken for another class, by their files."""
    rows = rows_of(photos.directory / "suspects.csv")
    order = photos.given[photos.wrong].argsort()
    places = photos.wrong[order[:6]]
    assert [row["file"] for row in rows] == [str(photos.files[place]) for place in places]

    # Images without files, which nobody could move into another folder, have none.
    assert not (digits.directory / "suspects.csv").exists()

    # Of training images it says that the model has seen them.
    evaluated(photos.directory, "--split train --out train")
    for directory, has_seen in ((photos.directory, False), (Path("train"), True)):
        content = (directory / "report.html").read_text()
        assert ("trained on these labels" in content) == has_seen


def test_the_report_is_one_page_with_what_is_on_the_screen(digits):
    """report.html can be sent to somebody else: it has all that there is to see."""
    page = page_of(digits.directory / "report.html")
    metrics = digits.result
    results, classes, confused, settings = page.tables
    for table in (results, classes, confused):
        for row in table[1:]:
            texts = [re.escape(text) for text in row if text]
            assert re.search(" +".join(texts), digits.out)

    # The headline is that of averaged views, as at the end of the training; the plain one follows.
    _, averaged, _, plain, *_ = results
    for row, figures in ((averaged, metrics["tta"]), (plain, metrics)):
        low, high = figures["accuracy_interval"]
        assert row[1:] == [f"{figures['accuracy']:.2%}", f"{low:.2%} to {high:.2%}"]
    assert f"{averaged[1]} of the images" in page.content

    # The eights, and the nines that there are not.
    row = metrics["classes"][8]
    assert classes[9][:3] == ["8", str(row["support"]), f"{row['recall']:.2%}"]
    assert classes[10][:3] == ["9", "0", "-"]

    # The most frequent mistake.
    errors = np.array(metrics["confusion_matrix"])
    np.fill_diagonal(errors, 0)
    actual, guess, count = map(int, confused[1][:3])
    assert count == errors.max() == errors[actual, guess]

    # What it was trained with.
    assert ["--label-smoothing", "0.1"] in settings
    assert ["validation images", "120"] in settings


def test_the_report_shows_the_mistakes_and_all_pictures(digits):
    """The mistakes are images of their own, each beside what the model saw; then the pictures."""
    page = page_of(digits.directory / "report.html")
    assert f"The 40 most confident of {len(digits.wrong)} mistakes" in page.content
    for place, index in enumerate(digits.worst):
        found = Image.open(io.BytesIO(page.images[2 * place]))
        assert np.array_equal(found, digits.images[index, 0])
        words = f"{digits.labels[index]}, taken for\n{digits.predicted[index]} "
        assert page.captions[place].startswith(words)
    pictures = [(digits.directory / f"{name}.png").read_bytes() for name in PICTURES]
    assert sorted(page.images[80:]) == sorted(pictures)


PROBE = """<script>
const seen = {width: document.documentElement.scrollWidth};
for (const head of document.querySelectorAll("table")[1].querySelectorAll("th"))
  seen[head.innerText.trim()] = [1, 2].map(() => {
    head.firstElementChild.click();
    const rows = [...head.closest("table").tBodies[0].rows];
    return rows.map(row => row.cells[head.cellIndex].innerText);
  });
document.body.textContent = JSON.stringify(seen);
</script>"""


def test_names_of_any_kind_are_on_the_page(photos):
    """A folder may be called whatever a file system takes."""
    page = page_of(photos.directory / "report.html")
    names = [row[0] for row in page.tables[1]]
    assert names == ["class", NAMES[0], "1 ? $^$", *NAMES[2:]]
    assert "<b>" not in page.content


def test_a_browser_sorts_the_tables_and_fits_them_on_a_phone(photos):
    """A click on a heading sorts by that column, a second one the other way round."""
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, browsers), None) or pytest.skip("no chromium on this machine")

    # The class of most images gets more than a thousand.
    content = (photos.directory / "report.html").read_text()
    content = content.replace("</body>", f"{PROBE}</body>").replace(">2<", ">1,999<", 1)
    Path("page.html").write_text(content)
    here = Path.cwd()
    flags = f"--headless --no-sandbox --disable-gpu --window-size=500,900 --user-data-dir={here}/it"
    command = [browser, *flags.split(), "--dump-dom", f"file://{here}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    body = re.search("<body>(.*)</body>", done.stdout, re.DOTALL)[1]
    seen = json.loads(html.unescape(body))
    assert seen["width"] <= 500

    # Names that have numbers in them go by these, and numbers by their value.
    names, _ = seen["class"]
    assert [name for name in names if name.startswith("class")] == NAMES[5:]
    assert seen["images"] == [["2"] * 29 + ["1,999"], ["1,999"] + ["2"] * 29]

    # What is missing is last in both directions.
    for texts in seen["precision"]:
        missing = texts.count("-")
        assert texts[30 - missing :] == ["-"] * missing != []


# ------------------------ Predict and export ------------------------
def test_predicting_answers_for_every_readable_file_in_order(digits, capsys):
    """No file is left out in silence, and none that cannot be read hides the others' answers."""

    def predict(flags):
        return evaluated(digits.directory, "--predict", flags)

    # More files than are read at a time, and some that are no images.
    Path("album/deep").mkdir(parents=True)
    for index in range(300):
        photo = Image.fromarray(digits.images[index % 100, 0].numpy())
        photo.save(f"album/deep/{index}.png")
    for name in ("album/a.heic", "album/c.txt", "IMG.HEIC", "album/deep/7.png"):
        Path(name).write_text("no image")
    paths = "album/deep/299.png album"
    with pytest.raises(records.RunError, match=r"2 of 302 .* 1 .heic \(pip install pillow-heif\)"):
        predict(f"{paths} IMG.HEIC")

    # A file that is named before its folder comes first.
    out, err = capsys.readouterr()
    order = [299, *range(7), *range(8, 300)]
    for line, index in zip(out.splitlines(), order, strict=True):
        file, name, probability = line.split("\t")
        assert file == f"album/deep/{index}.png"
        assert int(name) == digits.predicted[index % 100]
        assert abs(float(probability) - digits.confidence[index % 100]) < 1e-3
    assert "2 files skipped: 1 .heic (pip install pillow-heif), 1 .txt" in err
    assert "album/deep/7.png cannot be used" in err
    assert "IMG.HEIC cannot be used" in err

    # For programs there is JSON, a line an answer.
    Path("album/deep/7.png").unlink()
    rows = predict(f"{paths} --json --quiet")["predictions"]
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == rows

    # Or CSV: the likeliest classes of each, most likely first, under one heading.
    photo.save("a,b.png")
    rows = predict(f"{paths} a,b.png --top 3 --csv --quiet")["predictions"]
    out, err = capsys.readouterr()
    heading, *lines = csv.reader(io.StringIO(out))
    assert heading == [*rows[0]]
    assert lines == [[*map(str, row.values())] for row in rows]
    assert not err
    likeliest = digits.logits[99].softmax(0).topk(3)
    for row, probability, label in zip(rows, *likeliest, strict=False):
        assert row["probability"] == pytest.approx(probability.item())
        assert int(row["class"]) == label

    Path("none").mkdir()
    with pytest.raises(records.UsageError, match="has 10 classes"):
        predict("album --top 11")
    with pytest.raises(records.RunError, match="no image"):
        predict("none")


@pytest.mark.parametrize(
    "kind",
    ["torch.export", pytest.param("onnx", marks=pytest.mark.developers)],
)
def test_an_exported_model_answers_as_the_model_does(digits, kind, capsys):
    """The file takes uint8 images of any number and says what else its user needs to know."""
    runtime = pytest.importorskip("onnxruntime") if kind == "onnx" else None
    file = evaluated(digits.directory, "--out out --data-dir nowhere --export", kind)["file"]
    difference = re.search(r"within ([\d.e-]+) of the model", capsys.readouterr().out)[1]
    assert float(difference) < 1e-4

    # Another program loads it, and gives it another number of images.
    images = digits.images[:3]
    if runtime:
        session = runtime.InferenceSession(file)
        (answer,) = session.run(None, {"images": images.numpy()})
        texts = session.get_modelmeta().custom_metadata_map
        told = {name: json.loads(text) for name, text in texts.items()}
    else:
        texts = {"metadata.json": ""}
        program = torch.export.load(file, extra_files=texts)
        answer = program.module()(images).detach()
        told = json.loads(texts["metadata.json"])
    expected = digits.logits[:3].softmax(1)
    assert np.allclose(answer, expected, atol=1e-5)
    assert told["classes"] == list("0123456789")
    assert told["mode"] == "L"
    assert told["resize"].startswith("bilinear")


def test_an_exported_model_names_the_filter_of_its_run(digits):
    """Whoever makes images square for it needs to know."""
    shutil.copytree(digits.directory, "copy")
    path = Path("copy/best.pt")
    state = records.load_checkpoint(path)
    records.save_checkpoint(path, state | {"resize": "crop:0.9:bicubic"})
    texts = {"metadata.json": ""}
    torch.export.load(evaluated("copy --export torch.export")["file"], extra_files=texts)
    assert json.loads(texts["metadata.json"])["resize"].startswith("bicubic")


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_an_export_that_answers_otherwise_is_not_kept(digits, value, monkeypatch):
    """A fault in a package that exports is noticed before the file is used."""

    def answer(images):
        return torch.full((len(images), 10), value)

    exported = SimpleNamespace(module=lambda: answer)
    monkeypatch.setattr(torch.export, "load", lambda _: exported)
    with pytest.raises(records.RunError, match="not kept"):
        evaluated(digits.directory, "--export torch.export --out none")
    assert not Path("none").exists()


@pytest.mark.developers
def test_a_package_that_an_export_needs_is_named(digits, monkeypatch):
    """Who has not installed it reads what to type, and no file is left."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError) as failure:  # the program says: pip install NAME
        evaluated(digits.directory, "--export onnx --out none")
    assert failure.value.name == "onnxruntime"
    assert not Path("none").exists()
