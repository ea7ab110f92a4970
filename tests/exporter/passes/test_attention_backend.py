"""Attention by a kernel of the recipe's choice: as far as a CPU has kernels to choose from, and what is asked of torch for a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.backends import cuda

from prebake.exporter import pipeline
from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.export_cache.fingerprint import graph_fingerprint
from prebake.exporter.lower import aoti, load_backend
from prebake.exporter.lower.aoti.cuda import move_graph
from prebake.exporter.passes.attention_backend import (
    KERNELS,
    SDPA,
    find_reason,
    refuse_attention,
    set_attention_backend,
)
from prebake.exporter.passes.attention_dtype import cast_attention
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime.errors import ExportError
from prebake.runtime.manifest import Source

Q = torch.randn(1, 2, 8, 16)
UNUSED = ("part", "layers", "calibration", "layout", "planned")
"""What lowering does not look at."""


class Attention(nn.Module):
    def forward(self, q: Tensor, bias: Tensor) -> tuple[Tensor]:
        x = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)
        return (nn.functional.scaled_dot_product_attention(q * 2, x, x, scale=0.3).contiguous(),)


@pytest.fixture(scope="module")
def graph() -> CapturedGraph:
    return capture_graph("full", Attention(), (Q, torch.randn(8, 8)), ("q", "bias"), ("y",))


def traced(graph: CapturedGraph) -> set[str]:
    """The operators that AOTInductor is given, of its own tracing."""
    with torch.no_grad():
        gm, _ = aot_export_module(graph.gm, graph.args, trace_joint=False)
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}


FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"


def test_the_chosen_kernel_is_what_the_compiler_sees(graph):
    assert FLASH in traced(set_attention_backend(graph, "flash"))
    by_math = traced(set_attention_backend(graph, "math"))
    assert "aten.bmm.default" in by_math
    assert not [t for t in by_math if "_scaled_dot_product" in t]
    assert FLASH in traced(
        set_attention_backend(graph, "sdpa")
    )  # torch's own preference here: so `math` had to be chosen


def test_switches_of_the_process_do_not_change_a_choice(graph):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert FLASH in traced(set_attention_backend(graph, "flash"))
        assert FLASH not in traced(set_attention_backend(graph, "sdpa"))  # the canary: without one they do
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert FLASH not in traced(set_attention_backend(graph, "math"))


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_kernel_that_is_not_here_is_not_replaced(graph, backend):
    with pytest.raises(RuntimeError, match="No viable backend"):
        traced(set_attention_backend(graph, backend))


def test_the_arithmetic_is_the_same(graph):
    (expected,) = graph.gm(*graph.args)
    for backend in ("flash", "math"):
        # float32: eight keys are added up in another order
        torch.testing.assert_close(
            set_attention_backend(graph, backend).gm(*graph.args)[0], expected, rtol=1e-5, atol=1e-6
        )
    assert set_attention_backend(graph, "sdpa") is graph


def test_each_choice_is_a_graph_of_its_own(graph):
    keys = [graph_fingerprint(set_attention_backend(graph, backend), "tools", {}) for backend in ("sdpa", *KERNELS)]
    assert None not in keys
    assert len(set(keys)) == len(KERNELS) + 1


def test_a_dtype_of_its_own_goes_with_it(graph):
    half = set_attention_backend(cast_attention(graph, torch.bfloat16), "flash")
    assert FLASH in traced(half)
    assert half.gm(*half.args)[0].dtype == torch.float32


# --- what is asked of torch for a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """What torch is asked, of a GPU where cuDNN takes no mask and flash attention nothing."""
    said: list[Any] = []

    def refuses(*why: str, always: bool):
        def can(parameters: Any, debug: bool = False) -> bool:
            said.append(parameters)
            if debug and (always or parameters.attn_mask is not None):
                for line in why:
                    warnings.warn(f"{line} (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
            return not always and parameters.attn_mask is None

        return can

    monkeypatch.setattr(
        cuda, "can_use_cudnn_attention", refuses("cuDNN attention not used because:", "No mask.", always=False)
    )
    monkeypatch.setattr(cuda, "can_use_flash_attention", refuses(always=True))
    monkeypatch.setattr(cuda, "can_use_efficient_attention", lambda parameters, debug: said.append(parameters) or True)
    return said


def test_a_kernel_that_a_gpu_lacks_is_refused_with_torchs_reason(graph, asked):
    there = move_graph(set_attention_backend(graph, "cudnn"), torch.device("meta"))
    words = r"^graph 'full': attention.backend 'cudnn' cannot run scaled_dot_product_attention, \[1, 2, 8, 16\] in float32: No mask; set attention\.backend=sdpa$"
    with pytest.raises(ExportError, match=words):
        refuse_attention(there)
    with pytest.raises(ExportError, match=r"'flash' cannot run .*: this torch has no such kernel; set"):
        refuse_attention(move_graph(set_attention_backend(graph, "flash"), torch.device("meta")))


def test_what_torch_is_asked_is_what_the_graph_calls(graph, asked):
    refuse_attention(move_graph(set_attention_backend(graph, "efficient"), torch.device("meta")))
    with_bias, without = asked
    assert with_bias.query.device.type == "meta"
    assert (with_bias.attn_mask.shape, without.attn_mask) == ((8, 8), None)
    assert (with_bias.dropout, with_bias.is_causal, with_bias.enable_gqa) == (0.0, False, False)
    asked.clear()
    for backend in ("math", "sdpa"):  # which run everywhere
        refuse_attention(move_graph(set_attention_backend(graph, backend), torch.device("meta")))
    assert asked == []


def test_the_first_reason_is_told():
    told = [
        "Flash attention kernel not used because: (Triggered internally at a)",
        "Too old. (Triggered internally at b)",
        "x",
    ]
    assert find_reason(told) == "Too old"


@pytest.mark.parametrize("backend", [*KERNELS, "sdpa"])
def test_recipes_may_ask_for_every_kernel(backend):
    asked = resolve(
        "flux-fast", (f"attention.backend={backend}", "attention.dtype=bfloat16", "compile.device=cuda"), "tiny:flux"
    )
    assert asked.attention.backend == backend


def test_the_denoiser_is_what_it_is_for(graph, monkeypatch, tmp_path):
    asked = resolve(
        "flux-fast", ("attention.backend=flash", "attention.dtype=bfloat16", "compile.device=cuda"), "tiny:flux"
    )
    groups = dict.fromkeys(("denoiser", "denoiser.call2", "vae_decoder"), (graph,))
    ready = pipeline.PreparedExport(
        recipe=asked,
        backend=load_backend("aoti"),
        source=Source(model="", pipeline="", sha256=""),
        graphs=groups,
        costs={},
        censuses={},
        **dict.fromkeys(UNUSED),
    )
    lowered: dict[str, Any] = {}
    monkeypatch.setattr(aoti, "lower", lambda folder, groups, config, made: lowered.update(groups) or {})
    with open_progress("quiet") as quiet:
        pipeline.lower(tmp_path, ready, quiet)

    def calls(component: str) -> list[Any]:
        return [n.target for n in lowered[component][0].gm.graph.nodes if n.target in (SDPA, KERNELS["flash"])]

    assert calls("denoiser") == calls("denoiser.call2") == [KERNELS["flash"]] * 2
    assert calls("vae_decoder") == [SDPA] * 2


@pytest.mark.slow
def test_compiled_code_calls_the_chosen_kernel(graph):
    from prebake.exporter.lower.aoti import compile_flags, compile_graph

    config = resolve("flux-fast", ("compile.options.kernels=false",), "tiny:flux").compile
    calls = b"aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu"
    for backend, there in (("flash", True), ("math", False)):
        made = compile_graph(set_attention_backend(graph, backend), compile_flags(config))
        (library,) = (data for name, data in made.items() if name.endswith(".so"))
        assert (calls in library) is there


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_a_gpu_runs_the_chosen_kernel(backend):
    q = torch.randn(1, 4, 256, 64, dtype=torch.bfloat16)

    class Plain(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor]:
            return (nn.functional.scaled_dot_product_attention(q, q, q).contiguous(),)

    there = move_graph(
        set_attention_backend(capture_graph("full", Plain(), (q,), ("q",), ("y",)), backend), torch.device("cuda")
    )
    found = [t for t in traced(there) if "_scaled_dot_product" in t]
    assert found == ([] if backend == "math" else [f"aten._scaled_dot_product_{backend}_attention.default"])
    # half a unit of bfloat16's last place in each of two products, of values of order one
    torch.testing.assert_close(
        there.gm(*there.args)[0].cpu(), nn.functional.scaled_dot_product_attention(q, q, q), rtol=2e-2, atol=2e-2
    )
