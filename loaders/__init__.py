"""From files to batches: the data set, its pipeline, the loader. Importing it registers them with mmdet."""

from lib.compat import prepare_openmmlab

prepare_openmmlab()

from . import pipelines  # noqa: E402, F401 (registers the steps)
from .builder import allow_many_open_files, build_dataloader, build_dataset  # noqa: E402
from .formatting import collate  # noqa: E402
from .nuscenes_occ import NuSceneOcc  # noqa: E402

__all__ = ['NuSceneOcc', 'allow_many_open_files', 'build_dataloader', 'build_dataset', 'collate']
