"""Info files with camera sweeps for every split of a nuScenes version."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from lib.errors import DataError
from lib.infos import load_infos
from lib.io import save_pickle

from .instances import with_length_first
from .keyframe_infos import add_camera_sweeps, keyframe_info
from .parallel import parallel_map
from .tables import open_tables, split_of_scenes

SWEEP_FILE = 'nuscenes_infos_{}_sweep.pkl'
MMDET3D_FILE = 'nuscenes_infos_{}.pkl'


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


def write_sweep_infos(
    data_root, version: str, out_dir, from_infos: Optional[str] = None, processes: Optional[int] = None
) -> List[WrittenInfos]:
    """Write ``nuscenes_infos_{train,val,test}_sweep.pkl`` for the splits that the version has.

    Args:
        data_root: nuScenes folder.
        version: name of its table folder, e.g. ``v1.0-trainval``.
        out_dir: folder of the pickles.
        from_infos: folder of MMDetection3D 1.0's ``nuscenes_infos_{split}.pkl`` to extend; None makes the
            infos from the tables alone.
        processes: worker processes; None = all cores.
    """
    nusc = open_tables(data_root, version)
    written = []
    for split, scenes in sorted(split_of_scenes(nusc).items()):
        if from_infos is None:
            infos = _from_tables(nusc, scenes, split, processes)
        else:
            infos = _extended(nusc, Path(from_infos, MMDET3D_FILE.format(split)), split, processes)
        infos.sort(key=lambda info: info['timestamp'])
        path = Path(out_dir, SWEEP_FILE.format(split))
        save_pickle(path, dict(infos=infos, metadata=dict(version=version)))
        written.append(WrittenInfos(path, len({info['scene_token'] for info in infos}), len(infos)))
    return written


def _from_tables(nusc, scenes, split, processes):
    per_scene = parallel_map(_scene_infos, scenes, nusc, f'{split}: scenes', processes)
    return [info for infos in per_scene for info in infos]


def _scene_infos(nusc, scene) -> List[Dict]:
    infos, token = [], scene['first_sample_token']
    while token:
        sample = nusc.get('sample', token)
        infos.append(add_camera_sweeps(nusc, keyframe_info(nusc, sample)))
        token = sample['next']
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
