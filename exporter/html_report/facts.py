"""Everything that the page says, read from the artifact's folder and, if asked for, drawn and timed here.

No code of the artifact is opened but to draw or to time. Every file is hashed against the manifest before anything is said.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...runtime.artifact import read_plans
from ...runtime.check.artifact import file_name_problems, file_problems, hash_problems, reference_problems
from ...runtime.errors import ArtifactError, raise_problems
from ...runtime.manifest import Manifest, read_manifest
from ...runtime.plan import Plan
from ...runtime.storage.weight_files import component_name
from ..progress import Progress
from ..rewrite.quantize import layer_role
from ..verify.picture_sheet import sheet_plans
from . import plan_strip, timing
from .verification import SavedVerification, outcome_verification, read_verification

MIN_RUNS = 2


@dataclass(frozen=True)
class ReportOptions:
    """`source`: draw anew with the pipeline, which `model` names if the manifest does not. `runs` 0 leaves times out."""

    source: bool = False
    model: str | None = None
    runs: int = 5


@dataclass(frozen=True)
class PageFacts:
    """What the page is made of. `plans` are all of the artifact's, `shown` those that are drawn and timed: of the default
    number of steps, uncached first. `weights` are bytes by layer kind and treatment."""

    name: str
    manifest: Manifest
    manifest_sha256: str
    signed: bool
    plans: Mapping[str, Plan]
    shown: tuple[Plan, ...]
    strips: Mapping[str, tuple[plan_strip.StripRow, ...]]
    weights: Mapping[tuple[str, str], int]
    verification: SavedVerification | None
    has_new_pictures: bool
    times: timing.ReportTimes | None


def gather_facts(folder: Path, choices: ReportOptions, progress: Progress) -> PageFacts:
    """Reads, and draws and times as chosen. Raises ArtifactError for a folder that is damaged, or that cannot run here
    where it has to, and RecipeError for a source that is not its own."""
    manifest = read_manifest(folder)
    with progress.stage("read", 2):
        progress.announce("hashes")
        refuse_damaged(folder, manifest)
        plans = read_plans(folder, manifest)
        actions = plan_strip.variant_actions(folder, manifest)
    shown = sheet_plans(manifest, plans)
    saved = (
        redraw_pictures(folder, choices.model, progress)
        if choices.source
        else read_verification(folder, manifest, plans)
    )
    times = None
    if choices.runs:
        with progress.stage("time", choices.runs + 1):
            times = measure_times(folder, manifest, shown, choices, progress)
    return PageFacts(
        name=folder.resolve().name,
        manifest=manifest,
        manifest_sha256=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        signed=(folder / "signature.json").is_file(),
        plans=plans,
        shown=shown,
        strips={name: plan_strip.strip_rows(plan, manifest, actions) for name, plan in plans.items()},
        weights=weights_by_kind(folder, manifest),
        verification=saved,
        has_new_pictures=choices.source,
        times=times,
    )


def refuse_damaged(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError unless every file is what the manifest says, on whatever machine this is."""
    raise_problems(folder, [*file_name_problems(manifest), *reference_problems(manifest)])
    raise_problems(folder, file_problems(folder, manifest))
    raise_problems(folder, hash_problems(folder, manifest))


def redraw_pictures(folder: Path, model: str | None, progress: Progress) -> SavedVerification:
    """The recipe's prompts with seed 0, drawn with the artifact and with its pipeline now. The artifact stays as it is."""
    from ..verify.verify import VerifyOptions as Comparing
    from ..verify.verify import verify_artifact

    comparing = Comparing(with_source=True, model=model, prompt_set="recipe", seeds=1)
    return outcome_verification(*verify_artifact(folder, comparing, progress))


def measure_times(
    folder: Path, manifest: Manifest, shown: tuple[Plan, ...], choices: ReportOptions, progress: Progress
) -> timing.ReportTimes:
    try:
        return timing.time_plans(folder, manifest, shown, choices.runs, choices.model, progress)
    except ArtifactError as e:
        raise ArtifactError(f"{e}\nthe page needs no machine that can run the artifact with --no-timing") from e


def weights_by_kind(folder: Path, manifest: Manifest) -> dict[tuple[str, str], int]:
    """(kind, treatment) -> bytes of the stored weights, largest first: the denoiser's by the role of their layer, all
    others by their file."""
    found: dict[tuple[str, str], int] = {}
    for entry in manifest.files:
        if not entry.path.startswith("weights/"):
            continue
        component = component_name(entry.path)
        for key, size in tensor_bytes(folder / entry.path).items():
            layer = find_layer(key, manifest) if component == "denoiser" else None
            told = (component, "") if component != "denoiser" else ("denoiser: norms, tables and others", "")
            if layer is not None:
                told = (f"denoiser: {layer_role(layer)}", manifest.layers[layer][0])
            found[told] = found.get(told, 0) + size
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def find_layer(key: str, manifest: Manifest) -> str | None:
    """The layer of `manifest.layers` whose tensor this is: the longest whose path is in the key."""
    parts = key.split(".")
    paths = (".".join(parts[i:j]) for n in range(len(parts), 0, -1) for i, j in _windows(len(parts), n))
    return next((path for path in paths if path in manifest.layers), None)


def _windows(count: int, length: int) -> list[tuple[int, int]]:
    return [(i, i + length) for i in range(count - length + 1)]


def tensor_bytes(path: Path) -> dict[str, int]:
    """Key -> bytes, from the header of a safetensors file: 8 bytes of its length, and JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        key: said["data_offsets"][1] - said["data_offsets"][0] for key, said in header.items() if key != "__metadata__"
    }
