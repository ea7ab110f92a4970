"""int8 in text encoders and VAE: the same embeddings and pictures up to the rounding of weights, and no copy in full precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.denoiser_alone.part import DenoiserAlone
from prebake.exporter.families import flux
from prebake.exporter.lower import aoti, tensorrt, w8a8
from prebake.exporter.lower.int8_weights import Int8WeightConv2d, Int8WeightLinear, refuse_components
from prebake.exporter.package.folder import StoredWeights, write_weights
from prebake.exporter.package.manifest import unquantized_bytes
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite.quantize_components import quantize_text_encoders, quantize_vae
from prebake.exporter.sites.component import Component
from prebake.runtime.errors import ExportError, RecipeError

EAGER: Any = w8a8
"""Quantizes layers as a backend that multiplies by the operator itself."""
SIZE = flux.Size(32, 32, 16)
FLOAT32 = ("precision.denoiser=float32", "precision.text_encoders=float32", "precision.vae=float32")
ROUNDING = 0.03
"""Relative in L2. Rows of 32 normal numbers have a largest of about 2.1 deviations, so a step is 2.1 / 127.5 of one, and rounding to it
loses 0.5% of a weight; activations by token lose as much again. Four layers in a row and a norm make of that 1.3% (weights) and 2.2%
(both) of the states; seen are 0.013 and 0.022."""
TEXT_LAYERS = 2 * (4 + 2) + 2 * (4 + 3)  # CLIP's and T5's, two blocks each


def recipe(*overrides: str):
    return resolve("flux-fast", ("cache.method=none", "quantize.method=none", *FLOAT32, *overrides))


def component_of(pipe, name: str) -> Component:
    """A component of the pipeline, with ids or latents that are no zeros."""
    (c,) = (c for c in flux.other_components(pipe, SIZE, channels_last=True, picture=False) if c.name == name)
    seeded = torch.Generator().manual_seed(0)
    return replace(c, args=tuple(drawn_like(a, seeded) for a in c.args))


def drawn_like(example: torch.Tensor, seeded: torch.Generator) -> torch.Tensor:
    if example.dtype == torch.int64:
        return torch.randint(3, 60, example.shape, generator=seeded)
    return torch.randn(example.shape, generator=seeded)


@torch.no_grad()
def outputs(pipe, name: str) -> tuple[torch.Tensor, ...]:
    component = component_of(pipe, name)
    return component.module(*component.args)


def captured(pipe, name: str) -> CapturedGraph:
    c = component_of(pipe, name)
    return capture_graph(c.name, c.module, c.args, c.inputs, c.outputs)


def errors(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]


@pytest.mark.parametrize(("mode", "treatment"), [("int8_weight_only", "int8 weights"), ("int8_dynamic", "int8")])
def test_embeddings_are_those_of_float32_up_to_rounding(tiny_pipe, mode, treatment):
    before = outputs(tiny_pipe, "text_encoder")
    layers = quantize_text_encoders(tiny_pipe, recipe(f"quantize.text_encoders={mode}"), EAGER)
    assert len(layers) == TEXT_LAYERS
    assert {what for what, _ in layers.values()} == {treatment}
    assert layers["text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo"] == (treatment, "feed-forward, 64x32")
    after = errors(outputs(tiny_pipe, "text_encoder"), before)
    assert max(after) < ROUNDING
    assert min(after) > 1e-3  # the canary: both encoders are quantized
    spoil_scales(tiny_pipe.text_encoder_2)
    assert max(errors(outputs(tiny_pipe, "text_encoder"), before)) > 2 * ROUNDING


@torch.no_grad()
def spoil_scales(model: torch.nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith(".scale"):
            buffer *= 1.5


def test_the_vae_decodes_the_same_up_to_rounding(tiny_pipe):
    before = outputs(tiny_pipe, "vae_decoder")
    layers = quantize_vae(tiny_pipe, recipe("quantize.vae=int8_weight_only"))
    assert layers["vae.decoder.conv_in"] == layers["vae.decoder.conv_out"] == ("kept", "first or last convolution")
    assert layers["vae.decoder.mid_block.resnets.0.conv1"] == ("int8 weights", "convolution, 32x32")
    assert layers["vae.decoder.mid_block.attentions.0.to_q"] == ("int8 weights", "attention, 32x32")
    (error,) = errors(outputs(tiny_pipe, "vae_decoder"), before)
    assert 1e-4 < error < ROUNDING
    spoil_scales(tiny_pipe.vae)
    assert errors(outputs(tiny_pipe, "vae_decoder"), before)[0] > 2 * ROUNDING  # the canary


@pytest.mark.parametrize(("key", "component"), [("text_encoders", "text_encoder"), ("vae", "vae_decoder")])
def test_the_weights_that_are_stored_are_int8_and_the_originals_are_not(tiny_pipe, tmp_path, key, component):
    asked = recipe(f"quantize.{key}=int8_weight_only")
    original = stored_tensors(tmp_path / "before", captured(tiny_pipe, component))[0]
    _ = quantize_vae(tiny_pipe, asked) if key == "vae" else quantize_text_encoders(tiny_pipe, asked, EAGER)
    now, stored = stored_tensors(tmp_path / "after", captured(tiny_pipe, component))
    quantized = {name for name, tensor in now.items() if tensor.dtype == torch.int8}
    assert len(quantized) == {"text_encoders": TEXT_LAYERS, "vae": 18}[key]
    scales = {f"{name.removesuffix('weight')}scale" for name in quantized}
    assert now.keys() == original.keys() | scales  # no original beside, under another name
    for name in quantized:
        assert original[name].numel() == now[name].numel()
        assert original[name].nbytes == 4 * now[name].nbytes
    assert unquantized_bytes(asked, stored) == {component: sum(tensor.nbytes for tensor in original.values())}


def stored_tensors(folder: Path, graph: CapturedGraph) -> tuple[dict[str, torch.Tensor], StoredWeights]:
    """What the artifact's weight file holds of a graph."""
    folder.mkdir()
    stored = write_weights(folder, {graph.name: [graph]})
    return load_file(folder / f"weights/{graph.name}.safetensors"), stored


def test_layers_are_kept_by_name_and_what_fits_nothing_is_refused(tiny_pipe):
    only_t5 = recipe("quantize.text_encoders=int8_weight_only", r'quantize.text_encoders_exclude=["^text_encoder\\."]')
    layers = quantize_text_encoders(tiny_pipe, only_t5, EAGER)
    kept = {name for name, said in layers.items() if said == ("kept", "quantize.text_encoders_exclude")}
    assert kept == {name for name in layers if name.startswith("text_encoder.")} != set()
    assert not any(isinstance(m, Int8WeightLinear) for m in tiny_pipe.text_encoder.modules())
    assert any(isinstance(m, Int8WeightLinear) for m in tiny_pipe.text_encoder_2.modules())
    for key, quantized in (("text_encoders", quantize_text_encoders), ("vae", quantize_vae)):
        nothing = recipe(f"quantize.{key}=int8_weight_only", f'quantize.{key}_exclude=[""]')
        with pytest.raises(
            ExportError, match=rf"quantize\.{key} 'int8_weight_only' fits none .*set quantize\.{key}=none"
        ):
            quantized(tiny_pipe, nothing, *([EAGER] if key == "text_encoders" else []))
    assert not any(isinstance(m, Int8WeightConv2d) for m in tiny_pipe.vae.modules())


def test_a_layer_that_the_model_keeps_in_another_precision_is_kept(tiny_pipe):
    tiny_pipe.text_encoder_2.to(torch.bfloat16)
    layers = quantize_text_encoders(tiny_pipe, recipe("quantize.text_encoders=int8_weight_only"), EAGER)
    assert layers["text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"] == (
        "kept",
        "attention, in bfloat16 by the model's own wish",
    )


@pytest.mark.parametrize(
    "asked", ["text_encoders=int8_dynamic", "text_encoders=int8_weight_only", "vae=int8_weight_only"]
)
def test_who_cannot_refuses_it_by_name_before_anything_is_compiled(asked):
    key, _, mode = asked.partition("=")
    with pytest.raises(RecipeError, match=rf"quantize\.{key} '{mode}': .*set quantize\.{key}=none"):
        refuse_components(recipe(f"quantize.{asked}"), "no")
    with pytest.raises(RecipeError, match=rf"quantize\.{key} '{mode}'.*TensorRT"):
        tensorrt.adapt_recipe(recipe(f"quantize.{asked}", "compile.backend=tensorrt"))
    with pytest.raises(RecipeError, match=rf"quantize\.{key} '{mode}': the denoiser is exported alone"):
        DenoiserAlone.rewrite(None, recipe(f"quantize.{asked}"), EAGER, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match="lossless"):
        resolve("baseline", (f"quantize.{asked}",), "tiny:flux")


def test_int8_products_of_a_text_encoder_ask_for_their_instructions_and_rounded_weights_for_none(monkeypatch):
    monkeypatch.setattr(aoti, "int8_flags", lambda: ("told",))
    without = "compile.options.kernels=false"
    assert "told" in aoti.requires(recipe("quantize.text_encoders=int8_dynamic", without))["isa"]
    assert "told" not in aoti.requires(recipe("quantize.text_encoders=int8_weight_only", without))["isa"]


def test_another_method_for_the_denoiser_leaves_the_other_keys_of_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\ndescription = "mine"\n[model]\nid = "tiny:flux"\n[quantize]\nmethod = "int8_dynamic"\nmin_width_ratio = 0.5\n'
        'text_encoders = "int8_weight_only"\n'
    )
    changed = resolve(file, ("quantize.method=fp8_dynamic",)).quantize
    assert (changed.method, changed.min_width_ratio, changed.text_encoders) == ("fp8_dynamic", 1.0, "int8_weight_only")
