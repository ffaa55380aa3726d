"""Pinhole projection, by which tests look at calibration."""

import numpy as np

from lib.geometry import transform_points


def project_points(matrix: np.ndarray, points: np.ndarray):
    """Pixels [..., 2] and depths [...] (metres) of points [..., 3] under a 4x4 projection matrix.

    A point with depth <= 0 is behind the camera; its pixel means nothing.
    """
    projected = transform_points(matrix, points)
    depth = projected[..., 2]
    safe = np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    return projected[..., :2] / safe[..., None], depth
