"""A captured graph as the ExportedProgram that torch.onnx reads, without tracing it again.

    before  def graph(x): return x @ self.weight_t + self.bias
    after   def graph(weight_t, bias, x): return x @ weight_t + bias      with a signature that says which is which

torch.export would trace the graph for that, and torch.onnx once more to take operators apart, which together is most of the
time of an export. A captured graph is flat and functional already, and `onnx_rewrite.py` leaves little in it to take apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument

from ..capture import Captured, output_nodes


class FlatProgram(ExportedProgram):
    """A program that is translated as it is."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        return self


def flat_program(graph: Captured) -> ExportedProgram:
    """The graph with its constants as inputs, before its own: what each node computes is in its `meta["val"]`."""
    constants = graph.constants()
    placeholders = graph.gm.graph.find_nodes(op="placeholder")
    fake = placeholders[0].meta["val"].fake_mode
    lifted = fx.Graph()
    stored: dict[str, fx.Node] = {}
    for i, (name, tensor) in enumerate(constants.items()):
        stored[name] = lifted.placeholder(f"constant_{i}")
        stored[name].meta["val"] = fake.from_tensor(tensor.detach(), static_shapes=True)
    now: dict[fx.Node, fx.Node] = {}
    for node in graph.gm.graph.nodes:
        now[node] = stored[node.target] if node.op == "get_attr" else lifted.node_copy(node, now.__getitem__)
    for node in lifted.nodes:
        node.meta = {"val": node.meta.get("val"), "nn_module_stack": {}}  # torch.onnx warns of nodes from no module
    signature = ExportGraphSignature(
        [
            *(InputSpec(InputKind.BUFFER, argument(node), name, persistent=True) for name, node in stored.items()),
            *(InputSpec(InputKind.USER_INPUT, argument(now[node]), None) for node in placeholders),
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, argument(now[node]), None) for node in output_nodes(graph.gm)],
    )
    return FlatProgram(torch.nn.Module(), lifted, signature, constants, {}, [ModuleCallEntry("")])


def argument(node: fx.Node) -> TensorArgument:
    return TensorArgument(node.name)
