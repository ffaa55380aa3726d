// The arithmetic of one slot (a point in a frame, for a group): projection, view choice, corners, their
// derivatives. Steps and rounding are those of reference.py.
#pragma once

#include "../include/device.h"

namespace sparseocc {

constexpr int kMatrixSize = 16;  // ego2img is stored as 4x4, row by row; its last row is not used

template <typename real>
SPARSEOCC_HD real depth_eps() {
  return static_cast<real>(1e-5);
}

// A point in one camera: pixel times depth, and depth in metres.
template <typename real>
struct Projection {
  real u, v, depth;
};

template <typename real>
SPARSEOCC_HD real affine_row(const real* row, real x, real y, real z) {
  real sum = add_rounded(multiply_rounded(row[0], x), multiply_rounded(row[1], y));
  sum = add_rounded(sum, multiply_rounded(row[2], z));
  return add_rounded(sum, row[3]);
}

template <typename real>
SPARSEOCC_HD Projection<real> project(const real* matrix, real x, real y, real z) {
  Projection<real> result;
  result.u = affine_row(matrix, x, y, z);
  result.v = affine_row(matrix + 4, x, y, z);
  result.depth = affine_row(matrix + 8, x, y, z);
  return result;
}

template <typename real>
SPARSEOCC_HD real clamped_depth(real depth) {
  return depth < depth_eps<real>() ? depth_eps<real>() : depth;
}

// Where a point falls: position over image size (0..1 inside) in the camera it is sampled from.
template <typename real>
struct Location {
  real u, v;
  int view;
};

// The first of the cameras that sees the point, camera 0 if none does.
template <typename real>
SPARSEOCC_HD Location<real> locate(const real* matrices, int cameras, real x, real y, real z,
                                   real inverse_width, real inverse_height) {
  Location<real> fallback = {0, 0, 0};
  for (int view = 0; view < cameras; ++view) {
    const Projection<real> p = project(matrices + view * kMatrixSize, x, y, z);
    const real depth = clamped_depth(p.depth);
    const real u = multiply_rounded(divide_rounded(p.u, depth), inverse_width);
    const real v = multiply_rounded(divide_rounded(p.v, depth), inverse_height);
    const Location<real> here = {u, v, view};
    if (p.depth > depth_eps<real>() && u > 0 && u < 1 && v > 0 && v < 1) return here;
    if (view == 0) fallback = here;
  }
  return fallback;
}

// Gradient with respect to the point, from the gradient with respect to (u, v) in the chosen camera.
template <typename real>
SPARSEOCC_HD void locate_backward(const real* matrix, real x, real y, real z, real inverse_width,
                                  real inverse_height, real grad_u, real grad_v, real (&grad_point)[3]) {
  const Projection<real> p = project(matrix, x, y, z);
  const real inverse_depth = 1 / clamped_depth(p.depth);
  const real grad_row0 = grad_u * inverse_width * inverse_depth;
  const real grad_row1 = grad_v * inverse_height * inverse_depth;
  const bool depth_counts = p.depth >= depth_eps<real>();
  const real grad_depth = depth_counts ? -(grad_row0 * p.u + grad_row1 * p.v) * inverse_depth : real(0);
#pragma unroll
  for (int i = 0; i < 3; ++i)
    grad_point[i] = grad_row0 * matrix[i] + grad_row1 * matrix[4 + i] + grad_depth * matrix[8 + i];
}

// The two cells around a position along one axis. Cells outside the map have index clamped, weight and slope
// 0.
template <typename real>
struct Axis {
  int index[2];
  real weight[2];
  real slope[2];  // derivative of the weight with respect to the position in cells
  bool touches;   // whether any of the two is inside the map
};

template <typename real>
SPARSEOCC_HD Axis<real> axis_cells(real normalised, int size) {
  Axis<real> axis = {{0, 0}, {0, 0}, {0, 0}, false};
  const real position = multiply_rounded(normalised, static_cast<real>(size - 1));
  if (!(position > -1 && position < size)) return axis;  // also when it is not a number
  const real low = round_down(position);
  const real fraction = position - low;
  const int index = static_cast<int>(low);
  axis.touches = true;
  if (index >= 0) {
    axis.index[0] = index;
    axis.weight[0] = 1 - fraction;
    axis.slope[0] = -1;
  }
  if (index + 1 < size) {
    axis.index[1] = index + 1;
    axis.weight[1] = fraction;
    axis.slope[1] = 1;
  } else {
    axis.index[1] = size - 1;
  }
  return axis;
}

// The group whose level weights slot (frame, group) uses. Published order: features are flattened in (frame,
// group) order, weights in (group, frame) order.
SPARSEOCC_HD int weight_group(int frame, int group, int frames, int groups, bool published_order) {
  return published_order ? (frame * groups + group) / frames : group;
}

}  // namespace sparseocc
