// Checks, allocation and launch of the mixing kernel.
#include "adaptive_mixing.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "mixing_kernels.h"
#include "tensor_core_mixing.h"

namespace sparseocc {
namespace {

using at::Tensor;

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

void check(const Tensor& sampled, const Tensor& generated, int64_t out_points) {
  TORCH_CHECK(sampled.is_cuda() && generated.device() == sampled.device(),
              "sampled and generated must be on one CUDA device but are on ", sampled.device(), " and ",
              generated.device(), ".");
  TORCH_CHECK(sampled.scalar_type() == generated.scalar_type(),
              "sampled and generated must have one type but are ", sampled.scalar_type(), " and ",
              generated.scalar_type(), ".");
  TORCH_CHECK(
      sampled.dim() == 3 && sampled.size(1) >= 1 && sampled.size(1) <= 32 && sampled.size(2) == kMixWidth,
      "sampled must be [n, 1..32, ", kMixWidth, "] but is ", sampled.sizes(), "; use the PyTorch reference.");
  TORCH_CHECK(out_points >= 1 && out_points <= 128, "out_points must be 1..128 but is ", out_points,
              "; use the PyTorch reference.");
  TORCH_CHECK(generated.dim() == 2 && generated.size(0) == sampled.size(0) &&
                  generated.size(1) == kMixWidth * kMixWidth + out_points * sampled.size(1),
              "generated must be [n, 64*64 + p_out*p_in] but is ", generated.sizes(), ".");
  TORCH_CHECK(sampled.is_contiguous() && generated.is_contiguous() && is_aligned(sampled) &&
                  is_aligned(generated) && generated.size(1) * generated.element_size() % 16 == 0,
              "sampled and generated must be contiguous with rows at multiples of 16 bytes; clone them.");
  TORCH_CHECK(sampled.size(0) <= std::numeric_limits<int>::max(), "too many items: ", sampled.size(0), ".");
}

template <typename scalar_t, int IN_ROWS, int OUT_ROWS>
void launch_rows(const MixArguments<scalar_t>& arguments, int64_t items) {
  adaptive_mix_kernel<scalar_t, IN_ROWS, OUT_ROWS>
      <<<static_cast<unsigned>(items), kMixThreads, MixShared<IN_ROWS, OUT_ROWS>::bytes(arguments.in_points),
         c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int IN_ROWS, int OUT_ROWS>
void launch_tensor_cores(const MixArguments<at::Half>& arguments, int64_t items) {
  tensor_core_mix_kernel<IN_ROWS, OUT_ROWS>
      <<<static_cast<unsigned>(items), kMixThreads, TensorMixShared<IN_ROWS, OUT_ROWS>::kBytes,
         c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Whether the tensor cores took the work: float16 on a GPU that has them.
template <typename scalar_t>
bool launch_tensor_cores(const MixArguments<scalar_t>&, int64_t) {
  return false;
}
template <>
bool launch_tensor_cores(const MixArguments<at::Half>& arguments, int64_t items) {
  int device = 0, major = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 7) return false;
  if (arguments.in_points <= 16 && arguments.out_points <= 32) {
    launch_tensor_cores<2, 4>(arguments, items);
  } else if (arguments.in_points <= 16 && arguments.out_points <= 64) {
    launch_tensor_cores<2, 8>(arguments, items);
  } else {
    launch_tensor_cores<4, 16>(arguments, items);
  }
  return true;
}

// The smallest compiled size that holds both numbers of points.
template <typename scalar_t>
void launch(const Tensor& sampled, const Tensor& generated, const Tensor& output) {
  MixArguments<scalar_t> arguments;
  arguments.sampled = sampled.data_ptr<scalar_t>();
  arguments.generated = generated.data_ptr<scalar_t>();
  arguments.output = output.data_ptr<scalar_t>();
  arguments.in_points = sampled.size(1);
  arguments.out_points = output.size(1);
  const int64_t items = sampled.size(0);
  if (launch_tensor_cores(arguments, items)) return;
  if (arguments.in_points <= 8 && arguments.out_points <= 32) {
    launch_rows<scalar_t, 1, 4>(arguments, items);
  } else if (arguments.in_points <= 16 && arguments.out_points <= 64) {
    launch_rows<scalar_t, 2, 8>(arguments, items);
  } else {
    launch_rows<scalar_t, 4, 16>(arguments, items);
  }
}

}  // namespace

bool runs_on_current_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, adaptive_mix_kernel<float, 1, 4>) == cudaSuccess;
  if (!found) cudaGetLastError();  // clears the error, so that the next check of it does not find this one
  return found;
}

Tensor adaptive_mix(const Tensor& sampled, const Tensor& generated, int64_t out_points) {
  check(sampled, generated, out_points);
  const c10::cuda::CUDAGuard guard(sampled.device());
  Tensor output = at::empty({sampled.size(0), out_points, kMixWidth}, sampled.options());
  if (output.numel() == 0) return output;
  switch (sampled.scalar_type()) {
    case at::kFloat:
      launch<float>(sampled, generated, output);
      break;
    case at::kHalf:
      launch<at::Half>(sampled, generated, output);
      break;
    case at::kBFloat16:
      launch<at::BFloat16>(sampled, generated, output);
      break;
    default:
      TORCH_CHECK(false, "sampled must be float32, float16 or bfloat16 but is ", sampled.scalar_type(), ".");
  }
  return output;
}

}  // namespace sparseocc
