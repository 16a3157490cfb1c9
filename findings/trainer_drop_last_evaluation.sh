#!/usr/bin/env bash
# transformers 5.23.0: dataloader_drop_last leaves the last rows out of evaluations, too, and of a small one all.
#
# Guess: it drops the incomplete last batch of a training, whose gradient would be of fewer rows; an evaluation counts all.
# Seen: evaluate() has no batch for the rows behind the last full one: eval_loss is the mean over the others, and with
# fewer rows than a batch there is no eval_loss at all. The reported eval_samples_per_second counts every row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
))  # fmt: skip
rows = [{"input_ids": [3 + number] * 6, "labels": [3 + number] * 6} for number in range(5)]


def losses(drops, count):
    options = TrainingArguments(
        "out", per_device_eval_batch_size=4, dataloader_drop_last=drops, use_cpu=True, report_to=[], disable_tqdm=True
    )
    return Trainer(model, options, eval_dataset=rows[:count]).evaluate().get("eval_loss")


found = {(drops, count): losses(drops, count) for drops in (False, True) for count in (5, 4, 3)}
print(f"transformers {transformers.__version__}: eval_loss by (drop_last, rows) {found}")
assert found[True, 5] == found[True, 4] == found[False, 4] != found[False, 5], "the last row is evaluated now"
assert found[True, 3] is None, "few rows are evaluated now"
PY
