"""Draws how time and peak memory grow, from the CSVs of `python -m bench sweep` and `python -m bench growth`.

    python -m bench plots

Reads bench/results/sweep-DEVICE.csv and growth-cpu.csv, and writes docs/images/benchmarks/linear_logprob-DEVICE.svg
and growth-LINE.svg. The dashed line is, of linear_logprob, the floor: for the time the bare matrix products, for the
memory the gradients that must exist when the call returns; of growth, linear growth from sysdag's first point.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import measure
from bench.tables import FIGURES, GROWN

Row = dict[str, str]
MODES = ("frozen", "trained")
AXES = {"N": "rows N", "V": "vocabulary V"}


def lines(rows: Sequence[Row], axis: str) -> list[Row]:
    """The rows along one axis, in its order: those where the other axis has the value that occurs with most of this."""
    other = "V" if axis == "N" else "N"
    values = {value: len({row[axis] for row in rows if row[other] == value}) for value in {row[other] for row in rows}}
    at = max(values, key=lambda value: values[value])
    return sorted((row for row in rows if row[other] == at), key=lambda row: int(row[axis]))


def gradients_mib(row: Row) -> float:
    """Of hidden, and of the weight if the head is trained."""
    size = 2 if row["dtype"] in ("float16", "bfloat16") else 4
    trained = int(row["V"]) if row["case"] == "trained" else 0
    return (int(row["N"]) + trained) * int(row["H"]) * size / 2**20


def plotting() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sysdag"  # the same file from the same figures
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plotting().close(figure)
    print(f"wrote {path}")


def draw(rows: Sequence[Row], device: str, path: Path) -> None:
    """One row of panels for a frozen and a trained head: time and memory against N, then against V."""
    pyplot = plotting()
    figure, panels = pyplot.subplots(len(MODES), 4, figsize=(15, 3.2 * len(MODES)), squeeze=False)
    for mode, across in zip(MODES, panels, strict=True):
        of_mode = [row for row in rows if row["case"] == mode]
        for axis, (time, memory) in zip(AXES, (across[:2], across[2:]), strict=True):
            found = lines(of_mode, axis)
            for name in dict.fromkeys(row["name"] for row in found):
                own = [row for row in found if row["name"] == name]
                at = [int(row[axis]) for row in own]
                floor = name.startswith("bare products")
                style = {"linestyle": "--", "color": "black"} if floor else {"marker": "o"}
                time.plot(at, [float(row["median_ms"]) for row in own], label="floor" if floor else name, **style)
                if floor:
                    memory.plot(at, [gradients_mib(row) for row in own], label="floor", **style)
                else:
                    memory.plot(at, [float(row["peak_mib"]) for row in own], label=name, **style)
            fixed = "V" if axis == "N" else "N"
            for one, what in ((time, "ms"), (memory, "peak MiB")):
                one.set_title(f"{mode} head, {fixed} = {found[0][fixed]}, H = {found[0]['H']}", fontsize=9)
                one.set_xscale("log", base=2)
                values = sorted({int(row[axis]) for row in found})
                one.set_xticks(values, [str(value) for value in values])
                one.set_yscale("log")
                one.set_xlabel(AXES[axis])
                one.set_ylabel(what)
                one.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle(f"linear_logprob, forward and backward: {measure.described(rows[0], device)}", fontsize=9)
    save(figure, path)


def draw_growth(rows: Sequence[Row], line: str, path: Path) -> None:
    """Time and memory along one of growth's lines."""
    figure, panels = plotting().subplots(1, 2, figsize=(9, 3.4))
    own = [row for row in rows if row["line"] == line]
    for panel, column, what in zip(panels, ("seconds", "peak_mib"), ("seconds", "peak MiB"), strict=True):
        for name in dict.fromkeys(row["name"] for row in own):
            points = [(int(row["at"]), float(row[column])) for row in own if row["name"] == name]
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
            if name == own[0]["name"]:
                (start, value), ends = points[0], (points[0][0], points[-1][0])
                panel.plot(ends, [value * end / start for end in ends], "k--", label="linear")
        panel.set(xscale="log", yscale="log", xlabel=GROWN[line][0], ylabel=what)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{GROWN[line][0]}: {measure.described(own[0], 'cpu')}", fontsize=9)
    save(figure, path)


def main(arguments: Sequence[str] | None = None, folder: Path = measure.RESULTS, figures: Path = FIGURES) -> None:
    if arguments:
        raise SystemExit("python -m bench plots takes no options.")
    found = sorted(folder.glob("sweep-*.csv"))
    grown = folder / "growth-cpu.csv"
    if not found:
        print(f"nothing to draw: {folder} has no sweep-*.csv; python -m bench sweep --csv measures it")
    figures.mkdir(parents=True, exist_ok=True)
    for file in found:
        device = file.stem.removeprefix("sweep-")
        draw(measure.read(file), device, figures / f"linear_logprob-{device}.svg")
    if grown.exists():
        rows = measure.read(grown)
        for line in dict.fromkeys(row["line"] for row in rows):
            draw_growth(rows, line, figures / f"growth-{line}.svg")
