"""RayPQ: panoptic quality of segments made of rays (paper section 4.1), at several depth tolerances.

Segments are made per sample among the rays whose true label is not free. True ones: a stuff class is one
segment; of a thing class, every id > 0 whose rays all have one class, and one more for its other rays (id 0,
or an id that spans classes). Predicted ones: by class and id, id 0 too, nothing merged. C classes without
free, T thresholds.
"""

import math
from typing import NamedTuple, Sequence

import numpy as np

from .comparison import SegmentPairs

MIN_SEGMENT_RAYS = 10  # smaller segments are no misses and no false alarms


class RayPQCounts(NamedTuple):
    """Segments of one sample.

    Attributes:
        unmatched: int64 [2, T, C]: true segments missed, and predicted segments that match nothing.
        matches: int64 [n, 4], one row per match: threshold index, class, rays in common, rays in the union.
    """

    unmatched: np.ndarray
    matches: np.ndarray


class _Segments(NamedTuple):
    """Segments of one side. S segments, n groups of rays.

    Attributes:
        of_group: int64 [n], segment of each group.
        label, rays: int64 [S], class and number of rays of each segment.
    """

    of_group: np.ndarray
    label: np.ndarray
    rays: np.ndarray


def count_ray_pq(pairs: SegmentPairs, num_classes: int, thing_ids: Sequence[int], num_thresholds: int) -> RayPQCounts:
    """Match the segments of one sample.

    Args:
        pairs: rays grouped by true and predicted segment.
        num_classes: with free, which is the last.
        thing_ids: classes counted one by one.
    """
    true = _index_segments(pairs.true_class, _true_segment_ids(pairs, thing_ids), pairs.rays)
    predicted = _index_segments(pairs.predicted_class, pairs.predicted_id, pairs.rays)
    unmatched = np.zeros((2, num_thresholds, num_classes - 1), dtype=np.int64)
    matches = []
    same_class = pairs.true_class == pairs.predicted_class
    for threshold in range(num_thresholds):
        # Below k of the ascending thresholds means below the last k of them.
        common = same_class & (pairs.level >= num_thresholds - threshold)
        true_hit, predicted_hit, rows = _match(true, predicted, common, pairs.rays[common])
        matches.append(np.column_stack([np.full(len(rows), threshold), true.label[true_hit], rows]))
        unmatched[0, threshold] = _count_unmatched(true, true_hit, num_classes)
        unmatched[1, threshold] = _count_unmatched(predicted, predicted_hit, num_classes)
    return RayPQCounts(unmatched=unmatched, matches=np.concatenate(matches).astype(np.int64))


def _true_segment_ids(pairs, thing_ids):
    """Id of each group's true segment within its class; 0 for stuff and for the rest of a thing class."""
    ids = np.where(np.isin(pairs.true_class, list(thing_ids)), pairs.true_id, 0)
    lowest = np.full(int(pairs.true_id.max(initial=0)) + 1, np.iinfo(np.int64).max)
    highest = np.full(lowest.shape, -1)
    np.minimum.at(lowest, pairs.true_id, pairs.true_class)
    np.maximum.at(highest, pairs.true_id, pairs.true_class)
    return np.where(lowest[pairs.true_id] == highest[pairs.true_id], ids, 0)


def _index_segments(classes, ids, rays):
    """Number the segments."""
    keys, index = np.unique((classes << 32) | ids, return_inverse=True)
    index = index.reshape(-1)
    sizes = np.zeros(len(keys), dtype=np.int64)
    np.add.at(sizes, index, rays)
    return _Segments(of_group=index, label=keys >> 32, rays=sizes)


def _match(true, predicted, groups, rays):
    """Pairs of segments with IoU above one half, counted over some of the groups.

    Returns:
        their true segments [n], predicted segments [n], and (common rays, rays in the union) [n, 2].
    """
    keys, index = np.unique((true.of_group[groups] << 32) | predicted.of_group[groups], return_inverse=True)
    common = np.zeros(len(keys), dtype=np.int64)
    np.add.at(common, index.reshape(-1), rays)
    true_side, predicted_side = keys >> 32, keys & 0xFFFFFFFF
    union = true.rays[true_side] + predicted.rays[predicted_side] - common
    good = 2 * common > union
    return true_side[good], predicted_side[good], np.column_stack([common[good], union[good]])


def _count_unmatched(segments, matched, num_classes):
    """Segments per class that match nothing and are large enough to count. int64 [C]."""
    wrong = segments.rays >= MIN_SEGMENT_RAYS
    wrong[matched] = False
    return np.bincount(segments.label[wrong], minlength=num_classes)[: num_classes - 1]


def ray_pq(counts: Sequence[RayPQCounts]) -> np.ndarray:
    """Panoptic quality float64 [T, C] over all samples; NaN for a class that does not occur."""
    missed, false_alarms = sum(part.unmatched for part in counts)
    matches = np.concatenate([part.matches for part in counts])
    quality = np.full(missed.shape, np.nan)
    for threshold, label in np.ndindex(*missed.shape):
        rows = matches[(matches[:, 0] == threshold) & (matches[:, 1] == label)]
        errors = missed[threshold, label] + false_alarms[threshold, label]
        if len(rows) or errors:
            # fsum: the same bits in whatever order samples were counted
            quality[threshold, label] = math.fsum(rows[:, 2] / rows[:, 3]) / (len(rows) + 0.5 * errors)
    return quality
