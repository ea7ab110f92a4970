"""What torch does not promise is named in two files, and is in the installed torch as they expect it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prebake.exporter
import prebake.runtime
from prebake.exporter import private_torch as exporting
from prebake.runtime import private_torch as replaying

ROOTS = [Path(next(iter(package.__path__))) for package in (prebake.exporter, prebake.runtime)]
OF_OTHERS = {
    "argparse": {"_SubParsersAction", "_actions"},
    "ctypes": {"_handle"},
    "diffusers": {
        "_diffusers_hook",
        "_get_positional_embeddings",
        "_interrupt",
        "_keep_in_fp32_modules",
        "_lora_loadable_modules",
        "_pack_latents",
        "_prepare_latent_image_ids",
        "_prepare_rotary_positional_embeddings",
        "_progress_bar_config",
    },
    "accelerate": {"_hf_hook"},
    "tqdm": {"_instances"},
}
"""Private names of other libraries, which may be anywhere."""
PRIVATE_PATH = re.compile(r"torch(\.\w+)*\._(?!_)\w+(\.\w+)*")


def is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


class PrivateNames(ast.NodeVisitor):
    """The private names of torch in a file: with their path from `torch` on, or `.name` of what only running code knows.

    Operators (`torch.ops`) are not among them, nor what a class calls its own.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.names: set[str] = set()
        self.modules = {"torch": "torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            if isinstance(node, ast.Import):
                self.modules |= {a.asname: a.name for a in node.names if a.asname}
        self.visit(tree)

    def add(self, dotted: str) -> None:
        if dotted.startswith("torch.") and is_private(dotted) and not dotted.startswith("torch.ops."):
            self.names.add(dotted)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names if not node.level else ():
            self.add(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root, _, rest = ast.unparse(node).partition(".")
        if root in self.modules and rest.replace(".", "_").isidentifier():
            self.add(f"{self.modules[root]}.{rest}")
            return
        if is_private(node.attr) and root not in ("self", "cls", "aten"):
            self.add_attribute(node.attr)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                self.add_attribute(str(name.value))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and PRIVATE_PATH.fullmatch(node.value):
            self.names.add(node.value)

    def add_attribute(self, name: str) -> None:
        if not any(name in names for names in OF_OTHERS.values()):
            self.names.add(f".{name}")


def private_names(source: str) -> set[str]:
    names = PrivateNames(ast.parse(source)).names
    return {n for n in names if not any(other.startswith(f"{n}.") for other in names)}


def sources() -> Iterator[tuple[str, str]]:
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            yield f"{root.name}/{path.relative_to(root)}", path.read_text(encoding="utf-8")


# --- names ----------------------------------------------------------------------------------------------------------------


def test_no_other_file_names_what_torch_keeps_to_itself():
    found = {f"{path}: {name}" for path, text in sources() for name in private_names(text)}
    elsewhere = sorted(f for f in found if "/private_torch.py: " not in f)
    assert not elsewhere, (
        "put them into private_torch.py of that side, or, if they are not torch's, into OF_OTHERS: "
        + "; ".join(elsewhere)
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._inductor.config as config", "torch._inductor.config"),
        ("from torch._inductor import config", "torch._inductor.config"),
        ("from torch._inductor import config\nconfig.cpp", "torch._inductor.config.cpp"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import _C as c", "torch._C"),
        ("import torch\ny = torch._int_mm(a, b)", "torch._int_mm"),
        ("import torch as t\ny = t._int_mm(a, b)", "torch._int_mm"),
        ("y = node.target._schema.name", "._schema"),
        ("y = made()[0]._cdata", "._cdata"),
        ("y = getattr(module, '_forward_hooks', None)", "._forward_hooks"),
        ("log('torch.onnx._internal.exporter')", "torch.onnx._internal.exporter"),
    ],
)
def test_a_private_name_is_found_however_it_is_written(source, name):
    assert private_names(source) == {name}


@pytest.mark.parametrize(
    "source",
    [
        "torch.ops.aten._to_copy.default",
        "self._kept = cls._made",
        "from .common import _own",
        "import _thread",
        "say('torch._inductor.config has no such flag')",
        "torch.__version__",
        "commands: argparse._SubParsersAction",
    ],
)
def test_what_is_not_torchs_own_is_let_be(source):
    assert not private_names(source)


# --- in the installed torch ---------------------------------------------------------------------------------------------------


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether its parameters have these names, in this order, before all others."""
    return tuple(inspect.signature(function).parameters)[: len(names)] == names


def check_header_folder() -> None:
    from torch._inductor import codecache

    assert Path(codecache._HEADER_DIR).name == "precompiled_headers"
    assert Path(codecache._HEADER_LOCK_DIR).parent == Path(codecache._HEADER_DIR)
    reads = inspect.unwrap(codecache._precompile_header).__code__.co_names  # at each call
    assert {"_HEADER_DIR", "_HEADER_LOCK_DIR"} <= set(reads)


def check_inductor_config() -> None:
    config = exporting.inductor_config()
    assert {"cpp.simdlen", "aot_inductor.package", "epilogue_fusion"} <= config.get_config_copy().keys()
    assert "cpp.simdlen" in config.save_config_portable()
    assert exporting.has_inductor_flag("cpp.simdlen")
    assert exporting.has_inductor_flag("epilogue_fusion")
    assert not exporting.has_inductor_flag("cpp.simdlenght")


def check_aot_compile() -> None:
    import torch._inductor

    assert takes(torch._inductor.aot_compile, "gm", "args", "kwargs", "options")


def check_package_aoti() -> None:
    from torch._inductor.package import package_aoti

    assert takes(package_aoti, "archive_file", "aoti_files")


def check_unwrapping() -> None:
    from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters

    assert takes(unwrap_tensor_subclass_parameters, "module")
    exporting.unwrap_subclass_parameters(model := nn.Linear(2, 2))
    assert type(model.weight) is nn.Parameter


def check_fake_tensors() -> None:
    with exporting.fake_tensor_mode() as fake:
        y = fake.from_tensor(torch.ones(2, 3)).sum(0) + torch.ones(3)
    assert type(y) is not torch.Tensor
    assert y.shape == (3,)


def check_modes() -> None:
    with exporting.fake_tensor_mode():
        assert type(torch.ones(2)) is not torch.Tensor
        with exporting.suspend_modes():
            assert type(torch.ones(2)) is torch.Tensor


def check_lazy_modules() -> None:
    from torch.fx import config

    with exporting.trace_sparingly():
        program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        lazy = program.graph_module
    assert not any(n.meta.get("stack_trace") for n in program.graph.nodes)
    assert torch.equal(program.module()(torch.ones(1, 2)), program.module()(torch.ones(1, 2)))
    assert "linear" in lazy.code
    assert not getattr(config, "do_not_emit_stack_traces", False)


def check_storage() -> None:
    with exporting.fake_tensor_mode():
        x, other = torch.ones(4), torch.ones(4)
        assert exporting.storage_key(x) == exporting.storage_key(x[1:]) != exporting.storage_key(other)


def check_int8() -> None:
    a, b = torch.full((17, 16), 100, dtype=torch.int8), torch.full((16, 16), -100, dtype=torch.int8)
    y = exporting.multiply_int8(a, b)
    assert y.dtype == torch.int32
    assert y.unique().tolist() == [-160_000]


def check_fp8() -> None:
    schema = torch.ops.aten._scaled_mm.default._schema
    assert [a.name for a in schema.arguments][:4] == ["self", "mat2", "scale_a", "scale_b"]
    assert any(a.name == "out_dtype" and a.kwarg_only is False for a in schema.arguments)
    if torch.__version__ >= "2.12":  # torch 2.11 multiplies by rows on GPUs alone
        a, b = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.ones(16, 32).to(torch.float8_e4m3fn).t()
        y = exporting.multiply_fp8(a, b, torch.full((16, 1), 0.5), torch.full((1, 16), 0.25))
        assert y.dtype == torch.bfloat16
        assert y.unique().tolist() == [4.0]


def check_averages() -> None:
    exporting.move_averages(means := [torch.zeros(2)], [torch.ones(2)], 0.25)
    assert means[0].tolist() == [0.25, 0.25]


def check_copies() -> None:
    exporting.copy_tensors(targets := [torch.zeros(2)], [torch.ones(2)])
    assert targets[0].tolist() == [1.0, 1.0]


def check_specs() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert None not in exporting.graph_specs(program.module())  # pyright: ignore[reportArgumentType]


def check_definitions() -> None:
    from prebake.exporter.lower import w8a8

    assert exporting.operator_overload(w8a8.w8a8) is torch.ops.prebake.w8a8.default


def check_hooks(register: str) -> None:
    module = nn.Linear(2, 2)
    assert not exporting.has_forward_hooks(module)
    getattr(module, register)(lambda *_: None)
    assert exporting.has_forward_hooks(module)


def check_compiled_module() -> None:
    module = nn.Linear(2, 2)
    assert not replaying.is_compiled_module(module)
    module.compile()
    assert replaying.is_compiled_module(module)


def check_handles() -> None:
    x = torch.arange(3.0)
    (y,) = replaying.take_tensors(replaying.make_handles([x]))
    assert y.data_ptr() == x.data_ptr()
    assert y.tolist() == [0.0, 1.0, 2.0]


def check_runner(name: str) -> None:
    runner = getattr(replaying._aoti, name)
    for method in ("get_constant_names_to_original_fqns", "get_constant_names_to_dtypes", "run"):
        assert callable(getattr(runner, method))
    asked = runner.update_constant_buffer.__doc__
    assert re.search(r"tensor_map: .*use_inactive: bool, validate_full_updates: bool, user_managed: bool = ", asked)


def check_guards() -> None:
    like = replaying.likeness_guard(torch.ones(2, 3))
    assert like(torch.zeros(2, 3))
    strangers = (torch.ones(3, 2), torch.ones(3, 2).t(), torch.ones(2, 3).double(), torch.ones(2, 3).to_sparse(), None)
    assert not any(like(x) for x in strangers)


def check_writes() -> None:
    x = torch.zeros(3)
    before, y = replaying.count_writes(x), x.detach()
    y[1] = 1
    assert replaying.count_writes(x) > before
    with torch.inference_mode():
        assert replaying.count_writes(torch.zeros(3)) == 0


def check_hook_counts() -> None:
    module = nn.Linear(1, 1)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    assert (replaying.count_hooks(nn.Linear(1, 1)), replaying.count_hooks(module)) == (0, 2)


def check_cuda_runner() -> None:
    if not torch.backends.cuda.is_built():
        pytest.skip("a build of torch without CUDA has no such runner; install one with it")
    check_runner("AOTIModelContainerRunnerCuda")


def check_key() -> None:
    assert len(exporting.inductor_key()) == 32


def check_compiler() -> None:
    assert isinstance(exporting.cpp_compiler(), str)


def check_trees() -> None:
    tree = {"a": [1, (2.0, "b")]}
    assert exporting.flatten_tree(tree) == [1, 2.0, "b"]
    assert exporting.map_tree(int, lambda i: i + 1, tree) == {"a": [2, (2.0, "b")]}


def check_operators() -> None:
    add, view = torch.ops.aten.add_.Tensor, torch.ops.aten.view.default
    assert isinstance(add, exporting.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, exporting.HigherOrderOperator)
    assert exporting.operator_schema(add).is_mutable
    assert exporting.operator_schema(add).name == "aten::add_"
    assert exporting.operator_schema(view).returns[0].alias_info is not None
    assert (exporting.operator_family(add), exporting.overload_name(add)) == ("add_", "Tensor")
    assert (exporting.operator_family(view), exporting.overload_name(view)) == ("view", "default")


def check_loggers() -> None:
    for name in (*exporting.LOGGER_NAMES, exporting.ONNX_REGISTRY_LOGGER):
        assert importlib.util.find_spec(name), name


def check_logs() -> None:
    assert takes(torch._logging.set_logs, "all")


OF_EXPORTER: dict[str, Callable[[], object]] = {
    "torch._inductor.config": check_inductor_config,
    "torch._inductor.codecache.torch_key": check_key,
    "torch._inductor.cpp_builder.get_cpp_compiler": check_compiler,
    "torch._inductor.codecache._HEADER_DIR": check_header_folder,
    "torch._inductor.codecache._HEADER_LOCK_DIR": check_header_folder,
    "torch._inductor.aot_compile": check_aot_compile,
    "torch._inductor.package.package_aoti": check_package_aoti,
    "torch._functorch._aot_autograd.subclass_parametrization.unwrap_tensor_subclass_parameters": check_unwrapping,
    "torch._subclasses.FakeTensorMode": check_fake_tensors,
    "torch.utils._python_dispatch._disable_current_modes": check_modes,
    "torch.fx._lazy_graph_module._use_lazy_graph_module": check_lazy_modules,
    "torch.utils._pytree.tree_leaves": check_trees,
    "torch.utils._pytree.tree_map_only": check_trees,
    "torch.utils._pytree": check_loggers,
    "torch._ops.OpOverload": check_operators,
    "torch._ops.HigherOrderOperator": check_operators,
    "._schema": check_operators,
    "._opname": check_operators,
    "._overloadname": check_operators,
    "._opoverload": check_definitions,
    "._in_spec": check_specs,
    "._out_spec": check_specs,
    "._cdata": check_storage,
    "torch._int_mm": check_int8,
    "torch._scaled_mm": check_fp8,
    "torch._foreach_lerp_": check_averages,
    "torch._foreach_copy_": check_copies,
    "._forward_hooks": lambda: check_hooks("register_forward_hook"),
    "._forward_pre_hooks": lambda: check_hooks("register_forward_pre_hook"),
    "torch._logging.set_logs": check_logs,
    "torch.onnx._internal.exporter._registration": check_loggers,
}
OF_RUNTIME: dict[str, Callable[[], object]] = {
    "torch._C._aoti.AOTIModelContainerRunnerCpu": lambda: check_runner("AOTIModelContainerRunnerCpu"),
    "torch._C._aoti.AOTIModelContainerRunnerCuda": check_cuda_runner,
    "torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors": check_handles,
    "torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs": check_handles,
    "torch._C._dynamo.guards.TensorGuards": check_guards,
    "._compiled_call_impl": check_compiled_module,
    "torch._int_mm": check_int8,
    "._version": check_writes,
    "._forward_hooks": check_hook_counts,
    "._forward_pre_hooks": check_hook_counts,
}
SIDES = {exporting: OF_EXPORTER, replaying: OF_RUNTIME}


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.__name__)
def test_each_private_name_has_a_check(side):
    assert private_names(inspect.getsource(side)) == SIDES[side].keys() - {"torch.utils._pytree"}


@pytest.mark.parametrize("name", [name for checks in SIDES.values() for name in checks])
def test_torch_has_it_as_it_is_called(name):
    for checks in SIDES.values():
        checks.get(name, lambda: None)()


def test_a_torch_that_lost_one_is_told_by_its_check(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    with pytest.raises(AttributeError, match="_int_mm"):
        OF_EXPORTER["torch._int_mm"]()
    monkeypatch.setattr(torch, "_foreach_copy_", lambda sources, targets: None)
    with pytest.raises(AssertionError):
        OF_EXPORTER["torch._foreach_copy_"]()
