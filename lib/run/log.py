"""What a run writes down: console, ``log.txt``, ``metrics.jsonl``, TensorBoard; averages, pace, environment.

And whether a training goes well: shares that the losses count on the way, and warnings when they look wrong.
"""

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections import deque
from importlib import metadata
from pathlib import Path
from typing import Deque, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from ..dist import Counted, Number, all_reduce_sum
from ..io import atomic_write

TITLES = dict(right_class='right class', empty_masks='empty masks')
_IN_A_ROW = 3  # windows in which something must be wrong before it is told
_START = 3  # windows that the first loss is averaged over
_LONG = 20  # windows after which a loss must have fallen
_EMPTY, _FALLEN, _FLAT = 0.98, 0.7, 0.98


class RunLog:
    """Writes in the main process and is silent in the others.

    Until ``open`` gives it a folder it logs to the console, and remembers. A disk that is full must not end a
    run: a line that cannot be written is on the console all the same.

    Args:
        is_main: whether this is the process that logs.
    """

    def __init__(self, is_main: bool = True):
        self.is_main = is_main
        self.folder: Optional[Path] = None
        self._early = []
        self._complained = False
        self._board = None

    def open(self, folder: Path, tensorboard: bool = False) -> None:
        """Log to files in the run folder too; event files as well if wanted and TensorBoard is installed."""
        self.folder = Path(folder)
        for line in self._early:
            self._append('log.txt', line)
        if self.is_main and tensorboard:
            self._board = self._open_board()

    def say(self, text: str) -> None:
        """A line for people, with the time."""
        if not self.is_main:
            return
        line = f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {text}'
        print(line, flush=True)
        self._append('log.txt', line)

    def record(self, kind: str, iteration: int, values: Dict) -> None:
        """A line for programs: ``{"kind": ..., "iteration": ..., ...}`` in metrics.jsonl, and TensorBoard."""
        if not self.is_main:
            return
        self._append('metrics.jsonl', json.dumps(dict(kind=kind, iteration=iteration, **values)))
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f'{kind}/{name}', value, iteration)

    def picture(self, name: str, iteration: int, image: np.ndarray) -> None:
        """A picture, uint8 [height, width, 3] RGB: pictures/<name>_iter_N.png in the run folder, and TensorBoard."""
        if not self.is_main or self.folder is None:
            return
        folder = self.folder / 'pictures'
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f'{name}_iter_{iteration}.png') as temporary:
            Image.fromarray(image).save(temporary, 'PNG')
        if self._board is not None:
            if not hasattr(Image, 'ANTIALIAS'):  # Pillow 10 has it no more, and PyTorch 1 asks for it
                Image.ANTIALIAS = Image.LANCZOS
            self._board.add_image(name, image, iteration, dataformats='HWC')

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _append(self, name, line):
        if self.folder is None:
            self._early.append(line)
            return
        try:
            with open(self.folder / name, 'a', encoding='utf-8') as f:
                f.write(line + '\n')
        except OSError as error:
            if not self._complained:
                print(
                    f'warning: cannot write {self.folder / name} ({error.strerror}); the log goes on here only',
                    file=sys.stderr,
                    flush=True,
                )
            self._complained = True

    def _open_board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder / 'tensorboard'))


# -- averages and pace


_RECENT = 200  # steps over which the speed is averaged for the remaining time


class WindowAverage:
    """Averages of named values since the last report. Its state travels with checkpoints."""

    def __init__(self):
        self._sums: Dict[str, Tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Values that are not finite (the gradient norm of a step that fp16 skipped) are left out."""
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)

    def take(self) -> Dict[str, float]:
        """The averages, in order of first appearance; begins anew."""
        averages = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return averages

    def state_dict(self) -> Dict:
        return dict(self._sums)

    def load_state_dict(self, state: Mapping) -> None:
        self._sums = {name: tuple(pair) for name, pair in state.items()}


class Countdown:
    """Remaining time from the recent pace.

    Args:
        total: steps to do.
        done: steps already done when it is made.
        clock: seconds; replaceable in tests.
    """

    def __init__(self, total: int, done: int = 0, clock=time.monotonic):
        self.total, self._clock = total, clock
        self._marks: List[Tuple[float, int]] = [(clock(), done)]
        self._steps = 0

    @property
    def done(self) -> int:
        return self._marks[-1][1]

    def step(self, count: int = 1) -> None:
        """``count`` more steps are done."""
        self._marks.append((self._clock(), self.done + count))
        self._steps += 1
        if self._steps == 2 or len(self._marks) > _RECENT:
            self._marks.pop(0)  # the first step, which also warms things up, is forgotten first

    def pause(self, seconds: float) -> None:
        """Time spent on something else (an evaluation) does not count."""
        self._marks = [(mark + seconds, done) for mark, done in self._marks]

    def seconds_left(self) -> Optional[float]:
        """None before the first step."""
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return None if last == first else (end - begin) / (last - first) * (self.total - last)

    def text(self) -> str:
        """``h:mm:ss`` or ``?``."""
        left = self.seconds_left()
        return '?' if left is None else duration(left)


def duration(seconds: float) -> str:
    """``h:mm:ss``, with days in front where there are any."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f'{days}d ' if days else '') + f'{hour}:{minute:02}:{second:02}'


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far, MiB: PyTorch's on the GPU, or this process's resident set on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# -- what a run ran on


_PACKAGES = (
    'torch',
    'torchvision',
    'numpy',
    'mmcv',
    'mmcv-full',
    'mmdet',
    'mmsegmentation',
    'mmdet3d',
    'numba',
    'opencv-python-headless',
    'opencv-python',
    'Pillow',
    'Pillow-SIMD',
    'PyTurboJPEG',
)
_ROOT = Path(__file__).resolve().parent.parent.parent


def describe_environment(device: torch.device, world_size: int) -> List[str]:
    """Lines ``name: value`` about Python, packages, devices and the source tree."""
    facts = dict(
        command=' '.join(sys.argv),
        python=sys.version.split()[0],
        system=platform.platform(),
        processes=str(world_size),
        device=device_name(device),
        git=describe_commit(),
    )
    for package in _PACKAGES:
        version = _version(package)
        if version:
            facts[package] = version
    if torch.version.cuda:
        facts['cuda of torch'] = torch.version.cuda
        facts['cudnn'] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else 'no GPU'
    return [f'{name}: {value}' for name, value in facts.items()]


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU ({_cpu_model()}, {torch.get_num_threads()} threads)'


def describe_commit() -> str:
    """Commit of the source tree and whether it was changed since, or 'no git repository'."""
    commit = _git('rev-parse', 'HEAD')
    if commit is None:
        return 'no git repository'
    changed = _git('status', '--porcelain', '--untracked-files=no') or ''
    names = [line[3:] for line in changed.splitlines()]
    more = ', ...' if len(names) > 5 else ''
    return commit + (f' with changes in {", ".join(names[:5])}{more}' if names else '')


def versions() -> Dict[str, str]:
    """For a checkpoint's meta."""
    return dict(python=sys.version.split()[0], torch=str(torch.__version__), git=describe_commit())


def _version(package) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments) -> Optional[str]:
    try:
        done = subprocess.run(
            ('git',) + arguments, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode('utf-8', 'replace').rstrip('\n') if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as f:
            for line in f:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    except OSError:
        return platform.machine()
    return platform.machine()


def shares(passes: Sequence[Dict[str, Counted]]) -> Dict[str, float]:
    """Shares over the total batch from what each forward pass of a step counted; one exchange between processes.

    Args:
        passes: per forward pass, by name; the names are the same in every process.
    """
    names = sorted(passes[0]) if passes else []
    if not names:
        return {}
    sums = [_sum([of_pass[name][i] for of_pass in passes]) for i in (0, 1) for name in names]
    device = next((value.device for value in sums if isinstance(value, torch.Tensor)), torch.device('cpu'))
    totals = all_reduce_sum(torch.stack([torch.as_tensor(value, device=device).float() for value in sums])).tolist()
    return {name: part / whole for name, part, whole in zip(names, totals, totals[len(names) :]) if whole > 0}


def _sum(values: Sequence[Number]) -> Number:
    return sum(value.detach() if isinstance(value, torch.Tensor) else value for value in values)


def describe_health(values: Mapping[str, float]) -> str:
    """The part of a log line about shares, in percent; those of single classes are left to the files."""
    percent = {name: f'{100 * value:.0f}' for name, value in values.items() if '/' not in name}
    recall = [percent[name] for name in sorted(percent) if name.startswith('recall_')]
    parts = [f'recall {" / ".join(recall)} %'] if recall else []
    parts += [f'{title} {percent[name]} %' for name, title in TITLES.items() if name in percent]
    return ', '.join(parts)


class HealthWatch:
    """Looks at the averages of every log line and says once what looks wrong, again after it was right."""

    def __init__(self):
        self._losses: List[float] = []
        self._recalls: Deque[float] = deque(maxlen=_LONG)
        self._bad: Dict[str, int] = {}

    def look(self, values: Mapping[str, float]) -> List[str]:
        """Warnings, mostly none.

        Args:
            values: averages since the last log line, by name.
        """
        findings = dict(
            free=(self._only_free(values), 'almost every mask is empty, so that only free would be predicted'),
            recall=(self._recall_falls(values), 'the last stage keeps fewer and fewer of the occupied voxels'),
            flat=(self._is_flat(values), 'the loss is where it began'),
        )
        warnings = []
        for name, (is_bad, text) in findings.items():
            self._bad[name] = self._bad.get(name, 0) + 1 if is_bad else 0
            if self._bad[name] == _IN_A_ROW:
                warnings.append(f'{text}; see "When it does not go well" in docs/training.md')
        return warnings

    def _only_free(self, values) -> bool:
        return values.get('empty_masks', 0.0) > _EMPTY

    def _recall_falls(self, values) -> bool:
        names = sorted(name for name in values if name.startswith('recall_'))
        if not names:
            return False
        self._recalls.append(values[names[-1]])
        return self._recalls[-1] < _FALLEN * max(self._recalls)

    def _is_flat(self, values) -> bool:
        if 'loss' not in values or len(self._losses) > 2 * _LONG:
            return False
        self._losses.append(values['loss'])
        if len(self._losses) < _LONG:
            return False
        first, last = self._losses[:_START], self._losses[-_START:]
        return sum(last) > _FLAT * sum(first)
