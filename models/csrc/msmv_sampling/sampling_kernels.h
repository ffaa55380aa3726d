// Kernels of multi-view, multi-scale sampling.
//
// Shapes: B batch, T frames, N cameras, L levels, Q queries, G groups, P points per group, C channels.
// A slot is one point in one frame: (b, t, g, q, p). Slots run with (b, t, g) outermost and (q, p) innermost,
// so that blocks in flight together read one frame's maps (they stay in L2) and neighbouring queries read
// neighbouring pixels.
//
// A warp owns up to 32 slots. First each lane does the scalar work of one slot (projection, view choice,
// softmax) and leaves the result in shared memory; then the warp goes through its slots, 2^log2_lanes lanes
// to a slot, each lane moving VEC neighbouring channels (16 bytes) per access.
#pragma once

#include "sampling_math.h"

namespace sparseocc {

constexpr int kMaxLevels = 16;
constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

struct SamplingShape {
  int batch, queries, groups, frames, points, cameras, levels;
  int channels;  // C / G
};

// One pyramid level: features [B, T*N, height, width, C], strides in elements, channels contiguous.
struct FeatureLevel {
  const void* data;
  int64_t stride_batch, stride_image, stride_row, stride_column;
  int height, width;
};

// How slots are dealt out to warps.
struct Schedule {
  int log2_lanes;      // lanes to a slot
  int slots_per_warp;  // a power of two, at most 32
  int64_t tiles;       // blocks per (b, t, g)
};

// 32 slots to a warp, fewer where that would leave less than enough_warps warps.
inline Schedule make_schedule(const SamplingShape& shape, int vector, int64_t enough_warps) {
  Schedule schedule = {0, kWarpSize, 0};
  const int vectors = shape.channels / vector;
  while ((1 << schedule.log2_lanes) < vectors && schedule.log2_lanes < 5) ++schedule.log2_lanes;
  const int slots_at_once = kWarpSize >> schedule.log2_lanes;
  const int least = slots_at_once > 4 ? slots_at_once : 4;
  const int64_t rows = static_cast<int64_t>(shape.batch) * shape.frames * shape.groups;
  const int64_t slots = static_cast<int64_t>(shape.queries) * shape.points;
  while (schedule.slots_per_warp > least && rows * slots / schedule.slots_per_warp < enough_warps)
    schedule.slots_per_warp /= 2;
  const int64_t per_block = static_cast<int64_t>(schedule.slots_per_warp) * kWarpsPerBlock;
  schedule.tiles = (slots + per_block - 1) / per_block;
  return schedule;
}

inline int64_t count_blocks(const SamplingShape& shape, const Schedule& schedule) {
  return schedule.tiles * shape.batch * shape.frames * shape.groups;
}

// Where a slot's position and level weights come from.
template <typename real>
struct SlotSource {
  const real* points;        // [B, Q, G, P, 3] metres, ego frame
  const real* ego2img;       // [B, T*N, 4, 4]
  const real* level_logits;  // [B, Q, G, P, L]
  real inverse_width, inverse_height;
  bool published_weight_order;
};

template <typename scalar_t>
struct ForwardArguments {
  using real = typename Accumulate<scalar_t>::type;
  SamplingShape shape;
  Schedule schedule;
  SlotSource<real> source;
  FeatureLevel level[kMaxLevels];
  const int64_t* frame_index;  // [T], where frame t is among the stored frames; null: at t
  int stored_frames;
  scalar_t* output;  // [B, Q, G, T*P, C/G]
};

template <typename scalar_t>
struct BackwardArguments {
  using real = typename Accumulate<scalar_t>::type;
  SamplingShape shape;
  Schedule schedule;
  SlotSource<real> source;
  FeatureLevel level[kMaxLevels];
  const scalar_t* grad_output;      // [B, Q, G, T*P, C/G]
  real* grad_features[kMaxLevels];  // contiguous [B, T*N, height, width, C], added to; all null: not wanted
  real* grad_point;                 // [B, T, G, Q, P, 3]; null: not wanted
  real* grad_weights;               // [B, T, G, Q, P, L]; null together with grad_point
};

// The (b, t, g) of a block, and the slots (q, p) of a warp in it.
struct WarpTask {
  int batch, frame, group;
  int64_t first, count;  // of the Q*P slots
};

SPARSEOCC_DEVICE WarpTask warp_task(const SamplingShape& shape, const Schedule& schedule) {
  const int tiles = static_cast<int>(schedule.tiles);
  const int row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int frame_row = row / shape.groups;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t total = static_cast<int64_t>(shape.queries) * shape.points;
  WarpTask task;
  task.group = row % shape.groups;
  task.frame = frame_row % shape.frames;
  task.batch = frame_row / shape.frames;
  task.first = (static_cast<int64_t>(tile) * kWarpsPerBlock + warp) * schedule.slots_per_warp;
  const int64_t left = total - task.first;
  task.count = left < 0 ? 0 : (left < schedule.slots_per_warp ? left : schedule.slots_per_warp);
  return task;
}

// Index of (b, q, g, p) in [B, Q, G, P].
SPARSEOCC_HD int64_t point_index(const SamplingShape& shape, int batch, int64_t query, int group, int point) {
  return ((static_cast<int64_t>(batch) * shape.queries + query) * shape.groups + group) * shape.points +
         point;
}

// Index of (b, q, g, t, p) in [B, Q, G, T, P].
SPARSEOCC_HD int64_t output_index(const SamplingShape& shape, const WarpTask& task, int64_t slot) {
  const int64_t query = slot / shape.points;
  const int point = static_cast<int>(slot - query * shape.points);
  const int64_t row = (static_cast<int64_t>(task.batch) * shape.queries + query) * shape.groups + task.group;
  return (row * shape.frames + task.frame) * shape.points + point;
}

// Index of (b, t, g, q, p) in [B, T, G, Q, P].
SPARSEOCC_HD int64_t slot_index(const SamplingShape& shape, const WarpTask& task, int64_t slot) {
  const int64_t row =
      (static_cast<int64_t>(task.batch) * shape.frames + task.frame) * shape.groups + task.group;
  return row * shape.queries * shape.points + slot;
}

// A warp's part of shared memory: per slot the position, the view and the level weights, and for the backward
// pass their gradients.
template <typename real>
struct WarpShared {
  real *u, *v, *weights, *grad_u, *grad_v, *grad_weights;  // weights as [L][32]
  int* view;
};

template <typename real>
SPARSEOCC_HD size_t warp_shared_bytes(int levels, bool backward) {
  const size_t reals = (2 + static_cast<size_t>(levels)) * (backward ? 2 : 1);
  return kWarpSize * (reals * sizeof(real) + sizeof(int));
}

template <typename real>
SPARSEOCC_DEVICE WarpShared<real> warp_shared(unsigned char* memory, int levels, bool backward) {
  memory += threadIdx.x / kWarpSize * warp_shared_bytes<real>(levels, backward);
  WarpShared<real> shared;
  shared.u = reinterpret_cast<real*>(memory);
  shared.v = shared.u + kWarpSize;
  shared.weights = shared.v + kWarpSize;
  real* end = shared.weights + levels * kWarpSize;
  shared.grad_u = end;
  shared.grad_v = end + kWarpSize;
  shared.grad_weights = end + 2 * kWarpSize;
  if (backward) end += (2 + levels) * kWarpSize;
  shared.view = reinterpret_cast<int*>(end);
  return shared;
}

// Softmax over L neighbouring values, written with a stride of one warp.
template <typename real>
SPARSEOCC_DEVICE void softmax(const real* logits, int levels, real* weights) {
  real largest = logits[0], sum = 0;
  for (int l = 1; l < levels; ++l) largest = logits[l] > largest ? logits[l] : largest;
#pragma unroll 1
  for (int l = 0; l < levels; ++l) {
    const real value = exponential(logits[l] - largest);
    weights[l * kWarpSize] = value;
    sum += value;
  }
  for (int l = 0; l < levels; ++l) weights[l * kWarpSize] /= sum;
}

template <typename real>
SPARSEOCC_DEVICE const real* frame_matrices(const SamplingShape& shape, const SlotSource<real>& source,
                                            const WarpTask& task) {
  const int64_t image = (static_cast<int64_t>(task.batch) * shape.frames + task.frame) * shape.cameras;
  return source.ego2img + image * kMatrixSize;
}

// The scalar work of one slot, by one lane. It is little, so its loops are kept small instead of unrolled.
template <typename real>
SPARSEOCC_DEVICE void prepare_slot(const SamplingShape& shape, const SlotSource<real>& source,
                                   const WarpTask& task, int lane, const WarpShared<real>& shared) {
  const int64_t slot = task.first + lane;
  const int64_t query = slot / shape.points;
  const int point = static_cast<int>(slot - query * shape.points);
  const real* xyz = source.points + 3 * point_index(shape, task.batch, query, task.group, point);
  const Location<real> where = locate(frame_matrices(shape, source, task), shape.cameras, xyz[0], xyz[1],
                                      xyz[2], source.inverse_width, source.inverse_height);
  const int from =
      weight_group(task.frame, task.group, shape.frames, shape.groups, source.published_weight_order);
  shared.u[lane] = where.u;
  shared.v[lane] = where.v;
  shared.view[lane] = where.view;
  softmax(source.level_logits + shape.levels * point_index(shape, task.batch, query, from, point),
          shape.levels, shared.weights + lane);
}

// The four corners of a position in one level.
template <typename real>
struct Corners {
  Axis<real> x, y;
  SPARSEOCC_DEVICE bool touches() const { return x.touches && y.touches; }
  SPARSEOCC_DEVICE real weight(int corner) const { return y.weight[corner >> 1] * x.weight[corner & 1]; }
  SPARSEOCC_DEVICE int column(int corner) const { return x.index[corner & 1]; }
  SPARSEOCC_DEVICE int row(int corner) const { return y.index[corner >> 1]; }
};

template <typename real>
SPARSEOCC_DEVICE Corners<real> find_corners(real u, real v, const FeatureLevel& level) {
  Corners<real> corners;
  corners.x = axis_cells(u, level.width);
  corners.y = axis_cells(v, level.height);
  return corners;
}

// The values of the four corners, all four loads in flight before the first use.
template <int VEC, typename scalar_t, typename real>
SPARSEOCC_DEVICE void load_corners(const scalar_t* image, const FeatureLevel& level,
                                   const Corners<real>& corners, Pack<scalar_t, VEC> (&value)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    value[k] =
        load_pack<VEC>(image + corners.row(k) * level.stride_row + corners.column(k) * level.stride_column);
}

template <typename scalar_t>
SPARSEOCC_DEVICE const scalar_t* level_image(const FeatureLevel& level, int batch, int64_t image) {
  return static_cast<const scalar_t*>(level.data) + batch * level.stride_batch + image * level.stride_image;
}

template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kThreads)
    sampling_forward_kernel(const ForwardArguments<scalar_t> arguments) {
  using real = typename Accumulate<scalar_t>::type;
  SPARSEOCC_DYNAMIC_SHARED(memory);
  const SamplingShape& shape = arguments.shape;
  const Schedule& schedule = arguments.schedule;
  const WarpShared<real> shared = warp_shared<real>(memory, shape.levels, false);
  const WarpTask task = warp_task(shape, schedule);
  const int lane = threadIdx.x % kWarpSize;
  if (lane < task.count) prepare_slot(shape, arguments.source, task, lane, shared);
  __syncwarp();
  const int64_t frame = arguments.frame_index == nullptr ? task.frame : arguments.frame_index[task.frame];
  CUDA_KERNEL_ASSERT(frame >= 0 && frame < arguments.stored_frames);

  const int lanes = 1 << schedule.log2_lanes;
  const int vectors = shape.channels / VEC;
  for (int s = lane >> schedule.log2_lanes; s < task.count; s += kWarpSize >> schedule.log2_lanes) {
    const real u = shared.u[s], v = shared.v[s];
    const int64_t image = frame * shape.cameras + shared.view[s];
    scalar_t* output = arguments.output + output_index(shape, task, task.first + s) * shape.channels;
    for (int vector = lane & (lanes - 1); vector < vectors; vector += lanes) {
      real sum[VEC] = {};
      for (int l = 0; l < shape.levels; ++l) {
        const FeatureLevel& level = arguments.level[l];
        const Corners<real> corners = find_corners(u, v, level);
        if (!corners.touches()) continue;
        const scalar_t* channels =
            level_image<scalar_t>(level, task.batch, image) + task.group * shape.channels + vector * VEC;
        Pack<scalar_t, VEC> value[4];
        load_corners<VEC>(channels, level, corners, value);
        const real level_weight = shared.weights[l * kWarpSize + s];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const real weight = corners.weight(k) * level_weight;
#pragma unroll
          for (int i = 0; i < VEC; ++i) sum[i] += weight * static_cast<real>(value[k].value[i]);
        }
      }
      store_pack<VEC>(output + vector * VEC, sum);
    }
  }
}

// What one lane contributes to the gradients of a slot's position and weight in one level.
template <typename real>
struct SlotGradient {
  real u, v, weight;
};

// One vector of channels of one slot in one level: adds to the map's gradient, returns the lane's share of
// the rest.
template <int VEC, typename scalar_t, typename real>
SPARSEOCC_DEVICE SlotGradient<real> level_backward(const scalar_t* channels, real* grad_channels,
                                                   int row_length, const FeatureLevel& level,
                                                   const Corners<real>& corners, real level_weight,
                                                   const real (&grad)[VEC], bool wants_slot) {
  SlotGradient<real> result = {0, 0, 0};
  if (wants_slot) {
    Pack<scalar_t, VEC> value[4];
    load_corners<VEC>(channels, level, corners, value);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      real dot = 0;
#pragma unroll
      for (int i = 0; i < VEC; ++i) dot += grad[i] * static_cast<real>(value[k].value[i]);
      result.weight += corners.weight(k) * dot;
      result.u += corners.x.slope[k & 1] * corners.y.weight[k >> 1] * dot;
      result.v += corners.y.slope[k >> 1] * corners.x.weight[k & 1] * dot;
    }
    result.u *= level_weight * (level.width - 1);
    result.v *= level_weight * (level.height - 1);
  }
  if (grad_channels == nullptr) return result;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const real weight = corners.weight(k) * level_weight;
    if (weight == 0) continue;
    real share[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) share[i] = weight * grad[i];
    const int64_t pixel = static_cast<int64_t>(corners.row(k)) * level.width + corners.column(k);
    atomic_add_row<VEC>(grad_channels + pixel * row_length, share);
  }
  return result;
}

// The gradients of a slot that its lane holds in shared memory after the loop, written to device memory.
template <typename scalar_t, typename real>
SPARSEOCC_DEVICE void finish_slot(const BackwardArguments<scalar_t>& arguments, const WarpTask& task,
                                  int lane, const WarpShared<real>& shared) {
  const SamplingShape& shape = arguments.shape;
  const SlotSource<real>& source = arguments.source;
  const int64_t slot = task.first + lane;
  const int64_t index = slot_index(shape, task, slot);
  const int64_t query = slot / shape.points;
  const int point = static_cast<int>(slot - query * shape.points);
  const real* xyz = source.points + 3 * point_index(shape, task.batch, query, task.group, point);
  const real* matrix = frame_matrices(shape, source, task) + shared.view[lane] * kMatrixSize;
  real grad_point[3];
  locate_backward(matrix, xyz[0], xyz[1], xyz[2], source.inverse_width, source.inverse_height,
                  shared.grad_u[lane], shared.grad_v[lane], grad_point);
  for (int i = 0; i < 3; ++i) arguments.grad_point[3 * index + i] = grad_point[i];
#pragma unroll 1
  for (int l = 0; l < shape.levels; ++l)
    arguments.grad_weights[index * shape.levels + l] = shared.grad_weights[l * kWarpSize + lane];
}

template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kThreads)
    sampling_backward_kernel(const BackwardArguments<scalar_t> arguments) {
  using real = typename Accumulate<scalar_t>::type;
  SPARSEOCC_DYNAMIC_SHARED(memory);
  const SamplingShape& shape = arguments.shape;
  const int log2_lanes = arguments.schedule.log2_lanes;
  const WarpShared<real> shared = warp_shared<real>(memory, shape.levels, true);
  const WarpTask task = warp_task(shape, arguments.schedule);
  const int lane = threadIdx.x % kWarpSize;
  const bool wants_slot = arguments.grad_point != nullptr;
  if (lane < task.count) prepare_slot(shape, arguments.source, task, lane, shared);
  __syncwarp();

  const int lanes = 1 << log2_lanes, slots_at_once = kWarpSize >> log2_lanes;
  const int vectors = shape.channels / VEC, row_length = shape.groups * shape.channels;
  // All lanes stay in the loops to the end, because the sums over lanes need the whole warp.
  for (int first = 0; first < task.count; first += slots_at_once) {
    const int s = first + (lane >> log2_lanes);
    const bool active = s < task.count;
    const real u = active ? shared.u[s] : real(-2), v = active ? shared.v[s] : real(-2);
    const int64_t image = static_cast<int64_t>(task.frame) * shape.cameras + (active ? shared.view[s] : 0);
    const scalar_t* grad_output =
        active ? arguments.grad_output + output_index(shape, task, task.first + s) * shape.channels : nullptr;
    real grad_u = 0, grad_v = 0;
    for (int l = 0; l < shape.levels; ++l) {
      const FeatureLevel& level = arguments.level[l];
      const Corners<real> corners = find_corners(u, v, level);
      real grad_weight = 0;
      if (active && corners.touches()) {
        const int64_t images = static_cast<int64_t>(shape.frames) * shape.cameras;
        const int64_t map = (task.batch * images + image) * level.height * level.width;
        const scalar_t* channels =
            level_image<scalar_t>(level, task.batch, image) + task.group * shape.channels;
        real* grad_channels = arguments.grad_features[l];
        if (grad_channels != nullptr) grad_channels += map * row_length + task.group * shape.channels;
        for (int vector = lane & (lanes - 1); vector < vectors; vector += lanes) {
          const Pack<scalar_t, VEC> pack = load_pack<VEC>(grad_output + vector * VEC);
          real grad[VEC];
#pragma unroll
          for (int i = 0; i < VEC; ++i) grad[i] = static_cast<real>(pack.value[i]);
          const SlotGradient<real> share = level_backward<VEC>(
              channels + vector * VEC,
              grad_channels == nullptr ? grad_channels : grad_channels + vector * VEC, row_length, level,
              corners, shared.weights[l * kWarpSize + s], grad, wants_slot);
          grad_u += share.u;
          grad_v += share.v;
          grad_weight += share.weight;
        }
      }
      if (!wants_slot) continue;
      grad_weight = sum_over_lanes(grad_weight, log2_lanes);
      if (active && (lane & (lanes - 1)) == 0) shared.grad_weights[l * kWarpSize + s] = grad_weight;
    }
    if (!wants_slot) continue;
    grad_u = sum_over_lanes(grad_u, log2_lanes);
    grad_v = sum_over_lanes(grad_v, log2_lanes);
    if (active && (lane & (lanes - 1)) == 0) {
      shared.grad_u[s] = grad_u;
      shared.grad_v[s] = grad_v;
    }
  }
  __syncwarp();
  if (wants_slot && lane < task.count) finish_slot(arguments, task, lane, shared);
}

// Sums the gradients per slot over the frames and takes those of the weights through the
// softmax. One thread per (b, q, g, p); no atomics, so the same input gives the same bits.
template <typename real>
struct ReduceArguments {
  SamplingShape shape;
  bool published_weight_order;
  const real* level_logits;      // [B, Q, G, P, L]
  const real* slot_grad_point;   // [B, T, G, Q, P, 3]
  const real* slot_grad_weight;  // [B, T, G, Q, P, L]
  real* grad_points;             // [B, Q, G, P, 3]
  real* grad_logits;             // [B, Q, G, P, L]
};

// The k-th of the T slots (frame, group) that use the level weights of a group.
struct FrameGroup {
  int frame, group;
};

SPARSEOCC_HD FrameGroup slot_of_weight_group(int weight_group, int k, const SamplingShape& shape,
                                             bool published_order) {
  const int flat = weight_group * shape.frames + k;
  FrameGroup result = {k, weight_group};
  if (published_order) {
    result.frame = flat / shape.groups;
    result.group = flat % shape.groups;
  }
  return result;
}

template <typename real>
__global__ void __launch_bounds__(kThreads) sampling_reduce_kernel(const ReduceArguments<real> arguments) {
  const SamplingShape& shape = arguments.shape;
  const int levels = shape.levels;
  const int64_t total = static_cast<int64_t>(shape.batch) * shape.queries * shape.groups * shape.points;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= total) return;
  const int point = static_cast<int>(index % shape.points);
  const int group = static_cast<int>(index / shape.points % shape.groups);
  const int64_t row = index / shape.points / shape.groups;  // b*Q + q
  const int64_t slot = row % shape.queries * shape.points + point;
  WarpTask task = {static_cast<int>(row / shape.queries), 0, 0, 0, 0};

  real grad_point[3] = {0, 0, 0};
  real* grad_logits = arguments.grad_logits + index * levels;
  for (int l = 0; l < levels; ++l) grad_logits[l] = 0;
  for (int k = 0; k < shape.frames; ++k) {
    task.frame = k;
    task.group = group;
    const real* from_point = arguments.slot_grad_point + 3 * slot_index(shape, task, slot);
    for (int i = 0; i < 3; ++i) grad_point[i] += from_point[i];
    const FrameGroup user = slot_of_weight_group(group, k, shape, arguments.published_weight_order);
    task.frame = user.frame;
    task.group = user.group;
    const real* from_weight = arguments.slot_grad_weight + levels * slot_index(shape, task, slot);
    for (int l = 0; l < levels; ++l) grad_logits[l] += from_weight[l];
  }
  for (int i = 0; i < 3; ++i) arguments.grad_points[3 * index + i] = grad_point[i];

  const real* logits = arguments.level_logits + index * levels;
  real largest = logits[0];
  for (int l = 1; l < levels; ++l) largest = logits[l] > largest ? logits[l] : largest;
  real sum = 0, mean = 0;
  for (int l = 0; l < levels; ++l) {
    const real weight = exponential(logits[l] - largest);
    sum += weight;
    mean += weight * grad_logits[l];
  }
  mean /= sum;
  for (int l = 0; l < levels; ++l)
    grad_logits[l] = exponential(logits[l] - largest) / sum * (grad_logits[l] - mean);
}

}  // namespace sparseocc
