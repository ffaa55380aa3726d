"""Denoising queries: what they start from, what they can see, what they are to find; and that nothing else knows."""

import contextlib
from dataclasses import replace

import pytest
import torch
from small_model import sample_of, small_batch, small_config, small_model, small_task

from lib.checkpoint import load_model_weights
from lib.dist import shared_draws
from lib.errors import ConfigError
from models import build_model
from models.decoders.layers import DecoderSizes
from models.losses import DenoisingLoss
from models.losses.mask2former import MaskTargets

TASK = small_task()
SIZES = DecoderSizes(TASK, embed_dims=32)
NOTHING = 4  # one more than the last occupied class


def denoising_model(**options):
    torch.manual_seed(0)
    losses = dict(loss_denoising=dict(dict(type='DenoisingLoss'), **options))
    model = build_model(dict(small_config(), auxiliary_losses=losses), TASK)
    plain = small_model(TASK)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model, plain


def random_instances(counts, kept=200):
    """So many of each sample, and padding."""
    generator = torch.Generator().manual_seed(2)
    present = torch.arange(max(counts) + 1) < torch.tensor(counts).unsqueeze(1)
    masks = torch.rand(*present.shape, kept, generator=generator) < 0.3
    classes = torch.randint(0, 4, present.shape, generator=generator)
    return MaskTargets(masks & present.unsqueeze(-1), classes, present, None)


@pytest.mark.parametrize('counts', [(3, 0), (12, 5)])
def test_queries_are_to_find_the_instance_that_they_start_from(counts):
    loss = DenoisingLoss(SIZES, slots=8, copies=3, label_noise=0.0, mask_noise=0.0)
    instances = random_instances(counts)
    slots = loss.fill(instances)
    classes, masks = loss.spoil_classes(slots.classes), loss.spoil_masks(slots.masks)
    for b, count in enumerate(counts):
        matching = loss._assign(slots.instances[b])
        filled = min(count, 8)
        assert len(set(slots.instances[b].tolist())) == filled and len(matching.queries) == 3 * filled
        assert torch.equal(classes[b, matching.queries], instances.class_ids[b, matching.instances])
        assert torch.equal(masks[b, matching.queries], instances.masks[b, matching.instances])
        others = torch.ones(24, dtype=torch.bool)
        others[matching.queries] = False
        assert (classes[b, others] == NOTHING).all() and not masks[b, others].any()


def test_noise_changes_the_share_that_it_says():
    loss = DenoisingLoss(SIZES, copies=50, slots=4, label_noise=0.4, mask_noise=0.25)
    torch.manual_seed(0)
    classes = loss.spoil_classes(torch.tensor([[0, 1, NOTHING, NOTHING]] * 20))
    assert (classes[:, 2::4] == NOTHING).all() and (classes[:, 3::4] == NOTHING).all()
    assert (classes[:, ::4] != 0).float().mean() == pytest.approx(0.4 * 3 / 4, abs=0.06)  # one in four is drawn itself
    masks = torch.zeros(2, 4, 4000, dtype=torch.bool)
    masks[:, 1, :400] = True
    spoilt = loss.spoil_masks(masks).view(2, 50, 4, 4000)
    assert not spoilt[:, :, [0, 2, 3]].any()
    assert spoilt[:, :, 1, :400].float().mean() == pytest.approx(0.75, abs=0.02)
    assert spoilt[:, :, 1, 400:].sum(-1).float().mean() == pytest.approx(0.025 * 3600, rel=0.1)
    assert len(set(map(tuple, spoilt[0, :, 1, :400].tolist()))) > 40  # copies have noise of their own


@torch.no_grad()
def test_copies_cannot_see_each_other_and_slots_of_a_copy_can(monkeypatch):
    model, _ = denoising_model(copies=2, slots=4)
    model.eval()
    batch, seen = small_batch(TASK), {}
    features = model.encoder(batch['img'], batch['lidar2img'], batch['ego2lidar'])
    stage = model.pts_bbox_head(features).stages[-1]
    slots = model.loss_denoising.fill(model.pts_bbox_head.loss_mask2former.instances(batch['targets'], stage))
    for changed in (False, True):
        classes = slots.classes.repeat(1, 2)
        if changed:
            classes[0, 1] = (classes[0, 1] + 1) % 4
        monkeypatch.setattr(model.loss_denoising, 'spoil_classes', lambda _, classes=classes: classes)
        torch.manual_seed(3)
        seen[changed] = model.loss_denoising._restore(model.pts_bbox_head.transformer, stage, features, slots)
    for before, after in zip(seen[False], seen[True]):
        difference = (before.mask_logits - after.mask_logits).abs().amax(-1)[0]
        assert (difference[:4] > 0).all() and not difference[4:].any()


def test_the_other_losses_and_predictions_do_not_change():
    model, plain = denoising_model()
    batch, losses = small_batch(TASK, 2), []
    for one in (model, plain):
        torch.manual_seed(1)
        losses.append(one(**batch, return_loss=True))
    added = {f'loss_dn_{name}_{i}' for name in ('mask', 'dice_mask', 'class') for i in range(2)}
    assert set(losses[0]) - set(losses[1]) == added
    assert all(torch.equal(losses[0][name], value) for name, value in losses[1].items())
    sum(losses[0][name] for name in added).backward()
    layer = model.pts_bbox_head.transformer.decoder.decoder_layer
    for weight in (layer.classifier.weight, layer.mask_proj.weight, model.loss_denoising.query_feat.weight):
        assert weight.grad.abs().sum() > 0
    model.loss_denoising.forward = None
    inputs = sample_of(small_batch(TASK, 1, with_labels=False), 0)
    ours, theirs = (one.eval()(**inputs, return_loss=False)[0] for one in (model, plain))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def half_precision(wanted):
    """bfloat16 where it is wanted; PyTorch 1 has no LayerNorm in its autocast on the CPU."""
    able = int(torch.__version__.split('.')[0]) >= 2
    return torch.autocast('cpu', dtype=torch.bfloat16) if wanted and able else contextlib.nullcontext()


@pytest.mark.parametrize('points', [None, 50])
def test_it_is_learnt(points):
    """With a fixed sample and with chosen points of the mask losses, in full and in half precision."""
    losses = dict(loss_denoising=dict(type='DenoisingLoss', copies=2, slots=6))
    config = dict(small_config(), auxiliary_losses=losses)
    config['pts_bbox_head']['loss_cfgs']['loss_mask2former']['num_points'] = points
    torch.manual_seed(0)
    model, batch, sums = build_model(config, TASK), small_batch(TASK, 2), []
    model.img_backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.pts_bbox_head.parameters(), lr=2e-3)
    for step in range(12):
        with shared_draws(step, 0, 2, 2, 'cpu'), half_precision(step == 11):
            losses = model(**batch, return_loss=True)
        sums.append(sum(value for name, value in losses.items() if '_dn_' in name))
        optimizer.zero_grad()
        sums[-1].backward()
        optimizer.step()
    assert sums[-1] < 0.7 * sums[0]


def test_samples_without_instances_train_the_background_only():
    model, _ = denoising_model()
    batch = small_batch(TASK, 2)
    nothing = torch.full_like(batch['targets'].voxel_instances, 255)
    targets = replace(batch['targets'], voxel_instances=nothing, instance_class_ids=[torch.zeros(0).long()] * 2)
    losses = model(**dict(batch, targets=targets), return_loss=True)
    assert losses['loss_dn_mask_1'] == 0 and losses['loss_dn_class_1'] > 0
    sum(losses.values()).backward()


def test_draws_do_not_depend_on_how_a_step_is_dealt():
    loss, instances = DenoisingLoss(SIZES, slots=4), random_instances((6, 9))
    results = []
    for begin in (0, 1):
        with shared_draws(4, begin, 2, 2, 'cpu'):
            slots = loss.fill(MaskTargets(*[value[begin:] for value in instances[:3]], None))
            results.append(
                (slots.classes[-1], loss.spoil_classes(slots.classes)[-1], loss.spoil_masks(slots.masks)[-1])
            )
    assert all(map(torch.equal, *results))


def test_weights_with_it_fit_a_model_without(tmp_path, capsys):
    model, plain = denoising_model()
    path = str(tmp_path / 'with.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    load_model_weights(plain, path)
    assert '2 tensors that only training uses are left out (loss_denoising)' in capsys.readouterr().out


@pytest.mark.parametrize('wrong', [dict(copies=0), dict(slots=300), dict(label_noise=1.5), dict(mask_noise=-0.1)])
def test_wrong_numbers_are_a_sentence(wrong):
    with pytest.raises(ConfigError, match='model.auxiliary_losses.loss_denoising: copies must be') as caught:
        denoising_model(**wrong)
    assert '\n' not in str(caught.value)
