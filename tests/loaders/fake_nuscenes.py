"""A nuScenes of a few kilobytes for tests: real schema, six cameras at 12 Hz, flat images, random poses."""

import json
from pathlib import Path

import cv2
import numpy as np

from lib.task import NUSCENES_CAMERAS
from tools.toy.names import TABLES

SENSORS = NUSCENES_CAMERAS + ('LIDAR_TOP',)
SCENES = ('scene-0061', 'scene-0553', 'scene-0103')  # two of mini_train, one of mini_val
STEP = 83_333  # microseconds between camera images (12 Hz)


class FakeNuScenes:
    """Tables in memory, written by :meth:`write`.

    Args:
        keyframes: keyframes per scene.
        sweeps: camera images between two keyframes.
        image_size: (width, height) of the images.
    """

    def __init__(self, root, keyframes=3, sweeps=5, image_size=(160, 90), seed=0, version='v1.0-mini', scenes=SCENES):
        self.root, self.version, self.image_size = Path(root), version, image_size
        self.sweeps = sweeps
        self.rng = np.random.default_rng(seed)
        self.tables = {name: [] for name in TABLES}
        self._add_fixed_tables()
        for number, name in enumerate(scenes):
            self._add_scene(name, start=1_500_000_000_000_000 + number * 60_000_000, keyframes=keyframes)

    def write(self):
        folder = self.root / self.version
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.tables.items():
            (folder / (name + '.json')).write_text(json.dumps(rows))
        (self.root / 'maps').mkdir(exist_ok=True)
        cv2.imwrite(str(self.root / 'maps' / 'map.png'), np.zeros((8, 8), np.uint8))
        for row in self.tables['sample_data']:
            if row['fileformat'] == 'jpg':
                self._write_image(row)
        return self.root

    def write_labels(self, task, folder='occ3d', **extra):
        """Random labels of every keyframe, a tenth of the task's grid occupied, with masks and ``extra`` arrays."""
        names = {row['token']: row['name'] for row in self.tables['scene']}
        for sample in self.tables['sample']:
            semantics = self.rng.integers(0, task.label_set.num_occupied, task.grid_shape).astype(np.uint8)
            semantics[self.rng.random(task.grid_shape) < 0.9] = task.label_set.free_id
            path = self.root / folder / names[sample['scene_token']] / sample['token'] / 'labels.npz'
            path.parent.mkdir(parents=True, exist_ok=True)
            masks = dict(mask_camera=semantics % 2, mask_lidar=semantics % 3 == 0)
            np.savez_compressed(str(path), semantics=semantics, **masks, **extra)

    def _write_image(self, row):
        path = self.root / row['filename']
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = self.image_size
        image = np.full((height, width, 3), row['timestamp'] % 200, np.uint8)
        image[height // 3 :, : width // 4] = 255 - image[0, 0]
        cv2.imwrite(str(path), image)

    def _add(self, table, **row):
        row = dict(row, token=f'{table}-{len(self.tables[table])}')
        self.tables[table].append(row)
        return row['token']

    def _quaternion(self):
        q = self.rng.normal(size=4)
        return (q / np.linalg.norm(q)).tolist()

    def _add_fixed_tables(self):
        self.log = self._add('log', logfile='x', vehicle='n000', date_captured='2018-01-01', location='nowhere')
        self._add('map', log_tokens=[self.log], category='semantic_prior', filename='maps/map.png')
        self.categories = [
            self._add('category', name=name, description='')
            for name in ('vehicle.car', 'human.pedestrian.adult', 'human.pedestrian.stroller')
        ]
        self.visibility = self._add('visibility', level='v80-100', description='')
        self.calibrations = {}
        for name in SENSORS:
            is_camera = name.startswith('CAM')
            sensor = self._add('sensor', channel=name, modality='camera' if is_camera else 'lidar')
            width, height = self.image_size
            self.calibrations[name] = self._add(
                'calibrated_sensor',
                sensor_token=sensor,
                translation=self.rng.normal(size=3).tolist(),
                rotation=self._quaternion(),
                camera_intrinsic=[[width * 0.8, 0, width / 2], [0, width * 0.8, height / 2], [0, 0, 1]]
                if is_camera
                else [],
            )

    def _add_scene(self, name, start, keyframes):
        scene = self._add('scene', log_token=self.log, nbr_samples=keyframes, name=name, description='')
        period = (self.sweeps + 1) * STEP
        samples = [self._add('sample', timestamp=start + k * period, scene_token=scene) for k in range(keyframes)]
        self._chain('sample', samples)
        self.tables['scene'][-1].update(first_sample_token=samples[0], last_sample_token=samples[-1])
        for sensor in SENSORS:
            steps = range((keyframes - 1) * (self.sweeps + 1) + 1)
            self._chain('sample_data', [self._add_image(name, sensor, start, step, samples) for step in steps])
        for _ in range(2):
            self._add_object(samples)

    def _chain(self, table, tokens):
        rows = {row['token']: row for row in self.tables[table]}
        for before, token, after in zip([''] + tokens[:-1], tokens, tokens[1:] + ['']):
            rows[token].update(prev=before, next=after)

    def _add_image(self, scene, sensor, start, step, samples):
        time = start + step * STEP + SENSORS.index(sensor) * 1000
        is_key = step % (self.sweeps + 1) == 0
        pose = self._add(
            'ego_pose',
            timestamp=time,
            rotation=self._quaternion(),
            translation=self.rng.normal(scale=100.0, size=3).tolist(),
        )
        suffix = 'jpg' if sensor.startswith('CAM') else 'pcd.bin'
        next_keyframe = min(-(-step // (self.sweeps + 1)), len(samples) - 1)
        folder = 'samples' if is_key else 'sweeps'
        name = f'{folder}/{sensor}/{scene}__{sensor}__{time}.{suffix}'
        return self._add(
            'sample_data',
            sample_token=samples[next_keyframe],
            ego_pose_token=pose,
            calibrated_sensor_token=self.calibrations[sensor],
            timestamp=time,
            filename=name,
            fileformat=suffix.split('.')[0],
            is_key_frame=is_key,
            height=self.image_size[1],
            width=self.image_size[0],
        )

    def _add_object(self, samples):
        category = self.categories[int(self.rng.integers(len(self.categories)))]
        instance = self._add('instance', category_token=category, nbr_annotations=len(samples))
        boxes = [self._add_box(sample, instance) for sample in samples]
        self._chain('sample_annotation', boxes)
        self.tables['instance'][-1].update(first_annotation_token=boxes[0], last_annotation_token=boxes[-1])

    def _add_box(self, sample, instance):
        return self._add(
            'sample_annotation',
            sample_token=sample,
            instance_token=instance,
            attribute_tokens=[],
            visibility_token=self.visibility,
            translation=self.rng.normal(scale=20.0, size=3).tolist(),
            size=self.rng.uniform(1, 4, size=3).tolist(),
            rotation=self._quaternion(),
            num_lidar_pts=int(self.rng.integers(5)),
            num_radar_pts=0,
        )
