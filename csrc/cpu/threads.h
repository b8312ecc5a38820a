// A pool of threads, started at the first use, and again after a fork. (A second OpenMP runtime would compete with
// torch's for the cores, and OpenMP does not support forks.)

#pragma once

#include <cstdint>
#include <functional>

namespace relssl {

// Calls run(task, slot) for every task in [0, tasks), on up to `threads` threads including the calling thread. slot
// is in [0, threads), and concurrent calls have different slots. Tasks are started in order, each on the next free
// thread. If the pool is running another caller's tasks, the calling thread runs all of its tasks. `run` must not
// throw.
void parallel(int threads, int64_t tasks, const std::function<void(int64_t task, int slot)>& run);

}  // namespace relssl
