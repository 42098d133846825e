"""The batched augmentation against torchvision's, image by image."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

import common


def random_images(count, size=(32, 32)):
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(0)).float() / 255


def reference_augment(image, angle, brightness, hue, flip):
    image = reference.rotate(image, angle.item())
    image = reference.adjust_hue(reference.adjust_brightness(image, brightness.item()), hue.item())
    return reference.horizontal_flip(image) if flip else image


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equals_torchvision_image_by_image(size):
    augmentation = common.Augmentation(rotation=20, brightness=0.2, hue=0.1, flip=0.5)
    images = random_images(100, size)
    parameters = augmentation.draw(100, torch.Generator().manual_seed(1))
    ours = augmentation.apply(images, **parameters)
    for i in range(100):
        theirs = reference_augment(images[i], *(parameters[name][i] for name in ("angle", "brightness", "hue", "flip")))
        assert ((ours[i] - theirs).abs() * 255).max() <= 1


def test_grey_black_and_white_pixels_keep_their_colour_when_the_hue_turns():
    levels = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.allclose(common.shift_hue(levels, torch.tensor([0.3])), levels)


def test_each_image_has_parameters_of_its_own():
    augmentation = common.Augmentation(rotation=20, brightness=0.2, hue=0.1, flip=0.5)
    parameters = augmentation.draw(64, torch.Generator().manual_seed(1))
    for name in ("angle", "brightness", "hue"):
        assert len(parameters[name].unique()) == 64
    batch = random_images(1).expand(64, -1, -1, -1)
    changed = augmentation.apply(batch, **parameters)
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 64


def test_parameters_have_the_right_distribution():
    augmentation = common.Augmentation(rotation=20, brightness=0.2, hue=0.1, flip=0.25)
    parameters = augmentation.draw(100_000, torch.Generator().manual_seed(1))
    for name, low, high in (("angle", -20, 20), ("brightness", 0.8, 1.2), ("hue", -0.1, 0.1)):
        values = parameters[name]
        assert low <= values.min() and values.max() <= high
        counts = torch.histc(values, 10, low, high)
        # 10,000 +- 95 expected in each tenth of the range: five standard deviations.
        assert (counts - 10_000).abs().max() < 475, name
    assert abs(parameters["flip"].float().mean().item() - 0.25) < 0.007
    correlation = torch.corrcoef(torch.stack([value.float() for value in parameters.values()]))
    assert (correlation - torch.eye(4)).abs().max() < 0.02


def test_what_is_switched_off_changes_nothing():
    images = random_images(8)
    off = common.Augmentation(rotation=0, brightness=0, hue=0, flip=0)
    assert torch.equal(off.apply(images, **off.draw(8, torch.Generator().manual_seed(1))), images)


def test_order_and_augmentation_follow_from_seed_and_epoch_alone():
    labels = torch.arange(10)
    images = common.ImageSet((random_images(10) * 255).byte(), labels, [str(i) for i in range(10)])
    augmentation = common.Augmentation(20, 0.2, 0.1, 0.5)

    def epoch(number, seed=0):
        loader = common.Loader(images, 4, [0.5] * 3, [0.5] * 3, augmentation, seed)
        torch.rand(3)  # other draws in between do not matter
        pixels, order = zip(*loader.batches(number), strict=True)
        return torch.cat(pixels), torch.cat(order)

    first, again, later, other = epoch(1), epoch(1), epoch(2), epoch(1, seed=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert sorted(first[1].tolist()) == list(range(10))
    assert not torch.equal(first[1], later[1]) and not torch.equal(first[1], other[1])


def test_shifts_move_each_image_by_its_own_pixels_and_mirror_the_border():
    images = random_images(50)
    augmentation = common.Augmentation(rotation=0, brightness=0, hue=0, flip=0, shift=2)
    parameters = augmentation.draw(50, torch.Generator().manual_seed(1))
    moved, (down, right) = augmentation.apply(images, **parameters), parameters["shift"].tolist()
    assert {(-2, 2), (0, 1)} <= set(zip(down, right, strict=True)) and min(down) == -2 and max(right) == 2
    for i in range(50):
        padded = reference.pad(images[i], 2, padding_mode="reflect")
        assert torch.equal(moved[i], reference.crop(padded, 2 - down[i], 2 - right[i], 32, 32))


def test_alternating_flips_are_drawn_once_and_inverted_every_epoch():
    rows = torch.arange(32, dtype=torch.uint8).expand(200, 3, 32, 32)
    augmentation = common.Augmentation(0, 0, 0, flip=0.5, alternate=True)
    loader = common.Loader(common.ImageSet(rows, torch.arange(200), []), 64, [0] * 3, [1] * 3, augmentation, seed=3)

    def flipped(epoch):
        return {
            int(label): bool(image[0, 0, 0] > 0)
            for images, labels in loader.batches(epoch)
            for image, label in zip(images, labels, strict=True)
        }

    first, second, third = flipped(1), flipped(2), flipped(3)
    assert first == third and all(first[i] != second[i] for i in range(200))
    assert 70 < sum(first.values()) < 130


def test_images_are_resized_to_the_side_that_is_asked_for():
    images = common.ImageSet((random_images(10) * 255).byte(), torch.arange(10), [])
    loader = common.Loader(images, 4, [0.5] * 3, [0.5] * 3)
    [small, *_], [whole, *_] = zip(*loader.batches(side=16), strict=True), zip(*loader.batches(), strict=True)
    assert [len(batch) for batch in small] == [4, 4, 2] and small[0].shape[2:] == (16, 16)
    assert torch.allclose(small[0].mean(), whole[0].mean(), atol=0.01)
    assert torch.equal(next(loader.batches(side=32))[0], whole[0])
