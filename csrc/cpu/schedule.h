// How samples are spread over threads, the same for forward and backward: whole samples where there
// are enough of them, so that each stays in its core's cache; else one sample's stages split in
// units. Units have fixed sizes and write to places of their own, so the thread count never shows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "../attention_math.h"
#include "../problem.h"
#include "thread_pool.h"

namespace cbam::cpu {

namespace {

// Less work than this many elements is not worth a second thread: a fork and join costs
// microseconds.
constexpr int64_t kSmallestSplit = 16 * 1024;
// Samples share one walk over the MLP's weights: those whose x together fits in this many bytes,
// and more where the weights are what most of the time goes to.
constexpr int64_t kGroupBytes = 1 << 20, kMostTogether = 8;

// Outputs from this size on are not read from a cache by whoever reads them next, and are stored
// past it.
constexpr int64_t kStreamedBytes = 8 << 20;

// Whether a tensor of x's size is streamed.
inline bool is_large(const ForwardProblem& p) {
  return p.shape.samples * p.shape.channels * p.shape.pixels() * bytes_of(p.dtype) >=
         kStreamedBytes;
}

template <class Body>
void parallel_tasks(const ThreadPool& pool, int64_t tasks, Body body) {
  if (tasks == 1) return body(0);
  pool.run(tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// A stage's units, all on this thread.
struct OnOneThread {
  template <class Body>
  void operator()(int64_t units, Body body) const {
    body(0, units);
  }
};

// A stage's units, in as many runs as there are threads.
struct OverThreads {
  const ThreadPool& pool;

  template <class Body>
  void operator()(int64_t units, Body body) const {
    const int64_t tasks = units < pool.threads ? units : pool.threads;
    parallel_tasks(pool, tasks,
                   [&](int64_t t) { body(units * t / tasks, units * (t + 1) / tasks); });
  }
};

// Hands out 64-byte aligned arrays from `base`; with base null it only adds up what they need.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <class E>
  E* array(int64_t count) {
    E* p = base_ ? reinterpret_cast<E*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The memory of one call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(base_); }

  // Calls carve(Carver&) to learn how much is needed, and again to give it out.
  template <class Carve>
  void carve(Carve carve) {
    Carver measure(nullptr);
    carve(measure);
    allocate(measure.used());
    Carver carver(base_);
    carve(carver);
  }
  char* allocate(int64_t bytes) {
    base_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    if (!base_ && bytes > 0) throw std::bad_alloc();
    return base_;
  }

 private:
  char* base_ = nullptr;
};

// The sample that is asked for while sample n is written: the one after those that are `together`,
// n itself where none comes before `end`. On an Intel Xeon what arrives drives out what is in use:
// a forward took a fifth longer with it, where on an AMD EPYC it took a twelfth less.
inline int64_t sample_to_fetch(int64_t n, int64_t together, int64_t end) {
#if defined(__x86_64__)
  static const bool pays = __builtin_cpu_is("amd");
#else
  constexpr bool pays = false;
#endif
  return pays && n + together < end ? n + together : n;
}

// Runs direction.samples(first, last, end, workspace, stage runner) over the whole batch, where the
// samples up to `end` are taken by the same threads. `Direction` names its Workspace, made from
// (problem, samples in a group, Carver).
template <class Direction>
void run_samples(const Direction& direction, const ForwardProblem& problem, const ThreadPool& pool,
                 int64_t element_bytes) {
  const Shape& shape = problem.shape;
  const int64_t elements = shape.channels * shape.pixels();
  const int64_t sample_bytes = elements * element_bytes;
  const int64_t weight_bytes =
      2 * shape.channels * shape.hidden * bytes_of_accumulator(problem.dtype);
  const int64_t largest = kGroupBytes > weight_bytes ? kGroupBytes : weight_bytes;
  const int64_t fitting = largest / sample_bytes;
  const int64_t group = fitting < 1 ? 1 : fitting < kMostTogether ? fitting : kMostTogether;
  const int64_t threads = elements * shape.samples < kSmallestSplit ? 1 : pool.threads;
  const int64_t alone = elements < kSmallestSplit ? 0 : shape.samples % threads;
  const int64_t whole = shape.samples - alone;
  const int64_t workers = whole == 0 ? 1 : whole < threads ? whole : threads;

  Carver measure(nullptr);
  typename Direction::Workspace probe(problem, group, measure);
  Scratch scratch;
  char* base = scratch.allocate(measure.used() * workers);
  const auto workspace = [&](int64_t worker) {
    Carver carver(base + measure.used() * worker);
    return typename Direction::Workspace(problem, group, carver);
  };

  if (whole > 0)
    parallel_tasks(pool, workers, [&](int64_t worker) {
      auto own = workspace(worker);
      const int64_t last = whole * (worker + 1) / workers;
      for (int64_t first = whole * worker / workers; first < last; first += group)
        direction.samples(first, last - first < group ? last : first + group, last, own,
                          OnOneThread{});
    });
  for (int64_t n = whole; n < shape.samples; ++n) {
    auto shared = workspace(0);
    direction.samples(n, n + 1, shape.samples, shared, OverThreads{pool});
  }
}

}  // namespace
}  // namespace cbam::cpu
