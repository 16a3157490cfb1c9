import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from sysdag.components.language.packed_inputs import subtree_mask
from sysdag.components.language.token_trie import groups, pack

TOKENS = st.integers(0, 2)  # few, so that prefixes collide
SEQUENCES = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=6), st.lists(TOKENS, max_size=5)), min_size=1, max_size=12
)
HIDDEN_SIZES = st.sampled_from([0, 1, 4, 64, math.inf])


def real(trie):
    """(row, column) of every token that is no padding."""
    return [(row, column) for row, count in enumerate(trie.lengths.tolist()) for column in range(count)]


def prefixes_of(trie):
    """To each place (row, column), the tokens from the start to it, by following parents."""
    found = {}
    for row, (tokens, parents) in enumerate(zip(trie.tokens.tolist(), trie.parent.tolist(), strict=True)):
        for place in range(len(tokens)):
            path, column = [], place
            while column != -1:
                path.append(tokens[column])
                column = parents[column]
            found[row, place] = tuple(reversed(path))
    return found


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, HIDDEN_SIZES)
def test_a_token_attends_to_its_prefix_and_nothing_else(sequences, hidden_size):
    trie = pack(sequences, hidden_size, pad_token_id=9)
    mask = trie.mask()
    whole = {tuple([*prompt, *completion]) for prompt, completion in sequences}
    prefixes = {sequence[:size] for sequence in whole for size in range(1, len(sequence) + 1)}
    prefix = prefixes_of(trie)
    assert {prefix[place] for place in real(trie)} == prefixes
    tokens, depth, attended = trie.tokens.tolist(), trie.depth.tolist(), mask.tolist()
    for row, column in real(trie):
        seen = [other for other, is_seen in enumerate(attended[row][column]) if is_seen]
        assert tuple(tokens[row][other] for other in seen) == prefix[row, column]
        assert [depth[row][other] for other in seen] == list(range(len(seen)))
        assert seen[-1] == column
    for row, column in set(map(tuple, (trie.tokens == 9).nonzero().tolist())):
        assert [other for other, is_seen in enumerate(attended[row][column]) if is_seen] == [column]
        assert not any(attended[row][other][column] for other in range(column))
        assert depth[row][column] == 0


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, HIDDEN_SIZES)
def test_each_sequence_has_its_completions_tokens_as_labels_after_their_prefixes(sequences, hidden_size):
    trie = pack(sequences, hidden_size)
    width = trie.tokens.shape[1]
    prefix = prefixes_of(trie)
    for number, (prompt, completion) in enumerate(sequences):
        labels = trie.label[trie.sequence == number]
        assert trie.labels[labels].tolist() == list(completion)
        places = [divmod(int(row), width) for row in trie.rows[labels]]
        full = [*prompt, *completion]
        assert [prefix[place] for place in places] == [tuple(full[:size]) for size in range(len(prompt), len(full))]
    assert trie.num_sequences == len(sequences)
    assert len(trie.rows) == len({*zip(trie.rows.tolist(), trie.labels.tolist(), strict=True)})


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, HIDDEN_SIZES)
def test_it_is_never_more_work_than_a_row_for_each_sequence(sequences, hidden_size):
    trie = pack(sequences, hidden_size)
    rows, width = trie.tokens.shape
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    linear = 6 * hidden_size if hidden_size < math.inf else 1e12
    assert rows * width * (linear + width) <= len(sequences) * longest * (linear + longest)
    if hidden_size == 0:
        assert trie.is_chains


def test_sharing_pays_by_the_square_of_the_row():
    """Joins when 3 * shared * hidden_size >= row * new: 3 * 10 * d against 12 * 2, then 61 * 51."""
    stem = list(range(10))
    sequences = [(stem, [11, 12]), (stem, [13, 14])]
    assert pack(sequences, 1).tokens.shape == (1, 14)
    wide = [([*stem, *range(20, 70)], [1]), ([*stem, *range(80, 130)], [1])]
    assert pack(wide, 1).tokens.shape == (2, 61)
    assert pack(wide, 103).tokens.shape == (2, 61)
    assert pack(wide, 104).tokens.shape == (1, 112)


def test_all_that_begins_alike_is_one_trie_and_the_rest_fills_the_rows():
    stem = list(range(100))
    sequences = (
        [([*stem], [k, k]) for k in range(4)] + [([50], [k]) for k in range(3)] + [([60 + k], [1]) for k in range(9)]
    )
    trie = pack(sequences, math.inf)
    distinct = {tuple([*p, *c])[:size] for p, c in sequences for size in range(1, len(p) + len(c) + 1)}
    assert int(trie.lengths.sum()) == len(distinct) == 100 + 8 + 4 + 18
    assert trie.tokens.numel() <= 1.1 * len(distinct)


def test_without_anything_shared_the_rows_are_those_of_the_sequences():
    sequences = [([k, 1, 2], [3, 4]) for k in range(5)]
    trie = pack(sequences, 4096)
    assert trie.tokens.shape == (5, 5)
    assert trie.is_chains


def test_a_sequence_that_another_extends_shares_its_row_even_without_tries():
    trie = pack([([1, 2], [3]), ([1, 2], [3]), ([1, 2], [3, 4]), ([1], [2])], 0)
    assert trie.tokens.tolist() == [[1, 2, 3, 4]]
    assert trie.is_chains
    assert sorted(zip(trie.rows.tolist(), trie.labels.tolist(), strict=True)) == [(0, 2), (1, 3), (2, 4)]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has none"):
        pack([([1], [2]), ([], [2])], 8)


@settings(max_examples=30, deadline=None)
@given(SEQUENCES)
def test_the_mask_of_flex_attention_is_the_dense_one(sequences):
    trie = pack(sequences, math.inf)
    rows, width = trie.tokens.shape
    dense = create_mask(subtree_mask(trie.end), rows, None, width, width, device="cpu")
    assert torch.equal(dense[:, 0], trie.mask())


def test_flex_attention_under_the_block_mask_attends_as_dense_attention_does():
    torch.manual_seed(0)
    stem = list(range(150))
    trie = pack([(stem, [k, *range(90)]) for k in range(4)] + [([7], [1, 2])], math.inf)
    rows, width = trie.tokens.shape
    assert width > 256, "several blocks"
    block = create_block_mask(subtree_mask(trie.end), rows, None, width, width, device="cpu")
    q, k, v = torch.randn(3, rows, 2, width, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=trie.mask()[:, None])
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block), expected)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, HIDDEN_SIZES.filter(math.isfinite), st.integers(1, 40))
def test_groups_are_a_partition_within_the_budget(sequences, hidden_size, max_tokens):
    found = groups(sequences, hidden_size, max_tokens)
    assert sorted(number for group in found for number in group) == list(range(len(sequences)))
    assert found == groups(sequences, hidden_size, max_tokens)
    for group in found:
        size = pack([sequences[number] for number in group], hidden_size).tokens.numel()
        assert size <= max_tokens or len(group) == 1


def test_groups_keep_what_shares_a_prefix_together():
    sequences = [([10 * (k % 3), *range(20)], [1, 2, k]) for k in range(24)]
    found = groups(sequences, 64, 64)
    for stem in range(3):
        places = [place for place, group in enumerate(found) if any(number % 3 == stem for number in group)]
        assert places == list(range(places[0], places[-1] + 1))
    assert len(found) <= 4, "24 rows of 24 tokens, of which 3 * (22 + 8) are distinct"
    assert len(groups(sequences, 0, 64)) == 12


def test_thousands_of_sequences_are_packed_in_well_under_a_second():
    torch.manual_seed(0)
    stems = torch.randint(32000, (500, 200)).tolist()
    sequences = [(stems[k % 500], torch.randint(32000, (60,)).tolist()) for k in range(4000)]
    start = time.perf_counter()
    assert int(pack(sequences, 4096).lengths.sum()) <= 500 * 200 + 4000 * 60
    assert time.perf_counter() - start < 2.0
