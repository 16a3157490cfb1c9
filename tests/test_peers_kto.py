"""Trainings on single runs with a label beside TRL's KTOTrainer, and rows with images in one batch."""

import pytest
from datasets import Dataset
from test_peers_trl import SHARED, logs_of, take_start
from test_trl_losses import COMMON, compare_gradients, lora, moved_beside
from test_trl_vision import ROWS
from tiny import char_tokenizer, llama
from tiny_vision import build
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl import KTOConfig, KTOTrainer

from sysdag import Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM, ImageTextToText

RUNS = [
    {"prompt": "ab c", "completion": "yes", "label": True},
    {"prompt": "d", "completion": "no no", "label": False},
    {"prompt": "ef", "completion": "a longer answer", "label": True},
    {"prompt": "x yz", "completion": "f", "label": False},
    {"prompt": "q", "completion": "rs t", "label": True},
    {"prompt": "w", "completion": "1 2", "label": True},
]
SAME = ["loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins"]


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "kto"},
        {"loss_type": "apo_zero_unpaired"},
        {"loss_type": "kto", "desirable_weight": 0.5, "undesirable_weight": 1.5, "precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_a_training_on_single_runs_is_trls(tmp_path, peft_config, options):
    llama().save_pretrained(tmp_path / "model")
    shared = SHARED | {"per_device_train_batch_size": 3, "learning_rate": 1e-2} | options
    data = Dataset.from_list(RUNS)
    theirs = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=KTOConfig(output_dir=str(tmp_path / "theirs"), max_length=None, **shared),
        train_dataset=data, eval_dataset=data, processing_class=char_tokenizer(), peft_config=peft_config,
    )  # fmt: skip

    @node(CausalLM(llama(), char_tokenizer(), peft_config=peft_config))
    def answer(question):
        return question

    args = SysDPOConfig(output_dir=str(tmp_path / "ours"), **shared)
    ours = SysDPOTrainer(System(Input("question") >> answer), args, train_dataset=data, eval_dataset=data)
    take_start(ours, theirs)
    wanted, found = logs_of(theirs), logs_of(ours)
    same = {*SAME, *["kl"] * (options["loss_type"] == "kto")}
    for step, (their, our) in enumerate(zip(wanted, found, strict=True)):
        both = same & their.keys()
        assert both == same & our.keys()
        for name in both:
            assert our[name] == pytest.approx(their[name], rel=2e-4, abs=2e-4), (step, name)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_runs_with_images_have_trls_loss_and_gradients(loss_type, tmp_path):
    model, processor = build("qwen2_vl")
    model.save_pretrained(tmp_path / "model")
    labels = [True, False, True]
    told = [
        {
            "images": row["images"],
            "prompt": [{"role": "user", "content": row["text"]}],
            "completion": [{"role": "assistant", "content": row["chosen"]}],
            "label": label,
        }
        for row, label in zip(ROWS, labels, strict=True)
    ]
    options = COMMON | {"per_device_train_batch_size": len(ROWS)}
    theirs = KTOTrainer(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model"), processing_class=processor,
        args=KTOConfig(output_dir=str(tmp_path), loss_type=loss_type, **options), train_dataset=Dataset.from_list(told),
    )  # fmt: skip

    @node(ImageTextToText(model, processor))
    def answer(images, text):
        parts = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    runs = [
        {"images": row["images"], "text": row["text"], "completion": row["chosen"], "label": label}
        for row, label in zip(ROWS, labels, strict=True)
    ]
    system = System((Input("images") & Input("text")) >> answer)
    ours, moved = moved_beside(theirs.model, system, runs, tmp_path, loss_type=loss_type)
    theirs.model.train()
    batch = theirs._prepare_inputs(theirs.data_collator([theirs.train_dataset[i] for i in range(len(ROWS))]))
    told = {name: pair for name, pair in moved.items() if not name.endswith("k_proj.bias")}  # as in test_trl_vision
    compare_gradients(theirs.compute_loss(theirs.model, batch), ours, told)
