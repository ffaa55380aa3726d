"""Infos of keyframes from the nuScenes tables, in the format of MMDetection3D 1.0, with camera sweeps.

``sensor2global`` is kept as rows: p_global = p_camera · R + t, so R = R_sensor2ego^T · R_ego2global^T and
t = t_sensor2ego · R_ego2global^T + t_ego2global.
"""

from typing import Dict, List

import numpy as np

from lib.geometry import invert_rigid, pose_to_matrix, quaternion_to_matrix

from ..history import SWEEPS_PER_KEYFRAME

# What published info files record; the data root of the config wins over it.
RECORDED_ROOT = 'data/nuscenes/'
_DROPPED = ('sensor2ego_translation', 'sensor2ego_rotation', 'ego2global_translation', 'ego2global_rotation')


def keyframe_info(nusc, sample: Dict) -> Dict:
    """Calibration, poses and boxes of one ``sample`` record, without sweeps.

    Boxes are (x, y, z, l, w, h, yaw) in LIDAR_TOP: z at the centre, yaw about +z.
    """
    lidar = nusc.get('sample_data', sample['data']['LIDAR_TOP'])
    calibration = nusc.get('calibrated_sensor', lidar['calibrated_sensor_token'])
    pose = nusc.get('ego_pose', lidar['ego_pose_token'])
    info = dict(
        lidar_path=RECORDED_ROOT + lidar['filename'],
        token=sample['token'],
        lidar2ego_translation=calibration['translation'],
        lidar2ego_rotation=calibration['rotation'],
        ego2global_translation=pose['translation'],
        ego2global_rotation=pose['rotation'],
        timestamp=sample['timestamp'],
    )
    lidar_from_global = invert_rigid(_global_from_sensor(nusc, lidar))
    info['cams'] = {
        name: _camera(nusc, nusc.get('sample_data', token), lidar_from_global)
        for name, token in sample['data'].items()
        if name.startswith('CAM')
    }
    info.update(_boxes(nusc, sample, lidar['token'], lidar_from_global))
    return info


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


def _boxes(nusc, sample, lidar_token, lidar_from_global):
    if not sample['anns']:  # the test split has no annotations
        return {}
    from nuscenes.eval.detection.utils import category_to_detection_name

    _, boxes, _ = nusc.get_sample_data(lidar_token)
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
    """The info with global poses in ``cams`` and camera sweeps in ``sweeps``; the argument stays as it is."""
    sample = nusc.get('sample', info['token'])
    scene = nusc.get('scene', sample['scene_token'])
    records = {name: nusc.get('sample_data', sample['data'][name]) for name in info['cams']}
    cams = {name: _complete(entry, camera_entry(nusc, records[name])) for name, entry in info['cams'].items()}
    sweeps = [] if sample['prev'] == '' else _collect_sweeps(nusc, records, cams)
    return dict(info, cams=cams, sweeps=sweeps, scene_token=scene['token'], scene_name=scene['name'])


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
