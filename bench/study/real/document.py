"""The page's section about the real model, from its CSVs: a part stands there once it has a cell, and says what lacks.

No text is written that its cells do not bear: every sentence about a result is made from the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.study.compare import TUNING_SEED
from bench.study.real import costs
from bench.study.real.statistics import difference_of, mean_of
from bench.study.real.store import Found, Store
from bench.study.real.tables import TABLES, Table
from bench.study.written import signed
from sysdag.evaluation.statistics import Interval

HEAD = """## A pretrained model

The same questions asked of a pretrained chat model: all nodes are one base model, each with a LoRA adapter (r = 8) of
its own, in fp32. `python -m bench study --real` computes what is missing, cell by cell, and says where the model and
the pairs are had; the rows of the cells are in `bench/results/study/real`. Intervals are 95 %, of resampled
instructions, and where a row has several seeds, of resampled seeds too; a row of one seed says nothing about another
seed. Steps and learning rates are chosen on instructions that are neither trained nor measured on; the measured ones
are seen once a cell.
"""
DRAFT_MARGIN, DRAFT_SHARE = "nodes/draft/rewards/margins", "draft share"
LOGS = {  # means over a training, and what the page calls them
    "candidates/effective_sample_size": "ESS",
    "candidates/responsibility_gap": "gap",
    "candidates/coverage": "coverage",
    DRAFT_SHARE: "draft's share of the margin",
}
PARTS = {
    "constraints": """### Constraints that a program checks

Draft → refine answers instructions with two or three constraints: lengths, words to use, to avoid and to put in order,
format, ending, language. Preferences are among the system's own runs: the one that meets more constraints against the
one that meets fewer. *Constraints met*: share of each answer's constraints; *wholly right*: share of answers that meet
all. *Best of 4* picks by the very checker that measures, at four times the price of a run. *Direct* observes the drafts
of both runs; *joint* is Sampling with diverse beam search, k = 4, where nothing else is said. Of the training: *ESS*,
the effective number of candidates; *gap*, how differently chosen and rejected answers weigh them; *coverage*, the
probability that they have together.
""",
    "preferences": """### Real preferences

Pairs of answers to real instructions, drafts latent: SysDPO-Sampling. *Accuracy*: share of held-out pairs whose chosen
answer has the higher implicit reward under the system; *log-loss* of the same in nats, where not knowing is 0.693. Both
take the same four drafts of the untrained drafter for every row. The wins are of the system's own answers against the
untrained system's, ties half, by two judges that no row trains on and that are weak: rules of form, and the likelihood
a token under another language model. *One node* is the model alone, without a draft; *joint* is Sampling with diverse
beam search, k = 4, where nothing else is said.
""",
    "reports": """### Summarise → rewrite

Reports of six to nine sentences; a summary of one sentence is all that the writer sees beside what is demanded: to name
two of place, day and number, and a form. Preferences and measures are as above; *draft* is the summary.
""",
    "critic-loop": """### A critic loop

Generator → (critic → generator) n times, on the instructions of the first table, by Sampling with Monte Carlo, k = 4.
*Unrolled* trains the graph of n rounds; *naive* drops the arrow back and puts the same preferences to a graph of one
round. What is measured has n rounds.
""",
    "costs": """### What a step costs

Loss and gradients of the same real pairs on the same weights, adapters moved away from their start; that they agree (to
1e-4 of the largest gradient, in fp64) is checked before anything is timed. *Straightforward* pads all runs into batches
and holds every graph until one backward; *TRL* is `DPOTrainer`'s own step, which there is for one model alone. Seconds
are medians, without the optimizer's update; memory is what one step needs beyond weights and gradients. *512 tokens at
once* is `micro_batch_tokens=512`, for 8192, where a node has more. *Passes* are those of tokens through the model, the
way back counted as one more; the floor is each distinct beginning of a text once: a reference's way, and the policy's
there and back. With *bf16* the base model's weights are in bf16 and the adapters in fp32, and sysdag's gradients must
besides be at most twice as far from those in fp64 as the straightforward step's; a CPU without arithmetic for bf16
takes longer so, and is asked once.
""",
}


def section(folder: Path) -> str:
    """The whole section; "" while no cell is there.

    Args:
        folder: of the real study's CSVs.
    """
    parts = {name: text for name in PARTS if (text := _part(TABLES[name], Store(folder, name)))}
    if not parts:
        return ""
    absent = [PARTS[name].splitlines()[0].removeprefix("### ") for name in PARTS if name not in parts]
    told = [f"Not measured yet, and no part of this page: {'; '.join(absent)}.\n"] if absent else []
    return "\n".join([HEAD, *told, *parts.values()]) + "\n"


def _part(table: Table, store: Store) -> str:
    """One table's heading, text and rows, those of each model, size and data for themselves."""
    found = store.found()
    shown = []
    for about in _kinds(found):
        rows = table.shown(about, found)
        if rows:
            body = _costs(about, rows) if table.name == "costs" else _methods(table, store, about, rows)
            shown.append(f"{_about(about, rows)}\n\n{body}\n")
    return "\n".join([PARTS[table.name], *shown]) if shown else ""


def _kinds(found: Mapping[str, Found]) -> list[dict[str, str]]:
    """The models, sizes and data that there are cells of."""
    texts = dict.fromkeys(each.row["options"] for each in found.values() if each.row["seed"] != str(TUNING_SEED))
    return [json.loads(text) for text in texts]


def _about(about: Mapping[str, str], rows: Mapping[str, Mapping[int, Found]]) -> str:
    cells = [cell for by_seed in rows.values() for cell in by_seed.values()]
    machines = "; ".join(dict.fromkeys(cell.row["machine"] for cell in cells))
    pairs = f", pairs {about['pairs']}" if "pairs" in about else ""
    judge = f", judge {about['judge']}" if "judge" in about else ""
    return f"{about['model']}{pairs}{judge}; {machines}."


def _methods(table: Table, store: Store, about: Mapping[str, str], rows: Mapping[str, Mapping[int, Found]]) -> str:
    found, logged = store.found(), _logged(store, rows)
    metrics = [m for m in table.metrics if any(m in cell.values for cells in rows.values() for cell in cells.values())]
    logs = [name for name in LOGS if any(name in of_row for of_row in logged.values())]
    head = ["", *(f"{m}, %" if m in table.percentages else m for m in metrics)]
    head += [f"{metrics[0]} against {table.reference}", *(LOGS[name] for name in logs)]
    head += ["best step", "training, CPU s", "peak, MiB", "rate", "seeds"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for method, cells in rows.items():
        line = [method, *(_value(table, metric, _by_seed(cells, metric)) for metric in metrics)]
        line.append(
            _change(table, metrics[0], cells, rows.get(table.reference, {})) if method != table.reference else ""
        )
        line += [format(logged[method][name], ".2f") if name in logged[method] else "" for name in logs]
        line += [_mean(cells, "best_step", ".0f"), _mean(cells, "cpu_seconds", ".0f"), _mean(cells, "peak_mib", ".0f")]
        line += [_rate(table, method, about, found, cells), str(len(cells))]
        lines.append(line)
    return "\n".join([*_table(lines), "", " ".join(_missing(table, about, found, rows))])


def _logged(store: Store, rows: Mapping[str, Mapping[int, Found]]) -> dict[str, dict[str, float]]:
    """By method the means over a training's logs, of what `LOGS` names and each node's part of the margin."""
    of_cell: dict[str, list[dict[str, float]]] = {}
    for row in store.curves():
        numbers = {name: float(value) for name, value in row.items() if value and name.count("/")}
        if numbers:
            of_cell.setdefault(row["cell"], []).append(numbers)
    found = {}
    for method, cells in rows.items():
        logs = [log for cell in cells.values() for log in of_cell.get(cell.row["cell"], [])]
        found[method] = {
            name: sum(log[name] for log in logs) / len(logs)
            for name in LOGS
            if logs and all(name in log for log in logs)
        }
        margins = [{n: v for n, v in log.items() if n.startswith("nodes/") and n.endswith("/margins")} for log in logs]
        total = sum(sum(each.values()) for each in margins)
        if any(DRAFT_MARGIN in each for each in margins) and total:
            found[method][DRAFT_SHARE] = sum(each.get(DRAFT_MARGIN, 0.0) for each in margins) / total
    return found


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown, without the columns that no row has."""
    kept = [at for at in range(len(lines[0])) if at == 0 or any(line[at] for line in lines[2:])]
    lines = [[line[at] for at in kept] for line in lines]
    return [f"| {' | '.join(line)} |" for line in lines]


def _by_seed(cells: Mapping[int, Found], metric: str) -> dict[int, Sequence[float]]:
    return {seed: cell.values[metric] for seed, cell in cells.items() if metric in cell.values}


def _value(table: Table, metric: str, values: Mapping[int, Sequence[float]]) -> str:
    return _written(mean_of(values), metric in table.percentages) if values else ""


def _written(found: Interval, percent: bool, plus: bool = False) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    middle, low, high = (signed(v * scale, digits, plus=plus) for v in (found.estimate, found.low, found.high))
    return f"{middle} [{low}, {high}]"


def _change(table: Table, metric: str, ours: Mapping[int, Found], theirs: Mapping[int, Found]) -> str:
    change = difference_of(_by_seed(ours, metric), _by_seed(theirs, metric))
    return "" if change is None else _written(change.interval, metric in table.percentages, plus=True)


def _mean(cells: Mapping[int, Found], column: str, form: str) -> str:
    values = [float(cell.row[column]) for cell in cells.values() if cell.row[column] != ""]
    return format(sum(values) / len(values), form) if values else ""


def _rate(
    table: Table, method: str, about: Mapping[str, str], found: Mapping[str, Found], cells: Mapping[int, Found]
) -> str:
    """The factor on the learning rate, and whether it was chosen."""
    rate = next(iter(cells.values())).row["rate"]
    if method in table.untrained or rate == "":
        return ""
    tuned = table.tuned(method, about, found)
    return (
        f"{float(rate):.2g}" if tuned is not None and abs(tuned - float(rate)) < 1e-3 else f"{float(rate):.2g}, untuned"
    )


def _missing(
    table: Table, about: Mapping[str, str], found: Mapping[str, Found], rows: Mapping[str, Mapping[int, Found]]
) -> Iterator[str]:
    """What the table lacks, in words."""
    if single := [method for method, cells in rows.items() if len(cells) == 1 < table.seeds]:
        told = "Every row is" if len(single) == len(rows) else f"Of a single seed are: {'; '.join(single)}. They are"
        yield f"{told} a single seed of the {table.seeds} that are planned: a look, not a finding."
    untuned = [
        method for method in rows
        if method not in table.untrained and table.tuned(method, about, found) is None
    ]  # fmt: skip
    if untuned:
        yield f"Not tuned yet, at the usual learning rate: {'; '.join(untuned)}."
    if absent := [method for method in table.methods if method not in rows]:
        yield f"Not measured yet: {'; '.join(absent)}."


def _costs(about: Mapping[str, str], rows: Mapping[str, Mapping[int, Found]]) -> str:
    ways = (costs.OURS, costs.SMALL, costs.PLAIN, costs.TRL)
    counted = (costs.OURS, costs.SMALL, costs.PLAIN, costs.TRL, costs.FLOOR)
    lines = {
        "seconds": [[f"seconds, {costs.SIZES[about['size']]} pairs a step", *ways]],
        "MiB": [["MiB", *ways]],
        "passes": [["passes of tokens", *counted]],
    }
    for method, cells in rows.items():
        for what, table in lines.items():
            found = [cells[0].values.get(f"{way}, {what}") for way in table[0][1:]]
            form = ".2f" if what == "seconds" else ".0f"
            if any(found):
                table.append([method, *("" if v is None else format(sorted(v)[len(v) // 2], form) for v in found)])
    shown = []
    for head, *body in lines.values():
        shown += [*_table([head, ["---", *["---:"] * (len(head) - 1)], *body]), ""]
    return "\n".join([*shown, " ".join(_missing(TABLES["costs"], {}, {}, rows))])
