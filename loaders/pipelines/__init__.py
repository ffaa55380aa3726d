"""The steps that make a sample of a keyframe, registered with mmdet's ``PIPELINES``.

A step takes and returns one dict. It finds there what the data set put in (``info``, ``history``, ``rng``,
``data_root``, ``label_folder``, ``test_mode``) and what the steps before it added.
"""

import inspect
from typing import Callable, Dict, List, Mapping, Sequence

from mmdet.datasets.builder import PIPELINES

from lib.registry import build_checked
from lib.task import Task

from .bev_aug import BEVAug
from .image_aug import RandomTransformImage
from .load_images import LoadMultiViewImageFromMultiSweeps
from .load_occ import LoadOccGTFromFile

__all__ = ['BEVAug', 'LoadMultiViewImageFromMultiSweeps', 'LoadOccGTFromFile', 'RandomTransformImage', 'build_pipeline']


def build_pipeline(configs: Sequence[Mapping], task: Task) -> List[Callable[[Dict], Dict]]:
    """Steps from their configs; those that take a ``task`` get it.

    Raises:
        ConfigError: an unknown step or argument.
    """
    steps = []
    for position, config in enumerate(configs):
        step_class = PIPELINES.get(str(dict(config).get('type')))
        takes_task = step_class is not None and 'task' in inspect.signature(step_class).parameters
        steps.append(build_checked(config, PIPELINES, dict(task=task) if takes_task else {}, f'pipeline[{position}]'))
    return steps
