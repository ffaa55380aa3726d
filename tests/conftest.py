"""Fixtures shared by all tests: where golden files and real samples are, and a tiny toy data set."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope='module')
def one_thread():
    """For a module of small tensors, where more threads cost more than they bring, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def golden_dir():
    """Folder of golden files: $SPARSEOCC_GOLDEN_DIR, or tests/data/golden."""
    return Path(os.environ.get('SPARSEOCC_GOLDEN_DIR', ROOT / 'tests' / 'data' / 'golden'))


@pytest.fixture(scope='session')
def real_dir():
    """Folder of real nuScenes samples, kept outside the project: $SPARSEOCC_REAL_DIR, or ../shared/real."""
    path = Path(os.environ.get('SPARSEOCC_REAL_DIR', ROOT.parent / 'shared' / 'real'))
    if not path.is_dir():
        pytest.skip(f'real samples not found at {path} (set SPARSEOCC_REAL_DIR)')
    return path


@pytest.fixture(scope='session')
def toy_root(tmp_path_factory):
    """Data root of a tiny toy nuScenes: 3 scenes x 3 keyframes with sweeps at 160x90, fully prepared. Not written to.

    The processes of pytest-xdist share one, which the first that asks for it makes.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder) / 'toy'
    folder.mkdir(exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'is_made').exists():
            _make_toy(folder / 'nuscenes')
            (folder / 'is_made').touch()
    return folder / 'nuscenes'


def _make_toy(root):
    world = ('--out', root, '--scenes', 3, '--keyframes', 3, '--image-size', '160x90', '--seed', 7)
    prepared = ('--data-root', root, '--version', 'v1.0-mini')
    for command in (
        ('tools/make_toy_nuscenes.py', *world),
        ('gen_sweep_info.py', *prepared),
        ('gen_instance_info.py', *prepared),
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=str(ROOT), check=True)
