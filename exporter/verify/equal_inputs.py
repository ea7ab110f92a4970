"""Equal inputs: what eager says of single evaluations, at the artifact's own inputs, so that errors do not add up over steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...runtime.plan import Plan
from .closeness import relative_error
from .loss import KnownEvaluation
from .reference import EagerReference
from .replayer import GraphCall


@dataclass(frozen=True)
class ForcedEvaluations:
    """What eager says of evaluations at equal inputs, as in `Sample`."""

    errors: tuple[float | None, ...] = ()
    compiled: tuple[float | None, ...] = ()
    eager_ms: tuple[float, ...] = ()
    known: tuple[KnownEvaluation, ...] = ()


def compare_evaluations(
    reference: EagerReference,
    plan: Plan,
    calls: Sequence[GraphCall],
    forced: Collection[int],
    scaled: Collection[int] = (),
) -> ForcedEvaluations:
    """Teacher-forced errors of the calls, None of those that are not in `forced`, and eager's milliseconds for the others.
    Nothing at all where none is."""
    errors: list[float | None] = []
    compiled: list[float | None] = []
    eager_ms, known = [], []
    for e, call in enumerate(calls if forced else ()):
        errors.append(None)
        compiled.append(None)
        if e not in forced:
            continue
        theirs, ms = reference.evaluate(call)
        errors[e] = relative_error(call.outputs["sample"], theirs)
        eager_ms.append(ms)
        if reference.is_whole(call):
            compiled[e] = errors[e]
        elif (same := reference.evaluate_variant(call)) is not None:
            compiled[e] = relative_error(call.outputs["sample"], same)
        if e in scaled:
            known.append(KnownEvaluation(plan.size, plan.evaluations[e].timestep, call, theirs))
    return ForcedEvaluations(tuple(errors), tuple(compiled), tuple(eager_ms), tuple(known))
