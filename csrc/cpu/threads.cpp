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
  // False, and nothing done, if another caller is using the pool.
  bool run(int threads, int64_t tasks, const std::function<void(int64_t, int)>& run) {
    std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
    if (!use) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_ < threads - 1) {
      try {
        std::thread(&Pool::work, this).detach();
      } catch (const std::system_error&) {
        break;  // No more threads to be had: those that are there will do.
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
    take(run, 0);
    lock.lock();
    run_ = nullptr;  // Whoever has not joined by now need not.
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void take(const std::function<void(int64_t, int)>& run, int slot) {
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
      take(run, slot);
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

// Never destroyed: its threads may outlive static destructors. A forked child has the object but not the threads, and
// maybe a locked mutex: it leaves the old pool alone and starts another.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* found = pool.load();
  if (!found) {
    static const int once = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)once;
    Pool* made = new Pool;
    if (!pool.compare_exchange_strong(found, made))
      delete made;
    else
      found = made;
  }
  return *found;
}

}  // namespace

void parallel(int threads, int64_t tasks, const std::function<void(int64_t, int)>& run) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads > 1 && the_pool().run(threads, tasks, run)) return;
  for (int64_t task = 0; task < tasks; ++task) run(task, 0);
}

}  // namespace relssl
