// relssl._cpu: the Python binding of the kernels, over raw addresses. relssl/backends/cpu.py checks the tensors; the
// binding rejects only what would crash: null addresses and sizes that overflow.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../addresses.h"
#include "clusters.h"
#include "enqueue.h"
#include "losses.h"
#include "threads.h"

namespace py = pybind11;

namespace relssl {

#define RELSSL_DECLARE(isa) extern const Kernels kernels_##isa;
RELSSL_INSTRUCTION_SETS(RELSSL_DECLARE)
#undef RELSSL_DECLARE

}  // namespace relssl

namespace {

using namespace relssl;

using StackArg = std::tuple<Address, int64_t, int64_t, double>;  // data, stride, count, scale

bool supported(const std::string& name) {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2" || name == "emulated") return avx2;
  if (name == "avx512") return avx512;
#ifdef RELSSL_AVX512_BF16  // GCC before 10 does not have the name.
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return true;
}

// Returns the kernels that were compiled and that this processor supports, the best first.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> kernels;
#define RELSSL_LIST(isa) \
  if (supported(#isa)) kernels.push_back(&kernels_##isa);
    RELSSL_INSTRUCTION_SETS(RELSSL_LIST)
#undef RELSSL_LIST
    return kernels;
  }();
  return found;
}

const Kernels* selected = nullptr;  // by `use`

// Returns the kernels of an instruction set. An empty name means those that `use` has selected, or else the best.
const Kernels& kernels(const std::string& name = "") {
  if (name.empty()) return selected ? *selected : *available().front();
  std::string names;
  for (const Kernels* k : available()) {
    if (name == k->name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw py::value_error("instruction set must be one of " + names + " on this machine; got '" + name + "'");
}

// 2^40 elements exceed any memory, and no product of sizes below overflows.
void check(int64_t a, int64_t b, const char* name) {
  if (a < 0 || b < 0 || (b && a > (int64_t{1} << 40) / b))
    throw py::value_error(std::string(name) + " has a size out of range: " + std::to_string(a) + " by " +
                          std::to_string(b));
}

Stack stack(const StackArg& rows, int64_t dim) {
  const auto [address, stride, count, scale] = rows;
  check(count, dim, "x");
  return {count ? pointer<const void>(address, "x") : nullptr, stride, count, scale};
}

Inputs inputs(const StackArg& first, const StackArg& second, Address queue, int64_t queue_stride, int64_t size,
              int64_t dim, bool bf16, Address ids, Address queue_ids, int threads) {
  check(size, dim, "queue");
  if (dim == 0) throw py::value_error("rows have the width 0");
  if (threads < 1) throw py::value_error("threads must be at least 1");
  Inputs in{{stack(first, dim), stack(second, dim)}, size ? pointer<const void>(queue, "queue") : nullptr, queue_stride, size, dim,
            bf16, optional<const int64_t>(ids), optional<const int64_t>(queue_ids)};
  check(all_rows(in), dim, "x");
  if (all_rows(in) == 0) throw py::value_error("x is empty");
  return in;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "SIMD kernels. Addresses are integers, and 0 is null. See relssl/backends/cpu.py.";

  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.push_back(k->name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("use", [](const std::string& name) { selected = &kernels(name); });

  m.def("threads", [] { return threads_in_use() == Threads::openmp ? "openmp" : "own"; });
  m.def("use_threads", [](const std::string& name) {
    const Threads choice = name == "own" ? Threads::own : name == "openmp" ? Threads::openmp : Threads::automatic;
    if (choice == Threads::automatic && name != "auto")
      throw py::value_error("threads must be auto, own or openmp; got '" + name + "'");
    if (!use_threads(choice)) throw py::value_error("torch has no OpenMP threads that could be used");
  });

  m.def("lse_and_mean", [](const StackArg& first, const StackArg& second, Address queue, int64_t queue_stride,
                           int64_t size, int64_t dim, bool bf16, Address ids, Address queue_ids, Address lse,
                           Address mean0, Address mean1, int threads, const std::string& isa) {
    const Inputs in = inputs(first, second, queue, queue_stride, size, dim, bf16, ids, queue_ids, threads);
    float* const mean[2] = {optional<float>(mean0), optional<float>(mean1)};
    float* const to = pointer<float>(lse, "lse");
    const Kernels& chosen = kernels(isa);
    py::gil_scoped_release release;
    lse_and_mean(chosen, in, to, mean, threads);
  });

  m.def("relation", [](const StackArg& teacher, const StackArg& student, Address queue, int64_t queue_stride,
                       int64_t size, int64_t dim, bool bf16, Address ids, Address queue_ids, bool kl, double weight,
                       bool total, Address loss, Address entropy, Address grad_q, Address lse, Address mean_t,
                       int threads, const std::string& isa) {
    const Inputs in = inputs(teacher, student, queue, queue_stride, size, dim, bf16, ids, queue_ids, threads);
    if (in.stacks[0].count == 0) throw py::value_error("k is empty");
    float *to_loss = pointer<float>(loss, "loss"), *to_entropy = pointer<float>(entropy, "entropy");
    float *to_lse = pointer<float>(lse, "lse"), *to_mean = pointer<float>(mean_t, "mean_t");
    const Kernels& chosen = kernels(isa);
    py::gil_scoped_release release;
    relation(chosen, in, kl, weight, total, to_loss, to_entropy, optional<float>(grad_q), to_lse, to_mean, threads);
  });

  m.def("vjp", [](const StackArg& x, Address queue, int64_t queue_stride, int64_t size, int64_t dim, bool bf16,
                  Address ids, Address queue_ids, Address lse, Address mean, Address g_lse, Address g_mean,
                  Address g_row, Address grad_x, Address grad_queue, int threads, const std::string& isa) {
    const Inputs in = inputs(x, {0, 0, 0, 0.0}, queue, queue_stride, size, dim, bf16, ids, queue_ids, threads);
    if (grad_x || g_mean) pointer<float>(mean, "mean");
    const float* from = pointer<const float>(lse, "lse");
    const Kernels& chosen = kernels(isa);
    py::gil_scoped_release release;
    vjp(chosen, in, from, optional<const float>(mean), optional<const float>(g_lse),
        optional<const float>(g_mean), optional<const float>(g_row), optional<float>(grad_x),
        optional<float>(grad_queue), threads);
  });

  // The views are the rows [0, batch) and [batch, 2 batch) of z.
  const auto views = [](const StackArg& z, int64_t dim, bool bf16, int threads) {
    const auto [address, stride, count, scale] = z;
    const int64_t half = count / 2;
    const StackArg second{address + half * stride * (bf16 ? 2 : 4), stride, half, scale};
    return inputs({address, stride, half, scale}, second, address, stride, count, dim, bf16, 0, 0, threads);
  };

  m.def("nt_xent", [views](const StackArg& z, int64_t dim, bool bf16, Address queue_lse, double weight, bool total,
                           Address loss, Address lse, Address grad, int threads, const std::string& isa) {
    const Inputs in = views(z, dim, bf16, threads);
    float *to_loss = pointer<float>(loss, "loss"), *to_lse = pointer<float>(lse, "lse");
    const Kernels& chosen = kernels(isa);
    py::gil_scoped_release release;
    nt_xent(chosen, in, optional<const float>(queue_lse), weight, total, to_loss, to_lse, optional<float>(grad),
            threads);
  });

  m.def("nt_xent_vjp", [views](const StackArg& z, int64_t dim, bool bf16, Address lse, Address g, Address grad,
                               int threads, const std::string& isa) {
    const Inputs in = views(z, dim, bf16, threads);
    const float *from = pointer<const float>(lse, "lse"), *weights = pointer<const float>(g, "g");
    float* to = pointer<float>(grad, "grad");
    const Kernels& chosen = kernels(isa);
    py::gil_scoped_release release;
    nt_xent_vjp(chosen, in, from, weights, to, threads);
  });

  m.def("enqueue", [](Address rows, int64_t size, int64_t row_bytes, Address ids, Address to, Address count,
                      Address keys, int64_t batch, int64_t stride, Address key_ids) {
    check(size, row_bytes, "rows");
    check(batch, row_bytes, "keys");
    if (size == 0) throw py::value_error("the queue is empty");
    const Ring ring{pointer<char>(rows, "rows"), size, row_bytes, optional<int64_t>(ids),
                    pointer<int64_t>(to, "pointer"), pointer<int64_t>(count, "count")};
    const Keys from{pointer<const char>(keys, "keys"), batch, stride,
                    ids ? pointer<const int64_t>(key_ids, "key_ids") : nullptr};
    if (overlaps(ring, from)) throw std::runtime_error("keys or ids share memory with the queue: pass a clone");
    enqueue(ring, from);  // With the GIL: a second thread would write to the same rows.
  });

  m.def("cluster_loss", [](Address p1, Address p2, int64_t count, int64_t clusters, double scale, bool penalize,
                           Address loss, Address grad, Address radial) {
    check(count, clusters, "p1");
    check(clusters, clusters, "p1");
    if (count == 0 || clusters == 0) throw py::value_error("p1 is empty");
    const float* const p[2] = {pointer<const float>(p1, "p1"), pointer<const float>(p2, "p2")};
    float* const to = pointer<float>(loss, "loss");
    if (grad) pointer<float>(radial, "radial");
    py::gil_scoped_release release;
    cluster_loss(p, count, clusters, scale, penalize, to, optional<float>(grad), optional<float>(radial));
  });

  // Runs multiply-adds in registers on all threads and returns their flop: its time gives the processor's peak rate.
  m.def("peak", [](int64_t repeats, int threads) {
    std::vector<double> flop(threads);
    py::gil_scoped_release release;
    parallel(threads, threads, [&](int64_t task, int) { flop[task] = kernels().peak(repeats); });
    double total = 0;
    for (double f : flop) total += f;
    return total;
  });

  m.def("exp2", [](Address x, Address y, int64_t n) {
    check(n, 1, "x");
    kernels().exp2(pointer<const float>(x, "x"), pointer<float>(y, "y"), n);
  });
}
