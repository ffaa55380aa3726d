"""The look at a data set before long work: damage is found and named, a sound set is not doubted."""

import re
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from fake_nuscenes import SCENES, FakeNuScenes
from mmcv import Config

from lib.cli import run_main
from lib.dataset import CheckedDataset
from lib.errors import DataError
from lib.io import load_pickle_safe, save_pickle
from lib.task import Task
from loaders import build_dataset
from loaders.checks import Look, spread
from loaders.preflight import inspect_dataset, preflight
from loaders.prepare.sweep_infos import write_sweep_infos

TASK = Task('occ3d', point_cloud_range=(-8, -8, -1, 8, 8, 5.4), image_size=(32, 64), num_frames=2)
INFOS = 'nuscenes_infos_train_sweep.pkl'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    fake = FakeNuScenes(tmp_path_factory.mktemp('source'))
    for row in fake.tables['ego_pose']:  # a car that stands, so that nothing is doubtful
        row.update(translation=[100.0, 50.0, 0.0], rotation=[1.0, 0.0, 0.0, 0.0])
    fake.write()
    fake.write_labels(TASK)
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    return fake.root


def _open(root, task=TASK, **options):
    return build_dataset(
        dict(dict(type='NuSceneOcc', data_root=str(root), ann_file=INFOS, occ_gt_root='occ3d', pipeline=[]), **options),
        task,
    )


def _lines(root, level, **options):
    return [finding.text for finding in inspect_dataset(_open(root), Look(**options)) if finding.level == level]


def _change_infos(root, change):
    content = load_pickle_safe(root / INFOS)
    change(content['infos'])
    save_pickle(root / INFOS, content)


class Checked:
    """Another data set's class, as far as the protocol lets it be known."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getattr__(self, name):
        known = {
            name for kind in CheckedDataset.__mro__ for name in (*vars(kind), *getattr(kind, '__annotations__', ()))
        }
        if name not in known:
            raise AttributeError(f'CheckedDataset has no {name}')
        return getattr(self._dataset, name)


def test_any_class_that_answers_the_protocol_is_looked_at(source):
    pipeline = [dict(type='LoadOccGTFromFile', lidar_points=True)]
    dataset = _open(source, pipeline=pipeline)
    findings = inspect_dataset(Checked(dataset))
    assert findings == inspect_dataset(dataset) and any('LiDAR' in finding.text for finding in findings)


def test_a_sound_set_is_not_doubted(source):
    for options in (dict(), dict(full=True, decode=True, processes=2)):
        assert _lines(source, 'error', **options) == _lines(source, 'warning', **options) == []
        ok = '\n'.join(_lines(source, 'ok', **options))
        assert '6 samples of 6 keyframes in 2 scenes, 4 with camera sweeps, v1.0-mini' in ok
        assert '156 of 156 images looked at' in ok and '6 of 6 label files read; grid [40, 40, 16]' in ok
        share = float(re.search(r'car (\d+\.\d+)%', ok).group(1))
        assert share == pytest.approx(100 / 17, abs=0.5)  # random labels: 17 classes, 15,000 occupied voxels
    preflight(_open(source), 'train')


def _image(root, index=-1, folder='samples'):
    return sorted((root / folder / 'CAM_BACK').glob('scene-0061*'))[index]


@pytest.mark.parametrize('folder', ['samples', 'sweeps'])
@pytest.mark.parametrize(
    'damage, message',
    [('missing', 'does not exist; check data_root'), ('truncated', 'is truncated'), ('empty', 'is empty')],
)
def test_bad_images_are_named(root, folder, damage, message):
    path = _image(root, folder=folder)
    if damage == 'missing':
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 300 if damage == 'truncated' else 0])
    errors = _lines(root, 'error')
    assert len(errors) == 1 and str(path) in errors[0] and message in errors[0]
    with pytest.raises(DataError, match=f'^data.train: image .*{message}'):
        preflight(_open(root), 'train')


def test_what_is_no_image_is_found_by_decoding(root):
    path = _image(root)
    path.write_bytes(b'a picture')
    assert _lines(root, 'error') == []
    assert 'cannot be decoded' in _lines(root, 'error', decode=True)[0]


@pytest.mark.parametrize(
    'damage, message',
    [
        ('missing', 'does not exist'),
        ('damaged', 'is damaged'),
        ('shape', r'has shape \[4, 4, 4\], but the task grid'),
        ('ids', 'holds id 99'),
    ],
)
def test_bad_labels_are_named(root, damage, message):
    path = _open(root).label_path(3)
    if damage == 'missing':
        path.unlink()
    elif damage == 'damaged':
        path.write_bytes(b'no archive')
    else:
        semantics = np.full((4, 4, 4) if damage == 'shape' else TASK.grid_shape, 17, np.uint8)
        semantics[0, 0, 0] = 99
        np.savez(str(path), semantics=semantics)
    with pytest.raises(DataError, match='^data.train: .*scene-0553.*' + message):
        preflight(_open(root), 'train')


def test_many_errors_are_counted(root):
    shutil.rmtree(str(root / 'sweeps'))
    errors = _lines(root, 'error', shown=4)
    assert len(errors) == 5 and errors[4] == '... and 116 more images are missing or damaged'
    with pytest.raises(DataError, match=r'\(and 3 more; list them with tools/check_data.py\)$'):
        preflight(_open(root), 'train')


def test_where_samples_are_skipped_single_files_are_warnings(root, capsys):
    _image(root).unlink()
    _open(root).label_path(0).unlink()
    preflight(_open(root, on_error='skip'), 'train')
    assert capsys.readouterr().err.count('[warning]') == 2
    shutil.rmtree(str(root / 'occ3d'))
    with pytest.raises(DataError, match='labels.npz does not exist'):
        preflight(_open(root, on_error='skip'), 'train')


def test_free_labels_are_an_error_and_absent_classes_a_warning(root):
    dataset = _open(root)
    for index in range(len(dataset)):
        semantics = np.full(TASK.grid_shape, 17, np.uint8)
        semantics[0, 0, 0] = 4 if index else 17
        np.savez(str(dataset.label_path(index)), semantics=semantics)
    assert any('do not occur in the labels looked at: others, barrier, bicycle' in w for w in _lines(root, 'warning'))
    np.savez_compressed(str(dataset.label_path(0)), semantics=np.full(TASK.grid_shape, 17, np.uint8))
    for index in range(len(dataset)):
        shutil.copy(str(dataset.label_path(0)), str(dataset.label_path(index))) if index else None
    assert any('free voxels only' in error for error in _lines(root, 'error'))


def test_things_without_instances_are_a_warning(root):
    task = replace(TASK, panoptic=True)
    dataset = _open(root, task)
    for index in range(len(dataset)):
        semantics = np.load(str(dataset.label_path(index)))['semantics']
        np.savez_compressed(str(dataset.label_path(index)), semantics=semantics, instances=np.zeros_like(semantics))
    warnings = [f.text for f in inspect_dataset(dataset) if f.level == 'warning']
    assert len(warnings) == 1 and 'voxels of things have no instance id' in warnings[0]


def _mirror(info):
    info['cams']['CAM_FRONT']['sensor2global_rotation'][0] *= -1


def _wrong_pose(info):
    entry = info['cams']['CAM_FRONT']
    entry['sensor2global_rotation'] = entry['sensor2global_rotation'].T


def _far_camera(info):
    info['cams']['CAM_FRONT']['sensor2lidar_translation'] = np.array([500.0, 0, 0])


def _late_image(info):
    info['cams']['CAM_FRONT']['timestamp'] += 2_000_000


def _reversed_sweeps(info):
    info['sweeps'] = info['sweeps'][::-1]


def _lost_sweep(info):
    del info['sweeps'][2]


def _jump(info):
    info['ego2global_translation'] = [900.0, 0, 0]


@pytest.mark.parametrize(
    'change, message',
    [
        (_mirror, 'CAM_FRONT to global is no rotation'),
        (_wrong_pose, 'disagree by'),
        (_far_camera, 'CAM_FRONT stands'),
        (_late_image, 'image taken 2.00 s from the keyframe'),
        (_reversed_sweeps, 'not in order, newest first'),
        (_lost_sweep, '4 sweeps, 5 are expected'),
        (_jump, 'the car moved'),
    ],
)
def test_doubtful_calibration_is_named(root, change, message):
    _change_infos(root, lambda infos: change(infos[1]))
    warnings = _lines(root, 'warning')
    assert any('keyframe sample-1: ' in warning and message in warning for warning in warnings), warnings


def _labels(root, make, task=TASK):
    """Rewrite every label file with the arrays ``make(index, arrays)``."""
    dataset = _open(root, task)
    for index in range(len(dataset)):
        path = dataset.label_path(index)
        with np.load(str(path)) as archive:
            arrays = make(index, dict(archive))
        np.savez_compressed(str(path), **arrays)


def _without_mask(index, arrays):
    return {key: value for key, value in arrays.items() if key != 'mask_camera' or index != 2}


def _config(**model):
    return Config(dict(model=model))


def test_labels_without_the_mask_that_the_model_needs_are_named_before_training(root):
    preflight(_open(root), 'train', _config(use_mask_camera=True))
    _labels(root, _without_mask)
    culprit = str(_open(root).label_path(2))
    with pytest.raises(
        DataError, match='data.train: 1 of 6 label files.*have no mask_camera.*use_mask_camera'
    ) as caught:
        preflight(_open(root), 'train', _config(use_mask_camera=True))
    assert culprit in str(caught.value)
    preflight(_open(root), 'train', _config(use_mask_camera=False))
    assert [w for w in _lines(root, 'warning') if 'mIoU' in w and culprit in w]


def _without(name):
    return lambda path, arrays: np.savez(str(path), **{key: value for key, value in arrays.items() if key != name})


def _smaller(path, arrays):
    np.savez_compressed(str(path), semantics=arrays['semantics'][:20])


def _gone(path, arrays):
    path.unlink()


def _cut(path, arrays):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    'damage, message',
    [
        (_without('mask_camera'), '1 of 6 label files, e.g. {}, have no mask_camera: model.use_mask_camera needs it'),
        (_without('semantics'), "{} has no 'semantics'"),
        (_gone, '{} does not exist'),
        (_cut, '{} is damaged or no .npz file'),
        (_smaller, "{}: 'semantics' takes 12928 bytes, as no array of"),
    ],
)
def test_label_files_that_are_not_read_are_looked_at_too(root, monkeypatch, damage, message):
    """The quick look reads 64 files; a mask missing in another one is found all the same."""
    monkeypatch.setattr('loaders.preflight.QUICK_LABELS', 2)
    (ok,) = [line for line in _lines(root, 'ok', needs_mask=True) if 'label files' in line]
    assert '2 of 6 label files read, 4 more are there; grid [40, 40, 16], arrays in all: mask_camera, mask_li' in ok
    path = _open(root).label_path(3)
    with np.load(str(path)) as archive:
        arrays = dict(archive)
    damage(path, arrays)
    with pytest.raises(DataError) as caught:
        preflight(_open(root), 'train', _config(use_mask_camera=True))
    assert message.format(path) in str(caught.value)


def test_instances_are_looked_for_in_all_label_files(root, monkeypatch):
    monkeypatch.setattr('loaders.preflight.QUICK_LABELS', 2)
    _labels(root, lambda index, arrays: dict(arrays, instances=arrays['semantics']) if index != 4 else arrays)
    with pytest.raises(DataError, match='sample-.*labels.npz has no instances, which task.panoptic needs'):
        preflight(_open(root, replace(TASK, panoptic=True)), 'train')


def _shifted(index, arrays):
    """Ids of a set whose free is 0: one more for each class."""
    return dict(arrays, semantics=(arrays['semantics'].astype(int) + 1) % 18)


def _one_class(index, arrays):
    return dict(arrays, semantics=np.where(arrays['semantics'] == 17, 17, 0))


@pytest.mark.parametrize(
    'make, messages',
    [
        (_shifted, [r'9\d% of the voxels are occupied', r'9\d% of the occupied voxels are others', 'free = 17']),
        (_one_class, ['100% of the occupied voxels are others .0.2% is usual']),
    ],
)
def test_labels_that_cannot_be_right_are_a_warning(root, make, messages):
    _labels(root, make)
    (warning,) = [w for w in _lines(root, 'warning') if 'implausible' in w]
    assert all(re.search(message, warning) for message in messages), warning


def test_real_labels_are_plausible(real_dir):
    from loaders.checks import _implausible

    for name, task in (('occ3d', Task('occ3d')), ('openocc', Task('openocc_v2'))):
        for path in real_dir.glob(f'{name}*.npz'):
            counts = np.bincount(np.load(str(path))['semantics'].ravel(), minlength=task.label_set.num_classes)
            assert _implausible(counts, task) == []


def test_shares_of_a_label_set_without_counts_are_nothing_unusual():
    from loaders.checks import _implausible

    labels = dict(name='own', class_names=['ground', 'rest', 'free'], things=[])
    assert _implausible(np.array([90, 10, 900]), Task.from_config(dict(label_set=labels))) == []


def test_the_share_of_short_histories_and_the_reason_are_told(root):
    def told(task):
        return [f for f in inspect_dataset(_open(root, task)) if 'earlier keyframes' in f.text or 'follow' in f.text]

    (found,) = told(TASK)
    assert found.level == 'ok'
    assert found.text == '2 of 6 samples (33.3%) have fewer than 1 earlier keyframes: 2 at the start of a scene'
    (found,) = told(replace(TASK, num_frames=4))
    assert found.level == 'warning' and '6 of 6 samples (100.0%) have fewer than 3' in found.text

    def forget(infos):
        for info in infos:
            info.pop('scene_token'), info.pop('scene_name')
            info['sweeps'] = [] if info['token'] in ('sample-0', 'sample-1', 'sample-2') else info['sweeps']

    _change_infos(root, forget)
    (found,) = told(TASK)
    assert '4 of 6 samples (66.7%)' in found.text and '2 after a gap of over 5 s' in found.text
    assert '2 after a keyframe without sweeps' in found.text


def test_scenes_of_one_keyframe_without_sweeps_in_a_row_are_a_warning(tmp_path):
    fake = FakeNuScenes(tmp_path, keyframes=8, scenes=SCENES[:2])
    fake.write()
    write_sweep_infos(tmp_path, 'v1.0-mini', tmp_path, processes=1)

    def forget(infos):
        for info in infos:
            if info['scene_name'] == SCENES[0]:
                info['sweeps'] = []
            info.pop('scene_token'), info.pop('scene_name')

    _change_infos(tmp_path, forget)
    dataset = _open(tmp_path, occ_gt_root=None, test_mode=True)
    warnings = [f.text for f in inspect_dataset(dataset) if f.level == 'warning']
    assert any('6 keyframes without sweeps are followed by others within 5 s' in warning for warning in warnings)


def test_infos_without_camera_sweeps_are_a_warning(root):
    def change(infos):
        for info in infos:
            info['sweeps'] = [dict(data_path='x.bin')] if info['sweeps'] else []

    _change_infos(root, change)
    assert any('no camera sweeps' in warning for warning in _lines(root, 'warning'))


def test_only_what_is_used_is_looked_at(root):
    """The first sample of each scene has no history: images of other keyframes may be missing."""
    for path in (root / 'sweeps').rglob('*.jpg'):
        path.unlink()
    preflight(_open(root, load_interval=3), 'val')
    assert _open(root, load_interval=3).used_positions() == [0, 3]
    assert _open(root, max_samples=2).used_positions() == [0, 1]


def test_evaluation_without_labels_passes(root, capsys):
    shutil.rmtree(str(root / 'occ3d'))
    dataset = _open(root, occ_gt_root=None, test_mode=True)
    assert not any('label files' in finding.text for finding in inspect_dataset(dataset))
    preflight(dataset, 'test')
    assert capsys.readouterr().err == ''
    with pytest.raises(DataError, match='occ3d'):
        preflight(_open(root), 'train')


def test_a_large_set_is_looked_at_in_seconds(source):
    dataset = _open(source)
    dataset.infos = [
        dict(
            dataset.infos[1 if n % 40 else 0], token=f'sample-{n % 2}', timestamp=n * 500_000, scene_token=f's{n // 40}'
        )
        for n in range(28_130)
    ]
    dataset.positions = list(range(28_130))
    from loaders.history import History

    dataset._history = History(dataset.infos, TASK.cameras)
    start = time.process_time()
    findings = inspect_dataset(dataset)
    assert not [f for f in findings if f.level == 'error']
    assert time.process_time() - start < 10  # a handful of seconds; most of it to list what is used


@pytest.mark.parametrize(
    'count, wanted, expected', [(3, 5, [0, 1, 2]), (10, 1, [0]), (10, 2, [0, 9]), (10, 4, [0, 3, 6, 9]), (1, 1, [0])]
)
def test_spread(count, wanted, expected):
    assert spread(count, wanted) == expected


def test_the_script(root, tmp_path, monkeypatch, capsys):
    config = tmp_path / 'config.py'
    config.write_text(f"""
task = dict(label_set='occ3d', point_cloud_range=[-8, -8, -1, 8, 8, 5.4], num_frames=2, image_size=(32, 64))
model = dict(type='SparseOcc')
_set = dict(type='NuSceneOcc', data_root={str(root)!r}, occ_gt_root='occ3d', pipeline=[])
data = dict(train=dict(_set, ann_file='nuscenes_infos_train_sweep.pkl'),
            val=dict(_set, ann_file='nuscenes_infos_val_sweep.pkl'))
""")
    from tools import check_data

    monkeypatch.setattr(sys, 'argv', ['x', '--config', str(config), '--processes', '1'])
    run_main(check_data.main)
    out = capsys.readouterr().out
    assert 'train: [ok] ' in out and 'val: [ok] ' in out and '[error]' not in out
    path = _image(root)
    path.unlink()
    (root / 'nuscenes_infos_val_sweep.pkl').unlink()
    with pytest.raises(SystemExit) as stop:
        run_main(check_data.main)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err == 'error: 2 errors, listed above\n'
    assert f'train: [error] image {path} does not exist' in captured.out
    assert 'val: [error] ' in captured.out
