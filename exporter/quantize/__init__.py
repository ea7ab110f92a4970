"""Quantization methods: one small file each, with its recipe table and what backends ask of it. A new one adds its file and a
line below. Which layers are quantized, by role, name and size, is the same for all: `rewrite/quantize.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from .method import QuantizeMethod

# isort: off
from .none import NoQuantize as NoQuantize
from .int8_dynamic import Int8Dynamic as Int8Dynamic
from .fp8_dynamic import Fp8Dynamic as Fp8Dynamic
# isort: on

METHODS = {
    table.model_fields["method"].default: table
    for table in tuple(globals().values())
    if isinstance(table, type) and issubclass(table, QuantizeMethod) and table.model_fields["method"].default
}
"""The tables imported above, by the method's name."""

if TYPE_CHECKING:
    Quantize = QuantizeMethod
else:
    Quantize = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007  (made from a tuple)
