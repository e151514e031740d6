// The Python module _C: loading it registers the operators of ops.cpp, and it tells how it was
// built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/target.h"
#include "cuda/describe.h"
#include "cuda/traffic.h"
#if defined(CBAM_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

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

std::string cuda_problem([[maybe_unused]] int index) {
#if defined(CBAM_WITH_CUDA)
  return cbam::cuda::problem(index);
#else
  return "built without CUDA";
#endif
}

py::dict limits_dict(const cbam::cuda::DeviceLimits& d) {
  return py::dict(
      "name"_a = d.name, "capability"_a = d.capability, "multiprocessors"_a = d.multiprocessors,
      "threads_per_multiprocessor"_a = d.threads_per_multiprocessor,
      "shared_per_block"_a = d.shared_per_block,
      "shared_per_multiprocessor"_a = d.shared_per_multiprocessor, "l2_bytes"_a = d.l2_bytes,
      "bandwidth"_a = d.bandwidth,
      "clusters"_a = std::vector<int>(d.clusters, d.clusters + cbam::cuda::kClusterSizes));
}

py::list known_devices() {
  py::list devices;
  for (const auto& d : cbam::cuda::known_devices()) devices.append(limits_dict(d));
  return devices;
}

// A GPU of the table, or "cuda:INDEX" for one of this machine.
cbam::cuda::DeviceLimits limits_of(const std::string& device) {
#if defined(CBAM_WITH_CUDA)
  const auto count = static_cast<int>(cbam::cuda::visible_devices().size());
  for (int index = 0; index < count; ++index)
    if (device == "cuda:" + std::to_string(index)) return cbam::cuda::limits_of_device(index);
#endif
  return cbam::cuda::known_device(device);
}

py::dict traffic_dict(const cbam::cuda::Traffic& t) {
  return py::dict("x_read"_a = t.x_read, "residual_read"_a = t.residual_read,
                  "out_written"_a = t.out_written, "weights_read"_a = t.weights_read,
                  "small_read"_a = t.small_read, "small_written"_a = t.small_written,
                  "sums_read"_a = t.sums_read, "sums_written"_a = t.sums_written);
}

const char* name_of(cbam::cuda::Access access) {
  switch (access) {
    case cbam::cuda::Access::kScalar: return "scalar";
    case cbam::cuda::Access::kVector: return "vector";
    case cbam::cuda::Access::kPacked: return "packed";
  }
  return "";
}

py::dict reduction_dict(const cbam::cuda::ReductionGeometry& g) {
  py::dict d("tiles"_a = g.tiles, "tile"_a = g.tile, "splits"_a = g.splits, "span"_a = g.span,
             "reverse"_a = g.reverse);
  if (g.along_rows)
    d["lanes"] = g.lanes;
  else
    d.attr("update")("access"_a = name_of(g.access), "period"_a = g.period,
                     "row_group"_a = g.row_group);
  return d;
}

py::dict box_dict(const cbam::cuda::BoxGeometry& g) {
  return py::dict("box"_a = py::make_tuple(g.box_depth, g.box_height, g.box_width),
                  "boxes"_a = py::make_tuple(g.boxes_depth, g.boxes_height, g.boxes_width));
}

py::dict scale_dict(const cbam::cuda::ScaleGeometry& g) {
  py::dict d = box_dict(g);
  d.attr("update")("chunks"_a = g.chunks, "chunk"_a = g.chunk, "access"_a = name_of(g.access),
                   "period"_a = g.period, "row_group"_a = g.row_group,
                   "threads_along"_a = g.threads_along);
  return d;
}

py::dict tile_dict(const cbam::cuda::TileGeometry& g) {
  return py::dict("tiles"_a = g.tiles, "tile"_a = g.tile, "splits"_a = g.splits, "span"_a = g.span,
                  "chunk"_a = g.chunk, "access"_a = name_of(g.access), "row_group"_a = g.row_group,
                  "threads_along"_a = g.threads_along, "reverse"_a = g.reverse);
}

const char* name_of(cbam::cuda::Copy copy) {
  switch (copy) {
    case cbam::cuda::Copy::kPlain: return "plain";
    case cbam::cuda::Copy::kAsync: return "async";
    case cbam::cuda::Copy::kBulk: return "bulk";
  }
  return "";
}

py::dict resident_dict(const cbam::cuda::ResidentGeometry& g) {
  const bool by_pixels = g.split == cbam::cuda::Split::kPixels;
  py::dict d("kind"_a = g.cluster ? "cluster" : "grid", "team"_a = g.team, "teams"_a = g.teams,
             "threads"_a = g.threads, "samples"_a = g.samples,
             "split"_a = by_pixels ? "pixels" : "channels", "channels"_a = g.channels,
             "pixels"_a = g.pixels, "chunk"_a = g.chunk, "chunks"_a = g.chunks,
             "copy"_a = name_of(g.copy), "boxes_each"_a = g.boxes_each, "lanes"_a = g.lanes,
             "groups"_a = g.groups, "holds_weights"_a = g.weight_bytes > 0,
             "shares_units"_a = g.shares_units, "fetches_ahead"_a = g.fetches_ahead,
             "exchange"_a = g.exchange);
  d.attr("update")(box_dict(g.boxes));
  return d;
}

py::dict mlp_dict(const cbam::cuda::MlpGeometry& g) {
  return py::dict("together"_a = g.together, "hidden_samples"_a = g.hidden_samples,
                  "unit_warps"_a = g.unit_warps, "gate_samples"_a = g.gate_samples,
                  "vectors"_a = g.vectors);
}

py::dict mlp_dict(const cbam::cuda::MlpBackwardGeometry& g) {
  return py::dict("together"_a = g.together, "gate_samples"_a = g.gate_samples,
                  "units_along"_a = g.units_along, "hidden_samples"_a = g.hidden_samples);
}

py::dict passes_dict(const cbam::cuda::ForwardPlan& plan) {
  if (plan.resident) {
    py::dict held = resident_dict(*plan.resident);
    held["band"] = plan.resident->band;
    held["neighbours"] = plan.resident->neighbours;
    return py::dict("resident"_a = held);
  }
  return py::dict("pool"_a = reduction_dict(plan.pool), "maps"_a = reduction_dict(plan.maps),
                  "scale"_a = scale_dict(plan.scale), "mlp"_a = mlp_dict(plan.mlp));
}

py::dict passes_dict(const cbam::cuda::BackwardPlan& plan) {
  if (const auto& g = plan.resident) {
    py::dict held = resident_dict(*g);
    held.attr("update")("x"_a = g->holds_x() ? "stays" : "is read twice", "x_slots"_a = g->x_slots,
                        "access"_a = name_of(g->access), "row_group"_a = g->row_group,
                        "threads_along"_a = g->threads_along);
    return py::dict("resident"_a = held);
  }
  return py::dict("sums"_a = tile_dict(plan.cross), "stencil"_a = box_dict(plan.stencil),
                  "terms"_a = tile_dict(plan.terms), "mlp"_a = mlp_dict(plan.mlp),
                  "dx"_a = tile_dict(plan.input));
}

// Launches that sum over the batch for the gradients of the weights.
int summing_launches(const cbam::cuda::ForwardPlan&, const cbam::ForwardProblem&) { return 0; }
int summing_launches(const cbam::cuda::BackwardPlan& plan, const cbam::BackwardProblem& p) {
  return cbam::cuda::weight_grids(plan, p).launches();
}

template <class Problem, class Plan>
py::dict plan_dict(const Problem& problem, const Plan& plan,
                   const cbam::cuda::DeviceLimits& limits) {
  const auto bytes = cbam::cuda::device_memory_bytes(plan, problem);
  py::list stages;
  for (const auto& stage : cbam::cuda::stages(plan, problem, plan.group.samples))
    stages.append(
        py::dict("name"_a = stage.name, "blocks"_a = stage.grid.blocks,
                 "threads"_a = stage.grid.threads, "shared_bytes"_a = stage.grid.shared_bytes,
                 "overlaps"_a = stage.grid.overlaps, "traffic"_a = traffic_dict(stage.traffic)));
  py::dict d(
      "device"_a = limits_dict(limits), "strategy"_a = plan.resident ? "resident" : "streaming",
      "reason"_a = plan.reason, "predicted_seconds"_a = plan.seconds,
      "group"_a = plan.group.samples, "in_cache"_a = plan.group.in_cache,
      "scratch_bytes"_a = cbam::cuda::scratch(plan, problem).total(),
      "passes"_a = passes_dict(plan), "stages"_a = stages,
      "summing_launches"_a = summing_launches(plan, problem),
      "traffic"_a = traffic_dict(cbam::cuda::traffic(plan, problem)),
      "device_memory_bytes"_a = bytes, "seconds"_a = static_cast<double>(bytes) / limits.bandwidth);
  return d;
}

py::dict plan(std::vector<int64_t> shape, int64_t hidden, std::vector<int64_t> kernel,
              const std::string& dtype, const std::string& device, bool channels_last,
              bool training, bool residual, bool backward, bool aligned, bool bias,
              const std::string& weight_dtype, const std::string& strategy, int multiprocessors) {
  const cbam::cuda::Description description{
      std::move(shape), hidden,   std::move(kernel), dtype,   weight_dtype,
      channels_last,    training, residual,          aligned, bias};
  auto limits = limits_of(device);
  if (multiprocessors) limits = cbam::cuda::slice_of(limits, multiprocessors);
  const auto wanted = cbam::cuda::strategy_of(strategy);
  if (backward) {
    const auto problem = cbam::cuda::describe_backward(description);
    return plan_dict(problem, cbam::cuda::plan(problem, limits, wanted), limits);
  }
  const auto problem = cbam::cuda::describe(description);
  return plan_dict(problem, cbam::cuda::plan(problem, limits, wanted), limits);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of cbam_cuda";
  m.def("build_info", &build_info,
        "Version, compiler, CPU targets that run here and the one in use, and of the CUDA part its "
        "toolkit version, architectures and visible devices (empty where it was not built).");
  m.def(
      "cuda_problem", &cuda_problem, "index"_a,
      "Why the CUDA part cannot run on a device of this machine; empty if it can. With a negative "
      "index, why it runs on none.");
  m.def("known_devices", &known_devices, "Limits of the GPUs that plans can be made for.");
  m.def("plan", &plan, "shape"_a, "hidden"_a, "kernel"_a, "dtype"_a, "device"_a, py::kw_only(),
        "channels_last"_a = false, "training"_a = false, "residual"_a = false, "backward"_a = false,
        "aligned"_a = true, "bias"_a = true, "weight_dtype"_a = "", "strategy"_a = "auto",
        "multiprocessors"_a = 0,
        "How the CUDA backend would run dense tensors of these sizes on `device`, a known one or "
        "\"cuda:INDEX\": launches of a full group, bytes by what they belong to, and the seconds "
        "that device memory needs. ValueError where there is no such plan.");
}
