"""The processes of a run: one, or those that torchrun or SLURM's srun started; each with its device, and how signals
and what cannot be mended end them."""

import contextlib
import ctypes
import datetime
import os
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
import torch.distributed as torch_dist

from ..errors import ConfigError, UserError

_TIME_TO_FREE_TENSORS = 0.5  # seconds; it takes microseconds where the machine is not overloaded
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_SECONDS_TO_CONNECT = 30
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TIMEOUT = datetime.timedelta(minutes=60)  # rank 0 may evaluate or write for long while the others wait


@dataclass
class Processes:
    """This process among those of the run.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        device: where this process computes.
        objects: process group over which Python objects travel; None in a single process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    objects: Optional[Any] = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> Optional[List]:
        """Every process's ``value`` in rank order at rank 0, None elsewhere."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        torch_dist.all_gather_object(gathered, value, group=self.objects)
        return gathered if self.is_main else None

    def broadcast(self, value):
        """Rank 0's ``value`` in every process."""
        if self.world_size == 1:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give the tensors rank 0's values in every process, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                torch_dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Whether any process gave True."""
        if self.world_size == 1:
            return flag
        count = torch.tensor([int(flag)])
        torch_dist.all_reduce(count, group=self.objects)
        return bool(count.item())

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        if self.world_size > 1:
            torch_dist.barrier(group=self.objects)


@contextlib.contextmanager
def start_processes(device: Optional[str] = None) -> Iterator[Processes]:
    """Join the process group that torchrun or srun describes in the environment, if any; leave it afterwards. A
    group that exists already is used and left as it is.

    NCCL between GPUs, gloo on the CPU and for Python objects.

    Args:
        device: 'cpu' or 'cuda'; None takes CUDA where there is one.

    Raises:
        ConfigError: there is no GPU, or not one for each process of this machine.
    """
    os.environ.update(variables_of_slurm(os.environ))
    chosen = pick_device(device)
    if 'WORLD_SIZE' not in os.environ or 'RANK' not in os.environ:
        yield Processes(device=chosen)
        return
    _end_with_torchrun()
    begins_here = not torch_dist.is_initialized()
    if begins_here:
        torch_dist.init_process_group('nccl' if chosen.type == 'cuda' else 'gloo', timeout=_TIMEOUT)
    try:
        objects = torch_dist.new_group(backend='gloo', timeout=_TIMEOUT)
        yield Processes(torch_dist.get_rank(), torch_dist.get_world_size(), chosen, objects)
    finally:
        if begins_here:
            _let_threads_finish()
            torch_dist.destroy_process_group()


def _end_with_torchrun() -> None:
    """Let Linux end this process when the torchrun that started it is gone, were it by SIGKILL: nobody would watch
    over it any more, and it would go on writing into a run folder that another run may have taken up.

    Raises:
        UserError: torchrun has gone already; its store, which has been there since before this process, is not.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or sys.platform != 'linux':
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        try:
            socket.create_connection(address, _SECONDS_TO_CONNECT).close()
        except ConnectionRefusedError as error:
            raise UserError('the torchrun that started this process has ended; start it again') from error
        except OSError:  # who joins the processes will tell
            pass


def variables_of_slurm(environment: Mapping[str, str]) -> Dict[str, str]:
    """What torchrun would have set, for one of the several tasks of an ``srun``; nothing where torchrun did, or else.

    A batch script and a shell of ``salloc`` have SLURM's variables too, but are no tasks of a step. The address is
    that of the step's first node, the port one of the job's own; ``MASTER_ADDR`` and ``MASTER_PORT`` go before them.
    """
    tasks = environment.get('SLURM_STEP_NUM_TASKS', '1')
    if 'RANK' in environment or int(tasks) < 2:
        return {}
    nodes = environment.get('SLURM_STEP_NODELIST') or environment['SLURM_JOB_NODELIST']
    alone = ',' not in environment.get('CUDA_VISIBLE_DEVICES', ',')  # srun gave each task its GPU
    port = 20000 + int(environment.get('SLURM_JOB_ID', 0)) % 40000
    return dict(
        RANK=environment['SLURM_PROCID'],
        WORLD_SIZE=tasks,
        LOCAL_RANK='0' if alone else environment['SLURM_LOCALID'],
        MASTER_ADDR=environment.get('MASTER_ADDR') or first_host(nodes),
        MASTER_PORT=environment.get('MASTER_PORT') or str(port),
    )


def first_host(nodes: str) -> str:
    """First name in SLURM's short form of a list of hosts.

    >>> first_host('gpu[07-09,12]-ib,login1'), first_host('a,b')
    ('gpu07-ib', 'a')
    """
    name = re.sub(r'\[([^\],-]*)[^\]]*\]', r'\1', nodes)
    return name.partition(',')[0]


def _let_threads_finish() -> None:
    """PyTorch before 2.1 holds Python's lock while it waits for gloo's threads to end. One that just then frees
    the tensors of the last exchange needs that lock, and neither goes on; so it gets its time beforehand."""
    if tuple(int(n) for n in torch.__version__.split('.')[:2]) < (2, 1):
        time.sleep(_TIME_TO_FREE_TENSORS)


def pick_device(device: Optional[str] = None) -> torch.device:
    """Device of this process; ``LOCAL_RANK`` chooses the GPU."""
    if device == 'cpu' or (device is None and not torch.cuda.is_available()):
        return torch.device('cpu')
    if not torch.cuda.is_available():
        raise ConfigError(
            f'--device cuda: PyTorch {torch.__version__} sees no GPU here; install a CUDA build and driver, or '
            'use --device cpu'
        )
    local_rank, count = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f'process {local_rank} was started on a machine with {count} GPUs; give torchrun --nproc_per_node {count}, '
            f'or srun --ntasks-per-node {count}'
        )
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)


def wake(device: torch.device) -> None:
    """Choose the GPU in this thread too, and let its libraries load, which takes seconds without Python's lock."""
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        image = torch.zeros((1, 8, 16, 16), device=device)
        torch.nn.functional.conv2d(image, image[:, :, :1, :1])
        torch.mm(image[0, 0], image[0, 0])


# -- runs that end before their time


class RunStopped(UserError):
    """The run cannot go on; the message says why and what was saved. Every process raises it."""


class Interrupted(Exception):
    """The run was asked to stop, and did so after saving."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """Context in which the first SIGTERM or SIGINT is noted instead of ending the process.

    Attributes:
        received: number of the signal, or None.
        at_once: while this is a message, a signal raises Interrupted with it on the spot.
    """

    def __init__(self):
        self.received: Optional[int] = None
        self.at_once: Optional[str] = None
        self._handlers = {}

    def __enter__(self) -> 'StopRequest':
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        if self.at_once is not None:
            raise Interrupted(number, self.at_once)
        os.write(2, b'\nstopping at the end of this step, with a checkpoint; again to stop at once\n')


def ignore_in_worker() -> None:
    """In a data-loading worker: Ctrl-C is the main process's business, SIGTERM ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
