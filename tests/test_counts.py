"""What a step asks of its device does not rise: launches, synchronisations, tokens and head rows, against the CSV."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no installed package

from bench import counts, measure, tables  # noqa: E402
from bench.counting import Counter  # noqa: E402
from bench.step_systems import Case, Step  # noqa: E402
from sysdag.engine import step  # noqa: E402
from sysdag.engine.host_copy import to_host  # noqa: E402

RECORDED = measure.read(measure.RESULTS / "counts-cpu.csv")
OURS = ("sysdag", "one pass")
CASES = [
    Case("one LLM", 1, lora=True, nodes=1, pairs=2, size="narrow"),
    Case("one LLM", 1, lora=False, nodes=1, pairs=2, size="narrow"),
    Case("two LLMs", 4, lora=True, size="narrow"),
    Case("chain", 2, lora=False, nodes=6, size="narrow"),
]


def recorded(case, name):
    key = {"system": case.system, "nodes": case.nodes, "k": case.candidates, "trained": case.trained, "layers": 4}
    (row,) = (row for row in RECORDED if all(row[k] == str(v) for k, v in {**key, "name": name}.items()))
    return {what: int(row[what]) for what in counts.HELD}


def risen(case, found, name):
    """What is more than the CSV has."""
    return {what: (most, found[what]) for what, most in recorded(case, name).items() if found[what] > most}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.system}, {case.nodes}, {case.trained}")
def test_a_steps_counts_do_not_rise(case):
    made = Step(case)
    for name in OURS:
        assert not risen(case, counts.count(made, name), name), "recorded, found; python -m bench counts --csv"


def test_one_more_read_of_a_number_is_seen(monkeypatch):
    plain = step.score

    def reads(*arguments, **options):
        found = plain(*arguments, **options)
        next(iter(found.graphs.values())).mean().item()
        return found

    monkeypatch.setattr(step, "score", reads)
    assert risen(CASES[0], counts.count(Step(CASES[0]), "one pass"), "one pass")["synchronisations"] == (1, 2)


def test_a_step_waits_for_its_device_once():
    """Whatever its size, for the scores; loss, metrics and coefficients come of them on the host."""
    assert {row["synchronisations"] for row in RECORDED if row["name"] in OURS} == {"1"}


@pytest.mark.parametrize(("way", "most"), [("one pass", 1.05), ("sysdag", 1.30)])
def test_a_steps_launches_are_about_those_of_the_straightforward_one(way, most):
    launches: dict[str, list[int]] = {name: [] for name in (way, "straightforward")}
    for row in RECORDED:
        if row["name"] in launches:
            launches[row["name"]].append(int(row["launches"]))
    ratios = [own / plain for own, plain in zip(*launches.values(), strict=True)]
    assert ratios
    assert max(ratios) <= most


def test_what_is_counted_of_a_few_operations():
    """By hand: a linear layer, an embedding, host arithmetic, and each way to wait."""
    table, linear = nn.Embedding(7, 3), nn.Linear(3, 5, bias=False)
    ids = torch.tensor([1, 2, 2, 6])

    def counted(work):
        counter = Counter([table, linear], [linear.weight])
        with torch.no_grad(), counter.counting():
            work()
        figures = (counter.launches, counter.synchronisations, counter.uploads, counter.tokens, counter.head_rows)
        return figures, counter.peak_bytes

    device = torch.device("cpu")
    on_host = counted(lambda: (ids + 1).sum().item())
    assert on_host == ((0, 0, 0, 0, 0), 0)
    figures, peak = counted(lambda: linear(table(ids.to(device, non_blocking=True))))
    assert figures == (2, 0, 1, 4, 4)
    assert counted(lambda: ids.to(device))[0][:3] == (0, 1, 1)
    assert peak == 4 * (4 * 3) + 4 * (4 * 5)  # the embedded and the logits; the copied ids are gone by then
    weight = linear.weight
    waits = {
        "item": lambda: weight.sum().item(), "bool": lambda: bool(weight.sum() > 0), "cpu": lambda: weight.cpu(),
        "tolist": lambda: weight.tolist(), "numpy": lambda: weight.detach().numpy(),
        "nonzero": lambda: weight.nonzero(), "mask": lambda: weight[weight > 0],
        "equal": lambda: torch.equal(weight, weight),
    }  # fmt: skip
    assert {name: counted(work)[0][1] for name, work in waits.items()} == dict.fromkeys(waits, 1)
    free = {
        "view": lambda: weight.view(-1)[2:].t().detach(), "empty": lambda: torch.empty_like(weight),
        "shape": lambda: len(weight),
    }  # fmt: skip
    assert {name: counted(work)[0][:2] for name, work in free.items()} == dict.fromkeys(free, (0, 0))


def test_numbers_come_to_the_host_in_one_copy_and_as_they_are():
    given = [torch.randn(2, 3, requires_grad=True), torch.tensor([True, False]), torch.zeros(0), torch.tensor(4.0),
             torch.randn(3, dtype=torch.float64), torch.tensor([1.5], dtype=torch.bfloat16)]  # fmt: skip
    found = to_host(given)
    for one, other in zip(found, given, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert not one.requires_grad
        assert torch.equal(one, other.detach())
    assert to_host([]) == []


def test_the_table_of_counts(tmp_path):
    head = "system,nodes,k,trained,layers,name,launches,synchronisations,tokens,head_rows,uploads,texts,peak_kib,"
    head += "floor_tokens,labels,host_ms,cpu,cores,threads,torch"
    lines = [head, "one LLM,1,1,LoRA,4,sysdag,110,2,160,64,3,0,600,150,60,5.5,A CPU,2,1,2.13"]
    lines.append("one LLM,1,1,LoRA,4,straightforward,100,4,256,256,3,0,3518,150,60,11,A CPU,2,1,2.13")
    (tmp_path / "counts-cpu.csv").write_text("\n".join(lines))
    table = tables.counts_table(tmp_path).splitlines()
    assert table[-2] == (
        "| one LLM, LoRA, 4 layers | sysdag, two passes | 110 (1.10x) | 2 | 160 of 150 | 64 of 60 | 600 KiB | 5.5 ms |"
    )
    assert table[-1].startswith("| one LLM, LoRA, 4 layers | straightforward | 100 (1.00x) | 4 |")
    assert tables.counts_table(tmp_path / "none") == "Counts: not measured on a CPU yet."
