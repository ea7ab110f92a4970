"""The comparison with eager: the same inputs, prompts and seeds, and figures that mean what they say."""

from math import inf, isnan, nan
from types import SimpleNamespace

import pytest
import torch

from prebake.exporter.load.prompts import picture_prompts
from prebake.exporter.progress import Progress
from prebake.exporter.verify import closeness
from prebake.exporter.verify.checked_prompts import CheckedPrompts, checked_prompts
from prebake.exporter.verify.closeness import relative_error
from prebake.exporter.verify.comparison import measure_pictures
from prebake.exporter.verify.opening import load_reference
from support.verification import PROMPTS, asking, whole_work


def test_evaluations_are_compared_at_the_artifacts_own_inputs(replayer, tiny_artifact, tiny_folder):
    """Errors of one evaluation do not add up over steps, and a denoiser with one other weight is noticed at once."""
    manifest, recipe = asking(tiny_artifact, tiny_folder)
    reference = load_reference(tiny_artifact, manifest, recipe, str(tiny_folder))
    found = measure_pictures(
        replayer, reference, whole_work(replayer, [(PROMPTS[0], 0), (PROMPTS[0], 1)]), None, Progress()
    )
    uncached = [s for s in found.pictures if s.plan == "8-uncached"]
    assert [len(s.evaluation_errors) for s in uncached] == [8, 0]  # seed 0 only
    assert max(uncached[0].evaluation_errors) < 0.03
    with torch.no_grad():
        reference._pipe.transformer.proj_out.weight[0] += 1.0
    other = measure_pictures(replayer, reference, whole_work(replayer, [(PROMPTS[0], 0)]), None, Progress())
    assert min(e for s in other.pictures for e in s.evaluation_errors) > 0.03


def test_the_reference_is_the_plain_pipeline(tiny_artifact, tiny_folder, tiny_pipe):
    manifest, recipe = asking(tiny_artifact, tiny_folder)
    drawn = load_reference(tiny_artifact, manifest, recipe, str(tiny_folder)).draw(PROMPTS[0], 3, 8)
    tiny_pipe.set_progress_bar_config(disable=True)
    d, seeded = manifest.defaults, torch.Generator().manual_seed(3)
    call = {"height": d.height, "width": d.width, "guidance_scale": d.guidance_scale, "max_sequence_length": 8}
    expected = tiny_pipe(PROMPTS[0], num_inference_steps=8, generator=seeded, output_type="pt", **call).images
    assert torch.equal(drawn.image, expected)


def test_checked_prompts_are_drawn_with_their_index_as_seed(replayer, tiny_artifact, tiny_folder):
    manifest, recipe = asking(tiny_artifact, tiny_folder)
    reference = load_reference(tiny_artifact, manifest, recipe, str(tiny_folder))
    seen = []

    def exact(images, prompts):
        seen.append((len(images), images[0].shape, prompts))
        return 0.75

    checked = CheckedPrompts(PROMPTS, exact)
    found = measure_pictures(replayer, reference, whole_work(replayer, [], checked), checked, Progress())
    assert seen == [(2, (32, 32, 3), list(PROMPTS))] * 3  # eager and two plans
    assert [row.seed for row in found.rows] == [0, 1]
    assert found.exact_eager == {8: 0.75}
    assert found.exact == {"8": 0.75, "8-uncached": 0.75}
    assert found.checked_pictures == 2
    assert found.pictures == ()


def test_shapes_brings_its_own_prompts_and_checker():
    recipe = SimpleNamespace(model=SimpleNamespace(id="shapes"), verify=SimpleNamespace(prompts=()))
    assert len(picture_prompts(recipe)) == 8
    checked = checked_prompts("shapes")
    assert len(checked.prompts) == 256
    assert checked_prompts("other/model") is None
    import numpy as np

    from prebake.exporter.shapes.checker import parse_prompt
    from prebake.exporter.shapes.world import place_scene, render_scene

    pictures = [render_scene(place_scene(parse_prompt(p), np.random.default_rng(0))) for p in checked.prompts[:2]]
    assert checked.exact(pictures, list(checked.prompts[:2])) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(0.5, 0.5, 120.0), (0.5, 0.6, 20.0), (0.0, 1.0, 0.0), (0.5, 0.501, 60.0)]
)
def test_psnr(a, b, expected):
    full = torch.full((1, 3, 8, 8), a, dtype=torch.float64)
    assert closeness.psnr_db(full, torch.full_like(full, b)) == pytest.approx(expected, abs=1e-9)


def test_figures_of_values_that_are_not_numbers():
    broken = torch.full((1, 3, 8, 8), nan)
    assert isnan(closeness.psnr_db(broken, broken))
    assert isnan(relative_error(torch.tensor([nan]), torch.ones(1)))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == inf
    assert isnan(closeness.largest_error([1.0, nan, 2.0]))
    assert closeness.largest_error([1.0, 3.0, 2.0]) == 3.0
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
