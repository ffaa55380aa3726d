"""Images and calibration of one's own as nuScenes infos, so that inference runs on them with the same code.

The JSON file (lengths in metres, times in seconds, rotations as quaternions w x y z or 3x3 matrices, poses in two
parts or as 4x4 matrices, image paths relative to the file):

    {
      "cameras": {
        "CAM_FRONT": {
          "intrinsic": [[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]],
          "camera2ego": {"rotation": [0.5, -0.5, 0.5, -0.5], "translation": [1.7, 0.0, 1.5]}
        }, ...
      },
      "sequences": [
        {"name": "drive-1",
         "frames": [
           {"timestamp": 0.0,
            "ego2global": {"rotation": [1, 0, 0, 0], "translation": [0, 0, 0]},
            "images": {"CAM_FRONT": "drive-1/front/000.jpg", ...}
           }, ...
         ]}
      ]
    }

- Ego: x forward, y left, z up, origin on the ground (nuScenes: below the rear axle). Camera: x right, y down,
  z forward. ``camera2ego`` takes camera coordinates to ego coordinates, ``ego2global`` ego to a fixed frame.
- Intrinsics are those of the image files as they are; resizing is accounted for by the pipeline.
- A camera without an image at some moment (a dropped frame) is left out of ``images`` or null there.
- The released models learned from frames half a second apart: give them at about that interval.
- An image taken noticeably before or after its frame's timestamp may carry the ego pose of its own moment:
  ``{"path": "...", "ego2global": {...}}`` instead of the path alone.
"""

import os
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from lib.errors import DataError
from lib.geometry import invert_rigid, make_transform
from lib.infos import INTRINSICS, ROTATION, VECTOR, Kind, fits, rotation_matrix
from lib.io import read_json
from lib.registry import did_you_mean

from .history import SWEEPS_PER_KEYFRAME

POSE_MATRIX = Kind('4x4 finite numbers', ((4, 4),))
MAX_SECONDS = 4e12  # as microseconds they fit into 62 bits
_IDENTITY = dict(rotation=[1.0, 0.0, 0.0, 0.0], translation=[0.0, 0.0, 0.0])


class OwnData(NamedTuple):
    """What a JSON file describes.

    Attributes:
        cameras: names in the file's order.
        infos: one per frame, in order; sweeps are filled in such that the earlier frames are the history.
        data_root: folder that the loader is to look for images from.
    """

    cameras: Tuple[str, ...]
    infos: List[Dict]
    data_root: str


def read_own_data(path: str) -> OwnData:
    """Cameras and frames of a JSON file of the format above.

    Raises:
        DataError: missing file or key, or a value of the wrong kind; names where.
    """
    content = read_json(path)
    folder = os.path.dirname(os.path.abspath(path))
    cameras = {
        name: read_camera(camera, f'{path}: cameras.{name}')
        for name, camera in _get(content, 'cameras', dict, path).items()
    }
    if not cameras:
        raise DataError(f'{path}: "cameras" is empty; list at least one camera with its calibration')
    infos, names = [], set()
    for s, sequence in enumerate(_get(content, 'sequences', list, path)):
        where = f'{path}: sequences[{s}]'
        name = _get(sequence, 'name', str, where)
        if name in names or not name or not all(c.isalnum() or c in '._-' for c in name):
            raise DataError(
                f'{where}: name {name!r} must be new and made of letters, digits, ".", "_" and "-"; it names '
                'the output files'
            )
        names.add(name)
        infos += _sequence_infos(name, _get(sequence, 'frames', list, where), cameras, folder, where)
    if not infos:
        raise DataError(f'{path} holds no frames; give at least one sequence with one frame')
    return OwnData(tuple(cameras), infos, _data_root(infos, folder, path))


def _data_root(infos, folder, path) -> str:
    """Root under which the loader finds every image.

    The loader takes paths from their last ``samples`` or ``sweeps`` folder on, as nuScenes has them.
    """
    roots = set()
    for info in infos:
        for camera in info['cams'].values():
            parts = camera['data_path'].split(os.sep)
            marks = [i for i, part in enumerate(parts) if part in ('samples', 'sweeps')]
            if marks:
                roots.add(os.sep.join(parts[: marks[-1]]) or os.sep)
    if len(roots) > 1:
        raise DataError(
            f'{path}: images lie in "samples" or "sweeps" folders of different places '
            f'({", ".join(sorted(roots))}); rename these folders, or put them side by side'
        )
    return roots.pop() if roots else folder


def _get(mapping, key, kind, where):
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise DataError(f'{where}: "{key}" is missing; see the format in loaders/own_data.py')
    value = mapping[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f'{where}: "{key}" must be a {names}, got {value!r}')
    return value


def _numbers(mapping, key, kind: Kind, where) -> np.ndarray:
    value = _get(mapping, key, (list, tuple, np.ndarray), where)
    if not fits(value, kind):
        raise DataError(f'{where}: "{key}" must be {kind.said}')
    return np.asarray(value, dtype=np.float64)


def read_pose(pose, where: str) -> np.ndarray:
    """Pose as 4x4 float64, metres.

    Args:
        pose: dict(rotation, translation) as in the format above, or such a matrix.
        where: what messages call it.

    Raises:
        DataError: it is no rigid transform.
    """
    if not isinstance(pose, Mapping):
        if not fits(pose, POSE_MATRIX):
            raise DataError(f'{where} must be {POSE_MATRIX.said}, or have "rotation" and "translation"')
        pose = dict(rotation=np.asarray(pose)[:3, :3], translation=np.asarray(pose)[:3, 3])
    given, translation = _numbers(pose, 'rotation', ROTATION, where), _numbers(pose, 'translation', VECTOR, where)
    rotation = rotation_matrix(given)
    if given.ndim == 1 and abs(np.linalg.norm(given) - 1) > 1e-2:
        raise DataError(
            f'{where}: "rotation" is no unit quaternion (w, x, y, z); its length is {np.linalg.norm(given):.3f}'
        )
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-2 or np.linalg.det(rotation) < 0:
        raise DataError(
            f'{where}: "rotation" is no rotation matrix; rows must be of length 1, at right angles, no mirror'
        )
    return make_transform(rotation, translation)


def read_camera(camera, where: str) -> Dict[str, np.ndarray]:
    """Calibration of a camera: ``intrinsic`` float64 [3, 3], pixels, and ``camera2ego`` float64 [4, 4], metres.

    Args:
        camera: dict(intrinsic, camera2ego) as in the format above, in lists or arrays.
        where: what messages call it.

    Raises:
        DataError: something is missing or wrong.
    """
    intrinsic = _numbers(camera, 'intrinsic', INTRINSICS, where)[:3, :3]
    return dict(intrinsic=intrinsic, camera2ego=_pose(camera, 'camera2ego', where))


def _pose(mapping, key, where) -> np.ndarray:
    return read_pose(_get(mapping, key, (dict, list, np.ndarray), where), f'{where}.{key}')


def _sequence_infos(name: str, frames: Sequence, cameras: Mapping, folder: str, where: str) -> List[Dict]:
    infos, last_time = [], -np.inf
    for f, frame in enumerate(frames):
        here = f'{where}.frames[{f}]'
        seconds = _get(frame, 'timestamp', (int, float), here)
        if not seconds > last_time or not seconds < MAX_SECONDS:
            raise DataError(f'{here}: timestamp {seconds!r} does not follow the one before; give frames in time order')
        last_time = seconds
        ego2global = _pose(frame, 'ego2global', here)
        cams = _camera_entries(frame, cameras, ego2global, seconds, folder, here)
        # Earlier frames stand at every sixth place of a history, behind five sweeps.
        sweeps = [infos[-1]['cams']] * SWEEPS_PER_KEYFRAME if infos else []
        infos.append(
            dict(
                token=f'{name}_{f:05d}',
                timestamp=int(round(seconds * 1e6)),
                scene_token=name,
                scene_name=name,
                lidar_path='',
                lidar2ego_rotation=_IDENTITY['rotation'],
                lidar2ego_translation=_IDENTITY['translation'],
                ego2global_rotation=ego2global[:3, :3],
                ego2global_translation=ego2global[:3, 3],
                cams=cams,
                sweeps=sweeps,
            )
        )
    return infos


def _camera_entries(frame, cameras: Mapping, ego2global, seconds, folder, where) -> Dict[str, Dict]:
    """Camera entries of the frame's images."""
    images = _get(frame, 'images', dict, where)
    unknown = [camera for camera in images if camera not in cameras]
    if unknown:
        raise DataError(f'{where}.images: "{unknown[0]}" is not among "cameras"{did_you_mean(unknown[0], cameras)}')
    cams = {
        camera: _camera_entry(images, camera, calibration, ego2global, seconds, folder, where)
        for camera, calibration in cameras.items()
        if images.get(camera) is not None
    }
    if not cams:
        raise DataError(f'{where}.images: no camera has an image; leave the frame out')
    return cams


def _camera_entry(images, camera, calibration, ego2global, seconds, folder, where) -> Dict:
    """Camera entry of an info; LIDAR_TOP is the ego frame itself."""
    image = _get(images, camera, (str, dict), f'{where}.images')
    where = f'{where}.images.{camera}'
    path = image if isinstance(image, str) else _get(image, 'path', str, where)
    own_pose = ego2global if isinstance(image, str) or 'ego2global' not in image else _pose(image, 'ego2global', where)
    if '\\' in path and not os.path.isfile(os.path.join(folder, path)):
        path = path.replace('\\', '/')  # written on Windows
    path = os.path.normpath(os.path.join(folder, path))
    if not os.path.isfile(path):
        raise DataError(f'{where}: image {path} does not exist; paths are relative to the JSON file')
    camera2global = own_pose @ calibration['camera2ego']
    camera2ego_now = invert_rigid(ego2global) @ camera2global
    return dict(
        data_path=path,
        type=camera,
        sample_data_token=path,
        timestamp=int(round(seconds * 1e6)),
        cam_intrinsic=calibration['intrinsic'],
        sensor2lidar_rotation=camera2ego_now[:3, :3],
        sensor2lidar_translation=camera2ego_now[:3, 3],
        sensor2global_rotation=camera2global[:3, :3].T,
        sensor2global_translation=camera2global[:3, 3],
    )
