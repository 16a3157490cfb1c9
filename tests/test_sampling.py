"""Sampling from language models: draws by seed, row and position; prompts read once; rows that leave and enter."""

import functools
import itertools
import logging
import random

import pytest
import torch
from decoder_families import plain_log_prob, tiny_decoder
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import char_tokenizer, llama

from sysdag import Input, System, node
from sysdag.components import CausalLM, Tabular
from sysdag.components.decoding import draw_options, truncated
from sysdag.components.language.sampling import sample_tokens
from sysdag.components.random_streams import row_seeds, uniforms
from sysdag.errors import DataError, PlanError
from sysdag.execution.running import run
from sysdag.objectives.strategies import ImportanceSampling, MonteCarlo

ENDS = [1, 2, 3, 4, 5]
OPTIONS = dict(max_new_tokens=12, eos_token_ids=ENDS)


# --- random numbers ---


def split_mix(state):
    """SplitMix64's outputs in Python's integers, as its authors' public C code computes them."""
    mask = 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        yield mixed ^ (mixed >> 31)


def test_split_mix_is_the_published_one():
    assert list(itertools.islice(split_mix(1234567), 3)) == [  # the values that its C code is known by
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


@given(st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_random_numbers_are_those_of_nested_split_mix(seed, position):
    stream = next(itertools.islice(split_mix(next(split_mix(seed))), position, None))
    wanted = [((bits >> 11) + 0.5) * 2.0**-53 for bits in itertools.islice(split_mix(stream), 4)]
    assert uniforms(torch.tensor([seed]), torch.tensor([position]), 4)[0].tolist() == wanted


def test_random_numbers_of_rows_positions_and_places_are_unrelated():
    count = 400
    grid = uniforms(torch.arange(count), torch.zeros(count, dtype=torch.long), count)
    later = uniforms(torch.zeros(count, dtype=torch.long), torch.arange(count), count)
    for found in (grid, grid.T, later, later.T):
        cells = (found * 20).long().flatten().bincount(minlength=20)
        assert chisquare(cells).pvalue > 1e-4
        pairs = ((found[:-1] * 8).long() * 8 + (found[1:] * 8).long()).flatten().bincount(minlength=64)
        assert chisquare(pairs).pvalue > 1e-4


def test_seeds_of_rows_come_from_the_generator_in_order():
    many, few = (row_seeds(torch.Generator().manual_seed(5), count) for count in (20, 7))
    assert many[:7] == few
    assert row_seeds([3, 4], 2) == [3, 4]
    with pytest.raises(ValueError, match="a seed for each of 3 rows, got 2"):
        row_seeds([3, 4], 3)


# --- one draw ---


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 90, "top_p": 0.95}]
)
def test_draws_follow_the_exact_distribution_to_its_tail(options):
    """300 options of which 250 share a hundredth: their block is as likely as it should be, and each of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, generator=generator) + torch.where(torch.arange(300) < 50, 3.0, -4.0)
    logits = logits[torch.randperm(300, generator=generator)]
    given_ = {"temperature": 1.0, "top_p": 1.0, "top_k": None} | options
    exact = truncated(logits[None].double(), **given_)[0].softmax(-1)
    count = 200_000
    drawn, log_probs = draw_options(
        logits.expand(count, -1), torch.arange(count), torch.zeros(count, dtype=torch.long), **options
    )
    torch.testing.assert_close(log_probs, exact.log()[drawn], rtol=1e-5, atol=1e-6)
    seen = drawn.bincount(minlength=300)
    assert not seen[exact == 0].any()
    often = exact * count >= 5
    observed = [*seen[often].tolist(), int(seen[~often].sum())]
    wanted = [*(exact[often] * count).tolist(), float(exact[~often].sum() * count)]
    if wanted[-1] == 0:
        observed.pop(), wanted.pop()
    assert chisquare(observed, wanted).pvalue > 1e-4


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 0.9, 0.999]), st.sampled_from([None, 3, 600]))
def test_a_nucleus_is_that_of_a_sort_of_everything(seed, top_p, top_k):
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[0.1], [1.0], [6.0]])
    kept = truncated(logits, 1.0, top_p, top_k).isfinite()
    for row, found in zip(logits.double(), kept, strict=True):
        order = row.argsort(descending=True)[: top_k or 700]
        probs = row[order].softmax(-1)
        count = int((probs.cumsum(-1) - probs < top_p).sum())
        assert abs(int(found.sum()) - count) <= 1  # a sum that is at the bound to rounding
        assert found[order[: min(count, int(found.sum()))]].all()


def test_logits_without_a_distribution_are_refused_by_row():
    logits = torch.zeros(3, 10)
    for value in (torch.nan, torch.inf):
        logits[1, 4] = value
        with pytest.raises(DataError, match="not finite") as raised:
            draw_options(logits, torch.arange(3), torch.arange(3))
        assert raised.value.element == 1
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(DataError, match="not finite") as raised:
        sample_tokens(model, [[5, 6], [5, 7, 8]], [0, 1], **OPTIONS)
    assert raised.value.element == 1


# --- rows that leave and enter ---

FAMILIES = [
    "llama", "mistral", "gemma2", "gemma3_text", "gemma4_text", "deepseek_v3", "bloom", "mamba", "mamba2", "jamba",
    "bamba", "qwen3_next", "lfm2_moe", "falcon_h1", "minimax", "bart", "rwkv", "recurrent_gemma", "mpt",
]  # fmt: skip


def prompts_of(count, seed=0):
    """Prompts that begin alike, of different lengths, two of them equal; and one that has nothing in common."""
    numbers = random.Random(seed)
    common = [numbers.randrange(6, 45) for _ in range(18)]
    found = [[*common[: 16 + n % 3], *(numbers.randrange(6, 45) for _ in range(1 + n % 11))] for n in range(count - 2)]
    return [*found, found[0], [7, 8, 9]]


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_those_of_plain_forwards_whatever_is_drawn_beside_them(family):
    """A window of 4 tokens, states, latent keys, positions that count padding: within a budget that rows wait for."""
    model = tiny_decoder(family)
    prompts = prompts_of(8)
    seeds = [random.Random(number).getrandbits(62) for number in range(16)]
    found = sample_tokens(model, prompts, seeds, num_samples=2, **OPTIONS)
    assert min(map(len, found.token_ids)) < max(map(len, found.token_ids))
    wanted = [plain_log_prob(model, prompts[row // 2], ids) for row, ids in enumerate(found.token_ids)]
    assert found.log_probs.tolist() == pytest.approx(wanted, abs=1e-3)
    assert found.finished.tolist() == [ids[-1] in ENDS for ids in found.token_ids]
    waited = sample_tokens(model, prompts, seeds, num_samples=2, max_batch_tokens=170, **OPTIONS)
    assert waited.token_ids == found.token_ids
    assert waited.log_probs.tolist() == pytest.approx(found.log_probs.tolist(), abs=1e-4)
    alone = [sample_tokens(model, [prompts[row // 2]], [seeds[row]], **OPTIONS).token_ids[0] for row in (0, 7, 15)]
    assert alone == [found.token_ids[row] for row in (0, 7, 15)]


@functools.cache
def component(**options):
    return CausalLM(llama(), char_tokenizer(), max_new_tokens=10, max_length=100, **options)


def test_batches_of_1_7_and_64_draw_the_same():
    texts = [("a longer prompt " * 3)[: 3 + n % 40] for n in range(64)]
    seeds = list(range(100, 164))
    wanted = component().sample(texts, generator=seeds)
    for size in (1, 7):
        found = []
        for start in range(0, 64, size):
            found += component().sample(texts[start : start + size], generator=seeds[start : start + size])
        assert [draw.record for draw in found] == [draw.record for draw in wanted]
        assert [d.log_prob for d in found] == pytest.approx([d.log_prob for d in wanted], abs=1e-4)
    few = component(max_batch_tokens=60, batch_size=3).sample(texts[::-1], generator=seeds[::-1])
    assert [draw.record for draw in few[::-1]] == [draw.record for draw in wanted]
    assert len({tuple(draw.record["token_ids"]) for draw in wanted}) > 40


def counted(model):
    """The shape of each call's tokens, from now on."""
    shapes = []
    model.register_forward_pre_hook(
        lambda m, a, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_equal_prompts_and_what_prompts_begin_with_are_read_once():
    model = llama()
    sample_tokens(model, [[5, 6]], [0], **OPTIONS)
    shapes = counted(model)
    common = list(range(6, 26))
    sample_tokens(model, [[*common, 30, 31]] * 4, range(12), num_samples=3, max_new_tokens=1, eos_token_ids=ENDS)
    assert shapes == [(1, 22)]
    shapes.clear()
    sample_tokens(model, [[*common, 30, 31], [*common, 32]], range(2), max_new_tokens=1, eos_token_ids=ENDS)
    assert shapes == [(1, 20), (2, 2)]


def test_rows_that_ended_are_not_computed_and_waiting_ones_take_their_places():
    model = llama(peaked=1.0)
    sample_tokens(model, [[5, 6]], [0], **OPTIONS)
    shapes = counted(model)
    prompts = [[number, 7, 8] for number in range(6, 30)]
    options = dict(max_new_tokens=12, eos_token_ids=list(range(1, 9)))
    found = sample_tokens(model, prompts, range(24), max_batch_tokens=8 * 15, **options)
    steps = [rows for rows, tokens in shapes if tokens == 1]
    read = [rows for rows, tokens in shapes if tokens == 3]
    assert sum(steps) == int((found.lengths - 1).sum())
    assert max(steps) <= 8
    assert sum(read) == 24
    assert len(read) > 3
    assert len(steps) < 0.6 * 3 * 12


def test_a_budget_below_one_row_takes_rows_one_by_one_and_wrong_ones_are_refused():
    found = component(max_batch_tokens=1).sample(["ab", "cd"], generator=[1, 2])
    assert [draw.record for draw in found] == [
        draw.record for draw in component().sample(["ab", "cd"], generator=[1, 2])
    ]
    for option in ({"max_batch_tokens": 0}, {"max_batch_tokens": None}, {"batch_size": 0}, {"batch_size": 2.5}):
        with pytest.raises(PlanError, match=next(iter(option))):
            CausalLM(llama(), char_tokenizer(), **option)


def test_a_cache_that_takes_no_rows_in_is_said_once(caplog):
    model = tiny_decoder("minimax")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sample_tokens(model, prompts_of(4), range(4), max_batch_tokens=60, **OPTIONS)
    assert caplog.text.count("decodes batches that no prompt enters before they end: its cache takes no rows in") == 1


# --- runs and candidates ---


def system():
    question = Input("question", str)

    @node(component())
    def draft(question):
        return question

    @node(Tabular({"a": {"x": 0.3, "y": 0.7}}))
    def coin(draft):
        return "a"

    @node(component())
    def answer(question, draft):
        return f"{question} {draft[:5]}"

    return System(question >> draft, draft >> coin, (question & draft) >> answer).compile()


def test_a_run_is_the_same_in_batches_of_any_size():
    plan = system()
    inputs = {"question": ["ab", "what is it", "z? yes", "ab"]}
    rows = {}
    for size in (1, 3, 16):
        traces = list(run(plan, inputs, runs=2, seed=4, batch_size=size))
        rows[size] = [
            [(name, cells[row].value, cells[row].record) for name, cells in trace.cells.items()]
            for trace in traces for row in range(len(trace))
        ]  # fmt: skip
    assert rows[1] == rows[3] == rows[16]
    assert len({str(row) for row in rows[1]}) == 8  # equal inputs and runs of one have draws of their own


@pytest.mark.parametrize(
    "strategy", [MonteCarlo(num_candidates=3, distinct=False), ImportanceSampling(num_candidates=3, temperature=1.4)]
)
def test_candidates_of_a_prompt_depend_on_its_seed_alone(strategy):
    plan = system()
    questions, seeds = ["ab", "what is it", "z? yes"], [11, 12, 13]
    whole = strategy.draw(plan, {"question": questions}, seeds)
    assert whole.trace.columns == {}
    for number in range(3):
        alone = strategy.draw(plan, {"question": [questions[number]]}, [seeds[number]])
        wanted = whole.of_prompt(number)
        assert [cell.record for cell in alone.trace.cells["draft"]] == [
            cell.record for cell in wanted.trace.cells["draft"]
        ]
        assert alone.log_proposal == pytest.approx(wanted.log_proposal, abs=1e-4)
    assert len({tuple(cell.record["token_ids"]) for cell in whole.trace.cells["draft"]}) > 6


@pytest.mark.gpu
def test_the_numbers_of_a_draw_are_the_same_on_a_gpu():
    seeds, positions = torch.arange(7, dtype=torch.int64) * 2**57 - 5, torch.tensor([0, 1, 2, 3, 9, 10**6, 2**40])
    found = uniforms(seeds.cuda(), positions.cuda(), 1000)
    assert torch.equal(found.cpu(), uniforms(seeds, positions, 1000))
