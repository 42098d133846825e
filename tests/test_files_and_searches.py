"""Images from files in searches, and in the corners where a first version failed."""

import itertools
import shutil
from pathlib import Path

import evaluate
import records
import sweep
import train_mnist

import pytest
from conftest import check_same, run
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
    nothing_is_drawn,  # noqa: F401 (a fixture)
    picture,
    rows_of,
    sha256,
    write_csv,
)

# ------------------------ Searches ------------------------
GRID = "--method grid --param lr=0.01,0.001"


def search(argv, name="s"):
    """A search on the folder p: its result."""
    argv = f"--script train_mnist.py --runs-dir runs --name {name} --threads 1 --quiet {argv}"
    return sweep.main([*argv.split(), "--", "--dataset", "p", *map(str, TINY)])


def test_a_search_has_one_data_csv_and_the_same_files_from_wherever_it_goes_on(
    tmp_path, monkeypatch
):
    pictures("p", {"a": 20, "b": 20})
    search("--method random --param lr=log:0.001..0.1 --count 1")
    rows = rows_of("runs/s")
    assert all(row["sha256"] == sha256(Path("p", row["file"])) for row in rows) and len(rows) == 40
    before = evaluated("runs/s/best")
    assert before[0]["images"] == 4
    # There are other images later, and elsewhere.
    pictures("p", {"a/new": 30, "b/new": 30})
    assert evaluated("runs/s/best") == before
    pictures("elsewhere/p", {"a": 30, "b": 30})
    monkeypatch.chdir("elsewhere")
    sweep.main(["--resume", "../runs/s", "--count", "2", "--quiet"])
    monkeypatch.chdir(tmp_path)
    # A folder that has moved is given anew, and other images are not taken for it.
    shutil.move("p", "moved")
    go_on = ["--resume", "runs/s", "--quiet", "--count"]
    sweep.main([*go_on, "3", "--", "--dataset", "moved"])
    listing = Path("runs/s/data.csv")
    assert [*Path("runs/s").rglob("data.csv")] == [listing]
    text = listing.read_text()
    listing.write_text(text.replace(",test,", ",train,"))
    with pytest.raises(records.RunError, match="not those that it began with"):
        sweep.main([*go_on, "4"])
    listing.unlink()
    with pytest.raises(records.RunError, match="not those that it began with"):
        sweep.main([*go_on, "4", "--", "--dataset", "elsewhere/p"])
    trials = [records.read_record(path)["data"] for path in Path("runs/s").glob("trial-*")]
    assert len(trials) == 3 and len({trial["checksum"] for trial in trials}) == 1
    assert trials[0]["files"] == "../data.csv" and trials[0]["train"] + trials[0]["val"] == 36


def test_a_search_tells_of_a_broken_image_before_its_first_trial(capsys):
    pictures("p", {"train/a": 10, "train/b": 10, "train/rare": 3, "test/a": 3, "test/b": 3})
    Path("p/test/a/notes.xyz").touch()
    Path("p/test/a/1.png").write_text("no image")
    with pytest.raises((records.RunError, records.UsageError), match=r"test/a/1\.png") as failure:
        search(f"{GRID} --no-quiet")
    assert "\n" not in str(failure.value) and not list(Path("runs").rglob("run.json"))
    assert "1 .xyz" in capsys.readouterr().out
    picture("p/test/a/1.png", 1)
    assert search(GRID)["best"] and capsys.readouterr().out == ""


def test_a_search_larger_than_the_memory_decodes_its_images_once_and_leaves_none(monkeypatch):
    pictures("p", {"a": 20, "b": 20})
    plain = search(GRID, "plain")
    monkeypatch.setattr(Image, "open", Image.open)  # what the script changes is put back
    monkeypatch.setattr(Path, "read_text", Path.read_text)
    names = "\nfrom train_mnist import main, parse_arguments, synthetic\n"
    Path("frugal.py").write_text(LITTLE_MEMORY + names + counting_images())
    result = search(f"{GRID} --script frugal.py --jobs 2")
    assert not left_of_pixels()
    # The test images once more, for the winner.
    assert Path("decoded").stat().st_size <= 40 + 4
    found = [
        {line["trial"]: line["val_loss"] for line in each["trials"]} for each in (plain, result)
    ]
    assert found[0] == found[1] and len(found[0]) == 2


# ------------------------ data.csv ------------------------
def test_a_run_with_limit_train_is_evaluated_on_each_part():
    pictures("p", {"a": 20, "b": 20})
    directory, record, _ = run(train_mnist, *ON_P, "--limit-train", 20)
    for split in ("test", "val", "train"):
        metrics, _ = evaluated(directory, "--split", split)
        assert metrics["images"] == record["data"][split]


@pytest.mark.parametrize(
    ("counts", "argv"),
    [
        ({"a": 9, "b": 9, "rare": 1}, ["--fold", "1/2"]),
        ({"a": 9, "b": 9, "rare": 1}, ["--fold", "2/2"]),
        ({"a": 30, "rare": 2, "c": 30}, ["--limit-train", 8]),
    ],
)
def test_a_class_that_is_not_trained_is_still_one_of_the_classes(counts, argv):
    pictures("p", counts)
    argv = [*ON_P, "--epochs", 2, *argv]
    whole, *_ = run(train_mnist, *argv)
    directory, record, _ = run(train_mnist, *argv, "--stop-after", 1)
    run(train_mnist, "--resume", directory, "--quiet")
    check_same(whole, directory)
    metrics, _ = evaluated(directory, "--split", "val")
    assert metrics["images"] == record["data"]["val"] and len(metrics["classes"]) == 3


def test_what_evaluate_prints_for_programs_has_no_remarks_in_it(capsys):
    pictures("p", {f"{part}/{name}": 10 for part in ("train", "val") for name in "ab"})
    shutil.copy("p/train/a/0.png", "p/val/a/0.png")
    directory, *_ = run(train_mnist, *ON_P)
    for form in ("--json", "--csv"):
        capsys.readouterr()
        evaluate.main([str(directory), "--split", "val", form])
        out, err = capsys.readouterr()
        assert "same picture" in err and out and "same picture" not in out


# ------------------------ Classes and layouts ------------------------
def classes(directory):
    return records.load_checkpoint(directory / "best.pt")["classes"]


def test_names_with_spaces_at_their_ends_are_kept():
    pictures("p", {" a": 20, "b ": 20})
    directory, *_ = run(train_mnist, *ON_P, "--epochs", 2, "--stop-after", 1)
    assert classes(directory) == [" a", "b "]
    assert run(train_mnist, "--resume", directory, "--quiet")[1]["status"] == "finished"
    assert evaluated(directory)[0]["images"] == 4


def test_classes_that_count_the_same_are_in_the_order_of_their_names():
    names = [f"{zeros}{i}" for i in range(1, 6) for zeros in ("00", "0", "")]
    pictures("p", dict.fromkeys(names, 2))
    assert classes(run(train_mnist, *ON_P)[0]) == names


@pytest.mark.parametrize("test", ["test", "test/.hidden"], ids=["flat", "empty"])
def test_the_names_of_parts_do_not_become_the_classes(test):
    pictures("p", {"train/cat": 10, "train/dog": 10, test: 10})
    try:
        assert classes(run(train_mnist, *ON_P)[0]) == ["cat", "dog"]
    except records.RunError as refused:
        assert test == "test" and "test" in str(refused)


def test_a_folder_may_have_a_name_that_ends_as_a_csv_files():
    pictures("photos.csv", {"a": 20, "b": 20})
    directory, *_ = run(train_mnist, "--dataset", "photos.csv", *QUIET)
    assert evaluated(directory)[0]["images"] == 4


def test_files_that_cannot_be_used_as_they_are_listed_are_told_in_one_line():
    pictures("p", {"a": 10, "b": 10, "c": 2})
    listed = ["--dataset", "p/list.csv", *QUIET]
    rows = [[f"{name}/{i}.png", name, "train"] for name in "ab" for i in range(10)]
    write_csv("p/list.csv", [["file", "class", "part"], *rows, ["./a/3.png", "a", "test"]])
    line = fails_with_one_line(*listed)
    assert "a/3.png" in line and "twice" in line
    Path("p/list.csv").write_text('file,class\n"' + "x" * 200_000)
    assert "p/list.csv" in fails_with_one_line(*listed)
    shutil.rmtree("p")
    pictures("p", dict.fromkeys("abcdef", 2))  # of so few none is taken for the test
    fails_with_one_line(*ON_P, "--val-size", 0)


def test_checksums_in_capitals_and_empty_rows_of_a_spreadsheet_are_read():
    pictures("p", {"a": 10, "b": 10})
    lines = [[f"{n}/{i}.png", n, sha256(f"p/{n}/{i}.png").upper()] for n in "ab" for i in range(10)]
    write_csv("p/list.csv", [["file", "class", "sha256"], *lines, ["", "", ""]], ";", "utf-8-sig")
    directory, *_ = run(train_mnist, "--dataset", "p/list.csv", *QUIET)
    assert len(rows_of(directory)) == 20


def test_a_picture_in_two_parts_is_warned_of_beside_one_that_is_left_out(capsys):
    pictures("p", {f"{part}/{name}": 10 for part in ("train", "val", "test") for name in "ab"})
    twins = {"train/a/0.png", "train/a/again.png"}
    for place in ("train/a/again.png", "val/a/twin.png"):
        shutil.copy("p/train/a/0.png", f"p/{place}")
    found = set()
    for seed in itertools.count():
        argv = ["--dataset", "p", *TINY, "--limit-train", 10, "--seed", seed]
        trained = bool(files_of(run(train_mnist, *argv)[0], "train") & twins)
        assert ("same picture" in capsys.readouterr().out) == trained, seed
        found.add(trained)
        if len(found) == 2:
            break


def test_the_test_part_of_a_folder_is_nothing_to_a_fold(capsys):
    pictures("p", {"train/a": 10, "train/b": 10, "test/other": 5})
    directory, *_ = run(train_mnist, "--dataset", "p", *TINY, "--fold", "1/2")
    assert len(rows_of(directory)) == 20 and "test has" not in capsys.readouterr().out
