"""Real servers: what they say to a decoder and to a judge, started by the tests on loopback.

vLLM draws; transformers serve and llama-cpp-python cannot, and it is said why. Each is skipped where its package is not
installed.
"""

import json
import math

import pytest
import real_servers
import torch
from peft import LoraConfig
from tiny import char_tokenizer, llama
from typer.testing import CliRunner

from sysdag import Trace
from sysdag.cli import app
from sysdag.components import CausalLM, Server
from sysdag.errors import DataError, EndpointError
from sysdag.traces.cells import Draw

QUESTIONS = ["What is the capital of France?", "Say hi.", "Name a colour."]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    llama(max_position_embeddings=2048).save_pretrained(folder)
    char_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serving(tiny_folder):
    with real_servers.transformers_serve(tiny_folder) as url:
        yield url


@pytest.fixture(scope="module")
def llama_cpp(smollm2_gguf):
    with real_servers.llama_cpp(smollm2_gguf) as url:
        yield url


def judged(url, model, folder):
    """`sysdag judge --by URL` over two runs of two questions; its output and the answers that it kept."""
    answers = [Draw(value) for value in ("Paris", "I do not know", "hello", "go away")]
    asked = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]]
    trace = Trace({"question": asked}, {"answer": answers}, {"prompt": [0, 0, 1, 1], "run": [0, 1, 0, 1]})
    trace.save(folder / "runs.jsonl")
    template = folder / "template.txt"
    template.write_text("{inputs}\n{first}\n{second}\n{criteria} End in VERDICT: A, VERDICT: B or VERDICT: TIE.")
    arguments = ["judge", str(folder / "runs.jsonl"), "--by", url, "--model", str(model), "--node", "answer",
                 "--retries", "0", "--request", '{"max_tokens": 8}', "--template", str(template),
                 "--output", str(folder / "pairs.jsonl")]  # fmt: skip
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    kept = (folder / "pairs.jsonl.answers.jsonl").read_text().splitlines()
    return " ".join(found.output.split()), [json.loads(line) for line in kept]


# transformers serve


def test_transformers_serve_takes_no_token_ids(serving, tiny_folder):
    lm = CausalLM(tiny_folder, max_new_tokens=4, decoder=Server(serving, str(tiny_folder), max_retries=0))
    with pytest.raises(EndpointError) as error:
        lm.sample(CHATS)
    said = str(error.value)
    assert "refused a completion of" in said
    assert "HTTP 422" in said
    assert "return_token_ids" in said
    assert "Another one serves as a judge" in said
    assert "Or decode here: decoder='local' or 'continuous'" in said


def test_transformers_serve_judges(serving, tiny_folder, tmp_path):
    said, kept = judged(serving, tiny_folder, tmp_path)
    assert len(kept) == 4
    assert all(answer["text"] or "an empty answer (finish_reason" in answer["problem"] for answer in kept)
    assert "2 comparisons in both orders" in said
    assert "an answer that could not be read" in said  # of random weights


# llama-cpp-python


def test_llama_cpp_takes_no_token_ids(llama_cpp, tiny_folder):
    lm = CausalLM(tiny_folder, max_new_tokens=4, decoder=Server(llama_cpp, max_retries=3))
    with pytest.raises(EndpointError) as error:
        lm.sample(CHATS)
    said = str(error.value)
    assert "refused a completion of" in said
    assert "Input should be a valid string" in said  # and not asked again, though it says 500
    assert "must take prompts as token ids" in said


@pytest.mark.slow
def test_llama_cpp_judges_with_a_real_model(llama_cpp, tmp_path):
    said, kept = judged(llama_cpp, "smollm2", tmp_path)
    assert len(kept) == 4
    assert any(answer["text"] and answer["text"].split() for answer in kept)
    assert "2 comparisons in both orders" in said


# vLLM


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf, tmp_path_factory):
    """The real model as a folder that any library loads; reading the GGUF file takes half a minute."""
    pytest.importorskip("gguf", reason="needs the package gguf (the extra `real`)")
    folder = tmp_path_factory.mktemp("smollm2")
    CausalLM(smollm2_gguf.parent, model_kwargs={"gguf_file": smollm2_gguf.name}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(request):
    if not request.config.getoption("release"):
        pytest.skip("only before a release (make test-all): vLLM takes a minute to start")
    with real_servers.vllm(request.getfixturevalue("smollm2")) as url:
        yield url


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.release("vLLM takes a minute to start")
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 20, "top_p": 0.8, "temperature": 1.3}, {"stop": ["the", " a"]}],
)
def test_vllm_draws_from_the_model_that_is_here(vllm, smollm2, options):
    server = Server(vllm, checked_draws=8, tolerance=2e-3, score_draws=True)
    lm = CausalLM(smollm2, max_new_tokens=24, decoder=server, **options)
    draws = lm.sample(CHATS * 2, generator=generator())
    own = lm.log_prob(CHATS * 2, draws)
    for draw, scored in zip(draws, own.tolist(), strict=True):
        assert math.isfinite(draw.log_prob)
        if not options.keys() & {"temperature", "top_k"}:
            assert draw.log_prob == pytest.approx(scored, abs=1e-2)
        assert not any(stop in draw.value for stop in options.get("stop", ()))


@pytest.mark.release("vLLM takes a minute to start")
def test_vllm_follows_an_adapter_as_it_trains(vllm, smollm2):
    server = Server(vllm, checked_draws=8, tolerance=2e-3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    lm = CausalLM(smollm2, max_new_tokens=16, peft_config=config, decoder=server)
    for step in range(3):
        lm.sample(CHATS, generator=generator(step))  # whose log-probabilities are compared with those here
        with torch.no_grad():
            for parameter in lm.own_parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator(step)) * 0.1)
    with pytest.raises(EndpointError, match="another adapter"):
        CausalLM(smollm2, max_new_tokens=16, decoder=Server(vllm, server_adapter(vllm))).sample(CHATS)


def server_adapter(url):
    """The adapter that a server has loaded."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/models", timeout=30) as response:
        [name] = [card["id"] for card in json.loads(response.read())["data"] if card["parent"]]
    return name


@pytest.mark.release("vLLM takes a minute to start")
def test_vllm_refuses_and_cuts(vllm, smollm2):
    with pytest.raises(DataError, match="maximum context length is 512.*Lower max_new_tokens") as error:
        CausalLM(smollm2, max_new_tokens=8, decoder=vllm).sample([*CHATS, "word " * 700])
    assert error.value.element == 3
    with pytest.raises(EndpointError, match=r"cut a completion at \d+ tokens, and max_new_tokens is 60"):
        CausalLM(smollm2, max_new_tokens=60, temperature=2.0, decoder=vllm).sample(["word " * 480])
    with pytest.raises(EndpointError, match="asked for 'nope', does not know it: .*does not exist"):
        CausalLM(smollm2, decoder=Server(vllm, "nope")).sample(CHATS)
    config = LoraConfig(r=64, target_modules=["q_proj"])
    with pytest.raises(EndpointError, match="LoRA rank 64 is greater than max_lora_rank 16.*--max-lora-rank"):
        CausalLM(smollm2, max_new_tokens=8, peft_config=config, decoder=vllm).sample(CHATS)


@pytest.mark.release("vLLM takes a minute to start")
def test_vllm_says_its_log_probabilities_before_the_temperature(vllm, smollm2):
    """What weighs a candidate must be of the distribution that it was drawn from: a server's own would be wrong."""
    lm = CausalLM(smollm2, max_new_tokens=16, temperature=2.0, decoder=Server(vllm, score_draws=True))
    draws = lm.sample(CHATS, generator=generator())
    raw = lm.log_prob(CHATS, draws).tolist()
    assert all(abs(draw.log_prob - own) > 1 for draw, own in zip(draws, raw, strict=True))
