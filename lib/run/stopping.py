"""Runs that end before their time: a signal asks for it, or something is wrong."""

import math
import os
import signal
from pathlib import Path
from typing import Dict, List, Mapping, Optional

from ..checkpoint import save_checkpoint
from ..errors import UserError
from ..io import write_json

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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


class RunStopped(UserError):
    """The run cannot go on; the message says why and what was saved. Every process raises it."""


class NonFinite(Exception):
    """A loss or the gradient is NaN or infinite; the weights have not been touched.

    Args:
        what: a sentence without its end.
        values: losses, and the gradient norm as far as it is known.
    """

    def __init__(self, what: str, values: Mapping[str, float]):
        super().__init__(what)
        self.values = dict(values)

    def bad_names(self) -> str:
        """Names of the values that are not finite."""
        return ', '.join(name for name, value in self.values.items() if not math.isfinite(value))


def report_non_finite(
    error: NonFinite, iteration: int, tokens: List, facts: Dict, state: Mapping, folder: Path
) -> RunStopped:
    """Write the state before a bad step and what is known about it; the error to raise.

    Args:
        error: what was not finite.
        iteration: 1-based number of the bad step.
        tokens: sample tokens by process and forward pass.
        facts: learning rate and the like; plain values.
        state: checkpoint of the state before the step.
        folder: run folder; ``nonfinite_iter_N.json`` and ``.pth`` go there. Resuming does not look at them.
    """
    stem = folder / f'nonfinite_iter_{iteration}'
    evidence = dict(
        facts,
        what=str(error),
        iteration=iteration,
        sample_tokens_by_process_and_pass=tokens,
        values={name: repr(value) for name, value in error.values.items()},
    )
    try:
        write_json(f'{stem}.json', evidence)
        save_checkpoint(f'{stem}.pth', state)
        saved = f'the state before it is in {stem}.pth, the facts in {os.path.basename(str(stem))}.json'
    except UserError as failure:
        saved = str(failure)
    flat = [str(token) for of_process in tokens for of_pass in of_process for token in of_pass]
    return RunStopped(
        f'{error} at iteration {iteration} ({error.bad_names()}), samples {", ".join(flat)}; {saved}; '
        'lower optimizer.lr, check those samples, or use no --amp'
    )
