"""Compiles the CUDA kernels for the CPU (see emulation/cuda_emulation.h) and calls them on CPU tensors."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / 'models' / 'csrc'
MAX_LEVELS = 16
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Pointer = ctypes.c_void_p


def compile_harness(source: str, folder: Path) -> ctypes.CDLL:
    """Build ``emulation/<source>`` into a folder and load it; the test skips where there is no C++ compiler."""
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('needs g++')
    library = folder / (source + '.so')
    include = Path(torch.__file__).parent / 'include'
    options = ['-std=c++17', '-O1', '-ffp-contract=off', '-w', '-shared', '-fPIC']
    subprocess.run(
        [compiler, *options, f'-I{CSRC}', f'-I{include}', str(HERE / 'emulation' / source), '-o', str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.last_error.restype = ctypes.c_char_p
    return loaded


class SamplingCall(ctypes.Structure):
    """``struct Call`` of sampling_harness.cpp."""

    _fields_ = [
        ('dtype', ctypes.c_int32),
        ('vector', ctypes.c_int32),
        ('descending', ctypes.c_int32),
        ('published_weight_order', ctypes.c_int32),
        ('enough_warps', ctypes.c_int64),
        ('shape', ctypes.c_int32 * 8),
        ('stored_frames', ctypes.c_int32),
        ('height', ctypes.c_double),
        ('width', ctypes.c_double),
        ('points', Pointer),
        ('ego2img', Pointer),
        ('level_logits', Pointer),
        ('frame_index', Pointer),
        ('features', Pointer * MAX_LEVELS),
        ('strides', ctypes.c_int64 * 4 * MAX_LEVELS),
        ('sizes', ctypes.c_int32 * 2 * MAX_LEVELS),
        ('output', Pointer),
        ('grad_output', Pointer),
        ('grad_features', Pointer * MAX_LEVELS),
        ('slot_grad_point', Pointer),
        ('slot_grad_weight', Pointer),
        ('grad_points', Pointer),
        ('grad_logits', Pointer),
    ]


class EmulatedSampling:
    """The kernels' side of ``models.csrc.msmv_sampling``, with msmv_sampling.h's functions.

    Tensors have the layouts that header asks for, on the CPU. ``descending`` runs the threads of a block in
    descending order, ``vector`` chooses 16-byte accesses, ``enough_warps`` how many slots a warp gets.
    """

    def __init__(self, library: ctypes.CDLL, vector: bool = True, descending: bool = False, enough_warps: int = 0):
        self.library, self.vector = library, vector
        self.descending, self.enough_warps = descending, enough_warps

    def sample_multi_view_forward(
        self, features, points, ego2img, level_logits, frame_index, height, width, num_cameras, published_weight_order
    ):
        call, shape = self._prepare(
            features, points, ego2img, level_logits, height, width, num_cameras, published_weight_order
        )
        if frame_index.numel():
            call.frame_index = frame_index.data_ptr()
        return self._forward(call, shape, features)

    def sample_multi_view_backward(
        self,
        grad_output,
        features,
        points,
        ego2img,
        level_logits,
        height,
        width,
        num_cameras,
        published_weight_order,
        wants_geometry,
        grad_features,
    ):
        call, shape = self._prepare(
            features, points, ego2img, level_logits, height, width, num_cameras, published_weight_order
        )
        batch, queries, groups, frames, per_group, _, levels, _ = shape
        slots = (batch, frames, groups, queries, per_group)
        grads = [torch.full_like(tensor, float('nan')) for tensor in (points, level_logits)]
        scratch = [points.new_full(slots + (size,), float('nan')) for size in (3, levels)]
        if not wants_geometry:
            return self._backward(call, grad_output, features, [None, None], grad_features)
        call.slot_grad_point, call.slot_grad_weight = scratch[0].data_ptr(), scratch[1].data_ptr()
        call.grad_points, call.grad_logits = grads[0].data_ptr(), grads[1].data_ptr()
        return self._backward(call, grad_output, features, grads, grad_features)

    def _prepare(self, features, points, ego2img, level_logits, height, width, num_cameras, published_weight_order):
        batch, queries, groups, per_group, _ = points.shape
        frames = ego2img.shape[1] // num_cameras
        call, shape = self._call(features, (batch, queries, groups, frames, per_group), num_cameras)
        call.points, call.ego2img, call.level_logits = [t.data_ptr() for t in (points, ego2img, level_logits)]
        call.height, call.width, call.published_weight_order = height, width, published_weight_order
        return call, shape

    def _call(self, features, sizes, num_cameras):
        shape = tuple(sizes) + (num_cameras, len(features), features[0].shape[4] // sizes[2])
        call = SamplingCall(
            dtype=DTYPES.index(features[0].dtype),
            vector=1 + self.vector,
            descending=self.descending,
            enough_warps=self.enough_warps,
        )
        call.shape[:] = shape
        call.stored_frames = features[0].shape[1] // num_cameras
        for level, feature in enumerate(features):
            assert feature.stride(4) == 1
            call.features[level] = feature.data_ptr()
            call.strides[level][:] = feature.stride()[:4]
            call.sizes[level][:] = feature.shape[2:4]
        return call, shape

    def _forward(self, call, shape, features):
        batch, queries, groups, frames, per_group, _, _, channels = shape
        output = features[0].new_full((batch, queries, groups, frames * per_group, channels), float('nan'))
        call.output = output.data_ptr()
        self._run(call)
        return output

    def _backward(self, call, grad_output, features, grads, grad_features):
        assert grad_output.is_contiguous() and grad_output.dtype == features[0].dtype
        call.grad_output = grad_output.data_ptr()
        real = torch.float64 if features[0].dtype == torch.float64 else torch.float32
        for level, grad in enumerate(grad_features):
            assert grad.is_contiguous() and grad.dtype == real and grad.shape == features[level].shape
            call.grad_features[level] = grad.data_ptr()
        self._run(call)
        return grads

    def _run(self, call):
        if self.library.run(ctypes.byref(call)):
            raise RuntimeError(self.library.last_error().decode())
