"""Panoptic label files: Occ3D's with instance ids added, for every keyframe of the info files (SPEC "Panoptic labels").

Voxel centres and boxes meet in the frame of the labels (ego, or LIDAR_TOP) at the keyframe, metres. Id 0 = none.
"""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from lib.classes import IGNORE_LABEL, LabelSet
from lib.errors import ConfigError, DataError
from lib.geometry import rotation_z, transform_points, voxel_centers
from lib.infos import load_infos, volume_from_lidar
from lib.io import find_under, path_inside, save_npz
from lib.labels import LABEL_FILE, LabelFolder, check_labels, fit_to_task, read_arrays
from lib.task import Task

from . import parallel_map
from .sweep_infos import SWEEP_FILE, with_length_first

ENLARGEMENT = 0.8  # metres added to l, w and h for voxels just outside every box
MAX_ID = 255  # ids are stored as uint8
_KEPT = ('semantics', 'mask_lidar', 'mask_camera')


class PanopticJob(NamedTuple):
    """What every worker needs.

    Attributes:
        infos: keyframes.
        source: label files without instances.
        out_dir: folder of the new label files.
        task: grid and label set of the source.
        overwrite: make files anew that are there.
    """

    infos: Sequence[Dict]
    source: LabelFolder
    out_dir: Path
    task: Task
    overwrite: bool


class PanopticResult(NamedTuple):
    """Counts of keyframes.

    Attributes:
        written: files made.
        kept: files that were there already.
        failed: one message per keyframe whose labels could not be read.
    """

    written: int
    kept: int
    failed: List[str]


def write_panoptic_labels(
    data_root,
    version: str,
    occ_gt_root: str,
    out: str,
    task: Task,
    info_files: Optional[Sequence[str]] = None,
    overwrite: bool = False,
    processes: Optional[int] = None,
) -> PanopticResult:
    """Write ``<out>/<scene>/<token>/labels.npz`` for all keyframes with boxes; files that exist are kept.

    Args:
        data_root: nuScenes folder; ``occ_gt_root`` and ``info_files`` may be relative to it.
        version: nuScenes version the info files must be of.
        occ_gt_root: labels without instances.
        out: folder of the new labels.
        task: grid and label set of the labels.
        info_files: info pickles; None = the train and val files in ``data_root``.
        overwrite: make existing files anew.
        processes: worker processes; None = all cores.

    Raises:
        ConfigError: things without boxes.
        DataError: no info file, one of another version, or not one label could be read.
    """
    _check_things(task.label_set)
    infos = _gather_infos(Path(data_root), version, info_files)
    job = PanopticJob(
        infos,
        LabelFolder(find_under(data_root, occ_gt_root), data_root, version, task.label_files),
        Path(out),
        task,
        overwrite,
    )
    results = list(parallel_map(_write_one, range(len(infos)), job, 'labels', processes))
    failed = [result for result in results if result not in ('written', 'kept')]
    if len(failed) == len(infos):
        raise DataError(f'not one label of {len(infos)} keyframes could be read; the first: {failed[0]}')
    return PanopticResult(results.count('written'), results.count('kept'), failed)


def _check_things(labels: LabelSet) -> None:
    """Raise ConfigError where things of a label set have no boxes, and so can get no ids."""
    without = [labels.class_names[i] for i in labels.thing_ids if not _is_box_class(i, labels)]
    if without:
        raise ConfigError(
            f'no box in the infos is of class {without[0]!r}, a thing of label set {labels.name!r}; say which are '
            f"with task.label_set.boxes, e.g. boxes={{'car': {without[0]!r}}}"
        )


def _gather_infos(data_root, version, info_files):
    usual = [data_root / SWEEP_FILE.format(split) for split in ('train', 'val')]
    paths = [find_under(data_root, name) for name in info_files] if info_files else [p for p in usual if p.is_file()]
    if not paths:
        raise DataError(
            f'{data_root} holds no info files ({SWEEP_FILE.format("train")}); make them with gen_sweep_info.py, or '
            'name others with --infos'
        )
    infos = []
    for path in paths:
        content = load_infos(path)
        if content.version and content.version != version:
            raise DataError(
                f'{path} is of version {content.version}, not {version}; give --version {content.version}, or make it '
                'again with gen_sweep_info.py'
            )
        infos.extend(with_length_first(content.infos, path))
    return infos


def _write_one(job, position) -> str:
    """'written', 'kept', or what was wrong."""
    info = job.infos[position]
    try:
        source = job.source.path(info)
        target = path_inside(job.out_dir, job.source.scene(info), info['token'], LABEL_FILE)
        if target.is_file() and not job.overwrite:
            return 'kept'
        arrays = read_arrays(source, job.task, _KEPT)
        fitted = fit_to_task(source, arrays, job.task)  # what is written keeps ids and voxels of the source
        check_labels(source, fitted, job.task)
        boxes = boxes_in_volume(info, job.task.label_set, job.task.frame)
        instances = make_instances(fitted['semantics'], boxes, job.task)
        save_npz(target, dict(arrays, instances=instances))
        return 'written'
    except DataError as error:
        return str(error)


class VolumeBox(NamedTuple):
    """A box in the frame of the labels.

    Attributes:
        center: float64 [3], metres.
        axes: float64 [3, 3], columns are the directions of length, width and height.
        size: float64 [3], length, width, height, metres.
        class_id: label id of its class.
    """

    center: np.ndarray
    axes: np.ndarray
    size: np.ndarray
    class_id: int

    def contains(self, points: np.ndarray, enlargement: float = 0.0) -> np.ndarray:
        """bool [n]: the points [n, 3] lie in the box, its sizes grown by ``enlargement`` metres in all."""
        return (np.abs((points - self.center) @ self.axes) <= (self.size + enlargement) / 2).all(axis=-1)


def boxes_in_volume(info: Dict, label_set: LabelSet, frame: str = 'ego') -> List[VolumeBox]:
    """The info's boxes of occupancy classes, in order, moved from LIDAR_TOP to ``frame`` (see ``task.frame``)."""
    volume_from = volume_from_lidar(info, frame)
    boxes = []
    for name, row in zip(info.get('gt_names', ()), info.get('gt_boxes', ())):
        if name in label_set.boxes:
            row = np.asarray(row, dtype=np.float64)
            boxes.append(
                VolumeBox(
                    center=transform_points(volume_from, row[:3]),
                    axes=volume_from[:3, :3] @ rotation_z(row[6]),
                    size=row[3:6],
                    class_id=label_set.boxes[name],
                )
            )
    return boxes


def make_instances(semantics: np.ndarray, boxes: Sequence[VolumeBox], task: Task) -> np.ndarray:
    """Instance ids uint8 [X, Y, Z] for the labels ``semantics`` [X, Y, Z].

    In order: each box takes the unclaimed voxels of its class whose centre it holds (a box with none gets no
    id); each other class present takes one id; each voxel left over goes to the nearest box of its class that
    has an id and holds it once enlarged. More than 255 ids do not fit: the last boxes go without.
    """
    index = np.argwhere((semantics != task.label_set.free_id) & (semantics != IGNORE_LABEL))
    classes = semantics[tuple(index.T)].astype(np.int64)
    points = voxel_centers(task.point_cloud_range, task.voxel_size, task.grid_shape, index)
    stuff = [c for c in np.unique(classes) if not _is_box_class(c, task.label_set)]
    ids, owners = _claim_by_boxes(points, classes, boxes, MAX_ID - len(stuff))
    for position, class_id in enumerate(stuff):
        ids[classes == class_id] = len(owners) + 1 + position
    _claim_nearby(points, classes, ids, owners)
    instances = np.zeros(semantics.shape, dtype=np.uint8)
    instances[tuple(index.T)] = ids
    return instances


def _is_box_class(class_id, label_set):
    return class_id in label_set.boxes.values()


def _claim_by_boxes(points, classes, boxes, max_boxes):
    """(ids int64 [n], boxes that have an id: number i has id i + 1)."""
    ids, owners = np.zeros(len(points), dtype=np.int64), []
    for box in boxes:
        candidates = np.flatnonzero((classes == box.class_id) & (ids == 0))
        claimed = candidates[box.contains(points[candidates])]
        if len(claimed) and len(owners) < max_boxes:
            owners.append(box)
            ids[claimed] = len(owners)
    return ids, owners


def _claim_nearby(points, classes, ids, owners):
    left = np.flatnonzero(ids == 0)
    nearest = np.full(len(left), np.inf)
    for position, box in enumerate(owners):
        distance = np.linalg.norm(points[left] - box.center, axis=1)
        in_reach = (classes[left] == box.class_id) & box.contains(points[left], ENLARGEMENT)
        taken = in_reach & (distance < nearest)
        nearest[taken] = distance[taken]
        ids[left[taken]] = position + 1
