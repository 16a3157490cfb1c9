"""Diverse beam search (Vijayakumar et al. 2016, "Diverse Beam Search", arXiv 1610.02424) for any causal language model.

The beams of a prompt fall into groups. At each token the groups choose in turn, and a group is penalised for what the
groups before it chose: so they spread over different continuations instead of near copies of the best one. Groups that
are done leave, and waiting prompts enter in their place, within a budget of tokens.

Shapes: B prompts, G groups, K beams a group, N = G*K beams, V vocabulary, M candidates a group, T new tokens.
Scores are in nats and include the penalties, as in transformers up to 4.56; sequences and scores are the same as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sysdag.components.language.beam_state import BeamRules, Beams
from sysdag.components.language.decoder import Decoder, PromptInputs, arranged, decoder_of
from sysdag.components.language.waiting_prompts import WaitingPrompts
from sysdag.ops.diverse_beam_step import EMPTY, require


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
    eos_ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else eos_ids[0] if eos_ids else 0
    rules = BeamRules(
        num_beam_groups, num_beams // num_beam_groups, diversity_penalty, max_new_tokens, eos_ids, pad, length_penalty,
        early_stopping, ngram_size, eos_as_written,
    )  # fmt: skip
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(prompt: int, sequences: Tensor, scores: Tensor) -> bool:
        found[prompt] = sequences, scores
        return False

    search_side_by_side(model, prompts, [rules], keep, max_batch_tokens, max_batch_rows)
    sequences, scores = (torch.stack(part) for part in zip(*(found[n] for n in range(len(prompts))), strict=True))
    empty = sequences == EMPTY
    width = max_new_tokens - int(empty.all(1).all(0).sum())
    return sequences.masked_fill(empty, pad)[..., :width], scores


@torch.no_grad()
def search_side_by_side(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rules: Sequence[BeamRules],
    finished: Callable[[int, Int[Tensor, "N T"], Float[Tensor, " N"]], bool],
    max_batch_tokens: int | None,
    max_batch_rows: int | None,
    inputs: PromptInputs | None = None,
    decoder: Decoder | None = None,
) -> None:
    """Searches prompts by the first rules, and again by the next ones where that is asked for, all side by side.

    Args:
        model: see `diverse_beam_search`; so for `max_batch_tokens` and `max_batch_rows`.
        prompts: token ids, at least one each.
        rules: of the first search, and of further ones, each with more beams.
        finished: called with a prompt's number, its sequences (`EMPTY` behind their ends) and scores when it has been
            searched; returns whether it shall be searched by the next rules, if there are any.
        inputs: what prompts hold beside text.
        decoder: what extends rows; by default the one that serves the model.
    """
    decoder = decoder_of(model, inputs) if decoder is None else decoder
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if max_batch_tokens is None:
        max_batch_tokens = sum(each.N for each in rules) * len(prompts) * (max(map(len, prompts)) + rules[0].T)
    turns = [_Turn.of(each, max_batch_tokens, max_batch_rows, device) for each in rules]
    for number, ids in enumerate(prompts):
        turns[0].waiting.add(ids, [number])
    rows = 0
    while any(turn.waiting.rows or len(turn.beams.prompts) for turn in turns):
        running = [turn for turn in turns if len(turn.beams.prompts)]
        if running:
            extended, rows = _extended(decoder, [turn.beams for turn in running])
            for turn, part in zip(running, extended, strict=True):
                turn.beams.advance(part, turn.rules)
        elif rows:
            decoder.keep([])
            rows = 0
        for turn in reversed(turns):  # those that are searched again first: they are long
            there = [len(prompts[prompt]) for each in turns for prompt in each.beams.open_beams()]
            longest = max(there, default=0)
            for read in turn.waiting.admitted([longest] * -(-len(there) // turn.rules.N), decoder.joins):
                repeats = [len(alike) for alike in read]
                beams = [turn.rules.N * count for count in repeats]
                logits = decoder.enter([prompts[alike[0]] for alike in read], beams)
                turn.enter([number for alike in read for number in alike], logits, repeats, rows)
                rows += sum(beams)
        for place, turn in enumerate(turns):
            for prompt, sequences, scores in turn.leave():
                if finished(prompt, sequences, scores) and place + 1 < len(turns):
                    turns[place + 1].waiting.add(prompts[prompt], [prompt])


@dataclass
class _Turn:
    """The prompts that are searched, and wait to be searched, by the same rules."""

    rules: BeamRules
    waiting: WaitingPrompts
    beams: Beams

    @classmethod
    def of(cls, rules: BeamRules, tokens: int, rows: int | None, device: torch.device) -> _Turn:
        most = None if rows is None else max(1, rows // rules.N)
        return cls(rules, WaitingPrompts(rules.T, max(1, tokens // rules.N), most), Beams.start([], rules, device))

    def enter(self, prompts: list[int], logits: Tensor, repeats: list[int], rows: int) -> None:
        """Begins prompts behind the decoder's first `rows`, from the logits of each that is unlike the others."""
        self.rules.check_tokens(logits.shape[-1])
        logits = logits.repeat_interleave(torch.tensor(repeats, device=logits.device), 0)
        entering = Beams.start(prompts, self.rules, logits.device)
        entering.places = rows + torch.arange(entering.places.numel()).view_as(entering.places)
        entering.advance(logits[:, None].expand(-1, self.rules.N, -1), self.rules)
        self.beams = self.beams.joined(entering)

    def leave(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The prompts that are done, with their sequences (N,T) and scores (N,), best first."""
        done = self.beams.done.all(-1)
        if done.any():
            ended, self.beams = self.beams.select(done), self.beams.select(~done)
            yield from zip(ended.prompts.tolist(), *ended.ranked(), strict=True)


def _extended(decoder: Decoder, searches: Sequence[Beams]) -> tuple[list[Float[Tensor, "B N V"]], int]:
    """Logits after each beam's last token, zeros where its group is done, and how many rows the decoder now has.

    The beams of such a group leave the decoder: nothing that they are continued with is looked at.
    """
    open_ = [~each.done.repeat_interleave(each.tokens.shape[1] // each.done.shape[1], 1) for each in searches]
    kept = [row for each, which in zip(searches, open_, strict=True) for row in each.places[which.cpu()].tolist()]
    there = torch.tensor(arranged(kept))
    decoder.keep([row for _, row in sorted(zip(there.tolist(), kept, strict=True))])
    tokens = torch.cat([each.tokens[which] for each, which in zip(searches, open_, strict=True)])
    index = there.to(tokens.device)
    logits = decoder.extend(torch.empty_like(tokens).index_copy(0, index, tokens))
    found = []
    for each, which in zip(searches, open_, strict=True):
        count = int(which.sum())
        each.places[which.cpu()], there = there[:count], there[count:]
        part, index = logits[index[:count]], index[count:]
        if count < which.numel():
            part = part.new_zeros(which.numel(), part.shape[-1]).index_copy(0, which.flatten().nonzero()[:, 0], part)
        found.append(part.view(*which.shape, -1))
    return found, len(kept)


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
