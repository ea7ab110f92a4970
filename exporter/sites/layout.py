"""The layout: what a denoiser offers to cache policies, as names. `discover.py` reads it off a run of the model.

In a denoiser with classifier-free guidance every module occurs once for each branch, so whatever a policy marks is kept
apart by branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .marks import Mark

PlaceKind = Literal["attention", "cross_attention", "feed_forward", "block", "layer", "module"]


@dataclass(frozen=True)
class Place:
    """A module that ran. `name` is its name in the diffusers model, `path` the one in the component that is captured,
    `streams` as in `Mark`. A "block" is an element of one of the model's own lists of transformer blocks; a "layer" is a
    direct child of the model, or an element of another list (a UNet's `up_blocks.0.resnets.1`). A "module" is any other
    one, such as a single projection."""

    name: str
    branch: str
    path: str
    kind: PlaceKind
    streams: tuple[str, ...]

    @property
    def site(self) -> str:
        """`cond/transformer_blocks.0.attn`, or the bare name where there is one branch."""
        return f"{self.branch}/{self.name}" if self.branch else self.name

    def mark(self, **choices: Any) -> Mark:
        """The site of this module's output."""
        return Mark(self.site, (self.path,), self.streams, **choices)


@dataclass(frozen=True)
class Layout:
    """`places` in the order in which they returned; `branches` is `("",)`, or `("uncond", "cond")` with guidance.

    `planes` says whether the difference between the branches passes through `low` and `high` (`guidance.py`). `others`
    are the places of kind "module", for a policy whose recipe may name any module.
    """

    places: tuple[Place, ...]
    branches: tuple[str, ...] = ("",)
    planes: bool = False
    others: tuple[Place, ...] = ()

    def of(self, *kinds: PlaceKind, branch: str | None = None) -> tuple[Place, ...]:
        """The places of these kinds, of one branch or of all."""
        return tuple(p for p in self.places if p.kind in kinds and branch in (None, p.branch))

    @property
    def attentions(self) -> tuple[Place, ...]:
        return self.of("attention", "cross_attention")

    def blocks(self, branch: str) -> tuple[Place, ...]:
        """The transformer blocks of one branch, in order of execution."""
        return self.of("block", branch=branch)

    def residual(self, branch: str, start: int, stop: int, name: str = "", **choices: Any) -> Mark:
        """The site of what blocks `start` to `stop` (exclusive) add to their input: `blocks[1:8]`."""
        chosen = self.blocks(branch)[start:stop]
        name = name or f"blocks[{start}:{stop}]"
        site = f"{branch}/{name}" if branch else name
        return Mark(site, tuple(p.path for p in chosen), chosen[-1].streams, residual=True, **choices)

    def output(self, **choices: Any) -> Mark:
        """The site of the denoiser's whole output, after guidance."""
        return Mark("output", ("",), ("hidden_states",), **choices)

    def names(self, places: Iterable[Place]) -> str:
        """Distinct names for a sentence about what exists."""
        return ", ".join(dict.fromkeys(p.name for p in places)) or "none"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        places, others = (
            tuple(Place(**{**p, "streams": tuple(p["streams"])}) for p in data[key]) for key in ("places", "others")
        )
        return cls(places, tuple(data["branches"]), data["planes"], others)
