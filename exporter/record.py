"""Record: a pipeline is run and its denoiser watched, so that a denoiser can be exported without a family file.

In: a loaded diffusers pipeline and the arguments of its call. Out: a `Recording`: each kind of call that the denoiser gets
(its arguments, flat and named, and which of them are latents, equal at every step, or given by the schedule), what
it returns, and for every number of steps what it is given at each evaluation. Two steps are run with the real denoiser;
the schedules are read with one that answers zeros, so they cost a prompt's encoding each. `runtime/attachment.py` reads
the facts that come of it. The pipeline is left as it was.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime.arguments import (
    Argument,
    Empty,
    Output,
    bound,
    digest,
    dtype_name,
    leaves,
    rebuilt,
    same,
    shown,
    values,
)
from ..runtime.attachment import Facts, Followed, config_of, steps_of, weights_digest
from ..runtime.errors import ExportError, RecipeError
from ..runtime.plan import Call, Plan, Update
from .component import Component
from .plan.sampler import Table, floats, user_steps

DENOISERS = ("transformer", "unet", "prior", "dit")
"""What diffusers' pipelines call the part that is run at every step."""
BAKED_NUMBERS = 1 << 16  # of one argument that may be compiled in
STAYS = Update(latents=(1.0,), outputs=(0.0,))


@dataclass(frozen=True)
class Seen:
    """One call of the denoiser: its bound arguments (tensors copied), flat and as they were."""

    arguments: Mapping[str, Any]
    flat: Mapping[str, Any]


@dataclass
class Watched:
    """One run of a pipeline: the denoiser's calls evaluation by evaluation, what it returned first in each branch, and what
    the scheduler's `step` got and gave."""

    evaluations: list[tuple[Seen, ...]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    latents: Tensor | None = None
    steps: int = 0
    sigmas: tuple[float, ...] = ()
    order: int = 1
    result: Any = None


@dataclass(frozen=True)
class Kind:
    """One kind of call: its arguments as the manifest has them, and an example to capture with."""

    arguments: tuple[Argument, ...]
    example: Seen

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.arguments if a.is_input)


@dataclass(frozen=True)
class Schedule:
    """What the pipeline does for one number of steps: one entry per evaluation in each of the first two."""

    calls: tuple[tuple[Call, ...], ...]
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    order: int


@dataclass(frozen=True)
class Recording:
    """Everything that an export of the denoiser alone has to know about its pipeline. `name` is the denoiser's."""

    name: str
    denoiser: nn.Module
    scheduler: str
    kinds: tuple[Kind, ...]
    facts: Facts
    schedules: Mapping[int, Schedule]

    def components(self) -> tuple[Component, ...]:
        """The denoiser as a graph for each kind of call: `denoiser`, `denoiser.call2`, ..."""
        return tuple(component(self.name, self.denoiser, kind, i) for i, kind in enumerate(self.kinds))

    def tables(self) -> dict[int, Table]:
        """The schedules as cache policies take them. The pipeline's own scheduler updates the latents, so that the
        updates leave them as they are."""
        return {
            n: Table(
                scheduler=self.scheduler,
                timesteps=s.timesteps,
                sigmas=s.sigmas,
                steps=user_steps(len(s.timesteps), n, s.order),
                input_scales=(1.0,) * len(s.timesteps),
                init_noise_sigma=1.0,
                updates=(STAYS,) * len(s.timesteps),
                marginals=None,
            )
            for n, s in self.schedules.items()
        }

    def with_calls(self, plan: Plan) -> Plan:
        """The plan, its evaluations with the calls that the pipeline makes there."""
        calls = self.schedules[plan.steps].calls
        evaluations = (e.model_copy(update={"calls": c}) for e, c in zip(plan.evaluations, calls, strict=True))
        return plan.model_copy(update={"evaluations": tuple(evaluations)})


Request = Callable[[int, int], dict[str, Any]]  # (steps, seed) -> the arguments of the pipeline's call


def record(pipe: Any, request: Request, steps: Sequence[int]) -> Recording:
    """Runs the pipeline and compares what its denoiser is given. Raises ExportError for what no artifact could follow."""
    name = denoiser_name(pipe)
    denoiser = pipe.components[name]
    real = watched(pipe, name, request(2, 0))
    output = described(real.outputs[0])
    zeros = [zeroed(o) for o in real.outputs]
    runs = [watched(pipe, name, request(2, seed), zeros) for seed in (0, 1)]
    kinds = kinds_of(name, real, *runs)
    kinds = baked(name, denoiser, kinds, lambda names: kinds_of(name, real, *runs, baked=names))
    schedules = {}
    for n in steps:
        run = watched(pipe, name, request(n, 0), zeros)
        if run.steps != n:
            raise ExportError(
                f"sampler.steps: the schedule of {type(pipe).__name__} has {run.steps} steps where {n} were asked for; "
                f"set sampler.steps = [{run.steps}]"
            )
        calls = tuple(tuple(call(kinds, seen) for seen in evaluation) for evaluation in run.evaluations)
        schedules[n] = Schedule(calls, tuple(run.timesteps), run.sigmas, run.order)
    facts = Facts(
        denoiser=name,
        denoiser_class=type(denoiser).__name__,
        config=config_of(denoiser),
        weights=weights_digest(denoiser),
        calls=tuple(kind.arguments for kind in kinds),
        output=output,
    )
    return Recording(name, denoiser, type(pipe.scheduler).__name__, kinds, facts, schedules)


def denoiser_name(pipe: Any) -> str:
    """The name of the part that the pipeline runs at every step. Raises ExportError where none has a known name."""
    for name in DENOISERS:
        if isinstance(pipe.components.get(name), nn.Module):
            return name
    raise ExportError(
        f"{type(pipe).__name__}: expected a denoiser called {', '.join(DENOISERS)}, it has {', '.join(pipe.components)}; "
        "only such pipelines can be exported"
    )


def requested(pipe: Any, prompt: str, chosen: Mapping[str, Any], further: Mapping[str, Any]) -> Request:
    """Calls of the pipeline for the prompt. `chosen` are passed on as far as the pipeline takes them and they are not None,
    `further` (the recipe's `attach.arguments`) always. Raises RecipeError for one of these that it does not take."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if unknown := [key for key in further if key not in takes]:
        raise RecipeError(
            f"attach.arguments: {type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(list(takes)[1:])}"
        )
    usual = {name: value for name, value in {"prompt": prompt, **chosen}.items() if value is not None and name in takes}

    def arguments(steps: int, seed: int) -> dict[str, Any]:
        of_run = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        own = {"output_type": "latent", **usual, **further}
        return {
            **{name: v for name, v in of_run.items() if name in takes},
            **{n: v for n, v in own.items() if n in takes},
        }

    return arguments


# --- running --------------------------------------------------------------------------------------------------------


def watched(pipe: Any, name: str, arguments: Mapping[str, Any], answers: Sequence[Any] | None = None) -> Watched:
    """One call of the pipeline. The denoiser's k-th call of an evaluation is answered with `answers[k]`, where given.

    Raises ExportError where the loop is not a scheduler's, or more than the denoiser runs in it.
    """
    run = Watched()
    pending: list[Seen] = []
    others: list[tuple[str, int]] = []
    denoiser, scheduler = pipe.components[name], pipe.scheduler
    original, signature = denoiser.forward, inspect.signature(denoiser.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = bound(signature, args, kwargs).arguments
        given = rebuilt(given, lambda _, leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
        pending.append(Seen(given, dict(leaves(given))))
        if answers is not None:
            return copy.deepcopy(answers[min(len(pending), len(answers)) - 1])
        output = original(*args, **kwargs)
        if len(run.outputs) < len(pending):
            run.outputs.append(output)
        return output

    def begun(*_: Any, **__: Any) -> None:
        if pending or run.evaluations:
            raise ExportError(
                f"{type(pipe).__name__}: sets its schedule again inside its loop, which no plan can follow"
            )
        run.steps, run.order = steps_of(scheduler), int(getattr(scheduler, "order", 1))
        run.sigmas = floats(getattr(scheduler, "sigmas", ()))

    def stepped(result: Any, *args: Any, **kwargs: Any) -> None:
        run.evaluations.append(tuple(pending))
        run.timesteps.append(float(kwargs.get("timestep", args[1] if len(args) > 1 else 0.0)))
        run.latents = result[0]
        pending.clear()

    def called(other: str) -> Callable[..., None]:
        return lambda *_: others.append((other, len(run.evaluations))) if pending or run.evaluations else None

    with contextlib.ExitStack() as stack:
        for other, module in pipe.components.items():
            if isinstance(module, nn.Module) and other != name:
                stack.callback(module.register_forward_pre_hook(called(other)).remove)
        stack.callback(vars(denoiser).pop, "forward")
        denoiser.forward = forward
        for method, then in (("set_timesteps", begun), ("step", stepped)):
            stack.callback(vars(scheduler).pop, method, None)
            setattr(scheduler, method, Followed(scheduler, method, then))
        with torch.no_grad(), quiet(pipe):
            run.result = pipe(**arguments)
    check_loop(type(pipe).__name__, name, run, pending, others)
    return run


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline without its progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before


def check_loop(
    pipeline: str, name: str, run: Watched, pending: Sequence[Seen], others: Sequence[tuple[str, int]]
) -> None:
    """Raises ExportError unless every evaluation is some calls of the denoiser alone, and one step of the scheduler."""
    inside = [other for other, e in others if e < len(run.evaluations)]
    if inside:
        raise ExportError(
            f"{pipeline}: runs {inside[0]} beside {name} in its loop, and an artifact has one denoiser; "
            "take a pipeline without it"
        )
    if not run.steps or pending or not run.evaluations or not all(run.evaluations):
        raise ExportError(
            f"{pipeline}: expected a loop that sets a schedule, and at every step of it runs {name} and then the scheduler; "
            f"saw {sum(map(len, run.evaluations)) + len(pending)} runs and {len(run.evaluations)} steps; it cannot be exported"
        )


def zeroed(output: Any) -> Any:
    """The same structure, its tensors all zeros."""
    answer = copy.deepcopy(output)
    for _, leaf in leaves(answer):
        if isinstance(leaf, Tensor):
            leaf.zero_()
    return answer


def described(output: Any, name: str = "") -> Output:
    """What is around the denoiser's one tensor. Raises ExportError where it returns another number of tensors."""
    if not name:
        tensors = [n for n, leaf in leaves(output) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            raise ExportError(
                f"the denoiser returns {len(tensors)} tensors ({', '.join(tensors[:4])}), expected one; it cannot be exported"
            )
    if isinstance(output, Tensor):
        return Output(kind="tensor")
    if isinstance(output, Mapping):
        cls = type(output)
        items = {str(key): described(item, f"{name}.{key}") for key, item in output.items()}
        return Output(kind="dict", cls="" if cls is dict else f"{cls.__module__}.{cls.__qualname__}", items=items)
    if isinstance(output, tuple | list):
        items = {str(i): described(item, f"{name}.{i}") for i, item in enumerate(output)}
        return Output(kind="tuple" if isinstance(output, tuple) else "list", items=items)
    check_plain(f"output {name}", output)
    return Output(kind="constant", value=output)


def check_plain(name: str, value: Any) -> None:
    if not isinstance(value, bool | int | float | str | Empty | None):
        raise ExportError(
            f"{name}: expected tensors and plain values, got a {type(value).__name__}, which an artifact cannot hold"
        )


# --- comparing ------------------------------------------------------------------------------------------------------


def kinds_of(
    name: str, real: Watched, stub: Watched, other_seed: Watched, *, baked: frozenset[str] = frozenset()
) -> tuple[Kind, ...]:
    """The distinct calls of the first evaluation, branch by branch. Raises ExportError for one that changes later."""
    kinds: list[Kind] = []
    for branch in range(len(real.evaluations[0])):
        runs = [[e[branch] for e in run.evaluations if branch < len(e)] for run in (real, stub, other_seed)]
        first = runs[0][0]
        for seen in (s for run in runs for s in run):
            check_like(name, first, seen)
        arguments = tuple(argument(n, runs, n in baked) for n in first.flat)
        match = next((i for i, k in enumerate(kinds) if alike(k.arguments, arguments)), None)
        if match is None:
            kinds.append(Kind(arguments, first))
        else:
            kinds[match] = Kind(tuple(map(wider, kinds[match].arguments, arguments)), kinds[match].example)
    return tuple(kinds)


def check_like(name: str, first: Seen, later: Seen) -> None:
    """Raises ExportError unless both calls have the same arguments but for the numbers in tensors."""
    for n in dict.fromkeys((*first.flat, *later.flat)):
        a, b = first.flat.get(n, "nothing"), later.flat.get(n, "nothing")
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
            continue
        if isinstance(a, Tensor) or isinstance(b, Tensor) or not same(a, b):
            raise ExportError(
                f"{name}: argument {n!r} is {shown(a)} at the first step and {shown(b)} later, and only the numbers in "
                "tensors may change; it cannot be exported"
            )


def argument(name: str, runs: Sequence[Sequence[Seen]], bake: bool) -> Argument:
    """What the two steps of three runs say of one argument: with the real denoiser, with one that answers zeros, and the
    latter from other noise."""
    first = runs[0][0].flat[name]
    if not isinstance(first, Tensor):
        check_plain(f"argument {name!r}", first)
        return Argument(name=name, role="constant", value=first)
    real, stub, other = ([s.flat[name] for s in run] for run in runs)
    described = {"name": name, "shape": tuple(first.shape), "dtype": dtype_name(first)}
    if bake:
        return Argument(role="baked", sha256=digest(first), nonzero=int(first.count_nonzero()), **described)
    if not all(torch.equal(a, b) for a, b in zip(real, stub, strict=True)):
        return Argument(role="latents", **described)
    moves = not all(torch.equal(stub[0], t) for t in stub)
    if moves and not all(torch.equal(a, b) for a, b in zip(stub, other, strict=True)):
        return Argument(role="latents", **described)
    return Argument(role="step" if moves else "fixed", **described)


def alike(a: Sequence[Argument], b: Sequence[Argument]) -> bool:
    """Whether one graph serves both kinds of call."""
    hidden = {"role": "fixed"}
    return [x.model_copy(update=hidden) if x.is_input else x for x in a] == [
        x.model_copy(update=hidden) if x.is_input else x for x in b
    ]


def wider(a: Argument, b: Argument) -> Argument:
    """Of two roles the one that allows more: what is latents in one branch may not be held to the other's schedule."""
    order = ("latents", "fixed", "step", "baked", "constant")
    return min(a, b, key=lambda x: order.index(x.role))


def call(kinds: Sequence[Kind], seen: Seen) -> Call:
    """The call as a plan has it: which kind, and the values of its step tensors. Raises ExportError for an unknown kind."""
    for i, kind in enumerate(kinds):
        if all(fits(a, seen.flat.get(a.name)) for a in kind.arguments) and len(kind.arguments) == len(seen.flat):
            return Call(of=i, values={a.name: values(seen.flat[a.name]) for a in kind.arguments if a.role == "step"})
    raise ExportError(
        "the pipeline calls its denoiser in other ways at other numbers of steps than at two; it cannot be exported"
    )


def fits(a: Argument, value: Any) -> bool:
    if a.role == "constant":
        return same(a.value, value)
    if not isinstance(value, Tensor) or (tuple(value.shape), dtype_name(value)) != (a.shape, a.dtype):
        return False
    return a.role != "baked" or digest(value) == a.sha256


# --- as graphs ------------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """The denoiser as a function of flat tensors, everything else as it was recorded; returns its one tensor."""

    def __init__(self, name: str, denoiser: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.add_module(name, denoiser)
        self.name, self.inputs, self.given = name, kind.inputs, kind.example.arguments
        self.baked = {a.name: kind.example.flat[a.name] for a in kind.arguments if a.role == "baked"}
        self.signature = inspect.signature(denoiser.forward)

    def forward(self, *tensors: Tensor) -> Tensor:
        named = {**self.baked, **dict(zip(self.inputs, tensors, strict=True))}
        arguments = rebuilt(self.given, lambda name, leaf: named.get(name, empty(leaf)))
        call = inspect.BoundArguments(self.signature, arguments)  # pyright: ignore[reportArgumentType]
        with Known(self.baked.values()) if self.baked else contextlib.nullcontext():
            output = self.get_submodule(self.name)(*call.args, **call.kwargs)
        return next(leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor))


def empty(leaf: Any) -> Any:
    return leaf if not isinstance(leaf, Empty) else {} if leaf.empty == "mapping" else []


class Known(TorchFunctionMode):
    """What is computed of `tensors` alone is computed while tracing, as Python numbers are: it may be read in Python."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.known = {id(t): t for t in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for _, leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Tensor)]
        if not given or not all(id(t) in self.known for t in given):
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            result = func(*args, **(kwargs or {}))
        self.known.update((id(leaf), leaf) for _, leaf in leaves(result) if isinstance(leaf, Tensor))
        return result


def component(name: str, denoiser: nn.Module, kind: Kind, i: int) -> Component:
    """One kind of call as something to capture. Examples are copies: torch.export would merge two names of one tensor."""
    args = tuple(kind.example.flat[n].contiguous().clone() for n in kind.inputs)
    module = Recorded(name, denoiser, kind).eval()
    title = f"denoiser.call{i + 1}" if i else "denoiser"
    return Component(title, module, kind.inputs, ("sample",), args, {"": f"{name}."})


def baked(
    name: str, denoiser: nn.Module, kinds: tuple[Kind, ...], again: Callable[[frozenset[str]], tuple[Kind, ...]]
) -> tuple[Kind, ...]:
    """The kinds, with those integer and boolean arguments compiled in that the model reads in Python: as few as do.

    Raises ExportError where it reads others.
    """
    if traces(name, denoiser, kinds) is None:
        return kinds
    candidates = {
        a.name
        for kind in kinds
        for a in kind.arguments
        if a.role == "fixed"
        and not getattr(torch, a.dtype).is_floating_point
        and kind.example.flat[a.name].numel() <= BAKED_NUMBERS
    }
    if problem := traces(name, denoiser, again(frozenset(candidates))):
        raise ExportError(
            f"{type(denoiser).__name__}: cannot be traced ({type(problem).__name__}: {str(problem).strip().splitlines()[0]}); "
            "a model that reads latents or timesteps in Python cannot be exported"
        ) from problem
    for candidate in sorted(candidates):
        if traces(name, denoiser, again(frozenset(candidates - {candidate}))) is None:
            candidates.discard(candidate)
    return again(frozenset(candidates))


def traces(name: str, denoiser: nn.Module, kinds: tuple[Kind, ...]) -> Exception | None:
    """Why the denoiser cannot run on fake tensors, None if it can."""
    for i, kind in enumerate(kinds):
        made = component(name, denoiser, kind, i)
        try:
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
                made.module(*(fake.from_tensor(t) for t in made.args))
        except Exception as e:  # models raise whatever their arithmetic runs into
            return e
    return None
