"""LoRAs of a recipe: low-rank updates, added to a pipeline's float32 weights before these are cast or quantized.

diffusers reads the files (its own layout, PEFT's and kohya's) and PEFT adds the products. What both pass over in silence is refused
here: a tensor of the file that no module of the pipeline takes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.errors import ExportError, ResourceError, error_summary
from ...runtime.extras import install_command
from ...runtime.manifest import SourceLora
from ..recipe.schema import Lora
from .weight_files import find_weight_file, hash_file, weight_file_name

DOWN_KEY = re.compile(r"\.(lora_A|lora\.down|lora_down|[a-z_]*lora\.down|lora_linear_layer\.down)(\.\w+)?\.weight$")
"""The name of a LoRA's first factor, as `lora_state_dict` gives it: one for each module that it changes."""


def fuse_loras(pipe: Any, loras: Sequence[Lora], model: str) -> tuple[SourceLora, ...]:
    """Adds every LoRA, times its scale, to the weights of `pipe`, and says what was added. The pipeline is left without adapters.

    `model` is where the pipeline was read, beside which files are looked for. Raises ExportError for a file that is not there, that
    diffusers cannot read, or that changes modules which the pipeline has not, and for a pipeline that takes none.
    """
    if not loras:
        return ()
    if not hasattr(pipe, "load_lora_weights"):
        raise ExportError(f"model.lora: {type(pipe).__name__} takes no LoRA in diffusers; leave the key out")
    if importlib.util.find_spec("peft") is None:
        raise ResourceError(f"model.lora: diffusers needs the package peft for it; {install_command('peft')}")
    added = []
    for number, lora in enumerate(loras):
        file = find_lora(lora, model)
        added.append(SourceLora(name=weight_file_name(lora.path), scale=lora.scale, sha256=hash_file(file)))
        load_adapter(pipe, lora, file, f"lora_{number}")
    pipe.set_adapters([f"lora_{number}" for number in range(len(loras))], [lora.scale for lora in loras])
    pipe.fuse_lora(components=[name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None])
    pipe.unload_lora_weights()
    return tuple(added)


def load_adapter(pipe: Any, lora: Lora, file: Path, name: str) -> None:
    """Puts the LoRA beside the pipeline's weights, as the adapter of that name."""
    told = f"model.lora {lora.path!r}"
    try:
        given = pipe.lora_state_dict(str(file.parent), weight_name=file.name)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except Exception as e:  # whatever the file makes them run into
        raise ExportError(
            f"{told}: diffusers cannot add it to {type(pipe).__name__} ({error_summary(e)}); give a LoRA of this kind of model"
        ) from e
    weights: Mapping[str, torch.Tensor] = given[0] if isinstance(given, tuple) else given
    updates = sorted(DOWN_KEY.sub("", key) for key in weights if DOWN_KEY.search(key))
    taken = sorted(adapter_paths(pipe, name))
    if not updates or len(taken) < len(updates):
        strange = next((path for path in updates if not any(is_path_of(path, own) for own in taken)), "")
        lacking = f"it changes {strange!r}, which" if strange else "it changes nothing that"
        raise ExportError(f"{told}: {lacking} {type(pipe).__name__} has not; give a LoRA of this kind of model")


def adapter_paths(pipe: Any, name: str) -> Iterator[str]:
    """Component and path of each module that the adapter of that name changes."""
    for component in pipe._lora_loadable_modules:
        model = getattr(pipe, component, None)
        if isinstance(model, nn.Module):
            for path, module in model.named_modules():
                if name in getattr(module, "lora_A", ()) or name in getattr(module, "lora_embedding_A", ()):
                    yield f"{component}.{path}"


def is_path_of(key: str, path: str) -> bool:
    """Whether a LoRA's key means the module at `path`: processors of older files name an attention and one of its layers."""
    plain = key.replace(".processor.", ".").replace("_lora", "")
    return plain == path or path.startswith(f"{plain}.")


def find_lora(lora: Lora, model: str) -> Path:
    """The LoRA's file; `model` is where the pipeline lies."""
    return find_weight_file("model.lora", lora.path, lora.weight_name, model, (".safetensors",))


def cast_components(pipe: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Casts each component to its dtype, `default` for the rest; modules that a model keeps in float32 stay in it."""
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            continue
        dtype = dtypes.get(name, dtypes["default"])
        kept = tuple(getattr(component, "_keep_in_fp32_modules", None) or ())
        for path, tensor in (*component.named_parameters(), *component.named_buffers()):
            if tensor.is_floating_point() and not set(kept) & set(path.split(".")):
                tensor.data = tensor.data.to(dtype)
