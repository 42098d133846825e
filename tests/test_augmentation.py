"""The batched augmentation against torchvision's, image by image."""

import common

import pytest
import torch
from torchvision.transforms.v2 import functional as reference


def augment(images, *settings):
    """`images` as they come out, and the parameters that were drawn."""
    augmentation = common.Augmentation(*settings)
    drawn = augmentation.draw(len(images), torch.Generator().manual_seed(1))
    return augmentation.apply(images, **drawn), drawn


def epochs(images, *settings, batch_size=4, seed=0, numbers=(1,)):
    """All images, and their places in the set, in the order in which a Loader gives them in these epochs."""
    image_set = common.ImageSet((images * 255).byte(), torch.arange(len(images)), [])
    loader = common.Loader(
        image_set, batch_size, [0] * 3, [1] * 3, common.Augmentation(*settings), seed
    )
    pixels, places = zip(
        *(batch for number in numbers for batch in loader.batches(number)), strict=True
    )
    return torch.cat(pixels), torch.cat(places)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equals_torchvision_image_by_image(size):
    images = torch.rand(100, 3, *size)
    ours, drawn = augment(images, 20, 0.2, 0.1, 0.5)
    drawn = zip(
        *(drawn[name].tolist() for name in ("angle", "brightness", "hue", "flip")), strict=True
    )
    for image, result, (angle, brightness, hue, flip) in zip(images, ours, drawn, strict=True):
        theirs = reference.adjust_brightness(reference.rotate(image, angle), brightness)
        theirs = reference.adjust_hue(theirs, hue)
        theirs = reference.horizontal_flip(theirs) if flip else theirs
        assert ((result - theirs).abs() * 255).max() <= 1


def test_parameters_have_the_right_distribution():
    drawn = common.Augmentation(20, 0.2, 0.1, 0.25).draw(100_000, torch.Generator().manual_seed(1))
    for name, low, high in (("angle", -20, 20), ("brightness", 0.8, 1.2), ("hue", -0.1, 0.1)):
        assert low <= drawn[name].min() and drawn[name].max() <= high
        # 10,000 +- 95 expected in each tenth of the range: five standard deviations.
        assert (torch.histc(drawn[name], 10, low, high) - 10_000).abs().max() < 475, name
    assert drawn["flip"].float().mean().item() == pytest.approx(0.25, abs=0.007)
    correlation = torch.corrcoef(torch.stack([value.float() for value in drawn.values()]))
    assert (correlation - torch.eye(4)).abs().max() < 0.02


def test_what_is_off_changes_nothing_and_grey_has_no_hue_to_turn():
    images, grey = torch.rand(8, 3, 32, 32), torch.rand(8, 1, 32, 32)
    assert torch.equal(augment(images, 0, 0, 0, 0)[0], images)
    assert torch.equal(augment(grey, 0, 0, 0.5, 0)[0], grey)
    assert torch.allclose(
        augment(grey.expand(-1, 3, -1, -1), 0, 0, 0.5, 0)[0], grey.expand(-1, 3, -1, -1)
    )


def test_order_and_augmentation_follow_from_seed_and_epoch_alone_and_every_image_has_its_own():
    images, settings = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1), (20, 0.2, 0.1, 0.5)
    (first, order), (again, same), (other, another) = (
        epochs(images, *settings, seed=seed) for seed in (0, 0, 1)
    )
    later, third = epochs(images, *settings, numbers=(2, 3))
    assert torch.equal(first, again) and torch.equal(order, same)
    assert len(torch.cat([first, other, later]).flatten(1).unique(dim=0)) == 32
    orders = {
        tuple(places.tolist()) for places in (order, another, *third.split(8), torch.arange(8))
    }
    assert len(orders) == 5 and len({tuple(sorted(places)) for places in orders}) == 1


def test_shifts_move_each_image_by_its_own_pixels_and_mirror_the_border():
    images = torch.rand(50, 3, 32, 32)
    moved, drawn = augment(images, 0, 0, 0, 0, False, 2)
    shifts = list(zip(*drawn["shift"].tolist(), strict=True))
    assert {(-2, 2), (0, 1)} <= set(shifts) and {-2, 2} == {
        min(map(min, shifts)),
        max(map(max, shifts)),
    }
    for image, result, (down, right) in zip(images, moved, shifts, strict=True):
        padded = reference.pad(image, 2, padding_mode="reflect")
        assert torch.equal(result, reference.crop(padded, 2 - down, 2 - right, 32, 32))


def test_alternating_flips_are_drawn_once_and_inverted_every_epoch():
    rows, flipped = torch.arange(32.0).expand(200, 3, 32, 32) / 255, []
    for number in (1, 2, 3):
        pixels, places = epochs(rows, 0, 0, 0, 0.5, True, batch_size=64, numbers=[number])
        flipped.append((pixels[:, 0, 0, 0] > 0)[places.argsort()])
    assert (
        torch.equal(flipped[0], flipped[2])
        and torch.equal(flipped[0], ~flipped[1])
        and 70 < flipped[0].sum() < 130
    )
