"""Camera entries of infos (:mod:`lib.infos`): their files, poses and projections. Metres and pixels."""

import os
from pathlib import Path
from typing import Dict

import numpy as np

from lib.geometry import intrinsics_to_matrix, invert_rigid, make_transform
from lib.infos import ego_from_lidar, global_from_ego, rotation_matrix

NOWHERE = np.array([[0.0, 0, 0, -1], [0, 0, 0, -1], [0, 0, 0, 0], [0, 0, 0, 1]])
"""lidar2img of an image that does not exist: every point has depth 0 and lies far outside, so none is seen there."""


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


def global_from_camera(entry: Dict) -> np.ndarray:
    """4x4 float64: camera to global at the time of the image, metres.

    Reads ``sensor2global_*`` (rows: p_global = p_camera · R + t) or, in files of MMDetection3D, the
    calibration and the ego pose.
    """
    if 'sensor2global_rotation' in entry:
        return make_transform(
            np.asarray(entry['sensor2global_rotation'], dtype=np.float64).T, entry['sensor2global_translation']
        )
    ego = make_transform(rotation_matrix(entry['sensor2ego_rotation']), entry['sensor2ego_translation'])
    return make_transform(rotation_matrix(entry['ego2global_rotation']), entry['ego2global_translation']) @ ego


def current_lidar2img(entry: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP of the keyframe to pixels of one of the keyframe's own images."""
    camera = make_transform(rotation_matrix(entry['sensor2lidar_rotation']), entry['sensor2lidar_translation'])
    return _intrinsics(entry) @ invert_rigid(camera)


def past_lidar2img(info: Dict, entry: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP of keyframe ``info`` to pixels of an earlier image ``entry``."""
    camera_from_global = invert_rigid(global_from_camera(entry))
    return _intrinsics(entry) @ camera_from_global @ global_from_ego(info) @ ego_from_lidar(info)


def _intrinsics(entry) -> np.ndarray:
    return intrinsics_to_matrix(np.asarray(entry['cam_intrinsic'])[:3, :3])
