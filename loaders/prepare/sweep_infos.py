"""Info files with camera sweeps for every split of a nuScenes version.

MMDetection3D 1.0 writes ``gt_boxes`` as (x, y, z, length, width, height, yaw about +z). Files of earlier
versions, of which many are still around, hold (x, y, z, width, length, height, -yaw - pi/2). Nothing in a file
says which it is, but cars and buses are longer than wide.
"""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from lib.errors import DataError
from lib.infos import box_array, load_infos
from lib.io import save_pickle

from . import parallel_map
from .tables import add_camera_sweeps, choose_scenes, keyframe_info, open_tables, split_of_scenes

SWEEP_FILE = 'nuscenes_infos_{}_sweep.pkl'
MMDET3D_FILE = 'nuscenes_infos_{}.pkl'
_LONG_CLASSES = ('car', 'truck', 'bus', 'trailer', 'motorcycle', 'bicycle')


class WrittenInfos(NamedTuple):
    """One info file that was written.

    Attributes:
        path: the file.
        scenes: number of scenes in it.
        keyframes: number of keyframes in it.
    """

    path: Path
    scenes: int
    keyframes: int


class Choice(NamedTuple):
    """What is written, and where it may replace files.

    Attributes:
        scenes: names of the scenes taken; None = all.
        only_present: leave scenes out of which an image does not exist.
        prefix: what the files' names begin with.
        overwrite: replace files of another version, and files with more keyframes by some scenes.
    """

    scenes: Optional[Sequence[str]] = None
    only_present: bool = False
    prefix: str = ''
    overwrite: bool = False

    @property
    def limited(self) -> bool:
        """Not all scenes of the tables are wanted."""
        return self.scenes is not None or self.only_present


def write_sweep_infos(
    data_root,
    version: str,
    out_dir,
    from_infos: Optional[str] = None,
    processes: Optional[int] = None,
    choice: Optional[Choice] = None,
) -> List[WrittenInfos]:
    """Write ``nuscenes_infos_{train,val,test}_sweep.pkl`` for the splits that the version has.

    Args:
        data_root: nuScenes folder.
        version: name of its table folder, e.g. ``v1.0-trainval``.
        out_dir: folder of the pickles.
        from_infos: folder of MMDetection3D 1.0's ``nuscenes_infos_{split}.pkl`` to extend; None makes the
            infos from the tables alone.
        processes: worker processes; None = all cores.
        choice: which scenes, and under which names; None = all, the usual ones.

    Raises:
        DataError: missing or damaged tables, unknown scenes, or a file that would be lost.
    """
    choice = choice or Choice()
    nusc = open_tables(data_root, version)
    splits = choose_scenes(nusc, split_of_scenes(nusc), choice)
    paths = {split: Path(out_dir, choice.prefix + SWEEP_FILE.format(split)) for split in splits}
    for split, path in paths.items():
        _check_replaced(path, version, sum(scene['nbr_samples'] for scene in splits[split]), choice)
    written = []
    for split, scenes in sorted(splits.items()):
        if from_infos is None:
            infos = _from_tables(nusc, scenes, split, processes)
        else:
            infos = _extended(nusc, Path(from_infos, MMDET3D_FILE.format(split)), split, processes)
            infos = _of_scenes(infos, scenes) if choice.limited else infos
        infos.sort(key=lambda info: info['timestamp'])
        _note_missing_cameras(infos, split)
        save_pickle(paths[split], dict(infos=infos, metadata=dict(version=version)))
        written.append(WrittenInfos(paths[split], len({info['scene_token'] for info in infos}), len(infos)))
    return written


def _of_scenes(infos, scenes) -> List[Dict]:
    tokens = {scene['token'] for scene in scenes}
    return [info for info in infos if info['scene_token'] in tokens]


def _check_replaced(path, version, keyframes, choice) -> None:
    """Raise DataError where a file would be lost that this run does not make anew."""
    if choice.overwrite or not path.is_file():
        return
    try:
        there = load_infos(path)
    except DataError:
        return  # nothing of worth
    remedy = 'give --out-prefix (e.g. --out-prefix mini_) or another --out, or --overwrite to replace it'
    if there.version != version:
        raise DataError(f'{path} holds infos of version {there.version or "unknown"}, not {version}; {remedy}')
    if choice.limited and len(there.infos) > keyframes:
        raise DataError(f'{path} holds {len(there.infos)} keyframes, the chosen scenes have {keyframes}; {remedy}')


def _note_missing_cameras(infos, split) -> None:
    cameras = {name for info in infos for name in info['cams']}
    partial = [info for info in infos if len(info['cams']) < len(cameras)]
    if partial:
        absent = ', '.join(sorted(cameras - set(partial[0]['cams'])))
        print(
            f'note: {len(partial)} of {len(infos)} keyframes of {split} lack a camera in the tables, the first: '
            f'{partial[0]["token"]} ({absent}); they are used with allow_missing_cameras=True only'
        )


def _from_tables(nusc, scenes, split, processes):
    per_scene = parallel_map(_scene_infos, scenes, nusc, f'{split}: scenes', processes)
    return [info for infos in per_scene for info in infos]


def _scene_infos(nusc, scene) -> List[Dict]:
    infos, token = [], scene['first_sample_token']
    try:
        while token:
            sample = nusc.get('sample', token)
            infos.append(add_camera_sweeps(nusc, keyframe_info(nusc, sample)))
            token = sample['next']
    except KeyError as error:
        raise DataError(
            f'scene {scene["name"]}: the tables of {nusc.version} lack {error}, which keyframe {token} needs; unpack '
            'the metadata of nuScenes again'
        ) from error
    return infos


def _extended(nusc, path, split, processes):
    infos = with_length_first(load_infos(path).infos, path)
    known = {sample['token'] for sample in nusc.sample}
    foreign = [info['token'] for info in infos if info['token'] not in known]
    if foreign:
        raise DataError(
            f'{path} holds keyframe {foreign[0]}, which is not in the tables of {nusc.version}; give '
            'the --version that the file was made from'
        )
    label = f'{split}: keyframes'
    return list(parallel_map(_extend_one, range(len(infos)), (nusc, infos), label, processes))


def _extend_one(shared, position):
    nusc, infos = shared
    return add_camera_sweeps(nusc, infos[position])


def holds_width_first(infos: Sequence[Dict], source='infos') -> bool:
    """The boxes follow the convention before MMDetection3D 1.0: most vehicles would be wider than long.

    Raises:
        DataError: boxes that are none, named with ``source``.
    """
    wider = longer = 0
    for info in infos:
        boxes = box_array(info, source)
        vehicles = boxes[np.isin(np.asarray(info.get('gt_names', ()), dtype=str), _LONG_CLASSES)]
        wider += int((vehicles[:, 3] < vehicles[:, 4]).sum())
        longer += int((vehicles[:, 3] > vehicles[:, 4]).sum())
    return wider > longer


def with_length_first(infos: Sequence[Dict], source='infos') -> List[Dict]:
    """The infos with boxes in MMDetection3D 1.0's convention; converted, as new dicts, where they are not."""
    if not holds_width_first(infos, source):
        return list(infos)
    print('note: these infos hold boxes as (width, length, height), as before MMDetection3D 1.0; they are converted')
    return [_converted(info) if len(info.get('gt_boxes', ())) else info for info in infos]


def _converted(info: Dict) -> Dict:
    boxes = np.array(info['gt_boxes'], dtype=np.float64)
    boxes[:, 3:5] = boxes[:, [4, 3]]
    turned = -boxes[:, 6] - np.pi / 2
    boxes[:, 6] = (turned + np.pi) % (2 * np.pi) - np.pi
    return dict(info, gt_boxes=boxes)
