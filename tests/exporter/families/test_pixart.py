"""PixArt: what is particular to it, against diffusers. What every family does is in `test_every_family.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from PIL import Image

from prebake.exporter import tiny
from prebake.exporter.families import pixart
from prebake.exporter.lower import load_backend
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite import rewrite_pipeline
from prebake.exporter.tiny import parts
from prebake.runtime.errors import ExportError, RecipeError, RequestError
from support.captured_pipeline import uncompiled
from support.family_parity import (
    FAMILIES,
    PLAIN,
    PROMPTS,
    TOLERANCE,
    as_kind,
    eager,
    expected,
    got,
    ours,
    relative_error,
    seeded,
)

AOTI = load_backend("aoti")
SIZE = pixart.Size(32, 32, 16)
DEFAULTS = tiny.TINY_MODELS["pixart"].defaults
CALL: dict[str, Any] = {**DEFAULTS, **FAMILIES["pixart"].call}
CACHED = [o for o in PLAIN if not o.startswith("cache.")]


def latents_of(pipe, prompt, **call) -> torch.Tensor:
    return pipe(prompt, output_type="latent", **{**CALL, **call})[0]


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.works("pixart", "lower case")
def test_captions_are_put_in_lower_case_and_stripped():
    shouted = "  A RED Circle\n"
    latents = expected("pixart", shouted, negative_prompt=" UGLY ", generator=seeded(1))
    assert relative_error(got("pixart", shouted, negative_prompt=" UGLY ", seed=1), latents) < TOLERANCE
    pipe = ours("pixart")
    (prompt,) = pipe.family_rules.settings.text.prompts
    assert prompt.lower
    path = pipe.artifact.folder / prompt.tokenizer
    kept = pipe.family_rules._text.text.prompts[0].model_copy(update={"lower": False})
    tokenizer = type(pipe.family_rules._text._tokenizers[0])(path, path.read_bytes(), kept)
    assert not torch.equal(tokenizer(shouted)[0], pipe.family_rules._text._tokenizers[0](shouted)[0])  # the canary


@pytest.mark.works("pixart", "attention masks")
def test_the_mask_says_what_of_the_embeddings_is_text():
    pipe = ours("pixart")
    (encoded,) = pipe.family_rules._text({"prompt": PROMPTS[0]})
    states, mask = encoded["encoder_hidden_states"], encoded["encoder_attention_mask"]
    assert mask.tolist() == [[1.0] * 4 + [0.0] * 12]  # a, red, circle, end
    call = {"prompt_embeds": states, "negative_prompt_embeds": 0.5 * states}
    for which in (mask, torch.ones_like(mask)):
        call |= {"prompt_attention_mask": which, "negative_prompt_attention_mask": mask}
        latents = latents_of(eager("pixart"), None, negative_prompt=None, generator=seeded(1), **call)
        assert relative_error(got("pixart", None, seed=1, **call), latents) < TOLERANCE
    assert relative_error(got("pixart", PROMPTS[0], seed=1), latents) > 1e-3  # the canary: the padding counts
    with pytest.raises(RequestError, match=r"expected either prompt,? or prompt_embeds and"):
        pipe(prompt_embeds=states)


# --- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.works("pixart", "other schedulers")
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_other_schedulers(name):
    """Euler's noise has a deviation of its own, and its latents are scaled for the model."""
    import diffusers

    pipe = eager("pixart")
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    latents = latents_of(as_kind(type(pipe), pipe, scheduler=scheduler), PROMPTS[0], generator=seeded(1))
    drawn = got("pixart", PROMPTS[0], f"sampler.scheduler={name}", seed=1)
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(got("pixart", PROMPTS[0], seed=1), latents) > 1e-3  # the canary: DPM-Solver++


@torch.no_grad()
def test_in_bfloat16_neighbouring_timesteps_stay_apart():
    """Rounded before the sinusoid, 975 and 976 would both be 976."""
    pipe = tiny.build_tiny_pipeline("pixart")
    pipe.transformer.to(torch.bfloat16)
    component = pixart.denoiser(pipe, SIZE)
    latents, _, *rest = component.args
    a, b = (component.module(latents, torch.tensor([t]), *rest) for t in (975.0, 976.0))
    assert a.dtype == torch.float32
    assert not torch.equal(a, b)


# --- Alpha ----------------------------------------------------------------------------------------------------------


def alpha(seed: int = 0) -> PixArtAlphaPipeline:
    """The pipeline before Sigma, whose models for 1024 x 1024 pixels are told the size; here without a variance."""
    pipe = tiny.build_tiny_pipeline("pixart", seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,  # the embedding is in thirds: height, width, aspect ratio
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=96,
        sample_size=128,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=True,
    )
    made = PixArtAlphaPipeline(**{**pipe.components, "transformer": parts.seed_weights(transformer, seed)})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.works("pixart", "PixArt-Alpha")
def test_alphas_models_are_told_the_size_of_the_picture(tmp_path):
    pipe = alpha()
    model = tiny.save_pipeline(pipe, tmp_path / "model", {**DEFAULTS, "height": 32, "width": 48})
    prebaked = uncompiled(resolve("pixart-fast", PLAIN, str(model)), tmp_path)
    call = {"negative_prompt": "blurry", "seed": 1, "output_type": "latent"}
    drawn = prebaked(PROMPTS[0], **call)[0]
    latents = latents_of(pipe, PROMPTS[0], width=48, negative_prompt="blurry", generator=seeded(1))
    assert relative_error(drawn, latents) < TOLERANCE
    assert prebaked.artifact.manifest.family == "pixart"


@torch.no_grad()
def test_the_size_that_alpha_is_told_counts():
    pipe = alpha()
    component = pixart.denoiser(pipe, pixart.Size(32, 48, 16))
    told = component.module(*component.args)
    transformer = component.module.cond
    assert transformer.resolution.tolist() == [[32.0, 48.0]]
    assert transformer.aspect_ratio.item() == pytest.approx(2 / 3)
    for branch in (component.module.cond, component.module.uncond):
        branch.resolution.fill_(1024.0)
    assert relative_error(component.module(*component.args), told) > 1e-3
    assert pixart.micro_conditions(tiny.build_tiny_pipeline("pixart"), SIZE) == {}  # Sigma's are not told


def test_one_step_of_alpha_is_refused():
    with pytest.raises(ExportError, match=r"sampler\.steps: expected 2 or more, got 1"):
        pixart.check_steps(alpha(), 1)
    pixart.check_steps(eager("pixart"), 1)
    assert pixart.defaults(alpha())["max_sequence_length"] == 120


# --- rewrites and caches --------------------------------------------------------------------------------------------


@torch.no_grad()
def noise_of(pipe) -> torch.Tensor:
    component = pixart.denoiser(pipe, SIZE)
    return component.module(*component.args)


def test_int8_takes_fused_attention_and_feed_forward_and_leaves_the_rest():
    pipe = tiny.build_tiny_pipeline("pixart")
    before = noise_of(pipe)
    layers = rewrite_pipeline(pipe, resolve("pixart-fast", ("precision.denoiser=float32",)), AOTI)
    int8 = {name for name, (what, _) in layers.items() if what == "int8"}
    assert {n.split(".", 2)[2] for n in int8 if n.startswith("transformer_blocks.0.")} == {
        *("attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_kv", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2"),
    }
    assert len(int8) == 14
    # 127 codes a sign: half a step is 1/254 of a row's largest value, and a few layers add theirs
    assert 1e-4 < relative_error(noise_of(pipe), before) < 0.05


def diffusers_pab(**ranges: int) -> torch.Tensor:
    """diffusers' own hooks around a pipeline that runs both branches in one call; every timestep is in the window."""
    pipe = tiny.build_tiny_pipeline("pixart")
    pipe.set_progress_bar_config(disable=True)
    config = PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: 500.0)
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    return latents_of(pipe, PROMPTS[0], negative_prompt="blurry", generator=seeded(1))


@pytest.mark.works("pixart", "caches")
def test_both_attentions_are_reused_as_diffusers_hooks_do_it(tmp_path):
    ranges = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3}
    windows = [f"cache.{k}_attention_timestep_skip_range=[0,1000]" for k in ("spatial", "cross")]
    table = ["cache.method=pab", *(f"cache.{n}={v}" for n, v in ranges.items()), *windows]
    prebaked = uncompiled(resolve("pixart-fast", (*CACHED, *table), "tiny:pixart"), tmp_path)
    call = {"negative_prompt": "blurry", "seed": 1, "output_type": "latent"}
    latents = diffusers_pab(**ranges)
    assert relative_error(prebaked(PROMPTS[0], **call)[0], latents) < TOLERANCE
    assert relative_error(prebaked(PROMPTS[0], cache=False, **call)[0], latents) > 1e-4  # the canary


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (pixart.Size(36, 32, 16), r"expected multiples of 8 .*, got 36 x 32"),
        (pixart.Size(32, 32, 0), r"shapes\.max_sequence_length: expected 1 token or more, got 0"),
    ],
)
def test_sizes_that_the_model_cannot_draw_are_refused(size, message):
    pixart.check_size(eager("pixart"), SIZE)
    with pytest.raises(ExportError, match=message):
        pixart.check_size(eager("pixart"), size)


def test_there_is_no_image_to_image(tmp_path):
    recipe = resolve("pixart-fast", (*PLAIN, "sampler.image_to_image=true"), "tiny:pixart")
    with pytest.raises(RecipeError, match=r"sampler\.image_to_image: this family's pipelines start"):
        uncompiled(recipe, tmp_path)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            {"use_resolution_binning": True},
            "use_resolution_binning: an artifact of PixArtSigmaPipeline does not take it",
        ),
        ({"clean_caption": True}, "clean_caption: an artifact of PixArtSigmaPipeline does not take it"),
        ({"max_sequence_length": 300}, "max_sequence_length=300: the artifact was exported for 16 tokens"),
        ({"image": Image.new("RGB", (32, 32))}, "image: the artifact was exported without image-to-image"),
    ],
)
def test_what_was_fixed_at_export_is_refused_by_name(argument, message):
    with pytest.raises(RequestError, match=message):
        ours("pixart")(PROMPTS[0], **argument)
