"""Points of the mask losses: which are chosen, what the losses become, and what the draws depend on."""

from dataclasses import replace

import pytest
import torch
from small_model import small_batch, small_config, small_model, small_task
from test_losses import mask_setup

from lib.dist import shared_draws
from lib.errors import ConfigError
from models import build_model
from models.losses import Mask2FormerLoss
from models.losses.mask2former import PointChoice


def even(count):
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize('power', [0.0, 0.25, 1.0])
def test_classes_are_drawn_by_their_power(power):
    """300 voxels of one class, 80 of a second (20 of them not counted), 20 that are ignored by other losses."""
    labels = torch.tensor([3] * 300 + [1] * 80 + [255] * 20, dtype=torch.uint8)[torch.randperm(400)]
    counted = torch.ones(400)
    counted[(labels == 1).nonzero()[:20]] = 0
    choice = PointChoice(100000, 1.0, 0.0, power)
    (drawn,) = choice.choose(torch.zeros(1, 400), choice.cumulate(labels, counted), even(100000))
    assert counted[drawn].all()
    weights = torch.tensor([300 * 300.0**-power, 60 * 80.0**-power, 20 * 20.0**-power])
    shares = torch.stack([(labels[drawn] == c).float().mean() for c in (3, 1, 255)])
    torch.testing.assert_close(shares, weights / weights.sum(), atol=1e-4, rtol=0)  # of an even grid of draws
    per_voxel = torch.bincount(drawn[labels[drawn] == 3], minlength=400)[labels == 3]
    assert per_voxel.max() - per_voxel.min() <= 1


def test_three_quarters_are_the_unsure_candidates():
    torch.manual_seed(0)
    choice, logits = PointChoice(8, 3.0, 0.75, 0.0), torch.randn(2, 50)
    numbers = choice.draw(1, torch.device('cpu'))[0]
    assert len(numbers) == 24 + 2
    chosen = choice.choose(logits, choice.cumulate(torch.zeros(50), None), numbers)
    drawn = (numbers * 50).long()
    assert chosen.shape == (2, 8) and all(row[6:].tolist() == drawn[24:].tolist() for row in chosen)
    for row, own in zip(chosen, logits):
        expected = own[drawn[:24]].abs().sort().values[:6]
        torch.testing.assert_close(own[row[:6]].abs().sort().values, expected)


@pytest.mark.parametrize('visible', [False, True])
def test_losses_are_those_of_the_chosen_points(visible, monkeypatch):
    """Draws on an even grid and no look at the logits take every voxel equally often: the loss over all voxels."""
    targets, stage, layer = mask_setup(visible)
    monkeypatch.setattr(PointChoice, 'draw', lambda self, batch, device: even(4000).expand(batch, -1))
    chosen = Mask2FormerLoss(num_points=4000, importance_sample_ratio=0.0)([layer], stage, targets)
    every = Mask2FormerLoss()([layer], stage, targets)
    torch.testing.assert_close(chosen['loss_class_0'], every['loss_class_0'])
    # 100 draws for each of 40 voxels; of some 24 that are visible, one more or less than 4000 / 24 each
    torch.testing.assert_close(chosen['loss_mask_0'], every['loss_mask_0'], rtol=0.01 if visible else 1e-5, atol=0)


def test_draws_do_not_depend_on_how_the_batch_is_dealt():
    targets, stage, layer = mask_setup()
    loss = Mask2FormerLoss(num_points=10, class_power=0.5)

    def total(begin, end):
        part = slice(begin, end)
        with shared_draws(7, begin, end, 2, 'cpu'):
            terms = loss(
                [type(layer)(layer.class_logits[part], layer.mask_logits[part])],
                replace(stage, coords=stage.coords[part]),
                type(targets)(
                    targets.voxel_semantics[part], targets.voxel_instances[part], targets.instance_class_ids[part]
                ),
            )
        return terms['loss_mask_0'] * 4 * (end - begin)  # undo the division by the instances, four a sample

    torch.testing.assert_close(total(0, 1) + total(1, 2), total(0, 2))
    assert not torch.equal(loss([layer], stage, targets)['loss_mask_0'], loss([layer], stage, targets)['loss_mask_0'])


def test_a_model_learns_and_predicts_as_before():
    """The option has no weights and no part in inference."""
    cfg, task = small_config(), small_task()
    cfg['pts_bbox_head']['loss_cfgs']['loss_mask2former'].update(num_points=64, class_power=0.25)
    torch.manual_seed(0)
    model, plain, batch = build_model(cfg, task), small_model(), small_batch(task)
    optimizer, totals = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(12):
        losses = model(return_loss=True, **batch)
        totals.append(sum(losses.values()).item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert totals[-1] < 0.8 * totals[0] and losses['loss_mask_1'] > 0
    plain.load_state_dict(model.state_dict(), strict=True)
    inputs = {name: batch[name] for name in ('img', 'lidar2img', 'ego2lidar', 'img_metas')}
    with torch.no_grad():
        ours, theirs = (m.eval()(return_loss=False, **inputs)[0] for m in (model, plain))
    assert set(ours) == set(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize(
    'values', [dict(num_points=0), dict(num_points=9, oversample_ratio=0.5), dict(num_points=9, class_power=2.0)]
)
def test_wrong_values_are_told(values):
    with pytest.raises(ConfigError, match='Mask2FormerLoss'):
        Mask2FormerLoss(**values)
