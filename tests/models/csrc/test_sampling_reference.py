"""The PyTorch reference of the sampling operators against nested loops; gradients; bad arguments."""

import pytest
import torch
from sampling_cases import Case, choose_view, make_inputs, sample_multi_view_slowly, store_frames
from torch.autograd import gradcheck

from models.csrc.msmv_sampling import sample_multi_view
from models.csrc.msmv_sampling.reference import locate_points, published_weight_groups, spread_level_weights

CASES = [
    Case(),
    Case(frames=8, groups=4, points=1, queries=3, levels=2, channels=3, seed=1),
    Case(frames=2, cameras=1, groups=3, points=4, levels=1, channels=5, seed=2),
    Case(batch=1, frames=1, cameras=6, groups=1, levels=5, image=(64, 96), seed=3),
]
TINY = Case(batch=1, frames=2, cameras=2, queries=3, levels=2, points=1, channels=2, image=(12, 16), seed=4)


@pytest.mark.parametrize('published_weight_order', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_equals_nested_loops(case, published_weight_order):
    inputs = make_inputs(case)
    expected = sample_multi_view_slowly(*inputs, published_weight_order=published_weight_order)
    result = sample_multi_view(*inputs, published_weight_order=published_weight_order)
    assert result.shape == expected.shape and result.dtype == torch.float64
    # Double precision, sums of at most 4 x 5 products of numbers below 1.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_cases_cover_seen_unseen_and_several_views():
    inputs = make_inputs(CASES[0])
    located = locate_points(inputs.points, inputs.ego2img, inputs.image_size, inputs.num_cameras)
    inside = ((located.uv > 0) & (located.uv < 1)).all(-1)
    assert 0.2 < inside.double().mean() < 0.95
    assert len(located.views.unique()) == inputs.num_cameras
    matrices = inputs.ego2img[0, :3].tolist()
    seen = [
        sum(is_seen(point, matrix, inputs.image_size) for matrix in matrices)
        for point in inputs.points[0].reshape(-1, 3).tolist()
    ]
    assert {0, 1, 2} <= set(seen)


def is_seen(point, matrix, image_size):
    _, u, v = choose_view(point, [matrix], image_size)
    return 0 < u < 1 and 0 < v < 1


def test_slot_uses_the_weights_of_the_published_group():
    """Quirk kept for released weights: slot (t, g) takes the level weights of group (t*G + g) // T."""
    frames, groups = 8, 4
    expected = [[(t * groups + g) // frames for t in range(frames)] for g in range(groups)]
    assert published_weight_groups(frames, groups).tolist() == expected
    assert expected[0][7] == 3 and expected[3][0] == 0  # not the group's own
    logits = torch.randn(1, 2, groups, 1, 5)
    weights = spread_level_weights(logits, frames, published_weight_order=True)
    assert torch.equal(weights[0, 1, 0, 7], logits.softmax(-1)[0, 1, 3])


def test_gradients():
    inputs = make_inputs(TINY).requiring_grad()

    def sample(points, logits, *features):
        return sample_multi_view(features, points, inputs.ego2img, logits, inputs.image_size, 2)

    assert gradcheck(sample, (inputs.points, inputs.level_logits, *inputs.features))


def test_only_points_want_a_gradient():
    inputs = make_inputs(Case(seed=7))
    points = inputs.points.clone().requires_grad_()
    sample_multi_view(*inputs._replace(points=points)).sum().backward()
    assert points.grad.abs().max() > 0


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_narrow_features_do_not_move_the_samples(dtype, tolerance):
    """Positions and sums stay in float32: what is left is the rounding of the maps' type (values below 1)."""
    inputs = make_inputs(Case(seed=8)).to(features=dtype, geometry=torch.float32)
    result = sample_multi_view(*inputs)
    assert result.dtype == dtype
    exact = sample_multi_view(*inputs.to(features=torch.float64, geometry=torch.float64))
    assert (result.double() - exact).abs().max() < tolerance


def test_autocast_leaves_the_geometry_alone():
    inputs = make_inputs(Case(seed=9)).to(features=torch.float32, geometry=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = sample_multi_view(*inputs)
    assert torch.equal(result, sample_multi_view(*inputs))


def test_channels_first_maps_seen_through_a_permutation():
    inputs = make_inputs(Case(seed=10))
    first = [f.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for f in inputs.features]
    assert not first[0].is_contiguous()
    assert torch.equal(sample_multi_view(*inputs._replace(features=first)), sample_multi_view(*inputs))


def test_no_queries():
    inputs = make_inputs(Case(queries=0)).requiring_grad()
    result = sample_multi_view(*inputs)
    assert result.shape == (2, 0, 2, 6, 8)
    result.sum().backward()
    assert inputs.points.grad.shape == inputs.points.shape
    assert all(feature.grad.abs().max() == 0 for feature in inputs.features)


def test_points_outside_every_image_give_zero():
    inputs = make_inputs(Case(seed=11))
    high = inputs.points.clone()
    high[..., 2] = 1000
    inputs = inputs._replace(points=high).requiring_grad()
    result = sample_multi_view(*inputs)
    assert result.abs().max() == 0
    result.sum().backward()
    assert inputs.points.grad.abs().max() == 0


def test_points_that_are_not_numbers_give_zero():
    inputs = make_inputs(Case(seed=12))
    assert sample_multi_view(*inputs._replace(points=inputs.points * float('nan'))).abs().max() == 0


def bad_arguments():
    """(inputs, error, part of the sentence)."""
    good = make_inputs(Case()).to(features=torch.float32, geometry=torch.float32)
    maps = good.features
    with_maps = lambda features: good._replace(features=features)  # noqa: E731
    return [
        (with_maps(maps[0]), TypeError, 'features must be a list'),
        (with_maps([]), ValueError, 'features must hold at least one'),
        (with_maps([f[0] for f in maps]), ValueError, r'features\[0\] must be \[B, T\*N'),
        (with_maps(maps[:2] + [maps[2].half()]), TypeError, r'features\[2\] .*float16'),
        (with_maps(maps[:2] + [maps[2][:1]]), ValueError, r'features\[2\] must have'),
        (with_maps([f.int() for f in maps]), TypeError, r'features\[0\] must be a float'),
        (with_maps([f[..., :15] for f in maps]), ValueError, 'groups must divide the 15'),
        (with_maps([f.to('meta') for f in maps]), ValueError, 'points must be on the device'),
        (good._replace(points=good.points[..., :2]), ValueError, r'points must be \[B, Q, G, P, 3\]'),
        (good._replace(points=good.points[:1]), ValueError, 'points must be .* B = 2'),
        (good._replace(points=good.points.tolist()), TypeError, 'points must be a float.* but is a list'),
        (good._replace(points=good.points.int()), TypeError, 'points must be a float.*int32'),
        (good._replace(ego2img=good.ego2img[:, :3]), ValueError, r'ego2img must be \[2, 9, 4, 4\] but is'),
        (good._replace(level_logits=good.level_logits[..., :2]), ValueError, r'must be \[2, 7, 2, 2, 3\]'),
        (good._replace(image_size=(0, 48)), ValueError, 'image_size must be'),
        (good._replace(num_cameras=4), ValueError, 'num_cameras must divide the 9 images'),
    ]


@pytest.mark.parametrize('inputs, error, sentence', bad_arguments())
def test_bad_arguments_raise_one_sentence(inputs, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        sample_multi_view(*inputs)
    assert '\n' not in str(caught.value)


def test_stored_frames_in_another_order():
    inputs = make_inputs(Case(seed=13))
    stored, index = store_frames(inputs)
    assert torch.equal(sample_multi_view(*stored, frame_index=index), sample_multi_view(*inputs))
    leaves = stored.requiring_grad()
    sample_multi_view(*leaves, frame_index=index).sum().backward()
    grad = leaves.features[0].grad.abs().sum((0, 2, 3, 4)).view(5, inputs.num_cameras).sum(1)
    assert (grad > 0).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    'index, error, sentence',
    [
        ([0, 1, 5], ValueError, r'frame_index must lie in 0\.\.4, the stored frames, but spans 0\.\.5'),
        ([0, -1, 2], ValueError, r'spans -1\.\.2'),
        ([0, 1], ValueError, r'ego2img must be \[2, 6, 4, 4\]'),
        ([0.0, 1.0, 2.0], TypeError, r'int64 tensor \[T\] .* but is torch.float32 \[3\]'),
        ([[0, 1, 2]], TypeError, r'is torch.int64 \[1, 3\]'),
        ([], TypeError, 'T at least 1'),
    ],
)
def test_bad_frame_index_raises_one_sentence(index, error, sentence):
    stored, _ = store_frames(make_inputs(Case()))
    with pytest.raises(error, match=sentence):
        sample_multi_view(*stored, frame_index=torch.tensor(index))
