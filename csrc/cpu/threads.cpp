#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace relssl {
namespace {

class Pool {
 public:
  // Returns false without running anything if another caller is using the pool.
  bool run(int threads, int64_t tasks, const std::function<void(int64_t, int)>& run) {
    std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
    if (!use) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_ < threads - 1) {
      try {
        std::thread(&Pool::work, this).detach();
      } catch (const std::system_error&) {
        break;  // Cannot start more threads: continue with those that are running.
      }
      ++workers_;
    }
    run_ = &run;
    tasks_ = tasks;
    next_ = 0;
    slots_ = threads;
    joined_ = 1;
    ++job_;
    lock.unlock();
    wake_.notify_all();
    run_tasks(run, 0);
    lock.lock();
    run_ = nullptr;  // Threads that have not joined yet must not join any more.
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void run_tasks(const std::function<void(int64_t, int)>& run, int slot) {
    for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) run(task, slot);
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (!run_ || joined_ >= slots_) continue;
      const int slot = joined_++;
      const auto& run = *run_;
      ++running_;
      lock.unlock();
      run_tasks(run, slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int)>* run_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  int slots_ = 0, joined_ = 0, running_ = 0, workers_ = 0;
  uint64_t job_ = 0;
};

// The functions that compilers call for `#pragma omp parallel`, and two of OpenMP's. libgomp has them, and so have the
// OpenMP libraries of LLVM and Intel on Linux.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*in_parallel)() = nullptr;

  // Those of the library that libtorch_cpu was linked to: the process may have another one that torch does not use.
  OpenMp() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return;
    find("GOMP_parallel", torch, parallel);
    find("omp_get_thread_num", torch, thread_num);
    find("omp_in_parallel", torch, in_parallel);
  }
  explicit operator bool() const { return parallel && thread_num && in_parallel; }

 private:
  template <typename F>
  static void find(const char* name, void* library, F*& function) {
    function = reinterpret_cast<F*>(dlsym(library, name));
  }
};

// Found at the first call, when torch has been loaded.
const OpenMp& openmp() {
  static const OpenMp found;
  return found;
}

Threads selected = Threads::automatic;
std::atomic_flag openmp_in_use = ATOMIC_FLAG_INIT;

struct Loop {
  const std::function<void(int64_t, int)>& run;
  const int64_t tasks;
  const int slots;
  std::atomic<int64_t> next{0};

  static void body(void* data) noexcept {
    Loop& loop = *static_cast<Loop*>(data);
    const int slot = openmp().thread_num();
    if (slot >= loop.slots) return;
    for (int64_t task; (task = loop.next.fetch_add(1)) < loop.tasks;) loop.run(task, slot);
  }
};

// Returns false without running anything if another caller is using OpenMP's threads.
bool run_on_openmp(int threads, int64_t tasks, const std::function<void(int64_t, int)>& run) {
  if (openmp().in_parallel() || openmp_in_use.test_and_set()) return false;
  Loop loop{run, tasks, static_cast<int>(std::min<int64_t>(threads, tasks))};
  openmp().parallel(Loop::body, &loop, threads, 0);
  openmp_in_use.clear();
  return true;
}

// The pool is never destroyed, because its threads may outlive static destructors. A forked child has a copy of the
// pool without its threads and maybe with a locked mutex: it does not use that copy, and creates a new pool.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool.store(nullptr);
  forked.store(true);
});

Pool& shared_pool() {
  Pool* found = pool.load();
  if (!found) {
    Pool* created = new Pool;
    if (!pool.compare_exchange_strong(found, created))
      delete created;
    else
      found = created;
  }
  return *found;
}

}  // namespace

void parallel(int threads, int64_t tasks, const std::function<void(int64_t, int)>& run) {
  if (threads > 1 && tasks > 1) {
    const bool done = threads_in_use() == Threads::openmp
                          ? run_on_openmp(threads, tasks, run)
                          : shared_pool().run(static_cast<int>(std::min<int64_t>(threads, tasks)), tasks, run);
    if (done) return;
  }
  for (int64_t task = 0; task < tasks; ++task) run(task, 0);
}

bool use_threads(Threads choice) {
  if (choice == Threads::openmp && !openmp()) return false;
  selected = choice;
  return true;
}

Threads threads_in_use() {
  return selected != Threads::own && !forked && openmp() ? Threads::openmp : Threads::own;
}

}  // namespace relssl
