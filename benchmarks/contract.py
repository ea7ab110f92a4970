"""What the call contract costs: microseconds to compare a call's inputs with the manifest, for the widest FLUX graphs.

    python benchmarks/contract.py

Inputs of FLUX.1-dev (19 double and 38 single blocks): 5 without a cache; with `pab`, 1 for coefficients and the stored output
of every attention, two for a double block. No model is needed: the tensors are small, and only what they are is looked at.
The same number of attribute reads and of shape comparisons are timed in the same rounds, as a measure of the machine.
Each figure is the least of many, in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import figures
import torch

from prebake.runtime.contract import Contract
from prebake.runtime.manifest import Cost, Graph, TensorSpec

WIDTHS = {"no cache": 5, "one site, three slots": 9, "pab, every attention": 5 + 1 + 19 * 2 + 38}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    graphs = []
    for name, width in WIDTHS.items():
        contract, given = example_contract(width)
        tensors = list(given.values())
        shapes = [t.shape for t in tensors]
        least = time_fastest(
            args.rounds,
            lambda contract=contract, given=given: contract.inputs(given),
            lambda tensors=tensors: [t.dtype for t in tensors],
            lambda tensors=tensors, shapes=shapes: [t.shape for t in tensors] == shapes,
        )
        times = dict(zip(("contract_us", "dtypes_us", "shapes_us"), least, strict=True))
        graphs.append({"graph": name, "inputs": width, **times})
    print(figures.contract_table({"graphs": graphs}))
    figures.save_figures({"graphs": graphs}, args.output)


def example_contract(width: int) -> tuple[Contract, dict[str, torch.Tensor]]:
    """A contract of that many inputs, and a call that fits it."""
    specs = tuple(TensorSpec(name=f"t{i}", shape=(1, 16, 32), dtype="float32") for i in range(width))
    cost = Cost(flops=1, ops=1, constants=0, constants_bytes=0)
    graph = Graph(name="reuse", package="p", inputs=specs, outputs=specs[:1], constants={}, cost=cost)
    return Contract(graph, torch.device("cpu")), {s.name: torch.zeros(s.shape) for s in specs}


def time_fastest(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """The least microseconds of each call, which take turns."""
    least = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begun = time.perf_counter()
            call()
            least[i] = min(least[i], (time.perf_counter() - begun) * 1e6)
    return least


if __name__ == "__main__":
    main()
