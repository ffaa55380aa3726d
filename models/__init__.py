"""The SparseOcc network. Importing this package registers its parts with mmdet's registries."""

from lib.openmmlab import import_mmdet

import_mmdet()

from . import decoders, head, losses, sparseocc  # noqa: E402
from .builder import build_model  # noqa: E402

__all__ = ['build_model', 'decoders', 'head', 'losses', 'sparseocc']
