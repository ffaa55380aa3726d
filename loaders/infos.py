"""Info files: pickles ``dict(infos=[...], metadata=dict(version=...))``, a list of keyframes.

An info is a keyframe in the format of MMDetection3D 1.0: ``token``, ``timestamp`` (microseconds),
``lidar_path``, ``lidar2ego_{translation,rotation}``, ``ego2global_{translation,rotation}`` (metres,
quaternions w x y z), ``gt_boxes`` [n, 7] in LIDAR_TOP, ``gt_names`` and others, and ``cams``, {CAM: camera
entry} with ``data_path``, ``timestamp``, ``cam_intrinsic`` [3, 3] and ``sensor2lidar_{rotation,translation}``
(p_lidar = R p + t). gen_sweep_info.py adds ``sensor2global_{rotation,translation}`` as rows
(p_global = p · R + t) to every camera entry, ``sweeps`` (five dicts {CAM: camera entry}, newest first; none
for the first keyframe of a scene), ``scene_token`` and ``scene_name``. Files without those (MMDetection3D's,
published ones) are read all the same.
"""

import os
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np

from lib.errors import DataError
from lib.geometry import intrinsics_to_matrix, invert_rigid, make_transform, pose_to_matrix, quaternion_to_matrix
from lib.io import load_pickle_safe

_REQUIRED = (
    'token',
    'timestamp',
    'cams',
    'lidar2ego_translation',
    'lidar2ego_rotation',
    'ego2global_translation',
    'ego2global_rotation',
)


class InfoFile(NamedTuple):
    """What an info pickle holds.

    Attributes:
        infos: keyframes in time order.
        version: nuScenes version, e.g. ``v1.0-trainval``; '' if the file does not say.
    """

    infos: List[Dict]
    version: str


def load_infos(path, allow_any_pickle: bool = False) -> InfoFile:
    """Keyframes of an info pickle, in time order whatever their order in the file.

    Raises:
        DataError: missing or damaged file, another format, or no keyframes.
    """
    content = load_pickle_safe(path, allow_any=allow_any_pickle)
    if isinstance(content, dict) and 'data_list' in content:
        raise DataError(
            f'{path} is in the format of MMDetection3D 1.1 or later (data_list); infos of 1.0 are needed: '
            'make them with gen_sweep_info.py'
        )
    if not isinstance(content, dict) or not isinstance(content.get('infos'), list):
        raise DataError(f'{path} holds no infos (a dict with a list "infos"); make it with gen_sweep_info.py')
    infos = content['infos']
    if not infos:
        raise DataError(
            f'{path} holds zero keyframes; make it again with gen_sweep_info.py and check --version and '
            'the scenes of the split'
        )
    for position, info in enumerate(infos):
        missing = [key for key in _REQUIRED if key not in info]
        if missing:
            raise DataError(
                '%s: info %d (token %s) has no %r; make the file with gen_sweep_info.py'
                % (path, position, info.get('token', 'unknown'), missing[0])
            )
    metadata = content.get('metadata') or {}
    return InfoFile(sorted(infos, key=lambda info: info['timestamp']), str(metadata.get('version', '')))


def check_cameras(info: Dict, cameras, source) -> None:
    """Raise DataError if the info lacks one of the cameras."""
    for name in cameras:
        if name not in info['cams']:
            raise DataError(
                '{}: keyframe {} has no camera {!r} (it has {}); correct task.cameras'.format(
                    source, info['token'], name, ', '.join(sorted(info['cams']))
                )
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


def ego_from_lidar(info: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP to ego at the keyframe, metres."""
    return pose_to_matrix(info['lidar2ego_rotation'], info['lidar2ego_translation'])


def global_from_ego(info: Dict) -> np.ndarray:
    """4x4 float64: ego at the keyframe to global, metres."""
    return pose_to_matrix(info['ego2global_rotation'], info['ego2global_translation'])


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
