"""A slow ray caster in plain Python, written from the description of the evaluation alone."""

import math

import numpy as np

LARGEST = float(np.finfo(np.float64).max)


def cast_one(semantics, origin, direction, lower_corner, voxel_size, free_id):
    """(voxel (x, y, z), depth float32 in metres) of one ray through [X, Y, Z]."""
    size = np.float32(voxel_size)
    start, end = [], []
    for axis in range(3):
        tip = float(origin[axis]) + float(np.float32(direction[axis]))
        start.append(float(np.float32((float(origin[axis]) - lower_corner[axis]) / float(size))))
        end.append(float(np.float32((tip - lower_corner[axis]) / float(size))))
    ray = [e - s for s, e in zip(start, end)]
    length = math.sqrt(ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2])
    slope = [r / length for r in ray]
    cell = [math.trunc(s) for s in start]
    following, between = [], []
    for axis in range(3):
        if slope[axis] == 0:
            following.append(LARGEST)
            between.append(LARGEST)
        else:
            border = cell[axis] + (1 if slope[axis] > 0 else 0)
            following.append((border - start[axis]) / slope[axis])
            between.append(abs(1.0 / slope[axis]))
    found, distance = (0, 0, 0), -1.0
    for _ in range(1000):
        current = tuple(cell)
        inside = all(0 <= c < n for c, n in zip(current, semantics.shape))
        gone = any((c < 0 and s <= 0) or (c >= n and s >= 0) for c, s, n in zip(cell, slope, semantics.shape))
        if gone:
            break
        tx, ty, tz = following
        axis = (0 if tx < tz else 2) if tx < ty else (1 if ty < tz else 2)
        leaving = following[axis]
        cell[axis] += 1 if slope[axis] > 0 else -1
        following[axis] += between[axis]
        if inside:
            found, distance = current, leaving
            if semantics[current] != free_id:
                break
    return found, np.float32(distance) * size


def cast_all(semantics, origins, directions, lower_corner, voxel_size, free_id):
    """(label [M], depth float32 [M], voxel [M] row-major) of every direction from every origin."""
    ends = [
        cast_one(semantics, origin, direction, lower_corner, voxel_size, free_id)
        for origin in origins
        for direction in directions
    ]
    voxels = np.array([np.ravel_multi_index(voxel, semantics.shape) for voxel, _ in ends], dtype=np.int64)
    return semantics.reshape(-1)[voxels], np.array([depth for _, depth in ends], dtype=np.float32), voxels
