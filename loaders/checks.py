"""Are the files of a data set there and whole? Are labels of the right shape and label set, and what do they hold?

Every check reports findings, one line each.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from lib.classes import IGNORE_LABEL
from lib.dataset import CheckedDataset
from lib.errors import DataError, UserError
from lib.infos import camera_sweeps, relocate
from lib.labels import LabelLoss, arrays_of_file, measure_loss
from lib.task import Task

from .decode import check_whole, read_image, read_scan
from .prepare import parallel_map

OK, WARNING, ERROR = 'ok', 'warning', 'error'
MOST_LOST = 0.5  # of the occupied voxels of the files
MAX_OCCUPIED = 0.5  # of all voxels
USUAL_OCCUPIED = '5 to 10 %'  # Occ3D and OpenOcc
THREADS = 16  # that open label files at once, which takes time on network disks alone
RARE, MAX_RARE_SHARE = 0.05, 0.5  # of the occupied voxels: a class usually below the first is never above the second


class Finding(NamedTuple):
    """One line of a report.

    Attributes:
        level: ``ok``, ``warning`` or ``error``.
        text: one sentence; names the file and the remedy where something is wrong.
    """

    level: str
    text: str

    def line(self) -> str:
        return f'[{self.level}] {self.text}'


class Look(NamedTuple):
    """How closely to look.

    Attributes:
        full: at every file, with a progress bar; else at some.
        decode: decode images; else look at both ends of each file.
        processes: worker processes; None = all cores.
        level: of a single file that is missing or damaged.
        shown: most files named one by one per kind.
        needs_mask: labels without ``mask_camera`` cannot be used.
    """

    full: bool = False
    decode: bool = False
    processes: Optional[int] = 1
    level: str = ERROR
    shown: int = 10
    needs_mask: bool = False


def spread(count: int, wanted: int) -> List[int]:
    """At most ``wanted`` of the indices 0..count-1, first and last among them, evenly spread."""
    if wanted >= count:
        return list(range(count))
    return sorted({round(step * (count - 1) / max(wanted - 1, 1)) for step in range(wanted)})


def name_some(messages: Sequence[str], what: str, level: str, shown: int) -> List[Finding]:
    """A finding per message up to ``shown``, then one that counts the rest."""
    findings = [Finding(level, message) for message in messages[:shown]]
    if len(messages) > shown:
        findings.append(Finding(level, f'... and {len(messages) - shown} more {what}'))
    return findings


def image_paths(dataset: CheckedDataset, positions: Iterable[int]) -> List[str]:
    """Paths of the images of keyframes and of the sweeps before them, each once."""
    paths: Dict[str, None] = {}
    for position in positions:
        info = dataset.infos[position]
        for cams in [info['cams']] + camera_sweeps(info):
            for name in dataset.task.cameras:
                if name in cams:
                    paths[relocate(cams[name]['data_path'], dataset.data_root)] = None
    return list(paths)


def check_images(paths: List[str], total: int, look: Look) -> List[Finding]:
    """Findings on image files ``paths`` of a data set that has ``total``."""
    problems = _problems(_look_at_image, look, paths, 'images', look)
    if problems:
        return name_some(problems, 'images are missing or damaged', look.level, look.shown)
    how = 'decoded' if look.decode else 'both ends of each file'
    return [Finding(OK, f'{len(paths)} of {total} images looked at ({how}): all there and whole')]


def _look_at_image(look: Look, path: str) -> None:
    if look.decode:
        read_image(path)
    else:
        check_whole(path)


def _problems(read: Callable, given, items: Sequence, label: str, look: Look) -> List[str]:
    """What is wrong with each of the items that ``read(given, item)`` cannot read."""
    results = parallel_map(_problem, items, (read, given), label, look.processes, look.full)
    return [problem for problem in results if problem]


def _problem(shared, item) -> str:
    read, given = shared
    try:
        read(given, item)
    except DataError as error:
        return str(error)
    return ''


def check_scans(dataset: CheckedDataset, positions: List[int], look: Look) -> List[Finding]:
    """Findings on the LiDAR scans of some keyframes."""
    problems = _problems(_read_scan, dataset, positions, 'scans', look)
    if problems:
        return name_some(problems, 'LiDAR scans are missing or damaged', look.level, look.shown)
    return [Finding(OK, f'{len(positions)} of {len(dataset)} LiDAR scans read: all there and whole')]


def _read_scan(dataset: CheckedDataset, position: int) -> None:
    read_scan(dataset.infos[position], dataset.data_root)


class LabelFacts(NamedTuple):
    """What one label file holds.

    Attributes:
        problem: '' or what is wrong with the file.
        counts: int64 [num_classes], voxels per class.
        things: voxels of thing classes.
        things_without_id: those of them whose instance id is 0.
        keys: arrays in the file.
        loss: what becomes of its occupied voxels where the task has other voxels; else None.
    """

    problem: str
    counts: np.ndarray
    things: int = 0
    things_without_id: int = 0
    keys: Tuple[str, ...] = ()
    loss: Optional[LabelLoss] = None


class LabelArrays(NamedTuple):
    """What the directory of one label file says.

    Attributes:
        path: the file.
        problem: '' or what is wrong with it.
        names: of its arrays.
    """

    path: str
    problem: str
    names: Tuple[str, ...] = ()


def check_labels(dataset: CheckedDataset, samples: List[int], look: Look) -> List[Finding]:
    """Findings on label files: those of some samples are read, and of all it is looked whether they are there, with
    which arrays."""
    try:
        dataset.label_path(0)
    except UserError as error:  # not even the scene can be told
        return [Finding(ERROR, str(error))]
    facts = list(parallel_map(_facts_of_label, samples, dataset, 'labels', look.processes, look.full))
    others = _glance(dataset, set(range(len(dataset))) - set(samples))
    problems = [one.problem for one in (*facts, *others) if one.problem]
    findings = name_some(problems, 'labels cannot be used', look.level, look.shown)
    usable = [fact for fact in facts if not fact.problem]
    if not usable:
        return [finding._replace(level=ERROR) for finding in findings]
    paths = [dataset.label_path(index) for index, fact in zip(samples, facts) if not fact.problem]
    good = [LabelArrays(str(path), '', fact.keys) for path, fact in zip(paths, usable)]
    good += [one for one in others if not one.problem]
    findings.append(_read(len(usable), good, dataset))
    findings.extend(_histogram(sum(fact.counts for fact in usable), dataset.task))
    findings.extend(_for_the_config(sum(fact.counts for fact in usable), dataset.task))
    findings.extend(_loss([fact.loss for fact in usable if fact.loss], dataset.task))
    findings.extend(_masks(good, look))
    if dataset.task.panoptic:
        findings.append(_instances(usable))
    return findings


def _glance(dataset: CheckedDataset, indices: Iterable[int]) -> List[LabelArrays]:
    """What the directories of label files say, some at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(partial(_arrays_of_label, dataset), sorted(indices)))


def _arrays_of_label(dataset: CheckedDataset, index: int) -> LabelArrays:
    try:
        path = str(dataset.label_path(index))
    except DataError as error:
        return LabelArrays('', str(error))
    try:
        return LabelArrays(path, '', arrays_of_file(path, dataset.task))
    except DataError as error:
        return LabelArrays(path, str(error))


def _read(count: int, good: List[LabelArrays], dataset: CheckedDataset) -> Finding:
    names = ', '.join(sorted(set.intersection(*[set(one.names) for one in good])))
    others = f', {len(good) - count} more are there' if len(good) > count else ''
    grid = list(dataset.task.grid_shape)
    return Finding(OK, f'{count} of {len(dataset)} label files read{others}; grid {grid}, arrays in all: {names}')


def _masks(good: List[LabelArrays], look: Look) -> List[Finding]:
    """Label files without ``mask_camera``, where some have it or all need it."""
    without = [one.path for one in good if 'mask_camera' not in one.names]
    if not without or (len(without) == len(good) and not look.needs_mask):
        return []
    text = f'{len(without)} of {len(good)} label files, e.g. {without[0]}, have no mask_camera'
    if look.needs_mask:
        remedy = 'model.use_mask_camera needs it; use labels that have it, or set it to False'
        return [Finding(ERROR, f'{text}: {remedy}')]
    return [Finding(WARNING, f'{text}, and mIoU never mixes them with the others: score without miou, or take others')]


def _facts_of_label(dataset: CheckedDataset, index: int) -> LabelFacts:
    task = dataset.task
    nothing = np.zeros(task.label_set.num_classes, dtype=np.int64)
    try:
        labels = dataset.ground_truth(index)
    except DataError as error:
        return LabelFacts(str(error), nothing)
    semantics = labels['semantics']
    counts = np.bincount(semantics[semantics != IGNORE_LABEL], minlength=len(nothing)).astype(np.int64)
    is_thing = np.isin(semantics, task.label_set.thing_ids)
    without = int((is_thing & (labels['instances'] == 0)).sum()) if task.panoptic else 0
    same = task.label_grid == task.grid
    loss = None if same else measure_loss(dataset.label_path(index), task, dataset.infos[dataset.positions[index]])
    return LabelFacts('', counts, int(is_thing.sum()), without, tuple(labels), loss)


def _for_the_config(counts, task: Task) -> List[Finding]:
    """Counts to paste into a label set that has none."""
    if task.label_set.voxel_counts:
        return []
    pairs = ', '.join(f'{name}={max(int(n), 1)}' for name, n in zip(task.label_set.class_names, counts))
    return [Finding(OK, f'for task.label_set, to weigh the classes by: voxel_counts=dict({pairs})')]


def _loss(losses: List[LabelLoss], task: Task) -> List[Finding]:
    """What the labels lose on the way to the task's voxels."""
    if not losses:
        return []
    occupied, dropped, merged, kept = (sum(counts) for counts in zip(*losses))
    text = (
        f'labels are brought from {task.label_grid.describe()} to {task.grid.describe()}: of {occupied} occupied '
        f'voxels {dropped} ({dropped / max(occupied, 1):.1%}) lie outside and are dropped, {merged} '
        f'({merged / max(occupied, 1):.1%}) are in a voxel that got another class (occupied goes before ignored and '
        f'free, then the most frequent class counts); {kept} are occupied afterwards'
    )
    return [Finding(WARNING if dropped + merged > MOST_LOST * occupied else OK, text)]


def _histogram(counts, task: Task) -> List[Finding]:
    """Share of each class among the occupied voxels; classes that do not occur."""
    names = task.label_set.occupied_names
    occupied = int(counts[: task.label_set.free_id].sum())
    if not occupied:
        return [Finding(ERROR, 'the labels hold free voxels only; check occ_gt_root and task.label_set')]
    shares = [f'{name} {100.0 * count / occupied:.2f}%' for name, count in zip(names, counts)]
    of_all = 100.0 * occupied / counts.sum()
    findings = [Finding(OK, f'occupied voxels: {of_all:.2f}% of all; of them {", ".join(shares)}')]
    absent = [name for name, count in zip(names, counts) if not count]
    if absent:
        findings.append(Finding(WARNING, f'classes that do not occur in the labels looked at: {", ".join(absent)}'))
    return findings + _implausible(counts, task)


def _implausible(counts, task: Task) -> List[Finding]:
    """Shares that street scenes do not have, as when ids are shifted or free has another id."""
    labels, occupied = task.label_set, counts[: task.label_set.free_id]
    doubts = []
    if occupied.sum() > MAX_OCCUPIED * counts.sum():
        doubts.append(f'{occupied.sum() / counts.sum():.0%} of the voxels are occupied ({USUAL_OCCUPIED} is usual)')
    known = sum(labels.voxel_counts.get(name, 0) for name in labels.occupied_names)
    for name, count in zip(labels.occupied_names, occupied):
        share, usual = count / occupied.sum(), labels.voxel_counts.get(name, known) / max(known, 1)
        if known and share > MAX_RARE_SHARE and usual < RARE:
            doubts.append(f'{share:.0%} of the occupied voxels are {name} ({usual:.1%} is usual)')
    remedy = f'are these the ids of label set {labels.name!r}, free = {labels.free_id}?'
    return [Finding(WARNING, f'implausible labels: {"; ".join(doubts)}; {remedy}')] if doubts else []


def _instances(usable: List[LabelFacts]) -> Finding:
    things, without = sum(fact.things for fact in usable), sum(fact.things_without_id for fact in usable)
    text = f'{without} of {things} voxels of things have no instance id'
    return Finding(WARNING if without > 0.2 * things else OK, text)
