"""Pictures and inference on the toy data: the scripts as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from lib.config import load_config
from lib.errors import UserError
from lib.io import load_npz_checked, save_npz
from lib.prediction import save_prediction
from lib.task import Task
from models import build_model
from tools.drawing.pictures import save_video
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
    monkeypatch.setattr(sys, 'argv', ['visualize.py', '--predictions', str(out), '--html', str(tmp_path / 'page.html')])
    visualize_main()  # the record says config, split and data
    sample = _page(tmp_path / 'page.html')['sample-0']
    assert sample['token'] == index['samples'][0]['token'] and len(sample['cameras']) == 6
    assert sample['prediction'] is not None and sample['truth'] is None
    sys.argv += ['--samples', '5', '--override', 'data.test.occ_gt_root=occ3d_panoptic']
    visualize_main()
    page = _page(tmp_path / 'page.html')
    assert len(page['drive']['samples']) == 2 and page['sample-1']['truth'] is not None


def _page(path):
    """{id: value} of the data in a viewer's page."""
    found = re.findall(r'<script type="application/json" id="([^"]*)">(.*?)</script>', path.read_text(), re.S)
    return {name: json.loads(text) for name, text in found}


def test_infer_on_own_images(toy_root, weights, tmp_path, monkeypatch):
    """Two cameras under other names."""
    image = next(p for p in (toy_root / 'samples' / 'CAM_FRONT').iterdir())
    camera = dict(
        intrinsic=[[125.0, 0, 80], [0, 125.0, 45], [0, 0, 1]],
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
    arguments = ['--predictions', str(tmp_path / 'out'), '--html', str(tmp_path / 'page.html'), '--out']
    monkeypatch.setattr(sys, 'argv', ['visualize.py', *arguments, str(tmp_path / 'a.png')])
    visualize_main()
    sample = _page(tmp_path / 'page.html')['sample-0']
    assert [camera['name'] for camera in sample['cameras']] == ['left', 'right'] and sample['truth'] is None
    assert cv2.imread(str(tmp_path / 'a.png')).shape[1] == 1600


def test_infer_without_weights_ends_in_a_sentence(tmp_path):
    done = _run('infer.py', '--config', CONFIG, '--weights', str(tmp_path / 'no.pth'), '--out', str(tmp_path / 'o'))
    assert done.returncode == 2 and 'no.pth' in done.stderr and 'Traceback' not in done.stderr


def test_split_without_info_file_names_those_that_are_there(toy_root, weights, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='--infos .*nuscenes_infos_val_sweep.pkl'):
        _infer(
            monkeypatch,
            *('--config', CONFIG, '--weights', weights, '--out', str(tmp_path / 'out'), '--data-root', str(toy_root)),
        )


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


def test_drive_without_all_labels_as_page_and_exports(toy_root, tmp_path, monkeypatch, capsys):
    """Predictions in folders of another project, dense; one label is missing; one sample has no prediction."""
    from loaders import build_dataset

    root = tmp_path / 'nuscenes'
    shutil.copytree(str(toy_root), str(root))
    cfg = load_config(CONFIG, _at(root))
    dataset = build_dataset(cfg.data.val, Task.from_config(cfg.task))
    for index in (0, 1):
        labels = dataset.ground_truth(index)
        save_npz(tmp_path / 'dense' / f'{dataset.sample_token(index)}.npz', dict(pred=labels['semantics']))
    dataset.label_path(1).unlink()
    scene = dataset.info(0)['scene_name']
    common = ['--config', CONFIG, '--predictions', str(tmp_path / 'dense'), '--override', *_at(root)]
    said = _visualize(monkeypatch, capsys, '--scene', scene, '--html', str(tmp_path / 'page.html'), *common)
    page = _page(tmp_path / 'page.html')
    assert 'shown alone' in said.err and '2 samples' in said.out
    assert page['sample-0']['truth'] is not None and page['sample-1']['truth'] is None
    assert page['drive']['samples'][0]['miou'] == 1.0 and page['drive']['samples'][1]['miou'] is None
    _visualize(monkeypatch, capsys, '--ply', str(tmp_path / 'a.ply'), '--gltf', str(tmp_path / 'a.glb'), *common)
    points = [(tmp_path / f'a_{name}.ply').read_bytes().split(b'end_header\n')[1] for name in ('truth', 'prediction')]
    assert len(points[0]) == len(points[1]) > 500000
    assert (tmp_path / 'a_truth.glb').read_bytes()[:4] == b'glTF'
    film = tmp_path / 'drive.mp4'
    _visualize(monkeypatch, capsys, '--scene', scene, '--out', str(film), *common)
    video = cv2.VideoCapture(str(film))  # the picture without truth is lower and gets a rim
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 2


def test_film_of_pictures_of_different_sizes_keeps_each(tmp_path):
    images = [np.full((height, width, 3), 200, np.uint8) for height, width in ((101, 200), (151, 160), (80, 221))]
    save_video(tmp_path / 'a.mp4', images, fps=2)
    video = cv2.VideoCapture(str(tmp_path / 'a.mp4'))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 3
    assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (222, 152)


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
    [
        (['--out', 'a.png'], '--config'),
        (['--config', CONFIG, '--scene', 'scene-0103', '--out', 'a.png'], '--scene'),
        (['--config', CONFIG, '--sample', '0', '--samples', '3', '--html', 'a.html'], '--samples'),
        (['--config', CONFIG, '--samples', '3', '--ply', 'a.ply'], '--ply'),
        (['--predictions', 'nowhere', '--html', 'a.html'], 'nowhere'),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, words, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['visualize.py', *arguments])
    with pytest.raises(UserError, match=words):
        visualize_main()


def test_predictions_of_no_sample_name_the_ways_out(toy_root, tmp_path, monkeypatch, capsys):
    save_npz(tmp_path / 'dense' / 'unknown.npz', dict(pred=np.full((200, 200, 16), 17, np.uint8)))
    with pytest.raises(UserError, match='--split.*--infos'):
        _visualize(
            monkeypatch,
            capsys,
            '--config',
            CONFIG,
            '--predictions',
            str(tmp_path / 'dense'),
            '--override',
            *_at(toy_root),
        )
