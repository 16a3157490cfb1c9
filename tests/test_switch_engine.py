"""Switches in the rest of the engine: bounds in branches, stored references, own strategies, whole trainings."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from switched_systems import build, outcomes
from test_engine import text_log_prob
from test_sample_command import sample
from test_switch_training import DIRECT
from tiny import char_tokenizer, llama
from tiny_diffusion import drift, from_text, images, seed

from sysdag import Exhaustive, Input, MonteCarlo, PlanError, SysDPOConfig, SysDPOTrainer, System, node, switch
from sysdag.components import CausalLM, Opaque, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.candidates import Candidates, CandidateStrategy
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions
from sysdag.objectives.tail_weight import shared_lengths
from sysdag.traces.cells import ABSENT, Draw
from sysdag.training.scales import beyond_scale

# --- bounds ---

ONE_PASS = EngineOptions(engine="one_pass")
ROUTES = {"a square": {"draw": 0.5, "write": 0.5}}


def painter_or_writer():
    prompt = Input("prompt")
    route = node(Tabular(ROUTES), name="route")(lambda prompt: prompt)
    paint = node(from_text(convention="diffusion-dpo"), name="paint")(lambda prompt: prompt)
    write = node(CausalLM(llama(0), char_tokenizer(), max_new_tokens=6), name="write")(lambda prompt: f"{prompt}: ")
    answer = switch(route, {"draw": paint, "write": write}, name="answer")
    return System(prompt >> [route, paint, write], answer)


def test_images_and_texts_of_different_branches_are_inside_one_sigmoid():
    """Pairs of two images, of an image and a text, and of two texts: noise is drawn where there are images."""
    pictures = images(3)
    routes = [("draw", "draw"), ("draw", "write"), ("write", "write")]
    values = [(pictures[0], pictures[1]), (pictures[2], "round"), ("four", "no")]
    rows = [
        {"prompt": "a square", "chosen": chosen, "rejected": rejected,
         "chosen_intermediates": {"route": first}, "rejected_intermediates": {"route": second}}
        for (first, second), (chosen, rejected) in zip(routes, values, strict=True)
    ]  # fmt: skip
    plan = painter_or_writer().compile()
    model = SystemModel(plan, ObjectiveOptions(beta=0.2), {"paint": NodeOptions(beta=500.0)}, engine=ONE_PASS)
    for name, component in model.components.items():
        if name != "route":
            drift(component.module, size=0.02)
    for component in (*model.components.values(), *model.references.values()):
        component.module.double()
    painter, frozen = model.components["paint"], model.references["paint"]
    noise = painter.noise(painter.observe([pictures[0], pictures[2]]), seed(7))

    def painted(image, place):
        draws, own = painter.observe([image]), noise.select([place])
        errors = painter.errors(["a square"], draws, own) - frozen.errors(["a square"], draws, own)
        return -500.0 * 0.5 * errors.sum() / 64

    def written(text):
        parts = [text_log_prob(own["write"], "a square: ", text) for own in (model.components, model.references)]
        return 0.2 * (parts[0] - parts[1])

    margins = [
        painted(pictures[0], 0) - painted(pictures[1], 0),
        painted(pictures[2], 1) - written("round"),
        written("four") - written("no"),
    ]
    output = model(encode_pairs(plan, rows, "direct"), seed(7))
    expected = torch.stack([-F.logsigmoid(margin) for margin in margins])
    torch.testing.assert_close(output.losses, expected.detach(), rtol=1e-5, atol=1e-6)
    assert min(abs(float(margin.detach())) for margin in margins) > 1e-3
    alone = model(encode_pairs(plan, rows[2:], "direct"), [seed(3)])  # no image at all
    assert float(alone.losses) == pytest.approx(float(expected[2].detach()), rel=1e-5)
    several = model(encode_pairs(plan, rows, "direct"), [seed(3), seed(4), seed(5)])
    assert float(several.losses[2]) == pytest.approx(float(expected[2].detach()), rel=1e-5)


def test_bounds_and_tools_in_latent_branches_are_refused_for_sampling():
    with pytest.raises(PlanError, match="'paint'.*per-timestep bound"):
        painter_or_writer().compile().check("sampling")
    x = Input("x")
    route = node(Tabular({"a": {"p": 0.5, "q": 0.5}}), name="route")(lambda x: x)
    one, last = (node(Tabular({"a": {"u": 1.0}}), name=name)(lambda x: x) for name in ("one", "last"))
    tool = node(Opaque(str), name="tool")(lambda x: x)
    behind = node(Tabular({"a": {"u": 1.0}}), name="behind")(lambda tool: tool)
    answer = switch(route, {"p": one, "q": tool >> behind}, name="answer")
    with pytest.raises(PlanError, match="Node 'tool'.*has no likelihood.*a parent differs between candidates"):
        System(x >> [route, one, last, tool], answer, outputs=["answer"]).compile().check("sampling")


def test_sharded_models_are_refused(monkeypatch):
    from sysdag.engine import step

    plan = build().compile()
    model = SystemModel(plan, ObjectiveOptions())
    monkeypatch.setattr(step, "rounds_of", lambda model: max)
    with pytest.raises(PlanError, match="The switch 'solution' does not serve sharded models"):
        model(encode_pairs(plan, DIRECT, "direct"))


def test_a_draw_counts_whole_where_the_other_side_takes_another_branch():
    component = CausalLM(llama(0), char_tokenizer())
    long, short = (Draw("", {"token_ids": [5] * count, "finished": True}) for count in (6, 3))
    found = shared_lengths(component, [long, long, short, ABSENT], 0.5)
    assert found.heads == (3, 6, 3)


# --- strategies of one's own ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(CandidateStrategy):
    """Gives every node a value in every candidate."""

    def paths(self, plan, rows, latents, generator):
        prompt = [row for row in range(len(rows)) for _ in range(2)]
        rows = rows.select(prompt)
        for name in latents:
            component = plan.system[name].component
            rows = rows.updated({name: [component.observe([component.values[at % 2]])[0] for at in range(len(rows))]})
        return Candidates(rows, tuple(prompt))


def test_a_strategy_that_draws_what_does_not_run_is_refused():
    with pytest.raises(PlanError, match="Node 'outline', row 0: it has a value, but another branch is taken there"):
        Forgetful().draw(build().compile(), {"x": ["a"]})


# --- whole trainings ---


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("precompute", [False, True])
def test_a_training_starts_at_ln_2_and_learns(tmp_path, objective, precompute):
    """Whoever prefers u learns to route to who says u, and has every node say it."""
    system = build()
    rows = DIRECT if objective == "direct" else [{"x": x, "chosen": "u", "rejected": "v"} for x in "ab"]
    args = SysDPOConfig(
        output_dir=str(tmp_path / "run"), objective=objective, beta=0.5, max_steps=12, learning_rate=0.1, report_to=[],
        per_device_train_batch_size=2, logging_steps=1, save_strategy="no", use_cpu=True,
        precompute_ref_log_probs=precompute, lr_scheduler_type="constant",
    )  # fmt: skip
    candidates = Exhaustive() if objective == "sampling" else None
    trainer = SysDPOTrainer(model=system, args=args, candidates=candidates, train_dataset=rows)
    before = sum(p for values, p in outcomes("a") if values["solution"] == "u")
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6 * losses[0]
    logged = [line for line in trainer.state.log_history if "nodes/solve/taken" in line]
    assert all(0 <= line["nodes/solve/taken"] <= 1 for line in logged)
    assert all(line["nodes/solve/taken"] + line["nodes/write/taken"] == pytest.approx(1) for line in logged)
    if objective == "sampling":
        trace = system.compile().sample({"x": ["a"] * 400}, seed=0)
        assert trace["solution"].count("u") / 400 > before + 0.1


def test_candidates_that_are_kept_come_back_from_a_checkpoint(tmp_path):
    from sysdag.objectives.candidate_cache import CandidateCache

    plan = build(behind=True).compile()
    cache = CandidateCache(MonteCarlo(num_candidates=4), 5)
    drawn = cache.draw(plan, {"x": ["a", "b"]}, torch.Generator().manual_seed(0), 0)
    entries = json.loads(json.dumps(cache.save(tmp_path / "kept.jsonl")))
    again = CandidateCache(MonteCarlo(num_candidates=4), 5)
    again.load(tmp_path / "kept.jsonl", entries)
    kept = again.draw(plan, {"x": ["a", "b"]}, torch.Generator().manual_seed(1), 1)
    assert list(kept.trace.rows()) == list(drawn.trace.rows())
    assert {cell is ABSENT for cell in kept.trace.cells["outline"]} == {True, False}


SYSTEM = """
from sysdag import Input, System, node, switch
from sysdag.components import Tabular

x = Input("x", str)

@node
def route(x):
    return x[0]

@node(Tabular({"p": {"u": 1.0}}))
def one(route):
    return route

@node(Tabular({"q": {"v": 1.0}}))
def other(route):
    return route

system = System(x >> route, route >> [one, other], switch(route, {"p": one, "q": other}, name="answer"))
"""


def test_rows_that_name_no_branch_can_be_skipped(tmp_path):
    (tmp_path / "routed_by_letter.py").write_text(SYSTEM)
    inputs = tmp_path / "inputs.jsonl"
    inputs.write_text("".join(json.dumps({"x": value}) + "\n" for value in ("p1", "z", "q2")))
    name = f"{tmp_path / 'routed_by_letter.py'}:system"
    with pytest.raises(AssertionError, match="Node 'route', row 1, run 0: 'z' names no branch of the switch 'answer'"):
        sample(name, inputs, "--output", tmp_path / "runs.jsonl")
    sample(name, inputs, "--output", tmp_path / "kept.jsonl", "--on-error", "skip")
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [line["nodes"]["answer"]["value"] for line in lines] == ["u", "v"]
    assert [line["nodes"]["other"] is None for line in lines] == [True, False]


def test_a_bound_in_a_branch_that_no_run_takes_says_nothing_of_its_beta():
    """Beside a beta that is far from the usual ones, which is told where there are images."""
    plan = painter_or_writer().compile()
    nodes = {name: NodeOptions() for name in plan.random_nodes}
    between = {f"{side}_intermediates": {"route": "write"} for side in ("chosen", "rejected")}
    texts = encode_pairs(plan, [{"prompt": "a square", "chosen": "four", "rejected": "no", **between}], "direct")
    assert beyond_scale(plan, texts, objective="direct", beta=0.1, nodes=nodes) == []
    between = {f"{side}_intermediates": {"route": "draw"} for side in ("chosen", "rejected")}
    first, second = images(2)
    pictures = encode_pairs(plan, [{"prompt": "a square", "chosen": first, "rejected": second, **between}], "direct")
    (told,) = beyond_scale(plan, pictures, objective="direct", beta=0.1, nodes=nodes)
    assert "Node 'paint': its beta is 0.1" in told
