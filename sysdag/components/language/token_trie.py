"""Token sequences packed as tries, so that a prefix that several share is computed once.

Sequences in lexicographic order, each written after what it shares with the one before, are a trie in depth-first
preorder. A token's subtree is then the columns from its own up to its `end`, and token j is token i or one of those
before it in some sequence exactly when j <= i < end[j]: that is the attention mask, and `depth` the position.

A row holds one or more tries. What is put together is decided by work: a prefix of s tokens that is not computed
again saves about 24 s d^2 operations in the linear layers of a decoder of width d; dense attention between the a tokens
of a trie and b new ones costs 8 a b d. So a sequence joins the trie of the one before it when 3 s d >= a b. Tries then
fill up rows together, as in sequence packing, unless one row for each sequence is less work.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from jaxtyping import Bool, Int
from torch import Tensor

Ids = Sequence[int]


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """The tries of some sequences in rows that are padded on the right, and what is predicted where.

    A completion's scored tokens are labels; one label may serve several sequences, and one row of hidden states may
    predict several labels. Padding is a token of its own at depth 0.

    Attributes:
        tokens: (R, T).
        depth: (R, T) the token's position in its sequences.
        parent: (R, T) the column of the token before it; -1 at the start of a sequence and for padding.
        end: (R, T) the column after the token's subtree.
        lengths: (R,) tokens of each row without padding.
        rows: (M,) where each label is predicted, as an index into the R * T positions.
        labels: (M,) the tokens that are predicted.
        sequence, label: (P,) each sequence beside each of its labels, in the order of the completions' scored tokens.
        num_sequences: how many there are.
    """

    tokens: Int[Tensor, "R T"]
    depth: Int[Tensor, "R T"]
    parent: Int[Tensor, "R T"]
    end: Int[Tensor, "R T"]
    lengths: Int[Tensor, " R"]
    rows: Int[Tensor, " M"]
    labels: Int[Tensor, " M"]
    sequence: Int[Tensor, " P"]
    label: Int[Tensor, " P"]
    num_sequences: int

    @property
    def is_chains(self) -> bool:
        """Whether each row is one sequence (and prefixes of it), which an ordinary causal mask serves."""
        place = torch.arange(self.tokens.shape[1])
        return bool(((self.depth == place) | (place >= self.lengths[:, None])).all())

    def mask(self) -> Bool[Tensor, "R T T"]:
        """True where a token (second axis) attends to another (third axis): to itself and its ancestors."""
        return subtrees(self.end)


def subtrees(end: Int[Tensor, "*R T"], first: int = 0) -> Bool[Tensor, "*R T T"]:
    """True where a token (second last axis) is in the subtree of another (last axis); columns begin at `first`."""
    place = torch.arange(first, first + end.shape[-1], device=end.device)
    return (place <= place[:, None]) & (place[:, None] < end[..., None, :])


def pack(
    sequences: Sequence[tuple[Ids, Ids]],
    hidden_size: float,
    pad_token_id: int = 0,
    masks: Sequence[Ids | None] | None = None,
) -> TokenTrie:
    """The rows for sequences (prompt, completion); no more work than one row for each sequence takes.

    Args:
        sequences: prompts of at least one token; a completion may be empty.
        hidden_size: the model's width d, see above. With 0 every row is a chain: a sequence shares a row only with
            one that it extends. With inf everything is shared that can be.
        pad_token_id: what fills rows.
        masks: for each completion 1 for a token that is scored and 0 for one that is only read; None scores all.

    Raises:
        ValueError: for a prompt without tokens, or a mask of another length than its completion.
    """
    masks = [None] * len(sequences) if masks is None else masks
    for number, ((_, completion), mask) in enumerate(zip(sequences, masks, strict=True)):
        if mask is not None and len(mask) != len(completion):
            raise ValueError(f"pack: sequence {number} has {len(completion)} tokens to score, its mask {len(mask)}.")
    bare = [number for number, (prompt, _) in enumerate(sequences) if not len(prompt)]
    if bare:
        raise ValueError(f"pack needs prompts of at least one token; that of sequence {bare[0]} has none.")
    ordered = _Ordered(sequences)
    growing = _Growing(hidden_size)
    for ids, shared in zip(ordered.ids, ordered.shared, strict=True):
        growing.add(len(ids), shared)
    return _build(sequences, ordered, growing.layout(), pad_token_id, masks)


def groups(sequences: Sequence[tuple[Ids, Ids]], hidden_size: float, max_tokens: int) -> list[list[int]]:
    """Partition of the sequences' numbers into groups for which `pack` makes at most `max_tokens` positions (R * T).

    Sequences that share prefixes come into the same or neighbouring groups; without sharing (`hidden_size=0`), those
    of like length. A sequence that is longer than the budget is a group of its own.
    """
    ordered = _Ordered(sequences)
    found: list[list[int]] = []
    turn = range(len(sequences))
    if hidden_size == 0:
        turn = sorted(turn, key=lambda place: len(ordered.ids[place]))  # type: ignore[assignment]
    growing = _Growing(hidden_size)
    for place in turn:
        grown = growing.copy()
        grown.add(len(ordered.ids[place]), ordered.shared[place] if hidden_size else 0)
        if not found or not grown.fits(max_tokens):
            found.append([])
            grown = _Growing(hidden_size)
            grown.add(len(ordered.ids[place]), 0)
        found[-1].append(ordered.numbers[place])
        growing = grown
    return [sorted(group) for group in found]


class _Ordered:
    """Sequences in lexicographic order.

    Attributes:
        numbers: which sequence stands at each place.
        ids: its tokens.
        shared: how many of them begin the sequence before it too.
    """

    def __init__(self, sequences: Sequence[tuple[Ids, Ids]]) -> None:
        ids = [numpy.array([*prompt, *completion], dtype=numpy.int64) for prompt, completion in sequences]
        # Big-endian bytes sort as the numbers do, in one comparison of memory.
        keys = [each.astype(">u8").tobytes() for each in ids]
        self.numbers = sorted(range(len(ids)), key=keys.__getitem__)
        self.ids = [ids[number] for number in self.numbers]
        self.shared = [0, *map(_shared, self.ids[:-1], self.ids[1:])][: len(ids)]


def _shared(one: numpy.ndarray, other: numpy.ndarray) -> int:
    short = min(len(one), len(other))
    differs = one[:short] != other[:short]
    first = int(differs.argmax()) if short else 0
    return first if short and differs[first] else short


@dataclass
class _Segments:
    """Runs of neighbouring sequences that share one trie: how many each has, and its tokens."""

    counts: list[int]
    tokens: list[int]

    def add(self, length: int, shared: int, hidden_size: float) -> None:
        new = length - shared
        # Extending the one chain that is there so far costs nothing. (0 * inf is nan, and no reason to join.)
        if self.tokens and (shared == self.tokens[-1] or 3 * shared * hidden_size >= self.tokens[-1] * new):
            self.counts[-1] += 1
            self.tokens[-1] += new
        else:
            self.counts.append(1)
            self.tokens.append(length)

    def copy(self) -> _Segments:
        return _Segments([*self.counts], [*self.tokens])


@dataclass
class _Layout:
    """The segments (by number) of each row, and the longest row's tokens."""

    segments: _Segments
    rows: list[list[int]]
    width: int

    @classmethod
    def of(cls, segments: _Segments, rows: list[list[int]]) -> _Layout:
        width = max((sum(segments.tokens[number] for number in row) for row in rows), default=0)
        return cls(segments, rows, width)

    @property
    def size(self) -> int:
        """Positions, padding included."""
        return len(self.rows) * self.width

    def work(self, hidden_size: float) -> float:
        """24 d^2 operations for each token and 4 d for each pair of them, in units of 4 d."""
        return self.size * (6 * min(hidden_size, 1e9) + self.width)

    def places(self) -> list[list[range]]:
        """The places in lexicographic order that each row's segments hold."""
        starts = numpy.cumsum([0, *self.segments.counts]).tolist()
        return [[range(starts[number], starts[number + 1]) for number in row] for row in self.rows]


class _Growing:
    """The rows of sequences that are added in lexicographic order, as tries and as chains."""

    def __init__(self, hidden_size: float) -> None:
        self.hidden_size = hidden_size
        self.tries, self.chains = _Segments([], []), _Segments([], [])

    def add(self, length: int, shared: int) -> None:
        self.chains.add(length, shared, 0)
        if self.hidden_size:
            self.tries.add(length, shared, self.hidden_size)

    def copy(self) -> _Growing:
        made = _Growing(self.hidden_size)
        made.tries, made.chains = self.tries.copy(), self.chains.copy()
        return made

    def layout(self) -> _Layout:
        """Chains in rows of their own, or tries in rows filled up to one of a few widths, whichever is least work."""
        best = _Layout.of(self.chains, [[number] for number in range(len(self.chains.tokens))])
        tokens = self.tries.tokens
        rows = len(tokens)
        while rows:  # as few as the longest trie allows; then half as many, while that may save padding
            width = max(max(tokens), math.ceil(sum(tokens) / rows))
            found = _Layout.of(self.tries, _fill(tokens, width))
            best = min(best, found, key=lambda each: each.work(self.hidden_size))
            rows = min(rows, len(found.rows)) // 2 if found.size > sum(tokens) else 0
        return best

    def fits(self, max_tokens: int) -> bool:
        """Whether the layout has at most so many positions."""
        most = len(self.chains.tokens) * max(self.chains.tokens)  # the layout is less work in longer rows, so smaller
        least = min(most, sum(self.tries.tokens) if self.hidden_size else most)
        return most <= max_tokens or (least <= max_tokens and self.layout().size <= max_tokens)


def _fill(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the items' numbers in each bin."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: what is left in a bin, and its number
    for number in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        place = bisect.bisect_left(room, (sizes[number], 0))
        left, chosen = room.pop(place) if place < len(room) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(number)
        bisect.insort(room, (left - sizes[number], chosen))
    return bins


def _build(
    sequences: Sequence[tuple[Ids, Ids]], ordered: _Ordered, layout: _Layout, pad_token_id: int,
    masks: Sequence[Ids | None],
) -> TokenTrie:  # fmt: skip
    height, width = len(layout.rows), layout.width
    tokens = numpy.full((height, width), pad_token_id, dtype=numpy.int64)
    depth = numpy.zeros_like(tokens)
    parent = numpy.full_like(tokens, -1)
    end = numpy.tile(numpy.arange(1, width + 1), (height, 1))
    lengths = numpy.zeros(height, dtype=numpy.int64)
    nodes: list[numpy.ndarray] = [numpy.zeros(0, dtype=numpy.int64)] * len(sequences)
    for row, tries in enumerate(layout.places()):
        count = 0
        for places in tries:
            path = numpy.zeros(0, dtype=numpy.int64)  # the columns of the sequence at hand
            for place in places:
                ids, number = ordered.ids[place], ordered.numbers[place]
                shared = 0 if place == places.start else ordered.shared[place]
                new = numpy.arange(count, count + len(ids) - shared)
                end[row, path[shared:]] = count  # their subtrees are complete
                path = numpy.concatenate([path[:shared], new])
                tokens[row, new] = ids[shared:]
                depth[row, new] = numpy.arange(shared, len(ids))
                parent[row, path[1:]] = path[:-1]
                count += len(new)
                scored = row * width + path[len(sequences[number][0]) :]
                mask = masks[number]
                nodes[number] = scored if mask is None else scored[numpy.asarray(mask, dtype=bool)]
            end[row, path] = count
        lengths[row] = count
    unique, label = numpy.unique(_joined(nodes), return_inverse=True)
    before = unique // max(width, 1) * width + parent.reshape(-1)[unique]
    sequence = numpy.repeat(numpy.arange(len(sequences)), [len(each) for each in nodes])
    tensor = torch.from_numpy
    return TokenTrie(
        tokens=tensor(tokens), depth=tensor(depth), parent=tensor(parent), end=tensor(end), lengths=tensor(lengths),
        rows=tensor(before), labels=tensor(tokens.reshape(-1)[unique]), sequence=tensor(sequence), label=tensor(label),
        num_sequences=len(sequences),
    )  # fmt: skip


def _joined(arrays: Iterable[numpy.ndarray]) -> numpy.ndarray:
    return numpy.concatenate([numpy.zeros(0, dtype=numpy.int64), *arrays])
