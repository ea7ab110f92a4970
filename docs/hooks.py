"""What the site takes from the code, so that no page can go stale: the reference of recipe keys, commands, Python names and errors.

A page says `<!-- generated: NAME -->` where NAME is a key of GENERATED, or `<!-- include: FILE -->` for a file of the repository.
Links to files that are no pages become plain text: the site holds no source. mkdocs calls `on_startup` and `on_page_markdown`.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import importlib
import inspect
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args
from unittest import mock

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE_OF = {"artifacts/README.md": "reference/artifact-format.md"}
"""Files of the repository that a page includes."""


# --- mkdocs ----------------------------------------------------------------------------------------------------------


def on_startup(**_: Any) -> None:
    """mkdocstrings reads source under `prebake/`, which an editable installation does not have as a folder: here is one of links."""
    tree = Path(tempfile.mkdtemp(prefix="prebake-docs-"))
    package = tree / "prebake"
    package.mkdir()
    places = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
    for name, place in places.items():
        if name == "prebake":
            for entry in (ROOT / place).glob("*.py"):
                (package / entry.name).symlink_to(entry)
        elif re.fullmatch(r"prebake\.\w+", name):
            (package / name.partition(".")[2]).symlink_to(ROOT / place)
    sys.path.append(str(tree))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    markdown = relinked(markdown, f"docs/{here}", here)
    markdown = re.sub(r"<!-- include: (\S+) -->", lambda found: included(found[1], here), markdown)
    return re.sub(r"<!-- generated: (\S+) -->", lambda found: GENERATED[found[1]](), markdown)


def included(file: str, here: str) -> str:
    """A file of the repository without its title, which is the page's."""
    text = (ROOT / file).read_text("utf-8").partition("\n")[2]
    return relinked(text, file, here)


def relinked(markdown: str, source: str, here: str) -> str:
    """The text of `source`, a path in the repository, with its links as the page `here` needs them; code is left alone."""

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if not (ROOT / path).exists():
            return found[0]  # mkdocs says what is wrong with it
        page = PAGE_OF.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None or (ROOT / path).is_dir():
            return label
        return f"[{label}]({os.path.relpath(page, os.path.dirname(here) or '.')}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    pattern = r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)"
    return "".join(part if k % 2 else re.sub(pattern, link, part) for k, part in enumerate(parts))


# --- the command line ------------------------------------------------------------------------------------------------


@cache
def main() -> Callable[[list[str]], int]:
    """The function behind the command `prebake`."""
    (found,) = entry_points(group="console_scripts", name="prebake")
    return found.load()


@cache
def parser() -> argparse.ArgumentParser:
    """The parser of `prebake`, as its main function makes it."""
    made: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: Any) -> None:
        made.append(self)
        raise KeyboardInterrupt  # nothing of the command is to run

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse), contextlib.suppress(KeyboardInterrupt):
        main()([])
    return made[0]


def commands() -> Mapping[str, argparse.ArgumentParser]:
    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return group.choices


def command_line() -> str:
    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in group._choices_actions}
    head = table(
        ("command", "what it does"),
        ([f"[`prebake {n}`](#prebake-{n})", escaped(h)] for n, h in helps.items()),
    )
    return "\n".join([head, *(command(name, one) for name, one in commands().items())])


def command(name: str, one: argparse.ArgumentParser) -> str:
    with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
        usage = one.format_usage().removeprefix("usage: ")
    said = escaped(one.description or "")
    rows = [[spelled(a), escaped((a.help or "") % {"default": a.default})] for a in one._actions if a.dest != "help"]
    return f"## prebake {name} {{ #prebake-{name} }}\n\n{said}\n\n```text\n{usage}```\n\n{table(('argument', 'meaning'), rows)}"


def spelled(action: argparse.Action) -> str:
    """`--set table.key=value`, or the name of what has no dashes."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    shown = value if isinstance(value, str) else " ".join(value)
    if not action.option_strings:
        return code(shown)
    return code(action.option_strings[-1] + ("" if action.nargs == 0 else f" {shown}"))


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    """Every table of a recipe and every key, from the pydantic types: type, default, and what their docstrings say."""
    from prebake.exporter.recipe.schema import Recipe

    tables = recipe_tables()
    parts = ["## Top level { #top-level }\n", keys_of(Recipe, only=[n for n in Recipe.model_fields if n not in tables])]
    for name, kinds in tables.items():
        for method, kind in kinds.items():
            title = f"[{name}]" if len(kinds) == 1 else f'[{name}] method = "{method}"'
            anchor = name if len(kinds) == 1 else f"{name}-{method}"
            if len(kinds) > 1 and method == next(iter(kinds)):
                parts.append(f"## [{name}] {{ #{name} }}\n\nThe key `method` picks one of the tables below.\n")
            level = "##" if len(kinds) == 1 else "###"
            parts.append(f"{level} {title} {{ #{anchor} }}\n\n{prose(kind)}\n\n{keys_of(kind)}")
    return "\n".join(parts)


def recipe_tables() -> dict[str, dict[str, Any]]:
    """The types of each table of a recipe by their `method`; a table of one type has it under ''."""
    from pydantic import BaseModel

    from prebake.exporter.recipe.schema import Recipe

    found: dict[str, dict[str, Any]] = {}
    for name, field in Recipe.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        if all(inspect.isclass(kind) and issubclass(kind, BaseModel) for kind in kinds):
            methods = (kind.model_fields.get("method") for kind in kinds)
            found[name] = {m.default if m else "": kind for m, kind in zip(methods, kinds, strict=True)}
    return found


def keys_of(kind: Any, only: list[str] | None = None) -> str:
    schema = kind.model_json_schema()
    shared = schema.get("$defs", {})
    rows = []
    for name, field in schema["properties"].items():
        if only is None or name in only:
            default = "required" if name in schema.get("required", ()) else code(toml(field.get("default")))
            rows.append([code(name), escaped(typed(field, shared)), default, escaped(field.get("description", ""))])
    described = any(row[3] for row in rows)
    head = ("key", "type", "default", "meaning")[: 4 if described else 3]
    return table(head, (row[: len(head)] for row in rows))


def typed(field: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """A JSON schema's type in a few words, with its bounds."""
    if "const" in field:
        return toml(field["const"])
    if "enum" in field:
        return ", ".join(map(toml, field["enum"]))
    if "anyOf" in field:
        return " or ".join(t for t in (typed(one, shared) for one in field["anyOf"]) if t != "none")
    if "$ref" in field:
        properties = shared[field["$ref"].rpartition("/")[2]]["properties"]
        return "{ " + ", ".join(f"{name} = {typed(f, shared)}" for name, f in properties.items()) + " }"
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "null": "none",
    }
    kind = field.get("type", "any value")
    if kind == "array":
        inner = field.get("items") or {}
        return f"list of {typed(inner, shared)}" if inner else "list"
    if kind == "object":
        return "table of names and values"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[bound]:g}" for bound, sign in bounds.items() if bound in field]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }" if value else "{ }"
    return f'"{value}"' if isinstance(value, str) else str(value)


# --- Python ----------------------------------------------------------------------------------------------------------


def api() -> Iterator[tuple[str, str]]:
    """(the name that users write, where its code is) of each public function and class: of `prebake`, else of its runtime."""
    module = importlib.import_module("prebake")
    if not hasattr(module, "__all__"):
        module = importlib.import_module("prebake.runtime")
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.isfunction(found) or (inspect.isclass(found) and not issubclass(found, Exception)):
            yield f"{module.__name__}.{name}", f"{found.__module__}.{found.__qualname__}"
    pipeline = importlib.import_module("prebake.runtime.pipeline")
    seen = {"Pipeline", "ImagePipeline", "VideoPipeline", "PipelineOutput", "VideoOutput"} & set(vars(pipeline))
    for name in sorted(seen):
        yield name, f"prebake.runtime.pipeline.{name}"


def python() -> str:
    parts = []
    seen: set[str] = set()
    for name, place in api():
        if place in seen:
            continue
        seen.add(place)
        options = [f"    heading: {name}", f"    toc_label: {name.rpartition('.')[2]}"]
        if "Pipeline" in name.rpartition(".")[2] and "Output" not in name:
            options += ["    members_order: source", '    filters: ["!^_[^_]", "!^__init__$"]']
        parts.append("\n".join([f"::: {place}", "    options:", *("  " + option for option in options)]))
    return "\n\n".join(parts)


def exit_codes() -> list[tuple[str, str]]:
    """As the end of `prebake --help` lists them."""
    return re.findall(r"^ +(\d+)  (.+)$", parser().epilog or "", re.MULTILINE)


def errors() -> str:
    """The exit codes, and every error with its parent, its code and what it means."""
    from prebake.runtime import PrebakeError

    codes = table(("code", "meaning"), ([number, escaped(meaning)] for number, meaning in exit_codes()))
    kinds = [*descendants(PrebakeError)]
    attributes = {"exit_code": "exit code", "http_status": "HTTP status"}
    shown = {name: head for name, head in attributes.items() if any(hasattr(kind, name) for kind in kinds)}
    rows = (
        [
            code(k.__name__),
            code(k.__bases__[0].__name__),
            *(str(getattr(k, n, "")) for n in shown),
            " ".join(prose(k).split()),
        ]
        for k in kinds
    )
    classes = table(("class", "parent", *shown.values(), "meaning"), rows)
    return f"## Exit codes\n\n{codes}\n## Exceptions\n\n{classes}"


def descendants(kind: type) -> Iterator[type]:
    """The class, and below it those of prebake."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__.startswith("prebake."):
            yield from descendants(child)


# --- Markdown --------------------------------------------------------------------------------------------------------


def prose(thing: Any) -> str:
    """Its docstring, a line for each paragraph."""
    return "\n\n".join(escaped(" ".join(part.split())) for part in (inspect.getdoc(thing) or "").split("\n\n"))


def table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |\n" for line in lines)


def code(text: str) -> str:
    """In HTML, since a `|` between backticks ends a cell of a table."""
    return f"<code>{plain(text)}</code>"


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, but for what stands between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(code(part[1:-1]) if k % 2 else plain(part) for k, part in enumerate(parts))


def plain(text: str) -> str:
    return re.sub(r"[|*_\[\\`]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


GENERATED: Mapping[str, Callable[[], str]] = {
    "cli": command_line,
    "errors": errors,
    "python": python,
    "recipe": recipe_keys,
}
