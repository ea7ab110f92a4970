"""LoRA files for tests: random factors for chosen layers of a pipeline, written as PEFT names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Update = Mapping[str, Tensor]
"""Component and path of a Linear layer, and what is added to its weight."""


def layer_names(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """Paths of the Linear layers whose names end so."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(tuple(ends))]


def write_lora(
    file: Path, pipe: Any, layers: Mapping[str, Sequence[str]], *, rank: int = 4, size: float = 0.1, seed: int = 0
) -> dict[str, Tensor]:
    """Writes a file that changes those layers of each component; the product that it adds to each weight, by component and path."""
    draw = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for component, names in layers.items():
        for name in names:
            weight = getattr(pipe, component).get_submodule(name).weight
            down = torch.randn(rank, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], rank, generator=draw) * size
            tensors |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
            updates[f"{component}.{name}"] = up @ down
    save_file(tensors, file)
    return updates


def write_kohya_lora(
    file: Path, pipe: Any, names: Sequence[str], *, rank: int = 4, alpha: float = 2.0
) -> dict[str, Tensor]:
    """The same for a UNet, by kohya's names, which scale the product by alpha / rank."""
    draw = torch.Generator().manual_seed(1)
    tensors, updates = {}, {}
    for name in names:
        weight = pipe.unet.get_submodule(name).weight
        down = torch.randn(rank, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5
        up = torch.randn(weight.shape[0], rank, generator=draw) * 0.1
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        updates[f"unet.{name}"] = up @ down * (alpha / rank)
    save_file(tensors, file)
    return updates
