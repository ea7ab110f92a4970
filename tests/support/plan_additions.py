"""Plans added to an artifact, and all that its folder holds."""

from __future__ import annotations

from prebake.exporter import add_plan as replan
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import change_recipe
from prebake.exporter.verify.source_pipeline import manifest_recipe
from prebake.runtime.manifest import read_manifest


def added(folder, steps: int, *overrides: str, **choices):
    recipe = manifest_recipe(folder, read_manifest(folder))
    recipe = change_recipe(recipe, "recipe", [f"sampler.steps={steps}", *overrides])
    with open_progress("quiet") as quiet:
        return replan.add_plans(folder, recipe, steps, replan.PlanOptions(**choices), quiet)


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
