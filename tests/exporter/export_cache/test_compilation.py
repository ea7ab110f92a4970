"""The export cache, field by field of a recipe: each is in the key of some graph, or in nothing that is compiled.

A backend compiles graphs with the `compile` table and sees nothing else of a recipe. So a field can change what is compiled in
two ways only: as part of that table, all of which is in the key (`test_fingerprint.py`), or by way of the captured graphs.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prebake.exporter.export_cache.compilation import COMPILED, FROM_CACHE
from prebake.exporter.export_cache.fingerprint import describe_toolchain, graph_fingerprint
from prebake.exporter.export_cache.store import Store
from prebake.exporter.load.source import tiny_folder
from prebake.exporter.lower import CodeFiles, load_backend
from prebake.exporter.passes.captured_graph import run_passes
from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.prepared_export import PreparedExport
from prebake.exporter.progress import Progress, open_progress
from prebake.exporter.recipe.resolve import Recipe, resolve, shared_keys
from prebake.exporter.recipe.schema import Compile, VerifyReference, table_names, table_types
from prebake.exporter.tiny import save_tiny_pipeline
from prebake.runtime.manifest import read_manifest
from support.captured_pipeline import prepared

PLAIN = (
    "precision.denoiser=float32",
    "precision.text_encoders=float32",
    "precision.vae=float32",
    "quantize.method=none",
    "cache.method=none",
)
ORT = ("compile.backend=onnxruntime",)
INT8 = ("quantize.method=int8_dynamic",)
INT8_TEXT, INT8_VAE = ("quantize.text_encoders=int8_weight_only",), ("quantize.vae=int8_weight_only",)
FP8 = ("quantize.method=fp8_dynamic", "compile.backend=tensorrt")
VIDEO = ("fuse.vae_qkv=false", "compile.channels_last_vae=false")
ALONE = ("model.part=denoiser",)
CACHED = ("verify.cached_psnr_db=20", "sampler.steps=6")

COMPILE = {f"compile.{key}" for key in Compile.model_fields}
"""In the key as they are."""

ON_A_GPU = {"attention.backend"}
"""Of one value only on the CPU; see test_cuda_attention.py."""

GRAPHS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "model.id": ("flux", (), "model.id=tiny:flux-schnell"),
    "model.part": ("flux", (), "model.part=denoiser"),
    "precision.denoiser": ("flux", (), "precision.denoiser=bfloat16"),
    "precision.text_encoders": ("flux", (), "precision.text_encoders=bfloat16"),
    "precision.vae": ("flux", (), "precision.vae=bfloat16"),
    "attention.dtype": ("flux", (), "attention.dtype=bfloat16"),
    "fuse.qkv": ("flux", (), "fuse.qkv=false"),
    "fuse.vae_qkv": ("flux", (), "fuse.vae_qkv=false"),
    "quantize.method": ("flux", (), "quantize.method=int8_dynamic"),
    "quantize.text_encoders": ("flux", (), "quantize.text_encoders=int8_weight_only"),
    "quantize.text_encoders_exclude": ("flux", INT8_TEXT, 'quantize.text_encoders_exclude=["SelfAttention"]'),
    "quantize.vae": ("flux", (), "quantize.vae=int8_weight_only"),
    "quantize.vae_exclude": ("flux", INT8_VAE, 'quantize.vae_exclude=["attentions"]'),
    "quantize[int8_dynamic].min_width_ratio": ("sd", INT8, "quantize.min_width_ratio=2.0"),
    "quantize[int8_dynamic].convolutions": ("sd", INT8, "quantize.convolutions=true"),
    "quantize[int8_dynamic].include": ("flux", INT8, 'quantize.include=["to_out"]'),
    "quantize[int8_dynamic].exclude": ("flux", INT8, 'quantize.exclude=["to_out"]'),
    "quantize[fp8_dynamic].min_width_ratio": ("sd", FP8, "quantize.min_width_ratio=2.0"),
    "quantize[fp8_dynamic].include": ("flux", FP8, 'quantize.include=["to_out"]'),
    "quantize[fp8_dynamic].exclude": ("flux", FP8, 'quantize.exclude=["to_out"]'),
    "cache.method": ("flux", CACHED, "cache.method=pab"),
    "sampler.image_to_image": ("flux", (), "sampler.image_to_image=true"),
    "guidance.true_cfg": ("flux", (), "guidance.true_cfg=true"),
    "guidance.branches": ("flux", ("guidance.true_cfg=true",), "guidance.branches=batched"),
    "shapes.height": ("flux", (), "shapes.height=64"),
    "shapes.width": ("flux", (), "shapes.width=64"),
    "shapes.sizes": ("flux", (), 'shapes.sizes=["64x64","32x64"]'),
    "shapes.max_sequence_length": ("flux", (), "shapes.max_sequence_length=8"),
    "shapes.num_frames": ("cogvideox", VIDEO, "shapes.num_frames=17"),
    "attach.arguments": ("flux", ALONE, "attach.arguments.max_sequence_length=8"),
}
"""Field -> tiny model, what is set before, and a value that some graph shows."""

NEUTRAL: dict[str, Any] = {
    "name": "another",
    "description": "another",
    "lossless": True,
    "model.revision": "another",
    "sampler.steps": (5, 3),
    "sampler.scheduler": "FlowMatchLCMScheduler",
    "sampler.guidance_scale": 7.0,
    "shapes.batch": (1, 2),  # on a CPU, which has no graphs for batches
    "verify.budget": "full",
    "verify.reference": VerifyReference(device="cpu"),
    "verify.picture_error": 9.0,
    "verify.worst_picture_error": 9.0,
    "verify.evaluation_error": 9.0,
    "verify.worst_evaluation_error": 19.0,
    "verify.worst_cached_psnr_db": 1.0,
    "verify.cache_gate": "always",
    "verify.cached_psnr_db": 1.0,
    "verify.prompt_accuracy_drop": 3.0,
    "verify.accuracy_prompts": 1,
    "verify.prompts": ("another",),
    "verify.seeds": 1,
}
"""Field -> a value that no graph shows: plans, thresholds and names."""

ELSEWHERE = {"model.config", "model.lora", "model.textual_inversion"}
"""Say where files are read from, and what they hold is in the graphs; see `test_weights_count_and_not_where_they_lie`."""

VARIANTS = {
    "auto": "calibration budget candidates slots max_variants beam search_budget fit_runs judge_runs otherwise",
    "dbcache": "calibration quorum Fn_compute_blocks Bn_compute_blocks residual_diff_threshold "
    "max_accumulated_residual_diff_threshold max_warmup_steps warmup_interval max_cached_steps max_continuous_cached_steps "
    "enable_separate_cfg cfg_compute_first cfg_diff_compute_separate num_inference_steps steps_computation_mask "
    "steps_computation_policy force_refresh_step_hint force_refresh_step_policy calibrator_type calibrator_cache_type "
    "taylorseer_order",
    "deepcache": "cache_interval cache_branch_id numbering skip_mode pow center",
    "fastercache": "spatial_attention_block_skip_range temporal_attention_block_skip_range "
    "spatial_attention_timestep_skip_range temporal_attention_timestep_skip_range "
    "low_frequency_weight_update_timestep_range high_frequency_weight_update_timestep_range alpha_low_frequency "
    "alpha_high_frequency unconditional_batch_skip_range unconditional_batch_timestep_skip_range "
    "spatial_attention_block_identifiers temporal_attention_block_identifiers attention_weight low_frequency_weight "
    "high_frequency_weight tensor_format is_guidance_distilled",
    "firstblock": "calibration quorum threshold",
    "fora": "interval start_step",
    "layer_skip": "indices fqn skip_attention skip_attention_scores skip_ff dropout start stop branch",
    "magcache": "calibration threshold max_skip_steps retention_ratio num_inference_steps mag_ratios",
    "mask": "mask order site blocks",
    "pab": "spatial_attention_block_skip_range temporal_attention_block_skip_range cross_attention_block_skip_range "
    "spatial_attention_timestep_skip_range temporal_attention_timestep_skip_range cross_attention_timestep_skip_range "
    "spatial_attention_block_identifiers temporal_attention_block_identifiers cross_attention_block_identifiers",
    "smoothcache": "calibration calibration_lookahead calibration_threshold components_to_wrap per_block schedule_length",
    "taylorseer": "cache_interval disable_cache_before_step disable_cache_after_step max_order taylor_factors_dtype "
    "skip_predict_identifiers cache_identifiers use_lite_mode",
    "teacache": "calibration quorum rel_l1_thresh coefficients signal module ret_steps cutoff",
}
"""Of each cache: which variants there are, and at which steps. A variant is a graph of its own, whatever asked for it."""


def fields() -> set[str]:
    """Every field of a recipe: `table.key`, and `table[method].key` where a table has several types that do not share it."""
    found = set(Recipe.model_fields) - set(table_names())
    for table in table_names():
        types = table_types(table)
        for method, cls in types.items():
            keys = set(cls.model_fields)
            if len(types) > 1:
                shared = shared_keys(table) | {"method"}
                found |= {f"{table}[{method}].{key}" for key in keys - shared} | {f"{table}.{key}" for key in shared}
            else:
                found |= {f"{table}.{key}" for key in keys}
    return found


def decided() -> list[str]:
    of_caches = [f"cache[{method}].{key}" for method, keys in VARIANTS.items() for key in keys.split()]
    return [*COMPILE, *ON_A_GPU, *GRAPHS, *NEUTRAL, *ELSEWHERE, *of_caches]


def test_every_field_of_a_recipe_is_decided():
    """A new one fails here, until its row says how it reaches the compiler or that it does not."""
    assert sorted(decided()) == sorted(fields())


def keys(prepared: PreparedExport) -> dict[str, str | None]:
    """Graph -> its fingerprint."""
    backend, tools = prepared.backend, describe_toolchain(prepared.recipe, prepared.backend)
    graphs = [g for group in prepared.graphs.values() for g in group]
    passes = backend.list_passes(prepared.recipe.compile)
    return {g.name: graph_fingerprint(run_passes(g, passes), tools, {}) for g in graphs}


@functools.cache
def keys_of(model: str, *overrides: str) -> Mapping[str, str | None]:
    return keys(prepared(recipe(model, *overrides)))


def recipe(model: str, *overrides: str) -> Recipe:
    named = [override for override in overrides if override.startswith("model.id=")]
    return resolve("flux-fast", (*PLAIN, *overrides), None if named else f"tiny:{model}")


@pytest.mark.parametrize(
    "field", [pytest.param(field, marks=() if field == "quantize.method" else pytest.mark.slow) for field in GRAPHS]
)
def test_what_a_graph_shows_is_in_its_key(field):
    model, before, change = GRAPHS[field]
    first, second = keys_of(model, *before), keys_of(model, *before, change)
    assert None not in {*first.values(), *second.values()}
    assert first != second


def changed() -> Recipe:
    """With every neutral field at another value."""
    data = recipe("flux", *ORT).model_dump()
    for field, value in NEUTRAL.items():
        table, _, key = field.rpartition(".")
        owner = data[table] if table else data
        assert owner[key] != value, field
        owner[key] = value
    return Recipe.model_validate(data)


def files(prepared: PreparedExport, folder: Path) -> dict[str, CodeFiles]:
    """Graph -> what it is compiled into, without any cache."""
    kept: dict[str, CodeFiles] = {}

    def made(component: str, graph: Any, compiled: Any) -> CodeFiles:
        kept[graph.name] = compiled(graph)
        return kept[graph.name]

    config = prepared.recipe.compile
    lowering = load_backend(config.backend)
    passes = lowering.list_passes(config)
    graphs = {name: tuple(run_passes(g, passes) for g in group) for name, group in prepared.graphs.items()}
    folder.mkdir(exist_ok=True)
    lowering.lower(folder, graphs, config, made)
    return kept


@pytest.mark.parametrize("compiler", ["onnxruntime", pytest.param("aoti", marks=pytest.mark.slow)])
def test_plans_thresholds_and_names_change_no_key_and_no_byte(compiler, tmp_path):
    first, second = prepared(recipe("flux", f"compile.backend={compiler}")), changed()
    second = second.model_copy(update={"compile": first.recipe.compile})
    second = prepared(second)
    assert second.planned.plans != first.planned.plans
    assert keys(first) == keys(second)
    assert files(first, tmp_path / "a") == files(second, tmp_path / "b")


CHANGED = {
    "mask": (("mask=1(01)",), ("mask=11(001)",)),
    "pab": (("spatial_attention_block_skip_range=2",), ("spatial_attention_block_skip_range=3",)),
    "fora": (("interval=2",), ("interval=3", "start_step=1")),
    "taylorseer": (
        ("cache_interval=2", "max_order=0"),
        ("cache_interval=3", "max_order=0", "disable_cache_before_step=1"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CHANGED)
def test_a_variant_is_the_same_whatever_plan_asks_for_it(method, tmp_path):
    first, second = (
        prepared(recipe("flux", *ORT, *CACHED, f"cache.method={method}", *(f"cache.{c}" for c in changes)))
        for changes in CHANGED[method]
    )
    assert first.planned.plans != second.planned.plans
    one, other = keys(first), keys(second)
    assert one == other
    assert files(first, tmp_path / "a") == files(second, tmp_path / "b")


@pytest.mark.slow
def test_weights_count_and_not_where_they_lie(tmp_path):
    """A copy of the model's folder under another name has the same keys; other weights of the same shapes have not."""
    copied = shutil.copytree(tiny_folder("flux").name, tmp_path / "copied")
    other = save_tiny_pipeline("flux", tmp_path / "other", seed=1)
    same = keys(prepared(resolve("flux-fast", PLAIN, str(copied))))
    assert same == keys_of("flux")
    others = keys(prepared(resolve("flux-fast", PLAIN, str(other))))
    assert all(others[name] != same[name] for name in same)


# --- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["onnxruntime", pytest.param("aoti", marks=pytest.mark.slow)])
def test_an_export_from_the_cache_is_the_same_artifact_and_is_verified(compiler, tmp_path, monkeypatch):
    """And one with other steps and thresholds compiles nothing."""
    store = Store(tmp_path / "kept")
    overrides = (f"compile.backend={compiler}", "sampler.steps=2", "verify.seeds=1", 'verify.prompts=["a cat"]')

    def exported(name: str, *further: str) -> tuple[Path, Progress]:
        with open_progress("quiet") as quiet:
            asked = recipe("flux", *overrides, *further)
            return export(asked, tmp_path / name, ExportOptions(store=store), quiet), quiet

    first, cold = exported("first")
    second, warm = exported("second")
    assert (set(cold.graphs.values()), set(warm.graphs.values())) == ({COMPILED}, {FROM_CACHE})
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert read_manifest(second).status == "verified"
    assert "verify" in warm.seconds
    lowering = load_backend(compiler)
    monkeypatch.setattr(lowering, "compile_graph" if compiler == "aoti" else "onnx_model", None)
    third, planned = exported("third", "sampler.steps=3", "verify.picture_error=4")
    assert set(planned.graphs.values()) == {FROM_CACHE}
    assert read_manifest(third).status == "verified"
    assert set(read_manifest(third).plans) == {"3"}
