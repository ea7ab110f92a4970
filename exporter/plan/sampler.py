"""The sampler: a diffusers scheduler goes in, a table of floats comes out, and the scheduler is not needed any more.

A scheduler's step is linear in the latents, in the model outputs so far and in its noise. So its real code is run once
in float64 on latents whose pixels are basis vectors: evaluation e starts from the unit vector of x[e], the model answers
with the unit vector of m[e], and what `step` returns *is* the row of coefficients, read and not fitted. Later stages may
rely on this: replaying the updates on any latents and outputs equals the scheduler's own loop (`check_table` has tried it), no
update reads more than `MAX_HISTORY` evaluations, and every number is a finite float.
`runtime/plan.py` defines what an `Update` means; `sampler_loop.py` runs the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch

from ...runtime.errors import ExportError, RecipeError
from ...runtime.plan import Update
from .sampler_loop import (
    StepCall,
    begin_at,
    list_step_calls,
    prepare_scheduler,
    read_marginals,
    refuse_scheduler,
    run_loop,
)

MAX_HISTORY = 5  # evaluations that an update may read, the present one included: PNDM needs the outputs of all but one
MAX_DRAWS = 2  # tensors of noise that a step may draw, of which it may use one: CogVideoXDPM throws its first away


@dataclass(frozen=True)
class SchedulerTable:
    """A scheduler, for one number of steps, as floats: one entry per evaluation of the denoiser in every tuple.

    `timesteps` are what the scheduler hands to the model, in its own unit (0 to 1000 for most). `steps` is the user's
    step that an evaluation belongs to: Heun has two in a step, Stable Diffusion's PNDM two in the first. The model sees
    `input_scales[e] * x[e]`. `sigmas` are the scheduler's own, terminal one included, and () where it has none.
    `read_marginals` are (image, noise) of the forward process before each evaluation, None where the scheduler has none.
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
    marginals: tuple[tuple[float, float], ...] | None = None


def tabulate_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    begin: int = 0,
    step_kwargs: Mapping[str, Any] | None = None,
    **set_timesteps_kwargs: Any,
) -> SchedulerTable:
    """The coefficients that `scheduler` would use; the scheduler itself is not changed.

    `set_timesteps_kwargs` is what the pipeline passes to `set_timesteps` (FLUX: `sigmas=` and `mu=`), `step_kwargs` what
    it passes to every `step` (DDIM: `eta=`). The loop starts at timestep `begin` of the schedule, with no history, as after
    `set_begin_index(begin)`; its steps are numbered as in a loop from the first.
    Raises RecipeError when there is no such schedule, and ExportError, with the way out, when the scheduler is not
    linear, looks back more than `MAX_HISTORY` evaluations, or needs more than (output, timestep, sample).
    """
    refuse_scheduler(scheduler)
    fresh = prepare_scheduler(scheduler, num_inference_steps, set_timesteps_kwargs)
    return read_table(fresh, num_inference_steps, begin, step_kwargs or {})


def tabulate_tails(
    scheduler: Any,
    num_inference_steps: int,
    *,
    step_kwargs: Mapping[str, Any] | None = None,
    **set_timesteps_kwargs: Any,
) -> dict[int, SchedulerTable]:
    """Steps left out, from 1 on -> the table of the loop that begins there, as image-to-image pipelines begin it.

    Arguments and errors are those of `tabulate_scheduler`, and ExportError where no picture can be noised. Rows that are those of the
    whole loop but for rounding are exactly these.
    """
    refuse_scheduler(scheduler)
    fresh = prepare_scheduler(scheduler, num_inference_steps, set_timesteps_kwargs)
    whole = read_table(fresh, num_inference_steps, 0, step_kwargs or {})
    if whole.marginals is None:
        raise ExportError(
            f"{whole.scheduler} has no forward process, so nothing can begin from a picture; use a scheduler with "
            "add_noise or scale_noise, or set sampler.image_to_image=false"
        )
    begins = range(getattr(fresh, "order", 1), len(whole.updates), getattr(fresh, "order", 1))
    starts = list(enumerate(begins, start=1))[: num_inference_steps - 1]
    return {step: tabulate_tail(whole, fresh, begin, step_kwargs or {}) for step, begin in starts}


def tabulate_tail(whole: SchedulerTable, scheduler: Any, begin: int, step_kwargs: Mapping[str, Any]) -> SchedulerTable:
    """The loop from timestep `begin`: rows of its own for the first evaluations, and then those of the whole loop.

    A scheduler without a history fills it within `MAX_HISTORY` evaluations, so twice as many are probed. Where its own loop
    does not agree with that to the end (`find_departure`), all are.
    """
    end = drop_first(whole, begin)
    standing, calls = enter_loop(scheduler, begin, step_kwargs)
    table = replace_head(end, standing, calls[: 2 * MAX_HISTORY])
    if find_departure(table, standing, calls) is not None:
        table = replace_head(end, standing, calls)
        check_table(table, standing, calls)
    return table


def replace_head(end: SchedulerTable, scheduler: Any, calls: Sequence[StepCall]) -> SchedulerTable:
    """The table with the scheduler's own rows for `calls`, its first ones, where they differ by more than rounding."""
    rows, _ = probe_coefficients(scheduler, calls)
    updates = list(end.updates)
    for e in range(len(rows)):
        own = find_shortest_update(rows, e, end.scheduler)
        updates[e] = updates[e] if history_length(updates[e]) <= e + 1 and is_same_update(own, updates[e]) else own
    return replace(end, updates=tuple(updates))


def drop_first(table: SchedulerTable, begin: int) -> SchedulerTable:
    """The table's entries from evaluation `begin` on."""
    return replace(
        table,
        timesteps=table.timesteps[begin:],
        sigmas=table.sigmas[begin:],
        steps=table.steps[begin:],
        input_scales=table.input_scales[begin:],
        updates=table.updates[begin:],
        marginals=table.marginals and table.marginals[begin:],
    )


def history_length(update: Update) -> int:
    """How many evaluations it reads, the present one included."""
    return max(len(update.latents), len(update.outputs))


def is_same_update(a: Update, b: Update) -> bool:
    """Whether two updates are one but for rounding: 1e-12 of the largest coefficient, as rows are read (`find_shortest_update`)."""
    pairs = [*zip_longest(a.latents, b.latents, fillvalue=0.0), *zip_longest(a.outputs, b.outputs, fillvalue=0.0)]
    pairs.append((a.noise, b.noise))
    return max(abs(x - y) for x, y in pairs) <= 1e-12 * max(abs(x) for x, _ in pairs)


def enter_loop(scheduler: Any, begin: int, step_kwargs: Mapping[str, Any]) -> tuple[Any, list[StepCall]]:
    """The scheduler before timestep `begin`, and what each `step` from there on is given."""
    return begin_at(scheduler, begin), [{**call, **step_kwargs} for call in list_step_calls(scheduler, begin)]


def read_table(scheduler: Any, num_inference_steps: int, begin: int, step_kwargs: Mapping[str, Any]) -> SchedulerTable:
    """The table of a loop of a scheduler that is `prepare_scheduler`, from timestep `begin`."""
    name = type(scheduler).__name__
    standing, calls = enter_loop(scheduler, begin, step_kwargs)
    rows, scales = probe_coefficients(standing, calls)
    noisy = read_marginals(scheduler, list_step_calls(scheduler))
    steps = user_steps(begin + len(calls), num_inference_steps, getattr(scheduler, "order", 1))
    table = SchedulerTable(
        scheduler=name,
        timesteps=tuple(float(call["timestep"]) for call in calls),
        sigmas=floats(getattr(scheduler, "sigmas", ()))[begin:],
        steps=steps[begin:],
        input_scales=scales,
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        updates=tuple(find_shortest_update(rows, e, name) for e in range(len(rows))),
        marginals=noisy and noisy[begin:],
    )
    check_table(table, standing, calls)
    return table


def probe_coefficients(scheduler: Any, calls: Sequence[StepCall]) -> tuple[list[torch.Tensor], tuple[float, ...]]:
    """The row of coefficients of each step, [2 + DRAWS, E] in float64, and the factor on each model input.

    Row e holds at [0, j] the coefficient of x[j], at [1, j] of m[j] and at [2 + d, j] of draw d of evaluation j: every
    evaluation starts from a unit vector of its own, so the row says what `step` computes for any latents at all.
    """
    count = len(calls)
    basis = torch.eye((2 + MAX_DRAWS) * count, dtype=torch.float64)
    units = basis.view(2 + MAX_DRAWS, count, 1, 1, 2 + MAX_DRAWS, count)  # [kind, evaluation, B, C, H, W]
    draws = [of_evaluation.unbind() for of_evaluation in units[2:].unbind(1)]
    rows, inputs = run_loop(scheduler, calls, units[0].unbind(), units[1].unbind(), draws)
    scales = [x[0, 0, 0, e] for e, x in enumerate(inputs)]
    return [row[0, 0] for row in rows], floats(scales)


def find_shortest_update(rows: Sequence[torch.Tensor], e: int, name: str) -> Update:
    """The update after evaluation e, over the fewest evaluations that carry it.

    The row itself holds whatever latents an evaluation starts from, also where inpainting or a callback has replaced them.
    But a step may keep a sample of its own (the corrected one of UniPC and SASolver), and then its row reaches back to the
    start. On a trajectory x[e] is what the step before returned: `rows[e - 1] - x[e]` is zero there, and the right multiple
    of it takes the old part away. Raises ExportError if more than `MAX_HISTORY` evaluations are needed.
    """
    if not rows[e].isfinite().all():
        raise RecipeError(
            f"{name}: the coefficients of evaluation {e} are not finite; "
            "use another number of steps, or final_sigmas_type='sigma_min' where the scheduler knows it"
        )
    for row_without in (lambda old: rows[e], lambda old: cancel_old_part(rows, e, old)):
        for depth in range(1, min(e + 1, MAX_HISTORY) + 1):
            old = torch.ones_like(rows[e], dtype=torch.bool)
            old[:2, e - depth + 1 :] = False
            old[2:, e] = False
            row = row_without(old)
            if (row * old).abs().max() <= 1e-12 * row.abs().max():
                return build_update(row, e, depth, name)
    raise ExportError(
        f"{name} looks back more than {MAX_HISTORY} evaluations at evaluation {e}; use a lower solver_order"
    )


def cancel_old_part(rows: Sequence[torch.Tensor], e: int, old: torch.Tensor) -> torch.Tensor:
    """`rows[e]` plus the multiple of the zero `rows[e - 1] - x[e]` that makes its `old` entries smallest."""
    if e == 0:
        return rows[e]
    zero = rows[e - 1].clone()
    zero[0, e] -= 1
    size = zero[old] @ zero[old]
    return rows[e] - (rows[e][old] @ zero[old] / size) * zero if size > 0 else rows[e]


def build_update(row: torch.Tensor, e: int, depth: int, name: str) -> Update:
    """The row as an `Update`, newest evaluation first, zeros at the old end left off."""
    draws = floats(row[2:, e])
    used = [d for d, c in enumerate(draws) if c != 0.0] or [0]
    if len(used) > 1:
        raise ExportError(f"{name} mixes {len(used)} draws of noise in evaluation {e}; an update has one")
    latents, outputs = (floats(row[kind, e - depth + 1 : e + 1].flip(0)) for kind in (0, 1))
    return Update(latents=trim_zeros(latents), outputs=trim_zeros(outputs), noise=draws[used[0]], unused_draws=used[0])


def trim_zeros(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients without the zeros at the end, but never empty."""
    while len(coefficients) > 1 and coefficients[-1] == 0.0:
        coefficients = coefficients[:-1]
    return coefficients


def user_steps(count: int, num_inference_steps: int, order: int) -> tuple[int, ...]:
    """The user's step of each of `count` evaluations, `order` of them to a step.

    What is more than that belongs to the first step, as in the progress bar of diffusers' pipelines.
    """
    warmup = max(0, count - num_inference_steps * order)
    return tuple(max(0, e - warmup) // order for e in range(count))


def replay_table(
    table: SchedulerTable, x: torch.Tensor, outputs: Sequence[torch.Tensor], noises: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The latents after each evaluation, if the model answers `outputs[e]` and the noise is `noises[e]`."""
    latents = [x]
    for e, u in enumerate(table.updates):
        newest_x, newest_m = latents[::-1], outputs[e::-1]
        terms = [*zip(u.latents, newest_x, strict=False), *zip(u.outputs, newest_m, strict=False), (u.noise, noises[e])]
        latents.append(sum((a * t for a, t in terms), torch.zeros_like(x)))
    return latents[1:]


def check_table(table: SchedulerTable, scheduler: Any, calls: Sequence[StepCall]) -> None:
    """ExportError unless the scheduler's own loop is what the table says (`find_departure`)."""
    e = find_departure(table, scheduler, calls)
    if e is not None:
        raise ExportError(
            f"{table.scheduler} is not linear: at evaluation {e} its own loop leaves the table read from it; "
            "look for a setting that clips, rescales or adds an offset, or use another scheduler"
        )


def find_departure(table: SchedulerTable, scheduler: Any, calls: Sequence[StepCall]) -> int | None:
    """The first evaluation after which the scheduler's own loop is not what the table says, None if it always is.

    Tried on zeros, on noise and on noise times 1000. A table is linear by construction, so agreement on random values is
    superposition, and agreement on zeros says that there is no offset. The large values find a clip that small ones never
    reach. Relative 1e-9, in float64.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.0, 1.0, 1000.0], dtype=torch.float64).view(3, 1, 1, 1)  # [B, 1, 1, 1]
    x, *rest = torch.randn(1 + 2 * len(calls), 3, 1, 4, 8, generator=generator, dtype=torch.float64) * sizes
    outputs, noises = rest[::2], rest[1::2]
    truth, inputs = run_loop(scheduler, calls, [x], outputs, [[z] * MAX_DRAWS for z in noises])
    ours = replay_table(table, x, outputs, noises)
    scaled = [scale * x for scale, x in zip(table.input_scales, [x, *truth[:-1]], strict=True)]
    held = (is_close(ours[e], truth[e]) and is_close(scaled[e], inputs[e]) for e in range(len(calls)))
    return next((e for e, holds in enumerate(held) if not holds), None)


def is_close(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether each image is the same within 1e-9 of its own largest value."""
    error, size = ((t.abs().amax(dim=(1, 2, 3))) for t in (ours - truth, truth))
    return ours.shape == truth.shape and bool((error <= 1e-9 * size).all())


def floats(values: Any) -> tuple[float, ...]:
    """Python floats of a tensor, an array or a sequence; -0.0 becomes 0.0."""
    return tuple(float(v) + 0.0 for v in values)
