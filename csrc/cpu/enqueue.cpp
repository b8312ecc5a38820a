#include "enqueue.h"

#include <algorithm>
#include <cstring>

namespace relssl {

namespace {

bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  return a_bytes && b_bytes && first < second + b_bytes && second < first + a_bytes;
}

// Copies keys [from, from + n) to rows [to, to + n).
void copy(const Ring& ring, const Keys& keys, int64_t from, int64_t to, int64_t n) {
  char* target = ring.rows + to * ring.row_bytes;
  const char* source = keys.rows + from * keys.stride;
  if (keys.stride == ring.row_bytes)
    std::memcpy(target, source, n * ring.row_bytes);
  else
    for (int64_t i = 0; i < n; ++i) std::memcpy(target + i * ring.row_bytes, source + i * keys.stride, ring.row_bytes);
  if (ring.ids) std::copy_n(keys.ids + from, n, ring.ids + to);
}

// Returns the index in [0, size), for a negative one, too: a pointer may have been loaded from anywhere.
int64_t wrap(int64_t index, int64_t size) { return (index % size + size) % size; }

}  // namespace

bool overlaps(const Ring& ring, const Keys& keys) {
  const int64_t span = keys.batch ? (keys.batch - 1) * keys.stride + ring.row_bytes : 0, id = sizeof(int64_t);
  return overlap(ring.rows, ring.size * ring.row_bytes, keys.rows, span) ||
         (ring.ids && overlap(ring.ids, ring.size * id, keys.ids, keys.batch * id));
}

void enqueue(const Ring& ring, const Keys& keys) {
  const int64_t kept = std::min(keys.batch, ring.size), skipped = keys.batch - kept;
  const int64_t first = wrap(*ring.pointer + skipped, ring.size);
  const int64_t before_end = std::min(kept, ring.size - first);
  copy(ring, keys, skipped, first, before_end);
  copy(ring, keys, skipped + before_end, 0, kept - before_end);
  *ring.pointer = wrap(*ring.pointer + keys.batch, ring.size);
  *ring.count = std::min(*ring.count + keys.batch, ring.size);
}

}  // namespace relssl
