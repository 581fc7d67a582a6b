// The fused forward pass of a range of examples: draw, gather, dot, correct, objective, gradient of hidden.
//
// While a tile is computed the rows of the next one are on their way from memory, so each row is read once from there,
// and a second time, for the gradient of hidden, from the cache.
#pragma once

#include "rows.h"
#include "tiles.h"
#include "whole_example.h"

namespace nce::NCE_SIMD_NAMESPACE {

// Not inline: it is called once a tile, and its code would be there twice for every objective.
template <class Stored, class Real>
static __attribute__((noinline)) bool next_tile(TileReader<Stored, Real>& reader, Tile<Stored, Real>& tile) {
  return reader.next(tile);
}

// Scores of a tile's rows, corrected. Meanwhile the rows of the next tile are asked for.
template <class Stored, class Real>
NCE_INLINE void score_tile(const SampledLoss& p, const Tile<Stored, Real>& tile, const Tile<Stored, Real>& next,
                           bool stream, const Real* x, Real* z) {
  int r = 0;
  for (; r + 4 <= tile.count; r += 4) dot_rows<4>(tile.row + r, next.row + r, x, p.dim, stream, z + r);
  if (r + 2 <= tile.count) {
    dot_rows<2>(tile.row + r, next.row + r, x, p.dim, stream, z + r);
    r += 2;
  }
  if (r < tile.count) dot_rows<1>(tile.row + r, next.row + r, x, p.dim, stream, z + r);

  Real shift = static_cast<Real>(p.offset);
  if (p.log_z) shift += static_cast<const Real*>(p.log_z)[tile.example * p.log_z_stride];
  if (p.bias) {
    for (int i = 0; i < tile.count; ++i) z[i] += load_one(static_cast<const Stored*>(p.bias) + tile.id[i]);
  }
  for (int i = 0; i < tile.count; i += kLanes) {
    store(z + i, load(z + i) - (load(tile.correction + i) + Vec<Real>(shift)));
  }
}

// Each column by itself: loss, and derivatives in the place of the scores.
template <class Stored, class Real>
NCE_INLINE void binary_tile(const SampledLoss& p, const Tile<Stored, Real>& tile, Real* z, Real& loss) {
  alignas(64) Real live[kTileRows];
  for (int i = 0; i < kTileRows; ++i) live[i] = i < tile.count ? tile.scale : Real(0);
  for (int i = 0; i < tile.positives; ++i) live[i] *= static_cast<Real>(p.objective.positive_weight);
  for (int i = 0; i < tile.count; i += kLanes) {
    const Column<Vec<Real>> column = binary_column(load(z + i), load(tile.label + i));
    loss += sum(column.loss * load(live + i));
    store(z + i, column.dlogit * load(live + i));
  }
}

template <bool kWhole, class Stored, class Real>
NCE_INLINE void compute_tile(const SampledLoss& p, const Tile<Stored, Real>& tile, const Tile<Stored, Real>& next,
                             bool stream, const Real* x, Real* gradient, Real& loss, ExampleSums<Real>& sums) {
  alignas(64) Real z[kTileRows] = {}, weight[kTileRows];
  score_tile(p, tile, next, stream, x, z);
  if constexpr (kWhole) {
    for (int i = 0; i < tile.count; i += kLanes) store(z + i, clamp_finite(load(z + i)));
    weigh_tile(p, tile, z, weight, gradient, sums);
  } else {
    binary_tile(p, tile, z, loss);
  }
  const Real* coefficient = kWhole ? weight : z;

  if (p.dlogit) {
    const int64_t base = tile.example * (p.n_targets + p.n_negatives);
    int32_t* out_ids = p.ids + base;
    Real* out_dlogit = static_cast<Real*>(p.dlogit) + base;
    for (int i = 0; i < tile.count; ++i) {
      out_ids[tile.column[i]] = tile.id[i];
      out_dlogit[tile.column[i]] = z[i];
    }
  }
  if (p.grad_hidden) {
    int r = 0;
    for (; r + 4 <= tile.count; r += 4) add_rows<4>(tile.row + r, coefficient + r, p.dim, gradient);
    for (; r < tile.count; ++r) add_rows<1>(tile.row + r, coefficient + r, p.dim, gradient);
  }
  for (int r = tile.count; r < next.count; ++r) prefetch_row(next.row[r], p.dim, stream);
}

// Between two examples lies a whole example's worth of random rows: the processor does not foresee this one.
NCE_INLINE void prefetch_hidden(const SampledLoss& p, int64_t example) {
  constexpr int kLine = 64;
  const int64_t size = bytes_of(p.hidden_storage);
  const char* x = static_cast<const char*>(p.hidden) + example * p.hidden_stride * size;
  for (int64_t byte = 0; byte < p.dim * size; byte += kLine) __builtin_prefetch(x + byte);
}

template <bool kWhole, class Stored, class Real>
NCE_INLINE int64_t run_tiles(const SampledLoss& p, int64_t begin, int64_t end, Real* x, Real* gradient) {
  const size_t scratch_bytes = static_cast<size_t>(padded_dim(p.dim)) * sizeof(Real);
  const bool stream = streams_rows(p.dim * static_cast<int64_t>(sizeof(Stored)));
  Real loss = Real(0);
  ExampleSums<Real> sums = no_columns<Real>();
  TileReader<Stored, Real> reader{p, begin, end};
  Tile<Stored, Real> tiles[2];
  bool more = next_tile(reader, tiles[0]);
  for (int current = 0; more; current ^= 1) {
    const Tile<Stored, Real>& tile = tiles[current];
    Tile<Stored, Real>& next = tiles[current ^ 1];
    more = next_tile(reader, next);
    if (!more) next = tile;
    if (more && next.first) prefetch_hidden(p, next.example);
    if (tile.first) {
      widen_hidden(p.hidden, tile.example * p.hidden_stride, p.hidden_storage, p.dim, x);
      std::memset(gradient, 0, scratch_bytes);
      loss = Real(0);
      sums = no_columns<Real>();
    }
    compute_tile<kWhole>(p, tile, next, stream, x, gradient, loss, sums);
    if (tile.last) {
      if constexpr (kWhole) {
        finish_example(p, tile, sums, gradient);
      } else {
        static_cast<Real*>(p.loss)[tile.example] = loss;
      }
      if (p.grad_hidden) {
        std::memcpy(static_cast<Real*>(p.grad_hidden) + tile.example * p.dim, gradient, p.dim * sizeof(Real));
      }
    }
  }
  return reader.first_bad;
}

// Returns the first pair with an unusable id, or -1.
template <class Stored, class Real>
static int64_t sampled_loss(const SampledLoss& p, int64_t begin, int64_t end, void* scratch) {
  Real* x = static_cast<Real*>(scratch);
  Real* gradient = x + padded_dim(p.dim);
  return p.objective.kind == ObjectiveKind::kBinary ? run_tiles<false, Stored>(p, begin, end, x, gradient)
                                                    : run_tiles<true, Stored>(p, begin, end, x, gradient);
}

}  // namespace nce::NCE_SIMD_NAMESPACE
