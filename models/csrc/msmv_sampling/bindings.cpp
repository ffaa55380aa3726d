#include "msmv_sampling.h"

#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "CUDA kernels of models.csrc.msmv_sampling; see msmv_sampling.h";
  module.attr("interface_version") = sparseocc::kInterfaceVersion;
  module.def("runs_on_current_device", &sparseocc::runs_on_current_device);
  module.def("sample_multi_view_forward", &sparseocc::sample_multi_view_forward);
  module.def("sample_multi_view_backward", &sparseocc::sample_multi_view_backward);
}
