"""Training steps of diffusion nodes: the winner's safeguard, references that move, betas on the scale of the scores."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from test_diffusion_training import painter, rows
from tiny import char_tokenizer, llama
from tiny_diffusion import LORA, Diffusion, T, drift, from_text, seed
from tiny_pipelines import CALL, PIPELINES
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner

from sysdag import Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.cli import app
from sysdag.components import CausalLM
from sysdag.data import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.safeguard import loser_scales
from sysdag.engine.step import SystemModel
from sysdag.errors import PlanError
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions
from sysdag.training.scales import beyond_scale

BETA = 0.002


def published_scale(prediction, target, mu):
    """Of one pair, winner before loser: from (-grad A + lambda grad B) . grad A <= -mu |grad A|^2, by the outputs."""
    answers = [each.detach().requires_grad_() for each in prediction]
    errors = [(answer - wanted).square().mean() for answer, wanted in zip(answers, target, strict=True)]
    ours, theirs = (torch.autograd.grad(error, answer)[0] for error, answer in zip(errors, answers, strict=True))
    product = (ours * theirs).sum()
    return ((1 - mu) * ours.square().sum() / product).clamp(0, 1) if product > 0 else torch.ones(())


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize(("mu", "loss_type"), [(0.9, "sigmoid"), (0.3, "sigmoid"), (1.0, "hinge")])
def test_the_losers_gradient_is_scaled_as_published(engine, mu, loss_type):
    count = 4
    component = from_text(convention="diffusion-dpo", winner_safeguard=mu)
    plan = painter(component).compile()
    options = ObjectiveOptions(beta=3.0, loss_type=(loss_type,))
    model = SystemModel(plan, options, engine=EngineOptions(engine=engine, micro_batch_tokens=192))
    pairs = encode_pairs(plan, rows(count), "direct")
    drift(component.module["denoiser"], size=0.02)
    output = model(pairs, seed(5))
    accumulate_gradients(model, output)
    parameters = list(component.module["denoiser"].parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]

    plain, frozen = component, model.references["image"]
    (term,) = model.compare(pairs, seed(5), None).terms
    texts = [pair.inputs["prompt"] for pair in pairs]
    sides = [[getattr(pair, side)["image"] for pair in pairs] for side in ("chosen", "rejected")]
    noise = term.noise.select(range(count))
    errors, residuals, references = [], [], []
    process = component.forward_process
    for draws in sides:
        latents = torch.stack([torch.as_tensor(draw.record["latents"]) for draw in draws])
        noisy = process.corrupt(latents, noise.timesteps, noise.eps)
        states = plain._sampler.conditioner(texts)
        answer = component.module["denoiser"](noisy, noise.timesteps, **states).sample
        residuals.append((answer.detach(), noise.eps))
        errors.append((answer - noise.eps).square().mean(dim=(1, 2, 3)))
        with torch.no_grad():
            other = frozen.module["denoiser"](noisy, noise.timesteps, **states).sample
        references.append((other - noise.eps).square().mean(dim=(1, 2, 3)))
    scales = torch.stack([
        published_scale([side[0][place] for side in residuals], [side[1][place] for side in residuals], mu)
        for place in range(count)
    ])  # fmt: skip
    loser = errors[1].detach() + scales * (errors[1] - errors[1].detach())
    margin = -0.5 * 3.0 * ((errors[0] - loser) - (references[0] - references[1]))
    loss = (-logsigmoid(margin) if loss_type == "sigmoid" else torch.relu(1 - margin)).mean()
    expected = torch.autograd.grad(loss, parameters)

    assert scales.min() < 0.9
    torch.testing.assert_close(output.metrics["nodes/image/loser_scale"], scales, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss.detach(), loss.detach(), rtol=1e-5, atol=1e-6)
    largest = max(each.abs().max() for each in expected)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest.item())


def test_residuals_are_the_gradients_of_the_error_at_every_time(monkeypatch):
    def weighting(snr):
        return 1 / (1 + snr)

    component = from_text(num_noise_draws=3, weighting=weighting, winner_safeguard=0.9)
    draws = component.observe([row["chosen"] for row in rows(2)])
    noise = component.noise(draws, seed(0))
    answers = []
    predict = type(component.pipeline).predict

    def kept(pipeline, *arguments):
        answers.append(predict(pipeline, *arguments))
        return answers[-1]

    monkeypatch.setattr(type(component.pipeline), "predict", kept)
    error = -component.score(["dark", "light"], draws, noise).sum()
    (gradient,) = torch.autograd.grad(error, answers[0])
    taken = torch.stack(component.take_residuals())
    torch.testing.assert_close(gradient.reshape(2, 3, 1, 8, 8), 2 * T / 3 * taken, rtol=1e-4, atol=1e-4)
    assert component.take_residuals() is None


def test_without_a_safeguard_nothing_is_scaled():
    plan = painter(from_text()).compile()
    model = SystemModel(plan, ObjectiveOptions(beta=BETA))
    assert "nodes/image/loser_scale" not in model(encode_pairs(plan, rows(2), "direct"), seed(0)).metrics


def test_scales_of_lists_of_draws_and_of_losses_that_trade_nothing():
    winner, loser = torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 1.0]])
    both = torch.tensor([-0.5, 0.5])
    assert loser_scales("n", {0: [winner], 1: [loser]}, both, 0.0) == pytest.approx([0.25])
    assert loser_scales("n", {0: [winner], 1: [loser]}, both, 0.5) == pytest.approx([0.125])
    assert loser_scales("n", {0: [winner], 1: [-loser]}, both, 0.5) == pytest.approx([1.0])
    # Two draws a side: products and squares add up; a winner's draw without a partner has a square alone.
    assert loser_scales("n", {0: [winner, 2 * winner], 1: [loser, loser]}, both, 0.0) == pytest.approx([5 / 12])
    assert loser_scales("n", {0: [winner, 2 * winner], 1: [loser]}, both, 0.0) == pytest.approx([1.0])
    # Weights of the two errors that differ, as with a loss that adds the winner's own.
    assert loser_scales("n", {0: [winner], 1: [loser]}, torch.tensor([-1.0, 0.5]), 0.0) == pytest.approx([0.5])
    assert loser_scales("n", {0: [winner], 1: [loser]}, torch.tensor([0.5, -0.5]), 0.0) == pytest.approx([1.0])
    with pytest.raises(PlanError, match="Node 'n': winner_safeguard compares samples of one shape, but pair 0"):
        loser_scales("n", {0: [winner], 1: [loser.T]}, both, 0.0)


# References that move


@pytest.mark.parametrize("kind", ["full", "lora", "trained lora", "language lora", "pipeline lora"])
def test_references_move_by_the_formula(kind, tmp_path):
    if kind == "language lora":
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        component = CausalLM(llama(), char_tokenizer(), peft_config=config)
    elif kind == "pipeline lora":
        component = Diffusion(
            PIPELINES["sd15"](), num_inference_steps=2, pipeline_kwargs=CALL.get("sd15", {}),
            convention="diffusion-dpo", peft_config=LoraConfig(r=2),
        )  # fmt: skip
    else:
        component = from_text(peft_config=None if kind == "full" else LoraConfig(**LORA), convention="diffusion-dpo")
    if kind == "trained lora":
        drift(component.module["denoiser"], size=0.05)
    data = rows(4)
    if kind == "language lora":
        data = [{"prompt": "ab", "chosen": "cd" * (row + 1), "rejected": "dc" * (row + 1)} for row in range(4)]
    elif kind == "pipeline lora":
        drawn = [draw.value for draw in component.sample(["dark"] * 8, generator=seed(0))]
        data = [{**row, "chosen": drawn[place], "rejected": drawn[place + 4]} for place, row in enumerate(data)]
    args = SysDPOConfig(
        str(tmp_path), objective="direct", beta=20.0, learning_rate=0.05, max_steps=5, optim="sgd", use_cpu=True,
        per_device_train_batch_size=2, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3,
        report_to=[], save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = SysDPOTrainer(painter(component), args, train_dataset=data)
    reference, policy = trainer.model.references["image"], trainer.model.components["image"]
    expected = {name: p.detach().clone() for name, p in reference.own_parameters().items()}
    trained = {name for name, p in policy.own_parameters().items() if p.requires_grad}
    assert trained <= expected.keys()
    assert not any(p.requires_grad for p in reference.own_parameters().values())
    if kind in ("lora", "pipeline lora"):
        assert reference.module["denoiser"] is policy.module["denoiser"]  # and no second base
    moved = []

    class Recorder(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 0:
                for name in trained:
                    expected[name] = 0.3 * policy.own_parameters()[name].detach() + 0.7 * expected[name]
                moved.append(state.global_step)

    trainer.add_callback(Recorder())
    trainer.train()
    assert moved == [2, 4]
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    changed = 0
    for name in trained:
        torch.testing.assert_close(reference.own_parameters()[name], expected[name], rtol=1e-6, atol=1e-7)
        changed += not torch.equal(policy.own_parameters()[name], expected[name])
    assert changed


def test_dropped_captions_cannot_be_scored_beforehand(tmp_path):
    args = SysDPOConfig(str(tmp_path), objective="direct", precompute_ref_log_probs=True, use_cpu=True, report_to=[])
    with pytest.raises(PlanError, match="node 'image' drops captions while it trains.*caption_dropout=0"):
        SysDPOTrainer(painter(from_text(caption_dropout=0.1)), args, train_dataset=rows(2))


# Betas

question = Input("question", str)


def writer_and_painter(component):
    @node(CausalLM(llama(), char_tokenizer()))
    def caption(question):
        return question

    @node(component)
    def image(caption):
        return caption

    return System(question >> caption >> image)


def captioned(count):
    return [
        {
            "question": "ab", "chosen": row["chosen"], "rejected": row["rejected"],
            "chosen_intermediates": {"caption": "ab"}, "rejected_intermediates": {"caption": "ba"},
        }
        for row in rows(count)
    ]  # fmt: skip


N = 64  # of (1, 8, 8)


@pytest.mark.parametrize(
    ("options", "low"),
    [
        ({"convention": "diffusion-dpo"}, 2000.0),
        ({"convention": "diffusers"}, 1000.0),
        ({}, 2000 / (2 * T * N)),
        ({"weighting": lambda snr: torch.full_like(snr, 7.0)}, 2000 / (2 * T * N * 7)),
    ],
)
def test_the_usual_beta_is_the_published_one_on_the_conventions_scale(options, low):
    component = from_text(**options)
    assert component.usual_beta([]) == pytest.approx((low, 2.5 * low))
    assert component._pipeline is None  # nothing was loaded
    draws = component.observe([row["chosen"] for row in rows(2)])
    found = component.usual_beta(draws)
    assert found == pytest.approx((low, 2.5 * low))
    # A margin at that beta is the published code's at 2000.
    noise = component.noise(draws, seed(0))
    published = from_text(convention="diffusion-dpo").score(["dark"] * 2, draws, noise)
    ours = component.score(["dark"] * 2, draws, noise)
    torch.testing.assert_close(found[0] * ours, 2000 * published, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convention", ["sysdpo", "diffusion-dpo"])
def test_a_whole_pipeline_tells_its_usual_beta_before_it_is_loaded(convention, tmp_path):
    pipe = PIPELINES["sd15"]()
    pipe.save_pretrained(tmp_path)
    component = Diffusion(tmp_path, num_inference_steps=2, pipeline_kwargs=CALL.get("sd15", {}), convention=convention)
    drawn = Diffusion(pipe, num_inference_steps=2, pipeline_kwargs=CALL.get("sd15", {})).sample(
        ["dark"], generator=seed(0)
    )
    elements = drawn[0].record["latents"].size
    told = component.usual_beta([type(drawn[0])(drawn[0].value)])
    steps = pipe.scheduler.config.num_train_timesteps
    assert told == pytest.approx(
        [2000 / (2 * steps * elements) * k for k in (1, 2.5)] if convention == "sysdpo" else (2000, 5000)
    )
    assert component._pipeline is None
    assert component.usual_beta(drawn) == pytest.approx(told)


def test_a_film_pipeline_tells_its_usual_beta_by_its_outline():
    pipe = PIPELINES["wan"]()
    component = Diffusion(pipe, num_inference_steps=2, pipeline_kwargs=CALL.get("wan", {}))
    drawn = component.sample(["dark"], generator=seed(0))[0]
    steps, elements = pipe.scheduler.config.num_train_timesteps, drawn.record["latents"].size
    fresh = Diffusion(pipe, num_inference_steps=2, pipeline_kwargs=CALL.get("wan", {}))
    low, high = fresh.usual_beta([type(drawn)(drawn.value)])
    assert (low, high) == pytest.approx((2000 / (2 * steps * elements), 5000 / (2 * steps * elements)))
    assert fresh._pipeline is None


@pytest.mark.parametrize("whole", [False, True])
def test_memory_is_told_whatever_the_options_of_training(whole, tmp_path):
    options = {"caption_dropout": 0.9, "winner_safeguard": 0.9, "timestep_sampling": "logit_normal"}
    if whole:
        PIPELINES["sd15"]().save_pretrained(tmp_path)
        given = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get("sd15", {}), "peft_config": LoraConfig(r=2)}
        plain, other = Diffusion(tmp_path, **given), Diffusion(tmp_path, **given, **options)
    else:
        plain, other = from_text(), from_text(**options)
    asked = {"tokens": 256, "labels": 1, "trains": True, "checkpoints": False, "device": "cpu"}
    found = other.footprint(**asked)
    assert found.graph > 0
    expected = plain.footprint(**asked)
    assert expected.working <= found.working <= 1.2 * expected.working  # what the safeguard compares
    assert replace(found, working=expected.working) == expected
    if not whole:  # no fake tensor is kept
        draws = other.observe([row["chosen"] for row in rows(1)])
        noise = other.noise(draws, seed(0))
        assert torch.isfinite(other.score(["dark"], draws, noise)).all()
        assert torch.isfinite(other.score([""], draws, noise)).all()


@pytest.mark.parametrize(
    ("convention", "nodes", "said"),
    [
        ("diffusion-dpo", {}, r"beta is 0.1, .* trained at 2000 to 5000: so far below.*hardly learns.*'beta': 2000\}"),
        ("sysdpo", {}, None),
        ("sysdpo", {"beta": 100.0}, r"beta is 100.*trained at 0.31 to 0.78: so far above.*alone.*'beta': 0.31\}"),
        ("diffusion-dpo", {"beta": 2000.0}, None),
        ("diffusion-dpo", {"beta": 40_000.0}, None),
        ("diffusion-dpo", {"beta": 1.0, "scale": 100.0}, "beta is 100,.*'beta': 20}"),
        ("diffusion-dpo", {"beta": 1.0, "scale": 2000.0}, None),
        ("diffusion-dpo", {"trainable": False}, None),
    ],
)
def test_a_beta_that_is_far_from_the_scale_is_told_with_the_one_to_set(convention, nodes, said):
    plan = writer_and_painter(from_text(convention=convention)).compile()
    pairs = encode_pairs(plan, captioned(2), "direct")
    options = {"caption": NodeOptions(), "image": NodeOptions(**nodes)}
    found = beyond_scale(plan, pairs, objective="direct", beta=0.1, nodes=options)
    if said is None:
        assert found == []
    else:
        (text,) = found
        assert text.startswith("Node 'image': its beta")
        assert re.search(said, text), text


def test_the_first_step_says_so_once_with_what_was_measured(tmp_path, caplog):
    system = writer_and_painter(from_text(convention="diffusion-dpo"))
    args = SysDPOConfig(
        str(tmp_path), objective="direct", max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        use_cpu=True, report_to=[], save_strategy="no",
    )  # fmt: skip
    caplog.set_level(logging.WARNING, logger="sysdag.training.trainer")
    trainer = SysDPOTrainer(system, args, train_dataset=captioned(2))
    trainer.train()
    (said,) = [record.getMessage() for record in caplog.records if "usually trained" in record.getMessage()]
    assert "Set nodes={'image': {'beta': 2000}}." in said
    assert "changes the margin by" in said
    assert "of 'caption'" in said
    caplog.clear()
    args.nodes = {"image": {"beta": 2000.0}}
    args.output_dir = str(tmp_path / "again")
    SysDPOTrainer(writer_and_painter(from_text(convention="diffusion-dpo")), args, train_dataset=captioned(2)).train()
    assert "usually trained" not in caplog.text


def test_a_dry_run_says_so_without_weights(tmp_path, monkeypatch):
    systems = Path(__file__).with_name("checked_systems.py")
    for place in range(4):
        Image.new("RGB", (8, 8), (40 * place, 0, 0)).save(tmp_path / f"{place}.png")
    row = {
        "prompt": "ab", "chosen": ["0.png", "1.png"], "rejected": ["2.png", "3.png"],
        "chosen_intermediates": {"captions": "a,b"}, "rejected_intermediates": {"captions": "b,a"},
    }  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)

    def told(*options):
        given = ["train", f"{systems}:pictures", "pairs.jsonl", "--dry-run", "--output_dir", "out", *options]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    elements = 4 * 4  # of the painter's latents
    assert f"Set nodes={{'image': {{'beta': {float(f'{1000 / (T * elements):.2g}'):g}}}}}." in told()
    assert "usually trained" not in told("--nodes", json.dumps({"image": {"beta": 1.5}}))
