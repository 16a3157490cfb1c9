"""The beams of prompts that are searched side by side, and how they take a token.

Shapes: B prompts, G groups, K beams a group, N = G*K beams, V vocabulary, T new tokens at most, t so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.ops.diverse_beam_step import EMPTY, append, diverse_beam_step, open_candidates, require


@dataclass(frozen=True)
class BeamRules:
    """The options of a search; `K` beams in each of `G` groups, at most `T` new tokens; see `diverse_beam_search`."""

    G: int
    K: int
    penalty: float
    T: int
    eos: Sequence[int]
    pad: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = True
    ngram_size: int = 1
    eos_as_written: bool = False
    grammar: TokenGrammar | None = None

    @property
    def N(self) -> int:
        """Beams of a prompt."""
        return self.G * self.K

    def check_tokens(self, vocabulary: int) -> None:
        require(
            0 <= self.pad < vocabulary, "pad_token_id", f"a token of the vocabulary, 0 to {vocabulary - 1}", self.pad
        )
        ends = len(set(self.eos))
        require(ends < vocabulary, "eos_token_id", f"fewer tokens than the vocabulary's {vocabulary}", ends)


@dataclass
class Beams:
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
        states: the grammar's state before each beam's next token (B,N), on the CPU; 0 without one.
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
    states: Tensor

    @classmethod
    def start(cls, prompts: Sequence[int], rules: BeamRules, device: torch.device) -> Beams:
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
            states=torch.full((B, G * K), 0 if rules.grammar is None else rules.grammar.start),
        )

    def open_beams(self) -> list[int]:
        """The prompt of each beam whose group goes on."""
        beams = self.tokens.shape[1] // self.done.shape[1]
        return self.prompts[:, None].expand_as(self.done)[~self.done].repeat_interleave(beams).tolist()

    def select(self, which: Tensor) -> Beams:
        """The prompts of a mask (B,)."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)}
        found = Beams(**{name: part[which.to(part.device)] for name, part in chosen.items()})
        found.history = found.history[
            ..., found.history.shape[-1] - int(found.lengths.max()) if len(found.lengths) else 0 :
        ]
        return found

    def joined(self, other: Beams) -> Beams:
        """These prompts, then the other's."""
        width = max(self.history.shape[-1], other.history.shape[-1])
        for each in (self, other):
            each.history = nn.functional.pad(each.history, (width - each.history.shape[-1], 0), value=EMPTY)
        return Beams(*(torch.cat([getattr(self, field.name), getattr(other, field.name)]) for field in fields(self)))

    def advance(self, logits: Float[Tensor, "B N V"], rules: BeamRules) -> None:
        """Each beam takes a token: scores, histories, ended sequences, and which groups are done."""
        G, K, V = rules.G, rules.K, logits.shape[-1]
        if rules.grammar is not None:
            logits = rules.grammar.constrained(logits.flatten(0, 1), self.states.flatten().tolist()).view_as(logits)
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
        if rules.grammar is not None:
            self.done = self.done | (self.scores == -math.inf).all(-1)
        self.tokens = tokens.flatten(1)
        parent = torch.arange(G * K) // K * K + parents.flatten(1).cpu()
        self.places = self.places.gather(1, parent)
        if rules.grammar is not None:
            newest = self.history[..., -1].flatten().tolist()
            before = self.states.gather(1, parent).flatten().tolist()
            states = [rules.grammar.after(*each) for each in zip(before, newest, strict=True)]
            self.states = torch.tensor(states, dtype=torch.long).view_as(parent)

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
