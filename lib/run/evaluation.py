"""The evaluation loop: every sample once, whatever the number of processes, and the same figures to the bit.

Each process takes a contiguous block of the data set, so that the features of earlier frames can be reused
from one keyframe to the next. Counts per sample travel to the main process and are summed in the data set's
order.
"""

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from ..batch import to_device
from ..errors import DataError, UserError
from ..io import path_inside, read_json, write_json
from ..prediction import save_prediction, to_dense
from ..settings import EvaluationSettings
from ..task import Task
from . import Components, default_metrics
from .loading import make_loader, read_batches
from .log import Countdown, RunLog
from .numerics import autocast
from .processes import Processes

_WAITING = 4  # predictions that may wait for the evaluator
_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class EvaluationJob:
    """What an evaluation needs.

    Attributes:
        model: on its device; put into evaluation mode and back.
        dataset: ``len``, items for ``collate``, ``ground_truth(i)``, ``ray_origins(i)``, ``sample_token(i)``.
        collate: list of samples to a batch.
        evaluator: ``process(prediction, ground_truth, origins, key)`` and ``summarize(stats)``.
        task: makes predictions dense.
        processes: this process among the others.
        say: takes progress lines.
        workers: data-loading processes.
        amp: precision of the forward pass.
        predictions_folder: where to save predictions, or None.
        score: False only predicts (and saves); needs no labels.
    """

    model: Any
    dataset: Any
    collate: Callable
    evaluator: Any
    task: Task
    processes: Processes
    say: Callable[[str], None]
    workers: int = 0
    amp: Optional[str] = None
    predictions_folder: Optional[Path] = None
    score: bool = True


def evaluate(job: EvaluationJob):
    """Predict and score the whole data set.

    Returns:
        The evaluator's result in the main process, None in the others (and with ``score=False``).

    Raises:
        DataError: a sample cannot be read.
    """
    if len(job.dataset) == 0:
        raise DataError('the data set to evaluate on is empty; check ann_file and max_samples')
    was_training = job.model.training
    job.model.eval()
    job.model.reset_history()
    stats = _evaluate_block(job, block_of(len(job.dataset), job.processes))
    job.model.train(was_training)
    everyone = job.processes.gather(stats)
    if everyone is None or not job.score:
        return None
    return job.evaluator.summarize(in_dataset_order(everyone, len(job.dataset)))


def block_of(count: int, processes: Processes) -> range:
    """Indices that this process evaluates."""
    return range(count * processes.rank // processes.world_size, count * (processes.rank + 1) // processes.world_size)


def in_dataset_order(everyone: List[List[Tuple[int, Any]]], count: int) -> List:
    """(index, stats) pairs of all processes -> stats by index; each index must occur once."""
    pairs = sorted((pair for pairs in everyone for pair in pairs), key=lambda pair: pair[0])
    if [index for index, _ in pairs] != list(range(count)):
        raise AssertionError('samples were evaluated twice or not at all')
    return [stats for _, stats in pairs]


def _evaluate_block(job, indices) -> List[Tuple[int, Any]]:
    """(index, SampleStats) of the samples of this process; scoring overlaps with the next prediction."""
    loader = make_loader(job.dataset, [[i] for i in indices], job.collate, job.workers, job.processes.device)
    progress = _Progress(len(indices), job.say)
    results, waiting = [], deque()
    with ThreadPoolExecutor(max_workers=1) as scorer:
        for index, batch in zip(indices, read_batches(loader)):
            prediction = predict(job, batch)[0]
            waiting.append((index, scorer.submit(_finish_sample, job, index, prediction)))
            while len(waiting) > _WAITING:
                results.append(_collect(waiting))
            progress.step()
        while waiting:
            results.append(_collect(waiting))
    progress.finish()
    return results


def _collect(waiting):
    index, future = waiting.popleft()
    return index, future.result()


def predict(job: EvaluationJob, batch) -> List[dict]:
    """Predictions of a batch, as numpy arrays."""
    device = job.processes.device
    with torch.no_grad(), autocast(job.amp, device):
        return job.model(return_loss=False, **without_labels(to_device(batch, device)))


def without_labels(batch: dict) -> dict:
    """The part of a batch that inference takes."""
    return {key: batch[key] for key in ('img', 'lidar2img', 'ego2lidar', 'img_metas')}


def _finish_sample(job, index, prediction):
    """Save and score one prediction (in the scoring thread); a token that is no plain name is refused."""
    token = job.dataset.sample_token(index)
    if job.predictions_folder is not None:
        save_prediction(path_inside(job.predictions_folder, token + '.npz'), prediction)
    if not job.score:
        return None
    return job.evaluator.process(
        to_dense(prediction, job.task), job.dataset.ground_truth(index), job.dataset.ray_origins(index), key=token
    )


def make_predictions_folder(path: str) -> Path:
    """The folder, made if missing and checked to be writable.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'cannot make the folder {path} ({error.strerror}); choose another --save-predictions'
        ) from error
    if not os.access(str(folder), os.W_OK):
        raise UserError(f'cannot write to {path}; choose another --save-predictions')
    return folder


class _Progress:
    """Lines with the pace and the remaining time."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self._countdown, self._say = Countdown(total), say
        self._begin = self._last = time.monotonic()

    def step(self) -> None:
        self._countdown.step()
        if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._say(
                'evaluated %d of %d samples  %.2f samples/s  left %s'
                % (self._countdown.done, self._countdown.total, self._rate(), self._countdown.text())
            )

    def finish(self) -> None:
        self._say('evaluated %d samples at %.2f samples/s' % (self._countdown.done, self._rate()))

    def _rate(self):
        return self._countdown.done / max(time.monotonic() - self._begin, 1e-9)


class EvaluationHook:
    """Evaluates a model and keeps the scores in the run folder as ``evaluation_iter_N.json``.

    Args:
        components, task: make the evaluator.
        dataset: to evaluate on.
        settings: which metrics.
        processes, log: of the run.
        workers: data-loading processes.
        amp: precision of the forward pass.
    """

    def __init__(
        self,
        components: Components,
        task: Task,
        dataset,
        settings: EvaluationSettings,
        processes: Processes,
        log: RunLog,
        workers: int,
        amp: Optional[str],
    ):
        self.components, self.task, self.dataset = components, task, dataset
        self.processes, self.log, self.workers, self.amp = processes, log, workers, amp
        self.evaluator = components.build_evaluator(
            task, metrics=settings.metrics or default_metrics(task), device=processes.device
        )

    def __call__(self, model, iteration: int, folder: Path) -> Optional[Dict[str, float]]:
        """Scores of the model in the main process, None in the others.

        A continued run finds the scores that it has already written into its folder.
        """
        path = folder / ('evaluation_iter_%d.json' % iteration)
        if self.processes.broadcast(path.exists()):
            return _totals(read_json(path)) if self.processes.is_main else None
        result = evaluate(
            EvaluationJob(
                model,
                self.dataset,
                self.components.collate,
                self.evaluator,
                self.task,
                self.processes,
                self.log.say,
                self.workers,
                self.amp,
            )
        )
        if result is None:
            return None
        for line in result.as_table().splitlines():
            self.log.say(line)
        scores = result.as_dict()
        write_json(path, dict(scores, iteration=iteration))
        return _totals(scores)


def _totals(scores) -> Dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}
