"""From the volumes of samples to the counts that all scores come from, on the CPU and, many samples at once, on CUDA.

What is counted by class, and by region of the ground plan; how a ray's group is numbered; and counting itself.

S samples; X, Y, Z the task's grid; O origins; M rays; C classes without free; T thresholds; G regions of the ground
plan (distance rings x camera sectors), P parts that it is told apart by.

Occupancy and flow is the score of the CVPR 2024 Occupancy and Flow challenge (OpenOcc v2): Occ Score = 0.9 RayIoU +
0.1 max(1 - mAVE, 0), where mAVE is the error of the velocities that rays meet, averaged over the movable classes (the
things of the label set). Two ways of averaging are in use, and both are given:

* ``true_positives``, as the challenge defines it: over the rays that are true positives of the class (2 m);
* ``all_rays``, as the challenge's stand-alone tool counts: over all rays with a true class, of every sample that has
  a true positive of the class.

Its rays are kept as a submission stores them, distances and velocities in half precision, so that a submission and
the volumes that it was made from have equal scores: N rays = origins * 14,040, origin by origin. Velocities are m/s
along x and y of the ego frame; true ones of +-255 are to be ignored.
"""

from dataclasses import dataclass
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..classes import LabelSet
from ..errors import ConfigError, DataError
from ..prediction import MAX_INSTANCE_ID
from ..raycast import cast_rays, to_numpy, trace
from ..task import Task
from .origins import lidar_rays

ID_BITS = MAX_INSTANCE_ID.bit_length()
CLASS_BITS, REGION_BITS, LEVEL_BITS = 7, 5, 4  # of the key of a group of rays; with two ids 55, of 63 that there are
MIN_SEGMENT_RAYS = 10  # smaller segments are no misses and no false alarms
EXACT = 2.0**53  # IoUs above one half are whole multiples of 1 / EXACT
HALF_BITS = 27  # of such a multiple that are summed apart, so that sums fit 64 bits
MATCHED, IOU_HIGH, IOU_LOW, MISSED, FALSE_ALARMS = range(5)  # columns of the counts of segments
FLOW_THRESHOLDS = (1.0, 2.0, 4.0)  # metres
MATCH_THRESHOLD = 2.0  # metres between true and predicted end of a true positive
UNKNOWN_FLOW = 255.0
RING_EDGES = (10.0, 20.0, 40.0)  # metres from the ego origin, in the ground plan
CAMERA_AZIMUTHS = {  # degrees from x (forward) to y (left) that nuScenes' cameras look along
    'CAM_FRONT': 0,
    'CAM_FRONT_LEFT': 55,
    'CAM_BACK_LEFT': 110,
    'CAM_BACK': 180,
    'CAM_BACK_RIGHT': 250,
    'CAM_FRONT_RIGHT': 305,
}


class FlowCounts(NamedTuple):
    """What samples contribute to the score of occupancy and flow.

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


@dataclass(frozen=True)
class Volumes:
    """A sample's checked volumes, truth first; what needs no rays is None.

    Attributes:
        semantics: uint8 [X, Y, Z] each. instances: uint16 [X, Y, Z] each, or None.
        origins: float64 [O, 3], metres.
    """

    semantics: Tuple[np.ndarray, np.ndarray]
    instances: Optional[Tuple[np.ndarray, np.ndarray]]
    origins: np.ndarray


class RayCounter:
    """Counts rays, and segments of rays, of samples.

    Args:
        task: grid and classes.
        thresholds: tolerances of depth, metres, ascending.
        regions: parts of the ground plan that are told apart.
        rays, segments: what to count.
    """

    def __init__(self, task: Task, thresholds: Sequence[float], regions: Regions, rays: bool, segments: bool):
        labels = task.label_set
        if labels.num_classes > 1 << CLASS_BITS or len(thresholds) >= 1 << LEVEL_BITS:
            raise ConfigError(
                f'rays are counted for at most {1 << CLASS_BITS} classes and {(1 << LEVEL_BITS) - 1} thresholds, got '
                f'{labels.num_classes} and {len(thresholds)}'
            )
        self._task, self._free = task, labels.free_id
        self._thresholds = np.asarray(thresholds, dtype=np.float32)
        self._regions, self._members = regions, regions.members
        self._rays, self._segments = rays, segments
        self._is_thing = np.isin(np.arange(labels.num_occupied), labels.thing_ids)

    def on_cpu(self, volumes: Volumes, threads: Optional[int] = None) -> Tuple[Any, Any]:
        """``rays`` and ``segments`` of one sample's :class:`Counts`."""
        from .kernels import count_rays, group_rays

        task = self._task
        ends = trace(
            volumes.semantics,
            volumes.origins,
            lidar_rays(),
            task.point_cloud_range,
            task.voxel_size,
            self._free,
            threads,
        )
        labels = [volume.reshape(-1) for volume in volumes.semantics]
        where = (*ends, self._regions.of_column, self._thresholds)
        rays = segments = None
        if self._rays:
            rays = self._no_rays()
            count_rays(*labels, *where, rays)
        if self._segments:
            ids = [volume.reshape(-1) for volume in volumes.instances]
            segments = self._match(*group_rays(*labels, *ids, *where, self._free))
        return rays, segments

    def on_cuda(self, samples: Sequence[Volumes], device) -> List[Tuple[Any, Any]]:
        """The same of each of several samples, which the device works on together."""
        from . import cuda

        task = self._task
        ends = cuda.trace(samples, lidar_rays(), task, device)
        levels = cuda.levels(ends, self._thresholds)
        regions = cuda.regions(ends, self._regions.of_column, task.grid_shape[2])
        rays = segments = [None] * len(samples)
        if self._rays:
            rays = cuda.count_rays(ends, levels, regions, self._no_rays().shape)
        if self._segments:
            groups = cuda.group_rays(ends, levels, regions, [sample.instances for sample in samples], self._free)
            segments = [self._match(*group) for group in groups]
        return list(zip(rays, segments))

    def _no_rays(self):
        return np.zeros((self._members.shape[1], self._free, self._free + 1, len(self._thresholds) + 1), dtype=np.int64)

    def _match(self, keys, rays):
        from .kernels import count_segments

        counts = np.zeros((len(self._members), len(self._thresholds), self._free, 5), dtype=np.int64)
        count_segments(keys, rays, self._is_thing, self._members, counts)
        return counts


def count_ends(truth, prediction, distance, num_occupied: int, thresholds: Sequence[float]) -> np.ndarray:
    """``rays`` of one sample's :class:`Counts`, in one region, from the ends of rays alone.

    Args:
        truth, prediction: uint8 [M], labels that the rays end in.
        distance: float32 [2, M], metres, to the true and the predicted end.
        num_occupied: C.
        thresholds: metres, ascending.
    """
    from .kernels import count_rays

    counts = np.zeros((1, num_occupied, num_occupied + 1, len(thresholds) + 1), dtype=np.int64)
    each = np.tile(np.arange(len(truth), dtype=np.int32), (2, 1))  # as if every ray ended in a voxel of its own
    one_region = np.zeros(len(truth), dtype=np.uint8)
    count_rays(truth, prediction, each, distance, one_region, np.asarray(thresholds, dtype=np.float32), counts)
    return counts


def count_voxels(truth, prediction, mask: Optional[np.ndarray], regions: Regions, num_classes: int) -> np.ndarray:
    """``voxels`` of one sample's :class:`Counts`.

    Args:
        truth, prediction: uint8 [X, Y, Z]. Truth beyond the classes (255) is ignored.
        mask: bool [X, Y, Z], voxels to count; None counts all.
        num_classes: with free.
    """
    from .kernels import count_voxels as kernel

    counts = np.zeros((len(regions.rings) * len(regions.sectors), num_classes, num_classes), dtype=np.int64)
    mask = np.empty(0, dtype=bool) if mask is None else mask.reshape(-1)
    kernel(truth.reshape(-1), prediction.reshape(-1), mask, regions.of_column, counts)
    return counts


class FlowRays(NamedTuple):
    """Where the rays of one sample end.

    Attributes:
        label: uint8 [N], class of the voxel that the ray ends in, free where it meets nothing.
        distance_m: float16 [N], metres to where it leaves that voxel.
        flow: float16 [N, 2], velocity of that voxel.
    """

    label: np.ndarray
    distance_m: np.ndarray
    flow: np.ndarray


def cast_flow(semantics, flow, origins, task: Task, device='cpu') -> FlowRays:
    """Rays of a sample through dense volumes, as a submission stores them.

    Args:
        semantics: class ids [X, Y, Z], integer 0..255.
        flow: [X, Y, Z, 2], m/s, ego axes.
        origins: [O, 3], metres, ego frame; taken in single precision, as the challenge's tool does.
        task: range, voxel size and free class.
        device: where rays are cast.
    """
    hits = cast_rays(
        semantics,
        np.asarray(origins, dtype=np.float32).astype(np.float64),
        lidar_rays(),
        task.point_cloud_range,
        task.voxel_size,
        task.label_set.free_id,
        device=device,
    )
    label, distance, voxel = (to_numpy(array) for array in (hits.label, hits.distance_m, hits.voxel))
    velocity = np.asarray(flow).reshape(-1, 2)[voxel]
    return FlowRays(label.astype(np.uint8), distance.astype(np.float16), velocity.astype(np.float16))


def count_flow(truth: FlowRays, prediction: FlowRays, label_set: LabelSet) -> FlowCounts:
    """Counts of one sample, from the ends of the same rays.

    Raises:
        DataError: truth and prediction have different numbers of rays.
    """
    if len(truth.label) != len(prediction.label):
        raise DataError(
            f'the prediction has {len(prediction.label)} rays, the truth {len(truth.label)}; cast both from the same '
            'origins'
        )
    # Half-precision values are compared in single precision, as the challenge's tool does.
    distance = np.stack([truth.distance_m, prediction.distance_m]).astype(np.float32)
    counts = count_ends(truth.label, prediction.label, distance, label_set.num_occupied, FLOW_THRESHOLDS)
    near = np.abs(distance[0] - distance[1]) < np.float32(MATCH_THRESHOLD)
    matched = near & (truth.label == prediction.label)
    true_flow = truth.flow.astype(np.float32)
    known = (truth.label < label_set.free_id) & np.all(np.abs(true_flow) < UNKNOWN_FLOW, axis=1)
    errors = np.linalg.norm(prediction.flow.astype(np.float32) - true_flow, axis=1)
    error, counted = np.zeros((2, label_set.num_occupied)), np.zeros((2, label_set.num_occupied), dtype=np.int64)
    of_all, number = np.sum(errors[known]), np.count_nonzero(known)
    for moving in label_set.thing_ids:
        of_class = matched & (truth.label == moving)
        if of_class.any():
            found = of_class & known
            error[:, moving] = np.sum(errors[found], dtype=np.float64), of_all
            counted[:, moving] = np.count_nonzero(found), number
    return FlowCounts(counts[0], error, counted)
