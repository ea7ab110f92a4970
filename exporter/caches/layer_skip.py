"""Layer skip: chosen blocks, attentions or feed-forwards pass their input on (diffusers hooks/layer_skip.py, 0.42.1).

No value is stored. Diffusers' guiders use it for an extra, worse prediction to steer away from (skip layer guidance,
perturbed attention guidance); as a plan it drops layers in a range of steps, in one branch of guidance or in both.
Where diffusers' hook cannot do what its table says, this does it: a block that returns text before image (FLUX, SD3)
hands both streams on in their own places, where the hook swaps them, and any attention can be skipped, not only those
whose processor is in diffusers' registry.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...runtime.errors import ExportError
from ..sites.layout import Layout, Place, PlaceKind
from ..sites.marks import Mark
from ..tables import ConflictError
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory

LayerIndex = Annotated[int, Field(ge=0)]


class LayerSkip(CacheMethod):
    """Layers that return their input; names and meaning of diffusers' `LayerSkipConfig`.

    `indices` are of the list of blocks called `fqn` ("auto": the model's only one). Attention and feed-forward together
    are the whole block. `skip_attention_scores` keeps the values of self attention and lets every token attend to itself.
    Cross attention is never skipped alone. Layers are skipped from step `int(start * steps)` until before
    `int(stop * steps)`, in `branch` of classifier-free guidance: as its own start and stop count in diffusers, where
    SkipLayerGuidance and PerturbedAttentionGuidance begin one step later.
    """

    method: Literal["layer_skip"] = "layer_skip"
    indices: Annotated[tuple[LayerIndex, ...], Field(strict=False, min_length=1)]
    fqn: str = "auto"
    skip_attention: bool = True
    skip_attention_scores: bool = False
    skip_ff: bool = True
    dropout: float = Field(default=1.0, ge=0, le=1)
    start: float = Field(default=0.0, ge=0, le=1)
    stop: float = Field(default=1.0, ge=0, le=1)
    branch: Literal["cond", "uncond", "both"] = "both"

    @model_validator(mode="after")
    def _is_one_thing(self) -> LayerSkip:
        problems = []
        if self.dropout != 1.0:
            problems.append(
                (("dropout",), f"key 'dropout': {self.dropout} drops at random, which no plan can replay; leave it 1.0")
            )
        if self.skip_attention and self.skip_attention_scores:
            problems.append(
                (
                    ("skip_attention", "skip_attention_scores"),
                    "keys 'skip_attention' and 'skip_attention_scores' exclude each other; set one of them to false",
                )
            )
        if not (self.skip_attention or self.skip_attention_scores or self.skip_ff):
            problems.append(
                (
                    ("skip_attention", "skip_ff"),
                    "keys 'skip_attention', 'skip_attention_scores', 'skip_ff': all are false; set one",
                )
            )
        if self.start >= self.stop:
            problems.append(
                (("start", "stop"), f"key 'start': expected less than stop = {self.stop}, got {self.start}")
            )
        if problems:
            raise ConflictError(*problems)
        return self


def schedule(cache: LayerSkip, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site for each skipped module. Raises ExportError for a list, an index, a part or a branch that is not there."""
    marks = tuple(m for branch in choose_branches(cache, layout) for m in mark_layers(cache, layout, branch))
    steps = trajectory.steps or tuple(range(len(trajectory.timesteps)))
    count = steps[-1] + 1
    skips = range(int(cache.start * count), int(cache.stop * count))
    identity = Decision({m.name: "identity" for m in marks})
    return Schedule(marks, tuple(identity if step in skips else Decision() for step in steps))


def choose_branches(cache: LayerSkip, layout: Layout) -> tuple[str, ...]:
    if cache.branch == "both":
        return layout.branches
    if cache.branch not in layout.branches:
        raise ExportError(
            f"cache.branch {cache.branch!r}: the model runs without classifier-free guidance and has one branch only; "
            'set cache.branch = "both"'
        )
    return (cache.branch,)


def mark_layers(cache: LayerSkip, layout: Layout, branch: str) -> list[Mark]:
    """The sites of one branch, block by block."""
    stack = find_layers(cache, layout, branch)
    if missing := [i for i in cache.indices if i not in stack]:
        raise ExportError(f"cache.indices {missing} are not in the model; it has {layout.names(stack.values())}")
    blocks = [stack[i] for i in sorted(set(cache.indices))]
    if cache.skip_attention and cache.skip_ff:
        return [b.mark() for b in blocks]
    inside = [p for b in blocks for p in layout.places if p.branch == branch and p.name.startswith(f"{b.name}.")]
    wanted: list[PlaceKind] = []
    if cache.skip_attention or cache.skip_attention_scores:
        wanted.append("attention")
    if cache.skip_ff:
        wanted.append("feed_forward")
    for kind in wanted:
        if not any(p.kind == kind for p in inside):
            raise ExportError(
                f"cache.indices {list(cache.indices)}: there is no {kind} of its own in {layout.names(blocks)}; "
                f"the model has {layout.names(layout.of(kind))}"
            )
    part = {"attention": "scores" if cache.skip_attention_scores else "output"}
    return [p.mark(part=part.get(p.kind, "output")) for p in inside if p.kind in wanted]


def find_layers(cache: LayerSkip, layout: Layout, branch: str) -> dict[int, Place]:
    """The list of blocks `cache.fqn` by index. Raises ExportError with the lists that exist, or where "auto" could be
    several: diffusers takes the first of a Python set there, which differs from process to process."""
    stacks: dict[str, dict[int, Place]] = {}
    for place in layout.places:
        parent, _, index = place.name.rpartition(".")
        if place.branch == branch and place.kind in ("block", "layer") and index.isdigit():
            stacks.setdefault(parent, {})[int(index)] = place
    if cache.fqn != "auto":
        if cache.fqn not in stacks:
            raise ExportError(
                f"cache.fqn {cache.fqn!r} is no list of blocks of the model; it has {', '.join(stacks) or 'none'}"
            )
        return stacks[cache.fqn]
    found = list(dict.fromkeys(p.name.rpartition(".")[0] for p in layout.blocks(branch)))
    if len(found) != 1:
        raise ExportError(
            f"cache.fqn 'auto' needs a model with one list of transformer blocks; it has {', '.join(found or stacks) or 'none'}; "
            "name one"
        )
    return stacks[found[0]]
