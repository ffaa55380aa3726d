"""The loss on rays against one ray followed step by step, and what it asks of a prediction.

Tolerances: both sides are float32 sums in different orders, so 1e-5 relative.
"""

import math
from dataclasses import replace

import pytest
import torch
from small_model import small_batch, small_config, small_model, small_task
from test_losses import random_targets

from lib.dist import shared_draws
from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from models import build_model
from models.decoders import VoxelStage
from models.losses.ray_terms import RayConsistencyLoss, Rays, log_probabilities
from models.losses.voxel import StageLabels

CLASSES, FREE = 5, 4
TASK = small_task()


def term(**options):
    return RayConsistencyLoss(TASK, **dict(dict(num_rays=64, num_origins=4, origin=(0.1, 0.2, 1.1)), **options))


def random_stage(coords, scale, scoring='semantic'):
    generator = torch.Generator().manual_seed(6)
    batch, kept, _ = coords.shape
    logits = torch.randn(batch, kept, CLASSES - (scoring == 'occupancy'), generator=generator)
    occ = torch.randn(batch, kept, generator=generator) if scoring == 'occupancy' else None
    return VoxelStage(coords, logits, logits, scale, occ_logits=occ)


def kept_blocks(scale, share):
    """int64 [2, K, 3]: a random share of all blocks."""
    generator = torch.Generator().manual_seed(5)
    every = torch.cartesian_prod(*[torch.arange(n // scale) for n in TASK.grid_shape])
    chosen = [torch.randperm(len(every), generator=generator)[: int(share * len(every))] for _ in range(2)]
    return torch.stack([every[rows.sort().values] for rows in chosen])


def follow(loss, stage, labels, origin, step, b):
    """(value, weight) of one ray, tensors [3]; labels uint8 [X, Y, Z] with 255 for what does not count."""
    free, classes = log_probabilities(stage)
    rows = {tuple(block): k for k, block in enumerate(stage.coords[b].tolist())}
    cells = []
    for number in range(max(TASK.grid_shape)):
        cell = tuple((origin + number * step).floor().long().tolist())
        inside = all(0 <= c < n for c, n in zip(cell, TASK.grid_shape))
        cells.append((cell, int(labels[cell]) if inside else 255))
    end = next((number for number, (_, label) in enumerate(cells) if label < FREE), None)
    if end is None:
        return 0.0, 0.0
    near, true_class = int(loss.tolerance / float(step.norm())), cells[end][1]
    on_the_way, reached, hit = 0.0, 1.0, 0.0
    for number, (cell, label) in enumerate(cells[: end + near + 1]):
        row = rows.get(tuple(c // stage.scale for c in cell))
        if label == 255 or row is None:
            continue
        if number < end - near:
            on_the_way -= float(free[b, row])
        else:
            hit += reached * math.exp(classes[b, row, true_class])
            reached *= math.exp(free[b, row])
    return on_the_way - math.log(0.999 * hit + 1e-3), float(loss.class_weights[true_class])


@pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])
@pytest.mark.parametrize('visible', [False, True])
@pytest.mark.parametrize('scale', [1, 2])
def test_it_equals_rays_followed_one_by_one(scale, visible, scoring):
    loss, targets = term(scales=[1, 2], tolerance=1.0), random_targets(visible=visible)
    sparse = torch.rand(targets.voxel_semantics.shape, generator=torch.Generator().manual_seed(3)) < 0.8
    sparse[:, 8, 12] = True  # where the rays begin
    targets = replace(targets, voxel_semantics=targets.voxel_semantics.masked_fill(sparse, FREE))
    stage = random_stage(kept_blocks(scale, 0.3), scale, scoring)
    loss.class_weights = torch.linspace(0.5, 1.5, CLASSES)
    with shared_draws(3, 0, 2, 2, 'cpu'):
        rays = loss.draw(targets)
    with shared_draws(3, 0, 2, 2, 'cpu'):
        ours = loss(stage, StageLabels(None, targets))
    expected = 0.0
    for b in range(2):
        labels = targets.voxel_semantics[b].clone()
        if visible:
            labels[~targets.mask_camera[b]] = 255
        pairs = [follow(loss, stage, labels, *ray, b) for ray in zip(rays.origins[b], rays.steps[b])]
        met = sum(weight > 0 for _, weight in pairs)
        assert 20 < met < len(pairs), met
        expected += sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) / 2
    torch.testing.assert_close(float(ours), expected, rtol=1e-5, atol=1e-6)


def wall(occupied=()):
    """Labels with a wall (class 3) at x = 12; a stage of all voxels that is sure of walls there and at ``occupied``."""
    semantics = torch.full((1,) + TASK.grid_shape, FREE, dtype=torch.uint8)
    semantics[:, 12] = 3
    coords = torch.cartesian_prod(*[torch.arange(n) for n in TASK.grid_shape]).unsqueeze(0)
    predicted = semantics[0].clone()
    predicted[list(occupied)] = 3
    logits = 20.0 * torch.nn.functional.one_hot(predicted.flatten().long(), CLASSES).float().unsqueeze(0)
    targets = OccupancyTargets(semantics, semantics, [torch.tensor([3])])
    return VoxelStage(coords, logits.requires_grad_(), logits, 1), StageLabels(None, targets)


@pytest.mark.parametrize(
    'occupied, tolerance, low, high',
    [
        ([], 0.0, 0.0, 1e-4),
        ([13, 14], 0.0, 0.0, 1e-4),  # behind the surface nothing is seen
        ([9], 20.0, 0.0, 1e-4),  # near enough
        ([9], 0.0, 19.0, 80.0),  # too near: log of the probability of free is -20 in each of its voxels
    ],
)
def test_surfaces_in_front_cost_and_what_is_behind_does_not(occupied, tolerance, low, high):
    stage, labels = wall(occupied)
    torch.manual_seed(0)
    assert low <= float(term(tolerance=tolerance)(stage, labels).detach()) <= high


def test_its_gradient_frees_the_way_and_fills_the_end():
    stage, labels = wall()
    logits = torch.zeros_like(stage.seg_logits).requires_grad_()
    torch.manual_seed(0)
    term(tolerance=0.0)(replace(stage, seg_logits=logits), labels).backward()
    gradient = logits.grad.view(TASK.grid_shape + (CLASSES,))
    assert gradient[:12, ..., FREE].sum() < 0 and (gradient[:12, ..., FREE] <= 0).all()
    assert gradient[12, ..., 3].sum() < 0 and (gradient[12, ..., 3] <= 0).all()
    assert not gradient[13:].any()


def test_a_volume_without_surfaces_gives_zero_and_finite_gradients():
    stage, labels = wall()
    empty = torch.full_like(labels.targets.voxel_semantics, FREE)
    for semantics in (empty, torch.full_like(empty, 255)):
        loss = term()(stage, StageLabels(None, OccupancyTargets(semantics, semantics, [torch.arange(0)])))
        loss.backward()
        assert loss == 0 and torch.isfinite(stage.seg_logits.grad).all()


def test_origins_lie_where_the_first_one_sees_and_rays_go_one_voxel_a_step():
    targets = random_targets(ignore=False)
    semantics = torch.full_like(targets.voxel_semantics, FREE)
    semantics[:, :4], semantics[:, :, 20:] = 3, 3
    loss = term(num_rays=400, num_origins=100)
    with shared_draws(5, 0, 2, 2, 'cpu'):
        rays = loss.draw(replace(targets, voxel_semantics=semantics))
    torch.testing.assert_close(rays.origins[:, 0], loss.start.expand(2, 3))
    cells = rays.cells(torch.arange(1))[:, :, 0]
    assert (cells[..., 0] >= 4).all() and (cells[..., 1] < 20).all() and (cells >= 0).all()
    assert (cells < torch.tensor(TASK.grid_shape)).all() and cells[..., :2].float().std(1).min() > 1
    torch.testing.assert_close(rays.steps.abs().amax(-1), torch.ones(2, 400))
    moved = rays.cells(torch.arange(5)).diff(dim=2).abs().amax(-1)
    assert (moved == 1).all()


def test_draws_depend_on_the_step_and_not_on_how_it_is_dealt():
    targets, loss = random_targets(ignore=False), term()
    with shared_draws(5, 0, 2, 2, 'cpu'):
        together = loss.draw(targets)
    with shared_draws(5, 1, 2, 2, 'cpu'):
        second = loss.draw(replace(targets, voxel_semantics=targets.voxel_semantics[1:]))
    with shared_draws(6, 0, 2, 2, 'cpu'):
        other = loss.draw(targets)
    assert torch.equal(together.steps[1:], second.steps) and torch.equal(together.origins[1:], second.origins)
    assert not torch.equal(together.steps, other.steps)


@pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])
def test_a_model_with_it_has_the_same_weights_and_one_more_loss(scoring):
    plain = small_model(TASK, scoring)
    config = small_config(scoring)
    config['pts_bbox_head']['loss_cfgs']['loss_ray'] = dict(type='RayConsistencyLoss', num_rays=64, num_origins=2)
    model = build_model(config, TASK)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    batch = small_batch(TASK, 2)
    torch.manual_seed(1)
    losses = model(**batch, return_loss=True)
    torch.manual_seed(1)
    expected = plain(**batch, return_loss=True)
    assert set(losses) - set(expected) == {'loss_ray_2'} and losses['loss_ray_2'] > 0
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    losses['loss_ray_2'].backward()
    assert model.img_backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_gives_the_same_value():
    loss, targets = term(), random_targets()
    stage = random_stage(kept_blocks(1, 0.3), 1)
    rays = loss.draw(targets)
    on = lambda values: [value.cuda() for value in values]  # noqa: E731
    ours, theirs = loss.true_ends(targets, rays), loss.cuda().true_ends(targets.to('cuda'), Rays(*on(rays)))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-5, atol=1e-6)
    moved = replace(stage, coords=stage.coords.cuda(), seg_logits=stage.seg_logits.cuda())
    assert torch.isfinite(loss(moved, StageLabels(None, targets.to('cuda'))))


@pytest.mark.parametrize('wrong', [dict(num_rays=2), dict(num_origins=0), dict(tolerance=-1.0), dict(origin=[1.0])])
def test_wrong_numbers_are_a_sentence(wrong):
    with pytest.raises(ConfigError, match='RayConsistencyLoss: num_rays') as caught:
        term(**wrong)
    assert '\n' not in str(caught.value)
