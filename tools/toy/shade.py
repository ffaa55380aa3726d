"""Colours of what the rays hit: light, textures, sky. Plain tensor code, the same on the CPU and on a GPU.

P: pixels of one image, or those of them that hit one kind of thing. Colours are RGB 0..1; all tensors are
float32 unless stated.
"""

from typing import NamedTuple, Optional

import numpy as np
import torch

from . import shapes as sh
from .road import ASPHALT, CELL, DIRT, GRASS, KERB, PAVING, TILES, WHITE_PAINT, YELLOW_PAINT
from .trace import GROUND, SKY

_GROUND_COLOURS = {
    GRASS: (0.30, 0.46, 0.16),
    DIRT: (0.52, 0.42, 0.28),
    ASPHALT: (0.25, 0.25, 0.27),
    WHITE_PAINT: (0.86, 0.86, 0.84),
    YELLOW_PAINT: (0.80, 0.65, 0.12),
    PAVING: (0.60, 0.57, 0.55),
    KERB: (0.74, 0.73, 0.71),
    TILES: (0.60, 0.28, 0.24),
}
_HAZE_METRES = 350.0
_NOISE_SIZE = 256  # a power of two
_NOISE_SHIFT = 65536.0  # keeps texture coordinates positive, so that truncation rounds down


class Painter(NamedTuple):
    """A scene's textures and light on a device.

    Attributes:
        ground: uint8 [rows * columns], the painted map; ``ground_shape`` its (rows, columns).
        ground_colours: [256, 3], by ground code.
        noise: [4, 256 * 256], tileable, from blotches to single cells, zero mean and about unit range.
        sun: [3], towards the sun; zenith, horizon: [3]; sunlight, ambient: strengths.
    """

    ground: torch.Tensor
    ground_shape: tuple
    ground_colours: torch.Tensor
    noise: torch.Tensor
    sun: torch.Tensor
    zenith: torch.Tensor
    horizon: torch.Tensor
    sunlight: float
    ambient: float


def make_painter(world, device: torch.device) -> Painter:
    """Painter of a :class:`world.ToyWorld`."""
    colours = np.full((256, 3), 0.2, dtype=np.float32)
    for code, colour in _GROUND_COLOURS.items():
        colours[code] = colour
    tensor = lambda a: torch.as_tensor(np.asarray(a, dtype=np.float32), device=device)  # noqa: E731
    look = world.look
    return Painter(
        torch.as_tensor(world.ground.reshape(-1), device=device),
        world.ground.shape,
        tensor(colours),
        tensor(_noise_layers()),
        tensor(look.sun),
        tensor(look.zenith),
        tensor(look.horizon),
        look.sunlight,
        look.ambient,
    )


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
        layers.append((rows[:, low] * (1 - share) + rows[:, (low + 1) % cells] * share).ravel())
    return np.stack(layers)


class Shadows(NamedTuple):
    """Depths seen from the sun at M moments.

    Attributes:
        depth: [M * side * side], metres from the eye along its axis to the first shape, row by row.
        side: pixels of a side.
        eyes: float64 [M, 3], map frame, far away towards the sun.
        rotation: float64 [3, 3], the sun camera's frame to map axes.
        focal: pixels.
    """

    depth: torch.Tensor
    side: int
    eyes: np.ndarray
    rotation: np.ndarray
    focal: float


class Hits(NamedTuple):
    """What the pixels of one or more images hit.

    Attributes:
        directions: [P, 3] rays, map axes, depth 1 along the optical axis.
        depth: [P] along the optical axis, metres.
        hit: int32 [P] index of the shape, GROUND or SKY.
        image: int32 [P], the image that each pixel is of.
    """

    directions: torch.Tensor
    depth: torch.Tensor
    hit: torch.Tensor
    image: torch.Tensor


class Images(NamedTuple):
    """The images that pixels are of.

    Attributes:
        eyes: [C, 3] where the rays start, map frame, metres.
        moments: int32 [C], which of the shadow maps each takes.
    """

    eyes: torch.Tensor
    moments: torch.Tensor


class ShapeRows(NamedTuple):
    """The shapes of one or more packed scenes on a device.

    Attributes:
        numbers: [n, 15]: the 11 of ``trace.PackedScene``, then RGB and the owner's index.
        kind, material: int32 [n].
    """

    numbers: torch.Tensor
    kind: torch.Tensor
    material: torch.Tensor


def shape_rows(scenes, table, device) -> ShapeRows:
    """Rows of ``scenes`` (PackedScenes), whose concatenated shapes are those of ``table`` (a ShapeTable)."""
    packed = np.concatenate([scene.numbers for scene in scenes])
    numbers = np.concatenate([packed, table.colour, table.owner[:, None]], axis=1).astype(np.float32)
    return ShapeRows(
        torch.as_tensor(numbers, device=device),
        torch.as_tensor(table.kind, device=device),
        torch.as_tensor(table.material, device=device),
    )


def paint(
    painter: Painter, rows: ShapeRows, hits: Hits, images: Images, shadows: Optional[Shadows] = None
) -> torch.Tensor:
    """Colours [P, 3] of what was hit."""
    colour = torch.empty_like(hits.directions)
    index = torch.nonzero(hits.hit == SKY)[:, 0]
    colour[index] = _sky(painter, hits.directions.index_select(0, index))
    for index, ground in ((torch.nonzero(hits.hit == GROUND)[:, 0], True), (torch.nonzero(hits.hit >= 0)[:, 0], False)):
        if len(index) == 0:
            continue
        directions, depth, hit, image = (part.index_select(0, index) for part in hits)
        offset = directions * depth[:, None]
        place = images.eyes.index_select(0, image) + offset
        sunny = _sunny(shadows, place, images.moments.index_select(0, image))
        if ground:
            lit = _ground(painter, place, sunny)
        else:
            lit = _shapes(painter, rows, offset, hit, sunny)
        colour[index] = _haze(painter, lit, offset)
    return colour.clamp_(0.0, 1.0)


def _noise(painter, u, v, layer):
    """Noise [P] at texture coordinates u, v (cells)."""
    column = (u + _NOISE_SHIFT).int() & (_NOISE_SIZE - 1)
    row = (v + _NOISE_SHIFT).int() & (_NOISE_SIZE - 1)
    return painter.noise[layer].index_select(0, row * _NOISE_SIZE + column)


def _wrap(values, period):
    """values modulo period, as a share of it, 0..1."""
    values = values * (1.0 / period)
    return values - values.floor()


def _sky(painter, directions):
    unit = directions / directions.norm(dim=1, keepdim=True)
    height = unit[:, 2].clamp(min=0.0)
    colour = painter.horizon + (painter.zenith - painter.horizon) * height.sqrt()[:, None]
    scale = 40.0 / unit[:, 2].clamp(min=0.05)
    u, v = unit[:, 0] * scale, unit[:, 1] * scale
    cloud = _noise(painter, u, v, 0) + 0.5 * _noise(painter, u, v, 1)
    cloud = (cloud - 0.1).clamp(0.0, 1.0) * (height * 6.0).clamp(max=1.0)
    return colour + (0.95 - colour) * (0.7 * cloud)[:, None]


def _sunny(shadows, place, moment):
    """1 [P] where the sun shines at ``place`` [P, 3] (map frame), 0 in shadow; 1 outside the shadow map.

    ``moment`` int32 [P]: which of the maps.
    """
    if shadows is None:
        return torch.ones_like(place[:, 0])
    tensor = lambda a: torch.as_tensor(a.astype(np.float32), device=place.device)  # noqa: E731
    seen = (place - tensor(shadows.eyes).index_select(0, moment)) @ tensor(shadows.rotation)
    scale = shadows.focal / seen[:, 2]
    column, row = (seen[:, 0] * scale + shadows.side / 2).int(), (seen[:, 1] * scale + shadows.side / 2).int()
    known = (column >= 0) & (column < shadows.side) & (row >= 0) & (row < shadows.side)
    cell = (row * shadows.side + column).clamp(0, shadows.side * shadows.side - 1)
    cell = cell + moment * (shadows.side * shadows.side)
    lit = shadows.depth.index_select(0, cell) > seen[:, 2] - 0.25
    return (lit | ~known).float()


def _light(painter, normal, sunny):
    """Brightness [P, 1] of surfaces with unit normals [P, 3]."""
    direct = (normal @ painter.sun).clamp(min=0.0) * sunny
    return (painter.sunlight * direct + painter.ambient * (0.80 + 0.20 * normal[:, 2]))[:, None]


def _haze(painter, colour, offset):
    clear = torch.exp(offset.norm(dim=1, keepdim=True) * (-1.0 / _HAZE_METRES))
    return painter.horizon + (colour - painter.horizon) * clear


def _ground(painter, place, sunny):
    x, y = place[:, 0], place[:, 1]
    grain = _noise(painter, x * 20, y * 20, 3)
    codes = _ground_codes(painter, x + 0.02 * grain, y + 0.02 * grain)
    soft = (codes == GRASS) | (codes == DIRT)
    rough = 0.08 * _noise(painter, x * 20, y * 20, 2) + 0.06 * grain + 0.10 * _noise(painter, x * 6, y * 6, 1)
    shade = 1.0 + rough * torch.where(soft, 2.0 * torch.ones_like(x), 0.6 * torch.ones_like(x))
    joints = ((_wrap(x, 0.8) < 0.075) | (_wrap(y, 0.8) < 0.075)) & ((codes == PAVING) | (codes == TILES))
    shade = shade * (1.0 - 0.18 * joints.float())
    light = painter.sunlight * float(painter.sun[2]) * sunny + painter.ambient  # nearly level
    return painter.ground_colours.index_select(0, codes) * (shade * light)[:, None]


def _ground_codes(painter, x, y):
    rows, columns = painter.ground_shape
    column, row = (x * (1.0 / CELL)).floor().int(), (y * (1.0 / CELL)).floor().int()
    known = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    cell = torch.where(known, row * columns + column, torch.zeros_like(row))
    codes = painter.ground.index_select(0, cell).int()
    return torch.where(known, codes, torch.full_like(codes, GRASS))


def _shapes(painter, rows, offset, hit, sunny):
    numbers, kind, material = (table.index_select(0, hit) for table in rows)
    local, normal = _local_hit(numbers, kind, offset)
    colour = _materials(painter, material, local, normal, numbers)
    cos, sin = numbers[:, 3], numbers[:, 4]
    normal = torch.stack(
        [cos * normal[:, 0] - sin * normal[:, 1], sin * normal[:, 0] + cos * normal[:, 1], normal[:, 2]], dim=1
    )
    return colour * _light(painter, normal, sunny)


def _local_hit(numbers, kind, offset):
    """Hit point and unit normal, both [P, 3], in the local frame of the shape that was hit."""
    relative = offset - numbers[:, :3]
    cos, sin = numbers[:, 3], numbers[:, 4]
    local = torch.stack(
        [cos * relative[:, 0] + sin * relative[:, 1], cos * relative[:, 1] - sin * relative[:, 0], relative[:, 2]],
        dim=1,
    )
    normal = torch.empty_like(local)
    for code, find in _NORMALS.items():
        chosen = torch.nonzero(kind == code)[:, 0]
        if len(chosen):
            half_and_slope = numbers[:, 5:10].index_select(0, chosen)
            normal[chosen] = find(local.index_select(0, chosen), half_and_slope[:, :3], half_and_slope[:, 3:])
    return local, normal / normal.norm(dim=1, keepdim=True).clamp(min=1e-6)


def _box_normal(local, half, slope):
    x, y, z = local.unbind(dim=1)
    rise = z + half[:, 2]
    over_x, over_y = x.abs() + slope[:, 0] * rise - half[:, 0], y.abs() + slope[:, 1] * rise - half[:, 1]
    over_z = z.abs() - half[:, 2]
    zero = torch.zeros_like(x)
    on_x = (over_x >= over_y) & (over_x >= over_z)
    on_y = ~on_x & (over_y >= over_z)
    return torch.stack(
        [
            torch.where(on_x, x.sign(), zero),
            torch.where(on_y, y.sign(), zero),
            torch.where(on_x, slope[:, 0], torch.where(on_y, slope[:, 1], z.sign())),
        ],
        dim=1,
    )


def _ellipsoid_normal(local, half, slope):
    return local / (half * half)


def _cone_normal(local, half, slope):
    x, y, z = local.unbind(dim=1)
    radial = torch.sqrt(x * x + y * y)
    on_cap = z.abs() - half[:, 2] > radial + slope[:, 0] * (z + half[:, 2]) - half[:, 0]
    side = (~on_cap).float()
    return torch.stack([x * side, y * side, torch.where(on_cap, z.sign(), slope[:, 0] * radial)], dim=1)


def _wheel_normal(local, half, slope):
    x, y, z = local.unbind(dim=1)
    on_hub = y.abs() - half[:, 1] > torch.sqrt(x * x + z * z) - half[:, 0]
    tread = (~on_hub).float()
    return torch.stack([x * tread, y.sign() * (1 - tread), z * tread], dim=1)


_NORMALS = {sh.BOX: _box_normal, sh.ELLIPSOID: _ellipsoid_normal, sh.CONE: _cone_normal, sh.WHEEL: _wheel_normal}


class _Spots(NamedTuple):
    """Places on surfaces, all [P]: texture coordinates (along the wall, height; x, y on tops), height above
    the shape's foot, on a top, owner's index; normal [P, 3]."""

    u: torch.Tensor
    v: torch.Tensor
    height: torch.Tensor
    top: torch.Tensor
    owner: torch.Tensor
    normal: torch.Tensor


def _materials(painter, material, local, normal, numbers):
    """Unlit colours [P, 3]."""
    x, y, z = local.unbind(dim=1)
    top = normal[:, 2].abs() > 0.75
    along = torch.where(normal[:, 0].abs() > normal[:, 1].abs(), y, x)
    spots = _Spots(torch.where(top, x, along), torch.where(top, y, z), z + numbers[:, 7], top, numbers[:, 14], normal)
    fine = _noise(painter, spots.u * 25 + spots.owner * 7, spots.v * 25 + spots.owner * 13, 2)
    colour = numbers[:, 11:14] * (1.0 + 0.06 * fine)[:, None]
    for code, texture in _TEXTURES.items():
        chosen = torch.nonzero(material == code)[:, 0]
        if len(chosen):
            plain, here = colour.index_select(0, chosen), _Spots(*(part.index_select(0, chosen) for part in spots))
            colour[chosen] = texture(painter, plain, here)
    return colour


def _wall(painter, colour, spots):
    """Plaster with a grid of windows of many shades."""
    column, floor = spots.u / 2.4, (spots.height - 1.0) / 3.0
    across, up = _wrap(column, 1.0), _wrap(floor, 1.0)
    window = (across > 0.25) & (across < 0.75) & (up > 0.32) & (up < 0.80) & ~spots.top
    tone = 0.5 + 0.5 * _noise(painter, column.floor() * 31 + spots.owner * 17, floor.floor() * 57 + spots.owner * 5, 3)
    glass = torch.stack([0.14 + 0.25 * tone, 0.18 + 0.26 * tone, 0.25 + 0.25 * tone], dim=1)
    plaster = colour * (1.0 + 0.10 * _noise(painter, spots.u * 8, spots.height * 8, 1))[:, None]
    return torch.where(window[:, None], glass, plaster)


def _foliage(painter, colour, spots):
    """Leaves: strong noise of two scales."""
    a = spots.normal[:, 0] * 30 + spots.owner * 11
    b = (spots.normal[:, 2] + spots.height) * 20 + spots.owner * 3
    leaves = 0.35 * _noise(painter, a, b, 2) + 0.30 * _noise(painter, spots.u * 18, spots.v * 18, 3)
    return colour * (1.0 + leaves)[:, None]


def _stripes(painter, colour, spots):
    """Slanted stripes of the shape's colour and white."""
    white = _wrap(spots.u + spots.height, 0.5) < 0.5
    return torch.where(white[:, None], torch.full_like(colour, 0.92), colour)


def _glass(painter, colour, spots):
    """Dark glass, brighter towards the top as if it mirrored the sky."""
    mirrored = 0.3 + spots.normal[:, 2].clamp(min=0.0) + 0.3 * spots.height.clamp(0.0, 1.0)
    return colour * 0.8 + 0.22 * painter.zenith * mirrored[:, None]


def _cone_bands(painter, colour, spots):
    """A white band around the middle."""
    white = (spots.height > 0.30) & (spots.height < 0.50)
    return torch.where(white[:, None], torch.full_like(colour, 0.92), colour)


def _ribs(painter, colour, spots):
    """Corrugated metal."""
    return colour * (1.0 - 0.22 * (_wrap(spots.u, 0.4) < 0.3).float())[:, None]


def _checks(painter, colour, spots):
    """A coarse chequered pattern."""
    dark = _wrap((spots.u / 0.25).floor() + (spots.v / 0.25).floor(), 2.0) < 0.4
    return colour * (1.0 - 0.35 * dark.float())[:, None]


def _bark(painter, colour, spots):
    """Bark."""
    return colour * (1.0 + 0.35 * _noise(painter, spots.u * 40, spots.v * 6, 3))[:, None]


_TEXTURES = {
    sh.WALL: _wall,
    sh.FOLIAGE: _foliage,
    sh.STRIPES: _stripes,
    sh.GLASS: _glass,
    sh.CONE_BANDS: _cone_bands,
    sh.RIBS: _ribs,
    sh.CHECKS: _checks,
    sh.BARK: _bark,
}
