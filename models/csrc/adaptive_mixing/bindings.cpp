#include "adaptive_mixing.h"

#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "CUDA kernel of models.csrc.adaptive_mixing; see adaptive_mixing.h";
  module.attr("interface_version") = sparseocc::kInterfaceVersion;
  module.def("runs_on_current_device", &sparseocc::runs_on_current_device);
  module.def("adaptive_mix", &sparseocc::adaptive_mix);
}
