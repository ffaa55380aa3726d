// What the binding needs from the CUDA side: plain pointers only, so that nvcc need not parse PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "traversal.h"

namespace raycast {

// Raised by one whenever a signature or a layout below changes; lib/raycast/gpu.py checks it.
constexpr int kInterfaceVersion = 1;

// Whether this build holds code for the current device's architecture.
bool runs_on_current_device();

// Device pointers to row-major arrays.
struct RayArrays {
  const uint8_t* semantics;  // [V, X, Y, Z]
  int num_volumes;           // V, at most 8
  int free_id;
  const double* origins;    // [O, 3] metres
  int num_origins;
  const float* directions;  // [R, 3] metres
  int num_directions;
  const int* rays;          // [M], o * R + r
  int num_rays;
  uint8_t* label;           // [V, M] out
  int* voxel;               // [V, M] out, row-major index
  float* distance;          // [V, M] out, metres
};

// Casts the rays on `stream` of the current device.
cudaError_t launch_cast_rays(const Grid& grid, const RayArrays& arrays, cudaStream_t stream);

}  // namespace raycast
