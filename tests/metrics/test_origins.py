"""Scenes of lists of keyframes, and ray origins, on made-up drives and on real infos."""

import json

import numpy as np
import pytest

from lib.errors import DataError
from lib.infos import ego_from_lidar, global_from_ego, load_infos, split_scenes
from lib.io import save_npz, save_pickle
from lib.metrics.origins import name_scenes, read_infos, read_keyframes, read_tables, scene_ray_origins, write_poses

LIDAR = np.array([0.9, 0.1, 1.8])


def keyframe(token, seconds, x=0.0, yaw=0.0, **extra):
    """An info of an ego at (100 + x, 200, 1), turned by ``yaw``; the LiDAR is mounted a quarter turned."""
    half = np.sqrt(0.5)
    return dict(
        token=token,
        timestamp=int(1.5e15 + seconds * 1e6),
        cams={},
        lidar2ego_translation=LIDAR.tolist(),
        lidar2ego_rotation=[half, 0, 0, -half],
        ego2global_translation=[100.0 + x, 200.0, 1.0],
        ego2global_rotation=[np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)],
        **extra,
    )


def drive(name, begin, count, speed=2.0, **extra):
    return [keyframe(f'{name}{i}', begin + 0.5 * i, speed * i, **extra) for i in range(count)]


def tokens(infos, scenes):
    return [[infos[index]['token'] for index in scene] for scene in scenes]


def test_scenes_end_at_time_gaps():
    infos = drive('a', 0, 3) + drive('b', 7, 2)
    assert tokens(infos, split_scenes(infos)) == [['a0', 'a1', 'a2'], ['b0', 'b1']]
    infos = drive('a', 0, 3) + drive('b', 5.9, 2)  # 4.9 s after a2: the same scene
    assert len(split_scenes(infos)) == 1


@pytest.mark.parametrize('key', ['scene_token', 'scene_name'])
def test_named_scenes_need_no_gap(key):
    one, two = {key: 'one'}, {key: 'two'}
    infos = drive('a', 0, 3, **one) + drive('b', 1.5, 2, **two) + drive('c', 100, 1, **one)
    assert tokens(infos, split_scenes(infos)) == [['a0', 'a1', 'a2', 'c0'], ['b0', 'b1']]


def test_first_keyframes_begin_scenes():
    infos = [
        dict(info, sweeps=[1] if info['token'][1] != '0' else []) for info in drive('a', 0, 3) + drive('b', 1.5, 2)
    ]
    assert tokens(infos, split_scenes(infos)) == [['a0', 'a1', 'a2'], ['b0', 'b1']]
    without_any = [dict(info, sweeps=[]) for info in drive('a', 0, 3)]  # says nothing about scenes
    assert len(split_scenes(without_any)) == 1


def test_order_does_not_matter():
    infos = drive('a', 0, 4) + drive('b', 10, 4)
    order = np.random.default_rng(0).permutation(8)
    shuffled = [infos[index] for index in order]
    assert tokens(shuffled, split_scenes(shuffled)) == tokens(infos, split_scenes(infos))
    expected, origins = scene_ray_origins(infos), scene_ray_origins(shuffled)
    for token in expected:
        np.testing.assert_array_equal(origins[token], expected[token])


def test_own_lidar_is_the_mounting_position():
    origins = scene_ray_origins([keyframe('a', 0, yaw=0.7)])
    np.testing.assert_allclose(origins['a'], [LIDAR], atol=1e-6)  # float32 in the LiDAR frame


def test_positions_are_in_the_samples_ego_frame():
    infos = [keyframe('a', 0, 0.0), keyframe('b', 0.5, 10.0, yaw=np.pi / 2)]
    origins = scene_ray_origins(infos)
    # b's LiDAR: mounted at (0.9, 0.1) in an ego turned left, 10 m ahead of a
    np.testing.assert_allclose(origins['a'], [LIDAR, [10 - 0.1, 0.9, 1.8]], atol=4e-6)
    # a's LiDAR seen from b, which looks along global y: a is 10 m to b's left
    np.testing.assert_allclose(origins['b'], [[0.1, 10 - 0.9, 1.8], LIDAR], atol=4e-6)


@pytest.mark.parametrize(
    'scene_range, low, high',
    [
        ((-40, -40, -1, 40, 40, 5.4), -39, 39),
        ((-20, -40, -1, 30, 40, 5.4), -19, 29),
        ((-40, -0.8, -1, 40, 40, 5.4), 0, 0),
    ],
)  # the last range has no room for the LiDAR's y = 0.1
def test_only_positions_a_metre_inside_the_sides(scene_range, low, high):
    infos = drive('a', 0, 120, speed=1.0)
    x = scene_ray_origins(infos, scene_range, max_origins=1000)['a60'][:, 0]
    offsets = LIDAR[0] + np.arange(-60, 60)
    np.testing.assert_allclose(x, offsets[(offsets > low) & (offsets < high)], atol=4e-6)


def test_more_than_eight_are_thinned_evenly():
    infos = drive('a', 0, 20, speed=1.0)
    origins = scene_ray_origins(infos)['a0']
    np.testing.assert_allclose(origins[:, 0] - LIDAR[0], np.round(np.linspace(0, 19, 8)), atol=4e-6)
    assert len(scene_ray_origins(infos[:8])['a0']) == 8
    assert len(scene_ray_origins(infos, max_origins=3)['a0']) == 3


def test_other_scenes_give_no_origins():
    infos = drive('a', 0, 2) + drive('b', 10, 3)
    assert {token: len(origins) for token, origins in scene_ray_origins(infos).items()} == {
        'a0': 2,
        'a1': 2,
        'b0': 3,
        'b1': 3,
        'b2': 3,
    }


def test_real_infos(real_dir):
    infos = load_infos(real_dir / 'nuscenes_mini_infos_val.pkl').infos
    assert [len(scene) for scene in split_scenes(infos)] == [40, 41]
    origins = scene_ray_origins(infos)
    for info in infos:
        mine = np.asarray(info['lidar2ego_translation'])
        distance = np.linalg.norm(origins[info['token']] - mine, axis=1)
        assert len(distance) == 8 and np.abs(origins[info['token']][:, :2]).max() < 39
    thinned = infos[::3]
    assert [len(scene) for scene in split_scenes(thinned)] == [14, 13]
    of_thinned = scene_ray_origins(thinned)
    everywhere = scene_ray_origins(infos, max_origins=100)
    for token, positions in of_thinned.items():  # each position of the thinned list is one of the full list
        gaps = np.linalg.norm(positions[:, None] - everywhere[token][None], axis=-1).min(axis=1)
        assert gaps.max() == 0


# Files of poses


@pytest.mark.parametrize('suffix', ['.json', '.npz'])
def test_a_small_file_of_poses_gives_the_same_origins(tmp_path, suffix):
    infos = drive('a', 0, 12, scene_name='scene-0001') + drive('b', 100, 9, scene_name='scene-0002')
    path = tmp_path / f'poses{suffix}'
    write_poses(path, infos[::-1], {'scene-0001': 'Night, rain', 'scene-0002': 'Parked cars', 'other': 'Night'})
    found, expected = read_keyframes(path), scene_ray_origins(infos)
    assert list(found.origins) == list(expected) and found.night == {'scene-0001': True, 'scene-0002': False}
    assert found.scenes == {info['token']: info['scene_name'] for info in infos}
    for token, origins in expected.items():
        np.testing.assert_array_equal(found.origins[token], origins)


def test_real_infos_give_the_same_origins_through_a_file(real_dir, tmp_path):
    infos = load_infos(real_dir / 'nuscenes_mini_infos_val.pkl').infos
    write_poses(tmp_path / 'poses.json', infos)
    direct, through = read_keyframes(real_dir / 'nuscenes_mini_infos_val.pkl'), read_keyframes(tmp_path / 'poses.json')
    assert through.scenes == direct.scenes and len(set(direct.scenes.values())) == 2
    assert all(np.array_equal(through.origins[token], origins) for token, origins in direct.origins.items())
    assert (tmp_path / 'poses.json').stat().st_size < 900 * len(infos)
    assert len(read_keyframes(tmp_path / 'poses.json', (-10, -40, -1, 10, 40, 5.4)).origins) == len(infos)


def test_scenes_without_names_are_called_after_their_first_keyframe():
    assert name_scenes(drive('a', 0, 2) + drive('b', 100, 1)) == {'a0': 'a0', 'a1': 'a0', 'b0': 'b0'}


def later_format(info):
    """The keyframe as MMDetection3D 1.1 and later keep it."""
    matrices = dict(ego2global=global_from_ego(info).tolist())
    lidar = dict(lidar2ego=ego_from_lidar(info).tolist())
    return dict(matrices, lidar_points=lidar, token=info['token'], timestamp=info['timestamp'] / 1e6)


def test_infos_of_later_versions_give_the_same_origins(tmp_path):
    infos = drive('a', 0, 12) + drive('b', 100, 9)
    save_pickle(tmp_path / 'later.pkl', dict(data_list=[later_format(info) for info in infos], metainfo={}))
    found, expected = read_keyframes(tmp_path / 'later.pkl'), scene_ray_origins(infos)
    assert found.scenes == name_scenes(infos)
    for token, origins in expected.items():
        np.testing.assert_allclose(found.origins[token], origins, atol=4e-6)  # one unit of the rounding to float32
    save_pickle(tmp_path / 'later.pkl', dict(data_list=[dict(token='a')]))
    with pytest.raises(DataError, match='later.pkl has a keyframe without token'):
        read_keyframes(tmp_path / 'later.pkl')


def test_origins_can_be_given_as_they_are(golden_dir):
    with np.load(str(golden_dir / 'origins.npz')) as file:
        arrays = {name: file[name] for name in file.files}
    found = read_keyframes(golden_dir / 'origins.npz')
    assert list(found.origins) == arrays['token'].tolist()
    for token, count, origins in zip(arrays['token'], arrays['count'], arrays['origins']):
        np.testing.assert_array_equal(found.origins[str(token)], origins[:count])
    assert len(set(found.scenes.values())) == 2


def test_tables_give_what_infos_give(toy_root, tmp_path):
    infos = read_infos(toy_root / 'nuscenes_infos_val_sweep.pkl')
    poses = read_tables(toy_root / 'v1.0-mini')
    of_val = [info for info in poses.infos if info['token'] in {info['token'] for info in infos}]
    assert len(of_val) == len(infos) < len(poses.infos)
    from_tables, from_infos = scene_ray_origins(poses.infos), scene_ray_origins(infos)
    for token, origins in from_infos.items():
        np.testing.assert_allclose(from_tables[token], origins, atol=4e-6)
    assert set(poses.descriptions) == {info['scene_name'] for info in poses.infos}


@pytest.mark.parametrize(
    'content, words',
    [
        ([], 'is no file of poses'),
        (dict(kind='lidar poses', keyframes=[], descriptions=[]), "'descriptions' must be"),
        (dict(kind='lidar poses', keyframes=[dict(token='a')]), "keyframe a.*'timestamp' is missing"),
        (dict(kind='lidar poses', keyframes=[5]), 'entry 0 is a int'),
    ],
)
def test_damaged_files_are_named(tmp_path, content, words):
    (tmp_path / 'poses.json').write_text(json.dumps(content))
    with pytest.raises(DataError, match=f'poses.json.*{words}'):
        read_keyframes(tmp_path / 'poses.json')


@pytest.mark.parametrize(
    'arrays, words',
    [
        (dict(token=np.array(['a'])), "lacks 'scene_name'"),
        (dict(token=np.array(['a']), origins=np.zeros((2, 8, 3))), "must hold 'token'"),
        (dict(token=np.array(['a', 'a']), origins=np.zeros((2, 8, 3))), 'names a sample twice'),
        (dict(token=np.array(['a']), origins=np.full((1, 8, 3), np.nan)), "must hold 'token'"),
    ],
)
def test_damaged_arrays_are_named(tmp_path, arrays, words):
    save_npz(tmp_path / 'poses.npz', arrays)
    with pytest.raises(DataError, match=words):
        read_keyframes(tmp_path / 'poses.npz')
    with pytest.raises(DataError, match='must end in .json or .npz'):
        write_poses(tmp_path / 'poses.txt', drive('a', 0, 1))
