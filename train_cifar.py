"""Train a convolutional net on CIFAR-10, CIFAR-100, synthetic shapes or a folder of images.

    python train_cifar.py --dataset synthetic --epochs 2   # no download, a minute
    python train_cifar.py --c1 48 --epochs 50              # ConfigNet on CIFAR-10
    python train_cifar.py --model convnet --batch-size 24 --epochs 10 --no-augment --lr 0.001
    python train_cifar.py --recipe tutorial                # with the tutorial's mistakes
    python train_cifar.py --recipe fast                    # about 94% in eleven epochs
    python train_cifar.py --dataset path/to/images         # in a folder for each class
    python train_cifar.py --dataset path/to/images --weights imagenet --freeze
    python train_cifar.py --resume runs/<run>              # go on where it stopped

The defaults are the last run of the CIFAR-10 tutorial: ConfigNet 48-96-256, Adam at 0.0008, batches
of 512, augmentation, at most 50 epochs, early stopping after 6 without a lower validation loss. But
batch norm comes before ReLU and dropout.
"""

import argparse
import math
import sys
from collections.abc import Callable

import common
import records

import torch

# After K. Jordan's airbench94_muon. A fiftieth of the images validates: it chooses the epoch.
FAST = {
    "val_size": 0.02,
    "normalize": "dataset",
    "model": "fastnet",
    "epochs": 11,
    "batch_size": 500,
    "tolerance": 0,
    "optimizer": "muon",
    "lr": 0.12,
    "aux_lr": 0.015,
    "momentum": 0.6,
    "weight_decay": 0.1,
    "schedule": "linear",
    "label_smoothing": 0.2,
    "rotation": 0.0,
    "brightness": 0.0,
    "hue": 0.0,
    "alternate_flip": True,
    "shift": 2,
    "sizes": [5 / 8, 3 / 4, 1],
    "tta": "mirror+shift",
}


def photos(images: int, classes: int, rarest: int, side: float) -> dict:
    """The recipe for images of files: `fast`, fitted to what there is to train on.

    There are `images` to train on, of `classes` classes, `rarest` of them of the rarest one. `side`
    is the median of their shorter sides, in pixels.
    """
    # Photos have details that 32 pixels do not show. Smaller images gain nothing by being enlarged.
    recipe = FAST | {"image_size": 32}
    if side >= 48:
        recipe |= {"image_size": 64, "model": "photonet"}

    # The fewer images, the more often each is seen: 9,000 at least, and 10 times all of them.
    # About 20 steps an epoch, of 8 images or more.
    recipe |= {
        "epochs": 10 + min(50, 9_000 // max(images, 1)),
        "batch_size": max(8, min(500, images // 20)),
        "val_size": min(0.1, 1_000 / max(images, 1)),
    }

    if images < 10_000:
        # A net learns few images by heart, so they are changed more.
        recipe |= {"rotation": 15.0, "brightness": 0.2, "hue": 0.05, "shift": 4}

        # Small batches differ much from one another, so batch norm takes up less of each.
        recipe |= {"norm_momentum": 0.05}

        # A hundred validation images would choose an epoch by chance.
        recipe |= {"keep": "last"}

    # A class with less than half of its share would hardly be learnt, least of all from smoothed
    # labels.
    if rarest * classes * 2 < images:
        recipe |= {"class_weights": "margin", "label_smoothing": 0.0}
    return recipe


# Sets of defaults for the flags. What a recipe does not name is as in `default`.
RECIPES = {
    "default": {
        "dataset": "cifar10",
        "model": "confignet",
        "epochs": 50,
        "batch_size": 512,
        "lr": 0.0008,
        "tolerance": 6,
        "augment": True,
        "rotation": 20.0,
        "brightness": 0.2,
        "hue": 0.1,
        "flip": 0.5,
        "image_size": 32,
        "grey": False,
    },
    # The tutorial to the letter, with its mistakes; its accuracy is flattered by the test set.
    "tutorial": {
        "tutorial_layers": True,
        "always_dropout": True,
        "val_size": 0.0,
        "precision": "fp32",
    },
    "fast": FAST,
    "photos": photos,  # what --dataset PATH takes by itself
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of common.py, with the defaults of a recipe. Exits with status 2 on a bad one."""
    return common.parse_arguments(__file__, __doc__, RECIPES, argv)


def main(argv: list[str] | None = None, on_epoch: Callable[[dict], bool] | None = None) -> dict:
    """Load, build, fit, test: one run. Returns the content of run.json and the run's `directory`.

    `on_epoch(row)` is told each row of the log; True ends the run. Raises UsageError, RunError.
    """
    # What is to be done: a new run, one that goes on, or nothing.
    args = parse_arguments(argv)
    result = records.already_done(args)
    if result:
        return result

    # The images, and a model for them.
    data = common.load_data(args, synthetic)
    model = common.new_model(args, data.train)

    # Train, with validation after each epoch. Then test, once, with the weights that are kept.
    with records.open_run(args, model, data) as run:
        came_to_its_end = common.fit(args, model, data, run, on_epoch)
        if came_to_its_end and data.test:
            common.final_test(args, model, data.test, run)
    return run.result()


# ------------------------ Synthetic images ------------------------
def synthetic(train):
    """The images of --dataset synthetic; the same for every --seed, which changes the training."""
    return synthetic_shapes(10_000, seed=0) if train else synthetic_shapes(2_000, seed=1)


def synthetic_shapes(count, seed):
    """`count` noisy 32x32 images, each of a shape or a texture of any size, in two colours."""
    classes = [
        "disc",
        "ring",
        "square",
        "triangle",
        "cross",
        "crescent",
        "rows",
        "columns",
        "checkerboard",
        "dots",
    ]
    random = common.generator_for("shapes", seed)

    def uniform(low, high):
        return (torch.rand(count, generator=random) * (high - low) + low).view(-1, 1, 1)

    labels = torch.randint(10, (count,), generator=random)
    axis = torch.arange(32.0) - 15.5
    angle = uniform(-0.25, 0.25)
    size = uniform(6, 12)
    x = axis.view(1, 1, -1) - uniform(-5, 5)
    y = axis.view(1, -1, 1) - uniform(-5, 5)
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    radius = (x**2 + y**2).sqrt()
    moon = ((x - size / 2) ** 2 + y**2).sqrt()
    # Each is positive inside the figure and grows by about one a pixel. A texture has a period of 3
    # to 8 pixels.
    period = 2 * math.pi / uniform(3, 8)
    wave_x = (x * period).sin() * 2
    wave_y = (y * period).sin() * 2
    figures = [
        size - radius,
        size / 4 - (radius - size * 0.8).abs(),
        size * 0.85 - torch.maximum(x.abs(), y.abs()),
        torch.minimum(size * 0.6 - y, y / 2 + size * 0.6 - x.abs()),
        torch.maximum(
            torch.minimum(size / 4 - x.abs(), size - y.abs()),
            torch.minimum(size / 4 - y.abs(), size - x.abs()),
        ),
        torch.minimum(size - radius, moon - size * 0.8),
        wave_y.expand(-1, -1, 32),
        wave_x.expand(-1, 32, -1),
        wave_x * wave_y,
        wave_x + wave_y - 1.5,
    ]
    inside = torch.stack([figure.expand(count, 32, 32) for figure in figures])[
        labels, torch.arange(count)
    ]
    cover = (inside + 0.5).clamp(0, 1)[:, None]
    paint, ground = torch.rand(2, count, 3, 1, 1, generator=random)
    # Push the two colours apart where they would be hard to tell from one another.
    ground = torch.where(
        (paint - ground).abs().mean(1, keepdim=True) < 0.25, (paint + 0.5) % 1, ground
    )
    images = ground + (paint - ground) * cover
    images += torch.randn(images.shape, generator=random) * uniform(0.02, 0.2)[:, None]
    return common.ImageSet((images.clamp(0, 1) * 255).round().byte(), labels, classes)


if __name__ == "__main__":
    sys.exit(common.command_line(main))
