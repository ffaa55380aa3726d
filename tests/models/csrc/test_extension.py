"""Finding and building the compiled operators, on a machine with or without a GPU."""

import contextlib
import importlib.util
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from models.csrc import extension

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def fresh_caches():
    caches = (extension._load, extension._load_for_device)
    for cache in caches:
        cache.cache_clear()
    extension._said.clear()
    yield
    for cache in caches:
        cache.cache_clear()
    extension._said.clear()


@pytest.fixture
def fake_module(monkeypatch):
    """Stands in for the compiled module, which may say anything of itself."""
    module = types.ModuleType('models.csrc._msmv_sampling')
    module.interface_version = extension.INTERFACE_VERSIONS['_msmv_sampling']
    module.runs_on_current_device = lambda: True
    monkeypatch.setattr(extension.importlib, 'import_module', lambda name: module)
    monkeypatch.setattr(torch.cuda, 'device', lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    return module


def find():
    return extension.find_kernels('_msmv_sampling', torch.device('cuda', 0))


def test_cpu_tensors_never_ask_for_kernels(monkeypatch):
    monkeypatch.setattr(extension, '_load', lambda name: pytest.fail('looked for an extension'))
    assert extension.find_kernels('_msmv_sampling', torch.device('cpu')) is None


def test_usable_kernels_are_found(fake_module):
    assert find() is fake_module


def test_a_missing_extension_is_said_once(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extension.importlib, 'import_module', missing)
    with pytest.warns(RuntimeWarning, match='is not built, so the GPU runs the slower.*setup.py build_ext'):
        assert find() is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find() is None
        assert extension.find_kernels('_adaptive_mixing', torch.device('cuda', 0)) is None  # one for all operators


def test_an_extension_that_does_not_load_is_named(monkeypatch):
    def broken(name):
        raise ImportError('undefined symbol: _ZN3c10\nmore')

    monkeypatch.setattr(extension.importlib, 'import_module', broken)
    with pytest.warns(RuntimeWarning, match=r'cannot be loaded \(undefined symbol: _ZN3c10\)'):
        assert find() is None


def test_an_old_build_is_not_used(fake_module):
    fake_module.interface_version = 0
    with pytest.warns(RuntimeWarning, match='was built from other sources'):
        assert find() is None


def test_a_build_for_another_gpu_is_not_used(fake_module):
    fake_module.runs_on_current_device = lambda: False
    with pytest.warns(RuntimeWarning, match=r'built for other GPUs than this one \(compute capability 9.0\)'):
        assert find() is None


def test_interface_versions_are_those_of_the_headers():
    for name, version in extension.INTERFACE_VERSIONS.items():
        header = (ROOT / 'models' / 'csrc' / name[1:] / (name[1:] + '.h')).read_text()
        assert 'kInterfaceVersion = %d;' % version in header


def load_setup():
    spec = importlib.util.spec_from_file_location('operators_setup', ROOT / 'models' / 'csrc' / 'setup.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_is_listed_for_building():
    operators = load_setup()
    listed = {name for sources in operators.OPERATORS.values() for name in sources} | set(operators.HEADERS)
    folder = ROOT / 'models' / 'csrc'
    present = {
        path.relative_to(folder).as_posix() for suffix in ('.h', '.cpp', '.cu') for path in folder.rglob('*' + suffix)
    }
    assert listed == present
    assert set(operators.OPERATORS) == set(extension.INTERFACE_VERSIONS)


def test_without_nvcc_nothing_is_built_and_one_sentence_says_so(monkeypatch, capsys):
    operators = load_setup()
    monkeypatch.setattr(operators, 'find_cuda_home', lambda: None)
    assert operators.cuda_extensions() == []
    assert capsys.readouterr().err.strip() == (
        'CUDA operators are not built. No CUDA toolkit found: install nvcc, or set CUDA_HOME to the folder '
        'that holds bin/nvcc.'
    )


def test_toolkit_named_by_the_environment_is_used(monkeypatch, tmp_path):
    for name in ('bin/nvcc', 'include/cuda_runtime_api.h'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    assert load_setup().find_cuda_home() == tmp_path


def test_importing_the_setup_module_imports_no_torch():
    code = 'import runpy, sys; runpy.run_path({!r}); assert "torch" not in sys.modules'.format(
        str(ROOT / 'models' / 'csrc' / 'setup.py')
    )
    subprocess.run([sys.executable, '-c', code], check=True)
