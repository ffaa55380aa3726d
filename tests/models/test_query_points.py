"""Where the decoders look: points in metres from queries, blocks and masks."""

import torch
from small_model import small_task

from models.decoders.draws import EvenDraws
from models.decoders.layers import BlockSampling, DecoderSizes, MaskGuidedSampling
from models.encoder import ImageFeatures


def capture_points(module, monkeypatch, *args):
    """Points and level logits that the module hands to the sampling op."""
    seen = {}

    def fake(maps, points, ego2img, level_logits, image_size, num_cameras, published_weight_order, **_):
        seen.update(points=points, level_logits=level_logits, published=published_weight_order)
        return points.new_zeros(points.shape[:3] + (1, 1))

    monkeypatch.setattr('models.decoders.layers.sample_multi_view', fake)
    module(*args, ImageFeatures([], torch.zeros(1, 1, 4, 4), (64, 96)))
    return seen


def test_block_points_are_offsets_in_blocks_from_the_centre(monkeypatch):
    torch.manual_seed(0)
    module = BlockSampling(DecoderSizes(small_task(), 16, num_groups=2, num_points=3))
    query, centres = torch.randn(2, 5, 16), torch.randn(2, 5, 3)
    seen = capture_points(module, monkeypatch, query, centres, 1.6)
    offsets = module.sampling_offset(query)
    for g in range(2):
        for p in range(3):
            start = (g * 3 + p) * 3
            expected = centres + 1.6 * offsets[..., start : start + 3]
            torch.testing.assert_close(seen['points'][:, :, g, p], expected)
    logits = module.scale_weights(query)
    assert torch.equal(seen['level_logits'][:, :, 1, 2], logits[..., 20:24])
    assert seen['published']


def test_mask_points_have_no_half_voxel_shift_and_span_the_range(monkeypatch):
    torch.manual_seed(0)
    task = small_task()
    module = MaskGuidedSampling(DecoderSizes(task, 16, num_groups=2, num_points=2))
    voxels = torch.stack([torch.randint(0, n, (1, 30)) for n in task.grid_shape], dim=-1)
    valid = torch.rand(1, 3, 30) < 0.5
    valid[:, 2] = False
    query = torch.randn(1, 3, 16)
    seen = capture_points(module, monkeypatch, query, valid, voxels, EvenDraws())
    points, offsets = seen['points'].reshape(3, 4, 3), module.offset(query).view(3, 4, 3)
    low, grid = torch.tensor(task.point_cloud_range[:3]), torch.tensor(task.grid_shape)
    for q in range(2):
        mask = voxels[0][valid[0, q]]
        for j in range(4):
            voxel = mask[int((j + 0.5) / 4 * len(mask))]
            expected = (voxel + offsets[q, j]) * task.voxel_size + low
            torch.testing.assert_close(points[q, j], expected, rtol=1e-5, atol=1e-5)  # float32, other order
    anywhere = EvenDraws().positions(1, 1, 4, torch.device('cpu'))[0, 0]
    expected = (anywhere * grid + offsets[2]) * task.voxel_size + low
    torch.testing.assert_close(points[2], expected, rtol=1e-5, atol=1e-5)


def test_without_guidance_points_come_from_the_whole_volume(monkeypatch):
    """The mask says nothing then, and a query with a mask looks where one without would."""
    torch.manual_seed(0)
    task = small_task()
    sizes = DecoderSizes(task, 16, num_groups=2, num_points=2)
    guided, free = MaskGuidedSampling(sizes), MaskGuidedSampling(sizes, guided=False)
    free.load_state_dict(guided.state_dict())
    voxels, query = torch.zeros(1, 30, 3, dtype=torch.int64), torch.randn(1, 3, 16)
    masks = dict(full=torch.ones(1, 3, 30, dtype=torch.bool), empty=torch.zeros(1, 3, 30, dtype=torch.bool))
    seen = {
        (name, mask): capture_points(module, monkeypatch, query, valid, voxels, EvenDraws())['points']
        for name, module in (('guided', guided), ('free', free))
        for mask, valid in masks.items()
    }
    assert torch.equal(seen['free', 'full'], seen['guided', 'empty'])
    assert torch.equal(seen['free', 'full'], seen['free', 'empty'])
    assert not torch.equal(seen['guided', 'full'], seen['guided', 'empty'])


def test_published_weight_order_pairs_slots_with_other_groups():
    """With T = 2, G = 4 the slot (frame t, group g) takes the level weights of group (t*4 + g) // 2."""
    torch.manual_seed(0)
    task = small_task()
    features = ImageFeatures(
        [torch.randn(1, 6, 8 >> level, 12 >> level, 16) for level in range(3)],
        torch.tensor([[30.0, 0, 48, 0], [0, 30, 32, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).expand(1, 6, 4, 4),
        task.image_size,
    )
    published, plain = (
        BlockSampling(DecoderSizes(task, 16, num_points=1, num_levels=3, published_weight_order=order))
        for order in (True, False)
    )
    plain.load_state_dict(published.state_dict())
    torch.nn.init.zeros_(plain.scale_weights.weight)
    torch.nn.init.zeros_(published.scale_weights.weight)
    bias = torch.randn(4, 3) * 3
    query, centres = torch.randn(1, 5, 16), torch.rand(1, 5, 3) + torch.tensor([0.0, 0.0, 2.0])
    published.scale_weights.bias.data = bias.flatten()
    ours = published(query, centres, 0.4, features)
    for t in range(2):
        for g in range(4):
            plain.scale_weights.bias.data = bias[(t * 4 + g) // 2].repeat(4)
            expected = plain(query, centres, 0.4, features)
            assert torch.equal(ours[:, :, g, t], expected[:, :, g, t])
    assert ours.abs().sum() > 0
