"""The processes that make a toy data set: how many fit, which device each renders on, and how they end.

They are copies of this process, which is why it imports and compiles first but never touches a GPU: CUDA does not
survive being copied.
"""

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple

from lib.cli import end_with_parent
from lib.errors import UserError
from lib.raycast import count_cores

GPU_BYTES_PER_WORKER = 3 << 30  # its context and the tensors of twelve images, about
CPU_BYTES_PER_WORKER = 3 << 28

_stop_event, _device = None, None  # of the pool that this process works for, and what it was dealt


class Crew(NamedTuple):
    """The processes: ``workers`` of them, dealt ``devices`` ('cpu', 'cuda:0', ...) in turn."""

    devices: Tuple[str, ...]
    workers: int


class Stopped(Exception):
    """Nobody waits for this task any more."""


def plan_crew(device: str, wanted: Optional[int] = None) -> Crew:
    """As many processes as cores and memory allow, at most ``wanted``; on all GPUs with room.

    Args:
        device: 'cpu', 'cuda', or 'auto': on GPUs if there are any.
        wanted: processes.

    Raises:
        UserError: 'cuda', and there is no GPU, or none has room for a process.
    """
    room = max(_free_memory() // CPU_BYTES_PER_WORKER, 1)
    most = min(wanted or count_cores(), room)
    free = _ask_aside(device)
    if device == 'cuda' and not free:
        raise UserError('--device cuda, but PyTorch finds no GPU; use --device cpu')
    if not free:
        return Crew(('cpu',), most)
    slots = [bytes_ // GPU_BYTES_PER_WORKER for bytes_ in free]
    turns = [f'cuda:{k}' for turn in range(max(slots)) for k in range(len(slots)) if turn < slots[k]]
    if not turns:
        raise UserError(
            f'no GPU has room: at most {max(free) / 2**30:.1f} GiB are free and one process takes '
            f'{GPU_BYTES_PER_WORKER / 2**30:.1f} GiB; end what runs there, or use --device cpu'
        )
    return Crew(tuple(turns[:most]), min(most, len(turns)))


def _context():
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context('fork' if 'fork' in methods else 'spawn')


@contextlib.contextmanager
def beside(functions: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Call ``functions`` in processes of their own while the body runs; they are done when it is left."""
    others = [_context().Process(target=function, daemon=True) for function in functions]
    for process in others:
        process.start()
    try:
        yield
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()


def _ask_aside(device) -> Sequence[int]:
    """Free bytes of every GPU, none for 'cpu', found out in another process."""
    import torch  # noqa: F401  once, for all processes

    if device == 'cpu':
        return []
    with ProcessPoolExecutor(1, _context()) as aside:
        return aside.submit(_free_gpu_memory).result()


def _free_memory() -> int:
    """Bytes of memory that are free, about; plenty where the machine does not say."""
    try:
        with open('/proc/meminfo') as file:
            rows = dict(line.split(':', 1) for line in file)
        return int(rows['MemAvailable'].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 1 << 50


def _free_gpu_memory() -> Sequence[int]:
    """Free bytes of every GPU; room for four processes each where PyTorch cannot tell (before 1.11)."""
    import torch

    if not torch.cuda.is_available():
        return []
    if not hasattr(torch.cuda, 'mem_get_info'):
        return [4 * GPU_BYTES_PER_WORKER] * torch.cuda.device_count()
    return [torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count())]


def run_tasks(
    tasks: Iterable,
    work: Callable,
    following: Callable,
    crew: Crew,
    prepare: Callable[[], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator:
    """Do ``work(task)`` in the crew's processes for all tasks, and yield the tasks as they are done.

    Args:
        following: called with every finished task; returns the tasks that may begin now. They come soon.
        prepare: called once before processes start, for what they would otherwise all do.
        meanwhile: called once in a thread of this process while the others work.

    Raises:
        UserError: a task raised it, or a process was killed.
    """
    waiting = deque(tasks)
    workers = min(crew.workers, len(waiting))
    if workers <= 1:
        _start_worker(None, crew.devices, None)
        while waiting:
            task = waiting.popleft()
            _do(work, task)
            waiting.extendleft(reversed(following(task)))
            yield task
        return
    prepare()
    context = _context()
    stop, turn = context.Event(), context.Value('i', 0)
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (stop, crew.devices, turn)) as pool:
            try:
                aside = threading.Thread(target=meanwhile, daemon=True)
                for task in _keep_busy(pool, work, following, waiting, 2 * workers):
                    if aside.ident is None:  # all processes are there: none is copied in the midst of an import
                        aside.start()
                    yield task
            finally:
                stop.set()
    except BrokenProcessPool as error:
        raise UserError(
            'a worker process was killed (out of memory?); run again with fewer --workers: finished keyframes stay'
        ) from error


def _keep_busy(pool, work, following, waiting, most):
    running = {}
    while waiting or running:
        while waiting and len(running) < most:
            task = waiting.popleft()
            running[pool.submit(_do, work, task)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            future.result()
            for place, next_task in enumerate(following(task)):
                waiting.insert(2 * place, next_task)  # between others: unlike tasks share a machine better
            yield task


def _do(work, task):
    try:
        work(task)
    except RuntimeError as error:
        if 'out of memory' not in str(error):
            raise
        raise UserError(f'{_device} is full; run again with fewer --workers: finished keyframes stay') from error


def _start_worker(stop, devices, turn):
    """Take a device, leave Ctrl-C to the parent, which sets ``stop``, and end when the parent is killed."""
    global _stop_event, _device
    number = 0
    if turn is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent()
        with turn.get_lock():
            number, turn.value = turn.value, turn.value + 1
    _stop_event, _device = stop, devices[number % len(devices)]


def device() -> str:
    """The device that this process renders on."""
    return _device


def check_wanted() -> None:
    """Raise :class:`Stopped` if the parent has ended."""
    if _stop_event is not None and _stop_event.is_set():
        raise Stopped
