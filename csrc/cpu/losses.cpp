#include "losses.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "threads.h"

namespace relssl {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr int64_t kKept = 1 << 18;  // similarities within a batch that are kept from forward for the gradient: 1 MiB

// Uninitialised memory, aligned for vectors.
struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char[], AlignedDelete>;
Memory allocate(int64_t bytes) { return Memory(new (std::align_val_t(64)) char[std::max<int64_t>(bytes, 1)]); }

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Returns the number of tasks: several for each thread, but none so short that it does not pay to wake a thread.
int64_t num_tasks(int threads, double each, double flop) {
  return threads == 1 ? 1 : static_cast<int64_t>(std::min(each * threads, flop / 4e6));
}

// Divides the rows into blocks and the queue into ranges. A block with a range is a task.
struct Grid {
  int64_t rows, size, panel;
  int64_t block = 1, num_splits = 1;

  // The rows and means of a block take 1 MiB: they stream through a small part of each cache while a tile of the
  // queue stays in it, and larger blocks read the queue less often. If there are too few blocks, the queue is divided
  // into four ranges per thread. Each range is shorter than the one before, so that all threads finish at about the
  // same time.
  Grid(const Inputs& in, int64_t panel, int threads) : rows(all_rows(in)), size(in.size), panel(panel) {
    const int64_t max_rows = std::max<int64_t>((1 << 20) / (8 * in.dim), 64);
    const double flop = 4.0 * rows * size * in.dim;
    const bool cached = size * in.dim * 4 <= (1 << 20);  // The queue is read again at no cost.
    const int64_t count = std::max((rows + max_rows - 1) / max_rows, cached ? num_tasks(threads, 8, flop) : 0);
    block = ((rows + count - 1) / count + panel - 1) / panel * panel;
    const int64_t wanted = cached && blocks() >= threads ? 1 : num_tasks(threads, 4, flop);
    num_splits = std::clamp<int64_t>((wanted + blocks() - 1) / blocks(), 1, std::max<int64_t>(size, 1));
  }
  int64_t blocks() const { return (rows + block - 1) / block; }
  int64_t tasks() const { return blocks() * num_splits; }
  int64_t split(int64_t task) const { return task % num_splits; }
  Block at(int64_t task) const {
    const int64_t row = task / num_splits * block, s = split(task);
    return {row, std::min(block, rows - row), border(s), border(s + 1)};
  }
  int64_t border(int64_t s) const {
    const double left = 1 - static_cast<double>(s) / num_splits;
    return size - static_cast<int64_t>(static_cast<double>(size) * left * left);
  }
};

float* stack_row(float* const mean[2], const Inputs& in, int64_t row) {
  const int64_t first = in.stacks[0].count;
  if (row < first) return mean[0] ? mean[0] + row * in.dim : nullptr;
  return mean[1] ? mean[1] + (row - first) * in.dim : nullptr;
}

// Returns the dot product in double, computed as four sums that the processor can overlap.
double dot(const void* x, bool x_bf16, const void* y, bool y_bf16, int64_t dim) {
  double sum[4] = {};
  const auto product = [&](int64_t d) { return static_cast<double>(element(x, d, x_bf16)) * element(y, d, y_bf16); };
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4)
    for (int i = 0; i < 4; ++i) sum[i] += product(d + i);
  for (; d < dim; ++d) sum[0] += product(d);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Returns the scale of the kernels, which round its product with log2(e): the whole loss must use the same temperature.
double exact_scale(double scale) { return log2_scale(scale) * kLn2; }

// The log-sum-exps as Cotangents has them.
struct Normalizers {
  std::vector<float> high, low;
  Normalizers(const Inputs& in, const float* lse) : high(all_rows(in)), low(all_rows(in)) {
    const int64_t count = all_rows(in);
    const double scale = log2_scale(in.stacks[0].scale);
    for (int64_t r = 0; r < count; ++r) {
      const double exact = (static_cast<double>(lse[r]) + lse[count + r]) / kLn2;
      // The values are clamped to float for any small scale. An empty row, of which all is excluded, has no weights; an
      // infinite lse would make them NaN.
      const double most = FLT_MAX / 2;
      high[r] = exact == -INFINITY ? FLT_MAX : static_cast<float>(std::clamp(exact / scale, -most, most));
      low[r] = exact == -INFINITY ? 0 : static_cast<float>(exact - high[r] * scale);
    }
  }
};

// sum_j w_rj and sum_j w_rj m_j of all rows, for each range of the queue.
struct WeightedRows {
  const Grid grid;
  const int64_t count, dim;
  std::vector<double> total;  // [ranges, rows]
  Memory weighted;            // float [ranges, rows, dim]
  WeightedRows(const Kernels& kernels, const Inputs& in, const Cotangents& g, int threads)
      : grid(in, kernels.panel, threads),
        count(all_rows(in)),
        dim(in.dim),
        total(grid.num_splits * count),
        weighted(allocate(grid.num_splits * count * dim * 4)) {
    const int64_t scratch = aligned(kernels.backward_x_scratch(in, g, grid.block));
    const Memory memory = allocate(scratch * std::min<int64_t>(threads, grid.tasks()));
    parallel(threads, grid.tasks(), [&](int64_t task, int slot) {
      const Block block = grid.at(task);
      const int64_t at = grid.split(task) * count + block.row;
      kernels.backward_x(in, g, block, &total[at], row(0, at), memory.get() + slot * scratch);
    });
  }
  float* row(int64_t split, int64_t r) const {
    return reinterpret_cast<float*>(weighted.get()) + (split * count + r) * dim;
  }
  // Adds the ranges of a row.
  void sum(int64_t r, float* to) const {
    std::copy_n(row(0, r), dim, to);
    for (int64_t s = 1; s < grid.num_splits; ++s)
      for (int64_t d = 0; d < dim; ++d) to[d] += row(s, r)[d];
  }
};

// The index of each row, which NT-Xent excludes.
std::vector<int64_t> own_rows(const Inputs& in) {
  std::vector<int64_t> own(all_rows(in));
  std::iota(own.begin(), own.end(), 0);
  return own;
}

}  // namespace

void lse_and_mean(const Kernels& kernels, const Inputs& in, float* lse, float* const mean[2], int threads) {
  const Grid grid(in, kernels.panel, threads);
  const int64_t count = all_rows(in), dim = in.dim, num_splits = grid.num_splits;
  const int64_t scratch = aligned(kernels.forward_scratch(in, grid.block));
  const Memory memory = allocate(scratch * std::min<int64_t>(threads, grid.tasks()));
  std::vector<double> shift(num_splits * count), sum(num_splits * count);
  // With a single range, the kernels write the means directly to the result.
  const Memory means = allocate(num_splits > 1 ? num_splits * count * dim * 4 : 0);
  const auto place = [&](int64_t split, int stack) -> float* {
    if (!mean[stack]) return nullptr;
    if (num_splits == 1) return mean[stack];
    return reinterpret_cast<float*>(means.get()) + (split * count + (stack ? in.stacks[0].count : 0)) * dim;
  };

  parallel(threads, grid.tasks(), [&](int64_t task, int slot) {
    const int64_t split = grid.split(task);
    const Block block = grid.at(task);
    const int64_t at = split * count + block.row;
    kernels.forward(in, block, {&shift[at], &sum[at], {place(split, 0), place(split, 1)}},
                    memory.get() + slot * scratch);
  });

  std::vector<double> weight(num_splits);
  for (int64_t r = 0; r < count; ++r) {
    double top = shift[r];
    for (int64_t s = 1; s < num_splits; ++s) top = std::max(top, shift[s * count + r]);
    double total = 0;
    for (int64_t s = 0; s < num_splits; ++s) {
      weight[s] = sum[s * count + r] * std::exp2(shift[s * count + r] - top);
      total += weight[s];
    }
    const double exact = kLn2 * (top + std::log2(total));
    lse[r] = static_cast<float>(exact);
    lse[count + r] = std::isfinite(exact) ? static_cast<float>(exact - lse[r]) : 0;
    float* to = num_splits > 1 ? stack_row(mean, in, r) : nullptr;
    if (!to) continue;
    for (int64_t s = 0; s < num_splits; ++s) {
      const float* from = reinterpret_cast<const float*>(means.get()) + (s * count + r) * dim;
      const float share = total == 0 ? 0 : static_cast<float>(weight[s] / total);
      for (int64_t d = 0; d < dim; ++d) to[d] = s ? to[d] + share * from[d] : share * from[d];
    }
  }
}

void relation(const Kernels& kernels, const Inputs& in, bool kl, double weight, bool total, float* loss, float* entropy,
              float* grad_q, float* lse, float* mean_t, int threads) {
  float* const mean[2] = {mean_t, grad_q};
  lse_and_mean(kernels, in, lse, mean, threads);
  const Stack &teacher = in.stacks[0], &student = in.stacks[1];
  const int64_t batch = teacher.count, count = all_rows(in), dim = in.dim;
  // The cross-entropy of a row with the teacher's softmax, whose mean is `center`; 0 for empty rows.
  // Otherwise logits below all floats have the log-sum-exp -infinity, and make the loss NaN.
  const bool may_be_empty = in.ids || in.size == 0;
  const auto cross_entropy = [&](const Stack& stack, int64_t row, int64_t index, const float* center) {
    const double exact = static_cast<double>(lse[row]) + lse[count + row];
    if (may_be_empty && exact == -INFINITY) return 0.0;
    const void* x = row_address(stack, index, in.bf16);
    return exact - exact_scale(stack.scale) * dot(x, in.bf16, center, false, dim);
  };
  std::vector<double> entropies(batch);  // of the teacher
  for (int64_t b = 0; b < batch; ++b) {
    entropies[b] = cross_entropy(teacher, b, b, mean_t + b * dim);
    entropy[b] = static_cast<float>(entropies[b]);
  }
  const float factor = static_cast<float>(weight * student.scale);
  double sum = 0;
  for (int64_t r = 0; r < student.count; ++r) {
    const int64_t b = r % batch;
    const float* center = mean_t + b * dim;
    const double cross = cross_entropy(student, batch + r, r, center);
    const double row = kl ? cross - entropies[b] : cross;
    if (!total) loss[r] = static_cast<float>(row);
    sum += row;
    if (grad_q)
      for (int64_t d = 0; d < dim; ++d) grad_q[r * dim + d] = factor * (grad_q[r * dim + d] - center[d]);
  }
  if (total) *loss = static_cast<float>(weight * sum);
}

void vjp(const Kernels& kernels, const Inputs& in, const float* lse, const float* mean, const float* g_lse,
         const float* g_mean, const float* g_row, float* grad_x, float* grad_queue, int threads) {
  const int64_t count = all_rows(in), dim = in.dim;
  const Normalizers by(in, lse);
  std::vector<float> base(count);
  for (int64_t r = 0; r < count; ++r) {
    const double part = g_mean ? dot(mean + r * dim, false, g_mean + r * dim, false, dim) : 0;
    base[r] = static_cast<float>((g_lse ? g_lse[r] : 0) - part);
  }
  const Cotangents g{by.high.data(), by.low.data(), base.data(), g_mean, g_row};

  if (grad_x || g_mean) {
    const WeightedRows found(kernels, in, g, threads);
    // sum_j w_j must be g_lse. The rest, which is due to rounding, is subtracted along the mean: otherwise a sharp
    // row would lose every digit, because u_j - ubar nearly vanishes where p_j does not.
    for (int64_t r = 0; r < count; ++r) {
      double rest = g_lse ? -g_lse[r] : 0;
      for (int64_t s = 0; s < found.grid.num_splits; ++s) rest += found.total[s * count + r];
      base[r] = static_cast<float>(base[r] - rest);
      if (!grad_x) continue;
      float* to = grad_x + r * dim;
      found.sum(r, to);
      const float c = static_cast<float>(in.stacks[0].scale), excess = static_cast<float>(rest);
      for (int64_t d = 0; d < dim; ++d) to[d] = c * (to[d] - excess * mean[r * dim + d]);
    }
  }

  if (grad_queue) {
    const Memory shared = allocate(kernels.backward_queue_shared(in, g));
    kernels.backward_queue_pack(in, g, shared.get());
    const int64_t tasks = std::clamp<int64_t>(num_tasks(threads, 16, 6.0 * count * in.size * dim), 1, std::max<int64_t>(in.size, 1));
    const int64_t scratch = aligned(kernels.backward_queue_scratch(in));
    const Memory memory = allocate(scratch * std::min<int64_t>(threads, tasks));
    parallel(threads, tasks, [&](int64_t task, int slot) {
      kernels.backward_queue(in, g, in.size * task / tasks, in.size * (task + 1) / tasks, shared.get(), grad_queue,
                        memory.get() + slot * scratch);
    });
  }
}

void nt_xent(const Kernels& kernels, const Inputs& views, const float* queue_lse, double weight, bool total,
             float* loss, float* lse, float* grad, int threads) {
  const std::vector<int64_t> own = own_rows(views);
  Inputs in = views;
  in.ids = own.data();
  const int64_t count = all_rows(in), batch = count / 2;
  const bool keep = grad && count * count <= kKept;
  const Memory similarities = allocate(keep ? 4 * count * (count + kernels.panel) : 0);
  if (keep) in.similarities = reinterpret_cast<float*>(similarities.get());
  float* const mean[2] = {};
  lse_and_mean(kernels, in, lse, mean, threads);
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const void *z1 = row_address(in.stacks[0], b, in.bf16), *z2 = row_address(in.stacks[1], b, in.bf16);
    const double positive = exact_scale(in.stacks[0].scale) * dot(z1, in.bf16, z2, in.bf16, in.dim);
    for (const int64_t r : {b, batch + b}) {
      double exact = static_cast<double>(lse[r]) + lse[count + r];
      if (queue_lse) {
        const double other = static_cast<double>(queue_lse[r]) + queue_lse[count + r], top = std::max(exact, other);
        const double rest = std::min(exact, other) - top;
        exact = std::isfinite(top) ? top + std::log1p(std::exp(rest)) : exact + other;
        lse[r] = static_cast<float>(exact);
        lse[count + r] = std::isfinite(exact) ? static_cast<float>(exact - lse[r]) : 0;
      }
      if (!total) loss[r] = static_cast<float>(exact - positive);
      sum += exact - positive;
    }
  }
  if (total) *loss = static_cast<float>(weight * sum);
  if (grad) {
    const std::vector<float> g(count, static_cast<float>(weight));
    nt_xent_vjp(kernels, in, lse, g.data(), grad, threads);
  }
}

void nt_xent_vjp(const Kernels& kernels, const Inputs& views, const float* lse, const float* g, float* grad,
                 int threads) {
  const std::vector<int64_t> own = own_rows(views);
  Inputs in = views;
  in.ids = own.data();
  const int64_t count = all_rows(in), batch = count / 2, dim = in.dim;
  const Normalizers by(in, lse);
  const WeightedRows found(kernels, in, {by.high.data(), by.low.data(), g, nullptr, nullptr, true}, threads);
  const float c = static_cast<float>(in.stacks[0].scale);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t other = (r + batch) % count;
    const void* positive = row_address(in.stacks[r < batch], r % batch, in.bf16);
    const float both = g[r] + g[other];
    float* to = grad + r * dim;
    found.sum(r, to);
    for (int64_t d = 0; d < dim; ++d) to[d] = c * (to[d] - both * element(positive, d, in.bf16));
  }
}

}  // namespace relssl
