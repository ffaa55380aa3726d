"""Ray tracing of shapes and ground with PyTorch tensors, for GPUs: the same hits as ``trace_cpu``.

All (shape, pixel) pairs that the shapes' image bounds allow are tested at once; each pixel keeps its nearest hit.
n: shapes, E: edges of their bounding boxes, Q: pairs, P: pixels.
"""
import itertools
from typing import NamedTuple, Tuple

import numpy as np
import torch

from .shapes import BOX, CONE, ELLIPSOID, WHEEL
from .trace import FAR, GROUND, NEAR, SKY, PackedScene

PAIRS_AT_ONCE = 1 << 22
_MISS = 1e30
_SAFE_STEPS, _NEWTON_STEPS = 8, 4      # on the way to the ground


class _Bounds(NamedTuple):
    """Pixels that may see each shape, int64 [n]: first column and row, number of columns and rows."""
    column: torch.Tensor
    row: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor


def trace_image(scene: PackedScene, rotation: np.ndarray, intrinsic: np.ndarray, size: Tuple[int, int],
                device: torch.device, ground: bool = True) -> Tuple[torch.Tensor, torch.Tensor]:
    """What every pixel of a camera at the scene's viewpoint sees.

    Args:
        scene: packed for the camera's position.
        rotation: float64 [3, 3], camera frame to map axes.
        intrinsic: float64 [3, 3].
        size: (width, height).
        device: where to trace.
        ground: look for the ground too.

    Returns:
        depth float32 [height, width] along the optical axis, metres (FAR: nothing hit), and hit int32
        [height, width]: index of the shape, GROUND or SKY; both on ``device``.
    """
    width, height = size
    numbers = torch.as_tensor(scene.numbers, device=device)
    kind = torch.as_tensor(scene.kind, device=device)
    turn = torch.as_tensor(rotation.astype(np.float32), device=device)
    fx, fy, cx, cy = (float(intrinsic[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
    u = (torch.arange(width, dtype=torch.float32, device=device) + (0.5 - cx)) / fx
    v = (torch.arange(height, dtype=torch.float32, device=device) + (0.5 - cy)) / fy
    rays = (u[None, :, None] * turn[:, 0] + v[:, None, None] * turn[:, 1] + turn[:, 2]).reshape(-1, 3)
    bounds = _bounds(numbers, turn, (fx, fy, cx, cy), size)
    nearest = torch.full((width * height,), _key(FAR, SKY), dtype=torch.int64, device=device)
    for chunk in _chunks((bounds.columns * bounds.rows).cpu()):
        _test_pairs(chunk.to(device), bounds, numbers, kind, rays, width, nearest)
    depth, hit = _unpack(nearest)
    if ground:
        depth, hit = _add_ground(scene.waves, rays, depth, hit)
    return depth.reshape(height, width), hit.reshape(height, width)


def _key(depth, index):
    """A positive depth and an index as one integer that sorts by depth."""
    return (int(np.float32(depth).view(np.int32)) << 32) | (index & 0xffffffff)


def _unpack(keys):
    index = (keys & 0xffffffff).to(torch.int32)     # wraps: SKY comes back negative
    return (keys >> 32).to(torch.int32).view(torch.float32), index


def _chunks(counts):
    """Indices of shapes in runs of at most about PAIRS_AT_ONCE pairs; shapes without pixels are left out."""
    seen = torch.nonzero(counts)[:, 0]
    run = torch.cumsum(counts[seen], 0) // PAIRS_AT_ONCE
    for number in range(int(run[-1]) + 1 if len(seen) else 0):
        yield seen[run == number]


def _bounds(numbers, turn, lens, size) -> _Bounds:
    """Image bounds of every shape's box; edges that cross the near plane are cut there."""
    fx, fy, cx, cy = lens
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), device=numbers.device)
    local = signs[None] * numbers[:, None, 5:8]
    cos, sin = numbers[:, 3, None], numbers[:, 4, None]
    placed = torch.stack([cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1],
                          local[..., 2]], dim=-1) + numbers[:, None, :3]
    corner = placed @ turn                                               # [n, 8, 3], camera frame
    ends = [(a, a ^ bit) for a in range(8) for bit in (1, 2, 4)]
    start, end = corner[:, [a for a, _ in ends]], corner[:, [b for _, b in ends]]
    behind, lost = start[..., 2] < NEAR, (start[..., 2] < NEAR) & (end[..., 2] < NEAR)
    share = torch.where(behind, (NEAR - start[..., 2]) / (end[..., 2] - start[..., 2]), torch.zeros_like(start[..., 2]))
    point = start + share[..., None] * (end - start)
    depth = point[..., 2].clamp(min=NEAR)
    column, row = fx * point[..., 0] / depth + cx, fy * point[..., 1] / depth + cy
    spans = []
    for values, limit in ((column, size[0]), (row, size[1])):
        low = values.masked_fill(lost, _MISS).amin(dim=1) - 1.0
        high = values.masked_fill(lost, -_MISS).amax(dim=1) + 1.0
        low, high = low.clamp(0, limit).long(), high.clamp(0, limit).long()
        spans.append((low, (high - low).clamp(min=0)))
    (column, columns), (row, rows) = spans
    return _Bounds(column, row, columns, rows)


def _test_pairs(shapes, bounds, numbers, kind, rays, width, nearest):
    """Test the pixels in the bounds of ``shapes`` (int64 indices) and keep the nearest hits in ``nearest``."""
    for code, intersect in _INTERSECT.items():
        chosen = shapes[kind[shapes] == code]
        if len(chosen) == 0:
            continue
        columns = bounds.columns[chosen]
        counts = columns * bounds.rows[chosen]
        which = torch.repeat_interleave(torch.arange(len(chosen), device=rays.device), counts)
        inner = torch.arange(len(which), device=rays.device) - (torch.cumsum(counts, 0) - counts)[which]
        shape, columns = chosen[which], columns[which]
        down = torch.div(inner, columns, rounding_mode='floor')
        pixel = (bounds.row[shape] + down) * width + bounds.column[shape] + inner - down * columns
        t = _hit(intersect, numbers[shape], rays[pixel])
        found = torch.nonzero(t < FAR)[:, 0]
        keys = (t[found].view(torch.int32).long() << 32) | shape[found]
        _keep_nearest(nearest, pixel[found], keys)


def _keep_nearest(nearest, pixel, keys):
    """nearest[pixel] = the smallest of itself and the keys given for it."""
    if hasattr(nearest, 'scatter_reduce_'):
        nearest.scatter_reduce_(0, pixel, keys, 'amin')
        return
    order = torch.argsort(keys, descending=True)        # PyTorch before 1.12: without ties, sort and take the last
    pixel, keys = pixel[order].cpu().numpy(), keys[order].cpu().numpy()
    best = nearest.cpu().numpy().copy()
    np.minimum.at(best, pixel, keys)
    nearest.copy_(torch.from_numpy(best))


def _hit(intersect, numbers, rays):
    """Distance [Q] along ``rays`` [Q, 3] to the shapes of ``numbers`` [Q, 11]; _MISS or more where they miss.

    Rays start, for the arithmetic, at their point nearest to the shape's centre, which keeps it exact far away.
    """
    centre = numbers[:, :3]
    nearby = (rays * centre).sum(dim=1) / (rays * rays).sum(dim=1)
    origin = rays * nearby[:, None] - centre
    cos, sin = numbers[:, 3], numbers[:, 4]
    o = (cos * origin[:, 0] + sin * origin[:, 1], cos * origin[:, 1] - sin * origin[:, 0], origin[:, 2])
    d = (cos * rays[:, 0] + sin * rays[:, 1], cos * rays[:, 1] - sin * rays[:, 0], rays[:, 2])
    t = intersect(o, d, numbers, -nearby)
    return t + nearby


def _hit_box(o, d, numbers, start):
    """Six planes: |x| <= hx - ax (z + hz), the same for y, |z| <= hz."""
    half, slope = numbers[:, 5:8], numbers[:, 8:10]
    zero = torch.zeros_like(slope[:, :1])
    lean = torch.cat([slope, zero], dim=1)
    along, across = torch.stack(d, dim=1), torch.stack(o, dim=1)
    tilt, size = lean * d[2][:, None], half - lean * (half[:, 2:] + o[2][:, None])
    speed = torch.cat([along + tilt, tilt - along], dim=1)               # [Q, 6], outward
    gap = torch.cat([size - across, size + across], dim=1)
    t = gap / torch.where(speed == 0, torch.full_like(speed, 1e-12), speed)
    entering = speed < 0
    enter = torch.maximum(t.masked_fill(~entering, -_MISS).amax(dim=1), start)
    leave = t.masked_fill(entering, _MISS).amin(dim=1)
    return torch.where((enter < leave) & (enter > start), enter, torch.full_like(enter, _MISS))


def _hit_ellipsoid(o, d, numbers, start):
    half = numbers[:, 5:8].unbind(dim=1)
    o, d = [x / h for x, h in zip(o, half)], [x / h for x, h in zip(d, half)]
    a, b = sum(x * x for x in d), sum(x * y for x, y in zip(o, d))
    root = b * b - a * (sum(x * x for x in o) - 1.0)
    t = (-b - torch.sqrt(root.clamp(min=0.0))) / a
    return torch.where((root > 0) & (t > start), t, torch.full_like(t, _MISS))


def _hit_cone(o, d, numbers, start):
    return _upright(o, d, numbers[:, 5], numbers[:, 7], numbers[:, 8], start)


def _hit_wheel(o, d, numbers, start):
    turned = lambda p: (p[0], p[2], p[1])  # noqa: E731
    return _upright(turned(o), turned(d), numbers[:, 5], numbers[:, 6], torch.zeros_like(start), start)


def _upright(o, d, radius, half_height, lean, start):
    """Truncated cone: |xy| <= radius - lean (z + half_height), |z| <= half_height."""
    best = torch.full_like(start, _MISS)
    top = radius - lean * (half_height + o[2])
    a = d[0] * d[0] + d[1] * d[1] - lean * lean * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + lean * top * d[2]
    root = b * b - a * (o[0] * o[0] + o[1] * o[1] - top * top)
    real, root = (root > 0) & (a != 0), torch.sqrt(root.clamp(min=0.0))
    for sign in (-1.0, 1.0):
        t = (-b + sign * root) / torch.where(a == 0, torch.ones_like(a), a)
        fits = real & (t > start) & (t < best) & ((o[2] + t * d[2]).abs() <= half_height) & (top - lean * t * d[2] >= 0)
        best = torch.where(fits, t, best)
    for sign in (-1.0, 1.0):
        t = (sign * half_height - o[2]) / torch.where(d[2] == 0, torch.full_like(start, 1e-12), d[2])
        x, y, r = o[0] + t * d[0], o[1] + t * d[1], radius - lean * half_height * (1 + sign)
        best = torch.where((t > start) & (t < best) & (x * x + y * y <= r * r), t, best)
    return best


_INTERSECT = {BOX: _hit_box, ELLIPSOID: _hit_ellipsoid, CONE: _hit_cone, WHEEL: _hit_wheel}


def _add_ground(waves, rays, depth, hit):
    """Depth and hits with the ground in: steps that cannot overshoot, then Newton's."""
    height, highest, steepest = (float(v) for v in waves[4])
    amplitude, kx, ky, phase = torch.as_tensor(waves[:4], device=rays.device)
    falls = rays[:, 2] * FAR < min(highest - height, 0.0)                # the others never get down to the hills
    fall = torch.where(falls, rays[:, 2], torch.full_like(depth, -1.0))
    t = ((highest - height) / fall).clamp(min=0.0)
    rate = steepest * rays[:, :2].norm(dim=1) - fall
    speed = rays[:, :1] * kx + rays[:, 1:2] * ky                         # [P, 3], phase per unit of t
    for step in range(_SAFE_STEPS + _NEWTON_STEPS):
        angle = t[:, None] * speed + phase
        gap = height + t * fall - (torch.sin(angle) * amplitude).sum(dim=1)
        if step >= _SAFE_STEPS:
            exact = (torch.cos(angle) * amplitude * speed).sum(dim=1) - fall
            rate = torch.where(exact > 0.3 * rate, exact, rate)         # not where the ray only grazes a hill
        t = (t + gap / rate).clamp(min=0.0, max=2 * FAR)
    nearer = falls & (t < depth)
    return torch.where(nearer, t, depth), torch.where(nearer, torch.full_like(hit, GROUND), hit)
