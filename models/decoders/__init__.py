"""The two decoders, sparse voxels and masks over them, and the transformer that runs one after the other."""

from .mask_decoder import MaskDecoder, MaskPrediction
from .sparse_voxel_decoder import SparseVoxelDecoder, VoxelStage
from .transformer import SparseOccTransformer, TransformerOutput

__all__ = [
    'MaskDecoder',
    'MaskPrediction',
    'SparseOccTransformer',
    'SparseVoxelDecoder',
    'TransformerOutput',
    'VoxelStage',
]
