"""Voxel mIoU of Occ3D: intersection over union of classes over the voxels that the cameras see."""

from typing import NamedTuple, Optional, Sequence

import numpy as np


class VoxelCounts(NamedTuple):
    """Voxels of one sample or of many, free left out.

    Attributes:
        true, predicted, matched: int64 [C], voxels by true class, by predicted class, and right ones.
    """

    true: np.ndarray
    predicted: np.ndarray
    matched: np.ndarray


def count_voxel_iou(truth, prediction, mask: Optional[np.ndarray], num_classes: int) -> VoxelCounts:
    """Counts of one sample.

    Args:
        truth, prediction: uint8 [X, Y, Z], arrays or tensors on one device. Truth beyond the classes
            (255) is ignored.
        mask: [X, Y, Z], voxels to count, of the same kind; None counts all.
        num_classes: with free, which is the last.
    """
    count = _count_on_cpu if isinstance(truth, np.ndarray) else _count_on_gpu
    return VoxelCounts(*(part[:-1] for part in count(truth, prediction, mask, num_classes)))


def _count_on_cpu(truth, prediction, mask, num_classes):
    from .kernels import count_voxels

    counts = np.zeros((3, num_classes), dtype=np.int64)
    mask = np.empty(0, dtype=bool) if mask is None else mask.astype(bool)
    count_voxels(*(np.ascontiguousarray(volume).reshape(-1) for volume in (truth, prediction, mask)), *counts)
    return counts


def _count_on_gpu(truth, prediction, mask, num_classes):
    import torch

    bins = num_classes * num_classes
    counted = truth < num_classes
    if mask is not None:
        counted = counted & mask.bool()
    key = truth.long() * num_classes + prediction
    key = torch.where(counted, key, torch.full_like(key, bins)).reshape(-1)
    confusion = torch.bincount(key, minlength=bins + 1)[:bins].cpu().numpy().reshape(num_classes, num_classes)
    return confusion.sum(axis=1), confusion.sum(axis=0), np.diagonal(confusion)


def voxel_iou(counts: Sequence[VoxelCounts]) -> np.ndarray:
    """IoU float64 [C] over all samples; NaN for a class neither there nor predicted."""
    true, predicted, matched = (sum(parts) for parts in zip(*counts))
    union = true + predicted - matched
    return np.divide(matched, union, out=np.full(matched.shape, np.nan), where=union > 0)
