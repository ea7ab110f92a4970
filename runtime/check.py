"""Everything that can be known to be wrong before native code is opened: files, machine, and whether plans fit graphs.

A folder and its manifest come in, nothing comes out; every problem found is in the one ArtifactError. The cheap checks
(names, sizes, machine) come first, and file contents are hashed only when those hold. Plans are parsed after that, from
files whose hashes are right. What the manifest lists can then be opened by name.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from .backends import backend
from .errors import ArtifactError
from .manifest import Graph, Manifest
from .plan import Evaluation, Plan

FREE = "reports"  # anything may lie in this folder; nothing in it is ever opened
UNLISTED = {"manifest.json", "signature.json"}  # neither can hold its own hash; see signature.py
TRUST = "an artifact holds machine code, so take it only from someone you trust"


def check(folder: Path, manifest: Manifest, *, hash_weights: bool = True) -> None:
    """Raises ArtifactError with every problem of the folder, or of this machine, that the manifest lets one see.

    `hash_weights=False` leaves out the hashes of `weights/`, which hold no code; their sizes are still compared.
    """
    raise_all(folder, [*name_problems(manifest), *machine_problems(manifest), *reference_problems(manifest)])
    raise_all(folder, file_problems(folder, manifest))
    raise_all(folder, hash_problems(folder, manifest, hash_weights))


def raise_all(folder: Path, problems: Iterable[str]) -> None:
    """One ArtifactError, a line for each problem, or nothing when there are none."""
    lines = list(problems)
    if lines:
        raise ArtifactError("\n".join(f"{folder}: {line}" for line in lines))


def name_problems(manifest: Manifest) -> Iterator[str]:
    """Listed files whose names could lead out of the folder, or that are listed twice."""
    for path, count in Counter(entry.path for entry in manifest.files).items():
        if not is_plain_name(path):
            yield f"manifest.json [files]: {path!r} is not a plain name inside the folder; {TRUST}"
        elif path in UNLISTED or path.split("/")[0] == FREE:
            yield f"manifest.json [files]: {path!r} cannot be listed; export again"
        elif count > 1:
            yield f"manifest.json [files]: {path!r} is listed {count} times; export again"


def is_plain_name(path: str) -> bool:
    """Whether the path is relative, in its shortest form, and stays inside the folder on every system."""
    if not path or path.startswith("/") or "\\" in path or ":" in path or "\0" in path:
        return False
    return ".." not in PurePosixPath(path).parts and path == str(PurePosixPath(path)) and path != "."


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files that are missing, of another size, links, or not listed."""
    present = set(_walk(folder))
    for path in sorted(path for path in present if (folder / path).is_symlink()):
        yield f"{path} is a symbolic link, an artifact holds plain files only; copy the file in its place"
    listed = {entry.path: entry.size for entry in manifest.files}
    for path, size in listed.items():
        file = folder / path
        if not file.is_file():
            yield f"{path} is missing, the manifest lists it; restore the file or export again"
        elif file.stat().st_size != size:
            yield f"{path} has {file.stat().st_size} bytes, the manifest says {size}; restore the file or export again"
    for path in sorted(present - listed.keys() - UNLISTED):
        yield f"{path} is not in the manifest; remove it, or put it under {FREE}/ ({TRUST})"


def hash_problems(folder: Path, manifest: Manifest, hash_weights: bool) -> Iterator[str]:
    """Files whose content is not what the exporter wrote."""
    for entry in manifest.files:
        if entry.path.startswith("weights/") and not hash_weights:
            continue
        with (folder / entry.path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            yield hash_problem(entry.path, digest, entry.sha256)


def hash_problem(path: str, came: str, expected: str) -> str:
    return f"{path}: sha256 is {came[:12]}.., the manifest says {expected[:12]}..; restore the file or export again ({TRUST})"


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files and links, relative to the folder, without what lies in `reports/`."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_symlink() or (not path.is_dir() and name.parts[0] != FREE):
            yield name.as_posix()


# --- this machine ---------------------------------------------------------------------------------------------------


def machine_problems(manifest: Manifest) -> Iterator[str]:
    """What the artifact's native code needs and this machine or this torch does not have."""
    import torch

    requires = manifest.requires
    here = (platform.system(), platform.machine())
    if here != (requires.system, requires.machine):
        yield f"was compiled for {requires.system} {requires.machine}, this machine is {here[0]} {here[1]}; export again on this machine"
    if missing := sorted(set(requires.isa) - cpu_flags()):
        yield (
            f"was compiled for {requires.isa_level}, this CPU lacks {', '.join(missing)}; "
            "export again on this machine, or with a lower compile.isa"
        )
    version = ".".join(torch.__version__.split(".")[:2])
    if requires.torch not in (None, version):
        yield (
            f"was compiled with torch {requires.torch}, this is torch {version}, and compiled code is not compatible "
            f"between the two; install torch {requires.torch}, or export again"
        )
    yield from glibc_problems(requires.glibc)
    if requires.device == "cuda" and not torch.cuda.is_available():
        yield "was compiled for cuda, this torch sees no GPU; use a CUDA build of torch, or export for the cpu"
    try:
        yield from backend(manifest.backend).problems(requires)
    except ArtifactError as e:
        yield str(e)


def glibc_problems(needed: str | None) -> Iterator[str]:
    name, version = platform.libc_ver()
    if needed is None or (name == "glibc" and _numbers(version) >= _numbers(needed)):
        return
    yield (
        f"needs glibc {needed}, this system has {name or 'another libc'} {version}".rstrip()
        + "; export again on this machine"
    )


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets of this CPU as Linux names them: `flags` on x86, `Features` on Arm. Empty elsewhere."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


# --- whether the manifest and the plans agree with themselves -------------------------------------------------------


def reference_problems(manifest: Manifest) -> Iterator[str]:
    """Names in the manifest that point at nothing, or at two things."""
    files = {entry.path for entry in manifest.files}
    for name, count in Counter(graph.name for graph in manifest.graphs).items():
        if count > 1:
            yield f"manifest.json [graphs]: {name!r} occurs {count} times; export again"
    for path in sorted({graph.package for graph in manifest.graphs} | set(manifest.plans.values())):
        if path not in files:
            yield f"manifest.json: {path!r} is used but not in files; export again"
    sites = {site.name for site in manifest.sites}
    for graph in manifest.graphs:
        unknown = sorted({*graph.stores, *graph.combines} - sites)
        if unknown:
            yield f"manifest.json [graphs.{graph.name}]: site {unknown[0]!r} is not in sites; export again"
        else:
            yield from _slot_problems(graph, manifest)


def _slot_problems(graph: Graph, manifest: Manifest) -> Iterator[str]:
    sites = {site.name: site for site in manifest.sites}
    expected = {f"{t}@{k}" for name in graph.combines for t in sites[name].tensors for k in range(sites[name].slots)}
    taken = {spec.name for spec in graph.inputs if "@" in spec.name}
    if expected != taken:
        yield f"manifest.json [graphs.{graph.name}]: combines need the inputs {sorted(expected)}, it has {sorted(taken)}; export again"
    given = {spec.name for spec in graph.outputs}
    if lacking := sorted(t for name in graph.stores for t in sites[name].tensors if t not in given):
        yield f"manifest.json [graphs.{graph.name}]: stores {lacking[0]!r}, which is not among its outputs; export again"


def plan_problems(plans: Mapping[str, Plan], manifest: Manifest) -> Iterator[str]:
    """Evaluations that the loop could not run: no such variant, a read before a write, a history that is too short.

    A tail is checked as the plan that it stands for.
    """
    graphs = {graph.name: graph for graph in manifest.graphs}
    for name, plan in plans.items():
        path = manifest.plans[name]
        yield from _evaluation_problems(plan.evaluations, graphs, f"{path} [")
        if not plan.evaluations:
            yield f"{path}: has no evaluations; export again"
        for step, count in Counter(tail.step for tail in plan.tails).items():
            if count > 1:
                yield f"{path} [tail {step}]: occurs {count} times; export again"
        for tail in plan.tails:
            where, left = f"{path} [tail {tail.step}", len(plan.evaluations) - tail.begin
            if tail.step >= plan.steps:
                yield f"{where}]: leaves out {tail.step} steps, the plan has {plan.steps}; export again"
            elif left < 1:
                yield f"{where}]: begins at evaluation {tail.begin}, the plan has {len(plan.evaluations)}; export again"
            elif len(tail.head) > left:
                yield f"{where}]: its head has {len(tail.head)} evaluations, {left} are left; export again"
            else:
                evaluations = plan.evaluations_of(tail)
                if evaluations[0].marginal is None:
                    yield f"{where}]: has no marginal to begin with; export again"
                yield from _evaluation_problems(evaluations, graphs, f"{where}, ")


def _evaluation_problems(
    evaluations: tuple[Evaluation, ...], graphs: Mapping[str, Graph], prefix: str
) -> Iterator[str]:
    """What stands in the way of running these from the first on; `prefix` is the place in the file, up to the evaluation."""
    stored: set[str] = set()
    for e, evaluation in enumerate(evaluations):
        where = f"{prefix}evaluation {e}]"
        graph = graphs.get(evaluation.variant)
        if graph is None:
            yield f"{where}: variant {evaluation.variant!r} is not in the artifact, it has {', '.join(graphs)}; export again"
            continue
        update = evaluation.update
        reach = max(len(update.latents), len(update.outputs))
        if not 1 <= reach <= e + 1:
            yield f"{where}: the update reads {reach} evaluations, there are {e + 1} so far; export again"
        if early := sorted(set(graph.combines) - stored):
            yield f"{where}: combines site {early[0]!r} before any evaluation stored it; export again"
        wanted = next((spec.shape for spec in graph.inputs if spec.name == "coefficients"), (0,))
        if wanted != (len(evaluation.coefficients),):
            yield f"{where}: has {len(evaluation.coefficients)} coefficients, variant {graph.name!r} takes {wanted[0]}; export again"
        stored.update(graph.stores)
