"""Attach: an exported denoiser inside an ordinary diffusers pipeline gives the pipeline's own latents, or says why not.

Most artifacts here are the captured graphs, run as they are (`attached.uncompiled`); the last tests compile. The peer is
always the pipeline itself, side by side.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PyramidAttentionBroadcastConfig
from torch import Tensor, nn

from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import open_progress
from prebake.exporter.verify.closeness import relative_error
from prebake.exporter.verify.denoiser_alone import AttachedReplayer
from prebake.exporter.verify.golden import golden_path
from prebake.exporter.verify.verify import VerifyOptions, verify_artifact
from prebake.runtime import ArtifactError, ExportError, RecipeError, RequestError, attach, detach, load
from prebake.runtime.artifact import Artifact, open_artifact
from prebake.runtime.attachment.snapshot import DenoiserSnapshot, stored_samples, weight_states, weights_digest
from prebake.runtime.manifest import read_manifest
from support.attach_pipelines import (
    BUILDERS,
    LONGER_PROMPT,
    OTHER_PROMPT,
    PROMPT,
    drawn,
    pipeline,
    recipe,
    saved,
    uncompiled,
)
from support.paths import ROOT

NAMES = tuple(BUILDERS)
MASK = {"method": "mask", "mask": "1(01)"}  # at 4 steps 1010
ROUNDING = 1e-5
"""Relative L2 of latents. Graphs are float32 and add in another order than eager: 6e-8 a sum, some 1e-7 after the loop.
A perturbed weight moves them by 1e-3 and more (`test_canary`)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a pipeline -> where it is saved."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp(name) / name)
        return made[name]

    return of


@pytest.fixture(scope="module")
def artifact(folder, tmp_path_factory) -> Callable[..., Artifact]:
    """Name of a pipeline, and tables of the recipe -> the uncompiled artifact; each is made once."""
    made: dict[str, Artifact] = {}

    def of(name: str, steps: tuple[int, ...] = (4,), **tables: Any) -> Artifact:
        key = f"{name} {steps} {tables}"
        if key not in made:
            made[key] = uncompiled(recipe(name, folder(name), steps, **tables), tmp_path_factory.mktemp("artifact"))
        return made[key]

    return of


def same(ours: Tensor, theirs: Tensor) -> bool:
    return relative_error(ours, theirs) <= ROUNDING


# --- latents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.works(n, "attach")) for n in NAMES])
def test_latents_are_the_pipelines_own(name, artifact):
    """Another seed than the recorded one, and where the text has one length another prompt; the denoiser itself rests."""
    pipe = pipeline(name)
    eager = drawn(pipe, name, OTHER_PROMPT)
    ran: list[str] = []
    blocks = [m for m in pipe.transformer.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda *_: ran.append("it ran")) for m in blocks]
    with attach(pipe, artifact(name)):
        ours = drawn(pipe, name, OTHER_PROMPT)
        twice = drawn(pipe, name, OTHER_PROMPT)
    assert not ran
    assert same(ours, eager)
    assert torch.equal(ours, twice)
    for handle in handles:
        handle.remove()


def test_canary(artifact):
    """What is compared is the artifact's output: one weight of its graph off by a thousandth is seen."""
    pipe, whole = pipeline("aura_flow"), artifact("aura_flow")
    eager = drawn(pipe, "aura_flow")
    wrong = replace(whole, graphs={n: Off(g) for n, g in whole.graphs.items()})
    with attach(pipe, wrong):
        assert relative_error(drawn(pipe, "aura_flow"), eager) > 10 * ROUNDING


class Off:
    """A graph whose output is off by a thousandth."""

    def __init__(self, bound: Any) -> None:
        self.graph, self._bound = bound.graph, bound

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        return {n: t * 1.001 for n, t in self._bound(inputs).items()}


def test_several_plans_and_the_one_without_a_cache(artifact):
    pipe, made = pipeline("aura_flow"), artifact("aura_flow", (3, 5), cache=MASK)
    eager = {n: drawn(pipe, "aura_flow", steps=n) for n in (3, 5)}
    with attach(pipe, made, cache=False):
        assert all(same(drawn(pipe, "aura_flow", steps=n), eager[n]) for n in (5, 3))
    with attach(pipe, made):
        assert not same(drawn(pipe, "aura_flow", steps=5), eager[5])


@pytest.mark.parametrize(
    ("name", "site"),
    [pytest.param("sana", "blocks", marks=pytest.mark.works("sana", "caches")), ("wan", "blocks"), ("wan", "output")],
)
def test_a_cached_plan_is_what_hooks_do_in_eager(name, site, artifact):
    """Skipped steps reuse what the same branch stored: written down here once more, with hooks on the eager model."""
    pipe, made = pipeline(name), artifact(name, cache={**MASK, "site": site})
    mask = [e.variant == "full" for e in made.plans["4"].evaluations]
    assert mask.count(False) > 1
    blocks = {"sana": "transformer_blocks", "wan": "blocks"}[name]
    stack = [pipe.transformer] if site == "output" else list(getattr(pipe.transformer, blocks))
    branches = 1 if name == "sana" else 2
    with reused(stack, mask, branches, residual=site == "blocks"):
        eager = drawn(pipe, name)
    with attach(pipe, made):
        ours = drawn(pipe, name)
    assert same(ours, eager)
    assert not same(ours, drawn(pipe, name))


class reused:
    """Inside, a run of modules is taken from the store of its branch at evaluations where the mask is False."""

    def __init__(self, stack: list[nn.Module], mask: list[bool], branches: int, *, residual: bool) -> None:
        self.calls, self.stored, self.head = 0, {}, None
        self.mask, self.branches, self.residual = mask, branches, residual
        self.first, self.last = stack[0], stack[-1]

    def __enter__(self) -> None:
        self.handles = [
            self.first.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.last.register_forward_hook(self.leave),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.head = args[0] if args else kwargs["hidden_states"]

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        evaluation, branch = divmod(self.calls, self.branches)
        self.calls += 1
        value = output[0] if isinstance(output, tuple) else output
        base = self.head if self.residual else torch.zeros(())
        if self.mask[evaluation]:
            self.stored[branch] = value - base
            return output
        value = base + self.stored[branch]
        return (value, *output[1:]) if isinstance(output, tuple) else value


def test_an_interrupted_call_leaves_nothing_behind(artifact):
    """The plan begins again, and what the broken run had stored is not reused."""
    pipe = pipeline("wan")
    with attach(pipe, artifact("wan", cache=MASK)):
        whole = drawn(pipe, "wan")
        with pytest.raises(InterruptedError):
            drawn(pipe, "wan", seed=8, callback_on_step_end=stop_at(1, InterruptedError))
        assert torch.equal(drawn(pipe, "wan"), whole)
        drawn(pipe, "wan", seed=8, callback_on_step_end=stop_at(2, None))
        assert torch.equal(drawn(pipe, "wan"), whole)


def stop_at(step: int, error: type[Exception] | None) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == step and error:
            raise error
        pipe._interrupt = pipe._interrupt or i == step
        return tensors

    return callback


def test_a_refused_call_leaves_nothing_behind(artifact):
    pipe = pipeline("aura_flow")
    eager = drawn(pipe, "aura_flow")
    with attach(pipe, artifact("aura_flow")):
        with pytest.raises(RequestError):
            drawn(pipe, "aura_flow", height=48)
        assert same(drawn(pipe, "aura_flow"), eager)


def test_an_output_class_comes_back(artifact):
    """A denoiser that is asked for its output class gives one."""
    pipe, made = pipeline("aura_flow"), artifact("aura_flow")
    facts = copy.deepcopy(made.manifest.pipeline)
    sample = {"kind": "tensor"}
    name = "diffusers.models.modeling_outputs.Transformer2DModelOutput"
    facts["output"] = {"kind": "dict", "cls": name, "items": {"sample": sample}}
    changed = replace(made, manifest=made.manifest.model_copy(update={"pipeline": facts}))
    eager = drawn(pipe, "aura_flow")
    with attach(pipe, changed):
        assert same(drawn(pipe, "aura_flow"), eager)  # the pipeline takes `[0]` of either
    facts["output"]["cls"] = "os.environ"
    with pytest.raises(ArtifactError, match="expected an output class of the diffusers"):
        attach(pipe, replace(made, manifest=made.manifest.model_copy(update={"pipeline": facts})))


# --- attaching and detaching ----------------------------------------------------------------------------------------


def test_detach_gives_everything_back(artifact):
    pipe = pipeline("sana")
    before, scheduler = dict(vars(pipe.transformer)), dict(vars(pipe.scheduler))
    eager = drawn(pipe, "sana")
    attach(pipe, artifact("sana"))
    assert type(pipe.transformer).__name__ == "SanaTransformer2DModel"
    assert pipe.transformer.dtype == torch.float32
    drawn(pipe, "sana")
    detach(pipe)
    assert vars(pipe.transformer).keys() == before.keys()
    assert vars(pipe.scheduler).keys() >= scheduler.keys()
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert torch.equal(drawn(pipe, "sana"), eager)
    with pytest.raises(RequestError, match="nothing is attached"):
        detach(pipe)


def test_with_detaches_after_an_error_too(artifact):
    pipe = pipeline("aura_flow")
    with pytest.raises(InterruptedError), attach(pipe, artifact("aura_flow")):
        raise InterruptedError
    assert "forward" not in vars(pipe.transformer)
    with attach(pipe, artifact("aura_flow")):
        detach(pipe)  # by hand, and once more at the end of the block


def test_a_copied_scheduler_is_not_followed(artifact):
    pipe = pipeline("aura_flow")
    with attach(pipe, artifact("aura_flow")):
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(7)
        assert len(twin.timesteps) == 7
        assert len(pipe.scheduler.timesteps) != 7
        with pytest.raises(RequestError, match="called before the pipeline set a schedule"):
            direct(pipe)


def test_verification_draws_in_a_pipeline_on_the_artifacts_device(folder, artifact):
    """On a GPU, for which torch's device without data stands in here."""
    elsewhere = replace(artifact("sana"), device=torch.device("meta"))
    loaded = AttachedReplayer(elsewhere, recipe("sana", folder("sana")), str(folder("sana"))).loaded
    assert loaded.pipe.transformer.device == elsewhere.device
    assert loaded.pipe.vae.device == elsewhere.device


def test_attaching_needs_no_diffusers_of_its_own():
    code = "import sys, prebake.runtime as r; r.attach, r.detach; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- refusals: what is attached to what -----------------------------------------------------------------------------


def other_class(pipe: Any) -> Any:
    return pipeline("sana")


def other_config(pipe: Any) -> Any:
    pipe.transformer.register_to_config(sample_size=16)
    return pipe


def other_weights(pipe: Any) -> Any:
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1e-3)
    return pipe


def other_dtype(pipe: Any) -> Any:
    pipe.transformer.to(torch.bfloat16)
    return pipe


def other_scheduler(pipe: Any) -> Any:
    pipe.scheduler = EulerDiscreteScheduler()
    return pipe


def accelerated(pipe: Any) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.transformer, ModelHook())
    return pipe


def cached_by_diffusers(pipe: Any) -> Any:
    from diffusers.hooks import apply_pyramid_attention_broadcast

    apply_pyramid_attention_broadcast(
        pipe.transformer,
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    )
    return pipe


def patched(pipe: Any) -> Any:
    pipe.transformer.forward = pipe.transformer.forward
    return pipe


def compiled_by_torch(pipe: Any) -> Any:
    pipe.transformer.compile()
    return pipe


def nothing(pipe: Any) -> Any:
    return object()


UNFIT = {
    other_class: "pipeline: the artifact was exported for AuraFlowPipeline, got SanaPipeline",
    other_config: "transformer.config.sample_size: the artifact was exported for 8, got 16",
    other_weights: "transformer: its weights are not the ones of the export",
    other_dtype: "transformer: its weights are not the ones of the export",
    other_scheduler: "scheduler: the artifact was exported for FlowMatchEulerDiscreteScheduler, got EulerDiscrete",
    accelerated: "transformer: carries accelerate's hook",
    cached_by_diffusers: "carries the diffusers hook pyramid_attention_broadcast",
    patched: "transformer: carries another forward",
    compiled_by_torch: "transformer: is compiled by torch.compile",
    nothing: "expected a diffusers pipeline, got object",
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_a_pipeline_that_does_not_fit_is_refused(change, artifact):
    pipe = change(pipeline("aura_flow"))
    with pytest.raises(RequestError, match=UNFIT[change]) as refused:
        attach(pipe, artifact("aura_flow"))
    assert "\n" not in str(refused.value)


# --- refusals: what was changed since -------------------------------------------------------------------------------


def lora_beside(denoiser: nn.Module) -> None:
    """As `load_lora_weights` and `add_adapter` put one there (PEFT)."""
    layer = nn.Module()
    layer.base_layer, layer.lora_A = denoiser.proj_out, nn.Linear(8, 2)
    denoiser.proj_out = layer


def lora_fused(denoiser: nn.Module) -> None:
    """As `fuse_lora` does it: past torch's count of writes."""
    denoiser.proj_out.weight.data += 1e-3


def one_number(denoiser: nn.Module) -> None:
    with torch.no_grad():
        denoiser.proj_out.weight[1, 1] += 1


def other_memory(denoiser: nn.Module) -> None:
    denoiser.proj_out.weight = nn.Parameter(denoiser.proj_out.weight + 1e-3)


def fewer_weights(denoiser: nn.Module) -> None:
    denoiser.proj_out.bias = None


def other_kind(denoiser: nn.Module) -> None:
    """As tomesd does it."""
    block = denoiser.single_transformer_blocks[0]
    block.__class__ = type("Merged", (type(block),), {})


def other_processor(denoiser: nn.Module) -> None:
    """As `load_ip_adapter` and `set_attn_processor` do it."""
    for module in denoiser.modules():
        if hasattr(module, "processor"):
            module.processor = object()


def free_u(denoiser: nn.Module) -> None:
    denoiser.single_transformer_blocks[0].s1 = 0.9


def another_config(denoiser: nn.Module) -> None:
    denoiser.register_to_config(sample_size=16)


def hooked(denoiser: nn.Module) -> None:
    denoiser.proj_out.register_forward_hook(lambda *_: None)


def inner_forward(denoiser: nn.Module) -> None:
    denoiser.proj_out.forward = lambda x: x


def compiled_since(denoiser: nn.Module) -> None:
    denoiser.compile()


CHANGED = {
    lora_beside: r"transformer: the weight 'proj_out.base_layer.weight' \(\d in all\) was added to it since",
    lora_fused: "transformer: its weight 'proj_out.weight' was changed since",
    one_number: "transformer: its weight 'proj_out.weight' was changed since",
    other_memory: "transformer: its weight 'proj_out.weight' was changed since",
    fewer_weights: "transformer: its weight 'proj_out.bias' was taken away since",
    other_kind: "transformer: 'class' of its module single_transformer_blocks.0 was changed since",
    other_processor: r"transformer: 'processor' of its module .*attn was changed since",
    free_u: "transformer: 's1' of its module single_transformer_blocks.0 was changed since",
    another_config: "transformer: its config 'sample_size' was changed since",
    hooked: "transformer: 'forward hooks' of its module proj_out was changed since",
    inner_forward: "transformer: 'forward' of its module proj_out was changed since",
    compiled_since: "transformer: its forward was replaced or compiled since",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_denoiser_that_was_changed_since_is_refused_by_name(change, artifact):
    pipe = pipeline("aura_flow")
    if change is fewer_weights:
        pipe.transformer.proj_out.bias = nn.Parameter(torch.zeros(pipe.transformer.proj_out.out_features))
    made = fitted(artifact("aura_flow"), pipe)
    attach(pipe, made)
    drawn(pipe, "aura_flow")
    change(pipe.transformer)
    for _ in range(2):
        with pytest.raises(RequestError, match=CHANGED[change]) as refused:
            drawn(pipe, "aura_flow")
        assert "or detach(pipeline) to draw with it" in str(refused.value)
        assert "\n" not in str(refused.value)
    detach(pipe)
    assert "set_timesteps" not in vars(pipe.scheduler)


def fitted(made: Artifact, pipe: Any) -> Artifact:
    """The artifact, as if it had been exported with the pipeline's present weights."""
    facts = {**made.manifest.pipeline, "weights": weights_digest(pipe.transformer)}
    return replace(made, manifest=made.manifest.model_copy(update={"pipeline": facts}))


def test_another_denoiser_in_the_pipeline_is_refused_and_can_be_detached(artifact):
    pipe, other = pipeline("aura_flow"), pipeline("aura_flow").transformer
    attach(pipe, artifact("aura_flow"))
    pipe.transformer = other
    with pytest.raises(RequestError, match="the pipeline has another transformer since"):
        drawn(pipe, "aura_flow")
    detach(pipe)
    assert drawn(pipe, "aura_flow").isfinite().all()


def test_offloading_that_was_set_up_since_is_refused_and_can_be_undone(artifact):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe = pipeline("aura_flow")
    attach(pipe, artifact("aura_flow"))
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(RequestError, match="its forward was replaced or compiled since"):
        drawn(pipe, "aura_flow")
    with pytest.raises(RequestError, match=r"pipeline.remove_all_hooks\(\)"):
        detach(pipe)
    remove_hook_from_module(pipe.transformer)
    drawn(pipe, "aura_flow")
    detach(pipe)


def test_weights_without_numbers_are_refused(artifact):
    pipe = pipeline("aura_flow")
    pipe.transformer.proj_out.to("meta")
    with pytest.raises(RequestError, match=r"transformer: its weight proj_out\.\w+ holds no numbers"):
        attach(pipe, artifact("aura_flow"))


def test_looking_for_changes_copies_no_weight():
    """In the layouts that models have; a look at each call must not cost what the call saves."""
    layer = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    samples = stored_samples(layer.weight)
    assert samples.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    before = DenoiserSnapshot(weight_states(layer), {}, {})
    layer.weight.data[-1, -1, 0, 0] += 1  # not among the samples, and not counted
    assert weight_states(layer) == before.weights
    layer.weight.data += 1
    assert weight_states(layer) != before.weights


def test_two_are_not_attached_at_once(artifact):
    pipe = pipeline("aura_flow")
    with attach(pipe, artifact("aura_flow")), pytest.raises(RequestError, match="is attached to it already; detach"):
        attach(pipe, artifact("aura_flow"))


def test_other_artifacts_are_refused(artifact):
    made = artifact("aura_flow")
    whole = replace(made, manifest=made.manifest.model_copy(update={"family": "flux"}))
    with pytest.raises(RequestError, match=r"holds all of AuraFlowPipeline; .*runtime.load"):
        attach(pipeline("aura_flow"), whole)
    failed = replace(made, manifest=made.manifest.model_copy(update={"status": "failed"}))
    with pytest.raises(ArtifactError, match="its verification failed"):
        attach(pipeline("aura_flow"), failed)


# --- refusals: calls ------------------------------------------------------------------------------------------------


def swapped_scheduler(pipe: Any) -> None:
    pipe.scheduler = copy.deepcopy(pipe.scheduler)


def direct(pipe: Any) -> None:
    pipe.transformer(torch.zeros(2, 4, 4, 4))


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 6}, "num_inference_steps=6: the artifact has the plans 4; export again"),
    "size": ({"height": 48}, r"argument 'hidden_states': expected float32 \[2, 4, 4, 4\] on cpu, got float32 \[2, 4, 6, 4\]"),
    "images": ({"num_images_per_prompt": 2}, r"expected float32 \[2, 4, 4, 4\] on cpu, got float32 \[4, 4, 4, 4\].*one image per prompt"),
    "prompts": ({"prompt": [PROMPT, PROMPT]}, r"expected float32 \[2, 4, 4, 4\] on cpu, got float32 \[4, 4, 4, 4\]"),
    "no guidance": ({"guidance_scale": 1.0}, r"argument 'hidden_states': expected float32 \[2, 4, 4, 4\]"),
    "text": ({"max_sequence_length": 12}, r"argument 'encoder_hidden_states': expected float32 \[2, 16, 32\]"),
    "schedule": ({"sigmas": [1.0, 0.9, 0.5, 0.2]}, "argument 'timestep': expected 0.773175 at this evaluation, got"),
    "constant": ({"attention_kwargs": {"scale": 2.0}}, "'attention_kwargs.scale' was not there at export"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_the_plan_lacks_is_refused_by_name(case, artifact):
    given, sentence = CALLS[case]
    pipe = pipeline("aura_flow")
    with attach(pipe, artifact("aura_flow")), pytest.raises(RequestError, match=sentence) as refused:
        drawn(pipe, "aura_flow", **given)
    assert "\n" not in str(refused.value)


def test_calls_of_the_denoiser_alone_are_refused(artifact):
    pipe = pipeline("aura_flow")
    with attach(pipe, artifact("aura_flow")):
        with pytest.raises(RequestError, match="called before the pipeline set a schedule"):
            direct(pipe)
        pipe.scheduler.set_timesteps(4)
        with pytest.raises(RequestError, match=r"DModel does not take this call .*'speed'"):
            pipe.transformer(torch.zeros(2, 4, 4, 4), speed=2)
        with pytest.raises(RequestError, match=r"'encoder_hidden_states': expected float32 .* got None"):
            pipe.transformer(torch.zeros(2, 4, 4, 4), return_dict=False)
        with pytest.raises(RequestError, match=r"'hidden_states': .*, got bfloat16 .*precision"):
            pipe.transformer(torch.zeros(2, 4, 4, 4, dtype=torch.bfloat16))
        drawn(pipe, "aura_flow")
        with pytest.raises(RequestError, match=r"ends after 4 evaluations, .* calls it once more"):
            direct(pipe)
        swapped_scheduler(pipe)
        with pytest.raises(RequestError, match="got another FlowMatchEulerDiscreteScheduler; detach"):
            drawn(pipe, "aura_flow")


def test_text_that_the_model_reads_in_python_is_held_to(artifact):
    """Lumina2 sums its mask in Python: another number of tokens is another graph."""
    pipe = pipeline("lumina2")
    sentence = r"'encoder_attention_mask': expected the values of the export .* as many tokens"
    with attach(pipe, artifact("lumina2")), pytest.raises(RequestError, match=sentence):
        drawn(pipe, "lumina2", LONGER_PROMPT)


# --- refusals: exports ----------------------------------------------------------------------------------------------


def test_a_loop_with_two_denoisers_is_not_exported(tmp_path):
    """Wan 2.2: from some timestep on the steps belong to another transformer."""
    pipe = pipeline("wan")
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.95)
    pipe.save_pretrained(tmp_path / "wan")
    with pytest.raises(ExportError, match="runs transformer_2 beside transformer in its loop"):
        uncompiled(recipe("wan", tmp_path / "wan"), tmp_path)


def test_arguments_that_the_pipeline_lacks_are_named(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"attach.arguments: .*takes no 'speed'; it takes prompt"):
        uncompiled(recipe("aura_flow", folder("aura_flow"), attach={"arguments": {"speed": 2}}), tmp_path)


def test_the_steps_that_are_asked_for_replace_the_models_own_and_not_the_recipes():
    from prebake.exporter.denoiser_alone.observation import pipeline_request

    pipe = pipeline("wan")
    asked = pipeline_request(pipe, PROMPT, {"num_inference_steps": 8, "height": 16}, {})(2, 0)
    assert (asked["num_inference_steps"], asked["height"]) == (2, 16)
    assert pipeline_request(pipe, PROMPT, {}, {"num_inference_steps": 3})(2, 0)["num_inference_steps"] == 3


def test_a_whole_pipeline_needs_a_family(folder, tmp_path):
    model = {"id": str(folder("aura_flow")), "part": "pipeline"}
    with pytest.raises(ExportError, match="AuraFlowPipeline"):
        uncompiled(recipe("aura_flow", folder("aura_flow"), model=model), tmp_path)


def test_recording_leaves_the_pipeline_as_it_was(folder):
    from prebake.exporter.denoiser_alone.observation import pipeline_request
    from prebake.exporter.denoiser_alone.recording import record_pipeline
    from support.attach_pipelines import CALLS as ARGUMENTS

    pipe = pipeline("wan")
    eager = drawn(pipe, "wan")
    recording = record_pipeline(pipe, pipeline_request(pipe, PROMPT, {}, ARGUMENTS["wan"]), (4, 3))
    assert torch.equal(drawn(pipe, "wan"), eager)
    assert not pipe.transformer._forward_hooks
    assert {a.name: a.role for a in recording.kinds[0].arguments if a.is_input} == {
        "hidden_states": "latents",
        "timestep": "step",
        "encoder_hidden_states": "fixed",
    }
    assert [len(calls) for calls in recording.schedules[3].calls] == [2, 2, 2]


# --- compiled -------------------------------------------------------------------------------------------------------


def exported(name: str, model: Path, output: Path, **tables: Any) -> Path:
    with open_progress("quiet") as quiet:
        return export(recipe(name, model, **tables), output, ExportOptions(), quiet)


@pytest.fixture(scope="module")
def compiled(folder, tmp_path_factory) -> Callable[[str], Path]:
    """AuraFlow's denoiser with a mask, or Sana's, or Wan's with a mask, compiled and verified in its pipeline."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            output = tmp_path_factory.mktemp("compiled") / name
            cache = {"method": "none"} if name == "sana" else MASK
            made[name] = exported(name, folder(name), output, cache=cache)
        return made[name]

    return of


SLOW = {"aura_flow": (), "sana": (pytest.mark.slow,), "wan": (pytest.mark.slow,)}


def compiled_params(ability: str, *names: str) -> list[Any]:
    return [pytest.param(n, marks=(*SLOW[n], pytest.mark.works(n, ability))) for n in names]


@pytest.mark.parametrize("name", compiled_params("compiled", *SLOW))
def test_compiled_latents_are_the_pipelines_own(name, compiled):
    pipe = pipeline(name)
    eager = drawn(pipe, name, OTHER_PROMPT)
    with attach(pipe, compiled(name), cache=False):
        assert same(drawn(pipe, name, OTHER_PROMPT), eager)


@pytest.mark.parametrize("name", compiled_params("caches", "aura_flow", "wan"))
def test_compiled_caches_are_the_eager_replay_of_the_plan(name, compiled, artifact):
    pipe = pipeline(name)
    with attach(pipe, artifact(name, cache=MASK)):
        eager = drawn(pipe, name)
    with attach(pipe, compiled(name)):
        ours = drawn(pipe, name)
    assert same(ours, eager)
    assert not same(ours, drawn(pipe, name))


def test_verify_replays_without_a_pipeline(compiled):
    with open_progress("quiet") as quiet:
        manifest, outcome = verify_artifact(compiled("aura_flow"), VerifyOptions(), quiet)
    assert manifest.status == "verified"
    assert not outcome.missed
    assert [len(g.evaluations) for g in outcome.golden] == [4, 4]
    assert all(g.bitwise for g in outcome.golden)


def test_verify_with_its_pipeline_writes_the_golden_vectors_that_it_lacks(compiled, folder, tmp_path):
    made = compiled("aura_flow")
    copied = shutil.copytree(made, tmp_path / "copied")
    shutil.rmtree(copied / "golden")
    manifest = read_manifest(copied)
    left = tuple(entry for entry in manifest.files if not entry.path.startswith("golden/"))
    changed = manifest.model_copy(update={"files": left, "status": "unverified"})
    (copied / "manifest.json").write_text(changed.to_json(), "utf-8")
    with open_progress("quiet") as quiet:
        settled, outcome = verify_artifact(
            copied, VerifyOptions(with_source=True, model=str(folder("aura_flow"))), quiet
        )
    assert not outcome.missed
    assert settled == read_manifest(copied) == manifest
    for plan in manifest.plans:
        assert (copied / golden_path(plan)).read_bytes() == (made / golden_path(plan)).read_bytes()


def test_golden_vectors_notice_another_denoiser(compiled):
    from prebake.exporter.verify.denoiser_alone import replay_attached_golden

    opened = open_artifact(compiled("aura_flow"))
    wrong = replace(opened, graphs={n: Off(g) for n, g in opened.graphs.items()})
    replayed = replay_attached_golden(wrong, opened.plans["4-uncached"])
    assert not replayed.bitwise
    assert min(replayed.evaluation_errors) == pytest.approx(1e-3, rel=0.01)  # what `Off` adds


def test_load_says_to_attach(compiled):
    with pytest.raises(RequestError, match=r"denoiser of AuraFlowPipeline alone; .*runtime.attach"):
        load(compiled("aura_flow"))


def test_plan_says_to_export_again(compiled):
    from prebake.exporter.add_plan import PlanOptions as PlanChoices
    from prebake.exporter.add_plan import add_plans
    from prebake.exporter.recipe.resolve import Recipe
    from prebake.runtime.manifest import read_manifest

    asked = Recipe.model_validate(read_manifest(compiled("aura_flow")).recipe)
    with open_progress("quiet") as quiet, pytest.raises(ExportError, match="follow its pipeline's own schedule"):
        add_plans(compiled("aura_flow"), asked, 5, PlanChoices(), quiet)


@pytest.mark.slow
def test_the_page_is_right(folder, tmp_path):
    """Every block of docs/how-to/attach.md, in its order, word for word."""
    text = (ROOT / "docs" / "how-to" / "attach.md").read_text("utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["toml", "sh", "python"]
    (_, toml), (_, command), (_, code) = blocks
    (tmp_path / "sana.toml").write_text(toml, "utf-8")
    (tmp_path / "sana").symlink_to(folder("sana"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    check = "\nimport numpy\nassert not numpy.array_equal(numpy.asarray(image), numpy.asarray(exact))\n"
    for line in (["bash", "-ec", command], [sys.executable, "-c", code + check]):
        subprocess.run(line, cwd=tmp_path, env=environment, check=True, timeout=600)
