"""Cold start: how long it takes from an empty process to the first picture, stage by stage.

In: what to start, as a `ColdStart`. Out: a `StartTimes` of a fresh Python process: `start` (the interpreter), `import`, `load` and
`first_image`, in seconds. What the measuring itself imports lies between the stages and is in none. Unpacked code
and torch.compile's caches go to a folder that is empty before and gone after, so nothing is found that another run left;
the files themselves may lie in the system's cache, as they do for a program that is started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import ArtifactError, ExportError, PrebakeError

if TYPE_CHECKING:
    from ...runtime.manifest import Manifest
    from ..load.source import LoadedPipeline
    from ..recipe.resolve import Recipe

START_PROGRAM = "import time; arrived = time.monotonic(); from prebake.exporter.bench.cold_start import run_in_process; run_in_process(arrived)"
STAGES = ("start", "import", "load", "first_image")
DrawCall = Callable[[str, int, int], Any]
"""One picture of a prompt, a seed and a number of steps."""


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """What to start: an artifact by itself, or a diffusers pipeline, plain, compiled or with an artifact attached.

    `pipeline` is the folder or file to load with diffusers, None = the artifact alone; `config` as `model.config` of a
    recipe; `dtypes` are names by component; `pipeline_class` is what its program would import. `artifact` says the sizes and the scheduler in any case.
    """

    name: str
    artifact: str
    prompt: str
    steps: int
    cached: bool
    threads: int
    pipeline: str | None = None
    pipeline_class: str = ""
    config: str | None = None
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    attached: bool = False
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class StartTimes:
    """Seconds by stage, and of a second picture; `read_peak_bytes` is the resident memory's peak up to the first picture."""

    seconds: dict[str, float]
    second_image: float
    peak_bytes: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def measure_cold_start(start: ColdStart) -> StartTimes:
    """Starts it once. Raises ArtifactError with what prebake refused there, and ExportError with the process's last line
    where anything else went wrong."""
    with tempfile.TemporaryDirectory(prefix="prebake-cold-") as caches:
        variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        asked = json.dumps({"begun": time.monotonic(), "caches": caches, "start": dataclasses.asdict(start)})
        done = subprocess.run(
            [sys.executable, "-c", START_PROGRAM, asked], env=variables, capture_output=True, text=True, check=False
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ExportError(
            f"cold start of {start.name}: the process ended with code {done.returncode} ({lines[-1]}); leave it out with --no-cold"
        )
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if "refused" in said:
        raise ArtifactError(said["refused"])
    return StartTimes(**said)


# --- in the fresh process -------------------------------------------------------------------------------------------


def run_in_process(arrived: float) -> None:
    """Prints the `StartTimes` of what the arguments ask for, or what was refused. `arrived` is when the interpreter was ready."""
    asked = json.loads(sys.argv[1])
    stages = StageTimes()
    stages.seconds["start"] = arrived - asked["begun"]
    try:
        said = dataclasses.asdict(draw_twice(ColdStart(**asked["start"]), Path(asked["caches"]), stages))
    except PrebakeError as e:
        said = {"refused": str(e)}
    print(json.dumps(said))


def draw_twice(start: ColdStart, caches: Path, stages: StageTimes) -> StartTimes:
    """The stages from `import` on, and a second picture."""
    draw = (start_artifact if start.pipeline is None else start_pipeline)(start, caches, stages)
    with stages.of("first_image"):
        draw(start.prompt, 0, start.steps)
    peak = read_peak_bytes()
    began = time.perf_counter()
    draw(start.prompt, 0, start.steps)
    return StartTimes(stages.seconds, time.perf_counter() - began, peak)


class StageTimes:
    """Seconds by stage, each measured by a `with` block."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def start_artifact(start: ColdStart, caches: Path, stages: StageTimes) -> DrawCall:
    """Opens the artifact with the runtime alone, timing `import` and `load`; how it draws."""
    with stages.of("import"):
        from ...runtime import load
    import torch

    torch.set_num_threads(start.threads)
    with stages.of("load"):
        pipe = load(start.artifact, cache_dir=caches / "code")
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {}
    if (picture := pipe.family_rules.settings.picture) and picture.required:
        from ..verify.replayer import example_arguments

        given = example_arguments(pipe, 0)
    return lambda prompt, seed, steps: pipe(
        prompt, seed=seed, num_inference_steps=steps, cache=start.cached, output_type="pt", **given
    )


def start_pipeline(start: ColdStart, caches: Path, stages: StageTimes) -> DrawCall:
    """Loads the pipeline with diffusers, timing `import` and `load`; how it draws."""
    with stages.of("import"):
        import diffusers
        import torch

        getattr(diffusers, start.pipeline_class, None)  # diffusers imports a class when it is asked for
    from ...runtime import attach
    from ...runtime.manifest import read_manifest
    from ..denoiser_alone.observation import denoiser_name
    from ..load import source
    from ..recipe.resolve import Recipe
    from ..settle import set_scheduler

    torch.set_num_threads(start.threads)
    manifest = read_manifest(Path(start.artifact))
    recipe = Recipe.model_validate(manifest.recipe)
    with stages.of("load"):
        pipe = read_start_pipeline(start)
        set_scheduler(pipe, recipe.sampler.scheduler)
        if start.attached:
            attach(pipe, start.artifact, cache=start.cached, cache_dir=caches / "code")
        if start.compiled:
            name = denoiser_name(pipe)
            setattr(pipe, name, torch.compile(getattr(pipe, name)))
    pipe.set_progress_bar_config(disable=True)
    folder = Path(start.config or start.pipeline or "")
    defaults = source.read_model_defaults(folder) if folder.is_dir() else {}
    return eager_call(source.LoadedPipeline(pipe, manifest.source, defaults), manifest, recipe)


def read_start_pipeline(start: ColdStart) -> Any:
    """The pipeline, without the fingerprint that `source.load_model` takes of its files."""
    import torch

    from ..load import single_file, source

    dtypes = {component: getattr(torch, name) for component, name in start.dtypes.items()}
    model = start.pipeline or ""
    if source.is_single_file(model):
        return single_file.load_single_file(Path(model), Path(start.config) if start.config else None, dtypes)
    return source.read_pipeline(model, Path(model), dtypes)


def eager_call(loaded: LoadedPipeline, manifest: Manifest, recipe: Recipe) -> DrawCall:
    """The plain call of a diffusers pipeline that the artifact of this manifest is held against, on the artifact's device. It returns
    when the picture is in the CPU's memory."""
    import torch

    from ...runtime.manifest import ATTACH_FAMILY
    from ..verify.placement import place_pipeline

    place_pipeline(loaded.pipe, torch.device(manifest.requires.device))
    if manifest.family == ATTACH_FAMILY:
        from ..verify.denoiser_alone import draw_picture

        return torch.no_grad()(lambda prompt, seed, steps: draw_picture(recipe, loaded, prompt, seed, steps, ()))
    from ..families.picture import read_size
    from ..families.registry import load_family

    family, size, scale = load_family(manifest.family), read_size(manifest), manifest.defaults.guidance_scale
    return torch.no_grad()(
        lambda prompt, seed, steps: [t.cpu() for t in family.draw(loaded.pipe, prompt, seed, steps, scale, size)],
    )


def read_peak_bytes() -> int:
    """The peak of this process's resident memory. Not `ru_maxrss`, in which Linux counts what the parent held when it
    started this process."""
    status = Path("/proc/self/status").read_text("utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
