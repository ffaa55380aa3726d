"""Label files ``<occ_gt_root>/<scene-name>/<sample-token>/labels.npz``: finding, reading, checking."""

import os
from pathlib import Path
from typing import Dict, Optional, Sequence

import numpy as np

from .classes import IGNORE_LABEL
from .errors import DataError
from .io import load_npz_checked, path_inside, read_json
from .task import Task

LABEL_FILE = 'labels.npz'
OPTIONAL = ('instances', 'mask_camera', 'mask_lidar')
_MAX_INSTANCE = np.iinfo(np.int32).max


class LabelFolder:
    """Label files of one kind. Nothing is read or listed before the first label is asked for.

    Args:
        root: folder of the scenes' folders; ``gts`` in it or in its place, as Occ3D is released, is found.
        data_root: nuScenes folder, whose tables name the scene of a sample where the info file does not.
        version: nuScenes version of the info file, e.g. ``v1.0-trainval``; '' if unknown.
    """

    def __init__(self, root, data_root, version: str = ''):
        self.root = _released_layout(Path(root))
        self._data_root = Path(data_root)
        self._version = version
        self._scene_names: Optional[Dict[str, str]] = None

    def path(self, info: Dict) -> Path:
        """Path of a keyframe's label file, which need not exist.

        Raises:
            DataError: the scene of the keyframe cannot be found out.
        """
        return path_inside(self.root, self.scene(info), info['token'], LABEL_FILE)

    def scene(self, info: Dict) -> str:
        """Name of a keyframe's scene.

        Raises:
            DataError: it cannot be found out.
        """
        return info.get('scene_name') or self._look_up_scene(info['token'])

    def _look_up_scene(self, token):
        if self._scene_names is None:
            self._scene_names = _scenes_from_tables(self._data_root, self._version) or _scenes_from_folder(self.root)
        if token not in self._scene_names:
            raise DataError(
                f'no label of keyframe {token} in {self.root}, and neither the info file nor '
                f'{self._data_root / (self._version or "v1.0-*")} names its scene; check occ_gt_root (--labels), or '
                'make the info file again with gen_sweep_info.py'
            )
        return self._scene_names[token]


def _released_layout(root):
    """Occ3D's archives unpack to ``gts``: inside the label folder, or beside where it would be."""
    beside = root.parent / 'gts'
    if (root / 'gts').is_dir():
        return root / 'gts'
    return beside if root.name == 'occ3d' and not root.exists() and beside.is_dir() else root


def _scenes_from_tables(data_root, version):
    """{sample token: scene name} from the nuScenes tables; empty without them."""
    tables = data_root / version
    if not version or not (tables / 'sample.json').is_file() or not (tables / 'scene.json').is_file():
        return {}
    names = {scene['token']: scene['name'] for scene in read_json(tables / 'scene.json')}
    return {sample['token']: names[sample['scene_token']] for sample in read_json(tables / 'sample.json')}


def _scenes_from_folder(root):
    """{sample token: scene name} from the names of the label folders."""
    if not root.is_dir():
        raise DataError(
            f'label folder {root} does not exist; correct occ_gt_root (--labels), or set occ_gt_root=None to run '
            'without labels'
        )
    scenes = {}
    for scene in sorted(os.listdir(str(root))):
        folder = root / scene
        if folder.is_dir():
            scenes.update((token, scene) for token in os.listdir(str(folder)))
    return scenes


def read_labels(path, task: Task, names: Sequence[str] = OPTIONAL) -> Dict[str, np.ndarray]:
    """Arrays of a label file, checked against the task.

    Args:
        names: arrays to read beside ``semantics`` where the file has them; unpacking takes longer than all else.
            ``flow`` must be there if it is named.

    Returns:
        dict with ``semantics`` uint8 [X, Y, Z], and where the file has them ``instances`` int32 [X, Y, Z]
        (0 = none), ``mask_camera`` and ``mask_lidar`` bool [X, Y, Z], ``flow`` float32 [X, Y, Z, 2], m/s along x and
        y of the ego frame.

    Raises:
        DataError: missing or damaged file, wrong shape, or ids that the task's label set does not have.
    """
    required, largest = ('semantics',) + ('flow',) * ('flow' in names), int(np.prod(task.label_grid[0]))
    arrays = fit_to_task(path, load_npz_checked(path, required, names, 2 * largest), task)
    velocity = arrays.pop('flow', None)
    if task.panoptic and 'instances' not in arrays:
        raise DataError(
            f'{path} has no instances, which task.panoptic needs; make labels that have them with '
            'gen_instance_info.py and point occ_gt_root at its output'
        )
    check_labels(path, arrays, task)
    labels = {'semantics': arrays['semantics'].astype(np.uint8)}
    if 'instances' in arrays:
        labels['instances'] = arrays['instances'].astype(np.int32)
    labels.update((key, arrays[key].astype(bool)) for key in OPTIONAL[1:] if key in arrays)
    if velocity is not None:
        labels['flow'] = _check_flow(path, velocity, task)
    return labels


def fit_to_task(path, arrays: Dict[str, np.ndarray], task: Task) -> Dict[str, np.ndarray]:
    """Arrays of a label file on the task's grid, with ids of its label set.

    Outside the file's volume (``task.label_range``) voxels are ignored, in no instance and in no mask.

    Raises:
        DataError: the file has another volume, or an id that ``task.label_set.remap`` does not name.
    """
    if task.label_range is not None:
        arrays = {key: _place(path, key, array, task) for key, array in arrays.items()}
    if task.label_set.remap:
        arrays = dict(arrays, semantics=remap_ids(path, arrays['semantics'], task))
    return arrays


def _place(path, key, array, task):
    shape, start = task.label_grid
    if array.shape[:3] != shape:
        raise DataError(
            f'{path}: {key!r} has shape {list(array.shape)}, but task.label_range makes {list(shape)} voxels; correct '
            'task.label_range or task.voxel_size'
        )
    fill = IGNORE_LABEL if key == 'semantics' else 0
    placed = np.full(task.grid_shape + array.shape[3:], fill, dtype=array.dtype)
    here = tuple(slice(max(s, 0), max(min(s + n, size), 0)) for s, n, size in zip(start, shape, task.grid_shape))
    there = tuple(slice(h.start - s, max(h.stop - s, h.start - s)) for h, s in zip(here, start))
    placed[here] = array[there]
    return placed


def remap_ids(path, semantics: np.ndarray, task: Task) -> np.ndarray:
    """uint8 ids of the task's label set for those of a label file; 255 stays 255.

    Raises:
        DataError: an id that ``task.label_set.remap`` does not name.
    """
    table = np.full(IGNORE_LABEL + 1, -1, dtype=np.int16)
    table[IGNORE_LABEL] = IGNORE_LABEL
    for old, new in task.label_set.remap.items():
        table[old] = new
    inside = semantics.dtype.kind in 'iu' and bool(((semantics >= 0) & (semantics <= IGNORE_LABEL)).all())
    found = table[semantics] if inside else np.full(1, -1)
    if (found < 0).any():
        unknown = np.unique(semantics[found < 0])[:5].tolist() if inside else np.unique(semantics)[-5:].tolist()
        raise DataError(
            f"{path}: 'semantics' holds ids {unknown}, which task.label_set.remap does not name; add them to it, or "
            'point occ_gt_root at the right folder'
        )
    return found.astype(np.uint8)


def _check_flow(path, flow, task):
    if flow.shape != task.grid_shape + (2,) or flow.dtype.kind not in 'fiu' or not np.isfinite(flow).all():
        raise DataError(
            f"{path}: 'flow' must be finite numbers {list(task.grid_shape + (2,))}, got {flow.dtype} "
            f'{list(flow.shape)}; use labels of that grid'
        )
    return flow.astype(np.float32)


def check_labels(path, arrays: Dict[str, np.ndarray], task: Task) -> None:
    """Raise DataError unless all arrays have the task's grid and whole values, and ids are those of its label set."""
    for key, array in arrays.items():
        if array.shape != task.grid_shape:
            raise DataError(
                f'{path}: {key!r} has shape {list(array.shape)}, but the task grid is {list(task.grid_shape)}; use '
                'labels of that grid, or change task.point_cloud_range and task.voxel_size'
            )
        whole = array.dtype.kind in 'biu' or (
            array.dtype.kind == 'f' and bool(np.isfinite(array).all() and (array == np.floor(array)).all())
        )
        if not whole:
            raise DataError(
                f'{path}: {key!r} holds {array.dtype} that are no whole numbers, integers are needed; the file is of '
                'another kind'
            )
    _check_ids(path, arrays['semantics'], task)
    instances = arrays.get('instances')
    if instances is not None and not 0 <= instances.min() <= instances.max() <= _MAX_INSTANCE:
        raise DataError(
            f"{path}: 'instances' holds ids from {instances.min()} to {instances.max()}; they must be 0 (none) to "
            f'{_MAX_INSTANCE}: make the labels again with gen_instance_info.py'
        )


def _check_ids(path, semantics, task):
    labels = task.label_set
    lowest, highest = int(semantics.min()), int(semantics.max())
    if highest == IGNORE_LABEL and (semantics != IGNORE_LABEL).any():
        highest = int(semantics[semantics != IGNORE_LABEL].max())
    if lowest < 0 or highest > labels.free_id:
        raise DataError(
            f"{path}: 'semantics' holds id {lowest if lowest < 0 else highest}, but label set {labels.name!r} has ids "
            f'0..{labels.free_id} (free); these are labels of another set: set task.label_set, or point occ_gt_root at '
            'the right folder'
        )
    if highest < labels.free_id:
        raise DataError(
            f"{path}: 'semantics' holds no free voxel (id {labels.free_id} of label set {labels.name!r}), its highest "
            f'id is {highest}; these are labels of another set: set task.label_set, or point occ_gt_root at the right '
            'folder'
        )
