"""Source pipeline: the diffusers pipeline and the recipe that an artifact was made of, found again by what its manifest says."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from ...runtime.errors import ArtifactError, RecipeError, describe_schema_error
from ...runtime.manifest import Manifest
from ..load import source
from ..recipe.resolve import Recipe
from ..settle import load_pipeline


def load_source_pipeline(manifest: Manifest, recipe: Recipe, model: str, dtype: torch.dtype) -> source.LoadedPipeline:
    """The manifest's pipeline with all its weights in `dtype`, and the recipe's scheduler."""
    loaded = load_pipeline(recipe, {"default": dtype}, model)
    if loaded.source.sha256 != manifest.source.sha256:
        raise RecipeError(
            f"model {model!r}: sha256 over its files is {loaded.source.sha256}, the artifact was made of "
            f"{manifest.source.model!r} with {manifest.source.sha256}; name that one with --model, or export again"
        )
    added = (*loaded.source.loras, *loaded.source.inversions)
    for found, used in zip(added, (*manifest.source.loras, *manifest.source.inversions), strict=True):
        if found.sha256 != used.sha256:
            raise RecipeError(
                f"{used.name!r}: the sha256 of its file is {found.sha256}, the artifact was made with {used.sha256}; put that file "
                "here or beside the model, or export again"
            )
    return loaded


def source_model(manifest: Manifest) -> str:
    """The model to load where the caller names none. Raises RecipeError for a folder or file of the exporter's."""
    model = manifest.source.model
    if source.is_known_model(model):
        return model
    raise RecipeError(
        f"the artifact was made of a folder or file named {model!r}, and does not say where it lies; add --model FOLDER"
    )


def manifest_recipe(folder: Path, manifest: Manifest) -> Recipe:
    try:
        return Recipe.model_validate(manifest.recipe)
    except ValidationError as e:
        raise ArtifactError(f"{describe_schema_error(folder / 'manifest.json', e, 'recipe')}; export again") from e
