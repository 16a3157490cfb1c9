"""The findings as text for a terminal."""

from __future__ import annotations

import textwrap

from sysdag.reporting.formats import number, percent
from sysdag.reporting.page import Findings

WIDTH = 100


def described(found: Findings) -> str:
    """One run: its last numbers, the nodes' shares, and the diagnoses with their evidence and advice."""
    history = found.run.history
    status = found.run.facts.get("status") or "status unknown"
    lines = [f"{found.label}: {status}, {history.last_step} steps"]
    if found.best:
        lines[0] += f", best evaluation ({found.best[0]}) at step {found.best[1]}"
    lines += found.run.notes
    if found.metrics:
        lines += ["", f"{'':28}{'training':>10}  {'evaluation: first':>18}  {'best step':>10}  {'last':>10}"]
        lines += [
            f"{m.label:28}{number(m.training):>10}  {number(m.first):>18}  {number(m.best):>10}  {number(m.last):>10}"
            for m in found.metrics
        ]
    if found.shares:
        width = max(4, *(len(node.name) for node in found.shares.nodes))
        lines += ["", f"share of the margin, {found.shares.split}, step {found.shares.step}:"]
        lines += [f"{'node':{width}}  {'chosen':>10}  {'rejected':>10}  {'margin':>10}  {'share':>8}"]
        lines += [
            f"{node.name:{width}}  {number(node.chosen):>10}  {number(node.rejected):>10}  {number(node.margin):>10}  "
            f"{percent(node.share):>8}"
            for node in found.shares.nodes
        ]
    lines.append("")
    if not found.diagnoses:
        lines.append("No diagnosis: the numbers show nothing of what is looked for.")
    for diagnosis in found.diagnoses:
        lines.append(f"{diagnosis.level.upper()}: {diagnosis.title}")
        for part in (diagnosis.evidence, f"Try: {diagnosis.advice}"):
            lines += textwrap.wrap(part, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines)
