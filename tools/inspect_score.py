"""What went into a score, sample by sample: rays, voxels and ray origins, for one set of predictions or for two.

    python tools/inspect_score.py --predictions predictions/ --sample 0
    python tools/inspect_score.py --predictions mine/ theirs/ --config C --sample TOKEN TOKEN --csv rows.csv
    python tools/inspect_score.py --predictions mine/ theirs/ --max-samples 20

For every class of a sample: rays that truly end in it, rays predicted to (among those with a true class), and rays
that hit, right in class and off by less than 1, 2 and 4 m; these are the numbers that RayIoU is made of. "voxels" are
occupied ones, true and predicted. Predictions may be of any form that tools/evaluate.py reads.
"""

import csv
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, run_main  # noqa: E402

_CELL = 10  # characters of a number in the table


class Counted(NamedTuple):
    """One sample under one set of predictions. C classes without free, T thresholds.

    Attributes:
        rays_true, rays_predicted: int64 [C], among the rays with a true class.
        rays_hit: int64 [T, C].
        voxels_true, voxels_predicted: int64 [C].
    """

    rays_true: np.ndarray
    rays_predicted: np.ndarray
    rays_hit: np.ndarray
    voxels_true: np.ndarray
    voxels_predicted: np.ndarray


def parse_args(argv=None):
    parser = make_parser(__doc__, 'override', 'max-samples')
    add = parser.add_argument
    add('--predictions', nargs='+', required=True, metavar='DIR', help='one or two folders or zips')
    add('--config', help='config of the data set (default: what is written beside the first predictions)')
    add('--split', choices=('train', 'val', 'test'), help='section of data (default: that predicted, or val)')
    add('--sample', nargs='+', metavar='TOKEN', help='sample tokens or numbers (default: all)')
    add('--csv', metavar='FILE', help='also write a row per sample, class and set of predictions')
    return parser.parse_args(argv)


def count_sample(evaluator, prediction, labels, origins) -> Counted:
    """Counts of one sample, as the evaluator makes them."""
    from lib.metrics.counts import tallies

    sums = tallies(evaluator.prepare(prediction, labels, origins).counts)
    voxels = [
        np.bincount(volume['semantics'].reshape(-1), minlength=256)[: len(sums['rays_true'])]
        for volume in (labels, prediction)
    ]
    return Counted(sums['rays_true'], sums['rays_predicted'], sums['rays_matched'], *voxels)


def describe_sample(title: str, origins, names: Sequence[str], sets: Dict[str, Counted], thresholds) -> str:
    """Text about one sample: its origins, and a line per class that is there in truth or in a prediction.

    Args:
        origins: float64 [O, 3], metres, ego frame.
        names: of the C classes.
        sets: counts by the name of the predictions; one or two.
    """
    first = next(iter(sets.values()))
    lines = [title, f'  {len(origins)} ray origins (m, ego frame):' + ' no usable one' * (not len(origins))]
    lines[1] += ''.join(f' ({x:.2f}, {y:.2f}, {z:.2f})' for x, y, z in origins)
    lines.append(f'  {first.rays_true.sum()} rays with a true class, {first.voxels_true.sum()} true voxels')
    lines += [f'  {name}: {one.voxels_predicted.sum()} voxels predicted' for name, one in sets.items()]
    columns = ['predicted', *(f'hit@{at:g}' for at in thresholds), 'RayIoU', 'voxels']
    width = max(map(len, names)) + 2
    lines.append(' ' * (width + 2 * _CELL + 2) + ''.join(f' | {name:^{_CELL * len(columns)}}' for name in sets))
    lines.append(
        '  ' + 'class'.ljust(width) + _cells(['rays', 'voxels']) + ''.join(' | ' + _cells(columns) for _ in sets)
    )
    rows = [describe_class(number, name, width, sets) for number, name in enumerate(names)]
    return '\n'.join(lines + [row for row in rows if row])


def describe_class(number: int, name: str, width: int, sets: Dict[str, Counted]) -> str:
    """The line of a class; '' if it is neither there nor predicted."""
    parts, there = [], False
    for one in sets.values():
        true, predicted, hit = one.rays_true[number], one.rays_predicted[number], one.rays_hit[:, number]
        union = true + predicted - hit
        iou = '-' if not union.all() else f'{100 * np.mean(hit / union):.1f}'
        parts.append(' | ' + _cells([predicted, *hit, iou, one.voxels_predicted[number]]))
        there = there or true or predicted or one.voxels_predicted[number] or one.voxels_true[number]
    return '  ' + name.ljust(width) + _cells([true, one.voxels_true[number]]) + ''.join(parts) if there else ''


def _cells(values) -> str:
    return ''.join(f'{value!s:>{_CELL}}' for value in values)


def table_rows(token: str, names: Sequence[str], sets: Dict[str, Counted], thresholds) -> List[dict]:
    """Rows for a CSV file, one per class and set of predictions."""
    rows = []
    for title, one in sets.items():
        for number, name in enumerate(names):
            row = {'sample': token, 'predictions': title, 'class': name}
            row.update(rays_true=one.rays_true[number], rays_predicted=one.rays_predicted[number])
            row.update((f'rays_hit_{at:g}m', hit) for at, hit in zip(thresholds, one.rays_hit[:, number]))
            rows.append(dict(row, voxels_true=one.voxels_true[number], voxels_predicted=one.voxels_predicted[number]))
    return rows


def choose(dataset, sets, samples) -> List[int]:
    """Numbers of the samples to look at: those asked for, or all that every set of predictions has."""
    from tools.visualize import find_samples

    if samples:
        return [index for sample in samples for index in find_samples(dataset, sample, None)]
    tokens = [dataset.sample_token(index) for index in range(len(dataset))]
    chosen = [set(predictions.choose(tokens, only_predicted=True)[0]) for predictions in sets.values()]
    return sorted(set.intersection(*chosen))


def main():
    args = parse_args()
    from lib.errors import UserError
    from lib.io import atomic_write, check_outputs
    from lib.metrics import Evaluator
    from lib.metrics.formats import open_predictions
    from lib.run import read_task
    from loaders import build_dataset
    from tools.components import config_of_predictions

    if len(args.predictions) > 2 or len(set(args.predictions)) < len(args.predictions):
        raise UserError('--predictions takes one folder, or two different ones to put side by side')
    check_outputs(args.csv)
    cfg, split = config_of_predictions(args.predictions[0], args.config, args.override, args.split)
    task = read_task(cfg)
    changes = {} if args.max_samples is None else dict(max_samples=args.max_samples)
    dataset = build_dataset(dict(cfg.data[split], test_mode=True, **changes), task)
    sets = {path: open_predictions(path, task) for path in args.predictions}
    for predictions in sets.values():
        print(predictions.describe(), file=sys.stderr)
    evaluator, rows = Evaluator(task, ['ray_iou']), []
    names = task.label_set.occupied_names
    for index in choose(dataset, sets, args.sample):
        token, labels, origins = dataset.sample_token(index), dataset.ground_truth(index), dataset.ray_origins(index)
        counts = {path: count_sample(evaluator, one.read(token), labels, origins) for path, one in sets.items()}
        title = f'sample {token} (number {index}) {dataset.scene_name(index)}'
        print(describe_sample(title, origins, names, counts, evaluator.thresholds), end='\n\n', flush=True)
        rows += table_rows(token, names, counts, evaluator.thresholds)
    if args.csv and rows:
        with atomic_write(args.csv) as temporary, open(str(temporary), 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f'wrote {len(rows)} rows to {args.csv}', file=sys.stderr)


if __name__ == '__main__':
    run_main(main)
