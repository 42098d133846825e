"""The batched augmentation against torchvision's, image by image."""

import common

import pytest
import torch
from torchvision.transforms.v2 import functional as reference


def amounts(**given):
    """What every augmentation is to do: nothing, but for what is given."""
    return {name: given.get(name, 0) for name in common.AUGMENTATIONS}


def augment(images, **given):
    return common.augment(images, amounts(**given), torch.Generator().manual_seed(1))


def numbers(count):
    """The random numbers that `augment` uses, in its order: angle, brightness, hue, flip."""
    random = torch.Generator().manual_seed(1)
    return [torch.rand(count, generator=random) for _ in range(4)]


def epochs(images, batch_size=4, seed=0, which=(1,), alternate_flip=False, **given):
    """All images, and their places in the set, as a Loader gives them in the epochs `which`."""
    image_set = common.ImageSet((images * 255).byte(), torch.arange(len(images)), [])
    config = {"mean": [0] * 3, "std": [1] * 3}
    loader = common.Loader(image_set, batch_size, config, seed, amounts(**given), alternate_flip)
    batches = (batch for number in which for batch in loader.batches(number))
    pixels, places = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(places)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equals_torchvision_image_by_image(size):
    images = torch.rand(100, 3, *size)
    ours = augment(images, rotation=20, brightness=0.2, hue=0.1, flip=0.5)
    for image, result, *drawn in zip(
        images, ours, *map(torch.Tensor.tolist, numbers(100)), strict=True
    ):
        angle, brightness, hue = (
            (number * 2 - 1) * most for number, most in zip(drawn[:3], (20, 0.2, 0.1), strict=True)
        )
        theirs = reference.adjust_brightness(reference.rotate(image, angle), 1 + brightness)
        theirs = reference.adjust_hue(theirs, hue)
        theirs = reference.horizontal_flip(theirs) if drawn[3] < 0.5 else theirs
        assert ((result - theirs).abs() * 255).max() <= 1


def test_amounts_have_the_right_distribution():
    grey = torch.full((20_000, 1, 1, 1), 0.5)
    factors = augment(grey, brightness=0.2).flatten() * 2
    assert factors.min() >= 0.8 and factors.max() <= 1.2
    # 2,000 +- 42 expected in each tenth of the range: five standard deviations.
    assert (torch.histc(factors, 10, 0.8, 1.2) - 2_000).abs().max() < 212
    wide = torch.tensor([0.0, 1.0]).expand(20_000, 1, 1, 2)
    flipped = augment(wide, flip=0.25)[:, 0, 0, 0]
    assert flipped.mean().item() == pytest.approx(0.25, abs=0.016)
    # No two of them draw the same numbers.
    both = torch.stack([factors, flipped])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.035


def test_what_is_off_changes_nothing_and_grey_has_no_hue_to_turn():
    images, grey = torch.rand(8, 3, 32, 32), torch.rand(8, 1, 32, 32)
    assert torch.equal(augment(images), images) and torch.equal(augment(grey, hue=0.5), grey)
    colours = grey.expand(-1, 3, -1, -1)
    assert torch.allclose(augment(colours, hue=0.5), colours)


def test_order_and_augmentation_follow_from_seed_and_epoch_alone_and_every_image_has_its_own():
    images = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    changes = {"rotation": 20, "brightness": 0.2, "hue": 0.1, "flip": 0.5}
    (first, order), (again, same), (other, another) = (
        epochs(images, seed=seed, **changes) for seed in (0, 0, 1)
    )
    later, third = epochs(images, which=(2, 3), **changes)
    assert torch.equal(first, again) and torch.equal(order, same)
    assert len(torch.cat([first, other, later]).flatten(1).unique(dim=0)) == 32
    orders = {
        tuple(places.tolist()) for places in (order, another, *third.split(8), torch.arange(8))
    }
    assert len(orders) == 5 and len({tuple(sorted(places)) for places in orders}) == 1


def test_shifts_move_each_image_by_its_own_pixels_and_mirror_the_border():
    images = torch.rand(50, 3, 32, 32)
    moved, seen = augment(images, shift=2), set()
    for image, result in zip(images, moved, strict=True):
        padded = reference.pad(image, 2, padding_mode="reflect")
        places = [(down, right) for down in range(5) for right in range(5)]
        seen |= {
            place for place in places if torch.equal(result, reference.crop(padded, *place, 32, 32))
        }
    assert (
        len(seen) > 15
        and {0, 4} <= {down for down, _ in seen}
        and {0, 4} <= {right for _, right in seen}
    )


def test_alternating_flips_are_drawn_once_and_inverted_every_epoch():
    rows, flipped = torch.arange(32.0).expand(200, 3, 32, 32) / 255, []
    for number in (1, 2, 3):
        pixels, places = epochs(rows, 64, which=[number], alternate_flip=True, flip=0.5)
        flipped.append((pixels[:, 0, 0, 0] > 0)[places.argsort()])
    assert torch.equal(flipped[0], flipped[2]) and torch.equal(flipped[0], ~flipped[1])
    assert 70 < flipped[0].sum() < 130
