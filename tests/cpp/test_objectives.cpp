// Softmax and adversarial weights in both CPU kernels of every instruction set this processor has, and the epilogue of
// shared negatives, against plain loops in double; built as test_kernels.cpp is.
#include "problem.h"

namespace {

double softplus_of(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z))); }
double sigmoid_of(double z) { return 1 / (1 + std::exp(-z)); }

struct Expected {
  double loss = 0;
  std::vector<double> dz;  // 0 where count is 0
};

// From the scores of the columns, how often each counts, and that the first n_targets are targets.
Expected expected(const Objective& objective, const std::vector<double>& z, const std::vector<double>& count,
                  size_t n_targets) {
  Expected e;
  e.dz.assign(z.size(), 0);
  double positives = 0, n = 0, total = 0, negatives = 0, most = -1e300;
  const bool softmax = objective.kind == ObjectiveKind::kSoftmax;
  for (size_t c = 0; c < z.size(); ++c) {
    if (count[c] == 0) continue;
    n += count[c];
    if (c < n_targets) ++positives;
    most = std::max(most, softmax ? z[c] : objective.temperature * z[c]);
  }
  if (positives == 0) return e;
  for (size_t c = 0; c < z.size(); ++c) {
    if (softmax) total += count[c] * std::exp(z[c] - most);
    if (!softmax && c >= n_targets) negatives += count[c] * std::exp(objective.temperature * z[c] - most);
  }
  for (size_t c = 0; c < z.size(); ++c) {
    if (count[c] == 0) continue;
    const bool positive = c < n_targets;
    if (softmax) {
      const double eps = objective.label_smoothing;
      const double label = (positive ? 1 - eps : 0) + eps * positives / n;
      e.loss += count[c] * label * (most + std::log(total) - z[c]);
      e.dz[c] = count[c] * (positives * std::exp(z[c] - most) / total - label);
    } else if (positive) {
      e.loss += objective.positive_weight * softplus_of(-z[c]);
      e.dz[c] = -objective.positive_weight * sigmoid_of(-z[c]);
    } else {
      double weight = count[c];
      if (objective.kind == ObjectiveKind::kAdversarial) {
        weight *= std::exp(objective.temperature * z[c] - most) / negatives;
      }
      e.loss += weight * softplus_of(z[c]);
      e.dz[c] = weight * sigmoid_of(z[c]);
    }
  }
  return e;
}

double score(const Problem& problem, int64_t example, int64_t id) {
  double z = problem.bias[id] - problem.p.offset - problem.p.noise.table[id].log_q_self;
  for (int64_t d = 0; d < problem.dim; ++d) {
    z += static_cast<double>(problem.hidden[example * problem.dim + d]) * problem.weight[id * problem.dim + d];
  }
  return z;
}

bool is_target(const Problem& problem, int64_t example, int64_t id) {
  const int64_t* target = problem.target.data() + example * problem.n_targets;
  return std::find(target, target + problem.n_targets, id) != target + problem.n_targets;
}

void test_per_example(const Kernels& kernels, const Problem& problem, const Objective& objective) {
  SampledLoss p = problem.p;
  p.objective = objective;
  const int64_t columns = p.n_targets + p.n_negatives;
  std::vector<float> loss(p.batch), dlogit(p.batch * columns), grad_hidden(p.batch * p.dim);
  std::vector<int32_t> ids(p.batch * columns);
  p.loss = loss.data();
  p.dlogit = dlogit.data();
  p.ids = ids.data();
  p.grad_hidden = grad_hidden.data();
  void* scratch = std::aligned_alloc(64, 2 * padded_dim(p.dim) * sizeof(float));
  EXPECT(kernels.sampled_loss[0](p, 0, p.batch, scratch) == -1);
  std::free(scratch);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<double> z(columns), count(columns), gradient(p.dim);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t id = ids[b * columns + c];
      const bool masked = id < 0 || (c >= p.n_targets && p.remove_hits && is_target(problem, b, id));
      count[c] = masked ? 0 : 1;
      z[c] = id < 0 ? 0 : score(problem, b, id);
    }
    const Expected e = expected(objective, z, count, p.n_targets);
    EXPECT(close(loss[b], e.loss, 5e-5));
    for (int64_t c = 0; c < columns; ++c) {
      EXPECT(count[c] == 0 ? dlogit[b * columns + c] == 0 : close(dlogit[b * columns + c], e.dz[c], 5e-5));
      const int64_t id = std::max(ids[b * columns + c], 0);
      for (int64_t d = 0; d < p.dim; ++d) gradient[d] += e.dz[c] * problem.weight[id * p.dim + d];
    }
    for (int64_t d = 0; d < p.dim; ++d) EXPECT(close(grad_hidden[b * p.dim + d], gradient[d], 1e-4));
  }
}

// The columns are classes 0, 2, 4, ...; every third counts twice.
void test_shared(const Kernels& kernels, const Problem& problem, const Objective& objective) {
  SharedLoss p{};
  static_cast<LossOperands&>(p) = problem.p;
  p.objective = objective;
  p.n_columns = (p.n_classes + 1) / 2;
  std::vector<float> target_log_q(p.batch * p.n_targets), shift(p.n_columns), multiplicity(p.n_columns);
  std::vector<float> scale(p.batch), logits(p.batch * p.n_columns), loss(p.batch), slope(p.batch * p.n_targets);
  std::vector<float> gradient(p.batch * p.dim), sums(p.batch);
  std::vector<int32_t> hits(p.batch * p.n_targets * 2), ids(p.batch * p.n_targets);
  const auto& table = problem.table;
  for (int64_t c = 0; c < p.n_columns; ++c) {
    shift[c] = static_cast<float>(problem.bias[2 * c] - p.offset - table[2 * c].log_q_self);
    multiplicity[c] = c % 3 == 2 ? 2 : 1;
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    scale[b] = 0.5f + static_cast<float>(b % 3);
    for (int64_t t = 0; t < p.n_targets; ++t) {
      const int64_t y = problem.target[b * p.n_targets + t], at = b * p.n_targets + t;
      target_log_q[at] = y < 0 ? 0 : table[y].log_q_self;
      hits[2 * at] = static_cast<int32_t>(y < 0 ? 0 : (y + 1) / 2);
      hits[2 * at + 1] = hits[2 * at] + (y >= 0 && y % 2 == 0);
    }
    for (int64_t c = 0; c < p.n_columns; ++c) {
      logits[b * p.n_columns + c] = static_cast<float>(score(problem, b, 2 * c) - shift[c]);
    }
  }
  p.target_log_q = target_log_q.data();
  p.column_shift = shift.data();
  p.multiplicity = multiplicity.data();
  p.accidental_hits = problem.remove_hits ? hits.data() : nullptr;
  p.example_weight = scale.data();
  p.logits = logits.data();
  p.logits_stride = p.n_columns;
  p.loss = loss.data();
  p.target_ids = ids.data();
  p.target_dlogit = slope.data();
  p.grad_hidden = gradient.data();
  p.grad_shift = sums.data();
  p.needs_derivatives = true;
  void* scratch = std::aligned_alloc(64, (2 * padded_dim(p.dim) + padded_dim(p.n_targets)) * sizeof(float));
  EXPECT(kernels.shared_loss[0](p, 0, p.batch, scratch) == -1);
  std::free(scratch);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<double> z(p.n_targets + p.n_columns), count(z.size());
    for (int64_t t = 0; t < p.n_targets; ++t) {
      const int64_t y = problem.target[b * p.n_targets + t];
      count[t] = y >= 0;
      z[t] = y < 0 ? 0 : score(problem, b, y);
    }
    for (int64_t c = 0; c < p.n_columns; ++c) {
      const bool masked = problem.remove_hits && is_target(problem, b, 2 * c);
      count[p.n_targets + c] = masked ? 0 : multiplicity[c];
      z[p.n_targets + c] = score(problem, b, 2 * c);
    }
    const Expected e = expected(objective, z, count, p.n_targets);
    EXPECT(close(loss[b], e.loss, 5e-5));
    double sum = 0;
    std::vector<double> of_hidden(p.dim);
    for (int64_t t = 0; t < p.n_targets; ++t) {
      const int64_t y = problem.target[b * p.n_targets + t];
      EXPECT(ids[b * p.n_targets + t] == (y < 0 ? -1 : y) || e.loss == 0);
      EXPECT(close(slope[b * p.n_targets + t], scale[b] * e.dz[t], 5e-5));
      sum += scale[b] * e.dz[t];
      for (int64_t d = 0; d < p.dim && y >= 0; ++d) of_hidden[d] += scale[b] * e.dz[t] * problem.weight[y * p.dim + d];
    }
    for (int64_t c = 0; c < p.n_columns; ++c) {
      const float got = logits[b * p.n_columns + c];
      EXPECT(count[p.n_targets + c] == 0 ? got == 0 : close(got, scale[b] * e.dz[p.n_targets + c], 5e-5));
      sum += scale[b] * e.dz[p.n_targets + c];
    }
    EXPECT(close(sums[b], sum, 2e-4));
    for (int64_t d = 0; d < p.dim; ++d) EXPECT(close(gradient[b * p.dim + d], of_hidden[d], 1e-4));
  }
}

}  // namespace

int main() {
  const Objective objectives[] = {
      {ObjectiveKind::kBinary, 1, 0, 0, true},          {ObjectiveKind::kBinary, 0.3, 0, 0, true},
      {ObjectiveKind::kSoftmax, 1, 0, 0, true},         {ObjectiveKind::kSoftmax, 1, 0.1, 0, true},
      {ObjectiveKind::kAdversarial, 0.7, 0, 1.5, true},
  };
  int passed = 0;
  for (const Kernels* level : available()) {
    for (const Objective& objective : objectives) {
      for (const int64_t dim : {1, 16, 37, 100}) {
        for (const int64_t k : {1, 5, 33, 100}) {
          const Problem problem(7, dim, 1 + k % 3, k, 40 + k % 7, k % 2 == 1);
          test_per_example(*level, problem, objective);
          test_shared(*level, problem, objective);
        }
      }
      const Problem all_hits(3, 8, 1, 4, 1, true);
      test_per_example(*level, all_hits, objective);
      test_shared(*level, all_hits, objective);
    }
    ++passed;
  }
  std::printf("%d checks\n%d passed, 0 failed\n", checks, passed);
}
