"""Own images and calibration as infos: geometry, history, and mistakes in the JSON named."""

import json
import os

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from projection import project_points

from lib.errors import DataError
from lib.geometry import quaternion_to_matrix
from lib.infos import current_lidar2img, past_lidar2img
from lib.io import save_pickle
from lib.task import Task
from loaders import build_dataset
from loaders.own_data import read_own_data

FORWARD = [0.5, -0.5, 0.5, -0.5]  # camera (x right, y down, z forward) to ego (x forward, y left, z up)


def _write(folder, frames=3, image_folder='images', change=None):
    """A JSON file of one sequence: two cameras on a vehicle that drives 5 m along x per frame."""
    intrinsic = [[100.0, 0, 80], [0, 100.0, 48], [0, 0, 1]]
    content = dict(
        cameras={
            name: dict(intrinsic=intrinsic, camera2ego=dict(rotation=FORWARD, translation=[1.0, y, 1.5]))
            for name, y in (('left', 0.5), ('right', -0.5))
        },
        sequences=[
            dict(
                name='drive-1',
                frames=[
                    dict(
                        timestamp=0.5 * i,
                        ego2global=dict(rotation=[1, 0, 0, 0], translation=[5.0 * i, 0, 0]),
                        images={name: f'{image_folder}/{name}_{i}.jpg' for name in ('left', 'right')},
                    )
                    for i in range(frames)
                ],
            )
        ],
    )
    (folder / image_folder).mkdir(parents=True, exist_ok=True)
    for i in range(frames):
        for name in ('left', 'right'):
            cv2.imwrite(str(folder / image_folder / (f'{name}_{i}.jpg')), np.full((96, 160, 3), 40 * i, np.uint8))
    content = json.loads(json.dumps(content))  # nothing shared: a change is a change in one place
    if change:
        change(content)
    path = folder / 'own.json'
    path.write_text(json.dumps(content))
    return str(path)


def test_forward_quaternion_of_the_documentation():
    """The rotation of the format's example turns the camera's axes to the vehicle's."""
    rotation = quaternion_to_matrix(FORWARD)
    assert np.allclose(rotation @ [0, 0, 1], [1, 0, 0]) and np.allclose(rotation @ [1, 0, 0], [0, -1, 0])


def test_points_land_where_calibration_and_motion_put_them(tmp_path):
    """A point of the world, seen by the current frame and by the one before, 5 m further back."""
    own = read_own_data(_write(tmp_path))
    info, point = own.infos[2], np.array([12.0, 0.5, 1.5])  # ego frame of frame 2; straight ahead of 'left'
    pixel, depth = project_points(current_lidar2img(info['cams']['left']), point)
    assert np.allclose(pixel, [80, 48]) and depth == pytest.approx(11.0)
    pixel, depth = project_points(past_lidar2img(info, own.infos[1]['cams']['right']), point)
    assert depth == pytest.approx(16.0)  # 12 - 1 + 5 m
    assert np.allclose(pixel, [80 - 100 * 1.0 / 16.0, 48])  # 1 m left of the right camera


def test_an_image_may_have_its_own_pose(tmp_path):
    def later(content):
        frame = content['sequences'][0]['frames'][2]
        frame['images']['left'] = dict(
            path=frame['images']['left'], ego2global=dict(rotation=[1, 0, 0, 0], translation=[10.5, 0, 0])
        )

    info = read_own_data(_write(tmp_path, change=later)).infos[2]
    _, depth = project_points(current_lidar2img(info['cams']['left']), np.array([12.0, 0.5, 1.5]))
    assert depth == pytest.approx(10.5)  # taken half a metre further on


@pytest.mark.parametrize('folder', ['images', 'samples', 'run/samples/front'])
def test_the_loader_reads_frames_newest_first(tmp_path, folder):
    """History at test time is the earlier frames, also where folders are named as nuScenes names its own."""
    dataset = _read(_write(tmp_path, image_folder=folder), num_frames=4)
    assert [dataset.sample_token(i) for i in range(3)] == ['drive-1_00000', 'drive-1_00001', 'drive-1_00002']
    means = dataset[2]['img'].float().mean(dim=(1, 2, 3)).round()[::2]
    assert means.tolist() == [80, 40, 0, 0]  # frames 2, 1, 0, and the first again
    assert dataset[0]['img'].float().mean().round() == 0  # no history: the frame itself


def _read(path, **task):
    own = read_own_data(path)
    infos = os.path.join(os.path.dirname(path), 'infos.pkl')
    save_pickle(infos, dict(infos=own.infos, metadata={}))
    pipeline = [dict(type='LoadMultiViewImageFromMultiSweeps'), dict(type='RandomTransformImage')]
    cfg = dict(data_root=own.data_root, ann_file=infos, test_mode=True, pipeline=pipeline, allow_missing_cameras=True)
    task = Task(label_set='occ3d', cameras=own.cameras, image_size=(32, 64), **task)
    return build_dataset(dict(cfg, type='NuSceneOcc'), task)


@pytest.mark.parametrize('null', [True, False])
def test_a_frame_that_lacks_an_image_is_read_from_the_other_cameras(tmp_path, null):
    def drop(content):
        images = content['sequences'][0]['frames'][1]['images']
        images.update(left=None) if null else images.pop('left')

    dataset = _read(_write(tmp_path, change=drop), num_frames=2)
    keys = dataset[2]['img_metas']['frame_keys']
    assert keys[2] == 'missing/left' and all(not key.startswith('missing') for key in keys[:2] + keys[3:])
    means = dataset[2]['img'].float().mean(dim=(1, 2, 3)).round()
    assert means.tolist() == [80, 80, 0, 40]


def test_matrices_and_windows_paths_are_the_same(tmp_path):
    def change(content):
        for camera in content['cameras'].values():
            pose, intrinsic = camera['camera2ego'], np.eye(4)
            pose['rotation'] = quaternion_to_matrix(pose['rotation']).tolist()
            intrinsic[:3, :3] = camera['intrinsic']
            camera['intrinsic'] = intrinsic.tolist()
        for frame in content['sequences'][0]['frames']:
            frame['ego2global']['rotation'] = np.eye(3).tolist()
            frame['images'] = {name: path.replace('/', '\\') for name, path in frame['images'].items()}

    a, b = _read(_write(tmp_path), num_frames=2), _read(_write(tmp_path, change=change), num_frames=2)
    for key in ('img', 'lidar2img', 'ego2lidar'):
        np.testing.assert_allclose(a[2][key], b[2][key], atol=1e-4)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data(), junk=JUNK, remove=st.booleans())
def test_whatever_stands_anywhere_is_read_or_refused_in_a_sentence(tmp_path, data, junk, remove):
    def change(content):
        holder, key = data.draw(st.sampled_from(list(_places(content))))
        if remove:
            del holder[key]
        else:
            holder[key] = junk

    path = _write(tmp_path, frames=2, change=change)
    try:
        dataset = _read(path, num_frames=2)
    except DataError as error:
        assert '\n' not in str(error) and 'own' in str(error)
        return
    for index in range(len(dataset)):
        assert np.isfinite(dataset[index]['lidar2img']).all()


def _places(value):
    """Every (dict or list, key) below ``value``."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda c: c.pop('cameras'), '"cameras" is missing'),
        (lambda c: c['cameras']['left'].update(intrinsic=[[1, 2], [3, 4]]), 'cameras.left: "intrinsic" must be a 3x3'),
        (lambda c: c['cameras']['left'].update(intrinsic=[[0, 0, 0]] * 3), 'focal lengths above 0'),
        (lambda c: c['cameras']['left']['camera2ego'].update(rotation=[[1, 0, 0]] * 3), 'is no rotation matrix'),
        (lambda c: c['cameras']['left']['camera2ego'].update(translation=[1e300, 0, 0]), '"translation" must be 3'),
        (lambda c: c['sequences'][0]['frames'][1].update(timestamp=float('inf')), 'frames[1]: timestamp'),
        (lambda c: c['sequences'][0]['frames'][1].update(timestamp=float('nan')), 'frames[1]: timestamp'),
        (lambda c: c['cameras']['left']['camera2ego'].update(rotation=[2, 0, 0, 0]), 'unit quaternion'),
        (lambda c: c['sequences'][0]['frames'][1].update(timestamp=0.0), 'frames[1]: timestamp'),
        (lambda c: c['sequences'][0]['frames'][1]['images'].update(Left='x'), '"Left" is not among "cameras"; did you'),
        (lambda c: c['sequences'][0]['frames'][1].update(images=dict(left=None)), 'frames[1].images: no camera has'),
        (lambda c: c['sequences'][0]['frames'][1]['images'].update(left=3), '"left" must be a str or dict, got 3'),
        (lambda c: c['sequences'][0]['frames'][0]['images'].update(left='nowhere.jpg'), 'nowhere.jpg does not exist'),
        (lambda c: c['sequences'][0].update(name='../x'), 'name'),
        (lambda c: c.update(sequences=[]), 'no frames'),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    with pytest.raises(DataError) as error:
        read_own_data(_write(tmp_path, change=change))
    assert words in str(error.value)
