"""Which voxels rays pass until something stops them (numba, compiled on first use and cached)."""

import math

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def _first_border(origin, direction):
    """Voxel index, step, distance to the next voxel border and between borders, along one axis."""
    cell = int(math.floor(origin))
    if direction > 0.0:
        return cell, 1, (cell + 1 - origin) / direction, 1.0 / direction
    if direction < 0.0:
        return cell, -1, (cell - origin) / direction, -1.0 / direction
    return cell, 0, math.inf, math.inf


@numba.njit(cache=True, nogil=True)
def _mark_seen(occupied, origin, rays, reach, seen):
    nx, ny, nz = occupied.shape
    for r in range(len(rays)):
        x, step_x, next_x, stride_x = _first_border(origin[0], rays[r, 0])
        y, step_y, next_y, stride_y = _first_border(origin[1], rays[r, 1])
        z, step_z, next_z, stride_z = _first_border(origin[2], rays[r, 2])
        entered = 0.0
        while entered <= reach[r] and 0 <= x < nx and 0 <= y < ny and 0 <= z < nz:
            seen[x, y, z] = 1
            if occupied[x, y, z]:
                break
            entered = min(next_x, next_y, next_z)
            if next_x <= next_y and next_x <= next_z:
                x += step_x
                next_x += stride_x
            elif next_y <= next_z:
                y += step_y
                next_y += stride_y
            else:
                z += step_z
                next_z += stride_z


def mark_seen(occupied: np.ndarray, origin: np.ndarray, rays: np.ndarray, reach: np.ndarray, seen: np.ndarray) -> None:
    """Set ``seen`` to 1 in every voxel that a ray enters, up to and including its first occupied one.

    Args:
        occupied: bool [X, Y, Z].
        origin: float64 [3] in voxels from the grid's lower corner; rays from outside the grid see nothing.
        rays: float64 [n, 3] unit vectors.
        reach: float64 [n], voxels that each ray goes at most.
        seen: uint8 [X, Y, Z], changed in place.
    """
    _mark_seen(
        np.ascontiguousarray(occupied),
        np.asarray(origin, dtype=np.float64),
        np.ascontiguousarray(rays, dtype=np.float64),
        np.ascontiguousarray(reach, dtype=np.float64),
        seen,
    )
