"""Which voxels rays pass on their way to the first occupied one (numba, compiled on first use and cached)."""
import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def _mark_seen(occupied, origin, rays, seen):
    shape = occupied.shape
    for r in range(len(rays)):
        cell = np.empty(3, np.int64)
        step = np.empty(3, np.int64)
        ahead, stride = np.empty(3), np.empty(3)
        for a in range(3):
            cell[a] = int(np.floor(origin[a]))
            direction = rays[r, a]
            step[a] = 1 if direction > 0 else -1
            if direction == 0.0:
                ahead[a], stride[a] = np.inf, np.inf
            else:
                border = cell[a] + (1 if direction > 0 else 0)
                ahead[a], stride[a] = (border - origin[a]) / direction, abs(1.0 / direction)
        while 0 <= cell[0] < shape[0] and 0 <= cell[1] < shape[1] and 0 <= cell[2] < shape[2]:
            seen[cell[0], cell[1], cell[2]] = 1
            if occupied[cell[0], cell[1], cell[2]]:
                break
            a = 0
            if ahead[1] < ahead[a]:
                a = 1
            if ahead[2] < ahead[a]:
                a = 2
            cell[a] += step[a]
            ahead[a] += stride[a]


def mark_seen(occupied: np.ndarray, origin: np.ndarray, rays: np.ndarray, seen: np.ndarray) -> None:
    """Set ``seen`` to 1 in every voxel that a ray enters, up to and including its first occupied one.

    Args:
        occupied: bool [X, Y, Z].
        origin: float64 [3] in voxels from the grid's lower corner; rays from outside the grid see nothing.
        rays: float64 [n, 3] directions, none of them zero.
        seen: uint8 [X, Y, Z], changed in place.
    """
    _mark_seen(np.ascontiguousarray(occupied), np.asarray(origin, dtype=np.float64),
               np.ascontiguousarray(rays, dtype=np.float64), seen)
