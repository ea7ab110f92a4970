"""Prompts to token ids, with the tokenizer file that the model's own library wrote, and nothing of that library."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .errors import ArtifactError


class PromptTokenizer:
    """One tokenizer with a fixed length: what is shorter is padded, what is longer is cut off with a warning."""

    def __init__(self, path: Path, *, max_length: int, pad_id: int, pad_token: str):
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path}: expected a tokenizer.json, but {e}; restore the file or export again") from e
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad_token)
        self._name = path.parent.name
        self._max_length = max_length

    def __call__(self, prompt: str) -> torch.Tensor:
        """Token ids, int64 [1, L] with L = max_length. Warns with the text that did not fit."""
        encoding = self._tokenizer.encode(prompt)
        if encoding.overflowing:
            end = max(end for _, end in encoding.offsets)
            warnings.warn(
                f"the prompt is longer than {self._max_length} tokens of {self._name}; cut off: {prompt[end:].strip()!r}",
                stacklevel=2,
            )
        return torch.tensor([encoding.ids], dtype=torch.int64)
