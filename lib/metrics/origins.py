"""The evaluation's rays (paper section 4.1, RayIoU; SPEC section 6): where they begin and in which directions they go.

Origins are where the LiDAR stands in each frame of a scene; they come from info files, from a small file of poses, or
as they are. Directions are those of a LiDAR like nuScenes' with finer steps far away; they do not depend on the
volume: any grid and range is evaluated with the same rays.

Frames: LIDAR_TOP and ego of one keyframe, global. Metres, quaternions wxyz, timestamps in microseconds.
"""

import math
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from ..errors import DataError
from ..geometry import invert_rigid, transform_points
from ..infos import check_keyframes, ego_from_lidar, global_from_ego, infos_of, split_scenes, volume_from_lidar
from ..io import PathLike, load_npz_checked, load_pickle_safe, read_json, save_npz, write_json
from ..task import OCC3D_RANGE

MAX_ORIGINS = 8
ORIGIN_MARGIN = 1.0  # metres between an origin and the sides of the volume
NUM_AZIMUTHS = 360
_GROUND_RINGS = 10  # rings that meet flat ground 1, 2, ... 10 sensor heights away
_TOP_PITCH = 0.21  # radians, upper edge of nuScenes' LiDAR
_POSES = ('ego2global_rotation', 'ego2global_translation', 'lidar2ego_rotation', 'lidar2ego_translation')
_OF_LABELS = ('token', 'scene_name', 'scene_token', 'lidar_token', 'lidar_path', *_POSES[2:])  # of an info
_KIND = 'lidar poses'
_REMEDY = 'make it with "sparseocc-eval origins"'


def scene_ray_origins(
    infos: Sequence[Dict],
    point_cloud_range: Sequence[float] = OCC3D_RANGE,
    max_origins: int = MAX_ORIGINS,
    frame: str = 'ego',
) -> Dict[str, np.ndarray]:
    """Origins of the evaluation's rays for every keyframe.

    They are the positions of LIDAR_TOP in every frame of the keyframe's scene that lie over the volume, at
    least 1 m from its sides; of more than ``max_origins``, as many spread evenly over time.

    Args:
        infos: keyframes in any order, with all frames of their scenes.
        point_cloud_range: (x0, y0, z0, x1, y1, z1) of the volume, metres, in ``frame``.
        max_origins: most origins per keyframe.
        frame: of the volume, see ``task.frame``.

    Returns:
        {token: float64 [O, 3]}, metres, that frame of that keyframe, in time order.
    """
    origins = {}
    for scene in split_scenes(infos):
        global_from_lidars = np.stack([global_from_ego(infos[i]) @ ego_from_lidar(infos[i]) for i in scene])
        positions = global_from_lidars[:, :3, 3]
        for index, global_from_lidar in zip(scene, global_from_lidars):
            in_lidar = transform_points(invert_rigid(global_from_lidar), positions)
            # Quirk: published origins are rounded to single precision in the LiDAR frame (about 2e-6 m).
            rounded = in_lidar.astype(np.float32).astype(np.float64)
            in_volume = transform_points(volume_from_lidar(infos[index], frame), rounded)
            origins[infos[index]['token']] = _choose(in_volume, point_cloud_range, max_origins)
    return origins


def _choose(positions, point_cloud_range, max_origins):
    """The positions [F, 3] over the volume, thinned to ``max_origins``. float64 [O, 3]."""
    low = np.asarray(point_cloud_range[:2]) + ORIGIN_MARGIN
    high = np.asarray(point_cloud_range[3:5]) - ORIGIN_MARGIN
    kept = positions[np.all((positions[:, :2] > low) & (positions[:, :2] < high), axis=1)]
    if len(kept) <= max_origins:
        return kept
    return kept[np.round(np.linspace(0, len(kept) - 1, max_origins)).astype(np.int64)]


class Keyframes(NamedTuple):
    """Samples of an evaluation, as far as it needs to know them.

    Attributes:
        origins: {token: float64 [O, 3]}, metres, the task's frame; the tokens are those of all samples.
        scenes: {token: scene}; a scene without a name is called after its first keyframe.
        night: {scene: it is by night}, where descriptions tell.
        labels: {token: what finds and turns its label file}; empty where origins were given as they are.
    """

    origins: Dict[str, np.ndarray]
    scenes: Dict[str, str]
    night: Dict[str, bool]
    labels: Mapping[str, Mapping] = MappingProxyType({})


class Poses(NamedTuple):
    """Keyframes with their poses, and what is said of their scenes.

    Attributes:
        infos: keyframes, as in an info pickle.
        descriptions: {scene: text}.
    """

    infos: List[Dict]
    descriptions: Dict[str, str]


def read_keyframes(path: PathLike, point_cloud_range: Sequence[float] = OCC3D_RANGE, frame: str = 'ego') -> Keyframes:
    """Keyframes of an info pickle (MMDetection3D 1.0 or later), or of a file of poses or origins.

    Args:
        path: ``.pkl``; or ``.json`` or ``.npz`` as :func:`write_poses` makes them; or ``.npz`` with the origins
            themselves: ``token``, ``scene``, ``count`` [n] and ``origins`` [n, 8, 3], of which the first ``count`` are
            meant.
        point_cloud_range, frame: as for :func:`scene_ray_origins`; origins themselves are in that frame already.

    Raises:
        DataError: it is missing, damaged, or of another kind.
    """
    path = Path(path)
    arrays = load_npz_checked(path) if path.suffix == '.npz' else {}
    if 'origins' in arrays:
        return _given_origins(arrays, path)
    infos, descriptions = _read_poses(path, arrays)
    scenes = name_scenes(infos)
    night = {name: 'night' in text.lower() for name, text in descriptions.items()}
    labels = {info['token']: {key: info[key] for key in _OF_LABELS if key in info} for info in infos}
    return Keyframes(scene_ray_origins(infos, point_cloud_range, frame=frame), scenes, night, labels)


def _read_poses(path, arrays) -> Poses:
    if path.suffix == '.npz':
        return _poses_from_arrays(arrays, path)
    if path.suffix == '.json':
        return _poses_from_json(read_json(path), path)
    return Poses(read_infos(path), {})


def name_scenes(infos: Sequence[Dict]) -> Dict[str, str]:
    """{token: scene} of keyframes; a scene without a name is called after its token or its first keyframe."""
    names = {}
    for scene in split_scenes(infos):
        first = infos[scene[0]]
        name = first.get('scene_name') or first.get('scene_token') or first['token']
        names.update((infos[index]['token'], name) for index in scene)
    return names


def read_infos(path: PathLike) -> List[Dict]:
    """Keyframes of an info pickle of MMDetection3D 1.0, or with their poses alone of a later one.

    Raises:
        DataError: it is missing, damaged, or of another kind.
    """
    content = load_pickle_safe(path)
    if not isinstance(content, dict) or 'data_list' not in content:
        return infos_of(content, path).infos
    try:
        infos = [_from_later_format(entry) for entry in content['data_list']]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f'{path} has a keyframe without token, timestamp, ego2global or lidar_points.lidar2ego '
            f'({type(error).__name__}: {error}); make it again with MMDetection3D'
        ) from error
    check_keyframes(infos, path)
    return infos


def _from_later_format(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """A keyframe of MMDetection3D 1.1 and later, in which poses are 4x4 matrices and times seconds."""
    info = dict(token=entry['token'], timestamp=float(entry['timestamp']) * 1e6)
    for name, matrix in (('ego2global', entry['ego2global']), ('lidar2ego', entry['lidar_points']['lidar2ego'])):
        matrix = np.asarray(matrix, dtype=np.float64)
        info[f'{name}_rotation'], info[f'{name}_translation'] = matrix[:3, :3], matrix[:3, 3]
    info.update((key, entry[key]) for key in ('scene_token', 'scene_name') if entry.get(key))
    info['lidar_path'] = entry['lidar_points'].get('lidar_path')
    return info


def read_tables(folder: PathLike) -> Poses:
    """Keyframes with their poses from nuScenes tables.

    Args:
        folder: e.g. ``data/nuscenes/v1.0-trainval``.

    Raises:
        DataError: a table is missing or damaged.
    """
    folder = Path(folder)
    names = ('scene', 'sample', 'sample_data', 'ego_pose', 'calibrated_sensor')
    tables = {name: read_json(folder / f'{name}.json') for name in names}
    try:
        images_and_scans = tables.pop('sample_data')
        rows = {name: {row['token']: row for row in table} for name, table in tables.items()}
        infos = [
            _keyframe(one, rows)
            for one in images_and_scans
            if one['is_key_frame'] and '/LIDAR_TOP/' in f'/{one["filename"]}'
        ]
        descriptions = {scene['name']: str(scene.get('description', '')) for scene in tables['scene']}
    except (KeyError, TypeError) as error:
        raise DataError(f'the tables in {folder} lack {error}; unpack the metadata of nuScenes again') from error
    check_keyframes(infos, folder)
    return Poses(infos, descriptions)


def _keyframe(scan: Mapping[str, Any], rows: Mapping[str, Mapping[str, Dict]]) -> Dict[str, Any]:
    """Info of the keyframe that a LiDAR's scan belongs to, from rows of tables by name and token."""
    sample = rows['sample'][scan['sample_token']]
    scene = rows['scene'][sample['scene_token']]
    info = dict(token=sample['token'], timestamp=sample['timestamp'], scene_name=scene['name'])
    for name, pose in (
        ('ego2global', rows['ego_pose'][scan['ego_pose_token']]),
        ('lidar2ego', rows['calibrated_sensor'][scan['calibrated_sensor_token']]),
    ):
        info[f'{name}_rotation'], info[f'{name}_translation'] = pose['rotation'], pose['translation']
    return info


def write_poses(path: PathLike, infos: Sequence[Dict], descriptions: Optional[Mapping[str, str]] = None) -> None:
    """Write the poses of keyframes, all that ray origins need of them: under 1 kB each, a fifth of it in ``.npz``.

    Args:
        path: ``.json`` or ``.npz``.
        infos: keyframes.
        descriptions: {scene: text}, which may say that it is by night.

    Raises:
        DataError: another suffix.
        UserError: the file cannot be written.
    """
    scenes, descriptions = name_scenes(infos), dict(descriptions or {})
    infos = sorted(infos, key=lambda info: info['timestamp'])
    used = sorted(set(scenes.values()) & set(descriptions))
    columns: Dict[str, List] = dict(
        token=[info['token'] for info in infos],
        scene_name=[scenes[info['token']] for info in infos],
        timestamp=[float(info['timestamp']) for info in infos],
        **{name: [np.asarray(info[name], dtype=np.float64).tolist() for info in infos] for name in _POSES},
    )
    if Path(path).suffix == '.json':
        keyframes = [dict(zip(columns, row)) for row in zip(*columns.values())]
        write_json(
            path, dict(kind=_KIND, descriptions={name: descriptions[name] for name in used}, keyframes=keyframes)
        )
    elif Path(path).suffix == '.npz':
        arrays = {name: np.asarray(values) for name, values in columns.items()}
        arrays.update(described=np.asarray(used, dtype=str))
        arrays.update(description=np.asarray([descriptions[name] for name in used], dtype=str))
        save_npz(path, arrays)
    else:
        raise DataError(f'{path} must end in .json or .npz; choose one of them')


def _poses_from_json(value, path):
    if not isinstance(value, dict) or value.get('kind') != _KIND or not isinstance(value.get('keyframes'), list):
        raise DataError(f'{path} is no file of poses; {_REMEDY}')
    descriptions = value.get('descriptions', {})
    if not isinstance(descriptions, dict) or not all(isinstance(text, str) for text in descriptions.values()):
        raise DataError(f"{path}: 'descriptions' must be texts by scene; {_REMEDY}")
    check_keyframes(value['keyframes'], path)
    return Poses(value['keyframes'], descriptions)


def _poses_from_arrays(arrays, path):
    names = ('token', 'scene_name', 'timestamp') + _POSES
    missing = [name for name in names if name not in arrays]
    if missing or len({len(arrays[name]) if arrays[name].ndim else 0 for name in names}) != 1:
        wrong = f'it lacks {missing[0]!r}' if missing else 'its arrays differ in length'
        raise DataError(f'{path} holds neither poses nor origins ({wrong}); {_REMEDY}')
    infos = [dict(zip(names, row)) for row in zip(*(arrays[name].tolist() for name in names))]
    check_keyframes(infos, path)
    described, texts = (arrays.get(name, np.empty(0, str)).tolist() for name in ('described', 'description'))
    return Poses(infos, {str(name): str(text) for name, text in zip(described, texts)})


def _given_origins(arrays, path) -> Keyframes:
    tokens, positions = arrays.get('token', np.empty(())), arrays['origins']
    number, most = (positions.shape + (0, 0))[:2]
    counts, scenes = arrays.get('count', np.full(number, most)), arrays.get('scene', np.full(number, ''))
    fits = positions.shape == (number, most, 3) and positions.dtype.kind == 'f' and np.isfinite(positions).all()
    same_length = all(array.shape == (number,) for array in (tokens, counts, scenes))
    if not fits or not same_length or counts.dtype.kind not in 'iu' or not ((counts >= 0) & (counts <= most)).all():
        raise DataError(
            f"{path} must hold 'token' [n], 'origins' [n, O, 3] in metres, and perhaps 'count' [n] of 0..O and 'scene' "
            f'[n]; {_REMEDY}'
        )
    names = [str(token) for token in tokens]
    origins = {name: of_one[:count].astype(np.float64) for name, of_one, count in zip(names, positions, counts)}
    if len(origins) != len(names):
        raise DataError(f'{path} names a sample twice; {_REMEDY}')
    return Keyframes(origins, dict(zip(names, (str(scene) for scene in scenes))), {})


def ray_pitches():
    """Pitches above the horizon in radians, ascending (39 of them)."""
    pitches = [-(math.pi / 2 - math.atan(ring + 1)) for ring in range(_GROUND_RINGS)]
    while pitches[-1] < _TOP_PITCH:
        pitches.append(pitches[-1] + (pitches[-1] - pitches[-2]))
    return pitches


@lru_cache(maxsize=1)
def lidar_rays() -> np.ndarray:
    """Unit vectors float32 [39 * 360, 3], pitch by pitch, azimuths 0..359 degrees from x to y. Read-only."""
    azimuths = [math.radians(degrees) for degrees in range(NUM_AZIMUTHS)]
    around = np.array([(math.cos(a), math.sin(a)) for a in azimuths])
    up = np.array([(math.cos(p), math.sin(p)) for p in ray_pitches()])
    rays = np.empty((len(up), NUM_AZIMUTHS, 3), dtype=np.float32)
    rays[..., :2] = up[:, None, :1] * around[None]
    rays[..., 2] = up[:, None, 1]
    rays = rays.reshape(-1, 3)
    rays.setflags(write=False)
    return rays
