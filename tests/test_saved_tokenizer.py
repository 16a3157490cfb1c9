"""A tokenizer comes back from a saved system as it was, also where transformers reads another kind beside the model."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from sysdag.components import Categorical, CausalLM

TEXT = "w5 w6 w11"
IDS = [5, 6, 11]


def words():
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, 20)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(kind=Qwen2ForCausalLM, **options):
    torch.manual_seed(0)
    return kind(
        Qwen2Config(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, pad_token_id=0, eos_token_id=1, **options,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model().save_pretrained(tmp_path / "given")
    words().save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_transformers_reads_another_tokenizer_beside_such_a_model(folder):
    """What the rest of this file guards against; where it fails, `read_tokenizer` can go."""
    assert words()(TEXT).input_ids == IDS
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids != IDS


def test_a_saved_language_model_has_the_tokenizer_that_it_was_saved_with(tmp_path):
    component = CausalLM(model(), words(), max_new_tokens=3)
    assert component.prompt_ids([TEXT]) == [IDS]
    options = component.save_pretrained(tmp_path / "saved")
    again = CausalLM.from_pretrained(tmp_path / "saved", options)
    assert again.prompt_ids([TEXT]) == [IDS]
    assert float(again.log_prob([TEXT], again.observe(["w7 w8"]))[0].detach()) == pytest.approx(
        float(component.log_prob([TEXT], component.observe(["w7 w8"]))[0].detach())
    )


def test_a_saved_classifier_too(tmp_path):
    component = Categorical(["yes", "no"], model(Qwen2ForSequenceClassification, num_labels=2), words())
    options = component.save_pretrained(tmp_path / "saved")
    again = Categorical.from_pretrained(tmp_path / "saved", options)
    assert again.tokenizer(TEXT).input_ids == IDS


def test_a_folder_from_elsewhere_is_read_as_transformers_reads_it_and_said(folder, caplog):
    with caplog.at_level(logging.WARNING):
        component = CausalLM(folder, max_new_tokens=3)
        assert component.tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert "holds a tokenizer of the kind" in caplog.text
    assert "splits texts in another way than tokenizer.json says" in caplog.text
    caplog.clear()
    assert CausalLM(folder, words(), max_new_tokens=3).prompt_ids([TEXT]) == [IDS]
    assert not caplog.text
