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
from .registry import check_keys

OCC3D_RANGE = (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4)  # metres, ego frame
NUSCENES_CAMERAS = ('CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_LEFT', 'CAM_BACK_RIGHT')
_MOST_VOXELS = 1 << 30
_LARGEST = 1e9
_SMALLEST = 1e-6  # metres


def _numbers(name: str, value: Any, said: str, count: int) -> Tuple[float, ...]:
    """``count`` finite floats. Raises ConfigError that names the key and what it must be."""
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    plain = all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != count or not plain or not all(abs(number) < _LARGEST for number in numbers):
        raise ConfigError(f'task.{name} must be {said}, got {value[0] if count == 1 else value!r}')
    return tuple(float(number) for number in numbers)


def _whole(name: str, value: Any, said: str, count: int, lowest: int) -> Tuple[int, ...]:
    """``count`` integers of at least ``lowest``. Raises ConfigError as above."""
    numbers = _numbers(name, value, said, count)
    if any(number != int(number) or number < lowest for number in numbers):
        raise ConfigError(f'task.{name} must be {said}, got {value[0] if count == 1 else value!r}')
    return tuple(int(number) for number in numbers)


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
        set_(
            'point_cloud_range',
            _numbers('point_cloud_range', self.point_cloud_range, '6 numbers (x0 y0 z0 x1 y1 z1)', 6),
        )
        set_('voxel_size', _numbers('voxel_size', [self.voxel_size], 'a positive number of metres', 1)[0])
        set_('num_frames', _whole('num_frames', [self.num_frames], 'an integer of at least 1', 1, 1)[0])
        set_('image_size', _whole('image_size', self.image_size, '(height, width), at least 32 each', 2, 32))
        if not isinstance(self.panoptic, bool):
            raise ConfigError(f'task.panoptic must be True or False, got {self.panoptic!r}')
        if self.voxel_size <= 0:
            raise ConfigError(f'task.voxel_size must be a positive number of metres, got {self.voxel_size:g}')
        cameras = self.cameras if isinstance(self.cameras, (list, tuple)) else ()
        named = all(isinstance(name, str) and name for name in cameras)
        if not cameras or not named or len(set(cameras)) != len(cameras):
            raise ConfigError(f'task.cameras must be different names, got {self.cameras!r}')
        set_('cameras', tuple(cameras))
        set_('grid_shape', self._grid_shape())
        self._check_label_grid(set_)

    def _check_label_grid(self, set_):
        for name, value, choices in (
            ('frame', self.frame, FRAMES),
            ('label_files', self.label_files, (NPZ, *LABEL_FORMATS)),
            ('label_frame', self.label_frame or self.frame, FRAMES),
        ):
            if value not in choices:
                raise ConfigError(f'task.{name} must be one of {list(choices)}, got {value!r}')
        if self.label_range is not None:
            set_('label_range', _numbers('label_range', self.label_range, '6 numbers (x0 y0 z0 x1 y1 z1)', 6))
        if self.label_voxel_size is not None:
            said = 'a positive number of metres'
            set_('label_voxel_size', _numbers('label_voxel_size', [self.label_voxel_size], said, 1)[0])
            if self.label_voxel_size < _SMALLEST:
                raise ConfigError(f'task.label_voxel_size must be {said}, got {self.label_voxel_size:g}')
        if not self.label_grid.is_whole or math.prod(self.label_grid.shape) > _MOST_VOXELS:
            corners, size = list(self.label_grid.point_cloud_range), self.label_grid.voxel_size
            raise ConfigError(
                f'task.label_range {corners} must be whole voxels of {size:g} m along each side (at most '
                f'{_MOST_VOXELS} in all); change it or task.label_voxel_size'
            )

    def _grid_shape(self):
        lo, hi = self.point_cloud_range[:3], self.point_cloud_range[3:]
        shape = []
        for axis, a, b in zip('xyz', lo, hi):
            n = round((b - a) / self.voxel_size)
            if n < 1 or abs(n * self.voxel_size - (b - a)) > 1e-4 * self.voxel_size * max(n, 1):
                raise ConfigError(
                    f'task.point_cloud_range: {a:g}..{b:g} m along {axis} is not a whole number of voxels of '
                    f'{self.voxel_size:g} m; change the range or task.voxel_size'
                )
            shape.append(n)
        if math.prod(shape) > _MOST_VOXELS:
            raise ConfigError(
                f'task.voxel_size of {self.voxel_size:g} m makes {math.prod(shape)} voxels of task.point_cloud_range, '
                f'more than {_MOST_VOXELS}; make the voxels larger or the range smaller'
            )
        return tuple(shape)

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
