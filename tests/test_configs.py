"""Every shipped config: built as it is, then run forward and backward once at a reduced size."""

import glob
import os

import pytest
import torch

from lib.config import load_config
from lib.task import Task
from models import build_model
from tools.synthetic import synthetic_batch

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = sorted(
    os.path.relpath(path, ROOT)
    for path in glob.glob(os.path.join(ROOT, 'configs', '**', '*.py'), recursive=True)
    if '_base_' not in path
)
REDUCED = [
    'task.num_frames=2',
    'task.image_size=[64, 96]',
    'task.voxel_size=0.8',
    'task.point_cloud_range=[-32, -32, -1, 32, 32, 5.4]',
    'model.img_backbone.depth=18',
    'model.img_backbone.base_channels=16',
    'model.img_neck.in_channels=[16, 32, 64, 128]',
    'model.img_backbone.with_cp=False',
    'model.pts_bbox_head.transformer.topk_training=[50, 100, 300]',
    'model.pts_bbox_head.transformer.topk_testing=[40, 80, 200]',
    'model.pts_bbox_head.transformer.num_queries=12',
]

NAMES = {
    'r50_nuimg_704x256_8f.py': ('1.0', False, 48, 2e-4),
    'sparseocc_r50_nuimg_704x256_8f.py': ('1.0', False, 48, 2e-4),
    'r50_nuimg_704x256_8f_pano.py': ('1.0', True, 48, 2e-4),
    'r50_nuimg_704x256_8f_v1.1.py': ('1.1', False, 24, 5e-4),
    'r50_nuimg_704x256_8f_v1.1_60e.py': ('1.1', False, 60, 5e-4),
    'r50_nuimg_704x256_8f_v1.1_pano.py': ('1.1', True, 24, 5e-4),
}


@pytest.mark.parametrize('path', CONFIGS)
def test_forward_and_backward_at_reduced_size(path):
    """All losses are finite, every trainable parameter that they reach gets a finite gradient, and it predicts."""
    cfg = load_config(os.path.join(ROOT, path), REDUCED)
    task = Task.from_config(cfg.task)
    torch.manual_seed(0)
    model = build_model(cfg.model, task).train()
    batch = synthetic_batch(task, batch_size=1, with_labels=True)
    losses = model(**batch, return_loss=True)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value).all() for value in losses.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)
    for part in ('img_backbone', 'img_neck', 'pts_bbox_head'):
        assert any(g is not None and g.abs().max() > 0 for n, g in gradients.items() if n.startswith(part))
    (prediction,) = model.eval()(**synthetic_batch(task), return_loss=False)
    assert prediction['sem_pred'].max() <= task.label_set.free_id
    assert prediction['occ_loc'].shape == (1, prediction['sem_pred'].shape[1], 3)
    assert ('pano_inst' in prediction) == task.panoptic


@pytest.mark.parametrize('name', sorted(NAMES))
def test_recipes_of_the_releases(name):
    release, panoptic, epochs, lr = NAMES[name]
    cfg = load_config(os.path.join(ROOT, 'configs', name))
    task = Task.from_config(cfg.task)
    transformer = cfg.model.pts_bbox_head.transformer
    assert (cfg.published.release, task.panoptic, cfg.runner.max_epochs, cfg.optimizer.lr) == (
        release,
        panoptic,
        epochs,
        lr,
    )
    assert (task.grid_shape, task.image_size, task.num_frames, cfg.total_batch_size) == (
        (200, 200, 16),
        (256, 704),
        8,
        8,
    )
    assert transformer.topk_testing == [2000, 8000, 32000]
    assert transformer.topk_training == ([2000, 8000, 32000] if release == '1.0' else [4000, 16000, 64000])
    assert (transformer.scoring, transformer.num_layers) == (('occupancy', 4) if release == '1.0' else ('semantic', 2))
    assert cfg.lr_config.policy == ('CosineAnnealing' if release == '1.0' else 'step')
    pipeline = [step['type'] for step in cfg.data.train.pipeline]
    assert ('BEVAug' in pipeline) == (release == '1.1')
    assert cfg.data.train.pipeline[2]['rand_flip'] == (release == '1.1')
    assert cfg.data.val.occ_gt_root == ('occ3d_panoptic' if panoptic else 'occ3d')
    assert ('ray_pq' in cfg.published) == panoptic


@pytest.mark.parametrize('plain', ['r50_nuimg_704x256_8f_v1.1.py', 'toybench/v1.1.py'])
def test_plus_differs_in_training_alone(plain):
    """The same model with the same weights, read from the same files; other losses, samples and averaged weights."""
    plus = plain.replace('8f_v1.1', '8f_plus').replace('/v1.1', '/v1.1_plus')
    configs = [load_config(os.path.join(ROOT, 'configs', name), REDUCED) for name in (plain, plus)]
    models = [build_model(cfg.model, Task.from_config(cfg.task)) for cfg in configs]
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    terms = [set(model.pts_bbox_head.voxel_losses.terms) for model in models]
    assert terms[1] - terms[0] == {'loss_ray'} and not terms[0] - terms[1]
    assert [cfg.train.get('ema_decay') for cfg in configs] == [None, 0.999]
    steps = [[step['type'] for step in cfg.data.train.pipeline] for cfg in configs]
    assert steps[0] == steps[1] + ['BEVAug'] and not configs[1].data.train.pipeline[2]['rand_flip']
    plain_cfg, plus_cfg = [cfg._cfg_dict.to_dict() for cfg in configs]
    for cfg in (plain_cfg, plus_cfg):
        del cfg['model']['pts_bbox_head']['loss_cfgs'], cfg['train'], cfg['data']['train']['pipeline']
        cfg.pop('published', None)
    assert plain_cfg == plus_cfg


def test_openocc_has_17_classes_and_its_own_labels():
    cfg = load_config(os.path.join(ROOT, 'configs/r50_nuimg_704x256_8f_openocc.py'))
    assert Task.from_config(cfg.task).label_set.num_classes == 17
    assert cfg.data.train.occ_gt_root == cfg.data.val.occ_gt_root == 'openocc_v2'
    assert not cfg.get('published')


def test_toy_configs_are_the_same_classes():
    full = load_config(os.path.join(ROOT, 'configs/r50_nuimg_704x256_8f_v1.1.py'))
    toy = load_config(os.path.join(ROOT, 'configs/toy/semantic.py'))
    for part in ('type', 'img_backbone.type', 'img_neck.type', 'pts_bbox_head.type', 'pts_bbox_head.transformer.type'):
        a, b = full.model, toy.model
        for key in part.split('.'):
            a, b = a[key], b[key]
        assert a == b, part
