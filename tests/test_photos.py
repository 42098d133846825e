"""The recipe for images of files: what is said of it, and kept. Its values are in recipes.json."""

from pathlib import Path

import train_cifar

import pytest
from conftest import run
from PIL import Image
from test_data import pictures


@pytest.fixture
def folder():
    """300 images to train on, a sixth of them in one class, and others to test."""
    Image.new("RGB", (69, 64)).save("photo.png")
    for name, count in {"train/a": 250, "train/b": 50, "test/a": 30, "test/b": 30}.items():
        place = Path("p", name)
        place.mkdir(parents=True)
        for index in range(count):
            link = place / f"{index}.png"
            link.symlink_to("../../../photo.png")


def chosen(flags):
    """The arguments of a run on that folder."""
    return train_cifar.parse_arguments(["--dataset", "p", *flags.split()])


def test_what_is_chosen_is_said_and_what_is_typed_is_taken(folder, capsys):
    """The line can be copied, and changed."""
    args = chosen("--epochs 7 --label-smoothing 0.3 --lr 0.05")
    assert (args.label_smoothing, args.lr) == (0.3, 0.05)
    line = "--model photonet --image-size 64 --epochs 7 --batch-size 15 --class-weights margin"
    assert capsys.readouterr().out == f"--recipe photos for this folder: {line}\n"


def test_another_model_has_an_optimiser_for_any_and_another_recipe_is_itself(folder):
    """What was chosen for one net is not taken for another."""
    args = chosen("--model confignet")
    assert (args.optimizer, args.lr) == ("adamw", 0.001)
    assert (args.schedule, args.sizes) == ("cosine", None)
    args = chosen("--recipe default")
    assert (args.optimizer, args.batch_size) == ("adam", 512)
    assert args.image_size == 32


def test_a_folder_alone_is_enough_and_the_choice_is_in_the_record_and_kept():
    """What has come into the folder since changes nothing for a run that goes on."""
    pictures("p", {"a": 30, "b": 6})
    argv = ["--dataset", "p", "--quiet", "--stop-after", 1]
    directory, record, _ = run(train_cifar, *argv)
    args = record["args"]
    assert args["recipe"] == "photos"
    assert args["epochs"] == 60
    pictures("p", {"c": 30})
    argv = ["--resume", directory, "--quiet", "--stop-after", 2]
    _, record, _ = run(train_cifar, *argv)
    assert record["args"] == args


def test_where_left_and_right_matter_no_mirrored_view_is_averaged(folder):
    """A net that has seen no mirrored image would be wrong about them."""
    for flags, views in (
        ("", "mirror+shift"),
        ("--flip 0", "shift"),
        ("--flip 0 --tta mirror", "mirror"),
    ):
        assert chosen(flags).tta == views
