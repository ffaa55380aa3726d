"""Info of a keyframe from the nuScenes tables, in the format of MMDetection3D 1.0."""

from typing import Dict

import numpy as np

from lib.geometry import invert_rigid, pose_to_matrix

from .camera_sweeps import RECORDED_ROOT


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
