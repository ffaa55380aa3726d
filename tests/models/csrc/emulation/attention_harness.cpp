// The attention kernel behind a C interface, run by emulation. Called by kernel_emulation.py through ctypes.
#define SPARSEOCC_EMULATE
#include "cuda_emulation.h"

#include "distance_attention/attention_kernels.h"

using namespace sparseocc;

static char message[256];

extern "C" const char* last_error() {
  return message;
}

// Layouts: attention_kernels.h. Returns 0, or 1 with last_error().
extern "C" int run(const float* parts, const float* reach, const float* positions, float* output, int batch,
                   int queries, int heads, int position_stride, int64_t position_batch_stride, int descending) {
  const AttentionArguments arguments = {parts, reach, positions, output, queries, heads, position_stride,
                                        position_batch_stride};
  try {
    emulation::launch(batch * heads * ((queries + kTile - 1) / kTile), kAttentionThreads,
                      AttentionShared::kFloats * sizeof(float), descending != 0,
                      [&] { distance_attention_kernel(arguments); });
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
    return 1;
  }
}
