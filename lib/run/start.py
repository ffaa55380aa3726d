"""The beginning of a training run: folder, checkpoint to continue from, seed, first lines of the log."""

import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from ..config import dump_config
from .folder import config_differences, create_run_folder, find_checkpoint_to_resume, read_training_state
from .log import RunLog, describe_environment
from .numerics import pick_seed
from .processes import Processes

_FACTS_TO_SAY = ('device', 'git', 'torch')


class Start(NamedTuple):
    """Where a run begins.

    checkpoint  content of the checkpoint to continue from, or None
    path        its file
    in_place    the run goes on in the folder of that file
    """

    checkpoint: Optional[Dict]
    path: Optional[Path]
    in_place: bool


def find_start(args, resume: Optional[str], processes: Processes) -> Start:
    """The checkpoint to continue from, if any; the main process looks for it.

    'auto' and a run folder are continued in place, a checkpoint file in a new folder.

    Args:
        args: arguments of ``train.py``.
        resume: 'auto', a folder, a file, or None.
    """
    path = None
    if processes.is_main and resume:
        path = find_checkpoint_to_resume(resume, args.work_dir, args.config)
        if path is None:
            print('--resume auto: no checkpoint to continue from; starting anew', flush=True)
    path = processes.broadcast(path)
    checkpoint = None if path is None else read_training_state(str(path), args.trust_weights)
    return Start(checkpoint, path, _continues_in_place(args, resume, path))


def _continues_in_place(args, resume, path) -> bool:
    if path is None or not (resume == 'auto' or os.path.isdir(resume)):
        return False
    return not args.work_dir or Path(args.work_dir) == path.parent


def make_folder(args, start: Start, processes: Processes) -> Path:
    """The run folder; the main process makes it, late, so that bad input leaves none behind."""
    folder = start.path.parent if start.in_place and start.path else None
    if folder is None and processes.is_main:
        folder = create_run_folder(args.work_dir, args.config)
    return processes.broadcast(folder)


def choose_seed(args, cfg, start: Start, processes: Processes) -> int:
    """``--seed``; else the checkpoint's, to go on as before; else the config's, or a random one."""
    if start.checkpoint is not None and args.seed is None:
        return int(start.checkpoint['meta']['seed'])
    return processes.broadcast(pick_seed(cfg.get('seed')))


def tell_start(log: RunLog, args, cfg, start: Start, seed: int) -> None:
    """First lines of the log."""
    log.say(f'config {args.config}, seed {seed}')
    if start.checkpoint is not None:
        log.say(f'continuing from {start.path}')
        for line in config_differences(start.checkpoint['meta'].get('config', ''), config_lines(cfg)):
            log.say(f"config differs from the checkpoint's: {line}")


def write_facts(folder: Path, cfg, seed: int, processes: Processes, log: RunLog) -> None:
    """Files of the run folder that say what was run and on what."""
    log.say(f'run folder {folder}')
    if not processes.is_main:
        return
    facts = describe_environment(processes.device, processes.world_size)
    dump_config(cfg, str(_unused(folder, 'config', '.py')))
    with open(str(_unused(folder, 'environment', '.txt')), 'w', encoding='utf-8') as f:
        f.write('\n'.join(facts + [f'seed: {seed}']) + '\n')
    for fact in facts:
        if fact.split(':')[0] in _FACTS_TO_SAY:
            log.say(fact)


def _unused(folder: Path, stem: str, suffix: str) -> Path:
    """``stem.suffix``, or ``stem-1.suffix``, ... where a continued run has written one already."""
    n, path = 0, folder / (stem + suffix)
    while path.exists():
        n += 1
        path = folder / f'{stem}-{n}{suffix}'
    return path


def config_lines(cfg) -> str:
    """The config as checkpoints hold it: one sorted line per value, without where it was resumed from."""
    values = cfg._cfg_dict.to_dict()
    values.pop('resume_from', None)
    return '\n'.join(sorted(_flatten(values, '')))


def _flatten(value, name) -> List[str]:
    if not isinstance(value, dict) or not value:
        return [f'{name} = {value!r}']
    prefix = name + '.' if name else ''
    return [line for key in value for line in _flatten(value[key], prefix + str(key))]
