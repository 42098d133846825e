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


def epoch(images, number, seed=0, alternate_flip=False, **amounts):
    """All images, and their places in the set, as they come in an epoch."""
    places = torch.arange(len(images))
    loader = common.Loader(
        common.ImageSet(images, places, []),
        batch_size=4,
        config={"mean": [0], "std": [1]},
        seed=seed,
        amounts=NONE | amounts,
        alternate_flip=alternate_flip,
    )
    pixels, places = zip(*loader.batches(number), strict=True)
    return torch.cat(pixels), torch.cat(places)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equals_torchvision_image_by_image(size):
    """With the same random numbers, no pixel differs by more than rounding."""
    images = torch.rand(100, 3, *size)
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


def test_grey_images_have_no_hue_to_turn():
    """They stay what they are, with one channel and with three."""
    grey = torch.rand(8, 1, 32, 32)
    assert torch.equal(augment(grey, hue=0.5), grey)

    # As the channels of a colour photo, they are the same.
    colours = grey.expand(-1, 3, -1, -1)
    assert torch.allclose(augment(colours, hue=0.5), colours)


def test_every_image_is_changed_in_its_own_way_that_follows_from_seed_and_epoch_alone():
    """A run that goes on sees what it would have seen."""
    # Eight times the same image.
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    images = image.expand(8, -1, -1, -1)
    seen = set()
    for number, seed in (
        (1, 0),
        (2, 0),
        (1, 1),
        (1, 0),  # as the first
    ):
        pixels, places = epoch(images, number, seed, rotation=20)
        assert sorted(places.tolist()) == [*range(8)]
        seen |= {each.tobytes() for each in pixels.numpy()}
    assert len(seen) == 24


def test_shifts_move_each_image_by_its_own_pixels_and_mirror_the_border():
    """Each becomes one of 25 crops of itself with a mirrored border; all of them occur."""
    images = torch.rand(300, 3, 8, 8)
    shifted = augment(images, shift=2)
    padded = reference.pad(images, 2, padding_mode="reflect")
    places = itertools.product(range(5), repeat=2)
    crops = torch.stack([reference.crop(padded, *place, 8, 8) for place in places])

    # For each of the crops, which images are shifted so: [25, 300].
    are_equal = (shifted == crops).flatten(2).all(2)
    assert (are_equal.sum(0) == 1).all()
    assert are_equal.any(1).all()


def test_alternating_flips_are_drawn_once_and_inverted_every_epoch():
    """In two epochs each image is seen as it is and mirrored."""
    rows = torch.arange(32, dtype=torch.uint8).expand(200, 3, 32, 32)
    flipped = []
    for number in (1, 2, 3):
        pixels, places = epoch(rows, number, alternate_flip=True, flip=0.5)
        # A mirrored row begins with its largest value.
        first_column = pixels[places.argsort()][:, 0, 0, 0]
        flipped.append(first_column > 0)
    first, second, third = flipped
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    assert 70 < first.sum() < 130
