"""Which way knowledge flows: lib knows neither models nor data sets; importing changes nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Names that belong to the detector and to the data set of this project.
FOREIGN = ('models', 'loaders', 'tools', 'pts_bbox_head', 'img_backbone', 'img_neck', 'SparseOcc', 'NuSceneOcc')


def words_of(path):
    """Identifiers, imported modules and words of strings (docstrings too) in a Python file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or '').split('.')
        elif isinstance(node, ast.Import):
            yield from (part for name in node.names for part in name.name.split('.'))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ' ' not in node.value:
            parts = node.value.replace('/', '.').split('.')
            yield from parts if parts[0] != 'mmdet' else ()  # which has models, too


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'lib').rglob('*.py')), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_lib_knows_no_name_of_the_detector(path):
    assert not set(FOREIGN) & set(words_of(path))


def test_configs_know_nothing_of_runs():
    for name in ('config', 'settings', 'registry', 'task', 'classes'):
        assert 'run' not in set(words_of(ROOT / 'lib' / f'{name}.py')), name


def imports_of(path):
    """Files of lib that a file of lib takes names from, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or '').split('.'))
            for name in ('', *(alias.name for alias in node.names)):
                yield from (place for place in (folder / f'{name}.py', folder.with_suffix('.py')) if place.is_file())


def test_no_file_of_lib_needs_itself():
    needs = {path: set(imports_of(path)) for path in (ROOT / 'lib').rglob('*.py')}
    while needs:
        free = [path for path, others in needs.items() if not others & set(needs)]
        assert free, sorted(path.relative_to(ROOT).as_posix() for path in needs)
        needs = {path: others for path, others in needs.items() if path not in free}


def test_importing_the_detector_and_the_data_sets_changes_no_limits_or_signals():
    code = (
        'import resource, signal, random, torch, numpy\n'
        'def state(): return (resource.getrlimit(resource.RLIMIT_NOFILE), torch.get_num_threads(),'
        ' torch.initial_seed(), torch.multiprocessing.get_sharing_strategy(), random.getstate(),'
        ' str(numpy.random.get_state()),'
        ' [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],'
        ' torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)\n'
        'before = state()\n'
        'import models, loaders, lib.run.training, lib.metrics\n'
        'assert state() == before'
    )
    subprocess.run([sys.executable, '-c', code], cwd=str(ROOT), check=True)


def test_the_range_of_occ3d_stands_in_one_place():
    places = [
        path.relative_to(ROOT).as_posix()
        for folder in ('lib', 'loaders', 'models', 'configs')
        for path in sorted((ROOT / folder).rglob('*.py'))
        if re.search(r'-40(\.0)?, -40(\.0)?, -1', path.read_text())
    ]
    assert places == ['lib/task.py']
