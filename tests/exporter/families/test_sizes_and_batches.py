"""Sizes and batches of every family, beside diffusers: one artifact with two sizes and graphs for one and two pictures."""

from __future__ import annotations

import pytest

from support.family_parity import FAMILIES, PROMPTS, TOLERANCE, expected, got, ours, relative_error, seeded

SIDES = {"cogvideox": (32, 48)}
FURTHER = (32, 64)
"""Height and width of the second size; each family's first is its tiny model's own, square."""
BATCH_TOLERANCE = 1e-5
"""Uncompiled, torch's own products of two rows add in another order than those of one."""


def overrides(name: str) -> tuple[str, ...]:
    (height, width), further = ours(name).sizes[0], SIDES.get(name, FURTHER)
    return (f'shapes.sizes=["{width}x{height}","{further[1]}x{further[0]}"]', "shapes.batch=[1,2]")


def call_of(name: str, seeds=(0, 1, 2)) -> dict:
    negatives = {"negative_prompt": ["", "a blurred dog", "snow and ice"]} if FAMILIES[name].negatives else {}
    return {"generator": [seeded(seed) for seed in seeds], **negatives}


@pytest.mark.parametrize("name", [name for name in FAMILIES if "image" not in FAMILIES[name].call])
def test_three_prompts_at_a_further_size_are_diffusers_pictures(name):
    """A group of two and one alone, each with a prompt, a negative prompt and a generator of its own."""
    height, width = SIDES.get(name, FURTHER)
    size = {"height": height, "width": width}
    theirs = expected(name, list(PROMPTS), **size, **call_of(name))
    mine = got(name, list(PROMPTS), *overrides(name), **size, **call_of(name))
    assert relative_error(mine, theirs) < TOLERANCE
    other = got(name, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], *overrides(name), **size, **call_of(name))
    assert relative_error(other, theirs) > 100 * TOLERANCE  # the canary: rows exchanged
