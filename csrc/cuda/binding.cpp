// relssl._cuda: the kernels for Python, over raw addresses. relssl/backends/cuda.py has checked what stands behind
// them; here only what would be fatal is refused: null or crooked addresses, and sizes that overflow.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "../addresses.h"
#include "combine.h"
#include "lookup.h"

#ifndef RELSSL_MODULE
#define RELSSL_MODULE _cuda
#endif
#define RELSSL_DEFINE(name) PYBIND11_MODULE(name, m)

namespace py = pybind11;

namespace {

using namespace relssl;

using Place = std::tuple<int, Address>;                                  // device, stream
using Number = std::tuple<float, Address>;                               // a scale: see Scale
using Rows = std::tuple<Address, int64_t, int64_t>;                      // data, stride, count
using Parts = std::tuple<Address, Address, int64_t, int64_t, int64_t>;   // see Partials

int count(int64_t n, const char* name, int64_t least = 1) {
  if (n < least || n >= int64_t{1} << 31)
    throw py::value_error(std::string(name) + " has a size out of range: " + std::to_string(n));
  return static_cast<int>(n);
}

// Copies are of 16 bytes: rows must begin where those do.
const uint16_t* rows(const Rows& given, const char* name, int64_t least = 1) {
  const auto [address, stride, n] = given;
  if (!count(n, name, least)) return nullptr;
  if (address % 16 || stride % 8)
    throw py::value_error(std::string(name) + " has rows that do not begin at multiples of 16 bytes");
  return pointer<const uint16_t>(address, name);
}

Scale scale(const Number& given) { return {std::get<0>(given), optional<const float>(std::get<1>(given))}; }

Where where(const Place& place) {
  return {std::get<0>(place), reinterpret_cast<cudaStream_t>(std::get<1>(place))};
}

Partials partials(const Parts& parts, bool mean) {
  const auto [stats, means, n, offset, splits] = parts;
  if (splits > MOST_SPLITS) throw py::value_error("there are more than " + std::to_string(MOST_SPLITS) + " splits");
  return {pointer<const float>(stats, "stats"), mean ? pointer<const float>(means, "means") : nullptr,
          count(n, "rows"), count(offset, "offset", 0), count(splits, "splits")};
}

int width(int64_t dim) {
  if (!tiles_sm80(dim).m) throw py::value_error("there is no kernel for rows of " + std::to_string(dim));
  return dim;
}

// The kernel for a capability, 80 or 90, as the table has it.
Tiles table(int path, int64_t dim) {
  width(dim);
#ifdef RELSSL_SM90A
  if (path == 90) return tiles_sm90(dim);
#endif
  if (path != 80) throw py::value_error("there is no kernel for sm_" + std::to_string(path));
  return tiles_sm80(dim);
}

// An error says for what the launch was: the sizes, and the device. `size` is 0 where the queue is not needed.
template <class Run>
void launched(const Place& place, const char* what, int rows, int64_t dim, int size, Run run) {
  try {
    run(where(place));
  } catch (const std::runtime_error& error) {
    const std::string queue = size ? " in a queue of " + std::to_string(size) : "";
    throw std::runtime_error(std::string(what) + std::to_string(rows) + " rows of width " + std::to_string(dim) + queue +
                             " on device " + std::to_string(std::get<0>(place)) + ": " + error.what());
  }
}

// Kernels count rows, and what is a tile or so beyond the last, in 32 bits.
void fits(int64_t n, const char* name) {
  if (n >= (int64_t{1} << 31) - 1024) throw py::value_error(std::string(name) + " is too long: " + std::to_string(n));
}

void run_lookup(const Lookup& in, int path, int dim, bool bf16, bool mean, int splits, const Where& where) {
#ifdef RELSSL_SM90A
  if (path == 90) switch (dim) {
      case 64: return lookup_sm90<64>(in, bf16, mean, splits, where);
      case 128: return lookup_sm90<128>(in, bf16, mean, splits, where);
      case 256: return lookup_sm90<256>(in, bf16, mean, splits, where);
      case 512: return lookup_sm90<512>(in, bf16, mean, splits, where);
    }
#endif
  switch (dim) {
    case 64: return lookup_sm80<64>(in, bf16, mean, splits, where);
    case 128: return lookup_sm80<128>(in, bf16, mean, splits, where);
    case 256: return lookup_sm80<256>(in, bf16, mean, splits, where);
    case 512: return lookup_sm80<512>(in, bf16, mean, splits, where);
  }
}

}  // namespace

RELSSL_DEFINE(RELSSL_MODULE) {
  m.doc() = "CUDA kernels; addresses of memory as integers, 0 for none. See relssl/backends/cuda.py.";

  m.attr("architectures") = std::string(RELSSL_ARCHITECTURES);
  m.attr("toolkit") = CUDART_VERSION;  // 1000 * major + 10 * minor

  // The CUDA that the driver is for, as a number like the toolkit's; 0 without a driver.
  m.def("driver", [] {
    int version = 0;
    check(cudaDriverGetVersion(&version));
    return version;
  });

  // Of the table: rows of x and of the queue, warps, stages, blocks to a multiprocessor; and bytes of shared memory.
  m.def("tiles", [](int64_t dim, int path) {
    const Tiles t = table(path, dim);
    return std::make_tuple(t.m, t.n, t.warps, t.stages, t.blocks, path == 90 ? shared_sm90(dim) : shared_sm80(dim));
  });

  // What keeps the kernels from running on a device, or nothing.
  m.def("missing", [](int device) -> std::string {
    try {
      probe(device);
      return "";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  });

  m.def("shared_memory", shared_memory_of);

  m.def("lookup", [](const Place& place, int path, const Rows& first, const Number& scale_first, const Rows& second,
                     const Number& scale_second, const Rows& queue, int64_t dim, bool bf16, Address exclude,
                     int64_t splits, int64_t step, Address stats, Address means) {
    Lookup in{};
    in.first = rows(first, "x", 0);
    in.second = rows(second, "x", 0);
    in.queue = rows(queue, "queue");
    in.first_stride = std::get<1>(first);
    in.second_stride = std::get<1>(second);
    in.queue_stride = std::get<1>(queue);
    in.scale_first = scale(scale_first);
    in.scale_second = scale(scale_second);
    in.exclude = optional<const int64_t>(exclude);
    in.split = count(std::get<2>(first), "x", 0);
    in.rows = count(std::get<2>(first) + std::get<2>(second), "x");
    in.size = count(std::get<2>(queue), "queue");
    in.step = count(step, "step");
    const Tiles t = table(path, dim);
    if (splits < 1 || splits > MOST_SPLITS || step % t.n || splits * step < in.size || (splits - 1) * step >= in.size)
      throw py::value_error(std::to_string(splits) + " splits of " + std::to_string(step) + " rows do not cut a queue of " +
                            std::to_string(in.size) + " into whole tiles");
    fits(splits * step + t.stages * t.n, "queue");
    fits(in.rows + int64_t{t.m}, "x");
    in.stats = pointer<float>(stats, "stats");
    in.means = optional<float>(means);
    launched(place, "looking up ", in.rows, dim, in.size,
             [&](const Where& where) { run_lookup(in, path, dim, bf16, means, splits, where); });
  });

  m.def("combine_rows", [](const Place& place, const Parts& parts, const Number& scale_first,
                           const Number& scale_second, int64_t split, int64_t dim, Address lse, Address mean) {
    const CombineRows in{partials(parts, mean), scale(scale_first), scale(scale_second), count(split, "split", 0),
                         width(dim), pointer<float>(lse, "lse"), optional<float>(mean)};
    fits(2 * int64_t{in.partials.rows}, "lse");
    launched(place, "combining ", in.partials.rows, dim, 0, [&](const Where& where) { combine(in, where); });
  });

  m.def("combine_relation", [](const Place& place, const Parts& teacher, const Parts& student, const Rows& q,
                               const Rows& k, const Number& scale_s, const Number& scale_t, int64_t dim, bool bf16,
                               bool kl, float weight, Address loss, Address entropy, Address grad_q, Address lse,
                               Address mean_t) {
    const CombineRelation in{partials(teacher, true), partials(student, grad_q), rows(q, "q"), rows(k, "k"),
                             std::get<1>(q), std::get<1>(k), scale(scale_s), scale(scale_t),
                             count(std::get<2>(k), "k"), count(std::get<2>(q), "q"), width(dim), bf16, kl, weight,
                             pointer<float>(loss, "loss"), pointer<float>(entropy, "entropy"), optional<float>(grad_q),
                             pointer<float>(lse, "lse"), pointer<float>(mean_t, "mean_t")};
    fits(2 * (int64_t{in.batch} + in.rows), "lse");
    launched(place, "combining ", in.rows, dim, 0, [&](const Where& where) { combine(in, where); });
  });

  m.def("combine_info_nce", [](const Place& place, const Parts& parts, const Rows& q, const Rows& k,
                               const Number& scale_q, int64_t dim, bool bf16, float weight, Address loss,
                               Address sigma, Address grad_q, Address lse) {
    const CombineInfoNCE in{partials(parts, grad_q), rows(q, "q"), rows(k, "k"), std::get<1>(q), std::get<1>(k),
                            scale(scale_q), count(std::get<2>(k), "k"), count(std::get<2>(q), "q"), width(dim), bf16,
                            weight, pointer<float>(loss, "loss"), pointer<float>(sigma, "sigma"),
                            optional<float>(grad_q),
                            pointer<float>(lse, "lse")};
    fits(2 * int64_t{in.rows}, "lse");
    launched(place, "combining ", in.rows, dim, 0, [&](const Where& where) { combine(in, where); });
  });
}
