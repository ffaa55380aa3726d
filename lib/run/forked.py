"""Values that forked processes make, in order: their arrays and tensors lie in memory that both sides see.

A worker writes them into a file in memory, which the parent maps once and reads in place; only what holds them
together is sent through a pipe. PyTorch's loader opens, maps, copies and closes every tensor anew: the parent needs
some 2 ms for a sample of a drive, about as long as a fast model's step, and a tenth of that here.
"""

import contextlib
import io
import mmap
import multiprocessing
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

_SLOTS = 2  # values that a worker makes ahead of being asked
_ALIGNMENT = 256  # bytes
_PORTABLE = 1  # cudaHostRegister: pinned for every GPU


def can_fork() -> bool:
    """Processes can be forked and share memory here, as on Linux."""
    return sys.platform == 'linux' and hasattr(os, 'memfd_create')


class WorkerLost(Exception):
    """A worker was killed, or has no memory to share; the message says how it ended, or why."""


class Made(NamedTuple):
    """A value, and what to call when its arrays are not needed any more: others take their place."""

    value: Any
    release: Callable[[], None]


class Workers:
    """Forked processes that make values 0..count-1, each every so many-th. Iterate over it once, and close it.

    Args:
        make: makes a value from its number, in a worker. An exception is raised in the parent as RuntimeError, with
            the worker's traceback.
        count: values.
        workers: processes.
        prepare: called first in each worker, with its number.
        device: where arrays are to go. A GPU copies from the shared memory while it works; for the CPU they are copied
            here.
    """

    def __init__(
        self, make: Callable[[int], Any], count: int, workers: int, prepare: Callable[[int], None], device: torch.device
    ):
        self._count = count
        self._workers: List[_Worker] = []
        try:
            for first in range(min(workers, count)):
                ends = [worker.pipe for worker in self._workers]
                self._workers.append(_Worker(make, range(first, count, workers), prepare, ends, device))
        except OSError:
            self.close()
            raise

    def __iter__(self) -> Iterator[Made]:
        """The values in order. A worker makes two ahead; it waits where neither has been released.

        Raises:
            WorkerLost: one of them was killed, or memory cannot be shared with it.
        """
        for number in range(self._count):
            yield self._workers[number % len(self._workers)].receive()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Failed(NamedTuple):
    """What a worker sends for an exception."""

    text: str


class _Worker:
    """The parent's side of one process."""

    def __init__(self, make, numbers: range, prepare, ends_of_others: List[Connection], device: torch.device):
        context = multiprocessing.get_context('fork')
        self._slots = [_Slot() for _ in range(_SLOTS)]
        self._on_gpu, self._received = device.type == 'cuda', 0
        self.pipe, end = context.Pipe()
        arguments = make, numbers, prepare, self._slots, end, [*ends_of_others, self.pipe]
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        end.close()  # so that reading ends with the worker

    def receive(self) -> Made:
        """The next value."""
        try:
            sizes, content = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self.process.join()
            raise WorkerLost(f'status {self.process.exitcode} of process {self.process.pid}') from error
        try:
            parts: Sequence[Any] = self._slots[self._received % _SLOTS].parts(sizes, self._on_gpu)
        except OSError as error:
            raise WorkerLost(str(error)) from error
        value = pickle.loads(content, buffers=parts if self._on_gpu else list(map(bytearray, parts)))
        self._received += 1
        if isinstance(value, OSError):
            raise WorkerLost(str(value))
        if isinstance(value, _Failed):
            raise RuntimeError(f'in a data-loading worker:\n{value.text}')
        return Made(value, self._release)

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # it was killed, which the next value tells
            self.pipe.send_bytes(b'')

    def close(self) -> None:
        """When the process was killed: let go of what was shared with it."""
        self.process.join()
        self.pipe.close()
        for slot in self._slots:
            slot.close()


def _work(make, numbers: range, prepare, slots: List['_Slot'], pipe: Connection, ends_of_parent) -> None:
    """In a worker: make values until there are no more to make, or nobody takes them."""
    for end in ends_of_parent:  # which would keep the pipes open when the parent is gone
        end.close()
    prepare(numbers.start)
    with contextlib.suppress(EOFError, OSError):
        for turn, number in enumerate(numbers):
            packed = _make(make, number)
            if turn >= _SLOTS:
                pipe.recv_bytes()  # the slot was released
            pipe.send_bytes(pickle.dumps(_write(slots[turn % _SLOTS], packed)))
        while True:
            pipe.recv_bytes()  # until the parent is gone


def _make(make, number: int) -> '_Packed':
    try:
        return _pack(make(number))
    except Exception:
        return _pack(_Failed(traceback.format_exc()))


def _write(slot: '_Slot', packed: '_Packed') -> Tuple[List[int], bytes]:
    """The bytes of each buffer in the slot, and what holds them together; an OSError where memory is not to be had."""
    try:
        return slot.write(packed.buffers), packed.content
    except OSError as error:
        return [], _pack(error).content


_AS_ARRAYS = (torch.uint8, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)


class _Packed(NamedTuple):
    content: bytes
    buffers: List[memoryview]


class _Pickler(pickle.Pickler):
    """Tensors are pickled as arrays are, which can leave out what they hold."""

    def reducer_override(self, value):
        if type(value) is not torch.Tensor or value.device.type != 'cpu' or value.dtype not in _AS_ARRAYS:
            return NotImplemented
        return torch.from_numpy, (value.detach().contiguous().numpy(),)


def _pack(value) -> _Packed:
    buffers: List[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return _Packed(stream.getvalue(), [buffer.raw() for buffer in buffers])


class _Slot:
    """Memory for the arrays of one value: a file without a name, which grows and which both processes map."""

    def __init__(self):
        self._file = os.memfd_create('sample')
        self._map: Optional[mmap.mmap] = None
        self._pinned_at: Optional[int] = None

    def write(self, buffers: List[memoryview]) -> List[int]:
        """Fill it; returns the bytes of each buffer."""
        sizes = [buffer.nbytes for buffer in buffers]
        size = _starts(sizes)[-1]
        if os.fstat(self._file).st_size < size:
            os.ftruncate(self._file, size)
        for part, buffer in zip(self.parts(sizes), buffers):
            part[:] = buffer
        return sizes

    def parts(self, sizes: List[int], pinned: bool = False) -> List[memoryview]:
        """Buffers of so many bytes, in place."""
        *starts, size = _starts(sizes)
        if size and (self._map is None or len(self._map) < size):
            self._unpin()
            self._map = mmap.mmap(self._file, size)
            if pinned:
                self._pin()
        whole = memoryview(self._map or b'')
        return [whole[start : start + length] for start, length in zip(starts, sizes)]

    def close(self) -> None:
        """Let go of it; what still looks at it keeps the memory."""
        self._unpin()
        self._map = None
        os.close(self._file)

    def _pin(self) -> None:
        """Let GPUs copy from it while they work; where the system refuses, copying takes longer."""
        memory = np.frombuffer(self._map, dtype=np.uint8)
        if not int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)):
            self._pinned_at = memory.ctypes.data
        else:
            with contextlib.suppress(RuntimeError):  # the next thing that runs there is told of it
                torch.zeros(1, device='cuda')

    def _unpin(self) -> None:
        if self._pinned_at is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
            self._pinned_at = None


def _starts(sizes: List[int]) -> List[int]:
    """Where buffers of so many bytes begin, and where all ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return starts
