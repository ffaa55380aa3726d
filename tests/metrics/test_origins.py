"""Scenes of lists of keyframes, and ray origins, on made-up drives and on real infos."""

import numpy as np
import pytest

from lib.infos import load_infos, split_scenes
from lib.metrics.origins import scene_ray_origins

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
