"""The sparse voxel decoder: splitting, keeping in candidate order, resolutions, grids it refuses."""

import pytest
import torch
from small_model import small_batch, small_config, small_model, small_task

from lib.errors import ConfigError
from models import build_model
from models.decoders.layers import DecoderSizes, DistanceAttention
from models.decoders.sparse_voxel_decoder import SparseVoxelDecoder, _take, top_in_order


def test_top_k_keeps_the_candidate_order():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.5], [5.0, 1.0, 4.0, 2.0, 3.0]])
    assert top_in_order(scores, 3).tolist() == [[1, 3, 4], [0, 2, 4]]
    assert top_in_order(scores, 9).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize('count, k', [(1024, 500), (700, 20), (512, 511), (3, 1)])
def test_the_best_are_in_index_order_also_among_ties(count, k):
    torch.manual_seed(count)
    for scores in (torch.rand(2, count), torch.rand(2, count).mul(20).round()):
        result = top_in_order(scores, k)
        assert torch.equal(result, scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values)


def test_children_follow_their_parent_in_the_published_order():
    model = small_model(topk_training=[10**6] * 3, topk_testing=[10**6] * 3)
    decoder = model.pts_bbox_head.transformer.voxel_decoder
    stage = decoder._split_and_keep(0, torch.zeros(1, 6, 32), decoder.start.unsqueeze(0))
    assert decoder.start.tolist() == [[x, y, 0] for x in (0, 8) for y in (0, 8, 16)]
    steps = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
    expected = [[c // 4 + s for c, s in zip(corner, step)] for corner in decoder.start.tolist() for step in steps]
    assert stage.coords[0].tolist() == expected and stage.scale == 4


@pytest.mark.parametrize('scoring, classes', [('semantic', 5), ('occupancy', 4)])
def test_stages_have_the_documented_shapes_and_cover_the_grid(scoring, classes):
    task = small_task()
    model = small_model(task, scoring).eval()
    batch = small_batch(task, 2, with_labels=False)
    with torch.no_grad():
        stages = model.predict_raw(**batch).output.stages
    for stage, kept, scale in zip(stages, (20, 60, 200), (4, 2, 1)):
        assert stage.scale == scale and stage.coords.shape == (2, kept, 3)
        assert stage.seg_logits.shape == (2, kept, classes) and stage.features.shape == (2, kept, 32)
        assert (stage.coords >= 0).all() and (stage.coords < torch.tensor(task.grid_shape) // scale).all()
        assert len(torch.unique(stage.coords[0], dim=0)) == kept
        assert (stage.occ_logits is not None) == (scoring == 'occupancy')


def test_kept_voxels_are_the_best_scored():
    model = small_model(topk_testing=[7, 60, 200]).eval()
    batch = small_batch(model.task, 1, with_labels=False)
    decoder = model.pts_bbox_head.transformer.voxel_decoder
    with torch.no_grad():
        kept = model.predict_raw(**batch).output.stages[0]
        decoder.topk_testing = (10**6, 60, 200)
        every = model.predict_raw(**batch).output.stages[0]
    occupied = 1 - every.seg_logits[0].softmax(-1)[:, -1]
    best = occupied.argsort(descending=True)[:7].sort().values
    assert torch.equal(kept.coords[0], every.coords[0, best])


@pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])
def test_a_threshold_keeps_what_is_likely_enough_and_k_at_most(scoring):
    model = small_model(scoring=scoring, topk_testing=[10**6, 60, 200]).eval()
    batch = small_batch(model.task, 1, with_labels=False)
    with torch.no_grad():
        every = model.predict_raw(**batch).output.stages[0]
        score = every.occ_logits[0].sigmoid() if scoring == 'occupancy' else 1 - every.seg_logits[0].softmax(-1)[:, -1]
        threshold = float(score.sort().values[20:22].mean())  # between two of them, out of rounding's reach
        changed = small_model(scoring=scoring, topk_testing=[10**6, 60, 200], keep_threshold=threshold).eval()
        kept = changed.predict_raw(**batch).output.stages
    expected = every.coords[0, score >= threshold]
    assert 0 < len(expected) < len(score) and torch.equal(kept[0].coords[0], expected)
    assert kept[1].coords.shape[1] <= 60 and changed.predict(**batch)[0]['occ_loc'].shape[1] <= 200
    decoder = changed.pts_bbox_head.transformer.voxel_decoder
    assert decoder._how_many(0, score.new_full((1, 9), -100.0)) == 1 and decoder.train()._how_many(1, score) == 60


def test_a_threshold_is_refused_where_it_cannot_work():
    with pytest.raises(ConfigError, match='keep_threshold must be a probability .* got 1.5'):
        small_model(keep_threshold=1.5)
    model = small_model(keep_threshold=0.5).eval()
    with pytest.raises(ConfigError, match='the batch has 2; give one sample at a time'):
        model.predict(**small_batch(model.task, 2, with_labels=False))
    config = dict(small_config(keep_threshold=0.5), test_cfg=dict(cuda_graph=True))
    with pytest.raises(ConfigError, match='cuda_graph replays work of one size'):
        build_model(config, small_task())


def test_features_are_detached_between_stages_but_not_after_the_last():
    model = small_model()
    batch = small_batch(model.task, 1, with_labels=False)
    stages = model.pts_bbox_head(model.encoder(batch['img'], batch['lidar2img'], batch['ego2lidar'])).stages
    stages[1].seg_logits.sum().backward(retain_graph=True)
    layers = model.pts_bbox_head.transformer.voxel_decoder.decoder_layers
    assert layers[0].ffn.layers[1].weight.grad is None and layers[1].ffn.layers[1].weight.grad is not None
    stages[2].features.sum().backward()
    assert layers[2].ffn.layers[1].weight.grad is not None


def test_a_grid_that_cannot_be_halved_three_times_is_refused():
    task = small_task(point_cloud_range=[-4.0, -5.0, -1.0, 4.0, 5.0, 3.0])
    with pytest.raises(ConfigError, match='16x20x8 voxels .* multiple of 8'):
        SparseVoxelDecoder(DecoderSizes(task, embed_dims=32), [9] * 3, [9] * 3, 'semantic')


def test_attention_bias_is_minus_tau_times_plane_distance():
    torch.manual_seed(0)
    layer = DistanceAttention(16, num_heads=8, dropout=0.0).eval()
    query, positions = torch.randn(2, 9, 16), torch.rand(2, 9, 3) * 10
    ours = layer(query, positions)
    weights = layer.attention.attn
    tau = layer.gen_tau(query)
    expected = torch.zeros_like(query)
    for b in range(2):
        q, k, v = (query[b] @ weights.in_proj_weight.t() + weights.in_proj_bias).split(16, dim=-1)
        heads = []
        for h in range(8):
            part = slice(2 * h, 2 * h + 2)
            distance = (positions[b, :, None, :2] - positions[b, None, :, :2]).norm(dim=-1)
            logits = q[:, part] @ k[:, part].t() / 2**0.5 - tau[b, :, h, None] * distance
            heads.append(logits.softmax(-1) @ v[:, part])
        expected[b] = query[b] + weights.out_proj(torch.cat(heads, -1))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # float32, additions in another order


def test_initial_reach_and_offsets():
    torch.manual_seed(0)
    fresh = build_model(small_config(), small_task()).pts_bbox_head.transformer
    tau = fresh.voxel_decoder.decoder_layers[0].self_attn.gen_tau
    assert not tau.weight.detach().any() and 0 <= tau.bias.min() < 1 < tau.bias.max() <= 2
    for layer in fresh.voxel_decoder.decoder_layers:
        offset = layer.sampling.sampling_offset
        assert not offset.weight.detach().any()
        assert -0.5 <= offset.bias.min() < -0.2 and 0.2 < offset.bias.max() <= 0.5
    offset = fresh.decoder.decoder_layer.sampling.offset
    assert not offset.weight.detach().any() and not offset.bias.detach().any()


def test_attention_that_saves_memory_has_the_same_result_and_gradients():
    results = []
    for save_memory in (False, True):
        torch.manual_seed(0)
        layer = DistanceAttention(16, num_heads=8, dropout=0.3, save_memory=save_memory)
        query, positions = torch.randn(2, 9, 16, requires_grad=True), torch.rand(2, 9, 3) * 10
        out = layer(query, positions)
        out.square().sum().backward()
        results.append([out, query.grad, layer.gen_tau.weight.grad])
    (kept, *gradients), (remade, *others) = results
    assert torch.equal(kept, remade)  # dropout repeats, too
    for mine, other in zip(gradients, others):  # PyTorch 1.10 adds them up in another order
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('chunk', [0, 16])
def test_mixing_chunk_decides_what_is_made_again_in_the_backward_pass(chunk):
    transformer = small_model(mixing_chunk=chunk).pts_bbox_head.transformer
    first, *_, last = transformer.voxel_decoder.decoder_layers
    assert first.mixing.chunk == last.mixing.chunk == chunk
    assert first.self_attn.save_memory == bool(chunk) and last.self_attn is None


def test_kept_rows_and_their_gradients_are_those_of_gather():
    torch.manual_seed(0)
    values = torch.randn(2, 30, 4, dtype=torch.float64)
    index = torch.stack([torch.randperm(30)[:12] for _ in range(2)])
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    taken = _take(ours, index)
    expected = theirs.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    assert torch.equal(taken, expected)
    for result in (taken, expected):
        (result * result).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
