"""Panoptic label files: Occ3D's with instance ids added, for every keyframe of the info files."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from lib.errors import DataError
from lib.infos import load_infos
from lib.io import find_under, load_npz_checked, save_npz
from lib.labels import LABEL_FILE, LabelFolder, check_labels
from lib.task import Task

from .instances import ego_boxes, make_instances, with_length_first
from .parallel import parallel_map
from .sweep_infos import SWEEP_FILE

_KEPT = ('semantics', 'mask_lidar', 'mask_camera')


class PanopticJob(NamedTuple):
    """What every worker needs.

    Attributes:
        infos: keyframes.
        source: label files without instances.
        out_dir: folder of the new label files.
        task: grid and label set of the source.
        overwrite: make files anew that are there.
    """

    infos: Sequence[Dict]
    source: LabelFolder
    out_dir: Path
    task: Task
    overwrite: bool


class PanopticResult(NamedTuple):
    """Counts of keyframes.

    Attributes:
        written: files made.
        kept: files that were there already.
        failed: one message per keyframe whose labels could not be read.
    """

    written: int
    kept: int
    failed: List[str]


def write_panoptic_labels(
    data_root,
    version: str,
    occ_gt_root: str,
    out: str,
    task: Task,
    info_files: Optional[Sequence[str]] = None,
    overwrite: bool = False,
    processes: Optional[int] = None,
) -> PanopticResult:
    """Write ``<out>/<scene>/<token>/labels.npz`` for all keyframes with boxes; files that exist are kept.

    Args:
        data_root: nuScenes folder; ``occ_gt_root`` and ``info_files`` may be relative to it.
        version: nuScenes version the info files must be of.
        occ_gt_root: labels without instances.
        out: folder of the new labels.
        task: grid and label set of the labels.
        info_files: info pickles; None = the train and val files in ``data_root``.
        overwrite: make existing files anew.
        processes: worker processes; None = all cores.

    Raises:
        DataError: no info file, one of another version, or not one label could be read.
    """
    infos = _gather_infos(Path(data_root), version, info_files)
    job = PanopticJob(
        infos, LabelFolder(find_under(data_root, occ_gt_root), data_root, version), Path(out), task, overwrite
    )
    results = list(parallel_map(_write_one, range(len(infos)), job, 'labels', processes))
    failed = [result for result in results if result not in ('written', 'kept')]
    if len(failed) == len(infos):
        raise DataError(f'not one label of {len(infos)} keyframes could be read; the first: {failed[0]}')
    return PanopticResult(results.count('written'), results.count('kept'), failed)


def _gather_infos(data_root, version, info_files):
    usual = [data_root / SWEEP_FILE.format(split) for split in ('train', 'val')]
    paths = [find_under(data_root, name) for name in info_files] if info_files else [p for p in usual if p.is_file()]
    if not paths:
        raise DataError(
            f'{data_root} holds no info files ({SWEEP_FILE.format("train")}); make them with gen_sweep_info.py, or '
            'name others with --infos'
        )
    infos = []
    for path in paths:
        content = load_infos(path)
        if content.version and content.version != version:
            raise DataError(
                f'{path} is of version {content.version}, not {version}; give --version {content.version}, or make it '
                'again with gen_sweep_info.py'
            )
        infos.extend(with_length_first(content.infos, path))
    return infos


def _write_one(job, position) -> str:
    """'written', 'kept', or what was wrong."""
    info = job.infos[position]
    try:
        source = job.source.path(info)
        target = job.out_dir / source.parent.parent.name / source.parent.name / LABEL_FILE
        if target.is_file() and not job.overwrite:
            return 'kept'
        arrays = load_npz_checked(source, required=_KEPT[:1], optional=_KEPT)
        check_labels(source, arrays, job.task)
        instances = make_instances(arrays['semantics'], ego_boxes(info, job.task.label_set), job.task)
        save_npz(target, dict(arrays, instances=instances))
        return 'written'
    except DataError as error:
        return str(error)
