"""Where the LiDAR stands in each frame of a scene: the origins of the evaluation's rays (paper section 4.1,
RayIoU; SPEC section 6).

Frames: LIDAR_TOP and ego of one keyframe, global. Metres, quaternions wxyz, timestamps in microseconds.
"""

from typing import Dict, Sequence

import numpy as np

from ..geometry import invert_rigid, transform_points
from ..infos import ego_from_lidar, global_from_ego, split_scenes
from ..task import OCC3D_RANGE

MAX_ORIGINS = 8
ORIGIN_MARGIN = 1.0  # metres between an origin and the sides of the volume


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
