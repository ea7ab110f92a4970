"""Stable Diffusion 3: what is particular to it, against diffusers. What every family does is in `test_every_family.py`."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from PIL import Image

from prebake.exporter import tiny
from prebake.exporter.families import sd3
from prebake.exporter.families.picture import example_picture, read_size
from prebake.exporter.lower import load_backend
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite import rewrite_pipeline
from prebake.exporter.rewrite.fuse import fuse_qkv
from prebake.exporter.tiny import parts
from prebake.runtime.errors import ExportError, RequestError
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
SIZE = sd3.Size(32, 32, 16)
CALL = {"height": 32, "width": 32, "num_inference_steps": 8, "guidance_scale": 5.0, "max_sequence_length": 16}
PICTURES = "sampler.image_to_image=true"
PAB = "cache.method=pab", "cache.spatial_attention_block_skip_range=2"
PAB = (*PAB, "cache.spatial_attention_timestep_skip_range=[0,1000]", "verify.cached_psnr_db=30")


@contextlib.contextmanager
def changed(owner, **values):
    """`owner` with other attributes or registered modules, as it was afterwards."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield owner
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def latents_of(pipe, prompt, **call) -> torch.Tensor:
    return pipe(prompt, output_type="latent", **{**CALL, **call})[0]


def from_folder(pipe, folder, *overrides: str):
    """The runtime's pipeline of `pipe`, uncached in float32, uncompiled."""
    model = tiny.save_pipeline(pipe, folder / "model", tiny.TINY_MODELS["sd3"].defaults)
    return uncompiled(resolve("sd3-fast", (*PLAIN, *overrides), str(model)), folder)


# --- three encoders -------------------------------------------------------------------------------------------------


@pytest.mark.works("sd3", "a prompt for each encoder")
def test_each_encoder_may_have_a_prompt_of_its_own():
    texts = {"prompt_2": "snow", "prompt_3": "the large cat", "negative_prompt": "blurry"}
    texts |= {"negative_prompt_2": "ugly old red", "negative_prompt_3": "fog"}
    latents = expected("sd3", PROMPTS[0], generator=seeded(1), **texts)
    assert relative_error(got("sd3", PROMPTS[0], seed=1, **texts), latents) < TOLERANCE
    for name in texts:  # the canary: each of them counts
        others = {n: t for n, t in texts.items() if n != name}
        assert relative_error(got("sd3", PROMPTS[0], seed=1, **others), latents) > 1e-4, name


@pytest.mark.works("sd3", "without T5")
def test_without_t5_its_states_are_zeros(tmp_path):
    pipe = tiny.build_tiny_pipeline("sd3")
    pipe.text_encoder_3, pipe.tokenizer_3 = None, None
    pipe.set_progress_bar_config(disable=True)
    prebaked = from_folder(pipe, tmp_path)
    drawn = prebaked(PROMPTS[0], negative_prompt="blurry", seed=1, output_type="latent")[0]
    latents = latents_of(pipe, PROMPTS[0], negative_prompt="blurry", generator=seeded(1))
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(latents, expected("sd3", PROMPTS[0], negative_prompt="blurry", generator=seeded(1))) > 1e-3
    assert prebaked.family_rules.max_sequence_length == 16
    assert read_size(prebaked.artifact.manifest) == SIZE
    with pytest.raises(RequestError, match="prompt_3: an artifact of StableDiffusion3Pipeline does"):
        prebaked("snow", prompt_3="a cat")


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.works("sd3", "dynamic shifting")
def test_the_shift_may_grow_with_the_picture(tmp_path):
    pipe = tiny.build_tiny_pipeline("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16)
    pipe.set_progress_bar_config(disable=True)
    drawn = from_folder(pipe, tmp_path)(PROMPTS[0], seed=1, output_type="latent")[0]
    latents = latents_of(pipe, PROMPTS[0], generator=seeded(1))
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(latents, expected("sd3", PROMPTS[0], generator=seeded(1))) > 1e-3  # the canary: shift 3


@pytest.mark.works("sd3", "other schedulers")
def test_heuns_two_evaluations_a_step():
    name = "FlowMatchHeunDiscreteScheduler"
    pipe = as_kind(type(eager("sd3")), eager("sd3"), scheduler=scheduler_of(name))
    latents = latents_of(pipe, PROMPTS[0], generator=seeded(1))
    drawn = got("sd3", PROMPTS[0], f"sampler.scheduler={name}", seed=1)
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(got("sd3", PROMPTS[0], seed=1), latents) > 1e-4  # the canary: Euler


def scheduler_of(name: str):
    import diffusers

    return getattr(diffusers, name).from_config(eager("sd3").scheduler.config)


def test_a_scheduler_that_wants_its_noise_scaled_is_refused():
    with (
        changed(eager("sd3"), scheduler=scheduler_of("EulerDiscreteScheduler")) as pipe,
        pytest.raises(ExportError, match=r"sampler\.scheduler: expected one that starts from noise"),
    ):
        sd3.scheduler_arguments(pipe.scheduler, (4, 16, 16), 8)


@torch.no_grad()
def test_in_bfloat16_neighbouring_timesteps_stay_apart():
    """Rounded before the sinusoid, 975 and 976 would both be 976."""
    pipe = tiny.build_tiny_pipeline("sd3")
    pipe.transformer.to(torch.bfloat16)
    component = sd3.denoiser(pipe, SIZE)
    latents, _, *rest = component.args
    a, b = (component.module(latents, torch.tensor([t]), *rest) for t in (975.0, 976.0))
    assert a.dtype == torch.float32
    assert not torch.equal(a, b)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.works("sd3", "image to image")
@pytest.mark.parametrize("strength", [0.3, None, 1.0])
def test_image_to_image(strength):
    pipe = as_kind(StableDiffusion3Img2ImgPipeline, eager("sd3"))
    call = {} if strength is None else {"strength": strength}
    image = example_picture(SIZE, 0)
    for prompt in (PROMPTS[0], list(PROMPTS)):
        latents = latents_of(pipe, prompt, image=image, generator=seeded(1), **call)
        drawn = got("sd3", prompt, PICTURES, image=image, seed=1, **call)
        assert relative_error(drawn, latents) < TOLERANCE
    other = got("sd3", list(PROMPTS), PICTURES, image=Image.new("RGB", (32, 32)), seed=1, **call)
    # the canary: another picture, which does not matter where nothing is left of it
    assert (relative_error(other, latents) > 1e-3) == (strength != 1.0)


def wide() -> StableDiffusion3Pipeline:
    """With 16 latent channels, as the real ones: diffusers' inpainting takes no other number."""
    pipe = tiny.build_tiny_pipeline("sd3")
    config = dict(pipe.transformer.config) | {"in_channels": 16, "out_channels": 16}
    transformer = SD3Transformer2DModel(**{n: v for n, v in config.items() if not n.startswith("_")})
    config = dict(pipe.vae.config) | {"latent_channels": 16}
    vae = AutoencoderKL(**{n: v for n, v in config.items() if not n.startswith("_")})
    pipe.register_modules(transformer=parts.seed_weights(transformer, 0), vae=parts.seed_weights(vae, 1))
    parts.set_posterior(pipe.vae.encoder.conv_out, 16, 0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.works("sd3", "inpainting")
def test_inpainting(tmp_path):
    pipe = wide()
    prebaked = from_folder(pipe, tmp_path, PICTURES)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 32))
    inpaint = as_kind(StableDiffusion3InpaintPipeline, pipe)
    given = {"image": example_picture(SIZE, 0), "mask_image": mask}
    for call in ({}, {"strength": 0.3}, {"strength": 1.0}):
        latents = latents_of(inpaint, list(PROMPTS), generator=seeded(1), **given, **call)
        drawn = prebaked(list(PROMPTS), seed=1, output_type="latent", **given, **call)[0]
        assert relative_error(drawn, latents) < TOLERANCE, call
    call["mask_image"] = Image.new("L", (32, 32), 255)  # the canary: another mask
    assert relative_error(prebaked(list(PROMPTS), seed=1, output_type="latent", **given | call)[0], latents) > 1e-2


# --- attention ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def velocity(pipe) -> torch.Tensor:
    component = sd3.denoiser(pipe, SIZE)
    return component.module(*component.args)


def test_fused_attention_computes_the_same():
    pipe = tiny.build_tiny_pipeline("sd3")
    before, parameters = velocity(pipe), sum(p.numel() for p in pipe.transformer.parameters())
    assert fuse_qkv("transformer", pipe.transformer, key="fuse.qkv") == 3  # two blocks, and the first one's second
    names = [n for n, _ in pipe.transformer.named_modules()]
    assert "transformer_blocks.0.attn2.to_qkv" in names
    assert not any(n.endswith((".to_q", ".to_k", ".to_v", "_q_proj", "_k_proj", "_v_proj")) for n in names)
    assert sum(p.numel() for p in pipe.transformer.parameters()) == parameters
    # one matrix product of another shape adds in another order: float32 rounding, and no more
    assert relative_error(velocity(pipe), before) < 1e-5
    with torch.no_grad():  # the canary: the norms are there
        pipe.transformer.transformer_blocks[0].attn.norm_added_k.weight *= 2
    assert relative_error(velocity(pipe), before) > 1e-4


@torch.no_grad()
def test_why_diffusers_own_fused_attention_is_not_used():
    """It leaves out the norms, as if SD3.5 were SD3. Once this fails, `rewrite/joint.py` may go."""
    attention = tiny.build_tiny_pipeline("sd3").transformer.transformer_blocks[1].attn
    image, text = torch.randn(1, 64, 64, generator=seeded(0)), torch.randn(1, 32, 64, generator=seeded(1))
    expected, _ = JointAttnProcessor2_0()(attention, image, text)
    attention.fuse_projections()
    fused, _ = FusedJointAttnProcessor2_0()(attention, image, text)
    assert relative_error(fused, expected) > 0.01


def test_int8_takes_attention_and_feed_forward_and_leaves_the_rest():
    pipe = tiny.build_tiny_pipeline("sd3")
    before = velocity(pipe)
    layers = rewrite_pipeline(pipe, resolve("sd3-fast", ("precision.denoiser=float32",)), AOTI)
    int8 = {name for name, (what, _) in layers.items() if what == "int8"}
    assert {n.split(".", 2)[2] for n in int8 if n.startswith("transformer_blocks.0.")} == {
        *("attn.to_qkv", "attn.to_added_qkv", "attn.to_out.0", "attn.to_add_out", "attn2.to_qkv", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    }
    assert {why for what, why in layers.values() if what == "kept"} == {"embedding", "modulation", "final projection"}
    # 127 codes a sign: half a step is 1/254 of a row's largest value, and a few layers add theirs
    assert 1e-4 < relative_error(velocity(pipe), before) < 0.05


# --- caches ---------------------------------------------------------------------------------------------------------


def diffusers_pab() -> torch.Tensor:
    """diffusers' own hooks around a pipeline that runs both branches in one call; every timestep is in the window."""
    pipe = tiny.build_tiny_pipeline("sd3")
    pipe.set_progress_bar_config(disable=True)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500.0
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    return latents_of(pipe, PROMPTS[0], negative_prompt="blurry", generator=seeded(1))


@pytest.mark.works("sd3", "caches")
def test_attention_is_reused_as_diffusers_hooks_do_it(tmp_path):
    case = FAMILIES["sd3"]
    overrides = [o for o in PLAIN if not o.startswith("cache.")]
    prebaked = uncompiled(resolve(case.recipe, (*overrides, *PAB), "tiny:sd3"), tmp_path)
    assert {v.graph.name for v in prebaked.artifact.variants.values()} > {"full"}
    call = {"negative_prompt": "blurry", "seed": 1, "output_type": "latent"}
    latents = diffusers_pab()
    assert relative_error(prebaked(PROMPTS[0], **call)[0], latents) < TOLERANCE
    assert relative_error(prebaked(PROMPTS[0], cache=False, **call)[0], latents) > 1e-3  # the canary


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = [
    (sd3.Size(30, 32, 16), r"expected multiples of 4 \(VAE factor 2, patches of 2\), got 30 x 32"),
    (sd3.Size(32, 68, 16), r"expected at most 64, for which the model has positions, got 32 x 68"),
    (sd3.Size(32, 32, 513), r"shapes\.max_sequence_length: expected 1 to 512 tokens .*, got 513"),
]


@pytest.mark.parametrize(("size", "message"), REFUSED)
def test_sizes_that_the_model_cannot_draw_are_refused(size, message):
    sd3.check_size(eager("sd3"), SIZE)
    with pytest.raises(ExportError, match=message):
        sd3.check_size(eager("sd3"), size)


def test_a_transformer_that_takes_more_than_latents_is_refused():
    with (
        changed(eager("sd3").transformer.config, in_channels=9),
        pytest.raises(ExportError, match="in_channels: expected the VAE's 4, got 9: a model for"),
    ):
        sd3.check_size(eager("sd3"), SIZE)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"clip_skip": 1}, "clip_skip: an artifact of StableDiffusion3Pipeline does not take it"),
        ({"skip_guidance_layers": [0]}, "skip_guidance_layers: an artifact of StableDiffusion3Pipeline does not take"),
        ({"max_sequence_length": 77}, "max_sequence_length=77: the artifact was exported for 16 tokens"),
        ({"image": example_picture(SIZE, 0)}, "image: the artifact was exported without image-to-image"),
    ],
)
def test_what_was_fixed_at_export_is_refused_by_name(argument, message):
    with pytest.raises(RequestError, match=message):
        ours("sd3")(PROMPTS[0], **argument)
