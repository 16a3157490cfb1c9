"""Two passes give the gradients of one, whatever the size of the micro-batches and whenever memory runs out."""

import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from test_engine import ROWS, FixedDrafts, two_llms
from test_mixed_system import direct_model
from tiny import char_tokenizer, llama
from tiny_diffusion import seed

from sysdag import Input, System, TrainingError, loop, node
from sysdag.components import CausalLM
from sysdag.data.encoding import encode_pairs
from sysdag.engine import kept_work
from sysdag.engine.kept_work import KeptGradient, KeptGraph, Room
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions


def adapted_llms():
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

    @node(CausalLM(llama(0), char_tokenizer(), peft_config=LoraConfig(**lora)))
    def draft(question):
        return f"q: {question} d:"

    @node(CausalLM(llama(1), char_tokenizer(), peft_config=LoraConfig(**lora)))
    def answer(question, draft):
        return f"q: {question} d: {draft} a:"

    question = Input("question")
    return System(question >> draft, (question & draft) >> answer)


def feedback_loop():
    question = Input("question")

    @node(CausalLM(llama(0), char_tokenizer()))
    def draft(question):
        return f"{question}:"

    @node(CausalLM(llama(1), char_tokenizer()))
    def critic(draft):
        return f"{draft}?"

    @node(CausalLM(llama(2), char_tokenizer()))
    def rewrite(draft, critic):
        return f"{draft} {critic}."

    body = loop(draft >> critic, (draft & critic) >> rewrite, carry={"draft": rewrite}, times=2)
    return System(question >> draft, body)


LOOP_ROWS = [
    {"question": "ab", "chosen": "yes", "rejected": "no",
     "chosen_intermediates": {"draft": "y", "critic[0]": "a", "rewrite[0]": "bb", "critic[1]": "c"},
     "rejected_intermediates": {"draft": "n", "critic[0]": "", "rewrite[0]": "b", "critic[1]": "dd"}},
]  # fmt: skip
CASES = {
    "direct": (two_llms, ROWS, None, {"beta": 0.3}),
    "direct, two losses": (
        two_llms, ROWS, None, {"beta": 0.3, "loss_type": ("ipo", "sft"), "loss_weights": (1.0, 0.2)},
    ),
    "sampling": (two_llms, ROWS, FixedDrafts(num_candidates=3), {"objective": "sampling", "beta": 0.3}),
    "sampling, tempered": (
        two_llms, ROWS, FixedDrafts(num_candidates=3),
        {"objective": "sampling", "responsibility_temperature": 3.0, "candidate_length_normalization": True},
    ),
    "adapters": (adapted_llms, ROWS, FixedDrafts(num_candidates=3), {"objective": "sampling", "beta": 0.3}),
    "shared weights": (feedback_loop, LOOP_ROWS, None, {"beta": 0.3}),
}  # fmt: skip


def make(case, **engine):
    build, rows, candidates, options = CASES[case]
    torch.manual_seed(0)
    system = build()
    plan = system.compile()
    model = SystemModel(plan, ObjectiveOptions(**options), None, candidates, EngineOptions(**engine))
    torch.manual_seed(1)
    for component in model.components.values():
        with torch.no_grad():
            for parameter in component.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model, encode_pairs(plan, rows, options.get("objective", "direct"))


def gradients_of(model, pairs, *arguments):
    model.zero_grad()
    output = model(pairs, *arguments)
    accumulate_gradients(model, output)
    return output, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found, expected):
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 1e-4
    for name, truth in expected.items():
        assert (found[name] is None) == (truth is None), name
        if truth is not None:
            assert float((found[name] - truth).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("tokens", [1, 40, 8192])
@pytest.mark.parametrize("case", CASES)
def test_two_passes_give_the_gradients_of_one(case, tokens):
    one, expected = gradients_of(*make(case, engine="one_pass"))
    assert one.loss.requires_grad
    two, found = gradients_of(*make(case, engine="two_pass", micro_batch_tokens=tokens))
    assert not two.loss.requires_grad
    assert_same(found, expected)
    torch.testing.assert_close(two.loss, one.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.metrics, one.metrics, rtol=1e-3, atol=1e-4)
    if tokens == 1:
        assert all(len(turn.batch.rows) == 1 for turn in two.turns)


def test_a_language_model_and_a_diffusion_model_replay_the_same_noise():
    one, pairs = direct_model("one_pass", scale=0.01)
    _, expected = gradients_of(one, pairs, seed(3))
    two, pairs = direct_model("two_pass", scale=0.01)
    two.budget.max_tokens = 64
    output, found = gradients_of(two, pairs, seed(3))
    assert len(output.turns) > 2
    assert_same(found, expected)


def with_dropout(model, p=0.3):
    for component in model.components.values():
        for layer in component.module.modules():
            if hasattr(layer, "act_fn"):
                layer.act_fn = torch.nn.Sequential(layer.act_fn, torch.nn.Dropout(p))
    model.train()


def test_dropout_is_replayed():
    found = []
    for engine in ("one_pass", "two_pass"):
        model, pairs = make("sampling", engine=engine, micro_batch_tokens=60)
        with_dropout(model)
        torch.manual_seed(7)
        _, gradients = gradients_of(model, pairs)
        found.append(gradients)
        drawn = torch.rand(1)
    assert_same(found[1], found[0])
    torch.manual_seed(7)
    model, pairs = make("sampling", engine="two_pass", micro_batch_tokens=60)
    with_dropout(model)
    torch.manual_seed(7)
    model(pairs)
    assert torch.rand(1) == drawn  # the second pass leaves the generator where the first did
    _, other = gradients_of(model, pairs)
    assert max(float((other[n] - found[0][n]).abs().max()) for n in other) > 1e-3


def test_the_reference_never_sees_dropout():
    model, pairs = make("adapters", engine="two_pass")
    with_dropout(model)
    first, second = model(pairs), model(pairs)
    for name in ("draft", "answer"):
        one, two = (output.scores[name] - output.log_ratios[name] for output in (first, second))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
        assert float((first.scores[name] - second.scores[name]).abs().max()) > 1e-2


def count_scored(monkeypatch, component):
    counts = []
    score = type(component).score

    def counting(self, inputs, draws, noise=None):
        if self is component and torch.is_grad_enabled():
            counts.append(len(draws))
        return score(self, inputs, draws, noise)

    monkeypatch.setattr(type(component), "score", counting)
    return counts


def test_work_whose_coefficient_is_zero_is_skipped(monkeypatch):
    model, pairs = make("direct", engine="two_pass")
    model.options = ObjectiveOptions(loss_type=("hinge",), beta=50.0)
    first, other = pairs[0], replace(pairs[0], chosen=pairs[0].rejected, rejected=pairs[0].chosen)
    satisfied, violated = sorted(([first], [other]), key=lambda pair: model(pair).loss.item())
    assert model(satisfied).loss == 0 < model(violated).loss
    counts = count_scored(monkeypatch, model.components["draft"])
    _, both = gradients_of(model, satisfied + violated)
    assert sum(counts) == 2  # the winner and the loser of the violated pair
    _, alone = gradients_of(model, violated)
    assert_same({n: 2 * g for n, g in both.items()}, alone)
    _, none = gradients_of(model, satisfied)
    assert all(g is not None and not g.any() for g in none.values())


@pytest.fixture
def roomy(monkeypatch):
    """As much room for gradients that wait as weights: tiny models' adapters are no small part of them."""
    monkeypatch.setattr(kept_work, "_SHARE_OF_WEIGHTS", 1 / 16)


@pytest.mark.parametrize("case", ["direct", "sampling", "adapters", "shared weights"])
def test_a_single_element_is_scored_once_where_its_gradient_may_wait(case, monkeypatch, roomy):
    _, expected = gradients_of(*make(case, engine="one_pass"))
    model, pairs = make(case, engine="two_pass", micro_batch_tokens=1)
    scored = {key: count_scored(monkeypatch, component) for key, component in model.components.items()}
    output, found = gradients_of(model, pairs)
    assert_same(found, expected)
    elements = {}
    for turn in output.turns:
        key = model.plan.system[turn.batch.name].base_name
        elements[key] = elements.get(key, 0) + 1
    assert {key: sum(counts) for key, counts in scored.items()} == elements
    assert [type(turn.batch.kept) for turn in output.turns[-2:]] == [KeptGradient, KeptGraph]


def test_without_room_all_but_the_last_are_scored_again(monkeypatch):
    monkeypatch.setattr(kept_work, "room_for_gradients", lambda weights, missing: 0)
    _, expected = gradients_of(*make("sampling", engine="one_pass"))
    model, pairs = make("sampling", engine="two_pass", micro_batch_tokens=1)
    output, found = gradients_of(model, pairs)
    assert_same(found, expected)
    assert [turn.batch.kept is None for turn in output.turns] == [False] + [True] * (len(output.turns) - 1)


def test_what_gradients_will_take_may_wait_before_there_are_any():
    model, _ = make("direct", engine="two_pass")
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert Room.of(model).gradients == weights
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert Room.of(model).gradients == weights // 16


def test_no_gradient_waits_in_fp16_nor_more_than_there_is_room_for():
    model, _ = make("direct", engine="two_pass")
    room, own = Room.of(model), list(model.components["draft"].own_parameters().values())
    with torch.autocast("cpu", dtype=torch.float16):
        assert not room.take(own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert room.take(own)
    room.gradients = 4 * sum(parameter.numel() for parameter in own)
    assert [room.take(own), room.take(own)] == [True, False]


def test_no_backward_runs_under_autocast(roomy):
    """Autocast casts matrix products of a backward, too, which torch advises against."""
    found, seen = [], []
    for options in ({"engine": "one_pass"}, {"engine": "two_pass", "micro_batch_tokens": 1}):
        model, pairs = make("direct", **options)
        for component in model.components.values():
            hidden = component.module.model.layers[0].mlp
            hidden.register_full_backward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(pairs)
        accumulate_gradients(model, output)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(seen) > 4
    assert not any(seen)
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    assert all(float((found[1][n] - g).abs().max()) < 0.02 * largest for n, g in found[0].items())


@pytest.mark.parametrize("case", ["direct", "adapters"])
def test_parameters_inside_checkpoints_with_reentrance_are_reached(case, roomy):
    _, expected = gradients_of(*make(case, engine="one_pass"))
    model, pairs = make(case, engine="two_pass", micro_batch_tokens=1)
    model.activation_checkpointing_enable({"use_reentrant": True})
    for component in model.components.values():
        component.module.enable_input_require_grads()
    model.train()
    output, found = gradients_of(model, pairs)
    assert_same(found, expected)
    assert isinstance(output.turns[0].batch.kept, KeptGradient)


def test_hooks_of_parameters_see_each_gradient_once(roomy):
    _, expected = gradients_of(*make("adapters", engine="one_pass"))
    model, pairs = make("adapters", engine="two_pass", micro_batch_tokens=1)
    for parameter in model.trained_parameters():
        parameter.register_hook(lambda gradient: 0.5 * gradient)
    _, found = gradients_of(model, pairs)
    assert_same({n: g if g is None else 2 * g for n, g in found.items()}, expected)


@pytest.mark.parametrize("at", ["first pass", "second pass"])
def test_gradients_that_wait_are_forgotten_when_memory_runs_out(at, monkeypatch, caplog, roomy):
    _, expected = gradients_of(*make("sampling", engine="one_pass"))
    model, pairs = make("sampling", engine="two_pass", micro_batch_tokens=1)
    name = "part_of_loss" if at == "second pass" else "__init__"
    original, calls = getattr(KeptGradient, name), []

    def fail_once(self, *arguments):
        calls.append(at)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *arguments)

    monkeypatch.setattr(KeptGradient, name, fail_once)
    _, found = gradients_of(model, pairs)
    assert_same(found, expected)
    assert len(calls) == 3
    assert not model.budget.reuses
    _, again = gradients_of(model, pairs)
    assert_same(again, expected)
    assert len(calls) == 3


class Failing:
    """Raises an out-of-memory error when the component scores more than `most` elements."""

    def __init__(self, monkeypatch, component, most, with_graph):
        self.raised = 0
        score = type(component).score

        def limited(this, inputs, draws, noise=None):
            if this is component and len(draws) > most and torch.is_grad_enabled() == with_graph:
                self.raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return score(this, inputs, draws, noise)

        monkeypatch.setattr(type(component), "score", limited)


@pytest.mark.parametrize("with_graph", [False, True])
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_step_goes_on_in_smaller_parts_when_memory_runs_out(engine, with_graph, monkeypatch, caplog):
    _, expected = gradients_of(*make("sampling", engine="one_pass"))
    model, pairs = make("sampling", engine=engine)
    # The last micro-batch of the first pass has a graph in both ways.
    failing = Failing(monkeypatch, model.components["answer" if with_graph else "draft"], 3, with_graph)
    with caplog.at_level(logging.WARNING):
        _, found = gradients_of(model, pairs)
    assert_same(found, expected)
    if engine == "two_pass" or with_graph:
        assert failing.raised > 0
        assert "micro-batches hold at most" in caplog.text or "two passes" in caplog.text
    before = failing.raised
    _, again = gradients_of(model, pairs)
    assert failing.raised == before  # what was learned stays
    assert_same(again, expected)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_backward_that_stops_half_way_counts_nothing_twice(engine, monkeypatch):
    _, expected = gradients_of(*make("sampling", engine="one_pass"))
    model, pairs = make("sampling", engine=engine)
    raised = []

    def fail(module, grad_input, grad_output):
        if not raised:
            raised.append(module)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.components["answer"].module.model.layers[0].mlp.register_full_backward_hook(fail)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)  # of an earlier micro-step, which must not be lost
    accumulate_gradients(model, model(pairs))
    assert raised
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same({n: p.grad - 0.5 for n, p in model.named_parameters()}, expected)


def test_a_single_element_that_does_not_fit_ends_in_a_message(monkeypatch):
    model, pairs = make("direct", engine="two_pass")
    Failing(monkeypatch, model.components["answer"], 0, True)
    with pytest.raises(TrainingError, match=r"'answer', row \d.*single element.*max_length.*not changed"):
        gradients_of(model, pairs)


def test_auto_measures_the_graphs_and_then_takes_one_pass_if_they_fit(monkeypatch):
    from sysdag.components import memory

    for free, one_pass in ((10**12, True), (10**4, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        model, pairs = make("direct", engine="auto")
        assert not model(pairs).loss.requires_grad
        _, first = gradients_of(model, pairs)
        second = model(pairs)
        assert second.loss.requires_grad == one_pass
        model.zero_grad()
        accumulate_gradients(model, second)
        assert_same({n: p.grad for n, p in model.named_parameters()}, first)


def test_measured_bytes_are_those_of_the_graph():
    from sysdag.components.memory import SavedBytes

    a, w = torch.randn(50, 20), torch.nn.Parameter(torch.randn(20, 30))
    with SavedBytes() as saved:
        (a @ w).tanh().pow(2)  # saves a, tanh's result (once, for itself and pow); w is a parameter
    assert saved.total == 4 * (50 * 20 + 50 * 30)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "engine",
    [{"engine": "one_pass"}, {"engine": "two_pass", "micro_batch_tokens": 40}, {"offload_idle": True}],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu_is_that_on_the_cpu(case, engine):
    """The loss lies where the models are, what is made of the scores on the CPU."""
    device = "cuda"
    expected, truth = gradients_of(*make(case, engine="two_pass"))
    model, pairs = make(case, **engine)
    model.to(device)
    model.move_references(torch.device(device))
    output, found = gradients_of(model, pairs)
    assert (output.loss.device.type, output.losses.device.type) == (device, "cpu")
    assert all(values.device.type == "cpu" for values in (*output.metrics.values(), *output.log_ratios.values()))
    torch.testing.assert_close(output.loss.detach().cpu(), expected.loss.detach(), rtol=1e-4, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in truth.values() if gradient is not None)
    for name, gradient in truth.items():
        if gradient is not None:
            torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-3, atol=1e-4 * largest)
