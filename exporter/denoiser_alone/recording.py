"""Record: a pipeline is run and its denoiser watched, so that a denoiser can be exported without a family file.

In: a loaded diffusers pipeline and the arguments of its call. Out: a `PipelineRecording`: each kind of call that the denoiser gets
(its arguments, flat and named, and which of them are latents, equal at every step, or given by the schedule), what
it returns, and for every number of steps what it is given at each evaluation. Two steps are run with the real denoiser;
the schedules are read with one that answers zeros, so they cost a prompt's encoding each. `runtime/attachment/attach.py` reads
the facts that come of it. `observation.py` runs, `call_kinds.py` compares, `component.py` makes graphs of it. The pipeline is left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...runtime.attachment.facts import AttachmentFacts
from ...runtime.attachment.snapshot import config_of, weights_digest
from ...runtime.errors import ExportError
from ...runtime.plan import DenoiserCall, Plan, Update
from ..plan.sampler import SchedulerTable, user_steps
from ..sites.component import Component
from .call_kinds import CallKind, find_call_kinds, plan_call
from .component import bake_arguments, call_component
from .observation import PipelineRequest, denoiser_name, describe_output, watch_pipeline, zero_output

IDENTITY_UPDATE = Update(latents=(1.0,), outputs=(0.0,))


@dataclass(frozen=True)
class CallSchedule:
    """What the pipeline does for one number of steps: one entry per evaluation in each of the first two."""

    calls: tuple[tuple[DenoiserCall, ...], ...]
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    order: int


@dataclass(frozen=True)
class PipelineRecording:
    """Everything that an export of the denoiser alone has to know about its pipeline. `name` is the denoiser's."""

    name: str
    denoiser: nn.Module
    scheduler: str
    kinds: tuple[CallKind, ...]
    facts: AttachmentFacts
    schedules: Mapping[int, CallSchedule]

    def components(self) -> tuple[Component, ...]:
        """The denoiser as a graph for each kind of call: `denoiser`, `denoiser.call2`, ..."""
        return tuple(call_component(self.name, self.denoiser, kind, i) for i, kind in enumerate(self.kinds))

    def tables(self) -> dict[int, SchedulerTable]:
        """The schedules as cache policies take them. The pipeline's own scheduler updates the latents, so that the
        updates leave them as they are."""
        return {
            n: SchedulerTable(
                scheduler=self.scheduler,
                timesteps=s.timesteps,
                sigmas=s.sigmas,
                steps=user_steps(len(s.timesteps), n, s.order),
                input_scales=(1.0,) * len(s.timesteps),
                init_noise_sigma=1.0,
                updates=(IDENTITY_UPDATE,) * len(s.timesteps),
                marginals=None,
            )
            for n, s in self.schedules.items()
        }

    def with_calls(self, plan: Plan) -> Plan:
        """The plan, its evaluations with the calls that the pipeline makes there."""
        calls = self.schedules[plan.steps].calls
        evaluations = (e.model_copy(update={"calls": c}) for e, c in zip(plan.evaluations, calls, strict=True))
        return plan.model_copy(update={"evaluations": tuple(evaluations)})


def record_pipeline(pipe: Any, request: PipelineRequest, steps: Sequence[int]) -> PipelineRecording:
    """Runs the pipeline and compares what its denoiser is given. Raises ExportError for what no artifact could follow."""
    name = denoiser_name(pipe)
    denoiser = pipe.components[name]
    real = watch_pipeline(pipe, name, request(2, 0))
    output = describe_output(real.outputs[0])
    zeros = [zero_output(o) for o in real.outputs]
    runs = [watch_pipeline(pipe, name, request(2, seed), zeros) for seed in (0, 1)]
    kinds = find_call_kinds(name, real, *runs)
    kinds = bake_arguments(name, denoiser, kinds, lambda names: find_call_kinds(name, real, *runs, baked=names))
    schedules = {}
    for n in steps:
        run = watch_pipeline(pipe, name, request(n, 0), zeros)
        if run.steps != n:
            raise ExportError(
                f"sampler.steps: the schedule of {type(pipe).__name__} has {run.steps} steps where {n} were asked for; "
                f"set sampler.steps = [{run.steps}]"
            )
        calls = tuple(tuple(plan_call(kinds, seen) for seen in evaluation) for evaluation in run.evaluations)
        schedules[n] = CallSchedule(calls, tuple(run.timesteps), run.sigmas, run.order)
    facts = AttachmentFacts(
        denoiser=name,
        denoiser_class=type(denoiser).__name__,
        config=config_of(denoiser),
        weights=weights_digest(denoiser),
        calls=tuple(kind.arguments for kind in kinds),
        output=output,
    )
    return PipelineRecording(name, denoiser, type(pipe.scheduler).__name__, kinds, facts, schedules)
