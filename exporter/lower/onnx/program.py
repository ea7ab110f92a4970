"""A captured graph as the ExportedProgram that torch.onnx reads, without tracing it again.

    before  def graph(x): return x @ self.weight_t + self.bias
    after   def graph(weight_t, bias, x): return x @ weight_t + bias      with a signature that says which is which

torch.export would trace the graph for that, and torch.onnx once more to take operators apart, which together is most of the
time of an export. A captured graph is flat and functional already, and of its operators few are to be taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ...passes.captured_graph import CapturedGraph, output_nodes


class FlatProgram(ExportedProgram):
    """A program that takes apart what it has to, and nothing else."""

    def run_decompositions(self, decomp_table: Any = None, *_: Any, **__: Any) -> ExportedProgram:
        for node in list(self.graph.nodes):
            if node.target in decomp_table:
                decompose_node(node, decomp_table)
        return self


def decompose_node(node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    """Puts in the node's place what `table` makes of it: an operator of one tensor."""
    operator: Any = node.target

    def run(*tensors: Any) -> Any:
        given = dict(zip(node.all_input_nodes, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return operator(*args, **kwargs)

    values = [n.meta["val"] for n in node.all_input_nodes]
    with values[0].fake_mode:
        parts = make_fx(functionalize(run), decomposition_table=dict(table))(*values).graph
    now = dict(zip(parts.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for part in parts.nodes:
            if part.op == "call_function":
                now[part] = node.graph.node_copy(part, now.__getitem__)
                now[part].meta = node_meta(part)
    (output,) = parts.find_nodes(op="output")
    node.replace_all_uses_with(now[output.args[0]])
    node.graph.erase_node(node)


def node_meta(node: fx.Node) -> dict[str, Any]:
    """The metadata of a node that torch.onnx reads, without which it warns of each."""
    return {"val": node.meta.get("val"), "nn_module_stack": {}}


def flat_program(graph: CapturedGraph) -> ExportedProgram:
    """The graph with its constants as inputs, before its own: what each node computes is in its `node_meta["val"]`."""
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
        node.meta = node_meta(node)
    signature = ExportGraphSignature(
        [
            *(
                InputSpec(InputKind.BUFFER, tensor_argument(node), name, persistent=True)
                for name, node in stored.items()
            ),
            *(InputSpec(InputKind.USER_INPUT, tensor_argument(now[node]), None) for node in placeholders),
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, tensor_argument(now[node]), None) for node in output_nodes(graph.gm)],
    )
    return FlatProgram(torch.nn.Module(), lifted, signature, constants, {}, [ModuleCallEntry("")])


def tensor_argument(node: fx.Node) -> TensorArgument:
    return TensorArgument(node.name)
