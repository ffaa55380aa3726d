"""A training of two processes that is killed at random moments again and again ends as one that never was.

    make chaos                         # 20 kills, some minutes
    SPARSEOCC_KILLS=3 pytest tests/run/test_chaos.py

Not part of the usual tests: it is skipped unless SPARSEOCC_KILLS is set. The seed of the moments is printed with a
failure; SPARSEOCC_CHAOS_SEED repeats them as closely as processes allow.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get('SPARSEOCC_KILLS', '0'))
SEED = int(os.environ.get('SPARSEOCC_CHAOS_SEED', random.randrange(10**6)))
OPTIONS = (
    'train.checkpoint_interval_iters=1',
    'train.max_keep_ckpts=2',
    'data.train.length=400',
    'data.train.delay=0.01',
    'data.workers_per_gpu=1',
    'evaluation.interval=1',
    'model.dropout=0',
)

pytestmark = pytest.mark.skipif(not KILLS, reason='long; run it with make chaos')


def children(pid):
    """Processes below ``pid``, as Linux lists them."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rsplit(')', 1)[1].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid:
            found += [int(path.parent.name), *children(int(path.parent.name))]
    return found


def kill_all(run):
    """SIGKILL of a launcher and of what it started, which is in sessions of its own."""
    for pid in (*children(run.pid), run.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def strike(run, rng):
    """SIGKILL of everything, of one process, or SIGTERM of the launcher, at a random moment; what was done."""
    moment = rng.uniform(3.0, 12.0)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    how = rng.choice(('all', 'one', 'term'))
    below = children(run.pid)
    if how == 'all' or not below:
        kill_all(run)
    elif how == 'one':
        os.kill(rng.choice(below), signal.SIGKILL)
    else:
        os.kill(run.pid, signal.SIGTERM)
    return f'{how} after {moment:.1f} s'


def test_killed_again_and_again(workshop):
    rng, history = random.Random(SEED), []
    status, text = workshop.launch(['train'] + workshop.arguments(*OPTIONS, work_dir='whole'), processes=2)
    assert status == 0, text
    arguments = ['train'] + workshop.arguments(*OPTIONS, more=('--resume', 'auto'))
    for _ in range(KILLS):
        run = workshop.start(arguments, processes=2, start_new_session=True)
        try:
            history.append(strike(run, rng))
            run.communicate(timeout=120)
        finally:
            kill_all(run)
    status, text = workshop.launch(arguments, processes=2)
    assert status == 0, (SEED, history, text)
    assert workshop.curve() == pytest.approx(workshop.curve('whole'), rel=1e-4), (SEED, history)
    assert sorted(workshop.records(kind='eval')) == sorted(workshop.records('whole', 'eval'))
    assert 'best.pth' in workshop.files()
