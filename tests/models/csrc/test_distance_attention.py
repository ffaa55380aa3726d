"""Attention with distances: the PyTorch reference against loops; the kernel, emulated and on a GPU, against it."""

import ctypes
import math

import pytest
import torch
from kernel_emulation import compile_harness

from models import csrc
from models.csrc.distance_attention import distance_attention, distance_attention_reference, plane_distance

# Results are means of values of size 1. float32 logits reach 60 before the largest is taken away, and their
# rounding, 4e-6, is that of the weights; the square root and the power of two add as much again.
TOLERANCE = 3e-5


def make_inputs(batch, queries, heads=2, width=32, shared_positions=False, dtype=torch.float64, device='cpu'):
    """Blocks on a plane of 80 m, reaches from -0.1 to 2 per metre."""
    generator = torch.Generator().manual_seed(queries)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parts = torch.randn(batch, queries, 3, heads, width, generator=generator, dtype=torch.float64)
    positions = rand(1 if shared_positions else batch, queries, 3) * 80 - 40
    return [tensor.to(device, dtype) for tensor in (parts, rand(batch, queries, heads) * 2.1 - 0.1, positions)]


def attend_slowly(parts, reach, positions):
    """One sample, as nested loops: parts [Q, 3, H, D], reach [Q, H], positions [Q, 3] -> [Q, H*D]."""
    count, _, heads, width = parts.shape
    result = torch.zeros(count, heads, width, dtype=parts.dtype)
    for query in range(count):
        for head in range(heads):
            logits = []
            for key in range(count):
                dx, dy = (positions[query, :2] - positions[key, :2]).tolist()
                product = float(parts[query, 0, head] @ parts[key, 1, head])
                logits.append(product / math.sqrt(width) - float(reach[query, head]) * math.hypot(dx, dy))
            weights = torch.tensor([math.exp(logit - max(logits)) for logit in logits], dtype=parts.dtype)
            result[query, head] = (weights / weights.sum()) @ parts[:, 2, head]
    return result.flatten(1)


@pytest.mark.parametrize('shared_positions', [False, True])
def test_reference_equals_nested_loops(shared_positions):
    parts, reach, positions = make_inputs(2, 11, heads=3, width=4, shared_positions=shared_positions)
    result = distance_attention(parts, reach, positions)
    for b in range(2):
        expected = attend_slowly(parts[b], reach[b], positions[0 if shared_positions else b].float())
        # double but for the distances, which are float32: relative 1e-7 of logits up to 200
        torch.testing.assert_close(result[b], expected, rtol=0, atol=1e-4)


def test_reference_gradients():
    parts, reach, positions = make_inputs(1, 5, width=3)
    assert torch.autograd.gradcheck(
        lambda *inputs: distance_attention(*inputs, positions), (parts.requires_grad_(), reach.requires_grad_())
    )


def test_autocast_is_off_inside():
    parts, reach, positions = make_inputs(1, 9, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = distance_attention(parts, reach, positions)
    assert torch.equal(result, distance_attention(parts, reach, positions))


def test_narrow_types():
    parts, reach, positions = make_inputs(1, 9, dtype=torch.float32)
    narrow = distance_attention(parts.bfloat16(), reach.bfloat16(), positions)
    assert narrow.dtype == torch.bfloat16
    # bfloat16 has 8 bits; results are of size 1
    assert (narrow.float() - distance_attention(parts, reach, positions)).abs().max() < 0.1


def test_dropout():
    parts, reach, positions = make_inputs(1, 9)
    dropped = distance_attention_reference(parts, reach, positions, dropout=0.5)
    assert not torch.allclose(dropped, distance_attention(parts, reach, positions))


def test_distances_are_in_the_ground_plane():
    positions = torch.tensor([[[0.0, 0.0, 9.0], [3.0, 4.0, 0.0], [3.0, 0.0, 5.0]]])
    assert plane_distance(positions)[0].tolist() == [[0, 5, 3], [5, 0, 4], [3, 4, 0]]


def test_bad_arguments_raise_one_sentence():
    parts, reach, positions = make_inputs(2, 5)
    with pytest.raises(ValueError, match=r'parts must be \[B, Q, 3, H, D\] but is \[5, 3, 2, 32\]'):
        distance_attention(parts[0], reach, positions)
    with pytest.raises(ValueError, match=r'reach must be \[2, 5, 2\] but is \[2, 5, 1\]'):
        distance_attention(parts, reach[..., :1], positions)
    with pytest.raises(ValueError, match=r'positions must be \[2 or 1, 5, 2 or more\] but is \[2, 5, 1\]'):
        distance_attention(parts, reach, positions[..., :1])
    with pytest.raises(TypeError, match='must have one float dtype'):
        distance_attention(parts, reach.float(), positions)
    with pytest.raises(ValueError, match='positions must be on the device of parts, cpu, but is on meta'):
        distance_attention(parts, reach, positions.to('meta'))


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    return compile_harness('attention_harness.cpp', tmp_path_factory.mktemp('emulation'))


def emulate(library, parts, reach, positions, descending=False):
    """What distance_attention.h's function does."""
    batch, queries, _, heads, width = parts.shape
    output = parts.new_full((batch, queries, heads * width), float('nan'))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (parts, reach, positions, output)]
    stride = 0 if positions.shape[0] == 1 else positions.stride(0)
    failed = library.run(*pointers, batch, queries, heads, positions.shape[2], ctypes.c_int64(stride), int(descending))
    assert not failed, library.last_error().decode()
    return output


SIZES = [(1, 64, False), (2, 1, False), (2, 70, True), (1, 130, False)]


@pytest.mark.parametrize('descending', [False, True])
@pytest.mark.parametrize('batch, queries, shared_positions', SIZES)
def test_emulated_kernel(library, batch, queries, shared_positions, descending):
    inputs = make_inputs(batch, queries, shared_positions=shared_positions, dtype=torch.float32)
    result = emulate(library, *inputs, descending=descending)
    expected = distance_attention_reference(*[tensor.double() for tensor in inputs])
    assert (result.double() - expected).abs().max() < TOLERANCE


def test_emulated_kernel_passes_on_what_is_not_a_number(library):
    parts, reach, positions = make_inputs(2, 66, dtype=torch.float32)
    parts[0, 65, 0, 1, 7] = float('nan')  # one query of the first sample's second head
    result = emulate(library, parts, reach, positions)
    broken = result.isnan()
    assert broken[0, 65, 32:].all() and broken.sum() == 32


needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or csrc.find_kernels('_distance_attention', torch.device('cuda')) is None,
    reason='needs a CUDA device and the compiled operators',
)


@needs_kernels
@pytest.mark.parametrize('batch, queries, shared_positions', SIZES + [(1, 1250, True), (2, 2000, False), (1, 0, True)])
def test_cuda_kernel(batch, queries, shared_positions):
    inputs = make_inputs(batch, queries, 8, shared_positions=shared_positions, dtype=torch.float32, device='cuda')
    result = distance_attention(*inputs)
    assert result.shape == (batch, queries, 256)
    if not queries:
        return
    expected = distance_attention_reference(*[tensor.double() for tensor in inputs])
    assert (result.double() - expected).abs().max() < TOLERANCE
    assert torch.equal(result, distance_attention(*inputs))


@needs_kernels
def test_cuda_training_takes_the_reference():
    parts, reach, positions = make_inputs(1, 20, dtype=torch.float32, device='cuda')
    distance_attention(parts.requires_grad_(), reach, positions).sum().backward()
    assert parts.grad.shape == parts.shape


@needs_kernels
@pytest.mark.parametrize('width', [16, 64])
def test_cuda_other_widths_take_the_reference(width):
    inputs = make_inputs(1, 20, width=width, dtype=torch.float32, device='cuda')
    expected = distance_attention_reference(*[tensor.double() for tensor in inputs])
    assert (distance_attention(*inputs).double() - expected).abs().max() < 1e-4  # PyTorch's own float32 attention


@needs_kernels
@pytest.mark.parametrize('queries', [5, 64, 70])
def test_cuda_sanitize_attention(queries):
    inputs = make_inputs(2, queries, dtype=torch.float32, device='cuda')
    expected = distance_attention_reference(*[tensor.double() for tensor in inputs])
    assert (distance_attention(*inputs).double() - expected).abs().max() < TOLERANCE
