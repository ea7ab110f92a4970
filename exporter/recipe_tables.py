"""A recipe's tables: what can be asked for, in diffusers' and torch's own words, checked once and then frozen.

Plain values come in (from TOML, JSON or `model_dump`), a `Recipe` comes out in which no key is unknown and no two keys
contradict each other. Defaults live on these fields and nowhere else. `recipe.py` reads the files and the `--set`
overrides; `recipe_problems.py` turns what pydantic refuses here into sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..runtime.errors import RecipeError

Dtype = Literal["float32", "bfloat16", "float16"]
Problem = tuple[tuple[str, ...], str]


class Conflicts(ValueError):
    """Values that are fine alone and not together: pairs of the keys involved (the one to change first) and a sentence.

    Keys are relative to the model that raises: `mask` inside a table, `cache.mask` from the recipe.
    """

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


def _regex(pattern: str) -> str:
    """The pattern itself; ValueError where `re` cannot compile it."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{pattern!r} is not a regular expression: {e}") from e
    return pattern


def _flat(flags: Any, prefix: str = "") -> Any:
    """`{"cpp": {"threads": 1}}` as `{"cpp.threads": 1}`, so that a TOML author may leave out the quotes."""
    if not isinstance(flags, dict):
        return flags
    flat: dict[str, Any] = {}
    for name, value in flags.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[f"{prefix}{name}"] = value
        else:
            raise ValueError(
                f"flag {prefix + name!r} is a {type(value).__name__}, expected a boolean, a number or a string"
            )
    return flat


Regex = Annotated[str, AfterValidator(_regex)]
Regexes = Annotated[tuple[Regex, ...], Field(strict=False)]
Flags = Annotated[dict[str, bool | int | float | str], BeforeValidator(_flat)]


class Table(BaseModel):
    """Strict, so that `true` is no number and "28" no count; lists are read into tuples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Table):
    """`id` is a hub id, a folder, or `shapes`, the small model that ships with prebake; `revision` pins a hub id."""

    id: str = Field(min_length=1)
    revision: str | None = None


class Precision(Table):
    """The dtype of the weights and of the arithmetic, per part."""

    denoiser: Dtype = "float32"
    text_encoders: Dtype = "float32"
    vae: Dtype = "float32"


class Fuse(Table):
    """Query, key and value as one matrix product: the same sums, one pass over the input."""

    qkv: bool = True
    vae_qkv: bool = True


class NoQuantize(Table):
    """Weights keep the denoiser's precision."""

    method: Literal["none"] = "none"


class Int8Dynamic(Table):
    """torchao's int8 weights (per channel) and int8 activations (per token, scaled as they come) in the denoiser.

    A Linear is quantized if `in_features` and `out_features` are both at least `min_width_ratio` times the model's
    inner width, `re.search` finds some `include` in its name and no `exclude`. The defaults leave alone what diffusion-fast
    leaves alone: small layers, embeddings, and the modulation layers, whose one row of work gains nothing.
    """

    method: Literal["int8_dynamic"] = "int8_dynamic"
    min_width_ratio: float = Field(default=1.0, ge=0)
    include: Regexes = (".*",)
    exclude: Regexes = ("embed", r"(^|\.)norm\w*\.linear$")


class Attention(Table):
    """Which implementation of attention is captured: `sdpa` is `torch.nn.functional.scaled_dot_product_attention`."""

    backend: Literal["sdpa"] = "sdpa"


class NoCache(Table):
    """Every step computes everything."""

    method: Literal["none"] = "none"


class PyramidAttentionBroadcast(Table):
    """Attention outputs are reused between steps; names and meaning of diffusers' `PyramidAttentionBroadcastConfig`.

    Attention computes where `timestep` is outside the open interval `spatial_attention_timestep_skip_range` and, inside
    it, at every `spatial_attention_block_skip_range`-th step. arXiv:2408.12588.
    """

    method: Literal["pab"] = "pab"
    spatial_attention_block_skip_range: int = Field(default=2, ge=2)
    spatial_attention_timestep_skip_range: Annotated[tuple[int, int], Field(strict=False)] = (100, 800)
    spatial_attention_block_identifiers: Annotated[tuple[Regex, ...], Field(strict=False, min_length=1)] = (
        "blocks",
        "transformer_blocks",
        "single_transformer_blocks",
        "layers",
        "visual_transformer_blocks",
    )

    @model_validator(mode="after")
    def _range_is_open(self) -> PyramidAttentionBroadcast:
        low, high = self.spatial_attention_timestep_skip_range
        if not 0 <= low < high <= 1000:
            raise Conflicts(
                (
                    ("spatial_attention_timestep_skip_range",),
                    f"key 'spatial_attention_timestep_skip_range': expected 0 <= low < high <= 1000, got [{low}, {high}]",
                )
            )
        return self


class Mask(Table):
    """Which steps compute (1) the transformer blocks, and which predict (0) the residual that the blocks would add.

    `mask` is a prefix, an optional group in parentheses that repeats until the steps are filled, and an optional
    suffix: `111(0001)` at 9 steps is 111000100. Without a group its length must equal the number of steps.
    `order` 0 reuses the last computed residual, 1 draws a line through the last two. `blocks` is a slice `start:stop`
    of the transformer blocks in their order of execution.
    """

    method: Literal["mask"] = "mask"
    mask: str
    order: Literal[0, 1] = 0
    blocks: str = ":"

    @model_validator(mode="after")
    def _is_well_formed(self) -> Mask:
        problems = []
        if not re.fullmatch(r"(?=.)[01]*(\([01]+\)[01]*)?", self.mask):
            problems.append(
                (
                    ("mask",),
                    f"key 'mask': expected 0s and 1s with at most one repeating group, such as '111(0001)', got {self.mask!r}",
                )
            )
        elif reason := self._starts_too_soon(self._parts()[0] + self._parts()[1] * 2 + self._parts()[2]):
            problems.append((("mask", "order"), reason))
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", self.blocks):
            problems.append(
                (
                    ("blocks",),
                    f"key 'blocks': expected a slice 'start:stop' such as ':', '1:' or '2:-1', got {self.blocks!r}",
                )
            )
        if problems:
            raise Conflicts(*problems)
        return self

    def _parts(self) -> tuple[str, str, str]:
        """Prefix, group and suffix; a mask without a group is all prefix."""
        prefix, _, rest = self.mask.partition("(")
        group, _, suffix = rest.partition(")")
        return prefix, group, suffix

    def _starts_too_soon(self, bits: str) -> str:
        """Why these steps predict from nothing, or ''."""
        if "0" not in bits[: 1 + self.order]:
            return ""
        if self.order == 0:
            return f"mask {self.mask!r} skips the first step, when there is nothing to reuse; start it with 1"
        return f"mask {self.mask!r} skips one of the first two steps, which order = 1 predicts from; start it with 11 or set order = 0"

    def expand(self, steps: int) -> tuple[bool, ...]:
        """One bool per step, True = compute. Raises RecipeError where the mask does not fit that many steps."""
        prefix, group, suffix = self._parts()
        fixed = len(prefix) + len(suffix)
        if not group and fixed != steps:
            raise RecipeError(
                f"mask {self.mask!r} is for {fixed} steps, not for {steps}; give it a repeating group, such as '111(0001)', or set sampler.steps = [{fixed}]"
            )
        if fixed > steps:
            raise RecipeError(
                f"mask {self.mask!r} needs at least {fixed} steps, not {steps}; shorten it or raise sampler.steps"
            )
        room = steps - fixed
        bits = prefix + (group * room)[:room] + suffix
        if reason := self._starts_too_soon(bits):
            raise RecipeError(f"{reason} (at {steps} steps)")
        return tuple(bit == "1" for bit in bits)


class Sampler(Table):
    """`scheduler` is the model's own or a diffusers class name; each entry of `steps` becomes one plan.

    None = what the model's own pipeline uses.
    """

    scheduler: str = "model"
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...] | None, Field(strict=False)] = None
    guidance_scale: float | None = Field(default=None, ge=0)

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
            raise Conflicts(*problems)
        return self


class Shapes(Table):
    """The sizes that the graphs are compiled for, in pixels and tokens; None = the model's own default."""

    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    max_sequence_length: int | None = Field(default=None, ge=1)
    batch: Literal[1] = 1


class Compile(Table):
    """How graphs become machine code.

    `isa` is the CPU instruction set that the code may use: an x86-64 level runs on every CPU of that level, `host` is
    the highest of them that the exporting CPU has, `native` is everything that CPU has. `threads` is how many threads
    the compiled loops fork, None = as many as torch uses where it is exported; matrix products ask at run time. `inductor`
    holds flags of `torch._inductor.config` by their dotted names; `check_inductor_flags` compares them with the installed
    torch.
    """

    backend: Literal["aoti"] = "aoti"
    device: Literal["cpu", "cuda"] = "cpu"
    isa: Literal["host", "native", "x86-64-v3", "x86-64-v4"] = "host"
    threads: int | None = Field(default=None, ge=1)
    channels_last_vae: bool = True
    inductor: Flags = {}


class Verify(Table):
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


Quantize = Annotated[NoQuantize | Int8Dynamic, Field(discriminator="method")]
Cache = Annotated[NoCache | PyramidAttentionBroadcast | Mask, Field(discriminator="method")]


class Recipe(Table):
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
    shapes: Shapes = Shapes()
    compile: Compile = Compile()
    verify: Verify = Verify()

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        if problems := [*_impossible(self), *_broken_promises(self), *_ungated(self)]:
            raise Conflicts(*problems)
        return self


def _impossible(r: Recipe) -> Iterator[Problem]:
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
    for steps in r.sampler.steps or ():
        try:
            _ = r.cache.expand(steps) if isinstance(r.cache, Mask) else ()
        except RecipeError as e:
            yield ("cache.mask", "sampler.steps", "cache.order"), str(e)


def _broken_promises(r: Recipe) -> Iterator[Problem]:
    """A recipe that says `lossless = true` may not quantize or cache; what a dtype loses, `verify` measures."""
    for table, method in (("quantize", r.quantize.method), ("cache", r.cache.method)):
        if r.lossless and method != "none":
            yield (
                (f"{table}.method", "lossless"),
                f'method = "{method}" loses something, and recipe {r.name!r} says lossless = true; take another recipe or copy this one',
            )


def _ungated(r: Recipe) -> Iterator[Problem]:
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


def variants(table: str) -> dict[str, type[Table]]:
    """The types that a table can have, by their `method`; a table of one type has it under ''."""
    annotation: Any = Recipe.model_fields[table].annotation
    types: tuple[type[Table], ...] = get_args(annotation) or (annotation,)
    return {t.model_fields["method"].default if "method" in t.model_fields else "": t for t in types}


def table_names() -> tuple[str, ...]:
    """The tables of a recipe, in the order of its file; the other keys of a `Recipe` are plain values."""
    plain = ("name", "description", "lossless")
    return tuple(name for name in Recipe.model_fields if name not in plain)
