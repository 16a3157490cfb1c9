#!/usr/bin/env bash
# transformers 5.23.0: an evaluation with bf16_full_eval rounds a trained model to bf16, and it stays so when it is saved.
#
# Guess: bf16_full_eval computes an evaluation in bf16 and leaves the fp32 weights as they were trained.
# Seen: after a training, evaluate() casts the model in place; save_model then writes bf16, and the updates that were
# smaller than a bf16 step are gone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
))  # fmt: skip
rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))} for _ in range(4)]
options = TrainingArguments(
    "out", max_steps=2, learning_rate=1e-6, bf16_full_eval=True, use_cpu=True, report_to=[], save_strategy="no",
    disable_tqdm=True,
)
trainer = Trainer(model, options, train_dataset=rows, eval_dataset=rows)
trainer.train()
trained = model.lm_head.weight.detach().clone()
trainer.evaluate()
trainer.save_model("saved")
saved = load_file("saved/model.safetensors")["lm_head.weight"]
print(f"transformers {transformers.__version__}: trained in {trained.dtype}, saved in {saved.dtype}, "
      f"off by {float((saved.float() - trained).abs().max()):.1e}")
assert trained.dtype == torch.float32 and saved.dtype == torch.bfloat16, "the weights stay as they were trained now"
PY
