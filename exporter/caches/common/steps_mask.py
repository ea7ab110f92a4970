"""Named masks: cache-dit's "steps computation masks" `slow`, `medium`, `fast` and `ultra`, for any number of steps.

They equal `cache_dit.steps_mask(mask_policy=..., total_steps=...)` of cache-dit 1.5 for every number of steps, also where
a longer one is lumpy (`ultra` at 50 steps waits 13 steps for its next computed one): a name means the same here as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, groupby, zip_longest

from ....runtime.errors import RecipeError

MASK_NAMES = ("slow", "medium", "fast", "ultra")

EXACT_MASKS: Mapping[int, Mapping[str, str]] = {
    steps: dict(zip(MASK_NAMES, masks, strict=True))
    for steps, masks in {
        4: ("1101",) * 4,
        6: ("111001",) * 4,
        8: ("11111011", "11110101", "11101001", "11001001"),
        9: ("111110111", "111110101", "111101001", "111001001"),
    }.items()
}
SHORT_MASKS: Mapping[str, str] = dict(
    zip(MASK_NAMES, ("111101101101101", "111101101001001", "111010010010001", "110100100010001"), strict=True)
)
LONG_MASKS: Mapping[str, str] = {
    "slow": "1111111101110011100110010001",
    "medium": "1111110110001100011000110001",
    "fast": "1111110100010000100000100001",
    "ultra": "1111001000001000000100000001",
}


def steps_mask(name: str, steps: int) -> str:
    """The mask of that name, one 0 or 1 a step. Raises RecipeError below 8 steps, but for 4 and 6."""
    if steps in EXACT_MASKS:
        return EXACT_MASKS[steps][name]
    if steps < 8:
        raise RecipeError(f"mask {name!r} is defined for 4, 6, 8 and more steps, not for {steps}; write the mask out")
    base = SHORT_MASKS if steps < 16 else LONG_MASKS
    ones, zeros = ([len(list(run)) for bit, run in groupby(base[name]) if bit == b] for b in "10")
    stretch_runs(ones, zeros, steps)
    trim_runs(ones, zeros, steps)
    bits = "".join("1" * n + "0" * m for n, m in zip_longest(ones, zeros, fillvalue=0))
    return bits[:-1] + "1"


def stretch_runs(ones: list[int], zeros: list[int], steps: int) -> None:
    """Lengthens the runs in turn, each by half of its share, until they hold `steps`."""
    rate = steps / len(LONG_MASKS["slow"]) * 0.5
    growth = [(runs, i, max(int(runs[i] * rate), 1)) for i in range(len(zeros)) for runs in (ones, zeros)]
    for runs, i, more in cycle([*growth, (ones, -1, 1)]):
        if sum(ones) + sum(zeros) >= steps:
            return
        runs[i] += more


def trim_runs(ones: list[int], zeros: list[int], steps: int) -> None:
    """Takes single steps off the ends of the last skipped and the last computed run in turn, down to `steps`."""
    for runs in cycle((zeros, ones)):
        if sum(ones) + sum(zeros) <= steps:
            return
        if runs:
            runs[-1] -= 1
        if runs and not runs[-1]:
            runs.pop()
