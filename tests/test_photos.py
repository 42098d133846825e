"""The recipe for images of files: what it chooses for which folder."""

from pathlib import Path

import train_cifar

import pytest
from conftest import run
from PIL import Image
from test_data import pictures
from test_files import exits_with_one_line


@pytest.mark.parametrize(
    ("images", "rarest", "side", "expected"),
    [
        (20, 10, 48, {"model": "photonet", "image_size": 64}),
        (20, 10, 47, {"model": "fastnet", "image_size": 32}),
        # Few images are seen more often, in smaller batches, and are changed more.
        (30, 15, 64, {"epochs": 60, "batch_size": 8}),
        (600, 300, 64, {"epochs": 25, "batch_size": 30, "val_size": 0.1}),
        (2_000, 1_000, 64, {"rotation": 15, "norm_momentum": 0.05, "keep": "last"}),
        # Many validate with a thousand, and an epoch may be chosen.
        (50_000, 25_000, 64, {"rotation": 0, "norm_momentum": None, "keep": None}),
        (50_000, 25_000, 64, {"epochs": 10, "batch_size": 500, "val_size": 0.02}),
        # A class is rare that has less than half of its share.
        (54, 14, 64, {"class_weights": None, "label_smoothing": 0.2}),
        (53, 13, 64, {"class_weights": "margin", "label_smoothing": 0}),
    ],
)
def test_what_is_chosen_follows_from_the_images_to_train_on(images, rarest, side, expected):
    """There are two classes, and the median of the shorter sides is so many pixels."""
    recipe = train_cifar.RECIPES["photos"](images, classes=2, rarest=rarest, side=side)
    for flag, value in expected.items():
        assert recipe.get(flag) == value


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


def test_another_model_has_an_optimiser_for_any_and_another_recipe_is_itself(folder, capsys):
    """What was chosen for one net is not taken for another."""
    args = chosen("--model confignet")
    assert (args.optimizer, args.lr) == ("adamw", 0.001)
    assert (args.schedule, args.sizes) == ("cosine", None)
    args = chosen("--recipe default")
    assert (args.optimizer, args.batch_size) == ("adam", 512)
    assert args.image_size == 32

    # This recipe is for images of files alone.
    line = exits_with_one_line(capsys, "--recipe", "photos", main=train_cifar.main)
    assert "--recipe photos" in line
    assert "--dataset PATH" in line


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
