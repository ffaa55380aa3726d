"""Colours of what the rays hit: light, textures, sky. Plain tensor code, the same on the CPU and on a GPU.

P: pixels of one image; all colours RGB 0..1, all tensors float32 unless stated.
"""
from typing import NamedTuple

import numpy as np
import torch

from . import shapes as sh
from .road import (ASPHALT, CELL, DIRT, GRASS, KERB, NO_GROUND, PAVING, TILES, WHITE_PAINT, YELLOW_PAINT)
from .trace import GROUND

_GROUND_COLOURS = {GRASS: (0.30, 0.46, 0.16), DIRT: (0.52, 0.42, 0.28), ASPHALT: (0.25, 0.25, 0.27),
                   WHITE_PAINT: (0.86, 0.86, 0.84), YELLOW_PAINT: (0.80, 0.65, 0.12), PAVING: (0.60, 0.57, 0.55),
                   KERB: (0.74, 0.73, 0.71), TILES: (0.60, 0.28, 0.24)}
_HAZE_METRES = 350.0
_NOISE_SIZE = 256


class Painter(NamedTuple):
    """A scene's textures on a device.

    Attributes:
        ground: uint8 [rows, columns], painted map.
        ground_colours: [256, 3], by ground code.
        noise: [256, 256, 4] smooth to fine tileable noise, each layer zero mean and about unit range.
        waves: float32 [4, 3] amplitude, kx, ky, phase in the map frame.
        sun: [3], towards the sun; zenith, horizon: [3]; sunlight, ambient: strengths.
    """
    ground: torch.Tensor
    ground_colours: torch.Tensor
    noise: torch.Tensor
    waves: torch.Tensor
    sun: torch.Tensor
    zenith: torch.Tensor
    horizon: torch.Tensor
    sunlight: float
    ambient: float


def make_painter(world, device: torch.device) -> Painter:
    """Painter of a :class:`world.ToyWorld`."""
    colours = np.zeros((256, 3), dtype=np.float32)
    for code, colour in _GROUND_COLOURS.items():
        colours[code] = colour
    colours[NO_GROUND] = 0.2
    tensor = lambda a: torch.as_tensor(np.asarray(a, dtype=np.float32), device=device)  # noqa: E731
    look = world.look
    return Painter(torch.as_tensor(world.ground, device=device), tensor(colours), tensor(_noise_layers()),
                   tensor(np.stack(world.waves)), tensor(look.sun), tensor(look.zenith), tensor(look.horizon),
                   look.sunlight, look.ambient)


def _noise_layers():
    """Four layers of tileable noise, from blotches of 64 cells to single cells."""
    rng = np.random.default_rng(20240612)
    layers = []
    for cells in (4, 16, 64, _NOISE_SIZE):
        coarse = rng.uniform(-1, 1, (cells, cells))
        position = np.arange(_NOISE_SIZE) * cells / _NOISE_SIZE
        low = position.astype(int)
        share = position - low
        share = share * share * (3 - 2 * share)
        rows = coarse[low] * (1 - share[:, None]) + coarse[(low + 1) % cells] * share[:, None]
        layers.append(rows[:, low] * (1 - share) + rows[:, (low + 1) % cells] * share)
    return np.stack(layers, axis=-1)


class Hits(NamedTuple):
    """What an image's pixels hit.

    Attributes:
        directions: [P, 3] rays, map axes, depth 1 along the optical axis.
        depth: [P] along the optical axis, metres.
        hit: int32 [P] index of the shape, GROUND or SKY.
    """
    directions: torch.Tensor
    depth: torch.Tensor
    hit: torch.Tensor


class ShapeRows(NamedTuple):
    """The shapes of a packed scene on a device: numbers [n, 11] (see ``trace``), colour [n, 3], kind, material,
    owner int64 [n]."""
    numbers: torch.Tensor
    colour: torch.Tensor
    kind: torch.Tensor
    material: torch.Tensor
    owner: torch.Tensor


def shape_rows(scene, table, device) -> ShapeRows:
    """Rows of the shapes of ``table`` (a ShapeTable) packed as ``scene``."""
    long = lambda a: torch.as_tensor(a.astype(np.int64), device=device)  # noqa: E731
    return ShapeRows(torch.as_tensor(scene.numbers, device=device),
                     torch.as_tensor(table.colour.astype(np.float32), device=device),
                     long(table.kind), long(table.material), long(table.owner))


def paint(painter: Painter, rows: ShapeRows, hits: Hits, viewpoint) -> torch.Tensor:
    """Colours [P, 3] of an image seen from ``viewpoint`` (map frame, float64 [3])."""
    colour = _sky(painter, hits.directions)
    for index, layer in ((torch.nonzero(hits.hit == GROUND)[:, 0], None),
                         (torch.nonzero(hits.hit >= 0)[:, 0], rows)):
        if len(index) == 0:
            continue
        offset = hits.directions[index] * hits.depth[index, None]
        if layer is None:
            lit = _ground(painter, offset, viewpoint)
        else:
            lit = _shapes(painter, rows, offset, hits.hit[index].long())
        colour[index] = _haze(painter, lit, offset)
    return colour.clamp_(0.0, 1.0)


def _sky(painter, directions):
    unit = directions / directions.norm(dim=1, keepdim=True)
    height = unit[:, 2:].clamp(min=0.0).sqrt()
    colour = painter.horizon + (painter.zenith - painter.horizon) * height
    lifted = unit[:, 2].clamp(min=0.05)
    u, v = unit[:, 0] / lifted * 40.0, unit[:, 1] / lifted * 40.0
    cloud = _noise(painter, u, v, 0) + 0.5 * _noise(painter, u, v, 1)
    cloud = (cloud - 0.1).clamp(0.0, 1.0) * (unit[:, 2] * 6.0).clamp(0.0, 1.0)
    return colour + (0.95 - colour) * (0.7 * cloud)[:, None]


def _noise(painter, u, v, layer):
    """Noise [P] at texture coordinates u, v (cells)."""
    column = torch.remainder(u.floor().long(), _NOISE_SIZE)
    row = torch.remainder(v.floor().long(), _NOISE_SIZE)
    return painter.noise[row, column, layer]


def _light(painter, normal):
    """Brightness [P, 1] of surfaces with unit normals [P, 3]."""
    direct = (normal * painter.sun).sum(dim=1, keepdim=True).clamp(min=0.0)
    return painter.sunlight * direct + painter.ambient * (0.80 + 0.20 * normal[:, 2:])


def _haze(painter, colour, offset):
    clear = torch.exp(-offset.norm(dim=1, keepdim=True) / _HAZE_METRES)
    return painter.horizon + (colour - painter.horizon) * clear


def _ground(painter, offset, viewpoint):
    x, y = offset[:, 0] + float(viewpoint[0]), offset[:, 1] + float(viewpoint[1])
    rows, columns = painter.ground.shape
    column, row = (x / CELL).floor().long(), (y / CELL).floor().long()
    known = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    codes = painter.ground[row.clamp(0, rows - 1), column.clamp(0, columns - 1)].long()
    codes = torch.where(known, codes, torch.full_like(codes, GRASS))
    colour = painter.ground_colours[codes]
    rough = 0.08 * _noise(painter, x * 20, y * 20, 2) + 0.06 * _noise(painter, x * 20, y * 20, 3)
    patches = 0.10 * _noise(painter, x * 6, y * 6, 1)
    soft = ((codes == GRASS) | (codes == DIRT)).float()
    shade = 1.0 + (rough + patches) * (0.6 + 1.4 * soft)
    joints = ((torch.remainder(x, 0.8) < 0.06) | (torch.remainder(y, 0.8) < 0.06)) & (
        (codes == PAVING) | (codes == TILES))
    shade = shade * (1.0 - 0.18 * joints.float())
    amplitude, kx, ky, phase = painter.waves
    slope = torch.cos(x[:, None] * kx + y[:, None] * ky + phase) * amplitude
    normal = torch.stack([-(slope * kx).sum(1), -(slope * ky).sum(1), torch.ones_like(x)], dim=1)
    return colour * shade[:, None] * _light(painter, normal / normal.norm(dim=1, keepdim=True))


def _shapes(painter, rows, offset, index):
    numbers, kind = rows.numbers[index], rows.kind[index]
    local, normal = _local_hit(numbers, kind, offset)
    colour = _materials(painter, rows, index, local, normal, numbers)
    cos, sin = numbers[:, 3], numbers[:, 4]
    normal = torch.stack([cos * normal[:, 0] - sin * normal[:, 1], sin * normal[:, 0] + cos * normal[:, 1],
                          normal[:, 2]], dim=1)
    return colour * _light(painter, normal)


def _local_hit(numbers, kind, offset):
    """Hit point and unit normal, both [P, 3], in the local frame of the shape that was hit."""
    relative = offset - numbers[:, :3]
    cos, sin = numbers[:, 3], numbers[:, 4]
    x = cos * relative[:, 0] + sin * relative[:, 1]
    y = cos * relative[:, 1] - sin * relative[:, 0]
    z = relative[:, 2]
    hx, hy, hz, ax, ay = (numbers[:, k] for k in range(5, 10))
    zero = torch.zeros_like(x)
    sides = torch.stack([x.abs() + ax * (z + hz) - hx, y.abs() + ay * (z + hz) - hy, z.abs() - hz], dim=1)
    face = sides.argmax(dim=1)
    box = torch.stack([torch.where(face == 0, x.sign(), zero), torch.where(face == 1, y.sign(), zero),
                       torch.where(face == 0, ax, torch.where(face == 1, ay, z.sign()))], dim=1)
    ellipsoid = torch.stack([x / (hx * hx), y / (hy * hy), z / (hz * hz)], dim=1)
    radial = torch.sqrt(x * x + y * y)
    on_cap = z.abs() - hz > radial + ax * (z + hz) - hx
    cone = torch.stack([torch.where(on_cap, zero, x), torch.where(on_cap, zero, y),
                        torch.where(on_cap, z.sign(), ax * radial)], dim=1)
    on_hub = y.abs() - hy > torch.sqrt(x * x + z * z) - hx
    wheel = torch.stack([torch.where(on_hub, zero, x), torch.where(on_hub, y.sign(), zero),
                         torch.where(on_hub, zero, z)], dim=1)
    normal = torch.where((kind == sh.BOX)[:, None], box, torch.where(
        (kind == sh.ELLIPSOID)[:, None], ellipsoid, torch.where((kind == sh.CONE)[:, None], cone, wheel)))
    return torch.stack([x, y, z], dim=1), normal / normal.norm(dim=1, keepdim=True).clamp(min=1e-6)


def _materials(painter, rows, index, local, normal, numbers):
    """Unlit colours [P, 3]. Side surfaces have texture coordinates (along the wall, height), tops (x, y)."""
    x, y, z = local.unbind(dim=1)
    top = normal[:, 2].abs() > 0.75
    along = torch.where(normal[:, 0].abs() > normal[:, 1].abs(), y, x)
    u, v = torch.where(top, x, along), torch.where(top, y, z)
    owner = rows.owner[index].float()
    fine = _noise(painter, u * 25 + owner * 7, v * 25 + owner * 13, 2)
    colour = rows.colour[index] * (1.0 + 0.06 * fine)[:, None]
    height = z + numbers[:, 7]
    material = rows.material[index]
    for code, texture in _TEXTURES.items():
        chosen = torch.nonzero(material == code)[:, 0]
        if len(chosen):
            colour[chosen] = texture(painter, colour[chosen], u[chosen], v[chosen], height[chosen],
                                     top[chosen], owner[chosen], normal[chosen])
    return colour


def _wall(painter, colour, u, v, height, top, owner, normal):
    """Plaster with a grid of windows, some of them lit."""
    column, floor = u / 2.4, (height - 1.0) / 3.0
    across, up = torch.remainder(column, 1.0), torch.remainder(floor, 1.0)
    window = (across > 0.25) & (across < 0.75) & (up > 0.32) & (up < 0.80) & ~top
    tone = 0.5 + 0.5 * _noise(painter, column.floor() * 31 + owner * 17, floor.floor() * 57 + owner * 5, 3)
    glass = torch.stack([0.14 + 0.25 * tone, 0.18 + 0.26 * tone, 0.25 + 0.25 * tone], dim=1)
    plaster = colour * (1.0 + 0.10 * _noise(painter, u * 8, height * 8, 1))[:, None]
    return torch.where(window[:, None], glass, plaster)


def _foliage(painter, colour, u, v, height, top, owner, normal):
    """Leaves: strong noise of two scales."""
    a, b = normal[:, 0] * 30 + owner * 11, (normal[:, 2] + height) * 20 + owner * 3
    return colour * (1.0 + 0.35 * _noise(painter, a, b, 2) + 0.30 * _noise(painter, u * 18, v * 18, 3))[:, None]


def _stripes(painter, colour, u, v, height, top, owner, normal):
    """Slanted stripes of the shape's colour and white."""
    white = torch.remainder(u + height, 0.5) < 0.25
    return torch.where(white[:, None], torch.full_like(colour, 0.92), colour)


def _glass(painter, colour, u, v, height, top, owner, normal):
    """Dark glass, brighter towards the top as if it mirrored the sky."""
    return colour * 0.8 + 0.22 * painter.zenith * (0.3 + normal[:, 2:].clamp(min=0.0) + 0.3 * height[:, None].clamp(0, 1))


def _cone_bands(painter, colour, u, v, height, top, owner, normal):
    """A white band around the middle."""
    white = (height > 0.30) & (height < 0.50)
    return torch.where(white[:, None], torch.full_like(colour, 0.92), colour)


def _ribs(painter, colour, u, v, height, top, owner, normal):
    """Corrugated metal."""
    return colour * (1.0 - 0.22 * (torch.remainder(u, 0.4) < 0.12).float())[:, None]


def _checks(painter, colour, u, v, height, top, owner, normal):
    """A coarse chequered pattern."""
    dark = torch.remainder((u / 0.25).floor() + (v / 0.25).floor(), 2.0) < 1.0
    return colour * (1.0 - 0.35 * dark.float())[:, None]


def _bark(painter, colour, u, v, height, top, owner, normal):
    """Bark."""
    return colour * (1.0 + 0.35 * _noise(painter, u * 40, v * 6, 3))[:, None]


_TEXTURES = {sh.WALL: _wall, sh.FOLIAGE: _foliage, sh.STRIPES: _stripes, sh.GLASS: _glass,
             sh.CONE_BANDS: _cone_bands, sh.RIBS: _ribs, sh.CHECKS: _checks, sh.BARK: _bark}
