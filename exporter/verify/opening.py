"""Opening: an artifact as what draws, and its pipeline as what it is held against."""

from __future__ import annotations

from pathlib import Path

from ...runtime.artifact import Artifact
from ...runtime.manifest import ATTACH_FAMILY, Manifest
from ...runtime.plan import PLAN_INPUTS_FILE
from ..families.registry import load_family
from ..plan.inputs import read_plan_inputs
from ..recipe.resolve import Recipe
from . import denoiser_alone as attached
from .placement import reference_device, reference_dtype
from .reference import EagerReference, Reference
from .replayer import Replayer
from .source_pipeline import load_source_pipeline


def open_replayer(artifact: Artifact, recipe: Recipe, model: str) -> Replayer | attached.AttachedReplayer:
    """What draws with the artifact: the artifact itself, or of a denoiser alone its pipeline, loaded from `model` if it draws."""
    if artifact.manifest.family == ATTACH_FAMILY:
        return attached.AttachedReplayer(artifact, recipe, model)
    return Replayer(artifact)


def load_reference(folder: Path, manifest: Manifest, recipe: Recipe, model: str) -> EagerReference:
    """The manifest's pipeline, loaded again as `verify.reference` says and left as it is, with the recipe's scheduler.

    Raises RecipeError when `model` is not the one that the artifact was made of.
    """
    device = reference_device(recipe)
    loaded = load_source_pipeline(manifest, recipe, model, reference_dtype(recipe))
    if manifest.family == ATTACH_FAMILY:
        return attached.AttachedReference(recipe, loaded, manifest.whole_graphs, device)
    listed = {entry.path for entry in manifest.files}
    inputs = read_plan_inputs(folder, manifest) if PLAN_INPUTS_FILE in listed else None
    return Reference(loaded.pipe, load_family(manifest.family), manifest, recipe.guidance, inputs, device)
