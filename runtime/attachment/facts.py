"""What an artifact of a denoiser alone says of its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from ..artifact import Artifact
from ..bounds import Name
from ..contract import describe_misfits, spec_facts
from ..errors import ArtifactError, RequestError, describe_schema_error, raise_problems
from ..manifest import ATTACH_FAMILY, Listed
from ..plan import FROZEN_CONFIG
from .arguments import Argument, OutputStructure


class AttachmentFacts(BaseModel):
    """`manifest.pipeline` of such an artifact. `calls` are the distinct calls that the pipeline makes, each the arguments
    of one; a plan's evaluations name them by position. `config` is the denoiser's, without what starts with `_`."""

    model_config = FROZEN_CONFIG
    denoiser: Name
    denoiser_class: Name
    config: dict[str, Any]
    weights: Name
    calls: Annotated[tuple[Annotated[tuple[Argument, ...], Listed], ...], Listed]
    output: OutputStructure


def graph_name(variant: str, call: int) -> str:
    """The graph that runs a variant for a kind of call: the first kind's has the variant's own name."""
    return f"{variant}.call{call + 1}" if call else variant


def variant_name(graph: str) -> str:
    """The variant that a graph runs, whatever the kind of call."""
    return graph.partition(".call")[0]


def read_facts(artifact: Artifact) -> AttachmentFacts:
    """`manifest.pipeline`. Raises RequestError for an artifact of a whole pipeline, ArtifactError for plans that do not fit it."""
    manifest, folder = artifact.manifest, artifact.folder
    if manifest.family != ATTACH_FAMILY:
        raise RequestError(
            f"{folder}: expected an artifact that holds a denoiser alone, this one holds all of {manifest.source.pipeline}; "
            "open it with prebake.runtime.load, or export with model.part=denoiser"
        )
    try:
        facts = AttachmentFacts.model_validate(manifest.pipeline)
    except ValidationError as e:
        raise ArtifactError(f"{describe_schema_error(folder / 'manifest.json', e, 'pipeline')}; export again") from e
    graphs = {graph.name for graph in manifest.graphs}
    for name, plan in artifact.plans.items():
        for e, evaluation in enumerate(plan.evaluations):
            fits = all(
                c.of < len(facts.calls) and graph_name(evaluation.variant, c.of) in graphs for c in evaluation.calls
            )
            if not evaluation.calls or not fits:
                raise ArtifactError(
                    f"{folder}: {manifest.plans[name]} [evaluation {e}]: its calls are not among the artifact's; export again"
                )
    raise_problems(
        folder, (f"manifest.json {problem}; export again" for problem in attached_call_problems(artifact, facts))
    )
    return facts


def attached_call_problems(artifact: Artifact, facts: AttachmentFacts) -> Iterator[str]:
    """What the pipeline's calls would give to the graphs, or take from them, that they have not."""
    yield from unstored_site_problems(artifact)
    called = {(e.variant, c.of) for plan in artifact.plans.values() for e in plan.evaluations for c in e.calls}
    for variant, of in sorted(called):
        graph = artifact.graph(graph_name(variant, of)).graph
        given = {a.name: (a.shape, a.dtype) for a in facts.calls[of] if a.is_input}
        taken = spec_facts(s for s in graph.inputs if "@" not in s.name and s.name != "coefficients")
        yield from describe_misfits(f"[graphs.{graph.name}.inputs]", given, taken)
        if "sample" not in {spec.name for spec in graph.outputs}:
            yield f"[graphs.{graph.name}.outputs]: has no 'sample', which a call needs"


def unstored_site_problems(artifact: Artifact) -> Iterator[str]:
    """What a call would combine that none before it has stored: each of an evaluation's calls has stored values of its own."""
    for name, plan in artifact.plans.items():
        stored: dict[int, set[str]] = {}
        for e, evaluation in enumerate(plan.evaluations):
            for branch, call in enumerate(evaluation.calls):
                graph = artifact.graph(graph_name(evaluation.variant, call.of)).graph
                before = stored.setdefault(branch, set())
                if early := sorted(set(graph.combines) - before):
                    yield f"[plans.{name}]: call {branch + 1} of evaluation {e} combines {early[0]!r} before any call stored it"
                before.update(graph.stores)
