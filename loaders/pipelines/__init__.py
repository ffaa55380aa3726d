"""From a keyframe to a sample and on to a batch: the steps, registered with mmdet's ``PIPELINES``, and what follows.

A step takes and returns one dict. It finds there what the data set put in (``info``, ``history``, ``rng``,
``data_root``, ``label_folder``, ``test_mode``) and what the steps before it added; ``makes`` and ``changes`` of its
class name keys of the dict, so that steps in the wrong order are refused. B samples, T frames, N cameras,
image index = t*N + n.
"""

import inspect
from typing import Any, Callable, Dict, List, Mapping, Sequence

import cv2
import numpy as np
import torch
from mmdet.datasets.builder import PIPELINES

from lib.errors import ConfigError
from lib.registry import build_checked, look_up
from lib.targets import stack_targets
from lib.task import Task

from ..decode import EncodedImage, EncodedImages, HeldImage
from .augmentation import BEVAug, RandomTransformImage
from .loading import LoadMultiViewImageFromMultiSweeps, LoadOccGTFromFile

__all__ = [
    'BEVAug',
    'LoadMultiViewImageFromMultiSweeps',
    'LoadOccGTFromFile',
    'RandomTransformImage',
    'build_pipeline',
    'collate',
    'format_sample',
]


def build_pipeline(configs: Sequence[Mapping], task: Task) -> List[Callable[[Dict], Dict]]:
    """Steps from their configs; those that take a ``task`` get it.

    Raises:
        ConfigError: an unknown step or argument, or a step that makes what one before it was to change.
    """
    steps: List[Any] = []
    for position, config in enumerate(configs):
        step_class = look_up(config.get('type') if isinstance(config, Mapping) else None, PIPELINES)
        takes_task = step_class is not None and 'task' in inspect.signature(step_class).parameters
        steps.append(build_checked(config, PIPELINES, dict(task=task) if takes_task else {}, f'pipeline[{position}]'))
        _check_order(steps)
    return steps


def _check_order(steps) -> None:
    """The last step must not make what one before it changes: labels loaded after BEVAug would not be turned."""
    *before, last = steps
    for step in before:
        both = sorted(set(getattr(last, 'makes', ())) & set(getattr(step, 'changes', ())))
        if both:
            raise ConfigError(
                f'pipeline: {type(step).__name__} stands before {type(last).__name__}, whose {both[0]!r} it is to '
                'change; put the steps that load first'
            )


def format_sample(sample: Dict) -> Dict:
    """Tensors and metadata of one sample.

    Returns:
        img uint8 [T*N, 3, H, W] (BGR), lidar2img float32 [T*N, 4, 4], ego2lidar float64 [T*N, 4, 4],
        img_metas (dict), and where labels were loaded ``targets`` (OccupancyTargets of NumPy arrays). Where the sample
        says which frames are ``given``, ``img`` holds those alone, and ``img_metas`` says so. Images that are decoded
        on the GPU make ``img`` an ``EncodedImages``.
    """
    info = sample['info']
    images = [image for image in sample['img'] if not isinstance(image, HeldImage)]
    encoded = any(isinstance(image, EncodedImage) for image in images)
    formatted = dict(
        img=EncodedImages.of_sample(images) if encoded else torch.from_numpy(_channels_first(images)),
        lidar2img=torch.from_numpy(np.ascontiguousarray(sample['lidar2img'], dtype=np.float32)),
        ego2lidar=torch.from_numpy(np.ascontiguousarray(sample['ego2lidar'], dtype=np.float64)),
        img_metas=dict(
            sample_token=info['token'],
            scene_token=info.get('scene_token'),
            scene_name=info.get('scene_name'),
            index=sample['index'],
            frame_keys=sample['frame_keys'],
        ),
    )
    if 'given' in sample:
        formatted['img_metas']['given'] = sample['given']
    if 'targets' in sample:
        formatted['targets'] = sample['targets']
    return formatted


def _channels_first(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [n, 3, H, W] of n images [H, W, 3].

    Raises:
        ConfigError: they are not of one size.
    """
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ConfigError(
            f'the images of a sample have different sizes, e.g. {sizes[0][1]}x{sizes[0][0]} and '
            f'{sizes[1][1]}x{sizes[1][0]}; bring them to one with RandomTransformImage'
        )
    stacked = np.empty((len(images), 3) + sizes[0], dtype=np.uint8)
    for target, image in zip(stacked, images):
        cv2.split(image, list(target))
    return stacked


def collate(samples: Sequence[Dict]) -> Dict:
    """Batch of B samples.

    Returns:
        The samples' tensors stacked to [B, ...]; ``img_metas`` as a list of B; ``targets`` (OccupancyTargets of
        tensors) where all samples have them.
    """
    batch = {key: _stack([sample[key] for sample in samples]) for key in ('img', 'lidar2img', 'ego2lidar')}
    batch['img_metas'] = [sample['img_metas'] for sample in samples]
    if all('targets' in sample for sample in samples):
        batch['targets'] = stack_targets([sample['targets'] for sample in samples])
    return batch


def _stack(values):
    """Of B samples; one alone is not copied."""
    if isinstance(values[0], EncodedImages):
        return EncodedImages.of_batch(values)
    return values[0][None] if len(values) == 1 else torch.stack(values)
