#include "fibers.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

namespace {

constexpr size_t kGuardBytes = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;  // red zones around every local
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kSlotBytes = kGuardBytes + kStackBytes;

// Stacks are mapped many at a time. Each guard makes two mappings more, of which Linux allows 65530
// a process, and a process may hold several such libraries: in a large grid the last do without.
constexpr size_t kSlabStacks = 64;
constexpr size_t kMostGuards = 8192;

#if defined(__SANITIZE_ADDRESS__)
// Of the switch under way: only the arriving side learns the bounds of the stack that it came from,
// which for the host's are not known otherwise.
Context* departed = nullptr;

void finish_switch(void* fake_stack) {
  const void* begin;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &begin, &bytes);
  departed->begin = begin;
  departed->bytes = bytes;
}
#endif

}  // namespace

#if defined(__x86_64__)
// Saves what a call must preserve, exchanges the stacks, and returns on the other one.
extern "C" void emulator_exchange_stacks(void** from, void* to);
asm(R"(
.text
.globl emulator_exchange_stacks
.hidden emulator_exchange_stacks
.type emulator_exchange_stacks, @function
emulator_exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_exchange_stacks, . - emulator_exchange_stacks
)");
#endif

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  departed = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.begin, to.bytes);
#endif
#if defined(__x86_64__)
  emulator_exchange_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
  finish_switch(from.fake_stack);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
namespace {

void (*entry_after_switch)();

void first_entry() {
  finish_switch(nullptr);
  entry_after_switch();
}

}  // namespace
#endif

Fiber::Fiber(void (*entry)(), char* stack) : entry_(entry), stack_(stack) {
  context.begin = stack_;
  context.bytes = kStackBytes;
  restart();
}

void Fiber::restart() {
  void (*entry)() = entry_;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(context.begin, context.bytes);  // frames that never returned
  entry_after_switch = entry_;
  entry = first_entry;
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // where a caller's return address would be, which aligns the stack
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack_;
  context.registers.uc_stack.ss_size = kStackBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

FiberPool::~FiberPool() {
  for (void* slab : slabs_) munmap(slab, kSlabStacks * kSlotBytes);
}

char* FiberPool::next_stack() {
  const size_t number = all_.size();
  if (number % kSlabStacks == 0) {
    void* mapping = mmap(nullptr, kSlabStacks * kSlotBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    slabs_.push_back(mapping);
  }
  char* const slot = static_cast<char*>(slabs_.back()) + number % kSlabStacks * kSlotBytes;
  // A stack that overflows must not hit another.
  if (number < kMostGuards) mprotect(slot, kGuardBytes, PROT_NONE);
  return slot + kGuardBytes;
}

Fiber* FiberPool::take() {
  if (idle_.empty()) {
    char* const stack = next_stack();
    all_.push_back(std::make_unique<Fiber>(entry_, stack));
    idle_.push_back(all_.back().get());
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  fiber->running = true;
  return fiber;
}

void FiberPool::give_back(Fiber* fiber) {
  fiber->running = false;
  idle_.push_back(fiber);
}

void FiberPool::restart_all() {
  for (const auto& fiber : all_) {
    if (!fiber->running) continue;
    fiber->restart();
    give_back(fiber.get());
  }
}

}  // namespace emulator
