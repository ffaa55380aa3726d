"""Replayed graphs give the same bits as the model run step by step."""

import contextlib

import numpy as np
import pytest
import torch
from small_model import small_model, small_task

from lib.run.loading import to_device
from models.cuda_graph import GraphedFunction
from tools.synthetic import synthetic_batch, synthetic_meta

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def test_tensors_on_the_cpu_call_the_function():
    double = GraphedFunction(lambda x: [2 * x])
    assert double(torch.ones(3))[0].tolist() == [2, 2, 2]


@needs_cuda
def test_a_replay_sees_new_inputs_and_new_weights():
    layer = torch.nn.Linear(4, 4).cuda()
    graphed = GraphedFunction(lambda x: [layer(x)])
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 4, device='cuda')
            assert torch.equal(graphed(x)[0], layer(x))
            layer.weight.mul_(0.5)


@needs_cuda
def test_tensors_in_place_are_read_where_they_are():
    graphed = GraphedFunction(lambda x, y, z: [x * y + z])
    x, y, z = [torch.randn(5, device='cuda') for _ in range(3)]
    for _ in range(3):
        y.mul_(2)
        assert torch.equal(graphed(x, in_place=(y, z))[0], x * y + z)
    assert len(graphed._graphs) == 1
    moved = y + 1
    assert torch.equal(graphed(x, in_place=(moved, z))[0], x * moved + z) and len(graphed._graphs) == 2


@needs_cuda
def test_plain_values_and_absent_tensors_are_part_of_the_key():
    def scale(factor, x, shift):
        return [factor * x if shift is None else factor * x + shift, None]

    graphed = GraphedFunction(scale)
    x = torch.randn(5, device='cuda')
    for factor in (2, 3, 2):
        for shift in (None, x + 1, None):
            result, nothing = graphed(x, shift, fixed=(factor,))
            assert torch.equal(result, scale(factor, x, shift)[0]) and nothing is None
    assert len(graphed._graphs) == 4


@pytest.mark.parametrize('panoptic, history', [(True, 'cached'), (True, 'full'), (False, 'cached')])
@pytest.mark.parametrize(
    'device, precision',
    [
        ('cpu', None),
        pytest.param('cuda', None, marks=needs_cuda),
        pytest.param('cuda', torch.float16, marks=needs_cuda),
    ],
)
def test_predictions_are_equal_with_and_without_graphs(device, precision, panoptic, history):
    """The same kernels in the same order: no tolerance. On the CPU the graphed functions are called as they are."""
    task = small_task(panoptic=panoptic)
    model = small_model(task).to(device).eval()
    model.history = history
    results = {}
    for graphed in (False, True):
        model.cuda_graph = graphed
        model.reset_history()
        results[graphed] = []
        for index in range(3):
            data = to_device(synthetic_batch(task, first_index=index), device)
            data['img_metas'] = [synthetic_meta(task, index)]
            with torch.autocast(device, dtype=precision) if precision else contextlib.nullcontext():
                results[graphed].append(model(return_loss=False, **data)[0])
    for plain, replayed in zip(results[False], results[True]):
        assert plain.keys() == replayed.keys()
        for name in plain:
            np.testing.assert_array_equal(plain[name], replayed[name])
