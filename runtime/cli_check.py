"""The command `check`: whether this machine can run an artifact, every problem at once, and nothing of it opened as code.

`load` stops at the first kind of problem, since what is wrong with a manifest makes the rest meaningless. Here each kind is
looked at as far as the ones before allow.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import ArtifactError, PrebakeError
from .manifest import Manifest, read_manifest


def add_check(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check",
        help="say whether this machine can run an artifact, and all that is wrong with it",
        description="Says everything that is wrong with an artifact, or that it needs and this machine lacks, without "
        "opening its machine code. Every file is hashed. Exits with 0 where nothing is wrong, else with 5.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="an artifact's folder")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> int:
    """Prints what is wrong, a line each, or that nothing is. The exit code is that of a refused artifact where something is."""
    folder = Path(args.artifact)
    found = [
        {"kind": kind, "problem": problem} for kind, problem in [*problems(folder)] or [*pipeline_problems(folder)]
    ]
    if args.json:
        print(json.dumps({"artifact": str(folder), "ok": not found, "problems": found}, indent=2, ensure_ascii=False))
    else:
        print(*(each["problem"] for each in found), sep="\n", end="\n" if found else "")
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        print(f"{folder}: {count if found else 'nothing is wrong, and this machine can run it'}")
    return ArtifactError.exit_code if found else 0


def problems(folder: Path) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of all that is wrong; the kinds are manifest, machine, files, plans, weights and code."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError as e:
        yield "manifest", str(e)
        return
    from .check import name_problems, reference_problems
    from .machine import machine_problems

    names, references = list(name_problems(manifest)), list(reference_problems(manifest))
    yield from of_kind("manifest", [*names, *references])
    yield from of_kind("machine", machine_problems(manifest))
    if names:  # such names are not followed
        return
    broken = list(file_problems(folder, manifest))
    yield from of_kind("files", broken)
    if not broken and not references:
        yield from content_problems(folder, manifest)


def of_kind(kind: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((kind, line) for line in lines)


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Names, sizes and links, and the hashes of all files that are there in the right size."""
    from . import check
    from .files import opened

    yield from check.file_problems(folder, manifest)
    for entry in manifest.files:
        if not list(check.file_problem(folder, entry)) and not linked(folder, entry.path):
            try:
                with opened(folder, [entry.path]) as files:
                    yield from check.content_problems(manifest, files)
            except ArtifactError as e:
                yield str(e).removeprefix(f"{folder}: ")


def linked(folder: Path, path: str) -> bool:
    """Whether a link leads to the file."""
    at = folder / path
    return any(p.is_symlink() for p in (at, *at.parents) if p.is_relative_to(folder) and p != folder)


def content_problems(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What is wrong inside files that are all there and are what the manifest says."""
    import torch

    from .artifact import constants_of, read_plans, timestep_scale, weight_files
    from .backends import backend
    from .contract import Contract
    from .files import by_descriptor, opened
    from .weights import map_weights

    yield from of_kind("manifest", said(folder, lambda: timestep_scale(manifest)))
    yield from of_kind("plans", said(folder, lambda: read_plans(folder, manifest)))

    def bind() -> None:
        with opened(folder, weight_files(manifest)) as files:
            named = {folder / path: by_descriptor(files[path]) for path in files}
            weights = map_weights(named, torch.device("cpu"), manifest.channels_last, manifest.complex)
        for graph in manifest.graphs:
            constants_of(graph, weights)

    yield from of_kind("weights", said(folder, bind))
    for graph in manifest.graphs:
        yield from of_kind("manifest", said(folder, lambda graph=graph: Contract(graph, torch.device("cpu"))))
    try:
        yield from of_kind("code", backend(manifest.backend).package_problems(folder, manifest))
    except ArtifactError:
        return  # told as what this machine lacks


def pipeline_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """What an artifact that opens is refused for as a pipeline: its verification, its family, its settings and tokenizers."""
    import torch

    from .artifact import Artifact, BoundGraph, read_plans
    from .attachment import FAMILY, read_facts
    from .check import status_problems
    from .contract import Contract
    from .families import family_of

    manifest, cpu = read_manifest(folder), torch.device("cpu")
    yield from of_kind("manifest", status_problems(manifest))
    unopened = {graph.name: BoundGraph(graph, list, Contract(graph, cpu)) for graph in manifest.graphs}
    artifact = Artifact(folder, manifest, cpu, {}, unopened, read_plans(folder, manifest), {})
    look = read_facts if manifest.family == FAMILY else family_of
    yield from of_kind("manifest", said(folder, lambda: look(artifact)))


def said(folder: Path, look: Any) -> list[str]:
    """What `look` raises, a line each, without the folder's name before it."""
    try:
        look()
    except PrebakeError as e:
        return [line.removeprefix(f"{folder}: ").removeprefix(f"{folder}/") for line in str(e).splitlines()]
    return []
