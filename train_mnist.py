"""Train a dense net or a CNN on MNIST, FashionMNIST, KMNIST, synthetic digits or your own images.

    python train_mnist.py --dataset synthetic --epochs 3   # no download, half a minute
    python train_mnist.py                                  # the CNN on MNIST
    python train_mnist.py --model dense
    python train_mnist.py --recipe tutorial                # a constant learning rate, as there
    python train_mnist.py --recipe fast                    # one epoch, 99.3%
    python train_mnist.py --recipe fast996                 # twelve epochs, 99.7%
    python train_mnist.py --resume runs/<run>              # go on where it stopped

The defaults are the MNIST tutorial's: Adam at 0.001, batches of 64, 10 epochs, no augmentation. But
the learning rate follows a one-cycle schedule: at a constant rate the validation loss jumps about,
and stays higher for both nets.
"""

import argparse
import sys
from collections.abc import Callable

import common
import records

import torch
import torch.nn.functional as F

# Sets of defaults for the flags. What a recipe does not name is as in `default`.
RECIPES = {
    "default": {
        "dataset": "mnist",
        "model": "cnn",
        "epochs": 10,
        "batch_size": 64,
        "lr": 0.001,
        "schedule": "onecycle",
        "tolerance": 0,
        "augment": False,
        "rotation": 10.0,
        "brightness": 0.2,
        "hue": 0.0,
        "flip": 0.0,
        "image_size": 28,
        "grey": True,
    },
    # The tutorial to the letter, which keeps the last epoch.
    "tutorial": {
        "schedule": "constant",
        "tutorial_layers": True,
        "keep": "last",
        "precision": "fp32",
    },
    "fast": {
        "normalize": "dataset",
        "model": "patchnet",
        "epochs": 1,
        "batch_size": 500,
        "optimizer": "muon",
        "lr": 0.24,
        "aux_lr": 0.06,
        "momentum": 0.6,
        "schedule": "linear",
        "label_smoothing": 0.2,
    },
    "fast996": {
        "normalize": "dataset",
        "model": "fastnet",
        "c1": 32,
        "c2": 64,
        "c3": 96,
        "epochs": 12,
        "batch_size": 500,
        "augment": True,
        "brightness": 0.0,
        "shift": 2,
        "optimizer": "muon",
        "lr": 0.12,
        "aux_lr": 0.015,
        "momentum": 0.6,
        "weight_decay": 0.1,
        "schedule": "linear",
        "label_smoothing": 0.1,
        "tta": "shift",
    },
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
    return synthetic_digits(10_000, seed=0) if train else synthetic_digits(2_000, seed=1)


def synthetic_digits(count, seed):
    """`count` grey 28x28 digits from matplotlib's fonts: shifted, turned, scaled, thick or thin."""
    import matplotlib
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    fonts = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif"]
    fonts += ["DejaVuSerif-Italic", "STIXGeneral", "cmr10", "cmss10", "cmtt10"]
    glyphs = []
    for name in fonts:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 44)
        for digit in range(10):
            for thickness in range(3):
                image = Image.new("L", (56, 56))
                ImageDraw.Draw(image).text(
                    (28, 28), str(digit), 255, font, anchor="mm", stroke_width=thickness
                )
                glyphs.append(torch.from_numpy(numpy.array(image)))
    glyphs = torch.stack(glyphs).float().view(len(fonts), 10, 3, 1, 56, 56) / 255

    random = common.generator_for("digits", seed)

    def uniform(low, high):
        return torch.rand(count, generator=random) * (high - low) + low

    labels = torch.randint(10, (count,), generator=random)
    font_indices = torch.randint(len(fonts), (count,), generator=random)
    thicknesses = torch.randint(3, (count,), generator=random)
    chosen = glyphs[font_indices, labels, thicknesses]
    angle = uniform(-0.35, 0.35)
    scale = uniform(0.8, 1.4)
    squeeze = uniform(0.8, 1.25)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = (cos * squeeze, -sin, uniform(-0.3, 0.3), sin * squeeze, cos, uniform(-0.3, 0.3))
    grid = F.affine_grid(
        torch.stack(rows, 1).view(count, 2, 3), (count, 1, 28, 28), align_corners=False
    )
    images = F.grid_sample(chosen, grid, align_corners=False) * uniform(0.5, 1).view(-1, 1, 1, 1)
    images += torch.randn(images.shape, generator=random) * uniform(0, 0.25).view(-1, 1, 1, 1)
    return common.ImageSet((images.clamp(0, 1) * 255).round().byte(), labels, list("0123456789"))


if __name__ == "__main__":
    sys.exit(common.command_line(main))
