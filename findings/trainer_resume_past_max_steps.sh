#!/usr/bin/env bash
# transformers 5.23.0, Trainer: resuming from the last checkpoint of a run with `max_steps` trains one more step.
#
# Guess: a run that reached `max_steps` has nothing left to do when it is resumed from its last checkpoint.
# Seen: where `max_steps` lies inside an epoch one more batch is trained, and `global_step` becomes max_steps + 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PY'
import tempfile

import torch
import transformers
from transformers import Trainer, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = 0

    def forward(self, x, labels):
        self.batches += 1
        return {"loss": (self.layer(x) - labels).square().mean()}


rows = [{"x": torch.tensor([float(n)]), "labels": torch.tensor([1.0])} for n in range(10)]


def run(folder, resume):
    """Steps that the run says it has done, and batches that its model saw."""
    config = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = Line()
    trainer = Trainer(model, config, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step, model.batches


with tempfile.TemporaryDirectory() as folder:
    first, resumed = run(folder, None), run(folder, f"{folder}/checkpoint-3")
print(f"transformers {transformers.__version__}: (step, batches seen) first {first}, resumed {resumed}")
assert first == (3, 3)
assert resumed == (4, 1), "a finished run stays finished now"
PY
