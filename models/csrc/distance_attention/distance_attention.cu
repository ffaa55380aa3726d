// Checks, allocation and launch of the attention kernel.
#include "distance_attention.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "attention_kernels.h"

namespace sparseocc {
namespace {

using at::Tensor;

void check_float(const Tensor& tensor, const char* name, const Tensor& parts) {
  TORCH_CHECK(tensor.is_cuda() && tensor.device() == parts.device(), name, " must be on the CUDA device of parts, ",
              parts.device(), ", but is on ", tensor.device(), ".");
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), name,
              " must be float32 and contiguous but is ", tensor.scalar_type(), " with strides ", tensor.strides(), ".");
}

void check(const Tensor& parts, const Tensor& reach, const Tensor& positions) {
  check_float(parts, "parts", parts);
  check_float(reach, "reach", parts);
  check_float(positions, "positions", parts);
  TORCH_CHECK(parts.dim() == 5 && parts.size(2) == 3 && parts.size(4) == kHeadWidth, "parts must be [B, Q, 3, H, ",
              kHeadWidth, "] but is ", parts.sizes(), "; use the PyTorch reference.");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(parts.data_ptr()) % 16 == 0,
              "parts must start at a multiple of 16 bytes; clone it.");
  TORCH_CHECK(reach.dim() == 3 && reach.size(0) == parts.size(0) && reach.size(1) == parts.size(1) &&
                  reach.size(2) == parts.size(3),
              "reach must be [B, Q, H] but is ", reach.sizes(), ".");
  TORCH_CHECK(positions.dim() == 3 && (positions.size(0) == parts.size(0) || positions.size(0) == 1) &&
                  positions.size(1) == parts.size(1) && positions.size(2) >= 2,
              "positions must be [B or 1, Q, 2 or more] but is ", positions.sizes(), ".");
}

}  // namespace

bool runs_on_current_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, distance_attention_kernel) == cudaSuccess;
  if (!found) cudaGetLastError();  // clears the error, so that the next check of it does not find this one
  return found;
}

Tensor distance_attention(const Tensor& parts, const Tensor& reach, const Tensor& positions) {
  check(parts, reach, positions);
  const c10::cuda::CUDAGuard guard(parts.device());
  const int64_t batch = parts.size(0), queries = parts.size(1), heads = parts.size(3);
  Tensor output = at::empty({batch, queries, heads * kHeadWidth}, parts.options());
  if (output.numel() == 0) return output;
  const int64_t blocks = batch * heads * ((queries + kTile - 1) / kTile);
  TORCH_CHECK(queries <= std::numeric_limits<int>::max() / 2 && blocks <= std::numeric_limits<int>::max(),
              "too many queries for one launch: ", parts.sizes(), ".");
  AttentionArguments arguments;
  arguments.parts = parts.data_ptr<float>();
  arguments.reach = reach.data_ptr<float>();
  arguments.positions = positions.data_ptr<float>();
  arguments.output = output.data_ptr<float>();
  arguments.queries = queries;
  arguments.heads = heads;
  arguments.position_stride = positions.size(2);
  arguments.position_batch_stride = positions.size(0) == 1 ? 0 : positions.stride(0);
  distance_attention_kernel<<<static_cast<unsigned>(blocks), kAttentionThreads,
                              AttentionShared::kFloats * sizeof(float), c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

}  // namespace sparseocc
