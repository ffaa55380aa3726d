"""lib.extension: finding compiled modules and the toolkit that builds them, with or without a GPU."""

import contextlib
import importlib.util
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from lib import extension
from lib.errors import UserError
from lib.extension import Extension

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device('cuda', 0)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(extension, '_said', set())


def make(name='some._kernels'):
    return Extension(name, 2, 'cd somewhere && make', 'the slower version runs')


def loads(monkeypatch, result):
    """Let an import give ``result``, or raise it."""

    def import_module(name):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(extension.importlib, 'import_module', import_module)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device', lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))


@pytest.fixture
def module(monkeypatch):
    """Stands in for the compiled module, which may say anything of itself."""
    fake = types.ModuleType('some._kernels')
    fake.interface_version = 2
    fake.runs_on_current_device = lambda: True
    loads(monkeypatch, fake)
    return fake


def test_nothing_is_loaded_for_the_cpu(monkeypatch):
    loads(monkeypatch, AssertionError('looked for an extension'))
    assert make().find('cpu') is None


def test_a_usable_module_is_found_and_loaded_once(monkeypatch, module):
    kernels = make()
    assert kernels.find(GPU) is module
    loads(monkeypatch, AssertionError('loaded again'))
    assert kernels.find('cuda:0') is module


def test_a_missing_module_is_said_once_for_all_that_one_command_builds(monkeypatch):
    loads(monkeypatch, ModuleNotFoundError('none'))
    with pytest.warns(RuntimeWarning, match='some._kernels is not built, so the slower version runs; .*: cd somewhere'):
        assert make().find(GPU) is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert make().find(GPU) is None
        assert make('some._others').find(GPU) is None


def test_a_module_that_does_not_load_is_named(monkeypatch):
    loads(monkeypatch, ImportError('undefined symbol: _ZN3c10\nmore'))
    with pytest.warns(RuntimeWarning, match=r'cannot be loaded \(undefined symbol: _ZN3c10\), so'):
        assert make().find(GPU) is None


def test_without_a_gpu_a_module_is_not_used(monkeypatch, module):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.warns(RuntimeWarning, match='PyTorch sees no GPU.*the slower version runs'):
        assert make().find(GPU) is None


def test_an_old_build_is_not_used(module):
    module.interface_version = 1
    with pytest.warns(RuntimeWarning, match='was built from other sources'):
        assert make().find(GPU) is None


def test_a_build_for_another_gpu_is_not_used_there(module):
    module.runs_on_current_device = lambda: False
    with pytest.warns(RuntimeWarning, match=r'built for other GPUs than this one \(compute capability 9.0\)'):
        assert make().find(GPU) is None


def load_setup(folder):
    spec = importlib.util.spec_from_file_location('setup_under_test', ROOT / folder / 'setup.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('folder', ['models/csrc', 'lib/raycast'])
def test_without_nvcc_one_sentence_says_what_is_missing(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(extension, 'find_cuda_home', lambda: None)
    with pytest.raises(SystemExit, match='^No CUDA toolkit found: install nvcc, or set CUDA_HOME to the folder that'):
        extension.build_in_place('nothing', tmp_path, load_setup(folder).cuda_extensions)


def test_toolkit_named_by_the_environment_is_used(monkeypatch, tmp_path):
    for name in ('bin/nvcc', 'include/cuda_runtime_api.h'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    assert extension.find_cuda_home() == tmp_path


@pytest.mark.parametrize('folder', ['models/csrc', 'lib/raycast'])
def test_a_setup_runs_from_its_own_folder_and_imports_no_torch_before_it_builds(folder):
    code = 'import runpy, sys; runpy.run_path("setup.py"); assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=str(ROOT / folder), check=True)


@pytest.mark.parametrize(
    'error, sentence',
    [
        (ImportError('Numba needs NumPy 2.3 or less'), 'Numba is installed but cannot be used .Numba needs NumPy'),
        (ModuleNotFoundError("No module named 'numba'", name='numba'), "the Python package 'numba' is not installed"),
    ],
)
def test_loops_without_numba_are_a_sentence(monkeypatch, error, sentence):
    loads(monkeypatch, error)
    with pytest.raises(UserError, match=sentence):
        extension.jit(len)
