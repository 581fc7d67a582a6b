// The CPU kernels of one instruction set, and the choice between the sets at run time.
#pragma once

#include <cstdint>
#include <new>

#include "../row_grad.h"
#include "../row_step.h"
#include "../sampled_loss.h"
#include "../scatter_step.h"
#include "../shared_loss.h"

namespace nce {

struct Kernels {
  const char* level;  // "generic", "avx2", "avx512"

  // ids[i] = the draw of (example, slot) = (i / columns, i % columns), for begin <= i < end.
  bool (*sample)(const Noise& noise, Seed seed, int64_t columns, int64_t begin, int64_t end, int64_t* ids);

  // Examples begin .. end - 1. `scratch` holds 2 * padded_dim(dim) compute values, aligned to 64 bytes. Returns the
  // first pair whose id is out of range or has no log q (its contribution is left out), or -1.
  int64_t (*sampled_loss[4])(const SampledLoss& p, int64_t begin, int64_t end, void* scratch);  // by weight's Storage

  // Examples begin .. end - 1. `scratch` holds 2 * padded_dim(dim) + padded_dim(n_targets) compute values. Returns the
  // index of a target whose id is out of range or has no log q, or -1.
  int64_t (*shared_loss[4])(const SharedLoss& p, int64_t begin, int64_t end, void* scratch);  // by weight's Storage

  // Segments begin .. end - 1. `scratch` holds padded_dim(dim) compute values, aligned to 64 bytes.
  void (*row_grad[4])(const RowGrad& p, int64_t begin, int64_t end, void* scratch);  // by weight's Storage

  // Rows classes[begin] .. classes[end - 1], or begin .. end - 1 if classes is null, of distinct classes; row i of the
  // gradient is of the weight's storage. `scratch` holds 2 * padded_dim(dim) compute values.
  void (*row_step[4])(const RowStep& p, const int64_t* classes, const void* gradient, int64_t gradient_stride,
                      int64_t begin, int64_t end, void* scratch);

  // As row_grad, but each row's gradient goes into a step instead of to memory. `scratch` holds 3 * padded_dim(dim).
  void (*row_grad_step[4])(const RowGrad& p, const RowStep& step, int64_t begin, int64_t end, void* scratch);

  // squares[s] = squared norm of the gradient of segment s. `scratch` holds 2 * padded_dim(dim) compute values.
  void (*row_grad_norm[2])(const RowGrad& p, bool with_rows, bool with_bias, int64_t begin, int64_t end, void* scratch,
                           double* squares);  // float, double

  // Examples begin .. end - 1; other threads may be adding to the same rows. `scratch` holds padded_dim(dim) floats.
  void (*scatter_step)(const ScatterStep& p, int64_t begin, int64_t end, void* scratch);
};

// Memory for a kernel's `scratch`.
class Scratch {
 public:
  explicit Scratch(int64_t doubles) : memory_(::operator new(static_cast<size_t>(doubles) * 8, kAlignment)) {}
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

// Whether rows of a table are better prefetched past the outer caches. Measured on Zen 5, where it makes reading long
// rows 5 to 10% faster and short hot ones slower; elsewhere rows that overflow the first-level cache could be lost.
bool streams_rows(int64_t row_bytes);

inline int64_t padded_dim(int64_t dim) { return (dim + 15) / 16 * 16; }

extern const Kernels kKernelsGeneric;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

// The best set that the processor has, or the one that NCE_EXT_SIMD names; throws std::runtime_error if that is
// unknown or not supported here.
const Kernels& kernels();

}  // namespace nce
