"""What a verification kept: the part of `reports/verify.json` that the page shows, and the cells of `reports/verify.png`.

Files in `reports/` are covered by no hash, so what they say is held against the manifest before it is shown. `report.py`
writes them; a verification that has just been run comes in by the same way.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from ...runtime.errors import ArtifactError, describe_schema_error
from ...runtime.manifest import Manifest, Source
from ...runtime.plan import Plan
from ..verify import picture_sheet as sheet
from ..verify import report

VERIFY_HINT = "write it anew with `prebake verify ARTIFACT --source`"
LOOSE_CONFIG = ConfigDict(extra="ignore", frozen=True)


class Closeness(BaseModel):
    model_config = LOOSE_CONFIG
    pictures: int
    psnr_db: float
    psnr_db_min: float
    ssim: float


class ErrorFigures(BaseModel):
    model_config = LOOSE_CONFIG
    pictures: int
    max: float
    mean: float
    max_per_evaluation: tuple[float | None, ...]


class CompiledFigures(BaseModel):
    model_config = LOOSE_CONFIG
    bfloat16_per_evaluation: tuple[float, ...]


class PlanFigures(BaseModel):
    model_config = LOOSE_CONFIG
    evaluations: tuple[str, ...]
    flops_share_percent: float
    pictures: Closeness | None
    checked_pictures: Closeness | None
    relative_error: ErrorFigures | None
    compiled_error: CompiledFigures | None = None
    accuracy_percent: float | None
    image_s: float | None
    speedup: float | None

    @property
    def near(self) -> Closeness | None:
        return self.pictures or self.checked_pictures


class EagerFigures(BaseModel):
    model_config = LOOSE_CONFIG
    accuracy_percent: float | None
    image_s: float | None


class Threshold(BaseModel):
    model_config = LOOSE_CONFIG
    plan: str
    figure: str
    value: float
    threshold: float
    passed: bool
    over: str


class VerifyReport(BaseModel):
    """`verify.json`, as far as it is shown. `plans`, `eager` and `verdicts` are empty where eager was not run."""

    model_config = LOOSE_CONFIG
    passed: bool
    missed: tuple[str, ...]
    not_measured: tuple[str, ...]
    model: Source
    machine: dict[str, str | int]
    method: dict[str, str] = {}
    plans: dict[str, PlanFigures] = {}
    eager: dict[int, EagerFigures] = {}
    verdicts: tuple[Threshold, ...] = ()


@dataclass(frozen=True)
class SavedVerification:
    """A verification, and the pictures of its sheet: none where it drew none."""

    verified: VerifyReport
    shown: tuple[sheet.SheetRow, ...]
    png: bytes | None


def read_verification(folder: Path, manifest: Manifest, plans: Mapping[str, Plan]) -> SavedVerification | None:
    """What the artifact's `reports/` hold, None where it was never verified.

    Raises ArtifactError for files that are damaged, or that are about another artifact.
    """
    path, picture = folder / "reports/verify.json", folder / "reports/verify.png"
    if not path.is_file():
        return None
    try:
        verified = VerifyReport.model_validate_json(path.read_bytes())
    except ValidationError as e:
        raise ArtifactError(f"{describe_schema_error(path, e)}; {VERIFY_HINT}") from e
    refuse_other_verification(path, verified, manifest, plans)
    if not picture.is_file():
        return SavedVerification(verified, (), None)
    try:
        return SavedVerification(verified, sheet.read_sheet(picture), picture.read_bytes())
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as e:  # Pillow's for what is no good PNG
        raise ArtifactError(f"{picture}: expected a sheet of pictures, but {e}; {VERIFY_HINT}") from e


def outcome_verification(manifest: Manifest, outcome: Any) -> SavedVerification:
    """The verification of an outcome that was just found, by way of what it would write."""
    verified = VerifyReport.model_validate_json(report.format_json(report.describe_outcome(manifest, outcome)))
    if not (outcome.comparison and outcome.comparison.rows):
        return SavedVerification(verified, (), None)
    file = io.BytesIO()
    sheet.save_sheet(outcome.comparison.rows, sheet.sheet_plans(manifest, outcome.plans), file)
    return SavedVerification(verified, sheet.read_sheet(file), file.getvalue())


def refuse_other_verification(
    path: Path, verified: VerifyReport, manifest: Manifest, plans: Mapping[str, Plan]
) -> None:
    """Raises ArtifactError for a verification of another model, or of plans that have changed since."""
    if verified.model.sha256 != manifest.source.sha256:
        raise ArtifactError(
            f"{path}: is about model {verified.model.model!r} with sha256 {verified.model.sha256[:12]}.., the artifact was made "
            f"of {manifest.source.model!r} with {manifest.source.sha256[:12]}..; {VERIFY_HINT}"
        )
    for name, figures in verified.plans.items():
        if name in plans and figures.evaluations != tuple(e.variant for e in plans[name].evaluations):
            raise ArtifactError(f"{path}: plan {name!r} is another one there than in the artifact; {VERIFY_HINT}")
