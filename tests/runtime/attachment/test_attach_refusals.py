"""What `attach` and an attached pipeline refuse by name: another pipeline, what was changed since, and calls that no plan is for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PyramidAttentionBroadcastConfig
from torch import nn

from prebake.runtime import ArtifactError, RequestError, attach, detach
from prebake.runtime.artifact import Artifact
from prebake.runtime.attachment.snapshot import DenoiserSnapshot, stored_samples, weight_states, weights_digest
from support.attach_pipelines import (
    LONGER_PROMPT,
    PROMPT,
    direct,
    drawn,
    pipeline,
)

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
