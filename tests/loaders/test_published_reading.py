"""Files made here, read as the published loaders and their relatives read them: the same samples to the bit.

``Reader`` and ``instances_as_published`` are written from the description of those formats, not from the modules that
they are compared with: they rely on the order of cameras and sweeps in the file, and on the positions of earlier
keyframes in the list, as those loaders do. Single precision is what they give the network.
"""

import cv2
import numpy as np
import pytest
from fake_nuscenes import FakeNuScenes
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion

from lib.io import load_npz_checked, load_pickle_safe
from lib.metrics.origins import scene_ray_origins
from lib.task import Task
from loaders import build_dataset
from loaders.prepare.panoptic_labels import write_panoptic_labels
from loaders.prepare.sweep_infos import write_sweep_infos

EARLIER = 7
TASK = Task('occ3d', point_cloud_range=(-8, -8, -1, 8, 8, 5.4), image_size=(32, 64), num_frames=1 + EARLIER)
PANOPTIC = Task('occ3d', panoptic=True, point_cloud_range=(-8, -8, -1, 8, 8, 5.4), image_size=(32, 64))
SIDES = ('FRONT', 'FRONT_RIGHT', 'FRONT_LEFT', 'BACK', 'BACK_LEFT', 'BACK_RIGHT')
BOXES = dict(car=4, pedestrian=7)  # the classes of the fake boxes
LEFTOVER_REACH = 0.8  # metres more in length, width and height


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Two training scenes of nine keyframes: tables, images, labels, and the files that are made of them here."""
    fake = FakeNuScenes(tmp_path_factory.mktemp('published'), keyframes=9, scenes=('scene-0061', 'scene-0553'))
    for number, row in enumerate(fake.tables['ego_pose']):  # the car drives slowly past its boxes
        turned = Quaternion(axis=[0, 0, 1], angle=0.001 * number)
        row.update(translation=[100.0 + 0.01 * number, 50.0, 0.3], rotation=turned.elements.tolist())
    for row in fake.tables['sample_annotation']:
        around = fake.rng.uniform([-6, -6, 0], [6, 6, 3])
        size, heading = fake.rng.uniform([1.5, 3.0, 1.5], [2.5, 5.0, 2.5]), fake.rng.uniform(0, 6.3)
        heading = Quaternion(axis=[0, 0, 1], angle=heading).elements.tolist()
        row.update(translation=(around + [100, 50, 0]).tolist(), size=size.tolist(), rotation=heading)
    fake.write()
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    labels = np.random.default_rng(3)
    for info in load_pickle_safe(fake.root / 'nuscenes_infos_train_sweep.pkl')['infos']:
        semantics = labels.choice([4, 7, 0, 11, 16, 17], size=TASK.grid_shape).astype(np.uint8)
        folder = fake.root / 'occ3d' / info['scene_name'] / info['token']
        folder.mkdir(parents=True)
        masks = dict(mask_camera=semantics % 2, mask_lidar=semantics % 3 == 0)
        np.savez_compressed(str(folder / 'labels.npz'), semantics=semantics, **masks)
    write_panoptic_labels(fake.root, 'v1.0-mini', 'occ3d', fake.root / 'panoptic', PANOPTIC, processes=1)
    return fake.root


@pytest.fixture(scope='module')
def content(root):
    return load_pickle_safe(root / 'nuscenes_infos_train_sweep.pkl')


def homogeneous(rotation, translation):
    matrix = np.identity(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


def of_quaternion(info, name):
    return homogeneous(Quaternion(info[f'{name}_rotation']).rotation_matrix, info[f'{name}_translation'])


class Reader:
    """Samples of a list of infos, as those loaders make them for evaluation."""

    def __init__(self, infos, root):
        self.infos, self.root = infos, root

    def entries(self, position):
        """The current frame in the file's order of cameras, then seven earlier frames in the order of SIDES."""
        now = self.infos[position]['cams']
        past, at = [], position
        while len(past) < 60 and self.infos[at]['sweeps']:
            past += self.infos[at]['sweeps']
            at -= 1
            past.append(self.infos[at]['cams'])
        frames = [list(now.values())]
        for step in range(EARLIER):
            if not past:
                frames.append(frames[0])
                continue
            wanted = min(6 * step + 5, len(past) - 1)
            frame = past[wanted] if len(past[wanted]) == len(SIDES) else past[wanted - 1]
            frames.append([frame[f'CAM_{side}'] for side in SIDES])
        return frames

    def lidar_to_image(self, position, frame):
        """float32 [6, 4, 4]."""
        info, matrices = self.infos[position], []
        for entry in frame:
            if entry in list(info['cams'].values()):
                lidar_to_camera = np.linalg.inv(
                    homogeneous(entry['sensor2lidar_rotation'], entry['sensor2lidar_translation'])
                )
            else:  # rows of global = rows of the camera @ rotation + translation
                to_global = homogeneous(
                    np.transpose(entry['sensor2global_rotation']), entry['sensor2global_translation']
                )
                now = of_quaternion(info, 'ego2global') @ of_quaternion(info, 'lidar2ego')
                lidar_to_camera = np.linalg.inv(to_global) @ now
            matrices.append(homogeneous(entry['cam_intrinsic'], np.zeros(3)) @ lidar_to_camera)
        return np.stack(matrices).astype(np.float32)

    def pictures(self, frame):
        return [cv2.imread(str(self.root / entry['data_path'].split('nuscenes/')[-1])) for entry in frame]

    def ray_origins(self, position):
        """float64 [O, 3] in the ego frame: where the LiDAR is in the frames of the scene, over the inner volume."""
        here, found = self.infos[position], []
        to_ego = of_quaternion(here, 'lidar2ego')
        from_global = np.linalg.inv(of_quaternion(here, 'ego2global') @ to_ego)
        for other in self.infos:
            if other['scene_token'] == here['scene_token']:
                there = of_quaternion(other, 'ego2global') @ of_quaternion(other, 'lidar2ego')
                at = (from_global @ there[:, 3])[:3].astype(np.float32)
                at = to_ego[:3, :3] @ at + to_ego[:3, 3]
                if abs(at[0]) < 7 and abs(at[1]) < 7:
                    found.append(at)
        if len(found) > 8:
            found = [found[int(n)] for n in np.round(np.linspace(0, len(found) - 1, 8))]
        return np.array(found)


def test_images_matrices_and_times(root, content):
    options = dict(ann_file='nuscenes_infos_train_sweep.pkl', occ_gt_root='occ3d', test_mode=True)
    steps = [dict(type='LoadMultiViewImageFromMultiSweeps'), dict(type='RandomTransformImage')]
    ours = build_dataset(dict(type='NuSceneOcc', data_root=str(root), pipeline=steps, **options), TASK)
    plain = ours._pipeline[0]  # before images are resized, which has golden values of its own
    theirs, histories = Reader(content['infos'], root), 0
    assert len(ours) == len(content['infos']) == 18
    for position in range(18):
        sample = plain(
            dict(
                info=ours.info(position), history=ours.history(position), data_root=str(root), test_mode=True, rng=None
            )
        )
        frames = theirs.entries(position)
        stamps = [entry['timestamp'] for frame in frames for entry in frame]
        assert stamps == [int(key[:-4].rsplit('__', 1)[1]) for key in sample['frame_keys']]
        matrices = np.concatenate([theirs.lidar_to_image(position, frame) for frame in frames])
        np.testing.assert_array_equal(sample['lidar2img'].astype(np.float32), matrices)
        for picture, image in zip([p for frame in frames[:3] for p in theirs.pictures(frame)], sample['img']):
            np.testing.assert_array_equal(picture, image)
        histories += len(set(stamps)) == 6 * (1 + min(position % 9, EARLIER))
    assert histories == 18  # as many earlier keyframes as the scene has


def test_sweeps_lie_between_the_keyframes(content):
    """Newest first, 12 Hz, six cameras each; what the published training draws from."""
    for before, info in zip(content['infos'], content['infos'][1:]):
        if info['sweeps']:
            stamps = [[entry['timestamp'] for entry in sweep.values()] for sweep in info['sweeps']]
            ends = [[entry['timestamp'] for entry in one['cams'].values()] for one in (info, before)]
            assert (np.diff([ends[0], *stamps, ends[1]], axis=0) == -83_333).all()
            assert all([*sweep] == [f'CAM_{side}' for side in SIDES] for sweep in info['sweeps'])


def test_ray_origins(root, content):
    ours, theirs = scene_ray_origins(content['infos'], TASK.point_cloud_range), Reader(content['infos'], root)
    for position, info in enumerate(content['infos']):
        origins = theirs.ray_origins(position)
        assert len(origins) == 8
        np.testing.assert_array_equal(ours[info['token']].astype(np.float32), origins.astype(np.float32))


def instances_as_published(semantics, info):
    """uint8 ids: boxes in order, then one for each class without boxes, then voxels just outside their box."""
    grid = np.stack(np.meshgrid(*map(np.arange, semantics.shape), indexing='ij'), axis=-1)
    centres = (grid + 0.5) * 0.4 + [-8, -8, -1]
    ids, number, with_id = np.zeros(semantics.shape, np.uint8), 0, []
    for name, (x, y, z, length, width, height, yaw) in zip(info['gt_names'], info['gt_boxes']):
        if name not in BOXES:
            continue
        heading = Quaternion(axis=[0, 0, 1], radians=yaw)
        boxes = [Box([x, y, z], [width + more, length + more, height + more], heading) for more in (0, LEFTOVER_REACH)]
        for box in boxes:
            box.rotate(Quaternion(info['lidar2ego_rotation']))
            box.translate(np.array(info['lidar2ego_translation']))
        inside = points_in_box(boxes[0], centres.reshape(-1, 3).T).reshape(semantics.shape)
        inside &= (semantics == BOXES[name]) & (ids == 0)
        if inside.any():
            number += 1
            ids[inside] = number
            with_id.append((number, BOXES[name], boxes[1]))
    for class_id in (0, 11, 16):
        number += 1
        ids[semantics == class_id] = number
    nearest = np.full(semantics.shape, np.inf)
    left = (ids == 0) & (semantics != 17)
    for number, class_id, box in with_id:
        reach = points_in_box(box, centres.reshape(-1, 3).T).reshape(semantics.shape)
        distance = np.sqrt(((centres - box.center) ** 2).sum(-1))
        taken = left & (semantics == class_id) & reach & (distance < nearest)
        ids[taken], nearest[taken] = number, distance[taken]
    return ids


def test_instances_of_the_panoptic_tool(root, content):
    counted = 0
    for info in content['infos']:
        where = (info['scene_name'], info['token'], 'labels.npz')
        source = load_npz_checked(root.joinpath('occ3d', *where))
        made = load_npz_checked(root.joinpath('panoptic', *where))
        assert sorted(made) == ['instances', 'mask_camera', 'mask_lidar', 'semantics']
        assert all(np.array_equal(made[name], source[name]) for name in source)
        np.testing.assert_array_equal(made['instances'], instances_as_published(source['semantics'], info))
        assert made['instances'].dtype == np.uint8
        counted += int(made['instances'].max() > 3)  # more than the three classes without boxes
    assert counted > 9
