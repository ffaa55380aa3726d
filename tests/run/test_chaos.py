"""A training of two processes that is killed again and again ends as one that never was.

    make chaos                         # 20 kills, some minutes
    SPARSEOCC_KILLS=3 pytest -s tests/run/test_chaos.py

Each life of the run is ended in a phase and in a way of their own, at a random moment, and what was done is printed.
Not part of the usual tests: it is skipped unless SPARSEOCC_KILLS is set. SPARSEOCC_CHAOS_SEED repeats the moments as
closely as processes allow.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get('SPARSEOCC_KILLS', '0'))
SEED = int(os.environ.get('SPARSEOCC_CHAOS_SEED', random.randrange(10**6)))
STEPS = 10  # of an epoch
OPTIONS = (
    'train.checkpoint_interval_iters=1',
    'train.max_keep_ckpts=2',
    f'data.train.length={8 * STEPS}',
    'data.train.delay=0.01',
    'data.val.delay=0.1',
    'data.workers_per_gpu=1',
    f'runner.max_epochs={2 * KILLS + 2}',
    'evaluation.interval=1',
    'model.dropout=0',
)
PHASES = ('loading', 'stepping', 'saving', 'evaluating')
WAYS = ('all', 'one', 'launcher', 'term')  # SIGKILL of everything, of one process, of torchrun alone; SIGTERM

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


def in_phase(phase, folder, before, rng):
    """Whether a run is loading, stepping, saving or evaluating now.

    Args:
        folder: of the run.
        before: records in its metrics.jsonl when this life of it began.
    """
    records = read_records(folder)
    if phase == 'loading':
        return len(records) == before and rng.random() < 0.01
    if phase == 'saving':
        return bool(list(folder.glob('.*.tmp.pth')))
    if len(records) == before:
        return False
    if phase == 'stepping':
        return rng.random() < 0.2
    return records[-1]['kind'] == 'train' and records[-1]['iteration'] % STEPS == 0


def read_records(folder):
    """What a run logged, in order; a line that is being written is left out."""
    path = folder / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().split('\n')[:-1]] if path.exists() else []


def strike(run, way, phase, folder, before, rng):
    """End a run in a way and a phase."""
    deadline = time.monotonic() + 100
    while not in_phase(phase, folder, before, rng):
        assert run.poll() is None and time.monotonic() < deadline, (phase, run.communicate()[0])
        time.sleep(0.001 if phase == 'saving' else 0.02)
    time.sleep(rng.random() * (0.002 if phase == 'saving' else 0.1))
    if way == 'all':
        kill_all(run)
    elif way == 'one':
        os.kill(rng.choice(children(run.pid) or [run.pid]), signal.SIGKILL)
    else:
        os.kill(run.pid, signal.SIGTERM if way == 'term' else signal.SIGKILL)


def finish(run):
    """What a run says to its end, which is not that of a failure."""
    text = run.communicate(timeout=1200)[0]
    assert run.returncode == 0, text
    return text


def test_killed_again_and_again(workshop):
    rng, folder = random.Random(SEED), workshop.folder / 'run'
    print(f'SPARSEOCC_CHAOS_SEED={SEED}')
    finish(workshop.start(['train'] + workshop.arguments(*OPTIONS, work_dir='whole'), processes=2))
    arguments = ['train'] + workshop.arguments(*OPTIONS, more=('--resume', 'auto'))
    begin = workshop.start(arguments, processes=2)  # a folder without a checkpoint would not be taken up again
    workshop.wait_for_iterations(3)
    begin.send_signal(signal.SIGTERM)
    begin.communicate(timeout=120)
    pairs = list(itertools.product(WAYS, PHASES))
    rng.shuffle(pairs)
    for number in range(KILLS):
        way, phase = pairs[number % len(pairs)]
        records = read_records(folder)
        print(f'{number + 1}. {way} while {phase}, after iteration {records[-1]["iteration"]}', flush=True)
        run = workshop.start(arguments, processes=2, start_new_session=True)
        try:
            strike(run, way, phase, folder, len(records), rng)
            said = run.communicate(timeout=120)[0]  # to the end of the last of its processes
        finally:
            kill_all(run)
        assert run.returncode != 0, said
    finish(workshop.start(arguments, processes=2))
    assert workshop.curve() == pytest.approx(workshop.curve('whole'), rel=1e-4)
    assert sorted(workshop.records(kind='eval')) == sorted(workshop.records('whole', 'eval'))
    assert 'best.pth' in workshop.files()
