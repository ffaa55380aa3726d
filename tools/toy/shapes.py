"""Primitive shapes that everything in the toy world but the ground is made of.

Four kinds, each in its own local frame (origin at the centre, z up, turned about z only):
``BOX`` with sides that lean inwards towards the top, ``ELLIPSOID``, ``CONE`` (upright, truncated; a cylinder
when both radii are equal) and ``WHEEL`` (a cylinder lying along local y).
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Sequence, Tuple

import numpy as np

BOX, ELLIPSOID, CONE, WHEEL = range(4)

# How a surface is painted; see ``shade``.
PLAIN, WALL, FOLIAGE, STRIPES, GLASS, CONE_BANDS, RIBS, CHECKS, BARK = range(9)


class Shape(NamedTuple):
    """One primitive in the frame of its object (x forward, y left, z up from the ground; metres).

    Attributes:
        kind: BOX, ELLIPSOID, CONE or WHEEL.
        centre: (x, y, z) of its centre.
        half: half sizes (x, y, z). CONE: half[0] is the bottom radius; WHEEL: half[0] the radius, half[1]
            half the width.
        colour: RGB 0..1.
        material: how it is painted (PLAIN .. BARK).
        taper: BOX: size of the top over the size of the bottom, along x and y; CONE: top radius over bottom
            radius in taper[0].
        yaw: turn about z, radians.
    """

    kind: int
    centre: Tuple[float, float, float]
    half: Tuple[float, float, float]
    colour: Tuple[float, float, float]
    material: int = PLAIN
    taper: Tuple[float, float] = (1.0, 1.0)
    yaw: float = 0.0


@dataclass
class ShapeTable:
    """n shapes as arrays, placed in one frame.

    Attributes:
        kind, material, owner: int32 [n]; ``owner`` is the index of the object that the shape is part of.
        centre: float64 [n, 3], metres.
        turn: float64 [n, 2], cosine and sine of the yaw.
        half: float64 [n, 3], metres.
        slope: float64 [n, 2], inward lean per metre of height: (x, y) for BOX, (radius, 0) for CONE.
        colour: float64 [n, 3], RGB 0..1.
    """

    kind: np.ndarray
    material: np.ndarray
    owner: np.ndarray
    centre: np.ndarray
    turn: np.ndarray
    half: np.ndarray
    slope: np.ndarray
    colour: np.ndarray

    def __len__(self):
        return len(self.kind)

    @property
    def radius(self) -> np.ndarray:
        """float64 [n]: radius of a sphere about the centre that holds the shape."""
        return np.linalg.norm(self.half, axis=1)

    def select(self, index) -> 'ShapeTable':
        """The shapes at ``index`` (anything that indexes an array)."""
        return ShapeTable(*(getattr(self, f.name)[index] for f in fields(self)))

    def placed(self, x: float, y: float, z: float, yaw: float) -> 'ShapeTable':
        """The table moved from an object's frame to a frame in which the object stands at (x, y, z), yaw."""
        c, s = np.cos(yaw), np.sin(yaw)
        rotation = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        return ShapeTable(
            self.kind,
            self.material,
            self.owner,
            self.centre @ rotation.T + (x, y, z),
            self.turn @ rotation[:2, :2].T,
            self.half,
            self.slope,
            self.colour,
        )

    def placed_each(self, poses: np.ndarray) -> 'ShapeTable':
        """As :meth:`placed`, every shape by its own row of ``poses``, float64 [n, 4]: x, y, z, yaw."""
        c, s = np.cos(poses[:, 3]), np.sin(poses[:, 3])
        x, y, z = self.centre.T
        centre = np.stack([c * x - s * y, s * x + c * y, z], axis=1) + poses[:, :3]
        cos, sin = self.turn.T
        turn = np.stack([c * cos - s * sin, s * cos + c * sin], axis=1)
        return ShapeTable(self.kind, self.material, self.owner, centre, turn, self.half, self.slope, self.colour)


def make_table(shapes: Sequence[Shape], owner: int) -> ShapeTable:
    """Table of one object's shapes, in the object's frame."""
    half = np.array([s.half for s in shapes], dtype=np.float64)
    taper = np.array([s.taper for s in shapes], dtype=np.float64)
    kind = np.array([s.kind for s in shapes], dtype=np.int32)
    slope = half[:, :2] * (1.0 - taper) / (2.0 * half[:, 2:])
    slope[(kind == ELLIPSOID) | (kind == WHEEL)] = 0.0
    slope[kind == CONE, 1] = 0.0
    yaw = np.array([s.yaw for s in shapes])
    return ShapeTable(
        kind=kind,
        material=np.array([s.material for s in shapes], dtype=np.int32),
        owner=np.full(len(shapes), owner, dtype=np.int32),
        centre=np.array([s.centre for s in shapes], dtype=np.float64),
        turn=np.stack([np.cos(yaw), np.sin(yaw)], axis=1),
        half=half,
        slope=slope,
        colour=np.array([s.colour for s in shapes], dtype=np.float64),
    )


def concat_tables(tables: Sequence[ShapeTable]) -> ShapeTable:
    """All shapes of several tables, in order."""
    return ShapeTable(*(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(ShapeTable)))


def extent(table: ShapeTable) -> Tuple[np.ndarray, np.ndarray]:
    """Tightest box along the axes of the table's frame around all shapes: lower, upper, float64 [3]."""
    c, s = np.abs(table.turn[:, 0]), np.abs(table.turn[:, 1])
    x, y, z = table.half.T
    reach = np.stack([c * x + s * y, s * x + c * y, z], axis=1)
    return (table.centre - reach).min(axis=0), (table.centre + reach).max(axis=0)


def to_local(points: np.ndarray, table: ShapeTable, i: int) -> np.ndarray:
    """Points float64 [m, 3] of the table's frame in the local frame of shape i."""
    c, s = table.turn[i]
    p = points - table.centre[i]
    return np.stack([c * p[:, 0] + s * p[:, 1], c * p[:, 1] - s * p[:, 0], p[:, 2]], axis=1)


def inside(points: np.ndarray, table: ShapeTable, i: int, margin: float = 0.0) -> np.ndarray:
    """bool [m]: which points [m, 3] lie in shape i, at least about ``margin`` metres below its surface."""
    x, y, z = to_local(points, table, i).T
    hx, hy, hz = table.half[i]
    kind = table.kind[i]
    if kind == ELLIPSOID:
        shrink = 1.0 - margin / min(hx, hy, hz)
        return (x / hx) ** 2 + (y / hy) ** 2 + (z / hz) ** 2 < max(shrink, 0.0) ** 2
    if kind == WHEEL:
        return (np.hypot(x, z) < hx - margin) & (np.abs(y) < hy - margin)
    in_height = np.abs(z) < hz - margin
    lean_x, lean_y = table.slope[i]
    if kind == CONE:
        return in_height & (np.hypot(x, y) < hx - lean_x * (z + hz) - margin)
    return in_height & (np.abs(x) < hx - lean_x * (z + hz) - margin) & (np.abs(y) < hy - lean_y * (z + hz) - margin)
