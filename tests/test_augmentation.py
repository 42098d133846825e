"""The batched augmentation against torchvision's, image by image."""

import itertools

import common

import pytest
import torch
from torchvision.transforms.v2 import functional as reference


def augment(images, **amounts):
    """What these amounts make of the images, with the random numbers of the seed 1."""
    amounts = dict.fromkeys(common.AUGMENTATIONS, 0) | amounts
    return common.augment(images, amounts, torch.Generator().manual_seed(1))


def epoch(images, number=1, seed=0, batch_size=4, alternate_flip=False, **amounts):
    """All images, and their places in the set, as they come in an epoch."""
    image_set = common.ImageSet((images * 255).byte(), torch.arange(len(images)), [])
    config = {"mean": [0] * 3, "std": [1] * 3}
    amounts = dict.fromkeys(common.AUGMENTATIONS, 0) | amounts
    loader = common.Loader(image_set, batch_size, config, seed, amounts, alternate_flip)
    pixels, places = zip(*loader.batches(number), strict=True)
    return torch.cat(pixels), torch.cat(places)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equals_torchvision_image_by_image(size):
    images = torch.rand(100, 3, *size)
    random = torch.Generator().manual_seed(1)
    ours = augment(images, rotation=20, brightness=0.2, hue=0.1, flip=0.3)
    drawn = torch.stack([torch.rand(100, generator=random) for _ in range(4)], 1)
    for image, result, numbers in zip(images, ours, drawn.tolist(), strict=True):
        angle, brightness, hue = (number * 2 - 1 for number in numbers[:3])
        theirs = reference.rotate(image, angle * 20)
        theirs = reference.adjust_brightness(theirs, 1 + brightness * 0.2)
        theirs = reference.adjust_hue(theirs, hue * 0.1)
        if numbers[3] < 0.3:
            theirs = reference.horizontal_flip(theirs)
        assert ((result - theirs).abs() * 255).max() <= 1


def test_grey_images_have_no_hue_to_turn():
    grey = torch.rand(8, 1, 32, 32)
    colours = grey.expand(-1, 3, -1, -1)
    assert torch.equal(augment(grey, hue=0.5), grey)
    assert torch.allclose(augment(colours, hue=0.5), colours)


def test_order_and_augmentation_follow_from_seed_and_epoch_alone_and_every_image_has_its_own():
    images = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    changes = {"rotation": 20, "brightness": 0.2, "hue": 0.1, "flip": 0.5}
    seen = set()
    orders = {(*range(8),)}
    for number, seed in ((1, 0), (2, 0), (1, 1), (1, 0)):
        pixels, places = epoch(images, number, seed, **changes)
        seen |= {image.tobytes() for image in pixels.numpy()}
        assert sorted(places.tolist()) == [*range(8)]
        orders.add(tuple(places.tolist()))
    assert len(seen) == 24
    assert len(orders) == 4


def test_shifts_move_each_image_by_its_own_pixels_and_mirror_the_border():
    images = torch.rand(300, 3, 8, 8)
    places = list(itertools.product(range(5), repeat=2))
    seen = set()
    for image, result in zip(images, augment(images, shift=2), strict=True):
        padded = reference.pad(image, 2, padding_mode="reflect")
        crops = (reference.crop(padded, *place, 8, 8) for place in places)
        (place,) = (i for i, crop in enumerate(crops) if torch.equal(result, crop))
        seen.add(place)
    assert len(seen) == 25


def test_alternating_flips_are_drawn_once_and_inverted_every_epoch():
    rows = torch.arange(32.0).expand(200, 3, 32, 32) / 255
    flipped = []
    for number in (1, 2, 3):
        pixels, places = epoch(rows, number, alternate_flip=True, flip=0.5)
        flipped.append((pixels[:, 0, 0, 0] > 0)[places.argsort()])
    assert torch.equal(flipped[0], flipped[2])
    assert torch.equal(flipped[0], ~flipped[1])
    assert 70 < flipped[0].sum() < 130
