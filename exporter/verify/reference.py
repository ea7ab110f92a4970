"""Reference: the diffusers pipeline, in float32 or what the recipe says, that an artifact was made of, as diffusers runs it.

It draws the pictures that the artifact is held against, and evaluates its denoiser at the artifact's own inputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...runtime.manifest import Manifest, size_graph_name
from ..families.picture import VAE_ENCODER, read_sizes
from ..families.registry import Family
from ..plan.inputs import PlanInputs
from ..recipe.schema import Guidance
from ..sites.actions import VariantModule
from ..sites.component import Component
from .placement import place_pipeline
from .replayer import DrawnPicture, GraphCall


def cast_components(pipe: Any, dtype: torch.dtype) -> None:
    """Every weight of the pipeline in that dtype, but for what its models keep in float32."""
    for component in pipe.components.values():
        if not isinstance(component, nn.Module):
            continue
        kept = set(getattr(component, "_keep_in_fp32_modules", None) or ())
        wide = [m for name, m in component.named_modules() if kept & set(name.split("."))]
        nn.Module.to(component, dtype)  # diffusers' own warns of what is kept, also of nothing
        for module in wide:
            nn.Module.to(module, torch.float32)


def component_weights(components: Iterable[Component]) -> dict[str, Tensor]:
    """Parameters and buffers, as `<component>.<its name there>`, each under all of its names."""
    return {
        f"{component.name}.{name}": tensor.detach()
        for component in components
        for every in (component.module.named_parameters, component.module.named_buffers)
        for name, tensor in every(remove_duplicate=False)
    }


class EagerReference(Protocol):
    """What an artifact is held against: `Reference`, or `AttachedReference`."""

    @property
    def pipe(self) -> Any: ...
    def weights(self) -> dict[str, Tensor]: ...
    @property
    def scheduler(self) -> str: ...
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture: ...
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]: ...
    def is_whole(self, call: GraphCall) -> bool: ...
    def evaluate_variant(self, call: GraphCall) -> Tensor | None: ...
    def cast_to_bfloat16(self) -> None: ...


class Reference:
    """The pipeline as diffusers runs it: nothing fused, quantized, cached or compiled. `family` is its exporter module,
    `guidance` the recipe's table. With `inputs`, the artifact's sites and variants are known, and a variant can run in eager."""

    def __init__(
        self,
        pipe: Any,
        family: Family,
        manifest: Manifest,
        guidance: Guidance,
        inputs: PlanInputs | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._pipe, self._family, self._guidance, self._inputs = pipe, family, guidance, inputs
        self._sizes, self._guidance_scale = read_sizes(manifest), manifest.defaults.guidance_scale
        self._is_ranged = manifest.range is not None
        self._whole = manifest.whole_graphs
        self._has_encoder = any(graph.name.partition(".")[0] == VAE_ENCODER for graph in manifest.graphs)
        self._variants = {v.name: v for v in inputs.all_variants()} if inputs else {}
        self._device = device or torch.device("cpu")
        self._denoisers = self._build_denoisers()
        place_pipeline(pipe, self._device)
        self._move_denoisers()

    def _move_denoisers(self) -> None:
        """What the denoisers have beside the pipeline's own modules goes where those are."""
        if self._device.type != "cpu":
            for denoiser in self._denoisers.values():
                denoiser.module.to(self._device)

    def _build_denoisers(self) -> dict[str, Component]:
        build = self._family.range_denoiser if self._is_ranged else self._family.denoiser
        return {
            size_graph_name("", name): build(self._pipe, size, self._guidance) for name, size in self._sizes.items()
        }

    @property
    def pipe(self) -> Any:
        """The pipeline itself, whose scheduler is the one that the artifact's plans shall follow."""
        return self._pipe

    @property
    def scheduler(self) -> str:
        """The class, as a plan names it."""
        return type(self._pipe.scheduler).__name__

    def weights(self) -> dict[str, Tensor]:
        """Everything that the components hold, as `<component>.<its name there>`."""
        others = self._family.other_components(
            self._pipe, self._sizes[None], channels_last=False, picture=self._has_encoder
        )
        return component_weights((self._denoisers[""], *others))

    def cast_to_bfloat16(self) -> None:
        """From here on the pipeline is what `from_pretrained(torch_dtype=torch.bfloat16)` gives."""
        cast_components(self._pipe, torch.bfloat16)
        self._denoisers = self._build_denoisers()
        self._move_denoisers()

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture:
        start = time.perf_counter()
        latents, image = self._family.draw(self._pipe, prompt, seed, steps, self._guidance_scale, self._sizes[None])
        image, latents = image.float().cpu(), latents.float().cpu()
        return DrawnPicture(image, latents, time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]:
        """The denoiser's output at this call's inputs (the artifact's own, so errors do not add up), and its milliseconds."""
        denoiser = self._denoiser(call)
        args = self._own_inputs(denoiser, call)
        start = time.perf_counter()
        sample = denoiser.module(*args).cpu()
        return sample, (time.perf_counter() - start) * 1e3

    def is_whole(self, call: GraphCall) -> bool:
        """Whether the call computes everything, so that `evaluate` does the same."""
        return call.graph in self._whole

    @torch.no_grad()
    def evaluate_variant(self, call: GraphCall) -> Tensor | None:
        """The output of the same variant, uncompiled, at this call's inputs and stored values; None where they are not known."""
        variant = self._variants.get(call.graph.partition(".")[0])
        if self._inputs is None or variant is None:
            return None
        denoiser = self._denoiser(call)
        module = VariantModule(denoiser.module, self._inputs.marks, variant, denoiser.inputs)
        further = module.inputs[len(denoiser.inputs) :]
        given = {**call.inputs, **call.stored}
        if any(name not in given for name in further):
            return None
        slots = (given[name].to(self._device, torch.float32) for name in further)
        return module(*self._own_inputs(denoiser, call), *slots)[0].cpu()

    def _denoiser(self, call: GraphCall) -> Component:
        return self._denoisers[call.graph.removeprefix(call.graph.partition(".")[0])]

    def _own_inputs(self, denoiser: Component, call: GraphCall) -> list[Tensor]:
        """The call's inputs in the dtypes that the pipeline's own components give."""
        given = (call.inputs[name] for name in denoiser.inputs)
        return [t.to(self._device, like.dtype) for t, like in zip(given, denoiser.args, strict=True)]
