// The mixing kernel behind a C interface, run by emulation. Called by kernel_emulation.py through ctypes.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#define SPARSEOCC_EMULATE
#include "cuda_emulation.h"

#include "adaptive_mixing/mixing_kernels.h"
#include "adaptive_mixing/tensor_core_mixing.h"

using namespace sparseocc;

namespace {

char message[256];

template <typename scalar_t, int IN_ROWS, int OUT_ROWS>
void run_rows(const void* sampled, const void* generated, void* output, int items, int in_points,
              int out_points, bool descending) {
  const MixArguments<scalar_t> arguments = {static_cast<const scalar_t*>(sampled),
                                            static_cast<const scalar_t*>(generated),
                                            static_cast<scalar_t*>(output), in_points, out_points};
  emulation::launch(items, kMixThreads, MixShared<IN_ROWS, OUT_ROWS>::bytes(in_points), descending,
                    [&] { adaptive_mix_kernel<scalar_t, IN_ROWS, OUT_ROWS>(arguments); });
}

template <typename scalar_t>
void run_type(int size, const void* sampled, const void* generated, void* output, int items, int in_points,
              int out_points, bool descending) {
  const auto run = size == 0   ? run_rows<scalar_t, 1, 4>
                   : size == 1 ? run_rows<scalar_t, 2, 8>
                               : run_rows<scalar_t, 4, 16>;
  run(sampled, generated, output, items, in_points, out_points, descending);
}

template <int IN_ROWS, int OUT_ROWS>
void run_tensor_cores(const void* sampled, const void* generated, void* output, int items, int in_points,
                      int out_points, bool descending) {
  const MixArguments<c10::Half> arguments = {static_cast<const c10::Half*>(sampled),
                                             static_cast<const c10::Half*>(generated),
                                             static_cast<c10::Half*>(output), in_points, out_points};
  emulation::launch(items, kMixThreads, TensorMixShared<IN_ROWS, OUT_ROWS>::kBytes, descending,
                    [&] { tensor_core_mix_kernel<IN_ROWS, OUT_ROWS>(arguments); });
}

}  // namespace

extern "C" const char* last_error() {
  return message;
}

// dtype: 1 float32, 2 float16, 3 bfloat16, 4 float16 on tensor cores. size: which of the three compiled sizes.
// Returns 0, or 1 with last_error().
extern "C" int run(int dtype, int size, const void* sampled, const void* generated, void* output, int items,
                   int in_points, int out_points, int descending) {
  try {
    if (dtype == 4) {
      const auto tensor_cores = size == 0   ? run_tensor_cores<2, 4>
                                : size == 1 ? run_tensor_cores<2, 8>
                                            : run_tensor_cores<4, 16>;
      tensor_cores(sampled, generated, output, items, in_points, out_points, descending != 0);
      return 0;
    }
    const auto run = dtype == 1   ? run_type<float>
                     : dtype == 2 ? run_type<c10::Half>
                                  : run_type<c10::BFloat16>;
    run(size, sampled, generated, output, items, in_points, out_points, descending != 0);
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
    return 1;
  }
}
