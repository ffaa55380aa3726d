"""From files to batches: the data set and its pipeline. Importing it registers them with mmdet."""

from lib.openmmlab import import_mmdet

import_mmdet()

from .nuscenes_occ import NuSceneOcc, build_dataset  # noqa: E402
from .pipelines import collate  # noqa: E402

__all__ = ['NuSceneOcc', 'build_dataset', 'collate']
