"""A compiled artifact of a range: random sizes of it beside the eager pipeline, and random others."""

from __future__ import annotations

import random

import pytest
import torch

from prebake.exporter.load.source import load_model
from prebake.exporter.lower.graphs import rewrite_graphs
from prebake.exporter.pipeline import export
from prebake.exporter.prepared_export import ExportOptions
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import Recipe, resolve
from prebake.runtime import RequestError, load
from prebake.runtime.cli.inspect import further_calls
from prebake.runtime.manifest import read_manifest
from support.captured_pipeline import prepared
from support.tiny_pipelines import DEFAULTS, SIDE

PROMPT = "a red circle"
TOLERANCE = 1e-4
"""On latents, relative in L2: another order of the same float32 sums, over all steps."""


@pytest.fixture(scope="module")
def range_pipe(range_artifact, tmp_path_factory):
    with load(range_artifact, cache_dir=tmp_path_factory.mktemp("cache")) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def eager_pipe(tiny_folder):
    pipe = load_model(str(tiny_folder), None, {"default": torch.float32}).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def legal_sizes(pipe) -> list[tuple[int, int]]:
    """All of its sizes but the one that its graphs were traced at."""
    every = ((height, width) for height in pipe.range.height.values for width in pipe.range.width.values)
    return [size for size in every if size != pipe.sizes[0]]


def draw(pipe, size: tuple[int, int], **more) -> torch.Tensor:
    height, width = size
    generator = torch.Generator().manual_seed(height * width)
    return pipe(PROMPT, height=height, width=width, generator=generator, output_type="latent", **more)[0]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_random_sizes_are_the_eager_pipelines(range_pipe, eager_pipe, count):
    steps = {"num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": DEFAULTS["max_sequence_length"]}
    chosen = random.Random(count).sample(legal_sizes(range_pipe), count)
    expected = {size: draw(eager_pipe, size, **steps) for size in chosen}
    for size in chosen:
        assert relative_error(draw(range_pipe, size), expected[size]) < TOLERANCE, size
    (height, width) = next(size for size in chosen if size[0] != size[1])
    turned = draw(eager_pipe, (width, height), **steps)
    assert relative_error(turned, expected[height, width]) > 100 * TOLERANCE  # the canary: a shape is no area


def test_the_decoder_makes_pictures_of_the_size(range_pipe):
    image = range_pipe(PROMPT, seed=0, height=48, width=80).images[0]
    assert image.size == (80, 48)


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_random_other_sizes_are_refused_with_the_nearest(range_pipe, count):
    legal, rng = range_pipe.range, random.Random(count)
    asked = [(rng.randrange(8, 200), rng.randrange(8, 200)) for _ in range(4 * count)]
    for height, width in [size for size in asked if size not in legal][:count]:
        nearest = " and ".join(f"height {h}, width {w}" for h, w in legal.nearest(height, width))
        with pytest.raises(RequestError, match=f"the nearest are {nearest};"):
            range_pipe(PROMPT, height=height, width=width)


def test_the_artifact_says_its_range_and_was_verified_inside_it(range_artifact):
    manifest = read_manifest(range_artifact)
    assert manifest.status == "verified"
    golden = {entry.path for entry in manifest.files if entry.path.startswith("golden/")}
    assert golden == {"golden/4.safetensors", "golden/4@80x48.safetensors"}
    assert {"few_rows", "rotary"} <= manifest.graph("full").kernels.keys()
    assert further_calls(manifest) == ["height 32 to 96 by 16, width 32 to 96 by 16 pixels"]


@pytest.mark.slow
def test_kernels_of_int8_and_bfloat16_take_any_size(tiny_folder, tmp_path):
    """Verified by its export, at two sizes of the range; each kernel takes as many places as at one size. `few_rows`, for products
    that are bound by their weight, gives another reason for the others."""
    kept = (
        "cache.method=none",
        "attention.dtype=bfloat16",
        "sampler.steps=4",
        "verify.cached_psnr_db=20",
        "verify.seeds=1",
    )

    def recipe_of(side: str) -> Recipe:
        return resolve("flux-fast", (*kept, f"shapes.height={side}", f"shapes.width={side}"), str(tiny_folder))

    with open_progress("quiet") as quiet:
        folder = export(recipe_of(SIDE), tmp_path / "range", ExportOptions(), quiet)
    ranged, alone = read_manifest(folder).graph("full"), rewrite_graphs(prepared(recipe_of("48"))).graphs["denoiser"][0]
    assert ranged.kernels == alone.kernels
    assert {"attention", "packed_w8a8", "rotary"} <= ranged.kernels.keys()
    assert [r for r in ranged.refusals if r.kernel != "few_rows"] == [
        r for r in alone.refusals if r.kernel != "few_rows"
    ]
