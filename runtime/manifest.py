"""The manifest: everything about an artifact that can be known without opening its native code.

`manifest.json` comes in, a frozen `Manifest` comes out; `check.py` then compares it with the folder and this machine.
The reader owns the format, so the exporter imports these types and writes `to_json`. `artifacts/README.md` is the
specification in words. Nothing here depends on the clock, the machine's paths or set order: the same recipe, weights
and toolchain give the same bytes. Measured times therefore live in `reports/`, never here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from .errors import ArtifactError, describe_read_error, describe_schema_error
from .hub.address import pull_command
from .plan import FROZEN_CONFIG

SCHEMA_VERSION = 1


class TensorSpec(BaseModel):
    """One input or output of a graph: contiguous, on the manifest's device. `dtype` is torch's name, e.g. `bfloat16`."""

    model_config = FROZEN_CONFIG
    name: str
    shape: tuple[int, ...]
    dtype: str


class Cost(BaseModel):
    """Counted on the pruned graph: 2 FLOPs per multiply-add, ATen calls, and bytes of the constants it reads.

    `flops_by_class` splits the FLOPs by operator and dtype (`matmul int8`, `attention float32`); `moved_bytes` is what all
    other operators read from memory and write to it.
    """

    model_config = FROZEN_CONFIG
    flops: int
    flops_by_class: dict[str, int] = {}
    moved_bytes: int = 0
    ops: int
    constants: int
    constants_bytes: int


class Site(BaseModel):
    """A value inside the denoiser that outlives a step: `slots` generations of each of its tensors are kept.

    `tensors` are the names of the graph outputs that hold fresh values; slot k of tensor t enters a graph as `t@k`,
    k = 0 the newest.
    """

    model_config = FROZEN_CONFIG
    name: str
    slots: int = Field(ge=1)
    tensors: tuple[str, ...]


class KernelRefusal(BaseModel):
    """Why a kernel does not take `places` places of a graph that it is for: `first` is the module that the first of them
    lies in."""

    model_config = FROZEN_CONFIG
    kernel: str
    reason: str
    places: int = Field(ge=1)
    first: str


class Graph(BaseModel):
    """One compiled graph: a model inside a package, its call contract and the stored tensors bound to its constants.

    Inputs and outputs are flat and ordered. `stores` and `combines` name sites (denoiser variants only). `constants`
    maps the graph's own constant names to keys of the weight files. `kernels` is how often it calls which of prebake's own
    kernels, and `refusals` why it does not where it could.
    """

    model_config = FROZEN_CONFIG
    name: str
    package: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stores: tuple[str, ...] = ()
    combines: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    constants: dict[str, str]
    cost: Cost
    kernels: dict[str, int] = {}
    refusals: tuple[KernelRefusal, ...] = ()


class FileEntry(BaseModel):
    model_config = FROZEN_CONFIG
    path: str
    size: int
    sha256: str


class Source(BaseModel):
    """Where the weights came from: the id or folder name as given, the pipeline class, and a hash over its files."""

    model_config = FROZEN_CONFIG
    model: str
    pipeline: str
    sha256: str


class Requires(BaseModel):
    """What this artifact's native code needs of a machine. `torch` is `major.minor`, or None where any will do:
    AOTInductor's C ABI is not kept across minor versions. `packages` are what the backend needs besides, libraries, drivers
    and GPUs, with their versions, which the backend compares. `isa` are /proc/cpuinfo flags."""

    model_config = FROZEN_CONFIG
    system: str
    machine: str
    device: Literal["cpu", "cuda"]
    isa_level: str
    isa: tuple[str, ...]
    torch: str | None = None
    glibc: str | None = None
    packages: dict[str, str] = {}


class Defaults(BaseModel):
    """What a call uses where the caller is silent. `num_frames` is None of models that make pictures."""

    model_config = FROZEN_CONFIG
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int | None = None


class Manifest(BaseModel):
    """`backend` is the module of `runtime/backends` that opens the graphs. `reproducible`: whether its code would be the same
    bytes again, which it is not where kernels were chosen by their times. `unverified` are plans that were added after `status` was settled, and that nobody has compared with the pipeline.
    `layers` says of each Linear of the denoiser, and of convolutions if they were asked for, whether it is "int8" or "kept", and why. `channels_last` are the keys
    of stored tensors that lie in memory as N H W C; they are bound as N C H W views of it. `complex` are
    those of stored [..., 2] of real and imaginary parts, bound as complex numbers."""

    model_config = FROZEN_CONFIG
    schema_version: Literal[1] = SCHEMA_VERSION
    status: Literal["unverified", "verified", "failed"] = "unverified"
    unverified: tuple[str, ...] = ()
    family: str
    backend: str = Field(default="aoti", pattern=r"^[a-z][a-z0-9_]*$")
    reproducible: bool = True
    requires: Requires
    source: Source
    toolchain: dict[str, str]
    recipe: dict[str, Any]
    defaults: Defaults
    pipeline: dict[str, Any]
    layers: dict[str, tuple[str, str]] = {}
    channels_last: tuple[str, ...] = ()
    complex: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    graphs: tuple[Graph, ...]
    plans: dict[str, str]
    files: tuple[FileEntry, ...]

    @property
    def standing(self) -> str:
        """`status`, and the plans that it says nothing of."""
        if not self.unverified or self.status == "unverified":
            return self.status
        plans = "plan" if len(self.unverified) == 1 else "plans"
        return f"{self.status}, {plans} {', '.join(self.unverified)} never compared"

    def graph(self, name: str) -> Graph:
        """The graph of that name; raises ArtifactError naming those that exist."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise ArtifactError(f"graph {name!r} is not in the artifact; it has {', '.join(g.name for g in self.graphs)}")

    def to_json(self) -> str:
        """The exact bytes of `manifest.json`: sorted keys, two spaces, a final newline."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest. Raises ArtifactError when it is missing, not JSON, of another version, or not to schema."""
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise ArtifactError(f"{folder}: {_describe_unreadable_manifest(folder, e)}") from e
    except (ValueError, RecursionError) as e:
        came = e if path.stat().st_size else "the file is empty"
        raise ArtifactError(f"{path}: expected JSON, but {came}; restore the file or export again") from e
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} [schema_version]: this runtime reads version {SCHEMA_VERSION}, the file says {version!r}; "
            "export again with this prebake, or install the one that wrote it"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as e:
        raise ArtifactError(f"{describe_schema_error(path, e)}; restore the file or export again") from e


def _describe_unreadable_manifest(folder: Path, error: OSError) -> str:
    """What is in the way of reading the folder's manifest."""
    if isinstance(error, PermissionError):
        return f"manifest.json: {describe_read_error(error, folder)}"
    if not folder.exists() and (command := pull_command(folder)):
        return f"expected an artifact's folder on this machine; fetch one with `{command}`, and open that"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        return f"expected an artifact folder, found {found}; make one with `prebake export`"
    if isinstance(error, FileNotFoundError):
        inside = next((path.parent for path in sorted(folder.glob("*/manifest.json"))), None)
        way_out = f"there is one in {inside}" if inside else "make one with `prebake export`"
        return f"expected manifest.json in an artifact folder, found none; {way_out}"
    if isinstance(error, IsADirectoryError):
        return "manifest.json is a folder; restore the file or export again"
    return f"manifest.json: {describe_read_error(error, folder)}"


ATTACH_FAMILY = "attach"
"""The manifest's `family` of an artifact that holds a denoiser alone."""
