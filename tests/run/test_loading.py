"""Loading batches: errors of workers in one sentence, a worker that is killed, many open files."""

import gc
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.cli import run_main
from lib.errors import DataError
from lib.run import loading
from lib.run.forked import can_fork
from lib.run.loading import make_loader, read_batches, read_in_order


class _Items(torch.utils.data.Dataset):
    """Samples of one small tensor; ``action(index)`` runs before each."""

    def __init__(self, action=None, count=8):
        self.action, self.count = action, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if self.action:
            self.action(index)
        return dict(img=torch.full((2,), index), img_metas=dict(index=index))


def _first(samples):
    return samples[0]


def _batches(items, workers, order=None, persistent=False):
    batch_sampler = [[index] for index in (range(len(items)) if order is None else order)]
    return make_loader(items, batch_sampler, lambda samples: samples[0], workers, torch.device('cpu'), persistent)


def _fail(index):
    if index == 3:
        raise DataError('keyframe x: image y.jpg is truncated; fetch it again: now')


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_a_worker_s_error_is_its_sentence_and_nothing_more(workers):
    with pytest.raises(DataError) as caught:
        list(read_batches(_batches(_Items(_fail), workers)))
    assert str(caught.value) == 'keyframe x: image y.jpg is truncated; fetch it again: now'


class _Driven(_Items):
    """Samples that are told which one was asked for before."""

    def following(self, index, before):
        return dict(self[index], before=before)


def test_a_drive_tells_each_sample_which_one_was_before():
    for keeps_frames, expected in ((True, [None, 5, 6]), (False, [None] * 3)):
        batches = read_in_order(_Driven(), [5, 6, 2], _first, 0, torch.device('cpu'), keeps_frames)
        found = [(batch['img_metas']['index'], batch.get('before')) for batch in batches]
        assert found == list(zip([5, 6, 2], expected))
    assert len(list(read_in_order(_Items(), [5, 6], _first, 0, torch.device('cpu'), True))) == 2  # one that cannot


class _Moving:
    """What is moved; says so."""

    def __init__(self, index, moved):
        self.index, self.moved = index, moved

    def to(self, device, non_blocking=True):
        self.moved[self.index].set()
        return self.index


def test_the_next_batch_is_moved_while_one_is_worked_on():
    moved = [threading.Event() for _ in range(5)]
    samples = [dict(img=_Moving(index, moved)) for index in range(5)]
    for index, batch in enumerate(read_in_order(samples, range(5), _first, 0, torch.device('cpu'), False)):
        assert batch['img'] == index
        assert index == 4 or moved[index + 1].wait(timeout=20)  # nobody asks for it before this is left
        assert index > 2 or not moved[index + 2].is_set()  # and no further, which would take memory


def test_an_error_while_moving_is_told_when_its_batch_is_due():
    class Broken:
        def to(self, device, non_blocking=True):
            raise DataError('cannot be decoded')

    samples = [dict(img=torch.zeros(1)), dict(img=Broken()), dict(img=torch.zeros(1))]
    batches = read_in_order(samples, range(3), _first, 0, torch.device('cpu'), False)
    next(batches)
    with pytest.raises(DataError, match='cannot be decoded'):
        next(batches)


class _Together:
    """What is moved together with others of its kind; notes with which."""

    groups = []

    def __init__(self, index):
        self.index = index

    @classmethod
    def all_to(cls, many, device):
        cls.groups.append([one.index for one in many])
        return [torch.tensor(one.index) for one in many]


def test_batches_that_can_are_moved_together(monkeypatch):
    """Not the first, which is waited for, nor more than there is memory for."""
    samples = [dict(img=torch.tensor(i) if i == 7 else _Together(i), number=torch.tensor(i)) for i in range(10)]
    for workers, expected in ((0, [[0], [1, 2, 3, 4], [5, 6], [8, 9]]), (2, [[0], [1, 2], [3, 4], [5, 6], [8, 9]])):
        monkeypatch.setattr(_Together, 'groups', [])
        batches = list(_drive(samples, workers))
        assert [int(batch['img']) for batch in batches] == [int(batch['number']) for batch in batches] == [*range(10)]
        assert _Together.groups == expected
    monkeypatch.setattr(_Together, 'groups', [])
    batches = _drive([*samples[:3], loading.Failure('truncated')], 0)
    assert [int(next(batches)['img']) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match='truncated'):
        next(batches)


@pytest.mark.parametrize('workers', [0, 2])
def test_what_was_read_before_an_error_arrives(workers):
    found = []
    with pytest.raises(DataError, match='y.jpg is truncated'):
        for batch in read_in_order(_Items(_fail), range(8), _first, workers, torch.device('cpu'), False):
            found.append(batch['img_metas']['index'])
    assert found == [0, 1, 2]


def _drive(items, workers, collate=_first):
    return read_in_order(items, range(len(items)), collate, workers, torch.device('cpu'), False)


class _Sized(_Items):
    """Samples of changing sizes, of several kinds of tensors and arrays."""

    def __getitem__(self, index):
        sized = torch.arange((index * 7919) % 5000, dtype=torch.float32)
        img = torch.full((2, 3, index % 4), index, dtype=torch.uint8)
        lists = [torch.tensor(index), sized.view(-1, 1).expand(-1, 2)]
        metas = dict(index=index, array=np.full(3, index), half=torch.full((2,), 0.5 * index, dtype=torch.bfloat16))
        return dict(img=img, sized=sized, lists=lists, img_metas=metas)


@pytest.mark.parametrize('workers', [1, 3])
def test_forked_workers_make_the_same_batches_in_order_and_they_can_be_kept(workers):
    items = _Sized(count=20)
    found = list(_drive(items, workers))
    assert [batch['img_metas']['index'] for batch in found] == list(range(20))
    for index, batch in enumerate(found):
        right = items[index]
        assert all(torch.equal(batch[key], right[key]) for key in ('img', 'sized'))
        assert all(map(torch.equal, batch['lists'], right['lists']))
        assert (batch['img_metas']['array'] == index).all() and batch['img_metas']['half'][1] == 0.5 * index
        batch['img'] += 1  # one's own memory


def test_a_forked_worker_that_is_killed_or_mistaken_is_told(tmp_path):
    with pytest.raises(DataError, match=r'a data-loading worker was killed .status -9 of process \d+.*workers_per_gpu'):
        list(_drive(_Items(_kill), 2))
    with pytest.raises(RuntimeError, match='(?s)in a data-loading worker.*_bug.*OSError: a mistake in the code'):
        list(_drive([0, 1], 1, collate=lambda samples: _bug(1)))
    with pytest.raises(OSError, match='a mistake in the code'):
        list(_drive([0, 1], 0, collate=lambda samples: _bug(1)))
    with pytest.raises(RuntimeError, match='(?s)in a data-loading worker.*pickle'):
        list(_drive([0, 1], 1, collate=lambda samples: dict(img=lambda: None)))


def _open_no_more_files(samples=()):
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return dict(img=torch.zeros(2))


@pytest.mark.parametrize('where', ['worker', 'parent'])
def test_memory_that_cannot_be_shared_for_want_of_files_is_one_sentence(where, tmp_path):
    def read():
        if where == 'worker':
            return list(_drive([0, 1], 1, collate=_open_no_more_files))
        batches = _drive(_Sized(count=20), 2)
        next(batches)
        _open_no_more_files()
        return list(batches)

    assert _in_a_fork(lambda: run_main(read), tmp_path / 'stderr') == 2
    assert (tmp_path / 'stderr').read_text().startswith('error: too many open files in the data-loading workers; lower')


def _children():
    return set(Path(f'/proc/self/task/{os.getpid()}/children').read_text().split())


@pytest.mark.skipif(not can_fork(), reason='needs forked workers')
def test_forked_workers_end_with_the_reading_and_leave_no_files_open():
    gc.collect()  # what tests before left open
    before, files = _children(), len(os.listdir('/proc/self/fd'))
    batches = _drive(_Items(count=50), 2)
    next(batches)
    assert len(_children() - before) == 2
    batches.close()
    assert _children() == before and len(os.listdir('/proc/self/fd')) <= files


def test_forked_workers_end_when_the_parent_is_killed(tmp_path):
    """Each would otherwise wait for ever for somebody to take what it made."""
    read, write = os.pipe()  # stays open as long as one of them lives
    child = os.fork()
    if child == 0:
        os.close(read)
        next(_drive(_Items(count=50), 3))
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    os.waitpid(child, 0)
    assert select.select([read], [], [], 20)[0] and os.read(read, 1) == b''
    os.close(read)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_forked_workers_feed_a_gpu():
    items, device = _Sized(count=20), torch.device('cuda')
    found = list(read_in_order(items, range(20), _first, 3, device, False))
    for index, batch in enumerate(found):
        assert batch['img'].is_cuda and (batch['img'] == index).all()
        assert torch.equal(batch['sized'].cpu(), items[index]['sized'])
        assert (batch['img_metas']['array'] == index).all()


def test_leaving_early_is_quick_and_a_new_start_is_whole():
    for persistent in (False, True):
        loader = _batches(_Items(), 2, persistent=persistent)
        start = time.time()
        for _ in read_batches(loader):
            break
        assert len(list(read_batches(loader))) == 8
        assert time.time() - start < 5  # PyTorch takes 5 s per worker when left to the garbage collector


def _kill(index):
    if index == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _in_a_fork(function, output):
    """Run ``function`` in a forked process, so that limits and PyTorch's signal handlers stay there.

    Returns its exit status; what it wrote is in the file ``output``.
    """
    child = os.fork()
    if child == 0:
        status = 1
        with open(str(output), 'w') as stream:
            os.dup2(stream.fileno(), 2)
            sys.stderr = stream
            try:
                function()
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                stream.flush()
                os._exit(status)
    return os.waitpid(child, 0)[1] >> 8


def _lose_a_worker():
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # else PyTorch takes 10 s
    run_main(lambda: list(read_batches(_batches(_Items(_kill), 1))))


def test_a_killed_worker_is_one_sentence_and_no_hang(tmp_path):
    assert _in_a_fork(_lose_a_worker, tmp_path / 'stderr') == 2
    text = (tmp_path / 'stderr').read_text()
    assert text.startswith('error: a data-loading worker was killed (')
    assert 'workers_per_gpu' in text and 'Traceback' not in text


def _bug(index):
    raise (RuntimeError, OSError)[index % 2]('a mistake in the code')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('index, kind', [(0, RuntimeError), (1, OSError)])
def test_other_errors_stay_as_they_are(workers, index, kind):
    with pytest.raises(kind, match='a mistake in the code'):
        list(read_batches(_batches(_Items(_bug), workers, [index])))


def test_batches_come_in_the_sampler_s_order_with_every_start():
    loader = _batches(_Items(), 2, [5, 1, 2, 7, 0], persistent=True)
    for _ in range(2):
        assert [batch['img_metas']['index'] for batch in read_batches(loader)] == [5, 1, 2, 7, 0]


def _keep_many_batches(read):
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    assert len(list(read(_Items(count=400)))) == 400


def test_many_batches_can_be_kept_where_few_files_may_be_open(tmp_path):
    """400 tensors held at once with 256 open files allowed, and no right to more."""

    def ours():
        _keep_many_batches(lambda items: read_batches(_batches(items, 1)))

    def plain():
        _keep_many_batches(lambda items: torch.utils.data.DataLoader(items, num_workers=1))

    assert _in_a_fork(ours, tmp_path / 'stderr') == 0, (tmp_path / 'stderr').read_text()
    assert _in_a_fork(plain, tmp_path / 'stderr') == 1  # PyTorch alone fails, or this would test nothing


def test_the_limit_is_raised_where_that_is_allowed(monkeypatch):
    calls = []
    monkeypatch.setattr(resource, 'getrlimit', lambda _: (256, 100_000))
    monkeypatch.setattr(resource, 'setrlimit', lambda _, limits: calls.append(limits))
    monkeypatch.setattr(torch.multiprocessing, 'set_sharing_strategy', lambda name: calls.append(name))
    loading._allow_many_open_files()
    assert calls == [(65536, 100_000)]


def test_the_program_s_handling_of_dead_children_stays(monkeypatch):
    """PyTorch's own handler would raise wherever the program happens to be."""

    def of_the_program(number, frame):
        """Stands for what a program did before."""

    monkeypatch.setattr(torch.utils.data._utils.signal_handling, '_SIGCHLD_handler_set', False)  # as in a new process
    before = signal.signal(signal.SIGCHLD, of_the_program)
    try:
        assert len(list(read_batches(_batches(_Items(), 1)))) == 8
        assert signal.getsignal(signal.SIGCHLD) is of_the_program
    finally:
        signal.signal(signal.SIGCHLD, before)


class _Workers(_Items):
    def __getitem__(self, index):
        return dict(pid=os.getpid())


def test_persistent_workers_live_on_when_a_pass_ends_with_its_last_batch():
    loader, seen = _batches(_Workers(count=3), 1, persistent=True), []
    for _ in range(2):
        batches = read_batches(loader)
        seen += [next(batches)['pid'] for _ in range(3)]
        del batches
    assert len(set(seen)) == 1 and os.getpid() not in seen


def test_configs_ask_for_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr(loading, 'count_cores', lambda: 3)
    cfg = dict(data=dict(workers_per_gpu=14))
    assert loading.count_workers(cfg) == 3
    assert loading.count_workers(cfg, 8) == 8  # asked for by name
    assert loading.count_workers(dict(data=dict(workers_per_gpu=2))) == 2
    assert loading.count_workers(dict(data={})) == 0
