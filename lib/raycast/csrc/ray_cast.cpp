// Python binding of the CUDA ray caster: checks the tensors and allocates the results.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <climits>
#include <tuple>
#include <vector>

#include "ray_cast.h"

namespace {

void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype, int64_t dims,
                  const at::Device& device) {
  TORCH_CHECK(tensor.is_cuda(), name, " is on ", tensor.device(), "; move it to a CUDA device");
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), " but semantics on ", device,
              "; move them to one device");
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), "; convert it to ", dtype);
  TORCH_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions, ", dims, " are needed");
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous; call .contiguous() on it");
}

// semantics uint8 [V, X, Y, Z], origins float64 [O, 3] and directions float32 [R, 3] in metres, lower corner
// of the grid in metres, rays int32 [M] (o * R + r). Returns label uint8, voxel int32 (row-major), distance
// float32 in metres, each [V, M].
std::tuple<at::Tensor, at::Tensor, at::Tensor> cast_rays(
    const at::Tensor& semantics, int64_t free_id, const at::Tensor& origins, const at::Tensor& directions,
    const std::vector<double>& lower_corner, double voxel_size, const at::Tensor& rays) {
  const at::Device device = semantics.device();
  check_tensor(semantics, "semantics", at::kByte, 4, device);
  check_tensor(origins, "origins", at::kDouble, 2, device);
  check_tensor(directions, "directions", at::kFloat, 2, device);
  check_tensor(rays, "rays", at::kInt, 1, device);
  TORCH_CHECK(origins.size(1) == 3 && directions.size(1) == 3, "origins and directions must be [n, 3]");
  TORCH_CHECK(semantics.size(0) >= 1 && semantics.size(0) <= 8, "semantics must hold 1 to 8 volumes, got ",
              semantics.size(0));
  TORCH_CHECK(semantics[0].numel() >= 1 && semantics[0].numel() <= INT_MAX, "a volume of ",
              semantics[0].numel(), " voxels is empty or too large");
  TORCH_CHECK(origins.size(0) * directions.size(0) <= INT_MAX, "too many rays for one launch: cast fewer");
  TORCH_CHECK(rays.size(0) == 0 || origins.size(0) * directions.size(0) > 0,
              "there are no rays to choose from");
  TORCH_CHECK(lower_corner.size() == 3, "the lower corner needs 3 numbers, got ", lower_corner.size());
  raycast::Grid grid;
  for (int axis = 0; axis < 3; ++axis) {
    grid.size[axis] = static_cast<int>(semantics.size(axis + 1));
    grid.lower_m[axis] = lower_corner[axis];
  }
  grid.voxel_size_m = static_cast<double>(static_cast<float>(voxel_size));
  const std::vector<int64_t> shape = {semantics.size(0), rays.size(0)};
  at::Tensor label = at::empty(shape, semantics.options());
  at::Tensor voxel = at::empty(shape, rays.options());
  at::Tensor distance = at::empty(shape, directions.options());
  raycast::RayArrays arrays;
  arrays.semantics = semantics.data_ptr<uint8_t>();
  arrays.num_volumes = static_cast<int>(semantics.size(0));
  arrays.free_id = static_cast<int>(free_id);
  arrays.origins = origins.data_ptr<double>();
  arrays.num_origins = static_cast<int>(origins.size(0));
  arrays.directions = directions.data_ptr<float>();
  arrays.num_directions = static_cast<int>(directions.size(0));
  arrays.rays = rays.data_ptr<int>();
  arrays.num_rays = static_cast<int>(rays.size(0));
  arrays.label = label.data_ptr<uint8_t>();
  arrays.voxel = voxel.data_ptr<int>();
  arrays.distance = distance.data_ptr<float>();
  const c10::cuda::CUDAGuard guard(device);
  const cudaError_t status = raycast::launch_cast_rays(grid, arrays, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(status == cudaSuccess, "casting rays failed: ", cudaGetErrorString(status));
  return std::make_tuple(label, voxel, distance);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("interface_version") = raycast::kInterfaceVersion;
  m.def("runs_on_current_device", &raycast::runs_on_current_device);
  m.def("cast_rays", &cast_rays, "Cast rays through voxel volumes on CUDA", pybind11::arg("semantics"),
        pybind11::arg("free_id"), pybind11::arg("origins"), pybind11::arg("directions"),
        pybind11::arg("lower_corner"), pybind11::arg("voxel_size"), pybind11::arg("rays"));
}
