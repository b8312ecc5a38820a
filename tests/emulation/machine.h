// Runs the threads of a block as fibers.
//
// A fiber runs until it reaches a collective operation (a barrier, or an instruction of a whole warp). Then another
// fiber that is ready continues, chosen at random from a seed. In most blocks warps or threads have random ranks,
// those of high rank run before the others, and the ranks change from time to time. Threads thus drift apart as far
// as barriers allow, and code that works in one order only fails for some seed. Shared memory starts as NaN.
// Asynchronous work runs at once, later, or not before a thread waits for it: this is chosen at random for each
// block.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// A fast random number generator (xorshift64*), good enough to choose fibers.
class Random {
 public:
  void seed(uint64_t seed) { state_ = (seed + 1) * 0x9e3779b97f4a7c15; }
  uint32_t operator()() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d >> 32;
  }

 private:
  uint64_t state_ = 1;
};

// Asynchronous work, and the group of its thread or warpgroup to which it belongs.
struct Task {
  std::function<void()> run;
  int64_t group;
};

// The tasks that have not run yet. A wait runs all but those of the last groups.
struct Tasks {
  std::vector<Task> open;
  int64_t group = 0;  // the one that new tasks belong to
};

struct Fiber {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  Tasks copies;          // cp.async
  int64_t products = 0;  // groups of products that this thread has committed
};

// A collective operation: the threads that wait for each other, and the argument of each.
struct Collective {
  std::vector<int> waiting;
  int arrived = 0;
  const char* what = "";
  void* arguments[128];
};

struct Mbarrier {
  int count = 0, pending = 0, bytes = 0, phase = 0;
  std::vector<int> waiting;
};

class Machine {
 public:
  dim3 block, grid;
  bool vote = false;

  void seed(uint64_t seed) { random_.seed(seed); }
  int current() const { return current_; }
  int threads() const { return static_cast<int>(fibers_.size()); }
  Fiber& fiber() { return fibers_[current_]; }
  Collective& barrier(int id) { return barriers_[id]; }

  void fail(const std::string& error) {
    if (error_.empty()) error_ = error;
  }

  // ---------------------------------------------------------------------------------- shared memory

  uint8_t* shared(uint32_t at, int bytes) {
    if (at + bytes > shared_.size() || at % bytes) {
      fail("shared memory at " + std::to_string(at) + " is beyond its end, or not aligned");
      return nowhere_;
    }
    return shared_.data() + at;
  }

  // An ordinary store, which tensor cores and TMA may not read before the writer's fence.
  void write(int writer, uint32_t at, const void* from, int bytes) {
    std::memcpy(shared(at, bytes), from, bytes);
    if (at / 16 < writers_.size()) writers_[at / 16] = writer + 1;
  }
  void fence() {
    for (int& writer : writers_)
      if (writer == current_ + 1) writer = 0;
  }
  const uint8_t* read_unordered(uint32_t at, int bytes) {
    if (at / 16 < writers_.size() && writers_[at / 16]) fail("tensor cores read what no fence has made visible to them");
    return shared(at, bytes);
  }

  // ---------------------------------------------------------------------------------------- execution

  void run(dim3 of, int threads, int shared, const std::function<void()>& kernel) {
    grid = of;
    kernel_ = &kernel;
    error_.clear();
    for (unsigned y = 0; y < of.y; y++)
      for (unsigned x = 0; x < of.x && error_.empty(); x++) {
        block = dim3(x, y);
        shared_.assign(shared, 0xff);  // NaN in any format
        writers_.assign(shared / 16 + 1, 0);
        late_ = random_() % 2;
        const int units[] = {0, 1, 32, 128};
        unit_ = units[random_() % 4];
        run_block(threads);
      }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // The current thread arrives at a collective of `count` threads. The last one runs `act`, and then all waiting
  // threads continue.
  template <class Act>
  void arrive(Collective& collective, int count, const char* what, Act act, bool wait = true) {
    if (!collective.arrived) collective.what = what;
    if (collective.what != what) fail(std::string("threads wait at ") + collective.what + " and at " + what);
    if (wait) collective.waiting.push_back(current_);
    if (++collective.arrived == count) {
      act();
      collective.arrived = 0;
      wake(collective.waiting);
    }
    run_some_tasks();
    if (!wait) ready_.push_back(current_);
    next();
  }

  // Lets other threads run before the current one. In half of the blocks with late tasks, it continues only when no
  // other thread and no task can run.
  void yield() {
    (late_ && unit_ < 32 ? last_ : ready_).push_back(current_);
    next();
  }

  // An operation of 32 or 128 threads: each passes an address, and the last thread runs `act` on all of them.
  template <class Act>
  void together(int count, const char* what, void* argument, Act act) {
    Collective& collective = (count == 32 ? warps_ : warpgroups_)[current_ / count];
    collective.arguments[current_ % count] = argument;
    arrive(collective, count, what, [&] { act(collective.arguments); });
  }

  // -------------------------------------------------------------------------------- asynchronous work

  void copy(std::function<void()> run) {
    fiber().copies.open.push_back({std::move(run), fiber().copies.group});
    run_some_tasks();
  }
  void wait_for_copies(int pending) { finish(fiber().copies, fiber().copies.group - pending); }

  Tasks& products() { return products_[current_ / 128]; }
  void wait_for_products(int pending) { finish(products(), fiber().products - pending); }

  void bulk(std::function<void()> run) { bulk_.open.push_back({std::move(run), 0}); }

  Mbarrier& mbarrier(uint32_t at) {
    shared(at, 8);
    return mbarriers_[at];
  }
  void settle(Mbarrier& m) {
    if (m.pending || m.bytes) return;
    m.phase++;
    m.pending = m.count;
    wake(m.waiting);
  }
  void wait(Mbarrier& m, int parity) {
    while (m.phase % 2 == parity) {
      m.waiting.push_back(current_);
      next();
    }
  }

 private:
  static constexpr size_t STACK = 64 << 10;

  void run_block(int threads) {
    fibers_ = std::vector<Fiber>(threads);
    warps_.assign(threads / 32, {});
    warpgroups_.assign((threads + 127) / 128, {});
    products_.assign((threads + 127) / 128, {});
    barriers_.assign(16, {});
    mbarriers_.clear();
    bulk_ = {};
    ready_.clear();
    ranks_.assign(threads, 0);
    if (unit_) rank();
    for (int i = 0; i < threads; i++) {
      fibers_[i].stack.reset(new char[STACK]);
      ready_.push_back(i);
      starting_ = i;
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = fibers_[i].stack.get();
      context.uc_stack.ss_size = STACK;
      context.uc_link = nullptr;
      makecontext(&context, &Machine::start, 0);
      swapcontext(&here_, &context);
    }
    finished_ = 0;
    if (!_setjmp(home_)) next();
  }

  // Saves the fiber's context and returns to run_block. When the fiber is resumed, it runs the kernel.
  static void start();

  void wake(std::vector<int>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }

  // Gives each unit of threads a random rank.
  void rank() {
    for (int i = 0; i < threads(); i++) ranks_[i] = i % unit_ ? ranks_[i - 1] : random_();
  }

  // Switches to a thread that is ready, or back to run_block if there is none.
  void next() {
    if (current_ >= 0 && _setjmp(fibers_[current_].at)) return;
    if (!late_ && !bulk_.open.empty() && random_() % 16 == 0) run_any(bulk_);
    while (ready_.empty() && !bulk_.open.empty()) run_any(bulk_);
    if (ready_.empty()) wake(last_);
    if (ready_.empty()) {
      if (finished_ < threads()) fail("no thread can continue: " + waiting_threads());
      current_ = -1;
      _longjmp(home_, 1);
    }
    size_t drawn = random_() % ready_.size();
    if (unit_ && random_() % 1024 == 0) rank();
    for (int i = 0; i < 4 && unit_; i++) {
      const size_t other = random_() % ready_.size();
      if (ranks_[ready_[other]] > ranks_[ready_[drawn]]) drawn = other;
    }
    current_ = ready_[drawn];
    ready_[drawn] = ready_.back();
    ready_.pop_back();
    _longjmp(fibers_[current_].at, 1);
  }

  std::string waiting_threads() const {
    std::string at = std::to_string(threads() - finished_) + " threads";
    for (const auto* collectives : {&warps_, &warpgroups_, &barriers_})
      for (const Collective& m : *collectives)
        if (m.arrived) at += ", " + std::to_string(m.arrived) + " at " + m.what;
    for (const auto& [where, m] : mbarriers_)
      if (!m.waiting.empty()) at += ", " + std::to_string(m.waiting.size()) + " at an mbarrier";
    return at;
  }

  void finish(Tasks& tasks, int64_t group) {
    for (size_t i = 0; i < tasks.open.size();)
      if (tasks.open[i].group < group)
        run_task(tasks, i);
      else
        i++;
  }

  void run_task(Tasks& tasks, size_t index) {
    const Task task = std::move(tasks.open[index]);
    tasks.open.erase(tasks.open.begin() + index);
    task.run();
  }

  void run_any(Tasks& tasks) { run_task(tasks, random_() % tasks.open.size()); }

  // Runs, at random, a copy of this thread and the oldest product of its warpgroup. Products keep their order.
  void run_some_tasks() {
    if (late_) return;
    if (!fiber().copies.open.empty() && random_() % 4 == 0) run_any(fiber().copies);
    if (!products().open.empty() && random_() % 64 == 0) run_task(products(), 0);
  }

  std::vector<Fiber> fibers_;
  std::vector<Collective> warps_, warpgroups_, barriers_;
  std::vector<Tasks> products_;
  std::map<uint32_t, Mbarrier> mbarriers_;
  Tasks bulk_;
  std::vector<int> ready_, last_, writers_;
  std::vector<uint32_t> ranks_;
  std::vector<uint8_t> shared_;
  Random random_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t here_;
  jmp_buf home_;
  std::string error_;
  int current_ = -1, starting_ = 0, finished_ = 0;
  bool late_ = false;
  int unit_ = 0;  // threads that share a rank; 0 for no ranks
  alignas(16) uint8_t nowhere_[128];
};

inline Machine machine;

inline void Machine::start() {
  Fiber& own = machine.fibers_[machine.starting_];
  if (!_setjmp(own.at)) setcontext(&machine.here_);
  (*machine.kernel_)();
  machine.finished_++;
  machine.current_ = -1;
  machine.next();
}

}  // namespace emulation
