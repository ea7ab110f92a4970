"""Says whether a picture shows what its prompt names. In: a 64x64 picture and a prompt; out: a `PromptVerdict`.

Objects are the saturated regions, since grounds and shadows are grey. Each region becomes a soft matte, to which every
shape is fitted in position and radius; the best fit gives the shape, the size and the centre, the hue gives the colour.
Only what the prompt names is judged. Tables and grammar are those of `world.py`.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from .world import COLOURS, GROUNDS, PLACES, RELATIONS, SHAPES, SIDE, SIZES, Caption, Thing, outline_distance

MIDDLE_RADIUS = 10.5  # between small and large
MIDDLE_SHIFT = 7.5  # of a centred object from the middle, at most
GREYS = (0.28, 0.74)  # between black, gray and white
LEAST_AREA = 24.0  # a smaller region is a stain, not an object
LEAST_FIT = 0.72  # soft overlap with the best shape; less is no shape at all


@dataclass(frozen=True)
class FoundObject:
    """One object seen in a picture."""

    shape: str
    size: str
    colour: str
    x: float
    y: float
    radius: float
    fit: float  # soft intersection over union with the shape, 0..1


@dataclass(frozen=True)
class PromptVerdict:
    """`right` maps each named attribute (shape, size, colour, place, ground) and `count` to whether it is right."""

    right: dict[str, bool]
    found: tuple[FoundObject, ...]
    ground: str

    @property
    def exact(self) -> bool:
        return all(self.right.values())


def parse_prompt(prompt: str) -> Caption:
    """The caption of a prompt. Raises ValueError, naming the word, for a prompt outside the grammar of `world`."""
    words = prompt.lower().split()
    rest = list(words)

    def fail(expected: str) -> ValueError:
        got = f"'{rest[0]}' (word {len(words) - len(rest) + 1})" if rest else "the end"
        return ValueError(f"prompt '{prompt}': expected {expected}, got {got}")

    def phrase(options) -> str | None:
        for option in options:
            parts = option.split()
            if rest[: len(parts)] == parts:
                del rest[: len(parts)]
                return option
        return None

    def thing() -> Thing:
        if phrase(("a", "an")) is None:
            raise fail("'a' or 'an'")
        size, colour = phrase(SIZES), phrase(COLOURS)
        shape = phrase((*SHAPES, "shape"))
        if shape is None:
            raise fail("a shape (" + ", ".join(SHAPES) + " or shape)")
        return Thing(None if shape == "shape" else shape, size, colour)

    if not words:
        return Caption()
    things = [thing()]
    place = phrase(PLACES)
    relation = None
    if place is None:
        joined = phrase((*RELATIONS, "and"))
        if joined:
            relation = joined if joined in RELATIONS else None
            things.append(thing())
    ground = None
    if phrase(("on a",)):
        ground = phrase(GROUNDS)
        if ground is None:
            raise fail("a background (" + ", ".join(GROUNDS) + ")")
        if phrase(("background",)) is None:
            raise fail("'background'")
    if rest:
        raise fail("a place, a relation, 'on a ... background' or the end")
    return Caption(tuple(things), place, relation, ground)


def check_picture(image, prompt: str | Caption) -> PromptVerdict:
    """What of the prompt the picture gets right.

    `image` is a PIL picture, or an array [64, 64, 3] of uint8, or of floats in 0..1. Raises ValueError for another
    shape, and for a prompt outside the grammar.
    """
    caption = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    found, level = find_objects(picture_array(image))
    ground = "black" if level < GREYS[0] else "gray" if level < GREYS[1] else "white"
    well_formed = all(f.fit >= LEAST_FIT for f in found)
    if not caption.things:
        return PromptVerdict({"count": len(found) in (1, 2) and well_formed}, found, ground)
    n = len(caption.things)
    options = [_judge_attributes(caption, order) for order in permutations(found, min(n, len(found)))]
    right = max(options, key=lambda judged: sum(judged.values()))
    right["count"] = len(found) == n and well_formed
    if caption.ground:
        right["ground"] = ground == caption.ground
    return PromptVerdict(right, found, ground)


def accuracy(images, prompts) -> dict[str, float]:
    """Share of pictures that are `exact`, and for each attribute the share that is right where it is named."""
    verdicts = [check_picture(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    shares = {"exact": float(np.mean([v.exact for v in verdicts]))}
    for name in ("count", "shape", "colour", "size", "place", "ground"):
        judged = [v.right[name] for v in verdicts if name in v.right]
        if judged:
            shares[name] = float(np.mean(judged))
    return shares


def _judge_attributes(caption: Caption, found: tuple[FoundObject, ...]) -> dict[str, bool]:
    """Named attributes against objects in this order; an attribute that is named twice must be right twice."""
    right: dict[str, bool] = {}
    for i, thing in enumerate(caption.things):
        for name in ("shape", "size", "colour"):
            wanted = getattr(thing, name)
            if wanted:
                hit = i < len(found) and getattr(found[i], name) == wanted
                right[name] = right.get(name, True) and hit
    if caption.place:
        right["place"] = len(found) > 0 and _place_name(found[0]) == caption.place
    if caption.relation:
        right["place"] = len(found) > 1 and _relation_name(*found) == caption.relation
    return right


def _place_name(thing: FoundObject) -> str:
    return _direction_name(thing.x - SIDE / 2, thing.y - SIDE / 2, PLACES, MIDDLE_SHIFT)


def _relation_name(first: FoundObject, second: FoundObject) -> str:
    return _direction_name(first.x - second.x, first.y - second.y, RELATIONS, 0.0)


def _direction_name(dx: float, dy: float, names: dict[str, tuple[int, int]], middle: float) -> str:
    if max(abs(dx), abs(dy)) < middle:
        side = (0, 0)
    elif abs(dx) > abs(dy):
        side = (1 if dx > 0 else -1, 0)
    else:
        side = (0, 1 if dy > 0 else -1)
    return next(name for name, s in names.items() if s == side)


def picture_array(image) -> np.ndarray:
    """[64, 64, 3] float32 in 0..1 from a PIL picture or an array."""
    array = np.asarray(image)
    if array.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the checker reads pictures of shape ({SIDE}, {SIDE}, 3), got {array.shape}")
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)


def find_objects(picture: np.ndarray) -> tuple[tuple[FoundObject, ...], float]:
    """The objects of a picture, largest first, and the grey level of its ground."""
    chroma = picture.max(-1) - picture.min(-1)
    labels = label_components(chroma > 0.25)
    found = []
    for label in np.unique(labels[labels > 0]):
        region = labels == label
        if region.sum() >= LEAST_AREA:
            found.append((region.sum(), _recognise_object(picture, chroma, region)))
    away = ~_dilate_mask(chroma > 0.12, 3)
    away = away if away.any() else np.ones_like(away)
    level = float(np.median(picture[away].mean(-1)))
    return tuple(f for _, f in sorted(found, key=lambda pair: -pair[0])), level


def label_components(mask: np.ndarray) -> np.ndarray:
    """Labels of the 4-connected regions of a mask, 0 outside."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.max([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0)
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            return labels
        labels = spread


def _dilate_mask(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        p = np.pad(mask, 1)
        mask = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return mask


def _recognise_object(picture: np.ndarray, chroma: np.ndarray, region: np.ndarray) -> FoundObject:
    full = float(np.quantile(chroma[region], 0.75))
    core = region & (chroma > 0.75 * full)
    matte = np.where(_dilate_mask(region, 2), np.clip(chroma / full, 0, 1), 0)
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    area = matte.sum()
    x, y = float((matte * xs).sum() / area), float((matte * ys).sum() / area)
    window = np.s_[max(0, int(y) - 18) : int(y) + 19, max(0, int(x) - 18) : int(x) + 19]
    fits = {shape: _fit_shape(shape, matte[window], xs[window], ys[window], x, y, area) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    fit, radius, x, y = fits[shape]
    size = "large" if radius > MIDDLE_RADIUS else "small"
    return FoundObject(shape, size, _nearest_colour(picture[core].mean(0)), x, y, radius, fit)


def _fit_shape(shape, matte, xs, ys, x, y, area) -> tuple[float, float, float, float]:
    """Best soft overlap of a shape with the matte, with its radius and centre: moments first, then two local grids."""
    unit_area, cx, cy = _shape_moments(shape)
    radius = float(np.sqrt(area / unit_area))
    x, y = x - cx * radius, y - cy * radius
    best = (-1.0, radius, x, y)
    for step in (1.0, 0.4):
        _, radius, x, y = best
        for r in radius * (1 + 0.05 * step * np.array([-1, 0, 1])):
            for dx in (-step, 0, step):
                for dy in (-step, 0, step):
                    drawn = np.clip(0.5 - 0.7 * outline_distance(shape, r, xs - x - dx, ys - y - dy), 0, 1)
                    overlap = float(np.minimum(drawn, matte).sum() / np.maximum(drawn, matte).sum())
                    best = max(best, (overlap, float(r), x + dx, y + dy))
    return best


@cache
def _shape_moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1."""
    axis = np.linspace(-1.5, 1.5, 151)
    x, y = np.meshgrid(axis, axis)
    inside = outline_distance(shape, 1.0, x, y) < 0
    return float(inside.mean() * 9.0), float(x[inside].mean()), float(y[inside].mean())


def _nearest_colour(rgb: np.ndarray) -> str:
    hue = colorsys.rgb_to_hsv(*(float(c) for c in rgb))[0]

    def apart(name: str) -> float:
        d = abs(hue - colorsys.rgb_to_hsv(*COLOURS[name])[0])
        return min(d, 1 - d)

    return min(COLOURS, key=apart)
