"""Label files: finding, reading, checking, and bringing them onto the task's grid with its ids.

They are ``<occ_gt_root>/<scene-name>/<sample-token>/labels.npz``, or of a format of ``lib.label_formats``.
"""

import os
from pathlib import Path
from typing import Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .classes import IGNORE_LABEL
from .errors import DataError
from .geometry import find_sources, held_classes, invert_rigid, take
from .infos import volume_from_lidar
from .io import load_npz_checked, npz_sizes, path_inside, read_json, require_file
from .label_formats import LABEL_FORMATS, NPZ, read_listed
from .task import Task

LABEL_FILE = 'labels.npz'
OPTIONAL = ('instances', 'mask_camera', 'mask_lidar')
_NO_INSTANCES = (
    '{path} has no instances, which task.panoptic needs; make labels that have them with gen_instance_info.py and '
    'point occ_gt_root at its output'
)
_LONGEST_HEADER = 1024  # bytes before an array's values; 128 of those that NumPy writes
_MAX_INSTANCE = np.iinfo(np.int32).max


class LabelFolder:
    """Label files of one kind. Nothing is read or listed before the first label is asked for.

    Args:
        root: folder of the scenes' folders; ``gts`` in it or in its place, as Occ3D is released, is found.
        data_root: nuScenes folder, whose tables name the scene of a sample where the info file does not.
        version: nuScenes version of the info file, e.g. ``v1.0-trainval``; '' if unknown.
        files: ``task.label_files``. A ``labels.npz`` goes before a file of another format (gen_instance_info.py
            makes such of them, on the same grid).
    """

    def __init__(self, root, data_root, version: str = '', files: str = NPZ):
        self.root = _released_layout(Path(root))
        self._data_root = Path(data_root)
        self._version = version
        self._files = files
        self._scene_names: Optional[Dict[str, str]] = None

    def path(self, info: Mapping) -> Path:
        """Path of a keyframe's label file, which need not exist.

        Raises:
            DataError: the scene of the keyframe, or what else names its file, cannot be found out.
        """
        if self._files not in LABEL_FORMATS:
            return path_inside(self.root, self.scene(info), info['token'], LABEL_FILE)
        if info.get('scene_name'):
            dense = path_inside(self.root, info['scene_name'], info['token'], LABEL_FILE)
            if dense.is_file():
                return dense
        return LABEL_FORMATS[self._files].path(self.root, info)

    def scene(self, info: Mapping) -> str:
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
    for scene in sorted(os.listdir(root)):
        folder = root / scene
        if folder.is_dir():
            scenes.update((token, scene) for token in os.listdir(folder))
    return scenes


def read_labels(
    path, task: Task, names: Sequence[str] = OPTIONAL, info: Optional[Mapping] = None
) -> Dict[str, np.ndarray]:
    """Arrays of a label file on the task's grid, checked against the task.

    Args:
        names: arrays to read beside ``semantics`` where the file has them; unpacking takes longer than all else.
            ``flow`` must be there if it is named.
        info: of the keyframe; its calibration is needed where files and task are in different frames.

    Returns:
        dict with ``semantics`` uint8 [X, Y, Z], and where the file has them ``instances`` int32 [X, Y, Z]
        (0 = none), ``mask_camera`` and ``mask_lidar`` bool [X, Y, Z], ``flow`` float32 [X, Y, Z, 2], m/s along x and
        y of the ego frame.

    Raises:
        DataError: missing or damaged file, wrong shape, or ids that the task's label set does not have.
    """
    arrays = fit_to_task(path, read_arrays(path, task, names), task, info)
    velocity = arrays.pop('flow', None)
    if task.panoptic and 'instances' not in arrays:
        raise DataError(_NO_INSTANCES.format(path=path))
    check_labels(path, arrays, task)
    labels = {'semantics': arrays['semantics'].astype(np.uint8)}
    if 'instances' in arrays:
        labels['instances'] = arrays['instances'].astype(np.int32)
    labels.update((key, arrays[key].astype(bool)) for key in OPTIONAL[1:] if key in arrays)
    if velocity is not None:
        labels['flow'] = _check_flow(path, velocity, task)
    return labels


def read_arrays(path, task: Task, names: Sequence[str]) -> Dict[str, np.ndarray]:
    """Arrays of a label file as they are there, ``semantics`` and ``names``; see :func:`read_labels`."""
    required = ('semantics',) + ('flow',) * ('flow' in names)
    if 'flow' in names and (task.frame, task.label_grid.frame) != ('ego', 'ego'):
        raise DataError(f'{path}: flow is read along the axes of ego alone; set task.frame and label_frame to it')
    if _lists_voxels(path, task):
        return dict(semantics=read_listed(path, task.label_files))
    return load_npz_checked(path, required, names, 2 * int(np.prod(task.label_grid.shape)))


def _lists_voxels(path, task) -> bool:
    """The file is of a format of ``lib.label_formats``, and not a dense one that was made of it."""
    return task.label_files in LABEL_FORMATS and Path(path).suffix == '.npy'


def arrays_of_file(path, task: Task) -> Tuple[str, ...]:
    """Names of the arrays of a label file that is there and whole, as far as its directory tells; none is unpacked.

    Raises:
        DataError: it is missing or cut short, lacks an array that the task needs, or has one of another grid's size.
    """
    if _lists_voxels(path, task):
        require_file(path, 'check occ_gt_root and task.label_files')
        return ('semantics',)
    sizes = npz_sizes(path)
    if 'semantics' not in sizes:
        found = ', '.join(sorted(sizes)) or 'nothing'
        raise DataError(f"{path} has no 'semantics' (it holds {found}); is it a file of another kind?")
    if task.panoptic and 'instances' not in sizes:
        raise DataError(_NO_INSTANCES.format(path=path))
    shape = task.label_grid.shape
    voxels = int(np.prod(shape))
    for name in ('semantics', *(name for name in OPTIONAL if name in sizes)):
        if not any(0 < sizes[name] - width * voxels < _LONGEST_HEADER for width in (1, 2, 4, 8)):
            raise DataError(
                f'{path}: {name!r} takes {sizes[name]} bytes, as no array of {list(shape)} voxels does; use labels of '
                'that grid, or change task.point_cloud_range and task.voxel_size'
            )
    return tuple(sizes)


def fit_to_task(
    path, arrays: Dict[str, np.ndarray], task: Task, info: Optional[Mapping] = None
) -> Dict[str, np.ndarray]:
    """Arrays of a label file on the task's grid, with ids of its label set.

    ``lib.geometry.find_sources`` says by which rule labels of other voxels are merged. Outside the file's volume voxels
    are ignored, in no instance and in no mask.

    Raises:
        DataError: the file has another volume, or an id that ``task.label_set.remap`` does not name.
    """
    if task.label_grid == task.grid and not task.label_set.remap:
        return arrays
    ids = file_ids(path, arrays['semantics'], task)
    arrays = dict(arrays, semantics=ids)
    if task.label_grid == task.grid:
        return arrays
    for key, array in arrays.items():
        _check_file_shape(path, key, array, task)
    transform = _file_from_task(path, task, info)
    sources = find_sources(task.grid, task.label_grid, transform, ids, task.label_set.free_id)
    return {key: take(array, sources, IGNORE_LABEL if key == 'semantics' else 0) for key, array in arrays.items()}


def file_ids(path, semantics: np.ndarray, task: Task) -> np.ndarray:
    """uint8 ids of the task's label set for the ``semantics`` of a label file, on the file's grid.

    Raises:
        DataError: an id that the label set, or its ``remap``, does not have.
    """
    if task.label_set.remap:
        return remap_ids(path, semantics, task)
    _check_whole(path, 'semantics', semantics)
    _check_ids(path, semantics, task)
    return semantics.astype(np.uint8)


def _check_file_shape(path, key, array, task):
    shape = task.label_grid.shape
    if array.shape[:3] != shape:
        raise DataError(
            f'{path}: {key!r} has shape {list(array.shape)}, but task.label_range and task.label_voxel_size make '
            f'{list(shape)} voxels; correct them'
        )


def _file_from_task(path, task, info) -> np.ndarray:
    """4x4 float64, metres of the task's frame to those of the file's."""
    ours, theirs = task.frame, task.label_grid.frame
    if ours == theirs:
        return np.eye(4)
    if info is None or 'lidar2ego_rotation' not in info:
        raise DataError(
            f'{path} is in frame {theirs!r} and the task in {ours!r}, and nothing says how the LiDAR is mounted; give '
            'the info file (--infos), or set task.frame'
        )
    return volume_from_lidar(info, theirs) @ invert_rigid(volume_from_lidar(info, ours))


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
        _check_whole(path, key, array)
    _check_ids(path, arrays['semantics'], task)
    instances = arrays.get('instances')
    if instances is not None and not 0 <= instances.min() <= instances.max() <= _MAX_INSTANCE:
        raise DataError(
            f"{path}: 'instances' holds ids from {instances.min()} to {instances.max()}; they must be 0 (none) to "
            f'{_MAX_INSTANCE}: make the labels again with gen_instance_info.py'
        )


def _check_whole(path, key, array):
    whole = array.dtype.kind in 'biu' or (
        array.dtype.kind == 'f' and bool(np.isfinite(array).all() and (array == np.floor(array)).all())
    )
    if not whole:
        raise DataError(
            f'{path}: {key!r} holds {array.dtype} that are no whole numbers, integers are needed; the file is of '
            'another kind'
        )


def _check_ids(path, semantics, task):
    labels = task.label_set
    lowest, highest = int(semantics.min()), int(semantics.max())
    if highest == IGNORE_LABEL and (semantics != IGNORE_LABEL).any():
        highest = int(semantics[semantics != IGNORE_LABEL].max())
    if lowest < 0 or highest > labels.free_id:
        found = f'holds id {lowest if lowest < 0 else highest}'
    elif highest < labels.free_id:
        found = f'holds no free voxel (its highest id is {highest})'
    else:
        return
    raise DataError(
        f"{path}: 'semantics' {found}, but label set {labels.name!r} has ids 0..{labels.free_id}, the last one free; "
        'set task.label_set, or point occ_gt_root at the right folder'
    )


class LabelLoss(NamedTuple):
    """What becomes of the occupied voxels of a label file on the task's grid.

    Attributes:
        occupied: of the file.
        dropped: of these, with their centre outside the task's volume.
        merged: of these, with their centre in a voxel of the task that has another class.
        kept: occupied voxels of the task.
    """

    occupied: int
    dropped: int
    merged: int
    kept: int


def measure_loss(path, task: Task, info: Optional[Mapping] = None) -> LabelLoss:
    """Count what ``fit_to_task`` costs a label file.

    Raises:
        DataError: it cannot be read.
    """
    free = task.label_set.free_id
    arrays = read_arrays(path, task, ())
    ids = file_ids(path, arrays['semantics'], task)
    labels = fit_to_task(path, arrays, task, info)['semantics']
    places = np.argwhere(ids < free)
    classes = held_classes(task.grid, task.label_grid, _file_from_task(path, task, info), places, labels)
    dropped, before = classes < 0, ids[tuple(places.T)]
    return LabelLoss(
        len(places), int(dropped.sum()), int((~dropped & (classes != before)).sum()), int((labels < free).sum())
    )
