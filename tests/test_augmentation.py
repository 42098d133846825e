"""The batched augmentation against torchvision's, image by image."""

import itertools

import common

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

NONE = dict.fromkeys(common.AUGMENTATIONS, 0)


def augment(images, **amounts):
    """What these amounts make of the images, with the random numbers of the seed 1."""
    random = torch.Generator().manual_seed(1)
    return common.augment(images, NONE | amounts, random)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 24, 40), (1, 32, 32)])
def test_equals_torchvision_image_by_image(shape):
    """With the same random numbers, no pixel differs by more than rounding."""
    # Some of them are grey: these have no hue to turn.
    images = torch.rand(100, *shape)
    images[:8] = images[:8, :1]
    ours = augment(
        images,
        rotation=20,
        brightness=0.2,
        hue=0.1,
        flip=0.3,
    )

    # Each image has a number of its own for each change, drawn in the order of AUGMENTATIONS.
    random = torch.Generator().manual_seed(1)
    drawn = torch.rand(4, 100, generator=random).tolist()

    for image, result, *numbers, chance in zip(images, ours, *drawn, strict=True):
        # The first three are from -1 to 1 of the amount.
        angle, brightness, hue = (number * 2 - 1 for number in numbers)
        theirs = reference.rotate(image, angle * 20)
        theirs = reference.adjust_brightness(theirs, 1 + brightness * 0.2)
        theirs = reference.adjust_hue(theirs, hue * 0.1)
        if chance < 0.3:
            theirs = reference.horizontal_flip(theirs)
        difference = (result - theirs).abs().max()
        assert difference * 255 <= 1


def test_shifts_move_each_image_by_its_own_pixels_and_mirror_the_border():
    """Each becomes one of 25 crops of itself with a mirrored border; all of them occur."""
    images = torch.rand(300, 3, 8, 8)
    shifted = augment(images, shift=2)

    # All the crops of all images, [25, 300, 3, 8, 8].
    padded = reference.pad(images, 2, padding_mode="reflect")
    places = itertools.product(range(5), repeat=2)
    crops = torch.stack([reference.crop(padded, *place, 8, 8) for place in places])

    # For each of the crops, which images are shifted so: [25, 300].
    are_equal = (shifted == crops).flatten(2).all(2)
    assert (are_equal.sum(0) == 1).all()
    assert are_equal.any(1).all()


def test_alternating_flips_are_drawn_once_and_inverted_every_epoch():
    """In two epochs each image is seen as it is and mirrored."""
    # The label of an image is its place in the set.
    rows = torch.arange(32, dtype=torch.uint8).expand(200, 3, 32, 32)
    loader = common.Loader(
        common.ImageSet(rows, torch.arange(200), []),
        batch_size=200,
        config={"mean": [0], "std": [1]},
        seed=0,
        amounts=NONE | {"flip": 0.5},
        alternate_flip=True,
    )

    # A mirrored row begins with its largest value.
    flipped = []
    for number in (1, 2, 3):
        ((pixels, places),) = loader.batches(number)
        first_column = pixels[places.argsort()][:, 0, 0, 0]
        flipped.append(first_column > 0)

    # Every image is the other way round in the next epoch.
    first, second, third = flipped
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    assert 70 < first.sum() < 130
