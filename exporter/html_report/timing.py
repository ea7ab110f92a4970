"""Times for the page: every plan of the default number of steps draws the same picture in turn, on this machine.

A round draws one picture with each plan, with the calls of its graphs on record; what is in none of them (tokenizers, the
updates of the latents, conversion to a picture) is the rest. Ratios against diffusers are `prebake bench`'s, not these.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...runtime.artifact import open_artifact
from ...runtime.attachment.facts import variant_name
from ...runtime.manifest import ATTACH_FAMILY, Manifest
from ...runtime.plan import Plan
from ..bench.report import bench_machine_facts
from ..load.prompts import picture_prompts
from ..progress import Progress
from ..verify.opening import open_replayer
from ..verify.replayer import ArtifactReplayer, DrawnPicture
from ..verify.source_pipeline import manifest_recipe, source_model

DENOISER_STAGE, REST_STAGE = "denoiser", "the rest"


@dataclass
class PlanTimes:
    """Samples, one of each round: seconds of whole pictures, milliseconds of each evaluation and of each stage."""

    image_s: list[float] = field(default_factory=list)
    evaluations_ms: list[tuple[float, ...]] = field(default_factory=list)
    stages_ms: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class ReportTimes:
    """`plans` by name, in order; `load_s` is one sample, of files whose hashes had just been compared."""

    prompt: str
    runs: int
    load_s: float
    plans: Mapping[str, PlanTimes]
    machine: Mapping[str, str | int]


def time_plans(
    folder: Path, manifest: Manifest, plans: Sequence[Plan], runs: int, model: str | None, progress: Progress
) -> ReportTimes:
    """`runs` rounds, after one that warms up. Raises ArtifactError where the artifact cannot run here."""
    recipe = manifest_recipe(folder, manifest)
    # only a denoiser alone has its pipeline in diffusers
    where = (model or source_model(manifest)) if manifest.family == ATTACH_FAMILY else ""
    began = time.perf_counter()
    replayer = open_replayer(open_artifact(folder, trust="size"), recipe, where)
    load_s = time.perf_counter() - began
    prompt, times = picture_prompts(recipe)[0], {plan.name: PlanTimes() for plan in plans}
    progress.announce("warm-up")
    for plan in plans:
        replayer.draw(prompt, 0, plan)
    for seed in range(runs):
        progress.announce(f"round {seed + 1} of {runs}")
        for plan in plans:
            add_samples(times[plan.name], replayer, replayer.draw(prompt, seed, plan))
    named = {
        name: value for name, value in bench_machine_facts().items() if name in ("cpu", "threads", "python", "torch")
    }
    if replayer.artifact.device.type == "cuda":
        named["gpu"] = torch.cuda.get_device_name()
    return ReportTimes(prompt, runs, load_s, times, named)


def add_samples(times: PlanTimes, replayer: ArtifactReplayer, drawn: DrawnPicture) -> None:
    """Adds one picture's samples to the plan's times."""
    evaluations = tuple(call.ms for call in replayer.evaluations(drawn))
    stages: dict[str, float] = {}
    for call in drawn.calls:
        name = DENOISER_STAGE if variant_name(call.graph) in replayer.artifact.variants else call.graph
        stages[name] = stages.get(name, 0.0) + call.ms
    times.image_s.append(drawn.seconds)
    times.evaluations_ms.append(evaluations)
    times.stages_ms.append({**stages, REST_STAGE: drawn.seconds * 1e3 - sum(stages.values())})
