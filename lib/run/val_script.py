"""From the arguments of ``val.py`` to a table of scores."""

import os
import time
from pathlib import Path
from typing import Callable, Dict, Optional

from ..config import load_config
from ..errors import UserError
from ..io import write_json
from ..prediction import write_record
from ..settings import EvaluationSettings
from . import Components, open_dataset, read_task
from .evaluation import Evaluation, load_for_inference, make_predictions_folder
from .log import RunLog, duration
from .numerics import describe_precision, seed_everything
from .processes import Processes, start_processes


def run_validation(args, components: Callable[[], Components]) -> int:
    """Evaluate as the arguments of ``val.py`` say; returns the exit status.

    Raises:
        UserError: bad input.
    """
    cfg = load_config(args.config, args.override)
    if args.seed is not None:
        seed_everything(args.seed)
    with start_processes(args.device) as processes:
        _validate(args, cfg, components(), processes)
    return 0


def _validate(args, cfg, components, processes: Processes) -> None:
    log = RunLog(is_main=processes.is_main)
    out = args.out or os.path.splitext(os.path.realpath(args.weights))[0] + '.eval.json'
    _check_writable(out)
    task = read_task(cfg)
    model, meta = load_for_inference(components.build_model, cfg, task, args, processes.device)
    folder = make_predictions_folder(args.save_predictions) if args.save_predictions else None
    if folder is not None and processes.is_main:
        limit = [] if args.max_samples is None else [f'data.{args.split}.max_samples={args.max_samples}']
        write_record(folder, task, args.config, args.weights, args.split, [*args.override, *limit])
    changes = dict(test_mode=True)
    if args.max_samples is not None:
        changes['max_samples'] = args.max_samples
    checks_files = processes.is_main and not args.no_preflight
    dataset = open_dataset(components, cfg, args.split, task, changes, checks_files)
    metrics = args.metrics or EvaluationSettings.from_config(cfg.get('evaluation')).metrics
    workers = cfg.data.get('workers_per_gpu', 0) if args.workers is None else args.workers
    evaluation = Evaluation(components, task, dataset, processes, log.say, metrics, workers, args.amp, folder)
    iteration = meta.get('iteration', meta.get('iter', '?'))
    log.say(
        f'{args.weights}, iteration {iteration}, on {len(dataset)} samples of data.{args.split}, '
        f'{processes.world_size} processes; {describe_precision(args.amp, processes.device)}'
    )
    begin = time.monotonic()
    result = evaluation.run(model)
    if result is not None:
        _report(result, out, args, meta, time.monotonic() - begin, folder)


def _report(result, out, args, meta: Dict, seconds: float, folder: Optional[Path]) -> None:
    print(result.as_table())
    about = {name: getattr(args, name) for name in ('config', 'override', 'weights', 'split', 'seed', 'amp', 'tf32')}
    about.update(iteration=meta.get('iteration'), seconds=round(seconds, 1))
    write_json(out, dict(result.as_dict(details=True), run=about))
    saved = f'; predictions in {folder}' if folder else ''
    print(f'evaluated in {duration(seconds)}; figures in {out}{saved}', flush=True)


def _check_writable(path: str) -> None:
    """Raise UserError now rather than after the evaluation."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f'cannot write the figures to {path}; give a file in an existing, writable folder with --out')
