"""The CUDA sampling kernels, compiled for the CPU and run by emulation, against the PyTorch reference.

This is the kernels' own source; only CUDA's built-ins are replaced. What it cannot show is how the code
behaves in parallel on a GPU and how fast it is: see test_sampling_cuda.py and tools/benchmark_operators.py.
"""

import gc
import weakref

import pytest
import torch
from kernel_emulation import EmulatedSampling, compile_harness
from sampling_cases import Case, Inputs, make_inputs, store_frames
from torch.autograd import gradcheck

from models.csrc.msmv_sampling import GradientSum, SampleMultiView
from models.csrc.msmv_sampling.reference import locate_points, sample_multi_view_reference

# Of results of size 1 to 10. Both sides sum the same products in float32 (in another order) and round once.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

CASES = [
    Case(channels=8),
    Case(channels=64, queries=3, points=1, frames=8, groups=4, cameras=2, levels=4, seed=1),
    Case(channels=20, queries=20, batch=1, levels=1, seed=2),
    Case(channels=32, queries=9, cameras=1, levels=5, seed=3),
    Case(channels=6, queries=30, batch=1, groups=3, points=3, seed=4),
    Case(channels=136, queries=5, batch=1, groups=1, levels=2, seed=5),
]

TINY = Case(batch=1, frames=2, cameras=2, queries=3, levels=2, points=1, channels=2, image=(12, 16), seed=9)


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    return compile_harness('sampling_harness.cpp', tmp_path_factory.mktemp('emulation'))


IN_ORDER = torch.empty(0, dtype=torch.int64)


def fused(kernels, inputs, published=True, frame_index=IN_ORDER, gradient_sum=None):
    return SampleMultiView.apply(
        kernels,
        inputs.points,
        inputs.ego2img,
        inputs.level_logits,
        frame_index,
        inputs.image_size,
        inputs.num_cameras,
        published,
        gradient_sum and gradient_sum.sums,
        *inputs.features,
    )


def compare_with_gradients(run, expected_run, inputs, tolerance):
    """Result and gradients of every leaf of the inputs."""
    ours, theirs = inputs.requiring_grad(), inputs.requiring_grad()
    result, expected = run(ours), expected_run(theirs)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result.backward(grad.to(result.dtype))
    expected.backward(grad.to(result.dtype))
    for a, b in zip(
        [ours.points, ours.level_logits, *ours.features], [theirs.points, theirs.level_logits, *theirs.features]
    ):
        scale = max(1.0, float(b.grad.abs().max()))
        assert (a.grad.double() - b.grad.double()).abs().max() <= tolerance * scale


@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('case', CASES, ids=lambda case: f'channels{case.channels}')
def test_fused_kernels(library, case, dtype):
    vector = 16 // torch.empty(0, dtype=dtype).element_size()
    kernels = EmulatedSampling(library, vector=case.channels % vector == 0)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs(case).to(features=dtype, geometry=geometry)
    compare_with_gradients(
        lambda i: fused(kernels, i), lambda i: sample_multi_view_reference(*i), inputs, TOLERANCES[dtype]
    )


def test_stored_frames_in_another_order(library):
    inputs = make_inputs(Case(channels=8, frames=3, seed=7)).to(features=torch.float32, geometry=torch.float32)
    expected = fused(EmulatedSampling(library), inputs)
    stored, index = store_frames(inputs)
    assert torch.equal(fused(EmulatedSampling(library), stored, frame_index=index), expected)
    with pytest.raises(RuntimeError, match='stored_frames'):
        fused(EmulatedSampling(library), stored, frame_index=index + 1)


@pytest.mark.parametrize('options', [dict(vector=False), dict(descending=True), dict(enough_warps=10**9)], ids=str)
@pytest.mark.parametrize('published', [True, False])
def test_other_schedules_and_weight_order(library, options, published):
    kernels = EmulatedSampling(library, **options)
    inputs = make_inputs(Case(channels=8, queries=25, frames=4, seed=6)).to(
        features=torch.float32, geometry=torch.float32
    )
    compare_with_gradients(
        lambda i: fused(kernels, i, published),
        lambda i: sample_multi_view_reference(*i, published_weight_order=published),
        inputs,
        2e-5,
    )


def test_float32_views_are_chosen_as_in_the_reference(library):
    """Bit for bit, since every step of the projection rounds alike."""
    inputs = points_on_a_border(500).to(features=torch.float32, geometry=torch.float32)
    located = locate_points(inputs.points, inputs.ego2img, inputs.image_size, inputs.num_cameras)
    assert 0.1 < located.views.double().mean() < 0.9
    result = fused(EmulatedSampling(library), inputs)[..., 0].reshape(located.views.shape)
    assert torch.equal(result.round().long(), located.views)


def points_on_a_border(count):
    """A point per sample, on camera 0's border but for rounding; camera 1 sees all. Maps hold the camera."""
    generator = torch.Generator().manual_seed(7)
    points = (torch.rand(count, 1, 1, 1, 3, generator=generator) * 80 - 40).double()
    rows = torch.rand(count, 3, generator=generator).double()
    ego2img = torch.zeros(count, 2, 4, 4, dtype=torch.float64)
    ego2img[:, :, 0, 3] = ego2img[:, :, 1, 3] = 5.0
    ego2img[:, :, 2, 3] = ego2img[:, :, 3, 3] = 1.0
    ego2img[:, 0, 0, :3] = rows
    ego2img[:, 0, 0, 3] = 10 - (rows * points[:, 0, 0, 0]).sum(-1)
    features = torch.arange(2.0).double().view(1, 2, 1, 1, 1).expand(count, 2, 3, 3, 4).contiguous()
    return Inputs([features], points, ego2img, torch.zeros(count, 1, 1, 1, 1).double(), (10, 10), 2)


def test_no_gradient_through_the_clamped_depth(library):
    """A point behind camera 0, which no camera sees, but whose clamped projection falls in the image."""
    inputs = make_inputs(TINY)
    inputs.ego2img[..., :3, :] = torch.tensor([[16e-5, 0, 0, 8e-5], [0, 12e-5, 0, 6e-5], [1, 1, 1, -99]])
    inputs = inputs._replace(points=torch.rand_like(inputs.points) - 0.5)
    compare_with_gradients(
        lambda i: fused(EmulatedSampling(library, vector=False), i),
        lambda i: sample_multi_view_reference(*i),
        inputs,
        1e-12,
    )


def test_gradcheck(library):
    kernels = EmulatedSampling(library, vector=False)
    inputs = make_inputs(TINY).requiring_grad()

    def sample(points, logits, *features):
        return fused(kernels, inputs._replace(points=points, level_logits=logits, features=features))

    # The kernels sum in a fixed order here, so no tolerance for atomics is needed.
    assert gradcheck(sample, (inputs.points, inputs.level_logits, *inputs.features))


def test_strided_maps(library):
    """Channels last, but every other dimension with a stride of its own."""
    inputs = make_inputs(Case(channels=8, seed=10)).to(features=torch.float32, geometry=torch.float32)
    strided = []
    for feature in inputs.features:
        batch, images, height, width, channels = feature.shape
        padded = torch.full((height, images, batch, width + 1, channels + 4), float('nan'))
        view = padded.permute(2, 1, 0, 3, 4)[:, :, :, :width, :channels]
        strided.append(view.copy_(feature))
    result = fused(EmulatedSampling(library), inputs._replace(features=strided))
    assert torch.equal(result, fused(EmulatedSampling(library), inputs))


def gradients_of_two_samplings(kernels, inputs, summed, others, at_the_end=False):
    """Of the features, from two samplings at different points and, with ``others``, from something else as well."""
    leaves = [feature.clone().requires_grad_() for feature in inputs.features]
    gradient_sum = GradientSum([leaf * 1 for leaf in leaves], at_the_end) if summed else None
    maps = gradient_sum.features if summed else [leaf * 1 for leaf in leaves]
    results = [
        fused(kernels, inputs._replace(features=maps, points=inputs.points + shift), gradient_sum=gradient_sum)
        for shift in (0.0, 0.3)
    ]
    total = sum((result * result.detach()).sum() for result in results)
    (total + sum(level.sum() for level in maps) * others).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize('others', [0.0, 1.0])
@pytest.mark.parametrize('at_the_end', [False, True])
def test_gradients_of_several_samplings_are_summed_in_place(library, others, at_the_end):
    kernels, inputs = EmulatedSampling(library), make_inputs(Case(seed=12))
    expected = gradients_of_two_samplings(kernels, inputs, summed=False, others=others)
    for ours, theirs in zip(gradients_of_two_samplings(kernels, inputs, True, others, at_the_end), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # double; the order of additions


def test_sums_of_half_precision_are_more_precise_than_their_parts(library):
    """Summed in float32 and rounded once; by themselves both samplings' gradients and their sum are rounded."""
    kernels, inputs = EmulatedSampling(library, vector=False), make_inputs(Case(seed=12))
    narrow = inputs.to(features=torch.bfloat16, geometry=torch.float32)
    wide = narrow._replace(features=[feature.float() for feature in narrow.features])
    exact = gradients_of_two_samplings(kernels, wide, summed=False, others=0.0)
    ours, theirs = [gradients_of_two_samplings(kernels, narrow, summed, 0.0) for summed in (True, False)]
    errors = [sum((a.float() - b).norm() for a, b in zip(grads, exact)) for grads in (ours, theirs)]
    assert errors[0] < errors[1] and ours[0].dtype == torch.bfloat16
    later = gradients_of_two_samplings(kernels, narrow, True, 0.0, at_the_end=True)  # sample by sample
    assert len(narrow.points) > 1 and all(torch.equal(a, b) for a, b in zip(later, ours))


@pytest.mark.parametrize('at_the_end', [False, True])
def test_a_second_backward_pass_starts_from_zero(library, at_the_end):
    kernels, inputs = EmulatedSampling(library), make_inputs(Case(seed=13))
    leaf = inputs.features[0].clone().requires_grad_()
    gradient_sum = GradientSum([leaf * 1, *inputs.features[1:]], at_the_end)
    result = fused(kernels, inputs._replace(features=gradient_sum.features), gradient_sum=gradient_sum).sum()
    first, second = [torch.autograd.grad(result, leaf, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second)


def test_sums_are_freed_with_the_graph(library):
    kernels, inputs = EmulatedSampling(library), make_inputs(Case(seed=13))
    gradient_sum = GradientSum([feature.clone().requires_grad_() * 1 for feature in inputs.features])
    result = fused(kernels, inputs._replace(features=gradient_sum.features), gradient_sum=gradient_sum)
    known = weakref.ref(gradient_sum.features[0])
    gc.disable()  # a cycle would keep gigabytes until it is collected
    try:
        del gradient_sum, result
        assert known() is None
    finally:
        gc.enable()


def test_only_what_is_wanted_is_computed(library):
    inputs = make_inputs(Case(seed=11))
    kernels = EmulatedSampling(library)
    points = inputs.points.clone().requires_grad_()
    fused(kernels, inputs._replace(points=points)).sum().backward()
    assert torch.isfinite(points.grad).all()
    features = [feature.clone().requires_grad_() for feature in inputs.features]
    fused(kernels, inputs._replace(features=features)).sum().backward()
    expected = [feature.clone().requires_grad_() for feature in inputs.features]
    sample_multi_view_reference(*inputs._replace(features=expected)).sum().backward()
    for ours, theirs in zip(features, expected):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
