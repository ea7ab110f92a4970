"""AOTInductor for one NVIDIA GPU: layers in 8 bits, graphs moved to the device, and Inductor's options for it.

In: graphs that were captured on the CPU, whose operators know no device but where they make tensors. Out: the same graphs
on the GPU, and what `aoti.py` compiles them with. The manifest's `requires.packages` that are written here are read by
`runtime/gpu.py`. None of this has run on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from ....runtime.errors import ExportError, RecipeError
from ....runtime.gpu.capability import CAPABILITY_KEY, CUDA_KEY, capability_name
from ...passes.attention_backend import refuse_attention
from ...passes.captured_graph import CapturedGraph
from ...private_torch import multiply_fp8, multiply_int8
from .. import w8a8

FEATURE_MULTIPLE = 16
"""Of features in and out: cuBLASLt's products of 8 bits want rows of whole 16 bytes."""
MIN_TOKENS = 17
"""Tokens: torch's product of int8 takes more than 16 rows on a GPU (aten/src/ATen/native/cuda/Blas.cpp, `_int_mm_out_cuda`)."""


class CudaOptions(Protocol):
    """The `compile.options` that are for GPUs. With `multi_arch` kernels are kept as PTX besides, which newer GPUs
    compile for themselves; with `tf32` products of float32 round their factors to TF32."""

    multi_arch: bool
    tf32: bool


def check_gpu_recipe(recipe: Any) -> None:
    """Raises RecipeError where nothing could be compiled: Inductor compiles for the GPU that it sees, and for no other."""
    if not torch.cuda.is_available():
        raise RecipeError(
            "compile.device 'cuda': AOTInductor compiles for the GPU of the machine it runs on, and this torch sees none; "
            "export on such a machine, or set compile.device=cpu, or compile.backend=tensorrt, which builds without"
        )
    w8a8.refuse_convolutions(recipe)
    here = torch.cuda.get_device_capability()
    method = recipe.quantize
    if here < method.gpu_capability:
        raise RecipeError(
            f"quantize.method {method.method!r}: GPUs multiply {method.treatment} from {capability_name(method.gpu_capability)} on, "
            f"this one is {capability_name(here)}; set "
            "quantize.method=int8_dynamic"
        )


def cuda_flags(chosen: CudaOptions) -> dict[str, Any]:
    """Inductor's options: kernels lie inside the library, which then is all that a graph's code consists of."""
    return {"aot_inductor.embed_kernel_binary": True, "aot_inductor.emit_multi_arch_kernel": chosen.multi_arch}


def required_packages(chosen: CudaOptions) -> dict[str, str]:
    """The GPUs, "sm90" or with `multi_arch` "sm90+", and the CUDA that their driver must have."""
    made_for = capability_name(torch.cuda.get_device_capability()) + ("+" if chosen.multi_arch else "")
    return {CAPABILITY_KEY: made_for, CUDA_KEY: str(torch.version.cuda).split(".")[0]}


def cuda_toolchain() -> dict[str, str]:
    """The GPU, CUDA and Triton that went into the code."""
    triton = importlib.import_module("triton")
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}


@contextlib.contextmanager
def float32_as_tf32(wanted: bool) -> Iterator[None]:
    """Inside, Inductor writes products of float32 in TF32, or not; the process's own switch is left as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- layers in 8 bits -----------------------------------------------------------------------------------------------


class EightBitLinear(nn.Module):
    """A Linear in 8 bits: the arithmetic of `w8a8.py` as plain operators, which Inductor fuses with what lies around.

    torchao's own layers are not used: their graph depends on the device on which they are captured (on a CPU it corrects
    for unsigned bytes). The weight is [N, K], a product's right side read by columns, which float8 asks for on a GPU; it
    is a parameter, which `fold.py` does not turn around.
    """

    def __init__(self, linear: nn.Linear, method: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, scale = method.quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.multiply = method.multiply_on_gpu

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        y = self.multiply(tokens, self.weight.t(), self.scale)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def int8_product(tokens: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Tokens [T, K] times int8 `columns` [K, N]: float32 [T, N]. Too few rows for a GPU are filled up with zeros."""
    count, x = tokens.shape[0], tokens.float()
    a = w8a8.token_maxima(x)
    q = (x / a / (1 / w8a8.INT8_LEVELS)).round().clamp(-128, 127).to(torch.int8)
    q = nn.functional.pad(q, (0, 0, 0, MIN_TOKENS - count)) if count < MIN_TOKENS else q
    return multiply_int8(q, columns)[:count].float() * (scale / w8a8.INT8_LEVELS) * a


def fp8_product(tokens: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Tokens [T, K] times float8_e4m3fn `columns` [K, N]: [T, N] in bfloat16, which is all that scales by row come out in."""
    x = tokens.float()
    a = w8a8.token_maxima(x)
    q = (x / a / (1 / w8a8.FP8_LEVELS)).clamp(-w8a8.FP8_LEVELS, w8a8.FP8_LEVELS).to(w8a8.FP8)
    by_column = scale[None, :]
    return multiply_fp8(q, columns, a / w8a8.FP8_LEVELS, by_column)


def quantize_layers(model: nn.Module, names: set[str], method: Any) -> None:
    """Replaces the Linears of these names in place, by a table of `exporter/quantize`. Raises ExportError for one that a GPU could not multiply."""
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        parent, linear = model.get_submodule(path), model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.in_features % FEATURE_MULTIPLE or linear.out_features % FEATURE_MULTIPLE:
            raise ExportError(
                f"layer {name!r}: expected multiples of {FEATURE_MULTIPLE} features for a product of 8 bits on a GPU, got "
                f"{linear.in_features}x{linear.out_features}; add its name to quantize.exclude"
            )
        setattr(parent, leaf, EightBitLinear(linear, method))


# --- graphs on the device ----------------------------------------------------------------------------------------------


def move_graph(graph: CapturedGraph, device: torch.device) -> CapturedGraph:
    """The graph on a device: its constants and examples copied there, and every operator that makes tensors making them
    there. Constants that are one tensor stay one. Raises ExportError for an operator that is the CPU's own, and for
    attention by a kernel that the GPU lacks."""
    copies: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to(device)
        return copies[id(tensor)]

    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    for node in gm.graph.nodes:
        if "_for_cpu" in str(node.target):
            raise ExportError(
                f"graph {graph.name!r}: {node.target} is an operator of the CPU, so it cannot move to {device}"
            )
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            owner = gm.get_submodule(path)
            replace_tensor(owner, leaf, there(getattr(owner, leaf)))
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        if isinstance(value := node.meta.get("val"), Tensor):
            node.meta["val"] = value.to(device)
    gm.recompile()
    moved = replace(graph, gm=gm, args=tuple(a.to(device) for a in graph.args))
    if device.type == "cuda":
        refuse_attention(moved)
    return moved


def replace_tensor(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Replaces a module's tensor by another of its kind: a parameter, or a buffer."""
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
