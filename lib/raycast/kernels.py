"""The traversal of the grid, compiled by Numba; ``csrc/traversal.h`` is the same in C++.

Amanatides and Woo, "A fast voxel traversal algorithm for ray tracing" (1987), in double precision. Results
of grazing rays hang on the order of operations, so both versions keep it, and neither may fuse or reorder:
no fastmath here, no fused multiply-add there.

Units: positions and distances in voxels from the grid's lower corner.
"""

import math

import numpy as np

from ..jit import inlined, jit

MIN_STEP_LIMIT = 1000
NEVER = np.finfo(np.float64).max  # "distance" to the next border along an axis the ray does not move along


@jit
def _to_voxels(position, range_min, voxel_size):
    """Metres to voxels along one axis; computed in double, kept in single precision as published."""
    # np.float64: float() of a float32 stays in single precision here
    return np.float64(np.float32((position - range_min) / voxel_size))


@jit
def _axis(start, slope):
    """Voxel, step (+1 or -1), distance to the first border and between borders, along one axis."""
    cell = int(start)  # towards zero: a start in (-1, 0) counts as inside the first voxel
    if slope == 0.0:
        return cell, 1, NEVER, NEVER
    step = 1 if slope > 0.0 else -1
    border = cell + 1 if step > 0 else cell
    return cell, step, (border - start) / slope, step / slope


@jit
def _leaves(cell, step, size):
    """The voxel lies outside along this axis and the ray moves away."""
    return (cell < 0 and step < 0) or (cell >= size and step > 0)


@jit
def _voxels_left(cell, step, size):
    """Voxels between this one and the side of the grid the ray moves to."""
    return size - 1 - cell if step > 0 else cell


@jit
def _enter(x, y, z, step_x, step_y, step_z, tx, ty, tz, dx, dy, dz, size_x, size_y, size_z, limit):
    """Walk from outside to the first voxel inside: it, the next distances and the steps left (0: never)."""
    while limit > 0:
        if 0 <= x < size_x and 0 <= y < size_y and 0 <= z < size_z:
            break
        if _leaves(x, step_x, size_x) or _leaves(y, step_y, size_y) or _leaves(z, step_z, size_z):
            return x, y, z, tx, ty, tz, 0
        if tx < ty and tx < tz:
            x += step_x
            tx += dx
        elif ty <= tx and ty < tz:
            y += step_y
            ty += dy
        else:
            z += step_z
            tz += dz
        limit -= 1
    return x, y, z, tx, ty, tz, limit


@jit
def _record(slot, hits, voxel, depth, voxel_out, distance_out):
    for volume in range(voxel_out.shape[0]):
        if (hits >> volume) & 1:
            voxel_out[volume, slot] = voxel
            distance_out[volume, slot] = depth


@inlined
def _walk(
    cells,
    voxel,
    jump_x,
    jump_y,
    step_z,
    left_x,
    left_y,
    left_z,
    tx,
    ty,
    tz,
    dx,
    dy,
    dz,
    steps_left,
    pending,
    slot,
    metres,
    voxel_out,
    distance_out,
):
    """Walk inside the grid from ``voxel`` until all pending volumes were hit or the ray leaves; record it."""
    here, t = voxel, 0.0
    for _ in range(steps_left):
        t = min(tx, ty)
        hits = cells[np.uint64(voxel)] & pending  # unsigned: no check for indices from the end
        if hits:
            _record(slot, hits, voxel, np.float32(min(t, tz)) * metres, voxel_out, distance_out)
            pending ^= hits
            if pending == 0:
                return
        here = voxel
        if t < tz:
            if tx < ty:
                voxel += jump_x
                left_x -= 1
                tx += dx
                if left_x < 0:
                    break
            else:
                voxel += jump_y
                left_y -= 1
                ty += dy
                if left_y < 0:
                    break
        else:
            t = tz
            voxel += step_z
            left_z -= 1
            tz += dz
            if left_z < 0:
                break
    _record(slot, pending, here, np.float32(t) * metres, voxel_out, distance_out)


@jit
def trace_rays(occupied, origins, directions, range_min, voxel_size, rays, first, last, voxel_out, distance_out):
    """Cast ``rays[first:last]`` through all volumes at once; the path is the same for each.

    Args:
        occupied: uint8 [X, Y, Z], bit v set where volume v is not free.
        origins: float64 [O, 3], directions: float32 [R, 3], range_min: float64 [3], metres.
        voxel_size: metres, a float32 value.
        rays: int32 [M], ray o * R + r goes from origin o in direction r.
        voxel_out: int32 [V, M], row-major voxel each ray ends in.
        distance_out: float32 [V, M], metres, where the ray leaves that voxel.
    """
    size_x, size_y, size_z = occupied.shape
    cells = occupied.reshape(-1)
    all_volumes = (1 << voxel_out.shape[0]) - 1
    step_limit = max(MIN_STEP_LIMIT, size_x + size_y + size_z)
    metres = np.float32(voxel_size)
    for slot in range(first, last):
        o = rays[slot] // directions.shape[0]
        r = rays[slot] - o * directions.shape[0]
        start_x = _to_voxels(origins[o, 0], range_min[0], voxel_size)
        start_y = _to_voxels(origins[o, 1], range_min[1], voxel_size)
        start_z = _to_voxels(origins[o, 2], range_min[2], voxel_size)
        ray_x = _to_voxels(origins[o, 0] + directions[r, 0], range_min[0], voxel_size) - start_x
        ray_y = _to_voxels(origins[o, 1] + directions[r, 1], range_min[1], voxel_size) - start_y
        ray_z = _to_voxels(origins[o, 2] + directions[r, 2], range_min[2], voxel_size) - start_z
        length = math.sqrt(ray_x * ray_x + ray_y * ray_y + ray_z * ray_z)
        x, step_x, tx, dx = _axis(start_x, ray_x / length)
        y, step_y, ty, dy = _axis(start_y, ray_y / length)
        z, step_z, tz, dz = _axis(start_z, ray_z / length)
        x, y, z, tx, ty, tz, steps_left = _enter(
            x, y, z, step_x, step_y, step_z, tx, ty, tz, dx, dy, dz, size_x, size_y, size_z, step_limit
        )
        if steps_left == 0:
            _record(slot, all_volumes, 0, np.float32(-1.0) * metres, voxel_out, distance_out)
            continue
        _walk(
            cells,
            (x * size_y + y) * size_z + z,
            step_x * size_y * size_z,
            step_y * size_z,
            step_z,
            _voxels_left(x, step_x, size_x),
            _voxels_left(y, step_y, size_y),
            _voxels_left(z, step_z, size_z),
            tx,
            ty,
            tz,
            dx,
            dy,
            dz,
            steps_left,
            all_volumes,
            slot,
            metres,
            voxel_out,
            distance_out,
        )
