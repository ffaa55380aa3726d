"""Pictures and inference on the toy data: the scripts as a user runs them."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from lib.config import load_config
from lib.io import load_npz_checked
from lib.prediction import save_prediction
from lib.task import Task
from models import build_model
from tools.infer import main as infer_main
from tools.visualize import find_samples
from tools.visualize import main as visualize_main

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join(ROOT, 'configs', 'toy', 'panoptic.py')
SMALL = [
    'task.image_size=[64, 160]',
    'model.pts_bbox_head.transformer.topk_testing=[60, 150, 400]',
    'data.workers_per_gpu=0',
]


def _at(root):
    return [f'data.{split}.data_root={root}' for split in ('train', 'val', 'test')]


def _infos(root):
    return [name for name in os.listdir(str(root)) if name.endswith('val_sweep.pkl')][0]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Checkpoint of an untrained model of the small config."""
    cfg = load_config(CONFIG, SMALL)
    torch.manual_seed(0)
    model = build_model(cfg.model, Task.from_config(cfg.task))
    path = tmp_path_factory.mktemp('weights') / 'w.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={}), str(path))
    return str(path)


def _run(script, *arguments):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, 'tools', script)] + list(arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _infer(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['infer.py'] + list(arguments))
    infer_main()


def test_infer_writes_predictions_index_and_pictures(toy_root, weights, tmp_path, monkeypatch):
    """Labels are not needed: the label folder named in the config is not even looked at."""
    out = tmp_path / 'out'
    _infer(
        monkeypatch,
        '--config',
        CONFIG,
        '--weights',
        weights,
        '--out',
        str(out),
        '--pictures',
        '--infos',
        _infos(toy_root),
        '--data-root',
        str(toy_root),
        '--max-samples',
        '2',
        '--override',
        'data.test.occ_gt_root=nowhere',
        *SMALL,
    )
    index = json.loads((out / 'index.json').read_text())
    assert len(index['samples']) == 2 and index['classes'][-1] == 'free'
    for sample in index['samples']:
        prediction = load_npz_checked(out / sample['file'])
        assert prediction['occ_loc'].shape == (1, 400, 3) and prediction['pano_inst'].dtype == np.int16
        picture = cv2.imread(str(out / 'pictures' / ('{}.png'.format(sample['token']))))
        assert picture.shape[1] == 1600


def test_infer_on_own_images(toy_root, weights, tmp_path, monkeypatch):
    """Two cameras under other names."""
    image = next(p for p in (toy_root / 'samples' / 'CAM_FRONT').iterdir())
    camera = dict(
        intrinsic=[[250.0, 0, 160], [0, 250.0, 90], [0, 0, 1]],
        camera2ego=dict(rotation=[0.5, -0.5, 0.5, -0.5], translation=[1.7, 0.0, 1.5]),
    )
    own = dict(
        cameras=dict(left=camera, right=camera),
        sequences=[
            dict(
                name='mine',
                frames=[
                    dict(
                        timestamp=0.0,
                        ego2global=dict(rotation=[1, 0, 0, 0], translation=[0, 0, 0]),
                        images=dict(left=str(image), right=str(image)),
                    )
                ],
            )
        ],
    )
    (tmp_path / 'own.json').write_text(json.dumps(own))
    _infer(
        monkeypatch,
        '--config',
        CONFIG,
        '--weights',
        weights,
        '--out',
        str(tmp_path / 'out'),
        '--own',
        str(tmp_path / 'own.json'),
        '--override',
        *SMALL,
    )
    assert load_npz_checked(tmp_path / 'out' / 'predictions' / 'mine_00000.npz')['sem_pred'].shape == (1, 400)


def test_infer_without_weights_ends_in_a_sentence(tmp_path):
    done = _run('infer.py', '--config', CONFIG, '--weights', str(tmp_path / 'no.pth'), '--out', str(tmp_path / 'o'))
    assert done.returncode == 2 and 'no.pth' in done.stderr and 'Traceback' not in done.stderr


def _visualize(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, 'argv', ['visualize.py'] + list(arguments))
    visualize_main()
    return capsys.readouterr()


def test_picture_of_truth_and_prediction(toy_root, tmp_path, monkeypatch, capsys):
    """Panoptic: two more views, so the picture is taller than without instances."""
    from lib.task import Task
    from loaders import build_dataset

    cfg = load_config(CONFIG, _at(toy_root))
    dataset = build_dataset(cfg.data.val, Task.from_config(cfg.task))
    labels = dataset.ground_truth(1)
    where = np.argwhere(labels['semantics'] != 17)
    semantics = labels['semantics'][tuple(where.T)]
    instances = labels['instances'][tuple(where.T)].astype(np.int16)
    save_prediction(
        tmp_path / (f'{dataset.sample_token(1)}.npz'),
        dict(
            sem_pred=semantics[None],
            occ_loc=where[None].astype(np.uint8),
            pano_inst=instances[None],
            pano_sem=semantics[None],
        ),
    )
    heights = []
    for config, name in ((CONFIG, 'panoptic.png'), (CONFIG.replace('panoptic', 'semantic'), 'semantic.png')):
        predictions = ['--predictions', str(tmp_path)] if 'panoptic' in name else []
        _visualize(
            monkeypatch,
            capsys,
            '--config',
            config,
            '--sample',
            dataset.sample_token(1),
            '--out',
            str(tmp_path / name),
            *predictions,
            '--override',
            *_at(toy_root),
        )
        heights.append(cv2.imread(str(tmp_path / name)).shape[0])
    assert heights[0] > 1500 and heights[0] != heights[1]
    assert find_samples(dataset, '2', None) == [2]
    assert find_samples(dataset, '0', dataset.info(0)['scene_name']) == [0, 1, 2]


@pytest.mark.parametrize('suffix', ['.gif', '.mp4'])
def test_video_of_a_scene(toy_root, tmp_path, monkeypatch, capsys, suffix):
    cfg = load_config(CONFIG, _at(toy_root))
    from lib.io import load_pickle_safe

    scene = load_pickle_safe(os.path.join(str(toy_root), cfg.data.val.ann_file))['infos'][0]['scene_name']
    path = tmp_path / ('drive' + suffix)
    _visualize(
        monkeypatch, capsys, '--config', CONFIG, '--scene', scene, '--out', str(path), '--override', *_at(toy_root)
    )
    video = cv2.VideoCapture(str(path))
    assert path.stat().st_size > 10000
    assert suffix == '.gif' or int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_label_file_alone(toy_root, tmp_path, monkeypatch, capsys):
    labels = next((toy_root / 'occ3d').rglob('labels.npz'))
    for extra in ([], ['--visible-only']):
        _visualize(monkeypatch, capsys, '--labels', str(labels), '--out', str(tmp_path / 'a.png'), *extra)
        assert cv2.imread(str(tmp_path / 'a.png')).shape[1] == 1600


@pytest.mark.parametrize(
    'arguments, words',
    [(['--out', 'a.png'], '--config'), (['--config', CONFIG, '--scene', 'scene-0103', '--out', 'a.png'], '--scene')],
)
def test_wrong_arguments_end_in_a_sentence(arguments, words):
    done = _run('visualize.py', *arguments)
    assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr
