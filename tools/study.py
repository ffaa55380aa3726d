"""Train and score many variants of a config side by side on all GPUs, and put them into one table.

    python tools/study.py --study configs/toybench/study.json --out outputs/study
    python tools/study.py --study S --out O --only base frames16 --per-gpu 4 --iters 2400 --time-limit 1200
    python tools/study.py --study S --out O --table          # only write the table again

A study is a JSON file: ``config``, ``base`` (the variant that others are compared with; default: the first) and
``variants``, each with a ``name`` and as far as wanted ``about``, ``config``, ``override`` (of training and scoring),
``val_override`` (of scoring alone), ``seeds`` (default [0]), ``weights_of`` (score the weights of another variant
instead of training) and ``val_seeds`` (score so often, with these seeds of val.py).

Runs are taken in the order of the file, --per-gpu at a time on every GPU. Everything goes to --out: for each run
NAME/ (its run folder, with scores.json), NAME.txt (all that train.py and val.py said) and NAME.json (how it stands),
and study.md and study.json, written anew after every run. Started again, it skips what is finished and continues what
is not. After --time-limit seconds trainings are stopped (they save), and what there is gets --score-limit seconds to be
scored; --finished-only leaves those that were cut off unscored. SIGTERM and Ctrl-C stop trainings and leave. A run that
fails is reported, and the others go on.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lib.cli import real_number, run_main, whole_number  # noqa: E402
from lib.config import load_config  # noqa: E402
from lib.errors import reason  # noqa: E402
from lib.io import make_folder  # noqa: E402
from lib.raycast import count_cores  # noqa: E402
from lib.run.log import describe_commit, device_name  # noqa: E402
from tools.studies import Run, Variant, make_runs, read_study  # noqa: E402
from tools.studies.table import write_table  # noqa: E402

_GRACE = 90  # seconds that a process gets to save and leave
_POLL, _REPORT = 0.2, 30  # seconds between two looks at a process, and between two reports


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--study', required=True, help='JSON file of the variants')
    add('--out', required=True, type=Path, help='folder for everything')
    add('--only', nargs='+', metavar='NAME', help='these variants of it')
    add(
        '--seeds',
        nargs='+',
        type=whole_number(0),
        help='instead of those of the study, for every variant that is trained',
    )
    add('--iters', type=whole_number(1), help='optimizer steps of every run (default: those of its config)')
    add('--data', help='data root (default: those of the configs)')
    add('--override', nargs='+', default=[], metavar='KEY=VALUE', help='for all runs, after those of the study')
    add('--per-gpu', type=whole_number(1), default=1, help='runs side by side on a GPU (default: %(default)s)')
    add('--workers', type=whole_number(0), help='data-loading processes of a run (default: cores / runs side by side)')
    add('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    add('--time-limit', type=real_number(least=0), help='seconds after which trainings are stopped')
    add(
        '--score-limit',
        type=real_number(least=0),
        default=180,
        help='seconds for scoring after that (default: %(default)s)',
    )
    add('--finished-only', action='store_true', help='do not score runs that were cut off')
    add('--note', default='', help='what else the table should say, e.g. the commit where there is no git')
    add('--table', action='store_true', help='only write the table of what is there')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


class Slots:
    """Works through runs, so many at a time on every GPU.

    Args:
        runs: in the order they are wanted; those of another's weights wait for it.
        args: of the script.
        gpus: their number; 0: the CPU, as one.
    """

    def __init__(self, runs: Sequence[Run], args, gpus: int):
        self.args, self.runs, self.gpus = args, runs, gpus
        self.count = max(1, min(args.per_gpu * max(gpus, 1), sum(run.parent is None for run in runs)))
        self.workers = max(1, count_cores() // self.count) if args.workers is None else args.workers
        self.begin = time.monotonic()
        self._interrupted = threading.Event()
        self._changed = threading.Condition()
        self._active = 0
        self._waiting = [run for run in runs if run.parent is None]

    def work(self, report) -> None:
        """All runs, or as many as there is time for; ``report()`` is called after every run."""
        threads = [threading.Thread(target=self._work_slot, args=(i, report)) for i in range(self.count)]
        with self._signals():
            for thread in threads:
                thread.start()
            said = time.monotonic()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL)
                    if time.monotonic() - said > _REPORT:
                        said = time.monotonic()
                        self._tell()

    @property
    def interrupted(self) -> bool:
        return self._interrupted.is_set()

    def _tell(self) -> None:
        states = [run.state.get('status', 'waiting') for run in self.runs]
        counts = ', '.join(f'{states.count(name)} {name}' for name in sorted(set(states)))
        print(f'{time.monotonic() - self.begin:.0f} s: {counts}', flush=True)
        for run in self.runs:
            if run.state.get('status') in ('training', 'scoring'):
                print(f'  {run.name}: {last_line(run.log)[:150]}', flush=True)

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and SIGINT stop the work in an orderly way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        stop = lambda *_: self._interrupted.set()  # noqa: E731
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _work_slot(self, slot: int, report) -> None:
        gpu = None if self.gpus == 0 else slot % self.gpus
        for run in iter(self._next, None):
            self._work_run(run, gpu)
            with self._changed:
                self._active -= 1
                self._waiting += [child for child in self.runs if child.parent is run]
                self._changed.notify_all()
                report()

    def _next(self) -> Optional[Run]:
        """The next run; waits for one while others may still bring some. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._active)
            if not self._waiting:
                return None
            self._active += 1
            return self._waiting.pop(0)

    def _work_run(self, run: Run, gpu: Optional[int]) -> None:
        try:
            if run.parent is None and not run.is_trained():
                self._train(run, gpu)
            self._score(run, gpu)
        except Exception as error:  # whatever it is, it must not take the other runs along
            run.note(status='failed', error=reason(error))
        if run.state.get('error'):
            print(f'FAILED {run.name}: {run.state["error"]}; see {run.log}', flush=True)

    def _train_time_is_over(self) -> bool:
        limit = self.args.time_limit
        return self.interrupted or (limit is not None and time.monotonic() - self.begin > limit)

    def _score_time_is_over(self) -> bool:
        limit = self.args.time_limit
        over = limit is not None and time.monotonic() - self.begin > limit + self.args.score_limit
        return self.interrupted or over

    def _place(self) -> List[str]:
        """Overrides that say where the data is and how it is loaded."""
        data = self.args.data
        roots = [f'data.{split}.data_root={data}' for split in ('train', 'val', 'test')] if data else []
        return [*roots, f'data.workers_per_gpu={self.workers}']

    def _command(self, run: Run, script: str, arguments: Sequence, override: Sequence[str]) -> List[str]:
        device = ['--device', self.args.device] if self.args.device else []
        command = [sys.executable, script, '--config', run.variant.config, *map(str, arguments), *device]
        return [*command, '--override', *run.variant.override, *override, *self.args.override, *self._place()]

    def _train(self, run: Run, gpu: Optional[int]) -> None:
        if self._train_time_is_over():
            return
        if run.folder.exists() and run.weights is None:
            shutil.rmtree(run.folder)  # left by a training that ended before its first checkpoint
        arguments = ['--work-dir', run.folder, '--seed', run.seed, '--no-eval', '--resume', 'auto']
        arguments += ['--max-iters', self.args.iters] if self.args.iters else []
        begin, before = time.monotonic(), run.state.get('seconds', 0.0)
        command = self._command(run, 'train.py', arguments, [])
        status = self._call(run, 'training', command, gpu, self._train_time_is_over)
        run.note(seconds=before + time.monotonic() - begin)
        if status == 0:
            run.note(status='trained', trained=True)
        elif self._train_time_is_over():
            run.note(status='stopped')
        else:
            run.note(status='failed', error=f'train.py ended with status {status}: {last_line(run.log)}')

    def _score(self, run: Run, gpu: Optional[int]) -> None:
        if run.weights is None or run.is_scored() or run.trainer.state.get('error'):
            return
        if self._score_time_is_over() or (self.args.finished_only and not run.is_trained()):
            return
        run.folder.mkdir(exist_ok=True)
        seed = [] if run.val_seed is None else ['--seed', run.val_seed]
        arguments = ['--weights', run.weights, '--out', run.scores, *seed]
        command = self._command(run, 'val.py', arguments, run.variant.val_override)
        before = run.state.get('status')
        status = self._call(run, 'scoring', command, gpu, self._score_time_is_over)
        if status == 0:
            run.note(status='scored' if run.is_trained() else 'stopped')
        elif self._score_time_is_over():
            run.note(status=before or 'waiting')
        else:
            run.note(status='failed', error=f'val.py ended with status {status}: {last_line(run.log)}')

    def _call(self, run: Run, status: str, command: Sequence[str], gpu: Optional[int], is_over) -> int:
        """Exit status of a command whose output goes to the run's log; it is asked to stop when time is over."""
        environment = dict(os.environ)
        environment.setdefault('OMP_NUM_THREADS', str(self.workers))
        environment.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # the cores are shared
        if gpu is not None:
            visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
            environment['CUDA_VISIBLE_DEVICES'] = visible[gpu] if visible[0] else str(gpu)
        run.note(status=status, error=None, commands={**run.state.get('commands', {}), status: shlex.join(command)})
        with open(str(run.log), 'a', encoding='utf-8') as log:
            log.write(f'$ {shlex.join(command)}\n')
            log.flush()
            process = subprocess.Popen(
                list(command),
                cwd=str(ROOT),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a second signal, from a terminal or a time limit, would end it unsaved
            )
            return _wait(process, is_over)


def _wait(process, is_over) -> int:
    """Exit status; SIGTERM once ``is_over()``, and an end by force if that does not help."""
    told = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL)
        if told is None and is_over():
            told = time.monotonic()
            process.terminate()
        elif told is not None and time.monotonic() - told > _GRACE:
            process.kill()


def last_line(path: Path) -> str:
    """Last line of a log that says something."""
    with open(str(path), 'rb') as f:
        f.seek(max(0, path.stat().st_size - 4096))
        lines = f.read().decode('utf-8', 'replace').splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


def set_steps(runs: Sequence[Run], args) -> None:
    """Note how many steps each training is to take; a config that cannot be read is told before anything runs."""
    steps: Dict[Variant, Optional[int]] = {}
    for run in runs:
        variant = run.variant
        if variant not in steps:
            cfg = load_config(variant.config, [*variant.override, *args.override])
            steps[variant] = args.iters or (cfg.get('runner') or {}).get('max_iters')
        run.state.setdefault('of', steps[variant])


def count_gpus(device: Optional[str]) -> int:
    """GPUs to work on; 0 for the CPU."""
    return 0 if device == 'cpu' else torch.cuda.device_count()


def describe_machine(gpus: int) -> str:
    """Processor, or number and name of the GPUs."""
    return f'{gpus} x {torch.cuda.get_device_name(0)}' if gpus else device_name(torch.device('cpu'))


def main():
    args = parse_args()
    args.out, args.study = args.out.resolve(), os.path.abspath(args.study)
    os.chdir(str(ROOT))
    variants, base = read_study(args.study)
    make_folder(args.out)
    runs = make_runs(variants, args)
    gpus = count_gpus(args.device)
    about = dict(
        study=args.study,
        base=base,
        command=shlex.join(sys.argv),
        commit=describe_commit(),
        machine=describe_machine(gpus),
        note=args.note,
    )
    if args.table:
        print(write_table(runs, about, args.out))
        return
    set_steps(runs, args)
    slots = Slots(runs, args, gpus)
    beside = f'{slots.count} side by side on {about["machine"]}'
    print(f'{len(runs)} runs, {beside}, {slots.workers} workers each, in {args.out}', flush=True)
    slots.work(lambda: write_table(runs, about, args.out))
    print(write_table(runs, about, args.out))
    if slots.interrupted:
        sys.exit(128 + signal.SIGTERM)
    if any(run.state.get('error') for run in runs):
        sys.exit(1)


if __name__ == '__main__':
    run_main(main)
