"""Do calibration, poses and times of the infos make sense?"""

from typing import Callable, Dict, List

import numpy as np

from lib.dataset import CheckedDataset
from lib.infos import (
    camera_sweeps,
    current_lidar2img,
    ego_from_lidar,
    global_from_camera,
    global_from_ego,
    has_pose,
    past_lidar2img,
    rotation_matrix,
)

from ..history import SWEEPS_PER_KEYFRAME
from . import OK, WARNING, Finding, Look, name_some

MAX_PIXEL_DISAGREEMENT = 3.0  # between the two ways into a keyframe's own image
MAX_CAMERA_DISTANCE = 10.0  # metres between a camera and the ego frame's origin
MAX_CAMERA_DELAY = 200_000  # microseconds between a keyframe and its images
MAX_SPEED = 70.0  # metres per second between keyframes


def check_calibration(dataset: CheckedDataset, positions: List[int], look: Look) -> List[Finding]:
    """Findings on the infos at ``positions`` (indices into ``dataset.infos``)."""
    messages = []
    for position in positions:
        info = dataset.infos[position]
        for check in (_rotations, _cameras, _two_ways, _sweep_times):
            messages.extend(f'keyframe {info["token"]}: {m}' for m in check(info, dataset.task.cameras))
        messages.extend(_speed(dataset, position))
    if messages:
        return name_some(messages, 'doubts about calibration', WARNING, look.shown)
    return [Finding(OK, f'calibration, poses and times of {len(positions)} keyframes make sense')]


def _rotations(info: Dict, cameras) -> List[str]:
    """Rotations that rotate."""
    named: Dict[str, Callable] = dict(lidar2ego=lambda: ego_from_lidar(info), ego2global=lambda: global_from_ego(info))
    for name in cameras:
        if has_pose(info['cams'].get(name, {})):
            named[f'{name} to global'] = lambda entry=info['cams'][name]: global_from_camera(entry)
    problems = []
    for name, make in named.items():
        matrix = make()
        rotation = matrix[:3, :3]
        if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
            problems.append(f'{name} is no rotation')
    return problems


def _cameras(info: Dict, cameras) -> List[str]:
    problems = []
    for name in cameras:
        entry = info['cams'].get(name)
        if entry is None:
            problems.append(f'camera {name} is missing')
            continue
        if not (np.asarray(entry['cam_intrinsic'])[:2, 2] > 0).all():
            problems.append(f'{name}: the centre of cam_intrinsic lies outside the image')
        centre = ego_from_lidar(info) @ np.append(np.asarray(entry['sensor2lidar_translation'], float), 1.0)
        if np.linalg.norm(centre[:3]) > MAX_CAMERA_DISTANCE:
            problems.append(f'{name} stands {np.linalg.norm(centre[:3]):.1f} m from the car')
        if abs(entry['timestamp'] - info['timestamp']) > MAX_CAMERA_DELAY:
            seconds = (entry['timestamp'] - info['timestamp']) / 1e6
            problems.append(f'{name}: image taken {seconds:.2f} s from the keyframe')
    return problems


def _two_ways(info: Dict, cameras) -> List[str]:
    """A point 20 m before each camera: through sensor2lidar and through the global frame."""
    problems = []
    for name in cameras:
        entry = info['cams'].get(name)
        if entry is None or not has_pose(entry):
            continue
        ahead = rotation_matrix(entry['sensor2lidar_rotation']) @ [0.0, 0.0, 20.0]
        point = np.append(ahead + entry['sensor2lidar_translation'], 1.0)
        pixels = [matrix @ point for matrix in (current_lidar2img(entry), past_lidar2img(info, entry))]
        with np.errstate(all='ignore'):  # what is not finite is reported as a disagreement
            apart = np.linalg.norm(pixels[0][:2] / pixels[0][2] - pixels[1][:2] / pixels[1][2])
        if not apart < MAX_PIXEL_DISAGREEMENT:
            problems.append(f'{name}: sensor2lidar and sensor2global disagree by {apart:.1f} pixels')
    return problems


def _sweep_times(info: Dict, cameras) -> List[str]:
    sweeps = camera_sweeps(info)
    if sweeps and len(sweeps) != SWEEPS_PER_KEYFRAME:
        return [f'{len(sweeps)} sweeps, {SWEEPS_PER_KEYFRAME} are expected']
    for name in cameras:
        times = [cams[name]['timestamp'] for cams in [info['cams']] + sweeps if name in cams]
        if any(later > earlier for earlier, later in zip(times, times[1:])):
            return [f'sweeps of {name} are not in order, newest first']
    return []


def _speed(dataset: CheckedDataset, position: int) -> List[str]:
    before = dataset.previous(position)
    if before is None:
        return []
    info, earlier = dataset.infos[position], dataset.infos[before]
    metres = np.linalg.norm(np.subtract(info['ego2global_translation'], earlier['ego2global_translation']))
    seconds = (info['timestamp'] - earlier['timestamp']) / 1e6
    if metres > MAX_SPEED * max(seconds, 1e-3):
        return [f'keyframe {info["token"]}: the car moved {metres:.1f} m in {seconds:.2f} s']
    return []
