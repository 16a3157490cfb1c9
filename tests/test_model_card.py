"""Model cards, and systems that go to the Hub and come from there (its client's calls recorded, no network)."""

import json
import os
import re
import shutil
import types
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import config, lora
from trained_systems import rows, two_llms
from transformers import Trainer

from sysdag import DiverseBeamSearch, Input, SerializationError, SysDPOTrainer, System, TrainingError, node
from sysdag.components import Categorical, CausalLM
from sysdag.files.hub import local_folder
from sysdag.files.run_files import read_log, read_run
from sysdag.saving.model_card import MARK, _table, write_card


def trained(folder, **options):
    trainer = SysDPOTrainer(
        two_llms(lora(), folder.parent / "base"),
        config(folder, objective="sampling", max_steps=2, **options),
        candidates=DiverseBeamSearch(num_candidates=2),
        train_dataset=rows(8),
        eval_dataset=rows(4),
    )
    trainer.train()
    return trainer


def body_of(folder):
    return ModelCard.load(folder / "README.md")


def test_the_card_tells_what_was_trained_how_on_what_and_with_what_result(tmp_path):
    trainer = trained(tmp_path / "out", beta=0.25, nodes={"answer": {"learning_rate": 1e-4}})
    metrics = trainer.evaluate()
    (tmp_path / "out" / "eval.json").write_text(
        json.dumps({"format_version": 1, "change": {"accuracy": 0.4375, "n": "x"}})
    )
    trainer.dataset_names = ["org/preferences", str(tmp_path)]
    trainer.save_model()
    card = body_of(tmp_path / "out")
    data = card.data.to_dict()
    assert data["library_name"] == "sysdag"
    assert data["tags"] == ["sysdag", "sysdpo", "dpo"]
    assert data["datasets"] == ["org/preferences"]
    assert "base_model" not in data  # both are local
    text = card.text
    assert trainer.system.compile().to_mermaid() in text
    assert "| `draft` | `CausalLM` | `draft` | `-` |" in text
    assert "| `answer (output)` | `CausalLM` | `answer` | `base` |" in text
    assert str(tmp_path) not in text
    assert "| `beta` | `0.25` |" in text
    assert '| `nodes` | `{"answer": {"learning_rate": 0.0001}}` |' in text
    assert "`diverse_beam_search`" not in text  # it stands in the options of the candidates:
    assert '| `candidates` | `{"strategy": "diverse_beam_search", "num_candidates": 2,' in text
    facts = read_run(tmp_path / "out")["data"]
    for name, pairs in (("train", 8), ("eval", 4)):
        assert f"| `{name}` | `{pairs}` | `{facts[name]['sha256']}` |" in text
    assert f"| `eval_rewards/margins` | `{metrics['eval_rewards/margins']:.4g}` |" in text
    assert "Evaluation at step 2" in text
    assert "| `change/accuracy` | `0.4375` |" in text
    assert "system = System.from_pretrained('out')" in text
    assert "`trained_systems`, which must be importable" in text
    assert "2502.17721" in text
    assert f"| `torch` | `{read_run(tmp_path / 'out')['versions']['torch']}` |" in text
    old = os.stat(tmp_path / "out" / "eval.json").st_mtime - 10_000
    os.utime(tmp_path / "out" / "eval.json", (old, old))  # of an earlier training in the folder
    trainer.save_model(tmp_path / "elsewhere")
    text = body_of(tmp_path / "elsewhere").text
    assert "change/accuracy" not in text
    assert "| `beta` | `0.25` |" in text
    assert "from_pretrained('elsewhere')" in text


def test_models_of_the_hub_are_listed_as_bases(tmp_path):
    outline = two_llms()
    named = outline.with_components({"draft": CausalLM("org/drafter"), "answer": CausalLM("org/refiner")})
    shared = outline.with_components(dict.fromkeys(("draft", "answer"), CausalLM("org/one", "org/tokenizer")))
    write_card(named, tmp_path)
    assert body_of(tmp_path).data.base_model == ["org/drafter", "org/refiner"]
    write_card(shared, tmp_path, tags=["mine"], license="mit", language="en")
    data = body_of(tmp_path).data
    assert data.base_model == ["org/one"]
    assert (data.license, data.language, data.tags) == ("mit", "en", ["sysdag", "sysdpo", "dpo", "mine"])
    write_card(shared, tmp_path)
    assert "mine" in body_of(tmp_path).data.tags  # kept from the card before


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\n---",
        "`` ` ```\n```",
        "a|b",
        "# head\n\n<b>x</b>",
        "x: [y",
        "'\"\\",
        "\u2028 \x07 ü",
        "{{ x }}",
    ],
)
def test_no_value_breaks_out_of_its_place(tmp_path, text):
    run = {
        "format_version": 1, "started": "2026-01-01T00:00:00+00:00", "status": f"failed: {text}",
        "config": {"objective": text, "beta": 0.1}, "candidates": {"strategy": text}, "versions": {text: text},
        "data": {"train": {"pairs": 1, "sha256": text}},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, f"eval_{text}": 1.0}) + "\n")
    write_card(two_llms(), tmp_path, run_folder=tmp_path, name=text, tags=[text], loads_from=text)
    written = (tmp_path / "README.md").read_text()
    _, front, body = (
        written.split("---\n", 2) if text[:3] != "---" else (None, *written.removeprefix("---\n").split("\n---\n", 1))
    )
    data = yaml.safe_load(front)
    assert data["tags"] == ["sysdag", "sysdpo", "dpo", text]
    assert set(data) == {"library_name", "tags"}
    assert ModelCard(written).data.tags == data["tags"]
    assert body.lstrip().startswith(MARK)
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(line.replace("\\|", "").split("|")) in (4, 5, 6)  # 2, 3 or 4 columns
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == 7, headings
    assert "<b>" not in body.split("## The system")[0]


@given(st.lists(st.text("ab`|\\ \n-<#", max_size=12), min_size=2, max_size=2))
def test_a_row_of_a_table_has_its_cells_whatever_they_hold(values):
    *_, row = _table("", ("one", "two"), [values]).splitlines()
    cells = re.split(r"(?<!\\)\|", row)
    assert len(cells) == 4
    for cell, value in zip(cells[1:3], values, strict=True):
        fence, inside = re.fullmatch(r" (`+)(.*[^`])\1 ", cell).groups()
        assert len(fence) not in map(len, re.findall("`+", inside))
        assert inside.replace("\\|", "|").split() == value.split()


def test_a_readme_of_the_users_own_is_left_alone(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# My project\n")
    trainer = SysDPOTrainer(two_llms(), config(tmp_path / "out", max_steps=1), train_dataset=rows(4))
    trainer.save_model()
    assert (tmp_path / "out" / "README.md").read_text() == "# My project\n"
    assert "out has a README.md that sysdag did not write" in caplog.text
    (tmp_path / "out" / "README.md").unlink()
    trainer.save_model()
    assert MARK in (tmp_path / "out" / "README.md").read_text()
    assert "from preferences" not in (tmp_path / "out" / "README.md").read_text()  # it has not been trained


def test_a_system_whose_functions_cannot_be_imported_says_how_to_load_it(tmp_path):
    question = Input("question")

    @node(Categorical(["yes", "no"], 2))
    def local(question):
        return [1.0, 2.0]

    write_card(System(question >> local), tmp_path)
    assert "system = system.load('" in body_of(tmp_path).text


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Records what is sent, and keeps the folders as the Hub would."""
    sent = types.SimpleNamespace(repositories=[], uploads=[], folder=tmp_path / "hub")

    def create_repo(self, repo_id, *, token=None, private=None, exist_ok=False, **others):
        assert exist_ok
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        sent.repositories.append((full, private, token))
        return types.SimpleNamespace(repo_id=full)

    def upload_folder(self, *, repo_id, folder_path, commit_message=None, path_in_repo="", run_as_future=False,
                      ignore_patterns=None, revision=None, token=None):  # fmt: skip
        place = sent.folder / repo_id / (path_in_repo or "")
        shutil.copytree(folder_path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*(ignore_patterns or ())))
        sent.uploads.append((repo_id, commit_message, path_in_repo))
        done = types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")
        if not run_as_future:
            return done
        return types.SimpleNamespace(done=lambda: True, result=lambda: done)

    def snapshot_download(repo_id, *, revision=None, token=None, ignore_patterns=None):
        if not (sent.folder / repo_id).is_dir():
            raise FileNotFoundError(f"Repository Not Found for url: {repo_id}\nmore")
        place = tmp_path / "cache" / f"{revision}"
        shutil.copytree(sent.folder / repo_id, place, ignore=shutil.ignore_patterns(*ignore_patterns))
        return str(place)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return sent


def answers(system):
    return system.compile().sample({"question": ["a1", "b2", "c3"]}, seed=3)["answer"]


def test_a_system_goes_to_the_hub_and_comes_back(tmp_path, hub):
    system = two_llms()
    address = system.push_to_hub("me/system", private=True, token="t", license="mit")
    assert address == "https://hub/me/system/commit/1"
    assert hub.repositories == [("me/system", True, "t")]
    card = body_of(hub.folder / "me" / "system")
    assert "System.from_pretrained('me/system')" in card.text
    assert card.data.license == "mit"
    assert answers(System.from_pretrained("me/system")) == answers(system)
    shutil.rmtree(tmp_path / "cache")
    assert answers(system.load("me/system")) == answers(system)
    with pytest.raises(
        SerializationError, match="There is no folder me/nothing, and the Hub gave no repository .*: Repository Not"
    ):
        System.from_pretrained("me/nothing")
    with pytest.raises(SerializationError, match="revision='main' is of a repository on the Hub; .* is none"):
        System.from_pretrained(tmp_path, revision="main")
    with pytest.raises(SerializationError, match=r"nothing/system.json does not exist; expected a folder"):
        System.from_pretrained(tmp_path / "nothing")


def test_a_hub_that_makes_no_repository_is_told_before_training(tmp_path, monkeypatch):
    def create_repo(self, *args, **options):
        raise ConnectionError("no route to the Hub\nmore")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    expected = r"The Hub did not make the repository 'out', which push_to_hub needs: no route to the Hub\. Check"
    with pytest.raises(TrainingError, match=expected):
        trained(tmp_path / "out", push_to_hub=True)


def test_the_trainer_pushes_a_system_that_loads_and_none_of_its_checkpoints(tmp_path, hub):
    trainer = trained(tmp_path / "out", save_strategy="steps", save_steps=1, trackio_space_id=None)
    trainer.push_to_hub(commit_message="Done", dataset_name="org/data", license="apache-2.0")
    assert hub.repositories == [("me/out", None, None)]
    assert hub.uploads == [("me/out", "Done", "")]
    place = hub.folder / "me" / "out"
    assert {path.name for path in place.iterdir()} == {
        "README.md", "answer", "draft", "system.json", "training_args.bin", "run.json", "log.jsonl"
    }  # fmt: skip
    assert answers(System.from_pretrained("me/out")) == answers(trainer.system)
    card = body_of(place)
    assert card.data.datasets == ["org/data"]
    assert card.data.license == "apache-2.0"
    assert "System.from_pretrained('me/out')" in card.text
    assert not (tmp_path / "cache" / "None" / "training_args.bin").exists()


def test_transformers_before_5_23_make_the_repository_without_private(tmp_path, monkeypatch):
    tokens = []

    def init_hf_repo(self, token=None):
        tokens.append(token)

    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    trainer = trained(tmp_path / "out", push_to_hub=True, hub_strategy="end")
    trainer.init_hf_repo(token="t")
    assert tokens == [None, "t"]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_a_training_that_pushes_as_it_goes_sends_the_weights_of_its_checkpoints(tmp_path, hub, strategy):
    """The branch of the Trainer that uploads `output_dir` at a save runs; the weights are those of the checkpoint."""
    trainer = trained(
        tmp_path / "out", save_strategy="steps", save_steps=1, push_to_hub=True, hub_strategy=strategy,
        hub_model_id="me/system", hub_always_push=True, learning_rate=0.05,
    )  # fmt: skip
    names = [message for _, message, _ in hub.uploads]
    if strategy == "end":
        assert names == []
    else:
        assert names[0] == "Training in progress, step 1"
        assert (("me/system", "Training in progress, step 2, checkpoint", "last-checkpoint") in hub.uploads) == (
            strategy == "checkpoint"
        )
        assert answers(System.from_pretrained("me/system")) == answers(trainer.system)
        assert len(read_log(hub.folder / "me" / "system")) == 2
    trainer.save_model()
    assert hub.uploads[-1] == ("me/system", "Model save", "")


def test_a_folder_of_this_disk_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: f"cache/{name}")
    assert local_folder("out/aligned") == Path("cache/out/aligned")
    Path("out/aligned").mkdir(parents=True)
    assert local_folder("out/aligned") == Path("out/aligned")
    with pytest.raises(SerializationError, match="revision='main' is of a repository on the Hub; out/aligned is none"):
        local_folder("out/aligned", revision="main")
