"""The two decoders: sparse voxels, then masks over them."""

from .mask_decoder import MaskDecoder, MaskPrediction
from .sparse_voxel_decoder import SparseVoxelDecoder, VoxelStage

__all__ = ['MaskDecoder', 'MaskPrediction', 'SparseVoxelDecoder', 'VoxelStage']
