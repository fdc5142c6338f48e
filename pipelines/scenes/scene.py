"""What a scene is: one to three coloured shapes, each inside its own cell of a 3 x 3 grid, on some background.

An object never leaves its cell, so nothing overlaps and every place has exactly one name. The grid is also what keeps
training and held-out scenes apart: see `Scene.is_heldout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLORS = ("red", "green", "blue", "yellow")
# Told apart by how far they reach. Circle, square and triangle, and square, triangle and cross, in objects of 26 to 58
# pixels, stayed near chance in captions after 600 to 900 steps; why was not found out, nor were they tried larger.
SHAPES = ("square", "bar", "column")
# Row by row, as cell numbers count.
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLUMNS = 2  # and as many rows
BACKGROUNDS = ("light", "dark", "gradient", "noise")

# Pictures are squashed to a square; within these limits a square stays shorter than a bar.
MIN_SIDE, MAX_SIDE = 128, 160
MIN_RADIUS, MAX_RADIUS = 0.18, 0.235
# Half a cell is a quarter of the picture; an object keeps this much of it free on each side.
CELL_MARGIN = 0.008


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape.

    `x`, `y` are its centre as fractions of the picture's width and height, `radius` (half of its extent) is a fraction
    of the shorter side, `angle` is in radians.
    """

    color: str
    shape: str
    cell: int
    x: float
    y: float
    radius: float
    angle: float

    @property
    def place(self) -> str:
        """The name of the cell, such as "top left"."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, on a background, in a picture of `width` x `height` pixels."""

    objects: tuple[SceneObject, ...]
    background: str
    width: int
    height: int

    @property
    def description(self) -> frozenset[tuple[str, str, str]]:
        """What is where, as (colour, shape, place): two pictures with equal descriptions show the same scene."""
        return frozenset((o.color, o.shape, o.place) for o in self.objects)

    @property
    def is_heldout(self) -> bool:
        """Whether this scene is kept from training: one description in four is.

        The rule is a sum modulo four over the objects, not a hash, so that every kind of object is held out in as many
        places as any other, even among the 48 scenes of a single object.
        """
        codes = [o.cell + COLORS.index(o.color) + SHAPES.index(o.shape) for o in self.objects]
        return sum(codes) % len(PLACES) == 0


def invent_scene(rng: np.random.Generator, heldout: bool) -> Scene:
    """Draw scenes from `rng` until one falls on the wanted side of the split."""
    while True:
        scene = _invent(rng)
        if scene.is_heldout == heldout:
            return scene


def _invent(rng: np.random.Generator) -> Scene:
    num_objects = int(rng.integers(1, 4))
    cells = sorted(rng.choice(len(PLACES), size=num_objects, replace=False).tolist())
    # Kinds differ within a scene, so "the red square" is one object wherever it is said.
    kinds = rng.choice(len(COLORS) * len(SHAPES), size=num_objects, replace=False).tolist()
    width, height = rng.integers(MIN_SIDE, MAX_SIDE + 1, size=2).tolist()
    objects = tuple(_place_object(rng, kind, cell) for kind, cell in zip(kinds, cells, strict=True))
    return Scene(objects, str(rng.choice(BACKGROUNDS)), width, height)


def _place_object(rng: np.random.Generator, kind: int, cell: int) -> SceneObject:
    radius = float(rng.uniform(MIN_RADIUS, MAX_RADIUS))
    row, column = divmod(cell, COLUMNS)
    room = 0.5 / COLUMNS - radius - CELL_MARGIN
    shift_x, shift_y = rng.uniform(-room, room, size=2).tolist()
    return SceneObject(
        color=COLORS[kind % len(COLORS)],
        shape=SHAPES[kind // len(COLORS)],
        cell=cell,
        x=(column + 0.5) / COLUMNS + shift_x,
        y=(row + 0.5) / COLUMNS + shift_y,
        radius=radius,
        angle=float(rng.uniform(-0.08, 0.08)),
    )
