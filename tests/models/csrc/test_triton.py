"""Whether Triton is used: where it is not there or cannot compile, one warning says so, and PyTorch's operators run."""

import sys
import types

import pytest
import torch

from models import csrc

DEVICE = torch.device('cuda', 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU since Ampere, as far as the question goes, and a kernel that does what it should."""
    probe = types.ModuleType('models.csrc.triton_probe')
    probe.check_triton = lambda device: True
    monkeypatch.setitem(sys.modules, 'models.csrc.triton_probe', probe)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    monkeypatch.setattr(csrc, '_missing_for_triton', lambda: '')
    csrc._compiles_triton.cache_clear()
    yield probe
    csrc._compiles_triton.cache_clear()


def test_it_is_used_on_a_gpu_alone(gpu, monkeypatch):
    assert csrc.has_triton(DEVICE) and not csrc.has_triton(torch.device('cpu'))
    csrc._compiles_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (7, 5))
    assert not csrc.has_triton(DEVICE)


def test_what_is_missing_is_told_once(gpu, monkeypatch, recwarn):
    monkeypatch.setattr(csrc, '_missing_for_triton', lambda: 'there is no C compiler')
    assert not csrc.has_triton(DEVICE) and not csrc.has_triton(DEVICE)
    (warning,) = recwarn.list
    assert 'Triton cannot be used (there is no C compiler), so the GPU runs slower' in str(warning.message)


@pytest.mark.parametrize('result', [False, RuntimeError('Failed to find C compiler.\nPlease specify'), OSError()])
def test_a_kernel_that_fails_is_told(gpu, result):
    def check(device):
        if isinstance(result, Exception):
            raise result
        return result

    gpu.check_triton = check
    with pytest.warns(RuntimeWarning, match='Triton cannot be used') as caught:
        assert not csrc.has_triton(DEVICE)
    assert '\n' not in str(caught[0].message)


def test_what_it_needs_is_looked_for(monkeypatch):
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(csrc.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(csrc.shutil, 'which', lambda name: None)
    assert csrc._missing_for_triton() == 'there is no C compiler'
    monkeypatch.setattr(csrc.importlib.util, 'find_spec', lambda name: None)
    assert csrc._missing_for_triton() == 'it is not installed'
