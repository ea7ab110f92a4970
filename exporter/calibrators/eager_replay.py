"""A plan replayed in eager: the same loop as the runtime's, over the uncompiled modules. The oracle between a peer's own
hooks and the artifact: peers are compared with this, and the artifact is compared with this."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...runtime.manifest import Cost, Graph, Site
from ...runtime.plan import Plan
from ...runtime.replay import DenoiserVariant as RuntimeVariant
from ...runtime.replay import replay, tabulate_plan
from ..capture.capture import tensor_specs
from ..plan import PlanSet
from ..sites.actions import VariantModule
from ..sites.component import Component
from ..sites.marks import Variant

ZERO_COST = Cost(flops=0, ops=0, constants=0, constants_bytes=0)


def describe_sites(planned: PlanSet) -> dict[str, Site]:
    """The sites as `replay` takes them: those of which something is stored."""
    return {m.name: Site(name=m.name, slots=m.slots, tensors=m.tensors) for m in planned.marks if m.tensors}


def eager_variants(denoiser: Component, planned: PlanSet) -> dict[str, RuntimeVariant]:
    """Variant name -> something `replay` can call, as the artifact's variants are."""
    return {v.name: eager_variant(denoiser, planned, v) for v in planned.variants}


def eager_variant(denoiser: Component, planned: PlanSet, variant: Variant) -> RuntimeVariant:
    module = VariantModule(denoiser.module, planned.marks, variant, denoiser.inputs)
    graph = Graph(
        name=variant.name,
        package="eager",
        inputs=tensor_specs(denoiser.inputs, denoiser.args),
        outputs=(),
        stores=tuple(m.name for m in variant.stored_marks(planned.marks)),
        combines=variant.combined_sites(planned.marks),
        constants={},
        cost=ZERO_COST,
    )

    def call(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(module.outputs, module(*(named[n] for n in module.inputs)), strict=True))

    return RuntimeVariant(graph, call)


def eager_replay(
    denoiser: Component,
    planned: PlanSet,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    latents: Tensor,
    *,
    timestep_scale: float,
    **kwargs,
) -> Tensor:
    """The final latents of `plan`; `kwargs` are `replay`'s own."""
    return replay(
        tabulate_plan(plan, latents.device, timestep_scale, len(latents)),
        eager_variants(denoiser, planned),
        describe_sites(planned),
        inputs,
        latents,
        **kwargs,
    )
