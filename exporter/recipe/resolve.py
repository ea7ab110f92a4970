"""Recipes: a TOML file and some `--set table.key=value` come in, a checked, complete and frozen `Recipe` comes out.

Everything wrong is collected and raised once, one line per problem. The later stages may rely on a recipe without
unknown keys or contradictions; what needs torch or diffusers to be judged is in `check_inductor_flags` and
`check_scheduler`. The types are in `schema.py` and are exported from here.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from ... import recipes as shipped
from ...runtime.errors import RecipeError
from ..caches import Cache, Mask, NoCache, PyramidAttentionBroadcast
from ..quantize import Fp8Dynamic, Int8Dynamic, NoQuantize
from .problems import problem_sentences, suggest_name, unknown_name
from .schema import (
    Attention,
    Compile,
    Fuse,
    Model,
    Precision,
    Quantize,
    Recipe,
    Sampler,
    Shapes,
    Verify,
    table_names,
    table_types,
)

__all__ = [
    "Attention",
    "Cache",
    "Compile",
    "Fp8Dynamic",
    "Fuse",
    "Int8Dynamic",
    "Mask",
    "Model",
    "NoCache",
    "NoQuantize",
    "Precision",
    "PyramidAttentionBroadcast",
    "Quantize",
    "Recipe",
    "RecipeFile",
    "Sampler",
    "Shapes",
    "Verify",
    "change_recipe",
    "check_inductor_flags",
    "check_scheduler",
    "read_recipe_file",
    "recipe_folder",
    "recipe_names",
    "recipe_schema",
    "resolve",
    "to_toml",
]

# The key that says what the other keys of its table mean: another value for it drops the others that the file gave.
FLAG_TABLES = {("compile", "inductor"), ("compile", "options"), ("attach", "arguments")}  # keys that hold further keys
LEADING_KEYS = {"model": "id", "quantize": "method", "cache": "method"}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as written: where (`recipes/flux-fast.toml` for one that ships), its text, and that text parsed."""

    label: str
    text: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Override:
    """One value from the command line, and the argument that it came in."""

    argument: str
    table: str
    key: str
    value: Any


def recipe_names() -> tuple[str, ...]:
    """The recipes that ship with prebake, sorted."""
    return tuple(
        sorted(f.name[: -len(".toml")] for f in resources.files(shipped).iterdir() if f.name.endswith(".toml"))
    )


def read_recipe_file(name_or_path: str | Path) -> RecipeFile:
    """The file of a shipped recipe, or the file at a path: what ends in `.toml` or has a separator is a path.

    Raises RecipeError where there is no such recipe or file, or where it is not TOML (with the line).
    """
    given = str(name_or_path)
    if is_recipe_path(name_or_path):
        return _parse_file(given, Path(given))
    if given not in recipe_names():
        raise RecipeError(
            f"{unknown_name('recipe', given, recipe_names())}; for a file of your own give its path, ending in .toml"
        )
    return _parse_file(f"recipes/{given}.toml", resources.files(shipped) / f"{given}.toml")


def is_recipe_path(name_or_path: str | Path) -> bool:
    """Whether it is a file of the user's, and not the name of a recipe that ships."""
    given = str(name_or_path)
    return isinstance(name_or_path, Path) or given.endswith(".toml") or "/" in given or "\\" in given


def recipe_folder(name_or_path: str | Path) -> Path | None:
    """Where a file of the user's lies, None for a recipe that ships: other files that it names are looked for there."""
    return Path(name_or_path).parent if is_recipe_path(name_or_path) else None


def _parse_file(label: str, path: Any) -> RecipeFile:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise RecipeError(
            f"{label}: expected a recipe file, found {found}; the recipes that ship: {', '.join(recipe_names())}"
        )
    try:
        text = path.read_text("utf-8-sig")
        return RecipeFile(label, text, tomllib.loads(text))
    except UnicodeDecodeError as e:
        raise RecipeError(
            f"{label}: expected UTF-8 text, but {e.reason} at byte {e.start}; save the file as UTF-8"
        ) from e
    except tomllib.TOMLDecodeError as e:
        what, place = re.fullmatch(r"(.*?)(?: \(at (.*)\))?", str(e), re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        raise RecipeError(f"{label}, {place or 'somewhere'}: not valid TOML: {what}; see https://toml.io") from e


Overrides = Iterable[str] | Mapping[str, Any]  # `table.key=value` as texts, or values by `table.key`


def resolve(name_or_path: str | Path, overrides: Overrides = (), model: str | None = None) -> Recipe:
    """The recipe with every default filled in. `overrides` are `table.key=value`, later ones win; `model` is `model.id`.

    An override that changes a table's leading key (`cache.method`, `quantize.method`, `model.id`) drops the rest of
    what the file says in that table, but for keys that every method has. Raises RecipeError with one line per problem.
    """
    file = read_recipe_file(name_or_path)
    return _resolve_data(file.label, file.data, *_parse_overrides(overrides, model))


def change_recipe(recipe: Recipe, label: str, overrides: Overrides, model: str | None = None) -> Recipe:
    """Another recipe, resolved before, with `table.key=value` changed as `resolve` does; `label` says where it stands."""
    return _resolve_data(label, recipe.model_dump(mode="json"), *_parse_overrides(overrides, model))


def _resolve_data(label: str, data: Mapping[str, Any], given: Sequence[Override], problems: list[str]) -> Recipe:
    cause = None
    try:
        recipe = Recipe.model_validate(_merge_overrides(data, given))
    except ValidationError as e:
        cause, recipe = e, None
        problems += problem_sentences(e, lambda paths: _value_origin(label, paths, given))
    if problems or recipe is None:
        raise RecipeError("\n".join(problems)) from cause
    return recipe


def _parse_overrides(overrides: Overrides, model: str | None) -> tuple[list[Override], list[str]]:
    """The overrides that can be read, and a sentence for each that cannot."""
    given, problems = [], []
    for item in overrides.items() if isinstance(overrides, Mapping) else overrides:
        try:
            given.append(parse_override(item) if isinstance(item, str) else value_override(*item))
        except RecipeError as e:
            problems.append(str(e))
    if model is not None:
        other = next((o for o in given if (o.table, o.key) == ("model", "id") and o.value != model), None)
        if other:
            problems.append(f"--model {model}: {other.argument} names another model; give one of the two")
        given.append(Override(f"--model {model}", "model", "id", model))
    return given, problems


def parse_override(text: str) -> Override:
    """`cache.order=1` as an Override: a TOML value, or a bare word as a string; `sampler.steps=20,28` is a list.

    Raises RecipeError where there is no `=`, no dot, no value or no such table. Keys are checked with the recipe.
    """
    argument = f"--set {text}"
    path, equals, raw = (part.strip() for part in text.partition("="))
    table, dot, key = path.partition(".")
    if not equals or not dot or not key:
        way_out = (
            f"; did you mean {table}.method={raw}?" if raw and LEADING_KEYS.get(table) == "method" and not dot else ""
        )
        raise RecipeError(f"{argument}: expected table.key=value, such as cache.method=none{way_out}")
    if table not in table_names():
        raise RecipeError(f"{argument}: {unknown_name('table', table, table_names())}")
    if not raw:
        raise RecipeError(
            f"{argument}: expected a value after '='; leave the argument out to keep the recipe's, or write '\"\"' for an empty string"
        )
    return Override(argument, table, key, _override_value(argument, raw, _key_kind(table, key)))


def value_override(path: str, value: Any) -> Override:
    """`("sampler.steps", [20])` as an Override: a value as Python has it; one alone stands for a list of one.

    Raises RecipeError where there is no dot or no such table. Keys and values are checked with the recipe.
    """
    argument = f"overrides[{path!r}]"
    table, dot, key = str(path).partition(".")
    if not dot or not key:
        raise RecipeError(f"{argument}: expected table.key, such as 'cache.method'")
    if table not in table_names():
        raise RecipeError(f"{argument}: {unknown_name('table', table, table_names())}")
    if isinstance(value, tuple):
        value = list(value)
    if _key_kind(table, key) == "list" and not isinstance(value, list | None):
        value = [value]
    return Override(argument, table, key, value)


def _key_kind(table: str, key: str) -> Literal["text", "list", "any"]:
    """What a key holds: only strings, a list, or something that TOML's own rules tell apart."""
    field = next((t.model_fields[key] for t in table_types(table).values() if key in t.model_fields), None)
    annotation = field.annotation if field else None
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    held = [o for o in options if o is not type(None)]
    if all(o is str or (get_origin(o) is Literal and isinstance(get_args(o)[0], str)) for o in held):
        return "text"
    return "list" if any(get_origin(o) is tuple for o in held) else "any"


def _override_value(argument: str, raw: str, wanted: Literal["text", "list", "any"]) -> Any:
    value = _toml_value(raw)
    if wanted == "text":
        return value if isinstance(value, str) else raw  # a mask such as 1101 and a revision such as 12e3 stay text
    if wanted == "any" or isinstance(value, list):
        return value
    listed = _toml_value(f"[{raw}]")
    if isinstance(listed, list):
        return listed
    if "," in raw or raw.startswith("["):
        raise RecipeError(f"""{argument}: expected a TOML list, such as '["a", "b"]' with both kinds of quotes""")
    return [raw]


def _toml_value(raw: str) -> Any:
    """The TOML value that `raw` is, or `raw` itself where it is none: `true` is a bool, `pab` a string."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    return parsed["value"] if set(parsed) == {"value"} else raw


def _merge_overrides(data: Mapping[str, Any], given: Sequence[Override]) -> dict[str, Any]:
    """The file's data under the overrides, neither of them changed."""
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in data.items()}
    for o in given:
        table = merged.setdefault(o.table, {})
        if LEADING_KEYS.get(o.table) == o.key and isinstance(table, dict) and table.get(o.key) != o.value:
            for key in table.keys() - shared_keys(o.table):
                del table[key]
    for o in given:
        table = merged[o.table]
        if isinstance(table, dict):  # otherwise validation says that it is not a table
            _put_override(table, o)
    return merged


def shared_keys(table: str) -> set[str]:
    """The keys that mean the same whatever the table's leading key says: those of every method, but for it. None of a table of one
    type."""
    types = list(table_types(table).values())
    return set.intersection(*(set(t.model_fields) for t in types)) - {"method"} if len(types) > 1 else set()


def _put_override(table: dict[str, Any], o: Override) -> None:
    """`compile.inductor.cpp.threads` goes into the flags, as `attach.arguments` do, everything else into its table."""
    name, _, flag = o.key.partition(".")
    if (o.table, name) in FLAG_TABLES and flag and isinstance(table.get(name, {}), dict):
        table[name] = {**table.get(name, {}), flag: o.value}
    else:
        table[o.key] = o.value


def _value_origin(label: str, paths: Iterable[tuple[str, ...]], given: Sequence[Override]) -> str:
    """The last override that set one of `paths`, or the file and the table of the first."""
    paths = list(paths)
    for path in paths:
        for o in reversed(given):
            if (o.table, o.key.split(".")[0]) == path or (o.table, o.key) == path:
                return o.argument
    table = paths[0][0]
    return f"{label} [{table}]" if table in table_names() and len(paths[0]) > 1 else label


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors and other tools."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as a TOML file that resolves to itself. None is written by leaving the key out."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    lines = [f"{key} = {_toml_literal(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for name in table_names():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml_literal(value)}" for key, value in data[name].items() if not isinstance(value, dict)]
        for key, flags in ((k, v) for k, v in data[name].items() if isinstance(v, dict) and v):
            lines += [
                "",
                f"[{name}.{key}]",
                *(f"{_toml_key(flag)} = {_toml_literal(value)}" for flag, value in flags.items()),
            ]
    return "\n".join(lines) + "\n"


def _toml_literal(value: Any) -> str:
    """A string, number, bool, table or list of them; JSON's notation is TOML's for the first three, but for the character DEL."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_literal, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml_key(key)} = {_toml_literal(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_literal(name)


def check_inductor_flags(flags: Mapping[str, Any]) -> None:
    """Raises RecipeError, one line per flag, where the installed torch has no such flag or one of another type."""
    from ..private_torch import inductor_config  # brings torch

    known = inductor_config().get_config_copy()
    problems = []
    for name, value in flags.items():
        if name not in known:
            problems.append(
                f"[compile.inductor]: torch._inductor.config has no flag {name!r}{suggest_name(name, known).rstrip(';')}"
            )
        elif known[name] is not None and not _is_same_kind(value, known[name]):
            problems.append(
                f"[compile.inductor]: flag {name!r} is of type {type(known[name]).__name__} in torch._inductor.config, got {_toml_literal(value)}"
            )
    if problems:
        raise RecipeError("\n".join(problems))


def _is_same_kind(value: Any, default: Any) -> bool:
    """A bool is no number here; an int may stand for a float, and what is no scalar cannot be judged."""
    if not isinstance(default, bool | int | float | str):
        return True
    return type(value) is type(default) or (type(value) is int and isinstance(default, float))


def check_scheduler(name: str) -> None:
    """Raises RecipeError where `name` is neither `model` nor a scheduler class of the installed diffusers."""
    if name == "model":
        return
    import diffusers

    known = [n for n in dir(diffusers) if "Scheduler" in n and not n.startswith(("Flax", "_"))]
    if name not in known:
        raise RecipeError(
            f"[sampler]: diffusers {diffusers.__version__} has no scheduler {name!r}{suggest_name(name, known)} 'model' takes the model's own"
        )
