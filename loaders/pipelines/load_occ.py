"""The label volume of a sample and the targets made from it (SPEC "Targets from a label file")."""

from dataclasses import replace
from typing import Dict, Optional

import numpy as np
from mmdet.datasets.builder import PIPELINES

from lib.classes import IGNORE_LABEL
from lib.errors import ConfigError
from lib.labels import read_labels
from lib.targets import NO_INSTANCE, OccupancyTargets
from lib.task import Task

MAX_INSTANCES = 255


@PIPELINES.register_module()
class LoadOccGTFromFile:
    """Read the label file and make ``targets`` (OccupancyTargets).

    In evaluation without ``occ_gt_root`` it adds nothing.
    """

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, sample: Dict) -> Dict:
        if sample['label_folder'] is None:
            if sample['test_mode']:
                return sample
            raise ConfigError('training needs labels: set occ_gt_root of the training data (LoadOccGTFromFile)')
        labels = read_labels(sample['label_folder'].path(sample['info']), self.task)
        targets = make_targets(labels['semantics'], labels.get('instances'), self.task)
        sample['targets'] = replace(targets, mask_camera=labels.get('mask_camera'))
        return sample


def make_targets(semantics: np.ndarray, instances: Optional[np.ndarray], task: Task) -> OccupancyTargets:
    """One target per stuff class present and, for panoptic tasks, one per (thing class, instance id).

    An instance id that spans classes is split, so each target holds one class. At most 255 targets fit into
    the volume; of more, those with the fewest voxels are left out.

    Args:
        semantics: uint8 [X, Y, Z]; 255 = ignored.
        instances: integers [X, Y, Z], 0 = none; needed for panoptic tasks only.

    Returns:
        ``voxel_semantics``, ``voxel_instances`` and ``instance_class_ids``.
    """
    counted = (semantics != task.label_set.free_id) & (semantics != IGNORE_LABEL)
    classes = semantics[counted].astype(np.int64)
    # Key of a voxel's segment: sorts by class, then by instance id, which counts for things only.
    segments = classes << 32
    if task.panoptic:
        is_thing = np.isin(classes, task.label_set.thing_ids)
        segments += np.where(is_thing, np.asarray(instances)[counted].astype(np.int64), 0)
    keys, position, sizes = np.unique(segments, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-sizes, kind='stable')[:MAX_INSTANCES])
    target_of = np.full(len(keys), NO_INSTANCE, dtype=np.uint8)
    target_of[kept] = np.arange(len(kept))
    targets = np.full(semantics.shape, NO_INSTANCE, dtype=np.uint8)
    targets[counted] = target_of[position.reshape(-1)]
    return OccupancyTargets(semantics, targets, (keys[kept] >> 32).astype(np.int64))
