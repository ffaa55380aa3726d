"""Ray tracing of shapes and ground with PyTorch tensors, for GPUs: the same hits as ``trace_cpu``.

All (shape, pixel) pairs that the shapes' image bounds allow are tested at once, for several cameras together,
because a GPU's time goes into starting kernels; each pixel keeps its nearest hit. C: cameras, n: shapes of
all of them, Q: pairs, P: pixels of all cameras.
"""

import itertools
from typing import NamedTuple, Sequence, Tuple

import numpy as np
import torch

from .shapes import BOX, CONE, ELLIPSOID, WHEEL
from .trace import FAR, GROUND, NEAR, SKY, PackedScene

PAIRS_AT_ONCE = 1 << 23
_MISS = 1e30
_SAFE_STEPS, _NEWTON_STEPS = 8, 4  # on the way to the ground


class _Lenses(NamedTuple):
    """The cameras, float32: turn [C, 3, 3] camera frame to map axes; focal, centre [C, 2] (x, y), pixels."""

    turn: torch.Tensor
    focal: torch.Tensor
    centre: torch.Tensor


class _Shapes(NamedTuple):
    """Shapes of all cameras: numbers float32 [n, 11] (see ``trace``), kind int32 [n], camera int64 [n]."""

    numbers: torch.Tensor
    kind: torch.Tensor
    camera: torch.Tensor


class _Bounds(NamedTuple):
    """Pixels that may see each shape, int64 [n]: first column and row, number of columns and rows."""

    column: torch.Tensor
    row: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor


def trace_images(
    scenes: Sequence[PackedScene],
    rotations: Sequence[np.ndarray],
    intrinsics: Sequence[np.ndarray],
    size: Tuple[int, int],
    device: torch.device,
    ground: bool = True,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """What every pixel of C cameras sees.

    Args:
        scenes: packed for each camera's position; one ground for all.
        rotations: float64 [3, 3] each, camera frame to map axes.
        intrinsics: float64 [3, 3] each.
        size: (width, height) of every image.
        device: where to trace.
        ground: look for the ground too.

    Returns:
        depth float32 [C, height, width] along the optical axis, metres (FAR: nothing hit), and hit int32
        [C, height, width]: index of the shape in the scenes' concatenation, GROUND or SKY; both on
        ``device``.
    """
    tensor = lambda a: torch.as_tensor(np.asarray(a, dtype=np.float32), device=device)  # noqa: E731
    lenses = _Lenses(
        tensor(rotations), tensor([[k[0, 0], k[1, 1]] for k in intrinsics]), tensor([k[:2, 2] for k in intrinsics])
    )
    counts = [len(scene.kind) for scene in scenes]
    shapes = _Shapes(
        tensor(np.concatenate([scene.numbers for scene in scenes])),
        torch.as_tensor(np.concatenate([scene.kind for scene in scenes]), device=device),
        torch.as_tensor(np.repeat(np.arange(len(scenes)), counts), device=device),
    )
    rays = _rays(lenses, size)
    bounds = _bounds(shapes, lenses, size)
    nearest = torch.full((len(rays),), _key(FAR, SKY), dtype=torch.int64, device=device)
    for chunk in _chunks((bounds.columns * bounds.rows).cpu()):
        _test_pairs(chunk.to(device), bounds, shapes, rays, size, nearest)
    depth, hit = _unpack(nearest)
    if ground:
        depth, hit = _add_ground(tensor([scene.waves for scene in scenes]), rays, depth, hit)
    shape = len(scenes), size[1], size[0]
    return depth.reshape(shape), hit.reshape(shape)


def _rays(lenses, size):
    """[P, 3] rays through the middles of the pixels, map axes, depth 1."""
    u = torch.arange(size[0], dtype=torch.float32, device=lenses.turn.device) + 0.5
    v = torch.arange(size[1], dtype=torch.float32, device=lenses.turn.device) + 0.5
    u = ((u - lenses.centre[:, :1]) / lenses.focal[:, :1])[:, None, :, None]
    v = ((v - lenses.centre[:, 1:]) / lenses.focal[:, 1:])[:, :, None, None]
    right, down, ahead = (lenses.turn[:, None, None, :, k] for k in range(3))
    return (u * right + v * down + ahead).reshape(-1, 3)


def _key(depth, index):
    """A positive depth and an index as one integer that sorts by depth."""
    return (int(np.float32(depth).view(np.int32)) << 32) | (index & 0xFFFFFFFF)


def _unpack(keys):
    index = (keys & 0xFFFFFFFF).to(torch.int32)  # wraps: SKY comes back negative
    return (keys >> 32).to(torch.int32).view(torch.float32), index


def _chunks(counts):
    """Indices of shapes in runs of at most about PAIRS_AT_ONCE pairs; shapes without pixels are left out."""
    seen = torch.nonzero(counts)[:, 0]
    run = torch.div(torch.cumsum(counts[seen], 0), PAIRS_AT_ONCE, rounding_mode='floor')
    for number in range(int(run[-1]) + 1 if len(seen) else 0):
        yield seen[run == number]


def _bounds(shapes, lenses, size) -> _Bounds:
    """Image bounds of every shape's box; edges that cross the near plane are cut there."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), device=shapes.numbers.device)
    local = signs[None] * shapes.numbers[:, None, 5:8]
    cos, sin = shapes.numbers[:, 3, None], shapes.numbers[:, 4, None]
    x, y, z = local.unbind(dim=-1)
    placed = torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1) + shapes.numbers[:, None, :3]
    corner = torch.bmm(placed, lenses.turn[shapes.camera])  # [n, 8, 3], camera frame
    ends = [(a, a ^ bit) for a in range(8) for bit in (1, 2, 4)]
    start, end = corner[:, [a for a, _ in ends]], corner[:, [b for _, b in ends]]
    depth, beyond = start[..., 2], end[..., 2]
    behind, lost = depth < NEAR, (depth < NEAR) & (beyond < NEAR)
    share = torch.where(behind, (NEAR - depth) / (beyond - depth), torch.zeros_like(depth))
    point = start + share[..., None] * (end - start)
    place = point[..., :2] / point[..., 2:].clamp(min=NEAR)
    place = place * lenses.focal[shapes.camera][:, None] + lenses.centre[shapes.camera][:, None]
    limit = torch.tensor([float(v) for v in size], device=place.device)
    low = place.masked_fill(lost[..., None], _MISS).amin(dim=1) - 1.0
    high = place.masked_fill(lost[..., None], -_MISS).amax(dim=1) + 1.0
    low, high = (torch.minimum(v.clamp(min=0.0), limit).long() for v in (low, high))
    span = (high - low).clamp(min=0)
    return _Bounds(low[:, 0], low[:, 1], span[:, 0], span[:, 1])


def _test_pairs(chosen, bounds, shapes, rays, size, nearest):
    """Test the pixels in the bounds of the ``chosen`` shapes (int64); keep nearest hits in ``nearest``."""
    for code, intersect in _INTERSECT.items():
        same = chosen[shapes.kind[chosen] == code]
        if len(same) == 0:
            continue
        columns = bounds.columns[same]
        counts = columns * bounds.rows[same]
        first = (shapes.camera[same] * size[1] + bounds.row[same]) * size[0] + bounds.column[same]
        which = torch.repeat_interleave(torch.arange(len(same), device=rays.device), counts)
        inner = torch.arange(len(which), device=rays.device) - (torch.cumsum(counts, 0) - counts)[which]
        shape, columns = same[which], columns[which]
        down = torch.div(inner, columns, rounding_mode='floor')
        pixel = first[which] + down * (size[0] - columns) + inner
        t = _hit(intersect, shapes.numbers[shape], rays[pixel])
        found = torch.nonzero(t < FAR)[:, 0]
        keys = (t[found].view(torch.int32).long() << 32) | shape[found]
        _keep_nearest(nearest, pixel[found], keys)


def _keep_nearest(nearest, pixel, keys):
    """nearest[pixel] = the smallest of itself and the keys given for it."""
    if hasattr(nearest, 'scatter_reduce_'):
        nearest.scatter_reduce_(0, pixel, keys, 'amin')
        return
    best = nearest.cpu().numpy().copy()  # PyTorch before 1.12
    np.minimum.at(best, pixel.cpu().numpy(), keys.cpu().numpy())
    nearest.copy_(torch.from_numpy(best))


def _hit(intersect, numbers, rays):
    """Distance [Q] along ``rays`` [Q, 3] to the shapes of ``numbers`` [Q, 11]; _MISS or more where they miss.

    Rays start, for the arithmetic, at their point nearest to the shape's centre, which keeps it exact far
    away.
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
    speed = torch.cat([along + tilt, tilt - along], dim=1)  # [Q, 6], outward
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
        height, radius_there = o[2] + t * d[2], top - lean * t * d[2]
        fits = real & (t > start) & (t < best) & (height.abs() <= half_height) & (radius_there >= 0)
        best = torch.where(fits, t, best)
    for sign in (-1.0, 1.0):
        t = (sign * half_height - o[2]) / torch.where(d[2] == 0, torch.full_like(start, 1e-12), d[2])
        x, y, r = o[0] + t * d[0], o[1] + t * d[1], radius - lean * half_height * (1 + sign)
        best = torch.where((t > start) & (t < best) & (x * x + y * y <= r * r), t, best)
    return best


_INTERSECT = {BOX: _hit_box, ELLIPSOID: _hit_ellipsoid, CONE: _hit_cone, WHEEL: _hit_wheel}


def _add_ground(waves, rays, depth, hit):
    """Depth and hits with the ground in: steps that cannot overshoot, then Newton's. ``waves`` [C, 5, 3]."""
    pixels = len(rays) // len(waves)
    highest, steepest = (float(v) for v in waves[0, 4, 1:])
    height = waves[:, 4, 0].repeat_interleave(pixels)
    falls = rays[:, 2] * FAR < (highest - height).clamp(max=0.0)
    start = ((highest - height) / rays[:, 2]).clamp(min=0.0)
    # The other rays never get down to the hills, or meet something well before.
    index = torch.nonzero(falls & (depth > 0.5 * start))[:, 0]
    t = _fall(waves, rays[index], torch.div(index, pixels, rounding_mode='floor'), start[index], steepest)
    nearer = t < depth[index]
    index = index[nearer]
    depth[index], hit[index] = t[nearer], GROUND
    return depth, hit


def _fall(waves, rays, camera, t, steepest):
    """Distance [R] along ``rays`` [R, 3], which fall, to the ground, from distance ``t`` [R] above it on.

    ``camera`` int64 [R]: which of the C cameras each ray belongs to.
    """
    amplitude, kx, ky = waves[0, :3]
    phase, height, fall = waves[camera, 3], waves[camera, 4, 0], rays[:, 2]
    rate = steepest * rays[:, :2].norm(dim=1) - fall
    speed = rays[:, :1] * kx + rays[:, 1:2] * ky  # [R, 3], phase per unit of t
    for step in range(_SAFE_STEPS + _NEWTON_STEPS):
        angle = t[:, None] * speed + phase
        gap = height + t * fall - (torch.sin(angle) * amplitude).sum(dim=1)
        if step >= _SAFE_STEPS:
            exact = (torch.cos(angle) * amplitude * speed).sum(dim=1) - fall
            rate = torch.where(exact > 0.3 * rate, exact, rate)  # not where the ray only grazes a hill
        t = (t + gap / rate).clamp(min=0.0, max=2 * FAR)
    return t
