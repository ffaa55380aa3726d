"""The traversal of the grid, compiled by Numba; ``csrc/traversal.h`` is the same in C++.

Amanatides and Woo, "A fast voxel traversal algorithm for ray tracing" (1987), in double precision. Results
of grazing rays hang on the order of operations, so both versions keep it, and neither may fuse or reorder:
no fastmath here, no fused multiply-add there.

A batch of rays, the lanes, takes its steps together in loops without branches, which LLVM turns into vector
instructions. The state of the lanes is one array: at constant distances in it LLVM sees that its rows do not
overlap, and with unsigned indices that none is counted from the end.

Units: positions and distances in voxels from the grid's lower corner. X, Y, Z the grid, V volumes, O origins,
R directions, M = O * R rays.
"""

import math

import numpy as np

from ..extension import jit

LANES = 384
MAX_VOLUMES = 7
BORDER = 128  # bit of the cells around the grid
MIN_STEP_LIMIT = 1000
NEVER = np.finfo(np.float64).max  # "distance" to the next border along an axis the ray does not move along
_STRIDE = 16  # steps between looks for rays that have ended
_ROWS = 13
# Rows of the state, float64 [LANES] each. Along each axis: distance to the next border, distance between
# borders, difference of the cell's index. Then the cell that the ray is in; 1 while it moves, 0 once it has
# met something; the cell that it left last, and where.
_TX, _TY, _TZ, _DX, _DY, _DZ, _JX, _JY, _JZ, _CELL, _MOVES, _LEFT_CELL, _LEFT_AT = (
    np.uint64(row * LANES) for row in range(_ROWS)
)


@jit
def mark_occupied(volume, free_id, bit, cells):
    """Set ``bit`` in ``cells``, uint8 [X + 2, Y + 2, Z + 2], inside of which ``volume`` [X, Y, Z] is not free."""
    for x in range(volume.shape[0]):
        for y in range(volume.shape[1]):
            for z in range(volume.shape[2]):
                cells[x + 1, y + 1, z + 1] |= np.uint8(bit if volume[x, y, z] != free_id else 0)


@jit
def trace_rays(cells, starts, origins, directions, range_min, voxel_size, first, last, voxel_out, distance_out):
    """Cast the rays ``first`` to ``last`` through all volumes at once; the path is the same for each.

    Args:
        cells: uint8 [X + 2, Y + 2, Z + 2], bit v set where volume v is not free, ``BORDER`` around the grid.
        starts: float64 [O, 3], the origins in voxels, rounded to float32 as published.
        origins: float64 [O, 3], directions: float32 [R, 3], range_min: float64 [3], metres.
        voxel_size: metres, a float32 value.
        first, last: ray o * R + r goes from origin o in direction r.
        voxel_out: int32 [V, M], row-major voxel of [X, Y, Z] that each ray ends in.
        distance_out: float32 [V, M], metres, where the ray leaves that voxel.
    """
    flat = cells.reshape(-1)
    state = np.empty(_ROWS * LANES)
    watch = np.empty(LANES, dtype=np.uint8)  # BORDER and the bits of the volumes still to be hit
    slot = np.empty(LANES, dtype=np.int64)
    steps = np.empty(LANES, dtype=np.int64)  # that may still be taken
    metres = np.float32(voxel_size)
    volumes = (1 << len(voxel_out)) - 1
    while first < last:
        count = np.uint64(min(LANES, last - first))
        _aim(state, count, starts, origins, directions, range_min, voxel_size, first, cells.shape)
        fewest = _enter(state, watch, steps, slot, count, starts, directions.shape[0], first, cells.shape, volumes)
        # Steps of a ray that may run out of them are counted one by one.
        stride = _STRIDE if fewest > _size_sum(cells.shape) + _STRIDE * MAX_VOLUMES else 1
        first += LANES
        _look(state, watch, flat, count)
        count = _collect(state, watch, steps, slot, count, 0, cells, metres, voxel_out, distance_out)
        while count > 0:
            for _ in range(stride):
                _advance(state, count)
                _look(state, watch, flat, count)
            count = _collect(state, watch, steps, slot, count, stride, cells, metres, voxel_out, distance_out)


@jit
def _size_sum(shape):
    return shape[0] + shape[1] + shape[2] - 6


@jit
def _to_voxels(position, range_min, voxel_size):
    """Metres to voxels along one axis; computed in double, kept in single precision as published."""
    # np.float64: float() of a float32 stays in single precision here
    return np.float64(np.float32((position - range_min) / voxel_size))


@jit
def _aim(state, count, starts, origins, directions, range_min, voxel_size, first, shape):
    """Direct the lanes along the rays from ``first`` on."""
    o = first // directions.shape[0]
    r = first - o * directions.shape[0]
    for lane in range(count):
        for axis in range(3):
            row = np.uint64(axis * LANES)
            state[_TX + row + lane] = origins[o, axis] + directions[r, axis]
            state[_DX + row + lane] = starts[o, axis]
        r += 1
        if r == directions.shape[0]:
            o, r = o + 1, 0
    low_x, low_y, low_z = range_min[0], range_min[1], range_min[2]
    for lane in range(count):
        x = _to_voxels(state[_TX + lane], low_x, voxel_size) - state[_DX + lane]
        y = _to_voxels(state[_TY + lane], low_y, voxel_size) - state[_DY + lane]
        z = _to_voxels(state[_TZ + lane], low_z, voxel_size) - state[_DZ + lane]
        length = math.sqrt(x * x + y * y + z * z)
        state[_TX + lane], state[_TY + lane], state[_TZ + lane] = x / length, y / length, z / length
    _aim_along(state, count, np.uint64(0), np.float64(shape[1] * shape[2]))
    _aim_along(state, count, np.uint64(LANES), np.float64(shape[2]))
    _aim_along(state, count, np.uint64(2 * LANES), 1.0)


@jit
def _aim_along(state, count, axis, jump):
    """Distances and step along one axis, from the direction and the start that the rows hold."""
    for lane in range(count):
        slope, start = state[_TX + axis + lane], state[_DX + axis + lane]
        step = 1.0 if slope >= 0.0 else -1.0
        border = np.trunc(start) + (1.0 if slope >= 0.0 else 0.0)
        state[_TX + axis + lane] = (border - start) / slope if slope != 0.0 else NEVER
        state[_DX + axis + lane] = step / slope if slope != 0.0 else NEVER
        state[_JX + axis + lane] = step * jump


@jit
def _enter(state, watch, steps, slot, count, starts, num_directions, first, shape, volumes):
    """Put the lanes into their first cells inside the grid; the fewest steps that one of them has left.

    A ray that never comes inside gets the very first cell, outside the grid, to have left it at -1.
    """
    limit = max(MIN_STEP_LIMIT, _size_sum(shape))
    fewest, o, r = limit, first // num_directions, first % num_directions
    for lane in range(count):
        slot[lane], steps[lane], watch[lane] = first, limit, BORDER | volumes
        # towards zero: a start in (-1, 0) counts as inside the first voxel
        x, y, z = int(starts[o, 0]), int(starts[o, 1]), int(starts[o, 2])
        if not (0 <= x < shape[0] - 2 and 0 <= y < shape[1] - 2 and 0 <= z < shape[2] - 2):
            x, y, z, steps[lane] = _walk_inside(state, lane, x, y, z, shape, limit)
            if steps[lane] == 0:
                x, y, z, steps[lane] = -1, -1, -1, limit
            fewest = min(fewest, steps[lane])
        state[_CELL + lane] = state[_LEFT_CELL + lane] = ((x + 1) * shape[1] + y + 1) * shape[2] + z + 1
        state[_MOVES + lane], state[_LEFT_AT + lane] = 1.0, -1.0
        first, r = first + 1, r + 1
        if r == num_directions:
            o, r = o + 1, 0
    return fewest


@jit
def _walk_inside(state, lane, x, y, z, shape, limit):
    """Walk one ray from outside to the first voxel inside: it, and the steps left (0: never)."""
    size_x, size_y, size_z = shape[0] - 2, shape[1] - 2, shape[2] - 2
    while limit > 0:
        if 0 <= x < size_x and 0 <= y < size_y and 0 <= z < size_z:
            break
        step_x, step_y, step_z = state[_JX + lane] > 0, state[_JY + lane] > 0, state[_JZ + lane] > 0
        if _leaves(x, step_x, size_x) or _leaves(y, step_y, size_y) or _leaves(z, step_z, size_z):
            return x, y, z, 0
        tx, ty, tz = state[_TX + lane], state[_TY + lane], state[_TZ + lane]
        if tx < ty and tx < tz:
            x += 1 if step_x else -1
            state[_TX + lane] += state[_DX + lane]
        elif ty <= tx and ty < tz:
            y += 1 if step_y else -1
            state[_TY + lane] += state[_DY + lane]
        else:
            z += 1 if step_z else -1
            state[_TZ + lane] += state[_DZ + lane]
        limit -= 1
    return x, y, z, limit


@jit
def _leaves(cell, upwards, size):
    """The voxel lies outside along this axis and the ray moves away."""
    return (cell < 0 and not upwards) or (cell >= size and upwards)


@jit
def _advance(state, count):
    """Take one step with every lane that moves. A step along an axis is a product with 1, no step one with 0."""
    for lane in range(count):
        tx, ty, tz = state[_TX + lane], state[_TY + lane], state[_TZ + lane]
        cell, left_cell, left_at = state[_CELL + lane], state[_LEFT_CELL + lane], state[_LEFT_AT + lane]
        moves = state[_MOVES + lane]
        t = min(tx, ty)
        in_plane = moves if t < tz else 0.0
        x = in_plane if tx < ty else 0.0
        y, z = in_plane - x, moves - in_plane
        state[_LEFT_AT + lane] = min(t, tz) if moves > 0.0 else left_at
        state[_LEFT_CELL + lane] = cell if moves > 0.0 else left_cell
        state[_CELL + lane] = cell + (state[_JX + lane] * x + state[_JY + lane] * y + state[_JZ + lane] * z)
        state[_TX + lane] = tx + state[_DX + lane] * x
        state[_TY + lane] = ty + state[_DY + lane] * y
        state[_TZ + lane] = tz + state[_DZ + lane] * z


@jit
def _look(state, watch, flat, count):
    """Stop the lanes that are in a cell that they watch for."""
    for lane in range(count):
        state[_MOVES + lane] = 0.0 if flat[np.uint64(np.int64(state[_CELL + lane]))] & watch[lane] else 1.0


@jit
def _collect(state, watch, steps, slot, count, taken, cells, voxel_size, voxel_out, distance_out):
    """Record what stopped lanes have met, close the gaps of those that have ended; the lanes left.

    Args:
        taken: steps since the last time.
    """
    flat = cells.reshape(-1)
    lane = np.uint64(0)
    while lane < count:
        steps[lane] -= taken
        if state[_MOVES + lane] > 0.0 and steps[lane] > 0:
            lane += np.uint64(1)
            continue
        met, wanted = np.int64(flat[np.uint64(np.int64(state[_CELL + lane]))]), np.int64(watch[lane])
        if met & BORDER or steps[lane] == 0:  # the ray ends where it was before
            met = wanted ^ BORDER
            cell, depth = state[_LEFT_CELL + lane], state[_LEFT_AT + lane]
        else:
            met &= wanted
            cell, depth = state[_CELL + lane], min(min(state[_TX + lane], state[_TY + lane]), state[_TZ + lane])
        voxel, distance = _voxel_of(np.uint64(cell), cells.shape), np.float32(depth) * voxel_size
        for volume in range(len(voxel_out)):
            if (met >> volume) & 1:
                voxel_out[volume, slot[lane]] = voxel
                distance_out[volume, slot[lane]] = distance
        watch[lane] = wanted ^ met
        if wanted ^ met != BORDER:
            state[_MOVES + lane] = 1.0
            lane += np.uint64(1)
            continue
        count -= np.uint64(1)
        for row in range(_ROWS):
            state[np.uint64(row * LANES) + lane] = state[np.uint64(row * LANES) + count]
        watch[lane], steps[lane], slot[lane] = watch[count], steps[count], slot[count]
    return count


@jit
def _voxel_of(cell, shape):
    """Row-major voxel of a cell; 0 for the first cell of all, which lies outside the grid."""
    size_y, size_z = np.uint64(shape[1]), np.uint64(shape[2])
    row = cell // size_z
    x = row // size_y
    y, z = row - x * size_y, cell - row * size_z
    return max(((np.int64(x) - 1) * (shape[1] - 2) + np.int64(y) - 1) * (shape[2] - 2) + np.int64(z) - 1, 0)
