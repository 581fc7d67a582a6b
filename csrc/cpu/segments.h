// Pairs sorted by class, and threads that own ranges of their segments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../row_grad_call.h"
#include "kernels.h"
#include "sort_pairs.h"

namespace nce {

constexpr int64_t kPairsPerThread = 8192;  // below that a second thread costs more than it saves

inline void parallel(int64_t n, const auto& f) {
  if (n == 1) return f(0);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

struct Segments {
  RowGrad p{};
  Storage storage;
  SortedPairs pairs;
  std::vector<int64_t> starts;
  int64_t n_padded;  // rows of a gradient whose size does not depend on the ids
  int64_t n_threads;

  int64_t size() const { return static_cast<int64_t>(starts.size()) - 1; }
  void write_classes(int64_t* out) const {
    for (int64_t i = 0; i < size(); ++i) out[i] = static_cast<int64_t>(pairs.keys[starts[i]] >> 32);
  }
};

inline Segments sort_segments(const PairArguments& arguments, int64_t n_classes, ScalarType dtype) {
  const auto& [ids, dlogit, grad_loss, hidden] = arguments;
  const RowGradCall call = check_row_grad(arguments, n_classes, dtype);
  const int64_t n = call.n_pairs;
  const auto* classes = static_cast<const int32_t*>(ids.const_data_ptr());
  STD_TORCH_CHECK(n == 0 || *std::max_element(classes, classes + n) < n_classes, "ids must be below ", n_classes);

  Segments s;
  s.storage = call.storage;
  s.n_padded = padded_rows(call);
  s.n_threads = std::clamp<int64_t>(n / kPairsPerThread, 1, torch::stable::get_num_threads());
  const auto loop = [](int64_t count, const auto& f) { parallel(count, f); };
  s.pairs = sort_pairs(classes, n, n_classes, s.n_threads, loop);
  s.starts = segment_starts(s.pairs, s.n_threads, loop);
  s.p.dim = hidden.size(1);
  s.p.columns = call.columns;
  s.p.pairs = s.pairs.keys.get();
  s.p.segment_start = s.starts.data();
  s.p.dlogit = dlogit.const_data_ptr();
  s.p.grad_loss = grad_loss.const_data_ptr();
  s.p.grad_loss_stride = grad_loss.stride(0);
  s.p.hidden = hidden.const_data_ptr();
  s.p.hidden_stride = hidden.stride(0);
  s.p.hidden_storage = call.hidden_storage;
  return s;
}

// Threads own ranges of segments of about equally many pairs: f(first, last + 1).
void for_ranges(const Segments& s, const auto& f) {
  const auto bound = [&](int64_t thread) {
    const int64_t pair = s.pairs.count * thread / s.n_threads;
    return std::lower_bound(s.starts.begin(), s.starts.end() - 1, pair) - s.starts.begin();
  };
  parallel(s.n_threads, [&](int64_t thread) {
    const int64_t end = thread + 1 == s.n_threads ? s.size() : bound(thread + 1);
    f(bound(thread), end);
  });
}

}  // namespace nce
