"""What grows with candidates, nodes, prompts and rows: the command, its slopes, its plots."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is no installed package

from bench import growth, measure, plots, step, tables


@pytest.fixture
def one_thread():
    yield ["--threads", "1", "--repeats", "1"]
    torch.set_num_threads(1)


def test_a_line_is_measured_beside_its_peers_and_drawn(one_thread, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    cases = [step.Case("two LLMs", k, True, size="narrow") for k in (2, 4)]
    monkeypatch.setitem(growth.STEPS, "k", cases)
    monkeypatch.setattr(step, "peak_mib", lambda case, name: case.candidates * (1.5 if name == "sysdag" else 3.0))
    growth.main([*one_thread, "--lines", "k", "--csv", str(tmp_path)])
    rows = measure.read(tmp_path / "growth-cpu.csv")
    assert [(row["at"], row["name"]) for row in rows] == [
        (at, name) for at in ("2", "4") for name in ("sysdag", "straightforward")
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    table = tables.growth_table(tmp_path)
    assert "| candidates k | sysdag | 2 to 4 |" in table
    assert "3 to 6 MiB | k^1.00 |" in table
    plots.main(folder=tmp_path, figures=tmp_path)
    assert "candidates k" in (tmp_path / "growth-k.svg").read_text()


def test_the_exponent_is_that_of_the_last_two_points():
    assert tables.exponent([1, 10, 100], [7.0, 3.0, 300.0]) == pytest.approx(2)
    assert tables.exponent([8, 16], [5.0, 5.0]) == 0


def test_prompts_have_the_length_that_their_line_says():
    for case in growth.STEPS["prompt"]:
        assert growth.at("prompt", case) == int(case.size.split()[1])


@pytest.mark.release("ten processes of whole commands")
def test_commands_are_measured_on_rows_of_data(one_thread, tmp_path):
    growth.main([*one_thread, "--lines", "rows", "--rows", "40", "80", "--csv", str(tmp_path)])
    rows = measure.read(tmp_path / "growth-cpu.csv")
    assert [(row["name"], row["at"]) for row in rows] == [(name, at) for name in growth.COMMANDS for at in ("40", "80")]
