// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that their logic can be tested without a GPU.
//
// A fiber runs until it waits for its warp (__syncwarp, shuffles) or its block (__syncthreads). Threads run
// in ascending or descending order, so that a missing barrier shows in one of the two. Shared memory starts
// as NaN. A thread that ends while others wait for it, or a barrier that not all reach, is an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __restrict__
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) emulation::fail("kernel assertion failed: " #condition)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  Barrier* waits_for = nullptr;
  long generation = 0;
  bool ended = false;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<double> exchange;
  Barrier all;
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  Index block_index, thread_index;
  unsigned threads = 0;
  const char* failure = nullptr;
};

inline Block*& current() {
  static Block* block = nullptr;
  return block;
}

inline void yield() {
  Block& block = *current();
  const unsigned thread = block.thread_index.x;
  swapcontext(&block.fibers[thread].context, &block.scheduler);
  block.thread_index.x = thread;
}

[[noreturn]] inline void fail(const char* message) {
  Block& block = *current();
  if (block.failure == nullptr) block.failure = message;
  for (;;) yield();
}

inline void wait(Barrier& barrier, int expected) {
  Fiber& fiber = current()->fibers[current()->thread_index.x];
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  yield();
}

inline void sync_warp() {
  wait(current()->warps[current()->thread_index.x / kWarp], kWarp);
}
inline void sync_block() {
  wait(current()->all, static_cast<int>(current()->threads));
}

template <typename T>
T shuffle_from(T value, int source_lane) {
  Block& block = *current();
  const unsigned thread = block.thread_index.x, base = thread / kWarp * kWarp;
  std::memcpy(&block.exchange[thread], &value, sizeof(T));
  sync_warp();
  T result;
  std::memcpy(&result, &block.exchange[base + source_lane], sizeof(T));
  sync_warp();
  return result;
}

inline unsigned char* dynamic_shared_memory() {
  return current()->shared.data();
}

inline void run_fiber() {
  Block& block = *current();
  block.kernel();
  block.fibers[block.thread_index.x].ended = true;
  for (;;) yield();
}

// Stacks are kept from block to block.
inline char* stack_of(unsigned thread) {
  static std::vector<std::vector<char>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(kStackBytes);
  return stacks[thread].data();
}

inline void start_fiber(Block& block, unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(thread);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &block.scheduler;
  makecontext(&fiber.context, run_fiber, 0);
}

inline bool is_ready(const Fiber& fiber) {
  return !fiber.ended && (fiber.waits_for == nullptr || fiber.waits_for->generation != fiber.generation);
}

inline void run_block(Block& block, bool descending) {
  for (unsigned thread = 0; thread < block.threads; ++thread) start_fiber(block, thread);
  for (bool progress = true; progress && block.failure == nullptr;) {
    progress = false;
    for (unsigned i = 0; i < block.threads && block.failure == nullptr; ++i) {
      const unsigned thread = descending ? block.threads - 1 - i : i;
      Fiber& fiber = block.fibers[thread];
      if (!is_ready(fiber)) continue;
      fiber.waits_for = nullptr;
      block.thread_index.x = thread;
      swapcontext(&block.scheduler, &fiber.context);
      progress = true;
    }
  }
  if (block.failure != nullptr) throw std::runtime_error(block.failure);
  for (const Fiber& fiber : block.fibers)
    if (!fiber.ended) throw std::runtime_error("a barrier that not all threads reach");
}

// What kernel<<<blocks, threads, shared_bytes>>>() does.
inline void launch(unsigned blocks, unsigned threads, size_t shared_bytes, bool descending,
                   const std::function<void()>& kernel) {
  for (unsigned index = 0; index < blocks; ++index) {
    Block block;
    block.fibers.resize(threads);
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.exchange.resize(threads);
    block.shared.assign(shared_bytes + 16, 0xff);  // all bits set: NaN in every floating-point type
    block.kernel = kernel;
    block.block_index.x = index;
    block.threads = threads;
    current() = &block;
    run_block(block, descending);
    for (size_t i = shared_bytes; i < block.shared.size(); ++i)
      if (block.shared[i] != 0xff) throw std::runtime_error("a write past the end of shared memory");
  }
  current() = nullptr;
}

}  // namespace emulation

#define threadIdx (emulation::current()->thread_index)
#define blockIdx (emulation::current()->block_index)

inline void __syncwarp() {
  emulation::sync_warp();
}
inline void __syncthreads() {
  emulation::sync_block();
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle_from(value, (emulation::current()->thread_index.x % emulation::kWarp) ^ mask);
}

// Tensor cores: every lane loads whole tiles and makes the whole product, but stores its own eighth of a row only.
namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  T tile[16][16];
};

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride) {
  __syncwarp();
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) to.tile[row][column] = from[row * stride + column];
}

inline void fill_fragment(fragment<accumulator, 16, 16, 16, float>& to, float value) {
  for (auto& row : to.tile)
    for (float& entry : row) entry = value;
}

template <typename T>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& to, const fragment<matrix_a, 16, 16, 16, T, row_major>& a,
              const fragment<matrix_b, 16, 16, 16, T, row_major>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum = c.tile[row][column];
      for (int k = 0; k < 16; ++k)
        sum += static_cast<float>(a.tile[row][k]) * static_cast<float>(b.tile[k][column]);
      to.tile[row][column] = sum;
    }
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride,
                              layout_t) {
  const int lane = threadIdx.x % emulation::kWarp;
  for (int i = 8 * lane; i < 8 * lane + 8; ++i) to[i / 16 * stride + i % 16] = from.tile[i / 16][i % 16];
  __syncwarp();
}

}  // namespace wmma
}  // namespace nvcuda

template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

template <typename T>
void atomicAdd(T* address, T value) {
  *address += value;
}
