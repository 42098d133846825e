"""What evaluate.py measures, draws, compares, predicts and exports, from outside: by its command line
and its files, against figures worked out here from best.pt. Pictures are looked at as they are saved."""

import base64
import contextlib
import csv
import importlib.util
import io
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import common
import evaluate
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

PICTURES = {
    "curves",
    "per_class",
    "confusion",
    "predictions",
    "mistakes",
    "calibration",
    "filters",
    "activations",
}

FILES = {"metrics.json", "report.html", *(f"{name}.png" for name in PICTURES)}


def digits(train):
    drawn = train_mnist.synthetic_digits(600 if train else 170, int(train))
    return (
        drawn if train else drawn.select((drawn.labels != 9).nonzero().flatten()[:150])
    )  # no nines in the test


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the runs `digits`, in float32 with test-time augmentation, and `hundred`, in bf16, on a folder
    of a hundred classes, two of which the font cannot write, and one that looks like HTML."""
    folder = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    for index in range(500):
        label, number = divmod(index, 5)
        place = folder / "images" / ("train" if number < 3 else "test")
        place /= {0: "0 猫", 1: "1 \udcff $^$", 2: "2 <b>&amp;"}.get(label, f"class {label:02} $x$")
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8) + np.uint8(label)
        Image.fromarray(pixels).save(place / f"{number}.png")
    both = f"--epochs 3 --quiet --runs-dir {folder} --c1 4 --c2 8 --l1 128 --dataset"
    mnist = "synthetic --precision fp32 --lr 0.005 --batch-size 16 --tta mirror+shift --label-smoothing 0.1"
    cifar = f"{folder}/images --recipe default --precision bf16 --image-size 16 --batch-size 50 --run-name hundred"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mnist, "synthetic", digits)
        train_mnist.main(
            f"{both} {mnist} --val-size 0.2 --normalize dataset --run-name digits".split()
        )
        train_cifar.main(f"{both} {cifar}".split())
        yield folder


def show(directory, *argv):
    """Run evaluate.py: its `result`, what it prints, `out` and `err`, and the `axes` and `titles` of its pictures."""
    drawn, save, out, error = {}, Figure.savefig, io.StringIO(), io.StringIO()

    def savefig(figure, file, **options):
        save(figure, file, **options)
        drawn[file.getvalue()] = figure

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="error"):
        patch.setattr(Figure, "savefig", savefig)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            result = evaluate.main([str(argument) for argument in argv])
    files = {path.stem: path.read_bytes() for path in directory.glob("*.png")}
    axes = {name: drawn[content].axes for name, content in files.items()}
    titles = {name: drawn[content].get_suptitle() for name, content in files.items()}
    return SimpleNamespace(
        result=result, out=out.getvalue(), err=error.getvalue(), axes=axes, titles=titles
    )


@pytest.fixture(scope="module")
def shown(runs):
    return show(runs / "digits", runs / "digits", "--layer", "conv2", "--channel", "3")


@pytest.fixture(scope="module")
def hundred(runs):
    shown = show(runs / "hundred", runs / "hundred", "--image", "7")
    shown.images = torch.stack(
        [common.read_image(file, 16, False) for file in sorted(runs.glob("images/test/*/*"))]
    )
    shown.classes = [path.name for path in sorted(runs.glob("images/test/*"))]
    return shown


@pytest.fixture  # pictures are empty files: to draw them takes seconds
def undrawn(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)


@pytest.fixture
def copy(runs, tmp_path):
    """`copy(name, changes of run.json or its args)` makes runs/name, a copy of `digits`."""

    def make(name="copy", **changes):
        record, made = (
            records.read_record(runs / "digits"),
            shutil.ignore_patterns(*FILES, "predictions.*"),
        )
        directory = shutil.copytree(
            runs / "digits", tmp_path / "runs" / name, ignore=made, dirs_exist_ok=True
        )
        record["args"] = {key: changes.get(key, value) for key, value in record["args"].items()}
        records.write_json(directory / "run.json", {**record, **changes})
        return directory

    return make


def logits_of(directory, images):
    """Logits [N, K] of uint8 `images` [N, C, H, W], in float32, divided by the run's temperature."""
    state = records.load_checkpoint(directory / "best.pt")
    model = common.build_model(state)
    model.load_state_dict(state["weights"])
    mean, std = (torch.tensor(state[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return model.eval()((images / 255 - mean) / std) / state["temperature"]


@pytest.fixture(scope="module")
def expected(runs):
    """The test images of `digits`, their classes, and the confidences and classes that are predicted."""
    images = digits(False)
    return (
        images.images,
        images.labels,
        *logits_of(runs / "digits", images.images).softmax(1).max(1),
    )


def wilson(correct, count):
    z, share = 1.959963984540054, correct / count
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return [(share + z**2 / (2 * count) + sign * half) / (1 + z**2 / count) for sign in (-1, 1)]


def test_the_figures_are_those_of_run_json_to_the_bit(runs, shown, hundred, undrawn, copy, capsys):
    metrics, tta, test = (
        shown.result,
        shown.result["tta"],
        records.read_record(runs / "digits")["test"],
    )
    plain = {"plain_loss": metrics["loss"], "plain_acc": metrics["accuracy"]}
    assert {"loss": tta["loss"], "acc": tta["accuracy"], **plain} == test
    assert tta["loss"] != metrics["loss"]
    words = " ".join(shown.out.split())
    for figure in (f"{tta['accuracy']:.2%}", f"{tta['loss']:.4f}"):
        assert re.search(rf"test-time augmentation, mirror\+shift {figure}", words)
    bf16, record = hundred.result, records.read_record(runs / "hundred")
    assert {"loss": bf16["loss"], "acc": bf16["accuracy"]} == record["test"] and "tta" not in bf16
    assert (
        evaluate.main([str(runs / "digits"), "--tta=mirror", "--out=out", "--json"])["tta"]["views"]
        == "mirror"
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("tta")["loss"] != tta["loss"] and printed == {
        k: v for k, v in metrics.items() if k != "tta"
    }
    # fp16 needs a GPU; the number of threads is the run's.
    evaluate.main([str(copy(precision="fp16", threads=2)), "--device", "cpu", "--csv"])
    printed = capsys.readouterr()
    assert "computed in fp32" in printed.err and torch.get_num_threads() == 2
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [float(row["precision"]) for row in rows] == [
        row["precision"] for row in metrics["classes"]
    ]


def test_views_of_an_unsure_image_are_averaged(runs, shown):
    images = digits(False)
    padded = F.pad(images.images.float(), (1, 1, 1, 1), "reflect")
    whole, up, down = (padded[..., start : start + 28, start : start + 28] for start in (1, 2, 0))
    views = {
        whole: 0.25,
        whole.flip(3): 0.25,
        up: 0.125,
        up.flip(3): 0.125,
        down: 0.125,
        down.flip(3): 0.125,
    }
    temperature = records.load_checkpoint(runs / "digits" / "best.pt")["temperature"]
    averaged = sum(
        weight * logits_of(runs / "digits", view) * temperature for view, weight in views.items()
    )
    plain = logits_of(runs / "digits", whole) * temperature
    unsure = plain.softmax(1).amax(1) <= 0.75
    assert 0 < unsure.sum() < len(unsure)
    loss = F.cross_entropy(torch.where(unsure[:, None], averaged, plain), images.labels)
    assert shown.result["tta"]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_other_splits_lie_in_a_directory_of_their_own(undrawn, copy, capsys):
    run = copy()
    record, files = records.read_record(run), set(run.iterdir())
    val, train = (
        evaluate.main([str(run), "--quiet", "--split", split]) for split in ("val", "train")
    )
    assert capsys.readouterr().out == "" and set(run.iterdir()) == {
        *files,
        run / "val",
        run / "train",
    }
    assert {path.name for path in (run / "val").iterdir()} >= FILES
    assert (
        (val["images"], train["images"])
        == (record["data"]["val"], record["data"]["train"])
        == (120, 480)
    )
    assert val["accuracy"] == record["best"]["val_acc"] and val == records.read_json(
        run / "val" / "metrics.json"
    )


@pytest.mark.developers
def test_metrics_agree_with_scikit_learn_and_the_screen_with_them(runs, shown, hundred, expected):
    sklearn = pytest.importorskip("sklearn.metrics")
    _, labels, _, predicted = expected
    metrics, everything = shown.result, {"labels": range(10), "zero_division": 0}
    figures = sklearn.precision_recall_fscore_support(labels, predicted, **everything)
    # There are no nines in the test, so a nine has no recall and no F1.
    for key, values in zip(("precision", "recall", "f1", "support"), figures, strict=True):
        for row, value in zip(metrics["classes"], values.tolist(), strict=True):
            if row["support"] and row["predicted"]:
                assert row[key] == pytest.approx(value)
    for key in ("macro", "weighted"):
        assert metrics[f"{key}_f1"] == pytest.approx(
            # The average of the classes that have images: there are no nines.
            sklearn.f1_score(labels, predicted, average=key, labels=range(9), zero_division=0)
        )
    assert (
        metrics["confusion_matrix"]
        == sklearn.confusion_matrix(labels, predicted, labels=range(10)).tolist()
    )
    assert metrics["accuracy"] == (predicted == labels).sum().item() / 150
    assert metrics["accuracy_interval"] == pytest.approx(wilson(metrics["accuracy"] * 150, 150))
    top5 = (
        logits_of(runs / "hundred", hundred.images).topk(5).indices
        == torch.arange(200)[:, None] // 2
    )
    assert hundred.result["top5_accuracy"] == pytest.approx(
        top5.sum().item() / 200, abs=0.02
    )  # bf16
    words = " ".join(shown.out.split())
    interval = "{:.2%} to {:.2%}".format(*metrics["accuracy_interval"])
    assert f" accuracy {metrics['accuracy']:.2%} {interval} " in words
    assert f" loss {metrics['loss']:.4f} " in words
    assert f" macro F1 {metrics['macro_f1']:.4f} " in words
    for row in metrics["classes"][:9]:
        figures = [f"{row['recall']:.2%}", f"{row['precision']:.2%}", f"{row['f1']:.4f}"]
        found = re.search(rf"^ *{row['name']} +{row['support']} .*$", shown.out, re.MULTILINE)
        assert found and [word for word in found[0].split() if word in figures] == figures
    matrix = np.array(metrics["confusion_matrix"])
    errors = matrix * (1 - np.eye(10, dtype=int))
    actual, guess = np.unravel_index(errors.argmax(), errors.shape)
    share = errors.max() / matrix[actual].sum()
    assert re.search(rf"\n *{actual} +{guess} +{errors.max()} +{share:.1%}", shown.out)


def test_calibration_is_shown_with_and_without_the_temperature(runs, shown, expected):
    images, labels, confidence, predicted = expected
    metrics, errors = shown.result, []
    temperature = metrics["temperature"]
    assert records.read_record(runs / "digits")["best"]["temperature"] == temperature != 1
    plain = (logits_of(runs / "digits", images) * temperature).softmax(1).amax(1)
    for confidences, name in ((confidence, ""), (plain, "_before")):
        gaps = []  # of fifteen bins, each open below and closed above
        for index, one in enumerate(metrics[f"calibration{name}"]):
            inside = (confidences > index / 15) & (confidences <= (index + 1) / 15)
            assert (one["low"], one["high"], one["images"]) == (
                index / 15,
                (index + 1) / 15,
                inside.sum(),
            )
            means = (
                confidences[inside].mean().item(),
                (predicted == labels)[inside].float().mean().item(),
            )
            assert (one["confidence"], one["accuracy"]) == (
                pytest.approx(means) if one["images"] else (None, None)
            )
            gaps.append(one["images"] / 150 * abs(means[0] - means[1]))
        errors.append(metrics[f"expected_calibration_error{name}"])
        assert len(gaps) == 15 and errors[-1] == pytest.approx(np.nansum(gaps))
    words = " ".join(shown.out.split())
    assert f"calibration error {errors[0]:.2%} " in words
    assert re.search(rf"before the temperature.* {errors[1]:.2%}", words)
    title = shown.axes["calibration"][0].get_title()
    assert re.findall(r"[\d.]+%", title) == [f"{errors[0]:.2%}", f"{errors[1]:.2%}"]


def test_curves_confusion_classes_and_calibration_are_drawn_from_the_figures(runs, shown):
    metrics, best = shown.result, records.read_record(runs / "digits")["best"]
    rows = records.read_log(runs / "digits")
    for axis, name in zip(shown.axes["curves"], ("loss", "acc"), strict=True):
        lines = {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axis.lines
        }
        assert lines["training"] == ([1, 2, 3], [row[f"train_{name}"] for row in rows])
        assert lines["validation split"] == ([1, 2, 3], [row[f"val_{name}"] for row in rows])
        assert lines[f"best: {best['epoch']}"] == ([best["epoch"]], [best[f"val_{name}"]])
    counts, recall, precision = panels = [axis for axis in shown.axes["confusion"] if axis.images]
    assert [axis.get_title().split(":")[0] for axis in panels] == ["counts", "recall", "precision"]
    matrix = np.array(metrics["confusion_matrix"])
    assert (matrix != matrix.T).any() and (counts.images[0].get_array() == matrix).all()
    for axis, along in ((recall, 1), (precision, 0)):
        percent = 100 * matrix / np.maximum(matrix.sum(along, keepdims=True), 1)
        np.testing.assert_allclose(axis.images[0].get_array().filled(0), percent, rtol=1e-5)
    assert {text.get_position(): text.get_text() for text in counts.texts}[(1, 0)] == str(
        matrix[0, 1]
    )
    (axis,) = shown.axes["per_class"]
    seen = sorted(
        (row for row in metrics["classes"] if row["support"]), key=lambda row: row["recall"]
    )
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(
        [row["recall"] for row in seen]
    )
    assert [label.get_text().split()[0] for label in axis.get_yticklabels()] == [
        row["name"] for row in seen
    ]
    for row, segment in zip(seen, axis.collections[0].get_segments(), strict=True):
        assert segment[:, 0] == pytest.approx(
            wilson(row["recall"] * row["support"], row["support"]), abs=1e-5
        )
    bins = [one for one in metrics["calibration"] if one["images"]]
    for axis, key in zip(shown.axes["calibration"], ("accuracy", "images"), strict=True):
        assert [bar.get_xy()[0] for bar in axis.patches] == pytest.approx(
            [one["low"] for one in bins]
        )
        assert [bar.get_height() for bar in axis.patches] == pytest.approx(
            [one[key] for one in bins]
        )


def test_mistakes_and_predictions_show_the_images_with_their_classes(shown, expected):
    images, labels, confidence, predicted = expected
    wrong = (predicted != labels).nonzero().flatten()
    assert len(wrong) > 40  # so that mistakes.png has to choose
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:40].tolist()
    (mistakes,), (predictions,) = shown.axes["mistakes"], shown.axes["predictions"]
    for drawn, text, index in zip(mistakes.images, mistakes.texts, worst, strict=True):
        assert (
            text.get_text()
            == f"{labels[index]}, taken for\n{predicted[index]} ({confidence[index]:.0%})"
        )
        assert (drawn.get_array() == images[index, 0].numpy()).all()
    sample = []
    for drawn, text in zip(predictions.images, predictions.texts, strict=True):
        sample += [
            index for index in range(150) if (images[index, 0].numpy() == drawn.get_array()).all()
        ]
        right = labels[sample[-1]] == predicted[sample[-1]]
        assert text.get_text().startswith(
            f"{labels[sample[-1]]}" + ("\n" if right else ", taken for\n")
        )
    assert len(set(sample)) == 40 and not set(sample).issubset(wrong.tolist())


class Page(HTMLParser):
    """What an HTML file has: `tables` (rows of texts), `images` (PNG bytes, the caption) and the `title`; each tag is
    closed, and nothing is loaded from elsewhere."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.images, self.texts, self.content = (
            [],
            [],
            [],
            [],
            path.read_text(),
        )
        self.feed(self.content)
        self.close()
        assert self.open == [] and not any(
            word in self.content for word in ("http:", "https:", "//cdn", "@import")
        )

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag in ("meta", "img") or attributes.keys().isdisjoint({"src", "href"})
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/png;base64"
            self.images.append([base64.b64decode(data, validate=True), ""])
        if tag not in ("meta", "img"):
            self.open.append(tag)
            if tag in ("td", "th"):
                self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif "figcaption" in self.open:
            self.images[-1][1] += data
        elif {"title", "p"} & set(self.open):
            self.texts.append(data)


def test_the_report_is_one_page_with_the_tables_and_pictures(runs, shown, hundred, expected):
    page, metrics = Page(runs / "digits" / "report.html"), shown.result
    assert "digits" in page.texts[0] and "150 test images" in page.texts[0]
    rows = [row for table in page.tables for row in table]
    assert any("python train_mnist.py --epochs 3" in " ".join(row) for row in rows)
    assert ["--label-smoothing", "0.1"] in rows
    # The headline is that of averaged views, as at the end of the training; the plain one follows.
    shares = [row[1] for row in rows if "accuracy" in row[0] and row[1:2]]
    assert [f"{metrics['tta']['accuracy']:.2%}", f"{metrics['accuracy']:.2%}"] == shares[:2]
    for row in metrics["classes"][:9]:
        texts = {row["name"], str(row["support"]), f"{row['recall']:.2%}"}
        assert any(texts <= set(cells) for cells in rows)
    # The mistakes are images of their own, with the classes beside them; then the pictures.
    images, labels, confidence, predicted = expected
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:40].tolist()
    found = iter(page.images)
    for index in worst:
        png, text = next(found)
        assert (np.asarray(Image.open(io.BytesIO(png))) == images[index, 0].numpy()).all()
        if not text:  # a second picture of the same mistake, before the words
            _, text = next(found)
        assert text == f"{labels[index]}, taken for\n{predicted[index]} ({confidence[index]:.0%})"
    pngs = {png for png, _ in page.images}
    for name in PICTURES - {"mistakes"}:
        assert (runs / "digits" / f"{name}.png").read_bytes() in pngs
    for png, _ in Page(runs / "hundred" / "report.html").images:
        Image.open(io.BytesIO(png)).verify()


def test_names_in_a_report_are_escaped(runs, hundred):
    page = Page(runs / "hundred" / "report.html")
    cells = [text for table in page.tables for row in table for text in row]
    assert "2 <b>&amp;" in cells and "1 ? $^$" in cells
    assert page.content.count("<script>") == 1 and "<b>" not in page.content


PROBE = """<script>
const seen = {}, sorts = [];
for (const head of document.querySelector("table").querySelectorAll("th"))
  for (let click = 0; click < 2; click++) {
    head.firstElementChild.focus();
    document.activeElement.click();
    sorts.push(head.ariaSort);
    const rows = [...head.closest("table").tBodies[0].rows];
    (seen[head.innerText.replace(/[^\\w ]/g, "").trim()] ||= []).push(rows.map(row => row.innerText));
  }
const loaded = [...document.images].map(image => image.complete && image.naturalWidth);
document.body.textContent = JSON.stringify({seen, sorts, loaded});
</script>"""


def opened(path, folder):
    """The page as a browser of 500 pixels leaves it, without a message of an error."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    command += ["--dump-dom", f"--user-data-dir={folder}/profile", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=5000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr
    return done.stdout


def test_a_browser_shows_the_pages_and_sorts_their_tables(runs, shown, copy, tmp_path):
    made = {"10": 1_234_567, "9": 999_999, "b": 2_000}
    losses = {"10": 0.5, "9": 10.0, "b": 2.0}
    best = records.read_record(copy())["best"]
    for name, count in made.items():
        copy(name, parameters=count, best={**best, "val_loss": losses[name]})
    failed = copy("zz", best=None, test=None, status="failed", epochs=0, parameters=5)
    evaluate.main([*(str(failed.parent / name) for name in made), str(failed), "--quiet"])
    page = failed.parent / "compare.html"
    page.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    told = json.loads(re.search(r"<body>(.*)</body>", opened(page, tmp_path), re.DOTALL)[1])
    assert told["loaded"] and all(told["loaded"])

    def order(heading):
        (found,) = (rows for name, rows in told["seen"].items() if heading in name)
        return [[row.split("\t")[0].split("/")[-1].strip() for row in rows] for rows in found]

    # Numbers by their value, names by the numbers in them, a missing value last in both directions.
    assert order("parameters") == [["zz", "b", "9", "10"], ["10", "9", "b", "zz"]]
    assert order("loss") == [["10", "b", "9", "zz"], ["9", "b", "10", "zz"]]
    assert order("run")[0] == ["9", "10", "b", "zz"]
    assert told["sorts"] == ["ascending", "descending"] * (len(told["sorts"]) // 2)
    assert "most confident" in opened(runs / "digits" / "report.html", tmp_path)


def test_suspects_are_the_images_whose_class_is_least_likely(runs, hundred, expected, tmp_path):
    assert not (runs / "digits" / "suspects.csv").exists()  # images without file names
    files, labels = sorted(runs.glob("images/test/*/*")), torch.arange(200) // 2
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = logits_of(runs / "hundred", hundred.images).float().softmax(1)
    given = probabilities[torch.arange(200), labels].tolist()
    content = (runs / "hundred" / "suspects.csv").read_bytes().decode(errors="surrogateescape")
    rows = list(csv.DictReader(io.StringIO(content)))
    places = [list(map(str, files)).index(row["file"]) for row in rows]
    assert len(set(places)) == 20 and hundred.result["accuracy"] < 0.1
    found = [float(row["probability"]) for row in rows]
    assert found == sorted(found) and found == pytest.approx([given[i] for i in places], abs=0.01)
    left = [value for index, value in enumerate(given) if index not in places]
    assert max(found) <= min(left) + 0.01
    names, (axis,) = hundred.classes, hundred.axes["suspects"]
    for row, index, drawn in zip(rows, places, axis.images, strict=True):
        assert row["class"] == names[labels[index]] and row["predicted"] in names
        assert float(row["predicted_probability"]) >= float(row["probability"])
        assert (drawn.get_array() == hundred.images[index].permute(1, 2, 0).numpy()).all()
    assert f"({found[0]:.1%})\n" in axis.texts[0].get_text()
    page = Page(runs / "hundred" / "report.html")
    captions = [text.splitlines()[2] for _, text in page.images if len(text.splitlines()) == 3]
    assert captions == [files[index].name for index in places]
    assert "suspects.csv" in hundred.out
    # The validation images are some of those in images/train; of training images it says that they were seen.
    val = show(tmp_path / "val", runs / "hundred", "--split", "val", "--out", tmp_path / "val")
    train = show(
        tmp_path / "train", runs / "hundred", "--split", "train", "--out", tmp_path / "train"
    )
    told = "the model was trained on these labels"
    assert (
        told in train.out
        and told in train.titles["suspects"]
        and told not in val.out + val.titles["suspects"]
    )
    found = []
    for split in ("val", "train"):
        content = (tmp_path / split / "suspects.csv").read_bytes().decode(errors="replace")
        found.append({row["file"] for row in csv.DictReader(io.StringIO(content))})
    assert [len(files) for files in found] == [3, 27] and not found[0] & found[1]
    assert all("images/train/" in file for file in found[0] | found[1])


def test_filters_and_feature_maps_are_those_of_the_layer(runs, shown, hundred, tmp_path):
    weights = records.load_checkpoint(runs / "hundred" / "best.pt")["weights"]
    first, images = weights["conv1.weight"], hundred.images
    assert (
        hundred.err == ""
        and set(hundred.axes) >= {*PICTURES, "suspects"}
        and "conv1" in hundred.titles["filters"]
    )
    sheet = hundred.axes["filters"][0].images[0].get_array()
    assert np.allclose(
        sheet[1:4, 5:8], (first[1] / (2 * first.abs().max()) + 0.5).permute(1, 2, 0), atol=1e-6
    )
    assert "conv1, 4 feature maps of image 7: class 03 $x$" in hundred.titles["activations"]
    image, maps, _ = hundred.axes["activations"]
    assert (image.images[0].get_array() == images[7].permute(1, 2, 0).numpy()).all()
    # Caught before the ReLU in place that follows.
    outputs = torch.nn.functional.conv2d(
        (images[[7]] / 255 - 0.5) / 0.5, first, weights["conv1.bias"]
    )[0]
    assert np.allclose(maps.images[0].get_array()[1:15, 16:30], outputs[1], atol=0.02)
    assert (
        maps.images[0].get_array().min() == pytest.approx(outputs.min().item(), abs=0.02)
        and outputs.min() < -0.1
    )
    second = records.load_checkpoint(runs / "digits" / "best.pt")["weights"]["conv2.weight"]
    assert np.allclose(
        shown.axes["filters"][0].images[0].get_array()[1:4, 1:4], second[0, 3], atol=1e-6
    )
    assert "conv2" in shown.titles["filters"] and "conv2" in shown.titles["activations"]
    argv = [str(runs / "digits"), "--layer", "conv2", "--out", str(tmp_path)]
    sheet = show(tmp_path, *argv, "--all-kernels").axes["filters"][0].images[0].get_array()
    assert sheet.shape[:2] == (33, 17) and np.allclose(sheet[5:8, 9:12], second[1, 2], atol=1e-6)
    for flag, message in (
        ("--layer=3", "are conv1, conv2$"),
        ("--channel=4", "has 4"),
        ("--image=150", "150 images"),
    ):
        with pytest.raises(records.UsageError, match=message):
            evaluate.main([*argv, flag])


def test_a_comparison_ranks_the_runs_of_each_dataset(runs, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_data", None)  # it reads no images
    data, best = (
        records.read_record(runs / "digits")["data"],
        {"epoch": 1, "val_loss": 0.2, "val_acc": 0.8},
    )
    data["name"] = "other"
    made = [
        copy("smooth", label_smoothing=0.2, best={**best, "val_loss": 1.9}, test={"acc": 0.7654}),
        copy("plain", label_smoothing=0.0, best={**best, "val_acc": 0.5}),
        copy("failed", best=None, test=None, status="failed", epochs=0),
        copy("worse", data=data, best={**best, "val_loss": 0.3, "val_acc": 0.9}),
        copy("better", data={**data, "selection": "test set"}, best=best),
    ]
    shown = show(tmp_path / "out", *made, "--out", tmp_path / "out")
    names = ["better", "worse", "smooth", "plain", "failed"]
    lines = [line for line in shown.out.splitlines() if "/runs/" in line][:5]
    assert [line.split()[0].split("/")[-1] for line in lines] == names
    assert re.search(r" 0\.2000\*? ", lines[0]) and re.search(
        r" 1\.9000 +80\.00% +76\.54% ", lines[2]
    )
    assert "76.54%" not in "".join(lines[3:]) and "test set" in shown.out
    assert "differ in --label-smoothing" in shown.out and "other: " not in shown.out
    page = Page(tmp_path / "out" / "compare.html")
    (column,) = {i for row in page.tables[0] for i, text in enumerate(row) if text == "1.9000"}
    losses = ["0.2000", "0.3000", "1.9000", "0.2000", "-"]
    assert [row[column].rstrip("*") for row in page.tables[0][1:]] == losses
    assert page.images[0][0] == (tmp_path / "out" / "compare.png").read_bytes()
    for axis, name in zip(shown.axes["compare"], ("loss", "acc") * 2, strict=True):
        assert list(axis.lines[0].get_ydata()) == [
            row[f"val_{name}"] for row in records.read_log(runs / "digits")
        ]
    assert [len(axis.lines) for axis in shown.axes["compare"]] == [2, 2, 3, 3]


def test_evaluated_runs_are_compared_image_by_image(copy, undrawn, capsys, expected):
    best = records.read_record(copy("x"))["best"]
    other, digits = copy("other", best={**best, "val_loss": 99.0}), copy("digits")
    state = records.load_checkpoint(other / "best.pt")
    state["weights"]["fc2.weight"][3] *= 1.5
    records.save_checkpoint(other / "best.pt", state)
    for run in (other, digits):
        evaluate.main([str(run), "--quiet"])
    rows = evaluate.main([str(other), str(digits), "--json"])["runs"]
    assert json.loads(capsys.readouterr().out) == rows
    assert [row["pair_with"] for row in rows] == [None, str(digits)]
    images, labels, _, predicted = expected
    right, best_right = logits_of(other, images).argmax(1) == labels, predicted == labels
    counts = int((right & ~best_right).sum()), int((best_right & ~right).sum())
    pair, total = rows[1], sum(counts)
    assert (pair["pair_images"], total > 0) == (150, True)
    assert (pair["pair_only_this_right"], pair["pair_only_other_right"]) == counts
    assert pair["pair_difference"] == pytest.approx((counts[0] - counts[1]) / 150)
    p = scipy.stats.binomtest(counts[0], total).pvalue - scipy.stats.binom.pmf(
        counts[0], total, 0.5
    )
    assert pair["pair_mid_p"] == pytest.approx(min(p, 1))
    assert pair["pair_low"] < pair["pair_difference"] < pair["pair_high"]
    # Of another split, of a later epoch, or without an evaluation there is no pair.
    printed = show(other.parent, other, digits, copy("new")).out
    assert "not evaluated on the test images" in printed
    records.write_json(
        digits / "run.json", records.read_record(digits) | {"best": best | {"epoch": 99}}
    )
    assert "trained on since" in show(other.parent, other, digits).out
    rows = evaluate.main([str(other), str(digits), "--split", "val", "--quiet"])["runs"]
    assert {row["pair_with"] for row in rows} == {None}


def test_runs_that_differ_in_their_seed_are_one_row_with_an_interval(copy, undrawn, capsys):
    best, values = records.read_record(copy())["best"], {1: 0.91, 2: 0.94, 3: 0.92}
    runs = [
        copy(f"s{seed}", seed=seed, best={**best, "val_acc": values[seed]}, run_name=f"s{seed}")
        for seed in values
    ]
    for run, value in zip(runs, values.values(), strict=True):
        records.write_json(
            run / "run.json", {**records.read_record(run), "test": {"acc": value / 2}}
        )
    others = [copy("again", seed=3, best={**best, "val_loss": 9.0, "val_acc": 0.1})]
    others += [copy("wider", seed=4, c1=5), copy("killed", seed=5, status="killed")]
    rows = evaluate.main([*map(str, runs + others), "--csv"])["runs"]
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == len(rows) == 6
    interval = scipy.stats.ttest_1samp(list(values.values()), 0).confidence_interval(0.95)
    for row in rows:
        if row["run"] in map(str, runs):
            assert row["seeds"] == 3 and row["val_acc_mean"] == pytest.approx(0.92333333)
            assert row["val_acc_sd"] == pytest.approx(np.std(list(values.values()), ddof=1))
            assert (row["val_acc_low"], row["val_acc_high"]) == pytest.approx(tuple(interval))
            assert row["test_acc_high"] == pytest.approx(interval.high / 2)
        else:
            assert row["seeds"] is None and row["val_acc_mean"] is None
    records.write_json(runs[0] / "run.json", {**records.read_record(runs[0]), "test": None})
    page = Page(show(runs[0].parent, *runs) and runs[0].parent / "compare.html")
    figures = [f"{figure:.2%}" for figure in (0.92333333, np.std([0.91, 0.94, 0.92], ddof=1))]
    (row,) = (row for row in page.tables[-1] if "cnn" in row)
    assert [*figures, "{:.2%} to {:.2%}".format(*interval)] == row[3:6] and row[6:] == ["-"] * 3


def test_runs_star_skips_what_is_no_run_and_tells_the_status_of_the_others(copy, undrawn, capsys):
    running, killed = (copy(name, status="running") for name in ("running", "killed"))
    for name in ("empty", "sweep"):
        (running.parent / name).mkdir()
    (running.parent / "sweep" / "sweep.json").touch()
    (running.parent / "compare.png").touch()
    with records.locked(running / ".lock"):
        (rows,) = evaluate.main([*map(str, sorted(running.parent.iterdir())), "--json"]).values()
        with pytest.raises(records.RunError, match="still being trained"):
            evaluate.main([str(running)])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == rows and [row["status"] for row in rows] == [
        "killed",
        "running",
    ]
    assert all(f"skipped: runs/{name} is not a run" in printed.err for name in ("empty", "sweep"))
    with pytest.raises(records.RunError, match="none of these"):
        evaluate.main(["runs/empty", "runs/sweep"])
    evaluate.main([str(killed)])
    assert (
        "runs/killed: killed after 3 epochs" in capsys.readouterr().out
        and (killed / "metrics.json").exists()
    )


def test_predicting_answers_for_every_readable_file(runs, expected, tmp_path, capsys):
    images, _, confidence, predicted = expected
    (tmp_path / "album" / "deeper").mkdir(parents=True)
    for index, (name, side) in enumerate(
        {"one.png": 28, "album/deeper/0.png": 28, "album/large.png": 280}.items()
    ):
        Image.fromarray(images[index, 0].numpy()).resize((side, side)).convert("RGBA").save(name)
    for name in ("album/notes.txt", "album/torn.png"):
        (tmp_path / name).write_text("no image")
    argv = [str(runs / "digits"), "--predict", "one.png", "album"]
    with pytest.raises(records.RunError, match="2 of 5 files could not be read"):
        evaluate.main([*argv, "gone.png", "--quiet"])
    printed = capsys.readouterr()
    assert [error.split(": ")[2].split()[0] for error in printed.err.splitlines()] == [
        "album/torn.png",
        "gone.png",
    ]
    lines = [line.split("\t") for line in printed.out.splitlines()]
    assert [line[0] for line in lines] == ["one.png", "album/deeper/0.png", "album/large.png"]
    for index in range(2):
        assert lines[index][1:] == [str(predicted[index].item()), f"{confidence[index]:.4f}"]
    answers = evaluate.main([*argv[:3], "--json"])["predictions"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == answers
    # The three likeliest classes of each, most likely first; a name with a comma and a line break is a field of CSV.
    (tmp_path / "a,\nb.png").write_bytes((tmp_path / "one.png").read_bytes())
    answers = evaluate.main([*argv[:2], "a,\nb.png", "album/deeper", "--top", "3", "--csv"])[
        "predictions"
    ]
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [{**row, "probability": float(row["probability"])} for row in rows] == answers and len(
        rows
    ) == 6
    likeliest = logits_of(runs / "digits", images[:2]).softmax(1).topk(3)
    assert [int(row["class"]) for row in rows] == likeliest.indices.flatten().tolist()
    assert rows[0]["file"] == "a,\nb.png"
    assert [one["probability"] for one in answers] == pytest.approx(
        likeliest.values.flatten().tolist(), abs=1e-5
    )
    with pytest.raises(records.UsageError, match="the model has 10 classes"):
        evaluate.main([*argv[:3], "--top", "11"])


@pytest.mark.parametrize(
    "kind", ["torch.export", pytest.param("onnx", marks=pytest.mark.developers)]
)
def test_an_exported_model_answers_as_the_model_does_and_says_what_it_wants(
    runs, tmp_path, kind, monkeypatch
):
    images, files = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8), {"metadata.json": ""}
    runtime = pytest.importorskip("onnxruntime") if kind == "onnx" else None
    file = evaluate.main([str(runs / "digits"), "--export", kind, "--out", "out", "--quiet"])[
        "file"
    ]
    if runtime:
        session = runtime.InferenceSession(file)
        answer = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        told = {
            key: json.loads(value)
            for key, value in session.get_modelmeta().custom_metadata_map.items()
        }
        assert session.get_inputs()[0].shape == ["batch", 1, 28, 28] and session.get_outputs()[
            0
        ].shape == ["batch", 10]
    else:
        answer = torch.export.load(file, extra_files=files).module()(images)
        told = json.loads(files["metadata.json"])
    assert torch.allclose(answer, logits_of(runs / "digits", images).softmax(1), atol=1e-5)
    assert (
        told["classes"] == list("0123456789")
        and told["image_shape"] == [1, 28, 28]
        and told["mode"] == "L"
    )
    assert "bilinear" in told["resize"] and "white" in told["transparent pixels"]
    # One that answers otherwise is not kept; a package that is missing is named.
    wrong = SimpleNamespace(module=lambda: lambda images: torch.zeros(len(images), 10))
    monkeypatch.setattr(torch.export, "load", lambda *arguments, **options: wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "onnxscript" or None)
    with pytest.raises(records.RunError, match="pip install onnxscript" if runtime else "not kept"):
        evaluate.main([str(runs / "digits"), "--out", "none", "--export", kind])
    assert not (tmp_path / "none").exists()


def test_bad_input_is_one_line_and_nothing_is_written_and_moved_images_are_found(
    runs, copy, tmp_path, undrawn
):
    def refused(expected, directory, *argv):
        with pytest.raises(records.RunError, match=expected):
            evaluate.main([str(directory), *argv, "--out", "out"])
        assert not (tmp_path / "out").exists()

    data, path = records.read_record(runs / "digits")["data"], copy() / "best.pt"
    state, content = records.load_checkpoint(path), path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    refused(r"best\.pt is damaged", path.parent)
    path.unlink()
    refused(r"best\.pt is missing", path.parent)
    for change in ({"weights": {}}, {"model": "other"}, {"c1": 5}):
        records.save_checkpoint(path, {**state, **change})
        refused("does not fit", path.parent)
    refused("not what .* was tested on", copy(data={**data, "test_checksum": "0"}))
    refused("not what .* was trained on", copy(data={**data, "checksum": "0"}), "--split", "val")
    refused("without a validation split", copy(val_size=0.0), "--split", "val")
    refused(r"drawn by train_gone\.py", copy(script="train_gone"))
    refused("say where with --data-dir", copy(dataset="mnist"), "--data-dir", "nowhere")
    record = records.read_record(shutil.copytree(runs / "hundred", tmp_path / "run"))
    records.write_json(
        tmp_path / "run" / "run.json", {**record, "args": {**record["args"], "dataset": "was here"}}
    )
    refused("was here; say where with --data-dir", "run")
    shutil.copytree(runs / "images", tmp_path / "moved")
    assert evaluate.main(["run", "--data-dir", "moved", "--quiet"])["images"] == 200


def test_flags_that_contradict_one_another_are_refused_at_once(capsys):
    for argv, expected in (
        ("a b --predict x", "take one run"),
        ("a --predict x --export onnx", "not allowed with"),
        ("a --top 2", "goes with --predict"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(argv.split())
        assert expected in capsys.readouterr().err


def test_a_dense_net_on_mnist_that_moved_has_no_filters(mnist_dir, undrawn, tmp_path, capsys):
    argv = f"--data-dir {mnist_dir} --model dense --l1 8 --epochs 1 --runs-dir runs --run-name dense --quiet"
    train_mnist.main(argv.split())
    mnist_dir.rename(tmp_path / "moved")
    assert evaluate.main(["runs/dense", "--data-dir", "moved"])["images"] == 50
    assert (
        "no convolution" in capsys.readouterr().out
        and not (tmp_path / "runs/dense/filters.png").exists()
    )
