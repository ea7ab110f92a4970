"""A captured graph as an ONNX model: for every backend that reads ONNX, and for nothing else.

The graph comes from `onnx_rewrite.rewrite_graph`. Out comes a model whose initializers have the names of the graph's constants
and no data: that lies in the artifact's weight files, and `locate_data` writes down where. Its bytes depend on the graph alone; traces and paths of
the sources are left out. Linears of 8 bits (`w8a8.py`) are Q/DQ pairs of constant scales, which ONNX Runtime and TensorRT
both turn into products of int8, and TensorRT into such of fp8: x / max|x| of its token is what is quantized, and the maximum is
multiplied in again after.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset21
from torch import Tensor
from torch.onnx import OnnxExporterError

from ....runtime.errors import ExportError, error_summary
from ...passes.captured_graph import CapturedGraph
from ...private_torch import ONNX_REGISTRY_LOGGER
from .. import int8_weights
from ..options import DEFAULT_OPSET
from ..w8a8 import FP8_LEVELS, FP8_OPERATOR, INT8_LEVELS, INT8_OPERATOR, TINY
from .program import flat_program

op: Any = opset21
DATA_PLACEHOLDER = "weights"
"""Where the model says that its initializers' data lies, until `locate_data` says it."""


def onnx_model(graph: CapturedGraph, opset: int = DEFAULT_OPSET) -> onnx.ModelProto:
    """The graph as ONNX, with inputs and outputs named as its own. Raises ExportError naming what ONNX cannot say."""
    constants = graph.constants()
    if pairs := sorted(name for name, tensor in constants.items() if tensor.is_complex()):
        raise ExportError(
            f"graph {graph.name!r}: constant {pairs[0]!r} is complex, which ONNX has no operators for; set compile.backend=aoti"
        )
    model = translate_graph(graph, opset)
    for name, tensor in constants.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = declare_external(name, tensor)
    model.metadata_props.clear()
    model.producer_version = None
    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def translate_graph(graph: CapturedGraph, opset: int) -> ir.Model:
    """The ONNX model by torch.onnx, of the graph itself, or of one traced again where an operator has to be taken apart."""
    try:
        with silence_torch_onnx():
            try:
                return export_by_torch(graph, flat_program(graph), opset)
            except OnnxExporterError:
                return export_by_torch(graph, torch.export.export(graph.gm, graph.args, strict=False), opset)
    except Exception as e:
        raise ExportError(
            f"graph {graph.name!r}: it has no form in ONNX ({root_cause(e)}); set compile.backend=aoti"
        ) from e


def export_by_torch(graph: CapturedGraph, program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The program as torch.onnx exports it, without its optimizer, whose time grows faster than the graph."""
    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        optimize=False,
        verbose=False,
        input_names=[s.name for s in graph.inputs],
        output_names=[s.name for s in graph.outputs],
        custom_translation_table={
            INT8_OPERATOR.default: w8a8_translator(INT8_LEVELS, onnx.TensorProto.INT8),
            FP8_OPERATOR.default: w8a8_translator(FP8_LEVELS, onnx.TensorProto.FLOAT8E4M3FN),
            int8_weights.LINEAR_OPERATOR.default: translate_int8_weight_linear,
            int8_weights.CONV2D_OPERATOR.default: translate_int8_weight_conv2d,
            torch.ops.aten.rms_norm.default: translate_rms_norm,
        },
    )
    assert made is not None
    return made.model


def root_cause(e: BaseException) -> str:
    """The error at the root of a chain, in a line: torch.onnx wraps the operator that it does not know in pages of advice."""
    while e.__cause__:
        e = e.__cause__
    return error_summary(e)


def w8a8_translator(levels: float, dtype: int) -> Any:
    """A translation of `prebake::w8a8`, or `w8a8_fp8`. Products of one input share its scaling, and each has quantizing nodes of its
    own: that is the pattern which runtimes look for."""
    scaled: dict[Any, tuple[Any, Any]] = {}

    def translate(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
        if x not in scaled:
            wide = cast_to_float(x)
            last = op.Constant(value_ints=[-1])
            above, below = op.ReduceMax(wide, last, keepdims=1), op.Neg(op.ReduceMin(wide, last, keepdims=1))
            largest = op.Max(above, below, op.Constant(value_float=TINY))
            scaled[x] = op.Div(wide, largest), largest
        tokens, largest = scaled[x]
        zero = onnx.helper.make_tensor("", dtype, (), bytes(1), raw=True)
        step, zero = op.Constant(value_float=1 / levels), op.Constant(value=zero)
        left = op.DequantizeLinear(op.QuantizeLinear(tokens, step, zero), step, zero)
        y = op.Mul(op.MatMul(left, op.DequantizeLinear(weight, scale, axis=1)), largest)
        if bias is not None:
            y = op.Add(y, cast_to_float(bias))
        return y if x.dtype == ir.DataType.FLOAT else op.Cast(y, to=x.dtype)

    return translate


def translate_int8_weight_linear(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """Translates `prebake::int8_weight_linear`. ONNX Runtime leaves a dequantizing node of a constant in the graph, so that the
    session holds the weight in int8; a cast of one it would compute once and keep. Scales are multiplied in apart: of a product
    with a dequantized weight it makes MatMulNBits (1.32), which quantizes activations too, unasked."""
    dequantized = op.Mul(op.DequantizeLinear(weight, op.Constant(value_float=1.0)), scale)
    y = op.MatMul(x, cast_from_float(dequantized, x))
    return y if bias is None else op.Add(y, cast_like(bias, x))


def translate_int8_weight_conv2d(
    x: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """Translates `prebake::int8_weight_conv2d` in the same way."""
    dequantized = cast_from_float(op.DequantizeLinear(weight, scale, axis=0), x)
    places = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation), "group": groups}
    return op.Conv(x, dequantized, None if bias is None else cast_like(bias, x), **places)


def cast_like(value: Any, x: Any) -> Any:
    return value if value.dtype == x.dtype else op.Cast(value, to=x.dtype)


def cast_from_float(value: Any, x: Any) -> Any:
    """A value in float32, whose dtype is not known yet, as x has it."""
    return value if x.dtype == ir.DataType.FLOAT else op.Cast(value, to=x.dtype)


def translate_rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """Translates `aten::rms_norm`, in float32, as x / sqrt(mean(x ** 2) + eps) * weight: ONNX Runtime makes one kernel of
    that, and none of what torch.onnx would take it apart into."""
    wide = cast_to_float(x)
    axes = op.Constant(value_ints=list(range(-len(shape), 0)))
    mean = op.ReduceMean(op.Pow(wide, op.Constant(value_float=2.0)), axes, keepdims=1)
    least = op.Constant(value_float=torch.finfo(torch.float32).eps if eps is None else eps)
    y = op.Div(wide, op.Sqrt(op.Add(mean, least)))
    y = y if weight is None else op.Mul(y, cast_to_float(weight))
    return y if x.dtype == ir.DataType.FLOAT else op.Cast(y, to=x.dtype)


def cast_to_float(x: Any) -> Any:
    return x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)


def declare_external(name: str, tensor: Tensor) -> ir.ExternalTensor:
    """The tensor's name, dtype, shape and size."""
    dtype = ir.DataType[ONNX_DTYPES[tensor.dtype]]
    return ir.ExternalTensor(
        DATA_PLACEHOLDER, 0, tensor.nbytes, dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=""
    )


ONNX_DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
    torch.float8_e4m3fn: "FLOAT8E4M3FN",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
"""torch's dtype -> ONNX's name of it."""


def locate_data(model: onnx.ModelProto, places: Mapping[str, tuple[str, int]]) -> None:
    """Points every constant at its place, (file, offset in bytes): files are relative to the folder that readers are told."""
    for initializer in model.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            path, offset = places[initializer.name]
            length = next(e.value for e in initializer.external_data if e.key == "length")
            del initializer.external_data[:]
            for key, value in (("location", path), ("offset", str(offset)), ("length", length)):
                initializer.external_data.add(key=key, value=value)


def find_weight_data(folder: Path) -> dict[str, tuple[str, int]]:
    """Key -> (weight file, offset of its data), of all tensors in the folder's weight files."""
    found = {}
    for path in sorted((folder / "weights").iterdir()):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for key, entry in header.items():
            if key != "__metadata__":
                found[key] = (f"weights/{path.name}", 8 + size + entry["data_offsets"][0])
    return found


def embed_data(model: onnx.ModelProto, constants: Mapping[str, Tensor]) -> onnx.ModelProto:
    """A copy of the model with its constants' values inside: for checkers, which want a whole model, and for small ones."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for initializer in whole.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            initializer.ClearField("data_location")
            del initializer.external_data[:]
            values = constants[initializer.name].detach().contiguous().reshape(-1)
            initializer.raw_data = values.view(torch.uint8).numpy().tobytes()
    return whole


@contextlib.contextmanager
def silence_torch_onnx() -> Iterator[None]:
    """A context without torch.onnx's notes on packages that nothing here needs."""
    log = logging.getLogger(ONNX_REGISTRY_LOGGER)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
