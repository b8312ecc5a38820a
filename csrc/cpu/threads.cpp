#include "threads.h"

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

// The pool is never destroyed, because its threads may outlive static destructors. A forked child has a copy of the
// pool without its threads and maybe with a locked mutex: it does not use that copy, and creates a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& shared_pool() {
  Pool* found = pool.load();
  if (!found) {
    static const int once = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)once;
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
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads > 1 && shared_pool().run(threads, tasks, run)) return;
  for (int64_t task = 0; task < tasks; ++task) run(task, 0);
}

}  // namespace relssl
