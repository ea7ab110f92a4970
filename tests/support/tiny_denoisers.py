"""Small random denoisers of every kind that caches are written for, seeded, each as a component with named flat inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from prebake.exporter.sites.component import Component
from prebake.exporter.sites.guidance import add_guidance


class Call(nn.Module):
    """A diffusers model called by keyword, with what never changes bound."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], **constants: Any) -> None:
        super().__init__()
        self.model = model
        self.names, self.constants = names, constants

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        return self.model(**named, **self.constants, return_dict=False)[0].float()


def component(model: nn.Module, named: dict[str, Tensor], **constants: Any) -> Component:
    module = Call(model, tuple(named), **constants).eval()
    return Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "model."})


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux(*, layers: int = 1, single: int = 2) -> Component:
    """FLUX, guidance distilled: 64 image and 8 text tokens."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=layers, num_single_layers=single, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    rows = torch.arange(8)
    ids = torch.stack((torch.zeros(64), rows.repeat_interleave(8), rows.repeat(8)), 1)
    named = {
        "hidden_states": noise(1, 64, 16),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 8, 32),
        "pooled_projections": noise(1, 32),
    }
    return component(model, named, img_ids=ids, txt_ids=torch.zeros(8, 3))


def cogvideox(*, layers: int = 2) -> Component:
    """CogVideoX: 2 frames [B, F, C, H, W], joint attention; 16 x 16 latents, so that its 4 x 4 low frequencies are few."""
    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32,
        num_layers=layers, sample_width=16, sample_height=16, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    named = {
        "hidden_states": noise(1, 2, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 8, 32),
    }
    return component(model, named)


def sd3(*, layers: int = 2) -> Component:
    """Stable Diffusion 3: joint attention; its last block returns no text."""
    torch.manual_seed(2)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    named = {
        "hidden_states": noise(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 8, 32),
        "pooled_projections": noise(1, 32),
    }
    return component(model, named)


def pixart(*, layers: int = 2) -> Component:
    """PixArt-Sigma: self and cross attention; predicts the noise and its variance, [1, 8, 16, 16], cut to the noise."""
    torch.manual_seed(3)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=layers,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=32, use_additional_conditions=False,
        norm_num_groups=4,
    )  # fmt: skip
    named = {
        "hidden_states": noise(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 8, 32),
    }
    return component(model, named)


def sd_unet(**config: Any) -> Component:
    """Stable Diffusion 1.5's block types in small: cross attention in all levels but the lowest."""
    torch.manual_seed(4)
    chosen = {
        "sample_size": 16, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "cross_attention_dim": 32,
        "norm_num_groups": 4, "attention_head_dim": 4,
    } | config  # fmt: skip
    model = UNet2DConditionModel(**chosen)
    size = chosen["sample_size"]
    named = {
        "hidden_states": noise(1, 4, size, size),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 8, chosen["cross_attention_dim"]),
    }
    return unet(model, named)


def sdxl_unet(**config: Any) -> Component:
    """Stable Diffusion XL's: no attention at full resolution, several transformer blocks below, added text and time ids."""
    torch.manual_seed(5)
    chosen = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16), "layers_per_block": 2, "cross_attention_dim": 32, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    } | config  # fmt: skip
    model = UNet2DConditionModel(**chosen)
    size = chosen["sample_size"]
    pooled = chosen["projection_class_embeddings_input_dim"] - 6 * chosen["addition_time_embed_dim"]
    named = {
        "hidden_states": noise(1, 4, size, size),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 8, chosen["cross_attention_dim"]),
        "text_embeds": noise(1, pooled),
        "time_ids": torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]),
    }
    return unet(model, named)


class UNetCall(nn.Module):
    """A UNet called as its pipelines do: sample and timestep by position (DeepCache's helper reads them there)."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        sample, timestep = named.pop("hidden_states"), named.pop("timestep")
        states = named.pop("encoder_hidden_states")
        added = {"added_cond_kwargs": named} if named else {}
        return self.model(sample, timestep, encoder_hidden_states=states, return_dict=False, **added)[0].float()


def unet(model: nn.Module, named: dict[str, Tensor]) -> Component:
    module = UNetCall(model, tuple(named)).eval()
    return Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "model."})


def with_guidance(one: Component, *, planes: bool = False) -> Component:
    """Both branches of it; everything but latents, timestep and SDXL's time ids differs between them."""
    doubled = tuple(n for n in one.inputs if n not in ("hidden_states", "timestep", "time_ids"))
    shape = one.args[0].shape
    return add_guidance(one, doubled, planes=(shape[-2], shape[-1]) if planes else None)


DITS = {"flux": flux, "cogvideox": cogvideox, "sd3": sd3, "pixart": pixart}
UNETS = {"sd": sd_unet, "sdxl": sdxl_unet}
