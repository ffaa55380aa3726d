"""Parts that fit together are built and run; those that do not are told in one sentence, with what to set."""

import json
import os
from pathlib import Path

import pytest
import torch

from lib.config import load_config
from lib.errors import ConfigError
from lib.run.processes import Processes
from lib.task import Task
from models import build_model
from tools import benchmark
from tools.benchmark import load_changed, read_changes
from tools.synthetic import synthetic_batch

pytestmark = pytest.mark.usefixtures('one_thread')

OLD = int(torch.__version__.split('.')[0]) < 2
NO_SYNC_BN = 'SyncBN of PyTorch 1 works on GPUs alone'
needs_sync_bn = pytest.mark.skipif(OLD, reason=NO_SYNC_BN)
CONFIG = os.path.join(os.path.dirname(__file__), '..', '..', 'configs', 'toy', 'semantic.py')
SMALL = [
    'task.num_frames=2',
    'task.cameras=["CAM_FRONT"]',
    'task.image_size=[64, 96]',
    'task.voxel_size=0.8',
    'task.point_cloud_range=[-16, -16, -1, 16, 16, 5.4]',
    'model.pts_bbox_head.transformer.topk_training=[50, 100, 200]',
    'model.pts_bbox_head.transformer.topk_testing=[50, 100, 200]',
]
BACKBONE, NECK, HEAD = 'model.img_backbone', 'model.img_neck', 'model.pts_bbox_head'
SWIN = {'type': 'SwinTransformer', 'embed_dims': 24, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}


def build(*changes):
    cfg = load_config(CONFIG, [*SMALL, *changes])
    task = Task.from_config(cfg.task)
    return build_model(cfg.model, task), task


@pytest.mark.parametrize(
    'changes',
    [
        (f'{BACKBONE}.depth=34',),
        (f'{BACKBONE}.depth=101', f'{NECK}.in_channels=[256, 512, 1024, 2048]'),
        (f'{BACKBONE}={SWIN}', f'{NECK}.in_channels=[24, 48, 96, 192]'),
        (f'{BACKBONE}.norm_cfg={{"type": "GN", "num_groups": 8}}',),
        pytest.param((f'{BACKBONE}.norm_cfg.type=SyncBN',), marks=needs_sync_bn, id='SyncBN'),
        (f'{BACKBONE}.out_indices=[1, 2, 3]', f'{NECK}.in_channels=[128, 256, 512]', f'{NECK}.num_outs=4'),
        (
            f'{BACKBONE}.out_indices=[0, 1, 2]',
            f'{NECK}.in_channels=[64, 128, 256]',
            f'{NECK}.num_outs=3',
            f'{HEAD}.transformer.num_levels=3',
        ),
    ],
    ids=lambda changes: changes[0].split('.', 1)[-1][:30],
)
def test_it_learns_and_predicts(changes):
    model, task = build(*changes)
    losses = model(**synthetic_batch(task, batch_size=1, with_labels=True), return_loss=True)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.img_backbone.parameters())
    (prediction,) = model.eval()(**synthetic_batch(task), return_loss=False)
    assert prediction['sem_pred'].shape[1] == 200


def test_images_of_full_size():
    model, task = build('task.image_size=[900, 1600]', 'task.num_frames=1')
    (prediction,) = model.eval()(**synthetic_batch(task), return_loss=False)
    assert prediction['sem_pred'].shape[1] == 200


@pytest.mark.parametrize(
    'changes, words',
    [
        ((f'{BACKBONE}.depth=101',), ['depth 101', 'model.img_neck.in_channels=[256, 512, 1024, 2048]']),
        ((f'{BACKBONE}={SWIN}',), ['SwinTransformer', 'in_channels=[24, 48, 96, 192]']),
        ((f'{BACKBONE}.out_indices=[1, 2, 3]',), ['3 maps', 'in_channels=[128, 256, 512]']),
        ((f'{NECK}.num_outs=5',), ['num_levels is 4', 'num_levels=5']),
        ((f'{HEAD}.transformer.num_levels=3',), ['gives 4 maps', 'num_outs=3']),
        ((f'{NECK}.num_outs=3',), ['model.img_neck', 'num_outs']),
        ((f'{HEAD}.embed_dims=128',), ['out_channels=128']),
        ((f'{HEAD}.transformer.num_groups=7',), ['num_groups 7']),
        ((f'{HEAD}.transformer.num_heads=7',), ['num_heads 7']),
        ((f'{HEAD}.transformer.num_points=0',), ['num_points', '0']),
        ((f'{BACKBONE}.depth=20',), ['model.img_backbone', 'invalid depth 20']),
        ((f'{BACKBONE}.norm_cfg.type=SyncBNN',), ['model.img_backbone.norm_cfg', "did you mean 'SyncBN'"]),
        ((f'{BACKBONE}.norm_cfg.requires_gard=True',), ["did you mean 'requires_grad'"]),
        ((f'{BACKBONE}.norm_cfg.type=GN',), ['model.img_backbone', 'num_groups']),
        ((f'{BACKBONE}.init_cfg={{"type": "Pretrained", "checkpoint": "no.pth"}}',), ['init_cfg.checkpoint', 'no.pth']),
    ],
)
def test_what_does_not_fit_is_told(changes, words):
    with pytest.raises(ConfigError) as error:
        build(*changes)
    assert all(word in str(error.value) for word in words), str(error.value)


ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / 'configs' / 'r50_nuimg_704x256_8f_v1.1.py'
PAGE = ROOT / 'docs' / 'common_changes.md'
CHANGES = read_changes(PAGE)


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.name)
def test_common_changes_of_the_docs(change):
    """The lines as they stand there, on the config that they are for, with a small volume and small images."""
    lines = ' '.join(change.lines)
    if 'SyncBN' in lines and OLD:
        pytest.skip(NO_SYNC_BN)
    kept = ('task.cameras', 'task.num_frames', 'task.voxel_size', 'task.point_cloud_range')
    reduced = [text for text in SMALL if not (text.startswith(kept) and text.split('=')[0].split('.')[1] in lines)]
    if 'img_backbone' not in lines and 'img_neck' not in lines:
        reduced += [f'{BACKBONE}.base_channels=16', f'{NECK}.in_channels=[64, 128, 256, 512]']
    cfg = load_changed(BASE, change, reduced)
    task = Task.from_config(cfg.task)
    losses = build_model(cfg.model, task)(**synthetic_batch(task, batch_size=1, with_labels=True), return_loss=True)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())


def test_convnext_of_the_docs(tmp_path):
    pytest.importorskip('mmcls')
    blocks = PAGE.read_text(encoding='utf-8').split('```python\n')
    (text,) = [block.split('```')[0] for block in blocks if 'mmcls.ConvNeXt' in block.split('```')[0]]
    (tmp_path / 'c.py').write_text(text.replace("'./r50_nuimg_704x256_8f_v1.1.py'", repr(str(BASE))))
    cfg = load_config(str(tmp_path / 'c.py'), SMALL)
    task = Task.from_config(cfg.task)
    losses = build_model(cfg.model, task)(**synthetic_batch(task, batch_size=1, with_labels=True), return_loss=True)
    assert all(torch.isfinite(value) for value in losses.values())


def test_the_table_of_the_docs_is_read():
    names = [change.name for change in CHANGES]
    assert len(names) == len(set(names)) >= 14
    assert 'ResNet-101' in names and all(line.partition(' = ')[0].isidentifier() for c in CHANGES for line in c.lines)


FAILURES = dict(
    wide=('CUDA out of memory. Tried to allocate 20.00 GiB', 'needs more memory than the GPU has'),
    wider=('upsample only supports fewer elements\n  trace', 'failed: upsample only supports fewer elements'),
)


def test_changes_are_timed_and_what_fails_is_said(tmp_path, monkeypatch, capsys):
    """Four configs in one go; the second and third fail, and the last is timed none the less."""
    page, figures = tmp_path / 'page.md', tmp_path / 'figures.json'
    lines = [f'| {name} | `model = dict(img_neck=dict(num_outs=4))` |\n' for name in FAILURES]
    page.write_text(''.join(lines) + '| one frame | `task = dict(num_frames=1)` |\n')
    arguments = ['--config', CONFIG, '--changes', str(page), '--what', 'training', '--device', 'cpu', '--json']
    args = benchmark.parse_args([*arguments, str(figures), '--steps', '1', '--warmup', '0', '--override', *SMALL])
    train, to_fail = benchmark.Bench.training, [None, *FAILURES.values(), None]

    def train_or_fail(bench):
        failure = to_fail.pop(0)
        if failure:
            raise RuntimeError(failure[0])
        train(bench)

    monkeypatch.setattr(benchmark.Bench, 'training', train_or_fail)
    benchmark.run(args, Processes())
    result = json.loads(figures.read_text())
    assert [(row.get('change'), row['median_ms'] > 0) for row in result['rows']] == [(None, True), ('one frame', True)]
    printed = capsys.readouterr().out
    assert [ended['change'] for ended in result['ended']] == list(FAILURES) and f'wrote {figures}' in printed
    for ended, (_, told) in zip(result['ended'], FAILURES.values()):
        assert ended['ended'].startswith(told) and f'{ended["change"]}: the next step {told}' in printed
