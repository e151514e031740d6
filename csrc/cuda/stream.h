// The stream that torch wants work on. What tells it is part of libtorch_cuda alone, so it is
// looked up when it is needed: the same module then loads beside a torch without CUDA.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels/kernels.h"

namespace cbam::cuda {

inline Stream current_stream(int32_t device) {
  using Ask = AOTITorchError (*)(int32_t, void**);
  static const Ask ask = [] {
    // By name: torch loads its libraries so that their symbols are not visible to everyone.
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  STD_TORCH_CHECK(ask, "cbam_cuda: this PyTorch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(ask(device, &stream) == 0, "cbam_cuda: torch did not tell its current stream");
  return stream;
}

}  // namespace cbam::cuda
