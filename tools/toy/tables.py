"""nuScenes' tables (version folder ``v1.0-*``) of a toy data set, from what its scenes report."""

import hashlib
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from .files import json_lines, json_list, write_bytes
from .names import TABLES
from .objects import OBJECT_TYPES
from .rig import LIDAR, Rig

MODALITIES = {LIDAR: 'lidar'}  # every other channel is a camera
VISIBILITY_LEVELS = (('1', 'v0-40', 0.4), ('2', 'v40-60', 0.6), ('3', 'v60-80', 0.8), ('4', 'v80-100', 2.0))
LOCATION, DATE, VEHICLE = 'toy-town', '2024-01-01', 'toy'


class SensorRecord(NamedTuple):
    """One image or scan of a scene.

    Attributes:
        channel: sensor name.
        timestamp: microseconds.
        filename: relative to the data root.
        keyframe: index of its keyframe in the scene; of the next one for a sweep.
        is_key_frame: it belongs to the keyframe itself.
        ego_to_map: float64 [4, 4] at its timestamp.
        size: (width, height) of an image, (0, 0) of a scan.
    """

    channel: str
    timestamp: int
    filename: str
    keyframe: int
    is_key_frame: bool
    ego_to_map: np.ndarray
    size: Tuple[int, int]


class BoxRecord(NamedTuple):
    """A box of a keyframe.

    Attributes:
        keyframe: index in the scene.
        item: index of the object in the scene's ``objects``.
        centre: float64 [3], map frame, metres.
        yaw: radians, map frame.
        size: (length, width, height), metres.
        lidar_points: hits on the object in the keyframe's scan.
        visible: share of the box in view.
        moving: the object is under way.
    """

    keyframe: int
    item: int
    centre: np.ndarray
    yaw: float
    size: Tuple[float, float, float]
    lidar_points: int
    visible: float
    moving: bool


class SceneRecord(NamedTuple):
    """Everything that the tables say about one scene.

    Attributes:
        name: nuScenes scene name.
        description: a few words.
        timestamps: of the keyframes, microseconds.
        rig: calibration.
        categories: category of every annotated object, by its index in the scene.
        sensors, boxes: in any order.
        map_file: relative to the data root.
    """

    name: str
    description: str
    timestamps: Sequence[int]
    rig: Rig
    categories: Dict[int, str]
    sensors: List[SensorRecord]
    boxes: List[BoxRecord]
    map_file: str


def token(*parts) -> str:
    """The token (32 hex digits) of whatever ``parts`` name."""
    return hashlib.md5('/'.join(str(p) for p in parts).encode()).hexdigest()


def quaternion(rotation: np.ndarray) -> List[float]:
    """[w, x, y, z], w >= 0, of a rotation matrix float64 [3, 3]."""
    r = rotation
    squares = np.array(
        [
            1 + r[0, 0] + r[1, 1] + r[2, 2],
            1 + r[0, 0] - r[1, 1] - r[2, 2],
            1 - r[0, 0] + r[1, 1] - r[2, 2],
            1 - r[0, 0] - r[1, 1] + r[2, 2],
        ]
    )
    columns = np.array(
        [
            [squares[0], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], squares[1], r[1, 0] + r[0, 1], r[0, 2] + r[2, 0]],
            [r[0, 2] - r[2, 0], r[1, 0] + r[0, 1], squares[2], r[2, 1] + r[1, 2]],
            [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[2, 1] + r[1, 2], squares[3]],
        ]
    )
    q = columns[squares.argmax()]
    q = q / np.linalg.norm(q)
    return [float(v) for v in (q if q[0] >= 0 else -q)]


_SHARED = ('category', 'attribute', 'visibility', 'sensor')  # the same whichever scenes there are


def scene_rows(seed: int, scene: SceneRecord, annotations: bool = True) -> Dict[str, str]:
    """A scene's part of every table, JSON rows one a line; rows that all scenes share are in each scene's part.

    Args:
        seed: of the data set; tokens depend on it and on nothing but names.
        scene: what they say.
        annotations: write boxes (test sets have none).
    """
    rows = _SceneRows(seed, annotations)
    rows.add_scene(scene)
    return {name: ',\n'.join(json_lines(records)) for name, records in rows.tables.items()}


def write_tables(folder: Path, parts: Sequence[Dict[str, str]]) -> None:
    """Write all tables to ``folder`` from the parts of the scenes, in the order that the scenes shall have."""
    for name in TABLES:
        rows = [part[name] for part in (parts[:1] if name in _SHARED else parts) if part[name]]
        write_bytes(folder / f'{name}.json', json_list(rows))


class _SceneRows:
    """Collects the rows of a scene in ``tables``, lists of records by table."""

    def __init__(self, seed: int, annotations: bool = True):
        self._seed, self._annotations = seed, annotations
        self.tables: Dict[str, List[Dict]] = {name: [] for name in TABLES}
        self._fixed_tables()

    def token(self, *parts) -> str:
        return token(self._seed, *parts)

    def _fixed_tables(self):
        types = OBJECT_TYPES.values()
        for category in sorted({t.category for t in types}):
            self._add('category', self.token('category', category), name=category, description='')
        for attribute in sorted({a for t in types for a in t.attributes if a}):
            self._add('attribute', self.token('attribute', attribute), name=attribute, description='')
        for key, level, _ in VISIBILITY_LEVELS:
            self._add('visibility', key, level=level, description=f'visibility of the object, {level[1:]} percent')

    def _add(self, table, key, **fields):
        record = dict(token=key, **fields)
        self.tables[table].append(record)
        return record

    def add_scene(self, scene: SceneRecord) -> None:
        """Add the rows of the scene."""
        name = scene.name
        self._add_channels(scene)
        log, count = self.token('log', name), len(scene.timestamps)
        self._add('log', log, logfile=log_name(name), vehicle=VEHICLE, date_captured=DATE, location=LOCATION)
        self._add('map', self.token('map', name), category='semantic_prior', filename=scene.map_file, log_tokens=[log])
        samples = [sample_token(self._seed, name, k) for k in range(count)]
        self._add(
            'scene',
            self.token('scene', name),
            log_token=log,
            nbr_samples=count,
            first_sample_token=samples[0],
            last_sample_token=samples[-1],
            name=name,
            description=scene.description,
        )
        for k, stamp in enumerate(scene.timestamps):
            self._add(
                'sample',
                samples[k],
                timestamp=int(stamp),
                scene_token=self.token('scene', name),
                prev=samples[k - 1] if k else '',
                next=samples[k + 1] if k + 1 < count else '',
            )
        self._add_sensor_data(scene, samples)
        if self._annotations:
            self._add_boxes(scene, samples)

    def _add_channels(self, scene):
        mounts = [(LIDAR, scene.rig.lidar_to_ego, [])]
        mounts += [(c.name, c.to_ego, c.intrinsic.tolist()) for c in scene.rig.cameras.values()]
        for channel, to_ego, intrinsic in mounts:
            modality = MODALITIES.get(channel, 'camera')
            self._add('sensor', self.token('sensor', channel), channel=channel, modality=modality)
            self._add(
                'calibrated_sensor',
                self.token('calibrated', scene.name, channel),
                sensor_token=self.token('sensor', channel),
                translation=to_ego[:3, 3].tolist(),
                rotation=quaternion(to_ego[:3, :3]),
                camera_intrinsic=intrinsic,
            )

    def _add_sensor_data(self, scene, samples):
        by_channel = {}
        for record in sorted(scene.sensors, key=lambda r: (r.channel, r.timestamp)):
            by_channel.setdefault(record.channel, []).append(record)
        for channel, records in by_channel.items():
            keys = [self.token('data', scene.name, channel, r.timestamp) for r in records]
            for k, r in enumerate(records):
                self._add(
                    'ego_pose',
                    keys[k],
                    timestamp=int(r.timestamp),
                    rotation=quaternion(r.ego_to_map[:3, :3]),
                    translation=r.ego_to_map[:3, 3].tolist(),
                )
                self._add(
                    'sample_data',
                    keys[k],
                    sample_token=samples[r.keyframe],
                    ego_pose_token=keys[k],
                    calibrated_sensor_token=self.token('calibrated', scene.name, channel),
                    timestamp=int(r.timestamp),
                    fileformat='pcd' if channel == LIDAR else 'jpg',
                    is_key_frame=bool(r.is_key_frame),
                    height=int(r.size[1]),
                    width=int(r.size[0]),
                    filename=r.filename,
                    prev=keys[k - 1] if k else '',
                    next=keys[k + 1] if k + 1 < len(keys) else '',
                )

    def _add_boxes(self, scene, samples):
        by_item = {}
        for box in sorted(scene.boxes, key=lambda b: (b.item, b.keyframe)):
            by_item.setdefault(box.item, []).append(box)
        types = {t.category: t for t in OBJECT_TYPES.values()}
        for item, boxes in by_item.items():
            instance = instance_token(self._seed, scene.name, item)
            keys = [self.token('annotation', scene.name, item, b.keyframe) for b in boxes]
            category = scene.categories[item]
            self._add(
                'instance',
                instance,
                category_token=self.token('category', category),
                nbr_annotations=len(boxes),
                first_annotation_token=keys[0],
                last_annotation_token=keys[-1],
            )
            for k, box in enumerate(boxes):
                attribute = types[category].attributes[0 if box.moving else 1]
                length, width, height = box.size
                level = next(key for key, _, top in VISIBILITY_LEVELS if box.visible < top)
                self._add(
                    'sample_annotation',
                    keys[k],
                    sample_token=samples[box.keyframe],
                    instance_token=instance,
                    visibility_token=level,
                    attribute_tokens=[self.token('attribute', attribute)] if attribute else [],
                    translation=box.centre.tolist(),
                    size=[width, length, height],
                    rotation=[float(np.cos(box.yaw / 2)), 0.0, 0.0, float(np.sin(box.yaw / 2))],
                    prev=keys[k - 1] if k else '',
                    next=keys[k + 1] if k + 1 < len(keys) else '',
                    num_lidar_pts=int(box.lidar_points),
                    num_radar_pts=0,
                )


def log_name(scene_name: str) -> str:
    """Name of the log that a scene is cut from; file names of images and scans begin with it."""
    return f'toy-{scene_name}'


def sample_token(seed: int, scene_name: str, keyframe: int) -> str:
    """Token of a scene's keyframe."""
    return token(seed, 'sample', scene_name, keyframe)


def instance_token(seed: int, scene_name: str, item: int) -> str:
    """Token of the object with that index in its scene."""
    return token(seed, 'instance', scene_name, item)
