"""Text, as several families have it: their encoders as one graph, and how the runtime tokenizes for it.

A family's own module takes the ids of each tokenizer and returns the denoiser's inputs, joined and padded as its
pipeline's `encode_prompt` does it; so the runtime needs no knowledge of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ...runtime.prompts import possible_ids
from ..sites.component import Component

TEXT_ENCODER = "text_encoder"
"""The graph's name."""


class TextStates(nn.Module):
    """T5 or CLIP alone: input_ids [1, T] -> the last layer's encoder_hidden_states [1, T, D]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids, output_hidden_states=False)[0].contiguous(),)


def prompt_entry(
    name: str, tokenizer: Any, max_length: int, *, mask: bool = False, lower: bool = False, inversions: bool = False
) -> dict[str, Any]:
    """`runtime/prompts.py`'s `TokenizerSettings`: the pipeline's tokenizer called `name` reads the prompt of the same number.
    `inversions`: for pipelines whose prompts may have textual inversions of several vectors."""
    number = name.removeprefix("tokenizer")
    return {
        "tokenizer": f"tokenizers/{name}/tokenizer.json",
        "argument": f"prompt{number}",
        "input": f"input_ids{number}",
        "mask": f"attention_mask{number}" if mask else None,
        "max_length": max_length,
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        "lower": lower,
        "vectors": count_vectors(tokenizer) if inversions else {},
    }


def count_vectors(tokenizer: Any) -> dict[str, int]:
    """Token -> how many vectors it has, of each textual inversion that has several: `<cat>`, `<cat>_1`, ..."""
    added, counts = tokenizer.added_tokens_encoder, {}
    for token in added:
        count = next(n for n in itertools.count(1) if f"{token}_{n}" not in added)
        if count > 1:
            counts[token] = count
    return counts


def text_component(module: nn.Module, prompts: Sequence[Mapping[str, Any]], embeds: Mapping[str, str]) -> Component:
    """The encoders' graph. `module` takes the ids of each of `prompts`, in their order, each followed by its mask where
    there is one, and returns what `embeds` names."""
    inputs: dict[str, Tensor] = {}
    for prompt in prompts:
        inputs[prompt["input"]] = torch.zeros(1, prompt["max_length"], dtype=torch.int64)
        if prompt["mask"]:
            inputs[prompt["mask"]] = torch.ones(1, prompt["max_length"], dtype=torch.int64)
    return Component(TEXT_ENCODER, module.eval(), tuple(inputs), tuple(embeds.values()), tuple(inputs.values()))


def find_tokenizers(pipe: Any, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Artifact path -> fast tokenizer, whose `tokenizer.json` is stored there."""
    folders = [prompt["tokenizer"].removesuffix("/tokenizer.json") for prompt in prompts]
    return {folder: getattr(pipe, folder.removeprefix("tokenizers/")) for folder in folders}


def refuse_ids_without_rows(pipe: Any, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Raises ExportError for a tokenizer that can give an id for which its text encoder's embedding has no row."""
    for folder, tokenizer in find_tokenizers(pipe, prompts).items():
        encoder = getattr(pipe, folder.removeprefix("tokenizers/").replace("tokenizer", "text_encoder"), None)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if encoder is None or backend is None:  # `write_tokenizers` tells of the latter
            continue
        rows = len(encoder.get_input_embeddings().weight)
        ids = {**possible_ids(backend), tokenizer.pad_token: tokenizer.pad_token_id}
        token, largest = max(ids.items(), key=lambda item: item[1])
        if largest >= rows:
            raise ExportError(
                f"{folder.removeprefix('tokenizers/')}: the token {token!r} has the id {largest}, the embedding of its text encoder "
                f"has {rows} rows; call resize_token_embeddings({largest + 1}) and save the model, or take the tokenizer that belongs to it"
            )


def refuse_attention_masks(pipe: Any, *names: str) -> None:
    """Raises ExportError for a CLIP encoder whose configuration asks for attention masks, which few have."""
    for name in names:
        encoder = getattr(pipe, name, None)
        if encoder is not None and getattr(encoder.config, "use_attention_mask", False):
            raise ExportError(
                f"{name}.config.use_attention_mask: expected false, got true: CLIP encoders are exported without masks"
            )
