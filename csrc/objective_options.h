// The numbers of an objective: as a schema has them, and as kernels read them.
#pragma once

#include <cstdint>
#include <string>

#include "operator.h"

namespace nce {

enum class ObjectiveKind : int32_t { kBinary = 0, kSoftmax = 1, kAdversarial = 2 };

struct Objective {
  ObjectiveKind kind;
  double positive_weight;  // kBinary, kAdversarial: factor of the targets' terms
  double label_smoothing;  // kSoftmax
  double temperature;      // kAdversarial
  bool correct_positive;   // kSoftmax: whether log q is subtracted from the target's score too
};

struct ObjectiveArguments {
  int64_t objective;
  double positive_weight, label_smoothing, temperature;
  bool correct_positive;
  using Fields = TypeList<int64_t, double, double, double, bool>;
};

// Why there is no such objective; empty if there is.
inline std::string refusal_of(const ObjectiveArguments& a) {
  if (a.objective < 0 || a.objective > 2) return "objective must be 0, 1 or 2, got " + std::to_string(a.objective);
  if (!(a.label_smoothing >= 0 && a.label_smoothing <= 1)) {
    return "label_smoothing must be in 0 .. 1, got " + std::to_string(a.label_smoothing);
  }
  if (!(a.temperature >= 0)) return "temperature must be >= 0, got " + std::to_string(a.temperature);
  if (!a.correct_positive && static_cast<ObjectiveKind>(a.objective) != ObjectiveKind::kSoftmax) {
    return "correct_positive must be True but for the softmax objective";
  }
  return "";
}

inline Objective objective_of(const ObjectiveArguments& a) {
  return {static_cast<ObjectiveKind>(a.objective), a.positive_weight, a.label_smoothing, a.temperature,
          a.correct_positive};
}

}  // namespace nce
