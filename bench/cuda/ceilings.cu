// The most that this GPU does of what sampled losses consist of. Prints one JSON object a line.

#include <cmath>
#include <cstring>
#include <cub/device/device_radix_sort.cuh>

#include "random_rows.cuh"

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kGiB = int64_t{1} << 30;
constexpr int kThreads = 256;

__global__ void fill(uint4* to, int64_t vectors) {
  const auto word = [](uint64_t bits) { return 0x3f800000 | static_cast<uint32_t>(bits >> 41); };  // a float in [1, 2)
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += stride) {
    const uint64_t a = mixed(2 * i), b = mixed(2 * i + 1);
    to[i] = make_uint4(word(a), word(a << 32), word(b), word(b << 32));
  }
}

template <int kLoads>
constexpr int64_t kTileBytes = int64_t{16} * kLoads * kThreads;

template <int kLoads>
__global__ __launch_bounds__(kThreads, blocks(16 * kLoads) / 2) void copy(const uint4* from, uint4* to,
                                                                          uint32_t tiles) {
#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = static_cast<int64_t>(tile) * (kLoads * kThreads) + threadIdx.x;
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = load(from + first + i * kThreads);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) to[first + i * kThreads] = loaded[i];
  }
}

// Each pass shifts the tiles by one, lest a multiprocessor finds its tiles of the last pass in its own cache.
template <int kLoads>
__global__ __launch_bounds__(kThreads, blocks(16 * kLoads) / 2) void read(const uint4* from, uint32_t tiles,
                                                                          uint32_t passes, uint32_t* sink) {
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t i = blockIdx.x; i < tiles * passes; i += gridDim.x) {
    const uint32_t tile = (i + i / tiles) % tiles;
    const int64_t first = static_cast<int64_t>(tile) * (kLoads * kThreads) + threadIdx.x;
    uint4 loaded[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) loaded[j] = load(from + first + j * kThreads);
#pragma unroll
    for (int j = kLoads - 1; j >= 0; --j) sum ^= combined(loaded[j]);
  }
  keep(sum, sink);
}

constexpr int kAddedFloats = 128;  // in a row

// Each warp adds to 32 rows, whole rows at a time.
template <bool kVectors>
__global__ __launch_bounds__(kThreads) void add_to_rows(float* table, const uint32_t* ids) {
  const int lane = threadIdx.x % 32;
  const uint32_t id = ids[static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x];
  const float value = 1e-3f * static_cast<float>(lane + 1);
#pragma unroll 4
  for (int i = 0; i < 32; ++i) {
    float* row = table + static_cast<uint64_t>(__shfl_sync(kAllLanes, id, i)) * kAddedFloats;
    if constexpr (kVectors) {
#if __CUDA_ARCH__ >= 900
      asm volatile("red.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(row + 4 * lane), "f"(value) : "memory");
#else
      __trap();  // the host does not launch it
#endif
    } else {
#pragma unroll
      for (int column = 0; column < kAddedFloats; column += 32) {
        asm volatile("red.global.add.f32 [%0], %1;" ::"l"(row + column + lane), "f"(value) : "memory");
      }
    }
  }
}

__global__ void empty() {}

struct Memory {
  explicit Memory(Bench& bench) : bytes(bytes_of_arena()), arena(bytes), ids(kIds), sink(1) {
    CHECK(
        (fill<<<4096, 256, 0, bench.stream>>>(reinterpret_cast<uint4*>(arena.get()), bytes / 16), cudaGetLastError()));
    bench.synchronise();
  }

  static int64_t bytes_of_arena() {
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    return std::min(8 * kGiB, static_cast<int64_t>(free) / 2 / kMiB * kMiB);
  }

  static constexpr int64_t kIds = 4 * kGiB / 64;
  int64_t bytes;
  Buffer<char> arena;
  Buffer<uint32_t> ids;
  Buffer<uint32_t> sink;
};

constexpr int64_t kWaves[] = {1, 8, 64};

template <int kLoads>
void add_copies(Bench& bench, const Memory& memory, int64_t bytes, std::vector<Candidate>& candidates) {
  const auto* from = reinterpret_cast<const uint4*>(memory.arena.get());
  auto* to = reinterpret_cast<uint4*>(memory.arena.get() + memory.bytes / 2);
  const auto tiles = static_cast<uint32_t>(bytes / kTileBytes<kLoads>);
  for (int64_t waves : kWaves) {
    const int64_t resident = bench.resident_blocks(copy<kLoads>, kThreads);
    const auto grid = static_cast<uint32_t>(std::min<int64_t>(tiles, waves * resident));
    candidates.push_back(
        {format("\"loads_in_flight\": %d, \"waves\": %d", kLoads, static_cast<int>(waves)), [=, &bench] {
           CHECK((copy<kLoads><<<grid, kThreads, 0, bench.stream>>>(from, to, tiles), cudaGetLastError()));
         }});
  }
}

template <int kLoads>
void add_reads(Bench& bench, const Memory& memory, int64_t bytes, uint32_t passes, std::vector<Candidate>& candidates) {
  const auto* from = reinterpret_cast<const uint4*>(memory.arena.get());
  const auto tiles = static_cast<uint32_t>(bytes / kTileBytes<kLoads>);
  uint32_t* sink = memory.sink.get();
  for (int64_t waves : kWaves) {
    const int64_t resident = bench.resident_blocks(read<kLoads>, kThreads);
    const auto grid = static_cast<uint32_t>(std::min(int64_t{tiles} * passes, waves * resident));
    candidates.push_back(
        {format("\"loads_in_flight\": %d, \"waves\": %d", kLoads, static_cast<int>(waves)), [=, &bench] {
           CHECK((read<kLoads><<<grid, kThreads, 0, bench.stream>>>(from, tiles, passes, sink), cudaGetLastError()));
         }});
  }
}

void measure_copy(Bench& bench, const Memory& memory) {
  const int64_t bytes = std::min(2 * kGiB, memory.bytes / 2);
  const std::string size = format("\"bytes\": %lld, ", static_cast<long long>(bytes));
  std::vector<Candidate> candidates;
  add_copies<4>(bench, memory, bytes, candidates);
  add_copies<8>(bench, memory, bytes, candidates);
  std::string params;
  std::vector<double> seconds = bench.time_fastest(candidates, &params);
  const double moved = 2e-9 * static_cast<double>(bytes);
  Bench::report_rate("copy", size + "\"method\": \"kernel\", " + params, "GB/s", moved, seconds);

  seconds = bench.time([&] {
    CHECK(cudaMemcpyAsync(memory.arena.get() + memory.bytes / 2, memory.arena.get(), static_cast<size_t>(bytes),
                          cudaMemcpyDeviceToDevice, bench.stream));
  });
  Bench::report_rate("copy", size + "\"method\": \"cudaMemcpyAsync\"", "GB/s", moved, seconds);
}

void measure_reads(Bench& bench, const Memory& memory, const char* name, int64_t bytes, uint32_t passes) {
  std::vector<Candidate> candidates;
  add_reads<4>(bench, memory, bytes, passes, candidates);
  add_reads<8>(bench, memory, bytes, passes, candidates);
  std::string params;
  const std::vector<double> seconds = bench.time_fastest(candidates, &params);
  params = format("\"bytes\": %lld, ", static_cast<long long>(bytes)) + params;
  Bench::report_rate(name, params, "GB/s", 1e-9 * static_cast<double>(bytes) * passes, seconds);
}

void measure_read(Bench& bench, const Memory& memory) {
  measure_reads(bench, memory, "read", std::min(4 * kGiB, memory.bytes), 1);
}

void measure_l2_read(Bench& bench, const Memory& memory) {
  for (int64_t quarters : {1, 3}) {
    const int64_t tile = kTileBytes<8>;
    const int64_t bytes = quarters * bench.gpu.l2CacheSize / 4 / tile * tile;
    measure_reads(bench, memory, "l2 read", bytes, static_cast<uint32_t>(4 * kGiB / bytes));
  }
}

constexpr uint32_t kZipfRows = 1'000'000;

template <int kRowBytes>
void measure_random_rows_of(Bench& bench, const Memory& memory, const double* cumulative) {
  // A row that ends between two vectors is read to the end of its last one.
  int64_t table_rows = (memory.bytes - 16) / kRowBytes;
  if (cumulative != nullptr) table_rows = std::min<int64_t>(table_rows, kZipfRows);
  const int64_t count = 4 * kGiB / kRowBytes / 1024 * 1024;
  uint32_t* ids = memory.ids.get();
  const auto bound = static_cast<uint32_t>(table_rows);
  if (cumulative != nullptr) {
    CHECK((draw_from<<<4096, 256, 0, bench.stream>>>(ids, count, cumulative, bound), cudaGetLastError()));
  } else {
    CHECK((draw_uniform<<<4096, 256, 0, bench.stream>>>(ids, count, bound), cudaGetLastError()));
  }

  const Rows rows{memory.arena.get(), ids, count, memory.sink.get()};
  std::string params;
  const std::vector<double> seconds = bench.time_fastest(row_candidates<kRowBytes>(bench, rows), &params);
  params = format("\"row_bytes\": %d, \"id_bytes\": 4, \"ids\": \"%s\", \"table_rows\": %lld, \"rows\": %lld, ",
                  kRowBytes, cumulative != nullptr ? "zipf" : "uniform", static_cast<long long>(table_rows),
                  static_cast<long long>(count)) +
           params;
  Bench::report_rate("random rows", params, "GB/s", 1e-9 * (kRowBytes + 4) * static_cast<double>(count), seconds);
}

void measure_random_rows(Bench& bench, const Memory& memory) {
  measure_random_rows_of<64>(bench, memory, nullptr);
  measure_random_rows_of<128>(bench, memory, nullptr);
  measure_random_rows_of<256>(bench, memory, nullptr);
  measure_random_rows_of<400>(bench, memory, nullptr);
  measure_random_rows_of<512>(bench, memory, nullptr);
  measure_random_rows_of<600>(bench, memory, nullptr);
  measure_random_rows_of<1024>(bench, memory, nullptr);
  measure_random_rows_of<1200>(bench, memory, nullptr);
  measure_random_rows_of<2048>(bench, memory, nullptr);
  measure_random_rows_of<4096>(bench, memory, nullptr);
  measure_random_rows_of<8192>(bench, memory, nullptr);

  std::vector<double> harmonic(kZipfRows);
  double sum = 0;
  for (uint32_t i = 0; i < kZipfRows; ++i) harmonic[i] = sum += 1.0 / (i + 1.0);
  const Buffer<double> cumulative(kZipfRows);
  CHECK(cudaMemcpyAsync(cumulative.get(), harmonic.data(), kZipfRows * sizeof(double), cudaMemcpyHostToDevice,
                        bench.stream));
  measure_random_rows_of<512>(bench, memory, cumulative.get());
  measure_random_rows_of<1024>(bench, memory, cumulative.get());
  measure_random_rows_of<2048>(bench, memory, cumulative.get());
  bench.synchronise();
}

void measure_radix_sort(Bench& bench, const Memory&) {
  for (int pairs : {98'304, 393'216, 1'376'256, 8'396'800}) {
    const Buffer<uint32_t> keys(pairs), values(pairs), sorted_keys(pairs), sorted_values(pairs);
    for (int end_bit : {17, 20, 24}) {
      CHECK((draw_uniform<<<1024, 256, 0, bench.stream>>>(keys.get(), pairs, 1u << end_bit), cudaGetLastError()));
      const auto sort = [&](void* scratch, size_t& bytes) {
        CHECK(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys.get(), sorted_keys.get(), values.get(),
                                              sorted_values.get(), pairs, 0, end_bit, bench.stream));
      };
      size_t bytes = 0;
      sort(nullptr, bytes);
      const Buffer<char> scratch(static_cast<int64_t>(bytes));
      const Enqueue enqueue = [&] { sort(scratch.get(), bytes); };
      for (const char* launch : {"stream", "graph"}) {
        const bool graph = launch[0] == 'g';
        const std::vector<double> seconds = bench.time(graph ? bench.captured(enqueue) : enqueue);
        const std::string params = format("\"pairs\": %d, \"end_bit\": %d, \"launch\": \"%s\"", pairs, end_bit, launch);
        Bench::report_rate("radix sort", params, "pairs/s", pairs, seconds);
        Bench::report_microseconds("radix sort", params, seconds);
      }
    }
  }
}

void measure_adds(Bench& bench, const Memory& memory, const char* where, int64_t table_rows, int64_t count) {
  uint32_t* ids = memory.ids.get();
  auto* table = reinterpret_cast<float*>(memory.arena.get());
  const auto grid = static_cast<uint32_t>(count / kThreads);
  CHECK((draw_uniform<<<4096, 256, 0, bench.stream>>>(ids, count, static_cast<uint32_t>(table_rows)),
         cudaGetLastError()));
  for (int width : {4, 1}) {
    if (width == 4 && bench.gpu.major < 9) continue;
    const std::vector<double> seconds = bench.time([&] {
      if (width == 4) {
        CHECK((add_to_rows<true><<<grid, kThreads, 0, bench.stream>>>(table, ids), cudaGetLastError()));
      } else {
        CHECK((add_to_rows<false><<<grid, kThreads, 0, bench.stream>>>(table, ids), cudaGetLastError()));
      }
    });
    const std::string params =
        format("\"rows_in\": \"%s\", \"table_rows\": %lld, \"row_bytes\": 512, \"vector_floats\": %d", where,
               static_cast<long long>(table_rows), width);
    Bench::report_rate("atomics", params, "G elements/s", 1e-9 * kAddedFloats * static_cast<double>(count), seconds);
  }
}

void measure_atomics(Bench& bench, const Memory& memory) {
  constexpr int64_t kRowBytes = kAddedFloats * sizeof(float);
  constexpr int64_t kCount = 2 * kGiB / kRowBytes;
  measure_adds(bench, memory, "l2", bench.gpu.l2CacheSize / 4 / kRowBytes, kCount);
  measure_adds(bench, memory, "dram", memory.bytes / kRowBytes, kCount);
  measure_adds(bench, memory, "one hot row", 1, 65536);
}

void measure_launch(Bench& bench, const Memory&) {
  const Enqueue enqueue = [&] { CHECK((empty<<<1, 32, 0, bench.stream>>>(), cudaGetLastError())); };
  Bench::report_microseconds("launch", "\"of\": \"empty kernel\", \"launch\": \"stream\"", bench.time(enqueue));

  constexpr int kKernels = 100;
  std::vector<double> seconds = bench.time(bench.captured([&] {
    for (int i = 0; i < kKernels; ++i) enqueue();
  }));
  for (double& value : seconds) value /= kKernels;
  Bench::report_microseconds("launch", "\"of\": \"empty kernel\", \"launch\": \"graph\"", seconds);

  seconds.clear();
  for (int i = 0; i < 1000; ++i) {
    const double start = Bench::now();
    enqueue();
    bench.synchronise();
    seconds.push_back(Bench::now() - start);
  }
  Bench::report_microseconds("launch", "\"of\": \"empty kernel and synchronise\", \"launch\": \"stream\"", seconds);
}

struct Section {
  const char* name;
  int measurements;
  void (*measure)(Bench&, const Memory&);
  bool wanted;
};

// An idle GPU runs at a fraction of its clock.
void warm_up(Bench& bench, const Memory& memory) {
  const auto tiles = static_cast<uint32_t>(memory.bytes / kTileBytes<8>);
  const double start = Bench::now();
  while (Bench::now() - start < 0.5) {
    CHECK((read<8><<<4096, kThreads, 0, bench.stream>>>(reinterpret_cast<const uint4*>(memory.arena.get()), tiles, 1,
                                                        memory.sink.get()),
           cudaGetLastError()));
    bench.synchronise();
  }
}

void report_device(const Bench& bench) {
  int kilohertz = 0, bits = 0;
  CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, 0));
  CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0));
  const std::string params =
      format("\"device\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, \"l2_bytes\": %d, \"bytes\": %zu",
             bench.gpu.name, bench.gpu.major, bench.gpu.minor, bench.gpu.multiProcessorCount, bench.gpu.l2CacheSize,
             bench.gpu.totalGlobalMem);
  // Both edges of the clock carry data.
  Bench::report("nominal memory", params, "GB/s", {2e3 * kilohertz * (bits / 8.0) * 1e-9});
}

int usage(const char* program, const std::vector<Section>& sections) {
  std::fprintf(stderr, "usage: %s [--only NAME]... [--seconds S]\nNAME is one of:", program);
  for (const Section& section : sections) std::fprintf(stderr, " '%s'", section.name);
  std::fprintf(stderr, "\nS, the time for all that is measured, is 20 by default\n");
  return 2;
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<Section> sections = {
      {"copy", 2, measure_copy, false},
      {"read", 1, measure_read, false},
      {"l2 read", 2, measure_l2_read, false},
      {"random rows", 14, measure_random_rows, false},
      {"radix sort", 24, measure_radix_sort, false},
      {"atomics", 6, measure_atomics, false},
      {"launch", 3, measure_launch, false},
  };
  double seconds = 20;
  bool all = true;
  for (int i = 1; i < count; i += 2) {
    if (i + 1 == count) return usage(arguments[0], sections);
    const char* value = arguments[i + 1];
    if (std::strcmp(arguments[i], "--seconds") == 0) {
      seconds = std::atof(value);
      if (!(seconds > 0)) return usage(arguments[0], sections);
    } else if (std::strcmp(arguments[i], "--only") == 0) {
      const auto named = [&](const Section& section) { return std::strcmp(section.name, value) == 0; };
      const auto section = std::find_if(sections.begin(), sections.end(), named);
      if (section == sections.end()) return usage(arguments[0], sections);
      section->wanted = true;
      all = false;
    } else {
      return usage(arguments[0], sections);
    }
  }
  int measurements = 0;
  for (Section& section : sections) {
    section.wanted = section.wanted || all;
    if (section.wanted) measurements += section.measurements;
  }

  Bench bench;
  bench.seconds_each = seconds / measurements;
  const Memory memory(bench);
  report_device(bench);
  warm_up(bench, memory);
  for (const Section& section : sections) {
    if (section.wanted) section.measure(bench, memory);
  }
  return 0;
}
