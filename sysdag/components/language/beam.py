"""Diverse beam search (Vijayakumar et al. 2016, "Diverse Beam Search", arXiv 1610.02424) for any causal language model.

The beams of a prompt fall into groups. At each token the groups choose in turn, and a group is penalised for what the
groups before it chose: so they spread over different continuations instead of near copies of the best one. Groups that
are done leave, and waiting prompts enter in their place, within a budget of tokens.

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
from sysdag.components.language.waiting_prompts import WaitingPrompts
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
    max_batch_tokens: int | None = None,
    max_batch_rows: int | None = None,
) -> tuple[Int[Tensor, "B N L"], Float[Tensor, "B N"]]:
    """Diverse beam search of prompts, one model call for each new token of those that are searched side by side.

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
        max_batch_tokens: most tokens of the beams that are searched side by side, each with its prompt and all that it
            may grow by; one prompt's may take more. None: no limit.
        max_batch_rows: most beams side by side, but at least those of a prompt. None: no limit.

    Returns:
        sequences (B, N, L): new tokens, best first, right-padded; L is the length of the longest.
        scores (B, N): their length-normalised scores, fp32.

    Raises:
        ValueError: an option or a shape does not fit, or the model keeps no cache because it is in train mode.
        PlanError: the model's logits depend on the tokens behind them.
    """
    _check(input_ids, attention_mask, num_beams, num_beam_groups, diversity_penalty, max_new_tokens, early_stopping)
    N, T, device = num_beams, max_new_tokens, input_ids.device
    eos_ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else eos_ids[0] if eos_ids else 0
    rules = _Rules(
        num_beam_groups, N // num_beam_groups, diversity_penalty, T, eos_ids, pad, length_penalty, early_stopping,
        ngram_size, eos_as_written,
    )  # fmt: skip
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    tokens, most = (None if limit is None else max(1, limit // N) for limit in (max_batch_tokens, max_batch_rows))
    tokens = len(prompts) * (input_ids.shape[1] + T) if tokens is None else tokens
    waiting = WaitingPrompts(prompts, 1, T, tokens, most)

    decoder, rows = decoder_of(model), 0
    sequences = torch.full((len(prompts), N, T), EMPTY, device=device)
    scores = torch.zeros(len(prompts), N, device=device)
    beams = _Beams.start([], rules, device)
    while waiting.rows or len(beams.prompts):
        if len(beams.prompts):
            logits, rows = _extended(decoder, beams)
            beams.advance(logits, rules)
        elif rows:
            decoder.keep([])
            rows = 0
        there = -(-int((~beams.done).sum()) * rules.K // N)  # in prompts
        longest = max((len(prompts[prompt]) for prompt in beams.prompts.tolist()), default=0)
        for read, alike in waiting.admitted([longest] * there, decoder.joins):
            repeats = [len(numbers) for numbers in alike]
            logits = decoder.enter([prompts[number] for number in read], [N * count for count in repeats])
            rules.check_tokens(logits.shape[-1])
            logits = logits.repeat_interleave(torch.tensor(repeats, device=logits.device), 0)
            entering = _Beams.start([number for numbers in alike for number in numbers], rules, device)
            entering.places = rows + torch.arange(N * sum(repeats)).view(-1, N)
            rows += N * sum(repeats)
            entering.advance(logits[:, None].expand(-1, N, -1), rules)
            beams = beams.joined(entering)
        finished = beams.done.all(-1)
        if finished.any():
            sequences[beams.prompts[finished]], scores[beams.prompts[finished]] = beams.select(finished).ranked()
            beams = beams.select(~finished)
    empty = sequences == EMPTY
    return sequences.masked_fill(empty, pad)[..., : T - int(empty.all(1).all(0).sum())], scores


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) padded on the left, and their attention mask."""
    width = max(len(row) for row in rows)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _extended(decoder: Decoder, beams: _Beams) -> tuple[Float[Tensor, "B N V"], int]:
    """Logits after each beam's last token, zeros where its group is done, and how many rows the decoder now has.

    The beams of such a group leave the decoder: nothing that they are continued with is looked at.
    """
    open_ = ~beams.done.repeat_interleave(beams.tokens.shape[1] // beams.done.shape[1], 1)
    kept = beams.places[open_.cpu()].tolist()
    there = torch.tensor(arranged(kept))
    decoder.keep([row for _, row in sorted(zip(there.tolist(), kept, strict=True))])
    tokens = beams.tokens[open_]
    index = there.to(tokens.device)
    logits = decoder.extend(torch.empty_like(tokens).index_copy(0, index, tokens))
    beams.places[open_.cpu()] = there
    if len(kept) == open_.numel():
        return logits[index].view(*open_.shape, -1), len(kept)
    found = logits.new_zeros(*open_.shape, logits.shape[-1])
    found[open_] = logits[index]
    return found, len(kept)


@dataclass(frozen=True)
class _Rules:
    """The options of a search; `K` beams in each of `G` groups, at most `T` new tokens."""

    G: int
    K: int
    penalty: float
    T: int
    eos: list[int]
    pad: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    ngram_size: int
    eos_as_written: bool

    def check_tokens(self, vocabulary: int) -> None:
        require(
            0 <= self.pad < vocabulary, "pad_token_id", f"a token of the vocabulary, 0 to {vocabulary - 1}", self.pad
        )
        ends = len(set(self.eos))
        require(ends < vocabulary, "eos_token_id", f"fewer tokens than the vocabulary's {vocabulary}", ends)


@dataclass
class _Beams:
    """The state of the prompts that are not finished; the first dimension of every field is theirs.

    Attributes:
        prompts: their positions in the caller's batch (B,).
        lengths: new tokens of each prompt's open beams (B,).
        scores: accumulated scores of the open beams (B,G,K).
        history: new tokens of the open beams (B,G,K,t), the last of them last; `EMPTY` before a prompt's first.
        closed_scores: length-normalised scores of the ended sequences, best first, -inf where none; fp64 (B,G,K).
        closed_tokens: the ended sequences (B,G,K,T), right-padded with `EMPTY`.
        done: groups that take no further sequence (B,G).
        tokens: the last token of each open beam (B,N).
        places: the decoder's row that each is behind (B,N), on the CPU.
    """

    prompts: Tensor
    lengths: Tensor
    scores: Tensor
    history: Tensor
    closed_scores: Tensor
    closed_tokens: Tensor
    done: Tensor
    tokens: Tensor
    places: Tensor

    @classmethod
    def start(cls, prompts: Sequence[int], rules: _Rules, device: torch.device) -> _Beams:
        B, G, K = len(prompts), rules.G, rules.K
        scores = torch.full((B, G, K), -1e9, device=device)
        scores[..., 0] = 0  # the beams of a group start alike: continue one of them
        return cls(
            prompts=torch.tensor(prompts, dtype=torch.long, device=device),
            lengths=torch.zeros(B, dtype=torch.long, device=device),
            scores=scores,
            history=torch.zeros(B, G, K, 0, dtype=torch.long, device=device),
            closed_scores=torch.full((B, G, K), -math.inf, dtype=torch.float64, device=device),
            closed_tokens=torch.full((B, G, K, rules.T), EMPTY, device=device),
            done=torch.zeros(B, G, dtype=torch.bool, device=device),
            tokens=torch.zeros(B, G * K, dtype=torch.long, device=device),
            places=torch.zeros(B, G * K, dtype=torch.long),
        )

    def select(self, which: Tensor) -> _Beams:
        """The prompts of a mask (B,)."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)}
        found = _Beams(**{name: part[which.to(part.device)] for name, part in chosen.items()})
        found.history = found.history[
            ..., found.history.shape[-1] - int(found.lengths.max()) if len(found.lengths) else 0 :
        ]
        return found

    def joined(self, other: _Beams) -> _Beams:
        """These prompts, then the other's."""
        width = max(self.history.shape[-1], other.history.shape[-1])
        for each in (self, other):
            each.history = nn.functional.pad(each.history, (width - each.history.shape[-1], 0), value=EMPTY)
        return _Beams(*(torch.cat([getattr(self, field.name), getattr(other, field.name)]) for field in fields(self)))

    def advance(self, logits: Float[Tensor, "B N V"], rules: _Rules) -> None:
        """Each beam takes a token: scores, histories, ended sequences, and which groups are done."""
        G, K, V = rules.G, rules.K, logits.shape[-1]
        eos = torch.tensor(rules.eos, device=logits.device) if rules.eos else None
        tokens, parents, totals = diverse_beam_step(
            logits.unflatten(1, (G, K)),
            self.scores,
            rules.penalty,
            num_candidates=min(max(2, 1 + len(rules.eos)), V) * K,
            eos_token_ids=eos,
            done=None if eos is None else self.done,
            pad_token_id=rules.pad,
            history=self.history,
            ngram_size=rules.ngram_size,
        )
        done = self.done
        self.lengths = self.lengths + 1
        lengths = self.lengths[:, None].double()
        if eos is not None:
            ends = (tokens[..., :K, None] == eos).any(-1) & ~done[..., None]
            if ends.any():
                written = tokens[..., :K] if rules.eos_as_written else torch.full_like(tokens[..., :K], rules.eos[0])
                ended = append(self.history, written, parents[..., :K], None)
                self._close(ended, totals[..., :K].double() / lengths[..., None] ** rules.length_penalty, ends)
            full = self.closed_scores[..., -1] > -math.inf
            if rules.early_stopping is not True:
                never = rules.early_stopping == "never" and rules.length_penalty > 0
                horizon = torch.full_like(lengths, rules.T) if never else lengths
                full &= self.closed_scores[..., -1] >= totals[..., 0].double() / horizon**rules.length_penalty
            self.done = done | full
        kept = open_candidates(tokens, eos, K)
        tokens, parents, self.scores = (part.gather(-1, kept) for part in (tokens, parents, totals))
        self.history = append(self.history, tokens, parents, done[..., None])
        last = self.lengths == rules.T
        if last.any():
            still = ~self.done[..., None].expand_as(tokens) & last[:, None, None]
            self._close(self.history, self.scores.double() / float(rules.T) ** rules.length_penalty, still)
            self.done = self.done | last[:, None]
        self.tokens = tokens.flatten(1)
        self.places = self.places.gather(1, torch.arange(G * K) // K * K + parents.flatten(1).cpu())

    def _close(self, sequences: Tensor, scores: Tensor, which: Tensor) -> None:
        """Offers the sequences (B,G,K,t) of the mask `which` (B,G,K); a group keeps its K best, on a tie the older."""
        K, (room, width) = which.shape[-1], (self.closed_tokens.shape[-1], sequences.shape[-1])
        sequences = nn.functional.pad(sequences, (0, room), value=EMPTY)
        begins = (width - self.lengths)[:, None] + torch.arange(room, device=sequences.device)
        sequences = sequences.gather(-1, begins[:, None, None].expand(*sequences.shape[:-1], room))
        tokens = torch.cat([self.closed_tokens, sequences], -2)
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
