"""Everything that can be known to be wrong before native code is opened: files, machine, and whether plans fit graphs.

A folder and its manifest come in; the listed files come out, open, so that what was compared is what will be read. Every
problem found is in the one ArtifactError. The cheap checks (names, sizes, machine) come first, and file contents are hashed
only when those hold. Plans are parsed after that.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from pydantic import ValidationError

from ..errors import RequestError, describe_read_error, raise_problems
from ..hub.address import describe_links
from ..manifest import FileEntry, Graph, Manifest, TensorSpec
from ..plan import Evaluation, Plan, size_plan_name
from ..sizes.size_range import SizeRange
from ..storage.files import TRUST_WARNING, file_hashes, hash_problem, open_files
from ..storage.hash_marker import HashMarker
from ..storage.private_folder import default_cache_folder
from ..storage.weight_files import refuse_changes
from .machine import machine_problems
from .signature import Identity, release_problems, signature_problems

UNCHECKED_FOLDER = "reports"  # anything may lie in this folder; nothing in it is ever opened
MANIFEST_FILE = "manifest.json"
UNLISTED_FILES = {MANIFEST_FILE, "signature.json"}  # neither can hold its own hash; see signature.py
MAX_NAMED_FILES = 5  # unlisted files of one folder that are named one by one
MAX_CHECKED_EVALUATIONS = 2_000_000  # of 1,000 steps that can begin anywhere there are half as many
LFS_BYTES = 1024  # a pointer of Git LFS is smaller
Trust = Literal["hash", "signature", "size"]
"""`hash`: every file is what the manifest says. `signature`: so, and the holder of a key says that of the manifest. `size`:
of the weights, which hold no code, only the sizes are compared."""
PublicKey = Path | str | Identity


def check_artifact(folder: Path, manifest: Manifest, *, trust: Trust = "hash") -> None:
    """Raises ArtifactError with every problem of the folder, or of this machine, that the manifest lets one see."""
    with open_checked_files(folder, manifest, trust=trust):
        pass


@contextmanager
def open_checked_files(
    folder: Path,
    manifest: Manifest,
    *,
    trust: Trust = "hash",
    public_key: PublicKey | None = None,
    minimum_release: int | None = None,
    cache_dir: Path | None = None,
) -> Iterator[dict[str, int]]:
    """Path -> descriptor of every listed file, compared with the manifest, for the length of the block.

    Files that this user has found right before, and that nobody has touched since, are not hashed again: see verified.py.
    Raises ArtifactError as `check_artifact` does, and as `signature_problems` does for `trust="signature"`.
    """
    check_trust(trust, public_key, minimum_release)
    raise_problems(folder, release_problems(manifest, minimum_release))
    raise_problems(folder, [*file_name_problems(manifest), *machine_problems(manifest), *reference_problems(manifest)])
    raise_problems(folder, file_problems(folder, manifest))
    if public_key is not None:
        raise_problems(folder, signature_problems(folder, manifest, public_key))
    with open_files(folder, [entry.path for entry in manifest.files]) as files, refuse_changes(folder, manifest, files):
        if trust == "size":
            raise_problems(folder, content_problems(manifest, files, hash_weights=False))
        else:
            marker = HashMarker(cache_dir or default_cache_folder(), folder, manifest, files)
            if not marker.is_valid():
                raise_problems(folder, content_problems(manifest, files))
                marker.write()
        yield files


def check_trust(trust: str, public_key: PublicKey | None, minimum_release: int | None = None) -> None:
    """Raises RequestError for a policy that does not exist, or whose key is missing or of no use."""
    if minimum_release is not None and (isinstance(minimum_release, bool) or not isinstance(minimum_release, int)):
        raise RequestError(
            f"minimum_release={minimum_release!r}: expected a whole number, as `prebake sign --release` takes"
        )
    if minimum_release is not None and trust != "signature":
        raise RequestError(
            f"minimum_release: anyone can write another number, and trust={trust!r} asks for no signature; give trust='signature' with it"
        )
    if trust not in get_args(Trust):
        raise RequestError(f"trust={trust!r}: expected one of {', '.join(get_args(Trust))}")
    if trust == "signature" and public_key is None:
        raise RequestError("trust='signature': expected public_key, the file of the key of whoever signed the artifact")
    if trust != "signature" and public_key is not None:
        raise RequestError(f"public_key: trust={trust!r} does not ask for a signature; give trust='signature' with it")


def file_name_problems(manifest: Manifest) -> Iterator[str]:
    """Listed files whose names could lead out of the folder, or that are listed twice."""
    for path, count in Counter(entry.path for entry in manifest.files).items():
        if not is_plain_name(path):
            yield f"manifest.json [files]: {path!r} is not a plain name inside the folder; {TRUST_WARNING}"
        elif path in UNLISTED_FILES or path.split("/")[0] == UNCHECKED_FOLDER:
            yield f"manifest.json [files]: {path!r} cannot be listed; export again"
        elif count > 1:
            yield f"manifest.json [files]: {path!r} is listed {count} times; export again"


def is_plain_name(path: str) -> bool:
    """Whether the path is relative, in its shortest form, and stays inside the folder on every system."""
    if not path or path.startswith("/") or "\\" in path or ":" in path or "\0" in path:
        return False
    if not path.isprintable():  # so are halves of surrogate pairs, which no file system takes
        return False
    return ".." not in PurePosixPath(path).parts and path == str(PurePosixPath(path)) and path != "."


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files that are missing, of another size, links, or not listed."""
    present = set(_walk_files(folder))
    yield from link_problems(folder, sorted(path for path in present if (folder / path).is_symlink()))
    listed = {entry.path: entry for entry in manifest.files}
    for entry in listed.values():
        yield from file_problem(folder, entry)
    yield from unlisted_problems(present - listed.keys() - UNLISTED_FILES)


def link_problems(folder: Path, links: Sequence[str]) -> Iterator[str]:
    """A sentence on the links in the folder. Where all is links, it is somebody's cache or store, and a copy is the way out."""
    if MANIFEST_FILE not in links:
        for path in links:
            yield f"{path} is a symbolic link, an artifact holds plain files only; copy the file in its place"
        return
    yield describe_links(folder, len(links))


def unlisted_problems(paths: Collection[str]) -> Iterator[str]:
    """A line for each, and one for all of a folder where there are many: the rest of another artifact, or a `.git`."""
    for top, names in groupby(sorted(paths), key=lambda path: path.partition("/")[0]):
        several = list(names)
        if len(several) > MAX_NAMED_FILES:
            count = f"{top}/ has {len(several)} files that are not in the manifest, such as {several[0]}"
            yield f"{count}; remove them, or put them under {UNCHECKED_FOLDER}/ ({TRUST_WARNING})"
        else:
            yield from (
                f"{p} is not in the manifest; remove it, or put it under {UNCHECKED_FOLDER}/ ({TRUST_WARNING})"
                for p in several
            )


def file_problem(folder: Path, entry: FileEntry) -> Iterator[str]:
    """What the listed file's name and size show, if anything."""
    try:
        info = (folder / entry.path).stat()
    except PermissionError as e:
        yield f"{entry.path}: {describe_read_error(e, folder)}"
        return
    except OSError:
        yield f"{entry.path} is missing, the manifest lists it; restore the file or export again"
        return
    if not stat.S_ISREG(info.st_mode):
        yield f"{entry.path} is not a plain file; restore the file or export again"
    elif info.st_size != entry.size and is_lfs_pointer(folder / entry.path, info.st_size):
        yield f"{entry.path} is a pointer of Git LFS, not the file itself; `git lfs pull` in the clone that it came from"
    elif info.st_size != entry.size:
        yield f"{entry.path} has {info.st_size} bytes, the manifest says {entry.size}; restore the file or export again"


def is_lfs_pointer(path: Path, size: int) -> bool:
    """Whether it is the small text that a clone without Git LFS has in a file's place."""
    try:
        return size < LFS_BYTES and path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return False


def hash_problems(folder: Path, manifest: Manifest, hash_weights: bool = True) -> Iterator[str]:
    """Opens the listed files of a folder whose names are right, and yields their `content_problems`."""
    with open_files(folder, [entry.path for entry in manifest.files]) as files:
        yield from content_problems(manifest, files, hash_weights=hash_weights)


def content_problems(manifest: Manifest, files: Mapping[str, int], *, hash_weights: bool = True) -> Iterator[str]:
    """Open files whose content is not what the exporter wrote; weights without their hash by size."""
    hashed = {path: d for path, d in files.items() if hash_weights or not path.startswith("weights/")}
    try:
        came = file_hashes(hashed)
    except OSError as e:
        yield f"{e.filename}: {describe_read_error(e, 'FOLDER')}"
        return
    for entry in manifest.files:
        if entry.path in hashed and came[entry.path] != entry.sha256:
            yield hash_problem(entry.path, came[entry.path], entry.sha256)
        elif entry.path in files and (size := os.fstat(files[entry.path]).st_size) != entry.size:
            yield f"{entry.path} has {size} bytes, the manifest says {entry.size}; restore the file or export again"


def _walk_files(folder: Path) -> Iterator[str]:
    """Names of all files and links, relative to the folder, without what lies in `reports/`."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_symlink() or (not path.is_dir() and name.parts[0] != UNCHECKED_FOLDER):
            yield name.as_posix()


def status_problems(manifest: Manifest) -> Iterator[str]:
    """A verification that failed, which `verify` alone goes past."""
    if manifest.status == "failed":
        yield "its verification failed, see reports/; export again, or use `prebake verify` to look closer"


# --- whether the manifest and the plans agree with themselves -------------------------------------------------------


def reference_problems(manifest: Manifest) -> Iterator[str]:
    """Names in the manifest that point at nothing, or at two things."""
    files = {entry.path for entry in manifest.files}
    for table, named in (("graphs", manifest.graphs), ("sites", manifest.sites)):
        yield from repeated_names(f"manifest.json [{table}]", (each.name for each in named))
    for graph in manifest.graphs:
        for table, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            yield from repeated_names(f"manifest.json [graphs.{graph.name}.{table}]", (spec.name for spec in specs))
    yield from repeated_names("manifest.json [plans]", manifest.plans.values())
    if unknown := sorted(set(manifest.unverified) - manifest.plans.keys()):
        yield f"manifest.json [unverified]: {unknown[0]!r} is not in plans; export again"
    for path in sorted({graph.package for graph in manifest.graphs} | set(manifest.plans.values())):
        if path not in files:
            yield f"manifest.json: {path!r} is used but not in files; export again"
    yield from repeated_names("manifest.json [sizes]", (size.name for size in manifest.sizes))
    yield from range_problems(manifest)
    if list(manifest.batches) != sorted({1, *manifest.batches}):
        yield f"manifest.json [batches]: expected different numbers from 1 on in order, got {list(manifest.batches)}; export again"
    sites = {site.name for site in manifest.sites}
    for graph in manifest.graphs:
        unknown = sorted({*graph.stores, *graph.combines} - sites)
        if unknown:
            yield f"manifest.json [graphs.{graph.name}]: site {unknown[0]!r} is not in sites; export again"
        else:
            yield from _slot_problems(graph, manifest)


def range_problems(manifest: Manifest) -> Iterator[str]:
    """A range without the default size or beside listed sizes, and dimensions that follow the size without a range, or are no whole
    numbers in it."""
    legal, default = manifest.range, (manifest.defaults.height, manifest.defaults.width)
    if legal and default not in legal:
        yield f"manifest.json [range]: has {legal}, and not the default size {default}; export again"
    if legal and manifest.sizes:
        yield "manifest.json [range]: stands beside sizes, and an artifact has either; export again"
    for graph in manifest.graphs:
        for table, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            for spec in specs:
                if problem := _axis_problem(spec, legal, default):
                    yield f"manifest.json [graphs.{graph.name}.{table}]: {spec.name!r} {problem}; export again"


def _axis_problem(spec: TensorSpec, legal: SizeRange | None, default: tuple[int, int]) -> str:
    """What is wrong with the dimensions of it that follow the size, or ""."""
    if not spec.axes:
        return ""
    if legal is None:
        return "follows the size, and the artifact has no range"
    if max(spec.axes) >= len(spec.shape):
        return f"follows the size in dimension {max(spec.axes)}, and has {len(spec.shape)}"
    try:
        for size in legal.corners:
            spec.at(*size)
        usual = spec.at(*default).shape
    except ValueError as e:
        return f"has a dimension that {str(e).splitlines()[-1] if isinstance(e, ValidationError) else e}"
    return "" if usual == spec.shape else f"is {list(spec.shape)}, and by its axes {list(usual)} at the default size"


def repeated_names(where: str, names: Iterable[str]) -> Iterator[str]:
    """The names that occur more than once."""
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{where}: {name!r} occurs {count} times; export again"


def _slot_problems(graph: Graph, manifest: Manifest) -> Iterator[str]:
    sites = {site.name: site for site in manifest.sites}
    wanted = sum(len(sites[name].tensors) * sites[name].slots for name in graph.combines)
    if wanted > len(graph.inputs):  # known before any of them is named: they may be many
        yield (
            f"manifest.json [graphs.{graph.name}]: combines need {wanted} inputs of stored tensors, it has {len(graph.inputs)} "
            "inputs in all; export again"
        )
        return
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
    sizes = {entry.name for entry in manifest.sizes}
    looked_at = 0
    for name, plan in plans.items():
        path = manifest.plans[name]
        looked_at += len(plan.evaluations) * (1 + len(plan.tails)) + sum(len(a.evaluations) for a in plan.areas)
        if looked_at > MAX_CHECKED_EVALUATIONS:
            yield f"{path}: the plans and their later starts have more than {MAX_CHECKED_EVALUATIONS} evaluations; export again"
            return
        yield from _plan_name_problems(name, plan, path)
        if plan.size and plan.size not in sizes:
            yield f"{path}: the plan {name!r} is for the size {plan.size}, which is not in sizes; export again"
            continue
        yield from _evaluation_problems(plan.evaluations, graphs, f"{path} [")
        if not plan.evaluations:
            yield f"{path}: has no evaluations; export again"
            continue
        yield from _step_problems(plan.evaluations, 0, plan.steps, path)
        yield from _area_problems(plan, manifest, graphs, path)
        yield from _tail_problems(plan, graphs, path)


def _tail_problems(plan: Plan, graphs: Mapping[str, Graph], path: str) -> Iterator[str]:
    """What stands in the way of the plan's later starts."""
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
            yield from _step_problems(evaluations, tail.step, plan.steps, f"{where}]")
            yield from _evaluation_problems(evaluations, graphs, f"{where}, ")


def _area_problems(plan: Plan, manifest: Manifest, graphs: Mapping[str, Graph], path: str) -> Iterator[str]:
    """Schedules of areas that are not those of the range, and what stands in the way of running them. Of those that differ in numbers
    alone one is looked at."""
    if not plan.areas:
        return
    named = sorted(schedule.area for schedule in plan.areas)
    usual = manifest.defaults.height * manifest.defaults.width
    wanted = sorted(manifest.range.areas - {usual}) if manifest.range else []
    if named != wanted:
        odd = next(iter(sorted(set(named) ^ set(wanted))), named[0])
        yield f"{path} [areas]: expected each area of the range once, besides the default size's; not so {odd}; export again"
        return
    seen = set()
    for schedule in plan.areas:
        where = f"{path} [area {schedule.area}]"
        form = (
            tuple(map(_evaluation_form, schedule.evaluations)),
            tuple((tail.step, tail.begin, tuple(map(_evaluation_form, tail.head))) for tail in schedule.tails),
        )
        if form in seen:
            continue
        seen.add(form)
        if not schedule.evaluations:
            yield f"{where}: has no evaluations; export again"
            continue
        there = plan.model_copy(update={"evaluations": schedule.evaluations, "tails": schedule.tails, "areas": ()})
        yield from _step_problems(there.evaluations, 0, plan.steps, where)
        yield from _evaluation_problems(there.evaluations, graphs, f"{where} [")
        yield from _tail_problems(there, graphs, where)


def _evaluation_form(evaluation: Evaluation) -> tuple[Any, ...]:
    """All of an evaluation that a check looks at: its numbers are bounded by their schema."""
    update = evaluation.update
    reach = len(update.latents), len(update.outputs), len(evaluation.coefficients)
    return evaluation.step, evaluation.variant, *reach, evaluation.marginal is None


def _plan_name_problems(name: str, plan: Plan, path: str) -> Iterator[str]:
    """A name says what is called by it: the number of steps, whether they go without the cache, and at which further size."""
    usual, uncached = (size_plan_name(kind, plan.size) for kind in (str(plan.steps), f"{plan.steps}-uncached"))
    if plan.name != name:
        yield f"{path}: is the plan {plan.name!r}, the manifest has it as {name!r}; export again"
    elif name not in (usual, uncached):
        yield f"{path}: the plan {name!r} has {plan.steps} steps; export again"
    elif name == uncached and plan.cache != "none":
        yield f"{path}: the plan {name!r} has the cache {plan.cache!r}; export again"


def _step_problems(evaluations: Sequence[Evaluation], first: int, steps: int, where: str) -> Iterator[str]:
    """The evaluations take every step from `first` to the last, in their order. PNDM begins a later start with the second
    evaluation of the step before it."""
    taken = [evaluation.step for evaluation in evaluations]
    begins = taken[0] == first or taken[0] == first - 1
    if not begins or taken[-1] != steps - 1 or any(b - a not in (0, 1) for a, b in pairwise(taken)):
        came = ", ".join(map(str, [*taken[:4], *(["..."] if len(taken) > 5 else []), *taken[4:][-1:]]))
        yield f"{where}: expected evaluations of the steps {first} to {steps - 1}, one after the other, got {came}; export again"


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
        wanted = next((spec.shape for spec in graph.inputs if spec.name == "coefficients"), (1, 0))
        if wanted != (1, len(evaluation.coefficients)):
            takes = wanted[1] if wanted[:1] == (1,) and len(wanted) == 2 else f"a shape of {list(wanted)}"
            yield f"{where}: has {len(evaluation.coefficients)} coefficients, variant {graph.name!r} takes {takes}; export again"
        stored.update(graph.stores)
