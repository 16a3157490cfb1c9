"""Writes the tables of ops and of steps in docs/benchmarks.md from the CSVs in bench/results: `python -m bench tables`.

The text between the markers is replaced; nothing in it is written by hand. Times are medians. "plain torch" is the
benchmark's baseline, "fastest other" the fastest of all other rows that are not sysdag's, whatever their memory;
factors are ratios of the medians that stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import measure

Row = dict[str, str]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
FIGURES = PAGE.parent / "images" / "benchmarks"
STEP_WAYS = {
    "sysdag": "sysdag, two passes",
    "one pass": "sysdag, one pass",
    "straightforward": "straightforward",
    "trl": "TRL",
}
GROWN = {
    "k": ("candidates k", "k"),
    "nodes": ("nodes of a chain", "n"),
    "prompt": ("tokens of the prompt", "T"),
    "rows": ("rows of data", "N"),
}
NOT_RUN = "not run on a GPU yet"
FLOOR = "bare products"


class Shown(NamedTuple):
    """What of an op's CSV the table shows."""

    baseline: str
    keys: tuple[str, ...]  # the columns that make one problem
    rows: Callable[[Row], bool]
    problem: Callable[[Row], str]


OPS = {
    "linear_logprob": Shown(
        "eager", ("case", "N", "H", "V", "dtype"),
        lambda row: row["name"] != "sysdag, 4 labels a row",  # four times the work of the others
        lambda row: f"{HEADS[row['case']]}; N {row['N']}, H {row['H']}, V {row['V']}",
    ),
    "token_logprob": Shown(
        "log_softmax+gather", ("N", "V", "dtype", "what"),
        lambda row: row["what"] == "forward+backward",
        lambda row: f"N {row['N']}, V {row['V']}",
    ),
    "preference_loss": Shown(
        "eager", ("pairs", "candidates", "dtype", "in a row"),
        lambda row: row["in a row"] == "1",
        lambda row: f"{row['pairs']} pairs by {row['candidates']} candidates",
    ),
    "diverse_beam_step": Shown(
        "group by group", ("prompts", "groups", "beams", "V", "dtype"),
        lambda row: True,
        lambda row: f"{row['prompts']} prompts, {row['groups']} groups by {row['beams']} beams, V {row['V']}",
    ),
    "diffusion_error": Shown(
        "eager", ("shape", "dtype", "what"),
        lambda row: row["what"] == "with reference",
        lambda row: f"policy and reference {row['shape']}",
    ),
}  # fmt: skip
HEADS = {
    "frozen": "frozen head", "trained": "trained head", "no grad": "no gradient",
    "frozen, peaked": "frozen head, peaked logits",
}  # fmt: skip
HEADER = [
    "op", "problem", "sysdag", "plain torch", "fastest other", "peak memory, MiB: sysdag / plain torch / leanest other",
    "share of floor",
]  # fmt: skip
MEANING = """\
Medians of single calls, forward and backward together, except for "no gradient" and the beam step, which has no
backward. The factor in brackets says how many times faster sysdag is; below 1 it is slower.

- *plain torch* is what one writes without the op: `log_softmax` and `gather`, the loss or the error term by term, and
  for the beam step one group after the other (`transformers`: its own processor).
- *fastest other* is the fastest of all else that ran, whatever its memory: `torch.compile`, chunked functions of torch
  and TRL, the op's reference in torch (`reference`, `objective`).
- *peak memory* is what one call needs beyond its arguments; *leanest other* is the least of all else that ran, whatever
  its time.
- On a GPU, below a millisecond the launches from Python take longer than the kernels, and fewer layers win.
- *share of floor* is the time of the bare matrix products, into memory that is there already, over sysdag's time: at
  100 % all else is free; what is above is the noise of the measurement.
- A *trained head* on a CPU keeps as many tiles of logits as fit 2.25 (1 + H / N) times the gradient of its weight, and
  computes the others again: at N 2048 and H 512 it keeps 21 of 32 and so takes 3.3 products for 3, which is more than
  half of what it is away from the floor. `torch.compile` keeps all logits in 2.8 times the memory and is as fast: the
  ranges of the two overlap. Keeping all tiles is no faster here, as memory that is touched for the first time has its
  price.

The benchmark ends without a time where sysdag's error against fp64 is above plain torch's by more than a rounding (beam
step: where its tokens are others). Shapes that are left out here, minima and maxima are in `bench/results`."""


def groups(shown: Shown, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each problem, in the file's order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if shown.rows(row):
            found.setdefault(tuple(row[key] for key in shown.keys), []).append(row)
    return list(found.values())


def cells(op: str, shown: Shown, rows: Sequence[Row]) -> list[list[str]]:
    """A line of the table for each of sysdag's ways to one problem."""
    median = {row["name"]: float(row["median_ms"]) for row in rows}
    memory = {row["name"]: row.get("peak_mib", "") for row in rows}
    floor = next((ms for name, ms in median.items() if name.startswith(FLOOR)), None)
    others = [name for name in median if name != shown.baseline and not name.startswith(("sysdag", FLOOR))]
    fastest = min(others, key=lambda name: median[name], default=None)
    found = []
    for name in (name for name in median if name.startswith("sysdag")):
        ours, way = median[name], name.removeprefix("sysdag").strip(", ")
        leanest = min((memory[other] for other in others if memory[other]), key=float, default="")
        used = [memory[name], memory[shown.baseline], *([leanest] if leanest else [])]
        found.append([
            f"`{op}`",
            "; ".join(part for part in (shown.problem(rows[0]), rows[0]["dtype"], way) if part),
            duration(ours),
            f"{rows[0].get('peer', '')} {compared(median[shown.baseline], ours)}".strip(),
            f"{fastest} {compared(median[fastest], ours)}" if fastest else "",
            " / ".join(f"{float(mib):.0f}" for mib in used) if all(used) else "",
            f"{100 * floor / ours:.0f} %" if floor else "",
        ])  # fmt: skip
    return found


def duration(ms: float) -> str:
    if ms < 1:
        return f"{ms * 1e3:.0f} µs"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def compared(theirs: float, ours: float) -> str:
    factor = theirs / ours
    digits = 2 if factor < 2 else 1 if factor < 10 else 0
    return f"{duration(theirs)} ({factor:.{digits}f}x)"


def table(device: str, folder: Path) -> str:
    """The tables of a kind of device, one for each machine, and which ops were not run there."""
    by_machine: dict[str, list[list[str]]] = {}
    missing = []
    for op, shown in OPS.items():
        file = folder / f"{op}-{device}.csv"
        if not file.exists():
            missing.append(f"`{op}`")
            continue
        rows = measure.read(file)
        lines = by_machine.setdefault(measure.described(rows[0], device), [])
        for group in groups(shown, rows):
            lines += cells(op, shown, group)
    option = "" if device == "cpu" else f" --device {device}"
    parts = [
        "\n".join([
            f"{machine}; `python -m bench op --csv{option}`:\n",
            *(f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *lines)),
        ])
        for machine, lines in by_machine.items()
    ]  # fmt: skip
    absent = NOT_RUN if device == "cuda" else "not measured on a CPU yet"
    if missing:
        parts.append(f"{', '.join(missing)}: {absent}.")
    return "\n\n".join(parts)


def step_table(folder: Path = measure.RESULTS) -> str:
    """The optimisation step's table, one line for each system: time and memory of each way to it."""
    parts = []
    for device in ("cpu", "cuda"):
        file = folder / f"step-{device}.csv"
        if not file.exists():
            parts.append(f"The step: {NOT_RUN if device == 'cuda' else 'not measured on a CPU yet'}.")
            continue
        rows = measure.read(file)
        by_case: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in rows:
            by_case.setdefault(tuple(row[key] for key in ("system", "nodes", "k", "trained")), {})[row["name"]] = row
        lines = [["system", "trained", *STEP_WAYS.values()], ["---"] * (2 + len(STEP_WAYS))]
        for (system, nodes, k, trained), ways in by_case.items():
            times = [ways.get(way) for way in STEP_WAYS]
            shown = [
                f"{duration(float(row['median_ms']))}, {float(row['peak_mib']):.0f} MiB" if row else "" for row in times
            ]
            lines.append([_named(system, nodes, k), trained, *shown])
        option = "" if device == "cpu" else f" --device {device}"
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{measure.described(rows[0], device)}; `python -m bench step --csv{option}`:\n\n{table}")
    return "\n\n".join(parts)


def _named(system: str, nodes: str, k: str) -> str:
    """A system of `bench step` in words."""
    return f"{system}{f' of {nodes}' if system == 'chain' else ''}{f', k = {k}' if nodes != '1' else ''}"


def counts_table(folder: Path = measure.RESULTS) -> str:
    """What a step asks of its device: a line for each system and way, launches with their ratio to straightforward."""
    file = folder / "counts-cpu.csv"
    if not file.exists():
        return "Counts: not measured on a CPU yet."
    rows = measure.read(file)
    keys = ("system", "nodes", "k", "trained", "layers")
    plain = {tuple(row[key] for key in keys): row for row in rows if row["name"] == "straightforward"}
    header = ["system", "way", "launches", "waits", "tokens", "head rows", "peak memory", "time"]
    lines = [header, ["---"] * 2 + ["---:"] * 6]
    for row in rows:
        ratio = int(row["launches"]) / int(plain[tuple(row[key] for key in keys)]["launches"])
        lines.append([
            f"{_named(row['system'], row['nodes'], row['k'])}, {row['trained']}, {row['layers']} layers",
            STEP_WAYS[row["name"]],
            f"{row['launches']} ({ratio:.2f}x)",
            row["synchronisations"],
            f"{row['tokens']} of {row['floor_tokens']}",
            f"{row['head_rows']} of {row['labels']}",
            f"{row['peak_kib']} KiB",
            duration(float(row["host_ms"])),
        ])  # fmt: skip
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{measure.described(rows[0], 'cpu')}; `python -m bench counts --csv`:\n\n{table}"


def overhead_table(folder: Path = measure.RESULTS) -> str:
    """What a call of an op costs the host: a line for each case, with the ratio to plain torch's from the same run."""
    file = folder / "overhead-cpu.csv"
    if not file.exists():
        return "Host time: not measured on a CPU yet."
    rows = measure.read(file)
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["op"], row["what"]), {})[row["name"]] = row
    lines = [["op", "arguments", "sysdag", "plain torch", "of plain torch's", "torch's shortest way"]]
    lines.append(["---"] * 2 + ["---:"] * 4)
    for (op, what), ways in by_case.items():
        shown = [duration(float(ways[name]["median_ms"])) for name in ("sysdag", "plain torch")]
        shorter = duration(float(ways["shorter"]["median_ms"])) if "shorter" in ways else ""
        lines.append([f"`{op}`", what, *shown, f"{float(ways['sysdag']['ratio']):.2f}x", shorter])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{measure.described(rows[0], 'cpu')}; `python -m bench overhead --csv`:\n\n{table}"


def diffusion_table(folder: Path = measure.RESULTS) -> str:
    """The diffusion step's and sampling's table: times as a ratio to diffusers' own way, and peak memory."""
    file = folder / "diffusion-cpu.csv"
    if not file.exists():
        return "Diffusion: not measured on a CPU yet."
    rows = measure.read(file)
    lines = [["", "way", "time", "to diffusers' own", "peak memory"], ["---", "---", "---:", "---:", "---:"]]
    for row in rows:
        what = f"{row['what']}, {row['model']}" + (f", {row['trained']}" if row["trained"] else "")
        ratio = f"{1 / float(row['times_diffusers']):.2f}x"
        peak = f"{float(row['peak_mib']):.0f} MiB" if row["peak_mib"] else ""
        lines.append([what, row["name"], duration(float(row["median_ms"])), ratio, peak])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    command = f"python -m bench diffusion --threads {rows[0]['threads']} --csv"
    return f"{measure.described(rows[0], 'cpu')}; `{command}`:\n\n{table}"


def decode_table(folder: Path = measure.RESULTS) -> str:
    """What decoding comes to: a line for each model, case and way, with the ratios to generate and the former build."""
    file = folder / "decode-cpu.csv"
    if not file.exists():
        return "Decoding: not measured on a CPU yet."
    rows = measure.read(file)
    header = ["model", "case", "way", "new tokens: mean, longest", "time, by the processor", "rate over generate's"]
    header += ["rate over the former build's", "peak memory", "of generate's"]
    lines = [header, ["---"] * 3 + ["---:"] * 6]
    for row in rows:
        lengths = f"{float(row['mean_length']):.0f}, {row['longest']}" if row["mean_length"] else ""
        over = [f"{float(row[key]):.2f}x" if row[key] else "" for key in ("cpu_times_generate", "cpu_times_former")]
        share = f"{float(row['of_generates_memory']):.2f}" if row["of_generates_memory"] else ""
        time = f"{float(row['cpu_seconds']):.0f} s"
        peak = f"{float(row['peak_mib']):.0f} MiB"
        lines.append([row["model"], row["case"], row["name"], lengths, time, *over, peak, share])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{measure.described(rows[0], 'cpu')}; `python -m bench decode --model FOLDER --csv`:\n\n{table}"


def growth_table(folder: Path = measure.RESULTS) -> str:
    """What grows along each line: first and last time and peak, and the exponents through the last two points."""
    file = folder / "growth-cpu.csv"
    if not file.exists():
        return "Growth: not measured on a CPU yet."
    rows = measure.read(file)
    lines = [["", "what", "from to", "time", "grows as", "peak memory", "grows as"], ["---"] * 3 + ["---:"] * 4]
    for line, name in dict.fromkeys((row["line"], row["name"]) for row in rows):
        own = [row for row in rows if (row["line"], row["name"]) == (line, name)]
        at, seconds, mib = ([float(row[key]) for row in own] for key in ("at", "seconds", "peak_mib"))
        times = f"{duration(seconds[0] * 1e3)} to {duration(seconds[-1] * 1e3)}"
        peaks = f"{mib[0]:.0f} to {mib[-1]:.0f} MiB"
        powers = [f"{GROWN[line][1]}^{exponent(at, values):.2f}" for values in (seconds, mib)]
        lines.append([GROWN[line][0], name, f"{at[0]:.0f} to {at[-1]:.0f}", times, powers[0], peaks, powers[1]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{measure.described(rows[0], 'cpu')}; `python -m bench growth --csv`:\n\n{table}"


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """Of the power law through the last two points; nan where a value is not above 0."""
    (first, last), (low, high) = at[-2:], values[-2:]
    return math.log(high / low) / math.log(last / first) if min(low, high) > 0 else math.nan


def tries_table(folder: Path = measure.RESULTS) -> str:
    """Scoring of candidates that share a prompt: a line for each prompt and way, with the ratios to the other ways."""
    file = folder / "tries-cpu.csv"
    if not file.exists():
        return "Tries: not measured on a CPU yet."
    rows = measure.read(file)
    header = ["model", "trained", "prompt", "way", "time", "of former's", "of unpacked's", "peak memory", "of former's"]
    lines = [header, ["---"] * 4 + ["---:"] * 5]
    for row in rows:
        shares = [
            f"{float(row[key]):.2f}" for key in ("seconds_of_former", "seconds_of_unpacked", "peak_mib_of_former")
        ]
        time, peak = f"{float(row['seconds']):.1f} s", f"{float(row['peak_mib']):.0f} MiB"
        lines.append([row["model"], row["trained"], row["prompt"], row["name"], time, *shares[:2], peak, shares[2]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{measure.described(rows[0], 'cpu')}; `python -m bench tries --model FOLDER --csv`:\n\n{table}"


def render(folder: Path = measure.RESULTS) -> str:
    """What stands between the ops' markers."""
    drawn = sorted(FIGURES.glob("linear_logprob-*.svg"))
    about = "time and peak memory of linear_logprob over N and V"
    pictures = [f"![{about}]({path.relative_to(PAGE.parent)})" for path in drawn]
    return "\n\n".join([table("cpu", folder), table("cuda", folder), MEANING, *pictures])


def replaced(text: str, content: str, what: str = "ops", page: str = PAGE.name) -> str:
    """The text with the content between the markers `<!-- bench:WHAT -->` and `<!-- /bench:WHAT -->`.

    Args:
        page: where the text stands, for errors.

    Raises:
        ValueError: unless each marker is there once, the first before the second.
    """
    opening, closing = f"<!-- bench:{what} -->", f"<!-- /bench:{what} -->"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not start or not end or opening in after or closing in after:
        raise ValueError(f"{page} needs {opening} and, after it, {closing}, each once.")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def written(text: str) -> str:
    """The page with all its tables made anew."""
    text = replaced(replaced(text, render()), step_table(), "step")
    text = replaced(replaced(text, counts_table(), "counts"), growth_table(), "growth")
    text = replaced(replaced(text, overhead_table(), "overhead"), tries_table(), "tries")
    return replaced(replaced(text, diffusion_table(), "diffusion"), decode_table(), "decode")


def main(arguments: Sequence[str] | None = None) -> None:
    if arguments:
        raise SystemExit("python -m bench tables takes no options.")
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")
