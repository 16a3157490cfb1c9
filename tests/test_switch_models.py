"""Mixtures of specialists, a LoRA each on one base, behind routers: against plain transformers models."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from decoder_families import plain_log_prob
from tiny import char_tokenizer, llama

pytest.importorskip("peft")
from peft import LoraConfig

from sysdag import DataError, Exhaustive, Input, System, node, switch
from sysdag.components import CausalLM, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.execution.likelihood import log_probs
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.traces.cells import ABSENT

ROUTES = {"2+2?": {"math": 0.6, "talk": 0.4}, "why?": {"math": 0.1, "talk": 0.9}}
question = Input("question", str)


def solve_prompt(question):
    return f"solve {question} "


def outline_prompt(question):
    return f"outline {question} "


def tell_prompt(question, outline):
    return f"{outline} tell {question} "


def mixture(router=None):
    """question -> route; math: solve; talk: outline -> tell. Three adapters on one base model."""
    base, tokenizer = llama(0), char_tokenizer()

    def specialist(name, prompt):
        lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return node(CausalLM(base, tokenizer, peft_config=lora, max_new_tokens=4), name=name)(prompt)

    solve, outline = specialist("solve", solve_prompt), specialist("outline", outline_prompt)
    tell = specialist("tell", tell_prompt)
    route = router or node(Tabular(ROUTES), name="route")(lambda question: question)
    answer = switch(route, {"math": solve, "talk": outline >> tell}, name="answer")
    return System(question >> [route, solve, outline, tell], answer)


def move_adapters(system, seed=0):
    torch.manual_seed(seed)
    for name in ("solve", "outline", "tell"):
        component = system[name].component
        assert component.module is not None
        with torch.no_grad():
            for key, weight in component.own_parameters().items():
                if "lora_" in key:
                    weight.copy_(0.2 * torch.randn_like(weight))


def merged(component):
    """A plain transformers model with the adapter's B A, times alpha / r, added to the base's weights by hand."""
    model = llama(0)
    own = {key: weight.detach() for key, weight in component.own_parameters().items()}
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.lora_A.weight" in own:
                module.weight += 2.0 * own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
    return model.eval()


def text_log_prob(model, prompt, text):
    tokenizer = char_tokenizer()
    return plain_log_prob(model, tokenizer(prompt)["input_ids"], [*tokenizer(text)["input_ids"], 1])


def run_log_prob(models, x, route, z, outline=""):
    if route == "math":
        return text_log_prob(models["solve"], solve_prompt(x), z)
    prompts = [(models["outline"], outline_prompt(x), outline), (models["tell"], tell_prompt(x, outline), z)]
    return sum(text_log_prob(*each) for each in prompts)


def test_runs_are_scored_as_plain_models_do_and_adapters_that_are_not_taken_are_not_called(monkeypatch):
    system = mixture()
    move_adapters(system)
    plan = system.compile()
    called = {name: 0 for name in ("solve", "outline", "tell")}
    for name in called:
        component = system[name].component

        def counted(inputs, *, generator=None, name=name, sample=component.sample):
            called[name] += len(inputs)
            return sample(inputs, generator=generator)

        monkeypatch.setattr(component, "sample", counted)
    trace = plan.sample({"question": list(ROUTES) * 6}, seed=0)
    of_math = trace["route"].count("math")
    assert 0 < of_math < 12
    assert called == {"solve": of_math, "outline": 12 - of_math, "tell": 12 - of_math}
    models = {name: merged(system[name].component) for name in called}
    with torch.no_grad():
        scores = log_probs(plan, trace)
    for row in range(12):
        for name in called:
            cell = trace.cells[name][row]
            assert (cell is ABSENT) == ((trace["route"][row] == "math") != (name == "solve"))
            if cell is ABSENT:
                assert float(scores[name][row]) == 0
                continue
            x, outline = trace["question"][row], trace["outline"][row]
            prompt = {"solve": solve_prompt(x), "outline": outline_prompt(x), "tell": tell_prompt(x, outline)}[name]
            ids = char_tokenizer()(prompt)["input_ids"]
            expected = plain_log_prob(models[name], ids, cell.record["token_ids"])
            assert float(scores[name][row]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("engine", [{"engine": "one_pass"}, {"engine": "two_pass", "micro_batch_tokens": 1}])
def test_direct_trains_the_adapters_of_the_branches_that_were_taken(engine):
    rows = [
        {"question": "2+2?", "chosen": "4", "rejected": "5", "chosen_intermediates": {"route": "math"},
         "rejected_intermediates": {"route": "talk", "outline": "sum"}},
        {"question": "why?", "chosen": "so", "rejected": "no", "chosen_intermediates": {"route": "talk", "outline": ""},
         "rejected_intermediates": {"route": "math"}},
    ]  # fmt: skip
    system = mixture()
    plan = system.compile()
    model = SystemModel(plan, ObjectiveOptions(beta=0.3), engine=EngineOptions(**engine))
    before = {name: merged(system[name].component) for name in ("solve", "outline", "tell")}
    move_adapters(system)
    after = {name: merged(system[name].component) for name in before}
    margins = []
    for row in rows:
        ratios = []
        for side in ("chosen", "rejected"):
            given = row[f"{side}_intermediates"]
            run = (row["question"], given["route"], row[side], given.get("outline"))
            ratios.append(run_log_prob(after, *run) - run_log_prob(before, *run))
        margins.append(0.3 * (ratios[0] - ratios[1]))
    output = model(encode_pairs(plan, rows, "direct"))
    expected = torch.nn.functional.softplus(-torch.tensor(margins)).mean()
    assert float(output.loss.detach()) == pytest.approx(float(expected), abs=2e-5)
    accumulate_gradients(model, output)
    for name in before:
        own = system[name].component.own_parameters().values()
        assert any(weight.grad is not None and weight.grad.any() for weight in own), name


def test_sampling_weighs_the_branches_by_their_posterior():
    """One level of branches with equal prompts: p(z|x) is a mixture of two plain models' likelihoods."""
    base, tokenizer = llama(0), char_tokenizer()
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    parts = [CausalLM(base, tokenizer, peft_config=LoraConfig(**lora), max_new_tokens=4) for _ in range(2)]
    solve, tell = (node(part, name=name)(solve_prompt) for part, name in zip(parts, ("solve", "tell"), strict=True))
    route = node(Tabular(ROUTES), name="route")(lambda question: question)
    system = System(question >> [route, solve, tell], switch(route, {"math": solve, "talk": tell}, name="answer"))
    plan = system.compile()
    model = SystemModel(plan, ObjectiveOptions(objective="sampling", beta=0.3), None, Exhaustive())
    before = [merged(part) for part in parts]
    torch.manual_seed(1)
    with torch.no_grad():
        for part in parts:
            for weight in part.own_parameters().values():
                if weight.requires_grad:
                    weight.copy_(0.2 * torch.randn_like(weight))
    after = [merged(part) for part in parts]
    rows = [
        {"question": "2+2?", "chosen": "4", "rejected": "five"},
        {"question": "why?", "chosen": "so", "rejected": ""},
    ]

    def marginal(models, x, z):
        priors = [math.log(p) for p in ROUTES[x].values()]
        logs = [prior + text_log_prob(m, solve_prompt(x), z) for prior, m in zip(priors, models, strict=True)]
        return torch.tensor(logs, dtype=torch.float64).logsumexp(0)

    margins = torch.stack([
        0.3 * sum(
            sign * (marginal(after, row["question"], row[side]) - marginal(before, row["question"], row[side]))
            for side, sign in (("chosen", 1), ("rejected", -1))
        )
        for row in rows
    ])  # fmt: skip
    output = model(encode_pairs(plan, rows, "sampling"))
    assert float(output.loss.detach()) == pytest.approx(float(F.softplus(-margins).mean()), abs=2e-5)
    taken = output.metrics["nodes/solve/taken"] + output.metrics["nodes/tell/taken"]
    assert taken.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_language_model_may_name_the_branch():
    """A model whose head says "p" or "q", and then stops: white space around its text does not count."""
    tokenizer = char_tokenizer()
    model = copy.deepcopy(llama(3))
    names = {name: tokenizer(name)["input_ids"][0] for name in ("p", "q", "r")}

    def naming(allowed):
        bias = torch.full((model.config.vocab_size,), -1e4)
        bias[[names[name] for name in allowed]] = 0.0

        def hook(module, args, output):
            return output * 0.0 + bias

        return model.lm_head.register_forward_hook(hook)

    handle = naming("pq")
    router = node(CausalLM(model, tokenizer, max_new_tokens=1), name="route")(lambda question: f"{question} ")
    one, other = (node(name=name)(lambda question: question) for name in ("one", "other"))
    system = System(question >> [router, one, other], switch(router, {"p": one, "q": other}, name="answer"))
    trace = system.compile().sample({"question": ["why"] * 40}, seed=0)
    assert set(trace["route"]) == {"p", "q"}
    assert [value is None for value in trace["other"]] == [route == "p" for route in trace["route"]]
    handle.remove()
    handle = naming("r")
    with pytest.raises(DataError, match="Node 'route', row 0: 'r' names no branch of the switch 'answer'"):
        system.compile().sample({"question": ["why"]}, seed=0)
    handle.remove()
