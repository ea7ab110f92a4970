"""Load: an id, a folder or an embedded model comes in, a diffusers pipeline in the asked dtypes comes out, with its origin."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import ExportError
from ..runtime.manifest import Source
from . import tiny

EMBEDDED = {
    "shapes": Path(__file__).parent / "shapes" / "model",
    "shapes-sd": Path(__file__).parent / "shapes" / "model_sd",
}
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".toml", ".bin")


DEFAULTS = {
    "height": int,
    "width": int,
    "max_sequence_length": int,
    "num_frames": int,
    "num_inference_steps": int,
    "guidance_scale": int | float,
}


@dataclass(frozen=True)
class Loaded:
    """A pipeline as loaded, where it came from, and the defaults that it brings (`prebake.toml` beside its weights)."""

    pipe: Any
    source: Source
    folder: Path
    defaults: dict[str, Any]


def load(model: str, revision: str | None, dtypes: dict[str, torch.dtype]) -> Loaded:
    """The pipeline on the CPU in eval mode, weights frozen; `dtypes` maps component -> dtype (`default` for the rest).

    Raises ExportError when nothing of that name can be read.
    """
    from diffusers import DiffusionPipeline

    folder = find(model, revision)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True)
    except Exception as e:
        raise ExportError(
            f"model {model!r}: diffusers could not read {folder} ({type(e).__name__}: {str(e).splitlines()[0]})"
        ) from e
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    source = Source(model=name_of(model), pipeline=type(pipe).__name__, sha256=fingerprint(folder))
    return Loaded(pipe, source, folder, own_defaults(folder))


def find(model: str, revision: str | None = None) -> Path:
    """The folder of an embedded model, a tiny one, a local folder, or a hub id (downloaded, or from the hub's cache)."""
    if model in EMBEDDED:
        return EMBEDDED[model]
    if model.startswith(tiny.PREFIX):
        return Path(tiny_folder(model.removeprefix(tiny.PREFIX)).name)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ExportError(
                f"model {model!r}: expected a pipeline folder with model_index.json, as save_pretrained writes it, found none"
            )
        return folder
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model, revision=revision))
    except Exception as e:
        raise ExportError(
            f"model {model!r}: expected {', '.join(EMBEDDED)}, a folder, or a hub id that can be downloaded; the hub says "
            f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
        ) from e


@functools.cache
def tiny_folder(name: str) -> tempfile.TemporaryDirectory[str]:
    """The tiny pipeline `name`, built and saved once per process; its folder goes when the process ends.

    Raises ExportError with the names that exist.
    """
    if name not in tiny.NAMES:
        known = ", ".join(tiny.PREFIX + known for known in tiny.NAMES)
        raise ExportError(f"model '{tiny.PREFIX}{name}': expected one of {known}")
    folder = tempfile.TemporaryDirectory(prefix="prebake-tiny-")
    tiny.save(name, Path(folder.name))
    return folder


def is_known(name: str) -> bool:
    """Whether `name`, as a manifest has it, says where the model is: an embedded or tiny one, or a hub id."""
    return name in EMBEDDED or name.startswith(tiny.PREFIX) or "/" in name


def name_of(model: str) -> str:
    """The id, or a folder's last part: no absolute path reaches the manifest."""
    return (
        Path(model).expanduser().resolve().name
        if Path(model).expanduser().is_dir() and model not in EMBEDDED
        else model
    )


def fingerprint(folder: Path) -> str:
    """sha256 over the relative names and the sha256 of every configuration, tokenizer and weight file."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in SUFFIXES):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return whole.hexdigest()


def own_defaults(folder: Path) -> dict[str, Any]:
    """The `[defaults]` table of the folder's `prebake.toml`, or nothing: sizes and steps that the model was made for.

    Raises ExportError for a file that is not TOML, and for keys and values that no export could use.
    """
    path = folder / "prebake.toml"
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text("utf-8")).get("defaults", {})
    except ValueError as e:
        raise ExportError(f"{path}: not valid TOML: {e}; repair or remove it") from e
    if not isinstance(table, dict) or set(table) - set(DEFAULTS):
        raise ExportError(f"{path} [defaults]: expected a table of {', '.join(DEFAULTS)}, got {table!r}")
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, DEFAULTS[key]):
            raise ExportError(f"{path} [defaults]: expected a number for {key}, got {value!r}")
    return table
