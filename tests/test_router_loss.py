"""Mixtures of experts train with their load balancing, as TRL's trainers do: the model's own loss, packed or not."""

import pytest
import torch
from test_two_pass import gradients_of
from tiny import ALPHABET, char_tokenizer
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sysdag import Input, PlanError, System, node
from sysdag.components import CausalLM
from sysdag.data import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions

SIZES = dict(
    vocab_size=len(ALPHABET) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, num_experts_per_tok=2, max_position_embeddings=64, router_aux_loss_coef=0.5,
    pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
MODELS = {
    "mixtral": lambda **o: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES, **o)),
    "qwen3_moe": lambda **o: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1, **SIZES, **o)
    ),
    "gpt_oss": lambda **o: GptOssForCausalLM(GptOssConfig(num_local_experts=4, **SIZES, **o)),
}
ROWS = [
    {"prompt": "ab ab", "chosen": "cd", "rejected": "efghi"},
    {"prompt": "abc", "chosen": "d", "rejected": "de"},
]


def made(kind, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind](**options)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def system_model(model, engine="two_pass", pack=True, tokens=8192):
    component = CausalLM(model, char_tokenizer(), pack_prefixes=pack)

    @node(component)
    def answer(prompt):
        return prompt

    plan = System(Input("prompt") >> answer).compile()
    options = EngineOptions(engine=engine, micro_batch_tokens=tokens)
    return SystemModel(plan, ObjectiveOptions(), engine=options), encode_pairs(plan, ROWS, "direct"), component


def own_loss(model, component, pairs):
    """transformers' own, of all sequences in rows of their own."""
    rows = [
        prompt + completion
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
        for prompt, completion in component._sequences([pair.inputs["prompt"]], [side["answer"]])
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


@pytest.mark.parametrize("returns_logits", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_the_models_own_packed_or_not(kind, pack, returns_logits):
    model, pairs, component = system_model(made(kind, output_router_logits=returns_logits), pack=pack)
    output = model(pairs, torch.Generator().manual_seed(0), None)
    expected = float(own_loss(component.module, component, pairs).detach())
    assert output.metrics["nodes/answer/aux_loss"].mean() == pytest.approx(expected, rel=1e-5)
    plain, _, _ = system_model(without(made(kind)), pack=pack)
    before = plain(pairs, torch.Generator().manual_seed(0), None)
    assert "nodes/answer/aux_loss" not in before.metrics
    assert float(output.loss) == pytest.approx(float(before.loss) + 0.5 * expected, rel=1e-5)
    if kind != "gpt_oss":
        assert component._scorer._packs is pack


def without(model):
    model.config.router_aux_loss_coef = 0.0
    return model


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_its_gradient_is_added_to_that_of_the_preferences(engine):
    model, pairs, component = system_model(made("mixtral"), engine)
    _, found = gradients_of(model, pairs)
    plain, _, _ = system_model(without(made("mixtral")), engine)
    _, preferences = gradients_of(plain, pairs)
    alone = made("mixtral")
    loss = 0.5 * own_loss(alone, component, pairs)
    loss.backward()
    balancing = {name: parameter.grad for name, parameter in alone.named_parameters()}
    assert any(grad is not None and grad.abs().max() > 1e-4 for grad in balancing.values())
    for name, grad in found.items():
        extra = balancing[name.removeprefix("policies.answer.")]
        if grad is None:
            assert extra is None
            continue
        expected = preferences[name] + (0 if extra is None else extra)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_share_it_by_their_elements():
    whole, pairs, _ = system_model(made("mixtral"))
    parts, _, _ = system_model(made("mixtral"), tokens=8)
    found = parts(pairs, torch.Generator().manual_seed(0), None)
    assert len(found.turns) > 1
    assert sum(turn.auxiliary for turn in found.turns) == pytest.approx(1)
    with torch.no_grad():
        mean = parts(pairs, torch.Generator().manual_seed(0), None).metrics["nodes/answer/aux_loss"].mean()
    assert found.metrics["nodes/answer/aux_loss"].mean() == pytest.approx(mean)
    assert whole(pairs, torch.Generator().manual_seed(0), None).metrics["nodes/answer/aux_loss"].mean() != mean


def test_a_model_whose_balancing_is_not_known_is_refused_by_name(monkeypatch):
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    model, pairs, _ = system_model(made("mixtral"))
    with pytest.raises(PlanError, match=r"MixtralForCausalLM has router_aux_loss_coef=0.5.*router_aux_loss_coef': 0.0"):
        model(pairs, torch.Generator().manual_seed(0), None)
