"""CogVideoX: frames, positions, caches and schedulers, and what is refused; against diffusers' pipeline."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FasterCacheConfig, PyramidAttentionBroadcastConfig
from PIL import Image, ImageSequence

from prebake.exporter import tiny
from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.families import cogvideox
from prebake.exporter.families.picture import Size, read_size
from prebake.exporter.load.source import load_model as load_model
from prebake.exporter.lower import load_backend
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.tiny import parts
from prebake.exporter.verify.closeness import psnr_db, ssim
from prebake.exporter.verify.comparison import PictureRow
from prebake.exporter.verify.picture_sheet import draw_sheet, scale_picture
from prebake.exporter.verify.replayer import DrawnPicture, image_array
from prebake.exporter.whole_pipeline import WholePipeline, has_picture_layout
from prebake.runtime.__main__ import main
from prebake.runtime.errors import ExportError, RequestError
from prebake.runtime.manifest import Manifest
from prebake.runtime.pipeline import Pipeline, VideoOutput
from prebake.runtime.plan import Plan
from support.captured_pipeline import uncompiled
from support.family_parity import PLAIN, PROMPTS, TOLERANCE, eager, expected, got, ours, relative_error, seeded

SIZE = Size(64, 64, 16, 9)
CALL = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16, "guidance_scale": 6.0}

works_video = pytest.mark.works("cogvideox", "video")
works_caches = pytest.mark.works("cogvideox", "caches")


# --- frames -----------------------------------------------------------------------------------------------------------


@works_video
def test_a_video_is_a_list_of_frames():
    made = ours("cogvideox")(PROMPTS[0], seed=1)
    (theirs,) = expected("cogvideox", PROMPTS[0], output_type="pil", generator=seeded(1))
    assert isinstance(made, VideoOutput)
    (frames,) = made.frames
    assert [f.size for f in frames] == [(64, 64)] * 9
    # latents differ by 1e-6, so a value may round to its neighbour of 256
    assert max(int(np.abs(np.array(a, int) - np.array(b, int)).max()) for a, b in zip(frames, theirs, strict=True)) <= 1
    assert (
        np.abs(np.array(frames[0], int) - np.array(frames[8], int)).max() > 1
    )  # the canary: frames are different ones


@works_video
def test_two_videos_of_each_prompt():
    """diffusers sets its own `num_videos_per_prompt` to 1; as many prompts are the same."""
    two = list(PROMPTS[:2])
    latents = expected("cogvideox", [p for p in two for _ in range(2)], generator=seeded(1))
    for name in ("num_videos_per_prompt", "num_images_per_prompt"):
        assert relative_error(got("cogvideox", two, seed=1, **{name: 2}), latents) < TOLERANCE


@works_video
@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17])
@torch.no_grad()
def test_the_decoder_gives_what_diffusers_decodes(frames):
    """Two or three latent frames at a time: 9 frames are one time, 16 and 17 are two."""
    pipe, size = eager("cogvideox"), Size(16, 16, 16, frames)
    cogvideox.check_size(pipe, size)
    decoder = cogvideox.other_components(pipe, size, channels_last=False)[-1]
    latents = torch.randn(1, *cogvideox.latents_shape(pipe, size), generator=seeded(frames))
    theirs = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="pt")
    assert theirs.shape == (1, frames, 3, 16, 16)
    # division in place of a product with the reciprocal, then the same sums
    torch.testing.assert_close(decoder.module(latents)[0], theirs, rtol=0, atol=1e-5)
    if frames == 16:  # the graph has both times and what the convolutions hand on between them
        graph = capture_graph(decoder.name, decoder.module, decoder.args, decoder.inputs, decoder.outputs)
        torch.testing.assert_close(graph.gm(latents)[0], theirs, rtol=0, atol=1e-5)
        first = decoder.module(torch.cat((latents[:, :2], 0 * latents[:, 2:]), dim=1))[0]
        assert not torch.allclose(first, theirs, rtol=0, atol=1e-2)  # the canary
        torch.testing.assert_close(first[:, :8], theirs[:, :8], rtol=0, atol=1e-5)  # what comes later changes nothing


@pytest.mark.parametrize(("frames", "made", "nearest"), [(10, 9, "9 and 16"), (13, 16, "9 and 16"), (5, 8, "1 and 8")])
@torch.no_grad()
def test_numbers_of_frames_that_the_decoder_does_not_give_back_are_refused(frames, made, nearest):
    pipe, size = eager("cogvideox"), Size(16, 16, 16, frames)
    decoder = cogvideox.other_components(pipe, size, channels_last=False)[-1]
    assert decoder.module(*decoder.args)[0].shape[1] == made
    with pytest.raises(ExportError, match=rf"shapes\.num_frames: .* the nearest are {nearest}$"):
        cogvideox.check_size(pipe, size)


@works_video
@pytest.mark.parametrize("name", ["x.gif", "x.mp4"])
def test_run_writes_a_file_that_plays(name, tmp_path, monkeypatch):
    pipe, path = ours("cogvideox"), tmp_path / name
    (tmp_path / "manifest.json").write_text(pipe.artifact.manifest.to_json(), "utf-8")
    monkeypatch.setattr("prebake.runtime.pipeline.load", lambda folder, **_: pipe)  # its graphs as they are, uncompiled
    assert main(["run", str(tmp_path), PROMPTS[0], "--seed", "1", "--fps", "5", "--output", str(path)]) == 0
    (frames,) = pipe(PROMPTS[0], seed=1).frames
    played, fps = read_back(path)
    assert (len(played), fps) == (9, 5)
    # 256 colours of a gif, H.264 and its halved colours in an mp4: not the frames to the bit, but these and no others
    off = [
        np.abs(np.array(a, float) - np.array(b.convert("RGB"), float)).mean()
        for a, b in zip(frames, played, strict=True)
    ]
    assert max(off) < 8
    assert np.abs(np.array(frames[0], float) - np.array(played[-1].convert("RGB"), float)).mean() > max(
        off
    )  # the canary


def read_back(path: Path) -> tuple[list[Image.Image], float]:
    """A file's frames and how many a second has."""
    if path.suffix == ".gif":
        with Image.open(path) as gif:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)], 1000 / gif.info["duration"]
    av = pytest.importorskip("av", reason="needs the extra `video`")
    with av.open(str(path)) as video:
        return [frame.to_image() for frame in video.decode(video=0)], float(video.streams.video[0].average_rate)


# --- other models of the family ---------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    "learned": {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "i2v": {"use_rotary_positional_embeddings": True, "ofs_embed_dim": 32},
}


@functools.cache
def variant(name: str) -> Any:
    """The tiny pipeline with another transformer of one block."""
    pipe = tiny.build_tiny_pipeline("cogvideox")
    plain = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    config = {**plain, **MODELS[name], "num_layers": 1}
    pipe.transformer = parts.seed_weights(type(pipe.transformer).from_config(config), 5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def exported(name: str, *overrides: str) -> Pipeline:
    """Its artifact of two steps, uncompiled."""
    folder = Path(tempfile.mkdtemp(prefix="prebake-cogvideox-", dir=os.environ.get("PYTEST_TMP")))
    model = tiny.save_pipeline(variant(name), folder / "model", tiny.TINY_MODELS["cogvideox"].defaults)
    recipe = resolve("cogvideox-fast", (*PLAIN, "sampler.steps=[2]", *overrides), str(model))
    return uncompiled(recipe, folder)


@works_video
def test_latent_frames_two_by_two():
    """As in CogVideoX 1.5: one latent frame comes before the others, and is not shown."""
    pipe, call = exported("1.5"), {**CALL, "num_inference_steps": 2}
    latents = variant("1.5")(PROMPTS[0], output_type="latent", generator=seeded(1), **call).frames
    made = pipe(PROMPTS[0], seed=1, output_type="latent").frames
    assert made.shape == (1, 4, 4, 16, 16)
    assert relative_error(made, latents) < TOLERANCE
    video = variant("1.5")(PROMPTS[0], output_type="pt", generator=seeded(1), **call).frames
    assert video.shape[1] == 9
    # as in test_every_family
    torch.testing.assert_close(pipe(PROMPTS[0], seed=1, output_type="pt").frames, video, rtol=0, atol=1e-4)


@works_video
@pytest.mark.parametrize("name", ["5b", "learned"])
@torch.no_grad()
def test_rotary_positions(name):
    """Alone, and beside learned ones."""
    pipe = variant(name)
    component = cogvideox.denoiser(pipe, SIZE)
    latents, timestep, states, guidance = component.args
    rotary = pipe._prepare_rotary_positional_embeddings(64, 64, 3, torch.device("cpu"))
    call = (torch.cat([latents] * 2), states[0], timestep.expand(2))
    samples = [pipe.transformer(*call, image_rotary_emb=r, return_dict=False)[0].chunk(2) for r in (rotary, None)]
    theirs, without = (uncond + guidance * (cond - uncond) for uncond, cond in samples)
    graph = capture_graph(component.name, component.module, component.args, component.inputs, component.outputs)
    # one branch after the other against a batch of two: float32 sums in another order
    assert relative_error(graph.gm(*component.args), theirs) < 1e-5
    assert relative_error(graph.gm(*component.args), without) > 1e-4  # the canary


@works_video
@torch.no_grad()
def test_another_size_than_the_models_own():
    """The positions are those of the size, and the model keeps its own."""
    pipe, size = eager("cogvideox"), Size(32, 48, 16, 8)
    component = cogvideox.denoiser(pipe, size)
    latents, timestep, states, guidance = component.args
    sample = pipe.transformer(torch.cat([latents] * 2), states[0], timestep.expand(2), return_dict=False)[0]
    uncond, cond = sample.chunk(2)
    graph = capture_graph(component.name, component.module, component.args, component.inputs, component.outputs)
    # one branch after the other against a batch of two: float32 sums in another order
    assert relative_error(graph.gm(*component.args), uncond + guidance * (cond - uncond)) < 1e-5
    assert (
        relative_error(graph.gm(latents, timestep + 50, states, guidance), uncond + guidance * (cond - uncond)) > 1e-4
    )
    assert "_get_positional_embeddings" not in vars(pipe.transformer.patch_embed)


@torch.no_grad()
def test_in_bfloat16_neighbouring_timesteps_stay_apart():
    """Rounded before the sinusoid, 975 and 976 would both be 976."""
    pipe = load_model("tiny:cogvideox", None, {"default": torch.bfloat16}).pipe
    component = cogvideox.denoiser(pipe, SIZE)
    latents, _, states, guidance = component.args
    a, b = (component.module(latents, torch.tensor([t]), states, guidance) for t in (975.0, 976.0))
    assert a.dtype == torch.float32
    assert not torch.equal(a, b)


SIZES = [
    (None, Size(64, 68, 16, 9), r"shapes\.height, shapes\.width: expected multiples of 8 "),
    (None, Size(64, 64, 8, 9), r"shapes\.max_sequence_length: expected 16 tokens, .* got 8$"),
    ("learned", Size(64, 32, 16, 9), r"shapes\.height, shapes\.width: expected 64 x 64, .* got 64 x 32$"),
    ("learned", Size(64, 64, 8, 9), r"shapes\.max_sequence_length: expected 16 tokens, .* got 8$"),
    ("i2v", SIZE, r"transformer\.config\.ofs_embed_dim: expected none, got 32: "),
]


@pytest.mark.parametrize(("name", "size", "sentence"), SIZES)
def test_what_the_model_cannot_do_is_refused(name, size, sentence):
    with pytest.raises(ExportError, match=sentence):
        cogvideox.check_size(variant(name) if name else eager("cogvideox"), size)
    cogvideox.check_size(variant("5b"), Size(64, 32, 8, 9))  # turned positions leave both open


def test_the_recipe_for_every_family_leaves_what_a_video_model_has_not():
    """Its VAE has no attention to fuse, and no tensors of four dimensions: the export goes on, and says both."""
    recipe, shown = resolve("baseline", ("sampler.steps=2",), "tiny:cogvideox"), mock.Mock()
    whole = object.__new__(WholePipeline)
    whole.__dict__["pipe"] = copy.deepcopy(eager("cogvideox"))
    whole.rewrite(recipe, load_backend("aoti"), shown)
    notes = " ".join(call.args[0] for call in shown.note.call_args_list)
    assert "fuse.vae_qkv: nothing to fuse in the vae" in notes
    assert "compile.channels_last_vae: the tensors of the vae (AutoencoderKLCogVideoX) have five dimensions" in notes
    assert has_picture_layout(eager("sd").vae)


# --- schedulers and caches --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(pipe: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the pipeline has another component."""
    before = getattr(pipe, name)
    setattr(pipe, name, value)
    try:
        yield
    finally:
        setattr(pipe, name, before)


@pytest.mark.works("cogvideox", "other schedulers")
def test_the_multistep_scheduler():
    """It draws two noises at each step and adds the second one."""
    pipe = eager("cogvideox")
    with changed(pipe, "scheduler", CogVideoXDPMScheduler.from_config(pipe.scheduler.config)):
        latents = expected("cogvideox", PROMPTS[0], generator=seeded(1))
    made = got("cogvideox", PROMPTS[0], "sampler.scheduler=CogVideoXDPMScheduler", seed=1)
    assert relative_error(made, latents) < TOLERANCE
    assert relative_error(got("cogvideox", PROMPTS[0], seed=1), latents) > 1e-2  # the canary


@contextlib.contextmanager
def hooked(config: Any) -> Iterator[None]:
    """Inside, diffusers' own cache is on."""
    transformer = eager("cogvideox").transformer
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


def current() -> Any:
    return eager("cogvideox").current_timestep


CACHES = {
    "pab": (
        ("cache.method=pab",),
        lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=current,
        ),
    ),
    "fastercache": (
        (
            "cache.method=fastercache",
            "cache.attention_weight=0.3",
            "cache.spatial_attention_block_skip_range=2",
            "cache.spatial_attention_timestep_skip_range=[-1, 681]",
            "cache.unconditional_batch_skip_range=5",
            "cache.unconditional_batch_timestep_skip_range=[-1, 781]",
        ),
        lambda: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 681),
            current_timestep_callback=current,
            attention_weight_callback=lambda _: 0.3,
            unconditional_batch_skip_range=5,
            unconditional_batch_timestep_skip_range=(-1, 781),
            tensor_format="BFCHW",
        ),
    ),
}


@works_caches
@pytest.mark.parametrize("name", CACHES)
def test_a_cached_plan_is_diffusers_own_cache(name):
    """diffusers' documented example of each, on its pipeline."""
    overrides, config = CACHES[name]
    pipe = eager("cogvideox")
    with hooked(config()):
        latents = pipe(PROMPTS[0], output_type="latent", num_inference_steps=8, generator=seeded(1), **CALL).frames
    assert relative_error(got("cogvideox", PROMPTS[0], *overrides, seed=1), latents) < TOLERANCE
    uncached = got("cogvideox", PROMPTS[0], *overrides, seed=1, cache=False)
    assert relative_error(uncached, latents) > 1e-3  # the canary
    assert relative_error(uncached, expected("cogvideox", PROMPTS[0], generator=seeded(1))) < TOLERANCE


# --- calls ------------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"num_frames": 17}, r"num_frames=17: the artifact makes 9 frames only; export again for another number"),
    ({"height": 128}, r"height=128, width=64: the artifact makes frames of height 64, width 64 only; "),
    ({"max_sequence_length": 226}, r"max_sequence_length=226: the artifact was exported for 16 tokens"),
    ({"use_dynamic_cfg": True}, r"use_dynamic_cfg: an artifact of CogVideoXPipeline does not take it; it takes prompt, "),
    ({"image": Image.new("RGB", (8, 8))}, r"image: "),
    ({"num_videos_per_prompt": 0}, r"num_videos_per_prompt=0: expected 1 or more"),
    ({"num_videos_per_prompt": 2, "num_images_per_prompt": 2}, r"num_videos_per_prompt=2: expected num_images_per_prompt alone"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_a_call_for_something_else_is_refused(call, sentence):
    with pytest.raises(RequestError, match=f"^{sentence}"):
        ours("cogvideox")(PROMPTS[0], **call)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_a_video_are_over_its_frames():
    a, b = torch.rand(2, 1, 3, 3, 16, 16, generator=seeded(0))
    stills = [(a[:, t], b[:, t]) for t in range(3)]
    assert ssim(a, b) == pytest.approx(sum(ssim(x, y) for x, y in stills) / 3)
    assert ssim(a, a) == 1
    mse = sum(10 ** (-psnr_db(x, y) / 10) for x, y in stills) / 3
    assert psnr_db(a, b) == pytest.approx(-10 * np.log10(mse))
    assert image_array(a).shape == (3, 16, 16, 3)
    assert np.array_equal(image_array(a)[1], image_array(a[:, 1]))


def test_the_sheet_shows_the_first_the_middle_and_the_last_frame():
    video = torch.zeros(1, 9, 3, 64, 64)
    for t, channel in ((0, 0), (4, 1), (8, 2)):
        video[:, t, channel] = 1.0
    shown = scale_picture(video)
    assert shown.size == (3 * 64, 64)
    assert [shown.getpixel((64 * i + 32, 32)) for i in range(3)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert scale_picture(video[:, :1]).size == (64, 64)
    plan = Plan.model_construct(name="2", steps=2, cache="none")
    drawn = DrawnPicture(video, torch.zeros(1), 1.0)
    image = draw_sheet([PictureRow("a", 0, {2: drawn}, {"2": drawn})], [plan])
    assert image.width > 3 * 3 * 64  # eager, artifact and difference, of three frames each
    assert isinstance(image.getpixel((0, 0)), tuple)


def test_an_artifact_says_how_many_frames_it_makes():
    manifest: Manifest = ours("cogvideox").artifact.manifest
    assert (manifest.defaults.num_frames, manifest.graph("vae_decoder").outputs[0].shape) == (9, (1, 9, 3, 64, 64))
    assert read_size(manifest) == SIZE
