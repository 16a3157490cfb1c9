"""Writes the study's document and its figures from the CSVs.

The text is in study.md beside this file, and that of README.md's lines in readme.md; what is measured stands there as
`{{...}}` and is filled in from the CSVs:

    {{table NAME | metric, metric | extra column, ... | method}}   a table; differences to the last-named method
    {{mean NAME | method | metric}}                                "83.3 ± 2.1"
    {{difference NAME | method | other | metric}}                  "+3.6 [0.4, 6.8], p = 0.031"
    {{correlation NAME | column of the curves | metric}}           "+0.85 over 16 rows": of the first steps and the end
    {{wins NAME | method | other | metric}}                        "4 of 5 seeds": those in which `method` is better
    {{claim NAME | method | other | metric}}                       "held", "open" or "the reverse": is `method` better?
    {{figure NAME}}                                                the figure of that name
    {{machine}}                                                    what the cells ran on
    {{real}}                                                       the pretrained model's section, if there is any
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path

import numpy
from scipy import stats

from bench.study import figures
from bench.study.compare import RATES
from bench.study.real import command
from bench.study.real import document as real
from bench.study.tables import TABLES
from bench.study.written import NOT_MEASURED, Table, signed
from bench.tables import replaced

TEMPLATE = Path(__file__).with_name("study.md")
SUMMARY = Path(__file__).with_name("readme.md")
SUFFIX = "-curves"
ESTIMATES = {
    "draft-refine": ("exact", "win against chosen"),
    "candidates": ("exact", "quality"),
    "pictures-digits": ("order consistency", "preference score"),
    "pictures-shapes": ("order consistency", "preference score"),
}


def of_methods(*names: str) -> dict[str, dict[str, str]]:
    return {name: {"method": name} for name in names}


PICTURES = {
    "the system": of_methods("joint", "joint, LoRA", "only the LLM", "only the diffusion model", "stage by stage")
}
LEARNING = {
    "draft-refine": {
        "the system": of_methods("joint", "direct", "only draft", "only answer", "stage by stage"),
        "separate: each model by itself": {
            part: {"method": "separate", "part": str(place)} for place, part in enumerate(("draft", "answer"))
        },
    },
    "pictures-digits": PICTURES,
    "pictures-shapes": PICTURES,
    **{
        name: {"the system": of_methods(*(v.name for v in TABLES[name].variants if v.trains and v.name != "separate"))}
        for name in ("refiner", "captioner", "painter")
    },
}
SWEEPS = {"misled-drafts": ("exact", "draft exact"), "noise": ("exact", "quality")}


class Results:
    """The tables that are there.

    Args:
        folder: of the CSVs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tables(self) -> dict[str, Table]:
        return {path.stem: Table(path) for path in sorted(self.folder.glob("*.csv")) if not path.stem.endswith(SUFFIX)}

    def curves(self, name: str) -> list[dict[str, str]]:
        with (self.folder / f"{name}{SUFFIX}.csv").open() as file:
            return list(csv.DictReader(file))

    @cached_property
    def figures(self) -> dict[str, Callable[[Path], None]]:
        """What draws each figure whose tables are there."""
        there, found = self.tables, {}
        for name in ESTIMATES.keys() & there.keys():
            found[name] = partial(figures.estimates, table=there[name], metrics=ESTIMATES[name])
        for name in LEARNING.keys() & there.keys():
            found[name + SUFFIX] = partial(figures.learning, curves=self.curves(name), panels=LEARNING[name])
        for name in SWEEPS.keys() & there.keys():
            found[name] = partial(figures.sweep, table=there[name], metrics=SWEEPS[name])
        if "candidates" in there:
            points = self.early("candidates", "candidates/coverage", "exact")
            found["candidates-coverage"] = partial(
                figures.against, points=points, labels=("coverage in the first steps", "exact")
            )
        if loops := {int(name[-1]): there[name] for name in sorted(there) if name.startswith("critic-loop-")}:
            found["critic-loop"] = partial(figures.rounds, tables=loops, metric="exact")
        return found

    def draw(self, folder: Path) -> None:
        for name, paint in self.figures.items():
            paint(folder / f"{name}.svg")

    def table(self, name: str, metrics: str, extras: str = "", against: str = "") -> str:
        return self.tables[name].markdown(split(metrics), split(extras), against)

    def mean(self, name: str, method: str, metric: str) -> str:
        return self.tables[name].estimate(method, metric)

    def difference(self, name: str, method: str, other: str, metric: str) -> str:
        return self.tables[name].change(method, other, metric, interval=True)

    def early(self, name: str, log: str, metric: str) -> dict[str, tuple[float, float]]:
        """By method, what its training logged until the first validation (mean over seeds), and how it ended; without
        importance sampling, which logs no coverage, and one of two methods that agree in both."""
        rows, logged = self.curves(name), dict[str, list[float]]()
        first = min(int(row["step"]) for row in rows if row["step"] != "0")
        for row in rows:
            if int(row["step"]) == first and row["candidates/coverage"]:
                logged.setdefault(row["method"], []).append(float(row[log]))
        table = self.tables[name]
        by_point = {(float(numpy.mean(logged[one])), table[one, metric]["mean"]): one for one in logged}
        return {method: point for point, method in by_point.items()}

    def correlation(self, name: str, log: str, metric: str) -> str:
        """Spearman's, over the methods of `early`."""
        logged, ended = zip(*self.early(name, log, metric).values(), strict=True)
        return f"{signed(float(stats.spearmanr(logged, ended).statistic), 2)} over {len(logged)} rows"

    def claim(self, name: str, method: str, other: str, metric: str) -> str:
        """Whether the 95 % interval of the difference leaves a doubt about its sign."""
        found = self.tables[name].difference(method, other, metric)
        return "held" if found["difference_low"] > 0 else "the reverse" if found["difference_high"] < 0 else "open"

    def wins(self, name: str, method: str, other: str, metric: str) -> str:
        """In how many of the seeds the method is better."""
        ours, theirs = (self.tables[name].seeds(one, metric) for one in (method, other))
        return f"{int((ours > theirs).sum())} of {len(ours)} seeds"

    def machine(self) -> str:
        found = {row["machine"] for table in self.tables.values() for row in table.found.values()}
        return "; ".join(sorted(found))

    def figure(self, name: str) -> str:
        return f"![{name}](images/study/{name}.svg)" if name in self.figures else NOT_MEASURED

    def real(self) -> str:
        return real.section(self.folder / command.FOLDER)

    def rates(self) -> str:
        return f"{len(RATES)} learning rates, a factor of {round(RATES[1] / RATES[0])} apart"


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def written(results: Results, template: str) -> str:
    """The template with every placeholder filled in; "not measured yet" where its table is not there."""

    def filled(match: re.Match[str]) -> str:
        what, _, rest = match[1].strip().partition(" ")
        arguments = [part.strip() for part in rest.split("|")] if rest else []
        known: Mapping[str, Callable[..., str]] = {
            name: getattr(results, name)
            for name in (
                "table",
                "mean",
                "difference",
                "correlation",
                "claim",
                "wins",
                "figure",
                "machine",
                "real",
                "rates",
            )
        }
        if what not in known:
            raise ValueError(f"{TEMPLATE.name}: {match[0]} is none of {', '.join(known)}")
        if what not in ("figure", "machine", "real", "rates") and arguments[0] not in results.tables:
            if arguments[0] not in TABLES:
                raise ValueError(f"{TEMPLATE.name}: {match[0]} names no table; there are {', '.join(TABLES)}")
            return NOT_MEASURED
        try:
            return known[what](*arguments)
        except KeyError as error:
            raise ValueError(f"{TEMPLATE.name}: {match[0]} names {error}, which is not in the table") from error

    return re.sub(r"\{\{(.+?)\}\}", filled, template)


def write(folder: Path, page: Path) -> None:
    """The page, and its figures in images/study beside it.

    Args:
        folder: of the CSVs.
        page: the file to write.
    """
    results = Results(folder)
    results.draw(page.parent / "images" / "study")
    page.write_text(written(results, TEMPLATE.read_text()))
    print(f"wrote {page}", flush=True)


def in_readme(text: str, folder: Path) -> str:
    """The text of README.md with its lines about the study written anew."""
    return replaced(text, written(Results(folder), SUMMARY.read_text().rstrip("\n")), "study", "README.md")
