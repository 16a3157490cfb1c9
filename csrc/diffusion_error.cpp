// diffusion_error on the CPU: sum over a sample's elements of (eps - policy)^2 - (eps - reference)^2, and its derivative.
//
//   forward:   e_b = sum_i mask_i [(eps_i - policy_i)^2 - (eps_i - reference_i)^2]
//   backward:  dpolicy_i = -2 g_b mask_i (eps_i - policy_i)
//
// The sums run over blocks of fixed size, in fp32 lanes within a block and in fp64 over blocks, so the bits do not depend
// on the number of threads. A sample is cut into chunks of blocks, so that a few large samples occupy all threads.
#include "common.h"

#include <vector>

namespace sysdag {
namespace {

constexpr std::int64_t kLanes = 32;
constexpr std::int64_t kBlock = 1024;
constexpr std::int64_t kChunk = 32 * kBlock;

template <class T>
SYSDAG_INLINE T term(T eps, T policy, T reference, T mask, bool has_reference, bool has_mask) {
  const T own = eps - policy;
  // a^2 - b^2 = (a - b)(a + b): exact to rounding where policy and reference are close, and the squares cancel.
  const T value = has_reference ? (reference - policy) * (own + (eps - reference)) : own * own;
  return has_mask ? (mask == T(0) ? T(0) : value * mask) : value;  // what is masked may be nan
}

template <class T, bool R, bool M>
SYSDAG_INLINE double sum_of(const T* eps, const T* policy, const T* reference, const T* mask, std::int64_t count) {
  double total = 0;
  for (std::int64_t start = 0; start < count; start += kBlock) {
    const std::int64_t end = start + kBlock < count ? start + kBlock : count;
    T lane[kLanes];
    for (std::int64_t j = 0; j < kLanes; ++j) lane[j] = 0;
    std::int64_t i = start;
    for (; i + kLanes <= end; i += kLanes)
      for (std::int64_t j = 0; j < kLanes; ++j)
        lane[j] += term<T>(eps[i + j], policy[i + j], R ? reference[i + j] : T(0), M ? mask[i + j] : T(0), R, M);
    for (std::int64_t j = 0; i < end; ++i, ++j)
      lane[j] += term<T>(eps[i], policy[i], R ? reference[i] : T(0), M ? mask[i] : T(0), R, M);
    double block = 0;
    for (std::int64_t j = 0; j < kLanes; ++j) block += lane[j];
    total += block;
  }
  return total;
}

template <class T>
SYSDAG_INLINE double sum_any(const T* eps, const T* policy, const T* reference, const T* mask, std::int64_t count) {
  if (reference && mask) return sum_of<T, true, true>(eps, policy, reference, mask, count);
  if (reference) return sum_of<T, true, false>(eps, policy, reference, mask, count);
  if (mask) return sum_of<T, false, true>(eps, policy, reference, mask, count);
  return sum_of<T, false, false>(eps, policy, reference, mask, count);
}

template <class T>
SYSDAG_INLINE void gradient_any(const T* eps, const T* policy, const T* mask, T factor, std::int64_t count, T* out) {
  if (mask)
    for (std::int64_t i = 0; i < count; ++i)
      out[i] = mask[i] == T(0) ? T(0) : factor * mask[i] * (eps[i] - policy[i]);
  else
    for (std::int64_t i = 0; i < count; ++i) out[i] = factor * (eps[i] - policy[i]);
}

// A template cannot be cloned for each vector width, so every element type has functions of its own.
#define SYSDAG_CHUNKS(T)                                                                                          \
  SYSDAG_VECTOR_CLONES double chunk_sum(const T* eps, const T* policy, const T* reference, const T* mask,        \
                                        std::int64_t count) {                                                     \
    return sum_any<T>(eps, policy, reference, mask, count);                                                       \
  }                                                                                                               \
  SYSDAG_VECTOR_CLONES void chunk_gradient(const T* eps, const T* policy, const T* mask, T factor,               \
                                           std::int64_t count, T* out) {                                          \
    gradient_any<T>(eps, policy, mask, factor, count, out);                                                       \
  }
SYSDAG_CHUNKS(float)
SYSDAG_CHUNKS(double)
#undef SYSDAG_CHUNKS

// A chunk of one sample: calls f(sample, first element of the whole tensor, how many) for the chunks of [begin, end).
template <class F>
void for_chunks(std::int64_t begin, std::int64_t end, std::int64_t size, std::int64_t chunks, const F& f) {
  for (std::int64_t k = begin; k < end; ++k) {
    const std::int64_t sample = k / chunks, start = (k % chunks) * kChunk;
    f(k, sample, sample * size + start, start + kChunk < size ? kChunk : size - start);
  }
}

template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
const T* offset(const T* start, std::int64_t by) {
  return start ? start + by : nullptr;
}

template <class T>
void forward_typed(const Tensor& eps, const Tensor& policy, const std::optional<Tensor>& reference,
                   const std::optional<Tensor>& mask, Tensor& out) {
  const std::int64_t samples = eps.size(0), size = samples ? eps.numel() / samples : 0;
  const std::int64_t chunks = (size + kChunk - 1) / kChunk;
  const auto* e = static_cast<const T*>(eps.const_data_ptr());
  const auto* p = static_cast<const T*>(policy.const_data_ptr());
  const T *r = pointer<T>(reference), *m = pointer<T>(mask);
  std::vector<double> parts(samples * chunks);
  torch::stable::parallel_for(0, samples * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for_chunks(begin, end, size, chunks, [&](std::int64_t k, std::int64_t, std::int64_t at, std::int64_t count) {
      parts[k] = chunk_sum(e + at, p + at, offset(r, at), offset(m, at), count);
    });
  });
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  for (std::int64_t b = 0; b < samples; ++b) {
    double total = 0;
    for (std::int64_t k = 0; k < chunks; ++k) total += parts[b * chunks + k];
    to[b] = static_cast<T>(total);
  }
}

template <class T>
void backward_typed(const Tensor& grad, const Tensor& eps, const Tensor& policy, const std::optional<Tensor>& mask,
                    Tensor& out) {
  const std::int64_t samples = eps.size(0), size = samples ? eps.numel() / samples : 0;
  const std::int64_t chunks = (size + kChunk - 1) / kChunk;
  const auto* g = static_cast<const T*>(grad.const_data_ptr());
  const auto* e = static_cast<const T*>(eps.const_data_ptr());
  const auto* p = static_cast<const T*>(policy.const_data_ptr());
  const T* m = pointer<T>(mask);
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, samples * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for_chunks(begin, end, size, chunks, [&](std::int64_t, std::int64_t b, std::int64_t at, std::int64_t count) {
      chunk_gradient(e + at, p + at, offset(m, at), T(-2) * g[b], count, to + at);
    });
  });
}

using torch::headeronly::ScalarType;

// What is wrong with the arguments is said in Python, which looks for it when this raises.
void check(const Tensor& eps, const Tensor& other) {
  bool fits = eps.dim() > 0 && eps.dim() == other.dim() && eps.scalar_type() == other.scalar_type();
  for (std::int64_t i = 0; fits && i < eps.dim(); ++i) fits = eps.size(i) == other.size(i);
  STD_TORCH_CHECK(fits, "diffusion_error: tensors must have one shape (B, ...) and one dtype");
}

Tensor checked(const Tensor& eps, const Tensor& other) {
  check(eps, other);
  return packed(other);
}

Tensor diffusion_error(Tensor eps, Tensor policy, std::optional<Tensor> reference, std::optional<Tensor> mask) {
  policy = checked(eps, policy);
  if (reference) reference = checked(eps, *reference);
  if (mask) mask = checked(eps, *mask);
  eps = packed(eps);
  Tensor out = torch::stable::new_empty(eps, {eps.size(0)});
  if (eps.scalar_type() == ScalarType::Float)
    forward_typed<float>(eps, policy, reference, mask, out);
  else if (eps.scalar_type() == ScalarType::Double)
    forward_typed<double>(eps, policy, reference, mask, out);
  else
    STD_TORCH_CHECK(false, "diffusion_error: tensors must be float32 or float64");
  return out;
}

Tensor diffusion_error_backward(Tensor grad, Tensor eps, Tensor policy, std::optional<Tensor> mask) {
  policy = checked(eps, policy);
  if (mask) mask = checked(eps, *mask);
  eps = packed(eps);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == eps.size(0) && grad.scalar_type() == eps.scalar_type(),
                  "diffusion_error: the gradient must be contiguous (B,) of the tensors' dtype");
  Tensor out = torch::stable::empty_like(policy);
  // Where memory is short, the system may take longer to find hundreds of huge pages than small ones cost.
  constexpr std::int64_t kMost = 64 << 20;
  if (out.numel() * out.element_size() <= kMost) advise_huge_pages(out);
  if (eps.scalar_type() == ScalarType::Float)
    backward_typed<float>(grad, eps, policy, mask, out);
  else if (eps.scalar_type() == ScalarType::Double)
    backward_typed<double>(grad, eps, policy, mask, out);
  else
    STD_TORCH_CHECK(false, "diffusion_error: tensors must be float32 or float64");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sysdag_C, CPU, m) {
  m.impl("diffusion_error", TORCH_BOX(&diffusion_error));
  m.impl("diffusion_error_backward", TORCH_BOX(&diffusion_error_backward));
}

}  // namespace sysdag
