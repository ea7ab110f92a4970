"""What is wrong with a recipe, as sentences: pydantic's errors come in, one line per problem comes out.

Each says where (the file and table, or the `--set` that brought the value), what was expected, what came, and the way
out. Used by `resolve.py`; the types are those of `schema.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from .schema import ConflictError, Recipe, table_names, table_types

RENAMED_KEYS = {
    (
        "verify",
        "psnr_db",
    ): "key 'psnr_db' is no longer read: a PSNR of rounding says nothing of an artifact. Set picture_error and "
    "worst_picture_error, in units of what eager bfloat16 loses",
    (
        "verify",
        "relative_error",
    ): "key 'relative_error' is no longer read: set evaluation_error and worst_evaluation_error, in units of what "
    "eager bfloat16 loses",
}
"""What stands in the place of keys that recipes had."""

KeyPath = tuple[str, ...]  # ("cache", "order"), ("cache",) for a whole table, ("name",) for a plain key


def problem_sentences(error: ValidationError, where: Callable[[Iterable[KeyPath]], str]) -> list[str]:
    """One line per problem, without repetition. `where` names the source of the first of some paths."""
    lines = [f"{where(paths)}: {text}" for e in error.errors() for paths, text in _explain_error(e)]
    return list(dict.fromkeys(lines))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown key 'ordr'; did you mean 'order'? known keys: mask, order`: the nearest name first, then all of them."""
    names = sorted(known)
    return f"unknown {kind} {name!r}{suggest_name(name, names)} known {kind}s: {', '.join(names)}"


def suggest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'order'?`, or `;` where nothing known is near."""
    names = list(known)
    near = get_close_matches(name, names, 1, 0.6) or [n for n in names if name and n.startswith(name)]
    return f"; did you mean {near[0]!r}?" if near else ";"


def _explain_error(e: Any) -> Iterator[tuple[list[KeyPath], str]]:
    """The paths involved (the one to change first) and the sentence, for one entry of `ValidationError.errors()`."""
    table, method, rest = _split_location(e["loc"])
    cause = e.get("ctx", {}).get("error")
    if isinstance(cause, ConflictError):
        for keys, text in cause.problems:
            yield [(table, key) if table else tuple(key.split(".")) for key in keys], text
    elif e["type"] == "extra_forbidden":
        yield [(table, *rest)], _unknown_key(table, method, rest)
    elif e["type"] == "missing" and len(rest) <= 1:
        yield [(table, *rest), (table, "method")], _missing_key(table, rest)
    elif e["type"] in ("union_tag_not_found", "union_tag_invalid"):
        yield [(table, "method"), (table,)], _method_problem(table, e["input"])
    elif e["type"] in ("model_type", "model_attributes_type"):
        yield [(table,)], f"{table!r} is a table, got {_value_text(e['input'])}; write [{table}] and its keys below it"
    else:
        yield [(table, *rest[:1])], _value_problem(rest or (table,), e)


def _split_location(loc: tuple[int | str, ...]) -> tuple[str, str, tuple[Any, ...]]:
    """Table, method (or '') and what follows, from pydantic's location, which has the method where types differ."""
    table, *rest = loc or ("",)
    types = table_types(str(table)) if table in table_names() else {}
    if len(types) > 1 and rest:
        return str(table), str(rest[0]), tuple(rest[1:])
    return str(table), "", tuple(rest)


def _unknown_key(table: str, method: str, rest: KeyPath) -> str:
    if not rest:
        plain = set(Recipe.model_fields) - set(table_names())
        return f"{unknown_name('table', table, table_names())}; keys outside of tables: {', '.join(sorted(plain))}"
    if rest[1:]:
        return f"unknown key {'.'.join(map(str, rest))!r}; see key {rest[0]!r} on the page of recipe keys"
    if renamed := RENAMED_KEYS.get((table, rest[0])):
        return renamed
    owners = [m for m, t in table_types(table).items() if rest[0] in t.model_fields]
    if owners:
        return f"key {rest[0]!r} belongs to method {owners[0]!r}, and method is {method!r}; set {table}.method to {owners[0]!r} or leave the key out"
    return unknown_name("key", rest[0], table_types(table)[method].model_fields)


def _missing_key(table: str, rest: KeyPath) -> str:
    if rest:
        return f"missing key {rest[0]!r}; add it to [{table}] or give --set {table}.{rest[0]}=..."
    if table == "model":
        return "missing table 'model'; add [model] with an id, or give --model"
    return f"missing key {table!r}; add it above the tables"


def _method_problem(table: str, got: Any) -> str:
    known = list(table_types(table))
    if "method" not in got:
        return f"missing key 'method'; add it to [{table}] or give --set {table}.method=...; known methods: {', '.join(known)}"
    if not isinstance(got["method"], str):
        return f"key 'method': expected one of {', '.join(known)}, got {_value_text(got['method'])}"
    return unknown_name("method", got["method"], known)


def _value_problem(place: tuple[Any, ...], e: Any) -> str:
    """`key 'steps' item 2: expected a valid integer, got "ten"`, from pydantic's own words."""
    key = f"key {place[0]!r}" + "".join(f" item {i + 1}" for i in place[1:] if isinstance(i, int))
    if e["type"] == "missing":
        return f"{key} is missing"
    if e["type"] == "value_error":
        return f"{key}: {e['ctx']['error']}"
    if e["type"] == "too_long":
        return f"{key}: expected {e['ctx']['max_length']} items, got {_value_text(e['input'])}"
    expected = (
        e["msg"]
        .replace("Input should be", "expected")
        .replace("valid tuple", "list")
        .replace("valid dictionary", "table")
    )
    expected = re.sub(r"^(\w)", lambda m: m[1].lower(), expected)
    allowed = re.findall(r"'([^']*)'", e.get("ctx", {}).get("expected", ""))
    hint = suggest_name(str(e["input"]), allowed).rstrip(";") if allowed else ""
    return f"{key}: {expected}, got {_value_text(e['input'])}{hint}"


def _value_text(value: Any) -> str:
    """The value as TOML would have it, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
