"""Running averages, remaining time and memory of a run."""

import math
import resource
import time
from typing import Dict, List, Mapping, Optional, Tuple

import torch

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
    return ('%dd ' % days if days else '') + '%d:%02d:%02d' % (hour, minute, second)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far, MiB: PyTorch's on the GPU, or this process's resident set on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
