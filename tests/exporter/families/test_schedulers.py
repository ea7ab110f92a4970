"""Whatever scheduler an export of a family takes, diffusers' own pipeline draws with: else its verification could not."""

from __future__ import annotations

import diffusers
import pytest
import torch

from prebake.exporter.families.registry import FAMILIES, load_family
from prebake.exporter.load.source import load_model
from prebake.exporter.plan.sampler import tabulate_scheduler
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.settle import build_scheduler, schedule_arguments, settle
from prebake.runtime.errors import ExportError, RecipeError

SCHEDULERS = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith(("Flax", "_")))
STEPS = 1
FEWEST = {"flux": 2, "flux-kontext": 2, "sd3": 12, "sd": 20, "sdxl": 15, "pixart": 15, "cogvideox": 20}
"""How many schedulers each family takes at least: a test that refused all of them would show nothing."""


def taken_and_drawn(name: str) -> tuple[dict[str, bool], dict[str, str]]:
    """By scheduler: whether diffusers draws finite latents, of those that become a table; and why others become none."""
    loaded = load_model(f"tiny:{name}", None, {"default": torch.float32})
    pipe, drawn, refused = loaded.pipe, {}, {}
    pipe.set_progress_bar_config(disable=True)
    family = load_family(next(key for key, kinds in FAMILIES.items() if type(pipe).__name__ in kinds))
    defaults, size, _ = settle(resolve("baseline", model=f"tiny:{name}"), family, loaded)
    config = pipe.scheduler.config
    for scheduler in SCHEDULERS:
        try:
            pipe.scheduler = build_scheduler(scheduler, config)
            tabulate_scheduler(pipe.scheduler, STEPS, **schedule_arguments(family, pipe, size, STEPS))
        except (ExportError, RecipeError) as e:
            refused[scheduler] = str(e)
            continue
        try:
            with torch.no_grad():
                latents, _ = family.draw(pipe, "a red star", 0, STEPS, defaults.guidance_scale, size)
            drawn[scheduler] = bool(latents.isfinite().all())
        except Exception as e:
            drawn[scheduler] = False
            print(scheduler, e)
    return drawn, refused


@pytest.mark.peers
@pytest.mark.parametrize("name", FEWEST)
def test_what_is_taken_can_be_drawn(name):
    drawn, refused = taken_and_drawn(name)
    assert [scheduler for scheduler, is_drawn in drawn.items() if not is_drawn] == []
    assert len(drawn) >= FEWEST[name]
    assert not [text for text in refused.values() if "Traceback" in text or "\n" in text]


def test_what_the_pipeline_cannot_draw_with_is_named():
    loaded = load_model("tiny:flux", None, {"default": torch.float32})
    flux = load_family("flux")
    heun = build_scheduler("FlowMatchHeunDiscreteScheduler", loaded.pipe.scheduler.config)
    with pytest.raises(ExportError, match="cannot draw with FlowMatchHeunDiscreteScheduler, which takes no sigmas"):
        flux.scheduler_arguments(heun, (4, 4, 4), 8)
