"""A recipe's tables: what can be asked for, in diffusers' and torch's own words, checked once and then frozen.

Plain values come in (from TOML, JSON or `model_dump`), a `Recipe` comes out in which no key is unknown and no two keys
contradict each other. Defaults live on these fields and nowhere else. `recipe.py` reads the files and the `--set`
overrides; `recipe_problems.py` turns what pydantic refuses here into sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from ...runtime.backends import backend_names as backends
from ...runtime.bounds import MAX_BATCH
from ...runtime.errors import RecipeError
from ...runtime.sizes.size_range import SideRange
from ..caches import Cache, Mask, NoCache
from ..quantize import NoQuantize, Quantize
from ..tables import ConflictError, RecipeProblem, RecipeTable
from .duration import DURATION

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


class Lora(RecipeTable):
    """A low-rank update of the weights, from a file that diffusers reads."""

    path: str = Field(min_length=1)
    """A safetensors file, a folder that holds one, or a Hub id."""
    scale: float = 1.0
    """What its product is multiplied with."""
    weight_name: str | None = None
    """The file in the folder or repository. None = its only one."""


def _read_lora(given: Any) -> Any:
    """`"style.safetensors:0.8"` as its path and scale; a table as it is."""
    if isinstance(given, dict | Lora):
        return given
    if not isinstance(given, str):
        raise ValueError(f'expected "PATH:SCALE" or a table with path, scale and weight_name, got {given!r}')
    path, colon, scale = given.rpartition(":")
    try:
        return {"path": path, "scale": float(scale)} if colon and path else {"path": given}
    except ValueError:
        return {"path": given}


class TextualInversion(RecipeTable):
    """A new token of the prompt, from a file of embeddings that diffusers reads."""

    path: str = Field(min_length=1)
    """A file, a folder that holds one, or a Hub id."""
    token: str | None = Field(default=None, min_length=1)
    """What stands for it in a prompt. None = what the file says, or its name."""
    weight_name: str | None = None
    """The file in the folder or repository. None = its only one."""


def _read_inversion(given: Any) -> Any:
    """`"cat.safetensors"` as its path; a table as it is."""
    if isinstance(given, str):
        return {"path": given}
    if isinstance(given, dict | TextualInversion):
        return given
    raise ValueError(f'expected "PATH" or a table with path, token and weight_name, got {given!r}')


class Model(RecipeTable):
    """Which model is exported, and which part of it."""

    id: str = Field(min_length=1)
    """A Hub id, a folder, one safetensors file, `shapes` (the small model that ships), or a random one such as `tiny:flux`."""
    revision: str | None = None
    """Pins the revision of a Hub id."""
    config: str | None = None
    """For a single file: a pipeline folder of which what the file lacks is read. None = the Hub's, for the kind of model that the file has."""
    part: Literal["pipeline", "denoiser"] | None = None
    """`pipeline`, for the slim runtime, or `denoiser`, for `attach`. None = the pipeline where it has a family, else the denoiser."""
    lora: Annotated[tuple[Annotated[Lora, BeforeValidator(_read_lora)], ...], Field(strict=False)] = ()
    """LoRAs that are added to the weights in float32, before these are cast or quantized: tables of `path`, `scale` and `weight_name`, or `"PATH:SCALE"`."""
    textual_inversion: Annotated[
        tuple[Annotated[TextualInversion, BeforeValidator(_read_inversion)], ...], Field(strict=False)
    ] = ()
    """New tokens for prompts: tables of `path`, `token` and `weight_name`, or `"PATH"`."""


class Attach(RecipeTable):
    """For a denoiser that is exported alone."""

    arguments: Flags = Field(default={})
    """Further arguments of its pipeline's call, such as `num_frames`."""


ATTACH = Attach()


class Precision(RecipeTable):
    """The dtype of weights and arithmetic, for each part of the pipeline."""

    denoiser: Dtype = "float32"
    """The transformer or UNet."""
    text_encoders: Dtype = "float32"
    """All text encoders."""
    vae: Dtype = "float32"
    """The decoder, and the encoder where it is exported."""


class Fuse(RecipeTable):
    """Query, key and value as one matrix product: the same sums, one pass over the input. Where a model has nothing to fuse,
    the export says so."""

    qkv: bool = True
    """In the denoiser."""
    vae_qkv: bool = True
    """In the VAE."""


class Attention(RecipeTable):
    """The denoiser's attention."""

    backend: Literal["sdpa", "cudnn", "flash", "efficient", "math"] = "sdpa"
    """`sdpa` is the kernel that torch or the backend prefers; the others are torch's own kernels for GPUs."""
    dtype: Dtype | None = None
    """What attention is computed in. None = the denoiser's own."""


class Sampler(RecipeTable):
    """Schedulers, steps and guidance. None = what the model's own pipeline uses."""

    scheduler: str = "model"
    """`model`, or a diffusers class name such as `DDIMScheduler`."""
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...] | None, Field(strict=False)] = None
    """Each number of steps becomes one plan."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """The default of a call."""
    image_to_image: bool = False
    """Plans may also begin in the middle, from a picture; the VAE's encoder is exported too."""

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
    """Classifier-free guidance inside the denoiser's graph, where a model has it."""

    branches: Literal["sequential", "batched"] = "sequential"
    """`sequential` runs one branch after the other, each with sites of its own, so that a cache may treat them differently; `batched` runs both at once, on a batch of two."""
    true_cfg: bool = False
    """Gives a model that was distilled from its guidance (FLUX) both branches, for negative prompts, at twice the work of every step."""

    @property
    def batched(self) -> bool:
        return self.branches == "batched"


GUIDANCE = Guidance()


def _check_size(size: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
        raise ValueError(f"expected width x height in pixels, such as '832x1216', got {size!r}")
    return size


def _list_batches(given: Any) -> Any:
    """One number as the list of it and 1, a list with 1, in order."""
    batches = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(batches, list | tuple) or not all(isinstance(batch, int) for batch in batches):
        return batches
    return tuple(sorted({1, *batches}))


def _read_length(given: Any) -> Any:
    """A number of pixels, or a range of them."""
    if given is None or isinstance(given, SideRange):
        return given
    if type(given) is int:
        if given < 1:
            raise ValueError(f"expected greater than or equal to 1, got {given}")
        return given
    if isinstance(given, dict) and given.keys() == SideRange.model_fields.keys():
        try:
            return SideRange.model_validate(given)
        except ValidationError as e:
            said = e.errors()[0]
            where = "".join(f"{place}: " for place in said["loc"])
            raise ValueError(f"{where}{said.get('ctx', {}).get('error', said['msg'])}") from e
    raise ValueError(f"expected pixels, such as 1024, or {{min = 512, max = 1536, step = 64}}, got {given!r}")


Length = Annotated[Annotated[int, Field(ge=1)] | SideRange | None, BeforeValidator(_read_length)]


class Shapes(RecipeTable):
    """The sizes that the graphs are compiled for, each its own over one copy of the weights. None = the model's default."""

    height: Length = None
    """In pixels, or as `{min = 512, max = 1536, step = 64}`: then one graph serves every height from `min` to `max` by `step`."""
    width: Length = None
    """As `height`. Each of the two may be a range, with every height for every width."""
    sizes: Annotated[tuple[Annotated[str, AfterValidator(_check_size)], ...] | None, Field(strict=False)] = None
    """Several sizes in the place of `height` and `width`, each as width x height, `["1024x1024", "832x1216"]`; a call that names none gets the first."""
    max_sequence_length: int | None = Field(default=None, ge=1)
    """In tokens of the prompt."""
    num_frames: int | None = Field(default=None, ge=1)
    """Of a video."""
    batch: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...], BeforeValidator(_list_batches), Field(strict=False)
    ] = (1,)
    """How many images the denoiser's graphs take at once: `[1, 2, 4]` compiles each, and a call of 7 makes 4, then 2, then 1. 1 is always among them."""

    @model_validator(mode="after")
    def _names_one_size(self) -> Shapes:
        if self.sizes is None:
            return self
        if self.sizes == ():
            raise ConflictError((("sizes",), "key 'sizes': expected at least one size, got []; leave the key out"))
        if self.height is not None or self.width is not None:
            raise ConflictError(
                (("sizes", "height", "width"), "sizes takes the place of height and width; give either")
            )
        if twice := sorted({size for size in self.sizes if self.sizes.count(size) > 1}):
            raise ConflictError((("sizes",), f"key 'sizes': {twice[0]} is listed twice"))
        return self

    @property
    def is_ranged(self) -> bool:
        """Whether a call may ask for any size of a range."""
        return isinstance(self.height, SideRange) or isinstance(self.width, SideRange)

    @property
    def pixels(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each of `sizes`, none where there are none."""
        sides = (tuple(map(int, size.split("x"))) for size in self.sizes or ())
        return tuple((height, width) for width, height in sides)


def _check_backend(name: str) -> str:
    if name not in backends():
        raise ValueError(f"expected one of {', '.join(backends())}, got {name!r}")
    return name


class Compile(RecipeTable):
    """How graphs become machine code."""

    backend: Annotated[str, AfterValidator(_check_backend)] = "aoti"
    """What compiles the graphs and runs them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where they run."""
    isa: Literal["host", "native", "x86-64-v3", "x86-64-v4"] = "host"
    """CPU instructions that the code may use: an x86-64 level runs on every CPU of that level; `host` is the highest level that the exporting CPU has; `native` is everything that CPU has."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that the compiled loops fork. None = as many as torch uses where it is exported. Matrix products ask at run time."""
    hoist: bool = False
    """Computes what does not depend on the latents before the loop: text projections once a picture, modulation for all steps at once. A denoiser that is exported alone stays whole."""
    channels_last_vae: bool = True
    """The VAE's images in channels-last order; videos stay as they are."""
    inductor: Flags = Field(default={})
    """Flags of `torch._inductor.config` by their dotted names, compared with the installed torch."""
    options: Flags = Field(default={})
    """Options of the backend, by the names on the page of backends."""


class VerifyReference(RecipeTable):
    """Where the pipeline runs that an artifact is held against, and in what."""

    device: Literal["cpu", "cuda"] | None = None
    """None = that of `compile.device`."""
    dtype: Literal["float32", "float16"] = "float32"
    """float16 takes half the memory of a GPU, and is eight times finer than bfloat16."""


class Verify(RecipeTable):
    """What the artifact must reach against the eager pipeline, or the export fails."""

    budget: str = Field(default="10m", pattern=DURATION)
    """The time that the comparison may take, `90s`, `10m` or `2h`: it draws as much as fits, and says what it left out. `full` = all."""
    reference: VerifyReference = VerifyReference()
    """Where the pipeline runs that the artifact is held against, and in what. Without a device it is `compile.device`; float16 takes half the memory of a GPU."""
    evaluation_error: float = Field(default=1.5, gt=0)
    """The largest mean error of one evaluation at equal inputs, in units of what eager bfloat16 loses there."""
    worst_evaluation_error: float = Field(default=2.5, gt=0)
    """The same of the worst evaluation."""
    picture_error: float = Field(default=1.5, gt=0)
    """The largest mean error of a picture without cache, in units of what a picture of eager bfloat16's loses."""
    worst_picture_error: float = Field(default=2.0, gt=0)
    """The same of the worst picture, in units of the worst of eager bfloat16's."""
    cached_psnr_db: float | None = Field(default=None, gt=0)
    """The least mean PSNR of a cached plan's pictures to those of the plan without cache; needed where there is a cache."""
    worst_cached_psnr_db: float | None = Field(default=None, gt=0)
    """The same of the worst picture. None = not gated."""
    cache_gate: Literal["calibrated", "always"] = "calibrated"
    """Where the two thresholds of a cache decide: `calibrated` = for models that the artifact has a calibration of, or that bring their own checker; elsewhere they are reported."""
    prompt_accuracy_drop: float | None = Field(default=None, ge=0)
    """In points, for models that come with a checker. None = not gated."""
    accuracy_prompts: int = Field(default=64, ge=1)
    """How many of the model's checked prompts an export measures; `prebake verify --source` measures all."""
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Empty = the model's own set."""
    seeds: int = Field(default=4, ge=1)
    """Each prompt is drawn with seeds 0 to `seeds` - 1."""


class Recipe(RecipeTable):
    """What is asked for, complete: every default filled in."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the recipe is called."""
    description: str
    """What it does, in one line."""
    lossless: bool = False
    """A promise: nothing is quantized and nothing cached, or the recipe is refused."""
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
    if r.verify.reference.dtype == "float16" and (r.verify.reference.device or r.compile.device) == "cpu":
        yield (
            ("verify.reference", "compile.device"),
            'reference.dtype = "float16" is not possible on device "cpu"; use "float32", or reference.device = "cuda"',
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
    if r.guidance.batched and r.cache.needs_planes:
        yield (
            ("guidance.branches", "cache.method"),
            f'branches = "batched" runs both branches at once, and cache method "{r.cache.method}" skips the unconditional '
            'one; set guidance.branches = "sequential", or cache.is_guidance_distilled = true to extrapolate attentions alone',
        )
    if r.shapes.is_ranged and r.cache.needs_planes:
        yield (
            ("cache.method", "shapes.height", "shapes.width"),
            f'cache method "{r.cache.method}" splits latents by frequency with tables of one size, and shapes has a range; list the sizes '
            "as shapes.sizes, or take another cache",
        )
    for steps in r.sampler.steps or ():
        try:
            _ = r.cache.expand(steps) if isinstance(r.cache, Mask) else ()
        except RecipeError as e:
            yield ("cache.mask", "sampler.steps", "cache.order"), str(e)


def _broken_promises(r: Recipe) -> Iterator[RecipeProblem]:
    """A recipe that says `lossless = true` may not quantize or cache; what a dtype loses, `verify` measures."""
    chosen = {
        "quantize.method": r.quantize.method,
        "quantize.text_encoders": r.quantize.text_encoders,
        "quantize.vae": r.quantize.vae,
        "cache.method": r.cache.method,
    }
    for path, method in chosen.items():
        if r.lossless and method != "none":
            yield (
                (path, "lossless"),
                f'{path.partition(".")[2]} = "{method}" loses something, and recipe {r.name!r} says lossless = true; take another recipe or copy this one',
            )


def _ungated_caches(r: Recipe) -> Iterator[RecipeProblem]:
    """A cache whose result nobody would measure, or must beat the plan that it approximates."""
    floor = r.verify.cached_psnr_db
    if r.cache.method != "none" and floor is None:
        yield (
            ("cache.method", "verify.cached_psnr_db"),
            f'cache method "{r.cache.method}" has no threshold to be verified against; set verify.cached_psnr_db',
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
