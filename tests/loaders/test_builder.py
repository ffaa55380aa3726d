"""build_dataloader: errors of workers in one sentence, a worker that is killed, many open files."""
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.errors import ConfigError, DataError
from loaders import build_dataloader

ROOT = Path(__file__).resolve().parents[2]


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


def _fail(index):
    if index == 3:
        raise DataError('keyframe x: image y.jpg is truncated; fetch it again: now')


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_a_worker_s_error_is_its_sentence_and_nothing_more(workers):
    with pytest.raises(DataError) as caught:
        list(build_dataloader(_Items(_fail), 1, workers))
    assert str(caught.value) == 'keyframe x: image y.jpg is truncated; fetch it again: now'


def _kill(index):
    if index == 3:
        os.kill(os.getpid(), signal.SIGKILL)


_KILLED_WORKER = '''
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from test_builder import _Items, _kill
from lib.cli import run_main
from loaders import build_dataloader
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # else PyTorch takes 10 s
run_main(lambda: list(build_dataloader(_Items(_kill), 1, 1)))
'''


def test_a_killed_worker_is_one_sentence_and_no_hang():
    """In a process of its own: PyTorch's signal handler would go on to disturb the tests after this one."""
    done = _run(_KILLED_WORKER)
    assert done.returncode == 2
    assert done.stderr.startswith('error: a data loading worker died (')
    assert 'workers_per_gpu' in done.stderr and 'Traceback' not in done.stderr


def _bug(index):
    raise (RuntimeError, OSError)[index % 2]('a mistake in the code')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('index, kind', [(0, RuntimeError), (1, OSError)])
def test_other_errors_stay_as_they_are(workers, index, kind):
    with pytest.raises(kind, match='a mistake in the code'):
        list(build_dataloader(_Items(_bug), 1, workers, sampler=[index]))


def test_batches_come_in_the_sampler_s_order():
    loader = build_dataloader(_Items(), 2, 2, sampler=[5, 1, 2, 7, 0], drop_last=False)
    assert len(loader) == 3
    assert [[meta['index'] for meta in batch['img_metas']] for batch in loader] == [[5, 1], [2, 7], [0]]
    assert len(list(build_dataloader(_Items(), 3, 0, drop_last=True))) == 2


def test_persistent_workers_survive_an_epoch():
    loader = build_dataloader(_Items(), 4, 1, persistent_workers=True, prefetch_factor=3)
    assert [len(list(loader)) for _ in range(2)] == [2, 2]


def test_an_unknown_type_is_named():
    from lib.task import Task
    from loaders import build_dataset
    with pytest.raises(ConfigError, match='unknown data set type None'):
        build_dataset(dict(), Task('occ3d'))


_MANY_BATCHES = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from test_builder import _Items
from loaders import build_dataloader
kept = list(build_dataloader(_Items(count=400), 1, 1))
print(len(kept), torch.multiprocessing.get_sharing_strategy())
'''


def _run(code):
    code = code.format(root=str(ROOT), tests=str(Path(__file__).parent))
    return subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=240)


def test_many_batches_can_be_kept_where_few_files_may_be_open():
    """400 tensors held at once with 256 open files allowed, and no right to more: PyTorch alone stops there."""
    done = _run(_MANY_BATCHES)
    assert done.stdout.split() == ['400', 'file_system'], done.stderr


def test_the_limit_is_raised_where_that_is_allowed(monkeypatch):
    from loaders import allow_many_open_files
    calls = []
    monkeypatch.setattr(resource, 'getrlimit', lambda _: (256, 100_000))
    monkeypatch.setattr(resource, 'setrlimit', lambda _, limits: calls.append(limits))
    monkeypatch.setattr(torch.multiprocessing, 'set_sharing_strategy', lambda name: calls.append(name))
    allow_many_open_files()
    assert calls == [(65536, 100_000)]
