"""Real calibration: LiDAR points through our lidar2img land where the sample's own matrices put them."""

import pickle

import numpy as np
import pytest
from projection import project_points
from pyquaternion import Quaternion

from lib.geometry import invert_rigid
from lib.io import save_pickle
from lib.task import NUSCENES_CAMERAS, Task
from loaders import build_dataset

PIPELINE = [dict(type='LoadMultiViewImageFromMultiSweeps')]


@pytest.fixture(scope='module')
def demo(real_dir):
    """(keyframe in MMDetection3D 1.1 format, LiDAR points [n, 3], folder)."""
    folder = real_dir / 'mmdet3d_demo_nuscenes'
    with open(str(next(folder.glob('*.pkl'))), 'rb') as stream:  # known where it is from
        keyframe = pickle.load(stream)['data_list'][0]
    points = np.fromfile(str(folder / keyframe['lidar_points']['lidar_path']), np.float32).reshape(-1, 5)
    return keyframe, points[:, :3].astype(np.float64), folder


def _quaternion(matrix):
    """The rotation of a stored 4x4 matrix; these have been through float32."""
    u, _, v = np.linalg.svd(np.array(matrix)[:3, :3])
    return Quaternion(matrix=u @ v).elements.tolist()


@pytest.fixture(scope='module')
def converted(demo, tmp_path_factory):
    """Data root with the keyframe as an info of format 1.0 and its images where nuScenes has them."""
    keyframe, _, folder = demo
    root = tmp_path_factory.mktemp('demo')
    cams = {}
    for name, camera in keyframe['images'].items():
        (root / 'samples' / name).mkdir(parents=True)
        (root / 'samples' / name / camera['img_path']).symlink_to(folder / camera['img_path'])
        to_lidar = invert_rigid(np.array(camera['lidar2cam']))
        cams[name] = dict(
            data_path='data/nuscenes/samples/{}/{}'.format(name, camera['img_path']),
            cam_intrinsic=np.array(camera['cam2img']),
            sensor2lidar_rotation=to_lidar[:3, :3],
            sensor2lidar_translation=to_lidar[:3, 3],
            timestamp=0,
        )
    to_ego, to_global = np.array(keyframe['lidar_points']['lidar2ego']), np.array(keyframe['ego2global'])
    info = dict(
        token=keyframe['token'],
        timestamp=int(keyframe['timestamp'] * 1e6),
        cams=cams,
        sweeps=[],
        lidar2ego_rotation=_quaternion(to_ego),
        lidar2ego_translation=to_ego[:3, 3].tolist(),
        ego2global_rotation=_quaternion(to_global),
        ego2global_translation=to_global[:3, 3].tolist(),
    )
    save_pickle(root / 'infos.pkl', dict(infos=[info], metadata=dict(version='v1.0-mini')))
    return root


def _dataset(root, num_frames=1, image_size=(256, 704), pipeline=PIPELINE, ann_file='infos.pkl'):
    return build_dataset(
        dict(type='NuSceneOcc', data_root=str(root), ann_file=str(ann_file), test_mode=True, pipeline=pipeline),
        Task('occ3d', num_frames=num_frames, image_size=image_size),
    )


def _visible(pixels, depth, size):
    return (depth > 1) & (pixels > 0).all(axis=1) & (pixels[:, 0] < size[0]) & (pixels[:, 1] < size[1])


def test_lidar_points_land_where_the_sample_s_matrices_put_them(demo, converted):
    keyframe, points, _ = demo
    sample = _dataset(converted)[0]
    for index, name in enumerate(NUSCENES_CAMERAS):
        camera = keyframe['images'][name]
        chain = np.eye(4)
        chain[:3, :3] = camera['cam2img']
        expected, depth = project_points(chain @ np.array(camera['lidar2cam']), points)
        seen = _visible(expected, depth, (1600, 900))
        found, _ = project_points(sample['lidar2img'][index].double().numpy(), points)
        assert seen.sum() > 1000
        # The sample's matrices are rounded to float32, so R^T is its inverse to 1e-7: 0.01 pixels at 1600.
        np.testing.assert_allclose(found[seen], expected[seen], atol=0.05)


def test_ego_points_take_the_same_way(demo, converted):
    keyframe, points, _ = demo
    sample = _dataset(converted)[0]
    to_ego = np.array(keyframe['lidar_points']['lidar2ego'])
    back = (points @ to_ego[:3, :3].T + to_ego[:3, 3]) @ sample['ego2lidar'][0, :3, :3].numpy().T + sample['ego2lidar'][
        0, :3, 3
    ].numpy()
    np.testing.assert_allclose(back, points, atol=1e-4)  # float32 calibration, up to 100 m


def test_boxes_cover_their_objects_after_resizing_and_cropping(demo, converted):
    """2-D boxes of the sample against our transformed projection of their 3-D centres."""
    keyframe, _, _ = demo
    pipeline = PIPELINE + [dict(type='RandomTransformImage')]
    sample = _dataset(converted, pipeline=pipeline)[0]
    counted = 0
    for index, name in enumerate(NUSCENES_CAMERAS):
        for item in keyframe['cam_instances'][name]:
            box = np.array(item['bbox']) * 0.44 - [0, 140, 0, 140]  # 704x396, lower 256 rows
            to_lidar = np.linalg.inv(np.array(keyframe['images'][name]['lidar2cam']))
            centre = np.array(item['bbox_3d'][:3]) - [0, item['bbox_3d'][4] / 2, 0]  # camera boxes sit on y
            pixel, _ = project_points(
                sample['lidar2img'][index].double().numpy(), to_lidar[:3, :3] @ centre + to_lidar[:3, 3]
            )
            if box[0] > 0 and box[2] < 704:  # not cut by the image
                assert box[0] - 1 < pixel[0] < box[2] + 1 and box[1] - 1 < pixel[1] < box[3] + 1
                counted += 1
    assert counted > 20


def test_real_images_have_spec_s_pixels(demo, converted):
    from PIL import Image

    keyframe, _, folder = demo
    sample = _dataset(converted, pipeline=PIPELINE + [dict(type='RandomTransformImage')])[0]
    for index, name in enumerate(NUSCENES_CAMERAS):
        picture = Image.open(str(folder / keyframe['images'][name]['img_path']))
        expected = np.asarray(picture.resize((704, 396), Image.BICUBIC))[140:, :, ::-1]
        np.testing.assert_array_equal(sample['img'][index].permute(1, 2, 0).numpy(), expected)


def test_earlier_keyframes_are_projected_through_global(real_dir, tmp_path):
    """Real poses: a post fixed in the world, seen from three keyframes, by the pickle's own calibration."""
    with open(str(real_dir / 'nuscenes_mini_infos_val.pkl'), 'rb') as stream:  # known where it is from
        infos = pickle.load(stream)['infos']
    import cv2

    dataset = _dataset(tmp_path, num_frames=3, ann_file=real_dir / 'nuscenes_mini_infos_val.pkl')
    for info in infos[8:11]:
        for entry in info['cams'].values():
            path = tmp_path / entry['data_path'].split('nuscenes/', 1)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.zeros((900, 1600, 3), np.uint8))
    sample = dataset[10]
    post = np.array([-5.0, 25.0, 0.0])
    now = infos[10]
    world = (
        Quaternion(now['ego2global_rotation']).rotate(
            Quaternion(now['lidar2ego_rotation']).rotate(post) + now['lidar2ego_translation']
        )
        + now['ego2global_translation']
    )
    moved = 0.0
    for frame, info in enumerate((infos[10], infos[9], infos[8])):
        for index, name in enumerate(NUSCENES_CAMERAS):
            entry = info['cams'][name]
            to_ego, to_camera = (
                Quaternion(entry[key]).inverse for key in ('ego2global_rotation', 'sensor2ego_rotation')
            )
            ego = to_ego.rotate(world - entry['ego2global_translation'])
            camera = to_camera.rotate(ego - entry['sensor2ego_translation'])
            pixel = entry['cam_intrinsic'] @ camera
            if camera[2] < 1:
                continue
            found, _ = project_points(sample['lidar2img'][6 * frame + index].double().numpy(), post)
            # float32 matrices with entries up to 1e4 pixels·metres: 0.01 pixels.
            np.testing.assert_allclose(found, pixel[:2] / pixel[2], rtol=1e-5, atol=0.05)
            first, _ = project_points(sample['lidar2img'][index].double().numpy(), post)
            moved = max(moved, np.abs(found - first).max())
    assert moved > 5  # the car drives: the test would notice if the current pose were used throughout
