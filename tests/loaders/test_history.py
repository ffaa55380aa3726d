"""Histories: their order, where they end, and which of their entries a sample uses."""

import collections
import pickle

import numpy as np
import pytest

from lib.task import NUSCENES_CAMERAS
from loaders.history import History, choose_test_frames, choose_train_frames, history_limit

CAMERAS = ('CAM_A', 'CAM_B')
SECOND = 1_000_000


def _cams(name):
    return {camera: dict(data_path=f'samples/{camera}/{name}.jpg') for camera in CAMERAS}


def _scene(number, keyframes, named):
    infos = []
    for k in range(keyframes):
        name = f's{number}k{k}'
        sweeps = [_cams(f'{name}-sweep{step}') for step in range(5)] if k else []
        info = dict(token=name, timestamp=number * 20 * SECOND + k * SECOND // 2, cams=_cams(name), sweeps=sweeps)
        infos.append(dict(info, scene_token=f'scene{number}') if named else info)
    return infos


def _names(entries):
    return [entry['CAM_A']['data_path'].split('/')[-1][:-4] for entry in entries]


def _expected(number, k):
    names = []
    for keyframe in range(k, 0, -1):
        names += [f's{number}k{keyframe}-sweep{step}' for step in range(5)]
        names.append(f's{number}k{keyframe - 1}')
    return names


@pytest.mark.parametrize('named', [True, False])
def test_history_runs_back_to_the_start_of_the_scene_and_no_further(named):
    infos = _scene(0, 4, named) + _scene(1, 3, named)
    history = History(infos, CAMERAS)
    for index, info in enumerate(infos):
        number, k = int(info['token'][1]), int(info['token'][3])
        assert _names(history.entries(index, 1000)) == _expected(number, k)


@pytest.mark.parametrize('named', [True, False])
def test_adjacent_scenes_do_not_mix(named):
    infos = _scene(0, 3, named) + _scene(1, 3, named)
    for info in infos[3:]:
        info['timestamp'] -= 37 * SECOND // 2  # the second scene starts 0.5 s after the first one ends
    history = History(infos, CAMERAS)
    assert history.entries(3, 1000) == [] and history.previous(3) is None
    assert _names(history.entries(5, 1000)) == _expected(1, 2)


def test_interleaved_scenes_do_not_mix():
    infos = sorted(
        _scene(0, 3, True) + [dict(info, timestamp=info['timestamp'] - 20 * SECOND + 1) for info in _scene(1, 3, True)],
        key=lambda info: info['timestamp'],
    )
    assert [info['token'] for info in infos][:3] == ['s0k0', 's1k0', 's0k1']
    history = History(infos, CAMERAS)
    for index, info in enumerate(infos):
        assert _names(history.entries(index, 1000)) == _expected(int(info['token'][1]), int(info['token'][3]))


@pytest.mark.parametrize('named', [True, False])
def test_a_list_without_the_start_of_a_scene_ends_with_the_sweeps_that_are_there(named):
    infos = _scene(0, 2, named) + _scene(1, 4, named)[2:]
    history = History(infos, CAMERAS)
    assert _names(history.entries(2, 1000)) == [f's1k2-sweep{step}' for step in range(5)]
    expected = _expected(1, 3)[:6] + [f's1k2-sweep{step}' for step in range(5)]
    assert _names(history.entries(3, 1000)) == expected


def test_a_list_that_lacks_keyframes_keeps_the_order_and_the_scene():
    infos = _scene(0, 6, True)[::2]
    names = _names(History(infos, CAMERAS).entries(2, 1000))
    sweeps = {k: [f's0k{k}-sweep{step}' for step in range(5)] for k in (2, 4)}
    assert names == sweeps[4] + ['s0k2'] + sweeps[2] + ['s0k0']


def test_an_incomplete_sweep_takes_the_entry_before_it():
    infos = _scene(0, 2, True)
    del infos[1]['sweeps'][0]['CAM_B']
    del infos[1]['sweeps'][3]['CAM_A']
    names = _names(History(infos, CAMERAS).entries(1, 1000))
    assert names == ['s0k1', 's0k1-sweep1', 's0k1-sweep2', 's0k1-sweep2', 's0k1-sweep4', 's0k0']


def test_lidar_sweeps_of_mmdetection3d_are_no_images():
    infos = _scene(0, 3, False)
    for info in infos[1:]:
        info['sweeps'] = [dict(data_path='sweeps/LIDAR_TOP/x.bin')] * 10
    names = _names(History(infos, CAMERAS).entries(2, 1000))
    assert names == ['s0k2'] * 5 + ['s0k1'] + ['s0k1'] * 5 + ['s0k0']


def test_a_named_scene_without_sweeps_keeps_its_earlier_keyframes():
    """Beside a scene that has some: only where scenes have no name does "no sweeps" mean "first keyframe"."""
    infos = _scene(0, 3, True) + [dict(info, sweeps=[]) for info in _scene(1, 4, True)]
    history = History(infos, CAMERAS)
    assert _names(history.entries(6, 1000)) == (['s1k3'] * 5 + ['s1k2']) + (['s1k2'] * 5 + ['s1k1']) + (
        ['s1k1'] * 5 + ['s1k0']
    )
    assert _names(history.entries(2, 1000)) == _expected(0, 2)
    unnamed = [{key: value for key, value in info.items() if key != 'scene_token'} for info in infos]
    assert History(unnamed, CAMERAS).entries(6, 1000) == []


def test_the_limit_cuts_the_oldest():
    history = History(_scene(0, 4, True), CAMERAS)
    assert _names(history.entries(3, 7)) == _expected(0, 3)[:7]


@pytest.mark.parametrize(
    'available, expected',
    [
        (60, [5, 11, 17, 23, 29, 35, 41]),
        (42, [5, 11, 17, 23, 29, 35, 41]),
        (41, [5, 11, 17, 23, 29, 35, 40]),
        (12, [5, 11, 11, 11, 11, 11, 11]),
        (6, [5] * 7),
        (5, [4] * 7),
        (1, [0] * 7),
    ],
)
def test_evaluation_takes_earlier_keyframes(available, expected):
    """41 and 5 entries differ from 42 and 6 by one: an off-by-one in the step or the clip fails here."""
    assert choose_test_frames(available, 7) == expected


def _train_intervals(available, count=7, draws=400):
    rng = np.random.default_rng(0)
    chosen = [choose_train_frames(available, count, rng) for _ in range(draws)]
    intervals = collections.Counter(frames[0] + 1 for frames in chosen)
    for frames in chosen:
        assert frames == [(frames[0] + 1) * (step + 1) - 1 for step in range(count)]
        assert frames[-1] < available
    return intervals


@pytest.mark.parametrize(
    'available, intervals',
    [
        (8, {1}),
        (13, {1}),
        (14, {2}),
        (20, {2}),
        (21, {3}),
        (28, {4}),
        (34, {4}),
        (35, {4, 5}),
        (42, {4, 5, 6}),
        (49, {4, 5, 6, 7}),
        (55, {4, 5, 6, 7}),
        (56, {4, 5, 6, 7, 8}),
        (1000, {4, 5, 6, 7, 8}),
    ],
)
def test_training_draws_every_interval_that_fits(available, intervals):
    counts = _train_intervals(available)
    assert set(counts) == intervals
    expected = 400 / len(intervals)
    # Uniform: with 400 draws a count leaves +-5 standard deviations (sqrt(400/5) = 9 each) once in a million.
    assert all(abs(count - expected) < 5 * expected**0.5 + 1 for count in counts.values())


@pytest.mark.parametrize(
    'available, expected',
    [(7, [0, 1, 2, 3, 4, 5, 6]), (6, [0, 1, 2, 3, 4, 5, 5]), (5, [0, 1, 2, 3, 4, 4, 4]), (1, [0] * 7)],
)
def test_training_with_a_short_history_takes_all_and_repeats_the_last(available, expected):
    assert choose_train_frames(available, 7, np.random.default_rng(0)) == expected


@pytest.mark.parametrize('count', [0, 1, 3])
def test_other_frame_counts(count):
    assert choose_test_frames(30, count) == [5, 11, 17][:count]
    frames = choose_train_frames(30, count, np.random.default_rng(0))
    assert len(frames) == count and all(frame < 30 for frame in frames)


def test_sixteen_frames_reach_seven_and_a_half_seconds_back():
    assert choose_test_frames(200, 15) == list(range(5, 90, 6)) and history_limit(15) == 120
    assert set(_train_intervals(120, count=15)) == {4, 5, 6, 7, 8}


# Real nuScenes: two scenes of v1.0-mini val, 81 keyframes.


@pytest.fixture(scope='module')
def real_infos(real_dir):
    with open(str(real_dir / 'nuscenes_mini_infos_val.pkl'), 'rb') as stream:  # known where it is from
        infos = pickle.load(stream)['infos']
    for info in infos:  # as gen_sweep_info.py leaves them: camera sweeps, none at the start of a scene
        if info['sweeps']:
            info['sweeps'] = [
                {name: dict(data_path=f'sweeps/{name}/{info["token"]}-{step}') for name in NUSCENES_CAMERAS}
                for step in range(5)
            ]
    return infos


def _real_start(infos):
    """Index of the second scene's first keyframe: the only gap of more than 5 s."""
    gaps = np.flatnonzero(np.diff([info['timestamp'] for info in infos]) > 5 * SECOND)
    assert len(gaps) == 1
    return int(gaps[0]) + 1


def test_real_histories_end_at_the_start_of_their_scene(real_infos):
    start, history = _real_start(real_infos), History(real_infos, NUSCENES_CAMERAS)
    assert history.entries(0, 1000) == [] and history.entries(start, 1000) == []
    for index in range(len(real_infos)):
        position = index - (start if index >= start else 0)
        entries = history.entries(index, 1000)
        assert len(entries) == 6 * position
        for back in range(position):
            assert entries[6 * back + 5] is real_infos[index - back - 1]['cams']


def test_a_subset_of_real_infos_keeps_histories_in_their_scene(real_infos):
    start = _real_start(real_infos)
    subset = real_infos[start - 2 : start] + real_infos[start + 3 : start + 6]  # without the second scene's start
    history = History(subset, NUSCENES_CAMERAS)
    assert [len(history.entries(index, 1000)) for index in range(5)] == [5, 11, 5, 11, 17]
    first = {id(info['cams']) for info in subset[:2]}
    for index in (2, 3, 4):
        assert not first & {id(entry) for entry in history.entries(index, 1000)}
