"""Load: an id, a folder, a file or a model that is made here comes in, a diffusers pipeline in the asked dtypes comes out, with its origin."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime.errors import ExportError, error_summary
from ...runtime.manifest import Source
from .. import tiny
from ..recipe.problems import suggest_name
from . import hub_errors as hub
from . import single_file
from .missing_weights import record_missing_weights, refuse_missing_weights

EMBEDDED_MODELS = {
    "shapes": Path(__file__).parents[1] / "shapes" / "model",
    "shapes-sd": Path(__file__).parents[1] / "shapes" / "model_sd",
}
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".toml", ".bin")
WEIGHTS_PATTERN = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(-\d+-of-\d+)?(\.(?P<variant>[a-z]\w*))?(-\d+-of-\d+)?\.(safetensors|bin)"
)


DEFAULT_TYPES = {
    "height": int,
    "width": int,
    "max_sequence_length": int,
    "num_frames": int,
    "num_inference_steps": int,
    "guidance_scale": int | float,
}


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline as loaded, where it came from, and the defaults that it brings (`prebake.toml` beside its weights)."""

    pipe: Any
    source: Source
    defaults: dict[str, Any]


def load_model(
    model: str, revision: str | None, dtypes: dict[str, torch.dtype], config: str | None = None
) -> LoadedPipeline:
    """The pipeline on the CPU in eval mode, weights frozen; `dtypes` maps component -> dtype (`default` for the rest).

    `config` is the folder of a pipeline whose configuration a single file takes: see `find_config_folder`.
    Raises ExportError when nothing of that name can be read, and for files that lack weights.
    """
    with record_missing_weights() as missing:
        if is_single_file(model):
            file = Path(model).expanduser()
            folder = find_config_folder(config, file)
            pipe, sha256 = single_file.load_single_file(file, folder, dtypes), model_fingerprint(folder, file)
            defaults = read_model_defaults(folder) if folder else {}
        elif config is not None:
            raise ExportError(
                f"model.config goes with one safetensors file, and model {model!r} brings its own; leave it out"
            )
        else:
            folder = find_model(model, revision)
            pipe, sha256 = read_pipeline(model, folder, dtypes), model_fingerprint(folder)
            defaults = read_model_defaults(folder)
    refuse_missing_weights(model_name(model), pipe.components, missing)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return LoadedPipeline(pipe, Source(model=model_name(model), pipeline=type(pipe).__name__, sha256=sha256), defaults)


def read_pipeline(model: str, folder: Path, dtypes: dict[str, torch.dtype]) -> Any:
    """The pipeline in `folder`. Raises ExportError with diffusers' words."""
    from diffusers import DiffusionPipeline

    variant = weights_variant(folder)
    if variant:
        warnings.warn(
            f"model {model!r}: it has no weights but the variant {variant!r}, so these are read", stacklevel=3
        )
    try:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtypes, local_files_only=True, variant=variant, **absent_components(folder)
        )
    except Exception as e:
        raise ExportError(f"model {model!r}: diffusers could not read {folder} ({error_summary(e)})") from e


def absent_components(folder: Path) -> dict[str, None]:
    """The components that a pipeline was saved without, such as SD3's T5. diffusers writes them as null, and reads them back
    only where its caller says so."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    return {name: None for name, entry in index.items() if entry == [None, None]}


def weights_variant(folder: Path) -> str | None:
    """`fp16` where a component has weights named `*.fp16.safetensors` and none without; None where all have plain ones.

    Of several such variants, the first by name that is in all those components.
    """
    shared: set[str] | None = None
    for component in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = {m["variant"] for p in component.iterdir() if (m := WEIGHTS_PATTERN.fullmatch(p.name))}
        if found and None not in found:
            shared = found if shared is None else shared & found
    return min(shared) if shared else None


def find_model(model: str, revision: str | None = None) -> Path:
    """The folder of an embedded model, a tiny one, a local folder, or a hub id (downloaded, or from the hub's cache)."""
    if model in EMBEDDED_MODELS:
        return EMBEDDED_MODELS[model]
    if model.startswith(tiny.TINY_PREFIX):
        return Path(tiny_folder(model.removeprefix(tiny.TINY_PREFIX)).name)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ExportError(
                f"model {model!r}: expected a pipeline folder with model_index.json, as save_pretrained writes it, found none"
            )
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.endswith(single_file.SUFFIX):
        raise ExportError(
            f"model {model!r}: there is no such file or folder; expected {', '.join(EMBEDDED_MODELS)}, {tiny.TINY_PREFIX}NAME, a "
            "folder, a safetensors file, or a hub id such as black-forest-labs/FLUX.1-dev"
        )
    if "/" not in model and (near := suggest_name(model, EMBEDDED_MODELS).rstrip(";")):
        raise ExportError(f"model {model!r}: there is no such file or folder, and a hub id has an owner{near}")
    return hub.download_model(model, revision)


def is_single_file(model: str) -> bool:
    return model.endswith(single_file.SUFFIX) and Path(model).expanduser().is_file()


def find_config_folder(config: str | None, file: Path) -> Path | None:
    """The folder `config`, or the one of that name beside `file`. Raises ExportError where there is neither."""
    if config is None:
        return None
    places = (Path(config).expanduser(), file.parent / config)
    for place in places:
        if place.is_dir():
            return place
    raise ExportError(f"model.config {config!r}: expected a folder, here or beside {file}, found none")


@functools.cache
def tiny_folder(name: str) -> tempfile.TemporaryDirectory[str]:
    """The tiny pipeline `name`, built and saved once per process; its folder goes when the process ends.

    Raises ExportError with the names that exist.
    """
    if name not in tiny.TINY_MODELS:
        near = suggest_name(name, tiny.TINY_MODELS).rstrip(";").replace("'", f"'{tiny.TINY_PREFIX}", 1)
        known = ", ".join(tiny.TINY_PREFIX + known for known in tiny.TINY_MODELS)
        raise ExportError(f"model '{tiny.TINY_PREFIX}{name}': expected one of {known}{near}")
    folder = tempfile.TemporaryDirectory(prefix="prebake-tiny-")
    tiny.save_tiny_pipeline(name, Path(folder.name))
    return folder


def is_known_model(name: str) -> bool:
    """True if `name`, as a manifest has it, says where the model is: an embedded or tiny one, or a hub id."""
    return name in EMBEDDED_MODELS or name.startswith(tiny.TINY_PREFIX) or "/" in name


def model_name(model: str) -> str:
    """The id, or the last part of a folder or file: no absolute path reaches the manifest."""
    path = Path(model).expanduser()
    return path.resolve().name if model not in EMBEDDED_MODELS and (path.is_dir() or is_single_file(model)) else model


def model_fingerprint(folder: Path | None, file: Path | None = None) -> str:
    """sha256 over the relative names and the sha256 of every configuration, tokenizer and weight file of `folder`, and
    over that of `file`, whose name does not count."""
    named = {} if file is None else {"": file}
    if folder is not None:
        found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        named |= {path.relative_to(folder).as_posix(): path for path in found}
    whole = hashlib.sha256()
    for name, path in named.items():
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def read_model_defaults(folder: Path) -> dict[str, Any]:
    """The `[defaults]` table of the folder's `prebake.toml`, or nothing: sizes and steps that the model was made for.

    Raises ExportError for a file that is not TOML, and for keys and values that no export could use.
    """
    path = folder / "prebake.toml"
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text("utf-8-sig")).get("defaults", {})
    except ValueError as e:
        raise ExportError(f"{path}: not valid TOML: {e}; repair or remove it") from e
    if not isinstance(table, dict) or set(table) - set(DEFAULT_TYPES):
        raise ExportError(f"{path} [defaults]: expected a table of {', '.join(DEFAULT_TYPES)}, got {table!r}")
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, DEFAULT_TYPES[key]):
            raise ExportError(f"{path} [defaults]: expected a number for {key}, got {value!r}")
    return table
