// Adaptive mixing of one query and group in one block (inference).
//
// The block reads x [p_in, 64], M [64, 64] and S [p_out, p_in] once, keeps them as floats in shared memory,
// and writes only the result [p_out, 64]:
//   y = relu(norm(x M)), z = relu(norm(S y)), norm over all values of the matrix.
// Both products give each thread 4 neighbouring columns of every 8th row, in registers.
#pragma once

#include "../include/device.h"

namespace sparseocc {

constexpr int kMixWidth = 64;
constexpr int kMixThreads = 128;
constexpr int kColumnGroups = kMixWidth / 4;
constexpr int kRowGroups = kMixThreads / kColumnGroups;
constexpr int kMixWarps = kMixThreads / kWarpSize;
constexpr int kSlabStride = kMixWidth + 4;  // padded by one access, so that neighbouring rows use other banks
constexpr float kNormEps = 1e-5f;

template <typename scalar_t>
struct MixArguments {
  const scalar_t* sampled;    // [items, p_in, 64]
  const scalar_t* generated;  // [items, 64*64 + p_out*p_in], M then S
  scalar_t* output;           // [items, p_out, 64]
  int in_points, out_points;
};

// p_in up to a multiple of 4, and by one access more for the banks.
SPARSEOCC_HD int padded_in_points(int in_points) {
  return (in_points + 3) / 4 * 4;
}
SPARSEOCC_HD int point_stride(int in_points) {
  return padded_in_points(in_points) + 4;
}

// Parts of shared memory, in floats.
template <int IN_ROWS, int OUT_ROWS>
struct MixShared {
  float *matrix, *slab, *points, *sums;

  static SPARSEOCC_HD size_t bytes(int in_points) {
    const size_t floats = kMixWidth * kMixWidth + IN_ROWS * kRowGroups * kSlabStride +
                          OUT_ROWS * kRowGroups * point_stride(in_points) + 4 * kMixThreads / kWarpSize;
    return floats * sizeof(float);
  }

  SPARSEOCC_DEVICE MixShared(unsigned char* memory, int in_points) {
    matrix = reinterpret_cast<float*>(memory);
    slab = matrix + kMixWidth * kMixWidth;
    points = slab + IN_ROWS * kRowGroups * kSlabStride;
    sums = points + OUT_ROWS * kRowGroups * point_stride(in_points);
  }
};

using Float4 = Pack<float, 4>;

SPARSEOCC_DEVICE Float4 read4(const float* address) {
  return *reinterpret_cast<const Float4*>(address);
}
SPARSEOCC_DEVICE void write4(float* address, const Float4& value) {
  *reinterpret_cast<Float4*>(address) = value;
}

template <typename scalar_t>
SPARSEOCC_DEVICE Float4 to_float4(const scalar_t* value) {
  Float4 result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.value[i] = static_cast<float>(value[i]);
  return result;
}

// Rows of 64 values into shared memory rows of a given stride, by all threads, 16 bytes a thread.
template <typename scalar_t>
SPARSEOCC_DEVICE void load_rows(const scalar_t* from, int rows, float* to, int stride) {
  constexpr int kVector = 16 / sizeof(scalar_t);
#pragma unroll 4
  for (int i = threadIdx.x * kVector; i < rows * kMixWidth; i += kMixThreads * kVector) {
    const Pack<scalar_t, kVector> pack = load_pack<kVector>(from + i);
    float* row = to + i / kMixWidth * stride + i % kMixWidth;
#pragma unroll
    for (int j = 0; j < kVector; j += 4) write4(row + j, to_float4(pack.value + j));
  }
}

// S [p_out, p_in] into rows of padded stride; the columns beyond p_in become 0.
template <typename scalar_t>
SPARSEOCC_DEVICE void load_points(const scalar_t* from, int out_points, int in_points, float* to) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  const int stride = point_stride(in_points), total = out_points * in_points;
  if (in_points % kVector == 0) {
#pragma unroll 4
    for (int i = threadIdx.x * kVector; i < total; i += kMixThreads * kVector) {
      const Pack<scalar_t, kVector> pack = load_pack<kVector>(from + i);
      float* row = to + i / in_points * stride + i % in_points;
#pragma unroll
      for (int j = 0; j < kVector; j += 4) write4(row + j, to_float4(pack.value + j));
    }
    return;
  }
  const int padded = padded_in_points(in_points);
  for (int i = threadIdx.x; i < out_points * padded; i += kMixThreads) {
    const int row = i / padded, column = i % padded;
    to[row * stride + column] =
        column < in_points ? static_cast<float>(from[row * in_points + column]) : 0.0f;
  }
}

// left [rows, inner] times right [inner, 64], inner a multiple of 4. The thread gets row row_group + 8*j in
// result[j].
template <int ROWS>
SPARSEOCC_DEVICE void multiply(const float* left, int left_stride, const float* right, int right_stride,
                               int inner, Float4 (&result)[ROWS]) {
  const int column = threadIdx.x % kColumnGroups * 4, row_group = threadIdx.x / kColumnGroups;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) result[j] = Float4{{0, 0, 0, 0}};
  for (int k = 0; k < inner; k += 4) {
    Float4 b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = read4(right + (k + i) * right_stride + column);
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      const Float4 a = read4(left + (row_group + j * kRowGroups) * left_stride + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) result[j].value[c] += a.value[i] * b[i].value[c];
      }
    }
  }
}

// Sum over the block; `sums` is scratch of one float per warp, used for nothing else.
SPARSEOCC_DEVICE float sum_over_block(float value, float* sums) {
  value = sum_over_lanes(value, 5);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kMixThreads / kWarpSize; ++warp) total += sums[warp];
  return total;
}

// relu((v - mean) / sqrt(variance + eps)) over the first `rows` rows; rows beyond become 0. All threads take
// part.
template <int ROWS>
SPARSEOCC_DEVICE void normalise(Float4 (&value)[ROWS], int rows, float* sums) {
  const int row_group = threadIdx.x / kColumnGroups;
  const float count = static_cast<float>(rows * kMixWidth);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    if (row_group + j * kRowGroups >= rows) continue;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum += value[j].value[c];
  }
  const float mean = sum_over_block(sum, sums) / count;
  float squares = 0;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    if (row_group + j * kRowGroups >= rows) continue;
#pragma unroll
    for (int c = 0; c < 4; ++c) squares += (value[j].value[c] - mean) * (value[j].value[c] - mean);
  }
  const float scale =
      1.0f / sqrtf(sum_over_block(squares, sums + kMixThreads / kWarpSize) / count + kNormEps);
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const bool inside = row_group + j * kRowGroups < rows;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float normal = (value[j].value[c] - mean) * scale;
      value[j].value[c] = inside ? (normal < 0 ? 0.0f : normal) : 0.0f;  // what is not a number stays so
    }
  }
}

// IN_ROWS * 8 >= p_in, OUT_ROWS * 8 >= p_out; one block per item.
template <typename scalar_t, int IN_ROWS, int OUT_ROWS>
__global__ void __launch_bounds__(kMixThreads) adaptive_mix_kernel(const MixArguments<scalar_t> arguments) {
  SPARSEOCC_DYNAMIC_SHARED(memory);
  const int in_points = arguments.in_points, out_points = arguments.out_points;
  const MixShared<IN_ROWS, OUT_ROWS> shared(memory, in_points);
  const int64_t item = blockIdx.x;
  const scalar_t* generated = arguments.generated + item * (kMixWidth * kMixWidth + out_points * in_points);
  load_rows(generated, kMixWidth, shared.matrix, kMixWidth);
  load_rows(arguments.sampled + item * in_points * kMixWidth, in_points, shared.slab, kSlabStride);
  load_points(generated + kMixWidth * kMixWidth, out_points, in_points, shared.points);
  __syncthreads();

  const int column = threadIdx.x % kColumnGroups * 4, row_group = threadIdx.x / kColumnGroups;
  Float4 mixed[IN_ROWS];
  multiply(shared.slab, kSlabStride, shared.matrix, kMixWidth, kMixWidth, mixed);
  normalise(mixed, in_points, shared.sums);  // its barriers also mean that all threads have read the slab
#pragma unroll
  for (int j = 0; j < IN_ROWS; ++j)
    write4(shared.slab + (row_group + j * kRowGroups) * kSlabStride + column, mixed[j]);
  __syncthreads();

  Float4 result[OUT_ROWS];
  multiply(shared.points, point_stride(in_points), shared.slab, kSlabStride, padded_in_points(in_points),
           result);
  normalise(result, out_points, shared.sums + 2 * kMixThreads / kWarpSize);
  scalar_t* output = arguments.output + item * out_points * kMixWidth + column;
#pragma unroll
  for (int j = 0; j < OUT_ROWS; ++j) {
    const int row = row_group + j * kRowGroups;
    if (row < out_points) store_pack<4>(output + row * kMixWidth, result[j].value);
  }
}

}  // namespace sparseocc
