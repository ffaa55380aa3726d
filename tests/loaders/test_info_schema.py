"""Info files: every value is checked when the file is opened, and what is wrong is named; known dialects are read."""

import copy
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyquaternion import Quaternion

from lib.errors import DataError
from lib.infos import (
    CAMERA,
    CAMERA_TO_GLOBAL,
    CURRENT_CAMERA,
    KEYFRAME,
    CameraUse,
    current_lidar2img,
    load_infos,
    past_lidar2img,
)
from lib.io import save_pickle
from lib.task import NUSCENES_CAMERAS
from loaders.history import History

USE = CameraUse(NUSCENES_CAMERAS)
RNG = np.random.default_rng(0)


def _rotation():
    return Quaternion(RNG.normal(size=4)).unit


def _entry(camera, name, current):
    entry = dict(
        data_path=f'data/nuscenes/samples/{camera}/{name}.jpg',
        timestamp=1_500_000_000_000_000,
        cam_intrinsic=np.array([[1266.0, 0, 816], [0, 1266, 491], [0, 0, 1]]),
        sensor2global_rotation=_rotation().rotation_matrix,
        sensor2global_translation=RNG.normal(size=3),
    )
    if current:
        entry.update(sensor2lidar_rotation=_rotation().rotation_matrix, sensor2lidar_translation=RNG.normal(size=3))
    return entry


def _info(number, sweeps=5):
    return dict(
        token=f't{number}',
        timestamp=1_500_000_000_000_000 + number * 500_000,
        scene_name='scene-0001',
        lidar2ego_translation=[0.9, 0.0, 1.8],
        lidar2ego_rotation=list(_rotation()),
        ego2global_translation=[100.0, 200.0, 0.0],
        ego2global_rotation=list(_rotation()),
        gt_boxes=RNG.normal(size=(2, 7)),
        gt_names=np.array(['car', 'bus']),
        cams={camera: _entry(camera, f'{number}', True) for camera in NUSCENES_CAMERAS},
        sweeps=[{camera: _entry(camera, f'{number}-{k}', False) for camera in NUSCENES_CAMERAS} for k in range(sweeps)],
    )


INFOS = [_info(0, sweeps=0), _info(1), _info(2)]


@pytest.fixture
def open_infos(tmp_path):
    def open_them(infos, use=USE, **metadata):
        save_pickle(tmp_path / 'infos.pkl', dict(infos=infos, metadata=metadata))
        return load_infos(tmp_path / 'infos.pkl', use=use)

    return open_them


def _changed(change):
    infos = copy.deepcopy(INFOS)
    change(infos)
    return infos


NAN = float('nan')
WRONG = [
    None,
    True,
    'x',
    b'x',
    3,
    [],
    {},
    [1, 2],
    [NAN] * 3,
    [[1.0]] * 3,
    np.zeros((3, 3)),
    np.full(3, np.inf),
    np.full((3, 3), 'a'),
]
WRONG_OF = dict(
    token=[None, 3, '', b't', 'a\0b'],
    data_path=[None, 3, '', b'x.jpg', 'a\0b', ['a.jpg']],
    timestamp=[None, '3', NAN, float('inf'), True, [1], 10**30],
    cam_intrinsic=WRONG + [np.eye(3)[[1, 0, 2]], np.diag([1000.0, 1000, 0]), np.eye(2), -np.eye(3)],
)
PLACES = [
    *(('', KEYFRAME, key) for key in KEYFRAME),
    *(
        (', camera CAM_BACK', dict(CAMERA, **CURRENT_CAMERA, **CAMERA_TO_GLOBAL), key)
        for key in dict(CAMERA, **CURRENT_CAMERA)
    ),
    *(
        (', sweep 3, camera CAM_BACK', dict(CAMERA, **CAMERA_TO_GLOBAL), key)
        for key in dict(CAMERA, **CAMERA_TO_GLOBAL)
    ),
]


def _holder(infos, place):
    if not place:
        return infos[1]
    return (infos[1]['sweeps'][3] if 'sweep' in place else infos[1]['cams'])['CAM_BACK']


@pytest.mark.parametrize('place, fields, key', PLACES)
def test_a_missing_or_wrong_value_is_named_with_file_keyframe_camera_and_key(open_infos, place, fields, key):
    for value in ['missing'] + WRONG_OF.get(key, WRONG):

        def change(infos, value=value):
            holder = _holder(infos, place)
            holder.pop(key) if isinstance(value, str) and value == 'missing' else holder.update({key: value})

        with pytest.raises(DataError) as caught:
            open_infos(_changed(change))
        said = str(caught.value)
        assert 'infos.pkl' in said and repr(key) in said and said.count('\n') == 0, (value, said)
        if key != 'token':
            assert f'keyframe t1{place}' in said.replace(')', ''), said


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda i: i.__setitem__(1, None), 'entry 1 is a NoneType'),
        (lambda i: i.__setitem__(1, [1]), 'entry 1 is a list'),
        (lambda i: i[1].pop('cams'), "keyframe t1: 'cams' is missing"),
        (lambda i: i[1].update(cams=[]), "keyframe t1: 'cams' must be a dict"),
        (lambda i: i[1].update(sweeps=3), "keyframe t1: 'sweeps' must be a list"),
        (lambda i: i[1].update(sweeps=[3]), "keyframe t1: 'sweeps' must be a list"),
        (lambda i: i[1]['sweeps'][2].update(CAM_BACK=3), 'keyframe t1, camera CAM_BACK: a dict is needed, got 3'),
        (lambda i: i[1]['cams'].update(CAM_BACK=None), 'keyframe t1, camera CAM_BACK: a dict is needed, got None'),
        (lambda i: i[1].update(scene_name=3), "keyframe t1: 'scene_name' must be a text, got 3"),
        (lambda i: i[2].update(token='t1'), r'keyframe t1 is there twice \(entries 1 and 2\)'),
        (lambda i: i[1]['cams'].pop('CAM_BACK'), "keyframe t1 has no camera 'CAM_BACK'.*allow_missing_cameras=True"),
        (lambda i: i[1].update(cams={}), r"has no camera 'CAM_FRONT' \(it has none\)"),
    ],
)
def test_wrong_structure_is_named(open_infos, change, message):
    with pytest.raises(DataError, match=message):
        open_infos(_changed(change))


def test_dialects_give_the_same_matrices(open_infos):
    """Rotations as matrices or quaternions, intrinsics 4x4, poses in two steps, lists for arrays, integers."""

    def change(infos):
        for info in infos:
            for key in ('lidar2ego_rotation', 'ego2global_rotation'):
                info[key] = Quaternion(info[key]).rotation_matrix
            for frame in [info['cams']] + info['sweeps']:
                for entry in frame.values():
                    intrinsics = np.eye(4)
                    intrinsics[:3, :3] = entry['cam_intrinsic']
                    entry['cam_intrinsic'] = intrinsics.tolist()
                    if 'sensor2lidar_rotation' in entry:
                        entry['sensor2lidar_rotation'] = list(Quaternion(matrix=entry['sensor2lidar_rotation']))
                    rotation = entry.pop('sensor2global_rotation')
                    entry.update(
                        sensor2ego_rotation=np.eye(3, dtype=int),
                        sensor2ego_translation=[0, 0, 0],
                        ego2global_rotation=list(Quaternion(matrix=rotation.T)),
                        ego2global_translation=entry.pop('sensor2global_translation').astype(np.float64).tolist(),
                    )

    expected, found = open_infos(INFOS).infos, open_infos(_changed(change)).infos
    for a, b in zip(expected, found):
        for camera in NUSCENES_CAMERAS:
            pairs = [(current_lidar2img(info['cams'][camera])) for info in (a, b)]
            np.testing.assert_allclose(*pairs, rtol=1e-9, atol=1e-6)
            for one, other in zip(a['sweeps'], b['sweeps']):
                pairs = [past_lidar2img(info, entry[camera]) for info, entry in ((a, one), (b, other))]
                np.testing.assert_allclose(*pairs, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize('metadata', [dict(), dict(version='v1.0-mini')])
def test_the_version_is_read(open_infos, metadata):
    assert open_infos(INFOS, **metadata).version == metadata.get('version', '')


def test_sweeps_are_not_looked_at_where_no_history_is_used(open_infos):
    def change(infos):
        infos[1]['sweeps'][0]['CAM_BACK'] = dict(data_path=3)
        infos[1]['cams']['CAM_BACK'].pop('sensor2global_rotation')

    open_infos(_changed(change), CameraUse(NUSCENES_CAMERAS, history=False))
    with pytest.raises(DataError, match="camera CAM_BACK: 'sensor2global_rotation' is missing"):
        open_infos(_changed(change))


def test_other_cameras_may_be_anything(open_infos):
    infos = _changed(lambda infos: infos[1]['cams'].update(CAM_ROOF=dict(), CAM_BACK=dict()))
    assert len(open_infos(infos, CameraUse(('CAM_FRONT',))).infos) == 3


def test_missing_cameras_may_be_allowed_but_not_all_of_them(open_infos):
    lenient = USE._replace(may_be_missing=True)
    infos = _changed(lambda infos: [infos[1]['cams'].pop(name) for name in NUSCENES_CAMERAS[1:]])
    assert list(open_infos(infos, lenient).infos[1]['cams']) == ['CAM_FRONT']
    with pytest.raises(DataError, match='keyframe t1 has no camera'):
        open_infos(_changed(lambda infos: infos[1].update(cams={})), lenient)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def _paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, path + (key,))


ALL_PATHS = [path for path in _paths(INFOS) if path]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(path=st.sampled_from(ALL_PATHS), junk=JUNK, remove=st.booleans())
def test_whatever_stands_anywhere_is_read_right_or_refused_in_a_sentence(open_infos, path, junk, remove):
    infos = copy.deepcopy(INFOS)
    holder = infos
    for key in path[:-1]:
        holder = holder[key]
    if remove:
        del holder[path[-1]]
    else:
        holder[path[-1]] = junk
    try:
        opened = open_infos(infos).infos
    except DataError as error:
        assert 'infos.pkl' in str(error) and '\n' not in str(error)
        return
    history = History(opened, NUSCENES_CAMERAS)
    for index, info in enumerate(opened):
        for camera in NUSCENES_CAMERAS:
            assert np.isfinite(current_lidar2img(info['cams'][camera])).all()
            for entry in history.entries(index, 100):
                assert np.isfinite(past_lidar2img(info, entry[camera])).all()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(content=JUNK)
def test_whatever_is_pickled_instead_is_refused_in_a_sentence(tmp_path, content):
    save_pickle(tmp_path / 'infos.pkl', content)
    with pytest.raises(DataError, match=r'infos\.pkl'):
        load_infos(tmp_path / 'infos.pkl', use=USE)


def test_checking_a_file_takes_few_calls(monkeypatch):
    """What makes 28,130 keyframes of 36 images take 1.4 s: calls of functions a keyframe, which no machine changes."""
    from lib import infos as module

    infos = [dict(_info(0), token=f't{n}') for n in range(50)]
    monkeypatch.setattr(module, 'load_pickle_safe', lambda *_, **__: dict(infos=infos, metadata={}))
    load_infos('x.pkl', use=USE)
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        load_infos('x.pkl', use=USE)
    finally:
        sys.setprofile(None)
    assert 0 < (calls['call'] + calls['c_call']) / 50 < 500  # 339 with Python 3.11
