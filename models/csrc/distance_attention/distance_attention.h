// The compiled attention operator, as models/csrc/distance_attention/ops.py calls it.
#pragma once

#include <ATen/ATen.h>

namespace sparseocc {

// Raised by one whenever a signature or a layout below changes; models/csrc/__init__.py checks it.
constexpr int kInterfaceVersion = 1;

// Whether this build holds code for the current device's architecture.
bool runs_on_current_device();

// All tensors float32 and contiguous, on one CUDA device.
// parts     [B, Q, 3, H, 32] queries, keys and values; at a multiple of 16 bytes
// reach     [B, Q, H] per metre
// positions [B or 1, Q, 2 or more] metres
// returns   [B, Q, H*32]; no gradient
at::Tensor distance_attention(const at::Tensor& parts, const at::Tensor& reach, const at::Tensor& positions);

}  // namespace sparseocc
