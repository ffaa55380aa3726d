"""Camera entries of infos (:mod:`lib.infos`): their files, poses and projections. Metres and pixels."""

import os
from pathlib import Path
from typing import Dict

import numpy as np

from lib.errors import DataError
from lib.geometry import intrinsics_to_matrix, invert_rigid, make_transform, quaternion_to_matrix
from lib.infos import ego_from_lidar, global_from_ego


def check_cameras(info: Dict, cameras, source) -> None:
    """Raise DataError if the info lacks one of the cameras."""
    for name in cameras:
        if name not in info['cams']:
            there = ', '.join(sorted(info['cams']))
            raise DataError(
                f'{source}: keyframe {info["token"]} has no camera {name!r} (it has {there}); correct task.cameras'
            )


def relocate(recorded: str, data_root) -> str:
    """Path of a data file under ``data_root``, whatever root the info file recorded.

    The part from the last ``samples/`` or ``sweeps/`` folder on is kept. A path without such a folder is
    taken as it is when absolute, else as relative to ``data_root``.
    """
    parts = Path(str(recorded).replace('\\', '/')).parts
    for position in range(len(parts) - 1, -1, -1):
        if parts[position] in ('samples', 'sweeps'):
            return os.path.join(str(data_root), *parts[position:])
    return os.path.join(str(data_root), recorded)


def frame_key(recorded: str) -> str:
    """Identity of an image, the same for every root: its path from ``samples/`` or ``sweeps/`` on."""
    return relocate(recorded, '').replace(os.sep, '/')


def is_camera_sweep(entry) -> bool:
    """An item of ``info['sweeps']`` maps cameras to entries (MMDetection3D's own are LiDAR sweeps)."""
    return isinstance(entry, dict) and 'data_path' not in entry


def global_from_camera(entry: Dict) -> np.ndarray:
    """4x4 float64: camera to global at the time of the image, metres.

    Reads ``sensor2global_*`` (rows: p_global = p_camera · R + t) or, in files of MMDetection3D, the
    calibration and the ego pose.
    """
    if 'sensor2global_rotation' in entry:
        return make_transform(
            np.asarray(entry['sensor2global_rotation'], dtype=np.float64).T, entry['sensor2global_translation']
        )
    ego = make_transform(_rotation(entry['sensor2ego_rotation']), entry['sensor2ego_translation'])
    return make_transform(_rotation(entry['ego2global_rotation']), entry['ego2global_translation']) @ ego


def _rotation(value):
    value = np.asarray(value, dtype=np.float64)
    return value if value.shape == (3, 3) else quaternion_to_matrix(value)


def current_lidar2img(entry: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP of the keyframe to pixels of one of the keyframe's own images."""
    camera = make_transform(
        np.asarray(entry['sensor2lidar_rotation'], dtype=np.float64), entry['sensor2lidar_translation']
    )
    return intrinsics_to_matrix(entry['cam_intrinsic']) @ invert_rigid(camera)


def past_lidar2img(info: Dict, entry: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP of keyframe ``info`` to pixels of an earlier image ``entry``."""
    camera_from_global = invert_rigid(global_from_camera(entry))
    return (
        intrinsics_to_matrix(entry['cam_intrinsic']) @ camera_from_global @ global_from_ego(info) @ ego_from_lidar(info)
    )
