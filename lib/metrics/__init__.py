"""Scores of occupancy: RayIoU, RayPQ and voxel mIoU (paper section 4.1, SPEC section 6). NumPy and Numba alone."""

from .evaluator import METRICS, THRESHOLDS, Evaluator, evaluate
from .origins import lidar_rays, scene_ray_origins
from .result import EvalResult

__all__ = ['METRICS', 'THRESHOLDS', 'EvalResult', 'Evaluator', 'evaluate', 'lidar_rays', 'scene_ray_origins']
