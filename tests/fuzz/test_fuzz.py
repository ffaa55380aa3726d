"""Damaged files of every kind: each is read right or refused in one sentence, soon and in little memory.

A few hundred cases here; ``make fuzz`` tries some ten thousand. A case is known by its target and number, and the
same number is the same case: ``SPARSEOCC_FUZZ_FIRST=123 SPARSEOCC_FUZZ_CASES=1 pytest tests/fuzz -k labels``.
"""

import contextlib
import faulthandler
import os
import random
import signal
import sys
import time
import warnings

import pytest
from mutations import Untouched
from targets import TARGETS

from lib.errors import UserError

resource = pytest.importorskip('resource')  # limits of memory: not on Windows

CASES = int(os.environ.get('SPARSEOCC_FUZZ_CASES', 0))
FIRST = int(os.environ.get('SPARSEOCC_FUZZ_FIRST', 0))
SHORT = dict(infos=40, checkpoints=60, configs=15)
OTHERS = 150
SECONDS = 30
MEMORY = 2 << 30  # bytes more than at the start


class TooSlow(BaseException):
    """A case that took longer than SECONDS."""


@contextlib.contextmanager
def watched():
    """Memory is limited, and an alarm clock rings where it is set."""

    def ring(*_):
        raise TooSlow

    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def outcome(target, path) -> str:
    """'read' or 'refused'; 'failed: ...' for everything that should not happen."""
    signal.alarm(SECONDS)
    if CASES:  # ends the process where the alarm is not heard
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            target.read(path)
        return 'read'
    except UserError as error:
        return complaint(error) or 'refused'
    except (Exception, TooSlow) as error:
        return f'failed: {type(error).__name__}: {error}'
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def complaint(error) -> str:
    """What is wrong with the way in which a file was refused; '' if nothing is."""
    message, cause = str(error), error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f'failed: asked for too much memory, then: {message}'
        cause = cause.__cause__ or cause.__context__
    if '\n' in message or not 10 < len(message) < 1500:
        return f'failed: not one sentence: {message[:1500]}'
    return ''


@pytest.mark.parametrize('name', sorted(TARGETS))
def test_damaged_files_are_read_right_or_refused(name, tmp_path, monkeypatch, capsys):
    for folder in ('files', 'elsewhere'):
        (tmp_path / folder).mkdir()
    target, counts, failures = TARGETS[name](tmp_path / 'files'), {'read': 0, 'refused': 0}, []
    monkeypatch.chdir(tmp_path / 'elsewhere')
    target.read(target.damage(Untouched()))
    begin, cases = time.monotonic(), CASES or SHORT.get(name, OTHERS)
    with watched():
        for case in range(FIRST, FIRST + cases):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                path = target.damage(random.Random(f'{name} {case}'))
            (tmp_path / 'case').write_text(str(case))  # for who finds the process dead
            found = outcome(target, path)
            counts[found] = counts.get(found, 0) + 1
            if found not in ('read', 'refused'):
                failures.append(f'case {case}: {found}')
    with capsys.disabled():
        if CASES:
            print(f'{name}: {cases} cases in {time.monotonic() - begin:.0f} s, {counts["read"]} read, rest refused')
    assert not failures, f'{len(failures)} of {cases}:\n' + '\n'.join(failures[:20])
    assert not list((tmp_path / 'elsewhere').iterdir()) and len(list(tmp_path.iterdir())) == 3  # nothing was written
    assert counts['refused'] > 0.2 * cases  # the damage is real
    assert cases < 20 or counts['read'] > 0  # and not always so great that nothing but the first check is tried
