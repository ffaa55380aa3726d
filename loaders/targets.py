"""Training targets from a label volume (SPEC "Targets from a label file")."""

from typing import NamedTuple, Optional

import numpy as np

from lib.classes import IGNORE_LABEL
from lib.task import Task

NO_INSTANCE = 255
MAX_INSTANCES = 255


class InstanceTargets(NamedTuple):
    """The segments that the mask transformer learns.

    Attributes:
        voxel_instances: uint8 [X, Y, Z], target id 0.. of each voxel; 255 = free, ignored, or left out.
        class_ids: int64 [n], class of each target id.
    """

    voxel_instances: np.ndarray
    class_ids: np.ndarray


def make_instance_targets(semantics: np.ndarray, instances: Optional[np.ndarray], task: Task) -> InstanceTargets:
    """One target per stuff class present and, for panoptic tasks, one per (thing class, instance id).

    An instance id that spans classes is split, so each target holds one class. At most 255 targets fit into
    the volume; of more, those with the fewest voxels are left out.

    Args:
        semantics: uint8 [X, Y, Z]; 255 = ignored.
        instances: integers [X, Y, Z], 0 = none; needed for panoptic tasks only.
    """
    counted = (semantics != task.label_set.free_id) & (semantics != IGNORE_LABEL)
    classes = semantics[counted].astype(np.int64)
    # Key of a voxel's segment: sorts by class, then by instance id, which counts for things only.
    segments = classes << 32
    if task.panoptic:
        is_thing = np.isin(classes, task.label_set.thing_ids)
        segments += np.where(is_thing, instances[counted].astype(np.int64), 0)
    keys, position, sizes = np.unique(segments, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-sizes, kind='stable')[:MAX_INSTANCES])
    target_of = np.full(len(keys), NO_INSTANCE, dtype=np.uint8)
    target_of[kept] = np.arange(len(kept))
    targets = np.full(semantics.shape, NO_INSTANCE, dtype=np.uint8)
    targets[counted] = target_of[position.reshape(-1)]
    return InstanceTargets(targets, (keys[kept] >> 32).astype(np.int64))
