"""Servers over time: which model and adapter is asked for, candidates, failures, keys, and what is kept.

The server is the stand-in of `vllm_stand_in`.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from served_models import MODEL, PROMPTS, TOKENIZER, changed, component, generator, stand_in
from tiny import llama
from vllm_stand_in import RECORDED, VllmStandIn

from sysdag import ImportanceSampling, MonteCarlo, PlanError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM, Server
from sysdag.errors import DataError, EndpointError
from sysdag.execution.batches import load as load_component
from sysdag.graph.variables import Input

KEY = "sk-never-to-be-seen-0123456789"
pytestmark = pytest.mark.usefixtures("no_waits")


# Models and adapters


def test_which_model_is_asked_for():
    with VllmStandIn({"base": MODEL, "lora": MODEL}, TOKENIZER) as server:
        component(server).sample(["ab"], generator=generator())
        component(server, model="lora").sample(["ab"], generator=generator())
        assert [request["model"] for request in server.asked()] == ["base", "lora"]
        with pytest.raises(EndpointError, match=r"asked for 'nope', does not know it: .*serves \['base', 'lora'\]"):
            component(server, model="nope").sample(["ab"])


def test_an_adapter_is_loaded_by_its_weights_and_again_when_they_change(tmp_path):
    def load(folder):
        return PeftModel.from_pretrained(llama(), folder).eval()

    config = LoraConfig(r=2, target_modules=["q_proj"])
    with stand_in(load=load) as server:
        lm = component(server, weights=llama(), adapter=config, checked_draws=8, tolerance=1e-4, adapter_dir=tmp_path)
        lm.sample(PROMPTS, generator=generator())
        lm.sample(PROMPTS, generator=generator())
        assert len(server.asked("/v1/load_lora_adapter")) == 1
        with torch.no_grad():
            for parameter in lm.own_parameters().values():
                parameter.add_(0.3)
        lm.sample(PROMPTS, generator=generator())
        first, second = (request["lora_name"] for request in server.asked("/v1/load_lora_adapter"))
        assert first != second
        assert [request["lora_name"] for request in server.asked("/v1/unload_lora_adapter")] == [first]
        assert [request["model"] for request in server.asked()] == [first] * 6 + [second] * 3
        assert len(list(tmp_path.iterdir())) == 1


def test_no_folder_of_an_adapter_is_left_when_the_process_ends(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from peft import LoraConfig
from served_models import PROMPTS, component, llama, stand_in
with stand_in(load=lambda folder: llama()) as server:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    component(server, weights=llama(), adapter=config, adapter_dir={str(tmp_path)!r}).sample(PROMPTS)
print(len(list(__import__("pathlib").Path({str(tmp_path)!r}).iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_loads_no_adapters_says_how_it_would():
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with stand_in() as server, pytest.raises(EndpointError, match="--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        component(server, weights=llama(), adapter=config).sample(PROMPTS)


def test_a_folder_that_the_server_does_not_see_is_named(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with stand_in(load=lambda folder: None) as server:
        server.answer = lambda path, body: (404, {}, RECORDED["no_adapter"])
        with pytest.raises(
            EndpointError, match=r"does not load the adapter in .*must see that folder \(Server\(adapter"
        ):
            component(server, weights=llama(), adapter=config, adapter_dir=tmp_path).sample(PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_server_cannot_follow_are_refused():
    model = llama()
    with stand_in() as server:
        lm = component(server, weights=model)
        lm.sample(PROMPTS, generator=generator())
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.001)
        with pytest.raises(EndpointError, match="its weights have changed since .* Train an adapter"):
            lm.sample(PROMPTS, generator=generator())


def test_a_frozen_node_is_not_held_to_another_nodes_adapter_on_the_same_model():
    shared = llama()
    with stand_in() as server:
        frozen = component(server, weights=shared)
        trained = component(server, weights=shared, adapter=LoraConfig(r=2, target_modules=["q_proj"]))
        assert trained.module is frozen.module
        frozen.sample(PROMPTS, generator=generator())
        with torch.no_grad():
            for parameter in trained.own_parameters().values():
                parameter.add_(0.3)
        frozen.sample(PROMPTS, generator=generator())


# Candidates


def asked(question):
    return f"q {question}"


def two_nodes(server, **options):
    @node(component(server, max_new_tokens=4, **options))
    def draft(question):
        return f"q {question}"

    @node(CausalLM(MODEL, TOKENIZER, max_new_tokens=4))
    def answer(draft):
        return f"a {draft}"

    question = Input("question")
    return System(question >> draft, draft >> answer).compile()


def test_importance_weights_need_log_probabilities_of_ours():
    rows = {"question": ["ab", "cd"]}
    with stand_in() as server:
        plan = two_nodes(server)
        found = MonteCarlo(num_candidates=3).draw(plan, rows, generator())
        assert found.log_proposal is None
        with pytest.raises(PlanError, match=r"the draws of \['draft'\] have no log-probability.*score_draws=True"):
            ImportanceSampling(num_candidates=3).draw(plan, rows, generator())
        scored = two_nodes(server, score_draws=True)
        weighed = ImportanceSampling(num_candidates=3, temperature=1.5).draw(scored, rows, generator())
    lm = scored.system["draft"].component
    for weight, cell, row in zip(weighed.log_weight, weighed.trace.cells["draft"], weighed.prompt, strict=True):
        [prompt] = lm.prompt_ids([f"q {rows['question'][row]}"])
        with torch.no_grad():
            logits = MODEL(torch.tensor([[*prompt, *cell.record["token_ids"]]])).logits[0, len(prompt) - 1 : -1]
        steps = (logits / 1.5).log_softmax(-1)
        log_q = sum(float(steps[place, token]) for place, token in enumerate(cell.record["token_ids"]))
        assert weight == pytest.approx(-log_q - torch.tensor(3.0).log().item(), abs=1e-4)


def test_errors_name_the_node():
    with stand_in(change=changed(token_ids=None)) as server:
        plan = two_nodes(server, max_retries=0)
        with pytest.raises(EndpointError, match="^Node 'draft': CausalLM"):
            plan.sample({"question": ["ab"]}, seed=0)
        with pytest.raises(EndpointError, match="^Node 'draft': CausalLM"):
            MonteCarlo(num_candidates=2).draw(plan, {"question": ["ab"]})


def test_a_prompt_that_is_refused_alone_is_a_fault_of_its_row():
    def change(reply, body):
        return (400, {}, RECORDED["too_long"]) if len(body["prompt"]) > 20 else reply

    with stand_in(change=change) as server:
        plan = two_nodes(server)
        with pytest.raises(DataError, match="^Node 'draft', row 1: .*maximum context length.*Lower max_new_tokens"):
            plan.sample({"question": ["ab", "x" * 30, "cd"]}, seed=0)


def test_training_draws_its_candidates_with_the_adapter_of_each_step(tmp_path):
    """A stale adapter would be seen: every draw's log-probabilities are compared with those of the weights here."""

    def load(folder):
        return PeftModel.from_pretrained(llama(), folder).eval()

    def prompt(question):
        return f"q {question}"

    def refine(draft):
        return f"a {draft}"

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with stand_in(load=load) as server:
        drafter = component(
            server, weights=llama(), adapter=config, max_new_tokens=4, checked_draws=99, tolerance=1e-4,
            adapter_dir=tmp_path / "adapters",
        )  # fmt: skip
        refiner = CausalLM(llama(1), TOKENIZER, max_new_tokens=4, peft_config=config)
        draft, answer = node(drafter, name="draft")(prompt), node(refiner, name="answer")(refine)
        arguments = SysDPOConfig(
            output_dir=str(tmp_path / "run"), objective="sampling", max_steps=3, per_device_train_batch_size=2,
            learning_rate=0.05, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
        )  # fmt: skip
        rows = [{"question": text, "chosen": "yes", "rejected": "no"} for text in ("ab", "cd", "ef", "gh")]
        trainer = SysDPOTrainer(
            model=System(Input("question") >> draft, draft >> answer), args=arguments, train_dataset=rows,
            candidates=MonteCarlo(num_candidates=3),
        )  # fmt: skip
        trainer.train()
        loaded = [request["lora_name"] for request in server.asked("/v1/load_lora_adapter")]
        drawn = list(dict.fromkeys(request["model"] for request in server.asked()))
    assert len(set(loaded)) == len(loaded) == 3  # as often as there are steps
    assert drawn == loaded
    record = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))
    assert server.url not in record


# Servers that fail, keys


def test_a_failing_server_is_asked_again_and_a_dead_one_named():
    gone = (410, {}, "it has stopped.")
    with stand_in(change=lambda *_: gone) as server, pytest.raises(EndpointError, match="HTTP 410 .*it has stopped"):
        component(server).sample(PROMPTS * 3)
    fails = itertools.cycle([True, True, False])

    with stand_in(change=lambda reply, body: (503, {}, "starting") if next(fails) else reply) as server:
        assert len(component(server).sample(PROMPTS, generator=generator())) == 3
        url = server.url
    with pytest.raises(
        EndpointError, match=r"gave no answer in 2 tries: ConnectionRefusedError.*Is it running there\?"
    ):
        component(url, max_retries=1).sample(PROMPTS)


def test_a_key_is_read_when_it_is_used_and_stays_out_of_everything_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SERVER_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", f"other-{KEY}")
    with stand_in() as server:
        lm = component(server, api_key_env="MY_SERVER_KEY")
        draws = lm.sample(PROMPTS, generator=generator())
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        server.headers.clear()
        component(server).sample(PROMPTS, generator=generator())
        assert all("Authorization" not in headers for headers in server.headers)
        with pytest.raises(
            EndpointError, match="OPENAI_API_KEY .* holds a key of openai.com, which is not sent to 127"
        ):
            component(server, api_key_env="OPENAI_API_KEY").sample(PROMPTS)
        System(Input("question") >> node(lm, name="draft")(asked)).save_pretrained(tmp_path / "saved")
    kept = [path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert kept
    assert not any(KEY.encode() in each or server.url.encode() in each for each in kept)
    assert KEY not in repr(vars(lm)) + json.dumps([dict(draw.record) for draw in draws])


def test_a_saved_system_draws_where_it_is_loaded(tmp_path):
    with stand_in() as server:
        lm = component(server)
        options = lm.save_pretrained(tmp_path / "lm")
    again = CausalLM.from_pretrained(tmp_path / "lm", json.loads(json.dumps(options)))
    assert again.decoder == "local"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "decoder: '127.0.0.1:8000' is no http"),
        ({"url": f"http://user:{KEY}@host/v1"}, "holds credentials"),
        ({"url": "http://host/v1", "concurrency": 0}, "concurrency >= 1"),
        ({"url": "http://host/v1", "timeout": 0}, "timeout > 0"),
        ({"url": "http://host/v1", "max_retries": -1}, "max_retries >= 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(PlanError, match=message) as error:
        Server(**options)
    assert KEY not in str(error.value)


def test_a_url_alone_is_a_server():
    assert CausalLM("anything", decoder="http://host:8000/v1").decoder == Server("http://host:8000/v1")


def test_without_checks_no_weights_are_loaded(tmp_path):
    llama().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with stand_in() as server:
        lm = CausalLM(tmp_path, max_new_tokens=4, decoder=Server(server.url, checked_draws=0))
        load_component("draft", lm, "cpu")
        lm.sample(["ab"], generator=generator())
        assert not lm.lm.is_loaded
        checked = CausalLM(tmp_path, max_new_tokens=4, decoder=Server(server.url))
        load_component("draft", checked, "cpu")
        assert checked.lm.is_loaded
