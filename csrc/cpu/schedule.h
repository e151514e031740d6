// How samples are spread over threads, the same for forward and backward: whole samples where there
// are enough of them, so that each stays in its core's cache; else one sample's stages split in
// units. The MLP between their stages is that of a group of samples, and where reading its weights
// is what takes long, that of all. Units have fixed sizes and write to places of their
// own, so the thread count never shows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "../attention_math.h"
#include "../problem.h"
#include "thread_pool.h"

namespace cbam::cpu {

namespace {

// Less work than this many elements is not worth a second thread: a fork and join costs
// microseconds.
constexpr int64_t kSmallestSplit = 16 * 1024;
// Nor are fewer weights than this, in a layer of the MLP.
constexpr int64_t kSmallestLayer = 64 * 1024;
// All threads share the MLP if its weights have so many bytes, and a thread only so few samples to
// read them for.
constexpr int64_t kSharedWeights = 1 << 20, kMostShared = 2;
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

// Out of line, so that a body is compiled once for one thread and for many.
template <class Body>
__attribute__((noinline)) void run_task(void* body, int64_t task) {
  (*static_cast<Body*>(body))(task);
}
template <class Body>
void parallel_tasks(const ThreadPool& pool, int64_t tasks, Body body) {
  if (tasks == 1) return run_task<Body>(&body, 0);
  pool.run(tasks, run_task<Body>, &body);
}

// How a stage's units are run: all on this thread, or in as many runs as a pool has threads.
class Run {
 public:
  Run() = default;
  explicit Run(const ThreadPool& pool) : pool_(pool) {}

  // Calls body(begin, end) for runs of units.
  template <class Body>
  void operator()(int64_t units, Body body) const {
    const int64_t most = units < pool_.threads ? units : pool_.threads;
    const int64_t tasks = most < 1 ? 1 : most;
    parallel_tasks(pool_, tasks,
                   [&](int64_t t) { body(units * t / tasks, units * (t + 1) / tasks); });
  }

 private:
  ThreadPool pool_{1, nullptr};
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
// n itself where none comes before `end`, or it does not pay. On an Intel Xeon what arrives drives
// out what is in use: a forward took a fifth longer with it, where on an AMD EPYC it took a twelfth
// less; others have not been measured.
inline int64_t sample_to_fetch(int64_t n, int64_t together, int64_t end) {
#if defined(__x86_64__)
  const bool pays = __builtin_cpu_is("amd");
#else
  const bool pays = false;
#endif
  return pays && n + together < end ? n + together : n;
}

// How a batch is spread over threads.
struct Split {
  int64_t group;    // samples that a worker takes together
  int64_t whole;    // samples that a worker takes alone; of the others the stages are split
  int64_t workers;  // that take whole samples
  bool share_gate;  // whether the MLP of whole samples is shared by all threads

  Split(const ForwardProblem& p, int64_t threads, int64_t element_bytes) {
    const Shape& s = p.shape;
    const int64_t elements = s.channels * s.pixels(), weights = 2 * s.channels * s.hidden;
    const int64_t held = weights * bytes_of_accumulator(p.dtype);
    const int64_t fitting = (held < kGroupBytes ? kGroupBytes : held) / (elements * element_bytes);
    group = fitting < 1 ? 1 : fitting < kMostTogether ? fitting : kMostTogether;
    if (elements * s.samples < kSmallestSplit) threads = 1;
    whole = s.samples - (elements < kSmallestSplit ? 0 : s.samples % threads);
    workers = whole == 0 ? 1 : whole < threads ? whole : threads;
    share_gate = weights * bytes_of(p.weights.dtype) >= kSharedWeights &&
                 whole <= workers * (group < kMostShared ? group : kMostShared);
  }
};

// The workspaces of a call, each made by the worker that it is for.
template <class Workspace>
class Workspaces {
  static_assert(std::is_trivially_destructible_v<Workspace>,
                "made in memory that is given back as it is");

 public:
  Workspaces(const ForwardProblem& problem, const Split& split)
      : problem_(problem), group_(split.group) {
    Carver measure(nullptr);
    const Workspace probe(problem, group_, measure);
    each_ = measure.used();
    Carver table(nullptr);
    table.array<Workspace>(split.workers);
    made_ = reinterpret_cast<Workspace*>(scratch_.allocate(table.used() + each_ * split.workers));
    memory_ = reinterpret_cast<char*>(made_) + table.used();
  }

  Workspace& make(int64_t worker) {
    Carver carver(memory_ + each_ * worker);
    return *new (made_ + worker) Workspace(problem_, group_, carver);
  }
  Workspace& operator[](int64_t worker) const { return made_[worker]; }

 private:
  const ForwardProblem& problem_;
  int64_t group_, each_;
  Scratch scratch_;
  Workspace* made_;
  char* memory_;
};

// Runs a direction over the whole batch. It has three steps, each for samples [first, last):
// before_gate(first, last, workspace, run), gate(first, last, run) with the MLP, and
// after_gate(first, last, end, workspace, run), where those up to `end` are taken by the same
// threads; `run` is how units of a stage are run. Its Workspace is made from (problem, samples in a
// group, Carver).
template <class Direction>
class Schedule {
 public:
  Schedule(const Direction& direction, const ForwardProblem& problem, const ThreadPool& pool,
           int64_t element_bytes)
      : direction_(direction),
        samples_(problem.shape.samples),
        pool_(pool),
        split_(problem, pool.threads, element_bytes),
        spaces_(problem, split_) {}

  void run() {
    if (split_.whole > 0 && split_.share_gate)
      together();
    else if (split_.whole > 0)
      apart();
    for (int64_t n = split_.whole; n < samples_; ++n)
      take(n, n + 1, samples_, spaces_.make(0), Run(pool_));
  }

 private:
  using Workspace = typename Direction::Workspace;

  void take(int64_t first, int64_t last, int64_t end, Workspace& ws, const Run& run) const {
    direction_.before_gate(first, last, ws, run);
    direction_.gate(first, last, run);
    direction_.after_gate(first, last, end, ws, run);
  }

  // Calls body(worker, first, last) for each worker's part of the whole samples.
  template <class Body>
  void for_workers(Body body) const {
    const int64_t workers = split_.workers;
    parallel_tasks(pool_, workers, [&](int64_t worker) {
      body(worker, split_.whole * worker / workers, split_.whole * (worker + 1) / workers);
    });
  }

  // Each worker from its first sample to its last.
  void apart() {
    for_workers([&](int64_t worker, int64_t first, int64_t last) {
      Workspace& own = spaces_.make(worker);
      for (; first < last; first += split_.group)
        take(first, last - first < split_.group ? last : first + split_.group, last, own, Run());
    });
  }

  // Every worker its samples, but all of them the MLP.
  void together() {
    for_workers([&](int64_t worker, int64_t first, int64_t last) {
      direction_.before_gate(first, last, spaces_.make(worker), Run());
    });
    direction_.gate(0, split_.whole, Run(pool_));
    for_workers([&](int64_t worker, int64_t first, int64_t last) {
      direction_.after_gate(first, last, last, spaces_[worker], Run());
    });
  }

  const Direction& direction_;
  int64_t samples_;
  const ThreadPool& pool_;
  Split split_;
  Workspaces<Workspace> spaces_;
};

template <class Direction>
void run_samples(const Direction& direction, const ForwardProblem& problem, const ThreadPool& pool,
                 int64_t element_bytes) {
  Schedule<Direction>(direction, problem, pool, element_bytes).run();
}

}  // namespace
}  // namespace cbam::cpu
