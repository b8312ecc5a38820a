// A pool of threads of our own: started when first needed, and anew after a fork. (An OpenMP runtime beside torch's
// would fight with it for the cores, and one of them does not survive a fork.)

#pragma once

#include <cstdint>
#include <functional>

namespace relssl {

// Calls run(task, slot) for every task in [0, tasks), on up to `threads` threads, this one among them. slot is in
// [0, threads) and no two calls at a time share one. Tasks are taken in order, whoever is free taking the next.
// If the pool is busy with another caller's tasks, this thread does them alone. `run` must not throw.
void parallel(int threads, int64_t tasks, const std::function<void(int64_t task, int slot)>& run);

}  // namespace relssl
