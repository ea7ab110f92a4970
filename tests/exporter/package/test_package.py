"""Package: all of an artifact or nothing, and each distinct tensor once."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.package import folder as package
from prebake.runtime.errors import ExportError, RequestError
from prebake.runtime.weights import map_weights

MANIFEST = json.dumps({"schema_version": 1})


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.fixture
def artifact(tmp_path) -> Path:
    """Something that an earlier export left."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(MANIFEST)
    (tmp_path / "out" / "old").write_text("old")
    return tmp_path / "out"


def staged(output: Path, *, force: bool = False, error: BaseException | None = None) -> None:
    with package.stage_folder(output, force=force) as folder:
        (folder / "new").write_text("new")
        if error:
            raise error


def test_what_was_staged_is_the_output_and_nothing_else_is_left(tmp_path):
    staged(tmp_path / "out")
    assert listing(tmp_path) == ["out", "out/new"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("x"), ExportError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(type(error)):
        staged(tmp_path / "out", error=error)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_earlier_artifact_survives_an_error(artifact, error):
    with pytest.raises(type(error)):
        staged(artifact, force=True, error=error)
    assert listing(artifact.parent) == ["out", "out/manifest.json", "out/old"]


def test_an_existing_output_is_refused_before_any_work(artifact):
    with pytest.raises(RequestError, match=r"out: already exists.*choose another --output, or"):
        staged(artifact)
    assert listing(artifact) == ["manifest.json", "old"]


def test_force_replaces_an_artifact_as_a_whole(artifact):
    staged(artifact, force=True)
    assert listing(artifact.parent) == ["out", "out/new"]


def test_force_takes_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    staged(tmp_path / "out", force=True)
    assert listing(tmp_path) == ["out", "out/new"]


@pytest.mark.parametrize(
    "content", [None, "{}", "no json", '["schema_version"]', '{"name": "an extension", "manifest_version": 3}']
)
def test_force_never_replaces_what_is_not_an_artifact(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    if content is not None:
        (tmp_path / "out" / "manifest.json").write_text(content)
    before = listing(tmp_path)
    with pytest.raises(
        RequestError,
        match=r"out: --force replaces artifacts.*choose another --output",
    ):
        staged(tmp_path / "out", force=True)
    assert listing(tmp_path) == before


def test_force_never_replaces_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RequestError, match="--force replaces artifacts only"):
        staged(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "a file"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with (  # noqa: PT012 (its end raises)
        pytest.raises(RequestError, match="already exists"),
        package.stage_folder(tmp_path / "out", force=False) as folder,
    ):
        (folder / "new").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("another export's")
    assert listing(tmp_path) == ["out", "out/precious"]


# weights


class Model(nn.Module):
    """Weights under names of its own; every one is multiplied with the input."""

    def __init__(self, **weights) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x):
        return (sum((x * weight).float().sum() for weight in self.parameters()),)


def graph(name: str, **weights):
    return capture_graph(name, Model(**weights), (torch.ones(1),), ("x",), ("y",))


def stored(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / f"{component}.safetensors")


def table(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_variants_and_components_share_equal_tensors(tmp_path):
    a, b = table(0, 200, 100), table(1, 200, 100)
    groups = {
        "denoiser": (graph("full", a=a, b=b), graph("reuse", a=a)),
        "text_encoder": (graph("text_encoder", other=b.clone()),),
    }
    weights = package.write_weights(tmp_path, groups)
    assert weights.bound == {
        "full": {"a": "denoiser.a", "b": "denoiser.b"},
        "reuse": {"a": "denoiser.a"},
        "text_encoder": {"other": "denoiser.b"},
    }
    assert sorted(stored(tmp_path, "denoiser")) == ["denoiser.a", "denoiser.b"]
    assert stored(tmp_path, "text_encoder") == {}
    assert weights.channels_last == ()


def test_equal_bytes_of_another_dtype_or_shape_are_other_tensors(tmp_path):
    tensors = {"a": torch.zeros(4, 8), "b": torch.zeros(8, 4), "c": torch.zeros(4, 8, dtype=torch.int32)}
    package.write_weights(tmp_path, {"g": (graph("g", **tensors),)})
    assert sorted(stored(tmp_path, "g")) == ["g.a", "g.b", "g.c"]


def test_two_variants_values_of_one_name_are_kept_apart(tmp_path):
    weights = package.write_weights(tmp_path, {"d": (graph("full", w=table(0, 3)), graph("reuse", w=table(1, 3)))})
    assert weights.bound == {"full": {"w": "d.w"}, "reuse": {"w": "d.w.1"}}
    assert torch.equal(stored(tmp_path, "d")["d.w.1"], table(1, 3))


def test_channels_last_weights_are_stored_in_their_order_and_come_back_with_their_strides(tmp_path):
    weight = table(0, 4, 3, 5, 5).to(memory_format=torch.channels_last)
    weights = package.write_weights(tmp_path, {"vae": (graph("vae", w=weight, one=table(1, 4, 3, 1, 1)),)})
    assert weights.channels_last == ("vae.w",)
    assert stored(tmp_path, "vae")["vae.w"].shape == (4, 5, 5, 3)
    back = map_weights(
        {tmp_path: tmp_path / "weights" / "vae.safetensors"}, torch.device("cpu"), weights.channels_last
    )["vae.w"]
    assert torch.equal(back, weight)
    assert back.stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.int64])
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
    value = (table(0, 7) * 3).to(dtype)
    package.write_weights(tmp_path, {"g": (graph("g", w=value, scalar=value[0].clone()),)})
    assert torch.equal(stored(tmp_path, "g")["g.w"], value)
    assert torch.equal(stored(tmp_path, "g")["g.scalar"], value[0])


def test_other_strides_are_refused():
    with pytest.raises(ExportError, match=r"a constant of shape \(3, 2\) has strides \(1, 3\), which"):
        package.to_memory_order(torch.ones(2, 3).t())


def test_the_embedding_that_t5_ties_is_stored_once(tiny_pipe, tmp_path):
    from prebake.exporter.families import flux

    component = flux.other_components(tiny_pipe, flux.Size(32, 32, 8), channels_last=False)[0]
    captured = capture_graph(component.name, component.module, component.args, component.inputs, component.outputs)
    package.write_weights(tmp_path, {"text_encoder": (captured,)})
    shape = tiny_pipe.text_encoder_2.shared.weight.shape
    assert sum(t.shape == shape for t in stored(tmp_path, "text_encoder").values()) == 1


def test_a_slow_tokenizer_is_refused_by_its_place(tmp_path):
    class Slow:
        is_fast = False

    with pytest.raises(ExportError, match=r"tokenizers/tokenizer: expected a fast tokenizer, got Slow"):
        package.write_tokenizers(tmp_path, {"tokenizers/tokenizer": Slow()})


def test_listed_files_are_sorted_and_leave_out_manifest_and_reports(tmp_path):
    for path in ("b", "a/c", "manifest.json", "reports/times.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x")
    entries = package.file_entries(tmp_path)
    assert [e.path for e in entries] == ["a/c", "b"]
    assert entries[0].size == 1
    assert entries[0].sha256 == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


def test_a_package_is_a_plain_archive(tiny_artifact):
    for path in sorted((tiny_artifact / "graphs").glob("*.pt2")):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            assert all(
                i.compress_type == zipfile.ZIP_STORED and i.date_time == (1980, 1, 1, 0, 0, 0)
                for i in archive.infolist()
            )
        assert names == sorted(names)
        assert not [n for n in names if n.endswith((".cpp", ".h", "compile_flags.json"))]
        assert any(n.endswith(".so") for n in names)


def test_everyone_may_read_an_artifact(tmp_path):
    with package.stage_folder(tmp_path / "out", force=False) as folder:
        (folder / "weights").mkdir(mode=0o700)
        (folder / "weights" / "a.safetensors").touch(mode=0o600)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert modes == {"weights": 0o755, "a.safetensors": 0o644}
