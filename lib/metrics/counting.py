"""From the volumes of samples to the numbers that all scores come from, on the CPU and, many samples at once, on CUDA.

S samples; X, Y, Z the task's grid; O origins; M rays; C classes without free; T thresholds; G regions of the ground
plan.

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
from ..raycast import cast_rays, to_numpy, trace
from ..task import Task
from .counts import CLASS_BITS, FLOW_THRESHOLDS, LEVEL_BITS, FlowCounts, Regions
from .origins import lidar_rays

MATCH_THRESHOLD = 2.0  # metres between true and predicted end of a true positive
UNKNOWN_FLOW = 255.0


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
        """``rays`` and ``segments`` of one sample's :class:`lib.metrics.counts.Counts`."""
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
    """``rays`` of one sample's :class:`lib.metrics.counts.Counts`, in one region, from the ends of rays alone.

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
    """``voxels`` of one sample's :class:`lib.metrics.counts.Counts`.

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
