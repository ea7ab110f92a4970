"""What an artifact of a denoiser alone says of its pipeline."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ..artifact import Artifact
from ..errors import ArtifactError, RequestError, describe_schema_error
from ..manifest import ATTACH_FAMILY
from ..plan import FROZEN_CONFIG
from .arguments import Argument, OutputStructure


class AttachmentFacts(BaseModel):
    """`manifest.pipeline` of such an artifact. `calls` are the distinct calls that the pipeline makes, each the arguments
    of one; a plan's evaluations name them by position. `config` is the denoiser's, without what starts with `_`."""

    model_config = FROZEN_CONFIG
    denoiser: str
    denoiser_class: str
    config: dict[str, Any]
    weights: str
    calls: tuple[tuple[Argument, ...], ...]
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
    return facts
