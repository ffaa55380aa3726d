"""What of samples is counted, and the scores that come of it, with how sure they are.

Counts are by class, and by region of the ground plan. They are first summed to tallies, arrays that add up over scenes;
scores are computed from tallies of any leading shape, so that those of many resampled data sets are computed together.

X, Y the task's grid; C classes without free; T thresholds; G regions of the ground plan (distance rings x camera
sectors), P parts that it is told apart by.
"""

import warnings
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..prediction import MAX_INSTANCE_ID
from ..task import Task

ID_BITS = MAX_INSTANCE_ID.bit_length()
CLASS_BITS, REGION_BITS, LEVEL_BITS = 7, 5, 4  # of the key of a group of rays; with two ids 55, of 63 that there are
MIN_SEGMENT_RAYS = 10  # smaller segments are no misses and no false alarms
EXACT = 2.0**53  # IoUs above one half are whole multiples of 1 / EXACT
HALF_BITS = 27  # of such a multiple that are summed apart, so that sums fit 64 bits
MATCHED, IOU_HIGH, IOU_LOW, MISSED, FALSE_ALARMS = range(5)  # columns of the counts of segments
FLOW_THRESHOLDS = (1.0, 2.0, 4.0)  # metres
RING_EDGES = (10.0, 20.0, 40.0)  # metres from the ego origin, in the ground plan
CAMERA_AZIMUTHS = {  # degrees from x (forward) to y (left) that nuScenes' cameras look along
    'CAM_FRONT': 0,
    'CAM_FRONT_LEFT': 55,
    'CAM_BACK_LEFT': 110,
    'CAM_BACK': 180,
    'CAM_BACK_RIGHT': 250,
    'CAM_FRONT_RIGHT': 305,
}
Tallies = Dict[str, np.ndarray]
RESAMPLES = 1000
CONFIDENCE = 0.95
VARIANTS = ('true_positives', 'all_rays')  # of the velocity error, see lib.metrics.counting
_SEED = 0


class FlowCounts(NamedTuple):
    """What samples contribute to the score of occupancy and flow (``lib.metrics.counting``).

    Attributes:
        rays: int64 [C, C + 1, T + 1], rays with a true class by true class, predicted class and thresholds kept.
        error: float64 [2, C], m/s, sum of velocity errors, over true positives and over all rays; 0 for classes that
            do not move.
        counted: int64 [2, C], rays that the sum is over.
    """

    rays: np.ndarray
    error: np.ndarray
    counted: np.ndarray


class Counts(NamedTuple):
    """What one sample, or many together, contribute to the scores; None where a metric was not asked for.

    Attributes:
        samples: how many.
        occupied: samples with a voxel predicted as something other than free.
        rays: int64 [G, C, C + 1, T + 1], rays with a true class by region, true class, predicted class and number of
            thresholds that the depth error is below.
        segments: int64 [P, T, C, 5] (see ``kernels.count_segments``); part 0 is everything, then rings, then sectors.
        voxels: int64 [G, C + 1, C + 1], voxels by region, true and predicted class.
        flow: of occupancy and flow.
    """

    samples: int
    occupied: int
    rays: Optional[np.ndarray]
    segments: Optional[np.ndarray]
    voxels: Optional[np.ndarray]
    flow: Optional[FlowCounts] = None


def add_counts(one: Counts, other: Counts) -> Counts:
    """Sum of two counts of the same metrics."""
    rays, segments, voxels = (None if a is None else a + b for a, b in zip(one[2:5], other[2:5]))
    flow = (
        None if one.flow is None or other.flow is None else FlowCounts(*(a + b for a, b in zip(one.flow, other.flow)))
    )
    return Counts(one.samples + other.samples, one.occupied + other.occupied, rays, segments, voxels, flow)


class Regions(NamedTuple):
    """Parts of the ground plan.

    Attributes:
        rings, sectors: their names; G = rings x sectors, sectors running faster.
        of_column: uint8 [X * Y], region of each column of voxels.
    """

    rings: Tuple[str, ...]
    sectors: Tuple[str, ...]
    of_column: np.ndarray

    @property
    def parts(self) -> List[Tuple[str, str]]:
        """(kind, name) of everything, then of each of several ``rings`` and ``sectors``."""
        several = [
            (kind, names) for kind, names in (('rings', self.rings), ('sectors', self.sectors)) if len(names) > 1
        ]
        return [('', 'all')] + [(kind, name) for kind, names in several for name in names]

    @property
    def members(self) -> np.ndarray:
        """bool [P, G]: which regions each part is made of."""
        of_region = [(ring, sector) for ring in self.rings for sector in self.sectors]
        return np.array([[not kind or name in pair for pair in of_region] for kind, name in self.parts])


def whole_plan(task: Task) -> Regions:
    """One region that is everything."""
    return Regions(('all',), ('all',), np.zeros(task.grid_shape[0] * task.grid_shape[1], dtype=np.uint8))


def rings_and_sectors(task: Task) -> Regions:
    """Distance rings around the ego origin, and the sectors nearest to the directions of the task's cameras.

    Where the direction of a camera is not known there is one sector.
    """
    x, y = (
        task.point_cloud_range[axis] + (np.arange(task.grid_shape[axis]) + 0.5) * task.voxel_size for axis in (0, 1)
    )
    x, y = np.meshgrid(x, y, indexing='ij')
    ring = np.digitize(np.hypot(x, y), RING_EDGES)
    sectors = task.cameras if set(task.cameras) <= set(CAMERA_AZIMUTHS) else ('all',)
    azimuth = np.degrees(np.arctan2(y, x))[..., None]
    apart = np.abs((azimuth - [CAMERA_AZIMUTHS.get(name, 0) for name in sectors] + 180) % 360 - 180)
    sector = apart.argmin(axis=-1)
    edges = ('0',) + tuple(f'{edge:g}' for edge in RING_EDGES)
    rings = tuple(f'{low}-{high} m' for low, high in zip(edges, edges[1:])) + (f'over {edges[-1]} m',)
    return Regions(rings, sectors, (ring * len(sectors) + sector).astype(np.uint8).reshape(-1))


# -- from counts to scores


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
