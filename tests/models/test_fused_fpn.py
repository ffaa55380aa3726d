"""The FPN with fewer passes against mmdet's."""

import pytest
import torch

from models.encoder.fused import (
    add_enlarged,
    can_fuse_neck,
    run_neck,
    run_neck_again,
)  # before mmdet: makes it importable

from mmdet.models.builder import build_neck  # isort: skip

CHANNELS = [4, 6, 8, 10]
VERSION = tuple(int(n) for n in torch.__version__.split('.')[:2])


def make_neck(**options):
    torch.manual_seed(0)
    neck = build_neck(dict(dict(type='FPN', in_channels=CHANNELS, out_channels=5, num_outs=4), **options))
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter)  # mmcv's biases start from zero
    return neck.double()


def make_stages(sizes, channels_last=True):
    torch.manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(2, c, h, w, dtype=torch.double).contiguous(memory_format=layout)
        for c, (h, w) in zip(CHANNELS, sizes)
    ]


@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize(
    'sizes',
    [[(16, 24), (8, 12), (4, 6), (2, 3)], [(9, 25), (5, 13), (3, 7), (2, 4)], [(8, 12), (4, 12), (4, 6), (1, 1)]],
    ids=str,
)
def test_levels_are_those_of_mmdet(sizes, channels_last):
    neck, stages = make_neck(), make_stages(sizes, channels_last)
    kept = [stage.clone() for stage in stages]
    with torch.no_grad():
        ours, theirs = run_neck(neck, stages), neck(stages)
    assert all(torch.equal(a, b) for a, b in zip(stages, kept))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # double; the bias is added earlier


@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize('sizes', [[(16, 24), (8, 12), (4, 6), (2, 3)], [(9, 25), (5, 13), (3, 7), (2, 4)]], ids=str)
def test_gradients_are_those_of_mmdet(sizes, channels_last):
    neck, results = make_neck(), []
    for compute in (lambda stages: run_neck(neck, stages), lambda stages: run_neck_again(neck, stages), neck):
        stages = [stage.requires_grad_() for stage in make_stages(sizes, channels_last)]
        neck.zero_grad()
        sum((level * level).sum() for level in compute(stages)).backward()
        results.append([stage.grad for stage in stages] + [parameter.grad for parameter in neck.parameters()])
    for ours, again, theirs in zip(*results):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)  # double; sums in another order


@pytest.mark.skipif(VERSION < (2, 1), reason='before PyTorch 2.1 all is computed again')
def test_the_largest_level_is_not_convolved_again(monkeypatch):
    neck, calls = make_neck(), []
    convolve = torch.nn.functional.conv2d

    def counted(x, weight, *options):
        result = convolve(x, weight, *options)
        calls.append((tuple(weight.shape[2:]), tuple(x.shape[2:])))
        return result

    monkeypatch.setattr(torch.nn.functional, 'conv2d', counted)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    levels = run_neck_again(neck, [stage.requires_grad_() for stage in make_stages(sizes)])
    assert calls.count(((3, 3), sizes[0])) == 1
    sum(level.sum() for level in levels).backward()
    assert calls.count(((3, 3), sizes[0])) == 1 and calls.count(((1, 1), sizes[0])) == 2


def test_stages_before_the_start_are_left_out():
    neck = make_neck(start_level=1, num_outs=3)
    stages = make_stages([(16, 24), (8, 12), (4, 6), (2, 3)])
    with torch.no_grad():
        ours, theirs = run_neck(neck, stages), neck(stages)
    assert can_fuse_neck(neck) and len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_enlarging_is_exact():
    level = torch.zeros(1, 2, 4, 6).contiguous(memory_format=torch.channels_last)
    coarse = torch.randn(1, 2, 2, 3)
    expected = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(add_enlarged(level, coarse), expected)


@pytest.mark.parametrize(
    'options',
    [
        dict(num_outs=5),
        dict(norm_cfg=dict(type='BN')),
        dict(act_cfg=dict(type='ReLU')),
        dict(upsample_cfg=dict(scale_factor=2, mode='nearest')),
    ],
    ids=str,
)
def test_other_necks_run_themselves(options):
    assert can_fuse_neck(make_neck()) and not can_fuse_neck(make_neck(**options))


def test_a_neck_with_hooks_runs_itself():
    neck = make_neck()
    handle = neck.lateral_convs[1].register_forward_hook(lambda *_: None)
    assert not can_fuse_neck(neck)
    handle.remove()
    assert can_fuse_neck(neck)
