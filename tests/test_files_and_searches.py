"""Images from files in searches."""

import shutil
from pathlib import Path

import records
import sweep
import train_mnist

import pytest
from conftest import run
from PIL import Image
from test_data import pictures
from test_files import (
    LITTLE_MEMORY,
    TINY,
    evaluated,
    left_of_pixels,
    picture,
)

pytestmark = pytest.mark.usefixtures("undrawn")

# For a script of one's own: it writes an x to the file DECODED for each image that Pillow opens.
COUNTING = """
from PIL import Image
from train_mnist import main, parse_arguments, synthetic
opened = Image.open
def counting(*arguments, **options):
    with open(DECODED, "a") as file:
        file.write("x")
    return opened(*arguments, **options)
Image.open = counting
"""
GRID = "--method grid --param lr=0.01,0.001"
# A script that fails when it has read the images.
FAILING = """
import common
from train_mnist import parse_arguments, synthetic
def main(argv, on_epoch):
    common.load_data(parse_arguments(argv), synthetic)
    raise ValueError
"""


def search(argv, name="s"):
    """A search on the folder p: its result."""
    argv = f"--script train_mnist.py --runs-dir runs --name {name} --threads 1 --quiet {argv}"
    return sweep.main(f"{argv} -- {TINY}".split())


def go_on(count, directory="runs/s"):
    """Go on with a search until so many trials are done; flags of the trials may follow."""
    sweep.main(f"--resume {directory} --quiet --count {count}".split())


def test_a_search_has_one_data_csv_and_the_same_files_from_wherever_it_goes_on(
    tmp_path, monkeypatch
):
    """All trials, and the test of the winner, are of the images that the search began with."""
    pictures("p", {"a": 20, "b": 20})
    search("--method random --param lr=log:0.001..0.1 --count 1")

    # There are other images later, and elsewhere.
    pictures("p", {"a/new": 30, "b/new": 30})
    pictures("elsewhere/p", {"a": 30, "b": 30})
    monkeypatch.chdir("elsewhere")
    go_on("2", "../runs/s")
    monkeypatch.chdir(tmp_path)

    # A folder that has moved is given anew, and other images are not taken for it.
    shutil.move("p", "moved")
    go_on("3 -- --dataset moved")
    shutil.move("moved", "again")
    for path in Path("runs/s").glob("*/metrics.json"):
        path.unlink()
    go_on("3 -- --dataset again")
    tested = records.read_json(Path("runs/s/best/metrics.json"))
    assert evaluated("runs/s/best", "--data-dir again")[0] == tested
    assert tested["images"] == 4

    # One file says which images these are; one that was edited, or is gone, is refused.
    listing = Path("runs/s/data.csv")
    assert [*Path("runs/s").rglob("data.csv")] == [listing]
    listing.write_text(listing.read_text().replace(",test,", ",train,"))
    with pytest.raises(records.RunError, match="not those that it began with"):
        go_on("4")
    listing.unlink()
    with pytest.raises(records.RunError, match="not those that it began with"):
        go_on("4 -- --dataset elsewhere/p")
    trials = [records.read_record(path)["data"] for path in Path("runs/s").glob("trial-*")]
    assert len(trials) == 3
    assert len({trial["checksum"] for trial in trials}) == 1


# It is killed once, after an epoch, when the weights that it began with are elsewhere.
DYING = """
import os, pathlib, signal
import train_mnist
from train_mnist import parse_arguments, synthetic
def main(argv, on_epoch):
    def look(row):
        ends = on_epoch(row)
        if pathlib.Path("weights").exists():
            pathlib.Path("weights").rename("moved")
            os.kill(os.getpid(), signal.SIGKILL)
        return ends
    return train_mnist.main(argv, look)
"""


def test_weights_are_needed_when_a_trial_begins_and_kept_when_the_images_move():
    """A trial that goes on has its own; those that follow begin with the ones of before."""
    pictures("p", {"a": 20, "b": 20})
    run(train_mnist, *f"{TINY} --quiet".split())[0].rename("weights")
    Path("dying.py").write_text(DYING)
    argv = "--script dying.py --method grid --param lr=0.1,0.01,0.001 --runs-dir runs --name s"
    sweep.main(f"{argv} --count 1 --quiet -- {TINY} --weights weights --epochs 3".split())
    go_on("2 -- --weights moved")
    Path("p").rename("q")
    go_on("3 -- --dataset q")
    trials = [records.read_record(path) for path in sorted(Path("runs/s").glob("trial-*"))]
    assert [trial["epochs"] for trial in trials] == [3, 3, 3]
    moved = str(Path("moved").absolute())
    assert [trial["args"]["weights"] for trial in trials[1:]] == [moved, moved]


def test_a_place_that_is_not_there_is_not_kept():
    """After a mistake the search goes on where its images are."""
    pictures("p", {"a": 20, "b": 20})
    search("--method grid --param lr=0.1,0.01 --count 1")
    with pytest.raises(records.UsageError, match="typo"):
        go_on("2 -- --dataset /typo")
    go_on("2")
    assert len(list(Path("runs/s").glob("trial-*"))) == 2


def test_folders_with_the_same_names_of_files_are_told_apart():
    """A search for the better of two folders trains on each."""
    losses = {}
    for name, level in (("p", 10), ("q", None)):
        pictures(name, {"a": 20, "b": 20}, level)
        flags = f"{TINY} --tutorial-layers --dataset {name} --quiet"
        losses[name] = run(train_mnist, *flags.split())[1]["best"]["val_loss"]
    argv = "--script train_mnist.py --method grid --param dataset=p,q --metric val_acc --threads 1"
    flags = TINY.replace("--dataset p", "--tutorial-layers")
    result = sweep.main(f"{argv} --runs-dir runs --name s --quiet -- {flags}".split())
    found = {Path(line["params"]["dataset"]).name: line["val_loss"] for line in result["trials"]}
    assert found == losses
    assert found["p"] != found["q"]


def test_a_search_tells_of_a_broken_image_before_its_first_trial(capsys):
    """It looks at the images once, and says of them once what there is to say."""
    pictures("p", {"train/a": 10, "train/b": 10, "train/rare": 3, "test/a": 3, "test/b": 3})
    Path("p/test/a/notes.xyz").touch()
    Path("p/test/a/1.png").write_text("no image")
    with pytest.raises(records.UsageError, match=r"test/a/1\.png") as failure:
        search(f"{GRID} --no-quiet")
    assert "\n" not in str(failure.value)
    assert not list(Path("runs").rglob("run.json"))
    assert "1 .xyz" in capsys.readouterr().out
    picture("p/test/a/1.png", 1)
    assert search(GRID)["best"]
    assert capsys.readouterr().out == ""


def test_a_search_larger_than_the_memory_decodes_its_images_once_and_leaves_none(monkeypatch):
    """Its trials share a file with the pixels, and have the results of a search with memory."""

    def losses(result):
        return {line["trial"]: line["val_loss"] for line in result["trials"]}

    pictures("p", {"a": 20, "b": 20})
    expected = losses(search(GRID, "plain"))
    monkeypatch.setattr(Image, "open", Image.open)  # what the script changes is put back
    monkeypatch.setattr(Path, "read_text", Path.read_text)
    decoded = Path("decoded").absolute()
    Path("frugal.py").write_text(f"{LITTLE_MEMORY}\nDECODED = {str(decoded)!r}{COUNTING}")
    found = losses(search(f"{GRID} --script frugal.py --jobs 2"))
    assert not left_of_pixels()
    # The test images once more, for the winner.
    assert decoded.stat().st_size <= 40 + 4
    assert found == expected
    assert len(found) == 2

    # Nor does one that ends with an error.
    Path("failing.py").write_text(FAILING)
    with pytest.raises(records.RunError, match="in a row failed"):
        search(f"{GRID} --script failing.py --max-failures 1", "fails")
    assert not left_of_pixels()
