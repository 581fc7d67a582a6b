// Reads whole rows of a table at given ids, in the order given, as fast as it can: the speed limit of any kernel that
// needs these rows. All words read are combined into one so that no read can be left out.

#pragma once

#include <numeric>

#include "measure.cuh"

constexpr uint32_t kAllLanes = 0xffffffff;

// Volatile: a plain load could be hoisted out of a loop that reads the same bytes again.
__device__ __forceinline__ uint4 load(const uint4* from) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

__device__ __forceinline__ uint2 load(const uint2* from) {
  uint2 words;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
  return words;
}

__device__ __forceinline__ uint32_t combined(uint4 words) { return words.x ^ words.y ^ words.z ^ words.w; }
__device__ __forceinline__ uint32_t combined(uint2 words) { return words.x ^ words.y; }

// Hardly ever true, which the compiler cannot know.
__device__ __forceinline__ void keep(uint32_t word, uint32_t* sink) {
  if (word == 0x9e3779b9) *sink = word;
}

__device__ __forceinline__ uint64_t mixed(uint64_t x) {  // splitmix64
  x = (x + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

static __global__ void draw_uniform(uint32_t* ids, int64_t count, uint32_t bound) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    ids[i] = __umulhi(static_cast<uint32_t>(mixed(i) >> 32), bound);
  }
}

// cumulative[r] is the mass of ids 0 to r.
static __global__ void draw_from(uint32_t* ids, int64_t count, const double* cumulative, uint32_t bound) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const double target = static_cast<double>(mixed(i) >> 11) * 0x1p-53 * cumulative[bound - 1];
    uint32_t low = 0, high = bound - 1;
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (cumulative[middle] > target) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    ids[i] = low;
  }
}

constexpr int kRowThreads = 128;

// Blocks of kRowThreads that fit on a multiprocessor when each thread holds that many loaded bytes. Left to itself, the
// compiler saves registers by waiting for the first loads before it issues the last.
constexpr int blocks(int loaded_bytes) { return 65536 / kRowThreads / (loaded_bytes / 4 + 32); }

// How a warp reads rows: kLanes lanes share a row, and kRows rows of each such group of lanes are in flight.
template <typename VectorType, int kRowBytesValue, int kLanesValue, int kLoadsAtMost>
struct RowShape {
  using Vector = VectorType;
  static constexpr int kSize = sizeof(Vector);
  static constexpr int kRowBytes = kRowBytesValue;
  static constexpr int kLanes = kLanesValue;
  // A row that starts between two aligned vectors is read from the lower one on; kVectors suffices for any start.
  static constexpr int kMostBefore = kSize - std::gcd(kRowBytes, kSize);
  static constexpr int kVectors = (kMostBefore + kRowBytes + kSize - 1) / kSize;
  static constexpr int kSteps = (kVectors + kLanes - 1) / kLanes;

  static constexpr int rows(int loads) {
    int rows = 1;
    while (2 * rows * kSteps <= loads) rows *= 2;
    return rows;
  }
  static constexpr int kRows = rows(kLoadsAtMost);
  static constexpr int kGroups = 32 / kLanes;
  static constexpr int kBatch = kRows * kGroups;  // rows of a warp in flight
  static constexpr int kBlocks = blocks(kRows * kSteps * kSize);
};

template <typename Shape>
__global__ __launch_bounds__(kRowThreads, Shape::kBlocks) void sum_random_rows(const char* table, const uint32_t* ids,
                                                                               int64_t batches, uint32_t* sink) {
  using Vector = typename Shape::Vector;
  constexpr int kIds = Shape::kBatch > 32 ? Shape::kBatch / 32 : 1;  // that a lane holds
  const int lane = threadIdx.x % 32;
  const int group = lane / Shape::kLanes;
  const int first = lane % Shape::kLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kRowThreads / 32);

  uint32_t later[kIds];
  const auto load_ids = [&](int64_t batch) {
#pragma unroll
    for (int i = 0; i < kIds; ++i) later[i] = __ldg(ids + batch * Shape::kBatch + i * 32 + lane % Shape::kBatch);
  };

  int64_t batch = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (batch < batches) load_ids(batch);
  uint32_t sum = 0;
#pragma unroll 1
  while (batch < batches) {
    uint32_t current[kIds];
#pragma unroll
    for (int i = 0; i < kIds; ++i) current[i] = later[i];
    batch += warps;
    if (batch < batches) load_ids(batch);  // ahead: rows would wait for their ids

    Vector loaded[Shape::kRows][Shape::kSteps];
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r) {
      const int at = r * Shape::kGroups;
      const uint32_t id = __shfl_sync(kAllLanes, current[at / 32], at % 32 + group);
      const char* row = table + static_cast<uint64_t>(id) * Shape::kRowBytes;
      if constexpr (Shape::kMostBefore > 0) {
        row = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(row) & ~uintptr_t{Shape::kSize - 1});
      }
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        // Lanes past the end repeat the last vector, which costs no traffic.
        const int vector = (step + 1) * Shape::kLanes <= Shape::kVectors
                               ? step * Shape::kLanes + first
                               : min(step * Shape::kLanes + first, Shape::kVectors - 1);
        loaded[r][step] = load(reinterpret_cast<const Vector*>(row) + vector);
      }
    }
    // The last first, so that all are on their way before the first wait.
#pragma unroll
    for (int r = Shape::kRows - 1; r >= 0; --r) {
#pragma unroll
      for (int step = Shape::kSteps - 1; step >= 0; --step) sum ^= combined(loaded[r][step]);
    }
  }
  keep(sum, sink);
}

struct Rows {
  const char* table;
  const uint32_t* ids;
  int64_t count;  // of ids; a multiple of every Shape::kBatch
  uint32_t* sink;
};

template <typename Shape>
void add_row_candidates(Bench& bench, const Rows& rows, std::vector<Candidate>& candidates) {
  const int64_t batches = rows.count / Shape::kBatch;
  const int64_t resident = bench.resident_blocks(sum_random_rows<Shape>, kRowThreads);
  // One wave is a persistent grid; with several, the hardware evens out multiprocessors that are slower.
  for (int64_t waves : {1, 8}) {
    const auto grid =
        static_cast<unsigned>(std::min(waves * resident, (batches + kRowThreads / 32 - 1) / (kRowThreads / 32)));
    const std::string params = format(
        "\"vector_bytes\": %d, \"lanes_per_row\": %d, \"loads_in_flight\": %d, \"rows_in_flight\": %d, "
        "\"waves\": %d",
        Shape::kSize, Shape::kLanes, Shape::kRows * Shape::kSteps, Shape::kBatch, static_cast<int>(waves));
    candidates.push_back({params, [&bench, rows, batches, grid] {
                            CHECK((sum_random_rows<Shape>
                                   <<<grid, kRowThreads, 0, bench.stream>>>(rows.table, rows.ids, batches, rows.sink),
                                   cudaGetLastError()));
                          }});
  }
}

template <typename Vector, int kRowBytes, int kLanes>
void add_row_candidates(Bench& bench, const Rows& rows, std::vector<Candidate>& candidates) {
  using Few = RowShape<Vector, kRowBytes, kLanes, 4>;
  using Some = RowShape<Vector, kRowBytes, kLanes, 8>;
  using Many = RowShape<Vector, kRowBytes, kLanes, 16>;
  add_row_candidates<Few>(bench, rows, candidates);
  if constexpr (Some::kRows > Few::kRows) add_row_candidates<Some>(bench, rows, candidates);
  if constexpr (Many::kRows > Some::kRows) add_row_candidates<Many>(bench, rows, candidates);
}

template <int kRowBytes>
std::vector<Candidate> row_candidates(Bench& bench, const Rows& rows) {
  std::vector<Candidate> candidates;
  if constexpr (kRowBytes < 512 && kRowBytes % 64 == 0) {
    add_row_candidates<uint4, kRowBytes, kRowBytes / 16>(bench, rows, candidates);
  } else {
    add_row_candidates<uint4, kRowBytes, 32>(bench, rows, candidates);
    if constexpr (kRowBytes <= 1200) add_row_candidates<uint4, kRowBytes, 16>(bench, rows, candidates);
    if constexpr (kRowBytes % 64 != 0) add_row_candidates<uint4, kRowBytes, 8>(bench, rows, candidates);
    if constexpr (kRowBytes % 16 != 0) add_row_candidates<uint2, kRowBytes, 32>(bench, rows, candidates);
  }
  return candidates;
}
