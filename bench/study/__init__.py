"""`python -m bench study`: the paper's experiments on small systems that train from scratch here.

Every table is made of cells (one method on one seed) that are kept in the cache; what is there is not computed again,
so a study that is stopped goes on where it was. Results go to bench/results/study, one CSV a table and one for its
learning curves; docs/study.md, its figures and the lines in README.md are written from them. `--real` has a command
line of its own: the same on a pretrained model, see `python -m bench study --real --help`.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import RESULTS
from bench.study import document
from bench.study.cells import machines, results, run_cells
from bench.study.compare import Comparison, best_rates, curves, rows
from bench.study.real import command
from bench.study.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "study.md", ROOT / "README.md"


def main(given: Sequence[str]) -> None:
    if "--real" in given:
        return command.main([each for each in given if each != "--real"], RESULTS / "study", write_documents)
    parser = argparse.ArgumentParser(prog="python -m bench study", description=__doc__)
    served = [name for name, table in TABLES.items() if table.device == "cpu" or torch.cuda.is_available()]
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=served, help="only these")
    parser.add_argument("--quick", action="store_true", help="everything tiny, two seeds: shows that it runs")
    parser.add_argument("--cache", type=Path, default=Path(".study-cache"), help="where finished cells are kept")
    parser.add_argument("--results", type=Path, help="default bench/results/study; with --quick CACHE/quick")
    parser.add_argument(
        "--document-only", action="store_true", help="compute nothing, write the document from the CSVs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    options = parser.parse_args(given)
    if beyond := [name for name in options.tables if name not in served]:
        parser.error(f"--tables: {', '.join(beyond)} needs a CUDA device, and torch finds none")
    size = "quick" if options.quick else "full"
    folder = options.results or (options.cache / "quick" if options.quick else RESULTS / "study")
    for name in () if options.document_only else options.tables:
        run_table(TABLES[name], size, options.cache, folder, options.workers)
    return write_documents(folder, options.quick)


def write_documents(folder: Path, quick: bool) -> None:
    """The page, and README.md's lines about it; of a quick look the page alone, beside its CSVs."""
    document.write(folder, folder / "study.md" if quick else PAGE)
    if not quick:
        README.write_text(document.in_readme(README.read_text(), folder))


def run_table(table: Comparison, size: str, cache: Path, folder: Path, workers: int) -> None:
    """Tunes, measures, and writes NAME.csv and NAME-curves.csv."""
    tuning = table.tuning_cells(size)
    run_cells(list(tuning.values()), cache, workers=workers, title=f"{table.name}: tuning")
    rates = best_rates(table.variants, dict(zip(tuning, results(list(tuning.values()), cache), strict=True)))
    cells = table.cells(size, rates)
    run_cells(list(cells.values()), cache, workers=workers, title=f"{table.name}: seeds")
    found = dict(zip(cells, results(list(cells.values()), cache), strict=True))
    machine = machines(list(cells.values()), cache)
    write(folder / f"{table.name}.csv", [row | {"machine": machine} for row in rows(table, found, rates)])
    if steps := curves(table, found):
        write(folder / f"{table.name}-curves.csv", steps)


def write(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in table for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    print(f"wrote {path}", flush=True)
