"""Names in configs: wrong ones are told, with the nearest known; ``dict(type=..., ...)`` becomes an object."""

import difflib
import inspect
from collections.abc import Mapping as AnyMapping
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from .errors import ConfigError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the known name nearest to ``name``, or an empty string if none is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f'; did you mean {near[0]!r}?' if near else ''


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
    """Raise ConfigError naming the first key of ``given`` that is not ``allowed``.

    Args:
        given: mapping from a config.
        allowed: keys it may have.
        where: how the user knows the mapping, e.g. ``train`` or ``configs/a.py``.
    """
    allowed = sorted(allowed)
    for key in given:
        if key not in allowed:
            raise ConfigError(
                '{}: unknown key {!r}{} (the keys are {})'.format(
                    where, key, did_you_mean(key, allowed), ', '.join(allowed)
                )
            )


def build_checked(cfg: Mapping, registry, default_args: Optional[Mapping] = None, where: str = ''):
    """Build a registered class from ``dict(type=..., ...)``; wrong keys become a ConfigError.

    Args:
        cfg: config of the component.
        registry: mmcv Registry.
        default_args: arguments the builder adds (e.g. ``task``); the config must not repeat them.
        where: where in the config the component stands, for the message.

    Raises:
        ConfigError: no or unknown ``type``, an unknown key, or a required key that is missing.
    """
    where = f'{where}: ' if where else ''
    if not isinstance(cfg, AnyMapping) or 'type' not in cfg:
        raise ConfigError(f"{where}a {registry.name} needs a dict with key 'type', got {cfg!r}")
    args = {key: value for key, value in cfg.items() if key != 'type'}
    added = dict(default_args or {})
    cls = _registered(cfg['type'], registry, where)
    _check_arguments(cls, args, added, where)
    args.update(added)
    return cls(**args)  # what goes wrong inside is told as it is


def _registered(name, registry, where):
    if inspect.isclass(name) or inspect.isfunction(name):
        return name
    cls = registry.get(name)
    if cls is None:
        raise ConfigError(
            f'{where}unknown type {name!r}{did_you_mean(name, registry.module_dict)} '
            f'(not registered as a {registry.name})'
        )
    return cls


def _check_arguments(cls, args, added, where):
    names, required, open_ended = _parameters(cls)
    repeated = sorted(set(args) & set(added))
    if repeated:
        raise ConfigError(
            f'{where}{cls.__name__}: key {repeated[0]!r} is filled in by the program; remove it from the config'
        )
    if not open_ended:
        check_keys(args, [n for n in names if n not in added], where + cls.__name__)
    missing = [n for n in required if n not in args and n not in added]
    if missing:
        raise ConfigError(
            '{}{}: key {!r} is missing; its keys are {}'.format(where, cls.__name__, missing[0], ', '.join(names))
        )


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
