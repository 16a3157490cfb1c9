"""`python -m bench gpu`: what ended is kept, what passed is not run again, what does not fit is not begun."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is no installed package

from bench import gpu, measure


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device by name alone, and parts of moments."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(gpu, "RECORD", tmp_path / "runs.csv")
    parts = {
        "first": gpu.Part(("-c", "print('seen'); print()"), 20),
        "wrong": gpu.Part(("-c", "raise SystemExit('it is wrong')"), 20),
        "endless": gpu.Part(("-c", "import time; time.sleep(60)"), 1),
        "long": gpu.Part(("-c", "print('never')"), 10_000),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    return tmp_path / "runs.csv"


def test_each_part_is_kept_as_it_ended_and_only_what_did_not_pass_runs_again(device, capsys):
    names = ["--parts", "first", "wrong", "endless", "long"]
    with pytest.raises(SystemExit, match="1"):
        gpu.main(names)
    kept = [(row["part"], row["ended"], row["said"], row["gpu"]) for row in measure.read(device)]
    assert kept == [
        ("first", "passed", "seen", "some GPU"),
        ("wrong", "failed", "it is wrong", "some GPU"),
        ("endless", "stopped", "", "some GPU"),
    ]
    assert "long: not begun: 5" in capsys.readouterr().out
    gpu.main(["--parts", "first"])
    assert "first: passed before" in capsys.readouterr().out
    gpu.main(["--parts", "first", "--again"])
    assert [row["part"] for row in measure.read(device)] == ["first", "wrong", "endless", "first"]


def test_what_another_commit_or_device_showed_does_not_count(device, monkeypatch):
    gpu.main(["--parts", "first"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    gpu.main(["--parts", "first"])
    monkeypatch.setattr(gpu, "commit", lambda: "0123")
    gpu.main(["--parts", "first"])
    assert [row["part"] for row in measure.read(device)] == ["first"] * 3


def test_the_parts_are_commands_that_there_are():
    from bench import __main__ as front

    for part in gpu.PARTS.values():
        assert part.command[:2] in {("-m", "pytest"), ("-m", "bench")}
        assert part.command[1] == "pytest" or part.command[2] in front.COMMANDS
    assert max(part.limit for part in gpu.PARTS.values()) < 520


def test_without_a_device_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
