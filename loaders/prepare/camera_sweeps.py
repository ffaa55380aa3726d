"""Camera entries with their global poses, and the camera images between two keyframes.

``sensor2global`` is kept as rows: p_global = p_camera · R + t, so R = R_sensor2ego^T · R_ego2global^T and
t = t_sensor2ego · R_ego2global^T + t_ego2global.
"""

from typing import Dict, List

import numpy as np

from lib.geometry import quaternion_to_matrix

from ..history import SWEEPS_PER_KEYFRAME

# What published info files record; the data root of the config wins over it.
RECORDED_ROOT = 'data/nuscenes/'
_DROPPED = ('sensor2ego_translation', 'sensor2ego_rotation', 'ego2global_translation', 'ego2global_rotation')


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
