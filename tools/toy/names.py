"""Names of nuScenes' tables and of the toy scenes: its own, so that its devkit knows which split each belongs to."""

from typing import List, NamedTuple, Optional

from lib.errors import UserError

MINI_TRAIN = (
    'scene-0061',
    'scene-0553',
    'scene-0655',
    'scene-0757',
    'scene-0796',
    'scene-1077',
    'scene-1094',
    'scene-1100',
)
MINI_VAL = ('scene-0103', 'scene-0916')
SPLITS = ('both', 'train', 'val', 'test')
VERSIONS = ('v1.0-mini', 'v1.0-trainval', 'v1.0-test')


TABLES = (
    'category',
    'attribute',
    'visibility',
    'instance',
    'sensor',
    'calibrated_sensor',
    'ego_pose',
    'log',
    'scene',
    'sample',
    'sample_data',
    'sample_annotation',
    'map',
)


class ScenePlan(NamedTuple):
    """Which scenes to make.

    Attributes:
        version: name of the tables' folder.
        train, val, test: scene names by split.
        names: all of them: validation scenes spread among the training ones, so that both are alike.
    """

    version: str
    train: List[str]
    val: List[str]
    test: List[str]
    names: List[str]


def plan_scenes(
    count: int, split: str = 'both', version: Optional[str] = None, held_out: Optional[int] = None
) -> ScenePlan:
    """Choose the names of ``count`` scenes.

    With ``split='both'``, ``held_out`` of the scenes are validation scenes; by default about a fifth, and at least
    one of two or more.
    Without ``version``, v1.0-mini is used while its ten scenes suffice, else v1.0-trainval (v1.0-test for
    ``split='test'``).

    Raises:
        UserError: the version does not have that many scenes in that split.
    """
    version = version or _smallest_version(count, split)
    train, val, test = _split_names(version)
    if split == 'both':
        if held_out is None:
            held_out = 0 if count == 1 else max(1, round(count / 5))
        wanted = dict(test=count) if version == 'v1.0-test' else dict(train=count - held_out, val=held_out)
    else:
        wanted = {split: count}
    chosen = {}
    for name, known in (('train', train), ('val', val), ('test', test)):
        number = wanted.get(name, 0)
        if number > len(known):
            raise UserError(
                f'--scenes {count} needs {number} {name} scenes, but {version} has {len(known)} of them; ask for '
                'fewer, or for another --version or --split'
            )
        chosen[name] = list(known[:number])
    return ScenePlan(version, **chosen, names=_spread(chosen['train'], chosen['val'] + chosen['test']))


def _spread(first, second):
    """The names of ``first`` with those of ``second`` among them."""
    if not first or not second:
        return first + second
    every = max(len(first) // len(second), 1)
    names = []
    rest = list(second)
    for k, name in enumerate(first):
        names.append(name)
        if rest and (k + 1) % every == 0:
            names.append(rest.pop(0))
    return names + rest


def _smallest_version(count, split):
    if split == 'test':
        return 'v1.0-test'
    room = {'both': 10, 'train': len(MINI_TRAIN), 'val': len(MINI_VAL)}[split]
    return 'v1.0-mini' if count <= room else 'v1.0-trainval'


def _split_names(version):
    if version == 'v1.0-mini':
        return MINI_TRAIN, MINI_VAL, ()
    from nuscenes.utils import splits

    if version == 'v1.0-trainval':
        return tuple(splits.train), tuple(splits.val), ()
    return (), (), tuple(splits.test)
