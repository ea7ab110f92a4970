"""A Stable Diffusion pipeline of two levels in the layout of the original code, which single files have."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

UNET = {
    r"(resnets\.\d)\.norm1": r"\1.in_layers.0",
    r"(resnets\.\d)\.conv1": r"\1.in_layers.2",
    r"(resnets\.\d)\.norm2": r"\1.out_layers.0",
    r"(resnets\.\d)\.conv2": r"\1.out_layers.3",
    r"(resnets\.\d)\.time_emb_proj": r"\1.emb_layers.1",
    r"(resnets\.\d)\.conv_shortcut": r"\1.skip_connection",
    r"^conv_in": "input_blocks.0.0",
    r"^down_blocks\.0\.resnets\.0": "input_blocks.1.0",
    r"^down_blocks\.0\.attentions\.0": "input_blocks.1.1",
    r"^down_blocks\.0\.downsamplers\.0\.conv": "input_blocks.2.0.op",
    r"^down_blocks\.1\.resnets\.0": "input_blocks.3.0",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
    r"^up_blocks\.0\.resnets\.(\d)": r"output_blocks.\1.0",
    r"^up_blocks\.0\.upsamplers\.0": "output_blocks.1.1",
    r"^up_blocks\.1\.resnets\.0": "output_blocks.2.0",
    r"^up_blocks\.1\.attentions\.0": "output_blocks.2.1",
    r"^up_blocks\.1\.resnets\.1": "output_blocks.3.0",
    r"^up_blocks\.1\.attentions\.1": "output_blocks.3.1",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
}
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_(\w)\.": r"mid.attn_1.\1.",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.0\.": "up.1.",
    r"up_blocks\.1\.": "up.0.",
    r"(up\.\d)\.resnets": r"\1.block",
    r"(up\.\d)\.upsamplers\.0": r"\1.upsample",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
}


def original(pipe: Any) -> dict[str, Tensor]:
    """Every weight of the pipeline under its original name."""
    weights = {renamed("model.diffusion_model.{}", k, UNET): v for k, v in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        flat = ".attentions." in name and name.endswith("weight") and value.dim() == 2
        weights[renamed("first_stage_model.{}", name, VAE)] = value[:, :, None, None] if flat else value
    for name, value in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in weights.items()}


def renamed(prefix: str, name: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return prefix.format(name)
