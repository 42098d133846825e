"""Images from files: data.csv, folders and CSV files, parts, folds, classes, endings, and what has an effect."""

import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import evaluate
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
import undrawn
from conftest import check_same, run
from forked import Forked
from PIL import Image, ImageOps, features
from test_data import pictures
from torch.optim.optimizer import register_optimizer_step_pre_hook

TINY = ["--model", "dense", "--l1", 4, "--image-size", 8, "--epochs", 1, "--batch-size", 8]
QUIET = [*TINY, "--quiet"]
ON_P = ["--dataset", "p", *QUIET]


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    """The pictures are another file's tests, and take seconds."""
    undrawn.nothing_is_drawn(monkeypatch.setattr)


def picture(path, level, mode="L"):
    """A grey image of one level at `path`, whose folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), level).save(path)


def rows_of(directory):
    """The rows of a run's data.csv, or of a search's."""
    with open(Path(directory, "data.csv"), newline="") as file:
        return list(csv.DictReader(file))


def files_of(directory, *parts):
    """The files of these parts in a data.csv."""
    return {row["file"] for row in rows_of(directory) if row["part"] in parts}


def parts_of(directory):
    """The part of each file in a data.csv."""
    return {row["file"]: row["part"] for row in rows_of(directory)}


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def evaluated(directory, *argv, out="evaluated"):
    """What evaluate.py measures: metrics.json and the predictions, as bytes that can be compared."""
    evaluate.main([str(directory), "--quiet", "--out", out, *map(str, argv)])
    return records.read_json(Path(out, "metrics.json")), Path(out, "predictions.csv").read_bytes()


def exits_with_one_line(capsys, *argv, main=train_mnist.main):
    """The line with which a bad flag ends the program, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.count("\n") == 1, (out, err)
    return err


def fails_with_one_line(*argv, main=None, kind=records.RunError):
    """The line with which a run, or `main`, ends."""
    with pytest.raises(kind) as failure:
        main([str(word) for word in argv]) if main else run(train_mnist, *argv)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@contextlib.contextmanager
def at_each_step(call):
    """Have `call` called before each step of an optimiser."""
    hook = register_optimizer_step_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


def little_memory(monkeypatch, free=1):
    """Have the machine say that it has so many kB of memory left."""
    read_text = Path.read_text

    def read(path, *arguments, **options):
        if str(path) == "/proc/meminfo":
            return f"MemTotal: 9 kB\nMemAvailable: {free} kB\n"
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)


# ------------------------ data.csv ------------------------
def test_a_run_writes_data_csv_with_each_file_its_class_its_part_and_its_checksum():
    pictures("p", {"a/deep": 12, "b": 13})
    directory, record, _ = run(train_mnist, *ON_P)
    rows = rows_of(directory)
    assert list(rows[0]) == ["file", "class", "part", "sha256"]
    there = {path.relative_to("p").as_posix() for path in Path("p").rglob("*.png")}
    assert len(rows) == 25 and {row["file"] for row in rows} == there
    for row in rows:
        assert row["class"] == row["file"].split("/")[0]
        assert row["sha256"] == sha256(Path("p", row["file"]))
    data = record["data"]
    assert {part: len(files_of(directory, part)) for part in ("train", "val", "test")} == {
        part: data[part] for part in ("train", "val", "test")
    }
    assert data["files"] == "data.csv" and data["files_checksum"] == sha256(directory / "data.csv")


@pytest.mark.parametrize("argv", [["--no-test"], ["--val-size", 0]])
def test_data_csv_has_the_test_images_of_a_run_without_a_test_or_a_validation(argv):
    pictures("p", {"a": 20, "b": 20})
    directory, record, _ = run(train_mnist, *ON_P, *argv)
    assert len(rows_of(directory)) == 40 and len(files_of(directory, "test")) == 4
    assert (record["test"] is None) == ("--no-test" in argv)


def test_data_csv_is_there_before_the_first_step():
    pictures("p", {"a": 20, "b": 20})
    found = []

    def stop():
        found.append((len(rows_of("runs/r")), sha256("runs/r/data.csv")))
        raise KeyboardInterrupt("SIGINT")

    with at_each_step(stop):
        directory, record, rows = run(train_mnist, *ON_P, "--run-name", "r")
    assert record["status"] == "interrupted" and rows == []
    assert found == [(40, record["data"]["files_checksum"])]
    _, record, _ = run(train_mnist, "--resume", directory, "--quiet")
    whole, *_ = run(train_mnist, *ON_P)
    check_same(whole, directory)


# ------------------------ Files that come, go and change ------------------------
def test_files_that_come_later_are_neither_tested_nor_trained_on():
    pictures("p", {"a": 20, "b": 20})
    argv = [*ON_P, "--no-test", "--epochs", 2, "--stop-after", 1]
    directory, record, _ = run(train_mnist, *argv)
    assert record["test"] is None
    whole, *_ = run(train_mnist, *argv[:-2])
    before = evaluated(directory)
    pictures("p", {"a/new": 30, "b/new": 30})
    assert evaluated(directory) == before and before[0]["images"] == 4
    run(train_mnist, "--resume", directory, "--quiet")
    check_same(whole, directory)

    # The test reads its own files alone, none of which was trained on.
    assert not files_of(directory, "test") & files_of(directory, "train", "val")
    after = evaluated(directory)
    for file in {path.relative_to("p").as_posix() for path in Path("p").rglob("*.png")}:
        if file not in files_of(directory, "test"):
            Path("p", file).unlink()
    assert evaluated(directory) == after


def test_one_new_file_changes_one_test_image_at_most():
    lots = random.Random(0)
    for number in range(6):
        root = Path(f"p{number}")
        counts = {name: lots.choice([3, 5, 9, 14, 15, 16, 24, 25, 26]) for name in "abc"}
        pictures(root, counts)
        argv = ["--dataset", root, *QUIET, "--no-test"]
        tests = [files_of(run(train_mnist, *argv, "--seed", number)[0], "test")]
        for name, new in itertools.product("abc", (f"{lots.random()}.png", "0new.PNG")):
            picture(root / name / new, lots.randrange(256))
            tests.append(files_of(run(train_mnist, *argv, "--seed", number)[0], "test"))
        for before, after in itertools.pairwise(tests):
            assert len(before - after) <= 1 and len(after - before) <= 1, (counts, before, after)


def test_the_test_images_do_not_depend_on_the_seed_and_the_validation_images_do():
    pictures("p", {"a": 30, "b": 20, "c": 2})
    runs = [run(train_mnist, *ON_P, "--seed", seed)[0] for seed in range(4)]
    assert len({frozenset(files_of(directory, "test")) for directory in runs}) == 1
    assert len({frozenset(files_of(directory, "val")) for directory in runs}) == 4


def test_a_file_that_has_changed_or_gone_is_named():
    pictures("p", {"a": 20, "b": 20})
    directory, *_ = run(train_mnist, *ON_P, "--epochs", 2, "--stop-after", 1)
    run(train_mnist, "--resume", directory, "--stop-after", 1, "--quiet")  # all is as it was
    for part, split in (("train", "train"), ("val", "val"), ("test", "test")):
        file = sorted(files_of(directory, part))[0]
        path, content = Path("p", file), Path("p", file).read_bytes()
        for damage in ("changed", "gone"):
            picture(path, 200) if damage == "changed" else path.unlink()
            expected = "the file has changed" if damage == "changed" else "No such file"
            line = fails_with_one_line("--resume", directory, "--quiet")
            assert file in line and expected in line and "p: 1 of" in line
            argv = [directory, "--split", split, "--quiet"]
            line = fails_with_one_line(*argv, main=evaluate.main)
            assert file in line and expected in line
            path.write_bytes(content)
    assert evaluated(directory)[0]["images"] == 4
    assert run(train_mnist, "--resume", directory, "--quiet")[1]["status"] == "finished"


def test_a_data_csv_that_was_edited_or_removed_is_refused(capsys):
    pictures("p", {"a": 20, "b": 20})
    directory, *_ = run(train_mnist, *ON_P, "--epochs", 2, "--stop-after", 1, "--run-name", "r")
    path = directory / "data.csv"
    content = path.read_text()
    for text, expected in (
        (content.replace(",train,", ",test,", 1), "runs/r/data.csv has changed"),
        (content + "\n", "runs/r/data.csv has changed"),
        (None, "runs/r/data.csv is missing"),
    ):
        path.unlink() if text is None else path.write_text(text)
        assert expected in exits_with_one_line(capsys, "--resume", directory)
        assert expected in fails_with_one_line(directory, main=evaluate.main)


def test_a_folder_that_has_moved_is_found_with_dataset_and_data_dir(capsys):
    pictures("p", {"a": 20, "b": 20})
    argv = [*ON_P, "--epochs", 3, "--augment"]
    whole, *_ = run(train_mnist, *argv)
    directory, *_ = run(train_mnist, *argv, "--stop-after", 1)
    Path("elsewhere").mkdir()
    Path("p").rename("elsewhere/q")
    assert "p is not there; say where the images are with --dataset" in fails_with_one_line(
        "--resume", directory
    )
    run(train_mnist, "--resume", directory, "--dataset", "elsewhere/q", "--quiet")
    check_same(whole, directory)
    metrics, _ = evaluated(directory)  # the run has its new place now
    assert metrics["accuracy"] == records.read_record(directory)["test"]["acc"]
    Path("elsewhere/q").rename("p")
    line = fails_with_one_line(directory, main=evaluate.main)
    assert "say where with --data-dir" in line
    metrics, _ = evaluated(directory, "--data-dir", "p")
    assert metrics["accuracy"] == records.read_record(directory)["test"]["acc"]
    expected = "--dataset cannot change when a run is resumed"
    assert expected in exits_with_one_line(capsys, "--resume", directory, "--dataset", "synthetic")
    line = exits_with_one_line(capsys, "--resume", directory, "--dataset", "nowhere")
    assert "nowhere is no folder, no CSV file" in line


# ------------------------ CSV files ------------------------
def write_csv(path, lines, delimiter=",", encoding="utf-8"):
    text = "".join(delimiter.join(line) + "\r\n" for line in lines)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))


def labelled(count=10, **more):
    """Lines of a CSV file for the files a/* and b/* of `pictures`."""
    files = [(f"{name}/{i}.png", name) for name in "ab" for i in range(count)]
    return [["file", "class", *more], *([*each, *more.values()] for each in files)]


def test_a_csv_file_with_file_and_class_alone_is_cut_as_a_folder_is(monkeypatch):
    pictures("p", {"a": 20, "b": 20})
    write_csv("p/list.csv", labelled(20))
    write_csv("p/list2.CSV", [line[::-1] for line in labelled(20)])
    folder, *_ = run(train_mnist, *ON_P)
    Path("other").mkdir()
    monkeypatch.chdir("other")
    for name in ("list.csv", "list2.CSV"):
        directory, record, _ = run(train_mnist, "--dataset", f"../p/{name}", *QUIET)
        assert rows_of(directory) == rows_of(folder)
        assert record["data"]["name"].endswith(f"p/{name}")
        assert evaluated(directory)[0]["images"] == 4


def test_a_csv_file_says_which_classes_and_parts_in_any_capitals():
    pictures("p", {"x": 12})
    parts = ["Training", "TRAIN", "", "train", "valid", "Validation", "VAL", "testing", "Test"]
    lines = [[f"x/{i}.png", "ab"[i % 2], part] for i, part in enumerate(parts)]
    write_csv("p/list.csv", [["file", "class", "part"], *lines])
    directory, record, _ = run(train_mnist, "--dataset", "p/list.csv", *QUIET)
    expected = ["train"] * 4 + ["val"] * 3 + ["test"] * 2
    assert parts_of(directory) == {f"x/{i}.png": part for i, part in enumerate(expected)}
    assert record["test"] and records.load_checkpoint(directory / "best.pt")["classes"] == [
        "a",
        "b",
    ]


def test_a_csv_file_as_excel_writes_it_is_read():
    pictures("p", {"a": 10, "ü b": 10})
    lines = [[f"{name}/{i}.png", f'"{name}"', ""] for name in ("a", "ü b") for i in range(10)]
    heading = ["file", "class", "note"]
    write_csv("p/list.csv", [heading, *lines], ";", "utf-8-sig")
    directory, *_ = run(train_mnist, "--dataset", "p/list.csv", *QUIET)
    classes = records.load_checkpoint(directory / "best.pt")["classes"]
    assert classes == ["a", "ü b"] and len(rows_of(directory)) == 20


def test_spaces_after_the_commas_of_a_csv_file_are_no_parts_of_names():
    pictures("p", {"a": 10, " b": 10})
    lines = [[f"{name}/{i}.png", name] for name in ("a", " b") for i in range(10)]
    write_csv("p/list.csv", [["file", "class"], *lines])
    write_csv("p/spaced.csv", [["file", "class"], *lines[:10], *labelled(10)[11:]], ", ")
    pictures("p", {"b": 10})
    for name, expected in (("list", [" b", "a"]), ("spaced", ["a", "b"])):
        directory, *_ = run(train_mnist, "--dataset", f"p/{name}.csv", *QUIET)
        assert records.load_checkpoint(directory / "best.pt")["classes"] == expected


def test_a_csv_file_may_have_checksums_and_absolute_paths():
    pictures("p", {"a": 10, "b": 10})
    lines = [["sha256", "part", "class", "file"]]
    for number, path in enumerate(sorted(Path("p").absolute().rglob("*.png"))):
        part = "train" if number % 5 else "test"
        lines.append([sha256(path), part, path.parent.name, str(path)])
    write_csv("lists/list.csv", lines)
    directory, *_ = run(train_mnist, "--dataset", "lists/list.csv", *QUIET)
    assert len(files_of(directory, "test")) == 4 and len(files_of(directory, "val")) == 2
    assert evaluated(directory)[0]["images"] == 4


@pytest.mark.parametrize(
    "change, expected",
    [
        ((0, ["name", "class", "part", "sha256"]), ["line 2", "in columns of these names"]),
        ((0, ["file", "label", "part", "sha256"]), ["line 2", "in columns of these names"]),
        ((3, ["a/2.png", "a", "exam", ""]), ["line 4", "train, val or test"]),
        ((4, ["a/3.png", "", "train", ""]), ["line 5", "its class"]),
        ((4, ["", "a", "train", ""]), ["line 5", "a file"]),
        ((7, ["a/2.png", "b", "test", ""]), ["line 8", "a/2.png is there twice"]),
        ((5, ["a/none.png", "a", "train", ""]), ["a/none.png (No such file or directory)"]),
        ((5, ["a/4.png", "a", "train", "0" * 64]), ["a/4.png (the file has changed)"]),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_told_in_one_line(change, expected):
    pictures("p", {"a": 10, "b": 10})
    lines = labelled(10, part="train", sha256="")
    lines[change[0]] = change[1]
    write_csv("p/list.csv", lines)
    line = fails_with_one_line("--dataset", "p/list.csv", *QUIET)
    assert all(text in line for text in expected), line
    assert not Path("runs").exists()


def test_an_empty_csv_file_and_one_of_no_images_are_refused():
    for text in ("", "file,class\n", "file,class\na/1.png,a\n"):
        Path("list.csv").write_text(text)
        line = fails_with_one_line("--dataset", "list.csv", *QUIET)
        assert "at least two classes" in line


def test_the_data_csv_of_a_run_gives_another_run_the_same_parts():
    pictures("p", {"a": 20, "b": 20})
    first, record, _ = run(train_mnist, *ON_P)
    shutil.copy(first / "data.csv", "p/list.csv")
    pictures("p", {"a/new": 9, "c": 9})
    second, other, _ = run(train_mnist, "--dataset", "p/list.csv", *QUIET, "--seed", 1)
    assert parts_of(first) == parts_of(second)
    for key in ("checksum", "val_checksum", "test_checksum"):
        assert record["data"][key] == other["data"][key]


def test_a_run_on_a_csv_file_goes_on_and_is_evaluated_from_its_data_csv(capsys):
    pictures("p", {"a": 20, "b": 20})
    write_csv("p/list.csv", labelled(20))
    argv = ["--dataset", "p/list.csv", *QUIET, "--epochs", 2]
    whole, *_ = run(train_mnist, *argv)
    directory, *_ = run(train_mnist, *argv, "--stop-after", 1)
    write_csv("p/list.csv", labelled(19))  # what stands in it now does not matter
    run(train_mnist, "--resume", directory, "--quiet")
    check_same(whole, directory)
    before = evaluated(directory)
    Path("p").rename("q")
    for place in ("q", "q/list.csv"):
        assert evaluated(directory, "--data-dir", place) == before


# ------------------------ Folds ------------------------
@pytest.mark.parametrize("source", ["p", "list.csv"])
def test_the_folds_are_apart_and_together_all_images_with_each_class_in_each(source):
    counts = {"a": 10, "b": 11, "c": 4}
    pictures("p", counts)
    lines = [[f"p/{name}/{i}.png", name] for name, count in counts.items() for i in range(count)]
    write_csv("list.csv", [["file", "class"], *lines])
    folds = []
    for part in (1, 2, 3):
        argv = ["--dataset", source, *QUIET, "--fold", f"{part}/3"]
        directory, record, _ = run(train_mnist, *argv)
        other, *_ = run(train_mnist, *argv, "--seed", 7)
        assert rows_of(directory) == rows_of(other), "the folds do not depend on the seed"
        assert record["test"] is None and record["data"]["test"] is None
        assert set(parts_of(directory).values()) == {"train", "val"}
        assert len(rows_of(directory)) == 25
        folds.append([row for row in rows_of(directory) if row["part"] == "val"])
        for name, count in counts.items():
            assert abs(sum(row["class"] == name for row in folds[-1]) - count / 3) < 1
    files = [row["file"] for fold in folds for row in fold]
    assert len(files) == len(set(files)) == 25
    line = fails_with_one_line(directory, main=evaluate.main)
    assert "has no test images" in line
    assert evaluated(directory, "--split", "val")[0]["images"] == len(folds[-1])


def test_a_fold_does_not_read_the_test_images():
    pictures("p", {"train/a": 10, "train/b": 10, "test/a": 5, "test/b": 5})
    for path in Path("p/test").rglob("*.png"):
        path.write_text("this is not read")
    directory, record, _ = run(train_mnist, *ON_P, "--fold", "2/4")
    assert record["test"] is None and record["data"]["val"] == 5 and record["data"]["train"] == 15
    assert all(file.startswith("train/") for file in parts_of(directory))
    assert "has no test images" in fails_with_one_line(directory, main=evaluate.main)
    assert evaluated(directory, "--split", "train")[0]["images"] == 15


def test_the_folds_of_a_dataset_with_a_name_are_apart_and_together_all_images(few_images):
    argv = ["--dataset", "synthetic", "--model", "dense", "--l1", 4, "--epochs", 1, "--quiet"]
    sums, count = set(), 0
    for part in (1, 2, 3):
        directory, record, _ = run(train_mnist, *argv, "--fold", f"{part}/3")
        data = record["data"]
        assert record["test"] is None and data["test"] is None
        assert not (directory / "data.csv").exists()
        again = run(train_mnist, *argv, "--fold", f"{part}/3", "--seed", 3)[1]["data"]
        assert again["val_checksum"] == data["val_checksum"]
        sums.add(data["val_checksum"])
        count += data["val"]
        assert evaluated(directory, "--split", "val")[0]["images"] == data["val"] == 100
        assert "has no test images" in fails_with_one_line(directory, main=evaluate.main)
    assert len(sums) == 3 and count == 300


def test_a_fold_beside_what_it_rules_out_is_refused(capsys):
    pictures("p", {"a": 10, "b": 10})
    for flags in (["--val-size", 0.2], ["--test"]):
        line = exits_with_one_line(capsys, *ON_P, "--fold", "1/3", *flags)
        assert "has no effect beside --fold" in line
    for text in ("0/3", "4/3", "1/1", "x", "1", "1/3/3", "", "-1/3", "1.0/3", "1/0"):
        line = exits_with_one_line(capsys, *ON_P, f"--fold={text}")
        assert "--fold: expected K/N, K from 1 to N, as in 1/5" in line
    pictures("q", {"train/a": 10, "train/b": 10, "val/a": 5, "val/b": 5})
    argv = ["--dataset", "q", *QUIET, "--fold", "1/3"]
    line = fails_with_one_line(*argv, kind=records.UsageError)
    assert "--fold has no effect" in line and not Path("runs").exists()


# ------------------------ All is looked at before the first step ------------------------
@pytest.mark.parametrize("part", ["test", "val", "train"])
@pytest.mark.parametrize("flags", [[], ["--no-test"]])
def test_a_broken_image_in_any_part_ends_the_run_before_its_first_step(part, flags):
    pictures("p", {f"{part}/{name}": 10 for part in ("train", "val", "test") for name in "ab"})
    broken = Path("p", part, "b/7.png")
    content = broken.read_bytes()
    broken.write_bytes(content[:-30])
    steps, argv = [], [*ON_P, "--run-name", "r", *flags]
    with at_each_step(lambda: steps.append(1)):
        line = fails_with_one_line(*argv)
        assert f"{part}/b/7.png (" in line and "1 of 60 files cannot be used" in line
        assert not steps
        broken.write_bytes(content)
        assert run(train_mnist, *argv)[1]["status"] == "finished" and steps


def test_ten_of_many_broken_files_are_named_and_how_many_there_are():
    pictures("p", {"a": 20, "b": 20})
    for i in range(6):
        for name in "ab":
            Path("p", name, f"{i}.png").write_text("no image" if i else "")
    line = fails_with_one_line(*ON_P, "--run-name", "r")
    assert line.startswith("p: 12 of 40 files cannot be used: a/0.png (")
    named = re.findall(r"[ab]/\d+\.png", line)
    assert named == [*(f"a/{i}.png" for i in range(6)), *(f"b/{i}.png" for i in range(4))]
    assert line.endswith(", and 2 more; remove or replace them")
    for path in Path("p").glob("*/[0-5].png"):
        path.unlink()
    assert run(train_mnist, *ON_P, "--run-name", "r")[1]["status"] == "finished"


# ------------------------ Layouts ------------------------
def test_train_and_val_alone_validate_with_val_and_do_not_test():
    pictures("p", {"train/a": 10, "train/b": 10, "val/a": 5, "val/b": 5})
    directory, record, _ = run(train_mnist, *ON_P)
    assert record["test"] is None and record["data"]["test"] is None
    assert (record["data"]["train"], record["data"]["val"]) == (20, 10)
    assert all(file.split("/")[0] == part for file, part in parts_of(directory).items())
    assert "has no test images" in fails_with_one_line(directory, main=evaluate.main)
    assert evaluated(directory, "--split", "val")[0]["images"] == 10


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "VALIDATION", "testing"),
        ("training", "valid", "Test"),
        ("TRAIN", "Val", "TEST"),
    ],
)
def test_the_parts_have_names_of_several_spellings(names):
    pictures("p", {f"{part}/{name}": 4 for part in names for name in "ab"})
    directory, record, _ = run(train_mnist, *ON_P)
    parts = dict(zip(names, ("train", "val", "test"), strict=True))
    assert {file: parts[file.split("/")[0]] for file in parts_of(directory)} == parts_of(directory)
    assert [record["data"][part] for part in parts.values()] == [8, 8, 8]


def test_what_lies_beside_the_parts_is_left_out():
    pictures("p", {f"{part}/{name}": 4 for part in ("train", "test") for name in "ab"})
    pictures("p", {"drafts/a": 3})
    picture("p/train/stray.png", 3)
    directory, record, _ = run(train_mnist, *ON_P)
    assert [record["data"][part] for part in ("train", "val", "test")] == [7, 1, 8]
    assert len(rows_of(directory)) == 16


def test_two_folders_for_one_part_are_refused_and_named():
    pictures("p", {f"{part}/{name}": 4 for part in ("train", "val", "Valid") for name in "ab"})
    line = fails_with_one_line(*ON_P)
    assert "two folders for one part" in line and "val" in line and "Valid" in line


def test_the_validation_part_of_a_folder_rules_val_size_out():
    pictures("p", {f"{part}/{name}": 10 for part in ("train", "val") for name in "ab"})
    line = fails_with_one_line(*ON_P, "--val-size", 0.2, kind=records.UsageError)
    assert line.startswith("--val-size has no effect") and not Path("runs").exists()


def test_folders_and_links_in_a_class_are_read():
    pictures("p", {"a/x": 4, "a/x/y/z": 5, "b": 10})
    pictures("far", {"away": 6, "single": 1})
    Path("p/a/linked").symlink_to(Path("far/away").absolute())
    Path("p/c").symlink_to(Path("far/away").absolute())
    Path("p/b/linked.png").symlink_to(Path("far/single/0.png").absolute())
    directory, *_ = run(train_mnist, *ON_P)
    expected = {f"a/x/y/z/{i}.png" for i in range(5)} | {f"a/x/{i}.png" for i in range(4)}
    expected |= {f"{name}/{i}.png" for name in ("a/linked", "c") for i in range(6)}
    expected |= {f"b/{i}.png" for i in range(10)} | {"b/linked.png"}
    assert set(parts_of(directory)) == expected
    assert records.load_checkpoint(directory / "best.pt")["classes"] == ["a", "b", "c"]


def test_what_programs_leave_in_folders_is_skipped_without_a_word(capsys):
    pictures("p", {"a": 10, "b": 10})
    Path("p/empty").mkdir()
    for stray in (
        "__MACOSX/a/0.png",
        "a/__MACOSX/0.png",
        ".ipynb_checkpoints/0.png",
        "b/.ipynb_checkpoints/0-checkpoint.png",
        "a/._0.png",
        "b/.hidden.png",
        "a/.DS_Store",
    ):
        Path("p", stray).parent.mkdir(parents=True, exist_ok=True)
        Path("p", stray).write_text("no image")
    directory, *_ = run(train_mnist, "--dataset", "p", *TINY)
    assert len(rows_of(directory)) == 20
    said = "".join(capsys.readouterr())
    assert "files skipped" not in said and not any(
        word in said for word in ("MACOSX", "ipynb", "empty")
    )


# ------------------------ Classes ------------------------
def test_a_class_that_only_train_has_is_warned_of(capsys):
    pictures("p", {"train/a": 10, "train/b": 10, "train/rare": 10, "test/a": 5, "test/b": 5})
    Path("p/test/rare").mkdir()
    directory, record, _ = run(train_mnist, "--dataset", "p", *TINY)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "has no images of" in line]
    assert line.startswith("test has no images of rare;") and record["data"]["test"] == 10
    assert records.load_checkpoint(directory / "best.pt")["classes"] == ["a", "b", "rare"]
    metrics, _ = evaluated(directory)
    assert [each["support"] for each in metrics["classes"]] == [5, 5, 0]


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_class_that_train_lacks_is_refused_and_named(part):
    pictures("p", {"train/a": 10, "train/b": 10, f"{part}/a": 5, f"{part}/zebra": 5})
    pictures("p", {"test/b": 5} if part == "val" else {})
    Path("p/train/zebra").mkdir()
    line = fails_with_one_line(*ON_P)
    assert f"{part} has classes that train has not: zebra" in line


def test_the_classes_are_sorted_as_people_count():
    names = ["1", "2", "10", "a2", "a10", "b"]
    pictures("p", dict.fromkeys(reversed(names), 3))
    directory, *_ = run(train_mnist, *ON_P)
    assert records.load_checkpoint(directory / "best.pt")["classes"] == names


# ------------------------ Endings ------------------------
def can_write(ending):
    return {".avif": features.check("avif"), ".jp2": features.check("jpg_2000")}.get(ending, True)


@pytest.mark.parametrize(
    "ending", [".jfif", ".gif", ".jp2", ".avif", ".JPG", ".PnG", ".bmp", ".tiff"]
)
def test_files_of_this_ending_are_read(ending):
    if not can_write(ending):
        pytest.skip(f"this Pillow cannot write {ending}")
    kind = {".jfif": "JPEG", ".JPG": "JPEG", ".jp2": "JPEG2000", ".PnG": "PNG"}.get(ending)
    for name, level in (("a", 40), ("b", 200)):
        Path("p", name).mkdir(parents=True)
        for i in range(10):
            frames = [Image.new("L", (16, 16), level), Image.new("L", (16, 16), 120)]
            more = {"save_all": True, "append_images": frames[1:]} if ending == ".gif" else {}
            frames[0].save(Path("p", name, f"{i}{ending}"), kind, **more)
    argv = [*ON_P, "--normalize", "dataset"]
    directory, record, _ = run(train_mnist, *argv)
    assert sum(record["data"][part] for part in ("train", "val", "test")) == 20
    best = records.load_checkpoint(directory / "best.pt")
    # As many of the one class as of the other: the first frame of each.
    train = [row["class"] for row in rows_of(directory) if row["part"] == "train"]
    expected = sum({"a": 40, "b": 200}[name] for name in train) / len(train) / 255
    assert best["mean"] == [pytest.approx(expected, abs=0.02)]


@pytest.mark.skipif(bool(importlib.util.find_spec("pillow_heif")), reason="pillow-heif is here")
def test_skipped_files_are_counted_by_their_endings_with_what_would_read_them(capsys):
    pictures("p", {"a": 10, "b": 10})
    for i in range(6):
        Path("p", "ab"[i % 2], f"{i}.{('heic', 'HEIC')[i % 2]}").write_text("")
    Path("p/b/notes.xyz").write_text("")
    run(train_mnist, "--dataset", "p", *TINY)
    lines = [line for line in capsys.readouterr().out.splitlines() if "files skipped" in line]
    assert lines == ["7 files skipped: 6 .heic (pip install pillow-heif), 1 .xyz"]
    run(train_mnist, *ON_P)
    assert capsys.readouterr() == ("", "")


# ------------------------ The way to the square ------------------------
WAYS = {
    "stretch": lambda image: image.resize((8, 8), Image.Resampling.BILINEAR),
    "crop": lambda image: ImageOps.fit(image, (8, 8), Image.Resampling.BILINEAR),
    "pad": lambda image: ImageOps.pad(image, (8, 8), Image.Resampling.BILINEAR),
}


def striped(size):
    """A wide or high image with a coloured stripe at one end, and a white ground."""
    image = Image.new("RGB", size, "white")
    image.paste((250, 40, 90), (0, 0, size[0] // 4, size[1]))
    image.paste((10, 90, 200), (0, 0, size[0], size[1] // 8))
    return image


@pytest.mark.parametrize("size", [(48, 16), (16, 40), (16, 16)])
def test_each_way_to_the_square_is_pillows_own_and_predict_goes_it_too(size, capsys):
    for name, i in itertools.product("ab", range(10)):
        Path("p", name).mkdir(parents=True, exist_ok=True)
        striped(size).save(Path("p", name, f"{i}.png"))
    means = {}
    for way, as_pillow in WAYS.items():
        flags = ["--resize", way] if way != "stretch" else []
        argv = [*ON_P, "--normalize", "dataset", "--no-augment", *flags]
        directory, record, _ = run(train_cifar, *argv, "--model", "cnn", "--c1", 2)
        best = records.load_checkpoint(directory / "best.pt")
        expected = np.asarray(as_pillow(striped(size)), float).mean((0, 1)) / 255
        assert best["mean"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert best["resize"] == way == record["args"]["resize"]
        means[way] = tuple(best["mean"])

        # What evaluate.py predicts of a file is what it predicts of the same square.
        striped(size).save("one.png")
        as_pillow(striped(size)).save("square.png")
        capsys.readouterr()
        paths = ["one.png", "square.png"]
        answer = evaluate.main([str(directory), "--predict", *paths, "--top", "2"])
        one, square = answer["predictions"][:2], answer["predictions"][2:]
        assert [x["probability"] for x in one] == [x["probability"] for x in square]
        assert evaluated(directory)[0]["images"] == 2
    assert len(set(means.values())) == (3 if size != (16, 16) else 1)


def test_the_resize_of_a_run_cannot_change_when_it_goes_on(capsys):
    pictures("p", {"a": 10, "b": 10})
    argv = [*ON_P, "--resize", "crop", "--epochs", 2, "--stop-after", 1]
    directory, *_ = run(train_mnist, *argv)
    line = exits_with_one_line(capsys, "--resume", directory, "--resize", "pad")
    assert "--resize cannot change" in line
    assert "--resize: expected stretch" in exits_with_one_line(capsys, *ON_P, "--resize", "fit")


# ------------------------ Paths ------------------------
def test_an_empty_path_is_refused_with_one_line(capsys):
    for flag in ("--dataset", "--resume", "--data-dir", "--runs-dir"):
        line = exits_with_one_line(capsys, flag, "")
        assert flag in line and "empty" in line
        assert flag in exits_with_one_line(capsys, f"{flag}=")
    line = exits_with_one_line(capsys, "x", "--data-dir", "", main=evaluate.main)
    assert "--data-dir" in line and "empty" in line


def test_a_dataset_that_is_not_there_is_told_in_one_line(capsys):
    Path("file.txt").touch()
    for name in ("nowhere", "nowhere.csv", "file.txt", "Mnist"):
        line = exits_with_one_line(capsys, "--dataset", name)
        assert f"{name} is no folder, no CSV file and none of mnist," in line


def test_a_tilde_in_the_dataset_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pictures("home/photos", {"a": 10, "b": 10})
    write_csv("home/photos/list.csv", labelled(10))
    for argv in (
        ["--dataset", "~/photos"],
        ["--dataset=~/photos"],
        ["--dataset=~/photos/list.csv"],
    ):
        directory, record, _ = run(train_mnist, *argv, *QUIET)
        assert record["data"]["name"].startswith(str(tmp_path / "home/photos"))
    assert evaluated(directory, "--data-dir", "~/photos")[0]["images"] == 2


def test_a_run_names_the_same_folder_from_wherever_it_is_continued(monkeypatch, tmp_path):
    pictures("p", {"a": 10, "b": 10})
    directory, *_ = run(train_mnist, *ON_P, "--epochs", 2, "--stop-after", 1)
    Path("deep/er").mkdir(parents=True)
    monkeypatch.chdir("deep/er")
    argv = ["--resume", Path("../../runs", directory.name), "--quiet"]
    assert run(train_mnist, *argv)[1]["status"] == "finished"
    assert evaluated(argv[1])[0]["images"] == 2


# ------------------------ The same picture twice ------------------------
def test_the_same_picture_in_two_parts_is_a_warning_that_names_both_files(capsys):
    pictures("p", {f"{part}/{name}": 5 for part in ("train", "val", "test") for name in "ab"})
    run(train_mnist, "--dataset", "p", *TINY)
    assert "same picture" not in capsys.readouterr().out
    shutil.copy("p/train/a/3.png", "p/test/b/twin.png")
    shutil.copy("p/val/b/2.png", "p/test/b/copy.png")
    run(train_mnist, "--dataset", "p", *TINY)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "same picture" in line]
    assert "the same picture is in two parts, 2 times" in line
    assert "train/a/3.png (train)" in line and "test/b/twin.png (test)" in line
    assert "val/b/2.png (val)" in line and "test/b/copy.png (test)" in line


def test_the_same_picture_twice_in_one_part_is_no_warning(capsys):
    pictures("p", {f"{part}/{name}": 5 for part in ("train", "val", "test") for name in "ab"})
    for part in ("train", "val", "test"):
        shutil.copy(f"p/{part}/a/0.png", f"p/{part}/a/again.png")
        shutil.copy(f"p/{part}/a/0.png", f"p/{part}/b/again.png")
    run(train_mnist, "--dataset", "p", *TINY)
    assert "same picture" not in "".join(capsys.readouterr())


# ------------------------ Folders larger than the memory ------------------------
def left_of_pixels(root="runs"):
    return list(Path(root).rglob(".pixels-*"))


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_a_folder_larger_than_the_memory_is_decoded_into_a_file(script, monkeypatch, capsys):
    pictures("p", {"a": 20, "b": 20})
    argv = ["--dataset", "p", *TINY, "--schedule", "constant", "--epochs", 2, "--run-name"]
    whole, *_ = run(script, *argv, "whole")
    assert "do not fit the memory" not in capsys.readouterr().out
    little_memory(monkeypatch)
    seen = []
    with at_each_step(lambda: seen.append(left_of_pixels())):
        directory, *_ = run(script, *argv, "r")
    assert "images do not fit the memory: they lie in runs/r meanwhile" in capsys.readouterr().out
    check_same(whole, directory)
    assert seen and not left_of_pixels()

    # And so when it goes on, and when it is evaluated.
    run(script, "--resume", directory, "--epochs", 3, "--quiet")
    run(script, "--resume", whole, "--epochs", 3, "--quiet")
    check_same(whole, directory)
    assert evaluated(directory)[1] == evaluated(whole)[1]
    assert not left_of_pixels()


LITTLE_MEMORY = """
from pathlib import Path
read_text = Path.read_text
def read(path, *arguments, **options):
    if str(path) == "/proc/meminfo":
        return "MemAvailable: 1 kB"
    return read_text(path, *arguments, **options)
Path.read_text = read
"""
KILLED = """
from PIL import Image
opened, count = Image.open, itertools.count()
def open_or_die(*arguments, **options):
    if next(count) == 20:
        signal.raise_signal(9)
    return opened(*arguments, **options)
Image.open = open_or_die
"""


def test_a_run_that_is_killed_while_it_decodes_leaves_no_pixels_on_the_disk():
    pictures("p", {"a": 20, "b": 20})
    argv = ["train_mnist", *ON_P, "--runs-dir", "runs", "--run-name", "r"]
    before = LITTLE_MEMORY + KILLED
    assert Forked(*argv, before=before).finish()[0] == -signal.SIGKILL
    assert not left_of_pixels()
    assert Forked(*argv, before=LITTLE_MEMORY).finish() == (0, "")
    assert not left_of_pixels()
    whole, *_ = run(train_mnist, *ON_P)
    check_same(whole, Path("runs/r"))


# ------------------------ What has an effect ------------------------
def test_a_flag_without_an_effect_is_refused_with_one_line(capsys):
    pictures("p", {"a": 10, "b": 10})
    mnist = [
        (["--dataset", "p", "--model", "dense", "--c1", 4], "--c1 has no effect"),
        (["--dataset", "p", "--model", "cnn", "--c3", 4], "--c3 has no effect"),
        (["--dataset", "p", "--momentum", 0.9], "--momentum has no effect"),
        (["--dataset", "p", "--data-dir", "."], "--data-dir has no effect with --dataset"),
        (["--dataset", "synthetic", "--data-dir", "."], "--data-dir has no effect"),
        (["--dataset", "p", "--rotation", 5, "--no-augment"], "--rotation has no effect"),
        (["--dataset", "p", "--keep", "last", "--tolerance", 5], "--tolerance has no effect"),
        (["--dataset", "p", "--augment", "--alternate-flip"], "--alternate-flip has no effect"),
        (["--dataset", "p", "--val-size", 0, "--no-test"], "--val-size 0"),
    ]
    flags = (["--grey"], ["--no-grey"], ["--image-size", 8], ["--resize", "pad"])
    for name, flag in itertools.product(("mnist", "synthetic", "cifar10"), flags):
        word = flag[0].replace("--no-", "--")
        expected = f"{word} has no effect with --dataset {name}"
        mnist.append((["--dataset", name, *flag], expected))
    for argv, expected in mnist:
        assert expected in exits_with_one_line(capsys, *argv)
    argv = ["--dataset", "p", "--flip", 0, "--alternate-flip"]
    line = exits_with_one_line(capsys, *argv, main=train_cifar.main)
    assert "--alternate-flip has no effect without --flip" in line
    assert not Path("runs").exists()


def test_a_flag_with_an_effect_is_accepted(mnist_dir):
    pictures("p", {"a": 10, "b": 10})
    on_p = ["--dataset", "p", "--image-size", 8, "--epochs", 1, "--batch-size", 8, "--quiet"]
    named = ["--data-dir", mnist_dir, "--epochs", 1, "--quiet", "--model", "dense", "--l1", 4]
    for script, argv, expected in (
        (train_mnist, [*on_p, "--model", "cnn", "--c1", 2], {"c1": 2}),
        (train_cifar, [*on_p, "--sizes", 1, "--c1", 2, "--c2", 2, "--c3", 3], {"c3": 3}),
        (
            train_mnist,
            [*on_p, "--model", "dense", "--optimizer", "sgd", "--momentum", 0],
            {"momentum": 0},
        ),
        (train_mnist, [*on_p, "--model", "dense", "--no-grey", "--resize", "pad"], {"grey": False}),
        (train_cifar, [*on_p, "--model", "dense", "--flip", 1, "--alternate-flip"], {"flip": 1}),
        (train_mnist, [*on_p, "--model", "dense", "--val-size", 0], {"val_size": 0}),
        (train_mnist, named, {"dataset": "mnist"}),
    ):
        _, record, _ = run(script, *argv)
        assert record["args"].items() >= expected.items() and record["status"] == "finished"


def test_an_amount_of_augmentation_switches_it_on():
    pictures("p", {"a": 10, "b": 10})
    for flags, expected in (
        (["--rotation", 45], {"augment": True, "rotation": 45}),
        (["--shift", 1], {"augment": True, "shift": 1, "rotation": 10}),
        (["--rotation", 45, "--augment"], {"augment": True, "rotation": 45}),
        ([], {"augment": False, "rotation": 10}),
    ):
        args = run(train_mnist, *ON_P, *flags)[1]["args"]
        assert args.items() >= expected.items()


# ------------------------ A data directory that cannot be written ------------------------
def test_a_data_directory_that_cannot_be_written_is_enough_where_it_holds_everything(mnist_dir):
    places = [mnist_dir, *(path for path in mnist_dir.rglob("*") if path.is_dir())]
    argv = ["--data-dir", mnist_dir, "--model", "dense", "--l1", 4, "--epochs", 1, "--quiet"]
    for place in places:
        place.chmod(0o555)
    try:
        before = "as_an_ordinary_user()" if os.getuid() == 0 else ""
        check = "\nassert not os.access('data', os.W_OK)"
        done = Forked("train_mnist", *argv, "--runs-dir", "runs", before=before + check).finish()
        assert done == (0, ""), done
        assert [path.name for path in mnist_dir.iterdir()] == ["MNIST"]
    finally:
        for place in places:
            place.chmod(0o755)
    (directory,) = Path("runs").iterdir()
    assert records.read_record(directory)["status"] == "finished"


def test_a_folder_of_images_that_cannot_be_written_is_enough():
    pictures("p", {"a": 10, "b": 10})
    places = [Path("p"), Path("p/a"), Path("p/b")]
    for place in places:
        place.chmod(0o555)
    try:
        before = "as_an_ordinary_user()" if os.getuid() == 0 else ""
        assert Forked("train_mnist", *ON_P, "--runs-dir", "runs", before=before).finish() == (0, "")
    finally:
        for place in places:
            place.chmod(0o755)
    assert json.loads(next(Path("runs").glob("*/run.json")).read_text())["status"] == "finished"
