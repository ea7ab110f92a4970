"""Discover: one run of a denoiser on fake tensors tells its layout, for any diffusers model, without a list by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..private_torch import fake_tensor_mode
from .actions import bind_arguments, flat_outputs, submodule
from .component import Component
from .guidance import LOW
from .layout import Layout, Place, PlaceKind


def discover_layout(component: Component) -> Layout:
    """The attentions, feed-forwards, blocks, layers and other modules of each branch, in the order in which they return."""
    places: dict[str, Place] = {}
    handles = []
    for branch, prefix in component.branches.items():
        root = submodule(component.module, prefix.removesuffix("."))
        for name, module in root.named_modules():
            kind = classify_module(root, name, module)
            if kind is None:
                continue

            def returned(
                module, args, kwargs, output, name=name, branch=branch, path=prefix + name, kind: PlaceKind = kind
            ):
                if path in places:  # once, also where a module is called twice
                    return
                parts = output if isinstance(output, tuple) else (output,)
                if kind == "module" and not all(isinstance(o, Tensor) for o in parts):
                    return  # answers with something else than tensors, which no site can store
                streams = find_streams(module, kind, args, kwargs, flat_outputs(output))
                places[path] = Place(name, branch, path, kind, streams)

            handles.append(module.register_forward_hook(returned, with_kwargs=True))
    try:
        with torch.no_grad(), fake_tensor_mode() as fake:
            component.module(*(fake.from_tensor(t) for t in component.args))
    finally:
        for handle in handles:
            handle.remove()
    known = tuple(p for p in places.values() if p.kind != "module")
    others = tuple(p for p in places.values() if p.kind == "module")
    return Layout(known, tuple(component.branches), hasattr(component.module, LOW), others)


def classify_module(root: nn.Module, name: str, module: nn.Module) -> PlaceKind | None:
    """The kind of a module to a cache policy; the classes and list names are those of diffusers' own hooks. None: no site."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES

    if not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    if isinstance(module, _ATTENTION_CLASSES):
        return "cross_attention" if getattr(module, "is_cross_attention", False) else "attention"
    if isinstance(module, _FEEDFORWARD_CLASSES):
        return "feed_forward"
    parent, _, index = name.rpartition(".")
    if parent in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and index.isdigit():
        return "block"
    inside = name.split(".")
    above = [".".join(inside[:i]) for i in range(1, len(inside))]
    if any(classify_module(root, a, root.get_submodule(a)) not in (None, "layer", "module") for a in above):
        return "module"
    return "layer" if not parent or isinstance(root.get_submodule(parent), nn.ModuleList) else "module"


def find_streams(
    module: nn.Module, kind: PlaceKind, args: Any, kwargs: Any, outputs: tuple[Any, ...]
) -> tuple[str, ...]:
    """Output by output, the argument that it continues: what diffusers says of a block, else what has its shape."""
    given = bind_arguments(module, args, kwargs)
    if kind in ("attention", "cross_attention"):
        names = ("hidden_states", "encoder_hidden_states")[: len(outputs)]
    elif len(outputs) == 1:
        names = ("hidden_states" if "hidden_states" in given else next(iter(given), "hidden_states"),)
    else:
        names = find_registry_streams(module, len(outputs)) or match_streams_by_shape(given, outputs)
    return tuple(n if isinstance(o, Tensor) else "" for n, o in zip(names, outputs, strict=True))


def find_registry_streams(module: nn.Module, count: int) -> tuple[str, ...] | None:
    """The streams by diffusers' TransformerBlockRegistry, or None where it does not know the class."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        metadata = TransformerBlockRegistry.get(type(module))
    except ValueError:
        return None
    names = [""] * count
    if metadata.return_hidden_states_index is not None:
        names[metadata.return_hidden_states_index] = metadata.hidden_states_argument_name
    if metadata.return_encoder_hidden_states_index is not None:
        names[metadata.return_encoder_hidden_states_index] = metadata.encoder_hidden_states_argument_name
    return tuple(names) if all(names) else None


def match_streams_by_shape(given: dict[str, Any], outputs: tuple[Any, ...]) -> tuple[str, ...]:
    """For each output the first argument of its shape that no output before it took; `output` where there is none."""
    left = [(n, t.shape) for n, t in given.items() if isinstance(t, Tensor)]
    names = []
    for output in outputs:
        match = next(((n, s) for n, s in left if isinstance(output, Tensor) and s == output.shape), None)
        if match:
            left.remove(match)
        names.append(match[0] if match else "output")
    return tuple(names)
