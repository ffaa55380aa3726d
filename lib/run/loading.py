"""Loading batches: worker processes whose failures reach the user as one sentence."""

import contextlib
import copy
import errno
import itertools
import multiprocessing
import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..dataset import DrivenDataset
from ..errors import DataError, UserError
from ..raycast import count_cores
from .forked import Made, WorkerLost, Workers, can_fork
from .processes import ignore_in_worker

_TOO_MANY_FILES = (
    'too many open files in the data-loading workers; lower data.workers_per_gpu, or raise '
    'the limit with "ulimit -n 65536"'
)
_LOST = (
    'a data-loading worker was killed ({}); usually memory or shared memory ran out: lower '
    'data.workers_per_gpu, or give the container more (docker: --shm-size)'
)
_WANTED_OPEN_FILES = 65536
_ENOUGH_OPEN_FILES = 4096
_NO_EPOCH = -1
_TOGETHER = 4  # batches


class Failure(NamedTuple):
    """What a worker sends instead of a sample or a batch."""

    message: str


class _Guarded(Dataset):
    """Samples, or a Failure where the user can mend what went wrong.

    The epoch lies in shared memory, so that workers that live on from one epoch to the next learn of it.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self._epoch = torch.full((1,), _NO_EPOCH, dtype=torch.int64).share_memory_()
        self._known_epoch = _NO_EPOCH

    def __len__(self):
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose samples are asked for from now on."""
        self._epoch[0] = epoch

    def __getitem__(self, index):
        epoch = int(self._epoch[0])
        if epoch != self._known_epoch:
            self.dataset.set_epoch(epoch)
            self._known_epoch = epoch
        try:
            return self.dataset[index]
        except UserError as error:
            return Failure(str(error))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return Failure(_TOO_MANY_FILES)
            raise


class _Drive(Dataset):
    """Chosen samples of a data set in order, each as it is asked for right after the one before."""

    def __init__(self, dataset: DrivenDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        index = self.indices[place]
        return self.dataset.following(index, self.indices[place - 1]) if place else self.dataset[index]


class _Collate:
    """Collates samples unless one of them is a Failure."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, samples):
        failures = [sample for sample in samples if isinstance(sample, Failure)]
        return failures[0] if failures else self.collate(samples)


def count_workers(cfg: Mapping, given: Optional[int] = None) -> int:
    """Loading processes: ``given`` (--workers), or else the config's, of which there are no more than cores."""
    if given is not None:
        return given
    return min(cfg['data'].get('workers_per_gpu', 0), count_cores())


def make_loader(
    dataset,
    batch_sampler: Iterable[List[int]],
    collate: Callable,
    workers: int,
    device: torch.device,
    persistent: bool = False,
) -> DataLoader:
    """Loader of batches, to be read with ``read_batches``; ``loader.dataset.set_epoch`` chooses the epoch.

    Args:
        dataset: map from an index to a sample.
        batch_sampler: indices of each batch.
        collate: list of samples to a batch.
        workers: processes; 0 loads in this one.
        device: where batches go; memory is pinned for a GPU.
        persistent: keep the workers from one pass over the loader to the next.
    """
    _allow_many_open_files()
    options = {}
    if workers:
        # Forked ones start at once and share the data set's memory; Python 3.14 starts another kind by default.
        method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
        options = dict(persistent_workers=persistent, worker_init_fn=_prepare_worker, multiprocessing_context=method)
    return DataLoader(
        _Guarded(dataset),
        batch_sampler=batch_sampler,
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=device.type == 'cuda',
        **options,
    )


def read_in_order(
    dataset, indices: Sequence[int], collate: Callable, workers: int, device: torch.device, keeps_frames: bool
) -> Iterator[Any]:
    """Batches of one sample each, in order and on the device; see ``make_loader`` and ``read_batches``.

    The next one is moved there, and decoded if that is where it is decoded, while the one before is worked on.

    Args:
        keeps_frames: they are for a model that keeps the features of frames from one sample to the next, and that sees
            no other samples in between: each image is read once, if the data set can (``DrivenDataset``).
    """
    if keeps_frames and hasattr(dataset, 'following'):
        dataset, indices = _Drive(dataset, indices), range(len(indices))
    if workers and can_fork():
        most = min(workers, _TOGETHER)  # each worker has memory for one at least
        return _move_ahead(lambda: _fork(dataset, indices, collate, workers, device), device, most)
    loader = make_loader(dataset, [[index] for index in indices], collate, workers, device)
    return _move_ahead(lambda: _unforked(read_batches(loader)), device, _TOGETHER)


def _fork(dataset, indices: Sequence[int], collate: Callable, workers: int, device: torch.device) -> Workers:
    """Processes that make the batches of one sample; to be closed."""
    _allow_many_open_files()
    guarded, collate = _Guarded(dataset), _Collate(collate)

    def make(place: int):
        return collate([guarded[indices[place]]])

    return _translated(True, lambda: Workers(make, len(indices), workers, _prepare_worker, device))


def _unforked(batches) -> Iterator[Made]:
    with contextlib.closing(batches):
        for batch in batches:
            yield Made(batch, lambda: None)


class _Moved(NamedTuple):
    """Batches on the device, none after the last one, and the error that keeps it from giving the next one."""

    batches: List[Dict]
    error: Optional[Exception] = None


def _move_ahead(start: Callable, device: torch.device, most: int) -> Iterator[Dict]:
    """Batches on the device, each moved by another thread, on a GPU on another stream, before it is asked for.

    Args:
        start: gives an iterable of ``Made``, to be closed.
        most: batches that can be held at once, to be moved together where that is quicker.
    """
    stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
    with contextlib.closing(start()) as source, ThreadPoolExecutor(max_workers=1) as mover:
        batches = iter(source)
        coming = mover.submit(_next_on, device, stream, batches, 1)
        while True:
            moved = coming.result()
            if moved.batches and moved.error is None:
                coming = mover.submit(_next_on, device, stream, batches, most)
            for batch in moved.batches:
                yield _used_here(batch, device) if stream else batch
            if moved.error is not None:
                raise moved.error
            if not moved.batches:
                return


def _next_on(device: torch.device, stream, batches: Iterator[Made], most: int) -> _Moved:
    """The next batch, or up to so many that are moved together, when they are on the device."""
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        made, error = _read(batches, most)
        moved = _to_device_together([one.value for one in made], device)
    if stream:
        stream.synchronize()
    for one, batch in zip(made, moved):
        if stream:
            stays = [key for key, value in one.value.items() if batch[key] is value]
            batch.update({key: copy.deepcopy(batch[key]) for key in stays})  # it may hold arrays that are released
        one.release()
    return _Moved(moved, error)


def _read(batches: Iterator[Made], most: int) -> Tuple[List[Made], Optional[Exception]]:
    """The next batch, or up to so many that are moved together, and the error that comes in the place of another."""
    made: List[Made] = []
    try:
        for one in itertools.islice(batches, most):
            if isinstance(one.value, Failure):
                return made, DataError(one.value.message)
            made.append(one)
            if not any(hasattr(value, 'all_to') for value in one.value.values()):
                break
    except WorkerLost as error:
        lost = DataError(_explain(error, True) or _LOST.format(error))
        lost.__cause__ = error
        return made, lost
    except Exception as error:
        return made, error
    return made, None


def _to_device_together(batches: Sequence[Dict], device: torch.device) -> List[Dict]:
    """:func:`to_device` of each; values with ``all_to`` are moved together."""
    moved = [to_device({k: v for k, v in batch.items() if not hasattr(v, 'all_to')}, device) for batch in batches]
    left = [(batch, key) for batch, done in zip(batches, moved) for key in batch.keys() - done.keys()]
    for key in {key for _, key in left}:
        values = {place: batch[key] for place, batch in enumerate(batches) if hasattr(batch[key], 'all_to')}
        first = next(iter(values.values()))
        for place, value in zip(values, first.all_to(list(values.values()), device)):
            moved[place][key] = value
    return moved


def _used_here(batch: Dict, device: torch.device) -> Dict:
    """The batch; its memory is not used again before the current stream has done with it."""
    current = torch.cuda.current_stream(device)
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            value.record_stream(current)
    return batch


def read_batches(loader: DataLoader) -> Iterator[Any]:
    """Batches of a loader made by ``make_loader``.

    Raises:
        DataError: a sample cannot be read, a worker was killed, or there are too many open files.
    """
    iterator = _translated(loader.num_workers > 0, lambda: _start(loader))
    keep = loader.persistent_workers
    try:
        while True:
            try:
                batch = _translated(loader.num_workers > 0, lambda: next(iterator))
            except StopIteration:
                return
            if isinstance(batch, Failure):
                raise DataError(batch.message)
            yield batch
    except DataError:
        keep = False
        raise
    finally:
        if not keep:
            _stop_workers(loader, iterator)


def _stop_workers(loader, iterator) -> None:
    """End the workers now. Left to the garbage collector each takes 5 s where batches are still on their way."""
    shut_down = getattr(iterator, '_shutdown_workers', None)
    if shut_down is not None:
        with contextlib.suppress(RuntimeError):  # a dead one is told once, not again and again
            shut_down()
        loader._iterator = None  # persistent workers are started anew


def _allow_many_open_files() -> None:
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


def _start(loader) -> Iterator[Any]:
    """``iter(loader)`` without PyTorch's handler that raises the death of a worker wherever the program happens to
    be, in the middle of an optimizer's step too. The loader finds it within seconds of being asked for a batch.
    Whatever handled a child's death before handles it afterwards."""
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and before is not None:  # None: set by other than Python, which cannot be put back
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _translated(has_workers: bool, action):
    """Run ``action``; what PyTorch says about dead workers and open files becomes a DataError."""
    try:
        return action()
    except (RuntimeError, OSError, EOFError) as error:
        message = _explain(error, has_workers)
        if message is None:
            raise
        raise DataError(message) from error


def _explain(error, has_workers: bool) -> Optional[str]:
    text = str(error)
    if (
        getattr(error, 'errno', None) in (errno.EMFILE, errno.ENFILE)
        or 'Too many open files' in text
        or 'received 0 items of ancdata' in text
    ):
        return _TOO_MANY_FILES
    broken = isinstance(error, (OSError, EOFError)) and has_workers and not text.startswith('Caught ')
    if broken or text.startswith('DataLoader worker'):  # what a worker itself raised starts with 'Caught'
        return _LOST.format((text.strip().splitlines() or [type(error).__name__])[0].rstrip('. '))
    return None


def _prepare_worker(worker_id):
    ignore_in_worker()
    _allow_many_open_files()
    torch.set_num_threads(1)
    if 'cv2' in sys.modules:
        sys.modules['cv2'].setNumThreads(0)


def to_device(batch: Dict, device) -> Dict:
    """A copy of the batch with what can be moved (in lists too) on ``device``; other values stay as they are.

    Args:
        batch: what a collate function returns.
        device: torch device or its name.
    """
    return {key: _move(value, device) for key, value in batch.items()}


def _move(value, device):
    if hasattr(value, 'to'):
        return value.to(device, non_blocking=True)  # copies from pinned memory overlap with work there
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return [_move(item, device) for item in value]
    return value
