// The path of one ray through the grid. The same operations in the same order as lib/raycast/kernels.py, in
// double precision: grazing rays end metres away if one of them rounds differently, so no multiplication and
// addition may be fused (multiply() sees to that on the device).
//
// Amanatides and Woo, "A fast voxel traversal algorithm for ray tracing" (1987).
// Units: positions and distances in voxels from the grid's lower corner, unless a name ends in _m.
#pragma once

#include <cfloat>
#include <cmath>

#ifdef __CUDACC__
#define RAYCAST_INLINE __host__ __device__ __forceinline__
#else
#define RAYCAST_INLINE inline
#endif

namespace raycast {

constexpr int kMinStepLimit = 1000;

struct Grid {
  int size[3];
  double lower_m[3];   // lower corner, metres
  double voxel_size_m;  // a float32 value
};

// State of the walk along one axis.
struct Axis {
  int cell;
  int step;        // +1 or -1
  double next;     // distance to the next border
  double between;  // distance between borders
};

RAYCAST_INLINE double multiply(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Metres to voxels along one axis; computed in double, kept in single precision as published.
RAYCAST_INLINE double to_voxels(double position_m, double lower_m, double voxel_size_m) {
  return static_cast<double>(static_cast<float>((position_m - lower_m) / voxel_size_m));
}

RAYCAST_INLINE Axis start_axis(double start, double slope) {
  Axis axis;
  axis.cell = static_cast<int>(start);  // towards zero: a start in (-1, 0) counts as inside the first voxel
  axis.step = slope >= 0.0 ? 1 : -1;
  if (slope == 0.0) {
    axis.next = axis.between = DBL_MAX;
  } else {
    const int border = axis.step > 0 ? axis.cell + 1 : axis.cell;
    axis.next = (static_cast<double>(border) - start) / slope;
    axis.between = static_cast<double>(axis.step) / slope;
  }
  return axis;
}

RAYCAST_INLINE bool inside(const Axis& axis, int size) { return axis.cell >= 0 && axis.cell < size; }

// The voxel lies outside along this axis and the ray moves away.
RAYCAST_INLINE bool leaves(const Axis& axis, int size) {
  return (axis.cell < 0 && axis.step < 0) || (axis.cell >= size && axis.step > 0);
}

RAYCAST_INLINE double advance_along(Axis& axis) {
  const double distance = axis.next;
  axis.cell += axis.step;
  axis.next += axis.between;
  return distance;
}

// Goes to the next voxel; returns the distance at which the ray left the one before. Branches, not a
// reference to the chosen axis, keep the axes in registers.
RAYCAST_INLINE double advance(Axis& x, Axis& y, Axis& z) {
  if (x.next < y.next) {
    if (x.next < z.next) return advance_along(x);
  } else if (y.next < z.next) {
    return advance_along(y);
  }
  return advance_along(z);
}

// Casts one ray through all volumes, whose occupied voxels may differ.
//   origin_m [3] double, direction [3] float: metres
//   hits_at(voxel, pending) -> those of the volumes `pending` (bits) that are occupied at a row-major voxel
//   record(volumes, voxel, distance_m): the ray ends there in these volumes
template <typename HitsAt, typename Record>
RAYCAST_INLINE void trace_ray(const Grid& grid, const double* origin_m, const float* direction,
                              unsigned all_volumes, const HitsAt& hits_at, const Record& record) {
  double start[3], ray[3];
  for (int a = 0; a < 3; ++a) {
    const double end_m = origin_m[a] + static_cast<double>(direction[a]);
    start[a] = to_voxels(origin_m[a], grid.lower_m[a], grid.voxel_size_m);
    ray[a] = to_voxels(end_m, grid.lower_m[a], grid.voxel_size_m) - start[a];
  }
  const double length = sqrt(multiply(ray[0], ray[0]) + multiply(ray[1], ray[1]) + multiply(ray[2], ray[2]));
  Axis x = start_axis(start[0], ray[0] / length);
  Axis y = start_axis(start[1], ray[1] / length);
  Axis z = start_axis(start[2], ray[2] / length);
  const int size_sum = grid.size[0] + grid.size[1] + grid.size[2];
  const int step_limit = size_sum > kMinStepLimit ? size_sum : kMinStepLimit;
  const float voxel_size_m = static_cast<float>(grid.voxel_size_m);
  unsigned pending = all_volumes;
  int last_voxel = 0;
  double left_at = -1.0;  // a ray that never comes inside keeps this and voxel 0
  bool was_inside = false;
  for (int step = 0; step < step_limit; ++step) {
    if (inside(x, grid.size[0]) && inside(y, grid.size[1]) && inside(z, grid.size[2])) {
      was_inside = true;
      last_voxel = (x.cell * grid.size[1] + y.cell) * grid.size[2] + z.cell;
      left_at = advance(x, y, z);
      const unsigned hits = hits_at(last_voxel, pending);
      if (hits) {
        record(hits, last_voxel, static_cast<float>(left_at) * voxel_size_m);
        pending ^= hits;
        if (!pending) return;
      }
    } else if (was_inside || leaves(x, grid.size[0]) || leaves(y, grid.size[1]) || leaves(z, grid.size[2])) {
      break;
    } else {
      advance(x, y, z);
    }
  }
  record(pending, last_voxel, static_cast<float>(left_at) * voxel_size_m);
}

}  // namespace raycast
