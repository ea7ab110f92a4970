"""Lowering: instruction sets by name, packages without source, the same bytes twice, and errors that name the graph."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower import aoti
from prebake.exporter.lower.aoti import isa, pt2
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import Compile
from prebake.runtime.errors import ExportError

V3, V4 = frozenset(isa.V3_FLAGS), frozenset(isa.V4_FLAGS)


@pytest.fixture
def cpu(monkeypatch):
    """Makes this an x86-64 machine with the given flags."""

    def has(*flags: str) -> None:
        monkeypatch.setattr(isa, "host_flags", lambda: frozenset(flags))
        monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")

    return has


@pytest.mark.parametrize(
    ("flags", "asked", "level", "needs"),
    [
        (V4 | {"amx_int8"}, "host", "x86-64-v4", isa.V4_FLAGS),
        (V3 | {"avx512f"}, "host", "x86-64-v3", isa.V3_FLAGS),
        (V4, "x86-64-v3", "x86-64-v3", isa.V3_FLAGS),
        (V4, "x86-64-v4", "x86-64-v4", isa.V4_FLAGS),
        (V3 | {"sse"}, "native", "native", tuple(sorted(V3 | {"sse"}))),
        (frozenset({"sse"}), "native", "native", ("sse",)),
    ],
)
def test_a_level_and_the_flags_that_it_needs(cpu, flags, asked, level, needs):
    cpu(*flags)
    assert isa.choose_isa(asked) == (level, needs)


def test_a_level_above_this_cpu_is_refused_with_what_lacks(cpu):
    cpu(*(V4 - {"avx512bw", "avx512vl"}))
    with pytest.raises(
        ExportError,
        match=r"isa 'x86-64-v4' needs avx512bw, .*choose a lower level",
    ):
        isa.choose_isa("x86-64-v4")


def test_a_cpu_below_every_level_is_told_about_native(cpu):
    cpu("sse")
    with pytest.raises(ExportError, match=r"isa 'host': this CPU has no AVX2, .*isa=native"):
        isa.choose_isa("host")


def test_another_processor_family_is_always_native(monkeypatch):
    monkeypatch.setattr(isa.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(isa, "host_flags", lambda: frozenset())
    assert isa.choose_isa("host") == ("native", ())


@pytest.mark.parametrize(("level", "bits"), [("x86-64-v3", 256), ("x86-64-v4", 512)])
def test_inductor_is_held_to_the_level(level, bits):
    flags = isa.inductor_flags(level)
    assert flags["cpp.simdlen"] == bits
    assert flags.get("cpp.march", level) == level
    assert isa.inductor_flags("native") == {}


def test_the_recipes_inductor_flags_join_the_packaging_ones(cpu):
    cpu(*V3)
    flags = aoti.compile_flags(Compile(inductor={"epilogue_fusion": False}))
    assert flags["epilogue_fusion"] is False
    assert flags["aot_inductor.package"] is True
    assert flags["always_keep_tensor_constants"] is True
    assert flags["cpp.simdlen"] == 256


def test_only_objects_kernels_and_metadata_are_wanted():
    inside = "m/data/aotinductor/full/"
    assert pt2.is_packaged(f"{inside}full.wrapper.so")
    assert pt2.is_packaged(f"{inside}full.wrapper_metadata.json")
    for name in ("full.wrapper.cpp", "full.kernel.cpp", "full.wrapper_compile_flags.json", "full.o", "weights.bin"):
        assert not pt2.is_packaged(f"{inside}{name}"), name


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return (self.linear(x).relu(),)


@pytest.fixture
def graph():
    return capture_graph("small", Scaled(), (torch.ones(2, 8),), ("x",), ("y",))


def fake_compiler(monkeypatch, error: BaseException) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)


def test_a_compiler_error_names_the_graph(graph, monkeypatch):
    fake_compiler(monkeypatch, RuntimeError("g++ has no words\nand a second line"))
    with pytest.raises(ExportError, match=r"^graph 'small': .*\(RuntimeError: g\+\+ has no words\)$"):
        aoti.compile_graph(graph, {})


def test_inductors_own_cache_folder_is_put_back_after_an_interrupt(graph, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    fake_compiler(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        aoti.compile_graph(graph, {})
    assert aoti.os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("kind", ["link", "open", "file"])
def test_a_build_folder_that_others_could_write_is_refused_in_its_own_words(graph, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"prebake-inductor-{aoti.os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "open":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        folder.write_text("")
    with pytest.raises(ExportError, match=r"prebake-inductor-\d+: expected a folder that only this"):
        aoti.compile_graph(graph, {})


def packaged_at(graph, folder: Path, monkeypatch) -> Path:
    """The graph's package, compiled with temporary files in a folder of its own, where nothing is compiled yet."""
    folder.mkdir()
    torch._dynamo.reset()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = folder / "small.pt2"
    aoti.write_package(path, {"small": aoti.compile_graph(graph, aoti.compile_flags(Compile()))})
    return path


@pytest.mark.slow
def test_without_short_names_the_bytes_would_say_where_they_were_made(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(aoti, "shorten_paths", lambda flags, sources: flags)
    first, second = (packaged_at(graph, tmp_path / name, monkeypatch) for name in ("first", "second"))
    assert [name.rpartition("/")[2] for name in differing(first, second)] == ["serialization_id", "model.wrapper.so"]


@pytest.mark.slow
def test_a_graph_compiled_in_two_places_gives_the_same_bytes(graph, tmp_path, monkeypatch):
    first, second = (packaged_at(graph, tmp_path / name, monkeypatch) for name in ("first", "second"))
    assert differing(first, second) == []
    assert first.read_bytes() == second.read_bytes()
    metadata = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(first), "small")
    assert metadata["AOTI_DEVICE_KEY"] == "cpu"


def differing(first: Path, second: Path) -> list[str]:
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(second) as b:
        return sorted(
            n
            for n in {*a.namelist(), *b.namelist()}
            if n not in a.namelist() or n not in b.namelist() or a.read(n) != b.read(n)
        )


# what is said meanwhile


def say(mode: str) -> None:
    with open_progress(mode) as shown, shown.stage("lower", 2):
        shown.announce("denoiser: full")
        shown.announce("vae")
    assert list(shown.seconds) == ["lower"]


def test_json_lines_are_objects_on_stderr(capsys):
    say("json")
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [(e["stage"], e["event"], e.get("what")) for e in events] == [
        ("lower", "start", None),
        ("lower", "doing", "denoiser: full"),
        ("lower", "doing", "vae"),
        ("lower", "done", None),
    ]
    assert all(e["elapsed_s"] >= 0 for e in events)


def test_quiet_says_nothing(capsys):
    say("quiet")
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_on_stderr_and_names_the_stage(capsys):
    say("rich")
    out, err = capsys.readouterr()
    assert out == ""
    assert "lower" in err


def test_int8_code_asks_for_vnni_where_the_exporting_cpu_has_it(monkeypatch):
    monkeypatch.setattr(isa, "host_flags", lambda: frozenset({*isa.V4_FLAGS, "avx512_vnni", "avx_vnni"}))
    assert isa.int8_flags() == ("avx512_vnni",)
    monkeypatch.setattr(isa, "host_flags", lambda: frozenset(isa.V3_FLAGS))
    assert isa.int8_flags() == ()


def test_the_serialization_id_covers_what_is_kept_and_nothing_else():
    members = {"m/.data/serialization_id": b"1", "m/data/x.so": b"code"}
    same = pt2.serialization_id({**members, "m/.data/serialization_id": b"2"})
    assert pt2.serialization_id(members) == same
    assert len(same) == 40
    assert same.isdigit()
    assert pt2.serialization_id({**members, "m/data/x.so": b"node"}) != same
