"""Triton's kernels of training against PyTorch's operators: results and gradients."""

import copy

import pytest
import torch
from triton_runs import DEVICE, run_interpreted, runs, without_a_gpu

from models.csrc.adaptive_mixing import adaptive_mix_reference
from models.csrc.distance_attention import plane_distance
from models.encoder.image_input import ImageInput, draw_jitter


@without_a_gpu
def test_by_interpretation_on_the_cpu():
    run_interpreted(__file__)


def distance(ours, theirs):
    """Relative to the norm of the second."""
    return float((ours.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm())


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


# float32: three TF32 products; narrow types: products of rounded values, of which ReLUs let some pass by chance
MIXING_TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 5e-2), torch.bfloat16: (2e-2, 2e-1)}


@runs
@pytest.mark.parametrize('in_points, out_points, width', [(8, 32, 64), (64, 256, 64), (12, 20, 64), (5, 3, 16)])
@pytest.mark.parametrize('dtype', list(MIXING_TOLERANCES), ids=str)
def test_mixing(dtype, in_points, out_points, width):
    if dtype == torch.bfloat16 and DEVICE.type == 'cpu':
        pytest.skip('interpreted products of bfloat16 are wrong (Triton 3.6)')
    if dtype == torch.float32 and in_points > 32:
        pytest.skip('PyTorch computes these')
    from models.csrc.adaptive_mixing.fused import FusedMixing

    torch.manual_seed(in_points)
    x = random(5, in_points, width, dtype=dtype)
    generated = random(5, width * width + out_points * in_points, dtype=dtype)
    grad = random(5, out_points, width, dtype=dtype)
    ours = [tensor.clone().requires_grad_() for tensor in (x, generated)]
    exact = [tensor.double().requires_grad_() for tensor in (x, generated)]
    result = FusedMixing.apply(*ours, out_points, 1e-5)
    expected = adaptive_mix_reference(exact[0].unsqueeze(1), exact[1], out_points).squeeze(1)
    result.backward(grad)
    expected.backward(grad.double())
    of_result, of_gradient = MIXING_TOLERANCES[dtype]
    assert result.dtype == dtype and distance(result, expected) < of_result
    assert all(distance(a.grad, b.grad) < of_gradient for a, b in zip(ours, exact))


@runs
@pytest.mark.parametrize('count', [7, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_mixing_in_pieces(count, dtype, monkeypatch):
    """Pieces of three queries against all at once in double: result, and gradients of features, queries, weights."""
    import models.csrc.adaptive_mixing as mixing
    from models.decoders.layers import AdaptiveMixing

    monkeypatch.setattr(mixing, 'has_triton', lambda *_: True)
    torch.manual_seed(count)
    layer = AdaptiveMixing(64, in_points=6, out_points=5, num_groups=4, chunk=3).to(DEVICE)
    exact = copy.deepcopy(layer).double()
    exact.chunk = 0
    given = random(1, count, 4, 6, 16), random(1, count, 64)
    grad, results = random(1, count, 64), []
    for run, kind in ((layer, torch.float32), (exact, torch.float64)):
        leaves = [value.detach().to(kind).clone().requires_grad_() for value in given]
        with torch.autocast(DEVICE.type, dtype=torch.float16, enabled=dtype != kind and kind != torch.float64):
            mixed = run(*leaves)
        mixed.backward(grad.to(mixed.dtype))
        results.append([mixed - leaves[1], *(leaf.grad for leaf in leaves), *(p.grad for p in run.parameters())])
    of_result, of_gradient = MIXING_TOLERANCES[dtype]
    assert results[0][0].dtype == torch.float32 and all(value.dtype == torch.float32 for value in results[0])
    assert distance(results[0][0], results[1][0]) < of_result
    assert all(distance(a, b) < of_gradient for a, b in zip(*results))


def keeps_weight(keys, count, dropout):
    """Which weights the kernels keep: bool [..., count] for int32 keys [...], one of each query."""
    x = keys.long().bitwise_and(0xFFFFFFFF).unsqueeze(-1)
    x = x ^ (torch.arange(count, device=keys.device) * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = multiply(x ^ (x >> shift), factor)
    return (x ^ (x >> 16)) >> 8 >= int(dropout * 2**24)


def multiply(x, factor):
    """Modulo 2**32, of int64, in halves that do not overflow."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


@runs
@pytest.mark.parametrize('precision, tolerance', [('tf32x3', 1e-5), ('tf32', 5e-3)])
@pytest.mark.parametrize(
    'batch, count, heads, width, shared, dropout',
    [(2, 130, 2, 32, False, 0.0), (2, 64, 2, 16, True, 0.1), (1, 45, 4, 16, False, 0.3)],
)
def test_attention(batch, count, heads, width, shared, dropout, precision, tolerance):
    from models.csrc.distance_attention.fused import FusedAttention

    torch.manual_seed(count)
    parts, reach = random(batch, count, 3, heads, width), torch.rand(batch, count, heads, device=DEVICE) * 0.2
    places = torch.rand(1 if shared else batch, count, 3, device=DEVICE) * 40
    keys = torch.randint(-(2**31), 2**31, reach.shape, dtype=torch.int64).to(DEVICE, torch.int32) if dropout else None
    ours = [tensor.clone().requires_grad_() for tensor in (parts, reach)]
    exact = [tensor.double().requires_grad_() for tensor in (parts, reach)]
    result = FusedAttention.apply(*ours, places, keys, dropout, precision)
    q, k, v = exact[0].permute(2, 0, 3, 1, 4)
    fall = exact[1].transpose(1, 2).unsqueeze(-1) * plane_distance(places).double().unsqueeze(1)
    weights = (q @ k.transpose(-1, -2) * width**-0.5 - fall).softmax(-1)
    if dropout:
        weights = weights * keeps_weight(keys, count, dropout).transpose(1, 2) / (1 - dropout)
    expected = (weights @ v).transpose(1, 2).flatten(2)
    grad = random(*result.shape)
    result.backward(grad)
    expected.backward(grad.double())
    assert distance(result, expected) < tolerance
    assert all(distance(a.grad, b.grad) < tolerance for a, b in zip(ours, exact))


@pytest.mark.parametrize('dropout', [0.1, 0.5])
def test_dropout_has_its_rate_in_rows_and_columns(dropout):
    """Rows and columns of 2000 draws each: five standard deviations; neighbours are not alike."""
    keys = torch.randint(-(2**31), 2**31, (2000,), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    dropped = ~keeps_weight(keys.to(torch.int32), 2000, dropout)
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert abs(dropped.double().mean() - dropout) < 5 * deviation / 2000
    for shares in (dropped.double().mean(0), dropped.double().mean(1)):
        assert (shares - dropout).abs().max() < 5 * deviation / 2000**0.5
    both = (dropped[:, 1:] & dropped[:, :-1]).double().mean()
    assert abs(both - dropout**2) < 5 * dropout / 2000


@runs
@pytest.mark.parametrize('to_rgb', [True, False])
@pytest.mark.parametrize('jittered', [True, False])
def test_image_input(jittered, to_rgb, monkeypatch):
    """Without jitter to the bit, so that inference does not depend on Triton; with it to a rounding of 255 values."""
    layer = ImageInput([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], to_rgb, 32, color_aug=True).to(DEVICE)
    layer.train(jittered)
    monkeypatch.setattr('models.encoder.image_input.has_triton', lambda *_: False)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 20, 40), dtype=torch.uint8).to(DEVICE)
    images[0, :, :3], images[1, 1] = 7, images[1, 0]
    torch.manual_seed(1)
    expected = layer(images, samples=2)
    torch.manual_seed(1)
    result = layer._prepare_fused(images, draw_jitter(2, 6, DEVICE) if jittered else None)
    assert result.shape == expected.shape and result.is_contiguous(memory_format=torch.channels_last)
    if not jittered:
        assert torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@runs
@pytest.mark.parametrize('to_rgb, height, width', [(True, 20, 40), (False, 20, 40), (True, 21, 39)])
def test_images_as_squares(to_rgb, height, width, monkeypatch):
    """To the bit what two passes give, padded images among them, and such of odd sizes."""
    from models.encoder.kernels import gather_squares

    layer = ImageInput([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], to_rgb, 32, color_aug=True).to(DEVICE)
    images = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8).to(DEVICE)
    assert layer.as_squares(images) is None  # in training
    layer.eval()
    monkeypatch.setattr('models.encoder.image_input.has_triton', lambda *_: True)
    assert layer.as_squares(images.float()) is None
    assert torch.equal(layer.as_squares(images), gather_squares(layer._prepare_fused(images, None)))


@runs
@pytest.mark.parametrize('channels, height, width', [(64, 8, 12), (20, 7, 9), (64, 1, 5)])
def test_pooling(channels, height, width):
    from models.encoder.kernels import max_pool

    torch.manual_seed(channels)
    x = random(2, channels, height, width).contiguous(memory_format=torch.channels_last)
    x[0, 1, -1, 3] = float('nan')
    result, expected = max_pool(x), torch.nn.functional.max_pool2d(x, 3, 2, 1)
    assert result.shape == expected.shape and result.is_contiguous(memory_format=torch.channels_last)
    assert result.isnan().any() and torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(0), expected.nan_to_num(0))


@runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('channels', [256, 20])
def test_levels_of_the_neck(channels, dtype, monkeypatch):
    """To the bit, rounding included; sums of four values to a rounding."""
    import models.encoder.fused as fused
    from models.encoder.kernels import add_to_level, sum_squares

    monkeypatch.setattr(fused, 'has_triton', lambda *_: False)
    torch.manual_seed(channels)
    level, coarse = [
        random(2, channels, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for size in ((6, 10), (3, 5))
    ]
    bias = random(channels, dtype=dtype)
    for above in (coarse, None):
        ours = add_to_level(level.clone(memory_format=torch.preserve_format), above, bias)
        expected = fused.add_to_level(level.clone(memory_format=torch.preserve_format), above, bias)
        assert torch.equal(ours, expected) and ours.is_contiguous(memory_format=torch.channels_last)
    ours, expected = sum_squares(level), fused.add_up(level, coarse.shape)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-3)


@runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('height, width', [(32, 64), (2, 6)])
def test_squares_of_pixels(height, width, dtype):
    from models.encoder.fused import squares_of
    from models.encoder.kernels import gather_squares

    torch.manual_seed(height)
    images = random(3, 3, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    ours, expected = gather_squares(images), squares_of(images.clone().requires_grad_())
    assert torch.equal(ours, expected) and ours.is_contiguous(memory_format=torch.channels_last)


@runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('channels, adds', [(64, False), (20, False), (64, True), (20, True)])
def test_bias_and_relu(channels, adds, dtype):
    from models.encoder.kernels import relu_backward

    torch.manual_seed(channels)
    grad, other, result = [
        random(3, channels, 33, 20, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    ]  # some of the result is 0, or not a number
    result = result.relu()
    result[0, 1, 2, 3] = float('nan')
    ours, of_bias = relu_backward(result, grad, other) if adds else relu_backward(result, grad)
    expected = torch.ops.aten.threshold_backward(grad + other if adds else grad, result, 0)
    assert torch.equal(ours, expected) and ours.is_contiguous(memory_format=torch.channels_last)
    # sums of 2000 float32; rounded to the narrow type at the end
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(of_bias, expected.float().sum((0, 2, 3)).to(dtype), rtol=tolerance, atol=1e-4)


@runs
@pytest.mark.parametrize('saves_memory', [False, True])
def test_stage_of_the_backbone(saves_memory, monkeypatch):
    """Both ways of a block meet in the kernel: against autograd through the same operations."""
    import models.encoder.fused as fused

    def convolve(x, weight, bias, geometry, added=None):
        y = torch.nn.functional.conv2d(x, weight, bias, *geometry)
        return torch.relu(y if added is None else y + added)

    monkeypatch.setattr(fused, '_convolve_relu', convolve)
    monkeypatch.setattr(fused, 'has_triton', lambda *_: True)
    torch.manual_seed(0)
    sizes = [(8, 16, 1), (8, 8, 3), (32, 8, 1), (32, 16, 1), (8, 32, 1), (8, 8, 3), (32, 8, 1)]
    weights = [value for a, b, k in sizes for value in (random(a, b, k, k) * b**-0.5, random(a))]
    geometries = [fused._Geometry([1, 1], [w.shape[2] // 2] * 2, [1, 1], 1) for w in weights[::2]]
    plans = [fused._BlockPlan(geometries[:4], 3), fused._BlockPlan(geometries[4:], 3)]
    given = [random(2, 16, 6, 10), *weights]
    grad, results = random(2, 32, 6, 10), []
    for compute in (
        lambda x, *w: fused._Stage.apply(plans, saves_memory, x, *w),
        lambda x, *w: fused._run_stage(plans, x, w),
    ):
        leaves = [value.clone().requires_grad_() for value in given]
        leaves[0] = given[0].contiguous(memory_format=torch.channels_last).requires_grad_()
        y = compute(*leaves)
        y.backward(grad.contiguous(memory_format=torch.channels_last))
        results.append([y, leaves[0].grad, *(leaf.grad for leaf in leaves[1:])])
    assert all(distance(a, b) < 1e-5 for a, b in zip(*results))
