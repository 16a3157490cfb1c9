"""How time and memory of sysdag grow: with candidates, nodes, the prompt's length, and rows of data.

    python -m bench growth [--lines k nodes prompt rows] [--rows 1000 10000 100000 1000000] [--csv]

`k`, `nodes` and `prompt` are optimisation steps of `python -m bench step` (small models of 4 layers, LoRA): two LLMs
over k candidates; chains over 2; one LLM on 2 pairs, beside TRL's `DPOTrainer`. `rows` are whole commands, each in a
process of its own: `sysdag validate` and `sysdag sample` (its bookkeeping: nodes are tables) on rows of data,
`sysdag report` on a training of as many logged steps, and beside them TRL's preparation of as many pairs, up to
100,000. Their times are the processor's; time and peak memory are those beyond the same command's on 2 rows.
`python -m bench plots` draws each line, and `python -m bench tables` gives its slope: the exponent of the power law
through its last two points; 1 is linear.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import measure, step
from bench.step_systems import NARROW, PROMPTS, SIZES, Case, Size, Step, model, text, tokenizer

PEERS = ("straightforward", "trl")
BASELINE = "sysdag"
STEPS = {
    "k": [Case("two LLMs", k, True) for k in (2, 4, 8, 16)],
    "nodes": [Case("chain", 2, True, nodes=nodes) for nodes in (1, 2, 4, 8, 12)],
    "prompt": [Case("one LLM", 1, True, nodes=1, pairs=2, size=size) for size in PROMPTS],
}
WAYS = {"k": ("sysdag", "straightforward"), "nodes": ("sysdag", "straightforward"), "prompt": ("sysdag", "trl")}
LINES = (*STEPS, "rows")
COMMANDS = ("validate", "sample", "report", "trl")
MOST_OF_TRL = 100_000
WORDS = Size(500, 12, 8, 4096, NARROW | {"num_hidden_layers": 1})
SYSTEMS = """
from sysdag import Input, System, node
from sysdag.components import CausalLM, Tabular

question = Input("question")


@node(CausalLM("model", "tokenizer", max_new_tokens=8))
def draft(question):
    return question + " "


@node(CausalLM("model", "tokenizer", max_new_tokens=8))
def answer(question, draft):
    return question + " " + draft + " "


writers = System(question >> draft, (question & draft) >> answer)


@node(Tabular({0: {"a": 0.5, "b": 0.5}}))
def first(question):
    return 0


@node(Tabular({"a": {"c": 0.5, "d": 0.5}, "b": {"c": 0.9, "d": 0.1}}))
def second(first):
    return first


tables = System(question >> first >> second)
"""
PREPARE_TRL = """
import json
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

rows = [json.loads(line) for line in open({file!r})]
data = Dataset.from_list([dict(prompt=r["question"], chosen=r["chosen"], rejected=r["rejected"]) for r in rows])
made = [AutoModelForCausalLM.from_pretrained("model") for _ in range(2)]
args = DPOConfig("trl", report_to=[], bf16=False, use_cpu=True, disable_tqdm=True)
DPOTrainer(*made, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained("tokenizer"))
"""
USED = """
import time
print(time.process_time(), open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def at(line: str, case: Case) -> int:
    """Where a case lies on its line."""
    return {"k": case.candidates, "nodes": case.nodes, "prompt": SIZES[case.size].prompt}[line]


def of_steps(line: str, options: Any) -> list[dict[str, Any]]:
    wanted = list(measure.wanted(dict.fromkeys(WAYS[line]), options.peers, baseline=BASELINE))
    rows = []
    for case in STEPS[line]:
        made = Step(case, with_trl="trl" in wanted)
        for name in wanted[1:]:
            step.check(made, name)
        times = measure.interleave(
            {name: lambda name=name, made=made: made.run(name) for name in wanted},
            options.repeats, before=made.clear, warmup=1,
        )  # fmt: skip
        del made
        for name, taken in times.items():
            row = {"line": line, "at": at(line, case), "name": name, "seconds": taken.median}
            rows.append(row | {"peak_mib": step.peak_mib(case, name), "repeats": options.repeats})
            print(rows[-1], flush=True)
    return rows


class Used(NamedTuple):
    seconds: float
    mib: float


def run(code: str, folder: Path) -> Used:
    """Processor time and peak memory of Python code in a process of its own, which must end well."""
    own = {"PYTHONPATH": str(measure.RESULTS.parents[1]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code + USED], cwd=folder, env=os.environ | own, capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(f"growth: {code}: {ended.stdout[-1000:]}{ended.stderr[-1000:]}")
    seconds, kib = ended.stdout.split()[-2:]
    return Used(float(seconds), int(kib) / 1024)


def rows_of_data(count: int) -> Iterator[dict[str, Any]]:
    for row in range(count):
        words = [text(WORDS.vocabulary, length, row, place) for place, length in enumerate((12, 6, 6, 5, 5))]
        question, chosen, rejected, *drafts = words
        yield {
            "question": question, "chosen": chosen, "rejected": rejected,
            "chosen_intermediates": {"draft": drafts[0]}, "rejected_intermediates": {"draft": drafts[1]},
        }  # fmt: skip


def prepare(folder: Path) -> None:
    """Model, systems and a training of two steps, whose log is what is made long."""
    model(0, WORDS, "cpu").save_pretrained(folder / "model")
    tokenizer(WORDS).save_pretrained(folder / "tokenizer")
    (folder / "systems.py").write_text(SYSTEMS)
    write(rows_of_data(4), folder / "few.jsonl")
    run(
        sysdag("train systems.py:writers few.jsonl --output-dir run --max-steps 2 --logging-steps 1 "
               "--report-to none --bf16 false"),
        folder,
    )  # fmt: skip


def write(rows: Iterator[dict[str, Any]], file: Path) -> None:
    with file.open("w") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def sysdag(command: str) -> str:
    return f"from sysdag.cli import app\nassert not app({command.split()!r}, standalone_mode=False)"


def lengthen(folder: Path, steps: int) -> None:
    """The training's log with that many steps."""
    log = folder / "run" / "log.jsonl"
    logged = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    write((logged[-1] | {"step": number} for number in range(1, steps + 1)), log)


def of_command(name: str, count: int, folder: Path) -> Used:
    """One command on that many rows."""
    data = folder / f"rows-{count}.jsonl"
    if not data.exists():
        write(rows_of_data(count), data)
    if name == "validate":
        return run(sysdag(f"validate systems.py:writers {data.name}"), folder)
    if name == "sample":
        (folder / "runs.jsonl").unlink(missing_ok=True)
        return run(sysdag(f"sample systems.py:tables {data.name} --output runs.jsonl"), folder)
    if name == "report":
        lengthen(folder, count)
        return run(sysdag("report run"), folder)
    return run(PREPARE_TRL.format(file=data.name), folder)


def of_rows(options: Any) -> list[dict[str, Any]]:
    wanted = [name for name in COMMANDS if name not in PEERS or options.peers is None or name in options.peers]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for name in wanted:
            of_command(name, 2, folder)  # what the first call reads and compiles, later ones find
            start = of_command(name, 2, folder)
            for count in options.rows:
                if name == "trl" and count > MOST_OF_TRL:
                    continue
                used = of_command(name, count, folder)
                row = {"line": "rows", "at": count, "name": name, "seconds": used.seconds - start.seconds}
                rows.append(row | {"peak_mib": used.mib - start.mib, "repeats": 1})
                print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    own: dict[str, dict[str, Any]] = {
        "--lines": {"nargs": "*", "choices": LINES, "default": LINES},
        "--rows": {"nargs": "*", "type": int, "default": [10**3, 10**4, 10**5, 10**6]},
    }
    options = measure.options(
        __doc__, "growth", arguments, peers=PEERS, devices=("cpu",), threads=1, repeats=3, own=own
    )
    rows = [row for line in options.lines for row in (of_rows(options) if line == "rows" else of_steps(line, options))]
    measure.report("growth", rows, options.csv, [f"trl {measure.version('trl')}"])
