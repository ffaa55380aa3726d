// Attention with the bias -reach * distance, computed tile by tile: neither logits nor distances are stored.
//
// A block computes 64 queries of one head against 64 keys at a time. Sixteen neighbouring threads share eight
// queries: of the logits [64, 64] a thread holds 8 rows x 4 keys, of the result [64, 32] 8 rows x 2 channels.
// Logits carry a factor log2(e), so that powers of two give the weights.
#pragma once

#include "../include/device.h"

namespace sparseocc {

constexpr int kHeadWidth = 32;
constexpr int kTile = 64;  // queries, and keys, at a time
constexpr int kRowLanes = 16;
constexpr int kRows = 8;
constexpr int kKeys = kTile / kRowLanes;
constexpr int kOutputs = kHeadWidth / kRowLanes;
constexpr int kAttentionThreads = kTile / kRows * kRowLanes;
constexpr int kTileStride = kTile + 4;         // padded, so that neighbouring rows start in other banks
constexpr int kValueStride = kHeadWidth + 4;
constexpr int kLoadedWidth = kHeadWidth * kTile / kAttentionThreads;  // channels that a thread loads
constexpr float kLog2E = 1.4426950408889634f;

struct AttentionArguments {
  const float* parts;      // [B, Q, 3, H, 32]: queries, keys, values
  const float* reach;      // [B, Q, H], per metre
  const float* positions;  // [B or 1, Q, position_stride] metres; x and y come first
  float* output;           // [B, Q, H, 32]
  int queries, heads, position_stride;
  int64_t position_batch_stride;  // 0: the samples share their positions
};

struct AttentionShared {
  float *queries, *keys, *values, *weights, *key_x, *key_y;

  static constexpr int kFloats =
      2 * kHeadWidth * kTileStride + kTile * kValueStride + kTile * kTileStride + 2 * kTile;

  SPARSEOCC_DEVICE explicit AttentionShared(unsigned char* memory) {
    queries = reinterpret_cast<float*>(memory);      // [32, 64], by channel
    keys = queries + kHeadWidth * kTileStride;       // [32, 64], by channel
    values = keys + kHeadWidth * kTileStride;        // [64, 32]
    weights = values + kTile * kValueStride;         // [64 queries, 64 keys]
    key_x = weights + kTile * kTileStride;           // [64]
    key_y = key_x + kTile;
  }
};

using Four = Pack<float, 4>;
using Two = Pack<float, 2>;

// Half a row of 32 channels of token first + threadIdx.x % 64, zeros beyond the last token.
struct LoadedRow {
  Four part[kLoadedWidth / 4];

  SPARSEOCC_DEVICE LoadedRow(const float* tokens, int64_t token_stride, int first, int count) {
    const int token = first + threadIdx.x % kTile;
    const float* row = tokens + token * token_stride + threadIdx.x / kTile * kLoadedWidth;
#pragma unroll
    for (int i = 0; i < kLoadedWidth / 4; ++i)
      part[i] = token < count ? load_pack<4>(row + 4 * i) : Four{{0, 0, 0, 0}};
  }

  SPARSEOCC_DEVICE void store_by_channel(float* tile, float factor) const {
    float* column = tile + threadIdx.x / kTile * kLoadedWidth * kTileStride + threadIdx.x % kTile;
#pragma unroll
    for (int i = 0; i < kLoadedWidth; ++i) column[i * kTileStride] = part[i / 4].value[i % 4] * factor;
  }

  SPARSEOCC_DEVICE void store_by_token(float* tile) const {
    float* row = tile + threadIdx.x % kTile * kValueStride + threadIdx.x / kTile * kLoadedWidth;
#pragma unroll
    for (int i = 0; i < kLoadedWidth / 4; ++i) *reinterpret_cast<Four*>(row + 4 * i) = part[i];
  }
};

// Largest value of a row, over the sixteen threads that share it.
SPARSEOCC_DEVICE float largest_of_row(float value) {
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// What a thread knows of its eight queries.
struct QueryRows {
  float x[kRows], y[kRows], reach[kRows];
  float largest[kRows], sum[kRows];  // of the logits, of this thread's weights
  float result[kRows][kOutputs];

  SPARSEOCC_DEVICE QueryRows(const AttentionArguments& arguments, const float* positions, int64_t batch, int head,
                             int first) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int query = first + i;
      const bool inside = query < arguments.queries;
      const float* position = positions + static_cast<int64_t>(query) * arguments.position_stride;
      x[i] = inside ? position[0] : 0.0f;
      y[i] = inside ? position[1] : 0.0f;
      const int64_t token = batch * arguments.queries + query;
      reach[i] = inside ? arguments.reach[token * arguments.heads + head] * kLog2E : 0.0f;
      largest[i] = -INFINITY;
      sum[i] = 0;
#pragma unroll
      for (int c = 0; c < kOutputs; ++c) result[i][c] = 0;
    }
  }
};

// logits[i][j] of the thread's queries and keys in the tiles.
SPARSEOCC_DEVICE void multiply_queries_and_keys(const AttentionShared& shared, int row, int key,
                                                float (&logits)[kRows][kKeys]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) logits[i][j] = 0;
  }
#pragma unroll 8
  for (int channel = 0; channel < kHeadWidth; ++channel) {
    float q[kRows];
#pragma unroll
    for (int i = 0; i < kRows; i += 4)
      *reinterpret_cast<Four*>(q + i) = load_pack<4>(shared.queries + channel * kTileStride + row + i);
    const Four k = load_pack<4>(shared.keys + channel * kTileStride + key);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) logits[i][j] += q[i] * k.value[j];
    }
  }
}

// Turns logits into weights relative to the largest logit so far, and rescales what was summed before.
SPARSEOCC_DEVICE void weigh(const AttentionShared& shared, int key, int keys_left, float (&logits)[kRows][kKeys],
                            QueryRows& rows) {
  const Four x = load_pack<4>(shared.key_x + key), y = load_pack<4>(shared.key_y + key);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float largest = rows.largest[i];
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const float dx = rows.x[i] - x.value[j], dy = rows.y[i] - y.value[j];
      logits[i][j] -= rows.reach[i] * approximate_square_root(dx * dx + dy * dy);
      if (key + j >= keys_left) logits[i][j] = -INFINITY;
      largest = logits[i][j] > largest ? logits[i][j] : largest;
    }
    largest = largest_of_row(largest);
    const float fade = power_of_two(rows.largest[i] - largest);
    rows.largest[i] = largest;
    rows.sum[i] *= fade;
#pragma unroll
    for (int c = 0; c < kOutputs; ++c) rows.result[i][c] *= fade;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      logits[i][j] = power_of_two(logits[i][j] - largest);
      rows.sum[i] += logits[i][j];
    }
  }
}

// Adds weights [8, 64] times values [64, 2].
SPARSEOCC_DEVICE void add_values(const AttentionShared& shared, int row, int lane, QueryRows& rows) {
#pragma unroll 2
  for (int key = 0; key < kTile; key += 4) {
    Two value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      value[k] = load_pack<2>(shared.values + (key + k) * kValueStride + lane * kOutputs);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Four weight = load_pack<4>(shared.weights + (row + i) * kTileStride + key);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < kOutputs; ++c) rows.result[i][c] += weight.value[k] * value[k].value[c];
      }
    }
  }
}

// One block per 64 queries, head and sample; blockIdx.x = (sample * heads + head) * tiles + tile.
__global__ void __launch_bounds__(kAttentionThreads) distance_attention_kernel(const AttentionArguments arguments) {
  SPARSEOCC_DYNAMIC_SHARED(memory);
  const AttentionShared shared(memory);
  const int count = arguments.queries, heads = arguments.heads;
  const int tiles = (count + kTile - 1) / kTile;
  const int first = blockIdx.x % tiles * kTile, head = blockIdx.x / tiles % heads;
  const int64_t batch = blockIdx.x / tiles / heads;
  const int lane = threadIdx.x % kRowLanes, row = threadIdx.x / kRowLanes * kRows, key = lane * kKeys;

  const int64_t part_stride = static_cast<int64_t>(heads) * kHeadWidth, token_stride = 3 * part_stride;
  const float* queries = arguments.parts + batch * count * token_stride + head * kHeadWidth;
  const float* positions = arguments.positions + batch * arguments.position_batch_stride;
  LoadedRow(queries, token_stride, first, count).store_by_channel(shared.queries, kLog2E / sqrtf(kHeadWidth));
  QueryRows rows(arguments, positions, batch, head, first + row);

  for (int start = 0; start < count; start += kTile) {
    const LoadedRow keys(queries + part_stride, token_stride, start, count);
    const LoadedRow values(queries + 2 * part_stride, token_stride, start, count);
    __syncthreads();  // all are done with the tiles before
    keys.store_by_channel(shared.keys, 1.0f);
    values.store_by_token(shared.values);
    if (threadIdx.x < kTile) {
      const int token = start + threadIdx.x < count ? start + threadIdx.x : count - 1;
      const float* position = positions + static_cast<int64_t>(token) * arguments.position_stride;
      shared.key_x[threadIdx.x] = position[0];
      shared.key_y[threadIdx.x] = position[1];
    }
    __syncthreads();

    float weights[kRows][kKeys];
    multiply_queries_and_keys(shared, row, key, weights);
    weigh(shared, key, count - start, weights, rows);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      *reinterpret_cast<Four*>(shared.weights + (row + i) * kTileStride + key) =
          Four{{weights[i][0], weights[i][1], weights[i][2], weights[i][3]}};
    __syncwarp();  // the rows of a thread are written by its own warp
    add_values(shared, row, lane, rows);
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float sum = sum_over_lanes(rows.sum[i], 4);
    if (first + row + i >= count) continue;
    const int64_t token = batch * count + first + row + i;
    float* output = arguments.output + (token * heads + head) * kHeadWidth + lane * kOutputs;
    const float result[kOutputs] = {rows.result[i][0] / sum, rows.result[i][1] / sum};
    store_pack<kOutputs>(output, result);
  }
}

}  // namespace sparseocc
