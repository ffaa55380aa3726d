"""What a sample is trained on: one table of fields, shared by pipelines, collate, losses and made-up batches.

A new field (say, flow) is one line in :class:`OccupancyTargets` or in a class of one's own built on it; whoever makes
it fills it in, whoever needs it reads it by its name, and everything between follows the table. X, Y, Z the grid, B
batch, n instances.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch

from .classes import IGNORE_LABEL

NO_INSTANCE = 255


def volume(dtype: str, outside) -> Any:
    """A field of one value per voxel: [X, Y, Z] of a sample, stacked to [B, X, Y, Z].

    Args:
        dtype: NumPy's name of the type.
        outside: value of voxels that a rotation brings in from outside the volume.
    """
    return field(default=None, metadata=dict(dtype=dtype, outside=outside, stacked=True))


def listed(dtype: str) -> Any:
    """A field whose length differs from sample to sample: a list of B arrays in a batch."""
    return field(default=None, metadata=dict(dtype=dtype, outside=None, stacked=False))


@dataclass(frozen=True)
class OccupancyTargets:
    """Ground truth of a sample (NumPy arrays) or of a batch (tensors). Nothing here is ever changed in place.

    Attributes:
        voxel_semantics: uint8 [(B,) X, Y, Z], class ids, 255 = ignore.
        voxel_instances: uint8 [(B,) X, Y, Z], target ids 0.. within the sample, 255 = none.
        instance_class_ids: int64 [n], class of each target id; a list of B in a batch.
        mask_camera: bool [(B,) X, Y, Z], voxels that the cameras see; None where the labels do not say.
        lidar_points: float32 [n, 3], the keyframe's LiDAR scan, metres, frame of LIDAR_TOP; a list of B in a batch;
            None unless it is asked for.
    """

    voxel_semantics: Any = volume('uint8', outside=IGNORE_LABEL)
    voxel_instances: Any = volume('uint8', outside=NO_INSTANCE)
    instance_class_ids: Any = listed('int64')
    mask_camera: Any = volume('bool', outside=False)
    lidar_points: Any = listed('float32')

    def map_volumes(self, function: Callable[[Any, Any], Any]) -> 'OccupancyTargets':
        """A copy whose volumes are ``function(volume, value outside)``; absent ones stay absent."""
        changed = {
            item.name: function(getattr(self, item.name), item.metadata['outside'])
            for item in fields(self)
            if item.metadata['stacked'] and getattr(self, item.name) is not None
        }
        return replace(self, **changed)

    def to(self, device, non_blocking: bool = False) -> 'OccupancyTargets':
        """A copy with every tensor on ``device``."""
        moved = {item.name: _move(getattr(self, item.name), device, non_blocking) for item in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> 'OccupancyTargets':
        """A copy in memory that a GPU can read while it works (PyTorch's loader asks for it)."""
        return replace(self, **{item.name: _pin(getattr(self, item.name)) for item in fields(self)})


def stack_targets(samples: Sequence[OccupancyTargets]) -> OccupancyTargets:
    """The targets of a batch, tensors, from those of its samples, of one class. A field that one lacks is left out."""
    kind, stacked = type(samples[0]), {}
    for item in fields(kind):
        values = [getattr(sample, item.name) for sample in samples]
        if any(value is None for value in values):
            continue
        tensors = [torch.from_numpy(np.ascontiguousarray(value, dtype=item.metadata['dtype'])) for value in values]
        stacked[item.name] = torch.stack(tensors) if item.metadata['stacked'] else tensors
    return kind(**stacked)


def _move(value: Optional[Any], device, non_blocking: bool):
    if isinstance(value, list):
        return [_move(one, device, non_blocking) for one in value]
    return None if value is None else value.to(device, non_blocking=non_blocking)


def _pin(value: Optional[Any]):
    if isinstance(value, list):
        return [one.pin_memory() for one in value]
    return None if value is None else value.pin_memory()
