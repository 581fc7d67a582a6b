// The kernels that step on rows, of every instruction set this processor has, against plain loops in double, and
// against each other bit for bit where nothing is reduced; built and run by `make sanitize` as test_kernels.cpp is.
// Every buffer has exactly the size it needs, and rows have odd lengths.
#include "../../csrc/cpu/sort_pairs.h"
#include "problem.h"

#define NCE_SIMD_LEVEL 0
#define NCE_SIMD_NAMESPACE test_level
#include "../../csrc/cpu/simd.h"

namespace {

using namespace nce;
using Bytes = std::vector<unsigned char>;

constexpr Storage kStorages[] = {Storage::kFloat, Storage::kBFloat16, Storage::kHalf, Storage::kDouble};
constexpr StepRule kRules[] = {StepRule::kSgd, StepRule::kAdagrad, StepRule::kRowwiseAdagrad, StepRule::kAdam};

double read(const Bytes& bytes, Storage storage, int64_t i) {
  const auto element = [&](auto value) {
    std::memcpy(&value, bytes.data() + i * static_cast<int64_t>(sizeof value), sizeof value);
    return value;
  };
  if (storage == Storage::kFloat) return element(float{});
  if (storage == Storage::kDouble) return element(double{});
  const uint16_t bits = element(uint16_t{});
  if (storage == Storage::kHalf) return test_level::half_to_float(bits);
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

Bytes stored(const std::vector<double>& values, Storage storage) {
  Bytes bytes(values.size() * static_cast<size_t>(bytes_of(storage)));
  for (size_t i = 0; i < values.size(); ++i) {
    unsigned char* out = bytes.data() + i * static_cast<size_t>(bytes_of(storage));
    const auto narrow = static_cast<float>(values[i]);
    if (storage == Storage::kDouble) {
      std::memcpy(out, &values[i], 8);
    } else if (storage == Storage::kFloat) {
      std::memcpy(out, &narrow, 4);
    } else if (storage == Storage::kHalf) {
      const uint16_t bits = test_level::float_to_half(narrow);
      std::memcpy(out, &bits, 2);
    } else {
      std::memcpy(out, reinterpret_cast<const unsigned char*>(&narrow) + 2, 2);  // cut off: any numbers will do
    }
  }
  return bytes;
}

Storage compute_of(Storage storage) { return storage == Storage::kDouble ? storage : Storage::kFloat; }

double unit_of(Storage storage) {
  return storage == Storage::kDouble  ? 1e-14
         : storage == Storage::kFloat ? 2e-6
         : storage == Storage::kHalf  ? 1e-3
                                      : 8e-3;
}

std::vector<double> normals(int64_t n, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<size_t>(n));
  for (double& x : values) x = normal(random);
  return values;
}

struct Variant {
  StepRule rule;
  bool momentum, nesterov, maximize, counted, decoupled, scaled, master, seeded;
  double weight_decay;
};

// A table whose rows lie `gap` elements apart.
struct Table {
  Storage storage;
  Variant variant;
  int64_t rows, dim, gap;
  Bytes weight, first, second, scale;
  std::vector<int32_t> row_steps;
  std::vector<double> decayed;
  std::vector<float> master;
  RowStep p{};

  Table(Storage s, const Variant& v, int64_t n, int64_t d, int64_t g)
      : storage(s), variant(v), rows(n), dim(d), gap(g) {
    std::mt19937 random(static_cast<unsigned>(d * 31 + n));
    const Storage compute = compute_of(s);
    weight = stored(normals((n - 1) * (d + g) + d, random), s);
    std::vector<double> squares = normals(v.rule == StepRule::kRowwiseAdagrad ? n : n * d, random);
    for (double& x : squares) x *= x;
    second = stored(squares, compute);
    first = stored(normals(n * d, random), compute);
    scale = stored({0.75}, compute);
    row_steps.resize(static_cast<size_t>(n));
    decayed.resize(static_cast<size_t>(n));
    for (auto& t : row_steps) t = static_cast<int32_t>(random() % 3);
    for (auto& x : decayed) x = -0.1 * static_cast<double>(random() % 8);
    for (const double x : normals(n * d, random)) master.push_back(static_cast<float>(x));
  }

  // Of this very table, which must not have been moved since.
  const RowStep& parameters() {
    const bool adam = variant.rule == StepRule::kAdam;
    p.rule = variant.rule;
    p.nesterov = variant.nesterov;
    p.maximize = variant.maximize;
    p.rate = 0.05;
    p.weight_decay = variant.weight_decay;
    p.momentum = variant.momentum && !adam ? 0.9 : 0;
    p.dampening = variant.momentum && !adam ? 0.25 : 0;
    p.beta1 = adam ? 0.9 : 0;
    p.beta2 = adam ? 0.99 : 0;
    p.eps = 1e-8;
    p.log_decay = -0.9;
    p.step = 5;
    p.dim = dim;
    p.n_rows = rows;
    p.weight = weight.data();
    p.weight_stride = dim + gap;
    p.first = adam || variant.momentum ? first.data() : nullptr;
    p.second = variant.rule == StepRule::kSgd ? nullptr : second.data();
    p.row_steps = variant.counted ? row_steps.data() : nullptr;
    p.decayed = variant.decoupled ? decayed.data() : nullptr;
    p.master = variant.master ? master.data() : nullptr;
    p.gradient_scale = variant.scaled ? scale.data() : nullptr;
    p.seed = variant.seeded ? kSeed : nullptr;
    p.seed_stride = 1;
    return p;
  }

  bool operator==(const Table& o) const {
    return weight == o.weight && first == o.first && second == o.second && row_steps == o.row_steps &&
           decayed == o.decayed && master == o.master;
  }
};

// One row by the formulas at the head of csrc/row_step.h. size: of what the gradient was summed up from.
void check_row(const Table& before, Table& after, int64_t row, const std::vector<double>& gradient, double size = 1) {
  const RowStep& p = after.parameters();
  const Storage compute = compute_of(before.storage);
  const bool adam = p.rule == StepRule::kAdam, row_wise = p.rule == StepRule::kRowwiseAdagrad;
  const double touches = p.row_steps ? before.row_steps[row] + 1 : static_cast<double>(p.step);
  const double sign = (p.maximize ? -1 : 1) * (p.gradient_scale ? 0.75 : 1);
  const double decay = p.decayed ? std::exp(p.log_decay - before.decayed[row]) : 1;
  if (p.row_steps) EXPECT(after.row_steps[row] == before.row_steps[row] + 1);
  if (p.decayed) EXPECT(after.decayed[row] == p.log_decay);
  std::vector<double> g(gradient), w(gradient.size());
  double mean = 0;
  for (int64_t d = 0; d < p.dim; ++d) {
    w[d] = p.master ? before.master[row * p.dim + d] : read(before.weight, before.storage, row * p.weight_stride + d);
    g[d] = sign * g[d] + p.weight_decay * w[d];
    mean += g[d] * g[d] / static_cast<double>(p.dim);
  }
  const double unit = size * unit_of(compute), row_second = row_wise ? read(before.second, compute, row) + mean : 0;
  if (row_wise) EXPECT(close(read(after.second, compute, row), row_second, unit));
  for (int64_t d = 0; d < p.dim; ++d) {
    const int64_t i = row * p.dim + d;
    double move = g[d], first = p.first ? read(before.first, compute, i) : 0;
    double second = row_wise ? row_second : p.second ? read(before.second, compute, i) : 0;
    if (p.rule == StepRule::kSgd && p.first) {
      first = p.momentum * first + (p.row_steps && touches == 1 ? 1 : 1 - p.dampening) * g[d];
      move = p.nesterov ? g[d] + p.momentum * first : first;
    } else if (adam) {
      first = p.beta1 * first + (1 - p.beta1) * g[d];
      second = p.beta2 * second + (1 - p.beta2) * g[d] * g[d];
      move = first / (1 - std::pow(p.beta1, touches)) / (std::sqrt(second / (1 - std::pow(p.beta2, touches))) + p.eps);
    } else if (p.rule != StepRule::kSgd) {
      if (!row_wise) second += g[d] * g[d];
      move = g[d] / (std::sqrt(second) + p.eps);
    }
    const double wanted = w[d] * decay - p.rate * move;
    // Adam divides by a root that may be small.
    const double slack = unit * (1 + std::abs(move) * 40);
    EXPECT(close(read(after.weight, after.storage, row * p.weight_stride + d), wanted,
                 after.storage == compute ? slack : (p.seed ? 2 : 1) * unit_of(after.storage)));
    if (p.first) EXPECT(close(read(after.first, compute, i), first, unit));
    if (p.second && !row_wise) EXPECT(close(read(after.second, compute, i), second, unit));
    if (p.master) EXPECT(close(after.master[i], wanted, slack));
  }
}

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const StepRule rule : kRules) {
    for (int bits = 0; bits < 8; ++bits) {
      const bool a = bits & 1, b = bits & 2, c = bits & 4;
      all.push_back({rule, b || c, a && b, a != c, b, c, a, false, false, c ? 0.0 : 0.1});
      if (bits < 3) all.push_back({rule, b, false, false, b, a, false, a, true, 0.0});
    }
  }
  return all;
}

Bytes gradient_of(int64_t rows, int64_t dim, int64_t gap, Storage storage) {
  std::mt19937 random(7);
  return stored(normals((rows - 1) * (dim + gap) + dim, random), storage);
}

void test_row_step(const Variant& variant, Storage storage, int64_t dim, const std::vector<const Kernels*>& levels) {
  const bool narrow = storage == Storage::kBFloat16 || storage == Storage::kHalf;
  if ((variant.master || variant.seeded) && !narrow) return;
  const std::vector<int64_t> classes{0, 2, 3, 7, 10};
  const auto n = static_cast<int64_t>(classes.size());
  const Table before(storage, variant, 11, dim, 3);
  const Bytes gradient = gradient_of(n, dim, 5, storage);
  void* scratch = std::aligned_alloc(64, 2 * static_cast<size_t>(padded_dim(dim)) * 8);
  std::vector<Table> results(levels.size(), before);
  for (size_t level = 0; level < levels.size(); ++level) {
    Table& after = results[level];
    const auto kernel = levels[level]->row_step[static_cast<int>(storage)];
    kernel(after.parameters(), classes.data(), gradient.data(), dim + 5, 0, 2, scratch);
    kernel(after.parameters(), classes.data(), gradient.data(), dim + 5, 2, n, scratch);
    Table rest = before;  // with the rows that were to change
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> row(static_cast<size_t>(dim));
      for (int64_t d = 0; d < dim; ++d) row[d] = read(gradient, storage, i * (dim + 5) + d);
      check_row(before, after, classes[i], row);
    }
    for (int64_t row = 0; row < before.rows; ++row) {
      if (std::find(classes.begin(), classes.end(), row) != classes.end()) continue;
      for (int64_t d = 0; d < dim; ++d) {
        EXPECT(read(after.weight, storage, row * (dim + 3) + d) == read(before.weight, storage, row * (dim + 3) + d));
      }
      EXPECT(after.row_steps[row] == before.row_steps[row] && after.decayed[row] == before.decayed[row]);
    }
    if (variant.rule != StepRule::kRowwiseAdagrad) EXPECT(after == results[0]);
  }
  std::free(scratch);
}

struct Pairs {
  static constexpr int64_t kBatch = 90, kColumns = 3, kClasses = 11;
  Storage storage;
  int64_t dim;
  std::vector<int32_t> ids;
  Bytes dlogit, grad_loss, hidden;
  SortedPairs sorted;
  std::vector<int64_t> starts;
  RowGrad p{};

  Pairs(Storage s, int64_t d) : storage(s), dim(d) {
    std::mt19937 random(11);
    for (int64_t i = 0; i < kBatch * kColumns; ++i) {  // class 4 is hot, and class 0 has none
      const auto id = static_cast<int32_t>(random() % (2 * kClasses));
      ids.push_back(id == 0 ? -1 : id < kClasses ? id : 4);
    }
    dlogit = stored(normals(kBatch * kColumns, random), compute_of(s));
    grad_loss = stored(normals(kBatch, random), compute_of(s));
    hidden = stored(normals((kBatch - 1) * (d + 1) + d, random), s);
    const auto alone = [](int64_t, auto&& f) { f(0); };
    sorted = sort_pairs(ids.data(), kBatch * kColumns, kClasses, 1, alone);
    starts = segment_starts(sorted, 1, alone);
    p.dim = d;
    p.columns = kColumns;
    p.pairs = sorted.keys.get();
    p.segment_start = starts.data();
    p.dlogit = dlogit.data();
    p.grad_loss = grad_loss.data();
    p.grad_loss_stride = 1;
    p.hidden = hidden.data();
    p.hidden_stride = d + 1;
    p.hidden_storage = s;
  }
  int64_t size() const { return static_cast<int64_t>(starts.size()) - 1; }
  double coefficient(int64_t pair) const {
    return read(dlogit, compute_of(storage), pair) * read(grad_loss, compute_of(storage), pair / kColumns);
  }
  // Rows and, behind each, its bias's element.
  std::vector<double> sums() const {
    std::vector<double> sums(static_cast<size_t>(kClasses * (dim + 1)), 0);
    for (int64_t pair = 0; pair < kBatch * kColumns; ++pair) {
      if (ids[pair] < 0) continue;
      double* row = sums.data() + ids[pair] * (dim + 1);
      for (int64_t d = 0; d < dim; ++d)
        row[d] += coefficient(pair) * read(hidden, storage, pair / kColumns * (dim + 1) + d);
      row[dim] += coefficient(pair);
    }
    return sums;
  }
};

// Steps that are fused with the sums: those of the sums followed by steps, where the sums have the weight's dtype.
void test_row_grad_step(const Kernels& kernels, const Variant& variant, Storage storage, int64_t dim) {
  const bool narrow = storage == Storage::kBFloat16 || storage == Storage::kHalf;
  if ((variant.master || variant.seeded) && !narrow) return;
  const Pairs pairs(storage, dim);
  const auto bytes = static_cast<size_t>(bytes_of(storage));
  const Table before(storage, variant, Pairs::kClasses, dim, 1);
  Table fused = before, apart = before;
  void* scratch = std::aligned_alloc(64, 3 * static_cast<size_t>(padded_dim(dim)) * 8);
  RowGrad p = pairs.p;
  Bytes bias(static_cast<size_t>(pairs.size()) * bytes), rows(static_cast<size_t>(pairs.size() * dim) * bytes);
  p.bias = bias.data();
  kernels.row_grad_step[static_cast<int>(storage)](p, fused.parameters(), 0, 3, scratch);
  kernels.row_grad_step[static_cast<int>(storage)](p, fused.parameters(), 3, pairs.size(), scratch);
  std::vector<int64_t> classes;
  for (int64_t s = 0; s < pairs.size(); ++s) classes.push_back(static_cast<int64_t>(p.pairs[p.segment_start[s]] >> 32));
  const std::vector<double> sums = pairs.sums();
  for (int64_t s = 0; s < pairs.size(); ++s) {
    EXPECT(close(read(bias, storage, s), sums[classes[s] * (dim + 1) + dim], 20 * unit_of(storage)));
  }
  if (!narrow) {
    p.values = rows.data();
    kernels.row_grad[static_cast<int>(storage)](p, 0, pairs.size(), scratch);
    kernels.row_step[static_cast<int>(storage)](apart.parameters(), classes.data(), rows.data(), dim, 0, pairs.size(),
                                                scratch);
    EXPECT(fused == apart);
  } else {
    for (const int64_t row : classes) {
      const auto begin = sums.begin() + row * (dim + 1);
      if (variant.rule == StepRule::kSgd) check_row(before, fused, row, std::vector<double>(begin, begin + dim), 50);
    }
  }
  std::free(scratch);
}

void test_row_grad_norm(const Kernels& kernels, Storage storage, int64_t dim) {
  const Pairs pairs(storage, dim);
  const std::vector<double> sums = pairs.sums();
  void* scratch = std::aligned_alloc(64, 2 * static_cast<size_t>(padded_dim(dim)) * 8);
  for (int bits = 1; bits < 4; ++bits) {
    std::vector<double> squares(static_cast<size_t>(pairs.size()));
    const auto kernel = kernels.row_grad_norm[storage == Storage::kDouble];
    kernel(pairs.p, bits & 1, bits & 2, 0, 2, scratch, squares.data());
    kernel(pairs.p, bits & 1, bits & 2, 2, pairs.size(), scratch, squares.data());
    for (int64_t s = 0; s < pairs.size(); ++s) {
      const double* row = sums.data() + (pairs.p.pairs[pairs.p.segment_start[s]] >> 32) * (dim + 1);
      double wanted = bits & 2 ? row[dim] * row[dim] : 0;
      for (int64_t d = 0; d < dim && bits & 1; ++d) wanted += row[d] * row[d];
      EXPECT(close(squares[s], wanted, 20 * unit_of(compute_of(storage))));
    }
  }
  std::free(scratch);
}

void test_scatter_step(const Kernels& kernels, Storage storage, int64_t dim) {
  const Pairs pairs(storage, dim);
  std::vector<float> weight((Pairs::kClasses - 1) * (dim + 2) + dim, 0.25f), bias(Pairs::kClasses, 0.5f);
  ScatterStep p{};
  p.batch = Pairs::kBatch;
  p.columns = Pairs::kColumns;
  p.dim = dim;
  p.n_classes = Pairs::kClasses;
  p.ids = pairs.ids.data();
  p.dlogit = static_cast<const float*>(pairs.p.dlogit);
  p.grad_loss = static_cast<const float*>(pairs.p.grad_loss);
  p.grad_loss_stride = 1;
  p.hidden = pairs.p.hidden;
  p.hidden_stride = pairs.p.hidden_stride;
  p.hidden_storage = storage;
  p.weight = weight.data();
  p.weight_stride = dim + 2;
  p.rate = 0.125f;
  void* scratch = std::aligned_alloc(64, static_cast<size_t>(padded_dim(dim)) * 8);
  for (const bool with_bias : {true, false}) {
    p.bias = with_bias ? bias.data() : nullptr;
    kernels.scatter_step(p, 0, 31, scratch);
    kernels.scatter_step(p, 31, Pairs::kBatch, scratch);
  }
  std::free(scratch);
  const std::vector<double> sums = pairs.sums();
  for (int64_t c = 0; c < Pairs::kClasses; ++c) {
    const double* row = sums.data() + c * (dim + 1);
    for (int64_t d = 0; d < dim; ++d) EXPECT(close(weight[c * (dim + 2) + d], 0.25 - 0.25 * row[d], 4e-5));
    EXPECT(close(bias[c], 0.5 - 0.125 * row[dim], 4e-5));
  }
  for (int64_t c = 0; c + 1 < Pairs::kClasses; ++c) {
    for (int64_t d = dim; d < dim + 2; ++d) EXPECT(weight[c * (dim + 2) + d] == 0.25f);
  }
}

}  // namespace

int main() {
  const auto levels = available();
  int passed = 0;
  for (const int64_t dim : {1, 3, 15, 16, 17, 33, 67}) {
    for (const Storage storage : kStorages) {
      for (const Variant& variant : variants()) {
        test_row_step(variant, storage, dim, levels);
        for (const Kernels* level : levels) test_row_grad_step(*level, variant, storage, dim);
      }
      for (const Kernels* level : levels) {
        test_row_grad_norm(*level, storage, dim);
        if (storage != Storage::kDouble) test_scatter_step(*level, storage, dim);
      }
      ++passed;
    }
  }
  std::printf("%d checks\n%d passed, 0 failed\n", checks, passed);
}
