"""Looking at a data set before long work: counts, files, labels, calibration.

The quick look reads small sets whole and spot-checks large ones, in seconds.
"""

import sys
from typing import List, Optional

from lib.dataset import CheckedDataset
from lib.errors import DataError
from lib.infos import camera_sweeps, split_scenes

from .checks import ERROR, OK, WARNING, Finding, Look, spread
from .checks.calibration import check_calibration
from .checks.images import check_images, image_paths
from .checks.labels import check_labels
from .history import STEPS_PER_KEYFRAME

QUICK_IMAGES, QUICK_LABELS, QUICK_KEYFRAMES = 3000, 64, 64


def inspect_dataset(
    dataset: CheckedDataset, full: bool = False, decode: bool = False, processes: Optional[int] = 1, shown: int = 10
) -> List[Finding]:
    """Findings on a data set; damaged files are warnings where it skips unreadable samples.

    Args:
        dataset: the data set.
        full: look at every file instead of some.
        decode: decode every image that is looked at.
        processes: worker processes; None = all cores.
        shown: most files named one by one per kind.
    """
    look = Look(full, decode, processes, WARNING if dataset.skips_unreadable else ERROR, shown)
    used = dataset.used_positions()
    images_per_keyframe = STEPS_PER_KEYFRAME * len(dataset.task.cameras)
    some = used if full else [used[i] for i in spread(len(used), QUICK_KEYFRAMES)]
    some_for_images = used if full else [used[i] for i in spread(len(used), QUICK_IMAGES // images_per_keyframe + 1)]
    findings = _counts(dataset)
    findings += check_calibration(dataset, some, look)
    findings += check_images(image_paths(dataset, some_for_images), _count_images(dataset, used), look)
    if dataset.has_labels:
        findings += check_labels(dataset, spread(len(dataset), len(dataset) if full else QUICK_LABELS), look)
    return findings


def preflight(dataset: CheckedDataset, name: str) -> None:
    """The quick look, before training or evaluation: prints what is doubtful, stops at what is wrong.

    Args:
        dataset: with its info file read.
        name: how the user knows it, e.g. ``train``.

    Raises:
        DataError: a file is missing or damaged.
    """
    findings = inspect_dataset(dataset, shown=3)
    for finding in findings:
        if finding.level == WARNING:
            print(f'data.{name}: {finding.line()}', file=sys.stderr)
    errors = [finding.text for finding in findings if finding.level == ERROR]
    if errors:
        others = f' (and {len(errors) - 1} more; list them with tools/check_data.py)' if len(errors) > 1 else ''
        raise DataError(f'data.{name}: {errors[0]}{others}')


def _counts(dataset) -> List[Finding]:
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


def _count_images(dataset, positions) -> int:
    sweeps = sum(len(camera_sweeps(dataset.infos[position])) for position in positions)
    return (len(positions) + sweeps) * len(dataset.task.cameras)
