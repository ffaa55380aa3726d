// Adaptive mixing of one query and group in one block, in float16 on tensor cores (inference).
//
// As adaptive_mix_kernel, but x, M, S and y stay float16 in shared memory and both products run on tensor cores,
// which add up in float32. Rows of x beyond p_in and columns of S beyond it are zero, up to a multiple of 16.
#pragma once

#include <c10/util/Half.h>

#if defined(__CUDACC__)
#include <mma.h>
#endif

#include "mixing_kernels.h"

namespace sparseocc {

#if defined(__CUDACC__)
using TensorHalf = __half;
#else
using TensorHalf = c10::Half;
#endif

constexpr int kMma = 16;                          // edge of the tiles that tensor cores multiply
constexpr int kHalfStride = kMixWidth + 8;        // padded by one access, so that neighbouring rows use other banks
constexpr int kProductStride = kMixWidth + 4;

// Parts of shared memory. The products, in float32, overwrite what they were made of.
template <int IN_ROWS, int OUT_ROWS>
struct TensorMixShared {
  static constexpr int kIn = IN_ROWS * kRowGroups, kOut = OUT_ROWS * kRowGroups;
  static constexpr int kPointStride = kIn + 8;
  static constexpr int kMatrix = kMixWidth * kHalfStride, kSlab = kIn * kHalfStride, kPoints = kOut * kPointStride;
  static constexpr int kHalves = kMatrix + 2 * kSlab + kPoints;
  static constexpr int kProductBytes = kOut * kProductStride * sizeof(float);
  static constexpr int kHalfBytes = kHalves * sizeof(c10::Half);
  static constexpr int kSumsOffset = kProductBytes > kHalfBytes ? kProductBytes : kHalfBytes;
  static constexpr int kBytes = kSumsOffset + 4 * kMixWarps * sizeof(float);
  static_assert(kIn * kProductStride * sizeof(float) <= kMatrix * sizeof(c10::Half), "y must fit in place of M");
  static_assert(kIn % kMma == 0 && kOut % kMma == 0, "whole tiles");

  c10::Half *matrix, *slab, *points, *mixed;
  float *product, *sums;

  SPARSEOCC_DEVICE explicit TensorMixShared(unsigned char* memory) {
    matrix = reinterpret_cast<c10::Half*>(memory);  // M [64, 64]
    slab = matrix + kMatrix;                        // x [kIn, 64]
    points = slab + kSlab;                          // S [kOut, kIn]
    mixed = points + kPoints;                       // y [kIn, 64]
    product = reinterpret_cast<float*>(memory);     // x M over M, then S y over everything
    sums = reinterpret_cast<float*>(memory + kSumsOffset);
  }
};

// Rows of `width` values into rows of a given stride, by all threads; zeros in the rows and columns beyond.
// 16 bytes at a time if width is a multiple of 8.
template <int ROWS, int WIDTH>
SPARSEOCC_DEVICE void copy_halves(const c10::Half* from, int rows, int width, c10::Half* to, int stride) {
  const c10::Half zero(0.0f);
  if (width % 8 == 0) {
    constexpr int kPacks = WIDTH / 8;
    for (int i = threadIdx.x; i < ROWS * kPacks; i += kMixThreads) {
      const int row = i / kPacks, column = i % kPacks * 8;
      Pack<c10::Half, 8> pack = {{zero, zero, zero, zero, zero, zero, zero, zero}};
      if (row < rows && column < width) pack = load_pack<8>(from + row * width + column);
      *reinterpret_cast<Pack<c10::Half, 8>*>(to + row * stride + column) = pack;
    }
    return;
  }
  for (int i = threadIdx.x; i < ROWS * WIDTH; i += kMixThreads) {
    const int row = i / WIDTH, column = i % WIDTH;
    to[row * stride + column] = row < rows && column < width ? from[row * width + column] : zero;
  }
}

// left [16 * ROW_TILES, 16 * INNER_TILES] times right [16 * INNER_TILES, 64]; a warp makes 16 columns of it.
template <int ROW_TILES, int INNER_TILES>
class TensorProduct {
 public:
  SPARSEOCC_DEVICE TensorProduct(const c10::Half* left, int left_stride, const c10::Half* right, int right_stride) {
    using namespace nvcuda;
    const TensorHalf* a = reinterpret_cast<const TensorHalf*>(left);
    const TensorHalf* b = reinterpret_cast<const TensorHalf*>(right) + first_column();
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) wmma::fill_fragment(sum_[t], 0.0f);
#pragma unroll
    for (int k = 0; k < INNER_TILES; ++k) {
      wmma::fragment<wmma::matrix_b, kMma, kMma, kMma, TensorHalf, wmma::row_major> right_tile;
      wmma::load_matrix_sync(right_tile, b + k * kMma * right_stride, right_stride);
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        wmma::fragment<wmma::matrix_a, kMma, kMma, kMma, TensorHalf, wmma::row_major> left_tile;
        wmma::load_matrix_sync(left_tile, a + t * kMma * left_stride + k * kMma, left_stride);
        wmma::mma_sync(sum_[t], left_tile, right_tile, sum_[t]);
      }
    }
  }

  SPARSEOCC_DEVICE void store(float* product) const {
    using namespace nvcuda;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
      wmma::store_matrix_sync(product + t * kMma * kProductStride + first_column(), sum_[t], kProductStride,
                              wmma::mem_row_major);
  }

 private:
  static SPARSEOCC_DEVICE int first_column() { return threadIdx.x / kWarpSize * kMma; }

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kMma, kMma, kMma, float> sum_[ROW_TILES];
};

// The thread's rows of a product: 4 columns of every 8th row.
template <int ROWS>
SPARSEOCC_DEVICE void read_product(const float* product, Float4 (&value)[ROWS]) {
  const int column = threadIdx.x % kColumnGroups * 4, row_group = threadIdx.x / kColumnGroups;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) value[j] = read4(product + (row_group + j * kRowGroups) * kProductStride + column);
}

// IN_ROWS * 8 >= p_in, OUT_ROWS * 8 >= p_out, both multiples of 16; one block per item.
template <int IN_ROWS, int OUT_ROWS>
__global__ void __launch_bounds__(kMixThreads)
    tensor_core_mix_kernel(const MixArguments<c10::Half> arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700  // launched on these only
  using Shared = TensorMixShared<IN_ROWS, OUT_ROWS>;
  static_assert(kMixWarps * kMma == kMixWidth, "a warp to every 16 columns");
  SPARSEOCC_DYNAMIC_SHARED(memory);
  const Shared shared(memory);
  const int in_points = arguments.in_points, out_points = arguments.out_points;
  const int64_t item = blockIdx.x;
  const c10::Half* generated = arguments.generated + item * (kMixWidth * kMixWidth + out_points * in_points);
  copy_halves<kMixWidth, kMixWidth>(generated, kMixWidth, kMixWidth, shared.matrix, kHalfStride);
  copy_halves<Shared::kIn, kMixWidth>(arguments.sampled + item * in_points * kMixWidth, in_points, kMixWidth,
                                      shared.slab, kHalfStride);
  copy_halves<Shared::kOut, Shared::kIn>(generated + kMixWidth * kMixWidth, out_points, in_points, shared.points,
                                         Shared::kPointStride);
  __syncthreads();

  const int column = threadIdx.x % kColumnGroups * 4, row_group = threadIdx.x / kColumnGroups;
  {
    const TensorProduct<Shared::kIn / kMma, kMixWidth / kMma> product(shared.slab, kHalfStride, shared.matrix,
                                                                      kHalfStride);
    __syncthreads();  // all have read M
    product.store(shared.product);
  }
  __syncthreads();
  Float4 mixed[IN_ROWS];
  read_product(shared.product, mixed);
  normalise(mixed, in_points, shared.sums);
#pragma unroll
  for (int j = 0; j < IN_ROWS; ++j)
    write_pack<4>(shared.mixed + (row_group + j * kRowGroups) * kHalfStride + column, mixed[j].value);
  __syncthreads();
  {
    const TensorProduct<Shared::kOut / kMma, Shared::kIn / kMma> product(shared.points, Shared::kPointStride,
                                                                         shared.mixed, kHalfStride);
    __syncthreads();  // all have read S and y
    product.store(shared.product);
  }
  __syncthreads();
  Float4 result[OUT_ROWS];
  read_product(shared.product, result);
  normalise(result, out_points, shared.sums + 2 * kMixWarps);
  c10::Half* output = arguments.output + item * out_points * kMixWidth + column;
#pragma unroll
  for (int j = 0; j < OUT_ROWS; ++j) {
    const int row = row_group + j * kRowGroups;
    if (row < out_points) store_pack<4>(output + row * kMixWidth, result[j].value);
  }
#endif
}

}  // namespace sparseocc
