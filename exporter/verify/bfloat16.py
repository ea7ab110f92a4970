"""Eager bfloat16: what torch computes in bfloat16, on any CPU.

A CPU without instructions for bfloat16 multiplies it up to thirty times slower than float32. The products of two bfloat16
numbers are exact in float32, so `eager_bfloat16` takes them there and rounds what comes out, once, as such instructions do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.check.machine import cpu_flags

PRODUCTS: frozenset[Any] = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
        torch.addmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
    }
)


def has_bfloat16_products() -> bool:
    """Whether torch multiplies bfloat16 on this CPU about as fast as float32: oneDNN does from AVX-512 on."""
    return {"avx512bw", "avx512vl", "avx512dq"} <= cpu_flags()


class eager_bfloat16(torch.overrides.TorchFunctionMode):
    """A context in which a model in bfloat16 multiplies on any CPU about as fast as one in float32."""

    def __init__(self) -> None:
        super().__init__()
        self._widens = not has_bfloat16_products()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if self._widens and func in PRODUCTS and is_bfloat16_on_cpu((*args, *given.values())):
            return func(
                *map(widen_tensor, args), **{name: widen_tensor(value) for name, value in given.items()}
            ).bfloat16()
        return func(*args, **given)


def is_bfloat16_on_cpu(values: Sequence[Any]) -> bool:
    """Whether a tensor among them is bfloat16 in the CPU's memory; of a mixture torch itself decides what to do."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return bool(tensors) and all(t.dtype is torch.bfloat16 and t.device.type == "cpu" for t in tensors)


def widen_tensor(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value
