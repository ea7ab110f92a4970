"""Making: what a backend asks for each graph's machine code, which comes from the export cache where it is there.

In: graphs, and how to compile one. Out: files, the same as compiling gives, and for each graph a word on where its files came
from. Nothing that is wrong with a cache fails an export.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..lower import CodeFiles
from ..passes.captured_graph import CapturedGraph
from ..progress import Progress
from .fingerprint import describe_toolchain, graph_fingerprint
from .store import DamagedEntryError, Store

if TYPE_CHECKING:
    from ..prepared_export import PreparedExport

COMPILED, FROM_CACHE = "compiled", "from the cache"


@dataclass
class CompileOrReuse:
    """A `lower.GraphCompiler`: from the store, where there is one, else compiled. Which it was is told to `progress`."""

    progress: Progress
    store: Store | None = None
    tools: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, prepared: PreparedExport, store: Store | None, progress: Progress) -> CompileOrReuse:
        """One for the graphs of an export. Its model is shown by `prebake cache`, and is no part of a fingerprint."""
        if store is None:
            return cls(progress)
        recipe = prepared.recipe
        about = {"model": prepared.source.model, "backend": recipe.compile.backend}
        return cls(progress, store, describe_toolchain(recipe, prepared.backend), about)

    def __call__(
        self, component: str, graph: CapturedGraph, compiled: Callable[[CapturedGraph], CodeFiles]
    ) -> CodeFiles:
        title = f"{component}: {graph.name}" if component != graph.name else component
        key = graph_fingerprint(graph, self.tools, self.digests) if self.store else None
        if key and (files := self.fetch(key)):
            self.progress.announce(f"{title}, {FROM_CACHE}")
            self.progress.graphs[graph.name] = FROM_CACHE
            return files
        self.progress.announce(title)
        begun = time.perf_counter()
        files = compiled(graph)
        self.progress.graphs[graph.name] = COMPILED
        if key:
            self.put(key, files, {**self.about, "graph": graph.name, "seconds": round(time.perf_counter() - begun, 2)})
        return files

    def fetch(self, key: str) -> CodeFiles | None:
        assert self.store
        try:
            return self.store.get(key)
        except (DamagedEntryError, OSError) as e:
            self.progress.note(f"{self.store.path(key)}: cannot be used ({e}), so the graph is compiled anew")
            with suppress(OSError):
                self.store.remove(key)
        return None

    def put(self, key: str, files: CodeFiles, about: Mapping[str, Any]) -> None:
        assert self.store
        try:
            self.store.put(key, files, about)
        except OSError as e:
            self.progress.note(f"{self.store.folder}: nothing can be kept there ({e}); the next export compiles again")
            self.store = None

    def summary(self) -> str:
        """Which graphs were compiled, and which were not."""
        origins = self.progress.graphs
        groups = {origin: [n for n in origins if origins[n] == origin] for origin in (COMPILED, FROM_CACHE)}
        return "; ".join(f"{origin}: {', '.join(names)}" for origin, names in groups.items() if names)
