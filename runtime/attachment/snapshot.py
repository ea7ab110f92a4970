"""What a denoiser was when an artifact was attached to it, and what has changed since: weights, modules, config.

An attached denoiser's own modules never run, so whatever is done to them (a LoRA loaded or fused, weights written to, FreeU, another
attention processor) would draw on without it. A write through a tensor is counted by torch; one through its `.data` is not, and
shows in the numbers that are compared: `WEIGHT_SAMPLES` of each weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..private_torch import count_hooks, count_writes

WEIGHT_SAMPLES = 16  # numbers of each weight that are compared


@dataclass(frozen=True)
class WeightState:
    """A parameter or buffer: how often it was written to, and the bytes of a few of its numbers."""

    writes: int
    numbers: bytes


@dataclass(frozen=True)
class DenoiserSnapshot:
    """Weights, plain attributes of every module, and config, by name."""

    weights: Mapping[str, WeightState]
    modules: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, denoiser: nn.Module) -> DenoiserSnapshot:
        """The denoiser as it is now."""
        return cls(weight_states(denoiser), dict(module_states(denoiser)), config_of(denoiser))

    def describe_change(self, denoiser: nn.Module) -> str:
        """What is not as it was, the first of it, or ''."""
        now = DenoiserSnapshot.of(denoiser)
        if came := now.weights.keys() - self.weights.keys():
            return f"the weight {describe_names(came)} was added to it"
        if gone := self.weights.keys() - now.weights.keys():
            return f"its weight {describe_names(gone)} was taken away"
        if other := [name for name, state in now.weights.items() if state != self.weights[name]]:
            return f"its weight {describe_names(other)} was changed"
        if other := differing_keys(self.config, now.config):
            return f"its config {describe_names(other)} was changed"
        if other := differing_keys(self.modules, now.modules):
            first = min(other)
            keys = differing_keys(self.modules.get(first, {}), now.modules.get(first, {}))
            return f"{min(keys)!r} of its module {first or 'at the top'} was changed"
        return ""


def weight_states(denoiser: nn.Module) -> dict[str, WeightState]:
    """Every parameter and buffer by name. Numbers on a GPU come in one copy for each dtype."""
    tensors = dict((*denoiser.named_parameters(), *denoiser.named_buffers()))
    groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.dtype, tensor.device), {})[name] = stored_samples(tensor.detach())
    numbers: dict[str, bytes] = {}
    for (_, device), samples in groups.items():
        if device.type == "meta":
            numbers |= dict.fromkeys(samples, b"")
            continue
        counts = [sample.numel() for sample in samples.values()]
        for name, some in zip(samples, torch.cat([*samples.values()]).cpu().split(counts), strict=True):
            numbers[name] = some.view(torch.uint8).numpy().tobytes()
    return {name: WeightState(count_writes(tensor), numbers[name]) for name, tensor in tensors.items()}


def stored_samples(tensor: Tensor) -> Tensor:
    """A few numbers, evenly spaced in memory where the tensor fills it, so that no weight is copied to be looked at."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if (
        not tensor.is_contiguous()
        and tensor.ndim in formats
        and tensor.is_contiguous(memory_format=formats[tensor.ndim])
    ):
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    return evenly_spaced(tensor)


def evenly_spaced(tensor: Tensor) -> Tensor:
    """The first number, and up to 15 more."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // WEIGHT_SAMPLES)][:WEIGHT_SAMPLES]


def module_states(denoiser: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every module its class, its attributes, and how many hooks would run around its forward. The top one's forward and hooks
    are no part of it: the first is what is attached, and the others run."""
    for path, module in denoiser.named_modules():
        state: dict[str, Any] = {"class": type(module)}
        for name, value in vars(module).items():
            if not name.startswith("_"):
                state[name] = value if is_plain(value) else id(value)
        if path:
            state["forward hooks"] = count_hooks(module)
        else:
            state.pop("forward", None)
        yield path, state


def is_plain(value: Any) -> bool:
    """Whether it is one value, which is compared as such; other objects are the same one, or not."""
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def config_of(denoiser: Any) -> dict[str, Any]:
    """The model's config as JSON has it, without what starts with `_`."""
    return {key: json_value(value) for key, value in dict(denoiser.config).items() if not key.startswith("_")}


def json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): json_value(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_value(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def weights_digest(denoiser: nn.Module) -> str:
    """sha256 over name, shape, dtype and `WEIGHT_SAMPLES` evenly spaced numbers of every parameter and stored buffer."""
    whole = hashlib.sha256()
    for name, tensor in sorted(denoiser.state_dict().items()):
        few = evenly_spaced(tensor.detach()).cpu().contiguous()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + few.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that one of both lacks, or whose values differ."""
    return [key for key in before.keys() | now.keys() if key not in before or key not in now or before[key] != now[key]]


def describe_names(names: Any) -> str:
    """The first of the names, and how many there are."""
    ordered = sorted(names)
    return repr(ordered[0]) if len(ordered) == 1 else f"{ordered[0]!r} ({len(ordered)} in all)"
