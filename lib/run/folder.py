"""The run folder: never deleted, never overwritten; its checkpoints, what they hold, which to continue from.

Random numbers need no state: they are a function of seed and iteration (``lib.run.numerics``).
"""

import errno
import fcntl
import os
import re
import shlex
import shutil
import socket
import time
from pathlib import Path
from typing import IO, Dict, List, Mapping, NamedTuple, Optional, Sequence

from torch import Tensor, nn

from ..checkpoint import fit_weights, is_complete, read_checkpoint, save_checkpoint, state_dict_of
from ..config import dump_config
from ..errors import CheckpointError, UserError
from ..io import atomic_write
from .log import RunLog, describe_environment, versions
from .optimizer import WeightAverage
from .processes import Processes

OUTPUTS = 'outputs'
LATEST = 'latest.pth'
BEST = 'best.pth'
ELSEWHERE = 'runs_elsewhere.txt'  # in the experiment folder: run folders chosen with --work-dir
LOCK = '.lock'  # held, and filled with who holds it, by the process that writes to a run folder
_FACTS_TO_SAY = ('device', 'git', 'torch')
_NAME = re.compile(r'^(?:epoch_\d+_)?iter_(\d+)\.pth$')
_LEFTOVER = re.compile(r'^\..*\.tmp\.pth$')


def create_run_folder(path: Optional[str], config_path: str) -> Path:
    """Make a new folder: ``path``, or ``outputs/<config>/<date_time>``; with ``-1``, ... if it exists.

    Raises:
        UserError: it cannot be made.
    """
    wanted = Path(path) if path else experiment_folder(config_path) / time.strftime('%Y%m%d_%H%M%S')
    for n in range(10000):
        folder = wanted if n == 0 else wanted.with_name(f'{wanted.name}-{n}')
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if n == 0 and folder.is_dir() and not any(folder.iterdir()):
                return folder
        except OSError as error:
            raise UserError(
                f'cannot make the run folder {folder}: {error.strerror}; choose another --work-dir'
            ) from error
    raise UserError(f'10000 run folders named {wanted} exist; choose another --work-dir')


def claim_folder(folder: Path) -> Optional[IO]:
    """Keep other runs from writing to a run folder, until the file returned is closed or this process ends.

    The lock belongs to this process alone (POSIX): data-loading workers that outlive it do not hold it.

    Returns:
        The locked file; None where the file system knows no locks.

    Raises:
        UserError: a run is writing there.
    """
    path = folder / LOCK
    try:
        file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115  (open as long as the run lasts)
    except OSError:  # checkpoints and log will say what is wrong
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        holder = path.read_text(encoding='utf-8').strip() or 'another process'
        raise UserError(
            f'run folder {folder} is being written by {holder}; end that run first, or choose another --work-dir'
        ) from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file


def experiment_folder(config_path: str) -> Path:
    """Where all runs of a config lie."""
    return Path(OUTPUTS) / Path(config_path).stem


def note_folder(folder: Path, config_path: str) -> None:
    """Write down where a run of the config lies, if not with the others, so that ``--resume auto`` finds it."""
    runs = experiment_folder(config_path)
    if folder.resolve().parent == runs.resolve():
        return
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / ELSEWHERE, 'a', encoding='utf-8') as f:
            f.write(f'{folder.resolve()}\n')
    except OSError as error:
        print(f'warning: cannot note the run folder in {runs / ELSEWHERE} ({error.strerror})', flush=True)


class Resumable(NamedTuple):
    """What ``--resume`` means.

    path    checkpoint to continue from, or None
    looked  folders that were looked at for it
    """

    path: Optional[Path]
    looked: List[str]


def find_checkpoint_to_resume(resume: str, work_dir: Optional[str], config_path: str) -> Resumable:
    """Checkpoint that ``--resume`` means.

    Args:
        resume: 'auto' (newest whole checkpoint of ``work_dir`` and the folders numbered after it, or else of the
            config's newest run that has one, wherever it lies), a folder, or a file.
        work_dir: ``--work-dir``.
        config_path: of the run to start.

    Raises:
        CheckpointError: a named file or folder does not exist or holds no whole checkpoint.
    """
    if resume != 'auto':
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f'checkpoint {resume} (--resume) does not exist; give a .pth file, a folder or auto')
        found = newest_checkpoint(path) if path.is_dir() else path
        if found is None:
            raise CheckpointError(f'run folder {resume} (--resume) holds no whole checkpoint')
        return Resumable(found, [resume])
    places = _run_folders_of(Path(work_dir)) if work_dir else _runs_of(config_path)
    for folder in sorted(places, key=lambda p: p.stat().st_mtime, reverse=True):
        found = newest_checkpoint(folder)
        if found is not None:
            return Resumable(found, [str(folder)])
    nowhere = [work_dir] if work_dir else [str(experiment_folder(config_path))]
    return Resumable(None, sorted(map(str, places)) or nowhere)


def _run_folders_of(work_dir: Path) -> List[Path]:
    """The folder and those that later runs with the same --work-dir got."""
    numbered = re.compile(re.escape(work_dir.name) + r'(-\d+)?$')
    parent = work_dir.parent
    return [p for p in parent.iterdir() if p.is_dir() and numbered.match(p.name)] if parent.is_dir() else []


def _runs_of(config_path: str) -> List[Path]:
    """Run folders of a config: in its experiment folder, and those noted there."""
    runs = experiment_folder(config_path)
    folders = [p for p in runs.iterdir() if p.is_dir()] if runs.is_dir() else []
    if (runs / ELSEWHERE).is_file():
        noted = [Path(line) for line in (runs / ELSEWHERE).read_text(encoding='utf-8').splitlines() if line]
        folders += [p for p in noted if p.is_dir() and p not in folders]
    return folders


def resume_command(argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """What to type to continue the run in ``folder``.

    Args:
        argv: of the run: script and arguments.
        folder: of the run.
        environment: variables that torchrun sets, or ``variables_of_slurm``, if either started the run.
    """
    kept, skip = [], False
    for word in argv[1:]:
        name, equals, _ = word.partition('=')
        if name in ('--resume', '--work-dir'):
            skip = not equals
        elif skip:
            skip = False
        else:
            kept.append(word)
    local, world = environment.get('LOCAL_WORLD_SIZE'), environment.get('WORLD_SIZE')
    launcher = ['srun', '--ntasks', world, 'python'] if world and not local else ['python']
    if local and world:
        nodes = int(world) // int(local)
        launcher = ['torchrun', *(['--nnodes', str(nodes)] if nodes > 1 else []), '--nproc_per_node', local]
    return ' '.join(map(shlex.quote, [*launcher, argv[0], *kept, '--resume', str(folder)]))


def checkpoints(folder: Path) -> List[Path]:
    """Checkpoints of a run folder by iteration, newest first; whole or not."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.match(path.name), path) for path in folder.iterdir()]
    found = [(int(match.group(1)), path) for match, path in matches if match]
    return [path for _, path in sorted(found, reverse=True)]


def checkpoint_iteration(path: Path) -> int:
    """Iteration in a checkpoint's name; -1 for another file."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else -1


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """Newest checkpoint whose check sums agree; damaged ones are passed over with a warning."""
    found = checkpoints(folder)
    while found:
        path = found.pop(0)
        if is_complete(path):
            return path
        if path.exists():
            print(f'warning: {path} is not whole (cut short while written?) and is passed over', flush=True)
        else:  # removed by a run that goes on, which has written a newer one before
            found = checkpoints(folder)
    return None


class CheckpointKeeper:
    """Writes a run's checkpoints, points ``latest.pth`` at the newest and removes old ones.

    Args:
        folder: run folder.
        keep: newest checkpoints kept; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, checkpoint, iteration: int, epoch: Optional[int] = None) -> Path:
        """Write ``epoch_E_iter_N.pth`` (``iter_N.pth`` inside an epoch); older ones go only once it is on the disk.

        Raises:
            UserError: it cannot be written; all earlier ones are still there.
        """
        path = self.folder / ((f'epoch_{epoch}_' if epoch is not None else '') + f'iter_{iteration}.pth')
        save_checkpoint(path, checkpoint)
        self._point_latest_at(path)
        self._remove_old(path)
        return path

    def holds(self, iteration: int) -> bool:
        """Whether there is a checkpoint of that iteration."""
        return any(checkpoint_iteration(path) == iteration for path in checkpoints(self.folder))

    def mark_best(self, iteration: int) -> None:
        """Keep the checkpoint of an iteration as ``best.pth``, whatever becomes of its own file.

        Raises:
            UserError: it cannot be written.
        """
        path = next((p for p in checkpoints(self.folder) if checkpoint_iteration(p) == iteration), None)
        if path is None:
            raise UserError(f'{self.folder} holds no checkpoint of iteration {iteration} to keep as {BEST}')
        with atomic_write(self.folder / BEST) as temporary:
            try:
                os.link(path, temporary)  # the same bytes under a second name
            except OSError:
                shutil.copyfile(path, temporary)

    def remove_leftovers(self) -> None:
        """Delete temporary files of a process that was killed while it wrote a checkpoint."""
        for path in self.folder.iterdir():
            if _LEFTOVER.match(path.name):
                path.unlink()

    def _point_latest_at(self, path):
        """For people and for val.py; resuming does not rely on it. Not every file system has links."""
        temporary = self.folder / '.latest.tmp'
        try:
            if temporary.is_symlink() or temporary.exists():
                temporary.unlink()
            os.symlink(path.name, temporary)
            os.replace(temporary, self.folder / LATEST)
        except OSError as error:
            print(f'warning: cannot point {self.folder / LATEST} at {path.name} ({error.strerror})', flush=True)

    def _remove_old(self, newest):
        if not self.keep:
            return
        older = [path for path in checkpoints(self.folder) if path != newest]
        for path in older[self.keep - 1 :]:
            path.unlink()


# -- what a checkpoint holds besides the weights


# A run that continues in the middle must deal the same samples as before.
_MUST_AGREE = ('seed', 'total_batch_size', 'num_samples')


def capture(
    model: nn.Module, optimizer, scaler, meta: Mapping, progress: Mapping, average: Optional[WeightAverage]
) -> Dict:
    """Content of a checkpoint. Where weights are averaged, the average is its ``state_dict``, so that whoever wants
    the weights gets it; those that training goes on with are its ``ema.learning``.

    Args:
        model: not wrapped in DDP.
        optimizer, scaler: their states are taken.
        meta: facts of the run (seed, total_batch_size, num_samples, config text, ...); plain values.
        progress: ``iteration`` (optimizer steps done) and whatever else the loop wants back; plain values.
        average: of the model's weights, if there is one.
    """
    weights, more = _on_cpu(model.state_dict()), {}
    if average is not None:
        more = dict(ema=dict(learning=weights, updates=average.updates))
        weights, meta = _on_cpu(average.state_dict()), dict(meta, ema_decay=average.decay)
    return dict(
        more,
        meta=dict(meta, versions=versions(), time=time.strftime('%Y-%m-%d %H:%M:%S')),
        state_dict=weights,
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        progress=dict(progress),
    )


def _on_cpu(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in state.items()}


def read_training_state(path: str, trust: bool) -> Dict:
    """A checkpoint written with ``capture``.

    Raises:
        CheckpointError: it cannot be read, or holds weights only.
    """
    checkpoint = read_checkpoint(path, trust)
    if not all(isinstance(checkpoint.get(key), Mapping) for key in ('progress', 'optimizer', 'meta')):
        raise CheckpointError(
            f'checkpoint {path} holds weights only and no training state; start from its '
            f'weights with --load-from {path}'
        )
    if not {'learning', 'updates'} <= set(checkpoint.get('ema', ('learning', 'updates'))):
        raise CheckpointError(f'checkpoint {path}: its ema lacks learning or updates; resume from another one')
    return checkpoint


def _with_own_switches(state: Mapping, optimizer) -> Dict:
    """An optimizer's state that is computed with as this one does: the run that goes on may be on another device."""
    groups = [
        dict(saved, **{key: own[key] for key in ('fused', 'foreach', 'capturable') if key in own})
        for saved, own in zip(state['param_groups'], optimizer.param_groups)
    ]
    return dict(state, param_groups=groups + list(state['param_groups'][len(groups) :]))


def restore(
    checkpoint: Mapping, path: str, model: nn.Module, optimizer, scaler, meta: Mapping, average: Optional[WeightAverage]
) -> Dict:
    """Put a checkpoint's state back and return its ``progress``.

    Args:
        checkpoint: from ``read_training_state``.
        path: where it was read, for messages.
        meta: facts of the run that continues.
        average: of the model's weights; from a checkpoint without one it begins at the weights there.

    Raises:
        CheckpointError: it does not fit the model or optimizer, or its run dealt other samples.
    """
    _check_agreement(path, checkpoint['meta'], meta)
    fit_weights(model, state_dict_of(checkpoint, path), path)
    ema = checkpoint.get('ema')
    if average is not None:
        average.begin(ema['updates'] if ema else 0)
    if ema:
        fit_weights(model, ema['learning'], path)
    rates = [group['base_lr'] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(_with_own_switches(checkpoint['optimizer'], optimizer))
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f'checkpoint {path} has another optimizer state than the config builds ({error}); '
            'continue with the config it was trained with'
        ) from error
    for group, rate in zip(optimizer.param_groups, rates):  # the config's rate counts, should it have changed
        group['base_lr'] = rate
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    return dict(checkpoint['progress'])


def _check_agreement(path, theirs, ours):
    for key in _MUST_AGREE:
        if theirs.get(key) != ours[key]:
            raise CheckpointError(
                f'checkpoint {path} was trained with {key} = {theirs.get(key)!r}, this run has {ours[key]!r}; continue '
                'with the same data, total_batch_size and seed, or start a new run from its weights with --load-from'
            )


def config_differences(theirs: str, ours: str) -> List[str]:
    """Lines that differ between two dumped configs, ``-`` then and ``+`` now."""
    then, now = theirs.splitlines(), ours.splitlines()
    return ['- ' + line for line in then if line and line not in now] + [
        '+ ' + line for line in now if line and line not in then
    ]


def write_facts(folder: Path, cfg, seed: int, processes: Processes, log: RunLog) -> None:
    """Files of the run folder that say what was run and on what."""
    log.say(f'run folder {folder}')
    if not processes.is_main:
        return
    facts = describe_environment(processes.device, processes.world_size)
    dump_config(cfg, str(_unused(folder, 'config', '.py')))
    with open(_unused(folder, 'environment', '.txt'), 'w', encoding='utf-8') as f:
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
