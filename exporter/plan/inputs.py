"""What a plan is made of besides the recipe: the scheduler, the model's layout, the sites and the variants.

An export writes it as `replan.json`, which the runtime ignores, and `prebake plan` reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...runtime.errors import ArtifactError, describe_schema_error
from ...runtime.manifest import Manifest
from ...runtime.plan import PLAN_INPUTS_FILE
from ..sites.layout import Layout
from ..sites.marks import Action, Mark, Variant
from . import PlanSet


class PlanInputs(BaseModel):
    """What `replan.json` holds. `variants` says of each which sites do not compute."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scheduler: str
    scheduler_config: dict[str, Any]
    layout: Layout
    marks: tuple[Mark, ...]
    variants: dict[str, dict[str, Action]]

    def all_variants(self) -> tuple[Variant, ...]:
        """The artifact's variants, each with the action of every site."""
        return tuple(
            Variant(name, tuple((m.name, actions.get(m.name, "compute")) for m in self.marks))
            for name, actions in self.variants.items()
        )


def write_plan_inputs(folder: Path, scheduler: Any, layout: Layout, planned: PlanSet) -> None:
    """Sorted keys, no set order, a final newline: equal exports give equal bytes."""
    config = json.loads(scheduler.to_json_string())
    config["_use_default_values"] = sorted(scheduler.config.get("_use_default_values", ()))
    variants: dict[str, dict[str, Action]] = {
        v.name: {site: a for site, a in v.actions if a != "compute"} for v in planned.variants
    }
    content = PlanInputs(
        scheduler=type(scheduler).__name__,
        scheduler_config=config,
        layout=layout,
        marks=planned.marks,
        variants=variants,
    )
    text = json.dumps(content.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True) + "\n"
    (folder / PLAN_INPUTS_FILE).write_text(text, "utf-8")


def read_plan_inputs(folder: Path, manifest: Manifest) -> PlanInputs:
    """Raises ArtifactError for an artifact that was written without `replan.json`."""
    if PLAN_INPUTS_FILE not in {entry.path for entry in manifest.files}:
        raise ArtifactError(
            f"{folder}: has no {PLAN_INPUTS_FILE}, which says what a plan is made of; export again with this prebake"
        )
    try:
        return PlanInputs.model_validate_json((folder / PLAN_INPUTS_FILE).read_bytes())
    except ValidationError as e:
        raise ArtifactError(f"{describe_schema_error(folder / PLAN_INPUTS_FILE, e)}; export again") from e
