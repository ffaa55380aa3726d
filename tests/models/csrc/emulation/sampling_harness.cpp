// The sampling kernels behind a C interface, run by emulation. Called by emulation.py through ctypes.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#define SPARSEOCC_EMULATE
#include "cuda_emulation.h"
#include "msmv_sampling/sampling_kernels.h"

using namespace sparseocc;

extern "C" {

// All pointers are to contiguous arrays but for the features, whose strides are given. Layouts:
// sampling_kernels.h.
struct Call {
  int32_t dtype;  // 0 float64, 1 float32, 2 float16, 3 bfloat16
  int32_t vector, descending, published_weight_order;
  int64_t enough_warps;
  int32_t shape[8];  // batch, queries, groups, frames, points, cameras, levels, channels
  int32_t stored_frames;
  double height, width;
  const void *points, *ego2img, *level_logits;
  const int64_t* frame_index;
  const void* features[kMaxLevels];
  int64_t strides[kMaxLevels][4];
  int32_t sizes[kMaxLevels][2];
  void* output;
  const void* grad_output;
  void* grad_features[kMaxLevels];
  void *slot_grad_point, *slot_grad_weight;  // per slot
  void *grad_points, *grad_logits;           // summed over frames
};

static char message[256];

const char* last_error() {
  return message;
}
}

namespace {

SamplingShape shape_of(const Call& call) {
  const int32_t* s = call.shape;
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]};
}

FeatureLevel level_of(const Call& call, int l) {
  const int64_t* s = call.strides[l];
  return {call.features[l], s[0], s[1], s[2], s[3], call.sizes[l][0], call.sizes[l][1]};
}

template <typename real>
SlotSource<real> source_of(const Call& call) {
  SlotSource<real> source = {};
  source.points = static_cast<const real*>(call.points);
  source.ego2img = static_cast<const real*>(call.ego2img);
  source.level_logits = static_cast<const real*>(call.level_logits);
  source.inverse_width = static_cast<real>(1.0 / call.width);
  source.inverse_height = static_cast<real>(1.0 / call.height);
  source.published_weight_order = call.published_weight_order != 0;
  return source;
}

template <typename scalar_t, int VEC>
void forward(const Call& call) {
  using real = typename Accumulate<scalar_t>::type;
  ForwardArguments<scalar_t> arguments;
  arguments.shape = shape_of(call);
  arguments.schedule = make_schedule(arguments.shape, VEC, call.enough_warps);
  arguments.source = source_of<real>(call);
  for (int l = 0; l < arguments.shape.levels; ++l) arguments.level[l] = level_of(call, l);
  arguments.frame_index = call.frame_index;
  arguments.stored_frames = call.stored_frames;
  arguments.output = static_cast<scalar_t*>(call.output);
  emulation::launch(count_blocks(arguments.shape, arguments.schedule), kThreads,
                    kWarpsPerBlock * warp_shared_bytes<real>(arguments.shape.levels, false), call.descending,
                    [&] { sampling_forward_kernel<scalar_t, VEC>(arguments); });
}

template <typename scalar_t, int VEC>
void backward(const Call& call) {
  using real = typename Accumulate<scalar_t>::type;
  BackwardArguments<scalar_t> arguments;
  arguments.shape = shape_of(call);
  arguments.schedule = make_schedule(arguments.shape, VEC, call.enough_warps);
  arguments.source = source_of<real>(call);
  for (int l = 0; l < arguments.shape.levels; ++l) {
    arguments.level[l] = level_of(call, l);
    arguments.grad_features[l] = static_cast<real*>(call.grad_features[l]);
  }
  arguments.grad_output = static_cast<const scalar_t*>(call.grad_output);
  arguments.grad_point = static_cast<real*>(call.slot_grad_point);
  arguments.grad_weights = static_cast<real*>(call.slot_grad_weight);
  emulation::launch(count_blocks(arguments.shape, arguments.schedule), kThreads,
                    kWarpsPerBlock * warp_shared_bytes<real>(arguments.shape.levels, true), call.descending,
                    [&] { sampling_backward_kernel<scalar_t, VEC>(arguments); });
  if (arguments.grad_point == nullptr) return;
  ReduceArguments<real> reduce;
  reduce.shape = arguments.shape;
  reduce.published_weight_order = call.published_weight_order != 0;
  reduce.level_logits = arguments.source.level_logits;
  reduce.slot_grad_point = arguments.grad_point;
  reduce.slot_grad_weight = arguments.grad_weights;
  reduce.grad_points = static_cast<real*>(call.grad_points);
  reduce.grad_logits = static_cast<real*>(call.grad_logits);
  const SamplingShape& s = reduce.shape;
  const unsigned blocks = (s.batch * s.queries * s.groups * s.points + kThreads - 1) / kThreads;
  emulation::launch(blocks, kThreads, 0, call.descending, [&] { sampling_reduce_kernel<real>(reduce); });
}

template <typename scalar_t, int VEC>
void run_vector(const Call& call) {
  call.output != nullptr ? forward<scalar_t, VEC>(call) : backward<scalar_t, VEC>(call);
}

template <typename scalar_t>
void run_type(const Call& call) {
  call.vector > 1 ? run_vector<scalar_t, 16 / sizeof(scalar_t)>(call) : run_vector<scalar_t, 1>(call);
}

}  // namespace

// Runs the forward pass if there is an output, else the backward pass. Returns 0, or 1 with last_error().
extern "C" int run(const Call* call) {
  try {
    switch (call->dtype) {
      case 0:
        run_type<double>(*call);
        break;
      case 1:
        run_type<float>(*call);
        break;
      case 2:
        run_type<c10::Half>(*call);
        break;
      default:
        run_type<c10::BFloat16>(*call);
        break;
    }
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
    return 1;
  }
}
