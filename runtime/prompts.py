"""Prompts to embeddings: token ids by the tokenizer file that the model's own library wrote, without that library, and
the text encoder's graph."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from pydantic import BaseModel
from tokenizers import Tokenizer

from .artifact import Artifact
from .errors import ArtifactError
from .plan import FROZEN


class Prompt(BaseModel):
    """One way in which a prompt enters: through a tokenizer and a graph, to the denoiser's input named `output`."""

    model_config = FROZEN
    tokenizer: str
    graph: str
    output: str
    max_length: int
    pad_id: int
    pad_token: str


class TextEncoder:
    """A `Prompt` of an open artifact, ready to be called."""

    def __init__(self, artifact: Artifact, prompt: Prompt):
        if prompt.tokenizer not in {entry.path for entry in artifact.manifest.files}:
            raise ArtifactError(
                f"{artifact.folder}: manifest.json [pipeline.prompts]: {prompt.tokenizer!r} is not in files; export again"
            )
        self.output = prompt.output
        self._device = artifact.device
        self._graph = artifact.graph(prompt.graph)
        self.shape = next(spec.shape for spec in self._graph.graph.outputs if spec.name == prompt.output)
        self._tokenize = PromptTokenizer(
            artifact.folder / prompt.tokenizer,
            max_length=prompt.max_length,
            pad_id=prompt.pad_id,
            pad_token=prompt.pad_token,
        )

    def __call__(self, text: str) -> torch.Tensor:
        """The embedding, [1, ...], as the denoiser takes it."""
        return self._graph({"input_ids": self._tokenize(text).to(self._device)})[self.output]

    def given(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The caller's own embeddings [B, ...] as if they had been encoded here: [1, ...] each."""
        dtype = self._graph.output_dtype(self.output)
        return embeddings.to(self._device, dtype).contiguous().split(1)


def texts(name: str, value: object) -> list[str]:
    """The argument `name` as a list of texts. Raises ArtifactError for anything else."""
    each = [value] if isinstance(value, str) else value
    if not isinstance(each, list) or not each or not all(isinstance(text, str) for text in each):
        raise ArtifactError(f"{name}: expected a text or a list of texts, got {value!r}")
    return each


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
