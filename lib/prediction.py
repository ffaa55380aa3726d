"""Predictions as plain arrays: sparse from the model, dense for metrics and pictures, in files.

A prediction is the dict the model returns per sample: sem_pred uint8 [1, K], occ_loc uint8 or int16
[1, K, 3] (voxel indices x, y, z) and, for panoptic tasks, pano_inst int16 [1, K] and pano_sem uint8 [1, K].
"""

import zipfile
from typing import Dict, Mapping

import numpy as np

from .errors import DataError
from .io import PathLike, save_npz
from .task import Task

_REQUIRED = ('sem_pred', 'occ_loc')
_OPTIONAL = ('pano_inst', 'pano_sem')


def to_dense(prediction: Mapping[str, np.ndarray], task: Task) -> Dict[str, np.ndarray]:
    """Volumes from a sparse prediction.

    Returns:
        semantics uint8 [X, Y, Z], free where nothing was predicted (``pano_sem`` for panoptic predictions,
        which is what panoptic models are scored on); for panoptic predictions also instances int16
        [X, Y, Z], 0 = none.
    """
    x, y, z = np.asarray(prediction['occ_loc'])[0].astype(np.int64).T
    panoptic = 'pano_sem' in prediction
    dense = dict(semantics=np.full(task.grid_shape, task.label_set.free_id, dtype=np.uint8))
    dense['semantics'][x, y, z] = prediction['pano_sem' if panoptic else 'sem_pred'][0]
    if panoptic:
        dense['instances'] = np.zeros(task.grid_shape, dtype=np.int16)
        dense['instances'][x, y, z] = prediction['pano_inst'][0]
    return dense


def save_prediction(path: PathLike, prediction: Mapping[str, np.ndarray]) -> None:
    """Write a prediction as compressed npz; a reader never sees half a file.

    Raises:
        UserError: it cannot be written (disk full, no permission).
    """
    save_npz(path, {name: prediction[name] for name in sorted(prediction)})


def load_prediction(path: PathLike) -> Dict[str, np.ndarray]:
    """A prediction from a file of :func:`save_prediction`.

    Raises:
        DataError: the file is missing, damaged, or lacks an array.
    """
    try:
        with np.load(str(path), allow_pickle=False) as file:
            prediction = {name: file[name] for name in _REQUIRED + _OPTIONAL if name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f'{path} is not a readable prediction file ({error}); predict again with val.py --save-predictions'
        ) from error
    missing = [name for name in _REQUIRED if name not in prediction]
    if missing:
        raise DataError(f'{path} has no array {missing}; it is not a prediction file of this project')
    return prediction
