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
  // On a stack of kStackBytes whose lowest byte is `stack`.
  Fiber(void (*entry)(), char* stack);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets what it ran: the next switch to it starts at its entry.
  void restart();

  Context context;
  bool running = false;  // a thread, from its start to its end

 private:
  void (*entry_)();
  char* stack_;
};

// Fibers that wait at the top of their entry's loop.
class FiberPool {
 public:
  explicit FiberPool(void (*entry)()) : entry_(entry) {}
  ~FiberPool();

  Fiber* take();
  void give_back(Fiber* fiber);
  // After a launch that ended early: takes back every fiber, wherever it stopped.
  void restart_all();

 private:
  char* next_stack();

  void (*entry_)();
  std::vector<void*> slabs_;  // of memory for stacks
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> idle_;
};

}  // namespace emulator
