"""True and predicted ends of the same rays, and how they are counted on the CPU and on a GPU.

M rays; C classes, free last; T thresholds. Arrays are NumPy on the CPU and tensors on a GPU.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np

from ..prediction import MAX_INSTANCE_ID

_ID_BITS = MAX_INSTANCE_ID.bit_length()
_CLASS_BITS = 8
_LEVEL_BITS = 6


@dataclass(frozen=True)
class RayEnds:
    """Where M rays end in one volume.

    Attributes:
        label: uint8 [M].
        distance_m: float32 [M], metres.
        instance: integer [M]; None where instances are not scored.
    """

    label: Any
    distance_m: Any
    instance: Optional[Any] = None


class SegmentPairs(NamedTuple):
    """Rays grouped by what they meet in truth and prediction; int64 [n] each, groups in ascending order.

    Attributes:
        true_class, true_id, predicted_class, predicted_id: the group.
        level: number of thresholds that the distance error is below; part of the group.
        rays: rays in the group.
    """

    true_class: np.ndarray
    true_id: np.ndarray
    predicted_class: np.ndarray
    predicted_id: np.ndarray
    level: np.ndarray
    rays: np.ndarray


def count_labels(truth: RayEnds, prediction: RayEnds, num_classes: int, thresholds: Sequence[float]) -> np.ndarray:
    """Count rays whose true label is a class other than free.

    Args:
        thresholds: metres.

    Returns:
        int64 [C - 1, C, T + 1]: rays by true class, predicted class, and number of thresholds that the
        distance error is below.
    """
    shape = (num_classes - 1, num_classes, len(thresholds) + 1)
    if isinstance(truth.label, np.ndarray):
        from .kernels import count_labels as kernel

        counts = np.zeros(shape, dtype=np.int64)
        kernel(
            truth.label,
            prediction.label,
            truth.distance_m,
            prediction.distance_m,
            np.asarray(thresholds, dtype=np.float32),
            counts,
        )
        return counts
    import torch

    level = _levels(truth, prediction, thresholds)
    bins = shape[0] * shape[1] * shape[2]
    key = (truth.label.long() * num_classes + prediction.label) * shape[2] + level
    key = torch.where(truth.label < num_classes - 1, key, torch.full_like(key, bins))
    return torch.bincount(key, minlength=bins + 1)[:bins].cpu().numpy().reshape(shape)


def group_segments(truth: RayEnds, prediction: RayEnds, num_classes: int, thresholds: Sequence[float]) -> SegmentPairs:
    """Group rays whose true label is a class other than free by their true and predicted segments.

    Args:
        thresholds: metres.
    """
    if isinstance(truth.label, np.ndarray):
        keys, rays = _group_on_cpu(truth, prediction, num_classes, thresholds)
    else:
        keys, rays = _group_on_gpu(truth, prediction, num_classes, thresholds)
    fields = []
    for bits in (_LEVEL_BITS, _ID_BITS, _CLASS_BITS, _ID_BITS, _CLASS_BITS):
        fields.append(keys & ((1 << bits) - 1))
        keys = keys >> bits
    level, predicted_id, predicted_class, true_id, true_class = fields
    return SegmentPairs(true_class, true_id, predicted_class, predicted_id, level, rays)


def _group_on_cpu(truth, prediction, num_classes, thresholds):
    from .kernels import key_runs

    total = len(truth.label)
    keys, lengths = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    runs = key_runs(
        truth.label,
        truth.instance.astype(np.int32),
        prediction.label,
        prediction.instance.astype(np.int32),
        truth.distance_m,
        prediction.distance_m,
        np.asarray(thresholds, dtype=np.float32),
        num_classes - 1,
        keys,
        lengths,
    )
    order = np.argsort(keys[:runs], kind='stable')
    keys, lengths = keys[order], lengths[order]
    if not runs:
        return keys, lengths
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(lengths, first)


def _group_on_gpu(truth, prediction, num_classes, thresholds):
    import torch

    level = _levels(truth, prediction, thresholds)
    key = truth.label.long()
    for value, bits in (
        (truth.instance, _ID_BITS),
        (prediction.label, _CLASS_BITS),
        (prediction.instance, _ID_BITS),
        (level, _LEVEL_BITS),
    ):
        key = (key << bits) | value.long()
    keys, rays = torch.unique(key[truth.label < num_classes - 1], return_counts=True)
    both = torch.stack([keys, rays]).cpu().numpy()
    return both[0], both[1]


def _levels(truth, prediction, thresholds):
    """Number of thresholds that each ray's distance error is below. int64 [M], on the device."""
    import torch

    error = (truth.distance_m - prediction.distance_m).abs()
    limits = torch.tensor(list(thresholds), dtype=torch.float32, device=error.device)
    return (error[:, None] < limits).sum(dim=1)
