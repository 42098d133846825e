"""Pictures, Grad-CAM, folds, many files for --predict and exports of evaluate.py: from outside, by its
command line, its files, and the pictures as they are saved."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
from PIL import Image
from test_evaluate import (  # noqa: F401 (fixtures)
    PROBE,
    Page,
    copy,
    digits,
    expected,
    hundred,
    opened,
    runs,
    show,
    shown,
    undrawn,
)
from test_evaluate_figures import TINY, on_photos, photos, rows_of


# ------------------------ Pictures ------------------------
def test_the_end_of_a_run_that_stopped_early_is_a_line_on_the_curves(copy):
    directory = copy("early", status="stopped_early")
    drawn = show(directory, directory)
    for axis in drawn.axes["curves"]:
        lines = {line.get_label(): line.get_xdata() for line in axis.lines}
        assert list(lines["early stop: 3"]) == [3, 3]
        assert all(tick == int(tick) for tick in axis.get_xticks())
    directory = copy("whole")
    for axis in show(directory, directory).axes["curves"]:
        assert not [line for line in axis.lines if "stop" in line.get_label()]


def test_axes_of_shares_end_at_100_percent(shown):
    for axis in (shown.axes["curves"][1], *shown.axes["per_class"], shown.axes["calibration"][0]):
        assert (
            max(axis.get_xlim()[1] if "class" in axis.get_xlabel() else axis.get_ylim()[1], 0) <= 1
        )


def test_a_dashed_line_is_the_accuracy_of_all_images(shown):
    (axis,) = shown.axes["per_class"]
    (line,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == [shown.result["accuracy"]] * 2
    assert line.get_label() == f"all images: {shown.result['accuracy']:.2%}"


def test_the_heatmaps_say_which_classes_are_actual_and_which_predicted(shown):
    for axis in shown.axes["confusion"]:
        if axis.images:
            assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "actual class")
            assert all(text.get_fontsize() >= 9 for text in axis.texts)


@pytest.mark.parametrize("name", ["predictions", "mistakes"])
def test_the_images_that_are_taken_for_another_class_are_framed(shown, name):
    (axis,) = shown.axes[name]
    frames = {tuple(np.round(patch.get_xy(), 4)) for patch in axis.patches}
    wrong = set()
    for image, text in zip(axis.images, axis.texts, strict=True):
        left, _, _, top = image.get_extent()
        if "taken for" in text.get_text():
            wrong.add(tuple(np.round((left, top), 4)))
    assert frames == wrong and len(wrong) > 0 and (len(wrong) < 40 or name == "mistakes")


def test_what_is_before_the_temperature_is_drawn_from_before(shown):
    (line,) = [line for line in shown.axes["calibration"][0].lines if "before" in line.get_label()]
    bins = [one for one in shown.result["calibration_before"] if one["images"]]
    assert list(line.get_ydata()) == pytest.approx([one["accuracy"] for one in bins])
    assert list(line.get_xdata()) == pytest.approx([one["confidence"] for one in bins])
    assert bins != [one for one in shown.result["calibration"] if one["images"]]


def test_each_run_has_its_own_curve(copy, tmp_path):
    made = [copy(name) for name in "ab"]
    rows = [{**row, "val_loss": row["val_loss"] + 9} for row in records.read_log(made[1])]
    (made[1] / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = show(tmp_path / "out", *made, "--out", tmp_path / "out")
    curves = [list(line.get_ydata()) for line in drawn.axes["compare"][0].lines]
    for directory in made:
        assert [row["val_loss"] for row in records.read_log(directory)] in curves


def test_sample_says_how_many_images_predictions_png_has(runs, tmp_path):
    drawn = show(tmp_path, runs / "digits", "--out", tmp_path, "--sample", 11)
    assert len(drawn.axes["predictions"][0].images) == 11


@pytest.mark.parametrize("kernel", [3, 5])
def test_filters_of_any_size_are_drawn_whole(kernel, few_images, tmp_path):
    argv = ["--dataset", "synthetic", "--tutorial-layers", "--kernel-size", kernel, "--c1", 5]
    directory, *_ = run(train_cifar, *argv, "--c2", 4, "--l1", 4, "--epochs", 1, "--quiet")
    sheet = show(directory, directory).axes["filters"][0].images[0].get_array()
    assert sheet.shape == (kernel + 2, 5 * (kernel + 1) + 1, 3)


@pytest.mark.parametrize("names", [("猫" * 3, "قطة"), ("a" * 200, "b " * 100), ("é", "&lt;<i>")])
def test_pages_with_names_of_any_kind_are_not_wider_than_the_screen(names, tmp_path):
    directory = on_photos("--image-size", 8, **dict.fromkeys(names, 20))
    evaluate.main([str(directory), "--quiet"])
    page = directory / "report.html"
    rows = [row for table in Page(page).tables for row in table]
    for name in names:
        assert any(name == cell for row in rows for cell in row), name
    probe = PROBE.replace("loaded}", "loaded, width: document.documentElement.scrollWidth}")
    results = "document.querySelector('table').parentElement"
    probe = probe.replace(
        "width:", f"hidden: {results}.scrollWidth - {results}.clientWidth, width:"
    )
    probe = probe.replace("const loaded", "const width = 0;\nconst loaded")
    page.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    told = json.loads(re.search(r"<body>(.*)</body>", opened(page, tmp_path), re.DOTALL)[1])
    assert told["width"] <= 500 and told["hidden"] <= 0


# ------------------------ Grad-CAM ------------------------
def test_grad_cam_is_the_last_convolutions_maps_weighted_by_their_mean_gradients(
    runs, shown, expected
):
    # Worked out here for the CNN: its second convolution, of the class that each is taken for.
    images, labels, confidence, predicted = expected
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:40]
    state = records.load_checkpoint(runs / "digits" / "best.pt")
    model = common.build_model(state)
    model.load_state_dict(state["weights"])
    model.eval()
    mean, std = (torch.tensor(state[name]).view(-1, 1, 1) for name in ("mean", "std"))
    x = (images[worst] / 255 - mean) / std
    maps = model.conv2(F.relu(F.max_pool2d(model.norm1(model.conv1(x)), 2)))
    maps.retain_grad()
    x = F.relu(F.max_pool2d(model.norm2(maps), 2)).flatten(1)
    model.fc2(F.relu(model.fc1(x))).gather(1, predicted[worst, None]).sum().backward()
    weights = maps.grad.mean((2, 3), keepdim=True)
    heat = F.interpolate((weights * maps).sum(1, keepdim=True).relu(), (28, 28), mode="bilinear")
    heat = (heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-12))[:, 0].detach().numpy()
    # The more it saw there, the brighter: the colours go from black to yellow.
    (axis,) = shown.axes["gradcam"]
    assert len(axis.images) == 40
    for drawn, wanted, pixels in zip(axis.images, heat, images[worst, 0].numpy(), strict=True):
        added = drawn.get_array()[..., 0].astype(float) - 0.45 * pixels
        assert np.corrcoef(added.flatten(), wanted.flatten())[0, 1] > 0.9 or wanted.max() == 0
    page = Page(runs / "digits" / "report.html")
    assert len(page.images) == 80 + 7  # each mistake with what the model saw; the pictures


NETS = {
    "resnet": (lambda classes: torchvision.models.resnet18(num_classes=classes), True),
    "mobilenet": (lambda classes: torchvision.models.mobilenet_v3_small(num_classes=classes), True),
    "squeezenet": (lambda classes: torchvision.models.squeezenet1_1(num_classes=classes), True),
    "shufflenet": (
        lambda classes: torchvision.models.shufflenet_v2_x0_5(num_classes=classes),
        True,
    ),
    "vit": (
        lambda classes: torchvision.models.VisionTransformer(
            64, 16, 1, 2, 8, 8, num_classes=classes
        ),
        False,
    ),
    "swin": (
        lambda classes: torchvision.models.SwinTransformer(
            [4, 4], 8, [1, 1], [1, 1], [2, 2], num_classes=classes
        ),
        False,
    ),
    "frozen": (lambda classes: torchvision.models.resnet18(num_classes=classes), True),
}


@pytest.mark.parametrize("name", NETS)
def test_grad_cam_is_drawn_for_each_net_with_a_convolution_whose_output_is_a_map(
    name, monkeypatch, undrawn, tmp_path
):
    make, has_map = NETS[name]

    def build(image_shape, classes):
        net = make(classes)
        for part in net.parameters():
            part.requires_grad_(name != "frozen" or part is net.fc.weight)
        return net

    monkeypatch.setitem(common.MODELS, name, build)
    random = np.random.default_rng(0)
    for index in range(40):
        place = Path("p", "ab"[index % 2])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            place / f"{index}.png"
        )
    argv = ["--dataset", "p", "--model", name, "--image-size", 64, "--epochs", 1, "--batch-size", 8]
    directory, *_ = run(train_cifar, *argv, "--no-augment", "--quiet", "--optimizer", "sgd")
    metrics = evaluate.main([str(directory), "--split", "train", "--quiet"])
    assert metrics["accuracy"] < 1  # there are mistakes to look at
    assert (directory / "train" / "gradcam.png").exists() == has_map


# ------------------------ Folds ------------------------
@pytest.fixture
def five_folds():
    """Five folds of photos in two classes that a net tells apart, three of them in a wrong folder."""
    photos("p", {"dark": 30, "light": 30})
    for file, place in (("light/3", "dark"), ("dark/4", "light"), ("light/5", "dark")):
        shutil.move(f"p/{file}.png", f"p/{place}/wrong{file[-1]}.png")
    argv = ["--dataset", "p", "--image-size", 8, *TINY, "--epochs", 12, "--lr", 0.003]
    return [
        run(train_mnist, *argv, "--fold", f"{k}/5", "--run-name", f"f{k}")[0] for k in range(1, 6)
    ]


def test_all_folds_give_a_mean_and_the_suspects_among_all_images(five_folds, capsys):
    result = evaluate.main([*map(str, five_folds)])
    row, out = result["runs"][0], capsys.readouterr().out
    accuracies = [records.read_record(path)["best"]["val_acc"] for path in five_folds]
    assert row["folds"] == 5 and row["fold_val_acc_mean"] == pytest.approx(np.mean(accuracies))
    assert row["fold_val_acc_low"] < row["fold_val_acc_mean"] < row["fold_val_acc_high"]
    assert row["seeds"] is None and f"{np.mean(accuracies):.2%}" in out
    suspects = rows_of("runs/suspects.csv")
    planted = [row for row in suspects if "wrong" in row["file"]]
    assert suspects[: len(planted)] == planted and len(planted) == 3
    assert len(suspects) <= 6 and all(row["class"] != row["predicted"] for row in suspects)
    assert all(Path(row["file"]).is_file() for row in suspects)
    page = Page(Path("runs/compare.html"))
    assert [text.splitlines()[2] for _, text in page.images if "\n" in text] == [
        Path(row["file"]).name for row in suspects
    ]
    assert Path("runs/suspects.png").exists() and f"{len(suspects)} images" in out


def test_folds_are_ranked_each_with_its_like_and_nothing_is_said_of_the_others(five_folds, capsys):
    record = records.read_record(five_folds[0])
    other = Path(shutil.copytree(five_folds[0], "runs/other"))
    best = {**record["best"], "val_loss": record["best"]["val_loss"] + 1}
    args = {**record["args"], "lr": 0.1}
    records.write_json(other / "run.json", {**record, "best": best, "args": args})
    rows = evaluate.main([*map(str, five_folds), str(other)])["runs"]
    out = capsys.readouterr().out
    assert "not ranked" not in out and "image by image" not in out
    ranks = {Path(row["run"]).name: row["rank"] for row in rows}
    assert ranks == {"f1": 1, "f2": 1, "f3": 1, "f4": 1, "f5": 1, "other": 2}
    assert [row["folds"] for row in rows if row["run"] == str(other)] == [None]


def test_folds_that_make_no_mistake_have_no_suspects(capsys):
    photos("p", {"dark": 10, "light": 10})
    argv = ["--dataset", "p", "--image-size", 8, *TINY, "--epochs", 30, "--lr", 0.01]
    made = [run(train_mnist, *argv, "--fold", f"{k}/2", "--run-name", f"f{k}")[0] for k in (1, 2)]
    assert [records.read_record(path)["best"]["val_acc"] for path in made] == [1, 1]
    evaluate.main([*map(str, made)])
    assert rows_of("runs/suspects.csv") == [] and "Suspects: 0 images" in capsys.readouterr().out


def test_folds_that_are_not_all_there_say_so_and_read_no_images(five_folds, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_data", None)
    rows = evaluate.main([*map(str, five_folds[1:])])["runs"]
    assert [row["folds"] for row in rows] == [4] * 4
    assert "4 of 5 folds" in capsys.readouterr().out and not Path("runs/suspects.csv").exists()


# ------------------------ Predict ------------------------
def test_hundreds_of_files_are_answered_in_order_as_each_alone(runs, capsys):
    Path("many/deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(600):
        pixels = random.integers(0, 256, (20 + index % 3, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"many/deep/{index}.png")
    for name in ("a.heic", "b.HEIC", "c.txt", "noending"):
        Path("many", name).write_bytes(b"")
    Path("many/deep/300.png").write_bytes(b"torn")
    with pytest.raises(records.RunError, match="1 of 600 files could not be read"):
        evaluate.main([str(runs / "digits"), "--predict", "many"])
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == [f"many/deep/{i}.png" for i in range(600) if i != 300]
    assert "4 files skipped: 2 .heic (pip install pillow-heif), 1 " in err
    assert "1 .txt" in err and "1 without ending" in err
    assert "many/deep/300.png cannot be used" in err
    some = [f"many/deep/{index}.png" for index in (0, 299, 511, 599)]
    for file in some:
        (alone,) = evaluate.main([str(runs / "digits"), "--predict", file])["predictions"]
        answer = next(line for line in lines if line[0] == file)
        assert answer[1] == alone["class"]
        assert float(answer[2]) == pytest.approx(alone["probability"], abs=2e-3)
    capsys.readouterr()
    evaluate.main(
        [str(runs / "digits"), "--predict", *some[:2], "many/deep/0.png", "--csv", "--quiet"]
    )
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == ["file", *some[:2], some[0]]
    assert err == ""


def test_predicting_with_a_net_of_ours_does_not_wait_for_torchvision(runs, expected):
    Image.fromarray(expected[0][0, 0].numpy()).save("one.png")
    argv = [str(runs / "digits"), "--predict", "one.png"]
    code = f"import sys, evaluate; evaluate.main({argv}); print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["False"], done.stderr


def test_a_photo_of_a_phone_that_cannot_be_read_is_told_by_its_ending(runs, capsys, expected):
    Path("album").mkdir()
    for name in ("album/IMG_1.HEIC", "IMG_2.heic"):  # the beginning of such a file
        Path(name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    Image.fromarray(expected[0][0, 0].numpy()).save("one.png")
    argv = [str(runs / "digits"), "--predict"]
    evaluate.main([*argv, "album", "one.png"])
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == ["one.png"]
    assert err.splitlines()[-1].endswith("1 files skipped: 1 .heic (pip install pillow-heif)")
    with pytest.raises(records.RunError, match="no image files there"):
        evaluate.main([*argv, "album"])
    assert "1 .heic (pip install pillow-heif)" in capsys.readouterr().err
    text = r"1 of 2 files could not be read: 1 .heic \(pip install pillow-heif\)"
    with pytest.raises(records.RunError, match=text):
        evaluate.main([*argv, "IMG_2.heic", "one.png"])
    out, err = capsys.readouterr()
    assert out.startswith("one.png\t") and "IMG_2.heic cannot be used" in err


@pytest.mark.parametrize("argv", [["--predict", ""], ["--out", ""]])
def test_an_empty_path_is_refused(runs, capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(runs / "digits"), *argv])
    assert "expected a path, not an empty word" in capsys.readouterr().err


# ------------------------ Export ------------------------
def test_an_export_says_how_it_differs_from_what_predict_says(runs, capsys):
    evaluate.main([str(runs / "hundred"), "--export", "torch.export", "--out", "out"])
    out = capsys.readouterr().out
    assert "of the model in fp32" in out
    text = r"(\d+) of 200 training images get another class than by --predict, which computes in bf16; "
    found = re.search(text + r"probabilities differ by up to ([\d.e-]+)", out)
    assert found and 0 < float(found[2]) < 0.2
    # Where the images are gone, that is said, and noise alone is compared.
    moved = Path(shutil.copytree(runs / "hundred", "moved"))
    record = records.read_record(moved)
    records.write_json(
        moved / "run.json", {**record, "args": {**record["args"], "dataset": "gone"}}
    )
    evaluate.main(["moved", "--export", "torch.export"])
    assert "checked with noise alone" in capsys.readouterr().err
