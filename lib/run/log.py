"""The run's log: console, ``log.txt``, machine-readable ``metrics.jsonl``, and TensorBoard if installed."""

import json
import sys
import time
from typing import Dict, Optional


class RunLog:
    """Writes in the main process and is silent in the others.

    Until ``open`` gives it a folder it logs to the console, and remembers. A disk that is full must not end a
    run: a line that cannot be written is on the console all the same.

    Args:
        is_main: whether this is the process that logs.
    """

    def __init__(self, is_main: bool = True):
        self.is_main = is_main
        self.folder: Optional[str] = None
        self._early = []
        self._complained = False
        self._board = None

    def open(self, folder: str, tensorboard: bool = False) -> None:
        """Log to files in the run folder too; event files as well if wanted and TensorBoard is installed."""
        self.folder = folder
        for line in self._early:
            self._append('log.txt', line)
        if self.is_main and tensorboard:
            self._board = self._open_board()

    def say(self, text: str) -> None:
        """A line for people, with the time."""
        if not self.is_main:
            return
        line = '{}  {}'.format(time.strftime('%Y-%m-%d %H:%M:%S'), text)
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

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _append(self, name, line):
        if self.folder is None:
            self._early.append(line)
            return
        try:
            with open(f'{self.folder}/{name}', 'a', encoding='utf-8') as f:
                f.write(line + '\n')
        except OSError as error:
            if not self._complained:
                print(
                    f'warning: cannot write {self.folder}/{name} ({error.strerror}); the log goes on here only',
                    file=sys.stderr,
                    flush=True,
                )
            self._complained = True

    def _open_board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(self.folder + '/tensorboard')
