"""Builders of the objects of the toy world: each returns the object's shapes in its own frame.

Frame of an object: x forward, y left, z up from the ground, origin on the ground below the middle of its
box; metres. Every builder draws sizes and colours from the generator it is given.
"""

import colorsys
from typing import Dict, List, NamedTuple, Tuple

import numpy as np

from .shapes import (
    BARK,
    BOX,
    CHECKS,
    CONE,
    CONE_BANDS,
    ELLIPSOID,
    FOLIAGE,
    GLASS,
    PLAIN,
    RIBS,
    STRIPES,
    WALL,
    WHEEL,
    Shape,
)

RUBBER, GLASS_BLUE, METAL = (0.06, 0.06, 0.07), (0.12, 0.17, 0.22), (0.45, 0.46, 0.48)
LAMP_WHITE, LAMP_RED, SKIN = (0.95, 0.93, 0.80), (0.75, 0.05, 0.05), (0.85, 0.62, 0.48)


class ObjectType(NamedTuple):
    """What an annotated object is.

    Attributes:
        occ_class: its class among the Occ3D names.
        category: its nuScenes category.
        attributes: (moving, still) nuScenes attribute names; empty strings if the category has none.
    """

    occ_class: str
    category: str
    attributes: Tuple[str, str] = ('', '')


_VEHICLE = ('vehicle.moving', 'vehicle.parked')
_CYCLE = ('cycle.with_rider', 'cycle.without_rider')
_PERSON = ('pedestrian.moving', 'pedestrian.standing')

OBJECT_TYPES: Dict[str, ObjectType] = {
    'car': ObjectType('car', 'vehicle.car', _VEHICLE),
    'truck': ObjectType('truck', 'vehicle.truck', _VEHICLE),
    'bus': ObjectType('bus', 'vehicle.bus.rigid', _VEHICLE),
    'trailer': ObjectType('trailer', 'vehicle.trailer', _VEHICLE),
    'construction_vehicle': ObjectType('construction_vehicle', 'vehicle.construction', _VEHICLE),
    'motorcycle': ObjectType('motorcycle', 'vehicle.motorcycle', _CYCLE),
    'bicycle': ObjectType('bicycle', 'vehicle.bicycle', _CYCLE),
    'pedestrian': ObjectType('pedestrian', 'human.pedestrian.adult', _PERSON),
    'barrier': ObjectType('barrier', 'movable_object.barrier'),
    'traffic_cone': ObjectType('traffic_cone', 'movable_object.trafficcone'),
    'cart': ObjectType('others', 'movable_object.pushable_pullable'),
    'debris': ObjectType('others', 'movable_object.debris'),
}


def _vivid(rng, saturation=(0.55, 0.9), value=(0.5, 0.9), hue=(0.0, 1.0)):
    return colorsys.hsv_to_rgb(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))


def _jitter(rng, colour, amount=0.06):
    return tuple(float(np.clip(c + rng.uniform(-amount, amount), 0.02, 1.0)) for c in colour)


def _block(x, y, z, colour, material=PLAIN, taper=(1.0, 1.0)):
    """Box given by its (lower, upper) bounds along x, y and z."""
    bounds = np.array([x, y, z], dtype=np.float64)
    half = (bounds[:, 1] - bounds[:, 0]) / 2
    return Shape(BOX, tuple(bounds.mean(axis=1)), tuple(half), colour, material, taper)


def _wheels(xs, half_track, radius, half_width):
    return [
        Shape(WHEEL, (x, side * (half_track - half_width), radius), (radius, half_width, radius), RUBBER)
        for x in xs
        for side in (-1, 1)
    ]


def _lamps(front, rear, half_width, z):
    size = 0.16
    shapes = []
    for side in (-1, 1):
        y = sorted((side * (half_width - 0.08), side * (half_width - 0.45)))
        shapes.append(_block((front - 0.06, front), y, (z - size / 2, z + size / 2), LAMP_WHITE))
        shapes.append(_block((rear, rear + 0.06), y, (z - size / 2, z + size / 2), LAMP_RED))
    return shapes


def car(rng) -> List[Shape]:
    """A car in one of the usual colours, or a brighter one."""
    length, width, height = rng.uniform(4.1, 4.9), rng.uniform(1.75, 1.95), rng.uniform(1.45, 1.75)
    grey = rng.choice([0.08, 0.25, 0.5, 0.72, 0.9])
    colour = _jitter(rng, (grey,) * 3, 0.03) if rng.random() < 0.45 else _vivid(rng)
    hl, hw, belt = length / 2, width / 2, 0.58 * height
    back, front = -hl * rng.uniform(0.72, 0.95), hl * rng.uniform(0.30, 0.45)
    return [
        _block((-hl + 0.05, hl - 0.05), (-hw, hw), (0.24, belt), colour, taper=(0.97, 0.94)),
        _block((back, front), (-0.92 * hw, 0.92 * hw), (belt, height - 0.06), GLASS_BLUE, GLASS, (0.76, 0.84)),
        _block((0.85 * back, 0.72 * front), (-0.79 * hw, 0.79 * hw), (height - 0.08, height), colour),
        *_wheels((-0.60 * hl, 0.62 * hl), hw, 0.34, 0.11),
        *_lamps(hl, -hl, hw, 0.62),
    ]


def truck(rng) -> List[Shape]:
    """A box truck: cab in front, cargo box behind."""
    length, width, height = rng.uniform(6.2, 8.0), rng.uniform(2.3, 2.5), rng.uniform(2.9, 3.5)
    cab, cargo = _vivid(rng, value=(0.45, 0.8)), _jitter(rng, (0.85, 0.86, 0.88), 0.08)
    hl, hw = length / 2, width / 2
    split = hl - 1.9
    return [
        _block((-hl + 0.05, hl - 0.06), (-0.8 * hw, 0.8 * hw), (0.45, 0.85), (0.15, 0.15, 0.16)),
        _block((split + 0.1, hl - 0.03), (-0.96 * hw, 0.96 * hw), (0.5, 1.5), cab),
        _block((split + 0.1, hl - 0.03), (-0.94 * hw, 0.94 * hw), (1.5, 2.15), GLASS_BLUE, GLASS, (0.9, 0.95)),
        _block((split + 0.1, hl - 0.25), (-0.88 * hw, 0.88 * hw), (2.15, 2.4), cab),
        _block((-hl, split - 0.1), (-hw, hw), (0.85, height), cargo, RIBS),
        *_wheels((-0.62 * hl, 0.70 * hl), hw, 0.46, 0.15),
        *_lamps(hl, -hl, hw, 0.70),
    ]


def bus(rng) -> List[Shape]:
    """A city bus with a band of windows."""
    length, width, height = rng.uniform(9.5, 11.5), rng.uniform(2.6, 2.8), rng.uniform(3.0, 3.3)
    colour = _vivid(rng, saturation=(0.6, 0.85), value=(0.6, 0.85), hue=rng.choice([[0.0, 0.12], [0.3, 0.6]]))
    hl, hw = length / 2, width / 2
    return [
        _block((-hl + 0.03, hl - 0.03), (-hw + 0.02, hw - 0.02), (0.30, 1.45), colour),
        _block((-hl, hl), (-hw, hw), (1.45, 2.45), GLASS_BLUE, GLASS),
        _block((-hl + 0.03, hl - 0.03), (-hw + 0.02, hw - 0.02), (2.45, height), _jitter(rng, (0.9, 0.9, 0.86))),
        *[
            _block((x - 0.08, x + 0.08), (-hw - 0.01, hw + 0.01), (1.44, 2.46), colour)
            for x in np.linspace(-0.9 * hl, 0.9 * hl, 6)
        ],
        *_wheels((-0.58 * hl, 0.62 * hl), hw, 0.48, 0.15),
        *_lamps(hl + 0.01, -hl - 0.01, hw, 0.80),
    ]


def trailer(rng) -> List[Shape]:
    """A parked box trailer without its tractor."""
    length, width, height = rng.uniform(8.0, 10.5), rng.uniform(2.35, 2.5), rng.uniform(3.4, 3.8)
    colour = _vivid(rng, hue=(0.52, 0.72), value=(0.4, 0.7))
    hl, hw = length / 2, width / 2
    return [
        _block((-hl, hl), (-hw, hw), (1.15, height), colour, RIBS),
        _block((-hl + 0.1, hl - 0.2), (-0.4 * hw, 0.4 * hw), (0.80, 1.15), METAL),
        _block((hl - 2.2, hl - 2.0), (-0.6 * hw, -0.4 * hw), (0.0, 0.9), METAL),
        _block((hl - 2.2, hl - 2.0), (0.4 * hw, 0.6 * hw), (0.0, 0.9), METAL),
        *_wheels((-0.80 * hl, -0.52 * hl), hw, 0.48, 0.16),
    ]


def construction_vehicle(rng) -> List[Shape]:
    """A tracked excavator, yellow, its boom forward."""
    yellow = _jitter(rng, (0.92, 0.68, 0.08), 0.05)
    reach = rng.uniform(3.6, 4.4)
    return [
        _block((-2.2, 1.8), (-1.35, -0.75), (0.0, 0.80), (0.10, 0.10, 0.10), taper=(0.8, 1.0)),
        _block((-2.2, 1.8), (0.75, 1.35), (0.0, 0.80), (0.10, 0.10, 0.10), taper=(0.8, 1.0)),
        _block((-2.6, 1.3), (-1.30, 1.30), (0.80, 1.75), yellow),
        _block((-0.4, 1.2), (0.20, 1.25), (1.75, 2.95), GLASS_BLUE, GLASS, (0.85, 0.9)),
        _block((-0.3, 1.1), (0.25, 1.20), (2.95, 3.10), yellow),
        _block((0.9, 2.5), (-0.65, -0.25), (1.6, 2.9), yellow, taper=(0.5, 1.0)),
        _block((1.5, reach - 0.1), (-0.62, -0.28), (2.65, 3.15), yellow),
        _block((reach - 0.5, reach), (-0.60, -0.30), (0.9, 2.9), yellow, taper=(0.8, 1.0)),
        _block((reach - 0.9, reach + 0.2), (-1.05, 0.15), (0.1, 1.0), (0.30, 0.28, 0.26), taper=(0.7, 1.0)),
    ]


def _rider(rng, seat, lean=0.0):
    shirt = _vivid(rng)
    return [
        Shape(ELLIPSOID, (lean, 0.0, seat + 0.38), (0.20, 0.24, 0.40), shirt),
        Shape(ELLIPSOID, (lean + 0.1, 0.0, seat + 0.88), (0.13, 0.13, 0.16), _jitter(rng, (0.2, 0.2, 0.25), 0.15)),
        _block((lean - 0.1, lean + 0.35), (-0.24, -0.10), (seat - 0.35, seat + 0.05), (0.12, 0.14, 0.25)),
        _block((lean - 0.1, lean + 0.35), (0.10, 0.24), (seat - 0.35, seat + 0.05), (0.12, 0.14, 0.25)),
    ]


def motorcycle(rng, rider: bool = False) -> List[Shape]:
    """A motorcycle, red to magenta, with or without its rider."""
    colour = _vivid(rng, saturation=(0.8, 1.0), value=(0.55, 0.85), hue=(0.88, 1.0))
    return [
        *[Shape(WHEEL, (x, 0.0, 0.32), (0.32, 0.09, 0.32), RUBBER) for x in (-0.72, 0.74)],
        _block((-0.75, 0.55), (-0.20, 0.20), (0.38, 0.82), colour, taper=(0.85, 0.8)),
        _block((-0.95, -0.20), (-0.16, 0.16), (0.78, 0.92), (0.08, 0.08, 0.08)),
        _block((0.45, 0.68), (-0.14, 0.14), (0.62, 1.10), colour, taper=(0.6, 0.8)),
        _block((0.38, 0.46), (-0.36, 0.36), (1.00, 1.08), METAL),
        *(_rider(rng, 0.92) if rider else []),
    ]


def bicycle(rng, rider: bool = False) -> List[Shape]:
    """A bicycle, light green to cyan, with or without its rider."""
    colour = _vivid(rng, saturation=(0.7, 1.0), value=(0.6, 0.9), hue=(0.36, 0.5))
    return [
        *[Shape(WHEEL, (x, 0.0, 0.34), (0.34, 0.05, 0.34), RUBBER) for x in (-0.52, 0.52)],
        _block((-0.42, 0.42), (-0.06, 0.06), (0.34, 0.70), colour, taper=(0.9, 1.0)),
        _block((-0.36, -0.20), (-0.07, 0.07), (0.62, 0.95), colour),
        _block((-0.45, -0.12), (-0.10, 0.10), (0.93, 1.00), (0.08, 0.08, 0.08)),
        _block((0.36, 0.46), (-0.05, 0.05), (0.55, 1.05), colour),
        _block((0.32, 0.42), (-0.31, 0.31), (1.00, 1.07), METAL),
        *(_rider(rng, 0.98) if rider else []),
    ]


def pedestrian(rng) -> List[Shape]:
    """A person in mid-stride: shirt and trousers of different colours."""
    scale = rng.uniform(0.94, 1.08)
    shirt, trousers = _vivid(rng), _vivid(rng, saturation=(0.3, 0.7), value=(0.12, 0.4))
    hair = _jitter(rng, (0.25, 0.17, 0.12), 0.1)
    shapes = [
        Shape(BOX, (0.12, 0.11, 0.42), (0.17, 0.085, 0.42), trousers, PLAIN, (0.8, 1.0)),
        Shape(BOX, (-0.12, -0.11, 0.42), (0.17, 0.085, 0.42), trousers, PLAIN, (0.8, 1.0)),
        Shape(BOX, (0.0, 0.0, 1.12), (0.17, 0.23, 0.32), shirt, PLAIN, (1.0, 0.9)),
        Shape(BOX, (0.05, 0.28, 1.05), (0.16, 0.055, 0.33), shirt),
        Shape(BOX, (-0.05, -0.28, 1.05), (0.16, 0.055, 0.33), shirt),
        Shape(ELLIPSOID, (0.02, 0.0, 1.58), (0.12, 0.11, 0.15), SKIN),
        Shape(ELLIPSOID, (-0.02, 0.0, 1.64), (0.13, 0.12, 0.12), hair),
    ]
    grow = lambda values: tuple(v * scale for v in values)  # noqa: E731
    return [s._replace(centre=grow(s.centre), half=grow(s.half)) for s in shapes]


def barrier(rng) -> List[Shape]:
    """A striped road barrier, long side along y."""
    height = rng.uniform(0.95, 1.10)
    return [
        _block((-0.30, 0.30), (-1.0, 1.0), (0.0, 0.30), (0.75, 0.75, 0.75)),
        _block(
            (-0.20, 0.20), (-0.98, 0.98), (0.30, height), _jitter(rng, (0.85, 0.12, 0.10), 0.04), STRIPES, (0.6, 1.0)
        ),
    ]


def traffic_cone(rng) -> List[Shape]:
    """An orange cone with white bands."""
    height = rng.uniform(0.75, 0.95)
    return [
        _block((-0.28, 0.28), (-0.28, 0.28), (0.0, 0.06), (0.90, 0.35, 0.05)),
        Shape(
            CONE,
            (0.0, 0.0, 0.06 + height / 2),
            (0.21, 0.21, height / 2),
            _jitter(rng, (0.98, 0.40, 0.05), 0.03),
            CONE_BANDS,
            (0.25, 1.0),
        ),
    ]


def cart(rng) -> List[Shape]:
    """A wheeled bin in a checked pattern (class others)."""
    return [
        _block((-0.38, 0.38), (-0.33, 0.33), (0.12, 1.0), _jitter(rng, (0.45, 0.15, 0.60), 0.06), CHECKS, (1.0, 1.0)),
        _block((-0.42, 0.42), (-0.37, 0.37), (1.0, 1.10), (0.25, 0.08, 0.35)),
        *_wheels((-0.26, 0.26), 0.33, 0.10, 0.04),
    ]


def debris(rng) -> List[Shape]:
    """A stack of crates left lying about (class others)."""
    colour = _jitter(rng, (0.50, 0.20, 0.62), 0.06)
    return [
        _block((-0.65, 0.55), (-0.50, 0.50), (0.0, 0.55), colour, CHECKS),
        _block((-0.40, 0.30), (-0.30, 0.40), (0.55, 0.95), colour, CHECKS),
    ]


OBJECT_BUILDERS = {
    'car': car,
    'truck': truck,
    'bus': bus,
    'trailer': trailer,
    'construction_vehicle': construction_vehicle,
    'motorcycle': motorcycle,
    'bicycle': bicycle,
    'pedestrian': pedestrian,
    'barrier': barrier,
    'traffic_cone': traffic_cone,
    'cart': cart,
    'debris': debris,
}


def building(rng, length: float, depth: float, height: float) -> List[Shape]:
    """A building with rows of windows and a flat roof."""
    wall = _jitter(
        rng,
        [(0.72, 0.64, 0.52), (0.62, 0.42, 0.34), (0.66, 0.66, 0.68), (0.78, 0.74, 0.66)][int(rng.integers(4))],
        0.06,
    )
    hl, hd = length / 2, depth / 2
    return [
        _block((-hl, hl), (-hd, hd), (-1.0, height), wall, WALL),
        _block((-hl - 0.25, hl + 0.25), (-hd - 0.25, hd + 0.25), (height, height + 0.35), tuple(0.6 * c for c in wall)),
    ]


def wall(rng, length: float) -> List[Shape]:
    """A garden wall along x."""
    return [
        _block(
            (-length / 2, length / 2),
            (-0.15, 0.15),
            (-0.5, rng.uniform(1.2, 1.9)),
            _jitter(rng, (0.60, 0.52, 0.45)),
            RIBS,
        )
    ]


def lamp_post(rng) -> List[Shape]:
    """A street lamp; its arm points along y."""
    height = rng.uniform(4.6, 5.6)
    return [
        Shape(CONE, (0.0, 0.0, height / 2), (0.13, 0.13, height / 2), METAL, PLAIN, (0.6, 1.0)),
        _block((-0.06, 0.06), (0.0, 1.5), (height - 0.1, height), METAL),
        _block((-0.14, 0.14), (1.2, 1.8), (height - 0.18, height - 0.08), LAMP_WHITE),
    ]


def sign_post(rng) -> List[Shape]:
    """A traffic sign that faces along -x."""
    colour = _vivid(rng, hue=rng.choice([[0.58, 0.66], [0.97, 1.0]]), saturation=(0.8, 1.0))
    return [
        Shape(CONE, (0.0, 0.0, 1.3), (0.06, 0.06, 1.3), METAL),
        _block((-0.10, -0.06), (-0.40, 0.40), (1.9, 2.7), colour),
    ]


def tree(rng) -> List[Shape]:
    """A broad-leaved tree."""
    trunk, spread = rng.uniform(1.8, 2.6), rng.uniform(1.2, 1.9)
    green = _jitter(rng, (0.16, 0.36, 0.10), 0.06)
    shapes = [
        Shape(CONE, (0.0, 0.0, trunk / 2 - 0.2), (0.22, 0.22, trunk / 2 + 0.4), (0.30, 0.21, 0.13), BARK, (0.7, 1.0)),
        Shape(ELLIPSOID, (0.0, 0.0, trunk + spread), (spread, spread, 1.15 * spread), green, FOLIAGE),
    ]
    for _ in range(3):
        angle, out = rng.uniform(0, 2 * np.pi), 0.6 * spread
        centre = (out * np.cos(angle), out * np.sin(angle), trunk + spread * rng.uniform(0.6, 1.5))
        size = spread * rng.uniform(0.55, 0.75)
        shapes.append(Shape(ELLIPSOID, centre, (size, size, 0.85 * size), _jitter(rng, green, 0.03), FOLIAGE))
    return shapes


def conifer(rng) -> List[Shape]:
    """A fir: three cones on a short trunk."""
    radius, height = rng.uniform(1.3, 1.8), rng.uniform(4.5, 6.5)
    green = _jitter(rng, (0.10, 0.28, 0.14), 0.04)
    shapes = [Shape(CONE, (0.0, 0.0, 0.4), (0.2, 0.2, 0.6), (0.28, 0.19, 0.12), BARK)]
    for k, share in enumerate((1.0, 0.75, 0.5)):
        low, wide, half_height = 0.8 + k * 0.27 * height, radius * share, 0.19 * height
        shapes.append(
            Shape(CONE, (0.0, 0.0, low + half_height), (wide, wide, half_height), green, FOLIAGE, (0.12, 1.0))
        )
    return shapes


def bush(rng) -> List[Shape]:
    """A round bush."""
    size = rng.uniform(0.5, 0.9)
    green = _jitter(rng, (0.18, 0.40, 0.12), 0.06)
    return [Shape(ELLIPSOID, (0.0, 0.0, 0.6 * size), (size, size, 0.8 * size), green, FOLIAGE)]
