"""A loaded pipeline is a model too: what is in it is exported, what could not be is refused, and it stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prebake.errors import ExportError, RequestError
from prebake.exporter.load.pipeline_copy import copy_pipeline
from prebake.exporter.load.source import load_model


class LoraLayer(nn.Module):
    """As PEFT's Linear: adapters beside a base layer, which `fuse_lora` adds to its weight."""

    def __init__(self, base_layer: nn.Linear, *, merged: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"style": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.active_adapters, self.merged_adapters = ["style"], ["style"] if merged else []
        self.disable_adapters = False


def with_lora(pipe, *, merged: bool) -> None:
    block = pipe.transformer.transformer_blocks[0].attn
    block.to_q = LoraLayer(block.to_q, merged=merged)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_copy_is_the_pipeline_and_the_pipeline_stays(tiny_pipe, tmp_path):
    tiny_pipe.transformer.proj_out.weight.data += 0.5
    parts, before = dict(tiny_pipe.components), weights(tiny_pipe.transformer)
    loaded = load_model(str(copy_pipeline(tiny_pipe, tmp_path / "FluxPipeline")), None, {"default": torch.float32})
    assert same(weights(loaded.pipe.transformer), before)
    assert same(weights(loaded.pipe.text_encoder_2), weights(tiny_pipe.text_encoder_2))
    assert (loaded.source.model, loaded.source.pipeline) == ("FluxPipeline", "FluxPipeline")
    assert all(tiny_pipe.components[name] is part for name, part in parts.items())
    assert same(weights(tiny_pipe.transformer), before)


def test_equal_pipelines_have_equal_fingerprints(tiny_pipe, tmp_path):
    def fingerprint(name: str) -> str:
        return load_model(str(copy_pipeline(tiny_pipe, tmp_path / name)), None, {}).source.sha256

    first = fingerprint("a")
    tiny_pipe.transformer.register_to_config(_name_or_path="/somewhere/else")
    assert fingerprint("b") == first
    tiny_pipe.transformer.proj_out.weight.data += 0.5  # the canary
    assert fingerprint("c") != first


def test_a_lora_that_is_fused_is_plain_weights(tiny_pipe, tmp_path):
    before = weights(tiny_pipe.transformer)
    with_lora(tiny_pipe, merged=True)
    loaded = load_model(str(copy_pipeline(tiny_pipe, tmp_path / "x")), None, {"default": torch.float32})
    assert same(weights(loaded.pipe.transformer), before)
    assert isinstance(tiny_pipe.transformer.transformer_blocks[0].attn.to_q, LoraLayer)


def test_a_lora_that_is_not_fused_is_refused(tiny_pipe, tmp_path):
    with_lora(tiny_pipe, merged=False)
    with pytest.raises(RequestError, match=r"blocks\.0\.attn\.to_q: .* pipe\.fuse_lora\(\)"):
        copy_pipeline(tiny_pipe, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_hooks_are_refused(tiny_pipe, tmp_path):
    tiny_pipe.transformer.register_forward_hook(lambda *_: None)
    with pytest.raises(ExportError, match="transformer carries torch forward hooks"):
        copy_pipeline(tiny_pipe, tmp_path / "x")


def test_weights_that_the_config_does_not_have_are_refused(tiny_pipe, tmp_path):
    nn.utils.parametrizations.weight_norm(tiny_pipe.transformer.proj_out)
    with pytest.raises(ExportError, match="has other weights than FluxTransformer2DModel of its config"):
        copy_pipeline(tiny_pipe, tmp_path / "x")


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(RequestError, match="expected a name, a path or a diffusers pipeline, got int"):
        copy_pipeline(7, tmp_path / "x")


def test_weights_without_numbers_are_refused_by_name(tiny_pipe, tmp_path):
    tiny_pipe.vae.decoder.conv_out.to("meta")
    with pytest.raises(ExportError, match=r"vae lacks decoder.conv_out.bias, decoder.conv_out.weight; "):
        copy_pipeline(tiny_pipe, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
