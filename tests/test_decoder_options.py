"""`sysdag sample --decoder`: what draws each language model of a system, and runs that a server left unfinished."""

import json
from pathlib import Path

import pytest
import sampled_systems
import served_systems
from served_systems import MODEL, TOKENIZER
from typer.testing import CliRunner
from vllm_stand_in import VllmStandIn

from sysdag import Trace
from sysdag.cli import app

SYSTEM = f"{Path(served_systems.__file__)}:system"
KEY = "sk-never-to-be-seen-0123456789"
pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "inputs.jsonl"
    file.write_text("".join(json.dumps({"question": f"what is {letter}"}) + "\n" for letter in "abcdef"))
    return file


def sample(rows, output, *options, system=SYSTEM, code=0):
    arguments = ["sample", system, str(rows), "--output", str(output), "--batch-size", "2", *map(str, options)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def served(**options):
    return VllmStandIn({"base": MODEL}, TOKENIZER, **options)


def test_a_server_draws_for_every_language_model(rows, tmp_path):
    with served() as server:
        sample(rows, tmp_path / "runs.jsonl", "--decoder", server.url)
        assert len(server.asked()) == 12
    trace = Trace.from_jsonl(tmp_path / "runs.jsonl")
    assert all(cell.log_prob is None and cell.record["token_ids"] for cell in trace.cells["answer"])
    assert all(cell.log_prob is not None for cell in trace.cells["choice"])
    assert served_systems.system["draft"].component.decoder == "local"


def test_a_node_may_have_a_decoder_of_its_own(rows, tmp_path):
    with VllmStandIn({"base": MODEL, "tuned": MODEL}, TOKENIZER) as server:
        sample(rows, tmp_path / "a.jsonl", "--decoder", "continuous", "--decoder", f"answer={server.url}",
               "--model", "answer=tuned")  # fmt: skip
        assert [request["model"] for request in server.asked()] == ["tuned"] * 6
    trace = Trace.from_jsonl(tmp_path / "a.jsonl")
    assert all(cell.log_prob is not None for cell in trace.cells["draft"])
    sample(rows, tmp_path / "b.jsonl", "--decoder", "local")
    sample(rows, tmp_path / "c.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "system", "message"),
    [
        (["--decoder", "vllm"], SYSTEM, "decoder must be 'local', 'continuous', a server's URL"),
        (["--decoder", "choice=continuous"], SYSTEM, "'choice' is none of the language models, ['draft', 'answer']"),
        (["--decoder", "drfat=local"], SYSTEM, "'drfat' is none of the language models"),
        (["--model", "base"], SYSTEM, "--model belongs to a server: --decoder http://"),
        (["--decoder", "continuous", "--timeout", "3"], SYSTEM, "--timeout belongs to a server"),
        (
            ["--decoder", "draft=http://127.0.0.1:9/v1", "--model", "answer=x"],
            SYSTEM,
            "there is no server of that node",
        ),
        (["--decoder", "http://u:p@127.0.0.1:9/v1"], SYSTEM, "holds credentials"),
        (["--decoder", "local"], f"{sampled_systems.__file__}:looped", "the system has none"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, system, message, rows, tmp_path):
    output = CliRunner().invoke(
        app, ["sample", system, str(rows), "--output", str(tmp_path / "o.jsonl"), *options], env={"COLUMNS": "400"}
    )
    assert output.exit_code in (1, 2)
    assert message in " ".join(output.output.replace("│", " ").split())
    assert not (tmp_path / "o.jsonl").exists()


def test_a_run_whose_server_died_goes_on_at_another_one(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVER_KEY", KEY)
    runs = tmp_path / "runs.jsonl"
    options = ["--retries", 1, "--runs", 2, "--api-key-env", "MY_SERVER_KEY"]
    answered = []

    def dies(reply, body):
        answered.append(body)
        return reply if len(answered) <= 10 else (503, {}, "the engine is dead")

    with served(change=dies) as server:
        said = sample(rows, runs, "--decoder", server.url, *options, code=1)
        first = server.url
    assert "gave no answer in 2 tries: HTTP 503" in said
    assert "'draft'" in said or "'answer'" in said
    left = runs.read_bytes()
    assert len(left.splitlines()) == 4  # two batches of two nodes are eight requests
    with served() as server:
        said = sample(rows, runs, "--decoder", server.url, *options, "--resume")
        assert len(server.asked()) == 16
        assert first != server.url
    assert runs.read_bytes().startswith(left)
    trace = Trace.from_jsonl(runs)
    assert list(zip(trace.columns["prompt"], trace.columns["run"], strict=True)) == [
        (p, r) for p in range(6) for r in (0, 1)
    ]
    kept = runs.read_text() + Path(f"{runs}.run.json").read_text()
    assert KEY not in kept
    assert "127.0.0.1" not in kept


def test_a_run_does_not_go_on_with_another_kind_of_decoder(rows, tmp_path):
    runs = tmp_path / "runs.jsonl"
    with served() as server:
        sample(rows, runs, "--decoder", f"draft={server.url}", "--limit", 4)
    said = sample(rows, runs, "--resume", code=1)
    assert "decoder draft was 'server', and is now 'local'" in said


def test_a_run_of_a_time_without_decoders_goes_on(rows, tmp_path):
    runs = tmp_path / "runs.jsonl"
    sample(rows, runs)
    side = Path(f"{runs}.run.json")
    facts = json.loads(side.read_text())
    assert facts.pop("decoder") == {"draft": "local", "answer": "local"}
    side.write_text(json.dumps(facts))
    whole = runs.read_bytes()
    runs.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    sample(rows, runs, "--resume")
    assert runs.read_bytes() == whole


def test_a_row_that_the_server_refuses_is_left_out(rows, tmp_path):
    def refuses(reply, body):
        is_fourth = TOKENIZER.decode(body["prompt"]) == "q what is d"
        return (400, {}, '{"error":{"message":"maximum context length"}}') if is_fourth else reply

    with served(change=refuses) as server:
        said = sample(rows, tmp_path / "runs.jsonl", "--decoder", server.url, "--on-error", "skip")
    assert "Skipped 1 of 6 rows" in said
    assert "Row 3" in said
    assert Trace.from_jsonl(tmp_path / "runs.jsonl").columns["prompt"] == [0, 1, 2, 4, 5]
