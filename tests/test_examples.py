"""The systems of examples/systems from sampling to a saved system, as scripts, on their own stand-ins."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny import shorten_completions

pytest.importorskip("peft")

from sysdag import System
from sysdag.execution.likelihood import log_probs
from sysdag.saving.loading import load_system
from sysdag.traces.cells import ABSENT

FOLDER = Path(__file__).parents[1] / "examples" / "systems"
TRAINED = {
    "draft_refine": ["draft", "answer"],
    "llm_diffusion": ["caption", "image"],
    "picture_critic": ["caption", "image", "critique"],
    "rag_router": ["route", "document", "answer"],
    "rag_passages": ["query", "found", "answer"],
    "critic_loop": ["draft", "critic", "rewrite"],
    "specialists": ["route", "steps", "compute", "tell"],
    "summarise_rewrite": ["summary", "answer"],
    "think_answer": ["reasoning", "answer"],
}


@pytest.fixture(scope="module", params=list(TRAINED))
def example(request, tmp_path_factory):
    """The example's module and the outcome of running its file, in a folder of its own."""
    folder, file = tmp_path_factory.mktemp(request.param), FOLDER / f"{request.param}.py"
    with pytest.MonkeyPatch.context() as patch:
        shorten_completions(patch)
        patch.syspath_prepend(FOLDER)
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(file), "--offline", "--output", str(folder / "out")])
        outcome = runpy.run_path(str(file), run_name="__main__")["outcome"]
        yield sys.modules[request.param], outcome
    for name in (request.param, "whole_path", "stand_ins"):
        del sys.modules[name]


def test_pairs_prefer_the_higher_score(example):
    module, outcome = example
    assert 2 <= len(outcome.pairs) <= len(next(iter(module.INPUTS.values())))
    (output,) = module.system.outputs
    for pair in outcome.pairs:
        inputs = {name: pair[name] for name in module.INPUTS}
        chosen, rejected = (module.score(inputs | {output: pair[side].value}) for side in ("chosen", "rejected"))
        assert chosen > rejected
        columns = outcome.trace.inputs
        of_same_input = [
            row for row in range(len(outcome.trace)) if all(columns[name][row] == inputs[name] for name in inputs)
        ]
        scores = [module.score(inputs | {output: outcome.trace[output][row]}) for row in of_same_input]
        assert (chosen, rejected) == (max(scores), min(scores))


def test_training_starts_at_ln_2_and_moves_every_model(example):
    module, outcome = example
    losses = [line["loss"] for line in outcome.trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert sorted(outcome.moved) == sorted(TRAINED[module.__name__])
    assert all(0 < size < 0.1 for size in outcome.moved.values()), outcome.moved


@torch.no_grad()
def test_the_saved_system_scores_as_the_trained_one_does(example):
    _, outcome = example
    saved, trained = System.from_pretrained(outcome.folder), outcome.trainer.system
    rows = outcome.trace.select(range(4))
    exact = [name for name in trained.compile().random_nodes if trained[name].likelihood == "exact"]
    plans = trained.compile(), saved.compile()
    assert "image" in plans[0].random_nodes or len(exact) == len(plans[0].random_nodes)
    for name in plans[0].random_nodes:
        trained[name].component.module.cpu()  # where the saved one is: a GPU, on which it may be, rounds differently
    for name in exact:
        ours, theirs = (log_probs(plan, rows, [name])[name] for plan in plans)
        assert torch.equal(ours.cpu(), theirs.cpu())
        assert all(value < 0 for value, cell in zip(ours, rows.cells[name], strict=True) if cell is not ABSENT)
    for name in set(trained.compile().random_nodes) - set(exact):
        draws, captions = rows.cells[name], rows["caption"]
        noise = trained[name].component.noise(draws, torch.Generator().manual_seed(0))
        ours, theirs = (system[name].component.score(captions, draws, noise) for system in (trained, saved))
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-6, atol=0)


def test_a_command_line_can_name_it(example):
    module, _ = example
    assert load_system(f"{FOLDER / module.__name__}.py:system") is module.system


@pytest.mark.parametrize("example", ["rag_router"], indirect=True)
def test_the_retriever_can_start_as_a_dense_one(example):
    """Its log-probabilities are the log-softmax of scaled cosines between question and documents."""
    module, _ = example
    module.start_as_dense_retriever(sharpness=5.0)
    question = "what does a lost book cost?"
    vectors = module.embed([question, *module.DOCUMENTS.values()])
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(5), atol=1e-5)
    expected = (5.0 * vectors[1:] @ vectors[0]).log_softmax(-1)
    component = module.system["document"].component
    got = component.log_prob([module.features(question)] * 4, component.observe(list(module.DOCUMENTS)))
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-5, atol=1e-5)
