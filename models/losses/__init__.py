"""Losses of the voxel decoder (per stage) and of the mask decoder (per prediction); importing registers them."""

from .auxiliary import BEGINNING, DenoisingLoss, LidarDepthLoss, TrainingPass, build_auxiliary_losses
from .mask2former import Mask2FormerLoss
from .ray_terms import RayConsistencyLoss
from .voxel import StageLabels, VoxelLosses, check_targets

__all__ = [
    'BEGINNING',
    'DenoisingLoss',
    'LidarDepthLoss',
    'Mask2FormerLoss',
    'RayConsistencyLoss',
    'StageLabels',
    'TrainingPass',
    'VoxelLosses',
    'build_auxiliary_losses',
    'check_targets',
]
