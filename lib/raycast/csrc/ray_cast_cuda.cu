// Ray casting kernel: one thread per ray, all volumes, origins and samples in one launch.
#include <cstddef>

#include "ray_cast.h"

namespace raycast {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) cast_rays_kernel(Grid grid, RayArrays arrays) {
  const int ray = blockIdx.x * kThreads + threadIdx.x;
  const int num_rays = arrays.max_origins * arrays.num_directions;
  if (ray >= num_rays) return;
  const int sample = blockIdx.y;
  const int origin = ray / arrays.num_directions;
  const int direction = ray - origin * arrays.num_directions;
  const int num_volumes = arrays.num_volumes;
  const int free_id = arrays.free_id;
  const size_t volume_size = static_cast<size_t>(grid.size[0]) * grid.size[1] * grid.size[2];
  const uint8_t* __restrict__ semantics = arrays.semantics + sample * num_volumes * volume_size;
  const size_t first_out = static_cast<size_t>(sample) * num_volumes * num_rays + ray;

  if (origin >= arrays.num_origins[sample]) {
    for (int volume = 0; volume < num_volumes; ++volume) {
      const size_t out = first_out + static_cast<size_t>(volume) * num_rays;
      arrays.label[out] = static_cast<uint8_t>(free_id);
      arrays.voxel[out] = 0;
      arrays.distance[out] = -static_cast<float>(grid.voxel_size_m);
    }
    return;
  }
  const auto hits_at = [=](int voxel, unsigned pending) {
    unsigned hits = 0;
    for (int volume = 0; volume < num_volumes; ++volume) {
      const bool occupied = semantics[volume * volume_size + voxel] != free_id;
      hits |= static_cast<unsigned>(occupied) << volume;
    }
    return hits & pending;
  };
  const auto record = [=](unsigned volumes, int voxel, float distance_m) {
    for (int volume = 0; volume < num_volumes; ++volume) {
      if (!((volumes >> volume) & 1u)) continue;
      const size_t out = first_out + static_cast<size_t>(volume) * num_rays;
      arrays.label[out] = semantics[volume * volume_size + voxel];
      arrays.voxel[out] = voxel;
      arrays.distance[out] = distance_m;
    }
  };
  const double* origin_m = arrays.origins + 3 * (static_cast<size_t>(sample) * arrays.max_origins + origin);
  const unsigned all_volumes = (1u << num_volumes) - 1u;
  trace_ray(grid, origin_m, arrays.directions + 3 * direction, all_volumes, hits_at, record);
}

}  // namespace

bool runs_on_current_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, cast_rays_kernel) == cudaSuccess;
  if (!found) cudaGetLastError();  // clears the error, so that the next check of it does not find this one
  return found;
}

cudaError_t launch_cast_rays(const Grid& grid, const RayArrays& arrays, cudaStream_t stream) {
  const int num_rays = arrays.max_origins * arrays.num_directions;
  if (num_rays == 0 || arrays.num_samples == 0) return cudaSuccess;
  const dim3 blocks((num_rays + kThreads - 1) / kThreads, arrays.num_samples);
  cast_rays_kernel<<<blocks, kThreads, 0, stream>>>(grid, arrays);
  return cudaGetLastError();
}

}  // namespace raycast
