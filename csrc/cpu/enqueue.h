// Writes a batch into a queue's ring: rows, ids, pointer and count.

#pragma once

#include <cstdint>

namespace relssl {

// The queue's memory: `size` contiguous rows of `row_bytes`, their ids or null, the index of the row that is
// overwritten next, and the number of rows written so far.
struct Ring {
  char* rows;
  int64_t size, row_bytes;
  int64_t *ids, *pointer, *count;
};

// The new rows, `stride` bytes apart, and their ids, or null where the ring has none.
struct Keys {
  const char* rows;
  int64_t batch, stride;
  const int64_t* ids;
};

// Returns whether the keys share memory with what they would overwrite.
bool overlaps(const Ring&, const Keys&);

// Overwrites the oldest rows. Of more keys than rows the last stay; pointer and count advance by all.
void enqueue(const Ring&, const Keys&);

}  // namespace relssl
