"""Training that repeats to the bit, on a GPU."""

import pytest
import torch
from small_model import small_batch, small_model, small_task

from lib.run.loading import to_device
from lib.run.numerics import set_deterministic


@pytest.fixture
def deterministic(monkeypatch):
    """The mode, switched off again afterwards."""
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    names = [name for name in ('flash', 'mem_efficient', 'cudnn') if hasattr(torch.backends.cuda, f'enable_{name}_sdp')]
    before = {name: getattr(torch.backends.cuda, f'{name}_sdp_enabled')() for name in names}
    benchmark = torch.backends.cudnn.benchmark
    set_deterministic(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f'enable_{name}_sdp')(enabled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_training_repeats_to_the_bit(deterministic):
    """Every gradient of two steps of a small panoptic model, twice; nothing raises for want of an algorithm."""
    task = small_task(panoptic=True)
    batch = to_device(small_batch(task, 2), 'cuda')

    def train():
        torch.manual_seed(0)
        model = small_model(task).cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(sum(model(**batch).values()))
            losses[-1].backward()
            optimizer.step()
        return [loss.detach() for loss in losses] + [p.grad for p in model.parameters() if p.grad is not None]

    for first, second in zip(train(), train()):
        assert torch.equal(first, second)
