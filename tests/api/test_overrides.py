"""Overrides as Python values are those of the command line, and what is wrong with one names it."""

from __future__ import annotations

import pytest

from prebake.errors import RecipeError, RequestError
from prebake.exporter.package.folder import stage_folder
from prebake.exporter.recipe.resolve import change_recipe, resolve

VALUES = {"sampler.steps": 20, "verify.seeds": 1, "sampler.guidance_scale": None}


def test_values_resolve_as_their_texts_do():
    recipe = resolve("baseline", VALUES, "tiny:flux")
    assert recipe == resolve("baseline", ["sampler.steps=20", "verify.seeds=1"], "tiny:flux")
    assert change_recipe(recipe, "a recipe", {}) == recipe
    changed = change_recipe(recipe, "a recipe", {"sampler.steps": (2, 3)}, "shapes")
    assert (changed.sampler.steps, changed.model.id) == ((2, 3), "shapes")


@pytest.mark.parametrize("key", ["sampler.steps", "samplr.steps", "cache", "cache.method"])
def test_a_wrong_one_is_named(key):
    with pytest.raises(RecipeError, match=rf"^overrides\['{key}'\]: "):
        resolve("baseline", {key: "x"})


def test_an_output_that_exists_is_the_callers(tmp_path):
    with pytest.raises(RequestError, match="already exists") as caught, stage_folder(tmp_path, force=False):
        pass
    assert (caught.value.exit_code, caught.value.http_status) == (2, 400)
