// Stacks to run CUDA threads on, and the switch from one to another within one OS thread.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// Where a stack stopped. The host's own stack is one of them.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers = {};
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
  const void* begin = nullptr;  // of the stack
  size_t bytes = 0;
};

// Goes on where `to` stopped; returns when something switches back to `from`.
void switch_context(Context& from, Context& to);

class Fiber {
 public:
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets what it ran: the next switch to it starts at its entry.
  void restart();

  Context context;

 private:
  void (*entry_)();
  char* mapping_;
};

// Fibers that wait at the top of their entry's loop.
class FiberPool {
 public:
  explicit FiberPool(void (*entry)()) : entry_(entry) {}

  Fiber* take();
  void give_back(Fiber* fiber) { idle_.push_back(fiber); }
  // After a launch that ended early: takes back every fiber, wherever it stopped.
  void restart_all();

 private:
  void (*entry_)();
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> idle_;
};

}  // namespace emulator
