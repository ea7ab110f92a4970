"""Package: graphs, weights, plans, tokenizers and golden vectors become a folder, all of it or nothing.

Files are written into a hidden sibling of the output and renamed at the end, so that a killed export leaves no half
artifact. Each distinct tensor is stored once, whatever graphs read it and under whatever names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ...runtime.check.signature import SIGNATURE_FILE
from ...runtime.errors import ExportError, RequestError
from ...runtime.manifest import FileEntry, Manifest
from ...runtime.plan import Plan
from ...runtime.storage.files import file_hashes, open_files
from ...runtime.storage.rename import (
    make_readable,
    recover_artifact,
    rename_if_free,
    replace_folder,
    replacement_problem,
)
from ...runtime.storage.scratch import remove_abandoned, scratch_folder
from ..passes.captured_graph import CapturedGraph
from .disk import explain_disk_errors

PARTIAL_SUFFIX = ".partial"
UNLISTED_PATHS = ("manifest.json", "signature.json", "reports")
MAX_SHARD_BYTES = 4_999_000_000
"""Bytes of tensors in a weight file, which with its header has at most 5 GB; a tensor that has more has a file of its own."""


@contextlib.contextmanager
def stage_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its place on success and is removed on any failure; what an export
    that was killed has left is removed by the next one.

    Raises RequestError when `output` exists, unless `force`, which replaces an earlier artifact (and nothing else), or cannot
    be made, and ExportError when the disk is full or cannot be written.
    """
    output = output.absolute()
    with explain_disk_errors(output):
        prepare_output(output)
    if output.exists():
        if not force:
            raise RequestError(f"{output}: already exists; choose another --output, or replace it with --force")
        if problem := replacement_problem(output):
            raise RequestError(f"{output}: --force replaces artifacts only, and {problem}; choose another --output")
    with explain_disk_errors(output), scratch_folder(output.parent, f".{output.name}.", PARTIAL_SUFFIX) as folder:
        yield folder
        make_readable(folder, output if output.is_dir() and any(output.iterdir()) else None)
        if force:
            replace_folder(folder, output)
        elif not rename_if_free(folder, output):
            raise RequestError(
                f"{output}: already exists since this export began; choose another --output, or replace it with --force"
            )


def prepare_output(output: Path) -> None:
    """There is a folder to write into, and nothing in it that an export has left which was killed. Raises RequestError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RequestError(f"{output.parent}: cannot be made a folder ({e.strerror}); choose another --output") from e
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise RequestError(f"{output.parent}: cannot be written by this user; choose another --output")
    recover_artifact(output)
    remove_abandoned(output.parent, f".{output.name}.", PARTIAL_SUFFIX)


@dataclass(frozen=True)
class StoredWeights:
    """What was stored: graph name -> {constant name: key}, the keys whose tensors are stored as N H W C, and those of
    complex numbers, stored as [..., 2] of real and imaginary parts: safetensors has no complex128. `quantized` is of components
    with weights of 8 bits: their `QuantizedBytes`."""

    bound: dict[str, dict[str, str]]
    channels_last: tuple[str, ...]
    complex: tuple[str, ...] = ()
    quantized: Mapping[str, QuantizedBytes] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedBytes:
    """Of the tensors that are stored for a component: bytes of all, numbers of 8 bits among them, and bytes of their scales."""

    stored: int
    eight_bit: int
    scales: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> QuantizedBytes:
        """Scales are the floats that lie beside a weight of 8 bits, by their names, but for its bias."""
        eight_bit = {key: t for key, t in tensors.items() if t.dtype in (torch.int8, torch.float8_e4m3fn)}
        places = {key.rpartition(".")[0] for key in eight_bit}
        scales = [
            t
            for key, t in tensors.items()
            if key.rpartition(".")[0] in places
            and t.is_floating_point()
            and key not in eight_bit
            and ".bias" not in key
        ]
        return cls(
            stored=sum(t.nbytes for t in tensors.values()),
            eight_bit=sum(t.numel() for t in eight_bit.values()),
            scales=sum(t.nbytes for t in scales),
        )

    def count_unquantized_bytes(self, dtype: torch.dtype) -> int:
        """What they would take with the weights in `dtype`, and without scales."""
        return self.stored - self.scales + self.eight_bit * (dtype.itemsize - 1)


def write_weights(folder: Path, groups: Mapping[str, Sequence[CapturedGraph]]) -> StoredWeights:
    """Writes `weights/<component>.safetensors`, or its shards, each distinct tensor once: in the first component that reads it,
    under `<component>.<its name there>`."""
    stored: dict[str, str] = {}
    bound: dict[str, dict[str, str]] = {}
    permuted: list[str] = []
    pairs: list[str] = []
    quantized: dict[str, QuantizedBytes] = {}
    (folder / "weights").mkdir()
    for component, graphs in groups.items():
        fresh: dict[str, torch.Tensor] = {}
        for graph in graphs:
            names = bound.setdefault(graph.name, {})
            for name, tensor in sorted(graph.constants().items()):
                content = tensor_digest(tensor)
                if content not in stored:
                    stored[content] = unique_key(f"{component}.{name.removeprefix('denoiser.')}", fresh)
                    if tensor.is_complex():
                        pairs.append(stored[content])
                    fresh[stored[content]] = real_parts(to_memory_order(tensor.detach()))
                    if is_channels_last(tensor):
                        permuted.append(stored[content])
                names[name] = stored[content]
        if (told := QuantizedBytes.of(fresh)).eight_bit:
            quantized[component] = told
        save_shards(fresh, folder / "weights", component)
    return StoredWeights(bound, tuple(sorted(permuted)), tuple(sorted(pairs)), quantized)


def save_shards(tensors: Mapping[str, torch.Tensor], folder: Path, component: str) -> None:
    """Writes `<component>.safetensors`, or above `MAX_SHARD_BYTES` `<component>-00001-of-00002.safetensors` and so on: as diffusers and
    transformers name their weights, without the index that they have beside, which the manifest is."""
    pattern = f"{component}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=MAX_SHARD_BYTES)
    shards = split.filename_to_tensors or {pattern.format(suffix=""): []}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name)


def real_parts(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as [..., 2], real and imaginary; anything else as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is N H W C, and not also plain N C H W (as a 1x1 convolution's is)."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def to_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its dimensions in the order of its memory: compiled code reads constants by their strides."""
    if is_channels_last(tensor):
        return tensor.permute(0, 2, 3, 1)
    if not tensor.is_contiguous():
        raise ExportError(
            f"a constant of shape {tuple(tensor.shape)} has strides {tensor.stride()}, which safetensors cannot keep; this is a bug in a rewrite"
        )
    return tensor


def tensor_digest(tensor: torch.Tensor) -> str:
    """A hash of dtype, shape, strides and bytes."""
    data = to_memory_order(tensor.detach()).reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {hashlib.sha256(data.numpy().data).hexdigest()}"


def unique_key(key: str, taken: Mapping[str, torch.Tensor]) -> str:
    """`key`, or `key.1`, `key.2`, ...: folded values of two variants may share a name and not a value."""
    n = 0
    candidate = key
    while candidate in taken:
        n += 1
        candidate = f"{key}.{n}"
    return candidate


def plan_path(plan: Plan) -> str:
    return f"plans/{plan.name}.json"


def write_plans(folder: Path, plans: Sequence[Plan]) -> None:
    """One JSON file per plan, without the values that a reader assumes anyway; floats by `repr`, so that what is read is
    what was computed. A plan with a schedule for each area is written on one line."""
    (folder / "plans").mkdir(exist_ok=True)
    for plan in plans:
        indent = None if plan.areas else 1
        content = json.dumps(plan.model_dump(mode="json", exclude_defaults=True), indent=indent) + "\n"
        (folder / plan_path(plan)).write_text(content, "utf-8")


def write_tokenizers(folder: Path, tokenizers: Mapping[str, Any]) -> None:
    """`tokenizer.json` of each, which is all that the runtime's `tokenizers` library reads. Raises ExportError without one."""
    for path, tokenizer in tokenizers.items():
        if not getattr(tokenizer, "is_fast", False):
            raise ExportError(
                f"{path}: expected a fast tokenizer, got {type(tokenizer).__name__}; convert it with transformers first"
            )
        (folder / path).mkdir(parents=True)
        tokenizer.backend_tokenizer.save(str(folder / path / "tokenizer.json"))


def file_entries(folder: Path, known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
    """Path, size and sha256 of every file that the manifest answers for, sorted by path; those in `known` are not read."""
    known = known or {}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in UNLISTED_PATHS)
    names = [path.relative_to(folder).as_posix() for path in paths]
    with open_files(folder, [name for name in names if name not in known]) as files:
        sizes = {name: os.fstat(descriptor).st_size for name, descriptor in files.items()}
        hashes = file_hashes(files)
    return tuple(
        known[name] if name in known else FileEntry(path=name, size=sizes[name], sha256=hashes[name]) for name in names
    )


# --- changing an artifact ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stage_linked_copy(folder: Path) -> Iterator[Path]:
    """A copy of the artifact whose files are links to its own, which takes its place on success.

    What is to change in it must be unlinked first. A run that is killed leaves the artifact as it was.
    """
    with stage_folder(folder, force=True) as fresh:
        shutil.copytree(folder, fresh, copy_function=link_or_copy, dirs_exist_ok=True)
        yield fresh


def link_or_copy(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def update_manifest(folder: Path, manifest: Manifest, known: Manifest) -> Manifest:
    """The manifest with the folder's files, written. Weights and graphs are as in `known`, and not read again. A signature of
    what was there before is taken out: it would hold for nobody."""
    (folder / SIGNATURE_FILE).unlink(missing_ok=True)
    same = {e.path: e for e in known.files if e.path.startswith(("weights/", "graphs/"))}
    manifest = manifest.model_copy(update={"files": file_entries(folder, same)})
    target = folder / "manifest.json"
    target.unlink(missing_ok=True)
    target.write_text(manifest.to_json(), "utf-8")
    return manifest
