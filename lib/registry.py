"""Names in configs: wrong ones are told, with the nearest known; ``dict(type=..., ...)`` becomes an object."""

import difflib
import inspect
import numbers
import typing
from collections.abc import Mapping as AnyMapping
from collections.abc import Sequence as AnySequence
from typing import Any, Dict, Iterable, List, Literal, Mapping, Optional, Tuple, Union

from .errors import ConfigError, reason

_LARGEST = 1e18  # of a number in a config

# Keys of the published code's configs (and of those of its kind), and how the same is said here.
_TASK = 'stands once, in task (label_set, point_cloud_range, voxel_size, num_frames, cameras, image_size)'
_SECTIONS = 'is said in data.train, data.val and data.test'
_NOT_NEEDED = 'is not needed; remove it'
PUBLISHED_KEYS = dict(
    dict.fromkeys(('point_cloud_range', 'pc_range', 'occ_size', 'voxel_size', 'num_frames', 'num_classes'), _TASK),
    **dict.fromkeys(('class_names', 'occ_class_names', 'det_class_names', 'classes', 'sweeps_num'), _TASK),
    **dict.fromkeys(('dataset_type', 'dataset_root', 'data_root', 'occ_gt_root', 'ann_file'), _SECTIONS),
    **dict.fromkeys(('train_pipeline', 'test_pipeline'), 'is pipeline in data.train, data.val and data.test'),
    **dict.fromkeys(('input_modality', 'modality', 'log_level', 'dist_params', 'workflow', 'debug'), _NOT_NEEDED),
    **dict.fromkeys(('use_grid_mask', 'no_class_weight', 'file_client_args', 'is_train', 'gpu_ids'), _NOT_NEEDED),
    **dict.fromkeys(('batch_size', 'samples_per_gpu'), 'is total_batch_size, over all GPUs'),
    **dict.fromkeys(('eval_config', 'eval_interval'), 'is evaluation.interval'),
    img_norm_cfg='stands in model.data_aug',
    ida_aug_conf='is task.image_size, and resize_lim and rand_flip of RandomTransformImage',
    bda_aug_conf='is rot_lim, flip_dx_ratio and flip_dy_ratio of BEVAug',
    total_epochs='is runner.max_epochs',
    checkpoint_config='is train.checkpoint_interval and train.max_keep_ckpts',
    log_config='is train.log_interval',
    fp16="is train.amp='fp16'",
    find_unused_parameters='is train.find_unused_parameters',
    cudnn_benchmark='is train.cudnn_benchmark',
    work_dir='is --work-dir of train.py',
    LoadMultiViewImageFromFiles='is done by LoadMultiViewImageFromMultiSweeps',
    DefaultFormatBundle3D='is done by the data set',
    Collect3D='is done by the data set',
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the known name nearest to ``name``, or an empty string if none is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f'; did you mean {near[0]!r}?' if near else ''


def said_elsewhere(names: Iterable[str]) -> str:
    """How to say here what keys of the published code's configs say there; an empty string if none is one."""
    found = [f'{name} {PUBLISHED_KEYS[name]}' for name in names if name in PUBLISHED_KEYS]
    return '; as in the published code? Here ' + ', '.join(found) + ' (docs/migration.md)' if found else ''


def section(value: Any, where: str) -> Dict:
    """A copy of a config's mapping; empty for None.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, AnyMapping):
        raise ConfigError(f'{where} must be a dict, got {value!r}')
    return dict(value)


def check_keys(given: Mapping, allowed: Iterable[str], where: str) -> None:
    """Raise ConfigError naming the first key of ``given`` that is not ``allowed``, and what it should have been.

    Args:
        given: mapping from a config.
        allowed: keys it may have.
        where: how the user knows the mapping, e.g. ``train`` or ``configs/a.py``.
    """
    allowed = sorted(allowed)
    unknown = [key for key in given if key not in allowed]
    if unknown:
        remedy = said_elsewhere(unknown) or did_you_mean(unknown[0], allowed)
        raise ConfigError(f'{where}: unknown key {unknown[0]!r}{remedy} (the keys are {", ".join(allowed)})')


def build_checked(cfg: Mapping, registry, default_args: Optional[Mapping] = None, where: str = ''):
    """Build a registered class from ``dict(type=..., ...)``; wrong keys become a ConfigError.

    Args:
        cfg: config of the component.
        registry: mmcv Registry.
        default_args: arguments the builder adds (e.g. ``task``); the config must not repeat them.
        where: where in the config the component stands, for the message.

    Raises:
        ConfigError: no or unknown ``type``, an unknown key, a required key that is missing, or a value of another
            type than the constructor's annotations ask for.
    """
    where = f'{where}: ' if where else ''
    if not isinstance(cfg, AnyMapping) or 'type' not in cfg:
        raise ConfigError(f"{where}a {registry.name} needs a dict with key 'type', got {cfg!r}")
    args = {key: value for key, value in cfg.items() if key != 'type'}
    added = dict(default_args or {})
    cls = _registered(cfg['type'], registry, where)
    _check_arguments(cls, args, added, where)
    hints = type_hints(cls)
    for key in set(args) & set(hints):
        check_value(args[key], hints[key], f'{where}{cls.__name__}: key {key!r}')
    args.update(added)
    if hints:
        return cls(**args)  # what goes wrong inside is told as it is
    try:  # classes of other libraries, which find out themselves what is wrong with their values
        return cls(**args)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{where}{cls.__name__} cannot be built with these values ({type(error).__name__}: {reason(error)}); '
            'correct them'
        ) from error


def look_up(name, registry):
    """The class or function registered under a name; None if there is none."""
    try:
        return registry.get(name) if isinstance(name, str) else None
    except AttributeError:  # a name with a dot, which mmcv takes for another registry's
        return None


def _registered(name, registry, where):
    if not isinstance(name, (str, type)) and not inspect.isfunction(name):
        raise ConfigError(f"{where}'type' must be the name of a {registry.name}, got {name!r}")
    if inspect.isclass(name) or inspect.isfunction(name):
        return name
    cls = look_up(name, registry)
    if cls is None:
        raise ConfigError(
            f'{where}unknown type {name!r}{said_elsewhere([name]) or did_you_mean(name, registry.module_dict)} '
            f'(nothing of that name in the registry {registry.name!r})'
        )
    return cls


def check_component(cfg: Mapping, registry, where: str, more_keys: Iterable[str]) -> None:
    """Raise ConfigError unless ``cfg`` names a registered class and only its arguments; nothing is built.

    Args:
        cfg: config with ``type``.
        registry: mmcv Registry.
        where: its key in the config.
        more_keys: that it may have besides, for whoever builds it.
    """
    if 'type' not in cfg:
        raise ConfigError(f"{where}: key 'type' is missing; got {dict(cfg)!r}")
    names, _, open_ended = _parameters(_registered(cfg['type'], registry, f'{where}: '))
    if not open_ended:
        check_keys(cfg, ['type', *names, *more_keys], where)


def _check_arguments(cls, args, added, where):
    names, required, open_ended = _parameters(cls)
    repeated = sorted(set(args) & set(added))
    if repeated:
        raise ConfigError(
            f'{where}{cls.__name__}: key {repeated[0]!r} is filled in by the program; remove it from the config'
        )
    if not open_ended:
        check_keys(args, ['type', *(n for n in names if n not in added)], where + cls.__name__)
    missing = [n for n in required if n not in args and n not in added]
    if missing:
        raise ConfigError(f'{where}{cls.__name__}: key {missing[0]!r} is missing; its keys are {", ".join(names)}')


def type_hints(cls) -> Dict[str, Any]:
    """Annotations of a class's constructor, or of a function; none where they cannot be made out."""
    try:
        return typing.get_type_hints(cls.__init__ if inspect.isclass(cls) else cls)
    except (AttributeError, NameError, TypeError):
        return {}


def check_value(value: Any, hint: Any, where: str) -> None:
    """Raise ConfigError unless a value of a config is what an annotation says, e.g. ``Optional[int]``.

    Args:
        where: how the user knows it, e.g. ``optimizer.lr``.
    """
    if not _fits(value, hint):
        near = did_you_mean(value, _choices(hint)) if isinstance(value, str) else ''
        raise ConfigError(f'{where} must be {_said(hint)}, got {value!r}{near}')


def check_fields(holder: Any, where: str) -> None:
    """Raise ConfigError unless every field of a dataclass is what its annotation says; see :func:`check_value`."""
    for name, hint in typing.get_type_hints(type(holder)).items():
        check_value(getattr(holder, name), hint, f'{where}.{name}')


def check_whole(value: Any, least: int, where: str) -> None:
    """Raise ConfigError unless a value of a config is an integer of at least ``least``; see :func:`check_value`."""
    if not _fits(value, int) or value < least:
        raise ConfigError(f'{where} must be an integer of at least {least}, got {value!r}')


_PLAIN = {str: 'a text', bool: 'True or False', int: 'an integer', float: 'a finite number', type(None): 'None'}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config is what an annotation says; annotations that say something else fit all."""
    origin, inner = getattr(hint, '__origin__', None), getattr(hint, '__args__', None) or ()
    if origin is Union:
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if hint in (int, float):
        kind: Any = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < _LARGEST
    if hint in _PLAIN:
        return isinstance(value, hint)
    if inspect.isclass(origin) and issubclass(origin, AnyMapping):
        return isinstance(value, AnyMapping)
    if inspect.isclass(origin) and issubclass(origin, (AnySequence, tuple)):
        items = inner[:1] * len(value) if _is_list(value) and (origin is not tuple or inner[-1:] == (...,)) else inner
        return _is_list(value) and len(items) == len(value) and all(map(_fits, value, items))
    return True


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))


def _choices(hint) -> Tuple:
    """The values that an annotation lists."""
    origin, inner = getattr(hint, '__origin__', None), getattr(hint, '__args__', None) or ()
    return inner if origin is Literal else sum(map(_choices, inner), ()) if origin is Union else ()


def _said(hint) -> str:
    """An annotation in words."""
    origin, inner = getattr(hint, '__origin__', None), getattr(hint, '__args__', None) or ()
    if origin is Union:
        return ' or '.join(_said(one) for one in inner)
    if origin is Literal:
        return ' or '.join(map(repr, inner))
    if hint in _PLAIN:
        return _PLAIN[hint]
    if inspect.isclass(origin) and issubclass(origin, AnyMapping):
        return 'a dict'
    return f'a list ({_said(inner[0])}, each)' if inner else 'a list'


def _parameters(cls) -> Tuple[List[str], List[str], bool]:
    """(all, required, takes any keyword) of a class's constructor or a function."""
    function = cls.__init__ if inspect.isclass(cls) else cls
    parameters = list(inspect.signature(function).parameters.values())
    parameters = parameters[1:] if inspect.isclass(cls) else parameters
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return (
        [p.name for p in named],
        [p.name for p in named if p.default is p.empty],
        any(p.kind == p.VAR_KEYWORD for p in parameters),
    )
