// The Python module _C: loading it registers the operators of ops.cpp, and it tells how it was
// built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/target.h"
#if defined(CBAM_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = CBAM_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_targets"] = cbam::cpu::targets_that_run();
  info["cpu_target"] = cbam::cpu::target().name;
  info["cuda_version"] = py::none();
  info["cuda_architectures"] = py::list();
  info["cuda_devices"] = py::list();
#if defined(CBAM_WITH_CUDA)
  info["cuda_version"] = CBAM_CUDA_VERSION;
  info["cuda_architectures"] = py::str(CBAM_CUDA_ARCHITECTURES).attr("split")(";");
  py::list devices;
  for (const auto& d : cbam::cuda::visible_devices())
    devices.append(py::make_tuple(d.name, d.capability_major, d.capability_minor));
  info["cuda_devices"] = devices;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of cbam_cuda";
  m.def("build_info", &build_info,
        "Version, compiler, CPU targets that run here and the one in use, and of the CUDA part its "
        "toolkit version, architectures and visible devices (empty where it was not built).");
}
