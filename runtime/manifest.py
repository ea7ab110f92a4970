"""The manifest: everything about an artifact that can be known without opening its native code.

`manifest.json` comes in, a frozen `Manifest` comes out; `check.py` then compares it with the folder and this machine.
The reader owns the format, so the exporter imports these types and writes `to_json`. `artifacts/README.md` is the
specification in words. Nothing here depends on the clock, the machine's paths or set order: the same recipe, weights
and toolchain give the same bytes. Measured times therefore live in `reports/`, never here.
"""

from __future__ import annotations

import errno
import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from .bounds import (
    MAX_BATCH,
    MAX_ITEMS,
    MAX_MANIFEST_BYTES,
    Bytes,
    Count,
    Float32,
    Name,
    Names,
    Pixels,
    Sha256,
    Shape,
    Steps,
    parse_json,
)
from .errors import ArtifactError, describe_read_error, describe_schema_error
from .hub.address import describe_links, pull_command
from .plan import FROZEN_CONFIG
from .sizes.dimension import DimensionText, parse_dimension
from .sizes.size_range import SizeRange
from .storage.files import read_plain_file

SCHEMA_VERSION = 2
PROLOGUE, STEP = "prologue", "step"
"""The graphs that run before the loop, and before a colon the values that they pass to it: `prologue:0`."""
MANIFEST_FILE = "manifest.json"
UNSAID_DEFAULTS = ("batches", "range", "release", "sizes", "unquantized_bytes", "verification")
"""Fields that are not written where they have their default."""
Listed = Field(max_length=MAX_ITEMS, fail_fast=True)
"""Of a list."""
Mapped = Field(max_length=MAX_ITEMS)
"""Of an object."""


Batches = Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...], Field(min_length=1, max_length=MAX_BATCH)]


class TensorSpec(BaseModel):
    """One input or output of a graph: contiguous, on the manifest's device. `dtype` is torch's name, e.g. `bfloat16`. `shape` is at
    the default size; in an artifact of a range `axes` says what those of its dimensions are that follow the size, by number."""

    model_config = FROZEN_CONFIG
    name: Name
    shape: Shape
    dtype: Name
    axes: Annotated[dict[Annotated[int, Field(ge=0, lt=8)], DimensionText], Mapped] = {}

    @model_serializer(mode="wrap")
    def _leave_out_no_axes(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said = write(self)
        if not self.axes:
            del said["axes"]
        return said

    def at(self, height: int, width: int) -> TensorSpec:
        """The tensor at that size. Raises ValueError where a dimension is no whole number there."""
        if not self.axes:
            return self
        shape = list(self.shape)
        for axis, dimension in self.axes.items():
            shape[axis] = parse_dimension(dimension).at(height, width)
        return TensorSpec(name=self.name, shape=tuple(shape), dtype=self.dtype)


class Cost(BaseModel):
    """Counted on the pruned graph: 2 FLOPs per multiply-add, ATen calls, and bytes of the constants it reads.

    `flops_by_class` splits the FLOPs by operator and dtype (`matmul int8`, `attention float32`); `moved_bytes` is what all
    other operators read from memory and write to it.
    """

    model_config = FROZEN_CONFIG
    flops: Count
    flops_by_class: Annotated[dict[Name, Count], Mapped] = {}
    moved_bytes: Count = 0
    ops: Count
    constants: Count
    constants_bytes: Count


class Site(BaseModel):
    """A value inside the denoiser that outlives a step: `slots` generations of each of its tensors are kept.

    `tensors` are the names of the graph outputs that hold fresh values; slot k of tensor t enters a graph as `t@k`,
    k = 0 the newest.
    """

    model_config = FROZEN_CONFIG
    name: Name
    slots: int = Field(ge=1, le=1024)
    tensors: Names


class SizeEntry(BaseModel):
    """A further size in pixels that a call may ask for. Its graphs end in `.<width>x<height>` and its plans in
    `@<width>x<height>`; `pipeline` has what of the manifest's table of that name is another there."""

    model_config = FROZEN_CONFIG
    height: Pixels
    width: Pixels
    pipeline: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """`832x1216`: width and height, as the names of graphs and plans have them."""
        return f"{self.width}x{self.height}"


class LegalSizes(SizeRange):
    """The sizes of an artifact of a range. `latents_shape` is that of one image's noise, by the size."""

    latents_shape: Annotated[tuple[Pixels | DimensionText, ...], Field(min_length=3, max_length=3)]

    def latents_at(self, height: int, width: int) -> tuple[int, ...]:
        """`latents_shape` at that size. Raises ValueError where a dimension is no whole number there."""
        return tuple(n if isinstance(n, int) else parse_dimension(n).at(height, width) for n in self.latents_shape)


class KernelRefusal(BaseModel):
    """Why a kernel does not take `places` places of a graph that it is for: `first` is the module that the first of them
    lies in."""

    model_config = FROZEN_CONFIG
    kernel: Name
    reason: Name
    places: int = Field(ge=1, le=1 << 31)
    first: Name


class Graph(BaseModel):
    """One compiled graph: a model inside a package, its call contract and the stored tensors bound to its constants.

    Inputs and outputs are flat and ordered. `stores` and `combines` name sites (denoiser variants only). `constants`
    maps the graph's own constant names to keys of the weight files. `kernels` is how often it calls which of prebake's own
    kernels, and `refusals` why it does not where it could.
    """

    model_config = FROZEN_CONFIG
    name: Name
    package: Name
    inputs: Annotated[tuple[TensorSpec, ...], Listed]
    outputs: Annotated[tuple[TensorSpec, ...], Listed]
    stores: Names = ()
    combines: Names = ()
    zeros: Names = ()
    identities: Names = ()
    constants: Annotated[dict[Name, Name], Mapped]
    cost: Cost
    kernels: Annotated[dict[Name, Count], Mapped] = {}
    refusals: Annotated[tuple[KernelRefusal, ...], Listed] = ()

    def at(self, height: int, width: int) -> Graph:
        """The graph with its inputs and outputs at that size."""
        if not any(spec.axes for spec in (*self.inputs, *self.outputs)):
            return self
        inputs, outputs = (tuple(spec.at(height, width) for spec in specs) for specs in (self.inputs, self.outputs))
        return self.model_copy(update={"inputs": inputs, "outputs": outputs})

    @property
    def hoisted(self) -> tuple[str, ...]:
        """Its inputs that graphs before the loop compute."""
        passed = (f"{PROLOGUE}:", f"{STEP}:")
        return tuple(s.name for s in self.inputs if s.name.startswith(passed) and "@" not in s.name)


class FileEntry(BaseModel):
    model_config = FROZEN_CONFIG
    path: Name
    size: Bytes
    sha256: Sha256


class SourceLora(BaseModel):
    """A LoRA that was added to the weights: its name as given, what it was multiplied with, and its file's hash."""

    model_config = FROZEN_CONFIG
    name: Name
    scale: Float32
    sha256: Name


class SourceInversion(BaseModel):
    """A textual inversion that was added: its name as given, the token that stands for it, and its file's hash."""

    model_config = FROZEN_CONFIG
    name: Name
    token: Name
    sha256: Name


class Source(BaseModel):
    """Where the weights came from: the id or folder name as given, the pipeline class, a hash over its files, and the LoRAs and textual
    inversions that were added."""

    model_config = FROZEN_CONFIG
    model: Name
    pipeline: Name
    sha256: Name
    loras: Annotated[tuple[SourceLora, ...], Field(max_length=MAX_ITEMS)] = ()
    inversions: Annotated[tuple[SourceInversion, ...], Field(max_length=MAX_ITEMS)] = ()

    @property
    def title(self) -> str:
        """The model, its LoRAs and its further tokens: `shapes + style.safetensors:0.8 + <cat>`."""
        loras = (f"{lora.name}:{lora.scale:g}" for lora in self.loras)
        return " + ".join((self.model, *loras, *(inversion.token for inversion in self.inversions)))


class Requires(BaseModel):
    """What this artifact's native code needs of a machine. `torch` is `major.minor`, or None where any will do:
    AOTInductor's C ABI is not kept across minor versions. `packages` are what the backend needs besides, libraries, drivers
    and GPUs, with their versions, which the backend compares. `isa` are /proc/cpuinfo flags."""

    model_config = FROZEN_CONFIG
    system: Name
    machine: Name
    device: Literal["cpu", "cuda"]
    isa_level: Name
    isa: Names
    torch: Name | None = None
    glibc: Name | None = None
    packages: Annotated[dict[Name, Name], Mapped] = {}


class Defaults(BaseModel):
    """What a call uses where the caller is silent. `num_frames` is None of models that make pictures."""

    model_config = FROZEN_CONFIG
    num_inference_steps: Steps
    guidance_scale: Float32
    height: Pixels
    width: Pixels
    num_frames: Pixels | None = None


Compared = tuple[Count, Count]
"""How many were compared, and how many the recipe asks for."""


class Verification(BaseModel):
    """What a status rests on: how many pictures, evaluations at equal inputs and checked prompts were compared with eager's
    within the recipe's `budget`, and of each plan the mean PSNR in dB with the ends of its 95 % confidence interval, where
    two pictures or more were drawn. Where the budget left things out, the numbers depend on the machine's speed."""

    model_config = FROZEN_CONFIG
    budget: Name
    pictures: Compared
    evaluations: Compared
    checked_prompts: Compared
    psnr_db: Annotated[dict[Name, tuple[Float32, Float32, Float32]], Mapped] = {}

    def describe(self) -> str:
        """`16 of 16 pictures, 112 of 112 evaluations`."""
        counted = {"pictures": self.pictures, "evaluations": self.evaluations, "checked prompts": self.checked_prompts}
        return ", ".join(f"{made} of {asked} {what}" for what, (made, asked) in counted.items() if asked)


class Manifest(BaseModel):
    """`backend` is the module of `runtime/backends` that opens the graphs. `reproducible`: whether its code would be the same
    bytes again, which it is not where kernels were chosen by their times. `unverified` are plans that were added after `status` was settled, and that nobody has compared with the pipeline;
    `verification` is what `status` rests on, not written where there is none.
    `layers` says of each Linear of the denoiser, and of convolutions if they were asked for, whether it is "int8" or "kept", and why;
    so of each layer of a text encoder or the VAE, under its component's name, where the recipe quantizes them ("int8 weights": the
    weights alone). `unquantized_bytes` is what the weight files of a component would hold if nothing in it were quantized, of those
    where something is; it is not written where nothing is. `channels_last` are the keys
    of stored tensors that lie in memory as N H W C; they are bound as N C H W views of it. `complex` are
    those of stored [..., 2] of real and imaginary parts, bound as complex numbers. `sizes` are those besides the default one, or `range`
    has them, all by the same graphs; `batches` are the numbers of pictures that may go through the loop together, 1 first: a denoiser's graph for B ends in `.b<B>`, and
    where there is none, that for one is called for each. `release` is what its signer counts up, so
    that an older one can be told from it; 0, which is not written, is none."""

    model_config = FROZEN_CONFIG
    schema_version: Literal[2] = SCHEMA_VERSION
    release: Count = 0
    status: Literal["unverified", "verified", "failed"] = "unverified"
    unverified: Names = ()
    verification: Verification | None = None
    family: Name
    backend: str = Field(default="aoti", pattern=r"^[a-z][a-z0-9_]*$")
    reproducible: bool = True
    requires: Requires
    source: Source
    toolchain: Annotated[dict[Name, Name], Mapped]
    recipe: dict[str, Any]
    defaults: Defaults
    pipeline: dict[str, Any]
    sizes: Annotated[tuple[SizeEntry, ...], Listed] = ()
    range: LegalSizes | None = None
    batches: Batches = (1,)
    layers: Annotated[dict[Name, tuple[Name, Name]], Mapped] = {}
    unquantized_bytes: Annotated[dict[Name, Bytes], Mapped] = {}
    channels_last: Names = ()
    complex: Names = ()
    sites: Annotated[tuple[Site, ...], Listed] = ()
    graphs: Annotated[tuple[Graph, ...], Listed]
    plans: Annotated[dict[Name, Name], Mapped]
    files: Annotated[tuple[FileEntry, ...], Listed]

    @property
    def status_line(self) -> str:
        """`status`, and the plans that it says nothing of."""
        if not self.unverified or self.status == "unverified":
            return self.status
        plans = "plan" if len(self.unverified) == 1 else "plans"
        return f"{self.status}, {plans} {', '.join(self.unverified)} never compared"

    @property
    def whole_graphs(self) -> frozenset[str]:
        """The names of graphs in which every site computes."""
        return frozenset(g.name for g in self.graphs if not (g.combines or g.zeros or g.identities))

    def graph(self, name: str) -> Graph:
        """The graph of that name; raises ArtifactError naming those that exist."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise ArtifactError(f"graph {name!r} is not in the artifact; it has {', '.join(g.name for g in self.graphs)}")

    def to_json(self) -> str:
        """The exact bytes of `manifest.json`: sorted keys, two spaces, a final newline."""
        unsaid = {name for name in UNSAID_DEFAULTS if getattr(self, name) == Manifest.model_fields[name].get_default()}
        said = self.model_dump(mode="json", exclude=unsaid)
        return json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def size_graph_name(graph: str, size: str | None) -> str:
    """The graph that does the same for a further size of that name, None for the default size."""
    return f"{graph}.{size}" if size else graph


def batch_graph_name(graph: str, batch: int) -> str:
    """The graph that does the same for that many pictures at once."""
    return f"{graph}.b{batch}" if batch > 1 else graph


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest. Raises ArtifactError when it is missing, no plain file, not JSON, too large, too deep, of another
    version, or not to schema."""
    path = folder / MANIFEST_FILE
    try:
        content = read_plain_file(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES + 1)
    except OSError as e:
        raise ArtifactError(f"{folder}: {_describe_unreadable_manifest(folder, e)}") from e
    if len(content) > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{path}: has more than {MAX_MANIFEST_BYTES} bytes, which no manifest needs; restore the file or export again"
        )
    try:
        raw = parse_json(content)
    except ValueError as e:
        came = e if content else "the file is empty"
        raise ArtifactError(f"{path}: expected JSON, but {came}; restore the file or export again") from e
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} [schema_version]: this runtime reads version {SCHEMA_VERSION}, the file says {version!r:.100}; "
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
    if error.errno == errno.ELOOP:
        return describe_links(folder, sum(path.is_symlink() for path in islice(folder.rglob("*"), MAX_ITEMS)))
    if error.errno == errno.EINVAL:
        return "manifest.json is not a plain file; restore the file or export again"
    return f"manifest.json: {describe_read_error(error, folder)}"


ATTACH_FAMILY = "attach"
"""The manifest's `family` of an artifact that holds a denoiser alone."""
