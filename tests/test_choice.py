"""A choice among options that come with the input: its draws, what may be observed, and what is refused."""

import itertools
import json
import math
from collections import Counter

import numpy
import pytest
import torch
from tiny import char_tokenizer
from tiny_sentences import bert

from sysdag import (
    DataError,
    Exhaustive,
    Input,
    PlanError,
    SerializationError,
    System,
    Trace,
    node,
)
from sysdag.components import BiEncoder, Categorical, Choice, ChoicePrompt, FeatureScorer, Opaque, Tabular
from sysdag.components.selection.scorer import Scorer
from sysdag.data.logs import logged_runs
from sysdag.execution.execute import fill, sample
from sysdag.theory import enumerate_outcomes
from sysdag.traces.cells import Draw


class Bilinear(torch.nn.Module):
    """score = q' W o."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64))

    def forward(self, queries, options):
        return torch.einsum("nq,qd,nd->n", queries, self.weight, options)


VECTORS = {"north": [1.0, 0.0, 0.5], "east": [0.0, 1.0, -0.5], "south": [-1.0, 0.3, 0.2], "west": [0.4, 0.4, 0.4]}
QUERY = [0.7, -1.3]


def prompt(names, query=QUERY):
    return ChoicePrompt(query, list(names), read_as=[VECTORS[name] for name in names])


def scores(names, query=QUERY):
    return [
        float(torch.tensor(query).double() @ Bilinear().weight.detach() @ torch.tensor(VECTORS[n]).double())
        for n in names
    ]


def choice(**options):
    return Choice(FeatureScorer(Bilinear()), **options)


def test_p_is_the_softmax_of_scores_over_the_temperature_for_any_number_of_options():
    component = choice(temperature=0.4)
    rows = [prompt(["north", "east", "south"]), prompt(["west"]), prompt(["south", "west"], [0.1, 0.2])]
    draws = component.in_context(rows, component.observe(["east", "west", "south"]))
    assert [draw.record["index"] for draw in draws] == [1, 0, 0]
    wanted = []
    for row, value in zip(rows, ["east", "west", "south"], strict=True):
        logits = torch.tensor(scores(row.options, row.query)) / 0.4
        wanted.append(float(logits.log_softmax(0)[row.options.index(value)]))
    assert component.log_prob(rows, draws).tolist() == pytest.approx(wanted, rel=1e-6)
    assert wanted[1] == 0.0


@pytest.mark.parametrize("k", [None, 1, 2, 3])
def test_draws_keep_options_and_indices_and_score_to_what_they_were_drawn_with(k):
    component = choice(k=k, temperature=2.0)
    rows = [prompt(["north", "east", "south"]), prompt(list(VECTORS))]
    draws = component.sample(rows, generator=[5, 6])
    assert component.log_prob(rows, draws).tolist() == pytest.approx([draw.log_prob for draw in draws], rel=1e-9)
    for row, draw in zip(rows, draws, strict=True):
        assert draw.record["options"] == row.options
        values, indices = ([draw.value], [draw.record["index"]]) if k is None else (draw.value, draw.record["indices"])
        assert values == [row.options[index] for index in indices]
        assert len(set(indices)) == (k or 1)
    component.check_draws(draws)
    for place, seed in enumerate((5, 6)):  # a draw depends on its seed alone
        assert component.sample([rows[place]], generator=[seed])[0].record == draws[place].record
    every = component.outcomes(rows)
    assert [len(own) for own in every] == component.outcome_counts(rows)
    for row, own in zip(rows, every, strict=True):
        assert float(component.log_prob([row] * len(own), own).exp().sum().detach()) == pytest.approx(1, abs=1e-9)


def test_draws_have_the_probabilities_of_the_enumeration():
    component, row, draws = choice(k=2, temperature=2.0), prompt(["north", "east", "south"]), 6000
    found = component.sample([row] * draws, generator=torch.Generator().manual_seed(0))
    counts = Counter(tuple(draw.value) for draw in found)
    weights = {name: math.exp(score / 2) for name, score in zip(row.options, scores(row.options), strict=True)}
    total = sum(weights.values())
    wanted = {
        (one, other): weights[one] / total * weights[other] / (total - weights[one])
        for one, other in itertools.permutations(weights, 2)
    }
    assert sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in wanted.items()) < 20.5
    assert (
        choice(k=2).propose([row], temperature=1e-3, generator=[0])[0].value
        == sorted(row.options, key=lambda name: -weights[name])[:2]
    )
    cut = component.propose([row] * 50, top_k=1, generator=list(range(50)))
    assert {tuple(draw.value) for draw in cut} == {tuple(sorted(row.options, key=lambda name: -weights[name])[:2])}
    assert {draw.log_prob for draw in cut} == {0.0}


def test_a_search_finds_the_most_probable_choices():
    component, rows = choice(k=2), [prompt(["north", "east", "south"]), prompt(["east", "west"])]
    first, second = component.search(rows, 4, 1.0)
    every = component.outcomes(rows)[0]
    log_probs = component.log_prob([rows[0]] * 6, every).tolist()
    ordered = [every[place].value for place in sorted(range(6), key=lambda place: -log_probs[place])]
    assert [draw.value for draw in first] == ordered[:4]
    assert len(second) == 2
    assert component.key(first[0]) != component.key(first[1])


def test_observed_values_are_options_or_indices():
    component = choice(k=2)
    row = prompt(["north", "east", "south"])
    for value in (["south", "north"], [2, 0], ("south", 0), ["south", numpy.str_("north")]):
        [draw] = component.in_context([row], component.observe([value]))
        assert (draw.value, draw.record["indices"]) == (["south", "north"], [2, 0])
    numbers = ChoicePrompt(QUERY, [30, 10, 20], read_as=list(VECTORS.values())[:3])
    [draw] = choice().in_context([numbers], choice().observe([10]))
    assert draw.record["index"] == 1  # where options are integers, an integer is one


def test_equal_options_have_a_probability_each_and_are_told_apart_by_their_indices():
    component, row = choice(), ChoicePrompt(QUERY, ["a", "b", "a"], read_as=list(VECTORS.values())[:3])
    draws = component.in_context([row] * 3, component.observe([0, 1, 2]))
    assert [draw.value for draw in draws] == ["a", "b", "a"]
    assert float(component.log_prob([row] * 3, draws).exp().sum().detach()) == pytest.approx(1)
    assert len({component.key(draw) for draw in draws}) == 3
    with pytest.raises(DataError, match=r"'a' is equal to the options \[0, 2\].*give the index"):
        component.in_context([row], component.observe(["a"]))


@pytest.mark.parametrize(
    ("k", "row", "value", "message"),
    [
        (None, ["north"], "up", "'up' is no option of its row, which has \\['north'\\]"),
        (None, ["north", "east"], 2, "the index 2 is none of the 2 options' \\(0 to 1\\)"),
        (None, ["north", "east"], -1, "the index -1 is none"),
        (None, ["north", "east"], True, "True is no option"),
        (None, ["north", "east"], 1.0, "1.0 is no option"),
        (2, ["north", "east"], ["east", 1], "the indices \\[1, 1\\] choose an option twice"),
        (2, ["north", "east"], ["east"], "a value is a list of 2 options or indices, got 1"),
        (2, ["north", "east"], "east", "a value is a list of 2 options or indices, got 'east'"),
    ],
)
def test_what_cannot_have_been_chosen_is_named(k, row, value, message):
    component = choice(k=k)
    good = "north" if k is None else ["east", "north"]
    with pytest.raises(DataError, match=message) as error:
        component.in_context([prompt(["north", "east"]), prompt(row)], component.observe([good, value]))
    assert error.value.element == 1


def test_a_value_of_another_length_is_refused_by_what_scores_it_too():
    component = choice(k=2)
    rows = [("q", ["north", "east", "up"])]
    for score in (component.log_prob, component.typicality):
        with pytest.raises(DataError, match="list of 2 options or indices, got 3") as error:
            score(rows, [Draw(["north", "east", "up"])])
        assert error.value.element == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("query", []), "the list of options is empty, so nothing can be chosen"),
        (prompt(["north"]), "there are 1 options, and k=2 of them are to be chosen"),
        ("a text", "must return a query and the list of options.*got 'a text'"),
        (("query", "options"), "must return a query and the list of options"),
        (ChoicePrompt(QUERY, ["a", "b"], read_as=[[1.0]]), "read_as must be a list with one value for each of the 2"),
        (ChoicePrompt(QUERY, ["a", "b"]), "reads vectors, got 'a' as option"),
        (ChoicePrompt("why", ["a", "b"], read_as=[[1.0] * 3] * 2), "reads vectors, got 'why' as query"),
        (ChoicePrompt(QUERY, ["a", "b"], read_as=[[1.0] * 3, [1.0]]), "vectors of one length of 3 features, got shape"),
        (
            ChoicePrompt(QUERY, ["a", "b"], read_as=[[math.nan] * 3] * 2),
            "the scores of 2 options or more must be finite",
        ),
    ],
)
def test_inputs_that_nothing_can_be_chosen_from_are_named(given, message):
    with pytest.raises(DataError, match=message) as error:
        choice(k=2).sample([prompt(list(VECTORS)), given], generator=[0, 1])
    assert error.value.element == 1


def test_an_option_of_score_minus_infinity_is_never_chosen_and_others_are():
    class Masked(Bilinear):
        def forward(self, queries, options):
            return super().forward(queries, options).masked_fill(options[:, 0] == 0, -torch.inf)

    component, row = Choice(FeatureScorer(Masked()), k=2), prompt(["north", "east", "south"])
    found = component.sample([row] * 50, generator=list(range(50)))
    assert {frozenset(draw.value) for draw in found} == {frozenset(["north", "south"])}
    with pytest.raises(DataError, match="scores of 3 options or more must be finite"):
        Choice(FeatureScorer(Masked()), k=3).sample([row])


def test_draws_of_another_choice_are_refused():
    component, row = choice(), prompt(["north", "east"])
    [draw] = component.in_context([row], component.observe(["east"]))
    with pytest.raises(DataError, match="was made of 2 options, and its input has 3"):
        component.log_prob([prompt(["north", "east", "west"])], [draw])
    with pytest.raises(DataError, match="at index 0, 'north' and not 'west'"):
        component.log_prob([prompt(["west", "east"])], [draw])
    with pytest.raises(DataError, match="needs its options, a list, and the indices of 2 different ones"):
        choice(k=2).check_draws([draw])
    with pytest.raises(DataError, match="has the value 'north', but the index 1 of other options"):
        component.check_draws([Draw("north", draw.record)])
    for record in ({"index": 1}, {"options": ["a"], "index": 1}, {"options": ["a"], "index": "0"}):
        with pytest.raises(DataError, match="a draw needs its options"):
            component.check_draws([Draw("a", record)])


def test_options_out_of_range_are_named():
    for options, message in (
        ({"k": 0}, "k must be an integer of 1 or more"),
        ({"k": True}, "k must be an integer"),
        ({"temperature": 0.0}, "temperature > 0"),
    ):
        with pytest.raises(PlanError, match=message):
            choice(**options)
    with pytest.raises(PlanError, match=r"takes a scorer, as BiEncoder\('a-model'\) or CrossEncoder"):
        Choice("a-model")
    with pytest.raises(PlanError, match="a torch module with parameters"):
        FeatureScorer(torch.nn.Identity())
    with pytest.raises(PlanError, match="one score for each of 2 pairs, got shape"):
        Choice(FeatureScorer(torch.nn.Bilinear(3, 3, 3))).sample([ChoicePrompt([1.0] * 3, ["a", "b"], [[1.0] * 3] * 2)])


def test_a_choice_is_a_categorical_whose_options_are_the_same_in_every_row():
    """With one-hot options the same classifier stands in both, gradients too."""
    options, linear = ["x", "y", "z"], torch.nn.Linear(4, 3, bias=False)

    class AsScorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, queries, one_hot):
            return (self.linear(queries) * one_hot).sum(-1)

    fixed, chosen = Categorical(options, linear), Choice(FeatureScorer(AsScorer()))
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [ChoicePrompt(row, options, torch.eye(3).tolist()) for row in features]
    values = ["x", "z", "y", "z", "z"]
    gradients = []
    for component, inputs in ((fixed, features), (chosen, rows)):
        draws = component.in_context(inputs, component.observe(values))
        linear.zero_grad()
        found = component.log_prob(inputs, draws)
        found.sum().backward()
        gradients.append((found.detach(), linear.weight.grad.clone(), component.typicality(inputs, draws)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_the_reference_stays_and_a_saved_module_is_refilled(tmp_path):
    component, row = choice(k=2, temperature=0.5), prompt(list(VECTORS))
    draws = component.in_context([row], component.observe([["east", "west"]]))
    reference, before = component.reference(), component.log_prob([row], draws)
    before.sum().backward()
    with torch.no_grad():
        component.module.weight.add_(component.module.weight.grad, alpha=0.1)
    after = component.log_prob([row], draws)
    assert float(after.detach()) > float(before.detach())
    torch.testing.assert_close(reference.log_prob([row], draws), before.detach(), rtol=0, atol=0)
    options = json.loads(json.dumps(component.save_pretrained(tmp_path)))
    with pytest.raises(SerializationError, match="a module of your own"):
        Choice.from_pretrained(tmp_path, options)
    torch.testing.assert_close(choice(k=2).refilled(tmp_path, options).log_prob([row], draws), after, rtol=0, atol=0)
    with pytest.raises(SerializationError, match="another choice than the one that was saved.*k=2"):
        choice().refilled(tmp_path, options)
    with pytest.raises(SerializationError, match="sysdag has no scorer 'Best'"):
        Choice.from_pretrained(tmp_path, {**options, "scorer": "Best"})


class Shortest(Scorer):
    """Scores of one's own: the shorter the better, by a weight."""

    def __init__(self):
        self._module = torch.nn.Linear(1, 1, bias=False)

    @property
    def module(self):
        return self._module

    def scores(self, prompts):
        return [-self._module.weight[0, 0] * torch.tensor([float(len(t)) for t in p.texts]) for p in prompts]

    def pieces(self, prompts):
        return [{(row, place): 1 for place in range(len(p.options))} for row, p in enumerate(prompts)]

    def reference(self, *, moves=False):
        return self

    def fresh(self):
        return None

    def save(self, folder):
        return {"weight": float(self._module.weight)}

    @classmethod
    def load(cls, folder, options):
        made = cls()
        with torch.no_grad():
            made._module.weight.fill_(options["weight"])
        return made

    def refilled(self, folder, options):
        return self.load(folder, options)

    def load_weights(self, folder):
        raise NotImplementedError


def test_a_scorer_of_ones_own_is_found_again(tmp_path):
    component = Choice(Shortest())
    options = component.save_pretrained(tmp_path)
    assert options["scorer"] == "test_choice:Shortest"
    options = json.loads(json.dumps(options))
    with pytest.raises(SerializationError, match="test_choice:Shortest is a class of your own"):
        Choice.from_pretrained(tmp_path, options)
    loaded = Choice(Shortest()).refilled(tmp_path, options)
    rows = [("q", ["long one", "short"])]
    draws = loaded.in_context(rows, loaded.observe([1]))
    torch.testing.assert_close(loaded.log_prob(rows, draws), component.log_prob(rows, draws))


class Tally(torch.nn.Module):
    """Logits of options by a table: the query is a row of it, an option a column."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, queries, options):
        return self.logits[queries[:, 0].long(), options[:, 0].long()]


x, passages = Input("x"), Input("passages", list)
LOGITS = [[0.2, -0.4, 1.1, 0.0], [1.0, 0.3, -0.8, 0.5]]
ANSWER = {
    (one, other): {"yes": 0.1 + 0.2 * one, "no": 0.9 - 0.2 * one - 0.05 * other, "hm": 0.05 * other}
    for one, other in itertools.permutations(range(4), 2)
}


def build():
    """x -> rewriting -> the best two of the row's passages -> answer."""

    @node(Tabular({"a": {0: 0.7, 1: 0.3}, "b": {0: 0.2, 1: 0.8}}))
    def rewriting(x):
        return x

    @node(Choice(FeatureScorer(Tally(LOGITS)), k=2))
    def chosen(rewriting, passages):
        return ChoicePrompt([float(rewriting)], passages, read_as=[[float(len(p))] for p in passages])

    @node
    def lengths(chosen):
        return tuple(len(each) for each in chosen)

    @node(Tabular(ANSWER))
    def answer(lengths):
        return lengths

    return System(x >> rewriting, (rewriting & passages) >> chosen >> lengths >> answer)


INPUTS = {"x": ["a", "b"], "passages": [["", "z", "zz"], ["zz", "zzz", "", "z"]]}  # an option is known by its length


def joint(x_, options, answer_):
    """p(answer | x) by hand."""
    table = {"a": {0: 0.7, 1: 0.3}, "b": {0: 0.2, 1: 0.8}}
    total = 0.0
    for query, p in table[x_].items():
        weights = {option: math.exp(LOGITS[query][len(option)]) for option in options}
        whole = sum(weights.values())
        for one, other in itertools.permutations(options, 2):
            choice_ = weights[one] / whole * weights[other] / (whole - weights[one])
            total += p * choice_ * ANSWER[len(one), len(other)][answer_]
    return total


def test_exhaustive_candidates_sum_to_the_marginal_of_the_enumeration():
    plan = build().compile()
    drawn = Exhaustive().draw(plan, INPUTS)
    assert Counter(drawn.prompt) == {0: 2 * 6, 1: 2 * 12}
    for value in ("yes", "no"):
        trace = fill(plan, drawn.trace).updated({"answer": [Draw(value)] * len(drawn.prompt)})
        trace = trace.updated({"answer": plan.system["answer"].component.observe([value] * len(drawn.prompt))})
        log_joint = sum(plan.log_probs(trace).values())
        for row in (0, 1):
            own = [place for place, prompt_ in enumerate(drawn.prompt) if prompt_ == row]
            found = float(log_joint[own].exp().sum())
            assert found == pytest.approx(joint(INPUTS["x"][row], INPUTS["passages"][row], value), rel=1e-9)
    with pytest.raises(PlanError, match="node 'chosen' makes 24 paths a prompt, more than num_candidates=20, in row 1"):
        Exhaustive(num_candidates=20).draw(plan, INPUTS)


def test_a_system_is_enumerated_and_its_probabilities_sum_to_1():
    plan = build().compile()
    trace = enumerate_outcomes(plan, {"x": "a", "passages": ["", "z", "zz"]})
    assert len(trace) == 2 * 6 * 3
    assert float(sum(plan.log_probs(trace).values()).exp().sum()) == pytest.approx(1, rel=1e-9)


def test_a_trace_keeps_what_it_is_scored_by_through_files(tmp_path):
    plan = build().compile()
    trace = plan.sample(INPUTS, seed=3)
    trace.to_jsonl(tmp_path / "runs.jsonl")
    read = Trace.from_jsonl(tmp_path / "runs.jsonl")
    assert read.cells["chosen"][0].record == trace.cells["chosen"][0].record
    before, after = plan.log_probs(trace), plan.log_probs(read)
    assert torch.equal(before["chosen"], after["chosen"])


def test_given_indices_become_options_before_other_nodes_read_them():
    plan = build().compile()
    given = Trace({}, {"chosen": [Draw([1, 0]), Draw(["zz", "z"])]})
    trace = sample(plan, INPUTS, seed=0, given=given)
    assert trace["chosen"] == [["z", ""], ["zz", "z"]]
    assert trace["lengths"] == [(1, 0), (2, 1)]
    wrong = Trace({}, {"chosen": [Draw([1, 0]), Draw(["zz", "up"])]})
    with pytest.raises(DataError, match="Node 'chosen', row 1: Choice.*'up' is no option of its row"):
        sample(plan, INPUTS, seed=0, given=wrong)


def test_an_empty_list_in_a_run_names_node_and_row():
    plan = build().compile()
    with pytest.raises(DataError, match="Node 'chosen', row 1: Choice.*the list of options is empty"):
        plan.sample({"x": ["a", "b"], "passages": [["", "z"], []]}, seed=0)


def test_an_encoder_in_evaluation_scores_as_it_samples():
    component = Choice(BiEncoder(bert(), char_tokenizer()), k=2, temperature=0.05)
    rows = [("why", ["so", "it is", "because"]), ("how", ["so", "thus"])]
    draws = component.sample(rows, generator=[1, 2])
    assert component.log_prob(rows, draws).tolist() == pytest.approx([draw.log_prob for draw in draws], abs=1e-4)


def test_a_component_of_finitely_many_values_tells_all_that_it_draws():
    coin = Tabular({"k": {"heads": 0.5, "tails": 0.5}})
    assert coin.outcome_counts(["k", "k"]) == [2, 2]
    assert [[draw.value for draw in draws] for draws in coin.outcomes(["k"])] == [["heads", "tails"]]
    assert Opaque(len).outcome_counts(["a"]) is None
    with pytest.raises(PlanError, match="does not draw from finitely many values"):
        Opaque(len).outcomes(["a"])


def test_a_logged_row_whose_options_cannot_be_told_is_skipped_with_its_reason():
    @node(choice())
    def chosen(x):
        return prompt(x["names"])

    rows = [{"x": {"names": ["north", "east"]}, "output": 1}, {"x": {}, "output": 1}]
    found = logged_runs(System(Input("x") >> chosen).compile(), rows, skip=True)
    assert found.trace["chosen"] == ["east"]
    assert dict(found.bad) == {1: "node 'chosen': its function fails on this row: KeyError: 'names'"}
