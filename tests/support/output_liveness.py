"""What a variant's outputs need, found on one run of fake tensors: FLOPs and modules without capturing a graph.

A tape of every operation of the run is read backwards from the outputs. It costs seconds where `torch.export` of a real
SDXL costs minutes, and no memory, so real configurations can be counted; tests hold it against pruned graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prebake.exporter.cost.count import FLOP_FORMULAS
from prebake.exporter.plan import PlanSet
from prebake.exporter.sites.actions import VariantModule
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.marks import Mark, Variant


@dataclass(frozen=True)
class Op:
    reads: tuple[int, ...]  # positions on the tape of what made the inputs
    flops: int
    module: str


class Tape(TorchDispatchMode):
    """Records operations, the last writer of every tensor, and the module that each ran in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.writer: dict[int, int] = {}
        self.kept: list[Any] = []  # or a freed tensor's id would name another
        self.inside = [""]
        self.formulas = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS).flop_registry
        self.handles = []
        for name, child in module.named_modules():
            enter, leave = self.hooks(name)
            self.handles += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]

    def hooks(self, name: str) -> tuple[Callable, Callable]:
        return lambda *_: self.inside.append(name), lambda *_: (self.inside.pop(), None)[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        formula = self.formulas.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        reads = tuple(self.writer[id(t)] for t in given if id(t) in self.writer)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.writer[id(t)] = len(self.ops)
        self.kept += [given, out]
        self.ops.append(Op(reads, flops, self.inside[-1]))
        return out

    def needed(self, outputs: tuple[Tensor, ...]) -> list[Op]:
        """The operations whose results reach `outputs`."""
        alive = {self.writer[id(t)] for t in outputs if id(t) in self.writer}
        for i in range(len(self.ops) - 1, -1, -1):
            if i in alive:
                alive.update(self.ops[i].reads)
        return [self.ops[i] for i in sorted(alive)]


@dataclass(frozen=True)
class Living:
    flops: int
    modules: frozenset[str]  # with every module that one of them lies in


def living(component: Component, planned: PlanSet, fake: FakeTensorMode) -> dict[str, Living]:
    """Of each variant, what it computes."""
    full, *others = planned.variants
    found, fresh = ran(component, planned.marks, full, fake, {})
    return {full.name: found} | {v.name: ran(component, planned.marks, v, fake, fresh)[0] for v in others}


def ran(
    component: Component, marks: tuple[Mark, ...], variant: Variant, fake: FakeTensorMode, stored: dict[str, Tensor]
) -> tuple[Living, dict[str, Tensor]]:
    """What one variant computes, and the fake values that it stores. The component's tensors are of `fake`, or real."""
    module = VariantModule(component.module, marks, variant, component.inputs)
    with torch.no_grad(), fake:
        args = [t if isinstance(t, FakeTensor) else fake.from_tensor(t) for t in component.args]
        if module.coefficients:
            args.append(torch.ones(1, module.coefficients))
            args += [stored[name.partition("@")[0]] for name in module.inputs[len(args) :]]
        tape = Tape(component.module)
        with tape:
            results = module(*args)
        for handle in tape.handles:
            handle.remove()
    ops = tape.needed(results)
    paths = [op.module.split(".") for op in ops]
    inside = frozenset(".".join(p[:i]) for p in paths for i in range(1, len(p) + 1))
    return Living(sum(op.flops for op in ops), inside), dict(zip(module.outputs, results, strict=True))
