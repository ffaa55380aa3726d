"""From the arguments of ``train.py`` to a finished run."""

import os
import sys
from pathlib import Path
from typing import IO, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..checkpoint import check_pretrained_file, load_pretrained
from ..config import load_config, require_keys
from ..dataset import BalancedDataset
from ..errors import ConfigError
from ..registry import check_whole
from ..settings import EvaluationSettings, TrainSettings
from ..task import Task
from . import Components, open_dataset, read_task
from .batch_plan import BatchPlan, EpochOrder, balancing_weights, plan_batch
from .evaluation import Evaluation
from .folder import (
    Resumable,
    claim_folder,
    config_differences,
    config_lines,
    create_run_folder,
    find_checkpoint_to_resume,
    note_folder,
    read_training_state,
    resume_command,
    write_facts,
)
from .loading import count_workers
from .log import RunLog
from .numerics import check_precision, describe_precision, pick_seed, seed_everything, set_deterministic, set_tf32
from .optimizer import Schedule, build_optimizer, clip_norm
from .pictures import ValidationPictures
from .processes import Interrupted, Processes, RunStopped, start_processes
from .training import Trainer, TrainingJob

_REQUIRED = ('task', 'model', 'data.train', 'optimizer', 'runner', 'total_batch_size')


def run_training(args, components: Callable[[], Components]) -> int:
    """Train as the arguments of ``train.py`` say.

    Args:
        args: parsed arguments.
        components: makes the parts; called once the config is known to be readable.

    Returns:
        Exit status: 0, or 128 + signal number after SIGTERM or SIGINT.

    Raises:
        UserError: bad input, or the run had to stop; told by the main process.
    """
    cfg = load_config(args.config, config_changes(args))
    require_keys(cfg, _REQUIRED)
    with start_processes(args.device) as processes:
        try:
            Launch(args, cfg, components(), processes).run()
        except Interrupted as stop:
            if processes.is_main:
                print(stop, flush=True)
            return stop.exit_code
        except RunStopped:
            if processes.is_main:
                raise
            return 2
    return 0


def shares_norms(model: torch.nn.Module, processes: Processes) -> bool:
    """Whether batch norms exchange their statistics with other processes."""
    return processes.world_size > 1 and any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())


def check_norms(model: torch.nn.Module, processes: Processes) -> None:
    """Raise ConfigError where batch norms over all processes have no GPUs to run on."""
    if shares_norms(model, processes) and processes.device.type == 'cpu':
        raise ConfigError(
            "norms of type 'SyncBN' work between GPUs alone; set norm_cfg.type='BN', or train in one process or on GPUs"
        )


def config_changes(args) -> List[str]:
    """``--override``, and after it the arguments that stand for a config value."""
    named = {
        'seed': args.seed,
        'train.amp': args.amp,
        'train.tf32': args.tf32,
        'train.accumulate': args.accumulate,
        'runner.max_epochs': args.max_epochs,
        'runner.max_iters': args.max_iters,
        'load_from': args.load_from,
        'resume_from': args.resume,
    }
    return list(args.override) + [f'{name}={value}' for name, value in named.items() if value is not None]


class Start(NamedTuple):
    """Where a run begins.

    checkpoint  content of the checkpoint to continue from, or None
    path        its file
    in_place    the run goes on in the folder of that file
    looked      folders that --resume auto looked at
    lock        of the folder of that file, which is claimed before it is read if the run goes on there
    """

    checkpoint: Optional[Dict]
    path: Optional[Path]
    in_place: bool
    looked: Sequence[str] = ()
    lock: Optional[IO] = None


class Launch:
    """Everything between a config and a running trainer; what is quick to check comes first."""

    def __init__(self, args, cfg, components: Components, processes: Processes):
        self.args, self.cfg, self.components, self.processes = args, cfg, components, processes
        self.settings = TrainSettings.from_config(cfg.get('train'))
        self.evaluation = EvaluationSettings.from_config(cfg.get('evaluation'))
        check_precision(self.settings.amp, processes.device)
        self.task: Task = read_task(cfg)
        self.plan: BatchPlan = plan_batch(
            cfg.total_batch_size, processes.world_size, self.settings.accumulate, self.settings.max_samples_per_gpu
        )

    def run(self) -> None:
        """Make data sets, model, run folder and trainer, and train."""
        start = find_start(self.args, self.cfg.get('resume_from'), self.processes)
        if start.checkpoint is None and self.cfg.get('load_from'):
            check_pretrained_file(self.cfg.load_from)
        self.seed = choose_seed(self.args, self.cfg, start, self.processes)
        self.log = RunLog(self.processes.is_main)
        self.lock = start.lock
        try:
            self._prepare(start).run()
        finally:
            self.log.close()
            if self.lock is not None:
                self.lock.close()

    def _prepare(self, start: Start) -> Trainer:
        tell_start(self.log, self.args, self.cfg, start, self.seed)
        self._set_backends()
        self.log.say(self.plan.describe())
        seed_everything(self.seed)
        dataset, validation = self._training_set(), self._validation_set()
        self.processes.wait_for_all()
        model = self._model(start).to(self.processes.device)
        check_norms(model, self.processes)
        trainer = Trainer(self._job(model, dataset, validation))
        if start.checkpoint is not None:
            trainer.resume(start.checkpoint, str(start.path))
        folder = make_folder(self.args, start, self.processes)
        if self.processes.is_main and self.lock is None:
            self.lock = claim_folder(folder)
        self.log.open(folder, self.settings.tensorboard)
        write_facts(folder, self.cfg, self.seed, self.processes, self.log)
        trainer.use_folder(folder, resume_command(sys.argv, folder, os.environ))
        return trainer

    def _set_backends(self) -> None:
        set_tf32(self.settings.tf32)
        torch.backends.cudnn.benchmark = self.settings.cudnn_benchmark
        set_deterministic(self.settings.deterministic)
        self.log.say(f'precision: {describe_precision(self.settings.amp, self.processes.device, training=True)}')

    @property
    def _checks_files(self) -> bool:
        return self.processes.is_main and not self.args.no_preflight

    def _training_set(self):
        settings = self.settings
        changes = dict(seed=self.seed, on_error=settings.on_data_error, max_skipped=settings.max_skipped)
        return open_dataset(self.components, self.cfg, 'train', self.task, changes, self._checks_files)

    def _validation_set(self):
        if self.evaluation.interval < 0 or self.args.no_eval or self.cfg.data.get('val') is None:
            return None
        return open_dataset(self.components, self.cfg, 'val', self.task, {}, self._checks_files)

    def _model(self, start: Start) -> torch.nn.Module:
        cfg, model = self.cfg, self.components.build_model(self.cfg.model, self.task)
        if start.checkpoint is None and cfg.get('load_from'):
            keys = cfg.get('revise_keys') or ()
            for line in load_pretrained(model, cfg.load_from, keys, self.args.trust_weights).lines():
                self.log.say(line)
        if self.settings.cuda_graph:
            if not hasattr(model, 'graphs_training'):
                raise ConfigError(f'train.cuda_graph: {type(model).__name__} cannot be captured; set it to False')
            model.graphs_training = True
            if self.processes.device.type != 'cuda':
                self.log.say('train.cuda_graph has no effect on the CPU')
            elif shares_norms(model, self.processes):
                self.log.say("train.cuda_graph has no effect with norms of type 'SyncBN' in several processes")
            elif getattr(model, 'auxiliary_losses', ()):
                self.log.say('train.cuda_graph has no effect with model.auxiliary_losses')
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        total = sum(p.numel() for p in model.parameters()) / 1e6
        self.log.say(f'{total:.2f} million parameters, {learning:.2f} million of them learn')
        return model

    def _sample_weights(self, dataset: BalancedDataset) -> Optional[Tensor]:
        share = self.settings.class_balance
        if not share:
            return None
        if not hasattr(dataset, 'object_classes'):
            raise ConfigError(f'train.class_balance: {type(dataset).__name__} has no object_classes; set it to 0')
        classes = [dataset.object_classes(index) for index in range(len(dataset))]
        weights = balancing_weights(classes, share)
        self.log.say(
            f'class-balanced sampling: {share:g} of an epoch by class, {len(set().union(*classes))} classes; '
            f'a sample is met {weights.min():.2f} to {weights.max():.2f} times an epoch'
        )
        return weights

    def _evaluation_of(self, validation, workers: int) -> Optional[Evaluation]:
        if validation is None:
            return None
        parts = self.components, self.task, validation, self.processes, self.log.say
        return Evaluation(*parts, self.evaluation.metrics, workers, self.settings.amp)

    def _pictures(self, evaluation: Optional[Evaluation]) -> Optional[ValidationPictures]:
        interval, draw = self.settings.picture_interval, self.components.draw
        if not interval or evaluation is None or draw is None or not self.processes.is_main:
            return None
        return ValidationPictures(evaluation, interval, draw, self.log)

    def _job(self, model, dataset, validation) -> TrainingJob:
        cfg = self.cfg
        order = EpochOrder(len(dataset), self.plan.total, self.seed, self._sample_weights(dataset))
        epochs, iterations = run_length(cfg.runner, order.steps)
        self.log.say(f'{len(dataset)} training samples, {order.steps} optimizer steps per epoch, {iterations} in all')
        workers = count_workers(cfg)
        evaluation = self._evaluation_of(validation, workers)
        return TrainingJob(
            model=model,
            optimizer=build_optimizer(model, cfg.optimizer),
            dataset=dataset,
            collate=self.components.collate,
            plan=self.plan,
            order=order,
            schedule=Schedule.from_config(cfg.get('lr_config'), epochs, iterations, order.steps),
            max_iterations=iterations,
            settings=self.settings,
            seed=self.seed,
            max_norm=clip_norm(cfg.get('optimizer_config')),
            workers=workers,
            processes=self.processes,
            log=self.log,
            evaluation=evaluation,
            evaluated=self.evaluation,
            pictures=self._pictures(evaluation),
            meta=dict(
                seed=self.seed, total_batch_size=self.plan.total, num_samples=len(dataset), config=config_lines(cfg)
            ),
        )


def run_length(runner, steps: int) -> Tuple[int, int]:
    """(epochs, optimizer steps) of the whole run.

    Args:
        runner: the config's section, with max_epochs, max_iters or both.
        steps: optimizer steps per epoch.

    Raises:
        ConfigError: neither is given, or one is no positive integer.
    """
    epochs, iterations = runner.get('max_epochs'), runner.get('max_iters')
    for name, value in (('max_epochs', epochs), ('max_iters', iterations)):
        if value is not None:
            check_whole(value, 1, f'runner.{name}')
    if epochs is None and iterations is None:
        raise ConfigError('runner needs max_epochs or max_iters')
    if epochs is None:
        return -(-iterations // steps), iterations
    return epochs, min(epochs * steps, iterations or epochs * steps)


def find_start(args, resume: Optional[str], processes: Processes) -> Start:
    """The checkpoint to continue from, if any; the main process looks for it.

    'auto' and a run folder are continued in place, a checkpoint file in a new folder.

    Args:
        args: arguments of ``train.py``.
        resume: 'auto', a folder, a file, or None.

    Raises:
        UserError: there is none, or another run writes to its folder.
    """
    found, lock = Resumable(None, []), None
    if processes.is_main and resume:
        found = find_checkpoint_to_resume(resume, args.work_dir, args.config)
        if _continues_in_place(args, resume, found.path):  # a run that still writes there may be removing the file
            folder = found.path.parent
            lock = claim_folder(folder)
            found = found._replace(path=find_checkpoint_to_resume(str(folder), args.work_dir, args.config).path)
    path, looked = processes.broadcast(tuple(found))
    checkpoint = None if path is None else read_training_state(str(path), args.trust_weights)
    return Start(checkpoint, path, _continues_in_place(args, resume, path), looked, lock)


def _continues_in_place(args, resume, path) -> bool:
    if path is None or not (resume == 'auto' or os.path.isdir(resume)):
        return False
    return resume == 'auto' or not args.work_dir or Path(args.work_dir) == path.parent


def make_folder(args, start: Start, processes: Processes) -> Path:
    """The run folder; the main process makes it, late, so that bad input leaves none behind."""
    folder = start.path.parent if start.in_place and start.path else None
    if folder is None and processes.is_main:
        folder = create_run_folder(args.work_dir, args.config)
        note_folder(folder, args.config)
    return processes.broadcast(folder)


def choose_seed(args, cfg, start: Start, processes: Processes) -> int:
    """``--seed``; else the checkpoint's, to go on as before; else the config's, or a random one."""
    if start.checkpoint is not None and args.seed is None:
        return int(start.checkpoint['meta']['seed'])
    return processes.broadcast(pick_seed(cfg.get('seed')))


def tell_start(log: RunLog, args, cfg, start: Start, seed: int) -> None:
    """First lines of the log."""
    log.say(f'config {args.config}, seed {seed}')
    if start.path is None and start.looked:
        log.say(f'--resume auto: no checkpoint to continue from in {", ".join(start.looked)}; starting anew')
    if start.checkpoint is not None:
        log.say(f'continuing from {start.path}')
        for line in config_differences(start.checkpoint['meta'].get('config', ''), config_lines(cfg)):
            log.say(f"config differs from the checkpoint's: {line}")
