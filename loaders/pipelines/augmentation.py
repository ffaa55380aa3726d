"""Augmentation: one draw for all images of a sample (resize, crop, maybe mirror), and one for its volume.

In the bird's eye view the volume is rotated about z and flipped: labels and matrices, not images.
"""

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from mmdet.datasets.builder import PIPELINES

from lib.errors import ConfigError
from lib.geometry import rotation_z
from lib.task import Task

from .resize import compile_resizing, resize_window

REFERENCE_SOURCE = (900, 1600)  # (height, width) of nuScenes images
REFERENCE_NETWORK = (256, 704)  # (height, width) of the published networks' input
_ROUNDING = 1e-9  # keeps int(width * (w / width)) from falling one short of w


class ImageTransform(NamedTuple):
    """Resize, crop and mirror of one image.

    Attributes:
        scale: factor from file pixels to resized pixels.
        resized: (height, width) after resizing, pixels.
        left: crop x in the resized image; what lies outside the image is black.
        top: crop y in the resized image.
        size: (height, width) of the crop.
        mirror: the crop is mirrored left to right.
    """

    scale: float
    resized: Tuple[int, int]
    left: int
    top: int
    size: Tuple[int, int]
    mirror: bool

    def matrix(self) -> np.ndarray:
        """4x4 float64 that takes (u·d, v·d, d, 1) of the file's image to that of the result."""
        matrix = np.eye(4)
        matrix[0, 0] = matrix[1, 1] = self.scale
        matrix[0, 2], matrix[1, 2] = -self.left, -self.top
        if self.mirror:
            mirror = np.eye(4)
            mirror[0, 0], mirror[0, 2] = -1.0, self.size[1]
            matrix = mirror @ matrix
        return matrix

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] of the result from the file's image, uint8 [H, W, 3], or what stands for them."""
        if not isinstance(image, np.ndarray):
            return image.transformed(self)
        rows, columns = self.window()
        result = resize_window(image, self.resized, rows, columns)
        if result.shape[:2] != self.size:
            seen, result = result, np.zeros(self.size + image.shape[2:], dtype=np.uint8)
            y, x = rows[0] - self.top, columns[0] - self.left
            result[y : y + len(seen), x : x + seen.shape[1]] = seen
        return cv2.flip(result, 1) if self.mirror else result

    def window(self) -> Tuple[Tuple[int, int], Tuple[int, int]]:
        """(start, stop) of the resized image's rows, and of its columns, that the crop shows."""
        return (_inside(self.top, self.size[0], self.resized[0]), _inside(self.left, self.size[1], self.resized[1]))


def _inside(start: int, count: int, length: int) -> Tuple[int, int]:
    """(start, stop) of what a crop of ``count`` pixels takes of a line of ``length``."""
    return max(start, 0), min(start + count, length)


def fitting_scale(source: Sequence[int], network: Sequence[int]) -> float:
    """Smallest factor at which an image of size ``source`` (H, W) covers ``network`` (H, W)."""
    return max(network[0] / source[0], network[1] / source[1])


@PIPELINES.register_module()
class RandomTransformImage:
    """Resize, crop to the network's size, and (training) maybe mirror; ``lidar2img`` follows.

    Evaluation: the smallest size that covers the network's, crop centred in x and at the bottom, no mirror.
    Training: factor uniform in ``resize_lim``, crop x uniform over the valid range, crop at the bottom,
    mirror with probability 0.5 if ``rand_flip``.

    Args:
        task: ``image_size`` of the network.
        resize_lim: (lowest, highest) factor for 1600x900 images and a 704x256 network, as published. For
            other sizes both are multiplied by (fitting factor there) / 0.44, so that the same share of the
            picture is seen: e.g. 800x450 images need factors twice as large for the same network.
        rand_flip: mirror half of the samples (release 1.1; release 1.0 never does).
        training: True or False; None (default) follows the data set's ``test_mode``.
        resize_reference: ((H, W) of the images, (H, W) of the network) that ``resize_lim`` is given for; None
            takes ``resize_lim`` as plain factors for whatever the images are.
    """

    changes = ('img', 'lidar2img')

    def __init__(
        self,
        task: Task,
        resize_lim: Sequence[float] = (0.38, 0.55),
        rand_flip: bool = False,
        training: Optional[bool] = None,
        resize_reference: Optional[Sequence[Sequence[int]]] = (REFERENCE_SOURCE, REFERENCE_NETWORK),
    ):
        if len(resize_lim) != 2 or not 0 < resize_lim[0] <= resize_lim[1]:
            raise ConfigError(
                f'RandomTransformImage: resize_lim must be (lowest, highest), both above 0, got {resize_lim!r}'
            )
        self.size = task.image_size
        self.resize_lim = tuple(float(v) for v in resize_lim)
        self.rand_flip = rand_flip
        self.training = training
        self.resize_reference = resize_reference
        compile_resizing()

    def __call__(self, sample: Dict) -> Dict:
        training = not sample['test_mode'] if self.training is None else self.training
        zoom, shift, mirror = sample['rng'].random(3) if training else (0.0, 0.0, 0.0)
        mirror = bool(training and self.rand_flip and mirror < 0.5)
        transforms = {}
        for image in sample['img']:
            if image.shape not in transforms:
                source = image.shape[:2]
                transforms[image.shape] = (
                    self.train_transform(source, zoom, shift, mirror) if training else self.test_transform(source)
                )
        matrices = np.stack([transforms[image.shape].matrix() for image in sample['img']])
        sample['lidar2img'] = matrices @ sample['lidar2img']
        sample['img'] = _apply_once_each(sample['img'], transforms)
        return sample

    def train_transform(self, source, zoom: float, shift: float, mirror: bool) -> ImageTransform:
        """Transform of an image of size ``source`` (H, W) from two draws in 0..1 and the mirror's."""
        factor = (
            1.0
            if self.resize_reference is None
            else fitting_scale(source, self.size) / fitting_scale(*self.resize_reference)
        )
        lowest, highest = self.resize_lim
        scale = (lowest + (highest - lowest) * zoom) * factor
        resized = _resized(source, scale)
        free_columns = max(0, resized[1] - self.size[1])
        return ImageTransform(
            scale, resized, int(shift * (free_columns + 1)), resized[0] - self.size[0], self.size, mirror
        )

    def test_transform(self, source) -> ImageTransform:
        """Transform of an image of size ``source`` (H, W) in evaluation."""
        scale = fitting_scale(source, self.size)
        resized = _resized(source, scale)
        left = max(0, resized[1] - self.size[1]) // 2
        return ImageTransform(scale, resized, left, resized[0] - self.size[0], self.size, False)


def _resized(source, scale):
    return tuple(int(length * scale + _ROUNDING) for length in source)


def _apply_once_each(images, transforms):
    """Transformed images; an array that stands in the list several times is transformed once."""
    done = {}
    for image in images:
        if id(image) not in done:
            done[id(image)] = transforms[image.shape].apply(image)
    return [done[id(image)] for image in images]


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

    changes = ('ego2lidar', 'targets')

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
