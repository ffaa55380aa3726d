"""Scores of occupancy: RayIoU, RayPQ and voxel mIoU (paper section 4.1, SPEC section 6)."""

from .evaluator import OccEvaluator, SampleStats
from .rays import lidar_rays
from .result import EvalResult

__all__ = ['EvalResult', 'OccEvaluator', 'SampleStats', 'lidar_rays']
