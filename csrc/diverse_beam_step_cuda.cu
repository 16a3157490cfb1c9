// The one pass over the logits of a step of beam search, for NVIDIA GPUs: every row's normaliser and `count` best tokens.
//
// One block a row. Each warp walks over its share of the row, 32 lanes side by side, and keeps two things: in every lane a
// running maximum m and sum of exp(x - m); across the lanes a list of its best, sorted, as 64-bit keys
//
//   key = ordered(x) << 32 | (2^32 - 1 - token)
//
// where `ordered` maps floats to integers of the same order: a larger key is a larger logit, or the lower token of equal
// logits. A ballot finds the keys above the list's last one; of random logits nearly none after the first few rounds, so
// most rounds cost a load, an exponential and a vote. At the end the first warp takes in the lists of the others, in
// their order. All keys differ, so the order of insertion leaves no trace: the same bits from run to run, no atomics.
#include "common.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

namespace sysdag {
namespace {

using Key = unsigned long long;
constexpr int kWarp = 32;
constexpr int kWarps = 16;
constexpr int kUnroll = 4;  // loads in flight of a lane
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ Key key_of(float x, unsigned token) {
  const unsigned bits = __float_as_uint(x);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | (0xffffffffu - token);
}

__device__ __forceinline__ float value_of(Key key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The `count` largest keys that a warp has met: position slot * 32 + lane, largest first, 0 where there is none yet.
template <int kSlots>
struct List {
  Key slots[kSlots];
  Key bar;  // the count-th: what a key must exceed
  int count;

  __device__ explicit List(int count) : bar(0), count(count) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) slots[s] = 0;
  }

  // Called by all lanes with the same key.
  __device__ void insert(Key key) {
    const int lane = threadIdx.x % kWarp;
    int place = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) place += __popc(__ballot_sync(kAll, slots[s] > key));
    Key carried = 0;  // the last of the slot before
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const Key last = __shfl_sync(kAll, slots[s], kWarp - 1);
      Key before = __shfl_up_sync(kAll, slots[s], 1);
      if (lane == 0) before = carried;
      const int here = s * kWarp + lane;
      slots[s] = here < place ? slots[s] : here == place ? key : before;
      carried = last;
      if (s == (count - 1) / kWarp) bar = __shfl_sync(kAll, slots[s], (count - 1) % kWarp);
    }
  }

  // Takes in one key of each lane; 0 is none.
  __device__ void offer(Key key) {
    for (unsigned left = __ballot_sync(kAll, key > bar); left != 0; left &= left - 1) {
      const Key next = __shfl_sync(kAll, key, __ffs(left) - 1);
      if (next > bar) insert(next);
    }
  }
};

__device__ __forceinline__ float scaled(float total, float from, float to) {
  return total == 0.0f ? 0.0f : total * expf(from - to);  // a lane that met nothing has maximum -inf
}

template <typename T, int kSlots>
__global__ void __launch_bounds__(kWarps * kWarp)
    top_log_probs_kernel(const T* logits, float* log_probs, std::int64_t* tokens, int V, std::int64_t row_stride, int count) {
  extern __shared__ Key lists[];  // (kWarps, count)
  __shared__ float maxima[kWarps], totals[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* row = logits + blockIdx.x * row_stride;
  constexpr float kNone = -INFINITY;

  List<kSlots> list(count);
  float maximum = kNone, total = 0.0f;
  for (int start = warp * kUnroll * kWarp; start < V; start += kWarps * kUnroll * kWarp) {
    float x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int token = start + j * kWarp + lane;
      x[j] = token < V ? widened(row[token]) : kNone;
    }
    float higher = maximum;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) higher = fmaxf(higher, x[j]);
    const float shift = higher == kNone ? 0.0f : higher;
    total = scaled(total, maximum, shift);
    maximum = higher;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      total += expf(x[j] - shift);
      const int token = start + j * kWarp + lane;
      list.offer(token < V ? key_of(x[j], token) : 0);
    }
  }

#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const float other = __shfl_xor_sync(kAll, maximum, width), others = __shfl_xor_sync(kAll, total, width);
    const float higher = fmaxf(maximum, other);
    // The lane's own first or its partner's: both add the same two numbers.
    total = scaled(total, maximum, higher) + scaled(others, other, higher);
    maximum = higher;
  }
  if (lane == 0) {
    maxima[warp] = maximum;
    totals[warp] = total;
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    if (s * kWarp + lane < count) lists[warp * count + s * kWarp + lane] = list.slots[s];
  __syncthreads();
  if (warp != 0) return;

  for (int other = 1; other < kWarps; ++other)
    for (int at = 0; at < count; at += kWarp) list.offer(at + lane < count ? lists[other * count + at + lane] : 0);
  maximum = maxima[0];
  for (int other = 1; other < kWarps; ++other) maximum = fmaxf(maximum, maxima[other]);
  total = 0.0f;
  for (int other = 0; other < kWarps; ++other) total += scaled(totals[other], maxima[other], maximum);
  const float log_sum = logf(total);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int rank = s * kWarp + lane;
    if (rank >= count) continue;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * count + rank;
    log_probs[at] = maximum == kNone ? NAN : (value_of(list.slots[s]) - maximum) - log_sum;
    tokens[at] = 0xffffffffu - static_cast<unsigned>(list.slots[s]);
  }
}

template <typename T>
void launch(const Tensor& logits, Tensor& log_probs, Tensor& tokens, int count, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(logits.size(0));
  const std::size_t shared = sizeof(Key) * kWarps * count;  // 32 KB for the longest list
  const T* data = static_cast<const T*>(logits.data_ptr());
  float* values = static_cast<float*>(log_probs.data_ptr());
  auto* places = static_cast<std::int64_t*>(tokens.data_ptr());
  const int V = static_cast<int>(logits.size(1));
  const std::int64_t stride = logits.stride(0);
  const auto run = [&](auto kernel) {
    kernel<<<rows, kWarps * kWarp, shared, stream>>>(data, values, places, V, stride, count);
  };
  if (count <= kWarp) {
    run(top_log_probs_kernel<T, 1>);
  } else if (count <= 2 * kWarp) {
    run(top_log_probs_kernel<T, 2>);
  } else {
    run(top_log_probs_kernel<T, 8>);
  }
}

// logits (N, V), the last dimension contiguous; count <= min(V, 256). Returns (N, count) fp32 and int64.
std::tuple<Tensor, Tensor> top_log_probs(Tensor logits, std::int64_t count) {
  using torch::headeronly::ScalarType;
  const std::int64_t rows = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(count >= 1 && count <= V && count <= 8 * kWarp && V <= INT32_MAX, "count: 1 to 256 and at most V");
  if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor log_probs = torch::stable::new_empty(logits, {rows, count}, ScalarType::Float);
  Tensor tokens = torch::stable::new_empty(logits, {rows, count}, ScalarType::Long);
  if (rows == 0) return {log_probs, tokens};
  void* stream = nullptr;
  const auto found = aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream);
  STD_TORCH_CHECK(found == AOTI_TORCH_SUCCESS, "top_log_probs: torch names no current stream");
  const auto on = static_cast<cudaStream_t>(stream);
  switch (logits.scalar_type()) {
    case ScalarType::Float: launch<float>(logits, log_probs, tokens, static_cast<int>(count), on); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(logits, log_probs, tokens, static_cast<int>(count), on); break;
    case ScalarType::Half: launch<__half>(logits, log_probs, tokens, static_cast<int>(count), on); break;
    default: STD_TORCH_CHECK(false, "logits: fp32, bf16 or fp16 is expected");
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "top_log_probs: ", cudaGetErrorString(error));
  return {log_probs, tokens};
}

}  // namespace
}  // namespace sysdag

STABLE_TORCH_LIBRARY_IMPL(sysdag_C, CUDA, m) { m.impl("top_log_probs", TORCH_BOX(&sysdag::top_log_probs)); }
