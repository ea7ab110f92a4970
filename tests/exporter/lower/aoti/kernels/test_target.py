"""The kernels compile for every kind of CPU that they are written for, and then use nothing that it has not."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from prebake.exporter.lower.aoti import kernels
from prebake.exporter.lower.aoti.kernels.target import EXTENSIONS, KernelTarget

OF_AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|[23]\d)\b|%k[0-7]\b|\{%k")
PRODUCTS = {"avx_vnni": "vpdpbusd", "avx512_vnni": "vpdpbusd", "avx512_bf16": "vdpbf16ps"}
TARGETS = {
    "AVX2": KernelTarget("x86-64-v3"),
    "AVX2 with VNNI": KernelTarget("x86-64-v3", ("avx_vnni",)),
    "AVX-512": KernelTarget("x86-64-v4"),
    "Ice Lake": KernelTarget("x86-64-v4", ("avx512_vnni",)),
    "Sapphire Rapids": KernelTarget("x86-64-v4", ("avx512_bf16", "avx512_vnni")),
}


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump: apt install binutils")
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_use_the_instructions_of_their_target_and_no_others(name, tmp_path):
    target = TARGETS[name]
    archive = kernels.build_archive(tmp_path, 2, target)
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", archive], capture_output=True, text=True, check=True)
    lines = [line for line in code.stdout.splitlines() if re.match(r"\s+[0-9a-f]+:", line)]
    assert len(lines) > 10_000
    used = {product for product in PRODUCTS.values() if any(product in line for line in lines)}
    assert used == {PRODUCTS[extension] for extension in target.extensions}
    above = [line for line in lines if OF_AVX512.search(line)]
    assert bool(above) == (target.level == "x86-64-v4"), above[:3]
    if target.level == "x86-64-v3":  # the code that all of them without VNNI have
        assert any("vpmaddwd" in line for line in lines) == ("avx_vnni" not in target.extensions)


def test_every_extension_has_a_product_of_its_own():
    assert PRODUCTS.keys() == {extension for known in EXTENSIONS.values() for extension in known}
    assert KernelTarget("x86-64-v4", ("avx512_vnni",)).arguments == ("-march=x86-64-v4", "-mavx512vnni")
