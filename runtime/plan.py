"""The plan: what a replay does, one entry per evaluation of the denoiser, as plain floats and names.

A plan comes in as JSON (`plans/<name>.json` in an artifact) and is a frozen value after `Plan.model_validate_json`. The
exporter's `plan/` package writes it and `replay.py` reads it; the names of variants and sites agree with `manifest.py`.
Every float is written with `repr`, so that what is read is what was computed.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .bounds import MAX_ITEMS, MAX_STEPS, Area, Float32, Name, Steps
from .errors import RequestError

FROZEN_CONFIG = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
MAX_EVALUATIONS = 4 * MAX_STEPS  # no scheduler evaluates more than four times a step
MAX_TIMESTEP = 1e9  # also of what they are multiplied with, so their products are numbers in float32


Numbers = Field(max_length=MAX_ITEMS, fail_fast=True)
Evaluations = Field(max_length=MAX_EVALUATIONS, fail_fast=True)
Timestep = Annotated[float, Field(ge=-MAX_TIMESTEP, le=MAX_TIMESTEP)]

PLAN_INPUTS_FILE = "replan.json"
"""What `prebake plan` makes further plans of; an artifact without it has the plans of its export alone."""


def size_plan_name(plan: str, size: str | None) -> str:
    """The plan that does the same at a further size of that name, None for the default size."""
    return f"{plan}@{size}" if size else plan


class Update(BaseModel):
    """The scheduler's step as numbers: `x' = sum latents[k] x[e-k] + sum outputs[k] m[e-k] + noise z[e]`.

    `x[e-k]` are the latents that evaluation e-k started from (before `input_scale`), `m[e-k]` is what the denoiser
    returned there, and z[e] is a fresh standard normal draw, taken only when `noise` is not 0. Before it come
    `unused_draws` that nothing is made of: some schedulers draw so, and equal seeds shall give equal noise.
    """

    model_config = FROZEN_CONFIG
    latents: Annotated[tuple[Float32, ...], Numbers]
    outputs: Annotated[tuple[Float32, ...], Numbers]
    noise: Float32 = 0.0
    unused_draws: int = Field(default=0, ge=0, le=16)


class DenoiserCall(BaseModel):
    """One call that a diffusers pipeline makes of an attached denoiser: `of` is its kind, by position in `manifest.pipeline`,
    `values` what the arguments that follow the schedule hold there, one number where all of a tensor's are that one."""

    model_config = FROZEN_CONFIG
    of: int = Field(default=0, ge=0, le=MAX_ITEMS)
    values: Annotated[dict[Name, Annotated[tuple[Float32, ...], Numbers]], Field(max_length=MAX_ITEMS)] = {}


class Evaluation(BaseModel):
    """One call of one denoiser variant, and the update that follows it.

    `step` is the user's step (a Heun step has two evaluations). `timestep` is in the scheduler's unit (0 to 1000 for
    most). `coefficients` are those of the sites that the variant combines, site after site in the variant's order,
    newest slot first: the variant's `coefficients` input. `marginal` says where the forward process stands when the
    evaluation begins: `image * x0 + noise * eps` is what image-to-image starts from here (before `input_scale`) and what
    inpainting puts where the picture is kept; None where the scheduler has no forward process. `calls` are there where a
    diffusers pipeline runs the loop (`attachment.py`), which may call the variant more than once in an evaluation; its own
    scheduler updates the latents then, and `update` leaves them as they are.
    """

    model_config = FROZEN_CONFIG
    step: int = Field(ge=0, lt=MAX_STEPS)
    variant: Name
    timestep: Timestep
    input_scale: Float32 = 1.0
    coefficients: Annotated[tuple[Float32, ...], Numbers] = ()
    update: Update
    marginal: tuple[Float32, Float32] | None = None
    calls: Annotated[tuple[DenoiserCall, ...], Numbers] = ()


class Tail(BaseModel):
    """A later start of a plan: its first `step` steps are left out, and evaluation `begin` is the first.

    `head` are the evaluations that differ from the plan's own, from `begin` on and with `step` numbered as there (a solver
    that has no history yet, a cache that has stored nothing yet). After them the plan's own follow.
    """

    model_config = FROZEN_CONFIG
    step: int = Field(ge=1, lt=MAX_STEPS)
    begin: int = Field(ge=1, lt=MAX_EVALUATIONS)
    head: Annotated[tuple[Evaluation, ...], Evaluations] = ()


class AreaSchedule(BaseModel):
    """What a plan does at pictures of another area, in pixels: FLUX and SD3 shift their schedule by it. `sigmas`, `evaluations` and
    `tails` are then these in place of the plan's own."""

    model_config = FROZEN_CONFIG
    area: Area
    sigmas: Annotated[tuple[Float32, ...], Evaluations] = ()
    evaluations: Annotated[tuple[Evaluation, ...], Evaluations]
    tails: Annotated[tuple[Tail, ...], Field(max_length=MAX_STEPS, fail_fast=True)] = ()


class Plan(BaseModel):
    """A whole trajectory for one number of steps. `sigmas` are for people and callbacks; the replay does not read them.

    `tails` are the later starts that it has besides its first evaluation, for image-to-image. `areas` are the schedules of an artifact
    of a range whose schedule follows the size, one for each area that its sizes have besides the default one's.
    """

    model_config = FROZEN_CONFIG
    name: Name
    steps: Steps
    cache: Name = "none"
    scheduler: Name
    init_noise_sigma: Float32 = 1.0
    sigmas: Annotated[tuple[Float32, ...], Evaluations] = ()
    evaluations: Annotated[tuple[Evaluation, ...], Evaluations]
    tails: Annotated[tuple[Tail, ...], Field(max_length=MAX_STEPS, fail_fast=True)] = ()
    areas: Annotated[tuple[AreaSchedule, ...], Field(max_length=MAX_ITEMS, fail_fast=True)] = ()

    @property
    def size(self) -> str | None:
        """The name of the size that it is for, None for the default size."""
        return self.name.partition("@")[2] or None

    def variants(self) -> tuple[str, ...]:
        """The distinct variants that this plan calls, in order of first use; last those that only a tail calls."""
        schedules = (self, *self.areas)
        heads = (e for schedule in schedules for tail in schedule.tails for e in tail.head)
        own = (e for schedule in schedules for e in schedule.evaluations)
        return tuple(dict.fromkeys(e.variant for e in (*own, *heads)))

    def at(self, height: int, width: int) -> Plan:
        """The plan for pictures of that size, in an artifact of a range."""
        there = next((a for a in self.areas if a.area == height * width), None)
        name = size_plan_name(self.name, f"{width}x{height}")
        changed = {"sigmas": there.sigmas, "evaluations": there.evaluations, "tails": there.tails} if there else {}
        return self.model_copy(update={"name": name, "areas": (), **changed})

    def tail(self, step: int) -> Plan:
        """The plan without its first `step` steps; `tail(0)` is the plan itself.

        Its steps are numbered from 0, and its latents begin as `evaluations[0].marginal` says, with no other factor.
        Raises RequestError where it cannot begin there.
        """
        if step == 0:
            return self
        starts = {tail.step: tail for tail in self.tails}
        if step not in starts:
            known = f"it can at 0, {', '.join(map(str, starts))}" if starts else "it begins at 0 only"
            raise RequestError(
                f"plan {self.name!r} cannot begin at step {step}, {known}; choose another start, or export again "
                "with sampler.image_to_image=true"
            )
        begin, evaluations = starts[step].begin, self.evaluations_of(starts[step])
        return self.model_copy(
            update={
                "steps": self.steps - step,
                "init_noise_sigma": 1.0,
                "sigmas": self.sigmas[begin:],
                # PNDM begins a step with the second evaluation of the step before it
                "evaluations": tuple(e.model_copy(update={"step": max(0, e.step - step)}) for e in evaluations),
                "tails": (),
            }
        )

    def evaluations_of(self, tail: Tail) -> tuple[Evaluation, ...]:
        """The tail's evaluations, steps numbered as in the plan."""
        return tail.head + self.evaluations[tail.begin + len(tail.head) :]
