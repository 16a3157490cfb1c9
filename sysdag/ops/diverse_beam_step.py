"""One token of diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) in one pass over the logits.

The groups choose in turn, each penalised for what the groups before it chose. A penalty only lowers, and those groups
chose at most P = (G-1)K tokens, so the M best of a group lie among the M + P best that each of its rows has without
penalties: one pass gives every row's normaliser and its short list, then the groups choose from the lists.

Shapes: B prompts, G groups, K beams a group, V vocabulary, M candidates a group, L the length of a short list.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sysdag.ops._dispatch import Backend, resolve

LONGEST_LIST = 256  # tokens that the GPU kernels list for a row
EMPTY = -1  # in a history: the group was done, there is no token


def diverse_beam_step(
    logits: Float[Tensor, "B G K V"],
    scores: Float[Tensor, "B G K"],
    penalty: float,
    *,
    num_candidates: int | None = None,
    eos_token_ids: Int[Tensor, " E"] | None = None,
    done: Bool[Tensor, "B G"] | None = None,
    pad_token_id: int = 0,
    history: Int[Tensor, "B G K t"] | None = None,
    ngram_size: int = 1,
) -> tuple[Int[Tensor, "B G M"], Int[Tensor, "B G M"], Float[Tensor, "B G M"]]:
    """The best continuations of every group, the groups choosing one after the other (arXiv 1610.02424, algorithm 1).

    Token v after beam k of group g scores `scores[b,g,k] + log_softmax(logits[b,g,k])[v] - penalty * n`. With
    `ngram_size` 1, n is the number of beams of groups before g that chose v in this step (Hamming diversity). With a
    larger size, n is the number of beams of groups before g whose new tokens, this step's included, hold the n-gram
    that v would end, wherever it stands (n-gram diversity; the paper counts occurrences, here a beam that repeats
    itself counts once, so that the penalty has the same scale as Hamming diversity).

    A group chooses its K best candidates that do not end the sequence. A group that is done "chooses" `pad_token_id` K
    times, as in transformers, and holds the n-grams of its history.

    Args:
        logits: unnormalised, any floating dtype; computed in fp32.
        scores: accumulated score of each open beam, nats.
        penalty: nats for each earlier beam, at least 0.
        num_candidates: M, by default 2K. (E+1)K are enough to leave K that do not end the sequence.
        eos_token_ids: the tokens that end a sequence.
        done: groups that have ended; what is returned for them means nothing.
        pad_token_id: what a done group chooses.
        history: new tokens of each open beam so far, -1 where its group was done, and before the first where another
            prompt's beams have more; needed by `ngram_size` above 1.
        ngram_size: 1, or the n of the n-grams.

    Returns:
        tokens, parents (position of the beam in its group) and scores of each group's candidates, best first. Equal
        scores come in the order in which `torch.topk` gives them over the flat (K*V): unspecified, but repeatable. On a
        GPU the lower token comes first. No gradient.

    Raises:
        ValueError: a shape or an option does not fit.
        BackendError: the forced backend does not serve; kernels for GPUs count no n-grams above 1.
    """
    require(logits.dim() == 4, "logits", "shape (B, G, K, V)", tuple(logits.shape))
    B, G, K, V = logits.shape
    require(scores.shape == (B, G, K), "scores", f"shape {(B, G, K)}", tuple(scores.shape))
    require(0 <= penalty < math.inf, "penalty", "a finite number of at least 0", penalty)
    M = 2 * K if num_candidates is None else num_candidates
    require(K <= M <= K * V, "num_candidates", f"{K} (beams of a group) to {K * V} (times the vocabulary)", M)
    require(ngram_size >= 1, "ngram_size", "at least 1", ngram_size)
    if done is not None:
        require(0 <= pad_token_id < V, "pad_token_id", f"a token of the vocabulary, 0 to {V - 1}", pad_token_id)
    if ngram_size == 1:
        history = None
    else:
        fits = history is not None and history.dim() == 4 and history.shape[:3] == scores.shape
        got = None if history is None else tuple(history.shape)
        require(fits, "history", f"shape ({B}, {G}, {K}, t) for ngram_size {ngram_size}", got)
    logits, scores = logits.detach(), scores.detach()
    arguments = logits, scores, float(penalty), M, eos_token_ids, done, pad_token_id, history, ngram_size
    return _op(*arguments) if torch.compiler.is_compiling() else _by_backend(*arguments)


def require(fits: bool, option: str, expected: str, got: object) -> None:
    if not fits:
        raise ValueError(f"{option}: expected {expected}, got {got!r}.")


def diverse_beam_step_reference(
    logits: Tensor, scores: Tensor, penalty: float, num_candidates: int, eos_token_ids: Tensor | None = None,
    done: Tensor | None = None, pad_token_id: int = 0, history: Tensor | None = None, ngram_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`diverse_beam_step` in plain torch: a penalised copy of the log-probabilities and a top-k for every group."""
    return _choose_in_turn(
        logits.log_softmax(-1, dtype=torch.float32), None, logits.shape[-1], scores, penalty, num_candidates,
        eos_token_ids, done, pad_token_id, history, ngram_size,
    )  # fmt: skip


def _choose_in_turn(
    log_probs: Tensor, listed: Tensor | None, V: int, scores: Tensor, penalty: float, M: int,
    eos_token_ids: Tensor | None, done: Tensor | None, pad_token_id: int, history: Tensor | None = None,
    ngram_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The groups choose one after the other.

    Args:
        log_probs: (B,G,K,L), overwritten: of all tokens, or of the `listed` ones.
        listed: tokens (B,G,K,L) of a short list; None, all V in order.
    """
    B, _, K, L = log_probs.shape
    candidates: list[tuple[Tensor, Tensor, Tensor]] = []
    counts = log_probs.new_zeros(B, 1, V)  # the n of each token; with n-grams (B,K,V)
    earlier: list[Tensor] = []  # with n-grams: the sequences (B,K,t+1) that each earlier group chose
    for g in range(log_probs.shape[1]):
        if history is not None and g:
            counts = _ngram_counts(torch.cat(earlier, 1), history[:, g], ngram_size, V)
        if g:
            times = counts if listed is None else counts.expand(B, K, V).gather(-1, listed[:, g])
            log_probs[:, g].sub_(penalty * times)
        best, flat = log_probs[:, g].add_(scores[:, g, :, None]).flatten(1).topk(M)
        places, parents = flat % L, flat.div(L, rounding_mode="floor")
        tokens = places if listed is None else listed[:, g].flatten(1).gather(-1, flat)
        candidates.append((tokens, parents, best))
        kept = open_candidates(tokens, eos_token_ids, K)
        tokens, parents = tokens.gather(-1, kept), parents.gather(-1, kept)
        ended = None if done is None else done[:, g, None]
        if history is not None:
            earlier.append(append(history[:, g], tokens, parents, ended))
        else:
            tokens = tokens if ended is None else tokens.masked_fill(ended, pad_token_id)
            counts.scatter_add_(-1, tokens[:, None], counts.new_ones(B, 1, K))
    tokens, parents, best = (torch.stack(parts, 1) for parts in zip(*candidates, strict=True))
    return tokens, parents, best


def open_candidates(tokens: Tensor, eos_token_ids: Tensor | None, count: int) -> Tensor:
    """Positions (..., count) of the best candidates (..., M) that do not end the sequence."""
    if eos_token_ids is None:
        return torch.arange(count, device=tokens.device).expand(*tokens.shape[:-1], count)
    ends = (tokens[..., None] == eos_token_ids).any(-1)
    return ends.to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]


def append(history: Tensor, tokens: Tensor, parents: Tensor, done: Tensor | None) -> Tensor:
    """Sequences (..., C, t+1) of the beams that append `tokens` to `parents` (..., C); a done group's stay."""
    if done is not None:
        tokens = tokens.masked_fill(done, EMPTY)
        parents = torch.where(done, torch.arange(tokens.shape[-1], device=tokens.device), parents)
    history = history.gather(-2, parents[..., None].expand(*parents.shape, history.shape[-1]))
    return torch.cat([history, tokens[..., None]], -1)


def _ngram_counts(earlier: Tensor, history: Tensor, size: int, vocabulary: int) -> Tensor:
    """How many of the earlier beams (B,P,t+1) hold the n-gram that each token after `history` (B,K,t) ends: (B,K,V)."""
    B, K, t = history.shape
    counts = torch.zeros(B, K, vocabulary, device=history.device)
    if t + 1 < size:
        return counts
    grams = earlier.unfold(-1, size, 1)[:, None]  # (B,1,P,W,n)
    last = grams[..., -1]
    suffix = history[:, :, None, None, t + 1 - size :]
    same = ((grams[..., :-1] == suffix) & (suffix != EMPTY)).all(-1)  # (B,K,P,W)
    ends = torch.where(same, last, EMPTY).sort(-1).values
    repeated = nn.functional.pad(ends[..., 1:] == ends[..., :-1], (1, 0), value=False)
    once = (ends != EMPTY) & ~repeated
    return counts.scatter_add_(-1, ends.clamp(min=0).flatten(2), once.to(counts.dtype).flatten(2))


def _by_backend(
    logits: Tensor, scores: Tensor, penalty: float, M: int, eos_token_ids: Tensor | None, done: Tensor | None,
    pad_token_id: int, history: Tensor | None, ngram_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    V = logits.shape[-1]
    L = min(V, M + (logits.shape[1] - 1) * logits.shape[2])
    backend = resolve("diverse_beam_step", logits.device, _implementations(logits, scores, history, L))
    if backend == "reference":
        return diverse_beam_step_reference(
            logits, scores, penalty, M, eos_token_ids, done, pad_token_id, history, ngram_size
        )
    if backend == "cpp":
        eos = None if eos_token_ids is None else eos_token_ids.to(torch.int64)
        sequences = None if history is None else history.to(torch.int64)
        return torch.ops.sysdag_C.diverse_beam_step.default(
            logits, scores, penalty, M, eos, done, pad_token_id, sequences, ngram_size
        )
    if backend == "triton":
        from sysdag.kernels.diverse_beam_step import top_log_probs
    else:
        top_log_probs = torch.ops.sysdag_C.top_log_probs.default
    log_probs, listed = (part.view(*logits.shape[:3], L) for part in top_log_probs(logits.reshape(-1, V), L))
    return _choose_in_turn(log_probs, listed, V, scores, penalty, M, eos_token_ids, done, pad_token_id)


def _implementations(logits: Tensor, scores: Tensor, history: Tensor | None, L: int) -> list[Backend]:
    """The kernels that can serve: n-grams may penalise more tokens than a GPU's short list has room for."""
    if scores.dtype != torch.float32:
        return []
    if history is not None or logits.dtype == torch.float64 or L > LONGEST_LIST:
        return ["cpp"]
    return ["cpp", "cuda", "triton"]


@torch.library.custom_op(
    "sysdag::diverse_beam_step",
    mutates_args=(),
    schema="(Tensor logits, Tensor scores, float penalty, int num_candidates, Tensor? eos_token_ids, Tensor? done, "
    "int pad_token_id, Tensor? history, int ngram_size) -> (Tensor, Tensor, Tensor)",
)
def _op(
    logits: Tensor, scores: Tensor, penalty: float, num_candidates: int, eos_token_ids: Tensor | None,
    done: Tensor | None, pad_token_id: int, history: Tensor | None, ngram_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _by_backend(logits, scores, penalty, num_candidates, eos_token_ids, done, pad_token_id, history, ngram_size)


def _fake(
    logits: Tensor, scores: Tensor, penalty: float, num_candidates: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, G = scores.shape[:2]
    best = scores.new_empty(B, G, num_candidates, dtype=torch.float32)
    return torch.empty_like(best, dtype=torch.int64), torch.empty_like(best, dtype=torch.int64), best


_op.register_fake(_fake)
