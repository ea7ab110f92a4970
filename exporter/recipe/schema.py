"""A recipe's tables: what can be asked for, in diffusers' and torch's own words, checked once and then frozen.

Plain values come in (from TOML, JSON or `model_dump`), a `Recipe` comes out in which no key is unknown and no two keys
contradict each other. Defaults live on these fields and nowhere else. `recipe.py` reads the files and the `--set`
overrides; `recipe_problems.py` turns what pydantic refuses here into sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ...runtime.backends import backend_names as backends
from ...runtime.errors import RecipeError
from ..caches import Cache, Mask, NoCache
from ..quantize import NoQuantize, Quantize
from ..tables import ConflictError, RecipeProblem, RecipeTable

Dtype = Literal["float32", "bfloat16", "float16"]


def _flatten_flags(flags: Any, prefix: str = "") -> Any:
    """`{"cpp": {"threads": 1}}` as `{"cpp.threads": 1}`, so that a TOML author may leave out the quotes."""
    if not isinstance(flags, dict):
        return flags
    flat: dict[str, Any] = {}
    for name, value in flags.items():
        if isinstance(value, dict):
            flat |= _flatten_flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[f"{prefix}{name}"] = value
        else:
            raise ValueError(
                f"flag {prefix + name!r} is a {type(value).__name__}, expected a boolean, a number or a string"
            )
    return flat


Flags = Annotated[dict[str, bool | int | float | str], BeforeValidator(_flatten_flags)]


class Model(RecipeTable):
    """`id` is a hub id, a folder, one safetensors file, `shapes`, the small model that ships with prebake, or one that is
    made on the spot, such as `tiny:flux`; `revision` pins a hub id. `part` is "pipeline", for the slim runtime, or "denoiser",
    for `prebake.runtime.attach`; None = the pipeline where it has a family, else the denoiser.

    `config` is for a single file: a pipeline folder, here or beside the file, of which what the file lacks is read;
    None = the hub's, for the kind of model that the file has.
    """

    id: str = Field(min_length=1)
    revision: str | None = None
    config: str | None = None
    part: Literal["pipeline", "denoiser"] | None = None


class Attach(RecipeTable):
    """Of a denoiser that is exported alone: `arguments` are further ones of its pipeline's call, such as `num_frames`."""

    arguments: Flags = Field(default={})


ATTACH = Attach()


class Precision(RecipeTable):
    """The dtype of the weights and of the arithmetic, per part."""

    denoiser: Dtype = "float32"
    text_encoders: Dtype = "float32"
    vae: Dtype = "float32"


class Fuse(RecipeTable):
    """Query, key and value as one matrix product: the same sums, one pass over the input."""

    qkv: bool = True
    vae_qkv: bool = True


class Attention(RecipeTable):
    """The denoiser's. `backend` is `sdpa`, `torch.nn.functional.scaled_dot_product_attention` by the kernel that torch or the
    backend prefers, or on a GPU one of torch's own kernels (`torch.nn.attention.SDPBackend`). `dtype` is what it is computed
    in; None = the denoiser's own."""

    backend: Literal["sdpa", "cudnn", "flash", "efficient", "math"] = "sdpa"
    dtype: Dtype | None = None


class Sampler(RecipeTable):
    """`scheduler` is the model's own or a diffusers class name; each entry of `steps` becomes one plan. With
    `image_to_image`, plans may also begin in the middle, from a picture, and the VAE's encoder is exported too.

    None = what the model's own pipeline uses.
    """

    scheduler: str = "model"
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...] | None, Field(strict=False)] = None
    guidance_scale: float | None = Field(default=None, ge=0)
    image_to_image: bool = False

    @model_validator(mode="after")
    def _is_usable(self) -> Sampler:
        problems = []
        if self.scheduler != "model" and not re.fullmatch(r"\w+Scheduler\w*", self.scheduler):
            problems.append(
                (
                    ("scheduler",),
                    f"key 'scheduler': expected 'model' or a diffusers class name such as 'FlowMatchEulerDiscreteScheduler', got {self.scheduler!r}",
                )
            )
        if self.steps == ():
            problems.append(
                (
                    ("steps",),
                    "key 'steps': expected at least one number of steps, got []; leave the key out for the model's own",
                )
            )
        for n in sorted({n for n in self.steps or () if self.steps and self.steps.count(n) > 1}):
            problems.append((("steps",), f"key 'steps': {n} is listed twice; each number of steps makes one plan"))
        if problems:
            raise ConflictError(*problems)
        return self


class Guidance(RecipeTable):
    """Classifier-free guidance inside the denoiser's graph, where a model has it.

    `branches`: "sequential" runs one after the other, each with sites of its own, so that a cache may treat them
    differently; "batched" runs both at once, on a batch of two. `true_cfg` gives a model that was distilled from its
    guidance (FLUX) both branches all the same, for negative prompts, at twice the work of every step.
    """

    branches: Literal["sequential", "batched"] = "sequential"
    true_cfg: bool = False

    @property
    def batched(self) -> bool:
        return self.branches == "batched"


GUIDANCE = Guidance()


class Shapes(RecipeTable):
    """The sizes that the graphs are compiled for, in pixels, tokens and frames of a video; None = the model's default."""

    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    max_sequence_length: int | None = Field(default=None, ge=1)
    num_frames: int | None = Field(default=None, ge=1)
    batch: Literal[1] = 1


def _check_backend(name: str) -> str:
    if name not in backends():
        raise ValueError(f"expected one of {', '.join(backends())}, got {name!r}")
    return name


class Compile(RecipeTable):
    """How graphs become machine code.

    `isa` is the CPU instruction set that the code may use: an x86-64 level runs on every CPU of that level, `host` is
    the highest of them that the exporting CPU has, `native` is everything that CPU has. `threads` is how many threads
    the compiled loops fork, None = as many as torch uses where it is exported; matrix products ask at run time. `inductor`
    holds flags of `torch._inductor.config` by their dotted names; `check_inductor_flags` compares them with the installed
    torch. `options` are those of the backend, by the names in its documentation.
    """

    backend: Annotated[str, AfterValidator(_check_backend)] = "aoti"
    device: Literal["cpu", "cuda"] = "cpu"
    isa: Literal["host", "native", "x86-64-v3", "x86-64-v4"] = "host"
    threads: int | None = Field(default=None, ge=1)
    channels_last_vae: bool = True
    inductor: Flags = Field(default={})
    options: Flags = Field(default={})


class Verify(RecipeTable):
    """What the artifact must reach against the eager pipeline, or the export fails.

    `psnr_db` is the mean over prompts and seeds of a plan without cache, `cached_psnr_db` of a plan with one;
    `relative_error` is the largest L2 error of one evaluation of the denoiser relative to its output;
    `prompt_accuracy_drop` is in points, for models that come with a checker, None = not gated; an export measures it on
    the first `accuracy_prompts` of the model's checked prompts, `prebake verify --source` on all of them.
    `prompts` empty = the model's own set; each is drawn with seeds 0 to `seeds` - 1.
    """

    psnr_db: float = Field(default=45.0, gt=0)
    cached_psnr_db: float | None = Field(default=None, gt=0)
    relative_error: float = Field(default=0.05, gt=0)
    prompt_accuracy_drop: float | None = Field(default=None, ge=0)
    accuracy_prompts: int = Field(default=64, ge=1)
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    seeds: int = Field(default=4, ge=1)


class Recipe(RecipeTable):
    """What is asked for, complete: every default filled in. `lossless` is a promise that the other tables must keep."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str
    lossless: bool = False
    model: Model
    precision: Precision = Precision()
    fuse: Fuse = Fuse()
    quantize: Quantize = NoQuantize()
    attention: Attention = Attention()
    cache: Cache = NoCache()
    sampler: Sampler = Sampler()
    guidance: Guidance = GUIDANCE
    shapes: Shapes = Shapes()
    attach: Attach = ATTACH
    compile: Compile = Compile()
    verify: Verify = Verify()

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        if problems := [*_impossible_combinations(self), *_broken_promises(self), *_ungated_caches(self)]:
            raise ConflictError(*problems)
        return self


def _impossible_combinations(r: Recipe) -> Iterator[RecipeProblem]:
    """Combinations that no machine or schedule can carry out."""
    for part in ("denoiser", "text_encoders", "vae"):
        if r.compile.device == "cpu" and getattr(r.precision, part) == "float16":
            yield (
                (f"precision.{part}", "compile.device"),
                f'{part} = "float16" is not possible on device "cpu"; use "bfloat16" or "float32", or device "cuda"',
            )
    if r.compile.device == "cuda" and r.compile.isa != "host":
        yield (
            ("compile.isa", "compile.device"),
            f'isa = "{r.compile.isa}" names a CPU instruction set, and device is "cuda"; leave isa at "host"',
        )
    chosen = r.attention.backend
    if chosen != "sdpa" and (r.compile.backend, r.compile.device) != ("aoti", "cuda"):
        yield (
            ("attention.backend", "compile.backend", "compile.device"),
            f'backend = "{chosen}" is a kernel that torch has for GPUs; leave it at "sdpa", or export with compile.backend = '
            '"aoti" and compile.device = "cuda"',
        )
    if chosen in ("cudnn", "flash") and (r.attention.dtype or r.precision.denoiser) == "float32":
        yield (
            ("attention.backend", "attention.dtype", "precision.denoiser"),
            f'backend = "{chosen}" computes in bfloat16 or float16, and attention is in float32; set attention.dtype = "bfloat16"',
        )
    for steps in r.sampler.steps or ():
        try:
            _ = r.cache.expand(steps) if isinstance(r.cache, Mask) else ()
        except RecipeError as e:
            yield ("cache.mask", "sampler.steps", "cache.order"), str(e)


def _broken_promises(r: Recipe) -> Iterator[RecipeProblem]:
    """A recipe that says `lossless = true` may not quantize or cache; what a dtype loses, `verify` measures."""
    for table, method in (("quantize", r.quantize.method), ("cache", r.cache.method)):
        if r.lossless and method != "none":
            yield (
                (f"{table}.method", "lossless"),
                f'method = "{method}" loses something, and recipe {r.name!r} says lossless = true; take another recipe or copy this one',
            )


def _ungated_caches(r: Recipe) -> Iterator[RecipeProblem]:
    """A cache whose result nobody would measure, or must beat the plan that it approximates."""
    floor = r.verify.cached_psnr_db
    if r.cache.method != "none" and floor is None:
        yield (
            ("cache.method", "verify.cached_psnr_db"),
            f'cache method "{r.cache.method}" has no threshold to be verified against; set verify.cached_psnr_db',
        )
    if floor is not None and floor > r.verify.psnr_db:
        yield (
            ("verify.cached_psnr_db", "verify.psnr_db"),
            f"cached_psnr_db = {floor} asks more of a cached plan than psnr_db = {r.verify.psnr_db} of the plan it approximates",
        )


def table_types(table: str) -> dict[str, type[RecipeTable]]:
    """The types that a table can have, by their `method`; a table of one type has it under ''."""
    annotation: Any = Recipe.model_fields[table].annotation
    types: tuple[type[RecipeTable], ...] = get_args(annotation) or (annotation,)
    return {t.model_fields["method"].default if "method" in t.model_fields else "": t for t in types}


def table_names() -> tuple[str, ...]:
    """The tables of a recipe, in the order of its file; the other keys of a `Recipe` are plain values."""
    plain = ("name", "description", "lossless")
    return tuple(name for name in Recipe.model_fields if name not in plain)
