"""Scenes of a list of keyframes, and where the LiDAR stands in each frame of a scene: the origins of the
evaluation's rays (paper section 4.1, RayIoU; SPEC section 6).

Frames: LIDAR_TOP and ego of one keyframe, global. Metres, quaternions wxyz, timestamps in microseconds.
"""

from typing import Dict, List, Sequence

import numpy as np

from lib.geometry import invert_rigid, transform_points

from .infos import ego_from_lidar, global_from_ego

MAX_ORIGINS = 8
ORIGIN_MARGIN = 1.0  # metres between an origin and the sides of the volume
MAX_KEYFRAME_GAP = 5_000_000  # microseconds; keyframes of one scene are 0.5 s apart
OCC3D_RANGE = (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4)


def split_scenes(infos: Sequence[Dict]) -> List[List[int]]:
    """Group keyframes by scene.

    A scene is known by ``scene_token`` or ``scene_name`` where an info has one. Infos without (as
    MMDetection3D 1.0 makes them) are taken in time order, and a scene ends where the next keyframe is more
    than 5 s later or is a first keyframe: one without sweeps, in a list where others have some. Thin a list
    out after splitting it, not before: gaps of over 5 s would look like ends of scenes.

    Args:
        infos: keyframes in any order.

    Returns:
        Per scene the indices of its keyframes in time order; scenes in the order they begin.
    """
    order = sorted(range(len(infos)), key=lambda index: infos[index]['timestamp'])
    scenes, last_unnamed = {}, None
    marked = any(len(info.get('sweeps', ())) for info in infos)
    for index in order:
        info = infos[index]
        name = info.get('scene_token') or info.get('scene_name')
        if name:
            scenes.setdefault(('named', name), []).append(index)
            continue
        if last_unnamed is None or _begins_scene(infos[last_unnamed[-1]], info, marked):
            last_unnamed = scenes.setdefault(('unnamed', index), [])
        last_unnamed.append(index)
    return list(scenes.values())


def _begins_scene(previous, info, marked):
    late = info['timestamp'] - previous['timestamp'] > MAX_KEYFRAME_GAP
    return late or (marked and not len(info.get('sweeps', ())))


def scene_ray_origins(
    infos: Sequence[Dict], point_cloud_range: Sequence[float] = OCC3D_RANGE, max_origins: int = MAX_ORIGINS
) -> Dict[str, np.ndarray]:
    """Origins of the evaluation's rays for every keyframe.

    They are the positions of LIDAR_TOP in every frame of the keyframe's scene that lie over the volume, at
    least 1 m from its sides; of more than ``max_origins``, as many spread evenly over time.

    Args:
        infos: keyframes in any order, with all frames of their scenes.
        point_cloud_range: (x0, y0, z0, x1, y1, z1) of the volume, metres, ego frame.
        max_origins: most origins per keyframe.

    Returns:
        {token: float64 [O, 3]}, metres, ego frame of that keyframe, in time order.
    """
    origins = {}
    for scene in split_scenes(infos):
        ego_from_lidars = [ego_from_lidar(infos[index]) for index in scene]
        global_from_lidars = np.stack(
            [global_from_ego(infos[index]) @ pose for index, pose in zip(scene, ego_from_lidars)]
        )
        positions = global_from_lidars[:, :3, 3]
        for index, pose, global_from_lidar in zip(scene, ego_from_lidars, global_from_lidars):
            in_lidar = transform_points(invert_rigid(global_from_lidar), positions)
            # Quirk: published origins are rounded to single precision in the LiDAR frame (about 2e-6 m).
            in_ego = transform_points(pose, in_lidar.astype(np.float32).astype(np.float64))
            origins[infos[index]['token']] = _choose(in_ego, point_cloud_range, max_origins)
    return origins


def _choose(positions, point_cloud_range, max_origins):
    """The positions [F, 3] over the volume, thinned to ``max_origins``. float64 [O, 3]."""
    low = np.asarray(point_cloud_range[:2]) + ORIGIN_MARGIN
    high = np.asarray(point_cloud_range[3:5]) - ORIGIN_MARGIN
    kept = positions[np.all((positions[:, :2] > low) & (positions[:, :2] < high), axis=1)]
    if len(kept) <= max_origins:
        return kept
    return kept[np.round(np.linspace(0, len(kept) - 1, max_origins)).astype(np.int64)]
