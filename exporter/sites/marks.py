"""Marks: which values inside the denoiser may outlive a step, and what a variant does with each. Names, no tensors.

`caches/` chooses marks and actions, `sites.py` carries them out in the model. Tensor names (`site:0`, slot `site:0@1`)
agree with `runtime/manifest.py` and `runtime/replay.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Action = Literal["compute", "combine", "pass", "zero", "identity"]
"""`compute` stores what the site gives; `pass` lets it run and stores nothing, since what it is given is a prediction."""

REST_STREAM = "..."
"""As the last of a mark's streams: the outputs from here on, however many, are passed on as they are and never kept."""


@dataclass(frozen=True)
class Mark:
    """A site: the output of one module, or, if `residual`, what a run of blocks adds to its input.

    `modules` are the paths of the modules whose work the site stands for, in the order in which they run. `streams` names,
    output by output, the forward argument that a module's output continues (FLUX blocks return
    `(encoder_hidden_states, hidden_states)`), "" for an output that is None; it is what IDENTITY passes on and what a
    residual is taken against.

    `slots` generations are kept of the outputs in `stored_streams` (None: all), the ones that some variant reads. A generation is
    what was computed; if `emitted`, what was combined is a generation too. `dtype` is what slots are stored in (None: as
    computed). `part` "scores" stands for the attention weights inside the module: their only action is IDENTITY, by
    which every token attends to itself.
    """

    name: str
    modules: tuple[str, ...]
    streams: tuple[str, ...]
    residual: bool = False
    slots: int = 1
    stored_streams: Annotated[tuple[int, ...] | None, Field(alias="kept")] = None  # `kept` in replan.json
    emitted: bool = False
    dtype: str | None = None
    part: Literal["output", "scores"] = "output"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The values to store, by graph output name."""
        every = (i for i, stream in enumerate(self.streams) if stream and stream != REST_STREAM)
        return tuple(self.tensor(i) for i in every if self.stored_streams is None or i in self.stored_streams)

    def tensor(self, i: int) -> str:
        return f"{self.name}:{i}"

    def stores(self, action: Action) -> bool:
        """Whether that action gives a new generation to store: what is computed, and if `emitted` what is combined."""
        return action == "compute" or (self.emitted and action == "combine")

    def slot_names(self) -> tuple[str, ...]:
        """Graph inputs of a variant that combines this site: tensor by tensor, newest slot first."""
        return tuple(f"{t}@{k}" for t in self.tensors for k in range(self.slots))


@dataclass(frozen=True)
class Variant:
    """The denoiser with one fixed action at every site. Sites that are not named compute."""

    name: str
    actions: tuple[tuple[str, Action], ...]

    def sites_with(self, action: Action) -> tuple[str, ...]:
        return tuple(site for site, a in self.actions if a == action)

    def stored_marks(self, marks: Iterable[Mark]) -> tuple[Mark, ...]:
        """The marks of which this variant returns a new generation."""
        actions = dict(self.actions)
        return tuple(m for m in marks if m.tensors and m.stores(actions.get(m.name, "compute")))

    def combined_sites(self, marks: Iterable[Mark]) -> tuple[str, ...]:
        """The sites of which this variant reads stored values: what it combines, but for what nothing in it reads."""
        combined = self.sites_with("combine")
        return tuple(m.name for m in marks if m.name in combined and m.tensors)
