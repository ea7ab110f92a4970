"""Plans replayed with compiled variants, for tests: equal graphs are compiled once per process."""

from __future__ import annotations

from torch import Tensor

from prebake.exporter.bench.compiled_variants import VariantCompiler, describe_sites
from prebake.exporter.plan import PlanSet
from prebake.exporter.sites.component import Component
from prebake.runtime.plan import Plan
from prebake.runtime.replay import replay, tabulate_plan
from support.cache_peers import Run, inputs_of

COMPILED = VariantCompiler()


def compiled_run(
    kind: str, component: Component, planned: PlanSet, chosen: Plan, latents: Tensor, *, timestep_scale: float = 1.0
) -> Run:
    """The plan, replayed with compiled variants. `kind` names the (seeded) component."""
    planned, variants = COMPILED.variants(component, planned, kind)
    run = Run()

    def keep(e: int, output: Tensor, _: Tensor) -> None:
        run.outputs.append(output)

    tables = tabulate_plan(chosen, latents.device, timestep_scale)
    run.latents = replay(tables, variants, describe_sites(planned), inputs_of(component), latents, on_evaluation=keep)
    return run
