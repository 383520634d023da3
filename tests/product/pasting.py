"""A reader at a shell: blocks are pasted into one bash as they are, and what it asks for is typed in."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.live import wait_for
from tests.product.documents import Block

BLOCK_SECONDS = 90.0


class PastingShell:
    """One bash that reads what is pasted, like a terminal's. It ends at the first command that fails."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            text=True,
            bufsize=1,
        )
        self._seen = ""
        self._count = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(5)

    def paste(self, block: Block, *, asks: Mapping[str, Callable[[], str]] | None = None) -> str:
        """Paste a block and wait for its end; returns what it printed.

        `asks`: a question that a block's last line prints before it reads a line, and what gives the answer.
        """
        start = len(self._seen)
        self._type(block.text)
        for question, answer in (asks or {}).items():
            if f'"{question}"; read' in block.last_line:
                self._wait(lambda question=question: question in self._seen[start:], block)  # type: ignore[misc]
                self._type(answer() + "\n")
        self._count += 1
        mark = f"-- pasted {self._count} --"
        self._type(f"\necho '{mark}'\n")
        self._wait(lambda: mark in self._seen, block)
        return re.sub(r"^-- pasted \d+ --\n", "", self._seen[start:].replace(mark, ""), flags=re.MULTILINE)

    def _wait(self, condition: Callable[[], bool], block: Block) -> None:
        def happened() -> bool:
            assert self._process.poll() is None, (
                f"line {block.line}: bash ended:\n{block.text}\n{self._seen[-3000:]}"
            )
            return condition()

        wait_for(happened, what=f"the end of the block at line {block.line}", seconds=BLOCK_SECONDS)

    def _type(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._seen += line
