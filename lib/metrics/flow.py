"""Occupancy and flow: the score of the CVPR 2024 Occupancy and Flow challenge (OpenOcc v2).

Occ Score = 0.9 RayIoU + 0.1 max(1 - mAVE, 0), where mAVE is the error of the velocities that rays meet, averaged over
the movable classes (the things of the label set). Two ways of averaging are in use, and both are given:

* ``true_positives``, as the challenge defines it: over the rays that are true positives of the class (2 m);
* ``all_rays``, as the challenge's stand-alone tool counts: over all rays with a true class, of every sample that has
  a true positive of the class.

Rays are kept as a submission stores them, distances and velocities in half precision, so that a submission and the
volumes that it was made from have equal scores. N rays = origins * 14,040, origin by origin; C classes without free;
T thresholds. Velocities are m/s along x and y of the ego frame; true ones of +-255 are to be ignored.
"""

from dataclasses import dataclass
from typing import Any, Dict, NamedTuple, Sequence, Tuple

import numpy as np

from ..classes import LabelSet
from ..errors import DataError
from ..raycast import cast_rays
from ..task import Task
from .counting import Counts, count_ends
from .rays import lidar_rays
from .scores import class_scores, tallies

VARIANTS = ('true_positives', 'all_rays')
THRESHOLDS = (1.0, 2.0, 4.0)
FLOW_THRESHOLD = 2.0  # metres between true and predicted end of a true positive
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


class FlowCounts(NamedTuple):
    """What a sample contributes to the score; sums of these are those of many samples.

    Attributes:
        rays: int64 [1, C, C + 1, T + 1], counts of RayIoU (see ``counting.Counts``).
        error: float64 [2, C], sum of velocity errors, by variant; 0 for classes that do not move.
        counted: int64 [2, C], rays that the sum is over.
    """

    rays: np.ndarray
    error: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class OccScore:
    """The challenge's score.

    Attributes:
        num_samples: samples scored.
        class_names: C names.
        ray_iou: float64 [T, C], NaN for a class neither there nor predicted.
        velocity_error: float64 [2, C], m/s by variant; NaN for a class that does not move or has no ray to count.
    """

    num_samples: int
    class_names: Tuple[str, ...]
    ray_iou: np.ndarray
    velocity_error: np.ndarray

    def totals(self) -> Dict[str, float]:
        """``RayIoU``, ``RayIoU@1`` ..., and of each variant ``mAVE_<variant>`` and ``OccScore_<variant>``."""
        by_threshold = [_mean(row) for row in self.ray_iou]
        totals = {'RayIoU': _mean(by_threshold)}
        totals.update((f'RayIoU@{at:g}', mean) for at, mean in zip(THRESHOLDS, by_threshold))
        for variant, errors in zip(VARIANTS, self.velocity_error):
            totals[f'mAVE_{variant}'] = _mean(errors)
            totals[f'OccScore_{variant}'] = 0.9 * totals['RayIoU'] + 0.1 * float(np.maximum(1 - _mean(errors), 0.0))
        return totals

    def as_dict(self) -> Dict[str, Any]:
        """Plain numbers, ready for JSON (None for NaN): the totals, ``num_samples``, and ``per_class``."""
        per_class = {}
        for position, name in enumerate(self.class_names):
            scores = {f'RayIoU@{at:g}': row[position] for at, row in zip(THRESHOLDS, self.ray_iou)}
            scores.update((f'AVE_{variant}', row[position]) for variant, row in zip(VARIANTS, self.velocity_error))
            per_class[name] = {key: _plain(value) for key, value in scores.items()}
        totals = {key: _plain(value) for key, value in self.totals().items()}
        return dict(totals, num_samples=self.num_samples, per_class=per_class)

    def as_table(self) -> str:
        """Text table: RayIoU in percent and velocity errors in m/s, a row per class, means and scores last."""
        totals = self.totals()
        columns = [f'RayIoU@{at:g}' for at in THRESHOLDS] + ['AVE, TP', 'AVE, all']
        rows = [[''] + columns]
        for position, name in enumerate(self.class_names):
            rays = [_text(row[position], 100) for row in self.ray_iou]
            rows.append([name] + rays + [_text(row[position], 1) for row in self.velocity_error])
        means = [_text(totals[f'RayIoU@{at:g}'], 100) for at in THRESHOLDS]
        rows.append(['mean'] + means + [_text(totals[f'mAVE_{variant}'], 1) for variant in VARIANTS])
        width = max(len(row[0]) for row in rows)
        lines = [row[0].ljust(width) + ''.join(cell.rjust(11) for cell in row[1:]) for row in rows]
        rule = '-' * len(lines[0])
        scores = [f'RayIoU {_text(totals["RayIoU"], 100)}']
        for variant in VARIANTS:
            of = variant.replace('_', ' ')
            scores.append(f'Occ Score {_text(totals[f"OccScore_{variant}"], 100)} (velocity errors of {of})')
        notes = [f'{self.num_samples} samples; RayIoU and Occ Score in percent, AVE in m/s; - : not there']
        return '\n'.join([lines[0], rule] + lines[1:-1] + [rule, lines[-1]] + scores + notes)


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
    counts = count_ends(truth.label, prediction.label, distance, label_set.num_occupied, THRESHOLDS)
    near = np.abs(distance[0] - distance[1]) < np.float32(FLOW_THRESHOLD)
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
    return FlowCounts(counts, error, counted)


def occ_score(counts: Sequence[FlowCounts], label_set: LabelSet) -> OccScore:
    """Score of all samples.

    Raises:
        DataError: no samples.
    """
    if not counts:
        raise DataError('there is nothing to score: no samples were evaluated; check the data set and the predictions')
    error, counted = (sum(getattr(part, name) for part in counts) for name in ('error', 'counted'))
    velocity_error = np.divide(error, counted, out=np.full(error.shape, np.nan), where=counted > 0)
    rays = Counts(len(counts), 0, sum(part.rays for part in counts), None, None)
    return OccScore(len(counts), label_set.occupied_names, class_scores(tallies(rays)).ray_iou, velocity_error)


def _to_numpy(array):
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _mean(values) -> float:
    """Mean without NaN; NaN where there is nothing else."""
    values = np.asarray(values)
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else float('nan')


def _plain(value):
    return None if np.isnan(value) else float(value)


def _text(value, factor):
    return '-' if np.isnan(value) else f'{factor * value:.2f}'
