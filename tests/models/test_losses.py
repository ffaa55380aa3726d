"""Every loss against the formula written out over upsampled voxels, including 255 and camera masks.

Tolerances: both sides are float32 sums in different orders, so 1e-5 relative where nothing is said.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_model import LOSSES, small_batch, small_model, small_task

from lib.dist import counting_shares
from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from models.decoders import MaskPrediction, VoxelStage
from models.losses import Mask2FormerLoss, VoxelLosses
from models.losses.mask2former import focal_loss, instances_among_kept
from models.losses.voxel import (
    balanced_occupancy,
    count_labels,
    geometric_affinity,
    lovasz_softmax,
    negative_log,
    semantic_affinity,
    weighted_cross_entropy,
)

CLASSES = 5


def random_targets(batch=2, visible=False, ignore=True):
    generator = torch.Generator().manual_seed(4)
    shape = (batch,) + small_task().grid_shape
    semantics = torch.randint(0, CLASSES, shape, generator=generator).to(torch.uint8)
    instances = torch.where(semantics == 4, torch.full_like(semantics, 255), semantics)
    if ignore:
        semantics[:, :3, :5] = 255
    mask = torch.rand(shape, generator=generator) < 0.6 if visible else None
    return OccupancyTargets(semantics, instances, [torch.arange(4)] * batch, mask)


def random_coords(scale, kept=12, batch=2):
    generator = torch.Generator().manual_seed(5)
    return torch.stack(
        [torch.randint(0, n // scale, (batch, kept), generator=generator) for n in small_task().grid_shape], dim=-1
    )


def upsampled(values, coords, scale, targets, b):
    """Per-voxel predictions and labels of the kept blocks of sample b, as nearest upsampling makes them."""
    rows, labels = [], []
    for value, corner in zip(values[b], (coords[b] * scale).tolist()):
        for offset in range(scale**3):
            offsets = (offset // scale**2, offset // scale % scale, offset % scale)
            x, y, z = (c + o for c, o in zip(corner, offsets))
            label = int(targets.voxel_semantics[b, x, y, z])
            if label != 255 and (targets.mask_camera is None or targets.mask_camera[b, x, y, z]):
                rows.append(value)
                labels.append(label)
    return torch.stack(rows), torch.tensor(labels)


def naive_lovasz(probabilities, labels):
    losses = []
    for c in range(CLASSES):
        truth = (labels == c).float()
        if truth.sum() == 0:
            continue
        errors, order = (truth - probabilities[:, c]).abs().sort(descending=True)
        truth = truth[order]
        jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
        steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append((errors * steps).sum())
    return torch.stack(losses).mean()


def naive_affinity(p, truth):
    terms = [(p * truth).sum() / p.sum()]
    if truth.sum() > 0:
        terms.append((p * truth).sum() / truth.sum())
    if (1 - truth).sum() > 0:
        terms.append(((1 - p) * (1 - truth)).sum() / (1 - truth).sum())
    return sum(F.binary_cross_entropy(t.clamp(0, 1), torch.ones_like(t)) for t in terms)


@pytest.mark.parametrize('visible', [False, True])
@pytest.mark.parametrize('scale', [1, 2, 4])
def test_losses_of_release_1_1_equal_the_upsampled_formulas(scale, visible):
    targets, coords = random_targets(visible=visible), random_coords(scale)
    logits = torch.randn(2, coords.shape[1], CLASSES, generator=torch.Generator().manual_seed(6))
    loss = VoxelLosses(small_task(), 'semantic', LOSSES['semantic'])
    weights = loss.terms['loss_sem_ce'].class_weights = torch.linspace(0.5, 1.5, CLASSES)
    ours = loss(VoxelStage(coords, logits, logits, scale), targets)
    expected = dict(loss_sem_lovasz=0, loss_geo_scal=0, loss_sem_scal=0, loss_sem_ce=0)
    for b in range(2):
        rows, labels = upsampled(logits, coords, scale, targets, b)
        p = rows.softmax(-1)
        present = [c for c in range(CLASSES) if (labels == c).any()]
        expected['loss_sem_lovasz'] += naive_lovasz(p, labels) / 2
        expected['loss_geo_scal'] += naive_affinity(1 - p[:, -1], (labels != CLASSES - 1).float()) / 2
        expected['loss_sem_scal'] += sum(naive_affinity(p[:, c], (labels == c).float()) for c in present) / (
            2 * len(present)
        )
        expected['loss_sem_ce'] += F.cross_entropy(rows, labels, weight=weights) / 2
    assert set(ours) == set(expected)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scale', [1, 2, 4])
def test_losses_of_release_1_0_equal_the_upsampled_formulas(scale):
    targets, coords = random_targets(visible=True), random_coords(scale)
    generator = torch.Generator().manual_seed(6)
    occ = torch.randn(2, coords.shape[1], generator=generator)
    seg = torch.randn(2, coords.shape[1], CLASSES - 1, generator=generator)
    loss = VoxelLosses(small_task(), 'occupancy', LOSSES['occupancy'])
    ours = loss(VoxelStage(coords, seg, seg, scale, occ_logits=occ), targets)
    expected_occ = expected_sem = 0
    for b in range(2):
        rows, labels = upsampled(occ, coords, scale, targets, b)
        weights = len(labels) / torch.bincount(labels, minlength=CLASSES)[labels]
        truth = (labels != CLASSES - 1).float()
        expected_occ += F.binary_cross_entropy_with_logits(rows, truth, weight=weights) / 2
        rows, _ = upsampled(seg, coords, scale, targets, b)
        expected_sem += F.cross_entropy(rows[labels != CLASSES - 1], labels[labels != CLASSES - 1]) / 2
    torch.testing.assert_close(ours['loss_occ'], expected_occ, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours['loss_sem'], expected_sem, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scale', [1, 4])
def test_gradients_equal_those_of_the_upsampled_voxels(scale):
    targets, coords = random_targets(), random_coords(scale)
    gradients = []
    for naive in (False, True):
        logits = torch.randn(2, coords.shape[1], CLASSES, generator=torch.Generator().manual_seed(6))
        logits = logits.double().requires_grad_()
        if naive:
            for b in range(2):
                rows, labels = upsampled(logits, coords, scale, targets, b)
                (naive_lovasz(rows.softmax(-1), labels) / 2).backward()
        else:
            counts = count_labels(targets, coords, scale, CLASSES).double()
            lovasz_softmax(logits.softmax(-1), counts, scale).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_nothing_to_compare_gives_zero_and_finite_gradients():
    targets = random_targets()
    targets = replace(targets, voxel_semantics=torch.full_like(targets.voxel_semantics, 255))
    logits = torch.randn(2, 12, CLASSES, requires_grad=True)
    counts = count_labels(targets, random_coords(2), 2, CLASSES)
    p = logits.softmax(-1)
    total = (
        lovasz_softmax(p, counts, 2)
        + geometric_affinity(p, counts)
        + semantic_affinity(p, counts)
        + weighted_cross_entropy(logits, counts)
        + balanced_occupancy(logits[..., 0], counts)
    )
    total.backward()
    assert total == 0 and torch.isfinite(logits.grad).all()


def test_log_terms_stop_at_100_with_a_finite_gradient():
    ratio = torch.tensor([0.0, 0.5, 1.0, 1.0000001], requires_grad=True)
    loss = negative_log(ratio)
    loss.sum().backward()
    assert loss.tolist() == [100.0, pytest.approx(math.log(2)), 0.0, 0.0]
    assert torch.isfinite(ratio.grad).all() and ratio.grad[1] == -2


GEO, OWN = dict(type='GeoScalLoss'), dict(type='VoxelCrossEntropyLoss', loss_weight=0.5)


@pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])
def test_configs_from_before_terms_were_named_mean_the_release(scoring):
    named = {name: cfg for name, cfg in LOSSES[scoring].items() if name.endswith('_scal')}
    terms = VoxelLosses(small_task(), scoring, named).terms
    assert set(terms) == set(LOSSES[scoring])
    assert all(type(terms[name]).__name__ == cfg['type'] for name, cfg in LOSSES[scoring].items())
    assert scoring == 'occupancy' or terms['loss_sem_ce'].class_weights is not None


def test_none_takes_a_term_out():
    terms = VoxelLosses(
        small_task(), 'semantic', dict(LOSSES['semantic'], loss_sem_lovasz=None, loss_sem_ce=None)
    ).terms
    assert set(terms) == {'loss_geo_scal', 'loss_sem_scal'}


@pytest.mark.parametrize(
    'scoring, cfgs, message',
    [
        ('occupancy', dict(LOSSES['occupancy'], loss_geo_scal=GEO), "GeoScalLoss needs transformer.scoring='semantic'"),
        ('semantic', LOSSES['occupancy'], "BalancedOccupancyLoss needs transformer.scoring='occupancy'"),
        ('semantic', dict(loss_geo_scal=GEO, loss_sem_scal=GEO, loss_own=OWN), 'loss_sem_lovasz=.*loss_sem_ce='),
        ('occupancy', dict(loss_own=OWN), 'every term has to be named; add .* loss_occ='),
        ('semantic', dict(LOSSES['semantic'], own=OWN), "'own' must begin with 'loss_'"),
        ('semantic', dict(LOSSES['semantic'], loss_own=dict(type='GeoScaleLoss')), "loss_own.*mean 'GeoScalLoss'"),
        ('semantic', dict(loss_sem_ce=dict(type='VoxelCrossEntropyLoss', wait=1)), "loss_sem_ce.*unknown key 'wait'"),
    ],
)
def test_wrong_loss_configs_are_a_sentence(scoring, cfgs, message):
    with pytest.raises(ConfigError, match=message) as caught:
        VoxelLosses(small_task(), scoring, cfgs)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])
def test_every_term_follows_its_weight(scoring):
    targets, coords = random_targets(), random_coords(2)
    classes = CLASSES if scoring == 'semantic' else CLASSES - 1
    generator = torch.Generator().manual_seed(6)
    logits, occ = torch.randn(2, 12, classes, generator=generator), torch.randn(2, 12, generator=generator)
    stage = VoxelStage(coords, logits, logits, 2, occ_logits=occ)
    heavier = {name: dict(cfg, loss_weight=3.0) for name, cfg in LOSSES[scoring].items()}
    once, thrice = (VoxelLosses(small_task(), scoring, cfgs)(stage, targets) for cfgs in (LOSSES[scoring], heavier))
    assert set(once) == set(LOSSES[scoring])
    for name, value in once.items():
        torch.testing.assert_close(thrice[name], 3 * value)


def mask_setup(visible=False):
    targets, coords = random_targets(visible=visible, ignore=False), random_coords(1, kept=40)
    stage = VoxelStage(coords, torch.zeros(2, 40, CLASSES), torch.zeros(2, 40, 8), 1)
    generator = torch.Generator().manual_seed(8)
    layer = MaskPrediction(
        class_logits=torch.randn(2, 6, 4, generator=generator), mask_logits=torch.randn(2, 6, 40, generator=generator)
    )
    return targets, stage, layer


@pytest.mark.parametrize('visible', [False, True])
def test_mask_losses_equal_the_formulas_at_the_cheapest_matching(visible):
    import itertools

    targets, stage, layer = mask_setup(visible)
    ours = Mask2FormerLoss()([layer], stage, targets)
    totals, instances = dict(mask=0, dice=0, cls=0), 0
    for b in range(2):
        x, y, z = stage.coords[b].t()
        ids = targets.voxel_instances[b, x, y, z]
        keep = targets.mask_camera[b, x, y, z] if visible else torch.ones_like(ids, dtype=torch.bool)
        logits, scores = layer.mask_logits[b][:, keep], layer.class_logits[b]
        present = [i for i in range(4) if (ids[keep] == i).any()]
        masks = torch.stack([(ids[keep] == i).float() for i in present])
        instances += len(present)

        def dice(q, i):
            p = logits[q].sigmoid()
            return 1 - (2 * (p * masks[i]).sum() + 1) / (p.sum() + masks[i].sum() + 1)

        def cost(q, i):
            p = scores[q, present[i]].sigmoid()
            focal = -0.25 * (1 - p) ** 2 * (p + 1e-12).log() + 0.75 * p**2 * (1 - p + 1e-12).log()
            return 4 * focal + 5 * F.binary_cross_entropy_with_logits(logits[q], masks[i]) + 5 * dice(q, i)

        table = torch.tensor([[float(cost(q, i)) for i in range(len(present))] for q in range(6)])
        rows = min(
            itertools.permutations(range(6), len(present)),
            key=lambda rows: sum(table[q, i] for i, q in enumerate(rows)),
        )
        totals['mask'] += sum(F.binary_cross_entropy_with_logits(logits[q], masks[i]) for i, q in enumerate(rows))
        totals['dice'] += sum(dice(q, i) for i, q in enumerate(rows))
        onehot = torch.zeros_like(scores)
        for i, q in enumerate(rows):
            onehot[q, present[i]] = 1
        totals['cls'] += focal_loss(scores, onehot)
    torch.testing.assert_close(ours['loss_mask_0'], 5 * totals['mask'] / instances, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours['loss_dice_mask_0'], 5 * totals['dice'] / instances, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours['loss_class_0'], 4 * totals['cls'] / instances, rtol=1e-5, atol=1e-6)


def test_focal_loss_equals_its_definition():
    torch.manual_seed(0)
    logits, onehot = torch.randn(6, 4), (torch.rand(6, 4) < 0.3).float()
    p = logits.sigmoid()
    expected = -(0.25 * (1 - p) ** 2 * p.log() * onehot + 0.75 * p**2 * (1 - p).log() * (1 - onehot)).sum()
    torch.testing.assert_close(focal_loss(logits, onehot), expected, rtol=1e-5, atol=1e-6)


def test_instances_without_kept_voxels_are_not_present():
    targets, stage, _ = mask_setup()
    volume = torch.full_like(targets.voxel_instances, 255)
    x, y, z = stage.coords[0].t()
    volume[0, x[0], y[0], z[0]], volume[0, x[1], y[1], z[1]] = 1, 3
    targets = replace(targets, voxel_instances=volume, instance_class_ids=[torch.tensor([7, 8, 9, 2])] * 2)
    instances = instances_among_kept(targets, stage)
    assert instances.present.tolist() == [[False, True, False, True], [False] * 4]
    assert instances.masks[0].nonzero().tolist() == [[1, 0], [3, 1]]
    assert instances.class_ids[0].tolist() == [7, 8, 9, 2]


def test_sample_without_any_instance_trains_the_background_only():
    targets, stage, layer = mask_setup()
    targets = replace(
        targets,
        voxel_instances=torch.full_like(targets.voxel_instances, 255),
        instance_class_ids=[torch.zeros(0, dtype=torch.int64)] * 2,
    )
    layer.class_logits.requires_grad_()
    layer.mask_logits.requires_grad_()
    losses = Mask2FormerLoss()([layer], stage, targets)
    sum(losses.values()).backward()
    assert losses['loss_mask_0'] == 0 and losses['loss_dice_mask_0'] == 0
    expected = 4 * sum(focal_loss(x, torch.zeros_like(x)) for x in layer.class_logits)  # divided by max(1, 0)
    torch.testing.assert_close(losses['loss_class_0'], expected)
    assert layer.mask_logits.grad is not None and not layer.mask_logits.grad.any()


def test_instances_are_averaged_over_the_processes(monkeypatch):
    """With 3 processes of which the others hold 2 and 7 instances, sums are divided by the mean number."""
    targets, stage, layer = mask_setup()
    alone = Mask2FormerLoss()([layer], stage, targets)
    ours = int(instances_among_kept(targets, stage).present.sum())
    monkeypatch.setattr('lib.dist.world_size', lambda: 3)
    monkeypatch.setattr('torch.distributed.all_reduce', lambda tensor, op: tensor.add_(9))
    together = Mask2FormerLoss()([layer], stage, targets)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name] * ours / ((ours + 9) / 3))


def test_ground_truth_is_left_as_it_was():
    targets, stage, layer = mask_setup(visible=True)
    class_ids = [torch.arange(4), torch.arange(4)]
    targets = replace(targets, instance_class_ids=class_ids)
    before = [t.clone() for t in (targets.voxel_semantics, targets.voxel_instances, targets.mask_camera)]
    Mask2FormerLoss()([layer], stage, targets)
    count_labels(targets, stage.coords, 1, CLASSES)
    after = (targets.voxel_semantics, targets.voxel_instances, targets.mask_camera)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert targets.instance_class_ids is class_ids and all(ids.tolist() == [0, 1, 2, 3] for ids in class_ids)


@pytest.mark.parametrize('visible', [False, True])
def test_shares_that_the_losses_count(visible):
    """Kept occupied voxels by stage, counted one by one; empty masks; matched queries by class."""
    task = small_task()
    model, batch = small_model(task), small_batch(task, 2)
    model.use_mask_camera = visible
    with counting_shares() as counted:
        model(**batch, return_loss=True)
    targets, labels = batch['targets'], batch['targets'].voxel_semantics
    matters = (labels < task.label_set.free_id) & (targets.mask_camera if visible else torch.ones_like(labels).bool())
    raw = model.predict_raw(batch['img'], batch['lidar2img'], batch['ego2lidar'])
    for number, stage in enumerate(raw.output.stages):
        kept = torch.zeros_like(matters)
        for b, block in [(sample, block) for sample in range(2) for block in stage.coords[sample].tolist()]:
            x, y, z = [slice(stage.scale * i, stage.scale * i + stage.scale) for i in block]
            kept[b, x, y, z] = True
        assert tuple(map(int, counted[f'recall_{number}'])) == (int((kept & matters).sum()), int(matters.sum()))
    of_class = [counted[f'right_class/{name}'] for name in task.label_set.occupied_names]
    assert sum(int(whole) for _, whole in of_class) == counted['right_class'][1] > 0
    assert sum(int(part) for part, _ in of_class) == counted['right_class'][0]
    assert 0 <= int(counted['empty_masks'][0]) <= counted['empty_masks'][1] == 2 * 8


def test_nothing_is_counted_unless_asked_for():
    model, batch = small_model(small_task()), small_batch(small_task())
    model(**batch, return_loss=True)
    with counting_shares(False) as counted:
        model(**batch, return_loss=True)
    assert counted == {}
