"""Diverse beam search against recorded results of transformers 4.56.2 and against plain loops."""

import inspect
import json
import math
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sysdag.components.language import key_value_slabs
from sysdag.components.language.beam import diverse_beam_search
from sysdag.components.language.decoder import arranged
from sysdag.ops.diverse_beam_step import diverse_beam_step

FIXTURES = Path(__file__).parent / "fixtures" / "diverse_beam"
RECORDED = json.loads((FIXTURES / "cases.json").read_text())
CASES = RECORDED["cases"]
PROMPTS = [[0, 0, 0, 21, 31, 43], [24, 36, 30, 27, 23, 20], [0, 0, 0, 0, 0, 7], [0, 0, 11, 12, 13, 14]]
MASK = [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]]
OPTIONS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "max_new_tokens": 8}


def new_model(name="qwen2"):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**RECORDED["models"][name]))
    model.load_state_dict(load_file(FIXTURES / f"{name}.safetensors"))
    return model.eval()


@cache
def shared_model(name="qwen2"):
    return new_model(name)


def random_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model


def search(model, prompts=PROMPTS, mask=MASK, **options):
    return diverse_beam_search(model, torch.tensor(prompts), torch.tensor(mask), **(OPTIONS | options))


def assert_recorded(case):
    model = shared_model(case["model"])
    sequences, scores = search(model, case["input_ids"], case["attention_mask"], **case["options"])
    assert sequences.tolist() == case["sequences"]
    torch.testing.assert_close(scores, torch.tensor(case["scores"]), atol=1e-5, rtol=1e-6)


# --- transformers 4.56.2 ---


def test_recorded_cases_cover_the_options():
    seen = {name: {json.dumps(case["options"][name]) for case in CASES} for name in CASES[0]["options"]}
    assert len(CASES) >= 60
    assert seen["diversity_penalty"] == {"0.5", "2.0", "20.0"}
    assert seen["early_stopping"] == {"true", "false", '"never"'}
    assert {"1.0", "0.0", "-0.5"} < seen["length_penalty"]
    kinds = Counter(type(case["options"]["eos_token_id"]).__name__ for case in CASES)
    assert min(kinds["NoneType"], kinds["int"], kinds["list"]) >= 10


@pytest.mark.parametrize("number", range(len(CASES)))
def test_same_as_transformers(number):
    assert_recorded(CASES[number])


def test_same_when_the_cache_grows_often(monkeypatch):
    monkeypatch.setattr(key_value_slabs, "ROOM", 3)
    for case in CASES[::5]:
        assert_recorded(case)


# --- the step against a plain loop ---


def step_by_loop(log_probs, scores, penalty, eos=(), done=None, pad=0, history=None, ngram_size=1):
    """Candidates (score, beam, token) of every group of one prompt, best first, all of them."""
    groups, size, vocabulary = len(log_probs), len(log_probs[0]), len(log_probs[0][0])
    candidates, chosen, sequences = [], [], []
    for g in range(groups):
        ranked = []
        for k in range(size):
            for v in range(vocabulary):
                if ngram_size == 1:
                    n = chosen.count(v)
                else:
                    gram = [*history[g][k], v][-ngram_size:]
                    n = sum(
                        len(gram) == ngram_size
                        and any(beam[i : i + ngram_size] == gram for i in range(len(beam) - ngram_size + 1))
                        for beam in sequences
                    )
                ranked.append((log_probs[g][k][v] - penalty * n + scores[g][k], k, v))
        ranked.sort(reverse=True)
        candidates.append(ranked)
        kept = [(k, v) for _, k, v in ranked if v not in eos][:size]
        if done is not None and done[g]:
            chosen += [pad] * size
            sequences += [list(beam) for beam in history[g]] if history else []
        else:
            chosen += [v for _, v in kept]
            sequences += [[*history[g][k], v] for k, v in kept] if history else []
    return candidates


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(4, 12)),
    penalty=st.sampled_from([0.0, 0.3, 1.7, 25.0]),
    ends=st.integers(0, 2),
    past=st.integers(0, 8),
    ngram_size=st.sampled_from([1, 2, 2, 3]),
    some_done=st.booleans(),
    empty=st.integers(0, 2),
)
def test_step_is_the_plain_loop(seed, shape, penalty, ends, past, ngram_size, some_done, empty):
    B, G, K, V = shape
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, G, K, V, generator=generator)
    scores = -torch.rand(B, G, K, generator=generator).sort(-1).values
    # Few distinct tokens, so that n-grams meet again.
    history = torch.randint(0, 3, (B, G, K, past), generator=generator)
    done = torch.rand(B, G, generator=generator) < (0.4 if some_done else 0.0)
    history[..., max(past - empty, 0) :].masked_fill_(done[..., None, None], -1)
    eos = torch.randperm(V, generator=generator)[:ends]
    M = max(2, 1 + ends) * K

    tokens, parents, best = diverse_beam_step(
        logits, scores, penalty, num_candidates=M, eos_token_ids=eos if ends else None, done=done, pad_token_id=1,
        history=history, ngram_size=ngram_size,
    )  # fmt: skip

    log_probs = logits.double().log_softmax(-1)
    for b in range(B):
        expected = step_by_loop(
            log_probs[b].tolist(), scores[b].tolist(), penalty, eos.tolist(), done[b].tolist(), 1,
            [[[v for v in beam if v >= 0] for beam in group] for group in history[b].tolist()], ngram_size,
        )  # fmt: skip
        for g in range(G):
            if not done[b, g]:
                assert list(zip(parents[b, g].tolist(), tokens[b, g].tolist(), strict=True)) == [
                    (k, v) for _, k, v in expected[g][:M]
                ]
                assert best[b, g].tolist() == pytest.approx([score for score, _, _ in expected[g][:M]], abs=2e-5)


def test_hamming_penalty_by_hand():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(1, 3, 1, 3)
    tokens, parents, scores = diverse_beam_step(logits, torch.zeros(1, 3, 1), math.log(2), num_candidates=1)
    # Group 0 takes token 0 (0.5). For group 1 it is worth 0.25, so token 1 (0.3). For group 2: 0.25, 0.15, 0.2.
    assert tokens.tolist() == [[[0], [1], [0]]]
    assert parents.tolist() == [[[0], [0], [0]]]
    assert scores.exp().flatten().tolist() == pytest.approx([0.5, 0.3, 0.25])


def test_an_ngram_twice_in_one_beam_counts_once():
    history = torch.tensor([[[[0, 1, 0, 1]], [[2, 2, 2, 0]]]])  # group 0 wrote the pair (0, 1) twice
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0, 3] = 9.0  # group 0 goes on with 3
    logits[0, 1, 0, 1] = 1.5
    first = logits[0, 1, 0].log_softmax(-1)
    for penalty, token in ((1.0, 1), (2.0, 0)):
        tokens, _, scores = diverse_beam_step(
            logits, torch.zeros(1, 2, 1), penalty, num_candidates=4, history=history, ngram_size=2
        )
        got = dict(zip(tokens[0, 1].tolist(), scores[0, 1].tolist(), strict=True))
        assert got[1] == pytest.approx((first[1] - penalty).item())
        assert got[0] == pytest.approx(first[0].item())
        assert (max(got, key=got.get) == 1) is (token == 1)


def test_a_done_group_holds_the_ngrams_of_its_history_only():
    history = torch.tensor([[[[0, 1], [0, 2]], [[3, 0], [3, 2]]]])
    logits = torch.zeros(1, 2, 2, 5)
    logits[0, 0, 1, 4] = 9.0  # both of the done group's candidates descend from its beam 1, and the best is (2, 4)
    scores, done = torch.tensor([[[-9.0, 0], [0, 0]]]), torch.tensor([[True, False]])
    tokens, parents, best = diverse_beam_step(
        logits, scores, 1.0, num_candidates=10, done=done, history=history, ngram_size=2
    )
    ends = zip(parents[0, 1].tolist(), tokens[0, 1].tolist(), strict=True)
    assert dict(zip(ends, best[0, 1].tolist(), strict=True)) == pytest.approx(
        {(k, v): -math.log(5) - ((k, v) in {(0, 1), (0, 2)}) for k in range(2) for v in range(5)}
    )


# --- the search against a plain search without a cache ---


def search_by_loop(model, prompt, N, G, penalty, T, eos=(), pad=0, ngram_size=1):
    """One prompt, early stopping, score over length; returns (score, tokens), best first."""
    K = N // G
    beams = [[([], 0.0 if k == 0 else -1e9) for k in range(K)] for _ in range(G)]
    ended = [[] for _ in range(G)]
    for _ in range(T):
        done = [len(group) >= K for group in ended]
        if all(done):
            break
        with torch.no_grad():
            logits = [[model(torch.tensor([[*prompt, *t]])).logits[0, -1] for t, _ in group] for group in beams]
        log_probs = [[row.log_softmax(-1).tolist() for row in group] for group in logits]
        scores = [[score for _, score in group] for group in beams]
        history = [[tokens for tokens, _ in group] for group in beams]
        candidates = step_by_loop(log_probs, scores, penalty, eos, done, pad, history, ngram_size)
        for g in range(G):
            if done[g]:
                continue
            for score, k, v in candidates[g][:K]:
                if v in eos:
                    ended[g].append((score / (len(history[g][k]) + 1), [*history[g][k], eos[0]]))
            ended[g] = sorted(ended[g], reverse=True)[:K]
            beams[g] = [([*history[g][k], v], score) for score, k, v in candidates[g] if v not in eos][:K]
    for g in range(G):
        if len(ended[g]) < K:
            ended[g] += [(score / len(tokens), tokens) for tokens, score in beams[g]]
        ended[g] = sorted(ended[g], reverse=True)[:K]
    return sorted(sum(ended, []), reverse=True)


def assert_as_by_loop(model, N, G, penalty, T, eos, pad=0, ngram_size=1):
    sequences, scores = search(
        model, num_beams=N, num_beam_groups=G, diversity_penalty=penalty, max_new_tokens=T, eos_token_id=eos,
        pad_token_id=pad, ngram_size=ngram_size,
    )  # fmt: skip
    for b, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        prompt = prompt[-sum(mask) :]
        expected = search_by_loop(model, prompt, N, G, penalty, T, eos or (), pad, ngram_size)
        width = sequences.shape[-1]
        assert sequences[b].tolist() == [tokens + [pad] * (width - len(tokens)) for _, tokens in expected]
        assert scores[b].tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("eos", [None, [36], [15, 36]])
@pytest.mark.parametrize(("N", "G", "ngram_size"), [(4, 4, 2), (6, 3, 2), (4, 2, 3), (3, 1, 1)])
def test_ngram_diversity_and_plain_beam_search(N, G, ngram_size, eos):
    assert_as_by_loop(shared_model(), N, G, 3.0, 9, eos, ngram_size=ngram_size)


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model(
            "mistral", vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4, bos_token_id=None, eos_token_id=None,
        ),
        AutoConfig.for_model(
            "bloom", vocab_size=48, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
        ),
    ],
    ids=["sliding window", "no position_ids"],
)  # fmt: skip
def test_other_caches_and_forwards(config):
    assert_as_by_loop(random_model(config), 4, 2, 1.5, 7, [5])


# --- batches ---


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batched_is_prompt_by_prompt(groups, early_stopping):
    options = {"num_beam_groups": groups, "early_stopping": early_stopping, "eos_token_id": [36, 15], "pad_token_id": 2}
    for name in RECORDED["models"]:
        sequences, scores = search(shared_model(name), max_new_tokens=10, **options)
        for b, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
            tokens = [prompt[-sum(mask) :]]
            alone, score = search(shared_model(name), tokens, [[1] * sum(mask)], max_new_tokens=10, **options)
            width = alone.shape[-1]
            assert torch.equal(sequences[b, :, :width], alone[0])
            assert (sequences[b, :, width:] == 2).all()
            torch.testing.assert_close(scores[b], score[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("ngram_size", [1, 2, 3])
@pytest.mark.parametrize("room", [{"max_batch_rows": 1}, {"max_batch_rows": 8}, {"max_batch_tokens": 130}])
def test_prompts_that_enter_when_there_is_room_are_searched_as_if_alone(room, ngram_size, early_stopping):
    prompts = [[*PROMPTS[0][:5], token] for token in range(3, 14)] + PROMPTS[1:] + PROMPTS[1:2]
    mask = [MASK[0]] * 11 + MASK[1:] + MASK[1:2]
    options = {"early_stopping": early_stopping, "eos_token_id": [36, 15], "pad_token_id": 2, "max_new_tokens": 9}
    for name in RECORDED["models"]:
        model = shared_model(name)
        together, scores = search(model, prompts, mask, ngram_size=ngram_size, **options)
        few, found = search(model, prompts, mask, ngram_size=ngram_size, **options, **room)
        assert torch.equal(few, together)
        torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-5)


def test_prompts_enter_as_others_leave():
    prompts = [[*PROMPTS[1][:5], token] for token in range(3, 15)]
    model, options = new_model(), {"max_new_tokens": 12, "eos_token_id": [36, 15, 29], "pad_token_id": 2}
    shapes = shape_of_each_call(model, prompts, [MASK[1]] * 12, max_batch_rows=16, **options)
    assert max(rows for rows, width in shapes if width == 1) <= 16
    assert sum(width > 1 for _, width in shapes) >= 3  # not all at once, and
    before_last = max(place for place, (_, width) in enumerate(shapes) if width > 1)
    steps = [rows for rows, width in shapes[:before_last] if width == 1]
    assert sum(steps) / len(steps) > 10  # the batch stays full while prompts wait


def shape_of_each_call(model, prompts=PROMPTS, mask=MASK, **options):
    search(model, prompts, mask, max_new_tokens=1)  # finds out how the model is decoded
    shapes = []

    def record(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(record, with_kwargs=True)
    search(model, prompts, mask, **options)
    return shapes


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_as_few_rows_move_as_can(rows):
    places = arranged(rows)
    assert sorted(places) == list(range(len(rows)))
    moved = sum(place != row for place, row in zip(places, rows, strict=True))
    assert moved == len(rows) - len({row for row in rows if row < len(rows)})


def test_one_call_a_token_with_all_groups():
    assert shape_of_each_call(new_model()) == [(4, 6)] + [(16, 1)] * 7


def test_finished_prompts_and_groups_leave_the_batch_and_the_search_stops():
    ending = {"num_beams": 2, "eos_token_id": [29, 36], "max_new_tokens": 20}
    assert shape_of_each_call(new_model("gpt2"), **ending) == [(4, 6), (5, 1), (2, 1), (2, 1), (2, 1)]


def test_memory_of_the_caller_is_left_alone():
    ids, mask = torch.tensor(PROMPTS), torch.tensor(MASK)
    before = ids.clone(), mask.clone()
    diverse_beam_search(shared_model(), ids, mask.bool(), **OPTIONS)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


# --- models ---


def test_train_mode_stays_and_nothing_is_differentiated():
    model = new_model().train()
    _, scores = search(model)
    assert model.training
    assert not scores.requires_grad


def test_checkpointing_in_train_mode_is_an_error():
    model = new_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"train mode with gradient checkpointing.*call model\.eval\(\)"):
        search(model)
    assert search(model.eval())[0].shape == (4, 4, 8)


def test_adapters_see_positions():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    sequences, scores = search(peft.get_peft_model(new_model("gpt2"), lora))
    expected, expected_scores = search(shared_model("gpt2"))
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(scores, expected_scores)


def test_a_model_without_a_cache_is_an_error():
    class Bare(torch.nn.Module):
        def forward(self, input_ids, attention_mask, past_key_values, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 9), "past_key_values": None})

    with pytest.raises(ValueError, match=r"model: expected an output with past_key_values, got None"):
        search(Bare())


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 5}, r"num_beam_groups: expected a divisor of num_beams \(5\), got 2"),
        ({"num_beam_groups": 0}, r"num_beam_groups: expected a divisor of num_beams \(4\), got 0"),
        ({"num_beam_groups": 8}, r"num_beam_groups: expected a divisor of num_beams \(4\), got 8"),
        ({"num_beams": 0}, "num_beams: expected at least 1, got 0"),
        ({"diversity_penalty": -0.5}, r"diversity_penalty: expected a finite number of at least 0, got -0\.5"),
        ({"diversity_penalty": math.inf}, "diversity_penalty: expected a finite number"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"early_stopping": "always"}, "early_stopping: expected True, False or \"never\", got 'always'"),
        ({"ngram_size": 0}, "ngram_size: expected at least 1, got 0"),
        ({"pad_token_id": 48}, "pad_token_id: expected a token of the vocabulary, 0 to 47, got 48"),
        ({"eos_token_id": list(range(48))}, "eos_token_id: expected fewer tokens than the vocabulary's 48, got 48"),
        ({"prompts": [], "mask": []}, r"input_ids: expected shape \(B, P\), at least one prompt .*, got \(0,\)"),
        ({"prompts": [[]], "mask": [[]]}, r"input_ids: expected .* of one token, got \(1, 0\)"),
        ({"mask": [[1, 1]] * 4}, r"attention_mask: expected the shape of input_ids \(4, 6\), got \(4, 2\)"),
        ({"mask": [row[::-1] for row in MASK]}, "attention_mask: expected .* padded on the left, got"),
        ({"mask": [[0] * 6, *MASK[1:]]}, "attention_mask: expected prompts of at least one token"),
    ],
)
def test_errors_name_option_expected_and_got(options, message):
    options = OPTIONS | options
    ids, mask = torch.tensor(options.pop("prompts", PROMPTS)), torch.tensor(options.pop("mask", MASK))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        inspect.unwrap(diverse_beam_search)(shared_model(), ids, mask, **options)  # without the tests' shape checks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": torch.zeros(1, 2, 2)}, r"scores: expected shape \(1, 2, 3\), got \(1, 2, 2\)"),
        ({"logits": torch.zeros(2, 3, 9)}, r"logits: expected shape \(B, G, K, V\), got \(2, 3, 9\)"),
        ({"penalty": -1.0}, r"penalty: expected a finite number of at least 0, got -1\.0"),
        ({"num_candidates": 2}, r"num_candidates: expected 3 .* to 27 .*, got 2"),
        ({"num_candidates": 28}, r"num_candidates: expected 3 .* to 27 .*, got 28"),
        ({"ngram_size": 2}, r"history: expected shape \(1, 2, 3, t\) for ngram_size 2, got None"),
    ],
)
def test_step_errors(options, message):
    arguments = {"logits": torch.zeros(1, 2, 3, 9), "scores": torch.zeros(1, 2, 3), "penalty": 1.0}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(diverse_beam_step)(**(arguments | options))
