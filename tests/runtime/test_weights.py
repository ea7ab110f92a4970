"""Weights: a safetensors file as tensors over one mapping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prebake.runtime.errors import ArtifactError
from prebake.runtime.weights import DTYPES, map_file, map_weights

CPU = torch.device("cpu")


def test_every_dtype_and_shape_is_what_safetensors_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2, (2, 3), generator=generator)
    saved = {name: numbers.to(dtype) for name, dtype in DTYPES.items()}
    saved |= {"scalar": torch.tensor(1.5), "nothing": torch.zeros(0, 4), "one": torch.ones(1, dtype=torch.int8)}
    save_file(saved, tmp_path / "w.safetensors", metadata={"format": "pt"})
    read, expected = map_file(tmp_path / "w.safetensors"), load_file(tmp_path / "w.safetensors")
    assert read.keys() == expected.keys() == saved.keys()
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        same = (t.reshape(-1).view(torch.uint8) for t in (tensor, expected[name]))
        assert torch.equal(*same)


def test_a_file_without_tensors_is_empty(tmp_path):
    save_file({}, tmp_path / "w.safetensors")
    assert map_file(tmp_path / "w.safetensors") == {}


def test_one_file_is_one_mapping(tmp_path):
    save_file({f"w{i}": torch.ones(4096) for i in range(20)}, tmp_path / "w.safetensors")
    read = map_file(tmp_path / "w.safetensors")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 1
    read["w0"] += 1  # the mapping is private
    assert load_file(tmp_path / "w.safetensors")["w0"].max() == 1
    del read
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}, "expected safetensors"),
        ({"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}, "no artifact has"),
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}, "expected safetensors"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "expected safetensors"),
        ({"dtype": "F32", "shape": [1]}, "expected safetensors"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, described, said):
    header = json.dumps({"w": described}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match=said):
        map_weights({path: path}, CPU)


def test_a_header_that_ends_at_an_odd_byte_is_read(tmp_path):
    """safetensors pads its headers; another writer need not."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (1 + -len(header) % 8)
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([0, 0, 128, 63]))
    assert map_weights({path: path}, CPU)["w"].tolist() == [1.0]


def test_what_a_header_says_besides_means_nothing(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "new": None}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert map_file(path)["w"].tolist() == [0.0]
