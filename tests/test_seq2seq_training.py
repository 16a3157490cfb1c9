"""Systems with an encoder-decoder: gradients, references, adapters, saving, training, memory."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from seq2seq_families import FAMILIES, bart, marian, t5
from test_two_pass import assert_same, gradients_of
from tiny import char_tokenizer, llama
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sysdag import DiverseBeamSearch, Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM, Seq2Seq
from sysdag.components.memory import PeakBytes
from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.saving.serialization import read_system

ROWS = [
    {"report": "a red cube", "chosen": "yes", "rejected": "no",
     "chosen_intermediates": {"summary": "a cube"}, "rejected_intermediates": {"summary": "red"}},
    {"report": "two words of mine", "chosen": "ab", "rejected": "b",
     "chosen_intermediates": {"summary": "words"}, "rejected_intermediates": {"summary": "an old friend"}},
]  # fmt: skip


def lora(*, as_bart=False):
    return LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"] if as_bart else ["q", "v"])


def dropping(model):
    """The model as checkpoints have it: with dropout of every kind, which a training switches off."""
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.3)
    return model


def summarise(component):
    @node(component)
    def summary(report):
        return report

    @node(CausalLM(llama(1), char_tokenizer(), max_new_tokens=6))
    def answer(report, summary):
        return f"{report} {summary}:"

    report = Input("report")
    return System(report >> summary, (report & summary) >> answer)


def made(build, rows=ROWS, candidates=None, engine=None, **options):
    torch.manual_seed(0)
    plan = summarise(build()).compile()
    model = SystemModel(plan, ObjectiveOptions(beta=0.3, **options), None, candidates, EngineOptions(**(engine or {})))
    torch.manual_seed(1)
    for each in model.components.values():
        with torch.no_grad():
            for parameter in each.own_parameters().values():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model, encode_pairs(plan, rows, options.get("objective", "direct"))


BUILDS = {
    "t5": lambda: Seq2Seq(*t5(), max_new_tokens=12),
    "t5 with an adapter": lambda: Seq2Seq(*t5(), max_new_tokens=12, peft_config=lora()),
    "bart with an adapter": lambda: Seq2Seq(*bart(), max_new_tokens=12, peft_config=lora(as_bart=True)),
}


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_two_passes_give_the_gradients_of_one(build, objective):
    candidates = DiverseBeamSearch(num_candidates=3, diversity_penalty=2.0) if objective == "sampling" else None
    options = {"candidates": candidates, "objective": objective}
    one, expected = gradients_of(*made(build, engine={"engine": "one_pass"}, **options))
    for tokens in (1, 60):
        engine = {"engine": "two_pass", "micro_batch_tokens": tokens}
        two, found = gradients_of(*made(build, engine=engine, **options))
        assert_same(found, expected)
        torch.testing.assert_close(two.loss, one.loss.detach(), rtol=1e-5, atol=1e-6)


def test_the_loss_of_one_node_is_dpo_on_plain_forwards():
    component = Seq2Seq(*bart(), max_new_tokens=12, peft_config=lora(as_bart=True))
    rows = [{"report": "a red cube", "chosen": "a cube of mine", "rejected": "red"}]

    @node(component)
    def answer(report):
        return report

    plan = System(Input("report") >> answer).compile()
    model = SystemModel(plan, ObjectiveOptions(beta=0.3), None, None, EngineOptions())
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in component.own_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = model(encode_pairs(plan, rows, "direct"))

    def log_prob(network, text):
        inputs = component.tokenizer("a red cube", text_target=text, return_tensors="pt")
        logits = network(input_ids=inputs["input_ids"], labels=inputs["labels"]).logits[0].log_softmax(-1)
        each = logits.gather(1, inputs["labels"][0][:, None])
        return each[1:].sum()  # the first is forced

    with component.lm.at_work() as policy, torch.no_grad():
        ours = [log_prob(policy, row) for row in ("a cube of mine", "red")]
    plain, _ = bart()
    with torch.no_grad():
        theirs = [log_prob(plain, row) for row in ("a cube of mine", "red")]
    margin = 0.3 * (ours[0] - theirs[0] - ours[1] + theirs[1])
    assert abs(float(margin)) > 1e-2
    assert float(found.loss) == pytest.approx(float(-torch.nn.functional.logsigmoid(margin)), abs=1e-5)


def test_a_reference_stays_while_the_policy_trains_and_adapters_share_a_base():
    model, tokenizer = t5()
    one, two = (Seq2Seq(model, tokenizer, peft_config=lora(), max_new_tokens=8) for _ in range(2))
    draws = one.observe(["a cube"])
    plain = one.log_prob(["a room"], draws)
    reference = one.reference()
    with torch.no_grad():
        for parameter in one.own_parameters().values():
            parameter.add_(0.2)
    assert not torch.allclose(one.log_prob(["a room"], draws), plain)
    for other in (reference, two):
        torch.testing.assert_close(other.log_prob(["a room"], draws), plain)
    assert one.base_key == two.base_key


@pytest.mark.parametrize("name", ["t5", "bart", "marian_separate", "nllb"])
def test_a_full_model_saves_to_a_folder_that_transformers_loads(tmp_path, name):
    model, tokenizer = FAMILIES[name]()
    settings = {"no_repeat_ngram_size": 4}
    component = Seq2Seq(model, tokenizer, max_new_tokens=9, max_source_length=20, generation_config=settings)
    folder = tmp_path / "saved"
    folder.mkdir()
    options = component.save_pretrained(folder)
    loaded = Seq2Seq.from_pretrained(folder, options)
    assert (loaded.max_new_tokens, loaded.max_source_length, loaded.generation_config) == (9, 20, settings)
    assert loaded.rules == component.rules
    draws = component.sample(["a cube", "two words"], generator=[1, 2])
    sources = ["a cube", "two words"]
    assert [d.record for d in loaded.sample(sources, generator=[1, 2])] == [d.record for d in draws]
    torch.testing.assert_close(loaded.log_prob(sources, draws), component.log_prob(sources, draws))
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder)
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=0)
    target = AutoTokenizer.from_pretrained(folder)(text_target="a cube")["input_ids"]
    assert target == tokenizer(text_target="a cube")["input_ids"]


@pytest.mark.parametrize("by_path", [True, False])
def test_an_adapter_saves_and_opens_in_peft(tmp_path, by_path):
    model, tokenizer = t5()
    if by_path:
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    source = (tmp_path / "base", None) if by_path else (model, tokenizer)
    component = Seq2Seq(*source, peft_config=lora(), max_new_tokens=8)
    with torch.no_grad():
        for parameter in component.own_parameters().values():
            parameter.add_(0.1)
    folder = tmp_path / "saved"
    folder.mkdir()
    options = component.save_pretrained(folder)
    draws = component.observe(["a cube"])
    wanted = component.log_prob(["a room"], draws)
    loaded = Seq2Seq.from_pretrained(folder, options)
    torch.testing.assert_close(loaded.log_prob(["a room"], draws), wanted)
    torch.testing.assert_close(Seq2Seq(folder, max_new_tokens=8).log_prob(["a room"], draws), wanted)
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base" if by_path else folder / "base")
    try:
        get_peft_model(copy.deepcopy(base), lora())
    except AttributeError as error:  # peft before 0.21.2 beside transformers 5.20 or newer
        pytest.skip(f"peft itself adapts no encoder-decoder here: {error}")
    adapted = PeftModel.from_pretrained(base, folder).eval()
    inputs = tokenizer("a room", text_target="a cube", return_tensors="pt")
    logits = adapted(input_ids=inputs["input_ids"], labels=inputs["labels"]).logits[0].log_softmax(-1)
    plain = logits.gather(1, inputs["labels"][0][:, None]).sum()
    torch.testing.assert_close(wanted[0], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_a_training_starts_at_ln_2_moves_both_models_and_saves_a_system(tmp_path, objective):
    model, tokenizer = marian()
    component = Seq2Seq(dropping(model), tokenizer, max_new_tokens=12, peft_config=lora(as_bart=True))
    german = {"chosen_intermediates": {"summary": "ein Raum"}, "rejected_intermediates": {"summary": "Worte"}}
    rows = [{key: row[key] for key in ("report", "chosen", "rejected")} for row in ROWS]
    if objective == "direct":
        rows = [row | german for row in rows]
    args = SysDPOConfig(
        output_dir=str(tmp_path), objective=objective, max_steps=2, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
    )  # fmt: skip
    candidates = DiverseBeamSearch(num_candidates=2, diversity_penalty=1.0) if objective == "sampling" else None
    trainer = SysDPOTrainer(model=summarise(component), args=args, candidates=candidates, train_dataset=rows)
    before = {key: p.detach().clone() for key, p in component.own_parameters().items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert any(not torch.equal(p, before[key]) for key, p in component.own_parameters().items())
    trainer.save_model(str(tmp_path / "aligned"))
    functions = {n.base_name: n.function for n in trainer.system.nodes}
    loaded = read_system(tmp_path / "aligned", functions)
    trace = trainer.system.compile().sample({"report": ["a red cube"]}, seed=3)
    for key, ours in trainer.system.compile().log_probs(trace).items():
        torch.testing.assert_close(loaded.compile().log_probs(trace)[key], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trains", ["all weights", "an adapter"])
def test_the_estimate_of_a_step_is_within_15_percent_of_the_measured_peak(trains):
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 4}
    config = lora() if trains == "an adapter" else None
    model, tokenizer = t5(**sizes)
    component = Seq2Seq(model, tokenizer, peft_config=config)

    @node(component)
    def answer(report):
        return report

    plan = System(Input("report") >> answer).compile()
    rows = [{"report": "a red cube and " * 80, "chosen": "a room of " * 20, "rejected": "two words " * 28}]
    step = SystemModel(plan, ObjectiveOptions(beta=0.1), None, None, EngineOptions(engine="one_pass"))
    pairs = encode_pairs(plan, rows, "direct")
    accumulate_gradients(step, step(pairs))  # gradients are there, and what is asked once
    present = nn.ModuleList([component.module, *(each.module for each in step.references.values())])
    with PeakBytes(present) as peak:
        accumulate_gradients(step, step(pairs))
    [source] = component.prompt_ids([rows[0]["report"]])
    [chosen, rejected] = component.lengths(component.observe([rows[0]["chosen"], rows[0]["rejected"]]))
    found = plan.estimate({"answer": (len(source), (chosen + rejected) // 2)}, engine="one_pass", device="cpu")
    assert 0.85 * found.step < peak.bytes < 1.15 * found.step


def test_what_decoding_takes_is_estimated_from_the_budget_of_tokens():
    component = Seq2Seq(*bart(max_position_embeddings=128, encoder_layers=4, decoder_layers=4), max_new_tokens=60)
    sources = ["a red cube and " * 12 + word for word in ("room", "cube", "words", "mine", "old", "two")]
    component.sample(sources[:1], generator=[0])
    longest = len(component.prompt_ids(sources)[0]) + 60
    estimated = component.decoding_bytes(rows=6, tokens=longest, device="cpu")
    with PeakBytes(component.module) as peak:
        component.sample(sources, generator=range(6))
    assert 0.5 * estimated < peak.bytes < 1.15 * estimated
