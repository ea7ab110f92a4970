"""The denoising loop: a plan's evaluations, one after the other. There is no scheduler, no model and no cache code here.

The exporter decided everything: which variant runs, at which timestep, what its stored values are multiplied with, and
how latents and outputs add up to the next latents. So the loop below calls graphs and adds tensors. It never reads a
tensor back, which on a GPU would wait for it. A `Trajectory` is all that pictures are between two evaluations, so any number
of requests may use one open artifact at the same time: `replay` takes one to its end, `engine/` many of them in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .manifest import STEP, Graph, Site
from .plan import Evaluation, Plan, Update

Tensors = dict[str, torch.Tensor]
ROW_FLOATS = 64
"""256 bytes, where torch's own allocations on a GPU begin."""


@dataclass(frozen=True)
class PlanTables:
    """A plan whose per-evaluation numbers already lie on the device: made once, when an artifact is opened."""

    plan: Plan
    timesteps: tuple[torch.Tensor, ...]  # one [B] for each evaluation, in the denoiser's unit
    coefficients: tuple[
        torch.Tensor, ...
    ]  # one [B, K] for each evaluation, K as the variant wants; views of one tensor


@dataclass(frozen=True)
class DenoiserVariant:
    """A denoiser that can be called by name of input, with what the manifest says about it; or what it has before the loop."""

    graph: Graph
    call: Callable[[Mapping[str, torch.Tensor]], Tensors]


@dataclass(eq=False)
class Trajectory:
    """B pictures on their way through a plan. `inputs` are the denoiser's other inputs [B, ...], equal at every step, and what was
    computed before the loop (`call/hoist.py`); `draws` gives one draw [B, N, C] for each evaluation whose update asks for it.

    `index` is that of the evaluation to come. `starts` and `outputs` are x[e], x[e-1], ... and m[e], m[e-1], ..., newest first, as in
    Update, and `stored` the generations of each site. What an evaluation is given and gives is for `evaluation_inputs` and `advance`.
    """

    tables: PlanTables
    inputs: Mapping[str, torch.Tensor]
    latents: torch.Tensor
    draws: Iterator[torch.Tensor] = field(default_factory=lambda: iter(()))
    index: int = 0
    starts: deque[torch.Tensor] = field(init=False)
    outputs: deque[torch.Tensor] = field(init=False)
    stored: dict[str, deque[Tensors]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        depth = history_depth(self.tables.plan)
        self.starts, self.outputs = deque(maxlen=depth), deque(maxlen=depth)
        self._has_hoisted = any(":" in name for name in self.inputs)

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation to come, None at the plan's end."""
        evaluations = self.tables.plan.evaluations
        return evaluations[self.index] if self.index < len(evaluations) else None

    def evaluation_inputs(self, graph: Graph) -> Tensors:
        """What the variant `graph` is given at the evaluation to come."""
        e = self.index
        call = {
            **(loop_inputs(graph, self.inputs, e) if self._has_hoisted else self.inputs),
            "hidden_states": scale_tensor(self.latents, self.tables.plan.evaluations[e].input_scale),
            "timestep": self.tables.timesteps[e],
        }
        if graph.combines:
            call["coefficients"] = self.tables.coefficients[e]
            call.update(slot_inputs(graph, self.stored))
        return call

    def advance(self, graph: Graph, sites: Mapping[str, Site], result: Tensors) -> None:
        """Goes to the next evaluation by what the variant `graph` has given at this one."""
        store_sites(graph, sites, self.stored, result)
        self.starts.appendleft(self.latents)
        self.outputs.appendleft(result["sample"])
        update = self.tables.plan.evaluations[self.index].update
        self.latents = apply_update(update, self.starts, self.outputs, self.draws)
        self.index += 1


class StopReplay(Exception):
    """Raised by `on_evaluation` to end a replay early; `latents` is what `replay` then returns."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents


def replay(
    tables: PlanTables,
    variants: Mapping[str, DenoiserVariant],
    sites: Mapping[str, Site],
    inputs: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    *,
    noise: Iterable[torch.Tensor] = (),
    on_evaluation: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """The final latents [B, N, C], float32, of B pictures from noise of the same shape.

    `inputs` are the denoiser's other inputs [B, ...], equal at every step, and what was computed before the loop (`call/hoist.py`). `noise` gives one draw [B, N, C] for each evaluation
    whose update asks for it. `on_evaluation(e, output, latents)` sees the denoiser's output at evaluation e and the
    latents after it; it may return other latents to go on with, or raise StopReplay.
    """
    trajectory = Trajectory(tables, inputs, latents, iter(noise))
    for e, evaluation in enumerate(tables.plan.evaluations):
        variant = variants[evaluation.variant]
        trajectory.advance(variant.graph, sites, variant.call(trajectory.evaluation_inputs(variant.graph)))
        if on_evaluation is not None:
            try:
                replaced = on_evaluation(e, trajectory.outputs[0], trajectory.latents)
            except StopReplay as stop:
                return stop.latents
            trajectory.latents = trajectory.latents if replaced is None else replaced
    return trajectory.latents


def history_depth(plan: Plan) -> int:
    """How many evaluations' starts and outputs an update may need."""
    return max(len(table) for e in plan.evaluations for table in (e.update.latents, e.update.outputs))


def forecast_latents(trajectory: Trajectory) -> torch.Tensor:
    """The final latents, if the denoiser were to say at every evaluation to come what it has said last, without noise: the rest of the
    plan's updates alone. Of DDIM and of flow matching that is the picture which this last output predicts."""
    starts, outputs = trajectory.starts.copy(), trajectory.outputs.copy()
    latents = trajectory.latents
    for evaluation in trajectory.tables.plan.evaluations[trajectory.index :]:
        starts.appendleft(latents)
        outputs.appendleft(trajectory.outputs[0])
        latents = apply_update(evaluation.update.model_copy(update={"noise": 0.0}), starts, outputs, iter(()))
    return latents


def apply_update(
    update: Update, starts: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor], draws: Iterator[torch.Tensor]
) -> torch.Tensor:
    """x' = sum a_k x[e-k] + sum b_k m[e-k] + noise z: the scheduler's step as the plan wrote it down."""
    terms = [*zip(update.latents, starts, strict=False), *zip(update.outputs, outputs, strict=False)]
    if update.noise:
        terms.append((update.noise, next(draws)))
    (scale, tensor), *rest = [term for term in terms if term[0]] or terms[:1]
    x = scale_tensor(tensor, scale)
    for scale, tensor in rest:
        x = torch.add(x, tensor, alpha=scale)
    return x


def scale_tensor(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1.0 else x * scale


def loop_inputs(graph: Graph, inputs: Mapping[str, torch.Tensor], e: int) -> Tensors:
    """What of `inputs` a variant takes at evaluation e: all that a call gives, and of what was computed before the loop its own."""
    given = {name: tensor for name, tensor in inputs.items() if ":" not in name}
    for name in graph.hoisted:
        given[name] = inputs[name][e] if name.startswith(STEP) else inputs[name]
    return given


def slot_inputs(graph: Graph, stored: Mapping[str, Sequence[Tensors]]) -> Tensors:
    """The stored values that the variant combines, as its inputs `<tensor>@<k>`, k = 0 the newest."""
    return {
        f"{name}@{k}": tensor
        for site in graph.combines
        for k, generation in enumerate(stored[site])
        for name, tensor in generation.items()
    }


def store_sites(graph: Graph, sites: Mapping[str, Site], stored: dict[str, deque[Tensors]], result: Tensors) -> None:
    """Shifts the generations of every site that this variant stores: the references move, the tensors stay.

    The first store of a replay fills every slot, so a combination is defined from then on.
    """
    for name in graph.stores:
        site = sites[name]
        fresh = {tensor: result[tensor] for tensor in site.tensors}
        if name in stored:
            stored[name].appendleft(fresh)
        else:
            stored[name] = deque([fresh] * site.slots, maxlen=site.slots)


def tabulate_plan(plan: Plan, device: torch.device, timestep_scale: float = 1.0, batch: int = 1) -> PlanTables:
    """The plan for that many pictures, with its timesteps and coefficients as rows of two small float32 tensors on the device."""
    coefficients = tabulate_rows([e.coefficients * batch for e in plan.evaluations], device)
    return PlanTables(
        plan,
        timesteps=tabulate_rows([(e.timestep * timestep_scale,) * batch for e in plan.evaluations], device),
        coefficients=tuple(row.view(batch, len(row) // batch) for row in coefficients),
    )


def tabulate_rows(values: Sequence[Sequence[float]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Each as float32 [K], a view of one tensor that begins ROW_FLOATS, or a multiple of it, behind the one before: code for a
    GPU copies an input that begins where it cannot read several numbers at once."""
    width = max((-(-len(v) // ROW_FLOATS) for v in values), default=0) * ROW_FLOATS
    table = torch.tensor([[*v, *[0.0] * (width - len(v))] for v in values], dtype=torch.float32).to(device)
    return tuple(table[i, : len(v)] for i, v in enumerate(values))


def is_step_end(plan: Plan, e: int) -> bool:
    """Whether evaluation e is the last of its step (a Heun step has two)."""
    following = plan.evaluations[e + 1 : e + 2]
    return not following or following[0].step != plan.evaluations[e].step
