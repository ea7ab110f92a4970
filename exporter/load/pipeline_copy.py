"""Copy: a loaded diffusers pipeline comes in and stays as it is, a folder comes out that `load_model` reads as any other.

What makes pictures must all be in the folder: weights, configs, scheduler, tokenizers. What could not be (hooks, a patched
forward, adapters beside the weights, weights that are quantized) is refused here, and not lost in silence. The folder's files
are the model's fingerprint, so equal pipelines have equal ones, wherever they were loaded from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...runtime.errors import ExportError, RequestError
from ..rewrite.refuse_hooks import refuse_hooked
from .missing_weights import empty_tensors, refuse_lacking

UNNAMED_KEYS = ("_name_or_path",)  # where a component was loaded from


def copy_pipeline(pipe: Any, folder: Path) -> Path:
    """The pipeline saved to `folder`, with adapters that are merged as plain weights.

    Raises RequestError for what is no diffusers pipeline, and for adapters that are not merged; ExportError for what a
    folder cannot hold.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping) or not hasattr(pipe, "save_pretrained"):
        raise RequestError(
            f"model: expected a name, a path or a diffusers pipeline, got {type(pipe).__name__}; load one with diffusers"
        )
    models = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    for name, model in models.items():
        refuse_adapters(name, model)
        refuse_quantized(name, model)
        refuse_hooked(name, model)
    refuse_lacking(type(pipe).__name__, {name: [*empty_tensors(model)] for name, model in models.items()})
    plain = {name: plain_model(name, model) for name, model in models.items()}
    shell = type(pipe)(**{**construction_arguments(pipe), **components, **plain})
    shell.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        remove_origin(path)
    return folder


def construction_arguments(pipe: Any) -> dict[str, Any]:
    """The arguments of the pipeline's class that are no components, as it was made with."""
    import inspect

    known = inspect.signature(type(pipe).__init__).parameters
    return {name: value for name, value in dict(pipe.config).items() if name in known}


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers: a `base_layer`, and adapters beside it."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "merged_adapters"):
            yield name, module


def refuse_adapters(name: str, model: nn.Module) -> None:
    """Raises RequestError for an adapter that works beside the weights: a graph would be compiled without it."""
    for path, layer in adapter_layers(model):
        active = set(getattr(layer, "active_adapters", ()))
        if getattr(layer, "disable_adapters", False):
            active = set()
        if active != set(layer.merged_adapters):
            beside = ", ".join(sorted(active ^ set(layer.merged_adapters)))
            raise RequestError(
                f"{name}.{path}: has the LoRA {beside} beside its weights, and an artifact has weights alone; call "
                "pipe.fuse_lora() first, or pipe.unload_lora_weights() to export without it"
            )


def refuse_quantized(name: str, model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise ExportError(
            f"{name}: its weights are quantized already; load it in float32 or bfloat16, and ask for quantization in the recipe's "
            "[quantize] table"
        )


def plain_model(name: str, model: nn.Module) -> nn.Module:
    """The model itself, or, where adapters are merged into it, another of its class over the same tensors, without them.

    Raises ExportError where its weights are not those that its config describes: loading the folder would make others up.
    """
    fresh = empty_model(name, model)
    weights = plain_weights(model)
    if difference := sorted(set(fresh.state_dict()) ^ set(weights)):
        raise ExportError(
            f"{name}: has other weights than {type(model).__name__} of its config ({difference[0]!r}, {len(difference)} in all); load a "
            "fresh pipeline, or save this one and give its folder"
        )
    if not any(adapter_layers(model)):
        return model
    fresh.load_state_dict(weights, assign=True)
    return fresh


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by the names that it would have without adapters; the tensors are the model's own."""
    prefixes = tuple(f"{path}." for path, _ in adapter_layers(model))
    weights = {}
    for key, tensor in model.state_dict().items():
        inside = max((p for p in prefixes if key.startswith(p)), key=len, default=None)
        if inside is None:
            weights[key] = tensor
        elif key.removeprefix(inside).startswith("base_layer."):
            weights[inside + key.removeprefix(inside).removeprefix("base_layer.")] = tensor
    return weights


def empty_model(name: str, model: nn.Module) -> nn.Module:
    """A model of the same class and config, whose weights take no memory."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        if hasattr(type(model), "load_config"):  # diffusers
            return type(model).from_config(model.config)  # pyright: ignore[reportAttributeAccessIssue]
        if hasattr(model, "config"):  # transformers
            return type(model)(model.config)
    raise ExportError(
        f"{name}: {type(model).__name__} has no config, so no folder can hold it; save the pipeline yourself"
    )


def remove_origin(path: Path) -> None:
    """Leaves out of a configuration where its component came from, which would be in the fingerprint."""
    data = json.loads(path.read_text("utf-8"))
    if isinstance(data, dict) and any(key in data for key in UNNAMED_KEYS):
        kept = {key: value for key, value in data.items() if key not in UNNAMED_KEYS}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
