"""Tensors that tracing left as plain attributes become buffers: `CapturedGraph.constants` and AOTInductor know buffers by name.

before  self.lifted = tensor(...);                       y = x + self.lifted
after   self.register_buffer("lifted", tensor(...));     y = x + self.lifted
"""

from __future__ import annotations

from torch import Tensor, fx


def register_constants(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with every tensor that a node reads as a parameter or a buffer."""
    known = dict(gm.named_parameters()) | dict(gm.named_buffers())
    for target in {str(n.target) for n in gm.graph.find_nodes(op="get_attr")} - known.keys():
        path, _, name = target.rpartition(".")
        owner = gm.get_submodule(path)
        value = getattr(owner, name)
        if isinstance(value, Tensor):
            delattr(owner, name)
            owner.register_buffer(name, value)
    return gm
