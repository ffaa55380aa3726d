"""Scores of an evaluation, as numbers for a JSON file and as a table to read."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

import numpy as np

_ONLY_FREE = (
    '!!! EVERY PREDICTION IS FREE EVERYWHERE: the model predicts nothing at all. Check that the '
    'weights are those of this model and that the images are not empty. !!!'
)


def _no_scores():
    return np.empty((0, 0))


@dataclass(frozen=True)
class EvalResult:
    """Scores over a data set, as fractions of 1. C classes without free, T thresholds.

    A score is NaN where its class does not occur.

    Attributes:
        num_samples: samples scored.
        class_names: C names.
        thresholds: T tolerances of depth, metres.
        only_free: no sample has a voxel predicted as something other than free.
        ray_iou, ray_pq: float64 [T, C]; empty if not asked for.
        voxel_iou: float64 [C]; empty if not asked for.
        camera_mask: ``voxel_iou`` counts only voxels the cameras see.
    """

    num_samples: int
    class_names: Tuple[str, ...]
    thresholds: Tuple[float, ...]
    only_free: bool
    ray_iou: np.ndarray = field(default_factory=_no_scores)
    ray_pq: np.ndarray = field(default_factory=_no_scores)
    voxel_iou: np.ndarray = field(default_factory=lambda: np.empty(0))
    camera_mask: bool = False

    def as_dict(self) -> Dict[str, Any]:
        """Plain numbers, ready for JSON (None for NaN).

        Keys: ``num_samples``, ``only_free``, then as far as asked for ``RayIoU``, ``RayIoU@1`` ... (one per
        threshold), ``RayPQ``, ``RayPQ@1`` ..., ``mIoU``; ``per_class`` holds the same for every class, with
        ``IoU`` for ``mIoU``.
        """
        totals = {name: _number(value) for name, value in self._totals().items()}
        if len(self.voxel_iou):
            totals['mIoU_voxels'] = 'mask_camera' if self.camera_mask else 'all'
        per_class = {
            label: {name: _number(column[position]) for name, column in self._columns().items()}
            for position, label in enumerate(self.class_names)
        }
        return dict(num_samples=self.num_samples, only_free=self.only_free, **totals, per_class=per_class)

    def as_table(self) -> str:
        """Text table in percent: one row per class, means last."""
        columns, totals = self._columns(), self._totals()
        names = list(columns)
        width = max(len(name) for name in self.class_names + ('mean',))
        rows = [[''] + names]
        rows += [
            [label] + [_percent(columns[name][position]) for name in names]
            for position, label in enumerate(self.class_names)
        ]
        rows += [['mean'] + [_percent(totals['mIoU' if name == 'IoU' else name]) for name in names]]
        lines = [row[0].ljust(width) + ''.join(cell.rjust(10) for cell in row[1:]) for row in rows]
        rule = '-' * len(lines[0])
        notes = [f'{self.num_samples} samples, percent; - : class not there']
        if len(self.voxel_iou) and not self.camera_mask:
            notes.append('IoU over all voxels: labels have no mask_camera')
        table = [lines[0], rule] + lines[1:-1] + [rule, lines[-1]] + notes
        return '\n'.join([_ONLY_FREE] * self.only_free + table)

    def _columns(self):
        """{column: scores [C]}."""
        columns = {}
        for name, scores in (('RayIoU', self.ray_iou), ('RayPQ', self.ray_pq)):
            if len(scores):
                columns[name] = _mean(scores, axis=0)
                columns.update((f'{name}@{at:g}', row) for at, row in zip(self.thresholds, scores))
        if len(self.voxel_iou):
            columns['IoU'] = self.voxel_iou
        return columns

    def _totals(self):
        """{score: mean over classes}; RayIoU and RayPQ are means over thresholds of those."""
        totals = {}
        for name, scores in (('RayIoU', self.ray_iou), ('RayPQ', self.ray_pq)):
            if len(scores):
                means = _mean(scores, axis=1)
                totals[name] = _mean(means, axis=0)
                totals.update((f'{name}@{at:g}', mean) for at, mean in zip(self.thresholds, means))
        if len(self.voxel_iou):
            totals['mIoU'] = _mean(self.voxel_iou, axis=0)
        return totals


def _mean(values, axis):
    """Mean without NaN; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # mean of an empty slice
        return np.nanmean(values, axis=axis)


def _number(value):
    return None if np.isnan(value) else float(value)


def _percent(value):
    return '-' if np.isnan(value) else f'{100 * value:.2f}'
