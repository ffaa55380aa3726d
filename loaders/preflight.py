"""Looking at a data set before long work: what its info file tells (counts, histories, calibration), and its files.

The quick look reads small sets whole and spot-checks large ones, in seconds.
"""

import sys
from collections import Counter
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

from lib.dataset import CheckedDataset
from lib.errors import DataError
from lib.infos import (
    MAX_KEYFRAME_GAP,
    camera_sweeps,
    current_lidar2img,
    ego_from_lidar,
    global_from_camera,
    global_from_ego,
    has_pose,
    past_lidar2img,
    rotation_matrix,
    split_scenes,
)

from .checks import (
    ERROR,
    OK,
    WARNING,
    Finding,
    Look,
    check_images,
    check_labels,
    check_scans,
    image_paths,
    name_some,
    spread,
)
from .history import STEPS_PER_KEYFRAME, SWEEPS_PER_KEYFRAME

MAX_SHORT_HISTORY = 0.5  # of the samples; of nuScenes' it is 17.5 %
MAX_LONE_KEYFRAMES = 2  # scenes of one keyframe that may be meant so
MAX_PIXEL_DISAGREEMENT = 3.0  # between the two ways into a keyframe's own image
MAX_CAMERA_DISTANCE = 10.0  # metres between a camera and the ego frame's origin
MAX_CAMERA_DELAY = 200_000  # microseconds between a keyframe and its images
MAX_SPEED = 70.0  # metres per second between keyframes
_AFTER_GAP = 'after a gap of over 5 s'
_NO_SWEEPS = 'after a keyframe without sweeps, which begins a scene where scenes have no name'
QUICK_IMAGES, QUICK_LABELS, QUICK_KEYFRAMES, QUICK_SCANS = 3000, 64, 64, 64


def inspect_dataset(dataset: CheckedDataset, look: Look = Look()) -> List[Finding]:  # noqa: B008 (a Look never changes)
    """Findings on a data set; single damaged files are warnings where it skips unreadable samples."""
    look = look._replace(level=WARNING if dataset.skips_unreadable else ERROR)
    full = look.full
    used = dataset.used_positions()
    images_per_keyframe = STEPS_PER_KEYFRAME * len(dataset.task.cameras)
    some = used if full else [used[i] for i in spread(len(used), QUICK_KEYFRAMES)]
    some_for_images = used if full else [used[i] for i in spread(len(used), QUICK_IMAGES // images_per_keyframe + 1)]
    findings = _counts(dataset) + _histories(dataset)
    findings += check_calibration(dataset, some, look)
    findings += check_images(image_paths(dataset, some_for_images), _count_images(dataset, used), look)
    if dataset.has_labels:
        findings += check_labels(dataset, spread(len(dataset), len(dataset) if full else QUICK_LABELS), look)
    if dataset.reads_lidar:
        some = dataset.positions if full else [dataset.positions[i] for i in spread(len(dataset), QUICK_SCANS)]
        findings += check_scans(dataset, some, look)
    return findings


def needs_mask(cfg, name: str) -> bool:
    """``data.<name>`` is what the model of config ``cfg`` learns from, and it does so from visible voxels only."""
    return name == 'train' and cfg is not None and bool(cfg.model.get('use_mask_camera'))


def preflight(dataset: CheckedDataset, name: str, cfg=None) -> None:
    """The quick look, before training or evaluation: prints what is doubtful, stops at what is wrong.

    Args:
        dataset: with its info file read.
        name: how the user knows it, e.g. ``train``.
        cfg: the whole config; None where only the data set counts.

    Raises:
        DataError: a file is missing or damaged.
    """
    findings = inspect_dataset(dataset, Look(shown=3, needs_mask=needs_mask(cfg, name)))
    for finding in findings:
        if finding.level == WARNING:
            print(f'data.{name}: {finding.line()}', file=sys.stderr)
    errors = [finding.text for finding in findings if finding.level == ERROR]
    if errors:
        others = f' (and {len(errors) - 1} more; list them with tools/check_data.py)' if len(errors) > 1 else ''
        raise DataError(f'data.{name}: {errors[0]}{others}')


def _counts(dataset: CheckedDataset) -> List[Finding]:
    scenes = split_scenes(dataset.infos)
    with_sweeps = sum(bool(camera_sweeps(info)) for info in dataset.infos)
    version = f', {dataset.version}' if dataset.version else ''
    text = (
        f'{dataset.ann_file}: {len(dataset)} samples of {len(dataset.infos)} keyframes in {len(scenes)} scenes, '
        f'{with_sweeps} with camera sweeps{version}'
    )
    findings = [Finding(OK, text)]
    if not with_sweeps and len(dataset.infos) > len(scenes) and dataset.task.num_frames > 1:
        remedy = 'training sees earlier keyframes only; make it with gen_sweep_info.py'
        findings.append(Finding(WARNING, f'{dataset.ann_file} has no camera sweeps: {remedy}'))
    return findings


def _histories(dataset: CheckedDataset) -> List[Finding]:
    """How many samples have fewer earlier keyframes than the task's frames, and where those scenes begin."""
    wanted = dataset.task.num_frames - 1
    earlier, reasons = _earlier_keyframes(dataset)
    short = [position for position in dataset.positions if earlier[position] < wanted]
    if not wanted or not short:
        return []
    counts = Counter(reasons[position] for position in short)
    why = ', '.join(f'{count} {reason}' for reason, count in counts.most_common())
    share = len(short) / len(dataset)
    text = f'{len(short)} of {len(dataset)} samples ({share:.1%}) have fewer than {wanted} earlier keyframes: {why}'
    findings = [Finding(WARNING if share > MAX_SHORT_HISTORY else OK, text)]
    begins = [steps == 0 and reason == _NO_SWEEPS for steps, reason in zip(earlier, reasons)]
    alone = sum(now and after for now, after in zip(begins, begins[1:]))
    if alone > MAX_LONE_KEYFRAMES:
        text = f'{dataset.ann_file}: {alone} keyframes without sweeps are followed by others within 5 s, and each is '
        text += 'taken for the first of a scene; name the scenes with gen_sweep_info.py'
        findings.append(Finding(WARNING, text))
    return findings


def _earlier_keyframes(dataset: CheckedDataset) -> Tuple[List[int], List[str]]:
    """Per info the number of keyframes before it in its scene, and why the scene begins where it does."""
    earlier: List[int] = []
    reasons: List[str] = []
    for position, info in enumerate(dataset.infos):
        before = dataset.previous(position)
        if before is not None:
            earlier.append(earlier[before] + 1)
            reasons.append(reasons[before])
            continue
        gap = info['timestamp'] - dataset.infos[position - 1]['timestamp'] if position else MAX_KEYFRAME_GAP + 1
        named = info.get('scene_token') or info.get('scene_name')
        earlier.append(0)
        reasons.append('at the start of a scene' if named else _AFTER_GAP if gap > MAX_KEYFRAME_GAP else _NO_SWEEPS)
    return earlier, reasons


def _count_images(dataset: CheckedDataset, positions: Sequence[int]) -> int:
    sweeps = sum(len(camera_sweeps(dataset.infos[position])) for position in positions)
    return (len(positions) + sweeps) * len(dataset.task.cameras)


# -- do calibration, poses and times of the infos make sense?


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
