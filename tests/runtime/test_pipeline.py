"""The callable on the compiled toy, against the same modules and the same loop in plain torch."""

import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prebake.exporter.package.folder import file_entries
from prebake.runtime import ArtifactError, RequestError, load
from prebake.runtime.artifact import read_plans
from prebake.runtime.drawing.request import RequestReader
from prebake.runtime.families import flux
from prebake.runtime.manifest import FileEntry, read_manifest
from prebake.runtime.noise import draw_noise
from prebake.runtime.pipeline import Pipeline
from support import toy_model as toy

IDS = torch.tensor([[3, 4, 0, 0, 0]])
IDS_2 = torch.tensor([[3, 4, 0, 0, 0, 0]])
SHAPE = (2, 4, 4)


def noise(seed, batch=1):
    return flux.pack_latents(draw_noise((batch, *SHAPE), torch.Generator().manual_seed(seed)))


def latents(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **kwargs).images


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # float32, the same sums in other kernels


@pytest.mark.parametrize("cached", [True, False])
def test_replay_equals_the_eager_loop(pipe, eager, cached):
    got = latents(pipe, "red circle", seed=7, guidance_scale=2.0, cache=cached)
    close(got, eager.latents(IDS, IDS_2, noise(7), 2.0, cached))


@pytest.mark.parametrize("where", ["full.out.weight", "full.block.bias", "text_2.table.weight"])
def test_the_comparison_notices_one_perturbed_weight(pipe, where):
    other = toy.Eager()
    module, _, parameter = where.rpartition(".")
    with torch.no_grad():
        weight = getattr(_sub(other, module), parameter)
        weight.view(-1)[4 * weight.shape[-1] if weight.dim() == 2 else 0] += 0.05
    with pytest.raises(AssertionError, match="not close"):
        close(latents(pipe, "red circle", seed=7, guidance_scale=2.0), other.latents(IDS, IDS_2, noise(7), 2.0))


def _sub(eager, path):
    first, _, rest = path.partition(".")
    return getattr(eager, first).get_submodule(rest)


def test_the_cached_plan_is_not_the_uncached_one(pipe):
    assert (latents(pipe, "red", seed=1) - latents(pipe, "red", seed=1, cache=False)).abs().max() > 1e-3


def test_images_come_as_pil_np_and_pt(pipe, eager):
    call = {"prompt": "red circle", "seed": 7, "guidance_scale": 2.0}
    want = eager.decoder(eager.latents(IDS, IDS_2, noise(7), 2.0)).detach()
    pt = pipe(**call, output_type="pt").images
    close(pt, want)
    array = pipe(**call, output_type="np").images
    assert array.shape == (1, 8, 8, 3)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    image = pipe(**call).images[0]
    assert image.size == (8, 8)
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(pipe(**call, return_dict=False, output_type="np")[0], array)


def test_the_same_seed_gives_the_same_bits(pipe):
    assert torch.equal(latents(pipe, "red", seed=3), latents(pipe, "red", generator=torch.Generator().manual_seed(3)))


def test_without_seed_the_global_generator_is_used(pipe):
    torch.manual_seed(5)
    first = latents(pipe, "red")
    torch.manual_seed(5)
    assert torch.equal(latents(pipe, "red"), first)


def test_one_generator_draws_the_whole_batch(pipe, eager):
    got = latents(pipe, ["red circle", "red circle"], num_images_per_prompt=2, seed=7, guidance_scale=2.0)
    each = [eager.latents(IDS, IDS_2, x[None], 2.0) for x in noise(7, batch=4)]
    close(got, torch.cat(each))


def test_a_list_of_generators_draws_an_image_each(pipe):
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    got = latents(pipe, "red", num_images_per_prompt=2, generator=generators)
    assert torch.equal(got, torch.cat([latents(pipe, "red", seed=3), latents(pipe, "red", seed=4)]))


def test_noise_equals_the_pipeline_class_it_replaces():
    pipelines = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux", reason="diffusers is not installed")

    class Shell:
        vae_scale_factor = 8
        _pack_latents = staticmethod(pipelines.FluxPipeline._pack_latents)
        _prepare_latent_image_ids = staticmethod(pipelines.FluxPipeline._prepare_latent_image_ids)

    for make in (
        lambda: torch.Generator().manual_seed(3),
        lambda: [torch.Generator().manual_seed(i) for i in (5, 6, 7)],
    ):
        shape = (3, 16, 64, 96, torch.float32, torch.device("cpu"), make())
        want, _ = pipelines.FluxPipeline.prepare_latents(Shell(), *shape)
        assert torch.equal(flux.pack_latents(draw_noise((3, 16, 8, 12), make())), want)


def test_prompt_2_goes_to_the_second_encoder(pipe, eager):
    blue = torch.tensor([[5, 0, 0, 0, 0, 0]])
    got = latents(pipe, "red circle", "blue", seed=7, guidance_scale=2.0)
    close(got, eager.latents(IDS, blue, noise(7), 2.0))


def test_given_latents_and_embeddings_replace_drawn_and_encoded_ones(pipe, eager):
    pooled, hidden = eager.text(IDS).detach(), eager.text_2(IDS_2).detach()
    got = latents(pipe, prompt_embeds=hidden, pooled_prompt_embeds=pooled, latents=noise(7), guidance_scale=2.0)
    close(got, eager.latents(IDS, IDS_2, noise(7), 2.0))


def test_an_empty_prompt_is_a_prompt(pipe):
    assert torch.isfinite(latents(pipe, "", seed=1)).all()


def test_a_long_prompt_is_cut_with_a_warning_that_says_what_was_lost(pipe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latents(pipe, "a red circle left of a blue square", seed=1)
    assert [str(w.message) for w in caught] == [
        "the prompt is longer than 5 tokens of tokenizer; cut off: 'a blue square'",
        "the prompt is longer than 6 tokens of tokenizer_2; cut off: 'blue square'",
    ]


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step_and_may_replace_latents(pipe):
    seen = []

    def callback(p, step, timestep, tensors):
        assert p is pipe
        seen.append((step, timestep, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    got = latents(pipe, "red", seed=1, callback_on_step_end=callback)
    assert seen == [(i, 1000 * toy.SIGMAS[i], (1, toy.N, toy.C)) for i in range(4)]
    assert torch.equal(got, torch.zeros(1, toy.N, toy.C))


def test_a_callback_that_returns_nothing_changes_nothing(pipe):
    assert torch.equal(latents(pipe, "red", seed=1, callback_on_step_end=lambda *a: None), latents(pipe, "red", seed=1))


def test_interrupt_ends_this_call_and_not_the_next(pipe):
    kept = []

    def callback(p, step, timestep, tensors):
        kept.append(tensors["latents"])
        p._interrupt = step == 1
        return tensors

    got = latents(pipe, "red", seed=1, num_images_per_prompt=3, callback_on_step_end=callback)
    assert len(kept) == 2
    assert torch.equal(got, kept[-1])
    assert pipe.interrupt
    assert len(latents(pipe, "red", seed=1, num_images_per_prompt=2)) == 2


def test_threads_share_one_pipeline(pipe):
    want = [latents(pipe, "red circle", seed=i) for i in range(4)]
    got = {}

    def work(i):
        got[i] = [latents(pipe, "red circle", seed=i) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(x, want[i]) for i in range(4) for x in got[i])


# --- what a call is refused for -------------------------------------------------------------------------------------


REFUSED = {
    "steps": (
        {"num_inference_steps": 9},
        "num_inference_steps=9: the artifact has the plans 4, 4-uncached; export again with another one",
    ),
    "height": (
        {"height": 16},
        "height=16, width=8: the artifact makes images of height 8, width 8 only; export again for another size",
    ),
    "length": ({"max_sequence_length": 512}, "max_sequence_length=512: the artifact was exported for 6 tokens"),
    "output_type": ({"output_type": "jpg"}, "output_type='jpg': expected one of pil, np, pt, latent"),
    "images": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: expected 1 or more"),
    "seed": ({"seed": 1, "generator": torch.Generator()}, "expected seed or generator, got both"),
    "generators": (
        {"generator": [torch.Generator()] * 2},
        "generator: expected one, or a list of 1, one for each image; got 2",
    ),
    "callback_inputs": (
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        "callback_on_step_end_tensor_inputs: 'prompt_embeds' is not a tensor of the loop; it has latents",
    ),
    "callback_output": (
        {"callback_on_step_end": lambda *a: {"prompt_embeds": 0}},
        "callback_on_step_end returned 'prompt_embeds'; only latents can be replaced",
    ),
    "latents": ({"latents": torch.zeros(1, 2, 4, 4)}, "latents: expected packed latents [1, 4, 8], got [1, 2, 4, 4]"),
    "prompt": ({"prompt": None}, "prompt: expected a text or a list of texts, got None"),
    "prompt_2": ({"prompt_2": ["a", "b"]}, "prompt_2: expected 1 texts, one for each prompt, got 2"),
    "negative_prompt": (
        {"negative_prompt": "blue"},
        "negative_prompt: an artifact of FluxPipeline does not take it; ",
    ),
    "both": (
        {"prompt_embeds": torch.zeros(1)},
        "expected either prompt, or prompt_embeds and pooled_prompt_embeds; got prompt, prompt_embeds",
    ),
    "pooled": (
        {"prompt": None, "prompt_embeds": torch.zeros(1)},
        "expected either prompt, or prompt_embeds and pooled_prompt_embeds; got prompt_embeds",
    ),
    "embeds_batch": (
        {"prompt": None, "prompt_embeds": torch.zeros(2, 6, 8), "pooled_prompt_embeds": torch.zeros(1, 6)},
        "pooled_prompt_embeds: expected a batch of 2 as prompt_embeds has, got 1",
    ),
    "embeds_shape": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 9, 8), "pooled_prompt_embeds": torch.zeros(1, 6)},
        "prompt_embeds: expected [B, 6, 8], got [1, 9, 8]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_is_refused_in_words(pipe, name):
    kwargs, words = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        pipe(**{"prompt": "red", **kwargs})
    assert str(caught.value).startswith(words)


def test_cache_false_without_an_uncached_plan_lists_the_plans(artifact_copy, cache_dir):
    toy.edit_manifest(artifact_copy, plans={"4": "plans/4.json"})
    with pytest.raises(RequestError) as caught:
        load(artifact_copy, cache_dir=cache_dir)("red", cache=False)
    assert (
        str(caught.value)
        == "num_inference_steps=4, cache=False: the artifact has the plans 4; export again with another one"
    )


def test_a_number_of_steps_without_a_plan_says_how_to_add_it(pipe):
    """Where the artifact has what a plan is made of; of the rest nothing is promised."""
    made, folder = pipe.artifact, "some where"
    inputs = FileEntry(path="replan.json", size=1, sha256="0" * 64)
    extensible = made.manifest.model_copy(update={"files": (*made.manifest.files, inputs)})
    other = Pipeline(replace(made, manifest=extensible))
    other._reader = RequestReader(replace(other.artifact, folder=Path(folder)), other.families, ())
    with pytest.raises(RequestError, match="`prebake plan 'some where' --steps 14` adds one"):
        other("red", num_inference_steps=14)
    for steps in (0, -1):
        with pytest.raises(RequestError, match=r"4-uncached; export again"):
            other("red", num_inference_steps=steps)
    with pytest.raises(RequestError, match=r"4-uncached; export again"):
        pipe("red", num_inference_steps=14)


def test_a_plan_that_was_never_compared_says_so_once(pipe):
    added = pipe.artifact.manifest.model_copy(update={"status": "verified", "unverified": ("4",)})
    other = Pipeline(replace(pipe.artifact, manifest=added))
    assert "verified, plan 4 never compared" in repr(other).splitlines()[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latents(other, "red", seed=1, cache=False)
        assert not caught
        for _ in range(2):
            latents(other, "red", seed=1)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("plan 4 of ")
    assert caught[0].filename == __file__
    assert "verified" not in repr(pipe).splitlines()[0].replace("unverified", "")


def test_a_plan_that_has_no_cache_serves_both_choices(artifact_copy, cache_dir):
    uncached = artifact_copy / "plans/4-uncached.json"
    plan = read_plans(artifact_copy, read_manifest(artifact_copy))["4-uncached"].model_copy(update={"name": "4"})
    (artifact_copy / "plans/4.json").write_text(plan.model_dump_json())
    uncached.unlink()
    files = [entry.model_dump() for entry in file_entries(artifact_copy)]
    toy.edit_manifest(artifact_copy, plans={"4": "plans/4.json"}, files=files)
    pipe = load(artifact_copy, cache_dir=cache_dir)
    assert torch.equal(latents(pipe, "red", seed=1, cache=False), latents(pipe, "red", seed=1))


def test_an_artifact_that_failed_verification_is_not_loaded(artifact_copy):
    toy.edit_manifest(artifact_copy, status="failed")
    with pytest.raises(ArtifactError, match="its verification failed, see reports/; export again"):
        load(artifact_copy)


def test_another_family_is_refused_by_name(artifact_copy, cache_dir):
    toy.edit_manifest(artifact_copy, family="dream")
    with pytest.raises(
        ArtifactError,
        match=r"\[family\]: 'dream' is not .* replays: cogvideox, flux, ",
    ):
        load(artifact_copy, cache_dir=cache_dir)


def test_wrong_settings_are_named(artifact_copy, cache_dir):
    toy.edit_manifest(artifact_copy, pipeline={"latents_shape": [2, 4]})
    with pytest.raises(ArtifactError, match=r"manifest\.json \[pipeline\.latents_shape"):
        load(artifact_copy, cache_dir=cache_dir)
