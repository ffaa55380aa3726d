// What the binding needs from the CUDA side: plain pointers only, so that nvcc need not parse PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "traversal.h"

namespace raycast {

// Raised by one whenever a signature or a layout below changes; lib/raycast/__init__.py checks it.
constexpr int kInterfaceVersion = 2;

// Whether this build holds code for the current device's architecture.
bool runs_on_current_device();

// Device pointers to row-major arrays.
struct RayArrays {
  const uint8_t* semantics;  // [S, V, X, Y, Z]
  int num_samples;           // S
  int num_volumes;           // V, at most 8
  int free_id;
  const double* origins;    // [S, O, 3] metres
  const int* num_origins;   // [S], origins that each sample has
  int max_origins;          // O
  const float* directions;  // [R, 3] metres
  int num_directions;       // R
  uint8_t* label;           // [S, V, O * R] out
  int* voxel;               // [S, V, O * R] out, row-major index
  float* distance;          // [S, V, O * R] out, metres
};

// Casts the rays on `stream` of the current device.
cudaError_t launch_cast_rays(const Grid& grid, const RayArrays& arrays, cudaStream_t stream);

}  // namespace raycast
