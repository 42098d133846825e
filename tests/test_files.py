"""Images from files: data.csv, folders and CSV files, parts, folds, classes, endings, effects."""

import contextlib
import csv
import hashlib
import importlib.util
import os
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
import undrawn
from conftest import check_same, run
from forked import Forked
from PIL import Image, ImageOps, features
from test_data import load, pictures
from torch.optim.optimizer import register_optimizer_step_pre_hook

TINY = ["--model", "dense", "--l1", 4, "--image-size", 8, "--epochs", 1, "--batch-size", 8]
QUIET = [*TINY, "--quiet"]
ON_P = ["--dataset", "p", *QUIET]
PARTS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    """The pictures are another file's tests, and take seconds."""
    undrawn.nothing_is_drawn(monkeypatch.setattr)


@pytest.fixture
def folder():
    """Two classes of 20 images, in the folder p."""
    pictures("p", {"a": 20, "b": 20})


@pytest.fixture
def divided():
    """Two classes of 10 images in each of the three parts of the folder p."""
    pictures("p", {f"{part}/{name}": 10 for part in PARTS for name in "ab"})


def train(*argv):
    return run(train_mnist, *ON_P, *argv)


def resume(directory, *argv):
    return run(train_mnist, "--resume", directory, "--quiet", *argv)


def picture(path, level):
    """A grey image of one level at `path`."""
    Image.new("L", (8, 8), level).save(path)


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


def classes_of(directory):
    return records.load_checkpoint(directory / "best.pt")["classes"]


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


def fails_on_p(*argv, kind=records.RunError):
    """The line with which a run on the folder p ends before it has a directory."""
    line = fails_with_one_line(*ON_P, *argv, kind=kind)
    assert not Path("runs").exists()
    return line


@contextlib.contextmanager
def at_each_step(call):
    """Have `call` called before each step of an optimiser."""
    hook = register_optimizer_step_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


LITTLE_MEMORY = """
from pathlib import Path
read_text = Path.read_text
def read(path, *arguments, **options):
    if str(path) == "/proc/meminfo":
        return "MemAvailable: 1 kB"
    return read_text(path, *arguments, **options)
Path.read_text = read
"""


def little_memory(monkeypatch):
    """Have the machine say that it has a kB of memory left."""
    monkeypatch.setattr(Path, "read_text", Path.read_text)
    exec(LITTLE_MEMORY, {})


# ------------------------ data.csv ------------------------
def test_data_csv_has_each_file_with_its_class_part_and_checksum(folder):
    for flags, val, unused in (
        (["--no-test"], 4, 0),
        (["--val-size", 0], 0, 0),
        (["--limit-train", 9], 4, 23),
    ):
        directory, record, _ = train(*flags)
        rows = rows_of(directory)
        assert all(row["sha256"] == sha256(f"p/{row['file']}") for row in rows)
        assert all(row["class"] == row["file"][0] for row in rows)
        parts = Counter(parts_of(directory).values())
        assert parts == Counter(train=36 - val - unused, val=val, test=4, unused=unused)
        assert record["data"]["files_checksum"] == sha256(directory / "data.csv")
        assert (record["test"] is None) == ("--no-test" in flags)


def test_a_run_keeps_to_the_files_that_it_has_written_down_before_its_first_step(folder):
    def stop():
        seen.append(sha256("runs/r/data.csv"))
        raise KeyboardInterrupt("SIGINT")

    seen = []
    argv = ["--limit-train", 20]
    whole, *_ = train(*argv)
    with at_each_step(stop):
        directory, record, rows = train(*argv, "--run-name", "r")
    assert record["status"] == "interrupted"
    assert rows == []
    assert seen == [record["data"]["files_checksum"]]
    before = evaluated(whole)
    pictures("p", {"a/new": 30, "b/new": 30})
    resume(directory)
    check_same(whole, directory)

    # The test reads its own files alone.
    for path in Path("p").rglob("*.png"):
        if path.relative_to("p").as_posix() not in files_of(whole, "test"):
            path.unlink()
    assert evaluated(whole) == before
    assert before[0]["images"] == 4


def test_the_disk_may_be_full_when_data_csv_is_written(folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        assert "No space left" in fails_with_one_line(
            *ON_P, "--runs-dir", "runs", "--run-name", "r"
        )
    train("--run-name", "r")


def test_the_test_images_follow_from_the_files_alone_and_a_new_one_changes_one_at_most():
    pictures("p", {"a": 24, "b": 3, "c": 2})
    runs = [train("--seed", seed)[0] for seed in range(3)]
    test, *others = (files_of(directory, "test") for directory in runs)
    assert others == [test] * 2
    assert sorted(file[0] for file in test) == ["a", "a", "b"]
    assert len({frozenset(files_of(directory, "val")) for directory in runs}) == 3
    for name in ("a/0new", "a/5new", "b/0new", "c/0new", "c/1new"):
        picture(f"p/{name}.png", 7)
        before = test
        test = files_of(train()[0], "test")
        assert len(test - before) <= 1
        assert len(before - test) <= 1


def test_files_that_have_changed_or_gone_are_named(folder, capsys, monkeypatch):
    directory, *_ = train("--epochs", 2, "--stop-after", 1, "--run-name", "r")
    for part in PARTS:
        path = Path("p", min(files_of(directory, part)))
        content = path.read_bytes()
        for damage in ("the file has changed", "No such file"):
            path.write_bytes(b"")
            if damage == "No such file":
                path.unlink()
            for line in (
                fails_with_one_line("--resume", directory),
                fails_with_one_line(directory, "--split", part, main=evaluate.main),
            ):
                assert re.search(f"p: 1 of .* {path.relative_to('p')} .{damage}", line)
        path.write_bytes(content)

    # So is a data.csv.
    path = directory / "data.csv"
    content = path.read_text()
    for damage in ("has changed", "is missing"):
        path.write_text(content.replace("train", "val", 1))
        if damage == "is missing":
            path.unlink()
        line = exits_with_one_line(capsys, "--resume", directory)
        assert f"runs/r/data.csv {damage}" in line
        assert f"data.csv {damage}" in fails_with_one_line(directory, main=evaluate.main)
    path.write_text(content)
    monkeypatch.chdir("p")  # a run names the same folder from wherever it is continued
    assert resume(directory)[1]["status"] == "finished"


def test_a_folder_that_has_moved_is_found_with_dataset_and_data_dir(folder, capsys, monkeypatch):
    argv = ["--epochs", 3, "--augment"]
    whole, *_ = train(*argv)
    directory, *_ = train(*argv, "--stop-after", 1)
    Path("p").rename("q")
    assert "are with --dataset" in fails_with_one_line("--resume", directory)
    resume(directory, "--dataset", "q")
    check_same(whole, directory)
    monkeypatch.chdir(directory)  # the run has its new place now, wherever it is seen from
    before = evaluated(directory)
    monkeypatch.chdir("../..")
    Path("q").rename("p")
    assert "with --data-dir" in fails_with_one_line(directory, main=evaluate.main)
    assert evaluated(directory, "--data-dir", "p") == before
    for name, text in (("synthetic", "cannot change"), ("nowhere", "is no folder")):
        assert text in exits_with_one_line(capsys, "--resume", directory, "--dataset", name)


# ------------------------ CSV files ------------------------
def write_csv(path, lines, delimiter=",", encoding="utf-8"):
    text = "".join(delimiter.join(line) + "\r\n" for line in lines)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))


def labelled(**more):
    """Lines of a CSV file for the files of `folder`."""
    files = [(f"{name}/{i}.png", name) for name in "ab" for i in range(20)]
    return [["file", "class", *more], *([*each, *more.values()] for each in files)]


def test_a_csv_file_of_files_and_classes_is_cut_as_a_folder_is_and_read_once(folder):
    write_csv("p/list.CSV", labelled())
    argv = ["--epochs", 2, "--dataset", "p/list.CSV"]
    whole, *_ = train(*argv)
    assert parts_of(whole) == parts_of(train()[0])
    directory, *_ = train(*argv, "--stop-after", 1)
    write_csv("p/list.CSV", labelled()[:-1])  # what stands in it now does not matter
    resume(directory)
    check_same(whole, directory)

    # A data.csv gives other runs the same parts.
    shutil.copy(whole / "data.csv", "p")
    pictures("p", {"a/new": 9, "c": 9})
    assert parts_of(train("--dataset", "p/data.csv", "--seed", 1)[0]) == parts_of(whole)
    before = evaluated(directory)
    Path("p").rename("q")
    for place in ("q", "q/list.CSV"):
        assert evaluated(directory, "--data-dir", place) == before


def test_csv_files_are_read_as_spreadsheets_and_people_write_them():
    pictures("p", {"x": 9})
    parts = ["Training", "TRAIN", "", "train", "valid", "Validation", "VAL", "testing", "Test"]
    expected = ["train"] * 4 + ["val"] * 3 + ["test"] * 2
    for classes, delimiter, encoding in (
        (["a", '"ü b"'], ";", "utf-8-sig"),
        (["a", "b"], ", ", "utf-8"),
        ([" b", "a;b"], ",", "utf-8"),
    ):
        lines = [["note", "sha256", "part", "class", "file"]]
        for i, part in enumerate(parts):
            path = Path("p/x", f"{i}.png").absolute()
            lines.append(["", sha256(path).upper(), part, classes[i % 2], str(path)])
        write_csv("lists/list.csv", lines, delimiter, encoding)
        directory, *_ = train("--dataset", "lists/list.csv")
        assert classes_of(directory) == [name.strip('"') for name in classes]
        assert [part for _, part in sorted(parts_of(directory).items())] == expected


def test_what_is_wrong_in_a_csv_file_is_told_in_one_line(folder):
    for place, line, expected in (
        (0, ["name", "class", "part", ""], "line 2: expected a file and its class in columns"),
        (3, ["a/2.png", "a", "exam", ""], "line 4: expected .* train, val or test"),
        (4, ["a/3.png", "", "train", ""], "line 5: expected a file and its class"),
        (25, ["./a/2.png", "b", "test", ""], "line 26: a/2.png is there twice"),
        (5, ["a/none.png", "a", "train", ""], "a/none.png .No such file or directory"),
        (5, ["a/4.png", "a", "train", "0" * 64], "a/4.png .the file has changed"),
    ):
        lines = labelled(part="train", sha256="")
        lines[place] = line
        write_csv("p/list.csv", lines)
        assert re.search(expected, fails_on_p("--dataset", "p/list.csv"))


# ------------------------ Folds ------------------------
def test_the_folds_follow_from_the_files_alone_and_are_apart_with_each_class_in_each():
    counts = {"a": 10, "b": 11, "c": 4}
    folds = []
    pictures("p", counts)
    files = [[f"{name}/{i}.png", name] for name in "cba" for i in range(counts[name])]
    write_csv("p/list.csv", [["file", "class"], *files])
    for fold in ("1/3", "2/3", "3/3"):
        directory, record, _ = train("--fold", fold)
        other, *_ = train("--fold", fold, "--dataset", "p/list.csv", "--seed", 7)
        assert parts_of(directory) == parts_of(other)
        assert len(parts_of(other)) == 25
        assert record["test"] is None
        assert not files_of(directory, "test")
        folds += files_of(directory, "val")
        found = Counter(file[0] for file in files_of(directory, "val"))
        assert all(abs(found[name] - counts[name] / 3) < 1 for name in counts)
    assert sorted(folds) == sorted(file for file, _ in files)
    assert "has no test images" in fails_with_one_line(directory, main=evaluate.main)


def test_a_fold_does_not_read_the_test_images(divided):
    for path in Path("p/test").rglob("*.png"):
        path.write_text("this is not read")
    shutil.rmtree("p/val")
    directory, record, _ = train("--fold", "2/4")
    assert record["test"] is None
    assert record["data"]["val"] == 5
    assert len(parts_of(directory)) == 20


def test_the_folds_of_a_dataset_with_a_name_are_apart_and_together_all_images(few_images):
    argv = [train_mnist, "--dataset", "synthetic", "--fold"]
    images = set()
    for fold in ("1/3", "2/3", "3/3"):
        _, val = load(*argv, fold, part="both")
        _, same = load(*argv, fold, "--seed", 7, part="both")
        assert len(val) == 100
        assert val.checksum == same.checksum
        images |= {image.tobytes() for image in val.images.numpy()}
    assert len(images) == 300


# ------------------------ Layouts ------------------------
def test_broken_images_in_any_part_end_the_run_before_its_first_step(divided):
    broken = [f"{part}/{name}/{i}.png" for part in sorted(PARTS) for name in "ab" for i in (2, 10)]
    for file in broken:
        Path("p", file).write_bytes(Path("p/train/a/0.png").read_bytes()[:-30])
    line = fails_on_p("--no-test")
    assert line.startswith("p: 12 of 66 files cannot be used: test/a/2.png (")
    assert re.findall(r"\w+/[ab]/\d+\.png", line) == broken[:10]
    assert line.endswith(", and 2 more; remove or replace them")


def test_the_folders_of_the_parts_have_several_spellings_and_may_be_missing():
    for names, counts in (
        (("Training", "VALID", "testing"), (8, 8, 8)),
        (("TRAIN", "Validation"), (8, 8, None)),
        (("train", "Test"), (7, 1, 8)),
    ):
        pictures("p", {f"{part}/{name}": 4 for part in (*names, "drafts") for name in "ab"})
        picture(f"p/{names[0]}/stray.png", 3)
        directory, record, _ = train()
        assert tuple(record["data"][part] for part in PARTS) == counts
        assert {file.split("/")[0] for file in parts_of(directory)} == {*names}
        assert (record["test"] is None) == (counts[2] is None)
        shutil.rmtree("p")


def test_what_is_read_of_folders_links_and_what_programs_leave_in_them(capsys):
    counts = {"2": 3, "10/x/y": 5, "red ü": 3}
    pictures("p", counts)
    pictures("far", {"away": 6})
    for link in ("p/10/linked", "p/c"):
        Path(link).symlink_to(Path("far/away").absolute())
    for stray in ("__MACOSX/2/0.png", ".hidden/0.png", "2/.x/0.png", "2/._0.png", "2/.DS_Store"):
        Path("p", stray).parent.mkdir(parents=True, exist_ok=True)
        Path("p", stray).touch()
    directory, *_ = run(train_mnist, "--dataset", "p", *TINY)
    found = Counter(file.rpartition("/")[0] for file in parts_of(directory))
    assert found == {**counts, "10/linked": 6, "c": 6}
    assert classes_of(directory) == ["2", "10", "c", "red ü"]
    assert "skipped" not in capsys.readouterr().out


def test_parts_and_classes_that_do_not_fit_are_refused_and_named(divided, capsys):
    for flag, value in (("--val-size", 0.2), ("--fold", "1/3")):
        line = fails_on_p(flag, value, kind=records.UsageError)
        assert f"{flag} has no effect" in line
    assert "only 20" in fails_on_p("--limit-train", 21)
    for part in ("val", "test"):
        Path("p", part, "a").rename(f"p/{part}/zebra")
        assert f"{part} has classes that train has not: zebra" in fails_on_p()
        Path("p", part, "zebra").rename(f"p/{part}/a")
    Path("few.csv").write_text("file,class\na/1.png,a\n")
    for name in ("p/test/a", "few.csv"):
        assert "at least two classes" in fails_on_p("--dataset", name)
    shutil.copytree("p/val", "p/Valid")
    assert "two folders for one part" in fails_on_p()
    shutil.rmtree("p/Valid")
    shutil.rmtree("p/test/a")
    directory, *_ = run(train_mnist, "--dataset", "p", *TINY)
    assert "test has no images of a;" in capsys.readouterr().out
    assert [each["support"] for each in evaluated(directory)[0]["classes"]] == [0, 10]


def test_files_of_each_ending_are_read_and_others_counted(capsys):
    first, later = (Image.new("L", (16, 16), level) for level in (40, 120))
    codecs = {".jp2": "jpg_2000", ".avif": "avif"}
    endings = [".jfif", ".JPG", ".PnG", ".bmp", ".tiff", ".gif", *codecs]
    endings = [ending for ending in endings if features.check(codecs.get(ending, "jpg"))]
    for name in ("p/a", "p/b"):
        Path(name).mkdir(parents=True)
        for ending in endings:
            more = {"save_all": True, "append_images": [later]} if ending == ".gif" else {}
            first.save(f"{name}/photo{ending}", **more)
        Path(name, "photo.HEIC").touch()
    Path("p/b/notes.xyz").touch()
    directory, *_ = run(train_mnist, "--dataset", "p", *TINY, "--normalize", "dataset")
    assert len(rows_of(directory)) == 2 * len(endings)
    if not importlib.util.find_spec("pillow_heif"):
        skipped = "3 files skipped: 2 .heic (pip install pillow-heif), 1 .xyz\n"
        assert skipped in capsys.readouterr().out
    best = records.load_checkpoint(directory / "best.pt")
    assert best["mean"] == [pytest.approx(40 / 255, abs=0.004)]
    assert 0 < best["std"][0] < 0.01


def test_each_way_to_the_square_is_pillows_own_and_predict_goes_it_too():
    photo = Image.new("RGB", (48, 16))
    square = ((8, 8), Image.Resampling.BILINEAR)
    photo.paste((250, 40, 90), (0, 2, 12, 16))
    pictures("p", {"a": 5, "b": 5})
    for path in Path("p").glob("*/*"):
        photo.save(path)
    for way, expected in (
        ("stretch", photo.resize(*square)),
        ("pad", ImageOps.pad(photo, *square)),
        ("crop", ImageOps.fit(photo, *square)),
    ):
        image = load(train_cifar, *ON_P, "--resize", way).images[0]
        assert np.array_equal(image.permute(1, 2, 0), expected)
    directory, *_ = run(train_cifar, *ON_P, "--resize", way)
    expected.save("square.png")
    answer = evaluate.main([str(directory), "--predict", str(path), "square.png", "--top", "1"])
    one, other = answer["predictions"]
    assert one["probability"] == other["probability"]


# ------------------------ Flags ------------------------
def test_a_flag_that_cannot_be_met_or_has_no_effect_is_refused_in_one_line(folder, capsys):
    directory, *_ = train("--resize", "crop", "--epochs", 2, "--stop-after", 1)
    Path("file.txt").touch()
    for argv, expected in {
        "--dataset p --model dense --c1 4": "--c1 has no effect",
        "--dataset p --momentum 0.9": "--momentum has no effect",
        "--dataset p --data-dir .": "--data-dir has no effect with --dataset",
        "--dataset synthetic --data-dir .": "--data-dir has no effect",
        "--dataset p --rotation 5 --no-augment": "--rotation has no effect",
        "--dataset p --keep last --tolerance 5": "--tolerance has no effect",
        "--dataset p --augment --flip 0 --alternate-flip": "--alternate-flip has no effect",
        "--dataset mnist --grey": "--grey has no effect with --dataset mnist",
        "--dataset synthetic --image-size 8": "--image-size has no effect with --dataset",
        "--resize pad": "--resize has no effect with --dataset mnist",
        "--dataset p --resize fit": "--resize: expected stretch",
        f"--resume {directory} --resize pad": "--resize cannot change",
        "--dataset p --fold 1/3 --val-size 0.2": "has no effect beside --fold",
        "--dataset p --fold 1/3 --test": "has no effect beside --fold",
        **{
            f"--fold={text}": "--fold: expected K/N" for text in ("0/3", "4/3", "1/1", "x", "1/3/3")
        },
        **{f"--dataset {name}": f"{name} is no folder" for name in ("nowhere.csv", "file.txt")},
        "--resume=": "--resume: expected a path",
        "--data-dir=": "--data-dir: expected a path",
        "--dataset=": "--dataset: expected a path",
    }.items():
        assert expected in exits_with_one_line(capsys, *argv.split()), argv
    line = exits_with_one_line(capsys, "x", "--data-dir", "", main=evaluate.main)
    assert "--data-dir: expected a path" in line


def test_an_amount_of_augmentation_switches_it_on(folder):
    for flags, *expected in (("--rotation 45", True, 45), ("--shift 1", True, 10), ("", False, 10)):
        args = train_mnist.parse_arguments(["--dataset", "p", *flags.split()])
        assert [args.augment, args.rotation] == expected


def test_a_tilde_is_the_home_directory(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory, *_ = train("--dataset=~/p")
    assert evaluated(directory, "--data-dir", "~/p")[0]["images"] == 4


# ------------------------ Twins, memory, rights ------------------------
def test_the_same_picture_in_two_parts_is_a_warning_that_names_both_files(divided, capsys):
    def told():
        run(train_mnist, "--dataset", "p", *TINY)
        return re.findall("the same picture is in .*", capsys.readouterr().out)

    shutil.copy("p/train/a/0.png", "p/train/b/again.png")
    assert told() == []
    shutil.copy("p/train/a/3.png", "p/test/b/twin.png")
    shutil.copy("p/val/b/2.png", "p/test/b/copy.png")
    (line,) = told()
    assert "two parts, 2 times" in line
    assert "train/a/3.png (train) and test/b/twin.png (test)" in line
    assert "val/b/2.png (val) and test/b/copy.png (test)" in line


def left_of_pixels(root="runs"):
    return list(Path(root).rglob(".pixels-*"))


KILLED = """
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
    argv = ["--dataset", "p", *TINY, "--epochs", 2, "--runs-dir", "runs", "--run-name"]
    whole, *_ = run(train_mnist, *argv, "whole")
    assert "fit the memory" not in capsys.readouterr().out
    killed = Forked("train_mnist", *argv, "r", before=LITTLE_MEMORY + KILLED)
    assert killed.finish()[0] == -signal.SIGKILL
    assert not left_of_pixels()
    little_memory(monkeypatch)
    directory, *_ = run(train_mnist, *argv, "r", "--stop-after", 1)
    assert "do not fit the memory: they lie in runs/r" in capsys.readouterr().out
    resume(directory)
    check_same(whole, directory)
    assert evaluated(directory)[1] == evaluated(whole)[1]
    assert not left_of_pixels()


def test_directories_of_data_that_cannot_be_written_are_enough(folder, mnist_dir):
    places = [mnist_dir, Path("p"), *mnist_dir.rglob("*"), *Path("p").rglob("*")]
    for place in places:
        place.chmod(0o555)
    before = "os.getuid() or as_an_ordinary_user()\nassert not os.access('p', os.W_OK)"
    for flags in (["--dataset", "p"], ["--data-dir", mnist_dir]):
        argv = [*flags, "--model", "dense", "--epochs", 1, "--runs-dir", "runs"]
        assert Forked("train_mnist", *argv, before=before).finish() == (0, "")
    for place in places:
        place.chmod(0o755)
    assert [path.name for path in mnist_dir.iterdir()] == ["MNIST"]
