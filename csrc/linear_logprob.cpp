// Folds of a tile of logits for sysdag/ops/linear_logprob.py. A tile z (R, C) is the head's product for R rows and the
// tokens [start, start + C); with b the bias and c the softcap, a row's logits are
//     x = cap(scale z + b),   cap(u) = c tanh(u / c),   slope(x) = dx/du = 1 - (x / c)^2.
//   stats: top <- max(top, max x), total <- total rescaled + sum exp(x - top), chosen[m] <- x at label m
//   unit:  the same, and z <- exp(x - top) slope(x), 0 at the row's labels, acc <- acc rescaled to the new top
//   slope: out <- dloss/du = -G p slope(x), (g_m - G p) slope(x) at label m, with p = exp(x - top) / total
// The labels of row r are labels[offsets[r] : offsets[r + 1]]. A row fits in L1 or L2, so that it is read once from farther away.
#include "common.h"

#include <algorithm>
#include <optional>

namespace sysdag {
namespace {

constexpr std::int64_t kLanes = 64;  // partial sums side by side: a reduction in a fixed order that vectorises

SYSDAG_INLINE float exponential(float x) { return fast_exp(x); }
SYSDAG_INLINE double exponential(double x) { return std::exp(x); }

// Cephes: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
SYSDAG_INLINE float hyperbolic_tangent(float x) {
  const float magnitude = std::fabs(x), square = x * x;
  const float far = 1.0f - 2.0f / (fast_exp(2.0f * std::min(magnitude, 20.0f)) + 1.0f);
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  return magnitude < 0.625f ? near : std::copysign(far, x);
}
SYSDAG_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }

template <typename T>
struct Head {
  T scale, cap;   // cap 0: none
  const T* bias;  // of the tile's tokens, or null

  bool plain() const { return scale == T(1) && cap == T(0) && bias == nullptr; }
};

// x for one row, in place or elsewhere.
template <typename T>
SYSDAG_INLINE void logits_row(const T* z, T* x, std::int64_t n, const Head<T>& head) {
  if (head.bias != nullptr) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = z[i] * head.scale + head.bias[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) x[i] = z[i] * head.scale;
  }
  if (head.cap != T(0)) {
    const T inverse = T(1) / head.cap;
    for (std::int64_t i = 0; i < n; ++i) x[i] = head.cap * hyperbolic_tangent(x[i] * inverse);
  }
}

template <typename T>
SYSDAG_INLINE T max_row(const T* x, std::int64_t n) {
  T lanes[kLanes];
  for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] = -std::numeric_limits<T>::infinity();
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  T top = lanes[0];
  for (std::int64_t j = 1; j < kLanes; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

template <typename T>
SYSDAG_INLINE T lanes_sum(T* lanes) {
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// sum exp(x - base)
template <typename T>
SYSDAG_INLINE T exp_sum_row(const T* x, std::int64_t n, T base) {
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] += exponential(x[i + j] - base);
  }
  for (; i < n; ++i) lanes[0] += exponential(x[i] - base);
  return lanes_sum(lanes);
}

// The same, and x <- exp(x - base).
template <typename T>
SYSDAG_INLINE T exp_row(T* x, std::int64_t n, T base) {
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const T e = exponential(x[i + j] - base);
      x[i + j] = e;
      lanes[j] += e;
    }
  }
  for (; i < n; ++i) {
    x[i] = exponential(x[i] - base);
    lanes[0] += x[i];
  }
  return lanes_sum(lanes);
}

// The same, and x <- exp(x - base) slope(x).
template <typename T>
SYSDAG_INLINE T exp_slope_row(T* x, std::int64_t n, T base, T cap) {
  T lanes[kLanes] = {};
  const T inverse = T(1) / cap;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const T e = exponential(x[i + j] - base), t = x[i + j] * inverse;
      x[i + j] = e * (T(1) - t * t);
      lanes[j] += e;
    }
  }
  for (; i < n; ++i) {
    const T e = exponential(x[i] - base), t = x[i] * inverse;
    x[i] = e * (T(1) - t * t);
    lanes[0] += e;
  }
  return lanes_sum(lanes);
}

template <typename T>
struct Tile {
  T* z;
  std::int64_t columns, start;
  Head<T> head;
  const std::int64_t *offsets, *labels;
  T *top, *total, *chosen;  // of rows, rows and labels
};

template <typename T>
SYSDAG_INLINE void take_labels(const Tile<T>& tile, std::int64_t row, const T* x) {
  for (std::int64_t m = tile.offsets[row]; m < tile.offsets[row + 1]; ++m) {
    const std::int64_t column = tile.labels[m] - tile.start;
    if (column >= 0 && column < tile.columns) tile.chosen[m] = x[column];
  }
}

constexpr std::int64_t kBlock = 1024;  // of a row, where its logits are written beside the tile

template <typename T>
SYSDAG_INLINE void stats_rows(const Tile<T>& tile, std::int64_t begin, std::int64_t end) {
  T scratch[kBlock];
  const bool plain = tile.head.plain();
  const std::int64_t step = plain ? tile.columns : kBlock;
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t first = 0; first < tile.columns; first += step) {
      Tile<T> block = tile;
      block.columns = std::min(step, tile.columns - first);
      block.start += first;
      const T* x = tile.z + row * tile.columns + first;
      if (!plain) {
        Head<T> head = tile.head;
        if (head.bias != nullptr) head.bias += first;
        logits_row(x, scratch, block.columns, head);
        x = scratch;
      }
      take_labels(block, row, x);
      const T before = tile.top[row], now = std::max(before, max_row(x, block.columns));
      const T base = now == -std::numeric_limits<T>::infinity() ? T(0) : now;
      tile.total[row] = tile.total[row] * exponential(before - base) + exp_sum_row(x, block.columns, base);
      tile.top[row] = now;
    }
  }
}

template <typename T>
SYSDAG_INLINE void unit_rows(const Tile<T>& tile, T* acc, std::int64_t width, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    T* x = tile.z + row * tile.columns;
    if (!tile.head.plain()) logits_row(x, x, tile.columns, tile.head);
    take_labels(tile, row, x);
    const T before = tile.top[row], now = std::max(before, max_row(x, tile.columns));
    const T base = now == -std::numeric_limits<T>::infinity() ? T(0) : now;
    const T rescale = exponential(before - base);
    const T sum = tile.head.cap == T(0) ? exp_row(x, tile.columns, base)
                                        : exp_slope_row(x, tile.columns, base, tile.head.cap);
    tile.total[row] = tile.total[row] * rescale + sum;
    tile.top[row] = now;
    for (std::int64_t m = tile.offsets[row]; m < tile.offsets[row + 1]; ++m) {
      const std::int64_t column = tile.labels[m] - tile.start;
      if (column >= 0 && column < tile.columns) x[column] = T(0);
    }
    if (rescale != T(1)) {
      T* to = acc + row * width;
      for (std::int64_t i = 0; i < width; ++i) to[i] *= rescale;
    }
  }
}

template <typename T>
struct Slope {
  const T *grads, *row_grads;
  T* out;  // may be the tile's z
};

template <typename T>
SYSDAG_INLINE void slope_rows(const Tile<T>& tile, const Slope<T>& slope, std::int64_t begin, std::int64_t end) {
  const T cap = tile.head.cap, inverse = cap == T(0) ? T(0) : T(1) / cap;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = tile.z + row * tile.columns;
    T* out = slope.out + row * tile.columns;
    if (!tile.head.plain()) {
      logits_row(x, out, tile.columns, tile.head);
      x = out;
    }
    const T top = tile.top[row], g = -slope.row_grads[row] / tile.total[row];
    if (cap == T(0)) {
      for (std::int64_t i = 0; i < tile.columns; ++i) out[i] = g * exponential(x[i] - top);
    } else {
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        const T t = x[i] * inverse;
        out[i] = g * exponential(x[i] - top) * (T(1) - t * t);
      }
    }
    for (std::int64_t m = tile.offsets[row]; m < tile.offsets[row + 1]; ++m) {
      const std::int64_t column = tile.labels[m] - tile.start;
      const T t = cap == T(0) ? T(0) : tile.chosen[m] * inverse;
      if (column >= 0 && column < tile.columns) {
        out[column] = (slope.grads[m] + g * exponential(tile.chosen[m] - top)) * (T(1) - t * t);
      }
    }
  }
}

// out = -G unit + sum_m coefficient_m W[label_m]
template <typename T>
struct Combine {
  const T *unit, *weight, *coefficients, *row_grads;
  const std::int64_t *offsets, *labels;
  T* out;
  std::int64_t width;
};

template <typename T>
SYSDAG_INLINE void combine_rows(const Combine<T>& c, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* unit = c.unit + row * c.width;
    T* out = c.out + row * c.width;
    const T g = -c.row_grads[row];
    for (std::int64_t i = 0; i < c.width; ++i) out[i] = g * unit[i];
    for (std::int64_t m = c.offsets[row]; m < c.offsets[row + 1]; ++m) {
      const T* w = c.weight + c.labels[m] * c.width;
      const T coefficient = c.coefficients[m];
      for (std::int64_t i = 0; i < c.width; ++i) out[i] += coefficient * w[i];
    }
  }
}

using Range = std::int64_t;
SYSDAG_VECTOR_CLONES void stats(const Tile<float>& t, Range a, Range b) { stats_rows(t, a, b); }
SYSDAG_VECTOR_CLONES void unit(const Tile<float>& t, float* acc, Range n, Range a, Range b) { unit_rows(t, acc, n, a, b); }
SYSDAG_VECTOR_CLONES void slope(const Tile<float>& t, const Slope<float>& s, Range a, Range b) { slope_rows(t, s, a, b); }
SYSDAG_VECTOR_CLONES void combine(const Combine<float>& c, Range a, Range b) { combine_rows(c, a, b); }
void stats(const Tile<double>& t, Range a, Range b) { stats_rows(t, a, b); }
void unit(const Tile<double>& t, double* acc, Range n, Range a, Range b) { unit_rows(t, acc, n, a, b); }
void slope(const Tile<double>& t, const Slope<double>& s, Range a, Range b) { slope_rows(t, s, a, b); }
void combine(const Combine<double>& c, Range a, Range b) { combine_rows(c, a, b); }

template <typename T>
T* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "linear_logprob: tensors must be contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

constexpr std::int64_t kWork = 1 << 15;  // elements worth another thread

std::int64_t grain(std::int64_t columns) { return std::max<std::int64_t>(1, kWork / std::max<std::int64_t>(columns, 1)); }

// A tile's arguments as they come, checked and given their type.
struct Call {
  const Tensor& z;
  double scale;
  const std::optional<Tensor>& bias;
  double softcap;
  std::int64_t start;
  const Tensor &offsets, &labels, &top, &total, &chosen;

  template <typename T>
  Tile<T> tile() const {
    const T* added = bias ? data<T>(*bias) : nullptr;
    STD_TORCH_CHECK(offsets.numel() == z.size(0) + 1, "linear_logprob: offsets must have one element more than z has rows");
    return {data<T>(z), z.size(1), start, {static_cast<T>(scale), static_cast<T>(softcap), added},
            data<std::int64_t>(offsets), data<std::int64_t>(labels), data<T>(top), data<T>(total), data<T>(chosen)};
  }

  template <typename F>
  void each(const F& rows) const {
    torch::stable::parallel_for(0, z.size(0), grain(z.size(1)), rows);
  }

  bool is_double() const { return z.scalar_type() == torch::headeronly::ScalarType::Double; }
};

void linear_logprob_stats(Tensor z, double scale, std::optional<Tensor> bias, double softcap, std::int64_t start,
                          Tensor offsets, Tensor labels, Tensor top, Tensor total, Tensor chosen) {
  const Call call{z, scale, bias, softcap, start, offsets, labels, top, total, chosen};
  const auto run = [&](const auto& tile) { call.each([&](Range a, Range b) { stats(tile, a, b); }); };
  call.is_double() ? run(call.tile<double>()) : run(call.tile<float>());
}

void linear_logprob_unit(Tensor z, double scale, std::optional<Tensor> bias, double softcap, std::int64_t start,
                         Tensor offsets, Tensor labels, Tensor top, Tensor total, Tensor chosen, Tensor acc) {
  const Call call{z, scale, bias, softcap, start, offsets, labels, top, total, chosen};
  const auto run = [&](const auto& tile, auto* to) {
    call.each([&](Range a, Range b) { unit(tile, to, acc.size(1), a, b); });
  };
  call.is_double() ? run(call.tile<double>(), data<double>(acc)) : run(call.tile<float>(), data<float>(acc));
}

void linear_logprob_slope(Tensor z, double scale, std::optional<Tensor> bias, double softcap, std::int64_t start,
                          Tensor offsets, Tensor labels, Tensor top, Tensor total, Tensor chosen, Tensor grads,
                          Tensor row_grads, Tensor out) {
  const Call call{z, scale, bias, softcap, start, offsets, labels, top, total, chosen};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Tile<T> tile = call.tile<T>();
    const Slope<T> to{data<T>(grads), data<T>(row_grads), data<T>(out)};
    call.each([&](Range a, Range b) { slope(tile, to, a, b); });
  };
  call.is_double() ? run(0.0) : run(0.0f);
}

void linear_logprob_combine(Tensor unit, Tensor weight, Tensor offsets, Tensor labels, Tensor coefficients,
                            Tensor row_grads, Tensor out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Combine<T> c{data<T>(unit), data<T>(weight), data<T>(coefficients), data<T>(row_grads),
                       data<std::int64_t>(offsets), data<std::int64_t>(labels), data<T>(out), out.size(1)};
    torch::stable::parallel_for(0, out.size(0), grain(out.size(1)), [&](Range a, Range b) { combine(c, a, b); });
  };
  out.scalar_type() == torch::headeronly::ScalarType::Double ? run(0.0) : run(0.0f);
}

// Gives the pages that lie wholly inside of `memory` back to the system; what they held is gone.
void discard_pages(Tensor memory) {
#if defined(__linux__) && defined(MADV_DONTNEED)
  if (const Pages pages = pages_inside(memory); pages.bytes) madvise(pages.start, pages.bytes, MADV_DONTNEED);
#else
  static_cast<void>(memory);
#endif
}

}  // namespace
}  // namespace sysdag

STABLE_TORCH_LIBRARY_IMPL(sysdag_C, CPU, m) {
  m.impl("advise_huge_pages", TORCH_BOX(&sysdag::advise_huge_pages));
  m.impl("discard_pages", TORCH_BOX(&sysdag::discard_pages));
  m.impl("linear_logprob_stats", TORCH_BOX(&sysdag::linear_logprob_stats));
  m.impl("linear_logprob_unit", TORCH_BOX(&sysdag::linear_logprob_unit));
  m.impl("linear_logprob_slope", TORCH_BOX(&sysdag::linear_logprob_slope));
  m.impl("linear_logprob_combine", TORCH_BOX(&sysdag::linear_logprob_combine));
}
