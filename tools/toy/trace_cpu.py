"""Ray tracing of shapes and ground on the CPU (numba, compiled on first use and cached).

``trace_image`` tests each shape only against the pixels of its image bounds, ``trace_fan`` only against the
columns of a scan that may meet it; ``trace_rays`` takes any bundle of rays from one point. All report a
distance t (the hit is t * direction) and a hit index.
"""

import math
from typing import Tuple

import numba
import numpy as np

from .shapes import BOX, CONE, ELLIPSOID
from .trace import FAR, GROUND, NEAR, SKY, PackedScene

_jit = numba.njit(cache=True, nogil=True, fastmath=False)
_MISS = 1e30


@_jit
def _hit_box(ox, oy, oz, dx, dy, dz, hx, hy, hz, ax, ay):
    """Convex body of six planes: |x| <= hx - ax (z + hz), the same for y, |z| <= hz."""
    enter, leave = -_MISS, _MISS
    lx, ly = hx - ax * hz, hy - ay * hz
    for plane in range(6):
        sign = 1.0 if plane % 2 == 0 else -1.0
        if plane < 2:
            speed, gap = sign * dx + ax * dz, lx - (sign * ox + ax * oz)
        elif plane < 4:
            speed, gap = sign * dy + ay * dz, ly - (sign * oy + ay * oz)
        else:
            speed, gap = sign * dz, hz - sign * oz
        if speed == 0.0:
            if gap < 0.0:
                return _MISS
        elif speed < 0.0:
            enter = max(enter, gap / speed)
        else:
            leave = min(leave, gap / speed)
    return enter if enter < leave and enter > 0.0 else _MISS


@_jit
def _hit_ellipsoid(ox, oy, oz, dx, dy, dz, hx, hy, hz):
    ox, oy, oz, dx, dy, dz = ox / hx, oy / hy, oz / hz, dx / hx, dy / hy, dz / hz
    a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1.0
    root = b * b - a * c
    if root <= 0.0:
        return _MISS
    t = (-b - math.sqrt(root)) / a
    return t if t > 0.0 else _MISS


@_jit
def _hit_cone(ox, oy, oz, dx, dy, dz, radius, hz, lean):
    """Upright truncated cone: |xy| <= radius - lean (z + hz), |z| <= hz; a cylinder with lean 0."""
    best = _MISS
    top = radius - lean * hz - lean * oz
    a = dx * dx + dy * dy - lean * lean * dz * dz
    b = ox * dx + oy * dy + lean * top * dz
    c = ox * ox + oy * oy - top * top
    root = b * b - a * c
    if root > 0.0 and a != 0.0:
        root = math.sqrt(root)
        for sign in (-1.0, 1.0):
            t = (-b + sign * root) / a
            z = oz + t * dz
            if 0.0 < t < best and abs(z) <= hz and top - lean * t * dz >= 0.0:
                best = t
    if dz != 0.0:
        for sign in (-1.0, 1.0):
            t = (sign * hz - oz) / dz
            x, y, r = ox + t * dx, oy + t * dy, radius - lean * (sign * hz + hz)
            if 0.0 < t < best and x * x + y * y <= r * r:
                best = t
    return best


@_jit
def _hit_shape(kind, s, dx, dy, dz):
    """Distance to shape ``s`` (its row of numbers) from the origin along (dx, dy, dz); _MISS if none."""
    c, n = float(s[3]), float(s[4])
    ox, oy, oz = -(c * s[0] + n * s[1]), n * s[0] - c * s[1], -float(s[2])
    lx, ly = c * dx + n * dy, c * dy - n * dx
    if kind == BOX:
        return _hit_box(ox, oy, oz, lx, ly, dz, s[5], s[6], s[7], s[8], s[9])
    if kind == ELLIPSOID:
        return _hit_ellipsoid(ox, oy, oz, lx, ly, dz, s[5], s[6], s[7])
    if kind == CONE:
        return _hit_cone(ox, oy, oz, lx, ly, dz, s[5], s[7], s[8])
    return _hit_cone(ox, oz, oy, lx, dz, ly, s[5], s[6], 0.0)


@_jit
def _hit_ground(waves, dx, dy, dz, limit):
    """Distance to the ground, in steps that cannot overshoot, to a hair above it. _MISS beyond ``limit``."""
    height, highest, steepest = waves[4, 0], waves[4, 1], waves[4, 2]
    t = 0.0
    if height > highest:
        if dz >= 0.0:
            return _MISS
        t = (highest - height) / dz
    rate = steepest * math.sqrt(dx * dx + dy * dy) - dz
    if rate <= 0.0:
        return _MISS
    for _ in range(64):
        if t > limit:
            return _MISS
        ground = 0.0
        for k in range(3):
            ground += waves[0, k] * math.sin(t * (waves[1, k] * dx + waves[2, k] * dy) + waves[3, k])
        gap = height + t * dz - ground
        if gap < 0.001 + 1e-4 * t:
            return t
        t += gap / rate
    return t


@_jit
def _bounds(s, rotation, fx, fy, cx, cy, width, height, near):
    """Pixels (column from, to, row from, to; ends excluded) that may see shape ``s``; empty if none."""
    corner = np.empty((8, 3))
    for k in range(8):
        x = s[5] if k & 1 else -s[5]
        y = s[6] if k & 2 else -s[6]
        z = s[7] if k & 4 else -s[7]
        wx, wy, wz = s[0] + s[3] * x - s[4] * y, s[1] + s[4] * x + s[3] * y, s[2] + z
        for a in range(3):
            corner[k, a] = rotation[0, a] * wx + rotation[1, a] * wy + rotation[2, a] * wz
    left, right, top, bottom = _MISS, -_MISS, _MISS, -_MISS
    for k in range(8):
        for bit in (1, 2, 4):
            other = k ^ bit
            if corner[k, 2] < near and corner[other, 2] < near:
                continue
            px, py, pz = corner[k, 0], corner[k, 1], corner[k, 2]
            if pz < near:
                share = (near - pz) / (corner[other, 2] - pz)
                px, py, pz = px + share * (corner[other, 0] - px), py + share * (corner[other, 1] - py), near
            u, v = fx * px / pz + cx, fy * py / pz + cy
            left, right, top, bottom = min(left, u), max(right, u), min(top, v), max(bottom, v)
    if left > right:
        return 0, 0, 0, 0
    return (
        int(max(left - 1.0, 0.0)),
        int(min(max(right + 1.0, 0.0), width)),
        int(max(top - 1.0, 0.0)),
        int(min(max(bottom + 1.0, 0.0), height)),
    )


@_jit
def _trace_image(kind, numbers, waves, rotation, fx, fy, cx, cy, ground, distance, hit):
    height, width = distance.shape
    distance[:] = FAR
    hit[:] = SKY
    nearest = -numbers[:, 10].astype(np.float64)
    for a in range(3):
        nearest = nearest + rotation[a, 2] * numbers[:, a]
    for i in np.argsort(nearest):  # front to back, so that hidden shapes are skipped
        s = numbers[i]
        c0, c1, r0, r1 = _bounds(s, rotation, fx, fy, cx, cy, width, height, NEAR)
        for r in range(r0, r1):
            v = (r + 0.5 - cy) / fy
            for c in range(c0, c1):
                if distance[r, c] < nearest[i]:
                    continue
                u = (c + 0.5 - cx) / fx
                t = _hit_shape(
                    kind[i],
                    s,
                    rotation[0, 0] * u + rotation[0, 1] * v + rotation[0, 2],
                    rotation[1, 0] * u + rotation[1, 1] * v + rotation[1, 2],
                    rotation[2, 0] * u + rotation[2, 1] * v + rotation[2, 2],
                )
                if t < distance[r, c]:
                    distance[r, c] = t
                    hit[r, c] = i
    if not ground:
        return
    for r in range(height):
        v = (r + 0.5 - cy) / fy
        for c in range(width):
            u = (c + 0.5 - cx) / fx
            t = _hit_ground(
                waves,
                rotation[0, 0] * u + rotation[0, 1] * v + rotation[0, 2],
                rotation[1, 0] * u + rotation[1, 1] * v + rotation[1, 2],
                rotation[2, 0] * u + rotation[2, 1] * v + rotation[2, 2],
                distance[r, c],
            )
            if t < distance[r, c]:
                distance[r, c] = t
                hit[r, c] = GROUND


def trace_image(
    scene: PackedScene, rotation: np.ndarray, intrinsic: np.ndarray, size: Tuple[int, int], ground: bool = True
) -> Tuple[np.ndarray, np.ndarray]:
    """What every pixel of a camera at the scene's viewpoint sees.

    Args:
        scene: packed for the camera's position.
        rotation: float64 [3, 3], camera frame to map axes.
        intrinsic: float64 [3, 3].
        size: (width, height).
        ground: look for the ground too.

    Returns:
        depth float32 [height, width] along the optical axis, metres (FAR: nothing hit), and hit int32
        [height, width]: index of the shape, GROUND or SKY.
    """
    distance, hit = np.empty(size[::-1], dtype=np.float32), np.empty(size[::-1], dtype=np.int32)
    rotation = np.ascontiguousarray(rotation, dtype=np.float64)
    fx, fy, cx, cy = (float(intrinsic[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
    _trace_image(scene.kind, scene.numbers, scene.waves, rotation, fx, fy, cx, cy, ground, distance, hit)
    return distance, hit


@_jit
def _trace_fan(kind, numbers, waves, axes, directions, limit, distance, hit):
    columns, rings = distance.shape
    distance[:] = limit
    hit[:] = SKY
    for i in range(len(kind)):
        s = numbers[i]
        x = axes[0, 0] * s[0] + axes[1, 0] * s[1] + axes[2, 0] * s[2]
        y = axes[0, 1] * s[0] + axes[1, 1] * s[1] + axes[2, 1] * s[2]
        across = math.sqrt(x * x + y * y)
        first, count = 0, columns
        if across > s[10]:
            per_radian = columns / (2 * math.pi)
            middle, reach = math.atan2(y, x) * per_radian, math.asin(s[10] / across) * per_radian
            first = int(math.floor(middle - reach))
            count = min(int(math.ceil(middle + reach)) - first + 1, columns)
        square = s[0] * s[0] + s[1] * s[1] + s[2] * s[2] - s[10] * s[10]
        for k in range(first, first + count):
            column = k % columns
            for r in range(rings):
                dx, dy, dz = directions[column, r, 0], directions[column, r, 1], directions[column, r, 2]
                along = s[0] * dx + s[1] * dy + s[2] * dz
                if along * along < square or along - s[10] > distance[column, r]:
                    continue
                t = _hit_shape(kind[i], s, dx, dy, dz)
                if t < distance[column, r]:
                    distance[column, r], hit[column, r] = t, i
    for column in range(columns):
        for r in range(rings):
            dx, dy, dz = directions[column, r, 0], directions[column, r, 1], directions[column, r, 2]
            t = _hit_ground(waves, dx, dy, dz, distance[column, r])
            if t < distance[column, r]:
                distance[column, r], hit[column, r] = t, GROUND


def trace_fan(
    scene: PackedScene, axes: np.ndarray, directions: np.ndarray, limit: float
) -> Tuple[np.ndarray, np.ndarray]:
    """What the rays of a turning scanner at the scene's viewpoint meet within ``limit`` metres.

    Args:
        axes: float64 [3, 3], scanner frame to map axes.
        directions: float64 [columns, rings, 3] unit vectors, map axes; the rays of column k point at azimuth
            2 pi k / columns of the scanner frame.

    Returns:
        distance float64 [columns, rings], metres (``limit`` where nothing is hit), and hit int32 of that
        shape.
    """
    distance, hit = np.empty(directions.shape[:2]), np.empty(directions.shape[:2], dtype=np.int32)
    _trace_fan(
        scene.kind,
        scene.numbers,
        scene.waves,
        np.ascontiguousarray(axes, dtype=np.float64),
        np.ascontiguousarray(directions, dtype=np.float64),
        float(limit),
        distance,
        hit,
    )
    return distance, hit


@_jit
def _trace_rays(kind, numbers, waves, directions, limit, distance, hit):
    n = len(kind)
    near = np.empty(n)  # as one pass over plain columns, which the compiler tests several of at once
    x, y, z, radius = numbers[:, 0].copy(), numbers[:, 1].copy(), numbers[:, 2].copy(), numbers[:, 10].copy()
    beyond, reach = x * x + y * y + z * z, radius * radius
    for r in range(len(directions)):
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        best, index = limit, SKY
        for i in range(n):
            along = x[i] * dx + y[i] * dy + z[i] * dz
            met = (along >= -radius[i]) & (beyond[i] - along * along <= reach[i])
            near[i] = along - radius[i] if met else _MISS
        for i in range(n):
            if near[i] > best:
                continue
            t = _hit_shape(kind[i], numbers[i], dx, dy, dz)
            if t < best:
                best, index = t, i
        t = _hit_ground(waves, dx, dy, dz, best)
        if t < best:
            best, index = t, GROUND
        distance[r], hit[r] = best, index


def trace_rays(scene: PackedScene, directions: np.ndarray, limit: float = FAR) -> Tuple[np.ndarray, np.ndarray]:
    """What rays from the scene's viewpoint meet within ``limit`` metres.

    Args:
        directions: float64 [n, 3] unit vectors, map axes.

    Returns:
        distance float64 [n], metres (``limit`` where nothing is hit), and hit int32 [n].
    """
    distance, hit = np.empty(len(directions)), np.empty(len(directions), dtype=np.int32)
    _trace_rays(
        scene.kind,
        scene.numbers,
        scene.waves,
        np.ascontiguousarray(directions, dtype=np.float64),
        float(limit),
        distance,
        hit,
    )
    return distance, hit
