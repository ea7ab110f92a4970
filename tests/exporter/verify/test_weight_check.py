"""Stored weights against the model's, on tensors that are made up."""

from types import SimpleNamespace

import pytest
import torch

from prebake.exporter.verify.weight_check import judge_weights, weight_error

WEIGHT = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
SOURCE = {"denoiser.a.to_q.weight": WEIGHT[:20], "denoiser.a.to_k.weight": WEIGHT[20:], "vae_decoder.b": WEIGHT[0]}


def quantized(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def artifact(weights, graph="full", prefix="denoiser."):
    constants = {f"{prefix}{name}": f"kept.{name}" for name in weights}
    return SimpleNamespace(
        manifest=SimpleNamespace(graphs=[SimpleNamespace(name=graph, constants=constants)]),
        plans={"8": SimpleNamespace(variants=lambda: ("full",))},
        weights={f"kept.{name}": tensor for name, tensor in weights.items()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_error_and_what_is_more_is(dtype):
    stored = WEIGHT.to(dtype, copy=True)
    assert weight_error(stored, None, WEIGHT) <= 1
    stored[3, 5] *= 1.02
    assert weight_error(stored, None, WEIGHT) > 1


def test_eight_bits_are_held_to_half_a_code():
    codes, scale = quantized(WEIGHT)
    assert 0.5 < weight_error(codes, scale, WEIGHT) <= 1
    assert weight_error(codes, 1.02 * scale, WEIGHT) > 1
    codes[1, 1] += 2
    assert weight_error(codes, scale, WEIGHT) > 1


def test_what_is_no_number_is_an_error():
    stored = WEIGHT.clone()
    stored[0, 0] = torch.nan
    verdicts, _ = judge_weights(artifact({"a.to_kv.weight": stored, "a.to_q.weight": stored[:20]}), SOURCE)
    assert not verdicts[0].passed


def test_a_fused_projection_is_its_parts():
    source = {**SOURCE, "denoiser.a.to_v.weight": WEIGHT[:20]}
    fused = torch.cat((WEIGHT, WEIGHT[:20]))
    codes, scale = quantized(fused)
    names = "a.to_qkv.parametrizations.weight.original0", "a.to_qkv.parametrizations.weight.original1"
    for weights in ({"a.to_qkv.weight": fused.bfloat16()}, dict(zip(names, (codes, scale), strict=True))):
        (verdict,), gaps = judge_weights(artifact(weights), source)
        assert (verdict.passed, verdict.figure, gaps) == (True, "weight_error", ())
    swapped = torch.cat((WEIGHT[20:], WEIGHT[:20], WEIGHT[:20]))
    assert not judge_weights(artifact({"a.to_qkv.weight": swapped}), source)[0][0].passed


def test_what_the_model_has_not_is_named():
    weights = {"b": WEIGHT[0], "folded_0": WEIGHT, "folded_1": WEIGHT}
    (verdict,), gaps = judge_weights(artifact(weights, "vae_decoder", ""), SOURCE)
    assert verdict.passed
    assert verdict.sentence.startswith("weight_error is ")
    assert gaps == (
        "2 of 3 weights were not held against the model's, which has none of the name: kept.folded_0, kept.folded_1",
    )
