// What the C++ tests share: checks, the instruction sets of this processor, and a problem of random tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cpu/alias_build.h"
#include "../../csrc/cpu/kernels.h"

namespace {

using namespace nce;

int checks = 0;

void expect(bool condition, const char* what, int line) {
  ++checks;
  if (condition) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  std::exit(1);
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> levels{&kKernelsGeneric};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(&kKernelsAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) levels.push_back(&kKernelsAvx512);
#endif
  return levels;
}

constexpr int64_t kSeed[2] = {123456789012345, 987654321};

struct Problem {
  int64_t batch, dim, n_targets, n_negatives, n_classes;
  bool remove_hits;
  std::vector<float> hidden, weight, bias;
  std::vector<int64_t> target;
  std::vector<AliasEntry> table;
  SampledLoss p{};

  Problem(int64_t b, int64_t d, int64_t t, int64_t k, int64_t v, bool remove)
      : batch(b), dim(d), n_targets(t), n_negatives(k), n_classes(v), remove_hits(remove) {
    std::mt19937 random(static_cast<unsigned>(b * 31 + d * 7 + k));
    std::normal_distribution<float> normal;
    hidden.resize(b * d);
    weight.resize(v * d);
    bias.resize(v);
    for (auto* values : {&hidden, &weight, &bias}) {
      for (auto& x : *values) x = 0.5f * normal(random);
    }
    target.resize(b * t);
    for (auto& y : target) y = random() % 6 == 0 ? -100 : static_cast<int64_t>(random() % v);
    std::vector<double> weights(v);
    double total = 0;
    for (int64_t i = 0; i < v; ++i) total += weights[i] = 1.0 / static_cast<double>(i + 1);
    const auto mass = quantise_masses(weights.data(), v, v * 4294967296.0 / total);
    table.resize(v);
    fill_buckets(mass.get(), v, table.data());
    for (int64_t i = 0; i < v; ++i) {
      table[i].log_q_self = static_cast<float>(std::log(mass[i] / (v * 4294967296.0)));
      table[i].log_q_alias = static_cast<float>(std::log(mass[table[i].alias] / (v * 4294967296.0)));
    }
    p.batch = b;
    p.dim = d;
    p.n_targets = t;
    p.n_negatives = k;
    p.n_classes = v;
    p.hidden = hidden.data();
    p.hidden_stride = d;
    p.hidden_storage = Storage::kFloat;
    p.weight = weight.data();
    p.weight_stride = d;
    p.bias = bias.data();
    p.target = target.data();
    p.noise = Noise{NoiseKind::kAlias, v, table.data(), 0, 0, 0};
    p.seed = kSeed;
    p.seed_stride = 1;
    p.subtract_log_q = true;
    p.offset = std::log(static_cast<double>(k));
    p.remove_hits = remove;
    p.ignore_index = -100;
    p.objective = Objective{ObjectiveKind::kBinary, 1, 0, 0, true};
  }
};

bool close(double got, double wanted, double tolerance) {
  return std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted));
}

}  // namespace
