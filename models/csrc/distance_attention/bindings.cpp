#include "distance_attention.h"

#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "CUDA kernel of models.csrc.distance_attention; see distance_attention.h";
  module.attr("interface_version") = sparseocc::kInterfaceVersion;
  module.def("runs_on_current_device", &sparseocc::runs_on_current_device);
  module.def("distance_attention", &sparseocc::distance_attention);
}
