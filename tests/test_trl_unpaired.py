"""Unpaired losses and gradients of one-node systems against TRL's KTOTrainer, on one batch, away from step 0."""

import pytest
import torch
from datasets import Dataset
from test_trl_losses import COMMON, compare_gradients, lora, ours_beside
from tiny import char_tokenizer, llama
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from sysdag.objectives.options import ObjectiveOptions

RUNS = [
    {"prompt": "ab c", "completion": "yes", "label": True},
    {"prompt": "d", "completion": "", "label": False},
    {"prompt": "d", "completion": "a longer answer", "label": True},
    {"prompt": "x yz", "completion": "no", "label": False},
    {"prompt": "ef", "completion": "none", "label": True},
]
WEIGHTS = [{}, {"desirable_weight": 0.7, "undesirable_weight": 1.9}]


@pytest.fixture(scope="module", params=["full", "lora"])
def kto(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kto")
    peft_config = lora() if request.param == "lora" else None
    llama().save_pretrained(folder / "model")
    theirs = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=KTOConfig(output_dir=str(folder), **COMMON | {"per_device_train_batch_size": len(RUNS)}),
        train_dataset=Dataset.from_list(RUNS),
        processing_class=char_tokenizer(),
        peft_config=peft_config,
    )
    ours, moved = ours_beside(theirs.model, peft_config, folder, RUNS, loss_type="kto")
    theirs.model.train()
    ours.start = {name: parameter.detach().clone() for name, (parameter, _) in moved.items()}
    return theirs, ours, moved


def moved_until(theirs, ours, moved, batch, *, is_positive):
    """Moves both away from the start alike, to where TRL's own KL estimate is above 0, or is clamped to it."""
    starts = {name: value.clone() for name, value in ours.start.items()}
    for seed in range(30):
        for place, (name, (parameter, same)) in enumerate(moved.items()):
            torch.manual_seed(1000 * seed + place)
            with torch.no_grad():
                parameter.copy_(starts[name] + 0.05 * torch.randn_like(parameter))
                same.copy_(parameter)
        theirs._metrics["train"].clear()
        with torch.no_grad():
            theirs.compute_loss(theirs.model, batch)
        if (theirs._metrics["train"]["kl"] > [0.0]) == is_positive:
            theirs._metrics["train"].clear()
            return
    pytest.fail("no such place was found")


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("name", "is_positive"), [("kto", True), ("kto", False), ("apo_zero_unpaired", True)])
def test_a_one_node_system_equals_trls_kto_trainer(kto, name, weights, is_positive):
    theirs, ours, moved = kto
    theirs.loss_type, theirs.calculate_KL = "kto", True
    batch = theirs._prepare_inputs(theirs.data_collator([theirs.train_dataset[i] for i in range(len(RUNS))]))
    moved_until(theirs, ours, moved, batch, is_positive=is_positive)
    theirs.loss_type, theirs.calculate_KL = name, name == "kto"
    theirs.desirable_weight = weights.get("desirable_weight", 1.0)
    theirs.undesirable_weight = weights.get("undesirable_weight", 1.0)
    ours.model.options = ObjectiveOptions(beta=COMMON["beta"], loss_type=(name,), **weights)
    output = compare_gradients(theirs.compute_loss(theirs.model, batch), ours, moved)
    logged = theirs._metrics["train"]
    names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", *["kl"] * (name == "kto")]
    for key in names:
        assert [float(output.metrics[key].nanmean())] == pytest.approx(logged[key], rel=1e-5, abs=1e-5), key
    if name == "kto":
        assert (logged["kl"] > [0.0]) == is_positive
