"""int8 in the text encoders and in the VAE, as `quantize.text_encoders` and `quantize.vae` say.

Which layer goes by its role, and every Linear and convolution gets a reason. In a text encoder attention and feed-forward hold
nearly all weights; an embedding is read by rows, and a projection of the pooled text runs on one row. In a VAE the
convolutions do; the first and the last have few channels and carry the whole signal.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ...runtime.errors import ExportError, RecipeError
from ..lower import int8_weights
from ..quantize import Int8Dynamic

if TYPE_CHECKING:
    from ..lower import Backend

TEXT_ROLE_PATTERNS = (
    (re.compile(r"\.(SelfAttention|self_attn|attention)\.\w+$"), "attention"),
    (re.compile(r"\.(DenseReluDense|mlp|feed_forward)\.\w+$"), "feed-forward"),
    (re.compile(r"(^|\.)text_projection$"), "projection of one row"),
)
"""T5's names, CLIP's, and those of most others in transformers."""
VAE_ENDS = re.compile(r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv)$")
WEIGHTS_TREATMENT = "int8 weights"
"""What a layer is said to be whose weights alone are quantized."""
GPU_FEATURE_MULTIPLE = 16
"""Of a product of int8 on a GPU, see `lower/aoti/cuda.py`."""
Treatment = tuple[str, str]


def quantize_text_encoders(pipe: Any, recipe: Any, backend: Backend) -> dict[str, Treatment]:
    """Quantizes all text encoders in place; layer -> treatment, by names such as `text_encoder_2.encoder.block.0...`; nothing where
    the recipe leaves them alone. Raises ExportError where no layer qualifies, RecipeError where there is no text encoder."""
    mode, said = recipe.quantize.text_encoders, {}
    if mode == "none":
        return said
    encoders = {n: m for n, m in pipe.components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)}
    if not encoders:
        raise RecipeError("quantize.text_encoders: the pipeline has none; set quantize.text_encoders=none")
    for component, encoder in encoders.items():
        layers = {n: m for n, m in encoder.named_modules() if type(m) is nn.Linear}
        treatments = {name: choose_text_treatment(component, name, m, recipe) for name, m in layers.items()}
        chosen = {name for name, (what, _) in treatments.items() if what != "kept"}
        if mode == "int8_weight_only":
            int8_weights.replace_layers(encoder, chosen)
        elif chosen:
            backend.quantize_layers(encoder, chosen, recipe.model_copy(update={"quantize": Int8Dynamic()}))
        said |= {f"{component}.{name}": treatment for name, treatment in treatments.items()}
    refuse_nothing("text_encoders", mode, said)
    return said


def choose_text_treatment(component: str, name: str, linear: nn.Linear, recipe: Any) -> Treatment:
    """("int8", "int8 weights" or "kept", the reason in a few words) for one Linear of a text encoder."""
    config, path = recipe.quantize, f"{component}.{name}"
    role = next((role for pattern, role in TEXT_ROLE_PATTERNS if pattern.search(path)), "other")
    if role not in ("attention", "feed-forward"):
        return "kept", role
    if any(re.search(pattern, path) for pattern in config.text_encoders_exclude):
        return "kept", "quantize.text_encoders_exclude"
    asked, came = recipe.precision.text_encoders, str(linear.weight.dtype).removeprefix("torch.")
    if asked != came:
        return "kept", f"{role}, in {came} by the model's own wish"
    sizes = linear.in_features, linear.out_features
    if config.text_encoders == "int8_weight_only":
        return WEIGHTS_TREATMENT, f"{role}, {sizes[0]}x{sizes[1]}"
    if recipe.compile.device == "cuda" and any(size % GPU_FEATURE_MULTIPLE for size in sizes):
        return "kept", f"{role}, {sizes[0]}x{sizes[1]} are no multiples of {GPU_FEATURE_MULTIPLE}"
    return Int8Dynamic.treatment, f"{role}, {sizes[0]}x{sizes[1]}"


def quantize_vae(pipe: Any, recipe: Any) -> dict[str, Treatment]:
    """The same for the VAE, whose convolutions are quantized too."""
    if recipe.quantize.vae == "none":
        return {}
    vae: Any = pipe.components["vae"]  # every family has one
    layers = {n: m for n, m in vae.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    said = {f"vae.{name}": choose_vae_treatment(name, m, recipe.quantize) for name, m in layers.items()}
    refuse_nothing("vae", recipe.quantize.vae, said)
    int8_weights.replace_layers(vae, {name for name in layers if said[f"vae.{name}"][0] != "kept"})
    return said


def choose_vae_treatment(name: str, layer: nn.Module, config: Any) -> Treatment:
    """("int8 weights" or "kept", the reason in a few words) for one layer of the VAE."""
    if VAE_ENDS.search(name):
        return "kept", "first or last convolution"
    if any(re.search(pattern, f"vae.{name}") for pattern in config.vae_exclude):
        return "kept", "quantize.vae_exclude"
    if type(layer) is nn.Linear:
        return WEIGHTS_TREATMENT, f"attention, {layer.in_features}x{layer.out_features}"
    if type(layer) is nn.Conv2d and int8_weights.is_plain_conv(layer):
        return WEIGHTS_TREATMENT, f"convolution, {layer.in_channels}x{layer.out_channels}"
    return "kept", f"{type(layer).__name__}, not a plain convolution of pictures"


def refuse_nothing(key: str, mode: str, said: dict[str, Treatment]) -> None:
    """Raises ExportError where every layer is kept: what was asked for would have no effect."""
    if all(what == "kept" for what, _ in said.values()):
        reasons = "; ".join(sorted({why for _, why in said.values()})[:4])
        raise ExportError(
            f"quantize.{key} {mode!r} fits none of the {len(said)} layers ({reasons}); relax quantize.{key}_exclude, or set "
            f"quantize.{key}=none"
        )
