"""Pictures of a few validation samples while a model learns. Training takes no notice of them."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import numpy as np
import torch
from torch import nn

from ..errors import reason
from ..prediction import to_dense
from .evaluation import Evaluation, predict
from .log import RunLog

_SAMPLES = 2


class _Sample(NamedTuple):
    """A sample that is drawn: its token, its batch of one, and its true labels."""

    token: str
    batch: Dict
    truth: Dict[str, np.ndarray]


class ValidationPictures:
    """Draws truth and prediction of the same samples every ``interval`` optimizer steps, in one process.

    The model predicts between two steps, with the generators put back as they were; all else is done in a thread. What
    goes wrong is told, and ends the pictures and nothing else.

    Args:
        evaluation: whose data set, task, device and precision are taken.
        interval: optimizer steps between two pictures.
        draw: (task, truth, prediction, title) -> uint8 [height, width, 3] RGB; see ``Components``.
        log: where the pictures go.
    """

    def __init__(self, evaluation: Evaluation, interval: int, draw: Callable, log: RunLog):
        self.evaluation, self.interval, self._draw, self._log = evaluation, interval, draw, log
        self._samples: List[_Sample] = []
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Optional[Future] = None
        self._given_up = False

    def __enter__(self) -> 'ValidationPictures':
        return self

    def __exit__(self, *exception) -> None:
        self.finish()

    def take_if_due(self, model: nn.Module, iteration: int) -> float:
        """Seconds that training waited for the predictions after this iteration; mostly none."""
        if self._given_up or iteration % self.interval:
            return 0.0
        begin = time.monotonic()
        self.finish()
        if self._given_up:
            return 0.0
        try:
            self._samples = self._samples or self._read()
            predictions = [self._predict(model, sample) for sample in self._samples]
        except Exception as error:  # whatever it is, it must not end a training
            self._give_up(error)
        else:
            self._pending = self._thread.submit(self._write, predictions, iteration)
        return time.monotonic() - begin

    def finish(self) -> None:
        """Wait for what is still being drawn: no process should be forked meanwhile, and the log stays open."""
        pending, self._pending = self._pending, None
        error = None if pending is None else pending.exception()
        if error is not None:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._given_up = True
        self._log.say(f'WARNING: no more pictures of validation samples ({type(error).__name__}: {reason(error)})')

    def _read(self) -> List[_Sample]:
        """Samples that lie evenly in the data set."""
        dataset, collate = self.evaluation.dataset, self.evaluation.components.collate
        count = min(_SAMPLES, len(dataset))
        indices = [(2 * i + 1) * len(dataset) // (2 * count) for i in range(count)]
        return [_Sample(dataset.sample_token(i), collate([dataset[i]]), dataset.ground_truth(i)) for i in indices]

    def _predict(self, model: nn.Module, sample: _Sample) -> Dict[str, np.ndarray]:
        evaluation = self.evaluation
        with _as_before(model, evaluation.processes.device):
            prediction = predict(model, sample.batch, evaluation.processes.device, evaluation.amp)[0]
        return to_dense(prediction, evaluation.task)

    def _write(self, predictions: List[Dict[str, np.ndarray]], iteration: int) -> None:
        for i, (sample, prediction) in enumerate(zip(self._samples, predictions)):
            title = f'{sample.token}, after {iteration} steps'
            image = self._draw(self.evaluation.task, sample.truth, prediction, title)
            self._log.picture(f'validation_{i}', iteration, image)


@contextlib.contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in evaluation mode; afterwards in its mode again, with the random generators as they were."""
    was_training, devices = model.training, [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
