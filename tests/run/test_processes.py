"""Several processes, and killed ones. Starting Python is what takes time, so each start does much."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from lib.errors import UserError

DETERMINISTIC = ('model.dropout=0',)


def test_three_processes_learn_and_score_as_one(workshop):
    """Losses: equal but for rounding, although 3 processes share a batch of 8 unevenly and the normaliser is a sum
    over the whole batch. Scores: equal to the bit, each sample once. Two processes: test_end_to_end and others."""
    weights = str(workshop.folder / 'one' / 'latest.pth')

    def validation(name):
        out = ['--out', f'{name}.json', '--save-predictions', f'predictions_{name}']
        return ['--config', str(workshop.config), '--weights', weights, *out]

    def check_scores(name):
        scores = json.loads((workshop.folder / (f'{name}.json')).read_text())
        assert scores.pop('run')['weights'] == weights
        assert workshop.files('*', 'predictions_' + name) == ['predictions.json'] + [f'token{i}.npz' for i in range(7)]
        return scores

    workshop.train(*DETERMINISTIC, work_dir='one')
    workshop.validate(validation('one'))
    training = ['train', *workshop.arguments(*DETERMINISTIC, work_dir='three')]
    status, text = workshop.launch(training, ['val', *validation('three')], processes=3)
    assert status == 0, text
    # float32 sums in another order, carried along for nine steps
    assert workshop.curve('three') == pytest.approx(workshop.curve('one'), rel=1e-4)
    assert 'x 3 processes' in workshop.log('three')
    assert text.count('training is complete') == 1  # the main process alone tells
    assert check_scores('three') == check_scores('one')


def test_trouble_in_one_process_stops_all_with_one_sentence(workshop):
    """The samples of both processes are named, one checkpoint is written, and each sentence appears once."""
    trouble = ("data.train.trouble={4: 'unreadable'}", 'data.train.trouble_epoch=1')
    status, text = workshop.launch(
        ['train'] + workshop.arguments('model.nan_at=[4]'),
        ['train'] + workshop.arguments(*trouble, work_dir='bad'),
        processes=2,
    )
    assert status != 0 and text.count('error: the loss is not finite') == 1
    (facts,) = workshop.files('nonfinite*.json')
    facts = json.loads((workshop.folder / 'run' / facts).read_text())
    assert [len(passes[0]) for passes in facts['sample_tokens_by_process_and_pass']] == [4, 4]
    assert text.count('error: images/a.jpg is damaged') == 1 and 'continue with: torchrun --nproc_per_node 2 ' in text
    assert any(name.startswith('iter_') for name in workshop.files(work_dir='bad'))


def test_sigkill_and_resume_ends_with_the_same_losses(workshop):
    """Killed inside the second epoch, workers and all; they live from epoch to epoch."""
    options = ('train.checkpoint_interval_iters=1', 'data.train.length=80', 'data.workers_per_gpu=1')
    workshop.train(*options, work_dir='whole')
    arguments = workshop.arguments(*options, 'data.train.delay=0.02')
    run = workshop.start(['train'] + arguments, start_new_session=True)
    try:
        workshop.wait_for_iterations(13)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    assert 13 <= len(workshop.records()) < 30
    assert workshop.train(*options, more=('--resume', 'auto')) == 0
    assert workshop.curve() == workshop.curve('whole') and len(workshop.curve()) == 30


def test_sigterm_to_torchrun_saves_once_and_leaves(workshop):
    run = workshop.start(
        ['train'] + workshop.arguments('data.train.length=800', 'data.train.delay=0.01', 'train.max_keep_ckpts=0'),
        processes=2,
    )
    try:
        workshop.wait_for_iterations(3)
    finally:
        run.send_signal(signal.SIGTERM)
    text = run.communicate(timeout=60)[0]
    assert run.returncode != 0 and text.count('stopped by SIGTERM after iteration') == 1, text
    assert [n for n in workshop.files() if n.startswith('iter_')] == [f'iter_{max(workshop.records())}.pth']


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the kernel of Linux')
def test_one_run_at_a_time_writes_to_a_folder(workshop):
    """A second run is refused while the first goes on; after SIGKILL of torchrun alone its processes end as well,
    so that the next run takes up the folder."""
    slow = workshop.arguments('data.train.length=8000', 'data.train.delay=0.01', 'train.checkpoint_interval_iters=1')
    run = workshop.start(['train'] + slow, processes=2, start_new_session=True)
    try:
        workshop.wait_for_iterations(3)
        below = [int(pid) for pid in Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()]
        claimed = r'run folder .* is being written by process \d+ on .*; end that run first'
        with pytest.raises(UserError, match=claimed):
            workshop.train('data.train.length=8000', more=('--resume', 'auto'))
    finally:
        run.kill()
    deadline = time.monotonic() + 20
    while [pid for pid in below if Path(f'/proc/{pid}').exists()]:
        assert len(below) >= 2 and time.monotonic() < deadline, 'its processes go on without it'
        time.sleep(0.01)
    run.communicate()
    done = max(workshop.records())
    until = f'runner.max_iters={done + 2}'
    assert workshop.train('data.train.length=8000', until, more=('--resume', 'auto')) == 0
    assert len(workshop.curve()) == done + 2


@pytest.mark.skipif(sys.platform != 'linux', reason='as above')
def test_a_process_whose_torchrun_has_ended_already_does_not_wait_for_it(workshop):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    left_behind = dict(TORCHELASTIC_RUN_ID='x', TORCHELASTIC_USE_AGENT_STORE='True', RANK='0', WORLD_SIZE='1')
    run = workshop.start(
        ['train'] + workshop.arguments(), environment=dict(left_behind, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    )
    assert 'error: the torchrun that started this process has ended' in run.communicate(timeout=60)[0]
    assert run.returncode == 2 and not workshop.files(work_dir='run')


def test_two_nodes_learn_as_one_process(workshop):
    """The commands of docs/training.md ("Several machines"), the nodes being two torchruns on the loopback."""
    workshop.train(*DETERMINISTIC, work_dir='one')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    nodes = [
        workshop.start(
            ['train'] + workshop.arguments(*DETERMINISTIC, work_dir='two'), processes=1, node=(rank, 2, port)
        )
        for rank in (0, 1)
    ]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert workshop.curve('two') == pytest.approx(workshop.curve('one'), rel=1e-4)
    assert [text.count('training is complete') for text in texts] == [1, 0]
    assert 'x 2 processes' in workshop.log('two')
