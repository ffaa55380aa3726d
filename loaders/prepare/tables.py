"""The nuScenes tables, and which scenes belong to which split."""

from pathlib import Path
from typing import Dict, List

from lib.errors import DataError, UserError
from lib.io import read_json
from lib.openmmlab import prepare_openmmlab

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


def _official_splits(version):
    from nuscenes.utils.splits import create_splits_scenes

    splits = create_splits_scenes()
    split_of = _invert({name: splits[name] for name in ('train', 'val', 'test')})
    if 'mini' in version:
        split_of.update(_invert({'train': splits['mini_train'], 'val': splits['mini_val']}))
    return split_of


def _invert(splits):
    return {scene: split for split, scenes in splits.items() for scene in scenes}
