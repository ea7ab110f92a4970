"""Every family offers what `Family` says, under the same names, and both sides list the same families."""

from __future__ import annotations

import inspect

import pytest

from prebake.exporter.families.registry import FAMILIES, Family, load_family
from prebake.exporter.tiny import TINY_MODELS
from prebake.runtime.families import FAMILY_CLASSES

FUNCTIONS = {name: f for name, f in vars(Family).items() if inspect.isfunction(f) and not name.startswith("_")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_every_function_with_the_same_arguments(name):
    family = load_family(name)
    for function, declared in FUNCTIONS.items():
        expected = [p for p in inspect.signature(declared).parameters if p != "self"]
        assert list(inspect.signature(getattr(family, function)).parameters) == expected, function
    assert family.PICTURE is None or "role" in family.PICTURE or "strength" in family.PICTURE


def test_there_is_something_to_hold_them_to():
    """The canary of the test above."""
    assert {"denoiser", "other_components", "draw"} <= FUNCTIONS.keys()


def test_both_sides_and_the_tiny_models_know_the_same_families():
    assert set(FAMILIES) == set(FAMILY_CLASSES)
    assert {model.module for model in TINY_MODELS.values()} - {"sdxl_refiner"} == set(FAMILIES)


def test_no_pipeline_has_two_families():
    classes = [c for classes in FAMILIES.values() for c in classes]
    assert len(classes) == len(set(classes))
