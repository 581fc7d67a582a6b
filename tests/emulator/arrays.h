// numpy arrays as the kernels' bindings take and give them.
//
// Arrays are read where they lie, and outputs and scratch have exactly the size that a kernel may touch, so that
// AddressSanitizer sees every access out of bounds. Both are poisoned: outputs by 0x7F, which is neither an id nor NaN,
// since -1 and NaN are results; scratch by 0xFF, which is NaN.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace emulated {

using Array = std::optional<py::array>;
using Shape = std::vector<py::ssize_t>;

inline void check(bool valid, const std::string& what) {
  if (!valid) throw std::invalid_argument(what);
}

// bfloat16 is held as uint16, which numpy has.
inline Storage storage_of(const std::string& name, const py::dtype& type) {
  if (type.is(py::dtype::of<float>())) return Storage::kFloat;
  if (type.is(py::dtype::of<double>())) return Storage::kDouble;
  if (type.is(py::dtype::of<uint16_t>())) return Storage::kBFloat16;
  check(type.char_() == 'e', name + " must be float32, float64, float16 or uint16");
  return Storage::kHalf;
}

inline py::dtype dtype_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return py::dtype::of<float>();
    case Storage::kDouble:
      return py::dtype::of<double>();
    case Storage::kBFloat16:
      return py::dtype::of<uint16_t>();
    default:
      return py::dtype("e");
  }
}

inline Storage compute_of(Storage storage) { return storage == Storage::kDouble ? storage : Storage::kFloat; }

// Distance in elements between what the first index tells apart.
inline int64_t stride_of(const std::string& name, const py::array& a) {
  check(a.strides(0) % a.itemsize() == 0, name + " must lie a whole number of elements apart");
  return a.strides(0) / a.itemsize();
}

inline void check_rows(const std::string& name, const py::array& a, int64_t dim) {
  check(a.ndim() == 2 && a.shape(1) == dim, name + " must have two dimensions, the last of D");
  check(dim <= 1 || a.size() == 0 || a.strides(1) == a.itemsize(), name + " must have rows of adjacent elements");
}

inline const void* contiguous(const std::string& name, const py::array& a, const py::dtype& type, const Shape& shape) {
  check(a.dtype().is(type), name + " has the wrong dtype");
  check(Shape(a.shape(), a.shape() + a.ndim()) == shape, name + " has the wrong shape");
  check((a.flags() & py::array::c_style) != 0, name + " must be contiguous");
  return a.data();
}

template <class T>
const T* contiguous(const std::string& name, const py::array& a, const Shape& shape) {
  return static_cast<const T*>(contiguous(name, a, py::dtype::of<T>(), shape));
}

inline py::array poisoned(const py::dtype& type, const Shape& shape) {
  py::array a(type, shape);
  std::memset(a.mutable_data(), 0x7F, static_cast<size_t>(a.nbytes()));
  return a;
}

// Scratch of exactly `bytes`, poisoned by NaN.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(size_t bytes) : memory_(static_cast<unsigned char*>(::operator new(bytes))) {
    std::memset(memory_.get(), 0xFF, bytes);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete(p); }
  };
  std::unique_ptr<unsigned char[], Free> memory_;
};

// Pairs as the library's kernels sort and number them, and all that their sums need; by rank of a class unless
// by_class.
struct PairsOfArrays {
  PairsOfArrays(const py::array& ids, const py::array& dlogit, const py::array& grad_loss, const py::array& hidden,
                int64_t n_classes, int64_t tile_pairs, bool with_rows, bool by_class, const Launch& how);

  RowGradTiles p{};
  Storage hidden_storage;
  int64_t n_segments = 0, n_padded;  // n_padded: as many as there can be
  Scratch numbers, classes, pairs, counts, partial_rows, partial_bias;
};

// p.segment_class[s] = class of segment s.
void list_segments(const RowGradTiles& p, int64_t n_rows, const Launch& how);

void bind_row_grad(py::module_& m);
void bind_row_step(py::module_& m);
void bind_scatter_step(py::module_& m);
void bind_shared_loss(py::module_& m);

}  // namespace emulated
