// One step of diverse beam search with Hamming or n-gram diversity, for the CPU.
//
// Token v after beam k of group g scores  s[g,k] + log_softmax(x[g,k])[v] - penalty * n,  n the number of beams of earlier
// groups that chose v in this step; with n-grams, that hold the n-gram which v would end. Those groups chose at most
// (G-1)K tokens in this step, and what followed a beam's last n-1 tokens in their histories is there to be counted: so a
// row's penalised tokens are at most a known number P, and a penalty only lowers: the M best of a group lie among the
// M + P best of each of its rows. So one pass over the logits gives every row's normaliser and a list that holds its
// M + P best; the groups then choose in turn from the lists.
//
// The lists hold more: every element that is, when it is met, greater than the (M+P)-th best before it. An element that
// is not listed has M unpenalised ones before it in its row that score at least as much. A partial sort of the list, by
// the algorithm of torch.topk, therefore goes through the same steps as that of all V elements, and resolves ties alike.
#include "common.h"

#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace sysdag {
namespace {

constexpr std::int64_t kBlock = 1024;  // logits at a time: they stay in the L1 cache for the loops over them
constexpr std::int64_t kLanes = 16;
#if defined(__GNUC__)
#define SYSDAG_PREFETCH(address) __builtin_prefetch(address)
#else
#define SYSDAG_PREFETCH(address)
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Entry {
  float value;
  std::int32_t token;
};

struct Row {
  float maximum = -kInfinity;
  float log_sum = 0;
  std::vector<Entry> list;  // by token
  float log_prob(float x) const { return (x - maximum) - log_sum; }  // in torch's order
};

SYSDAG_VECTOR_CLONES float maximum(const float* x) {
  constexpr std::int64_t lanes = 4 * kLanes;  // four maxima at a time, or each would wait for the one before
  float lane[lanes];
  for (std::int64_t l = 0; l < lanes; ++l) lane[l] = x[l];
  for (std::int64_t i = lanes; i < kBlock; i += lanes)
    for (std::int64_t l = 0; l < lanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (std::int64_t width = lanes / 2; width > 0; width /= 2)
    for (std::int64_t l = 0; l < width; ++l) lane[l] = lane[l + width] > lane[l] ? lane[l + width] : lane[l];
  return lane[0];
}

SYSDAG_VECTOR_CLONES void flag_above(const float* x, float threshold, std::uint8_t* flags) {
  for (std::int64_t i = 0; i < kBlock; ++i) flags[i] = x[i] > threshold;
}

SYSDAG_VECTOR_CLONES float sum_exp(const float* x, float shift) {
  float lane[kLanes] = {};
  for (std::int64_t i = 0; i < kBlock; i += kLanes) {
    SYSDAG_PREFETCH(x + i + kBlock);  // the next block, which nothing else would ask for during these exponentials
    for (std::int64_t l = 0; l < kLanes; ++l) lane[l] += fast_exp(x[i + l] - shift);
  }
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2)
    for (std::int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

SYSDAG_INLINE float widened(float x) { return x; }
SYSDAG_INLINE float widened(double x) { return static_cast<float>(x); }
SYSDAG_INLINE float widened(BFloat16 x) {
  float value;
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
SYSDAG_INLINE float widened(Half x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fff) << 13;
  const std::uint32_t special = magnitude | 0x7f800000;  // infinity, nan
  float finite;
  std::memcpy(&finite, &magnitude, sizeof(finite));
  finite *= 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &finite, sizeof(bits));
  bits = ((x.bits & 0x7c00) == 0x7c00 ? special : bits) | static_cast<std::uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&finite, &bits, sizeof(finite));
  return finite;
}

#define SYSDAG_WIDEN(T) \
  SYSDAG_VECTOR_CLONES void widen(const T* x, std::int64_t n, float* out) { for (std::int64_t i = 0; i < n; ++i) out[i] = widened(x[i]); }
SYSDAG_WIDEN(float)
SYSDAG_WIDEN(double)
SYSDAG_WIDEN(BFloat16)
SYSDAG_WIDEN(Half)
#undef SYSDAG_WIDEN

// The `size` largest values met so far; their smallest is the bar for the next.
class Best {
 public:
  explicit Best(std::int64_t size) : size_(size) { heap_.reserve(size); }
  float threshold() const { return heap_.front(); }
  bool takes(float x) const { return filling() || x > heap_.front(); }
  bool filling() const { return static_cast<std::int64_t>(heap_.size()) < size_; }
  void add(float x) {
    if (!(x == x)) x = -kInfinity;  // a row with a nan is nan everywhere
    if (filling()) {
      heap_.push_back(x);
      std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
      return;
    }
    std::int64_t hole = 0;
    for (std::int64_t child = 1; child < size_; child = 2 * hole + 1) {
      if (child + 1 < size_ && heap_[child + 1] < heap_[child]) ++child;
      if (!(heap_[child] < x)) break;
      heap_[hole] = heap_[child];
      hole = child;
    }
    heap_[hole] = x;
  }

 private:
  std::int64_t size_;
  std::vector<float> heap_;
};

// One pass over a row of n logits; its list holds every element that enters the `size` best when it is met.
template <typename T>
Row scan(const T* x, std::int64_t n, std::int64_t size) {
  Row row;
  row.list.reserve(std::min(n, size + 128));
  Best best(size);
  double total = 0;
  float buffer[kBlock];
  std::uint8_t flags[kBlock];
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t count = std::min(kBlock, n - start);
    const float* block = buffer;
    if constexpr (std::is_same_v<T, float>) {
      if (count == kBlock) block = x + start;
    }
    if (block == buffer) {
      widen(x + start, count, buffer);
      std::fill(buffer + count, buffer + kBlock, -kInfinity);
    }
    const float block_top = maximum(block);
    if (best.takes(block_top)) {
      const bool filling = best.filling();
      if (!filling) flag_above(block, best.threshold(), flags);
      for (std::int64_t word = 0; word < count; word += 8) {
        std::uint64_t any = 1;
        if (!filling) std::memcpy(&any, flags + word, sizeof(any));
        if (any == 0) continue;
        for (std::int64_t i = word; i < std::min(count, word + 8); ++i)
          if (best.takes(block[i])) {
            best.add(block[i]);
            row.list.push_back({block[i], static_cast<std::int32_t>(start + i)});
          }
      }
    }
    const float top = block_top > row.maximum ? block_top : row.maximum;
    if (top > row.maximum) total *= std::exp(static_cast<double>(row.maximum) - top);
    row.maximum = top;
    total += sum_exp(block, top == -kInfinity ? 0.0f : top);  // 0 where there is nothing yet, nan where there is one
  }
  row.log_sum = row.maximum == -kInfinity ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(std::log(total));
  return row;
}

using Candidate = std::pair<float, std::int64_t>;  // score, place in the flat (K, V)

// The `count` best in front, as torch.topk has them for a dimension of `total` elements.
void select(std::vector<Candidate>& candidates, std::int64_t count, std::int64_t total) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return (a.first != a.first && b.first == b.first) || a.first > b.first;
  };
  const auto begin = candidates.begin();
  if (count * 64 <= total) {
    std::partial_sort(begin, begin + count, candidates.end(), better);
  } else {
    std::nth_element(begin, begin + count - 1, candidates.end(), better);
    std::sort(begin, begin + count - 1, better);
  }
}

bool contains(const std::int64_t* values, std::int64_t n, std::int64_t value) {
  return std::find(values, values + n, value) != values + n;
}

struct Sizes {
  std::int64_t B, G, K, V, M;
};

constexpr std::int64_t kEmpty = -1;  // in a history: there is no token

// A beam of an earlier group as it goes on after this step.
struct Chosen {
  const std::int64_t* history;
  std::int64_t token;
};

using Counts = std::vector<std::pair<std::int64_t, std::int64_t>>;  // token, how often

void count_one(Counts& counts, std::int64_t token) {
  for (auto& [known, times] : counts)
    if (known == token) {
      ++times;
      return;
    }
  counts.emplace_back(token, 1);
}

// The n-grams that beams' new tokens hold; `before` is n-1. histories (B,G,K,length).
struct Ngrams {
  const std::int64_t* histories;
  std::int64_t length, before;

  const std::int64_t* history(std::int64_t beam) const { return histories + beam * length; }
  bool counts_after(const std::int64_t* beam) const {
    return length >= before && !contains(beam + length - before, before, kEmpty);
  }
  // Calls `found` with the place behind each occurrence of `beam`'s last tokens in `other`, up to `length`.
  template <typename Found>
  void each_match(const std::int64_t* beam, const std::int64_t* other, const Found& found) const {
    const std::int64_t* suffix = beam + length - before;
    for (std::int64_t end = before; end <= length; ++end)
      if (std::equal(suffix, suffix + before, other + end - before)) found(end);
  }
  // Most tokens that histories alone penalise after beam k of group g; `beams` of the groups before.
  std::int64_t most(std::int64_t beam, std::int64_t first, std::int64_t beams) const {
    std::int64_t matches = 0;
    if (counts_after(history(beam)))
      for (std::int64_t other = first; other < first + beams; ++other)
        each_match(history(beam), history(other), [&](std::int64_t end) { matches += end < length; });
    return matches;
  }
  Counts counts(const std::int64_t* beam, const std::vector<Chosen>& earlier) const {
    Counts counts;
    if (!counts_after(beam)) return counts;
    std::vector<std::int64_t> seen;
    for (const Chosen& other : earlier) {
      seen.clear();
      each_match(beam, other.history, [&](std::int64_t end) {
        const std::int64_t token = end < length ? other.history[end] : other.token;
        if (token != kEmpty && !contains(seen.data(), seen.size(), token)) seen.push_back(token);
      });
      for (std::int64_t token : seen) count_one(counts, token);
    }
    return counts;
  }
};

// The groups of prompt b choose in turn. `row_of(g, k)` gives the row of a beam.
template <typename RowOf>
void choose(const Sizes& n, std::int64_t b, const RowOf& row_of, const float* scores, float penalty,
            const std::int64_t* eos, std::int64_t eos_count, const bool* done, std::int64_t pad,
            const std::optional<Ngrams>& ngrams, std::int64_t* tokens, std::int64_t* parents, float* best) {
  std::vector<Chosen> chosen;  // by the groups so far
  std::vector<Candidate> candidates;
  Counts counts;
  for (std::int64_t g = 0; g < n.G; ++g, tokens += n.M, parents += n.M, best += n.M) {
    candidates.clear();
    const std::int64_t first = (b * n.G + g) * n.K;
    if (!ngrams) {
      counts.clear();
      for (const Chosen& other : chosen) count_one(counts, other.token);
    }
    for (std::int64_t k = 0; k < n.K; ++k) {
      const Row& row = row_of(g, k);
      if (ngrams) counts = ngrams->counts(ngrams->history(first + k), chosen);
      for (const Entry& entry : row.list) {
        float score = row.log_prob(entry.value);
        for (const auto& [token, times] : counts)
          if (token == entry.token) score -= penalty * static_cast<float>(times);
        candidates.emplace_back(score + scores[g * n.K + k], k * n.V + entry.token);
      }
    }
    select(candidates, n.M, n.K * n.V);
    for (std::int64_t i = 0; i < n.M; ++i) {
      best[i] = candidates[i].first;
      tokens[i] = candidates[i].second % n.V;
      parents[i] = candidates[i].second / n.V;
    }
    const bool ended = done && done[g];
    const auto choose_beam = [&](std::int64_t parent, std::int64_t token) {
      chosen.push_back({ngrams ? ngrams->history(first + parent) : nullptr, token});
    };
    if (ended) {
      for (std::int64_t k = 0; k < n.K; ++k) choose_beam(k, ngrams ? kEmpty : pad);
      continue;
    }
    const std::size_t wanted = chosen.size() + n.K;
    for (bool ending : {false, true})  // those that end the sequence only where the others are too few
      for (std::int64_t i = 0; i < n.M && chosen.size() < wanted; ++i)
        if (contains(eos, eos_count, tokens[i]) == ending) choose_beam(parents[i], tokens[i]);
  }
}

template <typename T>
std::vector<Row> scan_rows(const Tensor& logits, const Sizes& n, std::int64_t groups, std::int64_t beams,
                           const std::vector<std::int64_t>& sizes) {
  const T* data = static_cast<const T*>(logits.data_ptr());
  const std::int64_t sb = logits.stride(0), sg = logits.stride(1), sk = logits.stride(2);
  std::vector<Row> rows(n.B * groups * beams);
  torch::stable::parallel_for(0, static_cast<std::int64_t>(rows.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r)
      rows[r] = scan(data + r / (groups * beams) * sb + r / beams % groups * sg + r % beams * sk, n.V, sizes[r]);
  });
  return rows;
}

// logits (B,G,K,V) of any floating type; scores (B,G,K) fp32; eos_token_ids (E,) int64; done (B,G) bool; history
// (B,G,K,t) int64, of which n-grams of `ngram_size` > 1 are counted.
std::tuple<Tensor, Tensor, Tensor> diverse_beam_step(Tensor logits, Tensor scores, double penalty, std::int64_t count,
                                                     std::optional<Tensor> eos_token_ids, std::optional<Tensor> done,
                                                     std::int64_t pad, std::optional<Tensor> history,
                                                     std::int64_t ngram_size) {
  using torch::headeronly::ScalarType;
  const Sizes n{logits.size(0), logits.size(1), logits.size(2), logits.size(3), count};
  if (n.V > 1 && logits.stride(3) != 1) logits = torch::stable::contiguous(logits);
  scores = torch::stable::contiguous(scores);
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && scores.numel() == n.B * n.G * n.K && n.V <= INT32_MAX,
                  "scores: (B, G, K) in fp32 are expected, and less than 2^31 tokens");
  STD_TORCH_CHECK(!eos_token_ids || eos_token_ids->scalar_type() == ScalarType::Long, "eos_token_ids: int64 is expected");
  STD_TORCH_CHECK(!done || (done->scalar_type() == ScalarType::Bool && done->numel() == n.B * n.G),
                  "done: (B, G) booleans are expected");
  STD_TORCH_CHECK(!history || (history->scalar_type() == ScalarType::Long && history->dim() == 4 && ngram_size > 1 &&
                               history->size(0) == n.B && history->size(1) == n.G && history->size(2) == n.K),
                  "history: (B, G, K, t) in int64 is expected, and an ngram_size above 1");
  std::optional<Ngrams> ngrams;
  if (history) {
    history = torch::stable::contiguous(*history);
    ngrams = Ngrams{static_cast<const std::int64_t*>(history->data_ptr()), history->size(3), ngram_size - 1};
  }
  if (eos_token_ids) eos_token_ids = torch::stable::contiguous(*eos_token_ids);
  if (done) done = torch::stable::contiguous(*done);
  // At the first token all beams of a prompt share one row, expanded: it is scanned once.
  const std::int64_t groups = logits.stride(1) == 0 ? 1 : n.G, beams = logits.stride(2) == 0 ? 1 : n.K;
  const bool partial = count * 64 <= n.K * n.V;  // otherwise torch.topk looks at all elements in another order
  std::vector<std::int64_t> sizes(n.B * groups * beams, partial ? std::min(n.V, count + (n.G - 1) * n.K) : n.V);
  if (ngrams && partial)
    for (std::int64_t beam = 0; beam < n.B * n.G * n.K; ++beam) {
      const std::int64_t b = beam / (n.G * n.K), g = beam / n.K % n.G, k = beam % n.K;
      auto& size = sizes[(b * groups + (groups == 1 ? 0 : g)) * beams + (beams == 1 ? 0 : k)];
      const std::int64_t penalised = (n.G - 1) * n.K + ngrams->most(beam, b * n.G * n.K, g * n.K);
      size = std::max(size, std::min(n.V, count + penalised));
    }
  std::vector<Row> rows;
  switch (logits.scalar_type()) {
    case ScalarType::Float: rows = scan_rows<float>(logits, n, groups, beams, sizes); break;
    case ScalarType::Double: rows = scan_rows<double>(logits, n, groups, beams, sizes); break;
    case ScalarType::BFloat16: rows = scan_rows<BFloat16>(logits, n, groups, beams, sizes); break;
    case ScalarType::Half: rows = scan_rows<Half>(logits, n, groups, beams, sizes); break;
    default: STD_TORCH_CHECK(false, "logits: a floating dtype is expected");
  }
  Tensor best = torch::stable::new_empty(scores, {n.B, n.G, count});
  Tensor tokens = torch::stable::new_empty(scores, {n.B, n.G, count}, ScalarType::Long);
  Tensor parents = torch::stable::empty_like(tokens);
  const float* score = static_cast<const float*>(scores.data_ptr());
  const auto* eos = eos_token_ids ? static_cast<const std::int64_t*>(eos_token_ids->data_ptr()) : nullptr;
  const std::int64_t eos_count = eos_token_ids ? eos_token_ids->numel() : 0;
  const bool* ended = done ? static_cast<const bool*>(done->data_ptr()) : nullptr;
  auto* token = static_cast<std::int64_t*>(tokens.data_ptr());
  auto* parent = static_cast<std::int64_t*>(parents.data_ptr());
  float* total = static_cast<float*>(best.data_ptr());
  torch::stable::parallel_for(0, n.B, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      const auto row_of = [&](std::int64_t g, std::int64_t k) -> const Row& {
        return rows[(b * groups + (groups == 1 ? 0 : g)) * beams + (beams == 1 ? 0 : k)];
      };
      const std::int64_t at = b * n.G;
      choose(n, b, row_of, score + at * n.K, static_cast<float>(penalty), eos, eos_count, ended ? ended + at : nullptr,
             pad, ngrams, token + at * count, parent + at * count, total + at * count);
    }
  });
  return {tokens, parents, best};
}

}  // namespace
}  // namespace sysdag

STABLE_TORCH_LIBRARY_IMPL(sysdag_C, CPU, m) { m.impl("diverse_beam_step", TORCH_BOX(&sysdag::diverse_beam_step)); }
