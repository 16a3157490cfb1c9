// Preference loss of P pairs and its derivative with respect to every candidate's log-probability, for the CPU.
//
//   r_s = log sum_i exp(x_i) - log sum_i exp(y_i)   over the candidates i of segment s: winners 0..P-1, losers P..2P-1
//   m_p = beta (r_p - r_{P+p}),  loss_p = f(m_p),   c_i = f'(m_p) (+-beta) exp(x_i) / sum_j exp(x_j)
//
// The maxima of a segment are subtracted from each other before the logarithms of the sums are added: offsets that policy
// and reference share cost no digits. Pairs are independent, so threads change no bit.
#include "common.h"

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <vector>

namespace sysdag {
namespace {

enum Loss : std::int64_t { kSigmoid, kIpo, kHinge, kRobust };  // the order of LOSS_TYPES in sysdag/ops/preference_loss.py

// log(x) for normal x > 0, error below 2 ulp; -inf at 0, nan at nan. Cephes' polynomial on [sqrt(1/2), sqrt(2)).
SYSDAG_INLINE float fast_log(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const std::int32_t reduced = bits - exponent * (1 << 23);
  float m;
  std::memcpy(&m, &reduced, sizeof(m));
  const float z = m - 1.0f, n = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * z - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  const float y = p * z * z * z - n * 2.12194440e-4f - 0.5f * z * z;
  const float found = z + y + n * 0.693359375f;
  return x > 0.0f ? found : (x == 0.0f ? -std::numeric_limits<float>::infinity() : x);
}

SYSDAG_INLINE float exponential(float x) { return fast_exp(x); }
SYSDAG_INLINE double exponential(double x) { return std::exp(x); }
SYSDAG_INLINE double logarithm_1p(double x) { return std::log1p(x); }
SYSDAG_INLINE float logarithm_1p(float x) {  // 0 <= x <= 1; the quotient undoes the rounding of 1 + x
  const float u = 1.0f + x;
  return u == 1.0f ? x : fast_log(u) * (x / (u - 1.0f));
}

SYSDAG_VECTOR_CLONES void exp_in_place(float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = fast_exp(x[i]);
}

void exp_in_place(double* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}

// ratio += log(policy) - log(reference), and policy becomes its inverse.
SYSDAG_VECTOR_CLONES void add_logs(float* ratio, float* policy, const float* reference, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    ratio[i] += fast_log(policy[i]) - fast_log(reference[i]);
    policy[i] = 1.0f / policy[i];
  }
}

void add_logs(double* ratio, double* policy, const double* reference, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    ratio[i] += std::log(policy[i]) - std::log(reference[i]);
    policy[i] = 1.0 / policy[i];
  }
}

// Segments have few candidates: vectorised, the loops over one would spend their time on remainders. Where all have k, as
// is usual, the loops below know it (kSize = k) and unroll; kSize = 0 reads the offsets.
#if defined(__GNUC__) && !defined(__clang__)
#define SYSDAG_SHORT_LOOPS __attribute__((noinline, optimize("no-tree-loop-vectorize")))
#else
#define SYSDAG_SHORT_LOOPS
#endif

template <std::int64_t kSize>
struct Segments {
  const std::int64_t* offsets;
  SYSDAG_INLINE std::int64_t begin(std::int64_t s) const { return kSize ? offsets[0] + s * kSize : offsets[s]; }
  SYSDAG_INLINE std::int64_t size(std::int64_t s) const { return kSize ? kSize : offsets[s + 1] - offsets[s]; }
};

// Subtracts from each segment its maximum (0 where all are -inf, or where there are none).
template <typename T, std::int64_t kSize>
SYSDAG_SHORT_LOOPS void shift_by_maxima(const T* x, Segments<kSize> segments, std::int64_t n, T* shifted, T* maxima) {
  for (std::int64_t s = 0; s < n; ++s) {
    const std::int64_t at = segments.begin(s), size = segments.size(s);
    T top = -std::numeric_limits<T>::infinity();
    for (std::int64_t i = 0; i < size; ++i) top = x[at + i] > top ? x[at + i] : top;
    top = std::abs(top) == std::numeric_limits<T>::infinity() ? T(0) : top;
    for (std::int64_t i = 0; i < size; ++i) shifted[at + i] = x[at + i] - top;
    maxima[s] = top;
  }
}

template <typename T, std::int64_t kSize>
SYSDAG_SHORT_LOOPS void sum_segments(const T* x, Segments<kSize> segments, std::int64_t n, T* total) {
  for (std::int64_t s = 0; s < n; ++s) {
    const std::int64_t at = segments.begin(s), size = segments.size(s);
    T found = 0;
    for (std::int64_t i = 0; i < size; ++i) found += x[at + i];
    total[s] = found;
  }
}

// A candidate of probability 0 has derivative 0, also where the whole segment has probability 0.
template <typename T, std::int64_t kSize>
SYSDAG_SHORT_LOOPS void scale_segments(T* x, Segments<kSize> segments, std::int64_t n, const T* slope, const T* inverse) {
  for (std::int64_t s = 0; s < n; ++s) {
    const std::int64_t at = segments.begin(s), size = segments.size(s);
    const T scale = slope[s] * inverse[s];
    for (std::int64_t i = 0; i < size; ++i) x[at + i] = x[at + i] == 0 ? T(0) : x[at + i] * scale;
  }
}

// Log-ratios r of n segments, and 1 / sum of the policy's exponentials, which stay in `weights`.
template <typename T, std::int64_t kSize>
void log_ratios(const T* policy, const T* reference, Segments<kSize> segments, std::int64_t n, T* weights, T* ratio,
                T* inverse, std::vector<T>& scratch) {
  const std::int64_t first = segments.offsets[0], count = segments.offsets[n] - first;
  scratch.resize(count + n);
  T* shifted = scratch.data() - first;  // indexed as the candidates are
  T* of_segment = scratch.data() + count;
  shift_by_maxima(policy, segments, n, weights, ratio);
  shift_by_maxima(reference, segments, n, shifted, of_segment);
  for (std::int64_t s = 0; s < n; ++s) ratio[s] -= of_segment[s];
  exp_in_place(weights + first, count);
  exp_in_place(scratch.data(), count);
  sum_segments(weights, segments, n, inverse);
  sum_segments(shifted, segments, n, of_segment);
  add_logs(ratio, inverse, of_segment, n);
}

// The losses of n pairs. The log-ratios become the loss's derivatives with respect to them.
template <typename T, Loss kLoss>
SYSDAG_INLINE void pair_losses(T* winner, T* loser, const T* winner_length, const T* loser_length, T* loss, std::int64_t n,
                               T beta, T e) {
  const T scale = kLoss == kRobust ? 1 / (1 - 2 * e) : T(1), sign = kLoss == kRobust ? T(-1) : T(1);
  for (std::int64_t p = 0; p < n; ++p) {
    if constexpr (kLoss == kIpo) {
      const T a = winner_length && winner_length[p] > 1 ? winner_length[p] : T(1);
      const T b = loser_length && loser_length[p] > 1 ? loser_length[p] : T(1);
      const T d = winner[p] / a - loser[p] / b - 1 / (2 * beta);
      loss[p] = d * d;
      winner[p] = 2 * d / a;
      loser[p] = -2 * d / b;
      continue;
    }
    const T m = beta * (winner[p] - loser[p]);
    T slope;
    if constexpr (kLoss == kHinge) {
      loss[p] = m >= 1 ? T(0) : 1 - m;
      slope = m >= 1 ? T(0) : T(-1);
    } else {
      const T small = exponential(m < 0 ? m : -m), rest = logarithm_1p(small), share = 1 / (1 + small);
      const T wrong = rest + (m < 0 ? -m : T(0));                          // -log sigmoid(m)
      const T flipped = e == 0 ? T(0) : e * (rest + (m > 0 ? m : T(0)));  // -e log sigmoid(-m)
      const T miss = (m < 0 ? T(1) : small) * share, hit = (m < 0 ? small : T(1)) * share;
      loss[p] = scale * ((1 - e) * wrong + sign * flipped);
      slope = scale * (sign * e * hit - (1 - e) * miss);
    }
    winner[p] = beta * slope;
    loser[p] = -beta * slope;
  }
}

// One function for each loss and type, so that the loops over fp32 vectorise.
#define SYSDAG_PAIR_LOSSES(NAME, ATTRIBUTE, T, LOSS)                                                                  \
  ATTRIBUTE void NAME(T* winner, T* loser, const T* winner_length, const T* loser_length, T* loss, std::int64_t n, T beta, \
                      T e) {                                                                                          \
    pair_losses<T, LOSS>(winner, loser, winner_length, loser_length, loss, n, beta, e);                               \
  }
SYSDAG_PAIR_LOSSES(sigmoid_losses, SYSDAG_VECTOR_CLONES, float, kSigmoid)
SYSDAG_PAIR_LOSSES(robust_losses, SYSDAG_VECTOR_CLONES, float, kRobust)
SYSDAG_PAIR_LOSSES(hinge_losses, SYSDAG_VECTOR_CLONES, float, kHinge)
SYSDAG_PAIR_LOSSES(ipo_losses, , float, kIpo)
SYSDAG_PAIR_LOSSES(sigmoid_losses, , double, kSigmoid)
SYSDAG_PAIR_LOSSES(robust_losses, , double, kRobust)
SYSDAG_PAIR_LOSSES(hinge_losses, , double, kHinge)
SYSDAG_PAIR_LOSSES(ipo_losses, , double, kIpo)
#undef SYSDAG_PAIR_LOSSES

template <typename T>
struct Problem {
  const T* policy;
  const T* reference;
  const T* lengths;  // or none
  const std::int64_t* offsets;
  std::int64_t pairs, candidates;
  T beta, smoothing;
  std::int64_t loss;
};

template <typename T, std::int64_t kSize>
void forward(const Problem<T>& in, T* loss, T* coefficients) {
  using Losses = void (*)(T*, T*, const T*, const T*, T*, std::int64_t, T, T);
  const Losses losses = std::array<Losses, 4>{sigmoid_losses, ipo_losses, hinge_losses, robust_losses}.at(in.loss);
  const std::int64_t pairs = in.pairs;
  const std::unique_ptr<T[]> of_segment(new T[4 * pairs]);
  T* ratio = of_segment.get();  // then the slope of the loss with respect to it
  T* inverse = ratio + 2 * pairs;
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 * pairs / std::max<std::int64_t>(in.candidates, 1));
  torch::stable::parallel_for(0, pairs, grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<T> scratch;
    const std::int64_t n = end - begin;
    const auto from = [&](std::int64_t s) { return Segments<kSize>{in.offsets + s}; };
    for (std::int64_t s : {begin, pairs + begin})
      log_ratios(in.policy, in.reference, from(s), n, coefficients, ratio + s, inverse + s, scratch);
    losses(ratio + begin, ratio + pairs + begin, in.lengths ? in.lengths + begin : nullptr,
           in.lengths ? in.lengths + pairs + begin : nullptr, loss + begin, n, in.beta, in.smoothing);
    for (std::int64_t s : {begin, pairs + begin}) scale_segments(coefficients, from(s), n, ratio + s, inverse + s);
  });
}

// The size that all segments share, 0 if they differ. Raises unless the offsets rise from 0 to `total`.
std::int64_t common_size(const std::int64_t* offsets, std::int64_t segments, std::int64_t total) {
  const std::int64_t size = segments ? offsets[1] - offsets[0] : 0;
  bool rises = offsets[0] == 0 && offsets[segments] == total, same = true;
  for (std::int64_t s = 0; s < segments; ++s) {
    rises &= offsets[s] <= offsets[s + 1];
    same &= offsets[s + 1] - offsets[s] == size;
  }
  STD_TORCH_CHECK(rises, "offsets: they must rise from 0 to ", total);
  return same ? size : 0;
}

template <typename T>
void forward(const Tensor& logps, const Tensor& ref_logps, const Tensor& offsets, const std::optional<Tensor>& lengths,
             double beta, std::int64_t loss, double smoothing, Tensor& loss_out, Tensor& coefficients) {
  const auto* starts = static_cast<const std::int64_t*>(offsets.data_ptr());
  const Problem<T> in{static_cast<const T*>(logps.data_ptr()), static_cast<const T*>(ref_logps.data_ptr()),
                      lengths ? static_cast<const T*>(lengths->data_ptr()) : nullptr, starts, loss_out.numel(),
                      logps.numel(), static_cast<T>(beta), static_cast<T>(smoothing), loss};
  T* values = static_cast<T*>(loss_out.data_ptr());
  T* slopes = static_cast<T*>(coefficients.data_ptr());
  switch (common_size(starts, 2 * in.pairs, in.candidates)) {
    case 1: return forward<T, 1>(in, values, slopes);
    case 2: return forward<T, 2>(in, values, slopes);
    case 4: return forward<T, 4>(in, values, slopes);
    case 8: return forward<T, 8>(in, values, slopes);
    default: return forward<T, 0>(in, values, slopes);
  }
}

// Floating tensors share a dtype, float or double; offsets (2P+1,) int64; lengths (2P,) or none. What the sizes ought to
// be is said in Python, which looks for the reason when this raises.
std::tuple<Tensor, Tensor> preference_loss(Tensor logps, Tensor ref_logps, Tensor offsets, std::optional<Tensor> lengths,
                                           double beta, std::int64_t loss, double smoothing) {
  const std::int64_t segments = offsets.numel() - 1;
  const auto type = logps.scalar_type();
  STD_TORCH_CHECK(logps.dim() == 1 && ref_logps.dim() == 1 && ref_logps.numel() == logps.numel() && offsets.dim() == 1 &&
                      segments % 2 == 0 && (!lengths || (lengths->dim() == 1 && lengths->numel() == segments)),
                  "preference_loss: the shapes do not fit");
  STD_TORCH_CHECK(ref_logps.scalar_type() == type && (!lengths || lengths->scalar_type() == type) &&
                      offsets.scalar_type() == torch::headeronly::ScalarType::Long,
                  "preference_loss: the dtypes do not fit");
  logps = packed(logps);
  ref_logps = packed(ref_logps);
  offsets = packed(offsets);
  if (lengths) lengths = packed(*lengths);
  Tensor loss_out = torch::stable::new_empty(logps, {segments / 2});
  Tensor coefficients = torch::stable::empty_like(logps);
  if (type == torch::headeronly::ScalarType::Double) {
    forward<double>(logps, ref_logps, offsets, lengths, beta, loss, smoothing, loss_out, coefficients);
  } else {
    STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Float, "preference_loss: fp32 or fp64 is expected");
    forward<float>(logps, ref_logps, offsets, lengths, beta, loss, smoothing, loss_out, coefficients);
  }
  return {loss_out, coefficients};
}

template <typename T>
void backward(const Tensor& grad, const Tensor& coefficients, const Tensor& offsets, Tensor& out) {
  const std::int64_t pairs = grad.numel(), stride = pairs > 0 ? grad.stride(0) : 0;  // a mean's gradient has stride 0
  const T* g = static_cast<const T*>(grad.data_ptr());
  const T* c = static_cast<const T*>(coefficients.data_ptr());
  const auto* starts = static_cast<const std::int64_t*>(offsets.data_ptr());
  T* to = static_cast<T*>(out.data_ptr());
  for (std::int64_t s = 0; s < 2 * pairs; ++s) {
    const T scale = g[(s < pairs ? s : s - pairs) * stride];
    for (std::int64_t i = starts[s]; i < starts[s + 1]; ++i) to[i] = scale * c[i];
  }
}

// The gradient of the pairs' losses, brought to the candidates.
Tensor preference_loss_backward(Tensor grad, Tensor coefficients, Tensor offsets) {
  coefficients = packed(coefficients);
  offsets = packed(offsets);
  STD_TORCH_CHECK(grad.dim() == 1 && offsets.dim() == 1 && offsets.numel() == 2 * grad.numel() + 1,
                  "preference_loss_backward: the shapes do not fit");
  STD_TORCH_CHECK(grad.scalar_type() == coefficients.scalar_type() &&
                      offsets.scalar_type() == torch::headeronly::ScalarType::Long,
                  "preference_loss_backward: the dtypes do not fit");
  common_size(static_cast<const std::int64_t*>(offsets.data_ptr()), 2 * grad.numel(), coefficients.numel());
  Tensor out = torch::stable::empty_like(coefficients);
  if (coefficients.scalar_type() == torch::headeronly::ScalarType::Double) {
    backward<double>(grad, coefficients, offsets, out);
  } else {
    backward<float>(grad, coefficients, offsets, out);
  }
  return out;
}

}  // namespace
}  // namespace sysdag

STABLE_TORCH_LIBRARY_IMPL(sysdag_C, CPU, m) {
  m.impl("preference_loss", TORCH_BOX(&sysdag::preference_loss));
  m.impl("preference_loss_backward", TORCH_BOX(&sysdag::preference_loss_backward));
}
