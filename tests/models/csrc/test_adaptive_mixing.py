"""Adaptive mixing: the PyTorch reference against loops; the kernel, emulated and on a GPU, against it."""

import ctypes
import math

import pytest
import torch
from kernel_emulation import DTYPES, compile_harness

from models import csrc
from models.csrc.adaptive_mixing import adaptive_mix, adaptive_mix_reference

# (p_in, p_out) of the full model's stages, and sizes that fill no tile.
SIZES = [(8, 32), (16, 64), (32, 128), (32, 32), (12, 20), (5, 8), (4, 2)]

# Outputs are normalised, so of size 1. float32: sums of at most 64 products, twice. Narrow types: the kernel
# rounds its result once; it is compared with float64 on the same inputs.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def make_inputs(in_points, out_points, items=(3, 2), width=64, dtype=torch.float64, device='cpu'):
    generator = torch.Generator().manual_seed(in_points * 1000 + out_points)
    sampled = torch.randn(*items, in_points, width, generator=generator, dtype=torch.float64)
    per_group = width * width + out_points * in_points
    generated = torch.randn(*items[:-1], items[-1] * per_group, generator=generator, dtype=torch.float64)
    return sampled.to(device, dtype), generated.to(device, dtype)


def mix_slowly(sampled, generated, out_points):
    """One query and group: sampled [p_in, W], generated [W*W + p_out*p_in], as nested loops."""
    x, numbers = sampled.tolist(), generated.tolist()
    in_points, width = len(x), len(x[0])
    matrix = [numbers[row * width : (row + 1) * width] for row in range(width)]
    points = [numbers[width * width + row * in_points :][:in_points] for row in range(out_points)]
    return normalised_relu(product(points, normalised_relu(product(x, matrix))))


def product(left, right):
    return [[sum(a * b for a, b in zip(row, column)) for column in zip(*right)] for row in left]


def normalised_relu(rows):
    values = [value for row in rows for value in row]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
    return [[max(0.0, (value - mean) / deviation) for value in row] for row in rows]


def test_reference_equals_nested_loops():
    sampled, generated = make_inputs(3, 4, items=(2, 2), width=5)
    result = adaptive_mix(sampled, generated, 4)
    assert result.shape == (2, 2, 4, 5)
    for query in range(2):
        for group in range(2):
            numbers = generated[query].view(2, -1)[group]
            expected = torch.tensor(mix_slowly(sampled[query, group], numbers, 4), dtype=torch.float64)
            torch.testing.assert_close(result[query, group], expected, rtol=0, atol=1e-12)


def test_reference_gradients():
    sampled, generated = make_inputs(3, 4, items=(1, 2), width=2)
    assert torch.autograd.gradcheck(
        lambda *inputs: adaptive_mix(*inputs, 4), (sampled.requires_grad_(), generated.requires_grad_())
    )


def test_autocast_is_off_inside():
    sampled, generated = make_inputs(4, 4, width=8, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = adaptive_mix(sampled, generated, 4)
    assert torch.equal(result, adaptive_mix(sampled, generated, 4))


def test_no_queries():
    sampled, generated = make_inputs(8, 32, items=(0, 4))
    assert adaptive_mix(sampled, generated, 32).shape == (0, 4, 32, 64)


def test_bad_arguments_raise_one_sentence():
    sampled, generated = make_inputs(4, 4, width=8)
    with pytest.raises(ValueError, match=r'generated must be \[3, 176\] \(for p_out = 6\) but is \[3, 160\]'):
        adaptive_mix(sampled, generated, 6)
    with pytest.raises(TypeError, match='must have one float dtype but are torch.float64 and torch.float32'):
        adaptive_mix(sampled, generated.float(), 4)
    with pytest.raises(ValueError, match='generated must be on the device of sampled, cpu, but is on meta'):
        adaptive_mix(sampled, generated.to('meta'), 4)
    with pytest.raises(ValueError, match=r'sampled must be \[..., G, p_in, W\]'):
        adaptive_mix(sampled[0, 0], generated, 4)


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    return compile_harness('mixing_harness.cpp', tmp_path_factory.mktemp('emulation'))


def emulate(library, sampled, generated, out_points, size, descending=False, tensor_cores=False):
    """What adaptive_mixing.h's function does, with one of the kernel's three compiled sizes."""
    in_points = sampled.shape[-2]
    output = sampled.new_full(sampled.shape[:-2] + (out_points, 64), float('nan'))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (sampled, generated, output)]
    kind = 4 if tensor_cores else DTYPES.index(sampled.dtype)
    failed = library.run(kind, size, *pointers, sampled[..., 0, 0].numel(), in_points, out_points, int(descending))
    assert not failed, library.last_error().decode()
    return output


@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('in_points, out_points', SIZES)
def test_emulated_kernel(library, in_points, out_points, dtype):
    sampled, generated = make_inputs(in_points, out_points, dtype=dtype)
    size = 0 if in_points <= 8 and out_points <= 32 else 1 if in_points <= 16 and out_points <= 64 else 2
    result = emulate(library, sampled, generated, out_points, size)
    expected = adaptive_mix_reference(sampled.double(), generated.double(), out_points)
    assert (result.double() - expected).abs().max() < TOLERANCES[dtype]


@pytest.mark.parametrize('descending', [False, True])
@pytest.mark.parametrize('in_points, out_points', SIZES)
def test_emulated_tensor_cores(library, in_points, out_points, descending):
    sampled, generated = make_inputs(in_points, out_points, dtype=torch.float16)
    size = 2 if in_points > 16 or out_points > 64 else 1 if out_points > 32 else 0
    result = emulate(library, sampled, generated, out_points, size, descending, tensor_cores=True)
    expected = adaptive_mix_reference(sampled.double(), generated.double(), out_points)
    assert (result.double() - expected).abs().max() < TOLERANCES[torch.float16]


@pytest.mark.parametrize('size, descending', [(1, False), (2, False), (0, True), (2, True)])
def test_emulated_kernel_larger_than_needed_or_in_descending_order(library, size, descending):
    sampled, generated = make_inputs(7, 24, dtype=torch.float32)
    result = emulate(library, sampled, generated, 24, size, descending)
    expected = adaptive_mix_reference(sampled, generated, 24)
    assert (result - expected).abs().max() < TOLERANCES[torch.float32]


def test_emulated_kernel_passes_on_what_is_not_a_number(library):
    sampled, generated = make_inputs(8, 32, items=(2, 1), dtype=torch.float32)
    sampled[0, 0, 3, 5] = float('nan')
    result = emulate(library, sampled, generated, 32, 0)
    assert result[0].isnan().all() and result[1].isfinite().all()


needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or csrc.find_kernels('_adaptive_mixing', torch.device('cuda')) is None,
    reason='needs a CUDA device and the compiled operators',
)


@needs_kernels
@pytest.mark.parametrize('triton', [True, False])
@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('in_points, out_points', SIZES)
def test_cuda_kernel(in_points, out_points, dtype, triton, monkeypatch):
    if not triton:
        monkeypatch.setattr('models.csrc.adaptive_mixing.has_triton', lambda device: False)
    sampled, generated = make_inputs(in_points, out_points, items=(301, 4), dtype=dtype, device='cuda')
    result = adaptive_mix(sampled, generated, out_points)
    expected = adaptive_mix_reference(sampled.double(), generated.double(), out_points)
    assert result.dtype == dtype and result.shape == expected.shape
    assert (result.double() - expected).abs().max() < TOLERANCES[dtype]
    assert torch.equal(result, adaptive_mix(sampled, generated, out_points))


@needs_kernels
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('in_points, out_points', [(64, 256), (64, 128), (48, 192)])
def test_cuda_sizes_of_sixteen_frames(in_points, out_points, dtype, monkeypatch):
    """In 16 bits one kernel, with gradients as well."""
    sampled, generated = make_inputs(in_points, out_points, items=(301, 4), dtype=dtype, device='cuda')
    expected = adaptive_mix_reference(sampled.double(), generated.double(), out_points)
    monkeypatch.setattr('models.csrc.adaptive_mixing.adaptive_mix_reference', None)
    result = adaptive_mix(sampled.requires_grad_(), generated.requires_grad_(), out_points)
    assert (result.double() - expected).abs().max() < TOLERANCES[dtype]
    result.float().square().sum().backward()
    assert sampled.grad.isfinite().all() and generated.grad.isfinite().all()


@needs_kernels
def test_cuda_training_takes_the_reference():
    sampled, generated = make_inputs(8, 32, dtype=torch.float32, device='cuda')
    result = adaptive_mix(sampled.requires_grad_(), generated, 32)
    result.sum().backward()
    assert sampled.grad.shape == sampled.shape


@needs_kernels
@pytest.mark.parametrize('width, in_points, out_points', [(32, 8, 32), (64, 40, 32), (64, 8, 130), (64, 3, 3)])
def test_cuda_other_sizes_take_the_reference(width, in_points, out_points):
    sampled, generated = make_inputs(in_points, out_points, width=width, dtype=torch.float32, device='cuda')
    result = adaptive_mix(sampled, generated, out_points)
    expected = adaptive_mix_reference(sampled.double(), generated.double(), out_points)
    # The reference's own float32 products, possibly by TF32-free cuBLAS in another order.
    assert (result.double() - expected).abs().max() < 1e-4


@needs_kernels
@pytest.mark.parametrize('in_points, out_points', [(8, 32), (12, 20), (32, 128)])
def test_cuda_sanitize_mixing(in_points, out_points):
    sampled, generated = make_inputs(in_points, out_points, items=(5, 2), dtype=torch.float32, device='cuda')
    expected = adaptive_mix_reference(sampled.double(), generated.double(), out_points)
    assert (adaptive_mix(sampled, generated, out_points).double() - expected).abs().max() < 2e-5
