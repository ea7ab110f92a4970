"""An explicit mask over steps: where it says 0, a range of blocks is not run and its residual is predicted.

Order 0 adds the last computed residual again (FORA's and MagCache's reuse). Order 1 continues the line through the last
two, over timesteps: r(t) = r_a + (t - a) / (a - b) (r_a - r_b), computed at a and before that at b. Unlike TaylorSeer's
index distance this stays a line on schedules whose steps are not equally long.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import model_validator

from ...runtime.errors import ExportError, RecipeError
from ..layout import Layout
from ..marks import Mark
from ..tables import Conflicts, Table
from .schedule import Decision, Schedule, Trajectory


class Mask(Table):
    """Which steps compute (1) the transformer blocks, and which predict (0) the residual that the blocks would add.

    `mask` is a prefix, an optional group in parentheses that repeats until the steps are filled, and an optional
    suffix: `111(0001)` at 9 steps is 111000100. Without a group its length must equal the number of steps.
    `order` 0 reuses the last computed residual, 1 draws a line through the last two. `blocks` is a slice `start:stop`
    of the transformer blocks in their order of execution.
    """

    method: Literal["mask"] = "mask"
    mask: str
    order: Literal[0, 1] = 0
    blocks: str = ":"

    @model_validator(mode="after")
    def _is_well_formed(self) -> Mask:
        problems = []
        if not re.fullmatch(r"(?=.)[01]*(\([01]+\)[01]*)?", self.mask):
            problems.append(
                (
                    ("mask",),
                    f"key 'mask': expected 0s and 1s with at most one repeating group, such as '111(0001)', got {self.mask!r}",
                )
            )
        elif reason := self._starts_too_soon(self._parts()[0] + self._parts()[1] * 2 + self._parts()[2]):
            problems.append((("mask", "order"), reason))
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", self.blocks):
            problems.append(
                (
                    ("blocks",),
                    f"key 'blocks': expected a slice 'start:stop' such as ':', '1:' or '2:-1', got {self.blocks!r}",
                )
            )
        if problems:
            raise Conflicts(*problems)
        return self

    def _parts(self) -> tuple[str, str, str]:
        """Prefix, group and suffix; a mask without a group is all prefix."""
        prefix, _, rest = self.mask.partition("(")
        group, _, suffix = rest.partition(")")
        return prefix, group, suffix

    def _starts_too_soon(self, bits: str) -> str:
        """Why these steps predict from nothing, or ''."""
        if "0" not in bits[: 1 + self.order]:
            return ""
        if self.order == 0:
            return f"mask {self.mask!r} skips the first step, when there is nothing to reuse; start it with 1"
        return f"mask {self.mask!r} skips one of the first two steps, which order = 1 predicts from; start it with 11 or set order = 0"

    def expand(self, steps: int) -> tuple[bool, ...]:
        """One bool per step, True = compute. Raises RecipeError where the mask does not fit that many steps."""
        prefix, group, suffix = self._parts()
        fixed = len(prefix) + len(suffix)
        if not group and fixed != steps:
            raise RecipeError(
                f"mask {self.mask!r} is for {fixed} steps, not for {steps}; give it a repeating group, such as '111(0001)', or set sampler.steps = [{fixed}]"
            )
        if fixed > steps:
            raise RecipeError(
                f"mask {self.mask!r} needs at least {fixed} steps, not {steps}; shorten it or raise sampler.steps"
            )
        room = steps - fixed
        bits = prefix + (group * room)[:room] + suffix
        if reason := self._starts_too_soon(bits):
            raise RecipeError(f"{reason} (at {steps} steps)")
        return tuple(bit == "1" for bit in bits)


def schedule(cache: Mask, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site for each branch, the residual of `cache.blocks`, computed where `cache.mask` says 1."""
    marks = tuple(residual(cache, layout, branch) for branch in layout.branches)
    computed: list[float] = []
    decisions = []
    for compute, t in zip(cache.expand(len(trajectory.timesteps)), trajectory.timesteps, strict=True):
        if compute:
            computed.append(t)
            decisions.append(Decision())
        else:
            weights = prediction(cache.order, t, computed)
            decisions.append(Decision({m.name: "combine" for m in marks}, {m.name: weights for m in marks}))
    return Schedule(marks, tuple(decisions))


def residual(cache: Mask, layout: Layout, branch: str) -> Mark:
    """The site of the slice `cache.blocks`, such as ":" or "1:-1". Raises ExportError when it is empty."""
    bounds = [int(bound) if bound else None for bound in cache.blocks.split(":")]
    count = len(layout.blocks(branch))
    chosen = range(count)[slice(*bounds)]
    if not chosen:
        raise ExportError(
            f"cache.blocks {cache.blocks!r} selects none of the model's {count} blocks; ':' is all of them"
        )
    return layout.residual(branch, chosen.start, chosen.stop, slots=cache.order + 1)


def prediction(order: int, t: float, computed: list[float]) -> tuple[float, ...]:
    """Weights of the stored residuals, newest first, at timestep `t`."""
    if order == 0:
        return (1.0,)
    a, b = computed[-1], computed[-2]
    reach = (t - a) / (a - b)
    return (1.0 + reach, -reach)
