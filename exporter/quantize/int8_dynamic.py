"""Integers of 8 bits, as torchao's `Int8DynamicActivationInt8WeightConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .method import DynamicQuantize

if TYPE_CHECKING:
    from torch import Tensor


class Int8Dynamic(DynamicQuantize):
    """In integers, as torchao's `Int8DynamicActivationInt8WeightConfig`. With `convolutions` also those of a UNet's residual blocks
    and between its levels, each pixel a token: by prebake's CPU kernels alone."""

    method: Literal["int8_dynamic"] = "int8_dynamic"
    """Picks this table."""
    convolutions: bool = False
    """Also convolutions of a UNet's residual blocks and between its levels, each pixel a token: by prebake's CPU kernels alone."""

    treatment: ClassVar[str] = "int8"
    has_int8_products: ClassVar[bool] = True

    @property
    def quantizes_convolutions(self) -> bool:
        return self.convolutions

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        from ..lower.w8a8 import quantize_rows_int8

        return quantize_rows_int8(weight)

    def linear_operator(self) -> Any:
        from ..lower.w8a8 import INT8_OPERATOR

        return INT8_OPERATOR

    def multiply_on_gpu(self, tokens: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        from ..lower.aoti.cuda import int8_product

        return int8_product(tokens, columns, scale)

    def torchao_config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        # set_inductor_config would change Inductor's global flags behind the recipe's back
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
