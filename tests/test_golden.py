"""Each model and each recipe does what it did. A change that is meant: see golden.py."""

import json

import golden
import pytest


@pytest.mark.parametrize("model", golden.MODELS)
def test_the_first_losses_of_a_model_are_what_they_were(model):
    """A change of a net, an optimiser, the batches or the random numbers is noticed."""
    # Other CPUs round differently, and more with each step.
    tolerance = 5e-3 if model in ("convnet", "patchnet") else 2e-3
    expected = json.loads(golden.LOSSES.read_text())[model]

    # Those of the validation tell of batch norm's statistics, too.
    for name, losses in golden.losses(model).items():
        assert losses == pytest.approx(expected[name], rel=tolerance), name


def test_the_recipes_are_what_they_were():
    """Every flag of a recipe has the value that its published results were made with."""
    found = golden.recipes()
    expected = json.loads(golden.RECIPES.read_text())
    assert found.keys() == expected.keys()

    # There may be flags that are new.
    for recipe, flags in expected.items():
        assert found[recipe] | flags == found[recipe], recipe
