#!/usr/bin/env bash
# trl 1.16.0, DPOTrainer on messages: a completion does not end where a model that is sampled stops.
#
# Guess: the last token that counts is the one that ends the turn, at which `generate` stops, as in a row of plain texts,
# whose completion ends in the eos token.
# Seen: what a ChatML template writes behind the turn's end, a line break, is a token of the completion, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
"$folder/venv/bin/python" - "$folder/model" <<'PY'
import sys

import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
backend = Tokenizer(models.BPE(letters, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
    additional_special_tokens=["<|im_start|>"],
)
tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
)
LlamaForCausalLM(config).save_pretrained(folder)
tokenizer.save_pretrained(folder)


def completion(row):
    options = trl.DPOConfig(f"{folder}/out", report_to="none", use_cpu=True, bf16=False)
    trainer = trl.DPOTrainer(folder, args=options, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    return tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])


def said(role, text):
    return [{"role": role, "content": text}]


texts = completion({"prompt": "q: ", "chosen": "yes", "rejected": "no"})
messages = completion(
    {"prompt": said("user", "q"), "chosen": said("assistant", "yes"), "rejected": said("assistant", "no")}
)
print(f"trl {trl.__version__}: of texts {texts!r} counts, of messages {messages!r}")
assert texts == "yes<|im_end|>"
assert messages == "yes<|im_end|>\n", "the completion ends at the end of its turn now"
PY
