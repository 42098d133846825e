"""Images from files in searches, and in the corners where a first version failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import records
import sweep
import train_mnist

import pytest
from conftest import ROOT, check_same, run
from forked import Forked
from PIL import Image
from test_data import counting_images, pictures
from test_files import (
    LITTLE_MEMORY,
    ON_P,
    QUIET,
    TINY,
    evaluated,
    fails_with_one_line,
    files_of,
    left_of_pixels,
    little_memory,
    nothing_is_drawn,  # noqa: F401 (a fixture)
    picture,
    rows_of,
    sha256,
    write_csv,
)


# ------------------------ Searches ------------------------
def search(*flags, values="0.01,0.001", name="s", script="train_mnist.py", more=()):
    """A grid of two trials on the folder p."""
    argv = ["--method", "grid", "--param", f"lr={values}", "--runs-dir", "runs", "--name", name]
    argv += ["--threads", 1, "--script", script, "--quiet", *flags, "--", "--dataset", "p", *TINY]
    return sweep.main([str(word) for word in (*argv, *more)])


def test_a_search_has_one_data_csv_and_uses_no_files_that_come_later():
    pictures("p", {"a": 20, "b": 20})
    result = search()
    assert [line["status"] for line in result["trials"]] == ["finished"] * 2
    files = sorted(
        path.relative_to("runs/s").as_posix() for path in Path("runs/s").rglob("data.csv")
    )
    files = [file for file in files if not file.startswith("best/")]
    assert files == ["data.csv"]
    rows = rows_of("runs/s")
    assert len(rows) == 40 and len(files_of("runs/s", "test")) == 4
    for row in rows:
        assert row["sha256"] == sha256(Path("p", row["file"]))
    sums = []
    for line in result["trials"]:
        data = records.read_record(Path("runs/s", line["run"]))["data"]
        assert data["files"] == "../data.csv" and data["files_checksum"] == sha256(
            "runs/s/data.csv"
        )
        sums.append((data["checksum"], data["val_checksum"]))
    assert sums[0] == sums[1]

    # Of the winner's images, and of its test images alone.
    before = evaluated("runs/s/best")
    assert before[0]["images"] == 4
    pictures("p", {"a/new": 30, "b/new": 30})
    assert evaluated("runs/s/best") == before
    search(values="0.01,0.001", name="t")
    assert len(rows_of("runs/t")) == 100


def test_the_trials_of_a_search_that_goes_on_have_the_files_of_its_first():
    pictures("p", {"a": 20, "b": 20})
    # A script that fails in its second trial, until there is a file `mended`, and adds files in each.
    code = f"""
import pathlib
import train_mnist
from train_mnist import parse_arguments, synthetic
from test_data import pictures

def main(argv, on_epoch=None):
    if "--lr=0.001" in argv and not pathlib.Path("mended").exists():
        raise ValueError("not yet")
    number = len(list(pathlib.Path({str(Path("p").absolute())!r}, "a").iterdir()))
    pictures({str(Path("p").absolute())!r}, {{f"a/new{{number}}": 3, f"b/new{{number}}": 3}})
    return train_mnist.main(argv, on_epoch)
"""
    Path("growing.py").write_text(code)
    search(script="growing.py")
    Path("mended").touch()
    pictures("p", {"a/more": 5, "b/more": 5})
    result = sweep.main(["--resume", "runs/s", "--retry-failed", "--quiet"])
    assert [line["status"] for line in result["trials"]] == ["finished"] * 2
    assert len(rows_of("runs/s")) == 40 and len(list(Path("p").rglob("*.png"))) == 62
    data = [records.read_record(path)["data"] for path in sorted(Path("runs/s").glob("trial-*"))]
    assert len({each["checksum"] for each in data}) == 1 and len(data) == 2
    assert all(each["train"] + each["val"] == 36 for each in data)


def test_a_broken_image_is_told_before_the_first_trial_of_a_search():
    pictures("p", {"train/a": 10, "train/b": 10, "test/a": 3, "test/b": 3})
    Path("p/test/a/1.png").write_text("no image")
    with pytest.raises((records.RunError, records.UsageError), match=r"test/a/1\.png") as failure:
        search()
    assert "\n" not in str(failure.value) and not list(Path("runs").rglob("run.json"))
    picture("p/test/a/1.png", 1)
    assert search()["best"]


def test_a_search_larger_than_the_memory_decodes_its_images_once_and_leaves_none(monkeypatch):
    pictures("p", {"a": 20, "b": 20})
    opened, read_text = Image.open, Path.read_text
    monkeypatch.setattr(Image, "open", opened)  # what the script changes is put back
    monkeypatch.setattr(Path, "read_text", read_text)
    names = "\nfrom train_mnist import main, parse_arguments, synthetic\n"
    code = LITTLE_MEMORY + names + counting_images()
    Path("frugal.py").write_text(code)
    result = search(script="frugal.py")
    assert [line["status"] for line in result["trials"]] == ["finished"] * 2
    assert not left_of_pixels()
    # The test images once more, for the winner.
    assert Path("decoded").stat().st_size <= 40 + 4
    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(Path, "read_text", read_text)
    plain = search(name="plain")
    assert [line["val_loss"] for line in plain["trials"]] == [
        line["val_loss"] for line in result["trials"]
    ]


def test_a_quiet_search_says_nothing_of_the_images_that_it_looks_at(capsys):
    pictures("p", {"train/a": 10, "train/b": 10, "train/rare": 3, "test/a": 3, "test/b": 3})
    Path("p/test/a/notes.xyz").write_text("")
    search()
    assert capsys.readouterr().out == ""


def test_a_search_may_train_on_a_fold():
    pictures("p", {"train/a": 20, "train/b": 20, "test/a": 4, "test/b": 4})
    result = search(more=["--fold", "2/3"])
    assert [line["status"] for line in result["trials"]] == ["finished"] * 2
    assert all(row["file"].startswith("train/") for row in rows_of("runs/s"))


@pytest.mark.parametrize("damage", ["removed", "edited"])
def test_a_search_whose_data_csv_was_removed_or_edited_does_not_go_on_with_other_files(damage):
    pictures("p", {"a": 20, "b": 20})
    code = """
import pathlib
import train_mnist
from train_mnist import parse_arguments, synthetic

def main(argv, on_epoch=None):
    if "--lr=0.001" in argv and not pathlib.Path("mended").exists():
        raise ValueError("not yet")
    return train_mnist.main(argv, on_epoch)
"""
    Path("failing.py").write_text(code)
    search(script="failing.py")
    path = Path("runs/s/data.csv")
    text = path.read_text()
    path.unlink() if damage == "removed" else path.write_text(text.replace(",test,", ",train,"))
    Path("mended").touch()
    pictures("p", {"a/new": 10, "b/new": 10})
    try:
        result = sweep.main(["--resume", "runs/s", "--retry-failed", "--quiet"])
    except (records.RunError, records.UsageError):
        return
    assert result["trials"][1]["status"] == "failed", "trials of other images were compared"


# ------------------------ data.csv ------------------------
@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_a_run_with_limit_train_is_evaluated(split):
    pictures("p", {"a": 20, "b": 20})
    directory, record, _ = run(train_mnist, *ON_P, "--limit-train", 20)
    metrics, _ = evaluated(directory, "--split", split)
    assert metrics["images"] == record["data"][split]


def test_a_class_that_only_validates_is_still_one_of_the_classes():
    counts = {"a": 9, "b": 9, "rare": 1}
    pictures("p", counts)
    for part in (1, 2):
        argv = [*ON_P, "--fold", f"{part}/2", "--epochs", 2]
        whole, *_ = run(train_mnist, *argv)
        directory, record, _ = run(train_mnist, *argv, "--stop-after", 1)
        run(train_mnist, "--resume", directory, "--quiet")
        check_same(whole, directory)
        metrics, _ = evaluated(directory, "--split", "val")
        assert metrics["images"] == record["data"]["val"] and len(metrics["classes"]) == 3


def test_a_class_that_limit_train_leaves_out_is_still_one_of_the_classes():
    pictures("p", {"a": 30, "b": 2, "c": 30})
    argv = [*ON_P, "--epochs", 2, "--limit-train", 8]
    whole, *_ = run(train_mnist, *argv)
    directory, *_ = run(train_mnist, *argv, "--stop-after", 1)
    assert len(records.load_checkpoint(directory / "best.pt")["classes"]) == 3
    run(train_mnist, "--resume", directory, "--quiet")
    check_same(whole, directory)


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_what_evaluate_prints_for_programs_has_no_remarks_in_it(form, capsys):
    pictures("p", {f"{part}/{name}": 10 for part in ("train", "val") for name in "ab"})
    shutil.copy("p/train/a/0.png", "p/val/a/0.png")
    directory, *_ = run(train_mnist, "--dataset", "p", *QUIET)
    capsys.readouterr()
    evaluate.main([str(directory), "--split", "val", form])
    out, err = capsys.readouterr()
    assert "same picture" in err and out and "same picture" not in out


def test_names_with_spaces_at_their_ends_are_kept():
    pictures("p", {" a": 20, "b ": 20})
    directory, *_ = run(train_mnist, *ON_P, "--epochs", 2, "--stop-after", 1)
    classes = records.load_checkpoint(directory / "best.pt")["classes"]
    assert classes == [" a", "b "]
    assert run(train_mnist, "--resume", directory, "--quiet")[1]["status"] == "finished"
    assert evaluated(directory)[0]["images"] == 4


# ------------------------ Classes and layouts ------------------------
def test_classes_that_count_the_same_have_one_order_in_every_process():
    pictures("p", {f"{zeros}{i}": 2 for i in range(1, 6) for zeros in ("", "0", "00")})
    found = []
    for seed in ("1", "2"):
        argv = ["--runs-dir", "runs", "--run-name", f"r{seed}", *ON_P]
        command = [sys.executable, ROOT / "train_mnist.py", *map(str, argv)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        found.append(records.load_checkpoint(Path(f"runs/r{seed}/best.pt"))["classes"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "counts",
    [{"train/cat": 10, "train/dog": 10, "test": 10}, {"val/a": 9, "val/b": 9, "test/a": 5}],
)
def test_the_names_of_parts_do_not_become_the_classes(counts):
    pictures("p", counts)
    try:
        directory, *_ = run(train_mnist, *ON_P)
    except records.RunError as refused:
        assert "test" in str(refused) or "train" in str(refused)
    else:
        assert records.load_checkpoint(directory / "best.pt")["classes"] == ["cat", "dog"]


def test_an_empty_test_folder_beside_train_is_no_class():
    pictures("p", {"train/cat": 10, "train/dog": 10})
    Path("p/test").mkdir()
    directory, *_ = run(train_mnist, *ON_P)
    assert records.load_checkpoint(directory / "best.pt")["classes"] == ["cat", "dog"]


def test_a_folder_may_have_a_name_that_ends_as_a_csv_files():
    pictures("photos.csv", {"a": 20, "b": 20})
    directory, record, _ = run(train_mnist, "--dataset", "photos.csv", *QUIET)
    assert record["status"] == "finished"
    assert evaluated(directory)[0]["images"] == 4


def test_val_size_0_without_a_test_image_is_told_in_one_line():
    pictures("p", dict.fromkeys("abcdef", 2))
    fails_with_one_line(*ON_P, "--val-size", 0)


def test_one_file_by_two_spellings_of_its_path_is_there_twice():
    pictures("p", {"a": 10, "b": 10})
    lines = [[f"{name}/{i}.png", name, "train"] for name in "ab" for i in range(10)]
    write_csv("p/list.csv", [["file", "class", "part"], *lines, ["./a/3.png", "a", "test"]])
    line = fails_with_one_line("--dataset", "p/list.csv", *QUIET)
    assert "a/3.png" in line and "twice" in line


def test_a_csv_file_that_csv_cannot_read_is_told_in_one_line():
    pictures("p", {"a": 10, "b": 10})
    Path("p/list.csv").write_text('file,class\n"' + "x" * 200_000)
    assert "p/list.csv" in fails_with_one_line("--dataset", "p/list.csv", *QUIET)


def test_checksums_in_capitals_and_empty_rows_of_a_spreadsheet_are_read():
    pictures("p", {"a": 10, "b": 10})
    lines = [[f"{n}/{i}.png", n, sha256(f"p/{n}/{i}.png").upper()] for n in "ab" for i in range(10)]
    write_csv("p/list.csv", [["file", "class", "sha256"], *lines, ["", "", ""]], ";", "utf-8-sig")
    directory, *_ = run(train_mnist, "--dataset", "p/list.csv", *QUIET)
    assert len(rows_of(directory)) == 20


def test_a_picture_in_two_parts_is_warned_of_beside_one_that_is_left_out(capsys):
    pictures("p", {f"{part}/{name}": 10 for part in ("train", "val", "test") for name in "ab"})
    shutil.copy("p/train/a/0.png", "p/train/a/again.png")
    shutil.copy("p/train/a/0.png", "p/val/a/twin.png")
    for seed in range(12):
        run(train_mnist, "--dataset", "p", *TINY, "--limit-train", 10, "--seed", seed)
        directory = max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        trained = files_of(directory, "train") & {"train/a/0.png", "train/a/again.png"}
        assert ("same picture" in capsys.readouterr().out) == bool(trained), seed


def test_the_test_part_of_a_folder_is_nothing_to_a_fold(capsys):
    pictures("p", {"train/a": 10, "train/b": 10, "test/other": 5})
    directory, *_ = run(train_mnist, "--dataset", "p", *TINY, "--fold", "1/2")
    assert len(rows_of(directory)) == 20 and "test has" not in capsys.readouterr().out


# ------------------------ Folders larger than the memory ------------------------
def test_a_broken_image_leaves_no_pixels_on_the_disk(monkeypatch):
    pictures("p", {"a": 20, "b": 20})
    Path("p/a/3.png").write_text("no image")
    little_memory(monkeypatch)
    fails_with_one_line(*ON_P, "--run-name", "r")
    assert not left_of_pixels()


def test_ctrl_c_while_images_are_decoded_leaves_no_pixels_on_the_disk():
    pictures("p", {"a": 20, "b": 20})
    before = f"""{LITTLE_MEMORY}
from PIL import Image
opened, count = Image.open, itertools.count()
def open_or_stop(*arguments, **options):
    if next(count) == 20:
        os.kill(os.getpid(), 2)
    return opened(*arguments, **options)
Image.open = open_or_stop
"""
    argv = ["train_mnist", *ON_P, "--runs-dir", "runs", "--run-name", "r"]
    status, err = Forked(*argv, before=before).finish()
    assert status == 130 and err.count("\n") == 1
    assert not left_of_pixels()


def test_images_that_fit_no_disk_are_told_in_one_line(monkeypatch):
    pictures("p", {"a": 20, "b": 20})
    little_memory(monkeypatch)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises((records.RunError, OSError)):
        run(train_mnist, *ON_P, "--run-name", "r")
    assert not left_of_pixels()
