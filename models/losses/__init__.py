"""Losses of the voxel decoder (per stage) and of the mask decoder (per prediction)."""

from .mask2former import Mask2FormerLoss
from .voxel import StageLabels, VoxelLosses, check_targets
from .voxel_terms import BalancedOccupancyLoss, GeoScalLoss, LovaszSoftmaxLoss, SemScalLoss, VoxelCrossEntropyLoss

__all__ = [
    'BalancedOccupancyLoss',
    'GeoScalLoss',
    'LovaszSoftmaxLoss',
    'Mask2FormerLoss',
    'SemScalLoss',
    'StageLabels',
    'VoxelCrossEntropyLoss',
    'VoxelLosses',
    'check_targets',
]
