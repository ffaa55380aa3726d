"""Occupancy and flow: the score of the CVPR 2024 Occupancy and Flow challenge (OpenOcc v2).

Occ Score = 0.9 RayIoU + 0.1 max(1 - mAVE, 0), where mAVE is the error of the velocities that rays meet, averaged over
the movable classes (the things of the label set). Two ways of averaging are in use, and both are given:

* ``true_positives``, as the challenge defines it: over the rays that are true positives of the class (2 m);
* ``all_rays``, as the challenge's stand-alone tool counts: over all rays with a true class, of every sample that has
  a true positive of the class.

Rays are kept as a submission stores them, distances and velocities in half precision, so that a submission and the
volumes that it was made from have equal scores. N rays = origins * 14,040, origin by origin; C classes without free;
T thresholds (1, 2 and 4 m). Velocities are m/s along x and y of the ego frame; true ones of +-255 are to be ignored.
"""

from typing import NamedTuple

import numpy as np

from ..classes import LabelSet
from ..errors import DataError
from ..raycast import cast_rays
from ..task import Task
from .counting import FlowCounts, count_ends
from .rays import lidar_rays
from .scores import FLOW_THRESHOLDS

MATCH_THRESHOLD = 2.0  # metres between true and predicted end of a true positive
UNKNOWN_FLOW = 255.0


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
    label, distance, voxel = (_to_numpy(array) for array in (hits.label, hits.distance_m, hits.voxel))
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


def _to_numpy(array):
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
