"""Training over parts of a completion: both observed (Direct), or the reasoning summed over (Sampling)."""

import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from reasoning_models import CLOSE, OPEN, thinking_model, thinking_system, token_log_probs
from tiny import char_tokenizer, llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from sysdag import (
    DataError,
    DiverseBeamSearch,
    ImportanceSampling,
    Input,
    MonteCarlo,
    SysDPOConfig,
    SysDPOTrainer,
    System,
    Trace,
    node,
    split,
)
from sysdag.components import CausalLM
from sysdag.data import encode_pairs, validate_rows
from sysdag.engine import SystemModel
from sysdag.engine.replay import accumulate_gradients
from sysdag.objectives.candidates import Candidates, CandidateStrategy
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.traces.cells import Draw

ONE_PASS = EngineOptions(engine="one_pass")
PARTS = [
    {"question": "two?", "chosen": "4", "rejected": "five",
     "chosen_intermediates": {"reasoning": f"{OPEN}\nso 4\n{CLOSE}"},
     "rejected_intermediates": {"reasoning": f"{OPEN}\nhm\n{CLOSE}"}},
    {"question": "a", "chosen": "b c", "rejected": "d",
     "chosen_intermediates": {"reasoning": f"{OPEN}\n\n{CLOSE}"},
     "rejected_intermediates": {"reasoning": f"{OPEN}\nx y\n{CLOSE}"}},
]  # fmt: skip


def whole(row, side):
    return f"{row[f'{side}_intermediates']['reasoning']}\n\n{row[side]}"


WHOLES = [{"question": r["question"], **{side: whole(r, side) for side in ("chosen", "rejected")}} for r in PARTS]


def as_message(row, side, key):
    thought = row[f"{side}_intermediates"]["reasoning"].removeprefix(OPEN).removesuffix(CLOSE).strip("\n")
    message = {"role": "assistant", "content": row[side]} | ({key: thought} if thought else {})
    return [message if thought else {"role": "assistant", "content": whole(row, side)}]


MESSAGES = [
    {"question": r["question"], **{side: as_message(r, side, key) for side in ("chosen", "rejected")}}
    for r, key in zip(PARTS, ("reasoning_content", "thinking"), strict=True)
]


@pytest.mark.parametrize("rows", [PARTS, WHOLES, MESSAGES], ids=["parts", "whole texts", "messages"])
@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_rows_hold_parts_or_whole_completions(rows, objective):
    plan = thinking_system(thinking_model(), max_new_tokens=24).compile()
    assert validate_rows(plan, rows, objective).is_usable
    for pair, row in zip(encode_pairs(plan, rows, objective), PARTS, strict=True):
        for side in ("chosen", "rejected"):
            values = {name: cell.value for name, cell in pair.sides[side].items()}
            thought = {"reasoning": row[f"{side}_intermediates"]["reasoning"]} if objective == "direct" else {}
            assert values == {"answer": row[side]} | thought


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_runs_of_the_model_without_split_are_cut_at_their_tokens(objective):
    model = thinking_model(max_new_tokens=24)

    @node(model)
    def answer(question):
        return [{"role": "user", "content": question}]

    drawn = System(Input("question") >> answer).compile().sample({"question": ["a"] * 30}, seed=0)
    whole = [draw for draw in drawn.cells["answer"] if CLOSE in draw.value and not draw.value.endswith(CLOSE)][:2]
    plan = thinking_system(model, max_new_tokens=24).compile()
    [pair] = encode_pairs(plan, [{"question": "a", "chosen": whole[0], "rejected": whole[1]}], objective)
    for cells, draw in zip((pair.chosen, pair.rejected), whole, strict=True):
        ids = draw.record["token_ids"]
        border = ids.index(model.tokenizer.convert_tokens_to_ids(CLOSE)) + 1
        assert cells["answer"].record["token_ids"] == ids[border:]
        if objective == "direct":
            trace = Trace({"question": ["a"]}, {name: [cell] for name, cell in cells.items()})
            found = plan.log_probs(trace)
            assert (found["reasoning"] + found["answer"]).item() == pytest.approx(draw.log_prob, abs=1e-3)
            assert cells["reasoning"].value + cells["answer"].value == draw.value
    own = plan.sample({"question": ["a"] * 40}, seed=1)
    twice = next(draw for draw in own.cells["answer"] if CLOSE in draw.value)  # a second marker is the answer's
    [pair] = encode_pairs(plan, [{"question": "a", "chosen": twice, "rejected": "b"}], "sampling")
    assert pair.chosen["answer"] is twice
    texts = {"question": "a", "chosen": f"b{CLOSE}c", "rejected": "d", "chosen_intermediates": {"reasoning": CLOSE}}
    assert "Give it alone, or a whole completion alone" in refused_when_scored(plan, texts)


def refused_when_scored(plan, row):
    [pair] = encode_pairs(plan, [row], "sampling")
    cells = {"reasoning": [Draw(CLOSE)], "answer": [pair.chosen["answer"]]}
    with pytest.raises(DataError) as error:
        plan.log_probs(Trace({"question": ["a"]}, cells))
    return str(error.value)


def test_rows_that_lack_a_part_are_told():
    plan = thinking_system(thinking_model(), max_new_tokens=24).compile()
    missing = validate_rows(plan, [{"question": "a", "chosen": "4", "rejected": "5"}], "direct")
    assert "Row 0: chosen has no value of node 'reasoning'" in str(missing)
    open_ = [{**PARTS[0], "chosen_intermediates": {"reasoning": "so 4"}}]
    assert "node 'answer': " in str(validate_rows(plan, open_, "direct"))
    assert "does not end with '</think>', so nothing follows it" in str(validate_rows(plan, open_, "direct"))
    both = [{**WHOLES[0], "chosen_intermediates": PARTS[0]["chosen_intermediates"], "rejected_intermediates": {}}]
    assert "Give it alone, or a whole completion alone" in str(validate_rows(plan, both, "direct"))


def test_direct_over_the_parts_equals_trls_dpo_over_whole_completions(tmp_path):
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,:?\n</>")
    tokenizer.add_tokens([OPEN, CLOSE])
    llama(2, len(tokenizer)).save_pretrained(tmp_path / "model")
    common = {"report_to": [], "use_cpu": True, "bf16": False, "beta": 0.3}
    texts = [{"prompt": f"q: {r['question']}\na: ", "chosen": r["chosen"], "rejected": r["rejected"]} for r in WHOLES]
    theirs = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            max_length=None,
            **common,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    system = thinking_system(CausalLM(llama(2, len(tokenizer)), tokenizer), chat=False, max_new_tokens=24)
    args = SysDPOConfig(output_dir=str(tmp_path / "ours"), check_reference=False, disable_tqdm=True, **common)
    ours = SysDPOTrainer(system, args, train_dataset=WHOLES)
    own = {
        name.rpartition("policies.")[2].partition(".")[2]: p
        for name, p in ours.model.named_parameters()
        if "policies." in name
    }
    for number, (name, parameter) in enumerate(theirs.model.named_parameters()):
        torch.manual_seed(number)
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
            own[name].copy_(parameter)
    theirs.model.train()
    ours.model.train()
    batch = theirs._prepare_inputs(theirs.data_collator([theirs.train_dataset[place] for place in range(2)]))
    loss = theirs.compute_loss(theirs.model, batch)
    output = ours.model(ours.data_collator(ours.train_dataset)["pairs"])
    torch.testing.assert_close(output.loss.detach(), loss.detach(), rtol=1e-5, atol=1e-5)
    loss.backward()
    accumulate_gradients(ours.model, output)
    for name, parameter in theirs.model.named_parameters():
        error = float((own[name].grad - parameter.grad).abs().max())
        assert error <= 1e-5 * float(parameter.grad.abs().max()), name


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryThought(CandidateStrategy):
    """All reasonings of at most so many tokens, those without a marker among them."""

    tokens: int = 2

    def paths(self, plan, rows, latents, generator):
        model = plan.system["reasoning"].component
        close, end = model.tokenizer.convert_tokens_to_ids(CLOSE), model.tokenizer.eos_token_id
        thoughts = [
            Draw(model.tokenizer.decode(ids), {"token_ids": list(ids), "finished": ids[-1] in (close, end)})
            for length in range(1, self.tokens + 1)
            for ids in itertools.product(range(len(model.tokenizer)), repeat=length)
            if not {close, end} & {*ids[:-1]} and (ids[-1] in (close, end) or length == self.tokens)
        ]
        prompt = tuple(row for row in range(len(rows)) for _ in thoughts)
        return Candidates(rows.select(prompt).updated({"reasoning": thoughts * len(rows)}), prompt)


def small_system(seed=1):
    tokenizer = char_tokenizer("ab\n")
    tokenizer.add_tokens([CLOSE])
    model = CausalLM(llama(seed, len(tokenizer)), tokenizer)
    return thinking_system(model, chat=False, max_new_tokens={"reasoning": 2, "answer": 6}), model


def test_sampling_over_every_reasoning_is_the_marginal_of_the_answer():
    system, _ = small_system()
    rows = [{"question": "a", "chosen": "ab", "rejected": "b"}, {"question": "b", "chosen": "a", "rejected": "ba"}]
    plan = system.compile()
    model = SystemModel(
        plan, ObjectiveOptions(objective="sampling", beta=0.3), None, EveryThought(num_candidates=9), ONE_PASS
    )
    torch.manual_seed(0)
    policy = plan.system["reasoning"].component
    reference = next(iter(model.references.values()))
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for component in (policy, reference):
        component.module.double()
    close, size = policy.tokenizer.convert_tokens_to_ids(CLOSE), len(policy.tokenizer)
    others = [token for token in range(size) if token not in (close, policy.tokenizer.eos_token_id)]

    def marginal(component, question, answer):
        """log of the sum over reasonings of at most 2 tokens of p(whole completion), by plain forwards."""
        prompt = component.tokenizer(f"q: {question}\na: ", add_special_tokens=False)["input_ids"]
        tail = component.tokenizer(f"\n\n{answer}", add_special_tokens=False)["input_ids"]
        tail = [*tail, component.tokenizer.eos_token_id]
        thoughts = [[close], *([token, close] for token in others)]
        return torch.stack(
            [token_log_probs(component, prompt, [*t, *tail], grad=True).sum() for t in thoughts]
        ).logsumexp(0)

    losses = []
    for row in rows:
        gain = [marginal(policy, row["question"], row[s]) - marginal(reference, row["question"], row[s]).detach()
                for s in ("chosen", "rejected")]  # fmt: skip
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (gain[0] - gain[1])))
    expected = torch.stack(losses).mean()
    output = model(encode_pairs(plan, rows, "sampling"))
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    for got, want in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_importance_sampling_of_reasonings_is_unbiased_with_those_that_never_close():
    system, model = small_system()
    plan = system.compile()
    prompt = model.tokenizer("q: a\na: ", add_special_tokens=False)["input_ids"]
    close, end = model.tokenizer.convert_tokens_to_ids(CLOSE), model.tokenizer.eos_token_id
    others = [token for token in range(len(model.tokenizer)) if token not in (close, end)]
    tail = [*model.tokenizer("\n\nab", add_special_tokens=False)["input_ids"], end]
    truth = sum(
        token_log_probs(model, prompt, [*t, *tail]).sum().exp().item() for t in [[close], *([o, close] for o in others)]
    )
    strategy = ImportanceSampling(num_candidates=4000)
    drawn = strategy.draw(plan, {"question": ["a"]}, torch.Generator().manual_seed(0))
    assert 0 < len(drawn.prompt) < 4000  # the others never closed
    trace = drawn.trace.updated({"answer": [Draw("ab")] * len(drawn.prompt)})
    with torch.no_grad():
        joint = sum(plan.log_probs(trace).values()) + torch.tensor(drawn.log_weight)
    terms = torch.cat([joint.exp().double(), torch.zeros(4000 - len(joint), dtype=torch.float64)]) * 4000
    assert abs(terms.mean().item() - truth) < 4 * terms.std().item() / 4000**0.5


def test_candidates_that_all_run_out_of_tokens_are_told():
    tokenizer = char_tokenizer("ab")
    system = thinking_system(CausalLM(llama(0, len(tokenizer)), tokenizer), chat=False, max_new_tokens=3)
    with pytest.raises(DataError, match="Node 'answer', row 0: none of its .* candidates wrote .'</think>'."):
        MonteCarlo(num_candidates=3).draw(system.compile(), {"question": ["a"]}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize(
    ("objective", "candidates"),
    [("direct", None), ("sampling", MonteCarlo(num_candidates=6)), ("sampling", DiverseBeamSearch(num_candidates=4))],
)
def test_a_training_takes_steps(tmp_path, engine, objective, candidates):
    system = thinking_system(thinking_model(eager=5.0), max_new_tokens={"reasoning": 12, "answer": 8})
    args = SysDPOConfig(
        output_dir=str(tmp_path), objective=objective, engine=engine, beta=0.3, learning_rate=3e-3, max_steps=8,
        per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, seed=1,
    )  # fmt: skip
    trainer = SysDPOTrainer(system, args, train_dataset=PARTS, candidates=candidates)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.62


def test_a_node_behind_the_answer_sums_over_both_parts(tmp_path):
    model = thinking_model(eager=5.0)
    question = Input("question", str)

    @split(model, reasoning=CLOSE, answer=None, max_new_tokens=6)
    def solve(question):
        return f"{question}: "

    @node(CausalLM(llama(3), char_tokenizer(), max_new_tokens=6))
    def report(answer):
        return f"a: {answer} r: "

    system = System(question >> solve >> report)
    assert system.compile().latents("sampling") == ("reasoning", "answer")
    args = SysDPOConfig(
        output_dir=str(tmp_path), objective="sampling", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=1, learning_rate=1e-3,
    )  # fmt: skip
    rows = [{"question": "a", "chosen": "yes", "rejected": "no"}]
    trainer = SysDPOTrainer(system, args, train_dataset=rows, candidates=MonteCarlo(num_candidates=4))
    before = torch.cat([p.detach().flatten().clone() for p in model.module.parameters()])
    trainer.train()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in model.module.parameters()]))
