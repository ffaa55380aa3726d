"""Learning rates and parameter groups are those that mmcv gives for the same config."""

import pytest
import torch
from mmcv.runner import build_optimizer as mmcv_build_optimizer
from mmcv.runner.hooks import lr_updater
from torch import nn

from lib.errors import ConfigError
from lib.run.optimizer import Schedule, build_optimizer, set_learning_rate

STEPS, EPOCHS = 7, 6


class FakeRunner:
    """As much of mmcv's runner as its learning-rate hooks look at."""

    def __init__(self):
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        self.epoch = self.iter = 0
        self.max_epochs, self.max_iters = EPOCHS, EPOCHS * STEPS
        self.data_loader = [None] * STEPS


def rates_of_mmcv(cfg):
    cfg = dict(cfg)
    policy = cfg.pop('policy')
    name = {'step': 'Step', 'fixed': 'Fixed'}.get(policy, policy) + 'LrUpdaterHook'
    hook = getattr(lr_updater, name)(**cfg)
    runner, rates = FakeRunner(), []
    hook.before_run(runner)
    for runner.epoch in range(EPOCHS):
        hook.before_train_epoch(runner)
        for _ in range(STEPS):
            hook.before_train_iter(runner)
            rates.append(runner.optimizer.param_groups[0]['lr'])
            runner.iter += 1
    return rates


WARM = dict(warmup='linear', warmup_iters=10, warmup_ratio=1.0 / 3)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(policy='CosineAnnealing', min_lr_ratio=1e-3, **WARM),
        dict(policy='CosineAnnealing', min_lr_ratio=1e-3, by_epoch=False, **WARM),
        dict(policy='step', step=[2, 4], gamma=0.2, by_epoch=True, **WARM),
        dict(policy='step', step=2, gamma=0.5),
        dict(policy='step', step=[9, 30], gamma=0.5, by_epoch=False),
        dict(policy='fixed', warmup='constant', warmup_iters=3, warmup_ratio=0.1),
        dict(policy='fixed', warmup='exp', warmup_iters=5, warmup_ratio=0.1),
    ],
)
def test_rates_equal_mmcv(cfg):
    schedule = Schedule.from_config(cfg, EPOCHS, EPOCHS * STEPS, STEPS)
    ours = [2.0 * schedule.factor(i) for i in range(EPOCHS * STEPS)]
    assert ours == pytest.approx(rates_of_mmcv(cfg), rel=1e-12)  # the same formula in double precision


def test_published_recipes():
    cosine = Schedule.from_config(
        dict(policy='CosineAnnealing', min_lr_ratio=1e-3, warmup='linear', warmup_iters=500, warmup_ratio=1.0 / 3),
        48,
        48 * 3517,
        3517,
    )
    assert cosine.factor(0) == pytest.approx(1 / 3) and cosine.factor(500) == 1.0
    assert cosine.factor(48 * 3517) == pytest.approx(1e-3)
    step = Schedule.from_config(dict(policy='step', step=[22, 24], gamma=0.2), 24, 24 * 3517, 3517)
    assert [step.factor(e * 3517) for e in (21, 22, 23)] == pytest.approx([1, 0.2, 0.2])


@pytest.mark.parametrize(
    'cfg, words',
    [
        (dict(policy='cosine'), 'lr_config.policy'),
        (dict(policy='step', warmup='linear'), 'warmup_iters'),
        (dict(policy='step', warmup='line', warmup_iters=3), 'lr_config.warmup'),
        (dict(policy='step', steps=[1]), "did you mean 'step'"),
    ],
)
def test_wrong_schedules(cfg, words):
    with pytest.raises(ConfigError, match=words):
        Schedule.from_config(cfg, 1, 1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.ModuleDict(dict(sampling_offset=nn.Linear(2, 2), other=nn.Linear(2, 2)))
        self.img_backbone[0].weight.requires_grad = False


def test_groups_equal_mmcv():
    cfg = dict(
        type='AdamW',
        lr=2e-4,
        weight_decay=0.01,
        paramwise_cfg=dict(
            custom_keys={
                'img_backbone': dict(lr_mult=0.1),
                'sampling_offset': dict(lr_mult=0.1),
                'head.sampling_offset.bias': dict(lr_mult=0.5, decay_mult=0.0),
            }
        ),
    )
    model = Net()
    ours, theirs = build_optimizer(model, cfg), mmcv_build_optimizer(model, dict(cfg))
    names = {id(p): name for name, p in model.named_parameters()}
    tables = [
        {
            names[id(p)]: (g['lr'], g['weight_decay'])
            for g in optimizer.param_groups
            for p in g['params']
            if p.requires_grad
        }
        for optimizer in (ours, theirs)
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 7
    assert len(ours.param_groups) == 3
    set_learning_rate(ours, 0.5)
    assert sorted(g['lr'] for g in ours.param_groups) == pytest.approx([1e-5, 5e-5, 1e-4])
