"""Everything that can be wrong with an artifact here, pipeline included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, PrebakeError
from .manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from .weights import Tensors


def artifact_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of all that is wrong; the kinds are manifest, machine, files, signature, plans, weights and code."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError as e:
        yield "manifest", str(e)
        return
    from .check.artifact import file_name_problems, reference_problems
    from .check.machine import machine_problems
    from .check.signature import coverage_problems

    names, references = list(file_name_problems(manifest)), list(reference_problems(manifest))
    yield from label_problems("manifest", [*names, *references])
    yield from label_problems("machine", machine_problems(manifest))
    if names:  # such names are not followed
        return
    broken = list(damaged_file_problems(folder, manifest))
    yield from label_problems("files", broken)
    yield from label_problems("signature", coverage_problems(folder, manifest))
    if not broken and not references:
        yield from load_problems(folder, manifest)


def label_problems(kind: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((kind, line) for line in lines)


def damaged_file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Names, sizes and links, and the hashes of all files that are there in the right size."""
    from .check import artifact as check
    from .storage.files import open_files

    yield from check.file_problems(folder, manifest)
    for entry in manifest.files:
        if not list(check.file_problem(folder, entry)) and not is_linked(folder, entry.path):
            try:
                with open_files(folder, [entry.path]) as files:
                    yield from check.content_problems(manifest, files)
            except ArtifactError as e:
                yield str(e).removeprefix(f"{folder}: ")


def is_linked(folder: Path, path: str) -> bool:
    """Whether a link leads to the file."""
    at = folder / path
    return any(p.is_symlink() for p in (at, *at.parents) if p.is_relative_to(folder) and p != folder)


def load_problems(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What is wrong inside files that are all there and are what the manifest says."""
    import torch

    from .artifact import constants_of, read_plans, timestep_scale
    from .backends import backend_module
    from .contract import graph_contract

    yield from label_problems("manifest", collect_problems(folder, lambda: timestep_scale(manifest)))
    yield from label_problems("plans", collect_problems(folder, lambda: read_plans(folder, manifest)))

    def bind() -> None:
        weights = map_listed_weights(folder, manifest)
        for graph in manifest.graphs:
            constants_of(graph, weights)

    yield from label_problems("weights", collect_problems(folder, bind))
    for graph in manifest.graphs:
        yield from label_problems(
            "manifest",
            collect_problems(folder, lambda graph=graph: graph_contract(graph, torch.device("cpu"), manifest.range)),
        )
    try:
        yield from label_problems("code", backend_module(manifest.backend).package_problems(folder, manifest))
    except ArtifactError:
        return  # told as what this machine lacks


def pipeline_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """What an artifact that opens is refused for as a pipeline: its verification, its family, its settings, graphs and
    tokenizers."""
    import torch

    from .artifact import Artifact, BoundGraph, read_plans
    from .attachment.facts import read_facts
    from .check.artifact import status_problems
    from .contract import graph_contract
    from .families import artifact_families
    from .manifest import ATTACH_FAMILY

    manifest, cpu = read_manifest(folder), torch.device("cpu")
    yield from label_problems("manifest", status_problems(manifest))
    unopened = {
        graph.name: BoundGraph(graph, list, graph_contract(graph, cpu, manifest.range)) for graph in manifest.graphs
    }
    plans, weights = read_plans(folder, manifest), map_listed_weights(folder, manifest)
    artifact = Artifact(folder, manifest, cpu, weights, unopened, plans, {})
    look = read_facts if manifest.family == ATTACH_FAMILY else artifact_families
    yield from label_problems("manifest", collect_problems(folder, lambda: look(artifact)))


def map_listed_weights(folder: Path, manifest: Manifest) -> Tensors:
    """Key -> tensor of all weight files, mapped. Raises ArtifactError, see `map_weights`."""
    import torch

    from .artifact import weight_files
    from .storage.files import descriptor_path, open_files
    from .weights import map_weights

    with open_files(folder, weight_files(manifest)) as files:
        named = {folder / path: descriptor_path(files[path]) for path in files}
        return map_weights(named, torch.device("cpu"), manifest.channels_last, manifest.complex)


def collect_problems(folder: Path, look: Any) -> list[str]:
    """The lines of the error that `look` raises, without the folder's name before them; none where it raises nothing."""
    try:
        look()
    except PrebakeError as e:
        return [line.removeprefix(f"{folder}: ").removeprefix(f"{folder}/") for line in str(e).splitlines()]
    return []
