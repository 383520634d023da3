"""What our documents hold: fenced blocks in their order, and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"^<!-- not run:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. `reason` says why the test leaves it out; empty for one that is run."""

    language: str
    text: str
    line: int
    reason: str

    @property
    def last_line(self) -> str:
        return self.text.rstrip("\n").rpartition("\n")[2]


def blocks_of(path: Path) -> list[Block]:
    """Every fenced block of a page, in order. A `not run` mark that no block follows is an error."""
    page = path.read_text()
    found = [
        Block(match["language"], match["text"], page.count("\n", 0, match.start()) + 1, match["reason"] or "")
        for match in _FENCE.finditer(page)
    ]
    assert len(_NOT_RUN.findall(page)) == sum(bool(block.reason) for block in found), (
        f"{path}: a mark without a block"
    )
    return found


def first_column(path: Path) -> set[str]:
    """All that is written as `code` in the first column of a page's tables."""
    rows = re.findall(r"^\| (.*?) \|", path.read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
