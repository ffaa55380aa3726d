"""From the arguments of ``val.py`` to a table of scores."""

import os
import time
from typing import Callable, Dict, Optional

from ..checkpoint import load_model_weights
from ..config import load_config
from ..errors import UserError
from ..io import write_json
from ..prediction import write_record
from ..settings import EvaluationSettings
from . import Components, default_metrics, open_dataset, read_task
from .evaluation import EvaluationJob, evaluate, make_predictions_folder
from .log import RunLog, duration
from .numerics import check_precision, convert_weights, describe_precision, set_tf32
from .processes import Processes, start_processes


def run_validation(args, components: Callable[[], Components]) -> int:
    """Evaluate as the arguments of ``val.py`` say; returns the exit status.

    Raises:
        UserError: bad input.
    """
    cfg = load_config(args.config, args.override)
    with start_processes(args.device) as processes:
        _validate(args, cfg, components(), processes)
    return 0


def _validate(args, cfg, components, processes: Processes) -> None:
    log = RunLog(is_main=processes.is_main)
    check_precision(args.amp, processes.device)
    set_tf32(args.tf32)
    out = args.out or os.path.splitext(os.path.realpath(args.weights))[0] + '.eval.json'
    _check_writable(out)
    task = read_task(cfg)
    model = components.build_model(cfg.model, task)
    meta = load_model_weights(model, args.weights, trust=args.trust_weights)
    folder = make_predictions_folder(args.save_predictions) if args.save_predictions else None
    if folder is not None and processes.is_main:
        write_record(folder, task, args.config, args.weights, args.split, args.override)
    changes = {} if args.max_samples is None else dict(max_samples=args.max_samples)
    dataset = open_dataset(
        components, cfg, args.split, task, dict(changes, test_mode=True), processes.is_main and not args.no_preflight
    )
    settings = EvaluationSettings.from_config(cfg.get('evaluation'))
    metrics = args.metrics or settings.metrics or default_metrics(task)
    evaluator = components.build_evaluator(task, metrics=metrics, device=processes.device)
    log.say(
        '%s, iteration %s, on %d samples of data.%s, %d processes; %s'
        % (
            args.weights,
            meta.get('iteration', meta.get('iter', '?')),
            len(dataset),
            args.split,
            processes.world_size,
            describe_precision(args.amp, processes.device),
        )
    )
    workers = cfg.data.get('workers_per_gpu', 0) if args.workers is None else args.workers
    begin = time.monotonic()
    model = convert_weights(model.to(processes.device), args.amp)
    result = evaluate(
        EvaluationJob(
            model, dataset, components.collate, evaluator, task, processes, log.say, workers, args.amp, folder
        )
    )
    if result is not None:
        _report(result, out, args, meta, time.monotonic() - begin, folder)


def _report(result, out, args, meta: Dict, seconds: float, folder: Optional[str]) -> None:
    print(result.as_table())
    about = dict(
        config=args.config,
        override=list(args.override),
        weights=args.weights,
        split=args.split,
        amp=args.amp,
        tf32=args.tf32,
        iteration=meta.get('iteration'),
        seconds=round(seconds, 1),
    )
    write_json(out, dict(result.as_dict(), run=about))
    print(
        'evaluated in {}; figures in {}{}'.format(
            duration(seconds), out, f'; predictions in {folder}' if folder else ''
        ),
        flush=True,
    )


def _check_writable(path: str) -> None:
    """Raise UserError now rather than after the evaluation."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f'cannot write the figures to {path}; give a file in an existing, writable folder with --out')
