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

// Samples S, volumes V each: semantics uint8 [S, V, X, Y, Z], origins float64 [S, O, 3] in metres, of which
// each sample has the first num_origins int32 [S], directions float32 [R, 3], lower corner of the grid in
// metres. Returns label uint8, voxel int32 (row-major), distance float32 in metres, each [S, V, O * R].
std::tuple<at::Tensor, at::Tensor, at::Tensor> cast_rays(
    const at::Tensor& semantics, int64_t free_id, const at::Tensor& origins, const at::Tensor& num_origins,
    const at::Tensor& directions, const std::vector<double>& lower_corner, double voxel_size) {
  const at::Device device = semantics.device();
  check_tensor(semantics, "semantics", at::kByte, 5, device);
  check_tensor(origins, "origins", at::kDouble, 3, device);
  check_tensor(num_origins, "num_origins", at::kInt, 1, device);
  check_tensor(directions, "directions", at::kFloat, 2, device);
  const int64_t num_samples = semantics.size(0), num_volumes = semantics.size(1);
  TORCH_CHECK(origins.size(2) == 3 && directions.size(1) == 3, "origins and directions must be [..., 3]");
  TORCH_CHECK(origins.size(0) == num_samples && num_origins.size(0) == num_samples,
              "semantics, origins and num_origins are of different numbers of samples");
  TORCH_CHECK(num_samples <= 65535, "too many samples for one launch: cast fewer");
  TORCH_CHECK(num_volumes >= 1 && num_volumes <= 8, "semantics must hold 1 to 8 volumes, got ", num_volumes);
  raycast::Grid grid;
  int64_t volume_size = 1;
  for (int axis = 0; axis < 3; ++axis) volume_size *= semantics.size(axis + 2);
  TORCH_CHECK(volume_size >= 1 && volume_size <= INT_MAX, "a volume of ", volume_size,
              " voxels is empty or too large");
  const int64_t num_rays = origins.size(1) * directions.size(0);
  TORCH_CHECK(num_rays <= INT_MAX, "too many rays for one launch: cast fewer");
  TORCH_CHECK(lower_corner.size() == 3, "the lower corner needs 3 numbers, got ", lower_corner.size());
  for (int axis = 0; axis < 3; ++axis) {
    grid.size[axis] = static_cast<int>(semantics.size(axis + 2));
    grid.lower_m[axis] = lower_corner[axis];
  }
  grid.voxel_size_m = static_cast<double>(static_cast<float>(voxel_size));
  const std::vector<int64_t> shape = {num_samples, num_volumes, num_rays};
  at::Tensor label = at::empty(shape, semantics.options());
  at::Tensor voxel = at::empty(shape, num_origins.options());
  at::Tensor distance = at::empty(shape, directions.options());
  raycast::RayArrays arrays;
  arrays.semantics = semantics.data_ptr<uint8_t>();
  arrays.num_samples = static_cast<int>(num_samples);
  arrays.num_volumes = static_cast<int>(num_volumes);
  arrays.free_id = static_cast<int>(free_id);
  arrays.origins = origins.data_ptr<double>();
  arrays.num_origins = num_origins.data_ptr<int>();
  arrays.max_origins = static_cast<int>(origins.size(1));
  arrays.directions = directions.data_ptr<float>();
  arrays.num_directions = static_cast<int>(directions.size(0));
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
        pybind11::arg("free_id"), pybind11::arg("origins"), pybind11::arg("num_origins"),
        pybind11::arg("directions"), pybind11::arg("lower_corner"), pybind11::arg("voxel_size"));
}
