// The compiled sampling operators, as models/csrc/msmv_sampling/ops.py calls them.
//
// Shapes: B batch, T frames, N cameras, L levels, Q queries, G groups, P points per group, C channels.
// All tensors on one CUDA device. "real" is float64 if the features are float64, else float32; tensors of
// type real are contiguous. Features may be strided as long as their channels are contiguous.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace sparseocc {

// Raised by one whenever a signature or a layout below changes; models/csrc/__init__.py checks it.
constexpr int kInterfaceVersion = 3;

// Whether this build holds code for the current device's architecture.
bool runs_on_current_device();

// features     L tensors [B, T*N, H_l, W_l, C], float64 / float32 / float16 / bfloat16
// points       [B, Q, G, P, 3] real, metres, ego frame
// ego2img      [B, T*N, 4, 4] real, metres to pixels
// level_logits [B, Q, G, P, L] real
// frame_index  [T] int64, where frame t is among the S stored frames of features [B, S*N, ...]; empty: S = T, at t
// height, width of the image that ego2img refers to, pixels
// returns      [B, Q, G, T*P, C/G] in the type of the features
at::Tensor sample_multi_view_forward(const std::vector<at::Tensor>& features, const at::Tensor& points,
                                     const at::Tensor& ego2img, const at::Tensor& level_logits,
                                     const at::Tensor& frame_index, double height, double width,
                                     int64_t num_cameras, bool published_weight_order);

// Adds the gradients of the L features to grad_features (real, contiguous, of the features' shapes; empty: not
// wanted). Returns the gradients of points and level_logits (undefined unless wants_geometry).
std::vector<at::Tensor> sample_multi_view_backward(
    const at::Tensor& grad_output, const std::vector<at::Tensor>& features, const at::Tensor& points,
    const at::Tensor& ego2img, const at::Tensor& level_logits, double height, double width,
    int64_t num_cameras, bool published_weight_order, bool wants_geometry,
    const std::vector<at::Tensor>& grad_features);

}  // namespace sparseocc
