"""Fingerprints of graphs: whatever a compiler reads changes them, and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.export_cache import fingerprint as fingerprints
from prebake.exporter.export_cache.fingerprint import InexactValueError, exact_text, graph_fingerprint
from prebake.exporter.lower import load_backend
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.recipe.resolve import Compile, Recipe, resolve
from support.paths import ROOT


def describe_toolchain(recipe: Recipe) -> str:
    return fingerprints.describe_toolchain(recipe, load_backend(recipe.compile.backend))


class Small(nn.Module):
    def __init__(self, scale: float = 2.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.scale, self.linear = scale, nn.Linear(4, 4)

    def forward(self, x, y):
        return (self.linear(x * self.scale).relu() + y,)


def small(
    module: nn.Module | None = None, shape: tuple[int, ...] = (2, 4), names: tuple[str, str] = ("x", "y")
) -> CapturedGraph:
    args = (torch.ones(shape), torch.ones(shape))
    return capture_graph("small", (module or Small()).eval(), args, names, ("z",))


def key(graph: CapturedGraph, tools: str = "") -> str:
    found = graph_fingerprint(graph, tools, {})
    assert found is not None
    return found


def with_constant(change) -> CapturedGraph:
    graph = small()
    linear = graph.gm.linear
    linear.weight = nn.Parameter(change(linear.weight.detach().clone()), requires_grad=False)
    return graph


def with_node(change) -> CapturedGraph:
    graph = small()
    change(next(n for n in graph.gm.graph.nodes if n.op == "call_function"))
    return graph


def nudged(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))
    return weight


def renamed_output() -> CapturedGraph:
    graph = small()
    return dataclasses.replace(graph, outputs=(graph.outputs[0].model_copy(update={"name": "w"}),))


OTHERS = {
    "a number in the code": lambda: small(Small(scale=2.0000000000000004)),
    "one bit of one weight": lambda: with_constant(nudged),
    "a weight's dtype": lambda: with_constant(torch.Tensor.double),
    "all weights": lambda: small(Small(seed=1)),
    "a shape": lambda: small(shape=(3, 4)),
    "an input's name": lambda: small(names=("x", "w")),
    "an output's name": renamed_output,
    "which operator": lambda: with_node(lambda n: setattr(n, "target", torch.ops.aten.add.Tensor)),
    "an argument": lambda: with_node(lambda n: setattr(n, "args", (n.args[0], -0.0))),
    "what is known of a value": lambda: with_node(lambda n: n.meta.update(val=n.meta["val"].double())),
}


@pytest.mark.parametrize("change", OTHERS)
def test_what_a_compiler_reads_is_in_it(change):
    assert key(OTHERS[change]()) != key(small())


def test_the_strides_of_a_weight_are_in_it():
    plain = capture_graph("c", nn.Conv2d(3, 4, 3).eval(), (torch.ones(1, 3, 8, 8),), ("x",), ("y",))
    lying = copy.copy(plain)
    before = key(plain)
    plain.gm.weight.data = plain.gm.weight.data.contiguous(memory_format=torch.channels_last)
    assert key(lying) != before


def test_the_toolchain_is_in_it():
    assert key(small(), "gcc 12") != key(small(), "gcc 13")


def test_the_same_graph_captured_again_has_the_same():
    assert key(small()) == key(small())


def test_the_name_of_a_graph_is_no_part_of_it():
    assert key(dataclasses.replace(small(), name="other")) == key(small())


@pytest.mark.slow
def test_it_is_the_same_in_every_process():
    """Whatever the order of sets is there."""
    code = "import test_fingerprint as t; print(t.key(t.small(), t.toolchain(t.recipe())))"
    run = [sys.executable, "-c", code]
    here = Path(__file__).parent
    found = {
        subprocess.run(
            run,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "tests")},
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


class Odd:
    """Something whose `repr` says nothing of what it holds."""

    def __repr__(self) -> str:
        return "Odd"


@pytest.mark.parametrize("value", [Odd(), torch.ones(2), [1, {"a": Odd()}], slice(None, Odd())])
def test_what_cannot_be_written_down_has_none(value):
    with pytest.raises(InexactValueError, match=r"an argument is a (Odd|Tensor)"):
        exact_text((1, value))
    graph = with_node(lambda n: setattr(n, "target", lambda x, y: x * y))
    assert graph_fingerprint(graph, "", {}) is None


def recipe(**compile_: object) -> Recipe:
    found = resolve("baseline", (), "shapes")
    return found.model_copy(update={"compile": found.compile.model_copy(update=compile_)})


OTHER_SETTINGS = {
    "isa": "x86-64-v3",
    "hoist": True,
    "threads": 63,
    "channels_last_vae": False,
    "inductor": {"epilogue_fusion": False},
    "options": {"kernels": False},
    "device": "cuda",
    "backend": "onnxruntime",
}


@pytest.mark.parametrize("key", Compile.model_fields)
def test_every_key_of_the_compile_table_is_in_the_toolchain(key):
    """A new one fails here until it has another value in `OTHER_SETTINGS`."""
    # AOTInductor asks the GPU that it compiles for
    base = {"backend": "onnxruntime"} if key == "device" else {}
    assert describe_toolchain(recipe(**base, **{key: OTHER_SETTINGS[key]})) != describe_toolchain(recipe(**base))


def changed_environment(monkeypatch) -> None:
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/elsewhere")


def changed_cpu(monkeypatch) -> None:
    from prebake.exporter.lower import aoti

    monkeypatch.setattr(aoti, "host_flags", lambda: frozenset({"avx2"}))


def changed_versions(monkeypatch) -> None:
    monkeypatch.setattr(fingerprints, "toolchain_versions", lambda: {"torch": "3.0"})


def changed_sources(monkeypatch) -> None:
    monkeypatch.setattr(fingerprints, "hash_backend_sources", lambda: "others")


def changed_precision(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


@pytest.mark.parametrize(
    "change",
    [changed_environment, changed_cpu, changed_versions, changed_sources, changed_precision],
)
def test_what_compiles_is_in_the_toolchain(monkeypatch, change):
    before = describe_toolchain(recipe())
    assert describe_toolchain(recipe()) == before
    change(monkeypatch)
    assert describe_toolchain(recipe()) != before


def test_inductors_settings_are_in_the_toolchain():
    from torch._inductor import config

    before = describe_toolchain(recipe())
    with config.patch(max_fusion_size=3):
        assert describe_toolchain(recipe()) != before
    assert describe_toolchain(recipe()) == before


def test_what_compiling_writes_into_inductors_settings_is_not(monkeypatch):
    from torch._inductor import config

    before = describe_toolchain(recipe())
    monkeypatch.setitem(config.aot_inductor.metadata, "AOTI_DEVICE_KEY", "cpu")
    assert describe_toolchain(recipe()) == before
    monkeypatch.setitem(config.aot_inductor.metadata, "mine", "too")
    assert describe_toolchain(recipe()) != before
