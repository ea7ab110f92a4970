"""Backends: a module each that opens what the module of the same name in `exporter/lower` has written.

The manifest's `backend_module` names it, and no other file knows it. What a module here has to offer is `Backend`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import ArtifactError
from ..extras import install_command
from ..storage.files import read_listed_file

if TYPE_CHECKING:
    import torch

    from ..manifest import Manifest, Requires

GraphModel = Callable[[Sequence["torch.Tensor"]], list["torch.Tensor"]]
"""A graph as machine code: flat inputs, which the caller has checked, to flat outputs."""


@dataclass(frozen=True)
class OpenContext:
    """What an artifact's graphs are opened from. `constants` are each graph's own, tensors on `device` that several graphs
    share and that outlive the models; `cache_dir` is where machine code may be kept, None = where it usually is. No more than
    `runners` threads call at once. Constants of the graphs in `later` have no memory yet: they are compared, and bound by
    the models' `bind` before each call, if they have moved (`offload.py`)."""

    folder: Path
    manifest: Manifest
    constants: Mapping[str, Mapping[str, torch.Tensor]]
    device: torch.device
    cache_dir: Path | None = None
    runners: int = 1
    deferred_graphs: Collection[str] = ()

    def code(self, path: str) -> bytes:
        """A listed file, read once: what was hashed is what is opened. Raises ArtifactError where it is another."""
        return read_listed_file(self.folder, self.manifest, path)


class Backend(Protocol):
    """A module may also have `REBINDS = True`: its models have a method `bind`, for constants whose address has changed; and
    `FORKABLE = True`: on the CPU its models run in a process that was forked after they were opened, in a thread that began there. Models may have `close`, which lets go
    of what they hold, and `unload`, which comes after it from another thread; those that have neither are let go of."""

    def problems(self, requires: Requires) -> Iterator[str]:
        """What this process lacks of what the code needs, a sentence each. Nothing of the artifact has been opened."""
        ...

    def package_problems(self, folder: Path, manifest: Manifest) -> Iterator[str]:
        """What can be found wrong with the files of `graphs/`, a sentence each, without opening their code. Every file has
        been compared with the manifest. Opening refuses the same."""
        ...

    def open_models(self, opening: OpenContext) -> Mapping[str, GraphModel]:
        """Every graph by name, ready to be called. Raises ArtifactError for files that are not what they should be."""
        ...


def backend_names() -> tuple[str, ...]:
    """The backends there are, sorted; found by their files, none of them imported."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def backend_module(name: str) -> Backend:
    """The module of that name. Raises ArtifactError where there is none, or where what it needs is not installed."""
    if name not in backend_names():
        raise ArtifactError(
            f"manifest.json [backend]: {name!r} is not one that this runtime opens: {', '.join(backend_names())}; "
            "install the prebake that wrote it, or export again with this one"
        )
    try:
        return cast(Backend, importlib.import_module(f".{name}", __name__))
    except ModuleNotFoundError as e:
        if e.name is None:
            raise
        raise ArtifactError(
            f"is for the backend {name!r}, which needs the package {e.name}, which is not installed; {install_command(e.name)}"
        ) from e


def refuse_unbound_constants(graph: str, wanted: Collection[str], given: Collection[str]) -> None:
    """Raises ArtifactError where a graph's code has constants that the manifest gives no tensor."""
    if missing := sorted(set(wanted) - set(given)):
        raise ArtifactError(
            f"graph {graph!r}: constant {missing[0]!r} is not bound ({len(missing)} in all); export again"
        )
