"""What evaluate.py measures, draws, predicts and exports, by its command line and its files,
against figures worked out here from best.pt. Pictures are looked at as they are saved."""

import base64
import contextlib
import csv
import html
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
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
from PIL import Image

PICTURES = ["curves", "per_class", "confusion", "predictions", "calibration"]
PICTURES += ["filters", "activations"]
# The font lacks the first, the second is no UTF-8, the third looks like HTML, the last are long.
NAMES = ["0 猫", "1 \udcff $^$", "2 <b>&amp;", "a" * 200, "b " * 50 + "b"]


def digits(train):
    drawn = train_mnist.synthetic_digits(600 if train else 170, int(train))
    return drawn if train else drawn.select(drawn.labels != 9)  # the test has no nines


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the runs `digits`, with averaged views, and `photos`, of thirty classes, in
    bf16."""
    folder, random = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    for index in range(150):
        label, number = divmod(index, 5)
        name = [*NAMES, *(f"class {index} $x$" for index in range(5, 30))][label]
        place = folder / "images" / ("train" if number < 3 else "test") / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8) + np.uint8(label)
        Image.fromarray(pixels).save(place / f"{number}.png")
    both = f"--epochs 3 --quiet --runs-dir {folder} --c1 4 --c2 8 --l1 128 --dataset"
    mnist = "synthetic --run-name digits --precision fp32 --lr 0.005 --batch-size 16 --val-size 0.2"
    mnist += " --normalize dataset --tta mirror+shift --label-smoothing 0.1"
    cifar = f"{folder}/images --run-name photos --precision bf16 --recipe default --image-size 16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mnist, "synthetic", digits)
        train_mnist.main(f"{both} {mnist}".split())
        train_cifar.main(f"{both} {cifar} --batch-size 50".split())
        record = records.read_record(folder / "photos") | {"status": "stopped_early"}
        records.write_json(folder / "photos" / "run.json", record)
        yield folder


def show(directory, *argv):
    """Run evaluate.py: what it returns and prints, and the axes of its pictures in `directory`."""
    drawn, save, out, error = {}, Figure.savefig, io.StringIO(), io.StringIO()

    def savefig(figure, file, **options):
        save(figure, file, **options)
        drawn[file.getvalue()] = figure.axes

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="error"):
        patch.setattr(Figure, "savefig", savefig)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            result = evaluate.main([str(argument) for argument in argv])
    axes = {path.stem: drawn[path.read_bytes()] for path in directory.glob("*.png")}
    return SimpleNamespace(result=result, out=out.getvalue(), err=error.getvalue(), axes=axes)


@pytest.fixture(scope="module")
def shown(runs):
    return show(runs / "digits", runs / "digits", "--layer", "conv2", "--channel", "3")


@pytest.fixture(scope="module")
def photos(runs):
    shown = show(runs / "photos", runs / "photos", "--image", "7")
    rows = rows_of(runs / "photos" / "data.csv")
    shown.files = [runs / "images" / row["file"] for row in rows if row["part"] == "test"]
    shown.images = torch.stack([common.read_image(file, 16, False) for file in shown.files])
    shown.labels = torch.arange(60) // 2
    with torch.autocast("cpu", torch.bfloat16):
        shown.logits = logits_of(runs / "photos", shown.images).float()
    return shown


def logits_of(directory, images):
    """Logits [N, K] of uint8 images, in float32, divided by the run's temperature."""
    model, preprocessed = loaded(directory, images)
    with torch.inference_mode():
        return model(preprocessed) / records.load_checkpoint(directory / "best.pt")["temperature"]


def loaded(directory, images):
    state = records.load_checkpoint(directory / "best.pt")
    model = common.build_model(state)
    model.load_state_dict(state["weights"])
    mean, std = (torch.tensor(state[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return model.eval(), (images / 255 - mean) / std


@pytest.fixture(scope="module")
def answers(runs):
    """Of the test of `digits`: what is predicted how surely, and the forty surest mistakes."""
    images, labels = digits(False).images, digits(False).labels
    logits = logits_of(runs / "digits", images)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    assert len(wrong) > 40  # so they have to be chosen
    worst = wrong[confidence[wrong].argsort(descending=True)][:40]
    return SimpleNamespace(**locals())


def rows_of(path):
    text = Path(path).read_bytes().decode(errors="surrogateescape")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def page_of(path):
    """The `tables` of an HTML file as texts, its `images` as bytes, and the `captions`."""
    content = path.read_text()
    assert not re.search(r"""(src|href)=(?!"data:)|https?:|@import""", content)

    def inside(tag, text):
        return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)

    def cells(row):
        return [html.unescape(re.sub("<.*?>", "", cell)) for cell in inside("t[dh]", row)]

    tables = [[cells(row) for row in inside("tr", table)] for table in inside("table", content)]
    images = [base64.b64decode(image) for image in re.findall(r"base64,([^\"]*)", content)]
    captions = [html.unescape(text) for text in inside("figcaption", content)]
    return SimpleNamespace(content=content, tables=tables, images=images, captions=captions)


def check_interval(interval, share, count):
    """E. B. Wilson's interval: from its ends the share is 1.96 standard deviations away."""
    assert interval[0] < interval[1] and interval[0] <= share <= interval[1]
    for end in interval:
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, 1e-3, 1e-9)


ON_PHOTOS = ["--dataset", "p", "--image-size", 8, "--epochs", 1, "--batch-size", 8, "--quiet"]
DENSE = ["--model", "dense", "--l1", 8, "--tutorial-layers"]


# ------------------------ Figures ------------------------
def test_the_figures_are_those_of_run_json_to_the_bit(runs, shown, photos, undrawn, capsys):
    metrics, tta = shown.result, shown.result["tta"]
    test = records.read_record(runs / "digits")["test"]
    plain = {"plain_loss": metrics["loss"], "plain_acc": metrics["accuracy"]}
    assert {"loss": tta["loss"], "acc": tta["accuracy"], **plain} == test
    bf16, test = photos.result, records.read_record(runs / "photos")["test"]
    assert {"loss": bf16["loss"], "acc": bf16["accuracy"]} == test and "tta" not in bf16
    # Views that are asked for come before the run's.
    argv = [str(runs / "digits"), "--tta=mirror", "--out=out", "--json"]
    again = evaluate.main(argv)
    assert json.loads(capsys.readouterr().out) == again
    assert again["tta"]["views"] == "mirror"
    assert again["tta"]["loss"] != tta["loss"]
    assert again | {"tta": tta} == metrics


def test_views_of_an_unsure_image_are_averaged(runs, shown, answers):
    padded = F.pad(answers.images.float(), (1, 1, 1, 1), "reflect")
    averaged, weights = 0, {1: 0.25, 2: 0.125, 0: 0.125}
    temperature = shown.result["temperature"]
    for start, weight in weights.items():
        view = padded[..., start : start + 28, start : start + 28]
        for image in (view, view.flip(3)):
            averaged += weight * temperature * logits_of(runs / "digits", image)
    plain = answers.logits * temperature
    unsure = plain.softmax(1).amax(1, keepdim=True) <= 0.75
    assert 0 < unsure.sum() < len(unsure)
    loss = F.cross_entropy(torch.where(unsure, averaged, plain), answers.labels)
    assert shown.result["tta"]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.developers
def test_metrics_agree_with_scikit_learn(shown, photos, answers):
    sklearn = pytest.importorskip("sklearn.metrics")
    metrics, both = shown.result, (answers.labels, answers.predicted)
    count = len(answers.labels)
    figures = sklearn.precision_recall_fscore_support(*both, labels=range(9), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), figures, strict=True):
        found = [row[name] or 0 for row in metrics["classes"][:9]]
        assert found == pytest.approx(values.tolist())
    # There are no nines in the test: they count in no mean.
    nine = metrics["classes"][9]
    assert [nine[name] for name in ("support", "accuracy", "recall", "f1")] == [0] + [None] * 3
    for name in ("macro", "weighted"):
        f1 = sklearn.f1_score(*both, average=name, labels=range(9), zero_division=0)
        assert metrics[f"{name}_f1"] == pytest.approx(f1)
    matrix = sklearn.confusion_matrix(*both, labels=range(10)).tolist()
    assert metrics["confusion_matrix"] == matrix
    assert metrics["accuracy"] == pytest.approx(1 - len(answers.wrong) / count)
    for figures in (metrics, metrics["tta"]):
        check_interval(figures["accuracy_interval"], figures["accuracy"], count)
    top5 = sklearn.top_k_accuracy_score(photos.labels, photos.logits, k=5)
    assert photos.result["top5_accuracy"] == pytest.approx(top5)


def test_calibration_is_told_with_and_without_the_temperature(runs, shown, answers):
    metrics, right = shown.result, (answers.predicted == answers.labels).float()
    temperature = records.read_record(runs / "digits")["best"]["temperature"]
    assert metrics["temperature"] == temperature != 1
    plain = (answers.logits * temperature).softmax(1).amax(1)
    above, below = shown.axes["calibration"]
    for confidence, name in ((plain, "_before"), (answers.confidence, "")):
        bins, error = metrics[f"calibration{name}"], 0
        places = (confidence * 15).ceil() - 1  # each bin is open below and closed above
        assert [one["images"] for one in bins] == places.long().bincount(minlength=15).tolist()
        bins = [one for one in bins if one["images"]]
        for one, place in zip(bins, places.unique(), strict=True):
            inside = places == place
            sure, share = confidence[inside].mean().item(), right[inside].mean().item()
            assert (one["confidence"], one["accuracy"]) == pytest.approx((sure, share))
            error += abs(sure - share) * one["images"] / len(right)
        assert metrics[f"expected_calibration_error{name}"] == pytest.approx(error)
        assert f"{error:.2%}" in shown.out
        # The picture.
        points = [[one["confidence"] for one in bins], [one["accuracy"] for one in bins]]
        assert any(np.array_equal(points, line.get_data()) for line in above.lines)
    heights = [bar.get_height() for bar in above.patches + below.patches]
    assert heights == [*points[1], *(one["images"] for one in bins)]


def test_a_perfect_dense_net_has_no_mistakes_no_filters_and_no_temperature(undrawn, capsys):
    draw_photos()
    directory = on_photos(*DENSE, "--epochs", 40, "--lr", 0.01, "--val-size", 0)
    metrics, out = evaluate.main([str(directory)]), capsys.readouterr().out
    assert metrics["accuracy"] == metrics["macro_f1"] == metrics["temperature"] == 1
    assert "no convolution" in out and "the test set validated" in out
    assert "temperature" not in out and "Suspects: 0 of" in out
    assert rows_of(directory / "suspects.csv") == []


# ------------------------ Pictures ------------------------
def test_pictures_are_drawn_from_the_figures(runs, shown, photos):
    rows, best = records.read_log(runs / "digits"), records.read_record(runs / "digits")["best"]
    for axis, name in zip(shown.axes["curves"], ("loss", "acc"), strict=True):
        lines = [line.get_ydata() for line in axis.lines]
        parts = [[row[f"{part}_{name}"] for row in rows] for part in ("train", "val")]
        assert [*map(list, lines)] == [*parts, [best[f"val_{name}"]]]
    assert "early stop: 3" in [line.get_label() for line in photos.axes["curves"][0].lines]

    matrix = np.array(shown.result["confusion_matrix"])
    panels = [axis for axis in shown.axes["confusion"] if axis.images]
    assert panels[0].texts[1].get_text() == str(matrix[0, 1]) != str(matrix[1, 0])
    for axis, sums in zip(panels, (100, matrix.sum(1, keepdims=True), matrix.sum(0)), strict=True):
        found = axis.images[0].get_array().filled(0)
        assert np.allclose(found, 100 * matrix / np.maximum(sums, 1))

    (axis,) = shown.axes["per_class"]
    seen = sorted(shown.result["classes"][:9], key=lambda row: row["recall"])
    assert [bar.get_width() for bar in axis.patches] == [row["recall"] for row in seen]
    for row, segment in zip(seen, axis.collections[0].get_segments(), strict=True):
        check_interval(segment[:, 0], row["recall"], row["support"])


def test_filters_and_feature_maps_are_those_of_the_layer(runs, shown, photos, tmp_path):
    def shown_at(shown, name="filters", panel=0):
        return shown.axes[name][panel].images[0].get_array()

    weights = records.load_checkpoint(runs / "photos" / "best.pt")["weights"]
    first = weights["conv1.weight"]
    colours = (first[1] / (2 * first.abs().max()) + 0.5).permute(1, 2, 0)
    assert np.allclose(shown_at(photos)[1:4, 5:8], colours, atol=1e-6)
    # The maps of image 7, before the ReLU in place that follows.
    outputs = F.conv2d(photos.images[[7]] / 127.5 - 1, first, weights["conv1.bias"])[0]
    assert outputs[1].min() < -0.1
    maps = shown_at(photos, "activations", 1)
    assert np.allclose(maps[1:15, 16:30], outputs[1], atol=0.02)
    # A layer and a channel that are asked for, and all channels.
    second = records.load_checkpoint(runs / "digits" / "best.pt")["weights"]["conv2.weight"]
    assert np.allclose(shown_at(shown)[1:4, 1:4], second[0, 3], atol=1e-6)
    argv = [runs / "digits", "--layer", "conv2", "--out", tmp_path]
    again = show(tmp_path, *argv, "--all-kernels")
    assert np.allclose(shown_at(again)[5:8, 9:12], second[1, 2], atol=1e-6)
    # The sample is the same each time.
    samples = [path / "predictions.png" for path in (tmp_path, runs / "digits")]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    for flag in ("--layer=3", "--channel=4", f"--image={len(digits(False))}"):
        with pytest.raises(records.UsageError, match=r"conv1, conv2$|, from 0$"):
            evaluate.main([*map(str, argv), flag])


def test_grad_cam_weighs_the_last_maps_by_their_mean_gradients(runs, shown, answers):
    # Worked out here for the CNN: its second convolution, of the class that each is taken for.
    model, x = loaded(runs / "digits", answers.images[answers.worst])
    maps = model.conv2(F.relu(F.max_pool2d(model.norm1(model.conv1(x)), 2)))
    maps.retain_grad()
    x = F.relu(F.max_pool2d(model.norm2(maps), 2)).flatten(1)
    taken_for = answers.predicted[answers.worst, None]
    model.fc2(F.relu(model.fc1(x))).gather(1, taken_for).sum().backward()
    weights = maps.grad.mean((2, 3), keepdim=True)
    heat = F.interpolate((weights * maps).sum(1, keepdim=True).relu(), (28, 28), mode="bilinear")
    # The more it saw there, the brighter: the colours go from black to yellow.
    (axis,) = shown.axes["gradcam"]
    pixels = answers.images[answers.worst, 0].numpy()
    for drawn, wanted, image in zip(axis.images, heat.detach(), pixels, strict=True):
        added = drawn.get_array()[..., 0] - 0.45 * image
        alike = np.corrcoef(added.flatten(), wanted.flatten())[0, 1]
        assert wanted.max() == 0 or alike > 0.9


def frozen_net(image_shape, classes):
    net = torchvision.models.mobilenet_v3_small(num_classes=classes)
    net.features.requires_grad_(False)
    return net


def transformer(image_shape, classes):
    return torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 8, num_classes=classes)


@pytest.mark.parametrize(("net", "has_maps"), [(frozen_net, True), (transformer, False)])
def test_grad_cam_is_drawn_where_a_convolution_gives_maps(net, has_maps, monkeypatch, undrawn):
    monkeypatch.setitem(common.MODELS, "net", net)
    argv = ["--model", "net", "--image-size", 64, "--no-grey", "--lr", 1e-9]
    draw_photos(light=20)
    directory = on_photos(*argv)
    metrics = evaluate.main([str(directory), "--split", "train", "--quiet"])
    assert metrics["accuracy"] < 1  # there are mistakes to look at
    assert (directory / "train" / "gradcam.png").exists() == has_maps


def draw_photos(light=120):
    """20 dark and 20 light grey images in p."""
    random = np.random.default_rng(0)
    for index in range(40):
        name, level = (("dark", 20), ("light", light))[index % 2]
        Path("p", name).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 40, (8, 8), dtype=np.uint8) + np.uint8(level)
        Image.fromarray(pixels).save(f"p/{name}/{index}.png")


def on_photos(*argv):
    return run(train_mnist, *ON_PHOTOS, *argv)[0]


# ------------------------ Files and pages ------------------------
def test_predictions_csv_has_each_image_with_its_class_and_the_prediction(runs, shown, answers):
    rows = rows_of(runs / "digits" / "predictions.csv")
    assert list(rows[0]) == ["file", "class", "probability", "predicted", "predicted_probability"]
    given = answers.logits.softmax(1)[range(len(rows)), answers.labels]
    expected = answers.labels, given, answers.predicted, answers.confidence
    for index, (row, *values) in enumerate(zip(rows, *expected, strict=True)):
        found = [float(value) for value in row.values()]
        assert found == pytest.approx([index, *map(float, values)], abs=1e-5)


def test_suspects_are_the_images_whose_class_is_least_likely(runs, photos, undrawn):
    assert not (runs / "digits" / "suspects.csv").exists()  # images without file names
    rows = rows_of(runs / "photos" / "predictions.csv")
    assert [runs / "images" / row["file"] for row in rows] == photos.files
    probabilities, rows = photos.logits.softmax(1), rows_of(runs / "photos" / "suspects.csv")
    given = probabilities[range(60), photos.labels]
    wrong = (probabilities.argmax(1) != photos.labels).nonzero().flatten()
    places = wrong[given[wrong].argsort()][:6].tolist()
    assert [row["file"] for row in rows] == [str(photos.files[place]) for place in places]
    # Of training images it says that the model has seen them.
    for split in ("val", "train"):
        evaluate.main([str(runs / "photos"), "--split", split, "--out", split])
        content = Path(split, "report.html").read_text()
        assert ("trained on these labels" in content) == (split == "train")


def test_the_report_is_one_page_with_what_is_on_the_screen(runs, shown, photos, answers):
    page, metrics = page_of(runs / "digits" / "report.html"), shown.result
    results, classes, confused, settings = page.tables
    for row in results[1:] + classes[1:] + confused[1:]:
        assert re.search(" +".join(map(re.escape, filter(None, row))), shown.out)
    # The headline is that of averaged views, as at the end of the training; the plain one follows.
    for row, figures in ((results[1], metrics["tta"]), (results[3], metrics)):
        interval = "{:.2%} to {:.2%}".format(*figures["accuracy_interval"])
        assert row[1:] == [f"{figures['accuracy']:.2%}", interval]
    assert f"{results[1][1]} of the images" in page.content
    row = metrics["classes"][8]
    assert classes[9][:3] == ["8", str(row["support"]), f"{row['recall']:.2%}"]
    assert classes[10][:3] == ["9", "0", "-"]
    errors = np.array(metrics["confusion_matrix"]) * (1 - np.eye(10, dtype=int))
    actual, guess, count, _ = map(str, confused[1])
    assert count == str(errors.max()) == str(errors[int(actual), int(guess)])
    assert ["--label-smoothing", "0.1"] in settings
    assert ["validation images", "120"] in settings

    # The mistakes are images of their own, each beside what the model saw; then the pictures.
    assert f"The 40 most confident of {len(answers.wrong)} mistakes" in page.content
    for place, index in enumerate(answers.worst):
        found = np.asarray(Image.open(io.BytesIO(page.images[2 * place])))
        assert (found == answers.images[index, 0].numpy()).all()
        words = f"{answers.labels[index]}, taken for\n{answers.predicted[index]} "
        assert page.captions[place].startswith(words)
    pictures = [(runs / "digits" / f"{name}.png").read_bytes() for name in PICTURES]
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


def test_a_browser_shows_names_of_any_kind_and_sorts_the_tables(runs, photos, tmp_path):
    page = page_of(runs / "photos" / "report.html")
    names = {row[0] for row in page.tables[1]}
    assert names >= {NAMES[0], "1 ? $^$", *NAMES[2:]} and "<b>" not in page.content
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, browsers), None) or pytest.skip("no chromium on this machine")
    # The class of most images gets more than a thousand.
    probed = page.content.replace("</body>", f"{PROBE}</body>").replace(">2<", ">1,999<", 1)
    (tmp_path / "page.html").write_text(probed)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    command += ["--dump-dom", f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=5000", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search("<body>(.*)</body>", done.stdout, re.DOTALL)[1]))
    assert seen.pop("width") <= 500
    classes = [name for name in seen.pop("class")[0] if name.startswith("class")]
    assert classes == [f"class {index} $x$" for index in range(5, 30)]
    assert seen["images"][1][0] == "1,999"
    # Numbers by their value, what is missing last in both directions.
    for columns in seen.values():
        for texts, sign in zip(columns, (1, -1), strict=True):
            values = [sign * float(re.sub("[,%]", "", text)) for text in texts if text != "-"]
            assert values == sorted(values) and {*texts[len(values) :]} <= {"-"}


# ------------------------ Predict and export ------------------------
def test_predicting_answers_for_every_readable_file_in_order(runs, answers, capsys):
    def predict(*argv):
        return evaluate.main([str(runs / "digits"), "--predict", *argv])

    Path("album/deep").mkdir(parents=True)
    for index in range(300):
        pixels = answers.images[index % 100, 0].numpy()
        Image.fromarray(pixels).save(f"album/deep/{index}.png")
    Image.fromarray(pixels).resize((280, 280)).convert("RGBA").save("a,\nb.png")
    for name in ("album/a.heic", "album/c.txt", "IMG.HEIC", "album/deep/7.png"):
        Path(name).write_text("no image")
    argv = ["album/deep/299.png", "album"]
    with pytest.raises(records.RunError, match=r"2 of 302 .* 1 .heic \(pip install pillow-heif\)"):
        predict(*argv, "IMG.HEIC")
    out, err = capsys.readouterr()
    order = [299, *range(7), *range(8, 300)]
    for line, index in zip(out.splitlines(), order, strict=True):
        file, name, probability = line.split("\t")
        assert file == f"album/deep/{index}.png"
        assert int(name) == answers.predicted[index % 100]
        assert abs(float(probability) - answers.confidence[index % 100]) < 1e-3
    assert "2 files skipped: 1 .heic (pip install pillow-heif), 1 .txt" in err
    assert "album/deep/7.png cannot be used" in err and "IMG.HEIC cannot be used" in err

    Path("album/deep/7.png").unlink()
    rows = predict(*argv, "--json", "--quiet")["predictions"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    # The likeliest classes of each, most likely first, under one heading.
    rows = predict(*argv, "a,\nb.png", "--top", "3", "--csv", "--quiet")["predictions"]
    out, err = capsys.readouterr()
    found = csv.reader(io.StringIO(out))
    assert [*found] == [[*rows[0]], *([*map(str, row.values())] for row in rows)] and not err
    likeliest = answers.logits[99].softmax(0).topk(3)
    assert [int(row["class"]) for row in rows[:3]] == likeliest.indices.tolist()
    assert [row["probability"] for row in rows[:3]] == pytest.approx(likeliest.values.tolist())
    assert (rows[-3]["file"], rows[-3]["class"]) == ("a,\nb.png", rows[0]["class"])
    Path("none").mkdir()
    for argv, message in ((["album", "--top", "11"], "has 10 classes"), (["none"], "no image")):
        with pytest.raises((records.UsageError, records.RunError), match=message):
            predict(*argv)


@pytest.mark.parametrize(
    "kind", ["torch.export", pytest.param("onnx", marks=pytest.mark.developers)]
)
def test_an_exported_model_answers_as_the_model_does(runs, kind, monkeypatch, capsys):
    images, told = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8), {"metadata.json": ""}
    runtime = pytest.importorskip("onnxruntime") if kind == "onnx" else None
    argv = [str(runs / "digits"), "--export", kind, "--out"]
    file = evaluate.main([*argv, "out"])["file"]
    assert "0 of 200 training images get another class" in capsys.readouterr().out
    if runtime:
        session = runtime.InferenceSession(file)
        answer = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        told = session.get_modelmeta().custom_metadata_map
        told = {name: json.loads(value) for name, value in told.items()}
    else:
        answer = torch.export.load(file, extra_files=told).module()(images)
        told = json.loads(told["metadata.json"])
    assert torch.allclose(answer, logits_of(runs / "digits", images).softmax(1), atol=1e-5)
    assert told["classes"] == list("0123456789")
    assert told["mode"] == "L"
    # One that answers otherwise is not kept; a package that is missing is named.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "onnxscript" or None)
    for value in (0.0, math.nan):
        answer = torch.full((200, 10), value)
        wrong = SimpleNamespace(module=lambda answer=answer: lambda images: answer[: len(images)])
        monkeypatch.setattr(torch.export, "load", lambda *_, wrong=wrong, **__: wrong)
        with pytest.raises(records.RunError, match="install onnxscript" if runtime else "not kept"):
            evaluate.main([*argv, "none"])
        assert not Path("none").exists()


def test_an_export_says_how_it_differs_from_what_predict_says(runs, capsys):
    # The images are not there, so it is tried with noise.
    argv = ["--export", "torch.export", "--out", "out"]
    evaluate.main([str(runs / "photos"), *argv, "--data-dir", "nowhere"])
    out, err = capsys.readouterr()
    assert "noise alone" in err and "images of noise get another class" in out and "in bf16" in out
    assert 0 < float(re.search(r"differ by up to ([\d.e-]+)", out)[1]) < 0.2
    # An exported net drops no units.
    draw_photos()
    argv[-1] = "drops"
    net = ["--model", "confignet", "--always-dropout", "--image-size", 16, "--c1", 2, "--c2", 2]
    evaluate.main([str(on_photos(*net)), *argv])
    assert Path("drops/model.pt2").exists()
