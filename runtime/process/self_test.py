"""The self-test: products and attention in which every result is known, by torch's kernels and with this process's threads.

Compiled graphs call torch's kernels, which divide their work by the number of threads that they were promised. Where OpenMP
gives fewer (OMP_DYNAMIC, OMP_THREAD_LIMIT, a wrong library), a part may be left undone, and what is there is drawn. All numbers
here are small integers, which every dtype holds, so that a result is right to the bit or wrong.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
from torch.nn import functional

from ..errors import ArtifactError
from ..private_torch import int8_product

ROWS = (1, 96)
"""Rows of a product: one has kernels of its own, many are divided between threads."""
WIDTH = 192
OPENMP_VARIABLES = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OMP_NUM_THREADS", "KMP_AFFINITY", "LD_PRELOAD")


def refuse_wrong_arithmetic() -> None:
    """Raises ArtifactError where torch computes wrong here. Tried once for each number of threads that torch has been set to."""
    if wrong := wrong_arithmetic(torch.get_num_threads()):
        raise ArtifactError(wrong)


@functools.cache
def wrong_arithmetic(threads: int) -> str:
    """A sentence on what comes out wrong with torch's threads, `threads` of them; empty if all is right."""
    wrong = ", ".join(
        dict.fromkeys(name for name, made, right in known_results() if not torch.equal(made.float(), right))
    )
    if not wrong:
        return ""
    found = " ".join(f"{name}={os.environ[name]}" for name in OPENMP_VARIABLES if name in os.environ)
    return (
        f"torch computes wrong in this process, with {threads} threads: {wrong}"
        + (f" ({found})" if found else "")
        + "; unset OMP_DYNAMIC and OMP_THREAD_LIMIT, or start it with OMP_NUM_THREADS=1"
    )


def known_results() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, what torch's kernels make, and what is right, float32."""
    with torch.no_grad():
        for rows in ROWS:
            a = (torch.arange(rows * WIDTH).reshape(rows, WIDTH) % 3 - 1).float()
            b = (torch.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH) % 5 == 1).float()
            right = (a.double() @ b.double().T).float()  # at most 39: exact in bfloat16
            yield "bfloat16 products", functional.linear(a.bfloat16(), b.bfloat16()), right
            yield "float32 products", functional.linear(a, b), right
            yield "int8 products", int8_product(a.to(torch.int8), b.to(torch.int8).t()), right
        # equal keys weigh all values the same, and the mean of equal values is their value
        q, v = torch.ones(1, 4, 64, 64, dtype=torch.bfloat16), torch.arange(64.0).expand(1, 4, 64, 64)
        yield "attention", functional.scaled_dot_product_attention(q, q, v.bfloat16().contiguous()), v
        image = torch.ones(1, 32, 16, 16, dtype=torch.bfloat16)
        yield (
            "convolutions",
            functional.conv2d(image, torch.ones(32, 32, 1, 1, dtype=torch.bfloat16)),
            torch.full((1, 32, 16, 16), 32.0),
        )
