// Named argument predicates of the operator entry points: "op: argument must be ..., got ...".
//
// nce_ext.functional refuses first, with Python exceptions; these guard direct calls of torch.ops.nce_ext and
// compiled graphs, so that no argument can make a kernel touch memory it does not own.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <string>

#include "sampled_loss.h"

namespace nce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Stands where CUDA needs a guard that makes a tensor's device the current one.
struct OnCpu {
  explicit OnCpu(const Tensor&) {}
};

// The dispatcher picks the device of one argument; the others must be there too.
inline void check_device(const char* name, const Tensor& t, const Tensor& like) {
  const bool same = t.is_cpu() ? like.is_cpu() : t.is_cuda() && like.is_cuda() && t.get_device() == like.get_device();
  STD_TORCH_CHECK(same, name, " must be on the same device as the other tensors");
}

#ifdef USE_CUDA
// Where the current device sees host memory that is registered with CUDA; kernels must not touch any other.
inline const char* registered_data(const char* name, const Tensor& t) {
  int64_t last = 0;  // element
  for (int64_t i = 0; i < t.dim(); ++i) last += std::max<int64_t>(t.size(i) - 1, 0) * t.stride(i);
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  const int64_t extent = last * static_cast<int64_t>(t.element_size());
  const char* seen[2] = {nullptr, nullptr};
  for (const int64_t offset : {int64_t{0}, extent}) {
    cudaPointerAttributes found{};
    const cudaError_t status = cudaPointerGetAttributes(&found, begin + offset);
    if (status != cudaSuccess) cudaGetLastError();  // or the next launch would report it
    STD_TORCH_CHECK(status == cudaSuccess && found.type == cudaMemoryTypeHost && found.devicePointer != nullptr, name,
                    " must be on the same device as the other tensors or in pinned host memory, got pageable memory");
    seen[offset != 0] = static_cast<const char*>(found.devicePointer);
  }
  STD_TORCH_CHECK(extent == 0 || seen[1] - seen[0] == extent, name, " must be in one piece of pinned memory");
  return seen[0];
}
#endif

// Data of a tensor that kernels on the device of `like` can read: there, or for CUDA in pinned host memory.
inline const void* readable_data(const char* name, const Tensor& t, const Tensor& like) {
#ifdef USE_CUDA
  if (t.is_cpu() && like.is_cuda()) return registered_data(name, t);
#endif
  check_device(name, t, like);
  return t.const_data_ptr();
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType wanted) {
  STD_TORCH_CHECK(t.scalar_type() == wanted, name, " must be ", torch::headeronly::toString(wanted), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_tensor(const char* name, const Tensor& t, ScalarType wanted, const Tensor& like) {
  check_device(name, t, like);
  check_dtype(name, t, wanted);
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  std::string text = "[";
  bool equal = t.dim() == static_cast<int64_t>(wanted.size());
  int64_t i = 0;
  for (const int64_t size : wanted) {
    text += (i ? ", " : "") + std::to_string(size);
    equal = equal && t.size(i) == size;
    ++i;
  }
  STD_TORCH_CHECK(equal, name, " must have shape ", text, "], got ", shape_of(t));
}

// Rows may lie anywhere, but the elements of one lie side by side.
inline void check_rows(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be 2-D, got shape ", shape_of(t));
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have stride 1 in its last dimension");
}

inline Storage storage_of_type(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::Double:
      return Storage::kDouble;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(type));
  }
  return Storage::kFloat;
}

inline Storage storage_of(const char* name, const Tensor& t) { return storage_of_type(name, t.scalar_type()); }

inline ScalarType compute_type(Storage storage) {
  return storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
}

// The two words of a seed, where its device can read them.
inline const int64_t* seed_words(const Tensor& seed, const Tensor& like) {
  check_tensor("seed", seed, ScalarType::Long, like);
  check_shape("seed", seed, {2});
  return static_cast<const int64_t*>(seed.const_data_ptr());
}

// Counters of examples and slots have 32 bits.
inline void check_sample_shape(int64_t rows, int64_t cols) {
  constexpr int64_t kLimit = int64_t{1} << 32;
  STD_TORCH_CHECK(rows >= 0 && rows <= kLimit, "rows must be in 0 .. 2^32, got ", rows);
  STD_TORCH_CHECK(cols >= 0 && cols <= kLimit, "cols must be in 0 .. 2^32, got ", cols);
}

// The table is trusted beyond its size: nce_ext.noise builds it, and reading it all would cost O(V) a call.
inline Noise noise_of(int64_t kind, int64_t n_classes, const Tensor& table, const Tensor& like) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "noise kind must be 0, 1 or 2, got ", kind);
  STD_TORCH_CHECK(n_classes >= 1 && n_classes < (int64_t{1} << 31), "n_classes must be in 1 .. 2^31 - 1, got ",
                  n_classes);
  Noise noise = noise_without_table(static_cast<NoiseKind>(kind), n_classes);
  if (noise.kind == NoiseKind::kAlias) {
    check_tensor("table", table, ScalarType::Int, like);
    check_shape("table", table, {n_classes, 4});
    STD_TORCH_CHECK(table.is_contiguous(), "table must be contiguous");
    noise.table = static_cast<const AliasEntry*>(table.const_data_ptr());
  }
  return noise;
}

}  // namespace nce
