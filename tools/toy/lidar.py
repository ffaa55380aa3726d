"""LiDAR scans of a toy world, and how much of each object is in view."""

from typing import List, NamedTuple

import numpy as np

from .rig import LIDAR_AZIMUTHS, LIDAR_RANGE, Rig, lidar_directions
from .trace import SKY, pack_scene
from .trace_cpu import trace_fan, trace_rays
from .world import ToyObject, ToyWorld

_NOISE_METRES = 0.01


class Scan(NamedTuple):
    """One turn of the LiDAR, taken at one instant.

    Attributes:
        points: float32 [n, 5]: x, y, z (LIDAR_TOP, metres), intensity 0..255, ring.
        owner: int32 [n], index of the object hit in ``world.objects``, or GROUND.
    """

    points: np.ndarray
    owner: np.ndarray


def scan(world: ToyWorld, rig: Rig, t: float, rng, azimuths: int = LIDAR_AZIMUTHS) -> Scan:
    """The scan at time t (seconds from the scene's first keyframe); ``rng`` draws the range noise."""
    to_map = world.ego_to_map(t) @ rig.lidar_to_ego
    table = world.shapes_at(t, to_map[:3, 3], LIDAR_RANGE)
    rays, ring = lidar_directions(azimuths)
    scene = pack_scene(table, world.waves, to_map[:3, 3])
    directions = (rays @ to_map[:3, :3].T).reshape(azimuths, -1, 3)
    distance, hit = (a.reshape(-1) for a in trace_fan(scene, to_map[:3, :3], directions, LIDAR_RANGE))
    distance += rng.normal(0.0, _NOISE_METRES, len(rays))
    owner = np.where(hit >= 0, table.owner[np.maximum(hit, 0)], hit)
    brightness = np.where(hit >= 0, 255.0 * table.colour[np.maximum(hit, 0)].mean(axis=1), 40.0)
    found = hit != SKY
    points = np.column_stack([rays * distance[:, None], np.floor(brightness), ring])
    return Scan(points[found].astype(np.float32), owner[found].astype(np.int32))


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
    table = world.shapes_at(t, eye)
    distance, hit = trace_rays(pack_scene(table, world.waves, eye), offset / reach[:, None])
    owner = np.where(hit >= 0, table.owner[np.maximum(hit, 0)], hit)
    wanted = np.repeat([item.index for item in items], len(grid))
    hidden = (owner != wanted) & (distance < reach)
    return 1.0 - hidden.reshape(len(items), len(grid)).mean(axis=1)
