// The fused forward pass of a range of examples: draw, gather, dot, correct, objective, gradient of hidden.
//
// Work comes in tiles of up to 32 candidate rows of one example. While a tile is computed the rows of the next one
// are on their way from memory, so each row is read once from there, and a second time, for the gradient of hidden,
// from the cache.
#pragma once

#include "../objective.h"
#include "../sampled_loss.h"
#include "kernels.h"
#include "sample_kernel.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

constexpr int kTileRows = 2 * kLanes;  // what happens once a tile takes as long as one row

template <class Stored, class Real>
struct Tile {
  static constexpr int kSlack = kTileRows + kLanes;  // 16 candidates are written at once, from any row on

  int64_t example;
  bool first, last;  // of its example
  int count;         // live candidates; masked ones are left out
  Real scale;        // 1, or 1 / number of candidates
  const Stored* row[kSlack];
  int32_t id[kSlack];
  uint32_t column[kSlack];
  alignas(64) Real correction[kSlack];
  alignas(64) Real label[kTileRows];
};

// Long rows come in smaller tiles: two tiles must stay in the second-level cache, together with what else is there.
template <class Stored>
NCE_INLINE int64_t rows_per_tile(int64_t dim) {
  constexpr int64_t kTileBytes = 96 * 1024;
  const int64_t fit = kTileBytes / ((dim > 0 ? dim : 1) * static_cast<int64_t>(sizeof(Stored))) / 4 * 4;
  return fit < 4 ? 4 : fit > kTileRows ? kTileRows : fit;
}

template <class Stored>
NCE_INLINE int64_t tiles_per_example(const SampledLoss& p) {
  const int64_t rows = rows_per_tile<Stored>(p.dim);
  return (p.n_targets + p.n_negatives + rows - 1) / rows;
}

// Walks the candidates of examples begin .. end - 1 tile by tile.
template <class Stored, class Real>
struct TileReader {
  const SampledLoss& p;
  int64_t example, end;
  int64_t n_tiles = tiles_per_example<Stored>(p);
  DrawStream draws{p.noise, read_seed(p.seed, p.seed_stride), p.n_negatives};
  int64_t column = 0;
  int64_t tile_index = 0;
  int64_t n_positive = 0;
  int64_t first_bad = -1;  // pair whose id is out of range, or has no log q; it is masked, never read

  // Examples without a target get their outputs here, and no tile. False when there is nothing left.
  NCE_INLINE_LAMBDA inline bool next(Tile<Stored, Real>& tile) {
    while (column == 0 && example < end) {
      const int64_t* target = p.target + example * p.n_targets;
      n_positive = 0;
      for (int64_t t = 0; t < p.n_targets; ++t) n_positive += target[t] != p.ignore_index;
      if (n_positive > 0) break;
      skip_example();
      ++example;
    }
    if (example >= end) return false;

    const int64_t n_columns = p.n_targets + p.n_negatives;
    const int64_t tile_end = (++tile_index * n_columns) / n_tiles;  // even tiles: each fetches as much as the next uses
    tile.example = example;
    tile.first = column == 0;
    tile.last = tile_end == n_columns;
    tile.scale = p.mean_candidates ? Real(1) / static_cast<Real>(n_positive + p.n_negatives) : Real(1);
    tile.count = 0;
    for (int i = 0; i < kTileRows; ++i) {
      tile.row[i] = static_cast<const Stored*>(p.weight);  // those beyond count may be prefetched
      tile.correction[i] = tile.label[i] = Real(0);
    }
    for (; column < tile_end && column < p.n_targets; ++column) add_target(tile);
    while (column < tile_end) {
      const int64_t part_end = column + kLanes < tile_end ? column + kLanes : tile_end;
      add_negatives(tile, part_end);
      column = part_end;
    }
    if (tile.last) {
      column = tile_index = 0;
      ++example;
    }
    if (p.bias) {
      for (int i = 0; i < tile.count; ++i) __builtin_prefetch(static_cast<const Stored*>(p.bias) + tile.id[i]);
    }
    return true;
  }

  inline void skip_example() {
    const int64_t n_columns = p.n_targets + p.n_negatives;
    static_cast<Real*>(p.loss)[example] = Real(0);
    if (p.ids) {
      for (int64_t c = 0; c < n_columns; ++c) p.ids[example * n_columns + c] = -1;
      std::memset(static_cast<Real*>(p.dlogit) + example * n_columns, 0, n_columns * sizeof(Real));
    }
    if (p.grad_hidden) std::memset(static_cast<Real*>(p.grad_hidden) + example * p.dim, 0, p.dim * sizeof(Real));
  }

  inline void mask(int64_t masked_column, int32_t id) {
    if (!p.ids) return;
    const int64_t pair = example * (p.n_targets + p.n_negatives) + masked_column;
    p.ids[pair] = id;
    static_cast<Real*>(p.dlogit)[pair] = Real(0);
  }

  NCE_INLINE_LAMBDA inline bool in_range(int64_t id) const { return id >= 0 && id < p.n_classes; }

  NCE_INLINE_LAMBDA inline void reject(int64_t at) {
    mask(at, -1);
    if (first_bad < 0) first_bad = example * (p.n_targets + p.n_negatives) + at;
  }

  NCE_INLINE_LAMBDA inline void add(Tile<Stored, Real>& tile, int64_t at, int64_t id, Real log_q, Real label) {
    const int i = tile.count++;
    tile.id[i] = static_cast<int32_t>(id);
    tile.column[i] = static_cast<uint32_t>(at);
    tile.row[i] = static_cast<const Stored*>(p.weight) + id * p.weight_stride;
    tile.correction[i] = p.subtract_log_q ? log_q : Real(0);
    tile.label[i] = label;
  }

  NCE_INLINE_LAMBDA inline void add_target(Tile<Stored, Real>& tile) {
    const int64_t at = example * p.n_targets + column, id = p.target[at];
    if (id == p.ignore_index) return mask(column, -1);
    if (!in_range(id)) return reject(column);
    Real q = Real(0);
    if (p.target_log_q) {
      q = static_cast<const Real*>(p.target_log_q)[at];
    } else if (p.subtract_log_q) {
      q = log_q(p.noise, id);
    }
    if (!std::isfinite(q)) return reject(column);
    add(tile, column, id, q, p.uniform_labels ? Real(1) / static_cast<Real>(n_positive) : Real(1));
  }

  NCE_INLINE_LAMBDA inline bool is_hit(int64_t id) const {
    const int64_t* target = p.target + example * p.n_targets;
    for (int64_t t = 0; t < p.n_targets; ++t) {
      if (target[t] == id && target[t] != p.ignore_index) return true;
    }
    return false;
  }

  NCE_INLINE_LAMBDA inline void add_negatives(Tile<Stored, Real>& tile, int64_t tile_end) {
    const int64_t slot = column - p.n_targets;
    const int n = static_cast<int>(tile_end - column);
    int32_t id[kLanes] = {};
    Real q[kLanes] = {};
    bool all_live = p.negatives ? read_negatives(slot, n, id, q) : draw_negatives(slot, n, id, q);
    if (p.remove_hits) {
      for (int i = 0; i < n; ++i) all_live &= !is_hit(id[i]);
    }
    if (all_live) return append(tile, n, id, q);
    for (int i = 0; i < n; ++i) {
      if (id[i] < 0) {
        reject(column + i);
      } else if (p.remove_hits && is_hit(id[i])) {
        mask(column + i, id[i]);
      } else {
        add(tile, column + i, id[i], q[i], Real(0));
      }
    }
  }

  // Negatives from `column` on, none of them masked.
  NCE_INLINE_LAMBDA inline void append(Tile<Stored, Real>& tile, int n, const int32_t* id, const Real* q) {
    const Stored* weight = static_cast<const Stored*>(p.weight);
    const int64_t stride = p.weight_stride;
    const uint32_t first = static_cast<uint32_t>(column);
    const int count = tile.count;
    for (int i = 0; i < kLanes; ++i) {
      tile.row[count + i] = weight + id[i] * stride;
      tile.id[count + i] = id[i];
      tile.column[count + i] = first + i;
      tile.correction[count + i] = q[i];
    }
    tile.count = count + n;
  }

  // False if an id is out of range or without a log q; it becomes -1.
  NCE_INLINE_LAMBDA inline bool read_negatives(int64_t slot, int n, int32_t* id, Real* q) const {
    bool all_usable = true;
    for (int i = 0; i < n; ++i) {
      const int64_t given = p.negatives[example * p.negatives_stride + slot + i];
      bool usable = in_range(given);
      if (usable && p.negative_log_q) {
        q[i] = static_cast<const Real*>(p.negative_log_q)[example * p.negative_log_q_stride + slot + i];
      } else if (usable && p.subtract_log_q) {
        q[i] = static_cast<Real>(log_q(p.noise, given));
      }
      usable = usable && std::isfinite(q[i]);
      id[i] = usable ? static_cast<int32_t>(given) : -1;
      all_usable &= usable;
    }
    return all_usable;
  }

  NCE_INLINE_LAMBDA inline bool draw_negatives(int64_t slot, int n, int32_t* id, Real* q) {
    const Noise noise = p.noise;  // a copy, which no store can change
    for (int i = 0; i < n;) {
      const DrawStream::Run run = draws.from(example, slot + i);
      const int end = run.count < n - i ? i + static_cast<int>(run.count) : n;
      const uint64_t* bits = run.bits;
      if (noise.kind == NoiseKind::kUniform) {
        for (; i < end; ++i) {
          id[i] = static_cast<int32_t>(bucket_of(noise, *bits++).index);
          q[i] = static_cast<Real>(noise.log_q_uniform);
        }
      } else {
        for (; i < end; ++i) {
          const Draw drawn = draw(noise, *bits++);
          id[i] = drawn.id;
          q[i] = static_cast<Real>(drawn.log_q);
        }
      }
    }
    if (!p.subtract_log_q) std::memset(q, 0, kLanes * sizeof(Real));
    return true;
  }
};

// Asks for 16 elements of a row from `row` on. The rows of the next tile are asked for between the arithmetic on this
// one: a burst would fill the queue of outstanding misses first and leave it empty afterwards. Streamed rows leave no
// copy in the outer caches.
template <class Stored>
NCE_INLINE void prefetch_lanes(const Stored* row, bool stream) {
  constexpr int kLine = 64;
  for (int byte = 0; byte < kLanes * static_cast<int>(sizeof(Stored)); byte += kLine) {
    if (stream) {
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 0);
    } else {
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
    }
  }
}

template <class Stored>
NCE_INLINE void prefetch_row(const Stored* row, int64_t dim, bool stream) {
  for (int64_t d = 0; d < dim; d += kLanes) prefetch_lanes(row + d, stream);
}

// A row of storage as `padded_dim` compute values, zero beyond dim.
template <class Stored, class Real>
NCE_INLINE void widen(const Stored* row, int64_t dim, Real* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d));
  if (d < dim) store(out + d, load_first(row + d, dim - d));
}

template <class Real>
NCE_INLINE void widen_hidden(const void* hidden, int64_t offset, Storage storage, int64_t dim, Real* out) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    widen(static_cast<const double*>(hidden) + offset, dim, out);
  } else if (storage == Storage::kFloat) {
    widen(static_cast<const float*>(hidden) + offset, dim, out);
  } else if (storage == Storage::kBFloat16) {
    widen(static_cast<const BFloat16*>(hidden) + offset, dim, out);
  } else {
    widen(static_cast<const Half*>(hidden) + offset, dim, out);
  }
}

// z[r] = <x, row[r]> for kRows rows at once, so that x is loaded once for all of them. As many rows of the next tile
// are asked for meanwhile.
template <int kRows, class Stored, class Real>
NCE_INLINE void dot_rows(const Stored* const* row, const Stored* const* next, const Real* x, int64_t dim, bool stream,
                         Real* z) {
  Vec<Real> sums[kRows];
  unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { sums[r] = Vec<Real>(Real(0)); });
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Vec<Real> xs = load(x + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { sums[r] = fma(load(row[r] + d), xs, sums[r]); });
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { prefetch_lanes(next[r] + d, stream); });
  }
  if (d < dim) {
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { __builtin_prefetch(next[r] + dim - 1); });
    const Vec<Real> xs = load(x + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { sums[r] = fma(load_first(row[r] + d, dim - d), xs, sums[r]); });
  }
  unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { z[r] = sum(sums[r]); });
}

// gradient += sum_r coefficient[r] * row[r]
template <int kRows, class Stored, class Real>
NCE_INLINE void add_rows(const Stored* const* row, const Real* coefficient, int64_t dim, Real* gradient) {
  Vec<Real> c[kRows];
  unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { c[r] = Vec<Real>(coefficient[r]); });
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec<Real> g = load(gradient + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { g = fma(c[r], load(row[r] + d), g); });
    store(gradient + d, g);
  }
  if (d < dim) {
    Vec<Real> g = load(gradient + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { g = fma(c[r], load_first(row[r] + d, dim - d), g); });
    store(gradient + d, g);
  }
}

template <bool kGradHidden, class Stored, class Real>
NCE_INLINE void compute_tile(const SampledLoss& p, const Tile<Stored, Real>& tile, const Tile<Stored, Real>& next,
                             bool stream, const Real* x, Real* gradient, Real& loss) {
  alignas(64) Real z[kTileRows] = {}, live[kTileRows], dlogit[kTileRows];
  int r = 0;
  for (; r + 4 <= tile.count; r += 4) dot_rows<4>(tile.row + r, next.row + r, x, p.dim, stream, z + r);
  if (r + 2 <= tile.count) {
    dot_rows<2>(tile.row + r, next.row + r, x, p.dim, stream, z + r);
    r += 2;
  }
  if (r < tile.count) dot_rows<1>(tile.row + r, next.row + r, x, p.dim, stream, z + r);

  Real shift = static_cast<Real>(p.offset);
  if (p.log_z) shift += static_cast<const Real*>(p.log_z)[tile.example * p.log_z_stride];
  for (int i = 0; i < kTileRows; ++i) live[i] = i < tile.count ? tile.scale : Real(0);
  if (p.bias) {
    for (int i = 0; i < tile.count; ++i) z[i] += load_one(static_cast<const Stored*>(p.bias) + tile.id[i]);
  }
  for (int i = 0; i < tile.count; i += kLanes) {
    const Vec<Real> corrected = load(z + i) - (load(tile.correction + i) + Vec<Real>(shift));
    const Column<Vec<Real>> column = binary_column(corrected, load(tile.label + i));
    loss += sum(column.loss * load(live + i));
    store(dlogit + i, column.dlogit * load(live + i));
  }

  if (p.dlogit) {
    const int64_t base = tile.example * (p.n_targets + p.n_negatives);
    int32_t* out_ids = p.ids + base;
    Real* out_dlogit = static_cast<Real*>(p.dlogit) + base;
    for (int i = 0; i < tile.count; ++i) {
      out_ids[tile.column[i]] = tile.id[i];
      out_dlogit[tile.column[i]] = dlogit[i];
    }
  }
  if constexpr (kGradHidden) {
    for (r = 0; r + 4 <= tile.count; r += 4) add_rows<4>(tile.row + r, dlogit + r, p.dim, gradient);
    for (; r < tile.count; ++r) add_rows<1>(tile.row + r, dlogit + r, p.dim, gradient);
  }
  for (r = tile.count; r < next.count; ++r) prefetch_row(next.row[r], p.dim, stream);
}

// Between two examples lies a whole example's worth of random rows: the processor does not foresee this one.
NCE_INLINE void prefetch_hidden(const SampledLoss& p, int64_t example) {
  constexpr int kLine = 64;
  const int64_t size = bytes_of(p.hidden_storage);
  const char* x = static_cast<const char*>(p.hidden) + example * p.hidden_stride * size;
  for (int64_t byte = 0; byte < p.dim * size; byte += kLine) __builtin_prefetch(x + byte);
}

template <bool kGradHidden, class Stored, class Real>
NCE_INLINE int64_t run_tiles(const SampledLoss& p, int64_t begin, int64_t end, Real* x, Real* gradient) {
  const size_t scratch_bytes = static_cast<size_t>(padded_dim(p.dim)) * sizeof(Real);
  const bool stream = streams_rows(p.dim * static_cast<int64_t>(sizeof(Stored)));
  Real loss = Real(0);
  TileReader<Stored, Real> reader{p, begin, end};
  Tile<Stored, Real> tiles[2];
  bool more = reader.next(tiles[0]);
  for (int current = 0; more; current ^= 1) {
    const Tile<Stored, Real>& tile = tiles[current];
    Tile<Stored, Real>& next = tiles[current ^ 1];
    more = reader.next(next);
    if (!more) next = tile;
    if (more && next.first) prefetch_hidden(p, next.example);
    if (tile.first) {
      widen_hidden(p.hidden, tile.example * p.hidden_stride, p.hidden_storage, p.dim, x);
      std::memset(gradient, 0, scratch_bytes);
      loss = Real(0);
    }
    compute_tile<kGradHidden>(p, tile, next, stream, x, gradient, loss);
    if (tile.last) {
      static_cast<Real*>(p.loss)[tile.example] = loss;
      if constexpr (kGradHidden) {
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
  return p.grad_hidden ? run_tiles<true, Stored>(p, begin, end, x, gradient)
                       : run_tiles<false, Stored>(p, begin, end, x, gradient);
}

}  // namespace nce::NCE_SIMD_NAMESPACE
