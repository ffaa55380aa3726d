"""What the tracers of all devices share: the scene packed for one viewpoint, and how a hit is reported.

Hits are reported as the index of the shape, or GROUND, or SKY. Distances are multiples of the ray's
direction.
"""

from typing import NamedTuple

import numpy as np

from .road import Waves
from .shapes import ShapeTable

GROUND, SKY = -1, -2
NEAR, FAR = 0.05, 600.0


class PackedScene(NamedTuple):
    """A scene as the tracers take it; the viewpoint is the origin, axes are the map's.

    Attributes:
        kind: int32 [n].
        numbers: float32 [n, 11]: centre x y z, cos, sin of yaw, half x y z, slope x y, bounding radius.
        waves: float32 [5, 3]: amplitude, kx, ky, phase at the viewpoint, and in [4, 0] the viewpoint's
            height, in [4, 1] the largest ground height, in [4, 2] its steepest slope.
    """

    kind: np.ndarray
    numbers: np.ndarray
    waves: np.ndarray


def pack_scene(table: ShapeTable, waves: Waves, viewpoint: np.ndarray) -> PackedScene:
    """Pack shapes and ground (map frame) for rays that start at ``viewpoint`` (map frame, float64 [3])."""
    columns = [table.centre - viewpoint, table.turn, table.half, table.slope, table.radius[:, None]]
    numbers = np.concatenate(columns, axis=1).astype(np.float32)
    phase = np.mod(waves.phase + waves.kx * viewpoint[0] + waves.ky * viewpoint[1], 2 * np.pi)
    steepest = float(np.sum(waves.amplitude * np.hypot(waves.kx, waves.ky)))
    last = [viewpoint[2], waves.amplitude.sum(), steepest]
    ground = np.stack([waves.amplitude, waves.kx, waves.ky, phase, last]).astype(np.float32)
    return PackedScene(np.ascontiguousarray(table.kind), np.ascontiguousarray(numbers), ground)
