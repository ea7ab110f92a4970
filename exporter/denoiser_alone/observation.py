"""Watch: one run of a diffusers pipeline, and every call that its denoiser gets in it.

In: a loaded pipeline and the arguments of its call. Out: a `PipelineRun`, evaluation by evaluation. The denoiser may be answered
for, so that the schedule of many steps costs a prompt's encoding. The pipeline is left as it was. `recording.py` compares runs.
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

from ...runtime.attachment.arguments import EmptyContainer, OutputStructure, bind_call, map_leaves, named_leaves
from ...runtime.attachment.scheduler_observer import SchedulerObserver, schedule_steps
from ...runtime.errors import ExportError, PrebakeError, RecipeError, error_summary
from ..plan.sampler import floats
from ..rewrite import DENOISER_COMPONENTS

PICTURE_ARGUMENTS = ("image", "mask_image", "control_image", "video")


@dataclass(frozen=True)
class ObservedCall:
    """One call of the denoiser: its bound arguments (tensors copied), flat and as they were."""

    arguments: Mapping[str, Any]
    flat: Mapping[str, Any]


@dataclass
class PipelineRun:
    """One run of a pipeline: the denoiser's calls evaluation by evaluation, what it returned first in each branch, and what
    the scheduler's `step` got and gave."""

    evaluations: list[tuple[ObservedCall, ...]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    latents: Tensor | None = None
    steps: int = 0
    sigmas: tuple[float, ...] = ()
    order: int = 1
    result: Any = None


PipelineRequest = Callable[[int, int], dict[str, Any]]  # (steps, seed) -> the arguments of the pipeline's call


def denoiser_name(pipe: Any) -> str:
    """The name of the part that the pipeline runs at every step. Raises ExportError where none has a known name."""
    for name in DENOISER_COMPONENTS:
        if isinstance(pipe.components.get(name), nn.Module):
            return name
    raise ExportError(
        f"{type(pipe).__name__}: expected a denoiser called {', '.join(DENOISER_COMPONENTS)}, it has {', '.join(pipe.components)}; "
        "only such pipelines can be exported"
    )


def pipeline_request(pipe: Any, prompt: str, chosen: Mapping[str, Any], further: Mapping[str, Any]) -> PipelineRequest:
    """Calls of the pipeline for the prompt. `chosen` are passed on as far as the pipeline takes them and they are not None,
    `further` (the recipe's `attach.arguments`) always. Steps and seed come between the two: a model's own number of steps does not
    replace the one that is asked for. Raises RecipeError for one of `further` that the pipeline does not take."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if unknown := [key for key in further if key not in takes]:
        raise RecipeError(
            f"attach.arguments: {type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(list(takes)[1:])}"
        )
    usual = {name: value for name, value in {"prompt": prompt, **chosen}.items() if value is not None and name in takes}

    def arguments(steps: int, seed: int) -> dict[str, Any]:
        of_run = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        given = {"output_type": "latent", **usual, **of_run, **further}
        return {name: value for name, value in given.items() if name in takes}

    return arguments


# --- running --------------------------------------------------------------------------------------------------------


def watch_pipeline(
    pipe: Any, name: str, arguments: Mapping[str, Any], answers: Sequence[Any] | None = None
) -> PipelineRun:
    """One call of the pipeline. The denoiser's k-th call of an evaluation is answered with `answers[k]`, where given.

    Raises ExportError where the loop is not a scheduler's, or more than the denoiser runs in it.
    """
    run = PipelineRun()
    pending: list[ObservedCall] = []
    others: list[tuple[str, int]] = []
    denoiser, scheduler = pipe.components[name], pipe.scheduler
    original, signature = denoiser.forward, inspect.signature(denoiser.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = bind_call(signature, args, kwargs).arguments
        given = map_leaves(given, lambda _, leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
        pending.append(ObservedCall(given, dict(named_leaves(given))))
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
        run.steps, run.order = schedule_steps(scheduler), int(getattr(scheduler, "order", 1))
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
            setattr(scheduler, method, SchedulerObserver(scheduler, method, then))
        with torch.no_grad(), hide_progress_bar(pipe), explain_call_errors(pipe, arguments):
            run.result = pipe(**arguments)
    check_loop(type(pipe).__name__, name, run, pending, others)
    return run


@contextlib.contextmanager
def explain_call_errors(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Raises ExportError for whatever the pipeline's own call raises: as a rule it lacks an argument, such as a picture."""
    try:
        yield
    except PrebakeError:
        raise
    except Exception as e:
        takes = inspect.signature(type(pipe).__call__).parameters
        pictures = [name for name in PICTURE_ARGUMENTS if name in takes and name not in arguments]
        way_out = (
            f"it draws with {', '.join(pictures)}, which no recipe can give: take the pipeline that draws from a prompt alone"
            if pictures
            else "give what it lacks in attach.arguments"
        )
        raise ExportError(
            f"{type(pipe).__name__}: could not be called with {', '.join(arguments)} ({error_summary(e)}); {way_out}"
        ) from e


@contextlib.contextmanager
def hide_progress_bar(pipe: Any) -> Iterator[None]:
    """The pipeline without its progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before


def check_loop(
    pipeline: str, name: str, run: PipelineRun, pending: Sequence[ObservedCall], others: Sequence[tuple[str, int]]
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


def zero_output(output: Any) -> Any:
    """A copy of the output whose tensors are all zeros."""
    answer = copy.deepcopy(output)
    for _, leaf in named_leaves(answer):
        if isinstance(leaf, Tensor):
            leaf.zero_()
    return answer


def describe_output(output: Any, name: str = "") -> OutputStructure:
    """What is around the denoiser's one tensor. Raises ExportError where it returns another number of tensors."""
    if not name:
        tensors = [n for n, leaf in named_leaves(output) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            raise ExportError(
                f"the denoiser returns {len(tensors)} tensors ({', '.join(tensors[:4])}), expected one; it cannot be exported"
            )
    if isinstance(output, Tensor):
        return OutputStructure(kind="tensor")
    if isinstance(output, Mapping):
        cls = type(output)
        items = {str(key): describe_output(item, f"{name}.{key}") for key, item in output.items()}
        return OutputStructure(
            kind="dict", cls="" if cls is dict else f"{cls.__module__}.{cls.__qualname__}", items=items
        )
    if isinstance(output, tuple | list):
        items = {str(i): describe_output(item, f"{name}.{i}") for i, item in enumerate(output)}
        return OutputStructure(kind="tuple" if isinstance(output, tuple) else "list", items=items)
    check_plain_value(f"output {name}", output)
    return OutputStructure(kind="constant", value=output)


def check_plain_value(name: str, value: Any) -> None:
    if not isinstance(value, bool | int | float | str | EmptyContainer | None):
        raise ExportError(
            f"{name}: expected tensors and plain values, got a {type(value).__name__}, which an artifact cannot hold"
        )
