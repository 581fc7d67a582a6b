// From a torch tensor to a kernel: the device, its current stream, the size of a persistent grid, errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>

namespace nce::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// While it lives, the tensor's device is the current one; its stream is that on which torch runs now.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : index_(device_of(t)), guard_(index_) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                    "torch has no current stream for CUDA device ", index_);
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int index() const { return index_; }
  cudaStream_t stream() const { return stream_; }

 private:
  static int32_t device_of(const torch::stable::Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), "all tensors must be on the same CUDA device, got one on the CPU");
    return t.get_device();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

// Blocks of `kernel` that a device holds at once. One place per kernel remembers the answers, a device each.
class Occupancy {
 public:
  template <class Kernel>
  int blocks(Kernel* kernel, int threads, size_t shared_bytes, int device) {
    std::atomic<int>* known = device < kDevices ? &known_[device] : nullptr;
    int blocks = known ? known->load(std::memory_order_relaxed) : 0;
    if (blocks > 0) return blocks;
    int each = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes), "occupancy");
    blocks = std::max(each, 1) * multiprocessors(device);
    if (known) known->store(blocks, std::memory_order_relaxed);
    return blocks;
  }

 private:
  static constexpr int kDevices = 64;
  std::array<std::atomic<int>, kDevices> known_{};
};

// Launches `kernel` with as many blocks as the device holds, or fewer if there is less work. Every kernel walks its
// work in steps of the grid, so that no result depends on this.
template <class... Parameters, class... Arguments>
void launch_persistent(void (*kernel)(Parameters...), int64_t blocks_of_work, int threads, size_t shared_bytes,
                       const OnDevice& device, Occupancy& occupancy, const Arguments&... arguments) {
  if (blocks_of_work == 0) return;
  const int64_t resident = occupancy.blocks(kernel, threads, shared_bytes, device.index());
  const auto grid = static_cast<unsigned>(std::min(blocks_of_work, resident));
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, device.stream()>>>(arguments...);
  check_cuda(cudaGetLastError(), "kernel launch");
}

// More dynamic shared memory than a kernel gets unasked.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t bytes) {
  constexpr size_t kUnasked = 48 * 1024;
  if (bytes <= kUnasked) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "shared memory");
}

}  // namespace nce::cuda
