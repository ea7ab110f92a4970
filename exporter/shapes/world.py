"""The world that the embedded model draws: captions in a closed grammar, scenes that satisfy them, and their pictures.

A `Caption` holds what a prompt says; None in it means "not said", and then `place_scene` takes any value there. A `Scene`
holds every number that a picture needs. Lengths are pixels of a 64x64 picture, x to the right and y down. Everything
random comes from the numpy generator that is passed in. `checker.py` reads the same tables backwards.

    prompt     = "" | object [place] [ground] | object relation object [ground]
    object     = ("a" | "an") [size] [colour] (shape | "shape")
    place      = "in the center" | "at the left" | "at the right" | "at the top" | "at the bottom"
    relation   = "left of" | "right of" | "above" | "below" | "and"
    ground     = "on a" ("white" | "gray" | "black") "background"
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

SIDE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": (8.2, 9.0), "large": (12.0, 13.0)}  # radius
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.47, 0.04),
    "yellow": (0.98, 0.90, 0.10),
    "green": (0.12, 0.70, 0.20),
    "cyan": (0.05, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.55, 0.12, 0.78),
    "pink": (1.00, 0.35, 0.70),
}
GROUNDS = {"white": (0.92, 1.00), "gray": (0.45, 0.60), "black": (0.03, 0.12)}  # grey level
PLACES = {
    "in the center": (0, 0),
    "at the left": (-1, 0),
    "at the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # first as seen from second
REACH = 1.08  # of a shape beyond its centre, in radii
OBJECT_GAP = 1.5  # least distance between two objects


@dataclass(frozen=True)
class Thing:
    """One object as a caption names it; None where the caption is silent."""

    shape: str | None = None
    size: str | None = None
    colour: str | None = None

    def __str__(self) -> str:
        words = [w for w in (self.size, self.colour, self.shape or "shape") if w]
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


@dataclass(frozen=True)
class Caption:
    """What a prompt says: no thing (the empty prompt: anything), one thing with a place, or two with a relation."""

    things: tuple[Thing, ...] = ()
    place: str | None = None
    relation: str | None = None
    ground: str | None = None

    def __str__(self) -> str:
        if not self.things:
            return ""
        words = [str(self.things[0])]
        if len(self.things) == 2:
            words += [self.relation or "and", str(self.things[1])]
        elif self.place:
            words.append(self.place)
        if self.ground:
            words.append(f"on a {self.ground} background")
        return " ".join(words)


@dataclass(frozen=True)
class PlacedObject:
    """One object as it is drawn."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float
    value: float  # brightness, a factor on the colour


@dataclass(frozen=True)
class Scene:
    """Every number of one picture."""

    things: tuple[PlacedObject, ...]
    ground: float
    light: float  # angle that the light comes from; bends shading and shadow, named by no caption


def sample_caption(rng: np.random.Generator) -> Caption:
    """A fully specified caption: one object (2 in 5) or two."""

    def thing() -> Thing:
        return Thing(pick_name(rng, SHAPES), pick_name(rng, SIZES), pick_name(rng, COLOURS))

    ground = pick_name(rng, GROUNDS)
    if rng.random() < 0.4:
        return Caption((thing(),), place=pick_name(rng, PLACES), ground=ground)
    return Caption((thing(), thing()), relation=pick_name(rng, RELATIONS), ground=ground)


def loosen_caption(caption: Caption, rng: np.random.Generator, keep: float | None = None) -> Caption:
    """The caption with each attribute kept with probability `keep` (None: a new one for each caption)."""
    if keep is None:
        keep = rng.random()

    def maybe(value: str | None) -> str | None:
        return value if rng.random() < keep else None

    return replace(
        caption,
        things=tuple(Thing(maybe(t.shape), maybe(t.size), maybe(t.colour)) for t in caption.things),
        place=maybe(caption.place),
        relation=maybe(caption.relation),
        ground=maybe(caption.ground),
    )


def place_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """A scene that satisfies the caption; what it does not name is drawn from all there is, positions continuously."""
    if not caption.things:
        caption = loosen_caption(sample_caption(rng), rng, 0.0)
    radii = [rng.uniform(*(SIZES[t.size] if t.size else (8.2, 13.0))) for t in caption.things]
    if len(radii) == 1:
        centres = [_place_one(radii[0], caption.place, rng)]
    else:
        centres = _place_two(radii, caption.relation or pick_name(rng, RELATIONS), rng)
    things = tuple(
        PlacedObject(
            t.shape or pick_name(rng, SHAPES), t.colour or pick_name(rng, COLOURS), r, x, y, rng.uniform(0.86, 1.0)
        )
        for t, r, (x, y) in zip(caption.things, radii, centres, strict=True)
    )
    ground = rng.uniform(*(GROUNDS[caption.ground] if caption.ground else (0.03, 1.0)))
    return Scene(things, ground, rng.uniform(0, 2 * math.pi))


def _place_one(radius: float, place: str | None, rng: np.random.Generator) -> tuple[float, float]:
    reach = REACH * radius
    if place is None:
        return rng.uniform(reach, SIDE - reach), rng.uniform(reach, SIDE - reach)

    def along(side: int) -> float:
        if side == 0:
            return SIDE / 2 + rng.uniform(-4, 4)
        edge = rng.uniform(reach, 20)
        return edge if side < 0 else SIDE - edge

    dx, dy = PLACES[place]
    return along(dx), along(dy)


def _place_two(radii: list[float], relation: str, rng: np.random.Generator) -> list[tuple[float, float]]:
    side = RELATIONS[relation]
    first, second = (REACH * r for r in (radii if sum(side) < 0 else radii[::-1]))  # in reading order along the axis
    spare = SIDE - 2 * first - 2 * second - OBJECT_GAP
    margin, gap = np.sort(rng.uniform(0, spare, 2)) * (1, 1)
    gap -= margin
    ahead = margin + first
    behind = ahead + first + OBJECT_GAP + gap + second
    axis = [ahead, behind] if sum(side) < 0 else [behind, ahead]
    across = [SIDE / 2 + rng.uniform(-7, 7) for _ in radii]
    return list(zip(axis, across, strict=True)) if side[0] else list(zip(across, axis, strict=True))


def pick_name(rng: np.random.Generator, options) -> str:
    """One of the names, all equally likely."""
    names = list(options)
    return names[rng.integers(len(names))]


def render_scene(scene: Scene) -> np.ndarray:
    """The picture, [64, 64, 3] float32 in 0..1: grey ground, soft shadow, shaded objects, anti-aliased edges."""
    lx, ly = math.cos(scene.light), math.sin(scene.light)
    ys, xs = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5
    picture = np.full((SIDE, SIDE, 3), scene.ground, np.float32)
    for thing in scene.things:
        shadow = np.clip(
            0.5 - outline_distance(thing.shape, thing.radius, xs - thing.x + 2 * lx, ys - thing.y + 2 * ly) / 4, 0, 1
        )
        picture *= 1 - 0.35 * shadow[..., None]
    for thing in scene.things:
        dx, dy = xs - thing.x, ys - thing.y
        alpha = np.clip(0.5 - outline_distance(thing.shape, thing.radius, dx, dy), 0, 1)[..., None]
        shade = thing.value * (1 + 0.12 * np.clip((dx * lx + dy * ly) / thing.radius, -1, 1))
        picture += alpha * (np.asarray(COLOURS[thing.colour], np.float32) * shade[..., None] - picture)
    return np.clip(picture, 0, 1, dtype=np.float32)


def outline_distance(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape of this radius round the origin, negative inside."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    table, scale = _distance_table(shape), (TABLE_SIDE - 1) / 4
    u = np.clip((dx / radius + 2) * scale, 0, TABLE_SIDE - 1.001)
    v = np.clip((dy / radius + 2) * scale, 0, TABLE_SIDE - 1.001)
    i, j = u.astype(np.int32), v.astype(np.int32)
    fu, fv = u - i, v - j
    top = table[j, i] * (1 - fu) + table[j, i + 1] * fu
    low = table[j + 1, i] * (1 - fu) + table[j + 1, i + 1] * fu
    return (top * (1 - fv) + low * fv) * radius


TABLE_SIDE = 193  # samples along a side of a distance table over -2..2


@cache
def _distance_table(shape: str) -> np.ndarray:
    axis = np.linspace(-2, 2, TABLE_SIDE)
    x, y = np.meshgrid(axis, axis)
    corners = _outline_corners(shape)
    best, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, np.hypot(x - ax - t * ex, y - ay - t * ey))
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -best, best).astype(np.float32)


def _outline_corners(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1, [K, 2]."""
    if shape == "square":
        return 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        turns = np.radians([-90, 30, 150])
        return 1.15 * np.stack([np.cos(turns), np.sin(turns)], 1) + (0, 0.15)
    if shape == "star":
        turns = np.radians(-90 + 36 * np.arange(10))
        return np.where(np.arange(10) % 2, 0.50, 1.12)[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)
    if shape == "cross":
        a, b = 1.0, 0.36
        return np.array(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)  # heart: the usual sextic curve
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -(y + 2.5)], 1) / 15.2
