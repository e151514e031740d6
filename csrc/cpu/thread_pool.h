// torch's thread pool behind a plain function, so that kernels need no header of torch.
#pragma once

#include <cstdint>

namespace cbam::cpu {

// run(tasks, body, context) calls body(context, task) once for each task in 0 .. tasks, in any
// order, and returns when all are done.
struct ThreadPool {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
};

}  // namespace cbam::cpu
