"""Sites: each action does what it says on an unchanged model, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from prebake.exporter.families import flux
from prebake.exporter.sites.actions import VariantModule, submodule
from prebake.exporter.sites.marks import Mark, Variant
from prebake.runtime.errors import ExportError
from support.known_layouts import layout_of

SIZE = flux.Size(32, 32, 8)


@pytest.fixture
def denoiser(tiny_pipe):
    return flux.denoiser(tiny_pipe, SIZE)


@pytest.fixture
def attentions(tiny_pipe) -> tuple[Mark, ...]:
    return tuple(a.mark() for a in layout_of(flux.denoiser(tiny_pipe, SIZE)).attentions)


def blocks(tiny_pipe, chosen: slice, slots: int = 1) -> Mark:
    layout = layout_of(flux.denoiser(tiny_pipe, SIZE))
    return layout.residual("", chosen.start, chosen.stop, "blocks", slots=slots)


def variant_of(denoiser, marks, action) -> VariantModule:
    return VariantModule(denoiser.module, marks, Variant("v", tuple((m.name, action) for m in marks)), denoiser.inputs)


@torch.no_grad()
def outputs(module: VariantModule, *args) -> dict[str, torch.Tensor]:
    return dict(zip(module.outputs, module(*args), strict=True))


def test_compute_returns_the_plain_sample_and_the_fresh_values(denoiser, attentions):
    plain = denoiser.module(*denoiser.args)
    got = outputs(variant_of(denoiser, attentions, "compute"), *denoiser.args)
    assert torch.equal(got["sample"], plain)
    assert got["transformer_blocks.0.attn:0"].shape == (1, 64, 64)  # image tokens
    assert got["transformer_blocks.0.attn:1"].shape == (1, 8, 64)  # text tokens
    assert got["single_transformer_blocks.1.attn:0"].shape == (1, 72, 64)


def test_combining_the_values_of_the_same_step_changes_nothing(denoiser, attentions):
    computed = outputs(variant_of(denoiser, attentions, "compute"), *denoiser.args)
    module = variant_of(denoiser, attentions, "combine")
    slots = [computed[name.partition("@")[0]] for name in module.inputs[len(denoiser.inputs) + 1 :]]
    got = outputs(module, *denoiser.args, torch.ones(1, module.coefficients), *slots)
    assert torch.equal(got["sample"], computed["sample"])


def test_coefficients_scale_what_is_combined(denoiser, attentions):
    module = variant_of(denoiser, attentions, "combine")
    zero = variant_of(denoiser, attentions, "zero")
    examples = module.examples(denoiser.args)
    nothing = (*denoiser.args, torch.zeros(1, module.coefficients), *examples[len(denoiser.args) + 1 :])
    assert torch.equal(outputs(module, *nothing)["sample"], outputs(zero, *denoiser.args)["sample"])
    assert not torch.equal(outputs(module, *examples)["sample"], outputs(zero, *denoiser.args)["sample"])


def test_a_residual_of_two_slots_extrapolates_linearly(denoiser, tiny_pipe):
    mark = blocks(tiny_pipe, slice(0, 3), slots=2)
    fresh = outputs(variant_of(denoiser, (mark,), "compute"), *denoiser.args)
    module = variant_of(denoiser, (mark,), "combine")
    older = {name: value / 2 for name, value in fresh.items() if name != "sample"}
    slots = [
        (fresh if name.endswith("@0") else older)[name.partition("@")[0]]
        for name in module.inputs[len(denoiser.inputs) + 1 :]
    ]
    # 2 fresh - older = 1.5 fresh, and the order of the weights matters
    ahead = outputs(module, *denoiser.args, torch.tensor([[2.0, -1.0]]), *slots)["sample"]
    back = outputs(module, *denoiser.args, torch.tensor([[-1.0, 2.0]]), *slots)["sample"]
    assert not torch.allclose(ahead, back, atol=1e-3)
    moved = [fresh[name.partition("@")[0]] * 1.5 for name in module.inputs[len(denoiser.inputs) + 1 :]]
    same = outputs(module, *denoiser.args, torch.tensor([[1.0, 0.0]]), *moved)["sample"]
    assert torch.allclose(ahead, same, atol=1e-5)  # one float32 sum in another order


def test_identity_passes_the_input_of_a_block_range_on(denoiser, tiny_pipe):
    mark = blocks(tiny_pipe, slice(1, 3))
    got = outputs(variant_of(denoiser, (mark,), "identity"), *denoiser.args)["sample"]
    tiny_pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()
    with torch.no_grad():
        assert torch.equal(got, denoiser.module(*denoiser.args))


def test_identity_of_an_attention_returns_its_input(denoiser, attentions):
    seen = {}
    attention = denoiser.module.get_submodule(attentions[0].modules[0])
    handle = attention.register_forward_hook(lambda m, a, k, o: seen.update(k), with_kwargs=True)
    denoiser.module(*denoiser.args)
    handle.remove()
    replaced = {}
    follow = denoiser.module.transformer.transformer_blocks[0].register_forward_hook(
        lambda m, a, o: replaced.update(out=o)
    )
    outputs(variant_of(denoiser, attentions[:1], "identity"), *denoiser.args)
    follow.remove()
    assert seen["hidden_states"].shape == replaced["out"][1].shape
    assert not torch.equal(replaced["out"][1], seen["hidden_states"])


def test_no_hook_stays_behind_also_after_an_error(denoiser, attentions):
    module = variant_of(denoiser, attentions, "combine")
    with pytest.raises(ValueError, match="zip"):
        module(*denoiser.args)  # slots missing
    outputs(variant_of(denoiser, attentions, "compute"), *denoiser.args)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.module.modules())


def test_an_unknown_site_is_refused_with_those_that_exist(denoiser):
    with pytest.raises(
        ExportError,
        match=r"transformer_blocks\.30' is not .*transformer_blocks\.0",
    ):
        submodule(denoiser.module, "transformer.transformer_blocks.30")


def test_times_stay_float32_in_a_bfloat16_denoiser(tiny_pipe):
    exact = flux.denoiser(tiny_pipe, SIZE)
    args = (*exact.args[:3], torch.tensor([0.9773]), torch.tensor([3.5]))
    with torch.no_grad():
        truth = exact.module(*args)
        tiny_pipe.transformer.to(torch.bfloat16)
        ours = flux.denoiser(tiny_pipe, SIZE).module(*args)
        named = dict(zip(exact.inputs, args, strict=True))
        ids = {"img_ids": exact.module.image_ids, "txt_ids": exact.module.text_ids}
        floats = {n: t.bfloat16() for n, t in named.items() if n not in ("timestep", "guidance")}
        theirs = tiny_pipe.transformer(**{**named, **floats}, **ids, return_dict=False)[0]
    error, their_error = ((x.float() - truth).norm() / truth.norm() for x in (ours, theirs))
    assert error < 0.01  # bfloat16's 2**-8 through three blocks
    assert their_error > 1.5 * error  # diffusers rounds 3500 to 3504 and 977.3 to 976 before taking sines


@pytest.mark.parametrize("residual", [False, True])
def test_a_site_that_is_passed_runs_and_stores_nothing(denoiser, tiny_pipe, attentions, residual):
    marks = (blocks(tiny_pipe, slice(1, 3)),) if residual else attentions
    module = variant_of(denoiser, marks, "pass")
    assert module.outputs == ("sample",)
    with torch.no_grad():
        assert torch.equal(outputs(module, *denoiser.args)["sample"], denoiser.module(*denoiser.args))
