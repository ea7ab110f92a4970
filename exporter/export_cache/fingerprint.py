"""Fingerprint: a hash of everything that a graph's machine code depends on; the export cache's key (`store.py`).

A backend compiles a captured graph with the recipe's `compile` table and sees nothing else of a recipe. So the key covers the
graph, node by node with shapes, strides and dtypes, its constants with their values, that table, and the toolchain down to the
settings of the compiler. What cannot be written down exactly has no key, and is compiled every time.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .. import lower
from ..lower import Backend
from ..lower.toolchain import toolchain_versions
from ..package.folder import tensor_digest
from ..passes.captured_graph import CapturedGraph
from ..private_torch import OpOverload, graph_specs
from ..recipe.resolve import Recipe

FORMAT_VERSION = 1
"""Of the key and of what is kept under it."""
EXACT_TYPES = (str, int, float, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
"""Arguments of operators whose `repr` leaves nothing out."""
HASHED_PACKAGES = ("sympy", "onnx", "onnx-ir", "onnxscript")
"""What writes code, besides those packages that a manifest names."""


class InexactValueError(Exception):
    """What the graph holds that has no exact description."""


def graph_fingerprint(graph: CapturedGraph, tools: str, digests: dict[int, str]) -> str | None:
    """The key in hexadecimal; None for a graph that cannot be described exactly. `tools` is that of `describe_toolchain`.

    `digests` keeps hashes of constants by the tensors' `id`, for as long as the graphs are alive: variants share theirs.
    """
    whole = hashlib.sha256(tools.encode())
    try:
        for line in graph_lines(graph, digests):
            whole.update(line.encode() + b"\n")
    except InexactValueError:
        return None
    return whole.hexdigest()


def graph_lines(graph: CapturedGraph, digests: dict[int, str]) -> Iterator[str]:
    """The graph as text. Its own name is no part of it."""
    gm, constants = graph.gm, graph.constants()
    yield f"inputs {[s.model_dump() for s in graph.inputs]!r} {[value_text(t) for t in graph.args]!r}"
    yield f"outputs {[s.model_dump() for s in graph.outputs]!r}"
    if graph.sizes:
        yield f"sizes {graph.sizes}"
    taken, given = graph_specs(gm)
    yield f"structure {taken!r} {given!r}"
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in constants:
            raise InexactValueError(f"{node.target} is no tensor")
        given = f"{exact_text(node.args)!r} {sorted(exact_text(node.kwargs).items())!r}"
        yield f"{node.op} {node.name} {operator_name(node)} {given} {value_text(node.meta.get('val'))}"
    for name, tensor in sorted(constants.items()):
        if id(tensor) not in digests:
            digests[id(tensor)] = tensor_digest(tensor)
        yield f"constant {name} {type(tensor).__name__} {digests[id(tensor)]}"


def exact_text(given: Any) -> Any:
    """The arguments, nodes by their names. Raises Unwritable for what has no exact `repr`."""

    def leaf(value: Any) -> Any:
        if isinstance(value, (*EXACT_TYPES, fx.Node)):
            return value
        raise InexactValueError(f"an argument is a {type(value).__name__}")

    return map_aggregate(given, leaf)


def operator_name(node: fx.Node) -> str:
    """The name of a node's operator. Raises InexactValueError for a function without a name of its own."""
    if isinstance(node.target, str | OpOverload):
        return str(node.target)
    module, name = getattr(node.target, "__module__", None), getattr(node.target, "__qualname__", "<")
    if module is None or "<" in name:
        raise InexactValueError(f"{node.target} has no name")
    return f"{module}.{name}"


def value_text(value: Any) -> str:
    """The text that identifies a value: of tensors all but their numbers."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.storage_offset()} {value.device}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(value_text, value))}]"
    return repr(value)


def describe_toolchain(recipe: Recipe, backend: Backend) -> str:
    """What else went into the code of all the graphs of a recipe: its `compile` table, versions, sources and settings."""
    config, depends = recipe.compile, getattr(backend, "depends", None)
    described = {
        "format": FORMAT_VERSION,
        "compile": config.model_dump(mode="json"),
        "requires": backend.requires(recipe),
        "toolchain": backend.toolchain(config),
        "versions": toolchain_versions() | {name: package_version(name) for name in HASHED_PACKAGES},
        "sources": hash_backend_sources(),
        "depends": depends(config) if depends else {},
    }
    return json.dumps(described, sort_keys=True)


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def hash_backend_sources() -> str:
    """A hash of the backends themselves: their versions do not tell what somebody has changed in them."""
    whole = hashlib.sha256()
    for path in sorted(
        p for folder in lower.__path__ for p in Path(folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")
    ):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()
