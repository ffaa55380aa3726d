"""Training that repeats to the bit."""

import pytest
import torch

from lib.errors import ConfigError
from lib.run.numerics import set_deterministic
from lib.settings import TrainSettings


@pytest.fixture(autouse=True)
def settings_as_before(monkeypatch):
    """PyTorch's switches and the environment, put back after each test."""
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    names = [name for name in ('flash', 'mem_efficient', 'cudnn') if hasattr(torch.backends.cuda, f'enable_{name}_sdp')]
    before = {name: getattr(torch.backends.cuda, f'{name}_sdp_enabled')() for name in names}
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f'enable_{name}_sdp')(enabled)
    monkeypatch.undo()


def test_only_repeatable_algorithms_are_taken():
    torch.backends.cudnn.benchmark = True
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    set_deterministic(True)  # its own setting of the environment is no obstacle


def test_a_cublas_workspace_that_does_not_repeat_is_refused(monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':128:2')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(ConfigError, match="':128:2'; unset it"):
        set_deterministic(True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_timing_algorithms_and_repeating_exclude_each_other():
    with pytest.raises(ConfigError, match='exclude each other'):
        TrainSettings(deterministic=True, cudnn_benchmark=True)


def test_training_with_it_runs_and_repeats(workshop):
    for work_dir in ('one', 'two'):
        assert workshop.train('train.deterministic=True', work_dir=work_dir) == 0
    assert workshop.curve('one') == workshop.curve('two') and workshop.curve('one')
    assert 'deterministic algorithms only' in workshop.log('one')
