// The emulator itself: results of collectives, that missing barriers show, and that every misuse is reported.
#include "emulator.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int checks = 0;

void expect(bool condition, const char* what, int line) {
  ++checks;
  if (condition) return;
  std::fprintf(stderr, "%s:%d: %s\n", __FILE__, line, what);
  std::exit(1);
}
#define EXPECT(...) expect((__VA_ARGS__), #__VA_ARGS__, __LINE__)

using emulator::launch;

constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kSeeds = 20;

// Sums over a block of any size; the last warp may be partial.
__global__ void __launch_bounds__(1024) block_sum(const float* __restrict__ in, double* __restrict__ out) {
  auto* partial = static_cast<double*>(emulator::shared_memory());
  const unsigned left = blockDim.x - threadIdx.x / warpSize * warpSize;
  const unsigned mask = left >= 32 ? kAllLanes : (1u << left) - 1;
  double sum = __ldg(in + blockIdx.x * blockDim.x + threadIdx.x);
  for (int step = 16; step > 0; step /= 2) {
    const unsigned lane = threadIdx.x % 32, source = lane + step;
    const bool exists = source < 32 && mask >> source & 1;
    const double other = __shfl_sync(mask, sum, static_cast<int>(exists ? source : lane));
    if (exists) sum += other;
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < (blockDim.x + 31) / 32; ++warp) sum += partial[warp];
    out[blockIdx.x] = sum;
  }
}

void test_block_sum() {
  const unsigned n_blocks = 3;
  for (const unsigned size : {1, 31, 32, 40, 100, 256, 1024}) {
    std::vector<float> in(n_blocks * size);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 97);
    for (int seed = 0; seed < 3; ++seed) {
      emulator::seed(seed);
      std::vector<double> out(n_blocks, -1);
      launch(n_blocks, size, (size + 31) / 32 * sizeof(double), block_sum, in.data(), out.data());
      for (unsigned block = 0; block < n_blocks; ++block) {
        double sum = 0;
        for (unsigned i = 0; i < size; ++i) sum += in[block * size + i];
        EXPECT(out[block] == sum);
      }
    }
  }
}

bool equal(const uint3& a, const uint3& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

__global__ void record_indices(int* count, bool* same) {
  const uint3 thread = threadIdx, block = blockIdx;
  __syncthreads();
  const unsigned rank = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block_rank = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  ++count[block_rank * blockDim.x * blockDim.y * blockDim.z + rank];
  *same &= equal(thread, threadIdx) && equal(block, blockIdx) && blockDim.z == 5 && gridDim.z == 4;
}

void test_indices() {
  std::vector<int> count(2 * 3 * 4 * 4 * 2 * 5, 0);
  bool same = true;
  launch(dim3(2, 3, 4), dim3(4, 2, 5), 0, record_indices, count.data(), &same);
  EXPECT(same && count == std::vector<int>(count.size(), 1));
}

__global__ void record_order(std::vector<unsigned>* order) {
  __syncthreads();
  order->push_back(blockIdx.x * blockDim.x + threadIdx.x);
}

void test_order() {
  const auto order_of = [](uint64_t seed) {
    std::vector<unsigned> order;
    emulator::seed(seed);
    launch(8, 40, 0, record_order, &order);
    return order;
  };
  EXPECT(order_of(7) == order_of(7));
  EXPECT(order_of(7) != order_of(8));
  bool forwards = false, backwards = false;
  for (int seed = 0; seed < kSeeds; ++seed) {
    const auto order = order_of(seed);
    (order.front() / 40 < order.back() / 40 ? forwards : backwards) = true;
  }
  EXPECT(forwards && backwards);
  const uint64_t before = emulator::switches();
  EXPECT(order_of(1).size() == 8 * 40 && emulator::switches() - before == 2 * 8 * 40);
}

// Rotates `in` through shared memory, within the block or within each warp; each barrier can be left out.
template <bool kInWarp, bool kAfterWrite, bool kAfterRead>
__global__ void rotate(const int* in, int* out, int rounds) {
  const unsigned size = kInWarp ? 32 : blockDim.x, i = threadIdx.x % size;
  int* shared = static_cast<int*>(emulator::shared_memory()) + (threadIdx.x - i);
  const auto barrier = [](bool present) {
    if (present) kInWarp ? __syncwarp() : __syncthreads();
  };
  int value = in[threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    shared[i] = value;
    barrier(kAfterWrite);
    value = shared[(i + 1) % size];
    barrier(kAfterRead);
  }
  out[threadIdx.x] = value;
}

// A warp that does much work before it reads what the other wrote after little, with no barrier between.
__global__ void read_late(int* out) {
  int* shared = static_cast<int*>(emulator::shared_memory());
  for (int i = 0; i < (threadIdx.x < 32 ? 2 : 40); ++i) __syncwarp();
  if (threadIdx.x == 0) shared[0] = 1;
  if (threadIdx.x == 32) out[0] = shared[0];
}

void test_missing_barriers() {
  constexpr int kSize = 64, kRounds = 4;
  std::vector<int> in(kSize);
  for (int i = 0; i < kSize; ++i) in[i] = i;
  const auto wrong_seeds = [&](auto* kernel, int segment) {
    int wrong = 0;
    for (int seed = 0; seed < kSeeds; ++seed) {
      emulator::seed(seed);
      std::vector<int> out(kSize, -1);
      launch(1, kSize, kSize * sizeof(int), kernel, in.data(), out.data(), kRounds);
      bool right = true;
      for (int i = 0; i < kSize; ++i) right &= out[i] == i / segment * segment + (i + kRounds) % segment;
      wrong += !right;
    }
    return wrong;
  };
  EXPECT(wrong_seeds(rotate<false, true, true>, kSize) == 0 && wrong_seeds(rotate<true, true, true>, 32) == 0);
  EXPECT(wrong_seeds(rotate<false, false, true>, kSize) > 0 && wrong_seeds(rotate<false, true, false>, kSize) > 0);
  EXPECT(wrong_seeds(rotate<true, false, true>, 32) > 0 && wrong_seeds(rotate<true, true, false>, 32) > 0);
  int late = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::seed(seed);
    int out = 0;
    launch(1, 64, sizeof(int), read_late, &out);
    late += out != 1;
  }
  EXPECT(late > 0 && late < kSeeds);
}

template <class T>
__global__ void shuffle_all(T* out, int operand, int width) {
  const T value = static_cast<T>(threadIdx.x) + static_cast<T>(100);
  out[threadIdx.x] = __shfl_sync(kAllLanes, value, operand, width);
  out[threadIdx.x + 32] = __shfl_xor_sync(kAllLanes, value, operand, width);
  out[threadIdx.x + 64] = __shfl_up_sync(kAllLanes, value, operand, width);
  out[threadIdx.x + 96] = __shfl_down_sync(kAllLanes, value, operand, width);
}

template <class T>
void test_shuffles() {
  for (int width = 1; width <= 32; width *= 2) {
    for (int operand = 0; operand < 32; ++operand) {
      std::vector<T> out(128);
      launch(1, 32, 0, shuffle_all<T>, out.data(), operand, width);
      for (int lane = 0; lane < 32; ++lane) {
        const int first = lane / width * width, flipped = lane ^ operand;
        const auto in_segment = [&](int other) { return other >= first && other < first + width ? other : lane; };
        EXPECT(out[lane] == static_cast<T>(100 + first + operand % width));
        EXPECT(out[lane + 32] == static_cast<T>(100 + (flipped < first + width ? flipped : lane)));
        EXPECT(out[lane + 64] == static_cast<T>(100 + in_segment(lane - operand)));
        EXPECT(out[lane + 96] == static_cast<T>(100 + in_segment(lane + operand)));
      }
    }
  }
}

// The halves of a warp go different numbers of rounds, each within its own mask.
__global__ void vote(unsigned* out) {
  const bool low = threadIdx.x < 16;
  const unsigned mask = low ? 0x0000FFFF : 0xFFFF0000;
  unsigned ballot = 0;
  for (int i = 0; i < (low ? 3 : 5); ++i) ballot += __ballot_sync(mask, threadIdx.x % 3 == 0);
  out[threadIdx.x] = ballot;
  out[threadIdx.x + 32] = __any_sync(mask, threadIdx.x == 20);
  out[threadIdx.x + 64] = __all_sync(mask, threadIdx.x >= 16);
  out[threadIdx.x + 96] = __syncthreads_or(threadIdx.x == 9);
  out[threadIdx.x + 128] = __syncthreads_or(0);
}

void test_votes() {
  std::vector<unsigned> out(160);
  launch(1, 32, 0, vote, out.data());
  for (unsigned lane = 0; lane < 32; ++lane) {
    EXPECT(out[lane] == (lane < 16 ? 3 * (0x49249249u & 0xFFFF) : 5 * (0x49249249u & 0xFFFF0000)));
    EXPECT(out[lane + 32] == (lane >= 16) && out[lane + 64] == (lane >= 16));
    EXPECT(out[lane + 96] != 0 && out[lane + 128] == 0);
  }
}

__global__ void check_poison(size_t bytes, int* clean) {
  auto* shared = static_cast<unsigned char*>(emulator::shared_memory());
  bool poisoned = reinterpret_cast<uintptr_t>(shared) % 128 == 0;
  for (size_t i = 0; i < bytes; ++i) poisoned &= shared[i] == 0xFF;
  std::memset(shared, 0, bytes);
  *clean += poisoned;
}

__global__ void add_atomically(float* f, double* d, int* i, unsigned* u, std::vector<bool>* seen) {
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(u, 3u);
  seen->at(atomicAdd(i, 1)) = true;
}

void test_memory() {
  int clean = 0;
  launch(5, 1, 1001, check_poison, 1001, &clean);
  EXPECT(clean == 5 && emulator::shared_memory() == nullptr);
  float f = 0;
  double d = 0;
  int i = 0, largest = 2147483647;
  unsigned u = 0;
  std::vector<bool> seen(3 * 50, false);
  launch(3, 50, 0, add_atomically, &f, &d, &i, &u, &seen);
  EXPECT(f == 75 && d == 37.5 && i == 150 && u == 450 && seen == std::vector<bool>(150, true));
  EXPECT(atomicAdd(&largest, 1) == 2147483647 && largest == -2147483647 - 1);
}

void test_intrinsics() {
  EXPECT(__popc(0xF0F0u) == 8 && __popcll(~0ull) == 64);
  EXPECT(__ffs(0) == 0 && __ffs(8) == 4 && __ffs(-2147483647 - 1) == 32 && __clz(0) == 32 && __clz(1) == 31);
  EXPECT(__umulhi(0xFFFFFFFF, 0xFFFFFFFF) == 0xFFFFFFFE && __umul64hi(~0ull, ~0ull) == ~0ull - 1);
  EXPECT(__float_as_uint(1.0f) == 0x3F800000 && __uint_as_float(0xC0000000) == -2.0f);
  EXPECT(min(-1, 2) == -1 && max(1u, 0xFFFFFFFFu) == 0xFFFFFFFF && max(int64_t{1} << 40, int64_t{5}) >> 40 == 1);
  EXPECT(max(NAN, 1.0f) == 1.0f && min(2.0, static_cast<double>(NAN)) == 2.0);
  static_assert(alignof(float2) == 8 && alignof(uint2) == 8 && alignof(double2) == 16 && alignof(longlong2) == 16);
  static_assert(alignof(float4) == 16 && alignof(uint4) == 16 && alignof(int4) == 16 && sizeof(longlong2) == 16);
  struct __align__(32) Wide {};
  static_assert(alignof(Wide) == 32);
  EXPECT(make_float4(1, 2, 3, 4).w == 4 && make_double2(1, 2).y == 2 && make_longlong2(1, -2).y == -2);
}

// The message of what the launch throws, or "" if nothing; whichever it is, the next launch must work.
std::string error_of(dim3 block, const std::function<void()>& kernel) {
  std::string message;
  try {
    launch(2, block, 64, [&] {
      if (blockIdx.x == 1) kernel();
    });
  } catch (const emulator::Error& error) {
    message = error.what();
  }
  std::vector<float> in(64, 1.0f);
  double sum = 0;
  launch(1, 64, 16, block_sum, in.data(), &sum);
  EXPECT(sum == 64);
  return message;
}

// Some seed must give an error with all the parts; every seed must give an error.
void expect_error(dim3 block, const std::function<void()>& kernel, std::initializer_list<const char*> parts, int line) {
  bool found = false;
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::seed(seed);
    const std::string message = error_of(block, kernel);
    expect(message.starts_with("block (1,0,0), thread ("), message.c_str(), line);
    bool all = true;
    for (const char* part : parts) all &= message.find(part) != std::string::npos;
    found |= all;
  }
  expect(found, *parts.begin(), line);
}
#define EXPECT_ERROR(block, kernel, ...) expect_error(block, kernel, {__VA_ARGS__}, __LINE__)

void test_warp_errors() {
  const auto outside_mask = [] { threadIdx.x == 5 ? __syncwarp(0xF) : void(); };
  EXPECT_ERROR(32, outside_mask,
               "thread (5,0,0): calls __syncwarp with mask 0x0000000f, which leaves out its own lane");
  EXPECT_ERROR(20, [] { __syncwarp(); }, "names lane 20 that does not exist");
  EXPECT_ERROR(40, [] { __ballot_sync(kAllLanes, 1); }, "calls __ballot_sync", "names lane 8 that does not exist");
  const auto lane_3_leaves = [] { threadIdx.x != 3 ? __shfl_xor_sync(0xF, 1.0f, 1) : 0; };
  EXPECT_ERROR(4, lane_3_leaves, "calls __shfl_xor_sync with mask 0x0000000f of 4 bytes, which names lane 3 that has");
  EXPECT_ERROR(4, lane_3_leaves, "waits at __shfl_xor_sync", "for thread (3,0,0), which exits");
  EXPECT_ERROR(
      32, [] { threadIdx.x < 16 ? __syncwarp() : void(__any_sync(kAllLanes, 1)); },
      "deadlock: waits at __syncwarp with mask 0xffffffff for thread (16,0,0), which waits at __any_sync with");
  EXPECT_ERROR(3, [] { __syncwarp(threadIdx.x == 1 ? 3 : 7); }, "deadlock", "mask 0x00000007", "mask 0x00000003");
  EXPECT_ERROR(2, [] { threadIdx.x == 0 ? __shfl_sync(3, 1, 0) : __shfl_sync(3, 1.0, 0); }, "deadlock", "of 8 bytes");
  EXPECT_ERROR(2, [] { __shfl_sync(3, 1, threadIdx.x == 0 ? 2 : 0); }, "thread (0,0,0): reads lane 2 by __shfl_sync");
  EXPECT_ERROR(32, [] { __shfl_sync(kAllLanes, 1, 0, 24); }, "width must be a power of two up to 32, got 24");
}

void test_block_errors() {
  const auto one_leaves = [] { threadIdx.y != 1 ? __syncthreads() : void(); };
  EXPECT_ERROR(dim3(1, 3), one_leaves, "waits at __syncthreads, but thread (0,1,0) exits (divergent barrier)");
  EXPECT_ERROR(dim3(1, 3), one_leaves, "arrives at __syncthreads, but thread (0,1,0) has exited (divergent barrier)");
  const auto other_kind = [] { threadIdx.x < 16 ? __syncthreads() : __syncwarp(); };
  EXPECT_ERROR(32, other_kind, "waits at __syncwarp with mask", "which waits at __syncthreads (divergent barrier)");
  const auto mixed = [] { threadIdx.x < 32 ? __syncthreads() : void(__syncthreads_or(1)); };
  EXPECT_ERROR(64, mixed, "arrives at __syncthreads, but", " waits at __syncthreads_or (divergent barrier)");
}

template <class Exception, class F>
bool throws(const F& f, const std::string& message) {
  try {
    f();
  } catch (const Exception& error) {
    return std::string(error.what()).find(message) != std::string::npos;
  }
  return false;
}

void test_exceptions() {
  const auto kernel = [] {
    try {
      if (threadIdx.x % 2 == 0) throw std::logic_error("caught inside");
    } catch (const std::logic_error&) {
    }
    __syncthreads();
    if (threadIdx.x == 33) throw std::domain_error("from thread 33");
    __syncthreads();
  };
  for (int i = 0; i < 3; ++i) EXPECT(throws<std::domain_error>([&] { launch(2, 64, 16, kernel); }, "from thread 33"));
  EXPECT(error_of(32, [] { launch(1, 1, 0, [] {}); }) == "launch: called inside a kernel");
  EXPECT(throws<emulator::Error>([] { __syncthreads(); }, "__syncthreads is called outside a kernel"));
  const auto refuses = [](dim3 grid, dim3 block, size_t bytes, const char* message) {
    return throws<emulator::Error>([&] { launch(grid, block, bytes, [] {}); }, message);
  };
  EXPECT(refuses(1, 1025, 0, "got (1025,1,1)") && refuses(1, dim3(64, 32), 0, "block") && refuses(1, 0, 0, "block"));
  EXPECT(refuses(0, 1, 0, "grid must") && refuses(dim3(1, 65536), 1, 0, "grid must"));
  EXPECT(refuses(1, 1, (227 << 10) + 1, "shared memory must"));
}

template <class F>
bool crashes(const F& f) {
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

__noinline__ int descend(int depth) {
  volatile char frame[1024];
  frame[0] = static_cast<char>(depth);
  return depth == 0 ? frame[0] : descend(depth - 1) + frame[0];
}

void test_overruns() {
  EXPECT(!crashes([] { launch(1, 2, 0, [] { descend(40); }); }));
  EXPECT(crashes([] { launch(1, 2, 0, [] { descend(4000); }); }));
  const auto write = [](size_t i) { static_cast<volatile char*>(emulator::shared_memory())[i] = 1; };
  EXPECT(crashes([&] { launch(1, 1, 0, write, 0); }));
#if defined(EMULATOR_ASAN)
  EXPECT(!crashes([&] { launch(1, 1, 13, write, 12); }) && crashes([&] { launch(1, 1, 13, write, 13); }));
#endif
}

}  // namespace

int main() {
  test_block_sum();
  test_indices();
  test_order();
  test_missing_barriers();
  test_shuffles<int>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<int64_t>();
  test_votes();
  test_memory();
  test_intrinsics();
  test_warp_errors();
  test_block_errors();
  test_exceptions();
  test_overruns();
  std::printf("%d checks of the emulator\n", checks);
}
