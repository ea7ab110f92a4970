"""A captured graph as the network that TensorRT's parser is given: its ONNX model, with no weights in it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes

from ...passes.captured_graph import CapturedGraph
from ..onnx.graph import onnx_model
from ..options import DEFAULT_OPSET


def build_network(graph: CapturedGraph, opset: int = DEFAULT_OPSET) -> onnx.ModelProto:
    """The graph's model with its constants as inputs, of the shape in which they lie in memory, and with what the parser
    asks to be an initializer as one.

    Parsers of TensorRT take axes and shapes that are given as values, not as arithmetic on values. Attention that is one
    operator is marked as one that may be taken apart, or the builder fails where it has no kernel for it, as in float32.
    """
    permuted = {name for name, tensor in graph.constants().items() if is_nhwc(tensor)}
    made = ir.from_proto(onnx_model(graph, opset))
    for node in made.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
    scale_after_product(made.graph)
    for value in list(made.graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            del made.graph.initializers[str(value.name)]
            value.const_value = None
            made.graph.inputs.append(value)
            if value.name in permuted:
                permute_input(made.graph, value)
    with np.errstate(divide="ignore", invalid="ignore"):  # of values that a `where` leaves out
        fold_constants(made, onnx_shape_inference=False)
    remove_unused_nodes(made)
    return ir.to_proto(made)


def is_nhwc(tensor: torch.Tensor) -> bool:
    """Whether a weight may be seen as [O, H, W, I] where it lies: those of 1 x 1 convolutions too."""
    return tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.is_contiguous(memory_format=torch.channels_last)


def permute_input(graph: ir.Graph, weight: ir.Value) -> None:
    """Makes an input [O, I, H, W] one of [O, H, W, I], and what reads it read that turned back."""
    assert weight.shape is not None
    o, i, h, w = weight.shape
    uses = weight.uses()
    turned = ir.node("Transpose", [weight], {"perm": [0, 3, 1, 2]})
    turned.outputs[0].shape, turned.outputs[0].type = weight.shape, weight.type
    weight.shape = ir.Shape([o, h, w, i])
    graph.insert_before(graph[0], turned)
    for user, position in uses:
        user.replace_input_with(position, turned.outputs[0])


def scale_after_product(graph: ir.Graph) -> None:
    """Draws the scales of weights of 8 bits out of the products:

        before  y = x @ dequantize(weight, scale, axis=1)
        after   y = (x @ dequantize(weight, 1.0)) * scale

    A scale that is an input of the network, in the dequantizing node, makes TensorRT-RTX 1.7 multiply in float.
    """
    dequantized = [n for n in graph if n.op_type == "DequantizeLinear" and "axis" in n.attributes]
    if not dequantized:
        return
    one = ir.Value(name="prebake_one", const_value=ir.tensor(1.0, name="prebake_one", dtype=ir.DataType.FLOAT))
    graph.register_initializer(one)
    for node in dequantized:
        scale = node.inputs[1]
        node.replace_input_with(1, one)
        del node.attributes["axis"]
        for product, _ in node.outputs[0].uses():
            uses = product.outputs[0].uses()
            scaled = ir.node("Mul", [product.outputs[0], scale])
            graph.insert_after(product, scaled)
            for user, i in uses:
                user.replace_input_with(i, scaled.outputs[0])
