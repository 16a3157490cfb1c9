"""Systems with a choice in training: Direct and Sampling, one pass and two, rows by text or index."""

import math
import re

import pytest
import torch
from peft import LoraConfig
from test_two_pass import assert_same, gradients_of
from tiny import char_tokenizer, llama
from tiny_sentences import bert, reranker

from sysdag import (
    DataError,
    DiverseBeamSearch,
    Exhaustive,
    Input,
    MonteCarlo,
    SysDPOConfig,
    SysDPOTrainer,
    System,
    TrainingError,
    node,
)
from sysdag.components import BiEncoder, CausalLM, Choice, CrossEncoder, OptionLikelihood
from sysdag.data.encoding import encode_pairs
from sysdag.data.validation import validate_rows
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.traces import output_names, preference_row

LLM = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PASSAGES = ["books are lent for weeks", "fees are small", "two rooms"]


def scorers():
    lora = LoraConfig(r=4, target_modules=["query", "value"])
    return {
        "bi-encoder": lambda: BiEncoder(
            bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), char_tokenizer()
        ),
        "bi-encoder, adapter": lambda: BiEncoder(bert(), char_tokenizer(), peft_config=lora),
        "cross-encoder": lambda: CrossEncoder(reranker(), char_tokenizer()),
        "likelihood": lambda: OptionLikelihood(
            CausalLM(llama(2), char_tokenizer(), peft_config=LoraConfig(**LLM)), per_token=True
        ),
    }


def build(kind, k=2):
    @node(CausalLM(llama(0), char_tokenizer(), peft_config=LoraConfig(**LLM), max_new_tokens=4))
    def rewriting(question):
        return f"q {question} r "

    @node(Choice(scorers()[kind](), k=k, temperature=0.5))
    def chosen(rewriting, passages):
        return f"{rewriting}?", passages

    @node
    def joined(chosen):
        return " ".join(chosen)

    @node(CausalLM(llama(1), char_tokenizer(), peft_config=LoraConfig(**LLM), max_new_tokens=4))
    def answer(question, joined):
        return f"{joined} {question} a "

    question, passages = Input("question", str), Input("passages", list)
    return System(question >> rewriting, (rewriting & passages) >> chosen >> joined, (question & joined) >> answer)


def row(chosen, rejected, **others):
    return {
        "question": "how long", "passages": PASSAGES, "chosen": "weeks", "rejected": "no",
        "chosen_intermediates": {"rewriting": "lent", "chosen": chosen},
        "rejected_intermediates": {"rewriting": "fee", "chosen": rejected}, **others,
    }  # fmt: skip


ROWS = [
    row([PASSAGES[0], PASSAGES[2]], [1, 0]),
    row([2, PASSAGES[1]], [PASSAGES[0], PASSAGES[1]], question="what", passages=PASSAGES[::-1]),
]
OBJECTIVES = {
    "direct": (None, {"beta": 0.3}),
    "sampling": (DiverseBeamSearch(num_candidates=3), {"objective": "sampling", "beta": 0.3}),
}


def made(kind, objective, **engine):
    candidates, options = OBJECTIVES[objective]
    torch.manual_seed(0)
    plan = build(kind).compile()
    model = SystemModel(plan, ObjectiveOptions(**options), None, candidates, EngineOptions(**engine))
    torch.manual_seed(1)
    for component in model.components.values():
        with torch.no_grad():
            for parameter in component.own_parameters().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model, encode_pairs(plan, ROWS, options.get("objective", "direct"))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("kind", list(scorers()))
def test_two_passes_give_the_gradients_of_one(kind, objective):
    one, expected = gradients_of(*made(kind, objective, engine="one_pass"))
    for tokens in (1, 90):
        two, found = gradients_of(*made(kind, objective, engine="two_pass", micro_batch_tokens=tokens))
        assert_same(found, expected)
        torch.testing.assert_close(two.loss, one.loss.detach(), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_choice_is_that_of_the_loss_written_by_hand():
    """SysDPO-Direct with the choice alone trained: -log sigma of beta times the difference of log-ratios."""
    plan = build("bi-encoder").compile()
    nodes = {name: {"trainable": False} for name in ("rewriting", "answer")}
    args = SysDPOConfig("out", beta=0.3, nodes=nodes, report_to=[])
    model = SystemModel(plan, ObjectiveOptions(beta=0.3), args.node_options(), None, EngineOptions())
    component = plan.system["chosen"].component
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in component.own_parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    output = model(encode_pairs(plan, ROWS, "direct"))
    accumulate_gradients(model, output)
    found = {name: p.grad.clone() for name, p in component.own_parameters().items() if p.grad is not None}
    for parameter in component.own_parameters().values():
        parameter.grad = None

    encoder, tokenizer = component.scorer.query.lm.module, char_tokenizer()
    reference = model.references["chosen"].scorer.query.lm.module

    def log_prob(model, query, passages, indices):
        def vector(text):
            return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)

        one = vector(query)
        scores = torch.stack([torch.cosine_similarity(one, vector(text), dim=0) for text in passages]) / 0.5
        first, second = indices
        rest = [place for place in range(len(passages)) if place != first]
        return scores.log_softmax(0)[first] + scores[second] - scores[rest].logsumexp(0)

    def log_ratio(query, passages, indices):
        with torch.no_grad():
            theirs = log_prob(reference, query, passages, indices)
        return log_prob(encoder, query, passages, indices) - theirs

    losses = []
    for passages, won, lost in ((PASSAGES, (0, 2), (1, 0)), (PASSAGES[::-1], (2, 1), (2, 1))):
        margin = log_ratio("lent?", passages, won) - log_ratio("fee?", passages, lost)
        losses.append(-torch.nn.functional.logsigmoid(0.3 * margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert float(output.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    own = {name: p for name, p in component.own_parameters().items() if p.grad is not None}
    largest = max(float(p.grad.abs().max()) for p in own.values())
    for name, parameter in own.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("kind", list(scorers()))
def test_training_starts_at_ln_2_moves_all_and_is_saved(kind, objective, tmp_path):
    candidates = {"direct": None, "sampling": MonteCarlo(num_candidates=3)}[objective]
    args = SysDPOConfig(
        str(tmp_path / "out"), objective=objective, max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2,
        logging_steps=1, report_to=[], save_strategy="no",
    )  # fmt: skip
    system = build(kind)
    trainer = SysDPOTrainer(model=system, args=args, candidates=candidates, train_dataset=ROWS)
    before = {n: p.detach().clone() for n, p in system["chosen"].component.own_parameters().items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] != losses[0]
    after = system["chosen"].component.own_parameters()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "nodes/chosen/rewards/margins" in trainer.state.log_history[0]
    fixed = system.compile().sample({"question": ["how"], "passages": [PASSAGES]}, seed=0)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = build(kind).load(tmp_path / "saved")
    ours, theirs = (plan.log_probs(fixed) for plan in (system.compile(), loaded.compile()))
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-5)


def test_exhaustive_candidates_cover_all_choices():
    @node(Choice(BiEncoder(bert(), char_tokenizer()), k=2))
    def chosen(question, passages):
        return question, passages

    @node(CausalLM(llama(1), char_tokenizer()))
    def answer(question, chosen):
        return f"{' '.join(chosen)} {question} a "

    question, passages = Input("question", str), Input("passages", list)
    plan = System((question & passages) >> chosen, (question & chosen) >> answer).compile()
    options = ObjectiveOptions(objective="sampling")
    rows = [{k: v for k, v in row_.items() if "inter" not in k} for row_ in ROWS]
    output = SystemModel(plan, options, None, Exhaustive())(encode_pairs(plan, rows, "sampling"))
    torch.testing.assert_close(output.metrics["candidates/coverage"], torch.ones(2))
    assert output.metrics["candidates/count"].tolist() == [6, 6]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(["books", PASSAGES[0]], [1, 0]), "Row 0, chosen, node 'chosen': .*'books' is no option of its row"),
        (row([0, 1], [0, 3]), "Row 0, rejected, node 'chosen': .*the index 3 is none of the 3 options'"),
        (row([0, 1], [0]), "Row 0, rejected, node 'chosen': .*a list of 2 options or indices, got 1"),
        (row([0, 1], [1, 0], passages=[]), "Row 0, chosen, node 'chosen': .*the list of options is empty"),
        (row([0, 1], [1, 0], passages=["only"]), "Row 0, chosen, node 'chosen': .*there are 1 options, and k=2"),
    ],
)
def test_rows_that_cannot_be_are_named_by_validation_and_by_training(bad, message):
    plan = build("bi-encoder").compile()
    report = validate_rows(plan, [bad], "direct")
    assert re.search(message, str(report))
    model = SystemModel(plan, ObjectiveOptions())
    with pytest.raises(DataError, match="chosen"):
        model(encode_pairs(plan, [bad], "direct"))


def test_good_rows_have_no_problem():
    assert not validate_rows(build("bi-encoder").compile(), ROWS, "direct").problems


def test_sampled_runs_are_trained_on_by_their_records():
    """A `Draw` with its options and indices goes through a row of preferences as it is."""
    plan = build("cross-encoder").compile()
    trace = plan.sample({"question": ["how"] * 2, "passages": [[*PASSAGES, PASSAGES[0]]] * 2}, seed=5)
    rows = [preference_row(trace, 0, 1, output_names(trace, ("answer",)))]
    pairs = encode_pairs(plan, rows, "direct")
    assert pairs[0].chosen["chosen"].record == trace.cells["chosen"][0].record
    output = SystemModel(plan, ObjectiveOptions())(pairs)
    wanted = sum(plan.log_probs(trace).values())
    found = torch.stack([output.metrics[f"logps/{side}"][0] for side in ("chosen", "rejected")])
    torch.testing.assert_close(found.double(), wanted.detach().double(), rtol=1e-5, atol=1e-4)
    other = [rows[0] | {"passages": PASSAGES}]
    with pytest.raises(DataError, match="was made of 4 options, and its input has 3"):
        SystemModel(plan, ObjectiveOptions())(encode_pairs(plan, other, "direct"))


def test_a_score_that_is_not_finite_is_named_with_its_option():
    plan = build("cross-encoder").compile()
    with torch.no_grad():
        plan.system["chosen"].component.module.classifier.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="Node 'chosen': the policy's score of row 0 .* from option 0, 'books are"):
        SystemModel(plan, ObjectiveOptions())(encode_pairs(plan, ROWS, "direct"))
