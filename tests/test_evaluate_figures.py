"""Figures that do not mislead, and what evaluate.py writes: from outside, by its command line and
its files."""

import csv
import io
import json
import math
import re
from pathlib import Path

import evaluate
import records
import train_mnist

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import run
from PIL import Image
from test_evaluate import (  # noqa: F401 (fixtures)
    Page,
    copy,
    digits,
    expected,
    hundred,
    logits_of,
    opened,
    runs,
    show,
    shown,
    undrawn,
    wilson,
)

TINY = ["--model", "dense", "--l1", 8, "--epochs", 1, "--batch-size", 8, "--quiet"]
TINY += ["--tutorial-layers"]  # else only what differs within an image counts


def rows_of(path):
    text = Path(path).read_bytes().decode(errors="surrogateescape")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def photos(folder, counts, levels=None, random=None):
    """Grey images of one level a class, with noise, in folder/CLASS/NUMBER.png."""
    random = random or np.random.default_rng(0)
    for index, (name, count) in enumerate(counts.items()):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        level = 20 + 95 * index if levels is None else levels[name]
        for number in range(count):
            noise = random.integers(0, 40, (8, 8), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(level)).save(f"{folder}/{name}/{number}.png")


def on_photos(*argv, **counts):
    """A run of a dense net on new photos in p."""
    photos("p", counts or {"a": 20, "b": 20})
    return run(train_mnist, "--dataset", "p", "--image-size", 8, *TINY, *argv)[0]


def table_with(page, heading):
    """The rows of the table on a page that has this column, without its first row."""
    (table,) = (table for table in page.tables if heading in table[0])
    return table[1:]


# ------------------------ Figures that do not mislead ------------------------
def test_a_class_without_images_has_no_figures_and_counts_in_no_mean(runs, shown, expected):
    sklearn = pytest.importorskip("sklearn.metrics")
    _, labels, _, predicted = expected
    nine = shown.result["classes"][9]
    assert [nine[name] for name in ("support", "accuracy", "recall", "f1")] == [0] + [None] * 3
    mean = sklearn.f1_score(labels, predicted, average="macro", labels=labels.unique().tolist())
    assert shown.result["macro_f1"] == pytest.approx(mean)
    row = table_with(Page(runs / "digits" / "report.html"), "precision")[9]
    assert row[:3] == ["9", "0", "-"] and row[-1] == "-"
    assert re.search(r"^ *9 +0 +- .* -$", shown.out, re.MULTILINE)


def test_a_perfect_net_on_a_test_without_a_class_has_an_f1_of_1(undrawn):
    directory = on_photos("--epochs", 40, "--lr", 0.01, a=20, b=20, c=2)
    metrics = evaluate.main([str(directory), "--quiet"])
    assert metrics["accuracy"] == metrics["macro_f1"] == 1
    assert metrics["classes"][2]["support"] == 0


def test_the_interval_of_seeds_has_no_width_where_they_agree_and_stays_within_0_and_1(
    copy, undrawn, capsys
):
    best = records.read_record(copy("x"))["best"]

    def compared(*values):
        made = [
            copy(f"s{seed}", seed=seed, best={**best, "val_acc": value}, test=None)
            for seed, value in enumerate(values)
        ]
        rows = evaluate.main([*map(str, made), "--json"])["runs"]
        assert json.loads(capsys.readouterr().out) == rows  # NaN is no JSON
        return [rows[0][f"val_acc_{name}"] for name in ("mean", "sd", "low", "high")]

    assert compared(0.7, 0.7, 0.7) == pytest.approx([0.7, 0, 0.7, 0.7])
    assert compared(0.5, 0.9)[2:] == [None, None]
    low, high = compared(0.05, 0.6, 0.99)[2:]
    assert (low, high) == (0, 1)
    assert compared(1.0, 1.0, 0.9)[3] == 1


def test_seeds_that_stopped_early_and_those_of_older_runs_count(copy, undrawn):
    made = [copy(f"s{seed}", seed=seed, run_name=f"s{seed}") for seed in (1, 2, 3)]
    made.append(copy("early", seed=4, status="stopped_early"))
    record = records.read_record(made[0])
    for name in ("fold", "loss", "resize", "threads"):  # an older run had none of these
        record["args"].pop(name, None)
    records.write_json(made[0] / "run.json", record)
    rows = evaluate.main([*map(str, made), "--quiet"])["runs"]
    assert [row["seeds"] for row in rows] == [4] * 4


def test_accuracies_of_averaged_views_are_told_from_plain_ones(copy, runs, undrawn, capsys):
    test = {"loss": 1.0, "acc": 0.9, "plain_loss": 1.1, "plain_acc": 0.8}
    plain = copy("plain", test={"loss": 1.1, "acc": 0.85}, tta=None)
    rows = evaluate.main([str(copy("views", test=test)), str(plain)])["runs"]
    found = {Path(row["run"]).name: row for row in rows}
    assert found["views"]["test_acc"] == 0.9 and found["views"]["plain_test_acc"] == 0.8
    assert found["plain"]["test_acc"] == found["plain"]["plain_test_acc"] == 0.85
    lines = capsys.readouterr().out.splitlines()
    assert "averaged views" in lines[0]
    assert any("views" in line and "mirror+shift" in line and "90.00%" in line for line in lines)
    assert any(
        "plain" in line and "mirror+shift" not in line and "85.00%" in line for line in lines
    )


def test_only_what_can_be_compared_is_ranked_and_the_line_says_why(copy, undrawn, capsys):
    record = records.read_record(copy("x"))
    best, data = record["best"], record["data"]
    made = [
        copy("a", best={**best, "val_loss": 0.3}),
        copy("b", best={**best, "val_loss": 0.2}),
        copy("other", best={**best, "val_loss": 0.1}, data={**data, "val_checksum": "1" * 64}),
    ]
    rows = evaluate.main(list(map(str, made)))["runs"]
    assert [(Path(row["run"]).name, row["rank"]) for row in rows] == [
        ("b", 1),
        ("a", 2),
        ("other", None),
    ]
    assert rows[2]["not_ranked"] == "the runs differ in val images"
    out = capsys.readouterr().out
    assert f"not ranked with the others, as the runs differ in val images: {made[2]}" in out
    # Losses with smoothed labels and without: by the accuracies, which can be compared.
    made = [
        copy("a", label_smoothing=0.2, best={**best, "val_loss": 0.3, "val_acc": 0.5}),
        copy("b", label_smoothing=0.0, best={**best, "val_loss": 0.9, "val_acc": 0.7}),
    ]
    rows = evaluate.main(list(map(str, made)))["runs"]
    assert [Path(row["run"]).name for row in rows] == ["b", "a"]
    out = capsys.readouterr().out
    assert "differ in --label-smoothing, so they are ranked by validation accuracy" in out


def test_the_same_photos_in_two_sizes_are_a_pair(undrawn):
    small = on_photos("--run-name", "small")
    large, *_ = run(train_mnist, "--dataset", "p", "--image-size", 12, *TINY, "--run-name", "large")
    for directory in (small, large):
        evaluate.main([str(directory), "--quiet"])
    rows = evaluate.main([str(small), str(large), "--quiet"])["runs"]
    assert rows[0]["pair_with"] is None and rows[1]["pair_with"] == rows[0]["run"]
    assert (rows[1]["pair_images"], rows[1]["not_paired"]) == (4, None)


def keep_predictions(directory, right, checksum="same"):
    """What an evaluation would leave, with images that are right or not, in an order of its own."""
    files = [f"{index}.png" for index in range(len(right))]
    lines = [
        f"{file},a,0.5,{'a' if yes else 'b'},0.5" for file, yes in zip(files, right, strict=True)
    ]
    np.random.default_rng(len(directory.name)).shuffle(lines)
    heading = "file,class,probability,predicted,predicted_probability"
    (directory / "predictions.csv").write_text("\n".join([heading, *lines, ""]))
    epoch = records.read_record(directory)["best"]["epoch"]
    metrics = {"epoch": epoch, "checksum": checksum, "images": len(right)}
    records.write_json(directory / "metrics.json", metrics)


@pytest.mark.parametrize(("one", "other"), [(0, 5), (1, 7), (16, 6), (240, 261), (0, 0)])
def test_pairs_agree_with_what_was_published_and_with_scipy(copy, undrawn, one, other):
    best = records.read_record(copy("x"))["best"]
    first, second = (copy(name, best={**best, "val_loss": loss}) for loss, name in enumerate("ab"))
    keep_predictions(first, [True] * (other + 1) + [False] * (one + 12))
    keep_predictions(second, [True] + [False] * other + [True] * one + [False] * 12)
    pair = evaluate.main([str(first), str(second), "--quiet"])["runs"][1]
    assert (pair["pair_only_this_right"], pair["pair_only_other_right"]) == (one, other)
    p = 1.0
    if one + other:
        exact = scipy.stats.binomtest(one, one + other).pvalue
        p = exact - scipy.stats.binom.pmf(one, one + other, 0.5)
    assert pair["pair_mid_p"] == pytest.approx(min(p, 1))
    if (one, other) == (1, 7):  # Bentur et al. in M. W. Fagerland et al. (2013)
        assert pair["pair_images"] == 21 and round(pair["pair_mid_p"], 4) == 0.0391
        assert pair["pair_low"] == pytest.approx(-0.5084, abs=1e-4)
        assert pair["pair_high"] == pytest.approx(-0.0134, abs=1e-4)


def test_pairs_are_decided_by_the_images_that_were_evaluated(copy, undrawn):
    record = records.read_record(copy("x"))
    best, data = record["best"], record["data"]
    made = [copy(name, best={**best, "val_loss": loss}) for loss, name in enumerate("abcd")]
    for directory in made[:3]:
        keep_predictions(directory, [True] * 9, "other" if directory.name == "b" else "same")
    # The record of c has other images, as that of an older version, which had another checksum.
    changed = {**records.read_record(made[2]), "data": {**data, "test_checksum": "0" * 64}}
    records.write_json(made[2] / "run.json", changed)
    rows = evaluate.main([*map(str, made), "--quiet"])["runs"]
    assert [row["pair_with"] for row in rows] == [None, None, str(made[0]), None]
    assert rows[1]["not_paired"] == f"evaluated on other test images than {made[0]}"
    assert rows[3]["not_paired"] == "not evaluated on the test images"


@pytest.mark.parametrize("damage", ["", "file,class\n", "\x00\x01", "file,class,predicted\na,b\n"])
def test_a_damaged_predictions_file_does_not_end_a_comparison(copy, undrawn, capsys, damage):
    made = [copy(name) for name in "abc"]
    for directory in made:
        keep_predictions(directory, [True, False])
    (made[0] / "predictions.csv").write_text(damage)
    rows = evaluate.main(list(map(str, made)))["runs"]
    assert [row["pair_with"] for row in rows] == [None, None, str(made[1])]
    text = f"runs/a/predictions.csv is damaged: {made[0]}"
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("lacking", ["name", "selection", "train", "val", "checksum"])
def test_a_key_that_run_json_lacks_is_told_in_one_line(copy, undrawn, lacking, capsys):
    broken = copy("broken")
    record = records.read_record(broken)
    del record["data"][lacking]
    records.write_json(broken / "run.json", record)
    with pytest.raises(records.RunError, match=f"run.json is damaged: data has no {lacking}"):
        evaluate.main([str(broken)])
    rows = evaluate.main([str(broken), str(copy("whole"))])["runs"]
    assert len(rows) == 1 and "skipped: runs/broken" in capsys.readouterr().err
    for name in ("argv", "host", "versions", "git", "device"):  # these are only shown
        changed = {**records.read_record(copy("whole"))}
        changed.pop(name)
        records.write_json(Path("runs/whole/run.json"), changed)
    assert evaluate.main(["runs/whole", "--quiet"])["images"] == 150


def test_val_size_0_is_said_and_its_images_are_not_called_validation_images(capsys):
    directory = on_photos("--val-size", 0)
    evaluate.main([str(directory)])
    page = Page(directory / "report.html")
    text = "the test set chose the epoch (--val-size 0)"
    assert text in capsys.readouterr().out and any(text in each for each in page.texts)
    cells = dict(row for table in page.tables for row in table if len(row) == 2)
    assert (cells["training images"], cells["validation images"]) == ("36", "0")


def test_a_run_without_a_temperature_has_no_before(undrawn, capsys):
    directory = on_photos()  # too few validation images to fit one
    assert evaluate.main([str(directory)])["temperature"] == 1
    assert "calibration error" in (out := capsys.readouterr().out) and "temperature" not in out


# ------------------------ What is written ------------------------
def test_predictions_csv_has_each_image_with_its_class_and_the_prediction(
    runs, shown, hundred, expected
):
    _, labels, confidence, predicted = expected
    rows = rows_of(runs / "digits" / "predictions.csv")
    assert list(rows[0]) == ["file", "class", "probability", "predicted", "predicted_probability"]
    assert [row["file"] for row in rows] == [str(index) for index in range(150)]
    assert [int(row["class"]) for row in rows] == labels.tolist()
    assert [int(row["predicted"]) for row in rows] == predicted.tolist()
    found = torch.tensor([float(row["predicted_probability"]) for row in rows])
    assert torch.allclose(found, confidence, atol=1e-5)
    given = logits_of(runs / "digits", digits(False).images).softmax(1)[range(150), labels]
    assert [float(row["probability"]) for row in rows] == pytest.approx(given.tolist(), abs=1e-5)
    # Files are named as in data.csv.
    listed = [r["file"] for r in rows_of(runs / "hundred" / "data.csv") if r["part"] == "test"]
    assert [row["file"] for row in rows_of(runs / "hundred" / "predictions.csv")] == listed
    assert not list(runs.glob("*/predictions.pt"))


def test_four_test_images_have_suspects_and_one_that_the_net_agrees_with_is_none(undrawn):
    directory = on_photos()
    for split in ("test", "val", "train"):
        evaluate.main([str(directory), "--quiet", "--split", split])
        place = directory if split == "test" else directory / split
        answers, suspects = rows_of(place / "predictions.csv"), rows_of(place / "suspects.csv")
        wrong = [row for row in answers if row["class"] != row["predicted"]]
        assert len(suspects) == min(len(wrong), math.ceil(len(answers) / 10))
        assert all(row["class"] != row["predicted"] for row in suspects)


def test_numbers_of_images_and_of_mistakes_on_the_page_are_right(runs, shown, expected):
    page = Page(runs / "digits" / "report.html")
    cells = dict(row for table in page.tables for row in table if len(row) == 2)
    assert (cells["training images"], cells["validation images"]) == ("480", "120")
    _, labels, _, predicted = expected
    assert f"The 40 most confident of {(labels != predicted).sum()} mistakes" in page.content
    metrics = shown.result
    tta, count = metrics["tta"], round(metrics["tta"]["accuracy"] * 150)
    assert tta["accuracy_interval"] == pytest.approx(wilson(count, 150))
    rows = {row[0]: row[1:] for row in table_with(page, "95% interval")}
    for name, figures in (
        ("accuracy", metrics),
        ("accuracy with test-time augmentation, mirror+shift", tta),
    ):
        interval = "{:.2%} to {:.2%}".format(*figures["accuracy_interval"])
        assert rows[name] == [f"{figures['accuracy']:.2%}", interval]
    headline = page.texts[1]
    assert headline.startswith(f"{tta['accuracy']:.2%} ") and interval in headline


def test_the_report_of_a_run_that_was_trained_on_is_called_stale(copy, undrawn, capsys):
    directory = copy("r")
    evaluate.main([str(directory), "--split", "val", "--quiet"])
    evaluate.main([str(directory)])
    assert "of another epoch" not in capsys.readouterr().out
    record = records.read_record(directory)
    records.write_json(directory / "run.json", record | {"best": {**record["best"], "epoch": 99}})
    state = records.load_checkpoint(directory / "best.pt")
    records.save_checkpoint(directory / "best.pt", {**state, "epoch": 99})
    evaluate.main([str(directory)])
    assert "runs/r/val/report.html is of another epoch" in capsys.readouterr().out
    evaluate.main([str(directory), str(copy("s")), "--split", "val"])
    assert f"as trained on since the evaluation: {directory}" in capsys.readouterr().out


def test_runs_star_says_nothing_of_files_and_a_run_that_is_not_there_is_a_usage_error(
    copy, undrawn, capsys
):
    made = [copy(name) for name in "ab"]
    for _ in range(2):  # the second time, the first one's files are there
        evaluate.main([*map(str, sorted(Path("runs").iterdir())), "--json"])
        assert capsys.readouterr().err == ""
    assert {path.name for path in Path("runs").iterdir()} >= {"compare.html", "compare.png"}
    for argv in (["runs/none"], ["runs/none", "runs/a"], ["runs/none", "--predict", "x"]):
        with pytest.raises(records.UsageError, match="runs/none is not a run directory"):
            evaluate.main(argv)
    assert made
