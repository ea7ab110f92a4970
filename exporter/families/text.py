"""Text, as several families have it: encoders as graphs of one output, and how the runtime tokenizes for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PooledText(nn.Module):
    """CLIP: input_ids [1, L] -> pooled_projections [1, P]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids, output_hidden_states=False).pooler_output.contiguous(),)


class TextStates(nn.Module):
    """T5 or CLIP: input_ids [1, T] -> the last layer's encoder_hidden_states [1, T, D]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids, output_hidden_states=False)[0].contiguous(),)


def prompt_entry(name: str, tokenizer: Any, graph: str, output: str, max_length: int) -> dict[str, Any]:
    """`runtime/prompts.py`'s `Prompt`: the tokenizer stored under `name`, the graph, and the denoiser's input."""
    return {
        "tokenizer": f"tokenizers/{name}/tokenizer.json",
        "graph": graph,
        "output": output,
        "max_length": max_length,
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
    }
