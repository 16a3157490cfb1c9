"""Tabular, Categorical and Opaque."""

import math

import pytest
import torch
from tiny import char_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from sysdag import DataError, PlanError, SerializationError
from sysdag.components import Categorical, Opaque, Tabular

TABLE = {("a", 1): {"x": 0.7, "y": 0.3}, "b": {"x": 0.1, "z": 0.9}}


def shout(text):
    return text.upper()


SHOUTING = Opaque(shout)


def classifier(seed=0, labels=3):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, num_labels=labels,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    return model


def components():
    return {
        "tabular": (Tabular(TABLE), ["b", ("a", 1)]),
        "linear": (Categorical(["math", "code", "chat"], 2), [[0.5, 1.0], [2.0, -1.0]]),
        "module": (Categorical(["math", "code", "chat"], torch.nn.Linear(2, 3)), [[0.5, 1.0], [2.0, -1.0]]),
        "text": (Categorical(["math", "code", "chat"], classifier(), char_tokenizer()), ["one plus", "print"]),
    }


@pytest.mark.parametrize("kind", list(components()))
def test_draws_rescore_to_what_they_were_drawn_with_and_probabilities_sum_to_1(kind):
    component, inputs = components()[kind]
    draws = component.sample(inputs * 50, generator=torch.Generator().manual_seed(0))
    assert component.log_prob(inputs * 50, draws).tolist() == pytest.approx([d.log_prob for d in draws], abs=1e-5)
    for given in inputs:
        every = component.observe(list(component.values))
        assert float(component.log_prob([given] * len(every), every).detach().exp().sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", list(components()))
def test_the_reference_stays_and_a_saved_component_scores_the_same(kind, tmp_path):
    component, inputs = components()[kind]
    draws = component.observe([component.values[0]] * 2)
    reference = component.reference()
    before = reference.log_prob(inputs, draws)
    torch.testing.assert_close(component.log_prob(inputs, draws), before, rtol=0, atol=0)
    component.log_prob(inputs, draws).sum().backward()
    with torch.no_grad():
        for parameter in component.module.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad)
    after = component.log_prob(inputs, draws)
    assert (after > before).all()
    torch.testing.assert_close(reference.log_prob(inputs, draws), before, rtol=0, atol=0)

    options = component.save_pretrained(tmp_path)
    fresh, _ = components()[kind]
    fresh.load_weights(tmp_path)
    torch.testing.assert_close(fresh.log_prob(inputs, draws), after, rtol=0, atol=0)
    if kind == "module":
        with pytest.raises(SerializationError, match="a module of your own.*load_weights"):
            type(component).from_pretrained(tmp_path, options)
    else:
        loaded = type(component).from_pretrained(tmp_path, options)
        torch.testing.assert_close(loaded.log_prob(inputs, draws), after, rtol=0, atol=0)
        assert loaded.values == component.values


def test_a_table_gives_its_probabilities():
    tabular = Tabular(TABLE)
    assert tabular.values == ("x", "y", "z")
    got = tabular.log_prob([("a", 1), "b", "b"], tabular.observe(["y", "z", "y"])).tolist()
    assert got == pytest.approx([math.log(0.3), math.log(0.9), -math.inf])


def test_sampling_frequencies_agree_with_the_table():
    tabular = Tabular({"k": {0: 0.5, 1: 0.3, 2: 0.2}})
    draws = tabular.sample(["k"] * 5000, generator=torch.Generator().manual_seed(0))
    counts = [sum(d.value == v for d in draws) for v in range(3)]
    chi_square = sum((c - 5000 * p) ** 2 / (5000 * p) for c, p in zip(counts, (0.5, 0.3, 0.2), strict=True))
    assert chi_square < 13.8  # the 0.999 quantile at 2 degrees of freedom


def test_search_gives_the_most_probable_values_and_never_an_impossible_one():
    found = Tabular(TABLE).search([("a", 1), "b"], 3, 20.0)
    assert [[draw.value for draw in draws] for draws in found] == [["x", "y"], ["z", "x"]]


def test_padding_does_not_change_a_classifiers_score():
    component = components()["text"][0]
    texts = ["a", "a much longer text"]
    together = component.logits(texts)
    torch.testing.assert_close(torch.cat([component.logits([text]) for text in texts]), together, atol=1e-6, rtol=1e-5)


GPT2 = dict(
    vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, bos_token_id=None, eos_token_id=1
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "pad"),  # the tokenizer's padding token, another one, none
    [
        *((kind, pad) for kind in (GPT2Config, LlamaConfig) for pad in (0, 1, None)),
        (RobertaConfig, 0),
        (RobertaConfig, 1),
    ],
)
def test_classifiers_read_a_text_in_a_batch_as_they_read_it_alone(kind, pad, side):
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    options = GPT2 if kind is GPT2Config else dict(vocab_size=50, num_labels=3, max_position_embeddings=40, **small)
    config = kind(**{**options, "pad_token_id": pad})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    tokenizer = char_tokenizer()
    tokenizer.padding_side = side
    component = Categorical(["math", "code", "chat"], model, tokenizer)
    texts = ["a", "a much longer text", "abc", "xyz"]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
        torch.testing.assert_close(component.logits(texts), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_classifier_that_takes_no_mask_reads_texts_of_one_length_together():
    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, intermediate_size=16, max_position_embeddings=32,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = char_tokenizer()
    texts = ["a", "a much longer text", "b"]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    sizes = []
    model.register_forward_pre_hook(lambda m, a, options: sizes.append(len(options["input_ids"])), with_kwargs=True)
    tokenizer.model_input_names = ["input_ids"]
    found = Categorical(["math", "code", "chat"], model, tokenizer).logits(texts)
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert sizes == [2, 1]


def test_a_linear_classifier_starts_uniform():
    component, inputs = components()["linear"]
    log_prob = component.log_prob(inputs, component.observe(["code", "chat"]))
    assert log_prob.tolist() == pytest.approx([-math.log(3)] * 2)


def test_mistakes_are_named():
    with pytest.raises(PlanError, match="at least one row"):
        Tabular({})
    with pytest.raises(PlanError, match="row 'k'.*sum 0.5"):
        Tabular({"k": {"x": 0.5}})
    with pytest.raises(PlanError, match="row 'k'"):
        Tabular({"k": {"x": 1.5, "y": -0.5}})
    with pytest.raises(DataError, match="no row for 'c'") as error:
        Tabular(TABLE).logits(["b", "c"])
    assert error.value.element == 1
    with pytest.raises(DataError, match="no row for"):
        Tabular(TABLE).logits([["unhashable"]])
    with pytest.raises(DataError, match="'w' is none of its values") as error:
        Tabular(TABLE).observe(["x", "w"])
    assert error.value.element == 1
    with pytest.raises(PlanError, match="at least 2 different options"):
        Categorical(["same", "same"], 2)
    linear, text = components()["linear"][0], components()["text"][0]
    with pytest.raises(DataError, match="reads vectors"):
        linear.logits(["text"])
    with pytest.raises(DataError, match="of one length"):
        linear.logits([[1.0, 2.0], [1.0]])
    with pytest.raises(DataError, match="reads strings"):
        text.logits([3])
    with pytest.raises(PlanError, match=r"logits of shape \(1, 3\), got \(1, 2\)"):
        Categorical(["a", "b", "c"], classifier(labels=2), char_tokenizer()).logits(["x"])


def test_opaque_runs_its_function_and_has_no_likelihood(tmp_path):
    tool = SHOUTING
    assert [draw.value for draw in tool.sample(["a", "b"])] == ["A", "B"]
    with pytest.raises(PlanError, match="no exact likelihood.*'none'"):
        tool.log_prob(["a"], tool.observe(["A"]))
    with pytest.raises(PlanError, match="no weights to compare"):
        tool.reference()
    loaded = Opaque.from_pretrained(tmp_path, tool.save_pretrained(tmp_path))
    assert loaded.function is shout
    with pytest.raises(SerializationError, match="top level of a module"):
        Opaque(lambda text: text).save_pretrained(tmp_path)
    with pytest.raises(SerializationError, match="gives no such function to a component"):
        Opaque.from_pretrained(tmp_path, {"function": {"path": "os:system", "source_sha256": None}})
