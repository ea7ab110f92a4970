"""Several exports in one run: what is asked for, as command line and matrix file say it, and the report of how it went.

A row is what one command line could ask for. All rows are tried, whatever becomes of those before; the run's exit code is
that of the worst, in the order of `WORST_FIRST`. `cli_export.py` runs the rows.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...runtime.errors import RecipeError
from ...runtime.text import align_columns

ENTRY_KEYS = {"recipe": str, "model": str, "set": list, "output": str}
WORST_FIRST = (1, 2, 3, 5, 4, 0)  # from what nobody foresaw to what may be tolerated: a missed threshold alone is 4
EXIT_WORDS = {0: "done", 1: "bug", 2: "bad input", 3: "cannot export", 4: "misses", 5: "refused"}


@dataclass(frozen=True)
class ExportRow:
    """One export that is asked for. `model` and `output` are None where the recipe says."""

    recipe: str
    model: str | None = None
    overrides: tuple[str, ...] = ()
    output: Path | None = None


@dataclass(frozen=True)
class RowOutcome:
    """The outcome of a row: `result` is that of one `prebake export --json`, `errors` are its lines on stderr."""

    row: ExportRow
    code: int
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()


def read_matrix(path: Path, model: str | None, overrides: Sequence[str]) -> tuple[ExportRow, ...]:
    """The rows of a matrix file, with the command line's `--model` where a row has none and its `--set` before a row's own.

    Raises RecipeError with every problem of the file.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as e:
        raise RecipeError(f"--matrix {path}: expected a TOML file, but {e.strerror}; see docs/how-to/ci.md") from e
    except ValueError as e:  # of TOML or of UTF-8
        raise RecipeError(f"--matrix {path}: not valid TOML: {e}") from e
    entries = data.get("export")
    if set(data) != {"export"} or not isinstance(entries, list) or not entries:
        raise RecipeError(
            f"--matrix {path}: expected one [[export]] table or more, and nothing else; it has {_keys_text(data)}"
        )
    problems = [
        f"--matrix {path} [export.{i}]: {said}" for i, entry in enumerate(entries) for said in _entry_problems(entry)
    ]
    if problems:
        raise RecipeError("\n".join(problems))
    return tuple(
        ExportRow(
            entry["recipe"],
            entry.get("model", model),
            (*overrides, *entry.get("set", ())),
            Path(entry["output"]) if "output" in entry else None,
        )
        for entry in entries
    )


def _keys_text(data: dict[str, Any]) -> str:
    return ", ".join(map(repr, data)) or "none"


def _entry_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"expected a table, got {entry!r}"
        return
    for key in sorted(entry.keys() - ENTRY_KEYS.keys()):
        yield f"unknown key {key!r}; known keys: {', '.join(ENTRY_KEYS)}"
    if "recipe" not in entry:
        yield "expected a recipe, found none"
    for key, kind in ENTRY_KEYS.items():
        value = entry.get(key)
        if value is not None and not isinstance(value, kind):
            yield f"expected {'a list of texts' if kind is list else 'a text'} for {key}, got {value!r}"
        elif kind is list and not all(isinstance(text, str) for text in value or ()):
            yield f"expected a list of texts for {key}, got {value!r}"


def check_outputs(outputs: Iterable[Path]) -> None:
    """Raises RecipeError where two rows would write the same folder."""
    seen: set[Path] = set()
    for output in outputs:
        if output.resolve() in seen:
            raise RecipeError(
                f"{output}: two exports would be written there; give each an output of its own in a --matrix"
            )
        seen.add(output.resolve())


def worst_code(codes: Iterable[int]) -> int:
    """The exit code of a run: the first of `WORST_FIRST` that occurs."""
    return min(codes, key=WORST_FIRST.index)


def summary_lines(tried: Sequence[RowOutcome]) -> list[str]:
    """The lines of the table at the end: a row each, with where the artifact is, or the first line of what is wrong."""
    rows = [("recipe", "model", "result", "seconds", "")]
    for one in tried:
        said = one.errors[0] if one.errors else one.result.get("artifact", "")
        rows.append((one.row.recipe, one.row.model or "", EXIT_WORDS[one.code], f"{one.seconds:.1f}", said))
    return align_columns(rows, right=(3,))


def matrix_json(tried: Sequence[RowOutcome], code: int) -> dict[str, Any]:
    """The report: the run's exit code, and for each row what was asked for, its own exit code, and its result or errors."""
    return {
        "exit_code": code,
        "exports": [
            {
                "recipe": one.row.recipe,
                "model": one.row.model,
                "set": list(one.row.overrides),
                "exit_code": one.code,
                "errors": list(one.errors),
                "result": one.result or None,
                "elapsed_s": round(one.seconds, 2),
            }
            for one in tried
        ],
    }


def junit_xml(tried: Sequence[RowOutcome]) -> str:
    """The report as JUnit XML: a missed threshold is a failure, anything else that is wrong an error."""
    failures, errors = (sum(failure_kind(one) == word for one in tried) for word in ("failure", "error"))
    counts = {"tests": str(len(tried)), "failures": str(failures), "errors": str(errors)}
    seconds = f"{sum(one.seconds for one in tried):.2f}"
    root = ElementTree.Element("testsuites", counts | {"time": seconds})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "prebake export", **counts, "time": seconds})
    for one in tried:
        name = " ".join(filter(None, (one.row.recipe, one.row.model, *one.row.overrides)))
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": "prebake.export", "name": printable_text(name), "time": f"{one.seconds:.2f}"},
        )
        if said := failure_kind(one):
            attributes = {"type": EXIT_WORDS[one.code], "message": printable_text(one.errors[0])}
            ElementTree.SubElement(case, said, attributes).text = printable_text("\n".join(one.errors))
        elif one.result:
            ElementTree.SubElement(case, "system-out").text = printable_text(json.dumps(one.result, ensure_ascii=False))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def failure_kind(one: RowOutcome) -> str | None:
    return None if one.code == 0 else "failure" if one.code == 4 else "error"


def printable_text(text: str) -> str:
    """The text without what XML 1.0 cannot hold, such as terminal control codes."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
