"""The task: every number that data, model and metrics must agree on, given once in the config.

A config has one top-level ``task`` dict; ``Task.from_config`` checks it, and the builders hand the result
to the detector, the datasets and the evaluators. Nothing else in a config repeats these numbers.
"""

from dataclasses import dataclass, field, fields
from typing import Mapping, Tuple

from .classes import LabelSet, get_label_set
from .errors import ConfigError

OCC3D_RANGE = (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4)  # metres, ego frame
NUSCENES_CAMERAS = ('CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_LEFT', 'CAM_BACK_RIGHT')


@dataclass(frozen=True)
class Task:
    """What is predicted, over which volume, from which images.

    Attributes:
        label_set: classes of the labels (``LabelSet``; in a config its name or a dict).
        panoptic: things are counted one by one, and ``pano_*`` is predicted.
        point_cloud_range: (x0, y0, z0, x1, y1, z1), metres, ego frame of the current keyframe.
        voxel_size: edge of a voxel, metres.
        num_frames: T, frames per sample, the current one included.
        cameras: N camera names in the order the model sees them.
        image_size: (height, width) of the network's input images, pixels.
    """

    label_set: LabelSet
    panoptic: bool = False
    point_cloud_range: Tuple[float, ...] = OCC3D_RANGE
    voxel_size: float = 0.4
    num_frames: int = 8
    cameras: Tuple[str, ...] = NUSCENES_CAMERAS
    image_size: Tuple[int, int] = (256, 704)
    grid_shape: Tuple[int, int, int] = field(init=False)

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen dataclass)
        set_('label_set', get_label_set(self.label_set))
        set_('point_cloud_range', tuple(float(v) for v in self.point_cloud_range))
        set_('voxel_size', float(self.voxel_size))
        set_('cameras', tuple(self.cameras))
        set_('image_size', tuple(int(v) for v in self.image_size))
        if len(self.point_cloud_range) != 6:
            given = len(self.point_cloud_range)
            raise ConfigError(f'task.point_cloud_range needs 6 numbers (x0 y0 z0 x1 y1 z1), got {given}')
        if self.voxel_size <= 0:
            raise ConfigError(f'task.voxel_size must be positive, got {self.voxel_size:g}')
        if int(self.num_frames) != self.num_frames or self.num_frames < 1:
            raise ConfigError(f'task.num_frames must be an integer of at least 1, got {self.num_frames!r}')
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f'task.cameras must be different names, got {self.cameras!r}')
        if len(self.image_size) != 2 or min(self.image_size) < 32:
            raise ConfigError(f'task.image_size must be (height, width), at least 32 each, got {self.image_size!r}')
        set_('grid_shape', self._grid_shape())

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
        return tuple(shape)

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
        unknown = set(cfg) - known
        if unknown:
            raise ConfigError(f'task: unknown keys {sorted(unknown)}; the keys are {sorted(known)}')
        if 'label_set' not in cfg:
            raise ConfigError("task: key 'label_set' is missing; give e.g. label_set='occ3d'")
        return cls(**dict(cfg))
