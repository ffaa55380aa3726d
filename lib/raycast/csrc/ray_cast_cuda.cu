// Ray casting kernel: one thread per ray, all volumes and all origins of a sample in one launch.
#include <cstddef>

#include "ray_cast.h"

namespace raycast {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) cast_rays_kernel(Grid grid, RayArrays arrays) {
  const int slot = blockIdx.x * kThreads + threadIdx.x;
  if (slot >= arrays.num_rays) return;
  const int ray = arrays.rays[slot];
  // never follow a wrong index
  const bool known = ray >= 0 && ray / arrays.num_directions < arrays.num_origins;
  const int origin = known ? ray / arrays.num_directions : 0;
  const int direction = known ? ray - origin * arrays.num_directions : 0;
  const uint8_t* __restrict__ semantics = arrays.semantics;
  const int num_volumes = arrays.num_volumes;
  const size_t volume_size = static_cast<size_t>(grid.size[0]) * grid.size[1] * grid.size[2];

  const auto hits_at = [=](int voxel, unsigned pending) {
    unsigned hits = 0;
    for (int volume = 0; volume < num_volumes; ++volume) {
      const bool occupied = semantics[volume * volume_size + voxel] != arrays.free_id;
      hits |= static_cast<unsigned>(occupied) << volume;
    }
    return hits & pending;
  };
  const auto record = [=](unsigned volumes, int voxel, float distance_m) {
    for (int volume = 0; volume < num_volumes; ++volume) {
      if (!((volumes >> volume) & 1u)) continue;
      const size_t out = static_cast<size_t>(volume) * arrays.num_rays + slot;
      arrays.label[out] = semantics[volume * volume_size + voxel];
      arrays.voxel[out] = voxel;
      arrays.distance[out] = distance_m;
    }
  };
  const unsigned all_volumes = (1u << num_volumes) - 1u;
  trace_ray(grid, arrays.origins + 3 * origin, arrays.directions + 3 * direction, all_volumes, hits_at,
            record);
}

}  // namespace

bool runs_on_current_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, cast_rays_kernel) == cudaSuccess;
  if (!found) cudaGetLastError();  // clears the error, so that the next check of it does not find this one
  return found;
}

cudaError_t launch_cast_rays(const Grid& grid, const RayArrays& arrays, cudaStream_t stream) {
  if (arrays.num_rays == 0) return cudaSuccess;
  const int blocks = (arrays.num_rays + kThreads - 1) / kThreads;
  cast_rays_kernel<<<blocks, kThreads, 0, stream>>>(grid, arrays);
  return cudaGetLastError();
}

}  // namespace raycast
