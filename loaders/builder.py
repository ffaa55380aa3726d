"""Data sets and their loaders from configs."""

import contextlib
import re
import resource
from typing import Mapping, Optional

import cv2
import torch
from mmdet.datasets.builder import DATASETS

from lib.errors import ConfigError, DataError, UserError
from lib.names import did_you_mean
from lib.task import Task

from .formatting import collate

_WANTED_OPEN_FILES = 65536
_ENOUGH_OPEN_FILES = 4096


def build_dataset(cfg: Mapping, task: Task):
    """Data set from one of ``data.train``, ``data.val``, ``data.test`` of a config.

    Raises:
        ConfigError: unknown type or argument.
        DataError: the info file cannot be used.
    """
    cfg = dict(cfg)
    name = cfg.pop('type', None)
    dataset_class = DATASETS.get(name) if isinstance(name, str) else None
    if dataset_class is None:
        raise ConfigError(f'unknown data set type {name!r}{did_you_mean(name, DATASETS.module_dict)}')
    try:
        return dataset_class(task=task, **cfg)
    except TypeError as error:
        raise ConfigError(f'data set {name}: {error}') from error


def build_dataloader(
    dataset,
    batch_size: int,
    num_workers: int,
    sampler=None,
    shuffle: bool = False,
    drop_last: bool = False,
    pin_memory: bool = False,
    persistent_workers: bool = False,
    prefetch_factor: Optional[int] = None,
) -> torch.utils.data.DataLoader:
    """Loader of batches of ``dataset``.

    Args:
        dataset: a ``NuSceneOcc``, or anything whose items ``collate`` takes.
        batch_size: samples per batch.
        num_workers: worker processes; 0 loads in this one.
        sampler: order of the samples; excludes ``shuffle``.
        shuffle: a new random order each epoch (from torch's global generator).
        drop_last: leave out a last batch that is not full.
        pin_memory: put tensors where copies to a GPU can overlap with its work.
        persistent_workers: keep the workers between epochs.
        prefetch_factor: batches that each worker prepares ahead; None = PyTorch's default.
    """
    allow_many_open_files()
    options = dict(
        batch_size=batch_size,
        num_workers=num_workers,
        sampler=sampler,
        shuffle=shuffle,
        drop_last=drop_last,
        pin_memory=pin_memory,
        collate_fn=collate,
    )
    if num_workers > 0:
        options.update(worker_init_fn=_init_worker, persistent_workers=persistent_workers)
        if prefetch_factor is not None:
            options.update(prefetch_factor=prefetch_factor)
    return _Loader(dataset, **options)


class _Loader(torch.utils.data.DataLoader):
    """PyTorch's loader, with what goes wrong in a worker said in one sentence."""

    def __iter__(self):
        iterator = super().__iter__()
        try:
            yield from iterator
        except UserError as error:
            self._stop_workers(iterator)
            raise type(error)(_last_sentence(str(error))) from error
        except (RuntimeError, OSError, EOFError) as error:
            self._stop_workers(iterator)
            if self.num_workers == 0 or not is_dead_worker(error):
                raise
            raise DataError(
                f'a data loading worker died ({(str(error).strip().splitlines() or [type(error).__name__])[0]}); most likely memory or shared memory (/dev/shm) ran '
                'out: use fewer workers (data.workers_per_gpu), or give the container more --shm-size'
            ) from error
        finally:
            if not self.persistent_workers:
                self._stop_workers(iterator)

    def _stop_workers(self, iterator):
        """End all workers, and PyTorch's watch over a dead one, which would raise again and again.

        Left to the garbage collector, each worker takes 5 s to end when the batches were not all taken.
        """
        shut_down = getattr(iterator, '_shutdown_workers', None)
        if shut_down is not None:
            with contextlib.suppress(RuntimeError):
                shut_down()
            self._iterator = None  # persistent workers are started anew


def is_dead_worker(error: BaseException) -> bool:
    """PyTorch raised this because a loader's worker process is gone.

    It may do so at any moment, in the middle of a training step too: its SIGCHLD handler raises.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith('DataLoader worker')
    # A broken transfer; what a worker itself raised starts with 'Caught'.
    return isinstance(error, (OSError, EOFError)) and not str(error).startswith('Caught ')


def _last_sentence(text):
    """The message of an error that PyTorch brought from a worker: what follows the type in its traceback."""
    if not text.startswith('Caught '):
        return text
    return re.split(r'\n[\w.]*Error: ', text)[-1].strip()


def allow_many_open_files() -> None:
    """Avoid "too many open files": every tensor that a worker sends holds a file open in both processes.

    Raises the limit of open files as far as the system lets a user; where that is little, tensors are
    shared through named files instead, which do not stay open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH_OPEN_FILES:
        torch.multiprocessing.set_sharing_strategy('file_system')


def _init_worker(worker_id):
    allow_many_open_files()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
