"""What the tests of verification share: a recipe with thresholds of the test's own, a manifest that fits, and work without a limit."""

from prebake.exporter.package.folder import file_entries
from prebake.exporter.recipe.resolve import Recipe
from prebake.exporter.verify.budget import Costs, choose_workload
from prebake.runtime.manifest import read_manifest

PROMPTS = ("a large red circle", "a small blue square")


def asking(folder, tiny_folder, **thresholds):
    """The manifest, and its recipe with two prompts, one seed, these thresholds and the model where it lies."""
    manifest = read_manifest(folder)
    recipe = Recipe.model_validate(manifest.recipe)
    asked = recipe.verify.model_copy(update={"prompts": PROMPTS, "seeds": 1, **thresholds})
    model = recipe.model.model_copy(update={"id": str(tiny_folder)})
    return manifest, recipe.model_copy(update={"verify": asked, "model": model})


def rewrite_manifest(folder, **changes):
    """The manifest with the folder's files hashed anew."""
    manifest = read_manifest(folder).model_copy(update={"files": file_entries(folder), **changes})
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return manifest


def whole_work(replayer, jobs, checked=None):
    """All of it, however long it takes."""
    plans, count = replayer.artifact.plans, len(checked.prompts) if checked else 0
    costs = Costs(dict.fromkeys(("full", "reuse"), 1.0) | dict.fromkeys(replayer.variants, 1.0), 1.0)
    return choose_workload(None, costs, plans, {"full"}, jobs, count)
