"""Instance ids of occupied voxels from boxes (SPEC "Panoptic labels").

Voxel centres and boxes meet in the ego frame of the keyframe, metres. Id 0 = none.

MMDetection3D 1.0 writes ``gt_boxes`` as (x, y, z, length, width, height, yaw about +z). Files of earlier
versions, of which many are still around, hold (x, y, z, width, length, height, -yaw - pi/2). Nothing in a file
says which it is, but cars and buses are longer than wide.
"""

from typing import Dict, List, NamedTuple, Sequence

import numpy as np

from lib.classes import LabelSet
from lib.geometry import rotation_z, transform_points, voxel_centers
from lib.infos import box_array, ego_from_lidar
from lib.task import Task

# Classes that nuScenes annotates with boxes; all others are stuff here, whatever a model counts as things.
BOX_CLASSES = (
    'car',
    'truck',
    'trailer',
    'bus',
    'construction_vehicle',
    'bicycle',
    'motorcycle',
    'pedestrian',
    'traffic_cone',
    'barrier',
)
_LONG_CLASSES = ('car', 'truck', 'bus', 'trailer', 'motorcycle', 'bicycle')
ENLARGEMENT = 0.8  # metres added to l, w and h for voxels just outside every box
MAX_ID = 255  # ids are stored as uint8


def holds_width_first(infos: Sequence[Dict], source='infos') -> bool:
    """The boxes follow the convention before MMDetection3D 1.0: most vehicles would be wider than long.

    Raises:
        DataError: boxes that are none, named with ``source``.
    """
    wider = longer = 0
    for info in infos:
        boxes = box_array(info, source)
        vehicles = boxes[np.isin(np.asarray(info.get('gt_names', ()), dtype=str), _LONG_CLASSES)]
        wider += int((vehicles[:, 3] < vehicles[:, 4]).sum())
        longer += int((vehicles[:, 3] > vehicles[:, 4]).sum())
    return wider > longer


def with_length_first(infos: Sequence[Dict], source='infos') -> List[Dict]:
    """The infos with boxes in MMDetection3D 1.0's convention; converted, as new dicts, where they are not."""
    if not holds_width_first(infos, source):
        return list(infos)
    print('note: these infos hold boxes as (width, length, height), as before MMDetection3D 1.0; they are converted')
    return [_converted(info) if len(info.get('gt_boxes', ())) else info for info in infos]


def _converted(info: Dict) -> Dict:
    boxes = np.array(info['gt_boxes'], dtype=np.float64)
    boxes[:, 3:5] = boxes[:, [4, 3]]
    turned = -boxes[:, 6] - np.pi / 2
    boxes[:, 6] = (turned + np.pi) % (2 * np.pi) - np.pi
    return dict(info, gt_boxes=boxes)


class EgoBox(NamedTuple):
    """A box in the ego frame.

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


def ego_boxes(info: Dict, label_set: LabelSet) -> List[EgoBox]:
    """The info's boxes of occupancy classes, in order, moved from LIDAR_TOP to ego."""
    lidar_to_ego = ego_from_lidar(info)
    boxes = []
    for name, row in zip(info.get('gt_names', ()), info.get('gt_boxes', ())):
        if name in BOX_CLASSES and name in label_set.occupied_names:
            row = np.asarray(row, dtype=np.float64)
            boxes.append(
                EgoBox(
                    center=transform_points(lidar_to_ego, row[:3]),
                    axes=lidar_to_ego[:3, :3] @ rotation_z(row[6]),
                    size=row[3:6],
                    class_id=label_set.class_names.index(str(name)),
                )
            )
    return boxes


def make_instances(semantics: np.ndarray, boxes: Sequence[EgoBox], task: Task) -> np.ndarray:
    """Instance ids uint8 [X, Y, Z] for the labels ``semantics`` [X, Y, Z].

    In order: each box takes the unclaimed voxels of its class whose centre it holds (a box with none gets no
    id); each other class present takes one id; each voxel left over goes to the nearest box of its class that
    has an id and holds it once enlarged. More than 255 ids do not fit: the last boxes go without.
    """
    index = np.argwhere(semantics != task.label_set.free_id)
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
    return class_id < label_set.free_id and label_set.class_names[class_id] in BOX_CLASSES


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
