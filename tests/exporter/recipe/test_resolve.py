"""Recipes that hold: what ships, what resolves to what, masks, overrides, round trips and the schema."""

import json
import tomllib
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prebake.exporter.caches import Auto
from prebake.exporter.cli.matrix import read_matrix
from prebake.exporter.recipe.resolve import (
    Int8Dynamic,
    Mask,
    NoCache,
    NoQuantize,
    PyramidAttentionBroadcast,
    Recipe,
    check_inductor_flags,
    check_scheduler,
    parse_override,
    read_recipe_file,
    recipe_names,
    recipe_schema,
    resolve,
    to_toml,
)
from prebake.exporter.verify.prompt_choice import read_prompts
from prebake.runtime.errors import RecipeError
from support.paths import ROOT

MASKED = ROOT / "tests" / "support" / "masked.toml"
SHIPPED = sorted(p.stem for p in (ROOT / "recipes").glob("*.toml"))


def test_names_are_the_files():
    assert list(recipe_names()) == SHIPPED
    assert {"baseline", "flux-fast"} <= set(SHIPPED)


def test_every_recipe_is_in_the_wheel(wheel):
    packed = [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("prebake/recipes/") and n.endswith(".toml")]
    assert sorted(Path(n).stem for n in packed) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_says_where_its_numbers_come_from_and_is_named_as_its_file(name):
    file = read_recipe_file(name)
    assert file.text.startswith("# ")
    assert file.data["name"] == name
    assert resolve(name) == resolve(ROOT / "recipes" / f"{name}.toml")


def test_flux_fast_is_flux_fast():
    recipe = resolve("flux-fast")
    assert recipe.model.id == "black-forest-labs/FLUX.1-dev"
    assert recipe.precision.model_dump() == dict.fromkeys(("denoiser", "text_encoders", "vae"), "bfloat16")
    assert recipe.fuse.qkv
    assert recipe.fuse.vae_qkv
    assert isinstance(recipe.quantize, Int8Dynamic)
    assert isinstance(recipe.cache, Auto)
    assert recipe.compile.channels_last_vae
    assert recipe.compile.inductor == {
        "conv_1x1_as_mm": True,
        "epilogue_fusion": False,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    }
    otherwise = recipe.cache.fallback()
    assert sum(otherwise.expand(28)) == 12
    assert all(otherwise.expand(4))  # schnell's number of steps leaves nothing to predict from: no cache there


def test_baseline_loses_nothing():
    recipe = resolve("baseline")
    assert recipe.lossless
    assert isinstance(recipe.quantize, NoQuantize)
    assert isinstance(recipe.cache, NoCache)
    assert set(recipe.precision.model_dump().values()) == {"float32"}
    assert recipe.verify.worst_evaluation_error <= 0.1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_name_only_flags_and_schedulers_that_exist(name):
    recipe = resolve(name)
    check_inductor_flags(recipe.compile.inductor)
    check_scheduler(recipe.sampler.scheduler)


FLUX_LINEARS = {
    "time_text_embed.timestep_embedder.linear_1": False,
    "context_embedder": False,
    "x_embedder": False,
    "transformer_blocks.0.norm1.linear": False,
    "transformer_blocks.0.norm1_context.linear": False,
    "single_transformer_blocks.37.norm.linear": False,
    "norm_out.linear": False,
    "transformer_blocks.0.attn.to_qkv": True,
    "transformer_blocks.0.attn.to_added_qkv": True,
    "transformer_blocks.0.attn.to_add_out": True,
    "transformer_blocks.0.ff.net.0.proj": True,
    "transformer_blocks.0.ff_context.net.2": True,
    "single_transformer_blocks.37.proj_mlp": True,
    "single_transformer_blocks.37.proj_out": True,
}


@pytest.mark.parametrize(("layer", "quantized"), FLUX_LINEARS.items())
def test_int8_filter_leaves_embeddings_and_modulation_alone(layer, quantized):
    import re

    q = Int8Dynamic()
    assert (
        any(re.search(p, layer) for p in q.include) and not any(re.search(p, layer) for p in q.exclude)
    ) == quantized
    assert resolve("flux-fast").quantize == q


# masks


@pytest.mark.parametrize(
    ("mask", "steps", "bits"),
    [
        ("111(0001)", 9, "111000100"),
        ("111(0001)", 3, "111"),
        ("11(01)1", 7, "1101011"),
        ("(10)", 5, "10101"),
        ("(10)1", 1, "1"),
        ("1(0)11", 6, "100011"),
        ("1100", 4, "1100"),
    ],
)
def test_mask_expands_to_the_number_of_steps(mask, steps, bits):
    assert Mask(mask=mask).expand(steps) == tuple(b == "1" for b in bits)


@given(
    st.text("01", max_size=6),
    st.text("01", min_size=1, max_size=6),
    st.text("01", max_size=6),
    st.integers(0, 40),
    st.sampled_from((0, 1)),
)
def test_expanded_mask_has_its_length_ends_and_warm_up(prefix, group, suffix, room, order):
    prefix, steps = f"11{prefix}", len(prefix) + 2 + len(suffix) + room
    bits = Mask(mask=f"{prefix}({group}){suffix}", order=order).expand(steps)
    assert len(bits) == steps
    assert all(bits[: 1 + order])
    text = "".join("01"[b] for b in bits)
    assert text.startswith(prefix)
    assert text.endswith(suffix)
    assert all(b == group[i % len(group)] for i, b in enumerate(text[len(prefix) : steps - len(suffix)]))


# overrides


def test_overrides_apply_and_later_ones_win():
    recipe = resolve(
        "flux-fast", ["sampler.steps=8", "sampler.steps=20,28", "precision.vae=float32", "verify.seeds = 2"]
    )
    assert recipe.sampler.steps == (20, 28)
    assert recipe.precision.vae == "float32"
    assert recipe.verify.seeds == 2


def test_an_override_keeps_the_rest_of_its_table():
    assert resolve(MASKED, ["cache.order=0"]).cache == Mask(mask="1111(001)", order=0)


def test_changing_the_method_drops_the_keys_of_the_old_one():
    recipe = resolve(
        "flux-fast", ["cache.spatial_attention_block_skip_range=3", "cache.method=pab", "quantize.method=none"]
    )
    assert recipe.cache == PyramidAttentionBroadcast(spatial_attention_block_skip_range=3)
    assert recipe.quantize == NoQuantize()


def test_naming_the_same_method_keeps_the_file():
    assert resolve("flux-fast", ["cache.method=auto"]) == resolve("flux-fast")


def test_another_model_drops_the_revision_that_pinned_the_first(tmp_path):
    path = write(tmp_path, MINIMAL.replace('id = "a/b"', 'id = "a/b"\nrevision = "abc"'))
    assert resolve(path).model.revision == "abc"
    assert resolve(path, model="shapes").model.revision is None
    assert resolve(path, ["model.id=c/d", "model.revision=12e3"]).model.revision == "12e3"


def test_a_file_without_model_takes_it_from_the_command_line(tmp_path):
    assert resolve(write(tmp_path, 'name = "x"\ndescription = ""'), model="shapes").model.id == "shapes"


def test_inductor_flags_by_dotted_name_add_to_those_of_the_file():
    flags = resolve(
        "flux-fast", ["compile.inductor.cpp.threads=2", "compile.inductor.epilogue_fusion=true"]
    ).compile.inductor
    assert flags["cpp.threads"] == 2
    assert flags["epilogue_fusion"] is True
    assert flags["conv_1x1_as_mm"] is True


def test_inductor_flags_may_be_nested_in_the_file(tmp_path):
    path = write(tmp_path, MINIMAL + "[compile.inductor]\ncpp.threads = 1\n'cpp.simdlen' = 256\n")
    assert resolve(path).compile.inductor == {"cpp.threads": 1, "cpp.simdlen": 256}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cache.mask=1101", "1101"),  # a string although TOML reads a number
        ("cache.mask='1101'", "1101"),
        ("model.revision=12e3", "12e3"),
        ("model.id=a/b", "a/b"),
        ("cache.method=pab", "pab"),
        ("cache.order=1", 1),
        ("fuse.qkv=false", False),
        ("verify.picture_error=1e2", 100.0),
        ("sampler.steps=20", [20]),
        ("sampler.steps=20, 28", [20, 28]),
        ("sampler.steps=[20, 28]", [20, 28]),
        ("quantize.exclude=embed", ["embed"]),
        ('quantize.exclude=["a{1,2}", "b"]', ["a{1,2}", "b"]),
        ("verify.prompts=a red heart", ["a red heart"]),
        ("model.id=1\nrevision = 2", "1\nrevision = 2"),  # no way to smuggle in a second key
    ],
)
def test_override_values(text, value):
    assert parse_override(text).value == value


SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.text()
)


@given(SCALARS | st.lists(SCALARS.filter(lambda v: not isinstance(v, str)), max_size=4))
def test_override_reads_every_value_that_toml_writes(value):
    written = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's notation is TOML's, but for DEL
    read_back = parse_override(f"compile.inductor.x={written}").value
    assert (read_back, type(read_back)) == (value, type(value))


@given(st.from_regex(r"[A-Za-z][A-Za-z0-9_./-]*", fullmatch=True))
def test_a_bare_word_is_a_string(word):
    assert parse_override(f"model.id={word}").value == word


# round trips and the schema

VARIED = [
    (),
    ("cache.method=pab", "sampler.steps=8,28", "sampler.guidance_scale=3.5"),
    ("cache.mask=[1, true, 0]", "cache.order=0", "cache.site=output"),
    ("cache.mask=medium", "cache.order=2"),
    ("cache.method=fora", "cache.interval=3"),
    ("cache.method=magcache", "cache.mag_ratios=flux"),
    ("cache.method=magcache", "cache.mag_ratios=[1, 1.5, 0.98]", "cache.threshold=0.1"),
    ("cache.mask=11(0)1", "cache.blocks=1:-1", "shapes.height=512", "model.revision=abc"),
    (
        "quantize.exclude=[]",
        'verify.prompts=["say \\"hi\\" 😀 \\u007f", "b"]',
        "compile.inductor.cpp.threads=1",
        "compile.isa=x86-64-v3",
    ),
]


@pytest.mark.parametrize("overrides", VARIED)
def test_round_trips_are_identical(overrides, tmp_path):
    recipe = resolve(MASKED, overrides)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert resolve(write(tmp_path, to_toml(recipe))) == recipe


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        resolve("baseline").cache.method = "pab"


def test_schema_is_valid_and_every_recipe_and_its_resolution_fit_it():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: it comes with the dev extra")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(recipe_schema())
    for name in SHIPPED:
        validator(recipe_schema()).validate(tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text()))
        validator(recipe_schema()).validate(resolve(name).model_dump(mode="json"))
    masked = {"method": "mask", "mask": [1, True, 0]}
    validator(recipe_schema()).validate({**read_recipe_file("baseline").data, "cache": masked})
    for wrong in ({"cahce": {}}, {"cache": {**masked, "mask": [1, 2]}}):
        with pytest.raises(jsonschema.ValidationError):
            validator(recipe_schema()).validate({**read_recipe_file("baseline").data, **wrong})


MINIMAL = 'name = "x"\ndescription = "x"\n[model]\nid = "a/b"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    """As Windows' editors write it: recipes, and the other files that people write."""
    own = (ROOT / "recipes/baseline.toml").read_text("utf-8")
    (tmp_path / "baseline.toml").write_text(own, "utf-8-sig")
    assert resolve(tmp_path / "baseline.toml") == resolve("baseline")
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue square\n", "utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ("a red star", "a blue square")
    (tmp_path / "matrix.toml").write_text('[[export]]\nrecipe = "baseline"\n', "utf-8-sig")
    assert read_matrix(tmp_path / "matrix.toml", None, ())[0].recipe == "baseline"


def test_prompts_in_another_encoding_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star", "utf-16")
    with pytest.raises(RecipeError, match="expected text in UTF-8"):
        read_prompts(tmp_path / "prompts.txt")
