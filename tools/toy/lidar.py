"""LiDAR scans of a toy world, the surfaces they reach, and how much of each object is in view."""

from typing import List, NamedTuple, Sequence

import numpy as np

from .rig import LIDAR_AZIMUTHS, LIDAR_RANGE, Rig, lidar_directions
from .road import lookup
from .trace import GROUND, SKY, pack_scene
from .trace_cpu import trace_fan, trace_rays
from .trace_voxels import first_of_each
from .world import GROUND_CLASS_IDS, ToyObject, ToyWorld

LATTICE = 0.1  # metres; of the surface points in one cell of this size, one is kept
_NOISE_METRES = 0.01
_GROUND_CLASSES, _CLASS_OF_CODE = np.unique(GROUND_CLASS_IDS, return_inverse=True)


class Surface(NamedTuple):
    """Surface points that LiDAR rays reached.

    Attributes:
        points: float32 [n, 3], metres; in the map frame on what stands still, in its own frame on an object
            that moves.
        source: int16 [n], what they lie on: an object's index, or, from ``len(world.objects)`` on, the ground
            of one class (see :func:`ground_classes`).
    """

    points: np.ndarray
    source: np.ndarray


class Scan(NamedTuple):
    """One turn of the LiDAR, taken at one instant. n: rays that hit something.

    Attributes:
        points: float32 [n, 5]: x, y, z (LIDAR_TOP, metres), intensity 0..255, ring.
        owner: int32 [n], index of the object hit in ``world.objects``, or GROUND.
        distance: float32 [azimuths * rings], metres, without noise; LIDAR_RANGE where nothing is hit.
        surface: where the rays end, without noise.
    """

    points: np.ndarray
    owner: np.ndarray
    distance: np.ndarray
    surface: Surface


def ground_classes() -> np.ndarray:
    """uint8: classes (Occ3D ids) of the sources that are ground, in their order."""
    return _GROUND_CLASSES


def scan(world: ToyWorld, rig: Rig, t: float, rng=None, azimuths: int = LIDAR_AZIMUTHS) -> Scan:
    """The scan at time t (seconds from the scene's first keyframe); ``rng`` draws the range noise, if any."""
    to_map = world.ego_to_map(t) @ rig.lidar_to_ego
    table = world.shapes_at(t, to_map[:3, 3], LIDAR_RANGE)
    rays, ring = lidar_directions(azimuths)
    scene = pack_scene(table, world.waves, to_map[:3, 3])
    directions = rays @ to_map[:3, :3].T
    fan = trace_fan(scene, to_map[:3, :3], directions.reshape(azimuths, -1, 3), LIDAR_RANGE)
    distance, hit = (a.reshape(-1) for a in fan)
    owner = np.where(hit >= 0, table.owner[np.maximum(hit, 0)], hit)
    brightness = np.where(hit >= 0, 255.0 * table.colour[np.maximum(hit, 0)].mean(axis=1), 40.0)
    found = hit != SKY
    noisy = distance + (rng.normal(0.0, _NOISE_METRES, len(rays)) if rng is not None else 0.0)
    points = np.column_stack([rays * noisy[:, None], np.floor(brightness), ring])
    ends = to_map[:3, 3] + directions[found] * distance[found, None]
    return Scan(
        points[found].astype(np.float32),
        owner[found].astype(np.int32),
        distance.astype(np.float32),
        _surface(world, t, ends, owner[found]),
    )


def _surface(world, t, ends, owner) -> Surface:
    """Where rays end, ``ends`` float64 [n, 3] in the map frame, on ``owner``."""
    codes = np.minimum(lookup(world.ground, ends[:, 0], ends[:, 1]), len(_CLASS_OF_CODE) - 1)
    source = np.where(owner == GROUND, len(world.objects) + _CLASS_OF_CODE[codes], owner)
    number = np.full(len(world.objects) + len(_GROUND_CLASSES), -1)
    number[[o.index for o in world.moving]] = np.arange(len(world.moving))
    number = number[source]
    moving = number >= 0
    pose = world.moving_poses(t)[number[moving]]
    x, y, z = (ends[moving] - pose[:, :3]).T
    c, s = np.cos(pose[:, 3]), np.sin(pose[:, 3])
    ends[moving] = np.stack([c * x + s * y, c * y - s * x, z], axis=1)
    return Surface(ends.astype(np.float32), source.astype(np.int16))


def gather(parts: Sequence[Surface]) -> Surface:
    """Several surfaces as one, with one point per source and cell of the lattice."""
    points = np.concatenate([part.points for part in parts])
    source = np.concatenate([part.source for part in parts])
    x, y, z = (np.floor(points / LATTICE).astype(np.int64) & 0xFFFF).T
    keep = first_of_each((source.astype(np.int64) << 48) | (x << 32) | (y << 16) | z)
    return Surface(points[keep], source[keep])


def visible_share(world: ToyWorld, t: float, eye: np.ndarray, items: List[ToyObject]) -> np.ndarray:
    """Share float64 [n] of each object's box that nothing else hides from ``eye`` (map frame, [3])."""
    if not items:
        return np.zeros(0)
    steps = np.linspace(-0.35, 0.35, 3)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing='ij'), axis=-1).reshape(-1, 3)
    targets = []
    for item in items:
        pose = item.pose(t)
        x, y, z = (grid * item.size).T
        c, s = np.cos(pose.yaw), np.sin(pose.yaw)
        turned = np.stack([c * x - s * y, s * x + c * y, z], axis=1)
        targets.append(turned + (pose.x, pose.y, pose.z + item.box_centre_z))
    offset = np.concatenate(targets) - eye
    reach = np.linalg.norm(offset, axis=1)
    table = world.shapes_at(t, eye, float(reach.max()))
    distance, hit = trace_rays(pack_scene(table, world.waves, eye), offset / reach[:, None])
    owner = np.where(hit >= 0, table.owner[np.maximum(hit, 0)], hit)
    wanted = np.repeat([item.index for item in items], len(grid))
    hidden = (owner != wanted) & (distance < reach)
    return 1.0 - hidden.reshape(len(items), len(grid)).mean(axis=1)
