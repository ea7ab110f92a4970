"""The sampler: a diffusers scheduler goes in, a table of floats comes out, and the scheduler is not needed any more.

A scheduler's step is linear in the latents, in the model outputs so far and in its noise. So its real code is run once
in float64 on latents whose pixels are basis vectors: evaluation e starts from the unit vector of x[e], the model answers
with the unit vector of m[e], and what `step` returns *is* the row of coefficients, read and not fitted. Later stages may
rely on this: replaying the updates on any latents and outputs equals the scheduler's own loop (`check` has tried it), no
update reads more than `HISTORY` evaluations, and every number is a finite float.
`runtime/plan.py` defines what an `Update` means; `sampler_loop.py` runs the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...runtime.errors import ExportError, RecipeError
from ...runtime.plan import Update
from .sampler_loop import Call, evaluations, loop, refuse, scheduled

HISTORY = 4  # evaluations that an update may read, the present one included: third-order UniPC needs all four
DRAWS = 2  # tensors of noise that a step may draw, of which it may use one: CogVideoXDPM throws its first away


@dataclass(frozen=True)
class Table:
    """A scheduler, for one number of steps, as floats: one entry per evaluation of the denoiser in every tuple.

    `timesteps` are what the scheduler hands to the model, in its own unit (0 to 1000 for most). `steps` is the user's
    step that an evaluation belongs to: Heun has two in a step, Stable Diffusion's PNDM two in the first. The model sees
    `input_scales[e] * x[e]`. `sigmas` are the scheduler's own, terminal one included, and () where it has none.
    A step whose noise has the coefficient 0 takes no draw in a replay; some schedulers draw there and throw it away
    (SASolver outside its stochastic range), so equal seeds need not mean equal noise.
    """

    scheduler: str
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    steps: tuple[int, ...]
    input_scales: tuple[float, ...]
    init_noise_sigma: float
    updates: tuple[Update, ...]


def tabulate(
    scheduler: Any,
    num_inference_steps: int,
    *,
    step_kwargs: Mapping[str, Any] | None = None,
    **set_timesteps_kwargs: Any,
) -> Table:
    """The coefficients that `scheduler` would use; the scheduler itself is not changed.

    `set_timesteps_kwargs` is what the pipeline passes to `set_timesteps` (FLUX: `sigmas=` and `mu=`), `step_kwargs` what
    it passes to every `step` (DDIM: `eta=`). A schedule starts at its first timestep, as after `set_begin_index(0)`.
    Raises RecipeError when there is no such schedule, and ExportError, with the way out, when the scheduler is not
    linear, looks back more than `HISTORY` evaluations, or needs more than (output, timestep, sample).
    """
    refuse(scheduler)
    fresh = scheduled(scheduler, num_inference_steps, set_timesteps_kwargs)
    calls = [{**call, **(step_kwargs or {})} for call in evaluations(fresh)]
    rows, scales = probe(fresh, calls)
    table = Table(
        scheduler=type(scheduler).__name__,
        timesteps=tuple(float(call["timestep"]) for call in calls),
        sigmas=floats(getattr(fresh, "sigmas", ())),
        steps=user_steps(len(calls), num_inference_steps, getattr(fresh, "order", 1)),
        input_scales=scales,
        init_noise_sigma=float(getattr(fresh, "init_noise_sigma", 1.0)),
        updates=tuple(shortest(rows, e, type(scheduler).__name__) for e in range(len(rows))),
    )
    check(table, fresh, calls)
    return table


def probe(scheduler: Any, calls: Sequence[Call]) -> tuple[list[torch.Tensor], tuple[float, ...]]:
    """The row of coefficients of each step, [2 + DRAWS, E] in float64, and the factor on each model input.

    Row e holds at [0, j] the coefficient of x[j], at [1, j] of m[j] and at [2 + d, j] of draw d of evaluation j: every
    evaluation starts from a unit vector of its own, so the row says what `step` computes for any latents at all.
    """
    count = len(calls)
    basis = torch.eye((2 + DRAWS) * count, dtype=torch.float64)
    units = basis.view(2 + DRAWS, count, 1, 1, 2 + DRAWS, count)  # [kind, evaluation, B, C, H, W]
    draws = [of_evaluation.unbind() for of_evaluation in units[2:].unbind(1)]
    rows, inputs = loop(scheduler, calls, units[0].unbind(), units[1].unbind(), draws)
    scales = [x[0, 0, 0, e] for e, x in enumerate(inputs)]
    return [row[0, 0] for row in rows], floats(scales)


def shortest(rows: Sequence[torch.Tensor], e: int, name: str) -> Update:
    """The update after evaluation e, over the fewest evaluations that carry it.

    A step may keep a sample of its own (the corrected one of UniPC and SASolver), and then its row reaches back to the
    start. But on a trajectory x[e] is what the step before returned: `rows[e - 1] - x[e]` is zero there, and the right
    multiple of it takes the old part away. Raises ExportError if more than `HISTORY` evaluations are needed.
    """
    if not rows[e].isfinite().all():
        raise RecipeError(
            f"{name}: the coefficients of evaluation {e} are not finite; "
            "use another number of steps, or final_sigmas_type='sigma_min' where the scheduler knows it"
        )
    for depth in range(1, min(e + 1, HISTORY) + 1):
        old = torch.ones_like(rows[e], dtype=torch.bool)
        old[:2, e - depth + 1 :] = False
        old[2:, e] = False
        for row in (rows[e], without_old(rows, e, old)):
            if (row * old).abs().max() <= 1e-12 * row.abs().max():
                return update(row, e, depth, name)
    raise ExportError(f"{name} looks back more than {HISTORY} evaluations at evaluation {e}; use a lower solver_order")


def without_old(rows: Sequence[torch.Tensor], e: int, old: torch.Tensor) -> torch.Tensor:
    """`rows[e]` plus the multiple of the zero `rows[e - 1] - x[e]` that makes its `old` entries smallest."""
    if e == 0:
        return rows[e]
    zero = rows[e - 1].clone()
    zero[0, e] -= 1
    size = zero[old] @ zero[old]
    return rows[e] - (rows[e][old] @ zero[old] / size) * zero if size > 0 else rows[e]


def update(row: torch.Tensor, e: int, depth: int, name: str) -> Update:
    """The row as an `Update`, newest evaluation first, zeros at the old end left off."""
    used = [c for c in floats(row[2:, e]) if c != 0.0]
    if len(used) > 1:
        raise ExportError(f"{name} mixes {len(used)} draws of noise in evaluation {e}; an update has one")
    latents, outputs = (floats(row[kind, e - depth + 1 : e + 1].flip(0)) for kind in (0, 1))
    return Update(latents=trimmed(latents), outputs=trimmed(outputs), noise=used[0] if used else 0.0)


def trimmed(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """Without the zeros at the end, but never empty."""
    while len(coefficients) > 1 and coefficients[-1] == 0.0:
        coefficients = coefficients[:-1]
    return coefficients


def user_steps(count: int, num_inference_steps: int, order: int) -> tuple[int, ...]:
    """The user's step of each of `count` evaluations, `order` of them to a step.

    What is more than that belongs to the first step, as in the progress bar of diffusers' pipelines.
    """
    warmup = max(0, count - num_inference_steps * order)
    return tuple(max(0, e - warmup) // order for e in range(count))


def replay(
    table: Table, x: torch.Tensor, outputs: Sequence[torch.Tensor], noises: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The latents after each evaluation, if the model answers `outputs[e]` and the noise is `noises[e]`."""
    latents = [x]
    for e, u in enumerate(table.updates):
        newest_x, newest_m = latents[::-1], outputs[e::-1]
        terms = [*zip(u.latents, newest_x, strict=False), *zip(u.outputs, newest_m, strict=False), (u.noise, noises[e])]
        latents.append(sum((a * t for a, t in terms), torch.zeros_like(x)))
    return latents[1:]


def check(table: Table, scheduler: Any, calls: Sequence[Call]) -> None:
    """ExportError unless the scheduler's own loop is what the table says, on zeros, on noise and on noise times 1000.

    A table is linear by construction, so agreement on random values is superposition, and agreement on zeros says that
    there is no offset. The large values find a clip that small ones never reach. Relative 1e-9, in float64.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.0, 1.0, 1000.0], dtype=torch.float64).view(3, 1, 1, 1)  # [B, 1, 1, 1]
    x, *rest = torch.randn(1 + 2 * len(calls), 3, 1, 4, 8, generator=generator, dtype=torch.float64) * sizes
    outputs, noises = rest[::2], rest[1::2]
    truth, inputs = loop(scheduler, calls, [x], outputs, [[z] * DRAWS for z in noises])
    ours = replay(table, x, outputs, noises)
    scaled = [scale * x for scale, x in zip(table.input_scales, [x, *truth[:-1]], strict=True)]
    for e in range(len(calls)):
        if not (close(ours[e], truth[e]) and close(scaled[e], inputs[e])):
            raise ExportError(
                f"{table.scheduler} is not linear: at evaluation {e} its own loop leaves the table read from it; "
                "look for a setting that clips, rescales or adds an offset, or use another scheduler"
            )


def close(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether each image is the same within 1e-9 of its own largest value."""
    error, size = ((t.abs().amax(dim=(1, 2, 3))) for t in (ours - truth, truth))
    return ours.shape == truth.shape and bool((error <= 1e-9 * size).all())


def floats(values: Any) -> tuple[float, ...]:
    """Python floats of a tensor, an array or a sequence; -0.0 becomes 0.0."""
    return tuple(float(v) + 0.0 for v in values)
