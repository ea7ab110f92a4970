"""Bounds of what an artifact may say: every number, name and list of a manifest and of its plans has one, in its schema.

A manifest is read before any hash or signature is looked at, so nobody vouches for it yet: whatever it says must cost little to
read and to check. The bounds lie far above what any model needs. `manifest.py`, `plan.py`, `prompts.py` and `families/` use
these types.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

MAX_MANIFEST_BYTES = 16 << 20  # one of a large model has 2 MB
MAX_PLAN_BYTES = 32 << 20  # one of 1,000 steps that can begin anywhere has 10 MB
MAX_TOKENIZER_BYTES = 64 << 20  # Gemma's has 34 MB
MAX_NESTING = 64  # objects and lists in one another
MAX_ITEMS = 100_000  # of one list or object
MAX_VALUES = 1_000_000  # of all of them
MAX_STEPS = 10_000
MAX_TOKENS = 8192  # of one text
MAX_BATCH = 64  # pictures at once
MAX_LATENTS = 1 << 28  # numbers in one picture's, which are drawn on the CPU
MAX_EMBEDDING = 1 << 26  # numbers in one text's
MAX_FLOAT32 = 3.4028234663852886e38
MAX_TENSOR_NUMBERS = 1 << 36
NESTED_TOO_DEEP = f"objects and lists lie in one another more than {MAX_NESTING} deep"

T = TypeVar("T", bound=Hashable)


def refuse_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    """The values. Raises ValueError where one occurs twice."""
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"{value!r} occurs {count} times")
    return values


def refuse_large_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape. Raises ValueError where a tensor of it has more numbers than any machine can keep."""
    numbers = 1
    for size in shape:
        numbers *= size
    if numbers > MAX_TENSOR_NUMBERS:
        raise ValueError(f"expected at most {MAX_TENSOR_NUMBERS} numbers in a tensor, this shape has {numbers}")
    return shape


def parse_json(data: bytes) -> Any:
    """What the JSON says. Raises ValueError for what is none, and for more of it than any artifact needs."""
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:  # known before any of it takes memory
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        parsed = json.loads(data.decode("utf-8"))
    except RecursionError as e:
        raise ValueError(NESTED_TOO_DEEP) from e
    level = [parsed]
    for _ in range(MAX_NESTING + 1):
        inside: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                if len(outer) > MAX_ITEMS:
                    raise ValueError(f"an object in it has {len(outer)} keys, at most {MAX_ITEMS} are read")
                inside += outer.values()
            elif isinstance(outer, list):
                inside += outer
        if not inside:
            return parsed
        level = inside
    raise ValueError(NESTED_TOO_DEEP)


Name = Annotated[str, Field(max_length=4096)]
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_ITEMS, fail_fast=True), AfterValidator(refuse_repeats)]
"""Each of them once."""
Count = Annotated[int, Field(ge=0, le=1 << 62)]
"""FLOPs, bytes, calls."""
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Pixels = Annotated[int, Field(ge=1, le=1 << 20)]
"""A length in pixels, or a number of frames."""
Area = Annotated[int, Field(ge=1, le=1 << 40)]
"""In square pixels."""
Shape = Annotated[
    tuple[Annotated[int, Field(ge=0, le=1 << 31)], ...],
    Field(max_length=8, fail_fast=True),
    AfterValidator(refuse_large_shape),
]
Float32 = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
"""What does not overflow in float32, in which it is computed with."""
Float64 = Annotated[float, Field(ge=-sys.float_info.max, le=sys.float_info.max)]
PlainInteger = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
"""What a pipeline may give its denoiser beside tensors."""
