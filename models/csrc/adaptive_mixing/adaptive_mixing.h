// The compiled mixing operator, as models/csrc/adaptive_mixing/ops.py calls it.
#pragma once

#include <ATen/ATen.h>

namespace sparseocc {

// Raised by one whenever a signature or a layout below changes; models/csrc/__init__.py checks it.
constexpr int kInterfaceVersion = 1;

// Whether this build holds code for the current device's architecture.
bool runs_on_current_device();

// sampled   [n, p_in, 64], p_in 1..32; float32 / float16 / bfloat16, contiguous
// generated [n, 64*64 + p_out*p_in], M then S, p_out 1..128; same type; a row is a multiple of 16 bytes
// returns   [n, p_out, 64] in the same type; no gradient
at::Tensor adaptive_mix(const at::Tensor& sampled, const at::Tensor& generated, int64_t out_points);

}  // namespace sparseocc
