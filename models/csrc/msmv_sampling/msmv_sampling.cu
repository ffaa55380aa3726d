// Checks, allocations and launches of the sampling kernels.
#include "msmv_sampling.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "sampling_kernels.h"

namespace sparseocc {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

at::ScalarType real_type(const Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_real(const Tensor& tensor, const char* name, const Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), name, " is on ", tensor.device(), " but the features are on ",
              like.device(), "; move it there.");
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() on it.");
  TORCH_CHECK(tensor.scalar_type() == real_type(like), name, " must be ", real_type(like), " but is ",
              tensor.scalar_type(), "; convert it.");
}

void check_features(const Tensors& features, int64_t num_cameras) {
  TORCH_CHECK(!features.empty() && features.size() <= static_cast<size_t>(kMaxLevels),
              "features must hold 1 to ", kMaxLevels, " levels but holds ", features.size(),
              "; use the PyTorch reference for more.");
  TORCH_CHECK(features[0].is_cuda(),
              "features must be on a CUDA device; CPU tensors take the PyTorch reference.");
  for (const Tensor& level : features) {
    TORCH_CHECK(level.dim() == 5 && level.size(0) == features[0].size(0) &&
                    level.size(1) == features[0].size(1) && level.size(4) == features[0].size(4),
                "every level of features must be [B, T*N, H, W, C] with equal B, T*N and C, but one is ",
                level.sizes(), "; reshape it.");
    TORCH_CHECK(
        level.size(2) > 0 && level.size(3) > 0 && level.size(2) <= std::numeric_limits<int>::max() / 2 &&
            level.size(3) <= std::numeric_limits<int>::max() / 2,
        "a level of features has height and width ", level.sizes().slice(2, 2), "; both must be positive.");
    TORCH_CHECK(level.scalar_type() == features[0].scalar_type() && level.device() == features[0].device(),
                "all levels of features must have one type and device; convert or move them.");
    TORCH_CHECK(level.stride(4) == 1 || level.size(4) == 1,
                "features must have contiguous channels (channels last).");
  }
  TORCH_CHECK(num_cameras > 0 && features[0].size(1) % num_cameras == 0, "features hold ",
              features[0].size(1), " images, which is not a multiple of num_cameras = ", num_cameras, ".");
}

SamplingShape make_shape(const Tensors& features, const Tensor& points, int64_t points_per_group,
                         int64_t num_cameras, int64_t frames) {
  const int64_t channels = features[0].size(4), groups = points.size(2);
  TORCH_CHECK(points.size(0) == features[0].size(0), "features hold ", features[0].size(0),
              " samples, the points ", points.size(0), "; they must be equal.");
  TORCH_CHECK(groups > 0 && channels % groups == 0, "features have ", channels, " channels, which ", groups,
              " groups do not divide.");
  TORCH_CHECK(points.size(1) <= std::numeric_limits<int>::max() / 4, "too many queries: ", points.size(1),
              ".");
  SamplingShape shape;
  shape.batch = points.size(0);
  shape.queries = points.size(1);
  shape.groups = groups;
  shape.frames = frames;
  shape.points = points_per_group;
  shape.cameras = num_cameras;
  shape.levels = features.size();
  shape.channels = channels / groups;
  return shape;
}

void check_last_sizes(const Tensor& tensor, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK(tensor.sizes() == expected, name, " must be ", expected, " but is ", tensor.sizes(), ".");
}

FeatureLevel make_level(const Tensor& feature) {
  FeatureLevel level;
  level.data = feature.data_ptr();
  level.stride_batch = feature.stride(0);
  level.stride_image = feature.stride(1);
  level.stride_row = feature.stride(2);
  level.stride_column = feature.stride(3);
  level.height = feature.size(2);
  level.width = feature.size(3);
  return level;
}

// Whether every row of channels starts at a multiple of 16 bytes, so that it can be moved 16 bytes at a time.
bool rows_are_aligned(const Tensor& feature, int vector) {
  if (reinterpret_cast<uintptr_t>(feature.data_ptr()) % 16 != 0) return false;
  for (int64_t dim = 0; dim < 4; ++dim)
    if (feature.size(dim) > 1 && feature.stride(dim) % vector != 0) return false;
  return true;
}

bool can_vectorise(const Tensors& features, const SamplingShape& shape, int vector) {
  if (shape.channels % vector != 0) return false;
  for (const Tensor& level : features)
    if (!rows_are_aligned(level, vector)) return false;
  return true;
}

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

Schedule plan(const SamplingShape& shape, int vector) {
  const Schedule schedule = make_schedule(shape, vector, 32 * static_cast<int64_t>(multiprocessors()));
  TORCH_CHECK(count_blocks(shape, schedule) <= std::numeric_limits<int>::max(),
              "too many points for one launch; use a smaller batch.");
  return schedule;
}

bool is_empty(const SamplingShape& shape) {
  return static_cast<int64_t>(shape.batch) * shape.queries * shape.frames * shape.points * shape.channels ==
         0;
}

template <typename real>
SlotSource<real> make_source(const Tensor& points, const Tensor& ego2img, const Tensor& level_logits,
                              double height, double width, bool published_weight_order) {
  SlotSource<real> source = {};
  source.points = points.data_ptr<real>();
  source.ego2img = ego2img.data_ptr<real>();
  source.level_logits = level_logits.data_ptr<real>();
  source.inverse_width = static_cast<real>(1.0 / width);
  source.inverse_height = static_cast<real>(1.0 / height);
  source.published_weight_order = published_weight_order;
  return source;
}

template <typename scalar_t>
Tensor launch_forward(const Tensors& features, const SamplingShape& shape,
                      const SlotSource<typename Accumulate<scalar_t>::type>& source,
                      const int64_t* frame_index) {
  using real = typename Accumulate<scalar_t>::type;
  constexpr int kVector = 16 / sizeof(scalar_t);
  Tensor output = at::empty({shape.batch, shape.queries, shape.groups,
                             static_cast<int64_t>(shape.frames) * shape.points, shape.channels},
                            features[0].options().memory_format(at::MemoryFormat::Contiguous));
  if (is_empty(shape)) return output;
  const bool vectorise = can_vectorise(features, shape, kVector);
  ForwardArguments<scalar_t> arguments;
  arguments.shape = shape;
  arguments.schedule = plan(shape, vectorise ? kVector : 1);
  arguments.source = source;
  for (int l = 0; l < shape.levels; ++l) arguments.level[l] = make_level(features[l]);
  arguments.frame_index = frame_index;
  arguments.stored_frames = features[0].size(1) / shape.cameras;
  arguments.output = output.data_ptr<scalar_t>();
  const size_t shared = kWarpsPerBlock * warp_shared_bytes<real>(shape.levels, false);
  const auto blocks = static_cast<unsigned>(count_blocks(shape, arguments.schedule));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (vectorise) {
    sampling_forward_kernel<scalar_t, kVector><<<blocks, kThreads, shared, stream>>>(arguments);
  } else {
    sampling_forward_kernel<scalar_t, 1><<<blocks, kThreads, shared, stream>>>(arguments);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

// Launches the backward kernel; grad_point and grad_weights, per slot, undefined: not wanted.
template <typename scalar_t>
void launch_backward(const Tensor& grad_output, const Tensors& features, const SamplingShape& shape,
                     const SlotSource<typename Accumulate<scalar_t>::type>& source, const Tensor& grad_point,
                     const Tensor& grad_weights, const Tensors& grad_features) {
  if (is_empty(shape)) return;
  using real = typename Accumulate<scalar_t>::type;
  constexpr int kVector = 16 / sizeof(scalar_t);
  BackwardArguments<scalar_t> arguments;
  for (int l = 0; l < shape.levels; ++l) {
    arguments.level[l] = make_level(features[l]);
    arguments.grad_features[l] = grad_features.empty() ? nullptr : grad_features[l].template data_ptr<real>();
  }
  const bool vectorise = can_vectorise(features, shape, kVector) && rows_are_aligned(grad_output, kVector);
  arguments.shape = shape;
  arguments.schedule = plan(shape, vectorise ? kVector : 1);
  arguments.source = source;
  arguments.grad_output = grad_output.data_ptr<scalar_t>();
  arguments.grad_point = grad_point.defined() ? grad_point.data_ptr<real>() : nullptr;
  arguments.grad_weights = grad_weights.defined() ? grad_weights.data_ptr<real>() : nullptr;
  const size_t shared = kWarpsPerBlock * warp_shared_bytes<real>(shape.levels, true);
  const auto blocks = static_cast<unsigned>(count_blocks(shape, arguments.schedule));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (vectorise) {
    sampling_backward_kernel<scalar_t, kVector><<<blocks, kThreads, shared, stream>>>(arguments);
  } else {
    sampling_backward_kernel<scalar_t, 1><<<blocks, kThreads, shared, stream>>>(arguments);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename real>
void launch_reduce(const SamplingShape& shape, bool published_weight_order, const Tensor& level_logits,
                   const Tensor& slot_grad_point, const Tensor& slot_grad_weight, const Tensor& grad_points,
                   const Tensor& grad_logits) {
  const int64_t total = grad_points.numel() / 3;
  if (total == 0) return;
  ReduceArguments<real> arguments;
  arguments.shape = shape;
  arguments.published_weight_order = published_weight_order;
  arguments.level_logits = level_logits.data_ptr<real>();
  arguments.slot_grad_point = slot_grad_point.data_ptr<real>();
  arguments.slot_grad_weight = slot_grad_weight.data_ptr<real>();
  arguments.grad_points = grad_points.data_ptr<real>();
  arguments.grad_logits = grad_logits.data_ptr<real>();
  const int64_t blocks = (total + kThreads - 1) / kThreads;
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many points for one launch: ", total, ".");
  sampling_reduce_kernel<real>
      <<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

SamplingShape check_arguments(const Tensors& features, const Tensor& points, const Tensor& ego2img,
                          const Tensor& level_logits, const Tensor& frame_index, int64_t num_cameras) {
  check_features(features, num_cameras);
  check_real(points, "points", features[0]);
  check_real(ego2img, "ego2img", features[0]);
  check_real(level_logits, "level_logits", features[0]);
  TORCH_CHECK(points.dim() == 5 && points.size(4) == 3, "points must be [B, Q, G, P, 3] but is ",
              points.sizes(), ".");
  TORCH_CHECK(frame_index.device() == points.device() && frame_index.is_contiguous() &&
                  frame_index.scalar_type() == at::kLong && frame_index.dim() == 1,
              "frame_index must be a contiguous int64 tensor of one dimension on ", points.device(), ".");
  const int64_t frames = frame_index.numel() > 0 ? frame_index.numel() : features[0].size(1) / num_cameras;
  const SamplingShape shape = make_shape(features, points, points.size(3), num_cameras, frames);
  check_last_sizes(ego2img, "ego2img", {shape.batch, frames * num_cameras, 4, 4});
  check_last_sizes(level_logits, "level_logits",
                   {shape.batch, shape.queries, shape.groups, shape.points, shape.levels});
  return shape;
}

void check_grad_output(const Tensor& grad_output, const Tensor& features, const SamplingShape& shape) {
  TORCH_CHECK(grad_output.is_contiguous() && grad_output.scalar_type() == features.scalar_type() &&
                  grad_output.device() == features.device(),
              "grad_output must be contiguous and of the features' type and device.");
  check_last_sizes(grad_output, "grad_output",
                   {shape.batch, shape.queries, shape.groups,
                    static_cast<int64_t>(shape.frames) * shape.points, shape.channels});
}

void check_grad_features(const Tensors& grads, const Tensors& features) {
  if (grads.empty()) return;
  TORCH_CHECK(grads.size() == features.size(), "grad_features must hold ", features.size(), " levels but holds ",
              grads.size(), ".");
  for (size_t l = 0; l < features.size(); ++l) {
    check_real(grads[l], "every level of grad_features", features[l]);
    check_last_sizes(grads[l], "every level of grad_features", features[l].sizes());
  }
}

}  // namespace

bool runs_on_current_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, sampling_reduce_kernel<float>) == cudaSuccess;
  if (!found) cudaGetLastError();  // clears the error, so that the next check of it does not find this one
  return found;
}

Tensor sample_multi_view_forward(const Tensors& features, const Tensor& points, const Tensor& ego2img,
                                 const Tensor& level_logits, const Tensor& frame_index, double height,
                                 double width, int64_t num_cameras, bool published_weight_order) {
  const SamplingShape shape = check_arguments(features, points, ego2img, level_logits, frame_index, num_cameras);
  const c10::cuda::CUDAGuard guard(features[0].device());
  Tensor output;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features[0].scalar_type(), "sample_multi_view_forward", [&] {
        using real = typename Accumulate<scalar_t>::type;
        output = launch_forward<scalar_t>(
            features, shape,
            make_source<real>(points, ego2img, level_logits, height, width, published_weight_order),
            frame_index.numel() > 0 ? frame_index.data_ptr<int64_t>() : nullptr);
      });
  return output;
}

Tensors sample_multi_view_backward(const Tensor& grad_output, const Tensors& features, const Tensor& points,
                                   const Tensor& ego2img, const Tensor& level_logits, double height,
                                   double width, int64_t num_cameras, bool published_weight_order,
                                   bool wants_geometry, const Tensors& grad_features) {
  const Tensor in_order = at::empty({0}, points.options().dtype(at::kLong));
  const SamplingShape shape = check_arguments(features, points, ego2img, level_logits, in_order, num_cameras);
  check_grad_output(grad_output, features[0], shape);
  check_grad_features(grad_features, features);
  const c10::cuda::CUDAGuard guard(features[0].device());
  Tensor slot_grad_point, slot_grad_weight, grad_points, grad_logits;
  if (wants_geometry) {
    const auto options = points.options();
    slot_grad_point =
        at::empty({shape.batch, shape.frames, shape.groups, shape.queries, shape.points, 3}, options);
    slot_grad_weight = at::empty(
        {shape.batch, shape.frames, shape.groups, shape.queries, shape.points, shape.levels}, options);
    grad_points = is_empty(shape) ? at::zeros(points.sizes(), options) : at::empty(points.sizes(), options);
    grad_logits =
        is_empty(shape) ? at::zeros(level_logits.sizes(), options) : at::empty(level_logits.sizes(), options);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features[0].scalar_type(), "sample_multi_view_backward", [&] {
        using real = typename Accumulate<scalar_t>::type;
        launch_backward<scalar_t>(
            grad_output, features, shape,
            make_source<real>(points, ego2img, level_logits, height, width, published_weight_order),
            slot_grad_point, slot_grad_weight, grad_features);
        if (wants_geometry && !is_empty(shape))
          launch_reduce<real>(shape, published_weight_order, level_logits, slot_grad_point, slot_grad_weight,
                              grad_points, grad_logits);
      });
  return {grad_points, grad_logits};
}

}  // namespace sparseocc
