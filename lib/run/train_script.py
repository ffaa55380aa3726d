"""From the arguments of ``train.py`` to a finished run."""
import json
import os
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import torch

from ..checkpoint import load_pretrained
from ..config import dump_config, load_config, require_keys
from ..errors import ConfigError
from ..io import write_json
from .batch_plan import EpochOrder, plan_batch
from .components import Components, default_metrics, open_dataset, read_task
from .environment import describe_environment
from .evaluation import EvaluationJob, evaluate
from .folder import create_run_folder, find_checkpoint_to_resume
from .log import RunLog
from .optimizer import build_optimizer
from .precision import check_precision, describe_precision, set_tf32
from .processes import Processes, start_processes
from .schedule import Schedule
from .seeding import pick_seed, seed_everything
from .settings import EvaluationSettings, TrainSettings
from .signals import Interrupted
from .state import config_differences, read_training_state
from .step import clip_norm
from .training import RunStopped, Trainer, TrainingJob


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
    with start_processes(args.device) as processes:
        try:
            _train(args, cfg, components(), processes)
        except Interrupted as stop:
            if processes.is_main:
                print(stop, flush=True)
            return stop.exit_code
        except RunStopped:
            if processes.is_main:
                raise
            return 2
    return 0


def config_changes(args) -> List[str]:
    """The arguments that stand for a config value, as overrides; ``--override`` comes first and loses."""
    named = {'seed': args.seed, 'train.amp': args.amp, 'train.accumulate': args.accumulate,
             'runner.max_epochs': args.max_epochs, 'runner.max_iters': args.max_iters,
             'load_from': args.load_from, 'resume_from': args.resume}
    return list(args.override) + ['%s=%s' % item for item in named.items() if item[1] is not None]


class _Start(NamedTuple):
    """Where a run begins: a checkpoint to continue from (content and path), or nothing."""
    checkpoint: Optional[Dict]
    path: Optional[Path]
    folder: Path


def _train(args, cfg, components, processes: Processes) -> None:
    require_keys(cfg, ('task', 'model', 'data.train', 'optimizer', 'runner', 'total_batch_size'))
    settings, evaluation = TrainSettings.from_config(cfg.get('train')), \
        EvaluationSettings.from_config(cfg.get('evaluation'))
    check_precision(settings.amp, processes.device)
    task = read_task(cfg)
    plan = plan_batch(cfg.total_batch_size, processes.world_size, settings.accumulate, settings.max_samples_per_gpu)
    start = _find_start(args, cfg, processes)
    seed = _choose_seed(args, cfg, start, processes)
    log = RunLog(str(start.folder), processes.is_main, settings.tensorboard)
    _open_log(log, args, cfg, start, seed, plan, processes)
    _set_backends(settings)
    log.say('precision: %s' % describe_precision(settings.amp, processes.device))
    seed_everything(seed)
    dataset = _training_set(components, cfg, settings, task, seed, not args.no_preflight and processes.is_main)
    validation = None
    if evaluation.interval >= 0 and not args.no_eval and cfg.data.get('val') is not None:
        validation = open_dataset(components, cfg, 'val', task, {}, not args.no_preflight and processes.is_main)
    processes.wait_for_all()
    model = _model(components, cfg, task, start, log, args.trust_weights).to(processes.device)
    order = EpochOrder(len(dataset), plan.total, seed)
    epochs, iterations = _length(cfg, order.steps)
    log.say('%d training samples, %d optimizer steps per epoch, %d in all' % (len(dataset), order.steps, iterations))
    trainer = Trainer(TrainingJob(
        model=model, optimizer=build_optimizer(model, cfg.optimizer), dataset=dataset, collate=components.collate,
        plan=plan, order=order, schedule=Schedule.from_config(cfg.get('lr_config'), epochs, iterations, order.steps),
        max_iterations=iterations, settings=settings, seed=seed, max_norm=clip_norm(cfg.get('optimizer_config')),
        workers=cfg.data.get('workers_per_gpu', 0), processes=processes, folder=start.folder, log=log,
        meta=dict(seed=seed, total_batch_size=plan.total, num_samples=len(dataset), config=_config_text(cfg)),
        evaluate=_evaluation(components, cfg, task, validation, settings, evaluation, processes, log, start.folder),
        evaluation_interval=evaluation.interval))
    if start.checkpoint is not None:
        trainer.resume(start.checkpoint, str(start.path))
        log.say('continuing from %s at iteration %d' % (start.path, trainer.iteration))
    try:
        trainer.run()
    finally:
        log.close()


def _find_start(args, cfg, processes) -> _Start:
    """Checkpoint to continue from, and the run folder: found and made by the main process."""
    resume, path, folder = cfg.get('resume_from'), None, None
    if processes.is_main:
        path = find_checkpoint_to_resume(resume, args.work_dir, args.config) if resume else None
        in_place = path is not None and (resume == 'auto' or os.path.isdir(resume)) \
            and (not args.work_dir or Path(args.work_dir) == path.parent)
        folder = path.parent if in_place else create_run_folder(args.work_dir, args.config)
        if resume == 'auto' and path is None:
            print('--resume auto: no checkpoint to continue from; starting anew', flush=True)
    path, folder = processes.broadcast((path, folder))
    checkpoint = read_training_state(str(path), args.trust_weights) if path is not None else None
    return _Start(checkpoint, path, folder)


def _choose_seed(args, cfg, start, processes) -> int:
    """``--seed``; else the checkpoint's, so that the run goes on as it was; else the config's or a random one."""
    if start.checkpoint is not None and args.seed is None:
        return int(start.checkpoint['meta']['seed'])
    return processes.broadcast(pick_seed(cfg.get('seed')))


def _open_log(log, args, cfg, start, seed, plan, processes) -> None:
    """First lines, and the files that say what was run."""
    log.say('run folder %s' % start.folder)
    log.say('config %s, seed %d, %s' % (args.config, seed, plan.describe()))
    if not processes.is_main:
        return
    facts = describe_environment(processes.device, processes.world_size)
    dump_config(cfg, str(_unused(start.folder, 'config', '.py')))
    with open(str(_unused(start.folder, 'environment', '.txt')), 'w', encoding='utf-8') as f:
        f.write('\n'.join(facts + ['seed: %d' % seed]) + '\n')
    for fact in facts:
        if fact.split(':')[0] in ('device', 'git', 'torch'):
            log.say(fact)
    if start.checkpoint is not None:
        for line in config_differences(start.checkpoint['meta'].get('config', ''), _config_text(cfg)):
            log.say('config differs from the checkpoint\'s: %s' % line)


def _unused(folder: Path, stem: str, suffix: str) -> Path:
    """``stem.suffix``, or ``stem-1.suffix``, ... where a continued run has written one already."""
    n = 0
    while True:
        path = folder / ('%s%s%s' % (stem, '-%d' % n if n else '', suffix))
        if not path.exists():
            return path
        n += 1


def _set_backends(settings) -> None:
    set_tf32(settings.tf32)
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark


def _training_set(components, cfg, settings, task, seed, check_files):
    changes = dict(seed=seed, on_error=settings.on_data_error)
    if settings.on_data_error == 'skip':
        changes['max_skipped'] = settings.max_skipped
    return open_dataset(components, cfg, 'train', task, changes, check_files)


def _model(components, cfg, task, start, log, trust):
    model = components.build_model(cfg.model, task)
    if start.checkpoint is None and cfg.get('load_from'):
        report = load_pretrained(model, cfg.load_from, cfg.get('revise_keys') or (), trust)
        for line in report.lines():
            log.say(line)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.say('%.2f million parameters, %.2f million of them learn'
            % (sum(p.numel() for p in model.parameters()) / 1e6, learning / 1e6))
    return model


def _length(cfg, steps):
    """(epochs, optimizer steps) of the whole run."""
    epochs, iterations = cfg.runner.get('max_epochs'), cfg.runner.get('max_iters')
    for name, value in (('max_epochs', epochs), ('max_iters', iterations)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError('runner.%s must be an integer of at least 1, got %r' % (name, value))
    if epochs is None and iterations is None:
        raise ConfigError('runner needs max_epochs or max_iters')
    if epochs is None:
        return -(-iterations // steps), iterations
    return epochs, min(epochs * steps, iterations or epochs * steps)


def _config_text(cfg) -> str:
    """The config as it is stored in checkpoints: one line per value. Where it was run does not belong to it."""
    values = cfg._cfg_dict.to_dict()
    values.pop('resume_from', None)
    return '\n'.join(sorted(_flatten(values)))


def _flatten(value, name=''):
    if isinstance(value, dict) and value:
        for key in value:
            for line in _flatten(value[key], '%s.%s' % (name, key) if name else str(key)):
                yield line
    else:
        yield '%s = %r' % (name, value)


def _evaluation(components, cfg, task, dataset, settings, evaluation, processes, log, folder):
    """Function that evaluates a model and keeps the scores in the run folder; None without validation data."""
    if dataset is None:
        return None
    evaluator = components.build_evaluator(task, metrics=evaluation.metrics or default_metrics(task),
                                           device=processes.device)

    def evaluate_model(model, iteration):
        job = EvaluationJob(model, dataset, components.collate, evaluator, task, processes, log.say,
                            cfg.data.get('workers_per_gpu', 0), settings.amp)
        path = folder / ('evaluation_iter_%d.json' % iteration)
        if processes.broadcast(path.exists()):
            return _read_scores(path) if processes.is_main else None
        result = evaluate(job)
        if result is None:
            return None
        for line in result.as_table().splitlines():
            log.say(line)
        scores = result.as_dict()
        write_json(path, dict(scores, iteration=iteration))
        return _totals(scores)

    return evaluate_model


def _read_scores(path):
    with open(str(path), encoding='utf-8') as f:
        return _totals(json.load(f))


def _totals(scores) -> Dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}
