"""The plan: what a replay does, one entry per evaluation of the denoiser, as plain floats and names.

A plan comes in as JSON (`plans/<name>.json` in an artifact) and is a frozen value after `Plan.model_validate_json`. The
exporter's `plan/` package writes it and `replay.py` reads it; the names of variants and sites agree with `manifest.py`.
Every float is written with `repr`, so that what is read is what was computed.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

FROZEN = ConfigDict(extra="forbid", frozen=True)


class Update(BaseModel):
    """The scheduler's step as numbers: `x' = sum latents[k] x[e-k] + sum outputs[k] m[e-k] + noise z[e]`.

    `x[e-k]` are the latents that evaluation e-k started from (before `input_scale`), `m[e-k]` is what the denoiser
    returned there, and z[e] is a fresh standard normal draw, taken only when `noise` is not 0.
    """

    model_config = FROZEN
    latents: tuple[float, ...]
    outputs: tuple[float, ...]
    noise: float = 0.0


class Evaluation(BaseModel):
    """One call of one denoiser variant, and the update that follows it.

    `step` is the user's step (a Heun step has two evaluations). `timestep` is in the scheduler's unit (0 to 1000 for
    most). `coefficients` are those of the sites that the variant combines, site after site in the variant's order,
    newest slot first: the variant's `coefficients` input.
    """

    model_config = FROZEN
    step: int
    variant: str
    timestep: float
    input_scale: float = 1.0
    coefficients: tuple[float, ...] = ()
    update: Update


class Plan(BaseModel):
    """A whole trajectory for one number of steps. `sigmas` are for people and callbacks; the replay does not read them."""

    model_config = FROZEN
    name: str
    steps: int = Field(ge=1)
    cache: str = "none"
    scheduler: str
    init_noise_sigma: float = 1.0
    sigmas: tuple[float, ...] = ()
    evaluations: tuple[Evaluation, ...]

    def variants(self) -> tuple[str, ...]:
        """The distinct variants that this plan calls, in order of first use."""
        return tuple(dict.fromkeys(e.variant for e in self.evaluations))
