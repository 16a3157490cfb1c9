"""`python -m bench study --real`: a pretrained model, real preferences, and constraints that a program checks.

    python -m bench study --real --model FOLDER --pairs TRAIN.jsonl TEST.jsonl [--hours H | --cells N] [--tables ...]

Cells (one method on one seed at one learning rate, under 15 minutes each on a CPU) are rows of CSVs in
bench/results/study/real, which are committed: what has rows is not computed again, here or on another machine, and
the study goes on where it was stopped. First comes one seed of every row at the usual learning rate, then the tuning,
then all seeds. The page is written from them each time. --device cuda has sizes of its own and
rows of its own, whatever the model; --quick is everything tiny, on whatever model it is given.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.study.real.sources import HOW_TO_GET, Sources
from bench.study.real.store import Share, Store, run
from bench.study.real.tables import PHASES, TABLES, Table

FOLDER = "real"


def main(given: Sequence[str], results: Path, write_page: Callable[[Path, bool], None]) -> None:
    """Computes a share of what is missing, and writes the page.

    Args:
        given: the command line, without `--real`.
        results: of the whole study; the real one's are in its folder `real`.
        write_page: takes the folder of results, and whether this is a quick look.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench study --real", description=__doc__, epilog=HOW_TO_GET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="a folder or a name on the Hub: the model of every node")
    parser.add_argument("--pairs", nargs=2, default=(), metavar=("TRAIN", "TEST"), help="files of preference pairs")
    parser.add_argument("--judge", default="", help="a model that is no row's: of the likelihood judge")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="only these")
    parser.add_argument("--methods", nargs="+", help="only these rows")
    parser.add_argument("--cells", type=int, default=None, help="compute at most so many cells")
    parser.add_argument("--hours", type=float, default=None, help="start no cell after so many hours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, one thread each; default 1")
    parser.add_argument("--quick", action="store_true", help="everything tiny, in this process: shows that it runs")
    parser.add_argument("--cache", type=Path, default=Path(".study-cache"), help="where runs that cells share are kept")
    parser.add_argument("--results", type=Path, help="default bench/results/study; with --quick CACHE/quick")
    parser.add_argument("--document-only", action="store_true", help="compute nothing, write the page from the CSVs")
    options = parser.parse_args(given)
    folder = options.results or (options.cache / "quick" if options.quick else results)
    failed: list[str] = []
    if not options.document_only:
        if options.model is None:
            parser.error(f"--model is needed.\n\n{HOW_TO_GET}")
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
        known = {method for name in options.tables for method in TABLES[name].methods}
        if unknown := set(options.methods or ()) - known:
            parser.error(f"--methods: no row is called {sorted(unknown)[0]!r}; the rows are {', '.join(sorted(known))}")
        sources = Sources(
            model=options.model, pairs=[str(Path(path).resolve()) for path in options.pairs], device=options.device,
            judge=options.judge,
        )  # fmt: skip
        sources.check(any(TABLES[name].needs_pairs for name in options.tables))
        cache = options.cache.resolve()
        sources.keep(cache)
        until = math.inf if options.hours is None else time.monotonic() + 3600 * options.hours
        share = Share(cells=math.inf if options.cells is None else options.cells, until=until)
        size = "quick" if options.quick else {"cpu": "cpu", "cuda": "gpu"}[options.device]
        workers = 0 if options.quick else options.workers
        for phase in PHASES[:1] if options.quick else PHASES:
            for name in options.tables:
                table, store = TABLES[name], Store(folder / FOLDER, name)
                planned = table.planned(phase, about(table, sources, size), store.found(), options.device)
                wanted = [cell for cell in planned if cell.options["method"] in (options.methods or table.methods)]
                failed += run(store, wanted, cache, share, workers)
            if failed:
                break
    write_page(folder, options.quick)
    if failed:
        sys.exit(f"{len(failed)} cells failed; the others are kept.\n\n" + "\n\n".join(failed))


def about(table: Table, sources: Sources, size: str) -> dict[str, str]:
    """What tells a table's cells from those of another model, other data, another judge or another size."""
    found = {"model": sources.label, "size": size}
    found |= {"pairs": sources.fingerprint()} if table.needs_pairs else {}
    return found | ({"judge": Path(sources.judge).name} if table.judged and sources.judge else {})
