"""The training loop."""
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

from torch import nn

from ..checkpoint import save_checkpoint
from ..errors import DataError, UserError
from ..io import atomic_write
from .batch_plan import BatchPlan, EpochOrder, RankBatches
from .folder import CheckpointKeeper
from .loading import make_loader, read_batches
from .log import RunLog
from .meters import Countdown, WindowAverage, duration, peak_memory_mib
from .optimizer import highest_learning_rate, set_learning_rate
from .precision import make_scaler
from .processes import Processes
from .schedule import Schedule
from .settings import TrainSettings
from .signals import Interrupted, StopRequest
from .state import capture, restore
from .step import NonFinite, Stepper


class RunStopped(UserError):
    """The run cannot go on; the message says why and what was saved."""


@dataclass
class TrainingJob:
    """What a training run needs.

    Attributes:
        model: on its device, not wrapped in DDP.
        optimizer: over its parameters (``build_optimizer``).
        dataset: ``len``, items for ``collate``, ``set_epoch``; batches have ``img_metas`` with sample tokens.
        collate: list of samples to a batch.
        plan, order, schedule: see their classes.
        max_iterations: optimizer steps of the whole run.
        settings: how to run.
        seed: of the run.
        max_norm: of the gradient (``clip_norm``).
        workers: data-loading processes.
        processes: this process among the others.
        folder: run folder.
        log: where to tell.
        meta: plain facts for checkpoints: seed, total_batch_size, num_samples, config, ...
        evaluate: called with the bare model in evaluation mode and the iteration, in every process; returns
            figures to log (None in all but the main process).
        evaluation_interval: epochs between two calls; 0 at the end only, -1 never.
    """
    model: nn.Module
    optimizer: Any
    dataset: Any
    collate: Callable
    plan: BatchPlan
    order: EpochOrder
    schedule: Schedule
    max_iterations: int
    settings: TrainSettings
    seed: int
    max_norm: float
    workers: int
    processes: Processes
    folder: Path
    log: RunLog
    meta: Mapping
    evaluate: Optional[Callable[[nn.Module, int], Optional[Dict]]] = None
    evaluation_interval: int = 0


class Trainer:
    """Trains a job from its first step, or from a checkpoint, to its last."""

    def __init__(self, job: TrainingJob):
        self.job = job
        self.iteration = 0  # optimizer steps done
        self.evaluated = 0  # iteration of the last evaluation
        self.window = WindowAverage()
        self.scaler = make_scaler(job.settings.amp)
        self.keeper = CheckpointKeeper(job.folder, job.settings.max_keep_ckpts)
        self._saved = None  # iteration of the last checkpoint

    def resume(self, checkpoint: Mapping, path: str) -> None:
        """Continue where a checkpoint was written (before ``run``)."""
        job = self.job
        progress = restore(checkpoint, path, job.model, job.optimizer, self.scaler, job.meta)
        self.iteration, self.evaluated = int(progress['iteration']), int(progress['evaluated'])
        self.window.load_state_dict(progress['window'])
        self._saved = self.iteration
        if job.processes.is_main:
            self.keeper.remove_leftovers()

    def run(self) -> None:
        """Train to the end.

        Raises:
            RunStopped: the loss is not finite, or data cannot be read; what was saved is named.
            Interrupted: SIGTERM or SIGINT, after saving.
        """
        job = self.job
        self._stepper = Stepper(self._wrapped(), job.optimizer, self.scaler, job.plan, job.processes, job.seed,
                                job.settings.amp, job.max_norm)
        self._batches = RankBatches(job.order, job.plan, job.processes.rank)
        self._loader = make_loader(job.dataset, self._batches, job.collate, job.workers, job.processes.device,
                                   persistent=True)
        self._countdown = Countdown(job.max_iterations, self.iteration)
        with StopRequest() as self._stop_request:
            while self.iteration < job.max_iterations:
                self._train_epoch(self.iteration // job.order.steps)
                self._evaluate_if_due()
            self._evaluate_if_due()
        job.log.say('training is complete after %d iterations' % self.iteration)

    def _wrapped(self):
        """The model, in DDP where there are several processes. Batches are on the device already."""
        if self.job.processes.world_size == 1:
            return self.job.model
        return nn.parallel.DistributedDataParallel(
            self.job.model, find_unused_parameters=self.job.settings.find_unused_parameters)

    def _train_epoch(self, epoch: int) -> None:
        """From where the run is to the end of the epoch (or of the run)."""
        job = self.job
        job.model.train()
        self._loader.dataset.set_epoch(epoch)
        first = self.iteration - epoch * job.order.steps
        last = min(job.order.steps, job.max_iterations - epoch * job.order.steps)
        self._batches.select(epoch, first, last)
        batches = read_batches(self._loader)
        for _ in range(first, last):
            self._train_step(batches)
        if self._is_epoch_to_save(epoch + 1):
            self._save(epoch + 1 if last == job.order.steps else None)

    def _is_epoch_to_save(self, epochs_done: int) -> bool:
        return epochs_done % self.job.settings.checkpoint_interval == 0 or self.iteration == self.job.max_iterations

    def _train_step(self, batches) -> None:
        job, begin = self.job, time.monotonic()
        micro_batches = self._fetch(batches)
        if job.processes.any(self._stop_request.received is not None):
            self._leave()
        data_time = time.monotonic() - begin
        set_learning_rate(job.optimizer, job.schedule.factor(self.iteration))
        try:
            result = self._stepper.run(self.iteration, micro_batches)
        except NonFinite as error:
            raise self._report_non_finite(error, micro_batches) from error
        self.iteration += 1
        self._countdown.step()
        self.window.add(dict(result.losses, grad_norm=result.grad_norm, time=time.monotonic() - begin,
                             data_time=data_time))
        if self.iteration % job.settings.log_interval == 0 or self.iteration in (1, job.max_iterations):
            self._log_window()
        interval = job.settings.checkpoint_interval_iters
        if interval and self.iteration % interval == 0 and self.iteration % job.order.steps:
            self._save()

    def _fetch(self, batches):
        """The step's micro-batches. Where any process cannot read its data all stop, after saving."""
        processes, fetched, message = self.job.processes, [], None
        try:
            fetched = [next(batches) for _ in range(self.job.plan.accumulate)]
        except DataError as error:
            message = str(error)
        if processes.any(message is not None):
            messages = [text for text in processes.gather(message) or ['another process'] if text]
            saved = self._save_on_the_way_out()
            processes.wait_for_all()
            raise RunStopped(
                '%s (stopped after iteration %d; %s)' % (messages[0], self.iteration, saved))
        return fetched

    def _log_window(self) -> None:
        job = self.job
        values = self.window.take()
        values.update(lr=highest_learning_rate(job.optimizer), memory_mib=peak_memory_mib(job.processes.device))
        epoch = (self.iteration - 1) // job.order.steps + 1
        terms = ' '.join('%s %.4g' % (name[5:], value) for name, value in values.items()
                         if name.startswith('loss_'))
        job.log.say('epoch %d iteration %d/%d  loss %.4f  lr %.3g  grad %.3g  %.3f s (data %.3f)  memory %.0f MiB  '
                    'left %s  |  %s' % (epoch, self.iteration, job.max_iterations, values['loss'], values['lr'],
                                       values['grad_norm'], values['time'], values['data_time'],
                                       values['memory_mib'], self._countdown.text(), terms))
        job.log.record('train', self.iteration, dict(values, epoch=epoch))

    # -- checkpoints

    def _capture(self):
        job = self.job
        progress = dict(iteration=self.iteration, evaluated=self.evaluated, window=self.window.state_dict())
        meta = dict(job.meta, iteration=self.iteration, epoch=self.iteration // job.order.steps)
        return capture(job.model, job.optimizer, self.scaler, meta, progress)

    def _save(self, epoch: Optional[int] = None) -> bool:
        """Write a checkpoint in the main process; False (or RunStopped, by option) where it cannot be written."""
        if not self.job.processes.is_main or self._saved == self.iteration:
            return True
        begin = time.monotonic()
        try:
            path = self.keeper.save(self._capture(), self.iteration, epoch)
        except UserError as error:
            if self.job.settings.on_save_error == 'stop':
                raise RunStopped('%s; stopped after iteration %d' % (error, self.iteration)) from error
            self.job.log.say('WARNING: %s; training goes on without this checkpoint' % error)
            return False
        self._saved = self.iteration
        self.job.log.say('saved %s (%.1f s)' % (path, time.monotonic() - begin))
        return True

    def _save_on_the_way_out(self) -> str:
        """What could be saved, in words."""
        if self.iteration == 0:
            return 'nothing was trained yet'
        if not self.job.processes.is_main:
            return 'the main process holds the checkpoints'
        if self._save():
            return 'continue from its checkpoint with --resume auto'
        return 'no new checkpoint could be written'

    def _leave(self) -> None:
        """Save and leave, in all processes, because one was asked to stop."""
        import signal
        number = self._stop_request.received or signal.SIGTERM
        saved = self._save_on_the_way_out()
        self.job.processes.wait_for_all()
        raise Interrupted(number, 'stopped by %s after iteration %d; %s'
                          % (signal.Signals(number).name, self.iteration, saved))

    def _report_non_finite(self, error: NonFinite, micro_batches) -> RunStopped:
        """Save the state before the bad step and the tokens of its samples; the error to raise."""
        job = self.job
        tokens = [[meta.get('sample_token') for meta in batch['img_metas']] for batch in micro_batches]
        everyone = job.processes.gather(tokens)
        stem = job.folder / ('nonfinite_iter_%d' % (self.iteration + 1))
        bad = ', '.join(name for name, value in error.values.items() if value != value or abs(value) == float('inf'))
        if not job.processes.is_main:
            job.processes.wait_for_all()
            return RunStopped('%s at iteration %d (%s); the main process reports' % (error, self.iteration + 1, bad))
        saved = self._write_evidence(stem, dict(
            what=str(error), iteration=self.iteration + 1, values={k: repr(v) for k, v in error.values.items()},
            lr=highest_learning_rate(job.optimizer), loss_scale=self.scaler.get_scale(), seed=job.seed,
            sample_tokens_by_process_and_pass=everyone))
        job.processes.wait_for_all()
        flat = [token for of_process in everyone for of_pass in of_process for token in of_pass]
        return RunStopped('%s at iteration %d (%s), samples %s; %s; lower optimizer.lr, check those samples, or use '
                          'no --amp' % (error, self.iteration + 1, bad, ', '.join(map(str, flat)), saved))

    def _write_evidence(self, stem, facts) -> str:
        try:
            with atomic_write(str(stem) + '.json') as temporary:
                with open(str(temporary), 'w', encoding='utf-8') as f:
                    json.dump(facts, f, indent=2)
            save_checkpoint(str(stem) + '.pth', self._capture())
        except UserError as error:
            return str(error)
        return 'the state before it is in %s.pth, the facts in %s.json' % (stem, os.path.basename(str(stem)))

    # -- evaluation

    def _evaluate_if_due(self) -> None:
        """Evaluate where the interval says so, after saving what would be lost if that went wrong."""
        job = self.job
        at_end = self.iteration >= job.max_iterations
        epochs_done, rest = divmod(self.iteration, job.order.steps)
        interval = job.evaluation_interval
        due = interval >= 0 and (at_end or (interval > 0 and rest == 0 and epochs_done % interval == 0))
        if job.evaluate is None or not due or self.evaluated == self.iteration:
            return
        self._save()
        begin = time.monotonic()
        self._stop_request.at_once = ('stopped while evaluating; the checkpoint of iteration %d is saved'
                                      % self.iteration)
        job.model.eval()
        figures = job.evaluate(job.model, self.iteration)
        self._stop_request.at_once = None
        self.evaluated = self.iteration
        self._countdown.pause(time.monotonic() - begin)
        if figures is not None:
            job.log.say('evaluated in %s: %s' % (duration(time.monotonic() - begin), '  '.join(
                '%s %.4f' % item for item in figures.items())))
            job.log.record('eval', self.iteration, figures)
