// CUDA on a CPU, for tests: csrc/cuda is compiled with g++ and this header in place of ptx.h and launch.h.
//
// A block's threads are fibers. One runs until it reaches a collective (a barrier, or what a warp does together); then
// any other that can goes on, drawn at random from a seed. So warps drift apart as far as barriers let them, and what
// only works in one order fails for some seed. Shared memory starts as NaN. A cp.async lands at once, or later, or no
// sooner than its thread waits for it. The layouts of fragments are those that the PTX ISA draws.

#ifndef RELSSL_EMULATION_H
#define RELSSL_EMULATION_H
#define RELSSL_PTX_H
#define RELSSL_LAUNCH_H

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::emulation::machine.thread_index())
#define blockIdx (::emulation::machine.block)
#define gridDim (::emulation::machine.grid)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
using cudaStream_t = void*;

namespace emulation {

// An asynchronous copy into shared memory, of the group that its thread had open.
struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
  int64_t group;
};

struct Fiber {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  std::deque<Copy> copies;
  int64_t group = 0;
};

// Threads that wait for each other, and what each brings.
struct Meeting {
  std::vector<int> waiting;
  const char* what = "";
  void* brought[32];
};

class Machine {
 public:
  dim3 block, grid;

  dim3 thread_index() const { return dim3(current_); }
  uint8_t* shared(uint32_t at, int bytes) {
    if (at + bytes > shared_.size() || at % bytes) {
      fail("shared memory at " + std::to_string(at) + " is beyond its end, or not aligned");
      return nowhere_;
    }
    return shared_.data() + at;
  }
  void seed(uint64_t seed) { random_.seed(seed); }

  void run(dim3 of, int threads, int shared, const std::function<void()>& kernel) {
    grid = of;
    kernel_ = &kernel;
    error_.clear();
    for (unsigned y = 0; y < of.y; y++)
      for (unsigned x = 0; x < of.x && error_.empty(); x++) {
        block = dim3(x, y);
        shared_.assign(shared, 0xff);  // NaN in any format
        late_ = random_() % 3;
        run_block(threads);
      }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  void fail(const std::string& error) {
    if (error_.empty()) error_ = error;
  }

  // The current thread arrives at a meeting of `count`; the last one does `act`, then all go on.
  template <class Act>
  void meet(Meeting& meeting, int count, const char* what, Act act) {
    if (meeting.waiting.empty()) meeting.what = what;
    if (meeting.what != what) fail(std::string("threads meet at ") + meeting.what + " and at " + what);
    meeting.waiting.push_back(current_);
    if (static_cast<int>(meeting.waiting.size()) == count) {
      act();
      ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
      meeting.waiting.clear();
    }
    land_some();
    next();
  }

  // What a warp does together: each lane brings an address, and the last one acts on all 32.
  template <class Act>
  void warp(const char* what, void* brought, Act act) {
    Meeting& meeting = warps_[current_ / 32];
    meeting.brought[current_ % 32] = brought;
    meet(meeting, 32, what, [&] { act(meeting.brought); });
  }

  Meeting& barrier(int id) { return barriers_[id]; }
  int threads() const { return static_cast<int>(fibers_.size()); }

  void copy(Copy copy) {
    Fiber& own = fibers_[current_];
    copy.group = own.group;
    own.copies.push_back(copy);
    land_some();
  }
  void commit() { fibers_[current_].group++; }
  void wait(int pending) {
    Fiber& own = fibers_[current_];
    for (size_t i = 0; i < own.copies.size();)
      if (own.copies[i].group < own.group - pending)
        land(own, i);
      else
        i++;
  }

  bool vote = false;

 private:
  static constexpr size_t STACK = 64 << 10;

  void run_block(int threads) {
    fibers_ = std::vector<Fiber>(threads);
    warps_.assign(threads / 32, {});
    barriers_.assign(16, {});
    ready_.clear();
    for (int i = 0; i < threads; i++) {
      fibers_[i].stack.reset(new char[STACK]);
      ready_.push_back(i);
      starting_ = i;
      ucontext_t context, here;
      getcontext(&context);
      context.uc_stack.ss_sp = fibers_[i].stack.get();
      context.uc_stack.ss_size = STACK;
      context.uc_link = nullptr;
      makecontext(&context, &Machine::start, 0);
      swapcontext_(&here, &context);
    }
    finished_ = 0;
    if (!_setjmp(home_)) next();
  }

  // To the new fiber and, before it runs the kernel, back.
  void swapcontext_(ucontext_t* here, ucontext_t* there) {
    here_ = here;
    swapcontext(here, there);
  }
  static void start();

  // On to any thread that can; home when none can.
  void next() {
    if (current_ >= 0 && _setjmp(fibers_[current_].at)) return;
    if (ready_.empty()) {
      if (finished_ < threads()) {
        std::string at;
        for (const auto* meetings : {&warps_, &barriers_})
          for (const Meeting& m : *meetings)
            if (!m.waiting.empty()) at += std::string(" ") + std::to_string(m.waiting.size()) + " at " + m.what;
        fail("nobody can go on:" + at);
      }
      current_ = -1;
      _longjmp(home_, 1);
    }
    const size_t drawn = random_() % ready_.size();
    current_ = ready_[drawn];
    ready_[drawn] = ready_.back();
    ready_.pop_back();
    _longjmp(fibers_[current_].at, 1);
  }

  void land(Fiber& fiber, size_t index) {
    const Copy copy = fiber.copies[index];
    fiber.copies.erase(fiber.copies.begin() + index);
    uint8_t* to = shared(copy.to, 16);
    std::memset(to, 0, 16);
    std::memcpy(to, copy.from, copy.bytes);
  }

  // By chance, one copy of this thread; in a third of the blocks none before it is waited for.
  void land_some() {
    Fiber& own = fibers_[current_];
    if (late_ && !own.copies.empty() && random_() % 4 == 0) land(own, random_() % own.copies.size());
  }

  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, barriers_;
  std::vector<int> ready_;
  std::vector<uint8_t> shared_;
  std::minstd_rand random_{1};
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t* here_ = nullptr;
  jmp_buf home_;
  std::string error_;
  int current_ = -1, starting_ = 0, finished_ = 0;
  uint32_t late_ = 0;
  uint8_t nowhere_[128];
};

inline Machine machine;

inline void Machine::start() {
  Fiber& own = machine.fibers_[machine.starting_];
  if (!_setjmp(own.at)) {
    ucontext_t unused;
    swapcontext(&unused, machine.here_);
  }
  (*machine.kernel_)();
  machine.finished_++;
  machine.current_ = -1;
  machine.next();
}

}  // namespace emulation

// ------------------------------------------------------------------------------------------- CUDA's own

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void __syncthreads() {
  auto& m = emulation::machine;
  m.meet(m.barrier(0), m.threads(), "__syncthreads", [] {});
}

inline bool __syncthreads_or(bool own) {
  auto& m = emulation::machine;
  m.meet(m.barrier(0), m.threads(), "__syncthreads_or (before)", [&] { m.vote = false; });
  m.vote = m.vote || own;
  m.meet(m.barrier(0), m.threads(), "__syncthreads_or", [] {});
  return m.vote;
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
  struct Lane {
    T given, got;
    int lanes;
  } own{x, x, lanes};
  emulation::machine.warp("__shfl_xor_sync", &own, [](void** brought) {
    for (int i = 0; i < 32; i++) {
      auto* lane = static_cast<Lane*>(brought[i]);
      lane->got = static_cast<Lane*>(brought[i ^ lane->lanes])->given;
    }
  });
  return own.got;
}

inline bool __any_sync(unsigned, bool own) {
  emulation::machine.warp("__any_sync", &own, [](void** brought) {
    bool any = false;
    for (int i = 0; i < 32; i++) any = any || *static_cast<bool*>(brought[i]);
    for (int i = 0; i < 32; i++) *static_cast<bool*>(brought[i]) = any;
  });
  return own;
}

namespace relssl {

// --------------------------------------------------------------------------------------------- launch.h

struct Where {
  int device;
  cudaStream_t stream;
};

template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, int threads, int shared, const Where&, const Parameters& parameters) {
  emulation::machine.run(grid, threads, shared, [&] { kernel(parameters); });
}

inline void require(const void*, int) {}

// ------------------------------------------------------------------------------------------------ ptx.h

struct BF16 {};
struct FP16 {};

template <class T>
float from_bits(uint16_t bits);

template <>
inline float from_bits<BF16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float from_bits<FP16>(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.f + fraction, exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -size : size;
}

template <class T>
uint16_t to_bits(float x);

template <>
inline uint16_t to_bits<BF16>(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <>
inline uint16_t to_bits<FP16>(float x) {
  const uint16_t sign = std::signbit(x) << 15;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);                       // size = [1/2, 1) 2^exponent
  const int last = (exponent < -13 ? -13 : exponent) - 11;  // the place of the last digit
  const int digits = std::lrint(std::ldexp(size, -last));    // to nearest, ties to even
  return sign | (digits < 1024 ? digits : ((last + 25 - 1) << 10) + digits);
}

template <class T>
uint32_t pack(float low, float high) {
  return to_bits<T>(low) | static_cast<uint32_t>(to_bits<T>(high)) << 16;
}

template <class T>
float unpack_low(uint32_t pair) {
  return from_bits<T>(pair & 0xffff);
}

template <class T>
float unpack_high(uint32_t pair) {
  return from_bits<T>(pair >> 16);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

inline uint32_t shared_memory() { return 0; }

template <class Object>
Object& shared_object() {
  return *reinterpret_cast<Object*>(emulation::machine.shared(0, 1));
}

inline void store_shared(uint32_t to, uint32_t value) { std::memcpy(emulation::machine.shared(to, 4), &value, 4); }

inline uint32_t load_shared(uint32_t from) {
  uint32_t value;
  std::memcpy(&value, emulation::machine.shared(from, 4), 4);
  return value;
}

inline void cp_async(uint32_t to, const void* from, int bytes) { emulation::machine.copy({to, from, bytes, 0}); }
inline void cp_async_commit() { emulation::machine.commit(); }

template <int PENDING>
void cp_async_wait() {
  emulation::machine.wait(PENDING);
}

inline void barrier(int id, int threads) {
  emulation::machine.meet(emulation::machine.barrier(id), threads, "barrier", [] {});
}

inline void ldmatrix(uint32_t (&to)[4], uint32_t row, bool transposed, const char* what) {
  struct Lane {
    uint32_t* to;
    uint32_t row;
    bool transposed;
  } own{to, row, transposed};
  emulation::machine.warp(what, &own, [](void** brought) {
    for (int matrix = 0; matrix < 4; matrix++) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; i++) {
        const uint32_t row = static_cast<Lane*>(brought[8 * matrix + i])->row;
        std::memcpy(elements[i], emulation::machine.shared(row, 16), 16);
      }
      for (int i = 0; i < 32; i++) {
        const auto* lane = static_cast<Lane*>(brought[i]);
        const auto at = [&](int e) {
          const int r = i / 4, c = i % 4 * 2 + e;
          return static_cast<uint32_t>(lane->transposed ? elements[c][r] : elements[r][c]);
        };
        lane->to[matrix] = at(0) | at(1) << 16;
      }
    }
  });
}

inline void ldmatrix(uint32_t (&to)[4], uint32_t row) { ldmatrix(to, row, false, "ldmatrix"); }
inline void ldmatrix_transposed(uint32_t (&to)[4], uint32_t row) { ldmatrix(to, row, true, "ldmatrix.trans"); }

// Exact products, and sums rounded once.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } own{c, a, {b0, b1}};
  emulation::machine.warp("mma", &own, [](void** brought) {
    float a[16][16], b[8][16];  // b by columns
    for (int i = 0; i < 32; i++) {
      const auto* lane = static_cast<Lane*>(brought[i]);
      for (int r = 0; r < 4; r++) {
        float* to = a[i / 4 + r % 2 * 8] + i % 4 * 2 + r / 2 * 8;
        to[0] = unpack_low<T>(lane->a[r]);
        to[1] = unpack_high<T>(lane->a[r]);
      }
      for (int r = 0; r < 2; r++) {
        float* to = b[i / 4] + i % 4 * 2 + r * 8;
        to[0] = unpack_low<T>(lane->b[r]);
        to[1] = unpack_high<T>(lane->b[r]);
      }
    }
    for (int i = 0; i < 32; i++)
      for (int r = 0; r < 4; r++) {
        const float *row = a[i / 4 + r / 2 * 8], *column = b[i % 4 * 2 + r % 2];
        float& sum = static_cast<Lane*>(brought[i])->c[r];
        double exact = sum;
        for (int k = 0; k < 16; k++) exact += static_cast<double>(row[k]) * column[k];
        sum = static_cast<float>(exact);
      }
  });
}

}  // namespace relssl

#endif
