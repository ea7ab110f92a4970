"""The call contract: what a call of a family gives to an artifact's graphs and takes from them, held against the manifest.

An open artifact and its family come in, sentences come out. Code takes whatever memory it is given, so graphs that do not
fit each other or their family are found here, by `load` and `prebake check` alike, and not by the first call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..artifact import Artifact
from ..bounds import MAX_EMBEDDING, MAX_LATENTS
from ..call.hoist import hoist_problems, hoisted_facts
from ..contract import SpecFacts, describe_misfits, spec_facts, torch_dtype
from ..manifest import PROLOGUE, STEP, Graph, TensorSpec, batch_graph_name
from ..plan import size_plan_name

if TYPE_CHECKING:
    from . import Family, PictureInput


def call_problems(artifact: Artifact, family: Family) -> Iterator[str]:
    """What a call would give to the graphs, or take from them, that they have not; nothing is computed for it. In an artifact of a range
    that is looked at for the default size and the ends of the range: dimensions are lines between them."""
    yield from _default_problems(artifact, family)
    if math.prod(family.settings.latents_shape) > MAX_LATENTS:
        yield f"[{size_prefix(family)}pipeline.latents_shape]: {list(family.settings.latents_shape)} has more than {MAX_LATENTS} numbers"
        return
    if family.range is None:
        yield from _graph_problems(artifact, family)
        return
    usual = family.settings.latents_shape
    if family.range.latents_at(family.height, family.width) != usual:
        yield f"[range.latents_shape]: {list(family.range.latents_shape)} is not [pipeline.latents_shape], {list(usual)}, at the default size"
        return
    for size in dict.fromkeys(((family.height, family.width), *family.range.corners)):
        yield from _graph_problems(artifact, family.at(*size))


def _default_problems(artifact: Artifact, family: Family) -> Iterator[str]:
    """What of the manifest's defaults no call could have."""
    manifest, kind = artifact.manifest, family.output_kind
    defaults = manifest.defaults
    plan = size_plan_name(str(defaults.num_inference_steps), family.size)
    if (defaults.num_frames is None) != (kind == "images"):
        yield f"[defaults.num_frames]: is {defaults.num_frames}, this family makes {kind}"
    if plan not in manifest.plans:
        had = ", ".join(manifest.plans) or "none"
        at = f" at {family.size}" if family.size else ""
        yield f"[defaults.num_inference_steps]: there is no plan of {defaults.num_inference_steps} steps{at}, it has {had}"


def _graph_problems(artifact: Artifact, family: Family) -> Iterator[str]:
    """What the graphs have not, at the family's size."""
    settings, kind, size = family.settings, family.output_kind, (family.height, family.width)
    latents = TensorSpec(name="hidden_states", shape=(1, *family.latents_shape), dtype="float32")
    yield from _denoiser_problems(artifact, family, latents)
    decoder = artifact.graph(family.graph_name("vae_decoder")).graph.at(*size)
    decoded = settings.latents_shape if family.range else family.latents_shape
    yield from _decoder_problems(decoder, latents.model_copy(update={"shape": (1, *decoded)}), (3, *size), kind)
    if settings.picture:
        encoder = artifact.graph(family.graph_name("vae_encoder")).graph.at(*size)
        yield from _encoder_problems(encoder, settings.picture, settings.latents_shape)


def size_prefix(family: Family) -> str:
    """Where in the manifest the size's own table stands."""
    return f"sizes.{family.size}." if family.size else ""


def _denoiser_problems(artifact: Artifact, family: Family, latents: TensorSpec) -> Iterator[str]:
    """What the loop gives to each variant, and takes from it."""
    text, size = artifact.graph(family.settings.text.graph).graph, (family.height, family.width)
    if large := [spec.name for spec in text.outputs if math.prod(spec.shape) > MAX_EMBEDDING]:
        yield f"[graphs.{text.name}.outputs]: {large[0]!r} has more than {MAX_EMBEDDING} numbers"
        return
    if empty := [spec.name for spec in text.outputs if spec.shape[:1] != (1,)]:
        yield f"[graphs.{text.name}.outputs]: {empty[0]!r} is not of one text"
        return
    given = {latents.name: (latents.shape, latents.dtype), "timestep": ((1,), "float32")}
    given |= {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in family.example_condition().items()
    }
    if (picture := family.settings.picture) and picture.role == "reference":
        given["image_latents"] = (latents.shape, latents.dtype)
    names = {name for plan in artifact.plans.values() if plan.size == family.size for name in plan.variants()}
    for batch in artifact.manifest.batches:
        graphs = (artifact.graphs.get(batch_graph_name(name, batch)) for name in sorted(names))
        variants = [
            bound.graph.at(*size) for bound in graphs if bound
        ]  # what has none for that many is called row by row
        rows = {name: ((batch, *shape[1:]), dtype) for name, (shape, dtype) in given.items()}
        before = {plain: batch_graph_name(family.graph_name(plain), batch) for plain in (PROLOGUE, STEP)}
        hoisted = {
            plain: artifact.graphs[name].graph.at(*size) for plain, name in before.items() if name in artifact.graphs
        }
        yield from hoist_problems(hoisted, rows)
        passed = hoisted_facts(hoisted)
        for graph in variants:
            own = {name: passed[name] for name in graph.hoisted if name in passed}
            yield from _variant_problems(graph, {**rows, **own}, batch)
        yield from _slot_misfits(artifact, variants)


def _variant_problems(graph: Graph, given: SpecFacts, batch: int) -> Iterator[str]:
    """What a call for `batch` pictures gives to one variant, and takes from it."""
    taken = dict(spec_facts(spec for spec in graph.inputs if "@" not in spec.name))
    if not graph.combines and "coefficients" in taken:
        yield f"[graphs.{graph.name}.inputs]: takes coefficients, and combines nothing"
    shape, dtype = taken.pop("coefficients", ((batch, 0), "float32"))
    if dtype != "float32" or len(shape) != 2 or shape[0] != batch:
        yield f"[graphs.{graph.name}.inputs]: its coefficients are not float32 [{batch}, K], but {dtype} {list(shape)}"
    yield from describe_misfits(f"[graphs.{graph.name}.inputs]", given, taken)
    made = spec_facts(spec for spec in graph.outputs if spec.name == "sample")
    yield from describe_misfits(f"[graphs.{graph.name}.outputs]", {"sample": given["hidden_states"]}, made)


def _slot_misfits(artifact: Artifact, graphs: Sequence[Graph]) -> Iterator[str]:
    """What one variant stores, another combines: it is of one shape and dtype."""
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    tensors = {site.name: site.tensors for site in artifact.manifest.sites}
    for graph in graphs:
        names = {name for site in graph.stores for name in tensors[site]}
        for spec in graph.outputs:
            if spec.name in names and stored.setdefault(spec.name, (spec.shape, spec.dtype)) != (
                spec.shape,
                spec.dtype,
            ):
                yield f"[graphs.{graph.name}.outputs]: stores {spec.name!r} in another shape or dtype than other variants"
    for graph in graphs:
        for spec in graph.inputs:
            name, at, _ = spec.name.rpartition("@")
            if at and name in stored and stored[name] != (spec.shape, spec.dtype):
                yield f"[graphs.{graph.name}.inputs]: {spec.name!r} has another shape or dtype than what is stored"


def _decoder_problems(graph: Graph, latents: TensorSpec, picture: tuple[int, int, int], kind: str) -> Iterator[str]:
    taken = spec_facts(graph.inputs)
    yield from describe_misfits(f"[graphs.{graph.name}.inputs]", {"latents": (latents.shape, latents.dtype)}, taken)
    made = [tuple(spec.shape) for spec in graph.outputs if torch_dtype(spec.dtype).is_floating_point]
    rank = 4 if kind == "images" else 5
    if (
        len(graph.outputs) != 1
        or len(made) != 1
        or len(made[0]) != rank
        or (made[0][0], *made[0][-3:]) != (1, *picture)
    ):
        size = f"[1, {'' if kind == 'images' else 'T, '}{', '.join(map(str, picture))}]"
        yield f"[graphs.{graph.name}.outputs]: expected one tensor {size} of floats, by the defaults' height and width"


def _encoder_problems(graph: Graph, picture: PictureInput, latents: tuple[int, ...]) -> Iterator[str]:
    taken = spec_facts(graph.inputs)
    image = ((1, 3, picture.height, picture.width), "float32")
    yield from describe_misfits(f"[graphs.{graph.name}.inputs]", {"image": image}, taken)
    made = spec_facts(graph.outputs)
    yield from describe_misfits(
        f"[graphs.{graph.name}.outputs]", dict.fromkeys(("mean", "std"), ((1, *latents), "float32")), made
    )
