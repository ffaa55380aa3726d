"""Looking at a data set before long work: counts, files, labels, calibration.

The quick look reads small sets whole and spot-checks large ones, in seconds.
"""

import sys
from collections import Counter
from typing import List, Sequence, Tuple

from lib.dataset import CheckedDataset
from lib.errors import DataError
from lib.infos import MAX_KEYFRAME_GAP, camera_sweeps, split_scenes

from .checks import ERROR, OK, WARNING, Finding, Look, spread
from .checks.calibration import check_calibration
from .checks.files import check_images, check_labels, check_scans, image_paths
from .history import STEPS_PER_KEYFRAME

MAX_SHORT_HISTORY = 0.5  # of the samples; of nuScenes' it is 17.5 %
MAX_LONE_KEYFRAMES = 2  # scenes of one keyframe that may be meant so
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
