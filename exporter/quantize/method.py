"""The bases of the tables of all quantization methods: what rewriting and the backends ask of any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..tables import RecipeTable, Regexes

if TYPE_CHECKING:
    from torch import Tensor


class QuantizeMethod(RecipeTable):
    """A table `[quantize]` of a recipe. Its method is the denoiser's; text encoders and VAE have keys of their own, whatever it is."""

    method: Any = None  # a Literal of its own in every method
    text_encoders: Literal["none", "int8_dynamic", "int8_weight_only"] = "none"
    """Attention and feed-forward of all text encoders: `int8_dynamic` as in the denoiser; `int8_weight_only` keeps their weights in int8,
    a scale for each output channel, and multiplies in `precision.text_encoders`."""
    text_encoders_exclude: Regexes = ()
    """Regular expressions: `re.search` must find none of them in the layer's name, such as
    `text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo`."""
    vae: Literal["none", "int8_weight_only"] = "none"
    """`int8_weight_only` keeps the weights of convolutions and Linear layers in int8, and computes in `precision.vae`."""
    vae_exclude: Regexes = ()
    """Regular expressions: `re.search` must find none of them in the layer's name, such as `vae.decoder.up_blocks.3.resnets.0.conv1`."""

    treatment: ClassVar[str] = "kept"
    """What a layer is said to be that it quantizes."""
    on_cpu: ClassVar[bool] = True
    """Whether CPUs multiply such weights faster than float32, and ONNX Runtime has such a product."""
    has_int8_products: ClassVar[bool] = False
    """Whether a CPU needs the flags of `isa.int8_flags`, for products that are exact."""
    gpu_capability: ClassVar[tuple[int, int]] = (0, 0)
    """The compute capability from which GPUs multiply such weights."""

    @property
    def multiplies_int8(self) -> bool:
        """Whether some product of the artifact is one of int8, in the denoiser or in a text encoder."""
        return self.has_int8_products or self.text_encoders == "int8_dynamic"

    @property
    def quantizes_convolutions(self) -> bool:
        """Whether convolutions are quantized too, which prebake's CPU kernels alone multiply."""
        return False


class DynamicQuantize(QuantizeMethod, ABC):
    """Weights of 8 bits (scaled per channel) and activations of 8 bits (per token, scaled as they come) in the denoiser.

    The defaults leave alone what diffusion-fast leaves alone: small layers, embeddings, and the modulation layers, whose one row
    of work gains nothing.
    """

    min_width_ratio: float = Field(default=1.0, ge=0)
    """A Linear is quantized if `in_features` and `out_features` are both at least this many times the model's inner width."""
    include: Regexes = (".*",)
    """Regular expressions: `re.search` must find one of them in the layer's name."""
    exclude: Regexes = ("embed", r"(^|\.)norm\w*\.linear$")
    """Regular expressions: `re.search` must find none of them in the layer's name."""

    @abstractmethod
    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K] in 8 bits, and its scales, float32 [N]."""

    @abstractmethod
    def linear_operator(self) -> Any:
        """The operator of `lower/w8a8.py` that multiplies by such a weight, for backends that know it."""

    @abstractmethod
    def multiply_on_gpu(self, tokens: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        """Tokens [T, K] times quantized `columns` [K, N], in operators that Inductor compiles for a GPU: [T, N]."""

    def torchao_config(self) -> Any:
        """torchao's configuration of the same arithmetic, for Inductor on the CPU. None where `on_cpu` is False."""
        return None
