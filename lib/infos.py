"""Info files: pickles ``dict(infos=[...], metadata=dict(version=...))``, a list of keyframes.

An info is a keyframe in the format of MMDetection3D 1.0: ``token``, ``timestamp`` (microseconds),
``lidar_path``, ``lidar2ego_{translation,rotation}``, ``ego2global_{translation,rotation}`` (metres,
quaternions w x y z or 3x3), ``gt_boxes`` [n, 7 or 9] in LIDAR_TOP, ``gt_names`` and others, and ``cams``, {CAM:
camera entry} with ``data_path``, ``timestamp``, ``cam_intrinsic`` [3, 3] or [4, 4] and
``sensor2lidar_{rotation,translation}`` (p_lidar = R p + t). gen_sweep_info.py adds
``sensor2global_{rotation,translation}`` as rows (p_global = p · R + t) to every camera entry, ``sweeps`` (five
dicts {CAM: camera entry}, newest first; none for the first keyframe of a scene), ``scene_token`` and
``scene_name`` and ``lidar_token`` (of the scan). Files without those (MMDetection3D's, published ones) are read all
the same.

``KEYFRAME``, ``CAMERA`` and the tables beside them are this format; a file is checked against them when it is
opened, so that nothing later has to.
"""

import os
from numbers import Real
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .errors import DataError
from .geometry import intrinsics_to_matrix, invert_rigid, make_transform, quaternion_to_matrix
from .io import load_pickle_safe

MAX_KEYFRAME_GAP = 5_000_000  # microseconds; keyframes of one scene are 0.5 s apart
_LARGEST = 1e9  # metres and pixels; what lies beyond is no position on earth
_LARGEST_TIME = 2.0**62
_CHUNK = 100  # keyframes whose values are checked at once
_REMEDY = 'correct it, or make the file again with gen_sweep_info.py'


class Kind(NamedTuple):
    """What a value must be.

    Attributes:
        said: how the user is told.
        shapes: accepted shapes where it is an array of numbers.
    """

    said: str
    shapes: Tuple[Tuple[int, ...], ...] = ()


TEXT = Kind('a text')
TIME = Kind('a number of microseconds')
VECTOR = Kind('3 finite numbers', ((3,),))
MATRIX = Kind('3x3 finite numbers', ((3, 3),))
ROTATION = Kind('a quaternion (w, x, y, z) or 3x3 finite numbers', ((4,), (3, 3)))
INTRINSICS = Kind('a 3x3 or 4x4 camera matrix: focal lengths above 0, third row 0 0 1', ((3, 3), (4, 4)))

KEYFRAME = dict(
    token=TEXT,
    timestamp=TIME,
    lidar2ego_translation=VECTOR,
    lidar2ego_rotation=ROTATION,
    ego2global_translation=VECTOR,
    ego2global_rotation=ROTATION,
)
CAMERA = dict(data_path=TEXT, timestamp=TIME, cam_intrinsic=INTRINSICS)
CURRENT_CAMERA = dict(sensor2lidar_rotation=ROTATION, sensor2lidar_translation=VECTOR)  # of a keyframe's own images
CAMERA_TO_GLOBAL = dict(sensor2global_rotation=MATRIX, sensor2global_translation=VECTOR)
CAMERA_TO_EGO_TO_GLOBAL = dict(  # MMDetection3D's instead
    sensor2ego_rotation=ROTATION,
    sensor2ego_translation=VECTOR,
    ego2global_rotation=ROTATION,
    ego2global_translation=VECTOR,
)


class InfoFile(NamedTuple):
    """What an info pickle holds.

    Attributes:
        infos: keyframes in time order.
        version: nuScenes version, e.g. ``v1.0-trainval``; '' if the file does not say.
    """

    infos: List[Dict]
    version: str


class CameraUse(NamedTuple):
    """Which camera entries of a file are used, and so must be right.

    Attributes:
        cameras: names.
        history: also earlier images, which need their pose in global, and sweeps.
        may_be_missing: a keyframe may lack some cameras, not all.
    """

    cameras: Sequence[str]
    history: bool = True
    may_be_missing: bool = False


def load_infos(path, allow_any_pickle: bool = False, use: Optional[CameraUse] = None) -> InfoFile:
    """Keyframes of an info pickle, in time order whatever their order in the file, checked against the format.

    Args:
        path: the pickle.
        allow_any_pickle: trust it and let it build any object.
        use: camera entries that are checked; None checks none.

    Raises:
        DataError: missing or damaged file, another format, no keyframes, or a value that is not what it must be;
            names file, keyframe, camera and key.
    """
    return infos_of(load_pickle_safe(path, allow_any=allow_any_pickle), path, use)


def infos_of(content, path, use: Optional[CameraUse] = None) -> InfoFile:
    """The same from what the pickle holds."""
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
    _check_infos(infos, path, use)
    metadata = content.get('metadata')
    version = metadata.get('version', '') if isinstance(metadata, dict) else ''
    return InfoFile(sorted(infos, key=lambda info: info['timestamp']), str(version))


def check_keyframes(infos: Sequence, source) -> None:
    """Raise DataError unless these are keyframes (dicts) with tokens of their own, times and poses; names are text."""
    for position, info in enumerate(infos):
        if not isinstance(info, dict):
            raise DataError(f'{source}: entry {position} is a {type(info).__name__}, not a keyframe (dict); {_REMEDY}')
    _check_values(infos, KEYFRAME, lambda position: f'{source}: entry {position} ({_name(infos[position])})')
    first: Dict[str, int] = {}
    for position, info in enumerate(infos):
        if first.setdefault(info['token'], position) != position:
            raise DataError(
                f'{source}: {_name(info)} is there twice (entries {first[info["token"]]} and {position}); remove one'
            )
        for key in ('scene_token', 'scene_name'):
            if info.get(key) is not None and not isinstance(info[key], str):
                raise DataError(f'{source}: {_name(info)}: {_complaint(info, key, TEXT.said)}; {_REMEDY}')


def _check_infos(infos, source, use) -> None:
    check_keyframes(infos, source)
    for info in infos:
        _check_structure(info, f'{source}: {_name(info)}')
    if use is not None:
        _check_missing(infos, source, use)
        for start in range(0, len(infos), _CHUNK):
            _check_cameras(infos[start : start + _CHUNK], source, use)


def _name(info) -> str:
    return f'keyframe {info.get("token", "without token")}'


def _check_structure(info, where) -> None:
    """``cams`` and ``sweeps`` are dicts of dicts."""
    cams, sweeps = info.get('cams'), info.get('sweeps', ())
    if not isinstance(cams, dict):
        raise DataError(f'{where}: {_complaint(info, "cams", "a dict of cameras")}; {_REMEDY}')
    if not isinstance(sweeps, (list, tuple)) or not all(isinstance(sweep, dict) for sweep in sweeps):
        raise DataError(f"{where}: 'sweeps' must be a list of dicts of cameras; {_REMEDY}")
    for frame in _frames(info):
        for camera, entry in frame.items():
            if not isinstance(entry, dict):
                raise DataError(f'{where}, camera {camera}: a dict is needed, got {_short(entry)}; {_REMEDY}')


def _check_missing(infos, source, use) -> None:
    for info in infos:
        absent = [name for name in use.cameras if name not in info['cams']]
        if absent and (not use.may_be_missing or len(absent) == len(use.cameras)):
            there = ', '.join(sorted(map(str, info['cams']))) or 'none'
            remedy = '' if use.may_be_missing else ', or set allow_missing_cameras=True to go without in such keyframes'
            raise DataError(
                f'{source}: {_name(info)} has no camera {absent[0]!r} (it has {there}); correct task.cameras{remedy}'
            )


def _check_cameras(infos, source, use) -> None:
    """Check the camera entries of some keyframes, all at once; if something is wrong, look for it one by one."""
    current = [info['cams'][name] for info in infos for name in use.cameras if name in info['cams']]
    frames = [frame for info in infos for frame in _frames(info)] if use.history else []
    entries = [frame[name] for frame in frames for name in use.cameras if name in frame]
    poses = pose_fields(entries[0]) if entries else {}
    if _all_fit(current, CURRENT_CAMERA) and _all_fit(entries or current, dict(CAMERA, **poses)):
        return
    for info in infos:
        for number, frame in enumerate(_frames(info)[: None if use.history else 1]):
            for camera in use.cameras:
                if camera in frame:
                    where = f'{source}: {_name(info)}, {f"sweep {number - 1}, " if number else ""}camera {camera}'
                    fields = dict(CAMERA, **({} if number else CURRENT_CAMERA))
                    fields.update(pose_fields(frame[camera]) if use.history else {})
                    _check_values([frame[camera]], fields, lambda _, where=where: where)


def pose_fields(entry: Mapping) -> Dict[str, Kind]:
    """The keys that take a camera entry to global."""
    in_two_steps = 'sensor2ego_rotation' in entry and 'sensor2global_rotation' not in entry
    return CAMERA_TO_EGO_TO_GLOBAL if in_two_steps else CAMERA_TO_GLOBAL


def has_pose(entry: Mapping) -> bool:
    """The camera entry says where in global the image was taken."""
    return all(key in entry for key in pose_fields(entry))


def _frames(info) -> List[Dict]:
    return [info['cams']] + camera_sweeps(info)


def _check_values(holders: Sequence[Mapping], fields: Mapping[str, Kind], where: Callable[[int], str]) -> None:
    """Raise DataError for the first of the dicts that lacks a key, or has a value of another kind."""
    for key, kind in fields.items():
        if _all_fit(holders, {key: kind}):
            continue
        for position, holder in enumerate(holders):
            if not _all_fit([holder], {key: kind}):
                raise DataError(f'{where(position)}: {_complaint(holder, key, kind.said)}; {_REMEDY}')


def _complaint(holder, key, said) -> str:
    return f'{key!r} must be {said}, got {_short(holder[key])}' if key in holder else f'{key!r} is missing'


def _short(value) -> str:
    text = ' '.join(repr(value).split())
    return text if len(text) <= 60 else f'{text[:57]}...'


def _all_fit(holders: Sequence[Mapping], fields: Mapping[str, Kind]) -> bool:
    """Every holder has every key with a value of its kind. Quick: whole columns at once."""
    try:
        return all(_fit([holder[key] for holder in holders], kind) for key, kind in fields.items())
    except (KeyError, ValueError, TypeError, OverflowError):  # missing, ragged, or nothing that becomes numbers
        return False


def fits(value, kind: Kind) -> bool:
    """The value is of that kind."""
    return _all_fit([dict(value=value)], dict(value=kind))


def _fit(values: List[Any], kind: Kind) -> bool:
    if kind is TEXT:
        return all(isinstance(value, str) and value for value in values) and ''.join(values).isprintable()
    if kind is TIME:
        plain = all(isinstance(value, Real) and not isinstance(value, bool) for value in values)
        return plain and bool((np.abs(np.array(values, dtype=np.float64)) < _LARGEST_TIME).all())
    array = np.asarray(values)
    if (
        array.dtype.kind not in 'fiu'
        or array.shape[1:] not in kind.shapes
        or not ((array < _LARGEST) & (array > -_LARGEST)).all()
    ):
        return False
    if kind is INTRINSICS:
        focal = (array[:, 0, 0] > 0) & (array[:, 1, 1] > 0)
        return bool(focal.all() and (np.abs(array[:, 2, :3] - [0.0, 0.0, 1.0]) < 1e-6).all())
    return kind is VECTOR or bool(array.reshape(len(array), -1).any(axis=1).all())


def camera_sweeps(info: Dict) -> List[Dict]:
    """The ``sweeps`` that map cameras to entries, newest first (MMDetection3D's own are LiDAR sweeps)."""
    return [sweep for sweep in info.get('sweeps', ()) if 'data_path' not in sweep]


def box_array(info: Dict, source) -> np.ndarray:
    """``gt_boxes`` of a keyframe without the velocity that some files add, float64 [n, 7].

    Raises:
        DataError: they are no boxes, or not as many as ``gt_names``; names ``source`` and the keyframe.
    """
    try:
        boxes = np.asarray(info.get('gt_boxes', ()), dtype=np.float64)
        names = np.asarray(info.get('gt_names', ()), dtype=str)
    except (ValueError, TypeError):
        boxes = names = np.zeros(1)
    if boxes.size == 0 and names.size == 0:
        return np.zeros((0, 7))
    if boxes.ndim != 2 or boxes.shape[1] < 7 or names.shape != boxes.shape[:1] or not np.isfinite(boxes[:, :7]).all():
        raise DataError(
            f"{source}: {_name(info)}: 'gt_boxes' must be n x 7 or n x 9 finite numbers and 'gt_names' n names; "
            f'{_REMEDY}'
        )
    return boxes[:, :7]


def rotation_matrix(value) -> np.ndarray:
    """Rotation matrix float64 [3, 3] of a quaternion (w, x, y, z) or of a matrix."""
    value = np.asarray(value, dtype=np.float64)
    return value if value.shape == (3, 3) else quaternion_to_matrix(value)


def _pose(holder: Mapping, name: str) -> np.ndarray:
    """4x4 float64 of ``<name>_rotation`` and ``<name>_translation``, metres."""
    return make_transform(rotation_matrix(holder[f'{name}_rotation']), holder[f'{name}_translation'])


def ego_from_lidar(info: Mapping) -> np.ndarray:
    """4x4 float64: LIDAR_TOP to ego at the keyframe, metres."""
    return _pose(info, 'lidar2ego')


def volume_from_lidar(info: Mapping, frame: str) -> np.ndarray:
    """4x4 float64: LIDAR_TOP to the frame of ``task.frame``, 'ego' or 'lidar', at the keyframe, metres."""
    return np.eye(4) if frame == 'lidar' else ego_from_lidar(info)


def global_from_ego(info: Dict) -> np.ndarray:
    """4x4 float64: ego at the keyframe to global, metres."""
    return _pose(info, 'ego2global')


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


# -- camera entries: their files, poses and projections. Metres and pixels

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
    return _pose(entry, 'ego2global') @ _pose(entry, 'sensor2ego')


def current_lidar2img(entry: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP of the keyframe to pixels of one of the keyframe's own images."""
    return _intrinsics(entry) @ invert_rigid(_pose(entry, 'sensor2lidar'))


def past_lidar2img(info: Dict, entry: Dict) -> np.ndarray:
    """4x4 float64: LIDAR_TOP of keyframe ``info`` to pixels of an earlier image ``entry``."""
    camera_from_global = invert_rigid(global_from_camera(entry))
    return _intrinsics(entry) @ camera_from_global @ global_from_ego(info) @ ego_from_lidar(info)


def _intrinsics(entry) -> np.ndarray:
    return intrinsics_to_matrix(np.asarray(entry['cam_intrinsic'])[:3, :3])
