"""The processes that make a toy data set: how many fit, which device each renders on, and how they end.

They are copies of this process, which is why it imports first but never touches a GPU: CUDA does not survive being
copied. A GPU takes turns with the processes that use it, and each of them takes seconds to start on it: a few render
for all the others.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from lib.cli import end_with_parent
from lib.errors import UserError
from lib.raycast import count_cores

GPU_BYTES_PER_WORKER = 3 << 30  # its context and the tensors of twelve images, about
CPU_BYTES_PER_WORKER = 3 << 28
RENDERERS_PER_GPU = 8
_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT_BYTES, _MAPPED_FROM_BYTES = 1 << 29, 1 << 25

_stop_event, _device = None, None  # of the pool that this process works for, and what it was dealt


class Crew(NamedTuple):
    """The processes that make a data set.

    Attributes:
        devices: of each process that only renders ('cuda:0', ...); none: the workers render too, on the CPU.
        workers: processes for everything else.
    """

    devices: Tuple[str, ...]
    workers: int

    @property
    def processes(self) -> int:
        """All of them."""
        return len(self.devices) + self.workers


class Done(NamedTuple):
    """A task that is done, and what it took: seconds, and seconds of CPU time."""

    task: Any
    seconds: float
    cpu_seconds: float


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
        return Crew((), most)
    slots = [min(bytes_ // GPU_BYTES_PER_WORKER, RENDERERS_PER_GPU) for bytes_ in free]
    turns = [f'cuda:{k}' for turn in range(max(slots)) for k in range(len(slots)) if turn < slots[k]]
    if not turns:
        raise UserError(
            f'no GPU has room: at most {max(free) / 2**30:.1f} GiB are free and one process takes '
            f'{GPU_BYTES_PER_WORKER / 2**30:.1f} GiB; end what runs there, or use --device cpu'
        )
    devices = tuple(turns[: (most + 1) // 2])
    return Crew(devices, most - len(devices))


def _context():
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context('fork' if 'fork' in methods else 'spawn')


@contextlib.contextmanager
def beside(functions: Sequence[Callable[[], None]]) -> Iterator[Callable[[], None]]:
    """Call ``functions`` in processes of their own while the body runs, which gets a function that waits for them."""
    others = [_context().Process(target=function, daemon=True) for function in functions]
    for process in others:
        process.start()

    def wait_for_them():
        for process in others:
            process.join()

    try:
        yield wait_for_them
    finally:
        for process in others:
            process.terminate()


class Aside:
    """A process of its own for work in two parts: ``first`` at once, ``then`` when it is told to.

    It is started before other processes, shows no progress and ends with the ``with`` block.
    """

    def __init__(self, first: Callable[[], None], then: Callable[[], None]):
        context = _context()
        self._go = context.Event()
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_be_aside, args=(first, then, self._go, answer))
        self._process.start()
        answer.close()

    def __enter__(self):
        return self

    def begin(self) -> None:
        """The second part may begin."""
        self._go.set()

    def finish(self) -> None:
        """Wait for the end of the second part.

        Raises:
            UserError: it raised one, or the process was killed.
        """
        try:
            error = self._answer.recv()
        except EOFError as error:
            raise UserError('the process that prepares the data was killed (out of memory?); run again') from error
        if error is not None:
            raise error

    def __exit__(self, *_):
        self._process.terminate()
        self._process.join()


def _be_aside(first, then, go, answer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    gc.freeze()
    try:
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere):
            first()
            go.wait()
            then()
        answer.send(None)
    except Exception as error:
        answer.send(error)


def _ask_aside(device) -> Sequence[int]:
    """Free bytes of every GPU, none for 'cpu', found out in another process, whose end is not waited for."""
    import torch  # noqa: F401  once, for all processes

    if device == 'cpu':
        return []
    answer, told = _context().Pipe(duplex=False)
    _context().Process(target=_tell_free_gpu_memory, args=(told,), daemon=True).start()
    told.close()
    try:
        return answer.recv()
    except EOFError as error:
        raise UserError('PyTorch cannot tell how much memory of the GPUs is free; use --device cpu') from error


def _free_memory() -> int:
    """Bytes of memory that are free, about; plenty where the machine does not say."""
    try:
        with open('/proc/meminfo') as file:
            rows = dict(line.split(':', 1) for line in file)
        return int(rows['MemAvailable'].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 1 << 50


def _tell_free_gpu_memory(told) -> None:
    told.send(_free_gpu_memory())


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
    renders: Callable[[Any], bool] = lambda task: False,
) -> Iterator[Done]:
    """Do ``work(task)`` in the crew's processes for all tasks, and yield the tasks as they are done.

    Args:
        following: called with every finished task; returns the tasks that may begin now. They come soon.
        prepare: called once, before those processes start that do not only render.
        renders: the task is for processes that render, if the crew has such.

    Raises:
        UserError: a task raised it, or a process was killed.
    """
    waiting = deque(tasks)
    if min(crew.processes, len(waiting)) <= 1:
        prepare()
        _start_worker(None, crew.devices or ('cpu',), None)
        while waiting:
            done = _do(work, waiting.popleft())
            waiting.extendleft(reversed(following(done.task)))
            yield done
        return
    stop = _context().Event()
    try:
        with contextlib.ExitStack() as pools:
            lanes = _start_lanes(pools, stop, crew, waiting, renders)
            try:
                if crew.devices:
                    lanes[0].start(work)
                prepare()
                yield from _keep_busy(lanes, work, following)
            finally:
                stop.set()
    except BrokenProcessPool as error:
        raise UserError(
            'a worker process was killed (out of memory?); run again with fewer --workers: finished keyframes stay'
        ) from error


class _Lane:
    """Tasks that wait for one kind of processes, and those that these work on or will next."""

    def __init__(self, pool, processes, takes):
        self._pool, self._most, self.takes = pool, 2 * processes, takes
        self.waiting: deque = deque()
        self.running: set = set()

    def start(self, work) -> None:
        """Hand out tasks."""
        while self.waiting and len(self.running) < self._most:
            self.running.add(self._pool.submit(_do, work, self.waiting.popleft()))


def _start_lanes(pools, stop, crew, tasks, renders) -> List[_Lane]:
    """The lane of those that only render first, if there are any; a task goes to the first lane that takes it."""
    kinds = [(crew.devices, len(crew.devices), renders)] if crew.devices else []
    kinds += [(('cpu',), crew.workers, lambda task: True)]
    lanes = []
    for devices, processes, takes in kinds:
        processes, context = min(processes, len(tasks)), _context()
        initial = stop, devices, context.Value('i', 0)
        pool = pools.enter_context(ProcessPoolExecutor(processes, context, _start_worker, initial))
        lanes.append(_Lane(pool, processes, takes))
    for task in tasks:
        _lane_for(task, lanes).waiting.append(task)
    return lanes


def _lane_for(task, lanes):
    return next(lane for lane in lanes if lane.takes(task))


def _keep_busy(lanes, work, following):
    while any(lane.waiting or lane.running for lane in lanes):
        for lane in lanes:
            lane.start(work)
        finished = wait(set().union(*(lane.running for lane in lanes)), return_when=FIRST_COMPLETED).done
        for lane in lanes:
            lane.running -= finished
        for future in finished:
            done = future.result()
            for place, next_task in enumerate(following(done.task)):
                # between others: unlike tasks share a machine better
                _lane_for(next_task, lanes).waiting.insert(2 * place, next_task)
            yield done


def _do(work, task) -> Done:
    begin = time.monotonic(), time.process_time()
    try:
        work(task)
    except RuntimeError as error:
        if 'out of memory' not in str(error):
            raise
        raise UserError(f'{_device} is full; run again with fewer --workers: finished keyframes stay') from error
    return Done(task, time.monotonic() - begin[0], time.process_time() - begin[1])


def _start_worker(stop, devices, turn):
    """Take a device, leave Ctrl-C to the parent, which sets ``stop``, and end when the parent is killed."""
    global _stop_event, _device
    number = 0
    if turn is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent()
        gc.freeze()  # looking for garbage among what the parent made would copy all of it
        _keep_memory()
        with turn.get_lock():
            number, turn.value = turn.value, turn.value + 1
    _stop_event, _device = stop, devices[number % len(devices)]


def _keep_memory() -> None:
    """Keep freed memory for the next array instead of giving it back: a keyframe would get 9,000 pages anew, which on
    a virtual machine take some microseconds each."""
    if sys.platform != 'linux':
        return
    library = ctypes.CDLL(None)
    if hasattr(library, 'mallopt'):  # not in every C library
        library.mallopt(_MALLOC_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        library.mallopt(_MALLOC_TRIM_THRESHOLD, _KEPT_BYTES)


def device() -> str:
    """The device that this process renders on."""
    return _device


def check_wanted() -> None:
    """Raise :class:`Stopped` if the parent has ended."""
    if _stop_event is not None and _stop_event.is_set():
        raise Stopped
