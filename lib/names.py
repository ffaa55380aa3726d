"""Checks of user-given names, with the nearest known name suggested."""

import difflib
from collections.abc import Mapping as AnyMapping
from typing import Any, Dict, Iterable, Mapping

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
