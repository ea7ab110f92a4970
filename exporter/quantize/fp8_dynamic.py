"""float8_e4m3fn, as torchao's `Float8DynamicActivationFloat8WeightConfig` by rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .method import DynamicQuantize

if TYPE_CHECKING:
    from torch import Tensor


class Fp8Dynamic(DynamicQuantize):
    """In float8_e4m3fn, as torchao's `Float8DynamicActivationFloat8WeightConfig` by rows: for GPUs from compute capability 8.9 on."""

    method: Literal["fp8_dynamic"] = "fp8_dynamic"
    """Picks this table."""

    treatment: ClassVar[str] = "fp8"
    on_cpu: ClassVar[bool] = False
    gpu_capability: ClassVar[tuple[int, int]] = (8, 9)

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        from ..lower.w8a8 import quantize_rows_fp8

        return quantize_rows_fp8(weight)

    def linear_operator(self) -> Any:
        from ..lower.w8a8 import FP8_OPERATOR

        return FP8_OPERATOR

    def multiply_on_gpu(self, tokens: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        from ..lower.aoti.cuda import fp8_product

        return fp8_product(tokens, columns, scale)
