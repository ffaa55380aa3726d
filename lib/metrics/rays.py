"""Directions of the evaluation's rays: those of a LiDAR like nuScenes' with finer steps far away.

Directions do not depend on the volume: any grid and range is evaluated with the same rays.
"""

import math
from functools import lru_cache

import numpy as np

NUM_AZIMUTHS = 360
_GROUND_RINGS = 10  # rings that meet flat ground 1, 2, ... 10 sensor heights away
_TOP_PITCH = 0.21  # radians, upper edge of nuScenes' LiDAR


def ray_pitches():
    """Pitches above the horizon in radians, ascending (39 of them)."""
    pitches = [-(math.pi / 2 - math.atan(ring + 1)) for ring in range(_GROUND_RINGS)]
    while pitches[-1] < _TOP_PITCH:
        pitches.append(pitches[-1] + (pitches[-1] - pitches[-2]))
    return pitches


@lru_cache(maxsize=1)
def lidar_rays() -> np.ndarray:
    """Unit vectors float32 [39 * 360, 3], pitch by pitch, azimuths 0..359 degrees from x to y. Read-only."""
    azimuths = [math.radians(degrees) for degrees in range(NUM_AZIMUTHS)]
    around = np.array([(math.cos(a), math.sin(a)) for a in azimuths])
    up = np.array([(math.cos(p), math.sin(p)) for p in ray_pitches()])
    rays = np.empty((len(up), NUM_AZIMUTHS, 3), dtype=np.float32)
    rays[..., :2] = up[:, None, :1] * around[None]
    rays[..., 2] = up[:, None, 1]
    rays = rays.reshape(-1, 3)
    rays.setflags(write=False)
    return rays
