"""Textual inversions of a recipe: embeddings of new tokens, added to a pipeline's tokenizers and text encoders.

diffusers reads the files, its own and those of the common web interfaces. A file of SDXL or FLUX has embeddings for each encoder, by the
names in `ENCODER_KEYS`; each goes to the tokenizer and the encoder that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...runtime.errors import ExportError, error_summary
from ...runtime.manifest import SourceInversion
from ..recipe.schema import TextualInversion
from .weight_files import find_weight_file, hash_file, weight_file_name

KEY = "model.textual_inversion"
SUFFIXES = (".safetensors", ".pt", ".bin")
ENCODER_KEYS = {"clip_l": "", "clip_g": "_2", "t5": "_2"}
"""What files of several encoders call an embedding, and the end of its tokenizer's and its encoder's name in a pipeline."""


def add_inversions(pipe: Any, inversions: Sequence[TextualInversion], model: str) -> tuple[SourceInversion, ...]:
    """Adds every token to `pipe`, and says what was added. `model` is where the pipeline was read, beside which files are looked for.

    Raises ExportError for a file that is not there, that diffusers cannot read, or whose embedding has another width or another
    encoder than the pipeline has, for a token that is there already, and for a pipeline that takes none.
    """
    if not inversions:
        return ()
    if not hasattr(pipe, "load_textual_inversion"):
        raise ExportError(f"{KEY}: {type(pipe).__name__} takes none in diffusers; leave the key out")
    return tuple(add_inversion(pipe, inversion, model) for inversion in inversions)


def add_inversion(pipe: Any, inversion: TextualInversion, model: str) -> SourceInversion:
    told = f"{KEY} {inversion.path!r}"
    file = find_weight_file(KEY, inversion.path, inversion.weight_name, model, SUFFIXES)
    try:
        parts = read_parts(file)
        before = {end: set(tokenizer.get_vocab()) for end, tokenizer in tokenizers(pipe).items()}
        if parts is None:
            pipe.load_textual_inversion(str(file), token=inversion.token, local_files_only=True)
        for key, embedding in (parts or {}).items():
            end = ENCODER_KEYS[key]
            if getattr(pipe, f"text_encoder{end}", None) is None:
                raise ExportError(f"{told}: has an embedding {key!r}, and {type(pipe).__name__} no text_encoder{end}")
            pipe.load_textual_inversion(
                embedding,
                token=inversion.token or file.stem,
                text_encoder=getattr(pipe, f"text_encoder{end}"),
                tokenizer=getattr(pipe, f"tokenizer{end}"),
            )
    except ExportError:
        raise
    except Exception as e:  # whatever the file makes them run into
        raise ExportError(
            f"{told}: diffusers cannot add it to {type(pipe).__name__} ({error_summary(e)}); give an embedding for this kind of model"
        ) from e
    added = [set(tokenizer.get_vocab()) - before[end] for end, tokenizer in tokenizers(pipe).items()]
    token = min(set().union(*added), key=len)  # the others are its further vectors, `<cat>_1`
    return SourceInversion(name=weight_file_name(inversion.path), token=token, sha256=hash_file(file))


def tokenizers(pipe: Any) -> dict[str, Any]:
    """The end of its name -> each tokenizer that the pipeline has."""
    found = {end: getattr(pipe, f"tokenizer{end}", None) for end in ("", "_2")}
    return {end: tokenizer for end, tokenizer in found.items() if tokenizer is not None}


def read_parts(file: Path) -> Mapping[str, Any] | None:
    """The embeddings of a file that has one for each encoder, None of another."""
    if file.suffix != ".safetensors":
        return None
    try:
        tensors = load_file(file)
    except SafetensorError as e:
        raise ExportError(f"{KEY} {file.name!r}: no safetensors file ({error_summary(e)}); download it again") from e
    return tensors if tensors.keys() <= ENCODER_KEYS.keys() else None
