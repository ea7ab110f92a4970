"""Graphs call the CPU kernels exactly where they fit, compiled code calls them, and a recipe says whether."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers.models.activations import GEGLU as GatedLinear
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower import aoti, w8a8
from prebake.exporter.lower.aoti import isa, kernels, pt2
from prebake.exporter.lower.aoti.kernels.rewrite import insert_kernel_calls, replace_operators
from prebake.exporter.lower.aoti.kernels.target import KernelTarget, choose_target
from prebake.exporter.passes.attention_dtype import cast_attention
from prebake.exporter.passes.captured_graph import CapturedGraph, run_passes
from prebake.exporter.passes.derived_weights import DerivedWeights
from prebake.exporter.quantize import Int8Dynamic
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime.errors import RecipeError
from support.kernel_cases import FLOAT, HALF, LACKS, error, random, runs_here


def test_linears_of_few_rows_are_found():
    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.many = nn.Linear(16, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.many(x * self.one(nn.functional.silu(time)))

    graph = capture_graph("g", Modulated(), (random(1, 9, 24), random(1, 16)), ("x", "time"), ("y",))
    swapped = insert_kernel_calls(graph)
    names = [str(n.target) for n in swapped.gm.graph.nodes]
    assert [n for n in names if "linear" in n or "rows" in n] == ["prebake.few_rows.default", "aten.linear.default"]
    assert torch.equal(swapped.gm(*graph.args)[0], graph.gm(*graph.args)[0])


class Rotary(nn.Module):
    """diffusers' own, on [B, S, H, D] as FLUX calls it, and attention over it."""

    def __init__(self, negated: int = 1):
        super().__init__()
        self.cosines, self.sines = nn.Buffer(random(1, 21, 1, 16, seed=3)), nn.Buffer(random(1, 21, 1, 16, seed=4))
        self.negated = negated

    def turned(self, x: Tensor) -> Tensor:
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        pair = [-b, a] if self.negated else [b, -a]
        return (x.float() * self.cosines + torch.stack(pair, -1).flatten(3).float() * self.sines).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.turned(x).transpose(1, 2), self.turned(x * 2).transpose(1, 2)
        return scaled_dot_product_attention(q, k, x.transpose(1, 2)).contiguous()


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
def test_rotary_embeddings_are_found(dtype):
    graph = cast_attention(capture_graph("g", Rotary(), (random(1, 21, 4, 16, dtype=dtype),), ("x",), ("y",)), HALF)
    swapped = insert_kernel_calls(graph)
    names = [str(n.target) for n in swapped.gm.graph.nodes]
    assert names.count("prebake.rotary.default") == 2
    assert not [n for n in names if "unbind" in n or "stack" in n]
    (x,) = graph.args
    # bfloat16's rounding, of attention's inputs and of what comes out
    assert error(swapped.gm(x)[0], graph.gm(x)[0]) < 1e-2
    other = insert_kernel_calls(capture_graph("g", Rotary(negated=0), graph.args, ("x",), ("y",)))
    assert "prebake.rotary.default" not in [str(n.target) for n in other.gm.graph.nodes], "turned the other way round"


# --- graphs ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What a transformer has: int8 layers, a GELU, a concatenation, and attention, which may have a mask."""

    def __init__(self, mask: Tensor | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 128), nn.Linear(192, 64)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = (t.reshape(b, s, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).reshape(b, s, c)
        wide = nn.functional.gelu(self.up(x), approximate="tanh")
        return x + self.down(torch.cat([mixed, wide], -1))


class Residual(nn.Module):
    """What a UNet has: convolutions of a normed picture, the first of one that lies in another order, and the second a step of 2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(16, 40, 3, padding=1), nn.Conv2d(40, 16, 3, stride=2, padding=1)
        self.norm, self.shortcut = nn.GroupNorm(8, 40), nn.Conv2d(16, 16, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(x) + self.second(nn.functional.silu(self.norm(self.first(x))))
        return y.flatten(1)


INPUTS = {Block: (2, 21, 64), Residual: (2, 16, 11, 20)}


def captured(module: nn.Module) -> CapturedGraph:
    w8a8.replace_layers(
        module, {name for name, m in module.named_children() if hasattr(m, "weight")} - {"norm"}, Int8Dynamic()
    )
    return capture_graph("block", module, (random(*INPUTS[type(module)]),), ("x",), ("y",))


def called(graph: CapturedGraph) -> list[str]:
    """The heavy operators, in order."""
    names = [str(n.target).partition(".")[2].removesuffix(".default") for n in graph.gm.graph.nodes]
    return [
        n
        for n in names
        if n.startswith("packed") or n in ("w8a8", "attention", "scaled_dot_product_attention", "cat", "gelu", "clone")
    ]


def test_what_lies_around_an_int8_layer_goes_into_it():
    graph = captured(Block())
    half = insert_kernel_calls(cast_attention(graph, HALF))
    assert called(half) == ["packed_w8a8", "attention", "packed_w8a8", "packed_w8a8"]
    # attention stays where it is not asked to be bfloat16: its precision is the recipe's
    assert called(insert_kernel_calls(graph)) == [
        "packed_w8a8",
        "scaled_dot_product_attention",
        "packed_w8a8",
        "packed_w8a8",
    ]
    (x,) = graph.args
    assert error(insert_kernel_calls(graph).gm(x)[0], graph.gm(x)[0]) < 1e-6  # the same arithmetic, in eager
    assert {n.removesuffix("_packed") for n in half.constants()} == {
        f"{name}.{part}" for name in ("qkv", "up", "down") for part in ("weight", "scale", "bias")
    }


def gated_layer(width: int, **changed) -> CapturedGraph:
    """diffusers' own GEGLU, its Linear in int8."""
    module = nn.Sequential(GatedLinear(64, width))
    for name, value in changed.items():
        vars(module[0])[name] = value
    w8a8.replace_layers(module, {"0.proj"}, Int8Dynamic())
    return capture_graph("gated", module, (random(2, 21, 64),), ("x",), ("y",))


def test_a_gate_goes_into_the_int8_layer_before_it():
    graph = gated_layer(96)
    swapped = insert_kernel_calls(graph)
    assert [str(n.target) for n in swapped.gm.graph.nodes if n.op == "call_function"] == ["prebake.packed_w8a8.default"]
    (x,) = graph.args
    assert error(swapped.gm(x)[0], graph.gm(x)[0]) < 1e-6  # the same arithmetic, in eager


@pytest.mark.parametrize(
    ("width", "changed"),
    [
        pytest.param(40, {}, id="no whole panels"),
        pytest.param(96, {"gelu": partial(nn.functional.gelu, approximate="tanh")}, id="another GELU"),
    ],
)
def test_other_gates_are_left_to_inductor(width, changed):
    graph = insert_kernel_calls(gated_layer(width, **changed))
    assert called(graph) == ["packed_w8a8", "gelu"]


def test_a_picture_is_laid_out_once_and_stays_so():
    graph = captured(Residual())
    swapped = insert_kernel_calls(graph)
    assert called(swapped) == ["clone", "packed_w8a8_conv2d", "clone", "packed_w8a8_conv2d", "packed_w8a8_conv2d"]
    (x,) = graph.args
    assert error(swapped.gm(x)[0], graph.gm(x)[0]) < 1e-6  # the same arithmetic, in eager


def test_masks_are_left_to_torch():
    graph = insert_kernel_calls(cast_attention(captured(Block(torch.zeros(21, 21))), HALF))
    assert "attention" not in called(graph)
    assert "scaled_dot_product_attention" in called(graph)


def test_variants_of_a_model_share_what_is_packed():
    module = Block()
    first = captured(module)
    second = capture_graph("again", module, first.args, ("x",), ("y",))
    passes = (partial(replace_operators, weights=DerivedWeights()),)
    one, two = run_passes(first, passes), run_passes(second, passes)
    assert {t.data_ptr() for t in one.constants().values()} == {t.data_ptr() for t in two.constants().values()}


@runs_here
@pytest.mark.parametrize("block", [Block, Residual])
def test_compiled_code_calls_the_kernels(tmp_path, block):
    from torch._inductor.package import load_package, package_aoti

    graph = insert_kernel_calls(cast_attention(captured(block()), HALF))
    flags = aoti.compile_flags(resolve("flux-fast", ["compile.threads=1"], "shapes").compile)
    (tmp_path / "build").mkdir(mode=0o700)
    inside = {"aot_inductor.package_constants_in_so": True}
    files = aoti.compile_graph(graph, flags | inside, tmp_path / "build", target=choose_target("host"))
    library = next(data for name, data in files.items() if name.endswith(".so"))
    assert b"prebake::" not in library, "an operator is looked up by its name at run time"
    models = {"model": pt2.write_files(tmp_path / "model", files)}
    run = load_package(package_aoti(str(tmp_path / "block.pt2"), models), "model")
    (x,) = graph.args
    made = run(x)
    assert error(made, graph.gm(x)[0]) < 2e-3  # ties, and bfloat16 in the attention, next to a residual
    assert error(made + 0.01, graph.gm(x)[0]) > 2e-3


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe(*overrides: str):
    return resolve("flux-fast", list(overrides), "shapes")


V3, V4 = isa.ISA_LEVELS["x86-64-v3"], isa.ISA_LEVELS["x86-64-v4"]


@pytest.fixture
def cpu(monkeypatch):
    """Makes this an x86-64 machine with the given flags."""

    def has(*flags: str) -> None:
        monkeypatch.setattr(isa, "host_flags", lambda: frozenset(flags))
        monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")

    return has


@pytest.mark.parametrize(
    ("flags", "asked", "target"),
    [
        (V3, (), KernelTarget("x86-64-v3")),
        ((*V3, "avx_vnni"), (), KernelTarget("x86-64-v3", ("avx_vnni",))),
        ((*V3, "avx_vnni"), ("isa=x86-64-v3",), KernelTarget("x86-64-v3")),
        (V4, (), KernelTarget("x86-64-v4")),
        ((*V4, "avx512_vnni"), ("isa=native",), KernelTarget("x86-64-v4", ("avx512_vnni",))),
        ((*V4, "avx512_vnni", "avx512_bf16"), (), KernelTarget("x86-64-v4", ("avx512_bf16", "avx512_vnni"))),
        ((*V4, "avx512_vnni", "avx512_bf16"), ("isa=x86-64-v3",), KernelTarget("x86-64-v3")),
        # by name a promise to machines that may have no VNNI, where torchao asks at run time
        ((*V4, "avx512_vnni"), ("isa=x86-64-v4",), None),
        ((*V4, "avx512_vnni"), ("isa=x86-64-v4", "options.kernels=true"), KernelTarget("x86-64-v4", ("avx512_vnni",))),
        (V3, ("options.kernels=false",), None),
        (("sse2",), ("isa=native",), None),
    ],
)
def test_kernels_use_what_the_cpu_has_and_no_more_than_is_promised(cpu, flags, asked, target):
    cpu(*flags)
    chosen = recipe(*(f"compile.{option}" for option in asked))
    assert aoti.kernel_target(chosen.compile) == target
    if target:
        assert set(aoti.requires(chosen)["isa"]) == {*aoti.choose_isa(chosen.compile.isa)[1], *target.flags}


def test_kernels_that_cannot_be_verified_here_are_refused(cpu):
    cpu("sse2")
    with pytest.raises(RecipeError, match=r"^compile.options.kernels: .*x86-64-v3 and x86-64-v4"):
        aoti.adapt_recipe(recipe("compile.options.kernels=true", "compile.isa=native"))


@pytest.mark.parametrize(
    ("flags", "asked", "parts"),
    [
        pytest.param(V3, (), "precision.denoiser, precision.text_encoders, precision.vae", id="AVX2"),
        pytest.param(
            (*V4, "avx512_vnni"),
            ("precision.vae=float32",),
            "precision.denoiser, precision.text_encoders",
            id="AVX-512",
        ),
        pytest.param(
            (*V4, "avx512_bf16"), ("compile.isa=x86-64-v3",), "precision.denoiser, precision", id="a lower level"
        ),
        pytest.param((*V4, "avx512_bf16"), (), "", id="it has them"),
        pytest.param(V3, ("compile.options.emulate_bfloat16=true",), "", id="asked for"),
        pytest.param((), ("compile.isa=native",), "", id="another processor family"),
    ],
)
def test_bfloat16_is_float32_where_no_instruction_multiplies_it(cpu, flags, asked, parts):
    cpu(*flags)
    given = recipe(*asked)
    adapted, said = aoti.adapt_recipe(given)
    if not parts:
        assert (adapted, said) == (given, ())
        return
    assert said[0].startswith(parts)
    assert "emulate_bfloat16=true" in said[0]
    assert {dtype for _, dtype in adapted.precision} == {"float32"}
    assert aoti.adapt_recipe(adapted) == (adapted, ())


CONVOLUTIONS_ASKED = ("quantize.method=int8_dynamic", "quantize.convolutions=true")


@pytest.mark.parametrize("backend", ["aoti", "onnxruntime", "tensorrt"])
def test_int8_convolutions_without_kernels_are_refused(backend):
    lowering = pytest.importorskip(
        f"prebake.exporter.lower.{backend}", reason=f"the extra of {backend} is not installed"
    )
    asked = recipe(*CONVOLUTIONS_ASKED, f"compile.backend={backend}")
    without = recipe(
        *CONVOLUTIONS_ASKED,
        f"compile.backend={backend}",
        *(["compile.options.kernels=false"] if backend == "aoti" else []),
    )
    said = r"^quantize\.convolutions: only prebake's CPU kernels multiply them in int8 .*; set quantize\.convolutions=false$"
    with pytest.raises(RecipeError, match=said):
        lowering.adapt_recipe(without)
    if backend == "aoti" and not LACKS:
        assert lowering.adapt_recipe(asked)[0].quantize == asked.quantize


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    from prebake.runtime.errors import ExportError

    monkeypatch.setattr(kernels, "COMPILE_ARGUMENTS", ("-std=c++98",))
    with pytest.raises(ExportError, match=r"kernels could not be compiled .*options.kernels=false"):
        kernels.build_archive(tmp_path, 1, KernelTarget("x86-64-v3"))
