"""The nuScenes tables: which scenes belong to which split, and infos of keyframes as MMDetection3D 1.0 has them.

``sensor2global`` is kept as rows: p_global = p_camera · R + t, so R = R_sensor2ego^T · R_ego2global^T and
t = t_sensor2ego · R_ego2global^T + t_ego2global.
"""

import gc
import os
from pathlib import Path
from typing import Dict, Iterable, List

import numpy as np

from lib.errors import DataError, UserError
from lib.geometry import invert_rigid, pose_to_matrix, quaternion_to_matrix
from lib.infos import ego_from_lidar, global_from_ego
from lib.io import read_json
from lib.openmmlab import prepare_openmmlab
from lib.registry import did_you_mean
from lib.task import NUSCENES_CAMERAS

from ..history import SWEEPS_PER_KEYFRAME

_NEEDED = ('scene', 'sample', 'sample_data', 'ego_pose', 'calibrated_sensor', 'sensor')
# What published info files record; the data root of the config wins over it.
RECORDED_ROOT = 'data/nuscenes/'
_AT_EGO = dict(translation=[0.0, 0.0, 0.0], rotation=[1.0, 0.0, 0.0, 0.0])
_DROPPED = ('sensor2ego_translation', 'sensor2ego_rotation', 'ego2global_translation', 'ego2global_rotation')


def open_tables(data_root, version: str):
    """nuscenes-devkit's ``NuScenes`` on ``<data_root>/<version>``.

    Raises:
        UserError: nuscenes-devkit is not installed.
        DataError: missing or damaged tables.
    """
    tables = Path(data_root, version)
    missing = [name for name in _NEEDED if not (tables / (name + '.json')).is_file()]
    if missing:
        present = sorted(p.name for p in Path(data_root).glob('v1.0-*') if p.is_dir())
        raise DataError(
            f'{tables / missing[0]}.json does not exist; check --data-root and --version (versions there: '
            f'{", ".join(present) or "none"})'
        )
    prepare_openmmlab()
    try:
        from nuscenes import NuScenes
    except ImportError as error:
        raise UserError(f'nuscenes-devkit cannot be imported ({error}); run "make install"') from error
    gc.disable()  # it would look for garbage again and again among millions of records that are none
    try:
        return NuScenes(version=version, dataroot=str(data_root), verbose=False)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise DataError(
            f'the tables in {tables} cannot be used ({type(error).__name__}: {error}); unpack the metadata of '
            'nuScenes again'
        ) from error
    finally:
        gc.enable()


def split_of_scenes(nusc) -> Dict[str, List[Dict]]:
    """Scene records by split: ``{'train': [...], 'val': [...], 'test': [...]}``, empty splits left out.

    ``<version>/splits.json`` ({split: [scene names]}), where present, goes before nuScenes' own splits.

    Raises:
        DataError: a scene belongs to no split.
    """
    own = Path(nusc.dataroot, nusc.version, 'splits.json')
    split_of = _invert(read_json(own)) if own.is_file() else _official_splits(nusc.version)
    scenes: Dict[str, List[Dict]] = {}
    for scene in nusc.scene:
        name = scene['name']
        if name not in split_of:
            raise DataError(
                f'scene {name} belongs to no split of nuScenes; name its split in {own}, e.g. '
                f'{{"train": ["{name}"], "val": []}}'
            )
        scenes.setdefault(split_of[name], []).append(scene)
    return scenes


def choose_scenes(nusc, splits: Dict[str, List[Dict]], choice) -> Dict[str, List[Dict]]:
    """The splits with the scenes that are wanted; those that become empty are left out.

    Args:
        nusc: the tables.
        splits: scene records by split.
        choice: ``scenes`` and ``only_present`` of a ``Choice``.

    Raises:
        DataError: an unknown scene, or none is left.
    """
    names = [scene['name'] for scenes in splits.values() for scene in scenes]
    for name in choice.scenes or ():
        if name not in names:
            raise DataError(f'--scenes: {nusc.version} has no scene {name!r}{did_you_mean(name, names)}')
    absent = _absent_images(nusc) if choice.only_present else {}
    chosen = {}
    for split, scenes in splits.items():
        wanted = [scene for scene in scenes if choice.scenes is None or scene['name'] in choice.scenes]
        left_out = [scene['name'] for scene in wanted if scene['token'] in absent]
        if left_out:
            print(f'note: {len(left_out)} of {len(wanted)} scenes of {split} lack images: {", ".join(left_out)}')
        chosen[split] = [scene for scene in wanted if scene['token'] not in absent]
    if not any(chosen.values()):
        example = next(iter(absent.values()), 'none')
        raise DataError(f'{nusc.dataroot}: no scene is whole (missing: {example}, ...); check --data-root and --scenes')
    return {split: scenes for split, scenes in chosen.items() if scenes}


def _absent_images(nusc) -> Dict[str, str]:
    """{scene token: an image of the scene that does not exist}."""
    scene_of = {sample['token']: sample['scene_token'] for sample in nusc.sample}
    absent: Dict[str, str] = {}
    for record in nusc.sample_data:
        scene = scene_of[record['sample_token']]
        if record['channel'].startswith('CAM') and scene not in absent:
            path = os.path.join(nusc.dataroot, record['filename'])
            if not os.path.isfile(path):
                absent[scene] = path
    return absent


def _official_splits(version):
    from nuscenes.utils.splits import create_splits_scenes

    splits = create_splits_scenes()
    split_of = _invert({name: splits[name] for name in ('train', 'val', 'test')})
    if 'mini' in version:
        split_of.update(_invert({'train': splits['mini_train'], 'val': splits['mini_val']}))
    return split_of


def _invert(splits):
    return {scene: split for split, scenes in splits.items() for scene in scenes}


# -- infos


def keyframe_info(nusc, sample: Dict) -> Dict:
    """Calibration, poses and boxes of one ``sample`` record, without sweeps.

    Boxes are (x, y, z, l, w, h, yaw) in LIDAR_TOP: z at the centre, yaw about +z. Tables without LIDAR_TOP give a
    made-up one at the origin of the ego frame.
    """
    names = camera_order(name for name in sample['data'] if name.startswith('CAM'))
    lidar = nusc.get('sample_data', sample['data'].get('LIDAR_TOP') or sample['data'][names[0]])
    has_lidar = 'LIDAR_TOP' in sample['data']
    calibration = nusc.get('calibrated_sensor', lidar['calibrated_sensor_token']) if has_lidar else _AT_EGO
    pose = nusc.get('ego_pose', lidar['ego_pose_token'])
    info = dict(
        lidar_path=RECORDED_ROOT + lidar['filename'] if has_lidar else '',
        token=sample['token'],
        lidar2ego_translation=calibration['translation'],
        lidar2ego_rotation=calibration['rotation'],
        ego2global_translation=pose['translation'],
        ego2global_rotation=pose['rotation'],
        timestamp=sample['timestamp'],
    )
    lidar_from_global = invert_rigid(global_from_ego(info) @ ego_from_lidar(info))
    info['cams'] = {
        name: _camera(nusc, nusc.get('sample_data', sample['data'][name]), lidar_from_global) for name in names
    }
    if sample['anns']:  # the test split has no annotations
        boxes = nusc.get_sample_data(lidar['token'])[1] if has_lidar else _boxes_in_ego(nusc, sample, pose)
        info.update(_annotations(nusc, boxes, lidar_from_global))
    return info


def camera_order(names: Iterable[str]) -> List[str]:
    """nuScenes' cameras in the order that published loaders take from the file, then others as they come."""
    rank = {name: number for number, name in enumerate(NUSCENES_CAMERAS)}
    return sorted(names, key=lambda name: rank.get(name, len(rank)))


def _boxes_in_ego(nusc, sample, pose) -> List:
    """The devkit's boxes of a keyframe without LIDAR_TOP, in ego."""
    from pyquaternion import Quaternion

    boxes = [nusc.get_box(token) for token in sample['anns']]
    for box in boxes:
        box.translate(-np.array(pose['translation']))
        box.rotate(Quaternion(pose['rotation']).inverse)
    return boxes


def _global_from_sensor(nusc, record):
    calibration = nusc.get('calibrated_sensor', record['calibrated_sensor_token'])
    pose = nusc.get('ego_pose', record['ego_pose_token'])
    return pose_to_matrix(pose['rotation'], pose['translation']) @ pose_to_matrix(
        calibration['rotation'], calibration['translation']
    )


def _camera(nusc, record, lidar_from_global):
    """The part of a camera entry that refers to LIDAR_TOP of the keyframe; p_lidar = R p_camera + t."""
    lidar_from_camera = lidar_from_global @ _global_from_sensor(nusc, record)
    return dict(
        type=record['channel'],
        sample_data_token=record['token'],
        sensor2lidar_rotation=lidar_from_camera[:3, :3],
        sensor2lidar_translation=lidar_from_camera[:3, 3],
    )


def _annotations(nusc, boxes, lidar_from_global) -> Dict:
    """What an info holds of the devkit's boxes in LIDAR_TOP."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    annotations = [nusc.get('sample_annotation', box.token) for box in boxes]
    velocities = np.array([nusc.box_velocity(box.token) for box in boxes]) @ lidar_from_global[:3, :3].T
    rows = [np.concatenate([box.center, box.wlh[[1, 0, 2]], box.orientation.yaw_pitch_roll[:1]]) for box in boxes]
    lidar_points = np.array([annotation['num_lidar_pts'] for annotation in annotations])
    radar_points = np.array([annotation['num_radar_pts'] for annotation in annotations])
    return dict(
        gt_boxes=np.array(rows),
        gt_names=np.array([category_to_detection_name(box.name) or box.name for box in boxes]),
        gt_velocity=velocities[:, :2],
        num_lidar_pts=lidar_points,
        num_radar_pts=radar_points,
        valid_flag=(lidar_points + radar_points) > 0,
    )


def camera_entry(nusc, record: Dict) -> Dict:
    """Entry of one image (a ``sample_data`` record): path, time, intrinsics [3, 3], pose in global."""
    calibration = nusc.get('calibrated_sensor', record['calibrated_sensor_token'])
    pose = nusc.get('ego_pose', record['ego_pose_token'])
    global_from_ego = quaternion_to_matrix(pose['rotation'])
    translation = np.asarray(calibration['translation']) @ global_from_ego.T + pose['translation']
    return dict(
        data_path=RECORDED_ROOT + record['filename'],
        sensor2global_rotation=quaternion_to_matrix(calibration['rotation']).T @ global_from_ego.T,
        sensor2global_translation=translation,
        cam_intrinsic=np.asarray(calibration['camera_intrinsic'], dtype=np.float64),
        timestamp=record['timestamp'],
    )


def add_camera_sweeps(nusc, info: Dict) -> Dict:
    """The info with global poses in ``cams``, camera sweeps in ``sweeps``, and the names of its scene and scan."""
    sample = nusc.get('sample', info['token'])
    scene = nusc.get('scene', sample['scene_token'])
    records = {name: nusc.get('sample_data', sample['data'][name]) for name in camera_order(info['cams'])}
    cams = {name: _complete(info['cams'][name], camera_entry(nusc, record)) for name, record in records.items()}
    sweeps = [] if sample['prev'] == '' else _collect_sweeps(nusc, records, cams)
    names = dict(scene_token=scene['token'], scene_name=scene['name'], lidar_token=sample['data'].get('LIDAR_TOP', ''))
    return dict(info, cams=cams, sweeps=sweeps, **names)


def _complete(entry, computed):
    return dict({key: value for key, value in entry.items() if key not in _DROPPED}, **computed)


def _collect_sweeps(nusc, records, cams) -> List[Dict]:
    """Five dicts {CAM: entry}, newest first, along each camera's ``prev`` chain.

    Where a camera has no earlier image, or the data set has none between keyframes, the newest complete dict
    is repeated.
    """
    sweeps, last = [], cams
    for _ in range(SWEEPS_PER_KEYFRAME):
        earlier = {
            name: nusc.get('sample_data', record['prev']) for name, record in records.items() if record['prev'] != ''
        }
        no_sweeps_recorded = not sweeps and all(record['is_key_frame'] for record in earlier.values())
        if len(earlier) == len(records) and not no_sweeps_recorded:
            records = earlier
            last = {name: camera_entry(nusc, record) for name, record in records.items()}
            sweeps.append(last)
        else:
            break
    return sweeps + [last] * (SWEEPS_PER_KEYFRAME - len(sweeps))
