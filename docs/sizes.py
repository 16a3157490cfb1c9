"""Writes sizes.md: which system fits on which GPU, by `Plan.estimate`, from the configs of public models.

python docs/sizes.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from sysdag import Input, Plan, System, node
from sysdag.components import CausalLM, Diffusion

PAGE = Path(__file__).with_name("sizes.md")
GPUS = (24, 40, 80, 141)  # GB, as they are sold
ROOM = 0.9  # of a GPU's memory that a training may take by estimate
WAYS: dict[str, dict[str, Any]] = {
    "one pass": {"engine": "one_pass"},
    "two passes": {},
    "and `gradient_checkpointing`": {"gradient_checkpointing": True},
    "and `offload_idle`": {"gradient_checkpointing": True, "offload_idle": True},
}
CONFIGS = {
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
UNET: dict[str, Any] = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    cross_attention_dim=768, attention_head_dim=8,
)  # fmt: skip
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
ENCODER = CLIPTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<pad>", model_max_length=77,
    )  # fmt: skip


def language_model(name: str, lora: bool, folder: Path) -> CausalLM:
    CONFIGS[name].dtype = torch.bfloat16
    CONFIGS[name].save_pretrained(folder / name)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    return CausalLM(folder / name, tokenizer(), peft_config=adapter)


def stable_diffusion(lora: bool) -> Diffusion:
    with torch.device("meta"):
        unet, vae, encoder = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), CLIPTextModel(ENCODER)
    parts: list[Any] = [torch.nn.Module.to(part, torch.bfloat16) for part in (unet, vae, encoder)]
    adapter = LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]) if lora else None
    return Diffusion(
        parts[0], scheduler=DDPMScheduler(), vae=parts[1], text_encoder=parts[2], tokenizer=tokenizer(),
        peft_config=adapter,
    )  # fmt: skip


def single(name: str) -> Callable[[bool, Path], Plan]:
    def build(lora: bool, folder: Path) -> Plan:
        @node(language_model(name, lora, folder))
        def answer(question: str) -> str:
            return question

        return System(Input("question") >> answer).compile()

    return build


def draft_and_refine(name: str) -> Callable[[bool, Path], Plan]:
    def build(lora: bool, folder: Path) -> Plan:
        @node(language_model(name, lora, folder))
        def draft(question: str) -> str:
            return question

        @node(language_model(name, lora, folder))
        def answer(question: str, draft: str) -> str:
            return question + draft

        question = Input("question")
        return System(question >> draft, (question & draft) >> answer).compile()

    return build


def caption_and_paint(name: str) -> Callable[[bool, Path], Plan]:
    def build(lora: bool, folder: Path) -> Plan:
        @node(language_model(name, lora, folder))
        def caption(idea: str) -> str:
            return idea

        @node(stable_diffusion(lora))
        def image(caption: str) -> str:
            return caption

        return System(Input("idea") >> caption >> image).compile()

    return build


LENGTHS = {"draft": (512, 256), "answer": (768, 256, 512), "caption": (512, 77)}
SAMPLING = {"objective": "sampling", "num_candidates": 4, "pairs": 2}
SYSTEMS: dict[str, tuple[Callable[[bool, Path], Plan], dict[str, Any]]] = {
    "One LLM, Qwen2.5-7B": (single("Qwen2.5-7B"), {"pairs": 8}),
    "draft → refine, two Qwen2.5-0.5B": (draft_and_refine("Qwen2.5-0.5B"), SAMPLING),
    "draft → refine, two Llama-3.1-8B": (draft_and_refine("Llama-3.1-8B"), SAMPLING),
    "caption → paint, Qwen2.5-0.5B and Stable Diffusion 1.5": (caption_and_paint("Qwen2.5-0.5B"), {"pairs": 8}),
    "caption → paint, Qwen2.5-7B and Stable Diffusion 1.5": (caption_and_paint("Qwen2.5-7B"), {"pairs": 8}),
}

INTRODUCTION = """# Which system fits on which GPU

Estimates by `plan.estimate(...)`, which builds every model of fake tensors from its config, scores one micro-batch
on it and counts what is kept; nothing is downloaded. On a CPU, and for two LLMs of 0.5 billion parameters on an H200,
the estimates of a step are within 15 % of measured peaks (`tests/test_estimate.py` measures them). **None of the
systems below has been run**, and the kernels assumed are those of the machine that wrote this page, a CPU.

Checkpoints in bf16, computed in bf16 (`bf16=True`); what trains, adapters or full models with their references, is
fp32, with AdamW's two averages. LoRA of rank 16 on all linear layers of an LLM and on the attention of the UNet; two
adapters on one base load it once. Prompts of 512 tokens, completions of 256 (captions 77), images of 512 by 512;
micro-batches of 8192 tokens. One LLM and caption → paint: Direct, 8 pairs a step. draft → refine: Sampling, k = 4, 2
pairs a step. A cell is the estimate and the smallest of {gpus} GB GPUs of which it takes at most {room:.0%}. The ways
add up from left to right.

Made by `python docs/sizes.py`; the shapes are those of the models' published configs on the Hugging Face Hub.
"""


def lines() -> Iterator[str]:
    yield INTRODUCTION.format(gpus=", ".join(map(str, GPUS)), room=ROOM)
    for title in SYSTEMS:
        yield from table(title)


def table(title: str) -> Iterator[str]:
    """A system's: full training and LoRA, every way of computing a step."""
    build, options = SYSTEMS[title]
    yield f"## {title}\n"
    yield f"| trained | {' | '.join(WAYS)} |"
    yield f"|---|{'---:|' * len(WAYS)}"
    with tempfile.TemporaryDirectory() as folder:
        for trained, lora in (("LoRA", True), ("full", False)):
            plan = build(lora, Path(folder))
            lengths = {"answer": (512, 256)} if title.startswith("One") else LENGTHS
            needed = {name: lengths[name] for name in plan.random_nodes if name in lengths}
            totals = [plan.estimate(needed, device="cpu", bf16=True, **options, **way).total for way in WAYS.values()]
            yield f"| {trained} | {' | '.join(map(_cell, totals))} |"
    yield ""


def _cell(total: int) -> str:
    fitting = next((f"{gpu} GB" for gpu in GPUS if total <= ROOM * gpu * 1e9), "more than one GPU")
    return f"{total / 2**30:.1f} GiB: {fitting}"


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()), encoding="utf-8")
