"""The label volume of a sample and the targets made from it."""

from typing import Dict

from mmdet.datasets.builder import PIPELINES

from lib.errors import ConfigError
from lib.task import Task

from ..labels import read_labels
from ..targets import make_instance_targets


@PIPELINES.register_module()
class LoadOccGTFromFile:
    """Read the label file and make the targets.

    Adds ``voxel_semantics`` uint8 [X, Y, Z], ``voxel_instances`` uint8 [X, Y, Z] (255 = free), and
    ``instance_class_ids`` int64 [n]; where the file has it also ``mask_camera`` bool [X, Y, Z]. In evaluation
    without ``occ_gt_root`` it adds nothing.
    """

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, sample: Dict) -> Dict:
        if sample['label_folder'] is None:
            if sample['test_mode']:
                return sample
            raise ConfigError('training needs labels: set occ_gt_root of the training data (LoadOccGTFromFile)')
        labels = read_labels(sample['label_folder'].path(sample['info']), self.task)
        targets = make_instance_targets(labels['semantics'], labels.get('instances'), self.task)
        sample['voxel_semantics'] = labels['semantics']
        sample['voxel_instances'] = targets.voxel_instances
        sample['instance_class_ids'] = targets.class_ids
        if 'mask_camera' in labels:
            sample['mask_camera'] = labels['mask_camera']
        return sample
