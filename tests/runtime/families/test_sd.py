"""Stable Diffusion, runtime's side: the artifact draws what `StableDiffusionPipeline` draws, call by call."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import diffusers
import pytest
import torch

from prebake.exporter.plan.sampler import tabulate_scheduler
from prebake.runtime import RequestError, load
from prebake.runtime.pipeline import Pipeline
from prebake.runtime.plan import Evaluation, Plan
from prebake.runtime.replay import tabulate_plan

# float32 kernels that add in another order, over four steps of latents of size 1 and guidance up to 7.5
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipe(tiny_sd_artifact, cache_dir):
    return load(tiny_sd_artifact, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def eager(tiny_sd_folder):
    eager = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    eager.set_progress_bar_config(disable=True)
    return eager


def ours(pipe, *args, output_type="latent", **kwargs) -> torch.Tensor:
    return pipe(*args, output_type=output_type, **kwargs).images


def theirs(eager, *args, seed=None, output_type="latent", **kwargs) -> torch.Tensor:
    generator = kwargs.pop("generator", None) or torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32, **kwargs}
    return eager(*args, generator=generator, output_type=output_type, **call).images


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


CALLS = {
    "plain": {},
    "negative": {"negative_prompt": "a blue square"},
    "strong": {"negative_prompt": "a blue square", "guidance_scale": 7.5},
    "unguided": {"guidance_scale": 1.0},
    "less": {"guidance_scale": 0.0, "negative_prompt": "a blue square"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_a_call_draws_what_the_pipeline_draws(name, output_type, pipe, eager):
    call = {"seed": 7, "output_type": output_type, **CALLS[name]}
    close(ours(pipe, "a large red circle", **call), theirs(eager, "a large red circle", **call))


def test_the_comparison_notices_another_negative_prompt(pipe, eager):
    got = ours(pipe, "a red circle", seed=7, negative_prompt="blue")
    with pytest.raises(AssertionError, match="not close"):
        close(got, theirs(eager, "a red circle", seed=7, negative_prompt="a square"))


def test_a_batch_takes_its_negative_prompts_in_order(pipe, eager):
    prompts, negatives = ["a red circle", "a blue square"], ["white", ""]
    call = {"negative_prompt": negatives, "num_images_per_prompt": 2, "seed": 3}
    close(ours(pipe, prompts, **call), theirs(eager, prompts, **call))


def test_each_image_may_have_its_generator(pipe, eager):
    def generators():
        return [torch.Generator().manual_seed(i) for i in (1, 2)]

    close(
        ours(pipe, ["red", "blue"], generator=generators()),
        theirs(eager, ["red", "blue"], generator=generators()),
    )


def test_one_negative_prompt_stands_for_all(pipe):
    each = ours(pipe, ["red", "blue"], negative_prompt=["white", "white"], seed=1)
    assert torch.equal(ours(pipe, ["red", "blue"], negative_prompt="white", seed=1), each)


def test_without_guidance_the_negative_prompt_says_nothing(pipe):
    plain = ours(pipe, "red", seed=1, guidance_scale=1.0)
    assert torch.equal(ours(pipe, "red", seed=1, guidance_scale=0.5, negative_prompt="blue"), plain)


@torch.no_grad()
def test_given_embeddings_and_latents_replace_encoded_and_drawn_ones(pipe, eager):
    positive, negative = eager.encode_prompt("a red circle", "cpu", 1, True, "blue")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    got = ours(pipe, prompt_embeds=positive, negative_prompt_embeds=negative, latents=latents)
    close(got, ours(pipe, "a red circle", negative_prompt="blue", seed=7))


SCHEDULERS = {
    "DPMSolverMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},  # starts from noise that it scales, and scales the model's input
    "EulerAncestralDiscreteScheduler": {},  # draws noise at every step
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_scheduler_is_another_plan(name, pipe, eager):
    scheduler = getattr(diffusers, name).from_config(eager.scheduler.config, **SCHEDULERS[name])
    usual, eager.scheduler = eager.scheduler, scheduler
    try:
        close(ours(with_plan(pipe, scheduler), "red", seed=7, guidance_scale=3.0), theirs(eager, "red", seed=7))
    finally:
        eager.scheduler = usual


def with_plan(pipe: Pipeline, scheduler) -> Pipeline:
    """The same artifact with the scheduler's plan of 4 steps: graphs know no scheduler."""
    table = tabulate_scheduler(scheduler, 4)
    evaluations = tuple(
        Evaluation(step=s, variant="full", timestep=t, input_scale=i, update=u)
        for s, t, i, u in zip(table.steps, table.timesteps, table.input_scales, table.updates, strict=True)
    )
    plan = Plan(
        name="4",
        steps=4,
        scheduler=table.scheduler,
        init_noise_sigma=table.init_noise_sigma,
        evaluations=evaluations,
    )
    artifact = pipe.artifact
    return Pipeline(replace(artifact, plans={"4": plan}, tables={"4": tabulate_plan(plan, artifact.device)}))


REFUSED = {
    "prompt_2": (
        {"prompt_2": "blue"},
        "prompt_2: an artifact of StableDiffusionPipeline does not take it; did you mean prompt? it takes prompt, prompt_embeds, ",
    ),
    "negative": (
        {"negative_prompt": ["a", "b"]},
        "negative_prompt: expected one, or 1, one for each prompt; got 2",
    ),
    "negative_text": ({"negative_prompt": 3}, "negative_prompt: expected a text or a list of texts, got 3"),
    "both": (
        {"prompt_embeds": torch.zeros(1, 16, 32)},
        "expected either prompt, or prompt_embeds; got prompt, prompt_embeds",
    ),
    "embeds": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 9, 32)},
        "prompt_embeds: expected [B, 16, 32], got [1, 9, 32]",
    ),
    "latents": ({"latents": torch.zeros(1, 64, 16)}, "latents: expected latents [1, 4, 16, 16], got [1, 64, 16]"),
    "length": ({"max_sequence_length": 77}, "max_sequence_length=77: the artifact was exported for 16 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_is_refused_in_words(name, pipe):
    kwargs, words = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        pipe(**{"prompt": "red", **kwargs})
    assert str(caught.value).startswith(words)


def test_clip_skip_is_no_argument(pipe):
    with pytest.raises(RequestError, match=r"clip_skip: .*StableDiffusionPipeline does not take it"):
        pipe("red", clip_skip=1)


def test_a_replay_imports_no_model_library(tiny_sd_artifact, tmp_path):
    script = """
import sys
from prebake.runtime import load
load(sys.argv[1], cache_dir=sys.argv[2])("a red circle", seed=1, negative_prompt="blue")
foreign = {"diffusers", "transformers", "torchao", "torch._inductor.compile_fx"} | {m for m in sys.modules if m.startswith("prebake.exporter")}
print(sorted(foreign & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_sd_artifact), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
