"""The loss on depth: its value, what it trains, and that inference and weights do not know of it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_model import sample_of, small_batch, small_config, small_model, small_task

from lib.checkpoint import load_model_weights
from lib.errors import CheckpointError, ConfigError, DataError
from models import build_model
from models.losses import TrainingPass

TASK = small_task()


def depth_model(**options):
    torch.manual_seed(0)
    losses = dict(loss_depth=dict(dict(type='LidarDepthLoss'), **options))
    model = build_model(dict(small_config(), auxiliary_losses=losses), TASK)
    plain = small_model(TASK)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model, plain


def batch_with_points(size=2, count=400):
    batch = small_batch(TASK, size)
    generator = torch.Generator().manual_seed(3)
    points = [20 * torch.randn(count + 10 * b, 3, generator=generator) for b in range(size)]
    return dict(batch, targets=replace(batch['targets'], lidar_points=points))


def test_its_value_is_the_mean_over_cells_then_samples():
    model, _ = depth_model(level=0, num_bins=10, depth_range=(2.0, 40.0), loss_weight=3.0)
    batch = batch_with_points()
    features = model.encoder(batch['img'], batch['lidar2img'], batch['ego2lidar'])
    step = TrainingPass(features, None, batch['targets'], batch['lidar2img'], TASK.image_size, model.pts_bbox_head)
    ours = model.loss_depth(step)['loss_depth']
    expected = []
    for b in range(2):
        logits = model.loss_depth.head(features.maps[0][b, :3].permute(0, 3, 1, 2))
        nearest = {}
        for camera in range(3):
            for point in batch['targets'].lidar_points[b].double():
                seen = batch['lidar2img'][b, camera].double() @ torch.cat([point, point.new_ones(1)])
                u, v, depth = seen[:3].tolist()
                cell = (camera, int(v / depth // 4), int(u / depth // 4))
                if 2 <= depth < 40 and 0 <= u / depth < 96 and 0 <= v / depth < 64:
                    nearest[cell] = min(depth, nearest.get(cell, 99.0))
        assert len(nearest) > 20
        bins = [int(10 * math.log(depth / 2) / math.log(20.0)) for depth in nearest.values()]
        rows = torch.stack([logits[camera, :, y, x] for camera, y, x in nearest])
        expected.append(F.cross_entropy(rows, torch.tensor(bins)))
    torch.testing.assert_close(ours, 3 * sum(expected) / 2, rtol=1e-4, atol=1e-5)


def test_it_trains_the_backbone_and_leaves_the_other_losses_alone():
    model, plain = depth_model()
    batch = batch_with_points()
    losses = []
    for one in (model, plain):
        torch.manual_seed(1)
        losses.append(one(**batch, return_loss=True))
    assert set(losses[0]) - set(losses[1]) == {'loss_depth'}
    assert all(torch.equal(losses[0][name], value) for name, value in losses[1].items())
    losses[0]['loss_depth'].backward()
    assert model.img_backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.skipif(int(torch.__version__.split('.')[0]) < 2, reason='no LayerNorm in the CPU autocast of PyTorch 1')
def test_points_of_half_precision_training_are_projected_in_full():
    model, _ = depth_model()
    batch, seen = batch_with_points(), []
    true_bins = model.loss_depth.true_bins
    model.loss_depth.true_bins = lambda *args: seen.append(true_bins(*args)) or seen[-1]
    model(**batch, return_loss=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**batch, return_loss=True)
    assert torch.equal(*seen) and losses['loss_depth'].dtype == torch.float32


def test_no_point_in_any_image_gives_zero():
    model, _ = depth_model()
    batch = batch_with_points()
    far = [1e3 * torch.ones(1, 3), torch.zeros(0, 3)]
    loss = model(**dict(batch, targets=replace(batch['targets'], lidar_points=far)), return_loss=True)['loss_depth']
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in model.loss_depth.parameters())


def test_predictions_do_not_know_of_it():
    model, plain = depth_model()
    batch = sample_of(small_batch(TASK, 1, with_labels=False), 0)
    model.loss_depth.forward = None
    ours, theirs = (one.eval()(**batch, return_loss=False)[0] for one in (model, plain))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_weights_with_and_without_it_fit_either_model(tmp_path, capsys):
    model, plain = depth_model()
    path = str(tmp_path / 'with.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    other = small_model(TASK)
    load_model_weights(other, path)
    assert f'{path}: 4 tensors that only training uses are left out (loss_depth)' in capsys.readouterr().out
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in other.state_dict().items())
    path = str(tmp_path / 'without.pth')
    torch.save(dict(state_dict=plain.state_dict()), path)
    before = model.loss_depth.head[0].weight.clone()
    load_model_weights(model, path)
    assert torch.equal(model.loss_depth.head[0].weight, before) and not capsys.readouterr().out
    torch.save(dict(state_dict=dict(plain.state_dict(), stray=torch.zeros(1))), path)
    with pytest.raises(CheckpointError, match=r'1 unexpected \(stray\)'):
        load_model_weights(model, path)


def test_a_batch_without_points_is_a_sentence():
    model, _ = depth_model()
    with pytest.raises(DataError, match='loss_depth needs LiDAR points.*lidar_points=True of LoadOccGTFromFile'):
        model(**small_batch(TASK), return_loss=True)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(level=4), r'level must be one of 0..3'),
        (dict(num_bins=1), 'num_bins at least 2'),
        (dict(depth_range=[0.0, 60.0]), 'depth_range must be'),
        (dict(embed_dims=8), "unknown key 'embed_dims'"),
        (dict(levle=1), "unknown key 'levle'; did you mean 'level'"),
    ],
)
def test_wrong_configs_are_a_sentence(wrong, message):
    with pytest.raises(ConfigError, match=message) as caught:
        depth_model(**wrong)
    assert '\n' not in str(caught.value)


def test_a_name_that_would_not_count_is_a_sentence():
    losses = dict(depth=dict(type='LidarDepthLoss'))
    with pytest.raises(ConfigError, match="auxiliary_losses.depth: names of losses begin with 'loss_'"):
        build_model(dict(small_config(), auxiliary_losses=losses), TASK)
