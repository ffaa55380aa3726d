"""LiDAR scans: read or refused in a sentence, and their depth where the augmented images show the point."""

import math

import cv2
import numpy as np
import pytest
import torch
from fake_nuscenes import FakeNuScenes

from lib.errors import DataError
from lib.io import load_pickle_safe
from lib.task import Task
from loaders import build_dataset, collate
from loaders.checks import Look
from loaders.preflight import inspect_dataset, preflight
from loaders.prepare.sweep_infos import write_sweep_infos
from models.decoders.layers import DecoderSizes
from models.losses.auxiliary import LidarDepthLoss

TASK = Task('occ3d', point_cloud_range=(-8, -8, -1, 8, 8, 5.4), image_size=(64, 128), num_frames=2)
INFOS = 'nuscenes_infos_train_sweep.pkl'
PIXELS = [(80.5, 60.5), (40.5, 50.5), (120.5, 70.5), (60.5, 80.5), (100.5, 40.5), (90.5, 55.5)]  # u, v in the files
DEPTHS = [1.5, 3.0, 7.0, 15.0, 31.0, 55.0]  # metres, by camera


def points_of(info):
    """float32 [6, 3]: one point a camera, at its pixel and depth, in LIDAR_TOP."""
    points = []
    for name, (u, v), depth in zip(TASK.cameras, PIXELS, DEPTHS):
        entry = info['cams'][name]
        ray = np.linalg.inv(np.asarray(entry['cam_intrinsic'], dtype=np.float64)[:3, :3]) @ [u, v, 1.0]
        points.append(entry['sensor2lidar_rotation'] @ (depth * ray) + entry['sensor2lidar_translation'])
    return np.array(points, dtype=np.float32)


@pytest.fixture
def root(tmp_path):
    """A fake nuScenes whose scans hold these points, and whose images are black but for a spot at their pixel."""
    fake = FakeNuScenes(tmp_path / 'nuscenes')
    fake.write()
    fake.write_labels(TASK)
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    for info in load_pickle_safe(fake.root / INFOS)['infos']:
        path = scan_path(fake.root, info)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.pad(points_of(info), ((0, 0), (0, 2))).tofile(str(path))
        for name, (u, v) in zip(TASK.cameras, PIXELS):
            image = np.zeros((90, 160, 3), np.uint8)
            image[int(v) - 2 : int(v) + 3, int(u) - 2 : int(u) + 3] = 255
            cv2.imwrite(str(fake.root / info['cams'][name]['data_path'].split('nuscenes/')[-1]), image)
    return fake.root


def scan_path(root, info):
    return root / info['lidar_path'].split('nuscenes/')[-1]


def open_set(root, **options):
    pipeline = [
        dict(type='LoadMultiViewImageFromMultiSweeps'),
        dict(type='LoadOccGTFromFile', lidar_points=True),
        dict(type='RandomTransformImage', rand_flip=True),
        dict(type='BEVAug'),
    ]
    cfg = dict(type='NuSceneOcc', data_root=str(root), ann_file=INFOS, occ_gt_root='occ3d', pipeline=pipeline)
    return build_dataset(dict(cfg, **options), TASK)


def test_depth_lies_where_augmented_images_show_the_point(root):
    """Resized, cropped and mirrored images, a turned and flipped volume: the spot tells the cell, the point the bin."""
    dataset, loss, found = open_set(root), LidarDepthLoss(DecoderSizes(TASK, embed_dims=8)), 0
    for epoch in range(3):
        dataset.set_epoch(epoch)
        batch = collate([dataset[index] for index in range(len(dataset))])
        points, lidar2img = batch['targets'].lidar_points, batch['lidar2img'][:, :6]
        for camera, depth in enumerate(DEPTHS):
            own = [of_sample[camera : camera + 1] for of_sample in points]
            bins = loss.true_bins(own, lidar2img, (64, 128), (64, 128), (8, 16))[:, camera]
            images = batch['img'][:, camera, 0].numpy()
            for image, cells in zip(images, bins):
                ys, xs = np.nonzero(image > 128)
                rows, columns = (cells < loss.num_bins).nonzero(as_tuple=True)
                if len(ys) < 9:  # cropped away, or cut by the border
                    continue
                assert len(rows) == 1
                assert int(cells[rows, columns]) == int(math.log(depth) / math.log(60) * 48)
                assert (
                    abs(ys.mean() + 0.5 - (8 * int(rows) + 4)) <= 5
                    and abs(xs.mean() + 0.5 - (8 * int(columns) + 4)) <= 5
                )
                found += 1
    assert found > 60


def test_the_volume_of_an_augmented_sample_holds_the_points(root):
    """The inverse of ego2lidar takes the points into the augmented volume: their distance from the ego's axis stays."""
    dataset = open_set(root)
    sample, info = dataset[0], dataset.info(0)
    points = sample['targets'].lidar_points
    np.testing.assert_array_equal(points, points_of(info))
    to_ego = np.linalg.inv(sample['ego2lidar'][0].numpy())
    plain = build_dataset(
        dict(
            type='NuSceneOcc',
            data_root=str(root),
            ann_file=INFOS,
            pipeline=[dict(type='LoadMultiViewImageFromMultiSweeps')],
            test_mode=True,
        ),
        TASK,
    )
    recorded = np.linalg.inv(plain[0]['ego2lidar'][0].numpy())
    ours, theirs = (points @ matrix[:3, :3].T + matrix[:3, 3] for matrix in (to_ego, recorded))
    np.testing.assert_allclose(np.hypot(*ours.T[:2]), np.hypot(*theirs.T[:2]), atol=1e-4)
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], atol=1e-4)


def test_of_several_points_the_nearest_counts_and_others_do_not_count_at_all(root):
    batch = collate([open_set(root)[0]])
    loss = LidarDepthLoss(DecoderSizes(TASK, embed_dims=8))
    eye = torch.eye(4).expand(1, 6, 4, 4)
    at = lambda u, v, d: [u * d, v * d, d]  # noqa: E731
    points = torch.tensor(
        [
            at(12, 4, 20.0),
            at(13, 5, 2.0),
            at(12, 4, 40.0),
            at(40, 20, 60.0),
            at(-1, 4, 5.0),
            at(4, 60, 5.0),
            at(9, 9, 0.5),
        ]
    )
    points = torch.cat([points, -torch.tensor([at(20, 20, 9.0)])])  # behind the camera
    bins = loss.true_bins([points], eye, (50, 128), (64, 128), (8, 16))
    assert (bins < 48).nonzero().tolist() == [[0, camera, 0, 1] for camera in range(6)]
    assert (bins[0, :, 0, 1] == int(math.log(2.0) / math.log(60) * 48)).all()
    assert batch['targets'].lidar_points[0].dtype == torch.float32


def test_samples_without_the_option_have_no_points(root):
    pipeline = [dict(type='LoadMultiViewImageFromMultiSweeps'), dict(type='LoadOccGTFromFile')]
    dataset = open_set(root, pipeline=pipeline + [dict(type='RandomTransformImage')])
    assert not dataset.reads_lidar and dataset[0]['targets'].lidar_points is None
    assert collate([dataset[0], dataset[1]])['targets'].lidar_points is None


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda path: path.unlink(), r'LiDAR scan .*\.pcd\.bin does not exist; unpack samples/LIDAR_TOP'),
        (lambda path: path.write_bytes(b''), r'LiDAR scan .*\.pcd\.bin is empty or cut off \(0 bytes\)'),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), r'is empty or cut off \(113 bytes\); fetch it again'),
        (lambda path: np.full(5, np.nan, np.float32).tofile(str(path)), 'holds values that are no numbers'),
    ],
)
def test_bad_scans_are_named_before_training(root, damage, message):
    dataset = open_set(root)
    texts = [finding.text for finding in inspect_dataset(dataset, Look())]
    assert '6 of 6 LiDAR scans read: all there and whole' in texts
    damage(scan_path(root, dataset.info(2)))
    with pytest.raises(DataError, match=message) as caught:
        preflight(dataset, 'train')
    assert '\n' not in str(caught.value)
    with pytest.raises(DataError, match=message):
        dataset[2]


def test_a_keyframe_without_a_scan_is_named(root):
    dataset = open_set(root)
    dataset.infos[1]['lidar_path'] = ''
    with pytest.raises(DataError, match=r'keyframe sample-1 names no LiDAR scan \(lidar_path\)'):
        dataset[1]
