"""LoRAs of a recipe: what is added to which weights, from every layout of a file, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prebake.exporter.load import lora as loras
from prebake.exporter.load.source import load_model
from prebake.exporter.load.weight_files import hash_file
from prebake.exporter.package.manifest import artifact_recipe
from prebake.exporter.pipeline import prepare
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import Recipe, resolve, to_toml
from prebake.exporter.settle import load_pipeline
from prebake.exporter.verify.source_pipeline import load_source_pipeline
from prebake.runtime.errors import ExportError, RecipeError, ResourceError
from support.lora_files import layer_names, write_kohya_lora, write_lora

FLOAT32 = {"default": torch.float32}
RECIPES = {"flux": "flux-fast", "sd": "sd-fast", "sdxl": "sdxl-fast", "sd3": "sd3-fast"}
LAYERS = {
    "flux": {"transformer": ("attn.to_q", "attn.to_out.0", "proj_out")},
    "sd": {"unet": ("attn1.to_q", "attn2.to_v", "ff.net.2"), "text_encoder": ("q_proj", "fc1")},
    "sdxl": {"unet": ("attn2.to_k",), "text_encoder": ("v_proj",), "text_encoder_2": ("q_proj",)},
    "sd3": {"transformer": ("attn.to_k", "attn.add_q_proj")},
}
CLOSE = 1e-6
"""On weights of about 0.1: one float32 product and sum, made in another order."""


def plain(family: str) -> Any:
    return load_model(f"tiny:{family}", None, FLOAT32).pipe


def chosen_layers(pipe: Any, family: str) -> dict[str, list[str]]:
    return {c: layer_names(getattr(pipe, c), ends) for c, ends in LAYERS[family].items()}


def with_loras(family: str, given: Sequence[object], *overrides: str) -> Recipe:
    override = {"model.lora": list(given)}
    pairs = dict(o.split("=", 1) for o in overrides)
    return resolve(RECIPES[family], override | pairs, f"tiny:{family}")


def fused(family: str, given: Sequence[object]) -> Any:
    return load_pipeline(with_loras(family, given), FLOAT32).pipe


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {f"{name}.{key}": t for name, c in modules.items() for key, t in c.state_dict().items()}


def assert_added(pipe: Any, base: Any, updates: dict[str, torch.Tensor]) -> None:
    """Those weights have changed by that, and no other weight has."""
    before, after = weights(base), weights(pipe)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        update = updates.get(name.removesuffix(".weight"))
        if update is None:
            assert torch.equal(after[name], tensor), name
        else:
            torch.testing.assert_close(after[name], tensor + update, rtol=0, atol=CLOSE)
            assert (after[name] - tensor).abs().max() > 1e-2  # the canary


@pytest.mark.parametrize("family", LAYERS)
def test_the_product_is_added_to_each_layer_and_to_no_other(family, tmp_path):
    base = plain(family)
    layers = chosen_layers(base, family)
    assert all(layers.values())
    updates = write_lora(tmp_path / "style.safetensors", base, layers)
    assert_added(fused(family, [f"{tmp_path / 'style.safetensors'}"]), base, updates)


def test_several_are_added_with_a_scale_each(tmp_path):
    base = plain("sd")
    layers = chosen_layers(base, "sd")
    first = write_lora(tmp_path / "first.safetensors", base, layers)
    second = write_lora(tmp_path / "second.safetensors", base, {"unet": layers["unet"][:2]}, rank=2, seed=7)
    pipe = fused(
        "sd", [f"{tmp_path / 'first.safetensors'}:0.5", {"path": str(tmp_path / "second.safetensors"), "scale": -2.0}]
    )
    updates = {name: 0.5 * u - 2.0 * second.get(name, torch.zeros(())) for name, u in first.items()}
    assert_added(pipe, base, updates)


def test_kohyas_layout_and_its_alpha(tmp_path):
    base = plain("sd")
    updates = write_kohya_lora(
        tmp_path / "kohya.safetensors", base, layer_names(base.unet, ("attn1.to_q", "attn2.to_out.0"))
    )
    assert_added(fused("sd", [str(tmp_path / "kohya.safetensors")]), base, updates)


def test_a_small_update_outlives_the_cast(tmp_path):
    """A sum in float32 rounds to bfloat16 once. Weights that were rounded before lose an update that is smaller than their step."""
    base = plain("flux")
    layers = chosen_layers(base, "flux")
    updates = write_lora(tmp_path / "small.safetensors", base, layers, size=2e-4)
    recipe = with_loras("flux", [str(tmp_path / "small.safetensors")])
    pipe = load_pipeline(recipe, {**FLOAT32, "transformer": torch.bfloat16}).pipe
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    for name, update in updates.items():
        path = name.removeprefix("transformer.")
        weight, ours = (p.transformer.get_submodule(path).weight for p in (base, pipe))
        late = weight.bfloat16() + update.bfloat16()
        assert torch.equal(ours, (weight + update).bfloat16()), name
        assert share_of(update, ours.float() - weight) == pytest.approx(1, abs=0.2)
        assert abs(share_of(update, late.float() - weight) - 1) > 0.5  # the canary


def share_of(update: torch.Tensor, change: torch.Tensor) -> float:
    """How much of an update is in a change: rounding errors, which have no direction, average out."""
    return float((change * update).sum() / (update * update).sum())


def test_a_folder_with_one_file_and_one_beside_the_model(tmp_path, tiny_sd_folder, monkeypatch):
    base = load_model(str(tiny_sd_folder), None, FLOAT32).pipe
    (tmp_path / "one").mkdir()
    write_lora(tmp_path / "one" / "a.safetensors", base, {"unet": layer_names(base.unet, ("attn1.to_q",))})
    asked = with_loras("sd", [str(tmp_path / "one")]).model.lora[0]
    assert loras.find_lora(asked, "tiny:sd").name == "a.safetensors"
    (tmp_path / "one" / "b.safetensors").write_bytes((tmp_path / "one" / "a.safetensors").read_bytes())
    with pytest.raises(ExportError, match=r"a\.safetensors, b\.safetensors; name it with weight_name"):
        loras.find_lora(asked, "tiny:sd")
    named = asked.model_copy(update={"weight_name": "b.safetensors"})
    assert loras.find_lora(named, "tiny:sd").name == "b.safetensors"
    with pytest.raises(ExportError, match=r"no file 'c\.safetensors'"):
        loras.find_lora(asked.model_copy(update={"weight_name": "c.safetensors"}), "tiny:sd")
    beside = asked.model_copy(update={"path": "a.safetensors"})
    (tmp_path / "one" / "model").mkdir()
    assert loras.find_lora(beside, str(tmp_path / "one" / "model")).samefile(tmp_path / "one" / "a.safetensors")
    with pytest.raises(ExportError, match=r"expected a \.safetensors file"):
        loras.find_lora(beside, "tiny:sd")


REFUSALS = {
    "another model's": ({"transformer.nowhere.attn.to_q.lora_A.weight": (4, 64), "transformer.nowhere.attn.to_q.lora_B.weight": (64, 4)}, "nowhere.attn.to_q"),
    "other widths": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 7), "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (9, 4)}, "cannot add it"),
    "no LoRA": ({"weight": (4, 4)}, "cannot add it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(name, tmp_path):
    shapes, said = REFUSALS[name]
    file = tmp_path / "strange.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(ExportError) as refused:
        fused("flux", [str(file)])
    assert said in str(refused.value)
    assert "give a LoRA of this kind of model" in str(refused.value)


def test_one_key_that_no_module_takes_is_named(tmp_path):
    """diffusers passes it over with a line in its log."""
    base, file = plain("flux"), tmp_path / "style.safetensors"
    write_lora(file, base, chosen_layers(base, "flux"))
    more = {f"transformer.transformer_blocks.99.attn.to_q.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    save_file({**load_file(file), **more}, file)
    with pytest.raises(ExportError, match=r"transformer_blocks\.99\.attn\.to_q"):
        fused("flux", [str(file)])


def test_a_file_that_is_cut(tmp_path):
    base, file = plain("flux"), tmp_path / "style.safetensors"
    write_lora(file, base, chosen_layers(base, "flux"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cannot add it"):
        fused("flux", [str(file)])


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch, declared_extras):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else there(name))
    with pytest.raises(ResourceError, match=r"pip install 'prebake\[lora\]'"):
        fused("flux", [str(tmp_path / "any.safetensors")])


def test_a_recipe_writes_them_back(tmp_path):
    recipe = with_loras("flux", ["style.safetensors:0.8", {"path": "owner/name", "weight_name": "x.safetensors"}])
    assert [(one.path, one.scale) for one in recipe.model.lora] == [("style.safetensors", 0.8), ("owner/name", 1.0)]
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(recipe))
    assert resolve(file).model.lora == recipe.model.lora


@pytest.mark.parametrize("given", [{"scale": 1.0}, {"path": "x", "strength": 1.0}, {"path": "x", "scale": "much"}, 3])
def test_a_recipe_names_the_key(given):
    with pytest.raises(RecipeError, match=r"lora"):
        with_loras("flux", [given])


def test_the_manifest_says_what_was_added_and_the_source_is_held_to_it(tmp_path, monkeypatch):
    base, file = plain("flux"), tmp_path / "style.safetensors"
    write_lora(file, base, chosen_layers(base, "flux"))
    with open_progress("quiet") as quiet:
        prepared = prepare(with_loras("flux", [f"{file}:0.5"]), quiet)
    (said,) = prepared.source.loras
    assert (said.name, said.scale, said.sha256) == ("style.safetensors", 0.5, hash_file(file))
    recipe = artifact_recipe(prepared)
    assert [(one.path, one.scale) for one in recipe.model.lora] == [("style.safetensors", 0.5)]  # no path of this disk

    class Said:
        source = prepared.source

    with pytest.raises(ExportError, match=r"expected a \.safetensors file"):
        load_source_pipeline(Said, recipe, "tiny:flux", torch.float32)  # pyright: ignore[reportArgumentType]
    monkeypatch.chdir(tmp_path)
    assert load_source_pipeline(Said, recipe, "tiny:flux", torch.float32).source == prepared.source  # pyright: ignore[reportArgumentType]
    write_lora(Path("style.safetensors"), base, chosen_layers(base, "flux"), seed=5)
    with pytest.raises(RecipeError, match="sha256"):
        load_source_pipeline(Said, recipe, "tiny:flux", torch.float32)  # pyright: ignore[reportArgumentType]
