"""Rigid transforms, quaternions and boxes in NumPy.

4x4 matrices act on column vectors from the left: p_b = b_from_a @ [x, y, z, 1]. Metres and radians.
Quaternions are (w, x, y, z), as in nuScenes.
"""

import math
from typing import Sequence

import numpy as np


def quaternion_to_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """Rotation matrix float64 [3, 3] of a quaternion (w, x, y, z) of any length but zero."""
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_z(angle: float) -> np.ndarray:
    """Rotation about z by ``angle`` radians, x towards y, float64 [3, 3]."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def make_transform(rotation: np.ndarray, translation: Sequence[float]) -> np.ndarray:
    """4x4 float64 from a rotation [3, 3] and a translation [3]: p' = rotation @ p + translation."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def pose_to_matrix(rotation: Sequence[float], translation: Sequence[float]) -> np.ndarray:
    """4x4 float64 of a nuScenes pose: quaternion (w, x, y, z) and translation [3], metres."""
    return make_transform(quaternion_to_matrix(rotation), translation)


def invert_rigid(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a rigid 4x4 transform, by transposing its rotation."""
    rotation = matrix[:3, :3].T
    return make_transform(rotation, -rotation @ matrix[:3, 3])


def intrinsics_to_matrix(intrinsics: np.ndarray) -> np.ndarray:
    """4x4 float64 that holds a camera matrix [3, 3] in its corner: camera metres to (u·d, v·d, d, 1)."""
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsics
    return matrix


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a 4x4 rigid or affine transform to points [..., 3]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def voxel_centers(
    point_cloud_range: Sequence[float], voxel_size: float, grid_shape: Sequence[int], indices: np.ndarray = None
) -> np.ndarray:
    """Centres (metres) of voxels.

    Args:
        point_cloud_range: (x0, y0, z0, x1, y1, z1), metres.
        voxel_size: metres.
        grid_shape: (X, Y, Z).
        indices: integer voxel indices [..., 3]; None means every voxel of the grid, [X, Y, Z, 3].
    Returns:
        float64, the shape of ``indices``.
    """
    if indices is None:
        indices = np.stack(np.meshgrid(*[np.arange(n) for n in grid_shape], indexing='ij'), axis=-1)
    return (indices + 0.5) * voxel_size + np.asarray(point_cloud_range[:3], dtype=np.float64)
