// Parallel loops, on the OpenMP threads that torch's own loops use, or on a pool of threads.
//
// Threads of another pool would share the cores with OpenMP's, which spin for milliseconds after a loop of torch. So
// OpenMP's functions are taken at run time from the library that torch has loaded; nothing links to it. The pool
// serves where there is none, and in a forked child, where OpenMP's threads are missing.

#pragma once

#include <cstdint>
#include <functional>

namespace relssl {

// Calls run(task, slot) for every task in [0, tasks), on `threads` threads, one of which is the calling thread. slot is
// in [0, min(threads, tasks)), and concurrent calls have different slots. Tasks are started in order, each on the next
// free thread. Inside a parallel region of OpenMP, or while another thread is in here, the calling thread runs all of
// its tasks. `run` must not throw. OpenMP ends the threads that a smaller team leaves out, so `threads` should be
// torch's number, however few tasks there are.
void parallel(int threads, int64_t tasks, const std::function<void(int64_t task, int slot)>& run);

enum class Threads { automatic, own, openmp };

// Selects the pool, or OpenMP. Returns false, and changes nothing, if there is no OpenMP to select.
bool use_threads(Threads);

// Returns what a call of this process would run on now: own or openmp.
Threads threads_in_use();

}  // namespace relssl
