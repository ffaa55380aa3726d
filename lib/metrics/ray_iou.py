"""RayIoU: intersection over union of classes along LiDAR-like rays, at several depth tolerances.

Only rays whose true label is not free are counted. A ray matches where the class is right and the depth is
off by less than the threshold. C classes without free, T thresholds.
"""

from typing import NamedTuple, Sequence

import numpy as np

from .comparison import RayEnds, count_labels


class RayIoUCounts(NamedTuple):
    """Rays of one sample or of many.

    Attributes:
        true: int64 [C], rays whose true label is the class.
        predicted: int64 [C], rays predicted as the class among those with a true class.
        matched: int64 [T, C], rays right in class and, within the threshold, in depth.
    """

    true: np.ndarray
    predicted: np.ndarray
    matched: np.ndarray


def count_ray_iou(truth: RayEnds, prediction: RayEnds, num_classes: int, thresholds: Sequence[float]) -> RayIoUCounts:
    """Counts of one sample.

    Args:
        truth, prediction: ends of the same M rays.
        num_classes: with free, which is the last.
        thresholds: metres, ascending.
    """
    counts = count_labels(truth, prediction, num_classes, thresholds)
    classes = np.arange(num_classes - 1)
    right = counts[classes, classes]  # [C, T + 1]
    # A ray below k of the ascending thresholds is below the last k of them.
    matched = np.stack([right[:, least:].sum(axis=1) for least in range(len(thresholds), 0, -1)])
    return RayIoUCounts(true=counts.sum(axis=(1, 2)), predicted=counts.sum(axis=(0, 2))[:-1], matched=matched)


def ray_iou(counts: Sequence[RayIoUCounts]) -> np.ndarray:
    """IoU float64 [T, C] over all samples; NaN for a class neither there nor predicted."""
    true, predicted, matched = (sum(parts) for parts in zip(*counts))
    union = true + predicted - matched
    return np.divide(matched, union, out=np.full(matched.shape, np.nan), where=union > 0)
