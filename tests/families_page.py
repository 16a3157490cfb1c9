"""docs/families.md against what its script finds, a table at a time."""

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location("pages_of_families", ROOT / "docs" / "families.py")
page = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = page  # where dataclasses look for it
_spec.loader.exec_module(page)


def titles() -> list[str]:
    """Of the tables on the page."""
    return re.findall(r"^## (.+)$", page.PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def check_page(title: str) -> None:
    """Fails where the table of that title is not what the script writes now."""
    _, _, rest = page.PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert rest.partition("\n## ")[0].strip() == "\n".join(page.table(title)).strip()
