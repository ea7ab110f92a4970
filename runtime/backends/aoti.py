"""AOTInductor's packages: what is in them, and their models, opened and bound.

A path to an unpacked `.so` comes in, a `NativeModel` comes out. The stock loader (`torch._inductor.aoti_load_package`)
unzips into a temporary folder and runs the C++ compiler hundreds of times to print an advisory; the container runner
used here only calls dlopen. What the stock runner leaves to chance is refused here: running before the constants are
bound is a segmentation fault there, an ArtifactError here. It says what is in a library; `container.py` runs it, and every
call into AOTInductor's private API is in `private_torch.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import ArtifactError, first_line, raise_problems
from ..gpu.capability import capability_problems, cuda_of_driver, driver_problems
from ..manifest import Manifest, Requires
from ..native.container import (
    CONSTANT_ALIGNMENT_BYTES,
    CompiledConstant,
    Container,
    empty_tensors,
    open_container,
    show_tensors,
)
from ..native.libraries import library_problems
from ..private_torch import ModelRunner, open_cpu_runner, open_cuda_runner
from ..storage.files import read_listed_file
from ..storage.unpack import read_members, unpack_members
from . import OpenContext, refuse_unbound_constants

REBINDS = True
FORKABLE = True


def problems(requires: Requires) -> Iterator[str]:
    """On the CPU none: torch's version, which is all that this needs, is compared for every backend. Where there is a GPU, its
    kind and its driver."""
    if requires.device == "cuda" and torch.cuda.is_available():
        yield from driver_problems(requires.packages, cuda_of_driver())
        yield from capability_problems(requires.packages, torch.cuda.get_device_capability())


def open_models(opening: OpenContext) -> dict[str, NativeModel]:
    """Every graph by name, its constants bound, or compared where that is for later. From its second half on, the artifact's
    code runs."""
    models: dict[str, NativeModel] = {}
    for package, wanted in models_by_package(opening.manifest).items():
        models.update(open_package(opening, package, wanted))
    for graph in opening.manifest.graphs:
        models[graph.name].check_counts(len(graph.inputs), len(graph.outputs))
        taken = models[graph.name].check if graph.name in opening.deferred_graphs else models[graph.name].bind
        taken(opening.constants[graph.name])
    return models


def open_package(opening: OpenContext, package: str, wanted: list[str]) -> dict[str, NativeModel]:
    """The models of one `.pt2`, opened."""
    data = opening.code(package)
    sha256 = next(entry.sha256 for entry in opening.manifest.files if entry.path == package)
    members = read_members(f"{opening.folder / package}", data)
    raise_problems(opening.folder, member_problems(package, members, wanted))
    with unpack_members(members, sha256, opening.cache_dir) as libraries:
        return {name: open_model(so, opening.device, opening.runners) for name, so in libraries.items()}


def package_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with packages whose files are right, or what their libraries need and this machine lacks."""
    for package, wanted in models_by_package(manifest).items():
        try:
            members = read_members(package, read_listed_file(folder, manifest, package))
        except ArtifactError as e:
            yield str(e).removeprefix(f"{folder}: ")
        else:
            yield from member_problems(package, members, wanted)


def models_by_package(manifest: Manifest) -> dict[str, list[str]]:
    """Path of a package -> the models that the manifest names for it."""
    names: dict[str, list[str]] = {}
    for graph in manifest.graphs:
        names.setdefault(graph.package, []).append(graph.name)
    return names


def member_problems(package: str, members: Mapping[str, Mapping[str, bytes]], wanted: Sequence[str]) -> Iterator[str]:
    if sorted(members) != sorted(wanted):
        yield (
            f"{package}: the manifest names the models {', '.join(sorted(wanted))}, "
            f"the package has {', '.join(sorted(members)) or 'none'}; export again"
        )
    for model, files in members.items():
        for name, content in files.items():
            if name.endswith(".so"):
                yield from library_problems(f"{package}, {model}/{name}", content)


def open_model(so: Path, device: torch.device, runners: int = 1) -> NativeModel:
    """The compiled model in `so`, opened but not yet callable: `bind` its constants first. `runners` calls may be in it at once.

    This maps and runs machine code. Raises ArtifactError when the file cannot be opened as an AOTInductor model.
    """
    try:
        if container := open_container(so.parent.name, so, runners, device):
            return NativeModel(so.parent.name, container)
        # One instance: its `run` holds Python's lock, so a second one would never be used.
        return NativeModel(
            so.parent.name, open_cuda_runner(so, device) if device.type == "cuda" else open_cpu_runner(so)
        )
    except RuntimeError as e:
        raise ArtifactError(
            f"{so}: expected a model compiled by AOTInductor, but {first_line(e)}; {_open_failure_way_out(so, e)}"
        ) from e


def _open_failure_way_out(so: Path, error: RuntimeError) -> str:
    """The linker says the same of a disk that allows no execution and of memory that ran out. Raises MemoryError for the latter."""
    if os.statvfs(so).f_flag & os.ST_NOEXEC:
        return "its disk allows no execution, so give load() a cache_dir on one that does"
    if "failed to map segment" in str(error) or "cannot map zero-fill pages" in str(error):
        raise MemoryError(str(error)) from error
    return "export again with this torch"


class NativeModel:
    """A model's machine code. `constants` are the names that `bind` wants; call it with flat tensors after that."""

    def __init__(self, name: str, code: Container | ModelRunner):
        self.name = name
        self._container = code if isinstance(code, Container) else None
        self._runner = None if isinstance(code, Container) else code
        self._compiled = code.constants() if isinstance(code, Container) else constants_of_runner(code)
        self._bound = not self._compiled
        self._shown: dict[str, torch.Tensor] = {}

    @property
    def constants(self) -> frozenset[str]:
        return frozenset(self._compiled)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points every constant at the caller's tensor; nothing is copied, so many models can share one tensor.

        Until `close` they are held. Raises ArtifactError unless `tensors` has exactly the
        model's constants, with the dtypes and the numbers of bytes that it was compiled for.
        """
        self.check(tensors)
        by_internal_name = {self._compiled[fqn].name: tensor for fqn, tensor in tensors.items()}
        if self._container:
            self._container.bind(by_internal_name)
        elif self._runner:
            # torch keeps what it is given for ever, so it is given tensors that can be emptied
            emptied = show_tensors(self._shown, by_internal_name)
            self._runner.update_constant_buffer(self._shown, False, True, user_managed=True)
            empty_tensors(emptied)
        self._bound = True

    def close(self) -> None:
        """Lets go of constants. Nobody is inside, and nobody comes after it."""
        self._runner = None
        if self._container:
            self._container.close()
        empty_tensors(self._shown.values())

    def unload(self) -> None:
        """Lets go of the code, from another thread than `close`."""
        if self._container:
            self._container.unload()

    def check_counts(self, inputs: int, outputs: int) -> None:
        """Raises ArtifactError unless the model has so many of each: code reads as many pointers as it was compiled for."""
        if self._container and (self._container.inputs, self._container.outputs) != (inputs, outputs):
            raise ArtifactError(
                f"graph {self.name!r}: was compiled for {self._container.inputs} inputs and {self._container.outputs} outputs, "
                f"the manifest has {inputs} and {outputs}; export again"
            )

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's outputs, freshly allocated. The caller has checked the inputs: nothing below this line does."""
        if not self._bound:
            raise ArtifactError(f"graph {self.name!r}: called before its {len(self._compiled)} constants were bound")
        if self._container:
            return self._container.run(inputs)
        assert self._runner
        return self._runner.run(list(inputs))

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ArtifactError for what `bind` would not take. Their memory is not looked at."""
        refuse_unbound_constants(self.name, self.constants, tensors)
        if unknown := sorted(tensors.keys() - self.constants):
            raise ArtifactError(
                f"graph {self.name!r}: has no constant {unknown[0]!r} ({len(unknown)} in all); export again"
            )
        for fqn, tensor in tensors.items():
            compiled = self._compiled[fqn]
            if _DTYPE_CODES.get(tensor.dtype) not in (None, compiled.dtype):
                raise ArtifactError(
                    f"graph {self.name!r}: constant {fqn!r} was compiled for {_dtype_of_code(compiled.dtype)}, "
                    f"the weight file holds {tensor.dtype}; export again"
                )
            aligned = -(-tensor.nbytes // CONSTANT_ALIGNMENT_BYTES) * CONSTANT_ALIGNMENT_BYTES
            if compiled.nbytes not in (None, tensor.nbytes, aligned):
                raise ArtifactError(
                    f"graph {self.name!r}: constant {fqn!r} was compiled for {compiled.nbytes} bytes (to the next {CONSTANT_ALIGNMENT_BYTES}), "
                    f"the weight file holds {tensor.nbytes} in the shape {list(tensor.shape)}; export again"
                )


def constants_of_runner(runner: ModelRunner) -> dict[str, CompiledConstant]:
    """Constant, by its name in the model -> what the code was compiled for."""
    codes = runner.get_constant_names_to_dtypes()
    return {
        fqn: CompiledConstant(name, codes[name], None)
        for name, fqn in runner.get_constant_names_to_original_fqns().items()
    }


# c10::ScalarType, which is part of torch's serialization format and does not change.
_DTYPE_CODES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}


def _dtype_of_code(code: int) -> str:
    return next((str(dtype) for dtype, c in _DTYPE_CODES.items() if c == code), f"dtype {code}")
