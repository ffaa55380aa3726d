"""From counts to scores, and how sure they are.

Counts are first summed to tallies, arrays that add up over scenes; scores are computed from tallies of any leading
shape, so that those of many resampled data sets are computed together. C classes without free, T thresholds.
"""

import warnings
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .counts import EXACT, FALSE_ALARMS, FLOW_THRESHOLDS, HALF_BITS, IOU_HIGH, IOU_LOW, MATCHED, MISSED, Counts

Tallies = Dict[str, np.ndarray]
RESAMPLES = 1000
CONFIDENCE = 0.95
VARIANTS = ('true_positives', 'all_rays')  # of the velocity error, see lib.metrics.counting
_SEED = 0


def tallies(counts: Counts, regions=None, part: int = 0) -> Tallies:
    """What the scores of some counts are computed from.

    Args:
        regions: bool [G], regions to take; None takes all.
        part: the same choice, as a part of ``counts.segments``.

    Returns:
        As far as counted: ``rays_true``, ``rays_predicted`` [C], ``rays_matched`` [T, C]; ``segments_iou`` (summed
        over matches), ``segments_matched``, ``segments_missed``, ``segments_false`` [T, C]; ``voxels_true``,
        ``voxels_predicted``, ``voxels_matched`` [C]; ``occupied_true``, ``occupied_predicted``, ``occupied_matched``
        [] of voxels that are not free; of the whole plan alone ``flow_true``, ``flow_predicted`` [C], ``flow_matched``
        [T, C] of rays, ``flow_error`` (m/s) and ``flow_counted`` [2, C].
    """
    chosen = slice(None) if regions is None else np.asarray(regions)
    result: Tallies = {}
    if counts.rays is not None:
        result.update(_of_rays(counts.rays[chosen].sum(axis=0)))
    if counts.segments is not None:
        result.update(_of_segments(counts.segments[part]))
    if counts.voxels is not None:
        result.update(_of_voxels(counts.voxels[chosen].sum(axis=0)))
    if counts.flow is not None and part == 0:
        of_rays = _of_rays(counts.flow.rays)
        result.update({name.replace('rays', 'flow'): value for name, value in of_rays.items()})
        result.update(flow_error=counts.flow.error, flow_counted=counts.flow.counted)
    return result


def _of_rays(rays):
    """Tallies of rays [C, C + 1, T + 1]."""
    classes = np.arange(len(rays))
    right = rays[classes, classes]  # [C, T + 1]
    # A ray below k of the ascending thresholds is below the last k of them.
    matched = [right[:, least:].sum(axis=1) for least in range(rays.shape[2] - 1, 0, -1)]
    predicted = rays.sum(axis=(0, 2))[:-1]
    return dict(rays_true=rays.sum(axis=(1, 2)), rays_predicted=predicted, rays_matched=np.stack(matched))


def _of_segments(segments):
    """Tallies of segments [T, C, 5]."""
    exact = segments[..., IOU_HIGH].astype(object) * (1 << HALF_BITS) + segments[..., IOU_LOW]
    return dict(
        segments_iou=(exact / int(EXACT)).astype(np.float64),  # of whole numbers: rounded once
        segments_matched=segments[..., MATCHED],
        segments_missed=segments[..., MISSED],
        segments_false=segments[..., FALSE_ALARMS],
    )


def _of_voxels(voxels):
    """Tallies of voxels [C + 1, C + 1]."""
    true, predicted, matched = voxels.sum(axis=1)[:-1], voxels.sum(axis=0)[:-1], np.diagonal(voxels)[:-1]
    return dict(
        voxels_true=true,
        voxels_predicted=predicted,
        voxels_matched=matched,
        occupied_true=true.sum(),
        occupied_predicted=predicted.sum(),
        occupied_matched=voxels[:-1, :-1].sum(),
    )


class ClassScores(NamedTuple):
    """Scores of every class, fractions of 1; NaN where a class does not occur, None where not counted.

    Attributes:
        ray_iou, ray_pq, ray_sq, ray_rq: float64 [..., T, C]; SQ is 0 where nothing matches.
        voxel_iou: float64 [..., C].
        occupied_iou: float64 [...], of occupied or not.
        flow_iou: float64 [..., T, C], RayIoU of the challenge's rays.
        velocity_error: float64 [..., 2, C], m/s, over true positives and over all rays; NaN also where a class does
            not move.
    """

    ray_iou: Optional[np.ndarray] = None
    ray_pq: Optional[np.ndarray] = None
    ray_sq: Optional[np.ndarray] = None
    ray_rq: Optional[np.ndarray] = None
    voxel_iou: Optional[np.ndarray] = None
    occupied_iou: Optional[np.ndarray] = None
    flow_iou: Optional[np.ndarray] = None
    velocity_error: Optional[np.ndarray] = None


def class_scores(sums: Tallies) -> ClassScores:
    """Scores from tallies with any leading shape."""
    scores = {}
    if 'rays_true' in sums:
        true, predicted = sums['rays_true'][..., None, :], sums['rays_predicted'][..., None, :]
        scores['ray_iou'] = _iou(true, predicted, sums['rays_matched'])
    if 'segments_iou' in sums:
        matched = sums['segments_matched']
        weight = matched + 0.5 * (sums['segments_missed'] + sums['segments_false'])
        scores['ray_pq'] = _ratio(sums['segments_iou'], weight)
        scores['ray_rq'] = _ratio(matched, weight)
        scores['ray_sq'] = np.where(weight > 0, np.nan_to_num(_ratio(sums['segments_iou'], matched)), np.nan)
    if 'voxels_true' in sums:
        scores['voxel_iou'] = _iou(*(sums[f'voxels_{name}'] for name in ('true', 'predicted', 'matched')))
        scores['occupied_iou'] = _iou(*(sums[f'occupied_{name}'] for name in ('true', 'predicted', 'matched')))
    if 'flow_error' in sums:
        true, predicted = sums['flow_true'][..., None, :], sums['flow_predicted'][..., None, :]
        scores['flow_iou'] = _iou(true, predicted, sums['flow_matched'])
        scores['velocity_error'] = _ratio(sums['flow_error'], sums['flow_counted'])
    return ClassScores(**scores)


def _iou(true, predicted, matched):
    return _ratio(matched, true + predicted - matched)


def _ratio(part, whole):
    """float64 part / whole; NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def totals(sums: Tallies, thresholds: Sequence[float], thing_ids: Sequence[int]) -> Dict[str, np.ndarray]:
    """Means over classes and thresholds, float64 of the leading shape of the tallies, by name; fractions of 1.

    RayIoU and RayPQ are means over thresholds of means over the classes that occur. ``mAVE_...`` is in m/s.
    """
    scores, result = class_scores(sums), {}
    if scores.ray_iou is not None:
        result.update(_over_thresholds('RayIoU', scores.ray_iou, thresholds))
    if scores.ray_pq is not None:
        thing = np.isin(np.arange(scores.ray_pq.shape[-1]), thing_ids)
        result.update(_over_thresholds('RayPQ', scores.ray_pq, thresholds))
        for name, values in (('RaySQ', scores.ray_sq), ('RayRQ', scores.ray_rq)):
            result[name] = mean(mean(values))
        for name, chosen in (('RayPQ_things', thing), ('RayPQ_stuff', ~thing)):
            result[name] = mean(mean(scores.ray_pq[..., chosen]))
    if scores.voxel_iou is not None:
        result.update(mIoU=mean(scores.voxel_iou), binary_IoU=scores.occupied_iou)
    if scores.flow_iou is not None and scores.velocity_error is not None:
        result.update(_over_thresholds('OccScore_RayIoU', scores.flow_iou, FLOW_THRESHOLDS))
        for position, variant in enumerate(VARIANTS):
            error = mean(scores.velocity_error[..., position, :])
            result[f'mAVE_{variant}'] = error
            result[f'OccScore_{variant}'] = 0.9 * result['OccScore_RayIoU'] + 0.1 * np.maximum(1 - error, 0.0)
    return result


def _over_thresholds(name, values, thresholds):
    means = mean(values)
    result = {name: mean(means)}
    result.update((f'{name}@{at:g}', means[..., position]) for position, at in enumerate(thresholds))
    return result


def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean without NaN; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # mean of an empty slice
        return np.nanmean(values, axis=axis)


def resample(scenes: Sequence[Tallies]) -> Tallies:
    """Tallies of data sets of as many scenes drawn with replacement, leading shape [RESAMPLES].

    The draws depend on the number of scenes alone: two models scored on the same scenes, given in
    the same order, are resampled alike (a paired bootstrap).
    """
    drawn = np.random.default_rng(_SEED).multinomial(len(scenes), [1 / len(scenes)] * len(scenes), size=RESAMPLES)
    return {
        name: np.tensordot(drawn.astype(np.float64), np.stack([one[name] for one in scenes]).astype(np.float64), axes=1)
        for name in scenes[0]
    }


def interval(values: np.ndarray) -> Optional[Tuple[float, float]]:
    """Bounds of the middle 95 % of resampled scores [resamples]; None where none is a number."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
