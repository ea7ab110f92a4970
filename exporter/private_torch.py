"""What exporting uses of torch without a promise of torch's: each such name is here, and in no other file of `exporter/`.

Tried on the CPU with torch 2.13.0 and 2.14.1; what is for GPUs alone says so. `tests/exporter/test_private_torch.py` holds
each name to the signature that is expected of it, so that a new torch is a change in this file alone, and in its twin
`runtime/private_torch.py`. Operators under `torch.ops` are not listed: graphs are made of them, and a torch without one
fails at import. torch._inductor is imported where it is needed, because it takes a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload

LOGGER_NAMES = ("torch._inductor", "torch.utils._pytree", "torch.export")
"""The loggers that speak of what is nobody's concern at an export."""
ONNX_REGISTRY_LOGGER = "torch.onnx._internal.exporter._registration"
"""The logger that names packages which torch.onnx could use and which are not installed."""

# --- Inductor -------------------------------------------------------------------------------------------------------------


def inductor_config() -> Any:
    """Inductor's settings, the module: `get_config_copy()`, `save_config_portable()`, and groups such as `cpp` as attributes.
    `torch._inductor.list_options()` is public and names flags without their types."""
    import torch._inductor.config as config

    return config


def has_inductor_flag(name: str) -> bool:
    """Whether this torch has the flag of that dotted name. `cpp.march` is missing before 2.13, and
    `aot_inductor.enable_line_tables` in 2.11."""
    group, _, flag = name.rpartition(".")
    owner = inductor_config()
    return hasattr(getattr(owner, group) if group else owner, flag)


def inductor_key() -> bytes:
    """A hash of all of Inductor's sources, `codecache.torch_key`. torch's version is public, and is the same for two builds."""
    from torch._inductor.codecache import torch_key

    return torch_key()


def cpp_compiler() -> str:
    """The C++ compiler that Inductor will call, `cpp_builder.get_cpp_compiler`: a name or a path, from the flag `cpp.cxx` and the
    environment. Raises RuntimeError where there is none. Nothing public says it."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


@contextmanager
def keep_headers(folder: Path) -> Iterator[None]:
    """Inside, the C++ headers that Inductor compiles are kept in `folder`, `codecache._HEADER_DIR`; else in one of TMPDIR that
    grows without end, whatever TORCHINDUCTOR_CACHE_DIR says. Nothing public says where."""
    from torch._inductor import codecache

    before = codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR
    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(folder), str(folder / "locks")
    try:
        yield
    finally:
        codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = before


def compile_graph_module(gm: fx.GraphModule, args: tuple[Any, ...], options: Mapping[str, Any]) -> list[Any]:
    """The files that Inductor wrote, with `aot_inductor.package` among the options. The public
    `aoti_compile_and_package` takes a whole ExportedProgram, and puts files into the archive that are not to be there."""
    import torch._inductor

    made: Any = torch._inductor.aot_compile(gm, args, options=dict(options))
    return made


def archive_models(path: Path, models: Mapping[str, Sequence[str]]) -> None:
    """A `.pt2` of the models' files, `package.package_aoti`. Its layout is the public part: `aoti_load_package` reads it."""
    from torch._inductor.package import package_aoti

    files: Any = {name: list(paths) for name, paths in models.items()}
    package_aoti(str(path), files)


# --- tracing and graphs -----------------------------------------------------------------------------------------------------


def fake_tensor_mode() -> Any:
    """A `FakeTensorMode` that lets real tensors in, in which operators compute shapes alone. With it comes `from_tensor`."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def suspend_modes() -> AbstractContextManager[Any]:
    """A context without the dispatch modes in force, so that a tracer does not see what is computed in it:
    `torch.utils._python_dispatch._disable_current_modes`."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


@contextmanager
def trace_sparingly() -> Iterator[None]:
    """Inside, graphs are traced without what nobody reads, a third of the time: no stack trace for each node
    (`torch.fx.config.do_not_emit_stack_traces`, which older torch has not), and no Python code of a graph before it is called
    (`torch.fx._lazy_graph_module._use_lazy_graph_module`, which Inductor uses)."""
    from torch.fx import config
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    settings: Any = config
    before = getattr(settings, "do_not_emit_stack_traces", False)
    settings.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        settings.do_not_emit_stack_traces = before


def flatten_tree(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts, `torch.utils._pytree.tree_leaves`. torch exports no pytree by a public name;
    `optree` is one."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)


def map_tree(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with its leaves of one class changed, `torch.utils._pytree.tree_map_only`."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(kind, change, tree)


def graph_specs(gm: fx.GraphModule) -> tuple[Any, Any]:
    """How inputs and outputs are nested, None for a graph that torch.export did not make."""
    return getattr(gm, "_in_spec", None), getattr(gm, "_out_spec", None)


def operator_schema(op: OpOverload) -> Any:
    """`torch.FunctionSchema`: `name`, `is_mutable`, `returns`. `torch.ops` keeps it under a private name."""
    return op._schema


def operator_overload(definition: Any) -> OpOverload:
    """The operator of a function under `torch.library.custom_op`, as graphs call it. By its name it is public:
    `torch.ops.prebake.attention.default`."""
    return definition._opoverload


def operator_family(op: OpOverload) -> str:
    """`reshape` of `aten.reshape.default`."""
    return op._opname


def overload_name(op: OpOverload) -> str:
    """`default` of `aten.reshape.default`."""
    return op._overloadname


def example_number(size: int | torch.SymInt) -> int:
    """What a dimension was while it was traced: the number itself, or of a symbol its `hint`, without a word to the tracer, which
    `int()` would make a constant of it."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_surely_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two dimensions are equal at every size, `symbolic_shapes.statically_known_true`: comparing symbols by `==` would
    settle, for the rest of the graph, that they are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def have_equal_shapes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape at every size."""
    return a.dim() == b.dim() and all(is_surely_equal(n, m) for n, m in zip(a.shape, b.shape, strict=True))


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, also for fake ones, whose public `data_ptr` is 0."""
    return tensor.untyped_storage()._cdata


# --- arithmetic -------------------------------------------------------------------------------------------------------------


def multiply_int8(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] times int8 [K, N]: int32 [M, N]. On a GPU it takes more than 16 rows. torchao calls it too; nothing public
    multiplies int8."""
    return torch._int_mm(a, b)


def multiply_fp8(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """float8 [M, K] times float8 [K, N], scaled by row [M, 1] and column [1, N]: bfloat16 [M, N]. Since torch 2.10 public as
    `torch.nn.functional.scaled_mm`. On a CPU since 2.12; on a GPU run with 2.11."""
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16)


def move_averages(means: list[Tensor], values: list[Tensor], weight: float) -> None:
    """Each mean moves towards its value by `weight`, in place; a loop of the public `Tensor.lerp_` does the same."""
    torch._foreach_lerp_(means, values, weight)


def copy_tensors(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Each target gets the numbers of its source; a loop of the public `Tensor.copy_` does the same."""
    torch._foreach_copy_(targets, sources)


# --- modules and logs -------------------------------------------------------------------------------------------------------


def unwrap_subclass_parameters(model: nn.Module) -> None:
    """Each parameter that is a tensor subclass becomes plain tensors, which torch.export and a weight file can name;
    torchao's public `utils.unwrap_tensor_subclass` does it for the weights of Linears and embeddings."""
    from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters

    unwrap_tensor_subclass_parameters(model)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after its forward. torch adds hooks by public names and lists them by none."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def silence_torch_logs() -> None:
    """Errors alone from torch's own loggers, whose levels are set when torch is imported. `torch._logging.set_logs` is documented,
    under its private name; the variable TORCH_LOGS does the same for a process that is to start."""
    for name in LOGGER_NAMES:
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._logging.set_logs(all=logging.ERROR)
