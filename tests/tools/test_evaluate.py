"""tools/evaluate.py: finding predictions, scoring them, and its sentences about what is missing."""

import json
import sys

import numpy as np
import pytest

from lib.config import load_config
from lib.errors import UserError
from lib.io import load_pickle_safe
from lib.metrics import Evaluator
from lib.metrics.command import score
from lib.metrics.formats import open_predictions
from lib.prediction import save_prediction, write_record
from lib.task import Task
from tools.evaluate import main as evaluate_main
from tools.evaluate import samples_of


class SmallDataset:
    """Labels of three random samples."""

    task = Task(label_set='occ3d', point_cloud_range=(-8.0, -8.0, -1.0, 8.0, 8.0, 5.4))

    def __len__(self):
        return 3

    def sample_token(self, index):
        return f'token{index}'

    def ground_truth(self, index, names=()):
        rng = np.random.default_rng(index)
        occupied = rng.random(self.task.grid_shape) < 0.05
        labels = rng.integers(0, 17, self.task.grid_shape)
        return dict(semantics=np.where(occupied, labels, 17).astype(np.uint8))

    def scene_name(self, index):
        return 'scene'

    def ray_origins(self, index):
        return np.array([[0.0, 0.0, 1.0], [2.0, 1.0, 1.5]])


def sparse(semantics, free):
    where = np.argwhere(semantics != free)
    labels = semantics[tuple(where.T)]
    return dict(sem_pred=labels[None].astype(np.uint8), occ_loc=where[None].astype(np.uint8))


@pytest.fixture
def predictions(tmp_path):
    """True labels as predictions, one of them in a folder of its own."""
    dataset = SmallDataset()
    (tmp_path / 'scene').mkdir()
    for index in range(3):
        folder = tmp_path / 'scene' if index == 1 else tmp_path
        prediction = sparse(dataset.ground_truth(index)['semantics'], 17)
        save_prediction(folder / (f'token{index}.npz'), prediction)
    return tmp_path


@pytest.mark.parametrize('workers', [1, 3])
def test_true_labels_score_one(predictions, workers, capsys):
    dataset, lines = SmallDataset(), []
    samples = samples_of(dataset, open_predictions(predictions, dataset.task), say=lines.append)
    result = score(samples, Evaluator(dataset.task, ('ray_iou', 'miou')), workers)
    assert (result.num_samples, result.totals['RayIoU'], result.totals['mIoU']) == (3, 1.0, 1.0)
    assert '3 predictions' in lines[0] and 'scored 3 samples' in capsys.readouterr().err


def test_script_on_toy_data(toy_root, tmp_path, monkeypatch, capsys):
    """The labels of the toy data as predictions, through the command line."""
    for labels in sorted((toy_root / 'occ3d').rglob('labels.npz')):
        with np.load(str(labels)) as file:
            save_prediction(tmp_path / (labels.parent.name + '.npz'), sparse(file['semantics'], 17))
    command = f'evaluate.py --config configs/toy/semantic.py --predictions {tmp_path}'
    command += f' --out {tmp_path / "scores.json"} --override data.val.data_root={toy_root}'
    monkeypatch.setattr(sys, 'argv', command.split())
    evaluate_main()
    assert 'RayIoU@1' in capsys.readouterr().out
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert scores['RayIoU'] == 1.0 and scores['num_samples'] == 3


def test_occupancy_and_flow_of_a_config(toy_root, tmp_path, monkeypatch, capsys):
    """The labels of the toy data as predictions: once as they are, once as if all stood still."""
    for labels in sorted((toy_root / 'openocc_v2').rglob('labels.npz')):
        with np.load(str(labels)) as file:
            arrays = dict(semantics=file['semantics'], flow=file['flow'])
        token = labels.parent.name
        for name, flow in (('moving', arrays['flow']), ('still', 0 * arrays['flow'])):
            (tmp_path / name).mkdir(exist_ok=True)
            np.savez_compressed(tmp_path / name / f'{token}.npz', **dict(arrays, flow=flow))
    scores = {}
    for name in ('moving', 'still'):
        command = f'evaluate.py --config configs/toy/openocc.py --metrics occ_score --predictions {tmp_path / name}'
        command += f' --json {tmp_path / name}.json --override data.val.data_root={toy_root}'
        monkeypatch.setattr(sys, 'argv', command.split())
        evaluate_main()
        scores[name] = json.loads((tmp_path / f'{name}.json').read_text())
    for variant in ('true_positives', 'all_rays'):
        assert scores['moving'][f'mAVE_{variant}'] == 0 and scores['moving'][f'OccScore_{variant}'] == 1
        assert scores['still'][f'mAVE_{variant}'] > 0.1 and 0.9 <= scores['still'][f'OccScore_{variant}'] < 1
    assert 'rings' not in capsys.readouterr().out  # velocities are not told apart by distance


def test_record_beside_predictions_stands_for_config_split_and_data(toy_root, tmp_path, monkeypatch, capsys):
    """As inference leaves it: data.test, no labels named, files one folder deeper."""
    infos = load_pickle_safe(toy_root / 'nuscenes_infos_val_sweep.pkl')['infos'][:2]
    folder = tmp_path / 'out' / 'predictions'
    folder.mkdir(parents=True)
    override = [f'data.test.data_root={str(toy_root)!r}', "data.test.ann_file='nuscenes_infos_val_sweep.pkl'"]
    override += ['data.test.max_samples=2']
    config = 'configs/toy/semantic.py'
    write_record(folder, Task.from_config(load_config(config).task), config, 'w.pth', 'test', override)
    for info in infos:
        with np.load(str(toy_root / 'occ3d' / info['scene_name'] / info['token'] / 'labels.npz')) as file:
            save_prediction(folder / f'{info["token"]}.npz', sparse(file['semantics'], 17))
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--predictions', str(tmp_path / 'out'), '--metrics', 'miou'])
    evaluate_main()
    printed = capsys.readouterr()
    assert '2 predictions' in printed.err and '100.0' in printed.out
    (folder / 'predictions.json').unlink()
    with pytest.raises(UserError, match='--config'):
        evaluate_main()
