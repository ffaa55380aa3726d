// What the kernels need of CUDA, in terms that also compile for the host.
//
// The tests run the very same kernels on the CPU: they define SPARSEOCC_EMULATE and include a stand-in for
// the CUDA built-ins before this header (tests/models/csrc/emulation).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SPARSEOCC_HD __host__ __device__ __forceinline__
#define SPARSEOCC_DEVICE __device__ __forceinline__
#define SPARSEOCC_DYNAMIC_SHARED(name) extern __shared__ __align__(32) unsigned char name[]
#elif defined(SPARSEOCC_EMULATE)
#define SPARSEOCC_HD inline
#define SPARSEOCC_DEVICE inline
#define SPARSEOCC_DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared_memory()
#else
#error "compile with nvcc, or for the host with the test's emulation of CUDA"
#endif

namespace sparseocc {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The type to accumulate and do geometry in: double for double, float for everything narrower.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// Products and sums that the compiler must not fuse: every step rounds as PyTorch's elementwise chain does,
// so that comparisons (which camera sees a point) come out the same.
SPARSEOCC_HD float multiply_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SPARSEOCC_HD double multiply_rounded(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
SPARSEOCC_HD float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
SPARSEOCC_HD double add_rounded(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
SPARSEOCC_HD float divide_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
SPARSEOCC_HD double divide_rounded(double a, double b) {
  return a / b;
}

SPARSEOCC_HD float exponential(float x) {
  return expf(x);
}
SPARSEOCC_HD double exponential(double x) {
  return exp(x);
}
SPARSEOCC_HD float round_down(float x) {
  return floorf(x);
}
SPARSEOCC_HD double round_down(double x) {
  return floor(x);
}

// To a few units in the last place.
SPARSEOCC_DEVICE float approximate_square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}
SPARSEOCC_DEVICE float power_of_two(float x) {
  return exp2f(x);
}

// VEC neighbouring values, moved by one access.
template <typename scalar_t, int VEC>
struct alignas(sizeof(scalar_t) * VEC) Pack {
  scalar_t value[VEC];
};

template <int VEC, typename scalar_t>
SPARSEOCC_DEVICE Pack<scalar_t, VEC> load_pack(const scalar_t* address) {
  return *reinterpret_cast<const Pack<scalar_t, VEC>*>(address);
}

// Rounds and stores VEC values, to shared memory.
template <int VEC, typename scalar_t, typename acc_t>
SPARSEOCC_DEVICE void write_pack(scalar_t* address, const acc_t (&value)[VEC]) {
  Pack<scalar_t, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.value[i] = static_cast<scalar_t>(value[i]);
  *reinterpret_cast<Pack<scalar_t, VEC>*>(address) = pack;
}

// The machine word of a number of bytes.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Stores a pack as one word, through an intrinsic: plain stores of a pack are at times taken apart.
template <int VEC, typename scalar_t, typename acc_t>
SPARSEOCC_DEVICE void store_pack(scalar_t* address, const acc_t (&value)[VEC]) {
  Pack<scalar_t, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.value[i] = static_cast<scalar_t>(value[i]);
  using word = typename Word<sizeof(scalar_t) * VEC>::type;
  word bits;
  memcpy(&bits, &pack, sizeof(word));
  __stcg(reinterpret_cast<word*>(address), bits);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && defined(CUDART_VERSION) && CUDART_VERSION >= 12010
#define SPARSEOCC_VECTOR_REDUCTION 1
#endif

// Adds COUNT neighbouring values to memory that other threads add to as well. The order of these additions is
// not fixed, so the last bits of a sum may differ from run to run.
template <typename acc_t, int COUNT>
struct AtomicAdd {
  static SPARSEOCC_DEVICE void add(acc_t* address, const acc_t* value) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) atomicAdd(address + i, value[i]);
  }
};

#if defined(SPARSEOCC_VECTOR_REDUCTION)
// One 16-byte reduction; the address must be a multiple of 16 bytes.
template <>
struct AtomicAdd<float, 4> {
  static SPARSEOCC_DEVICE void add(float* address, const float* value) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "f"(value[0]), "f"(value[1]), "f"(value[2]),
                   "f"(value[3])
                 : "memory");
  }
};
#endif

// A whole row of VEC values, four at a time where VEC allows.
template <int VEC, typename acc_t>
SPARSEOCC_DEVICE void atomic_add_row(acc_t* address, const acc_t (&value)[VEC]) {
  constexpr int kStep = VEC % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < VEC; i += kStep) AtomicAdd<acc_t, kStep>::add(address + i, value + i);
}

// Sum over the 2^log2_lanes neighbouring lanes of a warp; every lane of the warp must take part.
template <typename acc_t>
SPARSEOCC_DEVICE acc_t sum_over_lanes(acc_t value, int log2_lanes) {
  for (int step = (1 << log2_lanes) >> 1; step > 0; step >>= 1)
    value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

}  // namespace sparseocc
