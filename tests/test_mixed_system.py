"""A language model and a diffusion model inside one sigmoid, against the formula written out."""

import math

import pytest
import torch
from test_engine import text_log_prob
from tiny import char_tokenizer, llama
from tiny_diffusion import drift, from_text, images, seed

from sysdag import DiverseBeamSearch, Input, PlanError, System, node
from sysdag.components import CausalLM
from sysdag.components.random_streams import row_seeds
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions

PROMPT = Input("prompt")
CAPTIONS = {"chosen": ["a dark square", "light circle"], "rejected": ["a circle", "dark", "a light square"]}
PICTURES = {"chosen": images(2), "rejected": images(3, number=50)}
ROW = {
    "prompt": "draw",
    "chosen": PICTURES["chosen"],
    "rejected": PICTURES["rejected"],
    "chosen_intermediates": {"text": "|".join(CAPTIONS["chosen"])},
    "rejected_intermediates": {"text": "|".join(CAPTIONS["rejected"])},
}


def captioner_and_painter():
    @node(CausalLM(llama(0), char_tokenizer("abcdefghijklmnopqrstuvwxyz |"), max_new_tokens=40))
    def text(prompt):
        return f"{prompt}|"

    @node
    def captions(text) -> list[str]:
        return text.split("|")

    @node(from_text(convention="diffusion-dpo"))
    def image(captions):
        return captions

    return System(PROMPT >> text >> captions, captions.each() >> image)


def direct_model(engine="one_pass", offload_idle=False, **options):
    plan = captioner_and_painter().compile()
    nodes = {"image": NodeOptions(beta=500.0, **options)}
    options = EngineOptions(engine=engine, offload_idle=offload_idle)
    model = SystemModel(plan, ObjectiveOptions(beta=0.2), nodes, engine=options)
    for component in model.components.values():
        drift(component.module, size=0.02)
    return model, encode_pairs(plan, [ROW], "direct")


def test_both_kinds_of_likelihood_are_inside_one_sigmoid():
    model, pairs = direct_model(scale=0.5)
    for component in (*model.components.values(), *model.references.values()):
        component.module.double()  # in fp32 the convolutions of either side are 1e-5 from the truth
    output = model(pairs, seed(7))
    painter, frozen = model.components["image"], model.references["image"]
    # One (t, eps) for each place of the longer plate, shared by winner and loser.
    noise = painter.noise(painter.observe(PICTURES["rejected"]), seed(7))
    terms = {}
    for side, sign in (("chosen", 1), ("rejected", -1)):
        draws = painter.observe(PICTURES[side])
        shared = noise.select(list(range(len(draws))))
        errors = painter.errors(CAPTIONS[side], draws, shared) - frozen.errors(CAPTIONS[side], draws, shared)
        written = f"{'|'.join(CAPTIONS[side])}"
        text = text_log_prob(model.components["text"], "draw|", written) - text_log_prob(
            model.references["text"], "draw|", written
        )
        terms[side] = sign * (0.2 * text - 500.0 * 0.5 * 0.5 * errors.sum() / 64)
    margin = terms["chosen"] + terms["rejected"]
    torch.testing.assert_close(output.loss, -torch.nn.functional.logsigmoid(margin), rtol=1e-5, atol=1e-6)
    assert abs(float(margin.detach())) > 0.05
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin), parameters, allow_unused=True)
    got = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    assert sum(gradient is not None for gradient in got) > 20
    for ours, theirs in zip(got, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_noise_is_shared_by_policy_and_reference_so_that_step_0_is_exact():
    plan = captioner_and_painter().compile()
    output = SystemModel(plan, ObjectiveOptions())(encode_pairs(plan, [ROW, ROW], "direct"))
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert all(float(ratio.abs().max()) == 0 for ratio in output.log_ratios.values())
    assert set(output.log_ratios) == {"text", "image"}


def test_without_a_generator_noise_is_drawn_anew_from_torchs():
    model, pairs = direct_model()
    torch.manual_seed(0)
    first, second = model(pairs).loss.item(), model(pairs).loss.item()
    torch.manual_seed(0)
    assert model(pairs).loss.item() == first != second


def test_a_bound_is_never_summed_over_candidates():
    with pytest.raises(PlanError, match="'image'.*per-timestep bound.*must not be summed over candidates"):
        SystemModel(
            captioner_and_painter().compile(),
            ObjectiveOptions(objective="sampling"),
            candidates=DiverseBeamSearch(num_candidates=2),
        )


def test_a_bound_that_no_candidate_changes_stands_outside_the_sum():
    lm = CausalLM(llama(0), char_tokenizer(), max_new_tokens=4)

    @node(lm)
    def draft(prompt):
        return prompt

    @node(CausalLM(llama(1), char_tokenizer()))
    def answer(draft):
        return draft + "a"

    @node(from_text(convention="diffusion-dpo"))
    def image(prompt):
        return "a dark square"

    plan = System(PROMPT >> draft >> answer, PROMPT >> image).compile()
    both = {
        "chosen": {"answer": "x", "image": images(1)[0]},
        "rejected": {"answer": "yy", "image": images(1, number=9)[0]},
    }
    pairs = encode_pairs(plan, [{"prompt": "p", **both}], "sampling")
    model = SystemModel(
        plan, ObjectiveOptions(objective="sampling", beta=2.0), candidates=DiverseBeamSearch(num_candidates=2)
    )
    for component in model.components.values():
        drift(component.module, size=0.02)
    metrics = model(pairs, seed(3)).metrics
    painter, frozen = model.components["image"], model.references["image"]
    generator = seed(3)
    row_seeds(generator, 1)  # of the candidates, which come before the noise
    noise = painter.noise(painter.observe(images(1)), generator)
    difference = {
        side: painter.score(["a dark square"], painter.observe([both[side]["image"]]), noise)
        - frozen.score(["a dark square"], painter.observe([both[side]["image"]]), noise)
        for side in both
    }
    expected = 2.0 * float((difference["chosen"] - difference["rejected"]).detach())
    assert metrics["nodes/image/rewards/margins"] == pytest.approx(expected, rel=1e-4)
    text_only = {side: {**values, "image": images(1)[0]} for side, values in both.items()}
    alone = model(encode_pairs(plan, [{"prompt": "p", **text_only}], "sampling"), seed(3)).metrics
    assert metrics["rewards/margins"] == pytest.approx(alone["rewards/margins"] + expected, rel=1e-4, abs=1e-6)
