"""Numbers and steps as people read them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits, with a real minus sign; a dash for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits - 1}e}"
        mantissa, exponent = text.split("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def breadth(text: str) -> float:
    """How wide a text is, in widths of a usual letter: capitals and full-width characters are wider."""
    return sum(
        1.9 if unicodedata.east_asian_width(c) in "WF" else 1.35 if c.isupper() or c in "mw@%…—" else 1.0 for c in text
    )


def fitted(text: str, most: float) -> str:
    """The beginning of a text that is no wider than so many letters, with an ellipsis where some is left out."""
    if breadth(text) <= most:
        return text
    kept = text
    while kept and breadth(f"{kept}…") > most:
        kept = kept[:-1]
    return f"{kept}…"


def percent(share: float | None) -> str:
    """A share of 1 in percent, whole numbers except near 0 and 1; a dash for None."""
    if share is None:
        return DASH
    is_plain = 0.0995 <= abs(share) < 0.995 or abs(share) == 1
    text = f"{100 * share:.0f}" if is_plain else f"{100 * share:.1f}"
    text = "0" if float(text) == 0 else text
    return f"{text} %".replace("-", MINUS, 1)


def steps(found: Sequence[int], most: int = 5) -> str:
    """Steps as an enumeration, of which the first few are told."""
    told = ", ".join(map(str, found[:most]))
    more = len(found) - most
    return f"step{'s' if len(found) != 1 else ''} {told}{f' and {more} more' if more > 0 else ''}"
