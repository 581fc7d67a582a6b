// Times work on one stream by CUDA events and prints each result as one line of JSON.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#define CHECK(...) check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s, %s\n", file, line, call, cudaGetErrorName(error), cudaGetErrorString(error));
  std::exit(1);
}

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) { CHECK(cudaMalloc(&data_, static_cast<size_t>(count) * sizeof(T))); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

using Enqueue = std::function<void()>;

// One way to do a piece of work; `params` are members of a JSON object.
struct Candidate {
  std::string params;
  Enqueue enqueue;
};

class Bench {
 public:
  Bench() {
    CHECK(cudaGetDeviceProperties(&gpu, 0));
    CHECK(cudaSetDevice(0));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&start_));
    CHECK(cudaEventCreate(&stop_));
  }

  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  void synchronise() { CHECK(cudaStreamSynchronize(stream)); }

  template <typename Kernel>
  int64_t resident_blocks(Kernel* kernel, int threads) {
    int blocks = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
    return std::max<int64_t>(1, static_cast<int64_t>(blocks) * gpu.multiProcessorCount);
  }

  // Seconds of one repetition, once per round.
  std::vector<double> time(const Enqueue& enqueue) { return time(enqueue, seconds_each, 5, 100); }

  std::vector<double> time_fastest(const std::vector<Candidate>& candidates, std::string* params) {
    const Candidate* fastest = nullptr;
    double least = 0;
    for (const Candidate& candidate : candidates) {
      const double seconds = quantile(time(candidate.enqueue, 0, 3, 3), 0.5);
      if (fastest == nullptr || seconds < least) {
        fastest = &candidate;
        least = seconds;
      }
    }
    *params = fastest->params;
    return time(fastest->enqueue);  // anew: the quick timing that won was favoured by chance
  }

  // A graph is launched as one, however many kernels it holds. What `enqueue` runs must have run before: a kernel is
  // loaded at its first launch, which a capture does not allow.
  Enqueue captured(const Enqueue& enqueue) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return [this, executable] { CHECK(cudaGraphLaunch(executable, stream)); };
  }

  // `amount` over each of `seconds`.
  static void report_rate(const char* name, const std::string& params, const char* unit, double amount,
                          std::vector<double> seconds) {
    for (double& value : seconds) value = amount / value;
    report(name, params, unit, seconds);
  }

  static void report_microseconds(const char* name, const std::string& params, std::vector<double> seconds) {
    for (double& value : seconds) value *= 1e6;
    report(name, params, "us", seconds);
  }

  static void report(const char* name, const std::string& params, const char* unit, const std::vector<double>& values) {
    std::printf("{\"name\": \"%s\", \"params\": {%s}, \"unit\": \"%s\", ", name, params.c_str(), unit);
    std::printf("\"value\": %.6g, \"p20\": %.6g, \"p80\": %.6g, \"rounds\": %zu}\n", quantile(values, 0.5),
                quantile(values, 0.2), quantile(values, 0.8), values.size());
    std::fflush(stdout);
  }

  cudaDeviceProp gpu;
  cudaStream_t stream;
  double seconds_each = 0.5;  // for one measurement

 private:
  // The first kernel of an interval arrives some microseconds after the event before it.
  static constexpr double kInterval = 2e-3;

  static double quantile(std::vector<double> values, double share) {
    std::sort(values.begin(), values.end());
    const double at = share * static_cast<double>(values.size() - 1);
    const size_t below = static_cast<size_t>(at);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
  }

  double time_interval(const Enqueue& enqueue, int64_t repetitions) {
    CHECK(cudaEventRecord(start_, stream));
    for (int64_t i = 0; i < repetitions; ++i) enqueue();
    CHECK(cudaEventRecord(stop_, stream));
    CHECK(cudaEventSynchronize(stop_));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return std::max(1e-7, static_cast<double>(milliseconds) * 1e-3);
  }

  std::vector<double> time(const Enqueue& enqueue, double budget, size_t least_rounds, size_t most_rounds) {
    enqueue();
    synchronise();
    int64_t repetitions = 1;
    double interval = time_interval(enqueue, repetitions);
    while (interval < kInterval && repetitions < 100'000) {
      const double factor = std::min(20.0, std::max(1.5, 1.2 * kInterval / interval));
      repetitions = static_cast<int64_t>(factor * static_cast<double>(repetitions)) + 1;
      interval = time_interval(enqueue, repetitions);
    }
    std::vector<double> seconds;
    const double deadline = now() + budget;
    while (seconds.size() < least_rounds || (seconds.size() < most_rounds && now() < deadline)) {
      seconds.push_back(time_interval(enqueue, repetitions) / static_cast<double>(repetitions));
    }
    return seconds;
  }

  cudaEvent_t start_;
  cudaEvent_t stop_;
};
