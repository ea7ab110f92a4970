"""Prompts to embeddings: token ids by the tokenizer files that the model's own library wrote, without that library, and
the text encoders' graph, which joins and pads what it gives so that the denoiser takes it as it is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from tokenizers import Encoding, Tokenizer

from .artifact import Artifact
from .bounds import MAX_ITEMS, MAX_TOKENIZER_BYTES, MAX_TOKENS, Name
from .errors import ArtifactError, RequestError, first_line
from .manifest import Graph
from .plan import FROZEN_CONFIG
from .replay import Tensors
from .storage.files import read_listed_file

SHOWN_CHARACTERS = 200  # characters of a text, in what is said of it: a server's log takes a line for each request


class TokenizerSettings(BaseModel):
    """One tokenizer. The text is diffusers' argument `argument`, ids enter the graph as `input`, and which of them are
    text and not padding as `mask`, where the graph wants to know. `lower` is for models trained on lower case. `embedding` is
    the graph's constant whose rows the ids are numbers of; where it is not said, that with the most rows. `vectors` are tokens of textual
    inversions that have several, and how many: `{"<cat>": 2}` reads `<cat>` as `<cat> <cat>_1`."""

    model_config = FROZEN_CONFIG
    tokenizer: Name
    argument: Name = "prompt"
    input: Name = "input_ids"
    mask: Name | None = None
    max_length: int = Field(ge=1, le=MAX_TOKENS)
    pad_id: int = Field(ge=0, lt=1 << 31)
    pad_token: Name
    lower: bool = False
    embedding: Name | None = None
    vectors: Annotated[dict[Name, Annotated[int, Field(ge=2, le=MAX_TOKENS)]], Field(max_length=MAX_ITEMS)] = {}


class TextSettings(BaseModel):
    """How text enters. `embeds` maps diffusers' arguments for embeddings to the denoiser's inputs, which are the graph's
    outputs. `zero_negative`: where no negative prompt is given, its embeddings are zero and not those of an empty text."""

    model_config = FROZEN_CONFIG
    graph: Name = "text_encoder"
    prompts: Annotated[tuple[TokenizerSettings, ...], Field(min_length=1, max_length=16)]
    embeds: Annotated[dict[Name, Name], Field(min_length=1, max_length=MAX_ITEMS)]
    zero_negative: bool = False


class TextEncoder:
    """A `TextSettings` of an open artifact, ready to be called."""

    def __init__(self, artifact: Artifact, text: TextSettings):
        self.text = text
        self._device = artifact.device
        self._graph = artifact.graph(text.graph)
        self._shapes = {spec.name: spec.shape for spec in self._graph.graph.outputs}
        self._names = list(dict.fromkeys(("prompt", *(p.argument for p in text.prompts))))
        if wrong := text_problem(artifact, self._graph.graph, text):
            raise ArtifactError(f"{artifact.folder}: manifest.json [pipeline.text{wrong}; export again")
        # JSON has them by name, the graph in the order of its outputs
        self._embeds = dict(sorted(text.embeds.items(), key=lambda item: list(self._shapes).index(item[1])))
        self._tokenizers = [open_tokenizer(artifact, self._graph.graph, p) for p in text.prompts]

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

    def zero_arguments(self, prefix: str) -> dict[str, torch.Tensor]:
        """diffusers' arguments for embeddings, saying nothing."""
        zeros = self.zeros()
        return {prefix + name: zeros[output] for name, output in self._embeds.items()}

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


def text_problem(artifact: Artifact, graph: Graph, text: TextSettings) -> str:
    """What of these settings does not fit the graph, from the key on, or nothing."""
    files = {entry.path for entry in artifact.manifest.files}
    if lacking := [p.tokenizer for p in text.prompts if p.tokenizer not in files]:
        return f"]: {lacking[0]!r} is not in files"
    outputs = {spec.name for spec in graph.outputs}
    if foreign := sorted(outputs ^ set(text.embeds.values())):
        kind = "is no argument's embedding" if foreign[0] in outputs else "is not among its outputs"
        return f".embeds]: of graph {graph.name!r}, {foreign[0]!r} {kind}"
    if len(set(text.embeds.values())) < len(text.embeds):
        return ".embeds]: two arguments are one output"
    given = [(name, (1, p.max_length), "int64") for p in text.prompts for name in (p.input, p.mask) if name]
    taken = [(spec.name, tuple(spec.shape), spec.dtype) for spec in graph.inputs]
    if sorted(given) != sorted(taken):
        return f".prompts]: give {sorted(given)}, graph {graph.name!r} takes {sorted(taken)}"
    return ""


def open_tokenizer(artifact: Artifact, graph: Graph, prompt: TokenizerSettings) -> PromptTokenizer:
    """The artifact's tokenizer of these settings. Raises ArtifactError for what is none, or does not fit the graph."""
    data = read_listed_file(artifact.folder, artifact.manifest, prompt.tokenizer, MAX_TOKENIZER_BYTES)
    return PromptTokenizer(artifact.folder / prompt.tokenizer, data, prompt, embedding_rows(artifact, graph, prompt))


def embedding_rows(artifact: Artifact, graph: Graph, prompt: TokenizerSettings) -> int | None:
    """How many ids the embedding has rows for; None of a graph whose constants do not lie in the artifact's weights. Raises
    ArtifactError where the settings name another constant."""
    keys = graph.constants
    if prompt.embedding is not None and prompt.embedding not in keys:
        raise ArtifactError(
            f"{artifact.folder}: manifest.json [pipeline.text.prompts]: graph {graph.name!r} has no constant {prompt.embedding!r}; "
            "export again"
        )
    names = keys if prompt.embedding is None else [prompt.embedding]
    tables = [artifact.weights[keys[name]] for name in names if keys[name] in artifact.weights]
    return max((len(table) for table in tables if table.dim() == 2), default=None)


class PromptTokenizer:
    """One tokenizer with a fixed length: what is shorter is padded, what is longer is cut off with a warning.

    Every id that it can give is one of the embedding's `rows`, None where these are not known: code that looks up another
    reads beyond the table, or ends the process.
    """

    def __init__(self, path: Path, data: bytes, prompt: TokenizerSettings, rows: int | None = None):
        """`data` is what the file holds. Raises ArtifactError for what is no tokenizer, or not one of these settings."""
        self._path, self._prompt, self._rows = path, prompt, rows
        self._name = path.parent.name
        with self._explain_errors("expected a tokenizer.json"):
            self._tokenizer = Tokenizer.from_buffer(data)
            self._tokenizer.enable_truncation(prompt.max_length)
            self._tokenizer.enable_padding(length=prompt.max_length, pad_id=prompt.pad_id, pad_token=prompt.pad_token)
            ids = possible_ids(self._tokenizer) | {prompt.pad_token: prompt.pad_id}
        token, largest = max(ids.items(), key=lambda item: item[1])
        if rows is not None and largest >= rows:
            raise ArtifactError(f"{path}: the token {token!r:.80} has the id {largest}, {self._describe_rows()}")
        for text in ("", "a " * prompt.max_length):
            self._encode(text)

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and the mask of what is no padding, int64 [1, L] with L = max_length. Warns with the text that did
        not fit. Raises ArtifactError where the tokenizer cannot read it."""
        if self._prompt.lower:
            text = text.lower().strip()
        encoding = self._encode(text)
        if self._prompt.vectors and (expanded := expand_vectors(text, encoding, self._prompt.vectors)) != text:
            text, encoding = expanded, self._encode(expanded)
        if encoding.overflowing:
            lost = text[max(end for _, end in encoding.offsets) :].strip()
            warnings.warn(
                f"the prompt is longer than {self._prompt.max_length} tokens of {self._name}; cut off: {lost[:SHOWN_CHARACTERS]!r}"
                + (f" and {len(lost) - SHOWN_CHARACTERS} characters more" if len(lost) > SHOWN_CHARACTERS else ""),
                stacklevel=2,
            )
        return torch.tensor([encoding.ids]), torch.tensor([encoding.attention_mask])

    def _encode(self, text: str) -> Encoding:
        with self._explain_errors("expected a tokenizer that reads any text"):
            encoding = self._tokenizer.encode(text)
        if len(encoding.ids) != self._prompt.max_length:
            raise ArtifactError(
                f"{self._path}: gives {len(encoding.ids)} ids of a text, where manifest.json [pipeline.text] says {self._prompt.max_length}; "
                "restore the file or export again"
            )
        if self._rows is not None and (largest := max(encoding.ids)) >= self._rows:
            raise ArtifactError(f"{self._path}: gives the id {largest}, {self._describe_rows()}")
        return encoding

    def _describe_rows(self) -> str:
        return (
            f"the text encoder's embedding has {self._rows} rows; restore the file, or export again with the tokenizer "
            "that belongs to the model"
        )

    @contextmanager
    def _explain_errors(self, expected: str) -> Iterator[None]:
        try:
            yield
        except BaseException as e:  # tokenizers raises bare Exception, and where it panics not even that
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise ArtifactError(
                f"{self._path}: {expected}, but {first_line(e)}; restore the file or export again"
            ) from e


def expand_vectors(text: str, encoding: Encoding, vectors: Mapping[str, int]) -> str:
    """The text with every vector of each textual inversion in it, by the rule of diffusers' `maybe_convert_prompt`."""
    tokens = {token for part in (encoding, *encoding.overflowing) for token in part.tokens}
    for token in sorted(vectors.keys() & tokens):
        text = text.replace(token, " ".join((token, *(f"{token}_{i}" for i in range(1, vectors[token])))))
    return text


def possible_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Token -> id, of all that the tokenizer can give: its vocabulary, and what its post-processor adds, which may be any number."""
    ids = dict(tokenizer.get_vocab(with_added_tokens=True))
    if tokenizer.post_processor is not None:
        for token, number in added_ids(json.loads(tokenizer.post_processor.__getstate__())):
            ids[token] = max(number, ids.get(token, 0))
    return ids


def added_ids(processor: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(token, id) of what a post-processor puts around a text, from its settings in tokenizer.json."""
    for inner in processor.get("processors", ()):  # Sequence
        yield from added_ids(inner)
    for side in ("cls", "sep"):  # BertProcessing, RobertaProcessing
        if side in processor:
            token, number = processor[side]
            yield token, number
    for token, special in processor.get("special_tokens", {}).items():  # TemplateProcessing
        yield from ((token, number) for number in special["ids"])
