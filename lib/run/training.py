"""The training loop."""

import contextlib
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

from torch import nn

from ..dataset import Dataset
from ..errors import DataError, UserError
from ..settings import EvaluationSettings, TrainSettings
from .batch_plan import BatchPlan, EpochOrder, RankBatches
from .evaluation import Evaluation, score_text, scores_of_run
from .folder import BEST, CheckpointKeeper, capture, restore
from .loading import make_loader, read_batches
from .log import Countdown, HealthWatch, RunLog, WindowAverage, describe_health, duration, peak_memory_mib
from .numerics import make_scaler
from .optimizer import Schedule, WeightAverage, highest_learning_rate, set_learning_rate
from .pictures import ValidationPictures
from .processes import Interrupted, Processes, RunStopped, StopRequest
from .step import NonFinite, Stepper, exchanging_gradients, report_non_finite

_LINE = (
    'epoch {epoch} iteration {iteration}/{of}  loss {loss:.4f}  lr {lr:.3g}  grad {grad_norm:.3g}  {time:.3f} s '
    '(data {data_time:.3f}, update {update_time:.3f})  {samples_per_s:.2f} samples/s  memory {memory_mib:.0f} MiB  '
    'left {left}  |  {terms}'
)
_MEANS = (
    'numbers of a line are means over the iterations since the line before; lr and the shares in percent (recall: of '
    'the occupied voxels kept by each stage; right class: of the instances whose query scores their class highest; '
    'empty masks: of all queries) are of its iteration (docs/training.md)'
)
_LONG_WAIT = 0.2  # share of the time spent waiting for data that is worth a hint


@dataclass
class TrainingJob:
    """What a training run needs.

    Attributes:
        model: on its device, not wrapped in DDP.
        optimizer: over its parameters (``build_optimizer``).
        dataset: to learn from.
        collate: list of samples to a batch.
        plan, order, schedule: see their classes.
        max_iterations: optimizer steps of the whole run.
        settings: how to run.
        seed: of the run.
        max_norm: of the gradient (``clip_norm``).
        workers: data-loading processes.
        processes: this process among the others.
        log: where to tell.
        meta: plain facts for checkpoints: seed, total_batch_size, num_samples, config, ...
        evaluation: what the model is scored by, or None.
        evaluated: when, and what the best checkpoint is known by.
        pictures: of validation samples, in the process that draws them, or None.
    """

    model: nn.Module
    optimizer: Any
    dataset: Dataset
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
    log: RunLog
    meta: Mapping
    evaluation: Optional[Evaluation] = None
    evaluated: EvaluationSettings = EvaluationSettings()
    pictures: Optional[ValidationPictures] = None


class Trainer:
    """Trains a job from its first step, or from a checkpoint, to its last."""

    def __init__(self, job: TrainingJob):
        self.job = job
        self.iteration = 0  # optimizer steps done
        self.evaluated = 0  # iteration of the last evaluation
        self.window = WindowAverage()
        self.scaler = make_scaler(job.settings.amp)
        decay = job.settings.ema_decay
        self.average = WeightAverage(job.model, decay) if decay else None
        self._saved: Optional[int] = None  # iteration of the last checkpoint
        self._windows = 0  # log lines written by this process
        self.folder: Path  # of the run, and who writes checkpoints there: see use_folder
        self.keeper: CheckpointKeeper

    def resume(self, checkpoint: Mapping, path: str) -> None:
        """Continue where a checkpoint was written (before ``run``)."""
        job = self.job
        progress = restore(checkpoint, path, job.model, job.optimizer, self.scaler, job.meta, self.average)
        self.iteration, self.evaluated = int(progress['iteration']), int(progress['evaluated'])
        self.window.load_state_dict(progress['window'])
        self._saved = self.iteration

    def use_folder(self, folder: Path, resume_command: str) -> None:
        """Write checkpoints and scores there (before ``run``); the command that goes on there is told on stopping."""
        self.folder, self._resume_command = folder, resume_command
        self.keeper = CheckpointKeeper(folder, self.job.settings.max_keep_ckpts)
        if self.job.processes.is_main:
            self.keeper.remove_leftovers()

    def run(self) -> None:
        """Train to the end.

        Raises:
            RunStopped: the loss is not finite, or data cannot be read; what was saved is named.
            Interrupted: SIGTERM or SIGINT, after saving.
        """
        job = self.job
        model = job.model.train()
        if job.processes.world_size > 1:
            model = exchanging_gradients(model, job.settings.find_unused_parameters)
        self._stepper = Stepper(
            model, job.optimizer, self.scaler, job.plan, job.processes, job.seed, job.settings.amp, job.max_norm
        )
        self._batches = RankBatches(job.order, job.plan, job.processes.rank)
        self._loader = make_loader(
            job.dataset, self._batches, job.collate, job.workers, job.processes.device, persistent=True
        )
        if self.iteration:
            job.log.say(f'continuing at iteration {self.iteration}')
        if self.average is not None:
            job.log.say(
                f'weights are averaged with decay {self.average.decay:g}: evaluation and checkpoints take the average'
            )
        job.log.say(_MEANS)
        self._health = HealthWatch()
        self._countdown = Countdown(job.max_iterations, self.iteration)
        with StopRequest() as self._stop_request, job.pictures or contextlib.nullcontext():
            if job.processes.broadcast(self.keeper.holds(self.iteration)):
                self._evaluate_if_due()  # the run may have been cut off right before
            while self.iteration < job.max_iterations:
                self._train_epoch(self.iteration // job.order.steps)
                self._evaluate_if_due()
            self._evaluate_if_due()
        job.log.say(f'training is complete after {self.iteration} iterations; everything is in {self.folder}')

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
        at_end = self.iteration == self.job.max_iterations
        return at_end or epochs_done % self.job.settings.checkpoint_interval == 0

    def _train_step(self, batches) -> None:
        job, begin = self.job, time.monotonic()
        micro_batches = self._fetch(batches)
        if job.processes.any(self._stop_request.received is not None):
            self._leave()
        data_time = time.monotonic() - begin
        set_learning_rate(job.optimizer, job.schedule.factor(self.iteration))
        logged = self._is_logged(self.iteration + 1)
        try:
            result = self._stepper.run(self.iteration, micro_batches, count=logged)
        except NonFinite as error:
            raise self._report(error, micro_batches) from error
        self.iteration += 1
        if self.average is not None:
            self.average.update()
        self._countdown.step()
        times = dict(time=time.monotonic() - begin, data_time=data_time, update_time=result.seconds['update'])
        self.window.add(dict(result.losses, grad_norm=result.grad_norm, **times))
        if logged:
            self._log_window(result.shares)
        if job.pictures is not None:
            self._countdown.pause(job.pictures.take_if_due(job.model, self.iteration))
        interval = job.settings.checkpoint_interval_iters
        if self.iteration % job.order.steps:  # what is due at the end of an epoch is done there
            if interval and self.iteration % interval == 0:
                self._save()
            if job.evaluated.is_due(self.iteration):
                self._evaluate_if_due()

    def _is_logged(self, iteration: int) -> bool:
        return iteration % self.job.settings.log_interval == 0 or iteration in (1, self.job.max_iterations)

    def _fetch(self, batches):
        """The step's micro-batches. Where any process cannot read its data all stop, after saving."""
        processes, fetched, message = self.job.processes, [], None
        try:
            fetched = [next(batches) for _ in range(self.job.plan.accumulate)]
        except DataError as error:
            message = str(error)
        if processes.any(message is not None):
            if processes.any(self._stop_request.received is not None):
                self._leave()  # who stops a job often stops its workers as well
            messages = [text for text in processes.gather(message) or ['another process'] if text]
            saved = self._save_on_the_way_out()
            processes.wait_for_all()
            raise RunStopped(f'{messages[0]} (stopped after iteration {self.iteration}; {saved})')
        return fetched

    def _log_window(self, shares: Mapping[str, float]) -> None:
        """A line with the averages since the one before, and the shares of this step."""
        job = self.job
        values = self.window.take()
        values.update(
            epoch=(self.iteration - 1) // job.order.steps + 1,
            lr=highest_learning_rate(job.optimizer),
            memory_mib=peak_memory_mib(job.processes.device),
            samples_per_s=job.plan.total / max(values['time'], 1e-9),
            **shares,
        )
        terms = ' '.join(f'{name[5:]} {value:.4g}' for name, value in values.items() if name.startswith('loss_'))
        terms += f'  |  {describe_health(shares)}' if shares else ''
        values.setdefault('grad_norm', 0.0)  # fp16 skipped every step of the window
        skipped = getattr(job.dataset, 'num_skipped', 0)
        if skipped:
            values['skipped_samples'] = skipped
            terms += f'  |  {skipped} unreadable samples replaced'
        progress = dict(iteration=self.iteration, of=job.max_iterations, left=self._countdown.text())
        job.log.say(_LINE.format(**dict(values, **progress, terms=terms)))
        job.log.record('train', self.iteration, values)
        for warning in self._health.look(values):
            job.log.say(f'WARNING: {warning}')
        self._windows += 1
        if self._windows == 3:  # workers have warmed up
            self._note_waiting(values['data_time'] / values['time'])

    def _note_waiting(self, share: float) -> None:
        """Say so if waiting for data takes a large share of the time."""
        if share > _LONG_WAIT:
            self.job.log.say(
                f'NOTE: {100 * share:.0f} % of the time goes into waiting for data; data.workers_per_gpu is '
                f'{self.job.workers}, and docs/performance.md ("Data loading") says how to load faster'
            )

    # -- checkpoints

    def _capture(self):
        job = self.job
        progress = dict(iteration=self.iteration, evaluated=self.evaluated, window=self.window.state_dict())
        meta = dict(job.meta, iteration=self.iteration, epoch=self.iteration // job.order.steps)
        return capture(job.model, job.optimizer, self.scaler, meta, progress, self.average)

    def _save(self, epoch: Optional[int] = None) -> bool:
        """Write a checkpoint in the main process; False, or RunStopped by option, where that fails."""
        if not self.job.processes.is_main or self._saved == self.iteration:
            return True
        begin = time.monotonic()
        try:
            path = self.keeper.save(self._capture(), self.iteration, epoch)
        except UserError as error:
            if self.job.settings.on_save_error == 'stop':
                raise RunStopped(f'{error}; stopped after iteration {self.iteration}') from error
            self.job.log.say(f'WARNING: {error}; training goes on without this checkpoint')
            return False
        self._saved = self.iteration
        self.job.log.say(f'saved {path} ({time.monotonic() - begin:.1f} s)')
        return True

    def _save_on_the_way_out(self) -> str:
        """What could be saved, in words."""
        if self.iteration == 0:
            return 'nothing was trained yet'
        if not self.job.processes.is_main:
            return 'the main process holds the checkpoints'
        if self._save():
            return f'continue with: {self._resume_command}'
        return 'no new checkpoint could be written'

    def _leave(self) -> None:
        """Save and leave, in all processes, because one was asked to stop."""
        number = self._stop_request.received or signal.SIGTERM
        saved = self._save_on_the_way_out()
        self.job.processes.wait_for_all()
        raise Interrupted(number, f'stopped by {signal.Signals(number).name} after iteration {self.iteration}; {saved}')

    def _report(self, error: NonFinite, micro_batches) -> RunStopped:
        """Gather the tokens of all processes; the main one writes down what happened."""
        job = self.job
        tokens = job.processes.gather(
            [[meta.get('sample_token') for meta in batch['img_metas']] for batch in micro_batches]
        )
        if tokens is not None:  # in the main process
            facts = dict(lr=highest_learning_rate(job.optimizer), loss_scale=self.scaler.get_scale(), seed=job.seed)
            stopped = report_non_finite(error, self.iteration + 1, tokens, facts, self._capture(), self.folder)
        else:
            stopped = RunStopped(str(error))
        job.processes.wait_for_all()
        return stopped

    # -- evaluation

    def _evaluate_if_due(self) -> None:
        """Evaluate where the interval says so, after saving what would be lost if that went wrong."""
        job = self.job
        at_end, settings = self.iteration >= job.max_iterations, job.evaluated
        epochs, rest = divmod(self.iteration, job.order.steps)
        due = settings.interval >= 0 and (at_end or settings.is_due(self.iteration, None if rest else epochs))
        if job.evaluation is None or not due or self.evaluated == self.iteration:
            return
        self._save()
        if job.pictures is not None:
            job.pictures.finish()
        begin = time.monotonic()
        saved = f'the checkpoint of iteration {self.iteration} is saved'
        self._stop_request.at_once = f'stopped while evaluating; {saved}; continue with: {self._resume_command}'
        with contextlib.nullcontext() if self.average is None else self.average.in_model():
            figures = job.evaluation.run_in_training(job.model, self.iteration, self.folder)
        self._stop_request.at_once = None
        self.evaluated = self.iteration
        self._countdown.pause(time.monotonic() - begin)
        if figures is not None:
            text = '  '.join(f'{name} {score_text(name, value)}' for name, value in figures.items())
            job.log.say(f'evaluated in {duration(time.monotonic() - begin)}: {text}')
            job.log.record('eval', self.iteration, figures)
            self._keep_best()

    def _keep_best(self) -> None:
        """Keep this iteration's checkpoint as best.pth if it has the best score of the run folder's."""
        name = self.job.evaluated.best_by
        if name is None:
            return
        scores = scores_of_run(self.folder, name)
        if self.iteration not in scores:
            self.job.log.say(
                f'WARNING: evaluation gave no {name} (evaluation.save_best); no checkpoint is kept as best'
            )
        elif scores[self.iteration] >= max(scores.values()):
            try:
                self.keeper.mark_best(self.iteration)
            except UserError as error:
                self.job.log.say(f'WARNING: {error}')
                return
            text = score_text(name, scores[self.iteration])
            self.job.log.say(f'best so far by {name}, {text}: kept as {self.folder / BEST}')
