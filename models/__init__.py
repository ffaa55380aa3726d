"""The SparseOcc network. Importing this package registers its parts with mmdet's registries."""

from lib.openmmlab import prepare_openmmlab

prepare_openmmlab()

from .builder import build_model  # noqa: E402
from .decoders import MaskDecoder, SparseOccTransformer, SparseVoxelDecoder  # noqa: E402
from .head import SparseOccHead  # noqa: E402
from .losses import GeoScalLoss, Mask2FormerLoss, SemScalLoss  # noqa: E402
from .sparseocc import SparseOcc  # noqa: E402

__all__ = [
    'build_model',
    'SparseOcc',
    'SparseOccHead',
    'SparseOccTransformer',
    'SparseVoxelDecoder',
    'MaskDecoder',
    'Mask2FormerLoss',
    'GeoScalLoss',
    'SemScalLoss',
]
