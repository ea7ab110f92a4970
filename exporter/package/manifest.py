"""The manifest of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...runtime.manifest import Graph, Manifest, Requires, Site
from ..caches.common import calibration as calibrations
from ..load import source
from ..lower.toolchain import toolchain_versions
from ..recipe.resolve import Recipe
from ..sites.marks import Variant
from . import folder as package
from .folder import StoredWeights

if TYPE_CHECKING:
    from ..prepared_export import PreparedExport


def describe_artifact(
    folder: Path, prepared: PreparedExport, weights: StoredWeights, paths: Mapping[str, str]
) -> Manifest:
    """The manifest, still unverified."""
    backend, planned = prepared.backend, prepared.planned
    combined = {site for v in planned.variants for site in v.sites_with("combine")}
    marks = tuple(m for m in planned.marks if m.name in combined)
    variants = {v.name: v for v in planned.variants}
    graphs = []
    for group in prepared.graphs.values():
        for g in group:
            variant = variants.get(g.name.partition(".")[0], Variant(g.name, ()))
            graphs.append(
                Graph(
                    name=g.name,
                    package=paths[g.name],
                    inputs=g.inputs,
                    outputs=g.outputs,
                    stores=tuple(m.name for m in variant.stored_marks(marks)) if variant.name in variants else (),
                    combines=variant.combined_sites(marks),
                    zeros=variant.sites_with("zero"),
                    identities=variant.sites_with("identity"),
                    constants=weights.bound[g.name],
                    cost=prepared.costs[g.name],
                    kernels=g.kernels,
                    refusals=g.refusals,
                )
            )
    return Manifest(
        family=prepared.part.family_name,
        backend=prepared.recipe.compile.backend,
        reproducible=backend.reproducible(prepared.recipe.compile),
        requires=Requires(**target_machine(prepared.recipe), **backend.requires(prepared.recipe)),
        source=prepared.source,
        toolchain={**toolchain_versions(), **backend.toolchain(prepared.recipe.compile)},
        recipe=artifact_recipe(prepared).model_dump(mode="json"),
        defaults=prepared.part.defaults,
        pipeline=prepared.part.facts(prepared.graphs),
        sizes=prepared.part.size_entries(prepared.graphs),
        range=prepared.part.legal_sizes(),
        batches=prepared.recipe.shapes.batch,
        layers=prepared.layers,
        unquantized_bytes=unquantized_bytes(prepared.recipe, weights),
        channels_last=weights.channels_last,
        complex=weights.complex,
        sites=tuple(Site(name=m.name, slots=m.slots, tensors=m.tensors) for m in marks),
        graphs=tuple(graphs),
        plans={p.name: package.plan_path(p) for p in planned.plans},
        files=package.file_entries(folder),
    )


def unquantized_bytes(recipe: Recipe, weights: StoredWeights) -> dict[str, int]:
    """Component -> bytes of its weights as they would be in the precision of its part of the recipe."""
    return {
        component: said.count_unquantized_bytes(getattr(torch, component_precision(recipe, component)))
        for component, said in weights.quantized.items()
    }


def component_precision(recipe: Recipe, component: str) -> str:
    """The dtype of a component, whose name begins with its part's."""
    parts = {"text_encoder": recipe.precision.text_encoders, "vae": recipe.precision.vae}
    return next((dtype for part, dtype in parts.items() if component.startswith(part)), recipe.precision.denoiser)


def artifact_recipe(prepared: PreparedExport) -> Recipe:
    """The recipe as the artifact has it: the model by its name, the calibration as the artifact's own file."""
    recipe = prepared.recipe
    names: dict[str, Any] = {
        "id": prepared.source.model,
        "config": recipe.model.config and source.model_name(recipe.model.config),
    }
    added = {"lora": prepared.source.loras, "textual_inversion": prepared.source.inversions}
    for key, found in added.items():
        pairs = zip(getattr(recipe.model, key), found, strict=True)
        names[key] = tuple(asked.model_copy(update={"path": one.name}) for asked, one in pairs)
    changes: dict[str, Any] = {"model": recipe.model.model_copy(update=names)}
    if prepared.calibration:
        changes["cache"] = recipe.cache.model_copy(update={"calibration": calibrations.CALIBRATION_FILE})
    return recipe.model_copy(update=changes)


def target_machine(recipe: Recipe) -> dict[str, Any]:
    """System, processor family and device, as `Requires` names them."""
    import platform

    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "device": recipe.compile.device,
    }
