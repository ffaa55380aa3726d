"""tools/inspect_score.py: its numbers are those of the score, for one set of predictions and for two."""

import csv
import sys

import numpy as np
import pytest

from lib.errors import UserError
from lib.metrics import Evaluator
from lib.task import Task
from tools.inspect_score import count_sample, describe_sample, main

TASK = Task('occ3d', point_cloud_range=(-8, -8, -1, 8, 8, 5.4))
ORIGINS = np.array([[0.0, 0.0, 1.0], [2.0, 1.0, 1.5]])


def volume(seed):
    rng = np.random.default_rng(seed)
    occupied = rng.random(TASK.grid_shape) < 0.05
    return dict(semantics=np.where(occupied, rng.integers(0, 17, TASK.grid_shape), 17).astype(np.uint8))


def test_counts_make_up_the_score():
    evaluator = Evaluator(TASK, ['ray_iou'])
    evaluator.update(volume(1), volume(0), ORIGINS, token='a')
    scores = evaluator.compute().as_dict()['per_class']['car']
    counts = count_sample(Evaluator(TASK, ['ray_iou']), volume(1), volume(0), ORIGINS)
    hit = counts.rays_hit[:, 4]
    iou = hit / (counts.rays_true[4] + counts.rays_predicted[4] - hit)
    assert [scores[f'RayIoU@{at}'] for at in (1, 2, 4)] == iou.tolist() and iou[2] > 0
    assert counts.voxels_predicted[4] == (volume(1)['semantics'] == 4).sum()


def test_text_names_origins_and_leaves_out_classes_that_are_nowhere():
    truth = volume(0)
    truth['semantics'][truth['semantics'] == 4] = 17
    evaluator = Evaluator(TASK, ['ray_iou'])
    sets = {name: count_sample(evaluator, truth, truth, ORIGINS) for name in ('mine', 'theirs')}
    text = describe_sample('sample x', ORIGINS, TASK.label_set.occupied_names, sets, (1.0, 2.0, 4.0))
    assert '2 ray origins (m, ego frame): (0.00, 0.00, 1.00) (2.00, 1.00, 1.50)' in text
    assert 'car ' not in text
    (line,) = [line for line in text.splitlines() if line.startswith('  pedestrian')]
    one, mine, theirs = (part.split() for part in line.split('|'))
    assert mine == theirs == [one[1]] * 4 + ['100.0', one[2]]


def test_two_sets_side_by_side_on_toy_data(toy_root, tmp_path, monkeypatch, capsys):
    """The labels themselves and labels without cars."""
    for path in sorted((toy_root / 'occ3d').rglob('labels.npz')):
        with np.load(str(path)) as file:
            semantics = file['semantics']
        for name, kept in (('right', semantics), ('no_cars', np.where(semantics == 4, 17, semantics))):
            (tmp_path / name).mkdir(exist_ok=True)
            np.savez_compressed(str(tmp_path / name / f'{path.parent.name}.npz'), pred=kept)
    folders = [str(tmp_path / 'right'), str(tmp_path / 'no_cars')]

    def run(*arguments):
        common = ['--config', 'configs/toy/semantic.py', '--override', f'data.val.data_root={toy_root}']
        monkeypatch.setattr(sys, 'argv', ['inspect_score.py', *common, *arguments])
        main()
        return capsys.readouterr()

    said = run('--predictions', *folders, '--csv', str(tmp_path / 'rows.csv'))
    assert said.out.count('sample ') == 3 and 'dense .npz' in said.err
    with open(str(tmp_path / 'rows.csv'), newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['class'] == 'car']
    for right, no_cars in zip(rows[::2], rows[1::2]):
        assert right['sample'] == no_cars['sample'] and right['rays_true'] == right['rays_hit_1m'] != '0'
        assert no_cars['rays_predicted'] == no_cars['voxels_predicted'] == '0'
    assert run('--predictions', folders[0], '--sample', '1').out.count('sample ') == 1
    with pytest.raises(UserError, match='two different ones'):
        run('--predictions', folders[0], folders[0])
