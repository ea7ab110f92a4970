"""The arguments of a call as what they mean: a number is Python's, NumPy's, or a tensor of one number; an unknown name is
answered with the nearest one that there is. Each function raises RequestError with the argument's name, and what came."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from ..errors import RequestError

SHOWN_CHARACTERS = 80  # of a value, in what is said of it


def whole_number(name: str, value: Any) -> int:
    """The value as an int."""
    if not is_truth_value(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise RequestError(f"{name}: expected a whole number, got {describe_argument(value)}")


def whole_number_or_none(name: str, value: Any) -> int | None:
    """The value as an int, None where the caller was silent."""
    return None if value is None else whole_number(name, value)


def real_number(name: str, value: Any) -> float:
    """The value as a float."""
    single = isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0
    number = value.item() if single else value
    if isinstance(number, numbers.Real) and not is_truth_value(value):
        try:
            return float(number)
        except OverflowError as e:
            raise RequestError(f"{name}: expected a finite number, got {describe_argument(value)}") from e
    raise RequestError(f"{name}: expected a number, got {describe_argument(value)}")


def real_number_or_none(name: str, value: Any) -> float | None:
    """The value as a float, None where the caller was silent."""
    return None if value is None else real_number(name, value)


def truth_value(name: str, value: Any) -> bool:
    """The value as a bool. What is merely true in Python, such as the text "no", is refused."""
    if is_truth_value(value):
        return bool(value)
    raise RequestError(f"{name}: expected True or False, got {describe_argument(value)}")


def is_truth_value(value: Any) -> bool:
    """Whether it is True or False, of Python, NumPy or torch."""
    return isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool))


def describe_argument(value: Any) -> str:
    """The value, briefly: an array or a tensor by its shape."""
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim:
        return f"{type(value).__name__} {list(value.shape)}"
    return f"{value!r:.{SHOWN_CHARACTERS}}"


def unknown_argument_error(name: str, taker: str, known: Collection[str]) -> RequestError:
    """The error for an argument that `taker` does not take: the nearest of those that it takes, and all of them."""
    near = get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return RequestError(f"{name}: {taker} does not take it; {meant}it takes {', '.join(known)}")
