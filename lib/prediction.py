"""A prediction as arrays, checked and made dense; how it is saved, and the record that lies beside saved ones.

Sparse, as the model returns it per sample: ``sem_pred`` uint8 [1, K], ``occ_loc`` uint8 or int16 [1, K, 3] (voxel
indices x, y, z), for panoptic tasks ``pano_inst`` int16 [1, K] and ``pano_sem`` uint8 [1, K]; ``flow`` [1, K, 2]
where there is one. Dense, as metrics and pictures take it: ``semantics`` uint8 [X, Y, Z], ``instances`` int32
[X, Y, Z] (0 = none), ``flow`` float32 [X, Y, Z, 2] (m/s, ego axes). K voxels; X, Y, Z the task's grid.
"""

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from . import __version__
from .errors import DataError
from .io import PathLike, read_json, save_npz, write_json
from .task import Task

RECORD_FILE = 'predictions.json'
MAX_INSTANCE_ID = (1 << 16) - 1  # as many as scores tell apart
_RECORD_KIND = 'occupancy predictions'
_SPARSE = ('sem_pred', 'pano_sem', 'pano_inst', 'flow')


def to_dense(prediction: Mapping[str, np.ndarray], task: Task, where: str = 'the prediction') -> Dict[str, np.ndarray]:
    """Volumes from a sparse prediction; free where nothing was predicted.

    Args:
        prediction: arrays with the batch axis of 1, or all of them without.
        where: what messages call it, e.g. its file.

    Returns:
        dict with ``semantics`` (from ``pano_sem`` for panoptic predictions, which is what panoptic models are scored
        on), and as far as predicted ``instances`` and ``flow``.

    Raises:
        DataError: an array is missing, of the wrong type or length, or holds ids or voxels that the task does not
            have, or one voxel twice.
    """
    missing = [name for name in ('occ_loc', 'sem_pred') if name not in prediction]
    missing += sorted({'pano_inst', 'pano_sem'} - set(prediction)) if 'pano_inst' in prediction else []
    missing += ['pano_inst'] if 'pano_sem' in prediction and 'pano_inst' not in prediction else []
    if missing:
        raise DataError(f'{where} has no {missing[0]!r}, which belongs to a sparse prediction; save all of its arrays')
    arrays = _without_batch_axis(
        {name: prediction[name] for name in ('occ_loc',) + _SPARSE if name in prediction}, where
    )
    voxels = _voxels(arrays.pop('occ_loc'), task, where)
    classes = {name: class_ids(arrays[name], name, task, where) for name in ('sem_pred', 'pano_sem') if name in arrays}
    dense = {'semantics': _scatter(voxels, classes[list(classes)[-1]], task, task.label_set.free_id)}
    if 'pano_inst' in arrays:
        dense['instances'] = _scatter(voxels, instance_ids(arrays['pano_inst'], 'pano_inst', where), task, 0)
    if 'flow' in arrays:
        dense['flow'] = _scatter(voxels, velocities(arrays['flow'], 'flow', where), task, 0)
    return dense


def class_ids(array, name: str, task: Task, where: str) -> np.ndarray:
    """uint8 class ids of any shape, checked against the task's label set; whole numbers in floats are accepted.

    Raises:
        DataError: another type, a fraction, or an id that the label set does not have.
    """
    labels = task.label_set
    meaning = f'class ids of label set {labels.name!r}, {labels.free_id} = free'
    return _whole_numbers(array, name, labels.free_id, meaning, where).astype(np.uint8)


def instance_ids(array, name: str, where: str) -> np.ndarray:
    """int32 instance ids of any shape, 0 = none. Raises DataError as :func:`class_ids` does."""
    return _whole_numbers(array, name, MAX_INSTANCE_ID, 'instance ids, 0 = none', where).astype(np.int32)


def velocities(array, name: str, where: str) -> np.ndarray:
    """float32 velocities of any shape. Raises DataError for another type, and for what is not finite."""
    return finite(array, np.float32, name, where, 'velocities that are not finite; save 0 where nothing moves')


def finite(array, dtype, name: str, where: str, otherwise: str) -> np.ndarray:
    """The array in a floating type, in which all of it is finite.

    Args:
        otherwise: what it holds where it is not.

    Raises:
        DataError: that, or it holds no numbers.
    """
    array = np.asarray(array)
    if array.dtype.kind not in 'iuf':
        raise DataError(f'{where}: {name!r} holds {array.dtype}, numbers are needed')
    with np.errstate(over='ignore'):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise DataError(f'{where}: {name!r} holds {otherwise}')
    return array


def _whole_numbers(array, name, highest, meaning, where):
    """The array, or an integer one of equal values, once it is known to hold whole numbers in 0..highest."""
    array = np.asarray(array)
    if array.dtype.kind not in 'iuf':
        raise DataError(f'{where}: {name!r} holds {array.dtype}, integers are needed ({meaning})')
    if array.dtype.kind == 'f':
        fractions = ~(np.isfinite(array) & (array == np.trunc(array)))
        if fractions.any():
            raise DataError(f'{where}: {name!r} holds {array[fractions][0]}, whole numbers are needed ({meaning})')
    if array.size and (array.min() < 0 or array.max() > highest):
        value = array.min() if array.min() < 0 else array.max()
        raise DataError(
            f'{where}: {name!r} holds {value:.0f}, allowed are 0..{highest} ({meaning}); is it a prediction of another '
            'label set or grid?'
        )
    return array.astype(np.int64) if array.dtype.kind == 'f' else array


def _without_batch_axis(arrays, where):
    """Arrays [K] (occ_loc [K, 3], flow [K, 2]) of equal length, from ones that all have a batch axis of 1 or none."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    shapes = ', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())
    columns = {'occ_loc': (3,), 'flow': (2,)}
    batched = arrays['occ_loc'].ndim == 3
    if batched and all(array.shape[:1] == (1,) for array in arrays.values()):
        arrays = {name: array[0] for name, array in arrays.items()}
    count = arrays['occ_loc'].shape[:1]
    if any(array.shape != count + columns.get(name, ()) for name, array in arrays.items()):
        raise DataError(
            f'{where} has arrays that do not fit together: {shapes}; needed are occ_loc [1, K, 3], flow [1, K, 2] and '
            'the others [1, K], or all of them without the first axis'
        )
    return arrays


def _voxels(occ_loc, task, where):
    """Row-major voxel numbers int64 [K] of indices [K, 3]."""
    for axis, size in enumerate(task.grid_shape):
        _whole_numbers(occ_loc[:, axis], 'occ_loc', size - 1, f'voxels along {"xyz"[axis]}', where)
    indices = occ_loc.astype(np.int64)
    voxels = (indices[:, 0] * task.grid_shape[1] + indices[:, 1]) * task.grid_shape[2] + indices[:, 2]
    seen = np.zeros(task.grid_shape, dtype=bool).reshape(-1)
    seen[voxels] = True
    if np.count_nonzero(seen) < len(voxels):
        numbers, counts = np.unique(voxels, return_counts=True)
        twice = [int(index) for index in np.unravel_index(numbers[counts > 1][0], task.grid_shape)]
        raise DataError(
            f"{where}: 'occ_loc' lists voxel {twice} more than once ({len(voxels) - len(numbers)} voxels too many); a "
            'voxel can have one class only'
        )
    return voxels


def _scatter(voxels, values, task, fill):
    volume = np.full(task.grid_shape + values.shape[1:], fill, dtype=values.dtype)
    volume.reshape((-1,) + values.shape[1:])[voxels] = values
    return volume


def save_prediction(path: PathLike, prediction: Mapping[str, np.ndarray]) -> None:
    """Write a prediction as compressed npz; a reader never sees half a file.

    Raises:
        UserError: the file cannot be written.
    """
    save_npz(path, {name: prediction[name] for name in sorted(prediction)})


def write_record(
    folder: PathLike,
    task: Task,
    config: Optional[str] = None,
    weights: Optional[str] = None,
    split: Optional[str] = None,
    override: Sequence[str] = (),
) -> None:
    """Write down beside predictions what they are predictions of; whoever reads them compares.

    Args:
        folder: of the predictions.
        config, weights, split, override: where they are from, as given by the user.

    Raises:
        DataError: the folder holds predictions of another label set or grid.
        UserError: the record cannot be written.
    """
    before = read_record(folder)
    if before is not None:
        check_record(before, task, f'the predictions that {folder} holds already')
    about = dict(config=config, weights=weights, split=split, override=list(override))
    numbers = dict(grid_shape=task.grid_shape, cameras=task.cameras, num_frames=task.num_frames, panoptic=task.panoptic)
    written_by = dict(kind=_RECORD_KIND, project=f'sparseocc {__version__}')
    rows = f'the voxels that the model kept, of any class; those of class {task.label_set.free_id} are free'
    write_json(Path(folder) / RECORD_FILE, dict(written_by, **_compared(task), **numbers, **about, rows=rows))


def read_record(folder: PathLike) -> Optional[Dict[str, Any]]:
    """The record beside predictions; None where there is none, as with those of other projects.

    Raises:
        DataError: it is damaged.
    """
    path = Path(folder) / RECORD_FILE
    return select_record(read_json(path), str(path)) if path.is_file() else None


def select_record(value: Any, where: str) -> Optional[Dict[str, Any]]:
    """``value`` of a JSON file if it is a record; None if it is a file of something else.

    Raises:
        DataError: it is a record that lacks something.
    """
    if not isinstance(value, dict) or value.get('kind') != _RECORD_KIND:
        return None
    names, corners = value.get('class_names'), value.get('point_cloud_range')
    right = dict(
        label_set=isinstance(value.get('label_set'), str),
        class_names=isinstance(names, list) and all(isinstance(name, str) for name in names),
        point_cloud_range=isinstance(corners, list) and all(map(_is_number, corners)),
        voxel_size=_is_number(value.get('voxel_size')),
    )
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        raise DataError(f'{where}: {wrong[0]!r} is missing or damaged; predict again, or remove the file')
    return value


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def check_record(record: Mapping[str, Any], task: Task, what: str = 'the predictions') -> None:
    """Raise DataError unless predictions with this record have the label set and the grid of the task.

    Args:
        record: from :func:`read_record`.
        what: what messages call the predictions.
    """
    wanted = _compared(task)
    remedy = 'give the config that they were predicted with, or other predictions'
    if record['class_names'] != wanted['class_names']:
        raise DataError(
            f'{what} are of label set {record["label_set"]!r} ({len(record["class_names"])} classes: '
            f'{_shortened(record["class_names"])}), but the task has {wanted["label_set"]!r} '
            f'({len(wanted["class_names"])}: {_shortened(wanted["class_names"])}); {remedy}'
        )
    for name in ('point_cloud_range', 'voxel_size'):
        theirs, ours = np.ravel(record[name]), np.ravel(wanted[name])
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=0, atol=1e-6):
            raise DataError(f'{what} have {name} {record[name]}, but the task has {wanted[name]}; {remedy}')
    if record.get('frame', 'ego') != task.frame:  # records of before have none
        raise DataError(f'{what} are in frame {record["frame"]!r}, but the task is in {task.frame!r}; {remedy}')


def _compared(task) -> Dict[str, Any]:
    """What predictions and task must agree on."""
    return dict(
        label_set=task.label_set.name,
        class_names=list(task.label_set.class_names),
        point_cloud_range=list(task.point_cloud_range),
        voxel_size=task.voxel_size,
        frame=task.frame,
    )


def _shortened(names):
    return ', '.join(str(name) for name in names[:3]) + ', ...'
