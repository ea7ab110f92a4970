"""Checkpoints that are one safetensors file, as training tools write them, through diffusers' `from_single_file`.

The file has weights, and no configuration, scheduler or tokenizers: those come from a pipeline folder, as do components
of which the file has nothing, or from the hub's repository of the model that diffusers recognizes by the weights' names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...runtime.errors import ExportError, error_summary
from .hub_errors import download_failure
from .missing_weights import refuse_empty_tensors

PIPELINE_CLASSES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""What diffusers infers of the weights' names -> the pipeline that takes them."""
SUFFIX = ".safetensors"


def load_single_file(file: Path, config: Path | None, dtypes: dict[str, torch.dtype]) -> Any:
    """The pipeline of `file`; `config` is a pipeline folder, None = the hub's. `dtypes` as `source.load_model` takes them.

    Raises ExportError for a file that diffusers does not read, or that lacks weights, and for a configuration that cannot be had.
    """
    import diffusers

    name, repository = read_pipeline_class(config), None
    if config is None:
        name, repository = infer_pipeline(file)
    shared = {dtype for component, dtype in dtypes.items() if component != "default"}
    try:
        pipe = getattr(diffusers, name).from_single_file(
            file,
            config=str(config) if config else None,
            local_files_only=config is not None,
            dtype=shared.pop() if len(shared) == 1 else dtypes["default"],
        )
    except Exception as e:
        refuse_empty_tensors(file.name, getattr(diffusers, name), e)
        if repository and not isinstance(e, ValueError | KeyError):
            raise ExportError(
                f"model {file.name!r}: its configuration is that of {repository}, and {download_failure(repository, None, e)}; or "
                "set model.config to the folder of such a pipeline, of which only what the file lacks is read"
            ) from e
        raise ExportError(f"model {file.name!r}: {name} could not read {file} ({error_summary(e)})") from e
    for component, module in pipe.components.items():
        dtype = dtypes.get(component, dtypes["default"])
        if isinstance(module, torch.nn.Module) and module.dtype != dtype:
            module.to(dtype)
    return pipe


def read_pipeline_class(config: Path | None) -> str:
    """The pipeline class that the folder's model_index.json names. Raises ExportError where there is none."""
    if config is None:
        return ""
    try:
        return json.loads((config / "model_index.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ExportError(
            f"model.config {str(config)!r}: expected a folder with a pipeline's model_index.json and its components' "
            f"config.json ({error_summary(e)})"
        ) from e


def infer_pipeline(file: Path) -> tuple[str, str]:
    """Pipeline class and the hub's repository with its configuration. Raises ExportError for models of other kinds."""
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    try:
        kind = infer_diffusers_model_type(load_single_file_checkpoint(str(file)))
    except Exception as e:
        raise ExportError(f"model {file.name!r}: diffusers could not read {file} ({error_summary(e)})") from e
    if kind not in PIPELINE_CLASSES:
        raise ExportError(
            f"model {file.name!r}: diffusers takes its weights for {kind!r}, expected one of {', '.join(PIPELINE_CLASSES)}; "
            "set model.config to the folder of its pipeline, of which only what the file lacks is read"
        )
    return PIPELINE_CLASSES[kind], DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
