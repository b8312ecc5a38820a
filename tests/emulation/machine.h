// A block's threads as fibers, and what they wait for.
//
// One runs until it reaches a collective (a barrier, or what a warp does together); then any other that can goes on,
// drawn at random from a seed. In most blocks some warps or threads go before others whenever they can, until ranks are
// drawn anew: so they drift apart as far as barriers let them, and what only works in one order fails for some seed.
// Shared memory starts as NaN. Whatever is asynchronous happens at once, or later, or no sooner than it is waited for:
// a block's draw says which.

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

// Fast, and as random as drawing fibers needs (xorshift64*).
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

// Something that happens by itself, of the group that its thread or warpgroup had open.
struct Task {
  std::function<void()> run;
  int64_t group;
};

// In order or in any, all but the last groups to be done at a wait.
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

// Threads that wait for each other, and what each brings.
struct Meeting {
  std::vector<int> waiting;
  int arrived = 0;
  const char* what = "";
  void* brought[128];
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
  Meeting& barrier(int id) { return barriers_[id]; }

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

  // Written by ordinary means: hidden from tensor cores and copy engine until the writer's fence.
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

  // ------------------------------------------------------------------------------------------ running

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

  // The current thread arrives at a meeting of `count`; the last one does `act`, and then all that wait go on.
  template <class Act>
  void meet(Meeting& meeting, int count, const char* what, Act act, bool wait = true) {
    if (!meeting.arrived) meeting.what = what;
    if (meeting.what != what) fail(std::string("threads meet at ") + meeting.what + " and at " + what);
    if (wait) meeting.waiting.push_back(current_);
    if (++meeting.arrived == count) {
      act();
      meeting.arrived = 0;
      wake(meeting.waiting);
    }
    happen();
    if (!wait) ready_.push_back(current_);
    next();
  }

  // The current thread goes on after others; in half of the blocks where all is late, when nothing else can happen.
  void give_way() {
    (late_ && unit_ < 32 ? last_ : ready_).push_back(current_);
    next();
  }

  // What 32 or 128 threads do together: each brings an address, and the last one acts on all.
  template <class Act>
  void together(int count, const char* what, void* brought, Act act) {
    Meeting& meeting = (count == 32 ? warps_ : warpgroups_)[current_ / count];
    meeting.brought[current_ % count] = brought;
    meet(meeting, count, what, [&] { act(meeting.brought); });
  }

  // --------------------------------------------------------------------------- what happens by itself

  void copy(std::function<void()> run) {
    fiber().copies.open.push_back({std::move(run), fiber().copies.group});
    happen();
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

  // A fiber says where it is to be found, and comes back to run the kernel.
  static void start();

  void wake(std::vector<int>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }

  // Units of threads go before others.
  void rank() {
    for (int i = 0; i < threads(); i++) ranks_[i] = i % unit_ ? ranks_[i - 1] : random_();
  }

  // On to any thread that can; home when none can.
  void next() {
    if (current_ >= 0 && _setjmp(fibers_[current_].at)) return;
    if (!late_ && !bulk_.open.empty() && random_() % 16 == 0) one_of(bulk_);
    while (ready_.empty() && !bulk_.open.empty()) one_of(bulk_);
    if (ready_.empty()) wake(last_);
    if (ready_.empty()) {
      if (finished_ < threads()) fail("nobody can go on: " + told());
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

  std::string told() const {
    std::string at = std::to_string(threads() - finished_) + " threads";
    for (const auto* meetings : {&warps_, &warpgroups_, &barriers_})
      for (const Meeting& m : *meetings)
        if (m.arrived) at += ", " + std::to_string(m.arrived) + " at " + m.what;
    for (const auto& [where, m] : mbarriers_)
      if (!m.waiting.empty()) at += ", " + std::to_string(m.waiting.size()) + " at an mbarrier";
    return at;
  }

  void finish(Tasks& tasks, int64_t group) {
    for (size_t i = 0; i < tasks.open.size();)
      if (tasks.open[i].group < group)
        take(tasks, i);
      else
        i++;
  }

  void take(Tasks& tasks, size_t index) {
    const Task task = std::move(tasks.open[index]);
    tasks.open.erase(tasks.open.begin() + index);
    task.run();
  }

  void one_of(Tasks& tasks) { take(tasks, random_() % tasks.open.size()); }

  // By chance, one copy of this thread, and the oldest product of its warpgroup; products keep their order.
  void happen() {
    if (late_) return;
    if (!fiber().copies.open.empty() && random_() % 4 == 0) one_of(fiber().copies);
    if (!products().open.empty() && random_() % 64 == 0) take(products(), 0);
  }

  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, warpgroups_, barriers_;
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
