"""Bench: artifacts, and diffusers beside them, draw the same pictures in turn on this machine, and are timed.

In: artifact folders of one model and `BenchOptions`. Out: a `BenchResult` of raw samples, which `bench_report.py` makes figures of.
Every plan of an artifact is a row, as is every baseline at every number of steps. A round draws one picture with each row,
A B C A B C ..., the recipe's first prompt with the round's number as seed, so that what slows the machine down slows all of
them down. Whole pictures are timed as a user's call, with nothing watched; a second turn of the same round puts the
denoiser's calls on record. Nothing of diffusers is imported unless a baseline or an attached artifact needs it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...runtime.artifact import Artifact, open_artifact, read_plans
from ...runtime.attachment.attach import attach_opened
from ...runtime.check.artifact import status_problems
from ...runtime.errors import RecipeError, raise_problems
from ...runtime.manifest import ATTACH_FAMILY, Manifest, read_manifest
from ...runtime.pipeline import Pipeline
from ...runtime.plan import Plan
from ..load import source
from ..load.prompts import picture_prompts
from ..progress import Progress
from ..recipe.resolve import Recipe
from ..verify import denoiser_alone as attached
from ..verify.opening import open_replayer
from ..verify.replayer import call_arguments
from ..verify.source_pipeline import load_source_pipeline, manifest_recipe, source_model
from .cold_start import ColdStart, StartTimes, eager_call, measure_cold_start

BASELINES = {
    "eager": (torch.float32, False),
    "eager-bf16": (torch.bfloat16, False),
    "compile": (torch.float32, True),
    "compile-bf16": (torch.bfloat16, True),
}
"""Name -> the pipeline's dtype, and whether torch.compile gets its denoiser."""
CallTimes = tuple[tuple[str, float], ...]
"""The denoiser's evaluations of one picture: the graph's name, and milliseconds."""


@dataclass(frozen=True)
class BenchOptions:
    """What one bench draws. `steps` None is every plan, `cold_runs` 0 leaves cold starts out, `threads` None is torch's
    own number, `model` says where the pipeline is, if not where the manifest says."""

    baselines: tuple[str, ...] = ()
    runs: int = 7
    cold_runs: int = 3
    steps: int | None = None
    threads: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class BenchRow:
    """One way to draw a picture, by prompt and seed. `facts` are what a report says of it besides its times, and `load_s`
    is how long its artifact or pipeline took to open here."""

    name: str
    steps: int
    baseline: str | None
    facts: Mapping[str, Any]
    load_s: float
    picture: Callable[[str, int], float]
    evaluations: Callable[[str, int], CallTimes]


@dataclass
class RowTimes:
    """A row's samples: `image_s` and `calls` have one of each round, `first_image_s` came before them."""

    row: BenchRow
    first_image_s: float = 0.0
    image_s: list[float] = field(default_factory=list)
    calls: list[CallTimes] = field(default_factory=list)

    @property
    def denoiser_s(self) -> list[float]:
        """Seconds of all evaluations together, one figure for each round."""
        return [sum(ms for _, ms in calls) / 1e3 for calls in self.calls]


@dataclass(frozen=True)
class BenchResult:
    """Everything that was measured."""

    manifest: Manifest
    prompt: str
    choices: BenchOptions
    timed: tuple[RowTimes, ...]
    cold: Mapping[str, tuple[StartTimes, ...]]


def run_bench(folders: Sequence[Path], choices: BenchOptions, progress: Progress) -> BenchResult:
    """Draws and times all rows. Raises ArtifactError for a folder that cannot be opened, else RecipeError."""
    if choices.threads:
        torch.set_num_threads(choices.threads)
    subjects = read_subjects(folders, choices)
    prompt = picture_prompts(subjects[0].recipe)[0]
    with progress.stage("cold", choices.cold_runs * (len(subjects) + len(choices.baselines)) or 1):
        cold = measure_cold_starts(subjects, prompt, choices, progress)
    with progress.stage("load", len(subjects) + len(choices.baselines)):
        rows = [row for s in subjects for row in artifact_rows(s, progress)]
        rows += baseline_rows(subjects, choices, progress)
    with progress.stage("bench", choices.runs + 1):
        timed = time_rows(rows, prompt, choices.runs, progress)
    return BenchResult(subjects[0].manifest, prompt, choices, timed, cold)


# --- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchSubject:
    """An artifact that has not been opened: `plans` are those that are timed, `model` is where its pipeline is."""

    label: str
    folder: Path
    manifest: Manifest
    recipe: Recipe
    plans: Mapping[str, Plan]
    model_override: str | None

    @property
    def attached(self) -> bool:
        return self.manifest.family == ATTACH_FAMILY

    @cached_property
    def model(self) -> str:
        """Raises RecipeError where neither the manifest nor the caller says where it is."""
        return self.model_override or source_model(self.manifest)


def read_subjects(folders: Sequence[Path], choices: BenchOptions) -> tuple[BenchSubject, ...]:
    """The artifacts' manifests, recipes and plans. Raises ArtifactError and RecipeError for what cannot be compared."""
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_comparable(folder, manifest, folders[0], manifests[0])
    subjects = tuple(
        BenchSubject(
            label,
            folder,
            manifest,
            manifest_recipe(folder, manifest),
            choose_plans(folder, manifest, choices),
            choices.model,
        )
        for label, folder, manifest in zip(folder_labels(folders), folders, manifests, strict=True)
    )
    if choices.model and not choices.baselines and not any(s.attached for s in subjects):
        raise RecipeError("--model: says where the pipeline of a baseline is; add --baseline, or leave it out")
    for subject in subjects if choices.baselines else [s for s in subjects if s.attached]:
        _ = subject.model
    return subjects


def check_comparable(folder: Path, manifest: Manifest, other: Path, first: Manifest) -> None:
    """Raises ArtifactError for an artifact that failed, and RecipeError for one that draws something else."""
    raise_problems(folder, status_problems(manifest))
    if manifest.source.sha256 != first.source.sha256:
        raise RecipeError(
            f"{folder}: expected an artifact of the same model as {other} ({first.source.model!r}), this one is of "
            f"{manifest.source.model!r} with other files; bench them apart"
        )
    sizes = [(m.defaults.height, m.defaults.width, m.defaults.num_frames or 1) for m in (manifest, first)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"{folder}: expected pictures of the size of {other}'s (height, width, frames {sizes[1]}), this one's are "
            f"{sizes[0]}; bench them apart"
        )


def choose_plans(folder: Path, manifest: Manifest, choices: BenchOptions) -> dict[str, Plan]:
    """The artifact's plans, or those of the asked number of steps. Raises RecipeError where it has none of these."""
    plans = read_plans(folder, manifest)
    kept = {name: p for name, p in plans.items() if choices.steps in (None, p.steps)}
    if not kept:
        raise RecipeError(
            f"--steps {choices.steps}: {folder} has the plans {', '.join(plans)}; choose one of their steps"
        )
    return kept


def folder_labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two are equal the paths as they were given, numbered where these are equal too."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [name if names.count(name) == 1 else f"{name} #{names[:i].count(name) + 1}" for i, name in enumerate(names)]


# --- rows -----------------------------------------------------------------------------------------------------------


def artifact_rows(subject: BenchSubject, progress: Progress) -> Iterator[BenchRow]:
    """A row for each of its plans."""
    progress.announce(subject.label)
    began = time.perf_counter()
    artifact = open_artifact(subject.folder)
    replayer = open_replayer(artifact, subject.recipe, subject.model if subject.attached else "")
    is_attached = isinstance(replayer, attached.AttachedReplayer)
    picture = attached_picture_timer(replayer) if is_attached else plain_picture_timer(artifact)
    load_s = time.perf_counter() - began

    def row(name: str, plan: Plan) -> BenchRow:
        def evaluations(prompt: str, seed: int) -> CallTimes:
            return tuple((c.graph, c.ms) for c in replayer.evaluations(replayer.draw(prompt, seed, plan)))

        facts = {
            "artifact": subject.label,
            "plan": name,
            "cache": plan.cache,
            "scheduler": plan.scheduler,
            "backend": artifact.manifest.backend,
        }
        return BenchRow(
            f"{subject.label}, plan {name}",
            plan.steps,
            None,
            facts,
            load_s,
            lambda prompt, seed: picture(prompt, seed, plan),
            evaluations,
        )

    for name, plan in subject.plans.items():
        yield row(name, plan)


PictureTimer = Callable[[str, int, Plan], float]


def plain_picture_timer(artifact: Artifact) -> PictureTimer:
    """Seconds of a picture as the runtime draws it for its user."""
    pipe = Pipeline(artifact)
    pipe.set_progress_bar_config(disable=True)

    def picture(prompt: str, seed: int, plan: Plan) -> float:
        arguments = call_arguments(pipe, seed, plan)
        began = time.perf_counter()
        pipe(prompt, **arguments)
        return time.perf_counter() - began

    return picture


def attached_picture_timer(replayer: attached.AttachedReplayer) -> PictureTimer:
    """Seconds of a picture by a diffusers pipeline with the artifact in it, which is loaded now."""
    pipe = replayer.loaded.pipe

    def picture(prompt: str, seed: int, plan: Plan) -> float:
        with attach_opened(pipe, replayer.artifact, plan.cache != "none"):
            return attached.draw_picture(replayer.recipe, replayer.loaded, prompt, seed, plan.steps, ()).seconds

    return picture


def baseline_rows(subjects: Sequence[BenchSubject], choices: BenchOptions, progress: Progress) -> Iterator[BenchRow]:
    """A row for each baseline and number of steps. The pipeline is loaded once for each dtype."""
    if choices.baselines:
        import diffusers

        getattr(
            diffusers, subjects[0].manifest.source.pipeline, None
        )  # imported now, so that `load_s` is loading alone
    steps = sorted({p.steps for s in subjects for p in s.plans.values()})
    loaded: dict[torch.dtype, tuple[source.LoadedPipeline, float]] = {}
    for name in choices.baselines:
        progress.announce(name)
        dtype, compiled = BASELINES[name]
        if dtype not in loaded:
            began = time.perf_counter()
            pipeline = load_source_pipeline(subjects[0].manifest, subjects[0].recipe, subjects[0].model, dtype)
            loaded[dtype] = pipeline, time.perf_counter() - began
        eager = EagerBaseline(subjects[0], loaded[dtype][0], compiled)
        for n in steps:
            yield eager.row(name, n, str(dtype).removeprefix("torch."), loaded[dtype][1])


class EagerBaseline:
    """The diffusers pipeline, its denoiser compiled or not while it draws: what else draws with the pipeline sees its own."""

    def __init__(self, subject: BenchSubject, loaded: source.LoadedPipeline, compiled: bool) -> None:
        from ..denoiser_alone.observation import denoiser_name

        self.pipe, self.name = loaded.pipe, denoiser_name(loaded.pipe)
        self.plain: torch.nn.Module = getattr(self.pipe, self.name)
        self.denoiser: Any = torch.compile(self.plain) if compiled else self.plain
        self.draw = eager_call(loaded, subject.manifest, subject.recipe)

    @contextlib.contextmanager
    def swap_denoiser(self) -> Iterator[None]:
        setattr(self.pipe, self.name, self.denoiser)
        try:
            yield
        finally:
            setattr(self.pipe, self.name, self.plain)

    def row(self, name: str, steps: int, dtype: str, load_s: float) -> BenchRow:
        def picture(prompt: str, seed: int) -> float:
            with self.swap_denoiser():
                began = time.perf_counter()
                self.draw(prompt, seed, steps)
                return time.perf_counter() - began

        def evaluations(prompt: str, seed: int) -> CallTimes:
            with self.swap_denoiser(), time_module_calls(self.denoiser) as calls:
                self.draw(prompt, seed, steps)
            return tuple(("denoiser", ms) for ms in calls)

        facts = {"scheduler": type(self.pipe.scheduler).__name__, "dtype": dtype}
        return BenchRow(f"{name}, {steps} steps", steps, name, facts, load_s, picture, evaluations)


@contextlib.contextmanager
def time_module_calls(module: torch.nn.Module) -> Iterator[list[float]]:
    """A list that gets the milliseconds of each of the module's calls. The hooks of a compiled module are not compiled."""
    began: list[float] = []
    taken: list[float] = []
    before = module.register_forward_pre_hook(lambda *_: began.append(finished_at(module)))
    after = module.register_forward_hook(lambda *_: taken.append((finished_at(module) - began.pop()) * 1e3))
    try:
        yield taken
    finally:
        before.remove()
        after.remove()


def finished_at(module: torch.nn.Module) -> float:
    """Now, when a GPU that the module is on has done what it was given."""
    if any(p.is_cuda for p in itertools.islice(module.parameters(), 1)):
        torch.cuda.synchronize()
    return time.perf_counter()


# --- measuring ------------------------------------------------------------------------------------------------------


def time_rows(rows: Sequence[BenchRow], prompt: str, runs: int, progress: Progress) -> tuple[RowTimes, ...]:
    """All rounds. Before them each row draws two pictures, one of either kind, of which only the first's time is kept."""
    timed = tuple(RowTimes(row) for row in rows)
    progress.announce(f"warm-up, {len(rows)} rows")
    for t in timed:
        t.first_image_s = t.row.picture(prompt, 0)
        t.row.evaluations(prompt, 0)
    for seed in range(runs):
        progress.announce(f"round {seed + 1} of {runs}, {len(rows)} rows")
        for t in timed:
            t.image_s.append(t.row.picture(prompt, seed))
        for t in timed:
            t.calls.append(t.row.evaluations(prompt, seed))
    return timed


def measure_cold_starts(
    subjects: Sequence[BenchSubject], prompt: str, choices: BenchOptions, progress: Progress
) -> dict[str, tuple[StartTimes, ...]]:
    """Each artifact with its first plan, and each baseline at the first artifact's steps, in turn."""
    if not choices.cold_runs:
        return {}
    found: dict[str, list[StartTimes]] = {}
    wanted = [*(artifact_start(s, prompt) for s in subjects), *baseline_starts(subjects[0], prompt, choices)]
    for k in range(choices.cold_runs):
        for start in wanted:
            progress.announce(f"{start.name}, start {k + 1} of {choices.cold_runs}")
            found.setdefault(start.name, []).append(measure_cold_start(start))
    return {name: tuple(runs) for name, runs in found.items()}


def artifact_start(subject: BenchSubject, prompt: str) -> ColdStart:
    name, plan = next(iter(subject.plans.items()))
    pipeline: dict[str, Any] = {}
    if subject.attached:
        from ..settle import component_dtypes

        pipeline = {
            **pipeline_location(subject),
            "attached": True,
            "dtypes": dtype_names(component_dtypes(subject.recipe)),
        }
    label = f"{subject.label}, plan {name}"
    cached = plan.cache != "none"
    return ColdStart(
        label, str(subject.folder.resolve()), prompt, plan.steps, cached, torch.get_num_threads(), **pipeline
    )


def baseline_starts(subject: BenchSubject, prompt: str, choices: BenchOptions) -> Iterator[ColdStart]:
    steps = next(iter(subject.plans.values())).steps
    for name in choices.baselines:
        dtype, compiled = BASELINES[name]
        yield ColdStart(
            f"{name}, {steps} steps",
            str(subject.folder.resolve()),
            prompt,
            steps,
            False,
            torch.get_num_threads(),
            **pipeline_location(subject),
            dtypes=dtype_names({"default": dtype}),
            compiled=compiled,
        )


def dtype_names(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    return {component: str(dtype).removeprefix("torch.") for component, dtype in dtypes.items()}


def pipeline_location(subject: BenchSubject) -> dict[str, Any]:
    """The pipeline and where it lies on this disk: `pipeline`, `pipeline_class` and `config` of a start."""
    model, recipe = subject.model, subject.recipe
    named = {"pipeline_class": subject.manifest.source.pipeline}
    if source.is_single_file(model):
        file = Path(model).expanduser().resolve()
        config = source.find_config_folder(recipe.model.config, file)
        return {**named, "pipeline": str(file), "config": str(config.resolve()) if config else None}
    return {**named, "pipeline": str(source.find_model(model, recipe.model.revision).resolve())}
