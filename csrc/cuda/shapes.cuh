// How a row is laid out over lanes: chosen by the storage type and D alone, so that no result depends on the size of
// the batch.
#pragma once

#include <cstdint>

#include "pack.cuh"

namespace nce::cuda {

constexpr int64_t kMaxDim = 16384;

// kGroup lanes hold a row, kVectors vectors of 16 bytes each, and have kRows rows in flight. kBlocks blocks are to fit
// on a multiprocessor: it bounds the registers, and was chosen as the largest that spills none. kSplit: all warps of a
// block share a row. kHold: rows and gradient stay in registers; else a row is read a second time, from the cache, and
// its gradient is summed up in memory, kVectors at a time.
template <int kVectors_, int kGroup_, int kRows_, int kBlocks_, bool kSplit_ = false, bool kHold_ = true>
struct RowShape {
  static constexpr int kVectors = kVectors_, kGroup = kGroup_, kRows = kRows_, kBlocks = kBlocks_;
  static constexpr bool kSplit = kSplit_, kHold = kHold_;
  static constexpr int kThreads = kSplit ? 512 : 128;  // of a block, at most
  // Whether a tile may hold the candidates of several examples: with long rows the draw of one's is little beside them.
  static constexpr bool kSeveral = !kSplit && kVectors == 1;
  static constexpr int kVectorsPerWarp = kVectors * kGroup;
};

// What a kernel of the forward pass is for: the binary objective, or the objectives over the whole example.
enum class Purpose : int { kBinary, kWhole };

// Reading by less than 16 bytes takes more registers, and so do an example's sums beside many rows at once, most where
// many groups of lanes are to be told of them.
template <class Shape, Access kAccess, Purpose kPurpose>
constexpr int blocks_for() {
  constexpr bool kWide = kAccess == Access::kBytes16, kMany = Shape::kRows == 8;
  int fewer = kWide ? 0 : 2;
  if (kMany && kPurpose == Purpose::kWhole && Shape::kBlocks > 3) fewer += kWide && Shape::kGroup == 8 ? 2 : 1;
  return Shape::kBlocks > fewer ? Shape::kBlocks - fewer : 1;
}

// Calls f(shape, warps of a block) with the shape for rows of `dim` elements, 1 .. kMaxDim.
template <class Stored, class F>
auto with_row_shape(int64_t dim, F&& f) {
  const int64_t vectors = (dim + kPerVector<Stored> - 1) / kPerVector<Stored>;
  const auto split = [&](auto shape) {
    constexpr int64_t kEach = decltype(shape)::kVectorsPerWarp;
    return f(shape, static_cast<int>((vectors + kEach - 1) / kEach));
  };
  constexpr int kWarps = 4;
  if constexpr (sizeof(Stored) == 8) {
    if (vectors <= 64) return f(RowShape<2, 32, 4, 4>{}, kWarps);
    if (vectors <= 1024) return split(RowShape<2, 32, 2, 1, true>{});
    return f(RowShape<1, 32, 2, 1, true, false>{}, 16);
  } else if constexpr (sizeof(Stored) == 4) {
    if (vectors <= 8) return f(RowShape<1, 8, 8, 6>{}, kWarps);
    if (vectors <= 16) return f(RowShape<1, 16, 8, 6>{}, kWarps);
    if (vectors <= 32) return f(RowShape<1, 32, 8, 6>{}, kWarps);
    if (vectors <= 64) return f(RowShape<2, 32, 4, 5>{}, kWarps);
    if (vectors <= 96) return f(RowShape<3, 32, 4, 4>{}, kWarps);
    if (vectors <= 128) return f(RowShape<4, 32, 2, 4>{}, kWarps);
    if (vectors <= 2048) return split(RowShape<4, 32, 2, 1, true>{});
    return split(RowShape<8, 32, 1, 1, true>{});
  } else {
    if (vectors <= 8) return f(RowShape<1, 8, 8, 3>{}, kWarps);
    if (vectors <= 16) return f(RowShape<1, 16, 8, 4>{}, kWarps);
    if (vectors <= 32) return f(RowShape<1, 32, 8, 4>{}, kWarps);
    if (vectors <= 64) return f(RowShape<2, 32, 4, 4>{}, kWarps);
    if (vectors <= 128) return f(RowShape<4, 32, 2, 3>{}, kWarps);
    return split(RowShape<4, 32, 2, 1, true>{});
  }
}

}  // namespace nce::cuda
