"""The nuScenes tables, and which scenes belong to which split."""

import os
from pathlib import Path
from typing import Dict, List

from lib.errors import DataError, UserError
from lib.io import read_json
from lib.openmmlab import prepare_openmmlab
from lib.registry import did_you_mean

_NEEDED = ('scene', 'sample', 'sample_data', 'ego_pose', 'calibrated_sensor', 'sensor')


def open_tables(data_root, version: str):
    """nuscenes-devkit's ``NuScenes`` on ``<data_root>/<version>``.

    Raises:
        UserError: nuscenes-devkit is not installed.
        DataError: missing or damaged tables.
    """
    tables = Path(data_root, version)
    missing = [name for name in _NEEDED if not (tables / (name + '.json')).is_file()]
    if missing:
        present = sorted(p.name for p in Path(data_root).glob('v1.0-*') if p.is_dir())
        raise DataError(
            f'{tables / missing[0]}.json does not exist; check --data-root and --version (versions there: '
            f'{", ".join(present) or "none"})'
        )
    prepare_openmmlab()
    try:
        from nuscenes import NuScenes
    except ImportError as error:
        raise UserError(f'nuscenes-devkit cannot be imported ({error}); run "make install"') from error
    try:
        return NuScenes(version=version, dataroot=str(data_root), verbose=False)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise DataError(
            f'the tables in {tables} cannot be used ({type(error).__name__}: {error}); unpack the metadata of '
            'nuScenes again'
        ) from error


def split_of_scenes(nusc) -> Dict[str, List[Dict]]:
    """Scene records by split: ``{'train': [...], 'val': [...], 'test': [...]}``, empty splits left out.

    ``<version>/splits.json`` ({split: [scene names]}), where present, goes before nuScenes' own splits.

    Raises:
        DataError: a scene belongs to no split.
    """
    own = Path(nusc.dataroot, nusc.version, 'splits.json')
    split_of = _invert(read_json(own)) if own.is_file() else _official_splits(nusc.version)
    scenes: Dict[str, List[Dict]] = {}
    for scene in nusc.scene:
        name = scene['name']
        if name not in split_of:
            raise DataError(
                f'scene {name} belongs to no split of nuScenes; name its split in {own}, e.g. '
                f'{{"train": ["{name}"], "val": []}}'
            )
        scenes.setdefault(split_of[name], []).append(scene)
    return scenes


def choose_scenes(nusc, splits: Dict[str, List[Dict]], choice) -> Dict[str, List[Dict]]:
    """The splits with the scenes that are wanted; those that become empty are left out.

    Args:
        nusc: the tables.
        splits: scene records by split.
        choice: ``scenes`` and ``only_present`` of a ``Choice``.

    Raises:
        DataError: an unknown scene, or none is left.
    """
    names = [scene['name'] for scenes in splits.values() for scene in scenes]
    for name in choice.scenes or ():
        if name not in names:
            raise DataError(f'--scenes: {nusc.version} has no scene {name!r}{did_you_mean(name, names)}')
    absent = _absent_images(nusc) if choice.only_present else {}
    chosen = {}
    for split, scenes in splits.items():
        wanted = [scene for scene in scenes if choice.scenes is None or scene['name'] in choice.scenes]
        left_out = [scene['name'] for scene in wanted if scene['token'] in absent]
        if left_out:
            print(f'note: {len(left_out)} of {len(wanted)} scenes of {split} lack images: {", ".join(left_out)}')
        chosen[split] = [scene for scene in wanted if scene['token'] not in absent]
    if not any(chosen.values()):
        example = next(iter(absent.values()), 'none')
        raise DataError(f'{nusc.dataroot}: no scene is whole (missing: {example}, ...); check --data-root and --scenes')
    return {split: scenes for split, scenes in chosen.items() if scenes}


def _absent_images(nusc) -> Dict[str, str]:
    """{scene token: an image of the scene that does not exist}."""
    scene_of = {sample['token']: sample['scene_token'] for sample in nusc.sample}
    absent: Dict[str, str] = {}
    for record in nusc.sample_data:
        scene = scene_of[record['sample_token']]
        if record['channel'].startswith('CAM') and scene not in absent:
            path = os.path.join(nusc.dataroot, record['filename'])
            if not os.path.isfile(path):
                absent[scene] = path
    return absent


def _official_splits(version):
    from nuscenes.utils.splits import create_splits_scenes

    splits = create_splits_scenes()
    split_of = _invert({name: splits[name] for name in ('train', 'val', 'test')})
    if 'mini' in version:
        split_of.update(_invert({'train': splits['mini_train'], 'val': splits['mini_val']}))
    return split_of


def _invert(splits):
    return {scene: split for split, scenes in splits.items() for scene in scenes}
