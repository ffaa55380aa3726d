"""The compiled sampling operators on a GPU against the PyTorch reference on the same GPU and against float64.

A small part of them is for compute-sanitizer, with PyTorch's caching of memory off so that every tensor has
borders that can be overstepped:
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python -m pytest tests/models/csrc -k sanitize -q
(and ``--tool racecheck``). Needs the operators built: cd models/csrc && python setup.py build_ext --inplace
"""

import pytest
import torch
from sampling_cases import Case, make_inputs, store_frames
from torch.autograd import gradcheck

from lib.extension import Extension
from models import csrc
from models.csrc.msmv_sampling import sample_multi_view
from models.csrc.msmv_sampling.reference import sample_multi_view_reference


@pytest.fixture(scope='module', autouse=True)
def built_operators():
    if not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')
    if csrc.find_kernels('_msmv_sampling', torch.device('cuda')) is None:
        pytest.skip('needs the compiled operators: ' + csrc.BUILD_COMMAND)


# Of the largest expected value. Kernel and reference sum the same float32 products in another order (the
# maps' gradients by atomic additions), then round once to the type of the features.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

CHANNELS = [8, 20, 32, 64, 6]
SANITIZE_CASES = [
    Case(channels=8, queries=5),
    Case(channels=6, queries=33, levels=1, batch=1),
    Case(channels=64, queries=9, batch=1, levels=4),
]


def real_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_gpu(case, dtype=torch.float32):
    return make_inputs(case).to(device='cuda', features=dtype, geometry=real_of(dtype))


def assert_near(result, expected, dtype, what):
    assert result.dtype == expected.dtype and result.shape == expected.shape, what
    scale = max(1.0, float(expected.detach().double().abs().max())) if expected.numel() else 1.0
    difference = (result.double() - expected.double()).abs().max() if expected.numel() else 0.0
    assert difference <= TOLERANCES[dtype] * scale, f'{what} differs by {difference:g} of {scale:g}'


def compare(run, run_reference, inputs, dtype):
    """Result and the gradients of features, points and level logits."""
    ours, theirs = inputs.requiring_grad(), inputs.requiring_grad()
    result, expected = run(ours), run_reference(theirs)
    assert_near(result, expected, dtype, 'result')
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    result.backward(grad)
    expected.backward(grad)
    assert_near(ours.points.grad, theirs.points.grad, dtype, 'gradient of points')
    assert_near(ours.level_logits.grad, theirs.level_logits.grad, dtype, 'gradient of level_logits')
    for level, (a, b) in enumerate(zip(ours.features, theirs.features)):
        assert_near(a.grad, b.grad, dtype, f'gradient of features[{level}]')


def compare_with_reference(inputs, dtype, published=True):
    compare(
        lambda i: sample_multi_view(*i, published_weight_order=published),
        lambda i: sample_multi_view_reference(*i, published_weight_order=published),
        inputs,
        dtype,
    )


@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('channels', CHANNELS)
def test_cuda_channels(channels, dtype):
    compare_with_reference(on_gpu(Case(channels=channels, queries=101, seed=channels), dtype), dtype)


@pytest.mark.parametrize('levels', [1, 2, 3, 4, 5, 16])
def test_cuda_levels(levels):
    case = Case(channels=16, levels=levels, queries=50, image=(128, 128), seed=levels)
    compare_with_reference(on_gpu(case), torch.float32)


@pytest.mark.parametrize('published', [True, False])
def test_cuda_weight_order(published):
    case = Case(frames=8, groups=4, points=1, channels=16, queries=50)
    compare_with_reference(on_gpu(case), torch.float32, published)


def test_cuda_one_camera():
    compare_with_reference(on_gpu(Case(cameras=1, channels=16, queries=50)), torch.float32)


def test_cuda_many_queries():
    """More slots than fit one wave of blocks, and a last tile that is not full."""
    compare_with_reference(
        on_gpu(
            Case(batch=1, frames=8, cameras=6, groups=4, points=4, channels=64, levels=4, queries=1251, image=(64, 176))
        ),
        torch.float32,
    )


def test_cuda_no_queries():
    inputs = on_gpu(Case(queries=0)).requiring_grad()
    result = sample_multi_view(*inputs)
    assert result.shape == (2, 0, 2, 6, 8)
    result.sum().backward()
    assert inputs.points.grad.shape == inputs.points.shape
    assert all(feature.grad.abs().max() == 0 for feature in inputs.features)


def test_cuda_all_points_outside():
    inputs = on_gpu(Case(seed=1))
    inputs.points[..., 2] = 1000
    inputs = inputs.requiring_grad()
    result = sample_multi_view(*inputs)
    assert result.abs().max() == 0
    result.sum().backward()
    assert inputs.points.grad.abs().max() == 0


def test_cuda_points_that_are_not_numbers_give_zero():
    inputs = on_gpu(Case(seed=2))
    inputs.points.fill_(float('nan'))
    assert sample_multi_view(*inputs).abs().max() == 0


def strided_maps(features):
    """Channels last but padded in every dimension, hence 16-byte aligned or not."""
    result = []
    for feature in features:
        batch, images, height, width, channels = feature.shape
        padded = feature.new_full((height, images, batch, width + 1, channels + 3), float('nan'))
        result.append(padded.permute(2, 1, 0, 3, 4)[:, :, :, :width, :channels].copy_(feature))
    return result


def test_cuda_strided_maps_are_read_in_place():
    inputs = on_gpu(Case(channels=8, queries=50, seed=3))
    result = sample_multi_view(*inputs._replace(features=strided_maps(inputs.features)))
    assert_near(result, sample_multi_view(*inputs), torch.float32, 'result')


def test_cuda_channels_first_and_non_contiguous_arguments():
    inputs = on_gpu(Case(channels=8, queries=50, seed=4))
    first = [f.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for f in inputs.features]
    points = inputs.points.transpose(1, 3).contiguous().transpose(1, 3)
    logits = inputs.level_logits.transpose(1, 3).contiguous().transpose(1, 3)
    result = sample_multi_view(*inputs._replace(features=first, points=points, level_logits=logits))
    assert torch.equal(result, sample_multi_view(*inputs))


def test_cuda_non_contiguous_output_gradient():
    inputs = on_gpu(Case(channels=8, queries=50, seed=5))
    compare(
        lambda i: sample_multi_view(*i).transpose(1, 2),
        lambda i: sample_multi_view_reference(*i).transpose(1, 2),
        inputs,
        torch.float32,
    )


@pytest.mark.parametrize('channels', [3, 2])
def test_cuda_gradcheck(channels):
    case = Case(batch=1, frames=2, cameras=2, queries=3, levels=2, points=1, channels=channels, image=(12, 16))
    inputs = on_gpu(case, torch.float64).requiring_grad()

    def sample(points, logits, *features):
        return sample_multi_view(features, points, inputs.ego2img, logits, inputs.image_size, 2)

    # Atomic additions may change the last bits from run to run.
    assert gradcheck(sample, (inputs.points, inputs.level_logits, *inputs.features), nondet_tol=1e-12)


def test_cuda_half_features_under_autocast():
    inputs = on_gpu(Case(channels=16, queries=50, seed=6), torch.float16)
    with torch.autocast('cuda'):
        compare_with_reference(inputs, torch.float16)


def test_cuda_mixed_with_double_points():
    inputs = on_gpu(Case(channels=16, queries=50, seed=7))
    inputs = inputs._replace(points=inputs.points.double())
    result = sample_multi_view(*inputs)
    assert result.dtype == torch.float32
    assert_near(
        result,
        sample_multi_view(*inputs.to(features=torch.float64, geometry=torch.float64)).float(),
        torch.float32,
        'result',
    )


def test_cuda_forward_repeats_bit_for_bit():
    inputs = on_gpu(Case(channels=64, queries=200, seed=8))
    first = sample_multi_view(*inputs)
    assert all(torch.equal(sample_multi_view(*inputs), first) for _ in range(3))


def test_cuda_deterministic_training_takes_the_reference():
    inputs = on_gpu(Case(channels=16, queries=200, seed=9))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(3):
            ours = inputs.requiring_grad()
            result = sample_multi_view(*ours)
            assert 'SampleMultiView' not in str(result.grad_fn)
            result.square().sum().backward()
            grads.append([f.grad for f in ours.features])
        assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))
    finally:
        torch.use_deterministic_algorithms(before)


def test_cuda_other_stream():
    inputs = on_gpu(Case(channels=16, queries=200, seed=10))
    expected = sample_multi_view(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = sample_multi_view(*inputs)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('case', SANITIZE_CASES, ids=lambda case: f'channels{case.channels}')
def test_cuda_sanitize_stored_frames(case, dtype):
    """Read where they are, with and without gradients wanted: the bits of the frames in order."""
    inputs = on_gpu(case._replace(frames=3), dtype)
    stored, index = store_frames(inputs)
    with torch.no_grad():
        expected = sample_multi_view(*inputs)
        assert torch.equal(sample_multi_view(*stored, frame_index=index), expected)
    assert torch.equal(sample_multi_view(*stored, frame_index=index), expected)


def test_cuda_graph_capture():
    """Inference as a CUDA graph: the operator neither synchronises nor allocates behind PyTorch's back."""
    inputs = on_gpu(Case(channels=16, queries=200, seed=11))
    sample_multi_view(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sample_multi_view(*inputs)
    inputs.points.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, sample_multi_view(*inputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_cuda_other_device():
    on_cpu = make_inputs(Case(channels=16, queries=50, seed=12))
    on_cpu = on_cpu.to(features=torch.float32, geometry=torch.float32)
    inputs = on_cpu.to(device='cuda:1').requiring_grad()
    assert torch.cuda.current_device() == 0
    result = sample_multi_view(*inputs)
    result.sum().backward()
    assert result.device == inputs.points.grad.device == torch.device('cuda:1')
    assert_near(result.cpu(), sample_multi_view(*on_cpu), torch.float32, 'result')


def test_cuda_arguments_on_two_devices_raise_one_sentence():
    inputs = on_gpu(Case())
    with pytest.raises(ValueError, match='points must be on the device of features.*cuda:0, but is on cpu'):
        sample_multi_view(*inputs._replace(points=inputs.points.cpu()))


def test_cuda_without_the_extension_gives_the_same(monkeypatch):
    inputs = on_gpu(Case(channels=16, queries=20, seed=13))
    expected = sample_multi_view(*inputs)
    monkeypatch.setattr(Extension, 'find', lambda self, device: None)
    assert_near(sample_multi_view(*inputs), expected, torch.float32, 'result')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('case', SANITIZE_CASES, ids=lambda case: f'channels{case.channels}')
def test_cuda_sanitize(case, dtype):
    compare_with_reference(on_gpu(case, dtype), dtype)
