"""An explicit mask over steps: where it says 0, a range of blocks, or the whole denoiser, is not run but predicted.

Order 0 takes the last computed value again (FORA's and MagCache's reuse). Orders 1 and 2 continue the line and the
parabola through the last two and three, over timesteps. Unlike TaylorSeer's index distance this stays exact on schedules
whose steps are not equally long: r(t) = r_a + (t - a) / (a - b) (r_a - r_b), computed at a and before that at b.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from ...runtime.errors import ExportError, RecipeError
from ..sites.layout import Layout
from ..sites.marks import Mark
from ..tables import ConflictError, RecipeProblem
from .common.method import CacheMethod
from .common.predict import lagrange_weights
from .common.schedule import Decision, Schedule, Trajectory
from .common.steps_mask import MASK_NAMES, steps_mask


def _mask_to_text(mask: Any) -> Any:
    """`[1, 1, 0]` and `[true, true, false]` as "110", also where `--set` hands them over as text; else the value itself."""
    if isinstance(mask, str) and mask.startswith("["):
        try:
            mask = json.loads(mask)
        except json.JSONDecodeError as e:
            raise ValueError(f"expected a list of 0 and 1, got {mask!r}") from e
    if not isinstance(mask, list | tuple):
        return mask
    if any(type(bit) not in (bool, int) or bit not in (0, 1) for bit in mask):
        raise ValueError(f"expected a list of 0 and 1, got {list(mask)}")
    return "".join("01"[bit] for bit in mask)


MaskText = Annotated[str, BeforeValidator(_mask_to_text, json_schema_input_type=str | list[bool | Literal[0, 1]])]


class Mask(CacheMethod):
    """Which steps compute (1), and which predict (0) the residual that transformer blocks would add, or the output.

    `mask` is a prefix, an optional group in parentheses that repeats until the steps are filled, and an optional
    suffix: `111(0001)` at 9 steps is 111000100. Without a group its length must equal the number of steps; it may also
    be a list of 0 and 1, or one of cache-dit's names (slow, medium, fast, ultra). A step with two evaluations computes or
    skips both. `order` 0 reuses the last computed value, 1 draws a line through the last two, 2 a parabola through the
    last three. `site` "blocks" predicts the residual of `blocks`, a slice `start:stop` of the transformer blocks in their
    order of execution; "output" predicts the denoiser's own result, and nothing runs.
    """

    method: Literal["mask"] = "mask"
    mask: MaskText
    order: Literal[0, 1, 2] = 0
    site: Literal["blocks", "output"] = "blocks"
    blocks: str = ":"

    @model_validator(mode="after")
    def _is_well_formed(self) -> Mask:
        problems: list[RecipeProblem] = []
        if not self.named and not re.fullmatch(r"(?=.)[01]*(\([01]+\)[01]*)?", self.mask):
            problems.append(
                (
                    ("mask",),
                    f"key 'mask': expected 0s and 1s with at most one repeating group, such as '111(0001)', or one of {', '.join(MASK_NAMES)}, got {self.mask!r}",
                )
            )
        elif not self.named:
            prefix, group, suffix = self._parts()
            if reason := self._starts_too_soon(prefix + group * (self.order + 1) + suffix):
                problems.append((("mask", "order"), reason))
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", self.blocks):
            problems.append(
                (
                    ("blocks",),
                    f"key 'blocks': expected a slice 'start:stop' such as ':', '1:' or '2:-1', got {self.blocks!r}",
                )
            )
        if self.site == "output" and self.blocks != ":":
            problems.append(
                (
                    ("blocks", "site"),
                    f'blocks = {self.blocks!r} selects blocks, and site = "output" skips them all; leave blocks out or set site = "blocks"',
                )
            )
        if problems:
            raise ConflictError(*problems)
        return self

    @property
    def named(self) -> bool:
        return self.mask in MASK_NAMES

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
        first = {1: "two", 2: "three"}[self.order]
        return (
            f"mask {self.mask!r} skips one of the first {first} steps, which order = {self.order} predicts from; "
            f"start it with {'1' * (self.order + 1)} or set order = 0"
        )

    def expand(self, steps: int) -> tuple[bool, ...]:
        """One bool per step, True = compute. Raises RecipeError where the mask does not fit that many steps."""
        bits = steps_mask(self.mask, steps) if self.named else self._fill_group(steps)
        if reason := self._starts_too_soon(bits):
            raise RecipeError(f"{reason} (at {steps} steps)")
        return tuple(bit == "1" for bit in bits)

    def _fill_group(self, steps: int) -> str:
        """The mask with its group repeated over the steps that prefix and suffix leave."""
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
        return prefix + (group * room)[:room] + suffix


def schedule(cache: Mask, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site for each branch, the residual of `cache.blocks`, or one for the output; computed where the mask says 1."""
    marks = mark_sites(cache, layout)
    steps = trajectory.steps or tuple(range(len(trajectory.timesteps)))
    bits = cache.expand(steps[-1] + 1)
    computed: list[float] = []
    decisions = []
    for step, t in zip(steps, trajectory.timesteps, strict=True):
        if bits[step]:
            computed.insert(0, t)
            decisions.append(Decision())
        else:
            weights = prediction_weights(cache.order, t, computed)
            decisions.append(Decision({m.name: "combine" for m in marks}, {m.name: weights for m in marks}))
    return Schedule(marks, tuple(decisions))


def mark_sites(cache: Mask, layout: Layout) -> tuple[Mark, ...]:
    """The denoiser's output, or the blocks of each branch."""
    if cache.site == "output":
        return (layout.output(slots=cache.order + 1),)
    return tuple(mark_residual(cache, layout, branch) for branch in layout.branches)


def mark_residual(cache: Mask, layout: Layout, branch: str) -> Mark:
    """The site of the slice `cache.blocks`, such as ":" or "1:-1". Raises ExportError when it is empty."""
    bounds = [int(bound) if bound else None for bound in cache.blocks.split(":")]
    count = len(layout.blocks(branch))
    chosen = range(count)[slice(*bounds)]
    if not count:
        raise ExportError(
            'cache.site "blocks" needs a stack of transformer blocks, and this model (a UNet, perhaps) has none; set cache.site = "output"'
        )
    if not chosen:
        raise ExportError(
            f"cache.blocks {cache.blocks!r} selects none of the model's {count} blocks; ':' is all of them"
        )
    return layout.residual(branch, chosen.start, chosen.stop, slots=cache.order + 1)


def prediction_weights(order: int, t: float, computed: list[float]) -> tuple[float, ...]:
    """Weights of the stored values at timestep `t`, newest first like the timesteps in `computed`."""
    nodes = computed[: order + 1]
    if len(set(nodes)) < len(nodes):
        raise ExportError(
            f"cache.order = {order} draws a curve through the last {order + 1} computed values, which here are at timesteps "
            f"{', '.join(f'{n:g}' for n in nodes)}: this scheduler evaluates one of them twice; take a lower order"
        )
    return lagrange_weights(t, nodes)
