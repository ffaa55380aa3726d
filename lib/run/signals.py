"""SIGTERM and SIGINT: ask for a stop at the next safe point; asked twice, stop at once."""

import os
import signal
from typing import Optional

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
