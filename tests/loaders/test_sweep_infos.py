"""gen_sweep_info: infos from the tables against pyquaternion and a second reading of the tables."""

import copy
import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_nuscenes import SCENES, STEP, FakeNuScenes
from pyquaternion import Quaternion

from lib.cli import run_main
from lib.errors import DataError, UserError
from lib.geometry import make_transform
from lib.infos import CameraUse, ego_from_lidar, global_from_camera, global_from_ego, load_infos
from lib.io import load_pickle_safe, save_pickle
from lib.task import NUSCENES_CAMERAS
from loaders.history import History
from loaders.prepare import parallel_map, tables
from loaders.prepare.sweep_infos import Choice, write_sweep_infos

EXACT = dict(rtol=0, atol=1e-9)  # poses are hundreds of metres: double precision leaves 1e-13 relative


@pytest.fixture(scope='module')
def fake(tmp_path_factory):
    fake = FakeNuScenes(tmp_path_factory.mktemp('nuscenes'))
    fake.write()
    return fake


@pytest.fixture(scope='module')
def infos(fake):
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    return load_pickle_safe(fake.root / 'nuscenes_infos_train_sweep.pkl')['infos']


def _rows(fake, table):
    return {row['token']: row for row in fake.tables[table]}


def _records(fake, channel, scene):
    """sample_data records of one sensor and scene, oldest first."""
    return sorted(
        (row for row in fake.tables['sample_data'] if f'/{scene}__{channel}__' in row['filename']),
        key=lambda row: row['timestamp'],
    )


def _global(fake, record):
    """(R, t) of a sensor in global, by pyquaternion."""
    calibration = _rows(fake, 'calibrated_sensor')[record['calibrated_sensor_token']]
    pose = _rows(fake, 'ego_pose')[record['ego_pose_token']]
    to_ego, to_global = Quaternion(calibration['rotation']), Quaternion(pose['rotation'])
    return (to_global * to_ego).rotation_matrix, to_global.rotate(np.array(calibration['translation'])) + pose[
        'translation'
    ]


def _annotations(fake, info):
    return [row for row in fake.tables['sample_annotation'] if row['sample_token'] == info['token']]


def test_every_split_has_its_scenes_in_time_order(fake, infos):
    content = load_pickle_safe(fake.root / 'nuscenes_infos_val_sweep.pkl')
    assert content['metadata'] == dict(version='v1.0-mini')
    assert [info['scene_name'] for info in content['infos']] == [SCENES[2]] * 3
    assert [info['scene_name'] for info in infos] == [SCENES[0]] * 3 + [SCENES[1]] * 3
    assert [info['timestamp'] for info in infos] == sorted(info['timestamp'] for info in infos)
    assert not (fake.root / 'nuscenes_infos_test_sweep.pkl').exists()


def _check_sweeps(infos):
    """Every sweep is the image so many steps before its keyframe, known by its time; none at scene starts."""
    for info in infos:
        for name in NUSCENES_CAMERAS:
            if info['token'] in ('sample-0', 'sample-3'):
                assert info['sweeps'] == []
                continue
            times = [sweep[name]['timestamp'] for sweep in info['sweeps']]
            assert times == [info['cams'][name]['timestamp'] - STEP * step for step in range(1, 6)]
            paths = [sweep[name]['data_path'] for sweep in info['sweeps']]
            assert all(path.startswith('data/nuscenes/sweeps/{}/{}'.format(name, info['scene_name'])) for path in paths)


def test_sweeps_are_the_five_images_before_each_keyframe_newest_first(infos):
    _check_sweeps(infos)


@pytest.mark.parametrize(
    'mutation', ['one fewer', 'one more', 'oldest first', 'starting at the keyframe', 'across the scene']
)
def test_the_sweep_check_notices_a_mistake(fake, tmp_path, monkeypatch, mutation):
    right = tables._collect_sweeps

    def wrong(nusc, records, cams):
        if mutation == 'oldest first':
            return right(nusc, records, cams)[::-1]
        return [cams] + right(nusc, records, cams)[:-1]

    if mutation in ('one fewer', 'one more'):
        monkeypatch.setattr(tables, 'SWEEPS_PER_KEYFRAME', 4 if mutation == 'one fewer' else 6)
    elif mutation == 'across the scene':
        starts = dict(fake.tables['sample'][3], prev='sample-2')
        monkeypatch.setitem(
            fake.tables, 'sample', [starts if row['token'] == 'sample-3' else row for row in fake.tables['sample']]
        )
        monkeypatch.setattr(fake, 'root', tmp_path)
        fake.write()
    else:
        monkeypatch.setattr(tables, '_collect_sweeps', wrong)
    write_sweep_infos(fake.root, 'v1.0-mini', tmp_path, processes=1)
    with pytest.raises(AssertionError):
        _check_sweeps(load_pickle_safe(tmp_path / 'nuscenes_infos_train_sweep.pkl')['infos'])


def test_poses_are_kept_as_rows(fake, infos):
    for info in infos[:3]:
        for name in NUSCENES_CAMERAS:
            records = {row['timestamp']: row for row in _records(fake, name, info['scene_name'])}
            for entry in [info['cams'][name]] + [sweep[name] for sweep in info['sweeps']]:
                rotation, translation = _global(fake, records[entry['timestamp']])
                np.testing.assert_allclose(entry['sensor2global_rotation'], rotation.T, **EXACT)
                np.testing.assert_allclose(entry['sensor2global_translation'], translation, **EXACT)
                point = np.array([1.0, 2.0, 3.0])
                np.testing.assert_allclose(
                    point @ entry['sensor2global_rotation'] + entry['sensor2global_translation'],
                    rotation @ point + translation,
                    **EXACT,
                )


def test_camera_entries_have_the_documented_keys(infos):
    sweep = infos[1]['sweeps'][0]['CAM_FRONT']
    assert set(sweep) == {
        'data_path',
        'sensor2global_rotation',
        'sensor2global_translation',
        'cam_intrinsic',
        'timestamp',
    }
    assert set(infos[1]['cams']['CAM_FRONT']) == set(sweep) | {
        'type',
        'sample_data_token',
        'sensor2lidar_rotation',
        'sensor2lidar_translation',
    }


def test_keyframes_refer_cameras_and_boxes_to_the_lidar(fake, infos):
    for info in infos[:3]:
        lidar_to_global = _global(
            fake,
            next(
                row
                for row in _records(fake, 'LIDAR_TOP', info['scene_name'])
                if row['timestamp'] == info['timestamp'] + 6000
            ),
        )
        for entry in info['cams'].values():
            rotation, translation = _global(fake, _rows(fake, 'sample_data')[entry['sample_data_token']])
            in_lidar = lidar_to_global[0].T @ (rotation @ [1.0, 2.0, 3.0] + translation - lidar_to_global[1])
            np.testing.assert_allclose(
                entry['sensor2lidar_rotation'] @ [1.0, 2.0, 3.0] + entry['sensor2lidar_translation'], in_lidar, **EXACT
            )
        annotations = _annotations(fake, info)
        assert len(annotations) == len(info['gt_boxes']) == 2
        for box, annotation in zip(info['gt_boxes'], annotations):
            centre = lidar_to_global[0].T @ (np.array(annotation['translation']) - lidar_to_global[1])
            np.testing.assert_allclose(box[:3], centre, **EXACT)
            width, length, height = annotation['size']
            assert box[3:6].tolist() == [length, width, height]
            turn = Quaternion(matrix=lidar_to_global[0].T) * Quaternion(annotation['rotation'])
            np.testing.assert_allclose(box[6], turn.yaw_pitch_roll[0], **EXACT)


def test_names_velocity_and_valid_flag(fake, infos):
    names = {row['token']: row['name'] for row in fake.tables['category']}
    instances = _rows(fake, 'instance')
    short = {
        'vehicle.car': 'car',
        'human.pedestrian.adult': 'pedestrian',
        'human.pedestrian.stroller': 'human.pedestrian.stroller',
    }  # not a detection class: name kept
    for info in infos:
        annotations = _annotations(fake, info)
        expected = [short[names[instances[row['instance_token']]['category_token']]] for row in annotations]
        assert info['gt_names'].tolist() == expected
        assert info['valid_flag'].tolist() == [row['num_lidar_pts'] > 0 for row in annotations]
        assert info['gt_velocity'].shape == (2, 2) and np.isfinite(info['gt_velocity']).all()


def test_processes_do_not_change_the_result(fake, infos, tmp_path):
    write_sweep_infos(fake.root, 'v1.0-mini', tmp_path, processes=2)
    _assert_same(load_pickle_safe(tmp_path / 'nuscenes_infos_train_sweep.pkl')['infos'], infos)


def _as_mmdetection3d(fake, infos, lidar_sweep):
    """The infos as MMDetection3D 1.0 writes them, in another order."""
    base = copy.deepcopy(infos)
    calibrations, poses, records = (_rows(fake, t) for t in ('calibrated_sensor', 'ego_pose', 'sample_data'))
    for info in base:
        for entry in info['cams'].values():
            record = records[entry['sample_data_token']]
            calibration = calibrations[record['calibrated_sensor_token']]
            pose = poses[record['ego_pose_token']]
            del entry['sensor2global_rotation'], entry['sensor2global_translation']
            entry.update(
                data_path='./data/nuscenes/' + record['filename'],
                sensor2ego_translation=calibration['translation'],
                sensor2ego_rotation=calibration['rotation'],
                ego2global_translation=pose['translation'],
                ego2global_rotation=pose['rotation'],
            )
        info['sweeps'] = [lidar_sweep] if info['sweeps'] else []
        del info['scene_token'], info['scene_name']
    return base[::-1]


def _assert_same(a, b, path=''):
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            _assert_same(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, list) and a and isinstance(a[0], dict):
        assert len(a) == len(b), path
        for position, (x, y) in enumerate(zip(a, b)):
            _assert_same(x, y, f'{path}[{position}]')
    else:
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_infos_of_mmdetection3d_are_extended_to_the_same(fake, infos, tmp_path):
    base = _as_mmdetection3d(fake, infos, dict(data_path='x.bin', type='lidar'))
    val = load_pickle_safe(fake.root / 'nuscenes_infos_val_sweep.pkl')['infos']
    for split, some in (('train', base), ('val', _as_mmdetection3d(fake, val, dict(data_path='x.bin')))):
        save_pickle(tmp_path / (f'nuscenes_infos_{split}.pkl'), dict(infos=some, metadata=dict(version='v1.0-mini')))
    write_sweep_infos(fake.root, 'v1.0-mini', tmp_path, from_infos=tmp_path, processes=1)
    _assert_same(load_pickle_safe(tmp_path / 'nuscenes_infos_train_sweep.pkl')['infos'], infos)


def test_mmdetection3d_entries_give_the_same_pose(fake, infos):
    base = _as_mmdetection3d(fake, infos, {})[::-1]
    for info, extended in zip(base, infos):
        for name, entry in info['cams'].items():
            np.testing.assert_allclose(global_from_camera(entry), global_from_camera(extended['cams'][name]), **EXACT)


def test_infos_of_another_version_are_refused(fake, infos, tmp_path):
    strange = [dict(infos[0], token='elsewhere')]
    for split in ('train', 'val'):
        save_pickle(tmp_path / (f'nuscenes_infos_{split}.pkl'), dict(infos=strange, metadata={}))
    with pytest.raises(DataError, match='nuscenes_infos_train.pkl holds keyframe elsewhere.*--version'):
        write_sweep_infos(fake.root, 'v1.0-mini', tmp_path, from_infos=tmp_path, processes=1)


def test_a_camera_that_starts_late_repeats_the_last_complete_sweep(tmp_path):
    fake = FakeNuScenes(tmp_path, keyframes=2, scenes=SCENES[:1])
    late = _records(fake, 'CAM_BACK', SCENES[0])
    removed, first = late[:3], late[3]
    first['prev'] = ''
    fake.tables['sample_data'] = [row for row in fake.tables['sample_data'] if row not in removed[1:]]
    fake.write()
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    sweeps = load_infos(fake.root / 'nuscenes_infos_train_sweep.pkl').infos[1]['sweeps']
    key = late[6]['timestamp']
    back, front = ([sweep[name]['timestamp'] for sweep in sweeps] for name in ('CAM_BACK', 'CAM_FRONT'))
    assert [(key - time) // STEP for time in back] == [1, 2, 3, 3, 3]
    assert front[2:] == [front[2]] * 3


def test_without_recorded_sweeps_the_keyframe_is_repeated_and_history_stays_at_2_hz(tmp_path):
    FakeNuScenes(tmp_path, keyframes=3, sweeps=0, scenes=SCENES[:1]).write()
    write_sweep_infos(tmp_path, 'v1.0-mini', tmp_path, processes=1)
    infos = load_infos(tmp_path / 'nuscenes_infos_train_sweep.pkl').infos
    entries = History(infos, NUSCENES_CAMERAS).entries(2, 100)
    times = [entry['CAM_FRONT']['timestamp'] for entry in entries]
    keys = [info['cams']['CAM_FRONT']['timestamp'] for info in infos]
    assert times == [keys[2]] * 5 + [keys[1]] * 6 + [keys[0]]


def test_cameras_stand_in_the_order_that_published_loaders_take_from_the_file(tmp_path):
    fake = FakeNuScenes(tmp_path, keyframes=2, scenes=SCENES[:1])
    fake.tables['sample_data'].reverse()
    fake.write()
    write_sweep_infos(tmp_path, 'v1.0-mini', tmp_path, processes=1)
    infos = load_infos(tmp_path / 'nuscenes_infos_train_sweep.pkl').infos
    for frame in [infos[0]['cams'], infos[1]['cams']] + infos[1]['sweeps']:
        assert tuple(frame) == NUSCENES_CAMERAS
    for info in infos:
        info['cams'] = dict(sorted(info['cams'].items()))
    save_pickle(tmp_path / 'nuscenes_infos_train.pkl', dict(infos=infos, metadata={}))
    write_sweep_infos(tmp_path, 'v1.0-mini', tmp_path, from_infos=tmp_path, processes=1)
    extended = load_infos(tmp_path / 'nuscenes_infos_train_sweep.pkl').infos
    assert all(tuple(frame) == NUSCENES_CAMERAS for frame in [extended[1]['cams']] + extended[1]['sweeps'])


def test_tables_without_lidar_refer_to_ego(fake, infos, tmp_path):
    bare = copy.deepcopy(fake)
    bare.root = tmp_path
    bare.tables['sample_data'] = [r for r in bare.tables['sample_data'] if '/LIDAR_TOP/' not in r['filename']]
    bare.write()
    write_sweep_infos(tmp_path, 'v1.0-mini', tmp_path, processes=1)
    found = load_infos(tmp_path / 'nuscenes_infos_train_sweep.pkl', use=CameraUse(NUSCENES_CAMERAS)).infos
    point = np.array([4.0, -3.0, 2.0, 1.0])
    for info, whole in zip(found, infos):
        assert info['lidar_path'] == '' and (ego_from_lidar(info) == np.eye(4)).all()
        assert len(info['gt_boxes']) == len(whole['gt_boxes'])
        centres = [global_from_ego(i) @ ego_from_lidar(i) @ np.append(i['gt_boxes'][0, :3], 1.0) for i in (info, whole)]
        np.testing.assert_allclose(*centres, **EXACT)
        for name in NUSCENES_CAMERAS:
            to_global = global_from_ego(info) @ ego_from_lidar(info) @ np.linalg.inv(_to_camera(info['cams'][name]))
            np.testing.assert_allclose(to_global @ point, global_from_camera(whole['cams'][name]) @ point, **EXACT)


def _to_camera(entry):
    return np.linalg.inv(make_transform(entry['sensor2lidar_rotation'], entry['sensor2lidar_translation']))


@pytest.fixture
def copied(fake, tmp_path):
    shutil.copytree(str(fake.root), str(tmp_path / 'data'))
    for path in (tmp_path / 'data').glob('*.pkl'):
        path.unlink()
    return tmp_path / 'data'


def _write(root, **choice):
    written = write_sweep_infos(root, 'v1.0-mini', root, processes=1, choice=Choice(**choice))
    return {item.path.name: (item.scenes, item.keyframes) for item in written}


def test_chosen_scenes_alone_are_written(copied):
    assert _write(copied, scenes=[SCENES[1]]) == {'nuscenes_infos_train_sweep.pkl': (1, 3)}
    with pytest.raises(DataError, match="--scenes: v1.0-mini has no scene 'scene-0554'; did you mean 'scene-0553'"):
        _write(copied, scenes=['scene-0554'])


def test_chosen_scenes_of_mmdetection3ds_infos(fake, infos, copied):
    base = _as_mmdetection3d(fake, infos, dict(data_path='x.bin'))
    save_pickle(copied / 'nuscenes_infos_train.pkl', dict(infos=base, metadata={}))
    written = write_sweep_infos(
        copied, 'v1.0-mini', copied, from_infos=copied, processes=1, choice=Choice(scenes=[SCENES[0]])
    )
    assert [(item.scenes, item.keyframes) for item in written] == [(1, 3)]


@pytest.mark.parametrize('folder', ['samples', 'sweeps'])
def test_scenes_that_lack_an_image_may_be_left_out(copied, folder, capsys):
    next((copied / folder / 'CAM_BACK').glob('scene-0061*')).unlink()
    assert _write(copied, only_present=True)['nuscenes_infos_train_sweep.pkl'] == (1, 3)
    assert 'note: 1 of 2 scenes of train lack images: scene-0061' in capsys.readouterr().out
    shutil.rmtree(str(copied / 'samples'))
    with pytest.raises(DataError, match='no scene is whole.*samples'):
        _write(copied, only_present=True)


def test_files_of_other_versions_and_of_more_scenes_are_not_replaced(copied):
    path = copied / 'nuscenes_infos_train_sweep.pkl'
    _write(copied)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r'holds 6 keyframes, the chosen scenes have 3; give --out-prefix'):
        _write(copied, scenes=[SCENES[0]])
    content = load_pickle_safe(path)
    content['metadata']['version'] = 'v1.0-trainval'
    save_pickle(path, content)
    with pytest.raises(DataError, match='train_sweep.pkl holds infos of version v1.0-trainval, not v1.0-mini.*prefix'):
        _write(copied)
    assert load_infos(path).version == 'v1.0-trainval'
    assert _write(copied, scenes=[SCENES[0]], prefix='mini_') == {'mini_nuscenes_infos_train_sweep.pkl': (1, 3)}
    _write(copied, overwrite=True)
    assert path.read_bytes() == whole
    _write(copied)  # the same again needs no word


def test_keyframes_that_lack_a_camera_are_counted_and_refused_when_opened(copied, fake, capsys):
    keyframe, sweep = (_records(fake, 'CAM_BACK', SCENES[0])[number] for number in (6, 8))
    rows = [row for row in fake.tables['sample_data'] if row['token'] != keyframe['token']]
    (copied / 'v1.0-mini' / 'sample_data.json').write_text(json.dumps(rows))
    _write(copied)
    assert 'note: 1 of 6 keyframes of train lack a camera in the tables, the first: sample-1 (CAM_BACK)' in (
        capsys.readouterr().out
    )
    with pytest.raises(DataError, match="keyframe sample-1 has no camera 'CAM_BACK'"):
        load_infos(copied / 'nuscenes_infos_train_sweep.pkl', use=CameraUse(NUSCENES_CAMERAS))
    rows = [row for row in rows if row['token'] != sweep['token']]
    (copied / 'v1.0-mini' / 'sample_data.json').write_text(json.dumps(rows))
    with pytest.raises(
        DataError, match="scene scene-0061: the tables of v1.0-mini lack 'sample_data-.*keyframe sample-2"
    ):
        _write(copied)


def test_any_version_with_splits_of_its_own(tmp_path):
    fake = FakeNuScenes(tmp_path, keyframes=2, version='v1.0-mine', scenes=('alpha', 'beta'))
    fake.write()
    with pytest.raises(DataError, match='scene alpha belongs to no split.*splits.json'):
        write_sweep_infos(tmp_path, 'v1.0-mine', tmp_path, processes=1)
    (tmp_path / 'v1.0-mine' / 'splits.json').write_text('{"val": ["alpha"], "train": ["beta"]}')
    written = write_sweep_infos(tmp_path, 'v1.0-mine', tmp_path, processes=1)
    assert [(item.path.name, item.scenes, item.keyframes) for item in written] == [
        ('nuscenes_infos_train_sweep.pkl', 1, 2),
        ('nuscenes_infos_val_sweep.pkl', 1, 2),
    ]


def test_a_version_without_annotations(tmp_path):
    fake = FakeNuScenes(tmp_path, keyframes=2, version='v1.0-test', scenes=('scene-0077',))
    fake.tables['sample_annotation'], fake.tables['instance'] = [], []
    fake.write()
    written = write_sweep_infos(tmp_path, 'v1.0-test', tmp_path, processes=1)
    assert [item.path.name for item in written] == ['nuscenes_infos_test_sweep.pkl']
    assert 'gt_boxes' not in load_infos(written[0].path).infos[0]


def test_missing_tables_are_named(fake, tmp_path):
    with pytest.raises(
        DataError,
        match=r'v1.0-trainval.*does not exist; check --data-root and --version '
        r'\(versions there: v1.0-mini\)',
    ):
        write_sweep_infos(fake.root, 'v1.0-trainval', tmp_path)


def test_damaged_tables_are_named(tmp_path):
    fake = FakeNuScenes(tmp_path, keyframes=2)
    fake.write()
    (tmp_path / 'v1.0-mini' / 'sample_data.json').write_text('[{')
    with pytest.raises(DataError, match='tables in .*v1.0-mini cannot be used'):
        write_sweep_infos(tmp_path, 'v1.0-mini', tmp_path)


def test_the_script_says_what_it_wrote_and_fails_in_one_line(fake, tmp_path, monkeypatch, capsys):
    import gen_sweep_info

    def run(*options):
        monkeypatch.setattr(sys, 'argv', ['gen_sweep_info.py', '--data-root', str(fake.root)] + list(options))
        run_main(gen_sweep_info.main)
        return capsys.readouterr()

    said = run('--version', 'v1.0-mini', '--out', str(tmp_path)).out
    assert 'train_sweep.pkl: 2 scenes, 6 keyframes' in said
    with pytest.raises(SystemExit) as stop:
        run('--version', 'v1.0-none')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1


def _kill_self(_, item):
    import os
    import signal

    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_an_error_and_not_a_hang():
    with pytest.raises(UserError, match='a worker process was killed.*--processes'):
        list(parallel_map(_kill_self, [0, 1, 2, 3], None, 'test', processes=2))


def test_workers_end_with_the_process_that_started_them():
    """What they print to ends when they do; reading it would take for ever otherwise."""
    code = """
import os, signal
from loaders.prepare import parallel_map
for _ in parallel_map(max, [1] * 64, 0, 'test', 2, progress=False):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, '-c', code], cwd=str(root), stdout=subprocess.PIPE, timeout=120)
    assert ended.returncode == -signal.SIGKILL


def _square(shared, item):
    return shared * item * item


@pytest.mark.parametrize('processes', [1, 2])
def test_results_come_in_order(processes):
    results = list(parallel_map(_square, list(range(20)), 3, 'test', processes))
    assert results == [3 * i * i for i in range(20)]


def test_pickles_are_of_a_protocol_that_python_3_8_reads(fake, infos):
    content = (fake.root / 'nuscenes_infos_train_sweep.pkl').read_bytes()
    assert content[:2] == b'\x80\x04' and pickle.loads(content)['infos'][0]['token'] == infos[0]['token']
