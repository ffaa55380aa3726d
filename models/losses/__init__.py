"""Losses of the voxel decoder (per stage) and of the mask decoder (per prediction)."""

from .mask2former import Mask2FormerLoss
from .scene_affinity import GeoScalLoss, SemScalLoss
from .voxel import VoxelLosses

__all__ = ['GeoScalLoss', 'Mask2FormerLoss', 'SemScalLoss', 'VoxelLosses']
