// Shared by every op: torch's stable ABI, run-time dispatch on the CPU's vector width, and an exponential that vectorises.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sysdag {

using torch::stable::Tensor;

// The loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SYSDAG_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SYSDAG_VECTOR_CLONES
#endif

#define SYSDAG_INLINE inline __attribute__((always_inline))

inline Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

struct Pages {
  void* start;
  std::size_t bytes;
};

// The pages of 4 KiB that lie wholly inside of a tensor's memory.
inline Pages pages_inside(const Tensor& memory) {
  constexpr std::uintptr_t kPage = 4096;
  const auto start = reinterpret_cast<std::uintptr_t>(memory.data_ptr());
  const std::uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (start + memory.numel() * memory.element_size()) / kPage * kPage;
  return {reinterpret_cast<void*>(first), last > first ? last - first : 0};
}

// Asks for huge pages under memory that nobody has touched: its first writing then takes a sixth of the time that it takes
// in pages of 4 KiB. A hint; what the system makes of it changes no result. Small tensors lie in memory that is there.
inline void advise_huge_pages(const Tensor& memory) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kLarge = 1 << 21;
  if (const Pages pages = pages_inside(memory); pages.bytes >= kLarge) madvise(pages.start, pages.bytes, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
#endif
}

// exp(x) for x <= 88, relative error below 2e-7, 0 for x < -87 (so for -inf). Cody-Waite reduction by ln 2, then a
// polynomial of degree 6 on [-ln2/2, ln2/2]; straight-line code, so that loops around it vectorise.
SYSDAG_INLINE float fast_exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyintf(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace sysdag
