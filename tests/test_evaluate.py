"""What evaluate.py measures, draws, compares, predicts and exports."""

import csv
import io
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
import train_cifar
import train_mnist

PICTURES = {"curves", "per_class", "confusion", "predictions", "mistakes", "calibration", "filters", "activations"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Work in a directory with runs/cnn on few synthetic digits, and runs/hundred on a folder of 100 classes."""
    folder = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    for index in range(100):
        for part, count in (("train", 3), ("test", 2)):
            place = folder / "hundred" / part / f"class {index:02} $x$"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8) + np.uint8(index)
                Image.fromarray(pixels).save(place / f"{number}.png")
    before, drawn = os.getcwd(), train_mnist.synthetic
    os.chdir(folder)
    train_mnist.synthetic = lambda train: train_mnist.synthetic_digits(400 if train else 150, int(train))
    try:
        argv = ["--dataset", "synthetic", "--epochs", "3", "--schedule", "constant", "--quiet"]
        train_mnist.main([*argv, "--run-name", "cnn"])
        small = ["--c1", "4", "--c2", "8", "--l1", "16", "--epochs", "2", "--quiet"]
        train_cifar.main([*small, "--dataset", "hundred", "--run-name", "hundred"])
        yield folder
    finally:
        os.chdir(before)
        train_mnist.synthetic = drawn


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the pictures out, which take a second each."""
    for name in dir(evaluate):
        if name.startswith("draw_"):
            monkeypatch.setattr(evaluate, name, lambda *a: None)
    monkeypatch.setattr(evaluate, "render", lambda figure: b"")


@pytest.fixture
def copy(here, tmp_path):
    """A copy of runs/cnn to be spoilt."""
    return shutil.copytree("runs/cnn", tmp_path / "copy")


def logits_for(predicted, classes, confidence):
    """Logits [N, K] that predict so with that confidence, the rest shared evenly."""
    other = math.log((1 - confidence) / (classes - 1))
    logits = torch.full((len(predicted), classes), other)
    logits[torch.arange(len(predicted)), torch.tensor(predicted)] = math.log(confidence)
    return logits


def test_metrics_of_an_imbalanced_matrix_worked_out_on_paper():
    # Six of a (one taken for b), three of b (one taken for a), one of c, which is never predicted.
    labels = [0] * 6 + [1] * 3 + [2]
    predicted = [0] * 5 + [1] + [1, 1, 0] + [0]
    metrics = evaluate.measure(logits_for(predicted, 3, 0.8), torch.tensor(labels), ["a", "b", "c"])
    assert metrics["confusion_matrix"] == [[5, 1, 0], [1, 2, 0], [1, 0, 0]]
    a, b, c = metrics["classes"]
    assert (a["support"], a["predicted"]) == (6, 7) and (c["support"], c["predicted"]) == (1, 0)
    assert (a["recall"], a["precision"], a["f1"]) == pytest.approx((5 / 6, 5 / 7, 10 / 13))
    assert (b["recall"], b["precision"], b["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (c["accuracy"], c["recall"], c["precision"], c["f1"]) == (0, 0, 0, 0)
    assert metrics["accuracy"] == 0.7
    assert metrics["macro_f1"] == pytest.approx((10 / 13 + 2 / 3) / 3)
    assert metrics["weighted_f1"] == pytest.approx((6 * 10 / 13 + 3 * 2 / 3) / 10)
    assert metrics["loss"] == pytest.approx(-(7 * math.log(0.8) + 3 * math.log(0.1)) / 10, abs=1e-6)
    # All confidence is 0.8, accuracy 0.7.
    assert metrics["expected_calibration_error"] == pytest.approx(0.1, abs=1e-6)
    assert "top5_accuracy" not in metrics
    assert evaluate.confused_pairs(metrics, 2) == [(1, "a", "b", 1 / 6), (1, "b", "a", 1 / 3)]


def test_calibration_bins_are_fifteen_of_equal_width():
    confidence = torch.tensor([0.05, 1 / 15 + 1e-6, 0.5, 0.55, 1.0], dtype=torch.float64)
    bins, error = evaluate.calibration(confidence, torch.tensor([True, False, True, False, True]))
    assert [one["images"] for one in bins] == [1, 1] + [0] * 5 + [1, 1] + [0] * 5 + [1]
    assert bins[2] == {"low": 2 / 15, "high": 3 / 15, "images": 0, "confidence": None, "accuracy": None}
    assert error == pytest.approx((0.95 + 1 / 15 + 0.5 + 0.55 + 0) / 5, abs=1e-5)


def test_the_interval_is_wilsons():
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I: 81/263, 15/148, 0/20.
    for correct, count, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))):
        assert evaluate.wilson_interval(correct, count) == pytest.approx(expected, abs=5e-5)


def test_metrics_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([30.0, 10, 5, 2, 1, 1, 1, 1, 1, 1, 1, 0]), 500, True, generator=random)
    logits = torch.randn(500, 12, generator=random) + 2 * torch.nn.functional.one_hot(labels, 12)
    logits[:, 3] = -9  # never predicted
    names, predicted = [str(index) for index in range(12)], logits.argmax(1)
    metrics = evaluate.measure(logits, labels, names)
    everything = {"labels": range(12), "zero_division": 0}
    expected = sklearn.precision_recall_fscore_support(labels, predicted, **everything)
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[key] for row in metrics["classes"]] == pytest.approx(values.tolist())
    for average in ("macro", "weighted"):
        expected = sklearn.f1_score(labels, predicted, average=average, **everything)
        assert metrics[f"{average}_f1"] == pytest.approx(expected)
    assert metrics["confusion_matrix"] == sklearn.confusion_matrix(labels, predicted, labels=range(12)).tolist()
    probabilities = logits.double().softmax(1)
    top5 = sklearn.top_k_accuracy_score(labels, probabilities, k=5, labels=range(12))
    assert metrics["top5_accuracy"] == pytest.approx(top5)
    assert metrics["loss"] == pytest.approx(sklearn.log_loss(labels, probabilities, labels=range(12)))


def test_the_figures_are_those_of_the_run_and_of_every_batch_size(here, undrawn, tmp_path):
    record = common.read_record(here / "runs" / "cnn")
    runs = []
    for split, batch_size in (("test", 1000), ("test", 1000), ("test", 7), ("val", 16)):
        out = tmp_path / f"{len(runs)}"
        argv = ["runs/cnn", "--split", split, "--batch-size", str(batch_size), "--out", str(out), "--quiet"]
        metrics = evaluate.main(argv)
        text = (out / "metrics.json").read_text()
        assert json.loads(text) == metrics
        runs.append((text, metrics))
    assert runs[0][0] == runs[1][0]
    (_, first), _, (_, other), (_, validation) = runs
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert first["confusion_matrix"] == other["confusion_matrix"]
    assert first["accuracy"] == pytest.approx(record["test"]["acc"])
    assert first["loss"] == pytest.approx(record["test"]["loss"], rel=1e-5)
    assert validation["accuracy"] == pytest.approx(record["best"]["val_acc"])
    assert validation["loss"] == pytest.approx(record["best"]["val_loss"], rel=1e-5)
    assert (first["images"], validation["images"], first["epoch"]) == (150, 40, record["best"]["epoch"])


def picture(path):
    """Size in pixels, and whether there is more to be seen than a title."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"))
        return image.size, np.mean(grey[120:] < 250) > 0.01


def check_pictures(directory, sizes):
    """Every picture is there, shows something, and has its size."""
    assert {path.stem for path in directory.glob("*.png")} == PICTURES == set(sizes)
    for name, expected in sizes.items():
        size, drawn = picture(directory / f"{name}.png")
        # Releases of matplotlib round the last pixel each in their way.
        assert drawn and size == pytest.approx(expected, abs=1), name


def test_every_picture_of_ten_classes_is_made_and_has_its_size(here, tmp_path, capsys):
    evaluate.main(["runs/cnn", "--out", str(tmp_path)])
    check_pictures(tmp_path, {
        "curves": (1100, 420), "per_class": (800, 480), "confusion": (2100, 680), "predictions": (1160, 995),
        "mistakes": (1160, 995), "calibration": (600, 650), "filters": (650, 320), "activations": (1100, 480),
    })  # fmt: skip
    printed = capsys.readouterr().out
    assert "95% interval" in printed and "most confused" in printed and printed.endswith("metrics.json\n")


def test_every_picture_of_a_hundred_classes_is_made(here, tmp_path, capsys):
    evaluate.main(["runs/hundred", "--out", str(tmp_path), "--all-kernels", "--layer", "2"])
    assert "top-5 accuracy" in capsys.readouterr().out
    check_pictures(tmp_path, {
        "curves": (1100, 420), "per_class": (800, 1760), "confusion": (4620, 1520), "predictions": (1160, 995),
        "mistakes": (1160, 995), "calibration": (600, 650), "filters": (650, 320), "activations": (1100, 350),
    })  # fmt: skip


def test_recall_and_precision_are_divided_along_their_own_axes():
    metrics = evaluate.measure(logits_for([0, 0, 1, 0, 1], 3, 0.9), torch.tensor([0, 0, 0, 1, 1]), ["a", "b", "c"])
    counts, recall, precision = [
        axis.images[0].get_array() for axis in evaluate.draw_confusion(metrics, "").axes if axis.images
    ][:3]
    assert counts.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert np.allclose(recall[:2].sum(1), 100) and np.allclose(precision[:, :2].sum(0), 100)
    assert recall[0, 1] == pytest.approx(100 / 3) and precision[0, 1] == pytest.approx(50)


def test_the_feature_maps_are_caught_before_a_relu_in_place(here):
    trained = evaluate.load_trained(here / "runs" / "hundred", torch.device("cpu"))
    images = common.ImageSet(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8), torch.tensor([0]), ["a"] * 100)
    name, convolution = evaluate.find_convolution(trained.model, None)
    sheet = evaluate.draw_activations(trained, name, convolution, images, 0).axes[1].images[0].get_array()
    assert name == "0" and sheet.min() < 0


def test_kernels_of_any_size_and_channel():
    five = torch.nn.Conv2d(6, 16, 5)
    weight = five.weight.detach()

    def tile(figure):
        return torch.tensor(figure.axes[0].images[0].get_array().data[1:6, 1:6])

    assert torch.equal(tile(evaluate.draw_filters("x", five, 3, False)), weight[0, 3])
    figure = evaluate.draw_filters("x", five, None, True)
    assert torch.equal(tile(figure), weight[0, 0]) and figure.axes[0].images[0].get_array().shape == (97, 37)
    colours = evaluate.draw_filters("x", torch.nn.Conv2d(3, 4, 3), None, False).axes[0].images[0].get_array()
    assert colours.shape[2] == 3 and colours.min() >= 0 and colours.max() <= 1


def test_test_time_augmentation_averages_views_and_is_reported_beside_the_plain_figure(here, undrawn, tmp_path, capsys):
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert common.shifted_by_one(images, 1)[0, 0, 1:, 1:].equal(images[0, 0, :-1, :-1])
    assert common.shifted_by_one(images, -1)[0, 0, :-1, :-1].equal(images[0, 0, 1:, 1:])
    for name, count in (("mirror", 2), ("shift", 3), ("mirror+shift", 6)):
        views = common.TTA[name](images)
        assert len(views) == count and sum(weight for weight, _ in views) == 1
    trained = evaluate.load_trained(here / "runs" / "hundred", torch.device("cpu"))
    batch = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        both = (trained.model(batch) + trained.model(batch.flip(3))) / 2
    assert torch.allclose(evaluate.predict(trained.model, [(batch, None)], "mirror"), both, atol=1e-6)
    with torch.inference_mode():
        plain = trained.model(batch)
    confidence = plain.softmax(1).amax(1)
    below = confidence.sort().values[1].item()
    some = evaluate.predict(trained.model, [(batch, None)], "mirror", below)
    assert torch.allclose(some, torch.where((confidence <= below)[:, None], both, plain), atol=1e-6)
    assert evaluate.predict(trained.model, [(batch, None)], "mirror", 0.0).equal(plain)
    plain = evaluate.main(["runs/cnn", "--out", str(tmp_path)])
    with_tta = evaluate.main(["runs/cnn", "--out", str(tmp_path), "--tta", "mirror+shift"])
    assert with_tta["accuracy"] == plain["accuracy"] and with_tta["tta"]["loss"] != plain["loss"]
    assert "with test-time augmentation (mirror+shift)" in capsys.readouterr().out


def test_the_classes_as_csv_and_the_metrics_as_json(here, undrawn, tmp_path, capsys):
    evaluate.main(["runs/cnn", "--out", str(tmp_path), "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 10 and set(rows[0]) >= {"name", "support", "accuracy", "precision", "recall", "f1"}
    metrics = evaluate.main(["runs/cnn", "--out", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == metrics


def test_a_comparison_is_sorted_and_reads_no_images(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_dataset", None)
    worse = shutil.copytree("runs/cnn", tmp_path / "worse")
    record = common.read_record(worse)
    record["best"]["val_loss"] += 9
    (worse / "run.json").write_text(json.dumps(record))
    failed = shutil.copytree("runs/cnn", tmp_path / "failed")
    failed_record = {**record, "best": None, "test": None, "status": "failed", "epochs": 0}
    (failed / "run.json").write_text(json.dumps(failed_record))
    (failed / "log.jsonl").unlink()
    argv = [str(failed), str(worse), "runs/cnn", "--out", str(tmp_path / "out")]
    evaluate.main([*argv, "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["run"] for row in rows] == ["runs/cnn", str(worse), str(failed)]
    assert float(rows[0]["test_acc"]) == record["test"]["acc"] and rows[2]["test_acc"] == ""
    assert picture(tmp_path / "out" / "compare.png") == ((1300, 480), True)
    evaluate.main([*argv, "--json"])
    assert [row["status"] for row in json.loads(capsys.readouterr().out)] == ["finished", "finished", "failed"]
    evaluate.main(argv)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["run", "dataset", "model"] and table[1].startswith("runs/cnn")
    # As `runs/*` gives them, with the picture of the comparison before, and two runs that are going, or seem so.
    for run in (worse, failed):
        (run / "run.json").write_text(json.dumps({**failed_record, "status": "running"}))
    with common.locked(worse / ".lock"):
        rows = evaluate.main([str(tmp_path / "out" / "compare.png"), str(worse), str(failed), "--csv"])["runs"]
    assert {row["run"]: row["status"] for row in rows} == {str(worse): "running", str(failed): "killed"}
    assert (tmp_path / "compare.png").exists()


def test_predicting_answers_for_every_readable_file(here, cli, tmp_path):
    digit = train_mnist.synthetic(False).images[0, 0].numpy()
    album = tmp_path / "an album"
    (album / "deeper").mkdir(parents=True)
    Image.fromarray(digit).resize((280, 280)).convert("RGBA").save(album / "deeper" / "large.png")
    Image.fromarray(digit).convert("P").save(album / "palette.png")
    Image.fromarray(digit).save(tmp_path / "digit.png")
    Image.fromarray(digit.astype(np.uint16) * 257).save(tmp_path / "sixteen bits.png")
    (album / "notes.txt").write_text("no image")
    paths = (tmp_path / "digit.png", tmp_path / "sixteen bits.png", album, "gone.png")
    done = cli("evaluate.py", "runs/cnn", "--predict", *paths, cwd=here)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        str(path) for path in (*paths[:2], album / "deeper" / "large.png", album / "palette.png")
    ]
    assert lines[0][1:] == lines[1][1:] == lines[3][1:]
    errors = done.stderr.splitlines()
    assert done.returncode == 1 and "notes.txt" in errors[0] and "gone.png" in errors[1] and len(errors) == 3


def test_predictions_are_those_of_the_evaluation(here, tmp_path, capsys):
    images = train_mnist.synthetic(False)
    for index in range(20):
        Image.fromarray(images.images[index, 0].numpy()).save(tmp_path / f"{index:02}.png")
    evaluate.main(["runs/cnn", "--predict", str(tmp_path), "--json", "--batch-size", "8"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trained = evaluate.load_trained(here / "runs" / "cnn", torch.device("cpu"))
    logits = evaluate.predict(trained.model, trained.loader(images.select(slice(20)), 20).batches())
    assert [answer["class"] for answer in answers] == [images.classes[index] for index in logits.argmax(1)]
    assert [answer["probability"] for answer in answers] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["torch.export", "onnx"])
def test_an_exported_model_answers_as_the_model_does(here, tmp_path, kind):
    for package in evaluate.EXPORTS[kind][2]:
        pytest.importorskip(package)
    made = evaluate.main(["runs/hundred", "--export", kind, "--out", str(tmp_path), "--quiet"])["file"]
    trained = evaluate.load_trained(here / "runs" / "hundred", torch.device("cpu"))
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    image_set = common.ImageSet(images, torch.zeros(3, dtype=torch.long), trained.blueprint["classes"])
    expected = evaluate.predict(trained.model, trained.loader(image_set, 3).batches()).softmax(1)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(made)
        answer = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        classes = session.get_modelmeta().custom_metadata_map["classes"]
    else:
        files = {"classes.json": ""}
        answer = torch.export.load(made, extra_files=files).module()(images)
        classes = files["classes.json"]
    assert torch.allclose(answer, expected, atol=1e-5)
    assert json.loads(classes) == trained.blueprint["classes"]


def test_an_export_that_answers_otherwise_is_not_kept_and_a_missing_package_is_named(here, tmp_path, monkeypatch):
    wrong = ("model.pt2", lambda program, classes: (b"", lambda images: torch.zeros(len(images), 10)), ())
    monkeypatch.setitem(evaluate.EXPORTS, "torch.export", wrong)
    with pytest.raises(common.RunError, match="not kept"):
        evaluate.main(["runs/cnn", "--export", "torch.export", "--out", str(tmp_path)])
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: name != "onnxscript" or None)
    with pytest.raises(common.RunError, match="pip install onnxscript"):
        evaluate.main(["runs/cnn", "--export", "onnx", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_nothing_is_written(here, copy, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(expected, *argv):
        with pytest.raises(common.RunError, match=expected):
            evaluate.main([str(argument) for argument in (*argv, "--out", out)])
        assert not out.exists()

    refused("no run.json", "runs/none")
    refused("no run.json", here)
    best = (copy / "best.pt").read_bytes()
    for damaged in (best[:-100], b"", best[:500] + bytes([best[500] ^ 1]) + best[501:], best + b"0"):
        (copy / "best.pt").write_bytes(damaged)
        refused(r"best\.pt is damaged", copy)
    (copy / "best.pt").unlink()
    refused(r"best\.pt is missing", copy)
    common.save_checkpoint(copy / "best.pt", {"model": "cnn"})
    refused("does not fit", copy)
    (copy / "best.pt").write_bytes(best)
    record = common.read_record(copy)
    (copy / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with common.locked(copy / ".lock"):
        refused("still being trained", copy)
    (copy / "run.json").write_text(json.dumps({**record, "data": {**record["data"], "checksum": "0"}}))
    refused("checksums differ", copy)
    (copy / "run.json").write_text(json.dumps({**record, "args": {**record["args"], "dataset": "mnist"}}))
    refused("--data-dir", copy, "--data-dir", tmp_path / "nowhere")
    (copy / "run.json").write_text(json.dumps({**record, "data": {**record["data"], "test_checksum": "0"}}))
    refused("other test images", copy)
    (copy / "run.json").write_text(json.dumps({**record, "args": {**record["args"], "val_size": 0.0}}))
    refused("without a validation split", copy, "--split", "val")


def test_a_folder_of_images_that_moved_is_found_with_data_dir(here, undrawn, tmp_path):
    moved = shutil.copytree("hundred", tmp_path / "moved")
    elsewhere = shutil.copytree("runs/hundred", tmp_path / "run")
    record = common.read_record(elsewhere)
    record["args"]["dataset"] = "was here"
    (elsewhere / "run.json").write_text(json.dumps(record))
    with pytest.raises(common.RunError, match="was here; say where with --data-dir"):
        evaluate.main([str(elsewhere)])
    assert evaluate.main([str(elsewhere), "--data-dir", str(moved), "--quiet"])["images"] == 200


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["runs/a", "--split", "tests"], "--split"),
        (["runs/a", "--spilt", "val"], "did you mean --split?"),
        (["runs/a", "runs/b", "--tta", "mirror"], "--tta means nothing when runs are compared"),
        (["runs/a", "--export", "onnx", "--csv"], "--csv means nothing with --export"),
        (["runs/a", "runs/b", "--predict", "x.png"], "--predict takes one run, not 2"),
        (["runs/a", "--predict", "x.png", "--export", "onnx"], "one at a time"),
        (["runs/a", "--all-kernels", "--channel", "1"], "one at a time"),
        (["runs/a", "--json", "--csv"], "not allowed with"),
        ([], "RUN"),
    ],
)
def test_wrong_flags_are_refused_at_once(argv, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in error and len(error.splitlines()) == 1


def test_layers_channels_and_images_that_do_not_exist_are_named(here):
    for argv, expected in (
        (["--layer", "conv1"], "the convolutions of this model are 0, 4"),
        (["--channel", "1"], "layer 0 has 1"),
        (["--image", "150"], "150 images"),
    ):
        with pytest.raises(common.UsageError, match=expected):
            evaluate.main(["runs/cnn", *argv])
