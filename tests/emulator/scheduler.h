// Runs a grid on the host: every thread of a block is a fibre, which runs until its next collective. Which of the
// runnable threads goes on is random, so that a missing barrier gives a wrong result under some seed.
//
// One launch at a time, in one host thread.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibre.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of compute capability 9.0, the largest

enum class Op {
  kExit,
  kSyncthreads,
  kSyncthreadsOr,
  kSyncwarp,
  kShfl,
  kShflXor,
  kShflUp,
  kShflDown,
  kBallot,
  kAny,
  kAll
};

inline const char* name_of(Op op) {
  constexpr const char* kNames[] = {"exit",          "__syncthreads",   "__syncthreads_or", "__syncwarp",
                                    "__shfl_sync",   "__shfl_xor_sync", "__shfl_up_sync",   "__shfl_down_sync",
                                    "__ballot_sync", "__any_sync",      "__all_sync"};
  return kNames[static_cast<int>(op)];
}

// What a thread brings to a collective; the last three are those of a shuffle: bytes of the value, the lane or
// distance, and lanes of a segment.
struct Call {
  Op op = Op::kExit;
  uint32_t mask = 0;
  uint64_t value = 0;
  unsigned bytes = 0;
  unsigned operand = 0;
  unsigned width = kWarpSize;

  bool is_block_barrier() const { return op == Op::kSyncthreads || op == Op::kSyncthreadsOr; }
  bool meets(const Call& other) const { return op == other.op && mask == other.mask && bytes == other.bytes; }

  unsigned source_lane(unsigned lane) const {
    const unsigned first = lane & ~(width - 1), last = first + width - 1, offset = operand % kWarpSize;
    switch (op) {
      case Op::kShfl:
        return first + offset % width;
      case Op::kShflXor:  // an earlier segment may be read, a later one not
        return (lane ^ offset) <= last ? lane ^ offset : lane;
      case Op::kShflUp:
        return lane >= first + offset ? lane - offset : lane;
      default:
        return lane + offset <= last ? lane + offset : lane;
    }
  }
};

struct Thread {
  Fibre fibre;
  uint3 index{};
  Call call;  // its latest; exit is the last
  uint64_t result = 0;
  bool slow = false;
};

struct Warp {
  uint32_t existing = 0, exited = 0, waiting = 0;  // bit = lane
};

// Kernels read these as threadIdx etc.
inline uint3 thread_index{}, block_index{};
inline dim3 block_shape, grid_shape;

class Scheduler {
 public:
  std::mt19937_64 random{1};
  uint64_t switches = 0;

  void run_grid(const dim3& grid, const dim3& block, size_t shared_bytes, const std::function<void()>& body);

  // Called by the running thread; returns its result once the collective is complete. All checks are made on the
  // other side of the switch, where an error can end the launch without unwinding through the kernel.
  uint64_t collective(const Call& call) {
    if (running_ == kNobody) throw Error(std::string(name_of(call.op)) + " is called outside a kernel");
    Thread& self = *threads_[running_];
    self.call = call;
    self.fibre.suspend();
    return self.result;
  }

  void* shared_memory() const { return shared_.get(); }

 private:
  static constexpr unsigned kNobody = ~0u;

  struct SharedDelete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{128}); }
  };

  struct Cleanup {
    Scheduler& scheduler;
    ~Cleanup() {
      scheduler.body_ = nullptr;
      scheduler.failure_ = nullptr;
      scheduler.running_ = kNobody;
      scheduler.shared_.reset();
    }
  };

  static void run_thread(void* self);
  static void check_launch(const dim3& grid, const dim3& block, size_t shared_bytes);
  void start_block(size_t shared_bytes);
  void run_block();
  void exit(unsigned rank);
  void arrive_block(unsigned rank);
  void arrive_warp(unsigned rank);
  void complete_warp(unsigned first_rank, uint32_t mask);
  [[noreturn]] void fail_deadlock() const;

  size_t below(size_t n) { return static_cast<size_t>((random() >> 32) * n >> 32); }  // n < 2^32

  static std::string describe(const uint3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  }
  static std::string describe(const Call& call) {
    if (call.is_block_barrier()) return name_of(call.op);
    char text[80];
    std::snprintf(text, sizeof text, "%s with mask 0x%08x", name_of(call.op), call.mask);
    return call.bytes == 0 ? text : text + (" of " + std::to_string(call.bytes) + " bytes");
  }
  std::string describe(unsigned rank) const { return "thread " + describe(threads_[rank]->index); }

  [[noreturn]] void fail(unsigned rank, const std::string& what) const {
    throw Error("block " + describe(block_index) + ", " + describe(rank) + ": " + what);
  }

  void release(unsigned rank, uint64_t result) {
    threads_[rank]->result = result;
    runnable_[threads_[rank]->slow].push_back(rank);
  }

  // A slow thread seldom goes on while a fast one can, so that some threads run several collectives ahead of others,
  // which they hardly ever would if all were drawn alike.
  unsigned take_runnable() {
    const bool slow = runnable_[0].empty() || (!runnable_[1].empty() && below(64) == 0);
    auto& candidates = runnable_[slow];
    std::swap(candidates[below(candidates.size())], candidates.back());
    const unsigned rank = candidates.back();
    candidates.pop_back();
    return rank;
  }

  std::vector<std::unique_ptr<Thread>> threads_;  // kept for their stacks; a block uses the first n_threads_
  std::vector<Warp> warps_;
  std::vector<unsigned> runnable_[2];
  std::unique_ptr<void, SharedDelete> shared_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
  unsigned running_ = kNobody, n_threads_ = 0, n_exited_ = 0, n_at_barrier_ = 0;
  unsigned last_exited_ = kNobody, last_at_barrier_ = kNobody;
};

inline void Scheduler::run_thread(void* self) {
  auto& scheduler = *static_cast<Scheduler*>(self);
  try {
    (*scheduler.body_)();
  } catch (...) {
    scheduler.failure_ = std::current_exception();
  }
  scheduler.threads_[scheduler.running_]->call.op = Op::kExit;
}

inline void Scheduler::check_launch(const dim3& grid, const dim3& block, size_t shared_bytes) {
  const auto check = [](bool valid, const std::string& what) {
    if (!valid) throw Error("launch: " + what);
  };
  const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
  check(block.x <= kMaxBlockThreads && block.y <= kMaxBlockThreads && block.z <= 64 && n_threads >= 1 &&
            n_threads <= kMaxBlockThreads,
        "block must have 1 to 1024 threads and z <= 64, got " + describe(uint3{block.x, block.y, block.z}));
  check(grid.x >= 1 && grid.x <= 0x7FFFFFFF && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535,
        "grid must be 1 to 2^31-1, 65535, 65535, got " + describe(uint3{grid.x, grid.y, grid.z}));
  check(shared_bytes <= kMaxSharedBytes, "shared memory must be at most " + std::to_string(kMaxSharedBytes) +
                                             " bytes, got " + std::to_string(shared_bytes));
}

inline void Scheduler::run_grid(const dim3& grid, const dim3& block, size_t shared_bytes,
                                const std::function<void()>& body) {
  if (body_ != nullptr) throw Error("launch: called inside a kernel");
  check_launch(grid, block, shared_bytes);
  const size_t n_blocks = size_t{grid.x} * grid.y * grid.z;
  if (n_blocks >> 32 != 0) throw Error("launch: grid has too many blocks to emulate, " + std::to_string(n_blocks));

  const Cleanup cleanup{*this};
  body_ = &body;
  grid_shape = grid;
  block_shape = block;
  n_threads_ = block.x * block.y * block.z;
  while (threads_.size() < n_threads_) threads_.push_back(std::make_unique<Thread>());

  std::vector<uint32_t> order(n_blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t left = n_blocks; left > 0; --left) {
    std::swap(order[left - 1], order[below(left)]);
    const uint32_t i = order[left - 1];
    block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    start_block(shared_bytes);
    run_block();
  }
}

inline void Scheduler::start_block(size_t shared_bytes) {
  shared_.reset(shared_bytes == 0 ? nullptr : ::operator new(shared_bytes, std::align_val_t{128}));
  if (shared_) std::memset(shared_.get(), 0xFF, shared_bytes);  // a NaN in every floating-point format

  warps_.assign((n_threads_ + kWarpSize - 1) / kWarpSize, Warp{});
  for (auto& candidates : runnable_) candidates.clear();
  n_exited_ = n_at_barrier_ = 0;
  last_exited_ = last_at_barrier_ = kNobody;

  const unsigned slow_granule = 1u << below(6);
  bool slow = false;
  for (unsigned rank = 0; rank < n_threads_; ++rank) {
    if (rank % slow_granule == 0) slow = below(2) == 0;
    Thread& thread = *threads_[rank];
    thread.index = {rank % block_shape.x, rank / block_shape.x % block_shape.y, rank / block_shape.x / block_shape.y};
    thread.call = Call{};
    thread.slow = slow;
    thread.fibre.start(run_thread, this);
    warps_[rank / kWarpSize].existing |= 1u << rank % kWarpSize;
    release(rank, 0);
  }
}

inline void Scheduler::run_block() {
  while (n_exited_ < n_threads_) {
    if (runnable_[0].empty() && runnable_[1].empty()) fail_deadlock();
    const unsigned rank = take_runnable();
    Thread& thread = *threads_[rank];
    thread_index = thread.index;
    running_ = rank;
    ++switches;
    thread.fibre.resume();
    running_ = kNobody;
    if (failure_) std::rethrow_exception(failure_);
    if (thread.call.op == Op::kExit) {
      exit(rank);
    } else if (thread.call.is_block_barrier()) {
      arrive_block(rank);
    } else {
      arrive_warp(rank);
    }
  }
}

inline void Scheduler::exit(unsigned rank) {
  const unsigned lane = rank % kWarpSize;
  Warp& warp = warps_[rank / kWarpSize];
  warp.exited |= 1u << lane;
  ++n_exited_;
  last_exited_ = rank;
  for (uint32_t left = warp.waiting; left != 0; left &= left - 1) {
    const unsigned waiting = rank - lane + std::countr_zero(left);
    const Call& call = threads_[waiting]->call;
    if (call.mask >> lane & 1) fail(waiting, "waits at " + describe(call) + " for " + describe(rank) + ", which exits");
  }
  if (n_at_barrier_ > 0) {
    fail(last_at_barrier_, std::string("waits at ") + name_of(threads_[last_at_barrier_]->call.op) + ", but " +
                               describe(rank) + " exits (divergent barrier)");
  }
}

inline void Scheduler::arrive_block(unsigned rank) {
  const Op op = threads_[rank]->call.op;
  const auto diverges = [&](unsigned other, const std::string& what) {
    fail(rank, std::string("arrives at ") + name_of(op) + ", but " + describe(other) + what + " (divergent barrier)");
  };
  if (n_exited_ > 0) diverges(last_exited_, " has exited");
  if (n_at_barrier_ > 0 && threads_[last_at_barrier_]->call.op != op) {
    diverges(last_at_barrier_, std::string(" waits at ") + name_of(threads_[last_at_barrier_]->call.op));
  }
  last_at_barrier_ = rank;
  if (++n_at_barrier_ < n_threads_) return;

  bool any = false;
  for (unsigned i = 0; i < n_threads_; ++i) any |= threads_[i]->call.value != 0;
  for (unsigned i = 0; i < n_threads_; ++i) release(i, any);
  n_at_barrier_ = 0;
}

inline void Scheduler::arrive_warp(unsigned rank) {
  const Call& call = threads_[rank]->call;
  const unsigned lane = rank % kWarpSize, first_rank = rank - lane;
  Warp& warp = warps_[rank / kWarpSize];
  const auto lane_name = [](uint32_t mask) { return "lane " + std::to_string(std::countr_zero(mask)); };
  if ((call.mask >> lane & 1) == 0) {
    fail(rank, "calls " + describe(call) + ", which leaves out its own " + lane_name(1u << lane));
  }
  if (const uint32_t absent = call.mask & ~warp.existing) {
    fail(rank, "calls " + describe(call) + ", which names " + lane_name(absent) + " that does not exist");
  }
  if (const uint32_t exited = call.mask & warp.exited) {
    fail(rank, "calls " + describe(call) + ", which names " + lane_name(exited) + " that has exited");
  }
  if (!std::has_single_bit(call.width) || call.width > kWarpSize) {
    fail(rank, "calls " + describe(call) + "; width must be a power of two up to 32, got " +
                   std::to_string(static_cast<int>(call.width)));
  }
  warp.waiting |= 1u << lane;
  if ((warp.waiting & call.mask) != call.mask) return;
  for (uint32_t left = call.mask; left != 0; left &= left - 1) {
    if (!threads_[first_rank + std::countr_zero(left)]->call.meets(call)) return;
  }
  complete_warp(first_rank, call.mask);
}

inline void Scheduler::complete_warp(unsigned first_rank, uint32_t mask) {
  const Call& first = threads_[first_rank + std::countr_zero(mask)]->call;
  const Op op = first.op;
  const bool is_shuffle = first.bytes != 0;
  uint32_t ballot = 0;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const unsigned lane = std::countr_zero(left);
    if (threads_[first_rank + lane]->call.value != 0) ballot |= 1u << lane;
  }
  const uint64_t vote = op == Op::kBallot ? ballot : op == Op::kAny ? ballot != 0 : ballot == mask;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const unsigned lane = std::countr_zero(left), rank = first_rank + lane;
    uint64_t result = vote;
    if (is_shuffle) {
      const Call& call = threads_[rank]->call;
      const unsigned source = call.source_lane(lane);
      if ((mask >> source & 1) == 0) {
        fail(rank, "reads lane " + std::to_string(source) + " by " + describe(call) + ", which leaves that lane out");
      }
      result = threads_[first_rank + source]->call.value;
    }
    release(rank, result);
  }
  warps_[first_rank / kWarpSize].waiting &= ~mask;
}

// When nothing is runnable, some warp waits: a full block barrier completes, and one short of an exited thread fails.
inline void Scheduler::fail_deadlock() const {
  for (unsigned rank = 0; rank < n_threads_; ++rank) {
    const Call& call = threads_[rank]->call;
    if (call.op == Op::kExit || call.is_block_barrier()) continue;
    for (uint32_t left = call.mask; left != 0; left &= left - 1) {
      const unsigned other = rank / kWarpSize * kWarpSize + std::countr_zero(left);
      const Call& theirs = threads_[other]->call;
      if (theirs.meets(call)) continue;
      fail(rank, "deadlock: waits at " + describe(call) + " for " + describe(other) + ", which waits at " +
                     describe(theirs) + (theirs.is_block_barrier() ? " (divergent barrier)" : ""));
    }
  }
  throw Error("block " + describe(block_index) + ": deadlock");
}

inline Scheduler scheduler;

}  // namespace detail
}  // namespace emulator
