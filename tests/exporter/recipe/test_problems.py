"""Every refusal of a recipe: the whole sentence, with where, what came, and the way out."""

from pathlib import Path

import pytest

from prebake.exporter import caches
from prebake.exporter.recipe.resolve import Mask, check_inductor_flags, check_scheduler, resolve
from prebake.runtime.errors import RecipeError
from support.paths import ROOT

HEAD = 'name = "x"\ndescription = "x"\n'
MINIMAL = HEAD + '[model]\nid = "a/b"\n'
MASKED = ROOT / "tests" / "support" / "masked.toml"
METHODS = list(caches.METHODS)
TABLES = "attach, attention, cache, compile, fuse, guidance, model, precision, quantize, sampler, shapes, verify"

# what the file says after MINIMAL -> the message after the file's path
FILES = {
    "[cache]\nmethod = 'mask'\nmask = '11(01)'\nordr = 1\n[verify]\ncached_psnr_db = 30": (
        " [cache]: unknown key 'ordr'; did you mean 'order'? known keys: blocks, mask, method, order, site"
    ),
    "[cahce]\n": f": unknown table 'cahce'; did you mean 'cache'? known tables: {TABLES}; keys outside of tables: description, lossless, name",
    "[fuse]\nzzz = true": " [fuse]: unknown key 'zzz'; known keys: qkv, vae_qkv",
    "[fuse]\nqkv = 1": " [fuse]: key 'qkv': expected a valid boolean, got 1",
    "[verify]\nseeds = true": " [verify]: key 'seeds': expected a valid integer, got true",
    "[verify]\nseeds = 0": " [verify]: key 'seeds': expected greater than or equal to 1, got 0",
    "[verify]\npicture_error = nan": " [verify]: key 'picture_error': expected a finite number, got NaN",
    "[verify]\npicture_error = '45'": " [verify]: key 'picture_error': expected a valid number, got \"45\"",
    "[sampler]\nsteps = 28": " [sampler]: key 'steps': expected a list, got 28",
    "[sampler]\nsteps = [28, 'ten']": " [sampler]: key 'steps' item 2: expected a valid integer, got \"ten\"",
    "[sampler]\nsteps = []": " [sampler]: key 'steps': expected at least one number of steps, got []; leave the key out for the model's own",
    "[sampler]\nsteps = [8, 4, 8]": " [sampler]: key 'steps': 8 is listed twice; each number of steps makes one plan",
    "[sampler]\nscheduler = 'euler'": (
        " [sampler]: key 'scheduler': expected 'model' or a diffusers class name such as 'FlowMatchEulerDiscreteScheduler', got 'euler'"
    ),
    "[precision]\nvae = 'bf16'": " [precision]: key 'vae': expected 'float32', 'bfloat16' or 'float16', got \"bf16\"; did you mean 'bfloat16'?",
    "[precision]\nvae = 'int8'": " [precision]: key 'vae': expected 'float32', 'bfloat16' or 'float16', got \"int8\"",
    "[shapes]\nbatch = 0": " [shapes]: key 'batch' item 1: expected greater than or equal to 1, got 0",
    "[shapes]\nsizes = ['64x']": " [shapes]: key 'sizes' item 1: expected width x height in pixels, such as '832x1216', got '64x'",
    "[shapes]\nsizes = ['64x64']\nheight = 64": " [shapes]: sizes takes the place of height and width; give either",
    "[quantize]\nmethod = 'int8'": " [quantize]: unknown method 'int8'; did you mean 'int8_dynamic'? known methods: fp8_dynamic, int8_dynamic, none",
    "[quantize]\nmethod = 8": " [quantize]: key 'method': expected one of none, int8_dynamic, fp8_dynamic, got 8",
    "[quantize]\nmethod = 'none'\nexclude = []": (
        " [quantize]: key 'exclude' belongs to method 'int8_dynamic', and method is 'none'; set quantize.method to 'int8_dynamic' or leave the key out"
    ),
    "[quantize]\nmethod = 'int8_dynamic'\nexclude = ['a', '(']": (
        " [quantize]: key 'exclude' item 2: '(' is not a regular expression: missing ), unterminated subpattern at position 0"
    ),
    "[cache]\norder = 1": " [cache]: missing key 'method'; add it to [cache] or give --set cache.method=...; known methods: "
    + ", ".join(METHODS),
    "[cache]\nmethod = 'mask'": " [cache]: missing key 'mask'; add it to [cache] or give --set cache.mask=...",
    "[cache]\nmethod = 'mask'\nmask = '1(0)(1)'": (
        " [cache]: key 'mask': expected 0s and 1s with at most one repeating group, such as '111(0001)', or one of slow, medium, fast, ultra, got '1(0)(1)'"
    ),
    "[cache]\nmethod = 'mask'\nmask = '(01)'": " [cache]: mask '(01)' skips the first step, when there is nothing to reuse; start it with 1",
    "[cache]\nmethod = 'mask'\nmask = '1(01)'\norder = 1": (
        " [cache]: mask '1(01)' skips one of the first two steps, which order = 1 predicts from; start it with 11 or set order = 0"
    ),
    "[cache]\nmethod = 'mask'\nmask = '1(01)'\nblocks = '1:2:3'": " [cache]: key 'blocks': expected a slice 'start:stop' such as ':', '1:' or '2:-1', got '1:2:3'",
    "[cache]\nmethod = 'mask'\nmask = '1(01)'": ' [cache]: cache method "mask" has no threshold to be verified against; set verify.cached_psnr_db',
    "[cache]\nmethod = 'pab'\nspatial_attention_block_skip_range = 1": (
        " [cache]: key 'spatial_attention_block_skip_range': expected greater than or equal to 2, got 1"
    ),
    "[cache]\nmethod = 'pab'\nspatial_attention_timestep_skip_range = [1, 2, 3]": (
        " [cache]: key 'spatial_attention_timestep_skip_range': expected 2 items, got [1, 2, 3]"
    ),
    "[cache]\nmethod = 'pab'\nspatial_attention_timestep_skip_range = [1]": " [cache]: key 'spatial_attention_timestep_skip_range' item 2 is missing",
    "[cache]\nmethod = 'pab'\nspatial_attention_timestep_skip_range = [800, 100]": (
        " [cache]: key 'spatial_attention_timestep_skip_range': expected low < high, got [800, 100]"
    ),
    "[verify]\npsnr_db = 30.0": (
        " [verify]: key 'psnr_db' is no longer read: a PSNR of rounding says nothing of an artifact. Set picture_error and "
        "worst_picture_error, in units of what eager bfloat16 loses"
    ),
    "[precision]\nvae = 'float16'": (
        ' [precision]: vae = "float16" is not possible on device "cpu"; use "bfloat16" or "float32", or device "cuda"'
    ),
    "[compile]\ndevice = 'cuda'\nisa = 'native'": ' [compile]: isa = "native" names a CPU instruction set, and device is "cuda"; leave isa at "host"',
    "[attention]\nbackend = 'flash'\ndtype = 'bfloat16'": (
        ' [attention]: backend = "flash" is a kernel that torch has for GPUs; leave it at "sdpa", or export with '
        'compile.backend = "aoti" and compile.device = "cuda"'
    ),
    "[attention]\nbackend = 'cudnn'\n[compile]\nbackend = 'tensorrt'\ndevice = 'cuda'\n[precision]\ndenoiser = 'bfloat16'": (
        ' [attention]: backend = "cudnn" is a kernel that torch has for GPUs; leave it at "sdpa", or export with '
        'compile.backend = "aoti" and compile.device = "cuda"'
    ),
    "[attention]\nbackend = 'cudnn'\n[compile]\ndevice = 'cuda'": (
        ' [attention]: backend = "cudnn" computes in bfloat16 or float16, and attention is in float32; set attention.dtype = '
        '"bfloat16"'
    ),
    "[compile.inductor]\nx = [1]": " [compile]: key 'inductor': flag 'x' is a list, expected a boolean, a number or a string",
}


@pytest.mark.parametrize(("text", "message"), FILES.items())
def test_file_is_refused(text, message, tmp_path):
    path = write(tmp_path, MINIMAL + text)
    assert refusal(path) == f"{path}{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": missing key 'name'; add it above the tables\n{}: missing key 'description'; add it above the tables\n"
             "{}: missing table 'model'; add [model] with an id, or give --model"),
        (HEAD, ": missing table 'model'; add [model] with an id, or give --model"),
        (HEAD + "[model]", " [model]: missing key 'id'; add it to [model] or give --set model.id=..."),
        (HEAD + "model = 'shapes'", ": 'model' is a table, got \"shapes\"; write [model] and its keys below it"),
        (HEAD + "cache = 'none'\n[model]\nid = 'a'", ": 'cache' is a table, got \"none\"; write [cache] and its keys below it"),
        ("name = 'a/b'\ndescription = ''\n[model]\nid = 'a'", ": key 'name': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got \"a/b\""),
        ("\nname = \n", ", line 2, column 8: not valid TOML: Invalid value; see https://toml.io"),
        ("a = 1\na = 2\n", ", line 2, column 6: not valid TOML: Cannot overwrite a value; see https://toml.io"),
        ("a = '", ", end of document: not valid TOML: Expected \"'\"; see https://toml.io"),
    ],
)  # fmt: skip
def test_whole_file_is_refused(text, message, tmp_path):
    path = write(tmp_path, text)
    assert refusal(path) == str(path) + message.format(path, path)


SETS = {
    "cache.ordr=1": "unknown key 'ordr'; did you mean 'order'? known keys: blocks, mask, method, order, site",
    "cahce.order=1": f"unknown table 'cahce'; did you mean 'cache'? known tables: {TABLES}",
    "name.x=1": f"unknown table 'name'; known tables: {TABLES}",
    "cache.order": "expected table.key=value, such as cache.method=none",
    "cache=pab": "expected table.key=value, such as cache.method=none; did you mean cache.method=pab?",
    "=": "expected table.key=value, such as cache.method=none",
    "model.id=": "expected a value after '='; leave the argument out to keep the recipe's, or write '\"\"' for an empty string",
    'quantize.exclude=a,"b"': """expected a TOML list, such as '["a", "b"]' with both kinds of quotes""",
    "cache.order=3": "key 'order': expected 0, 1 or 2, got 3",
    "cache.mask=1111 (01": "key 'mask': expected 0s and 1s with at most one repeating group, such as '111(0001)', or one of slow, medium, fast, ultra, got '1111 (01'",
    "cache.method=pyramid": "unknown method 'pyramid'; known methods: " + ", ".join(sorted(METHODS)),
    "cache.mask.x=1": "unknown key 'mask.x'; did you mean 'mask'? known keys: blocks, mask, method, order, site",
    "compile.inductor=3": "key 'inductor': expected a table, got 3",
    "precision.denoiser=float16": 'denoiser = "float16" is not possible on device "cpu"; use "bfloat16" or "float32", or device "cuda"',
    "sampler.steps=two": "key 'steps' item 1: expected a valid integer, got \"two\"",
    "sampler.steps=2": "mask '1111(001)' needs at least 4 steps, not 2; shorten it or raise sampler.steps",
    "sampler.steps=0": "key 'steps' item 1: expected greater than or equal to 1, got 0",
    "verify.relative_error=0.1": "key 'relative_error' is no longer read: set evaluation_error and worst_evaluation_error, in units of "
    "what eager bfloat16 loses",
}


@pytest.mark.parametrize(("text", "message"), SETS.items())
def test_override_is_refused_by_its_own_text(text, message):
    assert refusal(MASKED, [text]) == f"--set {text}: {message}"


def test_keys_of_the_new_method_given_by_overrides_are_still_checked():
    assert refusal(MASKED, ["cache.method=pab", "cache.order=1"]) == (
        "--set cache.order=1: key 'order' belongs to method 'mask', and method is 'pab'; set cache.method to 'mask' or leave the key out"
    )


def test_a_new_method_asks_for_its_required_keys():
    assert refusal("baseline", ["cache.method=mask"]) == (
        "--set cache.method=mask: missing key 'mask'; add it to [cache] or give --set cache.mask=..."
    )


def test_a_mask_of_fixed_length_must_fit_every_listed_number_of_steps():
    assert refusal(MASKED, ["cache.mask=1100", "sampler.steps=4,8"]) == (
        "--set cache.mask=1100: mask '1100' is for 4 steps, not for 8; give it a repeating group, such as '111(0001)', or set sampler.steps = [4]"
    )


def test_a_mask_whose_group_vanishes_may_not_start_with_a_skip():
    with pytest.raises(RecipeError, match=r"'\(10\)01' skips the first step, .*with 1 \(at 2 steps\)"):
        Mask(mask="(10)01").expand(2)


@pytest.mark.parametrize("override", ["quantize.method=int8_dynamic", "cache.method=pab"])
def test_lossless_is_a_promise(override):
    method = override.partition("=")[2]
    first = refusal("baseline", [override]).splitlines()[0]
    assert first == (
        f"--set {override}: method = \"{method}\" loses something, and recipe 'baseline' says lossless = true; take another recipe or copy this one"
    )


def test_all_problems_are_told_at_once(tmp_path):
    path = write(tmp_path, MINIMAL + "[fuse]\nqvk = true\n[verify]\nseeds = 'x'")
    assert refusal(path, ["cache", "shapes.width=-1"]).splitlines() == [
        "--set cache: expected table.key=value, such as cache.method=none",
        f"{path} [fuse]: unknown key 'qvk'; did you mean 'qkv'? known keys: qkv, vae_qkv",
        "--set shapes.width=-1: key 'width': expected greater than or equal to 1, got -1",
        f"{path} [verify]: key 'seeds': expected a valid integer, got \"x\"",
    ]


def test_unknown_recipe_gets_the_nearest_and_the_list():
    assert refusal("flux-fst") == (
        "unknown recipe 'flux-fst'; did you mean 'flux-fast'? known recipes: baseline, cogvideox-fast, flux-fast, flux-kontext-fast, pixart-fast, sd-fast, sd3-fast, sdxl-fast; for a file of your own give its path, ending in .toml"
    )


def test_missing_file_and_folder(tmp_path):
    ships = "the recipes that ship: baseline, cogvideox-fast, flux-fast, flux-kontext-fast, pixart-fast, sd-fast, sd3-fast, sdxl-fast"
    assert refusal("no/such.toml") == f"no/such.toml: expected a recipe file, found nothing; {ships}"
    assert refusal(tmp_path) == f"{tmp_path}: expected a recipe file, found a folder; {ships}"


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"# caf\xe9\n")
    assert (
        refusal(path) == f"{path}: expected UTF-8 text, but invalid continuation byte at byte 5; save the file as UTF-8"
    )


def test_two_models():
    message = refusal("baseline", ["model.id=a/b"], model="shapes")
    assert message == "--model shapes: --set model.id=a/b names another model; give one of the two"


def test_inductor_flags_are_compared_with_the_installed_torch():
    with pytest.raises(RecipeError) as e:
        check_inductor_flags({"conv_1x1_as_m": True, "epilogue_fusion": 1, "cpp.threads": True, "max_autotune": True})
    assert str(e.value).splitlines() == [
        "[compile.inductor]: torch._inductor.config has no flag 'conv_1x1_as_m'; did you mean 'conv_1x1_as_mm'?",
        "[compile.inductor]: flag 'epilogue_fusion' is of type bool in torch._inductor.config, got 1",
        "[compile.inductor]: flag 'cpp.threads' is of type int in torch._inductor.config, got true",
    ]


def test_scheduler_is_looked_up_in_the_installed_diffusers():
    check_scheduler("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(
        RecipeError,
        match=r"'EulerDiscretScheduler'; .*'EulerDiscreteScheduler'",
    ):
        check_scheduler("EulerDiscretScheduler")


def refusal(recipe: str | Path, overrides=(), model=None) -> str:
    with pytest.raises(RecipeError) as e:
        resolve(recipe, overrides, model)
    return str(e.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, "utf-8")
    return path
