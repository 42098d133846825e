"""Images from files: data.csv, folders and CSV files, parts, folds, classes, endings, effects."""

import csv
import hashlib
import importlib.util
import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import evaluate
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
from conftest import check_same, exits_with_one_line, fails_with_one_line, run
from forked import Forked
from PIL import Image, ImageOps
from test_data import load, pictures

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = "--dataset p --model dense --l1 4 --image-size 8 --epochs 1 --batch-size 8"
ON_P = f"{TINY} --quiet"
PARTS = ("train", "val", "test")


@pytest.fixture
def folder():
    """Two classes of 20 images, in the folder p."""
    pictures("p", {"a": 20, "b": 20})


@pytest.fixture
def divided():
    """Two classes of 10 images in each of the three parts of the folder p."""
    pictures("p", {f"{part}/{name}": 10 for part in PARTS for name in "ab"})


def words(*argv):
    """The words of a command line, which is given in any pieces."""
    return " ".join(map(str, argv)).split()


def train(*argv):
    """Train a tiny net, on the folder p unless another is given. Returns the run's directory."""
    directory, *_ = run(train_mnist, *words(ON_P, *argv))
    return directory


def resume(directory, *argv):
    run(train_mnist, *words("--resume", directory, "--quiet", *argv))


def picture(path, level):
    """A grey image of one level at `path`."""
    Image.new("L", (8, 8), level).save(path)


def rows_of(directory):
    """The rows of a run's data.csv, or of a search's."""
    with open(Path(directory, "data.csv"), newline="") as file:
        return list(csv.DictReader(file))


def parts_of(directory):
    """The part of each file in a data.csv."""
    return {row["file"]: row["part"] for row in rows_of(directory)}


def files_of(directory, wanted):
    """The files of one part in a data.csv."""
    return {file for file, part in parts_of(directory).items() if part == wanted}


def classes_of(directory):
    return records.load_checkpoint(directory / "best.pt")["classes"]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def evaluated(directory, *argv):
    """What evaluate.py measures: metrics.json, and the predictions as bytes."""
    evaluate.main(words(directory, "--quiet --out evaluated", *argv))
    out = Path("evaluated")
    return records.read_json(out / "metrics.json"), (out / "predictions.csv").read_bytes()


def fails_on_p(argv="", **options):
    """The line with which a run on the folder p ends before it has a directory."""
    line = fails_with_one_line(*words(ON_P, argv), **options)
    assert not Path("runs").exists()
    return line


LITTLE_MEMORY = """
from pathlib import Path
read_text = Path.read_text
def read(path, *arguments, **options):
    if str(path) == "/proc/meminfo":
        return "MemAvailable: 1 kB"
    return read_text(path, *arguments, **options)
Path.read_text = read
"""


# ------------------------ data.csv ------------------------
@pytest.mark.parametrize(
    ("flags", "train_images", "val_images", "unused"),
    [
        ("--no-test", 32, 4, 0),
        ("--val-size 0", 36, 0, 0),
        ("--limit-train 9", 9, 4, 23),
    ],
)
def test_data_csv_has_each_file_with_its_class_part_and_checksum(
    folder, flags, train_images, val_images, unused
):
    """data.csv lists every image of the folder, also those that a flag leaves out."""
    rows = rows_of(train(flags))
    for row in rows:
        assert row["class"] == row["file"][0]
        assert row["sha256"] == sha256(f"p/{row['file']}")
    counts = Counter(row["part"] for row in rows)
    assert counts == Counter(train=train_images, val=val_images, test=4, unused=unused)


KILLED_AT_FIRST_STEP = "register_optimizer_step_post_hook(lambda *_: signal.raise_signal(9))"


def test_a_run_keeps_to_the_files_that_it_has_written_down_before_its_first_step(folder):
    """What comes into the folder later changes neither a run that goes on nor its evaluation."""
    argv = words(ON_P, "--limit-train 20 --runs-dir runs --run-name")
    whole, *_ = run(train_mnist, *argv, "whole")
    killed = Forked("train_mnist", *argv, "killed", before=KILLED_AT_FIRST_STEP)
    assert killed.finish()[0] == -signal.SIGKILL
    before = evaluated(whole)
    pictures("p", {"a/new": 30, "b/new": 30})
    resume("runs/killed")
    check_same(whole, Path("runs/killed"))
    for part, count in zip(PARTS, (20, 4, 4), strict=True):
        metrics, _ = evaluated(whole, "--split", part)
        assert metrics["images"] == count

    # The test reads its own files alone.
    for path in Path("p").rglob("*.png"):
        if path.relative_to("p").as_posix() not in files_of(whole, "test"):
            path.unlink()
    assert evaluated(whole) == before


def test_the_test_images_follow_from_the_files_alone_and_a_new_one_changes_one_at_most():
    """The same images test at every seed, and a folder that grows keeps nearly all of them."""
    pictures("p", {"a": 24, "b": 3, "c": 2})
    runs = [train("--seed", seed) for seed in range(3)]
    test, *others = (files_of(directory, "test") for directory in runs)
    assert others == [test, test]
    assert sorted(file[0] for file in test) == ["a", "a", "b"]
    assert test != {"a/0.png", "a/1.png", "b/0.png"}, "the first ones are often of one moment"
    # Those that validate are drawn with the seed.
    assert len({frozenset(files_of(directory, "val")) for directory in runs}) == 3
    for name in ("a/0new", "a/5new", "b/0new", "c/0new", "c/1new"):
        picture(f"p/{name}.png", 7)
        before, test = test, files_of(train(), "test")
        assert len(test - before) <= 1
        assert len(before - test) <= 1


@pytest.mark.parametrize("gone", [False, True])
def test_files_that_have_changed_or_gone_are_named(folder, capsys, gone):
    """Neither a run that goes on nor an evaluation takes another image for one of the run's."""

    def damage(path):
        path.write_text("")
        if gone:
            path.unlink()

    directory = train("--epochs 2 --stop-after 1 --run-name r")
    reason = "No such file" if gone else "the file has changed"
    for number, part in enumerate(PARTS, 1):
        file = min(files_of(directory, part))
        damage(Path("p", file))
        line = fails_with_one_line("--resume", directory)
        assert f"p: {number} of " in line
        assert f"{file} ({reason}" in line
        line = fails_with_one_line(directory, "--split", part, main=evaluate.main)
        assert f"{file} ({reason}" in line

    # So is a data.csv.
    damage(directory / "data.csv")
    expected = f"runs/r/data.csv {'is missing' if gone else 'has changed'}"
    assert expected in exits_with_one_line(capsys, "--resume", directory)
    assert expected in fails_with_one_line(directory, main=evaluate.main)


def test_a_folder_that_has_moved_is_found_with_dataset_and_data_dir(folder, monkeypatch):
    """A run goes on, and is evaluated, with images that lie elsewhere now."""
    argv = "--epochs 3 --augment"
    whole = train(argv)
    directory = train(argv, "--stop-after 1")
    Path("p").rename("q")
    assert "are with --dataset" in fails_with_one_line("--resume", directory)
    before = records.read_record(directory)
    pictures("other", {"a": 20, "b": 20}, level=1)
    line = fails_with_one_line("--resume", directory, "--dataset", "other")
    assert "the file has changed" in line
    assert records.read_record(directory) == before

    # With the right ones it goes on, whatever was tried before.
    resume(directory, "--dataset q")
    check_same(whole, directory)

    # The run has its new place now, wherever it is seen from.
    monkeypatch.chdir(directory)
    before = evaluated(directory)
    monkeypatch.chdir("../..")
    Path("q").rename("p")
    assert "with --data-dir" in fails_with_one_line(directory, main=evaluate.main)
    assert evaluated(directory, "--data-dir p") == before


# ------------------------ CSV files ------------------------
def write_csv(path, lines, delimiter=",", encoding="utf-8"):
    text = "".join(delimiter.join(line) + "\r\n" for line in lines)
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))


def labelled(*more, of=20):
    """Lines of a CSV file for so many images of each class, with `more` empty columns."""
    empty = [""] * len(more)
    files = [[f"{name}/{i}.png", name, *empty] for name in "ab" for i in range(of)]
    return [["file", "class", *more], *files]


def test_a_csv_file_of_files_and_classes_is_cut_as_a_folder_is_and_read_once(folder):
    """A CSV file gives the same parts as the folder, and a data.csv gives them to other runs."""
    write_csv("p/list.CSV", labelled())
    argv = "--epochs 2 --dataset p/list.CSV"
    whole = train(argv)
    assert parts_of(whole) == parts_of(train())
    directory = train(argv, "--stop-after 1")
    write_csv("p/list.CSV", labelled(of=19))  # what stands in it now does not matter
    resume(directory)
    check_same(whole, directory)

    # The data.csv of a run is such a file.
    shutil.copy(whole / "data.csv", "p")
    pictures("p", {"a/new": 9, "c": 9})
    assert parts_of(train("--dataset p/data.csv --seed 1")) == parts_of(whole)
    before = evaluated(directory)
    Path("p").rename("q")
    for place in ("q", "q/list.CSV"):
        assert evaluated(directory, "--data-dir", place) == before


@pytest.mark.parametrize(
    ("classes", "delimiter", "encoding"),
    [
        (["a", '"ü b"'], ";", "utf-8-sig"),
        (["a", "b"], ", ", "utf-8"),
        ([" b", "a;b "], ",", "utf-8"),
    ],
)
def test_csv_files_are_read_as_spreadsheets_and_people_write_them(classes, delimiter, encoding):
    """Semicolons, a mark of the encoding, empty rows and several names of the parts are read."""
    pictures("p", {"x": 9})
    parts = ["Training", "TRAIN", "", "train", "valid", "Validation", "VAL", "testing", "Test"]
    lines = [["note", "sha256", "part", "class", "file"]]
    for i, part in enumerate(parts):
        path = Path(f"p/x/{i}.png").absolute()
        lines.append(["", sha256(path).upper(), part, classes[i % 2], str(path)])
    write_csv("lists/list.csv", [*lines, [""] * 5], delimiter, encoding)
    directory = train("--dataset lists/list.csv")
    assert classes_of(directory) == [name.strip('"') for name in classes]
    found = [part for _, part in sorted(parts_of(directory).items())]
    assert found == ["train"] * 4 + ["val"] * 3 + ["test"] * 2


WRONG_LINES = f"""
0 | name,class,part, | list.csv has no column file in its first line
0 | File;Class;; | no column class, file
2 | a/1.png,,, | line 3: expected a file and its class in columns
3 | a/2.png,a,exam, | line 4: expected .* train, val or test
4 | a/3.png,,train, | line 5: expected a file and its class
25 | ./a/2.png,b,test, | line 26: a/2.png is there twice
5 | a/none.png,a,train, | a/none.png .No such file or directory
5 | a/4.png,a,train,{"0" * 64} | a/4.png .the file has changed
9 | a,"{"x" * 200_000} | p/list.csv is no CSV file
"""


def test_what_is_wrong_in_a_csv_file_is_told_in_one_line(folder):
    """The line of the file is named, or the image that cannot be used."""
    for case in WRONG_LINES.strip().splitlines():
        index, line, expected = case.split(" | ")
        lines = labelled("part", "sha256")
        lines[int(index)] = line.split(",")
        write_csv("p/list.csv", lines)
        assert re.search(expected, fails_on_p("--dataset p/list.csv"))


# ------------------------ Folds ------------------------
def test_the_folds_follow_from_the_files_alone_and_are_apart_with_each_class_in_each():
    """Each image validates in one fold, whatever the seed and however the files are listed."""
    counts = {"a": 10, "b": 11, "c": 4}
    pictures("p", counts)
    files = [[f"{name}/{i}.png", name] for name in "cba" for i in range(counts[name])]
    write_csv("p/list.csv", [["file", "class"], *files])
    validated = []
    for fold in ("1/3", "2/3", "3/3"):
        directory = train("--fold", fold)
        other = train("--fold", fold, "--dataset p/list.csv --seed 7")
        assert parts_of(directory) == parts_of(other)
        assert {*parts_of(other).values()} == {"train", "val"}
        val = files_of(other, "val")
        found = Counter(file[0] for file in val)
        assert all(abs(found[name] - count / 3) < 1 for name, count in counts.items())
        validated += val
    assert sorted(validated) == sorted(file for file, _ in files) == sorted(parts_of(other))
    assert "has no test images" in fails_with_one_line(directory, main=evaluate.main)


def test_a_fold_does_not_read_the_test_images(capsys):
    """The folder test is nothing to a fold, whatever is in it."""
    pictures("p", {"train/a": 10, "train/b": 10, "test/other": 5})
    for path in Path("p/test/other").iterdir():
        path.write_text("this is not read")
    rows = rows_of(train("--fold 2/4 --no-quiet"))
    assert Counter(row["part"] for row in rows) == {"train": 15, "val": 5}
    assert "test has" not in capsys.readouterr().out


def test_the_folds_of_a_dataset_with_a_name_are_apart_and_together_all_images(few_images):
    """Each training image of a named dataset validates in one fold, whatever the seed."""
    images = set()
    for fold in ("1/3", "2/3", "3/3"):
        argv = ("--dataset", "synthetic", "--fold", fold, "--seed")
        first, second = (load(train_mnist, *argv, seed, part="both")[1] for seed in (42, 7))
        assert len(first) == 100
        assert first.checksum == second.checksum
        images |= {image.tobytes() for image in first.images.numpy()}
    assert len(images) == 300


@pytest.mark.parametrize(
    ("counts", "argv"),
    [
        ({"a": 9, "b": 9, "rare": 1}, "--fold 1/2"),
        ({"a": 9, "b": 9, "rare": 1}, "--fold 2/2"),
        ({"a": 30, "rare": 2, "c": 30}, "--limit-train 8"),
    ],
)
def test_a_class_that_is_not_trained_is_still_one_of_the_classes(counts, argv):
    """A run without images of a class goes on, and is evaluated on images of it."""
    pictures("p", counts)
    argv += " --epochs 2"
    whole = train(argv)
    directory = train(argv, "--stop-after 1")
    resume(directory)
    check_same(whole, directory)
    metrics, _ = evaluated(directory, "--split val")
    assert metrics["images"] == records.read_record(directory)["data"]["val"]
    assert len(metrics["classes"]) == 3


# ------------------------ Layouts ------------------------
def test_broken_images_in_any_part_end_the_run_before_its_first_step(divided):
    """All images are looked at first, those of a test that is not made, too; ten are named."""
    broken = [f"{part}/{name}/{i}.png" for part in sorted(PARTS) for name in "ab" for i in (2, 10)]
    for file in broken:
        Path("p", file).write_bytes(Path("p/train/a/0.png").read_bytes()[:-30])
    line = fails_on_p("--no-test")
    assert line.startswith("p: 12 of 66 files cannot be used: test/a/2.png (")
    assert re.findall(r"\w+/[ab]/\d+\.png", line) == broken[:10]
    assert line.endswith(", and 2 more; remove or replace them")


@pytest.mark.parametrize(
    ("folders", "counts"),
    [
        ("Training VALID testing", (8, 8, 8)),
        ("TRAIN Validation", (8, 8, 0)),
        ("train Test", (7, 1, 8)),
    ],
)
def test_the_folders_of_the_parts_have_several_spellings_and_may_be_missing(
    folders, counts, capsys
):
    """What lies beside them, or in no class, is left out, and counted."""
    names = folders.split()
    pictures("p", {f"{part}/{name}": 4 for part in (*names, "drafts") for name in "ab"})
    picture(f"p/{names[0]}/stray.png", 3)
    directory = train("--no-quiet")
    assert "images left out, as they are in no class: 9\n" in capsys.readouterr().out
    parts = parts_of(directory)
    assert Counter(parts.values()) == Counter(dict(zip(PARTS, counts, strict=True)))
    assert {file.split("/")[0] for file in parts} == {*names}
    assert bool(records.read_record(directory)["test"]) == bool(counts[-1])


def test_what_is_read_of_folders_links_and_what_programs_leave_in_them(capsys):
    """Subfolders and links are read, hidden files are not, and 10 comes after 2."""
    counts = {"00002": 2, "0002": 2, "002": 2, "02": 2, "2": 3, "10/x/y": 5, "red ü": 3}
    pictures("p", counts)
    pictures("far", {"away": 6})
    for link in ("p/10/linked", "p/c"):
        Path(link).symlink_to(Path("far/away").absolute())
    for link, place in (("p/10/above", "p"), ("far/away/back", "p/10")):
        Path(link).symlink_to(Path(place).absolute())
    strays = ["__MACOSX/2/0.png", ".hidden/0.png", "2/.x/0.png", "2/._0.png", "2/.DS_Store"]
    strays += ["2/@eaDir/0.jpg", "$RECYCLE.BIN/x/0.jpg", "lost+found/0.jpg"]
    for stray in strays:
        Path("p", stray).parent.mkdir(parents=True, exist_ok=True)
        Path("p", stray).touch()
    directory = train("--no-quiet")
    found = Counter(file.rpartition("/")[0] for file in parts_of(directory))
    assert found == {**counts, "10/linked": 6, "c": 6, "c/back/x/y": 5}
    assert classes_of(directory) == ["00002", "0002", "002", "02", "2", "10", "c", "red ü"]
    assert "skipped" not in capsys.readouterr().out


def test_the_names_of_parts_do_not_become_the_classes(capsys):
    """A folder test without class folders is left out, and counted; a tenth tests as without it."""
    pictures("p", {"train/cat": 10, "train/dog": 10, "test": 3})
    directory = train("--no-quiet")
    assert "images left out, as they are in no class: 3\n" in capsys.readouterr().out
    assert classes_of(directory) == ["cat", "dog"]
    assert Counter(parts_of(directory).values()) == {"train": 16, "val": 2, "test": 2}

    # Nor do those that are not known.
    Path("p/test").rename("p/dev")
    shutil.copytree("p/train", "p/dev", dirs_exist_ok=True)
    shutil.rmtree("runs")
    assert "p has the folders dev, train: call those of the parts" in fails_on_p()
    for before, after in (("dev", "test_set"), ("train", "training_set")):
        Path("p", before).rename(f"p/{after}")
        assert "call those of the parts train, val and test" in fails_on_p()
    for before, after in (("test_set", "crash test"), ("training_set", "train station")):
        Path("p", before).rename(f"p/{after}")
    assert classes_of(train()) == ["crash test", "train station"]


def test_parts_and_classes_that_do_not_fit_are_refused_and_named(divided, capsys):
    """What validates and tests is what was trained, or the line says what it is that does not."""
    for flag, value in (("--val-size", 0.2), ("--fold", "1/3")):
        line = fails_on_p(f"{flag} {value}", kind=records.UsageError)
        assert f"{flag} has no effect" in line
    assert "only 20" in fails_on_p("--limit-train 21")
    for part in ("val", "test"):
        Path("p", part, "a").rename(f"p/{part}/zebra")
        assert "train has no images of zebra" in fails_on_p()
        Path("p", part, "zebra").rename(f"p/{part}/a")
    Path("few.csv").write_text("file,class\na/1.png,a\n")
    Path("spaced.csv").write_text("file,class\np/val/a/0.png,a\np/val/a/1.png,a \n")
    assert "differ in spaces" in fails_on_p("--dataset spaced.csv")
    for name in ("p/test/a", "few.csv"):
        assert "at least two classes" in fails_on_p(f"--dataset {name}")
    pictures("p/few", dict.fromkeys("abcdef", 2))  # of so few none is taken for the test
    assert "too few images" in fails_on_p("--dataset p/few --val-size 0")

    # A class may be missing in the test.
    shutil.rmtree("p/test/a")
    directory = train("--no-quiet")
    assert "test has no images of a;" in capsys.readouterr().out
    metrics, _ = evaluated(directory)
    assert [each["support"] for each in metrics["classes"]] == [0, 10]


def test_files_of_each_ending_are_read_and_others_counted(capsys):
    """The formats that Pillow reads are read; what cannot be read is counted, with a hint."""
    endings = (".jfif", ".JPG", ".PnG", ".bmp", ".tiff", ".gif")
    for name in ("p/a", "p/b"):
        Path(name).mkdir(parents=True)
        for ending in endings:
            picture(f"{name}/photo{ending}", 40)
        Path(name, "photo.HEIC").touch()
        Path(name, "video.MPG").touch()
    Path("p/b/notes.xyz").touch()
    directory = train("--no-quiet --normalize dataset")
    assert len(rows_of(directory)) == 2 * len(endings)
    if not importlib.util.find_spec("pillow_heif"):
        skipped = "5 files skipped: 2 .heic (pip install pillow-heif), 2 .mpg, 1 .xyz\n"
        assert skipped in capsys.readouterr().out

    # Images that are all the same can be normalised, too.
    best = records.load_checkpoint(directory / "best.pt")
    assert best["mean"] == [pytest.approx(40 / 255, abs=0.004)]
    assert 0 < best["std"][0] < 0.01


def test_each_way_to_the_square_is_pillows_own_and_predict_goes_it_too():
    """--resize stretches, pads or crops, and what is predicted is made square in the same way."""
    photo = Image.new("RGB", (48, 16))
    photo.paste((250, 40, 90), (0, 2, 12, 16))
    pictures("p", {"a": 5, "b": 5})
    for path in Path("p").glob("*/*"):
        photo.save(path)
    square = ((8, 8), Image.Resampling.BILINEAR)
    argv = words(ON_P, "--resize")
    for way, expected in (
        ("stretch", photo.resize(*square)),
        ("pad", ImageOps.pad(photo, *square)),
        ("crop", ImageOps.fit(photo, *square)),
    ):
        image = load(train_cifar, *argv, way).images[0]
        assert np.array_equal(image.permute(1, 2, 0), expected)

    # Of the last way there is a run.
    directory, *_ = run(train_cifar, *argv, way)
    expected.save("square.png")
    answer = evaluate.main(words(directory, "--top 1 --predict square.png", path))
    one, other = answer["predictions"]
    assert one["probability"] == other["probability"]


def test_a_run_that_may_validate_with_the_test_is_evaluated_on_its_own_parts(divided):
    """The tutorials' recipe takes the test set to validate, but not where there are others."""
    flags = f"{ON_P} --recipe tutorial --model confignet --c1 4 --c2 4 --image-size 16"
    directory, *_ = run(train_cifar, *words(flags))
    for part in PARTS:
        metrics, _ = evaluated(directory, "--split", part)
        assert metrics["images"] == 20


def test_a_folder_may_be_named_as_a_csv_file_and_be_below_the_home_directory(
    folder, monkeypatch, tmp_path
):
    """A tilde is the home directory, also where the shell leaves it as it is."""
    shutil.copytree("p", "photos.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = train("--dataset=~/photos.csv --runs-dir=~/x --run-name r --epochs 1")
    assert directory == tmp_path / "x/r"
    resume("~/x/r", "--no-quiet")
    metrics, _ = evaluated(directory, "--data-dir ~/photos.csv")
    assert metrics["images"] == 4


# ------------------------ Twins, memory, rights ------------------------
def test_the_same_picture_in_two_parts_is_a_warning_that_names_both_files(divided, capsys):
    """Twins in one part, or of an image that is left out, are not worth a word."""

    def told(argv=""):
        directory = train("--no-quiet", argv)
        return directory, re.findall("the same picture is in .*", capsys.readouterr().out)

    shutil.copy("p/train/a/0.png", "p/train/b/again.png")
    pictures("p", {"train/rare": 1, "val/rare": 1}, level=99)
    _, lines = told("--limit-train 8")  # so few that the rare class is not trained
    assert lines == []
    shutil.copy("p/train/a/3.png", "p/test/b/twin.png")
    shutil.copy("p/val/b/2.png", "p/test/b/copy.png")
    directory, (line,) = told()
    assert "two parts, 3 times" in line
    assert "train/rare/0.png (train) and val/rare/0.png (val)" in line
    assert "train/a/3.png (train) and test/b/twin.png (test)" in line
    assert "val/b/2.png (val) and test/b/copy.png (test)" in line

    # An evaluation says so where no program reads it.
    evaluate.main(words(directory, "--split val --json"))
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert "same picture" in err


def left_of_pixels():
    return list(Path("runs").rglob(".pixels-*"))


KILLED_AT_AN_IMAGE = """
from PIL import Image
opened, count = Image.open, itertools.count()
def open_or_die(*arguments, **options):
    if next(count) == 20:
        signal.raise_signal(9)
    return opened(*arguments, **options)
Image.open = open_or_die
"""


def test_a_folder_larger_than_the_memory_is_decoded_into_a_file_that_a_kill_does_not_leave(
    folder, monkeypatch, capsys
):
    """The run is the same to the bit, and the file is gone when the process is."""
    argv = "--no-quiet --epochs 2 --run-name"
    whole = train(argv, "whole")
    assert "fit the memory" not in capsys.readouterr().out
    before = LITTLE_MEMORY + KILLED_AT_AN_IMAGE
    killed = Forked("train_mnist", *words(ON_P, "--runs-dir runs", argv, "r"), before=before)
    assert killed.finish()[0] == -signal.SIGKILL
    assert not left_of_pixels()

    # The same in this process: the machine says that it has a kB left.
    monkeypatch.setattr(Path, "read_text", Path.read_text)
    exec(LITTLE_MEMORY, {})
    directory = train(argv, "r --stop-after 1")
    assert "do not fit the memory: they lie in runs/r" in capsys.readouterr().out
    resume(directory)
    check_same(whole, directory)
    assert evaluated(directory)[1] == evaluated(whole)[1]
    assert not left_of_pixels()


def test_directories_of_data_that_cannot_be_written_are_enough(folder, mnist_dir):
    """Images are read from where nothing may be written, and nothing is."""
    places = [mnist_dir, Path("p"), *mnist_dir.rglob("*"), *Path("p").rglob("*")]
    for place in places:
        place.chmod(0o555)
    before = "os.getuid() or as_an_ordinary_user()\nassert not os.access('p', os.W_OK)"
    for flags in ("--dataset p", f"--data-dir {mnist_dir}"):
        argv = words(flags, "--model dense --epochs 1 --runs-dir runs")
        assert Forked("train_mnist", *argv, before=before).finish() == (0, "")
    for place in places:
        place.chmod(0o755)
    assert [path.name for path in mnist_dir.iterdir()] == ["MNIST"]


def test_a_photo_of_a_phone_is_read_however_large_it_is_and_whatever_its_exif_says():
    """Only the turn is taken from the EXIF data; what else is in it may be malformed."""
    for name, level in (("a", 20), ("b", 120)):
        Path("p", name).mkdir(parents=True)
        Image.new("L", (16320, 12240), level).save(f"p/{name}/0.jpg")
        exif = Image.Exif()
        exif[0x0112] = 6  # it was turned by a quarter
        exif[0x011A] = 72.0  # its resolution, which becomes a text
        Image.linear_gradient("L").rotate(90).save(f"p/{name}/1.jpg", exif=exif)
        content = Path(f"p/{name}/1.jpg").read_bytes()
        malformed = content.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
        assert malformed != content
        Path(f"p/{name}/1.jpg").write_bytes(malformed)
    images = load(train_mnist, *words(ON_P)).images.float()
    assert images[::2].mean((1, 2, 3)).tolist() == [20, 120]
    rows = images[1, 0].mean(1)
    assert rows[-1] - rows[0] > 200
