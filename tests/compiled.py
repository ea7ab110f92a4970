"""Plans replayed with compiled variants, for tests: equal graphs are compiled once per process."""

from __future__ import annotations

from peers import Run, inputs_of
from torch import Tensor

from prebake.exporter.bench.compiled_variants import Compiled, sites_of
from prebake.exporter.plan import Planned
from prebake.exporter.sites.component import Component
from prebake.runtime.plan import Plan
from prebake.runtime.replay import replay, tables_on

COMPILED = Compiled()


def compiled_run(
    kind: str, component: Component, planned: Planned, chosen: Plan, latents: Tensor, *, timestep_scale: float = 1.0
) -> Run:
    """The plan, replayed with compiled variants. `kind` names the (seeded) component."""
    planned, variants = COMPILED.variants(component, planned, kind)
    run = Run()

    def keep(e: int, output: Tensor, _: Tensor) -> None:
        run.outputs.append(output)

    tables = tables_on(chosen, latents.device, timestep_scale)
    run.latents = replay(tables, variants, sites_of(planned), inputs_of(component), latents, on_evaluation=keep)
    return run
