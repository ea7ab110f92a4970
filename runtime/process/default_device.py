"""The default device: where torch makes a tensor whose maker says no device. It is the caller's (`with torch.device("meta")`,
`torch.set_default_device`), and what is made here would follow it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def default_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, tensors are made on that device unless something else is said. Free of charge where it is so already, as every
    call of torch would pay for the block."""
    return nullcontext() if torch.get_default_device() == device else device


CPU = torch.device("cpu")
