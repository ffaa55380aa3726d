"""Augmentation in the bird's eye view: the volume is rotated about z and flipped, labels and matrices."""

from typing import Dict, NamedTuple, Sequence, Tuple

import numpy as np
from mmdet.datasets.builder import PIPELINES

from lib.errors import ConfigError
from lib.geometry import rotation_z
from lib.task import Task


class BEVTransform(NamedTuple):
    """flip · rotation of the ego frame's x and y.

    Attributes:
        angle: rotation about +z, x towards y, radians.
        flip_x: x changes sign after the rotation.
        flip_y: y changes sign after the rotation.
    """

    angle: float
    flip_x: bool
    flip_y: bool

    def matrix(self) -> np.ndarray:
        """4x4 float64 from the recorded ego frame to the augmented one."""
        matrix = np.eye(4)
        flip = np.diag([-1.0 if self.flip_x else 1.0, -1.0 if self.flip_y else 1.0, 1.0])
        matrix[:3, :3] = flip @ rotation_z(self.angle)
        return matrix


@PIPELINES.register_module()
class BEVAug:
    """Rotate the volume about z and flip it along x and y at random; training only.

    ``ego2lidar`` becomes ``ego2lidar · inv(bda)``, so that a point of the augmented volume still lands on
    its pixels. Labels take the nearest voxel; voxels rotated in from outside get the value that
    ``lib.targets`` states for each field.

    Args:
        task: range and grid.
        rot_lim: (lowest, highest) rotation, degrees.
        flip_dx_ratio: probability of x changing sign.
        flip_dy_ratio: probability of y changing sign.
    """

    def __init__(
        self,
        task: Task,
        rot_lim: Sequence[float] = (-22.5, 22.5),
        flip_dx_ratio: float = 0.5,
        flip_dy_ratio: float = 0.5,
    ):
        if len(rot_lim) != 2 or rot_lim[0] > rot_lim[1]:
            raise ConfigError(f'BEVAug: rot_lim must be (lowest, highest) in degrees, got {rot_lim!r}')
        self.task = task
        self.rot_lim = tuple(float(v) for v in rot_lim)
        self.flip_ratios = (flip_dx_ratio, flip_dy_ratio)

    def __call__(self, sample: Dict) -> Dict:
        if sample['test_mode']:
            raise ConfigError('BEVAug turns the volume that predictions are compared in; use it in training only')
        rng = sample['rng']
        angle = np.deg2rad(rng.uniform(*self.rot_lim))
        flip_x, flip_y = rng.random(2) < self.flip_ratios
        return self.apply(sample, BEVTransform(float(angle), bool(flip_x), bool(flip_y)))

    def apply(self, sample: Dict, transform: BEVTransform) -> Dict:
        """The sample under one given transform."""
        sample['ego2lidar'] = sample['ego2lidar'] @ np.linalg.inv(transform.matrix())
        if 'targets' in sample:
            columns, inside = source_columns(self.task, transform)
            sample['targets'] = sample['targets'].map_volumes(
                lambda volume, outside: _take_columns(volume, columns, inside, outside)
            )
        return sample


def source_columns(task: Task, transform: BEVTransform) -> Tuple[np.ndarray, np.ndarray]:
    """Where each column of the augmented volume comes from.

    Returns:
        (columns, inside): int64 [X, Y], flat index x·Y + y of the recorded column whose voxels hold the
        centre of the augmented one; bool [X, Y], False where that lies outside the volume (column 0 there).
    """
    shape = np.array(task.grid_shape[:2])
    low = np.array(task.point_cloud_range[:2])
    index = np.stack(np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing='ij'), axis=-1)
    centres = (index + 0.5) * task.voxel_size + low
    recorded = centres @ np.linalg.inv(transform.matrix())[:2, :2].T
    source = np.floor((recorded - low) / task.voxel_size).astype(np.int64)
    inside = ((source >= 0) & (source < shape)).all(axis=-1)
    return np.where(inside, source[..., 0] * shape[1] + source[..., 1], 0), inside


def _take_columns(volume, columns, inside, outside):
    taken = volume.reshape((-1,) + volume.shape[2:])[columns]
    taken[~inside] = outside
    return taken
