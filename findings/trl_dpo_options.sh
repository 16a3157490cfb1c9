#!/usr/bin/env bash
# TRL 1.16.0, DPOTrainer: two options that some losses do not go with, one in silence and one with an error.
#
# Guess: `sigmoid` with `label_smoothing` is conservative DPO, (1 - e) and e times the two directions' losses; and WPO's
# weights (`use_weighting`) multiply any loss of a pair.
# Seen: `sigmoid` has the same first loss with 0 and with 0.4, without a word, where `robust` and `exo_pair` change. The
# weights are multiplied in place: with `hinge` relu's backward needs what they overwrote, and the first step raises a
# RuntimeError; `sigmoid` and `ipo` train.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(16)}, unk_token="w2"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
rows = Dataset.from_list([{"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7 w8 w9"}] * 2)


def model(seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def first_loss(loss_type, label_smoothing):
    """The loss of a first step, with a reference that is another model."""
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, loss_type=[loss_type], label_smoothing=label_smoothing, beta=5.0, max_steps=1, report_to=[],
            per_device_train_batch_size=2, use_cpu=True, logging_steps=1, disable_tqdm=True, bf16=False, save_strategy="no",
        )
        trainer = trl.DPOTrainer(model(0), model(1), args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)



def trained(loss_type):
    """What a step with WPO's weights comes to."""
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, loss_type=[loss_type], use_weighting=True, max_steps=1, report_to=[], use_cpu=True, bf16=False,
            per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no",
        )
        trainer = trl.DPOTrainer(model(0), model(0), args=config, train_dataset=rows, processing_class=tokenizer)
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return "trained"


sigmoid = first_loss("sigmoid", 0.0), first_loss("sigmoid", 0.4)
robust = first_loss("robust", 0.0), first_loss("robust", 0.4)
exo = first_loss("exo_pair", 0.1), first_loss("exo_pair", 0.4)
print(f"trl {trl.__version__}: sigmoid {sigmoid}, robust {robust}, exo_pair {exo}")
assert robust[0] != robust[1] and exo[0] != exo[1]
assert sigmoid[0] == sigmoid[1], "sigmoid heeds label_smoothing now"
weighted = {loss_type: trained(loss_type) for loss_type in ("sigmoid", "ipo", "hinge")}
print(f"with use_weighting: {weighted}")
assert weighted["sigmoid"] == weighted["ipo"] == "trained"
assert "inplace" in weighted["hinge"], "hinge goes with use_weighting now"
PY
