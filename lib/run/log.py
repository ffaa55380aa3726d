"""The run's log: console, ``log.txt``, machine-readable ``metrics.jsonl``, and TensorBoard if installed."""
import json
import sys
import time
from typing import Dict, Optional


class RunLog:
    """Writes in the main process and is silent in the others.

    A disk that is full must not end a run: a line that cannot be written is on the console all the same.

    Args:
        folder: run folder; None logs to the console only.
        is_main: whether this is the process that logs.
        tensorboard: write event files too, if TensorBoard is installed.
    """

    def __init__(self, folder: Optional[str] = None, is_main: bool = True, tensorboard: bool = False):
        self.folder, self.is_main = folder, is_main
        self._complained = False
        self._board = self._open_board() if folder and is_main and tensorboard else None

    def say(self, text: str) -> None:
        """A line for people, with the time."""
        if not self.is_main:
            return
        line = '%s  %s' % (time.strftime('%Y-%m-%d %H:%M:%S'), text)
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
                    self._board.add_scalar('%s/%s' % (kind, name), value, iteration)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _append(self, name, line):
        if self.folder is None:
            return
        try:
            with open('%s/%s' % (self.folder, name), 'a', encoding='utf-8') as f:
                f.write(line + '\n')
        except OSError as error:
            if not self._complained:
                print('warning: cannot write %s/%s (%s); the log goes on here only'
                      % (self.folder, name, error.strerror), file=sys.stderr, flush=True)
            self._complained = True

    def _open_board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(self.folder + '/tensorboard')
