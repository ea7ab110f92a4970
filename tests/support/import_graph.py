"""Which file imports which, read from the source: all imports, those inside functions too, but not those for types alone."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

ImportGraph = Mapping[str, Set[str]]
"""Each file, or folder, and those that it imports."""


def list_imports(root: Path, *folders: str) -> dict[str, set[str]]:
    """File -> the files of these folders that it imports; both as paths from `root`."""
    files = {p.relative_to(root).as_posix() for folder in folders for p in (root / folder).rglob("*.py")}
    return {file: set(resolve_imports(root, file, files)) - {file} for file in sorted(files)}


def resolve_imports(root: Path, file: str, files: Set[str]) -> Iterator[str]:
    """The files that the relative imports of one mean: a module, or what a package's `__init__.py` has."""
    for node in walk_runtime(ast.parse((root / file).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(file).parents[node.level - 1]
            target = folder.joinpath(*(node.module or "").split(".")).as_posix()
            for alias in node.names:
                module = f"{target}/{alias.name}".removeprefix("./")
                places = (f"{module}.py", f"{module}/__init__.py", f"{target}.py", f"{target}/__init__.py")
                yield from [place for place in places if place in files][:1]


def walk_runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from walk_runtime(node)


def group_by_folder(graph: ImportGraph) -> dict[str, set[str]]:
    """The same between folders: `exporter/caches/common/predict.py` belongs to `exporter/caches`, `exporter/settle.py` to itself."""
    grouped: dict[str, set[str]] = {}
    for file, imported in graph.items():
        own = "/".join(file.split("/")[:2])
        grouped.setdefault(own, set()).update({"/".join(f.split("/")[:2]) for f in imported} - {own})
    return grouped


def find_circle(graph: ImportGraph) -> list[str]:
    """One circle, from a file back to itself; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return []
