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

from typing import Dict, List, NamedTuple, Sequence

import numpy as np

from .errors import DataError
from .geometry import pose_to_matrix
from .io import load_pickle_safe

MAX_KEYFRAME_GAP = 5_000_000  # microseconds; keyframes of one scene are 0.5 s apart
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


def ego_from_lidar(info: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP to ego at the keyframe, metres."""
    return pose_to_matrix(info['lidar2ego_rotation'], info['lidar2ego_translation'])


def global_from_ego(info: Dict) -> np.ndarray:
    """4x4 float64: ego at the keyframe to global, metres."""
    return pose_to_matrix(info['ego2global_rotation'], info['ego2global_translation'])


def split_scenes(infos: Sequence[Dict]) -> List[List[int]]:
    """Group keyframes by scene.

    A scene is known by ``scene_token`` or ``scene_name`` where an info has one. Infos without (as
    MMDetection3D 1.0 makes them) are taken in time order, and a scene ends where the next keyframe is more
    than 5 s later or is a first keyframe: one without sweeps, in a list where others have some. Thin a list
    out after splitting it, not before: gaps of over 5 s would look like ends of scenes.

    Args:
        infos: keyframes in any order.

    Returns:
        Per scene the indices of its keyframes in time order; scenes in the order they begin.
    """
    order = sorted(range(len(infos)), key=lambda index: infos[index]['timestamp'])
    scenes, last_unnamed = {}, None
    marked = any(len(info.get('sweeps', ())) for info in infos)
    for index in order:
        info = infos[index]
        name = info.get('scene_token') or info.get('scene_name')
        if name:
            scenes.setdefault(('named', name), []).append(index)
            continue
        if last_unnamed is None or _begins_scene(infos[last_unnamed[-1]], info, marked):
            last_unnamed = scenes.setdefault(('unnamed', index), [])
        last_unnamed.append(index)
    return list(scenes.values())


def _begins_scene(previous, info, marked):
    late = info['timestamp'] - previous['timestamp'] > MAX_KEYFRAME_GAP
    return late or (marked and not len(info.get('sweeps', ())))
