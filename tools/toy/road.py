"""The ground of a toy scene: its height, a winding road, and a painted map of what the ground is made of."""

from typing import NamedTuple, Tuple

import numpy as np

# Ground codes of the painted map. NO_GROUND marks the floor inside buildings, which nobody sees.
GRASS, DIRT, ASPHALT, WHITE_PAINT, YELLOW_PAINT, PAVING, KERB, TILES = range(8)
NO_GROUND = 255

GROUND_CLASSES = {
    GRASS: 'terrain',
    DIRT: 'terrain',
    ASPHALT: 'driveable_surface',
    WHITE_PAINT: 'driveable_surface',
    YELLOW_PAINT: 'driveable_surface',
    PAVING: 'sidewalk',
    KERB: 'sidewalk',
    TILES: 'other_flat',
}

# Lateral distances from the centre line, metres.
LANE_WIDTH, PARKING_CENTRE, ROAD_EDGE, SIDEWALK_EDGE = 3.5, 5.4, 7.1, 10.4
PAINTED_REACH, CROSS_STREET_HALF = 40.0, 4.0
CELL = 0.1  # metres per cell of the painted map
STEP = 0.25  # metres between samples of the centre line


class Waves(NamedTuple):
    """Ground height = sum of amplitude * sin(kx x + ky y + phase); all float64 [3], metres and radians."""

    amplitude: np.ndarray
    kx: np.ndarray
    ky: np.ndarray
    phase: np.ndarray

    def height(self, x, y):
        """Height, metres, at map coordinates x, y (any equal shapes)."""
        return sum(a * np.sin(kx * x + ky * y + p) for a, kx, ky, p in zip(*self))

    def gradient(self, x, y):
        """(dh/dx, dh/dy) at map coordinates x, y."""
        slopes = [a * np.cos(kx * x + ky * y + p) for a, kx, ky, p in zip(*self)]
        return (sum(s * k for s, k in zip(slopes, self.kx)), sum(s * k for s, k in zip(slopes, self.ky)))


def draw_waves(rng) -> Waves:
    """Gentle hills: within 40 m the ground stays less than 0.7 m off the plane below the car."""
    amplitude, wavelength = np.array([0.20, 0.10, 0.05]), np.array([220.0, 140.0, 90.0])
    angle = rng.uniform(0, 2 * np.pi, 3)
    k = 2 * np.pi / wavelength
    return Waves(
        amplitude * rng.uniform(0.5, 1.0, 3), k * np.cos(angle), k * np.sin(angle), rng.uniform(0, 2 * np.pi, 3)
    )


class Road:
    """The centre line of a road that winds to both sides, driven towards growing s.

    Args:
        rng: numpy generator.
        length: metres that the ego car drives; the road goes on for ``margin`` metres before and after.
    """

    margin = 90.0

    def __init__(self, rng, length: float):
        self.length = length
        swing, period = rng.uniform(0.2, 0.6), rng.uniform(130.0, 220.0)
        swing = min(swing, period / (2 * np.pi * 45.0))  # no bend tighter than 45 m
        self.s = np.arange(-self.margin, length + self.margin + STEP, STEP)
        phase = rng.uniform(0, 2 * np.pi)
        self._heading = rng.uniform(-np.pi, np.pi) + swing * np.sin(2 * np.pi * self.s / period + phase)
        steps = np.stack([np.cos(self._heading), np.sin(self._heading)], axis=1) * STEP
        line = np.cumsum(steps, axis=0)
        pad = 75.0
        self.size = np.ceil(line.max(axis=0) - line.min(axis=0) + 2 * pad)  # map width, height, metres
        self._line = line - line.min(axis=0) + pad

    def at(self, s, d) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Map x, y and heading at s metres along the road, d metres to its left (equal shapes)."""
        heading = np.interp(s, self.s, self._heading)
        beyond = s - np.clip(s, self.s[0], self.s[-1])  # past its ends the road is straight
        x = np.interp(s, self.s, self._line[:, 0]) + beyond * np.cos(heading)
        y = np.interp(s, self.s, self._line[:, 1]) + beyond * np.sin(heading)
        return x - d * np.sin(heading), y + d * np.cos(heading), heading


class SideZone(NamedTuple):
    """A stretch of the land beside the road: s from ``start`` to ``end``, ``side`` 1 left, -1 right."""

    start: float
    end: float
    side: int
    kind: str  # 'park', 'dirt', 'plaza' or 'building'


def paint_map(road: Road, zones, crossing: float) -> np.ndarray:
    """Painted map uint8 [rows, columns] of ground codes; cell (r, c) holds y = r * CELL.., x = c * CELL.."""
    columns, rows = np.round(road.size / CELL).astype(int)
    image = np.full((rows, columns), GRASS, dtype=np.uint8)
    d = np.arange(-PAINTED_REACH, PAINTED_REACH, 0.06)
    for first in np.arange(road.s[0], road.s[-1], 20.0):
        s = np.arange(first, min(first + 20.0, road.s[-1]), 0.06)[:, None]
        x, y, heading = road.at(s, 0.0)
        row = ((y + d * np.cos(heading)) / CELL).astype(np.int32)
        column = ((x - d * np.sin(heading)) / CELL).astype(np.int32)
        image.reshape(-1)[row * columns + column] = _codes(s, d[None, :], zones)
    _paint_cross_street(image, road, crossing)
    return image


def _codes(s, d, zones):
    """Ground codes [len(s), len(d)] at road coordinates s [n, 1], d [1, m]."""
    wide = np.abs(d)
    codes = np.full((s.shape[0], d.shape[1]), GRASS, dtype=np.uint8)
    for zone in zones:
        code = {'park': GRASS, 'dirt': DIRT, 'plaza': TILES, 'building': PAVING}[zone.kind]
        reach = {'park': 40.0, 'dirt': 26.0, 'plaza': 22.0, 'building': 12.0}[zone.kind]
        rows = (s[:, 0] >= zone.start) & (s[:, 0] < zone.end)
        columns = (d[0] * zone.side > 0) & (wide[0] < reach)
        codes[np.ix_(rows, columns)] = code
    for code, reach in ((PAVING, SIDEWALK_EDGE), (KERB, ROAD_EDGE + 0.2), (ASPHALT, ROAD_EDGE)):
        codes[:, wide[0] < reach] = code
    codes[np.ix_(np.mod(s[:, 0], 6.0) < 3.0, np.abs(wide[0] - LANE_WIDTH) < 0.08)] = WHITE_PAINT
    codes[:, wide[0] < 0.10] = YELLOW_PAINT
    return codes


def _paint_cross_street(image, road, crossing):
    """A straight street across the road at s = crossing, with zebra crossings on both sides of it."""
    x, y, heading = (float(v) for v in road.at(crossing, 0.0))
    rows, columns = image.shape
    reach = 70.0
    c0, c1 = max(int((x - reach) / CELL), 0), min(int((x + reach) / CELL), columns)
    r0, r1 = max(int((y - reach) / CELL), 0), min(int((y + reach) / CELL), rows)
    dx = ((np.arange(c0, c1) + 0.5) * CELL - x)[None, :]
    dy = ((np.arange(r0, r1) + 0.5) * CELL - y)[:, None]
    row, column = np.nonzero(np.abs(dx * np.cos(heading) + dy * np.sin(heading)) < CROSS_STREET_HALF + 4.0)
    dx, dy = dx[0, column], dy[row, 0]
    along = np.abs(dx * np.cos(heading) + dy * np.sin(heading))
    across = dy * np.cos(heading) - dx * np.sin(heading)
    wide = np.abs(across)
    codes = image[r0 + row, c0 + column]
    outside = (wide > ROAD_EDGE) & (wide < 60.0)
    codes[outside & (along < CROSS_STREET_HALF + 2.0)] = PAVING
    codes[outside & (along < CROSS_STREET_HALF + 0.2)] = KERB
    codes[(wide < 60.0) & (along < CROSS_STREET_HALF)] = ASPHALT
    codes[outside & (along < 0.08) & (np.mod(across, 6.0) < 3.0)] = WHITE_PAINT
    zebra = (np.abs(along - CROSS_STREET_HALF - 2.5) < 1.5) & (wide < ROAD_EDGE) & (np.mod(across, 1.2) < 0.6)
    codes[zebra] = WHITE_PAINT
    image[r0 + row, c0 + column] = codes


def lookup(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ground codes uint8 at map coordinates x, y; GRASS outside the map."""
    column, row = np.floor(x / CELL).astype(np.int64), np.floor(y / CELL).astype(np.int64)
    known = (row >= 0) & (row < image.shape[0]) & (column >= 0) & (column < image.shape[1])
    codes = np.full(np.shape(x), GRASS, dtype=np.uint8)
    codes[known] = image[row[known], column[known]]
    return codes
