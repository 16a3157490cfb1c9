"""Training on single runs with a label: batches, checkpoints, reference scores on file, processes, commands, rounds."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from test_unpaired_rows import unpaired
from tiny import char_tokenizer, llama
from trained_systems import rows as pair_rows
from trained_systems import two_llms, weights_of
from typer.testing import CliRunner

from sysdag import DataError, DiverseBeamSearch, PlanError, SerializationError, SysDPOConfig, SysDPOTrainer, System
from sysdag.cli import app
from sysdag.data.encoding import encode_rows
from sysdag.data.preferences import mismatched
from sysdag.engine.replay import accumulate_gradients
from sysdag.files.run_files import read_log, read_run
from sysdag.objectives.reward_shift import RewardShift
from sysdag.objectives.unpaired_losses import UNPAIRED_LOSSES
from sysdag.training.pair_means import PairMeans
from sysdag.training.unpaired_batches import fix_mismatches


def config(folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "optim": "sgd", "beta": 0.3, "loss_type": "kto",
    }  # fmt: skip
    return SysDPOConfig(**(defaults | options))


def trained(folder, data=None, resume=None, candidates=None, **options):
    torch.manual_seed(0)
    data = unpaired(8) if data is None else data
    trainer = SysDPOTrainer(
        two_llms(), config(folder, **options), train_dataset=data, eval_dataset=data[:7], candidates=candidates
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("loss", "objective"),
    [("kto", "direct"), ("kto", "sampling"), ("apo_zero_unpaired", "sampling"), ("bco", "direct")],
)
def test_training_lowers_the_loss_and_logs_as_trl_does(tmp_path, loss, objective):
    candidates = DiverseBeamSearch(num_candidates=2) if objective == "sampling" else None
    trainer = trained(
        tmp_path, candidates=candidates, loss_type=loss, objective=objective, max_steps=16, learning_rate=0.05
    )  # fmt: skip
    found = losses_of(trainer)
    assert found[0] == pytest.approx(math.log(2) if loss == "bco" else 0.5, abs=1e-3)
    assert sum(found[-4:]) < sum(found[:4])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert logged["rewards/margins"] == pytest.approx(logged["rewards/chosen"] - logged["rewards/rejected"], abs=1e-6)
    assert {"logps/chosen", "logps/rejected", "rewards/accuracies", "nodes/draft/rewards/margins"} <= logged.keys()
    assert ("kl" in logged) == (loss == "kto")
    assert ("delta" in logged) == (loss == "bco")
    assert not any(isinstance(v, float) and math.isnan(v) for v in logged.values())


def stepped_by_hand(folder, parts, loss):
    """One step of plain descent on the mean of the losses of parts of a batch, each scored by itself."""
    trainer = SysDPOTrainer(two_llms(), config(folder, loss_type=loss), train_dataset=unpaired(8))
    model, rate = trainer.model, 0.02
    for _ in range(2):
        model.zero_grad()
        for part in parts:
            output = model(part, None, 0)
            accumulate_gradients(model, output, lambda loss: (loss / len(parts)).backward())
        with torch.no_grad():
            for parameter in model.trained_parameters():
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
    return torch.cat([p.detach().flatten() for p in model.trained_parameters()])


@pytest.mark.parametrize(
    ("loss", "engine"),
    [("kto", "one_pass"), ("kto", "two_pass"), ("apo_zero_unpaired", "two_pass"), ("bco", "two_pass")],
)
def test_accumulated_batches_have_a_kl_and_a_shift_each(tmp_path, loss, engine):
    """As in TRL: the KL term is of a forward, and the shift of all that came before; in micro-batches of a few."""
    data = unpaired(2)  # of which a step has all four
    torch.manual_seed(0)
    trainer = SysDPOTrainer(
        two_llms(),
        config(
            tmp_path, loss_type=loss, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
            train_sampling_strategy="sequential", max_grad_norm=0.0, engine=engine, micro_batch_tokens=40,
        ),
        train_dataset=data,
    )  # fmt: skip
    trainer.train()
    torch.manual_seed(0)
    runs = encode_rows(two_llms().compile(), data, "direct")
    expected = stepped_by_hand(tmp_path / "hand", [runs[:2], runs[2:]], loss)
    torch.testing.assert_close(weights_of(trainer), expected, rtol=1e-5, atol=1e-6)


def test_in_order_runs_are_mismatched_as_trl_does_and_one_that_is_alone_takes_the_one_before(tmp_path):
    plan = two_llms().compile()
    runs = encode_rows(plan, unpaired(4)[:7], "direct")
    args = config(tmp_path, per_device_train_batch_size=3, train_sampling_strategy="sequential")
    fixed = fix_mismatches(args, "train_dataset", runs)
    before = [2, 0, 1, 5, 3, 4, 5]  # of parts of three; the last is alone
    assert [run.mismatched.run for run in fixed] == [runs[place].run for place in before]
    assert [run.mismatched.inputs for run in fixed] == [run.inputs for run in runs]
    shuffled = config(tmp_path, per_device_train_batch_size=3)
    assert all(run.mismatched is None for run in fix_mismatches(shuffled, "train_dataset", runs))
    assert [r.mismatched.run for r in fix_mismatches(shuffled, "eval_dataset", runs)] == [
        r.mismatched.run for r in fixed
    ]


def test_a_batch_of_one_at_the_end_of_an_epoch_is_mismatched_too(tmp_path):
    trainer = trained(tmp_path, unpaired(3)[:5], max_steps=4, per_device_train_batch_size=2)
    assert len(losses_of(trainer)) == 4
    with pytest.raises(DataError, match="mismatches runs with each other's inputs, and there is one row; it needs two"):
        trained(tmp_path, unpaired(1)[:1])
    assert len(losses_of(trained(tmp_path, unpaired(1)[:1], loss_type="bco", max_steps=1))) == 1


def test_neighbours_that_ask_the_same_are_told_where_the_order_stays(tmp_path, caplog):
    runs = encode_rows(two_llms().compile(), unpaired(4), "direct")  # two of each question, side by side
    fix_mismatches(config(tmp_path), "train_dataset", runs)
    assert not caplog.text
    fix_mismatches(config(tmp_path), "eval_dataset", runs + runs[:1] * 2)
    assert "eval_dataset: 6 of 10 rows stand behind one with the same inputs" in caplog.text
    caplog.clear()
    fix_mismatches(config(tmp_path), "eval_dataset", [*runs[::2], *runs[1::2]])
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size must be 2 or more"),
        ({"precompute_ref_log_probs": True}, "Set train_sampling_strategy='sequential', as TRL's KTOTrainer does"),
    ],
)
def test_batches_without_mismatches_are_refused_before_anything_loads(tmp_path, options, message):
    with pytest.raises(PlanError, match=message):
        SysDPOTrainer(two_llms(), config(tmp_path, **options), train_dataset=unpaired(4))
    SysDPOTrainer(two_llms(), config(tmp_path, loss_type="bco", **options), train_dataset=unpaired(4))


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_reference_scores_on_file_give_the_same_training(tmp_path, loss):
    options = {"loss_type": loss, "train_sampling_strategy": "sequential"}
    plain = trained(tmp_path / "plain", **options)
    stored = trained(tmp_path / "stored", precompute_ref_log_probs=True, **options)
    torch.testing.assert_close(weights_of(stored), weights_of(plain), rtol=1e-5, atol=1e-6)
    assert losses_of(stored) == pytest.approx(losses_of(plain), rel=1e-5)
    assert stored.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert weights_of(stored).equal(weights_of(trained(tmp_path / "stored", precompute_ref_log_probs=True, **options)))


@pytest.mark.parametrize(("loss", "objective"), [("kto", "direct"), ("kto", "sampling"), ("bco", "sampling")])
def test_a_training_goes_on_from_a_checkpoint_to_the_same_numbers(tmp_path, loss, objective):
    candidates = DiverseBeamSearch(num_candidates=2) if objective == "sampling" else None
    options = {
        "loss_type": loss, "objective": objective, "candidates": candidates, "save_strategy": "steps", "save_steps": 2,
        "optim": "adamw_torch",
    }  # fmt: skip
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", max_steps=2, **options)
    resumed = trained(tmp_path / "parts", resume=True, **options)
    assert weights_of(resumed).equal(weights_of(whole))
    assert losses_of(resumed) == losses_of(whole)
    assert vars(resumed.model.shift) == vars(whole.model.shift)
    if loss == "bco":
        assert whole.model.shift.count == 16
        state = json.loads((tmp_path / "parts" / "checkpoint-2" / "sysdag_state.json").read_text())
        assert state["shift"]["count"] == 8


def test_a_checkpoint_without_a_shift_or_of_other_weights_of_labels_is_refused(tmp_path):
    with pytest.raises(SerializationError, match="'bco': the checkpoint does not hold the mean of rewards"):
        RewardShift().load(None)
    trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(SerializationError, match="option desirable_weight: absent in the checkpoint, 2.0 now"):
        trained(tmp_path, resume=True, desirable_weight=2.0)
    flipped = [row | {"label": not row["label"]} for row in unpaired(8)]
    with pytest.raises(SerializationError, match="sha256 of the training pairs"):
        trained(tmp_path, flipped, resume=True)


def test_evaluations_are_means_over_runs_whatever_their_batches(tmp_path):
    """bco's shift stays as training left it; kto's KL is of a batch, here of all runs."""
    trainer = trained(tmp_path, loss_type="bco", max_steps=2)
    shift = vars(trainer.model.shift).copy()
    found = {}
    for size in (2, 7):
        trainer.args.per_device_eval_batch_size = size
        found[size] = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_delta"):
        assert found[2][name] == pytest.approx(found[7][name], rel=1e-4, abs=1e-6), name
    assert found[7]["eval_delta"] == pytest.approx(shift["mean"], rel=1e-5)
    assert vars(trainer.model.shift) == shift
    other = trained(tmp_path / "kto", max_steps=2)
    other.args.per_device_eval_batch_size = 7
    scores = other.evaluate()
    with torch.no_grad():
        output = other.model(other.eval_dataset, [torch.Generator() for _ in range(7)])
    assert scores["eval_loss"] == pytest.approx(float(output.losses.mean()), rel=1e-5)
    assert scores["eval_kl"] == pytest.approx(float(output.metrics["kl"][0]), rel=1e-5, abs=1e-7)


def test_groups_of_runs_are_told_apart_and_weigh(tmp_path):
    data = [row | {"group": "ab"[i % 4 == 3]} for i, row in enumerate(unpaired(8))]
    trainer = trained(tmp_path, data, group_dro=True, group_dro_step_size=1.0)
    found = trainer.evaluate()
    assert found["eval_groups/worst_loss"] == max(found["eval_groups/a/loss"], found["eval_groups/b/loss"])
    assert trainer.model.groups.weights != pytest.approx({"a": 0.75, "b": 0.25}, abs=1e-4)


def test_means_leave_out_what_is_nan_and_make_margins_of_sides():
    means = PairMeans()
    means.add({"rewards/chosen": torch.tensor([1.0, math.nan]), "rewards/rejected": torch.tensor([math.nan, 3.0])})
    means.add({"rewards/chosen": torch.tensor([2.0]), "rewards/rejected": torch.tensor([math.nan])})
    means.add({"nodes/a/rewards/chosen": torch.tensor([math.nan]), "nodes/a/rewards/rejected": torch.tensor([1.0])})
    assert means.take() == {
        "rewards/chosen": 1.5, "rewards/rejected": 3.0, "rewards/margins": -1.5, "nodes/a/rewards/rejected": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            "ggggbb",
            {},
            r"4 rows are desirable and 2 are not\. .* of 0\.50 to 0\.6\d, or undesirable_weight of 1\.50 to",
        ),
        ("ggggbb", {"desirable_weight": 0.6}, ""),
        ("ggggbb", {"undesirable_weight": 2.0}, ""),
        ("gggbbb", {}, ""),
        ("gggggg", {}, "All 6 rows are desirable, so the losses have nothing to tell them from"),
    ],
)
def test_uneven_labels_are_told_with_the_weights_that_even_them_out(tmp_path, caplog, labels, options, message):
    """The bounds are TRL's, which rounds 1.33 for 4/3: equation 8 of the paper."""
    data = [row | {"label": label == "g"} for row, label in zip(unpaired(3), labels, strict=True)]
    SysDPOTrainer(two_llms(), config(tmp_path, **options), train_dataset=data)
    told = [record.getMessage() for record in caplog.records if "desirable" in record.getMessage()]
    if message:
        assert re.search(message, told[0]), told
    else:
        assert not told


# From a log to a trained system by the commands

MODULE = "system_of_thumbs"
SYSTEM = """
from pathlib import Path

from sysdag import Input, System, node
from sysdag.components import CausalLM

HERE = Path(__file__).parent
question = Input("question", str)


@node(CausalLM(HERE / "drafter", max_new_tokens=4))
def draft(question):
    return f"q: {question} d:"


@node(CausalLM(HERE / "refiner", max_new_tokens=4))
def answer(question, draft):
    return f"q: {question} d: {draft} a:"


system = System(question >> draft, (question & draft) >> answer)
"""
FLAGS = [
    "--max_steps", "4", "--per_device_train_batch_size", "4", "--learning_rate", "0.05", "--use_cpu", "--logging_steps",
    "1", "--report_to", "none", "--optim", "sgd", "--lr_scheduler_type", "constant", "--save_strategy", "no",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, number in (("drafter", 0), ("refiner", 1)):
        llama(number).save_pretrained(tmp_path / name)
        char_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / f"{MODULE}.py").write_text(SYSTEM)
    log = [
        {
            "question": f"q {i}",
            "draft": "ab"[i % 2],
            "answer": "yes" if i % 3 else "no",
            "thumb": "up" if i % 3 else "down",
        }
        for i in range(8)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop(MODULE, None)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def call(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def rows_from_the_log():
    call("import", "log.jsonl", "--system", f"{MODULE}.py:system", "--output", "runs.jsonl")
    call("judge", "runs.jsonl", "--by", "thumb", "--holds", "thumbs", "--rows", "unpaired", "--output", "u.jsonl")


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_one_logged_answer_a_question_is_enough(place, objective):
    """import -> judge -> validate -> train -> report, and the trained system is another one."""
    rows_from_the_log()
    told = call("validate", f"{MODULE}.py:system", "u.jsonl", "--objective", objective)
    assert "8 rows: 8 can be used" in told
    shown = call("train", f"{MODULE}.py:system", "u.jsonl", "--loss_type", "kto", "--objective", objective,
                 "--undesirable_weight", "1.5", "--output_dir", "out", *FLAGS)  # fmt: skip
    assert "loss kto" in shown
    assert "4 runs a step and process" in shown
    run = read_run("out")
    assert (run["status"], run["data"]["train"]["pairs"]) == ("finished", 8)
    assert run["config"]["undesirable_weight"] == 1.5
    log = [line for line in read_log("out") if "loss" in line]
    assert {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins"} <= log[-1].keys()
    before = llama(1).state_dict()
    after = System.from_pretrained("out")["answer"].component.module.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    call("report", "out", "--output", "report.html")
    page = Path("report.html").read_text()
    assert "as the loss kto estimates it" in page
    assert "Reward on losers by node" in page


def test_the_command_says_which_losses_need_no_pairs_and_the_reverse(place):
    rows_from_the_log()
    told = call("train", f"{MODULE}.py:system", "u.jsonl", "--output_dir", "out", *FLAGS, code=1)
    assert "those that need no pairs are ['apo_zero_unpaired', 'bco', 'kto']" in told
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(4)))
    told = call(
        "train", f"{MODULE}.py:system", "pairs.jsonl", "--loss_type", "bco", "--output_dir", "out", *FLAGS, code=1
    )
    assert "loss_type 'bco' takes single runs; those of pairs are ['aot'" in told
    told = call("train", f"{MODULE}.py:system", "u.jsonl", "--loss_type", "kto", "sigmoid", "--output_dir", "out",
                *FLAGS, code=2)  # fmt: skip
    assert "'kto' takes single runs with a label, and 'sigmoid' pairs of runs; no row is both" in told
    assert not Path("out").exists()


def test_a_sweep_over_losses_of_single_runs(place):
    rows_from_the_log()
    call("train", f"{MODULE}.py:system", "u.jsonl", "--sweep", "loss_type=kto,bco,apo_zero_unpaired", "--output_dir",
         "out", *FLAGS)  # fmt: skip
    assert {path.name for path in Path("out").iterdir() if path.is_dir()} >= {f"loss_type={n}" for n in UNPAIRED_LOSSES}
    firsts = {name: read_log(f"out/loss_type={name}")[0]["loss"] for name in UNPAIRED_LOSSES}
    assert firsts == pytest.approx({"kto": 0.5, "apo_zero_unpaired": 0.5, "bco": math.log(2)}, abs=1e-3)
    told = call(
        "train", f"{MODULE}.py:system", "u.jsonl", "--sweep", "loss_type=kta", "--output_dir", "o2", *FLAGS, code=2
    )
    assert "Did you mean kto?" in told


# Memory, mismatches given by hand


def test_an_estimate_of_single_runs_has_one_side():
    plan = two_llms().compile()
    options = {"lengths": {"draft": (10, 5), "answer": (15, 5)}, "micro_batch_tokens": 10**6, "device": "cpu"}
    pairs, runs = plan.estimate(pairs=8, **options), plan.estimate(pairs=16, unpaired=True, **options)
    assert runs.graphs["answer"] == pairs.graphs["answer"]  # a run has as many tokens as one side
    assert runs.resident == pairs.resident
    pairs, runs = (plan.estimate(pairs=8, objective="sampling", unpaired=u, **options) for u in (False, True))
    assert runs.graphs["draft"] == pairs.graphs["draft"]  # both sides of a pair have the same candidates
    assert runs.graphs["answer"] < pairs.graphs["answer"]


def test_runs_that_bring_their_mismatch_keep_it(tmp_path):
    plan = two_llms().compile()
    runs = mismatched(encode_rows(plan, unpaired(4), "direct"))
    trainer = SysDPOTrainer(two_llms(), config(tmp_path), train_dataset=runs)
    batch = trainer.data_collator([runs[5], runs[2]])["pairs"]
    assert [run.mismatched for run in batch] == [runs[5].mismatched, runs[2].mismatched]
