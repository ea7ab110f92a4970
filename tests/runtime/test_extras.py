"""What is missing is named with the extra of prebake that brings it, by prebake's own metadata."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest

from prebake.exporter import lower
from prebake.runtime import backends, extras
from prebake.runtime.errors import ArtifactError, ExportError

ORT = "pip install 'prebake[ort]' or pip install 'prebake[ort-gpu]'"


@pytest.mark.parametrize(
    ("module", "way"),
    [
        ("onnxruntime", ORT),
        ("onnxruntime.capi.onnxruntime_pybind11_state", ORT),
        ("onnxruntime-gpu", "pip install 'prebake[ort-gpu]'"),
        ("tensorrt_rtx", "pip install 'prebake[trt-rtx]'"),
        ("tensorrt", "pip install 'prebake[trt]'"),
        ("onnx", "pip install 'prebake[export]'"),
        ("onnxscript", "pip install 'prebake[export]'"),
        ("torch", "pip install torch"),  # required by all of prebake
        ("nowhere", "pip install nowhere"),
    ],
)
def test_the_way_to_a_module(module, way, declared_extras):
    assert extras.install_command(module) == way


@pytest.mark.parametrize(
    ("lines", "end"),
    [
        (['onnxruntime<1.33,>=1.31; extra == "ort"', 'onnxruntime-gpu<1.34; extra == "ort-gpu"'], "1.33"),
        (['onnxruntime >=1.31, <1.33 ; extra == "ort"'], "1.33"),
        (['onnxruntime>=1.31; extra == "ort"'], None),
        (['onnxruntime<=1.33; extra == "ort"'], None),
        (["onnxruntime<1.33"], None),  # not of an extra
        (None, None),
    ],
)
def test_where_what_was_tried_ends(lines, end, monkeypatch):
    monkeypatch.setattr(extras, "requires", lambda name: lines)
    assert extras.first_untried_version("onnxruntime") == end


def test_without_metadata_it_is_the_package_itself(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", absent)
    assert extras.install_command("onnxruntime") == "pip install onnxruntime"
    assert extras.first_untried_version("onnxruntime") is None


@pytest.mark.parametrize(
    ("package", "error", "missing", "way"),
    [
        (backends, ArtifactError, "onnxruntime", ORT),
        (lower, ExportError, "onnxruntime", ORT),
        (lower, ExportError, "onnx", "pip install 'prebake[export]'"),
    ],
)
def test_a_backend_whose_package_is_missing_says_how_to_get_it(
    package, error, missing, way, monkeypatch, declared_extras
):
    for loaded in [m for m in sys.modules if m.startswith((f"{package.__name__}.onnx", f"{package.__name__}.w8a8"))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(error) as raised:
        (package.load_backend if package is lower else package.backend_module)("onnxruntime")
    assert str(raised.value).endswith(f"needs the package {missing}, which is not installed; {way}")
