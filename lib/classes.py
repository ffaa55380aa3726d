"""Label sets: class names, things, colours and training-set voxel counts, one table per label set.

The index of a name is its label id; the last name is always ``free``. Another label set is given in a
config as a dict with the fields of :class:`LabelSet` instead of a registered name.
"""

import math
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field, replace
from typing import Dict, Mapping, Sequence, Tuple, Union

from .errors import ConfigError
from .registry import check_keys, check_value, did_you_mean

FREE = 'free'
IGNORE_LABEL = 255

# Voxel counts over the Occ3D-nuScenes training set, by class (for the class weights of release 1.1).
_OCC3D_VOXEL_COUNTS = {
    'others': 944004,
    'barrier': 1897170,
    'bicycle': 152386,
    'bus': 2391677,
    'car': 16957802,
    'construction_vehicle': 724139,
    'motorcycle': 189027,
    'pedestrian': 2074468,
    'traffic_cone': 413451,
    'trailer': 2384460,
    'truck': 5916653,
    'driveable_surface': 175883646,
    'other_flat': 4275424,
    'sidewalk': 51393615,
    'terrain': 61411620,
    'manmade': 105975596,
    'vegetation': 116424404,
    'free': 1892500630,
}

# RGB, 0..255. Close to the nuScenes lidarseg palette, so that pictures look familiar.
_COLOURS = {
    'others': (130, 130, 130),
    'barrier': (112, 128, 144),
    'bicycle': (220, 20, 60),
    'bus': (255, 127, 80),
    'car': (255, 158, 0),
    'construction_vehicle': (233, 150, 70),
    'motorcycle': (255, 61, 99),
    'pedestrian': (0, 0, 230),
    'traffic_cone': (47, 79, 79),
    'trailer': (255, 140, 0),
    'truck': (255, 99, 71),
    'driveable_surface': (0, 207, 191),
    'other_flat': (175, 0, 75),
    'sidewalk': (75, 0, 75),
    'terrain': (112, 180, 60),
    'manmade': (222, 184, 135),
    'vegetation': (0, 175, 0),
    'free': (255, 255, 255),
}

_THINGS = ('car', 'truck', 'construction_vehicle', 'bus', 'trailer', 'motorcycle', 'bicycle', 'pedestrian')


@dataclass(frozen=True)
class LabelSet:
    """Classes of one kind of occupancy labels.

    Attributes:
        name: short name, e.g. ``occ3d``.
        class_names: all names in id order, ``free`` last.
        things: names of the countable classes (paper section 3.4, panoptic occupancy).
        colours: RGB 0..255 per class name.
        voxel_counts: training-set voxels of every class by its name; empty if unknown (all weights 1).
        remap: id in this set by id in the label files; empty where the files hold ids of this set.
        boxes: id in this set by name of a box in the infos; nuScenes' names that this set has need not be given.
    """

    name: str
    class_names: Tuple[str, ...]
    things: Tuple[str, ...]
    colours: Mapping[str, Tuple[int, int, int]]
    voxel_counts: Mapping[str, int]
    remap: Mapping[int, int] = field(default_factory=dict)
    boxes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, 'class_names', tuple(self.class_names))
        object.__setattr__(self, 'things', tuple(self.things))
        object.__setattr__(self, 'colours', {name: tuple(colour) for name, colour in self.colours.items()})
        named = {name: i for i, name in enumerate(self.class_names[:-1]) if name in BOX_CLASSES}
        object.__setattr__(self, 'boxes', {**named, **self.boxes})
        if len(self.class_names) < 2 or self.class_names[-1] != FREE:
            raise ConfigError(
                f'label set {self.name!r}: class_names must hold at least two names and end in {FREE!r}; '
                f'got {self.class_names!r}'
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ConfigError(f'label set {self.name!r}: a class name occurs twice in {self.class_names!r}')
        unknown = set(self.things) - set(self.class_names[:-1])
        if unknown:
            raise ConfigError(
                f'label set {self.name!r}: things {sorted(unknown)} are not among class_names; remove or rename them'
            )
        uncounted = [name for name in self.class_names if name not in self.voxel_counts]
        if self.voxel_counts and uncounted:
            raise ConfigError(
                f'label set {self.name!r}: voxel_counts lacks {uncounted}; give a count for every class, or none at all'
            )

    @property
    def num_classes(self) -> int:
        """Classes with free (18 for Occ3D)."""
        return len(self.class_names)

    @property
    def num_occupied(self) -> int:
        """Classes without free (17 for Occ3D)."""
        return len(self.class_names) - 1

    @property
    def free_id(self) -> int:
        return len(self.class_names) - 1

    @property
    def occupied_names(self) -> Tuple[str, ...]:
        return self.class_names[:-1]

    @property
    def thing_ids(self) -> Tuple[int, ...]:
        """Ids of the things, ascending."""
        return tuple(i for i, name in enumerate(self.class_names) if name in self.things)

    def class_weights(self) -> Tuple[float, ...]:
        """1 / log(count + 0.001) per class in id order, free included; all 1.0 where no counts are known."""
        if not self.voxel_counts:
            return (1.0,) * self.num_classes
        return tuple(1.0 / math.log(self.voxel_counts[name] + 0.001) for name in self.class_names)

    def palette(self) -> Tuple[Tuple[int, int, int], ...]:
        """RGB 0..255 per class in id order; grey for a class without a colour."""
        return tuple(self.colours.get(name, (128, 128, 128)) for name in self.class_names)


# Classes that nuScenes annotates with boxes; all others are stuff in labels, whatever a model counts as things.
BOX_CLASSES = (
    'car',
    'truck',
    'trailer',
    'bus',
    'construction_vehicle',
    'bicycle',
    'motorcycle',
    'pedestrian',
    'traffic_cone',
    'barrier',
)
_SURROUNDINGS = ('driveable_surface', 'other_flat', 'sidewalk', 'terrain', 'manmade', 'vegetation')


def _table(name, class_names):
    return LabelSet(
        name=name, class_names=class_names, things=_THINGS, colours=_COLOURS, voxel_counts=_OCC3D_VOXEL_COUNTS
    )


OCC3D = _table(
    'occ3d',
    (
        'others',
        'barrier',
        'bicycle',
        'bus',
        'car',
        'construction_vehicle',
        'motorcycle',
        'pedestrian',
        'traffic_cone',
        'trailer',
        'truck',
        *_SURROUNDINGS,
        FREE,
    ),
)

OPENOCC_V2 = _table('openocc_v2', (*BOX_CLASSES, *_SURROUNDINGS, FREE))

# The 16 classes of nuScenes' lidarseg task, as SurroundOcc and OpenOccupancy have them: Occ3D's without 'others'.
LIDARSEG = replace(
    _table('lidarseg', OCC3D.class_names[1:]),
    remap={0: IGNORE_LABEL, **{i: i - 1 for i in range(1, OCC3D.num_classes)}},
)

LABEL_SETS: Dict[str, LabelSet] = {s.name: s for s in (OCC3D, OPENOCC_V2, LIDARSEG)}


def get_label_set(spec: Union[str, Mapping, LabelSet]) -> LabelSet:
    """Label set from its registered name, or from a dict ``{name, class_names, things[, colours, voxel_counts]}``.

    Raises:
        ConfigError: unknown name, or a dict with missing or unknown fields.
    """
    if isinstance(spec, LabelSet):
        return spec
    if isinstance(spec, str):
        if spec not in LABEL_SETS:
            raise ConfigError(
                f'unknown label set {spec!r}{did_you_mean(spec, LABEL_SETS)}; use one of {sorted(LABEL_SETS)}, or a '
                'dict with name, class_names and things'
            )
        return LABEL_SETS[spec]
    fields = {'name', 'class_names', 'things', 'colours', 'voxel_counts', 'remap', 'remap_from', 'boxes'}
    if not isinstance(spec, AnyMapping):
        raise ConfigError(
            f'label_set must be one of {sorted(LABEL_SETS)} or a dict with {sorted(fields)}, got {spec!r}'
        )
    check_keys(spec, fields, 'task.label_set')
    missing = {'name', 'class_names', 'things'} - set(spec)
    if missing:
        raise ConfigError(f'task.label_set: keys {sorted(missing)} are missing; the fields are {sorted(fields)}')
    _check_label_set(spec)
    remap = _resolve_remap(spec)
    return LabelSet(
        name=spec['name'],
        class_names=tuple(spec['class_names']),
        things=tuple(spec['things']),
        colours=dict(spec.get('colours', _COLOURS)),
        voxel_counts=dict(spec.get('voxel_counts', {})),
        remap=remap,
        boxes=_resolve_boxes(spec, remap),
    )


def _resolve_boxes(spec: Mapping, remap: Mapping[int, int]) -> Dict[str, int]:
    """Ids of this set by names of boxes, from ``boxes`` ({name: class}) and from what ``remap`` makes of the classes
    of ``remap_from`` that have boxes.

    Raises:
        ConfigError: no such dict, or a class that there is not.
    """
    where, names, given = 'task.label_set.boxes', list(spec['class_names'][:-1]), spec.get('boxes') or {}
    if not isinstance(given, AnyMapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f'{where} must be a dict {{name of a box: class}}, got {given!r}')
    source = spec.get('remap_from')
    old = get_label_set(source).class_names if source is not None else ()
    found = {name: remap[i] for i, name in enumerate(old) if name in BOX_CLASSES and remap[i] < len(names)}
    unknown = [name for name in given.values() if name not in names]
    if unknown:
        raise ConfigError(f'{where}: {unknown[0]!r} is not in class_names{did_you_mean(unknown[0], names)}')
    return {**found, **{box: names.index(name) for box, name in given.items()}}


def _resolve_remap(spec: Mapping) -> Dict[int, int]:
    """Ids of the label files to ids of the set, from ``remap`` ({old id or name: new name, id or 'ignore'}).

    Old names are those of ``remap_from``, a registered label set; its classes that ``remap`` leaves out keep their
    name.

    Raises:
        ConfigError: a name or id that there is not, or a class of ``remap_from`` that has no counterpart.
    """
    where, new = 'task.label_set.remap', list(spec['class_names'])
    remap, source = spec.get('remap') or {}, spec.get('remap_from')
    if not remap and source is None:
        return {}
    if not isinstance(remap, AnyMapping):
        raise ConfigError(f'{where} must be a dict {{old id or name: new name}}, got {remap!r}')
    old = list(get_label_set(source).class_names) if source is not None else []
    wanted = {name: name for name in old if name in new}
    wanted.update(remap)
    table = {_old_id(key, old, where): _new_id(value, new, where) for key, value in wanted.items()}
    missing = [name for i, name in enumerate(old) if i not in table]
    if missing:
        raise ConfigError(
            f"{where}: {missing} of {source!r} become nothing; give each a class of class_names or 'ignore'"
        )
    return table


def _old_id(key, names, where) -> int:
    if isinstance(key, str) and key in names:
        return names.index(key)
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key <= IGNORE_LABEL:
        return key
    known = 'names need remap_from' if not names else f'the names are {", ".join(names)}'
    raise ConfigError(f'{where}: {key!r} is no id 0..255 and no old name{did_you_mean(key, names)} ({known})')


def _new_id(value, names, where) -> int:
    if value == 'ignore' or value == IGNORE_LABEL:
        return IGNORE_LABEL
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    raise ConfigError(f"{where}: {value!r} is not in class_names and not 'ignore'{did_you_mean(value, names)}")


def _check_label_set(spec: Mapping) -> None:
    """Raise ConfigError unless the fields of a label set are of the right types."""
    where, names = 'task.label_set', spec['class_names']
    check_value(spec['name'], str, f'{where}.name')
    for key in ('class_names', 'things'):
        check_value(spec[key], Sequence[str], f'{where}.{key}')
    colours, counts = (_by_class(spec, key, names) for key in ('colours', 'voxel_counts'))
    for name, colour in colours.items():
        parts = colour if isinstance(colour, (list, tuple)) else ()
        if len(parts) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in parts):
            raise ConfigError(f'{where}.colours.{name} must be 3 numbers 0..255, got {colour!r}')
    for name, count in counts.items():
        check_value(count, float, f'{where}.voxel_counts.{name}')
        if count < 1:
            raise ConfigError(f'{where}.voxel_counts.{name} must be at least 1, got {count!r}')


def _by_class(spec: Mapping, key: str, names: Sequence[str]) -> Mapping:
    """A field of values by class name; empty where there is none."""
    values = spec.get(key, {})
    check_value(values, Mapping, f'task.label_set.{key}')
    for name in values:
        if name not in names:
            raise ConfigError(
                f'task.label_set.{key}: {name!r} is not in class_names{did_you_mean(name, names)}; remove it'
            )
    return values
