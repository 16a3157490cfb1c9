import logging

import pytest
import torch
from decoder_families import tiny_decoder
from peft import LoraConfig, get_peft_model
from tiny import char_tokenizer, llama
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig

from sysdag.components import CausalLM
from sysdag.components.language import language_head

PROMPTS = ["ab", "a longer prompt than that", "z?"]
SIZES = dict(
    vocab_size=45, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def made(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model.eval()


def lora(model, *targets):
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(model, config).eval()


MODELS = {
    "llama": lambda: llama(),
    "tied": lambda: llama(tie_word_embeddings=True),
    "gemma2": lambda: made(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "cohere": lambda: made(CohereConfig(**SIZES, logit_scale=0.0625)),
    "granite": lambda: made(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "gpt2": lambda: made(GPT2Config(vocab_size=45, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None)),
    "gemma4": lambda: tiny_decoder("gemma4_text"),  # leaves out hidden states, too, where logits_to_keep is a number
    "lora": lambda: lora(llama(), "q_proj", "v_proj"),
}


def by_hand(model, prompts, completions):
    totals = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
        totals.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(totals)


def scored(lm):
    draws = lm.in_context(PROMPTS, lm.observe(["x1", "", "some more text"]))
    completions = [draw.record["token_ids"] for draw in draws]
    return lm.log_prob(PROMPTS, draws), by_hand(lm.module, lm.prompt_ids(PROMPTS), completions)


def gradients(result, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(result @ torch.tensor([1.0, -2.0, 0.5]), trained)


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_without_logits(name, monkeypatch, caplog):
    lm = CausalLM(MODELS[name](), char_tokenizer())
    widths = []
    real = language_head.linear_logprob
    monkeypatch.setattr(language_head, "linear_logprob", lambda h, *a, **k: widths.append(len(h)) or real(h, *a, **k))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result, expected = scored(lm)
            assert torch.allclose(result, expected, rtol=1e-5, atol=1e-4)
            for got, want in zip(gradients(result, lm.module), gradients(expected, lm.module), strict=True):
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))
    assert len(widths) == 2, "the hidden states were scored"
    assert "full logits" not in caplog.text


def test_a_scale_that_divides_is_told_from_one_that_multiplies():
    (scale,) = {head.scale for head in chosen_heads(made(GraniteConfig(**SIZES, logits_scaling=8.0)))}
    assert scale == 1 / 8
    (head,) = chosen_heads(MODELS["gemma2"]())
    assert head.softcap == 2.0


def chosen_heads(model):
    lm = CausalLM(model, char_tokenizer())
    scored(lm)
    return lm._scorer._tokens._candidates[:1]


def test_gradient_checkpointing_and_adapters_together():
    model = lora(llama(), "q_proj", "v_proj")
    model.enable_input_require_grads()
    plain = gradients(scored(CausalLM(model, char_tokenizer()))[0], model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = gradients(scored(CausalLM(model, char_tokenizer()))[0], model)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, again, strict=True))


def unusual_scale():
    model = llama()
    forward = model.forward

    def scaled(*arguments, logits_to_keep=0, **options):
        output = forward(*arguments, logits_to_keep=logits_to_keep, **options)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    return model


def hooked(method):
    model = llama()
    getattr(model.lm_head, method)(lambda module, given, *output: output[0] * 0.5 if output else (given[0] * 0.5,))
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: hooked("register_forward_hook"), "not its output embedding applied to the last hidden state"),
        (lambda: hooked("register_forward_pre_hook"), "not its output embedding applied to the last hidden state"),
        (unusual_scale, "not its output embedding applied to the last hidden state"),
        (lambda: lora(llama(), "q_proj", "lm_head"), "not a plain nn.Linear"),
    ],
)
def test_other_heads_are_scored_through_their_logits_and_said_once(model, reason, caplog):
    lm = CausalLM(model(), char_tokenizer())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result, expected = scored(lm)
            assert torch.allclose(result, expected, atol=1e-4)
    assert [record.levelname for record in caplog.records if "full logits" in record.message] == ["WARNING"]
    assert reason in caplog.text


def test_an_adapter_put_on_the_head_later_is_seen():
    model = llama()
    lm = CausalLM(model, char_tokenizer())
    scored(lm)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    result, expected = scored(lm)
    assert torch.allclose(result, expected, atol=1e-4)


def test_a_hook_put_on_the_head_later_is_seen_and_its_end_too():
    model = llama()
    lm = CausalLM(model, char_tokenizer())
    plain, _ = scored(lm)
    handle = model.lm_head.register_forward_hook(lambda module, given, output: output * 0.5)
    result, expected = scored(lm)
    assert torch.allclose(result, expected, atol=1e-4)
    assert not torch.allclose(result, plain, atol=1e-2)
    handle.remove()
    assert torch.allclose(scored(lm)[0], plain, atol=1e-4)


def test_under_autocast_the_head_runs_in_the_same_dtype():
    lm = CausalLM(llama(), char_tokenizer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, expected = scored(lm)
    assert torch.allclose(inside, expected, rtol=2e-2, atol=1.0)
    forward = lm.module.forward

    def autocasting(*arguments, logits_to_keep=0, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*arguments, logits_to_keep=logits_to_keep, **options)

    lm.module.forward = autocasting
    assert torch.equal(scored(lm)[0], inside)
