"""How pictures are drawn from a request: what they begin with, the loop's arguments for a group of them, and the decoder.

`CallGraphs.begin` draws all noise of a request at once, so that its numbers are those of diffusers, and `PictureStart.group` takes what
belongs to some of the pictures. The loop itself is `replay.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..artifact import Artifact
from ..call.batches import RowByRow, stack_conditions
from ..call.hoist import compute_hoisted
from ..families import Family
from ..finite import refuse_nonfinite_pictures
from ..gpu.memory import explain_gpu_memory
from ..noise import Generators, choose_generators, draw_noise
from ..offload import offloadable_graphs, stay_on_device
from ..pictures import postprocess_frames, postprocess_pictures
from ..plan import Plan
from ..replay import DenoiserVariant, PlanTables, Tensors
from ..start import Blend, InitialState, initial_state
from .request import Request


@dataclass(frozen=True)
class PictureStart:
    """What a request's pictures begin with: for each its conditions [1, ...], of all the initial state and the draws [B, ...]."""

    conditions: list[Tensors]
    state: InitialState
    noise: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.conditions)


@dataclass(frozen=True)
class PictureGroup:
    """Pictures that go through the loop together, as the loop's arguments; `blend` puts the part back that a mask keeps."""

    variants: dict[str, DenoiserVariant]
    tables: PlanTables
    inputs: Tensors
    latents: torch.Tensor
    noise: list[torch.Tensor]
    blend: Blend | None


class CallGraphs:
    """The graphs of an open artifact by what they do in a call, for each of its sizes and batches. Of a call nothing is kept."""

    def __init__(self, artifact: Artifact, families: Sequence[Family]):
        self._artifact = artifact
        self._doing = f"{families[0].output_kind} were made"
        batches = artifact.manifest.batches
        self.sites = artifact.sites
        self.variants = {batch: artifact.batch_variants(batch) for batch in batches}
        self._hoisted = {
            (family.size, batch): artifact.hoisted_graphs(family.size, batch)
            for family in families
            for batch in batches
        }

        self._offloadable = () if artifact.offloaded else offloadable_graphs(artifact.manifest, self.variants[1])

    def begin(self, request: Request) -> PictureStart:
        """What the request's pictures begin with. Raises RequestError for prompts, pictures, latents and generators that do not fit
        each other."""
        family = request.family
        with stay_on_device():
            conditions = family.conditions(request.given, request.guidance_scale)
        conditions = [c for c in conditions for _ in range(request.count)]
        generators = choose_generators(request.seed, request.generator, len(conditions))
        with stay_on_device():
            state = initial_state(family, self._artifact, request.plan, request.start, len(conditions), generators)
        return PictureStart(conditions, state, self._draw(request.plan, state.latents.shape, generators))

    def _draw(self, plan: Plan, shape: torch.Size, generators: Generators) -> list[torch.Tensor]:
        """A draw [B, ...] for each evaluation that adds noise, in the order in which diffusers draws them."""
        updates = [e.update for e in plan.evaluations if e.update.noise]
        draws = [[draw_noise(tuple(shape), generators) for _ in range(u.unused_draws + 1)] for u in updates]
        return [drawn[-1].to(self._artifact.device) for drawn in draws]

    def group(self, request: Request, start: PictureStart, group: slice) -> PictureGroup:
        """Some of the request's pictures, as many as one of the artifact's batches, ready for the loop."""
        batch = group.stop - group.start
        tables = request.tables(self._artifact, batch)
        inputs = stack_conditions(start.conditions[group])
        inputs = {**inputs, **{name: t[group] for name, t in start.state.inputs.items()}}
        with stay_on_device():
            inputs |= compute_hoisted(self._hoisted[request.family.size, batch], tables, inputs)
        noise = [z[group] for z in start.noise]
        return PictureGroup(
            self.variants[batch], tables, inputs, start.state.latents[group], noise, start.state.blend(group)
        )

    def shared_batches(self, graph: str) -> tuple[int, ...]:
        """How many pictures one call of that graph can be for: 1, and the numbers that a variant has a graph of its own for."""
        more = {b: variants[graph].call for b, variants in self.variants.items() if b > 1 and graph in variants}
        return (1, *(batch for batch, call in more.items() if not isinstance(call, RowByRow)))

    def decode(self, family: Family, finals: list[torch.Tensor]) -> torch.Tensor:
        """Final latents [1, ...] of each image as the decoder's pictures [B, 3, H, W], or videos [B, T, 3, H, W]. One by one: the
        decoder's activations are the largest of a call."""
        decoder = self._artifact.graph(family.graph_name("vae_decoder"))
        (name,) = (spec.name for spec in decoder.graph.outputs)
        pictures = torch.cat([decoder({"latents": family.decodable(x).contiguous()})[name] for x in finals])
        refuse_nonfinite_pictures(pictures)
        return pictures

    def explain_memory(self) -> AbstractContextManager[None]:
        """Inside, the GPU's memory that ran out is told in a sentence."""
        artifact = self._artifact
        return explain_gpu_memory(artifact.folder, self._doing, artifact.manifest, artifact.device, self._offloadable)


def count_pictures(request: Request) -> int:
    """How many pictures a request is for."""
    prompt, embeds = request.given.get("prompt"), request.given.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list | tuple) else len(embeds) if embeds is not None else 1
    return request.count * prompts


def format_output(family: Family, made: torch.Tensor, output_type: str) -> Any:
    """What the caller gets of what the decoder made, or of latents: images, or videos' frames."""
    if output_type == "latent":
        return made
    postprocess = postprocess_frames if family.output_kind == "frames" else postprocess_pictures
    return postprocess(made, output_type)
