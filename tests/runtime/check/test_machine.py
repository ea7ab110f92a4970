"""What a library says of itself, against `readelf`; and what this machine refuses of it, before dlopen."""

import json
import platform
import re
import shutil
import subprocess

import pytest

from prebake.exporter.lower.aoti.pt2 import clear_executable_stack
from prebake.runtime import ArtifactError
from prebake.runtime.artifact import open_artifact
from prebake.runtime.native import libraries
from prebake.runtime.native.elf import map_elf, read_elf
from prebake.runtime.native.libraries import library_problems, loaded_libraries, symbol_versions
from support.paper_artifact import TOKENIZER, edit, library, relist, write_package

HERE = platform.machine()
LIBC = "libc.so.6"


def loaded(start):
    return next(path for path in loaded_libraries() if path.name.startswith(start))


def changed(data, offset, number):
    """The library with that number, 32 bits, in the first entry of what it needs."""
    at = data.index(b"\1\0\1\0", 64 + 56 * 3 + 64) + offset  # version 1, with one symbol version
    return data[:at] + number.to_bytes(4, "little") + data[at + 4 :]


def refused(data):
    return list(library_problems("a.so", data))


@pytest.mark.skipif(
    not shutil.which("readelf"), reason="readelf, the oracle here, is not installed: apt-get install binutils"
)
@pytest.mark.parametrize("start", ["libstdc++", "libc.so", "libm.so", "libtorch_python"])
def test_it_reads_what_readelf_reads(start):
    path = loaded(start)
    elf = map_elf(path)
    listed = subprocess.run(
        ["readelf", "-VldW", path], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
    ).stdout
    needs = {}
    for file, name in re.findall(
        r"Version: \d+ +File: (\S+)|Name: (\S+) +Flags: \S+ +Version: \d+", section(listed, "needs")
    ):
        if file:
            needs[file] = set()
        else:
            needs[list(needs)[-1]].add(name)
    assert {file: set(versions) for file, versions in elf.needs.items()} == needs
    assert list(elf.gives) == re.findall(r"Index: \d+ +Cnt: \d+ +Name: (\S+)", section(listed, "definition"))
    assert elf.soname == (re.search(r"Library soname: \[(.*)\]", listed) or [None, None])[1]
    stack = re.search(r"GNU_STACK +\S+ +\S+ +\S+ +\S+ +\S+ +(\S+)", listed)
    assert elf.executable_stack == ("E" in stack[1])
    assert elf.machine == HERE


def section(listed, word):
    """The part of readelf's output that is headed `Version <word> section`."""
    return next((part for part in listed.split("\nVersion ")[1:] if part.startswith(word)), "")


def test_the_library_on_paper_says_what_it_was_given():
    elf = read_elf(library({LIBC: ["GLIBC_2.2.5", "GLIBC_99.1"], "libm.so.6": ["GLIBC_2.29"]}, stack=7))
    assert elf.needs == {LIBC: ("GLIBC_2.2.5", "GLIBC_99.1"), "libm.so.6": ("GLIBC_2.29",)}
    assert elf.executable_stack
    assert not read_elf(library()).executable_stack
    assert read_elf(library(stack=None)).executable_stack


def test_a_library_that_fits_is_not_refused():
    assert refused(library({LIBC: ["GLIBC_2.2.5" if HERE == "x86_64" else "GLIBC_2.17"]})) == []


def test_a_newer_version_of_a_symbol_is_refused_with_the_newest_here():
    newest = max(
        (v for v in symbol_versions(LIBC) if re.fullmatch(r"GLIBC_[\d.]+", v)),
        key=lambda v: tuple(map(int, v[6:].split("."))),
    )
    assert newest == f"GLIBC_{platform.libc_ver()[1]}"
    assert refused(library({LIBC: ["GLIBC_99.2", "GLIBC_99.10"]})) == [
        f"a.so: needs GLIBC_99.10 of libc.so.6, the one here has {newest} at most; "
        "export again on this machine, or on one as old"
    ]


def test_so_is_one_of_the_cpp_library():
    (said,) = refused(library({"libstdc++.so.6": ["GLIBCXX_9.9.9"]}))
    assert said.startswith("a.so: needs GLIBCXX_9.9.9 of libstdc++.so.6, the one here has GLIBCXX_3.4.")


def test_a_kind_of_version_that_is_not_there_at_all():
    (said,) = refused(library({LIBC: ["MUSL_1.0"]}))
    assert said.startswith("a.so: needs MUSL_1.0 of libc.so.6, the one here has none at most; ")


def test_a_library_that_is_not_loaded_is_left_to_the_linker():
    assert refused(library({"libnobody.so.1": ["X_1"]})) == []


@pytest.mark.parametrize(("glibc", "problems"), [("2.40", 0), ("2.41", 1), ("2.100", 1)])
def test_an_executable_stack_is_refused_where_glibc_refuses_it(monkeypatch, glibc, problems):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", glibc))
    said = [f"a.so: asks for an executable stack, which glibc {glibc} refuses; export again"]
    assert refused(library(stack=7)) == said[:problems]
    assert refused(library(stack=None)) == said[:problems]
    assert refused(library(stack=6)) == []
    assert refused(clear_executable_stack(library(stack=7))) == []


def test_nothing_else_of_a_library_is_changed_with_its_stack():
    assert clear_executable_stack(library(stack=7)) == library(stack=6)
    assert clear_executable_stack(library({LIBC: ["X"]}, stack=6)) == library({LIBC: ["X"]}, stack=6)


def test_code_for_another_machine_is_refused():
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[HERE]
    assert refused(library(machine=other)) == [
        f"a.so: is code for {other}, this machine is {HERE}; export again on this machine"
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it does not begin like a 64-bit little-endian ELF file"),
        (b"not machine code", "it does not begin like a 64-bit little-endian ELF file"),
        (library()[:40], "its tables lead out of the file (unpack_from requires a buffer of at least"),
        (changed(library({LIBC: ["X"]}), 4, 2**31), "it has a name without an end"),
        (
            library()[:32] + b"\xff" * 8 + library()[40:],
            "its tables lead out of the file (Python int too large to convert",
        ),
    ],
)
def test_what_is_no_library_is_refused(data, why):
    (said,) = refused(data)
    assert said.startswith(f"a.so: expected a shared library, but {why}")
    assert said.endswith("; restore the file or export again")


def test_a_list_that_leads_back_to_itself_ends():
    looped = changed(library({LIBC: ["X"], "libm.so.6": ["Y"]}), 12, 2**32 - 16)
    assert len(refused(looped)) == 1


def test_every_problem_of_every_library_is_in_the_refusal(paper, never_opened):
    write_package(paper / "graphs/denoiser.pt2", so=library({LIBC: ["GLIBC_99.1"]}))
    relist(paper)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(paper)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{paper}: graphs/denoiser.pt2, full/a.wrapper.so: needs GLIBC_99.1 of libc.so.6, ")
    assert second.startswith(f"{paper}: graphs/denoiser.pt2, reuse/a.wrapper.so: needs GLIBC_99.1 of libc.so.6, ")


# --- prebake check ----------------------------------------------------------------------------------------------------


def told(capsys, folder, *more):
    from prebake.runtime.__main__ import main

    code = main(["check", str(folder), *more])
    return code, capsys.readouterr().out


def test_check_says_that_nothing_is_wrong(paper_pipeline, never_opened, capsys):
    assert told(capsys, paper_pipeline) == (0, f"{paper_pipeline}: nothing is wrong, and this machine can run it\n")


def test_check_says_it_in_json_too(paper_pipeline, never_opened, capsys):
    code, out = told(capsys, paper_pipeline, "--json")
    assert (code, json.loads(out)) == (0, {"artifact": str(paper_pipeline), "ok": True, "problems": []})


def test_check_tells_problems_of_all_kinds_at_once(paper, never_opened, capsys):
    edit(paper, lambda m: m["requires"].update(torch="1.0", isa=["avx2048"]))
    edit(paper, lambda m: m["graphs"][0].update(package="graphs/x.pt2"))
    (paper / "plans/2.json").write_text("{}")
    weights = paper / "weights/denoiser.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (paper / "weights/more").write_text("")
    code, out = told(capsys, paper)
    *lines, last = out.splitlines()
    assert code == 5
    assert last == f"{paper}: 6 problems"
    for line, start in zip(
        lines,
        [
            "manifest.json: 'graphs/x.pt2' is used but not in files",
            "was compiled for any, this CPU lacks avx2048",
            "was compiled with torch 1.0",
            "plans/2.json has 2 bytes",
            "weights/more is not in the manifest",
            "weights/denoiser.safetensors: sha256 is",
        ],
        strict=True,
    ):
        assert line.startswith(start)


NO_PIPELINE = {
    "status": ({"status": "failed"}, "its verification failed, see reports/; export again"),
    "family": ({"family": "dream"}, "manifest.json [family]: 'dream' is not one that this runtime replays: cogvideox"),
    "settings": ({"pipeline": {"timestep_scale": 1.0}}, "manifest.json [pipeline.latents_shape]: Field required (2 pr"),
    "kind": ({"family": "attach"}, "manifest.json [pipeline."),
}


@pytest.mark.parametrize("what", NO_PIPELINE)
def test_check_refuses_what_opens_and_is_no_pipeline(paper_pipeline, never_opened, capsys, what):
    changes, start = NO_PIPELINE[what]
    edit(paper_pipeline, lambda m: m.update(changes))
    code, out = told(capsys, paper_pipeline)
    line, last = out.splitlines()
    assert (code, last) == (5, f"{paper_pipeline}: 1 problem")
    assert line.startswith(start)


def test_check_looks_into_tokenizers(paper_pipeline, never_opened, capsys):
    (paper_pipeline / TOKENIZER).write_text("{}")
    relist(paper_pipeline)
    code, out = told(capsys, paper_pipeline)
    assert code == 5
    assert out.startswith(f"{TOKENIZER}: expected a tokenizer.json, but ")


def test_check_looks_into_files_that_are_as_listed(paper, never_opened, capsys):
    write_package(paper / "graphs/denoiser.pt2", models=("full",), so=b"text")
    (paper / "plans/2.json").write_text("{}")
    (paper / "weights/denoiser.safetensors").write_bytes(b"x")
    relist(paper)
    edit(paper, lambda m: m["graphs"][0]["inputs"][0].update(dtype="load"))
    code, out = told(capsys, paper, "--json")
    found = [(p["kind"], p["problem"]) for p in json.loads(out)["problems"]]
    starts = [
        ("plans", "plans/2.json [name]: Field required"),
        ("weights", "weights/denoiser.safetensors: expected safetensors, but "),
        ("manifest", "manifest.json: 'load' is not a dtype of this torch; "),
        ("code", "graphs/denoiser.pt2: the manifest names the models full, reuse, the package has full; export again"),
        ("code", "graphs/denoiser.pt2, full/a.wrapper.so: expected a shared library, but it does not begin like"),
    ]
    assert code == 5
    for (kind, problem), (wanted, start) in zip(found, starts, strict=True):
        assert kind == wanted
        assert problem.startswith(start)


def test_check_of_no_artifact(tmp_path, capsys):
    assert told(capsys, tmp_path / "x") == (
        5,
        f"{tmp_path / 'x'}: expected an artifact folder, found nothing; make one with `prebake export`\n"
        f"{tmp_path / 'x'}: 1 problem\n",
    )


def test_check_follows_no_name_that_leads_out(paper, never_opened, capsys):
    edit(paper, lambda m: m["files"].append({"path": "../secret", "size": 1, "sha256": "0" * 64}))
    (paper.parent / "secret").mkdir()  # its size is not told: it is not looked at
    code, out = told(capsys, paper)
    assert code == 5
    assert out == (
        "manifest.json [files]: '../secret' is not a plain name inside the folder; "
        f"an artifact holds machine code, so take it only from someone you trust\n{paper}: 1 problem\n"
    )


def test_versions_of_a_library_are_read_once(monkeypatch):
    symbol_versions(LIBC)
    monkeypatch.setattr(libraries, "loaded_libraries", None)
    assert symbol_versions(LIBC)
