"""The default device: where torch makes a tensor whose maker says no device. It is the caller's (`with torch.device("meta")`,
`torch.set_default_device`), and what is made here would follow it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

CPU = torch.device("cpu")


def default_device(device: torch.device | None) -> AbstractContextManager[object]:
    """Inside, tensors are made on that device unless something else is said; None leaves it as it is. Free of charge where it
    is so already, as every call of torch would pay for the block."""
    return nullcontext() if device is None or find_default_device() == device else device


def find_default_device() -> torch.device | None:
    """The caller's; None where it is one that this torch cannot use, which torch says by errors of several kinds."""
    try:
        return torch.get_default_device()
    except (AssertionError, RuntimeError, ModuleNotFoundError):
        return None
