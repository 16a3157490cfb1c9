"""Diverse beam search (Vijayakumar et al. 2016, "Diverse Beam Search", arXiv 1610.02424) for any causal language model.

The beams of a prompt fall into groups. At each token the groups choose in turn, and a group is penalised for what the
groups before it chose: so they spread over different continuations instead of near copies of the best one.

Shapes: B prompts, G groups, K beams a group, N = G*K beams, V vocabulary, M candidates a group, T new tokens.
Scores are in nats and include the penalties, as in transformers up to 4.56; sequences and scores are the same as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sysdag.components.language.decoder import Decoder, arranged, decoder_of
from sysdag.ops.diverse_beam_step import EMPTY, append, diverse_beam_step, open_candidates, require


@torch.no_grad()
def diverse_beam_search(
    model: nn.Module,
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"] | Bool[Tensor, "B P"],
    *,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = True,
    ngram_size: int = 1,
    eos_as_written: bool = False,
) -> tuple[Int[Tensor, "B N L"], Float[Tensor, "B N"]]:
    """Diverse beam search of a batch of prompts, one model call for each new token.

    Gives what group beam search of transformers 4.56 gave with `num_return_sequences=num_beams`, for each prompt as if
    it were alone. Two of its habits are worth knowing: scores include the penalties; and a sequence that ended carries
    the first of several `eos_token_id`, whichever it was that ended it, unless `eos_as_written`.

    Args:
        model: a causal language model of transformers, decoded as `decoder` finds out that it can. Its mode is left as
            it is: in train mode dropout stays on.
        input_ids: prompts, padded on the left.
        attention_mask: 1 for a token, 0 for padding.
        num_beams: N, sequences returned for each prompt.
        num_beam_groups: G, divides `num_beams`. 1 is plain beam search.
        diversity_penalty: nats, at least 0; see `diverse_beam_step`.
        max_new_tokens: T, at least 1.
        eos_token_id: token or tokens that end a sequence; None: all sequences have T tokens.
        pad_token_id: fills sequences on the right; default the first `eos_token_id`. It counts as chosen by groups that
            are done, so it matters to the groups after them.
        length_penalty: a sequence's score is its sum of penalised log-probabilities over length ** length_penalty.
        early_stopping: a group is done when it has K ended sequences and: True, nothing more; False, none of its open
            beams is better than the worst of these; "never", none can become better at any length up to T.
        ngram_size: 1 for Hamming diversity, n for n-gram diversity; see `diverse_beam_step`.
        eos_as_written: a sequence carries the end that it was scored with.

    Returns:
        sequences (B, N, L): new tokens, best first, right-padded; L is the length of the longest.
        scores (B, N): their length-normalised scores, fp32.

    Raises:
        ValueError: an option or a shape does not fit, or the model keeps no cache because it is in train mode.
        PlanError: the model's logits depend on the tokens behind them.
    """
    _check(input_ids, attention_mask, num_beams, num_beam_groups, diversity_penalty, max_new_tokens, early_stopping)
    B, N, G, T, device = len(input_ids), num_beams, num_beam_groups, max_new_tokens, input_ids.device
    K = N // G
    eos_ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    eos = torch.tensor(eos_ids, device=device) if eos_ids else None
    pad = pad_token_id if pad_token_id is not None else eos_ids[0] if eos_ids else 0

    decoder = decoder_of(model)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    order = sorted(range(B), key=lambda prompt: -len(prompts[prompt]))
    logits = decoder.enter([prompts[prompt] for prompt in order], [N] * B)
    entered = torch.tensor(order).argsort()
    logits, V = logits[entered.to(device)], logits.shape[-1]
    places = entered[:, None] * N + torch.arange(N)  # the decoder's row of each beam (B,N)
    require(0 <= pad < V, "pad_token_id", f"a token of the vocabulary, 0 to {V - 1}", pad)
    require(len(set(eos_ids)) < V, "eos_token_id", f"fewer tokens than the vocabulary's {V}", len(set(eos_ids)))
    logits = logits[:, None].expand(B, N, V)
    beams = _Beams.start(B, G, K, T, device)
    sequences, scores = torch.full((B, N, T), EMPTY, device=device), torch.zeros(B, N, device=device)
    for length in range(1, T + 1):
        tokens, parents, totals = diverse_beam_step(
            logits.unflatten(1, (G, K)),
            beams.scores,
            diversity_penalty,
            num_candidates=min(max(2, 1 + len(eos_ids)), V) * K,
            eos_token_ids=eos,
            done=None if eos is None else beams.done,
            pad_token_id=pad,
            history=beams.history,
            ngram_size=ngram_size,
        )
        done = beams.done
        if eos is not None:
            ends = (tokens[..., :K, None] == eos).any(-1) & ~done[..., None]
            if ends.any():
                written = tokens[..., :K] if eos_as_written else torch.full_like(tokens[..., :K], eos_ids[0])
                ended = append(beams.history, written, parents[..., :K], None)
                beams.close(ended, totals[..., :K].double() / length**length_penalty, ends)
            full = beams.closed_scores[..., -1] > -math.inf
            if early_stopping is not True:
                horizon = T if early_stopping == "never" and length_penalty > 0 else length
                full &= beams.closed_scores[..., -1] >= totals[..., 0].double() / horizon**length_penalty
            beams.done = done | full
        kept = open_candidates(tokens, eos, K)
        tokens, parents, beams.scores = (part.gather(-1, kept) for part in (tokens, parents, totals))
        beams.history = append(beams.history, tokens, parents, done[..., None])
        if length == T:
            still = ~beams.done[..., None].expand_as(tokens)
            beams.close(beams.history, beams.scores.double() / T**length_penalty, still)
            beams.done = torch.ones_like(beams.done)

        rows = places.gather(1, (torch.arange(N) // K * K + parents.flatten(1).cpu()))
        finished = beams.done.all(-1)
        if (eos is not None or length == T) and finished.any():
            sequences[beams.prompts[finished]], scores[beams.prompts[finished]] = beams.select(finished).ranked()
            tokens, rows, beams = tokens[~finished], rows[~finished.cpu()], beams.select(~finished)
        if not len(tokens):
            break
        logits, places = _extended(decoder, tokens.flatten(1), rows, beams.done.repeat_interleave(K, 1), V)
    empty = sequences == EMPTY
    return sequences.masked_fill(empty, pad)[..., : T - int(empty.all(1).all(0).sum())], scores


def _extended(
    decoder: Decoder, tokens: Tensor, rows: Tensor, done: Tensor, vocabulary: int
) -> tuple[Float[Tensor, "B N V"], Int[Tensor, "B N"]]:
    """Logits after tokens (B,N), each behind a row of the decoder, and their rows now; zeros where a group is done.

    The beams of such a group leave the decoder: nothing that they are continued with is looked at.
    """
    open_ = ~done
    kept = rows[open_.cpu()].tolist()
    there = torch.tensor(arranged(kept))
    decoder.keep([row for _, row in sorted(zip(there.tolist(), kept, strict=True))])
    index = there.to(tokens.device)
    logits = decoder.extend(torch.empty_like(tokens[open_]).index_copy(0, index, tokens[open_]))
    found = logits.new_zeros(*tokens.shape, vocabulary)
    found[open_] = logits[index]
    places = torch.zeros_like(rows)
    places[open_.cpu()] = there
    return found, places


@dataclass
class _Beams:
    """The state of the prompts that are not finished; the first dimension of every field is theirs.

    Attributes:
        prompts: their positions in the caller's batch (B,).
        scores: accumulated scores of the open beams (B,G,K).
        history: new tokens of the open beams (B,G,K,t).
        closed_scores: length-normalised scores of the ended sequences, best first, -inf where none; fp64 (B,G,K).
        closed_tokens: the ended sequences (B,G,K,T), right-padded with `EMPTY`.
        done: groups that take no further sequence (B,G).
    """

    prompts: Tensor
    scores: Tensor
    history: Tensor
    closed_scores: Tensor
    closed_tokens: Tensor
    done: Tensor

    @classmethod
    def start(cls, B: int, G: int, K: int, T: int, device: torch.device) -> _Beams:
        scores = torch.full((B, G, K), -1e9, device=device)
        scores[..., 0] = 0  # the beams of a group start alike: continue one of them
        return cls(
            prompts=torch.arange(B, device=device),
            scores=scores,
            history=torch.zeros(B, G, K, 0, dtype=torch.long, device=device),
            closed_scores=torch.full((B, G, K), -math.inf, dtype=torch.float64, device=device),
            closed_tokens=torch.full((B, G, K, T), EMPTY, device=device),
            done=torch.zeros(B, G, dtype=torch.bool, device=device),
        )

    def select(self, which: Tensor) -> _Beams:
        return _Beams(*(getattr(self, field.name)[which] for field in fields(self)))

    def close(self, sequences: Tensor, scores: Tensor, which: Tensor) -> None:
        """Offers the sequences (B,G,K,t) of the mask `which` (B,G,K); a group keeps its K best, on a tie the older."""
        K, room = which.shape[-1], self.closed_tokens.shape[-1] - sequences.shape[-1]
        tokens = torch.cat([self.closed_tokens, nn.functional.pad(sequences, (0, room), value=EMPTY)], -2)
        scores = torch.cat([self.closed_scores, scores.masked_fill(~which, -math.inf)], -1)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        self.closed_scores, order = scores[..., :K], order[..., :K]
        self.closed_tokens = tokens.gather(-2, order[..., None].expand(*order.shape, tokens.shape[-1]))

    def ranked(self) -> tuple[Tensor, Tensor]:
        """Tokens (B,N,T) and scores (B,N) of the ended sequences of all groups, best first."""
        scores, order = self.closed_scores.flatten(1).sort(dim=-1, descending=True, stable=True)
        tokens = self.closed_tokens.flatten(1, 2)
        return tokens.gather(1, order[..., None].expand_as(tokens)), scores.float()


def _check(ids: Tensor, mask: Tensor, N: int, G: int, penalty: float, T: int, early_stopping: object) -> None:
    require(N >= 1, "num_beams", "at least 1", N)
    require(1 <= G <= N and N % G == 0, "num_beam_groups", f"a divisor of num_beams ({N})", G)
    require(0 <= penalty < math.inf, "diversity_penalty", "a finite number of at least 0", penalty)
    require(T >= 1, "max_new_tokens", "at least 1", T)
    known = isinstance(early_stopping, bool) or early_stopping == "never"
    require(known, "early_stopping", 'True, False or "never"', early_stopping)
    shape = tuple(ids.shape)
    require(ids.dim() == 2 and ids.numel() > 0, "input_ids", "shape (B, P), at least one prompt of one token", shape)
    require(mask.shape == ids.shape, "attention_mask", f"the shape of input_ids {shape}", tuple(mask.shape))
    mask = mask.bool()
    left = bool(mask[:, -1].all()) and not bool((mask[:, :-1] & ~mask[:, 1:]).any())
    require(left, "attention_mask", "prompts of at least one token, padded on the left", "padding after a token")
