// token_logprob on the CPU: log p of a label under softmax over a row of logits, and its derivative.
//
//   forward:   m = max_v x_v,  s = sum_v exp(x_v - m),  log p = (x_y - m) - log s
//   backward:  dx_v = g ([v = y] - exp(x_v - m) / s), into x's own memory if asked
//
// The forward reads memory once: a block stays in the first cache between its maximum and its sum, and the sum so far is
// rescaled where the maximum grew. m and s are kept apart because m + log s loses log s behind a large common offset.
// Threads share no row and sums have a fixed order, so the bits do not depend on the number of threads.
#include "common.h"

#include <tuple>

namespace sysdag {
namespace {

constexpr std::int64_t kLanes = 32;
constexpr std::int64_t kBlock = 2048;

struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

SYSDAG_INLINE float load(float x) { return x; }
SYSDAG_INLINE double load(double x) { return x; }
SYSDAG_INLINE float load(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

SYSDAG_INLINE void store(float* to, float x) { *to = x; }
SYSDAG_INLINE void store(double* to, double x) { *to = x; }
SYSDAG_INLINE void store(BFloat16* to, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u);
}

SYSDAG_INLINE float exponential(float x) { return fast_exp(x); }
SYSDAG_INLINE double exponential(double x) { return std::exp(x); }

template <class T>
SYSDAG_INLINE T lowest() {
  return -std::numeric_limits<T>::infinity();
}

// The last n < kLanes elements, filled up with -inf.
template <class T, class A>
SYSDAG_INLINE void padded(const T* x, std::int64_t n, A* tail) {
  for (std::int64_t j = 0; j < kLanes; ++j) tail[j] = j < n ? load(x[j]) : lowest<A>();
}

template <class T, class A>
SYSDAG_INLINE A maximum(const T* x, std::int64_t n) {
  A lane[kLanes], tail[kLanes];
  for (std::int64_t j = 0; j < kLanes; ++j) lane[j] = lowest<A>();
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const A value = load(x[i + j]);
      lane[j] = value > lane[j] ? value : lane[j];
    }
  padded(x + i, n - i, tail);
  A found = lowest<A>();
  for (std::int64_t j = 0; j < kLanes; ++j) {
    const A value = tail[j] > lane[j] ? tail[j] : lane[j];
    found = value > found ? value : found;
  }
  return found;
}

template <class T, class A>
SYSDAG_INLINE double sum_of_exponentials(const T* x, std::int64_t n, A shift) {
  A lane[kLanes], tail[kLanes];
  for (std::int64_t j = 0; j < kLanes; ++j) lane[j] = 0;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (std::int64_t j = 0; j < kLanes; ++j) lane[j] += exponential(load(x[i + j]) - shift);
  padded(x + i, n - i, tail);
  double found = 0;
  for (std::int64_t j = 0; j < kLanes; ++j) found += lane[j] + exponential(tail[j] - shift);
  return found;
}

template <class T, class A>
SYSDAG_INLINE void forward_row(const T* x, std::int64_t width, std::int64_t label, A* logp, A* stats) {
  A m = lowest<A>();
  double s = 0;
  for (std::int64_t start = 0; start < width; start += kBlock) {
    const std::int64_t n = width - start < kBlock ? width - start : kBlock;
    const A found = maximum<T, A>(x + start, n);
    if (found > m) {
      s *= std::exp(static_cast<double>(m) - static_cast<double>(found));
      m = found;
    }
    s += sum_of_exponentials<T, A>(x + start, n, m == lowest<A>() ? A(0) : m);  // -inf - (-inf) would be nan
  }
  *logp = static_cast<A>(static_cast<double>(load(x[label])) - static_cast<double>(m) - std::log(s));
  stats[0] = m;
  stats[1] = static_cast<A>(s);
}

template <class T, class A>
SYSDAG_INLINE void backward_row(const T* x, std::int64_t width, std::int64_t label, A grad, const A* stats, T* out) {
  const A m = stats[0], scale = -grad / stats[1];
  const A at_label = load(x[label]);  // before it is overwritten: `out` may be `x`
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) store(out + i, scale * exponential(load(x[i]) - m));
  store(out + label, grad + scale * std::exp(at_label - m));
}

template <class T, class A>
SYSDAG_INLINE void forward_rows(const T* x, const std::int64_t* labels, std::int64_t begin, std::int64_t end,
                                std::int64_t width, std::int64_t ignored, A* logp, A* stats) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (labels[row] == ignored) {
      logp[row] = stats[2 * row] = 0;
      stats[2 * row + 1] = 1;
    } else {
      forward_row<T, A>(x + row * width, width, labels[row], logp + row, stats + 2 * row);
    }
  }
}

template <class T, class A>
SYSDAG_INLINE void backward_rows(const T* x, const std::int64_t* labels, std::int64_t begin, std::int64_t end,
                                 std::int64_t width, std::int64_t ignored, const A* grad, const A* stats, T* out) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (labels[row] == ignored)
      std::memset(static_cast<void*>(out + row * width), 0, width * sizeof(T));
    else
      backward_row<T, A>(x + row * width, width, labels[row], grad[row], stats + 2 * row, out + row * width);
  }
}

// A template cannot be cloned for each vector width, so every element type has functions of its own.
#define SYSDAG_ROWS(T, A)                                                                                         \
  SYSDAG_VECTOR_CLONES void forward_of(const T* x, const std::int64_t* labels, std::int64_t begin,               \
                                       std::int64_t end, std::int64_t width, std::int64_t ignored, A* logp,      \
                                       A* stats) {                                                                \
    forward_rows<T, A>(x, labels, begin, end, width, ignored, logp, stats);                                       \
  }                                                                                                               \
  SYSDAG_VECTOR_CLONES void backward_of(const T* x, const std::int64_t* labels, std::int64_t begin,              \
                                        std::int64_t end, std::int64_t width, std::int64_t ignored,              \
                                        const A* grad, const A* stats, T* out) {                                  \
    backward_rows<T, A>(x, labels, begin, end, width, ignored, grad, stats, out);                                 \
  }
SYSDAG_ROWS(float, float)
SYSDAG_ROWS(double, double)
SYSDAG_ROWS(BFloat16, float)
#undef SYSDAG_ROWS

template <class T>
void forward_typed(const Tensor& logits, const Tensor& labels, std::int64_t ignored, Tensor& logp, Tensor& stats) {
  using A = typename Accumulator<T>::type;
  const auto* x = static_cast<const T*>(logits.const_data_ptr());
  const auto* y = static_cast<const std::int64_t*>(labels.const_data_ptr());
  auto* to_logp = static_cast<A*>(logp.mutable_data_ptr());
  auto* to_stats = static_cast<A*>(stats.mutable_data_ptr());
  const std::int64_t width = logits.size(1);
  torch::stable::parallel_for(0, logits.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    forward_of(x, y, begin, end, width, ignored, to_logp, to_stats);
  });
}

template <class T>
void backward_typed(const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& stats,
                    std::int64_t ignored, Tensor& out) {
  using A = typename Accumulator<T>::type;
  const auto* g = static_cast<const A*>(grad.const_data_ptr());
  const auto* x = static_cast<const T*>(logits.const_data_ptr());
  const auto* y = static_cast<const std::int64_t*>(labels.const_data_ptr());
  const auto* kept = static_cast<const A*>(stats.const_data_ptr());
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  const std::int64_t width = logits.size(1);
  torch::stable::parallel_for(0, logits.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    backward_of(x, y, begin, end, width, ignored, g, kept, to);
  });
}

using torch::headeronly::ScalarType;

void check(const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2, "token_logprob: logits must be (N, V)");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0) && labels.scalar_type() == ScalarType::Long,
                  "token_logprob: labels must be int64 (N,)");
}

// What is wrong with the arguments is said in Python, which looks for it when this raises.
std::tuple<Tensor, Tensor> token_logprob_forward(Tensor logits, Tensor labels, std::int64_t ignored) {
  check(logits, labels);
  logits = packed(logits);
  labels = packed(labels);
  const auto* y = static_cast<const std::int64_t*>(labels.const_data_ptr());
  const std::int64_t rows = logits.size(0), width = logits.size(1);
  for (std::int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(y[row] == ignored || (y[row] >= 0 && y[row] < width), "token_logprob: a label is out of range");
  const ScalarType kind = logits.scalar_type();
  const ScalarType accumulated = kind == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logp = torch::stable::new_empty(logits, {rows}, accumulated);
  Tensor stats = torch::stable::new_empty(logits, {rows, 2}, accumulated);
  if (kind == ScalarType::Float)
    forward_typed<float>(logits, labels, ignored, logp, stats);
  else if (kind == ScalarType::Double)
    forward_typed<double>(logits, labels, ignored, logp, stats);
  else if (kind == ScalarType::BFloat16)
    forward_typed<BFloat16>(logits, labels, ignored, logp, stats);
  else
    STD_TORCH_CHECK(false, "token_logprob: logits must be float32, float64 or bfloat16");
  return {logp, stats};
}

void token_logprob_backward(Tensor grad, Tensor logits, Tensor labels, Tensor stats, std::int64_t ignored, Tensor out) {
  check(logits, labels);
  STD_TORCH_CHECK(logits.is_contiguous() && labels.is_contiguous(), "token_logprob: logits and labels must be contiguous");
  STD_TORCH_CHECK(grad.is_contiguous() && stats.is_contiguous() && grad.scalar_type() == stats.scalar_type(),
                  "token_logprob: the gradient must be contiguous and of the statistics' dtype");
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == logits.scalar_type() && out.numel() == logits.numel(),
                  "token_logprob: out must be contiguous and like logits");
  const ScalarType kind = logits.scalar_type();
  if (kind == ScalarType::Float)
    backward_typed<float>(grad, logits, labels, stats, ignored, out);
  else if (kind == ScalarType::Double)
    backward_typed<double>(grad, logits, labels, stats, ignored, out);
  else if (kind == ScalarType::BFloat16)
    backward_typed<BFloat16>(grad, logits, labels, stats, ignored, out);
  else
    STD_TORCH_CHECK(false, "token_logprob: logits must be float32, float64 or bfloat16");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sysdag_C, CPU, m) {
  m.impl("token_logprob_forward", TORCH_BOX(&token_logprob_forward));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward));
}

}  // namespace sysdag
