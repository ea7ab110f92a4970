"""`compile.options`: keys of a recipe that a backend gives their meaning. Each backend has a table of its own, read here."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from ...runtime.errors import RecipeError, describe_schema_error
from ..tables import RecipeTable

OptionsT = TypeVar("OptionsT", bound=RecipeTable)


DEFAULT_OPSET = 21
"""Of ONNX's operators, by default. From 23 on there is an `Attention`, which fails in TensorRT-RTX 1.7 inside an `If`."""


class OnnxOptions(RecipeTable):
    """Options of every backend that goes by `onnx/graph.py`. `opset` is the ONNX operator set: 23 has attention as one operator, 21
    writes it as products and a softmax, for the backend to find again."""

    opset: Literal[21, 23] = DEFAULT_OPSET


def read_options(config: Any, table: type[OptionsT]) -> OptionsT:
    """The recipe's `compile.options` as a backend's table. Raises RecipeError, naming those that the backend has, for what is not one."""
    try:
        return table.model_validate(config.options)
    except ValidationError as e:
        known = ", ".join(table.model_fields) or "none"
        raise RecipeError(f"{describe_schema_error('compile.options', e)}; options of this backend: {known}") from e


def refuse_range(recipe: Any, why: str) -> None:
    """Raises RecipeError where the recipe asks for a range of sizes of something whose code is for one; `why` names it."""
    if recipe.shapes.is_ranged:
        raise RecipeError(
            f"shapes.height, shapes.width: expected a number each, got a range: {why}; list the sizes instead, as shapes.sizes"
        )
