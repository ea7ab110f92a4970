"""Prompts to embeddings: token ids by the tokenizer files that the model's own library wrote, without that library, and
the text encoders' graph, which joins and pads what it gives so that the denoiser takes it as it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from tokenizers import Tokenizer

from .artifact import Artifact
from .errors import ArtifactError, RequestError
from .plan import FROZEN_CONFIG
from .replay import Tensors
from .storage.files import read_listed_file

SHOWN_CHARACTERS = 200  # characters of a text, in what is said of it: a server's log takes a line for each request


class TokenizerSettings(BaseModel):
    """One tokenizer. The text is diffusers' argument `argument`, ids enter the graph as `input`, and which of them are
    text and not padding as `mask`, where the graph wants to know. `lower` is for models trained on lower case."""

    model_config = FROZEN_CONFIG
    tokenizer: str
    argument: str = "prompt"
    input: str = "input_ids"
    mask: str | None = None
    max_length: int
    pad_id: int
    pad_token: str
    lower: bool = False


class TextSettings(BaseModel):
    """How text enters. `embeds` maps diffusers' arguments for embeddings to the denoiser's inputs, which are the graph's
    outputs. `zero_negative`: where no negative prompt is given, its embeddings are zero and not those of an empty text."""

    model_config = FROZEN_CONFIG
    graph: str = "text_encoder"
    prompts: tuple[TokenizerSettings, ...]
    embeds: dict[str, str]
    zero_negative: bool = False


class TextEncoder:
    """A `TextSettings` of an open artifact, ready to be called."""

    def __init__(self, artifact: Artifact, text: TextSettings):
        files = {entry.path for entry in artifact.manifest.files}
        if lacking := [p.tokenizer for p in text.prompts if p.tokenizer not in files]:
            raise ArtifactError(
                f"{artifact.folder}: manifest.json [pipeline.text]: {lacking[0]!r} is not in files; export again"
            )
        self.text = text
        self._device = artifact.device
        self._graph = artifact.graph(text.graph)
        self._shapes = {spec.name: spec.shape for spec in self._graph.graph.outputs}
        self._names = list(dict.fromkeys(("prompt", *(p.argument for p in text.prompts))))
        if foreign := sorted(set(text.embeds.values()) - set(self._shapes)):
            raise ArtifactError(
                f"{artifact.folder}: manifest.json [pipeline.text.embeds]: graph {text.graph!r} has no output {foreign[0]!r}; export again"
            )
        # JSON has them by name, the graph in the order of its outputs
        self._embeds = dict(sorted(text.embeds.items(), key=lambda item: list(self._shapes).index(item[1])))
        self._tokenizers = [
            PromptTokenizer(
                artifact.folder / p.tokenizer, read_listed_file(artifact.folder, artifact.manifest, p.tokenizer), p
            )
            for p in text.prompts
        ]

    @property
    def max_sequence_length(self) -> int:
        """Tokens that the last tokenizer takes: the one whose length diffusers lets its caller choose."""
        return self.text.prompts[-1].max_length

    def arguments(self, negative: bool) -> tuple[str, ...]:
        """diffusers' arguments that say what to draw and, with `negative`, what not to draw."""
        names = (*self._names, *self._embeds)
        return (*names, *(f"negative_{name}" for name in names)) if negative else names

    def __call__(self, given: Mapping[str, Any], prefix: str = "", default: str | None = None) -> list[Tensors]:
        """The denoiser's inputs, a dict of [1, ...] for each text: of `prompt` and its kin, or with the prefix
        `negative_`. `default` stands for a text that is not given.

        Raises RequestError for texts and embeddings together, for some of the embeddings, and for lists of different
        lengths.
        """
        embeds = {name: given[prefix + name] for name in self._embeds if prefix + name in given}
        names = self._names
        if embeds:
            came = [prefix + name for name in (*names, *embeds) if prefix + name in given]
            if len(embeds) < len(self._embeds) or len(came) > len(embeds):
                whole = " and ".join(prefix + name for name in self._embeds)
                raise RequestError(f"expected either {prefix}{names[0]}, or {whole}; got {', '.join(came)}")
            return self._given(embeds, prefix)
        if prefix and default is None and not any(prefix + name in given for name in names):
            return []
        first = text_list(prefix + names[0], given.get(prefix + names[0], default))
        columns = {names[0]: first}
        for name in names[1:]:
            columns[name] = text_list(prefix + name, given[prefix + name]) if prefix + name in given else first
            if len(columns[name]) != len(first):
                raise RequestError(
                    f"{prefix}{name}: expected {len(first)} texts, one for each {prefix}{names[0]}, got {len(columns[name])}"
                )
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        encoded = {row: self._encode(dict(row)) for row in dict.fromkeys(tuple(r.items()) for r in rows)}
        return [encoded[tuple(row.items())] for row in rows]

    def zeros(self) -> Tensors:
        """Embeddings that say nothing."""
        return {
            name: torch.zeros(self._shapes[name], dtype=self._graph.output_dtype(name), device=self._device)
            for name in self._embeds.values()
        }

    def _encode(self, row: Mapping[str, str]) -> Tensors:
        inputs: Tensors = {}
        for prompt, tokenize in zip(self.text.prompts, self._tokenizers, strict=True):
            ids, mask = tokenize(row[prompt.argument])
            inputs[prompt.input] = ids.to(self._device)
            if prompt.mask:
                inputs[prompt.mask] = mask.to(self._device)
        return self._graph(inputs)

    def _given(self, embeds: Mapping[str, torch.Tensor], prefix: str) -> list[Tensors]:
        """The caller's own embeddings [B, ...] as if they had been encoded here."""
        (first, one), *_ = embeds.items()
        columns: dict[str, tuple[torch.Tensor, ...]] = {}
        for name, tensor in embeds.items():
            output = self._embeds[name]
            shape = self._shapes[output][1:]
            if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape[1:]) != shape:
                came = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise RequestError(f"{prefix}{name}: expected [{', '.join(map(str, ('B', *shape)))}], got {came}")
            if len(tensor) != len(one):
                raise RequestError(
                    f"{prefix}{name}: expected a batch of {len(one)} as {prefix}{first} has, got {len(tensor)}"
                )
            dtype = self._graph.output_dtype(output)
            columns[output] = tensor.to(self._device, dtype).contiguous().split(1)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def text_list(name: str, value: object) -> list[str]:
    """The argument `name` as a list of texts. Raises RequestError for anything else."""
    each = [value] if isinstance(value, str) else value
    if not isinstance(each, list) or not each or not all(isinstance(text, str) for text in each):
        raise RequestError(f"{name}: expected a text or a list of texts, got {value!r:.{SHOWN_CHARACTERS}}")
    for text in each:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(
                f"{name}: expected a text, got half a character, {text[e.start]!r} at position {e.start}; decode the text as UTF-8"
            ) from e
    return each


class PromptTokenizer:
    """One tokenizer with a fixed length: what is shorter is padded, what is longer is cut off with a warning."""

    def __init__(self, path: Path, data: bytes, prompt: TokenizerSettings):
        """`data` is what the file holds."""
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as e:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path}: expected a tokenizer.json, but {e}; restore the file or export again") from e
        self._tokenizer.enable_truncation(prompt.max_length)
        self._tokenizer.enable_padding(length=prompt.max_length, pad_id=prompt.pad_id, pad_token=prompt.pad_token)
        self._name = path.parent.name
        self._prompt = prompt

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and the mask of what is no padding, int64 [1, L] with L = max_length. Warns with the text that did
        not fit."""
        if self._prompt.lower:
            text = text.lower().strip()
        encoding = self._tokenizer.encode(text)
        if encoding.overflowing:
            lost = text[max(end for _, end in encoding.offsets) :].strip()
            warnings.warn(
                f"the prompt is longer than {self._prompt.max_length} tokens of {self._name}; cut off: {lost[:SHOWN_CHARACTERS]!r}"
                + (f" and {len(lost) - SHOWN_CHARACTERS} characters more" if len(lost) > SHOWN_CHARACTERS else ""),
                stacklevel=2,
            )
        return torch.tensor([encoding.ids]), torch.tensor([encoding.attention_mask])
