"""What the tests of the CPU kernels share: where they run, random tensors, and how far two are apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prebake.exporter.lower.aoti.kernels.target import choose_target

LACKS = "" if choose_target("native") else "the CPU has no AVX2 with FMA"
runs_here = pytest.mark.skipif(bool(LACKS), reason=LACKS)
HALF, FLOAT = torch.bfloat16, torch.float32
EPSILON = {HALF: 2**-8, FLOAT: 1e-6}


def random(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).norm() / expected.double().norm())
