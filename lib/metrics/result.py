"""Scores of an evaluation, as numbers for a JSON file and as a table to read."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from ..io import PathLike, atomic_write, write_json
from .counts import (
    VARIANTS,
    ClassScores,
    Counts,
    Regions,
    Tallies,
    class_scores,
    interval,
    mean,
    resample,
    tallies,
    totals,
)

_ONLY_FREE = (
    '!!! EVERY PREDICTION IS FREE EVERYWHERE: the model predicts nothing at all. Check that the '
    'weights are those of this model and that the images are not empty. !!!'
)
MASKS = {  # what mIoU counts: the name on the command line, and in results
    'camera': 'mask_camera',
    'lidar': 'mask_lidar',
    'both': 'mask_camera and mask_lidar',
    'none': 'all',
}


_TOTAL_OF = {'IoU': 'mIoU', **{f'AVE_{variant}': f'mAVE_{variant}' for variant in VARIANTS}}  # of columns


class Scene(NamedTuple):
    """One scene's part of an evaluation."""

    samples: int
    tallies: Tallies


@dataclass(frozen=True)
class EvalResult:
    """Scores over a data set, as fractions of 1. C classes without free, T thresholds.

    A score is NaN where its class does not occur.

    Attributes:
        class_names: C names. thing_ids: classes counted one by one.
        thresholds: T tolerances of depth, metres.
        mask: which voxels mIoU counts, a key of ``MASKS``; None if it was not asked for.
        counts: of all samples.
        regions: parts of the ground plan that were told apart.
        scenes: by name, where samples named theirs.
        night: scenes by night, and those by day, as far as known.
        samples: (token, scene, totals) of every sample, if they were kept.
    """

    class_names: Tuple[str, ...]
    thing_ids: Tuple[int, ...]
    thresholds: Tuple[float, ...]
    mask: Optional[str]
    counts: Counts
    regions: Regions
    scenes: Mapping[str, Scene] = field(default_factory=dict)
    night: Mapping[str, bool] = field(default_factory=dict)
    samples: Tuple[Tuple[str, str, Dict[str, float]], ...] = ()

    @property
    def num_samples(self) -> int:
        return self.counts.samples

    @property
    def only_free(self) -> bool:
        """No sample has a voxel predicted as something other than free."""
        return not self.counts.occupied

    @property
    def class_scores(self) -> ClassScores:
        """Scores of every class over all samples."""
        return class_scores(tallies(self.counts))

    @property
    def totals(self) -> Dict[str, float]:
        """Means over classes, by name; ``RayIoU`` and ``RayPQ`` also over thresholds."""
        return self._totals(tallies(self.counts))

    def intervals(self) -> Dict[str, Tuple[float, float]]:
        """95 % intervals of the totals by a bootstrap over scenes; empty with fewer than two scenes."""
        if len(self.scenes) < 2:
            return {}
        resampled = totals(resample([self.scenes[name].tallies for name in sorted(self.scenes)]), *self._how)
        bounds = {name: interval(values) for name, values in resampled.items()}
        return {name: pair for name, pair in bounds.items() if pair is not None}

    def groups(self) -> Dict[str, Dict[str, Dict[str, float]]]:
        """Totals by ``rings``, ``sectors``, ``conditions`` (day, night) and ``scenes``, as far as told apart."""
        found = {}
        for name, parts in self._parts().items():
            found[name] = {part: self._totals(sums) for part, sums in parts.items()}
        return found

    def as_dict(self, details: bool = False) -> Dict[str, Any]:
        """Plain numbers, ready for JSON (None for NaN).

        Keys: ``num_samples``, ``only_free``, then as far as asked for ``RayIoU``, ``RayIoU@1`` ... (one per
        threshold), ``RayPQ``, ``RayPQ@1`` ..., ``RaySQ``, ``RayRQ``, ``RayPQ_things``, ``RayPQ_stuff``, ``mIoU`` with
        ``mIoU_voxels`` (the mask that it counts), ``binary_IoU``, ``OccScore_...`` and ``mAVE_...`` (m/s);
        ``intervals`` has [low, high] of these; ``per_class`` the same for every class, with ``IoU`` for ``mIoU`` and
        ``AVE`` for ``mAVE``.

        Args:
            details: also ``rings``, ``sectors``, ``conditions``, ``scenes``, the totals of parts; ``confusion``, rays
                and voxels by true (row) and predicted (column) class; and what a comparison of models needs:
                ``thresholds``, ``things`` and, by scene, ``tallies``.
        """
        result: Dict[str, Any] = dict(num_samples=self.num_samples, only_free=self.only_free)
        result.update(_numbers(self.totals))
        if self.mask is not None:
            result['mIoU_voxels'] = MASKS[self.mask]
        result['intervals'] = {name: list(pair) for name, pair in self.intervals().items()}
        columns = self.columns()
        result['per_class'] = {
            label: _numbers({name: column[position] for name, column in columns.items()})
            for position, label in enumerate(self.class_names)
        }
        return dict(result, **self._details()) if details else result

    def _details(self):
        result: Dict[str, Any] = dict(thresholds=list(self.thresholds), confusion=self._confusion())
        result['things'] = [self.class_names[label] for label in self.thing_ids]
        for name, parts in self.groups().items():
            result[name] = {part: _numbers(values) for part, values in parts.items()}
        result['tallies'] = {
            name: dict(samples=scene.samples, **{key: value.tolist() for key, value in scene.tallies.items()})
            for name, scene in sorted(self.scenes.items())
        }
        return result

    def as_table(self) -> str:
        """Text table, scores in percent and velocity errors in m/s: a row per class, means and intervals last."""
        columns, sums, bounds = self.columns(), self.totals, self.intervals()
        rows = [
            [label] + [text_of(name, columns[name][at]) for name in columns]
            for at, label in enumerate(self.class_names)
        ]
        last = [['mean'] + [text_of(name, sums[_TOTAL_OF.get(name, name)]) for name in columns]]
        for which, label in enumerate(('95 % from', '95 % to')):
            ends = [bounds.get(_TOTAL_OF.get(name, name), (np.nan, np.nan))[which] for name in columns]
            last += [[label] + [text_of(name, end) for name, end in zip(columns, ends)]] if bounds else []
        lines = text_table([[''] + list(columns)], rows, last)
        return '\n'.join([_ONLY_FREE] * self.only_free + lines + self._notes(sums))

    def groups_table(self) -> str:
        """Text tables of the totals by ring, sector and condition, as far as told apart."""
        lines: List[str] = []
        for kind, parts in self.groups().items():
            names = [name for name in next(iter(parts.values())) if '@' not in name]
            if kind != 'scenes' and names:
                rows = [[part] + [text_of(name, values[name]) for name in names] for part, values in parts.items()]
                lines += ['', *text_table([[kind] + names], rows)]
        return '\n'.join(lines)

    def write_csv(self, path: PathLike) -> None:
        """Write all scores, one a line: part, name, score, value (fraction of 1 or m/s), and its 95 % interval."""
        bounds, plain = self.intervals(), self.as_dict()
        rows: List[List[Any]] = [['part', 'name', 'score', 'value', 'low', 'high']]
        rows += [['total', '', name, value, *bounds.get(name, ('', ''))] for name, value in self.totals.items()]
        for label, values in plain['per_class'].items():
            rows += [['class', label, name, value, '', ''] for name, value in values.items()]
        for kind, parts in self.groups().items():
            for part, values in parts.items():
                rows += [[kind, part, name, value, '', ''] for name, value in values.items()]
        _write_rows(path, rows)

    def write_samples(self, path: PathLike) -> None:
        """Write the totals of every sample that was kept, as ``.json``, or else as CSV."""
        if Path(path).suffix == '.json':
            write_json(path, [dict(token=one[0], scene=one[1], **_numbers(one[2])) for one in self.samples])
            return
        names = list(self.samples[0][2]) if self.samples else []
        rows = [[token, scene] + [values[name] for name in names] for token, scene, values in self.samples]
        _write_rows(path, [['token', 'scene'] + names] + rows)

    def columns(self) -> Dict[str, np.ndarray]:
        """{column of a table: scores [C]}; RayIoU and RayPQ are means over thresholds, then come those of each."""
        scores, columns = self.class_scores, {}
        for name, values in (('RayIoU', scores.ray_iou), ('RayPQ', scores.ray_pq)):
            if values is not None:
                columns[name] = mean(values, axis=0)
                columns.update((f'{name}@{at:g}', row) for at, row in zip(self.thresholds, values))
        if scores.voxel_iou is not None:
            columns['IoU'] = scores.voxel_iou
        if scores.flow_iou is not None and scores.velocity_error is not None:
            columns['OccScore_RayIoU'] = mean(scores.flow_iou, axis=0)
            columns.update((f'AVE_{variant}', row) for variant, row in zip(VARIANTS, scores.velocity_error))
        return columns

    @property
    def _how(self):
        return self.thresholds, self.thing_ids

    def _totals(self, sums):
        return {name: float(value) for name, value in totals(sums, *self._how).items()}

    def _parts(self) -> Dict[str, Dict[str, Tallies]]:
        parts: Dict[str, Dict[str, Tallies]] = {}
        for part, ((kind, name), members) in enumerate(zip(self.regions.parts, self.regions.members)):
            if kind:
                parts.setdefault(kind, {})[name] = tallies(self.counts, members, part)
        for condition, is_night in (('day', False), ('night', True)):
            scenes = [scene.tallies for name, scene in self.scenes.items() if self.night.get(name) is is_night]
            if scenes:
                parts.setdefault('conditions', {})[condition] = {
                    name: sum(one[name] for one in scenes) for name in scenes[0]
                }
        if self.scenes:
            parts['scenes'] = {name: scene.tallies for name, scene in sorted(self.scenes.items())}
        return parts

    def _confusion(self):
        found = {}
        if self.counts.rays is not None:
            found['rays'] = self.counts.rays.sum(axis=(0, 3)).tolist()
        if self.counts.voxels is not None:
            found['voxels'] = self.counts.voxels.sum(axis=0).tolist()
        return found

    def _notes(self, sums) -> List[str]:
        notes = [f'{self.num_samples} samples, percent; - : class not there']
        if 'RayPQ' in sums:
            names = ('RaySQ', 'RayRQ', 'RayPQ_things', 'RayPQ_stuff')
            notes.append(', '.join(f'{name} {text_of(name, sums[name])}' for name in names))
        if self.mask is not None:
            voxels = 'all voxels' if self.mask == 'none' else f'the voxels of {MASKS[self.mask]}'
            notes.append(f'IoU over {voxels}; occupied or not: {text_of("binary_IoU", sums["binary_IoU"])}')
        if 'OccScore_RayIoU' in sums:
            for variant in VARIANTS:
                score, error = (text_of(name, sums[name]) for name in (f'OccScore_{variant}', f'mAVE_{variant}'))
                notes.append(f'Occ Score {score} (mAVE {error} m/s, {variant.replace("_", " ")})')
        if self.scenes:
            bootstrap = '; intervals by a bootstrap over them' if len(self.scenes) > 1 else ''
            notes.append(f'{len(self.scenes)} scene{"s" * (len(self.scenes) > 1)}{bootstrap}')
        return notes


def text_table(*blocks: List[List[str]]) -> List[str]:
    """Lines of a table whose blocks of rows are ruled apart; the first column is ranged left."""
    rows = [row for block in blocks for row in block]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: List[str] = []
    for block in blocks:
        if lines:
            lines.append('-' * len(lines[0]))
        for row in block:
            cells = (cell.rjust(max(width + 2, 10)) for cell, width in zip(row[1:], widths[1:]))
            lines.append(row[0].ljust(widths[0]) + ''.join(cells))
    return lines


def _write_rows(path, rows):
    """Write rows as CSV; what is not a number is left empty."""
    with atomic_write(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as stream:
        csv.writer(stream).writerows(
            [['' if value is None or value != value else value for value in row] for row in rows]
        )


def _numbers(values):
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def text_of(name: str, value: float) -> str:
    """A score in percent, a velocity error in m/s; ``-`` for NaN."""
    if np.isnan(value):
        return '-'
    return f'{value:.3f}' if 'AVE' in name else f'{100 * value:.2f}'
