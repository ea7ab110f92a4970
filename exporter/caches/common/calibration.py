"""A calibration: what eager runs of one model at one number of steps showed, as plain numbers in one JSON file.

`calibrators/` (torch) writes it, the data-dependent methods of `caches/` (torch-free) read it, and an artifact whose plan
rests on one carries it as `calibration.json`. Keys are those of the layout: sites such as `cond/transformer_blocks.0.attn`,
branches such as `cond` ("" where there is one). Evaluations count from 0; every tuple over evaluations has one entry each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .... import recipes
from ....runtime.errors import ExportError, RecipeError, describe_schema_error
from ....runtime.manifest import Source
from .method import CacheMethod

FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
CALIBRATION_FILE = "calibration.json"
"""The name that a calibration has in an artifact."""

CALIBRATE_COMMAND = "prebake calibrate --recipe RECIPE --model MODEL"
PART_TITLES = {"auto": "fitted plans"}
"""What a sentence calls those parts of a calibration whose key does not say it."""


class CalibratedCache(CacheMethod):
    """Base of the tables of all methods that need a calibration: `calibration` is the file that `prebake calibrate`
    wrote, looked for beside the recipe, in the current folder, and among the recipes that ship."""

    calibration: str | None = Field(default=None, min_length=1)


class FrozenCache(CalibratedCache):
    """A method that decides from the data, run after run; the plan computes where at least the share `quorum` of the
    calibration's runs did."""

    quorum: float = Field(default=0.5, gt=0, le=1)


class DecisionShares(BaseModel):
    """Decisions of a data-dependent method: `computed[key][e]` is the share of runs (a prompt with a seed each) that
    computed evaluation e. A key is a branch, or what the method decides apart inside one (`cond/transformer_blocks`)."""

    model_config = FROZEN
    parameters: dict[str, Any]
    computed: dict[str, tuple[float, ...]]


class FittedPlan(BaseModel):
    """A plan that the search found. `cost` is its share of the cost of computing every evaluation. `skips[e]` names what
    evaluation e predicts ("" where it computes), `weights[e]` the weights of the stored values by site, newest first.

    Figures are mean PSNR in dB of pictures against those of every evaluation computed: `psnr_db` on the prompts that it
    was fitted on, `held_out_psnr_db` on others, and there also `fewer_steps_psnr_db` of the most plain steps that cost no
    more, `fewer_steps`.
    """

    model_config = FROZEN
    cost: float
    skips: tuple[str, ...]
    weights: tuple[dict[str, tuple[float, ...]], ...]
    psnr_db: float
    held_out_psnr_db: float
    fewer_steps: int
    fewer_steps_psnr_db: float


class Calibration(BaseModel):
    """What was run, and what was seen; all figures are means over the runs. `height` and `width` are in pixels, None where
    they were not recorded.

    `changes`: how far a site's value moved since the evaluation before, mean|y - y'| / mean|y'|, None at evaluation 0;
    of a block it is what the block adds, of `output` the denoiser's own. `magnitudes`: MagCache's ratios of branch
    residuals, 1.0 at evaluation 0. `errors`: SmoothCache's, `errors[component][e][j - 1]` = mean|y - y'| / mean|y'| with y'
    from j evaluations before e. A component is a site, or all sites of a branch with one leaf name (`cond/attn`).
    """

    model_config = FROZEN
    schema_version: Literal[1] = 1
    model: str
    sha256: str
    scheduler: str
    steps: int = Field(ge=1)
    timesteps: tuple[float, ...]
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    guidance_scale: float
    prompts: int = Field(ge=1)
    prompts_sha256: str
    seeds: int = Field(ge=1)
    changes: dict[str, tuple[float | None, ...]] = {}
    magnitudes: dict[str, tuple[float, ...]] = {}
    errors: dict[str, tuple[tuple[float, ...], ...]] = {}
    decisions: dict[str, DecisionShares] = {}
    auto: tuple[FittedPlan, ...] = ()

    @model_validator(mode="after")
    def _has_an_entry_for_each_evaluation(self) -> Calibration:
        count = len(self.timesteps)
        for what, row in self.rows():
            if len(row) != count:
                raise ValueError(f"{what}: expected an entry for each of the {count} timesteps, got {len(row)}")
        return self

    def rows(self) -> Iterator[tuple[str, Sized]]:
        """Everything that has an entry for each evaluation, with its name in the file."""
        for table in ("changes", "magnitudes", "errors"):
            for key, row in getattr(self, table).items():
                yield f"{table}[{key!r}]", row
        for method, decisions in self.decisions.items():
            for key, row in decisions.computed.items():
                yield f"decisions[{method!r}].computed[{key!r}]", row
        for i, fitted in enumerate(self.auto):
            yield f"auto[{i}].skips", fitted.skips
            yield f"auto[{i}].weights", fitted.weights

    def to_json(self) -> str:
        """Sorted keys, floats by `repr`, one row of numbers a line: equal calibrations are equal bytes."""
        lines = []
        for key, value in sorted(self.model_dump(mode="json").items()):
            if isinstance(value, dict) and value:
                rows = (f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(value.items()))
                lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. Raises RecipeError where there is none."""
    try:
        return Calibration.model_validate_json(path.read_text("utf-8-sig"))
    except ValidationError as e:
        raise RecipeError(f"{describe_schema_error(path, e)}; make it again with `{CALIBRATE_COMMAND}`") from e
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: expected a calibration, but {e}; make one with `{CALIBRATE_COMMAND}`") from e


def find_calibration(name: str, near: Path | None) -> Path:
    """The file that a recipe calls `name`: beside the recipe (`near`, its folder), in the current folder, or among the
    recipes that ship. Raises RecipeError where it is in none of them."""
    places = [*([near] if near else []), Path(), Path(str(resources.files(recipes)))]
    for path in (place / name for place in places):
        if path.is_file():
            return path
    looked = ", ".join(dict.fromkeys(str(place.resolve()) for place in places))
    raise RecipeError(f"cache.calibration: no file {name!r} in {looked}; make one with `{CALIBRATE_COMMAND}`")


def load_calibration(cache: CacheMethod, near: Path | None) -> Calibration | None:
    """The calibration that the cache's table names, None where it names none. Raises RecipeError where it is not there."""
    name = cache.calibration if isinstance(cache, CalibratedCache) else None
    return None if name is None else read_calibration(find_calibration(name, near))


def check_calibration(calibration: Calibration, name: str, source: Source, size: PictureSize) -> None:
    """Raises RecipeError for a calibration of another model or of pictures of another size; `name` is what the cache calls it."""
    if calibration.sha256 != source.sha256:
        raise RecipeError(
            f"cache.calibration {name!r}: made of model {calibration.model!r} with sha256 {calibration.sha256[:12]}.., and this is "
            f"{source.model!r} with {source.sha256[:12]}..; run `{CALIBRATE_COMMAND}` for this model"
        )
    for side in ("height", "width"):
        made, asked = getattr(calibration, side), getattr(size, side)
        if made not in (None, asked):
            raise RecipeError(
                f"cache.calibration {name!r}: made at {side} {made}, and this is {asked}; set shapes.{side} = {made}, or run "
                f"`{CALIBRATE_COMMAND}` at this size"
            )


class PictureSize(Protocol):
    """Pixels of a picture: a family's `PictureSize`, or an artifact's `Defaults`."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


def write_calibration(path: Path, calibration: Calibration) -> None:
    """The file, in one move: a killed run leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(calibration.to_json(), "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_calibration(
    calibration: Calibration | None, cache: Any, timesteps: Sequence[float], what: str
) -> Calibration:
    """The calibration itself, if it was made at these timesteps. `what` names the part that is needed ("magnitudes").

    Raises ExportError where there is none, where it lacks that part, or where it is for other steps.
    """
    method, part = cache.method, PART_TITLES.get(what, what)
    if calibration is None:
        raise ExportError(
            f"cache.method {method!r} needs a calibration of the model ({part}); run `{CALIBRATE_COMMAND}`, and name the file that it "
            "writes in cache.calibration"
        )
    if len(calibration.timesteps) != len(timesteps):
        raise ExportError(
            f"cache.calibration: made for {calibration.steps} steps ({len(calibration.timesteps)} evaluations), and the plan has "
            f"{len(timesteps)} evaluations; set sampler.steps = [{calibration.steps}], or run `{CALIBRATE_COMMAND} --steps N`"
        )
    for e, (there, here) in enumerate(zip(calibration.timesteps, timesteps, strict=True)):
        if abs(there - here) > 1e-4 * max(abs(there), abs(here), 1.0):
            raise ExportError(
                f"cache.calibration: made with {calibration.scheduler} at timestep {there:g} of evaluation {e}, where the plan has "
                f"{here:g}; use its scheduler and size, or run `{CALIBRATE_COMMAND}` again"
            )
    if not getattr(calibration, what):
        raise ExportError(
            f"cache.calibration: has no {part}, which method {method!r} needs; run `{CALIBRATE_COMMAND}` again"
        )
    return calibration


def decision_parameters(cache: Any) -> dict[str, Any]:
    """The keys of a data-dependent method's table that its decisions depend on: all but three."""
    return cache.model_dump(mode="json", exclude={"method", "calibration", "quorum"})


def freeze_decisions(
    calibration: Calibration | None, cache: Any, keys: Sequence[str], timesteps: Sequence[float]
) -> tuple[dict[str, bool], ...]:
    """Evaluation by evaluation, which keys (branches) compute: those in which at least `cache.quorum` of the runs did.

    Raises ExportError for a calibration that is missing, or made at other steps, parameters or keys.
    """
    calibration = require_calibration(calibration, cache, timesteps, "decisions")
    made = calibration.decisions.get(cache.method)
    if made is None:
        raise ExportError(
            f"cache.calibration: has decisions of {', '.join(sorted(calibration.decisions))} and none of {cache.method!r}; run "
            f"`{CALIBRATE_COMMAND}` with the recipe that says method = {cache.method!r}"
        )
    if made.parameters != decision_parameters(cache):
        changed = describe_difference(made.parameters, decision_parameters(cache))
        raise ExportError(
            f"cache.calibration: the decisions of {cache.method!r} were made with other parameters ({changed}); run `{CALIBRATE_COMMAND}` again"
        )
    if set(made.computed) != set(keys):
        raise ExportError(
            f"cache.calibration: has decisions for {', '.join(map(repr, made.computed))}, and the model has "
            f"{', '.join(map(repr, keys))}; run `{CALIBRATE_COMMAND}` again"
        )
    return tuple({k: made.computed[k][e] >= cache.quorum for k in keys} for e in range(len(timesteps)))


def describe_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """`threshold is 0.05 there and 0.1 here`, for each key that differs."""
    keys = sorted({*there, *here})
    return "; ".join(
        f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in keys if there.get(k) != here.get(k)
    )
