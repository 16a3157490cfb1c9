"""One-node systems with images against TRL's DPOTrainer on the same pairs: loss and gradients."""

import pytest
from datasets import Dataset
from test_trl_losses import COMMON, compare_gradients, lora, moved_beside
from tiny_vision import FAMILIES, build, picture
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer

from sysdag import Input, System, node
from sysdag.components import ImageTextToText

# TRL's collator takes what the processor makes of a batch; rows without an image are beside it in
# test_image_text_to_text.py, since not all processors take those in a batch with others.
ROWS = [
    {"images": [picture(0)], "text": "a red cube", "chosen": "white room", "rejected": "dark"},
    {"images": [picture(1, 20, 50), picture(2, 16, 16)], "text": "two", "chosen": "old", "rejected": "friend of mine"},
    {"images": [picture(0)], "text": "a red cube", "chosen": "black", "rejected": "two black words"},
]


@pytest.mark.parametrize("tuned", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_with_images_equals_trls_dpo_trainer(family, tuned, tmp_path):
    peft_config = lora() if tuned == "lora" else None
    model, processor = build(family)
    model.save_pretrained(tmp_path / "model")
    told = [
        {
            "images": row["images"],
            "prompt": [{"role": "user", "content": row["text"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    options = COMMON | {"per_device_train_batch_size": len(ROWS)}
    theirs = DPOTrainer(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model"), processing_class=processor,
        args=DPOConfig(output_dir=str(tmp_path), **options), train_dataset=Dataset.from_list(told),
        peft_config=peft_config,
    )  # fmt: skip

    @node(ImageTextToText(model, processor, peft_config=peft_config))
    def answer(images, text):
        parts = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    ours, moved = moved_beside(theirs.model, System((Input("images") & Input("text")) >> answer), ROWS, tmp_path)
    theirs.model.train()
    batch = theirs._prepare_inputs(theirs.data_collator([theirs.train_dataset[i] for i in range(len(ROWS))]))
    # A key's bias adds the same to all scores of a query, so its gradient is rounding alone.
    told = {name: pair for name, pair in moved.items() if not name.endswith("k_proj.bias")}
    compare_gradients(theirs.compute_loss(theirs.model, batch), ours, told)
