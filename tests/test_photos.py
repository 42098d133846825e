"""The recipe for images of files: what it chooses for which folder."""

import shutil
from pathlib import Path

import train_cifar

import pytest
from conftest import run
from PIL import Image
from test_data import pictures
from test_files import exits_with_one_line


def chosen(counts, *argv, side=64):
    """The arguments for a folder with so many images in each class."""
    shutil.rmtree("p", ignore_errors=True)
    for name, count in counts.items():
        path = Path("p", name)
        path.mkdir(parents=True)
        Image.new("RGB", (side + 5, side)).save(path / "0.png")
        for index in range(1, count):
            (path / f"{index}.png").symlink_to("0.png")
    return train_cifar.parse_arguments(["--dataset", "p", *map(str, argv)])


def test_large_photos_are_64_pixels_and_small_ones_32():
    for side, expected in ((48, ("photos", "photonet", 64)), (47, ("photos", "fastnet", 32))):
        args = chosen({"a": 10, "b": 10}, side=side)
        assert (args.recipe, args.model, args.image_size) == expected


@pytest.mark.parametrize("images, epochs, batch", [(30, 60, 8), (600, 25, 30), (2000, 14, 100)])
def test_few_images_are_seen_more_often_in_smaller_batches(images, epochs, batch):
    args = chosen({"train/a": images // 2, "train/b": images // 2, "test/a": 9, "test/b": 9})
    assert (args.epochs, args.batch_size) == (epochs, batch)
    assert args.val_size == 0.1
    assert args.rotation == 15
    assert args.keep == "last"
    assert args.norm_momentum < 0.1


def test_of_many_images_a_thousand_validate_and_changes_are_smaller():
    recipe = train_cifar.RECIPES["photos"](images=50_000, classes=10, rarest=5_000, side=32)
    assert recipe["val_size"] * 50_000 == pytest.approx(1_000)
    assert (recipe["epochs"], recipe["batch_size"], recipe["rotation"]) == (10, 500, 0)
    assert "keep" not in recipe


def test_a_rare_class_counts_as_much_as_the_others_and_what_is_chosen_is_said(capsys):
    assert chosen({"a": 40, "b": 14}).class_weights is None
    capsys.readouterr()
    assert chosen({"a": 40, "b": 13}, "--epochs", 7).class_weights == "margin"
    line = "--model photonet --image-size 64 --epochs 7 --batch-size 8"
    expected = f"--recipe photos for this folder: {line} --class-weights margin\n"
    assert capsys.readouterr().out == expected


def test_what_is_typed_is_taken_and_another_model_has_an_optimiser_for_any(capsys):
    args = chosen({"a": 40, "b": 3}, "--label-smoothing", 0.3, "--lr", 0.05)
    assert (args.label_smoothing, args.lr) == (0.3, 0.05)
    args = chosen({"a": 9, "b": 9}, "--model", "confignet")
    assert (args.optimizer, args.lr, args.schedule, args.sizes) == ("adamw", 0.001, "cosine", None)
    args = chosen({"a": 9, "b": 9}, "--recipe", "default")
    assert (args.optimizer, args.batch_size, args.image_size) == ("adam", 512, 32)
    line = exits_with_one_line(capsys, "--recipe", "photos", main=train_cifar.main)
    assert "--recipe photos" in line and "--dataset PATH" in line


def test_a_folder_alone_is_enough_and_the_choice_is_in_the_record_and_kept():
    pictures("p", {"a": 30, "b": 6})
    directory, record, _ = run(train_cifar, "--dataset", "p", "--quiet", "--stop-after", 1)
    args = record["args"]
    assert (args["recipe"], args["epochs"]) == ("photos", 60)
    pictures("p", {"c": 30})  # what has come since changes nothing
    argv = ["--resume", directory, "--quiet", "--stop-after", 2]
    assert run(train_cifar, *argv)[1]["args"] == args
