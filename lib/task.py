"""The task: every number that data, model and metrics must agree on, given once in the config.

A config has one top-level ``task`` dict; ``Task.from_config`` checks it, and the builders hand the result
to the detector, the datasets and the evaluators. Nothing else in a config repeats these numbers.
"""

import math
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Mapping, Optional, Tuple

from .classes import LabelSet, get_label_set
from .errors import ConfigError
from .geometry import FRAMES, Grid
from .label_formats import LABEL_FORMATS, NPZ
from .registry import check_keys, check_value

OCC3D_RANGE = (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4)  # metres, ego frame
NUSCENES_CAMERAS = ('CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_LEFT', 'CAM_BACK_RIGHT')
_MOST_VOXELS = 1 << 30
_LARGEST = 1e9
_SMALLEST = 1e-6  # metres


def _numbers(name: str, value: Any, said: str, count: int, lowest: float = -_LARGEST) -> Tuple[float, ...]:
    """``count`` finite floats of at least ``lowest``. Raises ConfigError that names the key and what it must be."""
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    plain = all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != count or not plain or not all(lowest <= number < _LARGEST for number in numbers):
        raise ConfigError(f'task.{name} must be {said}, got {value[0] if count == 1 else value!r}')
    return tuple(float(number) for number in numbers)


def _whole(name: str, value: Any, said: str, count: int, lowest: int) -> Tuple[int, ...]:
    """``count`` integers of at least ``lowest``. Raises ConfigError as above."""
    numbers = _numbers(name, value, said, count, lowest)
    if any(number != int(number) for number in numbers):
        raise ConfigError(f'task.{name} must be {said}, got {value[0] if count == 1 else value!r}')
    return tuple(int(number) for number in numbers)


def _shape(grid: Grid, range_key: str, size_key: str) -> Tuple[int, int, int]:
    """Voxels of a volume along x, y and z. Raises ConfigError where they are not whole, or too many."""
    if not grid.is_whole or math.prod(grid.shape) > _MOST_VOXELS:
        raise ConfigError(
            f'task.{range_key} {list(grid.point_cloud_range)} must be whole voxels of {grid.voxel_size:g} m along each '
            f'side (at most {_MOST_VOXELS} in all); change it or task.{size_key}'
        )
    return grid.shape


@dataclass(frozen=True)
class Task:
    """What is predicted, over which volume, from which images.

    Attributes:
        label_set: classes of the labels (``LabelSet``; in a config its name or a dict).
        panoptic: things are counted one by one, and ``pano_*`` is predicted.
        point_cloud_range: (x0, y0, z0, x1, y1, z1), metres, in the frame ``frame`` of the current keyframe.
        voxel_size: edge of a voxel, metres.
        num_frames: T, frames per sample, the current one included.
        cameras: N camera names in the order the model sees them.
        image_size: (height, width) of the network's input images, pixels.
        frame: of ``point_cloud_range`` and all that is predicted: 'ego', or 'lidar' for LIDAR_TOP.
        label_files: 'npz', or a format of ``lib.label_formats``.
        label_range: volume of the label files where it is another than ``point_cloud_range``, or their format's.
        label_voxel_size, label_frame: the same of their voxels (metres) and their frame ('ego', 'lidar').
    """

    label_set: LabelSet
    panoptic: bool = False
    point_cloud_range: Tuple[float, ...] = OCC3D_RANGE
    voxel_size: float = 0.4
    num_frames: int = 8
    cameras: Tuple[str, ...] = NUSCENES_CAMERAS
    image_size: Tuple[int, int] = (256, 704)
    frame: str = 'ego'
    label_files: str = NPZ
    label_range: Optional[Tuple[float, ...]] = None
    label_voxel_size: Optional[float] = None
    label_frame: Optional[str] = None
    grid_shape: Tuple[int, int, int] = field(init=False)

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen dataclass)
        set_('label_set', get_label_set(self.label_set))
        set_('num_frames', _whole('num_frames', [self.num_frames], 'an integer of at least 1', 1, 1)[0])
        set_('image_size', _whole('image_size', self.image_size, '(height, width), at least 32 each', 2, 32))
        check_value(self.panoptic, bool, 'task.panoptic')
        cameras = self.cameras if isinstance(self.cameras, (list, tuple)) else ()
        named = all(isinstance(name, str) and name for name in cameras)
        if not cameras or not named or len(set(cameras)) != len(cameras):
            raise ConfigError(f'task.cameras must be different names, got {self.cameras!r}')
        set_('cameras', tuple(cameras))
        for name, value, choices in (
            ('frame', self.frame, FRAMES),
            ('label_files', self.label_files, (NPZ, *LABEL_FORMATS)),
            ('label_frame', self.label_frame or self.frame, FRAMES),
        ):
            if value not in choices:
                raise ConfigError(f'task.{name} must be one of {list(choices)}, got {value!r}')
        self._set_volume(set_, 'point_cloud_range', 'voxel_size')
        set_('grid_shape', _shape(self.grid, 'point_cloud_range', 'voxel_size'))
        self._set_volume(set_, 'label_range', 'label_voxel_size')
        _shape(self.label_grid, 'label_range', 'label_voxel_size')

    def _set_volume(self, set_, range_key: str, size_key: str) -> None:
        """Check range and voxel size; those of the labels may be None."""
        corners, size = getattr(self, range_key), getattr(self, size_key)
        if corners is not None or range_key != 'label_range':
            set_(range_key, _numbers(range_key, corners, '6 numbers (x0 y0 z0 x1 y1 z1)', 6))
        if size is not None or size_key != 'label_voxel_size':
            set_(size_key, _numbers(size_key, [size], 'a positive number of metres', 1, _SMALLEST)[0])

    @property
    def grid(self) -> Grid:
        """The volume that is predicted."""
        return Grid(self.frame, self.point_cloud_range, self.voxel_size)

    @property
    def label_grid(self) -> Grid:
        """The volume of the label files: that of their format, unless it is given."""
        own = LABEL_FORMATS[self.label_files].grid if self.label_files in LABEL_FORMATS else self.grid
        return Grid(
            self.label_frame or (own.frame if self.label_files in LABEL_FORMATS else 'ego'),
            self.label_range or own.point_cloud_range,
            self.label_voxel_size or own.voxel_size,
        )

    def as_in_files(self) -> 'Task':
        """The same task over the volume of the label files, with their voxels and in their frame."""
        frame, corners, size = self.label_grid
        ours = replace(self, frame=frame, point_cloud_range=corners, voxel_size=size)
        return replace(ours, label_range=None, label_voxel_size=None, label_frame=frame)

    @property
    def num_cameras(self) -> int:
        return len(self.cameras)

    @classmethod
    def from_config(cls, cfg: Mapping) -> 'Task':
        """Task from the config's ``task`` dict.

        Raises:
            ConfigError: unknown or missing key, or a value out of range.
        """
        known = {f.name for f in fields(cls) if f.init}
        if not isinstance(cfg, AnyMapping):
            raise ConfigError(f'task must be a dict with the keys {sorted(known)}, got {cfg!r}')
        check_keys(cfg, known, 'task')
        if 'label_set' not in cfg:
            raise ConfigError("task: key 'label_set' is missing; give e.g. label_set='occ3d'")
        return cls(**dict(cfg))
