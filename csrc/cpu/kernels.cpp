// The kernels. This file is compiled once for each instruction set, with its name as RELSSL_ISA (setup.py has the
// flags).
//
// A panel is 2 vectors of rows of x: each lane holds a row, and the first index runs along the row, panel[d][lane].
// The similarities of a queue tile with a panel are s[j][lane], so that the softmax is computed lane by lane and
// needs no sums across lanes, and the mean is mean[d][lane].

#include "kernels.h"

#include <cmath>

#include "multiply.h"

namespace {

using namespace relssl;

constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kTileBytes = 128 << 10;        // of a queue tile, which fits any L2
constexpr int64_t kPanelBytes = 16 << 10;        // of the part of a panel in use, which fits L1
constexpr int64_t kWeightBytes = 8 << 10;        // of a tile's similarities with a panel, which fit L1
constexpr int64_t kCopyRows = 128;               // of x: with so many rows a copy of the tile pays
constexpr int64_t kGroup = 8;                    // panels over which the queue's gradient is summed at a time
// The shift changes only when a logit exceeds it by this, in units of log 2: 2^8 cannot overflow, and rescaling is
// rare. (The online softmax is by Milakov & Gimelshein 2018, the lazy step by FlashAttention 4.)
constexpr float kLazy = 8;

template <int V>
struct Width {
  static constexpr int value = V;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Returns the number of queue rows in a tile, a multiple of kRows.
int64_t tile_height(int64_t dim) {
  const int64_t height = min(kTileBytes / (4 * dim), kWeightBytes / (4 * kPanel));
  return height < kRows ? kRows : height / kRows * kRows;
}

// Divides one allocation into aligned arrays. With a null base it only counts the bytes.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    char* at = base + used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
};

// ------------------------------------------------------------------------------------ packing

struct Source {
  const void* row;
  double scale;
  int stack;
  int64_t index;  // in the stack
};

Source source(const Inputs& in, int64_t row) {
  const int stack = row >= in.stacks[0].count;
  const int64_t index = row - (stack ? in.stacks[0].count : 0);
  const Stack& s = in.stacks[stack];
  return {row_address(s, index, in.bf16), s.scale, stack, index};
}

inline void pack(const void* row, bool bf16, int64_t dim, float* to, Single) {
  for (int64_t d = 0; d < dim; ++d) to[d * kPanel] = element(row, d, bf16);
}

inline void pack(const void* row, bool, int64_t dim, uint32_t* to, Pair) {
  for (int64_t d = 0; d < dim / 2; ++d) std::memcpy(to + d * kPanel, static_cast<const char*>(row) + 4 * d, 4);
}

// Packs rows [row, row + rows) of x into panels, with the scale of each. The lanes beyond the last row are zero.
template <class E>
void pack_rows(const Inputs& in, int64_t row, int64_t rows, typename E::Scalar* panels, float* scale) {
  const int64_t depth = in.dim / E::kDepth;
  for (int64_t r = 0; r < round_up(rows, kPanel); ++r) {
    typename E::Scalar* to = panels + r / kPanel * depth * kPanel + r % kPanel;
    if (r < rows) {
      const Source from = source(in, row + r);
      scale[r] = log2_scale(from.scale);
      pack(from.row, in.bf16, in.dim, to, E{});
    } else {
      scale[r] = 0;
      for (int64_t d = 0; d < depth; ++d) to[d * kPanel] = 0;
    }
  }
}

// Packs contiguous float32 rows [rows, dim].
void pack_contiguous(const float* from, int64_t rows, int64_t dim, float* panels) {
  for (int64_t r = 0; r < round_up(rows, kPanel); ++r) {
    float* to = panels + r / kPanel * dim * kPanel + r % kPanel;
    for (int64_t d = 0; d < dim; ++d) to[d * kPanel] = r < rows ? from[r * dim + d] : 0;
  }
}

// ------------------------------------------------------------------------------------ queue tiles

// Queue rows as float32, with their stride: in place, or copied into `space`, and converted if they are bfloat16. A
// row of the copy has an odd number of cache lines, so that a column, which the mean reads, occupies all sets of L1:
// columns of 512-byte rows would share 8 sets. With few rows of x a copy costs more than it saves.
struct Tile {
  const float* data;
  int64_t stride;
};

bool copied(const Inputs& in, int64_t rows) { return in.bf16 || rows >= kCopyRows; }
int64_t copy_stride(const Inputs& in) { return (round_up(in.dim, 16) / 16 | 1) * 16; }
int64_t tile_space(const Inputs& in, int64_t rows) {
  return copied(in, rows) ? tile_height(in.dim) * copy_stride(in) : 0;
}

Tile float_tile(const Inputs& in, int64_t rows, int64_t first, int64_t count, float* space) {
  const int64_t stride = copy_stride(in);
  const char* from = static_cast<const char*>(in.queue) + first * in.queue_stride * (in.bf16 ? 2 : 4);
  if (!copied(in, rows)) return {reinterpret_cast<const float*>(from), in.queue_stride};
  for (int64_t j = 0; j < count; ++j, from += in.queue_stride * (in.bf16 ? 2 : 4)) {
    float* to = space + j * stride;
    if (in.bf16)
      for (int64_t d = 0; d < in.dim; ++d) to[d] = from_bf16(reinterpret_cast<const uint16_t*>(from)[d]);
    else
      std::memcpy(to, from, 4 * in.dim);
  }
  return {space, stride};
}

// s[j][lane] = <m_j, x_lane> for V vectors of lanes and j < count. The sum is cut along the width so that the panel
// stays in L1.
template <class E, int V>
void similarities(const typename E::Scalar* tile, int64_t stride, int64_t count, const typename E::Scalar* panel,
                  int64_t depth, float* s, int64_t s_stride) {
  const int64_t step = kPanelBytes / (4 * kPanel);
  for (int64_t d = 0; d < depth; d += step)
    multiply<E, V>(count, tile + d, stride, 1, panel + d * kPanel, kPanel, min(step, depth - d), s, s_stride, d > 0);
}

// Sets the similarities of rows [row, row + rows), at most a panel, with the queue rows that they exclude to -infinity.
template <int V>
void exclude_rows(const Inputs& in, int64_t row, int64_t rows, int64_t first, int64_t count, float* s, int64_t s_stride) {
  rows = min(rows, kPanel);
  if (!in.queue_ids) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t j = in.ids[row + r] - first;
      if (j >= 0 && j < count) s[j * s_stride + r] = -INFINITY;
    }
    return;
  }
  int64_t ids[kPanel];
  for (int64_t r = 0; r < kPanel; ++r) ids[r] = r < rows ? in.ids[row + r] : -2;
  uint32_t low[kPanel], high[kPanel];  // As halves, they fill as many vectors as the similarities.
  for (int64_t r = 0; r < kPanel; ++r) {
    low[r] = static_cast<uint32_t>(ids[r]);
    high[r] = static_cast<uint32_t>(ids[r] >> 32);
  }
  const int64_t* queue_ids = in.queue_ids + first;
  Int found[V] = {};  // Most tiles have none.
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < V; ++v) found[v] |= load<Bits>(low + v * kLanes) == static_cast<uint32_t>(queue_ids[j]);
  for (int v = 1; v < V; ++v) found[0] |= found[v];
  if (!any(found[0])) return;
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t id_low = static_cast<uint32_t>(queue_ids[j]), id_high = static_cast<uint32_t>(queue_ids[j] >> 32);
    if (queue_ids[j] < 0) continue;
    for (int v = 0; v < V; ++v) {
      float* at = s + j * s_stride + v * kLanes;
      const Int same = (load<Bits>(low + v * kLanes) == id_low) & (load<Bits>(high + v * kLanes) == id_high);
      store(at, same ? broadcast(-INFINITY) : load<Float>(at));
    }
  }
}

float* kept_similarities(const Inputs& in, int64_t row, int64_t first) {
  return in.similarities ? in.similarities + (row / kPanel * in.size + first) * kPanel : nullptr;
}

// ------------------------------------------------------------------------------------ forward

// The running softmax of a panel. The shift is a similarity, which is subtracted from the others before they are
// scaled: the difference of large similarities is exact, and no fused multiply-add can change it.
struct Softmax {
  float shift[kPanel];     // -FLT_MAX before the first tile
  double sum[kPanel];      // of 2^((s - shift) scale), in double: a float would stop growing with the queue
  double divisor[kPanel];  // the sum of the mean's weights, which may be rounded
};

// Replaces the similarities of a tile by weights.
template <int V>
inline void softmax_weights(Single, float* s, int64_t count, const float* scale, const Float* shift, Float* sum,
                            Float*) {
  for (int64_t j = 0; j < count; ++j, s += kPanel)
    for (int v = 0; v < V; ++v) {
      const Float p = exp2((load<Float>(s + v * kLanes) - shift[v]) * load<Float>(scale + v * kLanes));
      sum[v] += p;
      store(s + v * kLanes, p);
    }
}

// For Pair, a lane holds the weights of two queue rows, rounded to bfloat16. The rounded weights are summed
// separately: as the mean's divisor this sum is up to 3 times as accurate as the exact one, and for the log-sum-exp
// the exact sum is up to 70 times as accurate.
template <int V>
inline void softmax_weights(Pair, float* s, int64_t count, const float* scale, const Float* shift, Float* sum,
                            Float* rounded) {
  float* to = s;
  for (int64_t j = 0; j < count; j += 2, s += 2 * kPanel, to += kPanel)
    for (int v = 0; v < V; ++v) {
      Float p[2] = {};
      for (int i = 0; i < 2 && j + i < count; ++i) {
        const Float above = load<Float>(s + i * kPanel + v * kLanes) - shift[v];
        const Float exact = exp2(above * load<Float>(scale + v * kLanes));
        p[i] = round_bf16(exact);
        sum[v] += exact;
        rounded[v] += p[i];
      }
      store(to + v * kLanes, ((Bits)p[0] >> 16) | (Bits)p[1]);
    }
}

// Adds a tile's similarities to the running softmax and, unless `mean` is null, the weighted rows to mean[d][lane].
template <class E, int V>
void online_softmax_step(float* s, int64_t count, const float* scale, Softmax& soft, const typename E::Scalar* columns,
                         int64_t column_stride, int64_t dim, float* mean) {
  Float top[V], shift[V], grown[V], sum[V] = {}, rounded[V] = {};
  bool growing = false;
  for (int v = 0; v < V; ++v) top[v] = broadcast(-INFINITY);
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < V; ++v) top[v] = max(top[v], load<Float>(s + j * kPanel + v * kLanes));
  for (int v = 0; v < V; ++v) {
    shift[v] = load<Float>(soft.shift + v * kLanes);
    const Int grows = (top[v] - shift[v]) * load<Float>(scale + v * kLanes) > kLazy;
    grown[v] = grows ? top[v] : shift[v];
    growing |= any(grows);
  }
  if (growing) {
    for (int v = 0; v < V; ++v) {
      const Float factor = exp2((shift[v] - grown[v]) * load<Float>(scale + v * kLanes));
      shift[v] = grown[v];
      store(soft.shift + v * kLanes, grown[v]);
      for (int i = 0; i < kLanes; ++i) {
        soft.sum[v * kLanes + i] *= factor[i];
        soft.divisor[v * kLanes + i] *= factor[i];
      }
      if (mean)
        for (int64_t d = 0; d < dim; ++d) {
          float* at = mean + d * kPanel + v * kLanes;
          store(at, load<Float>(at) * factor);
        }
    }
  }
  softmax_weights<V>(E{}, s, count, scale, shift, sum, rounded);
  for (int v = 0; v < V; ++v)
    for (int i = 0; i < kLanes; ++i) {
      soft.sum[v * kLanes + i] += sum[v][i];
      soft.divisor[v * kLanes + i] += E::kDepth == 2 ? rounded[v][i] : sum[v][i];
    }
  if (mean)
    multiply<E, V>(dim, columns, 1, column_stride, reinterpret_cast<typename E::Scalar*>(s), kPanel,
                   (count + E::kDepth - 1) / E::kDepth, mean, kPanel, true);
}

template <class E>
struct ForwardMemory {
  typename E::Scalar *panels, *space;
  float *mean, *scale, *s;
  Softmax* soft;
  int64_t bytes;
  ForwardMemory(const Inputs& in, int64_t rows, char* base) {
    Arena arena{base};
    const int64_t lanes = round_up(rows, kPanel), height = tile_height(in.dim);
    panels = arena.take<typename E::Scalar>(lanes * in.dim / E::kDepth);
    mean = arena.take<float>(lanes * in.dim);
    scale = arena.take<float>(lanes);
    soft = arena.take<Softmax>(lanes / kPanel);
    s = arena.take<float>(height * kPanel);
    // For Single, a copied tile; for Pair, a tile in which every two rows are interleaved.
    space = arena.take<typename E::Scalar>(E::kDepth == 1 ? tile_space(in, rows) : height / 2 * in.dim);
    bytes = arena.used;
  }
};

// The tile in the layouts of both products: rows[j][depth] for the similarities, columns[j][d] for the means.
template <class E>
struct View {
  const typename E::Scalar *rows, *columns;
  int64_t row_stride, column_stride;
};

View<Single> view(const Inputs& in, int64_t rows, int64_t first, int64_t count, float* space, Single) {
  const Tile tile = float_tile(in, rows, first, count, space);
  return {tile.data, tile.data, tile.stride, tile.stride};
}

View<Pair> view(const Inputs& in, int64_t, int64_t first, int64_t count, uint32_t* space, Pair) {
  const uint16_t* rows = static_cast<const uint16_t*>(in.queue) + first * in.queue_stride;
  for (int64_t j = 0; j < count; j += 2) {
    const uint16_t *even = rows + j * in.queue_stride, *odd = even + in.queue_stride;
    uint32_t* to = space + j / 2 * in.dim;
    if (j + 1 < count)
      for (int64_t d = 0; d < in.dim; ++d) to[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
    else
      for (int64_t d = 0; d < in.dim; ++d) to[d] = even[d];
  }
  return {reinterpret_cast<const uint32_t*>(rows), space, in.queue_stride / 2, in.dim};
}

template <class E>
void forward_with(const Inputs& in, const Block& block, const Partial& out, char* scratch) {
  const ForwardMemory<E> memory(in, block.rows, scratch);
  const int64_t dim = in.dim, depth = dim / E::kDepth, height = tile_height(dim);
  pack_rows<E>(in, block.row, block.rows, memory.panels, memory.scale);
  for (int64_t i = 0; i < round_up(block.rows, kPanel) * dim; ++i) memory.mean[i] = 0;
  for (int64_t p = 0; p * kPanel < block.rows; ++p)
    for (int64_t i = 0; i < kPanel; ++i) {
      memory.soft[p].shift[i] = -FLT_MAX;
      memory.soft[p].sum[i] = memory.soft[p].divisor[i] = 0;
    }

  for (int64_t first = block.first; first < block.last; first += height) {
    const int64_t count = min(height, block.last - first);
    const View<E> tile = view(in, block.rows, first, count, memory.space, E{});
    for (int64_t row = 0; row < block.rows; row += kPanel) {
      const int64_t last = min(row + kPanel, block.rows) - 1;
      const bool wanted = out.mean[source(in, block.row + row).stack] || out.mean[source(in, block.row + last).stack];
      const typename E::Scalar* panel = memory.panels + row * depth;
      float* mean = wanted ? memory.mean + row * dim : nullptr;
      const auto step = [&](auto width) {
        constexpr int V = decltype(width)::value;
        similarities<E, V>(tile.rows, tile.row_stride, count, panel, depth, memory.s, kPanel);
        if (in.ids) exclude_rows<V>(in, block.row + row, block.rows - row, first, count, memory.s, kPanel);
        if (float* to = kept_similarities(in, block.row + row, first)) std::memcpy(to, memory.s, 4 * count * kPanel);
        online_softmax_step<E, V>(memory.s, count, memory.scale + row, memory.soft[row / kPanel], tile.columns,
                                  tile.column_stride, dim, mean);
      };
      block.rows - row > kLanes ? step(Width<2>{}) : step(Width<1>{});
    }
  }

  for (int64_t r = 0; r < block.rows; ++r) {
    const Softmax& soft = memory.soft[r / kPanel];
    const int64_t lane = r % kPanel;
    out.shift[r] = static_cast<double>(soft.shift[lane]) * memory.scale[r];
    out.sum[r] = soft.sum[lane];
    const Source from = source(in, block.row + r);
    if (float* to = out.mean[from.stack]) {
      const float* mean = memory.mean + (r - lane) * dim + lane;
      const double divisor = soft.divisor[lane];
      const float inverse = divisor == 0 ? 0 : static_cast<float>(1 / divisor);
      for (int64_t d = 0; d < dim; ++d) to[from.index * dim + d] = mean[d * kPanel] * inverse;
    }
  }
}

// Returns whether the input can be read as pairs: the width must be even, and rows aligned to 4 bytes. Other bfloat16
// input is converted to float32.
bool pairs([[maybe_unused]] const Inputs& in) {
#ifdef RELSSL_PAIRS
  return in.bf16 && in.dim % 2 == 0 && in.queue_stride % 2 == 0 && reinterpret_cast<uintptr_t>(in.queue) % 4 == 0;
#else
  return false;
#endif
}

int64_t forward_scratch(const Inputs& in, int64_t rows) {
  return pairs(in) ? ForwardMemory<Pair>(in, rows, nullptr).bytes : ForwardMemory<Single>(in, rows, nullptr).bytes;
}

void forward(const Inputs& in, const Block& block, const Partial& out, char* scratch) {
  pairs(in) ? forward_with<Pair>(in, block, out, scratch) : forward_with<Single>(in, block, out, scratch);
}

// ------------------------------------------------------------------------------------ vjp

// The factors and terms of one panel's weights, by lane.
struct PanelTerms {
  const float *scale, *high, *low, *base;
};

// Returns the probability 2^exponent, at most 1: the log-sum-exp of enormous logits is less precise than they are.
inline Float probability(Float exponent) { return exp2(exponent > 0.0f ? broadcast(0) : exponent); }

// Replaces similarities s[j][lane] by weights w = p (base + u). A null u[j][lane] means zero. Writes p to `keep`
// unless it is null.
template <int V>
void vjp_weights(float* s, int64_t s_stride, int64_t count, const PanelTerms& terms, const float* u, float* keep) {
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < V; ++v) {
      const int64_t lane = v * kLanes, at = j * s_stride + lane;
      const Float above = load<Float>(s + at) - load<Float>(terms.high + lane);
      const Float p = probability(above * load<Float>(terms.scale + lane) - load<Float>(terms.low + lane));
      const Float base = load<Float>(terms.base + lane);
      if (keep) store(keep + at, p);
      store(s + at, p * (u ? base + load<Float>(u + j * kPanel + lane) : base));
    }
}

// As above, for `symmetric`: the rows of the tile have terms, too.
template <int V>
void symmetric_weights(float* s, int64_t count, const PanelTerms& terms, const Cotangents& g, int64_t first) {
  for (int64_t j = 0; j < count; ++j) {
    const Float high = broadcast(g.high[first + j]), low = broadcast(g.low[first + j]);
    const Float base = broadcast(g.base[first + j]);
    for (int v = 0; v < V; ++v) {
      const int64_t lane = v * kLanes;
      const Float similarity = load<Float>(s + j * kPanel + lane), scale = load<Float>(terms.scale + lane);
      const Float own = (similarity - load<Float>(terms.high + lane)) * scale - load<Float>(terms.low + lane);
      const Float p_rj = probability(own), p_jr = probability((similarity - high) * scale - low);
      store(s + j * kPanel + lane, p_rj * load<Float>(terms.base + lane) + p_jr * base);
    }
  }
}

// Copies a value for each lane; the lanes beyond `rows` get 0.
void pad(const float* from, int64_t rows, float* to) {
  for (int64_t r = 0; r < round_up(rows, kPanel); ++r) to[r] = r < rows ? from[r] : 0;
}

// The rows of a block (or all rows), packed for the weights of a vjp. Their similarities are computed exactly as in the
// forward pass, by Pair if it used Pair, because the log-sum-exp matches only these to the last digit.
struct Packed {
  void* panels;
  float *g_panels, *scale, *high, *low, *base;
  Packed(const Inputs& in, const Cotangents& g, int64_t rows, Arena& arena) {
    const int64_t lanes = round_up(rows, kPanel);
    panels = arena.take<float>(lanes * in.dim);
    g_panels = g.g_mean ? arena.take<float>(lanes * in.dim) : nullptr;
    scale = arena.take<float>(lanes);
    high = arena.take<float>(lanes);
    low = arena.take<float>(lanes);
    base = arena.take<float>(lanes);
  }
  void fill(const Inputs& in, const Cotangents& g, int64_t row, int64_t rows) const {
    if (pairs(in))
      pack_rows<Pair>(in, row, rows, static_cast<uint32_t*>(panels), scale);
    else
      pack_rows<Single>(in, row, rows, static_cast<float*>(panels), scale);
    if (g_panels) pack_contiguous(g.g_mean + row * in.dim, rows, in.dim, g_panels);
    pad(g.high + row, rows, high);
    pad(g.low + row, rows, low);
    pad(g.base + row, rows, base);
  }
  // Computes the weights of panel row / kPanel with a tile into s, which has the similarities if they were kept. The
  // panel has `rows` rows, which are those from from_row on of all. `u` is scratch memory of the same size.
  template <int V>
  void weights(const Inputs& in, const Cotangents& g, const Tile& tile, int64_t first, int64_t count, int64_t row,
               int64_t from_row, int64_t rows, float* s, int64_t s_stride, float* u, float* keep) const {
    if (in.similarities) {
      // s has them already.
    } else if (pairs(in)) {
      const uint16_t* queue = static_cast<const uint16_t*>(in.queue) + first * in.queue_stride;
      similarities<Pair, V>(reinterpret_cast<const uint32_t*>(queue), in.queue_stride / 2, count,
                            static_cast<const uint32_t*>(panels) + row * in.dim / 2, in.dim / 2, s, s_stride);
    } else {
      similarities<Single, V>(tile.data, tile.stride, count, static_cast<const float*>(panels) + row * in.dim, in.dim,
                              s, s_stride);
    }
    if (in.ids && !in.similarities) exclude_rows<V>(in, from_row, rows, first, count, s, s_stride);
    if (g_panels) similarities<Single, V>(tile.data, tile.stride, count, g_panels + row * in.dim, in.dim, u, kPanel);
    const PanelTerms terms{scale + row, high + row, low + row, base + row};
    if (g.symmetric)
      symmetric_weights<V>(s, count, terms, g, first);
    else
      vjp_weights<V>(s, s_stride, count, terms, g_panels ? u : nullptr, keep);
  }
};

struct BackwardXMemory {
  Arena arena;
  Packed packed;
  float *weighted, *s, *u, *space;
  double* total;
  BackwardXMemory(const Inputs& in, const Cotangents& g, int64_t rows, char* base)
      : arena{base}, packed(in, g, rows, arena) {
    const int64_t lanes = round_up(rows, kPanel), height = tile_height(in.dim);
    weighted = arena.take<float>(lanes * in.dim);
    total = arena.take<double>(lanes);
    s = arena.take<float>(height * kPanel);
    u = arena.take<float>(height * kPanel);
    space = arena.take<float>(tile_space(in, rows));
  }
};

int64_t backward_x_scratch(const Inputs& in, const Cotangents& g, int64_t rows) {
  return BackwardXMemory(in, g, rows, nullptr).arena.used;
}

void backward_x(const Inputs& in, const Cotangents& g, const Block& block, double* total, float* weighted,
                char* scratch) {
  const BackwardXMemory memory(in, g, block.rows, scratch);
  const int64_t dim = in.dim, height = tile_height(dim), lanes = round_up(block.rows, kPanel);
  memory.packed.fill(in, g, block.row, block.rows);
  for (int64_t i = 0; i < lanes * dim; ++i) memory.weighted[i] = 0;
  for (int64_t i = 0; i < lanes; ++i) memory.total[i] = 0;

  for (int64_t first = block.first; first < block.last; first += height) {
    const int64_t count = min(height, block.last - first);
    const Tile tile = float_tile(in, block.rows, first, count, memory.space);
    for (int64_t row = 0; row < block.rows; row += kPanel) {
      const auto step = [&](auto width) {
        constexpr int V = decltype(width)::value;
        float* const kept = kept_similarities(in, block.row + row, first);
        float* const s = kept ? kept : memory.s;
        memory.packed.weights<V>(in, g, tile, first, count, row, block.row + row, block.rows - row, s, kPanel, memory.u,
                                 nullptr);
        Float sum[V] = {};
        for (int64_t j = 0; j < count; ++j)
          for (int v = 0; v < V; ++v) sum[v] += load<Float>(s + j * kPanel + v * kLanes);
        for (int v = 0; v < V; ++v)
          for (int i = 0; i < kLanes; ++i) memory.total[row + v * kLanes + i] += sum[v][i];
        multiply<Single, V>(dim, tile.data, 1, tile.stride, s, kPanel, count, memory.weighted + row * dim, kPanel,
                            true);
      };
      block.rows - row > kLanes ? step(Width<2>{}) : step(Width<1>{});
    }
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* from = memory.weighted + r / kPanel * kPanel * dim + r % kPanel;
    for (int64_t d = 0; d < dim; ++d) weighted[r * dim + d] = from[d * kPanel];
    total[r] = memory.total[r];
  }
}

// All rows, packed once for the queue's gradient: as panels, and as padded rows, which the weights multiply.
struct BackwardQueueShared {
  Arena arena;
  Packed packed;
  int64_t width;       // of a row, padded
  float *theta, *row;  // [rows, width]
  BackwardQueueShared(const Inputs& in, const Cotangents& g, char* base)
      : arena{base}, packed(in, g, all_rows(in), arena), width(round_up(in.dim, kLanes)) {
    theta = arena.take<float>(all_rows(in) * width);
    row = g.g_row ? arena.take<float>(all_rows(in) * width) : nullptr;
  }
};

int64_t backward_queue_shared(const Inputs& in, const Cotangents& g) {
  return BackwardQueueShared(in, g, nullptr).arena.used;
}

void backward_queue_pack(const Inputs& in, const Cotangents& g, char* memory) {
  const BackwardQueueShared shared(in, g, memory);
  const int64_t rows = all_rows(in);
  shared.packed.fill(in, g, 0, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const Source from = source(in, r);
    for (int64_t d = 0; d < shared.width; ++d) {
      const int64_t at = r * shared.width + d;
      shared.theta[at] = d < in.dim ? static_cast<float>(from.scale * element(from.row, d, in.bf16)) : 0;
      if (shared.row) shared.row[at] = d < in.dim ? g.g_row[r * in.dim + d] : 0;
    }
  }
}

struct BackwardQueueMemory {
  Arena arena;
  float *w, *p, *u, *sum, *space;
  BackwardQueueMemory(const Inputs& in, char* base) : arena{base} {
    const int64_t height = tile_height(in.dim);
    w = arena.take<float>(height * kGroup * kPanel);
    p = arena.take<float>(height * kGroup * kPanel);
    u = arena.take<float>(height * kPanel);
    sum = arena.take<float>(height * round_up(in.dim, kLanes));
    space = arena.take<float>(tile_space(in, all_rows(in)));
  }
};

int64_t backward_queue_scratch(const Inputs& in) { return BackwardQueueMemory(in, nullptr).arena.used; }

// sum[j][d] (+)= sum_r weights[j][r] rows[r][d]
void add_weighted_rows(const float* weights, int64_t count, const float* rows, int64_t width, int64_t depth, float* sum,
                       bool add) {
  const int64_t stride = kGroup * kPanel;
  for (int64_t d = 0; d < width; d += kPanel) {
    if (width - d >= kPanel)
      multiply<Single, 2>(count, weights, stride, 1, rows + d, width, depth, sum + d, width, add);
    else
      multiply<Single, 1>(count, weights, stride, 1, rows + d, width, depth, sum + d, width, add);
  }
}

void backward_queue(const Inputs& in, const Cotangents& g, int64_t begin, int64_t end, const char* packed,
                    float* grad_queue, char* scratch) {
  const BackwardQueueShared shared(in, g, const_cast<char*>(packed));
  const BackwardQueueMemory memory(in, scratch);
  const int64_t height = tile_height(in.dim), rows = all_rows(in), group = kGroup * kPanel;
  for (int64_t first = begin; first < end; first += height) {
    const int64_t count = min(height, end - first);
    const Tile tile = float_tile(in, rows, first, count, memory.space);
    for (int64_t from = 0; from < rows; from += group) {
      const int64_t depth = min(group, rows - from);
      for (int64_t row = from; row < from + depth; row += kPanel) {
        shared.packed.weights<2>(in, g, tile, first, count, row, row, rows - row, memory.w + row - from, group,
                                 memory.u, shared.row ? memory.p + row - from : nullptr);
      }
      add_weighted_rows(memory.w, count, shared.theta + from * shared.width, shared.width, depth, memory.sum, from > 0);
      if (shared.row)
        add_weighted_rows(memory.p, count, shared.row + from * shared.width, shared.width, depth, memory.sum, true);
    }
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(grad_queue + (first + j) * in.dim, memory.sum + j * shared.width, 4 * in.dim);
  }
}

void exp2_all(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes] = {};
    const int64_t count = min(kLanes, n - i);
    std::memcpy(lanes, x + i, 4 * count);
    store(lanes, exp2(load<Float>(lanes)));
    std::memcpy(y + i, lanes, 4 * count);
  }
}

double peak(int64_t repeats) {
  constexpr int chains = 2 * kRows;
  Float sum[chains];
  for (int j = 0; j < chains; ++j) sum[j] = broadcast(1.0f + j);  // The compiler would merge equal chains.
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < chains; ++j) sum[j] = sum[j] * 0.999f + 0.001f;
  }
  float total = 0;
  for (int j = 0; j < chains; ++j)
    for (int i = 0; i < kLanes; ++i) total += sum[j][i];
  return total > 0 ? 2.0 * chains * kLanes * repeats : 0;
}

}  // namespace

namespace relssl {

#define RELSSL_JOIN(a, b) a##b
#define RELSSL_TABLE(isa) RELSSL_JOIN(kernels_, isa)
#define RELSSL_TEXT(isa) #isa
#define RELSSL_NAME(isa) RELSSL_TEXT(isa)

extern const Kernels RELSSL_TABLE(RELSSL_ISA) = {
    RELSSL_NAME(RELSSL_ISA), kPanel, forward_scratch, forward, backward_x_scratch, backward_x,
    backward_queue_shared, backward_queue_pack, backward_queue_scratch, backward_queue, exp2_all, peak,
};

}  // namespace relssl
