"""Batch norms that learn their statistics, with residual and ReLU in Triton, against PyTorch's operators."""

import copy

import pytest
import torch
from small_model import small_config, small_task
from triton_runs import DEVICE, run_interpreted, runs, without_a_gpu

import models.encoder.fused as fused
from models import build_model

# of results and gradients of size 1; sums are float32, the result is rounded once
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@without_a_gpu
def test_by_interpretation_on_the_cpu():
    run_interpreted(__file__)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


@runs
@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('adds, rectifies', [(False, True), (True, True), (False, False), (True, False)])
def test_norm_residual_and_relu(adds, rectifies, dtype):
    """Results, every gradient, and running statistics after two steps; values far from zero lose no precision."""
    from models.encoder.batch_norm import norm_relu

    torch.manual_seed(0)
    channels = 80
    norm = torch.nn.BatchNorm2d(channels, momentum=0.3).to(DEVICE)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    exact = copy.deepcopy(norm).double()
    tolerance = TOLERANCES[dtype]
    for _ in range(2):
        x, added, grad = [random(3, channels, 20, 11, dtype=dtype) for _ in range(3)]
        x = x * 0.5 + 8 * (dtype == torch.float32)
        found = []
        for layer, kind in ((norm, dtype), (exact, torch.float64)):
            layer.zero_grad()
            given = [value.to(kind, copy=True).requires_grad_() for value in (x, added)[: 1 + adds]]
            if layer is norm:
                y = norm_relu(layer, given[0], given[1] if adds else None, rectifies)
            else:
                y = layer(given[0]) + given[1] if adds else layer(given[0])
                y = y.relu() if rectifies else y
            y.backward(grad.to(kind))
            of_pixels = [layer.weight.grad, layer.bias.grad]  # sums over 660 pixels
            found.append([y, *(value.grad for value in given), *(value / 660**0.5 for value in of_pixels)])
        for ours, theirs in zip(*found):
            ours, theirs = ours.detach().double(), theirs.detach()
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance
        assert found[0][0].dtype == dtype and found[0][0].is_contiguous(memory_format=torch.channels_last)
    for name in ('running_mean', 'running_var'):
        torch.testing.assert_close(getattr(norm, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize('place', [(0, 0, 0), (1, 3, 2)])
def test_one_pixel_far_off(place):
    """A hundred deviations, wherever it lies; sums around it would lose 1e-4 of float32."""
    from models.encoder.batch_norm import norm_relu

    torch.manual_seed(2)
    x, norm = random(8, 20, 44, 32), torch.nn.BatchNorm2d(20, momentum=1.0).to(DEVICE)
    image, row, column = place
    x[image, :, row, column] = 100
    norm_relu(norm, x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=0)


@runs
def test_what_is_not_a_number_stays_so():
    from models.encoder.batch_norm import norm_relu

    x, norm = random(2, 4, 5, 6), torch.nn.BatchNorm2d(4).to(DEVICE)
    x[0, 1, 2, 3] = float('nan')
    is_nan = torch.isnan(norm_relu(norm, x)).all(3).all(2).all(0)
    assert is_nan.tolist() == [False, True, False, False] and torch.isnan(norm.running_var).tolist() == is_nan.tolist()


def compare(ours, theirs, tolerance=2e-3):
    """Dicts of tensors; norms over few pixels make the most of what is rounded otherwise."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        size = float(expected.detach().double().norm())
        off = float((ours[name].detach().double() - expected.detach().double()).norm())
        assert off <= tolerance * size + 1e-6, (name, off, size)


def exact_convolutions():
    """Not in TF32, whose rounding depends on the algorithm."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def grads_of(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def vary_norms(module):
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)


@runs
def test_backbone_that_learns_its_norms(monkeypatch):
    """As mmdet's: stages, running statistics and counts, and gradients of all weights, but for a value near 0 that one
    ReLU lets through and the other does not, which the twelve pixels of a norm make count."""
    squares_of = fused.squares_of
    if DEVICE.type == 'cpu':
        monkeypatch.setattr(fused, 'has_triton', lambda device: True)
        monkeypatch.setattr(fused, 'squares_of', lambda images: squares_of(images.clone().requires_grad_()).detach())
    config = small_config()
    config['img_backbone'].update(norm_eval=False)
    torch.manual_seed(0)
    backbone = build_model(config, small_task()).to(DEVICE).train().img_backbone
    vary_norms(backbone)
    twin, images, results = copy.deepcopy(backbone), random(2, 3, 64, 96), []
    learner = fused.FusedResNet(backbone)
    assert learner.serves_learning(images) and not learner.serves(images)
    for module, run in ((backbone, learner.learn), (twin, twin)):
        with exact_convolutions():
            stages = run(images)
            sum((stage**2).mean() for stage in stages).backward()
        results.append([dict(enumerate(stages)), dict(module.named_buffers()), grads_of(module)])
    for ours, theirs, tolerance in zip(*results, (2e-3, 2e-3, 3e-2)):
        compare(ours, theirs, tolerance)
    backbone.layer1[0].with_cp = True
    assert not learner.serves_learning(images)
    backbone.layer1[0].with_cp = False
    backbone.layer1[0].norm1.eval()
    assert not learner.serves_learning(images)


@runs
@pytest.mark.parametrize('projects', [True, False])
def test_bottleneck_that_learns_its_norms(projects):
    torch.manual_seed(1)
    project = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 1, stride=2, bias=False), torch.nn.BatchNorm2d(32))
    sizes = dict(stride=2, downsample=project) if projects else {}
    block = fused.Bottleneck(16 if projects else 32, 8, norm_cfg=dict(type='BN'), **sizes).to(DEVICE).train()
    vary_norms(block)
    twin, results = copy.deepcopy(block), []
    x, grad = random(2, 16 if projects else 32, 12, 20), random(2, 32, *((6, 10) if projects else (12, 20)))
    for module, run in ((block, fused._run_learning_block), (twin, lambda module, x: module(x))):
        given = x.clone().requires_grad_()
        with exact_convolutions():
            y = run(module, given)
            y.backward(grad)
        results.append(dict(grads_of(module), y=y, x=given.grad))
    compare(*results)
