// The candidates of examples, drawn or given, checked and masked, in tiles of up to 32 rows of one example.
#pragma once

#include "../example_objective.h"
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
  bool first, last;    // of its example
  int count;           // live candidates; masked ones are left out
  int positives;       // of them targets, which come first
  int64_t n_positive;  // targets of the example
  Real log_rest;       // log(1 - q) of its last target
  Real scale;          // 1, or 1 / number of candidates
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
  Real log_not_target = Real(0);
  // What dlogit is where there is no column. Objectives over the whole example keep scores there till its end.
  Real masked_value = p.objective.kind == ObjectiveKind::kBinary ? Real(0) : -infinity_of<Real>();
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
    tile.n_positive = n_positive;
    for (int i = 0; i < kTileRows; ++i) {
      tile.row[i] = static_cast<const Stored*>(p.weight);  // those beyond count may be prefetched
      tile.correction[i] = tile.label[i] = Real(0);
    }
    for (; column < tile_end && column < p.n_targets; ++column) add_target(tile);
    tile.positives = tile.count;
    tile.log_rest = log_not_target;
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
    static_cast<Real*>(p.dlogit)[pair] = masked_value;
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
    if (!p.objective.correct_positive) {
      log_not_target = log_rest(q);
      q = Real(0);
    }
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

  // False if an alias is out of range; it becomes -1.
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
    // Whatever is in an alias table, no row beyond the weight's is read.
    uint32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = larger(largest, static_cast<uint32_t>(id[i]));
    if (static_cast<int64_t>(largest) < p.n_classes) return true;
    for (int i = 0; i < n; ++i) id[i] = in_range(id[i]) ? id[i] : -1;
    return false;
  }
};

}  // namespace nce::NCE_SIMD_NAMESPACE
