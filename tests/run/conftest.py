"""Runs of the fake model: in this process, or as the scripts that torchrun starts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import fakes  # noqa: E402

import train as train_script  # noqa: E402
import val as val_script  # noqa: E402
from lib.checkpoint import read_checkpoint  # noqa: E402
from lib.run.evaluation import run_validation  # noqa: E402
from lib.run.train_script import run_training  # noqa: E402


class Workshop:
    """A folder with a config, where runs take place."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / 'fake.py'
        self.config.write_text(fakes.CONFIG)

    def arguments(self, *overrides: str, work_dir: str = 'run', more=()) -> List[str]:
        listed = ['--override', *overrides] if overrides else []
        return ['--config', str(self.config), '--work-dir', str(self.folder / work_dir), *listed, *more]

    def train(self, *overrides: str, work_dir: str = 'run', more=()) -> int:
        """Train in this process; the exit status."""
        return run_training(
            train_script.parse_args(self.arguments(*overrides, work_dir=work_dir, more=more)), fakes.components
        )

    def validate(self, arguments) -> int:
        """Evaluate in this process; the exit status."""
        return run_validation(val_script.parse_args(arguments), fakes.components)

    def start(self, *runs, processes: int = 0, node=None, environment=None, **options) -> subprocess.Popen:
        """Begin runs, each a list ``[script, *arguments]``, one after the other in processes of their own.

        node: (rank, nodes, port) where several torchruns make one run.
        environment: variables to set.
        """
        where = ['--standalone']
        if node is not None:
            rank, count, port = map(str, node)
            where = ['--nnodes', count, '--node_rank', rank, '--master_addr', '127.0.0.1', '--master_port', port]
        launcher = ['-m', 'torch.distributed.run', *where, '--nproc_per_node', str(processes)]
        text = ' + '.join(' '.join(map(shlex.quote, run)) for run in runs)
        return subprocess.Popen(
            [sys.executable, *(launcher if processes else []), str(HERE / 'fakes.py'), text],
            text=True,
            cwd=str(self.folder),
            env=dict(os.environ, OMP_NUM_THREADS='1', **(environment or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )

    def launch(self, *runs, processes: int = 0):
        """As ``start``, to the end: (exit status, what was printed)."""
        process = self.start(*runs, processes=processes, start_new_session=True)
        try:
            text = process.communicate(timeout=120)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, text

    def wait_for_iterations(self, count: int, work_dir: str = 'run') -> None:
        """Return once a started run has logged that many."""
        path, deadline = self.folder / work_dir / 'metrics.jsonl', time.monotonic() + 120
        while not (path.exists() and path.read_text().count('\n') >= count):
            assert time.monotonic() < deadline, 'the run does not get on'
            time.sleep(0.01)

    def records(self, work_dir: str = 'run', kind: str = 'train') -> Dict[int, Dict]:
        """What a run logged, by iteration; the last record of an iteration counts."""
        lines = (self.folder / work_dir / 'metrics.jsonl').read_text().splitlines()
        return {r['iteration']: r for r in map(json.loads, lines) if r['kind'] == kind}

    def curve(self, work_dir: str = 'run') -> List[float]:
        """Losses of all iterations, in order; fails if one is missing."""
        records = self.records(work_dir)
        assert sorted(records) == list(range(1, len(records) + 1))
        return [records[i]['loss'] for i in sorted(records)]

    def load(self, name: str, work_dir: str = 'run') -> Dict:
        """A checkpoint of a run."""
        return read_checkpoint(str(self.folder / work_dir / name))

    def log(self, work_dir: str = 'run') -> str:
        return (self.folder / work_dir / 'log.txt').read_text()

    def files(self, pattern: str = '*.pth', work_dir: str = 'run') -> List[str]:
        return sorted(p.name for p in (self.folder / work_dir).glob(pattern))


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Runs on the CPU, on a machine with a GPU too: what they print and the order in which they add up are tested."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # for the processes that it starts
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path)
