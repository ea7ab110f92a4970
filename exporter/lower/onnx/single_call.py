"""One call of an operator as a session of ONNX Runtime, to be timed: translated and opened as the graphs of an artifact are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from ....runtime.backends.onnxruntime import open_session, ort_value
from ....runtime.manifest import TensorSpec
from ...passes.captured_graph import CapturedGraph
from ...private_torch import fake_tensor_mode, map_tree
from .graph import onnx_model
from .rewrite import rewrite_graph

ACTIVATIONS = {"scaled_dot_product_attention": 4}
"""How many of an operator's first tensors are computed by the graph; of others one, and the rest are its weights."""


class SingleCalls:
    """Calls of operators in sessions of so many threads; `prepack` as `open_session` takes it."""

    def __init__(self, opset: int, threads: int, *, prepack: bool) -> None:
        self._opset, self._threads, self._prepack = opset, threads, prepack
        self._models: dict[str, onnx.ModelProto] = {}

    def stand_in(self, op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Callable[[], Tensor]:
        """What takes as long as a session does for this call, and gives what it gives."""
        graph = single_call_graph(op, arguments, keywords)
        inputs = [ort_value(t) for t in graph.args]
        graph = rewrite_graph(graph)
        model = self._translate(graph, (op, arguments, keywords)).SerializeToString()
        constants = {name: ort_value(t.contiguous()) for name, t in graph.constants().items()}
        session = open_session(model, Path(), constants, torch.device("cpu"), self._threads, prepack=self._prepack)
        binding = session.io_binding()
        for spec, value in zip(graph.inputs, inputs, strict=True):
            binding.bind_ortvalue_input(spec.name, value)
        result = torch.empty(graph.outputs[0].shape, dtype=getattr(torch, graph.outputs[0].dtype))
        binding.bind_ortvalue_output(graph.outputs[0].name, ort_value(result))
        held = (constants, inputs)  # the session has their addresses only

        def run(held: Any = held) -> Tensor:
            session.run_with_iobinding(binding)
            return result

        return run

    def _translate(self, graph: CapturedGraph, call: tuple[Any, ...]) -> onnx.ModelProto:
        """The graph in ONNX. Of calls that differ in sizes alone one is translated, which takes seconds: none of these operators'
        translations holds a size."""
        key = repr(map_tree(Tensor, lambda t: (t.dtype, t.dim()), call))
        if key not in self._models:
            self._models[key] = onnx_model(graph, self._opset)
        model = onnx.ModelProto()
        model.CopyFrom(self._models[key])
        del model.graph.value_info[:]
        shapes = {spec.name: spec.shape for spec in (*graph.inputs, *graph.outputs)}
        for value in (*model.graph.input, *model.graph.output):
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                dim.dim_value = size
        constants = graph.constants()
        for stored in model.graph.initializer:
            if stored.name in constants:
                stored.dims[:] = constants[stored.name].shape
        return model


def single_call_graph(op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> CapturedGraph:
    """A graph of that call alone: its first tensors are inputs, the others constants."""
    activations = ACTIVATIONS.get(str(op).split(".")[1], 1)
    graph, root = fx.Graph(), torch.nn.Module()
    inputs: list[Tensor] = []
    constants: list[Tensor] = []
    with fake_tensor_mode() as fake:
        nodes = []
        for argument in arguments:
            if isinstance(argument, Tensor) and len(inputs) < activations:
                nodes.append(graph.placeholder(f"x{len(inputs)}"))
                inputs.append(argument.contiguous())
                nodes[-1].meta["val"] = fake.from_tensor(inputs[-1])
            elif isinstance(argument, Tensor):
                root.register_buffer(f"weight{len(constants)}", argument)
                nodes.append(graph.get_attr(f"weight{len(constants)}"))
                nodes[-1].meta["val"] = fake.from_tensor(argument)
                constants.append(argument)
            else:
                nodes.append(argument)
        made = graph.call_function(op, tuple(nodes), keywords)
        values = fx.map_arg(tuple(nodes), lambda n: n.meta["val"])
        with fake:
            made.meta["val"] = op(*values, **keywords)
    graph.output((made,))
    shape, dtype = tuple(made.meta["val"].shape), str(made.meta["val"].dtype).removeprefix("torch.")
    specs = tuple(
        TensorSpec(name=f"x{i}", shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for i, t in enumerate(inputs)
    )
    return CapturedGraph(
        "call", fx.GraphModule(root, graph), tuple(inputs), specs, (TensorSpec(name="y", shape=shape, dtype=dtype),)
    )
