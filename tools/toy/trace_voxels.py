"""Points and rays in a grid of voxels (numba, compiled on first use and cached)."""

import math
from typing import NamedTuple

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
def _mark_passed(origin, rays, reach, seen):
    nx, ny, nz = seen.shape
    for r in range(len(rays)):
        x, step_x, next_x, stride_x = _first_border(origin[0], rays[r, 0])
        y, step_y, next_y, stride_y = _first_border(origin[1], rays[r, 1])
        z, step_z, next_z, stride_z = _first_border(origin[2], rays[r, 2])
        entered = 0.0
        while entered <= reach[r] and 0 <= x < nx and 0 <= y < ny and 0 <= z < nz:
            seen[x, y, z] = 1
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


def mark_passed(origin: np.ndarray, rays: np.ndarray, reach: np.ndarray, seen: np.ndarray) -> None:
    """Set ``seen`` to 1 in every voxel that a ray enters.

    Args:
        origin: float64 [3] in voxels from the grid's lower corner; rays from outside the grid see nothing.
        rays: float64 [n, 3] unit vectors.
        reach: float64 [n], voxels that each ray goes at most.
        seen: uint8 [X, Y, Z], changed in place.
    """
    _mark_passed(
        np.asarray(origin, dtype=np.float64),
        np.ascontiguousarray(rays, dtype=np.float64),
        np.ascontiguousarray(reach, dtype=np.float64),
        seen,
    )


@numba.njit(cache=True, nogil=True)
def _first_of_each(keys, keep):
    size = 16
    while size < 2 * len(keys):
        size *= 2
    table = np.full(size, -1, dtype=np.int64)
    for i in range(len(keys)):
        mixed = (keys[i] ^ (keys[i] >> 29)) * 0x5851F42D4C957F2D
        slot = (mixed ^ (mixed >> 32)) & (size - 1)
        while table[slot] >= 0 and keys[table[slot]] != keys[i]:
            slot = (slot + 1) & (size - 1)
        if table[slot] < 0:
            table[slot] = i
            keep[i] = True


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """bool [n]: which of the int64 keys [n] have not occurred before."""
    keep = np.zeros(len(keys), dtype=np.bool_)
    _first_of_each(np.ascontiguousarray(keys, dtype=np.int64), keep)
    return keep


@numba.njit(cache=True, nogil=True)
def _vote(points, first, to_grid, rank, shape, placed, cells, score, winner):
    count = np.zeros(shape[0] * shape[1] * shape[2], dtype=np.int32)
    for s in range(len(rank)):
        m = to_grid[s]
        for p in range(first[s], first[s + 1]):
            for a in range(3):
                placed[p, a] = m[a, 0] * points[p, 0] + m[a, 1] * points[p, 1] + m[a, 2] * points[p, 2] + m[a, 3]
            x, y, z = math.floor(placed[p, 0]), math.floor(placed[p, 1]), math.floor(placed[p, 2])
            cells[p] = -1
            if 0 <= x < shape[0] and 0 <= y < shape[1] and 0 <= z < shape[2]:
                cells[p] = (int(x) * shape[1] + int(y)) * shape[2] + int(z)
                count[cells[p]] += 1
        for p in range(first[s], first[s + 1]):
            cell = cells[p]
            if cell >= 0 and count[cell] > 0:
                mine = (rank[s] << 24) + count[cell]
                if mine > score[cell]:
                    score[cell] = mine
                    winner[cell] = s
                count[cell] = 0


class Votes(NamedTuple):
    """Points sorted into voxels.

    Attributes:
        placed: float32 [n, 3], the points in voxels from the grid's lower corner.
        cells: int32 [n], the flat index of each point's voxel; -1 outside the grid.
        winner: int32 [X, Y, Z], the source that each voxel belongs to; -1 where no point lies.
    """

    placed: np.ndarray
    cells: np.ndarray
    winner: np.ndarray


def vote(points: np.ndarray, first: np.ndarray, to_grid: np.ndarray, rank: np.ndarray, shape) -> Votes:
    """Give each voxel to the source of highest rank with a point in it; among equals to that with most points.

    Args:
        points: float32 [n, 3], sorted by source.
        first: int64 [S + 1], where each of the S sources begins.
        to_grid: float64 [S, 3, 4], from each source's frame to voxels from the grid's lower corner.
        rank: int64 [S].
        shape: (X, Y, Z).
    """
    placed, cells = np.empty((len(points), 3), np.float32), np.empty(len(points), np.int32)
    score, winner = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    _vote(points, first, to_grid, rank, tuple(shape), placed, cells, score.reshape(-1), winner.reshape(-1))
    return Votes(placed, cells, winner)


@numba.njit(cache=True, nogil=True)
def _in_view(x, y, z, to_image, depth, slack):
    """Does any of the cameras see a point?"""
    for c in range(len(depth)):
        m = to_image[c]
        ahead = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]
        if ahead < 0.1:
            continue
        u = math.floor((m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]) / ahead)
        v = math.floor((m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]) / ahead)
        if 0 <= v < depth.shape[1] and 0 <= u < depth.shape[2] and ahead <= depth[c, int(v), int(u)] + slack:
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _mark_in_view(placed, cells, winner, to_image, depth, slack, seen):
    flat = seen.reshape(-1)
    for p in range(len(cells)):
        if cells[p] < 0 or flat[cells[p]] > 0:
            continue
        if _in_view(placed[p, 0], placed[p, 1], placed[p, 2], to_image, depth, slack[0]):
            flat[cells[p]] = 1
    for x in range(seen.shape[0]):
        for y in range(seen.shape[1]):
            for z in range(seen.shape[2]):
                if winner[x, y, z] < 0 and _in_view(x + 0.5, y + 0.5, z + 0.5, to_image, depth, slack[1]):
                    seen[x, y, z] = 1


def mark_in_view(votes: Votes, to_image: np.ndarray, depth: np.ndarray, slack) -> np.ndarray:
    """Voxels that cameras see: occupied ones with a point that is not behind what the camera meets, free ones
    whose centre is not.

    Args:
        to_image: float64 [C, 3, 4], from voxels to (column, row, 1) times the depth in metres.
        depth: float32 [C, height, width], metres along the optical axis of what the cameras meet.
        slack: metres that (points, centres) may lie behind it.

    Returns:
        uint8 [X, Y, Z].
    """
    seen = np.zeros(votes.winner.shape, np.uint8)
    _mark_in_view(votes.placed, votes.cells, votes.winner, to_image, depth, np.asarray(slack, dtype=np.float64), seen)
    return seen
