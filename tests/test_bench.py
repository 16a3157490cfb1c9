"""The benchmarks' front, the gate, and what docs/benchmarks.md and the plots take from the CSVs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no installed package

from bench import __main__ as front  # noqa: E402
from bench import linear_logprob, measure, overhead, plots, sweep, tables, token_logprob  # noqa: E402
from sysdag.ops import _head_walk  # noqa: E402


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tiny(monkeypatch):
    """token_logprob's and linear_logprob's benchmarks at sizes of milliseconds, on one thread."""
    monkeypatch.setattr(token_logprob, "SHAPES", [(5, 33, "float32")])
    case = linear_logprob.Case((6, 8, 40), "trained")
    monkeypatch.setattr(linear_logprob, "cases", lambda device: [case, case._replace(mode="frozen")])
    monkeypatch.setattr(linear_logprob, "peak_mib", lambda case, name: 1.5)
    yield ["--threads", "1", "--repeats", "3"]
    torch.set_num_threads(1)


def test_the_pages_tables_are_what_the_command_writes():
    text = tables.PAGE.read_text()
    assert tables.written(text) == text, "run: python -m bench tables"


def test_the_table_of_given_rows(tmp_path):
    """Every figure of a line, by hand."""
    lines = [
        "case,N,H,V,dtype,name,median_ms,peak_mib,cpu,gpu,cores,threads,torch",
        "frozen,2,3,4,float32,eager,300,40,A CPU,,4,2,2.13",
        'frozen,2,3,4,float32,"sysdag, 4 labels a row",1,1,A CPU,,4,2,2.13',
        "frozen,2,3,4,float32,sysdag,200,9.6,A CPU,,4,2,2.13",
        "frozen,2,3,4,float32,trl,150,99,A CPU,,4,2,2.13",
        "frozen,2,3,4,float32,slow,999,30,A CPU,,4,2,2.13",
        "frozen,2,3,4,float32,bare products: 2,50,,A CPU,,4,2,2.13",
        "trained,2,3,4,float32,eager,0.5,40,A CPU,,4,2,2.13",
        "trained,2,3,4,float32,sysdag,0.05,,A CPU,,4,2,2.13",
    ]
    (tmp_path / "linear_logprob-cpu.csv").write_text("\n".join(lines))
    text = tables.render(tmp_path)
    assert "A CPU, 2 of 4 cores, torch 2.13; `python -m bench op --csv`:" in text
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert table == [
        "| `linear_logprob` | frozen head; N 2, H 3, V 4; float32 "
        "| 200 ms | 300 ms (1.50x) | trl 150 ms (0.75x) | 10 / 40 / 30 | 25 % |",
        "| `linear_logprob` | trained head; N 2, H 3, V 4; float32 | 50 µs | 500 µs (10x) |  |  |  |",
    ]
    absent = "`token_logprob`, `preference_loss`, `diverse_beam_step`, `diffusion_error`"
    assert f"{absent}: not measured on a CPU yet." in text
    assert f"`linear_logprob`, {absent}: not run on a GPU yet." in text


def test_a_gpus_rows_appear_once_its_file_is_there(tmp_path):
    row = "256x3x32x32,float32,with reference,{},{},A CPU,A GPU,4,2,2.13"
    head = "shape,dtype,what,name,median_ms,cpu,gpu,cores,threads,torch"
    file = tmp_path / "diffusion_error-cuda.csv"
    file.write_text("\n".join([head, row.format("eager", 4), row.format("sysdag", 2)]))
    gpu = tables.table("cuda", tmp_path)
    assert "A GPU, torch 2.13; `python -m bench op --csv --device cuda`:" in gpu
    assert "| 2.0 ms | 4.0 ms (2.0x) |" in gpu
    assert gpu.endswith("`diverse_beam_step`: not run on a GPU yet.")
    assert "diffusion_error`:" not in gpu


def test_host_times_are_ratios_of_one_run(tmp_path, capsys):
    overhead.main(["--repeats", "3", "--csv", str(tmp_path)])
    rows = read(tmp_path / "overhead-cpu.csv")
    assert {row["op"] for row in rows} == {"token_logprob", "diffusion_error", "preference_loss"}
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(1 / float(row["times_plain torch"]))
        assert row["threads"] == "1"
    assert {row["name"] for row in rows} == {"sysdag", "plain torch", "shorter"}


def test_a_host_time_of_a_wrong_result_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead.ops, "token_logprob", lambda logits, labels: logits.sum(1))
    with pytest.raises(AssertionError, match="not close"):
        overhead.main(["--repeats", "1", "--csv", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_table_of_host_times(tmp_path):
    head = "op,what,in a row,name,median_ms,ratio,cpu,cores,threads,torch"
    line = "token_logprob,logits 4x16,100,{},{},{},A CPU,2,1,2.13"
    rows = [line.format(*each) for each in (("sysdag", 0.1, 1.25), ("plain torch", 0.08, 1), ("shorter", 0.06, 0.75))]
    rows.append("preference_loss,2 pairs,100,sysdag,0.03,0.5,A CPU,2,1,2.13")
    rows.append("preference_loss,2 pairs,100,plain torch,0.06,1,A CPU,2,1,2.13")
    (tmp_path / "overhead-cpu.csv").write_text("\n".join([head, *rows]))
    text = tables.overhead_table(tmp_path).splitlines()
    assert text[0] == "A CPU, 1 of 2 cores, torch 2.13; `python -m bench overhead --csv`:"
    assert text[-2] == "| `token_logprob` | logits 4x16 | 100 µs | 80 µs | 1.25x | 60 µs |"
    assert text[-1] == "| `preference_loss` | 2 pairs | 30 µs | 60 µs | 0.50x |  |"
    assert tables.overhead_table(tmp_path / "none") == "Host time: not measured on a CPU yet."


def test_markers():
    START, END = "<!-- bench:ops -->", "<!-- /bench:ops -->"
    text = f"a\n{START}\nold\n{END}\nb"
    assert tables.replaced(text, "new") == f"a\n{START}\nnew\n{END}\nb"
    for broken in ("no markers", f"{START} alone", f"{END}{START}", text + text):
        with pytest.raises(ValueError, match="benchmarks.md needs <!-- bench:ops -->"):
            tables.replaced(broken, "new")


def test_an_ops_benchmark_runs_and_writes_its_rows(tiny, tmp_path, capsys):
    token_logprob.main([*tiny, "--peers", "cross_entropy", "--csv", str(tmp_path)])
    rows = read(tmp_path / "token_logprob-cpu.csv")
    names = ["log_softmax+gather", "cross_entropy", "sysdag", "sysdag inplace"]
    assert [row["name"] for row in rows] == names * 2
    for row in rows:
        assert row["repeats"] == "3"
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
    assert "wrote" in capsys.readouterr().out


def test_peers_keeps_sysdag_and_the_baseline(tiny, tmp_path):
    token_logprob.main([*tiny, "--peers", "--csv", str(tmp_path)])
    rows = read(tmp_path / "token_logprob-cpu.csv")
    assert {row["name"] for row in rows} == {"log_softmax+gather", "sysdag", "sysdag inplace"}


@pytest.mark.parametrize("wrong", ["result", "gradient"])
def test_the_gate_reports_no_speed_for_a_wrong_result(tiny, tmp_path, monkeypatch, wrong):
    def near(logits, labels, **options):
        right = token_logprob.log_softmax_gather(logits, labels)
        return right + 1e-4 if wrong == "result" else right + 1e-4 * (right - right.detach())

    monkeypatch.setattr(token_logprob, "token_logprob", near)
    named = "log-probabilities" if wrong == "result" else "gradient"
    with pytest.raises(SystemExit, match=f"sysdag, {named}: error .*; no speed is reported for a wrong result"):
        token_logprob.main([*tiny, "--peers", "--csv", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_linear_logprobs_gate(tiny, monkeypatch):
    monkeypatch.setattr(linear_logprob, "ours", lambda problem: 1.0001 * linear_logprob.eager(problem))
    with pytest.raises(SystemExit, match="linear_logprob, trained, log-probabilities: error"):
        linear_logprob.main([*tiny, "--peers"])


def test_the_floor_and_the_kept_tiles_are_in_linear_logprobs_rows(tiny, tmp_path, capsys):
    linear_logprob.main([*tiny, "--peers", "liger-kernel (mean only)", "--csv", str(tmp_path)])
    assert "left out: liger-kernel (mean only): its kernels need CUDA" in capsys.readouterr().out
    rows = read(tmp_path / "linear_logprob-cpu.csv")
    ours = ["sysdag", "sysdag, 4 labels a row"]
    assert [(row["case"], row["name"]) for row in rows] == [
        *(("trained", name) for name in (*ours, "sysdag, all tiles kept", "eager", "bare products: 3")),
        *(("frozen", name) for name in (*ours, "eager", "bare products: 2")),
    ]
    for row in rows:
        floor = next(float(r["median_ms"]) for r in rows if r["case"] == row["case"] and r["name"].startswith("bare"))
        assert float(row["share_of_floor"]) == pytest.approx(floor / float(row["median_ms"]))
        assert row["peak_mib"] == ("" if row["name"].startswith("bare") else "1.5")


def test_all_tiles_kept_keeps_all_and_leaves_the_budget_as_it_was(monkeypatch):
    problem = linear_logprob.Problem(linear_logprob.Case((40, 8, 5000), "trained"))
    kept = []
    plain = _head_walk.tiles_kept

    def recorded(*args):
        kept.append(plain(*args))
        return kept[-1]

    monkeypatch.setattr(_head_walk, "tiles_kept", recorded)
    monkeypatch.setattr(_head_walk, "_ELEMENTS", {"cpu": 1})  # tiles of 1024 tokens: 5 of them
    monkeypatch.delenv(_head_walk.KEEP_VARIABLE, raising=False)
    for function in (linear_logprob.ours, linear_logprob.all_kept, linear_logprob.ours):
        problem.run(function)
    assert kept == [2, 5, 2]
    monkeypatch.setenv(_head_walk.KEEP_VARIABLE, "0")
    _head_walk._keep_budget.cache_clear()
    for function in (linear_logprob.all_kept, linear_logprob.ours):
        problem.run(function)
    assert kept[3:] == [5, 0]
    assert os.environ[_head_walk.KEEP_VARIABLE] == "0"
    _head_walk._keep_budget.cache_clear()


@pytest.mark.parametrize("name", ["sysdag, all tiles kept", "F.linear_cross_entropy, chunked", "trl"])
def test_peers_compute_the_same(name):
    if name.startswith("F.") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch before 2.13 has no chunked cross entropy")
    if name == "trl":
        pytest.importorskip("trl.kernels.chunked_logprob")
    problem = linear_logprob.Problem(linear_logprob.Case((7, 8, 50), "trained"))
    expected, found = problem.run(linear_logprob.eager), problem.run(linear_logprob.FUNCTIONS[name])
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_sweep_measures_both_lines_and_is_drawn_with_its_floors(tiny, tmp_path, monkeypatch):
    assert sweep.LINES["cpu"].shapes() == [(N, 512, 32000) for N in (512, 1024, 2048, 4096)] + [
        (1024, 512, 8000),
        (1024, 512, 128000),
    ]
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sweep.LINES, "cpu", sweep.Lines(8, (4, 8, 16), 40, (20, 40), 8))
    sweep.main([*tiny, "--csv", str(tmp_path)])
    rows = read(tmp_path / "sweep-cpu.csv")
    assert [row["name"] for row in rows[:3]] == ["sysdag", "eager", "bare products: 2"]
    assert len(rows) == 2 * 4 * 3
    frozen = [row for row in rows if row["case"] == "frozen" and row["name"] == "sysdag"]
    assert [row["N"] for row in plots.lines(frozen, "N")] == ["4", "8", "16"]
    assert [row["V"] for row in plots.lines(frozen, "V")] == ["20", "40"]
    plots.main(folder=tmp_path, figures=tmp_path / "figures")
    assert (tmp_path / "figures" / "linear_logprob-cpu.svg").read_text().count("<path") > 50


def test_the_memorys_floor():
    row = {"N": "2048", "H": "512", "V": "32000", "dtype": "float32", "case": "frozen"}
    assert plots.gradients_mib(row) == 4
    assert plots.gradients_mib(row | {"case": "trained", "dtype": "bfloat16"}) == 2 + 31.25


def test_without_a_sweep_nothing_is_drawn(tmp_path, capsys):
    plots.main(folder=tmp_path, figures=tmp_path)
    assert "has no sweep-*.csv; python -m bench sweep --csv measures it" in capsys.readouterr().out


def test_unknown_commands_are_refused():
    with pytest.raises(SystemExit, match=r"no command 'linear'.*\n\n.*\n\n.*linear_logprob  "):
        front.main(["linear"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token_logprob", "--peers", "trl"], "has no peer 'trl'; there are: 'cross_entropy', 'torch.compile'"),
        (["op", "--peers", "triton"], "op has no peer 'triton'; there are: 'torch.compile', 'F.linear_cross"),
        (["token_logprob", "--csv", "here.csv"], "--csv takes a folder, got 'here.csv'"),
        (["decode", "--device", "cuda"], "invalid choice: 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        front.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def commands(monkeypatch):
    """Those that a group starts, in place of starting them."""
    found = []

    def run(command):
        found.append(command[3:])
        return subprocess.CompletedProcess(command, returncode=int(command[3] == "preference_loss"))

    monkeypatch.setattr(front.subprocess, "run", run)
    yield found
    torch.set_num_threads(1)  # it counted the cores before it started any


def test_a_group_hands_each_member_its_own_peers(commands):
    with pytest.raises(SystemExit, match="failed: preference_loss;"):
        front.main(["op", "--peers", "trl", "cross_entropy", "--repeats", "2", "--csv"])
    assert [command[0] for command in commands] == list(front.OPS)
    common = ["--device", "cpu", "--repeats", "2", "--csv", str(measure.RESULTS), "--peers"]
    assert commands[:3] == [
        ["linear_logprob", *common, "trl"],
        ["token_logprob", *common, "cross_entropy"],
        ["preference_loss", *common],
    ]


def test_all_leaves_decoding_out_where_its_peer_is_missing(commands, capsys):
    with pytest.raises(SystemExit, match="failed: preference_loss"):
        front.main(["all"])
    assert "beam_search" not in [command[0] for command in commands]
    assert "beam_search is left out: it needs a CPU and --peer-python" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="failed: preference_loss"):
        front.main(["all", "--peer-python", "peer/bin/python"])
    assert commands[-1] == ["beam_search", "--device", "cpu", "--peer-python", "peer/bin/python"]
