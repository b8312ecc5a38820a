// relssl._cuda: the Python binding of the kernels, over raw addresses. relssl/backends/cuda.py checks the tensors; the
// binding rejects only what would crash: null or misaligned addresses, and sizes that overflow.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "../addresses.h"
#include "combine.h"
#include "forward.h"

#ifndef RELSSL_MODULE
#define RELSSL_MODULE _cuda
#endif
#define RELSSL_DEFINE(name) PYBIND11_MODULE(name, m)

namespace py = pybind11;

namespace {

using namespace relssl;

using StreamArg = std::tuple<int, Address>;                                    // device, stream
using ScaleArg = std::tuple<float, Address>;                                   // see Scale
using RowsArg = std::tuple<Address, int64_t, int64_t>;                         // data, stride, count
using PartialsArg = std::tuple<Address, Address, int64_t, int64_t, int64_t>;  // see Partials

int count(int64_t n, const char* name, int64_t min = 1) {
  if (n < min || n >= int64_t{1} << 31)
    throw py::value_error(std::string(name) + " has a size out of range: " + std::to_string(n));
  return static_cast<int>(n);
}

// Kernels copy 16 bytes at a time, so rows must be aligned to 16 bytes.
const uint16_t* rows(const RowsArg& arg, const char* name, int64_t min = 1) {
  const auto [address, stride, n] = arg;
  if (!count(n, name, min)) return nullptr;
  if (address % 16 || stride % 8)
    throw py::value_error(std::string(name) + " has rows that do not begin at multiples of 16 bytes");
  return pointer<const uint16_t>(address, name);
}

Scale scale(const ScaleArg& arg) { return {std::get<0>(arg), optional<const float>(std::get<1>(arg))}; }

DeviceStream device_stream(const StreamArg& arg) {
  return {std::get<0>(arg), reinterpret_cast<cudaStream_t>(std::get<1>(arg))};
}

Partials partials(const PartialsArg& arg, bool mean) {
  const auto [stats, means, n, offset, num_splits] = arg;
  if (num_splits > MAX_SPLITS) throw py::value_error("there are more than " + std::to_string(MAX_SPLITS) + " splits");
  return {pointer<const float>(stats, "stats"), mean ? pointer<const float>(means, "means") : nullptr,
          count(n, "rows"), count(offset, "offset", 0), count(num_splits, "num_splits")};
}

int width(int64_t dim) {
  if (!tiles_sm80(dim).m) throw py::value_error("there is no kernel for rows of " + std::to_string(dim));
  return dim;
}

// Returns the tile sizes of the kernel for a capability, 80 or 90.
Tiles tiles(int capability, int64_t dim) {
  width(dim);
#ifdef RELSSL_SM90A
  if (capability == 90) return tiles_sm90(dim);
#endif
  if (capability != 80) throw py::value_error("there is no kernel for sm_" + std::to_string(capability));
  return tiles_sm80(dim);
}

// Adds the kernel, the sizes and the device to the message of a failed launch. `size` is 0 for kernels without a queue.
template <class Launch>
void launch_or_explain(const StreamArg& stream, const char* kernel, int rows, int64_t dim, int size, Launch launch) {
  try {
    launch(device_stream(stream));
  } catch (const std::runtime_error& error) {
    const std::string queue = size ? " and a queue of " + std::to_string(size) : "";
    throw std::runtime_error(std::string(kernel) + " kernel for " + std::to_string(rows) + " rows of width " +
                             std::to_string(dim) + queue + " on device " + std::to_string(std::get<0>(stream)) + ": " +
                             error.what());
  }
}

// Kernels count rows in 32 bits, including some tiles beyond the last row.
void check_32_bits(int64_t n, const char* name) {
  if (n >= (int64_t{1} << 31) - 1024) throw py::value_error(std::string(name) + " is too long: " + std::to_string(n));
}

void run_forward(const Forward& in, int capability, int dim, bool bf16, bool mean, int num_splits,
                 const DeviceStream& on) {
#ifdef RELSSL_SM90A
  if (capability == 90) switch (dim) {
      case 64: return forward_sm90<64>(in, bf16, mean, num_splits, on);
      case 128: return forward_sm90<128>(in, bf16, mean, num_splits, on);
      case 256: return forward_sm90<256>(in, bf16, mean, num_splits, on);
      case 512: return forward_sm90<512>(in, bf16, mean, num_splits, on);
    }
#endif
  switch (dim) {
    case 64: return forward_sm80<64>(in, bf16, mean, num_splits, on);
    case 128: return forward_sm80<128>(in, bf16, mean, num_splits, on);
    case 256: return forward_sm80<256>(in, bf16, mean, num_splits, on);
    case 512: return forward_sm80<512>(in, bf16, mean, num_splits, on);
  }
}

}  // namespace

RELSSL_DEFINE(RELSSL_MODULE) {
  m.doc() = "CUDA kernels. Addresses are integers, and 0 is null. See relssl/backends/cuda.py.";

  m.attr("architectures") = std::string(RELSSL_ARCHITECTURES);
  m.attr("toolkit") = CUDART_VERSION;  // 1000 * major + 10 * minor

  // Returns the CUDA version that the driver supports, as a number like the toolkit's, or 0 without a driver.
  m.def("driver", [] {
    int version = 0;
    check(cudaDriverGetVersion(&version));
    return version;
  });

  // Returns a kernel's tile sizes: rows of x and of the queue, warps, stages, blocks per multiprocessor, and its
  // bytes of shared memory.
  m.def("tiles", [](int64_t dim, int capability) {
    const Tiles t = tiles(capability, dim);
    return std::make_tuple(t.m, t.n, t.warps, t.stages, t.blocks,
                           capability == 90 ? shared_sm90(dim) : shared_sm80(dim));
  });

  // Returns the reason why the kernels cannot run on a device, or an empty string.
  m.def("missing", [](int device) -> std::string {
    try {
      probe(device);
      return "";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  });

  m.def("shared_memory", max_shared_memory);

  m.def("forward", [](const StreamArg& stream, int capability, const RowsArg& first, const ScaleArg& scale_first,
                      const RowsArg& second, const ScaleArg& scale_second, const RowsArg& queue, int64_t dim, bool bf16,
                      Address ids, Address queue_ids, Address filled, int64_t num_splits, int64_t step, Address stats,
                      Address means) {
    Forward in{};
    in.first = rows(first, "x", 0);
    in.second = rows(second, "x", 0);
    in.queue = rows(queue, "queue");
    in.first_stride = std::get<1>(first);
    in.second_stride = std::get<1>(second);
    in.queue_stride = std::get<1>(queue);
    in.scale_first = scale(scale_first);
    in.scale_second = scale(scale_second);
    in.ids = optional<const int64_t>(ids);
    in.queue_ids = optional<const int64_t>(queue_ids);
    in.filled = optional<const int64_t>(filled);
    in.num_first = count(std::get<2>(first), "x", 0);
    in.rows = count(std::get<2>(first) + std::get<2>(second), "x");
    in.size = count(std::get<2>(queue), "queue");
    in.step = count(step, "step");
    const Tiles t = tiles(capability, dim);
    if (num_splits < 1 || num_splits > MAX_SPLITS || step % t.n || num_splits * step < in.size ||
        (num_splits - 1) * step >= in.size)
      throw py::value_error(std::to_string(num_splits) + " splits of " + std::to_string(step) +
                            " rows do not cut a queue of " + std::to_string(in.size) + " into whole tiles");
    check_32_bits(num_splits * step + t.stages * t.n, "queue");
    check_32_bits(in.rows + int64_t{t.m}, "x");
    in.stats = pointer<float>(stats, "stats");
    in.means = optional<float>(means);
    launch_or_explain(stream, "forward", in.rows, dim, in.size,
                      [&](const DeviceStream& on) { run_forward(in, capability, dim, bf16, means, num_splits, on); });
  });

  m.def("combine_lse_and_mean", [](const StreamArg& stream, const PartialsArg& parts, const ScaleArg& scale_first,
                                   const ScaleArg& scale_second, int64_t num_first, int64_t dim, Address lse,
                                   Address mean) {
    const CombineLseAndMean in{partials(parts, mean), scale(scale_first), scale(scale_second),
                               count(num_first, "num_first", 0), width(dim), pointer<float>(lse, "lse"),
                               optional<float>(mean)};
    check_32_bits(2 * int64_t{in.partials.rows}, "lse");
    launch_or_explain(stream, "combine", in.partials.rows, dim, 0, [&](const DeviceStream& on) { combine(in, on); });
  });

  m.def("combine_relation", [](const StreamArg& stream, const PartialsArg& teacher, const PartialsArg& student,
                               const RowsArg& q, const RowsArg& k, const ScaleArg& scale_s, const ScaleArg& scale_t,
                               int64_t dim, bool bf16, bool kl, bool may_be_empty, float weight, Address loss,
                               Address entropy, Address grad_q, Address lse, Address mean_t) {
    const CombineRelation in{partials(teacher, true), partials(student, grad_q), rows(q, "q"), rows(k, "k"),
                             std::get<1>(q), std::get<1>(k), scale(scale_s), scale(scale_t),
                             count(std::get<2>(k), "k"), count(std::get<2>(q), "q"), width(dim), bf16, kl, may_be_empty, weight,
                             pointer<float>(loss, "loss"), pointer<float>(entropy, "entropy"), optional<float>(grad_q),
                             pointer<float>(lse, "lse"), pointer<float>(mean_t, "mean_t")};
    check_32_bits(2 * (int64_t{in.batch} + in.rows), "lse");
    launch_or_explain(stream, "combine", in.rows, dim, 0, [&](const DeviceStream& on) { combine(in, on); });
  });

  m.def("combine_info_nce", [](const StreamArg& stream, const PartialsArg& parts, const RowsArg& q, const RowsArg& k,
                               const ScaleArg& scale_q, int64_t dim, bool bf16, float weight, Address loss,
                               Address sigma, Address grad_q, Address lse) {
    const CombineInfoNCE in{partials(parts, grad_q), rows(q, "q"), rows(k, "k"), std::get<1>(q), std::get<1>(k),
                            scale(scale_q), count(std::get<2>(k), "k"), count(std::get<2>(q), "q"), width(dim), bf16,
                            weight, pointer<float>(loss, "loss"), pointer<float>(sigma, "sigma"),
                            optional<float>(grad_q), pointer<float>(lse, "lse")};
    check_32_bits(2 * int64_t{in.rows}, "lse");
    launch_or_explain(stream, "combine", in.rows, dim, 0, [&](const DeviceStream& on) { combine(in, on); });
  });
}
