"""Base models: tiny, trained here from scratch, saved in the formats of transformers and diffusers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def word_tokenizer(words: Sequence[str], max_length: int, end_captions: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; `end_captions` appends the end token, as a text encoder's tokenizer does."""
    tokenizer = _tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end_captions:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
        )
    return _wrap(tokenizer, max_length)


def letter_tokenizer(letters: str, max_length: int) -> PreTrainedTokenizerFast:
    """One token a character."""
    tokenizer = _tokenizer(list(letters))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, max_length)


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([PAD, END, UNKNOWN, *words]))}
    return Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))


def _wrap(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=max_length
    )


def train_language_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    demonstrate: Callable[[random.Random], tuple[str, str]],
    *,
    seed: int,
    steps: int,
    width: int = 64,
    layers: int = 2,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
    device: str = "cpu",
) -> None:
    """Trains a small Llama on fresh (prompt, completion) demonstrations and saves it with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64), max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.8 / width**0.5, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train().to(device)
    rng = random.Random(f"demonstrations-{seed}")

    def loss() -> torch.Tensor:
        examples = _demonstrations(tokenizer, [demonstrate(rng) for _ in range(batch_size)])
        ids, labels = (part.to(device) for part in examples)
        return model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss

    fit(model.parameters(), loss, steps, learning_rate)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _demonstrations(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; prompt and completion are tokenised apart, the completion ends with `</s>`."""
    prompts = tokenizer([prompt for prompt, _ in examples], add_special_tokens=False)["input_ids"]
    completions = tokenizer([completion for _, completion in examples], add_special_tokens=False)["input_ids"]
    rows = [
        [*prompt, *completion, tokenizer.eos_token_id] for prompt, completion in zip(prompts, completions, strict=True)
    ]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(prompt) : len(tokens)] = torch.tensor(tokens[len(prompt) :])
    return ids, labels


def train_autoencoder(
    folder: Path, draw: Callable[[random.Random], torch.Tensor], *, channels: Sequence[int], seed: int, steps: int
) -> None:
    """Trains a small autoencoder on pictures and saves it; its latents have 4 channels, half the side for each of
    `channels` but the first, and one standard deviation."""
    torch.manual_seed(seed)
    rng = random.Random(f"pictures-{seed}")
    depth, side, _ = draw(random.Random(0)).shape
    model = AutoencoderKL(
        in_channels=depth, out_channels=depth, latent_channels=4, sample_size=side, block_out_channels=tuple(channels),
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
    ).train()  # fmt: skip

    def pictures() -> torch.Tensor:
        return torch.stack([draw(rng) for _ in range(64)])

    def loss() -> torch.Tensor:
        clean = pictures()
        latents = model.encode(clean).latent_dist
        drawn = model.decode(latents.sample()).sample
        return nn.functional.mse_loss(drawn, clean) + 1e-4 * latents.kl().mean() / latents.mean[0].numel()

    fit(model.parameters(), loss, steps, learning_rate=3e-3)
    model.eval()
    with torch.no_grad():
        spread = model.encode(pictures()).latent_dist.mean.std()
    model.register_to_config(scaling_factor=1 / float(spread))
    model.save_pretrained(folder)


def train_diffusion_model(
    folder: Path,
    words: Sequence[str],
    illustrate: Callable[[str, random.Random], torch.Tensor],
    *,
    channels: Sequence[int],
    seed: int,
    steps: int,
    batch_size: int = 128,
    autoencoder: Path | None = None,
) -> None:
    """Trains a small UNet and its text encoder on captioned pictures and saves them as a diffusers pipeline's folders.

    Args:
        words: the captions, one word each; the caption is all that the model is told of a picture.
        illustrate: draws a picture (C, side, side) in [-1, 1] under a word.
        channels: of the UNet's blocks, one resolution each; the deepest one looks at the caption.
        autoencoder: folder of the one whose latents the UNet works on; without one it works on pixels.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"captions-{seed}")
    tokenizer = word_tokenizer(words, max_length=4, end_captions=True)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=32,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    ).train()  # fmt: skip
    vae = None if autoencoder is None else AutoencoderKL.from_pretrained(autoencoder)

    def encoded(pictures: torch.Tensor) -> torch.Tensor:
        if vae is None:
            return pictures
        with torch.no_grad():
            return vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor

    _, depth, side, _ = encoded(illustrate(words[0], random.Random(0))[None]).shape
    plain = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=depth, out_channels=depth, block_out_channels=tuple(channels),
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
    ).train()  # fmt: skip
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=vae is None,  # pixels lie in [-1, 1], latents anywhere
    )

    def loss() -> torch.Tensor:
        captions = [rng.choice(words) for _ in range(batch_size)]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        clean = encoded(torch.stack([illustrate(word, rng) for word in captions]))
        noise = torch.randn_like(clean)
        times = torch.randint(scheduler.config.num_train_timesteps, (batch_size,))
        predicted = unet(scheduler.add_noise(clean, noise, times), times, encoder(ids).last_hidden_state).sample
        return nn.functional.mse_loss(predicted, scheduler.get_velocity(clean, noise, times))

    fit([*unet.parameters(), *encoder.parameters()], loss, steps, learning_rate=2e-3)
    unet.eval().save_pretrained(folder / "unet")
    encoder.eval().save_pretrained(folder / "text_encoder")
    if vae is not None:
        vae.save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")


def fit(parameters: Iterable[nn.Parameter], loss: Callable[[], torch.Tensor], steps: int, learning_rate: float) -> None:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 4) == 0:
            print(f"    step {step:4d} of {steps}  loss {value.item():.3f}", flush=True)
