"""Attach: an artifact's denoiser in place of the one in an ordinary diffusers pipeline, whatever its family.

In: a diffusers pipeline, which the caller has loaded, and an artifact that holds a denoiser alone. Out: the same pipeline,
whose denoiser's `forward` replays compiled graphs by a plan; config, dtype, device and class of the denoiser stay, and so
do the pipeline's scheduler, text encoders and VAE. Every call is compared with the one that the export recorded, before
it runs. This module imports no diffusers; `exporter/denoiser_alone/recording.py` writes the facts that it reads.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artifact import Artifact, open_artifact
from ..check.artifact import PublicKey, Trust, status_problems
from ..errors import RequestError, raise_problems
from ..gpu.memory import explain_gpu_memory
from ..plan import DenoiserCall, Plan
from ..private_torch import is_compiled_module
from ..replay import Tensors, slot_inputs, store_sites
from .arguments import argument_name_problems, bind_call, diffusers_class, named_leaves
from .facts import AttachmentFacts, graph_name, read_facts
from .scheduler_observer import SchedulerObserver, schedule_steps
from .snapshot import WEIGHT_SAMPLES, DenoiserSnapshot, config_of, differing_keys, weights_digest


def attach(
    pipeline: Any,
    artifact: Artifact | str | Path,
    *,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    trust: Trust = "hash",
    public_key: PublicKey | None = None,
    minimum_release: int | None = None,
) -> Attachment:
    """Puts the artifact's denoiser into `pipeline`, until `detach(pipeline)` or the end of a `with` block.

    From then on the pipeline's own call runs the plan for its number of steps, with the cache or, if `cache` is False,
    without. `cache_dir`, `trust`, `public_key` and `minimum_release` are as for `load`. Compared with the export now: the classes of pipeline,
    denoiser and scheduler, the denoiser's config, and of each of its weights name, shape, dtype and 16 numbers. Not
    compared: the other numbers. What is changed of the denoiser afterwards (a LoRA, weights, modules, config) is refused by the
    pipeline's next call. Raises RequestError for what differs, and for a denoiser that carries hooks, and ArtifactError as `load` does.
    """
    if not isinstance(artifact, Artifact):
        artifact = open_artifact(
            artifact, cache_dir=cache_dir, trust=trust, public_key=public_key, minimum_release=minimum_release
        )
    raise_problems(artifact.folder, status_problems(artifact.manifest))
    return attach_opened(pipeline, artifact, cache)


def attach_opened(pipeline: Any, artifact: Artifact, cache: bool) -> Attachment:
    """Attaches an open artifact to the pipeline, whatever its verification said."""
    facts = read_facts(artifact)
    denoiser = match_denoiser(pipeline, artifact, facts)
    attached = Attachment(pipeline, denoiser, artifact, facts, cache)
    attached.install()
    return attached


def detach(pipeline: Any) -> None:
    """Gives the pipeline its own denoiser back. Raises RequestError where none is attached."""
    parts = pipeline_components(pipeline).values()
    found = {id(a): a for part in parts for a in (attachment_of(part), followed_by(part)) if a}
    if not found:
        raise RequestError(f"{type(pipeline).__name__}: nothing is attached to it, so there is nothing to detach")
    for attached in found.values():
        attached.remove()


@dataclass
class PlanCursor:
    """One call of the pipeline: where in the plan it is, and what each branch has stored."""

    plan: Plan
    evaluation: int = 0
    branch: int = 0
    stored: dict[int, dict[str, deque[Tensors]]] = field(default_factory=dict)

    @property
    def call(self) -> DenoiserCall | None:
        """What the denoiser should be asked next, None after the last evaluation."""
        if self.evaluation == len(self.plan.evaluations):
            return None
        return self.plan.evaluations[self.evaluation].calls[self.branch]

    def advance(self) -> None:
        """Moves to the next call: the evaluation's next branch, or the next evaluation's first."""
        self.branch += 1
        if self.branch == len(self.plan.evaluations[self.evaluation].calls):
            self.evaluation, self.branch = self.evaluation + 1, 0


def run_denoiser(artifact: Artifact, run: PlanCursor, call: DenoiserCall, given: Tensors) -> Tensor:
    """The denoiser's output at the run's present call, from the tensors of that call; the run moves on."""
    evaluation = run.plan.evaluations[run.evaluation]
    bound_graph = artifact.graph(graph_name(evaluation.variant, call.of))
    stored = run.stored.setdefault(run.branch, {})
    if bound_graph.graph.combines:
        given = {
            **given,
            "coefficients": artifact.tables[run.plan.name].coefficients[run.evaluation],
            **slot_inputs(bound_graph.graph, stored),
        }
    with explain_gpu_memory(artifact.folder, "the denoiser ran", artifact.manifest, artifact.device):
        result = bound_graph(given)
    store_sites(bound_graph.graph, artifact.sites, stored, result)
    run.advance()
    return result["sample"]


class Attachment:
    """An artifact in a pipeline: the denoiser's `forward` for as long as it is attached. Leaving a `with` detaches it."""

    def __init__(
        self, pipeline: Any, denoiser: nn.Module, artifact: Artifact, facts: AttachmentFacts, cache: bool
    ) -> None:
        self.pipeline, self.denoiser, self.artifact, self.facts, self.cache = pipeline, denoiser, artifact, facts, cache
        self._scheduler = pipeline.scheduler
        self._classes = {name: diffusers_class(name) for name in sorted(facts.output.class_names())}
        self._run: PlanCursor | None = None
        self._snapshot = DenoiserSnapshot.of(denoiser)
        functools.update_wrapper(self, denoiser.forward)
        self._signature = inspect.signature(denoiser.forward)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def install(self) -> None:
        """Takes the place of the denoiser's forward, and follows the scheduler: a run begins where a schedule is set."""
        self.denoiser.forward = self
        self._scheduler.set_timesteps = SchedulerObserver(self._scheduler, "set_timesteps", self.begin)

    def remove(self) -> None:
        """Leaves denoiser and scheduler as they were; once more does nothing. Raises RequestError where another forward is around
        it by now."""
        if self in vars(self.denoiser).values() and attachment_of(self.denoiser) is not self:
            raise RequestError(
                f"{self.facts.denoiser}: its forward was replaced since the artifact was attached; undo that first (of accelerate: "
                "pipeline.remove_all_hooks()), then detach"
            )
        if attachment_of(self.denoiser) is self:
            del self.denoiser.forward
        if followed_by(self._scheduler) is self:
            del self._scheduler.set_timesteps
        self._run = None

    def begin(self, *_: Any, **__: Any) -> None:
        """A new run, at the plan's first evaluation. What an interrupted one had stored is dropped."""
        self._run = None
        self.artifact.refuse_changed_weights()
        self._refuse_changes()
        name = self.artifact.plan_name(schedule_steps(self._scheduler), self.cache)
        self._run = PlanCursor(self.artifact.plans[name])

    def _refuse_changes(self) -> None:
        """Raises RequestError for a denoiser that is not what it was: the artifact would draw on as if it were."""
        name = self.facts.denoiser
        if pipeline_components(self.pipeline).get(name) is not self.denoiser:
            change = f"the pipeline has another {name}"
        elif attachment_of(self.denoiser) is not self or is_compiled_module(self.denoiser):
            change = f"{name}: its forward was replaced or compiled"
        elif change := self._snapshot.describe_change(self.denoiser):
            change = f"{name}: {change}"
        if change:
            raise RequestError(
                f"{change} since the artifact was attached, which its graphs know nothing of; undo it, or detach(pipeline) to draw with "
                "it, or export again"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward of the denoiser. Raises RequestError, before anything runs, for a call that the plan does not have."""
        run, call = self._next_call()
        given = self._graph_inputs(call, args, kwargs, f"evaluation {run.evaluation} of plan {run.plan.name!r}")
        return self.facts.output.wrap_tensor(run_denoiser(self.artifact, run, call, given), self._classes)

    def _next_call(self) -> tuple[PlanCursor, DenoiserCall]:
        """The run that the pipeline is in, and the call that it should make now."""
        if self.pipeline.scheduler is not self._scheduler:
            raise RequestError(
                f"scheduler: expected the {type(self._scheduler).__name__} that the pipeline had when the artifact was "
                f"attached, got another {type(self.pipeline.scheduler).__name__}; detach, and attach again"
            )
        if self._run is None:
            raise RequestError(
                f"{self.facts.denoiser}: called before the pipeline set a schedule, so no plan can be followed; call the "
                "pipeline, or detach to use the denoiser alone"
            )
        call = self._run.call
        if call is None:
            raise RequestError(
                f"{self.facts.denoiser}: plan {self._run.plan.name!r} ends after {len(self._run.plan.evaluations)} "
                "evaluations, and the pipeline calls it once more; call the pipeline as the recipe did, or export again"
            )
        return self._run, call

    def _graph_inputs(
        self, call: DenoiserCall, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
    ) -> Tensors:
        """The graph's inputs by name. Raises RequestError naming the first argument that is not as recorded."""
        try:
            given = dict(named_leaves(bind_call(self._signature, args, kwargs).arguments))
        except TypeError as e:
            raise RequestError(
                f"{where}: {self.facts.denoiser_class} does not take this call ({e}); correct the call"
            ) from e
        expected = self.facts.calls[call.of]
        problem = argument_name_problems(expected, given)
        for argument in () if problem else expected:
            recorded = call.values.get(argument.name, ())
            if problem := argument.problem(given[argument.name], self.artifact.device, recorded):
                break
        if problem:
            raise RequestError(f"{where}: {problem}")
        return {a.name: given[a.name].contiguous() for a in expected if a.is_input}


# --- what is compared when an artifact is attached ------------------------------------------------------------------


def match_denoiser(pipeline: Any, artifact: Artifact, facts: AttachmentFacts) -> nn.Module:
    """The pipeline's denoiser. Raises RequestError for the first thing that is not as at export."""
    parts = pipeline_components(pipeline)
    refuse_mismatch(
        "pipeline", artifact.manifest.source.pipeline, type(pipeline).__name__, "attach to a pipeline of this class"
    )
    denoiser = parts.get(facts.denoiser)
    refuse_mismatch(
        facts.denoiser, facts.denoiser_class, type(denoiser).__name__, "load the pipeline as it was at export"
    )
    assert isinstance(denoiser, nn.Module)
    refuse_denoiser_hooks(facts.denoiser, denoiser)
    scheduler = next(iter(artifact.plans.values())).scheduler
    refuse_mismatch(
        "scheduler", scheduler, type(pipeline.scheduler).__name__, "set the export's scheduler, or export again"
    )
    if "set_timesteps" in vars(pipeline.scheduler):
        raise RequestError(
            "scheduler: its set_timesteps is replaced already, so it cannot be followed; load a fresh one"
        )
    refuse_mismatch(
        facts.denoiser,
        artifact.device,
        next(denoiser.parameters()).device,
        "move the pipeline, or export for its device",
    )
    config = config_of(denoiser)
    for key in sorted(differing_keys(facts.config, config)):
        refuse_mismatch(
            f"{facts.denoiser}.config.{key}", facts.config.get(key), config.get(key), "load the export's model"
        )
    if empty := [name for name, tensor in denoiser.state_dict().items() if tensor.is_meta]:
        raise RequestError(
            f"{facts.denoiser}: its weight {empty[0]} holds no numbers ({len(empty)} in all); load the export's whole model"
        )
    if weights_digest(denoiser) != facts.weights:
        raise RequestError(
            f"{facts.denoiser}: its weights are not the ones of the export (names, shapes, dtypes, and {WEIGHT_SAMPLES} numbers of "
            "each are compared); load the export's model in its precision and without LoRA, or export again"
        )
    return denoiser


def refuse_mismatch(what: str, expected: Any, came: Any, way_out: str) -> None:
    """Raises RequestError unless both are equal."""
    if expected != came:
        raise RequestError(f"{what}: the artifact was exported for {expected}, got {came}; {way_out}")


def refuse_denoiser_hooks(name: str, denoiser: nn.Module) -> None:
    """Raises RequestError for what would run beside the replaced forward, or in place of it."""
    if attachment_of(denoiser):
        raise RequestError(f"{name}: an artifact is attached to it already; detach(pipeline) first")
    if is_compiled_module(denoiser):
        raise RequestError(f"{name}: is compiled by torch.compile; load a fresh pipeline and attach to that")
    for path, module in denoiser.named_modules():
        where = f"{name}.{path}" if path else name
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.hooks:
            carried = f"the diffusers hook {', '.join(registry.hooks)}"
        elif hasattr(module, "_hf_hook"):
            carried = "accelerate's hook (CPU offload, a device map)"
        elif "forward" in vars(module):
            carried = "another forward"
        else:
            continue
        raise RequestError(
            f"{where}: carries {carried}, which an artifact cannot carry out; load a pipeline without it"
        )


def pipeline_components(pipeline: Any) -> Mapping[str, Any]:
    """A diffusers pipeline's parts by name. Raises RequestError for anything else."""
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, Mapping):
        raise RequestError(
            f"expected a diffusers pipeline, got {type(pipeline).__name__}; load it with diffusers first"
        )
    return parts


def attachment_of(denoiser: Any) -> Attachment | None:
    """What is attached to a denoiser."""
    forward = vars(denoiser).get("forward") if isinstance(denoiser, nn.Module) else None
    return forward if isinstance(forward, Attachment) else None


def followed_by(scheduler: Any) -> Attachment | None:
    """The attachment that follows the scheduler's schedules."""
    observer = vars(scheduler).get("set_timesteps") if hasattr(scheduler, "__dict__") else None
    begin = getattr(observer, "then", None) if isinstance(observer, SchedulerObserver) else None
    owner = getattr(begin, "__self__", None)
    return owner if isinstance(owner, Attachment) else None
