"""Replayer: an open artifact that draws as it does for its user, with the calls of its graphs on record.

The artifact is called through the runtime's `Pipeline`; its graphs are tapped, so that every evaluation's inputs, outputs and time are
seen and no loop is written twice. Times are wall times on the CPU.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...runtime.artifact import Artifact, BoundGraph
from ...runtime.manifest import Graph
from ...runtime.pipeline import Pipeline
from ...runtime.plan import Plan
from ..families.picture import Size, example_picture
from .range_probes import choose_family


@dataclass(frozen=True)
class GraphCall:
    """One call of one graph. What it stored to sites is left out, and what it read from them is in `stored` only where that was
    asked for: it can be larger than the latents by far."""

    graph: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    ms: float
    stored: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnPicture:
    """A picture [1, 3, H, W] in 0..1, or a video [1, T, 3, H, W], the final latents it was decoded from, and the wall time
    of the whole call."""

    image: Tensor
    latents: Tensor
    seconds: float
    calls: tuple[GraphCall, ...] = ()


class EnoughCallsError(Exception):
    """As many calls are on record as were asked for."""


STORED_BYTES = 1 << 30  # of stored values on record; what is more is left out, and the evaluation not replayed in eager


class CallRecord:
    """The calls of a picture, and the least seconds that a call of each graph ever took. With a `limit`, the call that reaches
    it raises EnoughCallsError to whoever draws. `stored` are the evaluations whose stored values are kept."""

    def __init__(self) -> None:
        self.calls: list[GraphCall] = []
        self.seconds: dict[str, float] = {}
        self.limit: int | None = None
        self.stored: Collection[int] = ()
        self._evaluations = self._stored_bytes = 0

    def clear(self, stored: Collection[int] = ()) -> None:
        """Begins another picture."""
        self.calls.clear()
        self.stored, self._evaluations, self._stored_bytes = stored, 0, 0

    def keep_stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the stored values of one evaluation those that are to be kept."""
        e, self._evaluations = self._evaluations, self._evaluations + 1
        self._stored_bytes += sum(t.nbytes for t in values.values()) if e in self.stored else 0
        return (
            {n: t.cpu() for n, t in values.items()} if e in self.stored and self._stored_bytes <= STORED_BYTES else {}
        )

    def add(self, call: GraphCall) -> None:
        self.calls.append(call)
        self.seconds[call.graph] = min(call.ms / 1e3, self.seconds.get(call.graph, math.inf))
        if len(self.calls) == self.limit:
            raise EnoughCallsError


class GraphTap(BoundGraph):
    """A bound graph that puts every call on record, in the CPU's memory: the pipeline that it is compared with is there."""

    def __init__(self, bound: BoundGraph, sites: Iterable[str], record: CallRecord) -> None:
        self.graph: Graph = bound.graph
        self._bound, self._sites, self.record = bound, frozenset(sites), record

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start = time.perf_counter()
        outputs = self._bound(inputs)
        if any(t.is_cuda for t in outputs.values()):
            torch.cuda.synchronize()  # the call returned when its work was queued
        ms = (time.perf_counter() - start) * 1e3
        given = {name: t.cpu() for name, t in inputs.items() if ":" not in name}
        came = {name: t.cpu() for name, t in outputs.items() if name not in self._sites}
        stored = self.record.keep_stored({n: t for n, t in inputs.items() if "@" in n}) if "sample" in outputs else {}
        self.record.add(GraphCall(self.graph.name, given, came, ms, stored))
        return outputs


def tap_graphs(artifact: Artifact, record: CallRecord) -> dict[str, GraphTap]:
    """The artifact's graphs, with every call on record."""
    sites = {tensor for site in artifact.manifest.sites for tensor in site.tensors}
    return {name: GraphTap(bound, sites, record) for name, bound in artifact.graphs.items()}


class ArtifactReplayer(Protocol):
    """What draws with an artifact: `Replayer`, or of a denoiser alone `AttachedReplayer`."""

    artifact: Artifact

    @property
    def graph_seconds(self) -> Mapping[str, float]: ...
    def draw(self, prompt: str, seed: int, plan: Plan, *, stored: Collection[int] = ()) -> DrawnPicture: ...
    def trace(
        self, prompt: str, seed: int, plan: Plan, steps: int, stored: Collection[int] = ()
    ) -> Sequence[GraphCall]: ...
    def only(self, plans: Mapping[str, Plan]) -> ArtifactReplayer: ...
    def evaluations(self, drawn: DrawnPicture) -> Sequence[GraphCall]: ...


class Replayer:
    """An open artifact that draws as it does for its user, with the calls of its graphs on record.

    Where a picture is required it gets `families.picture.example` of the seed, as the family's own `draw` gives it to eager.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.variants = frozenset(artifact.variants)
        self.record = CallRecord()
        taps = tap_graphs(artifact, self.record)
        compared = artifact.manifest.model_copy(
            update={"unverified": ()}
        )  # or about to be, so that nobody need be told
        self._pipe = Pipeline(replace(artifact, graphs=taps, manifest=compared))
        self._pipe.set_progress_bar_config(disable=True)

    @property
    def graph_seconds(self) -> Mapping[str, float]:
        """The least seconds of a call, of each graph that was ever called."""
        return self.record.seconds

    def draw(
        self, prompt: str, seed: int, plan: Plan, steps: int | None = None, *, stored: Collection[int] = ()
    ) -> DrawnPicture:
        """One picture by that plan, or what the decoder makes of the latents after its first `steps`. What the evaluations in `stored`
        read from sites goes on record."""
        self.record.clear(stored)
        arguments = call_arguments(self._pipe, seed, plan)
        if steps is not None and steps < plan.steps:
            arguments["callback_on_step_end"] = stop_after(steps)
        start = time.perf_counter()
        with warnings.catch_warnings():  # of the exporter's own prompts, which the pipeline cuts at the same place
            warnings.filterwarnings("ignore", "the prompt is longer")
            output: Any = self._pipe(prompt, **arguments)
        seconds = time.perf_counter() - start
        calls = tuple(self.record.calls)
        latents = next(c.inputs["latents"] for c in calls if c.graph.partition(".")[0] == "vae_decoder")
        if self._pipe.range:
            latents = self._pipe.family_rules.arranged(latents)  # as diffusers has them
        return DrawnPicture(output[0].cpu(), latents, seconds, calls)

    def trace(
        self, prompt: str, seed: int, plan: Plan, steps: int, stored: Collection[int] = ()
    ) -> tuple[GraphCall, ...]:
        """The denoiser's calls of the plan's first steps."""
        return self.evaluations(self.draw(prompt, seed, plan, steps, stored=stored))

    def only(self, plans: Mapping[str, Plan]) -> Replayer:
        """A replayer of the same artifact with these plans alone."""
        fewer = Replayer(replace(self.artifact, plans=plans))
        fewer.record.seconds.update(self.record.seconds)
        return fewer

    def evaluations(self, drawn: DrawnPicture) -> tuple[GraphCall, ...]:
        """The denoiser's calls, in the order of the plan's evaluations."""
        return tuple(c for c in drawn.calls if c.graph in self.variants)


def stop_after(steps: int) -> Callable[..., dict[str, Tensor]]:
    """A callback that interrupts a call after its first steps."""

    def interrupt(pipe: Any, step: int, _timestep: float, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step + 1 >= steps
        return {}

    return interrupt


def call_arguments(pipe: Pipeline, seed: int, plan: Plan) -> dict[str, Any]:
    """What an artifact is called with, besides the prompt, to draw the seed's picture by that plan."""
    size = choose_family(pipe, plan.size)
    chosen = {"seed": seed, "num_inference_steps": plan.steps, "cache": plan.cache != "none", "output_type": "pt"}
    return {"height": size.height, "width": size.width, **chosen, **example_arguments(pipe, seed, plan.size)}


def example_arguments(pipe: Pipeline, seed: int, size: str | None = None) -> dict[str, Any]:
    """The argument `image`, of the size of that name, of artifacts that draw nothing without one. Where calls begin from it they begin with the plan's
    first step: all that is in the plan is measured, and not its end alone."""
    picture = choose_family(pipe, size).settings.picture
    if picture is None or not picture.required:
        return {}
    whole = {"strength": 1.0} if picture.role == "start" else {}
    return {"image": example_picture(Size(picture.height, picture.width, 0), seed), **whole}


def image_array(image: Tensor) -> np.ndarray:
    """[1, 3, H, W] in 0..1 as float32 [H, W, 3], a video [1, T, 3, H, W] as [T, H, W, 3]; NaN is black."""
    return image[0].movedim(-3, -1).float().nan_to_num().cpu().numpy()
