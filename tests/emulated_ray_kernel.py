"""The CUDA ray caster compiled for the CPU and called on CPU tensors: launch, indices and samples, without a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / 'lib' / 'raycast' / 'csrc'
LAUNCH = 'cast_rays_kernel<<<blocks, kThreads, 0, stream>>>(grid, arrays);'

RUNTIME = """
#pragma once
#define __global__
#define __launch_bounds__(...)
#define __restrict__
typedef int cudaError_t;
typedef void* cudaStream_t;
struct cudaFuncAttributes {};
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
constexpr cudaError_t cudaSuccess = 0;
static dim3 blockIdx, threadIdx;
template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename... Arguments>
void emulate(void (*kernel)(Arguments...), dim3 blocks, int threads, Arguments... arguments) {
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < static_cast<unsigned>(threads); ++threadIdx.x) kernel(arguments...);
}
"""
ENTRY = """
extern "C" int cast_rays(raycast::RayArrays arrays, const int* size, const double* lower, double voxel_size) {
  raycast::Grid grid;
  for (int a = 0; a < 3; ++a) { grid.size[a] = size[a]; grid.lower_m[a] = lower[a]; }
  grid.voxel_size_m = static_cast<float>(voxel_size);
  return raycast::launch_cast_rays(grid, arrays, nullptr);
}
"""
Pointer, Int = ctypes.c_void_p, ctypes.c_int


class RayArrays(ctypes.Structure):
    """``struct RayArrays`` of ray_cast.h."""

    _fields_ = [
        ('semantics', Pointer),
        ('num_samples', Int),
        ('num_volumes', Int),
        ('free_id', Int),
        ('origins', Pointer),
        ('num_origins', Pointer),
        ('max_origins', Int),
        ('directions', Pointer),
        ('num_directions', Int),
        ('label', Pointer),
        ('voxel', Pointer),
        ('distance', Pointer),
    ]


class EmulatedExtension:
    """Stands for the compiled module ``raycast_cuda``."""

    def __init__(self, folder: Path):
        compiler = shutil.which('g++')
        if compiler is None:
            pytest.skip('needs g++')
        source = (CSRC / 'ray_cast_cuda.cu').read_text()
        assert LAUNCH in source
        emulated = source.replace(LAUNCH, 'emulate(cast_rays_kernel, blocks, kThreads, grid, arrays);')
        (folder / 'cuda_runtime_api.h').write_text(RUNTIME)
        (folder / 'kernel.cpp').write_text(emulated + ENTRY)
        options = ['-O2', '-ffp-contract=off', '-std=c++14', '-shared', '-fPIC', f'-I{folder}', f'-I{CSRC}']
        command = [compiler, *options, str(folder / 'kernel.cpp'), '-o', str(folder / 'kernel.so')]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(folder / 'kernel.so'))

    def cast_rays(self, semantics, free_id, origins, num_origins, directions, lower_corner, voxel_size):
        """As the binding in ray_cast.cpp."""
        samples, volumes, *size = semantics.shape
        shape = (samples, volumes, origins.shape[1] * len(directions))
        out = [torch.zeros(shape, dtype=dtype) for dtype in (torch.uint8, torch.int32, torch.float32)]
        arrays = RayArrays(
            semantics.data_ptr(),
            samples,
            volumes,
            free_id,
            origins.data_ptr(),
            num_origins.data_ptr(),
            origins.shape[1],
            directions.data_ptr(),
            len(directions),
            *(tensor.data_ptr() for tensor in out),
        )
        lower = (ctypes.c_double * 3)(*lower_corner)
        assert self._library.cast_rays(arrays, (Int * 3)(*size), lower, ctypes.c_double(voxel_size)) == 0
        return tuple(out)
