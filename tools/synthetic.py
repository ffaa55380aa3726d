"""Made-up batches with a plausible camera rig: for benchmarks, and for trying a config without data.

Nothing here resembles a street; what counts is that every tensor has the shape, dtype and range of a
real batch, that points project into the images as they do on a car, and that a seed gives the same bits.
"""

import math
from typing import Dict

import numpy as np
import torch

from lib.targets import OccupancyTargets, stack_targets
from lib.task import Task

_CAMERA_YAWS = {
    'CAM_FRONT': 0.0,
    'CAM_FRONT_RIGHT': -55.0,
    'CAM_FRONT_LEFT': 55.0,
    'CAM_BACK': 180.0,
    'CAM_BACK_LEFT': 110.0,
    'CAM_BACK_RIGHT': -110.0,
}
_HORIZONTAL_FOV = 70.0
_CAMERA_HEIGHT = 1.5
_LIDAR_HEIGHT = 1.8


def _ego_to_camera(yaw_degrees: float, forward_motion: float) -> np.ndarray:
    """4x4, ego (x forward, y left, z up) to camera (x right, y down, z forward), metres."""
    yaw = math.radians(yaw_degrees)
    forward = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    down = np.array([0.0, 0.0, -1.0])
    rotation = np.stack([np.cross(down, forward), down, forward])
    centre = forward * 0.8 + np.array([0.8 - forward_motion, 0.0, _CAMERA_HEIGHT])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = -rotation @ centre
    return matrix


def synthetic_calibration(task: Task, metres_per_frame: float = 2.0):
    """Projection matrices of a car that drives straight ahead.

    Returns:
        lidar2img float32 [T*N, 4, 4] (LIDAR_TOP to pixels) and ego2lidar float64 [T*N, 4, 4].
    """
    height, width = task.image_size
    focal = 0.5 * width / math.tan(math.radians(_HORIZONTAL_FOV) / 2)
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = [[focal, 0, width / 2], [0, focal, height / 3], [0, 0, 1]]
    lidar2ego = np.eye(4)
    lidar2ego[:3, 3] = [0.9, 0.0, _LIDAR_HEIGHT]
    count = len(task.cameras)
    yaws = [_CAMERA_YAWS.get(name, 360.0 * n / count) for n, name in enumerate(task.cameras)]
    lidar2img = np.stack(
        [
            intrinsics @ _ego_to_camera(yaw, t * metres_per_frame) @ lidar2ego
            for t in range(task.num_frames)
            for yaw in yaws
        ]
    )
    ego2lidar = np.repeat(np.linalg.inv(lidar2ego)[None], len(lidar2img), axis=0)
    return lidar2img.astype(np.float32), ego2lidar


def _labels(task: Task, generator: torch.Generator) -> OccupancyTargets:
    """One sample's labels: a floor of stuff and boxes of every class; instances as the pipeline gives them."""
    shape, labels = task.grid_shape, task.label_set
    semantics = torch.full(shape, labels.free_id, dtype=torch.uint8)
    instances = torch.full(shape, 255, dtype=torch.uint8)
    class_ids = []
    for class_id in range(labels.num_occupied):
        size = [max(1, n // 12) for n in shape]
        corner = [int(torch.randint(0, n - s + 1, (1,), generator=generator)) for n, s in zip(shape, size)]
        block = tuple(slice(c, c + s) for c, s in zip(corner, size))
        semantics[block] = class_id
    semantics[:, :, shape[2] // 4][semantics[:, :, shape[2] // 4] == labels.free_id] = labels.num_occupied - 1
    for class_id in range(labels.num_occupied):
        where = semantics == class_id
        if where.any():
            instances[where] = len(class_ids)
            class_ids.append(class_id)
    mask = np.ones(shape, dtype=bool)
    return OccupancyTargets(semantics.numpy(), instances.numpy(), np.array(class_ids, dtype=np.int64), mask)


def synthetic_meta(task: Task, index: int, seed: int = 0) -> Dict:
    """The ``img_metas`` entry of keyframe ``index`` of the imaginary drive; frame t is keyframe ``index - t``."""
    keys = [f'synthetic/{seed}/{index - t}/{name}' for t in range(task.num_frames) for name in task.cameras]
    return dict(sample_token=f'synthetic-{index}', scene_name='synthetic', index=index, frame_keys=keys)


def synthetic_batch(
    task: Task, batch_size: int = 1, seed: int = 0, with_labels: bool = False, first_index: int = 0
) -> Dict:
    """A batch as ``loaders.collate`` returns it, of random images.

    Args:
        with_labels: add ``targets``, with every voxel in ``mask_camera``.
        first_index: position of the first sample in the imaginary drive; consecutive indices share the
            images of earlier frames, as consecutive keyframes do (for the feature cache).
    Returns:
        dict with img uint8 [B, T*N, 3, H, W], lidar2img float32 and ego2lidar float64 [B, T*N, 4, 4],
        img_metas, and ``targets`` if asked for. CPU tensors.
    """
    frames, cameras = task.num_frames, task.cameras
    lidar2img, ego2lidar = synthetic_calibration(task)
    indices = range(first_index, first_index + batch_size)
    metas = [synthetic_meta(task, index, seed) for index in indices]
    drawn = {}  # by keyframe: samples share what they saw
    for keyframe in {index - t for index in indices for t in range(frames)}:
        generator = torch.Generator().manual_seed(seed * 1000003 + keyframe + frames)
        size = (len(cameras), 3) + task.image_size
        drawn[keyframe] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    images = [drawn[index - t] for index in indices for t in range(frames)]
    batch = dict(
        img=torch.stack(images).view((batch_size, frames * len(cameras), 3) + task.image_size),
        lidar2img=torch.from_numpy(lidar2img).repeat(batch_size, 1, 1, 1),
        ego2lidar=torch.from_numpy(ego2lidar).repeat(batch_size, 1, 1, 1),
        img_metas=metas,
    )
    if with_labels:
        samples = [_labels(task, torch.Generator().manual_seed(seed + 7919 * b)) for b in range(batch_size)]
        batch['targets'] = stack_targets(samples)
    return batch
