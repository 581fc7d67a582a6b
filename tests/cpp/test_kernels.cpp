// The torch-free kernels of every instruction set this processor has, against plain loops in double; built with
// AddressSanitizer and UndefinedBehaviorSanitizer by `make sanitize`. Every buffer has exactly the size it needs, so
// a read or write beyond it is an error.
#include <thread>

#include "../../csrc/cpu/sort_pairs.h"
#include "problem.h"

#define NCE_SIMD_LEVEL 0
#define NCE_SIMD_NAMESPACE test_level
#include "../../csrc/cpu/simd.h"

namespace {

using namespace nce;

// Known answers of the Random123 distribution.
void test_philox() {
  const Words zero = philox4x32_10(Words{{0, 0, 0, 0}}, 0, 0);
  EXPECT(zero.w[0] == 0x6627e8d5 && zero.w[1] == 0xe169c58d && zero.w[2] == 0xbc57ac4c && zero.w[3] == 0x9b00dbd8);
  const Words pi = philox4x32_10(Words{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0);
  EXPECT(pi.w[0] == 0xd16cfe09 && pi.w[1] == 0x94fdcceb && pi.w[2] == 0x5001e420 && pi.w[3] == 0x24126ea1);
}

void test_half() {
  using test_level::float_to_half;
  using test_level::half_to_float;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1 : 1;
    const float value = half_to_float(static_cast<uint16_t>(bits));
    if (exponent == 31) {
      EXPECT(fraction ? std::isnan(value) : std::isinf(value) && std::signbit(value) == (sign < 0));
    } else {
      EXPECT(value == sign * (exponent ? std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25)
                                       : std::ldexp(fraction, -24)));
    }
    if (exponent != 31) EXPECT(float_to_half(value) == bits);
  }
  EXPECT(std::isnan(half_to_float(float_to_half(NAN))));
  EXPECT(float_to_half(65519.996f) == 0x7BFF && float_to_half(65520.0f) == 0x7C00 && float_to_half(INFINITY) == 0x7C00);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponents(-27, 17);
  for (int i = 0; i < 20000; ++i) {  // rounds to the nearer neighbour, and to even between them
    const float x = std::exp2(exponents(random)) * (random() & 1 ? 1.0f : -1.0f);
    const uint16_t h = float_to_half(x);
    if ((h & 0x7FFF) == 0x7C00) continue;
    const double error = std::abs(static_cast<double>(half_to_float(h)) - x);
    for (const int step : {-1, 1}) {
      const auto neighbour = static_cast<uint16_t>(h + step);
      if ((neighbour ^ h) & 0x8000 || (neighbour & 0x7FFF) >= 0x7C00) continue;
      const double other = std::abs(static_cast<double>(half_to_float(neighbour)) - x);
      EXPECT(error < other || (error == other && h % 2 == 0));
    }
  }
}

// The mass of every class, counted from the table, is the mass that it was given.
void test_alias() {
  std::mt19937 random(2);
  for (const int64_t n : {1, 2, 3, 100, 5000}) {
    for (int kind = 0; kind < 4; ++kind) {
      std::vector<double> weights(n);
      double total = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double u = std::generate_canonical<double, 53>(random);
        weights[i] = kind == 0 ? 1 : kind == 1 ? u : kind == 2 ? std::pow(u, 40) : (u < 0.7 ? 0 : u);
      }
      weights[n / 2] += 1;
      for (const double w : weights) total += w;
      const auto mass = quantise_masses(weights.data(), n, n * 4294967296.0 / total);
      std::vector<AliasEntry> table(n);
      fill_buckets(mass.get(), n, table.data());
      std::vector<uint64_t> counted(n, 0);
      for (int64_t i = 0; i < n; ++i) {
        EXPECT(table[i].alias < n);
        const uint64_t own = table[i].alias == i ? kFull : table[i].threshold;
        counted[i] += own;
        counted[table[i].alias] += kFull - own;
      }
      for (int64_t i = 0; i < n; ++i) EXPECT(counted[i] == mass[i] && (mass[i] > 0) == (weights[i] > 0));
    }
  }
}

void test_sort() {
  std::mt19937 random(3);
  const auto threaded = [](int64_t n, const auto& f) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; ++i) threads.emplace_back(f, i);
    for (auto& thread : threads) thread.join();
  };
  for (const int64_t n : {0, 1, 1000, 40000}) {
    for (const int64_t n_classes : {1, 2, 2048, 2049, 1 << 22, 2147483647}) {
      std::vector<int32_t> classes(n);
      for (auto& c : classes) c = random() % 10 == 0 ? -1 : static_cast<int32_t>(random() % n_classes);
      std::vector<uint64_t> wanted;
      for (int64_t i = 0; i < n; ++i) {
        if (classes[i] >= 0) wanted.push_back(static_cast<uint64_t>(classes[i]) << 32 | static_cast<uint64_t>(i));
      }
      std::sort(wanted.begin(), wanted.end());
      for (const int64_t n_threads : {1, 3}) {
        const SortedPairs pairs = sort_pairs(classes.data(), n, n_classes, n_threads, threaded);
        EXPECT(pairs.count == static_cast<int64_t>(wanted.size()));
        EXPECT(std::equal(wanted.begin(), wanted.end(), pairs.keys.get()));
        const auto starts = segment_starts(pairs, n_threads, threaded);
        EXPECT(starts.back() == pairs.count);
        for (size_t s = 0; s + 1 < starts.size(); ++s) {
          EXPECT(starts[s] < starts[s + 1]);
          EXPECT(s == 0 || wanted[starts[s]] >> 32 > wanted[starts[s] - 1] >> 32);
        }
      }
    }
  }
}

void test_sampled_loss(const Kernels& kernels, const Problem& problem) {
  SampledLoss p = problem.p;
  const int64_t columns = p.n_targets + p.n_negatives;
  std::vector<float> loss(p.batch), dlogit(p.batch * columns), grad_hidden(p.batch * p.dim);
  std::vector<int32_t> ids(p.batch * columns);
  p.loss = loss.data();
  p.dlogit = dlogit.data();
  p.ids = ids.data();
  p.grad_hidden = grad_hidden.data();
  void* scratch = std::aligned_alloc(64, 2 * padded_dim(p.dim) * sizeof(float));
  EXPECT(kernels.sampled_loss[0](p, 0, p.batch / 2, scratch) == -1);
  EXPECT(kernels.sampled_loss[0](p, p.batch / 2, p.batch, scratch) == -1);

  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t* target = problem.target.data() + b * p.n_targets;
    const bool ignored = std::all_of(target, target + p.n_targets, [](int64_t y) { return y == -100; });
    double wanted = 0;
    std::vector<double> gradient(p.dim, 0);
    for (int64_t c = 0; c < columns; ++c) {
      const bool positive = c < p.n_targets;
      const int64_t slot = c - p.n_targets;
      int64_t id = positive ? target[c]
                            : draw(p.noise, draw_bits(random_words(read_seed(p.seed, 1), static_cast<uint32_t>(b),
                                                                   static_cast<uint32_t>(slot / 2)),
                                                      slot))
                                  .id;
      bool live = !ignored && !(positive && id == -100);
      if (!positive && p.remove_hits && std::find(target, target + p.n_targets, id) != target + p.n_targets) {
        live = false;
      }
      if (ignored || (positive && id == -100)) id = -1;
      EXPECT(ids[b * columns + c] == id);
      double d = 0;
      if (live) {
        double z = problem.bias[id] - p.offset - p.noise.table[id].log_q_self;
        for (int64_t i = 0; i < p.dim; ++i) {
          z += static_cast<double>(problem.hidden[b * p.dim + i]) * problem.weight[id * p.dim + i];
        }
        const double signed_z = positive ? -z : z;
        wanted += std::max(signed_z, 0.0) + std::log1p(std::exp(-std::abs(signed_z)));
        d = positive ? -1 / (1 + std::exp(z)) : 1 / (1 + std::exp(-z));
        for (int64_t i = 0; i < p.dim; ++i) gradient[i] += d * problem.weight[id * p.dim + i];
      }
      EXPECT(live ? close(dlogit[b * columns + c], d, 2e-5) : dlogit[b * columns + c] == 0);
    }
    EXPECT(close(loss[b], wanted, 2e-5));
    for (int64_t i = 0; i < p.dim; ++i) EXPECT(close(grad_hidden[b * p.dim + i], gradient[i], 5e-5));
  }

  const SortedPairs pairs = sort_pairs(ids.data(), p.batch * columns, p.n_classes, 1, [](int64_t, auto&& f) { f(0); });
  const auto starts = segment_starts(pairs, 1, [](int64_t, auto&& f) { f(0); });
  const auto n_segments = static_cast<int64_t>(starts.size()) - 1;
  std::vector<float> rows(n_segments * p.dim), bias(n_segments), grad_loss(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) grad_loss[b] = 0.25f * static_cast<float>(b % 5) - 0.5f;
  RowGrad r{};
  r.dim = p.dim;
  r.columns = columns;
  r.pairs = pairs.keys.get();
  r.segment_start = starts.data();
  r.dlogit = dlogit.data();
  r.grad_loss = grad_loss.data();
  r.grad_loss_stride = 1;
  r.hidden = p.hidden;
  r.hidden_stride = p.hidden_stride;
  r.hidden_storage = Storage::kFloat;
  r.values = rows.data();
  r.bias = bias.data();
  kernels.row_grad[0](r, 0, n_segments, scratch);
  std::free(scratch);
  for (int64_t s = 0; s < n_segments; ++s) {
    std::vector<double> wanted(p.dim + 1, 0);
    for (int64_t i = starts[s]; i < starts[s + 1]; ++i) {
      const auto pair = static_cast<uint32_t>(pairs.keys[i]);
      const int64_t b = pair / columns;
      const double c = static_cast<double>(dlogit[pair]) * grad_loss[b];
      for (int64_t d = 0; d < p.dim; ++d) wanted[d] += c * problem.hidden[b * p.dim + d];
      wanted[p.dim] += c;
    }
    for (int64_t d = 0; d < p.dim; ++d) EXPECT(close(rows[s * p.dim + d], wanted[d], 2e-5));
    EXPECT(close(bias[s], wanted[p.dim], 2e-5));
  }
}

}  // namespace

int main() {
  test_philox();
  test_half();
  test_alias();
  test_sort();
  int passed = 4;
  for (const Kernels* level : available()) {
    for (const int64_t dim : {1, 3, 16, 17, 64, 100, 131}) {
      for (const int64_t k : {1, 5, 15, 16, 33, 100}) {
        test_sampled_loss(*level, Problem(7, dim, 1 + k % 3, k, 40, k % 2 == 0));
      }
    }
    test_sampled_loss(*level, Problem(1, 8, 1, 4, 1, true));
    test_sampled_loss(*level, Problem(300, 20, 1, 5, 3, false));  // segments of many chunks
    ++passed;
  }
  std::printf("%d checks\n%d passed, 0 failed\n", checks, passed);
}
