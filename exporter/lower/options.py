"""`compile.options`: keys of a recipe that a backend gives their meaning. Each backend has a table of its own, read here."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from ...runtime.errors import RecipeError, misfit
from ..tables import Table

Chosen = TypeVar("Chosen", bound=Table)


OPSET = 21
"""Of ONNX's operators, by default. From 23 on there is an `Attention`, which fails in TensorRT-RTX 1.7 inside an `If`."""


class OnnxOptions(Table):
    """Of every backend that goes by `onnx_graph.py`. `opset` is the ONNX operator set: 23 has attention as one operator, 21
    writes it as products and a softmax, for the backend to find again."""

    opset: Literal[21, 23] = OPSET


def options(config: Any, table: type[Chosen]) -> Chosen:
    """Those of the recipe's `compile` table. Raises RecipeError, naming those that the backend has, for what is not one."""
    try:
        return table.model_validate(config.options)
    except ValidationError as e:
        known = ", ".join(table.model_fields) or "none"
        raise RecipeError(f"{misfit('compile.options', e)}; options of this backend: {known}") from e
